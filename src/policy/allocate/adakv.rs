//! AdaKV: within a layer, KV heads compete for entries by score.
//!
//! *Helps* where some heads attend widely and others to a few entries. *Hurts* with scores that are not
//! comparable between heads (key norms, counts) and by ragged lengths, which rule out renumbered positions.
//!
//! A layer of `H` heads keeps `T = H · target` entries, less if it stores less.
//! ```text
//! floor:  each head is sure of its protected entries and of its ⌊safeguard · target⌋ best;
//!         the rest of T goes to the best remaining entries of the layer
//! mix:    base = (T − protected) / H;  c_h = entries of head h among the layer's best H · base
//!         keep_h = protected_h + round_half_even(c_h (1 − alpha) + ⌊alpha · base⌋)
//! ```
//! `floor` is what kvpress does, `mix` what the paper's authors released; `mix` there loses or gains a few
//! entries to rounding. Here they are given to (taken from) the heads whose share `c_h (1 − alpha) +
//! alpha · base` was rounded down (up) most, so the sum is `T` exactly.

use super::{Allocator, HeadRequest};
use crate::error::{PolicyError, RecipeError};
use crate::kernel::top_k::TopKArgs;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::select::protected_counts;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "adakv",
    summary: "the KV heads of a layer compete for its entries by score",
    source: "Feng et al. 2024, arXiv:2407.11550; floor rule as in NVIDIA kvpress",
    needs: "scores that are comparable between heads (attention masses are, norms are not)",
    args: &[
        Arg::word("rule", &["floor", "mix"], "floor: a sure share, the rest by competition; mix: affine mix"),
        Arg::real("safeguard", 0.2, 0.0, 1.0, "floor: share of the target that each head is sure of"),
        Arg::real("alpha", 0.2, 0.0, 1.0, "mix: weight of the uniform share"),
        Arg::word(
            "normalise",
            &["no", "yes"],
            "mix: weigh a head by the mass share of its best entries first",
        ),
    ],
    build: Build::Allocate { over: "snapkv", schedule: None, build },
};

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    let rule = if args.word("rule")? == "mix" {
        Rule::Mix { alpha: args.real("alpha")?, normalise: args.word("normalise")? == "yes" }
    } else {
        Rule::Floor { safeguard: args.real("safeguard")? }
    };
    Ok(Arc::new(AdaKv { rule }))
}

/// How competition and an equal share are joined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// A minimum per head.
    Floor {
        /// Share of the target that each head is sure of, `0 ..= 1`.
        safeguard: f64,
    },
    /// A weighted mean of both.
    Mix {
        /// Weight of the equal share, `0 ..= 1`.
        alpha: f64,
        /// Whether a head's scores are first multiplied by the share of mass its best entries hold. Means
        /// something for scores ≥ 0 only.
        normalise: bool,
    },
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaKv {
    /// The rule.
    pub rule: Rule,
}

impl Default for AdaKv {
    fn default() -> Self {
        Self { rule: Rule::Floor { safeguard: 0.2 } }
    }
}

impl Allocator for AdaKv {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        match self.rule {
            Rule::Floor { safeguard } => floor_counts(request, safeguard),
            Rule::Mix { alpha, normalise } => mix_counts(request, alpha, normalise),
        }
    }
}

/// `⌊share · n⌋` without losing one to binary fractions (0.29 · 100 is 28.999… in `f64`).
fn floor_share(share: f64, n: usize) -> usize {
    ((share * n as f64 + 1e-9).floor() as usize).min(n)
}

fn floor_counts(request: &HeadRequest<'_>, safeguard: f64) -> Result<Vec<usize>, PolicyError> {
    let lengths = &request.scores.lengths;
    let safe = floor_share(safeguard, request.target);
    let protected = protected_counts(lengths, request.protect);
    let sure: Vec<usize> = lengths.iter().zip(&protected).map(|(&len, &p)| safe.min(len).max(p)).collect();
    let sure = best_of_heads(request, &request.scores.values, &sure)?;
    best_of_layer(request, &request.scores.values, &sure, request.total())
}

