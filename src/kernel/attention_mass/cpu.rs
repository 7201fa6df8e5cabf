//! A second pass over the keys, one query head at a time.
//!
//! A query head's mass is one contiguous row of the output, so heads are what the work is cut by; the keys
//! of a tile are converted once for all queries of the head. *Helps* prefill, where there are many queries.
//! *Hurts* a few queries of a large group, whose keys are converted once per query head.

use super::MassArgs;
use crate::device::HeadRows;
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::attend::Workspace;
use crate::kernel::attend::cpu::add_weights;
use crate::kernel::simd::gemm::PAD;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::tile::{
    BLOCK, QueryBlock, ScoreScratch, TILE, padded_bias, page_count, rotation_len, tiles,
};
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, params: &AttentionParams<'_>, args: &mut MassArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    if args.positions.is_empty() {
        args.mass.fill(0.0);
        return Ok(());
    }
    let entries: usize = args.heads.iter().map(HeadRows::rows).sum();
    let tasks = exec.tasks(entries * params.group * args.positions.len() * params.d_k);
    let work = Heads {
        exec,
        params,
        heads: args.heads,
        queries: args.queries,
        positions: args.positions,
        lse: args.lse,
        mass: args.mass,
        tasks,
    };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

struct Heads<'a> {
    exec: &'a Exec,
    params: &'a AttentionParams<'a>,
    heads: &'a [HeadRows],
    queries: &'a [f32],
    positions: &'a [i32],
    lse: &'a [f32],
    mass: &'a mut [f32],
    /// Tasks for each head, if there are fewer heads than tasks.
    tasks: usize,
}

impl Split for Heads<'_> {
    fn pieces(&self) -> usize {
        self.heads.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (heads, rest) = self.heads.split_at(at);
        let rows = at * self.params.group * self.positions.len();
        let entries: usize = heads.iter().map(HeadRows::rows).sum();
        let mass = take(&mut self.mass, self.params.group * entries);
        let tasks = self.tasks / 2;
        let left = Heads { heads, mass, tasks, ..self };
        let (queries, lse) = (&self.queries[rows * self.params.d_k..], &self.lse[rows..]);
        (left, Heads { heads: rest, queries, lse, tasks: tasks.max(1), ..self })
    }

    fn work(mut self) {
        let (params, tokens) = (self.params, self.positions.len());
        let tasks = self.tasks.max(1);
        let mut workspace = Workspace::default();
        let scratch = workspace.take(tasks * mass_len(params));
        for (h, head) in self.heads.iter().enumerate() {
            let rows = h * params.group * tokens..(h + 1) * params.group * tokens;
            let work = HeadMass {
                exec: self.exec,
                params,
                head,
                queries: &self.queries[rows.start * params.d_k..rows.end * params.d_k],
                positions: self.positions,
                lse: &self.lse[rows],
                mass: take(&mut self.mass, params.group * head.rows()),
                first: 0,
                end: params.group,
            };
            work.over(scratch, tasks);
        }
    }
}

/// Floats of scratch one task needs.
pub(in crate::kernel) fn mass_len(params: &AttentionParams<'_>) -> usize {
    (ScoreScratch::len(params.d_k, params.d_k) + rotation_len(params.d_k)).next_multiple_of(PAD)
}

/// The mass of query heads `first .. end` of a group on one KV head.
pub(in crate::kernel) struct HeadMass<'a> {
    pub exec: &'a Exec,
    pub params: &'a AttentionParams<'a>,
    pub head: &'a HeadRows,
    /// Of the whole group.
    pub queries: &'a [f32],
    pub positions: &'a [i32],
    /// Of the whole group.
    pub lse: &'a [f32],
    /// Of these query heads.
    pub mass: &'a mut [f32],
    pub first: usize,
    pub end: usize,
}

impl HeadMass<'_> {
    /// In up to `tasks` tasks, each with an equal part of `scratch`.
    pub(in crate::kernel) fn over(mut self, scratch: &mut [f32], tasks: usize) {
        if tasks < 2 || self.end - self.first < 2 {
            let exec = self.exec;
            dispatch!(exec.token(), simd => self.work(simd, scratch));
            return;
        }
        let middle = (self.first + self.end) / 2;
        let mass = take(&mut self.mass, (middle - self.first) * self.head.rows());
        let (a, b) = scratch.split_at_mut(scratch.len() / tasks * (tasks / 2));
        let left = HeadMass { mass, end: middle, ..self };
        let right = HeadMass { first: middle, ..self };
        rayon::join(|| left.over(a, tasks / 2), || right.over(b, tasks - tasks / 2));
    }

    #[inline(always)]
    fn work<S: Simd>(self, simd: S, scratch: &mut [f32]) {
        let entries = self.head.rows();
        let (params, tokens) = (self.params, self.positions.len());
        for (g, mass) in (self.first..self.end).zip(self.mass.chunks_exact_mut(entries.max(1))) {
            let (queries, lse) = (&self.queries[g * tokens * params.d_k..], &self.lse[g * tokens..]);
            let mut memory = &mut *scratch;
            let rotation = take(&mut memory, rotation_len(params.d_k));
            let scratch = ScoreScratch::cut(&mut memory, params.d_k, params.d_k);
            simd.vectorize(
                #[inline(always)]
                || {
                    head_mass(
                        simd,
                        params,
                        self.head,
                        queries,
                        self.positions,
                        lse,
                        (scratch, rotation),
                        mass,
                    );
                },
            );
        }
    }
}

/// The mass one query head's queries give to every entry.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernel's own arguments, for one head")]
pub(in crate::kernel) fn head_mass<S: Simd>(
    simd: S,
    params: &AttentionParams<'_>,
    head: &HeadRows,
    queries: &[f32],
    positions: &[i32],
    lse: &[f32],
    (mut scratch, rotation): (ScoreScratch<'_>, &mut [f32]),
    mass: &mut [f32],
) {
    mass.fill(0.0);
    let tokens = positions.len();
    for tile in tiles(head, 0..page_count(head)) {
        let bias = padded_bias(&tile);
        let target = &mut mass[tile.slot()..tile.slot() + tile.len];
        let mut turned = false;
        for first in (0..tokens).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(tokens);
            let block = QueryBlock::new(queries, params.d_k, positions, rows, head, rotation);
            if !tile.meets(params, &block) {
                continue;
            }
            block.dots(simd, &tile, &mut scratch, &mut turned, Ahead::NONE);
            for r in 0..block.rows {
                let x = &mut scratch.scores[r * TILE..(r + 1) * TILE];
                let top = block.logits(simd, params, &tile, r, bias.as_ref(), x);
                let lse = lse[first + r];
                if top > f32::NEG_INFINITY && lse > f32::NEG_INFINITY {
                    add_weights(simd, target, &x[..tile.len], lse);
                }
            }
        }
    }
}
