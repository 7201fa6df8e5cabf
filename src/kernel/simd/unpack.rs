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
use super::integer::{Finish, Levels, Quads, takes_nibbles};
use super::math::{dot, sum};
use super::take;
use super::tile::{BLOCK, TILE};
use super::widen::widen;
use crate::device::encoding::{BAND, Format, GROUP, PackedRows, Packing};
use crate::device::page::{Rows, Side};
use bytemuck::{cast_slice, cast_slice_mut};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16, u8x32, u8x64};
use std::ops::{BitAnd, BitOr, Shl, Shr, Sub};

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
    /// `d` long and 0 up to the next whole vector, if rows were centred.
    means: Option<&'s [f32]>,
}

/// What a row of weights comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weighed {
    /// The largest weight times its scale, and the sum of all.
    pub scaled: (f32, f32),
    /// `Σ w[j] min[j]`.
    offset: f32,
    /// `Σ w[j]`, if there is a mean it belongs to.
    mass: f32,
}

impl<'s> RowScales<'s> {
    fn new(packed: &PackedRows<'_>, scales: &'s [f32], mins: &'s [f32], means: &'s [f32]) -> Self {
        let Packing { format, center, .. } = packed.layout.packing;
        Self {
            scales: &scales[..TILE],
            mins: format.has_min().then_some(&mins[..TILE]),
            means: center.then_some(&means[..packed.layout.d.next_multiple_of(PAD)]),
        }
    }

    /// What turns dot products of `N` queries with levels into those with rows. `totals` are `Σq`.
    #[inline(always)]
    pub(crate) fn for_dots<S: Simd, const N: usize>(
        &self,
        simd: S,
        queries: Matrix<&[f32]>,
        (rows, d): (usize, usize),
        totals: &[f32; N],
    ) -> FinishDots<'s, N> {
        let mut finish = FinishDots { scales: *self, totals: *totals, bases: [0.0; N] };
        if let Some(means) = self.means {
            for row in 0..rows {
                finish.bases[row] = dot(simd, &queries.data[row * queries.stride..][..d], means);
            }
        }
        finish
    }

    /// The same done to products that are there.
    #[inline(always)]
    pub(crate) fn finish_dots<S: Simd>(
        &self,
        simd: S,
        queries: Matrix<&[f32]>,
        (rows, d, len): (usize, usize, usize),
        scores: &mut [f32],
    ) {
        for row in 0..rows {
            let q = Matrix { data: &queries.data[row * queries.stride..][..d], stride: d };
            // No closures: they would be compiled without the level's instructions.
            let mut total = [0.0];
            if self.mins.is_some() {
                total = [sum(simd, q.data)];
            }
            let finish = self.for_dots(simd, q, (1, d), &total);
            let scores = &mut scores[row * TILE..][..len.next_multiple_of(S::f32s::LEN)];
            for (i, x) in scores.chunks_exact_mut(S::f32s::LEN).enumerate() {
                let product = S::f32s::from_slice(simd, x);
                finish.finish(simd, (0, i * S::f32s::LEN), product, x).store_slice(x);
            }
        }
    }

    /// `scaled[j] = weights[j] · scale[j]` for the first `len`, 0 behind.
    #[inline(always)]
    pub(crate) fn weigh<S: Simd>(&self, simd: S, weights: &[f32], len: usize, scaled: &mut [f32]) -> Weighed {
        let lanes = S::f32s::LEN;
        let zero = S::f32s::splat(simd, 0.0);
        let (mut most, mut total, mut offset, mut mass) = (zero, zero, zero, zero);
        let (used, rest) = scaled.split_at_mut(len.next_multiple_of(lanes));
        rest.fill(0.0);
        for (i, out) in used.chunks_exact_mut(lanes).enumerate() {
            let part = i * lanes..(i + 1) * lanes;
            let w = S::f32s::from_slice(simd, &weights[part.clone()]);
            let x = w * S::f32s::from_slice(simd, &self.scales[part.clone()]);
            x.store_slice(out);
            (most, total, mass) = (most.max(x), total + x, mass + w);
            if let Some(mins) = self.mins {
                offset = S::f32s::from_slice(simd, &mins[part]).mul_add(w, offset);
            }
        }
        let mut weighed = Weighed { scaled: (most.reduce_max(), total.reduce_sum()), offset: 0.0, mass: 0.0 };
        if self.mins.is_some() {
            weighed.offset = offset.reduce_sum();
        }
        if self.means.is_some() {
            weighed.mass = mass.reduce_sum();
        }
        weighed
    }

    /// What adds the contribution of minimums and mean to sums of `N` rows.
    #[inline(always)]
    pub(crate) fn for_sums<const N: usize>(&self, weighed: [Weighed; N]) -> FinishSums<'s, N> {
        FinishSums { weighed, means: self.means }
    }

    /// Adds it to sums that are there.
    #[inline(always)]
    pub(crate) fn finish_sums<S: Simd>(&self, simd: S, weighed: Weighed, sums: &mut [f32]) {
        let finish = self.for_sums([weighed]);
        let none = S::f32s::splat(simd, 0.0);
        for (i, x) in sums.chunks_exact_mut(S::f32s::LEN).enumerate() {
            finish.finish(simd, (0, i * S::f32s::LEN), none, x).store_slice(x);
        }
    }
}

