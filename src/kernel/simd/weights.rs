//! Loops over the logits and weights of what an index ranks, for callers outside of kernels.
//!
//! *Helps* because a ranking looks at every candidate in every query row several times over: in vectors that is little
//! beside reading what was chosen. *Hurts* nothing; each call finds its level anew, so none is for a handful of numbers.

use super::Level;
use super::math::{self, exp};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, SimdMask};

/// Numbers that are added in `f32` before they go to a sum in `f64`.
const RUN: usize = 256;

/// The largest; `−∞` of none.
pub(crate) fn largest(x: &[f32]) -> f32 {
    dispatch!(Level::detect().token(), simd => largest_with(simd, x))
}

/// The same inside a kernel.
#[inline(always)]
pub(crate) fn largest_with<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (chunks, rest) = x.split_at(x.len() - x.len() % S::f32s::LEN);
    let mut most = S::f32s::splat(simd, f32::NEG_INFINITY);
    for chunk in chunks.chunks_exact(S::f32s::LEN) {
        most = most.max(S::f32s::from_slice(simd, chunk));
    }
    rest.iter().fold(most.reduce_max(), |a, &b| a.max(b))
}

/// `out = exp(x − most)`; `most` is the largest `x` or more. Gives the sum.
pub(crate) fn weigh(x: &[f32], most: f32, out: &mut [f32]) -> f64 {
    dispatch!(Level::detect().token(), simd => weigh_with(simd, x, most, out))
}

#[inline(always)]
fn weigh_with<S: Simd>(simd: S, x: &[f32], most: f32, out: &mut [f32]) -> f64 {
    let offset = S::f32s::splat(simd, most);
    let mut total = 0.0;
    for (x, out) in x.chunks(RUN).zip(out.chunks_mut(RUN)) {
        let mut sum = S::f32s::splat(simd, 0.0);
        let (mut from, mut to) = (x.chunks_exact(S::f32s::LEN), out.chunks_exact_mut(S::f32s::LEN));
        for (x, out) in (&mut from).zip(&mut to) {
            let weights = exp(simd, S::f32s::from_slice(simd, x) - offset);
            sum += weights;
            weights.store_slice(out);
        }
        let mut rest = sum.reduce_sum();
        for (x, out) in from.remainder().iter().zip(to.into_remainder()) {
            *out = exp(simd, S::f32s::splat(simd, x - most)).as_slice()[0];
            rest += *out;
        }
        total += f64::from(rest);
    }
    total
}

/// The sum, in `f64` from runs of `f32`.
pub(crate) fn sum(x: &[f32]) -> f64 {
    dispatch!(Level::detect().token(), simd => sum_with(simd, x))
}

#[inline(always)]
fn sum_with<S: Simd>(simd: S, x: &[f32]) -> f64 {
    let mut total = 0.0;
    for run in x.chunks(RUN) {
        total += f64::from(math::sum(simd, run));
    }
    total
}

/// The same without some, ascending: added up and not taken off, so that nothing cancels.
pub(crate) fn sum_without(x: &[f32], without: &[u32]) -> f64 {
    dispatch!(Level::detect().token(), simd => sum_without_with(simd, x, without))
}

#[inline(always)]
fn sum_without_with<S: Simd>(simd: S, x: &[f32], without: &[u32]) -> f64 {
    let (mut total, mut from) = (0.0, 0);
    for &at in without {
        total += sum_with(simd, &x[from..at as usize]);
        from = at as usize + 1;
    }
    total + sum_with(simd, &x[from..])
}

/// `target += factor · x`.
pub(crate) fn add_scaled(target: &mut [f32], x: &[f32], factor: f32) {
    dispatch!(Level::detect().token(), simd => math::add_scaled(simd, target, x, factor));
}

/// `x *= factor`.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    dispatch!(Level::detect().token(), simd => math::scale(simd, x, factor));
}

/// `target = max(target, factor · x)`.
pub(crate) fn keep_larger(target: &mut [f32], x: &[f32], factor: f32) {
    dispatch!(Level::detect().token(), simd => keep_larger_with(simd, target, x, factor));
}

