//! The second pass over keys on the device: one thread per stored entry.
//!
//! *Helps* because no two threads add to one sum: the result has the same bits every time, without atomics.
//! *Hurts* when there are few entries and many queries: then few threads have long loops.

use super::{MassArgs, NAME};
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, Scratch, kind, packs};
use crate::device::page::{PageLayout, Side};
use crate::error::{DeviceError, KernelError};
use crate::kernel::AttentionParams;
use crate::kernel::attend::Share;
use crate::kernel::attend::gpu::{self as attend, Params, TILE, Tile, Unit, Uploaded, to_device};
use std::collections::BTreeMap;

/// Entries per workgroup.
pub(in crate::kernel) const CHUNK: usize = 64;

/// Up to 64 entries of one page.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Chunk {
    pub(in crate::kernel) page: u32,
    pub(in crate::kernel) begin: u32,
    pub(in crate::kernel) rows: u32,
    pub(in crate::kernel) target_at: u32,
    pub(in crate::kernel) stride: u32,
    pub(in crate::kernel) tile: u32,
    pub(in crate::kernel) tile_begin: u32,
    pub(in crate::kernel) tile_end: u32,
}

/// Which of the two weight kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Output {
    /// Sums over queries, `[G, rows]` per head.
    Sums,
    /// Every query's weights, `[G, T, rows]` per head.
    Rows,
}

impl Output {
    fn shader(self) -> &'static str {
        match self {
            Self::Sums => "attention_mass",
            Self::Rows => "window_scores",
        }
    }

    /// Output values per entry of a unit.
    pub(in crate::kernel) fn lines(self, params: &AttentionParams<'_>, unit: &Unit<'_>) -> usize {
        match self {
            Self::Sums => params.group,
            Self::Rows => unit.rows(params),
        }
    }
}

