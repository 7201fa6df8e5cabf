//! The whole integration with kvsieve: what an engine author copies.
//!
//! An engine needs four things from its own side: the geometry of the model ([`Model::shape`]), the position to rotate
//! new tokens at, Q, K and V of the new tokens as slices with strides, and a buffer for the output. Everything else
//! (storing, evicting, packing, attending over what is left) happens inside `Step::attend`.
//!
//! *Helps*: K and V are read in place from candle's own storage and never become candle tensors again; a forward pass that
//! fails half-way leaves the cache as it was, because an uncommitted step rolls back. *Hurts*: CPU tensors only; a GPU
//! host shares its buffers instead of slices.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use kvsieve::cache::SideInput;
use kvsieve::geometry::{LayerShape, ModelShape, RotaryLayout, RotaryScaling};
use kvsieve::view::{Dims, Strides, TensorView, TensorViewMut};
use kvsieve::{KvCache, SequenceId, Step};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::{Attend, Forward, Logits, Model};
use crate::replay::Repeat;
use crate::rope::Scaling;
use crate::timings::Timings;

/// Answers the model's attention hook from one step of a cache. To look at Q, K and V on their way, wrap it in an
/// [`Attend`] of your own.
#[derive(Debug)]
pub struct Fused<'a, 'cache> {
    step: &'a mut Step<'cache>,
}

impl<'a, 'cache> Fused<'a, 'cache> {
    /// The hook of one forward pass; the step is still the caller's to commit.
    pub fn new(step: &'a mut Step<'cache>) -> Self {
        Self { step }
    }
}

impl Attend for Fused<'_, '_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        attended([q, k, v], |[q, k, v], out| self.step.attend(layer, q, k, v, out))
    }

    fn hidden(&mut self, layer: usize, states: &Tensor) -> Result<()> {
        let states = states.unsqueeze(1)?;
        let data = states.storage_and_layout().0;
        Ok(self.step.side_input(layer, SideInput::Hidden(view(&states, &data)?))?)
    }
}

/// Where the chunk from `done` ends. A cache takes a single token behind others for the end of the prompt, so the last chunk
/// takes a token that would be left alone.
fn chunk_end(done: usize, tokens: usize, chunk: usize) -> usize {
    let end = tokens.min(done + chunk);
    if chunk > 1 && end + 1 == tokens { tokens } else { end }
}

/// What `attend` makes of Q, K and V, as the tensor the model goes on with.
pub(crate) fn attended(
    [q, k, v]: [&Tensor; 3],
    attend: impl FnOnce([TensorView<'_>; 3], TensorViewMut<'_>) -> std::result::Result<(), kvsieve::Error>,
) -> Result<Tensor> {
    let (tokens, heads, _) = q.dims3()?;
    let value_dim = v.dim(2)?;
    // candle guards a tensor's storage with a read lock; slices live as long as the guards.
    let (q_data, k_data, v_data) =
        (q.storage_and_layout().0, k.storage_and_layout().0, v.storage_and_layout().0);
    let mut out = vec![0f32; tokens * heads * value_dim];
    let views = [view(q, &q_data)?, view(k, &k_data)?, view(v, &v_data)?];
    attend(views, TensorViewMut::token_major(out.as_mut_slice(), tokens, heads, value_dim)?)?;
    // The vector becomes the tensor's storage: no copy.
    Ok(Tensor::from_vec(out, (tokens, heads * value_dim), &Device::Cpu)?)
}

/// A `(tokens, heads, dim)` tensor as a kvsieve view: its slice, its strides, its offset; nothing is copied.
fn view<'a>(tensor: &Tensor, storage: &'a Storage) -> Result<TensorView<'a>> {
    let (tokens, heads, dim) = tensor.dims3()?;
    let layout = tensor.layout();
    let (stride, offset) = (layout.stride(), layout.start_offset());
    let dims = Dims { tokens, heads, dim };
    let strides = Strides { token: stride[0], head: stride[1], dim: stride[2] };
    Ok(match storage {
        Storage::Cpu(CpuStorage::F32(data)) => TensorView::new(&data[offset..], dims, strides)?,
        Storage::Cpu(CpuStorage::F16(data)) => TensorView::new(&data[offset..], dims, strides)?,
        Storage::Cpu(CpuStorage::BF16(data)) => TensorView::new(&data[offset..], dims, strides)?,
        _ => {
            return Err(Error::Unsupported {
                what: "attention inputs that are not f32, f16 or bf16 on the CPU".into(),
            });
        }
    })
}

