//! Single values as people write and read them: id prefixes, durations, sizes, counts.

use std::fmt;
use std::str::FromStr;

const ID_BYTES: usize = 16;
const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const SHORT_SIZES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
const TIME_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
/// Oftener would be load rather than a look; more seldom is a graph's work. Beyond them: refused.
const INTERVAL_MS_MIN: u32 = 100;
const INTERVAL_MS_MAX: u32 = 3_600_000;

/// The beginning of a block id, 1 to 16 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prefix(pub(crate) Vec<u8>);

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        match digits {
            None => Err("an id is written in hex: digits 0-9 and a-f".into()),
            Some(digits) if digits.is_empty() || digits.len() > 2 * ID_BYTES => {
                Err(format!("{} digits; an id has {}", digits.len(), 2 * ID_BYTES))
            }
            Some(digits) if digits.len() % 2 == 1 => {
                Err(format!("{} digits are half a byte too many; give one more or one less", digits.len()))
            }
            Some(digits) => Ok(Self(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A whole block id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Id(pub(crate) [u8; ID_BYTES]);

impl FromStr for Id {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = text.parse::<Prefix>()?.0.try_into();
        whole
            .map(Self)
            .map_err(|bytes: Vec<u8>| format!("{} digits; an id has {}", 2 * bytes.len(), 2 * ID_BYTES))
    }
}

/// A time to live in milliseconds, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ttl(pub(crate) u32);

impl FromStr for Ttl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match milliseconds(text)? {
            0 => Err("0 would unpin; use `kvctl unpin`".into()),
            ttl_ms => Ok(Self(ttl_ms)),
        }
    }
}

/// A span of time in whole seconds, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) u32);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match milliseconds(text)? {
            0..1000 => Err("less than a second".into()),
            ms => Ok(Self(ms / 1000)),
        }
    }
}

/// The time from one look to the next, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interval(pub(crate) u32);

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match milliseconds(text)? {
            interval_ms if (INTERVAL_MS_MIN..=INTERVAL_MS_MAX).contains(&interval_ms) => {
                Ok(Self(interval_ms))
            }
            _ => Err("it is 100ms to 1h".into()),
        }
    }
}

/// Bytes, as `kvd.toml` takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = if unit.is_empty() { "B" } else { unit };
        let scale = SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let bytes = number.parse::<u64>().ok().zip(scale);
        let bytes = bytes.and_then(|(number, (_, scale))| number.checked_mul(*scale));
        bytes.map(Self).ok_or_else(|| "write a whole number and a unit: 64GiB, 512MiB, 1TiB".into())
    }
}

fn milliseconds(text: &str) -> Result<u32, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = TIME_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale);
    let ms = number.parse::<u64>().ok().zip(scale).and_then(|(number, scale)| number.checked_mul(scale));
    match ms.map(u32::try_from) {
        Some(Ok(ms)) => Ok(ms),
        Some(Err(_)) => Err("longer than 49 days".into()),
        None => Err("write a number and a unit: 30s, 10m, 2h, 1d".into()),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|d| char::from_digit(u32::from(d), 16))
        .collect()
}

/// "23.4 GiB".
pub(crate) fn size(bytes: u64) -> String {
    let (unit, scale) = SIZE_UNITS.iter().find(|(_, scale)| bytes >= *scale).unwrap_or(&SIZE_UNITS[4]);
    if bytes.is_multiple_of(*scale) {
        return format!("{} {unit}", bytes / scale);
    }
    format!("{:.1} {unit}", bytes as f64 / *scale as f64)
}

/// "1 h 3 min", with the two largest units.
pub(crate) fn duration_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..86_400_000 => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} d {} h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

/// "850 us", "1.3 ms".
pub(crate) fn duration_us(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1000.0),
        _ => duration_ms(us / 1000),
    }
}

/// "12,345,678".
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(",")
}

/// "87.5 %", or "-" of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

/// "12.3k": three digits of a number, for a narrow column.
pub(crate) fn short(number: f64) -> String {
    let (left, power) = scale(number, 1000.0);
    three_digits(left) + ["", "k", "M", "G", "T", "P", "E"][power]
}

/// "12.3Gi": likewise of bytes.
pub(crate) fn short_size(bytes: f64) -> String {
    let (left, power) = scale(bytes, 1024.0);
    three_digits(left) + SHORT_SIZES[power]
}

/// "1.50/64Gi": bytes of a capacity, in its unit; "-" of none.
pub(crate) fn short_share(used_bytes: u64, capacity_bytes: u64) -> String {
    if capacity_bytes == 0 {
        return "-".into();
    }
    let (capacity, power) = scale(capacity_bytes as f64, 1024.0);
    let used = used_bytes as f64 / 1024_f64.powi(power as i32);
    format!("{}/{}{}", three_digits(used), three_digits(capacity), SHORT_SIZES[power])
}