impl Weighed {
    /// Of no weights.
    pub(crate) const NONE: Self = Self { scaled: (0.0, 0.0), offset: 0.0, mass: 0.0 };
}

/// Makes dot products with levels dot products with rows: `· scale[j] + min[j] Σq + q·mean`.
#[derive(Debug)]
pub(crate) struct FinishDots<'s, const N: usize> {
    scales: RowScales<'s>,
    /// `Σq`.
    totals: [f32; N],
    /// `q · mean`.
    bases: [f32; N],
}

impl<const N: usize> Finish for FinishDots<'_, N> {
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        simd: S,
        (row, lane): (usize, usize),
        product: S::f32s,
        _out: &[f32],
    ) -> S::f32s {
        let part = lane..lane + S::f32s::LEN;
        let mut offset = S::f32s::splat(simd, self.bases[row]);
        if let Some(mins) = self.scales.mins {
            let total = S::f32s::splat(simd, self.totals[row]);
            offset = S::f32s::from_slice(simd, &mins[part.clone()]).mul_add(total, offset);
        }
        product.mul_add(S::f32s::from_slice(simd, &self.scales.scales[part]), offset)
    }
}

/// Adds products with scaled weights to the sums, and what minimums and mean contribute: `Σ_j w[j] (min[j] + mean)`.
#[derive(Debug)]
pub(crate) struct FinishSums<'s, const N: usize> {
    weighed: [Weighed; N],
    means: Option<&'s [f32]>,
}

