//! Asking for memory before it is needed.
//!
//! Decode reads every page once and computes little on it, and a page is shorter than what a hardware
//! prefetcher needs to run at full speed across page ends. So while one tile is computed the next one is
//! requested, evenly: a core has about 16 requests in flight, and more at once would stop it until they are served, with
//! none left for the time in which it computes. What is requested may lie in one piece, in equal pieces at equal
//! distances (some rows of a packed band) or anywhere (lone rows). *Helps* contexts beyond the caches. *Hurts* nothing
//! measurable within them: a request for a line that is there costs one load slot.

#![allow(unsafe_code, reason = "the prefetch instruction takes a raw pointer; it never faults")]

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory that will be read next, requested line by line while something else is computed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    /// Where the next line starts.
    at: usize,
    /// Lines before the next gap, lines between two gaps, and bytes of a gap.
    left: usize,
    piece: usize,
    gap: usize,
    /// What comes when these bytes end.
    more: &'a [&'a [u8]],
    /// All lines.
    all: usize,
    /// Lines requested in so many steps.
    lines: usize,
    steps: usize,
    /// What is due, in parts of a step.
    due: usize,
}

impl<'a> Ahead<'a> {
    /// Nothing.
    pub(crate) const NONE: Self = Self {
        bytes: &[],
        at: 0,
        left: usize::MAX,
        piece: usize::MAX,
        gap: 0,
        more: &[],
        all: 0,
        lines: 0,
        steps: 1,
        due: 0,
    };

    /// All of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, all: bytes.len().div_ceil(LINE), ..Self::NONE }
    }

    /// The first `width` of every `pitch` of `bytes`, whole lines both.
    pub(crate) fn pieces(bytes: &'a [u8], width: usize, pitch: usize) -> Self {
        let piece = width.div_ceil(LINE).max(1);
        let all = bytes.len().div_ceil(pitch) * piece;
        Self { bytes, left: piece, piece, gap: pitch - piece * LINE, all, ..Self::NONE }
    }

    /// All of every one of `rows`, or the first line of every `pitch` of them.
    pub(crate) fn rows(rows: &'a [&'a [u8]], pitch: Option<usize>) -> Self {
        let Some((&bytes, more)) = rows.split_first() else { return Self::NONE };
        let first = pitch.map_or_else(|| Self::new(bytes), |pitch| Self::pieces(bytes, LINE, pitch));
        Self { more, all: rows.len() * first.all, ..first }
    }

    /// The same evenly over so many steps.
    #[inline(always)]
    pub(crate) fn over(self, steps: usize) -> Self {
        Self { lines: self.all, steps: steps.max(1), ..self }
    }

    /// Requests everything at once.
    #[inline(always)]
    pub(crate) fn all(self) {
        self.over(1).step();
    }

    /// Takes a step.
    #[inline(always)]
    pub(crate) fn step(&mut self) {
        self.due += self.lines;
        while self.due >= self.steps {
            self.due -= self.steps;
            if self.at >= self.bytes.len()
                && let Some((&next, more)) = self.more.split_first()
            {
                (self.bytes, self.more, self.at, self.left) = (next, more, 0, self.piece);
            }
            if let Some(byte) = self.bytes.get(self.at) {
                line(std::ptr::from_ref(byte));
                self.at += LINE;
                self.left -= 1;
                if self.left == 0 {
                    self.at += self.gap;
                    self.left = self.piece;
                }
            }
        }
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
        // Into the second level, which takes some tiles of both sides; the first holds what is computed on.
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program could observe.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(byte.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = byte;
}
