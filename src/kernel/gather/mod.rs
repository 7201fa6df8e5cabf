//! Copying chosen entries of a KV head, in ascending slot order: into fresh pages (compaction after an
//! eviction) or into dense `f32` buffers (hosts with their own attention).
//!
//! *Helps* because compaction is what gives memory back: the pages left behind are freed. *Hurts* by one
//! copy of what is kept, which is why compaction runs with hysteresis and not after every token.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::device::HeadRows;
use crate::device::page::{Page, PageLayout};
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "gather";

/// Where the entries go.
#[derive(Debug)]
pub enum GatherTarget<'a> {
    /// Pages of the same layout as the source, filled from entry 0 of the first. Keys, values, positions, β
    /// and columns (and a device's mirror) are all copied.
    Pages {
        /// Layout of source and target.
        layout: &'a PageLayout,
        /// `⌈slots / capacity⌉` fresh pages.
        pages: &'a mut [Page],
    },
    /// Host buffers, widened to `f32`.
    Dense {
        /// `[slots, d_k]`.
        keys: &'a mut [f32],
        /// `[slots, d_v]`.
        values: &'a mut [f32],
    },
}

/// Which entries of one KV head.
#[derive(Debug)]
pub struct GatherArgs<'a> {
    /// The source.
    pub head: &'a HeadRows,
    /// Ascending slots.
    pub slots: &'a [u32],
    /// The target.
    pub target: GatherTarget<'a>,
}

impl GatherArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        let rows = self.head.rows();
        if let Some(&last) = self.slots.last()
            && last as usize >= rows
        {
            return Err(KernelError::Length {
                kernel: NAME,
                buffer: "slots (last)",
                got: last as usize,
                want: rows,
            });
        }
        match &self.target {
            GatherTarget::Pages { layout, pages } => {
                let exact = layout.k.exact().is_some() && layout.v.exact().is_some();
                if !exact || self.head.segments.iter().any(|s| *s.layout != **layout) {
                    return Err(KernelError::Layout {
                        kernel: NAME,
                        problem: "rows are copied between pages of one exact layout; gather packed ones into dense buffers and pack them",
                    });
                }
                expect_len(NAME, "pages", pages.len(), self.slots.len().div_ceil(layout.capacity))
            }
            GatherTarget::Dense { keys, values } => {
                let Some(segment) = self.head.segments.first() else {
                    return expect_len(NAME, "slots", self.slots.len(), 0);
                };
                expect_len(NAME, "keys", keys.len(), self.slots.len() * segment.layout.d_k)?;
                expect_len(NAME, "values", values.len(), self.slots.len() * segment.layout.d_v)
            }
        }
    }
}

/// Copies positions, β and columns of the chosen entries: host data on every backend.
pub fn copy_metadata(head: &HeadRows, slots: &[u32], layout: &PageLayout, pages: &mut [Page]) {
    let words = layout.column_words;
    let mut positions = Vec::with_capacity(slots.len());
    let mut sources = head.pages();
    let mut source = sources.next();
    for (i, &slot) in slots.iter().enumerate() {
        while let Some(s) = source
            && slot as usize >= s.first + s.rows
        {
            source = sources.next();
        }
        let Some(s) = source else { break };
        let from = slot as usize - s.first;
        let (page, to) = (&mut pages[i / layout.capacity], i % layout.capacity);
        positions.push(s.page.positions[from]);
        if let Some(bias) = s.bias() {
            page.bias.get_or_insert_with(|| vec![0.0; layout.capacity].into())[to] = bias[from];
        }
        page.columns[to * words..(to + 1) * words]
            .copy_from_slice(&s.page.columns[from * words..(from + 1) * words]);
    }
    for (page, positions) in pages.iter_mut().zip(positions.chunks(layout.capacity)) {
        page.positions_mut()[..positions.len()].copy_from_slice(positions);
    }
}
