//! Changing what is stored for one KV head: append, truncate, compact, renumber, update columns.
//!
//! *Helps* because copy-on-write, page lifetimes and the order of positions are handled in this one place;
//! a fork, a policy or a rollback never has to think of them. *Hurts* when two sequences that share a page
//! both write to it: the first to write copies that page (one, not the context).
//!
//! [`append`] writes exact entries at the end; [`compact`] drops entries and mixes them into others; [`seal`] packs what lies between the sinks
//! and the recent tail. What makes pages that stay as they are takes a [`SharedPositions`]: pages made with the same one
//! share the arrays of equal positions.
//!
//! Invariants, kept by every function here and relied on by kernels: positions strictly ascend within a
//! head; every page of a segment but the last is full; entries beyond `rows` are never read.

mod compact;
mod factored;
mod merge;
mod positions;
mod seal;

pub use compact::compact;
pub use factored::{FACTORED_ENTRIES, Matrix, basis, factored_layout, factorise, latents};
pub use merge::{Extent, extents};
pub use positions::SharedPositions;
pub use seal::{Packed, Storage, block_bytes, page_bytes, seal};

use crate::backend::Backend;
use crate::columns::{ColumnLayout, ColumnsMut, MERGED};
use crate::device::encoding::Encoding;
use crate::device::page::{HeadRows, Page, PageLayout, Segment, Side};
use crate::error::{DeviceError, KernelError};
use crate::geometry::{KeyPhase, LayerShape, Rotary};
use crate::kernel::Spans;
use crate::kernel::rope::{RopeArgs, RopeTarget};
use std::collections::BTreeMap;
use std::sync::Arc;

/// New entries of one KV head.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// Their positions, ascending, all above those stored.
    pub positions: &'a [i32],
    /// `[n, d_k]`.
    pub keys: &'a [f32],
    /// `[n, d_v]`.
    pub values: &'a [f32],
}

/// A page that this head alone owns: the page itself, or a copy put in its place.
fn unshare<'a>(
    backend: &dyn Backend,
    layout: &PageLayout,
    page: &'a mut Arc<Page>,
) -> Result<&'a mut Page, DeviceError> {
    if Arc::get_mut(page).is_none() {
        *page = Arc::new(backend.copy_page(layout, page)?);
    }
    match Arc::get_mut(page) {
        Some(page) => Ok(page),
        None => unreachable!("a page that was just made, or found unshared, has one owner"),
    }
}

/// Appends entries with zeroed columns and β = 0, in pages of `layout`, which is exact.
///
/// # Errors
/// [`DeviceError`]; the head is then as before.
pub fn append(
    backend: &dyn Backend,
    layout: &Arc<PageLayout>,
    head: &mut HeadRows,
    new: NewRows<'_>,
) -> Result<(), DeviceError> {
    let before = head.rows();
    let result = try_append(backend, layout, head, new);
    if result.is_err() {
        truncate_rows(head, before);
    }
    result
}

fn try_append(
    backend: &dyn Backend,
    layout: &Arc<PageLayout>,
    head: &mut HeadRows,
    new: NewRows<'_>,
) -> Result<(), DeviceError> {
    // A run of another encoding, or the sinks, ends where it ends.
    if head.segments.last().is_none_or(|s| s.layout != *layout) {
        head.segments.push(Segment::new(Arc::clone(layout)));
    }
    let Some(segment) = head.segments.last_mut() else { unreachable!("a segment was just pushed") };
    let (d_k, d_v, words) = (layout.d_k, layout.d_v, layout.column_words);
    let mut done = 0;
    while done < new.positions.len() {
        let first = segment.rows % layout.capacity;
        if segment.rows == segment.pages.len() * layout.capacity {
            segment.pages.push(Arc::new(backend.allocate(layout)?));
        }
        let Some(last) = segment.pages.last_mut() else { unreachable!("there is a page with room") };
        let page = unshare(backend, layout, last)?;
        let take = (layout.capacity - first).min(new.positions.len() - done);
        let range = first..first + take;
        page.positions_mut()[range.clone()].copy_from_slice(&new.positions[done..done + take]);
        // A truncation may have left an older entry's data here.
        page.columns[first * words..(first + take) * words].fill(0);
        if let Some(bias) = &mut page.bias {
            bias[range].fill(0.0);
        }
        backend.write_rows(
            layout,
            page,
            first,
            &new.keys[done * d_k..(done + take) * d_k],
            &new.values[done * d_v..(done + take) * d_v],
        )?;
        segment.rows += take;
        done += take;
    }
    Ok(())
}

/// Keeps the first `rows` entries and frees whole pages behind them.
///
/// Packed entries stay packed, also where they now stand at the end.
pub fn truncate_rows(head: &mut HeadRows, rows: usize) {
    let packed = head.segments.iter().rposition(|s| !s.layout.is_exact()).map_or(0, |last| last + 1);
    if rows < head.segments[..packed].iter().map(|s| s.rows).sum() {
        head.open = None;
    }
    let mut left = rows;
    for segment in &mut head.segments {
        segment.rows = segment.rows.min(left);
        left -= segment.rows;
        segment.pages.truncate(segment.rows.div_ceil(segment.layout.capacity));
    }
    while head.segments.len() > 1 && head.segments.last().is_some_and(|s| s.rows == 0) {
        head.segments.pop();
    }
}

