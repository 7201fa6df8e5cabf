//! Where bytes live and who works on them: host memory that really goes back to the system, pages of
//! key/value rows, thread pools, and (feature `gpu`) a wgpu device.
//!
//! *Helps* by being the one place that talks to the system; *hurts* nothing above it, which sees blocks
//! and pages only.

pub mod angles;
pub mod encoding;
pub mod factors;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod memory;
pub mod page;
pub mod pool;

pub use angles::Angles;
pub use encoding::{Encoding, Format, Packing};
pub use factors::{Basis, Factors, Kept};
pub use memory::{HostArena, HostBlock, MemoryUsage};
pub use page::{Block, HeadRows, Page, PageLayout, Segment};
pub use pool::Pool;