#[inline(always)]
fn keep_larger_with<S: Simd>(simd: S, target: &mut [f32], x: &[f32], factor: f32) {
    let by = S::f32s::splat(simd, factor);
    let (mut targets, mut xs) = (target.chunks_exact_mut(S::f32s::LEN), x.chunks_exact(S::f32s::LEN));
    for (target, x) in (&mut targets).zip(&mut xs) {
        (S::f32s::from_slice(simd, x) * by).max(S::f32s::from_slice(simd, target)).store_slice(target);
    }
    targets.into_remainder().iter_mut().zip(xs.remainder()).for_each(|(t, x)| *t = t.max(factor * x));
}

/// `out = x + factor · y − less`.
///
/// # Panics
/// If lengths differ.
pub(crate) fn add_less(x: &[f32], (y, factor): (&[f32], f32), less: &[f32], out: &mut [f32]) {
    assert!(x.len() == out.len() && y.len() == out.len() && less.len() == out.len(), "one of each");
    dispatch!(Level::detect().token(), simd => add_less_with(simd, x, (y, factor), less, out));
}

#[inline(always)]
fn add_less_with<S: Simd>(simd: S, x: &[f32], (y, factor): (&[f32], f32), less: &[f32], out: &mut [f32]) {
    let by = S::f32s::splat(simd, factor);
    let whole = out.len() - out.len() % S::f32s::LEN;
    for at in (0..whole).step_by(S::f32s::LEN) {
        let part = at..at + S::f32s::LEN;
        let load = |from: &[f32]| S::f32s::from_slice(simd, &from[part.clone()]);
        (load(y).mul_add(by, load(x)) - load(less)).store_slice(&mut out[part.clone()]);
    }
    for at in whole..out.len() {
        out[at] = factor.mul_add(y[at], x[at]) - less[at];
    }
}

/// `x += by`.
pub(crate) fn raise(x: &mut [f32], by: f32) {
    dispatch!(Level::detect().token(), simd => raise_with(simd, x, by));
}

#[inline(always)]
fn raise_with<S: Simd>(simd: S, x: &mut [f32], by: f32) {
    let by_all = S::f32s::splat(simd, by);
    let mut chunks = x.chunks_exact_mut(S::f32s::LEN);
    for chunk in &mut chunks {
        (S::f32s::from_slice(simd, chunk) + by_all).store_slice(chunk);
    }
    chunks.into_remainder().iter_mut().for_each(|x| *x += by);
}

/// `x += by[i]` in run `i` of `x`, which ends at `ends[i]` where the next one starts.
///
/// # Panics
/// If runs end behind `x`.
pub(crate) fn raise_runs(x: &mut [f32], ends: &[u32], by: &[f32]) {
    dispatch!(Level::detect().token(), simd => raise_runs_with(simd, x, ends, by));
}

#[inline(always)]
fn raise_runs_with<S: Simd>(simd: S, x: &mut [f32], ends: &[u32], by: &[f32]) {
    let mut at = 0;
    for (&end, &by) in ends.iter().zip(by) {
        let (end, by_all) = (end as usize, S::f32s::splat(simd, by));
        while at + S::f32s::LEN <= end {
            let part = &mut x[at..at + S::f32s::LEN];
            (S::f32s::from_slice(simd, part) + by_all).store_slice(part);
            at += S::f32s::LEN;
        }
        if at < end && at + S::f32s::LEN <= x.len() {
            let last = <S::f32s as SimdBase<S>>::Mask::from_bitmask(simd, (1 << (end - at)) - 1);
            let part = &mut x[at..at + S::f32s::LEN];
            let own = last.select(by_all, S::f32s::splat(simd, 0.0));
            (S::f32s::from_slice(simd, part) + own).store_slice(part);
        } else {
            x[at..end].iter_mut().for_each(|x| *x += by);
        }
        at = end;
    }
}

/// The sum of every run of `x`; run `i` ends at `ends[i]`, where the next one starts.
///
/// # Panics
/// If runs end behind `x`.
pub(crate) fn sum_runs(x: &[f32], ends: &[u32], out: &mut Vec<f32>) {
    out.clear();
    out.reserve(ends.len());
    dispatch!(Level::detect().token(), simd => sum_runs_with(simd, x, ends, out));
}