/// A number below 999.5, which has three digits, times a power of `step`; the largest power takes all that is more.
fn scale(number: f64, step: f64) -> (f64, usize) {
    let (mut left, mut power) = (number, 0);
    while left >= 999.5 && power + 1 < SHORT_SIZES.len() {
        left /= step;
        power += 1;
    }
    (left, power)
}

fn three_digits(number: f64) -> String {
    match number {
        _ if number.fract() == 0.0 => format!("{number:.0}"),
        ..9.995 => format!("{number:.2}"),
        ..99.95 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

/// "23h59m": the two largest units, for a narrow column.
pub(crate) fn short_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{:.1}s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{}m{}s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..86_400_000 => format!("{}h{}m", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{}d{}h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

/// What somebody else wrote, safe on a terminal and at most `most` characters long.
pub(crate) fn cut(text: &str, most: usize) -> String {
    let whole: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if whole.chars().count() <= most {
        return whole;
    }
    whole.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_whole_bytes_of_hex() {
        assert_eq!("3fA9".parse(), Ok(Prefix(vec![0x3f, 0xa9])));
        let whole = "00112233445566778899aabbccddeeff";
        assert_eq!(whole.parse::<Prefix>().unwrap().to_string(), whole);
        for (bad, why) in [
            ("", "0 digits"),
            ("3fa", "half a byte"),
            ("xy", "hex"),
            ("3fé9", "hex"),
            ("00112233445566778899aabbccddeeff00", "34 digits"),
        ] {
            let error = bad.parse::<Prefix>().unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!("30s".parse(), Ok(Ttl(30_000)));
        assert_eq!("2h".parse(), Ok(Ttl(7_200_000)));
        assert_eq!("250ms".parse(), Ok(Ttl(250)));
        for bad in ["", "5", "s", "0s", "-1s", "1.5h", "50d", "99999999999999999999s", "30 s"] {
            assert!(bad.parse::<Ttl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn intervals_have_limits() {
        assert_eq!(("1s".parse(), "100ms".parse()), (Ok(Interval(1000)), Ok(Interval(100))));
        for bad in ["0s", "99ms", "2h", "1", "soon"] {
            assert!(bad.parse::<Interval>().is_err(), "{bad}");
        }
    }

    #[test]
    fn narrow_columns_have_three_digits() {
        let shown = [0.0, 7.0, 0.25, 12.34, 999.4, 999.5, 12_345.0, 1e30].map(short);
        assert_eq!(shown[..7], ["0", "7", "0.25", "12.3", "999", "1.00k", "12.3k"]);
        assert!(shown[7].ends_with('E'), "{shown:?}");
        assert_eq!((short_size(1536.0), short_size(1000.0)), ("1.50Ki".into(), "0.98Ki".into()));
        let shares = [(3 << 29, 64 << 30), (0, 1000 << 30), (5, 0)].map(|(used, all)| short_share(used, all));
        assert_eq!(shares, ["1.50/64Gi", "0/0.98Ti", "-"]);
        let times = [999, 59_900, 61_000, 86_399_000, 90_000_000].map(short_ms);
        assert_eq!(times, ["999ms", "59.9s", "1m1s", "23h59m", "1d1h"]);
    }

    #[test]
    fn what_others_wrote_is_cut_and_cannot_move_the_cursor() {
        assert_eq!((cut("node-7", 6), cut("node-17", 6)), ("node-7".into(), "node-…".into()));
        assert_eq!(
            (cut("a\x1b[2Jb", 9), cut("ää", 2), cut("x", 0)),
            ("a?[2Jb".into(), "ää".into(), "…".into())
        );
    }

    #[test]
    fn numbers_are_shown() {
        assert_eq!(
            (size(0), size(25_125_558_681), size(4 << 20)),
            ("0 B".into(), "23.4 GiB".into(), "4 MiB".into())
        );
        assert_eq!((count(7), count(1_234_567)), ("7".into(), "1,234,567".into()));
        assert_eq!((percent(7, 8), percent(0, 0)), ("87.5 %".into(), "-".into()));
        let shown = [999, 1500, 61_000, 3_780_000, 90_000_000].map(duration_ms);
        assert_eq!(shown, ["999 ms", "1.5 s", "1 min 1 s", "1 h 3 min", "1 d 1 h"]);
        assert_eq!((duration_us(850), duration_us(1300)), ("850 us".into(), "1.3 ms".into()));
    }
}