fn mix_counts(request: &HeadRequest<'_>, alpha: f64, normalise: bool) -> Result<Vec<usize>, PolicyError> {
    let lengths = &request.scores.lengths;
    let protected = protected_counts(lengths, request.protect);
    let room: Vec<usize> = lengths.iter().zip(&protected).map(|(&len, &p)| len - p).collect();
    let pool = request.total() - protected.iter().sum::<usize>();
    let base = pool / lengths.len().max(1);

    let mut values = request.scores.values.clone();
    if normalise {
        weigh_heads(request, &protected, base, &mut values)?;
    }
    let won = best_of_layer(request, &values, request.protect, request.total())?;
    let won: Vec<usize> = won.iter().zip(&protected).map(|(&all, &p)| all - p).collect();

    let floor = floor_share(alpha, base) as f64;
    let mut kept: Vec<usize> = won
        .iter()
        .zip(&room)
        .map(|(&c, &room)| ((c as f64 * (1.0 - alpha) + floor).round_ties_even() as usize).min(room))
        .collect();
    let share: Vec<f64> = won.iter().map(|&c| c as f64 * (1.0 - alpha) + alpha * base as f64).collect();
    let missing = |kept: &[usize], h: usize| share[h] - kept[h] as f64;
    loop {
        let sum: usize = kept.iter().sum();
        let heads = 0..kept.len();
        // Of equal claims the lower head's is served: `max_by` would return the last, so it runs backwards.
        let next = if sum < pool {
            heads
                .rev()
                .filter(|&h| kept[h] < room[h])
                .max_by(|&a, &b| missing(&kept, a).total_cmp(&missing(&kept, b)))
        } else if sum > pool {
            heads
                .rev()
                .filter(|&h| kept[h] > 0)
                .min_by(|&a, &b| missing(&kept, a).total_cmp(&missing(&kept, b)))
        } else {
            None
        };
        match next {
            Some(h) if sum < pool => kept[h] += 1,
            Some(h) => kept[h] -= 1,
            None => break,
        }
    }
    Ok(kept.iter().zip(&protected).map(|(&k, &p)| k + p).collect())
}

/// Multiplies each head's scores by the share of its mass that its `base` best unprotected entries hold.
fn weigh_heads(
    request: &HeadRequest<'_>,
    protected: &[usize],
    base: usize,
    values: &mut [f32],
) -> Result<(), PolicyError> {
    let lengths = &request.scores.lengths;
    let counts: Vec<usize> = lengths.iter().zip(protected).map(|(&len, &p)| len.min(p + base)).collect();
    let best = best_of_heads(request, values, &counts)?;
    let mut start = 0;
    for &len in lengths {
        let head = start..start + len;
        let free = head.clone().filter(|&i| request.protect[i] == 0);
        let (mut top, mut all) = (0.0f64, 0.0f64);
        for i in free {
            let mass = f64::from(values[i]);
            all += mass;
            top += if best[i] != 0 { mass } else { 0.0 };
        }
        if all != 0.0 && (top / all).is_finite() {
            values[head].iter_mut().for_each(|v| *v *= (top / all) as f32);
        }
        start += len;
    }
    Ok(())
}

/// A mask of each head's `counts` best entries, protected ones first.
fn best_of_heads(
    request: &HeadRequest<'_>,
    values: &[f32],
    counts: &[usize],
) -> Result<Vec<u8>, PolicyError> {
    let lengths = &request.scores.lengths;
    let mut out = vec![0; counts.iter().sum()];
    request.backend.top_k(&mut TopKArgs {
        lengths,
        counts,
        scores: values,
        protect: request.protect,
        out: &mut out,
    })?;
    let mut mask = vec![0; values.len()];
    let (mut start, mut rest) = (0, out.as_slice());
    for (&len, &count) in lengths.iter().zip(counts) {
        let (chosen, tail) = rest.split_at(count);
        chosen.iter().for_each(|&slot| mask[start + slot as usize] = 1);
        start += len;
        rest = tail;
    }
    Ok(mask)
}

