//! Weights as bytes with a scale and an offset per 32: what a decode step multiplies by.
//!
//! One token needs every weight once, so a decode step is as slow as its weights are many bytes. The block formats
//! `Q4_0`, `Q4_1` and `Q8_0` all mean `scale * code + offset` with an integer code, hence
//!
//! ```text
//! Σ (scale c_i + offset) x_i  =  scale Σ c_i x_i  +  offset Σ x_i
//! ```
//!
//! per block, exactly the dequantized product up to the order of sums, and `Σ x_i` is shared by all outputs.
//!
//! *Helps*: 1.25 bytes a weight instead of 4, and activations stay `f32` (candle's own quantized product rounds them to 8
//! bits). *Hurts*: it is a copy beside the dense `f32` weights that prefill uses; other formats decode through those.

use candle_core::quantized::{GgmlDType, QTensor};
use fearless_simd::{Level, dispatch};
use rayon::prelude::*;

use crate::error::Result;

/// Weights per block of every format handled here.
const BLOCK: usize = 32;

/// Weights that one task of the thread pool handles: some 20 µs of work, enough to pay for the hand-over.
const TASK_WEIGHTS: usize = 128 << 10;

/// A matrix in blocks, row by row.
pub(crate) struct Blocks {
    inputs: usize,
    codes: Vec<[u8; BLOCK]>,
    /// `[scale, offset]` of each block.
    affine: Vec<[f32; 2]>,
}

// A dump of a hundred million codes helps nobody.
impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blocks").field("inputs", &self.inputs).field("blocks", &self.codes.len()).finish()
    }
}

impl Blocks {
    /// Stacks matrices of equal width; `None` if one is in a format that is not handled.
    pub(crate) fn stack(parts: &[QTensor]) -> Result<Option<Self>> {
        let Some(inputs) = parts.first().and_then(|part| part.shape().dims().last().copied()) else {
            return Ok(None);
        };
        let mut blocks = Self { inputs, codes: Vec::new(), affine: Vec::new() };
        for part in parts {
            let data = part.data()?;
            match part.dtype() {
                GgmlDType::Q4_1 => {
                    for b in data.chunks_exact(20) {
                        blocks.push_nibbles(&b[4..], half(b), half(&b[2..]));
                    }
                }
                GgmlDType::Q4_0 => {
                    for b in data.chunks_exact(18) {
                        blocks.push_nibbles(&b[2..], half(b), -8.0 * half(b));
                    }
                }
                GgmlDType::Q8_0 => {
                    for b in data.chunks_exact(34) {
                        // Signed codes become unsigned by adding 128, which the offset takes back.
                        let mut codes = [0; BLOCK];
                        codes.iter_mut().zip(&b[2..]).for_each(|(code, byte)| *code = byte ^ 0x80);
                        blocks.push(codes, half(b), -128.0 * half(b));
                    }
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(blocks))
    }

    /// Sixteen bytes whose low halves are the first sixteen codes and whose high halves the others.
    fn push_nibbles(&mut self, bytes: &[u8], scale: f32, offset: f32) {
        let mut codes = [0; BLOCK];
        let (low, high) = codes.split_at_mut(BLOCK / 2);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            (*low, *high) = (byte & 0x0F, byte >> 4);
        }
        self.push(codes, scale, offset);
    }

    fn push(&mut self, codes: [u8; BLOCK], scale: f32, offset: f32) {
        self.codes.push(codes);
        self.affine.push([scale, offset]);
    }

    /// Multiplies `rows` rows of `x`; the result is output-major, `[outputs][rows]`.
    pub(crate) fn multiply(&self, x: &[f32], rows: usize) -> Vec<f32> {
        let per_row = self.inputs / BLOCK;
        let (x, _) = x.as_chunks::<BLOCK>();
        let sums: Vec<f32> = x.iter().map(|block| block.iter().sum()).collect();
        let mut out = vec![0f32; self.codes.len() / per_row * rows];
        let at_once = (TASK_WEIGHTS / self.inputs).max(1);
        let tasks = self.codes.par_chunks(at_once * per_row).zip(self.affine.par_chunks(at_once * per_row));
        let level = Level::new();
        out.par_chunks_mut(at_once * rows).zip(tasks).for_each(|(out, (codes, affine))| {
            dispatch!(level, _simd => task(out, codes, affine, x, &sums, rows));
        });
        out
    }
}

/// A run of outputs. Compiled once per instruction set by `dispatch!`, hence inlined always, all the way down: plain
/// loops become vector code for the set at hand, while the crate as a whole still runs on any CPU.
#[inline(always)]
fn task(
    out: &mut [f32],
    codes: &[[u8; BLOCK]],
    affine: &[[f32; 2]],
    x: &[[f32; BLOCK]],
    sums: &[f32],
    rows: usize,
) {
    let per_row = x.len() / rows;
    let weights = codes.chunks_exact(per_row).zip(affine.chunks_exact(per_row));
    for (out, (codes, affine)) in out.chunks_exact_mut(rows).zip(weights) {
        let inputs = x.chunks_exact(per_row).zip(sums.chunks_exact(per_row));
        for (out, (x, sums)) in out.iter_mut().zip(inputs) {
            *out = dot(codes, affine, x, sums);
        }
    }
}

/// Partial sums per output: one AVX-512 register, two of AVX2, four of SSE or NEON.
const LANES: usize = 16;

#[inline(always)]
fn dot(codes: &[[u8; BLOCK]], affine: &[[f32; 2]], x: &[[f32; BLOCK]], sums: &[f32]) -> f32 {
    // Added up once per row, not once per block.
    let mut total = [0f32; LANES];
    let mut offsets = 0f32;
    for (((codes, [scale, offset]), x), sum) in codes.iter().zip(affine).zip(x).zip(sums) {
        let mut block = [0f32; LANES];
        for (codes, x) in codes.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0) {
            for lane in 0..LANES {
                block[lane] += f32::from(codes[lane]) * x[lane];
            }
        }
        for lane in 0..LANES {
            total[lane] += scale * block[lane];
        }
        offsets += offset * sum;
    }
    total.iter().sum::<f32>() + offsets
}

/// The half-precision number that a block starts with.
fn half(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn every_format_equals_the_dequantized_product() {
        let device = Device::Cpu;
        for format in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
            for rows in [1, 3] {
                let full = Tensor::randn(0.1f32, 1f32, (70, 96), &device).unwrap();
                let packed = QTensor::quantize(&full, format).unwrap();
                let x = Tensor::randn(0f32, 1f32, (rows, 96), &device).unwrap();
                let want = packed.dequantize(&device).unwrap().matmul(&x.t().unwrap()).unwrap();
                let blocks = Blocks::stack(&[packed]).unwrap().unwrap();
                let got = blocks.multiply(&x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), rows);
                let want = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(got.len(), want.len());
                for (g, w) in got.iter().zip(&want) {
                    assert!((g - w).abs() < 1e-4, "{format:?}: {g} {w}");
                }
            }
        }
    }

    #[test]
    fn other_formats_are_left_to_the_dense_path() {
        let full = Tensor::randn(0f32, 1f32, (4, 256), &Device::Cpu).unwrap();
        let packed = QTensor::quantize(&full, GgmlDType::Q6K).unwrap();
        assert!(Blocks::stack(&[packed]).unwrap().is_none());
    }
}
