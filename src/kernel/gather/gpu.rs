//! Gathering on the device. Into pages nothing leaves the device: a shader packs the chosen rows, copies put
//! them in place. Into dense host buffers the rows are widened on the device and read back.
//!
//! *Helps* compaction cost one read and two writes of what is kept, and no wait. *Hurts* by the packed buffer
//! in between, so large gathers run in parts.

use super::{GatherArgs, GatherTarget, NAME, copy_metadata, in_parts, is_mixed};
use crate::device::encoding::rotate;
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, Scratch, kind, packs};
use crate::device::page::{HeadRows, Page, PageLayout, Side};
use crate::error::KernelError;
use crate::kernel::rebuild;
use std::collections::BTreeMap;

/// The uniform block of `shaders/gather.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    d_k: u32,
    d_v: u32,
    k_words: u32,
    v_words: u32,
    v_offset: u32,
    mirror: u32,
    capacity: u32,
    count: u32,
    first: u32,
    widen: u32,
    values: u32,
    positions: u32,
    biases: u32,
    spare: [u32; 3],
}

/// One chosen entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Entry {
    page: u32,
    row: u32,
    to: u32,
}

/// Where the parts of the packed buffer start, in words.
#[derive(Clone, Copy, Debug)]
struct Packed {
    values: usize,
    positions: usize,
    biases: usize,
    len: usize,
}

/// Records the copy of `slots` into a packed buffer: as they lie, or `widen`ed to so many dimensions of keys and of
/// values, all or none.
fn record(
    call: &mut Call<'_>,
    head: &HeadRows,
    slots: &[u32],
    packed: &Packed,
    widen: Option<(usize, usize)>,
) -> Result<Scratch, KernelError> {
    let sources: Vec<_> = head.pages().collect();
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut groups: BTreeMap<(u64, usize), (&wgpu::Buffer, Vec<Entry>)> = BTreeMap::new();
    for (to, &slot) in slots.iter().enumerate() {
        let slot = slot as usize;
        let source = &sources[sources.partition_point(|p| p.first + p.rows <= slot)];
        let block = DeviceBlock::of(source.page, NAME)?;
        let layout = layouts.iter().position(|l| **l == **source.layout).unwrap_or_else(|| {
            layouts.push(source.layout);
            layouts.len() - 1
        });
        let entry = Entry { page: block.word(), row: (slot - source.first) as u32, to: to as u32 };
        groups.entry((block.slab(), layout)).or_insert_with(|| (block.buffer(), Vec::new())).1.push(entry);
    }
    let buffer = call.scratch(packed.len);
    for ((_, layout), (slab, entries)) in groups {
        let layout = layouts[layout];
        let words = |bytes: usize| (bytes / 4) as u32;
        let params = Params {
            d_k: widen.map_or(layout.d_k, |(d_k, _)| d_k) as u32,
            d_v: widen.map_or(layout.d_v, |(_, d_v)| d_v) as u32,
            k_words: words(layout.row_bytes(Side::Key)),
            v_words: words(layout.row_bytes(Side::Value)),
            v_offset: words(layout.v_offset()),
            mirror: words(layout.mirror_offset()),
            capacity: layout.capacity as u32,
            count: entries.len() as u32,
            first: 0,
            widen: u32::from(widen.is_some()),
            values: packed.values as u32,
            positions: packed.positions as u32,
            biases: packed.biases as u32,
            spare: [0; 3],
        };
        let constants = [("K_TYPE", kind(layout, Side::Key)), ("V_TYPE", kind(layout, Side::Value))];
        let bindings = [
            Binding::Slab(slab.clone()),
            call.upload(&entries),
            Binding::from(&buffer),
            call.upload(&packs(layout, [Side::Key, Side::Value])),
        ];
        call.dispatch("gather", &constants, &params, &bindings, entries.len())?;
    }
    Ok(buffer)
}

