//! The merge on the device: the same shader joins the runs of an attend call and a host's own partials.

use super::{MergeArgs, NAME};
use crate::device::gpu::{Binding, Call, Context, Scratch};
use crate::error::{DeviceError, KernelError};
use crate::kernel::attend::gpu::{NONE, from_device, to_device};

/// The uniform block of `shaders/merge_partials.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    pub(in crate::kernel) d_v: u32,
    pub(in crate::kernel) count: u32,
    pub(in crate::kernel) part_stride: u32,
    pub(in crate::kernel) row_stride: u32,
    pub(in crate::kernel) dim_stride: u32,
    pub(in crate::kernel) state_stride: u32,
    pub(in crate::kernel) sum_offset: u32,
    pub(in crate::kernel) block: u32,
}

/// One output row and its parts.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Row {
    pub(in crate::kernel) part: u32,
    pub(in crate::kernel) parts: u32,
    pub(in crate::kernel) rotated: u32,
    pub(in crate::kernel) lane: u32,
    pub(in crate::kernel) target_row: u32,
    pub(in crate::kernel) sink: f32,
}

/// Elements of a rotated block the shader can hold in workgroup memory.
const TURNED: u32 = 1024;

/// Records a merge of `rows` into (out, lse).
///
/// # Errors
/// A device error; [`DeviceError::Limit`] if some rows are rotated in blocks of more than 1024 elements.
pub(in crate::kernel) fn record(
    call: &mut Call<'_>,
    params: &Params,
    rows: &[Row],
    states: &Binding,
    sums: &Binding,
    (out, lse): (&Scratch, &Scratch),
) -> Result<(), DeviceError> {
    if params.block > TURNED && rows.iter().any(|row| row.rotated > 0) {
        return Err(DeviceError::Limit {
            what: "rotated elements of a value",
            need: params.block.into(),
            limit: TURNED.into(),
            hint: "pack these values without `hadamard`",
        });
    }
    let bindings = [call.upload(rows), states.clone(), sums.clone(), Binding::from(out), Binding::from(lse)];
    call.dispatch("merge_partials", &[], params, &bindings, rows.len())
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (rows, parts, d_v) = (args.lse.len(), args.parts, args.d_v);
    let step = (context.batch_bytes() / (4 * (parts + 1) * (d_v + 2))).max(1);
    let mut first = 0;
    while first < rows {
        let n = step.min(rows - first);
        let mut sums = Vec::with_capacity(parts * n * d_v);
        let mut states = Vec::with_capacity(parts * n * 2);
        for p in 0..parts {
            let from = p * rows + first;
            sums.extend_from_slice(&args.outs[from * d_v..(from + n) * d_v]);
            states.extend(args.lses[from..from + n].iter().map(|&lse| to_device(lse)));
            // The parts are normalised: each stands for a sum of 1 at its log-sum-exp.
            states.resize(states.len() + n, 1.0);
        }
        let table: Vec<Row> = (0..n as u32)
            .map(|r| Row { part: 0, parts: parts as u32, rotated: 0, lane: r, target_row: r, sink: NONE })
            .collect();
        let strides = Params {
            d_v: d_v as u32,
            count: n as u32,
            part_stride: (n * d_v) as u32,
            row_stride: d_v as u32,
            dim_stride: 1,
            state_stride: 2 * n as u32,
            sum_offset: n as u32,
            block: 1,
        };
        let mut call = Call::new(context, NAME);
        let (sums, states) = (call.upload(&sums), call.upload(&states));
        let (out, lse) = (call.scratch(n * d_v), call.scratch(n));
        record(&mut call, &strides, &table, &states, &sums, (&out, &lse))?;
        call.read(&out);
        call.read(&lse);
        let back = call.finish()?;
        args.out[first * d_v..(first + n) * d_v].copy_from_slice(&back.floats(0)[..n * d_v]);
        for (to, &from) in args.lse[first..first + n].iter_mut().zip(back.floats(1)) {
            *to = from_device(from);
        }
        first += n;
    }
    Ok(())
}
