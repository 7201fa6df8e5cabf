//! Tiles of sixty-four chosen entries: their keys, the logits, the sums of latent rows; a thread per KV head.
//!
//! Keys that are not remembered are made by chunks, as many together as fill a block of [`super::super::rebuild`], before
//! the tiles begin; those that do not fit are made by each tile. Both round keys to the type of their latent rows, so
//! the bits are the same. The sums of a segment's latent rows are multiplied by its basis when it ends.
//!
//! *Helps* the few query rows of decode. *Hurts* a single KV head on many threads, and prompts, whose query rows go in
//! blocks that each make or widen the keys anew.

use super::remembered::{Pick, Work, narrow};
use super::{FactoredArgs, Remembered};
use crate::device::HeadRows;
use crate::device::factors::{BASIS_PAD, Factors};
use crate::device::page::{Rows, Segment, Side};
use crate::error::KernelError;
use crate::kernel::rebuild::cpu::{BLOCK as TILE, dense, latent_rows, times_basis};
use crate::kernel::simd::dots::dots;
use crate::kernel::simd::gemm::{Matrix, multiply};
use crate::kernel::simd::math::{exp, scale, soft_cap, sum};
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::weights::largest_with;
use crate::kernel::simd::widen::widen;
use crate::kernel::simd::{Exec, dispatch, take};
use crate::kernel::{AttentionParams, Spans};
use crate::view::DType;
use fearless_simd::{Simd, SimdBase};
use std::ops::Range;

/// Query rows of a block.
const QUERIES: usize = 64;

/// See [`super`].
///
/// # Errors
/// As [`FactoredArgs::validate`].
pub fn run(
    exec: &Exec,
    params: &AttentionParams<'_>,
    args: &mut FactoredArgs<'_>,
) -> Result<(), KernelError> {
    args.validate(params)?;
    let rows = params.group * args.tokens;
    let read = |h: usize, head: &HeadRows| match args.spans {
        Some(spans) => head.factored().map(|(.., slots)| spans[h].rows_in(slots)).sum::<usize>(),
        None => head.factored().map(|(segment, ..)| segment.rows).sum(),
    };
    let entries: usize = args.heads.iter().enumerate().map(|(h, head)| read(h, head)).sum();
    let tasks = exec.tasks(entries * (params.d_k + rows * (params.d_k + params.d_v)));
    let heads = Heads {
        exec,
        params,
        rows,
        heads: args.heads,
        queries: args.queries,
        spans: args.spans,
        out: args.out,
        lse: args.lse,
        remembered: args.remembered,
    };
    exec.run(tasks, || heads.spread(tasks));
    Ok(())
}

/// Some of the KV heads.
struct Heads<'a> {
    exec: &'a Exec,
    params: &'a AttentionParams<'a>,
    /// Query rows of a head.
    rows: usize,
    heads: &'a [HeadRows],
    queries: &'a [f32],
    spans: Option<&'a [Spans]>,
    out: &'a mut [f32],
    lse: &'a mut [f32],
    remembered: &'a mut [Remembered],
}

impl Heads<'_> {
    fn spread(mut self, tasks: usize) {
        if tasks < 2 || self.heads.len() < 2 {
            let exec = self.exec;
            return dispatch!(exec.token(), simd => self.work(simd));
        }
        let (at, params) = (self.heads.len() / 2, self.params);
        let (heads, rest) = self.heads.split_at(at);
        let (queries, later) = self.queries.split_at(at * self.rows * params.d_k);
        let spans = self.spans.map(|spans| spans.split_at(at));
        let left = Heads {
            heads,
            queries,
            spans: spans.map(|s| s.0),
            out: take(&mut self.out, at * self.rows * params.d_v),
            lse: take(&mut self.lse, at * self.rows),
            remembered: take(&mut self.remembered, at),
            ..self
        };
        let right = Heads { heads: rest, queries: later, spans: spans.map(|s| s.1), ..self };
        rayon::join(|| left.spread(tasks / 2), || right.spread(tasks - tasks / 2));
    }

    #[inline(always)]
    fn work<S: Simd>(self, simd: S) {
        let (params, rows) = (self.params, self.rows);
        let outs = self.out.chunks_exact_mut((rows * params.d_v).max(1));
        let outs = outs.zip(self.lse.chunks_exact_mut(rows.max(1)));
        for (h, (out, lse)) in outs.enumerate() {
            let (head, memory) = (&self.heads[h], &mut self.remembered[h]);
            let queries = &self.queries[h * rows * params.d_k..(h + 1) * rows * params.d_k];
            pick(head, self.spans.map(|spans| &spans[h]), &mut memory.work.picks);
            simd.vectorize(
                #[inline(always)]
                || one_head(simd, params, head, queries, memory, (out, lse)),
            );
        }
    }
}

