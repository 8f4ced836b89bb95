//! A prompt that grows: its tokens become block ids as blocks become whole. Bytes: `FORMAT.md` section 2.
//!
//! Owns: which tokens and which spans (images, audio, embeddings) belong to which block. Invariants: the ids are those of the same
//! prompt given at once, however it was cut; a span is in the id of every block that it touches. Leaves to others: the ids (`block_id`).

use crate::block_id::{self, BlockId, Extra};
use crate::chain::Chain;
use crate::error::Error;
use crate::limits::{BLOCK_TOKENS_MAX, EXTRAS_MAX};
use crate::space::Fingerprint;

/// Something that stands in the place of some of a prompt's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// As of `Extra`.
    pub kind: u8,
    /// The prompt's token at which it begins.
    pub position: u32,
    /// How many tokens it takes.
    pub tokens: u32,
    /// Of its content.
    pub digest: Vec<u8>,
}

/// A prompt's whole blocks so far, and the tokens after them.
#[derive(Debug, Clone)]
pub struct Prompt {
    space: Fingerprint,
    block_tokens: usize,
    root: BlockId,
    ids: Vec<BlockId>,
    rest: Vec<u32>,
    /// Those that may reach into the rest or what comes after it.
    spans: Vec<Span>,
}

impl Prompt {
    /// Without tokens; `root` carries adapter and salt (`block_id::root`).
    pub fn new(space: Fingerprint, block_tokens: u32, root: BlockId) -> Self {
        assert!((1..=BLOCK_TOKENS_MAX).contains(&block_tokens), "blocks of {block_tokens} tokens");
        let block_tokens = block_tokens as usize;
        Self { space, block_tokens, root, ids: Vec::new(), rest: Vec::new(), spans: Vec::new() }
    }

    /// Appends tokens, and spans that begin in what is not yet part of a whole block. An error leaves the prompt as it was.
    pub fn extend(&mut self, tokens: &[u32], spans: &[Span]) -> Result<(), Error> {
        let mut next = Self { ids: Vec::new(), ..self.clone() };
        spans.iter().try_for_each(|span| next.add_span(span, self.hashed_tokens()))?;
        next.rest.extend_from_slice(tokens);
        let whole = next.rest.len() / self.block_tokens * self.block_tokens;
        let rest = next.rest.split_off(whole);
        let mut parent = self.last();
        for (at, block) in next.rest.chunks_exact(self.block_tokens).enumerate() {
            let extras = next.extras(self.hashed_tokens() + at * self.block_tokens);
            parent = block_id::block(&self.space, parent, block, &extras)?;
            next.ids.push(parent);
        }
        self.ids.append(&mut next.ids);
        self.rest = rest;
        let hashed = self.hashed_tokens() as u64;
        next.spans.retain(|span| u64::from(span.position) + u64::from(span.tokens) > hashed);
        self.spans = next.spans;
        Ok(())
    }

    fn add_span(&mut self, span: &Span, hashed: usize) -> Result<(), Error> {
        if (span.position as usize) < hashed || span.tokens == 0 {
            return Err(Error::invalid(
                "span.position",
                format!("{} tokens at {}, where {hashed} are hashed already", span.tokens, span.position),
                "give a span before the tokens that it stands for, with at least one token",
            ));
        }
        if span.digest.is_empty() {
            let fix = "give the digest of what it stands for: without one, two images would be the same";
            return Err(Error::invalid("span.digest", "0 bytes", fix));
        }
        if self.spans.len() >= EXTRAS_MAX * 16 {
            let message = format!("{} spans ahead of the prompt's tokens", self.spans.len());
            return Err(Error::limit("spans", message, "give spans together with their tokens"));
        }
        self.spans.push(span.clone());
        // the same however they were given
        self.spans.sort_by(|a, b| (a.position, a.kind, &a.digest).cmp(&(b.position, b.kind, &b.digest)));
        Ok(())
    }

    /// What stands in the block that begins at this token.
    fn extras(&self, begins: usize) -> Vec<Extra> {
        let (begins, ends) = (begins as u64, (begins + self.block_tokens) as u64);
        let touches = |span: &&Span| {
            u64::from(span.position) < ends && u64::from(span.position) + u64::from(span.tokens) > begins
        };
        let extra = |span: &Span| {
            let before = begins.saturating_sub(u64::from(span.position)) as u32;
            let offset = u64::from(span.position).saturating_sub(begins) as u32;
            Extra { kind: span.kind, offset, bytes: [&span.digest[..], &before.to_le_bytes()].concat() }
        };
        self.spans.iter().filter(touches).map(extra).collect()
    }

    fn hashed_tokens(&self) -> usize {
        self.ids.len() * self.block_tokens
    }

    /// The parent of its first block.
    pub fn root(&self) -> BlockId {
        self.root
    }

    /// The id that the next block has as its parent.
    fn last(&self) -> BlockId {
        self.ids.last().copied().unwrap_or(self.root)
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.hashed_tokens() + self.rest.len()
    }

