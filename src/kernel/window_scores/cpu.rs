//! Two passes over the keys, one query head at a time: the rows' log-sum-exp, then the weights.
//!
//! *Helps* by needing no buffer of logits: sums over the window take `rows` floats per query head. *Hurts*
//! by computing every product twice.

use super::{WindowArgs, WindowReduce};
use crate::device::HeadRows;
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::attend::Workspace;
use crate::kernel::attention_mass::cpu::{head_mass, mass_len};
use crate::kernel::simd::math::exp;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::tile::{
    BLOCK, QueryBlock, ScoreScratch, TILE, padded_bias, page_count, rotation_len, tiles,
};
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::{Simd, SimdBase};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, params: &AttentionParams<'_>, args: &mut WindowArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    if args.positions.is_empty() {
        args.out.fill(0.0);
        return Ok(());
    }
    let entries: usize = args.heads.iter().map(HeadRows::rows).sum();
    let tasks = exec.tasks(2 * entries * params.group * args.positions.len() * params.d_k);
    let work = QueryHeads {
        exec,
        params,
        heads: args.heads,
        first: 0,
        end: args.heads.len() * params.group,
        queries: args.queries,
        positions: args.positions,
        reduce: args.reduce,
        out: args.out,
    };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

/// Query heads `first .. end`; `out` is theirs only, everything else of the whole call.
struct QueryHeads<'a> {
    exec: &'a Exec,
    params: &'a AttentionParams<'a>,
    heads: &'a [HeadRows],
    first: usize,
    end: usize,
    queries: &'a [f32],
    positions: &'a [i32],
    reduce: WindowReduce,
    out: &'a mut [f32],
}

impl QueryHeads<'_> {
    fn out_len(&self, query_head: usize) -> usize {
        let rows = self.heads[query_head / self.params.group].rows();
        match self.reduce {
            WindowReduce::Sum => rows,
            WindowReduce::Rows => rows * self.positions.len(),
        }
    }

    #[inline(always)]
    fn each<S: Simd>(mut self, simd: S) {
        let (params, window) = (self.params, self.positions.len());
        let mut workspace = Workspace::default();
        let memory = workspace.take(mass_len(params) + 2 * window);
        for h in self.first..self.end {
            let len = self.out_len(h);
            let out = take(&mut self.out, len);
            let head = &self.heads[h / params.group];
            let queries = &self.queries[h * window * params.d_k..][..window * params.d_k];
            let sink = params.sink_logits.map_or(f32::NEG_INFINITY, |s| s[h]);
            let one = OneHead { params, head, queries, positions: self.positions, sink };
            simd.vectorize(
                #[inline(always)]
                || one.run(simd, memory, self.reduce, out),
            );
        }
    }
}

impl Split for QueryHeads<'_> {
    fn pieces(&self) -> usize {
        self.end - self.first
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let middle = self.first + at;
        let len = (self.first..middle).map(|h| self.out_len(h)).sum();
        let left = QueryHeads { out: take(&mut self.out, len), end: middle, ..self };
        (left, QueryHeads { first: middle, ..self })
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => self.each(simd));
    }
}

struct OneHead<'a> {
    params: &'a AttentionParams<'a>,
    head: &'a HeadRows,
    queries: &'a [f32],
    positions: &'a [i32],
    sink: f32,
}

impl OneHead<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, memory: &mut [f32], reduce: WindowReduce, out: &mut [f32]) {
        let (window, entries) = (self.positions.len(), self.head.rows());
        let (mut memory, running) = memory.split_at_mut(mass_len(self.params));
        let (most, total) = running.split_at_mut(window);
        let rotation = take(&mut memory, rotation_len(self.params.d_k));
        let mut scratch = ScoreScratch::cut(&mut memory, self.params.d_k, self.params.d_k);
        most.fill(self.sink);
        total.fill(if self.sink == f32::NEG_INFINITY { 0.0 } else { 1.0 });
        let rows = reduce == WindowReduce::Rows;
        if rows {
            out.fill(f32::NEG_INFINITY);
        }
        for tile in tiles(self.head, 0..page_count(self.head)) {
            self.tile(simd, &tile, (&mut scratch, &mut *rotation), |row, top, x| {
                if rows {
                    out[row * entries + tile.slot()..][..tile.len].copy_from_slice(&x[..tile.len]);
                }
                if top > most[row] {
                    total[row] *= (most[row] - top).exp();
                    most[row] = top;
                }
                total[row] += sum_of_weights(simd, x, most[row]);
            });
        }
        // From here `most` holds the log-sum-exp.
        for (m, l) in most.iter_mut().zip(total) {
            *m = if *l > 0.0 { *m + l.ln() } else { f32::NEG_INFINITY };
        }
        if rows {
            for (row, &lse) in out.chunks_exact_mut(entries.max(1)).zip(&*most) {
                into_weights(simd, row, lse);
            }
        } else {
            let scratch = (scratch, rotation);
            head_mass(simd, self.params, self.head, self.queries, self.positions, most, scratch, out);
        }
    }

    /// Gives every row's maximum and logits on a tile, to whole vectors, unless it sees nothing.
    #[inline(always)]
    fn tile<S: Simd>(
        &self,
        simd: S,
        tile: &crate::kernel::simd::tile::Tile<'_>,
        (scratch, rotation): (&mut ScoreScratch<'_>, &mut [f32]),
        mut each: impl FnMut(usize, f32, &[f32]),
    ) {
        let (params, window) = (self.params, self.positions.len());
        let bias = padded_bias(tile);
        let mut turned = false;
        for first in (0..window).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(window);
            let block = QueryBlock::new(self.queries, params.d_k, self.positions, rows, self.head, rotation);
            if !tile.meets(params, &block) {
                continue;
            }
            block.dots(simd, tile, scratch, &mut turned, Ahead::NONE);
            for r in 0..block.rows {
                let x = &mut scratch.scores[r * TILE..(r + 1) * TILE];
                let top = block.logits(simd, params, tile, r, bias.as_ref(), x);
                if top > f32::NEG_INFINITY {
                    each(first + r, top, &x[..tile.len.next_multiple_of(S::f32s::LEN)]);
                }
            }
        }
    }
}

#[inline(always)]
fn sum_of_weights<S: Simd>(simd: S, x: &[f32], most: f32) -> f32 {
    let most = S::f32s::splat(simd, most);
    let mut sum = S::f32s::splat(simd, 0.0);
    for chunk in x.chunks_exact(S::f32s::LEN) {
        sum += exp(simd, S::f32s::from_slice(simd, chunk) - most);
    }
    sum.reduce_sum()
}

/// `row = exp(row − lse)`, zeros if there is no mass.
#[inline(always)]
fn into_weights<S: Simd>(simd: S, row: &mut [f32], lse: f32) {
    if lse == f32::NEG_INFINITY {
        row.fill(0.0);
        return;
    }
    let offset = S::f32s::splat(simd, lse);
    let mut chunks = row.chunks_exact_mut(S::f32s::LEN);
    for chunk in &mut chunks {
        exp(simd, S::f32s::from_slice(simd, chunk) - offset).store_slice(chunk);
    }
    chunks.into_remainder().iter_mut().for_each(|x| *x = (*x - lse).exp());
}
