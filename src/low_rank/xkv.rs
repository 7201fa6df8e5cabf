//! xKV: keys and values of several neighbouring layers as one matrix each, cut to its leading singular vectors (arXiv
//! 2503.18893).
//!
//! *Helps* long prompts whose every token may matter: nothing is dropped, all of it is rounded to a space. *Hurts* models
//! whose layers have little in common, and decode without an index, which makes every key in every step.

use super::options::{AGAIN, CHUNK, RANK_K, REBUILT, SKIP, TOLERANCE, keys, keys_of_layers, outliers, rank};
use super::{LowRank, Rank};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "xkv",
    summary: "keys and values of neighbouring layers as products of low rank",
    source: "xKV, arXiv 2503.18893",
    needs: "nothing; the rotary embedding of the layers",
    args: &[
        Arg::count("group", 4, 1, 1 << 10, "layers that are factored together"),
        Arg::count("stride", 1, 1, 1 << 10, "from one layer of a group to the next"),
        SKIP,
        keys(0.25),
        Arg::real("values", 0.5, 0.0, 1.0, "rank of values likewise"),
        RANK_K,
        Arg::count("rank_v", 0, 0, 1 << 16, "rank of values; 0 takes the share"),
        TOLERANCE,
        AGAIN,
        REBUILT,
        CHUNK,
        outliers(0),
    ],
    build: Build::Factor { index: None, build },
};

fn build(args: &Args) -> Result<Arc<LowRank>, RecipeError> {
    let low_rank = LowRank {
        group: args.count("group")?,
        stride: args.count("stride")?,
        values: rank(args, "rank_v", "values")?,
        ..keys_of_layers(ENTRY.name, args)?
    };
    if (low_rank.keys, low_rank.values) == (Rank::None, Rank::None) {
        return Err(args.error("keys and values", 0, "above 0, one of them at least"));
    }
    Ok(Arc::new(low_rank))
}
