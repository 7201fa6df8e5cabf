//! Packed on the host, where the rows come from, and uploaded as they are, so that a page holds the same bits on
//! every backend.
//!
//! *Helps* a prompt, whose rows are staged through the host anyway. *Hurts* long generation, where rows make the
//! trip down and up again, once per page.

use super::{PackArgs, cpu};
use crate::device::gpu::{Context, DeviceBlock};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::simd::Level;

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let layout = args.layout;
    let block = DeviceBlock::of(args.page, super::NAME)?;
    for (side, rows) in [(Side::Key, args.keys), (Side::Value, args.values)] {
        if layout.packed(side).is_none() {
            context.memory.write_rows(block, layout, side, 0, rows);
            continue;
        }
        let mut bytes = vec![0; layout.side_bytes(side)];
        cpu::side(Level::detect(), layout, side, rows, &mut bytes)?;
        context.memory.write_side(block, layout, side, &bytes);
    }
    Ok(())
}
