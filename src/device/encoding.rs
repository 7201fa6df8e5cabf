//! How one side of a page stores its rows: as elements of an exact type, or packed into a few bits each.
//!
//! A packed row holds a code per element; groups of elements share a scale, and in some formats a minimum:
//! ```text
//! x̂[j,c] = level(code[j,c]) · scale[group] + min[group] + mean[c]
//! ```
//! `level` is the code less a zero point, or a Lloyd–Max level of the normal distribution. Before packing a row may
//! be rotated by a Walsh–Hadamard transform (`hadamard`), which spreads outliers over all elements, and freed of
//! its page's mean (`center`), which a softmax over keys cannot see and a sum of values gets back exactly.
//! All of `x̂` is in the rotated space; [`rotate`] is its own inverse.
//!
//! ```text
//! a side of a page:  | codes: a plane per width | parameters: f16 [groups] | mean: f16 [d] |
//! ```
//! A plane of `w` bits lays the `d` elements of a row (padded to 32) in `8 / w` stretches over the same bytes: byte
//! `i` holds elements `i`, `i + s`, `i + 2s`, … from its lowest bits up, `s` being the stretch. So a mask and a
//! shift of a vector of bytes give consecutive elements. Widths: 8; 4 and 1 for five bits; 4; 2 and 1 for three; 2.
//!
//! The bytes of a plane lie by fours in the direction that attention sums over, the elements of keys and the rows of
//! values, so that a word holds four factors of one sum and neighbouring words belong to neighbouring sums:
//! ```text
//! keys:    [capacity / BAND][bytes of a row / 4][BAND rows][4 bytes]
//! values:  [capacity / 4][bytes of a row][4 rows]
//! ```
//! It is the order in which processors and shaders multiply bytes, and where none do a vector of words still gives four
//! vectors of elements without being transposed.
//!
//! *Helps* where memory or its bandwidth is what runs out: 2 to 8 bits instead of 16. *Hurts* entries that carry
//! much attention, sinks and the most recent: the cache keeps those exact.

use super::page::Side;
use crate::view::DType;
use half::f16;
use std::fmt;

/// How a side stores its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Elements of this type.
    Exact(DType),
    /// Codes.
    Packed(Packing),
    /// Not at all: products of the segment's [factors](super::factors).
    Factored,
}

impl Encoding {
    /// The element type, if rows are stored exactly.
    pub fn exact(self) -> Option<DType> {
        match self {
            Self::Exact(dtype) => Some(dtype),
            Self::Packed(_) | Self::Factored => None,
        }
    }

    /// The largest magnitude of an element that can be stored in rows of `d`: no number that is kept overflows its
    /// type. Packed formats keep scales, minimums and means as halves; a rotation may gather a whole row in one
    /// element, and a mean may lie as far on the other side.
    pub fn largest(self, d: usize) -> f32 {
        // Half a unit above 65504 rounds to infinity; stay below.
        const HALF: f32 = 65519.0;
        match self {
            Self::Exact(DType::F32) | Self::Factored => f32::MAX,
            Self::Exact(DType::F16) => HALF,
            Self::Exact(DType::Bf16) => 3.394e38,
            Self::Packed(packing) => {
                let rotated = if packing.hadamard { (rotation_block(d) as f32).sqrt() } else { 1.0 };
                HALF / rotated / if packing.center { 2.0 } else { 1.0 }
            }
        }
    }

    /// The packing, if rows are packed.
    pub fn packed(self) -> Option<Packing> {
        match self {
            Self::Exact(_) | Self::Factored => None,
            Self::Packed(packing) => Some(packing),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(dtype) => f.write_str(dtype.name()),
            Self::Packed(packing) => packing.fmt(f),
            Self::Factored => f.write_str("factored"),
        }
    }
}

impl From<Packing> for Encoding {
    fn from(packing: Packing) -> Self {
        Self::Packed(packing)
    }
}

impl From<DType> for Encoding {
    fn from(dtype: DType) -> Self {
        Self::Exact(dtype)
    }
}

