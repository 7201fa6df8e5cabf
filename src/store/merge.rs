//! Entries that take up others when a head is compacted: their new rows are computed before anything moves and put in
//! their place while what stays is copied.
//!
//! Rows are found by position, which no move changes. *Helps* keep compaction one copy with one rounding, whatever is
//! mixed. *Hurts* by an `f32` copy of the rows that take something up, until the head is done.

use crate::backend::Backend;
use crate::columns::{ColumnLayout, MERGED};
use crate::device::page::{HeadRows, Page};
use crate::error::KernelError;
use crate::kernel::merge_rows::{MergeRowsArgs, Merges};

/// Which positions an entry speaks for: lowest and highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The lowest.
    pub first: i32,
    /// The highest.
    pub last: i32,
}

impl Extent {
    /// That of an entry at a position, by the words of [`MERGED`].
    pub fn of(position: i32, words: [u32; 2]) -> Self {
        match words {
            [0, 0] => Self { first: position, last: position },
            [first, last] => Self { first: first as i32 - 1, last: last as i32 - 1 },
        }
    }

    /// The words of [`MERGED`].
    pub fn words(self) -> [u32; 2] {
        [self.first as u32 + 1, self.last as u32 + 1]
    }

    fn join(self, other: Self) -> Self {
        Self { first: self.first.min(other.first), last: self.last.max(other.last) }
    }
}

/// Every entry of a head with the positions it speaks for, by slot.
pub fn extents(head: &HeadRows, columns: &ColumnLayout) -> impl Iterator<Item = (i32, Extent)> {
    let (at, width) = (columns.find(MERGED.name).map(|(at, _)| at), columns.words());
    head.pages().flat_map(move |page| {
        page.positions().iter().enumerate().map(move |(i, &position)| {
            let words = at.map_or([0; 2], |at| {
                let words = &page.page.columns[i * width + at..];
                [words[0], words[1]]
            });
            (position, Extent::of(position, words))
        })
    })
}

/// The entries of a head that take others up, as they are afterwards. None by default.
#[derive(Debug, Default)]
pub(super) struct Merged {
    /// Ascending; the other fields have an element or a row for each.
    positions: Vec<i32>,
    /// Empty if keys stay.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// What is added to β.
    bias: Vec<f32>,
    extents: Vec<Extent>,
    /// First word of [`MERGED`], and words of all columns.
    column: Option<(usize, usize)>,
}

impl Merged {
    pub(super) fn of(
        backend: &dyn Backend,
        head: &HeadRows,
        merges: &Merges,
        columns: &ColumnLayout,
    ) -> Result<Self, KernelError> {
        if merges.is_empty() {
            return Ok(Self::default());
        }
        let (d_k, d_v) = head.segments.first().map_or((0, 0), |s| (s.layout.d_k, s.layout.d_v));
        let n = merges.targets.len();
        let mut keys = vec![0.0; if merges.keys { n * d_k } else { 0 }];
        let mut values = vec![0.0; n * d_v];
        backend.merge_rows(&mut MergeRowsArgs { head, merges, keys: &mut keys, values: &mut values })?;
        let all: Vec<(i32, Extent)> = extents(head, columns).collect();
        let of = |slot: u32| all[slot as usize];
        Ok(Self {
            positions: merges.targets.iter().map(|t| of(t.slot).0).collect(),
            keys,
            values,
            bias: merges.targets.iter().map(|t| t.bias).collect(),
            extents: merges
                .iter()
                .map(|(t, sources)| sources.iter().fold(of(t.slot).1, |all, s| all.join(of(s.slot).1)))
                .collect(),
            column: columns.find(MERGED.name).map(|(at, _)| (at, columns.words())),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Whether any of these ascending positions is one of theirs.
    pub(super) fn touches(&self, positions: &[i32]) -> bool {
        self.among(positions).next().is_some()
    }

    /// Their indices here and there.
    fn among<'a>(&'a self, positions: &'a [i32]) -> impl Iterator<Item = (usize, usize)> + 'a {
        let (first, last) = (positions.first().copied(), positions.last().copied());
        let start = first.map_or(0, |first| self.positions.partition_point(|&p| p < first));
        let end = last.map_or(0, |last| self.positions.partition_point(|&p| p <= last));
        (start..end.max(start))
            .filter_map(move |i| Some((i, positions.binary_search(&self.positions[i]).ok()?)))
    }

    /// Puts their rows in place of the dense ones of entries at these positions.
    pub(super) fn put(&self, positions: &[i32], keys: &mut [f32], values: &mut [f32]) {
        let Some(d_v) = self.values.len().checked_div(self.positions.len()) else { return };
        let d_k = self.keys.len() / self.positions.len();
        for (from, to) in self.among(positions) {
            values[to * d_v..(to + 1) * d_v].copy_from_slice(&self.values[from * d_v..(from + 1) * d_v]);
            if d_k > 0 {
                keys[to * d_k..(to + 1) * d_k].copy_from_slice(&self.keys[from * d_k..(from + 1) * d_k]);
            }
        }
    }

    /// Adds to β, and notes the positions they speak for, on a page with copies of entries.
    pub(super) fn mark(&self, page: &mut Page, rows: usize) {
        let Page { positions, bias, columns, .. } = page;
        for (from, to) in self.among(&positions[..rows]) {
            if self.bias[from] != 0.0 {
                bias.get_or_insert_with(|| vec![0.0; positions.len()].into())[to] += self.bias[from];
            }
            if let Some((at, width)) = self.column {
                columns[to * width + at..][..2].copy_from_slice(&self.extents[from].words());
            }
        }
    }
}
