//! Product quantisation: every entry has a code of a few bytes, and the entries whose codes promise most are read.
//!
//! *Helps* where what a query wants are single entries among unlike ones. *Hurts* by ranking every entry, and by saying of
//! what is left only what codes say: there is no estimate of it in the output.

use super::codes::Codes;
use super::options::{COMMON, Defaults, arguments};
use super::{ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 6 + COMMON] = arguments(
    [
        Arg::count("pieces", 32, 1, 256, "pieces that a key is cut into, each with an index"),
        Arg::count("levels", 16, 2, 65536, "codewords of a piece: up to 16 take 4 bits, up to 256 take 8"),
        Arg::count("train", 8192, 16, 1 << 20, "first entries, which codebooks are learnt from"),
        Arg::count("rounds", 10, 1, 64, "rounds of k-means"),
        Arg::word("aware", &["yes", "no"], "whether recorded queries say which keys are alike"),
        Arg::count("queries", 256, 1, 4096, "with aware=yes: last queries of the prompt that say so"),
    ],
    Defaults {
        sinks: 32,
        recent: 64,
        group: &["sum", "max", "logit", "mean", "union"],
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
    name: "pq",
    summary: "reads the entries whose product-quantisation codes promise most",
    source: "PQCache, Zhang et al. 2024, arXiv:2407.12820; codes of 4 bits as in FAISS fast scan; whitened as in A2ATS, arXiv:2502.12665",
    needs: "the last queries of the prompt; nothing with aware=no",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule::from_args(args)?;
    let [pieces, levels, train, rounds] =
        [args.count("pieces")?, args.count("levels")?, args.count("train")?, args.count("rounds")?];
    let codes = Codes::new(pieces, levels, train, rounds);
    let codes = if args.word("aware")? == "yes" { codes.aware(args.count("queries")?) } else { codes };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(codes), rule }))
}
