//! Indexes: which stored entries a query reads. Everything stays stored; a decode step reads little of it and can say
//! what the rest would have weighed.
//!
//! A method of the literature is a tuple of stages, and the stages are shared:
//! ```text
//! summarise → score → group → choose → refine → attend → tail
//! ```
//! A [`Summary`] cuts the entries of a KV head into *units* (pages, clusters) and describes each by a row or two.
//! Those rows lie in pages of their own ([`LayerIndex`]), in any encoding, so that forks share them and every kernel
//! reads them: a query's logits on units are [`crate::kernel::dot_scores`], and the estimate of what was not read is
//! [`crate::kernel::weigh_values`]: the rows of units, each with the weight of its members that were not read. Where an
//! index keeps codes of entries within units, entries are chosen out of the heaviest units
//! ([`crate::kernel::code_scores`]). The rest is the same for all methods and stands in [`ReadRule`] and [`choose`].
//!
//! *Helps* long contexts, where reading all keys and values is what a decode step takes its time for, and where
//! eviction would throw away what a later question asks about. *Hurts* by the memory of the summaries (every page in
//! `docs/policies` states it), and below a few thousand entries, where reading everything costs less than choosing.

pub mod a2ats;
pub mod auto;
pub mod choose;
pub mod clusterkv;
mod clusters;
pub mod codes;
mod layer;
pub mod lserve;
pub mod options;
pub mod pages;
mod part;
pub mod pq;
pub mod quest;
pub mod retroinfer;
mod spread;
pub mod squeezed;
mod units;

pub use clusters::Clusters;
pub use codes::{Codebook, Codebooks, Codes, windowed};
pub use layer::{Growth, HeadUnits, LayerIndex, TableStorage};
pub use options::{Calibration, Goal, Group, ReadRule, Tail, Thresholds};
pub use part::IndexPart;
pub use spread::Spread;
pub use units::{Pages, stray};

use crate::backend::Backend;
use crate::device::encoding::{Encoding, Format, Packing};
use crate::error::{KernelError, RecipeError};
use crate::geometry::{LayerShape, ModelShape};
use crate::kernel::code_scores::CodeLayout;
use crate::policy::registry::Entry;
use crate::view::DType;
use std::fmt::Debug;
use std::sync::Arc;

/// The built-in indexes.
pub const ENTRIES: &[Entry] = &[
    auto::ENTRY,
    pages::ENTRY,
    quest::ENTRY,
    lserve::ENTRY,
    squeezed::ENTRY,
    clusterkv::ENTRY,
    retroinfer::ENTRY,
    pq::ENTRY,
    a2ats::ENTRY,
];

/// What the rows of a table say of their units, and so how a query is put to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Key `mean k` (`d_k`), value `mean v` (`d_v`), β `ln n`: a logit is the logarithm of the weight that all members
    /// together are estimated to have (from below: the mean of exponentials is at least the exponential of the mean),
    /// and attention over such rows estimates attention over the members.
    Mean,
    /// Key `[c, r]` (`2 d_k`) with `|k − c| <= r` in every dimension for every member, β `ln n`: for the query
    /// `[q, |q|]` a logit is never less than the logarithm of the weight of all members together. One value, unused.
    Bound,
    /// Key `mean k` (`d_k`) of the entries of a group of neighbouring units, β `ln n`: a level above [`Role::Mean`]. One
    /// value, unused.
    Group,
    /// Key: a product-quantisation code, its words as the bits of numbers that nothing computes with. No value; the
    /// codebook of the KV head says what it means.
    Code(CodeLayout),
    /// The same of what an entry's key has beside the mean of its unit: one row per entry, unit after unit, below
    /// [`Role::Mean`].
    Residual(CodeLayout),
}

impl Role {
    /// How codes lie, where rows are codes.
    pub fn codes(self) -> Option<CodeLayout> {
        match self {
            Self::Code(layout) | Self::Residual(layout) => Some(layout),
            Self::Mean | Self::Bound | Self::Group => None,
        }
    }

