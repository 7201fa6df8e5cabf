//! What every reducer must do, and what mixing entries must not break: exactness where entries are alike, plans that are
//! the same on every backend, forks, removals and truncations.

use crate::support::*;
use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::cache::RemoveMode;
use kvsieve::error::{CacheError, RecipeError};
use kvsieve::geometry::{LayerShape, ModelShape, Position};
use kvsieve::plan::{LayerPlan, Merges};
use kvsieve::policy::LayerView;
use kvsieve::policy::registry::{Build, Registry};
use kvsieve::recipe::Recipe;
use kvsieve::testing::layer::LayerCase;
use kvsieve::testing::{Random, profile};
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Budget, Error, KvCache, SequenceId};
use std::sync::Arc;

/// Every built-in reducer.
fn reducers() -> Vec<&'static str> {
    let registry = Registry::builtin();
    let all: Vec<_> =
        registry.iter().filter(|e| matches!(e.build, Build::Reduce { .. })).map(|e| e.name).collect();
    assert!(all.contains(&"value_merge"));
    all
}

/// Two KV heads of four query heads; keys come in pairs that are nearly alike.
fn case<'a>(backend: &'a dyn Backend, seed: u64, lengths: [usize; 2]) -> LayerCase<'a> {
    let mut random = Random::new(seed);
    let mut case = LayerCase::new(backend, LayerShape::new(4, 2, 8), Vec::new());
    for (head, &len) in lengths.iter().enumerate() {
        let mut keys = random.rows(len * 8, 1.0, DType::F32);
        for i in (1..len).step_by(2) {
            for d in 0..8 {
                keys[i * 8 + d] = keys[(i - 1) * 8 + d] + 0.05 * random.normal();
            }
        }
        let values = random.rows(len * 8, 1.0, DType::F32);
        let positions: Vec<i32> = (0..len as i32).map(|i| 2 * i).collect();
        case.append(head, &positions, &keys, &values).unwrap();
    }
    let next = 2 * lengths[0].max(lengths[1]) as i32;
    case.record(random.rows(4 * 8 * 8, 1.0, DType::F32), (next - 8..next).collect());
    case
}

/// The plan of a recipe, merges included, as a cache makes it.
fn plan(recipe: &str, view: &LayerView<'_>) -> LayerPlan {
    let shape = ModelShape::uniform(1, view.shape.clone()).unwrap();
    let recipe = Recipe::parse(recipe).unwrap().bind(&profile(&shape, 5, 3).unwrap(), &shape).unwrap();
    let mut plan = recipe.policy.plan(view).unwrap();
    let merges = recipe.reduce.unwrap().reduce(view, &plan).unwrap().merges;
    assert_eq!(merges.len(), plan.heads.len());
    plan.heads.iter_mut().zip(merges).for_each(|(head, merges)| head.merges = merges);
    plan.validate("test", 0, view.lengths().into_iter()).unwrap();
    plan
}

#[test]
fn nothing_dropped_is_nothing_merged_and_something_is() {
    let backend = Reference::default();
    for name in reducers() {
        let case = case(&backend, 3, [30, 17]);
        let recipe = format!("snapkv(window=4)+reduce={name}");
        let merged =
            |target| plan(&recipe, &case.view(target)).heads.iter().map(|h| h.merges.clone()).collect();
        let none: Vec<Merges> = merged(30);
        assert!(none.iter().all(Merges::is_empty), "{name}: {none:?}");
        let some: Vec<Merges> = merged(12);
        assert!(some.iter().all(|merges| !merges.is_empty()), "{name} merges nothing");
        let empty: Vec<Merges> = merged(0);
        assert!(empty.iter().all(Merges::is_empty), "{name}: there is nothing to merge into");
    }
}

