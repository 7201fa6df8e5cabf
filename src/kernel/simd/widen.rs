//! Widening stored rows to `f32`.
//!
//! *Helps* because every kernel then computes in one type. *Hurts* nothing when done once per row and
//! shared by the query heads of a group. With AVX2 and above the processor converts halves itself; elsewhere
//! they are converted by shifting the bits into place.

use crate::device::Page;
use crate::device::page::{PageLayout, Rows, Side};
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// `out = source[start ..][.. out.len()]` in single precision.
#[inline(always)]
pub(crate) fn widen<S: Simd>(simd: S, source: Rows<'_>, start: usize, out: &mut [f32]) {
    let span = start..start + out.len();
    match source {
        Rows::F32(s) => out.copy_from_slice(&s[span]),
        Rows::F16(s) => f16_row(simd, s[span].reinterpret_cast(), out),
        Rows::Bf16(s) => bf16_row(simd, s[span].reinterpret_cast(), out),
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

/// The upper half of an `f32` is a `bf16`.
#[inline(always)]
fn bf16_row<S: Simd>(simd: S, source: &[u16], out: &mut [f32]) {
    let mut sources = source.chunks_exact(S::u16s::LEN);
    let mut outs = out.chunks_exact_mut(S::u16s::LEN);
    for (s, o) in (&mut sources).zip(&mut outs) {
        let (low, high) = S::u16s::from_slice(simd, s).widen();
        let (first, second) = o.split_at_mut(S::f32s::LEN);
        (low << 16).bitcast::<S::f32s>().store_slice(first);
        (high << 16).bitcast::<S::f32s>().store_slice(second);
    }
    for (&s, o) in sources.remainder().iter().zip(outs.into_remainder()) {
        *o = f32::from_bits(u32::from(s) << 16);
    }
}

#[inline(always)]
fn f16_row<S: Simd>(simd: S, source: &[u16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(token) = simd.level().as_avx512() {
            return x86::f16_avx512(token, source, out);
        }
        if let Some(token) = simd.level().as_avx2() {
            return x86::f16_avx2(token, source, out);
        }
    }
    let mut sources = source.chunks_exact(S::u16s::LEN);
    let mut outs = out.chunks_exact_mut(S::u16s::LEN);
    for (s, o) in (&mut sources).zip(&mut outs) {
        let (low, high) = S::u16s::from_slice(simd, s).widen();
        let (first, second) = o.split_at_mut(S::f32s::LEN);
        f16_bits(simd, low).store_slice(first);
        f16_bits(simd, high).store_slice(second);
    }
    let rest = sources.remainder().reinterpret_cast::<half::f16>();
    rest.iter().zip(outs.into_remainder()).for_each(|(s, o)| *o = s.to_f32());
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
    use fearless_simd::{u16x8, u16x16};
    use std::arch::x86_64::{__m128i, __m256i, _mm256_cvtph_ps, _mm512_cvtph_ps};

    fearless_simd::kernel!(
        #[inline]
        pub(super) fn f16_avx2(token: Avx2, source: &[u16], out: &mut [f32]) {
            let mut sources = source.chunks_exact(8);
            let mut outs = out.chunks_exact_mut(8);
            for (s, o) in (&mut sources).zip(&mut outs) {
                let halves: __m128i = u16x8::from_slice(token, s).into();
                let wide: fearless_simd::f32x8<_> = _mm256_cvtph_ps(halves).simd_into(token);
                wide.store_slice(o);
            }
            let rest = sources.remainder();
            if !rest.is_empty() {
                let mut padded = [0u16; 8];
                padded[..rest.len()].copy_from_slice(rest);
                let halves: __m128i = u16x8::from_slice(token, &padded).into();
                let wide: fearless_simd::f32x8<_> = _mm256_cvtph_ps(halves).simd_into(token);
                outs.into_remainder().copy_from_slice(&wide.as_slice()[..rest.len()]);
            }
        }
    );

    fearless_simd::kernel!(
        #[inline]
        pub(super) fn f16_avx512(token: Avx512, source: &[u16], out: &mut [f32]) {
            let mut sources = source.chunks_exact(16);
            let mut outs = out.chunks_exact_mut(16);
            for (s, o) in (&mut sources).zip(&mut outs) {
                let halves: __m256i = u16x16::from_slice(token, s).into();
                let wide: fearless_simd::f32x16<_> = _mm512_cvtph_ps(halves).simd_into(token);
                wide.store_slice(o);
            }
            let rest = sources.remainder();
            if !rest.is_empty() {
                let mut padded = [0u16; 16];
                padded[..rest.len()].copy_from_slice(rest);
                let halves: __m256i = u16x16::from_slice(token, &padded).into();
                let wide: fearless_simd::f32x16<_> = _mm512_cvtph_ps(halves).simd_into(token);
                outs.into_remainder().copy_from_slice(&wide.as_slice()[..rest.len()]);
            }
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;

    /// Every half and every bf16 that is a number widens exactly, at every level and at every tail length.
    #[test]
    fn all_values_widen_exactly() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let halves = bits.reinterpret_cast::<half::f16>();
        let brains = bits.reinterpret_cast::<half::bf16>();
        for level in Level::available() {
            for start in [0, 1, 15, 60001] {
                let mut out = vec![0.0f32; bits.len() - start];
                fearless_simd::dispatch!(level.token(), simd => widen(simd, Rows::F16(halves), start, &mut out));
                for (h, o) in halves[start..].iter().zip(&out).filter(|(h, _)| !h.is_nan()) {
                    assert_eq!(h.to_f32().to_bits(), o.to_bits(), "{h} at {}", level.name());
                }
                fearless_simd::dispatch!(level.token(), simd => widen(simd, Rows::Bf16(brains), start, &mut out));
                for (h, o) in brains[start..].iter().zip(&out).filter(|(h, _)| !h.is_nan()) {
                    assert_eq!(h.to_f32().to_bits(), o.to_bits(), "{h} at {}", level.name());
                }
            }
        }
    }
}
