//! One row of values at a time.

use super::WeighArgs;
use crate::device::page::Side;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// As [`WeighArgs::validate`].
pub fn run(args: &mut WeighArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (rows, d_v) = (args.rows, args.d_v);
    let mut value = vec![0.0; d_v];
    let mut weights = args.weights;
    let mut out = &mut *args.out;
    for head in args.heads {
        let (own, rest) = weights.split_at(rows * head.rows());
        let (sums, behind) = std::mem::take(&mut out).split_at_mut(rows * d_v);
        (weights, out) = (rest, behind);
        sums.fill(0.0);
        for p in head.pages() {
            for row in 0..p.rows {
                p.layout.read_row(p.page, Side::Value, row, &mut value);
                for (i, sum) in sums.chunks_exact_mut(d_v.max(1)).enumerate() {
                    let weight = own[i * head.rows() + p.first + row];
                    sum.iter_mut().zip(&value).for_each(|(s, v)| *s += weight * v);
                }
            }
        }
    }
    Ok(())
}
