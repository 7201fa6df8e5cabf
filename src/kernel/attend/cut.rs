//! How the work of one KV head is cut: blocks of query rows by chunks of entries.
//!
//! Where it is cut depends on the shape of the call only. *Helps* results whose bits do not depend on threads. *Hurts*
//! nothing.

use super::AttendLane;
use crate::kernel::simd::chosen::{Chosen, Mark, cut};
use crate::kernel::simd::tile::{BLOCK, first_slot, page_count};
use crate::kernel::{AttentionParams, Spans};
use std::ops::Range;

/// Fewest entries of a chunk: below, merging and starting tasks would cost more than they spread.
const CHUNK_MIN: usize = 1024;

/// The same of chosen entries, each of which may be a cache miss.
const CHOSEN_MIN: usize = 512;

/// Most items a KV head is cut into by chunks. More would only add partial results to merge.
const ITEMS_MAX: usize = 32;

/// How one KV head's work is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// `G·T`.
    pub rows: usize,
    /// Rows per block, but for the last.
    block: usize,
    pub blocks: usize,
    pub chunks: usize,
    first_page: usize,
    pages: usize,
}

/// The entries of a chunk.
#[derive(Clone, Debug)]
pub(super) enum Part<'a> {
    /// All of these pages.
    Pages(Range<usize>),
    /// These only.
    Chosen(Chosen<'a>),
}

/// Where chunks of chosen entries begin and end.
pub(super) type Marks = [Mark; ITEMS_MAX + 1];

impl Cut {
    /// Of head `h` of `lane`.
    pub(super) fn new(params: &AttentionParams<'_>, lane: &AttendLane<'_>, h: usize) -> Self {
        let rows = params.group * lane.positions.len();
        // Blocks of equal size rather than full ones and a rest.
        let block = rows.div_ceil(rows.div_ceil(BLOCK).max(1)).next_multiple_of(4).clamp(4, BLOCK);
        let blocks = rows.div_ceil(block);
        let most = (ITEMS_MAX / blocks.max(1)).max(1);
        if let Some(spans) = lane.spans {
            let chunks = (spans[h].rows() / CHOSEN_MIN).clamp(1, most);
            return Self { rows, block, blocks, chunks, first_page: 0, pages: 0 };
        }
        let head = &lane.heads[h];
        let pages = lane.share.range(page_count(head));
        let entries = first_slot(head, pages.end) - first_slot(head, pages.start);
        let chunks = (entries / CHUNK_MIN).clamp(1, most).min(pages.len().max(1));
        Self { rows, block, blocks, chunks, first_page: pages.start, pages: pages.len() }
    }

    pub(super) fn items(&self) -> usize {
        self.blocks * self.chunks
    }

    /// Row of the partial results at which item `i` starts.
    pub(super) fn row(&self, i: usize) -> usize {
        i / self.blocks.max(1) * self.rows + i % self.blocks.max(1) * self.block
    }

    pub(super) fn block_rows(&self, i: usize) -> Range<usize> {
        let first = i % self.blocks * self.block;
        first..(first + self.block).min(self.rows)
    }

    pub(super) fn chunk_pages(&self, i: usize) -> Range<usize> {
        let c = i / self.blocks;
        let page = |c| self.first_page + self.pages * c / self.chunks;
        page(c)..page(c + 1)
    }

    /// Where the chunks of `spans` are.
    pub(super) fn marks(&self, spans: Option<&Spans>) -> Marks {
        let mut marks = [Mark::default(); ITEMS_MAX + 1];
        if let Some(spans) = spans {
            cut(spans, self.chunks, &mut marks);
        }
        marks
    }

    /// The entries of item `i`, of `spans` if there are any.
    pub(super) fn part<'a>(&self, i: usize, chosen: Option<(&'a Spans, &Marks)>) -> Part<'a> {
        match chosen {
            None => Part::Pages(self.chunk_pages(i)),
            Some((spans, marks)) => {
                let c = i / self.blocks;
                Part::Chosen(Chosen::between(spans, marks[c], marks[c + 1]))
            }
        }
    }

    /// Floats of partial results: `[chunks, rows, d_v]` and `[chunks, rows]`.
    pub(super) fn partial(&self, d_v: usize) -> usize {
        if self.chunks == 1 { 0 } else { self.chunks * self.rows * (d_v + 1) }
    }
}
