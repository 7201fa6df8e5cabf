//! KVzip: the model is made to repeat the context, and what it looks at while it does is what the context consists of.
//!
//! *Helps* a context that many questions are asked of: no question is needed to judge it, and nothing without training judges
//! better. *Hurts* by a second pass over the context before the first question ([`crate::KvCache::replay`]).
//!
//! The context is repeated in parts. For the part that entry `j` belongs to, `S` the sinks, the part and the tokens that
//! repeat it, query rows `i` of these, query heads `g` of KV head `c`:
//! ```text
//! s[c,j] = max over g, i of softmax over S of (q[g,i] · k[j])
//! ```

use crate::columns::{ColumnSpec, REPLAYED};
use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Needs, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "kvzip",
    summary: "what the model attends to while it repeats the context",
    source: "Kim et al. 2025, arXiv:2505.23416",
    needs: "a replay of the context by the host",
    args: &[Arg::count(
        "sinks",
        4,
        0,
        1 << 20,
        "first entries that stay: the length of a system prompt, or 4",
    )],
    build: Build::Score { schedule: score::PREFILL, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(KvZip { sinks: args.count("sinks")? }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct KvZip {
    /// First entries that stay.
    pub sinks: usize,
}

impl Scorer for KvZip {
    fn needs(&self) -> Needs {
        Needs { replay: true, ..Needs::default() }
    }

    fn columns(&self) -> Vec<ColumnSpec> {
        vec![REPLAYED]
    }

    fn protect(&self, _: usize) -> (usize, usize) {
        (self.sinks, 0)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let values = score::column(ENTRY.name, view, REPLAYED.name)?;
        if !values.is_empty() && values.iter().all(|score| *score == 0.0) {
            return Err(PolicyError::Missing {
                policy: ENTRY.name.to_owned(),
                need: "scores from a replay of the context".to_owned(),
                layer: view.layer,
                hint: "; call KvCache::replay before end_prefill, or choose a policy that needs none (snapkv, kvzap)",
            });
        }
        Ok(LayerScores { lengths: view.lengths(), values })
    }
}
