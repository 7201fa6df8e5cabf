//! Several pairs per vector: halves are loaded side by side, interleaved pairs are separated and rejoined.
//!
//! *Helps* renumbering whole caches. *Hurts* nothing; a page is one task, dense rows are split over threads.

use super::reference::rotate;
use super::{RopeArgs, RopeTarget};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::geometry::RotaryLayout;
use crate::kernel::simd::widen::widen_row;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::{Simd, SimdBase};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (layout, dims, table) = (args.layout, args.dims, args.table);
    if dims == 0 {
        return Ok(());
    }
    match &mut args.target {
        RopeTarget::Keys { layout: pages, page, rows } => {
            let mut row = vec![0.0; pages.d_k];
            for (i, angles) in table.chunks_exact(dims).take(*rows).enumerate() {
                dispatch!(exec.token(), simd => {
                    widen_row(simd, pages, page, Side::Key, i, &mut row);
                    turn(simd, &mut row, dims, layout, angles);
                });
                pages.write_row(page.block.host_mut(), Side::Key, i, &row);
            }
        }
        RopeTarget::Dense { rows, dim } => {
            let tasks = exec.tasks(table.len() * OPERATIONS_PER_ANGLE);
            let work = Dense { exec, layout, dims, dim: *dim, table, rows };
            exec.run(tasks, || work.spread(tasks));
        }
    }
    Ok(())
}

/// Two products and a sum for each sine and each cosine.
const OPERATIONS_PER_ANGLE: usize = 3;

struct Dense<'a> {
    exec: &'a Exec,
    layout: RotaryLayout,
    dims: usize,
    dim: usize,
    table: &'a [f32],
    rows: &'a mut [f32],
}

impl Split for Dense<'_> {
    fn pieces(&self) -> usize {
        self.rows.len() / self.dim.max(1)
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (table, rest) = self.table.split_at(at * self.dims);
        let rows = take(&mut self.rows, at * self.dim);
        (Dense { table, rows, ..self }, Dense { table: rest, ..self })
    }

    fn work(self) {
        let Self { exec, layout, dims, dim, table, rows } = self;
        dispatch!(exec.token(), simd => {
            for (row, angles) in rows.chunks_exact_mut(dim).zip(table.chunks_exact(dims)) {
                turn(simd, row, dims, layout, angles);
            }
        });
    }
}

/// Rotates one row by `angles`, `[dims / 2, 2]` cosine and sine.
#[inline(always)]
fn turn<S: Simd>(simd: S, row: &mut [f32], dims: usize, layout: RotaryLayout, angles: &[f32]) {
    let lanes = S::f32s::LEN;
    let pairs = dims / 2;
    let whole = pairs - pairs % lanes;
    let load = |s: &[f32]| S::f32s::from_slice(simd, &s[..lanes]);
    for i in (0..whole).step_by(lanes) {
        let (cos, sin) = load(&angles[2 * i..]).deinterleave(load(&angles[2 * i + lanes..]));
        let rotated = |x: S::f32s, y: S::f32s| (x * cos - y * sin, x * sin + y * cos);
        match layout {
            RotaryLayout::HalfSplit => {
                let (a, b) = rotated(load(&row[i..]), load(&row[i + pairs..]));
                a.store_slice(&mut row[i..i + lanes]);
                b.store_slice(&mut row[i + pairs..i + pairs + lanes]);
            }
            RotaryLayout::Interleaved => {
                let pair = &mut row[2 * i..2 * (i + lanes)];
                let (x, y) = load(pair).deinterleave(load(&pair[lanes..]));
                let (a, b) = rotated(x, y);
                let (first, second) = a.interleave(b);
                first.store_slice(&mut pair[..lanes]);
                second.store_slice(&mut pair[lanes..]);
            }
        }
    }
    if whole == pairs {
        return;
    }
    match layout {
        RotaryLayout::Interleaved => {
            rotate(&mut row[2 * whole..], dims - 2 * whole, layout, &angles[2 * whole..]);
        }
        RotaryLayout::HalfSplit => {
            for (i, angle) in (whole..pairs).zip(angles[2 * whole..].chunks_exact(2)) {
                let (x, y) = (row[i], row[i + pairs]);
                row[i] = x * angle[0] - y * angle[1];
                row[i + pairs] = x * angle[1] + y * angle[0];
            }
        }
    }
}
