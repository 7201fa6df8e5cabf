//! Packed rows back into numbers, a tile at a time: what [`crate::device::encoding`] describes.
//!
//! Codes are spread into bytes and turned into levels by a subtraction or a table in a register. Where a row has one
//! scale and one minimum that is all that happens to its elements: the levels are multiplied with queries and
//! weights as they are, and scale, minimum and mean are applied to the products, `TILE` of them instead of
//! `TILE · d` elements: in integers ([`super::integer`]) where that pays and the query rows are few, else widened while
//! they are loaded. Formats with more parameters are widened to `f32` rows. All of it stays in the space the rows
//! were packed in: who multiplies them with a query rotates the query instead.
//!
//! *Helps* every kernel read packed pages through the code it has for exact ones. *Hurts* formats with a scale per 32
//! elements or per channel, which pay for widening.

use super::gemm::{Matrix, PAD};
use super::integer::Quads;
use super::math::{add_scaled, dot, sum};
use super::tile::{BLOCK, TILE};
use super::widen::{Source, widen};
use super::{quads, take};
use crate::device::encoding::{Format, GROUP, PackedRows};
use crate::device::page::{Rows, Side};
use bytemuck::{cast_slice, cast_slice_mut};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16, u8x32, u8x64};

/// Bytes of the widest vector: levels are computed for whole vectors.
const BYTES: usize = 64;

/// Memory to unpack a tile into.
#[derive(Debug)]
pub(crate) struct UnpackScratch<'a> {
    /// `[TILE, d padded]`.
    rows: &'a mut [f32],
    /// Levels, `[TILE, d padded]` bytes.
    levels: &'a mut [f32],
    /// Parameters of a tile's rows, or of a row's elements, as stored.
    pairs: &'a mut [f32],
    /// Scales and minimums of a tile's rows, or of a row's elements.
    scales: &'a mut [f32],
    mins: &'a mut [f32],
    /// Of a row's elements.
    means: &'a mut [f32],
    /// `[BLOCK, TILE]`.
    weights: &'a mut [f32],
}

/// What turns levels into elements where a row has one scale and one minimum: element `c` of row `j` is
/// `level[j,c] · scale[j] + min[j] + mean[c]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowScales<'s> {
    /// `TILE` long, 0 behind the tile's last row.
    scales: &'s [f32],
    /// As `scales`, if the format has minimums.
    mins: Option<&'s [f32]>,
    /// `d` long, if rows were centred.
    means: Option<&'s [f32]>,
}

impl RowScales<'_> {
    /// Turns dot products with levels into dot products with rows: `· scale[j] + min[j] Σq + q·mean`.
    #[inline(always)]
    pub(crate) fn finish_dots<S: Simd>(
        &self,
        simd: S,
        queries: Matrix<&[f32]>,
        (rows, d, len): (usize, usize, usize),
        scores: &mut [f32],
    ) {
        for row in 0..rows {
            let q = &queries.data[row * queries.stride..][..d];
            // No closures: they would be compiled without the level's instructions.
            let mut base = S::f32s::splat(simd, 0.0);
            if let Some(means) = self.means {
                base = S::f32s::splat(simd, dot(simd, q, means));
            }
            let mut total = base;
            if self.mins.is_some() {
                total = S::f32s::splat(simd, sum(simd, q));
            }
            let scores = &mut scores[row * TILE..][..len.next_multiple_of(S::f32s::LEN)];
            for (i, x) in scores.chunks_exact_mut(S::f32s::LEN).enumerate() {
                let at = i * S::f32s::LEN;
                let mut offset = base;
                if let Some(mins) = self.mins {
                    offset = S::f32s::from_slice(simd, &mins[at..at + S::f32s::LEN]).mul_add(total, offset);
                }
                let scale = S::f32s::from_slice(simd, &self.scales[at..at + S::f32s::LEN]);
                S::f32s::from_slice(simd, x).mul_add(scale, offset).store_slice(x);
            }
        }
    }

    /// `scaled[row, j] = weights[row, j] · scale[j]`.
    #[inline(always)]
    pub(crate) fn scale_weights<S: Simd>(&self, simd: S, weights: &[f32], rows: usize, scaled: &mut [f32]) {
        for (w, out) in weights.chunks_exact(TILE).zip(scaled.chunks_exact_mut(TILE)).take(rows) {
            for ((w, s), out) in w
                .chunks_exact(S::f32s::LEN)
                .zip(self.scales.chunks_exact(S::f32s::LEN))
                .zip(out.chunks_exact_mut(S::f32s::LEN))
            {
                (S::f32s::from_slice(simd, w) * S::f32s::from_slice(simd, s)).store_slice(out);
            }
        }
    }

    /// Adds what minimums and mean contribute to the weighted sums: `Σ_j w[j] (min[j] + mean)`.
    #[inline(always)]
    pub(crate) fn finish_sums<S: Simd>(
        &self,
        simd: S,
        weights: &[f32],
        (rows, len): (usize, usize),
        sums: &mut [f32],
        padded: usize,
    ) {
        for (w, out) in weights.chunks_exact(TILE).zip(sums.chunks_exact_mut(padded)).take(rows) {
            let w = &w[..len];
            if let Some(mins) = self.mins {
                let offset = S::f32s::splat(simd, dot(simd, w, mins));
                for out in out.chunks_exact_mut(S::f32s::LEN) {
                    (S::f32s::from_slice(simd, out) + offset).store_slice(out);
                }
            }
            if let Some(means) = self.means {
                add_scaled(simd, &mut out[..means.len()], means, sum(simd, w));
            }
        }
    }
}

