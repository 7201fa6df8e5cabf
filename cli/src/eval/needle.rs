//! Needles: one sentence with a number, hidden in a long text, asked for after the text was compressed.
//!
//! *Helps* with larger models, where it is a sharp yes or no. *Hurts* with small ones: SmolLM2-135M misses more than
//! half with its full cache, and the task then judges the model.

use super::{Job, Row, span::with_full};
use crate::error::{Error, Result};
use crate::host;
use crate::metrics::{Mean, argmax};
use kvsieve_candle::{ChatMl, Role, SpecialTokens};

/// Tokens an answer may have.
const ANSWER: usize = 24;

/// The hidden facts: a place and its number.
const NEEDLES: &[(&str, &str)] =
    &[("Lisbon", "71934"), ("Nairobi", "28461"), ("Quito", "50827"), ("Oslo", "93615"), ("Hanoi", "46280")];

/// Where to hide.
#[derive(Clone, Debug)]
pub(super) struct Protocol {
    pub(super) prompts: Vec<usize>,
    pub(super) depths: Vec<f64>,
}

pub(super) fn run(job: &Job<'_>, protocol: &Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let longest = protocol.prompts.iter().max().copied().unwrap_or(0);
    if text.len() < longest {
        let what = format!("the text has {} tokens, the longest prompt {longest}", text.len());
        return Err(Error::usage(what, "give a longer --text, or lower --prompt-tokens"));
    }
    let variants = with_full(job.variants);
    let bar =
        host::bar(variants.len() * protocol.prompts.len() * protocol.depths.len() * NEEDLES.len(), "needles");
    let mut rows = Vec::new();
    for variant in &variants {
        for &prompt in &protocol.prompts {
            for &depth in &protocol.depths {
                let mut found = Mean::default();
                let mut cost = super::Measured::default();
                for (place, number) in NEEDLES {
                    let (before, after) = wrap(job, place)?;
                    let needle =
                        job.host.encode(&format!("\nThe access number of {place} is {number}.\n"))?;
                    let taken = prompt.saturating_sub(before.len() + needle.len());
                    let at = (taken as f64 * depth) as usize;
                    let tokens = [&before[..], &text[..at], &needle, &text[at..taken]].concat();
                    let (mut cache, sequence, measured) = job.prefilled(variant, &tokens)?;
                    cost.add(measured);
                    let mut feed = after;
                    let mut answer = Vec::new();
                    while answer.len() < ANSWER {
                        let mut last = Vec::new();
                        job.feed(&mut cache, sequence, &feed, &mut |_, logits| last = logits.to_vec())?;
                        let token = argmax(&last) as u32;
                        if job.host.tokenizer.stops().contains(&token) {
                            break;
                        }
                        answer.push(token);
                        feed = vec![token];
                    }
                    let text = job.host.tokenizer.decode(&answer);
                    found.add(f64::from(u8::from(text.contains(number))));
                    bar.inc(1);
                }
                let row = Row::new("needle", variant, prompt, cost);
                rows.push(Row { depth: Some(depth), accuracy: found.get(), ..row });
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// What stands before the text, and the question after it.
fn wrap(job: &Job<'_>, place: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let mark = "\u{1}";
    let question = format!("What is the access number of {place}? Answer with the number.");
    let asked = match ChatMl::for_model(&job.host.tokenizer) {
        Some(chat) => chat.prompt(&[(Role::User, &format!("{mark}\n\n{question}"))]),
        None => format!("{mark}\n\nQuestion: {question}\nAnswer:"),
    };
    let (before, after) = asked.split_once(mark).unwrap_or(("", &asked));
    let encode = |text: &str| job.host.tokenizer.encode_continuation(text, SpecialTokens::Recognize);
    let mut before = encode(before)?;
    if let Some(bos) = job.host.tokenizer.bos().filter(|bos| before.first() != Some(bos)) {
        before.insert(0, bos);
    }
    Ok((before, encode(after)?))
}