/// A code format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// 8 bits, symmetric, a scale per row.
    Int8,
    /// 4 bits, a scale and a minimum per row.
    Int4,
    /// 4 bits, Lloyd–Max levels, a scale per row.
    Lm4,
    /// 3 bits, Lloyd–Max levels, a scale per row.
    Lm3,
    /// 2 bits, Lloyd–Max levels, a scale per row.
    Lm2,
    /// 4 bits; keys: a scale and a minimum per channel of 32 rows, values: per row of 32 channels (KIVI).
    Kivi4,
    /// The same at 2 bits.
    Kivi2,
    /// llama.cpp: 8 bits, symmetric, a scale per 32 elements.
    Q8_0,
    /// llama.cpp: 4 bits, the extreme element exact, a scale per 32 elements.
    Q4_0,
    /// llama.cpp: 4 bits, a scale and a minimum per 32 elements.
    Q4_1,
    /// llama.cpp: 5 bits, the extreme element exact, a scale per 32 elements.
    Q5_0,
    /// llama.cpp: 5 bits, a scale and a minimum per 32 elements.
    Q5_1,
}

/// Elements that share a scale where a format does not say "row".
pub const GROUP: usize = 32;

/// Rows of packed keys that lie together.
pub const BAND: usize = 64;

/// The positive halves of the Lloyd–Max levels of the standard normal distribution, ascending, in units of a 127th
/// of the last: 0.4528 and 1.5104; 0.2451, 0.7560, 1.3439 and 2.1519; 0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180,
/// 2.0690 and 2.7326. As bytes they enter integer products; the rounding adds less than a hundredth of the format's
/// own error.
const LLOYD_2: [i8; 2] = [38, 127];
const LLOYD_3: [i8; 4] = [14, 45, 79, 127];
const LLOYD_4: [i8; 8] = [6, 18, 31, 44, 58, 75, 96, 127];

impl Format {
    /// All, in the order of this enumeration.
    pub const ALL: [Self; 12] = [
        Self::Int8,
        Self::Int4,
        Self::Lm4,
        Self::Lm3,
        Self::Lm2,
        Self::Kivi4,
        Self::Kivi2,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
    ];

    /// The name in recipes and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Lm4 => "lm4",
            Self::Lm3 => "lm3",
            Self::Lm2 => "lm2",
            Self::Kivi4 => "kivi4",
            Self::Kivi2 => "kivi2",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Self::Int8 | Self::Q8_0 => 8,
            Self::Q5_0 | Self::Q5_1 => 5,
            Self::Int4 | Self::Lm4 | Self::Kivi4 | Self::Q4_0 | Self::Q4_1 => 4,
            Self::Lm3 => 3,
            Self::Lm2 | Self::Kivi2 => 2,
        }
    }

    /// Widths of the planes a code is cut into, lowest bits first.
    pub const fn planes(self) -> &'static [usize] {
        match self.bits() {
            8 => &[8],
            5 => &[4, 1],
            4 => &[4],
            3 => &[2, 1],
            _ => &[2],
        }
    }

    /// Whether a group has a minimum beside its scale.
    pub const fn has_min(self) -> bool {
        matches!(self, Self::Int4 | Self::Kivi4 | Self::Kivi2 | Self::Q4_1 | Self::Q5_1)
    }

    /// The code that stands for 0 before scaling, in linear formats. Codes of 8 bits are signed bytes.
    pub const fn zero(self) -> u8 {
        match self {
            Self::Q5_0 => 16,
            Self::Q4_0 => 8,
            _ => 0,
        }
    }

    /// The positive Lloyd–Max levels, in formats that have them, and their unit in standard deviations. Code `c`
    /// stands for level `c − 2^(bits−1)` of the table made symmetric.
    pub const fn lloyd(self) -> Option<(&'static [i8], f32)> {
        match self {
            Self::Lm4 => Some((&LLOYD_4, 2.7326 / 127.0)),
            Self::Lm3 => Some((&LLOYD_3, 2.1519 / 127.0)),
            Self::Lm2 => Some((&LLOYD_2, 1.5104 / 127.0)),
            _ => None,
        }
    }

    /// What a code stands for before scaling: a byte, in every format.
    pub const fn level(self, code: u8) -> i8 {
        match self.lloyd() {
            Some((levels, _)) => {
                let (code, half) = (code as usize, levels.len());
                if code < half { -levels[half - 1 - code] } else { levels[code - half] }
            }
            None => code.wrapping_sub(self.zero()) as i8,
        }
    }

    /// The levels of all codes, in formats that look them up; 0 for codes that do not occur.
    pub const fn table(self) -> Option<[i8; 16]> {
        const fn of(format: Format) -> Option<[i8; 16]> {
            let (mut table, mut code) = ([0; 16], 0);
            while code < 1 << format.bits() {
                table[code as usize] = format.level(code);
                code += 1;
            }
            Some(table)
        }
        match self {
            Self::Lm4 => const { of(Self::Lm4) },
            Self::Lm3 => const { of(Self::Lm3) },
            Self::Lm2 => const { of(Self::Lm2) },
            _ => None,
        }
    }

    /// Rows and elements of a row that share parameters, for rows of `d` elements.
    pub const fn group(self, side: Side, d: usize) -> (usize, usize) {
        match (self, side) {
            (Self::Kivi4 | Self::Kivi2, Side::Key) => (GROUP, 1),
            (Self::Int8 | Self::Int4 | Self::Lm4 | Self::Lm3 | Self::Lm2, _) => (1, d),
            _ => (1, GROUP),
        }
    }
}

