//! Dense layers: sizes around the blocks implementations work in, activations, what is no number.
//!
//! *Helps* because the allowed error follows the products of each element. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::error::KernelError;
use crate::kernel::linear::{self, Activation, LinearArgs};
use crate::testing::Random;
use crate::testing::cache::{is_poison, poisoned};
use crate::view::DType;

const ACTIVATIONS: [Activation; 3] = [Activation::None, Activation::Silu, Activation::Gelu];

/// A layer and its input.
struct Case {
    rows: usize,
    inputs: usize,
    outputs: usize,
    activation: Activation,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Case {
    /// Normal numbers; `biased` with a bias.
    fn new(rows: usize, inputs: usize, outputs: usize, activation: Activation, biased: bool) -> Self {
        let mut random = Random::new((rows * 7919 + inputs * 31 + outputs) as u64);
        let weights = 2.0 / (inputs as f32).sqrt();
        Self {
            rows,
            inputs,
            outputs,
            activation,
            x: random.rows(rows * inputs, 1.0, DType::F32),
            weight: random.rows(outputs * inputs, weights, DType::F32),
            bias: biased.then(|| random.rows(outputs, 1.0, DType::F32)),
        }
    }

    fn run(&self, backend: &dyn Backend) -> Result<Vec<f32>, KernelError> {
        let mut out = poisoned(self.rows * self.outputs);
        backend.linear(&mut LinearArgs {
            x: &self.x,
            weight: &self.weight,
            bias: self.bias.as_deref(),
            inputs: self.inputs,
            outputs: self.outputs,
            activation: self.activation,
            out: &mut out,
        })?;
        Ok(out)
    }

    /// `Σ_k |x[i, k] · w[j, k]| + |b[j]|`.
    fn magnitude(&self, i: usize, j: usize) -> f64 {
        let (x, w) = (&self.x[i * self.inputs..][..self.inputs], &self.weight[j * self.inputs..]);
        let products: f64 = x.iter().zip(w).map(|(&x, &w)| (f64::from(x) * f64::from(w)).abs()).sum();
        products + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[j].abs()))
    }

    /// The largest error as a share of the tolerance. Where the reference gives no number or an infinity, so must the backend.
    fn check(&self, backend: &dyn Backend) -> Result<f64, Failure> {
        let (want, got) = (self.run(&Reference::default())?, self.run(backend)?);
        expect_same_bits("out", &got, &self.run(backend)?)?;
        let mut worst = 0.0f64;
        for (at, (&g, &w)) in got.iter().zip(&want).enumerate() {
            let (i, j) = (at / self.outputs, at % self.outputs);
            if is_poison(g) {
                return Err(format!("out[{i}, {j}] was never written").into());
            }
            if g == w || g.is_nan() && w.is_nan() {
                continue;
            }
            let error = (f64::from(g) - f64::from(w)).abs();
            let share = error / (linear::TOLERANCE * self.magnitude(i, j));
            if share.is_nan() || share > 1.0 {
                let what = format!("out[{i}, {j}] is {g}, should be {w} ({share:.2} of the tolerance)");
                return Err(what.into());
            }
            worst = worst.max(share);
        }
        Ok(worst)
    }
}

/// Cases of [`crate::kernel::linear`].
pub fn linear(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(linear::NAME);
    let mut index = 0;
    for rows in [0, 1, 3, 4, 5, 17, 33] {
        for inputs in [1, 7, 8, 64, 100, 576, 961, 1030] {
            for outputs in [1, 3, 4, 5, 72] {
                let (activation, biased) = (ACTIVATIONS[index % 3], index % 2 == 0);
                index += 1;
                if effort.wants(index) {
                    report.case(format!("{rows} x {inputs} -> {outputs}, {activation:?}"), || {
                        Case::new(rows, inputs, outputs, activation, biased).check(backend)
                    });
                }
            }
        }
    }
    for (rows, inputs, outputs) in [(1, 12_000, 3), (65, 3000, 5), (70, 960, 200)] {
        report.case(format!("{rows} x {inputs} -> {outputs}, all positive"), || {
            let mut case = Case::new(rows, inputs, outputs, Activation::None, true);
            case.x.iter_mut().chain(&mut case.weight).for_each(|x| *x = x.abs());
            case.check(backend)
        });
    }
    for activation in ACTIVATIONS {
        report.case(format!("{activation:?} of known and of large numbers"), || known(backend, activation));
        report.case(format!("what is no number, {activation:?}"), || no_numbers(backend, activation));
    }
    report.case("a row alone and among others", || {
        let mut case = Case::new(70, 1500, 131, Activation::Gelu, true);
        let together = case.run(backend)?;
        let x = std::mem::take(&mut case.x);
        case.rows = 1;
        for (i, row) in x.chunks_exact(case.inputs).enumerate().step_by(23) {
            case.x = row.to_vec();
            let want = &together[i * case.outputs..][..case.outputs];
            expect_same_bits("out", &case.run(backend)?, want)?;
        }
        Ok(0.0)
    });
    lengths(backend, &mut report);
    report
}

