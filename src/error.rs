//! Every way a call can fail: one enum per family of operations, all convertible into [`Error`].
//!
//! A message names the numbers that did not fit and the option or call that would. Nothing here is a
//! string the library made up elsewhere: callers can match on the fields.
//!
//! *Helps* whoever reads the message, and hosts that react to one cause and pass on the rest. *Hurts* by a
//! few long variants: an error is built on cold paths only.

mod learned;
mod profile;

pub use learned::LearnedError;
pub use profile::ProfileError;

use crate::geometry::Position;
use crate::view::{Dims, Strides};

/// A model description that cannot be true.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// A field of a layer is out of its range or contradicts another.
    #[error("layer {layer}: {what} is {got}, must be {want}")]
    Geometry {
        /// Index of the layer.
        layer: usize,
        /// The field.
        what: &'static str,
        /// What was given.
        got: String,
        /// What is accepted.
        want: String,
    },
}

/// A tensor view that does not describe its slice.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The last element lies outside the slice.
    #[error("a view of {dims:?} with {strides:?} needs {} elements, the slice has {len}", .required.map_or_else(|| "more than usize::MAX".to_owned(), |n| n.to_string()))]
    OutOfBounds {
        /// Extents of the view.
        dims: Dims,
        /// Strides of the view, in elements.
        strides: Strides,
        /// Elements needed; `None` if the count overflows.
        required: Option<usize>,
        /// Elements there.
        len: usize,
    },
    /// A zero stride would write one element several times.
    #[error(
        "an output view of {dims:?} with {strides:?} writes the same element twice: give every extent above 1 a stride above 0"
    )]
    Overlapping {
        /// Extents of the view.
        dims: Dims,
        /// Strides of the view, in elements.
        strides: Strides,
    },
}

/// The machine, or the driver, said no.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The system gave no memory.
    #[error(
        "could not get {bytes} bytes of {memory} memory: {reason}; lower the budget, or store k and v in a smaller type"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// "host" or "device".
        memory: &'static str,
        /// What the system said.
        reason: String,
    },
    /// No usable adapter.
    #[error(
        "no GPU adapter: {reason}; install a Vulkan driver (Debian: mesa-vulkan-drivers for a software one) or use the cpu backend"
    )]
    NoAdapter {
        /// What wgpu said.
        reason: String,
    },
    /// The device failed while working.
    #[error("the GPU device failed in {operation}: {reason}")]
    Lost {
        /// What was being done.
        operation: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// The adapter's limits are below what a call needs.
    #[error("{what} needs {need}, this adapter allows {limit}; {hint}")]
    Limit {
        /// The limit.
        what: &'static str,
        /// What the call needs.
        need: u64,
        /// What the adapter allows.
        limit: u64,
        /// The option to change.
        hint: &'static str,
    },
    /// A thread pool could not be built.
    #[error("could not start {threads} threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What rayon said.
        reason: String,
    },
}

