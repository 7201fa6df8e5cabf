//! kvsieve: the KV cache of a transformer, smaller and faster to read, with an account of what was lost.
pub mod backend;
pub mod cache;
pub mod columns;
pub mod device;
pub mod error;
pub mod geometry;
pub mod kernel;
pub mod plan;
pub mod policy;
pub mod recipe;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod view;

#[cfg(feature = "gpu")]
pub use backend::Gpu;
pub use backend::{Backend, Cpu, Reference};
pub use cache::{KvCache, SequenceId, Step};
pub use error::Error;
pub use recipe::{Budget, Recipe};
#[cfg(feature = "gpu")]
pub use wgpu;

/// The README's example is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
