//! The reducer `lococo`: its convolution against the formula, what a cache stores of it, and profiles that do not fit.

use crate::support::*;
use kvsieve::backend::Backend;
use kvsieve::error::{CacheError, PolicyError, ProfileError, RecipeError};
use kvsieve::geometry::{LayerShape, ModelShape, Position};
use kvsieve::plan::{HeadPlan, LayerPlan};
use kvsieve::profile::{Array, Part, Profile};
use kvsieve::recipe::Recipe;
use kvsieve::reduce::Reducer;
use kvsieve::testing::Random;
use kvsieve::testing::layer::LayerCase;
use kvsieve::view::DType;
use kvsieve::{Budget, Error, KvCache, SequenceId};
use std::sync::Arc;

/// A convolution of one layer.
#[derive(Clone)]
struct Kernel {
    channels: usize,
    inputs: usize,
    width: usize,
    /// `[channels, inputs, width]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
    blend: f32,
}

impl Kernel {
    fn random(seed: u64, channels: usize, inputs: usize, width: usize, blend: f32) -> Self {
        let mut random = Random::new(seed);
        let scale = 2.0 / ((inputs * width.min(100)) as f32).sqrt();
        let weight = random.rows(channels * inputs * width, scale, DType::F32);
        Self { channels, inputs, width, weight, bias: random.rows(channels, 0.5, DType::F32), blend }
    }

    /// The same in every layer.
    fn profile(&self, shape: &ModelShape) -> Profile {
        let part = (0..shape.layers()).fold(Part::new("random numbers"), |part, layer| {
            let array = |extents: &[usize], numbers: &[f32]| Array::new(extents.to_vec(), numbers.to_vec());
            let extents = [self.channels, self.inputs, self.width];
            part.with(format!("layers.{layer}.weight"), array(&extents, &self.weight).unwrap())
                .with(format!("layers.{layer}.bias"), array(&[self.channels], &self.bias).unwrap())
                .with(format!("layers.{layer}.blend"), array(&[1], &[self.blend]).unwrap())
        });
        Profile::new(shape).unwrap().with("lococo", part)
    }

    /// The formula for one channel, whose slot is row `own` of `rows`: a weight per row.
    fn weights(&self, channel: usize, own: usize, rows: &[Vec<f32>]) -> Vec<f64> {
        let half = self.width / 2;
        let logits: Vec<f64> = (0..rows.len())
            .map(|i| {
                let mut sum = f64::from(self.bias[channel]);
                for j in 0..self.width {
                    let Some(row) = (i + j).checked_sub(half).and_then(|at| rows.get(at)) else { continue };
                    for (d, x) in row.iter().enumerate() {
                        let weight = self.weight[(channel * self.inputs + d) * self.width + j];
                        sum += f64::from(weight) * f64::from(*x);
                    }
                }
                sum.max(0.0)
            })
            .collect();
        let total: f64 = logits.iter().map(|x| x.exp()).sum();
        let blend = f64::from(self.blend);
        let one = |i: usize| if i == own { 1.0 - blend } else { 0.0 };
        logits.iter().enumerate().map(|(i, x)| one(i) + blend * x.exp() / total).collect()
    }
}

fn bound(term: &str, profile: &Profile, shape: &ModelShape) -> Arc<dyn Reducer> {
    Recipe::parse(term).unwrap().bind(profile, shape).unwrap().reduce.unwrap()
}

