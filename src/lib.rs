//! kvsieve: the KV cache of a transformer, smaller and faster to read, with an account of what was lost.
pub mod backend;
pub mod device;
pub mod error;
pub mod geometry;
pub mod kernel;
pub mod view;

pub use error::Error;
#[cfg(feature = "gpu")]
pub use wgpu;
