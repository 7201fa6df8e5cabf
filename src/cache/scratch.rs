//! Buffers that steps reuse, so that a step allocates nothing once they have grown.
//!
//! *Helps* decode, where an allocation per layer would show. *Hurts* by holding the largest chunk's queries
//! and outputs; [`crate::KvCache::shrink_scratch`] frees them.

use crate::backend::Backend;
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::merge_partials::MergeArgs;

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
    /// What the policy made of the tokens' side inputs, `[tokens, H]`; empty until they were seen.
    pub(super) rated: Vec<f32>,
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
    pub(super) joined: Joined,
    pub(super) positions: Vec<i32>,
    pub(super) pending: Vec<Pending>,
    pub(super) lanes: Vec<super::step::Lane>,
    /// Whether some lane of the step is scored.
    pub(super) recording: bool,
    pub(super) workspace: Workspace,
    pub(super) read: super::read::ReadScratch,
    pub(super) factored: super::factored::FactoredScratch,
    pub(super) side: super::side::SideScratch,
}

/// Two parts of an attention and their log-sum-exps, side by side as the merge wants them.
#[derive(Debug, Default)]
pub(super) struct Joined {
    outs: Vec<f32>,
    lses: Vec<f32>,
    /// Lengths of an output and a log-sum-exp.
    extent: (usize, usize),
}

impl Joined {
    /// Where the parts go, `out` and `lse` of so many elements each.
    pub(super) fn parts(&mut self, out: usize, lse: usize) -> [(&mut [f32], &mut [f32]); 2] {
        self.extent = (out, lse);
        let (first, second) = resize(&mut self.outs, 2 * out).split_at_mut(out);
        let (first_lse, second_lse) = resize(&mut self.lses, 2 * lse).split_at_mut(lse);
        [(first, first_lse), (second, second_lse)]
    }

    /// The attention over both, by their log-sum-exps.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn merge(
        &self,
        backend: &dyn Backend,
        d_v: usize,
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<(), KernelError> {
        let (outs, lses) = (&self.outs[..2 * self.extent.0], &self.lses[..2 * self.extent.1]);
        backend.merge_partials(&mut MergeArgs { parts: 2, d_v, outs, lses, out, lse })
    }
}

/// Sets a buffer's length without keeping its contents.
pub(super) fn resize(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