/// A kernel was called outside its contract.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The backend has no implementation. There is never a silent fallback to the host.
    #[error("the {backend} backend has no kernel {kernel}{}{detail}", if .detail.is_empty() { "" } else { ": " })]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// The kernel.
        kernel: &'static str,
        /// Which variant is missing.
        detail: String,
    },
    /// A buffer has another length than the contract says.
    #[error("kernel {kernel}: {buffer} has {got} elements, needs {want}")]
    Length {
        /// The kernel.
        kernel: &'static str,
        /// The argument.
        buffer: &'static str,
        /// Its length.
        got: usize,
        /// The length the contract asks for.
        want: usize,
    },
    /// Pages stored in a way the kernel cannot work on.
    #[error("kernel {kernel}: {problem}")]
    Layout {
        /// The kernel.
        kernel: &'static str,
        /// What is wrong, and what would do.
        problem: &'static str,
    },
    /// A number that cannot be packed.
    #[error("kernel {kernel}: {buffer}, row {row} holds a NaN or an infinity")]
    NotFinite {
        /// The kernel.
        kernel: &'static str,
        /// The argument.
        buffer: &'static str,
        /// Its row.
        row: usize,
    },
    /// Numbers too large for a packed format.
    #[error(
        "kernel {kernel}: row {row}, or its scale, does not fit a half, as {format} stores it; store these rows as f32"
    )]
    Range {
        /// The kernel.
        kernel: &'static str,
        /// First row of the group.
        row: usize,
        /// The format.
        format: &'static str,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A matrix that cannot be factored, or not as asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FactorError {
    /// There is nothing to factor.
    #[error("a matrix of {tokens} tokens by {features} features has no elements: factor at least one row")]
    Empty {
        /// Rows.
        tokens: usize,
        /// Columns.
        features: usize,
    },
    /// A slice that is not the matrix it is said to be.
    #[error("{buffer} has {got} elements, {rows} rows of {columns} need {}", .rows.checked_mul(*.columns).map_or_else(|| "more than usize::MAX".to_owned(), |n| n.to_string()))]
    Length {
        /// The slice.
        buffer: &'static str,
        /// Its length.
        got: usize,
        /// Rows it should hold.
        rows: usize,
        /// Columns of each.
        columns: usize,
    },
    /// Rows that are not in the matrix.
    #[error("rows {first}..{end} of a matrix of {tokens} rows")]
    Rows {
        /// First row asked for.
        first: usize,
        /// End, exclusive.
        end: usize,
        /// There are.
        tokens: usize,
    },
    /// A rank that the matrix cannot have.
    #[error(
        "rank = {rank} for a matrix of {tokens} tokens by {features} features, must be 1 to {}; change the option rank",
        .tokens.min(.features)
    )]
    Rank {
        /// Asked for.
        rank: usize,
        /// Rows.
        tokens: usize,
        /// Columns.
        features: usize,
    },
    /// A tolerance that is no share.
    #[error("tolerance = {got}, must be 0 or more and finite; leave it out to keep the whole rank")]
    Tolerance {
        /// What was given.
        got: f64,
    },
    /// Sizes whose product is no `usize`.
    #[error(
        "{what} of {rows} by {columns} has more than usize::MAX bytes; factor fewer tokens or layers at once"
    )]
    TooLarge {
        /// The matrix.
        what: &'static str,
        /// Its rows.
        rows: usize,
        /// Its columns.
        columns: usize,
    },
    /// The system gave no memory.
    #[error(
        "could not get {bytes} bytes for {what}; lower the option rank, or factor fewer tokens or layers at once"
    )]
    Memory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// NaN or infinity in the matrix.
    #[error("row {row}, column {column} is {value}: only finite numbers can be factored")]
    NotFinite {
        /// Row (token).
        row: usize,
        /// Column (feature).
        column: usize,
        /// The value.
        value: f32,
    },
    /// Rows differ from one reading to the next.
    #[error(
        "rows were finite when they were first read and are not any more; they must not change while they are factored"
    )]
    Changed,
    /// Finite numbers whose singular values no `f32` holds.
    #[error("the largest singular value is {singular:e}, beyond f32; scale the rows down")]
    Overflow {
        /// The singular value.
        singular: f64,
    },
    /// The eigenvalues of a symmetric matrix were not found.
    #[error("the eigenvalues of a matrix of {size} by {size} did not converge; try another seed or route")]
    NoConvergence {
        /// Rows and columns.
        size: usize,
    },
    /// The caller asked to stop.
    #[error("cancelled after {done} of {total} units of work; nothing was kept")]
    Cancelled {
        /// Units done.
        done: u64,
        /// Units of the whole.
        total: u64,
    },
    /// Rows could not be read.
    #[error(transparent)]
    Read(#[from] KernelError),
}

