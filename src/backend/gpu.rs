//! Every kernel as a WGSL compute shader, pages in device memory.
//!
//! *Helps* wherever there is a GPU that wgpu reaches: Vulkan, Metal, DX12. *Hurts* on small caches, where a
//! round trip to the device (tens of microseconds and up) costs more than the attention itself.

use super::host::{copy_metadata, empty_page};
use super::*;
use crate::device::gpu::{Context, DeviceBlock};
use crate::device::page::{Block, Side};
use crate::kernel;

/// WGSL kernels on a wgpu device.
#[derive(Debug)]
pub struct Gpu {
    context: Context,
}

impl Gpu {
    /// Works on the host's device and queue; [`crate::wgpu`] is the version they must come from.
    ///
    /// The host's error and device-lost handlers are left alone. The device needs no optional feature, and
    /// [`wgpu::Limits::default`] is enough.
    ///
    /// # Errors
    /// [`DeviceError::Limit`] if the device was created with less than that.
    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, DeviceError> {
        Ok(Self { context: Context::new(device, queue)? })
    }

    /// Picks an adapter and opens a device on it, for hosts that have none.
    ///
    /// # Errors
    /// [`DeviceError::NoAdapter`] says what to install.
    pub fn request() -> Result<Self, DeviceError> {
        Ok(Self { context: Context::request()? })
    }

    /// Fills every intermediate and result buffer with NaN before use, so that work which did not run shows.
    /// For tests: it costs an upload per buffer.
    #[must_use]
    pub fn with_poison(mut self, poison: bool) -> Self {
        self.context.set_poison(poison);
        self
    }

    /// The device, for hosts that asked for one of the library's own.
    pub fn device(&self) -> &wgpu::Device {
        self.context.device()
    }

    /// Submits staged writes early when there are many, so that they do not pile up on the host.
    fn drain(&self) -> Result<(), DeviceError> {
        if self.context.memory.is_full() { self.context.flush("write_rows") } else { Ok(()) }
    }
}

/// Pages of a host backend reach a GPU only by a mistake of the caller, which has no kernel name here.
fn device_error(error: KernelError) -> DeviceError {
    match error {
        KernelError::Device(e) => e,
        other => DeviceError::Lost { operation: "page access", reason: other.to_string() },
    }
}

impl Backend for Gpu {
    fn name(&self) -> &'static str {
        "gpu"
    }

    fn describe(&self) -> String {
        self.context.describe()
    }

    fn mirrored(&self) -> bool {
        true
    }

    fn memory(&self) -> MemoryUsage {
        self.context.memory.usage()
    }

    fn reset_peak(&self) {
        self.context.memory.reset_peak();
    }

    fn allocate(&self, layout: &PageLayout) -> Result<Page, DeviceError> {
        let block = self.context.memory.allocate(&self.context, layout)?;
        Ok(empty_page(layout, Block::Device(block)))
    }

    fn copy_page(&self, layout: &PageLayout, page: &Page) -> Result<Page, DeviceError> {
        let mut copy = self.allocate(layout)?;
        copy_metadata(page, &mut copy);
        let from = DeviceBlock::of(page, "copy_page").map_err(device_error)?;
        let to = DeviceBlock::of_mut(&mut copy, "copy_page").map_err(device_error)?;
        self.context.memory.copy(from, to);
        Ok(copy)
    }

    fn write_rows(
        &self,
        layout: &PageLayout,
        page: &mut Page,
        first: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), DeviceError> {
        let block = DeviceBlock::of(page, "write_rows").map_err(device_error)?;
        self.context.memory.write_rows(block, layout, Side::Key, first, keys);
        self.context.memory.write_rows(block, layout, Side::Value, first, values);
        // Latent rows may have one side only.
        let rows = keys.len().checked_div(layout.d_k).unwrap_or_else(|| values.len() / layout.d_v.max(1));
        self.sync_metadata(layout, page, first..first + rows)
    }

    fn sync_metadata(
        &self,
        layout: &PageLayout,
        page: &mut Page,
        rows: Range<usize>,
    ) -> Result<(), DeviceError> {
        self.context.memory.write_mirror(layout, page, rows);
        self.drain()
    }

    fn attend(
        &self,
        params: &AttentionParams<'_>,
        lanes: &mut [AttendLane<'_>],
        _: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::attend::gpu::run(&self.context, params, lanes)
    }

    fn attend_factored(
        &self,
        params: &AttentionParams<'_>,
        args: &mut FactoredArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attend_factored::gpu::run(&self.context, params, args)
    }

    fn rebuild(&self, args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
        kernel::rebuild::gpu::run(&self.context, args)
    }

    fn merge_partials(&self, args: &mut MergeArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_partials::gpu::run(&self.context, args)
    }

    fn attention_mass(
        &self,
        params: &AttentionParams<'_>,
        args: &mut MassArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::attention_mass::gpu::run(&self.context, params, args)
    }

    fn window_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut WindowArgs<'_>,
    ) -> Result<(), KernelError> {
        kernel::window_scores::gpu::run(&self.context, params, args)
    }

    fn dot_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut DotArgs<'_>,
        _: &mut Workspace,
    ) -> Result<(), KernelError> {
        kernel::dot_scores::gpu::run(&self.context, params, args)
    }

    fn code_scores(&self, args: &mut CodeArgs<'_>, _: &mut Workspace) -> Result<(), KernelError> {
        kernel::code_scores::gpu::run(&self.context, args)
    }

    fn weigh_values(&self, args: &mut WeighArgs<'_>, _: &mut Workspace) -> Result<(), KernelError> {
        kernel::weigh_values::gpu::run(&self.context, args)
    }

    fn row_norms(&self, args: &mut NormArgs<'_>) -> Result<(), KernelError> {
        kernel::row_norms::gpu::run(&self.context, args)
    }

    fn pool(&self, args: &mut PoolArgs<'_>) -> Result<(), KernelError> {
        kernel::pool::gpu::run(&self.context, args)
    }

    fn top_k(&self, args: &mut TopKArgs<'_>) -> Result<(), KernelError> {
        kernel::top_k::gpu::run(&self.context, args)
    }

    fn gather(&self, args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
        kernel::gather::gpu::run(&self.context, args)
    }

    fn nearest(&self, args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
        kernel::nearest::gpu::run(&self.context, args)
    }

    fn merge_rows(&self, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError> {
        kernel::merge_rows::gpu::run(&self.context, args)
    }

    fn pack(&self, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
        kernel::pack::gpu::run(&self.context, args)
    }

    fn linear(&self, args: &mut LinearArgs<'_>) -> Result<(), KernelError> {
        kernel::linear::gpu::run(&self.context, args)
    }

    fn rope(&self, args: &mut RopeArgs<'_>) -> Result<(), KernelError> {
        kernel::rope::gpu::run(&self.context, args)
    }
}
