//! `router`: the front door's command line. Parses, calls the library, says how it ended.

use bytes::Bytes;
use clap::{Parser, Subcommand, ValueEnum};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use kvd_proto::{Code, Error};
use kvd_router::config::{Config, Model, Placement};
use serde_json::{Value, json};
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long a running router may take to explain. At the limit: an error.
const EXPLAIN_WAIT: Duration = Duration::from_secs(30);
/// Longest explanation. At the limit: an error.
const EXPLAIN_BYTES_MAX: usize = 16 << 20;

/// Where a request runs: OpenAI's API in front of the engines that are registered with kvd.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until told to stop.
    Serve(Settings),
    /// Print a complete config: every key, its value and what it does.
    Config(Settings),
    /// Ask a running router where it would run a prompt, and why.
    Explain(Explain),
}

#[derive(clap::Args)]
struct Settings {
    /// A TOML file; without it every default is taken.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen [listen.http_address].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// gRPC address of the nearest kvd [kvd.address].
    #[arg(long, value_name = "URL")]
    kvd: Option<String>,
    /// "cost" or "round-robin" [placement].
    #[arg(long)]
    placement: Option<Placement>,
    /// A model, as workers and clients call it [model.name].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Its tokenizer.json, or its folder [model.tokenizer].
    #[arg(long, value_name = "PATH", requires = "model")]
    tokenizer: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Explain {
    /// The router.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    router: String,
    /// The model.
    #[arg(long)]
    model: String,
    /// The prompt, as text.
    #[arg(long)]
    prompt: String,
    /// For people or for programs.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .init();
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("router: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Serve(settings) => {
            let listening = |address| print(&format!("listening on http://{address}\n"));
            kvd_router::serve::serve(settings.config()?, listening)
        }
        Command::Config(settings) => {
            print(&settings.config()?.explain());
            Ok(())
        }
        Command::Explain(explain) => explain.run(),
    }
}

impl Settings {
    /// What is said on the command line comes before what the file says.
    fn config(self) -> Result<Config, Error> {
        let mut config = Config::load(self.config.as_deref())?;
        config.listen.http_address = self.listen.unwrap_or(config.listen.http_address);
        config.kvd.address = self.kvd.unwrap_or(config.kvd.address);
        config.placement = self.placement.unwrap_or(config.placement);
        if let Some(name) = self.model {
            config.model.retain(|model| model.name != name);
            config.model.push(Model { name, tokenizer: self.tokenizer, ..Model::default() });
        }
        config.check()?;
        Ok(config)
    }
}

impl Explain {
    fn run(self) -> Result<(), Error> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
                Error::new(
                    Code::Internal,
                    "runtime",
                    error.to_string(),
                    "see the limits of this process (`ulimit -a`)",
                )
            })?;
        let away = |why: String| {
            let message = format!("{}: {why}", self.router);
            Error::new(
                Code::Unavailable,
                "--router",
                message,
                "start one with `router serve`, or name its address",
            )
        };
        let asked = runtime.block_on(async { tokio::time::timeout(EXPLAIN_WAIT, self.ask()).await });
        let explained = asked.map_err(|_| away("it does not answer".to_owned()))?.map_err(away)?;
        if let Some(refusal) = explained["error"]["message"].as_str() {
            return Err(Error::invalid("--prompt", refusal, "see what `curl <router>/v1/models` lists"));
        }
        match self.output {
            Output::Table => print(&kvd_router::explain::text(&explained)),
            Output::Json => print(&format!("{explained:#}\n")),
        }
        Ok(())
    }

    async fn ask(&self) -> Result<Value, String> {
        let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let body = json!({"model": self.model, "prompt": self.prompt}).to_string();
        let url = format!("{}/explain", self.router.trim_end_matches('/'));
        let request = hyper::Request::post(url).header("content-type", "application/json");
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| error.to_string())?;
        let answer = client.request(request).await.map_err(|error| error.to_string())?;
        let body = Limited::new(answer.into_body(), EXPLAIN_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    }
}

/// A reader that has seen enough is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
