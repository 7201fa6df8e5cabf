//! The cache against a host that remembers everything: relativity, fingerprints, rollback, forks, windows,
//! batches, partial attention, shared layers.

use crate::support::*;
use kvsieve::cache::{PartialWorkspace, RemoveMode};
use kvsieve::error::{CacheError, RecipeError};
use kvsieve::geometry::{LayerShape, ModelShape, Position};
use kvsieve::testing::profile;
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Recipes of every kind of policy, allocator, position mode and storage type.
const RECIPES: &[&str] = &[
    "full",
    "full+k=f16+v=bf16",
    "streaming+positions=keep",
    "streaming(sinks=2)+positions=renumber",
    "h2o",
    "h2o(norm=visibility,agg=max)",
    "scissorhands(history=40)",
    "tova",
    "snapkv(window=8,kernel=3)+when=chunk+when=over(slack=3)",
    "snapkv(window=8,pool=max)+when=every(n=5)+k=f16",
    "snapkv(window=8)+adakv+when=chunk+when=over(slack=4)",
    "snapkv(window=4)+pyramid(beta=4)+when=chunk+when=over(slack=5)",
    "knorm+when=chunk+when=over(slack=2)+v=f16",
    "random(seed=7)+when=chunk+when=over(slack=0)",
];

/// Recipes whose entries take up others, so that what is stored is no single token's.
const MERGING: &[&str] = &[
    "snapkv(window=8,kernel=3)+reduce=value_merge+when=chunk+when=every(n=5)",
    "snapkv(window=8,kernel=3)+value_merge(window=8)+when=chunk+when=over(slack=3)+k=f16+v=bf16",
    "h2o+value_merge(window=0,threshold=0.2,fraction=0.5)",
    "knorm+value_merge(window=4,mass=no)+when=chunk+when=over(slack=2)+positions=renumber",
    "snapkv(window=4)+keepkv(window=4,threshold=0.2)+when=chunk+when=over(slack=3)",
    "snapkv(window=8)+kvmerger(threshold=0.1)+when=chunk+when=over(slack=3)+k=f16",
    "h2o+lookm(mode=average,mass=yes)+when=chunk+when=over(slack=4)",
    "streaming(sinks=2)+cam(window=4,spread=3)+when=chunk+when=over(slack=2)",
    "tova+d2o",
    "snapkv(window=8)+lococo(window=8,recent=2,sinks=1)+when=chunk+when=over(slack=3)+k=f16",
    "knorm+lococo(recent=2)+k=int8+v=int4(center,hadamard)+exact=f16(sinks=2,tail=0)",
    "tova+adakv+value_merge(window=4)+k=int8+v=int4(center,hadamard)+exact=f16(sinks=2,tail=0)",
];

fn build(shape: &ModelShape, recipe: &str, budget: usize, backend: &Arc<dyn Backend>) -> KvCache {
    KvCache::builder(shape.clone())
        .recipe(recipe)
        .budget(Budget::Tokens(budget))
        .profile(profile(shape, 5, 3).unwrap())
        .shared_backend(Arc::clone(backend))
        .page_entries(8)
        .build()
        .unwrap_or_else(|e| panic!("{recipe}: {e}"))
}

#[test]
fn relativity_every_recipe_chunking_and_backend() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        // Merging is of a compaction, whatever the chunks before it.
        let all = RECIPES.iter().map(|recipe| (recipe, &[1, 7, 40][..]));
        for (recipe, chunks) in all.chain(MERGING.iter().map(|recipe| (recipe, &[7][..]))) {
            for &chunk in chunks {
                let what = format!("{recipe} on {} in chunks of {chunk}", backend.name());
                let mut cache = build(&shape, recipe, 16, &backend);
                let id = cache.create_sequence();
                let tokens: Vec<u64> = (0..40).collect();
                for part in tokens.chunks(chunk) {
                    feed_all_checked(&mut cache, id, part, &what);
                }
                cache.end_prefill(id).unwrap();
                for t in 40..52 {
                    feed_all_checked(&mut cache, id, &[t], &what);
                }
                let stats = cache.stats(id).unwrap();
                if *recipe == "full" {
                    assert_eq!(stats.total().entries, 52 * 4);
                } else if !recipe.starts_with("full") {
                    assert!(stats.total().dropped > 0, "{what}: nothing was dropped");
                }
            }
        }
    }
}

