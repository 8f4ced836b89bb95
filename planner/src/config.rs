//! The configuration: one TOML file, every key defaulted and explained in one table.
//!
//! Invariants: `KEYS` and `Config` have the same keys (a test compares them); a `Config` that exists passed `check`; an
//! error names the key, the value and the fix. The environment is not read.

use crate::apply::local::{Template, WORKERS_MAX};
use crate::decide::{HOLD_OBSERVATIONS_MAX, Settings};
use crate::forecast::SEASON_MAX;
use crate::observe::WINDOW_MAX;
use crate::predict::Profile;
use crate::size::{RoleLimits, Shape, Sizing, Targets, WORKERS_PER_ROLE_MAX};
use kvd_proto::Error;
use kvd_proto::cost::PrefillProfile;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// More is not a configuration. At the limit: refused.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest of all times, a day. At the limit: refused.
const TIME_MS_MAX: u64 = 86_400_000;

/// Every key and what it does, in the order of the file.
const KEYS: &[(&str, &str)] = &[
    ("interval_ms", "From one observation, and plan, to the next, 100 to 86400000."),
    (
        "listen.http_address",
        "Where /plan, /plan.txt, /metrics and /healthz are served. Not encrypted: keep it on the loopback.",
    ),
    ("source.url", "Where observations are asked for, as JSON over HTTP."),
    ("source.timeout_ms", "How long an answer may take. A missed one changes nothing: the last plan stands."),
    ("targets.ttft_ms", "Time to first token that is to be kept, in milliseconds."),
    ("targets.itl_ms", "Inter-token latency that is to be kept, in milliseconds."),
    ("targets.quantile", "Share of requests whose time to first token is to be kept, below 1."),
    ("forecast.window", "Observations that forecasts are judged over, 5 to 100000."),
    ("forecast.season", "Observations after which demand repeats (a day of 10 s ones: 8640); 0 for none."),
    ("forecast.margin_errors", "How many mean one-step errors are added to the forecast requests a second."),
    (
        "profile.prefill_base_us",
        "Microseconds a prefill takes whatever its length. The default profile is Llama-3-8B in bf16 on one H100, from its FLOPs and bytes.",
    ),
    ("profile.prefill_token_us", "Microseconds each new prompt token adds."),
    ("profile.prefill_pair_us", "Microseconds each pair of tokens that attend to each other adds."),
    ("profile.decode_base_us", "Microseconds of one decode step with an empty KV memory."),
    ("profile.decode_load_us", "Microseconds that a full KV memory adds to it, linearly."),
    ("profile.decode_load2_us", "Microseconds that it adds with the square of the load; may be negative."),
    ("profile.kv_tokens", "KV tokens one worker holds."),
    (
        "profile.chunk_tokens",
        "New prompt tokens an engine computes in one step (vLLM: max_num_batched_tokens).",
    ),
    (
        "fleet.shape",
        "\"both\": every worker does prefill and decode; \"split\": some prefill, some decode. Workers of other roles are left alone.",
    ),
    ("fleet.budget_gpus", "GPUs of all workers together, draining ones included."),
    (
        "fleet.startup_ms",
        "From starting a worker until it takes requests: plans are for the demand at that time.",
    ),
    ("fleet.shrink_hold_ms", "How long fewer workers must have been enough before one is drained."),
    ("fleet.shrink_margin_share", "Fewer workers must be enough for this share more demand, 0 to 1."),
    ("fleet.step_up", "Workers started at most a plan and role, at least 1."),
    ("fleet.step_down", "Workers drained at most a plan and role; 0 never drains."),
    ("prefill.workers_min", "Prefill workers at least."),
    ("prefill.workers_max", "Prefill workers at most."),
    ("prefill.gpus_per_worker", "GPUs each takes."),
    ("decode.workers_min", "Decode workers at least."),
    ("decode.workers_max", "Decode workers at most."),
    ("decode.gpus_per_worker", "GPUs each takes."),
    ("both.workers_min", "Workers that do both at least."),
    ("both.workers_max", "Workers that do both at most."),
    ("both.gpus_per_worker", "GPUs each takes."),
    (
        "apply.mode",
        "\"advise\": only say what should be done; \"local\": run workers as processes of this machine.",
    ),
    ("local.command", "Program and arguments of a local worker; {role}, {index} and {port} are replaced."),
    ("local.first_port", "{port} of the first worker; the others follow."),
    ("local.drain_ms", "From SIGTERM until SIGKILL."),
];

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
        /// From one observation to the next.
        interval_ms: u64 = 10_000,
        /// Where it listens.
        listen: Listen = Listen::default(),
        /// Where observations come from.
        source: Source = Source::default(),
        /// What is wanted.
        targets: TargetsConfig = TargetsConfig::default(),
        /// How the future is guessed.
        forecast: ForecastConfig = ForecastConfig::default(),
        /// How fast a worker is.
        profile: ProfileConfig = ProfileConfig::default(),
        /// All workers together.
        fleet: Fleet = Fleet::default(),
        /// Prefill workers.
        prefill: RoleConfig = RoleConfig::default(),
        /// Decode workers.
        decode: RoleConfig = RoleConfig::default(),
        /// Workers that do both.
        both: RoleConfig = RoleConfig::default(),
        /// What becomes of a plan.
        apply: ApplyConfig = ApplyConfig::default(),
        /// Local workers.
        local: LocalConfig = LocalConfig::default(),
    }
    /// Where it listens.
    Listen {
        /// HTTP.
        http_address: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7721)),
    }
    /// Where observations come from.
    Source {
        /// JSON over HTTP.
        url: String = "http://127.0.0.1:8080/observation".to_owned(),
        /// How long an answer may take.
        timeout_ms: u64 = 2000,
    }
    /// What is wanted.
    TargetsConfig {
        /// Time to first token.
        ttft_ms: f64 = 500.0,
        /// Inter-token latency.
        itl_ms: f64 = 50.0,
        /// Share of first tokens.
        quantile: f64 = 0.9,
    }
    /// How the future is guessed.
    ForecastConfig {
        /// Observations to judge by.
        window: usize = 60,
        /// Observations a season.
        season: usize = 0,
        /// Errors added.
        margin_errors: f64 = 1.0,
    }
    /// How fast a worker is.
    ProfileConfig {
        /// Microseconds a prefill.
        prefill_base_us: f64 = 2000.0,
        /// Microseconds a token.
        prefill_token_us: f64 = 25.7,
        /// Microseconds a pair.
        prefill_pair_us: f64 = 0.00106,
        /// Microseconds of a step.
        decode_base_us: f64 = 8400.0,
        /// Microseconds more at full load.
        decode_load_us: f64 = 22_300.0,
        /// Microseconds more with its square.
        decode_load2_us: f64 = 0.0,
        /// KV tokens a worker holds.
        kv_tokens: u64 = 427_000,
        /// New tokens a step.
        chunk_tokens: u64 = 8192,
    }
    /// All workers together.
    Fleet {
        /// Which roles there are.
        shape: ShapeConfig = ShapeConfig::Both,
        /// GPUs of all.
        budget_gpus: u32 = 8,
        /// Until a worker serves.
        startup_ms: u64 = 60_000,
        /// Until one is drained.
        shrink_hold_ms: u64 = 300_000,
        /// Demand more that fewer must bear.
        shrink_margin_share: f64 = 0.1,
        /// Started a plan.
        step_up: u32 = 8,
        /// Drained a plan.
        step_down: u32 = 1,
    }
    /// Workers of one role.
    RoleConfig {
        /// At least.
        workers_min: u32 = 1,
        /// At most.
        workers_max: u32 = 8,
        /// GPUs each.
        gpus_per_worker: u32 = 1,
    }
    /// What becomes of a plan.
    ApplyConfig {
        /// How.
        mode: Mode = Mode::Advise,
    }
    /// Local workers.
    LocalConfig {
        /// Program and arguments.
        command: Vec<String> = Vec::new(),
        /// First port.
        first_port: u16 = 9000,
        /// Until SIGKILL.
        drain_ms: u64 = 30_000,
    }
}

