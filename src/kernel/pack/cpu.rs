//! Both sides at once, on two threads; within a side whole rows and groups, so that a compiler finds vectors in them.
//!
//! *Helps* the prompt, which is packed in one go, and a cache without an exact tail, which packs its last page again
//! with every entry. *Hurts* nothing: the bits are those of [`super::reference`].

use super::PackArgs;
use super::quantize::Quantizer;
use crate::device::encoding::{PackedLayout, rotate};
use crate::device::page::{PageLayout, Side};
use crate::error::KernelError;
use crate::kernel::simd::{Exec, Level, dispatch};
use half::f16;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`], [`KernelError::NotFinite`], [`KernelError::Range`].
pub fn run(exec: &Exec, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let layout = args.layout;
    let (k, v) = args.page.block.host_mut()[..layout.mirror_offset()].split_at_mut(layout.v_offset());
    // Quantizing an element takes a few operations.
    let tasks = exec.tasks(4 * (args.keys.len() + args.values.len()));
    let (level, keys, values) = (exec.level(), args.keys, args.values);
    exec.run(tasks, || {
        let mut key = || side(level, layout, Side::Key, keys, k);
        let mut value = || side(level, layout, Side::Value, values, v);
        let (a, b) = if tasks < 2 { (key(), value()) } else { rayon::join(key, value) };
        a.and(b)
    })
}

/// One side, into its bytes.
pub(super) fn side(
    level: Level,
    layout: &PageLayout,
    side: Side,
    rows: &[f32],
    bytes: &mut [u8],
) -> Result<(), KernelError> {
    let Some(packed) = layout.packed(side) else {
        for (i, row) in layout.dense(side, rows).enumerate() {
            layout.write_exact(bytes, side, i, row);
        }
        return Ok(());
    };
    let mut rows = rows.to_vec();
    // Plain loops, compiled for the level.
    dispatch!(level.token(), _simd => {
        turn_and_center(&packed, &mut rows, bytes);
        match packed.group_rows {
            1 => groups_of_a_row(&packed, &rows, bytes),
            _ => groups_of_a_channel(&packed, &rows, bytes),
        }
    })
}

/// Rotates rows and takes their mean off, which is stored.
#[inline(always)]
fn turn_and_center(layout: &PackedLayout, rows: &mut [f32], bytes: &mut [u8]) {
    let d = layout.d;
    if layout.packing.hadamard {
        rows.chunks_exact_mut(d).for_each(rotate);
    }
    if !layout.packing.center {
        return;
    }
    let count = (rows.len() / d) as f32;
    let mut means = vec![0.0f32; d];
    for row in rows.chunks_exact(d) {
        means.iter_mut().zip(row).for_each(|(mean, x)| *mean += x);
    }
    for (c, mean) in means.iter_mut().enumerate() {
        let stored = f16::from_f32(*mean / count);
        layout.set_mean(bytes, c, stored);
        *mean = stored.to_f32();
    }
    for row in rows.chunks_exact_mut(d) {
        row.iter_mut().zip(&means).for_each(|(x, mean)| *x -= mean);
    }
}

#[inline(always)]
fn groups_of_a_row(layout: &PackedLayout, rows: &[f32], bytes: &mut [u8]) -> Result<(), KernelError> {
    let mut quantizer = Quantizer::new(layout.packing.format);
    let mut codes = vec![0; layout.padded()];
    for (j, row) in rows.chunks_exact(layout.d).enumerate() {
        let groups = row.chunks(layout.group_dims).zip(codes.chunks_mut(layout.group_dims));
        for (g, (group, codes)) in groups.enumerate() {
            let (scale, min) = quantizer.group(group, &mut codes[..group.len()]);
            super::in_range(layout, j, (scale, min))?;
            layout.set_parameters(bytes, j * layout.row_groups() + g, scale, min);
        }
        layout.set_codes(bytes, j, &codes);
    }
    Ok(())
}

#[inline(always)]
fn groups_of_a_channel(layout: &PackedLayout, rows: &[f32], bytes: &mut [u8]) -> Result<(), KernelError> {
    let (d, padded) = (layout.d, layout.padded());
    let mut quantizer = Quantizer::new(layout.packing.format);
    let (mut channel, mut channel_codes) = (vec![0.0; layout.group_rows], vec![0; layout.group_rows]);
    let mut codes = vec![0; layout.group_rows * padded];
    for (b, block) in rows.chunks(layout.group_rows * d).enumerate() {
        let (first, count) = (b * layout.group_rows, block.len() / d);
        for c in 0..d {
            let channel = &mut channel[..count];
            channel.iter_mut().zip(block.chunks_exact(d)).for_each(|(x, row)| *x = row[c]);
            let channel_codes = &mut channel_codes[..count];
            let (scale, min) = quantizer.group(channel, channel_codes);
            super::in_range(layout, first, (scale, min))?;
            layout.set_parameters(bytes, layout.group(first, c), scale, min);
            codes.chunks_exact_mut(padded).zip(channel_codes).for_each(|(row, code)| row[c] = *code);
        }
        for (j, codes) in codes.chunks_exact(padded).take(count).enumerate() {
            layout.set_codes(bytes, first + j, codes);
        }
    }
    Ok(())
}
