//! KeepKV's electoral votes: every entry has a vote, an entry that leaves gives its votes to the kept entry with the most
//! similar key, and an entry with `p` votes counts `p` times (β = ln p).
//!
//! With `w` the observed attention, for the entries `e` that go into `t`:
//! ```text
//! p[t] ← p[t] + Σ p[e]        v[t] ← (w[t] v[t] + Σ w[e] v[e]) / (w[t] + Σ w[e])
//! ```
//! The paper also rewrites the key, so that the query at hand sees the sum of both weights. That is exact for one query
//! and harmful for the next ones, so keys stay.
//!
//! *Helps* as [`super::value_merge`] does, of which it is the variant that counts entries where that one weighs them.
//! *Hurts* where what is dropped was hardly looked at: its vote counts all the same.

use super::{Neighbour, Reduced, Reducer};
use crate::error::{PolicyError, RecipeError};
use crate::plan::{LayerPlan, Source, Target};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerView, Needs};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "keepkv",
    summary: "dropped entries give their votes (mass) and values to the kept entry with the most similar key",
    source: "Tian et al. 2025, arXiv:2504.09936",
    needs: "the last `window` queries",
    args: &[
        Arg::count("window", 64, 1, 65_536, "last queries whose attention weighs the values"),
        Arg::real("threshold", 0.8, -1.0, 1.0, "smallest cosine at which anything is merged"),
    ],
    build: Build::Reduce { build },
};

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    Ok(Arc::new(KeepKv { window: args.count("window")?, threshold: args.real("threshold")? as f32 }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct KeepKv {
    /// Queries whose attention weighs the values.
    pub window: usize,
    /// Smallest cosine at which anything is merged.
    pub threshold: f32,
}

impl Reducer for KeepKv {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let weights = super::observed(ENTRY.name, view, self.window)?;
        let heads = super::neighbours(view, plan)?.into_iter().zip(view.heads);
        let heads =
            heads.zip(super::by_head(view.heads, &weights)).map(|((mut neighbours, head), weights)| {
                neighbours.retain(|n| n.cosine >= self.threshold);
                let biases = super::biases(head);
                super::merge(neighbours, false, |slot, group| mix(slot, group, weights, &biases))
            });
        Ok(heads.collect::<Vec<_>>().into())
    }
}

/// What one entry takes up; nothing if all of it weighs nothing.
fn mix(slot: u32, group: &[Neighbour], weights: &[f32], biases: &[f32]) -> Option<(Target, Vec<Source>)> {
    let (weight, votes) = (|slot: u32| weights[slot as usize], |slot: u32| biases[slot as usize].exp());
    let total = weight(slot) + group.iter().map(|n| weight(n.from)).sum::<f32>();
    let share = |slot: u32| weight(slot) / total;
    if !share(slot).is_finite() {
        return None;
    }
    let given: f32 = group.iter().map(|n| votes(n.from)).sum();
    let bias = super::bias_within(biases, slot, (given / votes(slot)).ln_1p());
    let sources = group.iter().map(|n| Source { slot: n.from, key: 0.0, value: share(n.from) });
    Some((Target { slot, sources: 0, key: 1.0, value: share(slot), bias }, sources.collect()))
}