/// A format and what is done to rows before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// The code format.
    pub format: Format,
    /// The page's mean row is taken off and stored apart.
    pub center: bool,
    /// Rows are rotated by [`rotate`].
    pub hadamard: bool,
}

impl Packing {
    /// The format alone; centred and rotated for the formats that are made for that.
    pub const fn new(format: Format) -> Self {
        let both = format.lloyd().is_some();
        Self { format, center: both, hadamard: both }
    }

    /// The same with the page's mean taken off.
    #[must_use]
    pub const fn centered(self) -> Self {
        Self { center: true, ..self }
    }

    /// The same in the rotated space.
    #[must_use]
    pub const fn rotated(self) -> Self {
        Self { hadamard: true, ..self }
    }
}

/// As in a recipe: `int4`, `int4(center,hadamard)`.
impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.format.name())?;
        match (self.center, self.hadamard) {
            _ if *self == Self::new(self.format) => Ok(()),
            (true, true) => f.write_str("(center,hadamard)"),
            (true, false) => f.write_str("(center)"),
            (false, true) => f.write_str("(hadamard)"),
            (false, false) => f.write_str("(plain)"),
        }
    }
}

/// Where everything of a packed side lies, in bytes from the start of the side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedLayout {
    /// How it is packed.
    pub packing: Packing,
    /// Of what.
    pub side: Side,
    /// Elements of a row.
    pub d: usize,
    /// Rows.
    pub capacity: usize,
    /// Rows that share parameters.
    pub group_rows: usize,
    /// Elements of a row that share parameters.
    pub group_dims: usize,
}

impl PackedLayout {
    /// The layout of `capacity` rows of `d` elements.
    pub const fn new(packing: Packing, side: Side, d: usize, capacity: usize) -> Self {
        let (group_rows, group_dims) = packing.format.group(side, d);
        Self { packing, side, d, capacity, group_rows, group_dims }
    }

    /// Elements of a row with padding.
    pub const fn padded(&self) -> usize {
        self.d.next_multiple_of(32)
    }

    /// Rows a plane has room for.
    pub const fn rows(&self) -> usize {
        self.capacity.next_multiple_of(match self.side {
            Side::Key => BAND,
            Side::Value => 4,
        })
    }

    /// Bytes of a row in the plane of this width.
    pub const fn plane_row(&self, width: usize) -> usize {
        self.padded() * width / 8
    }

    /// Where plane `index` starts.
    pub fn plane(&self, index: usize) -> usize {
        let before: usize = self.packing.format.planes()[..index].iter().sum();
        self.rows() * self.plane_row(before)
    }

    /// Groups along a row.
    pub const fn row_groups(&self) -> usize {
        self.d.div_ceil(self.group_dims)
    }

    /// Halves per group.
    pub const fn group_halves(&self) -> usize {
        1 + self.packing.format.has_min() as usize
    }

    /// Where the parameters start: per group a scale, then a minimum if there is one, as `f16`.
    pub const fn parameters(&self) -> usize {
        self.rows() * self.plane_row(self.packing.format.bits())
    }

    /// Index of the group of an element.
    pub const fn group(&self, row: usize, dim: usize) -> usize {
        row / self.group_rows * self.row_groups() + dim / self.group_dims
    }

    /// Where the mean starts.
    pub const fn mean(&self) -> usize {
        let groups = self.capacity.div_ceil(self.group_rows) * self.row_groups();
        (self.parameters() + 2 * groups * self.group_halves()).next_multiple_of(4)
    }

