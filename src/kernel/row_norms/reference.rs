//! Square, add, root.

use super::{NAME, NormArgs};
use crate::error::KernelError;
use crate::kernel::{expect_len, total_rows};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut NormArgs<'_>) -> Result<(), KernelError> {
    expect_len(NAME, "out", args.out.len(), total_rows(args.heads))?;
    let mut out = args.out.iter_mut();
    for page in args.heads.iter().flat_map(|h| h.pages()) {
        let mut row = vec![0.0; page.layout.dim(args.side)];
        for (i, o) in (0..page.rows).zip(&mut out) {
            page.layout.read_row(page.page, args.side, i, &mut row);
            *o = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        }
    }
    Ok(())
}