#[test]
fn budgets_hold_in_prefill_and_decode() {
    let shape = small_model(3, 4, 2, 8);
    for backend in backends() {
        for recipe in RECIPES
            .iter()
            .filter(|r| r.contains("when=chunk") || r.starts_with("h2o") || r.starts_with("tova"))
        {
            let mut cache = build(&shape, recipe, 16, &backend);
            let id = cache.create_sequence();
            for chunk in (0..60u64).collect::<Vec<_>>().chunks(12) {
                feed(&mut cache, id, chunk, chunk.len());
            }
            cache.end_prefill(id).unwrap();
            let per_layer: usize = 16 * 2;
            for layer in &cache.stats(id).unwrap().layers {
                if recipe.contains("pyramid") {
                    continue; // layers differ by design; the sum is checked below
                }
                assert!(
                    layer.entries <= per_layer,
                    "{recipe}: layer {} keeps {}",
                    layer.layer,
                    layer.entries
                );
            }
            assert!(cache.stats(id).unwrap().total().entries <= 3 * per_layer, "{recipe}");
        }
    }
}

#[test]
fn fingerprints_survive_interior_evictions() {
    // Values are never rotated, so a value names its token; the key next to it must un-rotate to that
    // token's key.
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        for recipe in RECIPES {
            let mut cache = build(&shape, recipe, 12, &backend);
            let id = cache.create_sequence();
            for chunk in (0..50u64).collect::<Vec<_>>().chunks(9) {
                feed(&mut cache, id, chunk, chunk.len());
            }
            cache.end_prefill(id).unwrap();
            for t in 50..70 {
                feed(&mut cache, id, &[t], 1);
            }
            let loose = if recipe.contains("f16") { 4e-3 } else { 2e-5 };
            for layer in 0..2 {
                for head in 0..2 {
                    let mut last = -1;
                    for e in entries(&cache, id, layer, head) {
                        assert!(e.position > last, "{recipe}: positions ascend");
                        last = e.position;
                        let token = (0..70u64)
                            .find(|&t| {
                                row(Kind::Value, t, layer, head, 8)
                                    .iter()
                                    .zip(&e.value)
                                    .all(|(a, b)| (a - b).abs() < 8e-3)
                            })
                            .unwrap_or_else(|| panic!("{recipe}: a value that no token had"));
                        let mut key = e.key.clone();
                        rotate(shape.layer(layer).rotary.as_ref().unwrap(), &mut key, -e.position);
                        let want = row(Kind::Key, token, layer, head, 8);
                        let worst = key.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(
                            worst < loose,
                            "{recipe} on {}: token {token} off by {worst}",
                            backend.name()
                        );
                        if !recipe.contains("renumber") {
                            assert_eq!(e.position, token as i32, "{recipe}: positions are kept");
                        }
                    }
                }
            }
        }
    }
}

/// Everything observable of a sequence, bit for bit.
fn snapshot(cache: &KvCache, id: SequenceId) -> Vec<(i32, Vec<u32>)> {
    let mut all = Vec::new();
    for layer in 0..cache.shape().layers() {
        for head in 0..cache.shape().layer(layer).kv_heads {
            for e in entries(cache, id, layer, head) {
                all.push((e.position, e.key.iter().chain(&e.value).map(|x| x.to_bits()).collect()));
            }
        }
        if let Ok(Some(scores)) = cache.scores(id, layer) {
            all.push((-1, scores.values.iter().map(|x| x.to_bits()).collect()));
        }
    }
    all.push((cache.next_position(id).unwrap().0, vec![]));
    all
}

#[test]
fn rollback_equals_never_appended() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        for recipe in RECIPES {
            let run = |disturb: bool| {
                let mut cache = build(&shape, recipe, 16, &backend);
                let id = cache.create_sequence();
                feed(&mut cache, id, &(0..30).collect::<Vec<_>>(), 30);
                cache.end_prefill(id).unwrap();
                for t in 30..36 {
                    if disturb {
                        // Dropped without commit, committed with nothing, and failed half-way.
                        let model = cache.shape().clone();
                        let mut step = cache.begin(id, 5).unwrap();
                        let start = step.lanes().next().unwrap().1.0;
                        feed_layer(&mut step, &model, 0, &[90, 91, 92, 93, 94], start);
                        drop(step);
                        feed(&mut cache, id, &[95, 96, 97], 0);
                    }
                    feed(&mut cache, id, &[t], 1);
                }
                snapshot(&cache, id)
            };
            assert_eq!(run(false), run(true), "{recipe} on {}", backend.name());
        }
    }
}