/// Whether a format's rows have one scale each.
pub(crate) const fn by_row(format: Format) -> bool {
    matches!(format, Format::Int8 | Format::Int4 | Format::Lm4 | Format::Lm3 | Format::Lm2)
}

impl<'a> UnpackScratch<'a> {
    /// Floats it takes for rows of up to `d` elements.
    pub(crate) fn len(d: usize) -> usize {
        let padded = d.next_multiple_of(BYTES);
        TILE * padded + TILE * padded / 4 + padded + 4 * Self::groups(d) + BLOCK * TILE
    }

    /// Groups whose parameters are unpacked at once: those of a tile, or the channels of a row.
    fn groups(d: usize) -> usize {
        (TILE * d.div_ceil(GROUP)).max(d.next_multiple_of(BYTES))
    }

    /// Cuts it out of the front of `memory`.
    pub(crate) fn cut(memory: &mut &'a mut [f32], d: usize) -> Self {
        let padded = d.next_multiple_of(BYTES);
        Self {
            rows: take(memory, TILE * padded),
            levels: take(memory, TILE * padded / 4),
            pairs: take(memory, 2 * Self::groups(d)),
            scales: take(memory, Self::groups(d)),
            mins: take(memory, Self::groups(d)),
            means: take(memory, padded),
            weights: take(memory, BLOCK * TILE),
        }
    }

    /// The rows last decoded.
    pub(crate) fn rows(&self) -> &[f32] {
        self.rows
    }

    #[inline(always)]
    fn means<S: Simd>(&mut self, simd: S, packed: &PackedRows<'_>) {
        let d = packed.layout.d;
        match packed.layout.packing.center {
            true => widen(simd, Rows::F16(packed.means()), 0, &mut self.means[..d]),
            false => self.means.fill(0.0),
        }
    }

    /// Scales and minimums of `count` groups from `first` on.
    #[inline(always)]
    fn parameters<S: Simd>(&mut self, simd: S, packed: &PackedRows<'_>, first: usize, count: usize) {
        let halves = packed.layout.group_halves();
        let pairs = &mut self.pairs[..count * halves];
        widen(simd, Rows::F16(packed.halves(first, count)), 0, pairs);
        if halves == 1 {
            self.scales[..count].copy_from_slice(pairs);
            self.mins[..count].fill(0.0);
            return;
        }
        for ((pair, scale), min) in pairs.chunks_exact(2).zip(&mut *self.scales).zip(&mut *self.mins) {
            (*scale, *min) = (pair[0], pair[1]);
        }
    }

