//! Parts of attention that are not among a sequence's own entries: learned sinks, and what other sequences store; against
//! dense attention over the union.

use crate::support::*;
use kvsieve::cache::{Guard, PartialWorkspace, RemoveMode};
use kvsieve::error::{CacheError, ShapeError};
use kvsieve::geometry::{LayerShape, ModelShape, Position, Rotary, RotaryLayout, SinkEntries};
use kvsieve::kernel::merge_partials::MergeArgs;
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::sync::Arc;

const HQ: usize = 6;
const H: usize = 2;
const DK: usize = 10;
const DV: usize = 7;

fn layer() -> LayerShape {
    let mut layer = LayerShape::new(HQ, H, DK).with_rotary(Rotary::new(8, 10_000.0, RotaryLayout::HalfSplit));
    layer.d_v = DV;
    layer
}

fn numbers(seed: u64, count: usize, gain: f32) -> Option<Vec<f32>> {
    Some((0..count as u64).map(|i| gain * noise(seed * 1_000_003 + i)).collect())
}

/// The variants of the literature, and more than one entry.
fn variants() -> Vec<SinkEntries> {
    let (k, v) = (numbers(1, H * DK, 2.0), numbers(2, H * DV, 3.0));
    vec![
        SinkEntries::one(k.clone(), v.clone()),
        SinkEntries::one(k, None),
        SinkEntries::one(None, v),
        SinkEntries::one(None, None),
        SinkEntries {
            entries: 3,
            keys: numbers(3, H * 3 * DK, 2.0),
            values: numbers(4, H * 3 * DV, 3.0),
            bias: numbers(5, H * 3, 4.0),
        },
    ]
}

/// What every query of a KV head sees besides what is stored, at whatever position it is.
fn learned(shape: &LayerShape, head: usize, position: i32) -> Vec<Entry> {
    let Some(sinks) = &shape.sink_entries else { return Vec::new() };
    let part = |numbers: &Option<Vec<f32>>, i: usize, dim: usize| match numbers {
        Some(numbers) => numbers[(head * sinks.entries + i) * dim..][..dim].to_vec(),
        None => vec![0.0; dim],
    };
    let entry = |i| Entry {
        position,
        bias: part(&sinks.bias, i, 1)[0],
        key: part(&sinks.keys, i, shape.d_k),
        value: part(&sinks.values, i, shape.d_v),
    };
    (0..sinks.entries).map(entry).collect()
}

fn build(shape: &ModelShape, recipe: &str, budget: usize, backend: &Arc<dyn Backend>) -> KvCache {
    let builder = KvCache::builder(shape.clone()).recipe(recipe).page_entries(8);
    builder.budget(Budget::Tokens(budget)).shared_backend(Arc::clone(backend)).build().unwrap()
}

/// Feeds tokens and checks every output row against dense attention over what was stored, the new tokens and the sinks.
fn feed_checked(cache: &mut KvCache, id: SequenceId, tokens: &[u64], what: &str) {
    let shape = cache.shape().clone();
    if tokens.len() == 1 {
        cache.end_prefill(id).unwrap();
    }
    let start = cache.next_position(id).unwrap().0;
    let before: Vec<Vec<Vec<Entry>>> =
        (0..shape.layers()).map(|l| (0..H).map(|h| entries(cache, id, l, h)).collect()).collect();
    let outs = feed(cache, id, tokens, tokens.len());
    for layer in 0..shape.layers() {
        let (l, owner) = (shape.layer(layer), shape.owner(layer));
        for h in 0..HQ {
            let head = h / l.group();
            for (i, &t) in tokens.iter().enumerate() {
                let position = start + i as i32;
                let mut all = before[layer][head].clone();
                all.extend(tokens[..=i].iter().zip(start..).map(|(&t, position)| Entry {
                    bias: 0.0,
                    position,
                    key: placed(Kind::Key, l, t, owner, head, position),
                    value: placed(Kind::Value, l, t, owner, head, position),
                }));
                all.extend(learned(l, head, position));
                let query = placed(Kind::Query, l, t, layer, h, position);
                let at = (i * HQ + h) * DV;
                let error = distance(&outs[layer][at..at + DV], &dense(l, h, &query, position, &all));
                assert!(error < TOLERANCE, "{what}: layer {layer} head {h} token {i}: {error:e}");
            }
        }
    }
}

