//! The codewords of one KV head: what codes are made by, and what they are worth to a query.

use super::aware::Metric;
use crate::backend::Backend;
use crate::error::KernelError;
use crate::index::clusters::products;
use crate::kernel::code_scores::CodeLayout;
use std::ops::Range;

/// Multiplications that it takes to find an entry's codeword from which on a kernel sees to many entries at once.
const KERNEL_MIN: usize = 1 << 12;

/// How far a kernel's product may be from one made here, in shares of the lengths.
const ROUNDING: f32 = 1e-5;

/// The codewords of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    layout: CodeLayout,
    levels: usize,
    /// Mean key, which codewords are relative to.
    center: Vec<f32>,
    /// Of each piece in turn, `[levels, dims of the piece]`.
    words: Vec<f32>,
    /// `[pieces, levels]`: half the squared length of a codeword, by the metric.
    halves: Vec<f32>,
    /// Of each piece, where queries were known: what errors in it do to logits.
    metrics: Vec<Option<Metric>>,
    /// Where queries are put, if keys are taken back to position 0.
    distance: Option<i32>,
    /// Whether it is of what keys have beside the means of their units.
    within: bool,
    /// Whether it was given and not learnt.
    given: bool,
}

/// `a·b`: pieces of few dimensions are no work for vectors; others go in lanes that a compiler turns into them.
pub(super) fn product(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    if a.len() == 0 {
        return rest;
    }
    for (a, b) in a.zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(l, (a, b))| *l += a * b);
    }
    lanes.iter().sum::<f32>() + rest
}

impl Codebook {
    /// A codebook without words, about `center`, for queries at `distance`.
    pub(super) fn new(
        layout: CodeLayout,
        levels: usize,
        center: Vec<f32>,
        distance: Option<i32>,
        within: bool,
    ) -> Self {
        let words = Vec::with_capacity(levels * center.len());
        let halves = Vec::with_capacity(layout.codes * levels);
        let metrics = Vec::with_capacity(layout.codes);
        Self { layout, levels, center, words, halves, metrics, distance, within, given: false }
    }

    /// The next piece: `[levels, dims]`, relative to the center.
    pub(super) fn push(&mut self, words: &[f32], metric: Option<Metric>) {
        let dims = self.piece(self.metrics.len()).len();
        let mut turned = vec![0.0; dims];
        self.halves.extend((0..self.levels).map(|c| {
            let word = &words[c * dims..(c + 1) * dims];
            match &metric {
                Some(metric) => metric.turn(word, &mut turned),
                None => turned.copy_from_slice(word),
            }
            0.5 * product(&turned, word)
        }));
        self.words.extend_from_slice(words);
        self.metrics.push(metric);
    }

    /// How codes lie.
    pub fn layout(&self) -> CodeLayout {
        self.layout
    }

    /// Codewords of a piece.
    pub fn levels(&self) -> usize {
        self.levels
    }

    /// Whether it was learnt from queries too.
    pub fn aware(&self) -> bool {
        self.metrics.iter().any(Option::is_some)
    }

    /// Dimensions of a key.
    pub fn dims(&self) -> usize {
        self.center.len()
    }

    /// Mean key, which codewords are relative to.
    pub(super) fn center(&self) -> &[f32] {
        &self.center
    }

    /// Of each piece in turn, `[levels, dims of the piece]`.
    pub(super) fn words(&self) -> &[f32] {
        &self.words
    }

    /// Of a piece, where queries were known: what errors in it do to logits.
    pub(super) fn metric(&self, m: usize) -> Option<&Metric> {
        self.metrics[m].as_ref()
    }

    /// The distance that queries are put at, if keys are taken back to position 0.
    pub fn distance(&self) -> Option<i32> {
        self.distance
    }

    /// Whether it is of what keys have beside the means of their units, not of keys.
    pub fn within(&self) -> bool {
        self.within
    }

    /// The same, for sequences that are given it and learn none.
    #[must_use]
    pub fn given(self) -> Self {
        Self { given: true, ..self }
    }

    /// Whether it outlives the entries it was learnt from: it was given, or position 0 is where keys are whatever becomes
    /// of the others.
    pub fn lasts(&self) -> bool {
        self.given || self.distance.is_some()
    }

    /// Bytes of the codewords, and of what they are compared by.
    pub fn bytes(&self) -> usize {
        let numbers = self.center.capacity() + self.words.capacity() + self.halves.capacity();
        numbers * size_of::<f32>() + self.metrics.iter().flatten().map(Metric::bytes).sum::<usize>()
    }