/// The entries that are read, in their order.
fn pick(head: &HeadRows, spans: Option<&Spans>, picks: &mut Vec<Pick>) {
    picks.clear();
    let mut before = 0;
    for (index, (segment, _, slots)) in head.factored().enumerate() {
        let mut add = |run: Range<usize>| {
            let entry = |entry: usize| Pick {
                segment: index as u32,
                entry: entry as u32,
                ordinal: (before + entry) as u32,
            };
            picks.extend(run.map(entry));
        };
        match spans {
            Some(spans) => {
                let runs = spans.among(slots.clone());
                runs.for_each(|run| add(run.start - slots.start..run.end - slots.start));
            }
            None => add(0..segment.rows),
        }
        before += segment.rows;
    }
}

#[inline(always)]
fn one_head<S: Simd>(
    simd: S,
    params: &AttentionParams<'_>,
    head: &HeadRows,
    queries: &[f32],
    memory: &mut Remembered,
    (out, lse): (&mut [f32], &mut [f32]),
) {
    out.fill(0.0);
    lse.fill(f32::NEG_INFINITY);
    if memory.work.picks.is_empty() {
        return;
    }
    // Keys that lie in the pages are read there.
    let dtype = head.factored().find_map(|(_, factors, _)| factors.keys.as_ref()?.layout.k.exact());
    let kept = dtype.filter(|&dtype| memory.admit(head, dtype, params.d_k));
    let mut work = std::mem::take(&mut memory.work);
    if let Some(dtype) = kept {
        remember(simd, head, params.d_k, dtype, memory, &mut work);
    }
    let (from, to) = (QUERIES * params.d_k, QUERIES * params.d_v);
    for (queries, (out, lse)) in queries.chunks(from).zip(out.chunks_mut(to).zip(lse.chunks_mut(QUERIES))) {
        let keys = Keys { memory, kept: kept.is_some(), dtype };
        over_tiles(simd, params, head, queries, &keys, &mut work, (out, lse));
    }
    memory.work = work;
}

/// Where keys come from.
struct Keys<'a> {
    memory: &'a Remembered,
    /// Whether any are remembered.
    kept: bool,
    /// The type made ones are rounded to, and remembered in.
    dtype: Option<DType>,
}

/// Makes the keys of all chunks that lack them, as many at once as fill a block.
#[inline(always)]
fn remember<S: Simd>(
    simd: S,
    head: &HeadRows,
    d: usize,
    dtype: DType,
    memory: &mut Remembered,
    work: &mut Work,
) {
    let (chunk, stride) = (memory.chunk(), d.next_multiple_of(BASIS_PAD));
    let Work { made, entries, latents, keys, .. } = work;
    grow(keys, TILE * stride);
    let mut before = 0;
    for (segment, factors, _) in head.factored() {
        let range = before as u32..(before + segment.rows) as u32;
        let of = |&id: &u32| {
            let first = id * chunk as u32;
            first.max(range.start)..(first + chunk as u32).min(range.end)
        };
        let mut flush = |entries: &mut Vec<usize>| {
            dense(simd, (segment, factors), Side::Key, entries, latents, (keys, stride));
            for (entry, key) in entries.drain(..).zip(keys.chunks_exact(stride)) {
                narrow(dtype, &key[..d], memory.row_mut((before + entry) as u32));
            }
        };
        entries.clear();
        for ordinal in made.iter().flat_map(of) {
            entries.push(ordinal as usize - before);
            if entries.len() == TILE {
                flush(entries);
            }
        }
        flush(entries);
        before += segment.rows;
    }
}

