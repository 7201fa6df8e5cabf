//! Packed rows back into numbers: what [`crate::device::encoding`] describes, a tile at a time.
//!
//! Codes are spread into bytes, turned into levels (a subtraction, or a table in a register) and only then widened,
//! so that all formats share one loop. Rows stay in the space they were packed in: who multiplies them with a query
//! rotates the query instead. *Helps* every kernel read packed pages through the code it has for exact ones.
//! *Hurts* decode with few query rows, where widening costs as much as the products.

use super::gemm::PAD;
use super::take;
use super::tile::TILE;
use crate::device::encoding::PackedRows;
use bytemuck::{cast_slice, cast_slice_mut};
use fearless_simd::{Simd, SimdBase};

/// Bytes of the widest vector: levels are computed for whole vectors.
const BYTES: usize = 64;

/// Memory to decode a tile into.
#[derive(Debug)]
pub(crate) struct UnpackScratch<'a> {
    /// `[TILE, d padded]`.
    rows: &'a mut [f32],
    /// Scale, minimum and mean of each element of a row.
    scales: &'a mut [f32],
    mins: &'a mut [f32],
    means: &'a mut [f32],
    /// Levels of a row: bytes.
    levels: &'a mut [f32],
}

impl<'a> UnpackScratch<'a> {
    /// Floats it takes for rows of up to `d` elements.
    pub(crate) fn len(d: usize) -> usize {
        let padded = d.next_multiple_of(BYTES);
        (TILE + 3) * padded + padded / 4
    }

    /// Cuts it out of the front of `memory`.
    pub(crate) fn cut(memory: &mut &'a mut [f32], d: usize) -> Self {
        let padded = d.next_multiple_of(BYTES);
        Self {
            rows: take(memory, TILE * padded),
            scales: take(memory, padded),
            mins: take(memory, padded),
            means: take(memory, padded),
            levels: take(memory, padded / 4),
        }
    }

    /// The rows last decoded.
    pub(crate) fn rows(&self) -> &[f32] {
        self.rows
    }

    /// Decodes rows `from .. from + len`, still rotated if they were packed so. Gives their stride.
    #[inline(always)]
    pub(crate) fn decode<S: Simd>(
        &mut self,
        simd: S,
        packed: &PackedRows<'_>,
        from: usize,
        len: usize,
    ) -> usize {
        let layout = packed.layout;
        let (d, stride) = (layout.d, layout.d.next_multiple_of(PAD));
        let means = &mut self.means[..d];
        means.iter_mut().enumerate().for_each(|(c, m)| *m = packed.mean(c));
        simd.vectorize(
            #[inline(always)]
            || {
                for i in 0..len {
                    let row = from + i;
                    let levels: &mut [i8] = cast_slice_mut(self.levels);
                    spread(simd, packed, row, levels);
                    let out = &mut self.rows[i * stride..][..d];
                    if layout.group_dims == 1 {
                        if i == 0 || row.is_multiple_of(layout.group_rows) {
                            for c in 0..d {
                                (self.scales[c], self.mins[c]) = packed.parameters(layout.group(row, c));
                            }
                        }
                        let (scales, mins) = (&self.scales[..d], &self.mins[..d]);
                        for c in 0..d {
                            out[c] = f32::from(levels[c]) * scales[c] + mins[c] + means[c];
                        }
                        continue;
                    }
                    let groups = out.chunks_mut(layout.group_dims).zip(levels.chunks(layout.group_dims));
                    let mut first = 0;
                    for (out, levels) in groups {
                        let (scale, min) = packed.parameters(layout.group(row, first));
                        let means = &means[first..first + out.len()];
                        first += out.len();
                        for c in 0..out.len() {
                            out[c] = f32::from(levels[c]) * scale + min + means[c];
                        }
                    }
                }
            },
        );
        stride
    }
}

/// The levels of a row, in order; what follows up to the next whole vector is unspecified.
#[inline(always)]
fn spread<S: Simd>(simd: S, packed: &PackedRows<'_>, row: usize, out: &mut [i8]) {
    let format = packed.layout.packing.format;
    let out = &mut out[..packed.layout.padded().next_multiple_of(S::u8s::LEN)];
    match *format.planes() {
        [8] => {
            // Less 128, in bytes.
            for (level, code) in out.iter_mut().zip(packed.plane_row(0, row)) {
                *level = (code ^ 0x80) as i8;
            }
            return;
        }
        [width] => codes(packed.plane_row(0, row), width, 0, out),
        [low, high] => {
            codes(packed.plane_row(0, row), low, 0, out);
            codes(packed.plane_row(1, row), high, low, out);
        }
        _ => unreachable!("codes have one or two planes"),
    }
    if format.lloyd().is_some() {
        let mut table = [0u8; 16];
        for (code, level) in table.iter_mut().enumerate().take(1 << format.bits()) {
            *level = format.level(code as u8) as u8;
        }
        let table = S::u8s::block_splat(fearless_simd::u8x16::from_slice(simd, &table));
        for chunk in out.chunks_exact_mut(S::u8s::LEN) {
            let codes = S::u8s::from_slice(simd, cast_slice(chunk));
            table.swizzle_dyn_within_blocks(codes).store_slice(cast_slice_mut(chunk));
        }
    } else if format.zero() > 0 {
        for level in out {
            *level = level.wrapping_sub(format.zero() as i8);
        }
    }
}

/// Puts the fields of a plane's row into bytes, from bit `to` up; `to = 0` overwrites.
#[inline(always)]
fn codes(plane: &[u8], width: usize, to: usize, out: &mut [i8]) {
    let mask = ((1u16 << width) - 1) as u8;
    for (field, out) in out.chunks_mut(plane.len()).take(8 / width).enumerate() {
        for (out, byte) in out.iter_mut().zip(plane) {
            let code = ((byte >> (field * width)) & mask) << to;
            *out = if to == 0 { code as i8 } else { *out | code as i8 };
        }
    }
}
