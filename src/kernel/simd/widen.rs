//! Widening stored rows to `f32`.
//!
//! *Helps* because every kernel then computes in one type. *Hurts* nothing when done once per row and
//! shared by the query heads of a group. With AVX2 and above the processor converts halves itself; elsewhere
//! they are converted by shifting the bits into place.

#![allow(unsafe_code, reason = "unchecked loads in the innermost loops; each caller states the bound")]

use super::gemm::PAD;
use crate::device::Page;
use crate::device::page::{PageLayout, Rows, Side};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// `out = source[start ..][.. out.len()]` in single precision.
#[inline(always)]
pub(crate) fn widen<S: Simd>(simd: S, source: Rows<'_>, start: usize, out: &mut [f32]) {
    let span = start..start + out.len();
    match source {
        Rows::F32(s) => out.copy_from_slice(&s[span]),
        Rows::F16(s) => widen_slice(simd, &s[span], out),
        Rows::Bf16(s) => widen_slice(simd, &s[span], out),
        // Its rows are counted, not its elements.
        Rows::Packed(p) => p.read(start, out),
    }
}

/// One row of a page in single precision.
#[inline(always)]
pub(crate) fn widen_row<S: Simd>(
    simd: S,
    layout: &PageLayout,
    page: &Page,
    side: Side,
    row: usize,
    out: &mut [f32],
) {
    widen(simd, layout.rows(page, side), row * layout.row_stride(side), out);
}

/// Stored elements that load as vectors of single precision.
pub(crate) trait Source: Copy {
    /// Whether loading converts.
    const NARROW: bool;

    /// Elements `range`.
    fn slice(self, range: Range<usize>) -> Self;

    /// The first elements, as many as a vector has.
    fn vector<S: Simd>(self, simd: S) -> S::f32s;

    /// Elements there are.
    fn len(self) -> usize;

    /// The elements from `at`, as many as a vector has.
    ///
    /// # Safety
    /// `at` plus the lanes of a vector must not exceed the length.
    unsafe fn vector_at<S: Simd>(self, simd: S, at: usize) -> S::f32s;

    /// `out = self[from ..]`, for elements that fill no vector.
    fn rest(self, from: usize, out: &mut [f32]);
}

impl<T: Element> Source for &[T] {
    const NARROW: bool = T::NARROW;

    #[inline(always)]
    fn slice(self, range: Range<usize>) -> Self {
        &self[range]
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) -> S::f32s {
        T::vector(simd, &self[..S::f32s::LEN])
    }

    #[inline(always)]
    fn len(self) -> usize {
        self.len()
    }

    #[inline(always)]
    unsafe fn vector_at<S: Simd>(self, simd: S, at: usize) -> S::f32s {
        // SAFETY: the caller's promise is that of `get_unchecked`.
        T::vector(simd, unsafe { self.get_unchecked(at..at + S::f32s::LEN) })
    }

    #[inline]
    fn rest(self, from: usize, out: &mut [f32]) {
        self[from..].iter().zip(out).for_each(|(s, o)| *o = s.single());
    }
}

/// An element type of stored rows.
pub(crate) trait Element: bytemuck::Pod {
    /// Whether it is another than single precision.
    const NARROW: bool = true;

    /// One in single precision.
    fn single(self) -> f32;

    /// As many as a vector has.
    fn vector<S: Simd>(simd: S, elements: &[Self]) -> S::f32s;
}