    /// Bytes of the side.
    pub const fn bytes(&self) -> usize {
        let mean = if self.packing.center { (2 * self.d).next_multiple_of(4) } else { 0 };
        self.mean() + mean
    }

    /// Bits per stored element, parameters and mean included.
    pub fn bits_per_element(&self) -> f64 {
        (8 * self.bytes()) as f64 / (self.capacity * self.d) as f64
    }

    /// Byte in a side, shift and mask of the part of an element's code that lies in plane `index`.
    fn place(&self, index: usize, row: usize, dim: usize) -> (usize, usize, u8) {
        let width = self.packing.format.planes()[index];
        let stretch = self.plane_row(width);
        let byte = self.plane(index) + self.within(stretch, row, dim % stretch);
        (byte, dim / stretch * width, ((1u16 << width) - 1) as u8)
    }

    /// Where byte `i` of a row lies in a plane with `bytes` of each.
    #[inline(always)]
    const fn within(&self, bytes: usize, row: usize, i: usize) -> usize {
        match self.side {
            Side::Key => (row / BAND * bytes + i / 4 * 4) * BAND + row % BAND * 4 + i % 4,
            Side::Value => (row / 4 * bytes + i) * 4 + row % 4,
        }
    }

    /// Writes the code of an element.
    pub fn set_code(&self, bytes: &mut [u8], row: usize, dim: usize, code: u8) {
        let mut code = code;
        for (index, width) in self.packing.format.planes().iter().enumerate() {
            let (byte, shift, mask) = self.place(index, row, dim);
            bytes[byte] = bytes[byte] & !(mask << shift) | (code & mask) << shift;
            code = code.checked_shr(*width as u32).unwrap_or(0);
        }
    }

    /// Writes the codes of a row, padding included.
    #[inline(always)]
    pub fn set_codes(&self, bytes: &mut [u8], row: usize, codes: &[u8]) {
        let mut from = 0;
        for (index, &width) in self.packing.format.planes().iter().enumerate() {
            let stretch = self.plane_row(width);
            let plane = &mut bytes[self.plane(index)..][..self.rows() * stretch];
            let mask = ((1u16 << width) - 1) as u8;
            for i in 0..stretch {
                let fields = codes[i..].iter().step_by(stretch).enumerate();
                plane[self.within(stretch, row, i)] =
                    fields.fold(0, |byte, (field, code)| byte | (code >> from & mask) << (field * width));
            }
            from += width;
        }
    }

    /// Writes the parameters of a group.
    pub fn set_parameters(&self, bytes: &mut [u8], group: usize, scale: f16, min: f16) {
        let at = self.parameters() + 2 * group * self.group_halves();
        bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        if self.packing.format.has_min() {
            bytes[at + 2..at + 4].copy_from_slice(&min.to_le_bytes());
        }
    }

    /// Writes an element of the mean.
    pub fn set_mean(&self, bytes: &mut [u8], dim: usize, mean: f16) {
        let at = self.mean() + 2 * dim;
        bytes[at..at + 2].copy_from_slice(&mean.to_le_bytes());
    }
}

/// A packed side of a page.
#[derive(Clone, Copy, Debug)]
pub struct PackedRows<'a> {
    /// Where what lies.
    pub layout: PackedLayout,
    /// The side's bytes.
    pub bytes: &'a [u8],
}

impl<'a> PackedRows<'a> {
    /// The code of an element.
    pub fn code(&self, row: usize, dim: usize) -> u8 {
        let (mut code, mut from) = (0, 0);
        for (index, width) in self.layout.packing.format.planes().iter().enumerate() {
            let (byte, shift, mask) = self.layout.place(index, row, dim);
            code |= (self.bytes[byte] >> shift & mask) << from;
            from += width;
        }
        code
    }

    /// Rows `from .. from + len` of plane `index` as they lie, and the bytes of each: of keys from row `from` to the end
    /// of a whole band, which they must not exceed, of values up to the next four, which `from` must start.
    #[inline]
    pub fn plane_rows(&self, index: usize, from: usize, len: usize) -> (&'a [u8], usize) {
        let bytes = self.layout.plane_row(self.layout.packing.format.planes()[index]);
        let (unit, rows) = match self.layout.side {
            Side::Key => (BAND, BAND),
            Side::Value => (4, len.next_multiple_of(4)),
        };
        // Bytes of keys of a band lie by fours, those of its rows side by side.
        let within = from % unit;
        debug_assert!(within + len <= rows && (unit == BAND || within == 0));
        let start = self.layout.plane(index) + (from - within) * bytes;
        (&self.bytes[start + 4 * within..start + rows * bytes], bytes)
    }