/// Entries with a position below `position`: they are the first ones, because positions ascend.
pub fn rows_below(head: &HeadRows, position: i32) -> usize {
    // From the end: what is asked for is a step that is forgotten, or the last tokens.
    let mut rows = head.rows();
    for segment in head.segments.iter().rev() {
        let capacity = segment.layout.capacity;
        for (index, page) in segment.pages.iter().enumerate().rev() {
            let used = (segment.rows - index * capacity).min(capacity);
            let below = page.positions[..used].partition_point(|&p| p < position);
            rows -= used - below;
            if below > 0 {
                return rows;
            }
        }
    }
    rows
}

/// Gives every entry a new position and turns its key by the difference.
///
/// `new_position` must be ascending over the head's positions. What an entry speaks for (its [`Extent`]) moves along as
/// `new_extent` says. Pages that become equal to earlier ones share their positions.
///
/// # Errors
/// [`KernelError`]. Pages already done are then renumbered and the others not, so the caller must drop the
/// sequence; only a lost device can cause it.
pub fn renumber(
    backend: &dyn Backend,
    shape: &LayerShape,
    head: &mut HeadRows,
    shared: &mut SharedPositions,
    columns: &ColumnLayout,
    new_position: impl Fn(usize, i32) -> i32,
    new_extent: impl Fn(i32) -> i32,
) -> Result<(), KernelError> {
    seal::reopen(backend, head)?;
    let merged = columns.find(MERGED.name).map(|(at, _)| at);
    let rotary = shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope);
    let mut angles = AngleCache::default();
    let mut slot = 0;
    for segment in &mut head.segments {
        let (layout, total) = (Arc::clone(&segment.layout), segment.rows);
        for (index, page) in segment.pages.iter_mut().enumerate() {
            let rows = (total - index * layout.capacity).min(layout.capacity);
            let deltas: Vec<i32> = page.positions[..rows]
                .iter()
                .enumerate()
                .map(|(i, &p)| new_position(slot + i, p) - p)
                .collect();
            slot += rows;
            let stays = deltas.iter().all(|&d| d == 0);
            let width = layout.column_words;
            let merged = merged.filter(|at| (0..rows).any(|i| page.columns[i * width + at] != 0));
            // An entry that stays may speak for one that moves.
            if stays && merged.is_none() {
                continue;
            }
            let page = unshare(backend, &layout, page)?;
            for i in merged.iter().flat_map(|at| (0..rows).map(move |i| i * width + at)) {
                let Extent { first, last } = Extent::of(0, [page.columns[i], page.columns[i + 1]]);
                if page.columns[i] != 0 {
                    let moved = Extent { first: new_extent(first), last: new_extent(last) };
                    page.columns[i..i + 2].copy_from_slice(&moved.words());
                }
            }
            if stays {
                continue;
            }
            page.positions_mut().iter_mut().zip(&deltas).for_each(|(p, d)| *p += d);
            // Keys that are made are turned when they are.
            if let Some(rotary) = rotary.filter(|_| layout.k != Encoding::Factored) {
                let table = angles.table(rotary, &deltas);
                backend.rope(&mut RopeArgs {
                    layout: rotary.layout,
                    dims: rotary.dims,
                    table: &table,
                    target: RopeTarget::Keys { layout: &layout, page, rows },
                })?;
            }
            backend.sync_metadata(&layout, page, 0..rows)?;
            shared.share(&layout, page, rows);
        }
    }
    Ok(())
}

/// Angles by distance: a compaction moves thousands of keys by a handful of distances.
#[derive(Debug, Default)]
struct AngleCache(BTreeMap<i32, Vec<f32>>);

impl AngleCache {
    fn table(&mut self, rotary: &Rotary, deltas: &[i32]) -> Vec<f32> {
        let mut table = Vec::with_capacity(deltas.len() * rotary.dims);
        for &delta in deltas {
            table.extend_from_slice(
                self.0.entry(delta).or_insert_with(|| rotary.table(std::iter::once(delta))),
            );
        }
        table
    }
}

/// Sets β of the entries from slot `first`, which are exact and the last ones.
///
/// # Errors
/// [`DeviceError`].
pub fn set_bias(
    backend: &dyn Backend,
    head: &mut HeadRows,
    first: usize,
    bias: &[f32],
) -> Result<(), DeviceError> {
    let mut before: usize = head.segments.iter().map(|s| s.rows).sum();
    for segment in head.segments.iter_mut().rev() {
        let (layout, total) = (Arc::clone(&segment.layout), segment.rows);
        before -= total;
        for (index, page) in segment.pages.iter_mut().enumerate().rev() {
            let start = before + index * layout.capacity;
            let end = before + total.min((index + 1) * layout.capacity);
            if end <= first {
                return Ok(());
            }
            let rows = start.max(first) - start..end - start;
            let page = unshare(backend, &layout, page)?;
            let all = page.bias.get_or_insert_with(|| vec![0.0; layout.capacity].into());
            all[rows.clone()].copy_from_slice(&bias[start + rows.start - first..][..rows.len()]);
            backend.sync_metadata(&layout, page, rows)?;
        }
    }
    Ok(())
}

