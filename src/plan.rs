//! A plan: for every stored entry of a layer, its fate. Policies return plans; one place in the cache
//! validates and applies them.
//!
//! *Helps* because a plan is data: it can be printed, tested, replayed, compared between backends, or taken
//! by a host that owns its own cache. *Hurts* by one pass over the kept slots, nothing next to the copy that
//! applies it.

use crate::error::PolicyError;

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fate {
    /// It stays.
    Keep,
    /// It is removed and its memory returned.
    Drop,
}

/// The plan of one KV head.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HeadPlan {
    /// Entries there were when the plan was made.
    pub rows: usize,
    /// Slots to keep, strictly ascending.
    pub keep: Vec<u32>,
}

impl HeadPlan {
    /// Keeps everything.
    pub fn identity(rows: usize) -> Self {
        Self { rows, keep: (0..rows as u32).collect() }
    }

    /// The fate of a slot.
    ///
    /// # Panics
    /// If `slot` is not one of the plan's rows.
    pub fn fate(&self, slot: u32) -> Fate {
        assert!((slot as usize) < self.rows, "slot {slot} of {} rows", self.rows);
        if self.keep.binary_search(&slot).is_ok() { Fate::Keep } else { Fate::Drop }
    }

    /// Whether nothing changes.
    pub fn is_identity(&self) -> bool {
        self.keep.len() == self.rows
    }
}

/// The plan of one layer: one head plan per KV head.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LayerPlan {
    /// KV heads, in order.
    pub heads: Vec<HeadPlan>,
}

impl LayerPlan {
    /// Checks that the plan fits the stored rows: one head plan per head, made for as many rows as there
    /// are, slots ascending and in range.
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
        }
        Ok(())
    }

    /// Entries kept over all heads.
    pub fn kept(&self) -> usize {
        self.heads.iter().map(|h| h.keep.len()).sum()
    }
}
