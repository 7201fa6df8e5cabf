//! Codes that know the queries: made by what recorded queries make of an error, of keys without their rotary embedding.

use super::naive::{dot, naive, units, wide};
use super::{BUDGET, PROMPT, Row, argument, check_choice, model, prompted, queries};
use crate::support::{Entry, Kind, backends, entries, feed, placed, rotate};
use kvsieve::backend::{Backend, Cpu};
use kvsieve::cache::RemoveMode;
use kvsieve::geometry::{KeyPhase, LayerShape, ModelShape, Position, Rotary, RotaryLayout};
use kvsieve::index::{Codebook, Codebooks, windowed};
use kvsieve::testing::Random;
use kvsieve::view::{DType, TensorView};
use kvsieve::{Budget, KvCache, SequenceId};
#[cfg(feature = "learned")]
use kvsieve::{
    error::ProfileError,
    profile::{Array, Part, Profile},
};
use std::sync::Arc;

const OWN: &str = "train=240,rounds=5,sinks=4,recent=20,min_context=0";

/// Codes within clusters.
const WITHIN: &str = "size=4,segment=64,update=16,pieces=8,recent=20,min_context=0";

/// Queries that the recipes record of a prompt: all of it.
const WINDOW: u64 = PROMPT;

/// The codewords of a KV head, `[levels][d_k]`.
fn words(book: &Codebook) -> Vec<Vec<f32>> {
    let layout = book.layout();
    assert_eq!(layout.codes, 1, "codes of whole keys");
    let word = |c: usize| {
        let (mut words, mut key) = (vec![0; layout.words()], vec![0.0; book.dims()]);
        layout.pack(&[c as u16], &mut words);
        book.decode(&words, &mut key);
        key
    };
    (0..book.levels()).map(word).collect()
}

