//! When a sequence is compressed. All of it happens inside `commit`, between tokens.
//!
//! *Helps* memory stay bounded during prefill and decode. *Hurts* quality when compression runs before the
//! question is seen, and speed when it runs after every token: the slack of [`Schedule::over`] is the
//! hysteresis that spreads one compaction over many tokens.

/// Any of the conditions fires it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Once, when the prompt is complete.
    pub prefill: bool,
    /// After every committed step of more than one token.
    pub chunk: bool,
    /// After every `n` committed tokens.
    pub every: Option<usize>,
    /// When some KV head's share exceeds its target by more than this many entries; compacts to the target.
    pub over: Option<usize>,
}

impl Schedule {
    /// Never.
    pub const NEVER: Self = Self { prefill: false, chunk: false, every: None, over: None };
}
