//! The CPU kernels, against the speed at which the same pages can be read at all.
//!
//! `cargo bench --features testing --bench kernels`. Throughput of decode is bytes of keys and values per
//! second (of `dot_scores` of keys, of `code_scores` of codes), to be compared with `stream`, which only adds up the words of the same pages on as
//! many threads;
//! throughput of prefill is multiply-adds ("elements") per second, on all pairs, seen or not.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::device::page::{PageRef, Side};
use kvsieve::device::{Encoding, Format, HeadRows, Packing};
use kvsieve::kernel::attend::{AttendLane, Share, Workspace};
use kvsieve::kernel::code_scores::{CodeArgs, CodeLayout};
use kvsieve::kernel::dot_scores::DotArgs;
use kvsieve::kernel::gather::{GatherArgs, GatherTarget};
use kvsieve::kernel::linear::{Activation, LinearArgs};
use kvsieve::kernel::merge_rows::{MergeRowsArgs, Merges, Source, Target};
use kvsieve::kernel::nearest::NearestArgs;
use kvsieve::kernel::row_norms::NormArgs;
use kvsieve::kernel::top_k::TopKArgs;
use kvsieve::kernel::window_scores::{WindowArgs, WindowReduce};
use kvsieve::kernel::{AttentionParams, Spans};
use kvsieve::testing::Random;
use kvsieve::testing::cache::{CacheSpec, codes, end_position};
use kvsieve::view::DType;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Duration;

/// KV heads of every benchmark.
const HEADS: usize = 8;
/// Entries per head: with `HEADS` and `d = 128` in `f32`, 134 MB a side pair.
const ENTRIES: usize = 16384;

fn entries(backend: &dyn Backend, d: usize, rows: usize, stored: impl Into<Encoding>) -> Vec<HeadRows> {
    let stored = stored.into();
    let capacity = if stored.packed().is_some() { 128 } else { 64 };
    CacheSpec::f32(1, d, &[rows; HEADS], capacity).typed(stored, stored).steady().build(backend).unwrap()
}

fn bytes(heads: &[HeadRows]) -> u64 {
    heads
        .iter()
        .flat_map(HeadRows::pages)
        .map(|p| {
            let side = |side| p.layout.side_bytes(side) * p.rows / p.layout.capacity;
            (side(Side::Key) + side(Side::Value)) as u64
        })
        .sum()
}

fn params(group: usize, d: usize) -> AttentionParams<'static> {
    let scale = 1.0 / (d as f32).sqrt();
    AttentionParams { group, d_k: d, d_v: d, scale, softcap: None, window: None, sink_logits: None }
}

struct Call {
    queries: Vec<f32>,
    positions: Vec<i32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    mass: Vec<f32>,
}

impl Call {
    fn new(heads: &[HeadRows], params: &AttentionParams<'_>, tokens: usize) -> Self {
        let rows = heads.len() * params.group * tokens;
        let end = end_position(heads);
        Self {
            queries: Random::new(2).rows(rows * params.d_k, 1.0, DType::F32),
            positions: (end - tokens as i32..end).collect(),
            out: vec![0.0; rows * params.d_v],
            lse: vec![0.0; rows],
            mass: vec![0.0; params.group * heads.iter().map(HeadRows::rows).sum::<usize>()],
        }
    }

    fn attend(
        &mut self,
        on: &dyn Backend,
        heads: &[HeadRows],
        params: &AttentionParams<'_>,
        mass: bool,
        w: &mut Workspace,
    ) {
        let mass = mass.then_some(self.mass.as_mut_slice());
        let (queries, positions) = (&self.queries, &self.positions);
        let (out, lse, share) = (&mut self.out, &mut self.lse, Share::ALL);
        let lane = AttendLane { heads, queries, positions, share, spans: None, out, lse, mass };
        on.attend(params, &mut [lane], w).unwrap();
        black_box(&self.out);
    }

