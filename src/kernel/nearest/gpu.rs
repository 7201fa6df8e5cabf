//! Nearest keys on the device: one workgroup per entry, threads over candidates.
//!
//! Keys are widened into dense buffers first, so that the shader meets one format. *Helps* keep keys on the device: two
//! words per entry come back. *Hurts* by the dense copies; large heads go in parts, whose results the host joins.

use super::{NAME, NearestArgs, dim};
use crate::device::gpu::{Binding, Call, Context};
use crate::device::page::HeadRows;
use crate::error::KernelError;
use crate::kernel::gather::gpu::widened;
use crate::kernel::simd::take;

/// The uniform block of `shaders/nearest.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    dim: u32,
    candidates: u32,
    count: u32,
    first: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (mut nearest, mut cosines) = (&mut *args.nearest, &mut *args.cosines);
    for ((head, from), into) in args.heads.iter().zip(args.from).zip(args.into) {
        let (nearest, cosines) = (take(&mut nearest, from.len()), take(&mut cosines, from.len()));
        cosines.fill(f32::NEG_INFINITY);
        let step = (context.batch_bytes() / (4 * dim(head).max(1))).max(1);
        for (part, candidates) in into.chunks(step).enumerate() {
            let out = nearest.chunks_mut(step).zip(cosines.chunks_mut(step));
            for (from, (nearest, cosines)) in from.chunks(step).zip(out) {
                search(context, head, (from, candidates), part * step, nearest, cosines)?;
            }
        }
    }
    Ok(())
}

/// Looks among some candidates, of which the first has index `first`, and keeps what is better than what was found.
fn search(
    context: &Context,
    head: &HeadRows,
    (from, candidates): (&[u32], &[u32]),
    first: usize,
    nearest: &mut [u32],
    cosines: &mut [f32],
) -> Result<(), KernelError> {
    let d = dim(head);
    let mut call = Call::new(context, NAME);
    let entries = widened(context, &mut call, head, from, (d, 0))?;
    let others = widened(context, &mut call, head, candidates, (d, 0))?;
    let found = call.scratch(2 * from.len());
    let params =
        Params { dim: d as u32, candidates: candidates.len() as u32, count: from.len() as u32, first: 0 };
    let bindings = [&entries, &others, &found].map(Binding::from);
    call.dispatch("nearest", &[], &params, &bindings, from.len())?;
    call.read(&found);
    let back = call.finish()?;
    for (pair, (nearest, cosine)) in back.words(0).chunks_exact(2).zip(nearest.iter_mut().zip(cosines)) {
        let better = f32::from_bits(pair[1]);
        if better > *cosine {
            (*nearest, *cosine) = (first as u32 + pair[0], better);
        }
    }
    Ok(())
}
