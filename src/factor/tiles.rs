//! Gram matrices, summed in f64 tile by tile.
//!
//! Products of f32 numbers are exact in f64, so a small singular value beside a large one survives being squared:
//! down to 1e-7 of it instead of 3e-4.

use super::{elements, spread, zeros};
use crate::device::Pool;
use crate::error::FactorError;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::ops::Range;

/// Rows and columns of a tile. A divisor of a panel's rows.
const TILE: usize = 128;

/// Inner dimension between two conversions: two strips of it in f64 stay in the second cache level.
const DEPTH: usize = 256;

/// One tile of the lower triangle.
struct Tile {
    row: usize,
    column: usize,
    /// `[rows, columns]`, row-major.
    sums: Vec<f64>,
}

/// The lower triangle of a symmetric matrix.
pub(super) struct Tiles {
    side: usize,
    tiles: Vec<Tile>,
}

impl Tiles {
    /// Zero.
    pub(super) fn new(side: usize) -> Result<Self, FactorError> {
        elements("a Gram matrix", side, side)?;
        let starts = || (0..side).step_by(TILE);
        let places =
            starts().flat_map(|row| starts().take_while(move |&column| column <= row).map(move |c| (row, c)));
        let len = |start: usize| TILE.min(side - start);
        let tiles = places.map(|(row, column)| {
            let sums = zeros("a Gram matrix", len(row), len(column))?;
            Ok(Tile { row, column, sums })
        });
        Ok(Self { side, tiles: tiles.collect::<Result<_, FactorError>>()? })
    }

    fn extent(&self, start: usize) -> Range<usize> {
        start..self.side.min(start + TILE)
    }

    /// Adds `Mᵀ M` of `m[lines, side]`, row-major.
    pub(super) fn add_columns(&mut self, m: &[f32], lines: usize, side: usize, pool: &Pool) {
        let ends: Vec<_> = (0..side).step_by(TILE).map(|start| self.extent(start)).collect();
        let items = self.tiles.iter_mut().collect();
        spread(
            pool,
            items,
            || (Vec::new(), Vec::new()),
            |(left, right), tile: &mut Tile| {
                let (rows, columns) = (&ends[tile.row / TILE], &ends[tile.column / TILE]);
                for first in (0..lines).step_by(DEPTH) {
                    let depth = DEPTH.min(lines - first);
                    let part = &m[first * side..][..depth * side];
                    widen(part, side, rows.clone(), left);
                    let left = MatRef::from_row_major_slice(left, depth, rows.len()).transpose();
                    // On the diagonal both strips are one.
                    let right = if tile.row == tile.column {
                        left.transpose()
                    } else {
                        widen(part, side, columns.clone(), right);
                        MatRef::from_row_major_slice(right, depth, columns.len())
                    };
                    let sums = MatMut::from_row_major_slice_mut(&mut tile.sums, rows.len(), columns.len());
                    matmul(sums, Accum::Add, left, right, 1.0, Par::Seq);
                }
            },
        );
    }

    /// Adds `M Nᵀ` of two panels of rows, of which `m` starts at a tile `row` and `n` at a tile `column` not after it.
    pub(super) fn add_rows(
        &mut self,
        (row, m): (usize, &[f32]),
        (column, n): (usize, &[f32]),
        features: usize,
        pool: &Pool,
    ) {
        let (rows, columns) = (row..row + m.len() / features, column..column + n.len() / features);
        let met = |tile: &Tile| rows.contains(&tile.row) && columns.contains(&tile.column);
        let items = self.tiles.iter_mut().filter(|tile| met(tile)).collect();
        let side = self.side;
        spread(
            pool,
            items,
            || (Vec::new(), Vec::new()),
            |(left, right), tile: &mut Tile| {
                let (tall, wide) = (TILE.min(side - tile.row), TILE.min(side - tile.column));
                let m = &m[(tile.row - row) * features..][..tall * features];
                let n = &n[(tile.column - column) * features..][..wide * features];
                for first in (0..features).step_by(DEPTH) {
                    let depth = first..features.min(first + DEPTH);
                    widen(m, features, depth.clone(), left);
                    widen(n, features, depth.clone(), right);
                    let left = MatRef::from_row_major_slice(left, tall, depth.len());
                    let right = MatRef::from_row_major_slice(right, wide, depth.len()).transpose();
                    let sums = MatMut::from_row_major_slice_mut(&mut tile.sums, tall, wide);
                    matmul(sums, Accum::Add, left, right, 1.0, Par::Seq);
                }
            },
        );
    }

    /// The whole matrix.
    pub(super) fn assemble(self) -> Mat<f64> {
        let mut whole = Mat::zeros(self.side, self.side);
        for tile in &self.tiles {
            let columns = self.extent(tile.column).len();
            for (i, row) in tile.sums.chunks_exact(columns).enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    whole[(tile.row + i, tile.column + j)] = sum;
                    whole[(tile.column + j, tile.row + i)] = sum;
                }
            }
        }
        whole
    }
}

/// These columns of row-major lines of `stride` elements, in f64 and side by side.
pub(super) fn widen(lines: &[f32], stride: usize, columns: Range<usize>, out: &mut Vec<f64>) {
    out.clear();
    for line in lines.chunks_exact(stride) {
        out.extend(line[columns.clone()].iter().map(|&x| f64::from(x)));
    }
}
