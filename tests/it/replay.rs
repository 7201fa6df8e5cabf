//! Replays of a context: what entries remember is what a naive implementation says, and nothing else stays.

use crate::support::*;
use kvsieve::cache::Replay;
use kvsieve::error::{CacheError, PolicyError, RecipeError};
use kvsieve::geometry::{ModelShape, Position};
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::ops::Range;
use std::sync::Arc;

const LAYERS: usize = 2;
const HQ: usize = 4;
const H: usize = 2;
const D: usize = 8;

fn model() -> ModelShape {
    small_model(LAYERS, HQ, H, D)
}

fn build(recipe: &str, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(model()).recipe(recipe).budget(Budget::Tokens(16)).page_entries(8);
    let mut cache = builder.shared_backend(Arc::clone(backend)).build().unwrap();
    let id = cache.create_sequence();
    (cache, id)
}

fn part(range: Range<i32>) -> Range<Position> {
    Position(range.start)..Position(range.end)
}

/// Feeds tokens to some layers of a replay.
fn repeat(replay: &mut Replay<'_>, tokens: &[u64], layers: usize) {
    let (shape, start, n) = (model(), replay.start().0, tokens.len());
    for layer in 0..layers {
        let rows = |kind, heads: usize| -> Vec<f32> {
            let tokens = tokens.iter().enumerate();
            tokens
                .flat_map(|(i, &t)| {
                    let of = shape.layer(layer);
                    (0..heads).flat_map(move |h| placed(kind, of, t, layer, h, start + i as i32))
                })
                .collect()
        };
        let (q, k, v) = (rows(Kind::Query, HQ), rows(Kind::Key, H), rows(Kind::Value, H));
        let view = |x, heads| TensorView::token_major(x, n, heads, D).unwrap();
        let mut out = vec![f32::NAN; n * HQ * D];
        let out_view = TensorViewMut::token_major(&mut out[..], n, HQ, D).unwrap();
        replay.attend(layer, view(&q[..], HQ), view(&k[..], H), view(&v[..], H), out_view).unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
    }
}

/// The highest weight of any row of the replay on an entry, over the first four, the part and the replay's own tokens.
fn naive(context: &[u64], tokens: &[u64], range: &Range<i32>, layer: usize, head: usize) -> Vec<f64> {
    let (shape, start) = (model(), context.len() as i32);
    let of = shape.layer(layer);
    let all: Vec<(i32, u64)> = (0..).zip(context.iter().chain(tokens).copied()).collect();
    let mut best = vec![0.0f64; context.len()];
    for g in 0..of.group() {
        for (i, &token) in tokens.iter().enumerate() {
            let at = start + i as i32;
            let query = placed(Kind::Query, of, token, layer, head * of.group() + g, at);
            let seen = all.iter().filter(|(p, _)| *p <= at && (*p < 4 || range.contains(p) || *p >= start));
            let weights: Vec<(i32, f64)> = seen
                .map(|&(p, token)| {
                    let key = placed(Kind::Key, of, token, layer, head, p);
                    let dot: f64 = query.iter().zip(&key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    (p, (dot * f64::from(of.scale)).exp())
                })
                .collect();
            let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
            for (p, weight) in weights.into_iter().filter(|(p, _)| range.contains(p)) {
                best[p as usize] = best[p as usize].max(weight / total);
            }
        }
    }
    best
}

#[test]
fn scores_are_those_of_a_naive_implementation() {
    let context: Vec<u64> = (0..61).collect();
    for backend in backends() {
        let (mut cache, id) = build("kvzip", &backend);
        feed(&mut cache, id, &context, context.len());
        // Parts that end within pages; the second overlaps the first, and its scores join by the higher; one of a single token.
        let parts: [(Range<i32>, Vec<u64>); 3] =
            [(0..33, (0..33).collect()), (29..60, (21..60).collect()), (60..61, vec![500])];
        for (range, tokens) in &parts {
            let mut replay = cache.replay(id, part(range.clone()), tokens.len()).unwrap();
            assert_eq!((replay.start().0, replay.tokens()), (61, tokens.len()));
            repeat(&mut replay, tokens, LAYERS);
            replay.finish().unwrap();
        }
        for layer in 0..LAYERS {
            let scores = cache.scores(id, layer).unwrap().unwrap();
            for head in 0..H {
                let mut want = vec![0.0f64; context.len()];
                for (range, tokens) in &parts {
                    let more = naive(&context, tokens, range, layer, head);
                    want.iter_mut().zip(more).for_each(|(want, more)| *want = want.max(more));
                }
                for (slot, (got, want)) in scores.head(head).iter().zip(&want).enumerate() {
                    let error = (f64::from(*got) - want).abs();
                    assert!(
                        error < 1e-5,
                        "on {}: layer {layer} head {head} slot {slot}: {got}, not {want}",
                        backend.name()
                    );
                }
            }
        }
        cache.end_prefill(id).unwrap();
        assert!(cache.stored(id, 0).unwrap().iter().all(|rows| rows.0 == 16));
    }
}

#[test]
fn nothing_of_a_replay_stays_but_scores() {
    let context: Vec<u64> = (0..40).collect();
    for backend in backends() {
        let (mut cache, id) = build("kvzip", &backend);
        let (mut plain_cache, plain_id) = build("kvzip", &backend);
        feed(&mut cache, id, &context, 40);
        feed(&mut plain_cache, plain_id, &context, 40);
        let before = cache.stats(id).unwrap();
        let tokens: Vec<u64> = (5..35).collect();
        // One that is dropped half-way, one that is dropped at its end, one that lacks a layer, one that ends.
        repeat(&mut cache.replay(id, part(0..40), tokens.len()).unwrap(), &tokens, 1);
        repeat(&mut cache.replay(id, part(0..40), tokens.len()).unwrap(), &tokens, LAYERS);
        let mut unfinished = cache.replay(id, part(0..40), tokens.len()).unwrap();
        repeat(&mut unfinished, &tokens, 1);
        let error = unfinished.finish().unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::Incomplete { missing: 1, .. })), "{error:?}");
        let error = cache.scores(id, 0).unwrap_err();
        assert!(
            matches!(error, Error::Policy(PolicyError::Missing { .. })),
            "nothing was scored yet: {error:?}"
        );
        let mut replay = cache.replay(id, part(0..40), tokens.len()).unwrap();
        repeat(&mut replay, &tokens, LAYERS);
        replay.finish().unwrap();

        assert_eq!(cache.next_position(id).unwrap().0, 40);
        assert_eq!(cache.stats(id).unwrap(), before, "on {}", backend.name());
        for layer in 0..LAYERS {
            for head in 0..H {
                assert_eq!(plain(&cache.positions(id, layer, head).unwrap()), (0..40).collect::<Vec<i32>>());
            }
        }
        // A step of two tokens is no end of the prompt: both caches still hold everything.
        let (got, want) =
            (feed(&mut cache, id, &[90, 91], 2), feed(&mut plain_cache, plain_id, &[90, 91], 2));
        assert_eq!(got, want, "on {}", backend.name());
    }
}

