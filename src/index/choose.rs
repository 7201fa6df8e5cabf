//! The stages *group* and *choose* on the units of one KV head: from logits to the units that are read, best first, and
//! what is left behind.
//!
//! Plain numbers in, plain numbers out, the same for every method and backend. Ties go to the older unit. *Helps*
//! because the whole of a selection is here to be read and tested. *Hurts* nothing: it touches one number per query row
//! and unit.

use super::Group;
use crate::kernel::simd::weights;
use std::cmp::Ordering;

/// One score of so many goes to a sample.
const SAMPLE: usize = 16;

/// What the rows of one KV head think of its units, and which are taken so far.
#[derive(Clone, Debug, Default)]
pub struct Ranking {
    /// `[rows, units]`: weights relative to the row's `reference`.
    weights: Vec<f32>,
    rows: usize,
    units: usize,
    /// Largest logit of each row, its sinks and recent entries included.
    references: Vec<f32>,
    /// Sum of the weights of each row.
    all: Vec<f64>,
    /// The same without what is taken, as a running difference.
    left: Vec<f64>,
    /// What of both is in no unit.
    beside: Vec<f64>,
    /// Score of each group of `fold` neighbouring units.
    scores: Vec<f32>,
    fold: usize,
    /// Groups, or none as long as nothing was put in order: the first `ranked` are the best ones, best first.
    order: Vec<u32>,
    ranked: usize,
    /// How many of them are taken.
    taken: usize,
    /// One row's logits and its best units, for [`Group::Union`].
    each: Vec<f32>,
    ranks: Vec<u32>,
    /// Scores in some order.
    copy: Vec<f32>,
}

impl Ranking {
    /// Takes in the logits of a KV head's units (`[rows, units]`) and of what every row reads anyway (`zone [rows]`, a
    /// log-sum-exp), and scores groups of `fold` units; with `sizes`, by one member's weight instead of all's. Nothing is
    /// taken yet, and no more than `most` units are to be.
    ///
    /// # Panics
    /// If `logits` is not a multiple of `zone`, or `fold` is 0.
    pub fn set(
        &mut self,
        logits: &[f32],
        zone: &[f32],
        (group, fold, most): (Group, usize, usize),
        sizes: Option<&dyn Fn(usize) -> usize>,
    ) {
        assert!(fold > 0, "groups of no unit");
        self.set_weights(logits, zone);
        self.fold = fold;
        self.score(logits, zone, (group, most), sizes);
        // No zero is less than another.
        if matches!(group, Group::Logit | Group::Mean) {
            self.scores.iter_mut().for_each(|score| *score += 0.0);
        }
    }

    /// Ranks units before all others.
    ///
    /// # Panics
    /// If units are chosen several at a time, or there are none of that number.
    pub fn put_first(&mut self, units: &[u32]) {
        assert!(self.fold == 1, "groups of {} units", self.fold);
        units.iter().for_each(|&unit| self.scores[unit as usize] = f32::MAX);
    }

    /// The same without scores: for what units weigh, and not for taking any.
    ///
    /// # Panics
    /// If `logits` is not a multiple of `zone`.
    pub fn set_weights(&mut self, logits: &[f32], zone: &[f32]) {
        self.rows = zone.len();
        self.units = logits.len().checked_div(self.rows).unwrap_or(0);
        assert!(self.rows * self.units == logits.len(), "{} logits", logits.len());
        self.weigh(logits, zone);
        (self.fold, self.ranked, self.taken) = (1, 0, 0);
        self.left.clone_from(&self.all);
        self.beside.clear();
        self.beside.resize(self.rows, 0.0);
        self.scores.clear();
        self.order.clear();
    }

    /// Counts what weighs `beside` the units in each row (logarithms) and is never taken: it is left, and a share of all.
    pub fn leave(&mut self, beside: &[f32]) {
        self.beside.clear();
        self.beside
            .extend(beside.iter().zip(&self.references).map(|(&x, &r)| (f64::from(x) - f64::from(r)).exp()));
        let totals = self.all.iter_mut().zip(&mut self.left).zip(&self.beside);
        totals.for_each(|((all, left), beside)| {
            *all += beside;
            *left += beside;
        });
    }

