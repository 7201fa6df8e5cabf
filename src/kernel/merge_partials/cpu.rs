//! Rows in parallel, vectors along the value dimension.
//!
//! *Helps* little in itself: merging is a hundredth of the attention it follows. *Hurts* nothing.

use super::MergeArgs;
use crate::error::KernelError;
use crate::kernel::simd::math::{add_scaled, scale};
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let rows = args.lse.len();
    let tasks = exec.tasks(args.parts * rows * args.d_v);
    let work = Rows {
        exec,
        parts: args.parts,
        rows,
        d_v: args.d_v,
        first: 0,
        outs: args.outs,
        lses: args.lses,
        out: args.out,
        lse: args.lse,
    };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

struct Rows<'a> {
    exec: &'a Exec,
    parts: usize,
    /// Rows of every part, of which this covers `lse.len()` from `first`.
    rows: usize,
    d_v: usize,
    first: usize,
    outs: &'a [f32],
    lses: &'a [f32],
    out: &'a mut [f32],
    lse: &'a mut [f32],
}

impl Split for Rows<'_> {
    fn pieces(&self) -> usize {
        self.lse.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (out, lse) = (take(&mut self.out, at * self.d_v), take(&mut self.lse, at));
        let left = Rows { out, lse, ..self };
        (left, Rows { first: self.first + at, ..self })
    }

    fn work(self) {
        let Self { parts, rows, d_v, first, outs, lses, out, lse, .. } = self;
        dispatch!(self.exec.token(), simd => merge(simd, parts, rows, first, (outs, lses), (out, lse), d_v));
    }
}

/// Rows `first ..` of the parts into `lse.len()` rows.
#[inline(always)]
pub(in crate::kernel) fn merge<S: Simd>(
    simd: S,
    parts: usize,
    rows: usize,
    first: usize,
    (outs, lses): (&[f32], &[f32]),
    (out, lse): (&mut [f32], &mut [f32]),
    d_v: usize,
) {
    for (i, (lse, out)) in lse.iter_mut().zip(out.chunks_exact_mut(d_v)).enumerate() {
        let part = |p: usize| p * rows + first + i;
        let most = (0..parts).map(|p| lses[part(p)]).fold(f32::NEG_INFINITY, f32::max);
        out.fill(0.0);
        *lse = most;
        if most == f32::NEG_INFINITY {
            continue;
        }
        let mut sum = 0.0;
        for p in 0..parts {
            let weight = (lses[part(p)] - most).exp();
            if weight > 0.0 {
                sum += weight;
                add_scaled(simd, out, &outs[part(p) * d_v..][..d_v], weight);
            }
        }
        scale(simd, out, 1.0 / sum);
        *lse = most + sum.ln();
    }
}
