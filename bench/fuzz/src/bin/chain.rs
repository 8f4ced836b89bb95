//! Chains of packed ids, and prompts that grow: spans and cuts wherever an engine puts them.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use kvd_proto::limits::BLOCK_TOKENS_MAX;
use kvd_proto::{BlockId, Chain, Fingerprint, Prompt, Span, block_id};
use libfuzzer_sys::fuzz_target;

const SPACE: Fingerprint = Fingerprint([7; 32]);

fuzz_target!(|bytes: &[u8]| {
    if let Ok(chain) = bounded(bytes.len(), 4, || Chain::from_packed("chain", bytes)) {
        assert_eq!(chain.to_packed(), bytes);
    }
    let mut material = Material(bytes);
    let _ = block_id::named(&SPACE, material.piece());
    let block_tokens = material.number32().clamp(1, BLOCK_TOKENS_MAX);
    let mut prompt = Prompt::new(SPACE, block_tokens, BlockId(material.array()));
    while !material.is_empty() {
        extend(&mut prompt, &mut material);
    }
    let chain = prompt.chain();
    assert!(chain.is_err() || chain == Chain::from_ids("tokens", prompt.ids().to_vec()));
    let _ = prompt.tail();
});

/// What is refused leaves the prompt as it was.
fn extend(prompt: &mut Prompt, material: &mut Material) {
    let tokens: Vec<u32> = material.piece().iter().map(|&token| u32::from(token)).collect();
    let spans: Vec<Span> = (0..material.below(4)).map(|_| span(material)).collect();
    let (tokens_before, blocks_before) = (prompt.tokens(), prompt.ids().len());
    let extended = prompt.extend(&tokens, &spans);
    let more = if extended.is_ok() { tokens.len() } else { 0 };
    assert_eq!(prompt.tokens(), tokens_before + more);
    assert!(extended.is_ok() || prompt.ids().len() == blocks_before);
}

fn span(material: &mut Material) -> Span {
    let (kind, position, tokens) = (material.byte(), material.number32(), material.number32());
    Span { kind, position, tokens, digest: material.piece().to_vec() }
}
