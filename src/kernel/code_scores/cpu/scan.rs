//! Codes of 4 bits, looked up in registers (André et al. 2015, and FAISS' fast scan).
//!
//! A table of a sub-quantiser, rounded to bytes, is as long as a block of a vector, so that one shuffle looks up as many
//! entries as a vector has bytes. For that the bytes of the entries have to lie by place instead of by entry:
//!
//! ```text
//! page     | entry 0: byte 0, 1, … | entry 1: byte 0, 1, … | …
//! planes   | byte 0 of entries 0, 1, … | byte 1 of entries 0, 1, … | …
//! ```
//! A block of entries is turned once for all query rows; then a plane serves up to four rows, two shuffles each. Bytes are
//! summed in lanes of 16 bits: the whole lane, and its upper byte again, whose sum is taken off the first at the end.
//!
//! *Helps* by about eight times over [`super::lookup`]. *Hurts* the last digits: see the tolerance in [`super::super`].

use super::{QUAD, Strip};
use crate::kernel::code_scores::{CodeLayout, range};
use crate::kernel::simd::take;
use fearless_simd::prelude::*;
use fearless_simd::{Simd, SimdBase, u8x16};

/// Most entries of a block: the bytes of the widest vector.
const LANES: usize = 64;

/// Words of a row that are turned at once.
const PIECE: usize = 4;

/// Numbers of a table.
const LEVELS: usize = 16;

/// Tables of a plane: two codes of four rows.
type Tables = [[[u8; LEVELS]; QUAD]; 2];

/// Planes with a code in them.
fn planes(layout: CodeLayout) -> usize {
    layout.codes.div_ceil(2)
}

/// Floats of the tables of four query rows: those of the planes, and of each row step and sum of the minimums.
pub(super) fn quad_len(layout: CodeLayout) -> usize {
    planes(layout) * size_of::<Tables>() / 4 + 2 * QUAD
}

/// Planes of a block, and two pieces of it on the way there.
pub(super) fn scratch_len(layout: CodeLayout) -> usize {
    (layout.words() + 2 * PIECE) * LANES
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
        let (tables, rest) = quad.split_at(planes(layout) * size_of::<Tables>() / 4);
        Self { tables: bytemuck::cast_slice(tables), steps: &rest[..QUAD], bases: &rest[QUAD..2 * QUAD] }
    }
}

/// Rounds the tables of up to four query rows to bytes.
#[inline(always)]
pub(super) fn round<S: Simd>(_: S, layout: CodeLayout, levels: usize, tables: &[f32], quad: &mut [f32]) {
    let (bytes, rest) = quad.split_at_mut(planes(layout) * size_of::<Tables>() / 4);
    let bytes: &mut [Tables] = bytemuck::cast_slice_mut(bytes);
    // The second code of the last plane may be none: it counts nothing.
    bytes.fill([[[0; LEVELS]; QUAD]; 2]);
    for (c, table) in tables.chunks_exact(layout.codes * levels).enumerate() {
        let (mut span, mut base) = (0.0f32, 0.0f32);
        for codewords in table.chunks_exact(levels) {
            let (low, high) = range(codewords);
            span = span.max(high - low);
            base += low;
        }
        let step = span / 255.0;
        // Of equal numbers nothing but the minimum is left.
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        (rest[c], rest[QUAD + c]) = (step, base);
        for (m, codewords) in table.chunks_exact(levels).enumerate() {
            bytes[m / 2][m % 2][c] = rounded(codewords, inverse);
        }
    }
}

/// A table in steps above its minimum; codes it does not have are its last.
#[inline(always)]
fn rounded(codewords: &[f32], inverse: f32) -> [u8; LEVELS] {
    let mut all = [codewords[codewords.len() - 1]; LEVELS];
    all[..codewords.len()].copy_from_slice(codewords);
    let (low, _) = range(&all);
    // Towards zero, so half is added; beyond 255 there is 255.
    all.map(|x| ((x - low) * inverse + 0.5) as u8)
}

