//! Counting tokens in an answer that passes by untouched.
//!
//! Invariants: bounded memory whatever comes; nothing is decoded but the last bytes, where engines write the usage. An estimate: without
//! a usage, an event is taken for a token.

/// Where a usage is looked for, from the end.
const TAIL_BYTES: usize = 4096;
const USAGE: &[u8] = b"\"completion_tokens\":";
const EVENT: &[u8] = b"data:";
/// A line that is no event.
const OTHER: usize = usize::MAX;

/// What was seen of one answer so far.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Events of a stream, its end included.
    events: u64,
    /// Bytes of the line so far, as far as they are those of `EVENT`.
    matched: usize,
    tail: Vec<u8>,
}

impl Tally {
    /// The next bytes; how many events begin in them.
    pub fn see(&mut self, bytes: &[u8]) -> u64 {
        let before = self.events;
        bytes.iter().for_each(|byte| self.step(*byte));
        self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]);
        let surplus = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
        self.events - before
    }

    fn step(&mut self, byte: u8) {
        self.matched = match byte {
            b'\n' => 0,
            byte if EVENT.get(self.matched) == Some(&byte) => self.matched + 1,
            _ => OTHER,
        };
        self.events += u64::from(self.matched == EVENT.len());
    }

    /// Tokens of the answer, as the engine says, or else as events came.
    pub fn generated_tokens(&self) -> u64 {
        self.usage().unwrap_or_else(|| self.events.saturating_sub(1))
    }

    fn usage(&self) -> Option<u64> {
        let at = self.tail.windows(USAGE.len()).rposition(|window| window == USAGE)?;
        let after = self.tail[at + USAGE.len()..].trim_ascii_start();
        let digits = after.iter().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&after[..digits]).ok()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_however_they_are_cut() {
        let text = b"data: {\"a\":\"data:\"}\n\ndata: {}\r\n\r\n: data:\n\ndata: [DONE]\n\n";
        for cut in 0..text.len() {
            let mut tally = Tally::default();
            let events = tally.see(&text[..cut]) + tally.see(&text[cut..]);
            assert_eq!((events, tally.generated_tokens()), (3, 2), "cut at {cut}");
        }
    }

    #[test]
    fn the_engine_knows_better() {
        let mut tally = Tally::default();
        tally.see(b"{\"choices\":[{\"text\":\"\\\"completion_tokens\\\":1\"}],");
        tally.see(&[b' '; 3 * TAIL_BYTES]);
        tally.see(b"\"usage\":{\"prompt_tokens\":3,\"completion_to");
        tally.see(b"kens\": 42}}");
        assert_eq!(tally.generated_tokens(), 42);
        assert!(tally.tail.len() <= TAIL_BYTES);
        assert_eq!(Tally::default().generated_tokens(), 0);
    }
}
