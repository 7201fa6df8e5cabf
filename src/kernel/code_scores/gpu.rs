//! Scores on the device: one thread per entry, for all query rows of its KV head, in `f32`.
//!
//! *Helps* because tables of four query rows lie side by side, so that an index leads to one load for all of them. *Hurts* by
//! the tables, which are uploaded with every call.

use super::{CodeArgs, NAME, QUAD, interleave};
use crate::device::HeadRows;
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, Scratch};
use crate::error::{DeviceError, KernelError};
use crate::kernel::{Span, Spans};
use std::collections::BTreeMap;
use std::ops::Range;

/// Entries per workgroup.
const CHUNK: usize = 64;

/// The uniform block of `shaders/code_scores.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    words: u32,
    codes: u32,
    bits: u32,
    levels: u32,
    rows: u32,
    count: u32,
    spare: [u32; 2],
}

/// Up to 64 entries of a page.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Chunk {
    page: u32,
    begin: u32,
    rows: u32,
    target_at: u32,
    stride: u32,
    table: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut CodeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let rows = args.group * args.tokens;
    if args.out.is_empty() {
        return Ok(());
    }
    let mut done = 0;
    for batch in batches(context, args)? {
        let mut call = Call::new(context, NAME);
        let scores = record(&mut call, args, batch.clone())?;
        call.read(&scores);
        let back = call.finish()?;
        let len = rows * batch.map(|h| args.entries(h)).sum::<usize>();
        args.out[done..done + len].copy_from_slice(&back.floats(0)[..len]);
        done += len;
    }
    Ok(())
}

/// Consecutive KV heads whose tables and scores fit one call.
///
/// # Errors
/// [`DeviceError::Limit`] if a single head is too large.
fn batches(context: &Context, args: &CodeArgs<'_>) -> Result<Vec<Range<usize>>, DeviceError> {
    let rows = args.group * args.tokens;
    let tables = 4 * rows.next_multiple_of(QUAD) * args.layout.codes * args.levels;
    let (mut batches, mut first, mut held) = (Vec::new(), 0, 0);
    for i in 0..args.heads.len() {
        let out = 4 * rows * args.entries(i);
        if out.max(tables) as u64 > context.binding_limit() {
            return Err(DeviceError::Limit {
                what: "scores or tables of one KV head",
                need: out.max(tables) as u64,
                limit: context.binding_limit(),
                hint: "ask for fewer queries at once",
            });
        }
        if held + out + tables > context.batch_bytes() && i > first {
            batches.push(first..i);
            (first, held) = (i, 0);
        }
        held += out + tables;
    }
    batches.push(first..args.heads.len());
    Ok(batches)
}

/// Records the scores of some KV heads: for each in turn `[G, T, rows]`.
fn record(call: &mut Call<'_>, args: &CodeArgs<'_>, batch: Range<usize>) -> Result<Scratch, KernelError> {
    let rows = args.group * args.tokens;
    let table = args.layout.codes * args.levels;
    let heads = &args.heads[batch.clone()];
    // Keys stand first in a page, so a dispatch is bound to a slab and to nothing else of a layout.
    let mut groups: BTreeMap<u64, (&wgpu::Buffer, Vec<Chunk>)> = BTreeMap::new();
    let mut start = 0;
    for (h, head) in heads.iter().enumerate() {
        let all = [Span { start: 0, end: head.rows() as u32 }];
        let chosen = args.spans.map_or(&all[..], |spans| spans[batch.start + h].spans());
        let (entries, mut before) = (args.entries(batch.start + h), 0);
        for (page, runs) in Spans::in_pages(head, chosen, CHUNK) {
            let block = DeviceBlock::of(page.page, NAME)?;
            let chunks = &mut groups.entry(block.slab()).or_insert_with(|| (block.buffer(), Vec::new())).1;
            for run in runs {
                chunks.push(Chunk {
                    page: block.word(),
                    begin: (run.start - page.first) as u32,
                    rows: run.len() as u32,
                    target_at: (start + before) as u32,
                    stride: entries as u32,
                    table: (h * rows.div_ceil(QUAD) * table) as u32,
                });
                before += run.len();
            }
        }
        start += rows * entries;
    }
    let tables = call.upload(&interleaved(heads, &args.tables[batch.start * rows * table..], rows, table));
    let scores = call.scratch(start);
    for (slab, chunks) in groups.into_values() {
        let params = Params {
            words: args.layout.words() as u32,
            codes: args.layout.codes as u32,
            bits: args.layout.bits as u32,
            levels: args.levels as u32,
            rows: rows as u32,
            count: chunks.len() as u32,
            spare: [0; 2],
        };
        let bindings =
            [Binding::Slab(slab.clone()), call.upload(&chunks), tables.clone(), Binding::from(&scores)];
        call.dispatch(NAME, &[], &params, &bindings, chunks.len())?;
    }
    Ok(scores)
}

/// The tables of the heads, by four query rows of each.
fn interleaved(heads: &[HeadRows], tables: &[f32], rows: usize, table: usize) -> Vec<[f32; QUAD]> {
    let mut quads = vec![[0.0; QUAD]; heads.len() * rows.div_ceil(QUAD) * table];
    let per_head = tables.chunks(rows * table).flat_map(|tables| tables.chunks(QUAD * table));
    quads.chunks_exact_mut(table).zip(per_head).for_each(|(quad, tables)| interleave(tables, table, quad));
    quads
}
