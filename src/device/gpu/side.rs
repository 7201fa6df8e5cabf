//! What a shader is told about the two sides of a page: the kind of its elements, a constant of the pipeline, and
//! for packed ones where what lies, a uniform.
//!
//! *Helps* keep one shader per kernel: exact types pay nothing for packed ones, whose branch their pipelines do
//! not have. *Hurts* packed ones a little, whose widths and shifts are read rather than compiled in; a pipeline
//! per format would be compiled twelve times.

use crate::device::encoding::{Encoding, PackedLayout};
use crate::device::page::{PageLayout, Side};
use crate::view::DType;

/// The number a shader knows the encoding of a side by.
pub(crate) fn kind(layout: &PageLayout, side: Side) -> u32 {
    match layout.encoding(side) {
        Encoding::Exact(DType::F32) => 0,
        Encoding::Exact(DType::F16) => 1,
        Encoding::Exact(DType::Bf16) => 2,
        Encoding::Packed(_) => 3,
        // No shader is given one: kernels pass over entries that are made of factors.
        Encoding::Factored => u32::MAX,
    }
}

/// See `shaders/shared/packed.wgsl`; all zeros for an exact side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Pack {
    low: u32,
    high: u32,
    low_bits: u32,
    high_bits: u32,
    low_words: u32,
    high_words: u32,
    parameters: u32,
    mean: u32,
    center: u32,
    has_min: u32,
    row_shift: u32,
    dim_shift: u32,
    row_groups: u32,
    zero: u32,
    tabled: u32,
    levels: [u32; 4],
    flip: u32,
    by_rows: u32,
    /// Elements of a uniform array start at multiples of 16 bytes.
    padding: [u32; 3],
}

/// Where what lies in two sides.
pub(crate) fn packs(layout: &PageLayout, sides: [Side; 2]) -> [Pack; 2] {
    sides.map(|side| {
        let start = layout.range(side).start;
        layout.packed(side).map_or_else(Pack::default, |packed| Pack::new(&packed, start))
    })
}

impl Pack {
    /// A side that starts at byte `start` of its page.
    fn new(layout: &PackedLayout, start: usize) -> Self {
        let format = layout.packing.format;
        let word = |byte: usize| ((start + byte) / 4) as u32;
        let planes = format.planes();
        let high = planes.get(1).copied();
        let mut levels = [0; 4];
        if format.lloyd().is_some() {
            for code in 0..1u8 << format.bits() {
                let level = u32::from(format.level(code) as u8);
                levels[usize::from(code / 4)] |= level << (8 * (code % 4));
            }
        }
        Self {
            low: word(layout.plane(0)),
            high: high.map_or(0, |_| word(layout.plane(1))),
            low_bits: planes[0] as u32,
            high_bits: high.unwrap_or(0) as u32,
            low_words: (layout.plane_row(planes[0]) / 4) as u32,
            high_words: (layout.plane_row(high.unwrap_or(0)) / 4) as u32,
            parameters: word(layout.parameters()),
            mean: word(layout.mean()),
            center: u32::from(layout.packing.center),
            has_min: u32::from(format.has_min()),
            // Groups span a power of two, or a whole row.
            row_shift: layout.group_rows.trailing_zeros(),
            dim_shift: if layout.row_groups() == 1 { 31 } else { layout.group_dims.trailing_zeros() },
            row_groups: layout.row_groups() as u32,
            zero: if format.bits() == 8 { 128 } else { format.zero().into() },
            tabled: u32::from(format.lloyd().is_some()),
            levels,
            flip: if format.bits() == 8 { 128 } else { 0 },
            by_rows: u32::from(layout.side == Side::Value),
            padding: [0; 3],
        }
    }
}
