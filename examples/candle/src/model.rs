//! A Llama-architecture transformer whose attention is someone else's.
//!
//! The model computes projections, rotary embedding, norms, feed-forward and logits. Where Q, K and V of new tokens meet
//! it calls an [`Attend`]: [`crate::adapter`] answers with a kvsieve cache, [`crate::stock`] with what candle does
//! today.
//!
//! *Helps*: the two run on identical inputs, so differences in speed and in logits are the attention's. *Hurts*: one
//! sequence per call; nothing is batched over sequences.

use std::time::Instant;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::timings::Timings;
use crate::weights::{Linear, Weights, gated};

/// Rows of logits computed at once when every row is wanted one by one: 64 rows of a 49,152-token vocabulary are 12 MB.
const LOGIT_ROWS: usize = 64;

/// The place where a host meets a KV cache: new Q, K, V of one layer in, attention output out.
pub trait Attend {
    /// `q` is `(tokens, query heads, key dim)`, `k` `(tokens, kv heads, key dim)`, `v` `(tokens, kv heads, value dim)`:
    /// `f32`, rotated, views into one buffer (so strided). Stores `k` and `v` and returns the attention of `q` over all
    /// that is stored, as `(tokens, query heads * value dim)`.
    ///
    /// # Errors
    /// Whatever the cache refuses.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// What the projections of a layer are made of, `(tokens, width)`, before that layer's [`Attend::attend`]. Ignored by default.
    ///
    /// # Errors
    /// Whatever the cache refuses.
    fn hidden(&mut self, _layer: usize, _states: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Which rows of logits a forward pass computes. A vocabulary row costs as much as a layer, so ask for what you read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logits {
    /// None: prefill of all but the last chunk.
    None,
    /// The last token's: what sampling needs.
    #[default]
    Last,
    /// Every token's: `tokens * vocabulary` floats at once; see [`Pass::for_each_row`] for a bounded way.
    All,
}

/// The outcome of a forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `(rows, vocabulary)`, `f32`; `None` if none were asked for.
    pub logits: Option<Tensor>,
    /// Where the time went.
    pub timings: Timings,
}

impl Forward {
    /// The last row of logits as a vector.
    ///
    /// # Errors
    /// [`Error::NoTokens`] if no logits were asked for.
    pub fn last_row(&self) -> Result<Vec<f32>> {
        let logits = self.logits.as_ref().ok_or(Error::NoTokens { what: "reading logits" })?;
        let rows = logits.dim(0)?;
        Ok(logits.narrow(0, rows - 1, 1)?.flatten_all()?.to_vec1::<f32>()?)
    }
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    output: Linear,
    feed_forward_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

#[derive(Debug)]
enum Embedding {
    Dense(Tensor),
    Quantized(QTensor),
}

/// A loaded model.
#[derive(Debug)]
pub struct Model {
    config: Config,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    fingerprint: String,
}

impl Model {
    /// Opens a file and loads the model from it.
    ///
    /// # Errors
    /// As [`Gguf::open`] and [`Model::from_gguf`].
    pub fn load(path: impl AsRef<std::path::Path>, weights: Weights) -> Result<Self> {
        Self::from_gguf(&mut Gguf::open(path)?, weights)
    }