fn into_pages(
    context: &Context,
    head: &HeadRows,
    slots: &[u32],
    layout: &PageLayout,
    pages: &mut [Page],
) -> Result<(), KernelError> {
    let (k, v) = (layout.row_bytes(Side::Key) / 4, layout.row_bytes(Side::Value) / 4);
    let pages_per_call = (context.batch_bytes() / (4 * layout.capacity * (k + v + 2))).max(1);
    for (slots, pages) in slots.chunks(pages_per_call * layout.capacity).zip(pages.chunks_mut(pages_per_call))
    {
        let n = slots.len();
        let packed =
            Packed { values: n * k, positions: n * (k + v), biases: n * (k + v + 1), len: n * (k + v + 2) };
        let mut call = Call::new(context, NAME);
        let buffer = record(&mut call, head, slots, &packed, None)?;
        for (i, page) in pages.iter_mut().enumerate() {
            let first = i * layout.capacity;
            let rows = layout.capacity.min(n - first);
            let biased = page.bias.is_some();
            let block = DeviceBlock::of_mut(page, NAME)?;
            block.set_biased(biased);
            // Parts of the packed buffer and of the page: start and words per row.
            let parts = [
                (0, layout.range(Side::Key).start, k),
                (packed.values, layout.range(Side::Value).start, v),
                (packed.positions, layout.mirror_offset(), 1),
                (packed.biases, layout.mirror_offset() + 4 * layout.capacity, 1),
            ];
            for (from, to, words) in parts {
                let source = 4 * (from + first * words) as u64;
                call.copy(
                    &buffer,
                    source,
                    block.buffer(),
                    block.offset() + to as u64,
                    4 * (rows * words) as u64,
                );
            }
        }
        call.finish()?;
    }
    Ok(())
}

/// Turns rows back that are stored rotated: `rows [slots, d]`.
fn turn_back(head: &HeadRows, slots: &[u32], side: Side, rows: &mut [f32]) {
    if rows.is_empty() || !head.rotated(side) {
        return;
    }
    let sources: Vec<_> = head.pages().collect();
    let d = rows.len() / slots.len();
    for (&slot, row) in slots.iter().zip(rows.chunks_exact_mut(d)) {
        let source = sources.partition_point(|p| p.first + p.rows <= slot as usize);
        if sources[source].layout.rotated(side) {
            rotate(row);
        }
    }
}

fn into_dense(
    context: &Context,
    head: &HeadRows,
    slots: &[u32],
    keys: &mut [f32],
    values: &mut [f32],
) -> Result<(), KernelError> {
    let (d_k, d_v) = (keys.len() / slots.len(), values.len() / slots.len());
    let step = (context.batch_bytes() / (4 * (d_k + d_v))).max(1);
    for (i, slots) in slots.chunks(step).enumerate() {
        let n = slots.len();
        let packed = Packed { values: n * d_k, positions: 0, biases: 0, len: n * (d_k + d_v) };
        let mut call = Call::new(context, NAME);
        let buffer = record(&mut call, head, slots, &packed, Some((d_k, d_v)))?;
        call.read(&buffer);
        let back = call.finish()?;
        let (from_k, from_v) = back.floats(0)[..packed.len].split_at(packed.values);
        keys[i * step * d_k..][..n * d_k].copy_from_slice(from_k);
        values[i * step * d_v..][..n * d_v].copy_from_slice(from_v);
    }
    turn_back(head, slots, Side::Key, keys);
    turn_back(head, slots, Side::Value, values);
    Ok(())
}

/// Rows of any slots for a shader of another kernel: `keys [slots, d_k]`, then `values [slots, d_v]`, widened, where a side
/// that is not wanted has 0 dimensions. Rows that are stored rotated among others that are not come by way of the host,
/// which turns them back.
///
/// # Errors
/// [`KernelError`].
pub(crate) fn widened(
    context: &Context,
    call: &mut Call<'_>,
    head: &HeadRows,
    slots: &[u32],
    (d_k, d_v): (usize, usize),
) -> Result<Scratch, KernelError> {
    let n = slots.len();
    let packed = Packed { values: n * d_k, positions: 0, biases: 0, len: n * (d_k + d_v) };
    let turned = |side, d| d > 0 && head.rotated(side);
    if !turned(Side::Key, d_k) && !turned(Side::Value, d_v) {
        return record(call, head, slots, &packed, Some((d_k, d_v)));
    }
    let mut rows = vec![0.0; packed.len];
    let (keys, values) = rows.split_at_mut(packed.values);
    into_dense(context, head, slots, keys, values)?;
    Ok(call.load(&rows))
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if matches!(args.target, GatherTarget::Dense { .. }) && is_mixed(args.head, args.slots) {
        return in_parts(args, |args| run(context, args), |args| rebuild::gpu::run(context, args));
    }
    if args.slots.is_empty() {
        return Ok(());
    }
    match &mut args.target {
        GatherTarget::Pages { layout, pages } => {
            copy_metadata(args.head, args.slots, layout, pages);
            into_pages(context, args.head, args.slots, layout, pages)
        }
        GatherTarget::Dense { keys, values } => into_dense(context, args.head, args.slots, keys, values),
    }
}