    /// Dimensions of a row's key and value.
    pub fn dims(self, shape: &LayerShape) -> (usize, usize) {
        match self {
            Self::Mean => (shape.d_k, shape.d_v),
            Self::Bound => (2 * shape.d_k, 1),
            Self::Group => (shape.d_k, 1),
            Self::Code(layout) | Self::Residual(layout) => (layout.words(), 0),
        }
    }

    /// Appends queries (`[rows, d_k]`) as they are put to rows of this role.
    pub fn queries(self, d_k: usize, queries: &[f32], out: &mut Vec<f32>) {
        match self {
            Self::Mean | Self::Group | Self::Code(_) | Self::Residual(_) => out.extend_from_slice(queries),
            Self::Bound => {
                for query in queries.chunks_exact(d_k) {
                    out.extend_from_slice(query);
                    out.extend(query.iter().map(|x| x.abs()));
                }
            }
        }
    }
}

/// A table of rows that an index keeps for every KV head: one row per unit, or per group of units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// What the rows say.
    pub role: Role,
    /// How they are stored.
    pub encoding: Encoding,
}

impl Table {
    /// A table whose rows are stored as `encoding`; means in four bits are rotated before, because one channel that is
    /// large everywhere would leave the others of a row few of the sixteen steps. Bounds are of channels as they are.
    pub const fn new(role: Role, encoding: Encoding) -> Self {
        let encoding = match encoding {
            Encoding::Packed(packing) if matches!(packing.format, Format::Int4) => {
                Encoding::Packed(Packing { hadamard: matches!(role, Role::Mean | Role::Group), ..packing })
            }
            _ => encoding,
        };
        Self { role, encoding }
    }

    /// How rows are stored until there are enough of them to be packed.
    pub fn waiting(&self) -> DType {
        self.encoding.exact().unwrap_or(DType::F16)
    }
}

/// Consecutive entries of one KV head, exact as far as they are stored so.
#[derive(Clone, Copy, Debug)]
pub struct Entries<'a> {
    /// `[n, d_k]`.
    pub keys: &'a [f32],
    /// `[n, d_v]`.
    pub values: &'a [f32],
    /// `[n]`: where the entries stand in the text.
    pub positions: &'a [i32],
    /// `n`.
    pub count: usize,
}

/// What units of a KV head are made of, and, the first time, what is learnt from.
#[derive(Clone, Copy, Debug)]
pub struct Lesson<'a> {
    /// Where kernels run.
    pub backend: &'a dyn Backend,
    /// The layer.
    pub shape: &'a LayerShape,
    /// The entries.
    pub entries: &'a Entries<'a>,
    /// `[G, W, d_k]`: the last queries of the heads that share the KV head, as far as they were recorded
    /// ([`Summary::queries`]), as long as nothing is learnt.
    pub queries: &'a [f32],
    /// `[W]`: where these stand in the text.
    pub asked: &'a [i32],
}

/// What a summary makes of some entries.
#[derive(Clone, Debug, Default)]
pub struct Units {
    /// Members of each unit.
    pub counts: Vec<u32>,
    /// Members unit after unit, as indices into the entries; empty if units are runs of consecutive entries.
    pub members: Vec<u32>,
    /// Units of each group, neighbours; empty if units are in no groups.
    pub groups: Vec<u32>,
    /// Rows of each table: keys and values.
    pub rows: Vec<UnitRows>,
    /// Where entries have codes within units: how far the farthest key of each lies from its mean.
    pub radii: Vec<f32>,
    /// Where outliers are read first: how far each unit's members point away from their mean.
    pub strays: Vec<f32>,
    /// What was learnt, where nothing had been before.
    pub book: Option<Codebook>,
}

impl Units {
    /// Members of each group.
    fn group_counts(&self) -> Vec<u32> {
        let mut rest = self.counts.as_slice();
        let groups = self.groups.iter().map(|&units| {
            let (group, behind) = rest.split_at(units as usize);
            rest = behind;
            group.iter().sum()
        });
        groups.collect()
    }
}

