//! The passes over the samples: what every layer sees of them, and what its queries look at when they are repeated.

use super::convolve::Reading;
use super::measure::{Layer, LayerSums, Sample};
use super::train::Tokens;
use super::{Args, PartName};
use crate::error::{Error, Result};
use crate::host::{self, Host};
use candle_core::Tensor;
use kvsieve::KvCache;
use kvsieve_candle::adapter::Fused;
use kvsieve_candle::{Attend, Logits, Model};

/// Everything that parts are made of.
pub(super) struct Recording {
    /// Per layer, what was measured over all samples.
    pub(super) sums: Vec<LayerSums>,
    /// Per layer, what networks learn from.
    pub(super) layers: Vec<Examples>,
    /// Per layer, what convolutions learn from, a reading per sample.
    pub(super) readings: Vec<Vec<Reading>>,
    /// How many samples there are, and how long they are.
    pub(super) tokens: Tokens,
}

/// Inputs and targets of one layer, a row per token, sample after sample.
#[derive(Default)]
pub(super) struct Examples {
    /// Hidden states, `[n, D]`.
    pub(super) hidden: Vec<f32>,
    /// Queries and keys before rotation and values, `[n, (Hq + H) d_k + H d_v]`.
    pub(super) rows: Vec<f32>,
    /// The highest weight that the repetition pays, `[n, H]`.
    pub(super) scores: Vec<f32>,
    /// The highest logit, `[n, H]`.
    pub(super) logits: Vec<f32>,
}

impl Recording {
    pub(super) fn of(
        host: &Host,
        text: &[u32],
        args: &Args,
        wants: impl Fn(PartName) -> bool,
    ) -> Result<Self> {
        let (samples, tokens) = (args.samples, args.tokens);
        let Some(beyond) = text.len().checked_sub(tokens).filter(|beyond| *beyond >= samples) else {
            let what =
                format!("the text has {} tokens, {samples} samples of {tokens} were asked for", text.len());
            return Err(Error::usage(what, "give a longer --text, or lower --samples or --tokens"));
        };
        let shape = host.model.shape()?;
        let mut recording = Self {
            sums: shape.iter().map(LayerSums::new).collect(),
            layers: shape.iter().map(|_| Examples::default()).collect(),
            readings: shape.iter().map(|_| Vec::new()).collect(),
            tokens: Tokens { samples, each: tokens },
        };
        let bar = host::bar(samples, "reading samples");
        for sample in 0..samples {
            let start = beyond * sample / (samples - 1);
            let once = &text[start..start + tokens];
            let fed: Vec<u32> = host.bos().iter().chain(once).chain(once).copied().collect();
            let first = fed.len() - 2 * tokens;
            let mut cache = KvCache::builder(shape.clone()).build()?;
            let sequence = cache.create_sequence();
            let mut step = cache.begin(sequence, fed.len())?;
            let mut hook = Hook {
                inner: Fused::new(&mut step),
                model: &host.model,
                recording: &mut recording,
                sample: Sample { first, tokens },
                hidden: wants(PartName::Kvzap),
                rows: wants(PartName::Locret),
                readings: wants(PartName::Lococo),
            };
            host.model.forward_with(&mut hook, &fed, 0, Logits::None)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(recording)
    }
}

/// Looks at Q, K, V and hidden states on their way.
struct Hook<'a, 'cache> {
    inner: Fused<'a, 'cache>,
    model: &'a Model,
    recording: &'a mut Recording,
    sample: Sample,
    hidden: bool,
    rows: bool,
    readings: bool,
}

impl Attend for Hook<'_, '_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> kvsieve_candle::Result<Tensor> {
        let out = self.inner.attend(layer, q, k, v)?;
        let shape = self.model.shape()?;
        let of = Layer::new(shape.layer(layer), [q, k, v])?;
        let project = |rows: Vec<f32>, width: usize| -> kvsieve_candle::Result<Vec<f32>> {
            let rows = Tensor::from_vec(rows.clone(), (rows.len() / width, width), q.device())?;
            Ok(self.model.project(layer, &rows)?.flatten_all()?.to_vec1()?)
        };
        let (scores, logits) = of.measure(self.sample, &mut self.recording.sums[layer], project)?;
        let examples = &mut self.recording.layers[layer];
        examples.scores.extend(scores);
        examples.logits.extend(logits);
        if self.rows {
            of.rows_before_rotation(self.sample, &mut examples.rows);
        }
        if self.readings {
            self.recording.readings[layer].push(of.reading(self.sample));
        }
        Ok(out)
    }

    fn hidden(&mut self, layer: usize, states: &Tensor) -> kvsieve_candle::Result<()> {
        if self.hidden {
            let once = states.narrow(0, self.sample.first, self.sample.tokens)?;
            let once = once.flatten_all()?.to_vec1::<f32>()?;
            self.recording.layers[layer].hidden.extend(once);
        }
        Ok(())
    }
}
