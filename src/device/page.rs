//! Pages: the unit in which key/value rows are allocated, shared and given back.
//!
//! A page holds up to `capacity` entries of one KV head: key rows, value rows, a position per entry, and
//! (only when some entry has one) a log-mass bias β per entry. Rows live in a [`Block`] of the backend that
//! allocated it, host or device; positions, β and columns stay on the host, where policies read them. A
//! backend whose kernels run elsewhere keeps a mirror of positions and β behind the rows of the block. Pages with
//! equal positions may share the array.
//!
//! ```text
//! block:  | keys  [capacity][k_row_bytes] | values [capacity][v_row_bytes] | mirror: i32 positions, f32 β |
//! ```
//!
//! *Helps* eviction: memory returns page by page, and a fork shares pages until one side writes.
//! *Hurts* by half a page of slack per KV head on average, so pages are small (64 entries by default).

use super::encoding::{Encoding, PackedLayout, PackedRows};
use super::factors::Factors;
use crate::device::memory::HostBlock;
use crate::geometry::{LayerShape, RowCount};
use crate::view::DType;
use half::{bf16, f16};
use std::ops::Range;
use std::slice::ChunksExact;
use std::sync::Arc;

/// Memory of a backend.
#[derive(Debug)]
pub enum Block {
    /// Host memory.
    Host(HostBlock),
    /// Device memory.
    #[cfg(feature = "gpu")]
    Device(crate::device::gpu::DeviceBlock),
}

impl Block {
    /// The bytes of a host block.
    ///
    /// # Panics
    /// If the block lives on a device: a host kernel was handed a page of another backend, which the
    /// backends exclude by allocating all pages of their own cache.
    pub fn host(&self) -> &[u8] {
        match self {
            Self::Host(b) => b.bytes(),
            #[cfg(feature = "gpu")]
            Self::Device(_) => panic!("a host kernel was given a device page"),
        }
    }

    /// The writable bytes of a host block.
    ///
    /// # Panics
    /// As [`Block::host`].
    pub fn host_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Host(b) => b.bytes_mut(),
            #[cfg(feature = "gpu")]
            Self::Device(_) => panic!("a host kernel was given a device page"),
        }
    }
}

/// How the entries of one layer lie in a page. Rows are padded to whole 4-byte words, so that a GPU can
/// address any of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageLayout {
    /// Entries a page can hold.
    pub capacity: usize,
    /// Key dimension.
    pub d_k: usize,
    /// Value dimension; 0 for entries that are keys only, such as codes.
    pub d_v: usize,
    /// How keys are stored.
    pub k: Encoding,
    /// How values are stored.
    pub v: Encoding,
    /// Whether the block mirrors positions and β (device backends).
    pub mirrored: bool,
    /// `u32` words of column data per entry.
    pub column_words: usize,
    /// Whether its pages stay as long as their sequence does: nothing is evicted, packed or dropped one by one. Host
    /// memory then lies in the system's huge pages, once it is enough to fill some.
    pub steady: bool,
}

impl PageLayout {
    /// The layout of a layer's pages.
    pub fn new(
        shape: &LayerShape,
        capacity: usize,
        k: impl Into<Encoding>,
        v: impl Into<Encoding>,
        mirrored: bool,
        column_words: usize,
    ) -> Self {
        let (k, v) = (k.into(), v.into());
        Self { capacity, d_k: shape.d_k, d_v: shape.d_v, k, v, mirrored, column_words, steady: false }
    }

    /// Whether both sides are exact.
    pub fn is_exact(&self) -> bool {
        self.k.exact().is_some() && self.v.exact().is_some()
    }

    /// Whether a side is made of factors.
    pub fn is_factored(&self) -> bool {
        self.k == Encoding::Factored || self.v == Encoding::Factored
    }

    /// Bytes of a side.
    pub fn side_bytes(&self, side: Side) -> usize {
        match self.packed(side) {
            Some(packed) => packed.bytes(),
            None => self.capacity * self.row_bytes(side),
        }
    }

    /// Where what lies in a packed side; `None` if it is exact.
    pub fn packed(&self, side: Side) -> Option<PackedLayout> {
        let packing = self.encoding(side).packed()?;
        Some(PackedLayout::new(packing, side, self.dim(side), self.capacity))
    }

    /// Whether rows of a side are stored rotated.
    pub fn rotated(&self, side: Side) -> bool {
        self.encoding(side).packed().is_some_and(|p| p.hadamard)
    }

    /// Where values start.
    pub fn v_offset(&self) -> usize {
        self.side_bytes(Side::Key)
    }

    /// Where the mirror of positions starts (β follows `4 * capacity` bytes later).
    pub fn mirror_offset(&self) -> usize {
        self.v_offset() + self.side_bytes(Side::Value)
    }

    /// Bytes a block must have.
    pub fn block_bytes(&self) -> usize {
        self.mirror_offset() + if self.mirrored { 8 * self.capacity } else { 0 }
    }

