//! Prompts of every form become the tokens that an engine would make of them.

use super::*;
use crate::openai::Endpoint;
use serde_json::json;
use std::path::PathBuf;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-tokenizer")
}

fn completion(prompt: Value) -> Request {
    let body = json!({"model": "m", "prompt": prompt}).to_string();
    Request::parse(Endpoint::Completions, body.as_bytes()).unwrap()
}

fn chat(body: &Value) -> Request {
    Request::parse(Endpoint::Chat, body.to_string().as_bytes()).unwrap()
}

fn rendered(template: &str, body: &Value) -> Result<String, Refusal> {
    let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
    let request = chat(body);
    let Prompt::Messages(messages) = &request.prompt else { panic!("a chat has messages") };
    Templates::new(&config, None).unwrap().render(&request, messages)
}

#[test]
fn the_demo_vocabulary_gives_back_what_it_got() {
    let tokenizer = Tokenizer::open(&demo()).unwrap();
    for text in ["A cache of blocks, on every node.", "äöü 猫 🐈 \u{0} \r\n\t", ""] {
        let tokens = tokenizer.tokens(&completion(json!(text))).unwrap();
        assert_eq!(tokenizer.text(&tokens), text);
    }
    let english = "the prefix of a prompt is stored in blocks";
    let tokens = tokenizer.tokens(&completion(json!(english))).unwrap();
    assert!(tokens.len() < english.len() / 2, "{} tokens", tokens.len());
    assert_eq!(tokenizer.tokens(&completion(json!([5, 6]))).unwrap(), [5, 6]);
    assert_eq!(tokenizer.text(&[9_999_999]), "");
}

#[test]
fn a_longer_conversation_begins_with_the_shorter_ones_tokens() {
    let tokenizer = Tokenizer::open(&demo()).unwrap();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And?"}]);
    let turn = |turns: usize| {
        let messages = &messages.as_array().unwrap()[..turns];
        tokenizer.tokens(&chat(&json!({"model": "m", "messages": messages}))).unwrap()
    };
    assert!(turn(4).starts_with(&turn(2)));
    let one_token = tokenizer.tokens(&completion(json!("<|im_start|>"))).unwrap();
    assert_eq!(one_token, turn(2)[..1]);
}

#[test]
fn without_a_template_roles_stand_before_the_words() {
    let tokenizer = Tokenizer::open(&demo().join("tokenizer.json")).unwrap();
    let request = chat(&json!({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}));
    assert_eq!(tokenizer.text(&tokenizer.tokens(&request).unwrap()), "user: Hello\nassistant:");
}

#[test]
fn templates_find_what_they_expect() {
    let template = "{{ bos_token }}{% for m in messages %}\n  {% if m['role'].startswith('u') %}\n[{{ m.content | trim }}]\
        {% endif %}\n{% endfor %}{{ eos_token }}{{ tools | tojson }}{{ strftime_now('%Y')[:2] }}{{ mood }}";
    let body = json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": " a"},
        {"type": "text", "text": "b "}]}], "tools": [{"z": 1, "a": "<é>"}], "chat_template_kwargs": {"mood": "!"}});
    assert_eq!(rendered(template, &body).unwrap(), "<s>[a\nb]</s>[{\"z\": 1, \"a\": \"<é>\"}]20!");
    let call = json!({"model": "m", "messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{\"x\":[1,2]}"}}]}]});
    let arguments = "{{ messages[0].tool_calls[0].function.arguments.x[1] }}";
    assert_eq!(rendered(arguments, &call).unwrap(), "2");
    assert_eq!(rendered("{{ [1, {}] | tojson(indent=2) }}", &call).unwrap(), "[\n  1,\n  {}\n]");
}

#[test]
fn a_template_may_refuse() {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "a"}]});
    let refusal = rendered("{{ raise_exception('roles must alternate') }}", &body).unwrap_err();
    assert_eq!(refusal.status, 400);
    assert!(refusal.message.contains("roles must alternate"), "{}", refusal.message);
    assert_eq!(rendered("{{ nothing.at.all }}", &body).unwrap_err().status, 400);
}

#[test]
fn what_is_no_tokenizer_is_said() {
    for path in ["no/such/file", "Cargo.toml"] {
        let error = Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_err();
        assert!(error.field == "tokenizer" && error.message.contains(path), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(demo().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "{% for").unwrap();
    assert!(Tokenizer::open(folder.path()).unwrap_err().message.contains("chat template"));
}
