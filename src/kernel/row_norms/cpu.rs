//! Heads in parallel, vectors along a row.
//!
//! *Helps* as far as memory delivers rows. *Hurts* one very long head among short ones, which one thread
//! reads alone.

use super::{NAME, NormArgs};
use crate::device::HeadRows;
use crate::device::page::{Rows, Side};
use crate::error::KernelError;
use crate::kernel::simd::math::sum_of_squares;
use crate::kernel::simd::widen::widen;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use crate::kernel::{expect_len, total_rows};
use fearless_simd::Simd;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut NormArgs<'_>) -> Result<(), KernelError> {
    expect_len(NAME, "out", args.out.len(), total_rows(args.heads))?;
    let elements: usize =
        args.heads.iter().flat_map(|h| &h.segments).map(|s| s.rows * s.layout.dim(args.side)).sum();
    let tasks = exec.tasks(elements);
    let work = Heads { exec, heads: args.heads, side: args.side, out: args.out };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

struct Heads<'a> {
    exec: &'a Exec,
    heads: &'a [HeadRows],
    side: Side,
    out: &'a mut [f32],
}

impl Split for Heads<'_> {
    fn pieces(&self) -> usize {
        self.heads.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (heads, rest) = self.heads.split_at(at);
        let left = Heads { heads, out: take(&mut self.out, total_rows(heads)), ..self };
        (left, Heads { heads: rest, ..self })
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => norms(simd, self.heads, self.side, self.out));
    }
}

#[inline(always)]
fn norms<S: Simd>(simd: S, heads: &[HeadRows], side: Side, out: &mut [f32]) {
    let mut out = out.iter_mut();
    let mut wide = Vec::new();
    for page in heads.iter().flat_map(HeadRows::pages) {
        let (d, stride) = (page.layout.dim(side), page.layout.row_stride(side));
        let rows = page.layout.rows(page.page, side);
        wide.resize(d, 0.0);
        for (i, norm) in (0..page.rows).zip(&mut out) {
            let row = match rows {
                Rows::F32(s) => &s[i * stride..i * stride + d],
                _ => {
                    widen(simd, rows, i * stride, &mut wide);
                    &wide
                }
            };
            *norm = sum_of_squares(simd, row).sqrt();
        }
    }
}
