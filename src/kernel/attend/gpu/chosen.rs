//! Runs over chosen entries: a table says where each lies, and a run is a range of the table.
//!
//! A dispatch binds one slab and knows one layout, so the entries of a KV head are grouped by both, in order, and a run
//! stays within a group. Its workgroup computes on up to 64 entries at a time however far apart they lie.
//!
//! *Helps* because lone entries fill a workgroup as consecutive ones do. *Hurts* by a table of eight bytes per entry
//! and call, and where the pages of a head lie in many slabs: every one ends a run.

use super::{Batch, LEAST_RUN, RUNS, Stretch, Tile, Unit};
use crate::device::gpu::DeviceBlock;
use crate::device::page::{PageLayout, Side};
use crate::error::KernelError;
use crate::kernel::attend::NAME;
use crate::kernel::{AttentionParams, Spans};
use std::collections::BTreeMap;
use std::ops::Range;

/// Entries that a workgroup computes on at a time: `CHUNK` of the shader.
const CHUNK: usize = 64;

/// Chosen entries of one KV head that lie in one slab, in one layout.
#[derive(Debug)]
struct Group<'a> {
    layout: &'a PageLayout,
    slab: u64,
    buffer: &'a wgpu::Buffer,
    /// Word of the page and row of each entry.
    places: Vec<[u32; 2]>,
    /// Its position.
    positions: Vec<i32>,
    /// Where its places start in the call's table.
    start: usize,
}

impl Group<'_> {
    /// What queries between two positions may see.
    fn seen(&self, params: &AttentionParams<'_>, (least, most): (i32, i32)) -> Range<usize> {
        let end = self.positions.partition_point(|&p| p <= most);
        let start = params.window.map_or(0, |w| {
            self.positions.partition_point(|&p| i64::from(p) <= i64::from(least) - i64::from(w))
        });
        start.min(end)..end
    }
}

/// How many partial results a tile has, and how many of them, the last ones, are of rotated values.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parts {
    pub all: usize,
    pub rotated: usize,
}

/// All runs of the tiles whose units name their entries.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// Word of the page and row, entry by entry.
    pub table: Vec<[u32; 2]>,
    /// To be dispatched in any order.
    pub batches: Vec<Batch<'a>>,
    /// Per tile; of other tiles none.
    pub parts: Vec<Parts>,
}

/// The groups of a unit, those of rotated values last: so the merge wants its parts.
fn groups<'a>(unit: &Unit<'a>, spans: &Spans) -> Result<Vec<Group<'a>>, KernelError> {
    let mut groups: BTreeMap<(bool, usize, u64), Group<'a>> = BTreeMap::new();
    let mut segments = unit.head.segments.iter().enumerate();
    let (mut current, mut first, mut end) = (None, 0, 0);
    for slot in spans.slots() {
        while slot >= end {
            let Some((index, segment)) = segments.next() else { return Ok(Vec::new()) };
            (first, end) = (end, end + segment.rows);
            current = Some((index, segment));
        }
        let Some((index, segment)) = current else { continue };
        let (page, row) =
            ((slot - first) / segment.layout.capacity, (slot - first) % segment.layout.capacity);
        let page = &segment.pages[page];
        let block = DeviceBlock::of(page, NAME)?;
        let key = (segment.layout.rotated(Side::Value), index, block.slab());
        let group = groups.entry(key).or_insert_with(|| Group {
            layout: &segment.layout,
            slab: block.slab(),
            buffer: block.buffer(),
            places: Vec::new(),
            positions: Vec::new(),
            start: 0,
        });
        group.places.push([block.word(), row as u32]);
        group.positions.push(page.positions[row]);
    }
    Ok(groups.into_values().collect())
}

/// Plans the tiles whose units name their entries; the first run is number `first`.
///
/// # Errors
/// A page of another backend.
pub(super) fn plan<'a>(
    params: &AttentionParams<'_>,
    units: &[Unit<'a>],
    tiles: &[Tile],
    first: usize,
) -> Result<Plan<'a>, KernelError> {
    let mut table = Vec::new();
    let mut of_units = Vec::with_capacity(units.len());
    for (index, unit) in units.iter().enumerate() {
        let mut found = match unit.spans {
            Some(spans) if tiles.iter().any(|t| t.unit == index) => groups(unit, spans)?,
            _ => Vec::new(),
        };
        for group in &mut found {
            group.start = table.len();
            table.append(&mut group.places);
        }
        of_units.push(found);
    }
    let ranges = |tile: &Tile| {
        let span = tile.span;
        of_units[tile.unit].iter().map(move |group| (group, group.seen(params, span)))
    };
    let work: usize = tiles.iter().flat_map(ranges).map(|(_, r)| r.len()).sum();
    let step = work.div_ceil(RUNS).max(LEAST_RUN).next_multiple_of(CHUNK);
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut batches: BTreeMap<(u64, usize), Batch<'a>> = BTreeMap::new();
    let mut parts = Vec::with_capacity(tiles.len());
    let mut run = first as u32;
    for (index, tile) in tiles.iter().enumerate() {
        let mut count = Parts::default();
        for (group, range) in ranges(tile) {
            let layout = layouts.iter().position(|l| *l == group.layout).unwrap_or_else(|| {
                layouts.push(group.layout);
                layouts.len() - 1
            });
            for begin in range.clone().step_by(step) {
                let batch = batches.entry((group.slab, layout)).or_insert_with(|| Batch {
                    slab: group.buffer,
                    layout: group.layout,
                    stretches: Vec::new(),
                });
                let end = range.end.min(begin + step) - begin;
                let pages = (group.start + begin) as u32;
                let (tile, end) = (index as u32, end as u32);
                batch.stretches.push(Stretch { run, tile, pages, begin: 0, end, resume: 0 });
                run += 1;
                count.all += 1;
                count.rotated += usize::from(group.layout.rotated(Side::Value));
            }
        }
        parts.push(count);
    }
    Ok(Plan { table, batches: batches.into_values().collect(), parts })
}
