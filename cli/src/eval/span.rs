//! Span copy: a passage of the prompt is fed again after compression; can the model still continue it?
//!
//! The prompt is `P` tokens of the text from an offset. The 64 tokens that stand at depth `f` of it are then fed as
//! they are, and the predictions of the last 48 are scored: mean NLL and top-1 accuracy. *Helps* because a 135M model
//! solves it with its full cache, and it needs exactly what eviction may have dropped. *Hurts* policies that compress
//! before they can know what will be asked, which is the point; with `--asked` the first 16 of the 64 are fed before the prompt is
//! compressed, so that they do.

use super::{Job, Measured, Row};
use crate::args::Variant;
use crate::error::{Error, Result};
use crate::host;
use crate::metrics::{Mean, argmax, log_softmax};
use kvsieve_candle::Logits;

/// Tokens fed again, and how many of the last are scored.
const SPAN: usize = 64;
const SCORED: usize = 48;

/// Where to look.
#[derive(Clone, Debug)]
pub(super) struct Protocol {
    pub(super) prompts: Vec<usize>,
    /// Offsets into the text, in tokens.
    pub(super) offsets: Vec<usize>,
    pub(super) depths: Vec<f64>,
    /// Whether the tokens that are fed again and not scored belong to the prompt.
    pub(super) asked: bool,
}

pub(super) fn run(job: &Job<'_>, protocol: &Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let bos = job.host.bos();
    for &prompt in &protocol.prompts {
        let last = protocol.offsets.iter().max().copied().unwrap_or(0);
        if prompt < SPAN || text.len() < last + prompt + SPAN {
            let what =
                format!("a prompt of {prompt} tokens at offset {last} of a text of {} tokens", text.len());
            return Err(Error::usage(
                what,
                format!("prompts need {SPAN} tokens or more, and text up to their end and {SPAN} beyond"),
            ));
        }
    }
    let (variants, depths) = (with_full(job.variants), &protocol.depths);
    let bar = host::bar(protocol.prompts.len() * protocol.offsets.len() * variants.len(), "span copy");
    let mut rows = Vec::new();
    for &prompt in &protocol.prompts {
        for &offset in &protocol.offsets {
            let tokens: Vec<u32> = bos.iter().chain(&text[offset..offset + prompt]).copied().collect();
            for variant in &variants {
                let (mut cache, sequence, mut measured) = match protocol.asked {
                    false => job.prefilled(variant, &tokens)?,
                    // Measured when the question was fed.
                    true => {
                        let (cache, sequence) = job.opened(variant, &tokens)?;
                        (cache, sequence, Measured::default())
                    }
                };
                // `None` is the passage that the prompt does not contain: what follows it.
                for depth in depths.iter().copied().map(Some).chain([None]) {
                    let start =
                        offset + depth.map_or(prompt, |depth| ((prompt - SPAN) as f64 * depth) as usize);
                    let span = &text[start..start + SPAN];
                    let fork = cache.fork(sequence)?;
                    let (mut nll, mut top) = (Mean::default(), Mean::default());
                    let question = if protocol.asked { SPAN - SCORED } else { 0 };
                    let mut score = |row: usize, logits: &[f32]| {
                        if row + 1 < SPAN - SCORED {
                            return;
                        }
                        let target = span[row + 1] as usize;
                        top.add(f64::from(u8::from(argmax(logits) == target)));
                        let mut logits = logits.to_vec();
                        log_softmax(&mut logits);
                        nll.add(-f64::from(logits[target]));
                    };
                    if protocol.asked {
                        // Its last row predicts the first token that is scored.
                        let model = &job.host.model;
                        let forward = model.forward(&mut cache, fork, &span[..question], Logits::Last)?;
                        score(question - 1, &forward.last_row()?);
                        let asked: Vec<u32> = tokens.iter().chain(&span[..question]).copied().collect();
                        model.end_prompt(&mut cache, fork, &asked)?;
                        measured = Measured::of(&cache, fork)?;
                    }
                    job.feed(&mut cache, fork, &span[question..SPAN - 1], &mut |row, logits| {
                        score(question + row, logits);
                    })?;
                    measured.read(&cache, fork)?;
                    cache.drop_sequence(fork)?;
                    rows.push(Row {
                        offset: Some(offset),
                        depth,
                        nll: nll.get(),
                        accuracy: top.get(),
                        ..Row::new(
                            if depth.is_some() { "span-copy" } else { "fresh" },
                            variant,
                            prompt,
                            measured,
                        )
                    });
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// The full cache first: the other rows mean nothing without it.
pub(super) fn with_full(variants: &[Variant]) -> Vec<Variant> {
    let others = variants.iter().filter(|v| v.recipe != "full").cloned();
    [Variant::full()].into_iter().chain(others).collect()
}
