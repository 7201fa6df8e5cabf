//! Policies that go by a profile of heads and layers, in a cache: `duo`, `compress_error`, `compresskv`, `headkv`; and what is said
//! where the profile is missing or of another model.

use crate::support::*;
use kvsieve::error::{ProfileError, RecipeError};
use kvsieve::geometry::ModelShape;
use kvsieve::profile::{Array, Part, Profile};
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::sync::Arc;

const LAYERS: usize = 3;

/// At a share of a half, heads (0, 1), (1, 0) and (1, 1) stream.
const GATES: [f32; 6] = [0.9, 0.1, 0.1, 0.2, 0.8, 0.7];

fn streams(layer: usize, head: usize) -> bool {
    GATES[2 * layer + head] < 0.5
}

fn model() -> ModelShape {
    small_model(LAYERS, 4, 2, 8)
}

fn profile(shape: &ModelShape) -> Profile {
    let part = |array: &str, extents: &[usize], numbers: &[f32]| {
        Part::new("by hand").with(array, Array::new(extents.to_vec(), numbers.to_vec()).unwrap())
    };
    let heads = [0.2, 0.0, 0.3, 0.3, 0.5, 0.3, 0.1, 0.3, 0.4, 0.0, 0.1, 0.2];
    Profile::new(shape)
        .unwrap()
        .with("duo", part("gates", &[LAYERS, 2], &GATES))
        .with("errors", part("layers", &[LAYERS], &[0.6, 0.1, 0.3]))
        .with("heads", part("scores", &[LAYERS, 4], &heads))
}

fn build(recipe: &str, budget: Option<usize>, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(model()).recipe(recipe).profile(profile(&model())).page_entries(8);
    let builder = builder.shared_backend(Arc::clone(backend));
    let builder = match budget {
        Some(tokens) => builder.budget(Budget::Tokens(tokens)),
        None => builder,
    };
    let mut cache = builder.build().unwrap_or_else(|e| panic!("{recipe}: {e}"));
    let id = cache.create_sequence();
    (cache, id)
}

fn all_heads() -> impl Iterator<Item = (usize, usize)> {
    (0..LAYERS).flat_map(|layer| (0..2).map(move |head| (layer, head)))
}

/// Entries of every KV head, layer after layer.
fn counts(cache: &KvCache, id: SequenceId) -> Vec<usize> {
    all_heads().map(|(layer, head)| cache.positions(id, layer, head).unwrap().len()).collect()
}

/// After `tokens`, heads that retrieve hold all, the others their ends and at most `slack` entries more.
fn check_classes(cache: &KvCache, id: SequenceId, tokens: usize, slack: usize, what: &str) {
    for (layer, head) in all_heads() {
        let got = plain(&cache.positions(id, layer, head).unwrap());
        let all: Vec<i32> = (0..tokens as i32).collect();
        if !streams(layer, head) || tokens <= 16 {
            assert_eq!(got, all, "{what}: layer {layer} head {head} after {tokens}");
            continue;
        }
        let more = got.len() - 16;
        assert!(more <= slack, "{what}: layer {layer} head {head} holds {more} more after {tokens}");
        let ends = [&all[..4], &all[tokens - 12 - more..]].concat();
        assert_eq!(got, ends, "{what}: layer {layer} head {head} after {tokens}");
    }
}

#[test]
fn streaming_heads_hold_their_ends_and_the_others_everything() {
    for backend in backends() {
        for chunk in [40, 7, 1] {
            let what = format!("on {} in chunks of {chunk}", backend.name());
            let (mut cache, id) = build("duo(sinks=4,recent=12)", None, &backend);
            let mut done = 0;
            for part in (0..80u64).collect::<Vec<_>>().chunks(chunk) {
                feed_all_checked(&mut cache, id, part, &what);
                done += part.len();
                check_classes(&cache, id, done, if part.len() > 1 { 0 } else { 15 }, &what);
            }
            cache.end_prefill(id).unwrap();
            for token in 80..120 {
                feed_all_checked(&mut cache, id, &[token], &what);
                check_classes(&cache, id, token as usize + 1, 15, &what);
            }
            cache.compress(id).unwrap();
            check_classes(&cache, id, 120, 0, &what);
            let stats = cache.stats(id).unwrap();
            assert_eq!(stats.layers[2].dropped, 0, "{what}: both heads of the last layer retrieve");
            assert_eq!(stats.layers[1].entries, 32, "{what}");
        }
    }
}

