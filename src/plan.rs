//! A plan: for every stored entry of a layer, its fate. Policies return plans; one place in the cache
//! validates and applies them.
//!
//! *Helps* because a plan is data: it can be printed, tested, replayed, compared between backends, or taken
//! by a host that owns its own cache. *Hurts* by one pass over the kept slots, nothing next to the copy that
//! applies it.

use crate::error::PolicyError;
pub use crate::kernel::merge_rows::{Merges, Source, Target};

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fate {
    /// It stays, as it is or with others mixed into it.
    Keep,
    /// It is removed, and what it held is mixed into one or more entries that stay.
    Merge,
    /// It is removed and its memory returned.
    Drop,
}

/// The plan of one KV head.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct HeadPlan {
    /// Entries there were when the plan was made.
    pub rows: usize,
    /// Slots to keep, strictly ascending.
    pub keep: Vec<u32>,
    /// What of the others is mixed into them.
    pub merges: Merges,
}

impl HeadPlan {
    /// Keeps some slots, and mixes nothing.
    pub fn new(rows: usize, keep: Vec<u32>) -> Self {
        Self { rows, keep, merges: Merges::default() }
    }

    /// Keeps everything.
    pub fn identity(rows: usize) -> Self {
        Self::new(rows, (0..rows as u32).collect())
    }

    /// Slots that do not stay, ascending.
    pub fn leaving(&self) -> Vec<u32> {
        let mut keep = self.keep.iter().peekable();
        (0..self.rows as u32).filter(|slot| keep.next_if(|kept| *kept == slot).is_none()).collect()
    }

    /// The fate of a slot.
    ///
    /// # Panics
    /// If `slot` is not one of the plan's rows.
    pub fn fate(&self, slot: u32) -> Fate {
        assert!((slot as usize) < self.rows, "slot {slot} of {} rows", self.rows);
        if self.keep.binary_search(&slot).is_ok() {
            Fate::Keep
        } else if self.merges.sources.iter().any(|source| source.slot == slot) {
            Fate::Merge
        } else {
            Fate::Drop
        }
    }

    /// What is wrong with the merges, if anything.
    fn mixed_wrongly(&self) -> Option<String> {
        let Merges { targets, sources, .. } = &self.merges;
        let named: usize = targets.iter().map(|t| t.sources as usize).sum();
        if named != sources.len() {
            return Some(format!("targets name {named} sources, there are {}", sources.len()));
        }
        if let Some(pair) = targets.windows(2).find(|p| p[0].slot >= p[1].slot) {
            return Some(format!("target {} follows target {}: not ascending", pair[1].slot, pair[0].slot));
        }
        let kept = |slot: u32| self.keep.binary_search(&slot).is_ok();
        // All new rows are made of those there were, so a target may go into others; what stays as it is would count twice.
        let remade = |slot: u32| targets.binary_search_by_key(&slot, |t| t.slot).is_ok();
        for (target, own) in self.merges.iter() {
            let slot = target.slot;
            if !kept(slot) {
                return Some(format!("others are mixed into slot {slot}, which does not stay"));
            }
            if let Some(pair) = own.windows(2).find(|p| p[0].slot >= p[1].slot) {
                let (first, then) = (pair[0].slot, pair[1].slot);
                return Some(format!("source {then} of slot {slot} follows {first}: not ascending"));
            }
            let stays = |from: u32| from == slot || (kept(from) && !remade(from));
            if let Some(source) = own.iter().find(|s| s.slot as usize >= self.rows || stays(s.slot)) {
                let (from, rows) = (source.slot, self.rows);
                return Some(format!(
                    "slot {from} of {rows} is mixed into slot {slot}, and neither leaves nor takes up others"
                ));
            }
            let weights = [target.key, target.value, target.bias];
            let weights = weights.into_iter().chain(own.iter().flat_map(|s| [s.key, s.value]));
            if let Some(weight) = weights.into_iter().find(|w| !w.is_finite()) {
                return Some(format!("a weight or bias of slot {slot} is {weight}"));
            }
        }
        None
    }

    /// Whether nothing changes.
    pub fn is_identity(&self) -> bool {
        self.keep.len() == self.rows
    }
}

/// The plan of one layer: one head plan per KV head.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LayerPlan {
    /// KV heads, in order.
    pub heads: Vec<HeadPlan>,
    /// What the policy or its reducer finds in [`crate::policy::LayerView::remembered`] next time. Empty: as it was.
    pub remember: Vec<f32>,
}

impl From<Vec<HeadPlan>> for LayerPlan {
    fn from(heads: Vec<HeadPlan>) -> Self {
        Self { heads, remember: Vec::new() }
    }
}

