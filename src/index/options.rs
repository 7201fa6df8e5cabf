//! The options that every index has, whatever its units are.

use crate::error::RecipeError;
use crate::policy::registry::{Arg, Args, Value};

/// How the query heads of a group (and the tokens of a step), which share what is read, agree on a score per unit.
///
/// A unit's weight in a row is relative to everything the row sees: sinks, recent entries and all units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// The largest weight among the rows.
    Max,
    /// The sum of the weights.
    Sum,
    /// The largest logit.
    Logit,
    /// The mean of the logits.
    Mean,
    /// The best rank: every row names its units in turn until the budget is used.
    Union,
}

const GROUPS: [(&str, Group); 5] = [
    ("max", Group::Max),
    ("sum", Group::Sum),
    ("logit", Group::Logit),
    ("mean", Group::Mean),
    ("union", Group::Union),
];

/// What becomes of the units that are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tail {
    /// Nothing: the weights of what is read are normalised.
    Ignore,
    /// Their mean values join with their estimated weights.
    Estimate,
}

/// When enough is read, below the budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Share of the softmax mass to read, in every row.
    pub mass: f64,
    /// Whether an upper bound of what is missing must meet it, not an estimate.
    pub certified: bool,
    /// Entries that are read before it is asked.
    pub floor: usize,
}

/// What decides by a threshold on weights instead of by rank: heads and layers then share one budget, and read more where
/// their attention is spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// Last queries of a prompt that the thresholds are made from.
    pub queries: usize,
    /// What one KV head may read in one step, in budgets.
    pub cap: f64,
    /// Share of the entries whose groups are looked into, in shares of those that are read.
    pub widen: f64,
}

/// What a calibration found: units and groups are read, or looked into, from this share of a row's mass per entry on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Thresholds {
    /// Of units.
    pub unit: f32,
    /// Of groups.
    pub group: f32,
}

/// Everything about reading that does not depend on what the units are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadRule {
    /// First entries, always read and in no unit.
    pub sinks: usize,
    /// Last entries, always read and in no unit.
    pub recent: usize,
    /// How rows agree.
    pub group: Group,
    /// Units are chosen so many neighbours at a time, by the best of them.
    pub fold: usize,
    /// Whether a unit is ranked by the weight of one of its members, not of all.
    pub by_entry: bool,
    /// What becomes of the rest.
    pub tail: Tail,
    /// Share of the units that are estimated, the best of those that are not read; the others count for nothing.
    pub estimate: f64,
    /// Whether the weight of a unit's members is taken to be more than that of its mean, by what their logits vary:
    /// `ln(1 + ½ s² qᵀΣq)` with the pooled covariance `Σ` of keys within units.
    pub correct: bool,
    /// When enough is read.
    pub goal: Option<Goal>,
    /// Whether a threshold decides.
    pub calibration: Option<Calibration>,
    /// Where units have codes within: entries whose units are looked into, the heaviest, for each that is read.
    pub widen: f64,
    /// Which are heaviest is said of their farthest key, taken to reach beyond the mean by this many times what keys vary.
    pub reach: f64,
    /// So many units whose members point furthest away from their mean are taken before all others, as far as they fill no
    /// more than [`ReadRule::OUTLIERS`] of what a step may read. None unless the summary measures it
    /// ([`Units::strays`](super::Units::strays)).
    pub outliers: usize,
    /// A choice is kept for so many steps.
    pub every: usize,
    /// So many neighbouring layers use the choice of the first of them.
    pub share: usize,
    /// So many first layers read everything.
    pub dense: usize,
    /// Fewer entries are read whole.
    pub min_context: usize,
    /// A step that would read more than this share of the entries reads all.
    pub most: f64,
}

/// Arguments that [`ReadRule::from_args`] reads, with their defaults: sinks, recent, rows' agreement, tail, cadence,
/// dense layers.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// [`ReadRule::sinks`].
    pub sinks: usize,
    /// [`ReadRule::recent`].
    pub recent: usize,
    /// Names of [`Group`], the default first.
    pub group: &'static [&'static str],
    /// Names for [`ReadRule::by_entry`], the default first.
    pub rank: &'static [&'static str],
    /// Names of [`Tail`], the default first.
    pub tail: &'static [&'static str],
    /// [`ReadRule::estimate`].
    pub estimate: f64,
    /// Names for [`ReadRule::correct`], the default first.
    pub correct: &'static [&'static str],
    /// [`ReadRule::every`].
    pub every: usize,
    /// [`ReadRule::dense`].
    pub dense: usize,
}

