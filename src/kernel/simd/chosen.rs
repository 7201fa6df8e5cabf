//! Tiles of chosen entries: [`Spans`] cut into what the code for whole pages computes on.
//!
//! A run of some length within a page is a tile where it lies. Of shorter runs and lone rows up to [`TILE`] entries are one
//! tile ([`super::copies`]): a list of exact rows, or packed ones copied by fours, as they lie in words; those of a four
//! that are not chosen get the logit `−∞`. Rows that share parameters with others cannot be copied: there a tile is the
//! range of a band around chosen rows, the others again without weight.
//!
//! The next tile is known while one is computed, and its rows are on their way then: lone rows are cache misses that no
//! hardware foresees. A tile of lone exact rows is short, so that two of them fit into the first cache level. Positions, a miss more per row, are not looked at where every query sees all entries.
//!
//! *Helps* by leaving unread what an index has ruled out. *Hurts* lone entries of packed pages: sixteen keys share every
//! cache line of theirs.

use super::copies::{Copies, Stored, UNIT, Waiting};
use super::prefetch::{Ahead, request};
use super::tile::{TILE, Tile, request_page};
use crate::device::HeadRows;
use crate::device::encoding::{BAND, PackedRows};
use crate::device::page::{Page, Rows, Segment, Side};
use crate::kernel::{Span, Spans};
use bytemuck::cast_slice;
use fearless_simd::Simd;
use std::ops::Range;

/// Fewest consecutive exact rows that are read where they lie: below, a tile costs more than copies.
const RUN_MIN: usize = 8;

/// The same of packed rows, whose tiles cost more.
const PACKED_RUN_MIN: usize = 16;

/// Rows of packed keys that a vector takes, and a cache line holds a word of: tiles of such start at multiples.
const LANES: usize = 16;

/// Bytes of both sides that a tile of lone exact rows takes at most, where these are short enough, and the fewest rows it
/// has: several such tiles are in the first cache level at once.
const ALONE_BYTES: usize = 8 << 10;
const ALONE_MIN: usize = 8;

/// How many spans ahead the description of a page is requested, which must be there before its rows can be.
const PAGES_AHEAD: usize = 32;

/// Where a part of the chosen entries starts or ends: a span and a slot in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mark {
    span: usize,
    slot: u32,
}

/// Marks of `parts` parts of equally many entries; `marks` holds one more.
pub(crate) fn cut(spans: &Spans, parts: usize, marks: &mut [Mark]) {
    let list = spans.spans();
    let (mut span, mut before) = (0, 0);
    for (part, mark) in marks.iter_mut().enumerate().take(parts + 1) {
        let at = spans.rows() * part / parts;
        while span < list.len() && before + list[span].len() <= at {
            before += list[span].len();
            span += 1;
        }
        *mark = Mark { span, slot: list.get(span).map_or(0, |s| s.start + (at - before) as u32) };
    }
}

/// Chosen entries of a head between two marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen<'a> {
    spans: &'a [Span],
    /// Slots before are not meant, nor those from `end` on.
    start: u32,
    end: u32,
}

impl<'a> Chosen<'a> {
    /// Those of `spans`.
    pub(crate) fn between(spans: &'a Spans, from: Mark, to: Mark) -> Self {
        let list = spans.spans();
        // The last span is only begun.
        let begun = list.get(to.span).is_some_and(|s| s.start < to.slot);
        let end = if begun { to.slot } else { u32::MAX };
        Self { spans: &list[from.span..to.span + usize::from(begun)], start: from.slot, end }
    }
}

/// A segment with what is known about its pages.
#[derive(Clone, Debug)]
struct Place<'a> {
    segment: &'a Segment,
    /// Slot of its first entry.
    first: usize,
    keys: Stored,
    values: Stored,
    /// Rows that are copied together; none can be if their parameters are not their own.
    unit: Option<usize>,
    /// Most rows of a tile of such as lie alone.
    alone: usize,
    /// Whether a tile of copies is of one page, whose mean they are relative to.
    by_page: bool,
}

