//! A decode step over keys and values of low rank beside one over exact f16 rows, per layer.
//!
//! `cargo bench --features testing --bench low_rank` on a quiet machine. 32,768 tokens, 8 KV heads, d 128, G 4, f16; a group
//! of four layers at the paper's ranks (512 and 768) and single layers (128 and 256). Queries drift from step to step, so
//! that an index chooses much the same entries again; a step goes through all layers and is divided by their number.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "benchmarks")]

use criterion::{Criterion, criterion_group, criterion_main};
use kvsieve::geometry::{LayerShape, ModelShape, Rotary, RotaryLayout};
use kvsieve::testing::Random;
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};
use std::time::{Duration, Instant};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const TOKENS: usize = 32 << 10;
/// Tokens of a chunk of the prompt.
const CHUNK: usize = 2048;
/// Entries of a KV head that a step reads by index.
const BUDGET: usize = 2048;

/// Rows that wander: each is near the last one.
fn drift(random: &mut Random, state: &mut [f32], tokens: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(tokens * state.len());
    for _ in 0..tokens {
        let noise = random.rows(state.len(), 1.0, DType::F32);
        for (x, noise) in state.iter_mut().zip(&noise) {
            *x = 0.97 * *x + 0.24 * noise;
            rows.push(*x + 0.25 * noise);
        }
    }
    rows
}

struct Run {
    cache: KvCache,
    id: SequenceId,
    layers: usize,
    random: Random,
    queries: Vec<f32>,
}

impl Run {
    fn new(recipe: &str, layers: usize) -> Self {
        let rotary = Rotary::new(DIM, 500_000.0, RotaryLayout::HalfSplit);
        let layer = LayerShape::new(HEADS * GROUP, HEADS, DIM).with_rotary(rotary);
        let builder = KvCache::builder(ModelShape::uniform(layers, layer).unwrap());
        let builder = builder.recipe(format!("{recipe}+k=f16+v=f16+exact=f16(sinks=4,tail=64)"));
        let mut cache = builder.budget(Budget::Tokens(BUDGET)).build().unwrap();
        let id = cache.create_sequence();
        let mut random = Random::new(1);
        let mut states = vec![vec![0.0; HEADS * DIM]; 2 * layers];
        for _ in 0..TOKENS / CHUNK {
            let mut step = cache.begin(id, CHUNK).unwrap();
            for (layer, states) in states.chunks_exact_mut(2).enumerate() {
                let (k, v) =
                    (drift(&mut random, &mut states[0], CHUNK), drift(&mut random, &mut states[1], CHUNK));
                let view = |x| TensorView::token_major(x, CHUNK, HEADS, DIM).unwrap();
                step.append(layer, view(&k[..]), view(&v[..])).unwrap();
            }
            step.commit(CHUNK).unwrap();
        }
        let began = Instant::now();
        cache.end_prefill(id).unwrap();
        let (took, stats) = (began.elapsed(), cache.stats(id).unwrap().total());
        let exact = layers * HEADS * TOKENS * DIM * 4;
        println!(
            "{recipe}, {layers} layers: prompt ended in {:.1} s, {:.1} % of the f16 bytes resident, {} of {} entries factored",
            took.as_secs_f64(),
            100.0 * stats.bytes_resident as f64 / exact as f64,
            stats.factored,
            stats.entries,
        );
        let queries = random.rows(layers * HEADS * GROUP * DIM, 1.0, DType::F32);
        Self { cache, id, layers, random, queries }
    }

    /// One token through all layers, rolled back; the time of its attention.
    fn step(&mut self) -> Duration {
        let noise = self.random.rows(self.queries.len(), 1.0, DType::F32);
        self.queries.iter_mut().zip(&noise).for_each(|(q, noise)| *q = 0.97 * *q + 0.24 * noise);
        let row = self.random.rows(HEADS * DIM, 1.0, DType::F32);
        let mut out = vec![0.0; HEADS * GROUP * DIM];
        let view = |x, heads| TensorView::token_major(x, 1, heads, DIM).unwrap();
        let mut step = self.cache.begin(self.id, 1).unwrap();
        let began = Instant::now();
        for (layer, q) in self.queries.chunks_exact(HEADS * GROUP * DIM).enumerate() {
            let out = TensorViewMut::token_major(&mut out[..], 1, HEADS * GROUP, DIM).unwrap();
            step.attend(layer, view(q, HEADS * GROUP), view(&row[..], HEADS), view(&row[..], HEADS), out)
                .unwrap();
        }
        began.elapsed() / self.layers as u32
    }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("low_rank/n32768");
    let quest = "index=quest(dense=0,min_context=0)";
    for (recipe, layers) in [
        ("full".to_owned(), 1),
        (format!("full+{quest}"), 1),
        (format!("xkv(group=1,rank_k=128,rank_v=256,rebuilt=0)+{quest}"), 1),
        (format!("xkv(group=1,rank_k=128,rank_v=256)+{quest}"), 1),
        ("xkv(group=1,rank_k=128,rank_v=256,rebuilt=0)".to_owned(), 1),
        (format!("xkv(group=4,rank_k=512,rank_v=768,rebuilt=0)+{quest}"), 4),
        (format!("xkv(group=4,rank_k=512,rank_v=768)+{quest}"), 4),
        (format!("xkv(group=4,rank_k=512,rank_v=768,rebuilt=4096)+{quest}"), 4),
    ] {
        // Only what is not filtered out is built.
        let mut built = None;
        group.bench_function(&recipe, |b| {
            let run = built.get_or_insert_with(|| Run::new(&recipe, layers));
            b.iter_custom(|times| (0..times).map(|_| run.step()).sum());
        });
        if let Some(run) = built {
            let (hits, misses) = run.cache.rebuilt(run.id, 0).unwrap();
            if hits + misses > 0 {
                println!(
                    "{recipe}: {:.0} % of the chunks were remembered",
                    100.0 * hits as f64 / (hits + misses) as f64
                );
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = decode
}
criterion_main!(benches);