#[test]
fn sinks_are_seen_by_every_query_whatever_is_stored() {
    for sinks in variants() {
        // A plain layer, one whose window hides everything old, one that shares a cache and has sinks of its own.
        let mut plain = layer();
        plain.sink_entries = Some(sinks.clone());
        let mut windowed = plain.clone();
        windowed.window = Some(3);
        windowed.softcap = Some(5.0);
        windowed.sink_logits = Some(vec![0.5, -1.0, 2.0, f32::NEG_INFINITY, 0.0, 1.5]);
        let mut shared = layer();
        shared.shared_with = Some(0);
        shared.sink_entries = Some(SinkEntries::one(numbers(9, H * DK, 1.0), numbers(8, H * DV, 1.0)));
        let shape = ModelShape::new(vec![plain, windowed, shared, layer()]).unwrap();
        for backend in backends() {
            for recipe in
                ["full", "snapkv(window=4,kernel=3)+when=chunk+when=over(slack=2)", "h2o", "quest(dense=0)"]
            {
                let budget = if recipe.starts_with("quest") { 1 << 16 } else { 12 };
                let mut cache = build(&shape, recipe, budget, &backend);
                let id = cache.create_sequence();
                let mut next = 0;
                for n in [9, 5, 1, 1, 3, 1] {
                    let tokens: Vec<u64> = (next..next + n).collect();
                    next += n;
                    feed_checked(
                        &mut cache,
                        id,
                        &tokens,
                        &format!("{recipe} on {}, {sinks:?}", backend.name()),
                    );
                }
                assert!(cache.stored(id, 0).unwrap()[0].0 <= next as usize, "sinks take no slot");
            }
        }
    }
}

fn with_sinks(layers: usize) -> ModelShape {
    let mut layer = layer();
    layer.sink_entries = variants().pop();
    ModelShape::uniform(layers, layer).unwrap()
}

#[test]
fn sinks_stay_through_everything_that_moves_entries() {
    let shape = with_sinks(2);
    for backend in backends() {
        let mut cache = build(&shape, "streaming(sinks=2)+positions=renumber", 12, &backend);
        let id = cache.create_sequence();
        feed_checked(&mut cache, id, &(0..30).collect::<Vec<_>>(), "prompt");
        feed_checked(&mut cache, id, &[30], "renumbered");
        let fork = cache.fork(id).unwrap();
        feed_checked(&mut cache, fork, &[31], "fork");
        let mut cache = build(&shape, "full", 0, &backend);
        let id = cache.create_sequence();
        feed_checked(&mut cache, id, &(0..30).collect::<Vec<_>>(), "prompt");
        cache.remove(id, Position(3)..Position(20), RemoveMode::Renumber).unwrap();
        feed_checked(&mut cache, id, &[30, 31], "removed");
        cache.truncate(id, Position(0)).unwrap();
        feed_checked(&mut cache, id, &[32, 33], "emptied");
        cache.drop_sequence(id).unwrap();
        let lone = cache.create_sequence();
        feed_checked(&mut cache, lone, &[34], "one token");
    }
}

