//! What the queries of a repetition look at, in one layer.
//!
//! Of a sample of `N` tokens, read twice, row `i` of the second reading belongs to token `i` of the first; its logits are over
//! everything before it.

use super::convolve::Reading;
use candle_core::{Device, Tensor};
use kvsieve::geometry::LayerShape;
use kvsieve_candle::Result;
use rayon::prelude::*;

/// Where a sample lies in what is fed: `tokens` from `first` on, and once more behind these.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) first: usize,
    pub(super) tokens: usize,
}

/// First entries and last ones that a streaming head holds, as in the paper on DuoAttention.
const SINKS: usize = 64;
const RECENT: usize = 256;

/// Shorter samples would lie within what a streaming head holds.
pub(super) const LEAST_TOKENS: usize = SINKS + RECENT + 64;

/// Tokens taken together as the passage that one of them is repeated from: a head that reads the passage serves as well as one
/// that reads the token.
const PASSAGE: usize = 32;

/// Of the entries that a layer keeps when its error is measured, as in the paper on CompressKV; the last of them are recent.
const KEPT: usize = 32;
const WINDOW: usize = 8;

/// Every so many rows are used for the error of a layer.
const ERROR_STRIDE: usize = 8;

/// Query heads whose attention chooses what a layer keeps when its error is measured.
const CHOOSING: usize = 4;

/// Sums over the samples, of one layer.
#[derive(Clone, Debug)]
pub(super) struct LayerSums {
    /// Per KV head, mass on what a streaming head would not hold.
    gates: Vec<f64>,
    /// Per query head, mass on the passage.
    heads: Vec<f64>,
    /// Relative errors of the output.
    error: f64,
    samples: f64,
}

impl LayerSums {
    pub(super) fn new(shape: &LayerShape) -> Self {
        let (gates, heads) = (vec![0.0; shape.kv_heads], vec![0.0; shape.query_heads]);
        Self { gates, heads, error: 0.0, samples: 0.0 }
    }

    pub(super) fn gates(&self) -> Vec<f32> {
        self.gates.iter().map(|sum| (sum / self.samples) as f32).collect()
    }

    pub(super) fn heads(&self) -> Vec<f32> {
        self.heads.iter().map(|sum| (sum / self.samples) as f32).collect()
    }

    pub(super) fn error(&self) -> f32 {
        (self.error / self.samples) as f32
    }
}

/// Queries, keys and values of one layer, all tokens fed, in f32 and rotated.
pub(super) struct Layer<'a> {
    shape: &'a LayerShape,
    /// `[Hq, tokens, d_k]`.
    q: Vec<f32>,
    /// `[H, tokens, d_k]`.
    k: Vec<f32>,
    /// `[H, tokens, d_v]`.
    v: Vec<f32>,
    tokens: usize,
}

/// What one query head's rows of the second reading come to.
struct HeadSums {
    /// Per token of the first reading, the highest weight and the highest logit.
    scores: Vec<f32>,
    logits: Vec<f32>,
    passage: f64,
    outside: f64,
}

impl<'a> Layer<'a> {
    pub(super) fn new(shape: &'a LayerShape, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        let tokens = q.dim(0)?;
        let heads = |x: &Tensor| -> Result<Vec<f32>> {
            Ok(x.transpose(0, 1)?.contiguous()?.flatten_all()?.to_vec1()?)
        };
        Ok(Self { shape, q: heads(q)?, k: heads(k)?, v: heads(v)?, tokens })
    }

    /// Adds to the sums; the highest weight and the highest logit of every token of the first reading, `[tokens, H]` each.
    pub(super) fn measure(
        &self,
        sample: Sample,
        sums: &mut LayerSums,
        project: impl Fn(Vec<f32>, usize) -> Result<Vec<f32>>,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let (hq, h, n) = (self.shape.query_heads, self.shape.kv_heads, sample.tokens);
        let mut scores = vec![0f32; n * h];
        let mut logits = vec![f32::NEG_INFINITY; n * h];
        let mut outside = vec![0f64; h];
        let mut passages = Vec::with_capacity(hq);
        for head in 0..hq {
            let of = self.head(head, sample)?;
            let kv = head / self.shape.group();
            for token in 0..n {
                let at = token * h + kv;
                scores[at] = scores[at].max(of.scores[token]);
                logits[at] = logits[at].max(of.logits[token]);
            }
            outside[kv] = outside[kv].max(of.outside);
            passages.push(of.passage);
        }
        sums.gates.iter_mut().zip(&outside).for_each(|(sum, outside)| *sum += outside);
        sums.heads.iter_mut().zip(&passages).for_each(|(sum, passage)| *sum += passage);
        sums.error += self.error(sample, &passages, project)?;
        sums.samples += 1.0;
        Ok((scores, logits))
    }

