//! ShadowKV: the keys of every layer as products of low rank, those of the chunks they suit least kept as they are, and an
//! index that reads these and the chunks whose mean key weighs most (arXiv 2410.21465).
//!
//! *Helps* long prompts on models with many KV heads: keys shrink by six, and a step reads a thousandth of them. *Hurts*
//! models with few KV heads, whose keys share no space: at the same share of the features far more of them is lost.

use super::options::{AGAIN, CHUNK, RANK_K, REBUILT, SKIP, TOLERANCE, keys, keys_of_layers, outliers};
use super::{LowRank, Rank};
use crate::error::RecipeError;
use crate::policy::registry::{Args, Build, Entry};
use std::sync::Arc;

/// The registry's line. The share of the features is the paper's rank, 160 for 8 KV heads of 128.
pub const ENTRY: Entry = Entry {
    name: "shadowkv",
    summary: "keys as products of low rank beside exact outliers, read through an index of chunks",
    source: "ShadowKV, arXiv 2410.21465",
    needs: "nothing; the rotary embedding of the layers",
    args: &[SKIP, keys(0.15625), RANK_K, TOLERANCE, AGAIN, REBUILT, CHUNK, outliers(48)],
    build: Build::Factor { index: Some("index=pages(page=8,recent=32,group=max,outliers=48)"), build },
};

fn build(args: &Args) -> Result<Arc<LowRank>, RecipeError> {
    let low_rank = keys_of_layers(ENTRY.name, args)?;
    if low_rank.keys == Rank::None {
        return Err(args.error("keys", 0, "above 0"));
    }
    Ok(Arc::new(low_rank))
}
