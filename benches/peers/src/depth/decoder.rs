//! Who decodes: kvsieve's cache in its candle host, and llama.cpp, each with the same tokens at several depths.
//!
//! *Helps* because both go through the same rounds, and through what their users call. *Hurts* by memory: everyone
//! holds the context once for each depth (kvsieve's depths share what they have in common).

use crate::contestant::Result;
use crate::ggml;
use crate::ggml::llama;
use kvsieve::backend::Backend;
use kvsieve::{KvCache, SequenceId};
use kvsieve_candle::{Config, Logits, Model};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens fed at once until a depth is reached: what `kvsieve run` and llama.cpp feed by default.
const CHUNK: usize = 512;

/// Storage formats of kvsieve, with their recipes.
pub(super) const RECIPES: &[(&str, &str)] = &[
    ("f32", "full"),
    ("f16", "full+k=f16+v=f16"),
    ("int8", "full+k=int8+v=int8"),
    ("int4", "full+k=int4(center,hadamard)+v=int4(center,hadamard)"),
];

/// Time of one decoded token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    /// All of it.
    pub(super) whole: Duration,
    /// Inside attention, where that is known apart.
    pub(super) attention: Option<Duration>,
}

/// An engine with a sequence at each depth.
pub(super) trait Decoder: Debug {
    /// Before and after a turn: threads are woken, and told not to spin while others are measured.
    fn active(&mut self, _active: bool) {}

    /// Feeds one token to the sequence at the depth of this index.
    fn step(&mut self, at: usize, token: u32) -> Result<Token>;

    /// Logits after the last step.
    fn logits(&mut self, at: usize) -> Result<Vec<f32>>;
}

/// A row's name in tables.
pub(super) fn llama_label(format: &str) -> String {
    format!("llama {format}")
}

/// Bytes of the keys and values of `tokens`, with `row` bytes for a row of a head.
pub(super) fn kv_bytes(config: &Config, tokens: usize, row: usize) -> u64 {
    (2 * config.layers * config.kv_heads * tokens * row) as u64
}

/// A kvsieve cache that answers the candle host's attention, as in `kvsieve run`.
#[derive(Debug)]
pub(super) struct Ours<'a> {
    model: &'a Model,
    cache: KvCache,
    sequences: Vec<SequenceId>,
    logits: Vec<f32>,
}

impl<'a> Ours<'a> {
    /// A sequence that holds the first `depth` of `tokens`, for each of ascending `depths`.
    pub(super) fn build(
        recipe: &str,
        model: &'a Model,
        backend: &Arc<dyn Backend>,
        tokens: &[u32],
        depths: &[usize],
    ) -> Result<Self> {
        let builder = KvCache::builder(model.shape()?).recipe(recipe);
        let mut cache = builder.shared_backend(Arc::clone(backend)).build()?;
        let prompt = cache.create_sequence();
        let (mut sequences, mut done) = (Vec::new(), 0);
        for &depth in depths {
            for chunk in tokens[done..depth].chunks(CHUNK) {
                model.forward(&mut cache, prompt, chunk, Logits::None)?;
            }
            done = depth;
            let sequence = cache.fork(prompt)?;
            cache.end_prefill(sequence)?;
            sequences.push(sequence);
        }
        cache.drop_sequence(prompt)?;
        // The buffers of the long steps are no part of a decoding process.
        cache.shrink_scratch();
        Ok(Self { model, cache, sequences, logits: Vec::new() })
    }
}

impl Decoder for Ours<'_> {
    fn step(&mut self, at: usize, token: u32) -> Result<Token> {
        // A clock of its own: the host's leaves out opening and committing the step, where pages are packed.
        let start = Instant::now();
        let forward = self.model.forward(&mut self.cache, self.sequences[at], &[token], Logits::Last)?;
        let whole = start.elapsed();
        self.logits = forward.last_row()?;
        Ok(Token { whole, attention: Some(forward.timings.attention_per_token()) })
    }

    fn logits(&mut self, _: usize) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}

/// llama.cpp, with a context for each depth.
#[derive(Debug)]
pub(super) struct Llama<'a> {
    pool: &'a ggml::Pool,
    contexts: Vec<llama::Context<'a>>,
}

impl<'a> Llama<'a> {
    /// A context that holds the first `depth` of `tokens`, for each of ascending `depths`, with room for `room` tokens.
    pub(super) fn build(
        format: ggml::Format,
        model: &'a llama::Model,
        pool: &'a ggml::Pool,
        tokens: &[u32],
        depths: &[usize],
        room: usize,
    ) -> Result<Self> {
        let mut contexts: Vec<llama::Context<'a>> = Vec::new();
        for &depth in depths {
            let mut context = llama::Context::new(model, pool, room, CHUNK, format)?;
            // The depth before is the beginning of this one.
            if let Some(before) = contexts.last().filter(|before| before.tokens() > 0) {
                before.copy_into(&mut context)?;
            }
            for chunk in tokens[context.tokens()..depth].chunks(CHUNK) {
                context.decode(chunk)?;
            }
            contexts.push(context);
        }
        pool.awake(false);
        Ok(Self { pool, contexts })
    }
}

impl Decoder for Llama<'_> {
    fn active(&mut self, active: bool) {
        self.pool.awake(active);
    }

    fn step(&mut self, at: usize, token: u32) -> Result<Token> {
        let start = Instant::now();
        self.contexts[at].decode(&[token])?;
        Ok(Token { whole: start.elapsed(), attention: None })
    }

    fn logits(&mut self, at: usize) -> Result<Vec<f32>> {
        self.contexts[at].logits()
    }
}
