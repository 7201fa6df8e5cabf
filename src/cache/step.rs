//! One step: new tokens of one or several sequences pass through all layers, then are committed or rolled
//! back.
//!
//! *Helps* speculative decoding (commit what was accepted) and errors (drop the step and nothing happened).
//! *Hurts* nothing: rows are written once, where they stay.
//!
//! Several sequences share a step as *lanes*: their tokens follow one another in the host's tensors, without
//! padding, in the order given to [`KvCache::begin_batch`].

use super::KvCache;
use super::constant::join;
use super::factored::FactoredScratch;
use super::scratch::{Joined, Pending, resize};
use super::sequence::SequenceId;
use crate::device::page::Side;
use crate::device::{Encoding, HeadRows};
use crate::error::{CacheError, Error};
use crate::geometry::Position;
use crate::kernel::AttentionParams;
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::attend_factored::Remembered;
use crate::kernel::merge_partials::MergeArgs;
use crate::policy::FeedKind;
use crate::store::{self, NewRows};
use crate::view::{DType, Dims, TensorView, TensorViewMut};

/// Steps of at most this many tokens can be accepted in part under any recipe: their queries are kept until
/// commit, so that scores of the rejected ones can be left out. Longer steps are prompt chunks.
pub const SPECULATIVE_TOKENS: usize = 64;

/// Lanes handed to the attend kernel at once; more are done in groups, so that no list is allocated.
const LANE_GROUP: usize = 16;

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lane {
    pub(super) id: u64,
    pub(super) tokens: usize,
    /// Index of its first token in the step.
    pub(super) offset: usize,
    /// Position of its first token.
    pub(super) start: i32,
    /// Query rows kept for commit.
    pub(super) logged: usize,
    /// Whether the recipe still looks at this sequence's tokens.
    pub(super) records: bool,
}

/// New tokens on their way through the layers. Dropping it without [`Step::commit`] rolls back.
#[derive(Debug)]
pub struct Step<'c> {
    pub(super) cache: &'c mut KvCache,
    pub(super) tokens: usize,
    pub(super) done: bool,
}

/// Memory lent to [`Step::attend_partial`] and [`KvCache::attend_whole`], one per calling thread.
#[derive(Debug, Default)]
pub struct PartialWorkspace {
    pub(super) queries: Vec<f32>,
    pub(super) positions: Vec<i32>,
    pub(super) words: Workspace,
    pub(super) joined: Joined,
    pub(super) factored: FactoredScratch,
    pub(super) rebuilt: Vec<Remembered>,
}

