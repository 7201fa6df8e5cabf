//! Caches described as data and built on any backend: the same entries in pages of the reference and of the
//! backend under test.
//!
//! *Helps* because a description is small enough to print when a case fails. *Hurts* nothing.

use super::random::{Random, round_to};
use crate::backend::Backend;
use crate::device::page::{HeadRows, PageLayout, Segment};
use crate::device::{Encoding, Format, Packing};
use crate::error::KernelError;
use crate::kernel::code_scores::CodeLayout;
use crate::kernel::pack::PackArgs;
use crate::view::DType;
use std::sync::Arc;

/// Written over every output before a kernel runs: a NaN that no arithmetic here produces.
pub const POISON: f32 = f32::from_bits(0x7fc0_dead);

/// Whether a value was never written.
pub fn is_poison(x: f32) -> bool {
    x.to_bits() == POISON.to_bits()
}

/// A poisoned buffer.
pub fn poisoned(len: usize) -> Vec<f32> {
    vec![POISON; len]
}

/// Every packed format, as it is and with both treatments of rows.
pub fn packings() -> Vec<Packing> {
    let plain = |format| Packing { format, center: false, hadamard: false };
    Format::ALL.into_iter().flat_map(|f| [plain(f), plain(f).centered().rotated()]).collect()
}

/// A run of entries.
#[derive(Clone, Copy, Debug)]
pub struct SegmentSpec {
    /// Entries.
    pub rows: usize,
    /// Entries per page.
    pub capacity: usize,
    /// How keys are stored.
    pub k: Encoding,
    /// How values are stored.
    pub v: Encoding,
}

impl SegmentSpec {
    /// A run of `f32` entries.
    pub fn f32(rows: usize, capacity: usize) -> Self {
        Self::stored(rows, capacity, DType::F32, DType::F32)
    }

    /// A run of entries stored so.
    pub fn stored(rows: usize, capacity: usize, k: impl Into<Encoding>, v: impl Into<Encoding>) -> Self {
        Self { rows, capacity, k: k.into(), v: v.into() }
    }
}

/// What is stored, without saying where.
#[derive(Clone, Debug)]
pub struct CacheSpec {
    /// Seed of all data.
    pub seed: u64,
    /// Key dimension.
    pub d_k: usize,
    /// Value dimension.
    pub d_v: usize,
    /// Segments of each KV head.
    pub heads: Vec<Vec<SegmentSpec>>,
    /// Whether half of the pages carry β, `−∞` among them.
    pub bias: bool,
    /// Whether positions have gaps, as after interior evictions.
    pub gaps: bool,
    /// Standard deviation of key elements.
    pub key_scale: f32,
    /// Words of column data per entry.
    pub column_words: usize,
    /// Whether the pages lie where those of a cache lie that evicts nothing: in huge pages of the system.
    pub steady: bool,
}

impl CacheSpec {
    /// Heads of one `f32` segment each, in pages of `capacity`.
    pub fn f32(seed: u64, d: usize, rows: &[usize], capacity: usize) -> Self {
        Self {
            seed,
            d_k: d,
            d_v: d,
            heads: rows.iter().map(|&n| vec![SegmentSpec::f32(n, capacity)]).collect(),
            bias: false,
            gaps: false,
            key_scale: 1.0,
            column_words: 0,
            steady: false,
        }
    }

    /// The same, stored otherwise.
    #[must_use]
    pub fn typed(mut self, k: impl Into<Encoding>, v: impl Into<Encoding>) -> Self {
        let (k, v) = (k.into(), v.into());
        for segment in self.heads.iter_mut().flatten() {
            (segment.k, segment.v) = (k, v);
        }
        self
    }

    /// The same in pages that stay.
    #[must_use]
    pub fn steady(self) -> Self {
        Self { steady: true, ..self }
    }

    /// Entries of each head.
    pub fn rows(&self) -> Vec<usize> {
        self.heads.iter().map(|h| h.iter().map(|s| s.rows).sum()).collect()
    }

    /// Stores the entries on `backend`. Rows beyond those in use are filled with large garbage, so that a
    /// kernel reading past the end shows.
    ///
    /// # Errors
    /// What the backend's page operations fail with.
    pub fn build(&self, backend: &dyn Backend) -> Result<Vec<HeadRows>, KernelError> {
        let mut heads = Vec::with_capacity(self.heads.len());
        for (h, specs) in self.heads.iter().enumerate() {
            let mut random = Random::new(self.seed ^ (h as u64).wrapping_mul(0xa076_1d64_78bd_642f));
            let mut position = if self.gaps { random.below(5) as i32 } else { 0 };
            let mut segments = Vec::with_capacity(specs.len());
            for spec in specs {
                segments.push(self.build_segment(backend, spec, &mut random, &mut position)?);
            }
            heads.push(HeadRows::new(segments));
        }
        Ok(heads)
    }

