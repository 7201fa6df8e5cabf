//! Asking for memory before it is needed.
//!
//! Decode reads every page once and computes little on it, and a page is shorter than what a hardware
//! prefetcher needs to run at full speed across page ends. So while one tile is computed the next one is
//! requested, evenly: a core has about 16 requests in flight, and more at once would stop it until they are served, with
//! none left for the time in which it computes. *Helps* contexts beyond the caches. *Hurts* nothing measurable within
//! them: a request for a line that is there costs one load slot.

#![allow(unsafe_code, reason = "the prefetch instruction takes a raw pointer; it never faults")]

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory that will be read next, requested line by line while something else is computed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    /// Where the next line starts.
    at: usize,
    /// Lines requested in so many steps.
    lines: usize,
    steps: usize,
    /// What is due, in parts of a step.
    due: usize,
}

impl<'a> Ahead<'a> {
    /// Nothing.
    pub(crate) const NONE: Self = Self { bytes: &[], at: 0, lines: 0, steps: 1, due: 0 };

    /// All of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, ..Self::NONE }
    }

    /// The same evenly over so many steps.
    #[inline(always)]
    pub(crate) fn over(self, steps: usize) -> Self {
        Self { lines: self.bytes.len().div_ceil(LINE), steps: steps.max(1), ..self }
    }

    /// Takes a step.
    #[inline(always)]
    pub(crate) fn step(&mut self) {
        self.due += self.lines;
        while self.due >= self.steps {
            self.due -= self.steps;
            if let Some(byte) = self.bytes.get(self.at) {
                line(byte);
                self.at += LINE;
            }
        }
    }
}

#[inline(always)]
fn line(byte: &u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // Into the second level, which takes a tile of both sides; the first holds what is computed on.
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program could observe.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(byte).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = byte;
}
