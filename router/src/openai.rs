//! OpenAI's words: a request as far as the router must understand it, and every way to say no.
//!
//! Owns what is read out of a body, and errors in OpenAI's form. Invariants: no I/O and no clock; whatever a client sends is a
//! `Request` or a `Refusal`, never a panic; what is not understood here is passed on as it came, in the order it came.
//! Leaves to others: tokens (`tokens`), statuses on the wire (`serve`).

use serde::Serializer as _;
use serde_json::{Map, Value, json};

/// What a client may say to kvd itself, in `kv_transfer_params.kvd`: `Hints` of `kvd.v1`, as connectors read them.
const HINTS: [&str; 4] = ["priority", "ttl_ms", "expects", "return_ms"];

/// Messages of one chat. At the limit: refused.
pub const MESSAGES_MAX: usize = 16_384;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// Where engines and clients know it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As tokens of the model's own vocabulary.
    Tokens(Vec<u32>),
    /// A conversation, to be rendered by the model's template; each has a role.
    Messages(Vec<Value>),
}

/// A request that makes sense so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Where it came.
    pub endpoint: Endpoint,
    /// Whom it asks.
    pub model: String,
    /// What it asks.
    pub prompt: Prompt,
    /// Whether tokens are to be sent as they come.
    pub stream: bool,
    /// Whether a stream ends with a count of its tokens.
    pub include_usage: bool,
    /// Longest answer: `max_completion_tokens`, or else `max_tokens`.
    pub output_tokens_max: Option<u32>,
    /// What connectors of the engine are told.
    pub kv_transfer_params: Option<Value>,
    body: Map<String, Value>,
}

impl Request {
    /// Reads a body.
    pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, Refusal> {
        let value: Value =
            serde_json::from_slice(body).map_err(|error| Refusal::malformed(&error.to_string()))?;
        let Value::Object(body) = value else {
            return Err(Refusal::malformed("it is not an object"));
        };
        let prompt = match endpoint {
            Endpoint::Completions => prompt(&body)?,
            Endpoint::Chat => messages(&body)?,
        };
        let usage = body.get("stream_options").and_then(|options| options.get("include_usage"));
        let longest = match number(&body, "max_completion_tokens")? {
            None => number(&body, "max_tokens")?,
            some => some,
        };
        Ok(Self {
            endpoint,
            model: model(&body)?,
            prompt,
            stream: truth(&body, "stream")?,
            include_usage: usage == Some(&Value::Bool(true)),
            output_tokens_max: longest,
            kv_transfer_params: given(&body, "kv_transfer_params").cloned(),
            body,
        })
    }

    /// A field as it came.
    pub fn field(&self, name: &str) -> Option<&Value> {
        given(&self.body, name)
    }

    /// The body with other values for some fields; null takes a field away.
    pub fn body_with(&self, changes: &[(&str, Value)]) -> Vec<u8> {
        let kept = self.body.iter().filter(|(name, _)| changes.iter().all(|(changed, _)| name != changed));
        let kept = kept.map(|(name, value)| (name.as_str(), value));
        let changed = changes.iter().filter(|(_, value)| !value.is_null());
        let fields = kept.chain(changed.map(|(name, value)| (*name, value)));
        let mut bytes = Vec::new();
        serde_json::Serializer::new(&mut bytes).collect_map(fields).expect("JSON has text keys");
        bytes
    }

    /// What connectors are told, with kvd's own word beside the client's; of what the client says to kvd, its hints alone.
    pub fn transfer_params_with(&self, mut kvd: Value) -> Value {
        let mut params = match &self.kv_transfer_params {
            Some(Value::Object(params)) => params.clone(),
            _ => Map::new(),
        };
        if let (Some(Value::Object(said)), Value::Object(word)) = (params.remove("kvd"), &mut kvd) {
            word.extend(said.into_iter().filter(|(name, _)| HINTS.contains(&name.as_str())));
        }
        params.insert("kvd".to_owned(), kvd);
        Value::Object(params)
    }
}

/// Null is as good as absent, as for OpenAI.
fn given<'a>(body: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|value| !value.is_null())
}

fn model(body: &Map<String, Value>) -> Result<String, Refusal> {
    match given(body, "model") {
        Some(Value::String(model)) if !model.is_empty() => Ok(model.clone()),
        _ => Err(Refusal::invalid("model", "you must name a model; GET /v1/models lists them")),
    }
}

fn truth(body: &Map<String, Value>, name: &str) -> Result<bool, Refusal> {
    match given(body, name) {
        None => Ok(false),
        Some(Value::Bool(truth)) => Ok(*truth),
        Some(other) => Err(Refusal::invalid(name, format!("{name} is {other}; give true or false"))),
    }
}

fn number(body: &Map<String, Value>, name: &str) -> Result<Option<u32>, Refusal> {
    let Some(value) = given(body, name) else { return Ok(None) };
    match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
        Some(number) => Ok(Some(number)),
        None => Err(Refusal::invalid(name, format!("{name} is {value}; give a number of tokens"))),
    }
}

