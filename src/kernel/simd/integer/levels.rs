//! Levels of packed rows as products in integers read them: bytes by fours, or two codes of four bits to a byte.
//!
//! *Helps* because what a word of codes means is said once, for keys and for values. *Hurts* formats whose codes lie in two
//! planes: they are spread into bytes before ([`super::super::unpack`]).

#![allow(unsafe_code, reason = "unchecked loads for the block product; the caller states the bound")]

use super::super::gemm::Operand;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16};

/// What makes signed bytes unsigned, or adds to unsigned ones below it: 128.
const FLIP: i32 = 0x8080_8080u32 as i32;

/// Levels, signed bytes, in words of four along the direction that is summed: `words[step * stride + lane]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quads<'a> {
    pub words: &'a [i32],
    pub stride: usize,
}

impl Quads<'_> {
    /// A vector of levels of factor `step` of the sums.
    #[inline(always)]
    pub(crate) fn at<S: Simd>(&self, simd: S, step: usize, lane: usize) -> S::f32s {
        let at = step / 4 * self.stride + lane;
        byte::<S>(S::i32s::from_slice(simd, &self.words[at..at + S::i32s::LEN]), step)
    }
}

impl Quads<'_> {
    /// Vectors of levels of the four factors from `4 · quad` on.
    #[inline(always)]
    pub(crate) fn four<S: Simd>(&self, simd: S, quad: usize, lane: usize) -> [S::f32s; 4] {
        let at = quad * self.stride + lane;
        let words = S::i32s::from_slice(simd, &self.words[at..at + S::i32s::LEN]);
        [byte::<S>(words, 0), byte::<S>(words, 1), byte::<S>(words, 2), byte::<S>(words, 3)]
    }
}

impl Operand for Quads<'_> {
    const NARROW: bool = true;
    const ROWS: usize = 4;

    #[inline(always)]
    fn holds(self, rows: usize, columns: usize) -> bool {
        rows == 0 || (rows - 1) / 4 * self.stride + columns <= self.words.len()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, row: usize, column: usize) -> S::f32s {
        let at = row / 4 * self.stride + column;
        // SAFETY: the caller's promise.
        S::i32s::from_slice(simd, unsafe { self.words.get_unchecked(at..at + S::i32s::LEN) }).bitcast()
    }

    #[inline(always)]
    fn pick<S: Simd>(loaded: S::f32s, row: usize) -> S::f32s {
        byte::<S>(loaded.bitcast(), row)
    }
}

/// Byte `step % 4` of words, signed.
#[inline(always)]
fn byte<S: Simd>(words: S::i32s, step: usize) -> S::f32s {
    ((words << (24 - 8 * (step % 4) as u32)) >> 24u32).to_float()
}

/// Levels as the product reads them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Levels<'a> {
    /// As they are.
    Bytes(Quads<'a>),
    /// Codes of four bits, two to a byte: of keys, the low ones belong to the first half of the steps and the high ones
    /// to the second; of values, to the first and the second half of the lanes.
    Nibbles(Quads<'a>, Option<[i8; 16]>),
}

impl Levels<'_> {
    /// Lanes (whole vectors) behind which the lanes of the high codes begin, if they have their own.
    pub(super) fn half(&self, signed: bool) -> usize {
        match self {
            Self::Nibbles(codes, _) if !signed => codes.stride,
            _ => 0,
        }
    }
}

/// How the codes of a loaded word become levels.
pub(super) trait Field: Copy {
    /// Codes in a byte.
    const COUNT: usize;

    /// What is added to levels that meet signed digits.
    const ZERO: i32;

    /// The levels of field `index`; with [`Field::ZERO`] added if they meet signed digits.
    fn pick<S: Simd, const SIGNED: bool>(self, simd: S, words: S::i32s, index: usize) -> S::i32s;
}

/// The bytes are the levels.
#[derive(Clone, Copy)]
pub(super) struct Whole;

impl Field for Whole {
    const COUNT: usize = 1;
    const ZERO: i32 = 0x80;

    #[inline(always)]
    fn pick<S: Simd, const SIGNED: bool>(self, simd: S, words: S::i32s, _index: usize) -> S::i32s {
        if SIGNED { words ^ S::i32s::splat(simd, FLIP) } else { words }
    }
}

/// The codes are the levels.
#[derive(Clone, Copy)]
pub(super) struct Linear;

impl Field for Linear {
    const COUNT: usize = 2;
    const ZERO: i32 = 0;

    #[inline(always)]
    fn pick<S: Simd, const SIGNED: bool>(self, simd: S, words: S::i32s, index: usize) -> S::i32s {
        let mask = S::i32s::splat(simd, 0x0f0f_0f0f);
        if index == 0 { words & mask } else { (words >> 4u32) & mask }
    }
}

/// The codes stand in a table.
#[derive(Clone, Copy)]
pub(super) struct Table([u8; 16]);

impl Table {
    pub(super) fn new<const SIGNED: bool>(levels: [i8; 16]) -> Self {
        Self(levels.map(|level| if SIGNED { level as u8 ^ FLIP as u8 } else { level as u8 }))
    }
}

impl Field for Table {
    const COUNT: usize = 2;
    const ZERO: i32 = 0x80;

    #[inline(always)]
    fn pick<S: Simd, const SIGNED: bool>(self, simd: S, words: S::i32s, index: usize) -> S::i32s {
        let codes = Linear.pick::<S, SIGNED>(simd, words, index);
        let table = S::u8s::block_splat(u8x16::from_slice(simd, &self.0));
        table.swizzle_dyn_within_blocks(codes.bitcast::<S::u8s>()).bitcast()
    }
}
