//! Logits on the device: one thread per chosen entry, for all query rows of its KV head.
//!
//! Only chosen entries have a place in the result. *Helps* the lower levels of a hierarchy, which ask
//! for little of much. *Hurts* spans of single entries: each keeps a workgroup.

use super::{DotArgs, NAME};
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, Scratch, kind, packs};
use crate::device::page::{PageLayout, Side};
use crate::error::KernelError;
use crate::kernel::attend::Share;
use crate::kernel::attend::gpu::{self as attend, Params, Tile, Unit, Uploaded};
use crate::kernel::attention_mass::gpu::{CHUNK, Chunk, batches};
use crate::kernel::simd::take;
use crate::kernel::{AttentionParams, Span, Spans};
use std::collections::BTreeMap;

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(
    context: &Context,
    params: &AttentionParams<'_>,
    args: &mut DotArgs<'_>,
) -> Result<(), KernelError> {
    args.validate(params)?;
    // Every query stands behind every entry, and no window hides what is far.
    let positions = vec![i32::MAX; args.tokens];
    let params = AttentionParams { window: None, ..*params };
    let spans = args.spans;
    let chosen = |unit: &Unit<'_>| spans.map_or_else(|| unit.head.rows(), |s| s[unit.index].rows());
    let units: Vec<Unit<'_>> = attend::units(0, args.heads, args.queries, &positions, Share::ALL).collect();
    let mut out = &mut *args.out;
    for batch in batches(context, &params, &units, |u| u.rows(&params) * chosen(u))? {
        let tiles = attend::tiles(&params, batch);
        let mut call = Call::new(context, NAME);
        let uploaded = attend::upload(&mut call, &params, batch, &tiles);
        let scores = record(&mut call, &params, batch, &tiles, &uploaded, spans)?;
        call.read(&scores);
        let back = call.finish()?;
        let scored = take(&mut out, batch.iter().map(|unit| unit.rows(&params) * chosen(unit)).sum());
        scored.copy_from_slice(&back.floats(0)[..scored.len()]);
    }
    Ok(())
}

/// Records the scores of the units: for each in turn `[G, T, chosen]`.
fn record(
    call: &mut Call<'_>,
    params: &AttentionParams<'_>,
    units: &[Unit<'_>],
    tiles: &[Tile],
    uploaded: &Uploaded,
    spans: Option<&[Spans]>,
) -> Result<Scratch, KernelError> {
    // By slab and layout, both of which a dispatch is bound to.
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut groups: BTreeMap<(u64, usize), (&wgpu::Buffer, Vec<Chunk>)> = BTreeMap::new();
    let mut start = 0;
    for (index, unit) in units.iter().enumerate() {
        let first = tiles.partition_point(|t| t.unit < index) as u32;
        let end = tiles.partition_point(|t| t.unit <= index) as u32;
        let all = [Span { start: 0, end: unit.head.rows() as u32 }];
        let (chosen, rows) = match spans {
            Some(spans) => (spans[unit.index].spans(), spans[unit.index].rows()),
            None => (&all[..], unit.head.rows()),
        };
        let mut before = 0;
        for (page, parts) in Spans::in_pages(unit.head, chosen, CHUNK) {
            let block = DeviceBlock::of(page.page, NAME)?;
            let layout = layouts.iter().position(|l| **l == **page.layout).unwrap_or_else(|| {
                layouts.push(page.layout);
                layouts.len() - 1
            });
            let group = groups.entry((block.slab(), layout));
            let chunks = &mut group.or_insert_with(|| (block.buffer(), Vec::new())).1;
            for part in parts {
                chunks.push(Chunk {
                    page: block.word(),
                    begin: (part.start - page.first) as u32,
                    rows: part.len() as u32,
                    target_at: (start + before) as u32,
                    stride: rows as u32,
                    tile: first,
                    tile_begin: first,
                    tile_end: end,
                });
                before += part.len();
            }
        }
        start += rows * unit.rows(params);
    }
    let scores = call.scratch(start);
    for ((_, layout), (slab, chunks)) in groups {
        let layout = layouts[layout];
        let tokens = units.first().map_or(0, |u| u.positions.len());
        let block = Params::new(params, layout, tokens, 0..chunks.len());
        let bindings = [
            Binding::Slab(slab.clone()),
            call.upload(&chunks),
            uploaded.positions.clone(),
            uploaded.queries(layout),
            Binding::from(&scores),
            call.upload(&packs(layout, [Side::Key, Side::Value])),
        ];
        let constants = [("K_TYPE", kind(layout, Side::Key))];
        call.dispatch("dot_scores", &constants, &block, &bindings, chunks.len())?;
    }
    Ok(scores)
}