impl Step<'_> {
    /// Tokens in the step, over all lanes.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The sequence, first position and number of tokens of each lane: what a host needs for its rotary
    /// embedding.
    pub fn lanes(&self) -> impl Iterator<Item = (SequenceId, Position, usize)> + '_ {
        self.cache.scratch.lanes.iter().map(|l| (SequenceId(l.id), Position(l.start), l.tokens))
    }

    /// Stores the step's keys and values of a layer and attends over everything stored: the one call per
    /// layer of an engine. `q` is `(tokens, Hq, d_k)`, `k` `(tokens, H, d_k)`, `v` `(tokens, H, d_v)`, `out`
    /// `(tokens, Hq, d_v)`, any strides.
    ///
    /// # Errors
    /// [`CacheError`] for extents, order or values that cannot be stored; device errors. Nothing was stored.
    pub fn attend(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        k: TensorView<'_>,
        v: TensorView<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), Error> {
        // Everything of the second half that can fail on bad input is checked before the first half stores.
        self.check_queries(layer, &q, Some(&out))?;
        self.load_queries(layer, &q)?;
        self.append(layer, k, v)?;
        self.run_attend(layer, out)
    }

    /// Stores the step's keys and values of a layer.
    ///
    /// # Errors
    /// As [`Step::attend`].
    pub fn append(&mut self, layer: usize, k: TensorView<'_>, v: TensorView<'_>) -> Result<(), Error> {
        self.check_layer(layer)?;
        let model = std::sync::Arc::clone(&self.cache.shape);
        let shape = model.layer(layer);
        if shape.shared_with.is_some() {
            return Err(CacheError::Order {
                layer,
                problem: "shares another layer's cache: call attend_stored, there is nothing to append",
            }
            .into());
        }
        if self.cache.scratch.pending[layer].appended {
            return Err(CacheError::Order { layer, problem: "already appended in this step" }.into());
        }
        let dims = |heads, dim| Dims { tokens: self.tokens, heads, dim };
        check_dims(layer, "k", k.dims(), dims(shape.kv_heads, shape.d_k))?;
        check_dims(layer, "v", v.dims(), dims(shape.kv_heads, shape.d_v))?;
        let (d_k, d_v, tokens) = (shape.d_k, shape.d_v, self.tokens);
        let cache = &mut *self.cache;
        let scratch = &mut cache.scratch;
        let storage = &cache.storage[layer];
        let keys = resize(&mut scratch.keys, shape.kv_heads * tokens * d_k);
        load(layer, "k", &k, |head| storage[head].stored(Side::Key), keys)?;
        let values = resize(&mut scratch.values, shape.kv_heads * tokens * d_v);
        load(layer, "v", &v, |head| storage[head].stored(Side::Value), values)?;
        for index in 0..scratch.lanes.len() {
            let lane = scratch.lanes[index];
            let Some(sequence) = cache.sequences.get_mut(&lane.id) else {
                return Err(CacheError::NoSequence(lane.id).into());
            };
            let mut heads = sequence.stores().flat_map(|layers| layers[layer].iter_mut().enumerate());
            let appended = heads.try_for_each(|(h, head)| {
                let (from, to) = (h * tokens + lane.offset, h * tokens + lane.offset + lane.tokens);
                let new = NewRows {
                    positions: &scratch.positions[lane.offset..lane.offset + lane.tokens],
                    keys: &scratch.keys[from * d_k..to * d_k],
                    values: &scratch.values[from * d_v..to * d_v],
                };
                store::append(&*cache.backend, &storage[h].exact, head, new)
            });
            drop(heads);
            if let Err(error) = appended {
                // Heads and lanes done so far go back, so that the layer is as before.
                self.rollback_layer(layer);
                return Err(error.into());
            }
        }
        self.cache.scratch.pending[layer].appended = true;
        self.cache.scratch.side.hold(layer);
        Ok(())
    }

    /// Attends over what is stored, after [`Step::append`]; for layers that share another's cache, after that
    /// layer's append.
    ///
    /// # Errors
    /// As [`Step::attend`].
    pub fn attend_stored(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), Error> {
        self.check_queries(layer, &q, Some(&out))?;
        self.check_appended(layer)?;
        self.load_queries(layer, &q)?;
        self.run_attend(layer, out)
    }

    /// Log-sum-exp of every row of the last [`Step::attend`] or [`Step::attend_stored`]: for each lane
    /// `[Hq, tokens]`. A host merges its own attention with ours by it.
    pub fn last_lse(&self) -> &[f32] {
        &self.cache.scratch.lse
    }

    /// One part of the attention of a single-lane step, on the calling thread and no other: part `ith` of
    /// `nth`, split over the stored entries. Call it from as many threads as you like, then
    /// [`Step::merge_partials`] once. `out` is `[Hq, tokens, d_v]`, `lse` `[Hq, tokens]`. It reads everything, also where
    /// the recipe has an index: an index chooses once for all threads, in [`Step::attend`].
    ///
    /// # Errors
    /// As [`Step::attend_stored`]; [`CacheError::Unsupported`] in a step of several lanes.
    #[allow(
        clippy::too_many_arguments,
        reason = "the cooperative form is flat on purpose: it is what a C host calls"
    )]
    pub fn attend_partial(
        &self,
        layer: usize,
        q: TensorView<'_>,
        ith: usize,
        nth: usize,
        workspace: &mut PartialWorkspace,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        self.check_queries(layer, &q, None)?;
        self.check_appended(layer)?;
        let lane = self.single_lane("attend_partial")?;
        if ith >= nth {
            return Err(CacheError::Length { buffer: "ith (must be below nth)", got: ith, want: nth }.into());
        }
        let shape = self.cache.shape.layer(layer);
        let PartialWorkspace { queries, words, joined, .. } = workspace;
        let queries = resize(queries, shape.query_heads * lane.tokens * shape.d_k);
        load(layer, "q", &q, as_query, queries)?;
        let params = AttentionParams::of(shape);
        let heads = &self.cache.sequences[&lane.id].layers[self.cache.shape.owner(layer)];
        if heads.iter().any(HeadRows::is_factored) {
            return Err(CacheError::Unsupported {
                what: "attend_partial",
                why: "entries of this sequence are made of factors, which one call does for all threads"
                    .to_owned(),
                change: "use attend, or a recipe without low rank",
            }
            .into());
        }
        let mut lanes = [AttendLane {
            heads,
            queries,
            positions: &self.cache.scratch.positions[..lane.tokens],
            share: Share { index: ith, of: nth },
            spans: None,
            out: &mut *out,
            lse: &mut *lse,
            mass: None,
        }];
        let backend = &*self.cache.backend;
        backend.attend(&params, &mut lanes, words)?;
        // As the sink logits: they belong to the first part.
        if ith == 0 {
            let (constant, rows) =
                (&self.cache.constant[layer], (&*queries, &self.cache.scratch.positions[..]));
            join(backend, &params, constant, &[lane], rows, (joined, words), (out, lse))?;
        }
        Ok(())
    }

    /// Joins the parts of [`Step::attend_partial`]: `outs` `[parts, Hq, tokens, d_v]`, `lses`
    /// `[parts, Hq, tokens]`, into `out`, and records what the recipe needs of this layer's queries.
    ///
    /// # Errors
    /// As [`Step::attend_stored`]; a buffer length.
    pub fn merge_partials(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        parts: usize,
        outs: &[f32],
        lses: &[f32],
        mut out: TensorViewMut<'_>,
    ) -> Result<(), Error> {
        self.check_queries(layer, &q, Some(&out))?;
        self.check_appended(layer)?;
        let lane = self.single_lane("merge_partials")?;
        self.load_queries(layer, &q)?;
        let cache = &mut *self.cache;
        let fed = cache.fed(layer);
        let shape = cache.shape.layer(layer);
        let scratch = &mut cache.scratch;
        let rows = shape.query_heads * lane.tokens;
        scratch.lse.resize(rows, 0.0);
        let merged = resize(&mut scratch.out, rows * shape.d_v);
        cache.backend.merge_partials(&mut MergeArgs {
            parts,
            d_v: shape.d_v,
            outs,
            lses,
            out: merged,
            lse: &mut scratch.lse,
        })?;
        store_out(merged, &[lane], shape.query_heads, shape.d_v, &mut out);
        if fed == FeedKind::Mass {
            let heads = &cache.sequences[&lane.id].layers[layer];
            let pending = &mut scratch.pending[layer];
            pending.mass.resize(shape.group() * crate::kernel::total_rows(heads), 0.0);
            pending.mass_starts.clear();
            pending.mass_starts.push(0);
            cache.backend.attention_mass(
                &AttentionParams::of(shape),
                &mut crate::kernel::attention_mass::MassArgs {
                    heads,
                    queries: &scratch.queries[..rows * shape.d_k],
                    positions: &scratch.positions[..lane.tokens],
                    lse: &scratch.lse,
                    mass: &mut pending.mass,
                },
            )?;
        }
        self.rate_turned(layer)?;
        self.log_queries(layer);
        Ok(())
    }

    fn single_lane(&self, what: &'static str) -> Result<Lane, CacheError> {
        match self.cache.scratch.lanes.as_slice() {
            [lane] => Ok(*lane),
            lanes => Err(CacheError::Unsupported {
                what,
                why: format!("the step has {} lanes", lanes.len()),
                change: "begin one step per sequence, or use attend",
            }),
        }
    }

    fn check_layer(&self, layer: usize) -> Result<(), CacheError> {
        let layers = self.cache.shape.layers();
        if layer < layers { Ok(()) } else { Err(CacheError::NoLayer { layer, layers }) }
    }

    fn check_appended(&self, layer: usize) -> Result<(), CacheError> {
        let owner = self.cache.shape.owner(layer);
        if self.cache.scratch.pending[owner].appended {
            Ok(())
        } else {
            Err(CacheError::Order {
                layer,
                problem: "attend before append: this step's keys and values are not stored yet",
            })
        }
    }

    fn check_queries(
        &self,
        layer: usize,
        q: &TensorView<'_>,
        out: Option<&TensorViewMut<'_>>,
    ) -> Result<(), CacheError> {
        self.check_layer(layer)?;
        let shape = self.cache.shape.layer(layer);
        let dims = |dim| Dims { tokens: self.tokens, heads: shape.query_heads, dim };
        check_dims(layer, "q", q.dims(), dims(shape.d_k))?;
        match out {
            Some(out) => check_dims(layer, "out", out.dims(), dims(shape.d_v)),
            None => Ok(()),
        }
    }

    /// Reads `q` into scratch, lane after lane, `[Hq, tokens, d_k]` each.
    fn load_queries(&mut self, layer: usize, q: &TensorView<'_>) -> Result<(), CacheError> {
        let cache = &mut *self.cache;
        let shape = cache.shape.layer(layer);
        let scratch = &mut cache.scratch;
        let buffer = resize(&mut scratch.queries, self.tokens * shape.query_heads * shape.d_k);
        for lane in &scratch.lanes {
            let start = lane.offset * shape.query_heads * shape.d_k;
            let part = &mut buffer[start..start + lane.tokens * shape.query_heads * shape.d_k];
            load_tokens(layer, "q", q, as_query, lane.offset, lane.tokens, part)?;
        }
        Ok(())
    }

    /// The attend kernel over all lanes, out of scratch into `out`, and what commit will need.
    fn run_attend(&mut self, layer: usize, mut out: TensorViewMut<'_>) -> Result<(), Error> {
        let cache = &mut *self.cache;
        let fed = cache.fed(layer);
        let shape = cache.shape.layer(layer);
        let owner = cache.shape.owner(layer);
        let params = AttentionParams::of(shape);
        let scratch = &mut cache.scratch;
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        let want_mass = fed == FeedKind::Mass;
        // Weights go by the whole denominator, which learned entries join after the stored ones.
        let fused_mass = want_mass && cache.constant[layer].is_empty();
        let rows_of =
            |lane: &Lane| crate::kernel::total_rows(&cache.sequences[&lane.id].layers[owner]) * shape.group();
        resize(&mut scratch.out, self.tokens * hq * d_v);
        scratch.lse.resize(self.tokens * hq, 0.0);
        let pending = &mut scratch.pending[layer];
        let mass_len: usize = if want_mass { scratch.lanes.iter().map(rows_of).sum() } else { 0 };
        if pending.mass.capacity() < mass_len {
            // Room for a page more per KV head, so that decode steps do not grow it one token at a time.
            pending.mass.reserve_exact(mass_len + scratch.lanes.len() * hq * cache.page_entries);
        }
        pending.mass.resize(mass_len, 0.0);
        pending.mass_starts.clear();
        let mut mass_start = 0;
        let (mut out_rest, mut lse_rest, mut mass_rest) = (
            &mut scratch.out[..self.tokens * hq * d_v],
            scratch.lse.as_mut_slice(),
            pending.mass.as_mut_slice(),
        );
        if cache.recipe.index.is_some() {
            cache.read_layer(layer)?;
            return self.finish_attend(layer, false, &mut out);
        }
        if cache.recipe.low_rank.is_some() {
            cache.attend_lanes(layer)?;
            return self.finish_attend(layer, false, &mut out);
        }
        for group in scratch.lanes.chunks(LANE_GROUP) {
            let mut lanes: [AttendLane<'_>; LANE_GROUP] = std::array::from_fn(|_| AttendLane::default());
            for (slot, lane) in lanes.iter_mut().zip(group) {
                if want_mass {
                    pending.mass_starts.push(mass_start);
                    mass_start += rows_of(lane);
                }
                let heads: &[HeadRows] = &cache.sequences[&lane.id].layers[owner];
                *slot = AttendLane {
                    heads,
                    queries: &scratch.queries[lane.offset * hq * d_k..(lane.offset + lane.tokens) * hq * d_k],
                    positions: &scratch.positions[lane.offset..lane.offset + lane.tokens],
                    share: Share::ALL,
                    spans: None,
                    out: split_off(&mut out_rest, lane.tokens * hq * d_v),
                    lse: split_off(&mut lse_rest, lane.tokens * hq),
                    mass: fused_mass.then(|| split_off(&mut mass_rest, rows_of(lane))),
                };
            }
            cache.backend.attend(&params, &mut lanes[..group.len()], &mut scratch.workspace)?;
        }
        self.finish_attend(layer, want_mass && !fused_mass, &mut out)
    }

    /// What follows the attention over stored entries: the comparison with a guard's shadow, learned entries, and what
    /// commit will need.
    fn finish_attend(&mut self, layer: usize, mass: bool, out: &mut TensorViewMut<'_>) -> Result<(), Error> {
        self.watch(layer)?;
        self.join_constant(layer, mass)?;
        let (shape, scratch) = (self.cache.shape.layer(layer), &self.cache.scratch);
        store_out(&scratch.out, &scratch.lanes, shape.query_heads, shape.d_v, out);
        self.rate_turned(layer)?;
        self.log_queries(layer);
        Ok(())
    }

    /// Copies the last query rows (and their log-sum-exp) out of scratch for commit.
    fn log_queries(&mut self, layer: usize) {
        let cache = &mut *self.cache;
        let shape = cache.shape.layer(layer);
        let fed = cache.fed(layer);
        let log = cache.logs_queries(layer);
        let scratch = &mut cache.scratch;
        let pending = &mut scratch.pending[layer];
        pending.attended = true;
        pending.queries.clear();
        pending.lse.clear();
        if !log {
            return;
        }
        let (hq, d_k) = (shape.query_heads, shape.d_k);
        for lane in &scratch.lanes {
            let base = lane.offset * hq;
            for token in lane.tokens - lane.logged..lane.tokens {
                for h in 0..hq {
                    let row = base + h * lane.tokens + token;
                    pending.queries.extend_from_slice(&scratch.queries[row * d_k..(row + 1) * d_k]);
                    if fed == FeedKind::Mass {
                        pending.lse.push(scratch.lse[row]);
                    }
                }
            }
        }
    }

    fn rollback_layer(&mut self, layer: usize) {
        for lane in &self.cache.scratch.lanes {
            if let Some(sequence) = self.cache.sequences.get_mut(&lane.id) {
                for head in sequence.stores().flat_map(|layers| &mut layers[layer]) {
                    let rows = store::rows_below(head, lane.start);
                    store::truncate_rows(head, rows);
                }
            }
        }
        self.cache.scratch.pending[layer].appended = false;
    }

    /// Commits the first `accepted` tokens of a single-lane step, forgets the rest, and compresses where the
    /// recipe's schedule says so. 0 is a rollback.
    ///
    /// # Errors
    /// [`CacheError`] if a layer got no tokens, more tokens were accepted than begun, or a long step is
    /// accepted in part under a recipe that scores them; the step is then rolled back. An error while
    /// compressing leaves the tokens committed and every layer either compressed or not.
    pub fn commit(self, accepted: usize) -> Result<(), Error> {
        self.single_lane("commit")?;
        self.commit_lanes(&[accepted])
    }

    /// Commits the first `accepted[i]` tokens of each lane.
    ///
    /// # Errors
    /// As [`Step::commit`].
    pub fn commit_lanes(mut self, accepted: &[usize]) -> Result<(), Error> {
        let lanes = self.cache.scratch.lanes.len();
        if accepted.len() != lanes {
            return Err(CacheError::Length { buffer: "accepted", got: accepted.len(), want: lanes }.into());
        }
        if accepted.iter().any(|&a| a > 0) {
            self.check_complete()?;
        }
        for (lane, &accepted) in self.cache.scratch.lanes.iter().zip(accepted) {
            if accepted > lane.tokens {
                return Err(CacheError::TooManyAccepted { accepted, begun: lane.tokens }.into());
            }
            let in_part = accepted > 0 && accepted < lane.tokens;
            if in_part && lane.tokens > SPECULATIVE_TOKENS && lane.records {
                return Err(CacheError::PartialCommit {
                    accepted,
                    begun: lane.tokens,
                    limit: SPECULATIVE_TOKENS,
                }
                .into());
            }
        }
        self.done = true;
        self.cache.finish_step(accepted)
    }

    fn check_complete(&self) -> Result<(), CacheError> {
        let shape = &self.cache.shape;
        let pending: &[Pending] = &self.cache.scratch.pending;
        // A policy scores what every query does; an index that calibrates takes the queries there are.
        let needs = self.cache.recipe.policy.needs();
        let scores = needs.queries > 0 || needs.feed != FeedKind::None;
        let missing = |layer: &usize| {
            let unseen = scores && self.cache.logs_queries(*layer) && !pending[*layer].attended;
            !pending[*layer].appended || unseen
        };
        let unrated = |layer: &usize| self.cache.rates(*layer) && pending[*layer].rated.is_empty();
        if let Some(layer) = shape.owners().find(|layer| !missing(layer) && unrated(layer)) {
            return Err(CacheError::SideInput { layer, policy: self.cache.recipe.policy.name().to_owned() });
        }
        match shape.owners().find(missing) {
            Some(missing_layer) => Err(CacheError::Incomplete {
                done: shape.owners().filter(|l| !missing(l)).count(),
                layers: shape.owners().count(),
                missing: missing_layer,
            }),
            None => Ok(()),
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if !self.done {
            for layer in 0..self.cache.shape.layers() {
                if self.cache.scratch.pending[layer].appended {
                    self.rollback_layer(layer);
                }
            }
        }
    }
}

fn split_off<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(len);
    *rest = tail;
    head
}

