//! Running text: after a compressed prompt, how far are the predictions of the following tokens from the full cache's?
//!
//! `S` windows at equal strides through the text; of each, `P` tokens are the prompt and the next `C` are fed as they
//! are (teacher forcing). KL, same-top-1 and NLL are means over the `S · C` predictions. *Helps* to compare recipes on
//! equal terms. *Hurts* as the only number: running text rarely needs what a policy dropped; see span copy.

use super::compare::{Distance, Reference};
use super::{Job, Measured, Row, place};
use crate::args::Variant;
use crate::error::{Error, Result};
use crate::host;

/// Sizes of the protocol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    pub(super) prompt: usize,
    pub(super) scored: usize,
    pub(super) samples: usize,
}

pub(super) fn run(job: &Job<'_>, protocol: Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let Protocol { prompt, scored, samples } = protocol;
    let bos = job.host.bos();
    // The last fed token predicts one more, which must be there to be compared.
    let window = prompt - bos.len().min(prompt) + scored + 1;
    if samples == 0 || scored == 0 || prompt <= bos.len() {
        return Err(Error::usage(
            "nothing to score",
            "give --samples, --score-tokens and --prompt-tokens above 1",
        ));
    }
    let bar = host::bar(samples * (job.variants.len() + 1), "running text");
    let mut sums = vec![(Distance::default(), Measured::default()); job.variants.len()];
    for sample in 0..samples {
        let tokens: Vec<u32> = bos.iter().chain(place(text, window, (sample, samples))?).copied().collect();
        let (fed, targets) = (&tokens[prompt..prompt + scored], &tokens[prompt + 1..]);
        let mut full = Reference::of(targets);
        let (mut cache, sequence, _) = job.prefilled(&Variant::full(), &tokens[..prompt])?;
        job.feed(&mut cache, sequence, fed, &mut |_, logits| full.record(logits))?;
        bar.inc(1);
        for (variant, (distance, cost)) in job.variants.iter().zip(&mut sums) {
            let (mut cache, sequence, mut measured) = job.prefilled(variant, &tokens[..prompt])?;
            job.feed(&mut cache, sequence, fed, &mut |row, logits| distance.add(&full, row, logits))?;
            measured.read(&cache, sequence)?;
            cost.add(measured);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let rows = job.variants.iter().zip(&sums);
    Ok(rows
        .map(|(variant, (distance, cost))| distance.fill(Row::new("text", variant, prompt, *cost)))
        .collect())
}
