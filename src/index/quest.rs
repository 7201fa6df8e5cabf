//! Quest: the largest logit that any key of a page can have, from the page's minimum and maximum in each dimension.
//!
//! *Helps* where a few keys stick out of their pages, which means would hide, and where a bound is wanted that never
//! lies. *Hurts* by twice the memory of means, and where rotary angles turn within a page: there minimum and maximum
//! span the whole circle and the bound says little.

use super::options::{COMMON, Defaults, arguments, encoding};
use super::{Pages, ReadRule, Retrieval};
use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

const ARGS: [Arg; 2 + COMMON] = arguments(
    [
        Arg::count("page", 16, 1, 1024, "entries of a page"),
        Arg::word(
            "store",
            &["f16", "f32", "int8", "int4"],
            "how bounds are stored; they are rounded outwards",
        ),
    ],
    Defaults {
        sinks: 0,
        recent: 16,
        group: &["logit", "max", "sum", "mean", "union"],
        rank: &["unit", "entry"],
        tail: &["ignore", "estimate"],
        estimate: 1.0,
        correct: &["no", "yes"],
        every: 1,
        dense: 2,
    },
);

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "quest",
    summary: "reads the pages whose minimum and maximum keys promise the largest logits",
    source: "Tang et al. 2024, arXiv:2406.10774",
    needs: "nothing",
    args: &ARGS,
    build: Build::Index { build },
};

fn build(args: &Args) -> Result<Arc<Retrieval>, RecipeError> {
    let rule = ReadRule::from_args(args)?;
    let summary = Pages::bounds(args.count("page")?, encoding(args, "store")?);
    let summary = if rule.tail == super::Tail::Estimate { summary.and_means() } else { summary };
    Ok(Arc::new(Retrieval { name: ENTRY.name, summary: Arc::new(summary), rule }))
}
