//! The table of everything a recipe can name: scorers, allocators, whole policies, reducers, indexes and storage of low
//! rank, each with its arguments, source and needs.
//!
//! *Helps* because the recipe parser, the command line, the documentation and the conformance suite iterate
//! over the same const entries; adding a method is one line in its table. *Hurts* nothing: it is read when
//! a recipe is built, never while tokens arrive.
//!
//! A host extends it without touching the crate: [`Registry::builtin`]`.with(entry)`, then
//! [`crate::recipe::Recipe::parse_with`].

use super::schedule::Schedule;
use super::{Allocator, Policy, Scorer, allocate, score, whole};
use crate::error::RecipeError;
use crate::index::{self, Retrieval};
use crate::low_rank::LowRank;
use crate::reduce::{self, Reducer};
use std::fmt;
use std::sync::Arc;

/// The value of an argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Count(usize),
    /// A finite number.
    Real(f64),
    /// One of the words that the argument declares.
    Word(&'static str),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(n) => write!(f, "{n}"),
            Self::Real(x) => write!(f, "{x}"),
            Self::Word(w) => f.write_str(w),
        }
    }
}

/// What an argument accepts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Accepts {
    /// Whole numbers `min ..= max`.
    Count {
        /// Smallest.
        min: usize,
        /// Largest.
        max: usize,
    },
    /// Numbers `min ..= max`.
    Real {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
    },
    /// One of these words.
    Word(&'static [&'static str]),
}

impl Accepts {
    /// The value a text stands for, if it is accepted.
    pub fn parse(&self, text: &str) -> Option<Value> {
        match *self {
            // `usize::from_str` would also take a leading '+'.
            Self::Count { min, max } if text.bytes().all(|b| b.is_ascii_digit()) => {
                text.parse().ok().filter(|n| (min..=max).contains(n)).map(Value::Count)
            }
            Self::Count { .. } => None,
            // The range also refuses NaN.
            Self::Real { min, max } => {
                text.parse().ok().filter(|x| (min..=max).contains(x)).map(|x: f64| Value::Real(x + 0.0))
            }
            Self::Word(words) => words.iter().find(|w| **w == text).map(|w| Value::Word(w)),
        }
    }
}

impl fmt::Display for Accepts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count { min, max: usize::MAX } => write!(f, "a whole number, at least {min}"),
            Self::Count { min, max } => write!(f, "a whole number from {min} to {max}"),
            Self::Real { min, max } => write!(f, "a number from {min} to {max}"),
            Self::Word(words) => write!(f, "one of {}", words.join(", ")),
        }
    }
}

/// A declared argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arg {
    /// Its name in recipes.
    pub name: &'static str,
    /// The value without it.
    pub default: Value,
    /// What it accepts.
    pub accepts: Accepts,
    /// What it does, in a sentence.
    pub doc: &'static str,
}

impl Arg {
    /// A whole number in `min ..= max`.
    pub const fn count(
        name: &'static str,
        default: usize,
        min: usize,
        max: usize,
        doc: &'static str,
    ) -> Self {
        Self { name, default: Value::Count(default), accepts: Accepts::Count { min, max }, doc }
    }

    /// A number in `min ..= max`.
    pub const fn real(name: &'static str, default: f64, min: f64, max: f64, doc: &'static str) -> Self {
        Self { name, default: Value::Real(default), accepts: Accepts::Real { min, max }, doc }
    }

    /// One of `words`; the first is the default.
    pub const fn word(name: &'static str, words: &'static [&'static str], doc: &'static str) -> Self {
        Self { name, default: Value::Word(words[0]), accepts: Accepts::Word(words), doc }
    }
}

/// The arguments of one term, complete: what was not written has its default.
#[derive(Clone, Debug, PartialEq)]
pub struct Args {
    term: String,
    values: Vec<(Arg, Value)>,
}

impl Args {
    /// The defaults of an entry's arguments.
    pub fn defaults(term: &str, args: &[Arg]) -> Self {
        Self { term: term.to_owned(), values: args.iter().map(|a| (*a, a.default)).collect() }
    }

    /// Replaces one value.
    ///
    /// # Errors
    /// [`RecipeError::Argument`] if there is no such argument, or it does not accept the text.
    pub fn set(&mut self, name: &str, text: &str) -> Result<(), RecipeError> {
        let Some((arg, value)) = self.values.iter_mut().find(|(a, _)| a.name == name) else {
            let known: Vec<_> = self.values.iter().map(|(a, _)| a.name).collect();
            let want = if known.is_empty() {
                format!("left out: {} takes no arguments", self.term)
            } else {
                format!("one of the arguments {}", known.join(", "))
            };
            return Err(self.error(name, text, want));
        };
        match arg.accepts.parse(text) {
            Some(v) => *value = v,
            None => {
                let want = arg.accepts.to_string();
                return Err(self.error(name, text, want));
            }
        }
        Ok(())
    }

    /// A value that a build function refuses for a reason the declared range cannot say.
    pub fn error(&self, argument: &str, got: impl fmt::Display, want: impl Into<String>) -> RecipeError {
        RecipeError::Argument {
            term: self.term.clone(),
            argument: argument.to_owned(),
            got: got.to_string(),
            want: want.into(),
        }
    }

    fn get(&self, name: &str) -> Result<Value, RecipeError> {
        let found = self.values.iter().find(|(a, _)| a.name == name);
        found.map(|(_, v)| *v).ok_or_else(|| self.error(name, "nothing", "declared in the entry's table"))
    }

