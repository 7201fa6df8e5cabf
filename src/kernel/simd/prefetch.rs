//! Asking for memory before it is needed.
//!
//! Decode reads every page once and computes little on it, and a page is shorter than what a hardware
//! prefetcher needs to run at full speed across page ends. So while one tile is computed the next one is
//! requested, evenly: a core has about two dozen requests in flight, and more at once would stop it until they are served,
//! with none left for the time in which it computes. It goes to the second cache level: a request into the first one holds
//! one of its few line buffers for the whole way from memory, and loads wait for these. What is requested may lie in one piece, in equal pieces at equal
//! distances (some rows of a packed band) or anywhere (lone rows). *Helps* contexts beyond the caches. *Hurts* nothing
//! measurable within them: a request for a line that is there costs one load slot.

#![allow(unsafe_code, reason = "the prefetch instruction takes a raw pointer; it never faults")]

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory that will be read next, requested line by line while something else is computed.
///
/// A step stands in the innermost loops, so it counts lines of a piece down and looks at nothing else until the piece
/// ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead<'a> {
    /// The next line, and how many are left of its piece. The address is only ever requested.
    at: *const u8,
    left: usize,
    /// Lines of a piece.
    piece: usize,
    /// Pieces left at equal distances, and how far the next one starts behind the end of this.
    pieces: usize,
    gap: usize,
    /// What comes then: as many pieces each.
    more: &'a [&'a [u8]],
    each: usize,
    /// Lines requested in every step; and in `steps` steps, spread evenly, so many besides.
    whole: usize,
    rest: usize,
    steps: usize,
    /// What of the latter is due, in parts of a step.
    due: usize,
}

impl<'a> Ahead<'a> {
    /// Nothing.
    pub(crate) const NONE: Self = Self {
        at: std::ptr::null(),
        left: 0,
        piece: 0,
        pieces: 0,
        gap: 0,
        more: &[],
        each: 0,
        whole: 0,
        rest: 0,
        steps: 1,
        due: 0,
    };

    /// All of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        let lines = bytes.len().div_ceil(LINE);
        Self { at: bytes.as_ptr(), left: lines, piece: lines, ..Self::NONE }
    }

    /// The first `width` of every `pitch` of `bytes`, whole lines both.
    pub(crate) fn pieces(bytes: &'a [u8], width: usize, pitch: usize) -> Self {
        let piece = width.div_ceil(LINE).max(1);
        let pieces = bytes.len().div_ceil(pitch).saturating_sub(1);
        let left = if bytes.is_empty() { 0 } else { piece };
        Self {
            at: bytes.as_ptr(),
            left,
            piece,
            pieces,
            gap: pitch - piece * LINE,
            each: pieces,
            ..Self::NONE
        }
    }

    /// All of every one of `rows`, or the first line of every `pitch` of them. They are equally long.
    pub(crate) fn rows(rows: &'a [&'a [u8]], pitch: Option<usize>) -> Self {
        let Some((&bytes, more)) = rows.split_first() else { return Self::NONE };
        let first = pitch.map_or_else(|| Self::new(bytes), |pitch| Self::pieces(bytes, LINE, pitch));
        Self { more, ..first }
    }

    /// How many lines.
    fn lines(&self) -> usize {
        self.left + self.piece * (self.pieces + self.more.len() * (self.each + 1))
    }

    /// The same evenly over so many steps.
    #[inline(always)]
    pub(crate) fn over(self, steps: usize) -> Self {
        let (lines, steps) = (self.lines(), steps.max(1));
        Self { whole: lines / steps, rest: lines % steps, steps, due: 0, ..self }
    }

    /// Requests everything at once.
    #[inline(always)]
    pub(crate) fn all(self) {
        self.over(1).step();
    }

    /// Takes a step.
    #[inline(always)]
    pub(crate) fn step(&mut self) {
        self.due += self.rest;
        let extra = self.due >= self.steps;
        self.due -= if extra { self.steps } else { 0 };
        for _ in 0..self.whole + usize::from(extra) {
            if self.left == 0 && !self.turn() {
                return;
            }
            line(self.at);
            self.at = self.at.wrapping_add(LINE);
            self.left -= 1;
        }
    }

    /// Goes on to the next piece; whether there is one.
    #[inline(always)]
    fn turn(&mut self) -> bool {
        if self.pieces > 0 {
            self.pieces -= 1;
            self.at = self.at.wrapping_add(self.gap);
        } else if let Some((&next, more)) = self.more.split_first() {
            (self.at, self.more, self.pieces) = (next.as_ptr(), more, self.each);
        } else {
            return false;
        }
        self.left = self.piece;
        true
    }
}

/// Requests the line that a value starts in, at once.
#[inline(always)]
pub(crate) fn request<T>(value: &T) {
    line(std::ptr::from_ref(value).cast());
}

#[inline(always)]
fn line(byte: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // Into the second level, see the module.
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program could observe.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(byte.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = byte;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is requested over so many steps, as distances from `base`.
    fn requested(mut ahead: Ahead<'_>, base: &[u8], steps: usize) -> Vec<usize> {
        let (mut places, all) = (Vec::new(), ahead.lines());
        ahead = ahead.over(steps);
        let mut left = all;
        for _ in 0..steps {
            // A step of several lines is taken as as many steps of one, which request the same.
            let mut single = ahead.over(ahead.lines());
            ahead.step();
            while single.lines() > ahead.lines() {
                single.step();
                places.push(single.at.addr() - LINE - base.as_ptr().addr());
            }
            assert!(left - ahead.lines() <= all.div_ceil(steps), "no more at once than is even");
            left = ahead.lines();
        }
        places
    }

    #[test]
    fn every_line_is_requested_once_and_evenly() {
        let memory = vec![0u8; 40 * LINE];
        let rows = [&memory[..2 * LINE], &memory[5 * LINE..7 * LINE], &memory[3 * LINE..5 * LINE]];
        let wide = [&memory[..8 * LINE], &memory[16 * LINE..24 * LINE]];
        for steps in [1, 2, 3, 5, 6, 7, 40, 100] {
            let lines = |ahead| {
                let places = requested(ahead, &memory, steps);
                places.iter().map(|place| place / LINE).collect::<Vec<_>>()
            };
            assert_eq!(lines(Ahead::new(&memory[..5 * LINE - 1])), [0, 1, 2, 3, 4]);
            assert_eq!(lines(Ahead::pieces(&memory[..12 * LINE], 2 * LINE, 5 * LINE)), [0, 1, 5, 6, 10, 11]);
            assert_eq!(lines(Ahead::rows(&rows, None)), [0, 1, 5, 6, 3, 4]);
            assert_eq!(lines(Ahead::rows(&wide, Some(4 * LINE))), [0, 4, 16, 20]);
            for nothing in [Ahead::NONE, Ahead::new(&[]), Ahead::pieces(&[], 8, LINE), Ahead::rows(&[], None)]
            {
                assert_eq!(lines(nothing), [0usize; 0]);
            }
        }
    }
}
