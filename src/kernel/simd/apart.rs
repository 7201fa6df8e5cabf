//! Rows that lie apart, multiplied where they are.
//!
//! Products over a tile of keys or values ask for its rows one by one, and need not know that one follows another.
//! *Helps* lone entries: they are read once, from where they are stored to the registers. *Hurts* by two words a row,
//! which are more than a stride.

#![allow(
    unsafe_code,
    reason = "unchecked loads for the block product, of rows whose length and alignment are looked at once"
)]

use super::gemm::{Lines, Operand};
use super::widen::{Element, Source};
use fearless_simd::{Simd, SimdBase};
use std::marker::PhantomData;

/// Rows of one side, all of a width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Apart<'r, T> {
    /// At least `width` elements each, where such may lie.
    rows: &'r [&'r [u8]],
    width: usize,
    element: PhantomData<T>,
}

impl<'r, T: Element> Apart<'r, T> {
    /// The elements of `rows`, of which there are at least `width` each.
    ///
    /// # Panics
    /// If there are fewer, or some lie where no such element may.
    #[inline(always)]
    pub(super) fn new(rows: &'r [&'r [u8]], width: usize) -> Self {
        let (bytes, align) = (width * size_of::<T>(), align_of::<T>());
        for row in rows {
            assert!(row.len() >= bytes && row.as_ptr().addr() % align == 0, "{} bytes of a row", row.len());
        }
        Self { rows, width, element: PhantomData }
    }

    /// Row `row`.
    ///
    /// # Safety
    /// There must be such a row.
    #[inline(always)]
    unsafe fn row(self, row: usize) -> &'r [T] {
        // SAFETY: the caller's promise.
        let bytes = unsafe { self.rows.get_unchecked(row) };
        // SAFETY: `new` looked at length and alignment, and every pattern of bits is an element.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.width) }
    }
}

impl<'r, T: Element> Lines for Apart<'r, T> {
    type Line = &'r [T];

    #[inline(always)]
    fn line(self, row: usize, width: usize) -> Self::Line {
        assert!(row < self.rows.len(), "row {row} of {}", self.rows.len());
        // SAFETY: there is such a row.
        unsafe { &self.row(row)[..width] }
    }
}

impl<T: Element> Operand for Apart<'_, T> {
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
        let line = unsafe { self.row(row) };
        // SAFETY: the caller's promise; every row is as wide as `new` found it.
        unsafe { line.vector_at(simd, column) }
    }

    #[inline(always)]
    fn pick<S: Simd>(loaded: S::f32s, _row: usize) -> S::f32s {
        loaded
    }
}
