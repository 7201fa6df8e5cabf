//! Pooling on the device: one thread per score.

use super::{NAME, PoolArgs, PoolKind};
use crate::device::gpu::{Binding, Call, Context};
use crate::error::{DeviceError, KernelError};

/// The uniform block of `shaders/pool.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    count: u32,
    rows: u32,
    width: u32,
    kind: u32,
}

/// Refuses arrays that no binding can show to a shader.
///
/// # Errors
/// [`DeviceError::Limit`].
pub(in crate::kernel) fn fits(
    context: &Context,
    what: &'static str,
    words: usize,
) -> Result<(), DeviceError> {
    let (need, limit) = (4 * words as u64, context.binding_limit());
    if need <= limit {
        return Ok(());
    }
    Err(DeviceError::Limit { what, need, limit, hint: "pass fewer rows at once" })
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let count = args.input.len();
    if count == 0 {
        return Ok(());
    }
    fits(context, NAME, count)?;
    let mut starts = vec![0u32];
    let mut at = 0;
    for &len in args.lengths {
        at += len as u32;
        starts.push(at);
    }
    let params = Params {
        count: count as u32,
        rows: args.lengths.len() as u32,
        // Wider than everything is as wide as everything; only the divisor keeps the true width.
        width: u32::try_from(args.width).unwrap_or(u32::MAX),
        kind: u32::from(args.kind == PoolKind::Max),
    };
    let mut call = Call::new(context, NAME);
    let pooled = call.scratch(count);
    let bindings = [call.upload(&starts), call.upload(args.input), Binding::from(&pooled)];
    call.dispatch("pool", &[], &params, &bindings, count.div_ceil(64))?;
    call.read(&pooled);
    args.out.copy_from_slice(&call.finish()?.floats(0)[..count]);
    Ok(())
}