/// Calls `update` with the writable columns of every page: page's positions, slot of its first entry, columns.
///
/// # Errors
/// [`DeviceError::OutOfMemory`] if a shared page cannot be copied.
pub fn update_columns(
    backend: &dyn Backend,
    head: &mut HeadRows,
    mut update: impl FnMut(&[i32], usize, &mut ColumnsMut<'_>),
) -> Result<(), DeviceError> {
    let mut first = 0;
    for segment in &mut head.segments {
        let (layout, total) = (Arc::clone(&segment.layout), segment.rows);
        for (index, page) in segment.pages.iter_mut().enumerate() {
            let rows = (total - index * layout.capacity).min(layout.capacity);
            let page = unshare(backend, &layout, page)?;
            let words = layout.column_words;
            update(
                &page.positions[..rows],
                first,
                &mut ColumnsMut::new(&mut page.columns[..rows * words], words),
            );
            first += rows;
        }
    }
    Ok(())
}

/// Writes a word of the columns of the last `count` entries, oldest first; pages before them are not touched.
///
/// # Errors
/// As [`update_columns`].
pub fn fill_column(
    backend: &dyn Backend,
    head: &mut HeadRows,
    word: usize,
    count: usize,
    words: impl Iterator<Item = u32>,
) -> Result<(), DeviceError> {
    let start = head.rows() - count.min(head.rows());
    let (mut first, mut words) = (0, words);
    for segment in &mut head.segments {
        let (layout, total) = (Arc::clone(&segment.layout), segment.rows);
        for (index, page) in segment.pages.iter_mut().enumerate() {
            let rows = (total - index * layout.capacity).min(layout.capacity);
            if first + rows > start {
                let page = unshare(backend, &layout, page)?;
                for row in start.saturating_sub(first)..rows {
                    page.columns[row * layout.column_words + word] = words.next().unwrap_or_default();
                }
            }
            first += rows;
        }
    }
    Ok(())
}

/// What an `Arc` keeps beside its content: two counters.
const COUNTERS: usize = 2 * size_of::<usize>();

/// Host memory that a page has for itself outside its block: β, columns, and its own fields. Its positions, which other
/// pages may hold too, are [`positions_bytes`].
pub fn metadata_bytes(page: &Page) -> usize {
    COUNTERS
        + size_of::<Page>()
        + page.bias.as_ref().map_or(0, |b| b.len() * size_of::<f32>())
        + page.columns.len() * size_of::<u32>()
}

/// Memory of an array of positions with `capacity` entries, however many pages share it.
pub fn positions_bytes(capacity: usize) -> usize {
    COUNTERS + capacity * size_of::<i32>()
}

/// Bytes the attend kernel reads of a head for one query: keys, values, positions, β. Positions that heads share are
/// read for each of them.
pub fn bytes_read(head: &HeadRows) -> usize {
    head.pages()
        .map(|p| {
            let side = |side| p.layout.side_bytes(side) * p.rows / p.layout.capacity;
            let row = size_of::<i32>() + if p.page.bias.is_some() { size_of::<f32>() } else { 0 };
            side(Side::Key) + side(Side::Value) + p.rows * row
        })
        .sum::<usize>()
        + factored_bytes_read(head, None)
}

/// Bytes a kernel reads of factors of a head: latent rows of all entries that are made of them, or of those of some
/// spans, or the keys that are kept in their place, and the bases.
pub fn factored_bytes_read(head: &HeadRows, spans: Option<&Spans>) -> usize {
    head.factored()
        .map(|(segment, factors, slots)| {
            let rows = spans.map_or(segment.rows, |spans| spans.rows_in(slots.clone()));
            let kept = match spans {
                _ if factors.kept.is_none() => 0,
                None => factors.kept_among(0..segment.rows),
                Some(spans) => {
                    let runs = spans.among(slots.clone());
                    runs.map(|run| factors.kept_among(run.start - slots.start..run.end - slots.start)).sum()
                }
            };
            let key = factors.kept.as_ref().map_or(0, |kept| kept.keys.layout.row_bytes(Side::Key));
            let instead = factors.latents.layout.row_bytes(Side::Key);
            let bases = if rows > 0 { factors.basis_bytes() } else { 0 };
            rows * factors.latent_bytes() - kept * instead + kept * key + bases
        })
        .sum()
}

/// Bytes a kernel reads of one side of a head: of all entries, or of those of some spans. Positions and β are not
/// counted.
pub fn side_bytes_read(head: &HeadRows, side: Side, spans: Option<&Spans>) -> usize {
    let mut before = 0;
    let mut bytes = 0;
    for segment in &head.segments {
        let slots = before..before + segment.rows;
        before = slots.end;
        let rows = match spans {
            None => segment.rows,
            Some(spans) => spans.rows_in(slots),
        };
        bytes += segment.layout.side_bytes(side) * rows / segment.layout.capacity;
    }
    bytes
}