impl<'a> Place<'a> {
    fn new(segment: &'a Segment, first: usize) -> Self {
        let layout = &*segment.layout;
        let (keys, values) = (Stored::new(layout, Side::Key), Stored::new(layout, Side::Value));
        let packed = || [&keys, &values].into_iter().filter_map(|side| side.packed);
        let copied = packed().all(|side| side.group_rows == 1);
        let unit = copied.then_some(if packed().next().is_some() { UNIT } else { 1 });
        let alone = match packed().next() {
            Some(_) => TILE,
            None => {
                (ALONE_BYTES / (keys.row + values.row).max(1) / ALONE_MIN * ALONE_MIN).clamp(ALONE_MIN, TILE)
            }
        };
        let by_page = packed().any(|side| side.packing.center);
        Self { segment, first, keys, values, unit, alone, by_page }
    }

    /// One past the slot of its last entry.
    fn end(&self) -> usize {
        self.first + self.segment.rows
    }

    /// The page of a slot, and the row.
    fn find(&self, slot: usize) -> (&'a Page, usize) {
        // Slots fit 32 bits, whose division is twice as fast.
        let (local, capacity) = ((slot - self.first) as u32, self.segment.layout.capacity as u32);
        (&self.segment.pages[(local / capacity) as usize], (local % capacity) as usize)
    }

    /// Entries from a slot, row `row` of its page, to the end of the page.
    #[inline(always)]
    fn to_page_end(&self, slot: usize, row: usize) -> usize {
        self.segment.layout.capacity.min(self.end() - (slot - row)) - row
    }

    /// Adds exact rows to what waits, in a loop of their own: it runs once per row that is read. Whether there is room for
    /// more.
    #[inline(always)]
    fn add_alone(&self, cursor: &mut Cursor<'a>, into: &mut Gathering<'a>, masked: bool) -> bool {
        while cursor.begin(Some(self)) && cursor.run.start < self.end() {
            let slot = cursor.run.start;
            let (page, row) = self.find(slot);
            let run = cursor.run.len().min(self.to_page_end(slot, row));
            let len = run.min(self.alone - into.waiting.len());
            if run >= RUN_MIN {
                break;
            }
            if len == 0 {
                return false;
            }
            let (keys, values) = (self.keys.bytes(page), self.values.bytes(page));
            for row in row..row + len {
                into.requests[0].add(self.keys.exact_row(keys, row));
                into.requests[1].add(self.values.exact_row(values, row));
                into.waiting.push(page, row, 1, masked);
                into.waiting.choose(0, 1);
            }
            cursor.run.start += len;
        }
        true
    }

    /// Fewest consecutive rows that are a tile where they lie.
    fn run_min(&self) -> usize {
        match self.unit {
            Some(1) => RUN_MIN,
            Some(_) => PACKED_RUN_MIN,
            None => 0,
        }
    }
}

/// What is served.
#[allow(clippy::large_enum_variant, reason = "two of them, on the stack: the call allocates nothing")]
#[derive(Clone, Copy, Debug)]
enum Next<'a> {
    /// Rows where they lie.
    Tile(Tile<'a>),
    /// The rows of this gathering.
    Gathered(usize),
    Nothing,
}

/// Rows of a segment that wait to be copied, and what of them is to be requested ahead.
#[derive(Debug)]
struct Gathering<'a> {
    place: Option<Place<'a>>,
    waiting: Waiting<'a>,
    requests: [Requests<'a>; 2],
}

impl Gathering<'_> {
    const NONE: Self = Self { place: None, waiting: Waiting::NONE, requests: [Requests::NONE; 2] };

    fn clear(&mut self) {
        self.waiting.clear();
        self.requests.iter_mut().for_each(|requests| (requests.count, requests.pitch) = (0, None));
    }
}

