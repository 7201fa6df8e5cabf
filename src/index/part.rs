//! Some KV heads of the index of a layer.
//!
//! *Helps* a step that goes through its heads one by one: it counts them from 0. *Hurts* nothing.

use super::{Codebook, HeadUnits, LayerIndex, Spread};
use crate::device::HeadRows;
use std::ops::Range;

/// Neighbouring KV heads of a [`LayerIndex`], counted from the first of them.
#[derive(Clone, Copy, Debug)]
pub struct IndexPart<'a> {
    index: &'a LayerIndex,
    first: usize,
    count: usize,
}

impl<'a> IndexPart<'a> {
    /// All KV heads.
    pub fn all(index: &'a LayerIndex) -> Self {
        Self { index, first: 0, count: index.heads().len() }
    }

    /// Some of these.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn part(self, heads: Range<usize>) -> Self {
        assert!(heads.start <= heads.end && heads.end <= self.count, "heads {heads:?} of {}", self.count);
        Self { first: self.first + heads.start, count: heads.len(), ..self }
    }

    fn own(self) -> Range<usize> {
        self.first..self.first + self.count
    }

    /// See [`LayerIndex::heads`].
    pub fn heads(self) -> &'a [HeadUnits] {
        &self.index.heads()[self.own()]
    }

    /// See [`LayerIndex::table`].
    pub fn table(self, table: usize) -> &'a [HeadRows] {
        &self.index.table(table)[self.own()]
    }

    /// See [`LayerIndex::spread`].
    pub fn spread(self, head: usize) -> &'a Spread {
        self.index.spread(self.first + head)
    }

    /// See [`LayerIndex::code_spread`].
    pub fn code_spread(self, head: usize) -> &'a Spread {
        self.index.code_spread(self.first + head)
    }

    /// See [`LayerIndex::book`].
    pub fn book(self, head: usize) -> Option<&'a Codebook> {
        self.index.book(self.first + head)
    }

    /// See [`LayerIndex::norm`].
    pub fn norm(self, table: usize, head: usize) -> f32 {
        self.index.norm(table, self.first + head)
    }
}
