//! Which entries of a KV head a call reads: what an index chose, as runs of slots.
//!
//! *Helps* because one form serves pages, clusters and single entries: consecutive slots join into one run, which a
//! kernel reads in place, and lone slots stay lone, which it gathers. *Hurts* a selection of scattered entries by eight
//! bytes each.

use super::expect_len;
use crate::device::HeadRows;
#[cfg(feature = "gpu")]
use crate::device::page::PageRef;
use crate::error::KernelError;
use std::ops::Range;

/// Consecutive slots `start .. end` of a KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First slot.
    pub start: u32,
    /// One past the last.
    pub end: u32,
}

impl Span {
    /// How many slots.
    pub fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    /// Whether there are none. Spans of a [`Spans`] never are.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// The slots.
    pub fn slots(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Those among `slots`, which it must meet.
    pub fn within(self, slots: &Range<usize>) -> Range<usize> {
        self.slots().start.max(slots.start)..self.slots().end.min(slots.end)
    }
}

/// Entries of one KV head: ascending runs that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    spans: Vec<Span>,
    rows: usize,
}

impl Spans {
    /// Forgets all spans and keeps the memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.rows = 0;
    }

    /// Adds slots behind those that are there; a run that starts where the last one ends prolongs it, an empty one adds
    /// nothing.
    ///
    /// # Panics
    /// If the run starts before the last one ends, or behind `u32`.
    pub fn push(&mut self, slots: Range<usize>) {
        if slots.is_empty() {
            return;
        }
        assert!(u32::try_from(slots.end).is_ok(), "slot {} is beyond u32", slots.end);
        let span = Span { start: slots.start as u32, end: slots.end as u32 };
        match self.spans.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            Some(last) => {
                assert!(last.end < span.start, "slot {} follows slot {}", span.start, last.end);
                self.spans.push(span);
            }
            None => self.spans.push(span),
        }
        self.rows += slots.len();
    }

    /// Adds the slots whose bits are set, slot 0 being the lowest of the first word.
    ///
    /// # Panics
    /// If a bit is set before the last run ends, or there are more words than `u32` has slots.
    pub fn push_bits(&mut self, words: &[u64]) {
        assert!(words.len() <= 1 << 26, "{} words of slots", words.len());
        let first = words.iter().position(|&word| word != 0).unwrap_or(words.len());
        let count: usize = words[first..].iter().map(|word| word.count_ones() as usize).sum();
        let Some(word) = words.get(first) else { return };
        let (start, before) =
            (64 * first as u32 + word.trailing_zeros(), self.spans.last().map_or(0, |s| s.end));
        assert!(before <= start, "slot {start} follows slot {before}");
        self.rows += count;
        self.spans.reserve(count);
        let mut last = self.spans.pop().unwrap_or(Span { start, end: start });
        for (word, &bits) in words.iter().enumerate().skip(first) {
            let mut left = bits;
            while left != 0 {
                let start = 64 * word as u32 + left.trailing_zeros();
                // Carries through the run, and sets the bit behind it.
                let carried = left.wrapping_add(left & left.wrapping_neg());
                let len = match carried {
                    0 => 64 - left.trailing_zeros(),
                    _ => carried.trailing_zeros() - left.trailing_zeros(),
                };
                left &= carried;
                if last.end == start {
                    last.end += len;
                } else {
                    self.spans.push(last);
                    last = Span { start, end: start + len };
                }
            }
        }
        self.spans.push(last);
    }

    /// The runs, ascending.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Entries in all runs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The slots, ascending.
    pub fn slots(&self) -> impl Iterator<Item = usize> + '_ {
        self.spans.iter().flat_map(|s| s.slots())
    }

    /// The runs among some slots, cut to them.
    pub fn among(&self, slots: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let first = self.spans.partition_point(|s| s.slots().end <= slots.start);
        let (start, end) = (slots.start, slots.end);
        let meets = self.spans[first..].iter().take_while(move |s| s.slots().start < end);
        meets.map(move |s| s.within(&(start..end)))
    }

    /// How many of some slots are in a run.
    pub fn rows_in(&self, slots: Range<usize>) -> usize {
        self.among(slots).map(|run| run.len()).sum()
    }

    /// What is between the runs, up to `rows` entries: the slots that are not read.
    pub fn gaps(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let starts = std::iter::once(0).chain(self.spans.iter().map(|s| s.end as usize));
        let ends = self.spans.iter().map(|s| s.start as usize).chain(std::iter::once(rows));
        starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty())
    }

    /// The pages of a head that some spans meet, each with the slots there, in runs of at most `most`.
    #[cfg(feature = "gpu")]
    pub(crate) fn in_pages<'a, 's>(
        head: &'a HeadRows,
        spans: &'s [Span],
        most: usize,
    ) -> impl Iterator<Item = (PageRef<'a>, impl Iterator<Item = Range<usize>> + use<'s>)> {
        let mut rest = spans;
        head.pages().filter_map(move |page| {
            let slots = page.first..page.first + page.rows;
            let met = &rest[..rest.partition_point(|s| s.slots().start < slots.end)];
            // A span that goes on is met again on the next page.
            let goes_on = usize::from(met.last()?.slots().end > slots.end);
            rest = &rest[met.len() - goes_on..];
            let runs = met.iter().flat_map(move |span| {
                let run = span.within(&slots);
                run.clone().step_by(most).map(move |start| start..(start + most).min(run.end))
            });
            Some((page, runs))
        })
    }

    /// Checks that there is one set of spans per head, and that all their slots are there.
    ///
    /// # Errors
    /// [`KernelError::Length`].
    pub fn validate(kernel: &'static str, spans: &[Self], heads: &[HeadRows]) -> Result<(), KernelError> {
        expect_len(kernel, "spans", spans.len(), heads.len())?;
        for (spans, head) in spans.iter().zip(heads) {
            let (end, rows) = (spans.spans.last().map_or(0, |s| s.end as usize), head.rows());
            if end > rows {
                let buffer = "entries that spans name";
                return Err(KernelError::Length { kernel, buffer, got: end, want: rows });
            }
        }
        Ok(())
    }
}