/// Where in the chosen entries rows are looked for.
#[derive(Debug)]
struct Cursor<'a> {
    /// Spans not begun, and what is left of the last that was.
    spans: &'a [Span],
    run: Range<usize>,
    end: usize,
}

impl<'a> Cursor<'a> {
    /// Begins the next span if the last one is used up; whether there is one.
    #[inline(always)]
    fn begin(&mut self, place: Option<&Place<'_>>) -> bool {
        if self.run.is_empty() {
            let Some((span, rest)) = self.spans.split_first() else { return false };
            self.run = span.start as usize..(span.end as usize).min(self.end);
            self.spans = rest;
            if let (Some(place), Some(later)) = (place, rest.get(PAGES_AHEAD))
                && (later.start as usize) < place.end()
            {
                request_page(place.find(later.start as usize).0);
            }
        }
        true
    }
}

/// Tiles that are known at a time: the one that is computed on, and the next.
const KNOWN: usize = 2;

/// The tiles of chosen entries of a head.
#[derive(Debug)]
pub(crate) struct ChosenTiles<'a> {
    segments: &'a [Segment],
    place: Option<Place<'a>>,
    cursor: Cursor<'a>,
    /// Whether some query does not see some entry, so that positions matter.
    masked: bool,
    /// What is served now and next.
    known: [Next<'a>; KNOWN],
    /// Served in turn; rows are added to the one that is not served now.
    gatherings: [Gathering<'a>; KNOWN],
    filling: usize,
}

/// Parts of pages to be requested.
#[derive(Clone, Copy, Debug)]
struct Requests<'a> {
    parts: [&'a [u8]; TILE],
    count: usize,
    /// Of each part only the first line of so many bytes.
    pitch: Option<usize>,
}

impl<'a> Requests<'a> {
    const NONE: Self = Self { parts: [&[]; TILE], count: 0, pitch: None };

    /// What is read of rows `from ..`, one of them or [`UNIT`].
    #[inline(always)]
    fn push(&mut self, stored: &Stored, page: &'a Page, from: usize) {
        let bytes = stored.bytes(page);
        let Some(packed) = stored.packed else { return self.add(stored.exact_row(bytes, from)) };
        // Keys that share their lines are requested once.
        let (from, len) = match packed.side {
            Side::Key => (from - from % LANES, LANES),
            Side::Value => (from, UNIT),
        };
        let (part, _) = PackedRows { layout: packed, bytes }.plane_rows(0, from, len.min(BAND));
        self.pitch = matches!(packed.side, Side::Key).then_some(4 * BAND);
        let last = self.count.checked_sub(1).map(|last| self.parts[last].as_ptr());
        if last != Some(part.as_ptr()) {
            request(&stored.parameters(bytes, from)[0]);
            self.parts[self.count] = part;
            self.count += 1;
        }
    }

    /// A row that is read whole.
    #[inline(always)]
    fn add(&mut self, row: &'a [u8]) {
        self.parts[self.count] = row;
        self.count += 1;
    }

    fn parts(&self) -> &[&'a [u8]] {
        &self.parts[..self.count]
    }

    fn ahead(&self) -> Ahead<'_> {
        Ahead::rows(self.parts(), self.pitch)
    }
}

impl<'a> ChosenTiles<'a> {
    /// Of a part of the entries of `head`, which has them all; `masked` if some query does not see some of them.
    pub(crate) fn new(head: &'a HeadRows, chosen: Chosen<'a>, masked: bool) -> Self {
        let first = chosen.spans.first().map_or(0..0, |s| s.start.max(chosen.start) as usize..s.end as usize);
        let end = chosen.end as usize;
        let mut tiles = Self {
            segments: &head.segments,
            place: None,
            cursor: Cursor {
                spans: chosen.spans.get(1..).unwrap_or_default(),
                run: first.start..first.end.min(end),
                end,
            },
            masked,
            known: [Next::Nothing; KNOWN],
            gatherings: [Gathering::NONE; KNOWN],
            filling: 0,
        };
        // Nothing is computed yet that the first tiles could be on their way meanwhile.
        for i in 1..KNOWN {
            tiles.known[i] = tiles.plan();
            [Side::Key, Side::Value].into_iter().for_each(|side| tiles.lines(i, side).all());
        }
        tiles
    }

