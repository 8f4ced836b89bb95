//! What was given, checked against the table of keys and completed with its defaults.
//!
//! Invariant: `Values` has every key of the table exactly once, each of its kind; sizes are integers.

use super::keys::{Key, Kind, keys};
use super::machine::Machine;
use super::{integer, size};
use kvd_proto::Error;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use toml::{Table, Value};

/// A value and where it came from.
pub(super) struct Resolved {
    /// The value.
    pub(super) value: Value,
    /// For people.
    pub(super) origin: String,
}

/// Every key's value.
#[derive(Default)]
pub(super) struct Values {
    by_name: BTreeMap<&'static str, Resolved>,
}

impl Values {
    /// Completes `given`, which came from `source`.
    pub(super) fn resolve(given: &Table, source: &str, machine: &Machine) -> Result<Self, Error> {
        refuse_unknown(given)?;
        let mut values = Self::default();
        for key in keys() {
            let resolved = match lookup(given, key.name) {
                Some(value) => key.given(value, source)?,
                None => key.defaulted(machine, &values)?,
            };
            values.by_name.insert(key.name, resolved);
        }
        Ok(values)
    }

    /// One key's value and origin.
    pub(super) fn get(&self, name: &str) -> &Resolved {
        self.by_name.get(name).unwrap_or_else(|| panic!("{name} stands below the key that asks for it"))
    }

    /// A key that is a text or path.
    pub(super) fn text(&self, name: &str) -> &str {
        self.get(name).value.as_str().expect("a text was checked")
    }

    /// A key that is a size.
    pub(super) fn bytes(&self, name: &str) -> u64 {
        self.get(name)
            .value
            .as_integer()
            .and_then(|bytes| u64::try_from(bytes).ok())
            .expect("a size was checked")
    }

    /// As nested tables, for serde.
    pub(super) fn to_table(&self) -> Table {
        let mut table = Table::new();
        for (name, resolved) in &self.by_name {
            let (section, key) = name.split_once('.').unwrap_or(("", name));
            let within = match section {
                "" => &mut table,
                _ => table
                    .entry(section)
                    .or_insert_with(|| Table::new().into())
                    .as_table_mut()
                    .expect("a section's name is no key"),
            };
            within.insert(key.into(), resolved.value.clone());
        }
        table
    }
}

impl Key {
    fn given(&self, value: &Value, source: &str) -> Result<Resolved, Error> {
        Ok(Resolved { value: self.read(value)?, origin: format!("Set in {source}.") })
    }

    fn defaulted(&self, machine: &Machine, above: &Values) -> Result<Resolved, Error> {
        let (value, why) = (self.default)(machine, above);
        let Ok(value) = self.read(&value) else {
            return Err(Error::invalid(self.name, why, format!("set {} in kvd.toml", self.name)));
        };
        Ok(Resolved { value, origin: format!("Default: {why}.") })
    }

    /// Checks a given value's kind; sizes become integers.
    fn read(&self, value: &Value) -> Result<Value, Error> {
        if self.kind == Kind::Size {
            return Ok(integer(size::parse(self.name, value)?));
        }
        if self.accepts(value) {
            return Ok(value.clone());
        }
        Err(Error::invalid(self.name, format!("{value} is not {}", self.kind.wanted()), self.kind.fix()))
    }

    fn accepts(&self, value: &Value) -> bool {
        match self.kind {
            Kind::Size => unreachable!("read above"),
            Kind::Count => value.as_integer().is_some_and(|number| u32::try_from(number).is_ok()),
            Kind::Flag => value.is_bool(),
            Kind::Path | Kind::Text => value.as_str().is_some_and(|text| !text.is_empty()),
            Kind::OptionalPath | Kind::OptionalText => value.is_str(),
            Kind::Address => {
                value.as_str().is_some_and(|text| text.is_empty() || text.parse::<SocketAddr>().is_ok())
            }
            Kind::Host => value.as_str() == Some("") || is_host(value),
            Kind::Hosts => value.as_array().is_some_and(|hosts| hosts.iter().all(is_host)),
            Kind::Choice(words) => value.as_str().is_some_and(|text| words.contains(&text)),
        }
    }
}