    /// Logits of rows `from ..` of a query head on the first `seen` tokens, `[rows, seen]`.
    fn logits(&self, head: usize, rows: std::ops::Range<usize>, seen: usize) -> Result<Vec<f32>> {
        let d = self.shape.d_k;
        let kv = head / self.shape.group();
        let q = &self.q[(head * self.tokens + rows.start) * d..(head * self.tokens + rows.end) * d];
        let k = &self.k[kv * self.tokens * d..(kv * self.tokens + seen) * d];
        let q = Tensor::from_slice(q, (rows.len(), d), &Device::Cpu)?;
        let k = Tensor::from_slice(k, (seen, d), &Device::Cpu)?;
        Ok((q.matmul(&k.t()?)? * f64::from(self.shape.scale))?.flatten_all()?.to_vec1()?)
    }

    fn head(&self, head: usize, sample: Sample) -> Result<HeadSums> {
        let (first, n) = (sample.first, sample.tokens);
        let again = first + n;
        let logits = self.logits(head, again..again + n, again + n)?;
        let width = again + n;
        let parts: Vec<HeadSums> = logits
            .par_chunks(width * 128)
            .enumerate()
            .map(|(block, rows)| {
                let mut sums = HeadSums {
                    scores: vec![0.0; n],
                    logits: vec![f32::NEG_INFINITY; n],
                    passage: 0.0,
                    outside: 0.0,
                };
                let mut weights = vec![0f32; width];
                for (offset, row) in rows.chunks_exact(width).enumerate() {
                    let i = block * 128 + offset;
                    let seen = again + i + 1;
                    softmax(&row[..seen], &mut weights[..seen]);
                    for token in 0..n {
                        sums.scores[token] = sums.scores[token].max(weights[first + token]);
                        sums.logits[token] = sums.logits[token].max(row[first + token]);
                    }
                    let passage = first + i / PASSAGE * PASSAGE;
                    let mass = |range: std::ops::Range<usize>| {
                        weights[range].iter().map(|w| f64::from(*w)).sum::<f64>()
                    };
                    sums.passage += mass(passage..(passage + PASSAGE).min(first + n));
                    sums.outside += mass(SINKS..seen.saturating_sub(RECENT).max(SINKS));
                }
                sums
            })
            .collect();
        let mut whole =
            HeadSums { scores: vec![0.0; n], logits: vec![f32::NEG_INFINITY; n], passage: 0.0, outside: 0.0 };
        for part in &parts {
            for token in 0..n {
                whole.scores[token] = whole.scores[token].max(part.scores[token]);
                whole.logits[token] = whole.logits[token].max(part.logits[token]);
            }
            whole.passage += part.passage / n as f64;
            whole.outside += part.outside / n as f64;
        }
        Ok(whole)
    }

    /// `‖W_O (out over what is kept − out)‖ / ‖W_O out‖` of some rows of the second reading.
    fn error(
        &self,
        sample: Sample,
        passages: &[f64],
        project: impl Fn(Vec<f32>, usize) -> Result<Vec<f32>>,
    ) -> Result<f64> {
        let (again, end) = (sample.first + sample.tokens, sample.first + 2 * sample.tokens);
        let kept = self.kept(sample, passages)?;
        let (hq, d_v) = (self.shape.query_heads, self.shape.d_v);
        let rows: Vec<usize> = (again..end).step_by(ERROR_STRIDE).collect();
        let mut full = vec![0f32; rows.len() * hq * d_v];
        let mut less = full.clone();
        for head in 0..hq {
            let kv = head / self.shape.group();
            let values = &self.v[kv * self.tokens * d_v..(kv + 1) * self.tokens * d_v];
            let outputs: Vec<_> = rows
                .par_iter()
                .map(|&row| {
                    let logits = self.row_logits(head, row);
                    let mut weights = vec![0f32; row + 1];
                    softmax(&logits, &mut weights);
                    let all = sum_of(&weights, values, d_v);
                    // Of the first reading only what is kept, of the second all.
                    (0..again).filter(|token| !kept[*token]).for_each(|token| weights[token] = 0.0);
                    (all, sum_of(&weights, values, d_v))
                })
                .collect();
            for (index, (all, some)) in outputs.iter().enumerate() {
                let at = (index * hq + head) * d_v;
                full[at..at + d_v].copy_from_slice(all);
                less[at..at + d_v].copy_from_slice(some);
            }
        }
        less.iter_mut().zip(&full).for_each(|(less, full)| *less -= full);
        let norm = |rows: Vec<f32>| Ok::<_, kvsieve_candle::Error>(norm(&project(rows, hq * d_v)?));
        Ok(norm(less)? / (norm(full)? + 1e-5))
    }

