//! Dot products in place, blocks of rows by blocks of outputs, vectors along the inputs.
//!
//! A vector of weights serves up to eight rows while it is in a register, and a block of weights all rows of a block while it
//! is in the second cache level; a single row streams the weights, sixteen of their rows side by side. Inputs are cut at
//! multiples of `DEPTH`, so that rows of a block stay in the first level. Every element is summed in the same order
//! wherever it lies: a row has the same bits alone and among others, on any number of threads. *Helps* because the weights are
//! read as they are stored, without a transposed copy. *Hurts* many rows of few inputs, where folding the vectors of partial
//! sums is much of the work.

use super::{Activation, LinearArgs};
use crate::error::KernelError;
use crate::kernel::simd::dots::dots;
use crate::kernel::simd::gemm::{Matrix, PAD};
use crate::kernel::simd::math::exp;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};

/// Rows, and outputs, of a block.
const ROWS: usize = 32;
const COLUMNS: usize = 64;
/// Inputs that are summed at a time.
const DEPTH: usize = 1024;

const _: () = assert!(COLUMNS.is_multiple_of(PAD) && DEPTH.is_multiple_of(PAD));

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let tasks = exec.tasks(args.x.len().saturating_mul(args.outputs));
    let layer = Layer {
        exec,
        weight: args.weight,
        bias: args.bias,
        inputs: args.inputs,
        activation: args.activation,
    };
    let rows = Rows { layer, outputs: args.outputs, x: args.x, out: &mut *args.out };
    exec.run(tasks, || rows.spread(tasks));
    Ok(())
}

/// Some outputs of the layer.
#[derive(Clone, Copy)]
struct Layer<'a> {
    exec: &'a Exec,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    inputs: usize,
    activation: Activation,
}

/// Some rows, all outputs.
struct Rows<'a> {
    layer: Layer<'a>,
    outputs: usize,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl<'a> Rows<'a> {
    /// Between rows while there are several blocks of them, then between outputs.
    fn spread(mut self, tasks: usize) {
        let blocks = (self.out.len() / self.outputs).div_ceil(ROWS);
        if tasks < 2 || blocks < 2 {
            let inputs = self.layer.inputs;
            let blocks = self.x.chunks(ROWS * inputs).zip(self.out.chunks_mut(ROWS * self.outputs));
            for (x, out) in blocks {
                let mut lines = out.chunks_exact_mut(self.outputs);
                let out = std::array::from_fn(|_| lines.next().unwrap_or_default());
                Strip { layer: self.layer, outputs: self.outputs, x, out }.spread(tasks);
            }
            return;
        }
        let at = blocks / 2 * ROWS;
        let (x, rest) = self.x.split_at(at * self.layer.inputs);
        let left = Rows { x, out: take(&mut self.out, at * self.outputs), ..self };
        let right = Rows { x: rest, ..self };
        rayon::join(|| left.spread(tasks / 2), || right.spread(tasks - tasks / 2));
    }
}

/// A block of rows, some outputs.
struct Strip<'a> {
    layer: Layer<'a>,
    outputs: usize,
    x: &'a [f32],
    out: [&'a mut [f32]; ROWS],
}

impl Split for Strip<'_> {
    fn pieces(&self) -> usize {
        self.outputs.div_ceil(COLUMNS)
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let at = at * COLUMNS;
        let (weight, weights_behind) = self.layer.weight.split_at(at * self.layer.inputs);
        let (bias, behind) = self.layer.bias.map(|bias| bias.split_at(at)).unzip();
        let rows = self.x.len() / self.layer.inputs;
        let left = Strip {
            layer: Layer { weight, bias, ..self.layer },
            outputs: at,
            out: std::array::from_fn(|r| if r < rows { take(&mut self.out[r], at) } else { &mut [] }),
            ..self
        };
        let layer = Layer { weight: weights_behind, bias: behind, ..self.layer };
        (left, Strip { layer, outputs: self.outputs - at, ..self })
    }

    fn work(self) {
        let exec = self.layer.exec;
        dispatch!(exec.token(), simd => self.fill(simd));
    }
}

impl Strip<'_> {
    #[inline(always)]
    fn fill<S: Simd>(mut self, simd: S) {
        let Layer { weight, bias, inputs, activation, .. } = self.layer;
        let rows = self.x.len() / inputs;
        let mut sums = [0.0; ROWS * COLUMNS];
        for first in (0..self.outputs).step_by(COLUMNS) {
            let columns = COLUMNS.min(self.outputs - first);
            products(simd, self.x, &weight[first * inputs..], (rows, inputs, columns), &mut sums);
            for (line, out) in sums.chunks_exact_mut(COLUMNS).zip(&mut self.out[..rows]) {
                if let Some(bias) = bias {
                    line.iter_mut().zip(&bias[first..][..columns]).for_each(|(x, b)| *x += b);
                }
                activate(simd, activation, &mut line[..columns.next_multiple_of(S::f32s::LEN)]);
                out[first..][..columns].copy_from_slice(&line[..columns]);
            }
        }
    }
}