    /// The whole blocks so far.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// The whole blocks so far, as they are asked for.
    pub fn chain(&self) -> Result<Chain, Error> {
        Chain::from_ids("tokens", self.ids.clone())
    }

    /// The id of what is left over after the whole blocks, and its tokens; `None`: nothing is.
    pub fn tail(&self) -> Result<Option<(BlockId, u32)>, Error> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let extras = self.extras(self.hashed_tokens());
        let id = block_id::tail(&self.space, self.last(), &self.rest, &extras)?;
        Ok(Some((id, self.rest.len() as u32)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: Fingerprint = Fingerprint([7; 32]);

    fn image(position: u32, tokens: u32, content: u8) -> Span {
        Span { kind: Extra::IMAGE, position, tokens, digest: vec![content; 32] }
    }

    fn whole(tokens: &[u32], spans: &[Span]) -> Prompt {
        let mut prompt = Prompt::new(SPACE, 16, BlockId::default());
        prompt.extend(tokens, spans).unwrap();
        prompt
    }

    #[test]
    fn without_spans_it_is_the_chain_of_its_tokens() {
        let tokens: Vec<u32> = (0..100).collect();
        let prompt = whole(&tokens, &[]);
        let chain = Chain::of_tokens(&SPACE, BlockId::default(), &tokens, 16).unwrap();
        assert_eq!(prompt.chain().unwrap(), chain);
        let tail = block_id::tail(&SPACE, prompt.ids()[5], &tokens[96..], &[]).unwrap();
        assert_eq!(prompt.tail().unwrap(), Some((tail, 4)));
        assert_eq!((prompt.tokens(), whole(&tokens[..96], &[]).tail().unwrap()), (100, None));
    }

    #[test]
    fn an_image_changes_the_blocks_from_its_first_on() {
        let tokens: Vec<u32> = (0..64).collect();
        let plain = whole(&tokens, &[]);
        let with = |span| whole(&tokens, &[span]).ids().to_vec();
        let same = |ids: &[BlockId]| plain.ids().iter().zip(ids).take_while(|(a, b)| a == b).count();
        assert_eq!(same(&with(image(20, 30, 1))), 1);
        assert_eq!(same(&with(image(48, 1, 1))), 3);
        assert_ne!(with(image(20, 30, 1))[1], with(image(20, 30, 2))[1], "another image");
        assert_ne!(with(image(20, 30, 1))[1], with(image(21, 30, 1))[1], "another place");
        // by hand: the second block of an image says which part of it that is
        let ids = with(image(10, 30, 1));
        let extra = Extra { kind: Extra::IMAGE, offset: 0, bytes: [&[1; 32][..], &[6, 0, 0, 0]].concat() };
        assert_eq!(ids[1], block_id::block(&SPACE, ids[0], &tokens[16..32], &[extra]).unwrap());
    }

    #[test]
    fn a_span_behind_the_hashed_tokens_is_refused_and_changes_nothing() {
        let mut prompt = whole(&(0..40).collect::<Vec<_>>(), &[]);
        let before = prompt.clone();
        assert_eq!(prompt.extend(&[1; 20], &[image(31, 5, 1)]).unwrap_err().field, "span.position");
        let nameless = Span { digest: Vec::new(), ..image(40, 5, 1) };
        assert_eq!(prompt.extend(&[1; 20], &[nameless]).unwrap_err().field, "span.digest");
        let long = Span { digest: vec![0; 5000], ..image(32, 5, 1) };
        assert!(prompt.extend(&[1; 20], &[long]).is_err());
        assert_eq!((prompt.tokens(), prompt.tail()), (before.tokens(), before.tail()));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            tokens in proptest::collection::vec(any::<u32>(), 0..200),
            cuts in proptest::collection::vec(0usize..200, 0..5),
            spans in proptest::collection::vec((0u32..200, 1u32..60, any::<u8>()), 0..6),
        ) {
            let spans: Vec<_> = spans.into_iter().map(|(at, tokens, content)| image(at, tokens, content)).collect();
            let once = whole(&tokens, &spans);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(tokens.len())).collect();
            cuts.extend([0, tokens.len()]);
            cuts.sort_unstable();
            cuts.dedup();
            let mut piecewise = Prompt::new(SPACE, 16, BlockId::default());
            for pair in cuts.windows(2) {
                // an image is known with its first token; what begins after the last token comes with that
                let to = if pair[1] == tokens.len() { usize::MAX } else { pair[1] };
                let begins = |span: &&Span| (pair[0]..to).contains(&(span.position as usize));
                let new: Vec<_> = spans.iter().rev().filter(begins).cloned().collect();
                piecewise.extend(&tokens[pair[0]..pair[1]], &new).unwrap();
            }
            if !tokens.is_empty() {
                prop_assert_eq!(once.ids(), piecewise.ids());
                prop_assert_eq!(once.tail(), piecewise.tail());
            }
        }
    }
}
