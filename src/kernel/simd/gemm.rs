//! The one dense product attention is made of: `C (+)= A · B` for a few rows of `A` and a tile of `B` that
//! sits in the first cache levels.
//!
//! ```text
//! scores:  S[rows, keys] = Q[rows, d_k]  · Kᵀ[d_k, keys]     (Kᵀ: the tile of keys, transposed once)
//! output:  O[rows, d_v] += P[rows, keys] · V[keys, d_v]
//! ```
//! A block of up to 4 rows by a few vectors of columns stays in registers while the inner dimension runs, so
//! every load of `B` serves 4 rows and every element of `A` serves a block of columns. *Helps* decode
//! (rows = the query heads of a group) and prefill alike. *Hurts* a single row, where nothing is shared.

use super::widen::Source;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};

/// The widest vector, in elements: leading dimensions of `C` (and of `B`'s padding) are multiples of it.
pub(crate) const PAD: usize = 16;

/// A matrix in a slice: row `i` starts at `i * stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<T> {
    pub data: T,
    pub stride: usize,
}

/// `c[m, columns] = a[m, k] · b[k, columns]`, or added to what is there. `columns` is rounded up to whole
/// vectors, so rows of `b` and `c` must be readable up to there.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the classic signature")]
pub(crate) fn multiply<S: Simd, B: Source>(
    simd: S,
    a: Matrix<&[f32]>,
    b: Matrix<B>,
    c: &mut [f32],
    c_stride: usize,
    (m, k, columns): (usize, usize, usize),
    accumulate: bool,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = S::f32s::LEN;
            let vectors = columns.div_ceil(lanes);
            let mut j = 0;
            // With 32 registers of 16 lanes a 4 × 4 block fits; with 16 registers 4 × 2 does.
            if lanes >= 16 {
                while j + 4 <= vectors {
                    rows::<S, B, 4>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate);
                    j += 4;
                }
            }
            while j + 2 <= vectors {
                rows::<S, B, 2>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate);
                j += 2;
            }
            if j < vectors {
                rows::<S, B, 1>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate);
            }
        },
    );
}

#[inline(always)]
fn rows<S: Simd, B: Source, const N: usize>(
    simd: S,
    a: Matrix<&[f32]>,
    b: Matrix<B>,
    c: &mut [f32],
    c_stride: usize,
    (m, k, j): (usize, usize, usize),
    accumulate: bool,
) {
    let mut i = 0;
    while i + 4 <= m {
        block::<S, B, 4, N>(simd, a, b, c, c_stride, (i, k, j), accumulate);
        i += 4;
    }
    match m - i {
        3 => block::<S, B, 3, N>(simd, a, b, c, c_stride, (i, k, j), accumulate),
        2 => block::<S, B, 2, N>(simd, a, b, c, c_stride, (i, k, j), accumulate),
        1 => block::<S, B, 1, N>(simd, a, b, c, c_stride, (i, k, j), accumulate),
        _ => {}
    }
}

#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn block<S: Simd, B: Source, const M: usize, const N: usize>(
    simd: S,
    a: Matrix<&[f32]>,
    b: Matrix<B>,
    c: &mut [f32],
    c_stride: usize,
    (i, k, j): (usize, usize, usize),
    accumulate: bool,
) {
    let lanes = S::f32s::LEN;
    // Slices of known length here, so that the loop below indexes without checks. Plain loops, because the
    // closure of `array::from_fn` would be compiled without the level's instructions.
    let mut a_rows: [&[f32]; M] = [&[]; M];
    for (r, row) in a_rows.iter_mut().enumerate() {
        *row = &a.data[(i + r) * a.stride..][..k];
    }
    let mut sums = [[S::f32s::splat(simd, 0.0); N]; M];
    #[allow(clippy::needless_range_loop, reason = "the step indexes a column of every row")]
    for step in 0..k {
        let at = step * b.stride + j;
        let row = b.data.slice(at..at + N * lanes);
        let mut columns = [S::f32s::splat(simd, 0.0); N];
        for (n, column) in columns.iter_mut().enumerate() {
            *column = row.slice(n * lanes..(n + 1) * lanes).vector(simd);
        }
        for r in 0..M {
            let x = S::f32s::splat(simd, a_rows[r][step]);
            for n in 0..N {
                sums[r][n] = columns[n].mul_add(x, sums[r][n]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let row = &mut c[(i + r) * c_stride + j..][..N * lanes];
        for (sum, out) in sums.iter().zip(row.chunks_exact_mut(lanes)) {
            let value = if accumulate { *sum + S::f32s::from_slice(simd, out) } else { *sum };
            value.store_slice(out);
        }
    }
}
