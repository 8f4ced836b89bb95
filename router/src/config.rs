//! The configuration: one TOML file, every key defaulted and explained in one table.
//!
//! Invariants: `KEYS` and `Config` have the same keys (a test compares them); a `Config` that exists passed `check`; an
//! error names the key, the value and the fix. The environment is not read.

use crate::place::Targets;
use kvd_proto::Error;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// More is not a configuration. At the limit: refused.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest of all times, a day. At the limit: refused.
const TIME_MS_MAX: u64 = 86_400_000;
/// Models of one router. At the limit: refused.
pub const MODELS_MAX: usize = 256;

/// Every key and what it does, in the order of the file; those of `[[model]]` come after.
const KEYS: &[(&str, &str)] = &[
    (
        "placement",
        "\"cost\": the worker predicted to answer first; \"round-robin\": each in turn, to compare with.",
    ),
    (
        "listen.http_address",
        "Where /v1/..., /metrics and the rest are served. Not encrypted: put TLS in front of what others can reach.",
    ),
    ("kvd.address", "gRPC address of the nearest kvd (its listen.grpc_address). It knows the other nodes."),
    (
        "kvd.locate_ms",
        "How long it may take to say who has a prompt's blocks. Later: placed as if nobody had.",
    ),
    ("kvd.reserve_ms", "How long a worker's node may take to promise it. Later: the next best worker."),
    (
        "kvd.reservation_ms",
        "How long a promise stands until the engine counts the request, a prefill elsewhere included.",
    ),
    (
        "targets.first_token_ms",
        "Time to first token that was promised: prefill and decode are split only to keep it.",
    ),
    ("targets.next_token_ms", "Time between tokens that was promised: as above."),
    ("engine.connect_ms", "How long an engine may take to take a connection. Later: the next best worker."),
    (
        "engine.first_byte_ms",
        "Until a stream's first byte, prefill elsewhere apart. Later: the next best worker.",
    ),
    ("engine.answer_ms", "As above for what is not streamed, whose first byte is its last token's."),
    ("engine.idle_ms", "Between two bytes of an answer. Later: it is cut off, with an error."),
    ("engine.shun_ms", "How long a worker that broke is not tried again while there are others."),
    ("engine.tries", "Workers tried for one request, 1 to 8."),
    ("limits.body_bytes", "Bytes of a request. More: 413."),
    ("limits.body_ms", "How long a request's body may take to come. Later: 408."),
    ("limits.requests", "Requests at once. More: 429."),
    ("limits.drain_ms", "From SIGTERM until requests under way are cut off."),
];

const MODEL_HELP: &str = "\n# One for each model; without any, those of registered workers are served, placed by load alone.\n\
    # name: as clients and workers call it. tokenizer: its folder, or a tokenizer.json; without one it is placed by load alone.\n\
    # output_tokens_expected: reserved for an answer, unless the request asks for less. context_tokens_max: prompt and answer\n\
    # together; 0: what the workers hold. block_bytes: of one block of its space, to predict fetches from other nodes; 0: not known.\n";

macro_rules! sections {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty = $default:expr,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    )*};
}