    /// The scales of rows `from .. from + len`, the memory for levels and for their planes, and room for `[BLOCK, TILE]`
    /// weights.
    #[inline(always)]
    fn scales<S: Simd>(
        &mut self,
        simd: S,
        packed: &PackedRows<'_>,
        (from, len): (usize, usize),
    ) -> (RowScales<'_>, &mut [f32], &mut [f32], &mut [f32]) {
        let layout = packed.layout;
        self.parameters(simd, packed, from, len);
        self.scales[len..TILE].fill(0.0);
        self.mins[len..TILE].fill(0.0);
        if layout.packing.center {
            self.means(simd, packed);
        }
        let scales = RowScales {
            scales: &self.scales[..TILE],
            mins: layout.packing.format.has_min().then_some(&self.mins[..TILE]),
            means: layout.packing.center.then_some(&self.means[..layout.d]),
        };
        (scales, self.levels, self.rows, self.weights)
    }

    /// Levels of rows `from .. from + len` of a format with one scale per row, row `i` at `i * stride` and readable to
    /// whole vectors; their scales, and room for `[BLOCK, TILE]` weights.
    #[inline(always)]
    pub(crate) fn levels<'s, S: Simd>(
        &'s mut self,
        simd: S,
        packed: &PackedRows<'s>,
        from: usize,
        len: usize,
    ) -> (Matrix<&'s [i8]>, RowScales<'s>, &'s mut [f32]) {
        let layout = packed.layout;
        let (scales, levels, _, weights) = self.scales(simd, packed, (from, len));
        if layout.packing.format == Format::Int8 {
            // Bytes as they are.
            let data = cast_slice(&packed.plane_rows(0)[from * layout.padded()..]);
            return (Matrix { data, stride: layout.padded() }, scales, weights);
        }
        let stride = layout.padded().next_multiple_of(BYTES);
        let levels = &mut cast_slice_mut::<_, i8>(levels)[..len * stride];
        simd.vectorize(
            #[inline(always)]
            || spread(simd, layout.packing.format, 0, planes(packed, from, len), levels, stride),
        );
        (Matrix { data: &*levels, stride }, scales, weights)
    }

    /// The same by fours for [`super::integer`]: of keys four elements, of values four rows.
    #[inline(always)]
    pub(crate) fn quads<'s, S: Simd>(
        &'s mut self,
        simd: S,
        packed: &PackedRows<'s>,
        side: Side,
        (from, len): (usize, usize),
    ) -> (Quads<'s>, RowScales<'s>, &'s mut [f32]) {
        let (format, padded) = (packed.layout.packing.format, packed.layout.padded());
        let (scales, words, room, weights) = self.scales(simd, packed, (from, len));
        let words = cast_slice_mut::<_, u8>(words);
        // What is done to the rows of a plane, and how many rows it makes of how many bytes for one byte of them.
        let (count, unit) = match side {
            Side::Key => (1, TILE),
            Side::Value => (len.div_ceil(4), 4),
        };
        // Levels that may be negative are shifted.
        let zero = if format == Format::Int4 { 0 } else { 128 };
        simd.vectorize(
            #[inline(always)]
            || {
                let [first, second] = planes(packed, from, len);
                if format == Format::Int8 {
                    return quads::of(simd, side, first, len, zero, words);
                }
                let (low, high) = cast_slice_mut::<_, u8>(room).split_at_mut(TILE * first.1);
                quads::of(simd, side, first, len, 0, low);
                if second.1 > 0 {
                    quads::of(simd, side, second, len, 0, high);
                }
                let arranged = [
                    (&low[..count * unit * first.1], unit * first.1),
                    (&high[..count * unit * second.1], unit * second.1),
                ];
                let stride = unit * padded;
                let levels = &mut cast_slice_mut(words)[..count * stride];
                spread(simd, format, zero, arranged, levels, stride);
            },
        );
        let stride = match side {
            Side::Key => TILE,
            Side::Value => padded,
        };
        (Quads { words: cast_slice(words), stride, zero: i32::from(zero) }, scales, weights)
    }

    /// Decodes rows `from .. from + len` to `f32`. Gives their stride.
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
        let level_stride = layout.padded().next_multiple_of(BYTES);
        self.means(simd, packed);
        simd.vectorize(
            #[inline(always)]
            || {
                let levels = &mut cast_slice_mut(self.levels)[..len * level_stride];
                spread(simd, layout.packing.format, 0, planes(packed, from, len), levels, level_stride);
                let by_channel = layout.group_dims == 1;
                if !by_channel {
                    self.parameters(simd, packed, layout.group(from, 0), len * layout.row_groups());
                }
                for i in 0..len {
                    let row = from + i;
                    if by_channel && (i == 0 || row.is_multiple_of(layout.group_rows)) {
                        self.parameters(simd, packed, layout.group(row, 0), d);
                    }
                    let levels: &[i8] = &cast_slice(self.levels)[i * level_stride..][..level_stride];
                    let out = &mut self.rows[i * stride..][..stride];
                    let (lanes, means) = (S::f32s::LEN, &self.means[..stride]);
                    let part = |x: &[f32], at: usize| S::f32s::from_slice(simd, &x[at..at + lanes]);
                    if by_channel {
                        for at in (0..stride).step_by(lanes) {
                            let (scale, min) = (part(self.scales, at), part(self.mins, at));
                            let level = levels[at..at + lanes].vector(simd);
                            (level.mul_add(scale, min) + part(means, at))
                                .store_slice(&mut out[at..at + lanes]);
                        }
                        continue;
                    }
                    // Groups are whole vectors, but for the last of a row, behind which nothing is read.
                    let first = i * layout.row_groups();
                    for (group, start) in (0..stride).step_by(layout.group_dims).enumerate() {
                        let scale = S::f32s::splat(simd, self.scales[first + group]);
                        let min = S::f32s::splat(simd, self.mins[first + group]);
                        for at in (start..(start + layout.group_dims).min(stride)).step_by(lanes) {
                            let level = levels[at..at + lanes].vector(simd);
                            (level.mul_add(scale, min) + part(means, at))
                                .store_slice(&mut out[at..at + lanes]);
                        }
                    }
                }
            },
        );
        stride
    }
}