/// "host:port".
fn is_host(value: &Value) -> bool {
    let parts = value.as_str().and_then(|text| text.rsplit_once(':'));
    parts.is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(['/', ' ']) && port.parse::<u16>().is_ok()
    })
}

impl Kind {
    fn wanted(self) -> &'static str {
        match self {
            Self::Size => "a size",
            Self::Count => "a number of 0 or more",
            Self::Flag => "true or false",
            Self::Path | Self::OptionalPath => "a path",
            Self::Text | Self::OptionalText => "a name",
            Self::Address => "an address with a port",
            Self::Host => "a host with a port",
            Self::Hosts => "a list of hosts with ports",
            Self::Choice(_) => "one of its words",
        }
    }

    fn fix(self) -> String {
        match self {
            Self::Size => "write \"512MiB\" or \"8GiB\"".into(),
            Self::Count => "write an integer below 4294967296, without quotes".into(),
            Self::Flag => "write true or false, without quotes".into(),
            Self::Path | Self::Text => "write a text in quotes, not empty".into(),
            Self::OptionalPath => "write a path in quotes, or \"\" for none".into(),
            Self::OptionalText => "write a text in quotes, or \"\" for none".into(),
            Self::Address => "write one such as \"127.0.0.1:7700\" or \"[::1]:7700\", or \"\" for off".into(),
            Self::Host => "write one such as \"10.0.0.1:7700\" or \"node-2:7700\", or \"\" for none".into(),
            Self::Hosts => "write [\"10.0.0.1:7700\", \"node-2:7700\"], or [] for none".into(),
            Self::Choice(words) => format!("write \"{}\"", words.join("\" or \"")),
        }
    }
}

fn lookup<'a>(given: &'a Table, name: &str) -> Option<&'a Value> {
    match name.split_once('.') {
        Some((section, key)) => given.get(section)?.get(key),
        None => given.get(name),
    }
}

fn refuse_unknown(given: &Table) -> Result<(), Error> {
    for (name, value) in given {
        let is_section = keys().any(|key| key.name.split_once('.').is_some_and(|(s, _)| s == name));
        match (value, is_section) {
            (Value::Table(section), true) => {
                section.keys().try_for_each(|key| refuse_unknown_key(&format!("{name}.{key}")))?;
            }
            (_, true) => {
                let fix = format!("write its keys under [{name}]");
                return Err(Error::invalid(name, format!("{value} is not a section"), fix));
            }
            (Value::Table(section), false) => {
                let key = section.keys().next().map_or_else(|| name.clone(), |key| format!("{name}.{key}"));
                refuse_unknown_key(&key)?;
                return Err(Error::invalid(name, "is not a section", "`kvd config` prints every section"));
            }
            (_, false) => refuse_unknown_key(name)?,
        }
    }
    Ok(())
}

fn refuse_unknown_key(name: &str) -> Result<(), Error> {
    if keys().any(|key| key.name == name) {
        return Ok(());
    }
    let fix = match nearest(name) {
        Some(known) => format!("did you mean {known}? `kvd config` prints every key"),
        None => "`kvd config` prints every key".into(),
    };
    Err(Error::invalid(name, "is not a key of kvd.toml", fix))
}

/// The known key with the fewest edits, if they are few; a key in the wrong section counts as near.
fn nearest(name: &str) -> Option<&'static str> {
    let last = |name: &str| name.rsplit('.').next().map(str::to_owned);
    let edits = |key: &Key| {
        if last(key.name) == last(name) { 1 } else { edit_distance(key.name, name) }
    };
    // of sections that all have such a key, the one whose name is nearer
    let best = keys().min_by_key(|key| (edits(key), edit_distance(key.name, name)))?;
    (edits(best) <= name.len().div_ceil(3)).then_some(best.name)
}

/// Levenshtein's.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
