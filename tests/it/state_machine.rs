//! The cache as a state machine: any sequence of operations, against a model that is a list of
//! (position, token) pairs per sequence.

use crate::support::*;
use kvsieve::cache::RemoveMode;
use kvsieve::error::RecipeError;
use kvsieve::geometry::{ModelShape, Position};
use kvsieve::{Budget, Error, KvCache, SequenceId};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What the model knows of one sequence.
#[derive(Clone, Debug, Default)]
struct Naive {
    entries: Vec<(i32, u64)>,
    next: i32,
}

#[derive(Clone, Debug)]
enum Op {
    Create,
    Fork(usize),
    Drop(usize),
    Append { sequence: usize, tokens: usize, accept: usize },
    Abandon { sequence: usize, tokens: usize, layers: usize },
    Truncate { sequence: usize, to: i32 },
    Remove { sequence: usize, start: i32, len: i32, renumber: bool },
}

/// Operations on steps of up to `tokens` tokens and positions up to `end`.
fn op(tokens: usize, end: i32) -> impl Strategy<Value = Op> {
    let s = 0..4usize;
    prop_oneof![
        1 => Just(Op::Create),
        2 => s.clone().prop_map(Op::Fork),
        1 => s.clone().prop_map(Op::Drop),
        8 => (s.clone(), 1..tokens, 0..tokens).prop_map(|(sequence, tokens, accept)| Op::Append { sequence, tokens, accept }),
        2 => (s.clone(), 1..9usize, 0..3usize).prop_map(|(sequence, tokens, layers)| Op::Abandon { sequence, tokens, layers }),
        3 => (s.clone(), -2..end).prop_map(|(sequence, to)| Op::Truncate { sequence, to }),
        3 => (s, -2..end, -1..end / 3, any::<bool>())
            .prop_map(|(sequence, start, len, renumber)| Op::Remove { sequence, start, len, renumber }),
    ]
}

/// Keys may err by `tolerance` per element of a key of about unit elements, values too unless it is that of `f32`.
fn check(cache: &KvCache, shape: &ModelShape, model: &BTreeMap<SequenceId, Naive>, tolerance: f32) {
    assert_eq!(cache.sequences().collect::<Vec<_>>(), model.keys().copied().collect::<Vec<_>>());
    for (&id, naive) in model {
        assert_eq!(cache.next_position(id).unwrap().0, naive.next);
        for layer in 0..shape.layers() {
            for head in 0..shape.layer(layer).kv_heads {
                let got = entries(cache, id, layer, head);
                let want: Vec<i32> = naive.entries.iter().map(|e| e.0).collect();
                assert_eq!(got.iter().map(|e| e.position).collect::<Vec<_>>(), want);
                for (e, &(position, token)) in got.iter().zip(&naive.entries) {
                    let key = placed(Kind::Key, shape.layer(layer), token, layer, head, position);
                    let value = placed(Kind::Value, shape.layer(layer), token, layer, head, position);
                    let near = |got: &[f32], want: &[f32], tolerance: f32| {
                        got.iter().zip(want).all(|(a, b)| (a - b).abs() <= tolerance)
                    };
                    assert!(near(&e.key, &key, tolerance), "token {token} at {position}");
                    let tolerance = if tolerance == F32 { 0.0 } else { tolerance };
                    assert!(near(&e.value, &value, tolerance), "token {token} at {position}");
                }
            }
        }
    }
}

/// Keys are rotated in `f32`.
const F32: f32 = 1e-4;

/// Units stand for entries that are there, each for one, from behind the sinks on without a gap.
fn check_units(cache: &KvCache, shape: &ModelShape, model: &BTreeMap<SequenceId, Naive>) {
    let Some(rule) = cache.recipe().index.as_ref().map(|index| index.rule) else { return };
    for (&id, naive) in model {
        for layer in 0..shape.layers() {
            for head in 0..shape.layer(layer).kv_heads {
                let mut members: Vec<usize> = cache
                    .units(id, layer, head)
                    .unwrap()
                    .concat()
                    .iter()
                    .map(|slot| slot.0 as usize)
                    .collect();
                members.sort_unstable();
                assert!(members.iter().copied().eq(rule.sinks..rule.sinks + members.len()), "{members:?}");
                // Truncation makes recent what is in a unit.
                assert!(members.is_empty() || rule.sinks + members.len() <= naive.entries.len());
            }
        }
    }
}