#[test]
fn weights_are_those_of_the_formula_on_every_backend() {
    let layer = LayerShape { d_v: 4, ..LayerShape::new(6, 3, 8) };
    let shape = ModelShape::uniform(1, layer.clone()).unwrap();
    // Slots at the end, heads of other lengths, and one that keeps fewer than there are channels.
    let heads = [(400, vec![0, 20, 21, 50, 398, 399]), (11, vec![3, 5, 9, 10]), (3, vec![0, 2])];
    let mixed = [vec![50, 398, 399], vec![9, 10], vec![2]];
    // The widest window is wider than any head, and goes in several blocks.
    for width in [1, 5, 1001] {
        let kernel = Kernel::random(width as u64, 3, 12, width, 0.7);
        let reducer = bound("lococo(window=0,recent=0,sinks=0)", &kernel.profile(&shape), &shape);
        for backend in backends() {
            let mut random = Random::new(7);
            let mut case = LayerCase::new(&*backend, layer.clone(), Vec::new());
            let mut rows: Vec<Vec<Vec<f32>>> = Vec::new();
            for (head, (len, _)) in heads.iter().enumerate() {
                let keys = random.rows(len * 8, 1.0, DType::F32);
                let values = random.rows(len * 4, 1.0, DType::F32);
                case.append(head, &(0..*len as i32).collect::<Vec<_>>(), &keys, &values).unwrap();
                let row = |i: usize| [&keys[i * 8..][..8], &values[i * 4..][..4]].concat();
                rows.push((0..*len).map(row).collect());
            }
            let plan: LayerPlan =
                heads.iter().map(|(len, keep)| HeadPlan::new(*len, keep.clone())).collect::<Vec<_>>().into();
            let merges = reducer.reduce(&case.view(4), &plan).unwrap().merges;
            assert_eq!(merges.len(), 3);
            for (head, merges) in merges.iter().enumerate() {
                let what = format!("width {width}, head {head} on {}", backend.name());
                assert!(merges.keys, "{what}");
                let slots: Vec<u32> = merges.targets.iter().map(|t| t.slot).collect();
                assert_eq!(slots, mixed[head], "{what}");
                let others: Vec<u32> = (0..heads[head].0 as u32)
                    .filter(|slot| !heads[head].1.contains(slot) || slots.contains(slot))
                    .collect();
                let rows: Vec<Vec<f32>> =
                    others.iter().map(|slot| rows[head][*slot as usize].clone()).collect();
                for (channel, (target, sources)) in merges.iter().enumerate() {
                    let own = others.iter().position(|slot| *slot == target.slot).unwrap();
                    let mut got = vec![f32::NAN; others.len()];
                    for (slot, key, value) in sources.iter().map(|s| (s.slot, s.key, s.value)).chain([(
                        target.slot,
                        target.key,
                        target.value,
                    )]) {
                        assert_eq!(key, value, "{what}");
                        got[others.iter().position(|other| *other == slot).unwrap()] = value;
                    }
                    assert_eq!(target.bias, 0.0);
                    let sum: f32 = got.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5, "{what}: weights sum to {sum}");
                    for (got, want) in got.iter().zip(kernel.weights(channel, own, &rows)) {
                        assert!((f64::from(*got) - want).abs() < 1e-5 * (1.0 + want), "{what}: {got} {want}");
                    }
                }
            }
        }
    }
}

/// A cache whose prompt has been read and not been compressed yet.
fn prompt(recipe: &str, profile: Profile, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(model()).recipe(recipe).budget(Budget::Tokens(16)).page_entries(8);
    let mut cache = builder.profile(profile).shared_backend(Arc::clone(backend)).build().unwrap();
    let id = cache.create_sequence();
    feed(&mut cache, id, &(0..40).collect::<Vec<_>>(), 40);
    (cache, id)
}

fn model() -> ModelShape {
    small_model(2, 4, 2, 8)
}

fn kernel(blend: f32) -> Kernel {
    Kernel::random(3, 5, 16, 3, blend)
}