    fn weigh(&mut self, logits: &[f32], zone: &[f32]) {
        // What was there is overwritten.
        self.weights.resize(logits.len(), 0.0);
        self.references.clear();
        self.all.clear();
        if self.units == 0 {
            self.references.extend_from_slice(zone);
            self.all.resize(self.rows, 0.0);
            return;
        }
        let rows = logits.chunks_exact(self.units).zip(self.weights.chunks_exact_mut(self.units));
        for ((logits, line), &zone) in rows.zip(zone) {
            let reference = weights::largest(logits).max(zone);
            // Nothing is seen at all: any finite reference makes all weights 0.
            let reference = if reference == f32::NEG_INFINITY { 0.0 } else { reference };
            self.all.push(weights::weigh(logits, reference, line));
            self.references.push(reference);
        }
    }

    fn score(
        &mut self,
        logits: &[f32],
        zone: &[f32],
        (group, most): (Group, usize),
        sizes: Option<&dyn Fn(usize) -> usize>,
    ) {
        let units = self.units;
        self.scores.clear();
        let start = if matches!(group, Group::Sum | Group::Mean) { 0.0 } else { f32::NEG_INFINITY };
        self.scores.resize(units, start);
        let mut ranks = std::mem::take(&mut self.ranks);
        for (row, &zone) in zone.iter().enumerate() {
            let logits = logits.get(row * units..(row + 1) * units).unwrap_or(&[]);
            let line = &self.weights[row * units..(row + 1) * units];
            let all = self.all[row] + f64::from(zone - self.references[row]).exp();
            let share = if all > 0.0 { (1.0 / all) as f32 } else { 0.0 };
            let scores = self.scores.iter_mut();
            match group {
                Group::Max => weights::keep_larger(&mut self.scores, line, share),
                Group::Sum => weights::add_scaled(&mut self.scores, line, share),
                Group::Logit => scores.zip(logits).for_each(|(s, x)| *s = s.max(*x)),
                Group::Mean => scores.zip(logits).for_each(|(s, x)| *s += x / self.rows as f32),
                Group::Union => {
                    let one = |unit: u32| {
                        logits[unit as usize] - sizes.map_or(0.0, |n| (n(unit as usize) as f32).ln())
                    };
                    self.each.clear();
                    // No zero is less than another.
                    self.each.extend((0..units as u32).map(|unit| one(unit) + 0.0));
                    best_of(&self.each, most, &mut self.copy, &mut ranks);
                    let each = &self.each;
                    ranks.sort_unstable_by(|&a, &b| best_first(each, a, b));
                    // Rank and row in one number: at equal rank the first row's unit comes first.
                    for (rank, &unit) in ranks.iter().enumerate() {
                        let turn = -((rank * self.rows + row) as f32);
                        let score = &mut self.scores[unit as usize];
                        *score = score.max(turn);
                    }
                }
            }
        }
        self.ranks = ranks;
        if let Some(sizes) = sizes {
            for (unit, score) in self.scores.iter_mut().enumerate() {
                match group {
                    // Most weigh nothing where groups of units were ruled out: their sizes need not be looked up.
                    Group::Max | Group::Sum if *score == 0.0 => {}
                    Group::Max | Group::Sum => *score /= sizes(unit) as f32,
                    Group::Logit | Group::Mean => *score -= (sizes(unit) as f32).ln(),
                    Group::Union => {}
                }
            }
        }
        if self.fold > 1 {
            let groups = units.div_ceil(self.fold);
            for group in 0..groups {
                let units = group * self.fold..((group + 1) * self.fold).min(units);
                self.scores[group] = self.scores[units].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            }
            self.scores.truncate(groups);
        }
    }

    /// Sees to it that the first `count` groups of the order are the best ones.
    fn rank(&mut self, count: usize) {
        let count = count.min(self.scores.len());
        if count <= self.ranked {
            return;
        }
        if self.order.is_empty() {
            self.order.extend(0..self.scores.len() as u32);
        }
        let scores = &self.scores;
        let rest = &mut self.order[self.ranked..];
        let wanted = count - self.ranked;
        if wanted < rest.len() {
            rest.select_nth_unstable_by(wanted, |&a, &b| best_first(scores, a, b));
        }
        rest[..wanted].sort_unstable_by(|&a, &b| best_first(scores, a, b));
        self.ranked = count;
    }

    /// Units of a group.
    fn units_of(&self, group: u32) -> std::ops::Range<usize> {
        let start = group as usize * self.fold;
        start..(start + self.fold).min(self.units)
    }

