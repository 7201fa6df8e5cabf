//! One query at a time.

use super::{WindowArgs, WindowReduce};
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::attend::reference::{log_sum_exp, logits};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(params: &AttentionParams<'_>, args: &mut WindowArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    args.out.fill(0.0);
    let window = args.positions.len();
    let mut start = 0;
    for (h, head) in args.heads.iter().enumerate() {
        let rows = head.rows();
        for g in 0..params.group {
            for (i, &position) in args.positions.iter().enumerate() {
                let row = (h * params.group + g) * window + i;
                let x =
                    logits(params, head, &args.queries[row * params.d_k..(row + 1) * params.d_k], position);
                let sink = params.sink_logits.map(|s| s[h * params.group + g]);
                let lse = log_sum_exp(x.iter().flatten().copied().chain(sink));
                if lse == f32::NEG_INFINITY {
                    continue;
                }
                let target = match args.reduce {
                    WindowReduce::Sum => start + g * rows,
                    WindowReduce::Rows => start + (g * window + i) * rows,
                };
                for (o, x) in args.out[target..target + rows].iter_mut().zip(x) {
                    if let Some(x) = x {
                        *o += (x - lse).exp();
                    }
                }
            }
        }
        start += rows
            * params.group
            * match args.reduce {
                WindowReduce::Sum => 1,
                WindowReduce::Rows => window,
            };
    }
    Ok(())
}
