//! Flash attention on the device: query tiles × runs of pages, then a merge over runs.
//!
//! The query rows of a KV head (`G` heads × `T` queries, neighbours in time together) are cut into tiles of
//! eight, the entries a tile can see into runs of whole pages: long runs for prefill, where tiles alone fill
//! the device, short ones for decode, where runs must. A run whose pages lie in several slabs becomes one
//! stretch per change of slab, and stretches are dispatched round by round.
//!
//! *Helps* because entries a tile cannot see (the causal half, what has left a window) are cut off on the
//! host, where positions are known. *Hurts* by a plan per call, a few microseconds per page.
//!
//! Units that name their entries are planned apart (`gpu/chosen.rs`) and dispatched to the same shader.
//!
//! The mass kernels use the same tiles, so they find queries and log-sum-exp where this one left them.

mod chosen;

use super::{AttendLane, NAME};
use crate::device::encoding::{rotate, rotation_block};
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, Scratch, kind, packs};
use crate::device::page::{HeadRows, PageLayout, Side};
use crate::error::KernelError;
use crate::kernel::{AttentionParams, Spans, attention_mass, merge_partials};
use std::collections::BTreeMap;
use std::ops::Range;

/// "Sees nothing" on the device; see `shaders/shared/logit.wgsl`.
pub(in crate::kernel) const NONE: f32 = f32::MIN;

/// Query rows per tile; the shaders' two vec4.
pub(in crate::kernel) const TILE: usize = 8;

/// Runs a call is cut into, roughly: enough to fill a large GPU, few enough to merge quickly.
const RUNS: usize = 1024;

/// Entries of a run, at least: shorter ones would mostly write partial results.
const LEAST_RUN: usize = 64;

/// The uniform block of attend and the mass kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    pub(in crate::kernel) d_k: u32,
    pub(in crate::kernel) d_v: u32,
    pub(in crate::kernel) k_words: u32,
    pub(in crate::kernel) v_words: u32,
    pub(in crate::kernel) v_offset: u32,
    pub(in crate::kernel) mirror: u32,
    pub(in crate::kernel) capacity: u32,
    pub(in crate::kernel) count: u32,
    pub(in crate::kernel) first: u32,
    pub(in crate::kernel) window: u32,
    pub(in crate::kernel) group: u32,
    pub(in crate::kernel) tokens: u32,
    pub(in crate::kernel) scale: f32,
    pub(in crate::kernel) softcap: f32,
    pub(in crate::kernel) spare: [u32; 2],
}

impl Params {
    /// The block for pages of `layout`; `count` work records from `first`.
    pub(in crate::kernel) fn new(
        params: &AttentionParams<'_>,
        layout: &PageLayout,
        tokens: usize,
        records: Range<usize>,
    ) -> Self {
        let words = |bytes: usize| (bytes / 4) as u32;
        Self {
            d_k: params.d_k as u32,
            d_v: params.d_v as u32,
            k_words: words(layout.row_bytes(Side::Key)),
            v_words: words(layout.row_bytes(Side::Value)),
            v_offset: words(layout.v_offset()),
            mirror: words(layout.mirror_offset()),
            capacity: layout.capacity as u32,
            count: records.len() as u32,
            first: records.start as u32,
            window: params.window.unwrap_or(0),
            group: params.group as u32,
            tokens: tokens as u32,
            scale: params.scale,
            softcap: params.softcap.unwrap_or(0.0),
            spare: [0; 2],
        }
    }
}

/// A part of a run whose pages lie in one slab.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Stretch {
    run: u32,
    tile: u32,
    pages: u32,
    begin: u32,
    end: u32,
    resume: u32,
}

/// The pages of one encoding of one KV head that a call reads.
#[derive(Debug)]
struct Segment<'a> {
    layout: &'a PageLayout,
    pages: Vec<(&'a DeviceBlock, &'a [i32])>,
    rows: usize,
    /// Where its pages start in the call's page table.
    table: usize,
}

