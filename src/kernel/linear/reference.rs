//! One element at a time, in f64, with the error function by its series.

use super::{Activation, LinearArgs};
use crate::error::KernelError;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    for (x, out) in args.x.chunks_exact(args.inputs).zip(args.out.chunks_exact_mut(args.outputs)) {
        for (j, (w, out)) in args.weight.chunks_exact(args.inputs).zip(out).enumerate() {
            let sum: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            let bias = args.bias.map_or(0.0, |bias| f64::from(bias[j]));
            *out = activate(args.activation, sum + bias) as f32;
        }
    }
    Ok(())
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2)),
    }
}

/// `2/√π · e^(−z²) · Σ_n 2ⁿ z^(2n+1) / (1·3·…·(2n+1))`, whose terms all have the sign of `z`. From 6 on it is 1 in f64; up to
/// there the terms from the 200th on are nothing.
fn erf(z: f64) -> f64 {
    if z.abs() >= 6.0 {
        return z.signum();
    }
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= 2.0 * z * z / f64::from(2 * n + 1);
        sum += term;
    }
    FRAC_2_SQRT_PI * (-z * z).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_has_its_tabulated_values() {
        let table = [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.5, 0.999_999_256_901_627_7),
            (5.9, 1.0),
            (6.1, 1.0),
        ];
        for (z, want) in table {
            assert!((erf(z) - want).abs() < 1e-14, "{z}: {}", erf(z));
            assert!((erf(-z) + want).abs() < 1e-14, "{}: {}", -z, erf(-z));
        }
        assert!(erf(f64::NAN).is_nan());
        assert_eq!(erf(f64::NEG_INFINITY), -1.0);
    }
}