#[test]
fn a_budget_gives_retrieving_heads_of_all_layers_the_same() {
    for backend in backends() {
        for scorer in ["snapkv(window=4)", "knorm", "h2o", "compresskv"] {
            let recipe = format!("{scorer}+duo(sinks=4,recent=12)");
            let what = format!("{recipe} on {}", backend.name());
            let (mut cache, id) = build(&recipe, Some(30), &backend);
            for part in (0..100u64).collect::<Vec<_>>().chunks(25) {
                feed_ends_checked(&mut cache, id, part, &what);
            }
            cache.end_prefill(id).unwrap();
            // 6 · 30 entries without 3 · 16 are 3 · 44; layer 1 cannot hold more than its ends.
            assert_eq!(counts(&cache, id), [44, 16, 16, 16, 44, 44], "{what}");
            for token in 100..150 {
                feed_ends_checked(&mut cache, id, &[token], &what);
                let most = [44, 16, 16, 16, 44, 44].map(|count| count + 15);
                assert!(counts(&cache, id).iter().zip(most).all(|(&got, most)| got <= most), "{what}");
            }
            cache.compress(id).unwrap();
            assert_eq!(counts(&cache, id), [44, 16, 16, 16, 44, 44], "{what}");
        }
    }
}

#[test]
fn budgets_follow_errors_of_layers_and_importances_of_heads() {
    for backend in backends() {
        let (mut cache, id) = build("compress_error(base=10)", Some(40), &backend);
        feed_ends_checked(&mut cache, id, &(0..150).collect::<Vec<_>>(), "compress_error");
        cache.end_prefill(id).unwrap();
        // 10 + 90 ẽ.
        assert_eq!(counts(&cache, id), [64, 64, 19, 19, 37, 37]);
        for layer in 0..LAYERS {
            let of = |head| plain(&cache.positions(id, layer, head).unwrap());
            assert_eq!(of(0), of(1), "few heads choose for all of a layer");
        }
        feed_all_checked(&mut cache, id, &[150], "compress_error");

        let (mut cache, id) = build("headkv(beta=2)+snapkv(window=4)", Some(40), &backend);
        feed_ends_checked(&mut cache, id, &(0..150).collect::<Vec<_>>(), "headkv");
        cache.end_prefill(id).unwrap();
        // Importances .1 .3 | .4 .2 | .2 .15 of 1.35, times 20 · 6, plus 20: means of the layers 37.8, 46.7 and 35.6,
        // which are rounded to 38, 47 and 35.
        assert_eq!(counts(&cache, id), [29, 47, 56, 38, 37, 33]);
        feed_all_checked(&mut cache, id, &[150], "headkv");
    }
}

#[test]
fn every_backend_plans_the_same() {
    for recipe in [
        "duo(sinks=4,recent=12)",
        "knorm+duo(sinks=4,recent=12)",
        "snapkv(window=4)+duo(share=0.7,sinks=4,recent=12)",
        "compresskv(window=4,first=2)",
        "compresskv(window=4,first=3,kernel=1)+headkv",
        "compress_error(base=10)",
        "snapkv(window=8,kernel=1)+headkv",
    ] {
        let plans = |budget| {
            let plan = |backend: &Arc<dyn Backend>| {
                let (mut cache, id) = build(&format!("{recipe}+when=never"), budget, backend);
                feed(&mut cache, id, &(0..120).collect::<Vec<_>>(), 120);
                cache.plan(id).unwrap()
            };
            backends().iter().map(plan).collect::<Vec<_>>()
        };
        let mut budgets = vec![Some(40)];
        if recipe.contains("duo") {
            budgets.push(None);
        }
        for budget in budgets {
            let plans = plans(budget);
            assert!(plans.iter().all(|plan| *plan == plans[0]), "{recipe}, {budget:?}");
            assert!(plans[0].iter().any(|(_, plan)| !plan.heads.iter().all(|head| head.is_identity())));
        }
    }
}

