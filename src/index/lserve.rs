//! LServe's decode selection: bounds of small logical pages, chosen by larger physical ones, kept for some steps.
//!
//! *Helps* where memory is read best in larger runs than bounds are tight for, and by choosing once for several
//! steps. *Hurts* for up to `every − 1` steps after the text turns to something else.

use super::options::{COMMON, Defaults, arguments, encoding};
use super::{Pages, ReadRule, Retrieval, Tail};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 3 + COMMON] = arguments(
    [
        Arg::count("page", 64, 1, 4096, "entries of a physical page, read whole"),
        Arg::count("logical", 16, 1, 1024, "entries of a logical page, which has bounds"),
        Arg::word(
            "store",
            &["f16", "f32", "int8", "int4"],
            "how bounds are stored; they are rounded outwards",
        ),
    ],
    Defaults {
        sinks: 0,
        recent: 64,
        group: &["logit", "max", "sum", "mean", "union"],
        rank: &["unit", "entry"],
        tail: &["ignore", "estimate"],
        estimate: 1.0,
        correct: &["no", "yes"],
        every: 4,
        dense: 0,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "lserve",
    summary: "reads pages by the best bound of their logical pages, and keeps a choice for some steps",
    source: "Yang et al. 2025, arXiv:2502.14866",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let (page, logical) = (args.count("page")?, args.count("logical")?);
    if !page.is_multiple_of(logical) {
        return Err(args.error("page", page, format!("a multiple of logical={logical}")));
    }
    let rule = ReadRule { fold: page / logical, ..ReadRule::from_args(args)? };
    let summary = Pages::bounds(logical, encoding(args, "store")?).by(page);
    let summary = if rule.tail == Tail::Estimate { summary.and_means() } else { summary };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(summary), rule }))
}
