//! Codes of 4 bits, looked up in registers (André et al. 2015, and FAISS' fast scan).
//!
//! Tables are rounded to bytes, so that those of a sub-quantiser fill 16, and a shuffle looks up as many codes as a vector
//! has bytes. For that the words of the entries of a block are turned, once for all query rows, to lie by place:
//!
//! ```text
//! page    | entry 0: word 0, 1, … | entry 1: word 0, 1, … | …
//! turned  | word 0 of entries 0, 1, … | word 1 of entries 0, 1, … | …
//! ```
//! With AVX-512 a shuffle reaches 64 bytes, the tables of all bytes of a word, and the four numbers found for a word are
//! summed by one instruction (`dot4`, with ones). Elsewhere it reaches 16, so each word is turned again, by its bytes. Then
//! bytes are summed in lanes of 16 bits: whole lanes, and their upper bytes again, whose sum is taken off the first at the
//! end. Sums are exact either way, so every level gives the same bits.
//!
//! *Helps* by ten times and more over [`super::lookup`]. *Hurts* the last digits: see the tolerance in [`super::super`].

use super::{LANES, QUAD, Strip};
use crate::kernel::code_scores::CodeLayout;
use crate::kernel::simd::integer::dot4;
use crate::kernel::simd::take;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16};

/// Words of a row that are turned at once.
const PIECE: usize = 4;

/// Numbers of a table.
const LEVELS: usize = 16;

/// Tables of a word: of its low and its high codes, of four query rows, of its four bytes.
type Tables = [[[[u8; LEVELS]; 4]; QUAD]; 2];

/// Floats that tables take.
const fn tables_len(layout_words: usize) -> usize {
    layout_words * size_of::<Tables>() / size_of::<f32>()
}

/// Floats of the tables of four query rows, and of each row step and sum of the minimums.
pub(super) fn quad_len(layout: CodeLayout) -> usize {
    tables_len(layout.words()) + 2 * QUAD
}

/// A block by words, and a piece of it on the way there.
pub(super) fn scratch_len(layout: CodeLayout) -> usize {
    (layout.words() + PIECE) * LANES
}

/// Tables, step and sum of the minimums of four query rows.
struct Quad<'a> {
    tables: &'a [Tables],
    steps: &'a [f32],
    bases: &'a [f32],
}

impl<'a> Quad<'a> {
    #[inline(always)]
    fn new(layout: CodeLayout, quad: &'a [f32]) -> Self {
        let (tables, rest) = quad.split_at(tables_len(layout.words()));
        Self { tables: bytemuck::cast_slice(tables), steps: &rest[..QUAD], bases: &rest[QUAD..2 * QUAD] }
    }
}

/// Rounds the tables of up to four query rows to bytes.
#[inline(always)]
pub(super) fn round<S: Simd>(simd: S, layout: CodeLayout, levels: usize, tables: &[f32], quad: &mut [f32]) {
    let (bytes, rest) = quad.split_at_mut(tables_len(layout.words()));
    let bytes: &mut [Tables] = bytemuck::cast_slice_mut(bytes);
    // The last word may have bits that belong to no code: they count nothing.
    bytes.fill([[[[0; LEVELS]; 4]; QUAD]; 2]);
    for (c, table) in tables.chunks_exact(layout.codes * levels).enumerate() {
        let (mut span, mut base) = (0.0f32, 0.0f32);
        for (m, codewords) in table.chunks_exact(levels).enumerate() {
            let (low, high) = range(simd, &padded(codewords));
            span = span.max(high - low);
            base += low;
            // The minimum waits where the table comes.
            bytes[m / 8][m % 2][c][m % 8 / 2][..4].copy_from_slice(&low.to_le_bytes());
        }
        let step = span / 255.0;
        // Of equal numbers nothing but the minimum is left.
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        (rest[c], rest[QUAD + c]) = (step, base);
        for (m, codewords) in table.chunks_exact(levels).enumerate() {
            let bytes = &mut bytes[m / 8][m % 2][c][m % 8 / 2];
            let low = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            *bytes = rounded(simd, &padded(codewords), low, inverse);
        }
    }
}

/// The numbers of a table; codes it does not have are its last.
#[inline(always)]
fn padded(codewords: &[f32]) -> [f32; LEVELS] {
    match codewords.first_chunk() {
        Some(all) => *all,
        None => {
            let mut all = [codewords[codewords.len() - 1]; LEVELS];
            all[..codewords.len()].copy_from_slice(codewords);
            all
        }
    }
}

/// The least and the largest number.
#[inline(always)]
fn range<S: Simd>(simd: S, table: &[f32; LEVELS]) -> (f32, f32) {
    let first = S::f32s::from_slice(simd, &table[..S::f32s::LEN]);
    let (mut low, mut high) = (first, first);
    for x in table[S::f32s::LEN..].chunks_exact(S::f32s::LEN) {
        let x = S::f32s::from_slice(simd, x);
        (low, high) = (low.min(x), high.max(x));
    }
    (low.reduce_min(), high.reduce_max())
}

