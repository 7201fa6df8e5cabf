//! Buffers that steps reuse, so that a step allocates nothing once they have grown.
//!
//! *Helps* decode, where an allocation per layer would show. *Hurts* by holding the largest chunk's queries
//! and outputs; [`crate::KvCache::shrink_scratch`] frees them.

use crate::kernel::attend::Workspace;

/// What one layer of a step leaves for `commit`.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Last `m` query rows of each lane, token-major `[m, Hq · d_k]`, lane after lane.
    pub(super) queries: Vec<f32>,
    /// Their log-sum-exp, token-major `[m, Hq]`.
    pub(super) lse: Vec<f32>,
    /// Mass of all queries of the step, per lane and KV head `[G, rows]`.
    pub(super) mass: Vec<f32>,
    /// Where each lane's mass starts.
    pub(super) mass_starts: Vec<usize>,
    pub(super) appended: bool,
    pub(super) attended: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
    pub(super) queries: Vec<f32>,
    pub(super) out: Vec<f32>,
    pub(super) lse: Vec<f32>,
    pub(super) joined: super::constant::Joined,
    pub(super) positions: Vec<i32>,
    pub(super) pending: Vec<Pending>,
    pub(super) lanes: Vec<super::step::Lane>,
    /// Whether some lane of the step is scored.
    pub(super) recording: bool,
    pub(super) workspace: Workspace,
    pub(super) read: super::read::ReadScratch,
    pub(super) factored: super::factored::FactoredScratch,
}

/// Sets a buffer's length without keeping its contents.
pub(super) fn resize(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