#[test]
fn what_is_chosen_is_what_codes_by_a_naive_implementation_choose() {
    for own in ["", ",rotary=true", ",aware=no", ",levels=20,group=sum,distance=100", ",group=max,queries=40"]
    {
        let recipe = format!("a2ats({OWN}{own})");
        let given = |name, otherwise: &'static str| argument(&recipe, name).unwrap_or(otherwise).to_owned();
        let at: Option<i32> =
            (given("rotary", "true") == "windowed").then(|| given("distance", "2048").parse().unwrap());
        let recorded: u64 = given("queries", "2048").parse().unwrap();
        let recorded = recorded.min(PROMPT);
        for backend in backends() {
            let (mut cache, id) = prompted(&recipe, &backend, &[200, PROMPT - 200]);
            let (token, position) = (900, PROMPT as i32 - 1);
            let shape = cache.shape().layer(1).clone();
            let rotary = shape.rotary.clone().unwrap();
            let rows: Vec<f32> =
                (0..6).flat_map(|h| placed(Kind::Query, &shape, token, 1, h, position)).collect();
            let view = TensorView::token_major(&rows[..], 1, 6, 16).unwrap();
            let selection = cache.choose(id, 1, view).unwrap();
            let books = cache.codebooks(id).unwrap();
            for head in 0..2 {
                let book = books.layers[1][head].as_deref().unwrap();
                assert_eq!(book.aware(), given("aware", "yes") == "yes", "{recipe}");
                let words = words(book);
                let all = entries(&cache, id, 1, head);
                let units = units(&cache, id, 1, head);
                // Queries of the end of the prompt as codes know them: at a distance, or where they stood.
                let window: Vec<Vec<f32>> = (PROMPT - recorded..PROMPT)
                    .flat_map(|t| queries(&shape, 1, head, &[(t, at.unwrap_or(t as i32))]))
                    .map(|(query, _)| query)
                    .collect();
                let far = |key: &[f32], word: &[f32]| -> f64 {
                    let error: Vec<f64> = key.iter().zip(word).map(|(k, w)| f64::from(k - w)).collect();
                    match book.aware() {
                        true => window.iter().map(|query| dot(query, &error).powi(2)).sum(),
                        false => error.iter().map(|e| e * e).sum(),
                    }
                };
                let coded: Vec<Entry> = all
                    .iter()
                    .map(|entry| {
                        let mut key = entry.key.clone();
                        if at.is_some() {
                            rotate(&rotary, &mut key, -entry.position);
                        }
                        let nearest = words.iter().min_by(|a, b| far(&key, a).total_cmp(&far(&key, b)));
                        let Entry { position, value, .. } = entry.clone();
                        Entry { bias: 0.0, position, key: nearest.unwrap().clone(), value }
                    })
                    .collect();
                let of = (1, head);
                let (naive, codes) =
                    (naive((&cache, id), of, &all, &units), naive((&cache, id), of, &coded, &units));
                let asked = queries(&shape, 1, head, &[(token, position)]);
                let turned = queries(&shape, 1, head, &[(token, at.unwrap_or(position))]);
                let rows: Vec<Row> = asked
                    .iter()
                    .zip(&turned)
                    .map(|((query, position), (turned, _))| {
                        let units = codes.row(turned, *position).units;
                        Row { units, ..naive.row(query, *position) }
                    })
                    .collect();
                let slots = &selection.slots[selection.offsets[head]..selection.offsets[head + 1]];
                // Entries of one code are equal; ranks that a rounding exchanges are neighbours.
                let tolerance = if given("group", "union") == "union" { 6.0 } else { 2e-3 };
                let what = format!("{}: {recipe}", backend.name());
                if given("group", "union") != "union" {
                    check_choice(&what, &naive, &rows, slots, tolerance);
                    continue;
                }
                // Each row's best are read: as many as all rows' best together can be.
                assert_eq!(slots.len(), BUDGET, "{what}");
                let read = |slot: usize| slots.iter().any(|s| s.0 as usize == slot);
                for row in &rows {
                    let mut order: Vec<usize> = (0..units.len()).collect();
                    order.sort_by(|&a, &b| row.units[b].total_cmp(&row.units[a]));
                    let least = row.units[order[(BUDGET - 24) / 3 - 1]] + 1e-4;
                    let best = order.iter().filter(|&&unit| row.units[unit] > least);
                    assert!(best.clone().count() > 10, "{what}");
                    best.for_each(|&unit| assert!(read(units[unit][0]), "{what}: unit {unit}"));
                }
            }
        }
    }
}

#[test]
fn rows_are_placed_as_the_formula_says() {
    let mut random = Random::new(3);
    for backend in backends() {
        for (layout, dims) in [(RotaryLayout::HalfSplit, 16), (RotaryLayout::Interleaved, 12)] {
            let rotary = Rotary::new(dims, 10_000.0, layout);
            let shape = LayerShape::new(4, 2, 16).with_rotary(rotary);
            let positions = [0, 3, 77, 5000, 100_001];
            let before = random.rows(4 * 5 * 16, 1.0, DType::F32);
            for target in [0, 2048] {
                let mut rows = before.clone();
                windowed::place(&*backend, &shape, target, &positions, &mut rows).unwrap();
                for (i, (row, before)) in rows.chunks_exact(16).zip(before.chunks_exact(16)).enumerate() {
                    let mut want = wide(before);
                    for pair in 0..dims / 2 {
                        let (a, b) = match layout {
                            RotaryLayout::HalfSplit => (pair, pair + dims / 2),
                            RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
                        };
                        let turns = 10_000f64.powf(-2.0 * pair as f64 / dims as f64);
                        let (sin, cos) = (f64::from(target - positions[i % 5]) * turns).sin_cos();
                        let (x, y) = (want[a], want[b]);
                        (want[a], want[b]) = (x * cos - y * sin, x * sin + y * cos);
                    }
                    let error =
                        row.iter().zip(&want).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max);
                    assert!(error < 1e-5, "{}: row {i} to {target}: {error}", backend.name());
                }
            }
            // What carries no rotary embedding is where it is.
            let still = LayerShape { key_phase: KeyPhase::Unrotated, ..shape };
            let mut rows = before.clone();
            windowed::place(&*backend, &still, 2048, &positions, &mut rows).unwrap();
            assert_eq!(rows, before);
        }
    }
}

