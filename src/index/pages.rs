//! Pages described by the means of their keys and values.
//!
//! One index for the block methods of the literature, which differ in the size of a page and in who agrees on a score:
//! InfLLM and LongMem, LongHeads, MoBA and NSA, ShadowKV's landmarks. *Helps* by the smallest summaries, half of bounds,
//! that also say roughly what the unread rest amounts to. *Hurts* where one key of a page matters and its neighbours do not: the
//! mean hides it, and `outliers` reads only the worst of such pages.

use super::options::{COMMON, Defaults, arguments, encoding};
use super::{Pages, ReadRule, Retrieval, Role};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 4 + COMMON] = arguments(
    [
        Arg::count("page", 16, 1, 4096, "entries of a page"),
        Arg::word("store", &["int8", "f16", "f32", "int4"], "how means are stored"),
        Arg::word("bounds", &["no", "yes"], "whether bounds are kept too, to certify what is missing"),
        Arg::count("outliers", 0, 0, 1 << 16, "pages read first: those with keys least like their mean"),
    ],
    Defaults {
        sinks: 4,
        recent: 64,
        group: &["sum", "max", "logit", "mean", "union"],
        rank: &["unit", "entry"],
        tail: &["ignore", "estimate"],
        estimate: 1.0,
        correct: &["no", "yes"],
        every: 1,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "pages",
    summary: "reads the pages whose mean keys weigh most",
    source: "InfLLM, arXiv:2402.04617; LongHeads, arXiv:2402.10685; NSA, arXiv:2502.11089; RetroInfer's tail, arXiv:2505.02922",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule { outliers: args.count("outliers")?, ..ReadRule::from_args(args)? };
    let store = encoding(args, "store")?;
    let summary = Pages::means(args.count("page")?, store);
    let summary = if args.word("bounds")? == "yes" { summary.and_bounds() } else { summary };
    let summary = if rule.outliers > 0 { summary.and_strays() } else { summary };
    let retrieval = Retrieval { name: ENTRY.name, summary: Arc::new(summary), rule };
    if rule.goal.is_some_and(|g| g.certified) && retrieval.table(Role::Bound).is_none() {
        return Err(args.error("goal", "bound", "estimate, or bounds=yes beside it"));
    }
    Ok(Arc::new(retrieval))
}
