//! One configuration: shapes, counts of bytes and operations, and the questions asked of the cache.
//!
//! *Helps* because all contestants are built from the same description. *Hurts* nothing.

use kvsieve::testing::Random;
use kvsieve::view::DType;

/// KV heads of every configuration.
pub(crate) const KV_HEADS: usize = 8;
/// Entries stored in prefill, the chunk included.
pub(crate) const PREFILL_CONTEXT: usize = 8192;
/// Queries of a prefill chunk.
pub(crate) const PREFILL_CHUNK: usize = 512;

/// One query, or a chunk of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// One query that sees every entry.
    Decode,
    /// The last queries of the context, causal.
    Prefill,
}

impl Phase {
    /// The name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
        }
    }
}

/// Shapes of one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    /// One query or a chunk.
    pub(crate) phase: Phase,
    /// Entries per KV head.
    pub(crate) n: usize,
    /// Head dimension of keys and values.
    pub(crate) d: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
}

impl Config {
    /// Queries per head.
    pub(crate) fn tokens(&self) -> usize {
        match self.phase {
            Phase::Decode => 1,
            Phase::Prefill => PREFILL_CHUNK,
        }
    }

    /// Query heads.
    pub(crate) fn query_heads(&self) -> usize {
        KV_HEADS * self.group
    }

    /// Entries that query `token` sees.
    pub(crate) fn visible(&self, token: usize) -> usize {
        self.n - self.tokens() + token + 1
    }

    /// Multiply-adds that the result needs: two products of `d` for each pair that is seen.
    pub(crate) fn multiply_adds(&self) -> f64 {
        let pairs: usize = (0..self.tokens()).map(|t| self.visible(t)).sum();
        (self.query_heads() * pairs * 2 * self.d) as f64
    }

    /// Factor on `q·k`.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// Bytes of keys and values at `width` bytes per element.
    pub(crate) fn kv_bytes(&self, width: usize) -> u64 {
        (2 * KV_HEADS * self.n * self.d * width) as u64
    }

    /// `[query heads, tokens, d]`, unit normal, the same for every contestant.
    pub(crate) fn queries(&self) -> Vec<f32> {
        Random::new(2).rows(self.query_heads() * self.tokens() * self.d, 1.0, DType::F32)
    }
}

impl std::fmt::Display for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (phase, n, group, d) = (self.phase.name(), self.n, self.group, self.d);
        write!(f, "{phase}, n = {n}, G = {group}, d = {d}, {KV_HEADS} KV heads")?;
        match self.phase {
            Phase::Decode => Ok(()),
            Phase::Prefill => write!(f, ", causal chunk of {PREFILL_CHUNK}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_query_sees_everything_and_the_first_all_before_it() {
        let config = Config { phase: Phase::Prefill, n: 8192, d: 64, group: 1 };
        assert_eq!((config.visible(0), config.visible(511)), (7681, 8192));
        let decode = Config { phase: Phase::Decode, ..config };
        assert_eq!(decode.visible(0), 8192);
        assert!((decode.multiply_adds() - (8 * 8192 * 2 * 64) as f64).abs() < 0.5);
    }
}