#[test]
fn bytes_are_those_of_what_the_classes_keep_and_fall_with_the_share() {
    let shape = small_model(4, 2, 2, 64);
    let gates: Vec<f32> = (0..8).map(noise).collect();
    let gates = Part::new("by hand").with("gates", Array::new(vec![4, 2], gates).unwrap());
    let profile = Arc::new(Profile::new(&shape).unwrap().with("duo", gates));
    let tokens = 2048;
    let mut before = usize::MAX;
    for streaming in [0usize, 2, 4, 6, 8] {
        let recipe = format!("duo(share={})", streaming as f64 / 8.0);
        let builder = KvCache::builder(shape.clone()).recipe(recipe.as_str()).profile(Arc::clone(&profile));
        let mut cache = builder.build().unwrap();
        let id = cache.create_sequence();
        for part in (0..tokens as u64).collect::<Vec<_>>().chunks(256) {
            feed(&mut cache, id, part, part.len());
        }
        cache.end_prefill(id).unwrap();
        let resident = cache.memory().resident;
        let want = ((8 - streaming) * tokens + streaming * 320) * (64 * 4 + 64 * 4 + 4);
        let share = resident as f64 / want as f64;
        println!("{streaming} of 8 heads stream: {resident} bytes resident, {share:.4} of the formula's");
        assert!((share - 1.0).abs() <= 0.03, "{recipe}: {resident} bytes resident, {want} by the formula");
        assert!(resident < before, "{recipe}: {resident} bytes, {before} with fewer streaming heads");
        before = resident;
    }
}

#[test]
fn without_its_profile_nothing_is_built() {
    for (recipe, part) in
        [("duo", "duo"), ("compress_error+snapkv", "errors"), ("compresskv", "heads"), ("headkv", "heads")]
    {
        let builder = || KvCache::builder(model()).recipe(recipe).budget(Budget::Tokens(100));
        let error = builder().build().unwrap_err();
        assert!(matches!(error, Error::Recipe(RecipeError::Conflict { .. })), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("the part {part} of a profile")), "{text}");
        assert!(text.contains("kvsieve calibrate"), "{text}");

        let empty = builder().profile(Profile::new(&model()).unwrap()).build().unwrap_err().to_string();
        assert!(empty.contains(&format!("no part {part}")) && empty.contains("kvsieve calibrate"), "{empty}");
    }
}

#[test]
fn profiles_of_other_models_are_refused() {
    let build = |shape: ModelShape, recipe: &str, profile: Profile| {
        let builder = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(100)).profile(profile);
        builder.build().map(|_| ())
    };
    let named = |name| model().with_fingerprint(name);
    for recipe in ["duo", "compress_error", "compresskv", "headkv"] {
        let error = build(named("b"), recipe, profile(&named("a"))).unwrap_err();
        assert!(matches!(error, Error::Profile(ProfileError::Model { .. })), "{error:?}");
        build(named("a"), recipe, profile(&named("a"))).unwrap();
        build(model(), recipe, profile(&named("a"))).unwrap();
        let error = build(small_model(LAYERS, 4, 4, 8), recipe, profile(&model())).unwrap_err();
        assert!(
            matches!(error, Error::Profile(ProfileError::Geometry { what: "kv_heads", .. })),
            "{error:?}"
        );
    }
    let part = |array: &str, extents: &[usize], number: f32| {
        let numbers = vec![number; extents.iter().product()];
        Part::new("by hand").with(array, Array::new(extents.to_vec(), numbers).unwrap())
    };
    let with = |name: &str, part| Profile::new(&model()).unwrap().with(name, part);
    let error = build(model(), "duo", with("duo", part("gates", &[LAYERS, 4], 0.1))).unwrap_err();
    assert!(matches!(error, Error::Profile(ProfileError::Extents { .. })), "{error:?}");
    for recipe in ["compresskv", "headkv"] {
        let error = build(model(), recipe, with("heads", part("scores", &[LAYERS, 4], -0.1))).unwrap_err();
        assert!(matches!(error, Error::Profile(ProfileError::Negative { .. })), "{error:?}");
    }
}
