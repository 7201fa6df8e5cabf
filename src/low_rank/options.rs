//! The options that every method has.
//!
//! *Helps* because methods differ in what is factored together and in defaults. *Hurts* nothing.

use super::{LowRank, Rank};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args};

/// See [`LowRank::skip`].
pub(super) const SKIP: Arg = Arg::count("skip", 0, 0, 1 << 10, "first layers that stay as they are");
/// See [`LowRank::tolerance`].
pub(super) const TOLERANCE: Arg = Arg::real(
    "tolerance",
    0.0,
    0.0,
    1.0,
    "largest relative error; what is further off stays exact; 0 takes any",
);
/// See [`LowRank::again`].
pub(super) const AGAIN: Arg =
    Arg::count("again", 1024, 16, 1 << 24, "entries behind those that are factored at which these are too");
/// See [`LowRank::rebuilt`].
pub(super) const REBUILT: Arg =
    Arg::count("rebuilt", 2048, 0, 1 << 24, "entries per KV head whose keys are remembered between steps");
/// See [`LowRank::chunk`].
pub(super) const CHUNK: Arg = Arg::count("chunk", 8, 1, 64, "entries that are remembered, or kept, together");

/// Rank of keys as a share of the group's features.
pub(super) const fn keys(share: f64) -> Arg {
    Arg::real("keys", share, 0.0, 1.0, "rank of keys as a share of the group's features; 0 leaves them exact")
}

/// The same as a number.
pub(super) const RANK_K: Arg = Arg::count("rank_k", 0, 0, 1 << 16, "rank of keys; 0 takes the share");

/// See [`LowRank::outliers`].
pub(super) const fn outliers(chunks: usize) -> Arg {
    Arg::count("outliers", chunks, 0, 1 << 16, "chunks per KV head whose keys stay exact")
}

/// A rank by the names of its two arguments.
pub(super) fn rank(args: &Args, count: &str, share: &str) -> Result<Rank, RecipeError> {
    Ok(match (args.count(count)?, args.real(share)?) {
        (0, 0.0) => Rank::None,
        (0, share) => Rank::Share(share),
        (count, _) => Rank::Count(count),
    })
}

/// What the arguments above say, of the keys of every layer for itself.
pub(super) fn keys_of_layers(name: &'static str, args: &Args) -> Result<LowRank, RecipeError> {
    Ok(LowRank {
        name,
        group: 1,
        stride: 1,
        skip: args.count("skip")?,
        keys: rank(args, "rank_k", "keys")?,
        values: Rank::None,
        tolerance: Some(args.real("tolerance")?).filter(|&tolerance| tolerance > 0.0),
        again: args.count("again")?,
        rebuilt: args.count("rebuilt")?,
        chunk: args.count("chunk")?,
        outliers: args.count("outliers")?,
    })
}
