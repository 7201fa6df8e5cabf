//! D2O's merging: what leaves and is similar enough to a kept entry goes into it, keys and values alike; the rest is
//! dropped. How similar is enough follows what was met so far.
//!
//! With `u[e]` the cosine of an entry and its neighbour, at the t-th compaction of a KV head:
//! ```text
//! τ[0] = mean u,   τ[t] = α τ[t−1] + β mean u        merged: u[e] ≥ τ[t]
//! x[t] ← (e x[t] + Σ exp(u[e]) x[e]) / (e + Σ exp(u[e]))
//! ```
//! `weights=code` divides `x[t] + Σ u[e] x[e]` by `n + 1` as the published code does, which shrinks what it merges. The
//! method's layer budgets are the allocator [`variance`](crate::policy::allocate::variance), its scores those of
//! [`h2o`](crate::policy::score::h2o).
//!
//! *Helps* decode, where the threshold learns from what was dropped before. *Hurts* by averaging keys, as
//! [`super::lookm`] does.

use super::{Neighbour, Reduced, Reducer};
use crate::error::{PolicyError, RecipeError};
use crate::plan::{LayerPlan, Source, Target};
use crate::policy::LayerView;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "d2o",
    summary: "dropped entries similar enough to a kept one are averaged into it, by a threshold that adapts",
    source: "Wan et al. 2024, arXiv:2406.13035",
    needs: "nothing",
    args: &[
        Arg::real("alpha", 0.5, 0.0, 1.0, "what the threshold keeps of its last value"),
        Arg::real("beta", 0.5, 0.0, 1.0, "what it takes of the mean cosine"),
        Arg::word("weights", &["exp", "code"], "exponentials that sum to 1, or cosines over n + 1"),
    ],
    build: Build::Reduce { build },
};

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    Ok(Arc::new(D2o {
        alpha: args.real("alpha")? as f32,
        beta: args.real("beta")? as f32,
        normalised: args.word("weights")? == "exp",
    }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct D2o {
    /// What the threshold keeps of its last value.
    pub alpha: f32,
    /// What it takes of the mean cosine.
    pub beta: f32,
    /// Whether weights sum to 1.
    pub normalised: bool,
}

impl Reducer for D2o {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let mut remember = Vec::with_capacity(plan.heads.len());
        let mut merges = Vec::with_capacity(plan.heads.len());
        for (head, mut neighbours) in super::neighbours(view, plan)?.into_iter().enumerate() {
            let before = view.remembered.get(head).copied();
            let threshold = self.threshold(before, &neighbours);
            remember.push(threshold);
            neighbours.retain(|n| n.cosine >= threshold);
            merges.push(super::merge(neighbours, true, |slot, group| Some(self.mix(slot, group))));
        }
        Ok(Reduced { merges, remember })
    }
}

impl D2o {
    /// The threshold now, given the last one. Before anything was met nothing is similar enough.
    fn threshold(&self, before: Option<f32>, met: &[Neighbour]) -> f32 {
        let before = before.filter(|threshold| threshold.is_finite());
        if met.is_empty() {
            return before.unwrap_or(f32::INFINITY);
        }
        let mean = (met.iter().map(|n| f64::from(n.cosine)).sum::<f64>() / met.len() as f64) as f32;
        before.map_or(mean, |before| self.alpha * before + self.beta * mean)
    }

    fn mix(&self, slot: u32, group: &[Neighbour]) -> (Target, Vec<Source>) {
        if self.normalised {
            let own = std::f32::consts::E;
            let total = own + group.iter().map(|n| n.cosine.exp()).sum::<f32>();
            super::alike(slot, own / total, group, |n| n.cosine.exp() / total)
        } else {
            let count = group.len() as f32 + 1.0;
            super::alike(slot, 1.0 / count, group, |n| n.cosine / count)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn met(cosines: &[f32]) -> Vec<Neighbour> {
        cosines.iter().zip(0..).map(|(&cosine, from)| Neighbour { from, into: 9, cosine }).collect()
    }

    #[test]
    fn the_threshold_follows_what_was_met() {
        let d2o = D2o { alpha: 0.5, beta: 0.5, normalised: true };
        let first = d2o.threshold(None, &met(&[0.2, 0.6]));
        assert!((first - 0.4).abs() < 1e-6);
        assert!((d2o.threshold(Some(first), &met(&[0.8])) - 0.6).abs() < 1e-6);
        assert_eq!(d2o.threshold(Some(first), &[]), first);
        let none = d2o.threshold(None, &[]);
        assert!((d2o.threshold(Some(none), &met(&[0.8])) - 0.8).abs() < 1e-6, "nothing was met before");
    }

    #[test]
    fn exponential_weights_sum_to_one_and_those_of_the_code_do_not() {
        let group = met(&[0.5, 0.25]);
        let sum = |normalised| {
            let (target, sources) = D2o { alpha: 0.5, beta: 0.5, normalised }.mix(9, &group);
            target.value + sources.iter().map(|s| s.value).sum::<f32>()
        };
        assert!((sum(true) - 1.0).abs() < 1e-6);
        assert!((sum(false) - 1.75 / 3.0).abs() < 1e-6);
    }
}
