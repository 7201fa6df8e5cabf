//! One object per place of execution: allocates pages and runs every kernel there.
//!
//! [`Reference`] is scalar code for checking, [`Cpu`] the fast host backend, `Gpu` (feature `gpu`) runs WGSL
//! compute shaders. *Helps* because everything above is written once, against this trait. *Hurts* by one
//! virtual call per kernel and layer, which no measurement can see.
//!
//! A backend allocates all pages of its caches, so a kernel never meets a page of another backend. Where a
//! kernel is missing the call fails with [`KernelError::Unsupported`]; nothing falls back to the host.

mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
mod host;
mod reference;

pub use cpu::Cpu;
#[cfg(feature = "gpu")]
pub use gpu::Gpu;
pub use reference::Reference;

use crate::device::memory::MemoryUsage;
use crate::device::page::{Page, PageLayout};
use crate::error::{DeviceError, KernelError};
use crate::kernel::AttentionParams;
use crate::kernel::attend::{AttendLane, Workspace};
use crate::kernel::attend_factored::FactoredArgs;
use crate::kernel::attention_mass::MassArgs;
use crate::kernel::code_scores::CodeArgs;
use crate::kernel::dot_scores::DotArgs;
use crate::kernel::gather::GatherArgs;
use crate::kernel::linear::LinearArgs;
use crate::kernel::merge_partials::MergeArgs;
use crate::kernel::merge_rows::MergeRowsArgs;
use crate::kernel::nearest::NearestArgs;
use crate::kernel::pack::PackArgs;
use crate::kernel::pool::PoolArgs;
use crate::kernel::rebuild::RebuildArgs;
use crate::kernel::rope::RopeArgs;
use crate::kernel::row_norms::NormArgs;
use crate::kernel::top_k::TopKArgs;
use crate::kernel::weigh_values::WeighArgs;
use crate::kernel::window_scores::WindowArgs;
use std::fmt::Debug;
use std::ops::Range;

/// Memory and kernels of one place of execution.
pub trait Backend: Debug + Send + Sync {
    /// The name used in recipes, errors and reports.
    fn name(&self) -> &'static str;

    /// Hardware in words: SIMD level and threads, or adapter and driver.
    fn describe(&self) -> String;

    /// Whether pages mirror positions and β (see [`PageLayout::mirrored`]).
    fn mirrored(&self) -> bool;

    /// Bytes in use, held, and at most so far, over all caches of this backend object.
    fn memory(&self) -> MemoryUsage;

    /// Restarts the peak of [`Backend::memory`].
    fn reset_peak(&self);

    /// The threads that host work between kernels may use; `None` leaves it to the calling one.
    fn workers(&self) -> Option<&crate::device::Pool> {
        None
    }

    /// A fresh page: zeroed rows, no β.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn allocate(&self, layout: &PageLayout) -> Result<Page, DeviceError>;

    /// A copy of a page, for copy-on-write.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or a lost device.
    fn copy_page(&self, layout: &PageLayout, page: &Page) -> Result<Page, DeviceError>;

    /// Stores rows `first ..` from dense `keys [n, d_k]` and `values [n, d_v]`, narrowing to the page's types,
    /// and updates the mirror of these rows. Positions and β of the rows are already set in the page.
    ///
    /// # Errors
    /// A lost device.
    fn write_rows(
        &self,
        layout: &PageLayout,
        page: &mut Page,
        first: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), DeviceError>;

    /// Updates the mirror after positions or β of `rows` changed on the host; nothing where there is none.
    ///
    /// # Errors
    /// A lost device.
    fn sync_metadata(
        &self,
        layout: &PageLayout,
        page: &mut Page,
        rows: Range<usize>,
    ) -> Result<(), DeviceError>;

    /// [`crate::kernel::attend`] for several sequences in one parallel region.
    ///
    /// # Errors
    /// [`KernelError`]; outputs are then unspecified.
    fn attend(
        &self,
        params: &AttentionParams<'_>,
        lanes: &mut [AttendLane<'_>],
        workspace: &mut Workspace,
    ) -> Result<(), KernelError>;

    /// [`crate::kernel::attend_factored`].
    ///
    /// # Errors
    /// [`KernelError`]; outputs are then unspecified.
    fn attend_factored(
        &self,
        params: &AttentionParams<'_>,
        args: &mut FactoredArgs<'_>,
    ) -> Result<(), KernelError>;

    /// [`crate::kernel::rebuild`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn rebuild(&self, args: &mut RebuildArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::merge_partials`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn merge_partials(&self, args: &mut MergeArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::attention_mass`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn attention_mass(
        &self,
        params: &AttentionParams<'_>,
        args: &mut MassArgs<'_>,
    ) -> Result<(), KernelError>;

    /// [`crate::kernel::window_scores`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn window_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut WindowArgs<'_>,
    ) -> Result<(), KernelError>;

    /// [`crate::kernel::dot_scores`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn dot_scores(
        &self,
        params: &AttentionParams<'_>,
        args: &mut DotArgs<'_>,
        workspace: &mut Workspace,
    ) -> Result<(), KernelError>;

    /// [`crate::kernel::code_scores`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn code_scores(&self, args: &mut CodeArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError>;

    /// [`crate::kernel::weigh_values`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn weigh_values(&self, args: &mut WeighArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError>;

    /// [`crate::kernel::row_norms`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn row_norms(&self, args: &mut NormArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::pool`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn pool(&self, args: &mut PoolArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::top_k`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn top_k(&self, args: &mut TopKArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::gather`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn gather(&self, args: &mut GatherArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::nearest`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn nearest(&self, args: &mut NearestArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::merge_rows`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn merge_rows(&self, args: &mut MergeRowsArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::pack`].
    ///
    /// # Errors
    /// [`KernelError`]; the page's rows are then unspecified.
    fn pack(&self, args: &mut PackArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::linear`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn linear(&self, args: &mut LinearArgs<'_>) -> Result<(), KernelError>;

    /// [`crate::kernel::rope`].
    ///
    /// # Errors
    /// [`KernelError`].
    fn rope(&self, args: &mut RopeArgs<'_>) -> Result<(), KernelError>;
}
