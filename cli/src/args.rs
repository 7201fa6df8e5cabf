//! Arguments that several commands share.

use crate::error::{Error, Result};
use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::cache::RecipeSource;
use kvsieve::geometry::ModelShape;
use kvsieve::{Budget, KvCache};
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

/// A cache for one recipe. A recipe that drops nothing and reads everything takes no budget.
pub(crate) fn cache(
    shape: ModelShape,
    recipe: impl Into<RecipeSource>,
    budget: Option<Budget>,
    backend: &Arc<dyn Backend>,
) -> Result<KvCache> {
    let builder = KvCache::builder(shape).recipe(recipe).shared_backend(Arc::clone(backend));
    Ok(match budget {
        Some(budget) => builder.budget(budget),
        None => builder,
    }
    .build()?)
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

/// Every recipe with every budget; a recipe that drops nothing and reads everything once. All are checked before anything runs.
pub(crate) fn variants(
    shape: &ModelShape,
    recipes: &[String],
    budgets: &[Budget],
    backend: &dyn Backend,
) -> Result<Vec<Variant>> {
    let mut variants = Vec::new();
    for text in recipes {
        let recipe: kvsieve::recipe::Recipe = text.parse()?;
        // An index with a goal needs none either.
        let without = KvCache::check(shape, &recipe, None, backend).is_ok();
        if !recipe.takes_budget() || (budgets.is_empty() && without) {
            variants.push(Variant { recipe: text.clone(), budget: None });
            continue;
        }
        if budgets.is_empty() {
            return Err(Error::usage(
                format!("the recipe {text} drops entries, or reads a part of them, and was given no budget"),
                "add --budget, for example --budget 25%",
            ));
        }
        for &budget in budgets {
            KvCache::check(shape, &recipe, Some(budget), backend)?;
            variants.push(Variant { recipe: text.clone(), budget: Some(budget) });
        }
    }
    Ok(variants)
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
