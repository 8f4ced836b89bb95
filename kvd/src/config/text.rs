//! The file: reading `kvd.toml`, and writing a complete, commented one.

use super::keys::{Kind, keys};
use super::size;
use super::values::Values;
use kvd_proto::Error;
use std::fmt::Write as _;
use std::path::Path;
use toml::{Table, Value};

/// More is not a configuration. At the limit: refused.
const FILE_BYTES_MAX: u64 = 1 << 20;
const COMMENT_COLUMNS: usize = 96;

pub(super) fn read(path: &Path) -> Result<Table, Error> {
    let unreadable = |reason: String| {
        let fix = "name a readable file with --config, or give none and take every default";
        Error::invalid("config", format!("{}: {reason}", path.display()), fix)
    };
    let bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(unreadable(format!("{bytes} bytes are more than {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    parse(&text).map_err(|mut error| {
        error.message = format!("{}: {}", path.display(), error.message);
        error
    })
}

pub(super) fn parse(text: &str) -> Result<Table, Error> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let line =
            error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let message = format!("line {line}: {}", error.message());
        Error::invalid("config", message, "mend the line; `kvd config` prints a complete file")
    })
}

/// Every key with its value, what it does and where the value came from.
pub(super) fn write(values: &Values) -> String {
    let mut out = String::new();
    comment(
        &mut out,
        "kvd.toml: every key with the value it has on this machine. Delete what may follow the machine.",
    );
    let mut current = "";
    for key in keys() {
        let (section, name) = key.name.split_once('.').unwrap_or(("", key.name));
        if section != current {
            writeln!(out, "\n[{section}]").expect("a String grows");
            current = section;
        }
        let resolved = values.get(key.name);
        out.push('\n');
        comment(&mut out, key.help);
        comment(&mut out, &resolved.origin);
        writeln!(out, "{name} = {}", shown(key.kind, &resolved.value)).expect("a String grows");
    }
    out
}

fn shown(kind: Kind, value: &Value) -> String {
    match value {
        Value::Integer(bytes) if kind == Kind::Size => size::exact(bytes.cast_unsigned()),
        other => other.to_string(),
    }
}

fn comment(out: &mut String, text: &str) {
    let mut columns = 0;
    for word in text.split(' ') {
        if columns == 0 || columns + word.len() > COMMENT_COLUMNS {
            out.push_str(if columns == 0 { "#" } else { "\n#" });
            columns = 1;
        }
        out.push(' ');
        out.push_str(word);
        columns += 1 + word.len();
    }
    out.push('\n');
}
