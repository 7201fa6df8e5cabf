//! Policies that judge tokens when they arrive: what they say is what the formula says, stays with its entry, and is asked for
//! where the host must give something.

use crate::support::*;
use kvsieve::cache::SideInput;
use kvsieve::error::{CacheError, RecipeError};
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::profile::{Array, Part, Profile};
use kvsieve::view::TensorView;
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::collections::BTreeMap;
use std::sync::Arc;

const LAYERS: usize = 2;
const HQ: usize = 4;
const H: usize = 2;
const D: usize = 8;
/// Dimension of hidden states.
const HIDDEN: usize = 5;

fn model() -> ModelShape {
    small_model(LAYERS, HQ, H, D)
}

fn profile() -> Profile {
    kvsieve::testing::profile(&model(), HIDDEN, 5).unwrap()
}

fn build(recipe: &str, budget: Option<usize>, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(model()).recipe(recipe).profile(profile()).page_entries(8);
    let builder = builder.shared_backend(Arc::clone(backend));
    let builder = match budget {
        Some(tokens) => builder.budget(Budget::Tokens(tokens)),
        None => builder,
    };
    let mut cache = builder.build().unwrap_or_else(|e| panic!("{recipe}: {e}"));
    let id = cache.create_sequence();
    (cache, id)
}

fn hidden(token: u64, layer: usize) -> Vec<f32> {
    (0..HIDDEN as u64).map(|d| noise_normal((token * 64 + layer as u64) * 16 + d)).collect()
}

/// As [`feed`], with hidden states.
fn feed_hidden(cache: &mut KvCache, id: SequenceId, tokens: &[u64], accept: usize) {
    let mut step = cache.begin(id, tokens.len()).unwrap();
    let start = step.lanes().next().unwrap().1.0;
    for layer in 0..LAYERS {
        let states: Vec<f32> = tokens.iter().flat_map(|&token| hidden(token, layer)).collect();
        let states = TensorView::token_major(&states[..], tokens.len(), 1, HIDDEN).unwrap();
        step.side_input(layer, SideInput::Hidden(states)).unwrap();
        feed_layer(&mut step, &model(), layer, tokens, start);
    }
    step.commit(accept).unwrap();
}

/// A network's answer, in `f64`.
fn network(part: &'static str, layer: usize, x: &[f32]) -> Vec<f64> {
    let profile = profile();
    let numbers = |name: &str| -> Option<Vec<f32>> {
        let name = format!("layers.{layer}.{name}");
        let part = profile.part(part).unwrap();
        part.arrays().find(|(array, _)| *array == name).map(|(_, array)| array.numbers().to_vec())
    };
    let dense = |x: &[f64], weight: Vec<f32>, bias: Option<Vec<f32>>| -> Vec<f64> {
        let rows = weight.chunks_exact(x.len()).enumerate();
        let bias = |row: usize| bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
        rows.map(|(row, w)| x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>() + bias(row))
            .collect()
    };
    let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let mut inner = dense(&x, numbers("up").unwrap(), numbers("up_bias"));
    match part {
        "locret" => inner.iter_mut().for_each(|x| *x /= 1.0 + (-*x).exp()),
        // Φ by its integral: a formula of its own, slow and sure.
        _ => inner.iter_mut().for_each(|x| {
            let steps = 20_000;
            let width = *x / f64::from(steps);
            let density = |t: f64| (-0.5 * t * t).exp() / std::f64::consts::TAU.sqrt();
            let area: f64 = (0..steps).map(|i| density((f64::from(i) + 0.5) * width) * width).sum();
            *x *= 0.5 + area;
        }),
    }
    let last = if part == "locret" { "down" } else { "weight" };
    dense(&inner, numbers(last).unwrap(), numbers("bias"))
}

/// What `locret` must say of a token.
fn locret(token: u64, layer: usize) -> Vec<f64> {
    let rows = |kind, heads: usize| (0..heads).flat_map(move |h| row(kind, token, layer, h, D));
    let x: Vec<f32> = rows(Kind::Query, HQ).chain(rows(Kind::Key, H)).chain(rows(Kind::Value, H)).collect();
    network("locret", layer, &x)
}

