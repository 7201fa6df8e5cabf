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
use crate::kernel::rebuild::RebuildArgs;

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
    /// Host buffers, widened to `f32`; entries that are made of factors are made ([`super::rebuild`]).
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

/// Whether some of the slots are of entries made of factors.
fn is_mixed(head: &HeadRows, slots: &[u32]) -> bool {
    let meets = |run: std::ops::Range<usize>| {
        let first = slots.partition_point(|&slot| (slot as usize) < run.start);
        slots.get(first).is_some_and(|&slot| (slot as usize) < run.end)
    };
    head.factored().any(|(.., run)| meets(run))
}

/// Dense rows of a head of which some entries are made of factors: those one way, the others the other.
fn in_parts(
    args: &mut GatherArgs<'_>,
    mut stored: impl FnMut(&mut GatherArgs<'_>) -> Result<(), KernelError>,
    mut made: impl FnMut(&mut RebuildArgs<'_>) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let (head, all) = (args.head, args.slots);
    let (Some(segment), GatherTarget::Dense { keys, values }) = (head.segments.first(), &mut args.target)
    else {
        return Ok(());
    };
    let (d_k, d_v) = (segment.layout.d_k, segment.layout.d_v);
    let is_made = |slot: u32| head.factored().any(|(.., run)| run.contains(&(slot as usize)));
    let mut done = 0;
    for slots in all.chunk_by(|&a, &b| is_made(a) == is_made(b)) {
        let keys = &mut keys[done * d_k..(done + slots.len()) * d_k];
        let values = &mut values[done * d_v..(done + slots.len()) * d_v];
        done += slots.len();
        if is_made(slots[0]) {
            made(&mut RebuildArgs { head, slots, keys, values })?;
        } else {
            stored(&mut GatherArgs { head, slots, target: GatherTarget::Dense { keys, values } })?;
        }
    }
    Ok(())
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
