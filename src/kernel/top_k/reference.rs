//! A full sort by (protected, score, slot).

use super::TopKArgs;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (mut start, mut written) = (0, 0);
    for (&len, &count) in args.lengths.iter().zip(args.counts) {
        let scores = &args.scores[start..start + len];
        let protect = &args.protect[start..start + len];
        let mut order: Vec<u32> = (0..len as u32).collect();
        order.sort_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            // Adding 0.0 turns −0 into +0, which total_cmp would tell apart.
            (protect[b] != 0)
                .cmp(&(protect[a] != 0))
                .then((scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)))
                .then(a.cmp(&b))
        });
        let chosen = &mut args.out[written..written + count];
        chosen.copy_from_slice(&order[..count]);
        chosen.sort_unstable();
        start += len;
        written += count;
    }
    Ok(())
}
