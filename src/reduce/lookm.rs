//! LOOK-M: an entry that leaves goes into the kept entry with the most similar key, keys and values alike.
//!
//! For the `n` entries `e` that go into `t`, of cosines `c[e]`:
//! ```text
//! average   x[t] ← (x[t] + Σ x[e]) / (n + 1)
//! pivot     x[t] ← ((1 + n/2) x[t] + Σ x[e] / 2) / (n + 1)          every x[e] is first averaged with x[t]
//! weighted  x[t] ← (x[t] + Σ w[e] x[e]) / (1 + Σ w[e])              w[e] = (c[e] + 1) / 2, of cosines not below their mean
//! ```
//! The authors' weighted mode divides by `n + 1` and so shrinks what it merges; the weights here sum to 1.
//! Their text-first rule, for prompts with images, is `marked=last` beside any scorer
//! ([`crate::policy::select::marked_last`]).
//!
//! *Helps* prompts with images, whose tokens are many and alike. *Hurts* text: it averages keys that were rotated
//! differently, and gives the average no more weight than one entry had (`mass=yes` does).

use super::{Neighbour, Reduced, Reducer};
use crate::error::{PolicyError, RecipeError};
use crate::plan::{LayerPlan, Source, Target};
use crate::policy::LayerView;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "lookm",
    summary: "dropped keys and values are averaged into the kept entry with the most similar key",
    source: "Wan et al. 2024, arXiv:2406.18139",
    needs: "nothing",
    args: &[
        Arg::word("mode", Mode::WORDS, "how what goes into an entry is weighed"),
        Arg::word("mass", &["no", "yes"], "whether β grows by ln(n + 1)"),
    ],
    build: Build::Reduce { build },
};

/// How what goes into an entry is weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Half of it is the entry itself.
    Pivot,
    /// As much as the entry.
    Average,
    /// By its cosine, if that is not below the mean of all.
    Weighted,
}

impl Mode {
    const WORDS: &[&str] = &["pivot", "average", "weighted"];
    const ALL: [Self; 3] = [Self::Pivot, Self::Average, Self::Weighted];
}

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    let word = args.word("mode")?;
    let mode = Mode::WORDS.iter().zip(Mode::ALL).find(|(name, _)| **name == word);
    let mode = mode.map_or(Mode::Pivot, |(_, mode)| mode);
    Ok(Arc::new(LookM { mode, mass: args.word("mass")? == "yes" }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct LookM {
    /// How what goes into an entry is weighed.
    pub mode: Mode,
    /// Whether β grows.
    pub mass: bool,
}

impl Reducer for LookM {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let heads = super::neighbours(view, plan)?.into_iter().zip(view.heads);
        let heads = heads.map(|(mut neighbours, head)| {
            if self.mode == Mode::Weighted {
                let sum: f64 = neighbours.iter().map(|n| f64::from(n.cosine)).sum();
                let mean = (sum / neighbours.len().max(1) as f64) as f32;
                neighbours.retain(|n| n.cosine >= mean);
            }
            let biases = super::biases(head);
            super::merge(neighbours, true, |slot, group| {
                let (target, sources) = self.mix(slot, group);
                let grown = if self.mass { (group.len() as f32).ln_1p() } else { 0.0 };
                Some((Target { bias: super::bias_within(&biases, slot, grown), ..target }, sources))
            })
        });
        Ok(heads.collect::<Vec<_>>().into())
    }
}

impl LookM {
    fn mix(&self, slot: u32, group: &[Neighbour]) -> (Target, Vec<Source>) {
        let n = group.len() as f32;
        match self.mode {
            Mode::Average => super::alike(slot, 1.0 / (n + 1.0), group, |_| 1.0 / (n + 1.0)),
            Mode::Pivot => super::alike(slot, (1.0 + n / 2.0) / (n + 1.0), group, |_| 0.5 / (n + 1.0)),
            Mode::Weighted => {
                let weight = |n: &Neighbour| f32::midpoint(n.cosine, 1.0).max(1e-6);
                let total = 1.0 + group.iter().map(weight).sum::<f32>();
                super::alike(slot, 1.0 / total, group, |n| weight(n) / total)
            }
        }
    }
}
