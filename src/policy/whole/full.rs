//! Keeps everything.
//!
//! *Helps* as the baseline every other policy is measured against, and where only the storage type is to
//! shrink. *Hurts* nothing but memory.

use crate::error::{PolicyError, RecipeError};
use crate::plan::{HeadPlan, LayerPlan};
use crate::policy::registry::{Args, Build, Entry};
use crate::policy::schedule::Schedule;
use crate::policy::{LayerView, Policy};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "full",
    summary: "keeps every entry: the baseline",
    source: "the plain cache",
    needs: "nothing",
    args: &[],
    build: Build::Whole { schedule: Schedule::NEVER, build },
};

fn build(_: &Args) -> Result<Arc<dyn Policy>, RecipeError> {
    Ok(Arc::new(Full))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub struct Full;

impl Policy for Full {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn compresses(&self) -> bool {
        false
    }

    fn equal_counts(&self) -> bool {
        true
    }

    fn plan(&self, view: &LayerView<'_>) -> Result<LayerPlan, PolicyError> {
        Ok(view.lengths().into_iter().map(HeadPlan::identity).collect::<Vec<_>>().into())
    }
}
