//! Which pages share an array of positions, seen from inside: the cache's own interface shows positions, not where they
//! lie.

use super::{KvCache, RemoveMode, SequenceId};
use crate::backend::{Backend, Cpu, Reference};
use crate::columns::ColumnLayout;
use crate::device::page::{PageRef, Side};
use crate::geometry::{LayerShape, ModelShape, Position, Rotary, RotaryLayout};
use crate::recipe::Budget;
use crate::store::{self, SharedPositions};
use crate::testing::Random;
use crate::view::TensorView;
use std::collections::BTreeSet;
use std::sync::Arc;

const LAYERS: usize = 3;
const H: usize = 2;
const D: usize = 32;

fn backends() -> Vec<Arc<dyn Backend>> {
    vec![Arc::new(Cpu::default()), Arc::new(Reference::default())]
}

fn build(recipe: &str, budget: usize, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let layer = LayerShape::new(4, H, D).with_rotary(Rotary::new(D, 10_000.0, RotaryLayout::HalfSplit));
    let mut cache = KvCache::builder(ModelShape::uniform(LAYERS, layer).unwrap())
        .recipe(recipe)
        .budget(Budget::Tokens(budget))
        .shared_backend(Arc::clone(backend))
        .page_entries(32)
        .build()
        .unwrap();
    let id = cache.create_sequence();
    (cache, id)
}

/// Stores so many tokens in every layer; no attention.
fn feed(cache: &mut KvCache, id: SequenceId, tokens: usize) {
    let mut random = Random::new(tokens as u64);
    let rows: Vec<f32> = (0..tokens * H * D).map(|_| random.normal()).collect();
    let mut step = cache.begin(id, tokens).unwrap();
    for layer in 0..LAYERS {
        let view = || TensorView::token_major(&rows[..], tokens, H, D).unwrap();
        step.append(layer, view(), view()).unwrap();
    }
    step.commit(tokens).unwrap();
}

fn pages(cache: &KvCache, id: SequenceId) -> Vec<PageRef<'_>> {
    cache.sequences[&id.0].layers.iter().flatten().flat_map(|head| head.pages()).collect()
}

fn packed(cache: &KvCache, id: SequenceId) -> Vec<PageRef<'_>> {
    pages(cache, id).into_iter().filter(|p| p.layout.encoding(Side::Value).packed().is_some()).collect()
}

/// Packed pages have one array exactly if they hold the same positions. Gives the number of pages and of arrays.
fn check_sharing(cache: &KvCache, id: SequenceId, what: &str) -> (usize, usize) {
    let pages = packed(cache, id);
    for a in &pages {
        for b in &pages {
            let (a, b) = (&a.page.positions, &b.page.positions);
            assert_eq!(Arc::ptr_eq(a, b), a == b, "{what}: {a:?} {b:?}");
        }
    }
    let arrays: BTreeSet<_> = pages.iter().map(|p| p.page.positions.as_ptr()).collect();
    (pages.len(), arrays.len())
}

fn all_positions(cache: &KvCache, id: SequenceId) -> Vec<Vec<Position>> {
    let heads = (0..LAYERS).flat_map(|l| (0..H).map(move |h| (l, h)));
    heads.map(|(l, h)| cache.positions(id, l, h).unwrap()).collect()
}

#[test]
fn heads_and_layers_hold_equal_positions_once() {
    for backend in backends() {
        let what = backend.name();
        let (mut cache, id) = build("full+k=int8+v=int4+exact=f32(sinks=4,tail=10)", 1, &backend);
        let steps = [150, 100, 1, 49];
        steps.iter().for_each(|&tokens| feed(&mut cache, id, tokens));
        let heads = LAYERS * H;
        assert_eq!(check_sharing(&cache, id, what), (2 * heads, 2), "{what}");
        // 4 sinks, 256 packed entries, 40 exact ones: these are appended to, and have arrays of their own.
        let all = pages(&cache, id);
        let arrays: BTreeSet<_> = all.iter().map(|p| p.page.positions.as_ptr()).collect();
        assert_eq!((all.len(), arrays.len()), (heads * (1 + 2 + 2), 1 + 2 + 2 * heads), "{what}");
        assert!(all_positions(&cache, id).iter().all(|p| p.iter().map(|p| p.0).eq(0..300)));

        // Bytes are those of the pages and of one array each.
        let metadata = |p: &PageRef<'_>| store::block_bytes(p.layout) + store::metadata_bytes(p.page);
        let positions = |capacity: usize| 16 + 4 * capacity;
        let bytes = all.iter().map(metadata).sum::<usize>()
            + positions(4)
            + 2 * positions(128)
            + 2 * heads * positions(32);
        assert_eq!(cache.memory().resident, bytes);
        let stats = cache.stats(id).unwrap();
        assert_eq!(stats.total().bytes_resident, bytes);
        assert_eq!(
            stats.layers[0].bytes_resident - stats.layers[1].bytes_resident,
            positions(4) + 2 * positions(128)
        );
        // A fork takes nothing; another sequence with the same positions has arrays of its own.
        cache.fork(id).unwrap();
        assert_eq!(cache.memory().resident, bytes);
        let other = cache.create_sequence();
        steps.iter().for_each(|&tokens| feed(&mut cache, other, tokens));
        assert_eq!(cache.memory().resident, 2 * bytes);
    }
}