/// Which roles there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShapeConfig {
    /// Workers do both.
    Both,
    /// Prefill and decode workers.
    Split,
}

/// What becomes of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is said.
    Advise,
    /// Processes of this machine follow it.
    Local,
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
            Error::invalid("config", message, "mend the line; `kvd-planner config` prints a complete file")
        })?;
        config.check()?;
        Ok(config)
    }

    /// A complete, commented file with these values.
    pub fn explain(&self) -> String {
        let table = toml::Table::try_from(self).expect("a config is a table");
        let mut out = String::from("# kvd-planner: every key with its value.\n");
        let mut current = "";
        for (key, help) in KEYS {
            let (section, name) = key.split_once('.').unwrap_or(("", key));
            if section != current {
                writeln!(out, "\n[{section}]").expect("a String grows");
                current = section;
            }
            let within =
                if section.is_empty() { &table } else { table[section].as_table().expect("a section") };
            writeln!(out, "\n# {help}\n{name} = {}", within[name]).expect("a String grows");
        }
        out
    }

    /// Checks each value's range and the values against each other.
    pub fn check(&self) -> Result<(), Error> {
        let times = [
            ("interval_ms", self.interval_ms, 100),
            ("source.timeout_ms", self.source.timeout_ms, 1),
            ("fleet.startup_ms", self.fleet.startup_ms, 0),
            ("fleet.shrink_hold_ms", self.fleet.shrink_hold_ms, 0),
            ("local.drain_ms", self.local.drain_ms, 0),
        ];
        times
            .into_iter()
            .try_for_each(|(key, ms, least)| range(key, ms as f64, least as f64, TIME_MS_MAX as f64))?;
        let hold_ms_max = self.interval_ms.saturating_mul(HOLD_OBSERVATIONS_MAX);
        range("fleet.shrink_hold_ms", self.fleet.shrink_hold_ms as f64, 0.0, hold_ms_max as f64)?;
        self.check_model()?;
        self.check_fleet()?;
        if self.apply.mode == Mode::Local && self.local.command.is_empty() {
            let fix =
                "write local.command = [\"program\", \"--port\", \"{port}\"], or apply.mode = \"advise\"";
            return Err(Error::invalid("local.command", "empty with apply.mode = \"local\"", fix));
        }
        Ok(())
    }

    fn check_model(&self) -> Result<(), Error> {
        let (targets, forecast, profile) = (&self.targets, &self.forecast, &self.profile);
        let times_us = [
            ("profile.prefill_base_us", profile.prefill_base_us),
            ("profile.prefill_token_us", profile.prefill_token_us),
            ("profile.prefill_pair_us", profile.prefill_pair_us),
            ("profile.decode_load_us", profile.decode_load_us),
        ];
        times_us.into_iter().try_for_each(|(key, us)| range(key, us, 0.0, 1e9))?;
        range("profile.decode_base_us", profile.decode_base_us, 1.0, 1e9)?;
        range("profile.kv_tokens", profile.kv_tokens as f64, 1.0, 1e12)?;
        range("profile.chunk_tokens", profile.chunk_tokens as f64, 1.0, 1e9)?;
        // the curve's slope at full load: below 0 a fuller worker would be predicted faster
        range("profile.decode_load2_us", profile.decode_load2_us, -profile.decode_load_us / 2.0, 1e9)?;
        range("targets.ttft_ms", targets.ttft_ms, 0.001, TIME_MS_MAX as f64)?;
        range("targets.itl_ms", targets.itl_ms, 0.001, TIME_MS_MAX as f64)?;
        range("targets.quantile", targets.quantile, 0.0, 0.9999)?;
        range("forecast.window", forecast.window as f64, 5.0, WINDOW_MAX as f64)?;
        range("forecast.season", forecast.season as f64, 0.0, SEASON_MAX as f64)?;
        range("forecast.margin_errors", forecast.margin_errors, 0.0, 100.0)
    }

    fn check_fleet(&self) -> Result<(), Error> {
        range("fleet.shrink_margin_share", self.fleet.shrink_margin_share, 0.0, 1.0)?;
        range("fleet.step_up", f64::from(self.fleet.step_up), 1.0, f64::from(WORKERS_PER_ROLE_MAX))?;
        range("fleet.budget_gpus", f64::from(self.fleet.budget_gpus), 1.0, 1e6)?;
        for (name, role) in [("prefill", &self.prefill), ("decode", &self.decode), ("both", &self.both)] {
            let most = f64::from(WORKERS_PER_ROLE_MAX);
            range(&format!("{name}.workers_max"), f64::from(role.workers_max), 0.0, most)?;
            range(
                &format!("{name}.workers_min"),
                f64::from(role.workers_min),
                0.0,
                f64::from(role.workers_max),
            )?;
            range(&format!("{name}.gpus_per_worker"), f64::from(role.gpus_per_worker), 1.0, 1024.0)?;
        }
        let settings = self.settings();
        let least = |role| settings.limits(role).workers_min * settings.limits(role).gpus_per_worker;
        let least: u32 = settings.sizing.shape.roles().iter().map(|role| least(*role)).sum();
        if least > self.fleet.budget_gpus {
            let message = format!("{} is less than the {least} GPUs of workers_min", self.fleet.budget_gpus);
            return Err(Error::invalid("fleet.budget_gpus", message, "raise it, or lower workers_min"));
        }
        let local = self.apply.mode == Mode::Local;
        if local && self.fleet.budget_gpus as usize > WORKERS_MAX {
            let message = format!("{} with apply.mode = \"local\"", self.fleet.budget_gpus);
            return Err(Error::invalid("fleet.budget_gpus", message, format!("use at most {WORKERS_MAX}")));
        }
        Ok(())
    }

    /// For the decision.
    pub fn settings(&self) -> Settings {
        let limits = |role: &RoleConfig| RoleLimits {
            workers_min: role.workers_min,
            workers_max: role.workers_max,
            gpus_per_worker: role.gpus_per_worker,
        };
        Settings {
            sizing: self.sizing(),
            limits: [limits(&self.prefill), limits(&self.decode), limits(&self.both)],
            budget_gpus: self.fleet.budget_gpus,
            interval_ms: self.interval_ms,
            startup_ms: self.fleet.startup_ms,
            shrink_hold_ms: self.fleet.shrink_hold_ms,
            shrink_margin_share: self.fleet.shrink_margin_share,
            step_up: self.fleet.step_up,
            step_down: self.fleet.step_down,
            window: self.forecast.window,
            season: self.forecast.season,
            margin_errors: self.forecast.margin_errors,
        }
    }

    fn sizing(&self) -> Sizing {
        let profile = &self.profile;
        Sizing {
            profile: Profile {
                prefill: PrefillProfile::causal(
                    profile.prefill_base_us,
                    profile.prefill_token_us,
                    profile.prefill_pair_us,
                ),
                decode_base_us: profile.decode_base_us,
                decode_load_us: profile.decode_load_us,
                decode_load2_us: profile.decode_load2_us,
                kv_tokens: profile.kv_tokens as f64,
                chunk_tokens: profile.chunk_tokens as f64,
            },
            targets: Targets {
                ttft_us: self.targets.ttft_ms * 1e3,
                itl_us: self.targets.itl_ms * 1e3,
                quantile: self.targets.quantile,
            },
            shape: match self.fleet.shape {
                ShapeConfig::Both => Shape::Both,
                ShapeConfig::Split => Shape::Split,
            },
        }
    }

    /// For local workers.
    pub fn template(&self) -> Template {
        Template {
            command: self.local.command.clone(),
            first_port: self.local.first_port,
            startup: Duration::from_millis(self.fleet.startup_ms),
            drain: Duration::from_millis(self.local.drain_ms),
        }
    }
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
        let text = Config::default().explain();
        assert_eq!(Config::parse(&text).unwrap(), Config::default());
        let table = toml::Table::try_from(Config::default()).unwrap();
        let keys: usize = table.values().map(|value| value.as_table().map_or(1, toml::Table::len)).sum();
        assert_eq!(keys, KEYS.len(), "a key is not in KEYS, and so not explained");
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn what_cannot_be_is_refused_by_key() {
        for (text, field) in [
            ("interval_ms = 1", "interval_ms"),
            ("[targets]\nttft_ms = 0", "targets.ttft_ms"),
            ("[targets]\nttft_ms = nan", "targets.ttft_ms"),
            ("[targets]\nquantile = 1", "targets.quantile"),
            ("[both]\nworkers_min = 9", "both.workers_min"),
            ("[both]\nworkers_max = 99999", "both.workers_max"),
            ("[fleet]\nbudget_gpus = 0", "fleet.budget_gpus"),
            ("[both]\nworkers_min = 3\ngpus_per_worker = 4", "fleet.budget_gpus"),
            ("[profile]\ndecode_load2_us = -20000", "profile.decode_load2_us"),
            ("[apply]\nmode = \"local\"", "local.command"),
            ("[forecast]\nwindow = 2", "forecast.window"),
            ("interval_ms = 100\n[fleet]\nshrink_hold_ms = 10000001", "fleet.shrink_hold_ms"),
            ("\n[fleet]\nshape = \"round\"", "config"),
            ("[fleet]\nunheard = 1", "config"),
        ] {
            assert_eq!(Config::parse(text).unwrap_err().field, field, "{text}");
        }
        let error = Config::parse("\n\n[fleet]\nunheard = 1").unwrap_err();
        assert!(error.message.contains("line 4") && error.message.contains("unheard"), "{error}");
    }
}