impl FromIterator<Range<usize>> for Spans {
    fn from_iter<T: IntoIterator<Item = Range<usize>>>(runs: T) -> Self {
        let mut spans = Self::default();
        runs.into_iter().for_each(|run| spans.push(run));
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_are_one_and_gaps_are_the_rest() {
        let spans: Spans = [0..4, 4..6, 9..9, 10..11].into_iter().collect();
        assert_eq!(spans.spans(), [Span { start: 0, end: 6 }, Span { start: 10, end: 11 }]);
        assert_eq!(spans.rows(), 7);
        assert_eq!(spans.slots().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 10]);
        assert_eq!(spans.gaps(13).collect::<Vec<_>>(), [6..10, 11..13]);
        assert_eq!([0..13, 5..10, 6..10, 5..11].map(|slots| spans.rows_in(slots)), [7, 1, 0, 2]);
        assert!(Spans::default().gaps(3).eq(std::iter::once(0..3)));
        assert!(spans.gaps(11).eq(std::iter::once(6..10)));
    }

    #[test]
    fn bits_are_runs_as_slots_are() {
        let sets: [&[u32]; 6] = [
            &[],
            &[0],
            &[63, 64, 65, 127, 128],
            &[5, 6, 7, 9, 62, 63],
            &[64, 66, 67, 190, 191],
            &(0..192).collect::<Vec<_>>(),
        ];
        for set in sets {
            let mut words = [0u64; 3];
            set.iter().for_each(|&slot| words[slot as usize / 64] |= 1 << (slot % 64));
            // Behind what is there, joined to it where they touch.
            for before in [0, set.first().map_or(0, |&slot| slot as usize)] {
                let mut got: Spans = std::iter::once(0..before).collect();
                let mut want = got.clone();
                got.push_bits(&words);
                set.iter().for_each(|&slot| want.push(slot as usize..slot as usize + 1));
                assert_eq!(got, want, "{set:?} behind {before}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "slot 3 follows slot 4")]
    fn bits_ascend_behind_what_is_there() {
        let mut spans: Spans = std::iter::once(0..4).collect();
        spans.push_bits(&[0b1000]);
    }

    #[test]
    #[should_panic(expected = "slot 3 follows slot 4")]
    fn runs_ascend() {
        let _: Spans = [0..4, 3..5].into_iter().collect();
    }
}