    /// Of the entries `spans` only.
    fn attend_to(
        &mut self,
        on: &dyn Backend,
        heads: &[HeadRows],
        spans: &[Spans],
        params: &AttentionParams<'_>,
        w: &mut Workspace,
    ) {
        let (queries, positions, spans) = (&self.queries, &self.positions, Some(spans));
        let (out, lse, share) = (&mut self.out, &mut self.lse, Share::ALL);
        let lane = AttendLane { heads, queries, positions, share, spans, out, lse, mass: None };
        on.attend(params, &mut [lane], w).unwrap();
        black_box(&self.out);
    }
}

/// Reads every page of `heads` once.
fn stream(heads: &[HeadRows]) -> u64 {
    stream_first(heads, |p| p.page.block.host().len())
}

/// The first so many bytes of every page.
fn stream_first(heads: &[HeadRows], bytes: impl Fn(&PageRef<'_>) -> usize + Sync) -> u64 {
    let pages: Vec<_> = heads.iter().flat_map(HeadRows::pages).collect();
    pages
        .par_iter()
        .with_min_len(16)
        .map(|p| {
            let words: &[u64] = bytemuck::cast_slice(&p.page.block.host()[..bytes(p) / 8 * 8]);
            let mut sums = [0u64; 16];
            for chunk in words.chunks_exact(16) {
                sums.iter_mut().zip(chunk).for_each(|(s, w)| *s = s.wrapping_add(*w));
            }
            sums.iter().fold(0, |a: u64, b| a.wrapping_add(*b))
        })
        .reduce(|| 0, u64::wrapping_add)
}

/// Reads all of it once.
fn stream_floats(all: &[f32]) -> u64 {
    let sum = |words: &[u64]| words.iter().fold(0, |a: u64, &b| a.wrapping_add(b));
    bytemuck::cast_slice::<_, u64>(all).par_chunks(4096).map(sum).reduce(|| 0, u64::wrapping_add)
}

fn decode(c: &mut Criterion) {
    let cpu = Cpu::default();
    for (d, dtype) in
        [(64, DType::F32), (64, DType::F16), (128, DType::F32), (128, DType::F16), (128, DType::Bf16)]
    {
        let mut group = c.benchmark_group(format!("decode/d{d}/{}", dtype.name()));
        let heads = entries(&cpu, d, ENTRIES, dtype);
        group.throughput(Throughput::Bytes(bytes(&heads)));
        group.bench_function("stream", |b| b.iter(|| stream(&heads)));
        for g in [1, 3, 4, 8] {
            let params = params(g, d);
            let (mut call, mut w) = (Call::new(&heads, &params, 1), Workspace::default());
            group.bench_function(format!("g{g}"), |b| {
                b.iter(|| call.attend(&cpu, &heads, &params, false, &mut w));
            });
            if g == 4 {
                group.bench_function(format!("g{g}/mass"), |b| {
                    b.iter(|| call.attend(&cpu, &heads, &params, true, &mut w));
                });
            }
        }
        group.finish();
    }
}

/// Decode over packed pages beside f16, whose time is what theirs is to be compared with.
fn packed(c: &mut Criterion) {
    let cpu = Cpu::default();
    let centered = |format| Packing::new(format).centered().rotated().into();
    let stored: [Encoding; 7] = [
        DType::F16.into(),
        Packing::new(Format::Int8).into(),
        centered(Format::Int4),
        centered(Format::Lm3),
        centered(Format::Lm2),
        Packing::new(Format::Q8_0).into(),
        Packing::new(Format::Q4_0).into(),
    ];
    for stored in stored {
        let mut group = c.benchmark_group(format!("packed/d128/{stored}"));
        let heads = entries(&cpu, 128, 4 * ENTRIES, stored);
        group.throughput(Throughput::Bytes(bytes(&heads)));
        for g in [1, 4, 8] {
            let params = params(g, 128);
            let (mut call, mut w) = (Call::new(&heads, &params, 1), Workspace::default());
            group.bench_function(format!("g{g}"), |b| {
                b.iter(|| call.attend(&cpu, &heads, &params, false, &mut w));
            });
        }
    }
}

/// The keys alone, as an index reads its summaries: all of them, and one in eight by runs of sixteen.
fn dot_scores(c: &mut Criterion) {
    const ROWS: usize = 8192;
    let cpu = Cpu::default();
    let sixteenths = |rows: usize| (0..rows / 128).map(|i| 128 * i..128 * i + 16).collect::<Spans>();
    for stored in [
        DType::F16.into(),
        Packing::new(Format::Int8).into(),
        Packing::new(Format::Int4).centered().rotated().into(),
    ] {
        let stored: Encoding = stored;
        let mut group = c.benchmark_group(format!("dot_scores/d128/{stored}"));
        let heads = entries(&cpu, 128, ROWS, stored);
        let layout = &heads[0].segments[0].layout;
        let keys = layout.side_bytes(Side::Key);
        let total = (HEADS * ROWS * keys / layout.capacity) as u64;
        group.throughput(Throughput::Bytes(total));
        group.bench_function("stream", |b| b.iter(|| stream_first(&heads, |_| keys)));
        for g in [1, 4, 8] {
            let params = params(g, 128);
            let call = Call::new(&heads, &params, 1);
            let (mut out, mut w) = (vec![0.0; g * HEADS * ROWS], Workspace::default());
            let mut run = |spans: Option<&[Spans]>| {
                let (heads, queries) = (&heads, &call.queries);
                let rows = spans.map_or(HEADS * ROWS, |spans| spans.iter().map(Spans::rows).sum());
                let out = &mut out[..g * rows];
                cpu.dot_scores(&params, &mut DotArgs { heads, queries, tokens: 1, spans, out }, &mut w)
                    .unwrap();
            };
            group.throughput(Throughput::Bytes(total));
            group.bench_function(format!("g{g}"), |b| b.iter(|| run(None)));
            if g == 4 {
                let spans = vec![sixteenths(ROWS); HEADS];
                group.throughput(Throughput::Bytes(total / 8));
                group.bench_function("g4/one in eight", |b| b.iter(|| run(Some(&spans))));
            }
        }
    }
}

/// Entries per head where an index pays.
const LONG: usize = 131_072;

/// Every entry of a long context by its code: 4 bits in registers, 8 bits as PQCache has them, 16 bits as A2ATS.
fn code_scores(c: &mut Criterion) {
    let cpu = Cpu::default();
    for (m, bits, levels) in [(32, 4, 16), (16, 4, 16), (2, 8, 64), (1, 16, 4096)] {
        let layout = CodeLayout { codes: m, bits };
        let mut group = c.benchmark_group(format!("code_scores/m{m}/{bits} bits/n{LONG}"));
        let heads = codes(&cpu, 1, layout, &[LONG; HEADS], 256).unwrap();
        group.throughput(Throughput::Bytes(bytes(&heads)));
        group.bench_function("stream", |b| b.iter(|| stream(&heads)));
        for g in [1, 4, 8] {
            let tables = Random::new(3).rows(HEADS * g * m * levels, 1.0, DType::F32);
            let (mut out, mut w) = (vec![0.0; HEADS * g * LONG], Workspace::default());
            group.bench_function(format!("g{g}"), |b| {
                b.iter(|| {
                    let (heads, tables, group, out) = (&heads, &tables, g, &mut out);
                    let mut args =
                        CodeArgs { heads, layout, levels, tables, group, tokens: 1, spans: None, out };
                    cpu.code_scores(&mut args, &mut w).unwrap();
                });
            });
        }
    }
}

/// A 25th of `n` entries in runs of `run` at multiples of it.
fn chosen(n: usize, run: usize, seed: u64) -> Spans {
    let mut random = Random::new(seed);
    (0..n).step_by(run).filter(|_| random.one_in(25)).map(|slot| slot..slot + run).collect()
}

/// Decode over a 25th of a long context, as an index of pages and one of single entries choose it, beside all of it.
/// Throughput is in bytes of the entries that are read.
fn sparse(c: &mut Criterion) {
    let cpu = Cpu::default();
    let stored: [Encoding; 3] =
        [DType::F16.into(), Packing::new(Format::Int8).into(), Packing::new(Format::Int4).into()];
    for stored in stored {
        let mut group = c.benchmark_group(format!("sparse/d128/{stored}/g4/n{LONG}"));
        let heads = entries(&cpu, 128, LONG, stored);
        let params = params(4, 128);
        let (mut call, mut w) = (Call::new(&heads, &params, 1), Workspace::default());
        group.throughput(Throughput::Bytes(bytes(&heads)));
        group.bench_function("all", |b| {
            b.iter(|| call.attend(&cpu, &heads, &params, false, &mut w));
        });
        for (name, run) in [("pages of 16", 16), ("lone", 1)] {
            let spans: Vec<Spans> = (0..HEADS as u64).map(|h| chosen(LONG, run, h)).collect();
            let rows: usize = spans.iter().map(Spans::rows).sum();
            group.throughput(Throughput::Bytes(bytes(&heads) * rows as u64 / (HEADS * LONG) as u64));
            group.bench_function(format!("4 percent, {name}"), |b| {
                b.iter(|| call.attend_to(&cpu, &heads, &spans, &params, &mut w));
            });
        }
    }
}

fn short_decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_short/d64/f16/g3");
    let (single, cpu) = (Cpu::with_threads(1).unwrap(), Cpu::default());
    for rows in [64, 256, 1024, 4096] {
        let params = params(3, 64);
        let heads = entries(&cpu, 64, rows, DType::F16);
        let (mut call, mut w) = (Call::new(&heads, &params, 1), Workspace::default());
        group.throughput(Throughput::Bytes(bytes(&heads)));
        group.bench_function(format!("n{rows}/one thread"), |b| {
            b.iter(|| call.attend(&single, &heads, &params, false, &mut w));
        });
        group.bench_function(format!("n{rows}/all threads"), |b| {
            b.iter(|| call.attend(&cpu, &heads, &params, false, &mut w));
        });
    }
}