/// Online softmax over the tiles of what is picked, for up to [`QUERIES`] rows.
#[inline(always)]
fn over_tiles<S: Simd>(
    simd: S,
    params: &AttentionParams<'_>,
    head: &HeadRows,
    queries: &[f32],
    keys: &Keys<'_>,
    work: &mut Work,
    (out, lse): (&mut [f32], &mut [f32]),
) {
    let (d_k, d_v, rows) = (params.d_k, params.d_v, lse.len());
    let (k_stride, v_stride) = (d_k.next_multiple_of(BASIS_PAD), d_v.next_multiple_of(BASIS_PAD));
    let Work { picks, entries, latents, keys: tile, values, scores, sums, out: acc, .. } = work;
    grow(tile, TILE * k_stride);
    grow(scores, rows * TILE);
    grow(acc, rows * v_stride);
    acc[..rows * v_stride].fill(0.0);
    // Maximum and sum of every row.
    let mut running = [(f32::NEG_INFINITY, 0.0f32); QUERIES];
    let mut rest = &picks[..];
    for (index, (segment, factors, _)) in head.factored().enumerate() {
        let (mut own, later) = rest.split_at(rest.partition_point(|p| p.segment as usize <= index));
        rest = later;
        // Values that lie in the pages are summed as they are.
        let width = factors.values.as_ref().map_or(d_v, |basis| basis.rank());
        let stride = width.next_multiple_of(BASIS_PAD);
        grow(sums, rows * stride);
        let sums = &mut sums[..rows * stride];
        sums.fill(0.0);
        while !own.is_empty() {
            let (picked, behind) = own.split_at(own.len().min(TILE));
            own = behind;
            let (of, lent) = ((segment, factors), (&mut *entries, &mut *latents, &mut *values));
            fetch(simd, of, picked, keys, lent, (tile, k_stride, d_k));
            let (q, k) =
                (Matrix { data: queries, stride: d_k }, Matrix { data: &tile[..], stride: k_stride });
            dots(simd, q, k, (rows, d_k, picked.len()), scores, TILE, Ahead::NONE);
            for (row, (most, total)) in running[..rows].iter_mut().enumerate() {
                let line = &mut scores[row * TILE..][..TILE];
                let (new, share) = weigh(simd, params, (line, picked.len()), *most);
                let shrink = (*most - new).exp();
                if *most > f32::NEG_INFINITY && shrink < 1.0 {
                    *total *= shrink;
                    scale(simd, &mut sums[row * stride..][..stride], shrink);
                    scale(simd, &mut acc[row * v_stride..][..v_stride], shrink);
                }
                (*most, *total) = (new, *total + share);
            }
            let lent = (&mut *entries, &mut *latents, &mut *values);
            add_values(simd, of, picked, scores, (rows, width), lent, (&mut *sums, stride));
        }
        match &factors.values {
            Some(basis) => {
                let a = Matrix { data: &*sums, stride };
                times_basis(simd, a, basis, (rows, d_v), (acc, v_stride), true);
            }
            None => acc.iter_mut().zip(&*sums).for_each(|(a, s)| *a += s),
        }
    }
    for (row, ((most, total), lse)) in running.iter().zip(lse).enumerate() {
        *lse = most + total.ln();
        let out = &mut out[row * d_v..(row + 1) * d_v];
        out.copy_from_slice(&acc[row * v_stride..][..d_v]);
        scale(simd, out, 1.0 / total);
    }
}

/// Keys of up to [`TILE`] entries of a segment, in single precision; `lent` holds the entries and rows that are made.
#[inline(always)]
fn fetch<S: Simd>(
    simd: S,
    (segment, factors): (&Segment, &Factors),
    picked: &[Pick],
    keys: &Keys<'_>,
    (entries, latents, made): (&mut Vec<usize>, &mut Vec<f32>, &mut Vec<f32>),
    (tile, stride, d): (&mut [f32], usize, usize),
) {
    let read = |dtype, words: &[u32], out: &mut [f32]| match dtype {
        DType::F32 => widen(simd, Rows::F32(bytemuck::cast_slice(words)), 0, out),
        DType::F16 => widen(simd, Rows::F16(bytemuck::cast_slice(words)), 0, out),
        DType::Bf16 => widen(simd, Rows::Bf16(bytemuck::cast_slice(words)), 0, out),
    };
    let (Some(dtype), Some(_)) = (keys.dtype, &factors.keys) else {
        entries.clear();
        entries.extend(picked.iter().map(|p| p.entry as usize));
        return dense(simd, (segment, factors), Side::Key, entries, latents, (tile, stride));
    };
    let held = |pick: &Pick| keys.kept && keys.memory.holds(pick.ordinal);
    entries.clear();
    for (pick, key) in picked.iter().zip(tile.chunks_exact_mut(stride)) {
        if held(pick) {
            read(dtype, keys.memory.row(pick.ordinal), &mut key[..d]);
        } else {
            entries.push(pick.entry as usize);
        }
    }
    if entries.is_empty() {
        return;
    }
    grow(made, TILE * stride);
    dense(simd, (segment, factors), Side::Key, entries, latents, (&mut *made, stride));
    let mut words = [0; crate::geometry::MAX_HEAD_DIM];
    let words = &mut words[..(d * dtype.bytes()).div_ceil(4)];
    let others = picked.iter().zip(tile.chunks_exact_mut(stride)).filter(|(pick, _)| !held(pick));
    for ((_, key), row) in others.zip(made.chunks_exact(stride)) {
        narrow(dtype, &row[..d], words);
        read(dtype, words, &mut key[..d]);
    }
}