/// The mean over the heads' recorded queries of what codes err in a logit, squared.
fn error(cache: &KvCache, id: SequenceId, shape: &LayerShape) -> f64 {
    let books = cache.codebooks(id).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for head in 0..2 {
        let words = words(books.layers[1][head].as_deref().unwrap());
        let window = (PROMPT - WINDOW..PROMPT).flat_map(|t| queries(shape, 1, head, &[(t, 2048)]));
        let window: Vec<Vec<f32>> = window.map(|(query, _)| query).collect();
        for entry in &entries(cache, id, 1, head)[4..280] {
            let mut key = entry.key.clone();
            rotate(shape.rotary.as_ref().unwrap(), &mut key, -entry.position);
            let far = |word: &Vec<f32>| -> f64 {
                let error: Vec<f64> = key.iter().zip(word).map(|(k, w)| f64::from(k - w)).collect();
                window.iter().map(|query| dot(query, &error).powi(2)).sum()
            };
            sum += words.iter().map(far).fold(f64::INFINITY, f64::min);
            count += window.len();
        }
    }
    sum / count as f64
}

#[test]
fn codes_that_know_the_queries_err_less_for_them() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let of = |own: &str| {
        let (cache, id) = prompted(&format!("a2ats({OWN},rotary=windowed{own})"), &backend, &[PROMPT]);
        error(&cache, id, cache.shape().layer(1))
    };
    let (aware, plain) = (of(""), of(",aware=no"));
    assert!(aware < plain, "{aware}, {plain} without queries");
}

#[test]
fn queries_are_recorded_until_something_is_learnt_from_them() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let recipe = "a2ats(rotary=windowed,recent=20,min_context=0,queries=100)";
    let (mut cache, id) = prompted(recipe, &backend, &[PROMPT]);
    let books = |cache: &KvCache| cache.codebooks(id).unwrap().layers.concat();
    let bytes = |cache: &KvCache| {
        let total = cache.stats(id).unwrap().total();
        total.bytes_resident - total.bytes_index
    };
    for token in PROMPT..PROMPT + 239 {
        feed(&mut cache, id, &[token], 1);
        assert!(books(&cache).iter().all(Option::is_none), "fewer than 512 entries at token {token}");
    }
    let before = bytes(&cache);
    feed(&mut cache, id, &[PROMPT + 239], 1);
    assert!(books(&cache).iter().all(|book| book.as_ref().is_some_and(|b| b.aware() && b.levels() == 128)));
    // The queries of two layers go, and an entry comes; codes and codebooks are no part of this.
    let freed = before - bytes(&cache);
    assert!(freed > 2 * 100 * 6 * 16 * 4 - 5000, "{freed}: nothing looks at queries any more");
    assert_eq!(cache.units(id, 1, 0).unwrap().len(), 512);
    // Position 0 is where it was, and codebooks are still true.
    let learnt = books(&cache);
    cache.remove(id, Position(50)..Position(61), RemoveMode::Renumber).unwrap();
    feed(&mut cache, id, &[1000], 1);
    assert_eq!(books(&cache), learnt);
    assert_eq!(cache.units(id, 1, 0).unwrap().len(), 502);

    // A host that only appends has no queries to learn from.
    let shape = ModelShape::uniform(1, cache.shape().layer(0).clone()).unwrap();
    let mut cache = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(BUDGET)).build().unwrap();
    let id = cache.create_sequence();
    let rows = Random::new(1).rows(600 * 2 * 16, 1.0, DType::F32);
    let mut step = cache.begin(id, 600).unwrap();
    let view = || TensorView::token_major(&rows[..], 600, 2, 16).unwrap();
    step.append(0, view(), view()).unwrap();
    step.commit(600).unwrap();
    cache.end_prefill(id).unwrap();
    let books = cache.codebooks(id).unwrap();
    assert!(books.layers[0].iter().all(|book| book.as_ref().is_some_and(|book| !book.aware())));
}

