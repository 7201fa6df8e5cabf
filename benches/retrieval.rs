//! A decode step that reads by index beside one that reads everything, and what making and keeping the index costs.
//!
//! `cargo bench --bench retrieval` on a quiet machine. One layer, 8 KV heads, d 128, G 4, f16 rows. Keys and values drift
//! through the text as a real model's do, so that pages and clusters have something in common; how good a choice is no
//! benchmark can tell: that is `kvsieve eval`.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "benchmarks")]

use criterion::{Criterion, criterion_group, criterion_main};
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::testing::Random;
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};
use std::time::{Duration, Instant};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
/// Layers of a step at a fixed budget.
const LAYERS: usize = 8;
/// Tokens of a chunk of the prompt.
const CHUNK: usize = 2048;

/// Tokens at the end of the prompt whose queries are there too.
const ASKING: usize = 32;

/// Queries of some tokens, `[tokens, HEADS · GROUP, DIM]`: those of a head have much in common, as a real model's do.
fn queries(random: &mut Random, tokens: usize) -> Vec<f32> {
    let own = Random::new(4).rows(HEADS * GROUP * DIM, 0.8, DType::F32);
    let noise = random.rows(tokens * own.len(), 0.6, DType::F32);
    noise.iter().zip(own.iter().cycle()).map(|(noise, own)| own + noise).collect()
}

/// Rows that wander: each is near the last one.
fn drift(random: &mut Random, state: &mut [f32], tokens: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(tokens * state.len());
    for _ in 0..tokens {
        let noise = random.rows(state.len(), 1.0, DType::F32);
        for (x, noise) in state.iter_mut().zip(&noise) {
            *x = 0.97 * *x + 0.24 * noise;
            rows.push(*x + 0.5 * noise);
        }
    }
    rows
}

fn prompted(recipe: &str, budget: usize, layers: usize, tokens: usize) -> (KvCache, SequenceId) {
    let shape = ModelShape::uniform(layers, LayerShape::new(HEADS * GROUP, HEADS, DIM)).unwrap();
    let builder = KvCache::builder(shape).recipe(format!("{recipe}+k=f16+v=f16"));
    let mut cache = builder.budget(Budget::Tokens(budget)).build().unwrap();
    let id = cache.create_sequence();
    let mut random = Random::new(1);
    let mut states = [vec![0.0; HEADS * DIM], vec![0.0; HEADS * DIM]];
    for _ in 0..tokens / CHUNK {
        let [k, v] = states.each_mut().map(|state| drift(&mut random, state, CHUNK));
        let mut step = cache.begin(id, CHUNK).unwrap();
        let view = |x| TensorView::token_major(x, CHUNK, HEADS, DIM).unwrap();
        (0..layers).for_each(|layer| step.append(layer, view(&k[..]), view(&v[..])).unwrap());
        step.commit(CHUNK).unwrap();
    }
    // An index that calibrates wants queries.
    let [k, v] = states.each_mut().map(|state| drift(&mut random, state, ASKING));
    let q = queries(&mut random, ASKING);
    let mut out = vec![0.0; q.len()];
    let mut step = cache.begin(id, ASKING).unwrap();
    let view = |x, heads| TensorView::token_major(x, ASKING, heads, DIM).unwrap();
    for layer in 0..layers {
        let into = TensorViewMut::token_major(&mut out[..], ASKING, HEADS * GROUP, DIM).unwrap();
        step.attend(layer, view(&q[..], HEADS * GROUP), view(&k[..], HEADS), view(&v[..], HEADS), into)
            .unwrap();
    }
    step.commit(ASKING).unwrap();
    cache.end_prefill(id).unwrap();
    (cache, id)
}

/// One attend of a token in every layer, which is rolled back: the state stays what it is. The time of a layer.
fn step(cache: &mut KvCache, id: SequenceId, rows: &[Vec<f32>; 3], out: &mut [f32]) -> Duration {
    let view = |x, heads| TensorView::token_major(x, 1, heads, DIM).unwrap();
    let layers = cache.shape().layers();
    let mut step = cache.begin(id, 1).unwrap();
    let [q, k, v] = rows;
    let began = Instant::now();
    for layer in 0..layers {
        let out = TensorViewMut::token_major(&mut *out, 1, HEADS * GROUP, DIM).unwrap();
        step.attend(layer, view(&q[..], HEADS * GROUP), view(&k[..], HEADS), view(&v[..], HEADS), out)
            .unwrap();
    }
    began.elapsed() / layers as u32
}