#[test]
fn partial_acceptance_equals_feeding_the_accepted() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        for recipe in RECIPES {
            let mut speculative = build(&shape, recipe, 16, &backend);
            let mut plain = build(&shape, recipe, 16, &backend);
            let (a, b) = (speculative.create_sequence(), plain.create_sequence());
            feed(&mut speculative, a, &(0..30).collect::<Vec<_>>(), 30);
            feed(&mut plain, b, &(0..30).collect::<Vec<_>>(), 30);
            feed(&mut speculative, a, &[30, 31, 32, 80, 81], 3);
            feed(&mut plain, b, &[30, 31, 32], 3);
            let (x, y) = (snapshot(&speculative, a), snapshot(&plain, b));
            assert_eq!(x.len(), y.len(), "{recipe}");
            for (x, y) in x.iter().zip(&y) {
                assert_eq!(x.0, y.0, "{recipe}");
                // Masses are summed in another order, so scores agree to rounding and rows exactly.
                for (x, y) in x.1.iter().zip(&y.1) {
                    let (x, y) = (f32::from_bits(*x), f32::from_bits(*y));
                    assert!(x == y || (x - y).abs() <= 1e-5 * y.abs().max(1e-3), "{recipe}: {x} against {y}");
                }
            }
        }
    }
}

#[test]
fn forks_are_isolated_and_share_pages() {
    let shape = small_model(2, 4, 2, 8);
    for backend in own_backends() {
        for recipe in RECIPES {
            let mut cache = build(&shape, recipe, 16, &backend);
            let parent = cache.create_sequence();
            feed(&mut cache, parent, &(0..29).collect::<Vec<_>>(), 29);
            cache.end_prefill(parent).unwrap();
            let resident = cache.memory().resident;
            let before = snapshot(&cache, parent);
            let child = cache.fork(parent).unwrap();
            assert_eq!(snapshot(&cache, child), before);
            assert!(cache.memory().resident < resident + resident / 2, "{recipe}: a fork copies no pages");
            for t in 60..75 {
                feed(&mut cache, child, &[t], 1);
            }
            assert_eq!(snapshot(&cache, parent), before, "{recipe}: the child's tokens changed the parent");
            let of_child = snapshot(&cache, child);
            for t in 40..52 {
                feed(&mut cache, parent, &[t], 1);
            }
            assert_eq!(snapshot(&cache, child), of_child, "{recipe}: the parent's tokens changed the child");
            cache.drop_sequence(parent).unwrap();
            assert_eq!(snapshot(&cache, child), of_child);
            cache.drop_sequence(child).unwrap();
            assert_eq!(cache.memory().resident, 0, "{recipe}: dropped sequences leave nothing");
            assert!(matches!(cache.next_position(child), Err(CacheError::NoSequence(_))));
        }
        assert_eq!(backend.memory().resident, 0, "all pages went back");
    }
}

