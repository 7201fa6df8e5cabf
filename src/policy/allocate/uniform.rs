//! The same number of entries for every KV head of every layer.
//!
//! *Helps* hosts and recipes that need equal lengths (renumbered positions, dense batches), and is hard to
//! beat over a good scorer. *Hurts* heads that spread their attention: they lose as much as peaked ones.

use super::{Allocator, HeadRequest};
use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Args, Build, Entry};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "uniform",
    summary: "every KV head of every layer keeps the same number of entries",
    source: "the rule of SnapKV, H2O, TOVA and StreamingLLM",
    needs: "nothing",
    args: &[],
    build: Build::Allocate { over: "snapkv", schedule: None, build },
};

fn build(_: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(Uniform))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub struct Uniform;

impl Allocator for Uniform {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        true
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        Ok(request.scores.lengths.iter().map(|&len| len.min(request.target)).collect())
    }
}
