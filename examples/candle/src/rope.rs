//! Rotary position embedding in GGUF's interleaved layout, applied in place at explicit positions.
//!
//! *Helps*: angles come from the positions that the cache hands out, so they stay right after entries were evicted;
//! there is no table of a compiled-in length. Cosines and sines are computed once per forward pass (in `f64`: an `f32`
//! angle at position 8,000 is already off in the fourth decimal) and shared by all layers. *Hurts*: it writes into the
//! projection's own buffer, so the tensor must not be used elsewhere (it never is: a matmul just made it).

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;

use crate::error::Result;

/// Rows below which threads cost more than they save.
const PARALLEL_ROWS: usize = 16;

/// How inverse frequencies are stretched for contexts beyond the trained one.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Context multiplier.
        factor: f32,
    },
    /// YaRN: slow pairs divided by `factor`, fast ones kept, a ramp between.
    Yarn {
        /// Context multiplier.
        factor: f32,
        /// Turns over the original context above which a pair is kept.
        beta_fast: f32,
        /// Turns over the original context below which a pair is divided in full.
        beta_slow: f32,
        /// Context of the original training.
        original_context: f32,
    },
    /// One divisor per pair (`rope_freqs.weight`: Llama 3).
    Factors(
        /// The divisors.
        Vec<f32>,
    ),
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Leading dimensions of a head that rotate.
    pub dims: usize,
    /// Base of the frequency series.
    pub base: f32,
    /// Frequency scaling.
    pub scaling: Scaling,
    /// Length factor of rotated vectors (1 except for YaRN).
    pub magnitude: f32,
}

impl Rotary {
    /// Radians per position, one per pair.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let dims = self.dims as f64;
        let base = f64::from(self.base);
        let trained = (0..self.dims / 2).map(|pair| base.powf(-2.0 * pair as f64 / dims));
        match &self.scaling {
            Scaling::None => trained.collect(),
            Scaling::Linear { factor } => trained.map(|f| f / f64::from(*factor)).collect(),
            Scaling::Factors(divisors) => trained.zip(divisors).map(|(f, d)| f / f64::from(*d)).collect(),
            Scaling::Yarn { factor, beta_fast, beta_slow, original_context } => {
                // Index of the pair that makes `turns` turns over the original context.
                let pair_with = |turns: f32| {
                    let wavelength = f64::from(*original_context) / f64::from(turns);
                    dims * (wavelength / std::f64::consts::TAU).ln() / (2.0 * base.ln())
                };
                let first = pair_with(*beta_fast).floor().max(0.0);
                let last = pair_with(*beta_slow).ceil().min(dims - 1.0);
                trained
                    .enumerate()
                    .map(|(pair, f)| {
                        let share = ((pair as f64 - first) / (last - first).max(1e-3)).clamp(0.0, 1.0);
                        f * (1.0 - share) + f / f64::from(*factor) * share
                    })
                    .collect()
            }
        }
    }

    /// Cosines and sines for consecutive positions.
    pub(crate) fn angles(&self, start: i32, count: usize) -> Angles {
        let frequencies = self.inverse_frequencies();
        let magnitude = f64::from(self.magnitude);
        let mut table = Vec::with_capacity(count * frequencies.len());
        for offset in 0..count {
            let position = f64::from(start) + offset as f64;
            for frequency in &frequencies {
                let (sin, cos) = (position * frequency).sin_cos();
                table.push([(cos * magnitude) as f32, (sin * magnitude) as f32]);
            }
        }
        Angles { pairs: frequencies.len(), table }
    }
}

/// `[cos, sin]` per token and pair: what one forward pass rotates by.
#[derive(Debug)]
pub(crate) struct Angles {
    pairs: usize,
    table: Vec<[f32; 2]>,
}

impl Angles {
    /// Rotates the first `heads` heads of every row of a dense `(tokens, width)` tensor, in place.
    pub(crate) fn rotate(&self, rows: &Tensor, heads: usize, head_dim: usize) -> Result<()> {
        Ok(rows.inplace_op1(&Rotate { angles: self, heads, head_dim })?)
    }
}

struct Rotate<'a> {
    angles: &'a Angles,
    heads: usize,
    head_dim: usize,
}

