//! What is stored and what it costs: entries, bytes used, bytes resident, bytes reserved, and the
//! configuration in force.
//!
//! Bytes are counted from allocations: `logical` is what the entries need without padding, `resident` the
//! pages in use (rows, positions, β, columns, recorded queries), `reserved` the address space or device
//! buffers held. What is shared is there once and counts once: a page in two sequences, positions in all pages that
//! hold them. *Helps* because "did memory really go down" has an answer. *Hurts* by a walk over all pages
//! per call: not for the decode loop.

use super::KvCache;
use super::sequence::{Sequence, SequenceId};
use crate::device::memory::MemoryUsage;
use crate::device::page::Page;
use crate::device::{Angles, Basis, Factors, HeadRows, Kept, Segment};
use crate::error::Error;
use crate::policy::SideKind;
use crate::store::{self, Storage};
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// One layer of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerStats {
    /// Layer index.
    pub layer: usize,
    /// Entries stored, over all KV heads.
    pub entries: usize,
    /// Of these, entries in packed pages.
    pub packed: usize,
    /// Of these, entries whose keys or values are made of factors.
    pub factored: usize,
    /// Entries dropped so far, over all KV heads.
    pub dropped: u64,
    /// Compactions that dropped something.
    pub compactions: u64,
    /// Bytes the entries need without padding, each with a position of its own.
    pub bytes_logical: usize,
    /// Bytes of pages in use and of recorded queries: what the layer adds to those before it, with which it may
    /// share positions. Pages shared with a fork count in full.
    pub bytes_resident: usize,
    /// Of these, bytes of the index.
    pub bytes_index: usize,
    /// Bytes one decode step's attention reads: with an index, what the last one read, else everything; positions that
    /// KV heads share count for each of them.
    pub bytes_read_per_step: usize,
}

/// One sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceStats {
    /// Per layer; layers that share another's cache are all zero.
    pub layers: Vec<LayerStats>,
}

impl SequenceStats {
    /// Sums over the layers (`layer` is the number of layers).
    pub fn total(&self) -> LayerStats {
        self.layers.iter().fold(LayerStats { layer: self.layers.len(), ..LayerStats::default() }, |sum, l| {
            LayerStats {
                layer: sum.layer,
                entries: sum.entries + l.entries,
                packed: sum.packed + l.packed,
                factored: sum.factored + l.factored,
                dropped: sum.dropped + l.dropped,
                compactions: sum.compactions + l.compactions,
                bytes_logical: sum.bytes_logical + l.bytes_logical,
                bytes_resident: sum.bytes_resident + l.bytes_resident,
                bytes_index: sum.bytes_index + l.bytes_index,
                bytes_read_per_step: sum.bytes_read_per_step + l.bytes_read_per_step,
            }
        })
    }
}

/// The configuration a cache really runs with. `Display` prints it, one option a line.
#[derive(Clone, Debug, PartialEq)]
pub struct EffectiveConfig {
    /// The recipe in canonical form.
    pub recipe: String,
    /// The budget.
    pub budget: String,
    /// Backend and hardware.
    pub backend: String,
    /// Entries per page of exact entries.
    pub page_entries: usize,
    /// How keys and values of the bulk are stored, per layer: `int8/int4`, and one for each KV head if they differ.
    pub storage: Vec<String>,
    /// Bytes one entry of the bulk of one KV head needs, per layer, on average over its heads: rows, position and
    /// columns, without page slack.
    pub entry_bytes: Vec<usize>,
    /// Bytes of one page of the bulk, likewise, with positions that it shares with no other.
    pub page_bytes: Vec<usize>,
    /// Declared columns with their words per entry.
    pub columns: Vec<(String, usize)>,
    /// What the recipe records of the attend calls.
    pub needs: crate::policy::Needs,
}

