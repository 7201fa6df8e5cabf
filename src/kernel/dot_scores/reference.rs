//! One query and one row at a time.

use super::DotArgs;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::AttentionParams;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(params: &AttentionParams<'_>, args: &mut DotArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    let per_head = params.group * args.tokens;
    let mut key = vec![0.0; params.d_k];
    let mut start = 0;
    for (h, head) in args.heads.iter().enumerate() {
        let rows = args.rows(h);
        let queries = &args.queries[h * per_head * params.d_k..(h + 1) * per_head * params.d_k];
        let out = &mut args.out[start..start + per_head * rows];
        let mut scored = 0;
        for p in head.pages() {
            for row in 0..p.rows {
                let slot = p.first + row;
                if args.spans.is_some_and(|s| !s[h].spans().iter().any(|s| s.slots().contains(&slot))) {
                    continue;
                }
                p.layout.read_row(p.page, Side::Key, row, &mut key);
                for (i, query) in queries.chunks_exact(params.d_k).enumerate() {
                    let dot: f32 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                    out[i * rows + scored] = params.logit(dot) + p.bias().map_or(0.0, |b| b[row]);
                }
                scored += 1;
            }
        }
        start += per_head * rows;
    }
    Ok(())
}