/// Scores of every entry are those of the token at its position.
fn check(cache: &KvCache, id: SequenceId, tokens: &[u64], want: impl Fn(u64, usize) -> Vec<f64>, what: &str) {
    let mut known: BTreeMap<(u64, usize), Vec<f64>> = BTreeMap::new();
    for layer in 0..LAYERS {
        let scores = cache.scores(id, layer).unwrap().unwrap();
        for head in 0..H {
            let positions = plain(&cache.positions(id, layer, head).unwrap());
            assert_eq!(positions.len(), scores.head(head).len(), "{what}");
            for (position, got) in positions.into_iter().zip(scores.head(head)) {
                let token = tokens[position as usize];
                let want = known.entry((token, layer)).or_insert_with(|| want(token, layer))[head];
                assert!(
                    (f64::from(*got) - want).abs() < 1e-4 * (1.0 + want.abs()),
                    "{what}: layer {layer} head {head} position {position}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn locret_judges_by_queries_and_keys_before_rotation() {
    let tokens: Vec<u64> = (0..70).collect();
    for backend in backends() {
        for (recipe, chunks) in [
            ("locret(local=4)+when=prefill", &[70][..]),
            ("locret(local=4)", &[40, 1, 29][..]),
            ("locret(local=4,stabilizers=0.5)", &[13, 13, 13, 13, 13, 5][..]),
        ] {
            let what = format!("{recipe} on {}", backend.name());
            let (mut cache, id) = build(recipe, Some(24), &backend);
            let mut done = 0;
            for &n in chunks {
                feed(&mut cache, id, &tokens[done..done + n], n);
                done += n;
                check(&cache, id, &tokens, locret, &what);
            }
            cache.end_prefill(id).unwrap();
            check(&cache, id, &tokens, locret, &what);
            for layer in 0..LAYERS {
                assert!(cache.stored(id, layer).unwrap().iter().all(|rows| rows.0 == 24), "{what}");
            }
        }
    }
}

#[test]
fn memory_stays_bounded_while_a_prompt_is_read() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let (mut cache, id) = build("locret(local=4)", Some(32), &backend);
    for chunk in (0..400u64).collect::<Vec<_>>().chunks(20) {
        feed(&mut cache, id, chunk, 20);
        assert!(cache.stored(id, 0).unwrap().iter().all(|rows| rows.0 <= 32));
    }
    let (mut whole, other) = build("full", None, &backend);
    whole.shrink_scratch();
    feed(&mut whole, other, &(0..52).collect::<Vec<_>>(), 52);
    let most = whole.stats(other).unwrap().total().bytes_resident;
    assert!(cache.stats(id).unwrap().total().bytes_resident <= most + LAYERS * H * 8 * 80);
}

#[test]
fn rows_that_the_host_gives_count_as_those_turned_back() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let tokens: Vec<u64> = (0..20).collect();
    // Given twice as large, so that they are told from the ones turned back.
    let given = |kind, heads: usize, layer: usize| -> Vec<f32> {
        let rows = tokens.iter().flat_map(|&t| (0..heads).flat_map(move |h| row(kind, t, layer, h, D)));
        rows.map(|x| 2.0 * x).collect()
    };
    let (mut cache, id) = build("locret+when=never", Some(64), &backend);
    let mut step = cache.begin(id, tokens.len()).unwrap();
    for layer in 0..LAYERS {
        let (q, k) = (given(Kind::Query, HQ, layer), given(Kind::Key, H, layer));
        let q = TensorView::token_major(&q[..], tokens.len(), HQ, D).unwrap();
        let k = TensorView::token_major(&k[..], tokens.len(), H, D).unwrap();
        let wrong = step.side_input(layer, SideInput::PreRope { q: k, k }).unwrap_err();
        assert!(matches!(wrong, Error::Cache(CacheError::Extents { tensor: "q", .. })), "{wrong}");
        step.side_input(layer, SideInput::PreRope { q, k }).unwrap();
        feed_layer(&mut step, &model(), layer, &tokens, 0);
        let late = step.side_input(layer, SideInput::PreRope { q, k }).unwrap_err();
        assert!(matches!(late, Error::Cache(CacheError::Order { .. })), "{late}");
    }
    step.commit(tokens.len()).unwrap();
    let doubled = |token, layer| {
        let rows = |kind, heads: usize, by: f32| {
            (0..heads).flat_map(move |h| row(kind, token, layer, h, D)).map(move |x| by * x)
        };
        let x = rows(Kind::Query, HQ, 2.0).chain(rows(Kind::Key, H, 2.0)).chain(rows(Kind::Value, H, 1.0));
        network("locret", layer, &x.collect::<Vec<f32>>())
    };
    check(&cache, id, &tokens, doubled, "given");
}

#[test]
fn ratings_go_with_their_entries() {
    for backend in backends() {
        let (mut cache, id) = build("kvzap(window=4)+when=never", Some(30), &backend);
        let mut tokens: Vec<u64> = (0..50).collect();
        feed_hidden(&mut cache, id, &tokens[..40], 40);
        // Three of ten are accepted, and others come in their place.
        feed_hidden(&mut cache, id, &tokens[40..], 3);
        tokens.truncate(43);
        tokens.extend(100..107);
        feed_hidden(&mut cache, id, &tokens[43..], 7);
        let of = |token, layer| network("kvzap", layer, &hidden(token, layer));
        check(&cache, id, &tokens, of, "after a partial commit");

        let fork = cache.fork(id).unwrap();
        cache.compress(fork).unwrap();
        check(&cache, fork, &tokens, of, "compressed");
        check(&cache, id, &tokens, of, "the other fork");
        cache.truncate(id, kvsieve::geometry::Position(45)).unwrap();
        check(&cache, id, &tokens[..45], of, "truncated");
        for layer in 0..LAYERS {
            for head in 0..H {
                // Beside the first 4 and the last 4 the best stay.
                let rated = |position: &i32| of(tokens[*position as usize], layer)[head];
                let mut best: Vec<i32> = (4..46).collect();
                best.sort_by(|a, b| rated(b).total_cmp(&rated(a)));
                let mut want: Vec<i32> = (0..4).chain(46..50).chain(best.into_iter().take(22)).collect();
                want.sort_unstable();
                assert_eq!(
                    plain(&cache.positions(fork, layer, head).unwrap()),
                    want,
                    "on {}",
                    backend.name()
                );
            }
        }
    }
}

#[test]
fn a_threshold_decides_without_a_budget_and_within_one() {
    let tokens: Vec<u64> = (0..120).collect();
    let of = |token, layer| network("kvzap", layer, &hidden(token, layer));
    for backend in backends() {
        for budget in [None, Some(40)] {
            let (mut cache, id) = build("kvzap(window=10,threshold=-0.3)", budget, &backend);
            for chunk in tokens[..60].chunks(25) {
                feed_hidden(&mut cache, id, chunk, chunk.len());
            }
            cache.end_prefill(id).unwrap();
            for token in &tokens[60..] {
                feed_hidden(&mut cache, id, std::slice::from_ref(token), 1);
            }
            cache.compress(id).unwrap();
            let mut counts = Vec::new();
            for layer in 0..LAYERS {
                for head in 0..H {
                    let kept = plain(&cache.positions(id, layer, head).unwrap());
                    let above = |position: i32| {
                        !(4..110).contains(&position) || of(tokens[position as usize], layer)[head] >= -0.3
                    };
                    assert!(kept.iter().all(|&position| above(position)), "on {}", backend.name());
                    match budget {
                        None => {
                            let want: Vec<i32> = (0..120).filter(|&position| above(position)).collect();
                            assert_eq!(kept, want, "on {}", backend.name());
                        }
                        Some(budget) => assert!(kept.len() <= budget, "{}", kept.len()),
                    }
                    counts.push(kept.len());
                }
            }
            assert!(counts.iter().any(|&n| n != counts[0]) && counts.iter().any(|&n| n < 100), "{counts:?}");
        }
    }
}

#[test]
fn what_the_host_must_give_is_asked_for() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let (mut cache, id) = build("kvzap", Some(40), &backend);
    let mut step = cache.begin(id, 3).unwrap();
    for layer in 0..LAYERS {
        feed_layer(&mut step, &model(), layer, &[1, 2, 3], 0);
    }
    let error = step.commit(3).unwrap_err();
    assert!(matches!(error, Error::Cache(CacheError::SideInput { layer: 0, .. })), "{error:?}");
    assert!(error.to_string().contains("Step::side_input"), "{error}");
    assert_eq!(cache.next_position(id).unwrap().0, 0, "nothing was kept");

    let mut step = cache.begin(id, 1).unwrap();
    let bad = [0.0, f32::NAN, 0.0, 0.0, 0.0];
    let view = TensorView::token_major(&bad[..], 1, 1, HIDDEN).unwrap();
    let error = step.side_input(1, SideInput::Hidden(view)).unwrap_err();
    assert!(
        matches!(error, Error::Cache(CacheError::NonFinite { tensor: "hidden", dim: 1, .. })),
        "{error:?}"
    );
    let narrow = TensorView::token_major(&bad[..3], 1, 1, 3).unwrap();
    assert!(step.side_input(0, SideInput::Hidden(narrow)).is_err(), "NaN within");
    let narrow = TensorView::token_major(&[0.0f32; 3][..], 1, 1, 3).unwrap();
    let error = step.side_input(0, SideInput::Hidden(narrow)).unwrap_err().to_string();
    assert!(error.contains("judges rows of 5 numbers, these have 3"), "{error}");
    assert!(step.side_input(9, SideInput::Hidden(narrow)).is_err());
    drop(step);

    // Keys come rotated, and nothing says how.
    let unknown = ModelShape::uniform(LAYERS, LayerShape::new(HQ, H, D)).unwrap();
    let random = kvsieve::testing::profile(&unknown, HIDDEN, 5).unwrap();
    let builder = KvCache::builder(unknown).recipe("locret").budget(Budget::Tokens(40)).profile(random);
    let error = builder.build().unwrap_err();
    assert!(matches!(error, Error::Recipe(RecipeError::Conflict { .. })), "{error:?}");
    assert!(error.to_string().contains("set LayerShape::rotary"), "{error}");

    // Networks of another width, or of none.
    for (part, array, extents) in
        [("locret", "up", vec![3, 7]), ("locret", "down", vec![3, 3]), ("kvzap", "weight", vec![1, 3])]
    {
        let broken = profile_with(part, array, extents.clone());
        let error = KvCache::builder(model()).recipe(part).budget(Budget::Tokens(40)).profile(broken).build();
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&format!("{extents:?}")) && error.contains(array), "{error}");
    }
    let empty = profile().with("locret", Part::new(""));
    let error = KvCache::builder(model()).recipe("locret").budget(Budget::Tokens(40)).profile(empty).build();
    assert!(error.unwrap_err().to_string().contains("no array layers.0.up"));
}

