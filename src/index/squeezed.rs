//! Squeezed Attention: clusters of keys, read from a weight on that a calibration found, with a level of coarser clusters
//! above.
//!
//! The last queries of the prompt say which weight per entry makes all KV heads of all layers together read their budget.
//! A head whose attention is spread then reads more than one that looks at little.
//!
//! *Helps* models whose layers need very different amounts, and with two levels long contexts: most clusters are not even
//! scored. *Hurts* where later questions look at the text in another way than the end of the prompt did, and by steps
//! that read up to `cap` times the budget.

use super::options::{COMMON, Calibration, Defaults, arguments, encoding};
use super::{Clusters, ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 11 + COMMON] = arguments(
    [
        Arg::count("size", 20, 1, 4096, "entries of a cluster, on average"),
        Arg::word("store", &["f16", "f32", "int8", "int4"], "how means are stored"),
        Arg::count("segment", 8192, 16, 65536, "entries clustered together, at most"),
        Arg::count("update", 128, 1, 65536, "entries that come before those behind a prompt are clustered"),
        Arg::count("rounds", 10, 1, 64, "rounds of k-means"),
        Arg::count("levels", 1, 1, 2, "2 looks for clusters in clusters of clusters"),
        Arg::count("fan", 5, 2, 64, "clusters in one of the level above, on average"),
        Arg::word(
            "coarse",
            &["int8", "f16", "f32", "int4"],
            "with levels=2: how means of the level above are stored",
        ),
        Arg::count("window", 100, 1, 4096, "last queries of the prompt that calibrate"),
        Arg::real("cap", 4.0, 1.0, 1024.0, "budgets that one KV head may read"),
        Arg::real("widen", 4.0, 1.0, 1024.0, "entries under clusters that are looked into, in budgets"),
    ],
    Defaults {
        sinks: 4,
        recent: 100,
        group: &["sum", "max"],
        rank: &["entry", "unit"],
        tail: &["ignore", "estimate"],
        estimate: 1.0,
        correct: &["no", "yes"],
        every: 1,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "squeezed",
    summary: "reads clusters above a calibrated weight, wherever they are",
    source: "Hooper et al. 2024, arXiv:2411.09688",
    needs: "the last `window` queries of the prompt",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let (queries, cap, widen) = (args.count("window")?, args.real("cap")?, args.real("widen")?);
    let calibration = Some(Calibration { queries, cap, widen });
    let rule = ReadRule { calibration, ..ReadRule::from_args(args)? };
    if rule.goal.is_some() {
        return Err(args.error("mass", args.real("mass")?, "0: the calibrated weight decides what is read"));
    }
    let clusters = Clusters { values: 0.0, cosine: true, ..Clusters::from_args(args)? };
    let clusters = match args.count("levels")? {
        2 => clusters.grouped(args.count("fan")?, encoding(args, "coarse")?),
        _ => clusters,
    };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(clusters), rule }))
}