impl Segment<'_> {
    /// Entries whose position satisfies `before`, given that these come first.
    fn partition(&self, before: impl Fn(i32) -> bool) -> usize {
        let (mut low, mut high) = (0, self.rows);
        while low < high {
            let middle = low.midpoint(high);
            let capacity = self.layout.capacity;
            if before(self.pages[middle / capacity].1[middle % capacity]) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// One KV head of one sequence with its queries.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Unit<'a> {
    /// Which lane of the call.
    pub(in crate::kernel) lane: usize,
    /// The entries.
    pub(in crate::kernel) head: &'a HeadRows,
    /// Its index among the KV heads.
    pub(in crate::kernel) index: usize,
    /// `[Hq, T, d_k]` of the whole lane.
    pub(in crate::kernel) queries: &'a [f32],
    /// Positions of the `T` queries.
    pub(in crate::kernel) positions: &'a [i32],
    /// Which of its pages.
    pub(in crate::kernel) share: super::Share,
    /// Its only entries to be read; of attention alone.
    pub(in crate::kernel) spans: Option<&'a Spans>,
}

impl Unit<'_> {
    /// Query rows.
    pub(in crate::kernel) fn rows(&self, params: &AttentionParams<'_>) -> usize {
        params.group * self.positions.len()
    }

    /// Where row `row` of this unit's tiles stands in a `[Hq, T]` array.
    pub(in crate::kernel) fn dense(&self, params: &AttentionParams<'_>, row: usize) -> usize {
        let tokens = self.positions.len();
        (self.index * params.group + row % params.group) * tokens + row / params.group
    }
}

/// The units of sequences, head by head.
pub(in crate::kernel) fn units<'a>(
    lane: usize,
    heads: &'a [HeadRows],
    queries: &'a [f32],
    positions: &'a [i32],
    share: super::Share,
) -> impl Iterator<Item = Unit<'a>> {
    let unit = move |(index, head)| Unit { lane, head, index, queries, positions, share, spans: None };
    heads.iter().enumerate().map(unit)
}

/// Up to eight query rows of one unit.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Tile {
    /// Which unit.
    pub(in crate::kernel) unit: usize,
    /// First row.
    pub(in crate::kernel) first: usize,
    /// Rows.
    pub(in crate::kernel) rows: usize,
    /// Lowest and highest position.
    span: (i32, i32),
}

impl Tile {
    /// Lowest and highest position of its queries.
    pub(in crate::kernel) fn span(&self) -> (i32, i32) {
        self.span
    }
}

/// All tiles of the units.
pub(in crate::kernel) fn tiles(params: &AttentionParams<'_>, units: &[Unit<'_>]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (index, unit) in units.iter().enumerate() {
        for first in (0..unit.rows(params)).step_by(TILE) {
            let rows = TILE.min(unit.rows(params) - first);
            let seen = &unit.positions[first / params.group..=(first + rows - 1) / params.group];
            let span = seen.iter().fold((i32::MAX, i32::MIN), |(a, b), &p| (a.min(p), b.max(p)));
            tiles.push(Tile { unit: index, first, rows, span });
        }
    }
    tiles
}

/// Tiles with their queries and positions on the device.
#[derive(Debug)]
pub(in crate::kernel) struct Uploaded {
    pub(in crate::kernel) positions: Binding,
    queries: Binding,
    /// The queries as keys are that are stored rotated; the plain ones if none are.
    rotated: Binding,
}

impl Uploaded {
    /// The queries for keys of `layout`.
    pub(in crate::kernel) fn queries(&self, layout: &PageLayout) -> Binding {
        if layout.rotated(Side::Key) { self.rotated.clone() } else { self.queries.clone() }
    }
}