#[test]
fn every_backend_mixes_the_same() {
    for name in reducers() {
        let recipe = format!("knorm+recent=4+reduce={name}");
        let mut plans = Vec::new();
        for backend in backends() {
            for seed in 0..4 {
                plans.push((backend.name(), seed, plan(&recipe, &case(&*backend, seed, [40, 33]).view(14))));
            }
        }
        let reference: Vec<_> = plans.drain(..4).collect();
        for (backend, seed, plan) in &plans {
            let want = &reference[*seed as usize].2;
            for (got, want) in plan.heads.iter().zip(&want.heads) {
                assert_eq!(got.keep, want.keep);
                let slots = |m: &Merges| -> Vec<(u32, Vec<u32>)> {
                    m.iter().map(|(t, s)| (t.slot, s.iter().map(|s| s.slot).collect())).collect()
                };
                assert_eq!(slots(&got.merges), slots(&want.merges), "{name} on {backend}, seed {seed}");
                let weights = |m: &Merges| -> Vec<f32> {
                    let targets = m.targets.iter().flat_map(|t| [t.key, t.value, t.bias]);
                    targets.chain(m.sources.iter().flat_map(|s| [s.key, s.value])).collect()
                };
                for (got, want) in weights(&got.merges).into_iter().zip(weights(&want.merges)) {
                    assert!(
                        (got - want).abs() < 1e-4 * (1.0 + want.abs()),
                        "{name} on {backend}: {got} {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn weights_of_values_sum_to_one() {
    let backend = Cpu::default();
    let names = [
        "value_merge",
        "value_merge(window=0)",
        "value_merge(mass=no,threshold=0.3)",
        "keepkv(threshold=0.5)",
        "kvmerger",
        "lookm",
        "lookm(mode=average)",
        "lookm(mode=weighted,mass=yes)",
        "d2o",
        "lococo",
    ];
    for name in names {
        let plan = plan(&format!("snapkv(window=4)+reduce={name}"), &case(&backend, 5, [64, 64]).view(20));
        for (target, sources) in plan.heads.iter().flat_map(|head| head.merges.iter()) {
            let sum = target.value + sources.iter().map(|s| s.value).sum::<f32>();
            assert!((sum - 1.0).abs() < 1e-5, "{name}: {target:?} {sources:?}");
        }
        if plan.heads[0].merges.keys {
            for (target, sources) in plan.heads.iter().flat_map(|head| head.merges.iter()) {
                assert!(target.key == target.value && sources.iter().all(|s| s.key == s.value), "{name}");
            }
        }
    }
}

/// Feeds tokens of four kinds, all of a kind alike in key and value; queries differ.
fn feed_kinds(cache: &mut KvCache, id: SequenceId, tokens: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let kinds = Random::new(99).rows(4 * 2 * 2 * 8, 1.0, DType::F32);
    let row = |token: usize, side: usize| {
        let at = (token % 4 * 2 + side) * 16;
        kinds[at..at + 16].to_vec()
    };
    let start = cache.next_position(id).unwrap().0 as usize;
    let (k, v): (Vec<_>, Vec<_>) = (start..start + tokens).map(|t| (row(t, 0), row(t, 1))).unzip();
    let (k, v) = (k.concat(), v.concat());
    let q = random.rows(tokens * 4 * 8, 1.0, DType::F32);
    let mut out = vec![f32::NAN; tokens * 4 * 8];
    let mut step = cache.begin(id, tokens).unwrap();
    let view = |x, heads| TensorView::token_major(x, tokens, heads, 8).unwrap();
    let target = TensorViewMut::token_major(&mut out[..], tokens, 4, 8).unwrap();
    step.attend(0, view(&q[..], 4), view(&k[..], 2), view(&v[..], 2), target).unwrap();
    step.commit(tokens).unwrap();
    out
}

#[test]
fn entries_that_are_alike_merge_without_a_trace() {
    let shape = ModelShape::uniform(1, LayerShape::new(4, 2, 8)).unwrap();
    for backend in backends() {
        let run = |recipe: &str, budget| {
            let builder = KvCache::builder(shape.clone()).recipe(recipe).shared_backend(Arc::clone(&backend));
            let mut cache = match budget {
                Some(tokens) => builder.budget(Budget::Tokens(tokens)).build().unwrap(),
                None => builder.build().unwrap(),
            };
            let id = cache.create_sequence();
            feed_kinds(&mut cache, id, 48, 1);
            cache.end_prefill(id).unwrap();
            let stored = cache.stored(id, 0).unwrap()[0].0;
            (stored, (2..6).flat_map(|seed| feed_kinds(&mut cache, id, 1, seed)).collect::<Vec<_>>())
        };
        let (all, full) = run("full", None);
        // The last 12 stay; of the 36 others some of every kind do. One query: entries of a kind weigh the same.
        let kept = "random(seed=3)+sinks=4+recent=12";
        let (some, merged) = run(&format!("{kept}+value_merge(window=1)"), Some(20));
        let (_, dropped) = run(kept, Some(20));
        assert_eq!((all, some), (48, 20));
        let distance = |other: &[f32]| {
            let squares = |it: &mut dyn Iterator<Item = f32>| it.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let off = squares(&mut full.iter().zip(other).map(|(a, b)| a - b));
            (off / squares(&mut full.iter().copied())).sqrt()
        };
        assert!(distance(&merged) < 1e-5, "{}: {:.2e}", backend.name(), distance(&merged));
        assert!(distance(&dropped) > 1e-2, "{}: dropping alone is as good", backend.name());
    }
}

#[test]
fn cam_spreads_a_value_as_far_as_it_was_looked_at() {
    let backend = Reference::default();
    let weights = [vec![vec![0.05, 0.3, 0.05, 0.2, 0.1, 0.3]]];
    let case = LayerCase::attention(&backend, 1, Vec::new(), &weights).unwrap();
    let mut plan = LayerPlan::from(vec![kvsieve::plan::HeadPlan::new(6, vec![0, 3, 4, 5])]);
    let cam = |spread| Recipe::parse(&format!("cam(window=1,spread={spread})")).unwrap().reduce.unwrap();
    let mixed = |plan: &LayerPlan, spread| -> Vec<(u32, Vec<(u32, f32)>)> {
        let merges = cam(spread).reduce(&case.view(4), plan).unwrap().merges.remove(0);
        merges.iter().map(|(t, s)| (t.slot, s.iter().map(|s| (s.slot, s.value)).collect())).collect()
    };
    // Of the two behind entry 1 the second stays and drew less; entry 2 drew a third of what the two behind it did.
    let want = [(3, vec![(1, 0.5), (2, 1.0 / 6.0)]), (4, vec![(2, 1.0 / 6.0)])];
    let got = mixed(&plan, 2);
    assert_eq!(got.len(), want.len());
    for ((slot, sources), (want_slot, want)) in got.iter().zip(&want) {
        assert_eq!(slot, want_slot);
        assert_eq!(sources.len(), want.len());
        assert!(sources.iter().zip(want).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-3), "{got:?}");
    }
    // Nothing stays behind the last one.
    plan.heads[0].keep = vec![0, 1, 2];
    assert!(mixed(&plan, 2).is_empty());
    // Drawn: all of a value or nothing of it, the same each time.
    plan.heads[0].keep = vec![3, 4, 5];
    let drawn = |seed| {
        let recipe = format!("cam(window=1,spread=3,draw=bernoulli,seed={seed})");
        let merges =
            Recipe::parse(&recipe).unwrap().reduce.unwrap().reduce(&case.view(3), &plan).unwrap().merges;
        merges[0].iter().next().map_or(Vec::new(), |(_, s)| s.iter().map(|s| (s.slot, s.value)).collect())
    };
    let draws: Vec<Vec<(u32, f32)>> = (0..40).map(drawn).collect();
    assert!(draws.iter().flatten().all(|&(_, value)| (value - 1.0 / 3.0).abs() < 1e-6), "{draws:?}");
    let times = |slot| draws.iter().filter(|d| d.iter().any(|s| s.0 == slot)).count();
    assert!(times(1) == 40 && (1..30).contains(&times(0)), "{} {}", times(0), times(1));
    assert_eq!(drawn(7), drawn(7));
}

#[test]
fn kvmerger_makes_runs_of_neighbours_one() {
    let backend = Reference::default();
    let d = 4;
    let mut case = LayerCase::new(&backend, LayerShape::new(1, 1, d), Vec::new());
    // Two runs: 0 to 3, the last of them farther off, and 4 to 5; 6 is alone.
    let keys: Vec<f32> = [
        [1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [1.0, 0.4, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0, 0.1],
        [0.0, -1.0, 0.0, 0.0],
    ]
    .concat();
    case.append(0, &(0..7).collect::<Vec<_>>(), &keys, &keys).unwrap();
    let plan = LayerPlan::from(vec![kvsieve::plan::HeadPlan::new(7, vec![1, 6])]);
    let reducer = Recipe::parse("kvmerger(window=0)").unwrap().reduce.unwrap();
    let merges = reducer.reduce(&case.view(2), &plan).unwrap().merges.remove(0);
    // The run without a kept entry is dropped.
    let (target, sources) = merges.iter().next().unwrap();
    assert_eq!((merges.targets.len(), target.slot), (1, 1));
    assert_eq!(sources.iter().map(|s| s.slot).collect::<Vec<_>>(), [0, 2, 3]);
    // Distances 0, 0 and 0.4 in a set of four: σ² = 0.005, so the last weighs exp(−16).
    let total = 3.0 + (-16.0f32).exp();
    for (source, g) in sources.iter().zip([1.0, 1.0, (-16.0f32).exp()]) {
        assert!((source.key - g / total).abs() < 1e-6, "{source:?}");
    }
    assert!((target.bias - total.ln()).abs() < 1e-6);
}

fn merging(recipe: &str, backend: Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let shape = small_model(2, 4, 2, 8);
    let builder = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(16)).page_entries(8);
    let mut cache = builder.shared_backend(backend).build().unwrap();
    let id = cache.create_sequence();
    feed(&mut cache, id, &(0..40).collect::<Vec<_>>(), 40);
    cache.end_prefill(id).unwrap();
    (cache, id)
}

/// Entries with mass and extents, of every head.
type Seen = Vec<(Vec<f32>, Vec<f32>, Vec<(Position, Position)>)>;

fn seen(cache: &KvCache, id: SequenceId) -> Seen {
    let heads = (0..2).flat_map(|layer| (0..2).map(move |head| (layer, head)));
    let of = |(layer, head)| {
        let values = entries(cache, id, layer, head).into_iter().flat_map(|e| e.value).collect();
        (values, cache.biases(id, layer, head).unwrap(), cache.extents(id, layer, head).unwrap())
    };
    heads.map(of).collect()
}

#[test]
fn mass_and_positions_survive_forks_appends_and_truncation_behind_the_merge() {
    for backend in backends() {
        let (mut cache, id) = merging("snapkv(window=4)+value_merge+k=f16+v=f16", backend);
        let before = seen(&cache, id);
        assert!(before.iter().all(|(_, biases, _)| biases.iter().any(|&b| b > 0.0)), "{before:?}");
        assert!(before.iter().all(|(_, _, extents)| extents.iter().any(|(first, last)| first < last)));
        let fork = cache.fork(id).unwrap();
        feed(&mut cache, fork, &[90, 91, 92], 3);
        let grown = seen(&cache, fork);
        for (grown, before) in grown.iter().zip(&before) {
            assert_eq!(grown.0[..before.0.len()], before.0);
            assert_eq!(grown.1[..16], before.1);
            assert_eq!(grown.1[16..], [0.0; 3]);
            assert_eq!(grown.2[..16], before.2);
            assert_eq!(grown.2[16..], [40, 41, 42].map(|p| (Position(p), Position(p))));
        }
        cache.truncate(fork, Position(40)).unwrap();
        assert_eq!(seen(&cache, fork), before);
        assert_eq!(seen(&cache, id), before);
    }
}

#[test]
fn what_speaks_for_others_is_not_cut() {
    let (mut cache, id) = merging("snapkv(window=4)+value_merge", Arc::new(Cpu::default()));
    let before = seen(&cache, id);
    let (first, last) = *before[0].2.iter().find(|(first, last)| first < last).unwrap();
    let error = cache.truncate(id, last).unwrap_err();
    let Error::Cache(CacheError::SplitsMerge { start, end: 40, .. }) = &error else { panic!("{error}") };
    assert_eq!(*start, last.0);
    assert!(error.to_string().contains("were merged") && error.to_string().contains("fork"), "{error}");
    for mode in [RemoveMode::Keep, RemoveMode::Renumber] {
        let error = cache.remove(id, first..Position(first.0 + 1), mode).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::SplitsMerge { .. })), "{error}");
    }
    assert_eq!(seen(&cache, id), before, "a refused call changes nothing");
    // Everything goes, and so do entries that speak for themselves.
    let fork = cache.fork(id).unwrap();
    cache.remove(fork, Position(0)..Position(40), RemoveMode::Keep).unwrap();
    assert!(cache.positions(fork, 0, 0).unwrap().is_empty());
    feed(&mut cache, id, &[70, 71, 72], 3);
    cache.remove(id, Position(40)..Position(42), RemoveMode::Renumber).unwrap();
    let after = seen(&cache, id);
    assert_eq!(after[0].2[..16], before[0].2[..]);
    assert_eq!(after[0].2[16..], [(Position(40), Position(40))]);
}

#[test]
fn what_an_entry_speaks_for_is_renumbered_with_it() {
    let recipe = "snapkv(window=4)+value_merge+positions=renumber";
    let (cache, id) = merging(recipe, Arc::new(Cpu::default()));
    for (_, _, extents) in seen(&cache, id) {
        assert!(extents.iter().any(|(first, last)| first < last));
        for (slot, (first, last)) in extents.into_iter().enumerate() {
            let slot = slot as i32;
            assert!(first.0 <= slot && slot <= last.0 && last.0 < 16, "{first:?} {slot} {last:?}");
        }
    }
}

#[test]
fn merging_again_joins_what_was_merged() {
    let (mut cache, id) =
        merging("knorm+value_merge(window=0)+when=prefill+when=over(slack=0)", Arc::new(Cpu::default()));
    let before = seen(&cache, id);
    let widest = |seen: &Seen| {
        let spans = seen.iter().flat_map(|(_, _, extents)| extents.iter().map(|(a, b)| b.0 - a.0));
        spans.max().unwrap()
    };
    for token in 50..90 {
        feed(&mut cache, id, &[token], 1);
    }
    let after = seen(&cache, id);
    assert!(after.iter().all(|(_, _, extents)| extents.len() == 16));
    assert!(widest(&after) > widest(&before), "{} {}", widest(&after), widest(&before));
}

#[test]
fn what_a_reducer_remembers_is_there_at_the_next_compaction_and_in_forks() {
    let run = |recipe: &str, forked: bool| {
        let (mut cache, mut id) =
            merging(&format!("{recipe}+when=prefill+when=over(slack=0)"), Arc::new(Cpu::default()));
        if forked {
            id = cache.fork(id).unwrap();
        }
        for token in 50..80 {
            feed(&mut cache, id, &[token], 1);
        }
        seen(&cache, id)
    };
    // Of the threshold's last value all, or nothing. Forgotten, it would be the mean cosine in both.
    let remembers = run("knorm+d2o(alpha=1,beta=0)", false);
    assert_ne!(remembers, run("knorm+d2o(alpha=0,beta=1)", false));
    assert_eq!(remembers, run("knorm+d2o(alpha=1,beta=0)", true));
}

#[test]
fn marked_entries_go_first_and_forks_keep_their_marks() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        let run = |recipe: &str, marked: bool| {
            let builder = KvCache::builder(shape.clone()).recipe(recipe).budget(Budget::Tokens(16));
            let mut cache = builder.shared_backend(Arc::clone(&backend)).page_entries(8).build().unwrap();
            let id = cache.create_sequence();
            feed(&mut cache, id, &(0..30).collect::<Vec<_>>(), 30);
            if marked {
                cache.mark(id, Position(4)..Position(24)).unwrap();
            }
            let id = cache.fork(id).unwrap();
            feed(&mut cache, id, &(30..40).collect::<Vec<_>>(), 10);
            cache.end_prefill(id).unwrap();
            plain(&cache.positions(id, 1, 1).unwrap())
        };
        let image = |kept: &[i32]| kept.iter().filter(|p| (4..24).contains(*p)).count();
        for allocator in ["", "+adakv"] {
            let recipe = format!("snapkv(window=4){allocator}+lookm+marked=last");
            let (kept, without) = (run(&recipe, true), run(&recipe, false));
            // Twenty are no image's: with a budget of sixteen none of the image stays.
            assert_eq!(image(&kept), 0, "{recipe} on {}: {kept:?}", backend.name());
            assert!(image(&without) > 0);
            let parsed = Recipe::parse(&recipe).unwrap().to_string();
            assert!(parsed.contains("+marked=last+reduce=lookm"), "{parsed}");
        }
        let scored = |marked| image(&run("knorm+sinks=4+recent=8+marked=last", marked));
        assert!(scored(true) == 0 && scored(false) > 0);
    }
    let mut cache = KvCache::builder(shape).recipe("knorm").budget(Budget::Tokens(16)).build().unwrap();
    let id = cache.create_sequence();
    feed(&mut cache, id, &[1, 2, 3], 3);
    let error = cache.mark(id, Position(0)..Position(1)).unwrap_err().to_string();
    assert!(error.contains("marked=last"), "{error}");
    let error = cache.mark(id, Position(2)..Position(9)).unwrap_err();
    assert!(matches!(error, Error::Cache(CacheError::PositionRange { .. })), "{error}");
    let whole = Recipe::parse("full+marked=last").unwrap_err().to_string();
    assert!(whole.contains("marked"), "{whole}");
}

#[test]
fn a_reducer_needs_something_that_leaves() {
    for name in reducers() {
        let Err(RecipeError::Conflict { what, change, .. }) = Recipe::parse(&format!("full+reduce={name}"))
        else {
            panic!("full+reduce={name} was taken");
        };
        assert_eq!(what, format!("reduce={name}"));
        assert!(change.contains("snapkv"));
        let alone = Recipe::parse(name).unwrap();
        assert_eq!(alone.to_string(), format!("snapkv+reduce={name}"));
    }
    let unknown = Recipe::parse("snapkv+reduce=h2o").unwrap_err().to_string();
    assert!(unknown.contains("reducer") && unknown.contains("value_merge"), "{unknown}");
}
