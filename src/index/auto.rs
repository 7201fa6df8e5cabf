//! The combination that measurements on a real model support: small clusters of keys and values together, the heaviest
//! read, the rest estimated from their means and from how keys vary around them.
//!
//! *Helps* any long context: at equal bytes its error is a fraction of that of pages (`docs/policies/auto.md`). *Hurts*
//! the end of a prompt by k-means over all of it, and the newest entries by waiting to be clustered: they are read.

use super::options::{COMMON, Defaults, arguments};
use super::{Clusters, Codes, ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// Codewords of a piece: what 4 bits name.
const LEVELS: usize = 16;

/// Rounds of k-means for codewords.
const ROUNDS: usize = 10;

const ARGS: [Arg; 8 + COMMON] = arguments(
    [
        Arg::count("size", 16, 1, 4096, "entries of a cluster, on average"),
        Arg::word("store", &["int4", "int8", "f16", "f32"], "how means are stored"),
        Arg::count("segment", 2048, 16, 65536, "entries clustered together, at most"),
        Arg::count("update", 128, 1, 65536, "entries that come before those behind a prompt are clustered"),
        Arg::count("rounds", 4, 1, 64, "rounds of k-means"),
        Arg::count(
            "pieces",
            32,
            0,
            256,
            "pieces of a code of 4 bits each within clusters; 0 reads whole clusters",
        ),
        Arg::real("refine", 0.25, 0.0, 1.0, "share of the entries whose clusters are looked into"),
        Arg::real("values", 0.5, 0.0, 16.0, "how much values count beside keys when entries are clustered"),
    ],
    Defaults {
        sinks: 4,
        recent: 64,
        group: &["sum", "max", "logit", "mean", "union"],
        rank: &["entry", "unit"],
        tail: &["estimate", "ignore"],
        estimate: 1.0,
        correct: &["yes", "no"],
        every: 1,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "auto",
    summary: "reads the clusters of keys and values that weigh most, and estimates the others",
    source: "measured here; RetroInfer, arXiv:2505.02922, with values in the clusters and a corrected tail",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule { refine: args.real("refine")?, ..ReadRule::from_args(args)? };
    let mut clusters = Clusters { values: args.real("values")?, ..Clusters::from_args(args)? };
    let pieces = args.count("pieces")?;
    if pieces > 0 {
        let codes = Codes::new(pieces, LEVELS, clusters.segment, ROUNDS);
        clusters = clusters.coded(codes);
    }
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(clusters), rule }))
}
