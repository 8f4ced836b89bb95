//! Conversations to text, by a model's own chat template, with what templates expect of Hugging Face's renderer.
//!
//! Owns the templates, `raise_exception`, `strftime_now` and Python's way to write JSON. Invariants: a template that refuses is a
//! refusal of the request; a template sees what the client sent, fields in their order.

use super::date::strftime;
use crate::openai::{Refusal, Request};
use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{Environment, ErrorKind};
use serde::Serialize as _;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};
use std::io;
use std::time::SystemTime;

/// Where a model has no template: each message on a line after its role, and then the assistant's turn.
pub(super) const DEFAULT_TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\
    {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

/// A model's, by name; there is always a "default".
#[derive(Debug)]
pub(super) struct Templates {
    environment: Environment<'static>,
    /// `bos_token` and the like, which templates write.
    special: Map<String, Value>,
}

impl Templates {
    /// From a `tokenizer_config.json`, or null, and a `chat_template.jinja` beside it, which comes before.
    pub(super) fn new(config: &Value, file: Option<String>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        for (name, source) in sources(config, file) {
            environment.add_template_owned(name, source).map_err(|error| error.to_string())?;
        }
        Ok(Self { environment, special: special(config) })
    }

    /// The text of a conversation, up to where the assistant speaks.
    pub(super) fn render(&self, request: &Request, messages: &[Value]) -> Result<String, Refusal> {
        let mut context = self.special.clone();
        context.insert("messages".into(), messages.iter().map(as_templates_know).collect());
        context.insert("add_generation_prompt".into(), true.into());
        for name in ["add_generation_prompt", "continue_final_message", "tools", "documents"] {
            context.extend(request.field(name).map(|value| (name.to_owned(), value.clone())));
        }
        if let Some(Value::Object(more)) = request.field("chat_template_kwargs") {
            context.extend(more.clone());
        }
        let name = if request.field("tools").is_some() { "tool_use" } else { "default" };
        let template =
            self.environment.get_template(name).or_else(|_| self.environment.get_template("default"));
        template.and_then(|template| template.render(Jinja::from_serialize(&context))).map_err(|error| {
            let why = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Refusal::invalid("messages", format!("the model's chat template does not take them: {why}"))
        })
    }
}

fn sources(config: &Value, file: Option<String>) -> Vec<(String, String)> {
    let named = |entry: &Value| {
        let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
        Some((text("name")?, text("template")?))
    };
    let mut found = vec![("default".to_owned(), DEFAULT_TEMPLATE.to_owned())];
    match config.get("chat_template") {
        Some(Value::String(template)) => found.push(("default".to_owned(), template.clone())),
        Some(Value::Array(entries)) => found.extend(entries.iter().filter_map(named)),
        _ => {}
    }
    found.extend(file.map(|file| ("default".to_owned(), file)));
    found
}

/// Special tokens stand as texts or as objects with a `content`.
fn special(config: &Value) -> Map<String, Value> {
    let Value::Object(config) = config else { return Map::new() };
    let token = |(name, value): (&String, &Value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        name.ends_with("_token").then(|| (name.clone(), text.into()))
    };
    config.iter().filter_map(token).collect()
}

/// As engines hand messages to templates: contents that are all text as one text, arguments of calls as objects.
fn as_templates_know(message: &Value) -> Value {
    let mut message = message.clone();
    let content = message.get("content").and_then(Value::as_array);
    let texts = content.and_then(|parts| parts.iter().map(|part| part.get("text")?.as_str()).collect());
    let joined = texts.map(|texts: Vec<&str>| texts.join("\n"));
    if let Some(text) = joined {
        message["content"] = text.into();
    }
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = object;
        }
    }
    message
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    strftime(format, since.map_or(0, |since| since.as_secs()))
}

/// `json.dumps` without escapes for other alphabets: what models were trained with.
fn to_json(value: Jinja, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Python)),
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(String::from_utf8(bytes).expect("JSON is text"))
}

/// A space after each comma and colon.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
