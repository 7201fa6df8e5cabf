//! Exact attention of decode steps over everything recorded, and what a cache reads of it: what `replay` and `eval --task
//! recall` compare a cache with.
//!
//! Written apart from the library, so that an error of its kernels cannot hide behind itself; sums are in `f64`. *Helps*
//! because it is computed once, however many recipes are held against it. *Hurts* memory: one float per query row and
//! recorded token.

use crate::error::Result;
use kvsieve::geometry::LayerShape;
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{KvCache, SequenceId, Step};

/// Queries of decode steps of one layer, and the keys and values they see: those of a prompt, then their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recording<'a> {
    pub(crate) shape: &'a LayerShape,
    /// `[Hq, steps, d_k]`, rotated.
    pub(crate) q: &'a [f32],
    /// `[H, n, d_k]`, rotated.
    pub(crate) k: &'a [f32],
    /// `[H, n, d_v]`.
    pub(crate) v: &'a [f32],
    /// How many entries hold each token of the prompt.
    pub(crate) copies: &'a [u32],
}

/// Attention of the decode steps of one layer.
#[derive(Debug)]
pub(crate) struct Exact {
    /// `[Hq, steps, d_v]`.
    out: Vec<f32>,
    /// Softmax weight of one entry of each token, `[Hq, steps, n]`; 0 beyond a row's own.
    weights: Vec<f32>,
    tokens: usize,
    steps: usize,
    group: usize,
    d_v: usize,
}

impl Exact {
    pub(crate) fn of(recording: &Recording<'_>) -> Self {
        let Recording { shape, q, k, v, copies } = *recording;
        let (d_k, d_v, group) = (shape.d_k, shape.d_v, shape.group());
        let steps = q.len() / (shape.query_heads * d_k);
        let n = copies.len() + steps;
        let times = |token: usize| copies.get(token).map_or(1.0, |&count| f64::from(count));
        let mut out = Vec::with_capacity(shape.query_heads * steps * d_v);
        let mut weights = vec![0.0; shape.query_heads * steps * n];
        let mut logits: Vec<f64> = Vec::with_capacity(n);
        for (row, weights) in weights.chunks_exact_mut(n).enumerate() {
            let (kv, seen) = (row / steps / group, copies.len() + row % steps + 1);
            let query = &q[row * d_k..(row + 1) * d_k];
            let keys = k[kv * n * d_k..(kv + 1) * n * d_k].chunks_exact(d_k).take(seen);
            logits.clear();
            logits.extend(keys.map(|key| f64::from(shape.scale) * dot(query, key)));
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            logits.iter_mut().for_each(|x| *x = (*x - top).exp());
            let total: f64 = logits.iter().enumerate().map(|(token, x)| times(token) * x).sum();
            let values = v[kv * n * d_v..(kv + 1) * n * d_v].chunks_exact(d_v);
            let mut sum = vec![0.0f64; d_v];
            for (token, ((x, weight), value)) in logits.iter().zip(weights).zip(values).enumerate() {
                *weight = (x / total) as f32;
                let all = times(token) * x / total;
                sum.iter_mut().zip(value).for_each(|(s, v)| *s += all * f64::from(*v));
            }
            out.extend(sum.iter().map(|s| *s as f32));
        }
        Self { out, weights, tokens: n, steps, group, d_v }
    }

    /// Query heads that share a KV head.
    pub(crate) fn group(&self) -> usize {
        self.group
    }

    /// Share of the softmax mass of a query head in a step on some entries, named by their tokens.
    pub(crate) fn mass(&self, head: usize, step: usize, entries: impl Iterator<Item = usize>) -> f64 {
        let row = self.row(head, step);
        entries.map(|token| f64::from(row[token])).sum()
    }

