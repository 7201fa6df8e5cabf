//! Keys and values in single precision: what every contestant stores in its own way, and the attention over
//! them written as plain loops.
//!
//! *Helps* because a benchmark of a wrong result is worthless. *Hurts* the start of a run by seconds.

use crate::config::{Config, KV_HEADS};
use crate::contestant::{Contestant, Kind, Result, Side};

/// Allowed distance of a result from plain attention over the stored data, as a share of the norm. ggml sums
/// values of f16 in half precision, so its error grows with the square root of their number: 1.3 % at 16384.
pub(crate) fn tolerance(kind: Kind, n: usize) -> f64 {
    let growth = if kind == Kind::Peer { (n as f64 / 16384.0).sqrt().max(1.0) } else { 1.0 };
    0.02 * growth
}

/// Storage errors above this mean that a type is lossy by intent, and is checked over its own data (bf16 has 0.0017).
const EXACT: f64 = 0.003;
/// Storage errors above this mean that something else is stored (independent data has 1.41).
const FOREIGN: f64 = 0.6;

/// `[KV heads, n, d]`, twice.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) n: usize,
    pub(crate) d: usize,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Dense {
    /// All rows of one KV head.
    pub(crate) fn head(&self, head: usize, side: Side) -> &[f32] {
        let all = match side {
            Side::Key => &self.k,
            Side::Value => &self.v,
        };
        &all[head * self.n * self.d..(head + 1) * self.n * self.d]
    }
}

/// Softmax attention of one query over the first `visible` rows.
fn attend(query: &[f32], k: &[f32], v: &[f32], visible: usize, scale: f32) -> Vec<f64> {
    let d = query.len();
    let dot = |row: &[f32]| {
        let mut lanes = [0.0_f32; 16];
        for (q, k) in query.as_chunks::<16>().0.iter().zip(row.as_chunks::<16>().0) {
            lanes.iter_mut().zip(q.iter().zip(k)).for_each(|(sum, (q, k))| *sum += q * k);
        }
        f64::from(lanes.iter().sum::<f32>() * scale)
    };
    let logits: Vec<f64> = k.chunks_exact(d).take(visible).map(dot).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut total, mut out) = (0.0, vec![0.0; d]);
    for (logit, row) in logits.iter().zip(v.chunks_exact(d)) {
        let weight = (logit - top).exp();
        total += weight;
        out.iter_mut().zip(row).for_each(|(o, v)| *o += weight * f64::from(*v));
    }
    out.iter_mut().for_each(|o| *o /= total);
    out
}

/// `‖a − b‖ / ‖b‖`.
pub(crate) fn distance(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (error, norm) = pairs.fold((0.0, 0.0), |(e, n), (a, b)| (e + (a - b) * (a - b), n + b * b));
    (error / norm).sqrt()
}

fn wide<'a>(a: &'a [f32], b: &'a [f32]) -> impl Iterator<Item = (f64, f64)> + 'a {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)))
}

/// Distance of two results.
pub(crate) fn distance_f32(a: &[f32], b: &[f32]) -> f64 {
    if a.len() == b.len() { distance(wide(a, b)) } else { f64::INFINITY }
}

/// What a contestant's result and data were found to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    /// Distance of the result from plain attention over the stored data.
    pub(crate) error: f64,
    /// Distance of the stored data from the original.
    pub(crate) storage: f64,
}

/// One output row per KV head, of different query heads and tokens, with the original data.
#[derive(Debug)]
pub(crate) struct Oracle<'a> {
    pub(crate) config: Config,
    dense: &'a Dense,
    queries: &'a [f32],
    rows: Vec<Vec<f64>>,
}

impl<'a> Oracle<'a> {
    pub(crate) fn new(config: Config, dense: &'a Dense, queries: &'a [f32]) -> Self {
        let mut oracle = Self { config, dense, queries, rows: Vec::new() };
        oracle.rows = (0..KV_HEADS)
            .map(|head| oracle.row(head, dense.head(head, Side::Key), dense.head(head, Side::Value)))
            .collect();
        oracle
    }

    /// Which row of `[query heads, tokens]` is looked at for a KV head.
    fn sample(&self, head: usize) -> (usize, usize) {
        let Config { group, .. } = self.config;
        (head * group + head % group, head * (self.config.tokens() - 1) / (KV_HEADS - 1))
    }

    fn row(&self, head: usize, k: &[f32], v: &[f32]) -> Vec<f64> {
        let (query_head, token) = self.sample(head);
        let at = (query_head * self.config.tokens() + token) * self.config.d;
        let query = &self.queries[at..at + self.config.d];
        attend(query, k, v, self.config.visible(token), self.config.scale())
    }

    /// Compares the last run of `contestant`.
    pub(crate) fn check(&self, contestant: &dyn Contestant) -> Result<Option<Checked>> {
        let Some(result) = contestant.result()? else { return Ok(None) };
        let Config { n, d, .. } = self.config;
        let mut storage = 0.0;
        for side in [Side::Key, Side::Value] {
            let first = contestant.held(0, side, n.min(4096)).ok_or("holds no data")?;
            storage = distance(wide(&first, self.dense.head(0, side))).max(storage);
        }
        if storage.is_nan() || storage > FOREIGN {
            return Err(format!("its data are not the data ({storage:.2} of the norm apart)").into());
        }
        let mut pairs = Vec::with_capacity(KV_HEADS * d);
        for head in 0..KV_HEADS {
            let own;
            let row = if storage <= EXACT {
                &self.rows[head]
            } else {
                let held = |side| contestant.held(head, side, n).ok_or("holds no data");
                own = self.row(head, &held(Side::Key)?, &held(Side::Value)?);
                &own
            };
            let (query_head, token) = self.sample(head);
            let at = (query_head * self.config.tokens() + token) * d;
            pairs.extend(result[at..at + d].iter().map(|x| f64::from(*x)).zip(row.iter().copied()));
        }
        Ok(Some(Checked { error: distance(pairs.into_iter()), storage }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_of_equal_keys_is_the_mean_of_what_is_seen() {
        let (k, v) = (vec![0.5; 4 * 32], (0..4 * 32).map(|i| (i / 32) as f32).collect::<Vec<_>>());
        let out = attend(&[1.0; 32], &k, &v, 3, 0.1);
        assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-12), "{out:?}");
    }

    #[test]
    fn distance_is_relative() {
        assert!((distance_f32(&[1.0, 2.2], &[1.0, 2.0]) - 0.2 / 5.0_f64.sqrt()).abs() < 1e-6);
        assert!(distance_f32(&[1.0], &[1.0, 2.0]).is_infinite());
    }
}