    /// Goes on to the next tile; to the first one from the start.
    #[inline(always)]
    pub(crate) fn advance(&mut self) {
        if let Next::Gathered(at) = self.known[0] {
            self.gatherings[at].clear();
        }
        self.known.rotate_left(1);
        self.known[KNOWN - 1] = self.plan();
    }

    /// The tile; copies are made in `memory`.
    #[inline(always)]
    pub(crate) fn tile<'t, S: Simd>(&'t self, simd: S, memory: &'t mut Copies<'_>) -> Option<Tile<'t>> {
        let at = match self.known[0] {
            Next::Tile(tile) => return Some(tile),
            Next::Gathered(at) => at,
            Next::Nothing => return None,
        };
        let Gathering { place: Some(place), waiting, requests } = &self.gatherings[at] else { return None };
        let (stored, rows) = ((&place.keys, &place.values), [requests[0].parts(), requests[1].parts()]);
        Some(simd.vectorize(
            #[inline(always)]
            || waiting.tile(&place.segment.layout, stored, rows, self.masked, memory),
        ))
    }

    /// A side of the tile that was found last, to be requested ahead of its use.
    #[inline(always)]
    pub(crate) fn ahead(&self, side: Side) -> Ahead<'_> {
        self.lines(KNOWN - 1, side)
    }

    #[inline(always)]
    fn lines(&self, next: usize, side: Side) -> Ahead<'_> {
        let at = match &self.known[next] {
            Next::Tile(tile) => return tile.lines(side),
            Next::Gathered(at) => *at,
            Next::Nothing => return Ahead::NONE,
        };
        let [keys, values] = &self.gatherings[at].requests;
        match side {
            Side::Key => keys.ahead(),
            Side::Value => values.ahead(),
        }
    }

    /// The segment of the next slot.
    fn enter(&mut self) {
        let mut first = self.place.as_ref().map_or(0, Place::end);
        while let Some((segment, rest)) = self.segments.split_first() {
            self.segments = rest;
            if self.cursor.run.start < first + segment.rows {
                self.place = Some(Place::new(segment, first));
                return;
            }
            first += segment.rows;
        }
    }

    /// What waits to be copied is complete.
    fn gathered(&mut self) -> Next<'a> {
        let at = self.filling;
        self.filling = (at + 1) % KNOWN;
        Next::Gathered(at)
    }

    fn plan(&mut self) -> Next<'a> {
        while self.cursor.begin(self.place.as_ref()) {
            let into = &mut self.gatherings[self.filling];
            if self.place.as_ref().is_none_or(|p| self.cursor.run.start >= p.end()) {
                // What waits to be copied is of the segment that ends here.
                if !into.waiting.is_empty() {
                    return self.gathered();
                }
                self.enter();
            }
            let into = &mut self.gatherings[self.filling];
            let Some(place) = &self.place else { break };
            let slot = self.cursor.run.start;
            let (page, row) = place.find(slot);
            let run = self.cursor.run.len().min(place.to_page_end(slot, row));
            let Some(unit) = place.unit.filter(|_| run < place.run_min()) else {
                if place.unit != Some(1) {
                    return Next::Tile(self.around());
                }
                let len = run.min(TILE);
                self.cursor.run.start += len;
                return Next::Tile(place.tile(page, slot, (row, len), u64::MAX, self.masked));
            };
            if into.waiting.is_empty() {
                into.place = Some(place.clone());
            }
            if unit == 1 {
                if place.add_alone(&mut self.cursor, into, self.masked) {
                    continue;
                }
                return self.gathered();
            }
            let from = row & !(unit - 1);
            if !into.waiting.ends_with(page, from) {
                if into.waiting.is_full() || place.by_page && !into.waiting.is_of(page) {
                    return self.gathered();
                }
                into.waiting.push(page, from, unit, self.masked);
                into.requests[0].push(&place.keys, page, from);
                into.requests[1].push(&place.values, page, from);
            }
            let len = run.min(from + unit - row);
            into.waiting.choose(row - from, len);
            self.cursor.run.start += len;
        }
        if self.gatherings[self.filling].waiting.is_empty() { Next::Nothing } else { self.gathered() }
    }

    /// The rows of a band of a packed page from the next slot on, as long as chosen ones are near.
    fn around(&mut self) -> Tile<'a> {
        let Some(place) = &self.place else { unreachable!("a segment was entered") };
        let align = place.keys.packed.map_or(UNIT, |packed| packed.group_rows.max(LANES));
        let start = self.cursor.run.start;
        let (page, row) = place.find(start);
        let capacity = place.segment.layout.capacity;
        let from = row - row % align;
        // Slots of row `from`, of the end of what a tile may hold, and of the first row that is too far away.
        let base = start - (row - from);
        let limit = (base - from + (from - from % BAND + BAND).min(capacity)).min(place.end());
        let (mut chosen, mut last) = (0u64, start);
        loop {
            let end = self.cursor.run.end.min(limit);
            let len = end - self.cursor.run.start;
            chosen |= u64::MAX >> (TILE - len) << (self.cursor.run.start - base);
            last = end.max(last);
            self.cursor.run.start = end;
            // A group without chosen rows costs as much to read as another tile; nothing lies between neighbours.
            let far = base + (last - base).next_multiple_of(align) + align;
            if end == limit
                || !self.cursor.begin(self.place.as_ref())
                || self.cursor.run.start >= far.min(limit)
            {
                break;
            }
        }
        let len = last - base;
        let all = chosen == u64::MAX >> (TILE - len);
        let Some(place) = &self.place else { unreachable!("a segment was entered") };
        place.tile(page, base, (from, len), if all { u64::MAX } else { chosen }, self.masked)
    }
}