impl InplaceOp1 for Rotate<'_> {
    fn name(&self) -> &'static str {
        "rope-interleaved"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(data) = storage else { candle_core::bail!("rope-interleaved takes f32") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("rope-interleaved takes a dense tensor")
        };
        let (tokens, width) = layout.shape().dims2()?;
        let pairs = self.angles.pairs;
        if self.heads * self.head_dim > width || tokens * pairs != self.angles.table.len() {
            candle_core::bail!("rope-interleaved: {tokens} rows of {width} do not match the angles")
        }
        let rotate_row = |(row, angles): (&mut [f32], &[[f32; 2]])| {
            for head in row.chunks_exact_mut(self.head_dim).take(self.heads) {
                for (pair, [cos, sin]) in head.chunks_exact_mut(2).zip(angles) {
                    let (x, y) = (pair[0], pair[1]);
                    pair[0] = x * cos - y * sin;
                    pair[1] = x * sin + y * cos;
                }
            }
        };
        let rows = &mut data[start..end];
        if tokens < PARALLEL_ROWS {
            rows.chunks_exact_mut(width).zip(self.angles.table.chunks_exact(pairs)).for_each(rotate_row);
        } else {
            rows.par_chunks_exact_mut(width)
                .zip(self.angles.table.par_chunks_exact(pairs))
                .for_each(rotate_row);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn plain(dims: usize) -> Rotary {
        Rotary { dims, base: 10_000.0, scaling: Scaling::None, magnitude: 1.0 }
    }

    #[test]
    fn rotation_turns_neighbouring_pairs_and_leaves_the_rest() {
        let device = Device::Cpu;
        // One token at position 3, two heads of 4 of which 2 dimensions rotate, the second head untouched.
        let rows = Tensor::new(&[[1f32, 0.0, 5.0, 6.0, 1.0, 0.0, 7.0, 8.0]], &device).unwrap();
        plain(2).angles(3, 1).rotate(&rows, 1, 4).unwrap();
        let got = rows.to_vec2::<f32>().unwrap();
        let want = [3f32.cos(), 3f32.sin(), 5.0, 6.0, 1.0, 0.0, 7.0, 8.0];
        for (g, w) in got[0].iter().zip(want) {
            assert!((g - w).abs() < 1e-6, "{got:?}");
        }
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let device = Device::Cpu;
        let dot = |p: i32, q: i32| {
            let a = Tensor::new(&[[0.3f32, -1.2, 0.7, 0.1]], &device).unwrap();
            let b = Tensor::new(&[[1.1f32, 0.4, -0.6, 0.9]], &device).unwrap();
            plain(4).angles(p, 1).rotate(&a, 1, 4).unwrap();
            plain(4).angles(q, 1).rotate(&b, 1, 4).unwrap();
            (a * b).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        assert!((dot(5, 2) - dot(8003, 8000)).abs() < 1e-5);
    }

    #[test]
    fn many_rows_in_parallel_equal_one_at_a_time() {
        let device = Device::Cpu;
        let values: Vec<f32> = (0..40 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        let all = Tensor::from_slice(&values, (40, 8), &device).unwrap();
        plain(4).angles(100, 40).rotate(&all, 2, 4).unwrap();
        let all = all.to_vec2::<f32>().unwrap();
        for (row, want) in all.iter().enumerate() {
            let one = Tensor::from_slice(&values[row * 8..][..8], (1, 8), &device).unwrap();
            plain(4).angles(100 + row as i32, 1).rotate(&one, 2, 4).unwrap();
            assert_eq!(&one.to_vec2::<f32>().unwrap()[0], want);
        }
    }

    #[test]
    fn scaling_rules() {
        let trained = plain(64).inverse_frequencies();
        let scaled = |scaling| Rotary { scaling, ..plain(64) }.inverse_frequencies();
        assert_eq!(scaled(Scaling::Linear { factor: 4.0 })[5], trained[5] / 4.0);
        let mut factors = vec![1.0; 32];
        factors[31] = 8.0;
        let by_factor = scaled(Scaling::Factors(factors));
        assert_eq!((by_factor[0], by_factor[31]), (trained[0], trained[31] / 8.0));
        let yarn =
            scaled(Scaling::Yarn { factor: 4.0, beta_fast: 32.0, beta_slow: 1.0, original_context: 2048.0 });
        assert_eq!(yarn[0], trained[0], "fast pairs are kept");
        assert!((yarn[31] - trained[31] / 4.0).abs() < 1e-12, "slow pairs are interpolated");
        assert!(yarn.windows(2).all(|w| w[0] > w[1]), "the ramp keeps the order");
    }
}