impl Model {
    /// The geometry that a cache for this model is built for.
    ///
    /// # Errors
    /// If the library refuses it (a head dimension beyond its limit).
    pub fn shape(&self) -> Result<ModelShape> {
        let Config { layers, query_heads, kv_heads, key_dim, value_dim, ref rotary, .. } = *self.config();
        let scaling = match &rotary.scaling {
            Scaling::None => RotaryScaling::None,
            Scaling::Linear { factor } => RotaryScaling::Linear { factor: *factor },
            Scaling::Yarn { factor, beta_fast, beta_slow, original_context } => RotaryScaling::Yarn {
                factor: *factor,
                beta_fast: *beta_fast,
                beta_slow: *beta_slow,
                original_context: *original_context,
            },
            Scaling::Factors(divisors) => RotaryScaling::Factors(divisors.clone()),
        };
        // The library never rotates on our behalf; it must know the rotation to move or un-rotate stored keys.
        let rotary = kvsieve::geometry::Rotary::new(rotary.dims, rotary.base, RotaryLayout::Interleaved)
            .with_scaling(scaling);
        let mut layer = LayerShape::new(query_heads, kv_heads, key_dim).with_rotary(rotary);
        layer.d_v = value_dim;
        Ok(ModelShape::uniform(layers, layer)?.with_fingerprint(self.fingerprint()))
    }

    /// Feeds `tokens` to a sequence of `cache`: one step, all layers, committed at the end.
    ///
    /// # Errors
    /// As [`Model::forward_with`], and whatever the cache refuses; the sequence is then as it was before.
    pub fn forward(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        logits: Logits,
    ) -> Result<Forward> {
        // Asked, not counted: after an eviction fewer rows are stored than positions were used.
        let start = cache.next_position(sequence)?;
        let mut step = cache.begin(sequence, tokens.len())?;
        let forward = self.forward_with(&mut Fused::new(&mut step), tokens, start.0, logits)?;
        step.commit(tokens.len())?;
        Ok(forward)
    }

    /// Feeds `tokens` in chunks and hands every position's logits to `visit`, a few rows at a time: the index counts from
    /// the first of `tokens`. For teacher-forced evaluation over thousands of positions.
    ///
    /// # Errors
    /// As [`Model::forward`], and the first error of `visit`.
    pub fn forward_rows(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        chunk: usize,
        visit: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Timings> {
        let mut timings = Timings::default();
        for (index, tokens) in tokens.chunks(chunk.max(1)).enumerate() {
            let start = cache.next_position(sequence)?;
            let mut step = cache.begin(sequence, tokens.len())?;
            let mut pass = self.pass(&mut Fused::new(&mut step), tokens, start.0)?;
            step.commit(tokens.len())?;
            pass.for_each_row(&mut |row, logits| visit(index * chunk.max(1) + row, logits))?;
            timings += pass.timings;
        }
        Ok(timings)
    }

    /// Feeds a prompt in chunks, then tells the cache that the prompt is complete, which is when most recipes compress.
    /// Returns the logits after the last token, and the time of all chunks. `progress` gets the tokens done so far.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Error::NoTokens`] for an empty prompt.
    pub fn prefill(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        chunk: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Forward> {
        let mut forward = self.begin_prompt(cache, sequence, tokens, chunk, progress)?;
        // Whoever waits for the first token waits for this too: a replay, compression, an index, a decomposition.
        let began = std::time::Instant::now();
        self.end_prompt(cache, sequence, tokens)?;
        forward.timings.total += began.elapsed();
        Ok(forward)
    }

    /// The first half of [`Model::prefill`]: more of the prompt may follow.
    ///
    /// # Errors
    /// As there.
    pub fn begin_prompt(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        chunk: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Forward> {
        let mut timings = Timings::default();
        let mut last = None;
        let mut done = 0;
        while done < tokens.len() {
            let end = chunk_end(done, tokens.len(), chunk.max(1));
            // Only the very last row of a prompt is ever sampled from.
            let logits = if end == tokens.len() { Logits::Last } else { Logits::None };
            let forward = self.forward(cache, sequence, &tokens[done..end], logits)?;
            timings += forward.timings;
            last = forward.logits;
            done = end;
            progress(done);
        }
        match last {
            None => Err(Error::NoTokens { what: "a prompt" }),
            logits => Ok(Forward { logits, timings }),
        }
    }

    /// Tells the cache that the prompt `tokens` is complete, after a replay of it where the recipe wants one: what
    /// [`Model::prefill`] does at its end. Parts of the replay are shorter where the context has no room for longer ones.
    ///
    /// # Errors
    /// As [`Model::replay`] and [`KvCache::end_prefill`].
    pub fn end_prompt(&self, cache: &mut KvCache, sequence: SequenceId, tokens: &[u32]) -> Result<()> {
        if cache.needs().replay {
            let end = usize::try_from(cache.next_position(sequence)?.0).unwrap_or(0);
            let room = self.config().context.saturating_sub(end);
            self.replay(cache, sequence, tokens, &Repeat::default().within(room))?;
        }
        Ok(cache.end_prefill(sequence)?)
    }
}
