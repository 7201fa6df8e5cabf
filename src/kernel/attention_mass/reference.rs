//! One query at a time.

use super::MassArgs;
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::attend::reference::logits;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(params: &AttentionParams<'_>, args: &mut MassArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    args.mass.fill(0.0);
    let tokens = args.positions.len();
    let mut start = 0;
    for (h, head) in args.heads.iter().enumerate() {
        let rows = head.rows();
        for g in 0..params.group {
            let mass = &mut args.mass[start + g * rows..start + (g + 1) * rows];
            for (i, &position) in args.positions.iter().enumerate() {
                let row = (h * params.group + g) * tokens + i;
                let lse = args.lse[row];
                if lse == f32::NEG_INFINITY {
                    continue;
                }
                let query = &args.queries[row * params.d_k..(row + 1) * params.d_k];
                for (m, x) in mass.iter_mut().zip(logits(params, head, query, position)) {
                    if let Some(x) = x {
                        *m += (x - lse).exp();
                    }
                }
            }
        }
        start += params.group * rows;
    }
    Ok(())
}
