//! Rows of numbers made integers, to be multiplied with codes (see [`super::integer`]).
//!
//! A row is scaled so that its largest element becomes the largest integer of 16 bits, and rounded. What is lost is half
//! a unit: 2⁻¹⁶ of the row's largest element, of weights that need no sign 2⁻¹⁷. Where bytes are multiplied the integers
//! are cut into two digits to the base 256.
//!
//! *Helps* because codes are integers too, and more of their products fit an instruction. *Hurts* rows whose elements
//! differ by more than that in size; a row of weights therefore keeps its sum.

use super::dots::ROWS_MAX;
use super::gemm::Matrix;
use super::integer::{Way, dot4, way};
use bytemuck::cast_slice_mut;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, SimdFloat, u8x16};

/// Digits of an element.
pub(super) const DIGITS: usize = 2;

/// The largest integer of two signed digits whose negative is one too.
const MOST_SIGNED: f32 = (127 * (0x100 + 1)) as f32;

/// The largest of two unsigned digits.
const MOST_UNSIGNED: f32 = 0xffff as f32;

/// The largest of a signed word.
const MOST_WORD: f32 = i16::MAX as f32;

/// What all digits are shifted by to become unsigned, which carries what must be carried between them.
const SHIFT: i32 = 0x8080;

/// What the digits of a row are in units of, and their sums.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unit {
    pub scale: f32,
    pub sums: [i32; DIGITS],
}

/// Up to [`ROWS_MAX`] rows of integers: `SIGNED` ones of queries, others of weights, none of which is negative.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Digits<'a, const SIGNED: bool> {
    /// Four words per four elements: their low digits and their high ones, or [`Way::Words`] the first two elements and
    /// the others; then two that mean nothing.
    pub(super) words: &'a [i32],
    pub(super) stride: usize,
    pub(super) units: [Unit; ROWS_MAX],
}

impl<'a> Digits<'a, true> {
    /// Cuts queries of `values.stride` elements, a multiple of 16, where they lie.
    #[inline(always)]
    pub(crate) fn of_queries<S: Simd>(simd: S, values: Matrix<&'a mut [f32]>, rows: usize) -> Self {
        let Matrix { data, stride } = values;
        let mut units = [Unit::default(); ROWS_MAX];
        for (row, unit) in data.chunks_exact_mut(stride).zip(&mut units).take(rows) {
            let mut most = S::f32s::splat(simd, 0.0);
            for chunk in row.chunks_exact(S::f32s::LEN) {
                most = most.max(S::f32s::from_slice(simd, chunk).abs());
            }
            *unit = cut::<S, true>(simd, row, most.reduce_max());
        }
        Self { words: bytemuck::cast_slice(data), stride, units }
    }
}

impl<'a> Digits<'a, false> {
    /// Cuts weights where they lie, given the largest and the sum of each row. Units are such that the rounded elements
    /// of a row have the sum of the true ones: where many small weights meet a large one, none of their mass is lost.
    #[inline(always)]
    pub(crate) fn of_weights<S: Simd>(
        simd: S,
        values: Matrix<&'a mut [f32]>,
        sizes: impl Iterator<Item = (f32, f32)>,
    ) -> Self {
        let Matrix { data, stride } = values;
        let mut units = [Unit::default(); ROWS_MAX];
        for ((row, unit), (most, total)) in data.chunks_exact_mut(stride).zip(&mut units).zip(sizes) {
            *unit = cut::<S, false>(simd, row, most);
            let rounded = unit.scale * (256 * i64::from(unit.sums[1]) + i64::from(unit.sums[0])) as f32;
            if rounded > 0.0 {
                unit.scale *= total / rounded;
            }
        }
        Self { words: bytemuck::cast_slice(data), stride, units }
    }
}

/// Cuts a row whose largest element has this size.
#[inline(always)]
fn cut<S: Simd, const SIGNED: bool>(simd: S, row: &mut [f32], most: f32) -> Unit {
    let words = matches!(way(simd), Some(Way::Words));
    let limit = match (words, SIGNED) {
        (true, _) => MOST_WORD,
        (false, true) => MOST_SIGNED,
        (false, false) => MOST_UNSIGNED,
    };
    // Below, the factor would not be finite; nothing of that size counts.
    let factor = if most < f32::MIN_POSITIVE * limit { 0.0 } else { limit / most };
    let factors = S::f32s::splat(simd, factor);
    // Byte `i` of four words side by side.
    const DIGIT: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    // The lower halves of four words side by side.
    const HALF: [u8; 16] = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15];
    let gather = S::u8s::block_splat(u8x16::from_slice(simd, if words { &HALF } else { &DIGIT }));
    let shift = S::i32s::splat(simd, SHIFT);
    let ones = S::i32s::splat(simd, 0x0101_0101);
    let mut sums = S::i32s::splat(simd, 0);
    let mut total = S::i32s::splat(simd, 0);
    for chunk in row.chunks_exact_mut(S::f32s::LEN) {
        let x = (S::f32s::from_slice(simd, chunk) * factors).round_ties_even();
        let mut digits = x.to_int::<S::i32s>();
        if words {
            total += digits;
            digits
                .bitcast::<S::u8s>()
                .swizzle_dyn_within_blocks(gather)
                .bitcast::<S::i32s>()
                .store_slice(cast_slice_mut(chunk));
            continue;
        }
        if SIGNED {
            digits = (digits + shift) ^ shift;
        }
        let digits = digits.bitcast::<S::u8s>().swizzle_dyn_within_blocks(gather).bitcast::<S::i32s>();
        sums = if SIGNED { dot4(simd, sums, ones, digits) } else { dot4(simd, sums, digits, ones) };
        digits.store_slice(cast_slice_mut(chunk));
    }
    let mut unit = Unit { scale: if factor > 0.0 { most / limit } else { 0.0 }, sums: [0; DIGITS] };
    if words {
        unit.sums[0] = total.as_slice().iter().sum();
    }
    for block in sums.as_slice().chunks_exact(4) {
        unit.sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    unit
}