#[test]
fn windows_caps_sinks_and_shared_layers() {
    let mut plain = LayerShape::new(6, 2, 10);
    plain.d_v = 7;
    plain.softcap = Some(5.0);
    let mut windowed = plain.clone();
    windowed.window = Some(6);
    windowed.softcap = None;
    windowed.sink_logits = Some(vec![0.5, -1.0, 2.0, f32::NEG_INFINITY, 0.0, 1.5]);
    let mut shared = plain.clone();
    shared.shared_with = Some(0);
    shared.scale = 0.7;
    let shape = ModelShape::new(vec![plain, windowed, shared]).unwrap();
    for backend in backends() {
        for recipe in ["full", "snapkv(window=4,kernel=3)+when=chunk+when=over(slack=2)"] {
            let mut cache = build(&shape, recipe, 12, &backend);
            let id = cache.create_sequence();
            // Layer 2 has no rows of its own: its dense check reads the entries of layer 0.
            let mut fed = 0u64;
            for n in [5, 9, 1, 1, 3, 1] {
                let tokens: Vec<u64> = (fed..fed + n).collect();
                fed += n;
                if n == 1 {
                    cache.end_prefill(id).unwrap();
                }
                let start = cache.next_position(id).unwrap().0;
                let before: Vec<Vec<Vec<Entry>>> =
                    (0..3).map(|l| (0..2).map(|h| entries(&cache, id, l, h)).collect()).collect();
                let outs = feed(&mut cache, id, &tokens, tokens.len());
                for layer in 0..3 {
                    let (l, owner) = (shape.layer(layer), shape.owner(layer));
                    for h in 0..6 {
                        let mut all = before[layer][h / 3].clone();
                        all.extend(tokens.iter().enumerate().map(|(i, &t)| Entry {
                            bias: 0.0,
                            position: start + i as i32,
                            key: placed(Kind::Key, l, t, owner, h / 3, start + i as i32),
                            value: placed(Kind::Value, l, t, owner, h / 3, start + i as i32),
                        }));
                        for (i, &t) in tokens.iter().enumerate() {
                            let query = placed(Kind::Query, l, t, layer, h, start + i as i32);
                            let want = dense(l, h, &query, start + i as i32, &all);
                            let at = (i * 6 + h) * 7;
                            let error = distance(&outs[layer][at..at + 7], &want);
                            assert!(error < TOLERANCE, "{recipe}: layer {layer} head {h}: {error:e}");
                        }
                    }
                }
            }
            if recipe != "full" {
                assert!(cache.stored(id, 1).unwrap()[0].0 <= 6 + 3, "what left the window was dropped");
            }
        }
    }
}

#[test]
fn batches_equal_single_sequences() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        for recipe in ["full", "h2o", "scissorhands(history=16)", "snapkv(window=4)+when=chunk"] {
            let mut cache = build(&shape, recipe, 12, &backend);
            // 18 lanes: more than the kernel takes at once.
            let ids: Vec<SequenceId> = (0..18).map(|_| cache.create_sequence()).collect();
            let mut single = build(&shape, recipe, 12, &backend);
            for round in 0..3u64 {
                let batch: Vec<(SequenceId, usize)> =
                    ids.iter().enumerate().map(|(i, &id)| (id, 1 + (i + round as usize) % 5)).collect();
                let total: usize = batch.iter().map(|b| b.1).sum();
                let content = |lane: usize, i: usize| 1000 * lane as u64 + 10 * round + i as u64;
                let starts: Vec<i32> = ids.iter().map(|&id| cache.next_position(id).unwrap().0).collect();
                let mut step = cache.begin_batch(&batch).unwrap();
                assert_eq!(step.tokens(), total);
                for layer in 0..2 {
                    let l = shape.layer(layer).clone();
                    let build = |kind, heads: usize| -> Vec<f32> {
                        let mut rows = Vec::new();
                        for (lane, &(_, n)) in batch.iter().enumerate() {
                            for i in 0..n {
                                for h in 0..heads {
                                    rows.extend(placed(
                                        kind,
                                        &l,
                                        content(lane, i),
                                        layer,
                                        h,
                                        starts[lane] + i as i32,
                                    ));
                                }
                            }
                        }
                        rows
                    };
                    let (q, k, v) = (build(Kind::Query, 4), build(Kind::Key, 2), build(Kind::Value, 2));
                    let mut out = vec![f32::NAN; total * 4 * 8];
                    step.attend(
                        layer,
                        TensorView::token_major(&q[..], total, 4, 8).unwrap(),
                        TensorView::token_major(&k[..], total, 2, 8).unwrap(),
                        TensorView::token_major(&v[..], total, 2, 8).unwrap(),
                        TensorViewMut::token_major(&mut out[..], total, 4, 8).unwrap(),
                    )
                    .unwrap();
                    assert!(out.iter().all(|x| x.is_finite()));
                }
                let accepted: Vec<usize> = batch.iter().map(|b| b.1).collect();
                step.commit_lanes(&accepted).unwrap();
            }
            for (lane, &batched) in ids.iter().enumerate() {
                let id = single.create_sequence();
                for round in 0..3u64 {
                    let n = 1 + (lane + round as usize) % 5;
                    let tokens: Vec<u64> =
                        (0..n).map(|i| 1000 * lane as u64 + 10 * round + i as u64).collect();
                    feed(&mut single, id, &tokens, n);
                }
                assert_eq!(snapshot(&cache, batched), snapshot(&single, id), "{recipe}: lane {lane}");
            }
        }
    }
}

