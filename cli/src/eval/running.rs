//! Running text: after a compressed prompt, how far are the predictions of the following tokens from the full cache's?
//!
//! `S` windows at equal strides through the text; of each, `P` tokens are the prompt and the next `C` are fed as they
//! are (teacher forcing). KL, same-top-1 and NLL are means over the `S · C` predictions. *Helps* to compare recipes on
//! equal terms. *Hurts* as the only number: running text rarely needs what a policy dropped; see span copy.

use super::{Job, Measured, Row};
use crate::error::{Error, Result};
use crate::host;
use crate::metrics::{Mean, argmax, kl, log_softmax};

/// Sizes of the protocol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    pub(super) prompt: usize,
    pub(super) scored: usize,
    pub(super) samples: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    kl: Mean,
    same: Mean,
    nll: Mean,
    full_nll: Mean,
    measured: Measured,
}

/// The full cache's predictions after one prompt.
struct Full {
    /// `[scored, vocabulary]` log-probabilities.
    rows: Vec<f32>,
    top: Vec<usize>,
    nll: Mean,
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
    if text.len() < window {
        let what = format!("the text has {} tokens, one sample needs {window}", text.len());
        return Err(Error::usage(what, "give a longer --text, or lower --prompt-tokens or --score-tokens"));
    }
    let bar = host::bar(samples * (job.variants.len() + 1), "running text");
    let mut sums = vec![Sums::default(); job.variants.len()];
    for sample in 0..samples {
        let start = (text.len() - window) * sample / samples.max(2).saturating_sub(1);
        let tokens: Vec<u32> = bos.iter().chain(&text[start..start + window]).copied().collect();
        let full = full(job, &tokens, prompt)?;
        bar.inc(1);
        for (variant, sums) in job.variants.iter().zip(&mut sums) {
            let (mut cache, sequence, measured) = job.prefilled(variant, &tokens[..prompt])?;
            let vocabulary = full.rows.len() / scored;
            job.feed(&mut cache, sequence, &tokens[prompt..prompt + scored], &mut |row, logits| {
                let mut logits = logits.to_vec();
                log_softmax(&mut logits);
                sums.kl.add(kl(&full.rows[row * vocabulary..(row + 1) * vocabulary], &logits));
                sums.same.add(f64::from(u8::from(argmax(&logits) == full.top[row])));
                sums.nll.add(-f64::from(logits[tokens[prompt + row + 1] as usize]));
            })?;
            sums.measured.add(measured);
            sums.full_nll.merge(full.nll);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let row = |(variant, sums): (&crate::args::Variant, &Sums)| Row {
        kl: sums.kl.get(),
        same_top1: sums.same.get(),
        nll: sums.nll.get(),
        nll_over_full: sums.nll.get().zip(sums.full_nll.get()).map(|(nll, full)| nll - full),
        ..Row::new("text", variant, prompt, sums.measured)
    };
    Ok(job.variants.iter().zip(&sums).map(row).collect())
}

fn full(job: &Job<'_>, tokens: &[u32], prompt: usize) -> Result<Full> {
    let (mut cache, sequence, _) = job.prefilled(&crate::args::Variant::full(), &tokens[..prompt])?;
    let mut full = Full { rows: Vec::new(), top: Vec::new(), nll: Mean::default() };
    job.feed(&mut cache, sequence, &tokens[prompt..tokens.len() - 1], &mut |row, logits| {
        let start = full.rows.len();
        full.rows.extend_from_slice(logits);
        log_softmax(&mut full.rows[start..]);
        full.top.push(argmax(&full.rows[start..]));
        full.nll.add(-f64::from(full.rows[start + tokens[prompt + row + 1] as usize]));
    })?;
    Ok(full)
}
