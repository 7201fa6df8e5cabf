//! The two lines of the formula.

use super::MergeArgs;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (rows, d_v) = (args.lse.len(), args.d_v);
    for row in 0..rows {
        let lse =
            super::super::attend::reference::log_sum_exp((0..args.parts).map(|p| args.lses[p * rows + row]));
        args.lse[row] = lse;
        let out = &mut args.out[row * d_v..(row + 1) * d_v];
        out.fill(0.0);
        if lse == f32::NEG_INFINITY {
            continue;
        }
        for p in 0..args.parts {
            let weight = (args.lses[p * rows + row] - lse).exp();
            if weight == 0.0 {
                continue;
            }
            let part = &args.outs[(p * rows + row) * d_v..(p * rows + row + 1) * d_v];
            out.iter_mut().zip(part).for_each(|(o, x)| *o += weight * x);
        }
    }
    Ok(())
}