    /// Loads the model from an open file (which also gives the tokenizer).
    ///
    /// # Errors
    /// As [`Config::read`]; [`Error::MissingTensor`] and [`Error::TensorShape`] if the tensors do not fit the metadata.
    pub fn from_gguf(gguf: &mut Gguf, weights: Weights) -> Result<Self> {
        let config = Config::read(gguf)?;
        let (width, ff) = (config.embedding, config.feed_forward);
        let (q, k) = (config.query_heads * config.key_dim, config.kv_heads * config.key_dim);
        let (v, attended) = (config.kv_heads * config.value_dim, config.query_heads * config.value_dim);

        let vocabulary = [config.vocabulary, width];
        let table = gguf.tensor("token_embd.weight", &vocabulary)?;
        // Small models tie the output matrix to the embedding and store it once.
        let tied = !gguf.has_tensor("output.weight");
        let head = gguf.tensor(if tied { "token_embd.weight" } else { "output.weight" }, &vocabulary)?;
        let head = Linear::new(weights, vec![head])?;
        let embedding = match weights {
            Weights::F32 => Embedding::Dense(match (&head, tied) {
                // One copy in memory, as in the file.
                (Linear::Dense { weight, .. }, true) => weight.clone(),
                _ => table.dequantize(&Device::Cpu)?,
            }),
            Weights::Quantized => Embedding::Quantized(table),
        };

        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            for bias in ["attn_q", "attn_k", "attn_v", "attn_output"] {
                if gguf.has_tensor(&format!("blk.{layer}.{bias}.bias")) {
                    return Err(Error::Unsupported {
                        what: format!("a bias tensor `blk.{layer}.{bias}.bias`"),
                    });
                }
            }
            let mut linear = |parts: &[(&str, usize)], inputs: usize| {
                let parts: Vec<_> = parts.iter().map(|(part, outputs)| (name(part), *outputs)).collect();
                Linear::read(gguf, weights, &parts, inputs)
            };
            let qkv = linear(&[("attn_q", q), ("attn_k", k), ("attn_v", v)], width)?;
            let output = linear(&[("attn_output", width)], attended)?;
            let gate_up = linear(&[("ffn_gate", ff), ("ffn_up", ff)], width)?;
            let down = linear(&[("ffn_down", width)], ff)?;
            layers.push(Layer {
                attention_norm: norm(gguf, &name("attn_norm"), width)?,
                qkv,
                output,
                feed_forward_norm: norm(gguf, &name("ffn_norm"), width)?,
                gate_up,
                down,
            });
        }
        let norm = norm(gguf, "output_norm.weight", width)?;
        let fingerprint = format!("{} {:016x}", config.name, gguf.fingerprint());
        Ok(Self { norm, config, embedding, layers, head, fingerprint })
    }

    /// Tells these weights from others, of the same shape too.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Attention outputs of a layer, `(tokens, query heads * value dim)`, as they are added to the residual stream,
    /// `(tokens, width)`: what an error of attention comes to.
    ///
    /// # Errors
    /// [`Error::Layer`] for a layer that is not; extents.
    pub fn project(&self, layer: usize, attended: &Tensor) -> Result<Tensor> {
        let layers = self.layers.len();
        self.layers.get(layer).ok_or(Error::Layer { layer, layers })?.output.forward(attended)
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Feeds `tokens` at consecutive positions from `start`, attention by `attend`.
    ///
    /// # Errors
    /// [`Error::NoTokens`], [`Error::Token`], [`Error::Context`] for inputs that cannot be run, and whatever `attend`
    /// reports.
    pub fn forward_with(
        &self,
        attend: &mut dyn Attend,
        tokens: &[u32],
        start: i32,
        logits: Logits,
    ) -> Result<Forward> {
        let mut pass = self.pass(attend, tokens, start)?;
        let began = Instant::now();
        let rows = match logits {
            Logits::None => None,
            Logits::Last => Some((tokens.len() - 1, 1)),
            Logits::All => Some((0, tokens.len())),
        };
        let logits = rows.map(|(first, count)| pass.logits(first, count)).transpose()?;
        pass.timings.total += began.elapsed();
        Ok(Forward { logits, timings: pass.timings })
    }

    /// As [`Model::forward_with`], but stops before the logits, which the returned [`Pass`] computes on demand.
    ///
    /// # Errors
    /// As [`Model::forward_with`].
    pub fn pass(&self, attend: &mut dyn Attend, tokens: &[u32], start: i32) -> Result<Pass<'_>> {
        let began = Instant::now();
        self.check(tokens, start)?;
        let config = &self.config;
        let count = tokens.len();
        let angles = config.rotary.angles(start, count);
        let mut timings = Timings { tokens: count, ..Timings::default() };

        let ids = Tensor::from_slice(tokens, count, &Device::Cpu)?;
        let mut x = match &self.embedding {
            Embedding::Dense(table) => table.index_select(&ids, 0)?,
            Embedding::Quantized(table) => table.embedding(&ids)?,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = candle_nn::ops::rms_norm(&x, &layer.attention_norm, config.rms_epsilon)?;
            attend.hidden(index, &normed)?;
            let qkv = layer.qkv.forward(&normed)?;
            // Query heads and key heads lie side by side, so one call rotates both.
            angles.rotate(&qkv, config.query_heads + config.kv_heads, config.key_dim)?;
            let (q, k, v) = self.split(&qkv)?;

            let attention = Instant::now();
            let attended = attend.attend(index, &q, &k, &v)?;
            timings.attention += attention.elapsed();

            x = (x + layer.output.forward(&attended)?)?;
            let normed = candle_nn::ops::rms_norm(&x, &layer.feed_forward_norm, config.rms_epsilon)?;
            x = (x + layer.down.forward(&gated(&layer.gate_up.forward(&normed)?)?)?)?;
        }
        timings.total = began.elapsed();
        Ok(Pass { model: self, hidden: x, timings })
    }