/// A recipe, budget or option that makes no sense, or not together with the model or backend.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The text does not parse.
    #[error("recipe {recipe:?}, column {column}: {problem}")]
    Syntax {
        /// The whole recipe.
        recipe: String,
        /// 1-based column of the problem.
        column: usize,
        /// What is wrong.
        problem: String,
    },
    /// No entry of that name.
    #[error("there is no {kind} named {name:?}; known: {known}")]
    Unknown {
        /// "policy", "allocator", "stage", …
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// An argument is unknown, missing or out of range.
    #[error("{term}: {argument} = {got}, must be {want}")]
    Argument {
        /// The term it stands in.
        term: String,
        /// The argument.
        argument: String,
        /// What was given.
        got: String,
        /// What is accepted.
        want: String,
    },
    /// Two choices, each fine alone, do not go together.
    #[error("{what} does not work with {with}: {why}; {change}")]
    Conflict {
        /// One choice.
        what: String,
        /// The other.
        with: String,
        /// Why not.
        why: String,
        /// The option to change.
        change: String,
    },
    /// The budget cannot be met.
    #[error("budget {budget}: {problem}; {change}")]
    Budget {
        /// The budget as given.
        budget: String,
        /// What is wrong.
        problem: String,
        /// The option to change.
        change: String,
    },
}

/// A policy could not score or plan, or planned something invalid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A kernel it called failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A score is NaN: it cannot be ordered.
    #[error("policy {policy} scored slot {slot} of layer {layer}, KV head {head} as NaN")]
    NanScore {
        /// The policy.
        policy: String,
        /// Layer.
        layer: usize,
        /// KV head.
        head: usize,
        /// Slot.
        slot: usize,
    },
    /// What it asks for was not recorded.
    #[error("policy {policy} needs {need} of layer {layer}, which were not recorded{hint}")]
    Missing {
        /// The policy.
        policy: String,
        /// What is missing.
        need: String,
        /// Layer.
        layer: usize,
        /// What to do.
        hint: &'static str,
    },
    /// The plan breaks the rules every plan must keep.
    #[error("the plan of policy {policy} for layer {layer}, KV head {head} is invalid: {problem}")]
    InvalidPlan {
        /// The policy.
        policy: String,
        /// Layer.
        layer: usize,
        /// KV head.
        head: usize,
        /// Which rule.
        problem: String,
    },
    /// Anything a policy from outside the crate wants to say.
    #[error("policy {policy}: {message}")]
    Custom {
        /// The policy.
        policy: String,
        /// Its message.
        message: String,
    },
}

