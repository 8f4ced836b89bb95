//! `bench engine` as a router sees it: real processes, real daemons, OpenAI's API over sockets.
//!
//! Owns the promises that an answer does not depend on what was cached, that blocks are shared through kvd, and that nothing a
//! client, a daemon or a signal does leaves a request unanswered.

mod engine_process;

use engine_process::{Daemon, Engine, until};
use kvd_client::grpc::Client;
use kvd_client::{ConnectOptions, Session};
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{
    ListWorkersRequest, ReserveWorkerRequest, WorkerStatus, reserve_worker_reply::Outcome,
};
use kvd_proto::{Chain, IdScheme, Layout, Space, block_id};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Ten blocks of 64 tokens, and some.
fn prompt(of: u32) -> Vec<u32> {
    (0..650).map(|at| of * 1000 + at).collect()
}

fn completion(of: u32, output_tokens: u32) -> Value {
    json!({"model": "sim-8b", "prompt": prompt(of), "max_tokens": output_tokens})
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {answer}"))
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// The objects of a stream that ended as it should.
fn pieces(stream: &str) -> Vec<Value> {
    let mut events: Vec<&str> = stream
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")))
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{stream}");
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[test]
fn the_same_prompt_has_the_same_answer_in_every_form_and_is_cached_the_second_time() {
    let engine = Engine::start(&[]);
    let first = engine.ask(COMPLETIONS, &completion(1, 200));
    let second = engine.ask(COMPLETIONS, &completion(1, 200));
    assert_eq!((cached(&first), cached(&second)), (0, 640));
    assert_eq!(text(&first), text(&second));
    assert_eq!(second["usage"]["total_tokens"], 850);
    assert_ne!(text(&engine.ask(COMPLETIONS, &completion(2, 200))), text(&first));

    let mut streamed = completion(1, 200);
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let (status, body) = engine.post(COMPLETIONS, &streamed.to_string());
    assert_eq!(status, 200);
    let pieces = pieces(&body);
    let (usage, pieces) = pieces.split_last().unwrap();
    assert_eq!((cached(usage), &usage["choices"]), (640, &json!([])));
    assert!(pieces.len() > 1, "tokens come as they are made: {pieces:?}");
    assert_eq!(pieces.iter().map(text).collect::<String>(), text(&first));
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn chats_and_texts_go_through_a_vocabulary() {
    let vocabulary = concat!(env!("CARGO_MANIFEST_DIR"), "/../router/demo-tokenizer");
    let engine = Engine::start(&["--tokenizer", vocabulary, "--block-tokens", "4"]);
    let chat =
        json!({"model": "sim-8b", "messages": [{"role": "user", "content": "What is a block of a prompt?"}]});
    let first = engine.ask(CHAT, &chat);
    assert_eq!(first["object"], "chat.completion");
    assert_eq!(first["usage"]["completion_tokens"], 16);
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    let pieces = pieces(&engine.post(CHAT, &streamed.to_string()).1);
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String =
        pieces.iter().map(|piece| piece["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(first["choices"][0]["message"]["content"], said);
    let words = json!({"model": "sim-8b", "prompt": "The prefix of a prompt is stored in blocks."});
    engine.ask(COMPLETIONS, &words);
    assert!(cached(&engine.ask(COMPLETIONS, &words)) > 0);
    assert_eq!(engine.get("/v1/models").1["data"][0]["id"], "sim-8b");
}

#[test]
fn what_one_engine_has_computed_another_reads_from_kvd() {
    let daemon = Daemon::start();
    let [one, other] =
        ["one", "other"].map(|name| Engine::start(&["--kvd", daemon.socket(), "--name", name]));
    let first = one.ask(COMPLETIONS, &completion(1, 5));
    one.until_stored(10);
    let second = other.ask(COMPLETIONS, &completion(1, 5));
    assert_eq!((cached(&second), text(&second)), (640, text(&first)));
    let stats = other.stats();
    assert_eq!(stats["cached_tokens"], json!({"hbm": 0, "dram": 640, "nvme": 0, "peer": 0}), "{stats}");
    // half of it in its own memory, the rest in kvd
    let mut longer = completion(1, 5);
    longer["prompt"].as_array_mut().unwrap().extend((0..640).map(|token| json!(token)));
    one.ask(COMPLETIONS, &longer);
    one.until_stored(20);
    assert_eq!(cached(&other.ask(COMPLETIONS, &longer)), 20 * 64);
    let stats = other.stats();
    assert_eq!(stats["cached_tokens"], json!({"hbm": 640, "dram": 1280, "nvme": 0, "peer": 0}), "{stats}");
    assert_eq!((&stats["wrong_blocks"], &stats["failed"]), (&json!(0), &json!(0)), "{stats}");
}

#[test]
fn a_block_with_a_wrong_byte_is_counted_and_not_used() {
    let daemon = Daemon::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let session = Session::open(ConnectOptions::new(daemon.socket())).await.unwrap();
        let space = Space {
            tenant: "default".into(),
            model: "sim-8b".into(),
            revision: blake3::hash(b"sim-8b").as_bytes().to_vec(),
            epoch: 0,
            layout: Layout::opaque(4096, 64).unwrap(),
            id_scheme: IdScheme::Tokens,
        };
        let space = session.space(&space).await.unwrap();
        let root = block_id::root(&space.fingerprint(), b"", b"").unwrap();
        let chain = Chain::of_tokens(&space.fingerprint(), root, &prompt(1), 64).unwrap();
        let fill = space.reserve(b"k", root, 0, &chain, Duration::ZERO).await.unwrap();
        fill.granted().iter().for_each(|&block| fill.write(block, 0, &[7; 4096]));
        assert_eq!(fill.commit().await.unwrap(), 10);
    });
    let engine = Engine::start(&["--kvd", daemon.socket()]);
    assert_eq!(cached(&engine.ask(COMPLETIONS, &completion(1, 1))), 0);
    assert_eq!(engine.stats()["wrong_blocks"], 1);
}

#[test]
fn without_kvd_and_with_one_that_dies_everything_is_answered() {
    let mut daemon = Daemon::start();
    let engine = Engine::start(&["--kvd", daemon.socket()]);
    engine.ask(COMPLETIONS, &completion(1, 3));
    engine.until_stored(10);
    daemon.kill();
    for of in 2..6 {
        engine.ask(COMPLETIONS, &completion(of, 3));
    }
    assert_eq!(engine.stats()["stored_blocks"], 10);
    daemon.start_again();
    let other = Engine::start(&["--kvd", daemon.socket()]);
    // it comes back by itself: what it computes from then on is stored, and others find it
    let mut of = 10;
    until("the engine comes back to kvd", || {
        of += 1;
        engine.ask(COMPLETIONS, &completion(of, 1));
        engine.stats()["stored_blocks"].as_u64() > Some(10)
    });
    until("the other finds it", || cached(&other.ask(COMPLETIONS, &completion(of, 1))) == 640);
    assert_eq!((&engine.stats()["wrong_blocks"], &other.stats()["wrong_blocks"]), (&json!(0), &json!(0)));
}

#[test]
fn a_kvd_that_stands_still_costs_one_request_a_stall() {
    let daemon = Daemon::start();
    let engine = Engine::start(&["--kvd", daemon.socket()]);
    daemon.signal(Signal::STOP);
    for of in 1..4 {
        engine.ask(COMPLETIONS, &completion(of, 1));
    }
    assert_eq!(engine.stats()["failed"], 1, "the others did not ask");
    daemon.signal(Signal::CONT);
    engine.until_stored(30);
}

#[test]
fn a_client_that_goes_takes_its_request_with_it() {
    let engine = Engine::start(&["--requests-max", "1"]);
    let mut stream = completion(1, 500_000);
    stream["stream"] = json!(true);
    let going = engine.open(COMPLETIONS, &stream.to_string());
    let (status, busy) = engine.post(COMPLETIONS, &completion(2, 1).to_string());
    assert_eq!(status, 429, "{busy}");
    drop(going);
    until("its memory is free", || {
        let stats = engine.stats();
        (&stats["cancelled"], &stats["running"], &stats["waiting"]) == (&json!(1), &json!(0), &json!(0))
    });
    engine.ask(COMPLETIONS, &completion(2, 1));
}

#[test]
fn what_cannot_be_answered_is_refused_in_openais_form() {
    let engine = Engine::start(&["--hbm-blocks", "100"]);
    let cases: [(&str, &str, u16, &str); 8] = [
        (COMPLETIONS, "{", 400, "invalid_request_error"),
        (COMPLETIONS, r#"{"model": "sim-8b"}"#, 400, "invalid_request_error"),
        (COMPLETIONS, r#"{"model": "sim-8b", "prompt": "text"}"#, 400, "invalid_request_error"),
        (COMPLETIONS, r#"{"model": "other", "prompt": [1]}"#, 404, "model_not_found"),
        (COMPLETIONS, r#"{"model": "sim-8b", "prompt": [1], "max_tokens": 0}"#, 400, "invalid_request_error"),
        (
            COMPLETIONS,
            r#"{"model": "sim-8b", "prompt": [1], "max_tokens": 6400}"#,
            400,
            "context_length_exceeded",
        ),
        (CHAT, r#"{"model": "sim-8b", "prompt": [1]}"#, 400, "invalid_request_error"),
        ("/v1/embeddings", r#"{"model": "sim-8b", "input": [1]}"#, 404, "unknown_url"),
    ];
    for (path, body, status, says) in cases {
        let (got, answer) = engine.post(path, body);
        let error: Value = serde_json::from_str(&answer).unwrap();
        let (kind, code) = (&error["error"]["type"], &error["error"]["code"]);
        assert!(got == status && (kind == says || code == says), "{path} {body}: {got} {answer}");
        assert!(error["error"]["message"].as_str().is_some_and(|message| message.len() > 10), "{answer}");
    }
    let most = r#"{"model": "sim-8b", "prompt": [1], "max_tokens": 6399}"#;
    assert_eq!(engine.post(COMPLETIONS, most).0, 200, "what fits exactly is answered");
}

#[test]
fn a_terminated_engine_finishes_what_it_has_and_takes_nothing_new() {
    let daemon = Daemon::start();
    let mut engine = Engine::start(&["--kvd", daemon.socket()]);
    let mut stream = completion(1, 6000);
    stream["stream"] = json!(true);
    let had = engine.open(COMPLETIONS, &stream.to_string());
    engine.terminate();
    until("it takes nothing new", || engine.post(COMPLETIONS, &completion(2, 1).to_string()).0 == 503);
    assert_eq!(engine.get("/health").0, 503);
    let pieces = pieces(&had.rest());
    assert_eq!(pieces.iter().map(text).collect::<String>().split(' ').count(), 6001, "an answer is finished");
    assert!(engine.ended().success());
    let after = Engine::start(&["--kvd", daemon.socket()]);
    assert_eq!(cached(&after.ask(COMPLETIONS, &completion(1, 1))), 640, "what it computed is kept");
}

#[test]
fn a_prefill_is_handed_over_through_kvd() {
    let daemon = Daemon::start();
    let [prefill, decode] = ["prefill", "decode"]
        .map(|role| Engine::start(&["--kvd", daemon.socket(), "--role", role, "--name", role]));
    let mut asked = completion(1, 1);
    asked["kv_transfer_params"] = json!({"kvd": {"request_key": "k"}, "other": 1});
    let prefilled = prefill.ask(COMPLETIONS, &asked);
    let params = &prefilled["kv_transfer_params"];
    assert_eq!(
        params,
        &json!({"kvd": {"request_key": "k", "prefilled_tokens": 650}, "other": 1}),
        "tail included"
    );
    let mut asked = completion(1, 4);
    asked["kv_transfer_params"] =
        json!({"kvd": {"request_key": "k", "prefill_node": "n", "prefilled_tokens": 650}});
    let decoded = decode.ask(COMPLETIONS, &asked);
    assert_eq!(cached(&decoded), 649, "all but the last token");
    assert_eq!(decode.stats()["cached_tokens"]["dram"], 649);
    assert_eq!(cached(&decode.ask(COMPLETIONS, &asked)), 640, "it is handed over once");
    assert!(text(&decoded).starts_with(text(&prefilled)), "{decoded}");
    // one that never was: what is missing is computed, after a while
    let mut lost = completion(2, 4);
    lost["kv_transfer_params"] = json!({"kvd": {"prefill_node": "n"}});
    assert_eq!(cached(&decode.ask(COMPLETIONS, &lost)), 0);
    // an engine that does both prefills when it is told to; without kvd nothing is handed over
    let mut told = completion(1, 1);
    told["kv_transfer_params"] = json!({"kvd": {"do": "prefill"}});
    let alone = Engine::start(&[]);
    let mut answer = alone.ask(COMPLETIONS, &told);
    assert_eq!(answer["kv_transfer_params"].take(), json!({"kvd": {"do": "prefill", "prefilled_tokens": 0}}));
    assert_eq!(alone.ask(COMPLETIONS, &completion(1, 1))["kv_transfer_params"], Value::Null);
}

/// What a router tells the two engines of a request.
fn handed(of: u32, output_tokens: u32, key: &str, prefill_node: Option<&str>) -> Value {
    let mut asked = completion(of, output_tokens);
    asked["kv_transfer_params"] = json!({"kvd": {"request_key": key}});
    match prefill_node {
        Some(node) => asked["kv_transfer_params"]["kvd"]["prefill_node"] = json!(node),
        None => asked["kv_transfer_params"]["kvd"]["do"] = json!("prefill"),
    }
    asked
}

#[test]
fn a_prefill_is_handed_over_from_node_to_node_whoever_dies() {
    let [first, second] = Daemon::start_two();
    let prefill = Engine::start(&["--kvd", first.socket(), "--role", "prefill"]);
    let decode = Engine::start(&["--kvd", second.socket(), "--role", "decode"]);
    let alone = Engine::start(&[]);
    // until the nodes have heard of each other, nothing is claimed
    let mut of = 0;
    until("the nodes know each other", || {
        of += 1;
        let key = format!("early-{of}");
        prefill.ask(COMPLETIONS, &handed(of, 1, &key, None));
        cached(&decode.ask(COMPLETIONS, &handed(of, 4, &key, Some(first.address())))) == 649
    });
    let before = decode.stats()["cached_tokens"]["peer"].as_u64().unwrap();
    prefill.ask(COMPLETIONS, &handed(1000, 1, "k", None));
    prefill.ask(COMPLETIONS, &handed(1001, 1, "l", None));
    drop(prefill); // killed
    let decoded = decode.ask(COMPLETIONS, &handed(1000, 4, "k", Some(first.address())));
    assert_eq!(cached(&decoded), 649);
    assert_eq!(decode.stats()["cached_tokens"]["peer"], before + 649);
    assert_eq!(text(&decoded), text(&alone.ask(COMPLETIONS, &completion(1000, 4))));
    let usage = &decoded["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(650), &json!(4)));
    let one = decode.ask(COMPLETIONS, &handed(1001, 1, "l", Some(first.address())));
    assert_eq!((cached(&one), text(&one)), (649, text(&alone.ask(COMPLETIONS, &completion(1001, 1)))));
    // killed before it prefilled
    let computed = decode.ask(COMPLETIONS, &handed(1002, 4, "never", Some(first.address())));
    assert_eq!(cached(&computed), 0);
    // and its node with it
    let address = first.address().to_owned();
    drop(first);
    let computed = decode.ask(COMPLETIONS, &handed(1003, 4, "m", Some(&address)));
    assert_eq!((cached(&computed), &decode.stats()["wrong_blocks"]), (0, &json!(0)));
}

#[test]
fn it_stands_as_a_worker_of_its_node_and_claims_what_was_reserved() {
    let daemon = Daemon::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let channel = runtime.block_on(Client::connect(daemon.grpc_socket())).unwrap().channel();
    let _driven = runtime.enter();
    let workers = || -> Vec<WorkerStatus> {
        let mut client = WorkersClient::new(channel.clone());
        runtime.block_on(client.list_workers(ListWorkersRequest {})).unwrap().into_inner().workers
    };
    let engine =
        Engine::start(&["--kvd", daemon.socket(), "--node", daemon.grpc_socket(), "--requests-max", "2"]);
    until("it is listed", || workers().len() == 1);
    let worker = workers().remove(0);
    let registration = worker.registration.unwrap();
    assert_eq!((registration.address.as_str(), registration.requests_max), (engine.address(), 2));
    assert_eq!((registration.block_tokens, registration.fingerprint.len()), (64, 32));

    let reserve = ReserveWorkerRequest {
        worker: worker.worker,
        request_key: "k".into(),
        new_tokens: 650,
        kv_tokens: 700,
        ttl_ms: 0,
    };
    let reply = runtime.block_on(WorkersClient::new(channel.clone()).reserve_worker(reserve)).unwrap();
    let Some(Outcome::Reserved(reserved)) = reply.into_inner().outcome else { panic!("there is room") };
    let mut asked = completion(1, 500_000);
    asked["stream"] = json!(true);
    asked["kv_transfer_params"] = json!({"kvd": {"request_key": "k", "reservation": reserved.reservation}});
    let going = engine.open(COMPLETIONS, &asked.to_string());
    until("its request is counted, and no longer promised", || {
        let status = workers().remove(0);
        status.reserved_requests == 0 && status.load.unwrap().running_requests == 1
    });
    engine.terminate();
    until("it drains", || workers().remove(0).load.unwrap().draining);
    drop(going);
    until("it is gone", || workers().is_empty());
}
