//! Putting products in the place of exact rows: a run of entries of one KV head becomes one of factors that it shares
//! with other heads.
//!
//! ```text
//! | sinks (exact) | made of factors, a run per decomposition | exact: the tail, and what waits for the next one |
//! ```

use super::SharedPositions;
use super::compact::copy_rows;
use super::merge::Merged;
use crate::backend::Backend;
use crate::device::encoding::Encoding;
use crate::device::factors::{BASIS_PAD, Basis, Factors};
use crate::device::page::{HeadRows, PageLayout, Segment, Side};
use crate::error::{DeviceError, KernelError};
use crate::kernel::gather;
use crate::view::DType;
use std::ops::Range;
use std::sync::Arc;

/// Entries of a page of which at most one side lies in it.
pub const FACTORED_ENTRIES: usize = 1024;

/// Latent rows of a page, at most.
const LATENT_ROWS: usize = 256;

/// A matrix of latent rows, `[rows, rank]`, or none where the rank is 0.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The rows, dense.
    pub rows: &'a [f32],
    /// Their length.
    pub rank: usize,
}

/// How the pages of a head lie whose entries are made of factors: as exact ones, but for the factored sides.
pub fn factored_layout(exact: &PageLayout, keys: bool, values: bool) -> PageLayout {
    let side = |factored, encoding| if factored { Encoding::Factored } else { encoding };
    PageLayout {
        capacity: FACTORED_ENTRIES,
        k: side(keys, exact.k),
        v: side(values, exact.v),
        steady: true,
        ..exact.clone()
    }
}

