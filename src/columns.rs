//! Per-entry side data that policies declare and the cache owns: accumulated mass, visit counts, bit
//! histories.
//!
//! *Helps* because eviction, fork, truncate and moves between backends carry columns along without a line
//! of policy code, and no policy keeps a private vector whose indices go stale. *Hurts* by 4 bytes per word
//! and entry, reported in the cache's bytes.

use bytemuck::cast;

/// One declared column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColumnSpec {
    /// Its name, unique within a policy.
    pub name: &'static str,
    /// `u32` words per entry. New entries start at zero words (also 0.0 as `f32`).
    pub words: usize,
}

/// The column in which a cache with a reducer keeps, of every entry that others were mixed into, the lowest and the highest
/// position it speaks for, each plus one; both words are 0 while it speaks for itself only.
pub const MERGED: ColumnSpec = ColumnSpec { name: "merged", words: 2 };

/// The column of what a scorer made of a token's side inputs when it arrived ([`crate::policy::Scorer::rate`]), an `f32`.
pub const RATED: ColumnSpec = ColumnSpec { name: "rated", words: 1 };

/// The column of the highest attention weight that an entry received while its context was replayed
/// ([`crate::KvCache::replay`]), an `f32`; 0 if it never was.
pub const REPLAYED: ColumnSpec = ColumnSpec { name: "replayed", words: 1 };

/// Where each declared column lies within an entry's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnLayout {
    specs: Vec<ColumnSpec>,
}

impl ColumnLayout {
    /// Columns in the order declared.
    pub fn new(specs: Vec<ColumnSpec>) -> Self {
        Self { specs }
    }

    /// Words per entry over all columns.
    pub fn words(&self) -> usize {
        self.specs.iter().map(|s| s.words).sum()
    }

    /// The columns.
    pub fn specs(&self) -> &[ColumnSpec] {
        &self.specs
    }

    /// First word and width of a column.
    pub fn find(&self, name: &str) -> Option<(usize, usize)> {
        let mut start = 0;
        for spec in &self.specs {
            if spec.name == name {
                return Some((start, spec.words));
            }
            start += spec.words;
        }
        None
    }
}

/// The columns of consecutive entries, writable: `[entries, words]`.
#[derive(Debug)]
pub struct ColumnsMut<'a> {
    words: &'a mut [u32],
    width: usize,
}

impl<'a> ColumnsMut<'a> {
    /// Wraps `[entries, width]` words.
    pub fn new(words: &'a mut [u32], width: usize) -> Self {
        Self { words, width }
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.words.len().checked_div(self.width).unwrap_or(0)
    }

    /// All words of one entry, in declaration order.
    ///
    /// # Panics
    /// If `entry` is out of range.
    pub fn entry(&mut self, entry: usize) -> &mut [u32] {
        &mut self.words[entry * self.width..(entry + 1) * self.width]
    }

    /// Adds to a word that holds an `f32`.
    ///
    /// # Panics
    /// If `entry` or `word` is out of range.
    pub fn add_f32(&mut self, entry: usize, word: usize, value: f32) {
        let w = &mut self.entry(entry)[word];
        *w = cast(cast::<u32, f32>(*w) + value);
    }
}
