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
/// Tokens stored in all layers together, of a step at a fixed budget: the same memory whatever the length.
const STORED: usize = 1 << 20;
/// Tokens of a chunk of the prompt.
const CHUNK: usize = 2048;

/// Tokens at the end of the prompt whose queries are there too, and steps that ask for something else each.
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

/// The steps of a benchmark: they ask for different things in turn, as the tokens of a text do.
struct Steps {
    cache: KvCache,
    id: SequenceId,
    /// Queries of [`ASKING`] tokens, keys and values of one.
    rows: [Vec<f32>; 3],
    out: Vec<f32>,
    turn: usize,
}

impl Steps {
    /// A cache after its prompt and some steps, and what they cost.
    fn new(recipe: &str, budget: usize, (layers, tokens): (usize, usize)) -> Self {
        let mut random = Random::new(2);
        let q = queries(&mut random, ASKING);
        let [k, v] = [(); 2].map(|()| random.rows(HEADS * DIM, 1.0, DType::F32));
        let began = Instant::now();
        let (cache, id) = prompted(recipe, budget, layers, tokens);
        let built = began.elapsed();
        let mut steps = Self { cache, id, rows: [q, k, v], out: vec![0.0; HEADS * GROUP * DIM], turn: 0 };
        let (mut bytes, mut entries) = (0, 0);
        for _ in 0..ASKING {
            steps.step();
            bytes += steps.cache.stats(id).unwrap().total().bytes_read_per_step;
            let read =
                |layer| steps.cache.last_read(id, layer).unwrap().map_or(tokens * HEADS, |r| r.entries);
            entries += (0..layers).map(read).sum::<usize>();
        }
        let all = layers * tokens * HEADS * DIM * 4;
        println!(
            "{recipe}: prompt in {:.1} s, a step reads {} entries of a KV head and {:.2} % of the f16 bytes, the index holds {:.2} %",
            built.as_secs_f64(),
            entries / (ASKING * layers * HEADS),
            100.0 * bytes as f64 / (ASKING * all) as f64,
            100.0 * steps.cache.stats(id).unwrap().total().bytes_index as f64 / all as f64,
        );
        steps
    }

    /// One attend of a token in every layer, which is rolled back: the state stays what it is. The time of a layer.
    fn step(&mut self) -> Duration {
        let view = |x, heads| TensorView::token_major(x, 1, heads, DIM).unwrap();
        let layers = self.cache.shape().layers();
        let mut step = self.cache.begin(self.id, 1).unwrap();
        let [q, k, v] = &self.rows;
        let mut asked = q.chunks_exact(HEADS * GROUP * DIM).cycle().skip(self.turn % ASKING);
        self.turn += 1;
        let began = Instant::now();
        for layer in 0..layers {
            let out = TensorViewMut::token_major(&mut self.out[..], 1, HEADS * GROUP, DIM).unwrap();
            let q = view(asked.next().unwrap(), HEADS * GROUP);
            step.attend(layer, q, view(&k[..], HEADS), view(&v[..], HEADS), out).unwrap();
        }
        began.elapsed() / layers as u32
    }
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
            // Only what is not filtered out is built.
            let mut built = None;
            group.bench_function(&recipe, |b| {
                let steps = built.get_or_insert_with(|| Steps::new(&recipe, budget, (1, tokens)));
                b.iter_custom(|times| (0..times).map(|_| steps.step()).sum());
            });
        }
    }
}

/// Beside everything, as many entries as `auto` needs for an error of 5 % on a real model's queries (`docs/benchmarks.md`), in
/// thousandths of all; larger clusters with about the same error.
fn goal(c: &mut Criterion) {
    let tokens = 128 << 10;
    let mut group = c.benchmark_group(format!("retrieval/goal/n{tokens}"));
    let larger = [("auto(size=24,widen=6)", 25), ("auto(size=32,widen=6)", 30)];
    for (recipe, share) in [("full", 1000), ("auto", 26)].into_iter().chain(larger) {
        let mut built = None;
        group.bench_function(format!("{share}/{recipe}"), |b| {
            let steps = built.get_or_insert_with(|| Steps::new(recipe, tokens * share / 1000, (1, tokens)));
            b.iter_custom(|times| (0..times).map(|_| steps.step()).sum());
        });
    }
}

/// The same budget whatever the length: what grows is the search. Several layers in turn, as a model's are, so that nothing of
/// one layer is in a cache when it is its turn again, and more of them where the context is short, so that pages lie as far
/// apart.
fn fixed(c: &mut Criterion) {
    let mut group = c.benchmark_group("retrieval/fixed");
    for budget in [1024, 4096] {
        for tokens in [32 << 10, 128 << 10] {
            for own in ["", "levels=2,", "levels=2,fan=20,"] {
                let recipe = format!("squeezed({own}rounds=4,segment=2048)");
                let mut built = None;
                group.bench_function(format!("b{budget}/n{tokens}/{recipe}"), |b| {
                    let steps =
                        built.get_or_insert_with(|| Steps::new(&recipe, budget, (STORED / tokens, tokens)));
                    b.iter_custom(|times| (0..times).map(|_| steps.step()).sum());
                });
            }
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
    targets = decode, goal, fixed, append
}
criterion_main!(benches);
