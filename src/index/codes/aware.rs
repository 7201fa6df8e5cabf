//! How far apart keys are to the queries that ask for them.
//!
//! What an error `e` in a key does to a logit is `q·e`, and on average over queries `E (q·e)² = e H eᵀ` with `H = E qᵀq`.
//! With the Cholesky factor `H = L Lᵀ` that is `‖e L‖²`: k-means over keys times `L`, and the nearest codeword there, make
//! the error of logits small and not that of keys (A2ATS, "query-aware vector quantisation").
//!
//! `H` is about zero and not about the queries' mean. A mean query errs in every entry differently, and so counts for the
//! order of entries; what all keys share does not, and codebooks are about the mean key.

use super::book::product;
use std::ops::Range;

/// What is added to the diagonal of a normalised `H`, so that it has a factor whatever the queries were.
const RIDGE: f64 = 1e-6;

/// `H` on a range of dimensions, divided by the root of the mean square of its elements.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Metric {
    /// `[dims, dims]`.
    h: Vec<f32>,
}

/// The lower triangle `L` with `L Lᵀ = H`, `[dims, dims]`.
#[derive(Clone, Debug)]
pub(super) struct Factor {
    rows: Vec<f32>,
    dims: usize,
}

impl Metric {
    /// Of queries `[n, d]` on dimensions `dims`, and its factor; `None` if they say nothing there.
    pub(super) fn of(queries: &[f32], d: usize, dims: Range<usize>) -> Option<(Self, Factor)> {
        let n = dims.len();
        let mut sums = vec![0.0f64; n * n];
        for query in queries.chunks_exact(d) {
            let query = &query[dims.clone()];
            for (row, &a) in sums.chunks_exact_mut(n.max(1)).zip(query) {
                row.iter_mut().zip(query).for_each(|(s, &b)| *s += f64::from(a) * f64::from(b));
            }
        }
        let size = (sums.iter().map(|x| x * x).sum::<f64>() / sums.len() as f64).sqrt();
        if !(size.is_finite() && size > 0.0) {
            return None;
        }
        sums.iter_mut().for_each(|x| *x /= size);
        sums.iter_mut().step_by(n + 1).for_each(|x| *x += RIDGE);
        let factor = cholesky(&sums, n)?;
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect();
        Some((Self { h: narrow(&sums) }, Factor { rows: narrow(&factor), dims: n }))
    }

    /// `H`, row after row.
    pub(super) fn numbers(&self) -> &[f32] {
        &self.h
    }

    /// `row H`, which is symmetric.
    pub(super) fn turn(&self, row: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(self.h.chunks_exact(row.len())).for_each(|(o, h)| *o = product(row, h));
    }

    pub(super) fn bytes(&self) -> usize {
        self.h.capacity() * size_of::<f32>()
    }
}

/// Of [`Metric::numbers`].
impl From<Vec<f32>> for Metric {
    fn from(h: Vec<f32>) -> Self {
        Self { h }
    }
}

impl Factor {
    /// `row L`, behind what is in `out`.
    pub(super) fn whiten(&self, row: &[f32], out: &mut Vec<f32>) {
        let start = out.len();
        out.resize(start + self.dims, 0.0);
        for (i, (x, l)) in row.iter().zip(self.rows.chunks_exact(self.dims)).enumerate() {
            out[start..].iter_mut().zip(&l[..=i]).for_each(|(o, l)| *o += x * l);
        }
    }
}

/// The lower triangle `L` with `L Lᵀ = a`, `[n, n]`, as far as rounding leaves `a` positive.
fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut l = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let (row, above) = (&l[i * n..i * n + j], &l[j * n..j * n + j]);
            let left = a[i * n + j] - row.iter().zip(above).map(|(x, y)| x * y).sum::<f64>();
            l[i * n + j] = match i == j {
                true if left > 0.0 => left.sqrt(),
                true => return None,
                false => left / l[j * n + j],
            };
        }
    }
    Some(l)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The mean of `(q·e)²` over the queries is `‖e L‖²`, up to the normalisation of `H`.
        #[test]
        fn whitened_lengths_are_errors_of_logits(
            (d, range, queries, errors) in (1usize..12).prop_flat_map(|d| {
                let values = move |n: usize| prop::collection::vec(-3.0f32..3.0, n * d);
                (Just(d), (0..d, 1..=d), (d..40).prop_flat_map(values), (2usize..9).prop_flat_map(values))
            })
        ) {
            let range = range.0..(range.0 + range.1).min(d);
            let (metric, factor) = Metric::of(&queries, d, range.clone()).unwrap();
            let mut ratios = Vec::new();
            for error in errors.chunks_exact(d) {
                let error = &error[range.clone()];
                let exact = |q: &[f32]| -> f64 {
                    q[range.clone()].iter().zip(error).map(|(q, e)| f64::from(*q) * f64::from(*e)).sum()
                };
                let mean = queries.chunks_exact(d).map(|q| exact(q).powi(2)).sum::<f64>();
                let (mut white, mut turned) = (Vec::new(), vec![0.0; range.len()]);
                factor.whiten(error, &mut white);
                metric.turn(error, &mut turned);
                let length = white.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let through = product(&turned, error);
                prop_assert!((f64::from(through) - length).abs() <= 1e-3 * (1.0 + length));
                ratios.push((mean, length));
            }
            let sum = ratios.iter().fold((0.0, 0.0), |s, r| (s.0 + r.0, s.1 + r.1));
            for (mean, length) in ratios {
                // One factor for all, and a ridge of a millionth.
                prop_assert!((mean * sum.1 - length * sum.0).abs() <= 1e-3 * (sum.0 * sum.1).max(1e-9));
            }
        }
    }

    #[test]
    fn queries_without_length_say_nothing() {
        assert!(Metric::of(&[0.0; 12], 4, 0..4).is_none());
        assert!(Metric::of(&[], 4, 0..4).is_none());
        // Of one query only one direction is known, and the ridge is the rest.
        assert!(Metric::of(&[1.0, 2.0, 3.0, 4.0], 4, 1..4).is_some());
    }
}
