//! Row by row.

use super::{GatherArgs, GatherTarget, copy_metadata, in_parts, is_mixed};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::rebuild;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if matches!(args.target, GatherTarget::Dense { .. }) && is_mixed(args.head, args.slots) {
        return in_parts(args, run, rebuild::reference::run);
    }
    let sources: Vec<_> = args.head.pages().collect();
    let find = |slot: u32| {
        let slot = slot as usize;
        let index = sources.partition_point(|p| p.first + p.rows <= slot);
        (&sources[index], slot - sources[index].first)
    };
    match &mut args.target {
        GatherTarget::Pages { layout, pages } => {
            for (i, &slot) in args.slots.iter().enumerate() {
                let (source, row) = find(slot);
                let target = pages[i / layout.capacity].block.host_mut();
                for side in [Side::Key, Side::Value] {
                    let (bytes, start) = (layout.row_bytes(side), layout.range(side).start);
                    let (from, to) = (start + row * bytes, start + (i % layout.capacity) * bytes);
                    target[to..to + bytes].copy_from_slice(&source.page.block.host()[from..from + bytes]);
                }
            }
            copy_metadata(args.head, args.slots, layout, pages);
        }
        GatherTarget::Dense { keys, values } => {
            for (i, &slot) in args.slots.iter().enumerate() {
                let (source, row) = find(slot);
                let (d_k, d_v) = (source.layout.d_k, source.layout.d_v);
                source.layout.read_row(source.page, Side::Key, row, &mut keys[i * d_k..(i + 1) * d_k]);
                source.layout.read_row(source.page, Side::Value, row, &mut values[i * d_v..(i + 1) * d_v]);
            }
        }
    }
    Ok(())
}