#[test]
fn threads_and_batches_see_sinks_once() {
    let shape = with_sinks(1);
    for backend in backends() {
        let mut cache = build(&shape, "full", 0, &backend);
        let (a, b) = (cache.create_sequence(), cache.create_sequence());
        feed(&mut cache, a, &(0..20).collect::<Vec<_>>(), 20);
        feed(&mut cache, b, &(50..53).collect::<Vec<_>>(), 3);
        let (c, d) = (cache.fork(a).unwrap(), cache.fork(b).unwrap());
        let alone = [feed(&mut cache, c, &[60, 61], 2), feed(&mut cache, d, &[70], 1)];
        // Both in one step.
        let l = shape.layer(0);
        let rows = |kind, heads: usize| -> Vec<f32> {
            [(60u64, 20), (61, 21), (70, 3)]
                .into_iter()
                .flat_map(|(t, p)| (0..heads).flat_map(move |h| placed(kind, l, t, 0, h, p)))
                .collect()
        };
        let (q, k, v) = (rows(Kind::Query, HQ), rows(Kind::Key, H), rows(Kind::Value, H));
        let mut out = vec![f32::NAN; 3 * HQ * DV];
        let mut step = cache.begin_batch(&[(a, 2), (b, 1)]).unwrap();
        step.attend(
            0,
            TensorView::token_major(&q[..], 3, HQ, DK).unwrap(),
            TensorView::token_major(&k[..], 3, H, DK).unwrap(),
            TensorView::token_major(&v[..], 3, H, DV).unwrap(),
            TensorViewMut::token_major(&mut out[..], 3, HQ, DV).unwrap(),
        )
        .unwrap();
        drop(step);
        let want = [alone[0][0].as_slice(), alone[1][0].as_slice()].concat();
        for (x, y) in out.iter().zip(&want) {
            assert!((x - y).abs() < 1e-5, "batch: {x} against {y}");
        }
        // By three threads' parts.
        let q = TensorView::token_major(&q[..2 * HQ * DK], 2, HQ, DK).unwrap();
        let mut step = cache.begin(a, 2).unwrap();
        step.append(
            0,
            TensorView::token_major(&k[..2 * H * DK], 2, H, DK).unwrap(),
            TensorView::token_major(&v[..2 * H * DV], 2, H, DV).unwrap(),
        )
        .unwrap();
        let (mut outs, mut lses) = (vec![f32::NAN; 3 * HQ * 2 * DV], vec![f32::NAN; 3 * HQ * 2]);
        let parts = outs.chunks_mut(HQ * 2 * DV).zip(lses.chunks_mut(HQ * 2));
        for (ith, (out, lse)) in parts.enumerate() {
            step.attend_partial(0, q, ith, 3, &mut PartialWorkspace::default(), out, lse).unwrap();
        }
        let mut out = vec![f32::NAN; 2 * HQ * DV];
        step.merge_partials(
            0,
            q,
            3,
            &outs,
            &lses,
            TensorViewMut::token_major(&mut out[..], 2, HQ, DV).unwrap(),
        )
        .unwrap();
        for (x, y) in out.iter().zip(&want) {
            assert!((x - y).abs() < 1e-5, "parts: {x} against {y}");
        }
    }
}

