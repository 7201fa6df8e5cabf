//! Rotation on the device: keys of a page in place, without a wait; dense rows there and back.

use super::{NAME, RopeArgs, RopeTarget};
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, kind};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::geometry::RotaryLayout;

/// The uniform block of `shaders/rope.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    base: u32,
    row_words: u32,
    dim: u32,
    rotated: u32,
    halves: u32,
    count: u32,
    spare: [u32; 2],
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if args.table.is_empty() {
        return Ok(());
    }
    let mut params = Params {
        base: 0,
        row_words: 0,
        dim: 0,
        rotated: args.dims as u32,
        halves: u32::from(args.layout == RotaryLayout::HalfSplit),
        count: 0,
        spare: [0; 2],
    };
    match &mut args.target {
        RopeTarget::Keys { layout, page, rows } => {
            let block = DeviceBlock::of(page, NAME)?;
            params.base = block.word();
            params.row_words = (layout.row_bytes(Side::Key) / 4) as u32;
            params.dim = layout.d_k as u32;
            params.count = *rows as u32;
            let mut call = Call::new(context, NAME);
            let bindings = [Binding::Slab(block.buffer().clone()), call.upload(args.table)];
            call.dispatch("rope", &[("ROW_TYPE", kind(layout, Side::Key))], &params, &bindings, *rows)?;
            call.finish()?;
        }
        RopeTarget::Dense { rows, dim } => {
            params.row_words = *dim as u32;
            params.dim = *dim as u32;
            let step = (context.batch_bytes() / (4 * *dim)).max(1);
            for (rows, table) in rows.chunks_mut(step * *dim).zip(args.table.chunks(step * args.dims)) {
                let count = rows.len() / *dim;
                params.count = count as u32;
                let mut call = Call::new(context, NAME);
                let turned = call.load(rows);
                let bindings = [Binding::from(&turned), call.upload(table)];
                call.dispatch("rope", &[("ROW_TYPE", 0)], &params, &bindings, count)?;
                call.read(&turned);
                let len = rows.len();
                rows.copy_from_slice(&call.finish()?.floats(0)[..len]);
            }
        }
    }
    Ok(())
}
