//! What a host configures: policy, storage types, schedule and positions, as a struct or as one line of text.
//!
//! ```text
//! recipe := term ('+' term)*
//! term   := name | name(arg=value, …)                    a policy, a scorer, an allocator, a reducer, an index, low rank
//!         | score=name(…) | alloc=name(…) | reduce=name(…) | index=name(…) | factor=name(…)
//!                                                        the same, by stage
//!         | k=store | v=store                            how keys and values are stored
//!         | layers=span(heads=span,group=N,k=store,v=store)
//!                                                        the same for some layers, heads, group sizes
//!         | exact=f16|f32|bf16(sinks=4,tail=128)         what stays exact where the rest is packed
//!         | safe | balanced | compact                    storage under one name
//!         | sinks=N | recent=N                           protected entries
//!         | marked=last|alike                            whether entries that the host marked go first
//!         | when=prefill|chunk|every(n=N)|over(slack=N)|never
//!         | positions=keep|renumber
//! store  := f32 | f16 | bf16 | name | name(flag, …)      names of crate::codec::CODECS; center, hadamard, plain
//! span   := N | A..B | A.. | ..B                         half-open, negative numbers count from the last
//! ```
//! Later terms override earlier ones; `when=` terms add up, and together replace what the policy brings.
//! An allocator without a scorer works on the one it goes with best (`snapkv` for most), a reducer on `snapkv`, an index or low
//! rank without a policy on `full`. White space is free between tokens. A scorer protects
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
//! let packed = Recipe::parse("full + k=int8 + v=int4(center,hadamard) + layers=-2..(v=int8)")?;
//! assert!(packed.precision.packs());
//! # Ok::<(), kvsieve::error::RecipeError>(())
//! ```

mod budget;
mod parse;

pub use budget::Budget;

