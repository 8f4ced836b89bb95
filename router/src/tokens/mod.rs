//! Prompts to tokens, as the engine will make them.
//!
//! Owns a model's vocabulary (a `tokenizer.json`) and its chat template. Invariants: a prompt becomes tokens or a `Refusal`, never a
//! panic; tokens are a hint about what the engine will compute: other tokens than the engine's cost a wrong prediction, never a
//! wrong answer, for the engine makes its own. Leaves to others: chains (proto), threads (`serve`).

mod date;
mod template;

use crate::openai::{Prompt, Refusal, Request};
use kvd_proto::{Code, Error};
use serde_json::Value;
use std::path::Path;
use template::Templates;

/// Longest file of a tokenizer. At the limit: refused.
pub const FILE_BYTES_MAX: u64 = 256 << 20;

/// One model's.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    templates: Templates,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, or a folder as models are published in: `tokenizer.json`, and where they are there
    /// `tokenizer_config.json` and `chat_template.jinja`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let folder = path.is_dir();
        let vocabulary = if folder { path.join("tokenizer.json") } else { path.to_owned() };
        let mut inner = tokenizers::Tokenizer::from_bytes(read(&vocabulary)?.as_bytes())
            .map_err(|error| wrong(&vocabulary, &error.to_string()))?;
        // an engine computes whole prompts, whatever the model was trained with
        inner.with_truncation(None).map_err(|error| wrong(&vocabulary, &error.to_string()))?;
        inner.with_padding(None);
        let optional = |name: &str| {
            let file = path.join(name);
            if folder && file.exists() { read(&file).map(Some) } else { Ok(None) }
        };
        let config = match optional("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| wrong(&path.join("tokenizer_config.json"), &error.to_string()))?,
            None => Value::Null,
        };
        let templates = Templates::new(&config, optional("chat_template.jinja")?)
            .map_err(|why| wrong(path, &format!("the chat template: {why}")))?;
        Ok(Self { inner, templates })
    }

    /// A prompt's tokens. A text gets the special tokens the vocabulary puts around it, unless the request says
    /// `add_special_tokens: false`; a conversation gets only those its template writes.
    pub fn tokens(&self, request: &Request) -> Result<Vec<u32>, Refusal> {
        let asked = request.field("add_special_tokens").and_then(Value::as_bool);
        match &request.prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => self.encode(text, "prompt", asked.unwrap_or(true)),
            Prompt::Messages(messages) => {
                let text = self.templates.render(request, messages)?;
                self.encode(&text, "messages", asked.unwrap_or(false))
            }
        }
    }

    /// The text of tokens, special ones left out; those it does not know are nothing.
    pub fn text(&self, tokens: &[u32]) -> String {
        self.inner.decode(tokens, true).unwrap_or_default()
    }

    fn encode(&self, text: &str, param: &str, special: bool) -> Result<Vec<u32>, Refusal> {
        let encoding = self.inner.encode_fast(text, special);
        let encoding =
            encoding.map_err(|error| Refusal::invalid(param, format!("it has no tokens: {error}")))?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let size = std::fs::metadata(path).map_err(|error| wrong(path, &error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        let message = format!("{}: {size} bytes", path.display());
        return Err(Error::limit("tokenizer", message, format!("at most {FILE_BYTES_MAX} are read")));
    }
    std::fs::read_to_string(path).map_err(|error| wrong(path, &error.to_string()))
}

fn wrong(path: &Path, why: &str) -> Error {
    let fix = "name a tokenizer.json, or a model's folder that has one; it comes with the model's weights";
    Error::new(Code::Invalid, "tokenizer", format!("{}: {why}", path.display()), fix)
}

#[cfg(test)]
mod tests;