#[test]
fn partial_attention_from_the_hosts_threads() {
    let shape = small_model(1, 6, 2, 8);
    for backend in backends() {
        for recipe in ["full", "h2o"] {
            let mut whole = build(&shape, recipe, 24, &backend);
            let mut parts = build(&shape, recipe, 24, &backend);
            let (a, b) = (whole.create_sequence(), parts.create_sequence());
            feed(&mut whole, a, &(0..40).collect::<Vec<_>>(), 40);
            feed(&mut parts, b, &(0..40).collect::<Vec<_>>(), 40);
            let want = feed(&mut whole, a, &[40, 41, 42], 3);
            let l = shape.layer(0);
            let build = |kind, heads: usize| -> Vec<f32> {
                (40..43u64)
                    .flat_map(|t| (0..heads).flat_map(move |h| placed(kind, l, t, 0, h, t as i32)))
                    .collect()
            };
            let start = parts.next_position(b).unwrap().0;
            assert_eq!(start, 40);
            let (q, k, v) = (build(Kind::Query, 6), build(Kind::Key, 2), build(Kind::Value, 2));
            let q = TensorView::token_major(&q[..], 3, 6, 8).unwrap();
            let mut step = parts.begin(b, 3).unwrap();
            step.append(
                0,
                TensorView::token_major(&k[..], 3, 2, 8).unwrap(),
                TensorView::token_major(&v[..], 3, 2, 8).unwrap(),
            )
            .unwrap();
            let nth = 3;
            let (mut outs, mut lses) = (vec![f32::NAN; nth * 6 * 3 * 8], vec![f32::NAN; nth * 6 * 3]);
            let shared = &step;
            std::thread::scope(|scope| {
                for (ith, (out, lse)) in outs.chunks_mut(6 * 3 * 8).zip(lses.chunks_mut(6 * 3)).enumerate() {
                    scope.spawn(move || {
                        let mut workspace = PartialWorkspace::default();
                        shared.attend_partial(0, q, ith, nth, &mut workspace, out, lse).unwrap();
                    });
                }
            });
            let mut out = vec![f32::NAN; 3 * 6 * 8];
            step.merge_partials(
                0,
                q,
                nth,
                &outs,
                &lses,
                TensorViewMut::token_major(&mut out[..], 3, 6, 8).unwrap(),
            )
            .unwrap();
            step.commit(3).unwrap();
            for (x, y) in out.iter().zip(&want[0]) {
                assert!((x - y).abs() < 1e-5, "{x} against {y}");
            }
            assert_eq!(plain(&whole.positions(a, 0, 0).unwrap()), plain(&parts.positions(b, 0, 0).unwrap()));
        }
    }
}

#[test]
fn truncate_and_remove() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        let mut cache = build(&shape, "full", 0, &backend);
        let id = cache.create_sequence();
        feed(&mut cache, id, &(0..30).collect::<Vec<_>>(), 30);
        let at_20 = {
            let fork = cache.fork(id).unwrap();
            cache.truncate(fork, Position(20)).unwrap();
            let s = snapshot(&cache, fork);
            cache.drop_sequence(fork).unwrap();
            s
        };
        assert_eq!(at_20.len(), 2 * 2 * 20 + 1);
        cache.remove(id, Position(5)..Position(11), RemoveMode::Keep).unwrap();
        assert_eq!(plain(&cache.positions(id, 1, 1).unwrap()), (0..5).chain(11..30).collect::<Vec<_>>());
        assert_eq!(cache.next_position(id).unwrap(), Position(30));
        cache.remove(id, Position(11)..Position(15), RemoveMode::Renumber).unwrap();
        assert_eq!(plain(&cache.positions(id, 0, 0).unwrap()), (0..5).chain(11..26).collect::<Vec<_>>());
        assert_eq!(cache.next_position(id).unwrap(), Position(26));
        // Token 20 stood at 20 and stands at 16 now, rotated for it.
        let e = entries(&cache, id, 0, 0).into_iter().find(|e| e.position == 16).unwrap();
        let want = placed(Kind::Key, shape.layer(0), 20, 0, 0, 16);
        assert!(e.key.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} {want:?}", e.key);
        for (start, end, bad) in [(-1, 3, true), (4, 2, true), (20, 27, true), (3, 3, false)] {
            let result = cache.remove(id, Position(start)..Position(end), RemoveMode::Keep);
            assert_eq!(result.is_err(), bad, "{start}..{end}");
        }
        assert!(matches!(
            cache.truncate(id, Position(27)),
            Err(Error::Cache(CacheError::PositionRange { .. }))
        ));
    }
}

