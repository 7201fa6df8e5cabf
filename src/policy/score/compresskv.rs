//! CompressKV: the attention of few query heads of a layer, those that find what an answer is made of, decides for all its KV heads.
//!
//! *Helps* because heads that only copy or look at sinks have no say, and the window of four heads costs a part of what all cost.
//! *Hurts* where the profile is of another kind of text, and at the start of the text: average pooling counts the zero padding, so it
//! can drop the sinks. Protect those with `sinks=4`.
//!
//! `S` is the layer's `first` query heads of highest score (of equals the lower); head `h` reads the keys of KV head `c(h)`. With `W`
//! queries, and candidates older than these:
//! ```text
//! s[p] = mean over h in S of pool_k( Σ_i softmax(q[h,i] · k[c(h)])[p] )
//! ```
//! Every KV head's entry at position `p` has this score. Where heads hold different entries, a head of `S` whose KV head no longer
//! holds `p` counts as 0 in the mean, and an entry that none of them holds has the score −1, below all others. Entries of the window
//! are kept by protection; their raw score is one above every candidate's.

use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::kernel::pool::{PoolArgs, PoolKind};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Needs, Scorer, score};
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "compresskv",
    summary: "attention of the last queries of few heads, the same for all KV heads of a layer",
    source: "Lin et al. 2025, arXiv:2508.02401",
    needs: "the last `window` queries; a profile with the part heads",
    args: &[
        Arg::count("first", 4, 1, 65_536, "query heads of each layer that vote, those of highest score"),
        Arg::count("window", 8, 1, 65_536, "queries that vote; their entries are protected"),
        Arg::count("kernel", 5, 1, 65_535, "width of the average over neighbours, odd; 1 is none"),
    ],
    build: Build::Score { schedule: score::PREFILL, build },
};

/// The part of a profile, and its array.
const PART: &str = "heads";
const SCORES: &str = "scores";

