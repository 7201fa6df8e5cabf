//! Products of packed rows in integers: a few rows of numbers, cut into bytes, times a tile of codes.
//!
//! A row `x` is scaled so that its largest element becomes 127·257 and rounded to integers of two signed digits to the
//! base 256. A digit times a code is a product of bytes, and the processor sums four of those per lane and instruction:
//! ```text
//! x[i] ≈ s · (256 a[i] + b[i])     u[i] = level[i] + zero, in 0 .. 256
//! Σ x[i] level[i] = s · (256 (Σ a[i] u[i] − zero Σ a[i]) + Σ b[i] u[i] − zero Σ b[i])
//! ```
//! The sums are exact: at most 255 · 128 · `n` for `n` products, which stays below 2³¹ up to [`LENGTH_MAX`]. What is
//! lost is the rounding of `x`, half a unit, 2⁻¹⁶ of its largest element. `docs/numerics.md` says what that comes to
//! beside the error of the codes.
//!
//! *Helps* where the processor multiplies bytes by fours (AVX-512 VNNI): 64 codes take two instructions per row, and
//! four multiplications as well as, shared by the rows, eight conversions in `f32`. *Hurts* elsewhere: AVX2 would need
//! eight instructions for the two. There [`pays`] says no, and the codes are widened.

#![allow(unsafe_code, reason = "unchecked loads in the innermost loop; the caller states the bound")]

use super::dots::ROWS_MAX;
use super::gemm::{Matrix, Operand, PAD};
use super::prefetch::Ahead;
use bytemuck::cast_slice_mut;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, SimdFloat, u8x16};

/// Most products of a sum.
pub(crate) const LENGTH_MAX: usize = 1 << 16;

/// Digits of an element.
const DIGITS: usize = 2;

/// The largest integer of that many digits whose negative is one too.
const MOST: f32 = (127 * (0x100 + 1)) as f32;

/// Steps between two requests for memory ahead: codes are few bytes, and asking is a good part of a step.
const STEPS: usize = 4;

/// Turns signed bytes into unsigned ones that are 128 more.
const FLIP: i32 = 0x8080_8080u32 as i32;

/// What all digits are shifted by to become unsigned, which carries what must be carried between them.
const SHIFT: i32 = 0x8080;

/// Whether integer products are faster than widening at this level.
#[inline(always)]
pub(crate) fn pays<S: Simd>(simd: S) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        simd.level().as_avx512().is_some()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = simd;
        false
    }
}

/// What the digits of a row are in units of, and their sums.
#[derive(Clone, Copy, Debug, Default)]
struct Unit {
    scale: f32,
    sums: [i32; DIGITS],
    /// Sum of the elements.
    total: f32,
}

/// Up to [`ROWS_MAX`] rows cut into digits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Digits<'a> {
    /// Four words per four elements: their low digits, their high ones, and zeros.
    words: &'a [i32],
    stride: usize,
    units: [Unit; ROWS_MAX],
}

impl<'a> Digits<'a> {
    /// Cuts rows of `values.stride` elements, a multiple of 16, where they lie.
    #[inline(always)]
    pub(crate) fn cut<S: Simd>(simd: S, values: Matrix<&'a mut [f32]>, rows: usize) -> Self {
        let Matrix { data, stride } = values;
        let mut units = [Unit::default(); ROWS_MAX];
        for (row, unit) in data.chunks_exact_mut(stride).zip(&mut units).take(rows) {
            *unit = cut_row(simd, row);
        }
        Self { words: bytemuck::cast_slice(data), stride, units }
    }

    /// With units such that the rounded elements of a row have the sum of the true ones: where many small weights meet
    /// a large one, none of their mass is lost.
    pub(crate) fn keeping_sums(mut self) -> Self {
        for unit in &mut self.units {
            let rounded = unit.scale * (256 * unit.sums[1] + unit.sums[0]) as f32;
            if rounded > 0.0 {
                unit.scale *= unit.total / rounded;
            }
        }
        self
    }
}

