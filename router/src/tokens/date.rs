//! `strftime_now`, which some chat templates write today's date with.
//!
//! Invariants: UTC; a directive that is not known stands as it is. Leaves to others: what time it is.

use std::fmt::Write as _;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const DAY_S: u64 = 86_400;

/// `format` at so many seconds after 1970.
pub(super) fn strftime(format: &str, unix_s: u64) -> String {
    let (year, month, day) = civil(unix_s / DAY_S);
    let weekday = DAYS[(unix_s / DAY_S % 7) as usize];
    let (month_name, second) = (MONTHS[month as usize - 1], unix_s % DAY_S);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(letter) = rest.next() {
        let written = match (letter, letter == '%') {
            (_, false) => write!(out, "{letter}"),
            _ => match rest.next() {
                Some('Y') => write!(out, "{year}"),
                Some('y') => write!(out, "{:02}", year % 100),
                Some('m') => write!(out, "{month:02}"),
                Some('d') => write!(out, "{day:02}"),
                Some('B') => write!(out, "{month_name}"),
                Some('b') => write!(out, "{}", &month_name[..3]),
                Some('A') => write!(out, "{weekday}"),
                Some('a') => write!(out, "{}", &weekday[..3]),
                Some('H') => write!(out, "{:02}", second / 3600),
                Some('M') => write!(out, "{:02}", second / 60 % 60),
                Some('S') => write!(out, "{:02}", second % 60),
                Some('%') | None => write!(out, "%"),
                Some(other) => write!(out, "%{other}"),
            },
        };
        written.expect("a String grows");
    }
    out
}

/// Year, month and day of a day after 1970, by eras of 400 years that begin in March.
fn civil(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let march_month = (5 * of_year + 2) / 153;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, of_year - (153 * march_month + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_other_clocks_write_them() {
        assert_eq!(strftime("%A %d %B %Y", 0), "Thursday 01 January 1970");
        assert_eq!(strftime("%d %b %y %H:%M:%S", 1_709_210_096), "29 Feb 24 12:34:56");
        assert_eq!(strftime("%a %Y-%m-%d", 4_102_444_800), "Fri 2100-01-01");
        assert_eq!(strftime("100%% %q %", 1), "100% %q %");
    }
}
