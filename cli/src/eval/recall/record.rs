//! Recording: Q, K and V of some layers on their way from the model into its full cache.
//!
//! *Helps* because the model runs once, whatever is then tried on what it did. *Hurts* memory: four bytes for every
//! element of the recorded layers, 150 MB for five layers of SmolLM2 and 8,000 tokens.

use crate::error::Result;
use crate::eval::Job;
use crate::host;
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve_candle::adapter::Fused;
use kvsieve_candle::{Attend, Logits, Tensor};

/// One recorded layer: `[heads, n, dim]` each, `q` and `k` rotated.
#[derive(Debug)]
pub(super) struct Layer {
    /// Its index in the model.
    pub(super) layer: usize,
    pub(super) shape: LayerShape,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// What the model did with its full cache.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) layers: Vec<Layer>,
    /// Tokens of the prompt; the others are decode steps.
    pub(super) prompt: usize,
    /// All of them.
    pub(super) tokens: usize,
}

impl Recording {
    /// Runs the model over `tokens` with a full cache. Exact attention does not depend on how they are cut into steps.
    pub(super) fn of(job: &Job<'_>, layers: &[usize], tokens: &[u32], prompt: usize) -> Result<Self> {
        let model = &job.host.model;
        let shape = model.shape()?;
        let layers =
            layers.iter().map(|&layer| Layer::new(layer, shape.layer(layer), tokens.len())).collect();
        let mut recording = Self { layers, prompt, tokens: tokens.len() };
        let mut cache = job.place.cache(shape, "full", None)?;
        let sequence = cache.create_sequence();
        let mut at = 0;
        for tokens in tokens.chunks(job.chunk.min(host::CHUNK)) {
            let mut step = cache.begin(sequence, tokens.len())?;
            let mut recorder = Recorder { inner: Fused::new(&mut step), recording: &mut recording, at };
            model.forward_with(&mut recorder, tokens, at as i32, Logits::None)?;
            step.commit(tokens.len())?;
            at += tokens.len();
        }
        Ok(recording)
    }

    /// Decode steps.
    pub(super) fn steps(&self) -> usize {
        self.tokens - self.prompt
    }
}

impl Layer {
    fn new(layer: usize, shape: &LayerShape, tokens: usize) -> Self {
        let rows = |heads: usize, dim: usize| vec![0.0; heads * tokens * dim];
        Self {
            layer,
            q: rows(shape.query_heads, shape.d_k),
            k: rows(shape.kv_heads, shape.d_k),
            v: rows(shape.kv_heads, shape.d_v),
            shape: shape.clone(),
        }
    }
}

/// Notes what passes, and answers as the cache does.
struct Recorder<'a, 'cache> {
    inner: Fused<'a, 'cache>,
    recording: &'a mut Recording,
    /// Tokens before this step.
    at: usize,
}

impl Attend for Recorder<'_, '_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> kvsieve_candle::Result<Tensor> {
        if let Some(kept) = self.recording.layers.iter_mut().find(|kept| kept.layer == layer) {
            for (tensor, rows) in [(q, &mut kept.q), (k, &mut kept.k), (v, &mut kept.v)] {
                note(tensor, rows, (self.recording.tokens, self.at))?;
            }
        }
        self.inner.attend(layer, q, k, v)
    }
}

/// Copies a `(tokens, heads, dim)` tensor into `[heads, n, dim]`, from token `at` on.
fn note(tensor: &Tensor, rows: &mut [f32], (n, at): (usize, usize)) -> kvsieve_candle::Result<()> {
    let (_, heads, dim) = tensor.dims3()?;
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    for (token, values) in values.chunks_exact(heads * dim).enumerate() {
        for (head, row) in values.chunks_exact(dim).enumerate() {
            rows[(head * n + at + token) * dim..][..dim].copy_from_slice(row);
        }
    }
    Ok(())
}

/// The model's shape for replaying recorded layers alone: every layer keeps its index, so that rules about first, last
/// and neighbouring layers mean what they say, and those that were not recorded read another's cache and store nothing.
/// `recorded` ascends from 0.
pub(super) fn partial(shape: &ModelShape, recorded: &[usize]) -> Result<ModelShape> {
    let mut owner = 0;
    let layers = shape.iter().enumerate().map(|(index, layer)| {
        if recorded.contains(&index) {
            owner = index;
            return layer.clone();
        }
        LayerShape { shared_with: Some(owner), ..layer.clone() }
    });
    Ok(ModelShape::new(layers.collect())?)
}