#[test]
fn a_fork_keeps_what_was_scored() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let (mut cache, id) = build("kvzip", &backend);
    feed(&mut cache, id, &(0..40).collect::<Vec<u64>>(), 40);
    let before = cache.fork(id).unwrap();
    let mut replay = cache.replay(id, part(0..40), 30).unwrap();
    repeat(&mut replay, &(0..30).collect::<Vec<u64>>(), LAYERS);
    replay.finish().unwrap();
    let after = cache.fork(id).unwrap();
    assert_eq!(cache.scores(after, 1).unwrap(), cache.scores(id, 1).unwrap());
    assert!(cache.scores(before, 1).is_err(), "pages are shared, scores are not");
}

#[test]
fn what_cannot_be_replayed_is_refused() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let (mut cache, id) = build("kvzip", &backend);
    feed(&mut cache, id, &(0..40).collect::<Vec<u64>>(), 40);
    for (start, end) in [(-1, 4), (4, 4), (9, 3), (30, 41)] {
        let error = cache.replay(id, part(start..end), 3).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::PositionRange { .. })), "{start}..{end}: {error:?}");
    }
    assert!(cache.replay(id, part(0..40), 0).is_err(), "no tokens");
    let error = cache.end_prefill(id).unwrap_err().to_string();
    assert!(error.contains("call KvCache::replay before end_prefill"), "{error}");
    assert_eq!(cache.stored(id, 0).unwrap()[0].0, 40, "nothing was lost");

    let (mut other, other_id) = build("snapkv(window=4)", &backend);
    feed(&mut other, other_id, &(0..9).collect::<Vec<u64>>(), 9);
    let error = other.replay(other_id, part(0..9), 3).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Cache(CacheError::Unsupported { what: "replay", .. })), "{error:?}");

    for schedule in ["chunk", "every(n=8)", "over(slack=8)"] {
        let recipe = format!("kvzip+when={schedule}");
        let builder = KvCache::builder(model()).recipe(recipe.as_str()).budget(Budget::Tokens(16));
        let error = builder.build().unwrap_err();
        assert!(matches!(error, Error::Recipe(RecipeError::Conflict { .. })), "{error:?}");
        assert!(error.to_string().contains("use when=prefill"), "{error}");
    }
}

#[test]
fn layers_that_share_a_cache_pay_the_same_entries() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let own = model().layer(0).clone();
    let shared = kvsieve::geometry::LayerShape { shared_with: Some(0), ..own.clone() };
    let shape = ModelShape::new(vec![own, shared]).unwrap();
    let context: Vec<u64> = (0..24).collect();
    let repeated: Vec<u64> = (4..20).collect();
    let scores = |with_second: bool| {
        let builder = KvCache::builder(shape.clone()).recipe("kvzip").budget(Budget::Tokens(16));
        let mut cache = builder.shared_backend(Arc::clone(&backend)).build().unwrap();
        let id = cache.create_sequence();
        feed(&mut cache, id, &context, context.len());
        let mut replay = cache.replay(id, part(0..24), repeated.len()).unwrap();
        repeat(&mut replay, &repeated, 1);
        if with_second {
            let (start, n) = (replay.start().0, repeated.len());
            let rows = repeated.iter().enumerate().flat_map(|(i, &t)| {
                let of = shape.layer(1);
                (0..HQ).flat_map(move |h| placed(Kind::Query, of, t, 1, h, start + i as i32))
            });
            let (q, mut out) = (rows.collect::<Vec<f32>>(), vec![f32::NAN; n * HQ * D]);
            let out = TensorViewMut::token_major(&mut out[..], n, HQ, D).unwrap();
            replay.attend_stored(1, TensorView::token_major(&q[..], n, HQ, D).unwrap(), out).unwrap();
        }
        replay.finish().unwrap();
        cache.scores(id, 0).unwrap().unwrap().values
    };
    let (one, both) = (scores(false), scores(true));
    assert!(one.iter().zip(&both).all(|(one, both)| both >= one) && one != both);
}
