//! Scissorhands: an entry that recent queries kept overlooking will be overlooked again.
//!
//! *Helps* because its memory is bits, not sums: one outlier query cannot keep an entry alive, and old fame
//! fades after `history` queries. *Hurts* by feeding the last rows one at a time, which costs more than a
//! sum, and by coarse scores: counts, with ties by age.
//!
//! For each of the last `w` query rows, `t` the number of entries that row saw:
//! ```text
//! low[j] shifts in ( a[j] < 1/t ? 1 : 0 )          s[j] = − popcount(low[j])
//! ```
//! Between equal counts the older entry goes. The released code differs from the paper: it keeps what *any*
//! of the last rows put above that row's 90th percentile, with no budget. This is the paper's rule.

use crate::columns::{ColumnSpec, ColumnsMut};
use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::score::GroupAggregate;
use crate::policy::{Feed, FeedKind, LayerScores, LayerView, Needs, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "scissorhands",
    summary: "drops what most of the last queries gave less than the mean weight",
    source: "Liu et al. 2023, arXiv:2305.17118",
    needs: "the weights of the last `history` query rows, one by one",
    args: &[
        Arg::count("history", 400, 1, MAX_HISTORY, "query rows remembered, one bit per entry each"),
        Arg::count("recent", 10, 0, usize::MAX, "last entries protected"),
        Arg::word("agg", GroupAggregate::WORDS, "how the query heads of a KV head are joined before the comparison"),
    ],
    build: Build::Score { schedule: score::BOUNDED, build },
};

/// 512 bytes per entry; also leaves the tie-break at least 11 bits of an `f32`.
const MAX_HISTORY: usize = 4096;

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(Scissorhands {
        history: args.count("history")?,
        recent: args.count("recent")?,
        agg: GroupAggregate::from_args(args)?,
    }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Scissorhands {
    /// Query rows remembered, `1 ..= 4096`.
    pub history: usize,
    /// Last entries protected.
    pub recent: usize,
    /// How the query heads of a KV head are joined before the comparison.
    pub agg: GroupAggregate,
}

impl Default for Scissorhands {
    fn default() -> Self {
        Self { history: 400, recent: 10, agg: GroupAggregate::Mean }
    }
}

impl Scissorhands {
    fn words(&self) -> usize {
        self.history.div_ceil(32)
    }

    /// Shifts `low` into an entry's bits, youngest at bit 0 of word 0, and forgets the oldest.
    fn shift_in(&self, words: &mut [u32], low: bool) {
        let mut carry = u32::from(low);
        for word in words.iter_mut() {
            (*word, carry) = (*word << 1 | carry, *word >> 31);
        }
        let spare = self.words() * 32 - self.history;
        if let Some(oldest) = words.last_mut() {
            *oldest &= u32::MAX >> spare;
        }
    }
}

impl Scorer for Scissorhands {
    fn needs(&self) -> Needs {
        Needs { feed: FeedKind::Rows { last: self.history }, ..Needs::default() }
    }

    fn columns(&self) -> Vec<ColumnSpec> {
        vec![ColumnSpec { name: "low", words: self.words() }]
    }

    fn observe(&self, feed: &Feed<'_>, columns: &mut ColumnsMut<'_>) {
        let Some(&query) = feed.queries.last() else { return };
        let mean = self.agg.join((0..feed.group()).map(|_| 1.0)) / feed.seen.max(1) as f32;
        for entry in (0..feed.positions.len()).filter(|&i| feed.sees(query, i)) {
            let weight = self.agg.join((0..feed.group()).map(|g| feed.weights(g)[entry]));
            self.shift_in(&mut columns.entry(entry)[..self.words()], weight < mean);
        }
    }

    fn protect(&self, _: usize) -> (usize, usize) {
        (0, self.recent)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let words = view.column_words("low").ok_or_else(|| score::missing_column(ENTRY.name, view, "low"))?;
        let lengths = view.lengths();
        // Age breaks ties: slot / 2^bits, below 1, is added to the count. An f32 holds 24 bits; where the
        // count and the slot need more, neighbouring slots share a step (and the older of them is kept).
        let slots = lengths.iter().copied().max().unwrap_or(0).next_power_of_two().ilog2();
        let spare = 24 - (self.history.ilog2() + 1).min(23);
        let bits = slots.min(spare);
        let step = 1.0 / (1u64 << bits) as f32;
        let mut counts = words.chunks_exact(self.words()).map(|w| w.iter().map(|w| w.count_ones()).sum::<u32>());
        let values = lengths.iter().flat_map(|&len| {
            let counts: Vec<u32> = counts.by_ref().take(len).collect();
            counts.into_iter().enumerate().map(move |(slot, low)| (slot >> (slots - bits)) as f32 * step - low as f32)
        });
        let values = values.collect();
        Ok(LayerScores { lengths, values })
    }
}