impl<'a> Place<'a> {
    fn tile(
        &self,
        page: &'a Page,
        slot: usize,
        (from, len): (usize, usize),
        chosen: u64,
        masked: bool,
    ) -> Tile<'a> {
        let (keys, values) = (self.keys.bytes(page), self.values.bytes(page));
        for (stored, bytes) in [(&self.keys, keys), (&self.values, values)] {
            if let Some(packed) = stored.packed {
                request(&stored.parameters(bytes, from / packed.group_rows)[0]);
            }
        }
        let mut positions = &[][..];
        if masked {
            positions = &page.positions[from..from + len];
            request(&positions[0]);
        }
        Tile {
            layout: &self.segment.layout,
            slot,
            positions,
            bias: page.bias.as_deref().map(|b| &b[from..from + len]),
            keys: self.keys.rows(keys),
            values: self.values.rows(values),
            apart: None,
            from,
            len,
            chosen,
        }
    }
}

impl<'a> Tile<'a> {
    /// The bytes of a side that are read of the tile, of packed rows those of their lowest plane.
    #[inline(always)]
    fn lines(&self, side: Side) -> Ahead<'a> {
        let (from, len) = match side {
            Side::Key => (self.from, self.len),
            Side::Value => (self.from + self.unread(), self.len - self.unread()),
        };
        let bytes: &[u8] = match self.stored(side) {
            Rows::F32(s) => cast_slice(s),
            Rows::F16(s) => cast_slice(s),
            Rows::Bf16(s) => cast_slice(s),
            Rows::Packed(packed) => {
                let (bytes, _) = packed.plane_rows(0, from, len);
                return match side {
                    Side::Key if len <= BAND - LANES => Ahead::pieces(bytes, 4 * len, 4 * BAND),
                    _ => Ahead::new(bytes),
                };
            }
        };
        let row = self.layout.row_bytes(side);
        Ahead::new(&bytes[from * row..(from + len) * row])
    }
}
