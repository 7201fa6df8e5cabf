//! kvsieve: the KV cache of a transformer, smaller and faster to read, with an account of what was lost.
pub mod backend;
pub mod device;
pub mod error;
pub mod geometry;
pub mod kernel;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod view;

pub use error::Error;