/// Rows of a table.
#[derive(Clone, Debug, Default)]
pub struct UnitRows {
    /// `[units, dims.0]`, see [`Role::dims`].
    pub keys: Vec<f32>,
    /// `[units, dims.1]`.
    pub values: Vec<f32>,
}

/// How entries become units and units become rows: the stages *summarise* and *score*.
pub trait Summary: Debug + Send + Sync {
    /// The tables it keeps; the first one is scored.
    fn tables(&self) -> &[Table];

    /// How many of `pending` entries behind the last unit the next call of [`Summary::summarise`] is to take; 0 while there
    /// are too few. `open` says that more of the prompt may follow, `learnt` that the KV head has a codebook. A
    /// caller asks again until it gets 0, so that adding entries one by one or all at once gives the same units wherever
    /// the method allows it.
    fn take(&self, pending: usize, open: bool, learnt: bool) -> usize;

    /// Members of every unit if all are runs of that many consecutive entries, in order.
    fn unit(&self) -> Option<usize>;

    /// Entries that wait to become units, at most.
    fn waiting(&self) -> usize;

    /// Whether it works for this model, of which layers from `dense` on are indexed. Called before anything runs.
    ///
    /// # Errors
    /// [`RecipeError::Conflict`] names the option to change.
    fn check(&self, _shape: &ModelShape, _dense: usize) -> Result<(), RecipeError> {
        Ok(())
    }

    /// Last queries of every layer that codebooks are learnt from: nothing is summarised before the prompt that they end.
    fn queries(&self) -> usize {
        0
    }

    /// Where queries are put in relation to all entries, if not where they stand: [`windowed::place`].
    fn distance(&self) -> Option<i32> {
        None
    }

    /// Cuts entries into units. Every entry is a member of one. `book` is what was learnt before: where codes have none,
    /// these are the first entries and [`Units::book`] is learnt from them.
    ///
    /// # Errors
    /// [`KernelError`].
    fn summarise(&self, lesson: &Lesson<'_>, book: Option<&Codebook>) -> Result<Units, KernelError>;
}

/// A complete index: what a recipe names.
#[derive(Clone, Debug)]
pub struct Retrieval {
    /// The entry it was made from.
    pub name: &'static str,
    /// Its units.
    pub summary: Arc<dyn Summary>,
    /// Everything else.
    pub rule: ReadRule,
}

impl Retrieval {
    /// The first table of a role, by its place in [`Summary::tables`].
    pub fn table(&self, role: Role) -> Option<usize> {
        self.summary.tables().iter().position(|t| t.role == role)
    }

    /// The table of codes within units, if there is one: entries are then chosen out of units.
    pub fn residuals(&self) -> Option<(usize, CodeLayout)> {
        self.summary.tables().iter().enumerate().find_map(|(i, table)| match table.role {
            Role::Residual(layout) => Some((i, layout)),
            _ => None,
        })
    }

    /// Entries that every step reads whatever is chosen, at most: sinks, recent ones, and those that wait to become a
    /// unit.
    pub fn always(&self) -> usize {
        self.rule.sinks + self.rule.recent + self.summary.waiting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_in_four_bits_are_rotated_and_nothing_else_is() {
        let int4 = Encoding::Packed(Packing::new(Format::Int4));
        let rotated = Encoding::Packed(Packing::new(Format::Int4).rotated());
        for role in [Role::Mean, Role::Group] {
            assert_eq!(Table::new(role, int4).encoding, rotated);
        }
        assert_eq!(Table::new(Role::Bound, int4).encoding, int4);
        // Tables beside others take what these are stored as.
        assert_eq!(Table::new(Role::Bound, rotated).encoding, int4);
        for other in [Encoding::Packed(Packing::new(Format::Int8)), DType::F16.into()] {
            assert_eq!(Table::new(Role::Mean, other).encoding, other);
        }
    }
}