#[test]
fn codebooks_that_are_given_are_used_and_others_are_refused() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let recipe = format!("a2ats({OWN},rotary=windowed)");
    let (mut first, id) = prompted(&recipe, &backend, &[PROMPT]);
    let books = first.codebooks(id).unwrap();
    let build = |shape: ModelShape, recipe: &str, books: &Codebooks| {
        let builder = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(BUDGET));
        builder.page_entries(32).codebooks(books.clone()).build()
    };
    let mut second = build(model(), &recipe, &books).unwrap();
    let other = second.create_sequence();
    // They need not wait for the end of the prompt.
    let tokens: Vec<u64> = (0..PROMPT).collect();
    feed(&mut second, other, &tokens, tokens.len());
    assert_eq!(second.units(other, 1, 0).unwrap().len(), PROMPT as usize - 24);
    for token in PROMPT..PROMPT + 5 {
        let out = [feed(&mut first, id, &[token], 1), feed(&mut second, other, &[token], 1)];
        assert_eq!(out[0], out[1]);
        assert_eq!(first.last_choice(id, 1).unwrap(), second.last_choice(other, 1).unwrap());
    }
    let refused = |shape: ModelShape, recipe: &str, books: &Codebooks| {
        build(shape, recipe, books).map(drop).unwrap_err().to_string()
    };
    let with = |layers: usize, hq: usize, h: usize, d: usize| crate::support::small_model(layers, hq, h, d);
    for (shape, recipe, why) in [
        (with(3, 6, 2, 16), &*recipe, "codebooks for 2 layers"),
        (with(2, 6, 3, 16), &recipe, "codebooks for 2 KV heads"),
        (with(2, 6, 2, 8), &recipe, "codewords have 16 dimensions"),
        (model(), "a2ats(rotary=windowed,levels=200)", "1 indices of 16 bits"),
        (model(), "a2ats(rotary=windowed,distance=100)", "learnt for queries at 2048"),
        (model(), "a2ats(rotary=true)", "learnt for queries at 2048"),
        (model(), "quest", "no index of codes"),
        (model(), "full", "no index of codes"),
    ] {
        let said = refused(shape, recipe, &books);
        assert!(said.contains(why), "{recipe}: {said}");
    }
    // Codes of one layout, but of something else.
    let within = format!("auto({WITHIN})");
    let (cache, id) = prompted(&within, &backend, &[PROMPT]);
    let books = cache.codebooks(id).unwrap();
    build(model(), &within, &books).unwrap();
    let said = refused(model(), "pq(pieces=8)", &books);
    assert!(said.contains("what keys have beside means of units"), "{said}");
}

