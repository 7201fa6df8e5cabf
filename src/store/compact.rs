//! Dropping entries: what stays is moved together, segment by segment, and the pages left over are freed. Entries that take
//! up some of those dropped are written anew on the way.
//!
//! Every run keeps its encoding. Exact pages that lose nothing at a run's start stay where they are, so that what is
//! shared stays shared. Packed pages that lose nothing stay wherever they are, because moving packed rows rounds them
//! once more: only the rows that share a page with a dropped one are unpacked and packed again. Rows of a page that is
//! not full yet are taken from their exact copies where there are any.

use super::SharedPositions;
use super::merge::Merged;
use crate::backend::Backend;
use crate::columns::ColumnLayout;
use crate::device::page::{HeadRows, Page, PageLayout, Segment};
use crate::error::KernelError;
use crate::kernel::gather::{self, GatherArgs, GatherTarget};
use crate::kernel::pack::PackArgs;
use crate::plan::HeadPlan;
use std::sync::Arc;

/// Pages that a packed run may have more than its rows need, before all behind the first loss are packed anew.
pub(super) const SPARE_PAGES: usize = 1;

/// Keeps what a plan keeps, mixes into it what the plan mixes, and frees the pages left over.
///
/// # Errors
/// [`KernelError`]; the head then has the entries it had.
pub fn compact(
    backend: &dyn Backend,
    head: &mut HeadRows,
    plan: &HeadPlan,
    columns: &ColumnLayout,
    shared: &mut SharedPositions,
) -> Result<(), KernelError> {
    if plan.is_identity() {
        return Ok(());
    }
    super::seal::reopen(backend, head)?;
    let merged = &Merged::of(backend, head, &plan.merges, columns)?;
    let mut segments = Vec::with_capacity(head.segments.len());
    let (mut first, mut keep) = (0, &plan.keep[..]);
    // Runs of factors have factors of their own, whatever their layout.
    let together =
        |a: &Segment, b: &Segment| a.layout == b.layout && a.factors.is_none() && b.factors.is_none();
    for run in head.segments.chunk_by(together) {
        let rows: usize = run.iter().map(|s| s.rows).sum();
        let (here, rest) = keep.split_at(keep.partition_point(|&slot| (slot as usize) < first + rows));
        let local: Vec<u32> = here.iter().map(|&slot| slot - first as u32).collect();
        (first, keep) = (first + rows, rest);
        let touched = |page: &Page, rows| merged.touches(&page.positions[..rows]);
        if local.len() == rows && !run.iter().flat_map(Segment::pages).any(|(page, rows)| touched(page, rows))
        {
            segments.extend_from_slice(run);
        } else if !local.is_empty() && run[0].factors.is_some() {
            segments.push(super::factored::keep(backend, &run[0], &local, shared)?);
        } else if !local.is_empty() && run[0].layout.is_exact() {
            segments.push(compact_exact(backend, run, &local, merged, shared)?);
        } else if !local.is_empty() {
            compact_packed(backend, run, &local, merged, shared, &mut segments)?;
        }
    }
    head.segments = segments;
    Ok(())
}

fn compact_exact(
    backend: &dyn Backend,
    run: &[Segment],
    keep: &[u32],
    merged: &Merged,
    shared: &mut SharedPositions,
) -> Result<Segment, KernelError> {
    let layout = &run[0].layout;
    let untouched = keep.iter().enumerate().take_while(|&(i, &slot)| i == slot as usize).count();
    // Only the pages of the first segment are known to be full up to the last.
    let whole = (untouched / layout.capacity).min(run[0].rows / layout.capacity);
    let whole = run[0].pages[..whole].iter().take_while(|page| !merged.touches(&page.positions)).count();
    let source = HeadRows::new(run.to_vec());
    let mut pages = run[0].pages[..whole].to_vec();
    pages.extend(copy_rows(backend, &source, &keep[whole * layout.capacity..], layout, merged, shared)?);
    Ok(Segment { pages, rows: keep.len(), ..Segment::new(Arc::clone(layout)) })
}

/// A page of a packed run, and what stays of it.
struct Kept<'a> {
    page: &'a Arc<Page>,
    rows: usize,
    /// Slots within the page.
    keep: Vec<u32>,
    /// Whether any of them takes something up.
    touched: bool,
}

impl Kept<'_> {
    fn whole(&self) -> bool {
        self.keep.len() == self.rows && !self.touched
    }
}