    fn check(&self, tokens: &[u32], start: i32) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::NoTokens { what: "a forward pass" });
        }
        let vocabulary = self.config.vocabulary;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Token { token, vocabulary });
        }
        let end = usize::try_from(start).unwrap_or(0) + tokens.len();
        if end > self.config.context {
            return Err(Error::Context { end, context: self.config.context });
        }
        Ok(())
    }

    /// Cuts `(tokens, width)` rows into Q, K and V heads without copying where key and value dimensions agree.
    fn split(&self, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let Config { query_heads, kv_heads, key_dim, value_dim, .. } = self.config;
        let tokens = qkv.dim(0)?;
        if key_dim == value_dim {
            let heads = qkv.reshape((tokens, query_heads + 2 * kv_heads, key_dim))?;
            return Ok((
                heads.narrow(1, 0, query_heads)?,
                heads.narrow(1, query_heads, kv_heads)?,
                heads.narrow(1, query_heads + kv_heads, kv_heads)?,
            ));
        }
        let part = |start: usize, heads: usize, dim: usize| -> Result<Tensor> {
            Ok(qkv.narrow(1, start, heads * dim)?.reshape((tokens, heads, dim))?)
        };
        let (q, k) = (query_heads * key_dim, kv_heads * key_dim);
        Ok((part(0, query_heads, key_dim)?, part(q, kv_heads, key_dim)?, part(q + k, kv_heads, value_dim)?))
    }
}

/// A forward pass whose logits are still to be computed.
#[derive(Debug)]
pub struct Pass<'a> {
    model: &'a Model,
    hidden: Tensor,
    /// Where the time went so far.
    pub timings: Timings,
}

impl Pass<'_> {
    /// Logits of `count` rows from `first`: `(count, vocabulary)`.
    ///
    /// # Errors
    /// If the rows are outside the pass.
    pub fn logits(&self, first: usize, count: usize) -> Result<Tensor> {
        let rows = self.hidden.narrow(0, first, count)?;
        let normed = candle_nn::ops::rms_norm(&rows, &self.model.norm, self.model.config.rms_epsilon)?;
        self.model.head.forward(&normed)
    }

    /// Calls `visit` with every row's index in the pass and its logits, holding a few rows at a time: evaluation over
    /// thousands of positions needs each row once, and all at once would be gigabytes.
    ///
    /// # Errors
    /// The first failure, `visit`'s own included.
    pub fn for_each_row(&mut self, visit: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        let rows = self.hidden.dim(0)?;
        for first in (0..rows).step_by(LOGIT_ROWS) {
            let began = Instant::now();
            let block = self.logits(first, LOGIT_ROWS.min(rows - first))?;
            let block = block.flatten_all()?.to_vec1::<f32>()?;
            self.timings.total += began.elapsed();
            for (offset, row) in block.chunks_exact(self.model.config.vocabulary).enumerate() {
                visit(first + offset, row)?;
            }
        }
        Ok(())
    }
}

fn norm(gguf: &mut Gguf, name: &str, width: usize) -> Result<Tensor> {
    Ok(gguf.tensor(name, &[width])?.dequantize(&Device::Cpu)?)
}