/// Brings the tiles' queries to the device as `[tile][d_k][8]`.
pub(in crate::kernel) fn upload(
    call: &mut Call<'_>,
    params: &AttentionParams<'_>,
    units: &[Unit<'_>],
    tiles: &[Tile],
) -> Uploaded {
    let d_k = params.d_k;
    // Rows past the last one of a head stand at a position before everything and see nothing.
    let mut positions = vec![i32::MIN; tiles.len() * TILE];
    let mut queries = vec![0.0f32; tiles.len() * TILE * d_k];
    let turns: Vec<bool> = units.iter().map(|u| u.head.rotated(Side::Key)).collect();
    // Rotated here rather than every stored key there: a dot product does not change.
    let mut rotated = vec![0.0f32; if turns.contains(&true) { queries.len() } else { 0 }];
    let mut turned = vec![0.0f32; d_k];
    for (i, tile) in tiles.iter().enumerate() {
        let unit = &units[tile.unit];
        let span = i * TILE * d_k..(i + 1) * TILE * d_k;
        for r in 0..tile.rows {
            let row = tile.first + r;
            positions[i * TILE + r] = unit.positions[row / params.group];
            let dense = unit.dense(params, row);
            let row = &unit.queries[dense * d_k..(dense + 1) * d_k];
            let put = |block: &mut [f32], row: &[f32]| {
                row.iter().enumerate().for_each(|(d, &q)| block[d * TILE + r] = q);
            };
            put(&mut queries[span.clone()], row);
            if turns[tile.unit] {
                turned.copy_from_slice(row);
                rotate(&mut turned);
                put(&mut rotated[span.clone()], &turned);
            }
        }
    }
    let queries = call.upload(&queries);
    let rotated = if rotated.is_empty() { queries.clone() } else { call.upload(&rotated) };
    Uploaded { positions: call.upload(&positions), queries, rotated }
}

/// A run: a tile on a range of entries of a segment.
#[derive(Clone, Copy, Debug)]
struct Run {
    segment: usize,
    begin: usize,
    end: usize,
}

/// Softmax over all entries of the units, as far as the device has it.
#[derive(Debug)]
pub(in crate::kernel) struct Softmax {
    /// `[tile][8][d_v]`; undefined without values.
    pub(in crate::kernel) out: Scratch,
    /// `[tile][8]`, [`NONE`] for rows that see nothing.
    pub(in crate::kernel) lse: Scratch,
}

/// The segments of a unit; none if it names its entries.
fn segments<'a>(unit: &Unit<'a>) -> Result<Vec<Segment<'a>>, KernelError> {
    if unit.spans.is_some() {
        return Ok(Vec::new());
    }
    let total = unit.head.pages().count();
    let share = unit.share.range(total);
    let mut found = Vec::new();
    let mut page_index = 0;
    for s in &unit.head.segments {
        let mut segment = Segment { layout: &s.layout, pages: Vec::new(), rows: 0, table: 0 };
        for (page, rows) in s.pages() {
            if share.contains(&page_index) && rows > 0 {
                segment.pages.push((DeviceBlock::of(page, NAME)?, &page.positions[..rows]));
                segment.rows += rows;
            }
            page_index += 1;
        }
        if segment.rows > 0 {
            found.push(segment);
        }
    }
    Ok(found)
}

/// All runs of some tiles, and the segments they read.
#[derive(Debug)]
struct Plan<'a> {
    /// Segments of all units.
    segments: Vec<Segment<'a>>,
    /// Runs tile by tile.
    runs: Vec<Vec<Run>>,
}

