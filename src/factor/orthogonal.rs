//! Orthonormal bases of tall matrices, and leading eigenvectors of symmetric ones.

use super::product;
use super::tiles::Tiles;
use super::zeros;
use crate::device::Pool;
use crate::error::FactorError;
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::{cholesky, evd, householder, qr, triangular_inverse};
use faer::{Conj, Mat, Par, Spec};

/// Smallest squared pivot, of columns of length 1, at which one Cholesky factor of the f64 Gram matrix makes them
/// orthonormal: the defect is the f64 rounding over it, 1e-8 here, less than the f32 rounding of the result.
const ONE_PASS: f64 = 1e-8;

/// Smallest one at which a second pass, over the result of the first, still does: the first leaves a defect of 1e-4.
/// Below, columns are as good as dependent, and reflections are used.
const TWO_PASSES: f64 = 1e-12;

/// Replaces `m[rows, columns]`, `rows >= columns`, by an orthonormal basis of a space that its columns lie in.
///
/// By the Cholesky factor of the Gram matrix, twice where columns are nearly dependent (CholeskyQR2: Yamamoto and
/// others, ETNA 44, 2015), by Householder reflections where they are dependent. Columns are scaled to length 1 for
/// that, so that graded ones are no trouble.
pub(super) fn orthonormalise(m: &mut Vec<f32>, columns: usize, pool: &Pool) -> Result<(), FactorError> {
    let Some((pivot, inverse)) = inverse_factor(m, columns, pool)? else {
        return reflect(m, columns);
    };
    if pivot < TWO_PASSES {
        return reflect(m, columns);
    }
    let first = product::apply(m, &inverse, pool)?;
    if pivot >= ONE_PASS {
        *m = first;
        return Ok(());
    }
    match inverse_factor(&first, columns, pool)? {
        Some((pivot, inverse)) if pivot >= ONE_PASS => {
            *m = product::apply(&first, &inverse, pool)?;
            Ok(())
        }
        _ => reflect(m, columns),
    }
}

/// `R⁻¹` of `M = Q R` and the smallest squared pivot; `None` if there is no such factor.
fn inverse_factor(m: &[f32], columns: usize, pool: &Pool) -> Result<Option<(f64, Mat<f64>)>, FactorError> {
    let mut tiles = Tiles::new(columns)?;
    tiles.add_columns(m, m.len() / columns, columns, pool);
    let mut gram = tiles.assemble();
    let squares: Vec<f64> = (0..columns).map(|j| gram[(j, j)]).collect();
    if squares.iter().any(|square| !square.is_finite()) {
        return Err(FactorError::Changed);
    }
    if squares.contains(&0.0) {
        return Ok(None);
    }
    let scales: Vec<f64> = squares.iter().map(|square| square.sqrt().recip()).collect();
    for (j, column) in gram.col_iter_mut().enumerate() {
        for (i, x) in column.iter_mut().enumerate() {
            *x *= scales[i] * scales[j];
        }
    }
    let params = Spec::default();
    let need = cholesky::llt::factor::cholesky_in_place_scratch::<f64>(columns, Par::Seq, params);
    let (mut buffer, regularization) = (MemBuffer::new(need), Default::default());
    let stack = MemStack::new(&mut buffer);
    let factored =
        cholesky::llt::factor::cholesky_in_place(gram.as_mut(), regularization, Par::Seq, stack, params);
    if factored.is_err() {
        return Ok(None);
    }
    let pivot = (0..columns).map(|j| gram[(j, j)] * gram[(j, j)]).fold(f64::INFINITY, f64::min);
    let mut inverse = Mat::zeros(columns, columns);
    triangular_inverse::invert_lower_triangular(inverse.as_mut(), gram.as_ref(), Par::Seq);
    // Gram' = D M'M D = L L', so that Q = M (D L'⁻¹): what is scaled back is the inverse.
    let inverse =
        Mat::from_fn(columns, columns, |i, j| if i <= j { scales[i] * inverse[(j, i)] } else { 0.0 });
    Ok(Some((pivot, inverse)))
}

/// The same by Householder reflections, in f64 on one thread: whatever the columns, even all zero.
fn reflect(m: &mut [f32], columns: usize) -> Result<(), FactorError> {
    let rows = m.len() / columns;
    // Its size, before a matrix that would end the process if there is no memory for it.
    drop(zeros::<f64>("an orthogonal factor", rows, 2 * columns)?);
    let mut a = Mat::from_fn(rows, columns, |i, j| f64::from(m[i * columns + j]));
    let block = qr::no_pivoting::factor::recommended_block_size::<f64>(rows, columns);
    let mut coefficients = Mat::zeros(block, columns);
    let params = Spec::default();
    let need = qr::no_pivoting::factor::qr_in_place_scratch::<f64>(rows, columns, block, Par::Seq, params);
    let mut buffer = MemBuffer::new(need);
    let stack = MemStack::new(&mut buffer);
    qr::no_pivoting::factor::qr_in_place(a.as_mut(), coefficients.as_mut(), Par::Seq, stack, params);
    let mut q = Mat::<f64>::identity(rows, columns);
    let need = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
        rows, block, columns,
    );
    let mut buffer = MemBuffer::new(need);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        a.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut buffer),
    );
    for (i, row) in m.chunks_exact_mut(columns).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = q[(i, j)] as f32;
        }
    }
    Ok(())
}

/// The eigenvectors of the `count` largest eigenvalues of a symmetric matrix, largest first: `[side, count]`.
pub(super) fn leading(matrix: Mat<f64>, count: usize) -> Result<Mat<f64>, FactorError> {
    let side = matrix.nrows();
    if matrix.diagonal().column_vector().iter().any(|x| !x.is_finite()) {
        return Err(FactorError::Changed);
    }
    let (mut values, mut vectors) = (Diag::zeros(side), Mat::zeros(side, side));
    let params = Spec::default();
    let yes = evd::ComputeEigenvectors::Yes;
    let mut buffer = MemBuffer::new(evd::self_adjoint_evd_scratch::<f64>(side, yes, Par::Seq, params));
    let stack = MemStack::new(&mut buffer);
    let (into, vectors_into) = (values.as_mut(), Some(vectors.as_mut()));
    evd::self_adjoint_evd(matrix.as_ref(), into, vectors_into, Par::Seq, stack, params)
        .map_err(|_| FactorError::NoConvergence { size: side })?;
    // They come in ascending order.
    Ok(Mat::from_fn(side, count, |i, j| vectors[(i, side - 1 - j)]))
}
