//! What a request is answered: tokens that follow from its prompt alone, in OpenAI's forms.
//!
//! Invariants: the same prompt has the same answer, whatever was cached, and a shorter one is its beginning; a stream's pieces put
//! together are the whole text. Leaves to others: when tokens come (`driver`), HTTP.

use crate::content::mix;
use kvd_router::openai::Endpoint;
use kvd_router::tokens::Tokenizer;
use serde_json::{Value, json};

/// Of a vocabulary, so many tokens are tried as words of answers.
const WORDS_TRIED: u32 = 4096;

/// The words answers are made of, one a token.
pub(super) struct Words(Vec<String>);

impl Words {
    /// Plain ones of a vocabulary; without one, numbers.
    pub(super) fn of(tokenizer: Option<&Tokenizer>) -> Self {
        let numbers = || (0..WORDS_TRIED).map(|token| format!(" {token}")).collect();
        let plain = |text: &String| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        let known = |tokenizer: &Tokenizer| -> Vec<String> {
            let texts = (0..WORDS_TRIED).map(|token| tokenizer.text(&[token]).trim().to_owned());
            texts.filter(plain).map(|text| format!(" {text}")).collect()
        };
        Self(tokenizer.map(known).filter(|words| !words.is_empty()).unwrap_or_else(numbers))
    }

    /// The tokens of a prompt's answer from one to another.
    pub(super) fn text(&self, seed: u64, tokens: std::ops::Range<u64>) -> String {
        let word = |token: u64| mix(seed.wrapping_add(token)) % self.0.len() as u64;
        tokens.map(|token| self.0[word(token) as usize].as_str()).collect()
    }
}

/// Names a prompt.
pub(super) fn seed(prompt: &[u32]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    prompt.iter().for_each(|token| {
        hasher.update(&token.to_le_bytes());
    });
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes"))
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) cached_tokens: u64,
}

impl Usage {
    fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// How one request's answer is written.
pub(super) struct Form {
    pub(super) endpoint: Endpoint,
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created_s: u64,
}

impl Form {
    /// All at once.
    pub(super) fn whole(&self, text: &str, usage: Usage) -> Value {
        let (object, said) = match self.endpoint {
            Endpoint::Completions => ("text_completion", json!({"text": text})),
            Endpoint::Chat => ("chat.completion", json!({"message": {"role": "assistant", "content": text}})),
        };
        let mut whole = self.envelope(object, vec![choice(said, true)]);
        whole["usage"] = usage.to_json();
        whole
    }

    /// One piece of a stream.
    pub(super) fn piece(&self, text: &str, first: bool, last: bool) -> Value {
        let said = match (self.endpoint, first) {
            (Endpoint::Completions, _) => json!({"text": text}),
            (Endpoint::Chat, true) => json!({"delta": {"role": "assistant", "content": text}}),
            (Endpoint::Chat, false) => json!({"delta": {"content": text}}),
        };
        self.envelope(self.piece_object(), vec![choice(said, last)])
    }

    /// After the last piece, where it was asked for.
    pub(super) fn usage_piece(&self, usage: Usage) -> Value {
        let mut piece = self.envelope(self.piece_object(), Vec::new());
        piece["usage"] = usage.to_json();
        piece
    }

    fn piece_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion.chunk",
        }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created_s, "model": self.model, "choices": choices,
        })
    }
}

/// Answers end only at their longest.
fn choice(mut said: Value, last: bool) -> Value {
    said["index"] = json!(0);
    said["logprobs"] = Value::Null;
    said["finish_reason"] = if last { json!("length") } else { Value::Null };
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_follows_from_its_prompt_and_pieces_are_the_whole() {
        let words = Words::of(None);
        let (one, other) = (seed(&[1, 2, 3]), seed(&[1, 2, 4]));
        let whole = words.text(one, 0..40);
        assert_eq!(words.text(one, 0..7) + &words.text(one, 7..40), whole);
        assert_eq!(seed(&[1, 2, 3]), one);
        assert_ne!(words.text(other, 0..40), whole);
        assert_eq!(whole.split(' ').count(), 41);
    }

    #[test]
    fn the_forms_are_openais() {
        let usage = Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 4 };
        let form = |endpoint| Form { endpoint, id: "x".into(), model: "m".into(), created_s: 1 };
        let chat = form(Endpoint::Chat);
        let whole = chat.whole("hi", usage);
        assert_eq!(whole["choices"][0]["message"]["content"], "hi");
        assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
        assert_eq!(
            (&whole["usage"]["total_tokens"], &whole["object"]),
            (&json!(7), &json!("chat.completion"))
        );
        assert_eq!(chat.piece("h", true, false)["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(chat.piece("i", false, true)["choices"][0]["finish_reason"], "length");
        assert_eq!(chat.usage_piece(usage)["choices"], json!([]));
        let text = form(Endpoint::Completions).piece("h", true, false);
        assert_eq!((&text["choices"][0]["text"], &text["object"]), (&json!("h"), &json!("text_completion")));
    }
}
