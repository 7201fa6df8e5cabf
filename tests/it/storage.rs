//! Packed storage behind the cache: what is packed when, what stays exact, and that every operation on sequences goes
//! through packed runs.

use crate::support::*;
use kvsieve::cache::RemoveMode;
use kvsieve::codec::{CODECS, PACK_ENTRIES};
use kvsieve::error::{CacheError, RecipeError};
use kvsieve::geometry::{ModelShape, Position};
use kvsieve::{Backend, Budget, Error, KvCache};
use std::sync::Arc;

fn build(shape: &ModelShape, recipe: &str, budget: usize, backend: &Arc<dyn Backend>) -> KvCache {
    KvCache::builder(shape.clone())
        .recipe(recipe)
        .budget(Budget::Tokens(budget))
        .shared_backend(Arc::clone(backend))
        .page_entries(32)
        .build()
        .unwrap_or_else(|e| panic!("{recipe}: {e}"))
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(kvsieve::Cpu::default())
}

/// ‖stored − placed‖ / ‖placed‖ of the key or the value of the entry a token left.
fn entry_error(kind: Kind, shape: &ModelShape, entry: &Entry, token: u64, layer: usize, head: usize) -> f64 {
    let row = if kind == Kind::Key { &entry.key } else { &entry.value };
    let want = placed(kind, shape.layer(layer), token, layer, head, entry.position);
    distance(row, &want.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
}

#[test]
fn attention_reads_what_is_stored_in_every_format() {
    let shape = small_model(1, 4, 2, 32);
    let tokens: Vec<u64> = (0..300).collect();
    for backend in backends() {
        let formats = CODECS.iter().map(|c| c.format.name().to_owned());
        for store in formats.chain(["int8(center)".to_owned(), "int4(center,hadamard)".to_owned()]) {
            let recipe = format!("full+k={store}+v={store}+exact=f32(sinks=3,tail=20)");
            let what = format!("{recipe} on {}", backend.name());
            let mut cache = build(&shape, &recipe, 1, &backend);
            let id = cache.create_sequence();
            for part in [&tokens[..170], &tokens[170..290], &tokens[290..291], &tokens[291..]] {
                feed_ends_checked(&mut cache, id, part, &what);
            }
            for t in 300..303 {
                feed_ends_checked(&mut cache, id, &[t], &what);
            }
            let total = cache.stats(id).unwrap().total();
            assert_eq!((total.entries, total.packed), (2 * 303, 2 * 2 * PACK_ENTRIES), "{what}");
        }
    }
}

#[test]
fn sinks_and_tail_stay_exact_and_the_rest_is_near() {
    let shape = small_model(2, 4, 2, 32);
    for backend in backends() {
        let mut cache = build(
            &shape,
            "full+k=int8+v=int4+layers=1(heads=0,v=f32)+exact=f32(sinks=5,tail=30)",
            1,
            &backend,
        );
        let id = cache.create_sequence();
        for part in (0..400u64).collect::<Vec<_>>().chunks(37) {
            feed(&mut cache, id, part, part.len());
        }
        for (layer, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let all = entries(&cache, id, layer, head);
            assert_eq!(all.iter().map(|e| e.position).collect::<Vec<_>>(), (0..400).collect::<Vec<_>>());
            // 5 sinks, two packed pages, and what fills no third one before the tail.
            let packed = 5..5 + 2 * PACK_ENTRIES;
            for (slot, entry) in all.iter().enumerate() {
                let (k, v) = (
                    entry_error(Kind::Key, &shape, entry, slot as u64, layer, head),
                    entry_error(Kind::Value, &shape, entry, slot as u64, layer, head),
                );
                let exact_values = (layer, head) == (1, 0);
                if packed.contains(&slot) {
                    assert!(k > 1e-5 && k < 0.01, "layer {layer} slot {slot}: key error {k}");
                    assert!(
                        (v > 1e-3) != exact_values && v < 0.12,
                        "layer {layer} slot {slot}: value error {v}"
                    );
                } else {
                    assert!(k < 1e-6 && v < 1e-6, "layer {layer} slot {slot}: {k} {v}");
                }
            }
        }
    }
}

#[test]
fn packed_bytes_are_allocated_bytes() {
    let shape = small_model(1, 4, 2, 128);
    let resident = |recipe: &str| {
        let mut cache = build(&shape, recipe, 1, &cpu());
        let id = cache.create_sequence();
        for part in (0..2052u64).collect::<Vec<_>>().chunks(513) {
            feed(&mut cache, id, part, part.len());
        }
        let total = cache.stats(id).unwrap().total();
        assert_eq!(total.bytes_resident, cache.memory().resident);
        let read = cache.stats(id).unwrap().total().bytes_read_per_step;
        // Positions that the two heads share are read for both.
        let most = total.bytes_resident + 4 * total.entries / 2;
        assert!(read <= most, "{recipe}: reads {read} of {}", total.bytes_resident);
        (total.bytes_resident as f64, total.bytes_resident as f64 * 8.0 / (total.entries * 256) as f64)
    };
    let (full, bits) = resident("full+k=f16+v=f16");
    assert!((bits - 16.0).abs() < 1.0, "f16 takes {bits} bits per element");
    // 16 bits a row for a scale, 32 with a minimum, 16 a channel and page for the mean; 32 bits for a position of
    // two entries of 256 elements, which both heads hold, and a page's fields.
    for (store, least) in [("int8", 8.125), ("int4(center,hadamard)", 4.375), ("lm2", 2.25), ("q4_0", 4.5)] {
        let (bytes, bits) = resident(&format!("full+k={store}+v={store}+exact=f16(sinks=4,tail=0)"));
        assert!(bits >= least && bits < least + 0.15, "{store} takes {bits} bits per element");
        assert!(bytes < full * (least + 0.5) / 16.0);
    }
}

#[test]
fn rollback_forks_and_truncation_go_through_packed_runs() {
    let shape = small_model(2, 4, 2, 32);
    for backend in backends() {
        let mut cache = build(&shape, "full+k=int8(center)+v=int4+exact=f32(sinks=4,tail=10)", 1, &backend);
        let id = cache.create_sequence();
        feed(&mut cache, id, &(0..200).collect::<Vec<_>>(), 200);
        let all = |cache: &KvCache, id| -> Vec<Vec<u32>> {
            (0..4)
                .flat_map(|i| entries(cache, id, i / 2, i % 2))
                .map(|e| {
                    let rows = e.key.iter().chain(&e.value).map(|x| x.to_bits());
                    rows.chain([e.position as u32]).collect()
                })
                .collect()
        };
        let before = all(&cache, id);
        // A step that would seal a page, taken back whole: bit for bit as before.
        {
            let mut step = cache.begin(id, 100).unwrap();
            let tokens: Vec<u64> = (900..1000).collect();
            feed_layer(&mut step, &shape, 0, &tokens, 200);
        }
        assert_eq!(all(&cache, id), before);
        // Accepted in part: what was rejected is in no page.
        feed(&mut cache, id, &(200..260).collect::<Vec<_>>(), 3);
        assert_eq!(cache.next_position(id).unwrap(), Position(203));
        assert_eq!(&all(&cache, id)[..200], &before[..200]);

        let fork = cache.fork(id).unwrap();
        feed_ends_checked(&mut cache, fork, &(500..640).collect::<Vec<_>>(), "fork");
        assert_eq!(cache.stats(fork).unwrap().total().packed, 4 * 2 * PACK_ENTRIES);
        assert_eq!(&all(&cache, id)[..200], &before[..200], "the fork's packing is its own");

        // Into the packed run, into the sinks, and on from there.
        for to in [150, 90, 3] {
            cache.truncate(fork, Position(to)).unwrap();
            assert_eq!(cache.stats(fork).unwrap().total().entries, 4 * to as usize);
            feed_ends_checked(&mut cache, fork, &(700..760).collect::<Vec<_>>(), "after truncation");
            feed_ends_checked(&mut cache, fork, &(760..960).collect::<Vec<_>>(), "sealed after truncation");
        }
        assert_eq!(&all(&cache, id)[..200], &before[..200]);
        cache.drop_sequence(fork).unwrap();
        cache.drop_sequence(id).unwrap();
        assert_eq!(cache.memory().resident, 0);
    }
}

#[test]
fn removing_spans_keeps_positions_and_refuses_to_turn_packed_keys() {
    let shape = small_model(2, 4, 2, 32);
    for backend in backends() {
        let mut cache = build(&shape, "full+k=int8+v=int8+exact=f32(sinks=4,tail=10)", 1, &backend);
        let id = cache.create_sequence();
        feed(&mut cache, id, &(0..600).collect::<Vec<_>>(), 600);
        cache.remove(id, Position(200)..Position(230), RemoveMode::Keep).unwrap();
        let kept: Vec<i32> = (0..200).chain(230..600).collect();
        for (layer, head) in [(0, 0), (1, 1)] {
            let all = entries(&cache, id, layer, head);
            assert_eq!(all.iter().map(|e| e.position).collect::<Vec<_>>(), kept);
            for e in &all {
                assert!(entry_error(Kind::Key, &shape, e, e.position as u64, layer, head) < 0.01);
            }
        }
        feed_ends_checked(&mut cache, id, &(600..640).collect::<Vec<_>>(), "after removal");
        let error = cache.remove(id, Position(300)..Position(310), RemoveMode::Renumber).unwrap_err();
        assert!(matches!(&error, Error::Recipe(RecipeError::Conflict { .. })), "{error}");
        assert!(error.to_string().contains("packed keys"), "{error}");
        assert_eq!(cache.next_position(id).unwrap(), Position(640));
        // Behind the last packed key nothing is in the way.
        cache.remove(id, Position(625)..Position(630), RemoveMode::Renumber).unwrap();
        assert_eq!(cache.next_position(id).unwrap(), Position(635));
        feed_ends_checked(&mut cache, id, &[635], "after renumbering");
    }
}

#[test]
fn without_a_tail_nothing_exact_is_read_and_nothing_is_packed_twice() {
    let shape = small_model(1, 4, 2, 32);
    for backend in backends() {
        // Scores are columns: they must follow the entries from page to page.
        for policy in ["full", "h2o(norm=visibility)+when=over(slack=60)"] {
            let recipe = format!("{policy}+k=lm3+v=int4+exact=f32(sinks=3,tail=0)");
            let what = format!("{recipe} on {}", backend.name());
            let mut cache = build(&shape, &recipe, 240, &backend);
            let id = cache.create_sequence();
            for part in [3, 50, 90, 1, 1, 130, 1, 7] {
                let next = cache.next_position(id).unwrap().0 as u64;
                feed_ends_checked(&mut cache, id, &(next..next + part).collect::<Vec<_>>(), &what);
                let total = cache.stats(id).unwrap().total();
                assert_eq!(total.packed, total.entries - 2 * 3, "{what}");
            }
            if policy == "full" {
                // The same entries at once: packed from the same numbers in the same pages.
                let whole = cache.create_sequence();
                feed(&mut cache, whole, &(0..283).collect::<Vec<_>>(), 283);
                for head in 0..2 {
                    let (a, b) = (entries(&cache, id, 0, head), entries(&cache, whole, 0, head));
                    assert!(a.iter().zip(&b).all(|(a, b)| a.key == b.key && a.value == b.value), "{what}");
                }
                cache.truncate(id, Position(270)).unwrap();
                feed_ends_checked(&mut cache, id, &[270, 271, 272], &what);
            }
        }
    }
}

#[test]
fn evictions_leave_packed_pages_dense() {
    let shape = small_model(1, 4, 2, 32);
    let shared = "k=int8+v=int8+exact=f32(sinks=4,tail=16)";
    for backend in backends() {
        // Slow ones get the policy that drops where it likes, and less of it.
        let (policies, kept) = match backend.name() {
            "cpu" => (&["streaming(sinks=4)", "h2o", "knorm+when=over(slack=8)", "random"][..], 700),
            _ => (&["random"][..], 300),
        };
        for policy in policies {
            let what = format!("{policy} on {}", backend.name());
            let mut cache = build(&shape, &format!("{policy}+{shared}+when=chunk"), kept, &backend);
            let id = cache.create_sequence();
            for part in (0..2 * kept as u64).collect::<Vec<_>>().chunks(kept / 5) {
                feed(&mut cache, id, part, part.len());
            }
            let total = cache.stats(id).unwrap().total();
            assert!(total.dropped > 0 && total.packed > kept, "{what}: {total:?}");
            for head in 0..2 {
                let all = entries(&cache, id, 0, head);
                assert_eq!(all.len(), kept, "{what}");
                // Values are packed with a row scale and no mean: the grid of a row hardly changes when it is
                // packed again, so that even often moved entries stay near.
                for e in &all {
                    let error = entry_error(Kind::Value, &shape, e, e.position as u64, 0, head);
                    assert!(error < 0.02, "{what}: entry {} of head {head}: {error}", e.position);
                }
            }
            // As many pages as the entries need, and a spare one per run.
            let per_head = total.bytes_resident / 2;
            let pages = kept.div_ceil(PACK_ENTRIES) + 2;
            assert!(per_head < pages * (PACK_ENTRIES * 80 + 2000) + 3 * 32 * 300, "{what}: {per_head}");
            feed_ends_checked(&mut cache, id, &[2 * kept as u64], &what);
        }
    }
}

#[test]
fn a_prompt_to_be_compressed_is_packed_once_and_afterwards() {
    let shape = small_model(2, 4, 2, 32);
    let mut cache = build(&shape, "snapkv(window=8)+adakv+safe", 400, &cpu());
    let id = cache.create_sequence();
    for part in (0..800u64).collect::<Vec<_>>().chunks(200) {
        feed(&mut cache, id, part, part.len());
        assert_eq!(cache.stats(id).unwrap().total().packed, 0);
    }
    cache.end_prefill(id).unwrap();
    let total = cache.stats(id).unwrap().total();
    assert_eq!(total.entries, 4 * 400);
    assert!(total.packed >= 4 * PACK_ENTRIES, "{total:?}");
    feed_ends_checked(&mut cache, id, &[800], "after compression");
}

#[test]
fn budgets_in_bytes_count_packed_pages() {
    let shape = small_model(2, 4, 2, 64);
    for recipe in
        ["snapkv(window=8)+k=int8+v=int4", "streaming+compact+when=chunk", "snapkv(window=8)+k=f16+v=f16"]
    {
        let bytes = 600 << 10;
        let mut cache =
            KvCache::builder(shape.clone()).recipe(recipe).budget(Budget::Bytes(bytes)).build().unwrap();
        let id = cache.create_sequence();
        for part in (0..6000u64).collect::<Vec<_>>().chunks(500) {
            feed(&mut cache, id, part, part.len());
        }
        cache.end_prefill(id).unwrap();
        let total = cache.stats(id).unwrap().total();
        // What the policy records of queries is beside the budget of pages.
        let pages = total.bytes_resident;
        assert!(pages <= bytes + (16 << 10), "{recipe}: {pages} of {bytes}");
        assert!(pages * 10 > bytes * 8, "{recipe}: {pages} of {bytes} used");
    }
}

#[test]
fn rules_reach_the_heads_they_name() {
    let shape = small_model(6, 16, 2, 32);
    let cache = KvCache::builder(shape.clone()).recipe("full+balanced").build().unwrap();
    let ends = "int8(center,hadamard)/int8";
    assert_eq!(cache.config().storage, vec![ends; 6], "eight query heads share a KV head");
    let cache = KvCache::builder(small_model(6, 4, 2, 32)).recipe("full+balanced").build().unwrap();
    let middle = "int8(center,hadamard)/int4(center,hadamard)";
    assert_eq!(cache.config().storage, [ends, ends, middle, middle, ends, ends]);
    let text = cache.config().to_string();
    assert!(text.contains(&format!("2 × {ends}, 2 × {middle}, 2 × {ends}")), "{text}");
    let cache = KvCache::builder(small_model(2, 4, 2, 32))
        .recipe("full+k=int8+layers=0(heads=1,k=f16,v=lm2)")
        .build()
        .unwrap();
    assert_eq!(cache.config().storage, ["int8/f32 f16/lm2", "int8/f32"]);
}

#[test]
fn numbers_that_could_not_be_packed_later_are_refused_at_once() {
    let shape = small_model(1, 2, 1, 16);
    for (store, exact, fits, too_large) in [
        ("int8", "f16", 60_000.0, 66_000.0),
        ("int8", "f32", 60_000.0, 66_000.0),
        ("int4(center,hadamard)", "f32", 8_000.0, 9_000.0),
        ("lm3", "f16", 8_000.0, 9_000.0),
        ("kivi2", "f32", 65_000.0, 1e30),
    ] {
        let recipe = format!("full+k={store}+v=f32+exact={exact}(sinks=0,tail=0)");
        let mut cache = build(&shape, &recipe, 1, &cpu());
        let id = cache.create_sequence();
        for (x, good) in [(too_large, false), (fits, true)] {
            let k: Vec<f32> = (0..128 * 16).map(|i| if i % 2 == 0 { x } else { -x }).collect();
            let mut step = cache.begin(id, 128).unwrap();
            let v = vec![1.0f32; 128 * 16];
            let view = |d| kvsieve::view::TensorView::token_major(d, 128, 1, 16).unwrap();
            let result = step.append(0, view(&k[..]), view(&v[..]));
            if good {
                result.unwrap();
                step.commit(128).unwrap();
                assert_eq!(cache.stats(id).unwrap().total().packed, 128);
            } else {
                let error = result.unwrap_err();
                assert!(matches!(&error, Error::Cache(CacheError::Range { .. })), "{store}: {error}");
                assert!(error.to_string().contains("k=f32"), "{error}");
            }
        }
    }
}
