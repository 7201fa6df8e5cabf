//! Sums tile by tile, in vectors and threads.
//!
//! The pages of a KV head are cut into chunks by their number alone; each chunk's sums go to a place of their own, and
//! these are added in order. So the same call gives the same bits on one thread and on fifty. A tile that weighs nothing
//! in any row is not read.

use super::WeighArgs;
use crate::device::HeadRows;
use crate::device::encoding::rotate;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::simd::gemm::PAD;
use crate::kernel::simd::math::add_scaled;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::tile::{BLOCK, ScoreScratch, TILE, Tile, page_count, tiles};
use crate::kernel::simd::{Exec, Lent, both, dispatch, take};
use crate::kernel::total_rows;
use fearless_simd::{Simd, SimdBase};
use std::ops::Range;

/// Entries of a chunk, about: summing fewer takes no longer than waking a thread.
const CHUNK: usize = 2048;

/// See [`super`].
///
/// # Errors
/// As [`WeighArgs::validate`].
pub fn run(exec: &Exec, args: &mut WeighArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError> {
    args.validate()?;
    if args.out.is_empty() {
        return Ok(());
    }
    let context = Context { exec, rows: args.rows, d_v: args.d_v };
    let tasks = exec.tasks(total_rows(args.heads) * args.rows * args.d_v);
    let partials: usize = args.heads.iter().map(|head| context.partial_len(head)).sum();
    let scratch = context.scratch_len();
    let (scratch, partials) = workspace.take(tasks * scratch + partials).split_at_mut(tasks * scratch);
    let heads = Heads { context, heads: args.heads, weights: args.weights, partials, out: args.out };
    exec.run(tasks, || heads.spread(Lent { scratch, tasks }));
    Ok(())
}

#[derive(Clone, Copy)]
struct Context<'a> {
    exec: &'a Exec,
    rows: usize,
    d_v: usize,
}

impl Context<'_> {
    /// Floats of one chunk's sums.
    fn sums_len(&self) -> usize {
        self.rows * self.d_v
    }

    /// Chunks of a head.
    fn chunks(head: &HeadRows) -> usize {
        head.rows().div_ceil(CHUNK).min(page_count(head)).max(1)
    }

    /// Floats of the sums of a head's chunks, if there are several.
    fn partial_len(&self, head: &HeadRows) -> usize {
        let chunks = Self::chunks(head);
        if chunks > 1 { chunks * self.sums_len() } else { 0 }
    }

    /// Scratch of one task.
    fn scratch_len(&self) -> usize {
        let padded = self.d_v.next_multiple_of(PAD);
        (ScoreScratch::len(0, self.d_v) + (TILE + 2 * BLOCK) * padded).next_multiple_of(PAD)
    }
}

/// Some of the KV heads; everything else is theirs only.
struct Heads<'a> {
    context: Context<'a>,
    heads: &'a [HeadRows],
    weights: &'a [f32],
    partials: &'a mut [f32],
    out: &'a mut [f32],
}

impl Heads<'_> {
    fn spread(mut self, lent: Lent<'_>) {
        let context = self.context;
        if let [head] = self.heads {
            return self.one(head, lent);
        }
        let at = self.heads.len() / 2;
        let (heads, rest) = self.heads.split_at(at);
        let (weights, rest_weights) = self.weights.split_at(context.rows * total_rows(heads));
        let partials = take(&mut self.partials, heads.iter().map(|head| context.partial_len(head)).sum());
        let out = take(&mut self.out, at * context.sums_len());
        let left = Heads { context, heads, weights, partials, out };
        let right = Heads { heads: rest, weights: rest_weights, ..self };
        let entries = (total_rows(left.heads) + 1, total_rows(right.heads) + 1);
        both(lent, entries, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    fn one(self, head: &HeadRows, lent: Lent<'_>) {
        let (context, count) = (self.context, Context::chunks(head));
        let out = if count > 1 { &mut *self.partials } else { &mut *self.out };
        Chunks { context, head, weights: self.weights, count, range: 0..count, out }.spread(lent);
        if count > 1 {
            let mut partials = self.partials.chunks_exact(context.sums_len());
            self.out.fill(0.0);
            for partial in &mut partials {
                dispatch!(context.exec.token(), simd => add_scaled(simd, self.out, partial, 1.0));
            }
        }
    }
}

/// Some chunks of the pages of a KV head.
struct Chunks<'a> {
    context: Context<'a>,
    head: &'a HeadRows,
    weights: &'a [f32],
    /// Of the head.
    count: usize,
    range: Range<usize>,
    /// `[range, rows, d_v]`.
    out: &'a mut [f32],
}

