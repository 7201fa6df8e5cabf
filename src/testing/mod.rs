//! What the crate's own tests, and those of backends written elsewhere, share: seeded data, caches described
//! as data and built on any backend, and the conformance suite over the kernels.
//!
//! *Helps* because one suite judges every implementation by the same cases and the same named tolerances.
//! *Hurts* nothing at run time: it is compiled for tests and with the feature `testing` only.

pub mod cache;
pub mod conformance;
pub mod layer;
mod profile;
pub mod random;

pub use profile::profile;
pub use random::Random;