/// A table in steps above its minimum.
#[inline(always)]
fn rounded<S: Simd>(simd: S, table: &[f32; LEVELS], low: f32, inverse: f32) -> [u8; LEVELS] {
    let (low, inverse) = (S::f32s::splat(simd, low), S::f32s::splat(simd, inverse));
    let (half, most) = (S::f32s::splat(simd, 0.5), S::f32s::splat(simd, 255.0));
    let mut steps = [0i32; LEVELS];
    for (steps, x) in steps.chunks_exact_mut(S::f32s::LEN).zip(table.chunks_exact(S::f32s::LEN)) {
        let x = (S::f32s::from_slice(simd, x) - low) * inverse;
        // Towards zero, so half is added. What is no number (nothing times infinity) is zero.
        let x: S::i32s = (x.min(most) + half).to_int_precise();
        x.store_slice(steps);
    }
    let mut bytes = [0; LEVELS];
    for (byte, steps) in bytes.iter_mut().zip(steps) {
        *byte = steps as u8;
    }
    bytes
}

/// Scores of a strip.
#[inline(always)]
pub(super) fn strip<S: Simd>(simd: S, mut strip: Strip<'_>, mut scratch: &mut [f32]) {
    let (layout, lanes) = (strip.context.layout, S::u8s::LEN);
    let words = layout.words();
    let copies: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, words * LANES));
    let turned: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, words * LANES));
    let copy: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, PIECE * LANES));
    let turned = &mut turned[..words * lanes];
    let mut blocks = strip.blocks();
    while let Some((codes, at)) = blocks.next(lanes, copies) {
        turn(simd, codes, words, turned, copy);
        if !by_fours(simd) {
            for word in turned.chunks_exact_mut(lanes) {
                turn_bytes(simd, word);
            }
        }
        let quads = strip.shaped.chunks_exact(strip.context.quad_len());
        for (quad, out) in quads.zip(strip.out[..strip.rows].chunks_mut(QUAD)) {
            let quad = Quad::new(layout, quad);
            match out {
                [a] => scores(simd, turned, &quad, [&mut a[at.clone()]]),
                [a, b] => scores(simd, turned, &quad, [&mut a[at.clone()], &mut b[at.clone()]]),
                [a, b, c] => {
                    let out = [&mut a[at.clone()], &mut b[at.clone()], &mut c[at.clone()]];
                    scores(simd, turned, &quad, out);
                }
                [a, b, c, d] => {
                    let out =
                        [&mut a[at.clone()], &mut b[at.clone()], &mut c[at.clone()], &mut d[at.clone()]];
                    scores(simd, turned, &quad, out);
                }
                _ => {}
            }
        }
    }
}

/// Whether a shuffle reaches the tables of all four bytes of a word.
#[inline(always)]
fn by_fours<S: Simd>(simd: S) -> bool {
    #[cfg(target_arch = "x86_64")]
    if simd.level().as_avx512().is_some() {
        return S::u8s::LEN == LANES;
    }
    let _ = simd;
    false
}

/// Of each word of a row, that of all rows of a block. What a block that is not full lacks is left over from others.
#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn turn<S: Simd>(simd: S, rows: &[u32], words: usize, turned: &mut [u32], copy: &mut [u32]) {
    let (lanes, vector) = (S::u8s::LEN, S::u32s::LEN);
    for (piece, turned) in turned.chunks_mut(PIECE * lanes).enumerate() {
        let count = turned.len() / lanes;
        let (source, width) = match words {
            1 | 2 | PIECE if rows.len() == words * lanes => (rows, words),
            _ => {
                for (row, copy) in rows.chunks_exact(words).zip(copy.as_chunks_mut::<PIECE>().0) {
                    let row = &row[PIECE * piece..];
                    match row.first_chunk() {
                        Some(whole) => *copy = *whole,
                        None => copy[..count].copy_from_slice(row),
                    }
                }
                (&copy[..PIECE * lanes], PIECE)
            }
        };
        // Four vectors of each word.
        for part in 0..4 {
            let source = &source[part * width * vector..][..width * vector];
            let to = &mut turned[part * vector..];
            match width {
                1 => to[..vector].copy_from_slice(source),
                2 => {
                    let (even, odd) = load(simd, source, 0).deinterleave(load(simd, source, 1));
                    even.store_slice(&mut to[..vector]);
                    odd.store_slice(&mut to[lanes..][..vector]);
                }
                _ => {
                    let words = turn4::<S>(load4(simd, source));
                    for w in 0..count {
                        words[w].store_slice(&mut to[w * lanes..][..vector]);
                    }
                }
            }
        }
    }
}