impl Element for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    fn single(self) -> f32 {
        self
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, elements: &[Self]) -> S::f32s {
        S::f32s::from_slice(simd, elements)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn single(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, halves: &[Self]) -> S::f32s {
        let bits: &[u16] = halves.reinterpret_cast();
        #[cfg(target_arch = "x86_64")]
        {
            if let (16, Some(token)) = (S::f32s::LEN, simd.level().as_avx512()) {
                return S::f32s::from_slice(simd, x86::f16_avx512(token, bits).as_slice());
            }
            if let (8, Some(token)) = (S::f32s::LEN, simd.level().as_avx2()) {
                return S::f32s::from_slice(simd, x86::f16_avx2(token, bits).as_slice());
            }
        }
        f16_bits(simd, wide_bits(simd, bits))
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn single(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, halves: &[Self]) -> S::f32s {
        let bits: &[u16] = halves.reinterpret_cast();
        #[cfg(target_arch = "x86_64")]
        {
            if let (16, Some(token)) = (S::f32s::LEN, simd.level().as_avx512()) {
                return S::f32s::from_slice(simd, x86::bf16_avx512(token, bits).as_slice());
            }
            if let (8, Some(token)) = (S::f32s::LEN, simd.level().as_avx2()) {
                return S::f32s::from_slice(simd, x86::bf16_avx2(token, bits).as_slice());
            }
        }
        // The upper half of an `f32` is a `bf16`.
        (wide_bits(simd, bits) << 16).bitcast()
    }
}

/// 16-bit words in 32-bit lanes. A register of words has twice the lanes, so half of it is padding.
#[inline(always)]
fn wide_bits<S: Simd>(simd: S, bits: &[u16]) -> S::u32s {
    let mut padded = [0u16; 2 * PAD];
    padded[..bits.len()].copy_from_slice(bits);
    S::u16s::from_slice(simd, &padded[..S::u16s::LEN]).widen().0
}

/// `out = source`, whole vectors first, the rest one by one.
#[inline(always)]
fn widen_slice<S: Simd, T: Source>(simd: S, source: T, out: &mut [f32]) {
    let lanes = S::f32s::LEN;
    let whole = out.len() - out.len() % lanes;
    for at in (0..whole).step_by(lanes) {
        source.slice(at..at + lanes).vector(simd).store_slice(&mut out[at..at + lanes]);
    }
    source.rest(whole, &mut out[whole..]);
}

/// Halves by their bits: exponent and mantissa moved into place, the exponent's bias corrected by a
/// multiplication, which also normalises subnormal halves; infinities keep all exponent bits.
#[inline(always)]
fn f16_bits<S: Simd>(simd: S, bits: S::u32s) -> S::f32s {
    let splat = |x: u32| S::u32s::splat(simd, x);
    let magnitude = (bits & splat(0x7fff)) << 13;
    let rebias = S::f32s::splat(simd, f32::from_bits((254 - 15) << 23));
    let finite = (magnitude.bitcast::<S::f32s>() * rebias).bitcast::<S::u32s>();
    let special = bits & splat(0x7fff);
    let infinite = special.simd_lt(splat(0x7c00)).select(splat(0), splat(0xff << 23));
    let sign = (bits & splat(0x8000)) << 16;
    (finite | infinite | sign).bitcast()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use fearless_simd::prelude::*;
    use fearless_simd::{f32x8, f32x16, u16x8, u16x16, x86};
    use std::arch::x86_64::{
        __m128i, __m256i, _MM_FROUND_CUR_DIRECTION, _mm256_castsi256_ps, _mm256_cvtepu16_epi32,
        _mm256_cvtph_ps, _mm256_slli_epi32, _mm512_castsi512_ps, _mm512_cvt_roundph_ps,
        _mm512_cvtepu16_epi32, _mm512_slli_epi32,
    };

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn f16_avx2(token: Avx2, bits: &[u16]) -> f32x8<x86::Avx2> {
            let halves: __m128i = u16x8::from_slice(token, bits).into();
            _mm256_cvtph_ps(halves).simd_into(token)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn f16_avx512(token: Avx512, bits: &[u16]) -> f32x16<x86::Avx512> {
            let halves: __m256i = u16x16::from_slice(token, bits).into();
            // Not `_mm512_cvtph_ps`: that one suppresses exceptions, in an encoding that cannot read memory
            // and so costs one more operation on the ports of the multiplications.
            _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(halves).simd_into(token)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn bf16_avx2(token: Avx2, bits: &[u16]) -> f32x8<x86::Avx2> {
            let halves: __m128i = u16x8::from_slice(token, bits).into();
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))).simd_into(token)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn bf16_avx512(token: Avx512, bits: &[u16]) -> f32x16<x86::Avx512> {
            let halves: __m256i = u16x16::from_slice(token, bits).into();
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))).simd_into(token)
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;
    use half::slice::HalfBitsSliceExt;

    /// Every half and every bf16 that is a number widens exactly, at every level and at every tail length.
    #[test]
    fn all_values_widen_exactly() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let halves = bits.reinterpret_cast::<f16>();
        let brains = bits.reinterpret_cast::<bf16>();
        for level in Level::available() {
            for start in [0, 1, 15, 60001] {
                let mut out = vec![0.0f32; bits.len() - start];
                crate::kernel::simd::dispatch!(level.token(), simd => widen(simd, Rows::F16(halves), start, &mut out));
                for (h, o) in halves[start..].iter().zip(&out).filter(|(h, _)| !h.is_nan()) {
                    assert_eq!(h.to_f32().to_bits(), o.to_bits(), "{h} at {}", level.name());
                }
                crate::kernel::simd::dispatch!(level.token(), simd => widen(simd, Rows::Bf16(brains), start, &mut out));
                for (h, o) in brains[start..].iter().zip(&out).filter(|(h, _)| !h.is_nan()) {
                    assert_eq!(h.to_f32().to_bits(), o.to_bits(), "{h} at {}", level.name());
                }
            }
        }
    }
}
