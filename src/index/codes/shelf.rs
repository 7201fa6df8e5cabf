//! The codebooks of a whole model: taken from a sequence that learnt them, and given to caches that then learn none.

use super::Codebook;
use crate::error::RecipeError;
use crate::geometry::ModelShape;
use crate::index::{Retrieval, Role};
use std::sync::Arc;

/// Codebooks of the KV heads of all layers, from [`crate::KvCache::codebooks`] to
/// [`crate::cache::CacheBuilder::codebooks`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codebooks {
    /// Per layer, per KV head; `None` where nothing was learnt.
    pub layers: Vec<Vec<Option<Arc<Codebook>>>>,
}

impl Codebooks {
    /// Whether an index can use them for a model.
    ///
    /// # Errors
    /// [`RecipeError::Conflict`] names what differs.
    pub fn check(&self, index: Option<&Retrieval>, shape: &ModelShape) -> Result<(), RecipeError> {
        let conflict = |with: String, why: String| {
            Err(RecipeError::Conflict {
                what: "codebooks".to_owned(),
                with,
                why,
                change: "take them from a cache of the same model and recipe".to_owned(),
            })
        };
        let coded = |index: &Retrieval| {
            let mut tables = index.summary.tables().iter();
            tables.find_map(|table| Some((table.role.codes()?, matches!(table.role, Role::Residual(_)))))
        };
        let Some((summary, (layout, within))) = index.and_then(|index| Some((&index.summary, coded(index)?)))
        else {
            return conflict("the recipe".to_owned(), "it has no index of codes".to_owned());
        };
        if self.layers.len() != shape.layers() {
            let why = format!("there are codebooks for {} layers", self.layers.len());
            return conflict(format!("a model of {} layers", shape.layers()), why);
        }
        for (number, (heads, layer)) in self.layers.iter().zip(shape.iter()).enumerate() {
            if !heads.is_empty() && heads.len() != layer.kv_heads {
                let why = format!("there are codebooks for {} KV heads", heads.len());
                return conflict(format!("layer {number} with {} KV heads", layer.kv_heads), why);
            }
            for book in heads.iter().flatten() {
                if book.dims() != layer.d_k {
                    let why = format!("codewords have {} dimensions", book.dims());
                    return conflict(format!("layer {number} with keys of {}", layer.d_k), why);
                }
                if book.layout() != layout {
                    let (codes, bits) = (book.layout().codes, book.layout().bits);
                    let why = format!("codes are {codes} indices of {bits} bits");
                    return conflict(
                        format!("an index of {} indices of {} bits", layout.codes, layout.bits),
                        why,
                    );
                }
                if book.within() != within {
                    let of = |within| if within { "what keys have beside means of units" } else { "keys" };
                    let why = format!("they are of {}", of(book.within()));
                    return conflict(format!("codes of {}", of(within)), why);
                }
                if book.distance() != summary.distance() {
                    let place = |distance: Option<i32>| distance.map_or("true".to_owned(), |d| d.to_string());
                    let why = format!("they were learnt for queries at {}", place(book.distance()));
                    return conflict(format!("queries at {}", place(summary.distance())), why);
                }
            }
        }
        Ok(())
    }

    /// Those of a layer; empty if there are none.
    pub fn layer(&self, layer: usize) -> &[Option<Arc<Codebook>>] {
        self.layers.get(layer).map_or(&[], Vec::as_slice)
    }
}
