//! The instructions that multiply integers and sum neighbouring products, and what they do in plain code elsewhere.
//!
//! *Helps* because nothing else names them. *Hurts* where plain code is run: [`super::way`] does not offer it.

use super::super::gemm::PAD;
use fearless_simd::{Simd, SimdBase};

/// `sum + Σ a · b` of the four bytes of each lane, those of `a` unsigned, those of `b` signed.
#[inline(always)]
pub(crate) fn dot4<S: Simd>(simd: S, sum: S::i32s, a: S::i32s, b: S::i32s) -> S::i32s {
    #[cfg(target_arch = "x86_64")]
    if let (16, Some(token)) = (S::i32s::LEN, simd.level().as_avx512()) {
        let sum = x86::dot4_avx512(token, sum.as_slice(), a.as_slice(), b.as_slice());
        return S::i32s::from_slice(simd, sum.as_slice());
    }
    let mut sums = [0i32; PAD];
    sum.store_slice(&mut sums[..S::i32s::LEN]);
    for (sum, (a, b)) in sums.iter_mut().zip(a.as_slice().iter().zip(b.as_slice())) {
        for (a, b) in a.to_le_bytes().into_iter().zip(b.to_le_bytes()) {
            // Like the instruction, modulo 2³²: the end fits, its way there need not.
            *sum = sum.wrapping_add(i32::from(a) * i32::from(b as i8));
        }
    }
    S::i32s::from_slice(simd, &sums[..S::i32s::LEN])
}

/// Four signed bytes of half as many words as a vector has lanes, widened to two lanes of two words each.
#[inline(always)]
pub(super) fn widen4<S: Simd>(simd: S, words: &[i32]) -> S::i32s {
    #[cfg(target_arch = "x86_64")]
    if let (8, Some(token)) = (S::i32s::LEN, simd.level().as_avx2()) {
        return S::i32s::from_slice(simd, x86::widen4_avx2(token, words).as_slice());
    }
    let mut wide = [0i32; PAD];
    for (wide, word) in wide.as_chunks_mut().0.iter_mut().zip(words) {
        let [a, b, c, d] = word.to_le_bytes().map(|byte| i32::from(byte as i8));
        *wide = [a & 0xffff | b << 16, c & 0xffff | d << 16];
    }
    S::i32s::from_slice(simd, &wide[..S::i32s::LEN])
}

/// `sum + a · x` of the two words of each lane; the even lanes of `x` are its first word, the odd ones its second.
#[inline(always)]
pub(super) fn dot2<S: Simd>(simd: S, sum: S::i32s, a: S::i32s, x: [i32; 2]) -> S::i32s {
    #[cfg(target_arch = "x86_64")]
    if let (8, Some(token)) = (S::i32s::LEN, simd.level().as_avx2()) {
        let x = i64::from(x[1]) << 32 | i64::from(x[0] as u32);
        return S::i32s::from_slice(simd, x86::dot2_avx2(token, sum.as_slice(), a.as_slice(), x).as_slice());
    }
    let mut sums = [0i32; PAD];
    sum.store_slice(&mut sums[..S::i32s::LEN]);
    let words = |x: i32| [i32::from(x as i16), x >> 16];
    for (i, (sum, a)) in sums.iter_mut().zip(a.as_slice()).enumerate() {
        let (a, x) = (words(*a), words(x[i % 2]));
        *sum += a[0] * x[0] + a[1] * x[1];
    }
    S::i32s::from_slice(simd, &sums[..S::i32s::LEN])
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use fearless_simd::prelude::*;
    use fearless_simd::{i32x4, i32x8, i32x16, x86};
    use std::arch::x86_64::{
        _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_madd_epi16, _mm256_set1_epi64x, _mm512_dpbusd_epi32,
    };

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn widen4_avx2(token: Avx2, words: &[i32]) -> i32x8<x86::Avx2> {
            _mm256_cvtepi8_epi16(i32x4::from_slice(token, words).into()).simd_into(token)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn dot2_avx2(token: Avx2, sum: &[i32], a: &[i32], x: i64) -> i32x8<x86::Avx2> {
            let sum = i32x8::from_slice(token, sum).into();
            let products = _mm256_madd_epi16(i32x8::from_slice(token, a).into(), _mm256_set1_epi64x(x));
            _mm256_add_epi32(sum, products).simd_into(token)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        pub(super) fn dot4_avx512(token: Avx512, sum: &[i32], a: &[i32], b: &[i32]) -> i32x16<x86::Avx512> {
            let sum = i32x16::from_slice(token, sum).into();
            let a = i32x16::from_slice(token, a).into();
            let b = i32x16::from_slice(token, b).into();
            _mm512_dpbusd_epi32(sum, a, b).simd_into(token)
        }
    );
}
