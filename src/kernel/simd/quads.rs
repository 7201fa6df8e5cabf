//! Bytes by fours: the rows of a tile rearranged so that four bytes which are summed lie side by side.
//!
//! ```text
//! of elements, for keys:   out[i][row]  = row's bytes 4i .. 4i + 4        a lane is a row
//! of rows, for values:     out[i][byte] = byte of rows 4i .. 4i + 4       a lane is an element
//! ```
//! It is the order in which [`super::integer`] multiplies. Whole bytes are moved, so codes of a few bits go as they are
//! packed, several elements at once, and are spread afterwards. *Helps* the fewer bits the more. *Hurts* a single query
//! row, for which it is most of the work; memory is slower still. Rows that are no multiple of 16 bytes go one by one.

#![allow(unsafe_code, reason = "unchecked loads in the innermost loops, under an assertion before them")]

use super::tile::TILE;
use crate::device::page::Side;
use fearless_simd::Simd;

/// [`of_elements`] of keys, [`of_rows`] of values.
#[inline(always)]
pub(crate) fn of<S: Simd>(
    simd: S,
    side: Side,
    (plane, bytes): (&[u8], usize),
    len: usize,
    flip: u8,
    out: &mut [u8],
) {
    match side {
        Side::Key => of_elements(simd, plane, bytes, len, flip, out),
        Side::Value => of_rows(simd, plane, bytes, len, flip, out),
    }
}

/// A plane of `len` rows of `bytes` bytes, to words of four elements: `out` is `[bytes / 4][TILE]` words. Bits of `flip`
/// are flipped in every byte. Words of rows from `len` on are unspecified.
#[inline(always)]
fn of_elements<S: Simd>(simd: S, plane: &[u8], bytes: usize, len: usize, flip: u8, out: &mut [u8]) {
    debug_assert!(plane.len() >= len * bytes && out.len() >= TILE * bytes && bytes.is_multiple_of(4));
    #[cfg(target_arch = "x86_64")]
    if let (true, Some(token)) = (bytes.is_multiple_of(16), simd.level().as_avx512()) {
        for row in (0..len).step_by(16) {
            let mut starts = [0; 16];
            starts.iter_mut().enumerate().for_each(|(i, at)| *at = (row + i).min(len - 1) * bytes);
            x86::turn(token, &plane[..len * bytes], &starts, bytes, flip, &mut out[4 * row..]);
        }
        return;
    }
    let _ = simd;
    for (row, codes) in plane.chunks_exact(bytes).take(len).enumerate() {
        for (i, four) in codes.chunks_exact(4).enumerate() {
            let out = &mut out[4 * (i * TILE + row)..][..4];
            out.iter_mut().zip(four).for_each(|(out, code)| *out = code ^ flip);
        }
    }
}