#[inline(always)]
fn cut_row<S: Simd>(simd: S, row: &mut [f32]) -> Unit {
    let lanes = S::f32s::LEN;
    let (mut most, mut total) = (S::f32s::splat(simd, 0.0), S::f32s::splat(simd, 0.0));
    for chunk in row.chunks_exact(lanes) {
        let x = S::f32s::from_slice(simd, chunk);
        (most, total) = (most.max(x.abs()), total + x);
    }
    let most = most.reduce_max();
    // Below, the factor would not be finite; nothing of that size counts.
    let factor = if most < f32::MIN_POSITIVE * MOST { 0.0 } else { MOST / most };
    let factors = S::f32s::splat(simd, factor);
    // Byte `i` of four words side by side.
    const GATHER: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    let gather = S::u8s::block_splat(u8x16::from_slice(simd, &GATHER));
    let shift = S::i32s::splat(simd, SHIFT);
    let ones = S::i32s::splat(simd, 0x0101_0101);
    let mut sums = S::i32s::splat(simd, 0);
    for chunk in row.chunks_exact_mut(lanes) {
        let x = (S::f32s::from_slice(simd, chunk) * factors).round_ties_even();
        let digits = (x.to_int::<S::i32s>() + shift) ^ shift;
        let digits = digits.bitcast::<S::u8s>().swizzle_dyn_within_blocks(gather).bitcast::<S::i32s>();
        sums = dot4(simd, sums, ones, digits);
        digits.store_slice(cast_slice_mut(chunk));
    }
    let scale = if factor > 0.0 { most / MOST } else { 0.0 };
    let mut unit = Unit { scale, sums: [0; DIGITS], total: total.reduce_sum() };
    for block in sums.as_slice().chunks_exact(4) {
        unit.sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    unit
}

/// Levels, signed bytes, in words of four along the direction that is summed: `words[step * stride + lane]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quads<'a> {
    pub words: &'a [i32],
    pub stride: usize,
    /// Whether no level is negative.
    pub unsigned: bool,
}

impl Quads<'_> {
    /// What is added to the levels of a word to make them unsigned, by flipping bits; and to each of them.
    fn shift(&self) -> (i32, i32) {
        if self.unsigned { (0, 0) } else { (FLIP, 0x80) }
    }

    /// A vector of levels of factor `step` of the sums.
    #[inline(always)]
    pub(crate) fn at<S: Simd>(&self, simd: S, step: usize, lane: usize) -> S::f32s {
        let at = step / 4 * self.stride + lane;
        byte::<S>(S::i32s::from_slice(simd, &self.words[at..at + S::i32s::LEN]), step)
    }
}

impl Operand for Quads<'_> {
    const NARROW: bool = true;
    const ROWS: usize = 4;

    #[inline(always)]
    fn holds(self, rows: usize, columns: usize) -> bool {
        rows == 0 || (rows - 1) / 4 * self.stride + columns <= self.words.len()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, row: usize, column: usize) -> S::f32s {
        let at = row / 4 * self.stride + column;
        // SAFETY: the caller's promise.
        S::i32s::from_slice(simd, unsafe { self.words.get_unchecked(at..at + S::i32s::LEN) }).bitcast()
    }

    #[inline(always)]
    fn pick<S: Simd>(loaded: S::f32s, row: usize) -> S::f32s {
        byte::<S>(loaded.bitcast(), row)
    }
}

/// Byte `step % 4` of words, signed.
#[inline(always)]
fn byte<S: Simd>(words: S::i32s, step: usize) -> S::f32s {
    ((words << (24 - 8 * (step % 4) as u32)) >> 24u32).to_float()
}

/// `out[row, lane] = Σ x[row, i] level[i, lane]`, or added to what is there, over `4 · steps` elements. `lanes` is
/// rounded up to whole vectors.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    simd: S,
    x: &Digits<'_>,
    codes: Quads<'_>,
    out: Matrix<&mut [f32]>,
    (rows, steps, lanes): (usize, usize, usize),
    accumulate: bool,
    ahead: Ahead<'_>,
) {
    let vectors = lanes.div_ceil(S::i32s::LEN);
    let blocks = rows.div_ceil(4) * vectors.div_ceil(if rows < 4 { 4 } else { 2 });
    let ahead = ahead.over(blocks * steps.div_ceil(STEPS));
    let mut product = Product { x, codes, out, steps, accumulate, ahead };
    simd.vectorize(
        #[inline(always)]
        || {
            let mut row = 0;
            while row < rows {
                // Eight sums nearly hide the latency of an instruction, 24 leave registers for the operands.
                row += match rows - row {
                    4.. => product.rows::<S, 4, 2>(simd, row, vectors),
                    3 => product.rows::<S, 3, 4>(simd, row, vectors),
                    2 => product.rows::<S, 2, 4>(simd, row, vectors),
                    _ => product.rows::<S, 1, 4>(simd, row, vectors),
                };
            }
        },
    );
}