#[test]
fn a_cache_stores_sums_of_what_was_there_before() {
    let term = "random(seed=3)+lococo(window=0,recent=2,sinks=1)";
    for backend in backends() {
        for (stored, allowed) in [("", 1e-5), ("+k=f16+v=f16", 2e-3)] {
            let (mut cache, id) = prompt(&format!("{term}{stored}"), kernel(0.6).profile(&model()), &backend);
            for (layer, plan) in cache.plan(id).unwrap() {
                for (head, plan) in plan.heads.iter().enumerate() {
                    let before = entries(&cache, id, layer, head);
                    let fork = cache.fork(id).unwrap();
                    cache.end_prefill(fork).unwrap();
                    let after = entries(&cache, fork, layer, head);
                    let extents = cache.extents(fork, layer, head).unwrap();
                    cache.drop_sequence(fork).unwrap();
                    assert_eq!((plan.merges.targets.len(), after.len()), (5, 16));
                    let verbatim = |slot: u32| {
                        let remade = plan.merges.targets.iter().any(|t| t.slot == slot);
                        plan.keep.contains(&slot) && !remade
                    };
                    let mixed: Vec<u32> = (0..40).filter(|slot| !verbatim(*slot)).collect();
                    let all = (Position(mixed[0] as i32), Position(mixed[mixed.len() - 1] as i32));
                    for ((slot, entry), extent) in plan.keep.iter().zip(&after).zip(extents) {
                        let what = format!("{stored}, slot {slot}, layer {layer} on {}", backend.name());
                        let old = &before[*slot as usize];
                        assert_eq!((entry.position, entry.bias), (old.position, 0.0), "{what}");
                        let Some((target, sources)) = plan.merges.iter().find(|(t, _)| t.slot == *slot)
                        else {
                            assert_eq!((&entry.key, &entry.value), (&old.key, &old.value), "{what}");
                            assert_eq!(extent, (Position(old.position), Position(old.position)), "{what}");
                            continue;
                        };
                        // Other slots are among the sources, as they were.
                        assert_eq!(sources.len(), mixed.len() - 1);
                        assert!(plan.merges.targets.iter().all(|t| {
                            t.slot == *slot || sources.iter().any(|s| s.slot == t.slot && s.value > 0.0)
                        }));
                        assert_eq!(extent, all, "{what}");
                        let sum = |of: fn(&Entry) -> &[f32], d: usize| -> f64 {
                            let own = f64::from(target.value) * f64::from(of(old)[d]);
                            let term = |s: &kvsieve::plan::Source| {
                                f64::from(s.value) * f64::from(of(&before[s.slot as usize])[d])
                            };
                            own + sources.iter().map(term).sum::<f64>()
                        };
                        for d in 0..8 {
                            for (got, want) in
                                [(entry.key[d], sum(|e| &e.key, d)), (entry.value[d], sum(|e| &e.value, d))]
                            {
                                assert!((f64::from(got) - want).abs() < allowed, "{what}: {got} {want}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn without_a_blend_nothing_changes() {
    for backend in backends() {
        let run = |recipe: &str, blend| {
            let (mut cache, id) = prompt(recipe, kernel(blend).profile(&model()), &backend);
            cache.end_prefill(id).unwrap();
            let heads = [(0, 0), (0, 1), (1, 0), (1, 1)];
            heads.map(|(layer, head)| {
                let rows = entries(&cache, id, layer, head).into_iter().map(|e| (e.position, e.key, e.value));
                let extents = match recipe.contains("lococo") {
                    true => cache.extents(id, layer, head).unwrap(),
                    false => cache.positions(id, layer, head).unwrap().iter().map(|p| (*p, *p)).collect(),
                };
                (rows.collect::<Vec<_>>(), extents)
            })
        };
        let plain = run("snapkv(window=4)", 0.0);
        assert_eq!(run("snapkv(window=4)+lococo(window=4,recent=2)", 0.0), plain, "{}", backend.name());
        assert_ne!(run("snapkv(window=4)+lococo(window=4,recent=2)", 0.01), plain, "{}", backend.name());
    }
}

#[test]
fn slots_are_mixed_again_in_forks_and_not_cut() {
    let recipe = "snapkv(window=4)+lococo(window=4,recent=2)+when=prefill+when=over(slack=2)";
    for backend in backends() {
        let (mut cache, id) = prompt(recipe, kernel(0.5).profile(&model()), &backend);
        cache.end_prefill(id).unwrap();
        let seen = |cache: &KvCache, id| {
            let keys: Vec<Vec<f32>> = entries(cache, id, 0, 0).into_iter().map(|e| e.key).collect();
            (keys, cache.extents(id, 0, 0).unwrap())
        };
        let before = seen(&cache, id);
        let fork = cache.fork(id).unwrap();
        for token in 50..60 {
            feed(&mut cache, fork, &[token], 1);
        }
        assert_eq!(seen(&cache, id), before, "a fork's compaction leaves the other alone");
        let last = |seen: &(Vec<Vec<f32>>, Vec<(Position, Position)>)| {
            seen.1.iter().filter(|(first, last)| first < last).map(|extent| extent.1).max().unwrap()
        };
        let after = seen(&cache, fork);
        assert!(last(&after) > last(&before), "{} {}", last(&after).0, last(&before).0);
        let error = cache.truncate(id, last(&before)).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::SplitsMerge { .. })), "{error}");
        assert_eq!(seen(&cache, id), before);
    }
}

#[test]
fn it_is_bound_to_a_profile_that_fits() {
    let build = |profile: Option<Profile>| {
        let builder = KvCache::builder(model()).recipe("lococo(recent=3)").budget(Budget::Tokens(100));
        match profile {
            Some(profile) => builder.profile(profile),
            None => builder,
        }
        .build()
        .map(|_| ())
    };
    let error = build(None).unwrap_err();
    assert!(matches!(error, Error::Recipe(RecipeError::Conflict { .. })), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("reduce=lococo") && text.contains("the part lococo of a profile"), "{text}");
    assert!(text.contains("kvsieve calibrate"), "{text}");
    let empty = build(Some(Profile::new(&model()).unwrap())).unwrap_err().to_string();
    assert!(empty.contains("no part lococo"), "{empty}");
    let other = kernel(0.5).profile(&model().with_fingerprint("a"));
    let error = Recipe::parse("lococo").unwrap().bind(&other, &model().with_fingerprint("b")).unwrap_err();
    assert!(matches!(error, ProfileError::Model { .. }), "{error:?}");

    let good = kernel(0.5);
    build(Some(good.profile(&model()))).unwrap();
    let recipe = Recipe::parse("lococo(recent=3)").unwrap().bind(&good.profile(&model()), &model()).unwrap();
    assert_eq!(recipe.to_string(), "snapkv+reduce=lococo(recent=3)");
    assert_eq!(recipe.reduce.unwrap().lacks(), None);
    let both = Recipe::parse("kvzap+lococo").unwrap();
    let random = kvsieve::testing::profile(&model(), 5, 3).unwrap();
    let both = both.bind(&random, &model()).unwrap();
    assert_eq!((both.policy.lacks(), both.reduce.unwrap().lacks()), (None, None));

    let refused = |kernel: Kernel| match build(Some(kernel.profile(&model()))).unwrap_err() {
        Error::Profile(error) => error,
        other => panic!("{other:?}"),
    };
    for blend in [-0.125, 1.5] {
        let error = refused(kernel(blend));
        assert!(matches!(&error, ProfileError::Range { value, .. } if *value == blend), "{error:?}");
        let want = format!("array layers.0.blend of part lococo has {blend} at 0: must be 0 ..= 1");
        assert_eq!(error.to_string(), want);
    }
    build(Some(kernel(0.0).profile(&model()))).unwrap();
    build(Some(kernel(1.0).profile(&model()))).unwrap();
    for (inputs, width, want) in [(16, 4, "[any, 16, odd]"), (15, 3, "[any, 16, any]")] {
        let error = refused(Kernel::random(1, 5, inputs, width, 0.5));
        assert!(
            matches!(&error, ProfileError::Extents { got, .. } if *got == [5, inputs, width]),
            "{error:?}"
        );
        assert!(error.to_string().contains(want), "{error}");
    }
    let mut short = good.profile(&model());
    let part = short.part("lococo").unwrap().clone();
    short = short.with("lococo", part.with("layers.1.bias", Array::new(vec![4], vec![0.0; 4]).unwrap()));
    let error = build(Some(short)).unwrap_err().to_string();
    assert!(error.contains("layers.1.bias") && error.contains("must have [5]"), "{error}");

    // Nobody bound it.
    let layer = LayerShape::new(4, 2, 8);
    let backend = kvsieve::Cpu::default();
    let case = LayerCase::new(&backend, layer, Vec::new());
    let plan = LayerPlan::from(vec![HeadPlan::identity(0), HeadPlan::identity(0)]);
    let unbound = Recipe::parse("lococo").unwrap().reduce.unwrap();
    let error = unbound.reduce(&case.view(4), &plan).unwrap_err();
    assert!(matches!(error, PolicyError::Missing { layer: 0, .. }), "{error:?}");
}
