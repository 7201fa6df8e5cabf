//! A scorer from outside the crate: as an object in a cache, and by name in a recipe.
//!
//! `cargo run --example custom_policy`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use kvsieve::device::page::Side;
use kvsieve::error::{PolicyError, RecipeError};
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::kernel::row_norms::NormArgs;
use kvsieve::policy::allocate::uniform::Uniform;
use kvsieve::policy::registry::{Arg, Args, Build, Entry, Registry};
use kvsieve::policy::schedule::Schedule;
use kvsieve::policy::{LayerScores, LayerView, Scorer, Staged};
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Budget, Error, KvCache, Recipe};
use std::sync::Arc;

/// Keeps the entries whose values are largest: a row of zeros adds nothing to any output.
#[derive(Debug)]
struct ValueNorm {
    power: f32,
}

impl Scorer for ValueNorm {
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let lengths = view.lengths();
        let mut values = vec![0.0; lengths.iter().sum()];
        view.backend.row_norms(&mut NormArgs { heads: view.heads, side: Side::Value, out: &mut values })?;
        values.iter_mut().for_each(|v| *v = v.powf(self.power));
        Ok(LayerScores { lengths, values })
    }
}

/// What a recipe needs to know about it.
const VALUE_NORM: Entry = Entry {
    name: "vnorm",
    summary: "keeps the values of largest norm",
    source: "this example",
    needs: "nothing",
    args: &[Arg::real("power", 1.0, 0.1, 8.0, "exponent on the norm")],
    build: Build::Score { schedule: Schedule { prefill: true, ..Schedule::NEVER }, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(ValueNorm { power: args.real("power")? as f32 }))
}

fn main() -> Result<(), Error> {
    // As an object, with the crate's allocator and protection around it.
    let policy =
        Staged::new("vnorm", Arc::new(ValueNorm { power: 1.0 }), Arc::new(Uniform)).sinks(1).recent(2);
    println!("{}", kept(Recipe::new(Arc::new(policy)))?);

    // By name, with everything else a recipe can say.
    let registry = Registry::builtin().with(VALUE_NORM);
    println!("{}", kept(Recipe::parse_with("vnorm(power=2)+adakv+recent=2+v=f16", &registry)?)?);
    Ok(())
}

/// Fills a small cache with sixteen tokens and tells which positions stay.
fn kept(recipe: Recipe) -> Result<String, Error> {
    let (tokens, heads, dim) = (16, 2, 4);
    let mut report = format!("{recipe}:");
    let shape = ModelShape::uniform(1, LayerShape::new(heads, heads, dim))?;
    let mut cache = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(6)).build()?;
    let sequence = cache.create_sequence();

    let flat = vec![0.1; tokens * heads * dim];
    let values: Vec<f32> = (0..flat.len()).map(|i| ((i / dim * 7) % 11) as f32).collect();
    let mut out = vec![0.0; flat.len()];
    let mut step = cache.begin(sequence, tokens)?;
    step.attend(
        0,
        TensorView::token_major(&flat[..], tokens, heads, dim)?,
        TensorView::token_major(&flat[..], tokens, heads, dim)?,
        TensorView::token_major(&values[..], tokens, heads, dim)?,
        TensorViewMut::token_major(&mut out[..], tokens, heads, dim)?,
    )?;
    step.commit(tokens)?;
    cache.end_prefill(sequence)?;

    for head in 0..heads {
        let positions: Vec<i32> = cache.positions(sequence, 0, head)?.iter().map(|p| p.0).collect();
        report += &format!("\n  head {head} keeps {positions:?}");
    }
    Ok(report)
}
