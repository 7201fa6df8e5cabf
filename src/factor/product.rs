//! Products of the streamed matrix with one that lies in memory, and of tall matrices with small ones.
//!
//! Every output element belongs to one task, which adds up in one order. f32 products accumulate in registers along the
//! features, or over a panel's rows and then panel by panel.

use super::meter::Meter;
use super::rows::{BLOCK, Source};
use super::tiles::{Tiles, widen};
use super::{spread, zeros};
use crate::device::Pool;
use crate::error::FactorError;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

/// Features whose sums one task makes.
const STRIPE: usize = 128;

/// `X P`: `p` is `[n, columns]`, the result `[T, columns]`, row-major both.
pub(super) fn times(
    source: &Source<'_>,
    p: &[f32],
    columns: usize,
    pool: &Pool,
    meter: &mut Meter<'_>,
) -> Result<Vec<f32>, FactorError> {
    let (tokens, features) = (source.tokens, source.features);
    let mut y: Vec<f32> = zeros("a basis", tokens, columns)?;
    let p = MatRef::from_row_major_slice(p, features, columns);
    let mut outs = y.chunks_mut(BLOCK * columns);
    for turn in source.turns(pool) {
        let items: Vec<_> = turn.into_iter().zip(outs.by_ref()).collect();
        let rows: usize = items.iter().map(|(_, out)| out.len() / columns).sum();
        let done = spread(pool, items, Vec::new, |buffer, (first, out)| {
            let block = source.block(first, BLOCK, buffer)?;
            let rows = block.len() / features;
            let block = MatRef::from_row_major_slice(block, rows, features);
            let out = MatMut::from_row_major_slice_mut(out, rows, columns);
            matmul(out, Accum::Replace, block, p, 1.0, Par::Seq);
            Ok(())
        });
        done.into_iter().collect::<Result<(), FactorError>>()?;
        meter.add((rows * features) as u64 * columns as u64)?;
    }
    Ok(y)
}

/// `Xᵀ Q`: `q` is `[T, columns]`, the result `[n, columns]`, row-major both.
pub(super) fn transposed_times(
    source: &Source<'_>,
    q: &[f32],
    columns: usize,
    pool: &Pool,
    meter: &mut Meter<'_>,
) -> Result<Vec<f32>, FactorError> {
    let features = source.features;
    let mut z: Vec<f32> = zeros("a basis", features, columns)?;
    let mut buffer = Vec::new();
    for first in source.panels() {
        let rows = source.panel_rows(first);
        let panel = MatRef::from_row_major_slice(source.panel(first, pool, &mut buffer)?, rows, features);
        let q = MatRef::from_row_major_slice(&q[first * columns..][..rows * columns], rows, columns);
        let stripes = z.chunks_mut(STRIPE * columns).enumerate().collect();
        spread(
            pool,
            stripes,
            || (),
            |(), (stripe, out)| {
                let wide = out.len() / columns;
                let out = MatMut::from_row_major_slice_mut(out, wide, columns);
                let part = panel.subcols(stripe * STRIPE, wide);
                matmul(out, Accum::Add, part.transpose(), q, 1.0, Par::Seq);
            },
        );
        meter.add((rows * features) as u64 * columns as u64)?;
    }
    Ok(z)
}

/// `Xᵀ X`.
pub(super) fn columns_gram(
    source: &Source<'_>,
    pool: &Pool,
    tiles: &mut Tiles,
    meter: &mut Meter<'_>,
) -> Result<(), FactorError> {
    let mut buffer = Vec::new();
    for first in source.panels() {
        let rows = source.panel_rows(first);
        tiles.add_columns(source.panel(first, pool, &mut buffer)?, rows, source.features, pool);
        meter.add((rows * source.features) as u64 * source.features as u64)?;
    }
    Ok(())
}

/// `X Xᵀ`, panel by panel: those before a panel are read again for it.
pub(super) fn rows_gram(
    source: &Source<'_>,
    pool: &Pool,
    tiles: &mut Tiles,
    meter: &mut Meter<'_>,
) -> Result<(), FactorError> {
    let (mut lower, mut upper) = (Vec::new(), Vec::new());
    for first in source.panels() {
        let panel = source.panel(first, pool, &mut lower)?;
        for before in source.panels().take_while(|&before| before < first) {
            let other = source.panel(before, pool, &mut upper)?;
            tiles.add_rows((first, panel), (before, other), source.features, pool);
        }
        tiles.add_rows((first, panel), (first, panel), source.features, pool);
        meter.add((source.panel_rows(first) * source.features) as u64 * source.tokens as u64)?;
    }
    Ok(())
}

/// `M W` in f64: `m` is `[rows, w.nrows()]`, the result `[rows, w.ncols()]`, row-major both.
pub(super) fn apply(m: &[f32], w: &Mat<f64>, pool: &Pool) -> Result<Vec<f32>, FactorError> {
    let (inner, columns) = (w.nrows(), w.ncols());
    let mut product: Vec<f32> = zeros("a basis", m.len() / inner, columns)?;
    let items = m.chunks(BLOCK * inner).zip(product.chunks_mut(BLOCK * columns)).collect();
    spread(
        pool,
        items,
        || (Vec::new(), Vec::new()),
        |(wide, sums), (block, out)| {
            let rows = block.len() / inner;
            widen(block, inner, 0..inner, wide);
            sums.clear();
            sums.resize(out.len(), 0.0);
            let block = MatRef::from_row_major_slice(wide, rows, inner);
            let product = MatMut::from_row_major_slice_mut(sums, rows, columns);
            matmul(product, Accum::Replace, block, w.as_ref(), 1.0, Par::Seq);
            out.iter_mut().zip(&*sums).for_each(|(x, &sum)| *x = sum as f32);
        },
    );
    Ok(product)
}
