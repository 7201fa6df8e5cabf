//! Scores of entries by their product-quantisation codes, through lookup tables: how an index ranks entries by a few
//! bytes each.
//!
//! The code of an entry is `M` indices, each naming a codeword of one sub-quantiser (Jégou et al. 2011). For a query row
//! the caller tabulates what each codeword is worth; the score of an entry is a sum of `M` looked-up numbers, and its key
//! is never read ("asymmetric distance"):
//!
//! `x[h,i,j] = Σ_m tables[h,i,m,code[j,m]]`
//!
//! With [`CodeArgs::spans`] only the entries named there are scored, and the result holds no others: the second stage of
//! a cascade asks for few of many. There is no mask, as in [`super::dot_scores`]. An index at or above `levels` counts as `levels − 1`, and bits of a row
//! behind its last index count for nothing, so that no content of a page leads outside a table.
//!
//! *Helps* retrieval that ranks every entry: 32 indices of 4 bits are 16 bytes, a sixteenth of a key of 128 halves.
//! *Hurts* where a query row is used for few entries: its table has to be made first.
//!
//! # Tolerance
//! An implementation may round tables of 4-bit codes to bytes with one step per query row, as 4-bit fast scan does (André
//! et al. 2015): `a = max_m (max − min of table m) / 255`, so that no looked-up number is off by more than `a / 2` and no
//! score by more than `M · a / 2`. Otherwise, and on top, sums round. [`tolerance`] is both; ranking by the scores of one
//! row is off by twice that at most. Sums that leave the range of `f32` are unspecified.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::{Spans, expect_len};
use crate::device::HeadRows;
use crate::device::page::PageLayout;
use crate::error::KernelError;
use crate::view::DType;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "code_scores";

/// Most indices of a code whose tables may be rounded to bytes: sums of as many fit 16 bits.
pub const ROUNDED_CODES: usize = 257;

/// How far apart two sums of the same numbers may be, per number and relative to their sizes.
const ROUNDING: f64 = f32::EPSILON as f64;

/// The code of an entry: `codes` indices of `bits` bits each, in words of 32 bits, lowest bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeLayout {
    /// Indices, `M`.
    pub codes: usize,
    /// Bits of an index: 4, 8 or 16.
    pub bits: usize,
}

impl CodeLayout {
    /// Words of a code.
    pub fn words(self) -> usize {
        (self.codes * self.bits).div_ceil(32)
    }

    /// Pages of codes: keys are the words, carried as the bits of `f32`, and there are no values.
    pub fn page(self, capacity: usize, mirrored: bool, column_words: usize) -> PageLayout {
        let (k, v) = (DType::F32.into(), DType::F32.into());
        PageLayout { capacity, d_k: self.words(), d_v: 0, k, v, mirrored, column_words, steady: true }
    }

    /// Index `m` of the code in `words`.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn code(self, words: &[u32], m: usize) -> u16 {
        let (word, shift) = self.place(m);
        (words[word] >> shift) as u16 & self.mask()
    }

    /// Writes a code. Of an index only the lowest bits count, as many as it has.
    ///
    /// # Panics
    /// If there are not `codes` indices or not [`CodeLayout::words`] words.
    pub fn pack(self, codes: &[u16], words: &mut [u32]) {
        assert_eq!((codes.len(), words.len()), (self.codes, self.words()), "the length of a code");
        words.fill(0);
        for (m, code) in codes.iter().enumerate() {
            let (word, shift) = self.place(m);
            words[word] |= u32::from(code & self.mask()) << shift;
        }
    }

    /// Reads a code.
    ///
    /// # Panics
    /// If there are not `codes` indices or not [`CodeLayout::words`] words.
    pub fn unpack(self, words: &[u32], codes: &mut [u16]) {
        assert_eq!((codes.len(), words.len()), (self.codes, self.words()), "the length of a code");
        codes.iter_mut().enumerate().for_each(|(m, code)| *code = self.code(words, m));
    }

    /// Word and lowest bit of index `m`. No index lies in two words.
    fn place(self, m: usize) -> (usize, usize) {
        (m * self.bits / 32, m * self.bits % 32)
    }

    /// The bits of an index.
    fn mask(self) -> u16 {
        u16::MAX >> (16 - self.bits)
    }

    /// Whether tables may be rounded to bytes.
    fn rounded(self) -> bool {
        self.bits == 4 && self.codes <= ROUNDED_CODES
    }
}

/// The tables of the queries of one sequence, on the codes of one layer.
#[derive(Debug)]
pub struct CodeArgs<'a> {
    /// The KV heads' codes, in pages such as [`CodeLayout::page`]. Values are not read.
    pub heads: &'a [HeadRows],
    /// Of a code.
    pub layout: CodeLayout,
    /// Codewords of a sub-quantiser, `2^bits` at most.
    pub levels: usize,
    /// `[Hq, T, M, levels]`, finite.
    pub tables: &'a [f32],
    /// Query heads per KV head, `G`.
    pub group: usize,
    /// `T`.
    pub tokens: usize,
    /// Of each KV head, the only entries to score; `None` scores all.
    pub spans: Option<&'a [Spans]>,
    /// Overwritten: for each KV head in turn `[G, T, entries]`, those of spans in their order.
    pub out: &'a mut [f32],
}