/// A call on the cache that cannot be done; the cache is as it was before the call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// No such sequence: dropped, or of another cache.
    #[error("there is no sequence {0}: it was dropped, or belongs to another cache")]
    NoSequence(u64),
    /// The same sequence twice in one batch.
    #[error("sequence {0} stands twice in one batch: give it one range of tokens")]
    DuplicateSequence(u64),
    /// A layer index outside the model.
    #[error("layer {layer} of a model with {layers} layers")]
    NoLayer {
        /// Asked for.
        layer: usize,
        /// There are.
        layers: usize,
    },
    /// A tensor has other extents than the model's geometry and the step say.
    #[error("layer {layer}: {tensor} is {got:?}, the cache was built for {want:?}")]
    Extents {
        /// Layer.
        layer: usize,
        /// "q", "k", "v" or "out".
        tensor: &'static str,
        /// What came.
        got: Dims,
        /// What the step needs.
        want: Dims,
    },
    /// NaN or infinity in a tensor.
    #[error(
        "layer {layer}: {tensor} has {value} at token {token}, head {head}, dimension {dim}; nothing was stored"
    )]
    NonFinite {
        /// Layer.
        layer: usize,
        /// "q", "k" or "v".
        tensor: &'static str,
        /// The value.
        value: f32,
        /// Token within the step.
        token: usize,
        /// Head.
        head: usize,
        /// Dimension.
        dim: usize,
    },
    /// A finite value that the storage type cannot hold.
    #[error(
        "layer {layer}: {tensor} has {value} at token {token}, head {head}, dimension {dim}: too large for {stored}; nothing was stored, use {tensor}=bf16 or {tensor}=f32 (and exact=f32 beside packed storage)"
    )]
    Range {
        /// Layer.
        layer: usize,
        /// "k" or "v".
        tensor: &'static str,
        /// The value.
        value: f32,
        /// Token within the step.
        token: usize,
        /// Head.
        head: usize,
        /// Dimension.
        dim: usize,
        /// How it would be stored.
        stored: String,
    },
    /// Append or attend called out of order within a step.
    #[error("layer {layer}: {problem}")]
    Order {
        /// Layer.
        layer: usize,
        /// What is out of order.
        problem: &'static str,
    },
    /// Commit of a step in which a layer got no tokens.
    #[error("commit after {done} of {layers} layers: layer {missing} has not been appended in this step")]
    Incomplete {
        /// Layers done.
        done: usize,
        /// Layers of the model that own storage.
        layers: usize,
        /// The first missing layer.
        missing: usize,
    },
    /// Commit of a step in which the policy was not told what it judges tokens by.
    #[error(
        "commit without the side input of layer {layer}, by which {policy} judges tokens when they arrive: call Step::side_input for every layer, before its attend"
    )]
    SideInput {
        /// The first layer without.
        layer: usize,
        /// The policy.
        policy: String,
    },
    /// More tokens accepted than begun.
    #[error("commit of {accepted} tokens in a step of {begun}")]
    TooManyAccepted {
        /// Accepted.
        accepted: usize,
        /// Begun.
        begun: usize,
    },
    /// A long step of a mass-fed policy was accepted in part.
    #[error(
        "commit of {accepted} of {begun} tokens: this recipe sums attention mass and can take back at most {limit} tokens a step; begin speculative steps with at most {limit} tokens"
    )]
    PartialCommit {
        /// Accepted.
        accepted: usize,
        /// Begun.
        begun: usize,
        /// Tokens of a step that can be taken back.
        limit: usize,
    },
    /// Truncation past a compaction: what stood there before is gone.
    #[error(
        "truncate to position {to:?}: the cache was compacted at position {compacted:?}, entries below it are gone; keep a fork from before, or truncate to {compacted:?} or later"
    )]
    PastCompaction {
        /// The target.
        to: Position,
        /// The last compaction.
        compacted: Position,
    },
    /// A truncation or removal that would take away part of what an entry speaks for.
    #[error(
        "positions {start}..{end} cannot be forgotten: layer {layer}, KV head {head} holds an entry at position {position} into which positions {first} to {last} were merged; keep a fork from before the merge, forget all or none of them, or drop reduce= from the recipe"
    )]
    SplitsMerge {
        /// Start of what is to be forgotten.
        start: i32,
        /// Its end, exclusive.
        end: i32,
        /// Layer.
        layer: usize,
        /// KV head.
        head: usize,
        /// Position of the entry.
        position: i32,
        /// Lowest position it speaks for.
        first: i32,
        /// Highest position it speaks for.
        last: i32,
    },
    /// A truncation or removal that would take away part of what was learned.
    #[error(
        "positions {start}..{end} cannot be forgotten: those below {learned} hold learned entries, which only mean something together; truncate to 0 or to {learned} and later, or load fewer cartridges into a new sequence"
    )]
    SplitsLearned {
        /// Start of what is to be forgotten.
        start: i32,
        /// Its end, exclusive.
        end: i32,
        /// End of the learned entries.
        learned: i32,
    },
    /// A range of positions that is reversed, or outside what can be.
    #[error("range {start}..{end} of a sequence whose next position is {next}")]
    PositionRange {
        /// Start.
        start: i32,
        /// End, exclusive.
        end: i32,
        /// Next position.
        next: i32,
    },
    /// Positions ran out.
    #[error("position {next} + {new} tokens exceeds i32::MAX; start a new sequence or renumber")]
    PositionOverflow {
        /// Next position.
        next: i32,
        /// New tokens.
        new: usize,
    },
    /// A request that this sequence or recipe does not support.
    #[error("{what} is not possible: {why}; {change}")]
    Unsupported {
        /// The call.
        what: &'static str,
        /// Why not.
        why: String,
        /// The option to change.
        change: &'static str,
    },
    /// A caller's buffer has the wrong length.
    #[error("{buffer} has {got} elements, needs {want}")]
    Length {
        /// The buffer.
        buffer: &'static str,
        /// Its length.
        got: usize,
        /// What it needs.
        want: usize,
    },
}

/// Any error of the crate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model description.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A tensor view.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A recipe or budget.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A call on the cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A learned cache.
    #[error(transparent)]
    Learned(#[from] LearnedError),
    /// A profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A factorisation.
    #[error(transparent)]
    Factor(#[from] FactorError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
