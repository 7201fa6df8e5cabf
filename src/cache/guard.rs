//! Shadow mode: exact and packed storage side by side on the live stream, to learn what packing does to this model and
//! text before relying on it.
//!
//! While a sequence is guarded it stays exact, and so is every output the host sees; a shadow of it is packed as the
//! recipe says and attended over as well. At the end heads that err more than they may get more bits, and the sequence
//! is packed. *Helps* because formats that are harmless for one model ruin another, and only its own keys can tell.
//! *Hurts* by twice the memory and twice the attention for as many tokens as are watched.

use super::builder::head_storage;
use super::sequence::{Sequence, SequenceId};
use super::{KvCache, Step};
use crate::codec::{Rule, Span};
use crate::device::encoding::{Encoding, Format, Packing};
use crate::device::page::{HeadRows, Side};
use crate::error::{CacheError, Error};
use crate::kernel::AttentionParams;
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::view::DType;

/// What to watch for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guard {
    /// Tokens that are attended with packed entries in sight before the guard ends.
    pub tokens: usize,
    /// Heads whose [`HeadReport::output_error`] is above this get more bits at the end; none do without it.
    pub threshold: Option<f64>,
}

/// What packing did to one KV head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadReport {
    /// Layer.
    pub layer: usize,
    /// KV head.
    pub head: usize,
    /// How its keys are packed.
    pub k: Encoding,
    /// How its values are packed.
    pub v: Encoding,
    /// Error of packed keys as a softmax sees it, which is blind to what all keys share:
    /// `Σ‖e − ē‖² / Σ‖k − k̄‖²` over packed entries.
    pub key_error: f64,
    /// Error of packed values, `Σ‖e‖² / Σ‖v − v̄‖²`.
    pub value_error: f64,
    /// Mean of ‖packed − exact‖ / ‖exact‖ over the outputs of its query heads.
    pub output_error: f64,
    /// The storage it has from now on, if the guard gave it more bits.
    pub upgraded: Option<(Encoding, Encoding)>,
}

/// What a guard saw.
#[derive(Clone, Debug, PartialEq)]
pub struct GuardReport {
    /// Tokens watched so far.
    pub tokens: usize,
    /// Whether it has ended.
    pub done: bool,
    /// Per layer that owns storage, per KV head.
    pub heads: Vec<HeadReport>,
}

/// The packed copy of a guarded sequence.
#[derive(Debug)]
pub(super) struct Shadow {
    guard: Guard,
    tokens: usize,
    pub(super) layers: Vec<Vec<HeadRows>>,
    /// Per layer and KV head: sum of relative output errors, and how many.
    outputs: Vec<Vec<(f64, usize)>>,
    workspace: Workspace,
}

impl Shadow {
    fn packs(&self) -> bool {
        self.layers.iter().flatten().flat_map(|h| &h.segments).any(|s| !s.layout.is_exact())
    }
}

/// A fork of a guarded sequence is not guarded: it is packed at its next commit.
impl Clone for super::sequence::Watched {
    fn clone(&self) -> Self {
        Self { shadow: None, report: self.report.clone() }
    }
}

impl KvCache {
    /// Watches what the recipe's packing does to a sequence for the next tokens, which are attended exactly.
    ///
    /// # Errors
    /// [`CacheError::Unsupported`] if the recipe packs nothing, entries are packed already, or no token is to be
    /// watched.
    pub fn guard(&mut self, id: SequenceId, guard: Guard) -> Result<(), Error> {
        let packed = self.stats(id)?.total().packed;
        let refuse = |why: String, change| Err(CacheError::Unsupported { what: "guard", why, change }.into());
        if !self.recipe.precision.packs() {
            return refuse(format!("the recipe {} packs nothing", self.recipe), "choose k= or v= that packs");
        }
        if guard.tokens == 0 {
            return refuse("0 tokens are to be watched".to_owned(), "watch at least one token");
        }
        if packed > 0 {
            return refuse(
                format!("{packed} entries are packed already, their exact numbers are gone"),
                "guard a sequence before it holds more than sinks and tail",
            );
        }
        let sequence = self.sequence_mut(id)?;
        let layers = sequence.layers.clone();
        let outputs = layers.iter().map(|heads| vec![(0.0, 0); heads.len()]).collect();
        sequence.watched.report = None;
        sequence.watched.shadow =
            Some(Box::new(Shadow { guard, tokens: 0, layers, outputs, workspace: Workspace::default() }));
        self.seal(id)
    }

