//! Selection on the device: one workgroup per row, in integers, so the set is exact.
//!
//! *Helps* when there are many rows. *Hurts* for one very long row, which a single workgroup walks.

use super::{NAME, TopKArgs};
use crate::device::gpu::{Binding, Call, Context};
use crate::error::KernelError;
use crate::kernel::pool::gpu::fits;

/// The uniform block of `shaders/top_k.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    count: u32,
    spare: [u32; 3],
}

/// One row.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Row {
    start: u32,
    length: u32,
    wanted: u32,
    target_at: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if args.out.is_empty() {
        return Ok(());
    }
    fits(context, NAME, args.scores.len())?;
    let (mut start, mut target_at) = (0, 0);
    let mut rows = Vec::with_capacity(args.lengths.len());
    for (&length, &wanted) in args.lengths.iter().zip(args.counts) {
        let (length, wanted) = (length as u32, wanted as u32);
        rows.push(Row { start, length, wanted, target_at });
        start += length;
        target_at += wanted;
    }
    let mut call = Call::new(context, NAME);
    let chosen = call.scratch(args.out.len());
    let params = Params { count: rows.len() as u32, spare: [0; 3] };
    let bindings =
        [call.upload(&rows), call.upload(args.scores), call.upload(args.protect), Binding::from(&chosen)];
    call.dispatch("top_k", &[], &params, &bindings, rows.len())?;
    call.read(&chosen);
    let len = args.out.len();
    args.out.copy_from_slice(&call.finish()?.words(0)[..len]);
    Ok(())
}
