//! Keys of one KV head that were made of factors and are kept for the steps that follow, the least recently used given up
//! first.
//!
//! Entries are remembered in chunks of neighbours, in the type of their latent rows, to which every made key is rounded:
//! a step gives the same bits whether its keys were remembered or not.
//!
//! *Helps* decode through an index: steps choose much the same entries as the step before. *Hurts* by the memory, `chunk`
//! entries times `2 d` bytes a chunk in half precision, and where choices are scattered, by the neighbours that come along.

use crate::device::HeadRows;
use crate::view::DType;
use half::{bf16, f16};

/// No place, no chunk.
const NONE: u32 = u32::MAX;

/// An entry that is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    /// Of the segments that are made of factors.
    pub(super) segment: u32,
    /// Within the segment.
    pub(super) entry: u32,
    /// Among all entries that are made of factors.
    pub(super) ordinal: u32,
}

/// What a call works with, kept so that the next one allocates nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Work {
    pub(super) picks: Vec<Pick>,
    pub(super) made: Vec<u32>,
    pub(super) entries: Vec<usize>,
    pub(super) latents: Vec<f32>,
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
    pub(super) scores: Vec<f32>,
    pub(super) sums: Vec<f32>,
    pub(super) out: Vec<f32>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// Entries of a chunk.
    chunk: usize,
    /// Chunks at most.
    capacity: usize,
    dtype: Option<DType>,
    d: usize,
    /// Where a chunk is remembered.
    places: Vec<u32>,
    /// What a place remembers, and when it was last read.
    owners: Vec<(u32, u64)>,
    clock: u64,
    /// Words of the remembered keys, a row at a time.
    rows: Vec<u32>,
    victims: Vec<(u64, u32)>,
    hits: u64,
    misses: u64,
    pub(super) work: Work,
}

impl Remembered {
    /// Remembers up to so many entries, in chunks of so many neighbours; 0 remembers nothing.
    pub fn new(entries: usize, chunk: usize) -> Self {
        let chunk = chunk.max(1);
        Self { chunk, capacity: entries / chunk, ..Self::default() }
    }

    /// Forgets all keys and gives their memory back: entries were removed before others, or moved to other positions.
    pub fn forget(&mut self) {
        *self = Self { hits: self.hits, misses: self.misses, ..self.like() };
    }

    /// One that remembers as much, and nothing yet.
    #[must_use]
    pub fn like(&self) -> Self {
        Self::new(self.capacity * self.chunk, self.chunk)
    }

    /// Memory, work space included.
    pub fn bytes(&self) -> usize {
        let work = &self.work;
        let floats = [&work.latents, &work.keys, &work.values, &work.scores, &work.sums, &work.out];
        4 * (self.rows.capacity() + self.places.capacity())
            + 16 * (self.owners.capacity() + self.victims.capacity())
            + floats.iter().map(|v| 4 * v.capacity()).sum::<usize>()
            + size_of::<Pick>() * work.picks.capacity()
            + 4 * work.made.capacity()
            + 8 * work.entries.capacity()
    }

    /// Chunks that were remembered when they were read, and that had to be made.
    pub fn counts(&self) -> (u64, u64) {
        (self.hits, self.misses)
    }

    /// Entries of a chunk.
    pub(super) fn chunk(&self) -> usize {
        self.chunk.max(1)
    }

    /// Finds places for the chunks of the picked entries, as many as fit, and lists those that must be made in `work.made`.
    /// False if nothing is to be remembered.
    ///
    /// A chunk that is read now is not given up for another: of a context that does not fit, the same part stays.
    pub(super) fn admit(&mut self, head: &HeadRows, dtype: DType, d: usize) -> bool {
        if self.capacity == 0 {
            return false;
        }
        let chunk = self.chunk as u32;
        if self.dtype != Some(dtype) || self.d != d {
            (self.dtype, self.d) = (Some(dtype), d);
            self.places.clear();
            self.owners.clear();
            self.rows.clear();
        }
        let entries: usize = head.factored().map(|(segment, ..)| segment.rows).sum();
        self.places.resize(entries.div_ceil(self.chunk), NONE);
        self.clock += 1;
        let clock = self.clock;
        let made = &mut self.work.made;
        made.clear();
        let (mut needed, mut last) = (0, NONE);
        for pick in &self.work.picks {
            let id = pick.ordinal / chunk;
            if id == last {
                continue;
            }
            last = id;
            needed += 1;
            match self.places[id as usize] {
                NONE => made.push(id),
                place => self.owners[place as usize].1 = clock,
            }
        }
        self.hits += (needed - made.len()) as u64;
        self.misses += made.len() as u64;
        let free = self.capacity - self.owners.len();
        self.victims.clear();
        if made.len() > free {
            let old = self.owners.iter().zip(0..).filter(|((_, used), _)| *used < clock);
            self.victims.extend(old.map(|((_, used), place)| (*used, place)));
            let lacking = (made.len() - free).min(self.victims.len());
            if lacking > 0 {
                self.victims.select_nth_unstable(lacking - 1);
            }
            self.victims.truncate(lacking);
            made.truncate(free + lacking);
        }
        for (i, &id) in made.iter().enumerate() {
            let place = match self.victims.get(i) {
                Some(&(_, place)) => {
                    let (owner, _) = self.owners[place as usize];
                    self.places[owner as usize] = NONE;
                    self.owners[place as usize] = (id, clock);
                    place
                }
                None => {
                    self.owners.push((id, clock));
                    self.owners.len() as u32 - 1
                }
            };
            self.places[id as usize] = place;
        }
        let words = self.owners.len() * self.chunk * row_words(dtype, d);
        if self.rows.len() < words {
            self.rows.resize(words, 0);
        }
        true
    }