    /// ‖got − exact‖ / ‖exact‖ of a query head in a step.
    pub(crate) fn error(&self, head: usize, step: usize, got: &[f32]) -> f64 {
        let want = &self.out[(head * self.steps + step) * self.d_v..][..self.d_v];
        let difference: f64 =
            got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).powi(2)).sum();
        let norm: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
        (difference / norm).sqrt()
    }

    /// Attention of a query head in a step over some entries alone, with the values (`[H, n, d_v]`) it was recorded with.
    pub(crate) fn over(
        &self,
        head: usize,
        step: usize,
        entries: impl Iterator<Item = usize>,
        values: &[f32],
    ) -> Vec<f32> {
        let row = self.row(head, step);
        let values = &values[head / self.group * self.tokens * self.d_v..][..self.tokens * self.d_v];
        let (mut sum, mut total) = (vec![0.0f64; self.d_v], 0.0);
        for token in entries {
            let weight = f64::from(row[token]);
            let value = &values[token * self.d_v..(token + 1) * self.d_v];
            sum.iter_mut().zip(value).for_each(|(s, v)| *s += weight * f64::from(*v));
            total += weight;
        }
        // Weights that all underflow are an output of nothing, not of NaN.
        sum.iter().map(|s| (s / total.max(f64::MIN_POSITIVE)) as f32).collect()
    }

    fn row(&self, head: usize, step: usize) -> &[f32] {
        &self.weights[(head * self.steps + step) * self.tokens..][..self.tokens]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Some tokens of a `[heads, n, dim]` tensor.
pub(crate) fn tokens_of(
    rows: &[f32],
    (n, dim): (usize, usize),
    tokens: impl Iterator<Item = usize> + Clone,
) -> Vec<f32> {
    let heads = rows.chunks_exact(n * dim);
    heads.flat_map(|head| tokens.clone().flat_map(|t| &head[t * dim..(t + 1) * dim])).copied().collect()
}

/// Attention of a step's tokens in one layer; all tensors are `[heads, tokens, dim]`.
pub(crate) fn attend(
    step: &mut Step<'_>,
    (layer, shape): (usize, &LayerShape),
    [q, k, v]: [&[f32]; 3],
    out: &mut [f32],
) -> Result<()> {
    let tokens = step.tokens();
    Ok(step.attend(
        layer,
        TensorView::head_major(q, tokens, shape.query_heads, shape.d_k)?,
        TensorView::head_major(k, tokens, shape.kv_heads, shape.d_k)?,
        TensorView::head_major(v, tokens, shape.kv_heads, shape.d_v)?,
        TensorViewMut::head_major(out, tokens, shape.query_heads, shape.d_v)?,
    )?)
}

/// Positions stored in a layer, per KV head.
pub(crate) fn stored(cache: &KvCache, sequence: SequenceId, layer: usize) -> Result<Vec<Vec<i32>>> {
    let heads = 0..cache.shape().layer(layer).kv_heads;
    heads.map(|h| Ok(cache.positions(sequence, layer, h)?.iter().map(|p| p.0).collect())).collect()
}

/// Positions that the last step read of a layer, per KV head, where an index chose them.
pub(crate) fn chosen(cache: &KvCache, sequence: SequenceId, layer: usize) -> Result<Option<Vec<Vec<i32>>>> {
    let choice = cache.last_choice(sequence, layer)?;
    Ok(choice.map(|choice| {
        let heads = choice.offsets.windows(2).map(|o| &choice.positions[o[0]..o[1]]);
        heads.map(|positions| positions.iter().map(|p| p.0).collect()).collect()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_weigh_like_entries_of_their_own() {
        let shape = LayerShape::new(2, 1, 2);
        let q = [1.0, 0.5, -0.25, 2.0];
        let (k, v) = ([0.5, 1.0, -1.0, 0.25, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0, 3.0, -1.0]);
        let once = Exact::of(&Recording { shape: &shape, q: &q, k: &k, v: &v, copies: &[2, 1] });
        // The same with the first token written out twice.
        let (k2, v2) = ([&k[..2], &k[..]].concat(), [&v[..2], &v[..]].concat());
        let twice = Exact::of(&Recording { shape: &shape, q: &q, k: &k2, v: &v2, copies: &[1, 1, 1] });
        for head in 0..2 {
            assert!((once.mass(head, 0, [0, 0, 1, 2].into_iter()) - 1.0).abs() < 1e-6);
            assert!(
                (once.mass(head, 0, [0].into_iter()) - twice.mass(head, 0, [1].into_iter())).abs() < 1e-7
            );
            assert!(once.error(head, 0, &twice.out[head * 2..][..2]) < 1e-6);
            let whole = once.over(head, 0, [0, 0, 1, 2].into_iter(), &v);
            assert!(once.error(head, 0, &whole) < 1e-6);
            assert_eq!(once.over(head, 0, [1].into_iter(), &v), [0.0, 1.0]);
        }
        assert_eq!(tokens_of(&v, (3, 2), [2, 0].into_iter()), [3.0, -1.0, 1.0, 0.0]);
    }
}
