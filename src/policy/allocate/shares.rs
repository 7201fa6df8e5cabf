//! Shares of a budget as whole numbers that sum to it, within bounds.

/// `total` by weight, each part within its bounds: what a bound takes from one goes to the others in proportion. All that the
/// bounds allow if that is less.
pub(super) fn fill(weights: &[f64], bounds: &[(f64, f64)], total: f64) -> Vec<f64> {
    let share = |scale: f64| -> Vec<f64> {
        let each = weights.iter().zip(bounds);
        each.map(|(weight, &(least, most))| (weight * scale).clamp(least.min(most), most)).collect()
    };
    share(level(total, |scale| share(scale).iter().sum()))
}

/// The smallest scale at which a sum that grows with it reaches `total`, or a very large one if it never does.
pub(super) fn level(total: f64, sum: impl Fn(f64) -> f64) -> f64 {
    // Its logarithm is found by halves; weights go down to exp(−250).
    let (mut low, mut high) = (-64.0, 320.0);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        *(if sum(f64::exp(middle)) < total { &mut low } else { &mut high }) = middle;
    }
    high.exp()
}

/// Shares as whole numbers that sum to `total`, or as near as the bounds allow: rounded down, and what that leaves over goes
/// to those it took most from, the earlier of equals first.
pub(super) fn whole(shares: &[f64], bounds: &[(usize, usize)], total: usize) -> Vec<usize> {
    let near =
        |(&share, &(least, most)): (&f64, &(usize, usize))| (share as usize).clamp(least.min(most), most);
    let mut counts: Vec<usize> = shares.iter().zip(bounds).map(near).collect();
    let claims: Vec<f64> = shares.iter().zip(&counts).map(|(share, &count)| share - count as f64).collect();
    settle(&mut counts, bounds, total, &claims);
    counts
}

/// Changes counts by one, round after round, until they sum to `total` or the bounds forbid it: the highest claims gain first,
/// the lowest lose first, of equal ones the earlier.
pub(super) fn settle(counts: &mut [usize], bounds: &[(usize, usize)], total: usize, claims: &[f64]) {
    let sum: usize = counts.iter().sum();
    let (adding, mut left) = (sum < total, sum.abs_diff(total));
    let room = |counts: &[usize], i: usize| match adding {
        true => bounds[i].1.saturating_sub(counts[i]),
        false => counts[i].saturating_sub(bounds[i].0),
    };
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|&a, &b| match adding {
        true => claims[b].total_cmp(&claims[a]),
        false => claims[a].total_cmp(&claims[b]),
    });
    while left > 0 {
        order.retain(|&i| room(counts, i) > 0);
        // As many whole rounds at once as nobody's room ends before.
        let Some(least) = order.iter().map(|&i| room(counts, i)).min() else { return };
        let rounds = least.min((left / order.len()).max(1));
        for &i in order.iter().take(left) {
            counts[i] = if adding { counts[i] + rounds } else { counts[i] - rounds };
        }
        left -= rounds * order.len().min(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bounds_take_and_the_others_share_in_proportion() {
        let unbound = [(0.0, 1e9); 3];
        let near = |got: Vec<f64>, want: [f64; 3]| {
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?} {want:?}");
        };
        near(fill(&[1.0, 2.0, 1.0], &unbound, 40.0), [10.0, 20.0, 10.0]);
        near(fill(&[1.0, 2.0, 1.0], &[(0.0, 1e9), (0.0, 8.0), (18.0, 1e9)], 40.0), [14.0, 8.0, 18.0]);
        near(fill(&[1.0, 0.0, 1.0], &[(0.0, 3.0), (0.0, 9.0), (0.0, 4.0)], 40.0), [3.0, 0.0, 4.0]);
    }

    #[test]
    fn what_rounding_left_over_goes_where_it_took_most() {
        assert_eq!(whole(&[1.5, 2.7, 0.8], &[(0, 9); 3], 5), [1, 3, 1]);
        assert_eq!(whole(&[1.5, 1.5, 1.0], &[(0, 9); 3], 4), [2, 1, 1], "the earlier of equals");
        assert_eq!(whole(&[1.5, 1.5, 1.0], &[(0, 1), (0, 9), (0, 9)], 9), [1, 4, 4]);
    }

    #[test]
    fn rounds_go_on_while_there_is_room() {
        let settled = |counts: [usize; 3], bounds, total| {
            let mut counts = counts;
            settle(&mut counts, bounds, total, &[0.1, 0.5, 0.5]);
            counts
        };
        assert_eq!(settled([5, 5, 5], &[(0, 9); 3], 17), [5, 6, 6]);
        assert_eq!(settled([5, 5, 5], &[(0, 9); 3], 16), [5, 6, 5]);
        assert_eq!(settled([5, 5, 5], &[(0, 9); 3], 13), [4, 4, 5]);
        assert_eq!(settled([5, 5, 5], &[(4, 9), (4, 9), (0, 9)], 9), [4, 4, 1]);
        assert_eq!(settled([5, 5, 5], &[(4, 9); 3], 2), [4, 4, 4], "no further than the bounds");
    }

    proptest! {
        #[test]
        fn sums_are_exact_within_bounds(
            items in prop::collection::vec((0.0f64..5.0, 0usize..50, 0usize..200), 1..30), total in 0usize..4000,
        ) {
            let bounds: Vec<(usize, usize)> = items.iter().map(|&(_, least, room)| (least, least + room)).collect();
            let weights: Vec<f64> = items.iter().map(|item| item.0).collect();
            let real: Vec<(f64, f64)> = bounds.iter().map(|&(a, b)| (a as f64, b as f64)).collect();
            let counts = whole(&fill(&weights, &real, total as f64), &bounds, total);
            let (least, most) = bounds.iter().fold((0, 0), |(a, b), bound| (a + bound.0, b + bound.1));
            prop_assert_eq!(counts.iter().sum::<usize>(), total.clamp(least, most));
            prop_assert!(counts.iter().zip(&bounds).all(|(count, &(a, b))| (a..=b).contains(count)));
        }
    }
}
