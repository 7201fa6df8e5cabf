//! Packing what is neither among the first entries nor among the last, whole pages at a time.
//!
//! ```text
//! | sinks (exact) | packed pages of 128 …                 | exact: the tail, and what does not fill a page yet |
//! ```
//! Sealing never moves the border back: entries that are packed stay packed, also when a truncation brings them into
//! the tail. With a tail of 0 entries no exact one is read between steps, at the price of exact copies of the entries
//! of the last page until it is full.

use super::compact::{copy_rows, push_page};
use super::merge::Merged;
use super::{COUNTERS, SharedPositions, positions_bytes, unshare};
use crate::backend::Backend;
use crate::device::encoding::Encoding;
use crate::device::memory::BLOCK_ALIGN;
use crate::device::page::{HeadRows, Page, PageLayout, Segment, Side};
use crate::error::{DeviceError, KernelError};
use std::sync::Arc;

/// How the entries of one KV head are stored.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Of new entries; of all, if nothing is packed.
    pub exact: Arc<PageLayout>,
    /// Of the bulk.
    pub packed: Option<Packed>,
}

/// How the bulk of a KV head's entries is stored.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Its pages.
    pub layout: Arc<PageLayout>,
    /// First entries that stay exact.
    pub sinks: usize,
    /// Their page: as [`Storage::exact`], with room for them only.
    pub sink_layout: Arc<PageLayout>,
    /// Last entries that stay exact, at least.
    pub tail: usize,
}

/// Where a run of exact entries is cut, in slots of the run.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// End of the sinks, which stay exact.
    sinks: usize,
    /// End of the full packed pages.
    end: usize,
    /// Whether what follows becomes a packed page too, though not a full one.
    partial: bool,
}

impl Packed {
    /// What becomes of the last `rows` entries, exact ones, behind `before` others. Nothing if they stay as they are.
    fn cut(&self, before: usize, rows: usize) -> Option<Cut> {
        let sinks = self.sinks.saturating_sub(before).min(rows);
        let full = rows.saturating_sub(sinks + self.tail) / self.layout.capacity;
        let end = sinks + full * self.layout.capacity;
        let partial = self.tail == 0 && end < rows;
        (full > 0 || partial).then_some(Cut { sinks, end, partial })
    }
}

impl Storage {
    /// How a side of an entry is stored when it comes, and how later.
    pub fn stored(&self, side: Side) -> (Encoding, Encoding) {
        (self.exact.encoding(side), self.bulk().encoding(side))
    }

    /// Of most entries.
    pub fn bulk(&self) -> &Arc<PageLayout> {
        self.packed.as_ref().map_or(&self.exact, |packed| &packed.layout)
    }

    /// Bytes of the pages that hold `rows` entries of a head with everything sealed that can be, and of as many
    /// spare packed pages as compaction leaves. An upper bound: every page is counted with positions of its own, since
    /// how many heads hold the same ones is up to the policy.
    pub fn bytes(&self, rows: usize) -> usize {
        let exact = |rows: usize| rows.div_ceil(self.exact.capacity) * page_bytes(&self.exact);
        let Some(packed) = &self.packed else { return exact(rows) };
        let pages = rows.saturating_sub(packed.sinks + packed.tail) / packed.layout.capacity;
        if pages == 0 {
            return exact(rows);
        }
        let sinks = packed.sinks.div_ceil(packed.sink_layout.capacity) * page_bytes(&packed.sink_layout);
        sinks
            + (pages + super::compact::SPARE_PAGES) * page_bytes(&packed.layout)
            + exact(rows - packed.sinks - pages * packed.layout.capacity)
    }
}

/// A block's size as allocated.
pub fn block_bytes(layout: &PageLayout) -> usize {
    layout.block_bytes().next_multiple_of(BLOCK_ALIGN)
}

/// A page's size in all: block, columns, its own fields, and positions that it shares with no other.
pub fn page_bytes(layout: &PageLayout) -> usize {
    let columns = layout.capacity * layout.column_words * size_of::<u32>();
    block_bytes(layout) + COUNTERS + size_of::<Page>() + columns + positions_bytes(layout.capacity)
}

