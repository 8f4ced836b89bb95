//! The front door before engines and nodes that answer, break, hang and refuse.

mod engine;
mod kvd;

use engine::{Act, Engine};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvd::{Kvd, worker};
use kvd_proto::wire::{LocateReply, NodeLocation, TierRun, WorkerRole, WorkerStatus};
use kvd_router::config::Config;
use serde_json::{Value, json};
use std::future::Future;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

const DEADLINE: Duration = Duration::from_secs(15);

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it takes too long")
}

/// A router before one kvd, and a client of it.
struct Front {
    url: String,
    kvd: Kvd,
    client: Client<HttpConnector, Full<Bytes>>,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<Result<(), kvd_proto::Error>>,
}

impl Front {
    async fn start(workers: Vec<WorkerStatus>, settings: &str) -> Self {
        Self::before(Kvd::start(workers).await, settings).await
    }

    async fn before(kvd: Kvd, settings: &str) -> Self {
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-tokenizer");
        let mut config = Config::parse(&format!(
            "{settings}\n[[model]]\nname = \"demo\"\ncontext_tokens_max = 1000\ntokenizer = \"{}\"\n",
            tokenizer.display()
        ))
        .unwrap();
        if !settings.contains("[kvd]") {
            (config.kvd.locate_ms, config.kvd.reserve_ms) = (5000, 5000); // a busy machine is no test
        }
        config.kvd.address = format!("http://{}", kvd.address);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(kvd_router::serve::run(config, listener, async {
            let _ = stopped.await;
        }));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let front = Self { url, kvd, client, stop, served };
        let workers = front.kvd.state.borrow().workers.len();
        front.until_workers(|count| count >= workers).await;
        front
    }

