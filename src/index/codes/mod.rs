//! Entries by their codes: every entry is a unit, described by a few indices into codebooks.
//!
//! A key is cut into pieces (or taken whole), and every piece replaced by the index of the nearest of a few codewords.
//! Codebooks are learnt from the first entries that are indexed, per KV head, and stay as they are; so an entry has the same
//! code whenever it comes. What is near may be what looks alike to recorded queries, and keys may be taken as they
//! were before their rotary embedding ([`windowed`]). A query is multiplied with all codewords once, and an entry's logit is a
//! sum of numbers looked up there ([`crate::kernel::code_scores`]).
//!
//! *Helps* texts whose neighbours have little in common: single entries are found. *Hurts* by a number to rank for every
//! entry, where pages and clusters have one for sixteen; and by what a text drifts away from what was learnt.

mod aware;
mod book;
mod part;
mod shelf;
pub mod windowed;

pub use book::Codebook;
pub use shelf::Codebooks;

use super::clusters::{Points, cluster};
use super::units::mean;
use super::{Entries, Lesson, Role, Summary, Table, UnitRows, Units};
use crate::backend::Backend;
use crate::error::{KernelError, RecipeError};
use crate::geometry::{KeyPhase, LayerShape, ModelShape};
use crate::kernel::code_scores::CodeLayout;
use crate::view::DType;
use aware::{Factor, Metric};

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
    /// Fewer where this many entries for each would be more than there are; 0 for as many as that always.
    per: usize,
    /// Entries that codebooks are learnt from, at least and at most.
    train: (usize, usize),
    rounds: usize,
    /// Last queries to learn from.
    queries: usize,
    /// Where queries are put, if keys are encoded without their rotary embedding.
    distance: Option<i32>,
    tables: [Table; 1],
}

impl Codes {
    /// Codes of `pieces` indices, of as few bits as `levels` codewords fit in, learnt from `train` entries at most.
    pub fn new(pieces: usize, levels: usize, train: usize, rounds: usize) -> Self {
        let bits = [4, 8, 16].into_iter().find(|&bits| levels <= 1 << bits).unwrap_or(16);
        let layout = CodeLayout { codes: pieces, bits };
        let tables = [Table { role: Role::Code(layout), encoding: DType::F32.into() }];
        let train = ((PER_CODEWORD * levels).min(train), train);
        Self { layout, levels, per: 0, train, rounds, queries: 0, distance: None, tables }
    }

    /// How codes lie.
    pub fn layout(&self) -> CodeLayout {
        self.layout
    }

    /// The same, of as few as `least` entries, with fewer codewords where there are not `per` entries for each.
    #[must_use]
    pub fn with_fewer(mut self, per: usize, least: usize) -> Self {
        self.per = per;
        self.train.0 = least.min(self.train.1);
        self
    }

    /// The same, learnt from the last `queries` queries of the prompt too.
    #[must_use]
    pub fn aware(self, queries: usize) -> Self {
        Self { queries, ..self }
    }

    /// The same of what keys have beside the means of their units.
    #[must_use]
    pub fn within(mut self) -> Self {
        self.tables[0].role = Role::Residual(self.layout);
        self
    }

    /// The same of keys without their rotary embedding, for queries at a constant distance.
    #[must_use]
    pub fn windowed(self, distance: i32) -> Self {
        Self { distance: Some(distance), ..self }
    }

    /// Keys as they are encoded.
    fn keys(
        &self,
        backend: &dyn Backend,
        shape: &LayerShape,
        entries: &Entries<'_>,
    ) -> Result<Vec<f32>, KernelError> {
        let mut keys = entries.keys.to_vec();
        if self.distance.is_some() {
            windowed::place(backend, shape, 0, entries.positions, &mut keys)?;
        }
        Ok(keys)
    }

    /// What errors in a piece do to the logits of recorded queries, if there are enough of them to say so in every
    /// direction.
    fn metric(&self, queries: &[f32], book: &Codebook, d: usize, m: usize) -> Option<(Metric, Factor)> {
        let enough = self.queries > 0 && queries.len() >= d * d;
        if enough { Metric::of(queries, d, book.piece(m)) } else { None }
    }
}

impl Summary for Codes {
    fn tables(&self) -> &[Table] {
        &self.tables
    }

    fn take(&self, pending: usize, open: bool, learnt: bool) -> usize {
        let (least, most) = self.train;
        match learnt {
            true => pending.min(BATCH),
            false if open && pending < most => 0,
            false if pending < least => 0,
            false => pending.min(most),
        }
    }

    fn unit(&self) -> Option<usize> {
        Some(1)
    }

    fn waiting(&self) -> usize {
        0
    }

