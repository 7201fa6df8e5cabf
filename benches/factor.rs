//! Truncated singular value decompositions of the sizes that low-rank storage asks for.
//!
//! `cargo bench --bench factor` on a quiet machine. Rows are made of directions whose weights fall as those of keys do,
//! and noise. `routes` times the two ways on the same matrix; `product` is one product of the randomized route by itself, of
//! which a decomposition is at least `2 + 2 power_iterations`.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "benchmarks")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvsieve::device::Pool;
use kvsieve::factor::{Dense, FactorOptions, Factors, FromFn, Route, factor, unwatched};
use std::time::Duration;

/// A hash as a float in [-1, 1).
fn noise(seed: u64) -> f32 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// `[tokens, features]`: 64 directions of which the i-th weighs `1 / (1 + i / 4)`, and noise of a tenth.
fn keys(tokens: usize, features: usize) -> Vec<f32> {
    const DIRECTIONS: usize = 64;
    let mut rows = vec![0.0f32; tokens * features];
    let directions: Vec<f32> = (0..DIRECTIONS * features).map(|i| noise(i as u64)).collect();
    for (t, row) in rows.chunks_exact_mut(features).enumerate() {
        for (i, direction) in directions.chunks_exact(features).enumerate() {
            let weight = noise((1 << 40) + (t * DIRECTIONS + i) as u64) / (1.0 + i as f32 / 4.0);
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += weight * d);
        }
        for (j, x) in row.iter_mut().enumerate() {
            *x += 0.1 * noise((1 << 41) + (t * features + j) as u64);
        }
    }
    rows
}

fn run(rows: &[f32], tokens: usize, features: usize, options: &FactorOptions, pool: &Pool) -> Factors {
    factor(&Dense::new(rows, tokens, features).unwrap(), options, pool, &mut unwatched).unwrap()
}

fn sizes(c: &mut Criterion) {
    let pool = Pool::with_threads(0).unwrap();
    let mut group = c.benchmark_group("factor");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    for (name, tokens, features, rank) in [
        ("four-layers/8192x4096/r512", 8192, 4096, 512),
        ("one-layer/8192x1024/r160", 8192, 1024, 160),
        ("one-layer/65536x1024/r160", 65536, 1024, 160),
    ] {
        let mut rows = None;
        let options = FactorOptions::new(rank);
        group.bench_function(name, |b| {
            let rows = rows.get_or_insert_with(|| {
                let rows = keys(tokens, features);
                let factors = run(&rows, tokens, features, &options, &pool);
                println!("{name}: {:?}, relative error {:.4}", factors.route, factors.relative_error());
                rows
            });
            b.iter(|| run(rows, tokens, features, &options, &pool));
        });
    }
    group.finish();
}

/// Both routes on one matrix, with rows in memory and handed out in copies.
fn routes(c: &mut Criterion) {
    let pool = Pool::with_threads(0).unwrap();
    let (tokens, features, rank) = (8192, 1024, 160);
    let mut group = c.benchmark_group("factor/routes");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    let mut rows = None;
    for route in [Route::Gram, Route::Randomized] {
        let options = FactorOptions { route, ..FactorOptions::new(rank) };
        group.bench_function(format!("{route:?}"), |b| {
            let rows = rows.get_or_insert_with(|| keys(tokens, features));
            b.iter(|| run(rows, tokens, features, &options, &pool));
        });
        group.bench_function(format!("{route:?}/copied"), |b| {
            let rows = &*rows.get_or_insert_with(|| keys(tokens, features));
            let source = FromFn::new(tokens, features, |first, out: &mut [f32]| {
                out.copy_from_slice(&rows[first * features..][..out.len()]);
                Ok(())
            });
            b.iter(|| factor(&source, &options, &pool, &mut unwatched).unwrap());
        });
    }
    group.finish();
}

/// The product all others are measured by: 528 columns by two threads, from rows that lie in memory.
fn product(c: &mut Criterion) {
    use faer::linalg::matmul::matmul;
    use faer::{Accum, MatMut, MatRef, Par};
    use rayon::prelude::*;
    let (tokens, features, columns, block) = (8192, 4096, 528, 128);
    let pool = Pool::with_threads(0).unwrap();
    let mut group = c.benchmark_group("factor/product");
    group.sample_size(10).throughput(Throughput::Elements((2 * tokens * features * columns) as u64));
    let mut made = None;
    group.bench_function("8192x4096x528", |b| {
        let (rows, p, out) = made.get_or_insert_with(|| {
            let p: Vec<f32> = (0..features * columns).map(|i| noise(i as u64)).collect();
            (keys(tokens, features), p, vec![0.0f32; tokens * columns])
        });
        let p = MatRef::from_row_major_slice(p, features, columns);
        b.iter(|| {
            let blocks = rows.par_chunks(block * features).zip(out.par_chunks_mut(block * columns));
            pool.run(|| {
                blocks.for_each(|(rows, out)| {
                    let out = MatMut::from_row_major_slice_mut(out, block, columns);
                    let rows = MatRef::from_row_major_slice(rows, block, features);
                    matmul(out, Accum::Replace, rows, p, 1.0, Par::Seq);
                });
            });
        });
    });
    group.finish();
}

criterion_group!(benches, sizes, routes, product);
criterion_main!(benches);
