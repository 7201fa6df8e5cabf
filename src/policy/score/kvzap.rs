//! KVzap: a linear map or small network per layer predicts from a token's hidden state how much a replay of the context would
//! attend to it ([`kvzip`](super::kvzip)), without the replay.
//!
//! *Helps* prompts and generation alike, at a hundredth of the model's work: what is kept adapts to the text where a threshold
//! decides. *Hurts* planning of memory then, which nothing bounds but a budget beside it; and models it was not trained for.
//!
//! Token `j` with hidden state `x[j]` after the layer's norm; KV head `c`:
//! ```text
//! s[c,j] = (W · x[j] + b)[c]    or    (W · gelu(U · x[j] + a) + b)[c]        ≈ log of the replay score
//! ```
//! An entry is judged when it leaves the last `window` ones: below `threshold` it goes. A budget keeps the best.

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
    name: "kvzap",
    summary: "predicts replay scores from hidden states; a threshold or a budget decides",
    source: "NVIDIA kvpress, KVzapPress and DMSPress",
    needs: "a profile (kvzap); hidden states",
    args: &[
        Arg::count(
            "window",
            128,
            0,
            1 << 20,
            "last entries that are not judged yet; at most half of a budget",
        ),
        Arg::count("sinks", 4, 0, 1 << 20, "first entries that stay"),
        Arg::real(
            "threshold",
            f64::NEG_INFINITY,
            f64::NEG_INFINITY,
            0.0,
            "predicted log score below which an entry goes; -inf: the budget alone decides",
        ),
    ],
    // Judging one entry more costs nothing, dropping it a copy of what stays: 32 at a time.
    build: Build::Score {
        schedule: Schedule { prefill: true, chunk: true, every: Some(32), over: None },
        build,
    },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    let threshold = Some(args.real("threshold")? as f32).filter(|threshold| threshold.is_finite());
    let (window, sinks) = (args.count("window")?, args.count("sinks")?);
    Ok(Arc::new(KvZap { window, sinks, threshold, networks: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct KvZap {
    /// Last entries that are not judged yet, at most half of a budget.
    pub window: usize,
    /// First entries that stay.
    pub sinks: usize,
    /// Predicted log score below which an entry goes.
    pub threshold: Option<f32>,
    networks: Option<Arc<Networks>>,
}

impl Scorer for KvZap {
    fn needs(&self) -> Needs {
        Needs { side: SideKind::Hidden, ..Needs::default() }
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
            hidden: ("up", Some("up_bias")),
            last: ("weight", Some("bias")),
            activation: Activation::Gelu,
        };
        let networks = Some(Arc::new(Networks::of((profile, shape), names, |_| None, true)?));
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

    fn threshold(&self) -> Option<f32> {
        self.threshold
    }

    fn protect(&self, target: usize) -> (usize, usize) {
        // A window that fills the budget would leave nothing to judge.
        (self.sinks, self.window.min(target / 2))
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        Ok(LayerScores { lengths: view.lengths(), values: score::column(ENTRY.name, view, RATED.name)? })
    }
}
