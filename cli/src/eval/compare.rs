//! Predictions of a compressed cache beside the full cache's, over the same tokens.
//!
//! *Helps* because every reference is computed once, however many recipes are held against it. *Hurts* memory: it is
//! one float per prediction and token of the vocabulary, 100 MB for 512 predictions of 49,152.

use super::Row;
use crate::metrics::{Mean, argmax, kl, log_softmax};

/// The full cache's predictions of known tokens.
#[derive(Clone, Debug)]
pub(super) struct Reference<'t> {
    targets: &'t [u32],
    /// `[targets, vocabulary]` log-probabilities.
    rows: Vec<f32>,
    top: Vec<usize>,
    nll: Vec<f64>,
}

impl<'t> Reference<'t> {
    /// None yet; row `i` will be the prediction of `targets[i]`.
    pub(super) fn of(targets: &'t [u32]) -> Self {
        Self { targets, rows: Vec::new(), top: Vec::new(), nll: Vec::new() }
    }

    /// The next prediction; one beyond the last target, which nothing can be compared with, is ignored.
    pub(super) fn record(&mut self, logits: &[f32]) {
        let Some(&target) = self.targets.get(self.nll.len()) else { return };
        if self.rows.is_empty() {
            self.rows.reserve_exact(self.targets.len() * logits.len());
        }
        let start = self.rows.len();
        self.rows.extend_from_slice(logits);
        let row = &mut self.rows[start..];
        log_softmax(row);
        self.top.push(argmax(row));
        self.nll.push(-f64::from(row[target as usize]));
    }
}

/// Means over predictions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Distance {
    kl: Mean,
    same: Mean,
    nll: Mean,
    over: Mean,
}

impl Distance {
    /// Prediction `index` of a compressed cache; ignored where the reference has none.
    pub(super) fn add(&mut self, reference: &Reference<'_>, index: usize, logits: &[f32]) {
        let Some(&full) = reference.nll.get(index) else { return };
        let vocabulary = logits.len();
        let mut logits = logits.to_vec();
        log_softmax(&mut logits);
        let nll = -f64::from(logits[reference.targets[index] as usize]);
        self.kl.add(kl(&reference.rows[index * vocabulary..(index + 1) * vocabulary], &logits));
        self.same.add(f64::from(u8::from(argmax(&logits) == reference.top[index])));
        self.nll.add(nll);
        self.over.add(nll - full);
    }

    /// A row with these numbers.
    pub(super) fn fill(&self, row: Row) -> Row {
        Row {
            kl: self.kl.get(),
            same_top1: self.same.get(),
            nll: self.nll.get(),
            nll_over_full: self.over.get(),
            ..row
        }
    }
}