    /// Takes the best groups that are left, one after another, while `wanted` says so; it is told the members and the
    /// weights left behind in each row, relative to [`Ranking::reference`]. Gives the units taken now, ascending. About
    /// `expected` groups are put in order at once.
    pub fn take(
        &mut self,
        expected: usize,
        count: impl Fn(usize) -> usize,
        mut wanted: impl FnMut(usize, &Self) -> bool,
        units: &mut Vec<u32>,
    ) {
        units.clear();
        while self.taken < self.scores.len() {
            if self.taken == self.ranked {
                // More at a time the further it goes.
                self.rank((2 * self.ranked).max(expected).max(64));
            }
            let group = self.units_of(self.order[self.taken]);
            if !wanted(group.clone().map(&count).sum(), self) {
                break;
            }
            for row in 0..self.rows {
                for unit in group.clone() {
                    self.left[row] -= f64::from(self.weights[row * self.units + unit]);
                }
            }
            units.extend(group.map(|unit| unit as u32));
            self.taken += 1;
        }
        units.sort_unstable();
    }

    /// Gives back what is taken.
    pub fn restart(&mut self) {
        self.taken = 0;
        self.left.clone_from(&self.all);
    }

    /// Takes the best `count` units (all, if there are not so many), each for itself; gives them, ascending. Nothing must be
    /// taken yet, and nothing is to be taken later: what is left of weights is not kept.
    pub fn take_best(&mut self, count: usize, units: &mut Vec<u32>) {
        self.taken = self.scores.len();
        best_of(&self.scores, count, &mut self.copy, units);
    }

    /// Lets units weigh nothing any more: what is left is then what their [`Ranking::weights`] are.
    pub fn spend(&mut self, units: &[u32]) {
        for line in self.weights.chunks_exact_mut(self.units.max(1)) {
            units.iter().for_each(|&unit| line[unit as usize] = 0.0);
        }
    }

    /// The score of the group that [`Ranking::take`] asks about.
    pub fn next_score(&self) -> f32 {
        self.order.get(self.taken).map_or(f32::NEG_INFINITY, |&group| self.scores[group as usize])
    }

    /// Scores of all groups.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// A row's weights.
    pub fn weights(&self, row: usize) -> &[f32] {
        &self.weights[row * self.units..(row + 1) * self.units]
    }

    /// Units.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Query rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The logit that weights of a row are relative to.
    pub fn reference(&self, row: usize) -> f32 {
        self.references[row]
    }

    /// Sum of a row's weights over all units and beside.
    pub fn all(&self, row: usize) -> f64 {
        self.all[row]
    }

    /// The same over the units that are not taken, as a running difference.
    pub fn left(&self, row: usize) -> f64 {
        self.left[row].max(0.0)
    }

    /// The same summed anew: no cancellation, so a bound stays a bound. `taken` is ascending.
    pub fn left_exactly(&self, row: usize, taken: &[u32]) -> f64 {
        self.beside[row] + weights::sum_without(self.weights(row), taken)
    }
}

/// The best `count` (all, if there are not so many), ascending by index; of equals the first. `copy` is lent.
fn best_of(scores: &[f32], count: usize, copy: &mut Vec<f32>, best: &mut Vec<u32>) {
    best.clear();
    best.reserve(count.min(scores.len()));
    if count >= scores.len() {
        best.extend(0..scores.len() as u32);
    } else if count > 0 {
        let (least, above) = last_of_best(scores, count, copy);
        weights::best(scores, (least, count - above), best);
    }
}

/// The lowest score of the best `count`, fewer than there are and not none, and how many are above it.
fn last_of_best(scores: &[f32], count: usize, copy: &mut Vec<f32>) -> (f32, usize) {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    copy.clear();
    // As much as it may come to, so that it grows when scores do and not whenever more of them are alike.
    copy.reserve(scores.len());
    copy.extend(scores.iter().step_by(SAMPLE));
    // Of a sample the place is about known; what lies around it there holds the score that is looked for.
    let place = count * copy.len() / scores.len();
    let slack = SAMPLE + 4 * place.isqrt();
    let (mut low, mut high) = (f32::NEG_INFINITY, f32::INFINITY);
    if place + slack < copy.len() {
        low = *copy.select_nth_unstable_by(place + slack, descending).1;
        if let Some(before) = place.checked_sub(slack) {
            high = *copy[..place + slack].select_nth_unstable_by(before, descending).1;
        }
    }
    let mut above = weights::between(scores, (low, high), copy);
    if above >= count || above + copy.len() < count {
        // The sample was unlike the others.
        copy.clear();
        copy.extend_from_slice(scores);
        above = 0;
    }
    let (better, &mut least, _) = copy.select_nth_unstable_by(count - above - 1, descending);
    (least, above + better.iter().filter(|&&score| score > least).count())
}

