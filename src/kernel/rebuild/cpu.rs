//! Sixty-four latent rows at a time, as one product of matrices.
//!
//! Rows go to the threads in blocks of that many. Every element is summed over the latent dimensions in their order
//! whatever the block, so a row has the same bits wherever it is made. *Helps* because the basis, which fills the second
//! cache level, is read once per block. *Hurts* single rows, which read all of it for themselves.

use super::RebuildArgs;
use crate::device::factors::{BASIS_PAD, Basis, Factors};
use crate::device::page::{Rows, Segment, Side};
use crate::error::KernelError;
use crate::kernel::simd::gemm::{Matrix, PAD, multiply};
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::widen::widen;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;
use std::ops::Range;

/// Rows that are made together.
pub(in crate::kernel) const BLOCK: usize = 64;

/// See [`super`].
///
/// # Errors
/// As [`RebuildArgs::validate`].
pub fn run(exec: &Exec, args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let Some(first) = args.head.segments.first() else { return Ok(()) };
    let dims = [first.layout.d_k, first.layout.d_v];
    let (mut all, mut keys, mut values) = (args.slots, &mut *args.keys, &mut *args.values);
    for (segment, factors, run) in args.head.factored() {
        let (slots, rest) = all.split_at(all.partition_point(|&slot| (slot as usize) < run.end));
        all = rest;
        let (keys, values) =
            (take(&mut keys, slots.len() * dims[0]), take(&mut values, slots.len() * dims[1]));
        let rank = |side| factors.basis(side).map_or(1, Basis::rank);
        let work = rank(Side::Key) * dims[0] + rank(Side::Value) * dims[1];
        let tasks = exec.tasks(slots.len() * work);
        let work = Entries { exec, segment, factors, run, slots, dims, keys, values };
        exec.run(tasks, || work.spread(tasks));
    }
    Ok(())
}

/// Some entries of one segment.
struct Entries<'a> {
    exec: &'a Exec,
    segment: &'a Segment,
    factors: &'a Factors,
    run: Range<usize>,
    slots: &'a [u32],
    dims: [usize; 2],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Split for Entries<'_> {
    fn pieces(&self) -> usize {
        self.slots.len().div_ceil(BLOCK)
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (slots, rest) = self.slots.split_at(at * BLOCK);
        let keys = take(&mut self.keys, slots.len() * self.dims[0]);
        let values = take(&mut self.values, slots.len() * self.dims[1]);
        let run = self.run.clone();
        (Entries { slots, keys, values, run, ..self }, Entries { slots: rest, ..self })
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => self.make(simd));
    }
}

impl Entries<'_> {
    #[inline(always)]
    fn make<S: Simd>(self, simd: S) {
        let mut latents = Vec::new();
        let mut entries = Vec::with_capacity(BLOCK);
        for (side, d, out) in [(Side::Key, self.dims[0], self.keys), (Side::Value, self.dims[1], self.values)]
        {
            let stride = d.next_multiple_of(BASIS_PAD);
            let mut rows = vec![0.0; BLOCK * stride];
            for (slots, out) in self.slots.chunks(BLOCK).zip(out.chunks_mut((BLOCK * d).max(1))) {
                entries.clear();
                entries.extend(slots.iter().map(|&slot| slot as usize - self.run.start));
                dense(simd, (self.segment, self.factors), side, &entries, &mut latents, (&mut rows, stride));
                for (row, out) in rows.chunks_exact(stride.max(1)).zip(out.chunks_exact_mut(d.max(1))) {
                    out.copy_from_slice(&row[..d]);
                }
            }
        }
    }
}

/// Rows of up to [`BLOCK`] entries of a segment, a `stride` apart, which is a multiple of [`BASIS_PAD`]; `latents` is lent.
#[inline(always)]
pub(in crate::kernel) fn dense<S: Simd>(
    simd: S,
    (segment, factors): (&Segment, &Factors),
    side: Side,
    entries: &[usize],
    latents: &mut Vec<f32>,
    (rows, stride): (&mut [f32], usize),
) {
    let (layout, capacity) = (&*segment.layout, segment.layout.capacity);
    let d = layout.dim(side);
    let Some(basis) = factors.basis(side) else {
        for (&entry, row) in entries.iter().zip(rows.chunks_exact_mut(stride.max(1))) {
            let stored = layout.rows(&segment.pages[entry / capacity], side);
            widen(simd, stored, entry % capacity * layout.row_stride(side), &mut row[..d]);
        }
        return;
    };
    let rank = basis.rank();
    latents.resize((entries.len() * rank).max(latents.len()), 0.0);
    latent_rows(simd, factors, side, entries, (latents, rank));
    let a = Matrix { data: &latents[..], stride: rank };
    times_basis(simd, a, basis, (entries.len(), d), (rows, stride), false);
    if let (Side::Key, Some(kept)) = (side, &factors.kept) {
        let layout = &*kept.keys.layout;
        for (&entry, row) in entries.iter().zip(rows.chunks_exact_mut(stride)) {
            if let Some(at) = kept.find(factors.latent(entry)) {
                let stored = layout.rows(&kept.keys.pages[at / layout.capacity], Side::Key);
                widen(simd, stored, at % layout.capacity * layout.row_stride(Side::Key), &mut row[..d]);
            }
        }
    }
    if let (Side::Key, Some(angles)) = (side, &factors.angles) {
        for (&entry, row) in entries.iter().zip(rows.chunks_exact_mut(stride)) {
            angles.turn(segment.pages[entry / capacity].positions[entry % capacity], &mut row[..d], false);
        }
    }
}

/// Latent rows of entries, a `stride` apart.
#[inline(always)]
pub(in crate::kernel) fn latent_rows<S: Simd>(
    simd: S,
    factors: &Factors,
    side: Side,
    entries: &[usize],
    (out, stride): (&mut [f32], usize),
) {
    let layout = &*factors.latents.layout;
    let (capacity, step, rank) = (layout.capacity, layout.row_stride(side), layout.dim(side));
    for (&entry, out) in entries.iter().zip(out.chunks_exact_mut(stride)) {
        let latent = factors.latent(entry);
        let stored = layout.rows(&factors.latents.pages[latent / capacity], side);
        widen(simd, stored, latent % capacity * step, &mut out[..rank]);
    }
}

/// Rows of `rank` elements times a basis: `[rows, d]`, a `stride` apart, or added to what is there.
#[inline(always)]
pub(in crate::kernel) fn times_basis<S: Simd>(
    simd: S,
    a: Matrix<&[f32]>,
    basis: &Basis,
    (rows, d): (usize, usize),
    (out, stride): (&mut [f32], usize),
    add: bool,
) {
    const { assert!(BASIS_PAD.is_multiple_of(PAD)) };
    let (layout, extent) = (&*basis.layout, (rows, basis.rank(), d));
    let step = layout.row_stride(Side::Key);
    match layout.rows(&basis.page, Side::Key) {
        Rows::F32(data) => {
            multiply(simd, a, Matrix { data, stride: step }, out, stride, extent, add, Ahead::NONE);
        }
        Rows::F16(data) => {
            multiply(simd, a, Matrix { data, stride: step }, out, stride, extent, add, Ahead::NONE);
        }
        Rows::Bf16(data) => {
            multiply(simd, a, Matrix { data, stride: step }, out, stride, extent, add, Ahead::NONE);
        }
        Rows::Packed(_) => unreachable!("a basis is exact"),
    }
}
