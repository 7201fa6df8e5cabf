//! Attention over what another sequence stores, adding nothing to it: the shared part of many requests, or one of several
//! parts that were made apart.
//!
//! *Helps* hosts that keep a long prefix once and attend to it for a whole batch in one call, and hosts that compose parts
//! which never saw one another. *Hurts* if a part is merged twice: its weights then count twice, silently.

use super::step::{PartialWorkspace, as_query, check_dims, load};
use super::{KvCache, SequenceId};
use crate::error::{CacheError, Error};
use crate::geometry::Position;
use crate::kernel::AttentionParams;
use crate::kernel::attend::{AttendLane, Share};
use crate::kernel::attend_factored::Remembered;
use crate::view::{Dims, TensorView};

impl KvCache {
    /// Attention of queries, of any sequence or none, over everything a sequence stores in a layer: `q` `(tokens, Hq, d_k)`,
    /// `out` `[Hq, tokens, d_v]`, `lse` `[Hq, tokens]`. Nothing is stored or recorded; every entry is seen by every query, whatever
    /// their positions, sliding windows do not apply, and sink logits and sink entries are left out. Calls may run side by side
    /// on several threads.
    ///
    /// Parts over disjoint entries are put together by their log-sum-exps
    /// ([`Backend::merge_partials`](crate::Backend::merge_partials)): as one softmax over the union, in any order. At most one of them may
    /// come from [`Step::attend`](super::Step::attend), whose log-sum-exps are [`Step::last_lse`](super::Step::last_lse); it brings the sinks.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`], [`CacheError::Extents`], [`CacheError::NonFinite`],
    /// [`CacheError::Length`]; device errors.
    pub fn attend_whole(
        &self,
        id: SequenceId,
        layer: usize,
        q: &TensorView<'_>,
        workspace: &mut PartialWorkspace,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let heads = self.heads(id, layer)?;
        let Position(next) = self.next_position(id)?;
        let shape = self.shape.layer(layer);
        let tokens = q.dims().tokens;
        let want = Dims { tokens, heads: shape.query_heads, dim: shape.d_k };
        check_dims(layer, "q", q.dims(), want)?;
        let rows = tokens * shape.query_heads;
        for (buffer, got, want) in [("out", out.len(), rows * shape.d_v), ("lse", lse.len(), rows)] {
            if got != want {
                return Err(CacheError::Length { buffer, got, want }.into());
            }
        }
        let PartialWorkspace { queries, positions, words, factored, rebuilt, .. } = workspace;
        rebuilt.resize_with(heads.len(), Remembered::default);
        let queries = super::scratch::resize(queries, rows * shape.d_k);
        load(layer, "q", q, as_query, queries)?;
        positions.clear();
        positions.resize(tokens, next);
        let params = AttentionParams { window: None, sink_logits: None, ..AttentionParams::of(shape) };
        let lane =
            AttendLane { heads, queries, positions, share: Share::ALL, spans: None, out, lse, mass: None };
        Ok(super::factored::attend(
            &*self.backend,
            &params,
            lane,
            (&mut rebuilt[..heads.len()], factored, words),
        )?)
    }
}