    async fn until_workers(&self, so: impl Fn(usize) -> bool) {
        let there = async {
            while !so(self.get("/health").await["workers"].as_u64().unwrap() as usize) {
                tokio::task::yield_now().await;
            }
        };
        within(there).await;
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: String) -> Response<Incoming> {
        let mut request = Request::post(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        within(self.client.request(request)).await.unwrap()
    }

    async fn complete(&self, more: Value) -> Response<Incoming> {
        let mut body = json!({"model": "demo", "prompt": "Hello to the cache of blocks"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/completions", &[], body.to_string()).await
    }

    async fn get_text(&self, path: &str) -> String {
        let request = Request::get(format!("{}{path}", self.url)).body(Full::default()).unwrap();
        text(within(self.client.request(request)).await.unwrap()).await
    }

    async fn get(&self, path: &str) -> Value {
        serde_json::from_str(&self.get_text(path).await).unwrap()
    }

    /// Waits until a metric stands so.
    async fn until_counted(&self, line: &str) {
        let counted = async {
            while !self.get_text("/metrics").await.lines().any(|found| found == line) {
                tokio::task::yield_now().await;
            }
        };
        within(counted).await;
    }
}

async fn text(response: Response<Incoming>) -> String {
    let body = within(response.into_body().collect()).await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

async fn value(response: Response<Incoming>) -> Value {
    serde_json::from_str(&text(response).await).unwrap()
}

async fn refusal(response: Response<Incoming>) -> (u16, String, Value, HeaderMap) {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = value(response).await;
    assert!(body["error"]["type"].is_string() && body["error"].get("param").is_some(), "{body}");
    (status, body["error"]["message"].as_str().unwrap().to_owned(), body["error"]["code"].clone(), headers)
}

#[tokio::test]
async fn a_request_and_its_answer_pass_untouched_but_for_kvds_word() {
    let engine = Engine::start(Act::Answer).await;
    let front = Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "").await;
    let body = r#"{"model":"demo","zeta":{"b":1,"a":2},"prompt":"Hello to the cache of blocks"}"#;
    let headers = [("authorization", "Bearer k"), ("x-request-id", "mine")];
    let answer = front.post("/v1/completions", &headers, body.to_owned()).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(value(answer).await["choices"][0]["text"], " there");
    let sent = engine.bodies().remove(0);
    assert!(sent.to_string().contains(r#""zeta":{"b":1,"a":2}"#), "{sent}");
    assert_eq!(sent["kv_transfer_params"]["kvd"]["reservation"], 1);
    let key = sent["kv_transfer_params"]["kvd"]["request_key"].as_str().unwrap().to_owned();
    let got = engine.seen.borrow().headers[0].clone();
    assert!(got["authorization"] == "Bearer k" && got["x-request-id"] == "mine", "{got:?}");
    front.kvd.until(|state| state.released == [1]).await;
    let state = front.kvd.state.borrow();
    assert_eq!(state.reserved[0].request_key, key);
    assert!(state.reserved[0].new_tokens > 4 && state.reserved[0].kv_tokens > 256);
    assert!(!state.chains[0].is_empty() && state.chains[0].len().is_multiple_of(16));
}

#[tokio::test]
async fn events_pass_as_they_are_and_are_counted() {
    let events = vec!["{\"choices\":[{\"text\":\"a\"}]}", "{\"choices\":[{\"text\":\"b\"}]}", "[DONE]"];
    let engine = Engine::start(Act::Stream(events.clone())).await;
    let front = Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "").await;
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let body = json!({"model": "demo", "messages": messages, "stream": true}).to_string();
    let answer = front.post("/v1/chat/completions", &[], body).await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(text(answer).await, format!("data: {}\n\n", events.join("\n\ndata: ")));
    front.until_counted("kvd_router_requests_total{outcome=\"answered\"} 1").await;
    let metrics = front.get_text("/metrics").await;
    assert!(metrics.contains("kvd_router_generated_tokens_total 2\n"), "{metrics}");
    assert!(metrics.contains("kvd_router_first_token_seconds_count 1\n"), "{metrics}");
    assert!(metrics.contains("kvd_router_in_flight_requests 0\n"), "{metrics}");
    assert!(metrics.contains("/w1\"} 1\n"), "{metrics}");
    let seen = front.get("/observation").await;
    assert_eq!(seen["workers"], json!([{"role": "both", "state": "running", "load": 0.0}]));
    assert!(seen["requests_per_s"].is_number() && seen.get("ttft_us").is_some(), "{seen}");
}

#[tokio::test]
async fn what_breaks_before_its_first_byte_is_answered_by_the_next_best() {
    let sound = Engine::start(Act::Answer).await;
    let broken = Engine::start(Act::Answer).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap(); // closed again
    for (act, address) in [
        (Act::Status(500), broken.address),
        (Act::Break(vec![]), broken.address),
        (Act::Hang(vec![]), broken.address),
        (Act::Stream(vec![]), broken.address),
        (Act::Answer, nobody),
    ] {
        broken.act(act.clone());
        let workers = vec![worker(1, address, WorkerRole::Both), worker(2, sound.address, WorkerRole::Both)];
        let settings = "[engine]\nfirst_byte_ms = 300\nanswer_ms = 300";
        let front = Front::start(workers, settings).await;
        assert_eq!(front.complete(json!({"stream": true})).await.status(), 200, "{act:?}");
        assert_eq!(front.kvd.reserved(), [1, 2], "{act:?}");
        front.kvd.until(|state| state.released.len() == 2).await;
        // the next request does not pay for it again, unless it was the request's own doing
        assert_eq!(front.complete(json!({"stream": true})).await.status(), 200);
        let again = if matches!(act, Act::Status(_)) { 4 } else { 3 };
        assert_eq!(front.kvd.reserved().len(), again, "{act:?}");
    }
}

#[tokio::test]
async fn tries_are_bounded_and_the_last_failure_is_told() {
    let broken = Engine::start(Act::Status(500)).await;
    let workers = (1..=5).map(|id| worker(id, broken.address, WorkerRole::Both)).collect();
    let front = Front::start(workers, "").await;
    let (status, message, code, _) = refusal(front.complete(json!({})).await).await;
    assert_eq!((status, code), (502, json!("worker_failed")));
    assert!(message.contains("the engine says no"), "{message}");
    assert_eq!(front.kvd.reserved().len(), 3);
    front.until_counted("kvd_router_requests_total{outcome=\"failed\"} 1").await;
    broken.act(Act::Status(422));
    let answer = front.complete(json!({})).await;
    assert_eq!(answer.status(), 422, "what the engine refuses it refuses");
    assert!(text(answer).await.contains("the engine says no"));
}

#[tokio::test]
async fn a_stream_that_breaks_off_says_so_and_ends() {
    let engine = Engine::start(Act::Break(vec!["{\"n\":1}"])).await;
    let front =
        Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "[engine]\nidle_ms = 300").await;
    for (act, code) in
        [(Act::Break(vec!["{\"n\":1}"]), "worker_failed"), (Act::Hang(vec!["{\"n\":1}"]), "worker_timeout")]
    {
        engine.act(act);
        let events = text(front.complete(json!({"stream": true})).await).await;
        let events: Vec<&str> = events.split("\n\n").filter(|event| !event.is_empty()).collect();
        assert_eq!(events[0], "data: {\"n\":1}");
        let error: Value = serde_json::from_str(events[1].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!((&error["error"]["code"], events.len()), (&json!(code), 2));
    }
    front.until_counted("kvd_router_requests_total{outcome=\"cut\"} 2").await;
}

#[tokio::test]
async fn who_goes_away_takes_the_engines_work_along() {
    let engine = Engine::start(Act::Hang(vec!["{\"n\":1}"])).await;
    let front = Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "").await;
    let mut answer = front.complete(json!({"stream": true})).await;
    let first = within(answer.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "data: {\"n\":1}\n\n");
    drop(answer);
    engine.until(|seen| seen.cancelled == 1).await;
    front.kvd.until(|state| state.released == [1]).await;
    front.until_counted("kvd_router_requests_total{outcome=\"gone\"} 1").await;
    // and before the first byte
    engine.act(Act::Hang(vec![]));
    let asking = tokio::spawn({
        let (client, url) = (front.client.clone(), front.url.clone());
        let body = json!({"model": "demo", "prompt": "Hello", "stream": true}).to_string();
        async move {
            client
                .request(Request::post(format!("{url}/v1/completions")).body(Full::from(body)).unwrap())
                .await
        }
    });
    engine.until(|seen| seen.bodies.len() == 2).await;
    asking.abort();
    engine.until(|seen| seen.cancelled == 2).await;
    front.kvd.until(|state| state.released == [1, 2]).await;
}

#[tokio::test]
async fn a_busy_worker_is_passed_over_and_if_all_are_the_client_is_told_when_to_come_back() {
    let engine = Engine::start(Act::Answer).await;
    let workers =
        vec![worker(1, engine.address, WorkerRole::Both), worker(2, engine.address, WorkerRole::Both)];
    let front = Front::start(workers, "[kvd]\nlocate_ms = 5000\nreserve_ms = 100").await;
    front.kvd.change(|state| state.busy.extend([1]));
    assert_eq!(front.complete(json!({})).await.status(), 200);
    assert_eq!(front.kvd.reserved(), [1, 2]);
    front.kvd.change(|state| state.busy.extend([2]));
    let (status, message, code, headers) = refusal(front.complete(json!({})).await).await;
    assert_eq!((status, code), (429, json!("rate_limit_exceeded")));
    assert!(message.contains("8 requests of 8") && headers["retry-after"] == "1", "{message}");
    front.kvd.change(|state| {
        state.busy.clear();
        state.silent.insert(1);
    });
    assert_eq!(refusal(front.complete(json!({})).await).await.0, 503, "the node of both says nothing");
    // one that is only slow is asked again, with patience
    let asked = front.kvd.reserved().len();
    let answer = front.complete(json!({}));
    let woken = async {
        front.kvd.until(|state| state.reserved.len() == asked + 2).await;
        front.kvd.change(|state| state.silent.clear());
    };
    assert_eq!(tokio::join!(answer, woken).0.status(), 200);
}

#[tokio::test]
async fn what_cannot_be_is_refused_in_openais_form() {
    let engine = Engine::start(Act::Answer).await;
    let front =
        Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "[limits]\nbody_bytes = 100000")
            .await;
    let post = async |path: &str, body: String| refusal(front.post(path, &[], body).await).await;
    let (status, message, code, _) =
        post("/v1/completions", json!({"model": "x", "prompt": "a"}).to_string()).await;
    assert!(status == 404 && code == "model_not_found" && message.contains("demo"), "{message}");
    assert_eq!(post("/v1/completions", "{".into()).await.0, 400);
    assert_eq!(
        post("/v1/chat/completions", json!({"model": "demo", "messages": []}).to_string()).await.0,
        400
    );
    assert_eq!(post("/v1/completions", " ".repeat(100_001)).await.0, 413);
    assert_eq!(post("/v1/nothing", "{}".into()).await.0, 404);
    let long = json!({"model": "demo", "prompt": "word ".repeat(2000)}).to_string();
    let (status, message, code, _) = post("/v1/completions", long).await;
    assert!(status == 400 && code == "context_length_exceeded" && message.contains("1000"), "{message}");
    let more = json!({"model": "demo", "prompt": "a", "max_tokens": 1000}).to_string();
    assert_eq!(post("/v1/completions", more).await.2, "context_length_exceeded");
    assert!(engine.bodies().is_empty() && front.kvd.reserved().is_empty());
    front.until_counted("kvd_router_requests_total{outcome=\"refused\"} 6").await;
}

#[tokio::test]
async fn more_requests_than_there_is_room_for_are_told_so() {
    let engine = Engine::start(Act::Hang(vec!["{}"])).await;
    let front =
        Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "[limits]\nrequests = 1").await;
    let first = front.complete(json!({"stream": true})).await;
    assert_eq!(refusal(front.complete(json!({})).await).await.0, 429);
    drop(first);
    engine.act(Act::Answer);
    front.until_counted("kvd_router_in_flight_requests 0").await;
    assert_eq!(front.complete(json!({})).await.status(), 200);
}

#[tokio::test]
async fn what_is_under_way_at_the_end_has_its_time() {
    let engine = Engine::start(Act::Hang(vec!["{}"])).await;
    for (drain_ms, ends) in [(60_000, "whole"), (1, "cut")] {
        let settings = format!("[limits]\ndrain_ms = {drain_ms}");
        let front = Front::start(vec![worker(1, engine.address, WorkerRole::Both)], &settings).await;
        let answer = front.complete(json!({"stream": true})).await;
        front.stop.send(()).unwrap();
        if ends == "whole" {
            let asked = Request::get(format!("{}/health", front.url)).body(Full::default()).unwrap();
            let fresh: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
            while fresh.request(asked.clone()).await.is_ok() {
                tokio::task::yield_now().await; // it listens until it has heard
            }
            assert!(!front.served.is_finished());
            drop(answer);
        }
        within(front.served).await.unwrap().unwrap();
    }
}

fn held_by(address: &str, blocks: u32) -> LocateReply {
    let runs = vec![TierRun { tier: 2, blocks, fetch_us: 30.0 }];
    let node = NodeLocation { address: address.into(), blocks, runs, ..NodeLocation::default() };
    LocateReply { nodes: vec![node] }
}

#[tokio::test]
async fn the_node_that_has_the_blocks_gets_the_request_and_says_why() {
    let (near, far) = (Engine::start(Act::Answer).await, Engine::start(Act::Answer).await);
    let other = Kvd::start(vec![worker(1, far.address, WorkerRole::Both)]).await;
    let kvd = Kvd::start(vec![worker(1, near.address, WorkerRole::Both)]).await;
    let addresses = vec![kvd.address.to_string(), other.address.to_string()];
    kvd.change(|state| state.nodes.clone_from(&addresses));
    kvd.change(|state| state.located = Some(held_by(&addresses[1], 2)));
    let front = Front::before(kvd, "").await;
    front.until_workers(|count| count == 2).await;
    let prompt = "the prefix of a prompt is stored in blocks of tokens, and found again";
    let body = json!({"model": "demo", "prompt": prompt}).to_string();
    let explained = value(front.post("/v1/completions", &[("x-kvd-explain", "1")], body.clone()).await).await;
    let first = &explained["candidates"][0];
    assert_eq!(first["worker"], format!("name-of-{}/w1", addresses[1]));
    assert_eq!((&first["cached_tokens"], &first["fetch_us"]), (&json!(8), &json!(30)), "{explained}");
    assert_eq!(explained["tries"][0]["decode"], first["worker"]);
    assert_eq!(
        value(front.post("/explain", &[], body.clone()).await).await["prompt_tokens"],
        explained["prompt_tokens"]
    );
    assert!(near.bodies().is_empty() && far.bodies().is_empty(), "an explanation runs nothing");
    assert!(other.reserved().is_empty() && front.kvd.reserved().is_empty());
    assert_eq!(front.post("/v1/completions", &[], body).await.status(), 200);
    assert_eq!((near.bodies().len(), far.bodies().len(), other.reserved().len()), (0, 1, 1));
    front.until_counted("kvd_router_cached_tokens_total 8").await;
}

#[tokio::test]
async fn kvd_saying_nothing_costs_a_choice_and_not_the_request() {
    let engine = Engine::start(Act::Answer).await;
    let front = Front::start(
        vec![worker(1, engine.address, WorkerRole::Both)],
        "[kvd]\nlocate_ms = 20\nreserve_ms = 5000",
    )
    .await;
    front.kvd.change(|state| state.located = None);
    assert_eq!(front.complete(json!({})).await.status(), 200);
    let explained =
        front.post("/explain", &[], json!({"model": "demo", "prompt": "Hello to the cache"}).to_string());
    let explained = value(explained.await).await;
    assert!(explained["trouble"].as_str().unwrap().contains("20 ms"), "{explained}");
}

#[tokio::test]
async fn a_node_that_is_lost_takes_its_workers_along_and_comes_back() {
    let engine = Engine::start(Act::Answer).await;
    let front = Front::start(vec![worker(1, engine.address, WorkerRole::Both)], "").await;
    front.kvd.change(|state| state.away = true);
    front.until_workers(|count| count == 0).await;
    let (status, message, _, headers) = refusal(front.complete(json!({})).await).await;
    assert!(status == 503 && message.contains("demo") && headers.contains_key("retry-after"), "{message}");
    front.kvd.change(|state| state.away = false);
    front.until_workers(|count| count == 1).await;
    assert_eq!(front.complete(json!({})).await.status(), 200);
}

#[tokio::test]
async fn a_split_request_is_prefilled_there_and_decoded_here() {
    let (prefill, decode) = (Engine::start(Act::Answer).await, Engine::start(Act::Answer).await);
    let workers =
        vec![worker(1, prefill.address, WorkerRole::Prefill), worker(2, decode.address, WorkerRole::Decode)];
    let front = Front::start(workers, "").await;
    let asked = json!({"max_tokens": 50, "stream": true, "stream_options": {"include_usage": true}});
    assert_eq!(front.complete(asked.clone()).await.status(), 200);
    let first = prefill.bodies().remove(0);
    assert_eq!((&first["max_tokens"], &first["stream"]), (&json!(1), &json!(false)));
    assert!(first.get("stream_options").is_none());
    assert_eq!(first["kv_transfer_params"]["kvd"]["do"], "prefill");
    let second = decode.bodies().remove(0);
    let word = &second["kv_transfer_params"]["kvd"];
    assert_eq!((&second["max_tokens"], &second["stream"]), (&json!(50), &json!(true)));
    assert_eq!(word["prefill_node"], format!("http://{}", front.kvd.address));
    assert_eq!(word["request_key"], first["kv_transfer_params"]["kvd"]["request_key"]);
    front.kvd.until(|state| state.released.len() == 2).await;
    // a prefill that fails costs no request
    prefill.act(Act::Status(500));
    assert_eq!(front.complete(asked).await.status(), 200);
    assert!(decode.bodies()[1]["kv_transfer_params"]["kvd"].get("prefill_node").is_none());
    // and one without room neither: the decode worker does it all
    front.kvd.change(|state| state.busy.extend([1]));
    assert_eq!(front.complete(json!({})).await.status(), 200);
    assert_eq!((prefill.bodies().len(), decode.bodies().len()), (2, 3));
}

#[tokio::test]
async fn in_turn_means_each_in_turn() {
    let engine = Engine::start(Act::Answer).await;
    let mut workers: Vec<_> = (1..=3).map(|id| worker(id, engine.address, WorkerRole::Both)).collect();
    workers[2].registration.as_mut().unwrap().fingerprint = vec![].into();
    let front = Front::start(workers, "placement = \"round-robin\"").await;
    for _ in 0..6 {
        assert_eq!(front.complete(json!({})).await.status(), 200);
    }
    assert_eq!(front.kvd.reserved(), [1, 2, 3, 1, 2, 3]);
    assert!(engine.bodies()[2].get("kv_transfer_params").is_none(), "it keeps nothing in kvd");
}

#[tokio::test]
async fn a_model_that_only_workers_name_is_served_by_load() {
    let engine = Engine::start(Act::Answer).await;
    let mut unknown = worker(1, engine.address, WorkerRole::Both);
    unknown.registration.as_mut().unwrap().model = "other".into();
    let front = Front::start(vec![unknown], "").await;
    let body = json!({"model": "other", "prompt": "Hello"}).to_string();
    assert_eq!(front.post("/v1/completions", &[], body).await.status(), 200);
    assert!(front.kvd.state.borrow().chains.is_empty());
    let ids: Vec<Value> =
        front.get("/v1/models").await["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids, ["demo", "other"]);
}

/// A process that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended by itself
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_serves_explains_and_ends_when_told() {
    let engine = Engine::start(Act::Answer).await;
    let kvd = Kvd::start(vec![worker(1, engine.address, WorkerRole::Both)]).await;
    let router = env!("CARGO_BIN_EXE_router");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-tokenizer");
    let mut serving = Command::new(router)
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--model",
            "demo",
            "--kvd",
            &format!("http://{}", kvd.address),
        ])
        .arg("--tokenizer")
        .arg(tokenizer)
        .stdout(Stdio::piped())
        .spawn()
        .map(Killed)
        .unwrap();
    let mut line = String::new();
    BufReader::new(serving.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let url = line.trim().strip_prefix("listening on ").unwrap();
    let explain = || {
        let arguments = ["explain", "--router", url, "--model", "demo", "--prompt", "Hello to the cache"];
        Command::new(router).args(arguments).output().unwrap()
    };
    let until = std::time::Instant::now() + DEADLINE;
    let mut output = explain();
    while !output.status.success() {
        assert!(std::time::Instant::now() < until, "{}", String::from_utf8_lossy(&output.stderr));
        output = explain();
    }
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("first token us") && table.contains("/w1"), "{table}");
    assert!(table.contains("prompt tokens; tokenise"), "{table}");
    let pid = serving.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(serving.0.wait().unwrap().success());
    let config = Command::new(router).arg("config").output().unwrap();
    assert!(String::from_utf8(config.stdout).unwrap().contains("locate_ms = 20"));
}
