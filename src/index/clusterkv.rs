//! ClusterKV: k-means by angle over all keys, clusters read by the logit of their mean until the budget is used.
//!
//! *Helps* with very small summaries: one row for eighty entries. *Hurts* where a cluster is larger than what is left of
//! the budget, and by saying nothing of what is not read.

use super::options::{COMMON, Defaults, arguments};
use super::{Clusters, ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 5 + COMMON] = arguments(
    [
        Arg::count("size", 80, 1, 4096, "entries of a cluster, on average"),
        Arg::word("store", &["f16", "f32", "int8", "int4"], "how means are stored"),
        Arg::count("segment", 8192, 16, 65536, "entries clustered together, at most"),
        Arg::count("update", 320, 1, 65536, "entries that come before those behind a prompt are clustered"),
        Arg::count("rounds", 20, 1, 64, "rounds of k-means"),
    ],
    Defaults {
        sinks: 16,
        recent: 64,
        group: &["logit", "max", "sum", "mean", "union"],
        rank: &["entry", "unit"],
        tail: &["ignore", "estimate"],
        estimate: 1.0,
        correct: &["no", "yes"],
        every: 1,
        dense: 2,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "clusterkv",
    summary: "reads the clusters whose mean keys have the largest logits",
    source: "Liu et al. 2024, arXiv:2412.03213",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule::from_args(args)?;
    let clusters = Clusters { values: 0.0, cosine: true, ..Clusters::from_args(args)? };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(clusters), rule }))
}