/// The score of entries of which the voting heads know nothing; masses of attention are never negative.
const UNKNOWN: f32 = -1.0;

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    let kernel = args.count("kernel")?;
    if kernel.is_multiple_of(2) {
        return Err(args.error("kernel", kernel, "odd, so that it has a middle"));
    }
    let (first, window) = (args.count("first")?, args.count("window")?);
    Ok(Arc::new(CompressKv { first, window, kernel, voting: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct CompressKv {
    /// Query heads of each layer that vote.
    pub first: usize,
    /// Queries that vote.
    pub window: usize,
    /// Width of the pooling, odd.
    pub kernel: usize,
    /// Which query heads vote, `[L][first]`, ascending; `None` before [`Scorer::bind`].
    pub voting: Option<Vec<Vec<usize>>>,
}

impl Default for CompressKv {
    fn default() -> Self {
        Self { first: 4, window: 8, kernel: 5, voting: None }
    }
}

impl Scorer for CompressKv {
    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn protect(&self, _: usize) -> (usize, usize) {
        (0, self.window)
    }

    fn lacks(&self) -> Option<&'static str> {
        self.voting.is_none().then_some(PART)
    }

    fn bind(&self, profile: &Profile, shape: &ModelShape) -> Result<Option<Arc<dyn Scorer>>, ProfileError> {
        let count = shape.layer(0).query_heads;
        let scores = profile.weights(PART, SCORES, &[Some(shape.layers()), Some(count)])?.numbers();
        let best = |scores: &[f32]| {
            let mut heads: Vec<usize> = (0..count).collect();
            heads.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            heads.truncate(self.first);
            heads.sort_unstable();
            heads
        };
        let voting = Some(scores.chunks_exact(count).map(best).collect());
        Ok(Some(Arc::new(Self { voting, ..self.clone() })))
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let voting = self.voting.as_ref().and_then(|layers| layers.get(view.layer));
        let voting = voting.ok_or_else(|| PolicyError::Missing {
            policy: ENTRY.name.to_owned(),
            need: format!("the part {PART} of a profile"),
            layer: view.layer,
            hint: "; bind it to a profile that kvsieve calibrate made",
        })?;
        let (sums, queries) = score::window_sums_of(ENTRY.name, view, self.window, voting)?;

        // Candidate columns only: the window must not leak into its neighbours.
        let group = view.shape.group();
        let older = |head: usize| view.positions(head).take_while(|&p| p < queries[0]);
        let lengths: Vec<usize> = voting.iter().map(|head| older(head / group).count()).collect();
        let (mut rows, mut rest) = (Vec::with_capacity(sums.len()), sums.as_slice());
        for (head, &len) in voting.iter().zip(&lengths) {
            let (row, tail) = rest.split_at(view.heads[head / group].rows());
            rest = tail;
            rows.extend_from_slice(&row[..len]);
        }
        let mut pooled = vec![0.0; rows.len()];
        view.backend.pool(&mut PoolArgs {
            kind: PoolKind::Average,
            width: self.kernel,
            lengths: &lengths,
            input: &rows,
            out: &mut pooled,
        })?;

        let votes = voting.iter().flat_map(|head| older(head / group)).zip(pooled);
        let scores = means(votes, voting.len());
        let window = scores.iter().map(|(_, score)| *score).fold(0.0, f32::max) + 1.0;
        let score = |(next, position): (&mut usize, i32)| {
            while scores.get(*next).is_some_and(|(known, _)| *known < position) {
                *next += 1;
            }
            match scores.get(*next) {
                _ if position >= queries[0] => window,
                Some((known, score)) if *known == position => *score,
                _ => UNKNOWN,
            }
        };
        let mut values = Vec::with_capacity(view.lengths().iter().sum());
        for head in 0..view.heads.len() {
            let mut next = 0;
            values.extend(view.positions(head).map(|position| score((&mut next, position))));
        }
        Ok(LayerScores { lengths: view.lengths(), values })
    }
}

/// The mean of `heads` votes at each position that any of them spoke of, ascending; who did not speak counts as 0.
fn means(votes: impl Iterator<Item = (i32, f32)>, heads: usize) -> Vec<(i32, f32)> {
    let mut votes: Vec<(i32, f32)> = votes.collect();
    // Stable, so that votes are summed in the order of heads; and fast, since each head's ascend already.
    votes.sort_by_key(|(position, _)| *position);
    votes.dedup_by(|later, first| {
        let same = later.0 == first.0;
        first.1 += if same { later.1 } else { 0.0 };
        same
    });
    votes.iter_mut().for_each(|(_, score)| *score /= heads.max(1) as f32);
    votes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Cpu, Reference};
    use crate::geometry::LayerShape;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::profile::{Array, Part};
    use crate::testing::layer::LayerCase;

    /// Six entries, the last two of which are the window.
    const FIRST: [[f32; 6]; 2] = [[0.40, 0.10, 0.20, 0.10, 0.20, 1.0], [0.20, 0.10, 0.40, 0.10, 0.10, 0.10]];
    const SECOND: [[f32; 6]; 2] = [[0.10, 0.60, 0.10, 0.10, 0.10, 1.0], [0.10, 0.50, 0.10, 0.10, 0.10, 0.10]];
    const OTHER: [[f32; 6]; 2] = [[0.05, 0.05, 0.05, 0.80, 0.05, 1.0], [0.05, 0.05, 0.05, 0.75, 0.05, 0.05]];

    fn bound(first: usize, kernel: usize, scores: &[f32], kv_heads: usize) -> Arc<dyn Scorer> {
        let shape = ModelShape::uniform(1, LayerShape::new(scores.len(), kv_heads, 6)).unwrap();
        let array = Array::new(vec![1, scores.len()], scores.to_vec()).unwrap();
        let profile = Profile::new(&shape).unwrap().with(PART, Part::new("by hand").with(SCORES, array));
        let scorer = CompressKv { first, window: 2, kernel, voting: None };
        assert_eq!(scorer.lacks(), Some("heads"));
        scorer.bind(&profile, &shape).unwrap().unwrap()
    }

    /// The query heads are other, first, second, other.
    fn case(backend: &Reference, kv_heads: usize) -> LayerCase<'_> {
        let weights = [OTHER, FIRST, SECOND, OTHER].map(|head| head.map(|row| row.to_vec()).to_vec());
        LayerCase::attention(backend, kv_heads, Vec::new(), &weights).unwrap()
    }

    #[track_caller]
    fn near(got: &[f32], want: &[f32]) {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-5), "{got:?}, want {want:?}");
        assert_eq!(got.len(), want.len());
    }

    #[test]
    fn chosen_heads_vote_and_all_kv_heads_have_their_score() {
        let backend = Reference::default();
        let case = case(&backend, 2);
        let score = |first, kernel, scores: &[f32]| {
            let scores = bound(first, kernel, scores, 2).score(&case.view(4)).unwrap();
            assert_eq!(scores.lengths, [6, 6]);
            assert_eq!(scores.head(0), scores.head(1));
            scores.head(0).to_vec()
        };
        // Sums over the window are .6 .2 .6 .2 and .2 1.1 .2 .2; the means .4 .65 .4 .2, and the window one above.
        near(&score(2, 1, &[0.1, 0.9, 0.8, 0.2]), &[0.40, 0.65, 0.40, 0.20, 1.65, 1.65]);
        // Pooled by threes with padding: 1.05/3, 1.45/3, 1.25/3, .6/3.
        let pooled = [0.35, 1.45 / 3.0, 1.25 / 3.0, 0.20];
        near(&score(2, 3, &[0.1, 0.9, 0.8, 0.2])[..4], &pooled);
        near(&score(1, 1, &[0.1, 0.9, 0.8, 0.2])[..4], &[0.60, 0.20, 0.60, 0.20]);
        near(&score(1, 1, &[0.5, 0.5, 0.5, 0.5])[..4], &[0.10, 0.10, 0.10, 1.55]);
        // More than there are: all of them.
        near(&score(9, 1, &[0.1, 0.9, 0.8, 0.2])[..4], &[0.25, 0.375, 0.25, 0.875]);
    }

    #[test]
    fn plans_keep_the_window_and_the_best() {
        let backend = Reference::default();
        let scorer = bound(2, 1, &[0.1, 0.9, 0.8, 0.2], 2);
        let policy = Staged::new("compresskv", scorer, Arc::new(Uniform));
        let plan = policy.plan(&case(&backend, 2).view(4)).unwrap();
        assert!(plan.heads.iter().all(|head| head.keep == [0, 1, 4, 5]), "{plan:?}");
    }

    #[test]
    fn positions_that_voting_heads_no_longer_hold_score_lowest() {
        let backend = Cpu::default();
        let shape = LayerShape { scale: 1.0, ..LayerShape::new(2, 2, 6) };
        let mut case = LayerCase::new(&backend, shape, Vec::new());
        let keys = |positions: &[i32]| -> Vec<f32> {
            positions.iter().flat_map(|&p| (0..6).map(move |d| if d == p { 1.0 } else { 0.0 })).collect()
        };
        for (head, positions) in [&[0, 2, 4, 5][..], &[0, 1, 3, 4, 5]].into_iter().enumerate() {
            let rows = keys(positions);
            case.append(head, positions, &rows, &rows).unwrap();
        }
        let logits = FIRST.concat().iter().map(|weight| weight.ln()).collect::<Vec<_>>();
        case.record([logits.clone(), logits].concat(), vec![4, 5]);
        // The first head sees .4 .2 .2 (of .8) and .2 .4 .1 .1 (of .8) at 0, 2, 4, 5.
        let one = bound(1, 1, &[0.9, 0.1], 2).score(&case.view(3)).unwrap();
        near(one.head(0), &[0.75, 0.75, 1.75, 1.75]);
        near(one.head(1), &[0.75, UNKNOWN, UNKNOWN, 1.75, 1.75]);
        // The second sees .4 .1 .1 .2 (of .8) and .2 .1 .1 .1 .1 (of .6) at 0, 1, 3, 4, 5: who does not hold a position counts 0.
        let both = bound(2, 1, &[0.9, 0.1], 2).score(&case.view(3)).unwrap();
        let (at_0, at_1) = ((0.75 + 0.5 + 1.0 / 3.0) / 2.0, (0.125 + 1.0 / 6.0) / 2.0);
        near(&both.head(0)[..2], &[at_0, 0.375]);
        near(&both.head(1)[..3], &[at_0, at_1, at_1]);
    }

    #[test]
    fn without_a_profile_it_says_what_is_missing() {
        let backend = Reference::default();
        let error = CompressKv::default().score(&case(&backend, 2).view(4)).unwrap_err().to_string();
        assert!(error.contains("the part heads of a profile") && error.contains("calibrate"), "{error}");
    }

    #[test]
    fn no_queries_is_an_error_with_a_hint() {
        let backend = Reference::default();
        let mut case = case(&backend, 2);
        case.record(Vec::new(), Vec::new());
        let error = bound(4, 5, &[0.1; 4], 2).score(&case.view(4)).unwrap_err().to_string();
        assert!(error.contains("the last 2 queries"), "{error}");
    }
}
