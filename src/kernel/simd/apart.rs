//! Rows that lie apart, multiplied where they are.
//!
//! Products over a tile of keys or values ask for its rows one by one, and need not know that one follows another.
//! *Helps* lone entries: they are read once, from where they are stored to the registers. *Hurts* by two words a row,
//! which are more than a stride.

#![allow(unsafe_code, reason = "unchecked loads for the block product; the caller states the bound")]

use super::gemm::{Lines, Operand};
use super::tile::TILE;
use super::widen::{Element, Source};
use bytemuck::cast_slice;
use fearless_simd::{Simd, SimdBase};

/// The rows of both sides of a tile, keys first, as bytes.
#[derive(Debug)]
pub(crate) struct Lists<'a>([[&'a [u8]; TILE]; 2]);

impl<'a> Lists<'a> {
    /// None.
    pub(crate) const NONE: Self = Self([[&[]; TILE]; 2]);

    /// Makes these the rows, as many of both, and gives them.
    #[inline(always)]
    pub(super) fn set(&mut self, keys: &[&'a [u8]], values: &[&'a [u8]]) -> [&[&'a [u8]]; 2] {
        let [own_keys, own_values] = &mut self.0;
        own_keys[..keys.len()].copy_from_slice(keys);
        own_values[..values.len()].copy_from_slice(values);
        [&own_keys[..keys.len()], &own_values[..values.len()]]
    }
}

/// Memory for the rows of one side in their type.
pub(super) type Typed<'a, T> = [&'a [T]; TILE];

/// Rows of one side, all of a width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Apart<'r, 'a, T> {
    rows: &'r [&'a [T]],
    width: usize,
}

impl<'r, 'a, T: Element> Apart<'r, 'a, T> {
    /// The elements of `rows`, of which there are at least `width` each.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    pub(super) fn new(rows: &[&'a [u8]], width: usize, memory: &'r mut Typed<'a, T>) -> Self {
        for (bytes, row) in rows.iter().zip(&mut *memory) {
            *row = &cast_slice(bytes)[..width];
        }
        Self { rows: &memory[..rows.len()], width }
    }
}

impl<'a, T: Element> Lines for Apart<'_, 'a, T> {
    type Line = &'a [T];

    #[inline(always)]
    fn line(self, row: usize, width: usize) -> Self::Line {
        &self.rows[row][..width]
    }
}

impl<T: Element> Operand for Apart<'_, '_, T> {
    const NARROW: bool = T::NARROW;
    const ROWS: usize = 1;

    #[inline(always)]
    fn holds(self, rows: usize, columns: usize) -> bool {
        rows <= self.rows.len() && columns <= self.width
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, row: usize, column: usize) -> S::f32s {
        debug_assert!(column + S::f32s::LEN <= self.width, "rows are {} wide", self.width);
        // SAFETY: the caller's promise.
        let line = unsafe { self.rows.get_unchecked(row) };
        // SAFETY: the caller's promise; every row is as wide as `new` cut it.
        unsafe { line.vector_at(simd, column) }
    }

    #[inline(always)]
    fn pick<S: Simd>(loaded: S::f32s, _row: usize) -> S::f32s {
        loaded
    }
}
