//! Caches that were trained instead of computed, from files a host brings.
//!
//! A [`Cartridge`] (Eyuboglu et al., arXiv 2506.06266) holds keys and values of a few hundred or thousand entries, trained so
//! that a model answers as if it had read a whole corpus. [`KvCache::load_cartridge`](crate::KvCache::load_cartridge) puts it at the start of a
//! sequence. [`Sinks`] are entries and logits that every query of a layer sees; they become part of the model's shape. The formats, the converter and the limits are described in `docs/learned-caches.md`.
//!
//! *Helps* where the same long text stands before many requests: what is stored and read is one to two orders of magnitude
//! smaller than the text's own cache. *Hurts* where a file comes from another model of equal shape: nothing in the numbers
//! tells, so files name their model and hosts should ask ([`Cartridge::check_model`]).
//!
//! Files are read as data: a header of bounded numbers, and elements. No pickle is ever executed, here or in the
//! converter.

mod cartridge;
mod file;
mod profile;
mod sinks;

pub use cartridge::{Cartridge, LayerExtents};
pub use sinks::Sinks;

use crate::error::LearnedError;
use std::path::Path;

/// The bytes of a file.
fn read(path: &Path) -> Result<Vec<u8>, LearnedError> {
    std::fs::read(path)
        .map_err(|reason| LearnedError::Read { path: path.display().to_string(), reason: reason.to_string() })
}

/// What a file of a [`Cartridge`] must say `format` is.
pub const FORMAT: &str = "kvsieve-cartridge";

/// What a file of [`Sinks`] must say `format` is.
pub const SINKS_FORMAT: &str = "kvsieve-sinks";

/// What a file of a [`Profile`](crate::profile::Profile) must say `format` is.
pub const PROFILE_FORMAT: &str = "kvsieve-profile";

/// The version of every format that is read.
pub const VERSION: &str = "1";