    /// Dimensions of a piece: as equal as they divide.
    pub(super) fn piece(&self, m: usize) -> Range<usize> {
        let d = self.center.len();
        m * d / self.layout.codes..(m + 1) * d / self.layout.codes
    }

    /// `[levels, dims]` of a piece.
    fn codewords(&self, m: usize) -> &[f32] {
        let dims = self.piece(m);
        &self.words[self.levels * dims.start..self.levels * dims.end]
    }

    /// What every codeword adds to the logit of a query: `[pieces, n]`, of which the first [`Codebook::levels`] of each
    /// piece are used.
    pub fn table(&self, query: &[f32], scale: f32, out: &mut [f32]) {
        let stride = out.len() / self.layout.codes;
        for (m, out) in out.chunks_exact_mut(stride.max(1)).enumerate() {
            let dims = self.piece(m);
            let query = &query[dims.clone()];
            let center: f32 = query.iter().zip(&self.center[dims.clone()]).map(|(q, c)| q * c).sum();
            out.fill(scale * center);
            if dims.is_empty() {
                continue;
            }
            for (out, word) in out.iter_mut().zip(self.codewords(m).chunks_exact(dims.len())) {
                *out += scale * product(query, word);
            }
        }
    }

    /// What a piece of keys `[n, d]` is compared with codewords by: relative to the center, and turned by the metric, which
    /// makes `x·w − half` the larger the nearer a codeword is.
    pub(super) fn compared(&self, m: usize, keys: &[f32], out: &mut Vec<f32>) {
        let (dims, metric) = (self.piece(m), self.metrics.get(m).and_then(Option::as_ref));
        let mut row = vec![0.0; dims.len()];
        out.clear();
        for key in keys.chunks_exact(self.center.len()) {
            let key = key[dims.clone()].iter().zip(&self.center[dims.clone()]);
            row.iter_mut().zip(key).for_each(|(r, (k, c))| *r = k - c);
            let start = out.len();
            out.extend_from_slice(&row);
            if let Some(metric) = metric {
                metric.turn(&row, &mut out[start..]);
            }
        }
    }

    /// The nearest codewords of every key of `[n, d]`: `[pieces, n]`. However many keys come at once, each has the same.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn encode(&self, backend: &dyn Backend, keys: &[f32]) -> Result<Vec<u16>, KernelError> {
        let count = keys.len() / self.center.len();
        let mut codes = vec![0; self.layout.codes * count];
        let mut rows = Vec::new();
        for (m, codes) in codes.chunks_exact_mut(count.max(1)).enumerate() {
            let dims = self.piece(m).len();
            if dims == 0 {
                continue;
            }
            self.compared(m, keys, &mut rows);
            let (words, halves) = (self.codewords(m), &self.halves[m * self.levels..(m + 1) * self.levels]);
            let worth = |row: &[f32], c: usize| product(row, &words[c * dims..(c + 1) * dims]) - halves[c];
            let best = |row: &[f32], among: &mut dyn Iterator<Item = usize>| {
                let worths = among.map(|c| (c, worth(row, c)));
                worths.fold((0, f32::NEG_INFINITY), |best, new| if new.1 > best.1 { new } else { best }).0
                    as u16
            };
            if count < 8 || self.levels * dims < KERNEL_MIN {
                let each = codes.iter_mut().zip(rows.chunks_exact(dims));
                each.for_each(|(code, row)| *code = best(row, &mut (0..self.levels)));
                continue;
            }
            // A kernel says which are near enough to be the nearest, and its rounding decides nothing.
            let length = |x: &[f32]| product(x, x).sqrt();
            let longest = words.chunks_exact(dims).map(length).fold(0.0, f32::max);
            let largest = halves.iter().copied().fold(0.0, f32::max);
            let bias: Vec<f32> = halves.iter().map(|half| -half).collect();
            let mut each = codes.iter_mut().zip(rows.chunks_exact(dims));
            products(backend, (words, dims), &bias, &rows, |scores| {
                let Some((code, row)) = each.next() else { return };
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let least = most - ROUNDING * (length(row) * longest + largest);
                let near = scores.iter().enumerate().filter(|(_, score)| **score >= least);
                *code = best(row, &mut near.map(|(c, _)| c));
            })?;
        }
        Ok(codes)
    }

    /// The key that a code stands for.
    pub fn decode(&self, words: &[u32], out: &mut [f32]) {
        out.copy_from_slice(&self.center);
        for m in 0..self.layout.codes {
            let dims = self.piece(m);
            let at = (self.layout.code(words, m) as usize).min(self.levels - 1) * dims.len();
            let word = &self.codewords(m)[at..at + dims.len()];
            out[dims].iter_mut().zip(word).for_each(|(o, w)| *o += w);
        }
    }
}
