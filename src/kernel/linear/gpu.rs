//! The layer on the device: a workgroup per tile of 32 rows by 32 outputs.
//!
//! *Helps* chunks of a prompt. *Hurts* single rows, for which all weights are uploaded. What no binding holds is cut, rows
//! and outputs alike.

use super::{Activation, LinearArgs, NAME};
use crate::device::gpu::{Binding, Call, Context};
use crate::error::{DeviceError, KernelError};

/// Rows, and outputs, of a tile; as in the shader.
const TILE: usize = 32;

/// The uniform block of `shaders/linear.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    activation: u32,
    across: u32,
    count: u32,
    biased: u32,
    spare: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (inputs, outputs, limit) = (args.inputs, args.outputs, context.batch_bytes());
    // A call uploads rows and weights together, and a row of each must fit.
    if args.out.is_empty() {
        return Ok(());
    }
    if 4 * inputs > limit / 2 {
        let (what, hint) = ("inputs of a layer", "a layer of fewer inputs");
        return Err(
            DeviceError::Limit { what, need: 4 * inputs as u64, limit: limit as u64 / 2, hint }.into()
        );
    }
    let columns = (limit / (4 * inputs)).min(outputs);
    let rows = (limit / 2 / (4 * inputs.max(columns))).max(1);
    for (x, out) in args.x.chunks(rows * inputs).zip(args.out.chunks_mut(rows * outputs)) {
        for (part, weight) in args.weight.chunks(columns * inputs).enumerate() {
            let (first, len) = (part * columns, weight.len() / inputs);
            let bias = args.bias.map(|bias| &bias[first..first + len]);
            let sub = Part { x, weight, bias, inputs, activation: args.activation };
            sub.run(context, out, outputs, first)?;
        }
    }
    Ok(())
}

/// What one call computes.
struct Part<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    inputs: usize,
    activation: Activation,
}

impl Part<'_> {
    /// Writes the outputs from `first` on of all rows, `outputs` apart.
    fn run(
        &self,
        context: &Context,
        out: &mut [f32],
        outputs: usize,
        first: usize,
    ) -> Result<(), KernelError> {
        let (rows, columns) = (self.x.len() / self.inputs, self.weight.len() / self.inputs);
        let across = columns.div_ceil(TILE);
        let count = rows.div_ceil(TILE) * across;
        let params = Params {
            rows: rows as u32,
            inputs: self.inputs as u32,
            outputs: columns as u32,
            activation: match self.activation {
                Activation::None => 0,
                Activation::Silu => 1,
                Activation::Gelu => 2,
            },
            across: across as u32,
            count: count as u32,
            biased: u32::from(self.bias.is_some()),
            spare: 0,
        };
        let mut call = Call::new(context, NAME);
        let result = call.scratch(rows * columns);
        let bindings = [
            call.upload(self.x),
            call.upload(self.weight),
            call.upload(self.bias.unwrap_or_default()),
            Binding::from(&result),
        ];
        call.dispatch("linear", &[], &params, &bindings, count)?;
        call.read(&result);
        let back = call.finish()?;
        for (line, out) in back.floats(0).chunks_exact(columns).zip(out.chunks_exact_mut(outputs)) {
            out[first..first + columns].copy_from_slice(line);
        }
        Ok(())
    }
}