/// `sums[row * COLUMNS + column] = x[row] · w[column]`.
#[inline(always)]
fn products<S: Simd>(
    simd: S,
    x: &[f32],
    w: &[f32],
    (rows, inputs, columns): (usize, usize, usize),
    sums: &mut [f32; ROWS * COLUMNS],
) {
    let part = |first: usize, to: &mut [f32]| {
        let (x, w) = (&x[first..], &w[first..]);
        let (x, w) = (Matrix { data: x, stride: inputs }, Matrix { data: w, stride: inputs });
        dots(simd, x, w, (rows, DEPTH.min(inputs - first), columns), to, COLUMNS, Ahead::NONE);
    };
    part(0, sums);
    if inputs > DEPTH {
        let mut more = [0.0; ROWS * COLUMNS];
        for first in (DEPTH..inputs).step_by(DEPTH) {
            part(first, &mut more);
            let len = rows * COLUMNS;
            sums[..len].iter_mut().zip(&more[..len]).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// On whole vectors.
#[inline(always)]
fn activate<S: Simd>(simd: S, activation: Activation, line: &mut [f32]) {
    for chunk in line.chunks_exact_mut(S::f32s::LEN) {
        let x = S::f32s::from_slice(simd, chunk);
        match activation {
            Activation::None => return,
            Activation::Silu => silu(simd, x).store_slice(chunk),
            Activation::Gelu => gelu(simd, x).store_slice(chunk),
        }
    }
}

/// By `t = e^(−|x|)`, which never overflows: `x / (1 + t)`, or `x t / (1 + t)` where `x` is negative.
#[inline(always)]
fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = S::f32s::splat(simd, 1.0);
    let t = exp(simd, -x.abs());
    let above = x.simd_lt(S::f32s::splat(simd, 0.0)).select(t, one);
    x * (above / (one + t))
}

/// By Abramowitz and Stegun 7.1.26: with `t = 1 / (1 + p z)`, `1 − erf z` for positive `z` is a polynomial of `t` times
/// `e^(−z²)`, to within 1.5e-7. Negative numbers take it as it is, without a difference from 1.
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |c: f32| S::f32s::splat(simd, c);
    let z = x.abs() * splat(std::f32::consts::FRAC_1_SQRT_2);
    let t = splat(1.0) / z.mul_add(splat(0.327_591_1), splat(1.0));
    let mut p = splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p.mul_add(t, splat(c));
    }
    let tail = splat(0.5) * p * t * exp(simd, -(z * z));
    x * x.simd_lt(splat(0.0)).select(tail, splat(1.0) - tail)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::device::Pool;
    use crate::kernel::linear::{ACTIVATION_ERROR, reference};
    use crate::kernel::simd::Level;

    /// The activation of every number, as a layer of one input and one output.
    fn activated(level: Level, activation: Activation, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut exec = Exec::new(Pool::current());
        exec.lower(level);
        let (mut got, mut want) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let args = |out| LinearArgs { x, weight: &[1.0], bias: None, inputs: 1, outputs: 1, activation, out };
        run(&exec, &mut args(&mut got)).unwrap();
        reference::run(&mut args(&mut want)).unwrap();
        (got, want)
    }

    #[test]
    fn activations_are_within_their_stated_error() {
        let x: Vec<f32> = (0..100_001).map(|i| (i as f32 - 50_000.0) * 4e-4).collect();
        for level in Level::available() {
            for activation in [Activation::Silu, Activation::Gelu] {
                let (got, want) = activated(level, activation, &x);
                for (i, &x) in x.iter().enumerate() {
                    let error = (f64::from(got[i]) - f64::from(want[i])).abs();
                    let allowed = ACTIVATION_ERROR * f64::from(x.abs());
                    assert!(error <= allowed, "{activation:?}({x}) at {}: {error:.2e}", level.name());
                }
            }
        }
    }

    #[test]
    fn large_numbers_stay_or_vanish_and_what_is_no_number_stays() {
        let x = [1e4, -1e4, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for level in Level::available() {
            for activation in [Activation::Silu, Activation::Gelu] {
                for values in <[_; 2]>::from(activated(level, activation, &x)) {
                    assert_eq!(values[..5], [1e4, 0.0, f32::MAX, 0.0, f32::INFINITY]);
                    assert!(values[5].is_nan() && values[6].is_nan(), "{activation:?}: {values:?}");
                }
            }
        }
    }
}
