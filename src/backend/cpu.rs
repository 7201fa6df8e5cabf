//! The fast host backend: vectors of the level detected at run time, on the threads of a pool.
//!
//! *Helps* wherever there is no GPU, and for caches that fit the processor's caches. *Hurts* a host that
//! already keeps every core busy: give it the host's pool with [`Cpu::with_pool`].

use super::host::{self, HostMemory};
use super::*;
use crate::device::Pool;
use crate::kernel;
use crate::kernel::simd::{Exec, Level};

/// CPU kernels on host memory.
///
/// Results do not depend on the number of threads: the same call gives the same bits on any pool. They do
/// depend on the [`Level`], within each kernel's tolerance.
#[derive(Debug)]
pub struct Cpu {
    memory: HostMemory,
    exec: Exec,
}

impl Default for Cpu {
    /// A pool of its own with one thread per core, started here; the process-wide rayon pool is never used.
    /// If the system refuses the threads, the calling thread works alone, and [`Backend::describe`] says so.
    fn default() -> Self {
        Self::with_pool(Pool::with_threads(0).unwrap_or_else(|_| Pool::current()))
    }
}

impl Cpu {
    /// On the threads of `pool`.
    pub fn with_pool(pool: Pool) -> Self {
        Self { memory: HostMemory::default(), exec: Exec::new(pool) }
    }

    /// On a pool of its own. 0 threads means one per core.
    ///
    /// # Errors
    /// [`DeviceError::Threads`] if the system refuses the threads.
    pub fn with_threads(threads: usize) -> Result<Self, DeviceError> {
        Pool::with_threads(threads).map(Self::with_pool)
    }

    /// With instructions up to `level` only. A level above the present one changes nothing.
    #[must_use]
    pub fn with_level(mut self, level: Level) -> Self {
        self.exec.lower(level);
        self
    }

    /// The instruction set in use.
    pub fn level(&self) -> Level {
        self.exec.level()
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        let threads = self.exec.pool().threads();
        format!("{}, {threads} thread{}", self.exec.level().name(), if threads == 1 { "" } else { "s" })
    }

    fn mirrored(&self) -> bool {
        false
    }

    fn memory(&self) -> MemoryUsage {
        self.memory.usage()
    }

    fn reset_peak(&self) {
        self.memory.reset_peak();
    }

    fn workers(&self) -> Option<&Pool> {
        Some(self.exec.pool())
    }

    fn allocate(&self, layout: &PageLayout) -> Result<Page, DeviceError> {
        self.memory.allocate(layout)
    }

    fn copy_page(&self, layout: &PageLayout, page: &Page) -> Result<Page, DeviceError> {
        self.memory.copy_page(layout, page)
    }

    fn write_rows(
        &self,
        layout: &PageLayout,
        page: &mut Page,
        first: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), DeviceError> {
        host::write_rows(layout, page, first, keys, values);
        Ok(())
    }

    fn sync_metadata(&self, _: &PageLayout, _: &mut Page, _: Range<usize>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn attend(
        &self,
        params: &AttentionParams<'_>,
        lanes: &mut [AttendLane<'_>],
        workspace: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::attend::cpu::run(&self.exec, params, lanes, workspace)
    }

    fn attend_factored(
        &self,
        params: &AttentionParams<'_>,
        args: &mut FactoredArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attend_factored::cpu::run(&self.exec, params, args)
    }

    fn rebuild(&self, args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
        kernel::rebuild::cpu::run(&self.exec, args)
    }

    fn merge_partials(&self, args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_partials::cpu::run(&self.exec, args)
    }

    fn attention_mass(
        &self,
        params: &AttentionParams<'_>,
        args: &mut MassArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attention_mass::cpu::run(&self.exec, params, args)
    }

    fn window_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut WindowArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::window_scores::cpu::run(&self.exec, params, args)
    }

    fn dot_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut DotArgs<'_>,
        workspace: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::dot_scores::cpu::run(&self.exec, params, args, workspace)
    }

    fn code_scores(&self, args: &mut CodeArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError> {
        kernel::code_scores::cpu::run(&self.exec, args, workspace)
    }

    fn weigh_values(&self, args: &mut WeighArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError> {
        kernel::weigh_values::cpu::run(&self.exec, args, workspace)
    }

    fn row_norms(&self, args: &mut NormArgs<'_>) -> Result<(), KernelError> {
        kernel::row_norms::cpu::run(&self.exec, args)
    }

    fn pool(&self, args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
        kernel::pool::cpu::run(&self.exec, args)
    }

    fn top_k(&self, args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
        kernel::top_k::cpu::run(&self.exec, args)
    }

    fn gather(&self, args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
        kernel::gather::cpu::run(&self.exec, args)
    }

    fn nearest(&self, args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
        kernel::nearest::cpu::run(&self.exec, args)
    }

    fn merge_rows(&self, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_rows::cpu::run(&self.exec, args)
    }

    fn pack(&self, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
        kernel::pack::cpu::run(&self.exec, args)
    }

    fn linear(&self, args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
        kernel::linear::cpu::run(&self.exec, args)
    }

    fn rope(&self, args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
        kernel::rope::cpu::run(&self.exec, args)
    }
}