/// Scores of a strip.
#[inline(always)]
pub(super) fn strip<S: Simd>(simd: S, mut strip: Strip<'_>, mut scratch: &mut [f32]) {
    let (layout, lanes) = (strip.context.layout, S::u8s::LEN);
    let words = layout.words();
    let turned: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, words * LANES));
    let pieces: &mut [u32] = bytemuck::cast_slice_mut(take(&mut scratch, 2 * PIECE * LANES));
    let turned = &mut turned[..words * lanes];
    for (page, codes, start) in strip.pages() {
        for from in (0..page.rows).step_by(lanes) {
            let len = lanes.min(page.rows - from);
            turn(simd, &codes[from * words..(from + len) * words], words, turned, pieces);
            let at = start + from..start + from + len;
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
}

/// The planes of a block: of each byte of a row, that of all rows. What a block that is not full lacks is left over from
/// others.
#[inline(always)]
fn turn<S: Simd>(simd: S, rows: &[u32], words: usize, planes: &mut [u32], pieces: &mut [u32]) {
    let (lanes, vector) = (S::u8s::LEN, S::u32s::LEN);
    let (copy, by_word) = pieces.split_at_mut(PIECE * LANES);
    // Bytes 0 of four words, then bytes 1, ….
    let apart: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    let apart = S::u8s::block_splat(u8x16::load_array(simd, apart));
    for (piece, planes) in planes.chunks_mut(PIECE * lanes).enumerate() {
        let count = planes.len() / lanes;
        let (source, width) = match words {
            1 | 2 | PIECE if rows.len() == words * lanes => (rows, words),
            _ => {
                for (row, copy) in rows.chunks_exact(words).zip(copy.chunks_exact_mut(PIECE)) {
                    copy[..count].copy_from_slice(&row[PIECE * piece..][..count]);
                }
                (&copy[..PIECE * lanes], PIECE)
            }
        };
        // The words of the rows by place: four vectors of each.
        for part in 0..4 {
            let source = &source[part * width * vector..][..width * vector];
            let load = |i: usize| S::u32s::from_slice(simd, &source[i * vector..][..vector]);
            let mut store = |i: usize, x: S::u32s| {
                x.store_slice(&mut by_word[i * lanes + part * vector..][..vector]);
            };
            match width {
                1 => store(0, load(0)),
                2 => {
                    let (even, odd) = load(0).deinterleave(load(1));
                    store(0, even);
                    store(1, odd);
                }
                _ => {
                    let turned = turn4::<S>([load(0), load(1), load(2), load(3)]);
                    store(0, turned[0]);
                    store(1, turned[1]);
                    store(2, turned[2]);
                    store(3, turned[3]);
                }
            }
        }
        // And of each word its bytes.
        for (word, planes) in by_word.chunks_exact(lanes).zip(planes.chunks_exact_mut(lanes)) {
            let load = |i: usize| {
                let words = S::u32s::from_slice(simd, &word[i * vector..][..vector]);
                words.swizzle_dyn_within_blocks(apart)
            };
            let turned = turn4::<S>([load(0), load(1), load(2), load(3)]);
            for i in 0..4 {
                turned[i].store_slice(&mut planes[i * vector..][..vector]);
            }
        }
    }
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
fn scores<S: Simd, const C: usize>(simd: S, planes: &[u32], quad: &Quad<'_>, out: [&mut [f32]; C]) {
    let (vector, low) = (S::u32s::LEN, S::u8s::splat(simd, 15));
    // Sums of the bytes of even entries and 256 times those of odd ones, and sums of the latter.
    let (mut all, mut odd) = ([S::u16s::splat(simd, 0); C], [S::u16s::splat(simd, 0); C]);
    for (plane, tables) in planes.chunks_exact(vector).zip(quad.tables) {
        let codes: S::u8s = S::u32s::from_slice(simd, plane).bitcast();
        let codes = [codes & low, codes >> 4];
        for n in 0..2 {
            for c in 0..C {
                let table = S::u8s::block_splat(u8x16::load_array_ref(simd, &tables[n][c]));
                let found: S::u16s = table.swizzle_dyn_within_blocks(codes[n]).bitcast();
                all[c] += found;
                odd[c] += found >> 8;
            }
        }
    }
    for (c, out) in out.into_iter().enumerate() {
        let (step, base) = (S::f32s::splat(simd, quad.steps[c]), S::f32s::splat(simd, quad.bases[c]));
        let (first, second) = (all[c] - (odd[c] << 8)).interleave(odd[c]);
        let ((a, b), (d, e)) = (first.widen(), second.widen());
        let sums = [a, b, d, e];
        for part in 0..4 {
            // Signed, which every processor converts.
            let sums: S::i32s = sums[part].bitcast();
            let sums: S::f32s = sums.to_float();
            // Not fused, so that every level gives the same.
            let score = sums * step + base;
            let from = (part * vector).min(out.len());
            let room = vector.min(out.len() - from);
            let out = &mut out[from..from + room];
            if room == vector {
                score.store_slice(out);
            } else {
                out.copy_from_slice(&score.as_slice()[..room]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::backend::{Backend, Cpu};
    use crate::device::Pool;
    use crate::device::page::Side;
    use crate::kernel::attend::Workspace;
    use crate::kernel::code_scores::{CodeArgs, ROUNDED_CODES};
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
                let steps = ((codewords[code] - range(codewords).0) * inverse).round();
                assert!((0.0..=255.0).contains(&steps));
                steps as u32
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
            let mut args =
                CodeArgs { heads: &heads, layout, levels, tables, group, tokens: 1, out: &mut out };
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
