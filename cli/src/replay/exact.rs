//! Exact attention over everything recorded: what a compressed cache is compared with.
//!
//! Written apart from the library, so that an error of its kernels cannot hide behind itself; sums are in `f64`.

use super::trace::{Recorded, Trace};

/// Attention of the decode rows of one layer.
#[derive(Debug)]
pub(super) struct Exact {
    /// `[Hq, decode, dim]`.
    pub(super) out: Vec<f32>,
    /// Softmax weights `[Hq, decode, n]`, 0 beyond a row's own position.
    weights: Vec<f32>,
    tokens: usize,
    decode: usize,
    group: usize,
}

impl Exact {
    pub(super) fn of(trace: &Trace, layer: &Recorded) -> Self {
        let (n, dim, decode) = (trace.tokens(), trace.dim, trace.decode);
        let group = trace.query_heads / trace.kv_heads;
        let q = trace.rotated(&layer.q, trace.prompt, decode, trace.prompt as i32);
        let k = trace.rotated(&layer.k, 0, n, 0);
        let mut out = vec![0.0; trace.query_heads * decode * dim];
        let mut weights = vec![0.0; trace.query_heads * decode * n];
        for row in 0..trace.query_heads * decode {
            let (head, step) = (row / decode, row % decode);
            let kv = head / group;
            let query = &q[row * dim..(row + 1) * dim];
            let keys = k[kv * n * dim..(kv + 1) * n * dim].chunks_exact(dim);
            let values = layer.v[kv * n * dim..(kv + 1) * n * dim].chunks_exact(dim);
            let seen = trace.prompt + step + 1;
            let logits: Vec<f64> =
                keys.take(seen).map(|key| f64::from(trace.scale) * dot(query, key)).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|x| (x - top).exp()).sum();
            let mut sum = vec![0.0f64; dim];
            for (j, (x, value)) in logits.iter().zip(values).enumerate() {
                let weight = (x - top).exp() / total;
                weights[row * n + j] = weight as f32;
                sum.iter_mut().zip(value).for_each(|(s, v)| *s += weight * f64::from(*v));
            }
            out[row * dim..(row + 1) * dim].iter_mut().zip(&sum).for_each(|(o, s)| *o = *s as f32);
        }
        Self { out, weights, tokens: n, decode, group }
    }

    /// Mean share of the exact softmax mass that lies on `kept` prompt and decode positions (one list per KV head),
    /// over the query heads of decode row `step`.
    pub(super) fn recall(&self, step: usize, kept: &[Vec<i32>]) -> f64 {
        let heads = kept.len() * self.group;
        let share = |head: usize| -> f64 {
            let row = &self.weights[(head * self.decode + step) * self.tokens..][..self.tokens];
            kept[head / self.group].iter().map(|&p| f64::from(row[p as usize])).sum()
        };
        (0..heads).map(share).sum::<f64>() / heads as f64
    }

    /// ‖got − exact‖ / ‖exact‖ of row `step` of a query head.
    pub(super) fn error(&self, head: usize, step: usize, got: &[f32]) -> f64 {
        let dim = got.len();
        let want = &self.out[(head * self.decode + step) * dim..][..dim];
        let difference: f64 =
            got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).powi(2)).sum();
        let norm: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
        (difference / norm).sqrt()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