/// Of each byte of a word, that of all rows of a block, in their place.
#[inline(always)]
fn turn_bytes<S: Simd>(simd: S, word: &mut [u32]) {
    // Bytes 0 of four words, then bytes 1, ….
    let apart: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    let apart = S::u8s::block_splat(u8x16::load_array(simd, apart));
    let [a, b, c, d] = load4(simd, word);
    let (a, b) = (a.swizzle_dyn_within_blocks(apart), b.swizzle_dyn_within_blocks(apart));
    let (c, d) = (c.swizzle_dyn_within_blocks(apart), d.swizzle_dyn_within_blocks(apart));
    let bytes = turn4::<S>([a, b, c, d]);
    for i in 0..4 {
        bytes[i].store_slice(&mut word[i * S::u32s::LEN..][..S::u32s::LEN]);
    }
}

/// Vector `i` of `from`.
#[inline(always)]
fn load<S: Simd>(simd: S, from: &[u32], i: usize) -> S::u32s {
    S::u32s::from_slice(simd, &from[i * S::u32s::LEN..][..S::u32s::LEN])
}

/// The first four vectors of `from`.
#[inline(always)]
fn load4<S: Simd>(simd: S, from: &[u32]) -> [S::u32s; 4] {
    [load(simd, from, 0), load(simd, from, 1), load(simd, from, 2), load(simd, from, 3)]
}

/// Of four vectors, one behind the other, every fourth element from 0, 1, 2 and 3 on.
#[inline(always)]
fn turn4<S: Simd>([a, b, c, d]: [S::u32s; 4]) -> [S::u32s; 4] {
    let ((even, odd), (even2, odd2)) = (a.deinterleave(b), c.deinterleave(d));
    let ((zero, two), (one, three)) = (even.deinterleave(even2), odd.deinterleave(odd2));
    [zero, one, two, three]
}

/// Scores of `C` query rows on a block.
#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn scores<S: Simd, const C: usize>(simd: S, turned: &[u32], quad: &Quad<'_>, out: [&mut [f32]; C]) {
    let vector = S::f32s::LEN;
    let sums: [[S::i32s; 4]; C] = match by_fours(simd) {
        true => sums_by_fours::<S, C>(simd, turned, quad.tables),
        false => sums_by_bytes::<S, C>(simd, turned, quad.tables),
    };
    for (c, out) in out.into_iter().enumerate() {
        let (step, base) = (S::f32s::splat(simd, quad.steps[c]), S::f32s::splat(simd, quad.bases[c]));
        let mut scores = [base; 4];
        for part in 0..4 {
            let sums: S::f32s = sums[c][part].to_float();
            // Not fused, so that every level gives the same.
            scores[part] = sums * step + base;
        }
        if out.len() == 4 * vector {
            for part in 0..4 {
                scores[part].store_slice(&mut out[part * vector..][..vector]);
            }
        } else {
            for (out, scores) in out.chunks_mut(vector).zip(scores) {
                out.copy_from_slice(&scores.as_slice()[..out.len()]);
            }
        }
    }
}

/// Sums of a block that lies by words, which [`by_fours`] must allow.
#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn sums_by_fours<S: Simd, const C: usize>(simd: S, turned: &[u32], tables: &[Tables]) -> [[S::i32s; 4]; C] {
    let (ones, low) = (S::i32s::splat(simd, 0x0101_0101), S::u32s::splat(simd, 0x0f0f_0f0f));
    // The table of byte `i` starts at byte `16 i`.
    let starts = S::u32s::splat(simd, 0x3020_1000);
    let mut sums = [[S::i32s::splat(simd, 0); 4]; C];
    for (word, tables) in turned.chunks_exact(4 * S::u32s::LEN).zip(tables) {
        for part in 0..4 {
            let word = load(simd, word, part);
            let codes = [word & low | starts, word >> 4 & low | starts];
            for n in 0..2 {
                for c in 0..C {
                    let table = S::u8s::from_slice(simd, tables[n][c].as_flattened());
                    let found = table.swizzle_dyn(codes[n].to_bytes()).bitcast();
                    sums[c][part] = dot4(simd, sums[c][part], found, ones);
                }
            }
        }
    }
    sums
}