/// The same books through the bytes of a profile.
#[cfg(feature = "learned")]
#[test]
fn codebooks_survive_a_file_and_damaged_ones_are_refused() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    for recipe in [
        format!("a2ats({OWN},rotary=windowed)"),
        format!("a2ats({OWN},aware=no)"),
        format!("auto({WITHIN})"),
        "pq(pieces=5,train=128,rounds=3,sinks=4,recent=20,min_context=0)".to_owned(),
    ] {
        let (mut first, id) = prompted(&recipe, &backend, &[PROMPT]);
        let books = first.codebooks(id).unwrap();
        let profile = Profile::new(&model()).unwrap();
        let profile = profile.with(Codebooks::PART, books.to_part("a test").unwrap());
        let read = Profile::from_bytes(profile.to_bytes().unwrap()).unwrap();
        let again = Codebooks::of(&read, &model()).unwrap();
        assert_eq!(again, books, "{recipe}");
        let builder = KvCache::builder(model()).recipe(&*recipe).budget(Budget::Tokens(BUDGET));
        let mut second = builder.page_entries(32).codebooks(again).build().unwrap();
        let other = second.create_sequence();
        let tokens: Vec<u64> = (0..PROMPT).collect();
        feed(&mut second, other, &tokens, tokens.len());
        second.end_prefill(other).unwrap();
        let out = [feed(&mut first, id, &[PROMPT], 1), feed(&mut second, other, &[PROMPT], 1)];
        assert_eq!(out[0], out[1], "{recipe}");
    }
    let (cache, id) = prompted(&format!("a2ats({OWN},rotary=windowed)"), &backend, &[PROMPT]);
    let part = cache.codebooks(id).unwrap().to_part("a test").unwrap();
    let refused = |name: &str, array: Array| {
        let name = format!("layers.1.heads.0.{name}");
        assert!(part.array(&name).is_some(), "{name}");
        let profile = Profile::new(&model()).unwrap().with(Codebooks::PART, part.clone().with(name, array));
        Codebooks::of(&profile, &model()).unwrap_err()
    };
    let good = part.array("layers.1.heads.0.about").unwrap().numbers().to_vec();
    for (at, value, want) in [
        (0, 0.0, "1 to 1024 indices"),
        (0, 2000.0, "1 to 1024 indices"),
        (0, 1.5, "a whole number"),
        (0, 1e30, "a whole number"),
        (1, 5.0, "4, 8 or 16 bits"),
        (2, 0.0, "1 codeword"),
        (2, 70_000.0, "1 codeword"),
        (3, -1.0, "a whole number"),
        (4, 2.0, "0 or 1"),
    ] {
        let mut about = good.clone();
        about[at] = value;
        let error = refused("about", Array::new(vec![5], about).unwrap());
        let named = matches!(&error, ProfileError::Range { at: found, .. } if *found == at);
        assert!(named && error.to_string().contains(want), "{error}");
    }
    // Fewer codewords than it says, a center of another dimension, a metric of another piece.
    let zeros = |extents: Vec<usize>| {
        let count = extents.iter().product();
        Array::new(extents, vec![0.0; count]).unwrap()
    };
    for (name, array) in [
        ("about", zeros(vec![4])),
        ("words", zeros(vec![32])),
        ("center", zeros(vec![15])),
        ("metric.0", zeros(vec![16, 15])),
    ] {
        let error = refused(name, array);
        assert!(matches!(error, ProfileError::Extents { part: "codebooks", .. }), "{name}: {error}");
    }
    let empty = Profile::new(&model()).unwrap();
    assert!(matches!(Codebooks::of(&empty, &model()), Err(ProfileError::NoPart { part: "codebooks", .. })));
    let mut lacking = Part::new("");
    for (name, array) in part.arrays().filter(|(name, _)| !name.ends_with("0.words")) {
        lacking = lacking.with(name, array.clone());
    }
    let lacking = empty.clone().with(Codebooks::PART, lacking);
    assert!(matches!(Codebooks::of(&lacking, &model()), Err(ProfileError::NoArray { .. })));
    let other = crate::support::small_model(2, 6, 2, 8);
    let whole = empty.with(Codebooks::PART, part);
    assert!(matches!(Codebooks::of(&whole, &other), Err(ProfileError::Geometry { .. })));
}

#[test]
fn keys_that_cannot_be_turned_back_are_refused() {
    let build = |shape: LayerShape, recipe: &str| {
        let shape = ModelShape::uniform(1, shape).unwrap();
        KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(600)).build().map(drop)
    };
    let unknown = LayerShape::new(6, 2, 16);
    let said = build(unknown.clone(), "a2ats(rotary=windowed)").unwrap_err().to_string();
    assert!(said.contains("layer 0 without a rotary description") && said.contains("rotary=true"), "{said}");
    build(unknown.clone(), "a2ats(rotary=true)").unwrap();
    build(unknown.clone(), "a2ats(rotary=windowed,dense=1)").unwrap();
    build(LayerShape { key_phase: KeyPhase::Unrotated, ..unknown }, "a2ats(rotary=windowed)").unwrap();
}
