//! Operations on whole sequences: fork, truncate, remove a span, drop; and reading back what is stored.
//!
//! *Helps* prompt sharing (a fork costs no copy), agents that forget a sub-task (remove), and hosts with
//! their own attention (gather, select). *Hurts* where it would lie: truncating below the last compaction is
//! an error, because the entries that stood there are gone.

use super::KvCache;
use super::compress::rotate_log;
use super::sequence::SequenceId;
use crate::columns::MERGED;
use crate::device::HeadRows;
use crate::error::{CacheError, Error, RecipeError};
use crate::geometry::{KeyPhase, Position, Slot};
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::plan::{HeadPlan, LayerPlan};
use crate::policy::select::MARKED;
use crate::store::{self, Extent, SharedPositions};
use std::ops::Range;

/// What becomes of the positions behind a removed span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RemoveMode {
    /// They stay; the gap remains in the numbering. Mathematically safe for rotary embeddings.
    Keep,
    /// They move down by the span's length, keys re-rotated; the next position moves with them.
    Renumber,
}

/// Entries of one layer that a recipe would keep ([`KvCache::select`]) or read ([`KvCache::choose`]): for hosts that own
/// their cache or their attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Where each KV head's entries start; `H + 1` values.
    pub offsets: Vec<usize>,
    /// Their slots, ascending within a head.
    pub slots: Vec<Slot>,
    /// Their positions.
    pub positions: Vec<Position>,
}

impl Selection {
    /// Slots of each KV head, ascending, with their positions.
    pub(super) fn of(heads: &[HeadRows], slots: impl Iterator<Item = impl Iterator<Item = usize>>) -> Self {
        let mut selection = Self { offsets: vec![0], slots: Vec::new(), positions: Vec::new() };
        for (head, slots) in heads.iter().zip(slots) {
            let positions: Vec<i32> = head.pages().flat_map(|p| p.positions().iter().copied()).collect();
            for slot in slots {
                selection.slots.push(Slot(slot as u32));
                selection.positions.push(Position(positions[slot]));
            }
            selection.offsets.push(selection.slots.len());
        }
        selection
    }
}