    fn build_segment(
        &self,
        backend: &dyn Backend,
        spec: &SegmentSpec,
        random: &mut Random,
        position: &mut i32,
    ) -> Result<Segment, KernelError> {
        let layout = Arc::new(PageLayout {
            capacity: spec.capacity,
            d_k: self.d_k,
            d_v: self.d_v,
            k: spec.k,
            v: spec.v,
            mirrored: backend.mirrored(),
            column_words: self.column_words,
            steady: self.steady,
        });
        let mut segment = Segment::new(layout.clone());
        while segment.rows < spec.rows {
            let used = (spec.rows - segment.rows).min(spec.capacity);
            let mut page = backend.allocate(&layout)?;
            for p in page.positions_mut().iter_mut().take(used) {
                *p = *position;
                *position += 1 + if self.gaps && random.one_in(3) { random.below(9) as i32 } else { 0 };
            }
            // Garbage positions that every query would see.
            page.positions_mut()[used..].fill(0);
            let with_bias = random.one_in(2);
            if self.bias && with_bias {
                let bias: Vec<f32> = (0..spec.capacity)
                    .map(|i| match random.below(8) {
                        0 if i < used => f32::NEG_INFINITY,
                        1 | 2 => 0.0,
                        _ => random.normal(),
                    })
                    .collect();
                page.bias = Some(bias.into());
            }
            page.columns.iter_mut().for_each(|w| *w = random.bits() as u32);
            // Exact elements of a row are numbers of their type, so that storing them rounds nothing.
            let (k, v) = (spec.k.exact().unwrap_or(DType::F32), spec.v.exact().unwrap_or(DType::F32));
            let mut keys = random.rows(spec.capacity * self.d_k, self.key_scale, k);
            let mut values = random.rows(spec.capacity * self.d_v, 1.0, v);
            if spec.k.exact().is_none() || spec.v.exact().is_none() {
                let (keys, values) = (&keys[..used * self.d_k], &values[..used * self.d_v]);
                backend.pack(&mut PackArgs { layout: &layout, page: &mut page, keys, values })?;
            } else {
                keys[used * self.d_k..].fill(round_to(k, 3e4));
                values[used * self.d_v..].fill(round_to(v, 3e4));
                // In two calls, so that a first row other than 0 is met.
                let first = used / 2;
                let (k, v) = (first * self.d_k, first * self.d_v);
                backend.write_rows(&layout, &mut page, 0, &keys[..k], &values[..v])?;
                backend.write_rows(&layout, &mut page, first, &keys[k..], &values[v..])?;
            }
            backend.sync_metadata(&layout, &mut page, 0..spec.capacity)?;
            segment.pages.push(Arc::new(page));
            segment.rows += used;
        }
        Ok(segment)
    }
}

/// Heads of random codes, of so many entries each, in pages of `capacity`. Every bit of a page is random, also those that
/// belong to no index and to no entry.
///
/// # Errors
/// What the backend's page operations fail with.
pub fn codes(
    backend: &dyn Backend,
    seed: u64,
    layout: CodeLayout,
    rows: &[usize],
    capacity: usize,
) -> Result<Vec<HeadRows>, KernelError> {
    let layout = Arc::new(layout.page(capacity, backend.mirrored(), 0));
    let mut random = Random::new(seed);
    let mut heads = Vec::with_capacity(rows.len());
    for &rows in rows {
        let mut segment = Segment { rows, ..Segment::new(Arc::clone(&layout)) };
        for _ in 0..rows.div_ceil(capacity) {
            let mut page = backend.allocate(&layout)?;
            let words: Vec<u32> = (0..capacity * layout.d_k).map(|_| random.bits() as u32).collect();
            backend.write_rows(&layout, &mut page, 0, bytemuck::cast_slice(&words), &[])?;
            segment.pages.push(Arc::new(page));
        }
        heads.push(HeadRows::new(vec![segment]));
    }
    Ok(heads)
}

/// The first position after every stored one, over all heads.
pub fn end_position(heads: &[HeadRows]) -> i32 {
    heads
        .iter()
        .flat_map(HeadRows::pages)
        .filter_map(|p| p.positions().last().copied())
        .max()
        .map_or(0, |p| p + 1)
}
