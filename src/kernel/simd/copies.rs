//! Rows of many places made one tile: exact ones where they lie, packed ones copied as stored.
//!
//! A tile of exact rows is a list of them ([`super::apart`]). Where a side is packed, four rows are copied together, which
//! share the words of their codes, and of the other side, if that is exact, the same rows; a tile of copies is then a
//! packed side of [`TILE`] rows like any other. Rows of a four that are not chosen have parameters of 0, so that nothing of
//! what was never written can reach a result.
//!
//! *Helps* lone entries and short runs: what a tile costs beside its rows is shared by as many as fit. *Hurts* packed rows
//! by a copy of what is read, from and to the first cache levels.

use super::gemm::PAD;
use super::prefetch::request;
use super::take;
use super::tile::{TILE, Tile};
use crate::device::Encoding;
use crate::device::encoding::{BAND, PackedLayout, PackedRows};
use crate::device::page::{Page, PageLayout, Rows, Side};
use crate::kernel::AttentionParams;
use crate::view::DType;
use bytemuck::{cast_slice, cast_slice_mut};
use std::ops::Range;

/// Rows of a packed side that are copied together.
pub(super) const UNIT: usize = 4;

/// One side of the pages of a segment, found once: it takes divisions.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    range: Range<usize>,
    encoding: Encoding,
    pub packed: Option<PackedLayout>,
    /// Bytes of an exact row.
    pub row: usize,
    /// Where the parameters of a packed side start, and those of groups along a row.
    parameters: usize,
    group: usize,
}

impl Stored {
    pub(super) fn new(layout: &PageLayout, side: Side) -> Self {
        let (encoding, packed) = (layout.encoding(side), layout.packed(side));
        let (range, row) = (layout.range(side), layout.row_bytes(side));
        let parameters = packed.map_or(0, |p| p.parameters());
        let group = packed.map_or(0, |p| 2 * p.group_halves() * p.row_groups());
        Self { range, encoding, packed, row, parameters, group }
    }

    /// The bytes of the side.
    pub(super) fn bytes<'a>(&self, page: &'a Page) -> &'a [u8] {
        &page.block.host()[self.range.clone()]
    }

    /// These as rows.
    pub(super) fn rows<'a>(&self, bytes: &'a [u8]) -> Rows<'a> {
        match (self.encoding, self.packed) {
            (_, Some(layout)) => Rows::Packed(PackedRows { layout, bytes }),
            (Encoding::Exact(DType::F16), _) => Rows::F16(cast_slice(bytes)),
            (Encoding::Exact(DType::Bf16), _) => Rows::Bf16(cast_slice(bytes)),
            _ => Rows::F32(cast_slice(bytes)),
        }
    }

    /// None, of the type that exact ones have.
    fn none(&self) -> Rows<'static> {
        match self.encoding {
            Encoding::Exact(DType::F16) => Rows::F16(&[]),
            Encoding::Exact(DType::Bf16) => Rows::Bf16(&[]),
            _ => Rows::F32(&[]),
        }
    }

    /// An exact row.
    #[inline(always)]
    pub(super) fn exact_row<'a>(&self, bytes: &'a [u8], row: usize) -> &'a [u8] {
        &bytes[row * self.row..][..self.row]
    }

    /// The parameters of a packed row, if they are its own.
    #[inline(always)]
    pub(super) fn parameters<'a>(&self, bytes: &'a [u8], row: usize) -> &'a [u8] {
        &bytes[self.parameters + row * self.group..][..self.group]
    }

    /// Copies rows to `to`, and gives them as rows.
    #[inline(always)]
    fn copy<'t>(&self, waiting: &Waiting<'_>, to: &'t mut [f32]) -> Rows<'t> {
        let to: &mut [u8] = cast_slice_mut(to);
        let Some(packed) = self.packed else {
            for (i, to) in to.chunks_exact_mut(self.row.max(1)).enumerate().take(waiting.len()) {
                let (page, row) = waiting.row(i);
                copy(self.exact_row(self.bytes(page), row), to);
            }
            return self.rows(to);
        };
        let layout = PackedLayout { capacity: TILE, ..packed };
        for (index, &width) in packed.packing.format.planes().iter().enumerate() {
            let bytes = packed.plane_row(width);
            let to = &mut to[layout.plane(index)..][..TILE * bytes];
            for (i, (page, from)) in waiting.units().enumerate() {
                let rows = PackedRows { layout: packed, bytes: self.bytes(page) };
                let (source, _) = rows.plane_rows(index, from, UNIT);
                if packed.side == Side::Value {
                    copy(source, &mut to[i * UNIT * bytes..][..UNIT * bytes]);
                    continue;
                }
                // The words of four rows lie side by side, those of a row a band's width apart.
                let steps = source.chunks(4 * BAND).zip(to[i * 4 * UNIT..].chunks_mut(4 * BAND));
                for (source, to) in steps {
                    to[..4 * UNIT].copy_from_slice(&source[..4 * UNIT]);
                }
            }
        }
        let (parameters, mean) = to[layout.parameters()..].split_at_mut(layout.mean() - layout.parameters());
        for (i, to) in parameters.chunks_exact_mut(self.group).enumerate().take(waiting.len()) {
            let (page, row) = waiting.row(i);
            // Halves: a call for as few bytes would cost more than they.
            let to = to.as_chunks_mut::<2>().0.iter_mut();
            let halves = self.parameters(self.bytes(page), row).as_chunks::<2>().0;
            match waiting.is_chosen(i) {
                true => to.zip(halves).for_each(|(to, half)| *to = *half),
                false => to.for_each(|to| *to = [0; 2]),
            }
        }
        if let (true, Some((page, _))) = (packed.packing.center, waiting.units().next()) {
            let source = &self.bytes(page)[packed.mean()..packed.bytes()];
            mean[..source.len()].copy_from_slice(source);
        }
        Rows::Packed(PackedRows { layout, bytes: &to[..layout.bytes()] })
    }
}

