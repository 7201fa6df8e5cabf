//! Rows in parallel; within a row one addition or maximum per neighbour over a block of slots.
//!
//! *Helps* the narrow windows policies use. *Hurts* windows of hundreds, where a running sum would do less,
//! and round differently.

use super::{PoolArgs, PoolKind};
use crate::error::KernelError;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// Slots worked on at a time: they stay in registers or the first cache level for all neighbours.
const STRIP: usize = 256;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let tasks = exec.tasks(args.input.len() * args.width);
    let work = Rows {
        exec,
        kind: args.kind,
        width: args.width,
        lengths: args.lengths,
        input: args.input,
        out: args.out,
    };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

struct Rows<'a> {
    exec: &'a Exec,
    kind: PoolKind,
    width: usize,
    lengths: &'a [usize],
    input: &'a [f32],
    out: &'a mut [f32],
}

impl Split for Rows<'_> {
    fn pieces(&self) -> usize {
        self.lengths.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (lengths, rest) = self.lengths.split_at(at);
        let len = lengths.iter().sum();
        let left = Rows { lengths, input: &self.input[..len], out: take(&mut self.out, len), ..self };
        (left, Rows { lengths: rest, input: &self.input[len..], ..self })
    }

    fn work(mut self) {
        let exec = self.exec;
        let mut input = self.input;
        for &len in self.lengths {
            let (row, rest) = input.split_at(len);
            input = rest;
            let out = take(&mut self.out, len);
            dispatch!(exec.token(), simd => pool(simd, self.kind, self.width, row, out));
        }
    }
}

#[inline(always)]
fn pool<S: Simd>(simd: S, kind: PoolKind, width: usize, row: &[f32], out: &mut [f32]) {
    match kind {
        PoolKind::Average => {
            strips(simd, width, row, out, 0.0, |a, b| a + b);
            out.iter_mut().for_each(|x| *x /= width as f32);
        }
        PoolKind::Max => strips(simd, width, row, out, f32::NEG_INFINITY, |a, b| if b > a { b } else { a }),
    }
}

/// `out[j]` combines `row[j − reach ..= j + reach]` in that order. The inner loops are plain slices, which the
/// compiler turns into vectors of the level.
#[inline(always)]
fn strips<S: Simd>(
    _: S,
    width: usize,
    row: &[f32],
    out: &mut [f32],
    neutral: f32,
    combine: impl Fn(f32, f32) -> f32,
) {
    let (reach, len) = (width / 2, row.len());
    for (strip, out) in out.chunks_mut(STRIP).enumerate() {
        let first = strip * STRIP;
        out.fill(neutral);
        // Source slots that reach into the strip, by distance: slot j takes row[j + offset − reach].
        for offset in 0..width {
            let skip = reach.saturating_sub(first + offset).min(out.len());
            let from = first + skip + offset - reach.min(first + skip + offset);
            if from >= len {
                continue;
            }
            out[skip..].iter_mut().zip(&row[from..]).for_each(|(o, &x)| *o = combine(*o, x));
        }
    }
}
