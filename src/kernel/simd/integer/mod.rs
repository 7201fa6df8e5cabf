//! Products of packed rows in integers: a few rows of numbers, made integers ([`super::digits`]), times a tile of codes.
//!
//! The processor multiplies integers of one or two bytes and sums neighbouring products per lane. Where it sums four
//! products of bytes (AVX-512 VNNI), one factor of them unsigned and the other signed, a row `x` of two digits to the base
//! 256 takes two instructions for 64 codes:
//! ```text
//! x[i] ≈ s · (256 a[i] + b[i])
//! keys:    digits signed, levels made unsigned      u[i] = level[i] + zero, in 0 .. 256
//!          Σ x[i] level[i] = s · (256 (Σ a[i] u[i] − zero Σ a[i]) + Σ b[i] u[i] − zero Σ b[i])
//! values:  digits of weights unsigned, levels signed
//!          Σ x[i] level[i] = s · (256 Σ a[i] level[i] + Σ b[i] level[i])
//! ```
//! Where it sums two products of words (AVX2), levels are widened, once for all rows, and a row takes two instructions
//! and two additions for 32 codes.
//!
//! The sums are exact: products are below 2¹⁵ · 2⁷, or 2⁸ · 2⁸ per digit, and at most [`LENGTH_MAX`] of them stay below
//! 2³¹. What is lost is the rounding of `x`. `docs/numerics.md` says what that comes to beside the error of the codes.
//!
//! With bytes, codes of four bits are taken from memory as they lie and become levels in registers; others are spread
//! into bytes before.
//!
//! *Helps* because as many products in `f32` take four multiplications per row and, shared by the rows, eight
//! conversions. *Hurts* elsewhere: there [`pays`] says no, and the codes are widened.

#![allow(unsafe_code, reason = "unchecked loads in the innermost loop, under an assertion before it")]

mod levels;
mod ops;

pub(crate) use levels::{Levels, Quads};
pub(crate) use ops::dot4;

use super::digits::{DIGITS, Digits};
use super::gemm::Matrix;
use super::prefetch::Ahead;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};
use levels::{Field, Linear, Table, Whole};
use ops::{dot2, widen4};

/// Most products of a sum.
pub(crate) const LENGTH_MAX: usize = 1 << 10;

/// Steps between two requests for memory ahead: codes are few bytes, and asking is a good part of a step.
const STEPS: usize = 4;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Digits and levels of a byte, by fours.
    Bytes,
    /// Numbers and levels of two bytes, by twos.
    Words,
}

/// How integers are multiplied at this level, if that is faster than widening to `f32`.
#[inline(always)]
pub(super) fn way<S: Simd>(simd: S) -> Option<Way> {
    #[cfg(target_arch = "x86_64")]
    {
        if simd.level().as_avx512().is_some() {
            return Some(Way::Bytes);
        }
        if simd.level().as_avx2().is_some() {
            return Some(Way::Words);
        }
    }
    let _ = simd;
    None
}

/// Whether integer products are faster than widening at this level.
#[inline(always)]
pub(crate) fn pays<S: Simd>(simd: S) -> bool {
    way(simd).is_some()
}

/// Whether codes of four bits need not be spread into bytes.
#[inline(always)]
pub(crate) fn takes_nibbles<S: Simd>(simd: S) -> bool {
    way(simd) == Some(Way::Bytes)
}

/// What becomes of a product before it is stored.
pub(crate) trait Finish {
    /// Of a vector of row `row` from lane `lane` on; `out` is what lies where the result goes.
    fn finish<S: Simd>(&self, simd: S, at: (usize, usize), product: S::f32s, out: &[f32]) -> S::f32s;
}

