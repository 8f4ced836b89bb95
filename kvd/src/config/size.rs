//! Sizes in bytes, as people write and read them.

use kvd_proto::Error;
use toml::Value;

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// An integer of bytes or a text such as "512MiB", "8 GiB", "1.5TiB"; `key` names it in the error.
pub(super) fn parse(key: &str, value: &Value) -> Result<u64, Error> {
    let bytes = match value {
        Value::Integer(bytes) => u64::try_from(*bytes).ok(),
        Value::String(text) => parse_text(text),
        _ => None,
    };
    bytes.ok_or_else(|| {
        let fix = "write bytes as an integer, or a text such as \"512MiB\" or \"8GiB\"";
        Error::invalid(key, format!("{value} is not a size"), fix)
    })
}

/// A text such as "512MiB" or "4096".
pub fn parse_text(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let known = |(name, _): &&(&str, u64)| name.eq_ignore_ascii_case(unit);
    let scale = if unit.is_empty() { 1 } else { UNITS.iter().find(known)?.1 };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale);
    }
    let bytes = number.parse::<f64>().ok()? * scale as f64;
    (bytes < i64::MAX as f64).then_some(bytes as u64)
}

/// For people: "23.4 GiB".
pub fn human(bytes: u64) -> String {
    let (unit, scale) = UNITS.iter().find(|(_, scale)| bytes >= *scale).unwrap_or(&UNITS[4]);
    if bytes.is_multiple_of(*scale) {
        return format!("{} {unit}", bytes / scale);
    }
    format!("{:.1} {unit}", bytes as f64 / *scale as f64)
}

/// For a file: exact, in the largest unit that divides it; what `parse` reads back.
pub(super) fn exact(bytes: u64) -> String {
    let fits = |(_, scale): &&(&str, u64)| bytes >= *scale && bytes.is_multiple_of(*scale);
    match UNITS.iter().find(fits) {
        Some((unit, scale)) if *scale > 1 => format!("\"{}{unit}\"", bytes / scale),
        _ => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        let size = |text: &str| parse("dram.capacity_bytes", &text.into()).ok();
        assert_eq!(size("512MiB"), Some(512 << 20));
        assert_eq!(size("8 gib"), Some(8 << 30));
        assert_eq!(size("1.5TiB"), Some(3 << 39));
        assert_eq!(size("4096"), Some(4096));
        for bad in ["", "MiB", "8GB", "-1", "8 gigs", "1.2.3GiB", "99999999TiB", "1e3GiB"] {
            assert_eq!(size(bad), None, "{bad}");
        }
        assert_eq!(parse("x", &Value::Integer(-1)).unwrap_err().field, "x");
    }

    #[test]
    fn shows_what_people_read() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(25_125_558_681), "23.4 GiB");
        assert_eq!(human(4 << 20), "4 MiB");
    }

    proptest! {
        #[test]
        fn exact_reads_back(bytes in 0..u64::MAX / 2, shift in 0..63u32) {
            let bytes = (bytes >> shift) << (shift / 2);
            let value: toml::Table = toml::from_str(&format!("a = {}", exact(bytes))).unwrap();
            prop_assert_eq!(parse("a", &value["a"]).unwrap(), bytes);
        }
        #[test]
        fn any_text_never_panics(text in ".{0,20}") {
            let _ = parse("a", &Value::String(text));
        }
    }
}