fn prompt(body: &Map<String, Value>) -> Result<Prompt, Refusal> {
    let Some(prompt) = given(body, "prompt") else {
        return Err(Refusal::invalid("prompt", "you must give a prompt"));
    };
    match prompt {
        Value::Array(prompts) if prompts.len() == 1 && !prompts[0].is_number() => single(&prompts[0]),
        prompt => single(prompt),
    }
}

fn single(prompt: &Value) -> Result<Prompt, Refusal> {
    match prompt {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) if items.iter().any(|item| item.is_string() || item.is_array()) => {
            let message = format!("{} prompts in one request; send them one by one", items.len());
            Err(Refusal::invalid("prompt", message))
        }
        Value::Array(items) if !items.is_empty() => {
            let token = |item: &Value| item.as_u64().and_then(|token| u32::try_from(token).ok());
            let tokens: Option<Vec<u32>> = items.iter().map(token).collect();
            tokens.map(Prompt::Tokens).ok_or_else(not_a_prompt)
        }
        _ => Err(not_a_prompt()),
    }
}

fn not_a_prompt() -> Refusal {
    Refusal::invalid("prompt", "give a text, or tokens as whole numbers")
}

fn messages(body: &Map<String, Value>) -> Result<Prompt, Refusal> {
    let Some(Value::Array(messages)) = given(body, "messages") else {
        return Err(Refusal::invalid("messages", "you must give messages, as a list"));
    };
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        let message = format!("{} messages; give 1 to {MESSAGES_MAX}", messages.len());
        return Err(Refusal::invalid("messages", message));
    }
    let role = |message: &Value| message.get("role").is_some_and(Value::is_string);
    if let Some(at) = messages.iter().position(|message| !role(message)) {
        let message = "give each message a role: system, user, assistant or tool";
        return Err(Refusal::invalid(format!("messages[{at}].role"), message));
    }
    Ok(Prompt::Messages(messages.clone()))
}

/// A no, as OpenAI's clients understand it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP's.
    pub status: u16,
    /// For people: what happened, and what to do.
    pub message: String,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The field it is about.
    pub param: Option<String>,
    /// What a program acts on.
    pub code: Option<&'static str>,
    /// When asking again may help.
    pub retry_after_s: Option<u32>,
}

