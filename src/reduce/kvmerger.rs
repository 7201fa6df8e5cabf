//! KVMerger: runs of neighbouring tokens with similar keys become one entry, at the place of the one that drew most
//! attention.
//!
//! A run is as long as each key's cosine to the one before reaches the threshold. Its pivot `p` is the kept entry that the
//! observed queries looked at most; the entries of the run that leave go into it, keys and values alike:
//! ```text
//! g[i] = exp(−‖k[p] − k[i]‖² / (2 σ²)),   g[p] = 1,   σ = Σ ‖k[p] − k[i]‖ / (√2 |S|)        x[p] ← Σ g[i] x[i] / Σ g[i]
//! ```
//! Other kept entries of a run stay as they are (the paper protects them too), and runs that keep nothing are dropped.
//! No code was published; how σ and the sets are made follows the text.
//!
//! *Helps* repetitive text, where runs are long. *Hurts* elsewhere: rotation makes keys of neighbours alike in their slow
//! dimensions only, and averages them in the fast ones.

use super::{Neighbour, Reduced, Reducer};
use crate::device::HeadRows;
use crate::error::{PolicyError, RecipeError};
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::plan::{HeadPlan, LayerPlan, Merges, Target};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerView, Needs};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "kvmerger",
    summary: "runs of neighbours with similar keys become one entry, weighed by a Gaussian of their distance",
    source: "Wang et al. 2024, arXiv:2407.08454",
    needs: "the last `window` queries; without them the first kept entry of a run is its pivot",
    args: &[
        Arg::count("window", 64, 0, 65_536, "last queries whose attention names the pivot"),
        Arg::real("threshold", 0.75, -1.0, 1.0, "smallest cosine of neighbours in a run"),
        Arg::word("mass", &["yes", "no"], "whether β grows by the logarithm of what the pivot stands for"),
    ],
    build: Build::Reduce { build },
};

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    Ok(Arc::new(KvMerger {
        window: args.count("window")?,
        threshold: args.real("threshold")? as f32,
        mass: args.word("mass")? == "yes",
    }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct KvMerger {
    /// Queries whose attention names the pivot.
    pub window: usize,
    /// Smallest cosine of neighbours in a run.
    pub threshold: f32,
    /// Whether β grows.
    pub mass: bool,
}

impl Reducer for KvMerger {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let weights = match self.window == 0 || view.queries.positions.is_empty() {
            true => vec![0.0; view.lengths().iter().sum()],
            false => super::observed(ENTRY.name, view, self.window)?,
        };
        let heads = view.heads.iter().zip(&plan.heads).zip(super::by_head(view.heads, &weights));
        let merges = heads.map(|((head, plan), weights)| self.one(view, head, plan, weights));
        Ok(merges.collect::<Result<Vec<_>, _>>()?.into())
    }
}

impl KvMerger {
    fn one(
        &self,
        view: &LayerView<'_>,
        head: &HeadRows,
        plan: &HeadPlan,
        weights: &[f32],
    ) -> Result<Merges, PolicyError> {
        if plan.keep.is_empty() || plan.is_identity() {
            return Ok(Merges { keys: true, ..Merges::default() });
        }
        let (d_k, slots) = (view.shape.d_k, (0..plan.rows as u32).collect::<Vec<_>>());
        let (mut keys, mut values) = (vec![0.0; plan.rows * d_k], vec![0.0; plan.rows * view.shape.d_v]);
        let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
        view.backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
        let key = |slot: u32| &keys[slot as usize * d_k..(slot as usize + 1) * d_k];
        let mut neighbours = Vec::new();
        for run in slots.chunk_by(|&a, &b| cosine(key(a), key(b)) >= self.threshold) {
            let (kept, leaving): (Vec<u32>, Vec<u32>) =
                run.iter().partition(|slot| plan.keep.binary_search(slot).is_ok());
            // Of equals the first.
            let heavier = |a: u32, b: u32| if weights[b as usize] > weights[a as usize] { b } else { a };
            if let Some(into) = kept.into_iter().reduce(heavier) {
                let pairs = leaving.into_iter();
                neighbours.extend(pairs.map(|from| Neighbour {
                    from,
                    into,
                    cosine: cosine(key(from), key(into)),
                }));
            }
        }
        let biases = super::biases(head);
        Ok(super::merge(neighbours, true, |slot, group| {
            let squares: Vec<f32> = group.iter().map(|n| distance(key(n.from), key(slot))).collect();
            let mean = squares.iter().map(|x| x.sqrt()).sum::<f32>() / (group.len() + 1) as f32;
            let sigma = mean / std::f32::consts::SQRT_2;
            // Keys that are all the same weigh the same.
            let gauss = |x: f32| if sigma > 0.0 { (-x / (2.0 * sigma * sigma)).exp() } else { 1.0 };
            let total = 1.0 + squares.iter().map(|&x| gauss(x)).sum::<f32>();
            let weight = |n: &Neighbour| gauss(distance(key(n.from), key(slot))) / total;
            let (target, sources) = super::alike(slot, 1.0 / total, group, weight);
            let grown = if self.mass { total.ln() } else { 0.0 };
            Some((Target { bias: super::bias_within(&biases, slot, grown), ..target }, sources))
        }))
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}