fn run(recipe: &str, tolerance: f32, ops: Vec<Op>) {
    let shape = small_model(2, 2, 1, 4);
    // Little for a policy, which is `full` all the same, and enough for an index.
    let budget = Budget::Tokens(if recipe.contains("index=") { 64 } else { 1 });
    let mut cache =
        KvCache::builder(shape.clone()).recipe(recipe).page_entries(4).budget(budget).build().unwrap();
    let packs = cache.recipe().precision.packs();
    let mut model: BTreeMap<SequenceId, Naive> = BTreeMap::new();
    let mut token = 0u64;
    for op in ops {
        let pick = |i: usize| model.keys().nth(i).copied();
        match op {
            Op::Create => {
                if model.len() < 4 {
                    model.insert(cache.create_sequence(), Naive::default());
                }
            }
            Op::Fork(i) => {
                if let Some(id) = pick(i).filter(|_| model.len() < 4) {
                    let naive = model[&id].clone();
                    model.insert(cache.fork(id).unwrap(), naive);
                }
            }
            Op::Drop(i) => {
                if let Some(id) = pick(i) {
                    cache.drop_sequence(id).unwrap();
                    model.remove(&id);
                }
            }
            Op::Append { sequence, tokens, accept } => {
                if let Some(id) = pick(sequence) {
                    let content: Vec<u64> = (token..token + tokens as u64).collect();
                    token += tokens as u64;
                    let accept = accept.min(tokens);
                    feed(&mut cache, id, &content, accept);
                    let naive = model.get_mut(&id).unwrap();
                    for &t in &content[..accept] {
                        naive.entries.push((naive.next, t));
                        naive.next += 1;
                    }
                }
            }
            Op::Abandon { sequence, tokens, layers } => {
                if let Some(id) = pick(sequence) {
                    let content: Vec<u64> = (0..tokens as u64).map(|i| 10_000 + i).collect();
                    let mut step = cache.begin(id, tokens).unwrap();
                    let start = step.lanes().next().unwrap().1.0;
                    for layer in 0..layers {
                        feed_layer(&mut step, &shape, layer, &content, start);
                    }
                }
            }
            Op::Truncate { sequence, to } => {
                if let Some(id) = pick(sequence) {
                    let naive = model.get_mut(&id).unwrap();
                    let result = cache.truncate(id, Position(to));
                    if to < 0 || to > naive.next {
                        assert!(result.is_err());
                    } else {
                        assert!(result.is_ok());
                        naive.entries.retain(|e| e.0 < to);
                        naive.next = to;
                    }
                }
            }
            Op::Remove { sequence, start, len, renumber } => {
                if let Some(id) = pick(sequence) {
                    let naive = model.get_mut(&id).unwrap();
                    let end = start + len;
                    let mode = if renumber { RemoveMode::Renumber } else { RemoveMode::Keep };
                    let result = cache.remove(id, Position(start)..Position(end), mode);
                    if start < 0 || end < start || end > naive.next {
                        assert!(result.is_err());
                    } else if matches!(&result, Err(Error::Recipe(RecipeError::Conflict { .. }))) {
                        // Packed keys behind the range: nothing may have changed.
                        assert!(renumber && packs);
                    } else {
                        assert!(result.is_ok());
                        naive.entries.retain(|e| e.0 < start || e.0 >= end);
                        if renumber {
                            naive.entries.iter_mut().filter(|e| e.0 >= end).for_each(|e| e.0 -= len);
                            naive.next -= len;
                        }
                    }
                }
            }
        }
        check(&cache, &shape, &model, tolerance);
        check_units(&cache, &shape, &model);
    }
    let ids: Vec<SequenceId> = model.keys().copied().collect();
    for id in ids {
        cache.drop_sequence(id).unwrap();
    }
    assert_eq!(cache.memory().resident, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_operations_agree_with_the_naive_model(ops in proptest::collection::vec(op(20, 60), 1..40)) {
        run("full", F32, ops);
    }

    #[test]
    fn any_operations_agree_with_the_naive_model_below_an_index(
        ops in proptest::collection::vec(op(90, 300), 1..20),
        index in prop::sample::select(&[
            "pages(page=4,sinks=1,recent=3,outliers=2,min_context=0)",
            "quest(page=2,recent=2,dense=0,min_context=0)",
            "auto(size=4,segment=32,update=8,recent=5,pieces=0,min_context=0)",
        ][..]),
    ) {
        run(&format!("full+index={index}"), F32, ops);
    }

    #[test]
    fn any_operations_agree_with_the_naive_model_in_packed_pages(
        ops in proptest::collection::vec(op(90, 300), 1..30),
        tail in prop::sample::select(&[0, 3][..]),
    ) {
        // Rows that share a page with removed ones are packed again, each time within half a step of 1/127 of the
        // largest element, which is √2 at most after rotation.
        run(&format!("full+k=int8+v=int8+exact=f32(sinks=2,tail={tail})"), 0.05, ops);
    }
}
