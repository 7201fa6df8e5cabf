//! Selection by one integer per slot.
//!
//! Score and slot are packed into 64 bits that ascend from best to worst: protected slots first, then higher
//! scores, then lower slots. The `k`-th smallest, found by quickselect, separates the chosen from the rest,
//! and one pass in slot order writes them already sorted. *Helps* long rows: O(n). *Hurts* nothing; rows are
//! chosen in parallel.

use super::TopKArgs;
use crate::error::KernelError;
use crate::kernel::simd::{Exec, Split, take};

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let tasks = exec.tasks(args.scores.len() * OPERATIONS_PER_SLOT);
    let work = Rows {
        lengths: args.lengths,
        counts: args.counts,
        scores: args.scores,
        protect: args.protect,
        out: args.out,
    };
    exec.run(tasks, || work.spread(tasks));
    Ok(())
}

/// Packing, and about three rounds of comparing and moving.
const OPERATIONS_PER_SLOT: usize = 16;

struct Rows<'a> {
    lengths: &'a [usize],
    counts: &'a [usize],
    scores: &'a [f32],
    protect: &'a [u8],
    out: &'a mut [u32],
}

impl Split for Rows<'_> {
    fn pieces(&self) -> usize {
        self.lengths.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (lengths, lengths_right) = self.lengths.split_at(at);
        let (counts, counts_right) = self.counts.split_at(at);
        let len = lengths.iter().sum();
        let (scores, scores_right) = self.scores.split_at(len);
        let (protect, protect_right) = self.protect.split_at(len);
        let out = take(&mut self.out, counts.iter().sum());
        (
            Rows { lengths, counts, scores, protect, out },
            Rows {
                lengths: lengths_right,
                counts: counts_right,
                scores: scores_right,
                protect: protect_right,
                out: self.out,
            },
        )
    }

    fn work(mut self) {
        let mut order = Vec::new();
        let mut start = 0;
        for (&len, &count) in self.lengths.iter().zip(self.counts) {
            let row = start..start + len;
            select(&self.scores[row.clone()], &self.protect[row], take(&mut self.out, count), &mut order);
            start += len;
        }
    }
}

fn select(scores: &[f32], protect: &[u8], out: &mut [u32], order: &mut Vec<u64>) {
    if out.is_empty() {
        return;
    }
    let key = |slot: usize| rank(scores[slot], protect[slot]) | slot as u64;
    let worst_chosen = if out.len() == scores.len() {
        u64::MAX
    } else {
        order.clear();
        order.extend((0..scores.len()).map(key));
        *order.select_nth_unstable(out.len() - 1).1
    };
    let chosen = (0..scores.len()).filter(|&slot| key(slot) <= worst_chosen);
    out.iter_mut().zip(chosen).for_each(|(o, slot)| *o = slot as u32);
}

/// The upper half of a slot's key: 0 for protected, otherwise descending in the score.
#[inline]
fn rank(score: f32, protect: u8) -> u64 {
    if protect != 0 {
        return 0;
    }
    // Adding 0.0 turns −0 into +0. The bits of a float, with the sign bit set for positive and all bits
    // flipped for negative numbers, ascend with it; no number maps to all ones, so 0 stays free.
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32
}