/// A cache after its prompt and a first step, and what they cost.
fn report(
    recipe: &str,
    budget: usize,
    (layers, tokens): (usize, usize),
    rows: &[Vec<f32>; 3],
    out: &mut [f32],
) -> (KvCache, SequenceId) {
    let began = Instant::now();
    let (mut cache, id) = prompted(recipe, budget, layers, tokens);
    let built = began.elapsed();
    step(&mut cache, id, rows, out);
    let stats = cache.stats(id).unwrap().total();
    let all = layers * tokens * HEADS * DIM * 4;
    println!(
        "{recipe}: prompt in {:.1} s, a step reads {:.2} % of the f16 bytes, the index holds {:.2} %",
        built.as_secs_f64(),
        100.0 * stats.bytes_read_per_step as f64 / all as f64,
        100.0 * stats.bytes_index as f64 / all as f64,
    );
    (cache, id)
}

fn decode(c: &mut Criterion) {
    for tokens in [32 << 10, 128 << 10] {
        let mut group = c.benchmark_group(format!("retrieval/n{tokens}"));
        let budget = tokens / 25;
        for recipe in [
            "full".to_owned(),
            "auto".to_owned(),
            "auto(pieces=0)".to_owned(),
            "pages".to_owned(),
            "quest(dense=0)".to_owned(),
            "quest(dense=0,store=int8)".to_owned(),
            "lserve".to_owned(),
            "squeezed(rounds=4,segment=2048)".to_owned(),
            "squeezed(levels=2,rounds=4,segment=2048)".to_owned(),
            "clusterkv(dense=0,rounds=4,segment=2048)".to_owned(),
            "retroinfer(rounds=4,segment=2048)".to_owned(),
            "pq".to_owned(),
            "a2ats".to_owned(),
        ] {
            let mut random = Random::new(2);
            let q = queries(&mut random, 1);
            let [k, v] = [(); 2].map(|()| random.rows(HEADS * DIM, 1.0, DType::F32));
            let rows = [q, k, v];
            let mut out = vec![0.0; HEADS * GROUP * DIM];
            // Only what is not filtered out is built.
            let mut built = None;
            group.bench_function(&recipe, |b| {
                let (cache, id) =
                    built.get_or_insert_with(|| report(&recipe, budget, (1, tokens), &rows, &mut out));
                b.iter_custom(|times| (0..times).map(|_| step(cache, *id, &rows, &mut out)).sum());
            });
        }
    }
}

/// The same budget whatever the length: what grows is the search. Several layers in turn, as a model's are, so that nothing of
/// one layer is in a cache when it is its turn again, however short the context.
fn fixed(c: &mut Criterion) {
    let mut group = c.benchmark_group("retrieval/fixed");
    for tokens in [32 << 10, 128 << 10] {
        for recipe in [
            "squeezed(rounds=4,segment=2048)",
            "squeezed(levels=2,rounds=4,segment=2048)",
            "squeezed(levels=2,fan=20,rounds=4,segment=2048)",
        ] {
            let mut random = Random::new(2);
            let q = queries(&mut random, 1);
            let [k, v] = [(); 2].map(|()| random.rows(HEADS * DIM, 1.0, DType::F32));
            let rows = [q, k, v];
            let mut out = vec![0.0; HEADS * GROUP * DIM];
            let mut built = None;
            group.bench_function(format!("n{tokens}/{recipe}"), |b| {
                let (cache, id) =
                    built.get_or_insert_with(|| report(recipe, 1024, (LAYERS, tokens), &rows, &mut out));
                b.iter_custom(|times| (0..times).map(|_| step(cache, *id, &rows, &mut out)).sum());
            });
        }
    }
}

/// What a decoded token costs to store and to index: most add nothing to an index but themselves, and one of many makes
/// units of all that waited.
fn append(c: &mut Criterion) {
    let mut group = c.benchmark_group("retrieval/append");
    let tokens = 32 << 10;
    for recipe in [
        "full",
        "auto",
        "auto(pieces=0)",
        "pages",
        "quest(dense=0)",
        "lserve",
        "squeezed",
        "squeezed(levels=2)",
        "clusterkv(dense=0)",
        "retroinfer",
        "pq",
        "a2ats",
    ] {
        let mut random = Random::new(3);
        let mut states = [vec![0.0; HEADS * DIM], vec![0.0; HEADS * DIM]];
        let mut built = None;
        let mut most = Duration::ZERO;
        group.bench_function(recipe, |b| {
            let (cache, id) = built.get_or_insert_with(|| prompted(recipe, 2048, 1, tokens));
            b.iter_custom(|times| {
                let each = (0..times).map(|_| {
                    let [k, v] = states.each_mut().map(|state| drift(&mut random, state, 1));
                    let view = |x| TensorView::token_major(x, 1, HEADS, DIM).unwrap();
                    let began = Instant::now();
                    let mut step = cache.begin(*id, 1).unwrap();
                    step.append(0, view(&k[..]), view(&v[..])).unwrap();
                    step.commit(1).unwrap();
                    let took = began.elapsed();
                    most = most.max(took);
                    took
                });
                each.sum()
            });
        });
        if built.is_some() {
            println!("{recipe}: at most {:.2} ms for a token", 1e3 * most.as_secs_f64());
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = decode, fixed, append
}
criterion_main!(benches);
