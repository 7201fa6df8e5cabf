//! Learned caches: files, the converter, and what loading does to a sequence.

mod converter;
mod files;

use crate::support::*;
use kvsieve::cache::{CartridgePositions, LoadOptions, RemoveMode};
use kvsieve::error::{CacheError, LearnedError};
use kvsieve::geometry::{KeyPhase, LayerShape, ModelShape, Position};
use kvsieve::learned::Cartridge;
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use std::collections::HashMap;
use std::sync::Arc;

pub(super) const LAYERS: usize = 2;
pub(super) const HEADS: usize = 2;
pub(super) const TOKENS: usize = 5;
pub(super) const DIM: usize = 8;

/// The numbers of `scripts/golden-cartridge.py`.
pub(super) fn number(layer: usize, side: usize, head: usize, token: usize, dim: usize) -> f32 {
    ((layer * 1009 + side * 499 + head * 131 + token * 17 + dim * 3) % 251) as f32 / 32.0 - 125.0 / 32.0
}

/// Those of one KV head, `[p, d]`.
fn rows(layer: usize, side: usize, head: usize) -> Vec<f32> {
    (0..TOKENS * DIM).map(|i| number(layer, side, head, i / DIM, i % DIM)).collect()
}

pub(super) fn golden(name: &str) -> Vec<u8> {
    std::fs::read(format!("tests/golden/cartridge-{name}.safetensors")).unwrap()
}

fn cartridge(name: &str) -> Cartridge {
    Cartridge::from_bytes(golden(name)).unwrap()
}

/// A cartridge of a test's own: `p` entries of each KV head, as `f32`.
fn made(shape: &ModelShape, p: usize, number: impl Fn(usize, usize, usize, usize) -> f32) -> Cartridge {
    let mut data = Vec::new();
    for layer in 0..shape.layers() {
        let l = shape.layer(layer);
        for (side, name, d) in [(0, "k", l.d_k), (1, "v", l.d_v)] {
            let all = (0..l.kv_heads * p * d).map(|i| number(layer, side, i / (p * d), i % (p * d)));
            let bytes: Vec<u8> = all.flat_map(|x| x.to_bits().to_le_bytes()).collect();
            data.push((format!("layers.{layer}.{name}"), vec![l.kv_heads, p, d], bytes));
        }
    }
    let views = data.iter().map(|(name, extents, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, extents.clone(), bytes).unwrap())
    });
    let metadata = [
        ("format", "kvsieve-cartridge".to_owned()),
        ("version", "1".to_owned()),
        ("layers", shape.layers().to_string()),
        ("tokens", p.to_string()),
        ("frozen", "0".to_owned()),
    ];
    let metadata: HashMap<String, String> = metadata.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    Cartridge::from_bytes(serialize(views, Some(metadata)).unwrap()).unwrap()
}

fn random(seed: u64) -> impl Fn(usize, usize, usize, usize) -> f32 {
    move |layer, side, head, i| noise(seed + (((layer * 2 + side) * 64 + head) * 65_536 + i) as u64)
}

fn model() -> ModelShape {
    small_model(LAYERS, 4, HEADS, DIM)
}

fn build(shape: &ModelShape, recipe: &str, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(shape.clone()).recipe(recipe).page_entries(4);
    let builder = builder.budget(Budget::Tokens(1 << 16)).shared_backend(Arc::clone(backend));
    let mut cache = builder.build().unwrap();
    let id = cache.create_sequence();
    (cache, id)
}

fn reference(shape: &ModelShape, recipe: &str) -> (KvCache, SequenceId) {
    build(shape, recipe, &(Arc::new(kvsieve::Reference::default()) as Arc<dyn Backend>))
}