/// Rows `from .. from + len` of the planes of a format, each with the bytes of a row; 0 bytes if there is no second.
fn planes<'a>(packed: &PackedRows<'a>, from: usize, len: usize) -> [(&'a [u8], usize); 2] {
    let mut planes = [(&[][..], 0); 2];
    for (index, (plane, width)) in planes.iter_mut().zip(packed.layout.packing.format.planes()).enumerate() {
        let bytes = packed.layout.plane_row(*width);
        *plane = (&packed.plane_rows(index)[from * bytes..][..len * bytes], bytes);
    }
    planes
}

/// The levels of the rows of some planes, `flip` in every byte flipped, row `i` at `i * stride`; what follows a row up to
/// `stride` is unspecified.
#[inline(always)]
fn spread<S: Simd>(
    simd: S,
    format: Format,
    flip: u8,
    [first, second]: [(&[u8], usize); 2],
    out: &mut [i8],
    stride: usize,
) {
    let table = format.lloyd().map(|_| {
        let mut table = [0u8; 16];
        for (code, level) in table.iter_mut().enumerate().take(1 << format.bits()) {
            *level = format.level(code as u8) as u8 ^ flip;
        }
        S::u8s::block_splat(u8x16::from_slice(simd, &table))
    });
    match format.planes() {
        [8] => {
            let (codes, bytes) = first;
            for (row, out) in codes.chunks_exact(bytes).zip(out.chunks_exact_mut(stride)) {
                out[..bytes].copy_from_slice(cast_slice(row));
            }
        }
        [4] => fields::<S, 4, 0>(simd, first, out, stride),
        [2] => fields::<S, 2, 0>(simd, first, out, stride),
        [4, 1] => {
            fields::<S, 4, 0>(simd, first, out, stride);
            fields::<S, 1, 4>(simd, second, out, stride);
        }
        [2, 1] => {
            fields::<S, 2, 0>(simd, first, out, stride);
            fields::<S, 1, 2>(simd, second, out, stride);
        }
        _ => unreachable!("no format has other planes"),
    }
    if let Some(table) = table {
        for chunk in out.chunks_exact_mut(S::u8s::LEN) {
            let codes = S::u8s::from_slice(simd, cast_slice(chunk));
            table.swizzle_dyn_within_blocks(codes).store_slice(cast_slice_mut(chunk));
        }
    } else if format.zero() > 0 {
        let zero = S::u8s::splat(simd, format.zero());
        for chunk in out.chunks_exact_mut(S::u8s::LEN) {
            (S::u8s::from_slice(simd, cast_slice(chunk)) - zero).store_slice(cast_slice_mut(chunk));
        }
    }
}

/// Puts the `WIDTH`-bit fields of the rows of a plane into bytes, from bit `TO` up; 0 overwrites.
#[inline(always)]
fn fields<S: Simd, const WIDTH: usize, const TO: usize>(
    simd: S,
    (plane, bytes): (&[u8], usize),
    out: &mut [i8],
    stride: usize,
) {
    // The widest vector that divides a row.
    if bytes.is_multiple_of(64) && S::u8s::LEN >= 64 {
        wide_fields::<S, u8x64<S>, WIDTH, TO>(simd, (plane, bytes), out, stride);
    } else if bytes.is_multiple_of(32) && S::u8s::LEN >= 32 {
        wide_fields::<S, u8x32<S>, WIDTH, TO>(simd, (plane, bytes), out, stride);
    } else if bytes.is_multiple_of(16) {
        wide_fields::<S, u8x16<S>, WIDTH, TO>(simd, (plane, bytes), out, stride);
    } else {
        byte_fields::<WIDTH, TO>((plane, bytes), out, stride);
    }
}

#[inline(always)]
fn wide_fields<S: Simd, V, const WIDTH: usize, const TO: usize>(
    simd: S,
    (plane, bytes): (&[u8], usize),
    out: &mut [i8],
    stride: usize,
) where
    V: SimdBase<S, Element = u8>
        + std::ops::Shr<u32, Output = V>
        + std::ops::Shl<u32, Output = V>
        + std::ops::BitAnd<Output = V>
        + std::ops::BitOr<Output = V>,
{
    let mask = V::splat(simd, ((1u16 << WIDTH) - 1) as u8);
    for (row, out) in plane.chunks_exact(bytes).zip(out.chunks_exact_mut(stride)) {
        for (at, chunk) in row.chunks_exact(V::LEN).enumerate() {
            let packed = V::from_slice(simd, chunk);
            for field in 0..8 / WIDTH {
                let out: &mut [u8] = cast_slice_mut(&mut out[field * bytes + at * V::LEN..][..V::LEN]);
                let code = (packed >> (field * WIDTH) as u32) & mask;
                let code = if TO == 0 { code } else { V::from_slice(simd, out) | (code << TO as u32) };
                code.store_slice(out);
            }
        }
    }
}

/// The same for rows that no vector divides, eight bytes at a time where that goes.
#[inline(always)]
fn byte_fields<const WIDTH: usize, const TO: usize>(
    (plane, bytes): (&[u8], usize),
    out: &mut [i8],
    stride: usize,
) {
    let mask = u64::from_le_bytes([((1u16 << WIDTH) - 1) as u8; 8]);
    for (row, out) in plane.chunks_exact(bytes).zip(out.chunks_exact_mut(stride)) {
        for field in 0..8 / WIDTH {
            let out: &mut [u8] = cast_slice_mut(&mut out[field * bytes..][..bytes]);
            for (row, out) in row.chunks(8).zip(out.chunks_mut(8)) {
                let mut word = [0; 8];
                word[..row.len()].copy_from_slice(row);
                // What a shift drags over from the byte above is masked away.
                let code = ((u64::from_le_bytes(word) >> (field * WIDTH)) & mask) << TO;
                for (out, code) in out.iter_mut().zip(code.to_le_bytes()) {
                    *out = if TO == 0 { code } else { *out | code };
                }
            }
        }
    }
}
