//! Weighted sums of rows on the device: one workgroup per target, threads over dimensions.
//!
//! The rows are widened into a dense buffer first, target after target. *Helps* because only sums come back. *Hurts* by
//! that buffer: merges go in parts of what fits, and a target whose sources are in several parts is added up on the host,
//! in order.

use super::{MergeRowsArgs, NAME, dims};
use crate::device::gpu::{Binding, Call, Context};
use crate::error::KernelError;
use crate::kernel::gather::gpu::widened;

/// The uniform block of `shaders/merge_rows.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    d_k: u32,
    d_v: u32,
    values: u32,
    merged_values: u32,
    count: u32,
    first: u32,
    spare: [u32; 2],
}

/// The rows of one target.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Sum {
    begin: u32,
    end: u32,
}

/// What a row counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Weight {
    key: f32,
    value: f32,
}

/// A row of a target.
#[derive(Clone, Copy)]
struct Term {
    target: usize,
    slot: u32,
    weight: Weight,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (d_k, d_v) = dims(args.head);
    let d_k = if args.merges.keys { d_k } else { 0 };
    let mut terms = Vec::with_capacity(args.merges.targets.len() + args.merges.sources.len());
    for (target, (own, sources)) in args.merges.iter().enumerate() {
        terms.push(Term { target, slot: own.slot, weight: Weight { key: own.key, value: own.value } });
        let weight = |s: &super::Source| Weight { key: s.key, value: s.value };
        terms.extend(sources.iter().map(|s| Term { target, slot: s.slot, weight: weight(s) }));
    }
    args.keys.fill(0.0);
    args.values.fill(0.0);
    let step = (context.batch_bytes() / (4 * (d_k + d_v).max(1))).max(1);
    for terms in terms.chunks(step) {
        add(context, args, terms, (d_k, d_v))?;
    }
    Ok(())
}

/// Adds some terms, those of a target together.
fn add(
    context: &Context,
    args: &mut MergeRowsArgs<'_>,
    terms: &[Term],
    (d_k, d_v): (usize, usize),
) -> Result<(), KernelError> {
    let slots: Vec<u32> = terms.iter().map(|t| t.slot).collect();
    let weights: Vec<Weight> = terms.iter().map(|t| t.weight).collect();
    let mut begin = 0;
    let sums: Vec<Sum> = terms
        .chunk_by(|a, b| a.target == b.target)
        .map(|run| {
            let sum = Sum { begin, end: begin + run.len() as u32 };
            begin = sum.end;
            sum
        })
        .collect();
    let mut call = Call::new(context, NAME);
    let rows = widened(context, &mut call, args.head, &slots, (d_k, d_v))?;
    let merged = call.scratch(sums.len() * (d_k + d_v));
    let params = Params {
        d_k: d_k as u32,
        d_v: d_v as u32,
        values: (slots.len() * d_k) as u32,
        merged_values: (sums.len() * d_k) as u32,
        count: sums.len() as u32,
        first: 0,
        spare: [0; 2],
    };
    let bindings = [Binding::from(&rows), call.upload(&sums), call.upload(&weights), Binding::from(&merged)];
    call.dispatch("merge_rows", &[], &params, &bindings, sums.len())?;
    call.read(&merged);
    let back = call.finish()?;
    let (keys, values) = back.floats(0)[..sums.len() * (d_k + d_v)].split_at(sums.len() * d_k);
    let first = terms[0].target;
    let join = |out: &mut [f32], from: &[f32], d: usize| {
        out[first * d..][..from.len()].iter_mut().zip(from).for_each(|(o, x)| *o += x);
    };
    join(args.keys, keys, d_k);
    join(args.values, values, d_v);
    Ok(())
}