/// Higher score first, then lower index.
fn best_first(scores: &[f32], a: u32, b: u32) -> Ordering {
    scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(ranking: &mut Ranking, count: usize) -> Vec<u32> {
        let (mut units, mut left) = (Vec::new(), count);
        let wanted = |n: usize, _: &Ranking| {
            let fits = left >= n;
            left = left.saturating_sub(n);
            fits
        };
        ranking.take(1, |_| 1, wanted, &mut units);
        units
    }

    #[test]
    fn groups_agree_as_their_names_say() {
        // Two rows, four units; the second row spends its weight on what is read anyway.
        let logits = [0.0f32, 2.0, 1.0, -9.0, 5.0, 0.0, 6.0, -9.0];
        let zone = [-9.0f32, 20.0];
        let chosen = |group| {
            let mut ranking = Ranking::default();
            ranking.set(&logits, &zone, (group, 1, usize::MAX), None);
            take(&mut ranking, 2)
        };
        assert_eq!(chosen(Group::Max), [1, 2]);
        assert_eq!(chosen(Group::Sum), [1, 2]);
        assert_eq!(chosen(Group::Logit), [0, 2]);
        assert_eq!(chosen(Group::Mean), [0, 2]);
        assert_eq!(chosen(Group::Union), [1, 2]);
    }

    #[test]
    fn folded_units_are_taken_together_by_the_best_of_them() {
        let mut ranking = Ranking::default();
        ranking.set(&[0.0, 1.0, 3.0, -4.0, 2.0], &[0.0], (Group::Logit, 2, usize::MAX), None);
        assert_eq!(take(&mut ranking, 3), [2, 3, 4]);
    }

    #[test]
    fn the_best_are_those_that_are_taken_first_and_the_older_of_equals() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 23) as f32 * 0.1).collect();
        for count in [0, 1, 7, 150, 299, 300, 400] {
            let mut ranking = Ranking::default();
            ranking.set(&logits, &[0.0], (Group::Sum, 1, usize::MAX), None);
            let want = take(&mut ranking, count);
            ranking.set(&logits, &[0.0], (Group::Sum, 1, usize::MAX), None);
            let mut got = Vec::new();
            ranking.take_best(count, &mut got);
            assert_eq!(got, want, "{count}");
        }
    }

    #[test]
    fn rows_that_name_no_more_than_are_taken_name_the_same() {
        let logits: Vec<f32> = (0..900).map(|i| ((i * 137) % 293) as f32 * 0.1).collect();
        let choice = |most: usize, count: usize| {
            let mut ranking = Ranking::default();
            ranking.set(&logits, &[0.0; 3], (Group::Union, 1, most), Some(&|unit| 1 + unit % 3));
            take(&mut ranking, count)
        };
        for count in [1, 2, 40, 299, 300] {
            assert_eq!(choice(count, count), choice(usize::MAX, count), "{count}");
        }
    }

    #[test]
    fn what_is_left_is_what_was_not_taken() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 * 0.1 - 6.0).collect();
        let zone = [1.5f32];
        let mut ranking = Ranking::default();
        ranking.set(&logits, &zone, (Group::Max, 1, usize::MAX), None);
        let taken = take(&mut ranking, 140);
        let reference = f64::from(ranking.reference(0));
        let want: f64 = (0..300u32)
            .filter(|u| !taken.contains(u))
            .map(|u| (f64::from(logits[u as usize]) - reference).exp())
            .sum();
        // A difference of sums in `f32` is as exact as the sums.
        assert!((ranking.left(0) - want).abs() < 1e-6 * ranking.all(0));
        assert!((ranking.left_exactly(0, &taken) / want - 1.0).abs() < 2e-6);
        let least = taken.iter().map(|&u| logits[u as usize]).fold(f32::INFINITY, f32::min);
        assert!((0..300u32).filter(|u| !taken.contains(u)).all(|u| logits[u as usize] <= least));
    }
}
