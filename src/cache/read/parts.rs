//! The KV heads of a layer, one after another, on every thread some.
//!
//! What one head's units, entries and weights take fits the second cache level; what all heads' take does not. So where
//! kernels run on this machine's threads, a head goes through all stages before the next one begins, and a thread waits
//! for the others once a layer instead of once a stage. Threads that have no head left help with the kernels of those that
//! have. *Helps* long contexts, whose stages wait for memory. *Hurts* those with little to rank, which like backends
//! elsewhere do every stage for all heads at once.

use super::reader::Reader;
use super::{Held, PartScratch, ReadReport, ReadScratch};
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::attend_factored::Remembered;
use crate::kernel::simd::take;

/// What a thread needs to go through some heads.
#[derive(Debug, Default)]
pub(super) struct Part {
    scratch: PartScratch,
    workspace: Workspace,
}

/// Some heads, the parts they are shared among, and where what comes of them goes.
struct Heads<'a> {
    reader: Reader<'a>,
    held: Option<&'a [Vec<u32>]>,
    parts: &'a mut [Part],
    chosen: &'a mut [Vec<u32>],
    reports: &'a mut [Result<ReadReport, KernelError>],
    rebuilt: &'a mut [Remembered],
    out: &'a mut [f32],
    lse: &'a mut [f32],
}

impl Reader<'_> {
    /// Attention over what the index chooses into `out [Hq, T, d_v]` and `lse [Hq, T]`; the choice stays in
    /// `scratch.chosen`. With `held`, over what was chosen before.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn run(
        &self,
        held: Option<&Held>,
        (scratch, workspace): (&mut ReadScratch, &mut Workspace),
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<ReadReport, KernelError> {
        let ReadScratch { parts, chosen, reports, rebuilt, .. } = scratch;
        let count = self.heads.len();
        let pool = self.pool().filter(|_| count > 0);
        parts.resize_with(pool.map_or(1, |pool| pool.threads().min(count)).max(parts.len()), Part::default);
        chosen.units.resize_with(count, Vec::new);
        chosen.of.clear();
        chosen.of.extend(self.index.heads().iter().map(|head| head.picks()));
        let held = held.map(|held| &*held.units);
        let Some(pool) = pool else {
            let part = &mut parts[0].scratch;
            std::mem::swap(&mut part.rebuilt, rebuilt);
            let report = self.stages(held, (&mut *part, workspace), (out, lse));
            std::mem::swap(&mut part.rebuilt, rebuilt);
            let report = report?;
            chosen.units.clone_from(&part.chosen);
            return Ok(report);
        };
        reports.clear();
        reports.resize_with(count, || Ok(ReadReport::default()));
        let parts = &mut parts[..pool.threads().min(count)];
        let heads =
            Heads { reader: *self, held, parts, chosen: &mut chosen.units, reports, rebuilt, out, lse };
        // Entered once: between its stages this thread would fall asleep and be woken every time.
        pool.run(|| heads.spread());
        joined(reports)
    }
}

impl Heads<'_> {
    fn spread(mut self) {
        if self.parts.len() < 2 {
            return self.work();
        }
        let half = self.parts.len() / 2;
        let at = self.chosen.len() * half / self.parts.len();
        let (left, right) = (self.reader.of_heads(0..at), self.reader.of_heads(at..self.chosen.len()));
        let held = self.held.map(|held| held.split_at(at));
        let rows = at * left.rows();
        let left = Heads {
            reader: left,
            held: held.map(|held| held.0),
            parts: take(&mut self.parts, half),
            chosen: take(&mut self.chosen, at),
            reports: take(&mut self.reports, at),
            rebuilt: take(&mut self.rebuilt, at),
            out: take(&mut self.out, rows * left.shape.d_v),
            lse: take(&mut self.lse, rows),
        };
        let right = Heads { reader: right, held: held.map(|held| held.1), ..self };
        rayon::join(|| left.spread(), || right.spread());
    }

    fn work(self) {
        let rows = self.reader.rows();
        let Some(Part { scratch, workspace }) = self.parts.first_mut() else { return };
        let outs =
            self.out.chunks_exact_mut(rows * self.reader.shape.d_v).zip(self.lse.chunks_exact_mut(rows));
        for (h, ((report, chosen), to)) in self.reports.iter_mut().zip(self.chosen).zip(outs).enumerate() {
            let held = self.held.map(|held| &held[h..=h]);
            scratch.rebuilt.resize_with(1, Remembered::default);
            std::mem::swap(&mut scratch.rebuilt[0], &mut self.rebuilt[h]);
            *report = self.reader.of_heads(h..h + 1).stages(held, (&mut *scratch, &mut *workspace), to);
            std::mem::swap(&mut scratch.rebuilt[0], &mut self.rebuilt[h]);
            chosen.clone_from(&scratch.chosen[0]);
        }
    }
}

/// What was read of a layer, from what was of each of its heads.
fn joined(reports: &mut [Result<ReadReport, KernelError>]) -> Result<ReadReport, KernelError> {
    let count = reports.len() as f32;
    let mut all = ReadReport { missing: Some(0.0), missing_at_most: Some(0.0), ..ReadReport::default() };
    for report in reports {
        let one = std::mem::replace(report, Ok(ReadReport::default()))?;
        all.entries += one.entries;
        all.stored += one.stored;
        all.units += one.units;
        all.bytes += one.bytes;
        all.missing = all.missing.zip(one.missing).map(|(all, one)| all + one / count);
        all.missing_at_most = all.missing_at_most.zip(one.missing_at_most).map(|(all, one)| all.max(one));
    }
    Ok(all)
}