/// Adds the values of up to [`TILE`] entries, or their latent rows, by their weights to `sums`, `[rows, width]` with
/// `stride` elements from one to the next. Latent rows of neighbours are multiplied where they lie.
#[inline(always)]
fn add_values<S: Simd>(
    simd: S,
    (segment, factors): (&Segment, &Factors),
    picked: &[Pick],
    scores: &[f32],
    (rows, width): (usize, usize),
    (entries, latents, values): (&mut Vec<usize>, &mut Vec<f32>, &mut Vec<f32>),
    (sums, stride): (&mut [f32], usize),
) {
    let layout = &*factors.latents.layout;
    let (capacity, step) = (layout.capacity, layout.row_stride(Side::Value));
    // Whole vectors of a row must lie in it.
    if factors.values.is_some() && step.is_multiple_of(BASIS_PAD) {
        let neighbours = |a: &Pick, b: &Pick| {
            let [a, b] = [a, b].map(|pick| factors.latent(pick.entry as usize));
            a + 1 == b && a / capacity == b / capacity
        };
        let mut done = 0;
        for run in picked.chunk_by(neighbours) {
            let latent = factors.latent(run[0].entry as usize);
            let p = Matrix { data: &scores[done..], stride: TILE };
            let (from, extent) = (latent % capacity * step, (rows, run.len(), width));
            let to = from + run.len() * step;
            match layout.rows(&factors.latents.pages[latent / capacity], Side::Value) {
                Rows::F32(s) => {
                    let v = Matrix { data: &s[from..to], stride: step };
                    multiply(simd, p, v, sums, stride, extent, true, Ahead::NONE);
                }
                Rows::F16(s) => {
                    let v = Matrix { data: &s[from..to], stride: step };
                    multiply(simd, p, v, sums, stride, extent, true, Ahead::NONE);
                }
                Rows::Bf16(s) => {
                    let v = Matrix { data: &s[from..to], stride: step };
                    multiply(simd, p, v, sums, stride, extent, true, Ahead::NONE);
                }
                Rows::Packed(_) => unreachable!("latent rows are exact"),
            }
            done += run.len();
        }
        return;
    }
    grow(values, TILE * stride);
    entries.clear();
    entries.extend(picked.iter().map(|p| p.entry as usize));
    if factors.values.is_some() {
        latent_rows(simd, factors, Side::Value, entries, (values, stride));
    } else {
        dense(simd, (segment, factors), Side::Value, entries, latents, (values, stride));
    }
    let (p, v) = (Matrix { data: scores, stride: TILE }, Matrix { data: &values[..], stride });
    multiply(simd, p, v, sums, stride, (rows, picked.len(), width), true, Ahead::NONE);
}

/// Turns a row's dot products with `len` keys into weights relative to their maximum and that of those before: that
/// maximum, and the sum of the weights.
#[inline(always)]
fn weigh<S: Simd>(
    simd: S,
    params: &AttentionParams<'_>,
    (line, len): (&mut [f32], usize),
    before: f32,
) -> (f32, f32) {
    let lanes = S::f32s::LEN;
    let line = &mut line[..len.next_multiple_of(lanes)];
    line[len..].fill(0.0);
    for x in line.chunks_exact_mut(lanes) {
        let mut logit = S::f32s::from_slice(simd, x) * S::f32s::splat(simd, params.scale);
        if let Some(cap) = params.softcap {
            logit = soft_cap(simd, logit, cap);
        }
        logit.store_slice(x);
    }
    let most = largest_with(simd, &line[..len]).max(before);
    for x in line.chunks_exact_mut(lanes) {
        exp(simd, S::f32s::from_slice(simd, x) - S::f32s::splat(simd, most)).store_slice(x);
    }
    (most, sum(simd, &line[..len]))
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}