sections! {
    /// Everything that can be set.
    Config {
        /// How workers are chosen.
        placement: Placement = Placement::Cost,
        /// Where it listens.
        listen: Listen = Listen::default(),
        /// The nearest node.
        kvd: Kvd = Kvd::default(),
        /// What was promised.
        targets: TargetsConfig = TargetsConfig::default(),
        /// What is expected of engines.
        engine: Engine = Engine::default(),
        /// What is taken from clients.
        limits: Limits = Limits::default(),
        /// Who is served.
        model: Vec<Model> = Vec::new(),
    }
    /// Where it listens.
    Listen {
        /// HTTP.
        http_address: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8080)),
    }
    /// The nearest node.
    Kvd {
        /// gRPC.
        address: String = "http://127.0.0.1:7700".to_owned(),
        /// Of one question for blocks.
        locate_ms: u64 = 20,
        /// Of one wish for a worker.
        reserve_ms: u64 = 50,
        /// Of a promise.
        reservation_ms: u32 = 30_000,
    }
    /// What was promised.
    TargetsConfig {
        /// Until the first token.
        first_token_ms: f64 = 500.0,
        /// Between tokens.
        next_token_ms: f64 = 50.0,
    }
    /// What is expected of engines.
    Engine {
        /// Until connected.
        connect_ms: u64 = 1000,
        /// Of a stream.
        first_byte_ms: u64 = 60_000,
        /// Of what is not streamed.
        answer_ms: u64 = 600_000,
        /// Between bytes.
        idle_ms: u64 = 30_000,
        /// After a failure.
        shun_ms: u64 = 2000,
        /// For one request.
        tries: usize = 3,
    }
    /// What is taken from clients.
    Limits {
        /// Of one request.
        body_bytes: usize = 16 << 20,
        /// Until it is here.
        body_ms: u64 = 30_000,
        /// At once.
        requests: usize = 4096,
        /// At the end.
        drain_ms: u64 = 30_000,
    }
    /// One model.
    Model {
        /// As clients and workers call it.
        name: String = String::new(),
        /// A folder or a file.
        tokenizer: Option<PathBuf> = None,
        /// Of an answer.
        output_tokens_expected: u32 = 256,
        /// Of prompt and answer.
        context_tokens_max: u64 = 0,
        /// Of a block, all groups.
        block_bytes: u64 = 0,
    }
}

/// How workers are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// By prediction.
    Cost,
    /// In turn.
    RoundRobin,
}

impl std::str::FromStr for Placement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cost" => Ok(Self::Cost),
            "round-robin" => Ok(Self::RoundRobin),
            _ => Err("say cost or round-robin".to_owned()),
        }
    }
}

impl Config {
    /// Reads `path`, or takes every default where there is none.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        path.map_or_else(|| Self::parse(""), |path| Self::parse(&read(path)?))
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            let message = format!("line {}: {}", 1 + text[..at].matches('\n').count(), error.message());
            Error::invalid("config", message, "mend the line; `router config` prints a complete file")
        })?;
        config.check()?;
        Ok(config)
    }

    /// A complete, commented file with these values.
    pub fn explain(&self) -> String {
        let table = toml::Table::try_from(self).expect("a config is a table");
        let mut out = String::from("# router: every key with its value.\n");
        let mut current = "";
        for (key, help) in KEYS {
            let (section, name) = key.split_once('.').unwrap_or(("", key));
            if section != current {
                write!(out, "\n[{section}]\n").expect("a String grows");
                current = section;
            }
            let within =
                if section.is_empty() { &table } else { table[section].as_table().expect("a section") };
            write!(out, "\n# {help}\n{name} = {}\n", within[name]).expect("a String grows");
        }
        out.push_str(MODEL_HELP);
        for model in table["model"].as_array().expect("a list") {
            write!(out, "\n[[model]]\n{}", model.as_table().expect("a table")).expect("a String grows");
        }
        out
    }

    /// Checks each value's range and the values against each other.
    pub fn check(&self) -> Result<(), Error> {
        for (key, ms) in [
            ("kvd.locate_ms", self.kvd.locate_ms),
            ("kvd.reserve_ms", self.kvd.reserve_ms),
            ("kvd.reservation_ms", self.kvd.reservation_ms.into()),
            ("engine.connect_ms", self.engine.connect_ms),
            ("engine.first_byte_ms", self.engine.first_byte_ms),
            ("engine.answer_ms", self.engine.answer_ms),
            ("engine.idle_ms", self.engine.idle_ms),
            ("limits.body_ms", self.limits.body_ms),
        ] {
            range(key, ms as f64, 1.0, TIME_MS_MAX as f64)?;
        }
        range("engine.shun_ms", self.engine.shun_ms as f64, 0.0, TIME_MS_MAX as f64)?;
        range("limits.drain_ms", self.limits.drain_ms as f64, 0.0, TIME_MS_MAX as f64)?;
        range("engine.tries", self.engine.tries as f64, 1.0, 8.0)?;
        range("limits.body_bytes", self.limits.body_bytes as f64, 1024.0, 1e9)?;
        range("limits.requests", self.limits.requests as f64, 1.0, 1e6)?;
        range("targets.first_token_ms", self.targets.first_token_ms, 0.001, TIME_MS_MAX as f64)?;
        range("targets.next_token_ms", self.targets.next_token_ms, 0.001, TIME_MS_MAX as f64)?;
        if !self.kvd.address.starts_with("http://") {
            let fix = "write one such as \"http://127.0.0.1:7700\"";
            return Err(Error::invalid("kvd.address", format!("{:?} is no address", self.kvd.address), fix));
        }
        self.check_models()
    }

    fn check_models(&self) -> Result<(), Error> {
        if self.model.len() > MODELS_MAX {
            let message = format!("{} models", self.model.len());
            return Err(Error::limit("model", message, format!("list at most {MODELS_MAX}")));
        }
        for (at, model) in self.model.iter().enumerate() {
            let again = self.model[..at].iter().any(|before| before.name == model.name);
            if model.name.is_empty() || again {
                let message = format!("{:?} is empty or stands twice", model.name);
                return Err(Error::invalid("model.name", message, "give each [[model]] its own name"));
            }
            range("model.output_tokens_expected", model.output_tokens_expected.into(), 1.0, 1e8)?;
            range("model.context_tokens_max", model.context_tokens_max as f64, 0.0, 1e9)?;
            range("model.block_bytes", model.block_bytes as f64, 0.0, 1e12)?;
        }
        Ok(())
    }

    /// The targets, in the one currency.
    pub fn targets(&self) -> Targets {
        Targets {
            first_token_us: self.targets.first_token_ms * 1e3,
            next_token_us: self.targets.next_token_ms * 1e3,
        }
    }
}

