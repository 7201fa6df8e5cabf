//! Dot products of a few query rows with stored keys, read in place: the first half of decode attention.
//!
//! ```text
//! S[row, entry] = q[row] · k[entry]
//! ```
//! A block of `C` query rows by `R` keys keeps its `C·R` sums in registers, a vector of partial sums each;
//! the keys are widened while they are loaded, once for the `C` rows. When the keys end, the vectors of
//! partial sums are folded into one vector with a sum per lane: half of each is laid over the other half while
//! two are interleaved, so `n` vectors cost `n − 1` additions and no lane is summed alone.
//!
//! *Helps* decode, where a transposed tile (see [`super::tile`]) would be used once and thrown away. *Hurts*
//! prefill: there a tile serves dozens of rows and turning it is cheaper than folding every sum.

#![allow(unsafe_code, reason = "unchecked loads in the innermost loop, of rows cut to their length before")]

use super::gemm::{Lines, Matrix};
use super::prefetch::Ahead;
use super::widen::Source;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};

/// Up to this many query rows keys are read in place.
pub(crate) const ROWS_MAX: usize = 16;

/// Writes `q[row] · k[entry]` to `scores[row * stride + entry]` for `rows` rows and `len` entries. `scores`
/// must have room up to the next multiple of 16 entries of each row; what is there afterwards is unspecified.
///
/// While one block is computed, the matching part of `ahead` is fetched towards the caches.
#[inline(always)]
pub(crate) fn dots<S: Simd, L: Lines>(
    simd: S,
    queries: Matrix<&[f32]>,
    keys: L,
    (rows, d, len): (usize, usize, usize),
    scores: &mut [f32],
    stride: usize,
    ahead: Ahead<'_>,
) {
    let extent = (d, len);
    let mut row = 0;
    let mut ahead = ahead;
    while row < rows {
        let q = Matrix { data: &queries.data[row * queries.stride..], stride: queries.stride };
        let out = &mut scores[row * stride..];
        row += match (S::f32s::LEN, rows - row) {
            (16, 8..) => pass::<S, L, 8, 2>(simd, q, keys, extent, out, stride, ahead),
            (16, 4..) => pass::<S, L, 4, 4>(simd, q, keys, extent, out, stride, ahead),
            (16, 3) => pass::<S, L, 3, 4>(simd, q, keys, extent, out, stride, ahead),
            (16, 2) => pass::<S, L, 2, 8>(simd, q, keys, extent, out, stride, ahead),
            (16, _) => pass::<S, L, 1, 16>(simd, q, keys, extent, out, stride, ahead),
            (8, 4..) => pass::<S, L, 4, 2>(simd, q, keys, extent, out, stride, ahead),
            (8, 3) => pass::<S, L, 3, 2>(simd, q, keys, extent, out, stride, ahead),
            (8, 2) => pass::<S, L, 2, 4>(simd, q, keys, extent, out, stride, ahead),
            (8, _) => pass::<S, L, 1, 8>(simd, q, keys, extent, out, stride, ahead),
            (_, 4..) => pass::<S, L, 4, 1>(simd, q, keys, extent, out, stride, ahead),
            (_, 2..) => pass::<S, L, 2, 2>(simd, q, keys, extent, out, stride, ahead),
            (_, _) => pass::<S, L, 1, 4>(simd, q, keys, extent, out, stride, ahead),
        };
        ahead = Ahead::NONE;
    }
}

/// `C` query rows on all keys, `R` at a time. Gives `C`.
#[inline(always)]
fn pass<S: Simd, L: Lines, const C: usize, const R: usize>(
    simd: S,
    queries: Matrix<&[f32]>,
    keys: L,
    (d, len): (usize, usize),
    scores: &mut [f32],
    stride: usize,
    ahead: Ahead<'_>,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let mut ahead = ahead.over(len.div_ceil(R) * (d / S::f32s::LEN));
            for j in (0..len).step_by(R) {
                block::<S, L, C, R>(simd, queries, keys, (d, len, j), scores, stride, &mut ahead);
            }
        },
    );
    C
}

#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn block<S: Simd, L: Lines, const C: usize, const R: usize>(
    simd: S,
    queries: Matrix<&[f32]>,
    keys: L,
    (d, len, j): (usize, usize, usize),
    scores: &mut [f32],
    stride: usize,
    ahead: &mut Ahead<'_>,
) {
    let lanes = S::f32s::LEN;
    // Slices of known length, so that the loop below indexes without checks. A block that sticks out repeats
    // the last key.
    let mut k_rows = [keys.line(j, d); R];
    for r in 1..R {
        k_rows[r] = keys.line((j + r).min(len - 1), d);
    }
    let mut q_rows: [&[f32]; C] = [&[]; C];
    for c in 0..C {
        q_rows[c] = &queries.data[c * queries.stride..][..d];
    }
    let whole = d - d % lanes;
    // As many vectors as lanes; those past C·R stay zero.
    let mut sums = [S::f32s::splat(simd, 0.0); 16];
    for i in (0..whole).step_by(lanes) {
        ahead.step();
        let mut k = [S::f32s::splat(simd, 0.0); R];
        for r in 0..R {
            // SAFETY: every row is `d` long, and `i + lanes <= whole <= d`.
            k[r] = unsafe { k_rows[r].vector_at(simd, i) };
        }
        for c in 0..C {
            // SAFETY: as above.
            let q = unsafe { q_rows[c].vector_at(simd, i) };
            for r in 0..R {
                sums[c * R + r] = q.mul_add(k[r], sums[c * R + r]);
            }
        }
    }
    let mut folded = [0.0f32; 16];
    fold(sums, lanes).store_slice(&mut folded[..lanes]);
    for c in 0..C {
        scores[c * stride + j..][..R].copy_from_slice(&folded[c * R..][..R]);
    }
    if whole < d {
        for r in 0..R {
            let mut rest = [0.0f32; 16];
            let rest = &mut rest[..d - whole];
            k_rows[r].rest(whole, rest);
            for c in 0..C {
                let tail: f32 = rest.iter().zip(&q_rows[c][whole..]).map(|(k, q)| k * q).sum();
                scores[c * stride + j + r] += tail;
            }
        }
    }
}

/// One vector whose lane `i` is the sum over the lanes of `vectors[i]`, for the first `lanes` of them.
#[inline(always)]
pub(crate) fn fold<S: Simd, V: SimdBase<S> + std::ops::Add<Output = V>>(
    mut vectors: [V; 16],
    lanes: usize,
) -> V {
    // Interleaving puts the two operands on even and odd lanes, so the first round decides the highest bit of
    // the lane a sum ends in, the last round the lowest: sum i ends in lane i.
    let mut half = lanes / 2;
    while half > 0 {
        for i in 0..half {
            let (low, high) = vectors[i].interleave(vectors[i + half]);
            vectors[i] = low + high;
        }
        half /= 2;
    }
    vectors[0]
}