impl<const N: usize> Finish for FinishSums<'_, N> {
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        simd: S,
        (row, lane): (usize, usize),
        product: S::f32s,
        out: &[f32],
    ) -> S::f32s {
        let Weighed { offset, mass, .. } = self.weighed[row];
        let mut sum = product + S::f32s::from_slice(simd, out) + S::f32s::splat(simd, offset);
        if let Some(means) = self.means {
            let means = S::f32s::from_slice(simd, &means[lane..lane + S::f32s::LEN]);
            sum = means.mul_add(S::f32s::splat(simd, mass), sum);
        }
        sum
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
            true => {
                widen(simd, Rows::F16(packed.means()), 0, &mut self.means[..d]);
                self.means[d..].fill(0.0);
            }
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

    /// Levels of rows `from .. from + len`, with their parameters if each row has one scale, and room for
    /// `[BLOCK, TILE]` weights.
    #[inline(always)]
    pub(crate) fn quads<'s, S: Simd>(
        &'s mut self,
        simd: S,
        packed: &PackedRows<'s>,
        rows: (usize, usize),
    ) -> (Quads<'s>, RowScales<'s>, &'s mut [f32]) {
        self.row_parameters(simd, packed, rows);
        let scales = RowScales::new(packed, self.scales, self.mins, self.means);
        (levels(simd, packed, rows, self.levels), scales, self.weights)
    }

    /// The same for products in integers, which take some codes as they lie.
    #[inline(always)]
    pub(crate) fn levels<'s, S: Simd>(
        &'s mut self,
        simd: S,
        packed: &PackedRows<'s>,
        (from, len): (usize, usize),
    ) -> (Levels<'s>, RowScales<'s>, &'s mut [f32]) {
        self.row_parameters(simd, packed, (from, len));
        let layout = packed.layout;
        let format = layout.packing.format;
        // Padding would be lanes behind those of the result, or steps behind those of the queries.
        let levels = if takes_nibbles(simd) && format.planes() == [4] && layout.d == layout.padded() {
            let (bytes, row) = packed.plane_rows(0, from, len);
            let stride = if layout.side == Side::Key { BAND } else { row };
            Levels::Nibbles(Quads { words: cast_slice(bytes), stride }, format.table())
        } else {
            Levels::Bytes(levels(simd, packed, (from, len), self.levels))
        };
        (levels, RowScales::new(packed, self.scales, self.mins, self.means), self.weights)
    }

    /// Parameters of rows `from .. from + len` that have one scale each; 0 behind them.
    #[inline(always)]
    fn row_parameters<S: Simd>(&mut self, simd: S, packed: &PackedRows<'_>, (from, len): (usize, usize)) {
        self.parameters(simd, packed, from, len);
        self.scales[len..TILE].fill(0.0);
        self.mins[len..TILE].fill(0.0);
        if packed.layout.packing.center {
            self.means(simd, packed);
        }
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
                // Divisions are dear here.
                let (groups, dims) = (layout.row_groups(), layout.group_dims);
                for quad in 0..len.div_ceil(4) {
                    for group in 0..groups {
                        let mut scales = [S::f32s::splat(simd, 0.0); 4];
                        let mut mins = scales;
                        for r in 0..4 {
                            let group = (4 * quad + r) * groups + group;
                            scales[r] = S::f32s::splat(simd, self.scales[group]);
                            mins[r] = S::f32s::splat(simd, self.mins[group]);
                        }
                        // Groups are whole vectors, but for the last of a row, behind which nothing is read.
                        for at in (group * dims..(group * dims + dims).min(stride)).step_by(lanes) {
                            let mean = S::f32s::from_slice(simd, &self.means[at..at + lanes]);
                            let rows = levels.four(simd, quad, at);
                            for r in 0..4 {
                                let out = &mut self.rows[(4 * quad + r) * stride + at..][..lanes];
                                (rows[r].mul_add(scales[r], mins[r]) + mean).store_slice(out);
                            }
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
                let (dims, rows) = (layout.group_dims, layout.group_rows);
                let (by_key, mins_by_key) = self.pairs.split_at(if by_channel { 0 } else { groups * TILE });
                for (quad, out) in keys[..d * TILE].chunks_mut(4 * TILE).enumerate() {
                    let group = if by_channel { 4 * quad } else { 4 * quad / dims * TILE };
                    for at in (0..len).step_by(lanes) {
                        let four = levels.four(simd, quad, at);
                        for (r, out) in out.chunks_exact_mut(TILE).enumerate() {
                            let (scale, min) = if by_channel {
                                let group = at / rows * groups + group + r;
                                let splat = |x: &[f32]| S::f32s::splat(simd, x[group]);
                                (splat(self.scales), splat(self.mins))
                            } else {
                                let part = group + at..group + at + lanes;
                                let vector = |x: &[f32]| S::f32s::from_slice(simd, &x[part.clone()]);
                                (vector(by_key), vector(mins_by_key))
                            };
                            let mean = S::f32s::splat(simd, self.means[4 * quad + r]);
                            (four[r].mul_add(scale, min) + mean).store_slice(&mut out[at..at + lanes]);
                        }
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
    let words = if format.planes() == [8] {
        packed.plane_rows(0, from, len).0
    } else {
        // Of keys, rows within a band: the same few vectors of every step.
        let within = from % unit;
        let (from, span) = match layout.side {
            Side::Key => (from - within, Some((4 * within, 4 * (within + len)))),
            Side::Value => (from, None),
        };
        let len = len + within;
        let levels = &mut cast_slice_mut::<_, i8>(room)[..len.next_multiple_of(unit) * layout.padded()];
        let mut planes = [(&[][..], 0); 2];
        for (index, plane) in planes.iter_mut().enumerate().take(format.planes().len()) {
            let (bytes, row) = packed.plane_rows(index, from, len);
            *plane = (bytes, unit * row);
        }
        simd.vectorize(
            #[inline(always)]
            || spread(simd, format, planes, span, levels, unit * layout.padded()),
        );
        &cast_slice(&*levels)[4 * within..]
    };
    Quads { words: cast_slice(words), stride }
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

/// The levels of the rows of some planes, row `i` at `i * stride`; of each step of a band of keys only the bytes `span`.
#[inline(always)]
fn spread<S: Simd>(
    simd: S,
    format: Format,
    planes: [(&[u8], usize); 2],
    span: Option<(usize, usize)>,
    out: &mut [i8],
    stride: usize,
) {
    let planes = Planes { planes, span, stride };
    match (format.planes(), format.table().is_some()) {
        ([4], true) => planes.spread::<S, 4, false, true>(simd, format, out),
        ([4], false) => planes.spread::<S, 4, false, false>(simd, format, out),
        ([4, 1], _) => planes.spread::<S, 4, true, false>(simd, format, out),
        ([2], true) => planes.spread::<S, 2, false, true>(simd, format, out),
        ([2], false) => planes.spread::<S, 2, false, false>(simd, format, out),
        ([2, 1], _) => planes.spread::<S, 2, true, true>(simd, format, out),
        _ => unreachable!("no format has other planes"),
    }
}

/// A plane of some bits of codes, and perhaps one of their highest bit; with the bytes of a row of each.
struct Planes<'a> {
    planes: [(&'a [u8], usize); 2],
    /// Which bytes of every `4 * BAND`; all if there is none.
    span: Option<(usize, usize)>,
    /// Bytes from one row of levels to the next.
    stride: usize,
}

impl Planes<'_> {
    /// Puts fields of `WIDTH` bits, with a bit `MORE` above them, into bytes, through a `TABLE` or less the format's
    /// zero.
    #[inline(always)]
    fn spread<S: Simd, const WIDTH: usize, const MORE: bool, const TABLE: bool>(
        self,
        simd: S,
        format: Format,
        out: &mut [i8],
    ) {
        // The widest vector that divides a row of the narrowest plane.
        let narrowest = if MORE { self.planes[1].1 } else { self.planes[0].1 };
        if narrowest.is_multiple_of(64) && S::u8s::LEN >= 64 {
            self.wide::<S, u8x64<S>, WIDTH, MORE, TABLE>(simd, format, out);
        } else if narrowest.is_multiple_of(32) && S::u8s::LEN >= 32 {
            self.wide::<S, u8x32<S>, WIDTH, MORE, TABLE>(simd, format, out);
        } else {
            // Four rows of a value's shortest plane.
            self.wide::<S, u8x16<S>, WIDTH, MORE, TABLE>(simd, format, out);
        }
    }

    #[inline(always)]
    fn wide<S: Simd, V, const WIDTH: usize, const MORE: bool, const TABLE: bool>(
        self,
        simd: S,
        format: Format,
        out: &mut [i8],
    ) where
        V: SimdBase<S, Element = u8, Block = u8x16<S>, ByteVector = V>
            + Shr<u32, Output = V>
            + Shl<u32, Output = V>
            + BitAnd<Output = V>
            + BitOr<Output = V>
            + Sub<Output = V>,
    {
        let [(plane, row), (bits, bits_row)] = self.planes;
        let table = format.table().unwrap_or_default();
        let table = V::block_splat(u8x16::from_slice(simd, cast_slice(&table)));
        let zero = V::splat(simd, format.zero());
        let mask = V::splat(simd, ((1u16 << WIDTH) - 1) as u8);
        let bit = V::splat(simd, 1 << WIDTH);
        // A row of the narrow plane serves every part of a row of the wide one.
        let (parts, part) = if MORE { (WIDTH, bits_row) } else { (1, row) };
        let (pitch, first, last) = match self.span {
            Some((first, last)) => (4 * BAND, first - first % V::LEN, last.next_multiple_of(V::LEN)),
            None => (part, 0, part),
        };
        for (i, out) in out.chunks_exact_mut(self.stride).enumerate() {
            for at in (0..parts * part / pitch).map(|step| step * pitch) {
                let p = at / part;
                for at in (at + first..at + last).step_by(V::LEN) {
                    let loaded = V::from_slice(simd, &plane[i * row + at..][..V::LEN]);
                    let mut above = V::splat(simd, 0);
                    if MORE {
                        above = V::from_slice(simd, &bits[i * bits_row + at % part..][..V::LEN]);
                    }
                    for field in 0..8 / WIDTH {
                        let mut code = (loaded >> (field * WIDTH) as u32) & mask;
                        if MORE {
                            // Bit `field * WIDTH + p` to bit `WIDTH`.
                            let from = field * WIDTH + p;
                            let moved = match from >= WIDTH {
                                true => above >> (from - WIDTH) as u32,
                                false => above << (WIDTH - from) as u32,
                            };
                            code = code | (moved & bit);
                        }
                        let level = if TABLE { table.swizzle_dyn_within_blocks(code) } else { code - zero };
                        let out = &mut out[field * row + at..][..V::LEN];
                        level.store_slice(cast_slice_mut(out));
                    }
                }
            }
        }
    }
}