/// Packs what can be of a head. Gives whether anything was.
///
/// Without a tail the last page is packed before it is full, and [`HeadRows::open`] keeps its entries to be packed
/// again with those that follow.
///
/// # Errors
/// [`KernelError`]; the head is then as before.
pub fn seal(
    backend: &dyn Backend,
    storage: &Storage,
    head: &mut HeadRows,
    shared: &mut SharedPositions,
) -> Result<bool, KernelError> {
    let Some(packed) = &storage.packed else { return Ok(false) };
    let exact =
        |head: &HeadRows| head.segments.iter().rev().take_while(|s| s.layout == storage.exact).count();
    let run = &head.segments[head.segments.len() - exact(head)..];
    let rows: usize = run.iter().map(|s| s.rows).sum();
    // Most commits end here, before anything is copied. Entries that are kept open wait for the next one that comes.
    let ready = head.open.is_some() || packed.cut(head.rows() - rows, rows).is_some();
    if rows == 0 || !ready {
        return Ok(false);
    }
    let mut sealed = head.clone();
    reopen(backend, &mut sealed)?;
    let run = sealed.segments.split_off(sealed.segments.len() - exact(&sealed));
    let rows: usize = run.iter().map(|s| s.rows).sum();
    let Some(Cut { sinks, end, partial }) = packed.cut(sealed.rows(), rows) else { return Ok(false) };
    let source = HeadRows::new(run);
    let mut add = |slots: std::ops::Range<usize>, layout: &Arc<PageLayout>| -> Result<(), KernelError> {
        let mut left = slots.len();
        let slots: Vec<u32> = slots.map(|s| s as u32).collect();
        for page in copy_rows(backend, &source, &slots, layout, &Merged::default(), shared)? {
            let rows = left.min(layout.capacity);
            left -= rows;
            push_page(&mut sealed.segments, layout, page, rows);
        }
        Ok(())
    };
    add(0..sinks, &packed.sink_layout)?;
    add(sinks..if partial { rows } else { end }, &packed.layout)?;
    if end < rows {
        let layout = Arc::clone(&storage.exact);
        // Pages that the rest has for itself stay where they are.
        let pages = match &source.segments[..] {
            [run] if end.is_multiple_of(layout.capacity) => run.pages[end / layout.capacity..].to_vec(),
            _ => {
                let slots: Vec<u32> = (end as u32..rows as u32).collect();
                copy_rows(backend, &source, &slots, &layout, &Merged::default(), shared)?
            }
        };
        let rest = Segment { pages, rows: rows - end, ..Segment::new(layout) };
        if partial {
            sealed.open = Some(rest);
        } else {
            sealed.segments.push(rest);
        }
    }
    *head = sealed;
    Ok(true)
}

/// Puts the exact entries of [`HeadRows::open`] in the place of the packed page made from them.
///
/// # Errors
/// [`DeviceError`]; the head is then as before.
pub(super) fn reopen(backend: &dyn Backend, head: &mut HeadRows) -> Result<(), DeviceError> {
    let Some(mut open) = head.open.clone() else { return Ok(()) };
    let Some(at) = head.segments.iter().rposition(|s| !s.layout.is_exact()) else {
        unreachable!("entries are open beside the packed page made from them")
    };
    // Policies wrote to the columns of the page that is read.
    let (layout, words) = (Arc::clone(&open.layout), open.layout.column_words);
    if let Some(page) = head.segments[at].pages.last().filter(|_| words > 0) {
        let columns = page.columns[..open.rows * words].chunks(layout.capacity * words);
        for (target, columns) in open.pages.iter_mut().zip(columns) {
            unshare(backend, &layout, target)?.columns[..columns.len()].copy_from_slice(columns);
        }
    }
    let segment = &mut head.segments[at];
    segment.pages.pop();
    segment.rows -= open.rows;
    let empty = segment.rows == 0;
    head.segments.insert(at + 1, open);
    if empty {
        head.segments.remove(at);
    }
    head.open = None;
    Ok(())
}
