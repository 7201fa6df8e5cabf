//! Packed rows back into numbers, a tile at a time: what [`crate::device::encoding`] describes.
//!
//! Codes are spread into bytes and turned into levels by a subtraction or a table in a register, by fours as they lie
//! ([`Quads`]). Where a row has one scale and one minimum that is all that happens to its elements: the levels are
//! multiplied with queries and weights as they are, and scale, minimum and mean are applied to the products, `TILE` of
//! them instead of `TILE · d` elements: in integers ([`super::integer`]) where that pays and the query rows are few, else
//! widened while they are loaded. Formats with more parameters are widened to `f32`, keys at once transposed. All of it stays
//! in the space the rows were packed in: who multiplies them with a query rotates the query instead.
//!
//! *Helps* every kernel read packed pages through the code it has for exact ones. *Hurts* formats with a scale per 32
//! elements or per channel, which pay for widening.

use super::gemm::{Matrix, PAD};
use super::integer::Quads;
use super::math::{add_scaled, dot, sum};
use super::take;
use super::tile::{BLOCK, TILE};
use super::widen::widen;
use crate::device::encoding::{BAND, Format, GROUP, PackedRows};
use crate::device::page::{Rows, Side};
use bytemuck::{cast_slice, cast_slice_mut};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16, u8x32, u8x64};

/// Bytes of the widest vector: levels are computed for whole vectors.
const BYTES: usize = 64;

// A tile of keys is a band.
const _: () = assert!(TILE == BAND);

/// Memory to unpack a tile into.
#[derive(Debug)]
pub(crate) struct UnpackScratch<'a> {
    /// Decoded values, `[TILE, d padded]`.
    rows: &'a mut [f32],
    /// Levels, `TILE · d padded` bytes.
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

    /// The values last decoded.
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

    /// Levels of rows `from .. from + len`, their parameters if each row has one scale, and room for `[BLOCK, TILE]`
    /// weights.
    #[inline(always)]
    pub(crate) fn quads<'s, S: Simd>(
        &'s mut self,
        simd: S,
        packed: &PackedRows<'s>,
        (from, len): (usize, usize),
    ) -> (Quads<'s>, RowScales<'s>, &'s mut [f32]) {
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
        (levels(simd, packed, (from, len), self.levels), scales, self.weights)
    }

    /// Decodes values `from .. from + len` to `f32`. Gives their stride.
    #[inline(always)]
    pub(crate) fn decode_values<S: Simd>(
        &mut self,
        simd: S,
        packed: &PackedRows<'_>,
        (from, len): (usize, usize),
    ) -> usize {
        let layout = packed.layout;
        let (stride, lanes) = (layout.d.next_multiple_of(PAD), S::f32s::LEN);
        self.means(simd, packed);
        self.parameters(simd, packed, layout.group(from, 0), len * layout.row_groups());
        simd.vectorize(
            #[inline(always)]
            || {
                let levels = levels(simd, packed, (from, len), self.levels);
                for (i, out) in self.rows.chunks_exact_mut(stride).take(len).enumerate() {
                    // Groups are whole vectors, but for the last of a row, behind which nothing is read.
                    for (group, start) in (0..stride).step_by(layout.group_dims).enumerate() {
                        let group = i * layout.row_groups() + group;
                        let scale = S::f32s::splat(simd, self.scales[group]);
                        let min = S::f32s::splat(simd, self.mins[group]);
                        for at in (start..(start + layout.group_dims).min(stride)).step_by(lanes) {
                            let mean = S::f32s::from_slice(simd, &self.means[at..at + lanes]);
                            let level = levels.at(simd, i, at);
                            (level.mul_add(scale, min) + mean).store_slice(&mut out[at..at + lanes]);
                        }
                    }
                }
            },
        );
        stride
    }

    /// Decodes keys `from .. from + len` to `f32`: element `c` of key `j` to `keys[c * TILE + j]`.
    #[inline(always)]
    pub(crate) fn decode_keys<S: Simd>(
        &mut self,
        simd: S,
        packed: &PackedRows<'_>,
        (from, len): (usize, usize),
        keys: &mut [f32],
    ) {
        let layout = packed.layout;
        let (d, lanes, groups) = (layout.d, S::f32s::LEN, layout.row_groups());
        self.means(simd, packed);
        let by_channel = layout.group_dims == 1;
        let first = layout.group(from, 0);
        let count = if by_channel { len.div_ceil(layout.group_rows) } else { len } * groups;
        self.parameters(simd, packed, first, count);
        if !by_channel {
            // A scale per key side by side.
            let (scales, mins) = self.pairs.split_at_mut(groups * TILE);
            for (j, (s, m)) in
                self.scales.chunks_exact(groups).zip(self.mins.chunks_exact(groups)).take(len).enumerate()
            {
                for g in 0..groups {
                    (scales[g * TILE + j], mins[g * TILE + j]) = (s[g], m[g]);
                }
            }
        }
        simd.vectorize(
            #[inline(always)]
            || {
                let levels = levels(simd, packed, (from, len), self.levels);
                for (c, out) in keys.chunks_exact_mut(TILE).take(d).enumerate() {
                    let mean = S::f32s::splat(simd, self.means[c]);
                    for at in (0..len).step_by(lanes) {
                        let (scale, min) = if by_channel {
                            let group = at / layout.group_rows * groups + c;
                            (S::f32s::splat(simd, self.scales[group]), S::f32s::splat(simd, self.mins[group]))
                        } else {
                            let (scales, mins) = self.pairs.split_at(groups * TILE);
                            let at = c / layout.group_dims * TILE + at;
                            let part = at..at + lanes;
                            (
                                S::f32s::from_slice(simd, &scales[part.clone()]),
                                S::f32s::from_slice(simd, &mins[part]),
                            )
                        };
                        let level = levels.at(simd, c, at);
                        (level.mul_add(scale, min) + mean).store_slice(&mut out[at..at + lanes]);
                    }
                }
            },
        );
    }
}

