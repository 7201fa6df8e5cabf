//! The attention that candle's own Llama runs today: the peer in measurements and the oracle for logits.
//!
//! Per layer it keeps K and V as dense `f32` tensors, grows them with `Tensor::cat`, repeats every KV head for its group
//! of query heads, multiplies, masks, takes the softmax and multiplies again, in the order of `quantized_llama.rs` in
//! candle-transformers 0.11 with the prefix-aware mask of its `utils.rs`.
//!
//! *Helps* as the thing to compare with: exact, and nothing of kvsieve is in it. *Hurts* in use: every token copies the
//! whole cache once to append and again, `query heads / kv heads` times as large, to repeat.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::model::{Attend, Forward, Logits, Model, Pass};

/// One sequence's dense cache.
#[derive(Debug)]
pub struct Stock {
    layers: Vec<Option<(Tensor, Tensor)>>,
    /// Tokens that every layer holds. Nothing is ever dropped here, so this is also the next position.
    tokens: usize,
}

impl Stock {
    /// An empty cache for a model.
    pub fn new(model: &Model) -> Self {
        Self { layers: vec![None; model.config().layers], tokens: 0 }
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of K and V held, all layers (the repeated copies of each step not counted).
    pub fn bytes(&self) -> usize {
        let elements: usize =
            self.layers.iter().flatten().map(|(k, v)| k.elem_count() + v.elem_count()).sum();
        elements * size_of::<f32>()
    }

    fn start(&self, model: &Model) -> Result<i32> {
        i32::try_from(self.tokens)
            .map_err(|_| Error::Context { end: self.tokens, context: model.config().context })
    }
}

impl Attend for Stock {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (count, heads, dim) = q.dims3()?;
        let head_major = |x: &Tensor| x.transpose(0, 1)?.unsqueeze(0)?.contiguous();
        let (q, k, v) = (head_major(q)?, head_major(k)?, head_major(v)?);
        let (k, v) = match self.layers[layer].take() {
            None => (k, v),
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, &k], 2)?, Tensor::cat(&[&old_v, &v], 2)?),
        };
        self.layers[layer] = Some((k.clone(), v.clone()));

        let (k, v) = (repeat_heads(k, heads)?, repeat_heads(v, heads)?);
        let mut weights = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?;
        if count > 1 {
            let mask = causal_mask(count, k.dim(2)?)?.broadcast_as(weights.shape())?;
            let never = Tensor::new(f32::NEG_INFINITY, &Device::Cpu)?.broadcast_as(weights.shape())?;
            weights = mask.where_cond(&never, &weights)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&weights)?;
        let out = weights.matmul(&v.contiguous()?)?;
        Ok(out.transpose(1, 2)?.reshape((count, heads * v.dim(3)?))?)
    }
}

fn repeat_heads(x: Tensor, heads: usize) -> Result<Tensor> {
    let (batch, kv_heads, rows, dim) = x.dims4()?;
    if kv_heads == heads {
        return Ok(x);
    }
    Ok(Tensor::cat(&vec![&x; heads / kv_heads], 2)?.reshape((batch, heads, rows, dim))?)
}

/// 1 where the query (row) must not see the key (column); the queries are the last `count` of `stored` tokens.
fn causal_mask(count: usize, stored: usize) -> Result<Tensor> {
    let first = stored - count;
    let mask: Vec<u8> =
        (0..count).flat_map(|query| (0..stored).map(move |key| u8::from(key > first + query))).collect();
    Ok(Tensor::from_vec(mask, (count, stored), &Device::Cpu)?)
}

impl Model {
    /// Feeds `tokens` through the stock attention path.
    ///
    /// # Errors
    /// As [`Model::forward_with`].
    pub fn forward_stock(&self, cache: &mut Stock, tokens: &[u32], logits: Logits) -> Result<Forward> {
        let start = cache.start(self)?;
        let out = self.forward_with(cache, tokens, start, logits)?;
        cache.tokens += tokens.len();
        Ok(out)
    }

    /// As [`Model::forward_stock`], with the logits still to be computed.
    ///
    /// # Errors
    /// As [`Model::forward_with`].
    pub fn pass_stock(&self, cache: &mut Stock, tokens: &[u32]) -> Result<Pass<'_>> {
        let start = cache.start(self)?;
        let pass = self.pass(cache, tokens, start)?;
        cache.tokens += tokens.len();
        Ok(pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attention written as three loops, in f64.
    fn naive(q: &[f32], k: &[f32], v: &[f32], heads: usize, kv: usize, dim: usize) -> Vec<f64> {
        let tokens = q.len() / (heads * dim);
        let mut out = vec![0f64; tokens * heads * dim];
        for t in 0..tokens {
            for h in 0..heads {
                let g = h / (heads / kv);
                let dot = |s: usize| -> f64 {
                    let q = &q[(t * heads + h) * dim..][..dim];
                    let k = &k[(s * kv + g) * dim..][..dim];
                    q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                        / (dim as f64).sqrt()
                };
                let logits: Vec<f64> = (0..=t).map(dot).collect();
                let top = logits.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = logits.iter().map(|l| (l - top).exp()).sum();
                for (s, logit) in logits.iter().enumerate() {
                    let weight = (logit - top).exp() / total;
                    for d in 0..dim {
                        out[(t * heads + h) * dim + d] += weight * f64::from(v[(s * kv + g) * dim + d]);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn chunks_and_single_tokens_equal_the_naive_loops() {
        let (tokens, heads, kv, dim) = (9, 6, 2, 4);
        let values = |n: usize, step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin()).collect() };
        let (q, k, v) = (
            values(tokens * heads * dim, 0.7),
            values(tokens * kv * dim, 1.3),
            values(tokens * kv * dim, 0.31),
        );
        let want = naive(&q, &k, &v, heads, kv, dim);
        let tensor = |x: &[f32], h: usize| Tensor::from_slice(x, (tokens, h, dim), &Device::Cpu).unwrap();
        let (q, k, v) = (tensor(&q, heads), tensor(&k, kv), tensor(&v, kv));
        let mut stock = Stock { layers: vec![None], tokens: 0 };
        let mut got = Vec::new();
        for (start, count) in [(0, 4), (4, 3), (7, 1), (8, 1)] {
            let cut = |x: &Tensor| x.narrow(0, start, count).unwrap();
            let out = stock.attend(0, &cut(&q), &cut(&k), &cut(&v)).unwrap();
            got.extend(out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        for (g, w) in got.iter().zip(&want) {
            assert!((f64::from(*g) - w).abs() < 1e-5, "{g} {w}");
        }
        assert_eq!(stock.bytes(), 2 * tokens * kv * dim * 4);
    }
}
