//! The result, and the step from a basis to it.

use super::rows::{Survey, expect};
use super::{Route, product, zeros};
use crate::device::Pool;
use crate::error::FactorError;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::ops::Range;

/// `X[T, n] ≈ A[T, r] · B[r, n]` with orthonormal columns of `A` and `B = AᵀX`, and what is lost by it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Factors {
    /// Rows of `X`, `T`.
    pub tokens: usize,
    /// Columns of `X`, `n`.
    pub features: usize,
    /// `r`.
    pub rank: usize,
    /// `A[T, r]`, row-major: the left singular vectors.
    pub a: Vec<f32>,
    /// `B[r, n]`, row-major: the right singular vectors times the singular values. Rows are orthogonal.
    pub b: Vec<f32>,
    /// The `r` largest singular values, descending: the lengths of the rows of `B`.
    pub singular: Vec<f32>,
    /// `‖X‖²_F`.
    pub squared_norm: f64,
    /// `‖X − AB‖²_F`, as `‖X‖²_F − ‖B‖²_F`, at least 0. A difference of two sums: what is below 1e-6 of `‖X‖²_F` is
    /// rounding.
    pub squared_error: f64,
    /// The route that was taken; never [`Route::Auto`].
    pub route: Route,
}

impl Factors {
    /// `‖X − AB‖_F / ‖X‖_F`; 0 for the zero matrix. At most 1.
    pub fn relative_error(&self) -> f64 {
        if self.squared_norm == 0.0 { 0.0 } else { (self.squared_error / self.squared_norm).sqrt() }
    }

    /// Writes these rows of `A B` to `out`, `[rows, features]` row-major.
    ///
    /// # Errors
    /// [`FactorError::Rows`] for rows there are not, [`FactorError::Length`] for an `out` of another length.
    pub fn reconstruct(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), FactorError> {
        if rows.start > rows.end || rows.end > self.tokens {
            return Err(FactorError::Rows { first: rows.start, end: rows.end, tokens: self.tokens });
        }
        expect("the buffer of reconstructed rows", out.len(), rows.len(), self.features)?;
        let a = &self.a[rows.start * self.rank..rows.end * self.rank];
        let a = MatRef::from_row_major_slice(a, rows.len(), self.rank);
        let b = MatRef::from_row_major_slice(&self.b, self.rank, self.features);
        let out = MatMut::from_row_major_slice_mut(out, rows.len(), self.features);
        matmul(out, Accum::Replace, a, b, 1.0, Par::Seq);
        Ok(())
    }
}

/// What is known when the basis is.
pub(super) struct Parts<'a> {
    /// `Q[T, directions]`, orthonormal.
    pub(super) q: Vec<f32>,
    /// `Cᵀ = Xᵀ Q`, `[n, directions]`.
    pub(super) c: Vec<f32>,
    /// Leading eigenvectors of `C Cᵀ`, `[directions, rank]`.
    pub(super) u: Mat<f64>,
    pub(super) tokens: usize,
    pub(super) features: usize,
    pub(super) directions: usize,
    pub(super) survey: Survey,
    pub(super) scale: f32,
    pub(super) tolerance: Option<f64>,
    pub(super) route: Route,
    pub(super) pool: &'a Pool,
}

/// Rotates the basis onto the singular vectors, and cuts.
pub(super) fn close(parts: Parts<'_>) -> Result<Factors, FactorError> {
    let Parts { q, c, u, tokens, features, directions, survey, scale, tolerance, route, pool } = parts;
    let transposed = product::apply(&c, &u, pool)?;
    drop(c);
    let found = u.ncols();
    let mut squares = vec![0.0f64; found];
    for row in transposed.chunks_exact(found) {
        squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
    let unscale = f64::from(scale).recip();
    squares.iter_mut().for_each(|square| *square *= unscale * unscale);
    if squares.iter().any(|square| !square.is_finite()) {
        return Err(FactorError::Changed);
    }
    // Eigenvalues descend, lengths of rounded rows nearly so.
    let mut order: Vec<usize> = (0..found).collect();
    order.sort_by(|&i, &j| squares[j].total_cmp(&squares[i]));
    let largest = squares[order[0]].sqrt();
    if largest > f64::from(f32::MAX) {
        return Err(FactorError::Overflow { singular: largest });
    }
    let lost = |rank: usize| {
        let kept: f64 = order[..rank].iter().map(|&i| squares[i]).sum();
        (survey.squared_norm - kept).max(0.0)
    };
    let enough = |tolerance: f64| {
        let bound = tolerance * tolerance * survey.squared_norm;
        (1..found).find(|&rank| lost(rank) <= bound)
    };
    let rank = tolerance.and_then(enough).unwrap_or(found);
    let squared_error = lost(rank);
    order.truncate(rank);

    let mut b = zeros("the factor B", rank, features)?;
    for (row, &i) in b.chunks_exact_mut(features).zip(&order) {
        for (x, values) in row.iter_mut().zip(transposed.chunks_exact(found)) {
            *x = (f64::from(values[i]) * unscale) as f32;
        }
    }
    drop(transposed);
    let u = Mat::from_fn(directions, rank, |i, j| u[(i, order[j])]);
    let a = product::apply(&q, &u, pool)?;
    let singular = order.iter().map(|&i| squares[i].sqrt() as f32).collect();
    let squared_norm = survey.squared_norm;
    Ok(Factors { tokens, features, rank, a, b, singular, squared_norm, squared_error, route })
}
