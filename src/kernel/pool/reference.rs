//! Every window summed or searched anew.

use super::{PoolArgs, PoolKind};
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let reach = args.width / 2;
    let mut start = 0;
    for &len in args.lengths {
        let row = &args.input[start..start + len];
        for j in 0..len {
            let window = &row[j.saturating_sub(reach)..(j + reach + 1).min(len)];
            args.out[start + j] = match args.kind {
                PoolKind::Average => window.iter().sum::<f32>() / args.width as f32,
                PoolKind::Max => window.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            };
        }
        start += len;
    }
    Ok(())
}