/// `out[row, lane] = finish(Σ x[row, i] level[i, lane])` over `4 · steps` elements. `lanes` is rounded up to whole
/// vectors. Of nibbles, which [`takes_nibbles`] must allow, `steps` (keys) or `lanes` (values) must be all there are.
#[inline(always)]
pub(crate) fn multiply<S: Simd, F: Finish, const SIGNED: bool>(
    simd: S,
    x: &Digits<'_, SIGNED>,
    levels: Levels<'_>,
    out: Matrix<&mut [f32]>,
    (rows, steps, lanes): (usize, usize, usize),
    finish: &F,
    ahead: Ahead<'_>,
) {
    let half = levels.half(SIGNED);
    let (Levels::Bytes(codes) | Levels::Nibbles(codes, _)) = levels;
    let vectors = if half > 0 { half } else { lanes }.div_ceil(S::i32s::LEN);
    let blocks = rows.div_ceil(4) * vectors.div_ceil(if rows < 4 { 4 } else { 2 });
    let ahead = ahead.over(blocks * steps.div_ceil(STEPS));
    let product = Product { x, codes, half, out, steps, finish, ahead };
    match levels {
        Levels::Bytes(_) if way(simd) == Some(Way::Words) => product.run(simd, ByWords, rows, vectors),
        Levels::Bytes(_) => product.run(simd, ByBytes(Whole), rows, vectors),
        Levels::Nibbles(_, None) => product.run(simd, ByBytes(Linear), rows, vectors),
        Levels::Nibbles(_, Some(table)) => {
            product.run(simd, ByBytes(Table::new::<SIGNED>(table)), rows, vectors);
        }
    }
}

/// How a block of a product is computed.
trait Block: Copy {
    /// Vectors of sums for a vector of loaded words and a row, of each digit.
    fn sums(signed: bool) -> usize;

    /// `C` rows from `row` on, `V` vectors from `lane` on.
    fn compute<S: Simd, F: Finish, const SIGNED: bool, const C: usize, const V: usize>(
        self,
        product: &mut Product<'_, F, SIGNED>,
        simd: S,
        at: (usize, usize),
    );
}

#[derive(Clone, Copy)]
struct ByBytes<L>(L);

impl<L: Field> Block for ByBytes<L> {
    #[inline(always)]
    fn sums(signed: bool) -> usize {
        if signed { 1 } else { L::COUNT }
    }

    #[inline(always)]
    fn compute<S: Simd, F: Finish, const SIGNED: bool, const C: usize, const V: usize>(
        self,
        product: &mut Product<'_, F, SIGNED>,
        simd: S,
        (row, lane): (usize, usize),
    ) {
        product.by_bytes::<S, L, C, V>(simd, self.0, row, lane);
    }
}

#[derive(Clone, Copy)]
struct ByWords;

impl Block for ByWords {
    #[inline(always)]
    fn sums(_signed: bool) -> usize {
        2
    }

    #[inline(always)]
    fn compute<S: Simd, F: Finish, const SIGNED: bool, const C: usize, const V: usize>(
        self,
        product: &mut Product<'_, F, SIGNED>,
        simd: S,
        (row, lane): (usize, usize),
    ) {
        product.by_words::<S, C, V>(simd, row, lane);
    }
}

/// A product under way.
struct Product<'a, F, const SIGNED: bool> {
    x: &'a Digits<'a, SIGNED>,
    codes: Quads<'a>,
    /// See [`Levels::half`].
    half: usize,
    out: Matrix<&'a mut [f32]>,
    steps: usize,
    finish: &'a F,
    ahead: Ahead<'a>,
}