/// Records the mass of the units that `owned` picks, in their order.
///
/// # Errors
/// A page of another backend, or a device error.
pub(in crate::kernel) fn record(
    call: &mut Call<'_>,
    params: &AttentionParams<'_>,
    units: &[Unit<'_>],
    tiles: &[Tile],
    uploaded: &Uploaded,
    lse: &Binding,
    owned: impl Fn(&Unit<'_>) -> bool,
) -> Result<Scratch, KernelError> {
    record_weights(call, params, Output::Sums, units, tiles, uploaded, lse, owned)
}

/// As [`record`], for either output.
///
/// # Errors
/// As [`record`].
#[allow(clippy::too_many_arguments, reason = "the facts of a call, each used once")]
pub(in crate::kernel) fn record_weights(
    call: &mut Call<'_>,
    params: &AttentionParams<'_>,
    output: Output,
    units: &[Unit<'_>],
    tiles: &[Tile],
    uploaded: &Uploaded,
    lse: &Binding,
    owned: impl Fn(&Unit<'_>) -> bool,
) -> Result<Scratch, KernelError> {
    // By slab, layout and number of queries, all of which the uniform block holds or implies.
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut groups: BTreeMap<(u64, usize, usize), (&wgpu::Buffer, Vec<Chunk>)> = BTreeMap::new();
    let mut start = 0;
    for (index, unit) in units.iter().enumerate() {
        if !owned(unit) {
            continue;
        }
        let first = tiles.partition_point(|t| t.unit < index);
        let end = tiles.partition_point(|t| t.unit <= index);
        let rows = unit.head.rows();
        for page in unit.head.pages() {
            let block = DeviceBlock::of(page.page, NAME)?;
            let layout = layouts.iter().position(|l| **l == **page.layout).unwrap_or_else(|| {
                layouts.push(page.layout);
                layouts.len() - 1
            });
            let key = (block.slab(), layout, unit.positions.len());
            let chunks = &mut groups.entry(key).or_insert_with(|| (block.buffer(), Vec::new())).1;
            for begin in (0..page.rows).step_by(CHUNK) {
                let n = CHUNK.min(page.rows - begin);
                let positions = &page.positions()[begin..begin + n];
                // Sums skip the queries that see nothing of the chunk; rows must write their zeros.
                let (tile_begin, tile_end) = match output {
                    Output::Sums => visible(params, &tiles[first..end], positions),
                    Output::Rows => (0, end - first),
                };
                chunks.push(Chunk {
                    page: block.word(),
                    begin: begin as u32,
                    rows: n as u32,
                    target_at: (start + page.first + begin) as u32,
                    stride: rows as u32,
                    tile: first as u32,
                    tile_begin: (first + tile_begin) as u32,
                    tile_end: (first + tile_end) as u32,
                });
            }
        }
        start += rows * output.lines(params, unit);
    }
    let mass = call.scratch(start);
    for ((_, layout, tokens), (slab, chunks)) in groups {
        let layout = layouts[layout];
        let block = Params::new(params, layout, tokens, 0..chunks.len());
        let bindings = [
            Binding::Slab(slab.clone()),
            call.upload(&chunks),
            uploaded.positions.clone(),
            uploaded.queries(layout),
            lse.clone(),
            Binding::from(&mass),
            call.upload(&packs(layout, [Side::Key, Side::Value])),
        ];
        call.dispatch(
            output.shader(),
            &[("K_TYPE", kind(layout, Side::Key))],
            &block,
            &bindings,
            chunks.len(),
        )?;
    }
    Ok(mass)
}

/// The tiles, from the first to the last, of which some query sees some of the entries at `positions`.
fn visible(params: &AttentionParams<'_>, tiles: &[Tile], positions: &[i32]) -> (usize, usize) {
    let (Some(&low), Some(&high)) = (positions.first(), positions.last()) else { return (0, 0) };
    let sees = |t: &Tile| {
        t.span().1 >= low
            && params.window.is_none_or(|w| i64::from(t.span().0) - i64::from(high) < i64::from(w))
    };
    let begin = tiles.iter().position(sees).unwrap_or(0);
    let end = tiles.iter().rposition(sees).map_or(begin, |i| i + 1);
    (begin, end)
}

/// The mass of some units of one lane whose `lse` (`[Hq, T]` of the lane) is on the host.
///
/// # Errors
/// [`KernelError`].
pub(in crate::kernel) fn run_units(
    context: &Context,
    params: &AttentionParams<'_>,
    units: &[Unit<'_>],
    lse: &[f32],
    mass: &mut [f32],
) -> Result<(), KernelError> {
    let mut start = 0;
    let output = |u: &Unit<'_>| params.group * u.head.rows();
    for batch in batches(context, params, units, output)? {
        let tiles = attend::tiles(params, batch);
        let mut call = Call::new(context, NAME);
        let uploaded = attend::upload(&mut call, params, batch, &tiles);
        let mut lses = vec![attend::NONE; tiles.len() * TILE];
        for (i, tile) in tiles.iter().enumerate() {
            for r in 0..tile.rows {
                lses[i * TILE + r] = to_device(lse[batch[tile.unit].dense(params, tile.first + r)]);
            }
        }
        let lses = call.upload(&lses);
        let result = record(&mut call, params, batch, &tiles, &uploaded, &lses, |_| true)?;
        call.read(&result);
        let back = call.finish()?;
        let len: usize = batch.iter().map(output).sum();
        mass[start..start + len].copy_from_slice(&back.floats(0)[..len]);
        start += len;
    }
    Ok(())
}

/// Consecutive units whose output, of so many floats, and queries fit one call.
///
/// # Errors
/// [`DeviceError::Limit`] if a single head is too large.
pub(in crate::kernel) fn batches<'s, 'a>(
    context: &Context,
    params: &AttentionParams<'_>,
    units: &'s [Unit<'a>],
    output: impl Fn(&Unit<'a>) -> usize,
) -> Result<Vec<&'s [Unit<'a>]>, DeviceError> {
    let mut batches = Vec::new();
    let (mut first, mut held) = (0, 0);
    for (i, unit) in units.iter().enumerate() {
        let out = 4 * output(unit);
        let queries = 4 * unit.rows(params).next_multiple_of(TILE) * params.d_k;
        let copies = 1 + usize::from(unit.head.rotated(Side::Key));
        if out.max(queries) as u64 > context.binding_limit() {
            return Err(DeviceError::Limit {
                what: "attention weights or scores of one KV head",
                need: out.max(queries) as u64,
                limit: context.binding_limit(),
                hint: "ask for fewer queries at once",
            });
        }
        if held + out + copies * queries > context.batch_bytes() && i > first {
            batches.push(&units[first..i]);
            (first, held) = (i, 0);
        }
        held += out + copies * queries;
    }
    if first < units.len() {
        batches.push(&units[first..]);
    }
    Ok(batches)
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(
    context: &Context,
    params: &AttentionParams<'_>,
    args: &mut MassArgs<'_>,
) -> Result<(), KernelError> {
    args.validate(params)?;
    let units: Vec<Unit<'_>> =
        attend::units(0, args.heads, args.queries, args.positions, Share::ALL).collect();
    run_units(context, params, &units, args.lse, args.mass)
}