fn prefill(c: &mut Criterion) {
    let cpu = Cpu::default();
    for (d, dtype) in [(64, DType::F32), (128, DType::F32), (128, DType::F16)] {
        let mut group = c.benchmark_group(format!("prefill/d{d}/{}", dtype.name()));
        for tokens in [64, 512] {
            let heads = entries(&cpu, d, 2048, dtype);
            let params = params(4, d);
            let (mut call, mut w) = (Call::new(&heads, &params, tokens), Workspace::default());
            group.throughput(Throughput::Elements((HEADS * 4 * tokens * 2048 * 2 * d) as u64));
            group.bench_function(format!("t{tokens}"), |b| {
                b.iter(|| call.attend(&cpu, &heads, &params, false, &mut w));
            });
        }
        group.finish();
    }
    let mut group = c.benchmark_group("prefill/d64/f32/reference");
    let reference = Reference::default();
    let heads = entries(&reference, 64, 512, DType::F32);
    let params = params(4, 64);
    let (mut call, mut w) = (Call::new(&heads, &params, 64), Workspace::default());
    group.throughput(Throughput::Elements((HEADS * 4 * 64 * 512 * 2 * 64) as u64));
    group.bench_function("t64", |b| b.iter(|| call.attend(&reference, &heads, &params, false, &mut w)));
}