    /// Whether the key of an entry is remembered.
    pub(super) fn holds(&self, ordinal: u32) -> bool {
        self.places[ordinal as usize / self.chunk] != NONE
    }

    /// The words of an entry's key.
    pub(super) fn row_mut(&mut self, ordinal: u32) -> &mut [u32] {
        let span = self.span(ordinal);
        &mut self.rows[span]
    }

    /// The same, to be read.
    pub(super) fn row(&self, ordinal: u32) -> &[u32] {
        &self.rows[self.span(ordinal)]
    }

    fn span(&self, ordinal: u32) -> std::ops::Range<usize> {
        let (chunk, within) = (ordinal as usize / self.chunk, ordinal as usize % self.chunk);
        let words = row_words(self.dtype.unwrap_or(DType::F32), self.d);
        let start = (self.places[chunk] as usize * self.chunk + within) * words;
        start..start + words
    }
}

fn row_words(dtype: DType, d: usize) -> usize {
    (d * dtype.bytes()).div_ceil(4)
}

/// A key in the type it is remembered in.
pub(super) fn narrow(dtype: DType, key: &[f32], words: &mut [u32]) {
    use half::slice::HalfFloatSliceExt;
    match dtype {
        DType::F32 => bytemuck::cast_slice_mut::<u32, f32>(words).copy_from_slice(key),
        DType::F16 => bytemuck::cast_slice_mut::<u32, f16>(words)[..key.len()].convert_from_f32_slice(key),
        DType::Bf16 => bytemuck::cast_slice_mut::<u32, bf16>(words)[..key.len()].convert_from_f32_slice(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::page::{HeadRows, PageLayout, Segment};
    use crate::device::{Encoding, Factors};
    use crate::geometry::LayerShape;
    use std::sync::Arc;

    /// A head of so many entries, of which nothing is read here but their number.
    fn head(rows: usize) -> HeadRows {
        let layout = Arc::new(PageLayout::new(
            &LayerShape::new(1, 1, 2),
            8,
            Encoding::Factored,
            Encoding::Factored,
            false,
            0,
        ));
        let latents = Arc::new(Segment::new(Arc::clone(&layout)));
        let factors = Factors { latents, keys: None, values: None, rows: None, kept: None, angles: None };
        HeadRows::new(vec![Segment { rows, factors: Some(Arc::new(factors)), ..Segment::new(layout) }])
    }

    fn read(memory: &mut Remembered, head: &HeadRows, ordinals: &[u32]) -> Option<Vec<u32>> {
        memory.work.picks = ordinals.iter().map(|&o| Pick { segment: 0, entry: o, ordinal: o }).collect();
        memory.admit(head, DType::F32, 2).then(|| memory.work.made.clone())
    }

    #[test]
    fn the_least_recently_read_chunk_goes_first() {
        let (head, mut memory) = (head(40), Remembered::new(12, 4));
        assert_eq!(read(&mut memory, &head, &[0, 1, 5]), Some(vec![0, 1]));
        assert_eq!(read(&mut memory, &head, &[3, 9]), Some(vec![2]));
        // Chunk 1 was read before chunks 0 and 2.
        assert_eq!(read(&mut memory, &head, &[20]), Some(vec![5]));
        assert_eq!(read(&mut memory, &head, &[2, 8, 21]), Some(vec![]));
        assert_eq!(read(&mut memory, &head, &[4]), Some(vec![1]));
        assert_eq!(memory.counts(), (4, 5));
        // Four chunks do not fit three places: those that are there stay, and one more comes.
        assert_eq!(read(&mut memory, &head, &[0, 4, 8, 12]), Some(vec![0]));
        assert!(memory.holds(0) && memory.holds(6) && memory.holds(8) && !memory.holds(12));
        assert_eq!(read(&mut memory, &head, &[0, 4, 8, 12]), Some(vec![]));
        memory.forget();
        assert_eq!(read(&mut memory, &head, &[4]), Some(vec![1]));
        assert_eq!(read(&mut Remembered::new(0, 4), &head, &[4]), None);
    }

    #[test]
    fn rows_of_different_chunks_do_not_meet() {
        let (head, mut memory) = (head(40), Remembered::new(16, 4));
        assert!(read(&mut memory, &head, &[0, 7, 33]).is_some());
        for ordinal in [0, 7, 33] {
            narrow(DType::F32, &[ordinal as f32, 1.0], memory.row_mut(ordinal));
        }
        for ordinal in [0, 7, 33] {
            assert_eq!(memory.row(ordinal)[0], (ordinal as f32).to_bits());
        }
    }
}