impl CodeArgs<'_> {
    /// Entries of a KV head to score.
    pub fn entries(&self, head: usize) -> usize {
        self.spans.map_or_else(|| self.heads[head].rows(), |spans| spans[head].rows())
    }

    /// Checks every argument against the contract.
    ///
    /// # Errors
    /// [`KernelError::Layout`] for pages of something else, [`KernelError::Length`] names the buffer,
    /// [`KernelError::NotFinite`] the query row whose tables hold a NaN or an infinity.
    pub fn validate(&self) -> Result<(), KernelError> {
        let (CodeLayout { codes, bits }, levels) = (self.layout, self.levels);
        let refused = |problem| Err(KernelError::Layout { kernel: NAME, problem });
        if codes == 0 || !matches!(bits, 4 | 8 | 16) {
            return refused("a code has at least one index, of 4, 8 or 16 bits");
        }
        let stored = |l: &PageLayout| l.k.exact() == Some(DType::F32) && l.d_k == self.layout.words();
        if !self.heads.iter().flat_map(|h| &h.segments).all(|s| stored(&s.layout)) {
            return refused("codes are keys stored as f32, with as many elements as a code has words");
        }
        if !(1..=1 << bits).contains(&levels) {
            return Err(KernelError::Length { kernel: NAME, buffer: "levels", got: levels, want: 1 << bits });
        }
        if let Some(spans) = self.spans {
            Spans::validate(NAME, spans, self.heads)?;
        }
        let rows = self.group * self.tokens;
        expect_len(NAME, "tables", self.tables.len(), self.heads.len() * rows * codes * levels)?;
        let entries: usize = (0..self.heads.len()).map(|h| self.entries(h)).sum();
        expect_len(NAME, "out", self.out.len(), rows * entries)?;
        match self.tables.chunks_exact(codes * levels).position(|table| !finite(table)) {
            Some(row) => Err(KernelError::NotFinite { kernel: NAME, buffer: "tables", row }),
            None => Ok(()),
        }
    }
}

/// Whether all are. By their bits, because a comparison of each would end the loop, and that is no work for vectors.
fn finite(values: &[f32]) -> bool {
    values.iter().fold(0, |most, x| x.abs().to_bits().max(most)) < f32::INFINITY.to_bits()
}

/// By how much a score of a query row may be off, given its `table`, `[M, levels]`. See the [module](self).
pub fn tolerance(layout: CodeLayout, levels: usize, table: &[f32]) -> f64 {
    let (mut span, mut size) = (0.0f64, 0.0f64);
    for codewords in table.chunks_exact(levels) {
        let (low, high) = range(codewords);
        span = span.max(f64::from(high) - f64::from(low));
        size += f64::from(high.abs().max(low.abs()));
    }
    let codes = layout.codes as f64;
    let rounded = if layout.rounded() { codes * span / 255.0 / 2.0 } else { 0.0 };
    // Steps of tables of subnormal numbers may be flushed to zero.
    rounded + (codes + 8.0) * (ROUNDING * size + 255.0 * f64::from(f32::MIN_POSITIVE))
}

/// The least and the largest.
fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)))
}

/// Query rows that are looked up together.
const QUAD: usize = 4;

/// The tables of up to four query rows side by side, `[M · levels][4]`: one load finds the numbers of all of them. Rows
/// that are missing are zeros.
fn interleave(tables: &[f32], row: usize, out: &mut [[f32; QUAD]]) {
    out.fill([0.0; QUAD]);
    for (c, table) in tables.chunks_exact(row).enumerate() {
        out.iter_mut().zip(table).for_each(|(out, &x)| out[c] = x);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn codes_come_back_and_fill_the_lowest_bits_first(
            bits in prop::sample::select(vec![4usize, 8, 16]),
            codes in prop::collection::vec(any::<u16>(), 1..70),
        ) {
            let layout = CodeLayout { codes: codes.len(), bits };
            let mut words = vec![u32::MAX; layout.words()];
            layout.pack(&codes, &mut words);
            let mut back = vec![0; codes.len()];
            layout.unpack(&words, &mut back);
            let mask = ((1u32 << bits) - 1) as u16;
            prop_assert!(codes.iter().zip(&back).all(|(a, b)| a & mask == *b));
            // As one number of `M · bits` bits would lie.
            for (m, &code) in back.iter().enumerate() {
                let bit = m * bits;
                let found = u64::from(words[bit / 32]) >> (bit % 32);
                prop_assert_eq!(found as u16 & mask, code);
            }
            let used = codes.len() * bits;
            prop_assert!(used % 32 == 0 || words[used / 32] >> (used % 32) == 0, "padding is zero");
        }
    }

    #[test]
    fn what_is_not_finite_is_seen() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xff80_0001)] {
            let mut values = [1.0f32; 37];
            assert!(finite(&values));
            values[36] = bad;
            assert!(!finite(&values), "{bad}");
        }
        assert!(finite(&[f32::MAX, f32::MIN, -0.0, 1e-45]));
    }

    #[test]
    fn missing_rows_are_zeros() {
        let mut out = [[9.0; QUAD]; 3];
        interleave(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, &mut out);
        assert_eq!(out, [[1.0, 4.0, 0.0, 0.0], [2.0, 5.0, 0.0, 0.0], [3.0, 6.0, 0.0, 0.0]]);
    }
}