#[test]
fn entries_are_the_trained_ones_and_tokens_continue_behind_them() {
    for backend in backends() {
        for (name, frozen) in [("frozen", 1), ("plain", 0), ("halves", 1)] {
            let cartridge = cartridge(name);
            assert_eq!(
                (cartridge.layers(), cartridge.tokens(), cartridge.frozen()),
                (LAYERS, TOKENS, frozen)
            );
            cartridge.check_model("toy").unwrap();
            for recipe in
                ["full", "full+k=f16+v=bf16", "quest(dense=0)", "full+k=int8+v=int4+exact=f16(sinks=8)"]
            {
                let (mut cache, id) = build(&model(), recipe, &backend);
                let taken = cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap();
                assert_eq!(taken, Position(0)..Position(TOKENS as i32));
                assert_eq!(cache.learned(id).unwrap(), taken);
                assert_eq!(cache.next_position(id).unwrap(), taken.end);
                for (layer, head) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
                    // Five entries in pages of four: none is dropped for a whole page's sake.
                    assert_eq!(plain(&cache.positions(id, layer, head).unwrap()), [0, 1, 2, 3, 4]);
                    let (mut keys, mut values) = (vec![0.0; TOKENS * DIM], vec![0.0; TOKENS * DIM]);
                    cache.gather(id, layer, head, &mut keys, &mut values).unwrap();
                    assert_eq!((keys, values), (rows(layer, 0, head), rows(layer, 1, head)));
                }
                let what = format!("{name} under {recipe} on {}", backend.name());
                feed_all_checked(&mut cache, id, &[7, 8, 9], &what);
                feed_all_checked(&mut cache, id, &[10], &what);
                let positions = plain(&cache.positions(id, 1, 1).unwrap());
                assert_eq!(positions, (0..TOKENS as i32 + 4).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn the_first_token_alone_may_follow() {
    for recipe in ["full", "quest(dense=0)", "full+k=int8+v=int8"] {
        let (mut cache, id) = reference(&model(), recipe);
        let options = LoadOptions { packed: true, ..LoadOptions::default() };
        cache.load_cartridge(id, &cartridge("frozen"), options).unwrap();
        feed_all_checked(&mut cache, id, &[7], recipe);
        feed_all_checked(&mut cache, id, &[8], recipe);
    }
}

#[test]
fn cartridges_follow_one_another_as_trained_or_moved() {
    let shape = model();
    for backend in backends() {
        for positions in [CartridgePositions::AsTrained, CartridgePositions::Shifted] {
            let options = LoadOptions { positions, ..LoadOptions::default() };
            let (mut cache, id) = build(&shape, "full", &backend);
            let first = made(&shape, 6, random(1 << 40));
            cache.load_cartridge(id, &first, options).unwrap();
            let taken = cache.load_cartridge(id, &cartridge("frozen"), options).unwrap();
            assert_eq!(taken, Position(6)..Position(11));
            assert_eq!(cache.next_position(id).unwrap(), Position(11));
            for (layer, head) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
                let stored = entries(&cache, id, layer, head);
                assert_eq!(
                    stored.iter().map(|e| e.position).collect::<Vec<_>>(),
                    (0..11).collect::<Vec<_>>()
                );
                // The first stays where it was trained.
                for (i, e) in stored[..6].iter().enumerate() {
                    let want: Vec<f32> =
                        (0..DIM).map(|d| random(1 << 40)(layer, 0, head, i * DIM + d)).collect();
                    assert_eq!(e.key, want);
                }
                for (e, mut want) in
                    stored[6..].iter().zip(rows(layer, 0, head).chunks(DIM).map(<[f32]>::to_vec))
                {
                    if positions == CartridgePositions::Shifted {
                        rotate(shape.layer(layer).rotary.as_ref().unwrap(), &mut want, 6);
                    }
                    let off = e.key.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    let bound = if positions == CartridgePositions::Shifted { 2e-6 } else { 0.0 };
                    assert!(off <= bound, "{positions:?}: {off:e}");
                }
                let values: Vec<f32> = stored[6..].iter().flat_map(|e| e.value.clone()).collect();
                assert_eq!(values, rows(layer, 1, head));
            }
            feed_all_checked(&mut cache, id, &[7, 8], &format!("{positions:?} on {}", backend.name()));
            assert_eq!(cache.next_position(id).unwrap(), Position(13));
        }
    }
}

#[test]
fn moving_keys_needs_a_rotary_description() {
    let layer = LayerShape::new(4, HEADS, DIM);
    let shifted = LoadOptions { positions: CartridgePositions::Shifted, ..LoadOptions::default() };
    let (mut cache, id) = reference(&ModelShape::uniform(LAYERS, layer.clone()).unwrap(), "full");
    // The first one is where it was trained.
    cache.load_cartridge(id, &cartridge("frozen"), shifted).unwrap();
    let error = cache.load_cartridge(id, &cartridge("frozen"), shifted).unwrap_err();
    assert_eq!(error, Error::Learned(LearnedError::NoRotary { layer: 0, position: 5 }));
    assert_eq!(cache.next_position(id).unwrap(), Position(5));
    cache.load_cartridge(id, &cartridge("frozen"), LoadOptions::default()).unwrap();
    // Keys without a rotary embedding stand at no angle.
    let unrotated = LayerShape { key_phase: KeyPhase::Unrotated, ..layer };
    let (mut cache, id) = reference(&ModelShape::uniform(LAYERS, unrotated).unwrap(), "full");
    for _ in 0..2 {
        cache.load_cartridge(id, &cartridge("frozen"), shifted).unwrap();
    }
    let stored = entries(&cache, id, 1, 0);
    assert_eq!(stored[0].key, stored[5].key);
}

/// The error of loading, after which the sequence is empty as before and takes a cartridge that fits.
fn refused(shape: &ModelShape, recipe: &str, cartridge: &Cartridge) -> LearnedError {
    let (mut cache, id) = reference(shape, recipe);
    let error = cache.load_cartridge(id, cartridge, LoadOptions::default()).unwrap_err();
    assert_eq!(cache.next_position(id).unwrap(), Position(0));
    for layer in 0..shape.layers() {
        assert!(cache.stored(id, layer).unwrap().iter().all(|rows| rows.0 == 0), "{error}");
    }
    assert_eq!(cache.memory().resident, 0, "{error}");
    match error {
        Error::Learned(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn what_does_not_fit_the_model_is_named() {
    let cartridge = cartridge("frozen");
    let error = refused(&small_model(3, 4, 2, 8), "full", &cartridge);
    assert_eq!(error, LearnedError::Layers { got: 2, want: 3 });
    assert!(error.to_string().contains("2 layers, the model has 3"), "{error}");
    let error = refused(&small_model(2, 4, 4, 8), "full", &cartridge);
    assert_eq!(error, LearnedError::Heads { layer: 0, tensor: "k", got: (2, 8), want: (4, 8) });
    assert!(
        error.to_string().contains("2 KV heads of dimension 8, the model has 4 of dimension 8"),
        "{error}"
    );
    let mut wider = model().layer(0).clone();
    wider.d_v = 10;
    let shape = ModelShape::new(vec![model().layer(0).clone(), wider]).unwrap();
    let error = refused(&shape, "full", &cartridge);
    assert_eq!(error, LearnedError::Heads { layer: 1, tensor: "v", got: (2, 8), want: (2, 10) });
    let mut other = model().layer(0).clone();
    other.rotary.as_mut().unwrap().theta = 500_000.0;
    let error = refused(&ModelShape::uniform(2, other).unwrap(), "full", &cartridge);
    assert_eq!(error, LearnedError::Theta { layer: 0, got: 10_000.0, want: 500_000.0 });
    let error = cartridge.check_model("toy-2").unwrap_err();
    assert_eq!(error, LearnedError::Model { got: "toy".to_owned(), want: "toy-2".to_owned() });
    let unnamed = made(&model(), 3, random(1));
    assert!(matches!(unnamed.check_model("toy"), Err(LearnedError::Model { got, .. }) if got.is_empty()));
    // Layers that share a cache have no part of their own.
    let mut shared = model().layer(0).clone();
    shared.shared_with = Some(0);
    let layers = vec![model().layer(0).clone(), shared, model().layer(0).clone()];
    let (mut cache, id) = reference(&ModelShape::new(layers).unwrap(), "full");
    cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap();
    assert_eq!(entries(&cache, id, 2, 1)[4].key, rows(1, 0, 1)[4 * DIM..]);
}

#[test]
fn recipes_and_models_that_would_lose_entries_are_refused() {
    let cartridge = cartridge("frozen");
    for recipe in ["snapkv", "streaming", "h2o+value_merge"] {
        let error = refused(&model(), recipe, &cartridge);
        assert!(matches!(&error, LearnedError::Evicts { .. }), "{error}");
        assert!(error.to_string().contains("use the recipe full"), "{error}");
    }
    let mut windowed = model().layer(0).clone();
    windowed.window = Some(4096);
    let shape = ModelShape::new(vec![model().layer(0).clone(), windowed]).unwrap();
    assert_eq!(refused(&shape, "full", &cartridge), LearnedError::Window { layer: 1, window: 4096 });
    let error = refused(&model(), "full+k=int8+exact=f16(sinks=4)", &cartridge);
    assert!(matches!(error, LearnedError::Packs { sinks: 4, tokens: 5, .. }), "{error}");
    assert!(error.to_string().contains("exact=f16(sinks=5)"), "{error}");
    #[cfg(feature = "lowrank")]
    {
        let error = refused(&model(), "xkv", &cartridge);
        assert!(matches!(error, LearnedError::Packs { sinks: 4, tokens: 5, .. }), "{error}");
    }
    // The second one counts as well.
    let (mut cache, id) = reference(&model(), "full+k=int8+exact=f16(sinks=9,tail=0)");
    cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap();
    let error = cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Learned(LearnedError::Packs { sinks: 9, tokens: 10, .. })), "{error}");
    let packed = LoadOptions { packed: true, ..LoadOptions::default() };
    cache.load_cartridge(id, &cartridge, packed).unwrap();
    feed(&mut cache, id, &[1, 2], 2);
    // Nine exact ones of ten learned, and the tokens, on each of four heads.
    assert_eq!(cache.stats(id).unwrap().total().packed, 4 * 3);
}

#[test]
fn numbers_beyond_the_storage_type_are_refused_and_nothing_stays() {
    let large = made(
        &model(),
        3,
        |layer, side, head, i| {
            if (layer, side, head, i) == (1, 1, 1, 2 * DIM + 3) { 7e4 } else { 0.5 }
        },
    );
    let error = refused(&model(), "full+v=f16", &large);
    let stored = "f16".to_owned();
    let (layer, tensor, value, head, entry, dim) = (1, "v", 7e4, 1, 2, 3);
    assert_eq!(error, LearnedError::Range { layer, tensor, value, head, entry, dim, stored });
    let (mut cache, id) = reference(&model(), "full+k=f16+v=bf16");
    cache.load_cartridge(id, &large, LoadOptions::default()).unwrap();
}

#[test]
fn cartridges_come_before_the_first_token_and_leave_as_a_whole() {
    let cartridge = cartridge("frozen");
    let (mut cache, id) = reference(&model(), "full");
    feed(&mut cache, id, &[1, 2], 2);
    let error = cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap_err();
    assert_eq!(error, Error::Learned(LearnedError::Occupied { sequence: id.0, next: 2, learned: 0 }));
    cache.truncate(id, Position(0)).unwrap();
    for _ in 0..2 {
        cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap();
    }
    feed(&mut cache, id, &[1, 2, 3], 3);
    let error = cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap_err();
    assert_eq!(error, Error::Learned(LearnedError::Occupied { sequence: id.0, next: 13, learned: 10 }));
    // A rollback takes tokens, and tokens only.
    let step = cache.begin(id, 2).unwrap();
    drop(step);
    feed(&mut cache, id, &[4, 5], 0);
    assert_eq!(cache.next_position(id).unwrap(), Position(13));
    for (range, mode) in [(9..12, RemoveMode::Keep), (0..10, RemoveMode::Keep), (3..4, RemoveMode::Renumber)]
    {
        let (start, end) = (range.start, range.end);
        let error = cache.remove(id, Position(start)..Position(end), mode).unwrap_err();
        assert_eq!(error, Error::Cache(CacheError::SplitsLearned { start, end, learned: 10 }));
    }
    cache.remove(id, Position(10)..Position(11), RemoveMode::Renumber).unwrap();
    let error = cache.truncate(id, Position(9)).unwrap_err();
    assert_eq!(error, Error::Cache(CacheError::SplitsLearned { start: 9, end: 12, learned: 10 }));
    assert!(error.to_string().contains("truncate to 0 or to 10 and later"), "{error}");
    cache.truncate(id, Position(10)).unwrap();
    cache.load_cartridge(id, &cartridge, LoadOptions::default()).unwrap();
    assert_eq!(cache.next_position(id).unwrap(), Position(15));
    feed_all_checked(&mut cache, id, &[1, 2], "after all of it");
    cache.truncate(id, Position(0)).unwrap();
    assert_eq!(cache.learned(id).unwrap(), Position(0)..Position(0));
    feed_all_checked(&mut cache, id, &[1, 2], "without any");
    let error = cache.load_cartridge(SequenceId(99), &cartridge, LoadOptions::default()).unwrap_err();
    assert_eq!(error, Error::Cache(CacheError::NoSequence(99)));
}

#[test]
fn forks_share_the_pages_of_a_cartridge() {
    let shape = model();
    for backend in own_backends() {
        let (mut cache, base) = build(&shape, "full", &backend);
        cache.load_cartridge(base, &made(&shape, 256, random(7)), LoadOptions::default()).unwrap();
        let loaded = cache.memory().resident;
        let requests: Vec<SequenceId> = (0..8).map(|_| cache.fork(base).unwrap()).collect();
        assert_eq!(cache.memory().resident, loaded, "a fork copies nothing");
        for (i, &id) in requests.iter().enumerate() {
            feed_ends_checked(&mut cache, id, &[10 * i as u64, 10 * i as u64 + 1], "a request");
            assert_eq!(cache.next_position(id).unwrap(), Position(258));
        }
        // 256 entries fill their pages, so that each request adds one of its own to every head.
        let page = loaded / 64;
        assert_eq!(cache.memory().resident, loaded + 8 * page, "on {}", backend.name());
        assert_eq!(cache.stored(base, 0).unwrap()[0].0, 256);
        requests.into_iter().for_each(|id| cache.drop_sequence(id).unwrap());
        assert_eq!(cache.memory().resident, loaded);
    }
}

#[test]
fn a_share_of_the_prompt_counts_learned_entries() {
    let shape = model();
    let builder =
        KvCache::builder(shape.clone()).recipe("quest(page=4,sinks=4,recent=4,min_context=0,dense=0)");
    let mut cache = builder.budget(Budget::Fraction(0.5)).build().unwrap();
    let id = cache.create_sequence();
    cache.load_cartridge(id, &made(&shape, 200, random(3)), LoadOptions::default()).unwrap();
    feed(&mut cache, id, &[1, 2], 2);
    feed(&mut cache, id, &[3], 1);
    let read = cache.last_read(id, 0).unwrap().unwrap();
    assert_eq!(read.stored, HEADS * 203);
    let half = HEADS * 101;
    assert!(read.entries > half * 9 / 10 && read.entries <= half, "{read:?}");
}
