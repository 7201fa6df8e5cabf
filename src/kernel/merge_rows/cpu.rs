//! Targets in parallel, vectors along a row.
//!
//! Terms are added in their order, so neither threads nor blocks change a bit. *Helps* as far as memory delivers rows.
//! *Hurts* one target with very many sources, which one thread adds up alone.

use super::{MergeRowsArgs, Source, Target, dims};
use crate::device::page::{PageRef, Side};
use crate::error::KernelError;
use crate::kernel::simd::math::add_scaled;
use crate::kernel::simd::widen::widen_row;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let pages: Vec<PageRef<'_>> = args.head.pages().collect();
    let (d_k, d_v) = dims(args.head);
    let merges = args.merges;
    let rows = merges.targets.len() + merges.sources.len();
    let tasks = exec.tasks(rows * (d_v + if merges.keys { d_k } else { 0 }));
    let targets = Targets {
        exec,
        pages: &pages,
        dims: (if merges.keys { d_k } else { 0 }, d_v),
        targets: &merges.targets,
        sources: &merges.sources,
        keys: args.keys,
        values: args.values,
    };
    exec.run(tasks, || targets.spread(tasks));
    Ok(())
}

/// Some targets, with their sources and results.
struct Targets<'a> {
    exec: &'a Exec,
    pages: &'a [PageRef<'a>],
    /// Of keys, 0 if they are not mixed, and of values.
    dims: (usize, usize),
    targets: &'a [Target],
    sources: &'a [Source],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Split for Targets<'_> {
    fn pieces(&self) -> usize {
        self.targets.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (targets, rest) = self.targets.split_at(at);
        let (sources, behind) = self.sources.split_at(targets.iter().map(|t| t.sources as usize).sum());
        let (d_k, d_v) = self.dims;
        let (keys, values) = (take(&mut self.keys, at * d_k), take(&mut self.values, at * d_v));
        (
            Targets { targets, sources, keys, values, ..self },
            Targets { targets: rest, sources: behind, ..self },
        )
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => self.add(simd));
    }
}

impl Targets<'_> {
    #[inline(always)]
    fn add<S: Simd>(self, simd: S) {
        let (d_k, d_v) = self.dims;
        let mut row = vec![0.0; d_k.max(d_v)];
        let mut term = |side: Side, slot: u32, weight: f32, out: &mut [f32]| {
            let page = &self.pages[self.pages.partition_point(|p| p.first + p.rows <= slot as usize)];
            let row = &mut row[..out.len()];
            widen_row(simd, page.layout, page.page, side, slot as usize - page.first, row);
            add_scaled(simd, out, row, weight);
        };
        self.keys.fill(0.0);
        self.values.fill(0.0);
        let mut rest = self.sources;
        for (i, target) in self.targets.iter().enumerate() {
            let (sources, behind) = rest.split_at(target.sources as usize);
            rest = behind;
            let value = &mut self.values[i * d_v..(i + 1) * d_v];
            term(Side::Value, target.slot, target.value, value);
            sources.iter().for_each(|s| term(Side::Value, s.slot, s.value, value));
            if d_k > 0 {
                let key = &mut self.keys[i * d_k..(i + 1) * d_k];
                term(Side::Key, target.slot, target.key, key);
                sources.iter().for_each(|s| term(Side::Key, s.slot, s.key, key));
            }
        }
    }
}