/// A method's own arguments and those of every index: `M` is `N` and [`COMMON`].
///
/// # Panics
/// If it is not; in a constant, when that is compiled.
pub const fn arguments<const N: usize, const M: usize>(own: [Arg; N], defaults: Defaults) -> [Arg; M] {
    let common = [
        Arg::count("sinks", defaults.sinks, 0, 1 << 16, "first entries, always read"),
        Arg::count("recent", defaults.recent, 1, 1 << 20, "last entries, always read"),
        Arg::word("group", defaults.group, "how the rows that share a KV head agree on a unit's score"),
        Arg::word("rank", defaults.rank, "whether a unit counts by all its members' weight or by one's"),
        Arg::word("tail", defaults.tail, "what becomes of the units that are not read"),
        Arg::real(
            "estimate",
            defaults.estimate,
            0.0,
            1.0,
            "share of the units that the tail covers, best first",
        ),
        Arg::word("correct", defaults.correct, "whether means are corrected for how keys vary around them"),
        Arg::real("mass", 0.0, 0.0, 1.0, "share of the mass to read, within the budget; 0 reads the budget"),
        Arg::word("goal", &["estimate", "bound"], "what must meet the mass"),
        Arg::count("floor", 0, 0, 1 << 20, "entries to choose before the mass is asked"),
        Arg::count("every", defaults.every, 1, 1 << 10, "steps that keep a choice"),
        Arg::count("share", 1, 1, 1 << 10, "neighbouring layers that use one choice"),
        Arg::count("dense", defaults.dense, 0, 1 << 10, "first layers that read everything"),
        Arg::count("min_context", 512, 0, 1 << 30, "entries below which everything is read"),
        Arg::real("most", 0.5, 0.0, 1.0, "share of the entries above which everything is read"),
    ];
    assert!(M == N + common.len(), "the method's arguments and those of every index");
    let mut all = [common[0]; M];
    let mut i = 0;
    while i < M {
        all[i] = if i < N { own[i] } else { common[i - N] };
        i += 1;
    }
    all
}

/// How many arguments every index has.
pub const COMMON: usize = 15;

impl ReadRule {
    /// Share of what a step may read that outliers fill at most: ShadowKV's 24 chunks of 8 in 1,024 entries.
    pub const OUTLIERS: f64 = 0.1875;

    /// Reads what [`arguments`] declared; units are chosen one by one.
    ///
    /// # Errors
    /// [`RecipeError::Argument`].
    pub fn from_args(args: &Args) -> Result<Self, RecipeError> {
        let group = args.word("group")?;
        let Some((_, group)) = GROUPS.into_iter().find(|(name, _)| *name == group) else {
            return Err(args.error("group", group, "max, sum, logit, mean or union"));
        };
        let mass = args.real("mass")?;
        let (certified, floor) = (args.word("goal")? == "bound", args.count("floor")?);
        Ok(Self {
            sinks: args.count("sinks")?,
            recent: args.count("recent")?,
            group,
            fold: 1,
            by_entry: args.word("rank")? == "entry",
            estimate: args.real("estimate")?,
            correct: args.word("correct")? == "yes",
            tail: if args.word("tail")? == "estimate" { Tail::Estimate } else { Tail::Ignore },
            calibration: None,
            widen: 1.0,
            reach: 0.0,
            outliers: 0,
            goal: (mass > 0.0).then_some(Goal { mass, certified, floor }),
            every: args.count("every")?,
            share: args.count("share")?,
            dense: args.count("dense")?,
            min_context: args.count("min_context")?,
            most: args.real("most")?,
        })
    }
}

/// The value of a storage argument as an encoding.
///
/// # Errors
/// [`RecipeError`] for a name that is no storage type.
pub fn encoding(args: &Args, name: &str) -> Result<crate::device::encoding::Encoding, RecipeError> {
    let word = args.word(name)?;
    crate::codec::parse(&format!("{name}={word}"), word, std::iter::empty())
        .map_err(|_| args.error(name, Value::Word(word), "a storage type"))
}
