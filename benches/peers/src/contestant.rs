//! What is measured: anything that can run once and say what it read.
//!
//! *Helps* because limits of the machine, kvsieve and its peers go through the same rounds. *Hurts* by one
//! virtual call per run, which no measurement can see.

use std::fmt::Debug;

/// Any failure, with its reason in words.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What the machine can do at all.
    Limit,
    /// kvsieve.
    Ours,
    /// Another implementation of attention.
    Peer,
}

impl Kind {
    /// The name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Ours => "ours",
            Self::Peer => "peer",
        }
    }
}

/// Keys or values of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// One line of a table.
pub(crate) trait Contestant: Debug {
    /// The name in tables; ratios and criteria find rows by it.
    fn label(&self) -> String;

    /// Whose it is.
    fn kind(&self) -> Kind;

    /// Bytes one run has to read once: keys and values, or a buffer.
    fn bytes(&self) -> u64;

    /// Multiply-adds of one run, if that is what it measures.
    fn multiply_adds(&self) -> Option<f64> {
        None
    }

    /// What is timed.
    fn run(&mut self) -> Result<()>;

    /// Before and after the timed part: threads are woken, and told not to spin while others are measured.
    fn active(&mut self, _active: bool) {}

    /// `[query heads, tokens, d]` of the last run; `None` for limits.
    fn result(&self) -> Result<Option<Vec<f32>>>;

    /// The first `rows` keys or values of a KV head, in single precision, as they are stored; `None` for limits.
    fn held(&self, head: usize, side: Side, rows: usize) -> Option<Vec<f32>>;
}