/// How many of the layer's `count` best entries, `sure` ones first, lie in each head. Between equal scores
/// the lower head wins, then the lower slot.
fn best_of_layer(
    request: &HeadRequest<'_>,
    values: &[f32],
    sure: &[u8],
    count: usize,
) -> Result<Vec<usize>, PolicyError> {
    let mut out = vec![0; count];
    request.backend.top_k(&mut TopKArgs {
        lengths: &[values.len()],
        counts: &[count],
        scores: values,
        protect: sure,
        out: &mut out,
    })?;
    let mut rest = out.as_slice();
    let mut end = 0;
    let counts = request.scores.lengths.iter().map(|&len| {
        end += len;
        let (head, tail) = rest.split_at(rest.partition_point(|&i| (i as usize) < end));
        rest = tail;
        head.len()
    });
    Ok(counts.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::LayerScores;
    use proptest::prelude::*;

    const PEAKED: [f32; 8] = [0.50, 0.20, 0.10, 0.05, 0.05, 0.04, 0.03, 0.03];
    const FLAT: [f32; 8] = [0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10, 0.09];

    fn counts(rule: Rule, target: usize, heads: &[&[f32]], protect: Option<&[u8]>) -> Vec<usize> {
        let scores = LayerScores { lengths: heads.iter().map(|h| h.len()).collect(), values: heads.concat() };
        let none = vec![0; scores.values.len()];
        let request = HeadRequest {
            layer: 0,
            target,
            scores: &scores,
            protect: protect.unwrap_or(&none),
            backend: &Reference::default(),
        };
        AdaKv { rule }.head_counts(&request).unwrap()
    }

    fn mix(alpha: f64, normalise: bool) -> Vec<usize> {
        counts(Rule::Mix { alpha, normalise }, 4, &[&PEAKED, &FLAT], None)
    }

    #[test]
    fn worked_examples_of_the_mix() {
        assert_eq!(mix(0.0, false), [2, 6]);
        // The released code stops at [2, 5]; the entry it loses goes to the head that was rounded down most.
        assert_eq!(mix(0.2, false), [2, 6]);
        assert_eq!(mix(0.5, false), [3, 5]);
        assert_eq!(mix(0.5, true), [4, 4]);
        assert_eq!(mix(0.0, true), [3, 5]);
        assert_eq!(mix(1.0, false), [4, 4]);
    }

    #[test]
    fn worked_example_of_the_floor() {
        let floor = |safeguard| counts(Rule::Floor { safeguard }, 4, &[&PEAKED, &FLAT], None);
        assert_eq!(floor(0.2), [2, 6]);
        assert_eq!(floor(0.75), [3, 5]);
        assert_eq!(floor(1.0), [4, 4]);
    }

    #[test]
    fn protected_entries_count_as_sure() {
        let mut protect = [0; 16];
        protect[4..8].fill(1);
        // Head 0: four protected, and .50 and .20 beat the flat head's third.
        let got = counts(Rule::Floor { safeguard: 0.2 }, 4, &[&PEAKED, &FLAT], Some(&protect));
        assert_eq!(got, [6, 2]);
    }

    proptest! {
        #[test]
        fn totals_are_exact_and_bounds_hold(
            heads in prop::collection::vec(prop::collection::vec((0u8..20, prop::bool::weighted(0.2)), 0..20), 1..5),
            target in 0usize..25,
            share in 0.0f64..=1.0,
            which in 0..3,
        ) {
            let rule = match which {
                0 => Rule::Floor { safeguard: share },
                1 => Rule::Mix { alpha: share, normalise: false },
                _ => Rule::Mix { alpha: share, normalise: true },
            };
            let scores: Vec<Vec<f32>> = heads.iter().map(|h| h.iter().map(|(s, _)| f32::from(*s)).collect()).collect();
            let scores: Vec<&[f32]> = scores.iter().map(Vec::as_slice).collect();
            let mut protect: Vec<u8> = Vec::new();
            for head in &heads {
                let mut left = target;
                for (_, p) in head {
                    let p = *p && left > 0;
                    left -= usize::from(p);
                    protect.push(u8::from(p));
                }
            }
            let got = counts(rule, target, &scores, Some(&protect));
            let lengths: Vec<usize> = heads.iter().map(Vec::len).collect();
            let total: usize = lengths.iter().sum();
            prop_assert_eq!(got.iter().sum::<usize>(), total.min(target * heads.len()));
            for ((got, len), protected) in got.iter().zip(&lengths).zip(protected_counts(&lengths, &protect)) {
                prop_assert!((protected..=*len).contains(got));
            }
        }
    }
}
