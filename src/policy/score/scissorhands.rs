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
        Arg::word(
            "agg",
            GroupAggregate::WORDS,
            "how the query heads of a KV head are joined before the comparison",
        ),
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
        let mut counts =
            words.chunks_exact(self.words()).map(|w| w.iter().map(|w| w.count_ones()).sum::<u32>());
        let values = lengths.iter().flat_map(|&len| {
            let counts: Vec<u32> = counts.by_ref().take(len).collect();
            counts
                .into_iter()
                .enumerate()
                .map(move |(slot, low)| (slot >> (slots - bits)) as f32 * step - low as f32)
        });
        let values = values.collect();
        Ok(LayerScores { lengths, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::testing::layer::LayerCase;

    const ROWS: [[f32; 4]; 3] = [[0.6, 0.4, 1.0, 1.0], [0.1, 0.5, 0.4, 1.0], [0.1, 0.2, 0.3, 0.4]];

    fn fed(history: usize, backend: &Reference) -> (Scissorhands, LayerCase<'_>) {
        let scorer = Scissorhands { history, recent: 1, agg: GroupAggregate::Mean };
        let weights = vec![ROWS.map(|r| r.to_vec()).to_vec(); 2];
        let mut case = LayerCase::attention(backend, 1, scorer.columns(), &weights).unwrap();
        case.feed(scorer.needs().feed, |feed, columns| scorer.observe(feed, columns)).unwrap();
        (scorer, case)
    }

    #[test]
    fn counts_rows_below_the_mean_and_forgets() {
        let backend = Reference::default();
        // Means: 1/2, 1/3, 1/4. Low: row 1 {1}, row 2 {0}, row 3 {0, 1}. Entries 2 and 3 are never low.
        for (history, want) in
            [(400, [-2.0, -2.0, 0.0, 0.0]), (2, [-2.0, -1.0, 0.0, 0.0]), (1, [-1.0, -1.0, 0.0, 0.0])]
        {
            let (scorer, case) = fed(history, &backend);
            let got = scorer.score(&case.view(3)).unwrap().values;
            let age = [0.0, 0.25, 0.5, 0.75];
            let want: Vec<f32> = want.iter().zip(age).map(|(w, a)| w + a).collect();
            assert_eq!(got, want, "history {history}");
        }
    }

    #[test]
    fn of_equal_counts_the_older_goes() {
        let backend = Reference::default();
        let (scorer, case) = fed(400, &backend);
        let policy = Staged::new("scissorhands", Arc::new(scorer), Arc::new(Uniform));
        assert_eq!(policy.plan(&case.view(3)).unwrap().heads[0].keep, [1, 2, 3]);
    }

    #[test]
    fn bits_move_through_words_and_fall_off_the_end() {
        let scorer = Scissorhands { history: 40, ..Scissorhands::default() };
        let mut words = [0; 2];
        scorer.shift_in(&mut words, true);
        for _ in 0..39 {
            scorer.shift_in(&mut words, false);
        }
        assert_eq!(words, [0, 1 << 7]);
        scorer.shift_in(&mut words, true);
        assert_eq!(words, [1, 0]);
    }

    #[test]
    fn age_never_outweighs_a_count() {
        // The closest call: the oldest entry with one count fewer against the newest with one more.
        for (history, slots) in [(400usize, 15u32), (400, 20), (4096, 20), (1, 30)] {
            let spare = 24 - (history.ilog2() + 1).min(23);
            let bits = slots.min(spare);
            let step = 1.0 / (1u64 << bits) as f32;
            let newest = (((1usize << slots) - 1) >> (slots - bits)) as f32 * step - history as f32;
            let oldest = 0.0 - (history as f32 - 1.0);
            assert!(newest < oldest, "{newest} {oldest}");
            // Neighbouring steps stay apart at the largest count.
            assert!(step - history as f32 > -(history as f32));
        }
    }
}