#[inline(always)]
fn sum_runs_with<S: Simd>(simd: S, x: &[f32], ends: &[u32], out: &mut Vec<f32>) {
    let mut at = 0;
    for &end in ends {
        let end = end as usize;
        let mut sum = S::f32s::splat(simd, 0.0);
        while at + S::f32s::LEN <= end {
            sum += S::f32s::from_slice(simd, &x[at..at + S::f32s::LEN]);
            at += S::f32s::LEN;
        }
        let mut rest = 0.0;
        if at < end && at + S::f32s::LEN <= x.len() {
            let last = <S::f32s as SimdBase<S>>::Mask::from_bitmask(simd, (1 << (end - at)) - 1);
            let next = S::f32s::from_slice(simd, &x[at..at + S::f32s::LEN]);
            sum += last.select(next, S::f32s::splat(simd, 0.0));
        } else {
            for &x in &x[at..end] {
                rest += x;
            }
        }
        out.push(sum.reduce_sum() + rest);
        at = end;
    }
}

/// Those from `low` to `high` into `out`; gives how many are above.
pub(crate) fn between(x: &[f32], (low, high): (f32, f32), out: &mut Vec<f32>) -> usize {
    out.clear();
    dispatch!(Level::detect().token(), simd => between_with(simd, x, (low, high), out))
}

#[inline(always)]
fn between_with<S: Simd>(simd: S, x: &[f32], (low, high): (f32, f32), out: &mut Vec<f32>) -> usize {
    let (from, to) = (S::f32s::splat(simd, low), S::f32s::splat(simd, high));
    let mut above = 0;
    let chunks = x.chunks_exact(S::f32s::LEN);
    for &x in chunks.remainder() {
        if x > high {
            above += 1;
        } else if x >= low {
            out.push(x);
        }
    }
    for chunk in chunks {
        let x = S::f32s::from_slice(simd, chunk);
        let (higher, there) = (x.simd_gt(to).to_bitmask(), x.simd_ge(from).to_bitmask());
        above += higher.count_ones() as usize;
        let mut within = there & !higher;
        while within != 0 {
            out.push(chunk[within.trailing_zeros() as usize]);
            within &= within - 1;
        }
    }
    above
}

/// Which are above `least`, ascending, and the first `equal` of those that equal it.
pub(crate) fn best(x: &[f32], (least, equal): (f32, usize), out: &mut Vec<u32>) {
    out.clear();
    dispatch!(Level::detect().token(), simd => best_with(simd, x, (least, equal), out));
}

#[inline(always)]
fn best_with<S: Simd>(simd: S, x: &[f32], (least, mut equal): (f32, usize), out: &mut Vec<u32>) {
    let from = S::f32s::splat(simd, least);
    let mut start = 0;
    for chunk in x.chunks(S::f32s::LEN) {
        let (mut above, mut same) = (0, 0);
        if chunk.len() == S::f32s::LEN {
            let x = S::f32s::from_slice(simd, chunk);
            above = x.simd_gt(from).to_bitmask();
            same = x.simd_ge(from).to_bitmask() & !above;
        } else {
            for (i, &x) in chunk.iter().enumerate() {
                above |= u64::from(x > least) << i;
                same |= u64::from(x == least) << i;
            }
        }
        while same != 0 && equal > 0 {
            above |= same & same.wrapping_neg();
            same &= same - 1;
            equal -= 1;
        }
        while above != 0 {
            out.push(start + above.trailing_zeros());
            above &= above - 1;
        }
        start += S::f32s::LEN as u32;
    }
}

/// Quadratic forms `qᵀ M q` of a symmetric `M [d, d]`, for each `q` of `[rows, d]`.
pub(crate) fn forms(matrix: &[f32], queries: &[f32], out: &mut [f32]) {
    dispatch!(Level::detect().token(), simd => forms_with(simd, matrix, queries, out));
}