/// Sums of a block that lies by bytes.
#[allow(
    clippy::needless_range_loop,
    reason = "iterators' closures would be compiled without the level's instructions"
)]
#[inline(always)]
fn sums_by_bytes<S: Simd, const C: usize>(simd: S, turned: &[u32], tables: &[Tables]) -> [[S::i32s; 4]; C] {
    let low = S::u8s::splat(simd, 15);
    // Sums of the bytes of even entries and 256 times those of odd ones, and sums of the latter.
    let (mut all, mut odd) = ([S::u16s::splat(simd, 0); C], [S::u16s::splat(simd, 0); C]);
    for (word, tables) in turned.chunks_exact(4 * S::u32s::LEN).zip(tables) {
        for byte in 0..4 {
            let codes: S::u8s = load(simd, word, byte).bitcast();
            let codes = [codes & low, codes >> 4];
            for n in 0..2 {
                for c in 0..C {
                    let table = S::u8s::block_splat(u8x16::load_array_ref(simd, &tables[n][c][byte]));
                    let found: S::u16s = table.swizzle_dyn_within_blocks(codes[n]).bitcast();
                    all[c] += found;
                    odd[c] += found >> 8;
                }
            }
        }
    }
    let mut sums = [[S::i32s::splat(simd, 0); 4]; C];
    for c in 0..C {
        let (first, second) = (all[c] - (odd[c] << 8)).interleave(odd[c]);
        let ((a, b), (d, e)) = (first.widen(), second.widen());
        // Signed, which every processor converts.
        sums[c] = [a.bitcast(), b.bitcast(), d.bitcast(), e.bitcast()];
    }
    sums
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::backend::{Backend, Cpu};
    use crate::device::Pool;
    use crate::device::page::Side;
    use crate::kernel::attend::Workspace;
    use crate::kernel::code_scores::{CodeArgs, ROUNDED_CODES, range};
    use crate::kernel::simd::Level;
    use crate::testing::Random;
    use crate::testing::cache::{codes, poisoned};
    use crate::view::DType;
    use proptest::prelude::*;

    /// Sums of rounded tables, one entry and one index at a time.
    fn want(layout: CodeLayout, levels: usize, words: &[u32], table: &[f32]) -> f32 {
        let (mut span, mut base) = (0.0f32, 0.0f32);
        for (low, high) in table.chunks_exact(levels).map(range) {
            span = span.max(high - low);
            base += low;
        }
        let step = span / 255.0;
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let sum: u32 = (0..layout.codes)
            .map(|m| {
                let codewords = &table[m * levels..(m + 1) * levels];
                let code = usize::from(layout.code(words, m)).min(levels - 1);
                let steps = ((codewords[code] - range(codewords).0) * inverse).min(255.0);
                assert!((0.0..=255.0).contains(&steps));
                (steps + 0.5) as u32
            })
            .sum();
        assert!(u16::try_from(sum).is_ok(), "sums fit 16 bits");
        sum as f32 * step + base
    }

    fn agrees(layout: CodeLayout, levels: usize, group: usize, rows: usize, capacity: usize, tables: &[f32]) {
        for level in Level::available() {
            let cpu = Cpu::with_pool(Pool::current()).with_level(level);
            if level == Level::Baseline && !cfg!(target_arch = "aarch64") {
                continue;
            }
            let heads = codes(&cpu, rows as u64, layout, &[rows], capacity).unwrap();
            let mut out = poisoned(group * rows);
            let mut args = CodeArgs {
                heads: &heads,
                layout,
                levels,
                tables,
                group,
                tokens: 1,
                spans: None,
                out: &mut out,
            };
            cpu.code_scores(&mut args, &mut Workspace::default()).unwrap();
            let mut key = vec![0.0; layout.words()];
            for page in heads[0].pages() {
                for row in 0..page.rows {
                    page.layout.read_row(page.page, Side::Key, row, &mut key);
                    for (i, table) in tables.chunks_exact(layout.codes * levels).enumerate() {
                        let want = want(layout, levels, bytemuck::cast_slice(&key), table);
                        let got = out[i * rows + page.first + row];
                        assert_eq!(got.to_bits(), want.to_bits(), "row {row} of query {i}: {got}, {want}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn scores_are_the_sums_of_rounded_tables(
            codes in 1usize..70,
            levels in 1usize..=16,
            group in 1usize..7,
            rows in 1usize..200,
            capacity in prop::sample::select(vec![5usize, 16, 64, 100, 256]),
            seed in any::<u64>(),
        ) {
            let layout = CodeLayout { codes, bits: 4 };
            let tables = Random::new(seed).rows(group * codes * levels, 3.0, DType::F32);
            agrees(layout, levels, group, rows, capacity, &tables);
        }
    }

    #[test]
    fn the_largest_sums_fit() {
        let layout = CodeLayout { codes: ROUNDED_CODES, bits: 4 };
        // Every index adds 255, but for the last codeword.
        let tables: Vec<f32> =
            (0..4 * ROUNDED_CODES * 2).map(|i| if i % 2 == 0 { -2.0 } else { 3.0 }).collect();
        agrees(layout, 2, 4, 150, 64, &tables);
        assert!(
            ROUNDED_CODES * 255 <= usize::from(u16::MAX) && (ROUNDED_CODES + 1) * 255 > usize::from(u16::MAX)
        );
    }
}
