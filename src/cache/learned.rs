//! Loading cartridges: trained entries become the first ordinary entries of a sequence.
//!
//! *Helps* because everything downstream is as for tokens: forks share the pages, batches attend to them, positions continue
//! behind them. *Hurts* by one copy for each sequence that loads one itself: load once, then fork.

use super::{KvCache, SequenceId};
use crate::device::page::Side;
use crate::error::{CacheError, Error, LearnedError};
use crate::geometry::{KeyPhase, Position};
use crate::kernel::rope::{RopeArgs, RopeTarget};
use crate::learned::Cartridge;
use crate::store::{self, NewRows};
use std::ops::Range;

/// At which angles the keys of a cartridge stand that is not the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CartridgePositions {
    /// As trained, each for positions `0 .. p` of its own: what the paper composes. Tokens then see earlier cartridges, and
    /// later ones just the same, as if nothing stood between.
    #[default]
    AsTrained,
    /// Turned to the positions they are stored at, as if the cartridges had been trained one behind another. Needs rotary
    /// descriptions; nobody has published what it does to answers.
    Shifted,
}

/// How a cartridge is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LoadOptions {
    /// What becomes of the angles of its keys.
    pub positions: CartridgePositions,
    /// Whether a recipe that packs entries, or makes products of low rank of them, may do so with learned ones too. Nobody has published what that does to answers.
    pub packed: bool,
}

impl KvCache {
    /// Copies a cartridge into a sequence that has no tokens yet, behind the cartridges it has, and gives the positions it takes.
    /// All of its entries are stored; the next token's position ([`KvCache::next_position`]) is the one after the last. Entries
    /// count as prompt where a budget is a fraction of it.
    ///
    /// Keys are not re-rotated unless [`LoadOptions::positions`] asks: a second cartridge keeps the angles it was trained
    /// with. To share the pages between requests, load into one sequence and [`KvCache::fork`] it. A host that looks sequences
    /// up by their text must make the cartridges, in order, part of the key.
    ///
    /// # Errors
    /// [`LearnedError`] if it does not fit the model, the recipe drops or packs entries, the model has sliding windows, or the sequence
    /// has tokens; [`CacheError::NoSequence`], [`CacheError::PositionOverflow`]; device errors. The sequence is as before.
    pub fn load_cartridge(
        &mut self,
        id: SequenceId,
        cartridge: &Cartridge,
        options: LoadOptions,
    ) -> Result<Range<Position>, Error> {
        cartridge.check(&self.shape)?;
        let sequence = self.sequence(id)?;
        let (start, learned) = (sequence.next, sequence.learned);
        if start != learned {
            return Err(LearnedError::Occupied { sequence: id.0, next: start, learned }.into());
        }
        let tokens = cartridge.tokens();
        let Some(end) = i32::try_from(tokens).ok().and_then(|tokens| start.checked_add(tokens)) else {
            return Err(CacheError::PositionOverflow { next: start, new: tokens }.into());
        };
        self.check_keeps(end as usize, options)?;
        let shifted = options.positions == CartridgePositions::Shifted && start > 0;
        let rotates = |&layer: &usize| {
            let layer = self.shape.layer(layer);
            layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope
        };
        if let Some(layer) = self.shape.owners().find(rotates).filter(|_| shifted) {
            return Err(LearnedError::NoRotary { layer, position: start }.into());
        }
        let positions: Vec<i32> = (start..end).collect();
        if let Err(error) = self.append_cartridge(id, cartridge, &positions, (shifted, options.packed)) {
            // Layers and heads done so far go back.
            for head in self.sequence_mut(id)?.stores().flatten().flatten() {
                let rows = store::rows_below(head, start);
                store::truncate_rows(head, rows);
            }
            return Err(error);
        }
        let sequence = self.sequence_mut(id)?;
        (sequence.next, sequence.learned) = (end, end);
        if sequence.prefill_open {
            sequence.prompt_tokens += tokens;
        }
        Ok(Position(start)..Position(end))
    }

    /// Positions of a sequence, from 0, that hold learned entries.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn learned(&self, id: SequenceId) -> Result<Range<Position>, CacheError> {
        Ok(Position(0)..Position(self.sequence(id)?.learned))
    }

    /// Refuses recipes and models under which the first `tokens` entries would not stay as they are.
    fn check_keeps(&self, tokens: usize, options: LoadOptions) -> Result<(), LearnedError> {
        let recipe = || self.recipe.to_string();
        if self.recipe.policy.compresses() {
            return Err(LearnedError::Evicts { recipe: recipe() });
        }
        let windows = self.shape.iter().enumerate().find_map(|(layer, shape)| Some((layer, shape.window?)));
        if let Some((layer, window)) = windows {
            return Err(LearnedError::Window { layer, window });
        }
        let sinks = self.recipe.precision.exact.sinks;
        if self.recipe.low_rank.is_some() && sinks < tokens && !options.packed {
            return Err(LearnedError::Packs { recipe: recipe(), sinks, tokens });
        }
        let mut packed = self.storage.iter().flatten().filter_map(|storage| storage.packed.as_ref());
        if let Some(packed) = packed.find(|packed| packed.sinks < tokens && !options.packed) {
            return Err(LearnedError::Packs { recipe: recipe(), sinks: packed.sinks, tokens });
        }
        Ok(())
    }

    fn append_cartridge(
        &mut self,
        id: SequenceId,
        cartridge: &Cartridge,
        positions: &[i32],
        (shifted, packed): (bool, bool),
    ) -> Result<(), Error> {
        let start = positions.first().copied().unwrap_or_default();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (index, layer) in self.shape.owners().enumerate() {
            let shape = self.shape.layer(layer);
            let rotary = shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope);
            let table =
                rotary.filter(|_| shifted).map(|rotary| rotary.table(positions.iter().map(|_| start)));
            keys.resize(positions.len() * shape.d_k, 0.0);
            values.resize(positions.len() * shape.d_v, 0.0);
            for head in 0..shape.kv_heads {
                cartridge.read(index, head, &mut keys, &mut values);
                if let (Some(rotary), Some(table)) = (rotary, &table) {
                    self.backend.rope(&mut RopeArgs {
                        layout: rotary.layout,
                        dims: rotary.dims,
                        table,
                        target: RopeTarget::Dense { rows: &mut keys, dim: shape.d_k },
                    })?;
                }
                let storage = &self.storage[layer][head];
                let sides = [("k", Side::Key, &keys, shape.d_k), ("v", Side::Value, &values, shape.d_v)];
                for (tensor, side, rows, d) in sides {
                    // What stays exact need not fit the packed format.
                    let (now, later) = storage.stored(side);
                    let stored = if packed && later.largest(d) < now.largest(d) { later } else { now };
                    let limit = stored.largest(d);
                    if let Some(at) = rows.iter().position(|x| x.is_nan() || x.abs() > limit) {
                        let (value, entry, dim, stored) = (rows[at], at / d, at % d, stored.to_string());
                        return Err(
                            LearnedError::Range { layer, tensor, value, head, entry, dim, stored }.into()
                        );
                    }
                }
                let new = NewRows { positions, keys: &keys, values: &values };
                let Some(sequence) = self.sequences.get_mut(&id.0) else {
                    return Err(CacheError::NoSequence(id.0).into());
                };
                for layers in sequence.stores() {
                    store::append(&*self.backend, &storage.exact, &mut layers[layer][head], new)?;
                }
            }
        }
        Ok(())
    }
}
