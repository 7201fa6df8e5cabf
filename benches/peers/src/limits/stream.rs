//! Sums of words, as fast as memory delivers them: wide loads into eight accumulators, from one or several
//! places of the buffer in turn, with and without prefetch.
//!
//! *Helps* as the limit that a decode kernel is measured against. *Hurts* nothing; processors differ in which
//! way is best, so all are tried.

#![allow(unsafe_code, reason = "vector loads and prefetch")]

use std::fmt;

/// A cache line.
type Line = [u64; 8];

/// Instructions to load with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loads {
    /// What the compiler makes of plain code.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A way to read. Made by [`Reader::all`] alone, for instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reader {
    loads: Loads,
    /// Places of the part that are read in turn.
    places: usize,
    /// Bytes that prefetch runs ahead; 0 for none.
    ahead: usize,
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.places == 1 { "" } else { "s" };
        write!(f, "{:?}, {} place{plural} per thread", self.loads, self.places)?;
        if self.ahead > 0 { write!(f, ", prefetch {} bytes ahead", self.ahead) } else { Ok(()) }
    }
}

impl Reader {
    /// Every way that works here.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self { loads: Loads::Portable, places: 1, ahead: 0 }];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = std::arch::is_x86_feature_detected!("avx2");
            let avx512 = std::arch::is_x86_feature_detected!("avx512f");
            for (loads, present) in [(Loads::Avx2, avx2), (Loads::Avx512, avx512)] {
                for (places, ahead) in [(1, 0), (1, 1024), (1, 4096), (4, 0), (4, 1024)] {
                    if present {
                        all.push(Self { loads, places, ahead });
                    }
                }
            }
        }
        all
    }

    /// The sum of `part`, modulo 2⁶⁴.
    pub(crate) fn sum(self, part: &[u64]) -> u64 {
        let (lines, rest) = part.as_chunks::<8>();
        let rest = rest.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word));
        let sum = match self.loads {
            Loads::Portable => portable(lines),
            // SAFETY: `all` offers these loads only where the processor has AVX2.
            #[cfg(target_arch = "x86_64")]
            Loads::Avx2 => unsafe {
                match (self.places, self.ahead) {
                    (1, 0) => x86::avx2::<1, 0>(lines),
                    (1, 1024) => x86::avx2::<1, 1024>(lines),
                    (1, _) => x86::avx2::<1, 4096>(lines),
                    (_, 0) => x86::avx2::<4, 0>(lines),
                    _ => x86::avx2::<4, 1024>(lines),
                }
            },
            // SAFETY: `all` offers these loads only where the processor has AVX-512F.
            #[cfg(target_arch = "x86_64")]
            Loads::Avx512 => unsafe {
                match (self.places, self.ahead) {
                    (1, 0) => x86::avx512::<1, 0>(lines),
                    (1, 1024) => x86::avx512::<1, 1024>(lines),
                    (1, _) => x86::avx512::<1, 4096>(lines),
                    (_, 0) => x86::avx512::<4, 0>(lines),
                    _ => x86::avx512::<4, 1024>(lines),
                }
            },
        };
        sum.wrapping_add(rest)
    }
}

fn portable(lines: &[Line]) -> u64 {
    let mut sums = [[0u64; 8]; 4];
    let (blocks, rest) = lines.as_chunks::<4>();
    for block in blocks {
        for (sum, line) in sums.iter_mut().zip(block) {
            sum.iter_mut().zip(line).for_each(|(s, word)| *s = s.wrapping_add(*word));
        }
    }
    sums.as_flattened().iter().chain(rest.as_flattened()).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Line;
    use std::arch::x86_64::*;

    /// Cuts `lines` into `PLACES` equal parts of whole steps, and what is left over.
    fn cut<const PLACES: usize>(lines: &[Line], step: usize) -> ([&[Line]; PLACES], &[Line]) {
        let each = lines.len() / PLACES / step * step;
        (std::array::from_fn(|p| &lines[p * each..(p + 1) * each]), &lines[PLACES * each..])
    }

    fn fetch<const AHEAD: usize>(line: &Line) {
        if AHEAD > 0 {
            let place = line.as_ptr().cast::<i8>().wrapping_add(AHEAD);
            // SAFETY: a prefetch never faults, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place) }
        }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2<const PLACES: usize, const AHEAD: usize>(lines: &[Line]) -> u64 {
        let step = 4 / PLACES;
        let (places, rest) = cut::<PLACES>(lines, step);
        let mut sums = [_mm256_setzero_si256(); 8];
        let mut at = 0;
        while at < places[0].len() {
            for (p, place) in places.iter().enumerate() {
                for (i, line) in place[at..at + step].iter().enumerate() {
                    fetch::<AHEAD>(line);
                    let pointer = line.as_ptr().cast::<__m256i>();
                    // SAFETY: the first half of a line of 64 bytes.
                    let low = unsafe { _mm256_loadu_si256(pointer) };
                    // SAFETY: the second half.
                    let high = unsafe { _mm256_loadu_si256(pointer.wrapping_add(1)) };
                    let sum = 2 * (p * step + i);
                    sums[sum] = _mm256_add_epi64(sums[sum], low);
                    sums[sum + 1] = _mm256_add_epi64(sums[sum + 1], high);
                }
            }
            at += step;
        }
        let mut words = [[0u64; 4]; 8];
        for (words, sum) in words.iter_mut().zip(sums) {
            // SAFETY: four words are 32 bytes.
            unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), sum) }
        }
        words.as_flattened().iter().chain(rest.as_flattened()).fold(0, |a, b| a.wrapping_add(*b))
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512<const PLACES: usize, const AHEAD: usize>(lines: &[Line]) -> u64 {
        let step = 8 / PLACES;
        let (places, rest) = cut::<PLACES>(lines, step);
        let mut sums = [_mm512_setzero_si512(); 8];
        let mut at = 0;
        while at < places[0].len() {
            for (p, place) in places.iter().enumerate() {
                for (i, line) in place[at..at + step].iter().enumerate() {
                    fetch::<AHEAD>(line);
                    // SAFETY: a line is 64 bytes.
                    let line = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
                    sums[p * step + i] = _mm512_add_epi64(sums[p * step + i], line);
                }
            }
            at += step;
        }
        let mut total = _mm512_setzero_si512();
        for sum in sums {
            total = _mm512_add_epi64(total, sum);
        }
        let total = _mm512_reduce_add_epi64(total).cast_unsigned();
        rest.as_flattened().iter().fold(total, |a, b| a.wrapping_add(*b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_reads_every_word_once() {
        for len in [0, 7, 64, 1000, 4099] {
            let words: Vec<u64> = (0..len).map(|i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
            let want = words.iter().fold(0, |a: u64, b| a.wrapping_add(*b));
            for reader in Reader::all() {
                assert_eq!(reader.sum(&words), want, "{reader}, {len} words");
            }
        }
    }
}
