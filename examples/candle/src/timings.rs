//! Where the time of a forward pass went: attention, or everything else.
//!
//! *Helps*: a KV cache library changes the attention share only; reporting the two apart keeps a claim about it honest.
//! *Hurts*: nothing measurable (two clock reads per layer).

use std::ops::{Add, AddAssign};
use std::time::Duration;

/// Time spent, and on how many tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Inside the attention hook: appending K and V and attending, over all layers.
    pub attention: Duration,
    /// All of the forward pass, attention included; of a prompt, what the cache does at its end too.
    pub total: Duration,
    /// Tokens fed.
    pub tokens: usize,
}

impl Timings {
    /// Everything but attention: projections, norms, feed-forward, logits.
    pub fn rest(&self) -> Duration {
        self.total.saturating_sub(self.attention)
    }

    /// Tokens per second over all of the pass; 0 if nothing was timed.
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = self.total.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }

    /// Attention per token; zero if there were no tokens.
    pub fn attention_per_token(&self) -> Duration {
        u32::try_from(self.tokens).ok().and_then(|n| self.attention.checked_div(n)).unwrap_or_default()
    }
}

impl Add for Timings {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            attention: self.attention + other.attention,
            total: self.total + other.total,
            tokens: self.tokens + other.tokens,
        }
    }
}

impl AddAssign for Timings {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_and_nothing_divides_by_zero() {
        let one = Timings { attention: Duration::from_millis(2), total: Duration::from_millis(5), tokens: 4 };
        let mut sum = one;
        sum += one;
        assert_eq!(sum.rest(), Duration::from_millis(6));
        assert_eq!(sum.attention_per_token(), Duration::from_micros(500));
        assert_eq!(Timings::default().attention_per_token(), Duration::ZERO);
        assert_eq!(Timings::default().tokens_per_second(), 0.0);
    }
}
