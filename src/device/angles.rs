//! Rotary angles of any position out of two short tables.
//!
//! A position is a multiple of 128 and a rest, and rotations compose: cosine and sine of both parts give those of the
//! whole by one complex product. *Helps* where rows of thousands of positions are turned in every step: a sine in double
//! precision takes as long as a hundred multiplications, and a table of all positions as much memory as a layer's keys. *Hurts* by one more rounding, of 1e-7.

use crate::geometry::{Rotary, RotaryLayout};

/// Positions of the fine table.
pub const FINE: usize = 128;

/// Cosines and sines for the positions from 0 to some last one.
#[derive(Clone, Debug)]
pub struct Angles {
    layout: RotaryLayout,
    dims: usize,
    /// `[FINE, dims / 2, 2]`.
    fine: Box<[f32]>,
    /// `[steps, dims / 2, 2]`, of multiples of [`FINE`].
    coarse: Box<[f32]>,
}

impl Angles {
    /// Those of an embedding, up to a position.
    pub fn new(rotary: &Rotary, last: i32) -> Self {
        let steps = last.max(0) / FINE as i32 + 1;
        Self {
            layout: rotary.layout,
            dims: rotary.dims,
            fine: rotary.table(0..FINE as i32).into(),
            coarse: rotary.table((0..steps).map(|step| step * FINE as i32)).into(),
        }
    }

    /// Which dimensions pair up.
    pub fn layout(&self) -> RotaryLayout {
        self.layout
    }

    /// Leading dimensions that turn.
    pub fn dims(&self) -> usize {
        self.dims
    }

    /// The fine table and the coarse one, for backends that turn rows elsewhere.
    pub fn tables(&self) -> [&[f32]; 2] {
        [&self.fine, &self.coarse]
    }

    /// Memory.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.fine) + size_of_val(&*self.coarse)
    }

    /// Turns a row to its position, or `back` from there.
    ///
    /// # Panics
    /// If the position is beyond the last one or negative, or the row shorter than [`Angles::dims`].
    #[inline(always)]
    pub fn turn(&self, position: i32, row: &mut [f32], back: bool) {
        let pairs = self.dims / 2;
        let (step, rest) = (position as usize / FINE, position as usize % FINE);
        let fine = &self.fine[rest * self.dims..][..self.dims];
        let coarse = &self.coarse[step * self.dims..][..self.dims];
        let sign = if back { -1.0 } else { 1.0 };
        let angle = |i: usize| {
            let ([a, b], [c, d]) = ([fine[2 * i], fine[2 * i + 1]], [coarse[2 * i], coarse[2 * i + 1]]);
            (a * c - b * d, sign * (a * d + b * c))
        };
        let row = &mut row[..self.dims];
        match self.layout {
            RotaryLayout::HalfSplit => {
                let (xs, ys) = row.split_at_mut(pairs);
                for (i, (x, y)) in xs.iter_mut().zip(ys).enumerate() {
                    let (cos, sin) = angle(i);
                    (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
                }
            }
            RotaryLayout::Interleaved => {
                for (i, pair) in row.chunks_exact_mut(2).enumerate() {
                    let (cos, sin) = angle(i);
                    (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_tables_are_as_good_as_one() {
        for layout in [RotaryLayout::HalfSplit, RotaryLayout::Interleaved] {
            let rotary = Rotary::new(6, 10_000.0, layout);
            let angles = Angles::new(&rotary, 100_000);
            for position in [0, 1, 127, 128, 4_711, 99_999, 100_000] {
                let mut row = [1.0, -0.5, 0.25, 2.0, 0.0, 1.0, 7.0];
                angles.turn(position, &mut row, false);
                let mut want = [1.0, -0.5, 0.25, 2.0, 0.0, 1.0, 7.0];
                for (i, frequency) in rotary.inverse_frequencies().into_iter().enumerate() {
                    let (a, b) = match layout {
                        RotaryLayout::HalfSplit => (i, i + 3),
                        RotaryLayout::Interleaved => (2 * i, 2 * i + 1),
                    };
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    (want[a], want[b]) = (want[a] * cos - want[b] * sin, want[a] * sin + want[b] * cos);
                }
                for (got, want) in row.iter().zip(want) {
                    assert!((f64::from(*got) - want).abs() < 1e-6, "{layout:?} {position}: {got} {want}");
                }
                angles.turn(position, &mut row, true);
                for (got, want) in row.iter().zip([1.0, -0.5, 0.25, 2.0, 0.0, 1.0, 7.0]) {
                    assert!((got - want).abs() < 1e-6, "{layout:?} {position} and back: {got} {want}");
                }
            }
        }
    }
}
