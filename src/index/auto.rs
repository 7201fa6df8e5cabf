//! The combination that measurements on a real model support: small clusters of keys and values together, and a code for
//! what every key has beside the mean of its cluster. The entries that promise most are read; the rest is estimated from
//! codes, means, and how keys vary around both.
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

const ARGS: [Arg; 11 + COMMON] = arguments(
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
        Arg::real(
            "widen",
            4.0,
            1.0,
            65536.0,
            "entries whose clusters are looked into, for each that is read",
        ),
        Arg::real(
            "reach",
            2.0,
            0.0,
            64.0,
            "how far beyond its mean a cluster is looked for, in spreads of its farthest key",
        ),
        Arg::word("aware", &["no", "yes"], "whether recorded queries say which keys are alike"),
        Arg::count("queries", 256, 1, 4096, "with aware=yes: last queries of the prompt that say so"),
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
    summary: "reads the entries whose codes within clusters promise most, and estimates the others",
    source: "measured here; clusters as RetroInfer's, arXiv:2505.02922, with values in them, and codes within",
    needs: "nothing; with aware=yes the last queries of the prompt",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule =
        ReadRule { widen: args.real("widen")?, reach: args.real("reach")?, ..ReadRule::from_args(args)? };
    let mut clusters = Clusters { values: args.real("values")?, ..Clusters::from_args(args)? };
    let pieces = args.count("pieces")?;
    if pieces > 0 {
        let codes = Codes::new(pieces, LEVELS, clusters.segment, ROUNDS);
        let queries = args.count("queries")?;
        clusters = clusters.coded(if args.word("aware")? == "yes" { codes.aware(queries) } else { codes });
    }
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(clusters), rule }))
}
