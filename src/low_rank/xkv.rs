//! xKV: keys and values of several neighbouring layers as one matrix each, cut to its leading singular vectors (arXiv
//! 2503.18893).
//!
//! *Helps* long prompts whose every token may matter: nothing is dropped, all of it is rounded to a space. *Hurts* models
//! whose layers have little in common, and decode without an index, which makes every key in every step.

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
        Arg::count("skip", 0, 0, 1 << 10, "first layers that stay as they are"),
        Arg::real(
            "keys",
            0.25,
            0.0,
            1.0,
            "rank of keys as a share of the group's features; 0 leaves them exact",
        ),
        Arg::real("values", 0.5, 0.0, 1.0, "rank of values likewise"),
        Arg::count("rank_k", 0, 0, 1 << 16, "rank of keys; 0 takes the share"),
        Arg::count("rank_v", 0, 0, 1 << 16, "rank of values; 0 takes the share"),
        Arg::real(
            "tolerance",
            0.0,
            0.0,
            1.0,
            "largest relative error; what is further off stays exact; 0 takes any",
        ),
        Arg::count(
            "again",
            1024,
            16,
            1 << 24,
            "entries behind those that are factored at which these are too",
        ),
        Arg::count(
            "rebuilt",
            2048,
            0,
            1 << 24,
            "entries per KV head whose keys are remembered between steps",
        ),
        Arg::count("chunk", 8, 1, 64, "entries that are remembered together"),
    ],
    build: Build::Factor { build },
};

fn build(args: &Args) -> Result<Arc<LowRank>, RecipeError> {
    let rank = |count: &str, share: &str| -> Result<Rank, RecipeError> {
        Ok(match (args.count(count)?, args.real(share)?) {
            (0, 0.0) => Rank::None,
            (0, share) => Rank::Share(share),
            (count, _) => Rank::Count(count),
        })
    };
    let (keys, values) = (rank("rank_k", "keys")?, rank("rank_v", "values")?);
    if (keys, values) == (Rank::None, Rank::None) {
        return Err(args.error("keys and values", 0, "above 0, one of them at least"));
    }
    Ok(Arc::new(LowRank {
        name: ENTRY.name,
        group: args.count("group")?,
        stride: args.count("stride")?,
        skip: args.count("skip")?,
        keys,
        values,
        tolerance: Some(args.real("tolerance")?).filter(|&tolerance| tolerance > 0.0),
        again: args.count("again")?,
        rebuilt: args.count("rebuilt")?,
        chunk: args.count("chunk")?,
    }))
}
