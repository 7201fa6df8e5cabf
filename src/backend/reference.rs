//! The backend every other is checked against: scalar, sequential, slow, obviously right.

use super::host::{self, HostMemory};
use super::*;
use crate::kernel;

/// Scalar kernels on host memory. For tests and for doubting the fast ones; never for speed.
#[derive(Debug, Default)]
pub struct Reference {
    memory: HostMemory,
}

impl Backend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn describe(&self) -> String {
        "scalar, one thread".to_owned()
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
        _: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::attend::reference::run(params, lanes)
    }

    fn attend_factored(
        &self,
        params: &AttentionParams<'_>,
        args: &mut FactoredArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attend_factored::reference::run(params, args)
    }

    fn rebuild(&self, args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
        kernel::rebuild::reference::run(args)
    }

    fn merge_partials(&self, args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_partials::reference::run(args)
    }

    fn attention_mass(
        &self,
        params: &AttentionParams<'_>,
        args: &mut MassArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attention_mass::reference::run(params, args)
    }

    fn window_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut WindowArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::window_scores::reference::run(params, args)
    }

    fn dot_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut DotArgs<'_>,
        _: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::dot_scores::reference::run(params, args)
    }

    fn code_scores(&self, args: &mut CodeArgs<'_>, _: &mut Workspace) -> Result<(), KernelError> {
        kernel::code_scores::reference::run(args)
    }

    fn weigh_values(&self, args: &mut WeighArgs<'_>, _: &mut Workspace) -> Result<(), KernelError> {
        kernel::weigh_values::reference::run(args)
    }

    fn row_norms(&self, args: &mut NormArgs<'_>) -> Result<(), KernelError> {
        kernel::row_norms::reference::run(args)
    }

    fn pool(&self, args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
        kernel::pool::reference::run(args)
    }

    fn top_k(&self, args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
        kernel::top_k::reference::run(args)
    }

    fn gather(&self, args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
        kernel::gather::reference::run(args)
    }

    fn nearest(&self, args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
        kernel::nearest::reference::run(args)
    }

    fn merge_rows(&self, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_rows::reference::run(args)
    }

    fn pack(&self, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
        kernel::pack::reference::run(args)
    }

    fn linear(&self, args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
        kernel::linear::reference::run(args)
    }

    fn rope(&self, args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
        kernel::rope::reference::run(args)
    }
}