    /// What the guard of a sequence saw: so far if it runs, at its end if it is over, `None` if there was none.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`]; device errors.
    pub fn guard_report(&self, id: SequenceId) -> Result<Option<GuardReport>, Error> {
        let sequence = self.sequence(id)?;
        match &sequence.watched.shadow {
            Some(shadow) => self.report(sequence, shadow).map(Some),
            None => Ok(sequence.watched.report.clone()),
        }
    }

    /// Ends a guard before its time: heads above the threshold get more bits, the sequence is packed.
    ///
    /// # Errors
    /// As [`KvCache::guard_report`]. Without a guard nothing happens.
    pub fn end_guard(&mut self, id: SequenceId) -> Result<(), Error> {
        let sequence = self.sequence(id)?;
        let Some(shadow) = &sequence.watched.shadow else { return Ok(()) };
        let threshold = shadow.guard.threshold.unwrap_or(f64::INFINITY);
        let mut report = GuardReport { done: true, ..self.report(sequence, shadow)? };
        for head in report.heads.iter_mut().filter(|h| h.output_error > threshold) {
            head.upgraded = self.upgrade(head.layer, head.head);
        }
        let sequence = self.sequence_mut(id)?;
        sequence.watched = super::sequence::Watched { shadow: None, report: Some(report) };
        self.seal(id)
    }

    /// Counts committed tokens; ends a guard that has seen enough.
    pub(super) fn advance_guard(
        &mut self,
        id: SequenceId,
        watched: bool,
        tokens: usize,
    ) -> Result<(), Error> {
        let sequence = self.sequence_mut(id)?;
        let Some(shadow) = sequence.watched.shadow.as_mut().filter(|_| watched) else { return Ok(()) };
        shadow.tokens += tokens;
        if shadow.tokens < shadow.guard.tokens { Ok(()) } else { self.end_guard(id) }
    }

    /// Whether the next tokens of a sequence are watched.
    pub(super) fn watches(&self, id: SequenceId) -> bool {
        let shadow = self.sequences.get(&id.0).and_then(|s| s.watched.shadow.as_ref());
        shadow.is_some_and(|shadow| shadow.packs())
    }

    /// More bits for a head from now on: 8 for fewer, centred and rotated as these were, exact for 8.
    fn upgrade(&mut self, layer: usize, head: usize) -> Option<(Encoding, Encoding)> {
        let storage = &self.storage[layer][head];
        let (k, v) = (storage.bulk().k, storage.bulk().v);
        let more = |encoding: Encoding, exact: DType| match encoding.packed() {
            Some(packing) if packing.format.bits() < 8 => Packing { format: Format::Int8, ..packing }.into(),
            Some(_) => exact.into(),
            None => encoding,
        };
        let dtype = self.recipe.precision.exact.dtype;
        let upgraded = (more(k, dtype), more(v, dtype));
        if upgraded == (k, v) {
            return None;
        }
        let only = |index: usize| Span { start: index as i32, end: Some(index as i32 + 1) };
        let (k, v) = (Some(upgraded.0), Some(upgraded.1));
        self.recipe.precision.add(Rule { layers: only(layer), heads: only(head), group: 1, k, v });
        let layout = self.layout_of(layer);
        self.storage[layer][head] =
            head_storage(&self.shape, (&self.recipe, self.budget), (layer, head), layout);
        Some(upgraded)
    }

    fn report(&self, sequence: &Sequence, shadow: &Shadow) -> Result<GuardReport, Error> {
        let mut heads = Vec::new();
        for (layer, (exact, packed)) in sequence.layers.iter().zip(&shadow.layers).enumerate() {
            for (head, (exact, packed)) in exact.iter().zip(packed).enumerate() {
                let (sum, count) = shadow.outputs[layer][head];
                let bulk = self.storage[layer][head].bulk();
                heads.push(HeadReport {
                    layer,
                    head,
                    k: bulk.k,
                    v: bulk.v,
                    key_error: self.storage_error(exact, packed, Side::Key)?,
                    value_error: self.storage_error(exact, packed, Side::Value)?,
                    output_error: if count == 0 { 0.0 } else { sum / count as f64 },
                    upgraded: None,
                });
            }
        }
        Ok(GuardReport { tokens: shadow.tokens, done: false, heads })
    }

