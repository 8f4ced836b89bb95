//! Makes the tokenizer that demos and tests use: byte-level, a few hundred merges learned from texts given to it.
//!
//!     cargo run -p kvd-router --example demo_tokenizer -- router/demo-tokenizer README.md ARCHITECTURE.md
//!
//! Every text has tokens and comes back from them, as all 256 bytes are in the vocabulary. It belongs to no model.

use serde_json::json;
use std::path::PathBuf;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

const VOCABULARY: usize = 1024;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut paths = std::env::args().skip(1).map(PathBuf::from);
    let folder = paths.next().ok_or("name the folder to write, and the texts to learn from")?;
    let texts = paths.map(std::fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::<_, tokenizers::NormalizerWrapper, _, _, _>::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes))
        .build()?;
    tokenizer.train(&mut trainer, texts.into_iter())?;
    tokenizer.save(folder.join("tokenizer.json"), false)?;
    let config = json!({"bos_token": null, "eos_token": SPECIAL[0], "chat_template": TEMPLATE});
    std::fs::write(folder.join("tokenizer_config.json"), format!("{config:#}\n"))?;
    Ok(())
}
