//! Bodies of OpenAI requests, from any client of the router: understood or refused, and passed on as they came.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use libfuzzer_sys::fuzz_target;
use openai::{Endpoint, Prompt, Request};

/// The router's own file, which needs nothing of its crate: a tokenizer and a template engine would be built with it.
#[path = "../../../../router/src/openai.rs"]
#[expect(dead_code, unreachable_pub, reason = "the front door, which uses the rest, is not here")]
mod openai;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let endpoint = if material.one_in(2) { Endpoint::Chat } else { Endpoint::Completions };
    let parsed = bounded(material.0.len(), 256, || Request::parse(endpoint, material.0));
    match parsed {
        Ok(request) => {
            let again = Request::parse(endpoint, &request.body_with(&[])).expect("it was understood once");
            assert_eq!(understood(&again), understood(&request));
            let _ = request.transfer_params_with(serde_json::Value::Bool(true)).to_string();
        }
        Err(refusal) => assert!((400..500).contains(&refusal.status), "{}", refusal.to_event()),
    }
});

/// What the router goes by. The rest is compared nowhere: numbers with a fraction come back with another last digit.
fn understood(request: &Request) -> impl PartialEq + std::fmt::Debug + '_ {
    let Request { model, prompt, stream, include_usage, output_tokens_max, .. } = request;
    let prompt = match prompt {
        Prompt::Messages(messages) => (messages.len(), None),
        other => (1, Some(other)),
    };
    (model, prompt, stream, include_usage, output_tokens_max)
}