    fn check(&self, shape: &ModelShape, dense: usize) -> Result<(), RecipeError> {
        let unknown = |layer: &LayerShape| layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope;
        let indexed = |layer: &LayerShape| layer.shared_with.is_none() && layer.window.is_none();
        let mut layers = shape.iter().enumerate().skip(dense);
        match layers.find(|(_, layer)| self.distance.is_some() && indexed(layer) && unknown(layer)) {
            None => Ok(()),
            Some((layer, _)) => Err(RecipeError::Conflict {
                what: "rotary=windowed".to_owned(),
                with: format!("layer {layer} without a rotary description"),
                why: "its keys cannot be taken back to position 0".to_owned(),
                change: "set LayerShape::rotary, or use rotary=true".to_owned(),
            }),
        }
    }

    fn queries(&self) -> usize {
        self.queries
    }

    fn distance(&self) -> Option<i32> {
        self.distance
    }

    fn summarise(&self, lesson: &Lesson<'_>, book: Option<&Codebook>) -> Result<Units, KernelError> {
        let Lesson { backend, shape, entries, .. } = *lesson;
        let learnt = if book.is_none() { Some(self.learn(lesson)?) } else { None };
        let Some(book) = book.or(learnt.as_ref()) else { unreachable!("one of both is there") };
        let count = entries.count;
        let mut rows = UnitRows::default();
        let keys = self.keys(backend, shape, entries)?;
        let found = book.encode(backend, &keys)?;
        let mut codes = vec![0; self.layout.codes];
        let mut words = vec![0; self.layout.words()];
        for i in 0..count {
            codes.iter_mut().zip(found.chunks_exact(count)).for_each(|(code, found)| *code = found[i]);
            self.layout.pack(&codes, &mut words);
            rows.keys.extend(words.iter().map(|&word| f32::from_bits(word)));
        }
        Ok(Units { counts: vec![1; count], rows: vec![rows], book: learnt, ..Units::default() })
    }
}

impl Codes {
    /// A codebook from some entries and, where they say enough, recorded queries.
    fn learn(&self, lesson: &Lesson<'_>) -> Result<Codebook, KernelError> {
        let Lesson { backend, shape, entries, .. } = *lesson;
        let d = shape.d_k;
        let keys = self.keys(backend, shape, entries)?;
        let mut queries = lesson.queries.to_vec();
        if let Some(distance) = self.distance {
            windowed::place(backend, shape, distance, lesson.asked, &mut queries)?;
        }
        let mut center = vec![0.0; d];
        mean(&keys, &mut center);
        // Of fewer entries than codewords some are codewords twice.
        let levels = match self.per {
            0 => self.levels,
            per => self.levels.min(entries.count / per).max(1),
        };
        let within = matches!(self.tables[0].role, Role::Residual(_));
        let mut book = Codebook::new(self.layout, levels, center, self.distance, within);
        for m in 0..self.layout.codes {
            let dims = book.piece(m).len();
            let mut rows = Vec::with_capacity(entries.count * dims);
            book.compared(m, &keys, &mut rows);
            if dims == 0 {
                book.push(&[], None);
                continue;
            }
            let Some((metric, factor)) = self.metric(&queries, &book, d, m) else {
                let (_, means) = cluster(backend, &Points { rows, dim: dims }, levels, self.rounds, false)?;
                book.push(&means.rows, None);
                continue;
            };
            let mut white = Vec::with_capacity(rows.len());
            rows.chunks_exact(dims).for_each(|row| factor.whiten(row, &mut white));
            let (owners, _) =
                cluster(backend, &Points { rows: white, dim: dims }, levels, self.rounds, false)?;
            // The mean of rows times L is the mean of the rows, times L: nothing has to be divided by it.
            book.push(&means_of(&rows, dims, &owners, levels), Some(metric));
        }
        Ok(book)
    }
}

/// The mean of every owner's rows; of who owns none, a row that k-means may have begun with.
fn means_of(rows: &[f32], dim: usize, owners: &[u32], count: usize) -> Vec<f32> {
    let (mut sums, mut sizes) = (vec![0.0f32; count * dim], vec![0u32; count]);
    for (row, &owner) in rows.chunks_exact(dim).zip(owners) {
        let sum = &mut sums[owner as usize * dim..][..dim];
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
        sizes[owner as usize] += 1;
    }
    for (c, (sum, &size)) in sums.chunks_exact_mut(dim).zip(&sizes).enumerate() {
        match size {
            0 => sum.copy_from_slice(&rows[c * owners.len() / count * dim..][..dim]),
            _ => sum.iter_mut().for_each(|s| *s /= size as f32),
        }
    }
    sums
}
