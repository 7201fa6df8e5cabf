//! What a host configures: policy, storage types, schedule and positions, as a struct or as one line of text.
//!
//! ```text
//! recipe := term ('+' term)*
//! term   := name | name(arg=value, …)                    a policy, a scorer or an allocator
//!         | score=name(…) | alloc=name(…)                the same, by stage
//!         | k=f32|f16|bf16 | v=f32|f16|bf16              storage types
//!         | sinks=N | recent=N                           protected entries
//!         | when=prefill|chunk|every(n=N)|over(slack=N)|never
//!         | positions=keep|renumber
//! ```
//! Later terms override earlier ones; `when=` terms add up, and together replace what the policy brings.
//! An allocator without a scorer works on `snapkv`. White space is free between tokens. A scorer protects
//! entries of its own (the window of `snapkv`); `sinks` and `recent` can add to that, not take away.
//!
//! *Helps* because one line in a log, a command or a C call names everything that was chosen. *Hurts* where
//! a policy needs an object (weights, a closure): build it in code and pass it to [`Recipe::new`].
//!
//! ```
//! use kvsieve::recipe::Recipe;
//!
//! let recipe = Recipe::parse("snapkv(window=32) + adakv + sinks=4 + v=f16")?;
//! assert_eq!(recipe.to_string(), "snapkv(window=32)+alloc=adakv+sinks=4+v=f16");
//! assert!(Recipe::parse("snapkv(windw=32)").is_err());
//! # Ok::<(), kvsieve::error::RecipeError>(())
//! ```

mod budget;
mod parse;

pub use budget::Budget;

use crate::error::RecipeError;
use crate::policy::Policy;
use crate::policy::registry::Registry;
use crate::policy::schedule::Schedule;
use crate::view::DType;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What happens to the positions of surviving entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PositionMode {
    /// Entries keep the positions they were written with; a gap stays a gap.
    #[default]
    Keep,
    /// After each compaction entries count from 0 without gaps, and their keys are turned accordingly.
    Renumber,
}

/// Everything a host chooses, except how much memory there is: that is a [`Budget`].
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What decides which entries stay.
    pub policy: Arc<dyn Policy>,
    /// The canonical terms of the policy they were parsed into; of no meaning for another one.
    terms: (Arc<dyn Policy>, String),
    /// The schedule that needs no `when=` term.
    default_schedule: Schedule,
    /// Storage type of keys.
    pub k: DType,
    /// Storage type of values.
    pub v: DType,
    /// When the cache compresses.
    pub schedule: Schedule,
    /// What becomes of positions.
    pub positions: PositionMode,
}

impl Recipe {
    /// A recipe around a policy object: `f32` keys and values, compressed once after the prompt, positions
    /// kept.
    pub fn new(policy: Arc<dyn Policy>) -> Self {
        let schedule = Schedule { prefill: policy.compresses(), ..Schedule::NEVER };
        let terms = (policy.clone(), policy.name().to_owned());
        Self {
            policy,
            terms,
            default_schedule: schedule,
            k: DType::F32,
            v: DType::F32,
            schedule,
            positions: PositionMode::Keep,
        }
    }

    /// Reads a recipe of built-in names.
    ///
    /// # Errors
    /// [`RecipeError`] says where the text goes wrong and what was expected.
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        Self::parse_with(text, &Registry::builtin())
    }

    /// Reads a recipe of the names in `registry`.
    ///
    /// # Errors
    /// As [`Recipe::parse`].
    pub fn parse_with(text: &str, registry: &Registry) -> Result<Self, RecipeError> {
        parse::recipe(text, registry)
    }

    /// The same with keys stored as `dtype`.
    #[must_use]
    pub fn k(mut self, dtype: DType) -> Self {
        self.k = dtype;
        self
    }

    /// The same with values stored as `dtype`.
    #[must_use]
    pub fn v(mut self, dtype: DType) -> Self {
        self.v = dtype;
        self
    }

    /// The same with another schedule.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// The same with another treatment of positions.
    #[must_use]
    pub fn positions(mut self, positions: PositionMode) -> Self {
        self.positions = positions;
        self
    }

    /// What can be told without a model; the cache checks the rest when it is built.
    fn check_parts(&self) -> Result<(), RecipeError> {
        if self.positions == PositionMode::Renumber && !self.policy.equal_counts() {
            return Err(RecipeError::Conflict {
                what: "positions=renumber".into(),
                with: self.policy.name().to_owned(),
                why: "its KV heads keep different numbers of entries, but a query has one position".into(),
                change: "use alloc=uniform, or drop positions=renumber".into(),
            });
        }
        Ok(())
    }
}

impl FromStr for Recipe {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<Self, RecipeError> {
        Self::parse(text)
    }
}

/// The canonical text: the policy's terms, then what differs from their defaults. Parses back to the same
/// recipe if the policy came from a registry.
impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (parsed, terms) = &self.terms;
        f.write_str(if Arc::ptr_eq(parsed, &self.policy) { terms } else { self.policy.name() })?;
        for (stage, dtype) in [("k", self.k), ("v", self.v)] {
            if dtype != DType::F32 {
                write!(f, "+{stage}={}", dtype.name())?;
            }
        }
        if self.schedule != self.default_schedule {
            parse::write_schedule(f, self.schedule)?;
        }
        if self.positions == PositionMode::Renumber {
            f.write_str("+positions=renumber")?;
        }
        Ok(())
    }
}
