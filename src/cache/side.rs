//! What a policy learns of tokens when they arrive, beside their rotated queries, keys and values: hidden states, which only the
//! host has, or queries and keys before rotation, which the cache turns back where the host does not give them.
//!
//! *Helps* methods that judge an entry once, by its token alone: what they say is stored beside the entry and lives as long.
//! *Hurts* by one pass of a small network per token and layer, and for turned-back rows by their copies.

use super::scratch::resize;
use super::step::{Step, as_query, check_dims, load};
use crate::error::{CacheError, Error};
use crate::geometry::{KeyPhase, LayerShape, Rotary};
use crate::kernel::rope::{RopeArgs, RopeTarget};
use crate::policy::{NewTokens, SideKind};
use crate::view::{Dims, TensorView};
use std::sync::Arc;

/// What [`Step::side_input`] takes, for all tokens of the step.
#[derive(Clone, Copy, Debug)]
pub enum SideInput<'a> {
    /// The layer's input after its norm, `(tokens, 1, D)`.
    Hidden(TensorView<'a>),
    /// Queries `(tokens, Hq, d_k)` and keys `(tokens, H, d_k)` before their rotary embedding.
    PreRope {
        /// Queries.
        q: TensorView<'a>,
        /// Keys.
        k: TensorView<'a>,
    },
}

/// Buffers of one layer at a time, and what is known of the step.
#[derive(Debug, Default)]
pub(super) struct SideScratch {
    /// `[Hq + H, tokens, d_k]`, before rotation.
    heads: Vec<f32>,
    /// As [`NewTokens::rows`].
    rows: Vec<f32>,
    /// Lent to the policy.
    lent: Vec<f32>,
    /// The layer whose keys and values the step's buffers hold.
    held: Option<usize>,
    /// The layer whose queries and keys before rotation the host gave.
    given: Option<usize>,
    /// The embedding that `table` belongs to.
    rotary: Option<Rotary>,
    /// Angles that turn every token back.
    table: Vec<f32>,
}

impl SideScratch {
    /// Forgets what was known of the step before.
    pub(super) fn begin(&mut self) {
        (self.held, self.given, self.rotary) = (None, None, None);
    }

    /// The step's keys and values of a layer were loaded.
    pub(super) fn hold(&mut self, layer: usize) {
        self.held = Some(layer);
    }
}

