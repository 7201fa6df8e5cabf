//! Numbers that compare two distributions over the vocabulary, and what is said of many numbers at once.

/// Turns logits into log-probabilities in place. Summed in `f64`: 49,152 small terms lose digits in `f32`.
pub(crate) fn log_softmax(row: &mut [f32]) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
    let log_total = f64::from(top) + total.ln();
    row.iter_mut().for_each(|x| *x = (f64::from(*x) - log_total) as f32);
}

/// KL(p ‖ q) in nats, both given as log-probabilities.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let term = |(p, q): (&f32, &f32)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q));
    // Rounding can leave a sum of −1e-9 for equal distributions.
    p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(term).sum::<f64>().max(0.0)
}

/// Index of the largest element, the lowest among equals.
pub(crate) fn argmax(row: &[f32]) -> usize {
    let larger = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).reduce(larger).unwrap_or(0)
}

/// A running mean.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    pub(crate) fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    /// `None` if nothing was added.
    pub(crate) fn get(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// The value below which a share of the values lies, between neighbours on a straight line; `None` of nothing.
pub(crate) fn percentile(values: impl Iterator<Item = f64>, share: f64) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let at = share * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// Bytes of this process in physical memory, where the system says so.
pub(crate) fn process_resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok().map(|kibibytes| kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_two_coins() {
        let mut p = [0f32, 0.0];
        let mut q = [(0.9f32).ln() + 3.0, (0.1f32).ln() + 3.0];
        log_softmax(&mut p);
        log_softmax(&mut q);
        let want = 0.5 * (0.5f64 / 0.9).ln() + 0.5 * (0.5f64 / 0.1).ln();
        assert!((kl(&p, &q) - want).abs() < 1e-6);
        assert_eq!(kl(&p, &p), 0.0);
        assert_eq!(
            kl(&[0.0, f32::NEG_INFINITY], &[(0.5f32).ln(), (0.5f32).ln()]),
            f64::from((0.5f32).ln()).abs()
        );
    }

    #[test]
    fn means_maxima_and_percentiles() {
        let mut mean = Mean::default();
        assert_eq!(mean.get(), None);
        mean.add(1.0);
        mean.add(4.0);
        assert_eq!(mean.get(), Some(2.5));
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(percentile([3.0, 1.0, 2.0].into_iter(), 0.75), Some(2.5));
        assert_eq!(percentile([3.0, 1.0].into_iter(), 1.0), Some(3.0));
        assert_eq!(percentile(std::iter::empty(), 0.5), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_takes_some_memory() {
        assert!(process_resident().unwrap() > 1 << 16);
    }
}