pub(super) fn check_dims(
    layer: usize,
    tensor: &'static str,
    got: Dims,
    want: Dims,
) -> Result<(), CacheError> {
    if got == want { Ok(()) } else { Err(CacheError::Extents { layer, tensor, got, want }) }
}

/// Queries are never stored.
pub(super) fn as_query(_head: usize) -> (Encoding, Encoding) {
    (Encoding::Exact(DType::F32), Encoding::Exact(DType::F32))
}

/// Reads all tokens of a tensor, head-major.
pub(super) fn load(
    layer: usize,
    tensor: &'static str,
    view: &TensorView<'_>,
    stored: impl Fn(usize) -> (Encoding, Encoding),
    out: &mut [f32],
) -> Result<(), CacheError> {
    load_tokens(layer, tensor, view, stored, 0, view.dims().tokens, out)
}

/// Reads `count` tokens from `first`, head-major, and refuses what cannot be `stored`, now or later.
fn load_tokens(
    layer: usize,
    tensor: &'static str,
    view: &TensorView<'_>,
    stored: impl Fn(usize) -> (Encoding, Encoding),
    first: usize,
    count: usize,
    out: &mut [f32],
) -> Result<(), CacheError> {
    let Dims { heads, dim, .. } = view.dims();
    for head in 0..heads {
        let (now, later) = stored(head);
        let limit = now.largest(dim).min(later.largest(dim));
        for token in 0..count {
            let row = &mut out[(head * count + token) * dim..(head * count + token + 1) * dim];
            view.read_row(first + token, head, row);
            // One comparison per element; NaN fails it too.
            if row.iter().all(|x| x.abs() <= limit) {
                continue;
            }
            if let Some(d) = row.iter().position(|x| x.is_nan() || x.abs() > limit) {
                let (value, token) = (row[d], first + token);
                if !value.is_finite() {
                    return Err(CacheError::NonFinite { layer, tensor, value, token, head, dim: d });
                }
                let narrow = if now.largest(dim) < value.abs() { now } else { later };
                let stored = narrow.to_string();
                return Err(CacheError::Range { layer, tensor, value, token, head, dim: d, stored });
            }
        }
    }
    Ok(())
}

fn store_out(out: &[f32], lanes: &[Lane], heads: usize, d_v: usize, view: &mut TensorViewMut<'_>) {
    for lane in lanes {
        for head in 0..heads {
            for token in 0..lane.tokens {
                let row = lane.offset * heads + head * lane.tokens + token;
                view.write_row(lane.offset + token, head, &out[row * d_v..(row + 1) * d_v]);
            }
        }
    }
}
