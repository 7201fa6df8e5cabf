//! One row after another, one group after another.
//!
//! *Helps* doubt the others. *Hurts* by its speed.

use super::PackArgs;
use super::quantize::Quantizer;
use crate::device::encoding::{PackedLayout, rotate};
use crate::device::page::{PageLayout, Side};
use crate::error::KernelError;
use half::f16;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`], [`KernelError::NotFinite`], [`KernelError::Range`].
pub fn run(args: &mut PackArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let layout = args.layout;
    let (k, v) = args.page.block.host_mut()[..layout.mirror_offset()].split_at_mut(layout.v_offset());
    side(layout, Side::Key, args.keys, k)?;
    side(layout, Side::Value, args.values, v)
}

/// One side, into its bytes.
fn side(layout: &PageLayout, side: Side, rows: &[f32], bytes: &mut [u8]) -> Result<(), KernelError> {
    match layout.packed(side) {
        Some(packed) => pack(&packed, rows, bytes),
        None => {
            for (i, row) in layout.dense(side, rows).enumerate() {
                layout.write_exact(bytes, side, i, row);
            }
            Ok(())
        }
    }
}

/// Packs `rows [n, d]` into the bytes of a side.
fn pack(layout: &PackedLayout, rows: &[f32], bytes: &mut [u8]) -> Result<(), KernelError> {
    let d = layout.d;
    let n = rows.len() / d;
    let mut rows = rows.to_vec();
    if layout.packing.hadamard {
        rows.chunks_exact_mut(d).for_each(rotate);
    }
    if layout.packing.center {
        for c in 0..d {
            let sum = (0..n).map(|j| rows[j * d + c]).fold(0.0, |sum: f32, x| sum + x);
            let mean = f16::from_f32(sum / n as f32);
            (0..n).for_each(|j| rows[j * d + c] -= mean.to_f32());
            layout.set_mean(bytes, c, mean);
        }
    }
    let mut quantizer = Quantizer::new(layout.packing.format);
    for first in (0..n).step_by(layout.group_rows) {
        for start in (0..d).step_by(layout.group_dims) {
            let members: Vec<(usize, usize)> = (first..(first + layout.group_rows).min(n))
                .flat_map(|j| (start..(start + layout.group_dims).min(d)).map(move |c| (j, c)))
                .collect();
            let values: Vec<f32> = members.iter().map(|&(j, c)| rows[j * d + c]).collect();
            let mut codes = vec![0; values.len()];
            let (scale, min) = quantizer.group(&values, &mut codes);
            super::in_range(layout, first, (scale, min))?;
            layout.set_parameters(bytes, layout.group(first, start), scale, min);
            for (&(j, c), code) in members.iter().zip(codes) {
                layout.set_code(bytes, j, c, code);
            }
        }
    }
    Ok(())
}
