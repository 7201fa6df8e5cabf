//! Minus the Euclidean norm of the key: keys of low norm tend to draw attention.
//!
//! *Helps* where no query is at hand, at the price of one read of the keys. *Hurts* in the first layers,
//! where the correlation does not hold, and with allocators: norms of different heads are not comparable.

use crate::device::page::Side;
use crate::error::{PolicyError, RecipeError};
use crate::kernel::row_norms::NormArgs;
use crate::kernel::total_rows;
use crate::policy::registry::{Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "knorm",
    summary: "keeps the keys of lowest norm",
    source: "Devoto et al. 2024, arXiv:2406.11430",
    needs: "nothing",
    args: &[],
    build: Build::Score { schedule: score::PREFILL, build },
};

fn build(_: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(Knorm))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub struct Knorm;

impl Scorer for Knorm {
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let mut values = vec![0.0; total_rows(view.heads)];
        view.backend.row_norms(&mut NormArgs { heads: view.heads, side: Side::Key, out: &mut values })?;
        values.iter_mut().for_each(|v| *v = -*v);
        Ok(LayerScores { lengths: view.lengths(), values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::geometry::LayerShape;
    use crate::testing::layer::LayerCase;

    #[test]
    fn low_norms_score_high() {
        let backend = Reference::default();
        let mut case = LayerCase::new(&backend, LayerShape::new(1, 1, 2), Vec::new());
        case.append(0, &[0, 1, 2], &[3.0, 4.0, 0.0, 1.0, -6.0, 8.0], &[0.0; 6]).unwrap();
        assert_eq!(Knorm.score(&case.view(1)).unwrap().values, [-5.0, -1.0, -10.0]);
    }
}
