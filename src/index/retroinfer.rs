//! RetroInfer: clusters of centred keys in segments of the text; the best are read, the next best estimated.
//!
//! *Helps* by an estimate for what just missed the budget. *Hurts* where much of the mass is in the rest, which counts
//! for nothing: `estimate=1` covers it.

use super::options::{COMMON, Defaults, arguments};
use super::{Clusters, ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 5 + COMMON] = arguments(
    [
        Arg::count("size", 16, 1, 4096, "entries of a cluster, on average"),
        Arg::word("store", &["f16", "f32", "int8", "int4"], "how means are stored"),
        Arg::count("segment", 8192, 16, 65536, "entries clustered together, at most"),
        Arg::count("update", 1024, 1, 65536, "entries that come before those behind a prompt are clustered"),
        Arg::count("rounds", 10, 1, 64, "rounds of k-means"),
    ],
    Defaults {
        sinks: 4,
        recent: 64,
        group: &["sum", "max", "logit", "mean", "union"],
        rank: &["entry", "unit"],
        tail: &["estimate", "ignore"],
        estimate: 0.232,
        correct: &["no", "yes"],
        every: 1,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "retroinfer",
    summary: "reads the clusters that weigh most, and estimates the next ones from their means",
    source: "Chen et al. 2025, arXiv:2505.02922",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule::from_args(args)?;
    let clusters = Clusters { values: 0.0, cosine: true, ..Clusters::from_args(args)? };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(clusters), rule }))
}