    /// A whole number.
    ///
    /// # Errors
    /// [`RecipeError::Argument`] if the entry declares no such argument.
    pub fn count(&self, name: &str) -> Result<usize, RecipeError> {
        match self.get(name)? {
            Value::Count(n) => Ok(n),
            other => Err(self.error(name, other, "declared as a whole number")),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// As [`Args::count`].
    pub fn real(&self, name: &str) -> Result<f64, RecipeError> {
        match self.get(name)? {
            Value::Real(x) => Ok(x),
            other => Err(self.error(name, other, "declared as a number")),
        }
    }

    /// A word.
    ///
    /// # Errors
    /// As [`Args::count`].
    pub fn word(&self, name: &str) -> Result<&'static str, RecipeError> {
        match self.get(name)? {
            Value::Word(w) => Ok(w),
            other => Err(self.error(name, other, "declared as a word")),
        }
    }
}

/// The canonical term: the name, and in parentheses what differs from the defaults.
impl fmt::Display for Args {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.term)?;
        let mut open = false;
        for (arg, value) in self.values.iter().filter(|(a, v)| a.default != *v) {
            f.write_str(if open { "," } else { "(" })?;
            write!(f, "{}={value}", arg.name)?;
            open = true;
        }
        if open { f.write_str(")") } else { Ok(()) }
    }
}

/// How an entry is made, which also says at which stage it works.
#[derive(Clone, Copy, Debug)]
pub enum Build {
    /// A scorer; named alone it is a policy with uniform budgets.
    Score {
        /// When a recipe without `when=` compresses.
        schedule: Schedule,
        /// Makes it.
        build: fn(&Args) -> Result<Arc<dyn Scorer>, RecipeError>,
    },
    /// An allocator.
    Allocate {
        /// The scorer it works on where a recipe names none.
        over: &'static str,
        /// When a recipe without `when=` compresses, if not as its scorer says.
        schedule: Option<Schedule>,
        /// Makes it.
        build: fn(&Args) -> Result<Arc<dyn Allocator>, RecipeError>,
    },
    /// A policy that is not made of stages.
    Whole {
        /// When a recipe without `when=` compresses.
        schedule: Schedule,
        /// Makes it.
        build: fn(&Args) -> Result<Arc<dyn Policy>, RecipeError>,
    },
    /// A reducer; named alone it is that reducer behind the scorer `snapkv`.
    Reduce {
        /// Makes it.
        build: fn(&Args) -> Result<Arc<dyn Reducer>, RecipeError>,
    },
    /// Storage of low rank; named alone it is that under the policy `full`.
    Factor {
        /// The term of the index it is read through where a recipe names none.
        index: Option<&'static str>,
        /// Makes it.
        build: fn(&Args) -> Result<Arc<LowRank>, RecipeError>,
    },
    /// An index; named alone it is that index over the policy `full`.
    Index {
        /// Makes it.
        build: fn(&Args) -> Result<Arc<Retrieval>, RecipeError>,
    },
}

impl Build {
    /// The stage in words, as reports print it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Score { .. } => "scorer",
            Self::Allocate { .. } => "allocator",
            Self::Whole { .. } => "policy",
            Self::Reduce { .. } => "reducer",
            Self::Factor { .. } => "low rank",
            Self::Index { .. } => "index",
        }
    }
}

/// One method.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its name in recipes, file names and documentation.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// The paper.
    pub source: &'static str,
    /// What the host must feed it, in words.
    pub needs: &'static str,
    /// Its arguments.
    pub args: &'static [Arg],
    /// How it is made.
    pub build: Build,
}

impl Entry {
    /// Path of its page from the repository's root.
    pub fn page(&self) -> String {
        format!("docs/policies/{}.md", self.name)
    }
}

/// A set of entries to look names up in.
#[derive(Clone, Debug)]
pub struct Registry {
    entries: Vec<Entry>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::builtin()
    }
}

impl Registry {
    /// Everything the crate ships: whole policies, scorers, allocators, reducers, indexes, low rank.
    pub fn builtin() -> Self {
        let tables = [whole::ENTRIES, score::ENTRIES, allocate::ENTRIES, reduce::ENTRIES, index::ENTRIES];
        #[cfg_attr(not(feature = "lowrank"), allow(unused_mut, reason = "nothing is added then"))]
        let mut entries = tables.concat();
        #[cfg(feature = "lowrank")]
        entries.extend_from_slice(crate::low_rank::ENTRIES);
        Self { entries }
    }

    /// The same with one entry more. It takes the place of an entry of its name.
    #[must_use]
    pub fn with(mut self, entry: Entry) -> Self {
        self.entries.retain(|e| e.name != entry.name);
        self.entries.push(entry);
        self
    }

    /// All entries.
    pub fn iter(&self) -> std::slice::Iter<'_, Entry> {
        self.entries.iter()
    }

    /// The entry of a name.
    ///
    /// # Errors
    /// [`RecipeError::Unknown`] lists the names there are.
    pub fn find(&self, name: &str) -> Result<&Entry, RecipeError> {
        self.lookup("policy or allocator", name, |_| true)
    }

    /// The entry of a name among those that `which` admits; `kind` is what errors call them.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub(crate) fn lookup(
        &self,
        kind: &'static str,
        name: &str,
        which: impl Fn(&Build) -> bool,
    ) -> Result<&Entry, RecipeError> {
        let admitted = || self.entries.iter().filter(|e| which(&e.build));
        admitted().find(|e| e.name == name).ok_or_else(|| RecipeError::Unknown {
            kind,
            name: name.to_owned(),
            known: admitted().map(|e| e.name).collect::<Vec<_>>().join(", "),
        })
    }
}

impl<'a> IntoIterator for &'a Registry {
    type Item = &'a Entry;
    type IntoIter = std::slice::Iter<'a, Entry>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