/// A product under way.
struct Product<'a> {
    x: &'a Digits<'a>,
    codes: Quads<'a>,
    out: Matrix<&'a mut [f32]>,
    steps: usize,
    accumulate: bool,
    ahead: Ahead<'a>,
}

impl Product<'_> {
    /// `C` rows on all vectors, `V` at a time. Gives `C`.
    #[inline(always)]
    fn rows<S: Simd, const C: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vectors: usize,
    ) -> usize {
        let mut vector = 0;
        while vector + V <= vectors {
            self.block::<S, C, V>(simd, row, vector * S::i32s::LEN);
            vector += V;
        }
        while vector < vectors {
            self.block::<S, C, 1>(simd, row, vector * S::i32s::LEN);
            vector += 1;
        }
        C
    }

    #[allow(
        clippy::needless_range_loop,
        reason = "iterators' closures would be compiled without the level's instructions"
    )]
    #[inline(always)]
    fn block<S: Simd, const C: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize) {
        let lanes = S::i32s::LEN;
        let (x, codes) = (self.x, self.codes);
        let (flip, zero) = codes.shift();
        let flip = S::i32s::splat(simd, flip);
        let mut sums = [[[S::i32s::splat(simd, 0); V]; DIGITS]; C];
        let mut words: [&[[i32; 4]]; C] = [&[]; C];
        for c in 0..C {
            let from = &x.words[(row + c) * x.stride..][..4 * self.steps];
            words[c] = &from.as_chunks().0[..self.steps];
            for digit in 0..DIGITS {
                sums[c][digit] = [S::i32s::splat(simd, -zero * x.units[row + c].sums[digit]); V];
            }
        }
        for step in 0..self.steps {
            if step.is_multiple_of(STEPS) {
                self.ahead.step();
            }
            let from = &codes.words[step * codes.stride + lane..][..V * lanes];
            let mut quads = [S::i32s::splat(simd, 0); V];
            for v in 0..V {
                quads[v] = S::i32s::from_slice(simd, &from[v * lanes..(v + 1) * lanes]) ^ flip;
            }
            for c in 0..C {
                for digit in 0..DIGITS {
                    let word = S::i32s::splat(simd, words[c][step][digit]);
                    for v in 0..V {
                        sums[c][digit][v] = dot4(simd, sums[c][digit][v], quads[v], word);
                    }
                }
            }
        }
        let base = S::f32s::splat(simd, 256.0);
        for c in 0..C {
            let scale = S::f32s::splat(simd, x.units[row + c].scale);
            let out = &mut self.out.data[(row + c) * self.out.stride + lane..][..V * lanes];
            for (v, out) in out.chunks_exact_mut(lanes).enumerate() {
                let [low, high]: [S::f32s; 2] = [sums[c][0][v].to_float(), sums[c][1][v].to_float()];
                let sum = high.mul_add(base, low);
                let sum = match self.accumulate {
                    true => sum.mul_add(scale, S::f32s::from_slice(simd, out)),
                    false => sum * scale,
                };
                sum.store_slice(out);
            }
        }
    }
}