impl Refusal {
    fn new(status: u16, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code, retry_after_s: None }
    }

    /// A field's value that can never be right.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let refusal = Self::new(400, "invalid_request_error", None, message);
        Self { param: Some(param.into()), ..refusal }
    }

    /// No JSON.
    pub fn malformed(why: &str) -> Self {
        let message = format!("the body is not a JSON request: {why}");
        Self::new(400, "invalid_request_error", None, message)
    }

    /// Nobody serves the model; `there_are` do.
    pub fn model_not_found(model: &str, there_are: &[&str]) -> Self {
        let served =
            if there_are.is_empty() { "none is configured".to_owned() } else { there_are.join(", ") };
        let message = format!("the model {model:?} does not exist here; there are: {served}");
        let refusal = Self::new(404, "invalid_request_error", Some("model_not_found"), message);
        Self { param: Some("model".to_owned()), ..refusal }
    }

    /// No such path.
    pub fn no_such_path(path: &str) -> Self {
        let message =
            format!("{path} is not served here; ask /v1/chat/completions, /v1/completions or /v1/models");
        Self::new(404, "invalid_request_error", Some("unknown_url"), message)
    }

    /// More tokens than the model has room for.
    pub fn context_length_exceeded(param: &str, tokens: u64, context_tokens_max: u64) -> Self {
        let message = format!(
            "this model's context is {context_tokens_max} tokens, and the request takes {tokens}; shorten it, or ask for less"
        );
        let refusal = Self::new(400, "invalid_request_error", Some("context_length_exceeded"), message);
        Self { param: Some(param.to_owned()), ..refusal }
    }

    /// A body of too many bytes.
    pub fn too_large(body_bytes_max: u64) -> Self {
        let message = format!("a request may have {body_bytes_max} bytes");
        Self::new(413, "invalid_request_error", Some("request_too_large"), message)
    }

    /// A body that does not come.
    pub fn too_slow(body_ms: u64) -> Self {
        let message = format!("the body did not come within {body_ms} ms");
        Self::new(408, "invalid_request_error", Some("request_timeout"), message)
    }

    /// No room now.
    pub fn busy(why: impl Into<String>, retry_after_s: u32) -> Self {
        let refusal = Self::new(429, "rate_limit_error", Some("rate_limit_exceeded"), why);
        Self { retry_after_s: Some(retry_after_s), ..refusal }
    }

    /// Nobody is there to do it.
    pub fn no_worker(why: impl Into<String>, retry_after_s: u32) -> Self {
        let refusal = Self::new(503, "service_unavailable_error", Some("no_worker"), why);
        Self { retry_after_s: Some(retry_after_s), ..refusal }
    }

    /// The worker broke.
    pub fn bad_gateway(why: impl Into<String>) -> Self {
        Self::new(502, "api_error", Some("worker_failed"), why)
    }

    /// The worker says nothing.
    pub fn gateway_timeout(why: impl Into<String>) -> Self {
        Self::new(504, "api_error", Some("worker_timeout"), why)
    }

    /// The router broke.
    pub fn internal(why: impl Into<String>) -> Self {
        Self::new(500, "api_error", Some("internal"), why)
    }

    /// The body of an answer.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }

    /// The last word of a stream that broke.
    pub fn to_event(&self) -> String {
        format!("data: {}\n\n", self.to_json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn completion(body: &Value) -> Result<Request, Refusal> {
        Request::parse(Endpoint::Completions, body.to_string().as_bytes())
    }

    #[test]
    fn what_must_be_understood_is_and_the_rest_is_kept_in_order() {
        let body =
            br#"{"zeta":{"b":1,"a":2},"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,
            "stream_options":{"include_usage":true},"max_tokens":7,"max_completion_tokens":9,
            "kv_transfer_params":{"other":1}}"#;
        let request = Request::parse(Endpoint::Chat, body).unwrap();
        assert_eq!((request.model.as_str(), request.stream, request.include_usage), ("m", true, true));
        assert_eq!(request.output_tokens_max, Some(9));
        assert_eq!(request.prompt, Prompt::Messages(vec![json!({"role": "user", "content": "hi"})]));
        let sent = request.body_with(&[
            ("kv_transfer_params", request.transfer_params_with(json!({"request_key": "k"}))),
            ("stream_options", Value::Null),
            ("max_completion_tokens", json!(1)),
        ]);
        assert_eq!(
            String::from_utf8(sent).unwrap(),
            r#"{"zeta":{"b":1,"a":2},"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":7,"kv_transfer_params":{"other":1,"kvd":{"request_key":"k"}},"max_completion_tokens":1}"#
        );
    }

    #[test]
    fn a_clients_hints_pass_and_nothing_else_that_it_says_to_kvd() {
        let said = json!({"kvd": {"expects": "tool_call", "return_ms": 900, "priority": 200, "ttl_ms": 60_000,
            "do": "prefill", "request_key": "another's"}});
        let request = completion(&json!({"model": "m", "prompt": "a", "kv_transfer_params": said})).unwrap();
        let told = request.transfer_params_with(json!({"request_key": "k"}));
        let expected = json!({"kvd": {"request_key": "k", "expects": "tool_call", "return_ms": 900, "priority": 200,
            "ttl_ms": 60_000}});
        assert_eq!(told, expected);
    }

    #[test]
    fn prompts_come_in_four_forms_and_one_at_a_time() {
        let prompt = |prompt: Value| completion(&json!({"model": "m", "prompt": prompt})).map(|r| r.prompt);
        assert_eq!(prompt(json!("a")).unwrap(), Prompt::Text("a".into()));
        assert_eq!(prompt(json!(["a"])).unwrap(), Prompt::Text("a".into()));
        assert_eq!(prompt(json!([1, 2])).unwrap(), Prompt::Tokens(vec![1, 2]));
        assert_eq!(prompt(json!([[1, 2]])).unwrap(), Prompt::Tokens(vec![1, 2]));
        assert!(prompt(json!(["a", "b"])).unwrap_err().message.contains("one by one"));
        for wrong in [json!([]), json!([-1]), json!([1.5]), json!({}), json!(null), json!([[]]), json!(7)] {
            assert_eq!(prompt(wrong).unwrap_err().param.as_deref(), Some("prompt"));
        }
    }

    #[test]
    fn a_refusal_names_the_field() {
        let param = |body: Value| completion(&body).unwrap_err().param;
        assert_eq!(param(json!({"prompt": "a"})).as_deref(), Some("model"));
        assert_eq!(param(json!({"prompt": "a", "model": "m", "stream": 1})).as_deref(), Some("stream"));
        assert_eq!(
            param(json!({"prompt": "a", "model": "m", "max_tokens": -1})).as_deref(),
            Some("max_tokens")
        );
        let chat = |messages: Value| {
            let body = json!({"model": "m", "messages": messages}).to_string();
            Request::parse(Endpoint::Chat, body.as_bytes()).unwrap_err().param.unwrap()
        };
        assert_eq!(chat(json!([{"role": "user"}, {"content": "a"}])), "messages[1].role");
        assert_eq!(chat(json!([])), "messages");
        assert_eq!(chat(json!("a")), "messages");
    }

    #[test]
    fn refusals_are_in_openais_form() {
        let refusal = Refusal::model_not_found("x", &["a", "b"]);
        assert_eq!(refusal.status, 404);
        let text = refusal.to_json().to_string();
        assert!(
            text.contains(r#""type":"invalid_request_error","param":"model","code":"model_not_found""#),
            "{text}"
        );
        assert!(text.contains("a, b"), "{text}");
        assert_eq!(Refusal::busy("full", 2).retry_after_s, Some(2));
        assert!(Refusal::bad_gateway("x").to_event().ends_with("}\n\n"));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(Endpoint::Chat, &bytes);
            let wrapped = format!("{{\"model\":\"m\",\"prompt\":{}}}", String::from_utf8_lossy(&bytes));
            let _ = Request::parse(Endpoint::Completions, wrapped.as_bytes());
        }
    }
}
