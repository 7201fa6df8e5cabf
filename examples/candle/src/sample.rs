//! Choosing the next token from a row of logits.
//!
//! *Helps*: greedy, temperature, top-k and top-p in the usual order, and the same tokens for the same seed on every
//! platform. *Hurts*: top-p without top-k sorts the whole vocabulary (milliseconds at 49,152 tokens).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

/// How to sample. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the `k` most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Then keep the most likely tokens whose mass reaches `p`, at least one; `None` keeps all.
    pub top_p: Option<f32>,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

/// A sampler with its random generator.
#[derive(Clone, Debug)]
pub struct Sampler {
    how: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// Checks the parameters and seeds the generator.
    ///
    /// # Errors
    /// [`Error::Sampling`] names the parameter out of range.
    pub fn new(how: Sampling) -> Result<Self> {
        if !(how.temperature.is_finite() && how.temperature >= 0.0) {
            let got = f64::from(how.temperature);
            return Err(Error::Sampling { name: "temperature", got, want: "a finite number, 0 for greedy" });
        }
        if how.top_k == Some(0) {
            return Err(Error::Sampling { name: "top_k", got: 0.0, want: "at least 1" });
        }
        if let Some(p) = how.top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(Error::Sampling { name: "top_p", got: f64::from(p), want: "above 0, up to 1" });
        }
        Ok(Self { how, random: ChaCha8Rng::seed_from_u64(how.seed) })
    }

    /// Picks a token.
    ///
    /// # Errors
    /// [`Error::NoTokens`] for an empty row.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits)?;
        if self.how.temperature == 0.0 {
            return Ok(best);
        }
        let mut candidates: Vec<u32> = (0..logits.len() as u32).collect();
        // Likelier first; equal logits by id, so that the order is total and the result reproducible.
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let keep = self.how.top_k.unwrap_or(logits.len()).min(logits.len());
        if keep < candidates.len() {
            candidates.select_nth_unstable_by(keep - 1, order);
            candidates.truncate(keep);
        }
        let top = logits[best as usize];
        let weight = |id: &u32| f64::from((logits[*id as usize] - top) / self.how.temperature).exp();
        if self.how.top_p.is_some() || self.how.top_k.is_some() {
            candidates.sort_unstable_by(order);
        }
        let mut weights: Vec<f64> = candidates.iter().map(weight).collect();
        if let Some(p) = self.how.top_p {
            let enough = f64::from(p) * weights.iter().sum::<f64>();
            let mut mass = 0.0;
            let kept = weights.iter().position(|w| {
                mass += w;
                mass >= enough
            });
            weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        }
        // 53 random bits make a uniform double in [0, 1).
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * weights.iter().sum::<f64>();
        let picked = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(candidates[picked.unwrap_or(weights.len() - 1)])
    }
}

/// The index of the largest logit, the lowest among equals; NaN never wins.
///
/// # Errors
/// [`Error::NoTokens`] for an empty row.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let first = logits.first().ok_or(Error::NoTokens { what: "sampling" })?;
    let mut best = (0, if first.is_nan() { f32::NEG_INFINITY } else { *first });
    for (id, logit) in logits.iter().enumerate().skip(1) {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    Ok(best.0 as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(how: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(how).unwrap();
        (0..count).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_largest() {
        assert_eq!(draws(Sampling::default(), &[0.0, 3.0, 3.0, f32::NAN], 1), [1]);
        assert_eq!(argmax(&[f32::NAN, -1.0]).unwrap(), 1);
        assert!(argmax(&[]).is_err());
    }

    #[test]
    fn one_seed_one_sequence_and_frequencies_follow_the_softmax() {
        let how = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let logits = [0.0, (2f32).ln(), (5f32).ln()];
        let a = draws(how, &logits, 8000);
        assert_eq!(a, draws(how, &logits, 8000));
        assert_ne!(a, draws(Sampling { seed: 8, ..how }, &logits, 8000));
        let share = |id: u32| a.iter().filter(|x| **x == id).count() as f64 / 8000.0;
        // Three standard deviations of a binomial share are under 0.017 here.
        for (id, want) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            assert!((share(id) - want).abs() < 0.017, "{id}: {}", share(id));
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [1.0, 5.0, 4.0, 0.0, 4.5];
        let hot = Sampling { temperature: 100.0, seed: 1, ..Sampling::default() };
        let k = draws(Sampling { top_k: Some(2), ..hot }, &logits, 500);
        assert!(k.iter().all(|id| [1, 4].contains(id)) && k.contains(&1) && k.contains(&4));
        // At temperature 1 the first token has half of the mass: p = 0.5 keeps it alone, 0.9 keeps three.
        let p = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        assert!(draws(Sampling { top_p: Some(0.4), ..p }, &logits, 200).iter().all(|id| *id == 1));
        let wide = draws(Sampling { top_p: Some(0.9), ..p }, &logits, 500);
        assert!(wide.iter().all(|id| [1, 2, 4].contains(id)) && wide.contains(&2));
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for how in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { top_k: Some(0), ..Sampling::default() },
            Sampling { top_p: Some(1.5), ..Sampling::default() },
        ] {
            assert!(matches!(Sampler::new(how), Err(Error::Sampling { .. })));
        }
    }
}