/// One layer of a perceptron over hidden states of 960: a token, whose time is to be compared with `stream`, a read of the
/// weights, and a chunk of a prompt, in multiply-adds per second.
fn linear(c: &mut Criterion) {
    const INPUTS: usize = 960;
    let cpu = Cpu::default();
    for outputs in [72, 1024] {
        let mut group = c.benchmark_group(format!("linear/{INPUTS} to {outputs}"));
        let mut random = Random::new(4);
        let weight = random.rows(outputs * INPUTS, 0.1, DType::F32);
        for n in [1, 32, 512] {
            let (x, mut out) = (random.rows(n * INPUTS, 1.0, DType::F32), vec![0.0; n * outputs]);
            group.throughput(Throughput::Elements((n * INPUTS * outputs) as u64));
            if n == 1 {
                group.bench_function("stream", |b| b.iter(|| stream_floats(&weight)));
            }
            for activation in [Activation::None, Activation::Gelu] {
                group.bench_function(format!("n{n}/{activation:?}"), |b| {
                    b.iter(|| {
                        let (x, weight, out, bias) = (&x[..], &weight[..], &mut out[..], None);
                        let mut args =
                            LinearArgs { x, weight, bias, inputs: INPUTS, outputs, activation, out };
                        cpu.linear(&mut args).unwrap();
                    });
                });
            }
        }
    }
}