/// Stores latent rows.
///
/// # Errors
/// [`DeviceError`].
pub fn latents(
    backend: &dyn Backend,
    count: usize,
    (keys, key_type): (Matrix<'_>, DType),
    (values, value_type): (Matrix<'_>, DType),
) -> Result<Segment, DeviceError> {
    // As few pages as there must be, equally long.
    let capacity = count.div_ceil(count.div_ceil(LATENT_ROWS).max(1)).max(1);
    let layout = Arc::new(PageLayout {
        capacity,
        d_k: keys.rank,
        d_v: values.rank,
        k: key_type.into(),
        v: value_type.into(),
        mirrored: backend.mirrored(),
        column_words: 0,
        steady: true,
    });
    let mut segment = Segment { rows: count, ..Segment::new(Arc::clone(&layout)) };
    // Latent rows have no positions: one array of none for all pages.
    let mut none = None;
    for first in (0..count).step_by(capacity) {
        let end = (first + capacity).min(count);
        let mut page = backend.allocate(&layout)?;
        let part = |rank: usize| first * rank..end * rank;
        let (keys, values) = (&keys.rows[part(keys.rank)], &values.rows[part(values.rank)]);
        backend.write_rows(&layout, &mut page, 0, keys, values)?;
        page.positions = Arc::clone(none.get_or_insert_with(|| Arc::clone(&page.positions)));
        segment.pages.push(Arc::new(page));
    }
    Ok(segment)
}

/// Stores a basis, `[rank, d]` dense.
///
/// # Errors
/// [`DeviceError`].
pub fn basis(backend: &dyn Backend, rows: &[f32], d: usize, dtype: DType) -> Result<Basis, DeviceError> {
    let padded = d.next_multiple_of(BASIS_PAD);
    let layout = Arc::new(PageLayout {
        capacity: rows.len() / d,
        d_k: padded,
        d_v: 0,
        k: dtype.into(),
        v: DType::F32.into(),
        mirrored: backend.mirrored(),
        column_words: 0,
        steady: true,
    });
    let mut wide = vec![0.0; layout.capacity * padded];
    wide.chunks_exact_mut(padded).zip(rows.chunks_exact(d)).for_each(|(w, row)| w[..d].copy_from_slice(row));
    let mut page = backend.allocate(&layout)?;
    backend.write_rows(&layout, &mut page, 0, &wide, &[])?;
    Ok(Basis { layout, page: Arc::new(page) })
}

/// Puts entries made of `factors` in the place of the exact ones at `slots`, which lie in the last run of pages of the
/// layout `exact`. What stands before and behind them in that run stays exact.
///
/// # Errors
/// [`KernelError`]; the head is then as before.
pub fn factorise(
    backend: &dyn Backend,
    exact: &Arc<PageLayout>,
    head: &mut HeadRows,
    slots: Range<usize>,
    factors: Factors,
    shared: &mut SharedPositions,
) -> Result<(), KernelError> {
    let count = head.segments.iter().rev().take_while(|s| s.layout == *exact && s.factors.is_none()).count();
    let (before, run) = head.segments.split_at(head.segments.len() - count);
    let first: usize = before.iter().map(|s| s.rows).sum();
    let source = HeadRows::new(run.to_vec());
    let (rows, local) = (source.rows(), slots.start - first..slots.end - first);
    let mut segments = before.to_vec();
    let merged = Merged::default();
    let mut keep = |slots: Range<usize>, layout: &Arc<PageLayout>| -> Result<Option<Segment>, KernelError> {
        if slots.is_empty() {
            return Ok(None);
        }
        let slots: Vec<u32> = slots.map(|slot| slot as u32).collect();
        let pages = copy_rows(backend, &source, &slots, layout, &merged, shared)?;
        Ok(Some(Segment { pages, rows: slots.len(), ..Segment::new(Arc::clone(layout)) }))
    };
    // The few entries before have pages of their size.
    let few = Arc::new(PageLayout { capacity: local.start.clamp(1, exact.capacity), ..(**exact).clone() });
    segments.extend(keep(0..local.start, &few)?);
    let behind = keep(local.end..rows, exact)?;
    let layout = Arc::new(factored_layout(exact, factors.keys.is_some(), factors.values.is_some()));
    let slots: Vec<u32> = local.map(|slot| slot as u32).collect();
    segments.push(products(backend, &source, &slots, layout, factors, shared)?);
    segments.extend(behind);
    head.segments = segments;
    Ok(())
}

/// Some of the entries of a segment that is made of factors, by their slots in it. Latent rows that nothing is made of any
/// more stay as long as others of theirs do.
///
/// # Errors
/// [`KernelError`].
pub(super) fn keep(
    backend: &dyn Backend,
    segment: &Segment,
    keep: &[u32],
    shared: &mut SharedPositions,
) -> Result<Segment, KernelError> {
    let Some(factors) = segment.factors.as_deref() else { unreachable!("the segment is made of factors") };
    let rows = keep.iter().map(|&slot| factors.latent(slot as usize) as u32).collect();
    let factors = Factors { rows: Some(rows), ..factors.clone() };
    let source = HeadRows::new(vec![segment.clone()]);
    products(backend, &source, keep, Arc::clone(&segment.layout), factors, shared)
}

/// The segment of entries made of factors, with what pages hold of them besides.
fn products(
    backend: &dyn Backend,
    source: &HeadRows,
    slots: &[u32],
    layout: Arc<PageLayout>,
    factors: Factors,
    shared: &mut SharedPositions,
) -> Result<Segment, KernelError> {
    let mut pages = Vec::with_capacity(slots.len().div_ceil(layout.capacity));
    for _ in 0..slots.len().div_ceil(layout.capacity) {
        pages.push(backend.allocate(&layout)?);
    }
    gather::copy_metadata(source, slots, &layout, &mut pages);
    for (page, slots) in pages.iter_mut().zip(slots.chunks(layout.capacity)) {
        if layout.encoding(Side::Key).exact().is_some() || layout.encoding(Side::Value).exact().is_some() {
            let (mut keys, mut values) =
                (vec![0.0; slots.len() * layout.d_k], vec![0.0; slots.len() * layout.d_v]);
            let target = gather::GatherTarget::Dense { keys: &mut keys, values: &mut values };
            backend.gather(&mut gather::GatherArgs { head: source, slots, target })?;
            backend.write_rows(&layout, page, 0, &keys, &values)?;
        } else {
            backend.sync_metadata(&layout, page, 0..slots.len())?;
        }
        shared.share(&layout, page, slots.len());
    }
    let pages = pages.into_iter().map(Arc::new).collect();
    Ok(Segment { pages, rows: slots.len(), factors: Some(Arc::new(factors)), ..Segment::new(layout) })
}