/// The random profile with one array of layer 1 of other extents.
fn profile_with(name: &'static str, array: &str, extents: Vec<usize>) -> Profile {
    let profile = profile();
    let numbers = vec![0.5; extents.iter().product()];
    let part = profile.part(name).unwrap().clone();
    profile.with(name, part.with(format!("layers.1.{array}"), Array::new(extents, numbers).unwrap()))
}

#[test]
fn a_linear_map_needs_no_hidden_layer() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let weights: Vec<f32> = (0..H * HIDDEN).map(|i| 0.3 * i as f32 - 1.0).collect();
    let bias = [0.5, -0.25];
    let part = (0..LAYERS).fold(Part::new("by hand"), |part, layer| {
        let name = |array: &str| format!("layers.{layer}.{array}");
        part.with(name("weight"), Array::new(vec![H, HIDDEN], weights.clone()).unwrap())
            .with(name("bias"), Array::new(vec![H], bias.to_vec()).unwrap())
    });
    let linear = Profile::new(&model()).unwrap().with("kvzap", part);
    let builder = KvCache::builder(model()).recipe("kvzap+when=never").budget(Budget::Tokens(40));
    let mut cache = builder.shared_backend(backend).profile(linear).build().unwrap();
    let id = cache.create_sequence();
    let tokens: Vec<u64> = (0..30).collect();
    feed_hidden(&mut cache, id, &tokens, 30);
    let want = |token, layer| {
        let x = hidden(token, layer);
        let rows = weights.chunks_exact(HIDDEN).zip(bias);
        let dot = |w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        rows.map(|(w, bias)| dot(w) + f64::from(bias)).collect()
    };
    check(&cache, id, &tokens, want, "linear");
}

#[test]
fn renumbered_entries_keep_their_ratings() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let (mut kept, kept_id) = build("locret(local=4)", Some(24), &backend);
    let (mut moved, moved_id) = build("locret(local=4)+positions=renumber", Some(24), &backend);
    for chunk in (0..90u64).collect::<Vec<_>>().chunks(30) {
        feed(&mut kept, kept_id, chunk, chunk.len());
        // Its tokens stand at other positions, and are turned back from there.
        feed(&mut moved, moved_id, chunk, chunk.len());
        for layer in 0..LAYERS {
            let scores = |cache: &KvCache, id| cache.scores(id, layer).unwrap().unwrap().values;
            let (want, got) = (scores(&kept, kept_id), scores(&moved, moved_id));
            assert_eq!(want.len(), got.len());
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "layer {layer}: {got}, not {want}");
            }
        }
    }
    assert_eq!(moved.next_position(moved_id).unwrap().0, 24);
    assert_eq!(kept.next_position(kept_id).unwrap().0, 90);
}
