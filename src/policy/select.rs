//! Which entries stay, once scores and counts are known: the protected ones, then the best.
//!
//! *Helps* because protection is a mask beside the scores: no sentinel that a real score could tie with, or
//! that saturates in half precision. *Hurts* nothing.

use super::{LayerScores, LayerView};
use crate::columns::ColumnSpec;
use crate::error::PolicyError;
use crate::kernel::top_k::TopKArgs;
use crate::plan::{HeadPlan, LayerPlan};

/// The column of marks that a host sets ([`crate::KvCache::mark`]): not 0 where an entry is marked.
pub const MARKED: ColumnSpec = ColumnSpec { name: "marked", words: 1 };

/// Puts every marked entry of a layer below every other, and leaves the order among either as it is. LOOK-M's text-first rule,
/// with the tokens of images marked; there a large constant is subtracted, which makes small scores equal.
///
/// # Errors
/// [`PolicyError::Missing`] if entries have no [`MARKED`] column.
pub fn marked_last(policy: &str, view: &LayerView<'_>, scores: &mut LayerScores) -> Result<(), PolicyError> {
    let marks = view.column_words(MARKED.name).ok_or_else(|| PolicyError::Missing {
        policy: policy.to_owned(),
        need: format!("the column {:?}", MARKED.name),
        layer: view.layer,
        hint: "; build the cache with this policy, so that it keeps the columns the policy declares",
    })?;
    let pairs = || scores.values.iter().zip(&marks);
    let highest = pairs().filter(|(_, mark)| **mark != 0).map(|(score, _)| rank(*score)).max();
    let lowest = pairs().filter(|(_, mark)| **mark == 0).map(|(score, _)| rank(*score)).min();
    if let (Some(highest), Some(lowest)) = (highest, lowest)
        && highest >= lowest
    {
        let marked = scores.values.iter_mut().zip(&marks).filter(|(_, mark)| **mark != 0);
        marked.for_each(|(score, _)| *score = ranked(rank(*score) - (highest - lowest) - 1));
    }
    Ok(())
}

/// Numbers in the order of the scores, one apart where no number of single precision lies between.
fn rank(score: f32) -> i64 {
    // −0 is 0.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { i64::from(bits) } else { -i64::from(bits & 0x7fff_ffff) }
}

/// The score of a rank; below −∞ there is none.
fn ranked(rank: i64) -> f32 {
    let magnitude = u32::try_from(rank.unsigned_abs()).unwrap_or(u32::MAX).min(f32::INFINITY.to_bits());
    if rank < 0 { -f32::from_bits(magnitude) } else { f32::from_bits(magnitude) }
}

/// One byte per entry, 1 = protected: the first `sinks` and the last `recent` of each KV head. Where both do
/// not fit into `target` entries the sinks come first, then the most recent: the sinks carry the softmax's
/// excess mass, and without them the recent ones are read wrongly too.
pub fn protection(lengths: &[usize], target: usize, sinks: usize, recent: usize) -> Vec<u8> {
    let mut mask = Vec::with_capacity(lengths.iter().sum());
    for &len in lengths {
        let sinks = sinks.min(target).min(len);
        let recent = recent.min(target - sinks).min(len - sinks);
        mask.extend((0..len).map(|slot| u8::from(slot < sinks || slot >= len - recent)));
    }
    mask
}

/// Protected entries of each KV head.
pub fn protected_counts(lengths: &[usize], protect: &[u8]) -> Vec<usize> {
    let mut rest = protect;
    lengths
        .iter()
        .map(|&len| {
            let (head, tail) = rest.split_at(len);
            rest = tail;
            head.iter().filter(|&&p| p != 0).count()
        })
        .collect()
}

/// Refuses scores that cannot be ordered.
///
/// # Errors
/// [`PolicyError::NanScore`] names the first NaN; [`PolicyError::Custom`] if there is not one score per entry.
pub fn check_scores(policy: &str, view: &LayerView<'_>, scores: &LayerScores) -> Result<(), PolicyError> {
    let lengths = view.lengths();
    if scores.lengths != lengths || scores.values.len() != lengths.iter().sum::<usize>() {
        return Err(PolicyError::Custom {
            policy: policy.to_owned(),
            message: format!(
                "scored {} entries of heads {:?}, layer {} has {lengths:?}",
                scores.values.len(),
                scores.lengths,
                view.layer
            ),
        });
    }
    for head in 0..lengths.len() {
        if let Some(slot) = scores.head(head).iter().position(|s| s.is_nan()) {
            return Err(PolicyError::NanScore { policy: policy.to_owned(), layer: view.layer, head, slot });
        }
    }
    Ok(())
}

/// The plan that keeps, of each KV head, its protected entries and the best of the others, `counts` in all.
///
/// # Errors
/// [`PolicyError::Kernel`], also if a count is below the protected or above the stored entries.
pub fn top(
    view: &LayerView<'_>,
    scores: &LayerScores,
    counts: &[usize],
    protect: &[u8],
) -> Result<LayerPlan, PolicyError> {
    let mut out = vec![0; counts.iter().sum()];
    view.backend.top_k(&mut TopKArgs {
        lengths: &scores.lengths,
        counts,
        scores: &scores.values,
        protect,
        out: &mut out,
    })?;
    let mut rest = out.as_slice();
    let heads = scores.lengths.iter().zip(counts);
    let heads = heads.map(|(&rows, &count)| {
        let (keep, tail) = rest.split_at(count);
        rest = tail;
        HeadPlan::new(rows, keep.to_vec())
    });
    Ok(heads.collect::<Vec<_>>().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_in_the_order_of_scores() {
        let scores = [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-40, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY];
        assert!(scores.windows(2).all(|pair| rank(pair[0]) < rank(pair[1])));
        assert!(scores.iter().all(|&score| ranked(rank(score)) == score));
        assert_eq!(rank(-0.0), rank(0.0));
        assert_eq!(ranked(rank(1.0) - 1), 1.0f32.next_down());
        assert_eq!(ranked(rank(f32::NEG_INFINITY) - 5), f32::NEG_INFINITY);
    }

    #[test]
    fn protection_is_clamped_to_the_target_sinks_first() {
        let mask = |lengths: &[usize], target, sinks, recent| protection(lengths, target, sinks, recent);
        assert_eq!(mask(&[6], 6, 2, 1), [1, 1, 0, 0, 0, 1]);
        assert_eq!(mask(&[6], 3, 2, 9), [1, 1, 0, 0, 0, 1]);
        assert_eq!(mask(&[6], 2, 4, 9), [1, 1, 0, 0, 0, 0]);
        assert_eq!(mask(&[6], 0, 4, 9), [0; 6]);
        // A head shorter than the target is protected where it has entries.
        assert_eq!(mask(&[2, 4], 9, 1, 2), [1, 1, 1, 0, 1, 1]);
        assert_eq!(protected_counts(&[2, 4], &mask(&[2, 4], 9, 1, 2)), [2, 3]);
    }
}
