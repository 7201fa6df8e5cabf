//! Hyper-parameters of a Llama-architecture model, read from GGUF metadata.
//!
//! *Helps*: everything the rest of the host needs to know about the file, checked once; a model that would run wrong
//! (mixture of experts, per-layer head counts, unknown rotary scaling) is refused here by name. *Hurts*: architectures
//! that share Llama's tensors but rotate differently (Qwen, Phi) are refused too, rather than run wrong.

use crate::error::{Error, Result};
use crate::gguf::{Gguf, bad};
use crate::rope::{Rotary, Scaling};

/// Hyper-parameters of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `general.name`, for reports.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub embedding: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimension of a query and of a key.
    pub key_dim: usize,
    /// Dimension of a value.
    pub value_dim: usize,
    /// Epsilon of the RMS norms.
    pub rms_epsilon: f32,
    /// Positions the model was trained for (after scaling).
    pub context: usize,
    /// Vocabulary size.
    pub vocabulary: usize,
    /// The rotary embedding.
    pub rotary: Rotary,
}

impl Config {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture or an unsupported feature, [`Error::MissingKey`] and
    /// [`Error::BadKey`] for metadata that is absent or impossible.
    pub fn read(gguf: &mut Gguf) -> Result<Self> {
        let architecture = gguf
            .string("general.architecture")?
            .ok_or_else(|| Error::MissingKey { key: "general.architecture".into() })?;
        if architecture != "llama" {
            return Err(Error::Unsupported { what: format!("`general.architecture` = `{architecture}`") });
        }
        if gguf.integer("llama.expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(Error::Unsupported {
                what: "a mixture of experts (`llama.expert_count` > 0)".into(),
            });
        }
        let layers = positive(gguf, "llama.block_count")?;
        let embedding = positive(gguf, "llama.embedding_length")?;
        let feed_forward = positive(gguf, "llama.feed_forward_length")?;
        let query_heads = positive(gguf, "llama.attention.head_count")?;
        let kv_heads = gguf.integer("llama.attention.head_count_kv")?.unwrap_or(query_heads);
        if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::BadKey {
                key: "llama.attention.head_count_kv".into(),
                got: kv_heads.to_string(),
                want: format!("a divisor of the {query_heads} query heads"),
            });
        }
        let key_dim = gguf.integer("llama.attention.key_length")?.unwrap_or(embedding / query_heads);
        let value_dim = gguf.integer("llama.attention.value_length")?.unwrap_or(key_dim);
        for (key, dim) in [("key_length", key_dim), ("value_length", value_dim)] {
            if dim == 0 {
                return Err(Error::BadKey {
                    key: format!("llama.attention.{key}"),
                    got: "0".into(),
                    want: "a head dimension of at least 1".into(),
                });
            }
        }
        let vocabulary = match gguf.integer("llama.vocab_size")? {
            Some(size) => size,
            None => gguf.need_strings("tokenizer.ggml.tokens")?.len(),
        };
        let rms_epsilon = gguf
            .float("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| Error::MissingKey { key: "llama.attention.layer_norm_rms_epsilon".into() })?;
        let rotary = rotary(gguf, key_dim)?;
        Ok(Self {
            name: gguf.string("general.name")?.unwrap_or("unnamed").to_owned(),
            layers,
            embedding,
            feed_forward,
            query_heads,
            kv_heads,
            key_dim,
            value_dim,
            rms_epsilon,
            context: positive(gguf, "llama.context_length")?,
            vocabulary,
            rotary,
        })
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }
}

fn positive(gguf: &Gguf, key: &str) -> Result<usize> {
    let number = gguf.need_integer(key)?;
    if number == 0 {
        return Err(Error::BadKey { key: key.into(), got: "0".into(), want: "at least 1".into() });
    }
    Ok(number)
}

fn rotary(gguf: &mut Gguf, key_dim: usize) -> Result<Rotary> {
    let dims = gguf.integer("llama.rope.dimension_count")?.unwrap_or(key_dim);
    if dims == 0 || !dims.is_multiple_of(2) || dims > key_dim {
        return Err(Error::BadKey {
            key: "llama.rope.dimension_count".into(),
            got: dims.to_string(),
            want: format!("an even number up to the key dimension {key_dim}"),
        });
    }
    let base = gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    if base <= 1.0 {
        return Err(Error::BadKey {
            key: "llama.rope.freq_base".into(),
            got: base.to_string(),
            want: "a number above 1".into(),
        });
    }

    // Llama 3's piecewise rule is baked by the converters into one divisor per pair.
    if gguf.has_tensor("rope_freqs.weight") {
        let factors = gguf.tensor("rope_freqs.weight", &[dims / 2])?;
        let factors = factors.dequantize(&candle_core::Device::Cpu)?.to_vec1::<f32>()?;
        return Ok(Rotary { dims, base, scaling: Scaling::Factors(factors), magnitude: 1.0 });
    }

    // `rope.scale_linear` is the older spelling of linear scaling.
    let factor =
        gguf.float("llama.rope.scaling.factor")?.or(gguf.float("llama.rope.scale_linear")?).unwrap_or(1.0);
    if factor <= 0.0 {
        return Err(Error::BadKey {
            key: "llama.rope.scaling.factor".into(),
            got: factor.to_string(),
            want: "a number above 0".into(),
        });
    }
    let kind = match gguf.string("llama.rope.scaling.type")? {
        Some(kind) => kind.to_owned(),
        None if factor == 1.0 => "none".to_owned(),
        None => "linear".to_owned(),
    };
    let (scaling, magnitude) = match kind.as_str() {
        "none" => (Scaling::None, 1.0),
        "linear" => (Scaling::Linear { factor }, 1.0),
        "yarn" => {
            let original_context = gguf.need_integer("llama.rope.scaling.original_context_length")?;
            let attention = gguf.float("llama.rope.scaling.attn_factor")?.unwrap_or(1.0);
            let scaling = Scaling::Yarn {
                factor,
                beta_fast: gguf.float("llama.rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: gguf.float("llama.rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                original_context: original_context as f32,
            };
            // YaRN also sharpens the softmax; the GGUF convention folds that into the length of rotated vectors.
            (scaling, attention * (1.0 + 0.1 * factor.ln()))
        }
        _ => {
            let key = "llama.rope.scaling.type";
            return Err(match gguf.value(key) {
                Some(value) => bad(key, value, "none, linear or yarn, or a `rope_freqs.weight` tensor"),
                None => Error::MissingKey { key: key.into() },
            });
        }
    };
    Ok(Rotary { dims, base, scaling, magnitude })
}