fn others(c: &mut Criterion) {
    let cpu = Cpu::default();
    let heads = entries(&cpu, 128, ENTRIES, DType::F16);
    let total = HEADS * ENTRIES;
    let mut group = c.benchmark_group("others/d128/f16");
    group.throughput(Throughput::Bytes(bytes(&heads) / 2));
    let mut norms = vec![0.0; total];
    group.bench_function("row_norms", |b| {
        b.iter(|| cpu.row_norms(&mut NormArgs { heads: &heads, side: Side::Key, out: &mut norms }).unwrap());
    });
    let params = params(4, 128);
    let call = Call::new(&heads, &params, 32);
    let mut sums = vec![0.0; 4 * total];
    group.bench_function("window_scores/w32", |b| {
        b.iter(|| {
            let (queries, positions) = (&call.queries, &call.positions);
            let reduce = WindowReduce::Sum;
            cpu.window_scores(
                &params,
                &mut WindowArgs { heads: &heads, queries, positions, reduce, out: &mut sums },
            )
            .unwrap();
        });
    });
    // A quarter of one KV head stays.
    let (into, from): (Vec<u32>, Vec<u32>) = (0..ENTRIES as u32).partition(|slot| slot % 4 == 0);
    let (mut nearest, mut cosines) = (vec![0; from.len()], vec![0.0; from.len()]);
    group.throughput(Throughput::Elements(2 * 128 * (into.len() * from.len()) as u64));
    group.bench_function("nearest/quarter_of_one_head", |b| {
        b.iter(|| {
            let mut args = NearestArgs {
                heads: &heads[..1],
                from: &[&from],
                into: &[&into],
                nearest: &mut nearest,
                cosines: &mut cosines,
            };
            cpu.nearest(&mut args).unwrap();
        });
    });
    let mut merges = Merges::default();
    for (&slot, from) in into.iter().zip(from.chunks(3)) {
        let sources = from.iter().map(|&slot| Source { slot, key: 0.0, value: 0.25 });
        merges.push(Target { slot, sources: 0, key: 1.0, value: 0.25, bias: 0.0 }, sources);
    }
    let mut merged = vec![0.0; into.len() * 128];
    group.throughput(Throughput::Bytes(bytes(&heads[..1]) / 2));
    group.bench_function("merge_rows/values_of_one_head", |b| {
        b.iter(|| {
            let (head, values) = (&heads[0], &mut merged[..]);
            cpu.merge_rows(&mut MergeRowsArgs { head, merges: &merges, keys: &mut [], values }).unwrap();
        });
    });
    let (lengths, counts) = (vec![ENTRIES; HEADS], vec![ENTRIES / 8; HEADS]);
    let (protect, mut chosen) = (vec![0; total], vec![0; HEADS * ENTRIES / 8]);
    group.throughput(Throughput::Elements(total as u64));
    group.bench_function("top_k", |b| {
        b.iter(|| {
            let (scores, out) = (&norms, &mut chosen[..]);
            cpu.top_k(&mut TopKArgs { lengths: &lengths, counts: &counts, scores, protect: &protect, out })
                .unwrap();
        });
    });
    let slots: Vec<u32> = (0..ENTRIES as u32).filter(|s| s / 7 % 2 == 0).collect();
    let layout = heads[0].segments[0].layout.clone();
    let mut pages: Vec<_> = (0..slots.len().div_ceil(64)).map(|_| cpu.allocate(&layout).unwrap()).collect();
    group.throughput(Throughput::Bytes((slots.len() * layout.entry_bytes()) as u64));
    group.bench_function("gather", |b| {
        b.iter(|| {
            let target = GatherTarget::Pages { layout: &layout, pages: &mut pages };
            cpu.gather(&mut GatherArgs { head: &heads[0], slots: &slots, target }).unwrap();
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = decode, packed, dot_scores, code_scores, sparse, short_decode, prefill, linear, others
}
criterion_main!(benches);