/// The softmax weight of each entry for one query, in `f64`.
fn weights(shape: &LayerShape, query: &[f32], all: &[Entry]) -> Vec<f64> {
    let logit = |e: &Entry| {
        let dot: f64 = query.iter().zip(&e.key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        dot * f64::from(shape.scale) + f64::from(e.bias)
    };
    let exp: Vec<f64> = all.iter().map(|e| logit(e).exp()).collect();
    let total: f64 = exp.iter().sum();
    exp.into_iter().map(|x| x / total).collect()
}

#[test]
fn mass_is_a_share_of_the_whole_denominator() {
    let shape = with_sinks(2);
    for backend in backends() {
        let mut cache = build(&shape, "h2o", 1000, &backend);
        let id = cache.create_sequence();
        // A prompt, a step accepted in part, a single token: three ways for mass to reach the columns.
        feed(&mut cache, id, &(0..9).collect::<Vec<_>>(), 9);
        feed(&mut cache, id, &[9, 10, 11], 2);
        feed(&mut cache, id, &[11], 1);
        for layer in 0..2 {
            let l = shape.layer(layer);
            let scores = cache.scores(id, layer).unwrap().unwrap();
            for head in 0..H {
                let stored = entries(&cache, id, layer, head);
                let mut want = vec![0.0; 12];
                for (position, h) in (0..12usize).flat_map(|p| (0..HQ).map(move |h| (p, h))) {
                    if h / l.group() == head {
                        let query = placed(Kind::Query, l, position as u64, layer, h, position as i32);
                        let mut all = stored[..=position].to_vec();
                        all.extend(learned(l, head, 0));
                        let weights = weights(l, &query, &all);
                        want.iter_mut().zip(&weights[..=position]).for_each(|(sum, w)| *sum += w);
                    }
                }
                for (got, want) in scores.head(head).iter().zip(&want) {
                    let want = want / l.group() as f64;
                    let close = (f64::from(*got) - want).abs() < 1e-4 * (1.0 + want);
                    assert!(close, "layer {layer} head {head} on {}: {got} against {want}", backend.name());
                }
            }
        }
    }
}

#[test]
fn a_guard_watches_layers_with_sinks() {
    let shape = with_sinks(1);
    for backend in backends() {
        let mut cache = build(&shape, "full+k=int8+v=int8+exact=f32(sinks=0,tail=0)", 0, &backend);
        let id = cache.create_sequence();
        cache.guard(id, Guard { tokens: 4, threshold: None }).unwrap();
        feed_checked(&mut cache, id, &(0..140).collect::<Vec<_>>(), "before anything is packed");
        feed_checked(&mut cache, id, &[140, 141], "guarded");
        let report = cache.guard_report(id).unwrap().unwrap();
        assert!(report.heads.iter().all(|head| head.output_error > 0.0 && head.output_error < 0.05));
    }
}

#[test]
fn sink_entries_that_cannot_be_are_refused() {
    let check = |sinks: SinkEntries, what: &str, text: &str| {
        let mut layer = layer();
        layer.sink_entries = Some(sinks);
        let error = ModelShape::uniform(1, layer).unwrap_err();
        let ShapeError::Geometry { what: field, .. } = &error else { panic!("{error}") };
        assert_eq!(*field, what);
        assert!(error.to_string().contains(text), "{error}");
    };
    let one = |keys, values| SinkEntries::one(keys, values);
    check(SinkEntries::default(), "sink_entries.entries", "1 ..= 256");
    check(SinkEntries { entries: 257, ..SinkEntries::default() }, "sink_entries.entries", "257");
    check(one(numbers(1, H * DK - 1, 1.0), None), "sink_entries.keys", "19 values, must be 20 (2 KV heads");
    check(one(None, numbers(1, H * DK, 1.0)), "sink_entries.values", "20 values, must be 14");
    check(SinkEntries { bias: Some(vec![0.0]), ..one(None, None) }, "sink_entries.bias", "must be 2");
    let mut keys = numbers(1, H * DK, 1.0);
    keys.as_mut().unwrap()[13] = f32::NAN;
    check(one(keys, None), "sink_entries.keys", "NaN at index 13");
}

#[test]
fn parts_of_several_sequences_make_one_softmax() {
    let mut shape = layer();
    shape.sink_entries = variants().pop();
    shape.sink_logits = Some(vec![0.5, -1.0, 2.0, f32::NEG_INFINITY, 0.0, 1.5]);
    let shape = ModelShape::uniform(2, shape).unwrap();
    for backend in backends() {
        let mut cache = build(&shape, "full", 0, &backend);
        let [first, second, own] = std::array::from_fn(|_| cache.create_sequence());
        feed(&mut cache, first, &(100..117).collect::<Vec<_>>(), 17);
        feed(&mut cache, second, &(200..205).collect::<Vec<_>>(), 5);
        feed(&mut cache, own, &(0..11).collect::<Vec<_>>(), 11);
        for layer in 0..2 {
            let l = shape.layer(layer);
            let queries: Vec<f32> = [11, 12]
                .into_iter()
                .flat_map(|t| (0..HQ).flat_map(move |h| placed(Kind::Query, l, t, layer, h, t as i32)))
                .collect();
            let q = TensorView::token_major(&queries[..], 2, HQ, DK).unwrap();
            let rows = 2 * HQ;
            let (mut outs, mut lses) = (vec![f32::NAN; 3 * rows * DV], vec![f32::NAN; 3 * rows]);
            let mut workspace = PartialWorkspace::default();
            let parts = outs.chunks_mut(rows * DV).zip(lses.chunks_mut(rows));
            for (id, (out, lse)) in [first, second].into_iter().zip(parts) {
                cache.attend_whole(id, layer, &q, &mut workspace, out, lse).unwrap();
            }
            // The part of the sequence's own, which alone has the sinks.
            let all = |kind, heads: usize| -> Vec<f32> {
                [11, 12]
                    .into_iter()
                    .flat_map(|t| (0..heads).flat_map(move |h| placed(kind, l, t, layer, h, t as i32)))
                    .collect()
            };
            let (k, v) = (all(Kind::Key, H), all(Kind::Value, H));
            let mut token_major = vec![f32::NAN; rows * DV];
            let mut step = cache.begin(own, 2).unwrap();
            step.attend(
                layer,
                q,
                TensorView::token_major(&k[..], 2, H, DK).unwrap(),
                TensorView::token_major(&v[..], 2, H, DV).unwrap(),
                TensorViewMut::token_major(&mut token_major[..], 2, HQ, DV).unwrap(),
            )
            .unwrap();
            lses[2 * rows..].copy_from_slice(step.last_lse());
            drop(step);
            for (h, token) in (0..HQ).flat_map(|h| [(h, 0), (h, 1)]) {
                let from = &token_major[(token * HQ + h) * DV..][..DV];
                outs[2 * rows * DV + (h * 2 + token) * DV..][..DV].copy_from_slice(from);
            }
            let (mut out, mut lse) = (vec![f32::NAN; rows * DV], vec![f32::NAN; rows]);
            let (parts, d_v) = (3, DV);
            let mut args = MergeArgs { parts, d_v, outs: &outs, lses: &lses, out: &mut out, lse: &mut lse };
            backend.merge_partials(&mut args).unwrap();
            for (h, token) in (0..HQ).flat_map(|h| [(h, 0), (h, 1)]) {
                let head = h / l.group();
                let mut seen: Vec<Entry> = [first, second, own]
                    .into_iter()
                    .flat_map(|id| entries(&cache, id, layer, head))
                    .map(|e| Entry { position: 0, ..e })
                    .collect();
                seen.extend((0..=token).map(|i| Entry {
                    position: 0,
                    bias: 0.0,
                    key: k[(i * H + head) * DK..][..DK].to_vec(),
                    value: v[(i * H + head) * DV..][..DV].to_vec(),
                }));
                seen.extend(learned(l, head, 0));
                let want = dense(l, h, &queries[(token * HQ + h) * DK..][..DK], 0, &seen);
                let error = distance(&out[(h * 2 + token) * DV..][..DV], &want);
                assert!(error < TOLERANCE, "layer {layer} head {h} token {token}: {error:e}");
            }
        }
        // What does not fit is said, and an empty sequence weighs nothing.
        let empty = cache.create_sequence();
        let zeros = vec![0.0; HQ * DK];
        let q = TensorView::token_major(&zeros[..], 1, HQ, DK).unwrap();
        let (mut out, mut lse) = (vec![f32::NAN; HQ * DV], vec![f32::NAN; HQ]);
        let mut workspace = PartialWorkspace::default();
        let mut attend = |id, layer, q: &TensorView<'_>, out: &mut [f32]| {
            cache.attend_whole(id, layer, q, &mut workspace, out, &mut lse)
        };
        attend(empty, 1, &q, &mut out).unwrap();
        assert!(out.iter().all(|&x| x == 0.0));
        let error = attend(empty, 2, &q, &mut out).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::NoLayer { layer: 2, layers: 2 })), "{error}");
        let error = attend(empty, 0, &q, &mut out[1..]).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::Length { buffer: "out", .. })), "{error}");
        let narrow = TensorView::token_major(&zeros[..], 1, HQ / 2, 2 * DK).unwrap();
        let error = attend(empty, 0, &narrow, &mut out).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::Extents { tensor: "q", .. })), "{error}");
        assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY));
    }
}