impl fmt::Display for EffectiveConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "recipe        {}", self.recipe)?;
        writeln!(f, "budget        {}", self.budget)?;
        writeln!(f, "backend       {}", self.backend)?;
        writeln!(f, "storage       {}", Compact(&self.storage))?;
        writeln!(
            f,
            "page          {} exact entries; {} bytes",
            self.page_entries,
            Compact(&self.page_bytes)
        )?;
        writeln!(f, "entry         {} bytes", Compact(&self.entry_bytes))?;
        let columns: Vec<String> =
            self.columns.iter().map(|(name, words)| format!("{name} ({} bytes)", words * 4)).collect();
        writeln!(
            f,
            "columns       {}",
            if columns.is_empty() { "none".to_owned() } else { columns.join(", ") }
        )?;
        write!(f, "needs         last {} queries, feed {:?}", self.needs.queries, self.needs.feed)?;
        match self.needs.side {
            SideKind::None => {}
            side => write!(f, ", side input {side:?}")?,
        }
        f.write_str(if self.needs.replay { ", a replay of the context" } else { "" })
    }
}

/// One value if all layers agree, else all of them, equal neighbours together.
struct Compact<'a, T>(&'a [T]);

impl<T: fmt::Display + PartialEq> fmt::Display for Compact<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, run) in self.0.chunk_by(|a, b| a == b).enumerate() {
            f.write_str(if i > 0 { ", " } else { "" })?;
            match run.len() == self.0.len() {
                true => write!(f, "{}", run[0])?,
                false => write!(f, "{} × {}", run.len(), run[0])?,
            }
        }
        Ok(())
    }
}

/// Storage of a layer's heads in words.
fn describe(heads: &[Storage]) -> String {
    let words: Vec<String> = heads.iter().map(|s| format!("{}/{}", s.bulk().k, s.bulk().v)).collect();
    match words.first() {
        Some(first) if words.iter().all(|w| w == first) => first.clone(),
        _ => words.join(" "),
    }
}

fn mean(heads: &[Storage], bytes: impl Fn(&Storage) -> usize) -> usize {
    heads.iter().map(bytes).sum::<usize>().div_ceil(heads.len().max(1))
}

/// Memory counted so far, by address.
#[derive(Default)]
struct Counted {
    pages: HashSet<*const Page>,
    positions: HashSet<*const i32>,
    angles: HashSet<*const Angles>,
}

impl Counted {
    /// Bytes that a layer of a sequence, the shadow of a guarded one included, adds to what is counted.
    fn add(&mut self, sequence: &Sequence, layer: usize) -> usize {
        let shadow = sequence.watched.shadow.as_ref().map(|shadow| &shadow.layers[layer]);
        let heads = sequence.layers[layer].iter().chain(shadow.into_iter().flatten());
        sequence.queries[layer].bytes() + sequence.reads[layer].rebuilt.bytes() + self.pages(heads)
    }

    /// Bytes that the index of a layer adds.
    fn add_index(&mut self, sequence: &Sequence, layer: usize) -> usize {
        sequence.reads[layer].index.as_ref().map_or(0, |index| self.pages(index.rows()) + index.list_bytes())
    }

    fn pages<'a>(&mut self, heads: impl Iterator<Item = &'a HeadRows>) -> usize {
        let mut bytes = 0;
        for segment in heads.flat_map(|head| head.segments.iter().chain(&head.open)) {
            if let Some(factors) = &segment.factors {
                bytes += self.factors(factors);
            }
            for page in &segment.pages {
                if self.pages.insert(Arc::as_ptr(page)) {
                    bytes += store::block_bytes(&segment.layout) + store::metadata_bytes(page);
                }
                if self.positions.insert(page.positions.as_ptr()) {
                    bytes += store::positions_bytes(page.positions.len());
                }
            }
        }
        bytes
    }

    /// Bytes that factors add: latent rows and angles, which heads and layers share, bases, and keys beside them.
    fn factors(&mut self, factors: &Factors) -> usize {
        let basis =
            |b: &Basis| Segment { pages: vec![Arc::clone(&b.page)], ..Segment::new(Arc::clone(&b.layout)) };
        let bases = [&factors.keys, &factors.values].into_iter().flatten().map(basis);
        let heads: Vec<HeadRows> = std::iter::once(Segment::clone(&factors.latents))
            .chain(bases)
            .chain(factors.kept.iter().map(|kept| Segment::clone(&kept.keys)))
            .map(|segment| HeadRows::new(vec![segment]))
            .collect();
        let angles = factors.angles.as_ref().filter(|angles| self.angles.insert(Arc::as_ptr(angles)));
        let rows = factors.rows.as_ref().map_or(0, |rows| size_of_val(&**rows))
            + factors.kept.as_ref().map_or(0, |kept| size_of_val(&*kept.latents));
        self.pages(heads.iter()) + angles.map_or(0, |angles| angles.bytes()) + rows
    }
}