    fn row_logits(&self, head: usize, row: usize) -> Vec<f32> {
        let d = self.shape.d_k;
        let query = &self.q[(head * self.tokens + row) * d..][..d];
        let keys = &self.k[head / self.shape.group() * self.tokens * d..][..(row + 1) * d];
        let dot = |key: &[f32]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * self.shape.scale;
        keys.chunks_exact(d).map(dot).collect()
    }

    /// Which tokens of the first reading a layer keeps: the last, and those to which the heads that find passages best pay most.
    fn kept(&self, sample: Sample, passages: &[f64]) -> Result<Vec<bool>> {
        let end = sample.first + sample.tokens;
        let mut heads: Vec<usize> = (0..passages.len()).collect();
        heads.sort_by(|a, b| passages[*b].total_cmp(&passages[*a]));
        let candidates = end - WINDOW;
        let mut scores = vec![0f32; candidates];
        for &head in heads.iter().take(CHOOSING) {
            for row in candidates..end {
                let logits = self.row_logits(head, row);
                let mut weights = vec![0f32; row + 1];
                softmax(&logits, &mut weights);
                scores.iter_mut().zip(&weights).for_each(|(score, weight)| *score += weight);
            }
        }
        let mut order: Vec<usize> = (0..candidates).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let mut kept = vec![false; end];
        order.iter().take(KEPT - WINDOW).for_each(|token| kept[*token] = true);
        kept[candidates..].fill(true);
        Ok(kept)
    }

    /// Everything up to the end of the first reading, as it came.
    pub(super) fn reading(&self, sample: Sample) -> Reading {
        let tokens = sample.first + sample.tokens;
        let of = |rows: &[f32], dim: usize| {
            let heads = rows.chunks_exact(self.tokens * dim);
            heads.flat_map(|head| &head[..tokens * dim]).copied().collect()
        };
        let (d_k, d_v) = (self.shape.d_k, self.shape.d_v);
        Reading { q: of(&self.q, d_k), k: of(&self.k, d_k), v: of(&self.v, d_v), tokens }
    }

    /// Queries and keys of the first reading before rotation, and values: the rows that the library gives a policy.
    pub(super) fn rows_before_rotation(&self, sample: Sample, out: &mut Vec<f32>) {
        let (d_k, d_v) = (self.shape.d_k, self.shape.d_v);
        let angles = self.shape.rotary.as_ref().map(|rotary| {
            let tokens = sample.first..sample.first + sample.tokens;
            (rotary, rotary.table(tokens.map(|token| -(token as i32))))
        });
        for index in 0..sample.tokens {
            let token = sample.first + index;
            for rows in [&self.q, &self.k] {
                for head in rows.chunks_exact(self.tokens * d_k) {
                    let start = out.len();
                    out.extend_from_slice(&head[token * d_k..(token + 1) * d_k]);
                    if let Some((rotary, table)) = &angles {
                        let table = &table[index * rotary.dims..(index + 1) * rotary.dims];
                        turn(rotary.layout, &mut out[start..start + rotary.dims], table);
                    }
                }
            }
            for head in self.v.chunks_exact(self.tokens * d_v) {
                out.extend_from_slice(&head[token * d_v..(token + 1) * d_v]);
            }
        }
    }
}

/// Turns one head's rotated dimensions by cosines and sines.
fn turn(layout: kvsieve::geometry::RotaryLayout, row: &mut [f32], table: &[f32]) {
    let pairs = row.len() / 2;
    for (pair, angle) in table.chunks_exact(2).enumerate() {
        let (a, b) = match layout {
            kvsieve::geometry::RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            kvsieve::geometry::RotaryLayout::HalfSplit => (pair, pair + pairs),
        };
        (row[a], row[b]) = (row[a] * angle[0] - row[b] * angle[1], row[a] * angle[1] + row[b] * angle[0]);
    }
}

pub(super) fn softmax(logits: &[f32], out: &mut [f32]) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (out, logit) in out.iter_mut().zip(logits) {
        *out = (logit - top).exp();
        sum += *out;
    }
    out.iter_mut().for_each(|out| *out /= sum);
}

/// The mean of values by weights, which need not sum to 1.
fn sum_of(weights: &[f32], values: &[f32], dim: usize) -> Vec<f32> {
    let mut sum = vec![0f32; dim];
    let total: f32 = weights.iter().sum();
    for (weight, value) in weights.iter().zip(values.chunks_exact(dim)).filter(|(weight, _)| **weight > 0.0) {
        sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight / total * value);
    }
    sum
}

fn norm(rows: &[f32]) -> f64 {
    rows.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}
