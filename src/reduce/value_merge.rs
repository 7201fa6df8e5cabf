//! Value merging with mass: the value of an entry that leaves is mixed into that of the kept entry with the most similar
//! key, whose key stays and whose log-mass bias β grows by what it now speaks for.
//!
//! `c[e] = max(cos(k[e], k[t]), 0)`, or 0 below the threshold, for an entry `e` and its neighbour `t`; `a` is the attention
//! of the last queries of the prompt:
//! ```text
//! v[t] ← (a[t] v[t] + Σ a[e] c[e] v[e]) / (a[t] + Σ a[e] c[e])        β[t] ← β[t] + ln(1 + Σ a[e] c[e] / a[t]),  at most ln 16
//! ```
//! Without observed queries (`window=0`, or none recorded) the weights are those of kvpress's merging press: `1` for the
//! entry and `c[e] ‖v[e]‖ / (‖v[e]‖ + ‖v[t]‖)` for what it takes up, and β stays.
//!
//! *Helps* at small budgets, where what is dropped had weight. *Hurts* where what is dropped is unlike anything kept: a high
//! threshold leaves that alone.

use super::{Neighbour, Reduced, Reducer};
use crate::device::page::Side;
use crate::error::{PolicyError, RecipeError};
use crate::kernel::row_norms::NormArgs;
use crate::kernel::total_rows;
use crate::plan::{LayerPlan, Source, Target};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerView, Needs};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "value_merge",
    summary: "values of dropped entries are mixed into the kept entry with the most similar key, whose mass grows",
    source: "kvpress's MergingPress (pull request 219), with the mass correction of KeepKV (arXiv:2504.09936)",
    needs: "the last `window` queries; none with window=0",
    args: &[
        Arg::count(
            "window",
            64,
            0,
            65_536,
            "last queries whose attention weighs what is mixed; 0: norms of values do",
        ),
        Arg::real("threshold", 0.0, -1.0, 1.0, "smallest cosine at which anything is mixed"),
        Arg::real(
            "fraction",
            1.0,
            0.0,
            1.0,
            "share of the dropped entries that may be mixed, the most similar first",
        ),
        Arg::word("values", &["yes", "no"], "whether values are mixed, or only mass is added"),
        Arg::word("mass", &["yes", "no"], "whether the kept entry weighs more afterwards"),
    ],
    build: Build::Reduce { build },
};

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    Ok(Arc::new(ValueMerge {
        window: args.count("window")?,
        threshold: args.real("threshold")? as f32,
        fraction: args.real("fraction")?,
        values: args.word("values")? == "yes",
        mass: args.word("mass")? == "yes",
    }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct ValueMerge {
    /// Queries whose attention weighs what is mixed.
    pub window: usize,
    /// Smallest cosine at which anything is mixed.
    pub threshold: f32,
    /// Share of the dropped entries that may be mixed.
    pub fraction: f64,
    /// Whether values are mixed.
    pub values: bool,
    /// Whether β grows.
    pub mass: bool,
}

impl Reducer for ValueMerge {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let observed = self.window > 0 && !view.queries.positions.is_empty();
        let of = match observed {
            true => super::observed(ENTRY.name, view, self.window)?,
            false => {
                let mut norms = vec![0.0; total_rows(view.heads)];
                let side = Side::Value;
                view.backend.row_norms(&mut NormArgs { heads: view.heads, side, out: &mut norms })?;
                norms
            }
        };
        let heads = super::neighbours(view, plan)?.into_iter().zip(view.heads);
        let heads = heads.zip(super::by_head(view.heads, &of)).map(|((neighbours, head), of)| {
            let (weights, biases) = (Weights { of, observed }, super::biases(head));
            super::merge(self.near(neighbours), false, |slot, group| {
                let (target, sources) = self.mix(slot, group, weights)?;
                let bias = super::bias_within(&biases, slot, target.bias);
                Some((Target { bias, ..target }, sources))
            })
        });
        Ok(heads.collect::<Vec<_>>().into())
    }
}

/// A number per entry: observed attention, or norms of values.
#[derive(Clone, Copy, Debug)]
struct Weights<'a> {
    of: &'a [f32],
    observed: bool,
}

impl ValueMerge {
    /// Those alike enough to be mixed.
    fn near(&self, mut neighbours: Vec<Neighbour>) -> Vec<Neighbour> {
        let most = (neighbours.len() as f64 * self.fraction) as usize;
        neighbours.retain(|n| n.cosine > 0.0 && n.cosine >= self.threshold);
        if neighbours.len() > most {
            neighbours.sort_by(|a, b| b.cosine.total_cmp(&a.cosine).then(a.from.cmp(&b.from)));
            neighbours.truncate(most);
        }
        neighbours
    }

    /// What one entry takes up; nothing if all of it weighs nothing.
    fn mix(&self, slot: u32, group: &[Neighbour], weights: Weights<'_>) -> Option<(Target, Vec<Source>)> {
        let of = |slot: u32| weights.of[slot as usize];
        let weight = |n: &Neighbour| match weights.observed {
            true => of(n.from) * n.cosine,
            false => n.cosine * of(n.from) / (of(n.from) + of(slot) + 1e-6),
        };
        let own = if weights.observed { of(slot) } else { 1.0 };
        let taken: f32 = group.iter().map(weight).sum();
        let total = own + taken;
        if taken <= 0.0 || !(taken / total).is_finite() {
            return None;
        }
        let bias =
            if self.mass && weights.observed { (taken / own.max(f32::MIN_POSITIVE)).ln_1p() } else { 0.0 };
        let share = |weight: f32, unmixed: f32| if self.values { weight / total } else { unmixed };
        let sources = group.iter().map(|n| Source { slot: n.from, key: 0.0, value: share(weight(n), 0.0) });
        let target = Target { slot, sources: 0, key: 1.0, value: share(own, 1.0), bias };
        Some((target, sources.collect()))
    }
}