impl Chunks<'_> {
    fn spread(mut self, lent: Lent<'_>) {
        if lent.tasks < 2 || self.range.len() < 2 {
            let exec = self.context.exec;
            return dispatch!(exec.token(), simd => self.work(simd, lent.scratch));
        }
        let middle = self.range.start.midpoint(self.range.end);
        let out = take(&mut self.out, (middle - self.range.start) * self.context.sums_len());
        let left = Chunks { range: self.range.start..middle, out, ..self };
        let right = Chunks { range: middle..self.range.end, ..self };
        let weights = (left.range.len(), right.range.len());
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    #[inline(always)]
    fn work<S: Simd>(self, simd: S, scratch: &mut [f32]) {
        let (context, pages) = (self.context, page_count(self.head));
        let first = |chunk: usize| chunk * pages / self.count;
        for (chunk, out) in self.range.zip(self.out.chunks_exact_mut(context.sums_len())) {
            let pages = first(chunk)..first(chunk + 1);
            for (block, out) in out.chunks_mut(BLOCK * context.d_v).enumerate() {
                let weights = &self.weights[block * BLOCK * self.head.rows()..];
                simd.vectorize(
                    #[inline(always)]
                    || sum_block(simd, self.head, pages.clone(), weights, out, context.d_v, scratch),
                );
            }
        }
    }
}

/// The sums of up to [`BLOCK`] rows of weights over some pages.
#[inline(always)]
fn sum_block<S: Simd>(
    simd: S,
    head: &HeadRows,
    pages: Range<usize>,
    weights: &[f32],
    out: &mut [f32],
    d_v: usize,
    mut memory: &mut [f32],
) {
    let (entries, rows, padded) = (head.rows(), out.len() / d_v, d_v.next_multiple_of(PAD));
    let ScoreScratch { scores, mut unpack, .. } = ScoreScratch::cut(&mut memory, 0, d_v);
    let values = take(&mut memory, TILE * padded);
    let sums = take(&mut memory, BLOCK * padded);
    // Values stored rotated are summed apart and turned back once.
    let rotated = take(&mut memory, BLOCK * padded);
    let apart = head.rotated(Side::Value);
    sums[..rows * padded].fill(0.0);
    if apart {
        rotated[..rows * padded].fill(0.0);
    }
    let weighs = |tile: &Tile<'_>| {
        let slots = |row: usize| row * entries + tile.slot()..row * entries + tile.slot() + tile.len;
        (0..rows).any(|row| weights[slots(row)].iter().any(|&w| w > 0.0))
    };
    let mut tiles = tiles(head, pages).filter(weighs).peekable();
    while let Some(tile) = tiles.next() {
        for row in 0..rows {
            let line = &mut scores[row * TILE..][..tile.len.next_multiple_of(S::f32s::LEN)];
            line[..tile.len].copy_from_slice(&weights[row * entries + tile.slot()..][..tile.len]);
            line[tile.len..].fill(0.0);
        }
        let ahead = tiles.peek().map_or(Ahead::NONE, |next| next.ahead(Side::Value));
        let sums = if tile.rotated(Side::Value) { &mut *rotated } else { &mut *sums };
        tile.add_values(simd, scores, rows, values, &mut unpack, sums, ahead);
    }
    for (row, out) in out.chunks_exact_mut(d_v).enumerate() {
        out.copy_from_slice(&sums[row * padded..][..d_v]);
        if apart {
            rotate(&mut rotated[row * padded..][..d_v]);
            add_scaled(simd, out, &rotated[row * padded..][..d_v], 1.0);
        }
    }
}
