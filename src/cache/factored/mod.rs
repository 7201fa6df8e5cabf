//! Low rank in a cache: attention over entries some of which are made of factors, and when runs of entries become such.
//!
//! At the end of the prompt, and whenever `again` more entries wait, the keys of a group of layers, turned back from their
//! positions, become one matrix and their values another; both are decomposed, and what stands between sinks and tail is
//! replaced by the factors if these are smaller and near enough. *Helps* keep everything at a fraction of the memory.
//! *Hurts* the step that does it, by seconds for a long prompt; and the peak, by the latent rows of one group in single
//! precision.

#[cfg(feature = "lowrank")]
mod decompose;

use super::KvCache;
use super::scratch::Joined;
use super::sequence::{Rebuilt, SequenceId};
use crate::backend::Backend;
use crate::device::HeadRows;
use crate::error::{Error, KernelError};
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::attend_factored::{FactoredArgs, Remembered};
use crate::kernel::{AttentionParams, Spans};
use crate::low_rank::{LowRank, LowRankProgress, LowRankRun};
use std::ops::{ControlFlow, Range};

/// Hears how far a decomposition is and says whether to go on.
pub(super) type Watch<'a> = &'a mut dyn FnMut(LowRankProgress) -> ControlFlow<()>;

/// Buffers that steps reuse.
#[derive(Debug, Default)]
pub(super) struct FactoredScratch {
    /// What is not made of factors, by KV head.
    spans: Vec<Spans>,
    joined: Joined,
}

/// Attention of a lane over all entries, or those of its spans, whatever they are made of.
///
/// # Errors
/// [`KernelError`].
pub(super) fn attend(
    backend: &dyn Backend,
    params: &AttentionParams<'_>,
    lane: AttendLane<'_>,
    (rebuilt, scratch, workspace): (&mut [Remembered], &mut FactoredScratch, &mut Workspace),
) -> Result<(), KernelError> {
    if !lane.heads.iter().any(HeadRows::is_factored) {
        return backend.attend(params, &mut [lane], workspace);
    }
    let FactoredScratch { spans, joined } = scratch;
    spans.resize_with(lane.heads.len(), Spans::default);
    for (h, (stored, head)) in spans.iter_mut().zip(lane.heads).enumerate() {
        leave_out(head, lane.spans.map(|spans| &spans[h]), stored);
    }
    let AttendLane { heads, queries, positions, .. } = lane;
    let [(out, lse), (made_out, made_lse)] = joined.parts(lane.out.len(), lane.lse.len());
    let share = Share::ALL;
    let stored = AttendLane { heads, queries, positions, share, spans: Some(spans), out, lse, mass: None };
    backend.attend(params, &mut [stored], workspace)?;
    let made = &mut FactoredArgs {
        heads,
        queries,
        tokens: positions.len(),
        spans: lane.spans,
        out: made_out,
        lse: made_lse,
        remembered: rebuilt,
    };
    backend.attend_factored(params, made)?;
    joined.merge(backend, params.d_v, (lane.out, lane.lse))
}

/// The entries of a head, or of some spans, that are not made of factors.
fn leave_out(head: &HeadRows, spans: Option<&Spans>, out: &mut Spans) {
    out.clear();
    let mut first = 0;
    let mut add = |stored: Range<usize>| match spans {
        None => out.push(stored),
        Some(spans) => spans.among(stored).for_each(|run| out.push(run)),
    };
    for (.., run) in head.factored() {
        add(first..run.start);
        first = run.end;
    }
    add(first..head.rows());
}

impl KvCache {
    /// As [`KvCache::end_prefill`], with someone to hear how far the decompositions of low rank are, and to break them off:
    /// groups of layers that are done stay so, the others stay exact, and the prompt stays open.
    ///
    /// # Errors
    /// As [`KvCache::end_prefill`]; [`crate::error::FactorError::Cancelled`].
    pub fn end_prefill_watched(
        &mut self,
        id: SequenceId,
        watch: &mut dyn FnMut(LowRankProgress) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.finish_prefill(id, watch)
    }

    #[cfg(not(feature = "lowrank"))]
    pub(super) fn factor_due(&mut self, _: SequenceId, _: bool, _: Watch<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// Room for made keys of a layer, where the recipe has low rank.
    pub(super) fn new_rebuilt(&self, layer: usize) -> Rebuilt {
        let room = |low_rank: &LowRank| {
            let heads = 0..self.shape.layer(layer).kv_heads;
            heads.map(|_| Remembered::new(low_rank.rebuilt, low_rank.chunk)).collect()
        };
        Rebuilt(self.recipe.low_rank.as_deref().map_or_else(Vec::new, room))
    }

    /// The attention of every lane on a layer, from scratch to scratch, where the recipe has low rank and no index.
    ///
    /// # Errors
    /// A kernel's error.
    pub(super) fn attend_lanes(&mut self, layer: usize) -> Result<(), Error> {
        let (shape, owner) = (self.shape.layer(layer), self.shape.owner(layer));
        let params = AttentionParams::of(shape);
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        for lane in 0..self.scratch.lanes.len() {
            let lane = self.scratch.lanes[lane];
            let Some(sequence) = self.sequences.get_mut(&lane.id) else { continue };
            let Rebuilt(mut rebuilt) = std::mem::take(&mut sequence.reads[layer].rebuilt);
            let super::scratch::Scratch { queries, positions, out, lse, workspace, factored, .. } =
                &mut self.scratch;
            let rows = |dim: usize| lane.offset * hq * dim..(lane.offset + lane.tokens) * hq * dim;
            let attended = attend(
                &*self.backend,
                &params,
                AttendLane {
                    heads: &sequence.layers[owner],
                    queries: &queries[rows(d_k)],
                    positions: &positions[lane.offset..lane.offset + lane.tokens],
                    share: Share::ALL,
                    spans: None,
                    out: &mut out[rows(d_v)],
                    lse: &mut lse[rows(1)],
                    mass: None,
                },
                (&mut rebuilt[..], factored, workspace),
            );
            sequence.reads[layer].rebuilt = Rebuilt(rebuilt);
            attended?;
        }
        Ok(())
    }

    /// What became of the runs of entries that the recipe would store as products of low rank, in the order in which they
    /// were tried. Runs that were refused are tried again, and listed again, when they have grown.
    ///
    /// # Errors
    /// [`crate::error::CacheError::NoSequence`].
    pub fn low_rank(&self, id: SequenceId) -> Result<&[LowRankRun], Error> {
        Ok(&self.sequence(id)?.low_rank)
    }

    /// Chunks of keys of low rank that decode steps of a layer found remembered, and that they made, over all KV heads.
    ///
    /// # Errors
    /// [`crate::error::CacheError::NoSequence`], [`crate::error::CacheError::NoLayer`].
    pub fn rebuilt(&self, id: SequenceId, layer: usize) -> Result<(u64, u64), Error> {
        self.heads(id, layer)?;
        let Rebuilt(heads) = &self.sequence(id)?.reads[layer].rebuilt;
        let counts = heads.iter().map(Remembered::counts);
        Ok(counts.fold((0, 0), |(hits, misses), (h, m)| (hits + h, misses + m)))
    }
}
