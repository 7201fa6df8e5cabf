//! Tiles of keys turned: from a row per entry to a row per dimension.
//!
//! *Helps* a product with many query rows, for which a key's dimensions are wanted side by side with other keys'. *Hurts*
//! few query rows, which read keys as they are stored ([`super::dots`]).

use super::gemm::{Lines, PAD};
use super::tile::TILE;
use super::widen::Source;
use fearless_simd::{Simd, SimdBase};

/// Writes keys transposed: dimension `i` of entry `j` of the first `len` to `keys[i * TILE + j]`. Columns up to the
/// next whole vector repeat the last entry, so that a block product may run over them.
#[inline(always)]
pub(super) fn transpose_keys<S: Simd, L: Lines>(
    simd: S,
    stored: L,
    extent: (usize, usize),
    keys: &mut [f32],
) {
    match S::f32s::LEN {
        16 => transpose::<S, L, 16>(simd, stored, extent, keys),
        8 => transpose::<S, L, 8>(simd, stored, extent, keys),
        _ => transpose::<S, L, 4>(simd, stored, extent, keys),
    }
}

#[inline(always)]
fn transpose<S: Simd, L: Lines, const N: usize>(
    simd: S,
    stored: L,
    (d, len): (usize, usize),
    keys: &mut [f32],
) {
    let whole = d - d % N;
    for j in (0..len).step_by(N) {
        let mut rows = [stored.line(j, d); N];
        for (r, row) in rows.iter_mut().enumerate().skip(1) {
            *row = stored.line((j + r).min(len - 1), d);
        }
        for i in (0..whole).step_by(N) {
            let mut block = [S::f32s::splat(simd, 0.0); N];
            for (vector, row) in block.iter_mut().zip(&rows) {
                *vector = row.slice(i..i + N).vector(simd);
            }
            for (c, column) in turn(block).iter().enumerate() {
                column.store_slice(&mut keys[(i + c) * TILE + j..][..N]);
            }
        }
        for (r, row) in rows.iter().enumerate() {
            let mut rest = [0.0f32; PAD];
            let rest = &mut rest[..d - whole];
            row.rest(whole, rest);
            for (i, x) in rest.iter().enumerate() {
                keys[(whole + i) * TILE + j + r] = *x;
            }
        }
    }
}

/// Transposes `N` vectors of `N` elements. Interleaving the first half of the vectors with the second
/// rotates the bits of an element's index by one; after `log2 N` rounds row and column are exchanged.
#[inline(always)]
fn turn<V: SimdBase<S>, S: Simd, const N: usize>(mut rows: [V; N]) -> [V; N] {
    let mut round = 1;
    while round < N {
        let mut next = rows;
        for i in 0..N / 2 {
            (next[2 * i], next[2 * i + 1]) = rows[i].interleave(rows[i + N / 2]);
        }
        rows = next;
        round *= 2;
    }
    rows
}