#[test]
fn an_open_packed_page_shares_too() {
    for backend in backends() {
        let (mut cache, id) = build("full+k=int8+v=int4+exact=f32(sinks=0,tail=0)", 1, &backend);
        for tokens in [100, 60, 1, 1] {
            feed(&mut cache, id, tokens);
            let pages = cache.next_position(id).unwrap().0 as usize / 129 + 1;
            let shared = check_sharing(&cache, id, backend.name());
            assert_eq!(shared, (pages * LAYERS * H, pages), "{}", backend.name());
        }
    }
}

#[test]
fn evictions_share_what_stays_equal_and_only_that() {
    let packed = "k=int8+v=int8+exact=f32(sinks=4,tail=16)";
    for backend in backends() {
        let (mut cache, id) = build(&format!("random+{packed}"), 600, &backend);
        let what = format!("random on {}", backend.name());
        feed(&mut cache, id, 900);
        cache.end_prefill(id).unwrap();
        let (pages, arrays) = check_sharing(&cache, id, &what);
        assert!(pages >= 4 * LAYERS * H && arrays > pages / 2, "{what}: {arrays} of {pages}");

        let (mut cache, id) = build(&format!("streaming(sinks=4)+{packed}+when=chunk"), 600, &backend);
        let what = format!("streaming on {}", backend.name());
        for tokens in [500, 333, 200] {
            feed(&mut cache, id, tokens);
            let (pages, arrays) = check_sharing(&cache, id, &what);
            assert_eq!(pages, arrays * LAYERS * H, "{what}");
        }
        // A span that is forgotten: the pages around it are packed anew, all others stay.
        cache.remove(id, Position(600)..Position(650), RemoveMode::Keep).unwrap();
        let (pages, arrays) = check_sharing(&cache, id, &what);
        assert_eq!(pages, arrays * LAYERS * H, "{what}");

        // Renumbered entries have the positions 0, 1, 2, … in every head.
        let recipe =
            "streaming(sinks=4)+k=f32+v=int8+exact=f32(sinks=4,tail=16)+when=chunk+positions=renumber";
        let (mut cache, id) = build(recipe, 600, &backend);
        for tokens in [500, 333] {
            feed(&mut cache, id, tokens);
        }
        let (pages, arrays) = check_sharing(&cache, id, recipe);
        assert_eq!(pages, arrays * LAYERS * H, "{recipe}");
        assert!(all_positions(&cache, id).iter().all(|p| p.iter().map(|p| p.0).eq(0..600)));
    }
}

#[test]
fn writing_shared_positions_does_not_reach_siblings() {
    // Keys are exact, so that renumbering is allowed.
    let recipe = "full+k=f32+v=int8+exact=f32(sinks=4,tail=10)";
    for backend in backends() {
        let (mut cache, id) = build(recipe, 1, &backend);
        feed(&mut cache, id, 300);
        let (before, arrays) = (all_positions(&cache, id), check_sharing(&cache, id, recipe));
        let unchanged = |cache: &KvCache| {
            assert_eq!(all_positions(cache, id), before, "on {}", backend.name());
            assert_eq!(check_sharing(cache, id, recipe), arrays, "on {}", backend.name());
        };
        let truncated = cache.fork(id).unwrap();
        cache.truncate(truncated, Position(200)).unwrap();
        feed(&mut cache, truncated, 150);
        assert_eq!(cache.stored(truncated, 0).unwrap()[0].0, 350);
        unchanged(&cache);
        let evicted = cache.fork(id).unwrap();
        cache.remove(evicted, Position(50)..Position(60), RemoveMode::Keep).unwrap();
        unchanged(&cache);
        let renumbered = cache.fork(id).unwrap();
        cache.remove(renumbered, Position(50)..Position(60), RemoveMode::Renumber).unwrap();
        assert!(all_positions(&cache, renumbered).iter().all(|p| p.iter().map(|p| p.0).eq(0..290)));
        unchanged(&cache);
        cache.drop_sequence(truncated).unwrap();
        unchanged(&cache);

        // One head alone: the other heads and layers keep theirs.
        let shape = cache.shape.layer(0).clone();
        let alone = cache.fork(id).unwrap();
        let head = &mut cache.sequences.get_mut(&alone.0).unwrap().layers[0][0];
        let (shared, columns) = (&mut SharedPositions::default(), &ColumnLayout::default());
        store::renumber(&*backend, &shape, head, shared, columns, |_, p| p + 7, |p| p + 7).unwrap();
        let moved = all_positions(&cache, alone);
        assert!(moved[0].iter().map(|p| p.0).eq(7..307));
        assert_eq!(moved[1..], before[1..]);
        unchanged(&cache);
    }
}
