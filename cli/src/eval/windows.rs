//! Windows: the protocol in which llama.cpp measures its KV types (`llama-perplexity --kl-divergence`).
//!
//! The text is cut into windows; each is fed to an empty cache, and the predictions of its second half are compared with
//! those of the full f32 cache. As there, a window's first token gives way to the beginning-of-sequence token if the
//! model's file asks for one, and the last token predicts nothing that could be compared. The first half is the prompt:
//! a recipe that evicts does so between the halves, a recipe that only changes how entries are stored reads the whole
//! window as stored.
//!
//! *Helps* to stand beside llama.cpp's numbers on the same model and text. *Hurts* when chunks are large: llama.cpp packs
//! the tokens of a batch before it attends to them, this cache after the step. The rows nearest to a query matter most, so
//! recipes that pack are fed token by token unless told otherwise; steps of 64 show a third of the KL of 4-bit rows.

use super::compare::{Distance, Reference};
use super::{Job, Measured, Row};
use crate::args::Variant;
use crate::error::{Error, Result};
use crate::host;
use kvsieve::geometry::ModelShape;
use kvsieve::recipe::Recipe;
use std::time::Instant;

/// Sizes of the protocol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    /// How many windows, from the start of the text.
    pub(super) windows: usize,
    /// Tokens of one.
    pub(super) tokens: usize,
    /// Tokens of a step, if not as suits the recipe.
    pub(super) chunk: Option<usize>,
}

impl Protocol {
    /// The token whose prediction is the first that counts; those before it are the prompt.
    fn first(self) -> usize {
        self.tokens / 2
    }

    /// Tokens of a step under a recipe.
    fn chunk(self, variant: &Variant) -> Result<usize> {
        let recipe: Recipe = variant.recipe.parse()?;
        Ok(self.chunk.unwrap_or(if recipe.precision.packs() { 1 } else { host::CHUNK }))
    }

    /// Predictions scored in all.
    pub(super) fn predictions(self) -> usize {
        self.windows * (self.tokens - 1 - self.first())
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    distance: Distance,
    cost: Measured,
    seconds: f64,
}

pub(super) fn run(job: &Job<'_>, protocol: Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let Protocol { windows, tokens, .. } = protocol;
    if windows == 0 || tokens < 4 {
        return Err(Error::usage(
            "nothing to score",
            "give --windows 1 or more of --window-tokens 4 or more",
        ));
    }
    let bos = job.host.leading()?;
    let tokenized: Vec<u32> = bos.iter().chain(text).copied().collect();
    if tokenized.len() < windows * tokens {
        let what = format!("the text has {} tokens, the windows need {}", tokenized.len(), windows * tokens);
        return Err(Error::usage(what, "give a longer --text, or lower --windows or --window-tokens"));
    }
    // The reference is exact in chunks of any size, and fastest in large ones.
    let whole = job.in_chunks(usize::MAX);
    let bar = host::bar(windows * (job.variants.len() + 1), "windows");
    let mut sums = vec![Sums::default(); job.variants.len()];
    for window in tokenized.chunks_exact(tokens).take(windows) {
        let mut window = window.to_vec();
        window[..bos.len()].copy_from_slice(&bos);
        let (prompt, fed) = window.split_at(protocol.first());
        let mut full = Reference::of(&fed[1..]);
        let (mut cache, sequence, _) = whole.prefilled(&Variant::full(), prompt)?;
        whole.feed(&mut cache, sequence, fed, &mut |_, logits| full.record(logits))?;
        bar.inc(1);
        for (variant, sums) in job.variants.iter().zip(&mut sums) {
            let began = Instant::now();
            let job = job.in_chunks(protocol.chunk(variant)?);
            let (mut cache, sequence, _) = job.prefilled(variant, prompt)?;
            job.feed(&mut cache, sequence, fed, &mut |row, logits| sums.distance.add(&full, row, logits))?;
            sums.cost.add(Measured::of(&cache, sequence)?);
            sums.seconds += began.elapsed().as_secs_f64();
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let elements = (windows * tokens * elements_per_token(&job.host.model.shape()?)) as f64;
    let row = |(variant, sums): (&Variant, &Sums)| Row {
        bits_per_element: Some(8.0 * sums.cost.bytes_resident as f64 / elements),
        seconds: Some(sums.seconds),
        ..sums.distance.fill(Row::new("windows", variant, protocol.first(), sums.cost))
    };
    Ok(job.variants.iter().zip(&sums).map(row).collect())
}

/// Elements of K and V that a full cache stores per token.
fn elements_per_token(shape: &ModelShape) -> usize {
    let own = shape.iter().filter(|layer| layer.shared_with.is_none());
    own.map(|layer| layer.kv_heads * (layer.d_k + layer.d_v)).sum()
}
