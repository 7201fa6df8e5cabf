//! Entries by their product-quantisation codes: every entry is a unit, described by a few indices into codebooks.
//!
//! A key is cut into pieces, and every piece replaced by the index of the nearest of a few codewords. Codebooks are learnt
//! from the first entries that are indexed, per KV head, and stay as they are; so an entry has the same code whenever it
//! comes. A query is multiplied with all codewords once, and an entry's logit is a sum of numbers looked up there
//! ([`crate::kernel::code_scores`]).
//!
//! *Helps* texts whose neighbours have little in common: single entries are found. *Hurts* by a number to rank for every
//! entry, where pages and clusters have one for sixteen; and by what a text drifts away from what was learnt.

use super::clusters::{Points, cluster};
use super::units::mean;
use super::{Entries, Role, Summary, Table, UnitRows, Units};
use crate::backend::Backend;
use crate::error::KernelError;
use crate::geometry::LayerShape;
use crate::kernel::code_scores::CodeLayout;
use crate::view::DType;
use std::ops::Range;

/// Entries encoded by one call, at most: bounds the memory of building an index over a long prompt.
const BATCH: usize = 4096;

/// Fewest entries that codebooks are learnt from, per codeword.
const PER_CODEWORD: usize = 4;

/// How entries are encoded.
#[derive(Clone, Debug)]
pub struct Codes {
    layout: CodeLayout,
    /// Codewords of a piece.
    levels: usize,
    /// Entries that codebooks are learnt from, at most.
    train: usize,
    rounds: usize,
    tables: [Table; 1],
}

impl Codes {
    /// Codes of `pieces` indices, of as few bits as `levels` codewords fit in.
    pub fn new(pieces: usize, levels: usize, train: usize, rounds: usize) -> Self {
        let bits = [4, 8, 16].into_iter().find(|&bits| levels <= 1 << bits).unwrap_or(16);
        let layout = CodeLayout { codes: pieces, bits };
        let tables = [Table { role: Role::Code(layout), encoding: DType::F32.into() }];
        Self { layout, levels, train, rounds, tables }
    }

    /// How codes lie.
    pub fn layout(&self) -> CodeLayout {
        self.layout
    }
}

/// The codewords of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    layout: CodeLayout,
    levels: usize,
    /// Mean key, which codewords are relative to.
    center: Vec<f32>,
    /// Of each piece in turn, `[levels, dims of the piece]`.
    words: Vec<f32>,
}

impl Codebook {
    /// How codes lie.
    pub fn layout(&self) -> CodeLayout {
        self.layout
    }

    /// Codewords of a piece.
    pub fn levels(&self) -> usize {
        self.levels
    }

    /// Bytes of the codewords.
    pub fn bytes(&self) -> usize {
        (self.center.capacity() + self.words.capacity()) * size_of::<f32>()
    }

    /// Dimensions of a piece: as equal as they divide.
    fn piece(&self, m: usize) -> Range<usize> {
        let d = self.center.len();
        m * d / self.layout.codes..(m + 1) * d / self.layout.codes
    }

    /// `[levels, dims]` of a piece.
    fn codewords(&self, m: usize) -> &[f32] {
        let dims = self.piece(m);
        &self.words[self.levels * dims.start..self.levels * dims.end]
    }

    /// What every codeword adds to the logit of a query: `[pieces, levels]`.
    pub fn table(&self, query: &[f32], scale: f32, out: &mut [f32]) {
        for (m, out) in out.chunks_exact_mut(self.levels).enumerate() {
            let dims = self.piece(m);
            let query = &query[dims.clone()];
            let center: f32 = query.iter().zip(&self.center[dims.clone()]).map(|(q, c)| q * c).sum();
            out.fill(scale * center);
            if dims.is_empty() {
                continue;
            }
            for (out, word) in out.iter_mut().zip(self.codewords(m).chunks_exact(dims.len())) {
                *out += scale * query.iter().zip(word).map(|(q, w)| q * w).sum::<f32>();
            }
        }
    }

    /// The nearest codeword of every piece.
    fn encode(&self, key: &[f32], codes: &mut [u16]) {
        for (m, code) in codes.iter_mut().enumerate() {
            let dims = self.piece(m);
            if dims.is_empty() {
                *code = 0;
                continue;
            }
            let (key, center) = (&key[dims.clone()], &self.center[dims.clone()]);
            let far = |word: &[f32]| -> f32 {
                word.iter().zip(key.iter().zip(center)).map(|(w, (k, c))| (k - c - w).powi(2)).sum()
            };
            let words = self.codewords(m).chunks_exact(dims.len()).map(far).enumerate();
            let nearest = words.fold((0, f32::INFINITY), |best, new| if new.1 < best.1 { new } else { best });
            *code = nearest.0 as u16;
        }
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

impl Summary for Codes {
    fn tables(&self) -> &[Table] {
        &self.tables
    }

    fn take(&self, pending: usize, open: bool, units: usize) -> usize {
        let least = (PER_CODEWORD * self.levels).min(self.train);
        match units {
            0 if pending >= self.train => self.train,
            0 if open || pending < least => 0,
            0 => pending,
            _ => pending.min(BATCH),
        }
    }

    fn unit(&self) -> Option<usize> {
        Some(1)
    }

    fn waiting(&self) -> usize {
        0
    }

    fn learn(
        &self,
        backend: &dyn Backend,
        shape: &LayerShape,
        entries: &Entries<'_>,
    ) -> Result<Option<Codebook>, KernelError> {
        let d = shape.d_k;
        let mut center = vec![0.0; d];
        mean(entries.keys, &mut center);
        // Of fewer entries than codewords some are codewords twice.
        let levels = self.levels;
        let mut book =
            Codebook { layout: self.layout, levels, center, words: Vec::with_capacity(levels * d) };
        for m in 0..self.layout.codes {
            let dims = book.piece(m);
            if dims.is_empty() {
                continue;
            }
            let mut rows = Vec::with_capacity(entries.count * dims.len());
            for key in entries.keys.chunks_exact(d) {
                rows.extend(key[dims.clone()].iter().zip(&book.center[dims.clone()]).map(|(k, c)| k - c));
            }
            let points = Points { rows, dim: dims.len() };
            let (_, means) = cluster(backend, &points, levels, self.rounds, false)?;
            book.words.extend_from_slice(&means.rows);
        }
        Ok(Some(book))
    }

    fn summarise(
        &self,
        _: &dyn Backend,
        shape: &LayerShape,
        entries: &Entries<'_>,
        book: Option<&Codebook>,
    ) -> Result<Units, KernelError> {
        let Some(book) = book else { unreachable!("codebooks are learnt before entries are encoded") };
        let mut codes = vec![0; self.layout.codes];
        let mut words = vec![0; self.layout.words()];
        let mut rows = UnitRows::default();
        for key in entries.keys.chunks_exact(shape.d_k) {
            book.encode(key, &mut codes);
            self.layout.pack(&codes, &mut words);
            rows.keys.extend(words.iter().map(|&word| f32::from_bits(word)));
        }
        Ok(Units { counts: vec![1; entries.count], rows: vec![rows], ..Units::default() })
    }
}