fn plan<'a>(
    params: &AttentionParams<'_>,
    units: &[Unit<'a>],
    tiles: &[Tile],
) -> Result<Plan<'a>, KernelError> {
    let (mut all, mut owners, mut table) = (Vec::new(), Vec::new(), 0);
    for unit in units {
        let start = all.len();
        for mut segment in segments(unit)? {
            segment.table = table;
            table += segment.pages.len();
            all.push(segment);
        }
        owners.push(start..all.len());
    }
    // What each tile can see: entries up to its last query, from the window of its first.
    let seen = |tile: &Tile, segment: &Segment<'_>| {
        let end = segment.partition(|p| p <= tile.span.1);
        let begin = match params.window {
            Some(w) => segment.partition(|p| i64::from(p) <= i64::from(tile.span.0) - i64::from(w)),
            None => 0,
        };
        begin.min(end)..end
    };
    let ranges: Vec<Vec<(usize, Range<usize>)>> = tiles
        .iter()
        .map(|tile| owners[tile.unit].clone().map(|s| (s, seen(tile, &all[s]))).collect())
        .collect();
    let work: usize = ranges.iter().flatten().map(|(_, r)| r.len()).sum();
    let target = work.div_ceil(RUNS).max(LEAST_RUN);
    let runs = ranges
        .into_iter()
        .map(|ranges| {
            let mut runs = Vec::new();
            for (segment, range) in ranges {
                // Cut between pages, so that no chunk of the kernel spans two runs.
                let capacity = all[segment].layout.capacity;
                let step = target.div_ceil(capacity) * capacity;
                let mut begin = range.start;
                while begin < range.end {
                    let end = ((begin / capacity * capacity) + step).min(range.end);
                    runs.push(Run { segment, begin, end });
                    begin = end;
                }
            }
            // The merge wants those of rotated values last.
            runs.sort_by_key(|run: &Run| all[run.segment].layout.rotated(Side::Value));
            runs
        })
        .collect();
    Ok(Plan { segments: all, runs })
}

/// Dispatches that do not depend on one another, by slab and layout.
#[derive(Debug)]
struct Batch<'a> {
    slab: &'a wgpu::Buffer,
    layout: &'a PageLayout,
    stretches: Vec<Stretch>,
}

/// Cuts the runs into stretches: one list of batches per round.
fn rounds<'a>(plan: &Plan<'a>) -> Vec<Vec<Batch<'a>>> {
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut rounds: Vec<BTreeMap<(u64, usize), Batch<'a>>> = Vec::new();
    let mut index = 0;
    for (tile, runs) in plan.runs.iter().enumerate() {
        for run in runs {
            let segment = &plan.segments[run.segment];
            let capacity = segment.layout.capacity;
            let layout = layouts.iter().position(|l| *l == segment.layout).unwrap_or_else(|| {
                layouts.push(segment.layout);
                layouts.len() - 1
            });
            let (mut begin, mut round) = (run.begin, 0);
            while begin < run.end {
                let page = begin / capacity;
                let slab = segment.pages[page].0.slab();
                // Of this run only: a slab may hold hundreds of pages more, and every run would walk them.
                let rest = &segment.pages[page..run.end.div_ceil(capacity)];
                let same = rest.iter().take_while(|(b, _)| b.slab() == slab).count();
                let end = ((page + same) * capacity).min(run.end);
                if rounds.len() == round {
                    rounds.push(BTreeMap::new());
                }
                let batch = rounds[round].entry((slab, layout)).or_insert_with(|| Batch {
                    slab: segment.pages[page].0.buffer(),
                    layout: segment.layout,
                    stretches: Vec::new(),
                });
                batch.stretches.push(Stretch {
                    run: index,
                    tile: tile as u32,
                    pages: (segment.table + page) as u32,
                    begin: (begin - page * capacity) as u32,
                    end: (end - page * capacity) as u32,
                    resume: u32::from(round > 0),
                });
                begin = end;
                round += 1;
            }
            index += 1;
        }
    }
    rounds.into_iter().map(|r| r.into_values().collect()).collect()
}