    /// Bytes one entry needs without padding: what an ideal store would use. Of a packed side, its share of the
    /// page's parameters is a part.
    pub fn entry_bytes(&self) -> usize {
        let side = |side| match self.encoding(side) {
            Encoding::Exact(dtype) => self.dim(side) * dtype.bytes(),
            Encoding::Packed(_) => self.side_bytes(side).div_ceil(self.capacity),
            Encoding::Factored => 0,
        };
        side(Side::Key) + side(Side::Value) + 4 + 4 * self.column_words
    }
}

/// Up to `capacity` entries of one KV head. How many are in use is the owner's to say: a page that two
/// sequences share may be longer in one than in the other.
#[derive(Debug)]
pub struct Page {
    /// Keys and values (and the mirror).
    pub block: Block,
    /// One position per entry, `capacity` long. Other pages may hold the same array, so it is written through
    /// [`Page::positions_mut`].
    pub positions: Arc<[i32]>,
    /// One β per entry, or `None` while all are 0: the logit of an entry becomes `s + β`.
    pub bias: Option<Box<[f32]>>,
    /// `column_words` words per entry, `capacity` entries.
    pub columns: Box<[u32]>,
}

impl Page {
    /// The positions, writable: a copy of this page's own if another page shares them.
    pub fn positions_mut(&mut self) -> &mut [i32] {
        Arc::make_mut(&mut self.positions)
    }
}

/// Rows of one side of a page, in the type they are stored in.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Single precision, row `i` at `i * stride`.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Packed; row `i` is row `i` of it.
    Packed(PackedRows<'a>),
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

impl PageLayout {
    /// How a side is stored.
    pub fn encoding(&self, side: Side) -> Encoding {
        match side {
            Side::Key => self.k,
            Side::Value => self.v,
        }
    }

    /// Dimension of a side.
    pub fn dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.d_k,
            Side::Value => self.d_v,
        }
    }

    /// The rows of a side in a dense buffer: none if the side has no dimensions.
    pub fn dense<'a>(&self, side: Side, rows: &'a [f32]) -> ChunksExact<'a, f32> {
        rows.chunks_exact(self.dim(side).max(1))
    }

    /// Bytes from one row to the next of an exact side. Packed rows do not lie together, and factored ones nowhere: 0.
    pub fn row_bytes(&self, side: Side) -> usize {
        match self.encoding(side) {
            Encoding::Exact(dtype) => (self.dim(side) * dtype.bytes()).next_multiple_of(4),
            Encoding::Packed(_) | Encoding::Factored => 0,
        }
    }

    /// Elements from one row to the next of an exact side (the dimension, or one more for odd half-precision
    /// rows). 1 for a packed side, whose rows are counted.
    pub fn row_stride(&self, side: Side) -> usize {
        match self.encoding(side) {
            Encoding::Exact(dtype) => self.row_bytes(side) / dtype.bytes(),
            Encoding::Packed(_) | Encoding::Factored => 1,
        }
    }

    /// The byte range of a side in a block.
    pub fn range(&self, side: Side) -> Range<usize> {
        match side {
            Side::Key => 0..self.v_offset(),
            Side::Value => self.v_offset()..self.mirror_offset(),
        }
    }

    /// All rows of a side of a host page, used or not; row `i` starts at `i * row_stride`.
    ///
    /// # Panics
    /// On a factored side, which has none: [`HeadRows::factored`] names the entries that kernels pass over.
    pub fn rows<'a>(&self, page: &'a Page, side: Side) -> Rows<'a> {
        let bytes = &page.block.host()[self.range(side)];
        match self.encoding(side) {
            Encoding::Exact(DType::F32) => Rows::F32(bytemuck::cast_slice(bytes)),
            Encoding::Exact(DType::F16) => Rows::F16(bytemuck::cast_slice(bytes)),
            Encoding::Exact(DType::Bf16) => Rows::Bf16(bytemuck::cast_slice(bytes)),
            Encoding::Packed(packing) => {
                let layout = PackedLayout::new(packing, side, self.dim(side), self.capacity);
                Rows::Packed(PackedRows { layout, bytes })
            }
            Encoding::Factored => panic!("rows of a factored side are read as products"),
        }
    }

    /// One row of a host page, widened to `f32`.
    pub fn read_row(&self, page: &Page, side: Side, row: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        let (stride, dim) = (self.row_stride(side), self.dim(side));
        let span = row * stride..row * stride + dim;
        match self.rows(page, side) {
            Rows::F32(s) => out.copy_from_slice(&s[span]),
            Rows::F16(s) => s[span].convert_to_f32_slice(out),
            Rows::Bf16(s) => s[span].convert_to_f32_slice(out),
            Rows::Packed(p) => p.read(row, out),
        }
    }

    /// One row of an exact side narrowed into `bytes`, which is a whole block's worth of host memory; of a factored side
    /// nothing is kept.
    ///
    /// # Panics
    /// On a packed side: its rows are written together, by [`crate::kernel::pack`].
    pub fn write_row(&self, bytes: &mut [u8], side: Side, row: usize, values: &[f32]) {
        self.write_exact(&mut bytes[self.range(side)], side, row, values);
    }

    /// The same into the bytes of the side.
    ///
    /// # Panics
    /// As [`PageLayout::write_row`].
    pub fn write_exact(&self, bytes: &mut [u8], side: Side, row: usize, values: &[f32]) {
        use half::slice::HalfFloatSliceExt;
        let dtype = match self.encoding(side) {
            Encoding::Exact(dtype) => dtype,
            Encoding::Factored => return,
            Encoding::Packed(_) => panic!("a row was written into a packed side"),
        };
        let start = row * self.row_bytes(side);
        let target = &mut bytes[start..start + self.dim(side) * dtype.bytes()];
        match dtype {
            DType::F32 => bytemuck::cast_slice_mut::<u8, f32>(target).copy_from_slice(values),
            DType::F16 => bytemuck::cast_slice_mut::<u8, f16>(target).convert_from_f32_slice(values),
            DType::Bf16 => bytemuck::cast_slice_mut::<u8, bf16>(target).convert_from_f32_slice(values),
        }
    }
}