impl KvCache {
    /// A copy of a sequence that shares its pages until either side writes to them.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, Error> {
        let copy = self.sequence(id)?.clone();
        Ok(self.insert(copy))
    }

    /// Forgets a sequence; pages that no fork shares go back to the system.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn drop_sequence(&mut self, id: SequenceId) -> Result<(), Error> {
        self.sequences.remove(&id.0).map(drop).ok_or_else(|| CacheError::NoSequence(id.0).into())
    }

    /// Forgets all tokens at positions `to` and above.
    ///
    /// Accumulated scores (H2O's mass) keep what the forgotten tokens contributed.
    ///
    /// # Errors
    /// [`CacheError::PastCompaction`] if entries below `to` were evicted because of tokens at or above it;
    /// [`CacheError::SplitsMerge`] if an entry below `to` has taken up one at or above it;
    /// [`CacheError::SplitsLearned`] if `to` lies within learned entries (0 forgets them all);
    /// [`CacheError::PositionRange`] if `to` is negative or beyond the end.
    pub fn truncate(&mut self, id: SequenceId, to: Position) -> Result<(), Error> {
        let next = self.sequence(id)?.next;
        if to.0 < 0 || to.0 > next {
            return Err(CacheError::PositionRange { start: to.0, end: next, next }.into());
        }
        if to.0 > 0 {
            self.check_learned(id, to.0..next)?;
        }
        self.check_merged(id, to.0..next)?;
        let sequence = self.sequence_mut(id)?;
        if let Some(compacted) = sequence.compacted.filter(|&c| to.0 < c) {
            return Err(CacheError::PastCompaction { to, compacted: Position(compacted) }.into());
        }
        for head in sequence.stores().flatten().flatten() {
            let rows = store::rows_below(head, to.0);
            store::truncate_rows(head, rows);
        }
        sequence.truncate_index();
        sequence.queries.iter_mut().for_each(|log| log.retain(|p| p < to.0));
        let removed = (next - to.0) as usize;
        sequence.since = sequence.since.saturating_sub(removed);
        if sequence.prefill_open {
            sequence.prompt_tokens = sequence.prompt_tokens.saturating_sub(removed);
        }
        sequence.next = to.0;
        sequence.learned = sequence.learned.min(to.0);
        Ok(())
    }

    /// Forgets the tokens at positions `range` (half-open), for instance a finished sub-task.
    ///
    /// # Errors
    /// [`CacheError::PositionRange`] for a reversed or outlying range; [`CacheError::SplitsLearned`] if it reaches into learned
    /// entries; [`CacheError::SplitsMerge`] if an entry speaks for
    /// positions on both sides of an end of the range, or may: of merged positions the lowest and the highest are known; with [`RemoveMode::Renumber`], a
    /// [`RecipeError::Conflict`] if a layer's keys are rotated and its rotary embedding is unknown, or keys behind
    /// the range are packed.
    pub fn remove(&mut self, id: SequenceId, range: Range<Position>, mode: RemoveMode) -> Result<(), Error> {
        let (start, end) = (range.start.0, range.end.0);
        let next = self.sequence(id)?.next;
        if start < 0 || start > end || end > next {
            return Err(CacheError::PositionRange { start, end, next }.into());
        }
        if mode == RemoveMode::Renumber {
            self.check_rotary()?;
            self.check_exact_keys(id, end)?;
        }
        if start == end {
            return Ok(());
        }
        self.check_learned(id, start..end)?;
        self.check_merged(id, start..end)?;
        let mut shared = SharedPositions::default();
        for layer in self.shape.owners().collect::<Vec<_>>() {
            let heads = self.sequence(id)?.layers[layer].iter().map(|head| {
                let rows = head.rows() as u32;
                let (from, to) = (store::rows_below(head, start) as u32, store::rows_below(head, end) as u32);
                HeadPlan::new(rows as usize, (0..from).chain(to..rows).collect())
            });
            let plan = LayerPlan::from(heads.collect::<Vec<_>>());
            let (backend, columns) = (&*self.backend, &self.columns);
            let Some(sequence) = self.sequences.get_mut(&id.0) else {
                return Err(CacheError::NoSequence(id.0).into());
            };
            sequence.clear_index(layer);
            let heads = sequence.stores().flat_map(|layers| layers[layer].iter_mut().zip(&plan.heads));
            for (head, plan) in heads {
                store::compact(backend, head, plan, columns, &mut shared)?;
                if mode == RemoveMode::Renumber {
                    let shift = |_, p| if p >= end { p - (end - start) } else { p };
                    let layer = self.shape.layer(layer);
                    store::renumber(backend, layer, head, &mut shared, columns, shift, |p| shift(0, p))?;
                }
            }
        }
        let (backend, shape) = (&*self.backend, &self.shape);
        let Some(sequence) = self.sequences.get_mut(&id.0) else {
            return Err(CacheError::NoSequence(id.0).into());
        };
        for (layer, log) in sequence.queries.iter_mut().enumerate() {
            log.retain(|p| p < start || p >= end);
            if mode == RemoveMode::Renumber {
                rotate_log(backend, shape.layer(layer), log, |p| if p >= end { start - end } else { 0 })?;
            }
        }
        if mode == RemoveMode::Renumber {
            sequence.next -= end - start;
            if let Some(compacted) = &mut sequence.compacted {
                *compacted =
                    if *compacted >= end { *compacted - (end - start) } else { (*compacted).min(start) };
            }
        }
        Ok(())
    }

    /// Marks the entries at positions `range` (half-open), for instance the tokens of an image: a recipe with `marked=last`
    /// drops them before any others that are not protected (LOOK-M's text-first rule). Marks stay with their entries.
    ///
    /// # Errors
    /// [`CacheError::Unsupported`] if the recipe has no use for marks; [`CacheError::PositionRange`] for a reversed or
    /// outlying range; device errors.
    pub fn mark(&mut self, id: SequenceId, range: Range<Position>) -> Result<(), Error> {
        let (start, end) = (range.start.0, range.end.0);
        let next = self.sequence(id)?.next;
        if start < 0 || start > end || end > next {
            return Err(CacheError::PositionRange { start, end, next }.into());
        }
        let Some((at, _)) = self.columns.find(MARKED.name) else {
            return Err(CacheError::Unsupported {
                what: "mark",
                why: format!("the recipe {} treats all entries alike", self.recipe),
                change: "add marked=last to a recipe with a scorer",
            }
            .into());
        };
        let backend = &*self.backend;
        let Some(sequence) = self.sequences.get_mut(&id.0) else {
            return Err(CacheError::NoSequence(id.0).into());
        };
        for head in sequence.stores().flatten().flatten() {
            store::update_columns(backend, head, |positions, _, columns| {
                let marked =
                    positions.partition_point(|&p| p < start)..positions.partition_point(|&p| p < end);
                marked.for_each(|entry| columns.entry(entry)[at] = 1);
            })?;
        }
        Ok(())
    }

    /// Refuses to forget part of what was learned.
    fn check_learned(&self, id: SequenceId, Range { start, end }: Range<i32>) -> Result<(), CacheError> {
        let learned = self.sequence(id)?.learned;
        if start < learned && start < end {
            return Err(CacheError::SplitsLearned { start, end, learned });
        }
        Ok(())
    }

    /// Refuses to forget part of what an entry speaks for.
    fn check_merged(&self, id: SequenceId, range: Range<i32>) -> Result<(), Error> {
        if self.columns.find(MERGED.name).is_none() {
            return Ok(());
        }
        for (layer, heads) in self.sequence(id)?.layers.iter().enumerate() {
            for (head, rows) in heads.iter().enumerate() {
                let splits = |&(_, extent): &(i32, Extent)| {
                    let meets = extent.first < range.end && extent.last >= range.start;
                    meets && !(range.contains(&extent.first) && range.contains(&extent.last))
                };
                if let Some((position, Extent { first, last })) =
                    store::extents(rows, &self.columns).find(splits)
                {
                    let Range { start, end } = range;
                    return Err(
                        CacheError::SplitsMerge { start, end, layer, head, position, first, last }.into()
                    );
                }
            }
        }
        Ok(())
    }

    fn check_rotary(&self) -> Result<(), RecipeError> {
        let unknown = |l: &usize| {
            let layer = self.shape.layer(*l);
            layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope
        };
        match self.shape.owners().find(unknown) {
            None => Ok(()),
            Some(layer) => Err(RecipeError::Conflict {
                what: "renumbering".to_owned(),
                with: format!("layer {layer} without a rotary description"),
                why: "its keys cannot be re-rotated".to_owned(),
                change: "set LayerShape::rotary, or keep positions".to_owned(),
            }),
        }
    }

    /// Refuses to move packed keys, which cannot be re-rotated in place.
    fn check_exact_keys(&self, id: SequenceId, from: i32) -> Result<(), Error> {
        let rotated = |l: &usize| self.shape.layer(*l).key_phase == KeyPhase::PostRope;
        for layer in self.shape.owners().filter(rotated) {
            let sequence = self.sequence(id)?;
            let shadow = sequence.watched.shadow.as_ref().map(|shadow| &shadow.layers[layer]);
            for head in sequence.layers[layer].iter().chain(shadow.into_iter().flatten()) {
                let packed = head.pages().filter(|p| p.layout.k.packed().is_some());
                if let Some(position) = packed.flat_map(|p| p.positions()).find(|&&p| p >= from) {
                    return Err(RecipeError::Conflict {
                        what: "renumbering".to_owned(),
                        with: format!("packed keys behind the range: layer {layer}, position {position}"),
                        why: "keys are re-rotated, and packed ones cannot be".to_owned(),
                        change: "keep positions, or store keys as f32, f16 or bf16".to_owned(),
                    }
                    .into());
                }
            }
        }
        Ok(())
    }

    /// Copies one KV head's entries, oldest first, into dense `f32` buffers: `keys [rows, d_k]`,
    /// `values [rows, d_v]`, `rows` as [`KvCache::stored`] says. With a reducer in the recipe attention over them also needs
    /// [`KvCache::biases`].
    ///
    /// # Errors
    /// [`CacheError::Length`] for a buffer or head index that does not fit; device errors.
    pub fn gather(
        &self,
        id: SequenceId,
        layer: usize,
        head: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) -> Result<(), Error> {
        let rows = self.head(id, layer, head)?;
        let (shape, count) = (self.shape.layer(layer), rows.rows());
        let fits = |buffer, got, want| {
            if got == want { Ok(()) } else { Err(CacheError::Length { buffer, got, want }) }
        };
        fits("keys", keys.len(), count * shape.d_k)?;
        fits("values", values.len(), count * shape.d_v)?;
        let slots: Vec<u32> = (0..count as u32).collect();
        self.backend.gather(&mut GatherArgs {
            head: rows,
            slots: &slots,
            target: GatherTarget::Dense { keys, values },
        })?;
        Ok(())
    }

    /// What the recipe would keep of a layer now, without doing it: for hosts that own their cache and only
    /// want to know which entries matter.
    ///
    /// # Errors
    /// [`CacheError::Unsupported`] if the recipe never drops anything or leaves this layer alone; scoring
    /// errors.
    pub fn select(&self, id: SequenceId, layer: usize) -> Result<Selection, Error> {
        let heads = self.heads(id, layer)?;
        let Some((_, plan)) = self.plan(id)?.into_iter().find(|(l, _)| *l == layer) else {
            return Err(CacheError::Unsupported {
                what: "select",
                why: format!("the recipe {} plans nothing for layer {layer}", self.recipe),
                change: "choose a policy that drops entries, and a layer that owns its cache and has no sliding window",
            }
            .into());
        };
        Ok(Selection::of(heads, plan.heads.iter().map(|plan| plan.keep.iter().map(|&slot| slot as usize))))
    }
}
