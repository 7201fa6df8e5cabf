//! Guard: exact and packed storage side by side after a prompt, layer by layer.
//!
//! *Helps* to see which layers and heads of a model a format is too coarse for, before its predictions are looked at.
//! *Hurts* nothing but time: outputs are exact while it watches, so errors do not add up from layer to layer.

use super::Job;
use crate::args::Variant;
use crate::error::{Error, Result};
use crate::table::{Table, number};
use kvsieve::cache::{Guard, HeadReport};
use serde::Serialize;

/// Sizes of the protocol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// Tokens watched after it.
    pub(super) watched: usize,
    /// Heads whose outputs err more get more bits.
    pub(super) threshold: Option<f64>,
}

/// What packing did to one KV head.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    task: &'static str,
    recipe: String,
    layer: usize,
    head: usize,
    k: String,
    v: String,
    key_error: f64,
    value_error: f64,
    output_error: f64,
    upgraded: Option<String>,
}

pub(super) fn run(job: &Job<'_>, protocol: Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let Protocol { prompt, watched, threshold } = protocol;
    let need = prompt + watched;
    if text.len() < need {
        let what = format!("the text has {} tokens, prompt and watched tokens need {need}", text.len());
        return Err(Error::usage(what, "give a longer --text, or lower --prompt-tokens or --score-tokens"));
    }
    let tokens: Vec<u32> = job.host.leading()?.iter().chain(text).copied().take(need).collect();
    let mut rows = Vec::new();
    for variant in job.variants {
        let mut cache = job.place.cache(job.host.model.shape()?, &variant.recipe[..], variant.budget)?;
        let sequence = cache.create_sequence();
        cache.guard(sequence, Guard { tokens: watched, threshold })?;
        let (prompt, fed) = tokens.split_at(prompt);
        job.host.model.prefill(&mut cache, sequence, prompt, job.chunk, &mut |_| ())?;
        job.feed(&mut cache, sequence, fed, &mut |_, _| ())?;
        cache.end_guard(sequence)?;
        let report = cache.guard_report(sequence)?;
        rows.extend(report.iter().flat_map(|report| &report.heads).map(|head| row(variant, head)));
    }
    Ok(rows)
}

fn row(variant: &Variant, head: &HeadReport) -> Row {
    Row {
        task: "guard",
        recipe: variant.recipe.clone(),
        layer: head.layer,
        head: head.head,
        k: head.k.to_string(),
        v: head.v.to_string(),
        key_error: head.key_error,
        value_error: head.value_error,
        output_error: head.output_error,
        upgraded: head.upgraded.map(|(k, v)| format!("{k}/{v}")),
    }
}

/// A line per layer: the mean over its heads, the worst output, what was upgraded.
pub(super) fn print(rows: &[Row]) {
    let heading =
        ["recipe", "layer", "stored", "key error", "value error", "output error", "worst head", "upgraded"];
    let mut table = Table::new(3, &heading);
    for heads in rows.chunk_by(|a, b| (&a.recipe, a.layer) == (&b.recipe, b.layer)) {
        let mean = |field: fn(&Row) -> f64| heads.iter().map(field).sum::<f64>() / heads.len() as f64;
        let mut stored: Vec<String> = heads.iter().map(|row| format!("{}/{}", row.k, row.v)).collect();
        stored.dedup();
        let upgraded: Vec<String> = heads
            .iter()
            .filter_map(|row| Some(format!("{}: {}", row.head, row.upgraded.as_ref()?)))
            .collect();
        table.row(vec![
            heads[0].recipe.clone(),
            heads[0].layer.to_string(),
            stored.join(" "),
            number(Some(mean(|row| row.key_error)), 6),
            number(Some(mean(|row| row.value_error)), 6),
            number(Some(mean(|row| row.output_error)), 4),
            number(heads.iter().map(|row| row.output_error).reduce(f64::max), 4),
            if upgraded.is_empty() { "-".to_owned() } else { upgraded.join(", ") },
        ]);
    }
    table.print();
}
