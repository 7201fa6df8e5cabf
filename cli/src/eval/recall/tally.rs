//! What is counted of a recipe over steps, heads, layers and samples, and the line it becomes.
//!
//! *Helps* by naming the worst heads beside the mean, which hides them. *Hurts* where layers differ by orders of
//! magnitude: `--json` has them apart.

use super::replay::Outcome;
use crate::args::Variant;
use crate::eval::figure::Point;
use crate::metrics::{Mean, percentile};
use crate::table::{Table, number, percent};
use serde::Serialize;

/// Below this share of the mass, how far an estimate of it is off is noise over noise.
const LEAST_RATIO: f64 = 1e-3;

/// Sums of one recipe, budget and prompt length.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// `[scored layers, Hq]`.
    heads: Vec<HeadSums>,
    query_heads: usize,
    /// Shares of what there is: of entries read in a step, of bytes in f16 that were read, and that the index holds.
    pub(super) entries: Mean,
    pub(super) bytes: Mean,
    pub(super) index: Mean,
    missing: Mean,
    estimated: Mean,
    /// Whether any of these is of a step that left something out.
    estimates: bool,
    ratio: Mean,
    certified: usize,
    violations: usize,
}

/// Means over the steps of one query head of a layer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeadSums {
    pub(super) recall: Mean,
    pub(super) error: Mean,
    /// Of attention over the entries read alone, where the rest is estimated.
    pub(super) without_tail: Mean,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub(in crate::eval) struct Row {
    task: &'static str,
    recipe: String,
    budget: String,
    prompt_tokens: usize,
    /// Length the prompt was tiled to.
    tile: Option<usize>,
    /// Shares of the entries there are, and of their bytes in f16.
    entries_read: Option<f64>,
    bytes_read: Option<f64>,
    bytes_index: Option<f64>,
    mass_recall: Option<f64>,
    mass_recall_p5: Option<f64>,
    output_error: Option<f64>,
    output_error_p95: Option<f64>,
    /// Of attention over the entries read alone; `None` where nothing is estimated.
    output_error_without_tail: Option<f64>,
    output_error_without_tail_p95: Option<f64>,
    missing: Option<f64>,
    missing_estimated: Option<f64>,
    /// Estimate over truth, mean over steps and layers that miss a thousandth or more.
    missing_ratio: Option<f64>,
    /// Steps of layers with a certificate, and those in which more was missing than it says.
    certificates: usize,
    violations: usize,
    layers: Vec<LayerRow>,
}

/// The same of one layer.
#[derive(Clone, Debug, Serialize)]
struct LayerRow {
    layer: usize,
    mass_recall: Option<f64>,
    output_error: Option<f64>,
    output_error_without_tail: Option<f64>,
}

impl Tally {
    pub(super) fn new(layers: usize, query_heads: usize) -> Self {
        Self {
            heads: vec![HeadSums::default(); layers * query_heads],
            query_heads,
            entries: Mean::default(),
            bytes: Mean::default(),
            index: Mean::default(),
            missing: Mean::default(),
            estimated: Mean::default(),
            estimates: false,
            ratio: Mean::default(),
            certified: 0,
            violations: 0,
        }
    }

    /// A query head of a scored layer.
    pub(super) fn head(&mut self, layer: usize, head: usize) -> &mut HeadSums {
        &mut self.heads[layer * self.query_heads + head]
    }

    /// What a step of a layer missed, on average over its query heads and at most, beside what the index says of it.
    pub(super) fn missing(&mut self, mean: f64, most: f64, outcome: Outcome) {
        self.missing.add(mean);
        if let Some(estimate) = outcome.missing {
            self.estimated.add(estimate);
            self.estimates |= !outcome.whole;
            if mean >= LEAST_RATIO {
                self.ratio.add(estimate / mean);
            }
        }
        if let Some(at_most) = outcome.at_most.filter(|_| !outcome.whole) {
            self.certified += 1;
            self.violations += usize::from(most > at_most);
        }
    }

    pub(super) fn row(
        &self,
        variant: &Variant,
        (prompt_tokens, tile): (usize, Option<usize>),
        layers: &[usize],
    ) -> Row {
        let mean = |heads: &[HeadSums], of: fn(&HeadSums) -> Mean| {
            let mut mean = Mean::default();
            heads.iter().filter_map(|head| of(head).get()).for_each(|x| mean.add(x));
            mean.get()
        };
        let all = |of| mean(&self.heads, of);
        let at = |share, of: fn(&HeadSums) -> Mean| {
            percentile(self.heads.iter().filter_map(|head| of(head).get()), share)
        };
        let layers = layers.iter().zip(self.heads.chunks_exact(self.query_heads));
        Row {
            task: "recall",
            recipe: variant.recipe.clone(),
            budget: variant.budget_text(),
            prompt_tokens,
            tile,
            entries_read: self.entries.get(),
            bytes_read: self.bytes.get(),
            bytes_index: self.index.get(),
            mass_recall: all(|h| h.recall),
            mass_recall_p5: at(0.05, |h| h.recall),
            output_error: all(|h| h.error),
            output_error_p95: at(0.95, |h| h.error),
            output_error_without_tail: all(|h| h.without_tail),
            output_error_without_tail_p95: at(0.95, |h| h.without_tail),
            missing: self.missing.get(),
            missing_estimated: self.estimated.get().filter(|_| self.estimates),
            missing_ratio: self.ratio.get(),
            certificates: self.certified,
            violations: self.violations,
            layers: layers
                .map(|(&layer, heads)| LayerRow {
                    layer,
                    mass_recall: mean(heads, |h| h.recall),
                    output_error: mean(heads, |h| h.error),
                    output_error_without_tail: mean(heads, |h| h.without_tail),
                })
                .collect(),
        }
    }
}

/// Bytes read in percent and output error. Lines of several prompt lengths are told apart.
pub(in crate::eval) fn points(rows: &[Row]) -> impl Iterator<Item = Point> {
    let several = rows.iter().any(|row| row.prompt_tokens != rows[0].prompt_tokens);
    let read = rows.iter().filter(|row| row.recipe != "full");
    read.filter_map(move |row| {
        let after = if several { format!(" after {}", row.prompt_tokens) } else { String::new() };
        Some((format!("{}{after}", row.recipe), 100.0 * row.bytes_read?, row.output_error?))
    })
}

pub(in crate::eval) fn print(rows: &[Row]) {
    let heading = [
        "recipe", "budget", "prompt", "entries", "bytes", "index", "recall", "5th pct", "error", "95th pct",
        "no tail", "95th pct", "missing", "ratio", "broken",
    ];
    let mut table = Table::new(2, &heading);
    for row in rows {
        let certified = (row.certificates > 0).then(|| format!("{} of {}", row.violations, row.certificates));
        table.row(vec![
            row.recipe.clone(),
            row.budget.clone(),
            row.prompt_tokens.to_string(),
            percent(row.entries_read),
            percent(row.bytes_read),
            percent(row.bytes_index),
            number(row.mass_recall, 4),
            number(row.mass_recall_p5, 4),
            number(row.output_error, 4),
            number(row.output_error_p95, 4),
            number(row.output_error_without_tail, 4),
            number(row.output_error_without_tail_p95, 4),
            percent(row.missing),
            number(row.missing_ratio, 2),
            certified.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.print();
}
