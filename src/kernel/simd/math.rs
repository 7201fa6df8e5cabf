//! Exponential, soft cap and sums over slices.
//!
//! *Helps* because softmax at a few billion exponentials per second costs less than reading the keys.
//! *Hurts* in the last bits: the exponential is within 2 units of 2⁻²⁴ of the true value (relative), see the
//! test below.

use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, SimdFloat};

/// `exp(x)` for `x <= 88`; 0 below −87.3, where the result would not be a normal number.
///
/// With `n = round(x / ln 2)` and `r = x − n·ln 2` (`ln 2` in two parts, so that `r` keeps its bits),
/// `exp(x) = 2ⁿ · exp(r)`, `|r| <= 0.35`. `exp(r)` is the Taylor polynomial of degree 7, whose remainder
/// `0.35⁸/8!` is 6e-9; the rest of the error is rounding.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let splat = |c: f32| S::f32s::splat(simd, c);
    let clamped = x.max(splat(-87.3));
    let n = (clamped * splat(std::f32::consts::LOG2_E)).round_ties_even();
    let r = n.mul_add(splat(-LN2_HIGH), clamped);
    let r = n.mul_add(splat(-LN2_LOW), r);
    let mut p = splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, splat(c));
    }
    // 2ⁿ by its exponent bits: n is between −126 and 127.
    let bits: S::i32s = (n + splat(127.0)).to_int::<S::i32s>() << 23;
    let scaled = p * bits.bitcast::<S::f32s>();
    x.simd_lt(splat(-87.3)).select(splat(0.0), scaled)
}

/// `cap · tanh(x / cap)`, to within `cap` · 2⁻²³.
///
/// By `t = exp(−2|y|)`, `tanh |y| = (1 − t) / (1 + t)`: no overflow, and the loss of relative accuracy near 0
/// is none of absolute accuracy, which is what a logit needs.
#[inline(always)]
pub(crate) fn soft_cap<S: Simd>(simd: S, x: S::f32s, cap: f32) -> S::f32s {
    let one = S::f32s::splat(simd, 1.0);
    let t = exp(simd, x.abs() * S::f32s::splat(simd, -2.0 / cap));
    let tanh = (one - t) / (one + t);
    tanh.copysign(x) * S::f32s::splat(simd, cap)
}

/// Sum of squares.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let mut sums = [S::f32s::splat(simd, 0.0); 2];
    let mut chunks = row.chunks_exact(2 * S::f32s::LEN);
    for chunk in &mut chunks {
        let (a, b) = chunk.split_at(S::f32s::LEN);
        let (a, b) = (S::f32s::from_slice(simd, a), S::f32s::from_slice(simd, b));
        sums = [a.mul_add(a, sums[0]), b.mul_add(b, sums[1])];
    }
    let tail: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    (sums[0] + sums[1]).reduce_sum() + tail
}

/// Dot product of the first elements, as many as the shorter has.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let (mut a, mut b) = (a.chunks_exact(S::f32s::LEN), b.chunks_exact(S::f32s::LEN));
    let mut total = S::f32s::splat(simd, 0.0);
    for (a, b) in (&mut a).zip(&mut b) {
        total = S::f32s::from_slice(simd, a).mul_add(S::f32s::from_slice(simd, b), total);
    }
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    total.reduce_sum() + tail
}

/// Sum of the elements.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let mut chunks = row.chunks_exact(S::f32s::LEN);
    let mut total = S::f32s::splat(simd, 0.0);
    for chunk in &mut chunks {
        total += S::f32s::from_slice(simd, chunk);
    }
    total.reduce_sum() + chunks.remainder().iter().sum::<f32>()
}

/// `target += factor · row`.
#[inline(always)]
pub(crate) fn add_scaled<S: Simd>(simd: S, target: &mut [f32], row: &[f32], factor: f32) {
    let f = S::f32s::splat(simd, factor);
    let mut targets = target.chunks_exact_mut(S::f32s::LEN);
    let mut rows = row.chunks_exact(S::f32s::LEN);
    for (t, r) in (&mut targets).zip(&mut rows) {
        S::f32s::from_slice(simd, r).mul_add(f, S::f32s::from_slice(simd, t)).store_slice(t);
    }
    targets.into_remainder().iter_mut().zip(rows.remainder()).for_each(|(t, r)| *t += factor * r);
}

/// `target *= factor`.
#[inline(always)]
pub(crate) fn scale<S: Simd>(simd: S, target: &mut [f32], factor: f32) {
    let f = S::f32s::splat(simd, factor);
    let mut chunks = target.chunks_exact_mut(S::f32s::LEN);
    for t in &mut chunks {
        (S::f32s::from_slice(simd, t) * f).store_slice(t);
    }
    chunks.into_remainder().iter_mut().for_each(|t| *t *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;

    fn worst(level: Level, inputs: impl Iterator<Item = f32>, of: impl Fn(f32) -> (f64, f64)) -> f64 {
        let mut worst = 0.0f64;
        for x in inputs {
            let got = crate::kernel::simd::dispatch!(level.token(), simd => {
                let mut out = [0.0f32; 16];
                exp(simd, SimdBase::splat(simd, x)).store_slice(&mut out[..lanes(simd)]);
                out[0]
            });
            let (want, unit) = of(x);
            worst = worst.max((f64::from(got) - want).abs() / unit);
        }
        worst
    }

    #[inline(always)]
    fn lanes<S: Simd>(_: S) -> usize {
        S::f32s::LEN
    }

    #[test]
    fn the_exponential_is_within_its_stated_error() {
        for level in Level::available() {
            let inputs = (0..200_000).map(|i| -87.3 + i as f32 * (175.0 / 200_000.0));
            let error = worst(level, inputs, |x| {
                let want = f64::from(x).exp();
                (want, want * 2f64.powi(-24))
            });
            assert!(error <= 2.0, "{}: {error} units", level.name());
            for x in [-88.0, -1e4, f32::MIN, f32::NEG_INFINITY] {
                assert_eq!(worst(level, [x].into_iter(), |_| (0.0, 1.0)), 0.0, "{x} at {}", level.name());
            }
        }
    }
}