/// Factors counted so far, by address of what heads and layers share.
#[derive(Default)]
struct LogicalFactors(HashSet<*const Segment>);

impl LogicalFactors {
    /// Bytes that the factors of some segments need without padding.
    fn add<'a>(&mut self, segments: impl Iterator<Item = &'a Segment>) -> usize {
        let mut bytes = 0;
        for factors in segments.filter_map(|s| s.factors.as_deref()) {
            bytes += factors.basis_bytes() + factors.kept.as_ref().map_or(0, Kept::bytes);
            if self.0.insert(Arc::as_ptr(&factors.latents)) {
                bytes += factors.latents.rows * factors.latent_bytes();
            }
        }
        bytes
    }
}

impl KvCache {
    /// What one sequence stores.
    ///
    /// # Errors
    /// [`crate::error::CacheError::NoSequence`].
    pub fn stats(&self, id: SequenceId) -> Result<SequenceStats, Error> {
        let sequence = self.sequence(id)?;
        let (mut counted, mut latents) = (Counted::default(), LogicalFactors::default());
        let layers = sequence.layers.iter().enumerate().map(|(layer, heads)| {
            let counters = sequence.counters[layer];
            let segments = || heads.iter().flat_map(|h| &h.segments);
            let rows = counted.add(sequence, layer);
            let bytes_index = counted.add_index(sequence, layer);
            let read = sequence.reads[layer].report.map(|report| report.bytes);
            LayerStats {
                layer,
                entries: heads.iter().map(|h| h.rows()).sum(),
                packed: segments()
                    .filter(|s| s.factors.is_none() && !s.layout.is_exact())
                    .map(|s| s.rows)
                    .sum(),
                factored: segments().filter(|s| s.factors.is_some()).map(|s| s.rows).sum(),
                dropped: counters.dropped,
                compactions: counters.compactions,
                bytes_logical: segments().map(|s| s.rows * s.layout.entry_bytes()).sum::<usize>()
                    + latents.add(segments()),
                bytes_resident: rows + bytes_index,
                bytes_index,
                bytes_read_per_step: read.unwrap_or_else(|| heads.iter().map(store::bytes_read).sum()),
            }
        });
        Ok(SequenceStats { layers: layers.collect() })
    }

    /// Bytes of everything this cache stores: pages that sequences share are counted once, and so are positions that
    /// pages share. `peak` and `reserved` are the backend's, over all caches that share it.
    pub fn memory(&self) -> MemoryUsage {
        let mut counted = Counted::default();
        let mut resident = 0;
        for sequence in self.sequences.values() {
            for layer in 0..sequence.layers.len() {
                resident += counted.add(sequence, layer) + counted.add_index(sequence, layer);
            }
        }
        let backend = self.backend.memory();
        MemoryUsage { resident, reserved: backend.reserved.max(resident), peak: backend.peak }
    }

    /// The configuration in force.
    pub fn config(&self) -> EffectiveConfig {
        let layers = 0..self.shape.layers();
        EffectiveConfig {
            recipe: self.recipe.to_string(),
            budget: self.budget.map_or_else(|| "none".to_owned(), |b| b.to_string()),
            backend: format!("{}: {}", self.backend.name(), self.backend.describe()),
            page_entries: self.page_entries,
            storage: layers.clone().map(|l| describe(&self.storage[l])).collect(),
            entry_bytes: layers.clone().map(|l| mean(&self.storage[l], |s| s.bulk().entry_bytes())).collect(),
            page_bytes: layers.map(|l| mean(&self.storage[l], |s| store::page_bytes(s.bulk()))).collect(),
            columns: self.columns.specs().iter().map(|s| (s.name.to_owned(), s.words)).collect(),
            needs: self.needs,
        }
    }
}