/// Levels of rows `from .. from + len`, in `room` if they are not stored as such.
#[inline(always)]
fn levels<'a, S: Simd>(
    simd: S,
    packed: &PackedRows<'a>,
    (from, len): (usize, usize),
    room: &'a mut [f32],
) -> Quads<'a> {
    let layout = packed.layout;
    let format = layout.packing.format;
    // How many bytes lie between two of a row, and what a word of the next step is off by.
    let (unit, stride) = match layout.side {
        Side::Key => (BAND, BAND),
        Side::Value => (4, layout.padded()),
    };
    let unsigned =
        matches!(format, Format::Int4 | Format::Kivi4 | Format::Kivi2 | Format::Q4_1 | Format::Q5_1);
    let words = if format.planes() == [8] {
        packed.plane_rows(0, from, len).0
    } else {
        let levels = &mut cast_slice_mut::<_, i8>(room)[..len.next_multiple_of(unit) * layout.padded()];
        let mut planes = [(&[][..], 0); 2];
        for (index, plane) in planes.iter_mut().enumerate().take(format.planes().len()) {
            let (bytes, row) = packed.plane_rows(index, from, len);
            *plane = (bytes, unit * row);
        }
        simd.vectorize(
            #[inline(always)]
            || spread(simd, format, planes, levels, unit * layout.padded()),
        );
        cast_slice(&*levels)
    };
    Quads { words: cast_slice(words), stride, unsigned }
}

impl Quads<'_> {
    /// Widens `steps` factors of `lanes` sums to `out[step * stride + lane]`, whole vectors of lanes.
    #[inline(always)]
    pub(crate) fn widen<S: Simd>(
        &self,
        simd: S,
        (steps, lanes): (usize, usize),
        out: &mut [f32],
        stride: usize,
    ) {
        for (step, out) in out.chunks_exact_mut(stride).take(steps).enumerate() {
            for lane in (0..lanes).step_by(S::f32s::LEN) {
                self.at(simd, step, lane).store_slice(&mut out[lane..lane + S::f32s::LEN]);
            }
        }
    }
}

/// The levels of the rows of some planes, row `i` at `i * stride`.
#[inline(always)]
fn spread<S: Simd>(
    simd: S,
    format: Format,
    [first, second]: [(&[u8], usize); 2],
    out: &mut [i8],
    stride: usize,
) {
    let table = format.lloyd().map(|_| {
        let mut table = [0u8; 16];
        for (code, level) in table.iter_mut().enumerate().take(1 << format.bits()) {
            *level = format.level(code as u8) as u8;
        }
        S::u8s::block_splat(u8x16::from_slice(simd, &table))
    });
    match format.planes() {
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
    } else {
        // Four rows of a value's shortest plane.
        wide_fields::<S, u8x16<S>, WIDTH, TO>(simd, (plane, bytes), out, stride);
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