#[inline(always)]
fn forms_with<S: Simd>(simd: S, matrix: &[f32], queries: &[f32], out: &mut [f32]) {
    let d = matrix.len().isqrt();
    out.fill(0.0);
    for (i, line) in matrix.chunks_exact(d.max(1)).enumerate() {
        // A line is read once for all queries.
        for (query, out) in queries.chunks_exact(d.max(1)).zip(&mut *out) {
            *out += query[i] * math::dot(simd, line, query);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lengths of runs, and as many numbers.
    fn runs() -> impl Strategy<Value = (Vec<u32>, Vec<f32>)> {
        prop::collection::vec(0usize..40, 0..20).prop_flat_map(|lens| {
            let mut end = 0;
            let ends = lens.iter().map(|&len| {
                end += len as u32;
                end
            });
            let ends: Vec<u32> = ends.collect();
            let all = lens.iter().sum::<usize>();
            (Just(ends), prop::collection::vec((-80i32..80).prop_map(|x| x as f32 / 8.0), all))
        })
    }

    proptest! {
        #[test]
        fn runs_are_raised_and_summed_each_for_itself((ends, x) in runs(), seed in 0u32..1000) {
            let by: Vec<f32> = (0..ends.len() as u32).map(|i| ((i * 7 + seed) % 13) as f32).collect();
            let mut raised = x.clone();
            raise_runs(&mut raised, &ends, &by);
            let mut sums = vec![9.0];
            sum_runs(&x, &ends, &mut sums);
            let mut start = 0;
            for (i, &end) in ends.iter().enumerate() {
                for at in start..end as usize {
                    prop_assert_eq!(raised[at], x[at] + by[i]);
                }
                // Eighths of small numbers add exactly in any order.
                prop_assert_eq!(sums[i], x[start..end as usize].iter().sum::<f32>());
                start = end as usize;
            }
            prop_assert_eq!(sums.len(), ends.len());
        }

        #[test]
        fn what_is_picked_is_what_comparisons_pick((_, x) in runs(), low in -80i32..80, width in 0i32..60, equal in 0usize..4) {
            let (low, high) = (low as f32 / 8.0, (low + width) as f32 / 8.0);
            let mut picked = Vec::new();
            let above = between(&x, (low, high), &mut picked);
            let mut want: Vec<f32> = x.iter().copied().filter(|x| (low..=high).contains(x)).collect();
            picked.sort_unstable_by(f32::total_cmp);
            want.sort_unstable_by(f32::total_cmp);
            prop_assert_eq!(picked, want);
            prop_assert_eq!(above, x.iter().filter(|&&x| x > high).count());
            let mut taken = Vec::new();
            best(&x, (low, equal), &mut taken);
            let mut left = equal;
            let want: Vec<u32> = (0..x.len() as u32)
                .filter(|&i| {
                    let same = x[i as usize] == low && left > 0;
                    left -= usize::from(same);
                    same || x[i as usize] > low
                })
                .collect();
            prop_assert_eq!(taken, want);
        }

        #[test]
        fn sums_and_extremes_are_those_of_plain_loops((_, x) in runs()) {
            prop_assert_eq!(sum(&x), x.iter().map(|&x| f64::from(x)).sum::<f64>());
            let without: Vec<u32> = (0..x.len() as u32).filter(|i| i % 5 < 2).collect();
            let rest = x.iter().enumerate().filter(|(i, _)| i % 5 >= 2).map(|(_, &x)| f64::from(x));
            prop_assert_eq!(sum_without(&x, &without), rest.sum::<f64>());
            let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(largest(&x), most);
            let mut weights = vec![0.0; x.len()];
            let total = weigh(&x, most, &mut weights);
            let want: Vec<f64> = x.iter().map(|x| f64::from(x - most).exp()).collect();
            prop_assert!(weights.iter().zip(&want).all(|(w, v)| (f64::from(*w) / v - 1.0).abs() < 2e-7));
            prop_assert!((total - want.iter().sum::<f64>()).abs() <= 1e-6 * total);
            let mut added = vec![0.0; x.len()];
            add_less(&x, (&weights, 3.0), &x, &mut added);
            prop_assert!(added.iter().zip(&weights).all(|(a, w)| (a - 3.0 * w).abs() <= 1e-5));
            let mut higher = x.clone();
            raise(&mut higher, 2.5);
            prop_assert!(higher.iter().zip(&x).all(|(h, x)| *h == x + 2.5));
            let mut larger = x.clone();
            keep_larger(&mut larger, &weights, 3.0);
            prop_assert!(larger.iter().zip(&x).zip(&weights).all(|((l, x), w)| *l == x.max(3.0 * w)));
        }
    }

    #[test]
    fn forms_are_sums_over_all_pairs() {
        for d in [1usize, 5, 16, 37] {
            let matrix: Vec<f32> = (0..d * d).map(|i| ((i / d + i % d) * 3 % 7) as f32).collect();
            let queries: Vec<f32> = (0..3 * d).map(|i| (i * 5 % 11) as f32 - 5.0).collect();
            let mut out = [9.0; 3];
            forms(&matrix, &queries, &mut out);
            for (query, got) in queries.chunks_exact(d).zip(out) {
                let pairs = (0..d * d).map(|i| matrix[i] * query[i / d] * query[i % d]);
                assert_eq!(got, pairs.sum::<f32>());
            }
        }
    }
}