/// The same bytes elsewhere. Of the lengths that rows of halves have, without a call: that costs as much as they.
#[inline(always)]
fn copy(from: &[u8], to: &mut [u8]) {
    if !(copied::<256>(from, to) || copied::<128>(from, to)) {
        to[..from.len()].copy_from_slice(from);
    }
}

/// Copies `from` if it is so many bytes.
#[inline(always)]
fn copied<const N: usize>(from: &[u8], to: &mut [u8]) -> bool {
    match (<&[u8; N]>::try_from(from), to.first_chunk_mut()) {
        (Ok(from), Some(to)) => {
            *to = *from;
            true
        }
        _ => false,
    }
}

/// Rows that wait to be copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting<'a> {
    /// Pages, and the first of the rows that are copied together.
    from: [Option<(&'a Page, u32)>; TILE],
    count: usize,
    /// How many these are, as a power of two.
    shift: u32,
    /// Which rows of the tile are chosen.
    chosen: u64,
    /// Whether any page has a β.
    biased: bool,
}

impl<'a> Waiting<'a> {
    /// None.
    pub(super) const NONE: Self = Self { from: [None; TILE], count: 0, shift: 0, chosen: 0, biased: false };

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        (self.count, self.chosen, self.biased) = (0, 0, false);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether no more fit.
    pub(super) fn is_full(&self) -> bool {
        (self.count + 1) << self.shift > TILE
    }

    /// Whether the last that was added is this.
    #[inline(always)]
    pub(super) fn ends_with(&self, page: &Page, from: usize) -> bool {
        let last = self.count.checked_sub(1).and_then(|last| self.from[last]);
        last.is_some_and(|(p, row)| std::ptr::eq(p, page) && row as usize == from)
    }

    /// Whether those that wait are of this page, if any do.
    pub(super) fn is_of(&self, page: &Page) -> bool {
        self.from[0].filter(|_| self.count > 0).is_none_or(|(p, _)| std::ptr::eq(p, page))
    }

    /// Whether rows are copied one by one.
    fn each_for_itself(&self) -> bool {
        self.shift == 0
    }

    /// Adds `unit` rows, 1 or [`UNIT`] as all before, of which none is chosen yet; requests their positions if they are
    /// `asked` for.
    #[inline(always)]
    pub(super) fn push(&mut self, page: &'a Page, from: usize, unit: usize, asked: bool) {
        self.shift = unit.trailing_zeros();
        self.from[self.count] = Some((page, from as u32));
        self.biased |= page.bias.is_some();
        if asked {
            request(&page.positions[from]);
        }
        self.count += 1;
    }

    /// Chooses `len` of the last that were added, from number `skip` on.
    #[inline(always)]
    pub(super) fn choose(&mut self, skip: usize, len: usize) {
        self.chosen |= u64::MAX >> (TILE - len) << (((self.count - 1) << self.shift) + skip);
    }

    /// Rows that wait.
    pub(super) fn len(&self) -> usize {
        self.count << self.shift
    }

    fn units(&self) -> impl Iterator<Item = (&'a Page, usize)> + '_ {
        self.from[..self.count].iter().flatten().map(|&(page, row)| (page, row as usize))
    }

    fn is_chosen(&self, i: usize) -> bool {
        self.chosen >> i & 1 == 1
    }

    /// Where row `i` of the tile comes from; of one that is not chosen, a chosen one beside it.
    #[inline(always)]
    fn row(&self, i: usize) -> (&'a Page, usize) {
        let Some((page, from)) = self.from[i >> self.shift] else { unreachable!("rows of the tile wait") };
        if self.shift == 0 {
            return (page, from as usize);
        }
        let within = i % UNIT;
        let beside = (self.chosen >> (i - within)) as u32 % (1 << UNIT);
        // The last chosen one up to here, or else the first after.
        let before = beside & ((2 << within) - 1);
        let at = if before != 0 { before.ilog2() } else { beside.trailing_zeros() };
        (page, (from + at) as usize)
    }

    /// Makes a tile of the rows: copies in `memory`, or `rows`, which are both sides of such as wait each for itself.
    /// Positions are left out unless they are `asked` for.
    #[inline(always)]
    pub(super) fn tile<'t>(
        &self,
        layout: &'t PageLayout,
        (keys, values): (&Stored, &Stored),
        rows: [&'t [&'t [u8]]; 2],
        asked: bool,
        memory: &'t mut Copies<'_>,
    ) -> Tile<'t> {
        let len = self.len();
        let positions = &mut cast_slice_mut::<f32, i32>(memory.positions)[..if asked { len } else { 0 }];
        for (i, position) in positions.iter_mut().enumerate() {
            let (page, row) = self.row(i);
            *position = page.positions[row];
        }
        let bias = &mut memory.bias[..if self.biased { len } else { 0 }];
        for (i, bias) in bias.iter_mut().enumerate() {
            let (page, row) = self.row(i);
            *bias = page.bias.as_ref().map_or(0.0, |b| b[row]);
        }
        let all = self.chosen == u64::MAX >> (TILE - len);
        let apart = self.each_for_itself().then_some(rows);
        let (keys, values) = match apart {
            Some(_) => (keys.none(), values.none()),
            None => (keys.copy(self, memory.keys), values.copy(self, memory.values)),
        };
        Tile {
            layout,
            slot: 0,
            positions,
            bias: self.biased.then_some(bias),
            keys,
            values,
            apart,
            from: 0,
            len,
            chosen: if all { u64::MAX } else { self.chosen },
        }
    }
}

/// Memory for a tile of copies.
#[derive(Debug)]
pub(crate) struct Copies<'m> {
    keys: &'m mut [f32],
    values: &'m mut [f32],
    positions: &'m mut [f32],
    bias: &'m mut [f32],
}

impl<'m> Copies<'m> {
    /// Floats of a row: no format takes as many bytes, with its padding and its parameters.
    fn row(d: usize) -> usize {
        d.next_multiple_of(32)
    }

    /// Floats it takes.
    pub(crate) fn len(params: &AttentionParams<'_>) -> usize {
        (TILE * (Self::row(params.d_k) + Self::row(params.d_v) + 2)).next_multiple_of(PAD)
    }

    /// Cuts it out of the front of `memory`, or none if there is less.
    pub(crate) fn cut(memory: &mut &'m mut [f32], params: &AttentionParams<'_>) -> Self {
        let there = memory.len() >= Self::len(params);
        let mut part = |len| take(memory, if there { TILE * len } else { 0 });
        let (keys, values) = (part(Self::row(params.d_k)), part(Self::row(params.d_v)));
        Self { keys, values, positions: part(1), bias: part(1) }
    }
}
