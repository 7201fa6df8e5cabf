//! Which layers' keys and values are stored as products of two factors, at what rank, and when.
//!
//! A method here is a line of options; the decomposition is [`crate::factor`]'s, the rows are [`crate::device::factors`]',
//! and the cache decides at the end of a prompt, and again when enough tokens have come. *Helps* long prompts of models
//! whose keys, before their rotary embedding, and values lie near a space of few dimensions, and more so over neighbouring
//! layers together. *Hurts* short ones (what would not become smaller stays as it is), the time to the first token by a
//! decomposition, and every reader of a key, who makes it first.

#[cfg(feature = "lowrank")]
mod options;
#[cfg(feature = "lowrank")]
pub mod shadowkv;
#[cfg(feature = "lowrank")]
pub mod xkv;

#[cfg(feature = "lowrank")]
use crate::policy::registry::Entry;
use std::fmt;

/// The built-in methods.
#[cfg(feature = "lowrank")]
pub const ENTRIES: &[Entry] = &[xkv::ENTRY, shadowkv::ENTRY];

/// How many dimensions the latent rows of a group of layers have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rank {
    /// None: the side is not factored.
    None,
    /// So many.
    Count(usize),
    /// This share of the features of all layers of the group, rounded up to the next multiple of 16.
    Share(f64),
}

impl Rank {
    /// The rank for so many tokens and features; 0 if the side is not factored.
    pub fn of(self, tokens: usize, features: usize) -> usize {
        let wanted = match self {
            Self::None => 0,
            Self::Count(rank) => rank,
            Self::Share(share) => ((share * features as f64).ceil() as usize).next_multiple_of(16),
        };
        wanted.min(tokens).min(features)
    }
}

/// What a recipe says of low rank.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// The method's name.
    pub name: &'static str,
    /// Layers whose rows are factored together.
    pub group: usize,
    /// From one layer of a group to the next.
    pub stride: usize,
    /// First layers that stay as they are.
    pub skip: usize,
    /// Of keys.
    pub keys: Rank,
    /// Of values.
    pub values: Rank,
    /// Largest `‖X − AB‖ / ‖X‖` (Frobenius); a side of a group that is further off at its full rank stays exact. `None`
    /// takes what the rank gives.
    pub tolerance: Option<f64>,
    /// Entries behind those that are factored, sinks and tail not counted, at which these are factored too.
    pub again: usize,
    /// Entries per KV head whose keys are remembered between steps.
    pub rebuilt: usize,
    /// Entries that are remembered together, and whose keys are kept together.
    pub chunk: usize,
    /// Chunks of a KV head whose keys stay exact beside the products: those with a key that points furthest away from the
    /// mean of its chunk (ShadowKV, arXiv 2410.21465).
    pub outliers: usize,
}

impl LowRank {
    /// The layers that are factored together, of those that may be.
    pub fn groups(&self, layers: &[usize]) -> Vec<Vec<usize>> {
        let layers = &layers[self.skip.min(layers.len())..];
        let block = (self.group * self.stride).max(1);
        let strided = |block: &[usize]| -> Vec<Vec<usize>> {
            let lines = 0..self.stride.min(block.len());
            lines.map(|first| block[first..].iter().copied().step_by(self.stride.max(1)).collect()).collect()
        };
        layers.chunks(block).flat_map(strided).collect()
    }
}

/// How far a decomposition at the end of a prompt is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRankProgress {
    /// Groups of layers that are done.
    pub done: usize,
    /// Groups there are.
    pub groups: usize,
    /// Share of the work on the present one, 0 to 1.
    pub share: f64,
}

/// Why a side of a group of layers was not factored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Refused {
    /// It would not have become smaller.
    Larger {
        /// Bytes as it is.
        exact: usize,
        /// Bytes of the factors.
        factored: usize,
    },
    /// It was further off than the tolerance.
    Inexact {
        /// `‖X − AB‖ / ‖X‖`.
        error: f64,
        /// The most there may be.
        tolerance: f64,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Larger { exact, factored } => {
                write!(f, "{factored} bytes of factors for {exact} bytes of rows")
            }
            Self::Inexact { error, tolerance } => write!(f, "error {error:.4}, tolerance {tolerance}"),
        }
    }
}

/// One side of a run of entries: what became of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SideOutcome {
    /// The recipe leaves it as it is.
    Exact,
    /// It was factored.
    Factored {
        /// Latent dimensions.
        rank: usize,
        /// `‖X − AB‖ / ‖X‖` over the group, before latent rows and bases were rounded to the type they are stored in.
        error: f64,
    },
    /// It was not.
    Refused(Refused),
}

/// What became of a run of entries of a group of layers.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankRun {
    /// The layers.
    pub layers: Vec<usize>,
    /// Position of the first entry, and one past that of the last.
    pub positions: (i32, i32),
    /// Entries of each KV head.
    pub entries: usize,
    /// Keys, before their rotary embedding.
    pub keys: SideOutcome,
    /// Values.
    pub values: SideOutcome,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(group: usize, stride: usize, skip: usize) -> LowRank {
        LowRank {
            name: "test",
            group,
            stride,
            skip,
            keys: Rank::Share(0.25),
            values: Rank::None,
            tolerance: None,
            again: 1,
            rebuilt: 0,
            chunk: 8,
            outliers: 0,
        }
    }

    #[test]
    fn groups_cover_every_layer_once() {
        let layers: Vec<usize> = vec![0, 1, 3, 4, 5, 7, 8];
        assert_eq!(options(2, 1, 0).groups(&layers), [vec![0, 1], vec![3, 4], vec![5, 7], vec![8]]);
        assert_eq!(options(2, 2, 1).groups(&layers), [vec![1, 4], vec![3, 5], vec![7], vec![8]]);
        assert_eq!(options(3, 1, 9).groups(&layers), Vec::<Vec<usize>>::new());
        for (group, stride, skip) in [(1, 1, 0), (3, 2, 0), (4, 3, 2)] {
            let mut all: Vec<usize> = options(group, stride, skip).groups(&layers).concat();
            all.sort_unstable();
            assert_eq!(all, layers[skip..]);
        }
    }

    #[test]
    fn ranks_are_no_larger_than_the_matrix() {
        assert_eq!(Rank::Share(0.25).of(4000, 192), 48);
        assert_eq!(Rank::Share(0.3).of(4000, 192), 64);
        assert_eq!(Rank::Share(0.35).of(4000, 192), 80);
        assert_eq!(Rank::Share(0.3).of(40, 192), 40);
        assert_eq!(Rank::Count(512).of(4000, 192), 192);
        assert_eq!(Rank::None.of(4000, 192), 0);
    }
}
