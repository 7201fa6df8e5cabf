//! Which entries stay, once scores and counts are known: the protected ones, then the best.
//!
//! *Helps* because protection is a mask beside the scores: no sentinel that a real score could tie with, or
//! that saturates in half precision. *Hurts* nothing.

use super::{LayerScores, LayerView};
use crate::error::PolicyError;
use crate::kernel::top_k::TopKArgs;
use crate::plan::{HeadPlan, LayerPlan};

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
