//! Pair by pair.

use super::{RopeArgs, RopeTarget};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::geometry::RotaryLayout;

/// Rotates one row by `angles`, `[dims / 2, 2]` cosine and sine.
pub(in crate::kernel) fn rotate(row: &mut [f32], dims: usize, layout: RotaryLayout, angles: &[f32]) {
    for (pair, angle) in angles.chunks_exact(2).enumerate() {
        let (a, b) = match layout {
            RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            RotaryLayout::HalfSplit => (pair, pair + dims / 2),
        };
        let (cos, sin) = (angle[0], angle[1]);
        let (x, y) = (row[a], row[b]);
        row[a] = x * cos - y * sin;
        row[b] = x * sin + y * cos;
    }
}

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if args.dims == 0 {
        return Ok(());
    }
    let angles = args.table.chunks_exact(args.dims);
    match &mut args.target {
        RopeTarget::Keys { layout, page, .. } => {
            let mut row = vec![0.0; layout.d_k];
            for (i, angles) in angles.enumerate() {
                layout.read_row(page, Side::Key, i, &mut row);
                rotate(&mut row, args.dims, args.layout, angles);
                layout.write_row(page.block.host_mut(), Side::Key, i, &row);
            }
        }
        RopeTarget::Dense { rows, dim } => {
            for (row, angles) in rows.chunks_exact_mut(*dim).zip(angles) {
                rotate(row, args.dims, args.layout, angles);
            }
        }
    }
    Ok(())
}