fn compact_packed(
    backend: &dyn Backend,
    run: &[Segment],
    keep: &[u32],
    merged: &Merged,
    shared: &mut SharedPositions,
    out: &mut Vec<Segment>,
) -> Result<(), KernelError> {
    let layout = &run[0].layout;
    let (mut first, mut keep) = (0, keep);
    let mut pages = Vec::new();
    for (page, rows) in run.iter().flat_map(Segment::pages) {
        let (here, rest) = keep.split_at(keep.partition_point(|&slot| (slot as usize) < first + rows));
        let keep_here = here.iter().map(|&slot| slot - first as u32).collect();
        let touched = merged.touches(&page.positions[..rows]);
        pages.push(Kept { page, rows, keep: keep_here, touched });
        (first, keep) = (first + rows, rest);
    }
    pages.retain(|p| !p.keep.is_empty());
    // Pages that lose nothing stay, unless they are part full and next to one that is packed anew anyway.
    let total: usize = pages.iter().map(|p| p.keep.len()).sum();
    let stays = |p: &Kept<'_>| p.whole() && p.rows == layout.capacity;
    let stretches = || pages.chunk_by(|a, b| stays(a) == stays(b));
    let needed = |part: &[Kept<'_>]| -> usize {
        match part.iter().all(Kept::whole) {
            true => part.len(),
            false => part.iter().map(|p| p.keep.len()).sum::<usize>().div_ceil(layout.capacity),
        }
    };
    if stretches().map(needed).sum::<usize>() <= total.div_ceil(layout.capacity) + SPARE_PAGES {
        return stretches().try_for_each(|part| repack(backend, layout, part, merged, shared, out));
    }
    let (front, rest) = pages.split_at(pages.iter().take_while(|p| stays(p)).count());
    repack(backend, layout, front, merged, shared, out)?;
    repack(backend, layout, rest, merged, shared, out)
}

/// Appends what stays of consecutive pages to `out`, packed anew if any of them loses something.
fn repack(
    backend: &dyn Backend,
    layout: &Arc<PageLayout>,
    part: &[Kept<'_>],
    merged: &Merged,
    shared: &mut SharedPositions,
    out: &mut Vec<Segment>,
) -> Result<(), KernelError> {
    if part.iter().all(Kept::whole) {
        part.iter().for_each(|p| push_page(out, layout, Arc::clone(p.page), p.rows));
        return Ok(());
    }
    let mut slots = Vec::new();
    let mut segments = Vec::with_capacity(part.len());
    let mut first = 0;
    for p in part {
        slots.extend(p.keep.iter().map(|slot| slot + first));
        first += p.rows as u32;
        let pages = vec![Arc::clone(p.page)];
        segments.push(Segment { pages, rows: p.rows, ..Segment::new(Arc::clone(layout)) });
    }
    let pages = copy_rows(backend, &HeadRows::new(segments), &slots, layout, merged, shared)?;
    let mut left = slots.len();
    for page in pages {
        let rows = left.min(layout.capacity);
        left -= rows;
        push_page(out, layout, page, rows);
    }
    Ok(())
}

/// Adds a page to the last segment if that has its layout and full pages only, else to one of its own.
pub(super) fn push_page(out: &mut Vec<Segment>, layout: &Arc<PageLayout>, page: Arc<Page>, rows: usize) {
    if out.last().is_none_or(|s| s.layout != *layout || s.rows != s.pages.len() * layout.capacity) {
        out.push(Segment::new(Arc::clone(layout)));
    }
    let Some(last) = out.last_mut() else { unreachable!("there is a segment to add to") };
    last.pages.push(page);
    last.rows += rows;
}

/// The given slots in fresh pages of `layout`, packed if that is, as they are after merging; positions are shared with the
/// pages made before.
pub(super) fn copy_rows(
    backend: &dyn Backend,
    source: &HeadRows,
    slots: &[u32],
    layout: &Arc<PageLayout>,
    merged: &Merged,
    shared: &mut SharedPositions,
) -> Result<Vec<Arc<Page>>, KernelError> {
    let mut pages = Vec::with_capacity(slots.len().div_ceil(layout.capacity));
    for _ in 0..slots.len().div_ceil(layout.capacity) {
        pages.push(backend.allocate(layout)?);
    }
    if merged.is_empty() && layout.is_exact() && source.segments.iter().all(|s| s.layout == *layout) {
        let target = GatherTarget::Pages { layout, pages: &mut pages };
        backend.gather(&mut GatherArgs { head: source, slots, target })?;
    } else {
        gather::copy_metadata(source, slots, layout, &mut pages);
        let most = slots.len().min(layout.capacity);
        let (mut keys, mut values) = (vec![0.0; most * layout.d_k], vec![0.0; most * layout.d_v]);
        for (page, slots) in pages.iter_mut().zip(slots.chunks(layout.capacity)) {
            let keys = &mut keys[..slots.len() * layout.d_k];
            let values = &mut values[..slots.len() * layout.d_v];
            let target = GatherTarget::Dense { keys: &mut *keys, values: &mut *values };
            backend.gather(&mut GatherArgs { head: source, slots, target })?;
            merged.put(&page.positions[..slots.len()], keys, values);
            merged.mark(page, slots.len());
            if layout.is_exact() {
                backend.write_rows(layout, page, 0, keys, values)?;
            } else {
                backend.pack(&mut PackArgs { layout, page, keys, values })?;
                backend.sync_metadata(layout, page, 0..slots.len())?;
            }
        }
    }
    for (page, slots) in pages.iter_mut().zip(slots.chunks(layout.capacity)) {
        shared.share(layout, page, slots.len());
    }
    Ok(pages.into_iter().map(Arc::new).collect())
}