/// `sum + Σ codes · digits` of the four bytes of each lane, codes unsigned, digits signed.
#[inline(always)]
fn dot4<S: Simd>(simd: S, sum: S::i32s, codes: S::i32s, digits: S::i32s) -> S::i32s {
    #[cfg(target_arch = "x86_64")]
    if let (16, Some(token)) = (S::i32s::LEN, simd.level().as_avx512()) {
        let sum = x86::dot4_avx512(token, sum.as_slice(), codes.as_slice(), digits.as_slice());
        return S::i32s::from_slice(simd, sum.as_slice());
    }
    let mut sums = [0i32; PAD];
    sum.store_slice(&mut sums[..S::i32s::LEN]);
    for (sum, (codes, digits)) in sums.iter_mut().zip(codes.as_slice().iter().zip(digits.as_slice())) {
        for (code, digit) in codes.to_le_bytes().into_iter().zip(digits.to_le_bytes()) {
            // Like the instruction, modulo 2³²: the end fits, its way there need not.
            *sum = sum.wrapping_add(i32::from(code) * i32::from(digit as i8));
        }
    }
    S::i32s::from_slice(simd, &sums[..S::i32s::LEN])
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use fearless_simd::prelude::*;
    use fearless_simd::{i32x16, x86};
    use std::arch::x86_64::_mm512_dpbusd_epi32;

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn dot4_avx512(
            token: Avx512,
            sum: &[i32],
            codes: &[i32],
            digits: &[i32],
        ) -> i32x16<x86::Avx512> {
            let sum = i32x16::from_slice(token, sum).into();
            let codes = i32x16::from_slice(token, codes).into();
            let digits = i32x16::from_slice(token, digits).into();
            _mm512_dpbusd_epi32(sum, codes, digits).simd_into(token)
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;
    use crate::testing::Random;

    /// At every level the sums are those of the rounded elements, and these are off by half a unit at most.
    #[test]
    fn products_are_exact_but_for_the_rounding_of_the_row() {
        let mut random = Random::new(7);
        let (rows, steps, lanes) = (7, 40, 48);
        let n = 4 * steps;
        let x: Vec<f32> =
            (0..rows * n).map(|i| random.normal() * 10f32.powi(i as i32 / n as i32 * 9 - 30)).collect();
        let codes: Vec<i32> = (0..steps * lanes).map(|_| random.bits() as i32).collect();
        let mut first: Option<Vec<f32>> = None;
        for level in Level::available() {
            for unsigned in [true, false] {
                let (mut values, mut out) = (x.clone(), vec![1.0f32; rows * lanes]);
                crate::kernel::simd::dispatch!(level.token(), simd => {
                    let digits = Digits::cut(simd, Matrix { data: &mut values, stride: n }, rows);
                    let codes = Quads { words: &codes, stride: lanes, unsigned };
                    let out = Matrix { data: &mut out[..], stride: lanes };
                    multiply(simd, &digits, codes, out, (rows, steps, lanes), false, Ahead::NONE);
                });
                for row in 0..rows {
                    let x = &x[row * n..(row + 1) * n];
                    let most = x.iter().fold(0.0f64, |a, &b| a.max(f64::from(b).abs()));
                    for lane in 0..lanes {
                        let code = |i: usize| codes[i / 4 * lanes + lane].to_le_bytes()[i % 4];
                        let u =
                            |i: usize| if unsigned { f64::from(code(i)) } else { f64::from(code(i) as i8) };
                        let want: f64 = (0..n).map(|i| f64::from(x[i]) * u(i)).sum();
                        let size: f64 = (0..n).map(|i| u(i).abs()).sum();
                        let got = f64::from(out[row * lanes + lane]);
                        // A unit: half of it, and the rounding of the factor and of the result.
                        let allowed = size * most / f64::from(MOST);
                        assert!(
                            (got - want).abs() <= allowed,
                            "{row}, {lane}: {got}, {want}, {}",
                            level.name()
                        );
                    }
                }
                if unsigned {
                    let want = first.get_or_insert_with(|| out.clone());
                    assert_eq!(want, &out, "{}", level.name());
                }
            }
        }
    }

    /// Weights too small to be seen beside a large one keep their part of the sum of weights.
    #[test]
    fn small_weights_are_not_lost() {
        let small = 1e-5;
        let mut x = [small; 64];
        x[17] = 1.0;
        let codes = [0x0101_0101; 16 * 16];
        for level in Level::available() {
            let (mut values, mut out) = (x, [0.0f32; 16]);
            crate::kernel::simd::dispatch!(level.token(), simd => {
                let digits = Digits::cut(simd, Matrix { data: &mut values, stride: 64 }, 1).keeping_sums();
                let codes = Quads { words: &codes, stride: 16, unsigned: true };
                let out = Matrix { data: &mut out[..], stride: 16 };
                multiply(simd, &digits, codes, out, (1, 16, 16), false, Ahead::NONE);
            });
            assert!(out.iter().all(|x| (x - (1.0 + 63.0 * small)).abs() < 1e-6), "{out:?}, {}", level.name());
        }
    }

    /// The longest sum of the largest codes and digits fits.
    #[test]
    fn the_longest_sum_fits() {
        assert!(255 * 128 * LENGTH_MAX as i64 <= i64::from(i32::MAX));
    }
}
