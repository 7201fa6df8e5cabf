//! Sums on the device: a workgroup adds the values of a run of pages in eight rows of weights, a thread per dimension.
//!
//! Runs are cut by the number of their pages alone and added on the host in order; where the pages of a run lie in
//! several slabs, dispatches follow one another and continue from what is there. So bits do not depend on which slab a
//! page got. *Helps* because weights come as they are. *Hurts* by their way to the device with every call.

use super::{NAME, WeighArgs};
use crate::device::HeadRows;
use crate::device::encoding::rotate;
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, kind, packs};
use crate::device::page::{PageLayout, PageRef, Side};
use crate::error::{DeviceError, KernelError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pages of a run.
const RUN: usize = 16;

/// Rows of weights that a workgroup serves.
const BLOCK: usize = 8;

/// The uniform block of `shaders/weigh_values.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    d_v: u32,
    v_offset: u32,
    v_words: u32,
    capacity: u32,
    count: u32,
    spare: [u32; 3],
}

/// The pages of a run that lie in one slab.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Stretch {
    pages: u32,
    rows: u32,
    weights: u32,
    sums: u32,
    resume: u32,
}

/// Up to eight rows of weights on a KV head.
struct Job<'a> {
    head: &'a HeadRows,
    /// `[rows, entries]`.
    weights: &'a [f32],
    /// `[rows, d_v]`.
    out: &'a mut [f32],
}

impl Job<'_> {
    fn bytes(&self) -> usize {
        4 * BLOCK * self.head.rows()
    }
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut WeighArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    args.out.fill(0.0);
    let (rows, d_v) = (args.rows, args.d_v);
    if args.out.is_empty() {
        return Ok(());
    }
    let (mut start, mut held, mut jobs) = (0, 0, Vec::new());
    for (head, out) in args.heads.iter().zip(args.out.chunks_exact_mut(rows * d_v)) {
        let weights = &args.weights[start..start + rows * head.rows()];
        start += weights.len();
        for (weights, out) in weights.chunks(BLOCK * head.rows().max(1)).zip(out.chunks_mut(BLOCK * d_v)) {
            let job = Job { head, weights, out };
            let bytes = job.bytes();
            if bytes as u64 > context.binding_limit() {
                let limit = context.binding_limit();
                let (what, hint) = ("weights of one KV head", "keep fewer units in an index");
                return Err(DeviceError::Limit { what, need: bytes as u64, limit, hint }.into());
            }
            if held + bytes > context.batch_bytes() {
                sum(context, &mut jobs, d_v)?;
                jobs.clear();
                held = 0;
            }
            held += bytes;
            jobs.push(job);
        }
    }
    sum(context, &mut jobs, d_v)
}

/// What is dispatched together, by turn within runs first: a stretch continues what the one before it left; then by slab
/// and layout, to which a dispatch is bound.
type Groups<'a> = BTreeMap<(u32, u64, usize), (&'a wgpu::Buffer, Vec<Stretch>)>;

/// One call.
fn sum(context: &Context, jobs: &mut [Job<'_>], d_v: usize) -> Result<(), KernelError> {
    let entries = jobs.iter().map(|job| job.head.rows()).sum();
    if entries == 0 {
        return Ok(());
    }
    // By entry, so that a thread reads the weights of all rows at once.
    let mut by_entry = vec![[0.0f32; BLOCK]; entries];
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut groups = Groups::new();
    let (mut pages, mut rotated, mut first) = (Vec::new(), Vec::new(), 0);
    let mut ends = Vec::with_capacity(jobs.len());
    for job in &*jobs {
        let own = &mut by_entry[first..first + job.head.rows()];
        for (row, line) in job.weights.chunks_exact(own.len().max(1)).enumerate() {
            own.iter_mut().zip(line).for_each(|(entry, &w)| entry[row] = w);
        }
        let all: Vec<PageRef<'_>> = job.head.pages().collect();
        for run in all.chunk_by(|a, b| Arc::ptr_eq(a.layout, b.layout)).flat_map(|s| s.chunks(RUN)) {
            let (mut turn, mut last) = (0, None);
            let sums = (rotated.len() * d_v) as u32;
            for page in run {
                let device = DeviceBlock::of(page.page, NAME)?;
                let layout = layouts.iter().position(|l| **l == **page.layout).unwrap_or_else(|| {
                    layouts.push(page.layout);
                    layouts.len() - 1
                });
                let goes_on = last == Some(device.slab());
                turn += u32::from(last.is_some() && !goes_on);
                last = Some(device.slab());
                let group = groups.entry((turn, device.slab(), layout));
                let stretches = &mut group.or_insert_with(|| (device.buffer(), Vec::new())).1;
                match stretches.last_mut().filter(|_| goes_on) {
                    Some(stretch) => stretch.rows += page.rows as u32,
                    None => stretches.push(Stretch {
                        pages: pages.len() as u32,
                        rows: page.rows as u32,
                        weights: (first + page.first) as u32,
                        sums,
                        resume: u32::from(turn > 0),
                    }),
                }
                pages.push(device.word());
            }
            rotated.push(run[0].layout.rotated(Side::Value));
        }
        first += job.head.rows();
        ends.push(rotated.len());
    }
    let mut call = Call::new(context, NAME);
    let (pages, weights) = (call.upload(&pages), call.upload(&by_entry));
    let sums = call.scratch(BLOCK * rotated.len() * d_v);
    for ((_, _, layout), (slab, stretches)) in groups {
        let layout = layouts[layout];
        let params = Params {
            d_v: d_v as u32,
            v_offset: (layout.v_offset() / 4) as u32,
            v_words: (layout.row_bytes(Side::Value) / 4) as u32,
            capacity: layout.capacity as u32,
            count: stretches.len() as u32,
            spare: [0; 3],
        };
        let bindings = [
            Binding::Slab(slab.clone()),
            pages.clone(),
            call.upload(&stretches),
            weights.clone(),
            Binding::from(&sums),
            call.upload(&packs(layout, [Side::Key, Side::Value])),
        ];
        call.dispatch(NAME, &[("V_TYPE", kind(layout, Side::Value))], &params, &bindings, stretches.len())?;
    }
    call.read(&sums);
    let back = call.finish()?;
    let mut start = 0;
    for (job, end) in jobs.iter_mut().zip(ends) {
        add(&back.floats(0)[BLOCK * start * d_v..BLOCK * end * d_v], &rotated[start..end], job.out, d_v);
        start = end;
    }
    Ok(())
}

/// Adds the sums of runs, `[runs, d_v, 8]`, to the rows of `out`; those of rotated values are turned back.
fn add(sums: &[f32], rotated: &[bool], out: &mut [f32], d_v: usize) {
    let mut apart = vec![0.0; d_v];
    for (row, out) in out.chunks_exact_mut(d_v).enumerate() {
        apart.fill(0.0);
        for (sums, &rotated) in sums.chunks_exact(BLOCK * d_v).zip(rotated) {
            let to = if rotated { &mut apart[..] } else { &mut *out };
            to.iter_mut().zip(sums.chunks_exact(BLOCK)).for_each(|(o, sums)| *o += sums[row]);
        }
        if rotated.contains(&true) {
            rotate(&mut apart);
            out.iter_mut().zip(&apart).for_each(|(o, a)| *o += a);
        }
    }
}