    /// Error of a side over the entries that are packed on it, relative to how much they differ from one another.
    fn storage_error(&self, exact: &HeadRows, packed: &HeadRows, side: Side) -> Result<f64, Error> {
        let pages = packed.pages().filter(|p| p.layout.encoding(side).packed().is_some());
        let slots: Vec<u32> = pages.flat_map(|p| p.first as u32..(p.first + p.rows) as u32).collect();
        let Some(d) = packed.segments.first().map(|s| s.layout.dim(side)) else { return Ok(0.0) };
        let (want, got) = (self.rows_of(exact, &slots, side)?, self.rows_of(packed, &slots, side)?);
        let (mut error, mut spread) = (0.0, 0.0);
        for c in 0..d {
            let column = || want.iter().zip(&got).skip(c).step_by(d);
            let mean = |sum: f64| sum / slots.len() as f64;
            let centre = mean(column().map(|(&x, _)| f64::from(x)).sum());
            // A softmax over keys cannot see what all of them share; a sum of values can.
            let off = |(&x, &y): (&f32, &f32)| f64::from(y) - f64::from(x);
            let shift = if side == Side::Key { mean(column().map(off).sum()) } else { 0.0 };
            error += column().map(|pair| (off(pair) - shift).powi(2)).sum::<f64>();
            spread += column().map(|(&x, _)| (f64::from(x) - centre).powi(2)).sum::<f64>();
        }
        Ok(if error > 0.0 { error / spread } else { 0.0 })
    }

    fn rows_of(&self, head: &HeadRows, slots: &[u32], side: Side) -> Result<Vec<f32>, Error> {
        let Some(layout) = head.segments.first().map(|s| &s.layout) else { return Ok(Vec::new()) };
        let (mut keys, mut values) =
            (vec![0.0; slots.len() * layout.d_k], vec![0.0; slots.len() * layout.d_v]);
        let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
        self.backend.gather(&mut GatherArgs { head, slots, target })?;
        Ok(if side == Side::Key { keys } else { values })
    }
}

impl Step<'_> {
    /// Attends over the shadows of guarded sequences and compares with what was just computed.
    pub(super) fn watch(&mut self, layer: usize) -> Result<(), Error> {
        let cache = &mut *self.cache;
        let shape = cache.shape.layer(layer);
        let owner = cache.shape.owner(layer);
        let params = AttentionParams::of(shape);
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        let scratch = &cache.scratch;
        for lane in &scratch.lanes {
            let Some(sequence) = cache.sequences.get_mut(&lane.id) else { continue };
            let Some(shadow) = sequence.watched.shadow.as_deref_mut().filter(|s| s.packs()) else { continue };
            let (mut out, mut lse) = (vec![0.0; lane.tokens * hq * d_v], vec![0.0; lane.tokens * hq]);
            let mut lanes = [AttendLane {
                heads: &shadow.layers[owner],
                queries: &scratch.queries[lane.offset * hq * d_k..(lane.offset + lane.tokens) * hq * d_k],
                positions: &scratch.positions[lane.offset..lane.offset + lane.tokens],
                share: Share::ALL,
                spans: None,
                out: &mut out,
                lse: &mut lse,
                mass: None,
            }];
            cache.backend.attend(&params, &mut lanes, &mut shadow.workspace)?;
            let exact = &scratch.out[lane.offset * hq * d_v..(lane.offset + lane.tokens) * hq * d_v];
            for (row, (got, want)) in out.chunks_exact(d_v).zip(exact.chunks_exact(d_v)).enumerate() {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let norm: f64 = want.iter().map(|&x| square(x)).sum();
                let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
                if norm > 0.0 {
                    let output = &mut shadow.outputs[owner][row / lane.tokens / shape.group()];
                    output.0 += (off / norm).sqrt();
                    output.1 += 1;
                }
            }
        }
        Ok(())
    }
}
