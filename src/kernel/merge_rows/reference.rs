//! Target by target, source by source.

use super::{MergeRowsArgs, dims};
use crate::device::page::Side;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (d_k, d_v) = dims(args.head);
    let add = |side: Side, slot: u32, weight: f32, out: &mut [f32]| {
        let Some(page) = args.head.pages().find(|p| (slot as usize) < p.first + p.rows) else { return };
        let mut row = vec![0.0; out.len()];
        page.layout.read_row(page.page, side, slot as usize - page.first, &mut row);
        out.iter_mut().zip(&row).for_each(|(o, x)| *o += weight * x);
    };
    args.keys.fill(0.0);
    args.values.fill(0.0);
    for (i, (target, sources)) in args.merges.iter().enumerate() {
        let value = &mut args.values[i * d_v..(i + 1) * d_v];
        add(Side::Value, target.slot, target.value, value);
        sources.iter().for_each(|s| add(Side::Value, s.slot, s.value, value));
        if args.merges.keys {
            let key = &mut args.keys[i * d_k..(i + 1) * d_k];
            add(Side::Key, target.slot, target.key, key);
            sources.iter().for_each(|s| add(Side::Key, s.slot, s.key, key));
        }
    }
    Ok(())
}