impl<F: Finish, const SIGNED: bool> Product<'_, F, SIGNED> {
    #[inline(always)]
    fn run<S: Simd, B: Block>(mut self, simd: S, block: B, rows: usize, vectors: usize) {
        simd.vectorize(
            #[inline(always)]
            || {
                let mut row = 0;
                while row < rows {
                    // Eight sums nearly hide the latency of an instruction; with one vector of them to a vector of words,
                    // 24 of 32 registers leave room for the operands, with two, 8 of 16.
                    row += match (rows - row, B::sums(SIGNED)) {
                        (4.., 1) => self.rows::<S, B, 4, 2>(simd, block, row, vectors),
                        (4.., _) => self.rows::<S, B, 4, 1>(simd, block, row, vectors),
                        (3, 1) => self.rows::<S, B, 3, 4>(simd, block, row, vectors),
                        (3, _) => self.rows::<S, B, 3, 1>(simd, block, row, vectors),
                        (2, 1) => self.rows::<S, B, 2, 4>(simd, block, row, vectors),
                        (2, _) => self.rows::<S, B, 2, 2>(simd, block, row, vectors),
                        (_, 1) => self.rows::<S, B, 1, 4>(simd, block, row, vectors),
                        (_, _) => self.rows::<S, B, 1, 2>(simd, block, row, vectors),
                    };
                }
            },
        );
    }

    /// `C` rows on all vectors, `V` at a time. Gives `C`.
    #[inline(always)]
    fn rows<S: Simd, B: Block, const C: usize, const V: usize>(
        &mut self,
        simd: S,
        block: B,
        row: usize,
        vectors: usize,
    ) -> usize {
        let mut vector = 0;
        while vector + V <= vectors {
            block.compute::<S, F, SIGNED, C, V>(self, simd, (row, vector * S::i32s::LEN));
            vector += V;
        }
        while vector < vectors {
            block.compute::<S, F, SIGNED, C, 1>(self, simd, (row, vector * S::i32s::LEN));
            vector += 1;
        }
        C
    }

    #[allow(
        clippy::needless_range_loop,
        reason = "iterators' closures would be compiled without the level's instructions"
    )]
    #[inline(always)]
    fn by_words<S: Simd, const C: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize) {
        let lanes = S::i32s::LEN;
        let (x, codes, half) = (self.x, self.codes, lanes / 2);
        // A vector of sums for each half of a vector of lanes: two sums per lane.
        let mut sums = [[[S::i32s::splat(simd, 0); 2]; V]; C];
        let mut words: [&[[i32; 4]]; C] = [&[]; C];
        for c in 0..C {
            let from = &x.words[(row + c) * x.stride..][..4 * self.steps];
            words[c] = &from.as_chunks().0[..self.steps];
        }
        let within =
            self.steps == 0 || (self.steps - 1) * codes.stride + lane + V * lanes <= codes.words.len();
        assert!(within, "codes end before the product does");
        for step in 0..self.steps {
            if step.is_multiple_of(STEPS) {
                self.ahead.step();
            }
            let mut levels = [[S::i32s::splat(simd, 0); 2]; V];
            for v in 0..V {
                for h in 0..2 {
                    let at = step * codes.stride + lane + v * lanes + h * half;
                    // SAFETY: the assertion above.
                    levels[v][h] = widen4(simd, unsafe { codes.words.get_unchecked(at..at + half) });
                }
            }
            for c in 0..C {
                let [first, second, ..] = words[c][step];
                for v in 0..V {
                    for h in 0..2 {
                        sums[c][v][h] = dot2(simd, sums[c][v][h], levels[v][h], [first, second]);
                    }
                }
            }
        }
        for c in 0..C {
            let scale = S::f32s::splat(simd, x.units[row + c].scale);
            for v in 0..V {
                let lane = lane + v * lanes;
                let out = &mut self.out.data[(row + c) * self.out.stride + lane..][..lanes];
                let (first, second) = sums[c][v][0].deinterleave(sums[c][v][1]);
                // Their sum need not fit.
                let [first, second]: [S::f32s; 2] = [first.to_float(), second.to_float()];
                self.finish.finish(simd, (row + c, lane), (first + second) * scale, out).store_slice(out);
            }
        }
    }

    #[allow(
        clippy::needless_range_loop,
        reason = "iterators' closures would be compiled without the level's instructions"
    )]
    #[inline(always)]
    fn by_bytes<S: Simd, L: Field, const C: usize, const V: usize>(
        &mut self,
        simd: S,
        field: L,
        row: usize,
        lane: usize,
    ) {
        let lanes = S::i32s::LEN;
        let (x, codes) = (self.x, self.codes);
        // The second code of a byte belongs to a later step or to a later lane.
        let (later_step, sets) = if SIGNED { (self.steps / L::COUNT, 1) } else { (0, L::COUNT) };
        let loads = if SIGNED { later_step } else { self.steps };
        let mut sums = [[[[S::i32s::splat(simd, 0); 2]; V]; DIGITS]; C];
        let mut words: [&[[i32; 4]]; C] = [&[]; C];
        for c in 0..C {
            let from = &x.words[(row + c) * x.stride..][..4 * self.steps];
            words[c] = &from.as_chunks().0[..self.steps];
            if SIGNED {
                for digit in 0..DIGITS {
                    let excess = -L::ZERO * x.units[row + c].sums[digit];
                    sums[c][digit] = [[S::i32s::splat(simd, excess); 2]; V];
                }
            }
        }
        let within = loads == 0 || (loads - 1) * codes.stride + lane + V * lanes <= codes.words.len();
        assert!(within, "codes end before the product does");
        for step in 0..loads {
            if step.is_multiple_of(STEPS) {
                self.ahead.step();
            }
            let mut loaded = [S::i32s::splat(simd, 0); V];
            for v in 0..V {
                let at = step * codes.stride + lane + v * lanes;
                // SAFETY: the assertion above.
                loaded[v] = S::i32s::from_slice(simd, unsafe { codes.words.get_unchecked(at..at + lanes) });
            }
            for index in 0..L::COUNT {
                let mut levels = [S::i32s::splat(simd, 0); V];
                for v in 0..V {
                    levels[v] = field.pick::<S, SIGNED>(simd, loaded[v], index);
                }
                let set = if SIGNED { 0 } else { index };
                for c in 0..C {
                    // SAFETY: `index < COUNT`, so this is below `COUNT * loads`, or `loads`: `steps` at most.
                    let word = unsafe { words[c].get_unchecked(step + index * later_step) };
                    for digit in 0..DIGITS {
                        let digits = S::i32s::splat(simd, word[digit]);
                        for v in 0..V {
                            let sum = &mut sums[c][digit][v][set];
                            *sum = match SIGNED {
                                true => dot4(simd, *sum, levels[v], digits),
                                false => dot4(simd, *sum, digits, levels[v]),
                            };
                        }
                    }
                }
            }
        }
        let base = S::f32s::splat(simd, 256.0);
        for c in 0..C {
            let scale = S::f32s::splat(simd, x.units[row + c].scale);
            for v in 0..V {
                for set in 0..sets {
                    let lane = lane + v * lanes + set * self.half;
                    let out = &mut self.out.data[(row + c) * self.out.stride + lane..][..lanes];
                    let [low, high] = [sums[c][0][v][set].to_float(), sums[c][1][v][set].to_float()];
                    let sum: S::f32s = high;
                    let sum = sum.mul_add(base, low) * scale;
                    self.finish.finish(simd, (row + c, lane), sum, out).store_slice(out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;
    use crate::testing::Random;

    /// Leaves products as they are.
    struct AsIs;

    impl Finish for AsIs {
        fn finish<S: Simd>(&self, _: S, _: (usize, usize), product: S::f32s, _: &[f32]) -> S::f32s {
            product
        }
    }

    /// What a field of words that lie `stride` apart stands for: of factor `i` of the sum in a lane.
    fn level(codes: &[i32], levels: Levels<'_>, (i, lane): (usize, usize), signed: bool, steps: usize) -> i8 {
        let (Levels::Bytes(Quads { stride, .. }) | Levels::Nibbles(Quads { stride, .. }, _)) = levels;
        let Levels::Nibbles(_, table) = levels else {
            return codes[i / 4 * stride + lane].to_le_bytes()[i % 4] as i8;
        };
        let (step, lane, high) = match signed {
            true => (i / 4 % (steps / 2), lane, i / 4 >= steps / 2),
            false => (i / 4, lane % stride, lane >= stride),
        };
        let byte = codes[step * stride + lane].to_le_bytes()[i % 4];
        let code = if high { byte >> 4 } else { byte & 15 };
        table.map_or(code as i8, |table| table[usize::from(code)])
    }

    /// The sums are those of the rounded elements at every level, and these are off by half a unit at most.
    fn products(signed: bool) {
        let mut random = Random::new(7);
        let (rows, steps) = (7, 40);
        let n = 4 * steps;
        // Sizes far apart from row to row.
        let x: Vec<f32> = (0..rows * n)
            .map(|i| {
                let x = random.normal();
                (if signed { x } else { x.abs() }) * 10f32.powi((i / n) as i32 * 9 - 30)
            })
            .collect();
        let codes: Vec<i32> = (0..steps * 96).map(|_| random.bits() as i32).collect();
        let table = std::array::from_fn(|i| (17 * i as i32 - 127) as i8);
        let quads = |stride| Quads { words: &codes[..], stride };
        // Nibbles of values have the lanes of their high codes behind those of the low ones.
        let nibbles = quads(if signed { 96 } else { 48 });
        for levels in
            [Levels::Bytes(quads(96)), Levels::Nibbles(nibbles, None), Levels::Nibbles(nibbles, Some(table))]
        {
            for simd_level in Level::available() {
                let way = crate::kernel::simd::dispatch!(simd_level.token(), simd => way(simd));
                if way.is_none() || way == Some(Way::Words) && matches!(levels, Levels::Nibbles(..)) {
                    continue;
                }
                let (mut values, mut out) = (x.clone(), vec![1.0f32; rows * 96]);
                crate::kernel::simd::dispatch!(simd_level.token(), simd => {
                    let sizes = values.chunks(n).map(|x| (x.iter().copied().fold(0.0, f32::max), x.iter().sum()));
                    let sizes: Vec<(f32, f32)> = sizes.collect();
                    let values = Matrix { data: &mut values[..], stride: n };
                    let (out, extent) = (Matrix { data: &mut out[..], stride: 96 }, (rows, steps, 96));
                    if signed {
                        let digits = Digits::of_queries(simd, values, rows);
                        multiply(simd, &digits, levels, out, extent, &AsIs, Ahead::NONE);
                    } else {
                        let digits = Digits::of_weights(simd, values, sizes.into_iter());
                        multiply(simd, &digits, levels, out, extent, &AsIs, Ahead::NONE);
                    }
                });
                for row in 0..rows {
                    let x = &x[row * n..(row + 1) * n];
                    let most = x.iter().fold(0.0f64, |a, &b| a.max(f64::from(b).abs()));
                    for lane in 0..96 {
                        let level = |i: usize| f64::from(level(&codes, levels, (i, lane), signed, steps));
                        let want: f64 = (0..n).map(|i| f64::from(x[i]) * level(i)).sum();
                        let size: f64 = (0..n).map(|i| level(i).abs()).sum();
                        let got = f64::from(out[row * 96 + lane]);
                        // A unit: half of it, and the rounding of the factor and of the result.
                        let allowed =
                            size * most / if signed { 32639.0 } else { 65535.0 } + 3e-5 * want.abs();
                        let name = simd_level.name();
                        assert!((got - want).abs() <= allowed, "{row}, {lane}: {got}, {want}, {name}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_with_queries_are_exact_but_for_the_rounding_of_the_row() {
        products(true);
    }

    #[test]
    fn products_with_weights_are_exact_but_for_the_rounding_of_the_row() {
        products(false);
    }

    /// Weights too small to be seen beside a large one keep their part of the sum of weights.
    #[test]
    fn small_weights_are_not_lost() {
        let small = 1e-6;
        let mut x = [small; 64];
        x[17] = 1.0;
        let total = 1.0 + 63.0 * small;
        let codes = [0x0101_0101; 16 * 16];
        for level in Level::available() {
            let (mut values, mut out) = (x, [0.0f32; 16]);
            if !crate::kernel::simd::dispatch!(level.token(), simd => pays(simd)) {
                continue;
            }
            crate::kernel::simd::dispatch!(level.token(), simd => {
                let sizes = [(1.0, total)].into_iter();
                let digits = Digits::of_weights(simd, Matrix { data: &mut values, stride: 64 }, sizes);
                let codes = Levels::Bytes(Quads { words: &codes, stride: 16 });
                let out = Matrix { data: &mut out[..], stride: 16 };
                multiply(simd, &digits, codes, out, (1, 16, 16), &AsIs, Ahead::NONE);
            });
            assert!(out.iter().all(|x| (x - total).abs() < 1e-6), "{out:?}, {}", level.name());
        }
    }

    /// The longest sum of the largest codes and numbers fits.
    #[test]
    fn the_longest_sum_fits() {
        let length = LENGTH_MAX as i64;
        let bytes = 255 * 128 * length;
        // Half of the products of a lane are summed apart from the others.
        let words = i64::from(i16::MAX) * 128 * length / 2;
        assert!(bytes.max(words) <= i64::from(i32::MAX));
    }
}
