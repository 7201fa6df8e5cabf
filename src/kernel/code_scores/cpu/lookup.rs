//! Codes of any width, looked up in memory.
//!
//! The tables of four query rows lie side by side, so that one load finds the numbers of all of them; those of a single row
//! are read as they came. *Helps* codes of many levels, whose tables fit the second cache level at least. *Hurts* by the
//! latency of that level where they do not fit the first.

use super::{LANES, QUAD, Strip};
use crate::kernel::code_scores::CodeLayout;
use crate::kernel::simd::take;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, f32x4};

/// Floats of the sums of a block: they stay in the first cache level.
pub(super) const SCRATCH: usize = QUAD * LANES;

/// Scores of a strip.
#[inline(always)]
pub(super) fn strip<S: Simd>(simd: S, mut strip: Strip<'_>, mut scratch: &mut [f32]) {
    let (layout, table) = (strip.context.layout, strip.context.table());
    let copies: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, layout.words() * LANES));
    let sums: &mut [[f32; QUAD]] = bytemuck::cast_slice_mut(&mut scratch[..SCRATCH]);
    let mut blocks = strip.blocks();
    while let Some((codes, at)) = blocks.next(LANES, copies) {
        let quads = strip.shaped.chunks_exact(strip.context.quad_len());
        let tables = strip.tables.chunks(QUAD * table).zip(quads);
        for ((tables, quad), out) in tables.zip(strip.out[..strip.rows].chunks_mut(QUAD)) {
            if let [out] = out {
                one(layout, strip.context.levels, tables, codes, &mut out[at.clone()]);
            } else {
                let quad = bytemuck::cast_slice(&quad[..QUAD * table]);
                four(simd, layout, strip.context.levels, quad, codes, &mut sums[..at.len()]);
                spread(simd, sums, out, at.start, at.len());
            }
        }
    }
}

/// Scores of one query row.
#[inline(always)]
fn one(layout: CodeLayout, levels: usize, tables: &[f32], codes: &[u32], out: &mut [f32]) {
    let (words, mask) = (layout.words(), u32::from(layout.mask()));
    for (m, table) in tables.chunks_exact(levels).enumerate() {
        let (word, shift) = layout.place(m);
        for (row, out) in codes.chunks_exact(words).zip(out.iter_mut()) {
            let found = table[((row[word] >> shift & mask) as usize).min(levels - 1)];
            *out = if m == 0 { found } else { *out + found };
        }
    }
}

/// Scores of four query rows, entry by entry.
#[inline(always)]
fn four<S: Simd>(
    simd: S,
    layout: CodeLayout,
    levels: usize,
    tables: &[[f32; QUAD]],
    codes: &[u32],
    sums: &mut [[f32; QUAD]],
) {
    let (words, mask) = (layout.words(), u32::from(layout.mask()));
    for (m, table) in tables.chunks_exact(levels).enumerate() {
        let (word, shift) = layout.place(m);
        for (row, sum) in codes.chunks_exact(words).zip(sums.iter_mut()) {
            let found = &table[((row[word] >> shift & mask) as usize).min(levels - 1)];
            if m == 0 {
                *sum = *found;
            } else {
                let found: f32x4<S> = f32x4::load_array_ref(simd, found);
                (f32x4::load_array_ref(simd, sum) + found).store_array(sum);
            }
        }
    }
}

/// Scores of up to four query rows from where they lie entry by entry to where they lie row by row.
#[inline(always)]
fn spread<S: Simd>(simd: S, sums: &[[f32; QUAD]], out: &mut [&mut [f32]], at: usize, len: usize) {
    let (quads, rest) = sums[..len].as_chunks::<QUAD>();
    for (i, quad) in quads.iter().enumerate() {
        let rows = f32x4::load_four_interleaved(simd, quad.as_flattened());
        for (row, out) in rows.iter().zip(out.iter_mut()) {
            row.store_slice(&mut out[at + QUAD * i..][..QUAD]);
        }
    }
    let from = at + len - rest.len();
    for (i, sums) in rest.iter().enumerate() {
        for (sum, out) in sums.iter().zip(out.iter_mut()) {
            out[from + i] = *sum;
        }
    }
}
