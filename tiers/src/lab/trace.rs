//! A workload as lines: what arrives when, how long it is, and which prefix blocks it names. Mooncake's JSONL format, and what a recording of kvd's has
//! beyond it (`kvctl trace record`; tiers/FORMAT.md).
//!
//! Owns the row, its text and its check. Invariants: a row that was checked is in limits; what is written is read again as the same. Leaves to
//! others: files (bench, kvctl), what a block contains.

use kvd_proto::limits::CHAIN_BLOCKS_MAX;
use serde::{Deserialize, Serialize};

/// Bytes of one line. At the limit: the file is refused.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Tokens of a block. At the limit: the row is refused.
pub const BLOCK_TOKENS_MAX: u64 = 1 << 20;
/// Bytes of a block: all uses of a trace together stay countable. At the limit: the row is refused.
pub const BLOCK_BYTES_MAX: u64 = 64 << 30;
const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Arrival in milliseconds since the start.
    pub timestamp: u64,
    /// Prompt tokens.
    pub input_length: u64,
    /// Tokens generated.
    pub output_length: u64,
    /// Prefix-chained block names: an equal name is an equal prompt up to the end of that block.
    pub hash_ids: Vec<u64>,
    /// Of a recording: blocks that were stored behind the prompt's, of what was generated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stored_ids: Vec<u64>,
    /// Of a recording: so many of the prompt's blocks came from this node's tiers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hit_blocks: Option<u64>,
    /// Of a recording: tokens of a block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_tokens: Option<u64>,
    /// Of a recording: bytes of a block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_bytes: Option<u64>,
    /// Of a recording: whose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

impl Row {
    /// From a line.
    pub fn parse(line: &str) -> Result<Self, String> {
        serde_json::from_str(line).map_err(|error| error.to_string())
    }

    /// A line, with its end.
    pub fn line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("numbers and names have a text");
        line.push('\n');
        line
    }

    /// Whether it can be what follows a row of `after_ms`; an error names the field, the value and what it should be. What a recording says of its blocks goes before `block_tokens`.
    pub fn check(&self, block_tokens: u64, after_ms: u64) -> Result<(), String> {
        let (blocks, block_tokens) = (self.hash_ids.len() as u64, self.block_tokens.unwrap_or(block_tokens));
        let in_all = blocks + self.stored_ids.len() as u64;
        if self.timestamp < after_ms {
            return Err(format!("timestamp: {} is before the line above, {after_ms}", self.timestamp));
        }
        if self.hit_blocks.is_some_and(|hits| hits > blocks) {
            return Err(format!("hit_blocks: {} of {blocks} blocks", self.hit_blocks.unwrap_or(0)));
        }
        if self.block_bytes.is_some_and(|bytes| !(1..=BLOCK_BYTES_MAX).contains(&bytes)) {
            return Err(format!("block_bytes: give 1 to {BLOCK_BYTES_MAX}"));
        }
        if blocks == 0 && self.input_length == 0 && in_all > 0 && in_all <= CHAIN_BLOCKS_MAX as u64 {
            return Ok(()); // stored without having been asked for
        }
        if self.input_length == 0 {
            return Err("input_length: 0, a prompt has tokens".to_owned());
        }
        if blocks == 0 || in_all > 2 * CHAIN_BLOCKS_MAX as u64 || blocks > CHAIN_BLOCKS_MAX as u64 {
            return Err(format!(
                "hash_ids: {blocks} blocks, 1 to {CHAIN_BLOCKS_MAX} can be asked for at once"
            ));
        }
        if !(1..=BLOCK_TOKENS_MAX).contains(&block_tokens) {
            return Err(format!("block_tokens: {block_tokens}, give 1 to {BLOCK_TOKENS_MAX}"));
        }
        if self.input_length > blocks * block_tokens
            || self.input_length + block_tokens <= (blocks - 1) * block_tokens
        {
            return Err(format!(
                "hash_ids: {blocks} blocks of {block_tokens} tokens do not fit input_length {}",
                self.input_length
            ));
        }
        Ok(())
    }
}

/// The splitmix64 finaliser: a bijection that spreads small names over all bits.
pub fn mix(name: u64) -> u64 {
    let mut key = name.wrapping_add(WEYL);
    key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let plain =
            Row { timestamp: 5, input_length: 600, output_length: 3, hash_ids: vec![0, 7], ..Row::default() };
        let text = "{\"timestamp\":5,\"input_length\":600,\"output_length\":3,\"hash_ids\":[0,7]}\n";
        assert_eq!(plain.line(), text, "Mooncake's own");
        assert_eq!(Row::parse(text.trim_end()).unwrap(), plain);
        let recorded = Row {
            stored_ids: vec![u64::MAX],
            hit_blocks: Some(1),
            block_tokens: Some(512),
            block_bytes: Some(1 << 20),
            tenant: Some("default".to_owned()),
            ..plain
        };
        assert_eq!(Row::parse(recorded.line().trim_end()).unwrap(), recorded);
        assert!(recorded.check(16, 5).is_ok(), "its own block size counts");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let row =
            Row { timestamp: 5, input_length: 600, output_length: 3, hash_ids: vec![0, 7], ..Row::default() };
        for (bad, says) in [
            (Row { timestamp: 3, ..row.clone() }, "timestamp: 3"),
            (Row { input_length: 0, ..row.clone() }, "input_length: 0"),
            (Row { hash_ids: vec![], ..row.clone() }, "hash_ids: 0 blocks"),
            (Row { block_tokens: Some(16), ..row.clone() }, "hash_ids: 2 blocks of 16"),
            (Row { block_tokens: Some(0), ..row.clone() }, "block_tokens: 0"),
            (Row { block_bytes: Some(u64::MAX), ..row.clone() }, "block_bytes: give 1 to"),
            (Row { hit_blocks: Some(3), ..row.clone() }, "hit_blocks: 3 of 2"),
        ] {
            let error = bad.check(512, 4).unwrap_err();
            assert!(error.starts_with(says), "{error}");
        }
        assert!(row.check(512, 5).is_ok());
        assert!(Row::parse("{\"timestamp\":5}").unwrap_err().contains("input_length"));
        assert!(Row::parse("{\"timestamp\":5,\"x\":1}").unwrap_err().contains('x'));
    }
}