impl LayerPlan {
    /// Checks that the plan fits the stored rows: one head plan per head, made for as many rows as there
    /// are, slots ascending and in range; what is mixed leaves, or takes up others itself, and goes into what stays, with finite
    /// weights.
    ///
    /// # Errors
    /// [`PolicyError::InvalidPlan`] says which rule is broken where.
    pub fn validate(
        &self,
        policy: &str,
        layer: usize,
        rows: impl ExactSizeIterator<Item = usize>,
    ) -> Result<(), PolicyError> {
        let invalid = |head: usize, problem: String| {
            Err(PolicyError::InvalidPlan { policy: policy.to_owned(), layer, head, problem })
        };
        if self.heads.len() != rows.len() {
            return invalid(0, format!("{} head plans for {} KV heads", self.heads.len(), rows.len()));
        }
        for (head, (plan, rows)) in self.heads.iter().zip(rows).enumerate() {
            if plan.rows != rows {
                return invalid(head, format!("made for {} entries, there are {rows}", plan.rows));
            }
            if let Some(pair) = plan.keep.windows(2).find(|p| p[0] >= p[1]) {
                return invalid(head, format!("slot {} follows slot {}: not ascending", pair[1], pair[0]));
            }
            if let Some(&last) = plan.keep.last()
                && last as usize >= rows
            {
                return invalid(head, format!("slot {last} of {rows} entries"));
            }
            if let Some(problem) = plan.mixed_wrongly() {
                return invalid(head, problem);
            }
        }
        Ok(())
    }

    /// Entries kept over all heads.
    pub fn kept(&self) -> usize {
        self.heads.iter().map(|h| h.keep.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(target: Target, sources: &[Source]) -> LayerPlan {
        let mut plan = HeadPlan::new(5, vec![1, 3]);
        plan.merges.push(target, sources.iter().copied());
        vec![plan].into()
    }

    const TARGET: Target = Target { slot: 3, sources: 0, key: 1.0, value: 0.5, bias: 0.0 };
    const SOURCE: Source = Source { slot: 2, key: 0.0, value: 0.5 };

    #[track_caller]
    fn refused(plan: &LayerPlan, part: &str) {
        let error = plan.validate("test", 0, [5].into_iter()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn what_is_mixed_leaves_and_goes_into_what_stays() {
        let good = merged(TARGET, &[SOURCE, Source { slot: 4, ..SOURCE }]);
        good.validate("test", 0, [5].into_iter()).unwrap();
        assert_eq!([0, 2, 3].map(|slot| good.heads[0].fate(slot)), [Fate::Drop, Fate::Merge, Fate::Keep]);
        assert_eq!(good.heads[0].leaving(), [0, 2, 4]);
        refused(&merged(Target { slot: 2, ..TARGET }, &[SOURCE]), "slot 2, which does not stay");
        refused(&merged(TARGET, &[Source { slot: 1, ..SOURCE }]), "slot 1 of 5 is mixed into slot 3");
        refused(&merged(TARGET, &[Source { slot: 3, ..SOURCE }]), "slot 3 of 5 is mixed into slot 3");
        refused(&merged(TARGET, &[Source { slot: 5, ..SOURCE }]), "slot 5 of 5");
        refused(&merged(TARGET, &[SOURCE, SOURCE]), "source 2 of slot 3 follows 2");
        refused(&merged(Target { bias: f32::NAN, ..TARGET }, &[SOURCE]), "is NaN");
        refused(&merged(TARGET, &[Source { value: f32::INFINITY, ..SOURCE }]), "is inf");
        let mut twice = good.clone();
        twice.heads[0].merges.push(TARGET, []);
        refused(&twice, "target 3 follows target 3");
        let mut short = good;
        short.heads[0].merges.sources.pop();
        refused(&short, "name 2 sources, there are 1");
    }

    #[test]
    fn what_takes_up_others_may_go_into_others_too() {
        let mixed = |first: &[Source], second: &[Source]| {
            let mut plan = HeadPlan::new(5, vec![1, 3]);
            plan.merges.push(Target { slot: 1, ..TARGET }, first.iter().copied());
            plan.merges.push(TARGET, second.iter().copied());
            LayerPlan::from(vec![plan])
        };
        let from = |slot| Source { slot, ..SOURCE };
        let both = mixed(&[from(2), from(3)], &[from(1), from(4)]);
        both.validate("test", 0, [5].into_iter()).unwrap();
        assert_eq!([1, 2, 3].map(|slot| both.heads[0].fate(slot)), [Fate::Keep, Fate::Merge, Fate::Keep]);
        refused(&mixed(&[from(1)], &[from(4)]), "slot 1 of 5 is mixed into slot 1");
        // A third one stays as it is.
        let mut third = both;
        third.heads[0].keep = vec![0, 1, 3];
        third.validate("test", 0, [5].into_iter()).unwrap();
        third.heads[0].merges.sources[0].slot = 0;
        refused(&third, "slot 0 of 5 is mixed into slot 1, and neither leaves nor takes up others");
    }
}