/// The same to words of four rows: `out` is `[len / 4 rounded up][bytes]` words. The last row stands for those missing.
#[inline(always)]
fn of_rows<S: Simd>(simd: S, plane: &[u8], bytes: usize, len: usize, flip: u8, out: &mut [u8]) {
    debug_assert!(plane.len() >= len * bytes && out.len() >= len.next_multiple_of(4) * bytes);
    for (row, out) in (0..len).step_by(4).zip(out.chunks_exact_mut(4 * bytes)) {
        let mut four = [plane; 4];
        for (i, four) in four.iter_mut().enumerate() {
            *four = &plane[(row + i).min(len - 1) * bytes..][..bytes];
        }
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(token)) = (bytes.is_multiple_of(16), simd.level().as_avx512()) {
            x86::interleave(token, four, flip, out);
            continue;
        }
        let _ = simd;
        for (i, row) in four.into_iter().enumerate() {
            out[i..].iter_mut().step_by(4).zip(row).for_each(|(out, code)| *out = code ^ flip);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::TILE;
    use fearless_simd::prelude::*;
    use fearless_simd::{u8x16, u8x64, x86};
    use std::arch::x86_64::{
        __m512i, _mm512_castsi128_si512, _mm512_inserti32x4, _mm512_permutexvar_epi8, _mm512_set1_epi8,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
        _mm512_xor_si512,
    };

    /// Where byte `i` of a word of four lanes comes from: lane `i % 4`.
    const INTERLEAVED: [u8; 64] = {
        let mut from = [0; 64];
        let mut i = 0;
        while i < 64 {
            from[i] = (i % 4 * 16 + i / 4) as u8;
            i += 1;
        }
        from
    };

    fearless_simd::kernel!(
        /// Four times 16 bytes side by side.
        #[inline(always)]
        fn join(
            token: Avx512,
            a: u8x16<x86::Avx512>,
            b: u8x16<x86::Avx512>,
            c: u8x16<x86::Avx512>,
            d: u8x16<x86::Avx512>,
        ) -> __m512i {
            let ab = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a.into()), b.into());
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(ab, c.into()), d.into())
        }
    );

    fearless_simd::kernel!(
        /// [`super::of_elements`] of the 16 rows that start at `starts`.
        #[inline(always)]
        pub(super) fn turn(
            token: Avx512,
            rows: &[u8],
            starts: &[usize; 16],
            bytes: usize,
            flip: u8,
            out: &mut [u8],
        ) {
            for start in starts {
                assert!(start + bytes <= rows.len(), "a row sticks out");
            }
            let flip = _mm512_set1_epi8(flip as i8);
            for at in (0..bytes).step_by(16) {
                let mut joined = [flip; 4];
                for i in 0..4 {
                    let mut parts = [u8x16::splat(token, 0); 4];
                    for lane in 0..4 {
                        let from = starts[4 * lane + i] + at;
                        // SAFETY: rows were asserted to lie within, and `at + 16 <= bytes`.
                        parts[lane] =
                            u8x16::from_slice(token, unsafe { rows.get_unchecked(from..from + 16) });
                    }
                    joined[i] = _mm512_xor_si512(join(token, parts[0], parts[1], parts[2], parts[3]), flip);
                }
                let [a, b, c, d] = joined;
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                let low = [_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)];
                let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                let high = [_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)];
                for (i, words) in [low[0], low[1], high[0], high[1]].into_iter().enumerate() {
                    let words: u8x64<x86::Avx512> = words.simd_into(token);
                    words.store_slice(&mut out[(at + 4 * i) * TILE..][..64]);
                }
            }
        }
    );

    fearless_simd::kernel!(
        /// [`super::of_rows`] of four rows.
        #[inline(always)]
        pub(super) fn interleave(token: Avx512, rows: [&[u8]; 4], flip: u8, out: &mut [u8]) {
            let (flip, from) = (_mm512_set1_epi8(flip as i8), u8x64::from_slice(token, &INTERLEAVED).into());
            let [a, b, c, d] = rows;
            let rows =
                a.chunks_exact(16).zip(b.chunks_exact(16)).zip(c.chunks_exact(16).zip(d.chunks_exact(16)));
            for (((a, b), (c, d)), out) in rows.zip(out.chunks_exact_mut(64)) {
                let [a, b] = [u8x16::from_slice(token, a), u8x16::from_slice(token, b)];
                let [c, d] = [u8x16::from_slice(token, c), u8x16::from_slice(token, d)];
                let words = _mm512_permutexvar_epi8(from, join(token, a, b, c, d));
                let words: u8x64<x86::Avx512> = _mm512_xor_si512(words, flip).simd_into(token);
                words.store_slice(out);
            }
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::Level;

    /// Every word at every level, for rows of whole vectors and others, whole tiles and parts.
    #[test]
    fn bytes_go_where_they_belong() {
        for level in Level::available() {
            for bytes in [4, 12, 16, 48, 128] {
                for len in [1, 3, 15, 16, 17, 63, TILE] {
                    let plane: Vec<u8> = (0..len * bytes).map(|i| (i * 7 + i / 256) as u8).collect();
                    let mut out = vec![0; TILE * bytes];
                    crate::kernel::simd::dispatch!(level.token(), simd => of_elements(simd, &plane, bytes, len, 0x80, &mut out));
                    for (i, code) in plane.iter().enumerate() {
                        let (row, byte) = (i / bytes, i % bytes);
                        assert_eq!(out[4 * (byte / 4 * TILE + row) + byte % 4], code ^ 0x80);
                    }
                    crate::kernel::simd::dispatch!(level.token(), simd => of_rows(simd, &plane, bytes, len, 0, &mut out));
                    for i in 0..len.next_multiple_of(4) * bytes {
                        let (row, byte) = (i / bytes, i % bytes);
                        let code = plane[row.min(len - 1) * bytes + byte];
                        assert_eq!(out[4 * (row / 4 * bytes + byte) + row % 4], code);
                    }
                }
            }
        }
    }
}
