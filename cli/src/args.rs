//! Arguments that several commands share.

use crate::error::{Error, Result};
use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::cache::RecipeSource;
use kvsieve::error::RecipeError;
use kvsieve::geometry::ModelShape;
use kvsieve::profile::Profile;
use kvsieve::{Budget, KvCache, Recipe};
use std::path::PathBuf;
use std::sync::Arc;

/// Where pages live and kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BackendName {
    /// SIMD kernels on all cores.
    Cpu,
    /// Compute shaders through wgpu.
    Gpu,
    /// Scalar kernels on one thread, for doubting the others.
    Reference,
}

impl BackendName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Reference => "reference",
        }
    }

    /// The backend itself.
    pub(crate) fn open(self) -> Result<Arc<dyn Backend>> {
        Ok(match self {
            Self::Cpu => Arc::new(Cpu::default()),
            Self::Reference => Arc::new(Reference::default()),
            Self::Gpu => gpu()?,
        })
    }
}

#[cfg(feature = "gpu")]
fn gpu() -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(kvsieve::backend::Gpu::request()?))
}

#[cfg(not(feature = "gpu"))]
fn gpu() -> Result<Arc<dyn Backend>> {
    Err(Error::usage(
        "this program was built without the gpu backend",
        "build it with `--features gpu`, or use --backend cpu",
    ))
}

/// Where caches run, and what was learned of the model.
#[derive(Debug, clap::Args)]
pub(crate) struct PlaceArgs {
    /// Where the cache runs; a model itself always runs on the CPU.
    #[arg(long, value_enum, default_value = "cpu")]
    pub(crate) backend: BackendName,
    /// What recipes go by that learned the model (locret, kvzap, duo, compresskv, …): a file made by `kvsieve calibrate`.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

impl PlaceArgs {
    pub(crate) fn open(&self) -> Result<Place> {
        let profile = self.profile.as_deref().map(Profile::open).transpose()?.map(Arc::new);
        Ok(Place { backend: self.backend.open()?, profile })
    }
}

/// See [`PlaceArgs`].
#[derive(Clone, Debug)]
pub(crate) struct Place {
    backend: Arc<dyn Backend>,
    profile: Option<Arc<Profile>>,
}

impl Place {
    /// A cache for one recipe. A recipe that drops nothing and reads everything takes no budget.
    pub(crate) fn cache(
        &self,
        shape: ModelShape,
        recipe: impl Into<RecipeSource>,
        budget: Option<Budget>,
    ) -> Result<KvCache> {
        let mut builder = KvCache::builder(shape).recipe(recipe).shared_backend(Arc::clone(&self.backend));
        if let Some(profile) = &self.profile {
            builder = builder.profile(Arc::clone(profile));
        }
        if let Some(budget) = budget {
            builder = builder.budget(budget);
        }
        Ok(builder.build()?)
    }

    /// Every recipe with every budget; a recipe that drops nothing and reads everything once. All are checked before anything runs.
    pub(crate) fn variants(
        &self,
        shape: &ModelShape,
        recipes: &[String],
        budgets: &[Budget],
    ) -> Result<Vec<Variant>> {
        let mut variants = Vec::new();
        for text in recipes {
            let mut recipe: Recipe = text.parse()?;
            if let Some(profile) = &self.profile {
                recipe = recipe.bind(profile, shape)?;
            }
            // An index with a goal needs none either, nor a policy with a threshold.
            let without = KvCache::check(shape, &recipe, None, &*self.backend);
            if !recipe.takes_budget() || (budgets.is_empty() && without.is_ok()) {
                variants.push(Variant { recipe: text.clone(), budget: None });
                continue;
            }
            if budgets.is_empty() {
                if let Err(error @ RecipeError::Conflict { .. }) = without {
                    return Err(error.into());
                }
                return Err(Error::usage(
                    format!(
                        "the recipe {text} drops entries, or reads a part of them, and was given no budget"
                    ),
                    "add --budget, for example --budget 25%",
                ));
            }
            for &budget in budgets {
                KvCache::check(shape, &recipe, Some(budget), &*self.backend)?;
                variants.push(Variant { recipe: text.clone(), budget: Some(budget) });
            }
        }
        Ok(variants)
    }
}

/// One recipe with one budget: a row of a comparison.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    pub(crate) recipe: String,
    pub(crate) budget: Option<Budget>,
}

impl Variant {
    /// The cache that drops nothing.
    pub(crate) fn full() -> Self {
        Self { recipe: "full".to_owned(), budget: None }
    }

    pub(crate) fn budget_text(&self) -> String {
        self.budget.map_or_else(|| "-".to_owned(), |budget| budget.to_string())
    }
}

/// Splits a list of recipes at commas outside of parentheses: `snapkv(window=32,kernel=5),tova`.
pub(crate) fn split_recipes(given: &[String]) -> Vec<String> {
    let mut recipes = Vec::new();
    for text in given {
        let (mut depth, mut start) = (0usize, 0);
        for (at, c) in text.char_indices() {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    recipes.push(text[start..at].trim().to_owned());
                    start = at + 1;
                }
                _ => {}
            }
        }
        recipes.push(text[start..].trim().to_owned());
    }
    recipes.retain(|recipe| !recipe.is_empty());
    recipes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_split_outside_parentheses_only() {
        let given = ["snapkv(window=32,kernel=5), tova".to_owned(), "full".to_owned()];
        assert_eq!(split_recipes(&given), ["snapkv(window=32,kernel=5)", "tova", "full"]);
        assert!(split_recipes(&[",".to_owned()]).is_empty());
    }
}
