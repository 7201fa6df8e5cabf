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

#![allow(unsafe_code, reason = "unchecked indexing in the innermost loop, under an assertion before it")]

use super::prefetch::Ahead;
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

/// Rows of stored elements, read one by one.
pub(crate) trait Lines: Copy {
    /// A row.
    type Line: Source;

    /// The first `width` elements of a row.
    fn line(self, row: usize, width: usize) -> Self::Line;
}

impl<B: Source> Lines for Matrix<B> {
    type Line = B;

    #[inline(always)]
    fn line(self, row: usize, width: usize) -> B {
        self.data.slice(row * self.stride..row * self.stride + width)
    }
}

/// The right-hand side of a product, read a vector at a time.
pub(crate) trait Operand: Copy {
    /// Whether loading converts.
    const NARROW: bool;

    /// Rows that one load brings.
    const ROWS: usize;

    /// Whether it has so many rows and columns.
    fn holds(self, rows: usize, columns: usize) -> bool;

    /// What the rows from `row` on, a multiple of [`Self::ROWS`], hold from `column` on.
    ///
    /// # Safety
    /// The row and the columns of the vector must be held.
    unsafe fn load<S: Simd>(self, simd: S, row: usize, column: usize) -> S::f32s;

    /// One of the rows that were loaded.
    fn pick<S: Simd>(loaded: S::f32s, row: usize) -> S::f32s;
}

impl<B: Source> Operand for Matrix<B> {
    const NARROW: bool = B::NARROW;
    const ROWS: usize = 1;

    #[inline(always)]
    fn holds(self, rows: usize, columns: usize) -> bool {
        rows == 0 || (rows - 1) * self.stride + columns <= self.data.len()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, row: usize, column: usize) -> S::f32s {
        // SAFETY: the caller's promise.
        unsafe { self.data.vector_at(simd, row * self.stride + column) }
    }

    #[inline(always)]
    fn pick<S: Simd>(loaded: S::f32s, _row: usize) -> S::f32s {
        loaded
    }
}

/// `c[m, columns] = a[m, k] · b[k, columns]`, or added to what is there. `columns` is rounded up to whole
/// vectors, so rows of `b` and `c` must be readable up to there.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the classic signature")]
pub(crate) fn multiply<S: Simd, B: Operand>(
    simd: S,
    a: Matrix<&[f32]>,
    b: B,
    c: &mut [f32],
    c_stride: usize,
    (m, k, columns): (usize, usize, usize),
    accumulate: bool,
    ahead: Ahead<'_>,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = S::f32s::LEN;
            let vectors = columns.div_ceil(lanes);
            let mut j = 0;
            // With 32 registers of 16 lanes a 4 × 4 block fits; with 16 registers 4 × 2 does.
            let by_four = lanes >= 16 && (m < 8 || !B::NARROW);
            let eights = if by_four || lanes < 16 { 0 } else { m / 8 };
            let blocks = vectors.div_ceil(if by_four { 4 } else { 2 }) * (m.div_ceil(4) - eights);
            let ahead = &mut ahead.over(blocks * k);
            if by_four {
                while j + 4 <= vectors {
                    rows::<S, B, 4>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate, ahead);
                    j += 4;
                }
            }
            while j + 2 <= vectors {
                rows::<S, B, 2>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate, ahead);
                j += 2;
            }
            if j < vectors {
                rows::<S, B, 1>(simd, a, b, c, c_stride, (m, k, j * lanes), accumulate, ahead);
            }
        },
    );
}

#[allow(clippy::too_many_arguments, reason = "those of multiply")]
#[inline(always)]
fn rows<S: Simd, B: Operand, const N: usize>(
    simd: S,
    a: Matrix<&[f32]>,
    b: B,
    c: &mut [f32],
    c_stride: usize,
    (m, k, j): (usize, usize, usize),
    accumulate: bool,
    ahead: &mut Ahead<'_>,
) {
    let mut i = 0;
    // Eight rows by two vectors convert a stored row half as often as four by four.
    if N == 2 && S::f32s::LEN >= 16 {
        while i + 8 <= m {
            block::<S, B, 8, N>(simd, a, b, c, c_stride, (i, k, j), accumulate, ahead);
            i += 8;
        }
    }
    while i + 4 <= m {
        block::<S, B, 4, N>(simd, a, b, c, c_stride, (i, k, j), accumulate, ahead);
        i += 4;
    }
    match m - i {
        3 => block::<S, B, 3, N>(simd, a, b, c, c_stride, (i, k, j), accumulate, ahead),
        2 => block::<S, B, 2, N>(simd, a, b, c, c_stride, (i, k, j), accumulate, ahead),
        1 => block::<S, B, 1, N>(simd, a, b, c, c_stride, (i, k, j), accumulate, ahead),
        _ => {}
    }
}

#[allow(
    clippy::needless_range_loop,
    clippy::too_many_arguments,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn block<S: Simd, B: Operand, const M: usize, const N: usize>(
    simd: S,
    a: Matrix<&[f32]>,
    b: B,
    c: &mut [f32],
    c_stride: usize,
    (i, k, j): (usize, usize, usize),
    accumulate: bool,
    ahead: &mut Ahead<'_>,
) {
    let lanes = S::f32s::LEN;
    // Slices of known length here, so that the loop below indexes without checks. Plain loops, because the
    // closure of `array::from_fn` would be compiled without the level's instructions.
    let mut a_rows: [&[f32]; M] = [&[]; M];
    for (r, row) in a_rows.iter_mut().enumerate() {
        *row = &a.data[(i + r) * a.stride..][..k];
    }
    assert!(b.holds(k, j + N * lanes), "a row of b sticks out");
    let mut sums = [[S::f32s::splat(simd, 0.0); N]; M];
    for first in (0..k).step_by(B::ROWS) {
        let mut loaded = [S::f32s::splat(simd, 0.0); N];
        for n in 0..N {
            // SAFETY: `first < k` and `n < N`, so the assertion above covers it.
            loaded[n] = unsafe { b.load(simd, first, j + n * lanes) };
        }
        for row in 0..B::ROWS {
            let step = first + row;
            if step == k {
                break;
            }
            ahead.step();
            let mut columns = loaded;
            for n in 0..N {
                columns[n] = B::pick::<S>(loaded[n], row);
            }
            for r in 0..M {
                // SAFETY: the rows of `a` are `k` long.
                let x = S::f32s::splat(simd, unsafe { *a_rows[r].get_unchecked(step) });
                for n in 0..N {
                    sums[r][n] = columns[n].mul_add(x, sums[r][n]);
                }
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
