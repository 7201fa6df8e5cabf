//! Locret: a small network per layer, trained once per model, judges each token by its own query, key and value when it
//! arrives. The score never changes, so a prompt can be compressed while it is read.
//!
//! *Helps* long prompts that must not be held whole: what is kept never exceeds the budget and one chunk. *Hurts* where the
//! question decides what matters and comes later: the network does not know it.
//!
//! Token `j` of a layer, before rotation, all heads side by side; KV head `c`:
//! ```text
//! x[j]   = (q[j], k[j], v[j])                    (Hq + H) d_k + H d_v numbers
//! s[c,j] = (D · silu(U · x[j]))[c]               U [r, ·], D [H, r], no biases
//! ```
//! The target of the training is the largest logit that later queries of the group give the entry.

use super::network::{Names, Networks};
use crate::columns::{ColumnSpec, RATED};
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::kernel::linear::Activation;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::schedule::Schedule;
use crate::policy::{LayerScores, LayerView, Needs, NewTokens, Scorer, SideKind, score};
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "locret",
    summary: "a trained network judges each token by its query, key and value, once",
    source: "Huang et al. 2024, arXiv:2410.01805",
    needs: "a profile (locret); rotary description, or q and k before rotation",
    args: &[
        Arg::real(
            "stabilizers",
            0.0,
            0.0,
            1.0,
            "share of the budget that the last entries take whatever their score",
        ),
        Arg::count("local", 32, 0, 1 << 20, "last entries that stay whatever their score, at least"),
        Arg::count("sinks", 4, 0, 1 << 20, "first entries that stay"),
    ],
    build: Build::Score { schedule: Schedule { prefill: true, chunk: true, every: None, over: None }, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    let (stabilizers, local) = (args.real("stabilizers")?, args.count("local")?);
    Ok(Arc::new(Locret { stabilizers, local, sinks: args.count("sinks")?, networks: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Locret {
    /// Share of the budget that the last entries take.
    pub stabilizers: f64,
    /// Last entries that stay, at least.
    pub local: usize,
    /// First entries that stay.
    pub sinks: usize,
    networks: Option<Arc<Networks>>,
}

impl Scorer for Locret {
    fn needs(&self) -> Needs {
        Needs { side: SideKind::PreRope, ..Needs::default() }
    }

    fn columns(&self) -> Vec<ColumnSpec> {
        vec![RATED]
    }

    fn lacks(&self) -> Option<&'static str> {
        self.networks.is_none().then_some(ENTRY.name)
    }

    fn bind(&self, profile: &Profile, shape: &ModelShape) -> Result<Option<Arc<dyn Scorer>>, ProfileError> {
        let names = Names {
            part: ENTRY.name,
            hidden: ("up", None),
            last: ("down", None),
            activation: Activation::Silu,
        };
        let inputs = |layer: usize| {
            let own = shape.layer(layer);
            Some((own.query_heads + own.kv_heads) * own.d_k + own.kv_heads * own.d_v)
        };
        let networks = Some(Arc::new(Networks::of((profile, shape), names, inputs, false)?));
        Ok(Some(Arc::new(Self { networks, ..self.clone() })))
    }

    fn rate(
        &self,
        tokens: &NewTokens<'_>,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), PolicyError> {
        self.networks.as_ref().map_or(Ok(()), |networks| networks.rate(tokens, scratch, out))
    }

    fn protect(&self, target: usize) -> (usize, usize) {
        // `usize::MAX` is no budget: then nothing is dropped.
        (self.sinks, self.local.max((self.stabilizers * target as f64) as usize))
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        Ok(LayerScores { lengths: view.lengths(), values: score::column(ENTRY.name, view, RATED.name)? })
    }
}