/// A run of entries of one KV head with one encoding. Every page but the last is full.
#[derive(Clone, Debug)]
pub struct Segment {
    /// How its pages are laid out.
    pub layout: Arc<PageLayout>,
    /// Its pages, shared with forks until written.
    pub pages: Vec<Arc<Page>>,
    /// Entries in use.
    pub rows: usize,
    /// What entries are made of, where a side is factored.
    pub factors: Option<Arc<Factors>>,
}

impl Segment {
    /// An empty run.
    pub fn new(layout: Arc<PageLayout>) -> Self {
        Self { layout, pages: Vec::new(), rows: 0, factors: None }
    }

    /// Its pages with the number of entries used in each.
    pub fn pages(&self) -> impl Iterator<Item = (&Arc<Page>, usize)> + '_ {
        let capacity = self.layout.capacity;
        self.pages.iter().enumerate().map(move |(i, page)| (page, (self.rows - i * capacity).min(capacity)))
    }
}

/// Everything stored for one KV head of one layer of one sequence, oldest entry first, positions strictly
/// ascending.
#[derive(Clone, Debug, Default)]
pub struct HeadRows {
    /// Runs of entries, in order.
    pub segments: Vec<Segment>,
    /// Exact copies of the entries of the last packed page while that is not full and nothing stays exact to be
    /// read: more entries are packed together with these, not with what is left of them. No kernel reads it.
    pub open: Option<Segment>,
}

impl HeadRows {
    /// These runs.
    pub fn new(segments: Vec<Segment>) -> Self {
        Self { segments, open: None }
    }

    /// Entries in all segments.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(|s| s.rows).sum()
    }

    /// Whether any rows of a side are stored rotated.
    pub fn rotated(&self, side: Side) -> bool {
        self.segments.iter().any(|s| s.layout.rotated(side))
    }

    /// The runs that are made of factors: the segment, what it is made of, the slots of its entries.
    pub fn factored(&self) -> impl Iterator<Item = (&Segment, &Factors, Range<usize>)> {
        let mut first = 0;
        self.segments.iter().filter_map(move |segment| {
            let slots = first..first + segment.rows;
            first = slots.end;
            segment.factors.as_deref().map(|factors| (segment, factors, slots))
        })
    }

    /// Whether any entries are made of factors.
    pub fn is_factored(&self) -> bool {
        self.segments.iter().any(|segment| segment.factors.is_some())
    }

    /// The same as a newtype, for public interfaces.
    pub fn row_count(&self) -> RowCount {
        RowCount(self.rows())
    }

    /// Every page: its layout, the page, entries in use, slot of its first entry.
    pub fn pages(&self) -> impl Iterator<Item = PageRef<'_>> + '_ {
        let mut first = 0;
        self.segments.iter().flat_map(|s| s.pages().map(move |(page, rows)| (&s.layout, page, rows))).map(
            move |(layout, page, rows)| {
                let r = PageRef { layout, page, rows, first };
                first += rows;
                r
            },
        )
    }
}

/// A page in its place.
#[derive(Clone, Copy, Debug)]
pub struct PageRef<'a> {
    /// Its layout.
    pub layout: &'a Arc<PageLayout>,
    /// The page.
    pub page: &'a Arc<Page>,
    /// Entries in use, at its start.
    pub rows: usize,
    /// Slot of its first entry within the KV head.
    pub first: usize,
}

impl<'a> PageRef<'a> {
    /// Positions of the entries in use.
    pub fn positions(&self) -> &'a [i32] {
        &self.page.positions[..self.rows]
    }

    /// β of the entries in use, if any is not 0.
    pub fn bias(&self) -> Option<&'a [f32]> {
        self.page.bias.as_deref().map(|b| &b[..self.rows])
    }
}