/// Values of activations that stand in tables. The single input is 1, the number is the bias.
fn known(backend: &dyn Backend, activation: Activation) -> Result<f64, Failure> {
    let x = [0.0, 1.0, -1.0, 3.0, -3.0, 100.0, -100.0, 1e30, -1e30];
    let want = match activation {
        Activation::None => x,
        Activation::Silu => {
            [0.0, 0.731_058_6, -0.268_941_43, 2.857_722_3, -0.142_277_6, 100.0, 0.0, 1e30, 0.0]
        }
        Activation::Gelu => {
            [0.0, 0.841_344_7, -0.158_655_26, 2.995_950_3, -0.004_049_694, 100.0, 0.0, 1e30, 0.0]
        }
    };
    let mut out = poisoned(x.len());
    backend.linear(&mut LinearArgs {
        x: &[1.0],
        weight: &[0.0; 9],
        bias: Some(&x),
        inputs: 1,
        outputs: x.len(),
        activation,
        out: &mut out,
    })?;
    expect_written("out", &out)?;
    let mut worst = 0.0f64;
    for ((&g, &w), &x) in out.iter().zip(&want).zip(&x) {
        // What is left of large negative numbers is less than any of single precision that is normal.
        let allowed = linear::ACTIVATION_ERROR * f64::from(w.abs().max(x.abs().min(10.0)));
        let error = (f64::from(g) - f64::from(w)).abs();
        if error > allowed {
            return Err(format!("{activation:?}({x}) is {g}, should be {w}").into());
        }
        worst = worst.max(if error > 0.0 { error / allowed } else { 0.0 });
    }
    Ok(worst)
}

/// NaN and infinities in rows, weights and bias reach the elements they belong to, and no others.
fn no_numbers(backend: &dyn Backend, activation: Activation) -> Result<f64, Failure> {
    let mut worst = 0.0f64;
    for inputs in [1, 16, 37, 1100] {
        let mut case = Case::new(6, inputs, 9, activation, true);
        case.x[0] = f32::NAN;
        case.x[2 * inputs - 1] = f32::INFINITY;
        case.x[3 * inputs - 1] = f32::NEG_INFINITY;
        case.weight[7 * inputs - 1] = f32::NAN;
        case.weight[4 * inputs] = f32::INFINITY;
        case.bias.iter_mut().for_each(|bias| bias[8] = f32::NEG_INFINITY);
        worst = worst.max(case.check(backend)?);
    }
    Ok(worst)
}

fn lengths(backend: &dyn Backend, report: &mut KernelReport) {
    let wrong = ["x", "weight", "bias", "out", "inputs", "outputs"];
    for (i, what) in wrong.into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let longer = |at| usize::from(i == at);
            let (x, weight, bias) =
                (vec![0.0; 6 + longer(0)], vec![0.0; 15 + longer(1)], vec![0.0; 5 + longer(2)]);
            let mut out = vec![0.0; 10 + longer(3)];
            let (inputs, outputs) = (if i == 4 { 0 } else { 3 }, if i == 5 { 0 } else { 5 });
            let (bias, activation) = (Some(&bias[..]), Activation::None);
            let (x, weight, out) = (&x[..], &weight[..], &mut out[..]);
            let mut args = LinearArgs { x, weight, bias, inputs, outputs, activation, out };
            expect_length_error(what, backend.linear(&mut args))
        });
    }
    report.case("no inputs, outputs or rows at all", || {
        let mut args = LinearArgs {
            x: &[],
            weight: &[],
            bias: None,
            inputs: 0,
            outputs: 0,
            activation: Activation::None,
            out: &mut [],
        };
        expect_length_error("inputs", backend.linear(&mut args))
    });
}