    /// The parameters of `count` groups from `first` on: per group a scale, then a minimum if there is one.
    pub fn halves(&self, first: usize, count: usize) -> &'a [f16] {
        let size = 2 * self.layout.group_halves();
        bytemuck::cast_slice(&self.bytes[self.layout.parameters() + first * size..][..count * size])
    }

    /// The mean; empty if there is none.
    pub fn means(&self) -> &'a [f16] {
        let count = if self.layout.packing.center { self.layout.d } else { 0 };
        bytemuck::cast_slice(&self.bytes[self.layout.mean()..][..2 * count])
    }

    fn half(&self, at: usize) -> f32 {
        f16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]).to_f32()
    }

    /// Scale and minimum (0 if the format has none) of a group.
    pub fn parameters(&self, group: usize) -> (f32, f32) {
        let at = self.layout.parameters() + 2 * group * self.layout.group_halves();
        (self.half(at), if self.layout.packing.format.has_min() { self.half(at + 2) } else { 0.0 })
    }

    /// An element of the mean, 0 if there is none.
    pub fn mean(&self, dim: usize) -> f32 {
        if self.layout.packing.center { self.half(self.layout.mean() + 2 * dim) } else { 0.0 }
    }

    /// A row as it was packed: still in the rotated space if there is one.
    pub fn read_rotated(&self, row: usize, out: &mut [f32]) {
        let format = self.layout.packing.format;
        for (dim, out) in out.iter_mut().enumerate() {
            let (scale, min) = self.parameters(self.layout.group(row, dim));
            *out = f32::from(format.level(self.code(row, dim))) * scale + min + self.mean(dim);
        }
    }

    /// A row.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        self.read_rotated(row, out);
        if self.layout.packing.hadamard {
            rotate(out);
        }
    }
}

/// Elements a Walsh–Hadamard block spans in rows of `d`: the largest power of two that divides it.
pub const fn rotation_block(d: usize) -> usize {
    if d == 0 { 1 } else { 1 << d.trailing_zeros() }
}

/// Rotates a row in place by the orthonormal Walsh–Hadamard transform, block by block of [`rotation_block`]
/// elements. Twice gives the row back.
#[inline(always)]
pub fn rotate(row: &mut [f32]) {
    let block = rotation_block(row.len());
    let factor = 1.0 / (block as f32).sqrt();
    for part in row.chunks_exact_mut(block) {
        let mut width = 1;
        while width < block {
            for pair in part.chunks_exact_mut(2 * width) {
                let (a, b) = pair.split_at_mut(width);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            width *= 2;
        }
        part.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code has bits of its own, within its plane, whatever the rows and their number.
    #[test]
    fn codes_do_not_share_bits() {
        for format in Format::ALL {
            for side in [Side::Key, Side::Value] {
                for (d, capacity) in [(64, 128), (12, 7), (80, 65)] {
                    let layout = PackedLayout::new(Packing::new(format), side, d, capacity);
                    let mut bytes = vec![0u8; layout.bytes()];
                    let top = ((1u16 << format.bits()) - 1) as u8;
                    let code = |row: usize, dim: usize| (row * 31 + dim * 7) as u8 & top;
                    for row in 0..capacity {
                        if row % 2 == 0 {
                            (0..d).for_each(|dim| layout.set_code(&mut bytes, row, dim, code(row, dim)));
                        } else {
                            let codes: Vec<u8> = (0..layout.padded()).map(|dim| code(row, dim)).collect();
                            layout.set_codes(&mut bytes, row, &codes);
                        }
                    }
                    assert!(bytes[layout.parameters()..].iter().all(|&byte| byte == 0));
                    let packed = PackedRows { layout, bytes: &bytes };
                    for row in 0..capacity {
                        for dim in 0..d {
                            assert_eq!(
                                packed.code(row, dim),
                                code(row, dim),
                                "{side:?} of {}",
                                format.name()
                            );
                        }
                    }
                }
            }
        }
    }
}
