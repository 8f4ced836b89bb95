//! Azure's LLM inference traces of 2023: a CSV of arrival, prompt tokens and generated tokens, without any prefix.
//!
//! Owns the columns and the arithmetic of their timestamps. Invariant: no two rows share a block name, because nothing is
//! known to be shared.

use super::Row;
use kvd_proto::limits::CHAIN_BLOCKS_MAX;

const HEAD: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";

/// Reads line after line.
#[derive(Debug, Default)]
pub(super) struct Lines {
    headed: bool,
    start_ms: Option<u64>,
    names: u64,
}

impl Lines {
    /// The line's row; none in the head.
    pub(super) fn row(&mut self, line: &str, block_tokens: u64) -> Result<Option<Row>, String> {
        if !self.headed {
            self.headed = true;
            return if line == HEAD { Ok(None) } else { Err(format!("the head is {line:?}, not {HEAD:?}")) };
        }
        let [at, prompt, answer] = line.split(',').collect::<Vec<_>>()[..] else {
            return Err(format!("{line:?} does not have the columns {HEAD}"));
        };
        let at_ms = unix_ms(at)?;
        let start_ms = *self.start_ms.get_or_insert(at_ms);
        let timestamp =
            at_ms.checked_sub(start_ms).ok_or_else(|| format!("TIMESTAMP: {at} is before the first"))?;
        // longer ones than can be asked for at once would be refused anyway: their names are not even made
        let input_length = tokens("ContextTokens", prompt, block_tokens * CHAIN_BLOCKS_MAX as u64)?;
        let output_length = tokens("GeneratedTokens", answer, u64::from(u32::MAX))?;
        let blocks = input_length.div_ceil(block_tokens);
        let hash_ids = (self.names..self.names + blocks).collect();
        self.names += blocks;
        Ok(Some(Row { timestamp, input_length, output_length, hash_ids, ..Row::default() }))
    }
}

fn tokens(name: &str, text: &str, most: u64) -> Result<u64, String> {
    let tokens: u64 = text.parse().map_err(|_| format!("{name}: {text:?} is no number of tokens"))?;
    if tokens <= most { Ok(tokens) } else { Err(format!("{name}: {tokens}, at most {most}")) }
}

/// Milliseconds since 1970 of `2023-11-16 18:15:46.6805900`, UTC.
fn unix_ms(text: &str) -> Result<u64, String> {
    let wrong = || format!("TIMESTAMP: {text:?} is not like 2023-11-16 18:15:46.680");
    let numbers: Vec<&str> = text.split(['-', ' ', ':', '.']).collect();
    let [year, month, day, hour, minute, second, fraction] = numbers[..] else { return Err(wrong()) };
    let number = |text: &str, least: u64, most: u64| {
        text.parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(wrong)
    };
    let days = days_since_1970(number(year, 1970, 9999)?, number(month, 1, 12)?, number(day, 1, 31)?);
    let seconds = number(hour, 0, 23)? * 3600 + number(minute, 0, 59)? * 60 + number(second, 0, 60)?;
    let millis = format!("{fraction:0<3}");
    Ok((days * 86_400 + seconds) * 1000 + number(millis.get(..3).ok_or_else(wrong)?, 0, 999)?)
}

/// Days of the Gregorian calendar; a year is counted from March, so that the leap day is its last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let to_year = year * 365 + year / 4 - year / 100 + year / 400;
    // from the first of March of year 0 to 1970 are 719,468 days
    to_year + (month * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_utc() {
        assert_eq!(unix_ms("1970-01-01 00:00:00.0"), Ok(0));
        assert_eq!(unix_ms("2000-03-01 00:00:00.000"), Ok(951_868_800_000));
        assert_eq!(unix_ms("2023-11-16 18:15:46.6805900"), Ok(1_700_158_546_680));
        for text in [
            "",
            "2023-11-16",
            "2023-13-16 18:15:46.6",
            "2023-11-16 18:15:46.x",
            "2023-11-16 18:15:46.\u{e9}\u{e9}",
        ] {
            assert!(unix_ms(text).unwrap_err().contains("TIMESTAMP"), "{text}");
        }
    }

    #[test]
    fn rows_share_nothing() {
        let mut lines = Lines::default();
        assert_eq!(lines.row(HEAD, 512), Ok(None));
        let mut row = |line: &str| lines.row(line, 512);
        let one = row("2023-11-16 18:15:46.6805900,374,44").unwrap().unwrap();
        assert_eq!(
            one,
            Row { timestamp: 0, input_length: 374, output_length: 44, hash_ids: vec![0], ..Row::default() }
        );
        let two = row("2023-11-16 18:16:00.68,1025,1").unwrap().unwrap();
        assert_eq!((two.timestamp, two.hash_ids), (14_000, vec![1, 2, 3]));
        for (line, named) in [
            ("2023-11-16 18:16:00.68,1025", "columns"),
            ("2023-11-16 18:16:00.68,1025,1,1", "columns"),
            ("2023-11-16 18:16:00.68,1025,", "GeneratedTokens"),
            ("2023-11-16 18:16:00.68,-5,1", "ContextTokens"),
            ("2023-11-16 18:16:00.68,4000000000,1", "at most"),
            ("2022-11-16 18:16:00.68,5,1", "before"),
        ] {
            assert!(row(line).unwrap_err().contains(named), "{line}");
        }
        assert!(Lines::default().row("a,b", 512).unwrap_err().contains("head"));
    }
}