impl Step<'_> {
    /// Hands over what the recipe's policy wants to know of the step's tokens in a layer ([`crate::KvCache::needs`]), before that
    /// layer's [`Step::attend`]. What the policy does not ask for is not read, so a host may call it always.
    ///
    /// [`SideKind::Hidden`] must be given for every layer that has a cache of its own and no sliding window; a commit without is an
    /// error. [`SideKind::PreRope`] may be.
    ///
    /// # Errors
    /// [`CacheError`] for a layer that is not, extents, and values that are not finite; [`CacheError::Order`] after the layer was
    /// attended.
    pub fn side_input(&mut self, layer: usize, input: SideInput<'_>) -> Result<(), Error> {
        let layers = self.cache.shape.layers();
        if layer >= layers {
            return Err(CacheError::NoLayer { layer, layers }.into());
        }
        if !self.cache.rates(layer) {
            return Ok(());
        }
        if self.cache.scratch.pending[layer].attended {
            let problem = "side input after attend: give it before";
            return Err(CacheError::Order { layer, problem }.into());
        }
        match (input, self.cache.needs.side) {
            (SideInput::Hidden(states), SideKind::Hidden) => self.rate_hidden(layer, states),
            (SideInput::PreRope { q, k }, SideKind::PreRope) => Ok(self.load_turned(layer, q, k)?),
            _ => Ok(()),
        }
    }

    fn rate_hidden(&mut self, layer: usize, states: TensorView<'_>) -> Result<(), Error> {
        let dims = states.dims();
        check_dims(layer, "hidden", dims, Dims { tokens: self.tokens, heads: 1, dim: dims.dim })?;
        let rows = resize(&mut self.cache.scratch.side.rows, self.tokens * dims.dim);
        load(layer, "hidden", &states, as_query, rows)?;
        self.rate(layer, dims.dim)
    }

    fn load_turned(&mut self, layer: usize, q: TensorView<'_>, k: TensorView<'_>) -> Result<(), CacheError> {
        let cache = &mut *self.cache;
        let shape = cache.shape.layer(layer);
        let dims = |heads| Dims { tokens: self.tokens, heads, dim: shape.d_k };
        check_dims(layer, "q", q.dims(), dims(shape.query_heads))?;
        check_dims(layer, "k", k.dims(), dims(shape.kv_heads))?;
        let side = &mut cache.scratch.side;
        side.given = None;
        let (of_queries, of_keys) =
            resize(&mut side.heads, (shape.query_heads + shape.kv_heads) * self.tokens * shape.d_k)
                .split_at_mut(shape.query_heads * self.tokens * shape.d_k);
        load(layer, "q", &q, as_query, of_queries)?;
        load(layer, "k", &k, as_query, of_keys)?;
        side.given = Some(layer);
        Ok(())
    }

    /// Has the policy judge the tokens of a layer that was attended, by queries and keys before rotation.
    pub(super) fn rate_turned(&mut self, layer: usize) -> Result<(), Error> {
        if self.cache.needs.side != SideKind::PreRope || !self.cache.rates(layer) {
            return Ok(());
        }
        if self.cache.scratch.side.held != Some(layer) {
            let problem = "its policy judges queries, keys and values together: attend before another layer is appended";
            return Err(CacheError::Order { layer, problem }.into());
        }
        let model = Arc::clone(&self.cache.shape);
        let shape = model.layer(layer);
        if self.cache.scratch.side.given != Some(layer) {
            self.turn_back(shape)?;
        }
        let (tokens, width) = (self.tokens, turned_width(shape));
        let scratch = &mut self.cache.scratch;
        let rows = resize(&mut scratch.side.rows, tokens * width);
        let heads = (shape.query_heads + shape.kv_heads) * tokens * shape.d_k;
        place(&scratch.side.heads[..heads], (tokens, shape.d_k), (width, 0), rows);
        let values = &scratch.values[..shape.kv_heads * tokens * shape.d_v];
        place(values, (tokens, shape.d_v), (width, width - shape.kv_heads * shape.d_v), rows);
        self.rate(layer, width)
    }

    /// Copies the step's queries and keys and takes their rotation off.
    fn turn_back(&mut self, shape: &LayerShape) -> Result<(), Error> {
        let tokens = self.tokens;
        let scratch = &mut self.cache.scratch;
        let (hq, d_k) = (shape.query_heads, shape.d_k);
        let side = &mut scratch.side;
        let all = resize(&mut side.heads, (hq + shape.kv_heads) * tokens * d_k);
        let (queries, keys) = all.split_at_mut(hq * tokens * d_k);
        // Queries lie lane after lane, keys of all lanes side by side.
        for lane in &scratch.lanes {
            for head in 0..hq {
                let from = (lane.offset * hq + head * lane.tokens) * d_k;
                let to = (head * tokens + lane.offset) * d_k;
                queries[to..to + lane.tokens * d_k]
                    .copy_from_slice(&scratch.queries[from..from + lane.tokens * d_k]);
            }
        }
        keys.copy_from_slice(&scratch.keys[..keys.len()]);
        let Some(rotary) = shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope) else {
            return Ok(());
        };
        if side.rotary.as_ref() != Some(rotary) {
            side.table = rotary.table(scratch.positions.iter().map(|&position| -position));
            side.rotary = Some(rotary.clone());
        }
        for head in side.heads[..(hq + shape.kv_heads) * tokens * d_k].chunks_exact_mut(tokens * d_k) {
            self.cache.backend.rope(&mut RopeArgs {
                layout: rotary.layout,
                dims: rotary.dims,
                table: &side.table,
                target: RopeTarget::Dense { rows: head, dim: d_k },
            })?;
        }
        Ok(())
    }

    /// What the policy says of the rows that lie ready.
    fn rate(&mut self, layer: usize, width: usize) -> Result<(), Error> {
        let cache = &mut *self.cache;
        let shape = cache.shape.layer(layer);
        let scratch = &mut cache.scratch;
        let SideScratch { rows, lent, .. } = &mut scratch.side;
        let rows = &rows[..self.tokens * width];
        let tokens = NewTokens { layer, shape, rows, width, backend: &*cache.backend };
        let rated = &mut scratch.pending[layer].rated;
        rated.resize(self.tokens * shape.kv_heads, 0.0);
        let outcome = cache.recipe.policy.rate(&tokens, lent, rated);
        if outcome.is_err() {
            rated.clear();
        }
        Ok(outcome?)
    }
}

/// Numbers in a row of queries, keys and values.
fn turned_width(shape: &LayerShape) -> usize {
    (shape.query_heads + shape.kv_heads) * shape.d_k + shape.kv_heads * shape.d_v
}

/// `[heads, tokens, dim]` into rows of `width` numbers, from column `first`.
fn place(heads: &[f32], (tokens, dim): (usize, usize), (width, first): (usize, usize), rows: &mut [f32]) {
    for (index, row) in heads.chunks_exact(dim).enumerate() {
        let (head, token) = (index / tokens, index % tokens);
        let at = token * width + first + head * dim;
        rows[at..at + dim].copy_from_slice(row);
    }
}