use crate::codec::Precision;
use crate::device::encoding::Encoding;
use crate::error::{ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::index::Retrieval;
use crate::low_rank::LowRank;
use crate::policy::Policy;
use crate::policy::registry::Registry;
use crate::policy::schedule::Schedule;
use crate::profile::Profile;
use crate::reduce::Reducer;
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
    /// What becomes of entries that do not stay; `None` drops them.
    pub reduce: Option<Arc<dyn Reducer>>,
    /// The reducer that was parsed, with its canonical term.
    reduce_term: Option<(Arc<dyn Reducer>, String)>,
    /// Which entries a decode step reads; `None` reads all.
    pub index: Option<Arc<Retrieval>>,
    /// The index that was parsed, with its canonical term.
    index_term: Option<(Arc<Retrieval>, String)>,
    /// Which keys and values are stored as products of low rank; `None` stores all of them.
    pub low_rank: Option<Arc<LowRank>>,
    /// The low rank that was parsed, with its canonical term.
    low_rank_term: Option<(Arc<LowRank>, String)>,
    /// How keys and values are stored.
    pub precision: Precision,
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
            reduce: None,
            reduce_term: None,
            index: None,
            index_term: None,
            low_rank: None,
            low_rank_term: None,
            precision: Precision::default(),
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

    /// The same with all keys stored so.
    #[must_use]
    pub fn k(mut self, encoding: impl Into<Encoding>) -> Self {
        self.precision.set_k(encoding.into());
        self
    }

    /// The same with all values stored so.
    #[must_use]
    pub fn v(mut self, encoding: impl Into<Encoding>) -> Self {
        self.precision.set_v(encoding.into());
        self
    }

    /// The same with other storage.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The same with entries that do not stay mixed into those that do.
    #[must_use]
    pub fn reduce(mut self, reduce: Arc<dyn Reducer>) -> Self {
        self.reduce = Some(reduce);
        self
    }

    /// The same with decode steps that read what an index chooses.
    #[must_use]
    pub fn index(mut self, index: Arc<Retrieval>) -> Self {
        self.index = Some(index);
        self
    }

    /// The same with keys and values of low rank.
    #[must_use]
    pub fn low_rank(mut self, low_rank: Arc<LowRank>) -> Self {
        self.low_rank = Some(low_rank);
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

    /// The same with the numbers that its policy and its reducer go by out of a profile; unchanged where they need none.
    ///
    /// # Errors
    /// [`ProfileError`] if the profile is of another model, or lacks what they need.
    pub fn bind(mut self, profile: &Profile, shape: &ModelShape) -> Result<Self, ProfileError> {
        let reduce = self.reduce.clone().filter(|reduce| reduce.lacks().is_some());
        if self.policy.lacks().is_none() && reduce.is_none() {
            return Ok(self);
        }
        profile.check(shape)?;
        if self.policy.lacks().is_some()
            && let Some(bound) = self.policy.bind(profile, shape)?
        {
            if Arc::ptr_eq(&self.terms.0, &self.policy) {
                self.terms.0 = Arc::clone(&bound);
            }
            self.policy = bound;
        }
        if let Some(reduce) = reduce
            && let Some(bound) = reduce.bind(profile, shape)?
        {
            if let Some((parsed, _)) = &mut self.reduce_term
                && Arc::ptr_eq(parsed, &reduce)
            {
                *parsed = Arc::clone(&bound);
            }
            self.reduce = Some(bound);
        }
        Ok(self)
    }

    /// Whether there is something for a budget to limit: what stays, or with an index what a step reads.
    pub fn takes_budget(&self) -> bool {
        self.policy.compresses() || self.index.is_some()
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
        if let Some(reduce) = self.reduce.as_ref().filter(|_| !self.policy.compresses()) {
            return Err(RecipeError::Conflict {
                what: format!("reduce={}", reduce.name()),
                with: self.policy.name().to_owned(),
                why: "nothing leaves that could be mixed into what stays".into(),
                change: "name a policy that drops entries (snapkv, h2o), or drop the reducer".into(),
            });
        }
        // Before the index, which low rank may have brought along.
        if let Some(low_rank) = &self.low_rank {
            let refuse = |with: String, why: &str, change: &str| {
                let what = format!("factor={}", low_rank.name);
                Err(RecipeError::Conflict { what, with, why: why.into(), change: change.into() })
            };
            if self.policy.compresses() {
                return refuse(
                    self.policy.name().to_owned(),
                    "latent rows are shared by all KV heads of several layers, which must hold the same entries",
                    "use the policy full, or drop low rank",
                );
            }
            if self.precision.packs() {
                return refuse(
                    "packed keys or values".to_owned(),
                    "latent rows are stored as exact numbers",
                    "store keys and values as f32, f16 or bf16",
                );
            }
        }
        if let Some(index) = self.index.as_ref().filter(|_| self.policy.compresses()) {
            return Err(RecipeError::Conflict {
                what: format!("index={}", index.name),
                with: self.policy.name().to_owned(),
                why: "the budget is what a step reads where there is an index, and what stays where there is none"
                    .into(),
                change: "use the policy full with an index, or drop the index".into(),
            });
        }
        if self.positions == PositionMode::Renumber && self.precision.packs_keys() {
            return Err(RecipeError::Conflict {
                what: "positions=renumber".into(),
                with: "packed keys".into(),
                why: "keys are re-rotated, and packed ones cannot be".into(),
                change: "store keys as f32, f16 or bf16 (values may stay packed), or use positions=keep"
                    .into(),
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
        if let Some(reduce) = &self.reduce {
            let parsed = self.reduce_term.as_ref().filter(|(parsed, _)| Arc::ptr_eq(parsed, reduce));
            write!(f, "+reduce={}", parsed.map_or(reduce.name(), |(_, term)| term))?;
        }
        if let Some(index) = &self.index {
            let parsed = self.index_term.as_ref().filter(|(parsed, _)| Arc::ptr_eq(parsed, index));
            write!(f, "+index={}", parsed.map_or(index.name, |(_, term)| term))?;
        }
        if let Some(low_rank) = &self.low_rank {
            let parsed = self.low_rank_term.as_ref().filter(|(parsed, _)| Arc::ptr_eq(parsed, low_rank));
            write!(f, "+factor={}", parsed.map_or(low_rank.name, |(_, term)| term))?;
        }
        self.precision.fmt(f)?;
        if self.schedule != self.default_schedule {
            parse::write_schedule(f, self.schedule)?;
        }
        if self.positions == PositionMode::Renumber {
            f.write_str("+positions=renumber")?;
        }
        Ok(())
    }
}
