//! Vector quantisation for queries: every entry has one index into a codebook of whole keys, made so that logits err
//! little, and the entries that promise most are read.
//!
//! *Helps* long contexts: an entry is ranked by one index, whatever the dimension of keys. *Hurts* short ones, where a
//! codebook is as large as the keys it stands for and every query is multiplied with all of it.

use super::codes::Codes;
use super::options::{COMMON, Defaults, arguments};
use super::{ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// Entries per codeword, at least: shorter prompts have fewer codewords.
const PER_CODEWORD: usize = 4;

/// Fewest entries that a codebook is learnt from.
const LEAST: usize = 512;

const ARGS: [Arg; 7 + COMMON] = arguments(
    [
        Arg::count("levels", 4096, 2, 65536, "codewords, as far as there are four entries for each"),
        Arg::word("rotary", &["true", "windowed"], "keys and queries where they are, or at one distance"),
        Arg::count("distance", 2048, 0, 1 << 20, "with rotary=windowed: where queries are put"),
        Arg::word("aware", &["yes", "no"], "whether recorded queries say which keys are alike"),
        Arg::count("queries", 2048, 1, 16384, "last queries of the prompt that say so"),
        Arg::count("train", 16384, 16, 1 << 20, "first entries, which the codebook is learnt from"),
        Arg::count("rounds", 10, 1, 64, "rounds of k-means"),
    ],
    Defaults {
        sinks: 8,
        recent: 64,
        group: &["union", "sum", "max", "logit", "mean"],
        rank: &["unit"],
        tail: &["ignore"],
        estimate: 1.0,
        correct: &["no"],
        every: 1,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "a2ats",
    summary: "reads the entries whose codes among whole keys promise most to queries like the recorded ones",
    source: "A2ATS, He et al. 2025, arXiv:2502.12665",
    needs: "the last queries of the prompt; with rotary=windowed rotary embeddings",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule::from_args(args)?;
    let [levels, train, rounds] = [args.count("levels")?, args.count("train")?, args.count("rounds")?];
    let (distance, queries) = (args.count("distance")?, args.count("queries")?);
    let mut codes = Codes::new(1, levels, train, rounds).with_fewer(PER_CODEWORD, LEAST);
    if args.word("rotary")? == "windowed" {
        codes = codes.windowed(distance as i32);
    }
    if args.word("aware")? == "yes" {
        codes = codes.aware(queries);
    }
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(codes), rule }))
}
