//! What an engine says of a request's future, checked: what keeping its blocks is worth to it, for how long, and what it expects next.
//!
//! Owns what may be said. Invariants: a hint steers what is kept and no answer; whoever says nothing is as everybody before there were hints.
//! Leaves to others: what follows from it (`tiers::eviction`), how far a time to live is kept (there, too).

use crate::limits::{HINT_MS_MAX, HINT_PRIORITY_PERCENT_MAX};
use crate::{Error, wire};

/// What a request without a hint at it has for its priority.
const PRIORITY_PERCENT_DEFAULT: u16 = 100;

/// What an engine knows of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hints {
    /// What the time saved for it is worth, in percent of what it is worth for others.
    pub priority_percent: u16,
    /// How long its blocks should stay after this use, whatever else there is to keep; 0: as long as they are worth it.
    pub ttl_ms: u32,
    /// What comes next.
    pub expects: Expects,
}

/// What comes after a request, of its conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expects {
    /// Nobody knows.
    #[default]
    Unknown,
    /// It goes on as soon as a tool has answered.
    ToolCall {
        /// After about so long; 0: nobody knows.
        return_ms: u32,
    },
    /// Nothing.
    SessionEnd,
}

impl Default for Hints {
    fn default() -> Self {
        Self { priority_percent: PRIORITY_PERCENT_DEFAULT, ttl_ms: 0, expects: Expects::Unknown }
    }
}

impl Hints {
    /// As they travel. What a later version expects is unknown to this one, and no reason to refuse a request.
    pub fn from_wire(hints: Option<&wire::Hints>) -> Result<Self, Error> {
        let Some(hints) = hints else { return Ok(Self::default()) };
        let priority = match hints.priority {
            0 => PRIORITY_PERCENT_DEFAULT,
            percent => within("hints.priority", percent, HINT_PRIORITY_PERCENT_MAX)? as u16,
        };
        let return_ms = within("hints.return_ms", hints.return_ms, HINT_MS_MAX)?;
        let expects = match hints.expects() {
            wire::Expects::ToolCall => Expects::ToolCall { return_ms },
            wire::Expects::SessionEnd => Expects::SessionEnd,
            wire::Expects::Unspecified => Expects::Unknown,
        };
        let tool = matches!(expects, Expects::ToolCall { .. });
        let known = wire::Expects::try_from(hints.expects).is_ok();
        if return_ms > 0 && !tool && known {
            return Err(Error::invalid(
                "hints.return_ms",
                format!("{return_ms}, and no tool call is expected"),
                "say that one is (EXPECTS_TOOL_CALL), or leave it 0",
            ));
        }
        let ttl_ms = within("hints.ttl_ms", hints.ttl_ms, HINT_MS_MAX)?;
        Ok(Self { priority_percent: priority, ttl_ms, expects })
    }

    /// To be sent; `None`: there is nothing to say.
    pub fn to_wire(self) -> Option<wire::Hints> {
        let (expects, return_ms) = match self.expects {
            Expects::Unknown => (wire::Expects::Unspecified, 0),
            Expects::ToolCall { return_ms } => (wire::Expects::ToolCall, return_ms),
            Expects::SessionEnd => (wire::Expects::SessionEnd, 0),
        };
        let (priority, ttl_ms) = (self.priority_percent.into(), self.ttl_ms);
        (self != Self::default()).then(|| wire::Hints {
            priority,
            ttl_ms,
            expects: expects.into(),
            return_ms,
        })
    }

    /// What saving so many microseconds for it is worth, in microseconds for others.
    pub fn weigh_us(&self, saved_us: f64) -> f64 {
        saved_us * (f64::from(self.priority_percent) / 100.0)
    }
}

fn within(field: &str, value: u32, most: u32) -> Result<u32, Error> {
    if value <= most {
        return Ok(value);
    }
    Err(Error::invalid(field, value.to_string(), format!("give at most {most}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    fn read(hints: wire::Hints) -> Result<Hints, Error> {
        Hints::from_wire(Some(&hints))
    }

    #[test]
    fn survive_the_wire() {
        assert_eq!((Hints::default().to_wire(), Hints::from_wire(None)), (None, Ok(Hints::default())));
        let expected = [Expects::Unknown, Expects::ToolCall { return_ms: 1500 }, Expects::SessionEnd];
        for expects in expected {
            let hints = Hints { priority_percent: 200, ttl_ms: HINT_MS_MAX, expects };
            let request = wire::MatchRequest { space: 7, hints: hints.to_wire(), ..Default::default() };
            let bytes = request.encode_to_vec();
            let read = wire::MatchRequest::decode(&bytes[..]).unwrap();
            assert_eq!(Hints::from_wire(read.hints.as_ref()), Ok(hints));
            // a daemon that has never heard of hints reads the rest: its messages end with field 6
            let mut older = bytes.clone();
            let at = request.encoded_len() - 2 - request.hints.as_ref().unwrap().encoded_len();
            older.truncate(at);
            assert_eq!(wire::MatchRequest { hints: None, ..read }.encode_to_vec(), older);
        }
    }

    #[test]
    fn what_can_never_be_right_is_refused_by_name() {
        let refused = |hints| read(hints).expect_err("it is refused");
        let error = refused(wire::Hints { priority: 1001, ..Default::default() });
        assert_eq!(error.to_string(), "hints.priority: 1001; give at most 1000");
        let error = refused(wire::Hints { ttl_ms: HINT_MS_MAX + 1, ..Default::default() });
        assert_eq!(error.field, "hints.ttl_ms");
        let error = refused(wire::Hints { return_ms: u32::MAX, expects: 1, ..Default::default() });
        assert_eq!(error.field, "hints.return_ms");
        let error = refused(wire::Hints { return_ms: 5, ..Default::default() });
        assert!(error.field == "hints.return_ms" && error.fix.contains("EXPECTS_TOOL_CALL"), "{error}");
        let later = read(wire::Hints { expects: 9, return_ms: 5, ttl_ms: 8, priority: 0 }).unwrap();
        assert_eq!(later, Hints { ttl_ms: 8, ..Hints::default() }, "of a version to come");
    }

    #[test]
    fn a_priority_is_a_price() {
        let of = |priority_percent| Hints { priority_percent, ..Hints::default() }.weigh_us(1234.5);
        assert_eq!([of(100).to_bits(), of(200).to_bits()], [1234.5_f64.to_bits(), 2469.0_f64.to_bits()]);
    }
}
