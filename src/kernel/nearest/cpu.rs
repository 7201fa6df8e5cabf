//! A block of keys against a tile of candidates at a time, as one product of matrices.
//!
//! The candidates of a KV head are brought to length 1 and turned into tiles of columns once; entries then come in blocks,
//! which go to the threads. A cosine is summed in the order of the dimensions whatever the block, so threads change no
//! bit. *Helps* as far as multiplication goes: every loaded candidate serves a block. *Hurts* by an `f32` copy of the
//! candidates' keys while a head is at work.

use super::{NearestArgs, dim};
use crate::device::page::{PageRef, Side};
use crate::error::KernelError;
use crate::kernel::simd::gemm::{Matrix, PAD, multiply};
use crate::kernel::simd::math::sum_of_squares;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::weights::largest_with;
use crate::kernel::simd::widen::widen_row;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// Candidates of a tile: with keys of 128 dimensions it fills half of a second cache level of 256 KiB.
const TILE: usize = 256;

/// Entries of a block.
const BLOCK: usize = 32;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (mut nearest, mut cosines) = (&mut *args.nearest, &mut *args.cosines);
    for ((head, from), into) in args.heads.iter().zip(args.from).zip(args.into) {
        let (nearest, cosines) = (take(&mut nearest, from.len()), take(&mut cosines, from.len()));
        if from.is_empty() {
            continue;
        }
        let d = dim(head);
        let sources: Vec<PageRef<'_>> = head.pages().collect();
        let keys = Keys { sources: &sources, d };
        let tiles = dispatch!(exec.token(), simd => keys.tiles(simd, into));
        let tasks = exec.tasks(from.len() * into.len() * d);
        let work = Entries { exec, keys, tiles: &tiles, candidates: into.len(), from, nearest, cosines };
        exec.run(tasks, || work.spread(tasks));
    }
    Ok(())
}

/// The keys of a KV head.
#[derive(Clone, Copy)]
struct Keys<'a> {
    sources: &'a [PageRef<'a>],
    d: usize,
}

impl Keys<'_> {
    /// A key of length 1; zeros stay zeros.
    #[inline(always)]
    fn unit<S: Simd>(self, simd: S, slot: u32, out: &mut [f32]) {
        let source = &self.sources[self.sources.partition_point(|p| p.first + p.rows <= slot as usize)];
        widen_row(simd, source.layout, source.page, Side::Key, slot as usize - source.first, out);
        // Squares of very large or very small numbers are no numbers of single precision.
        let largest = out.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        if largest > 0.0 {
            out.iter_mut().for_each(|x| *x /= largest);
            let norm = sum_of_squares(simd, out).sqrt();
            out.iter_mut().for_each(|x| *x /= norm);
        }
    }

    /// `[tiles, d, TILE]`: keys of length 1 as columns, zeros behind the last.
    #[inline(always)]
    fn tiles<S: Simd>(self, simd: S, slots: &[u32]) -> Vec<f32> {
        let mut tiles = vec![0.0; slots.len().div_ceil(TILE) * self.d * TILE];
        let mut row = vec![0.0; self.d];
        for (tile, slots) in tiles.chunks_exact_mut((self.d * TILE).max(1)).zip(slots.chunks(TILE)) {
            for (column, &slot) in slots.iter().enumerate() {
                self.unit(simd, slot, &mut row);
                for (line, &x) in tile.chunks_exact_mut(TILE).zip(&row) {
                    line[column] = x;
                }
            }
        }
        tiles
    }
}

/// Some entries of one KV head, with their part of the results.
struct Entries<'a> {
    exec: &'a Exec,
    keys: Keys<'a>,
    tiles: &'a [f32],
    candidates: usize,
    from: &'a [u32],
    nearest: &'a mut [u32],
    cosines: &'a mut [f32],
}

impl Split for Entries<'_> {
    fn pieces(&self) -> usize {
        self.from.len().div_ceil(BLOCK)
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (from, rest) = self.from.split_at(at * BLOCK);
        let (nearest, cosines) = (take(&mut self.nearest, from.len()), take(&mut self.cosines, from.len()));
        (Entries { from, nearest, cosines, ..self }, Entries { from: rest, ..self })
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => self.search(simd));
    }
}

impl Entries<'_> {
    #[inline(always)]
    fn search<S: Simd>(self, simd: S) {
        const { assert!(TILE.is_multiple_of(4 * PAD)) };
        let d = self.keys.d;
        let mut rows = vec![0.0; BLOCK * d];
        let mut products = vec![0.0; BLOCK * TILE];
        let out = self.nearest.chunks_mut(BLOCK).zip(self.cosines.chunks_mut(BLOCK));
        for (from, (nearest, cosines)) in self.from.chunks(BLOCK).zip(out) {
            for (&slot, row) in from.iter().zip(rows.chunks_exact_mut(d.max(1))) {
                self.keys.unit(simd, slot, row);
            }
            nearest.fill(0);
            cosines.fill(f32::NEG_INFINITY);
            for (t, tile) in self.tiles.chunks_exact((d * TILE).max(1)).enumerate() {
                let (a, b) = (Matrix { data: &rows[..], stride: d }, Matrix { data: tile, stride: TILE });
                multiply(simd, a, b, &mut products, TILE, (from.len(), d, TILE), false, Ahead::NONE);
                let len = TILE.min(self.candidates - t * TILE);
                let lines = products.chunks_exact(TILE).map(|line| &line[..len]);
                for (line, (nearest, cosine)) in lines.zip(nearest.iter_mut().zip(cosines.iter_mut())) {
                    let best = largest_with(simd, line);
                    if best > *cosine {
                        let at = line.iter().position(|&x| x == best).unwrap_or(0);
                        (*nearest, *cosine) = ((t * TILE + at) as u32, best);
                    }
                }
            }
        }
    }
}