/// Records the softmax of `tiles`; without `values` only the log-sum-exp.
///
/// # Errors
/// A page of another backend, or a device error.
pub(in crate::kernel) fn record(
    call: &mut Call<'_>,
    params: &AttentionParams<'_>,
    units: &[Unit<'_>],
    tiles: &[Tile],
    uploaded: &Uploaded,
    values: bool,
) -> Result<Softmax, KernelError> {
    let mut params = *params;
    if !values {
        params.d_v = 0;
    }
    let plan = plan(&params, units, tiles)?;
    let whole: usize = plan.runs.iter().map(Vec::len).sum();
    let chosen = chosen::plan(&params, units, tiles, whole)?;
    let runs = whole + chosen.parts.iter().map(|p| p.all).sum::<usize>();
    let sums = call.scratch(runs * TILE * params.d_v);
    let states = call.scratch(runs * TILE * 2);
    let pages: Vec<u32> = plan.segments.iter().flat_map(|s| s.pages.iter().map(|(b, _)| b.word())).collect();
    let pages = call.upload(&pages);
    let table = if chosen.table.is_empty() { pages.clone() } else { call.upload(&chosen.table) };
    let rounds = rounds(&plan);
    let whole_pages = rounds.iter().flatten().map(|batch| (batch, &pages, &[][..]));
    let entries = chosen.batches.iter().map(|batch| (batch, &table, &[("CHOSEN", 1)][..]));
    for (batch, places, constant) in whole_pages.chain(entries) {
        let count = batch.stretches.len();
        let block = Params::new(&params, batch.layout, 0, 0..count);
        let types = [("K_TYPE", kind(batch.layout, Side::Key)), ("V_TYPE", kind(batch.layout, Side::Value))];
        let constants = [&types[..], constant].concat();
        let bindings = [
            Binding::Slab(batch.slab.clone()),
            places.clone(),
            call.upload(&batch.stretches),
            uploaded.positions.clone(),
            uploaded.queries(batch.layout),
            Binding::from(&sums),
            Binding::from(&states),
            call.upload(&packs(batch.layout, [Side::Key, Side::Value])),
        ];
        call.dispatch("attend", &constants, &block, &bindings, count)?;
    }

    let mut rows = Vec::with_capacity(tiles.len() * TILE);
    // The parts of whole pages come first.
    let (mut whole_part, mut chosen_part) = (0, whole as u32);
    for (i, (tile, runs)) in tiles.iter().zip(&plan.runs).enumerate() {
        let unit = &units[tile.unit];
        let turned = |run: &&Run| plan.segments[run.segment].layout.rotated(Side::Value);
        let of_pages = chosen::Parts { all: runs.len(), rotated: runs.iter().filter(turned).count() };
        let (part, parts) = match unit.spans {
            Some(_) => (&mut chosen_part, chosen.parts[i]),
            None => (&mut whole_part, of_pages),
        };
        for r in 0..tile.rows {
            let query_head = unit.index * params.group + (tile.first + r) % params.group;
            let sink = params
                .sink_logits
                .filter(|_| unit.share.index == 0)
                .map_or(NONE, |s| s[query_head].max(NONE));
            rows.push(merge_partials::gpu::Row {
                part: *part,
                parts: parts.all as u32,
                rotated: parts.rotated as u32,
                lane: r as u32,
                target_row: (i * TILE + r) as u32,
                sink,
            });
        }
        *part += parts.all as u32;
    }
    let strides = merge_partials::gpu::Params {
        d_v: params.d_v as u32,
        count: rows.len() as u32,
        part_stride: (TILE * params.d_v) as u32,
        row_stride: 1,
        dim_stride: TILE as u32,
        state_stride: 2 * TILE as u32,
        sum_offset: TILE as u32,
        block: rotation_block(params.d_v) as u32,
    };
    let out = call.scratch(tiles.len() * TILE * params.d_v);
    let lse = call.scratch(tiles.len() * TILE);
    merge_partials::gpu::record(
        call,
        &strides,
        &rows,
        &Binding::from(&states),
        &Binding::from(&sums),
        (&out, &lse),
    )?;
    Ok(Softmax { out, lse })
}

/// Bytes a tile costs in a call: queries, result, and partial results of its share of the runs.
fn tile_bytes(params: &AttentionParams<'_>, tiles: usize) -> usize {
    let runs = RUNS.div_ceil(tiles) + 2;
    4 * TILE * (params.d_k + params.d_v + runs * (params.d_v + 2) + 8)
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(
    context: &Context,
    params: &AttentionParams<'_>,
    lanes: &mut [AttendLane<'_>],
) -> Result<(), KernelError> {
    for lane in lanes.iter() {
        lane.validate(params)?;
    }
    // Queries and entries are borrowed for the whole call, results only where they are written.
    let mut results: Vec<_> = Vec::with_capacity(lanes.len());
    let mut all = Vec::new();
    for (i, lane) in lanes.iter_mut().enumerate() {
        let AttendLane { heads, queries, positions, share, spans, out, lse, mass } = lane;
        let spans = *spans;
        all.extend(
            units(i, heads, queries, positions, *share)
                .map(|unit| Unit { spans: spans.map(|s| &s[unit.index]), ..unit }),
        );
        results.push((out, lse, mass));
    }
    let tiles = tiles(params, &all);
    if tiles.is_empty() {
        // Without queries there is nothing to compute, and no mass.
        results.iter_mut().filter_map(|(_, _, mass)| mass.as_mut()).for_each(|mass| mass.fill(0.0));
        return Ok(());
    }
    let step = (context.batch_bytes() / tile_bytes(params, tiles.len())).max(1);
    // In the usual case everything is one submission, and the mass is computed where the softmax left its
    // log-sum-exp; a call larger than that gets its mass from a second pass.
    let whole = tiles.len() <= step;
    let massive: Vec<usize> = (0..results.len()).filter(|&i| results[i].2.is_some()).collect();
    for tiles in tiles.chunks(step) {
        let mut call = Call::new(context, NAME);
        let uploaded = upload(&mut call, params, &all, tiles);
        let softmax = record(&mut call, params, &all, tiles, &uploaded, true)?;
        call.read(&softmax.out);
        call.read(&softmax.lse);
        let mut masses = Vec::new();
        if whole {
            for &lane in &massive {
                let lse = Binding::from(&softmax.lse);
                let owned = |u: &Unit<'_>| u.lane == lane;
                let mass =
                    attention_mass::gpu::record(&mut call, params, &all, tiles, &uploaded, &lse, owned)?;
                call.read(&mass);
                masses.push(lane);
            }
        }
        let back = call.finish()?;
        let (outs, lses) = (back.floats(0), back.floats(1));
        for (i, tile) in tiles.iter().enumerate() {
            let unit = &all[tile.unit];
            let (out, lse, _) = &mut results[unit.lane];
            for r in 0..tile.rows {
                let (from, to) = (i * TILE + r, unit.dense(params, tile.first + r));
                out[to * params.d_v..(to + 1) * params.d_v]
                    .copy_from_slice(&outs[from * params.d_v..(from + 1) * params.d_v]);
                lse[to] = from_device(lses[from]);
            }
        }
        for (i, lane) in masses.into_iter().enumerate() {
            if let Some(mass) = &mut results[lane].2 {
                let len = mass.len();
                mass.copy_from_slice(&back.floats(2 + i)[..len]);
            }
        }
    }
    if !whole {
        for (i, (_, lse, mass)) in results.iter_mut().enumerate() {
            if let Some(mass) = mass {
                let units: Vec<Unit<'_>> = all.iter().filter(|u| u.lane == i).copied().collect();
                attention_mass::gpu::run_units(context, params, &units, lse, mass)?;
            }
        }
    }
    Ok(())
}

/// A log-sum-exp as the host writes it.
pub(in crate::kernel) fn from_device(lse: f32) -> f32 {
    if lse == NONE { f32::NEG_INFINITY } else { lse }
}

/// A log-sum-exp as the device writes it.
pub(in crate::kernel) fn to_device(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { NONE } else { lse }
}
