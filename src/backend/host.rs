//! What the two host backends share: arenas by page size, and the page operations that are plain copies.
//!
//! *Helps* because reference and fast kernels then read the very same pages. *Hurts* nothing.

use crate::device::memory::{BLOCK_ALIGN, HostArena, MemoryUsage};
use crate::device::page::{Block, Page, PageLayout};
use crate::error::DeviceError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Host memory for pages.
#[derive(Debug, Default)]
pub(super) struct HostMemory {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By size of a block, and whether blocks stay.
    arenas: BTreeMap<(usize, bool), HostArena>,
}

impl HostMemory {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn usage(&self) -> MemoryUsage {
        // With one arena per block size the sum of peaks is an upper bound of the peak; models have one or
        // two page sizes.
        self.lock().arenas.values().map(HostArena::usage).fold(MemoryUsage::default(), |a, b| MemoryUsage {
            resident: a.resident + b.resident,
            reserved: a.reserved + b.reserved,
            peak: a.peak + b.peak,
        })
    }

    pub(super) fn reset_peak(&self) {
        self.lock().arenas.values().for_each(HostArena::reset_peak);
    }

    pub(super) fn allocate(&self, layout: &PageLayout) -> Result<Page, DeviceError> {
        let bytes = layout.block_bytes().next_multiple_of(BLOCK_ALIGN);
        let kind = (bytes, layout.steady);
        let arena =
            self.lock().arenas.entry(kind).or_insert_with(|| HostArena::new(bytes, layout.steady)).clone();
        Ok(empty_page(layout, Block::Host(arena.allocate()?)))
    }

    pub(super) fn copy_page(&self, layout: &PageLayout, page: &Page) -> Result<Page, DeviceError> {
        let mut copy = self.allocate(layout)?;
        copy.block.host_mut().copy_from_slice(page.block.host());
        copy_metadata(page, &mut copy);
        Ok(copy)
    }
}

/// A page around a fresh block.
pub(super) fn empty_page(layout: &PageLayout, block: Block) -> Page {
    Page {
        block,
        positions: std::iter::repeat_n(0, layout.capacity).collect(),
        bias: None,
        columns: vec![0; layout.capacity * layout.column_words].into(),
    }
}

/// Copies everything of a page that is not in its block; positions are shared until one of the two writes them.
pub(super) fn copy_metadata(from: &Page, to: &mut Page) {
    to.positions = Arc::clone(&from.positions);
    to.bias.clone_from(&from.bias);
    to.columns.copy_from_slice(&from.columns);
}

/// Narrows rows into a host block.
pub(super) fn write_rows(layout: &PageLayout, page: &mut Page, first: usize, keys: &[f32], values: &[f32]) {
    use crate::device::page::Side;
    let bytes = page.block.host_mut();
    for (side, rows) in [(Side::Key, keys), (Side::Value, values)] {
        for (i, row) in layout.dense(side, rows).enumerate() {
            layout.write_row(bytes, side, first + i, row);
        }
    }
}
