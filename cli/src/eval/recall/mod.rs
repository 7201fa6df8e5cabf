//! Recall: what a recipe's cache reads, held against exact attention over everything, on queries of a real model.
//!
//! At `S` places of the text the model runs once over `P + C` tokens with its full cache, and Q, K and V of some layers
//! are recorded. Every recipe and budget is then given the prompt's keys and values and decodes the `C` steps with the
//! recorded queries, every layer by itself. *Helps* to judge an index by what it does: the softmax mass on what it
//! reads, the error of its outputs with and without its estimate of the rest, and whether what it says of the rest is
//! true. Hundreds of budgets cost one run of the model. *Hurts* as the only number: no layer sees the error of another,
//! and a head whose output the model ignores counts like any other; see `text` and `span-copy`.

mod record;
mod replay;
mod tally;

use super::{Job, place};
use crate::error::{Error, Result};
use crate::host;
use kvsieve::recipe::{PositionMode, Recipe};
use record::Recording;
use replay::Scene;
use tally::Tally;
pub(super) use tally::{Row, points, print};

/// Sizes of the protocol.
#[derive(Clone, Debug)]
pub(super) struct Protocol {
    pub(super) prompts: Vec<usize>,
    pub(super) scored: usize,
    pub(super) samples: usize,
    /// Layers, where not the first three, the middle and the last.
    pub(super) layers: Option<Vec<usize>>,
    /// Length that prompts are tiled to.
    pub(super) tile: Option<usize>,
}

impl Protocol {
    /// Refuses what makes no sense for any model.
    pub(super) fn check(&self) -> Result<()> {
        if self.samples == 0 || self.scored == 0 || self.prompts.iter().any(|&prompt| prompt < 2) {
            return Err(Error::usage(
                "nothing to score",
                "give --samples, --score-tokens and --prompt-tokens above 1",
            ));
        }
        let (Some(tile), Some(&most)) = (self.tile, self.prompts.iter().max()) else { return Ok(()) };
        if tile < most {
            return Err(Error::usage(
                format!("--tile {tile} is shorter than the prompt of {most} tokens"),
                "tiling repeats a prompt: give --tile more tokens than --prompt-tokens",
            ));
        }
        if let Some(prompt) = self.prompts.iter().find(|prompt| **prompt <= replay::LEAST) {
            let (what, least) = (format!("a prompt of {prompt} tokens has no body to repeat"), replay::LEAST);
            return Err(Error::usage(
                what,
                format!("give --prompt-tokens above {least}, or leave out --tile"),
            ));
        }
        Ok(())
    }

    /// The layers to score, ascending.
    fn layers(&self, layers: usize) -> Result<Vec<usize>> {
        let mut chosen = self.layers.clone().unwrap_or_else(|| {
            let default = [0, 1, 2, layers / 2, layers.saturating_sub(1)];
            default.into_iter().filter(|&layer| layer < layers).collect()
        });
        chosen.sort_unstable();
        chosen.dedup();
        match chosen.iter().find(|&&layer| layer >= layers) {
            Some(layer) => Err(Error::usage(
                format!("there is no layer {layer}: the model has {layers}"),
                format!("give --layers from 0 to {}", layers - 1),
            )),
            None => Ok(chosen),
        }
    }
}

/// The layers to record: those that are scored, those whose choice they share, and the first, which caches of the
/// others' storage need for an owner.
fn recorded(job: &Job<'_>, scored: &[usize]) -> Result<Vec<usize>> {
    let mut layers = scored.to_vec();
    layers.push(0);
    for variant in job.variants {
        let recipe: Recipe = variant.recipe.parse()?;
        if recipe.positions == PositionMode::Renumber {
            return Err(Error::usage(
                format!("{} numbers entries anew, and which tokens they were is lost", variant.recipe),
                "use positions=keep, or --task text",
            ));
        }
        let share = recipe.index.as_ref().map_or(1, |index| index.rule.share);
        layers.extend(scored.iter().map(|layer| layer / share * share));
    }
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

pub(super) fn run(job: &Job<'_>, protocol: &Protocol, text: &[u32]) -> Result<Vec<Row>> {
    protocol.check()?;
    let Protocol { prompts, scored: steps, samples, tile, .. } = protocol;
    let shape = job.host.model.shape()?;
    let scored = protocol.layers(shape.layers())?;
    let layers = recorded(job, &scored)?;
    let bos = job.host.bos();
    let bar = host::bar(prompts.len() * samples * (job.variants.len() + 1), "recall");
    let mut rows = Vec::new();
    for &prompt in prompts {
        let window = prompt - bos.len() + steps;
        let mut tallies = vec![Tally::new(scored.len(), shape.layer(0).query_heads); job.variants.len()];
        for sample in 0..*samples {
            let text = place(text, window, (sample, *samples))?;
            let tokens: Vec<u32> = bos.iter().chain(text).copied().collect();
            let recording = Recording::of(job, &layers, &tokens, prompt)?;
            let scene = Scene::new(&recording, &shape, &scored, *tile)?;
            bar.inc(1);
            for (variant, tally) in job.variants.iter().zip(&mut tallies) {
                scene.run(job, variant, tally)?;
                bar.inc(1);
            }
        }
        let of = |(variant, tally): (_, &Tally)| tally.row(variant, (prompt, *tile), &scored);
        rows.extend(job.variants.iter().zip(&tallies).map(of));
    }
    bar.finish_and_clear();
    Ok(rows)
}