/// A time of the config.
pub fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |reason: String| {
        let fix = "name a readable file with --config, or give none and take every default";
        Error::invalid("config", format!("{}: {reason}", path.display()), fix)
    };
    let bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(unreadable(format!("{bytes} bytes are more than {FILE_BYTES_MAX}")));
    }
    std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))
}

fn range(key: &str, value: f64, least: f64, most: f64) -> Result<(), Error> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(key, format!("{value} is out of range"), format!("use {least} to {most}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_explained_and_the_explanation_is_the_config() {
        let model = Model { name: "m".into(), tokenizer: Some("a/b".into()), ..Model::default() };
        for config in [Config::default(), Config { model: vec![model], ..Config::default() }] {
            assert_eq!(Config::parse(&config.explain()).unwrap(), config, "{}", config.explain());
        }
        let table = toml::Table::try_from(Config::default()).unwrap();
        let keys: usize = table.values().map(|value| value.as_table().map_or(1, toml::Table::len)).sum();
        assert_eq!(keys, KEYS.len() + 1, "a key is not in KEYS, and so not explained");
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn what_cannot_be_is_refused_by_key() {
        for (text, field) in [
            ("[kvd]\nlocate_ms = 0", "kvd.locate_ms"),
            ("[kvd]\naddress = \"127.0.0.1:7700\"", "kvd.address"),
            ("[engine]\ntries = 99", "engine.tries"),
            ("[targets]\nnext_token_ms = nan", "targets.next_token_ms"),
            ("[limits]\nbody_bytes = 1", "limits.body_bytes"),
            ("[[model]]\ntokenizer = \"x\"", "model.name"),
            ("[[model]]\nname = \"x\"\n[[model]]\nname = \"x\"", "model.name"),
            ("[[model]]\nname = \"x\"\noutput_tokens_expected = 0", "model.output_tokens_expected"),
            ("placement = \"magic\"", "config"),
            ("unheard = 1", "config"),
        ] {
            assert_eq!(Config::parse(text).unwrap_err().field, field, "{text}");
        }
    }
}