#[test]
fn truncating_past_a_compaction_is_an_error() {
    let shape = small_model(2, 4, 2, 8);
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let mut cache = build(&shape, "snapkv(window=4)", 12, &backend);
    let id = cache.create_sequence();
    feed(&mut cache, id, &(0..30).collect::<Vec<_>>(), 30);
    cache.truncate(id, Position(28)).unwrap();
    cache.end_prefill(id).unwrap();
    feed(&mut cache, id, &[28], 1);
    feed(&mut cache, id, &[29], 1);
    cache.truncate(id, Position(28)).unwrap();
    let before = snapshot(&cache, id);
    let error = cache.truncate(id, Position(27)).unwrap_err();
    assert!(
        matches!(error, Error::Cache(CacheError::PastCompaction { compacted: Position(28), .. })),
        "{error}"
    );
    assert_eq!(snapshot(&cache, id), before);
}

#[test]
fn select_and_plan_say_what_compress_does() {
    let shape = small_model(2, 4, 2, 8);
    for backend in backends() {
        for recipe in RECIPES.iter().filter(|r| !r.starts_with("full") && !r.contains("renumber")) {
            let mut cache = build(&shape, &format!("{recipe}+when=prefill"), 13, &backend);
            let id = cache.create_sequence();
            feed(&mut cache, id, &(0..41).collect::<Vec<_>>(), 41);
            let plans: BTreeMap<usize, _> = cache.plan(id).unwrap().into_iter().collect();
            let selections: Vec<_> = (0..2).map(|l| cache.select(id, l).unwrap()).collect();
            cache.end_prefill(id).unwrap();
            for (layer, s) in selections.iter().enumerate() {
                for head in 0..2 {
                    let kept = cache.positions(id, layer, head).unwrap();
                    assert_eq!(&s.positions[s.offsets[head]..s.offsets[head + 1]], &kept[..], "{recipe}");
                    assert_eq!(plans[&layer].heads[head].keep.len(), kept.len());
                }
            }
        }
    }
}

#[test]
fn configuration_errors_name_the_option() {
    let shape = small_model(2, 4, 2, 8);
    let budget_missing = KvCache::builder(shape.clone()).recipe("snapkv").build().unwrap_err();
    assert!(matches!(&budget_missing, Error::Recipe(RecipeError::Budget { .. })), "{budget_missing}");
    let too_small = KvCache::builder(shape.clone())
        .recipe("snapkv(window=64)")
        .budget(Budget::Tokens(32))
        .build()
        .unwrap_err();
    assert!(too_small.to_string().contains("64"), "{too_small}");
    let ragged = KvCache::builder(shape)
        .recipe("adakv+positions=renumber")
        .budget(Budget::Tokens(256))
        .build()
        .unwrap_err();
    assert!(ragged.to_string().contains("alloc=uniform"), "{ragged}");
    let no_rotary = ModelShape::uniform(1, LayerShape::new(2, 1, 4)).unwrap();
    let error = KvCache::builder(no_rotary)
        .recipe("streaming+positions=renumber")
        .budget(Budget::Tokens(64))
        .build()
        .unwrap_err();
    assert!(error.to_string().contains("rotary"), "{error}");
}

#[test]
fn dropped_sequences_are_gone() {
    let shape = small_model(1, 2, 1, 4);
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let mut cache = build(&shape, "full", 0, &backend);
    let id = cache.create_sequence();
    cache.drop_sequence(id).unwrap();
    assert!(cache.begin(id, 1).is_err());
    assert!(cache.fork(id).is_err());
    assert!(cache.drop_sequence(id).is_err());
}
