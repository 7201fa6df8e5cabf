//! Weight matrices as the model multiplies by them.
//!
//! *Helps*: one place decides between the file's quantized blocks and dequantized weights. Measured with
//! `examples/weight_speed.rs` (numbers in README.md): candle 0.11 multiplies most block formats with scalar code unless it
//! is compiled for the very CPU, so dequantized weights are tens of times faster in prefill and several times in decode.
//! *Hurts*: they take up to 5.25 bytes a weight (0.7 GB for 135M parameters, 6.3 GB for 1.2B), which is why the other form
//! is kept.

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Module, Shape, Storage, Tensor};
use rayon::prelude::*;

use crate::blocks::Blocks;
use crate::error::Result;
use crate::gguf::Gguf;

/// In which form weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// Dequantized to `f32`: fast, exact with respect to the file, 4 bytes a weight.
    #[default]
    F32,
    /// As in the file, multiplied by candle's `QMatMul`, which also rounds activations to 8 bits: small and slow.
    Quantized,
}

/// `y = x Wᵀ` for one matrix, or for several that read the same `x`, stacked.
#[derive(Debug)]
pub(crate) enum Linear {
    /// One `(outputs, inputs)` matrix; stacked matrices share it, which saves dispatches when decoding.
    Dense {
        /// `f32`, for many rows at once.
        weight: Tensor,
        /// The same weights in a quarter of the bytes, for few rows; `None` for formats without it.
        blocks: Option<Blocks>,
    },
    /// One quantized matrix each, since stacked matrices may differ in block format.
    Quantized(Vec<QMatMul>),
}

impl Linear {
    /// Reads `(name, outputs)` matrices with a common input width.
    pub(crate) fn read(
        gguf: &mut Gguf,
        form: Weights,
        parts: &[(String, usize)],
        inputs: usize,
    ) -> Result<Self> {
        let read = |(name, outputs): &(String, usize)| gguf.tensor(name, &[*outputs, inputs]);
        let parts = parts.iter().map(read).collect::<Result<Vec<QTensor>>>()?;
        Self::new(form, parts)
    }

    pub(crate) fn new(form: Weights, parts: Vec<QTensor>) -> Result<Self> {
        Ok(match form {
            Weights::Quantized => Self::Quantized(
                parts.into_iter().map(QMatMul::from_qtensor).collect::<candle_core::Result<_>>()?,
            ),
            Weights::F32 => {
                let dense = parts.iter().map(|part| part.dequantize(&Device::Cpu));
                let dense = dense.collect::<candle_core::Result<Vec<_>>>()?;
                let weight = match dense.as_slice() {
                    [one] => one.clone(),
                    several => Tensor::cat(several, 0)?,
                };
                Self::Dense { weight, blocks: Blocks::stack(&parts)? }
            }
        })
    }

    /// `(rows, inputs)` to `(rows, outputs)`, dense.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Dense { weight, blocks } if x.dim(0)? <= FEW_ROWS => few_rows(x, weight, blocks.as_ref())?,
            Self::Dense { weight, .. } => x.matmul(&weight.t()?)?,
            Self::Quantized(parts) => {
                let mut out =
                    parts.iter().map(|part| part.forward(x)).collect::<candle_core::Result<Vec<_>>>()?;
                if out.len() == 1 { out.swap_remove(0) } else { Tensor::cat(&out, 1)? }
            }
        })
    }
}

/// Rows up to which [`few_rows`] beats a general matrix product: with so few, reading the weights is all the work.
const FEW_ROWS: usize = 4;

/// Weights that one task of the thread pool handles: about 20 µs of memory traffic, enough to pay for the hand-over.
const TASK_WEIGHTS: usize = 64 << 10;

/// `x Wᵀ` for a decode step: every weight is read once, in order, and multiplied with all rows of `x`.
///
/// candle's matrix product packs operands into tiles first, which for one row only adds memory traffic.
fn few_rows(x: &Tensor, weight: &Tensor, blocks: Option<&Blocks>) -> Result<Tensor> {
    let (rows, inputs) = x.dims2()?;
    let outputs = weight.dim(0)?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let (x_storage, x_layout) = x.storage_and_layout();
    let (weight_storage, weight_layout) = weight.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(x)), Storage::Cpu(CpuStorage::F32(weight))) =
        (&*x_storage, &*weight_storage)
    else {
        return Err(candle_core::Error::Msg("dense weights and activations are f32 on the CPU".into()).into());
    };
    let x = &x[x_layout.start_offset()..][..rows * inputs];
    let weight = &weight[weight_layout.start_offset()..][..outputs * inputs];

    // Output-major while computing, so that every task owns a run of it.
    let out = match blocks {
        Some(blocks) => blocks.multiply(x, rows),
        None => multiply(x, weight, rows, inputs),
    };
    if rows == 1 {
        return Ok(Tensor::from_vec(out, (1, outputs), &Device::Cpu)?);
    }
    Ok(Tensor::from_vec(out, (outputs, rows), &Device::Cpu)?.t()?.contiguous()?)
}

/// As [`Blocks::multiply`], for plain weights.
fn multiply(x: &[f32], weight: &[f32], rows: usize, inputs: usize) -> Vec<f32> {
    let mut out = vec![0f32; weight.len() / inputs * rows];
    let at_once = (TASK_WEIGHTS / inputs).max(1);
    out.par_chunks_mut(at_once * rows).zip(weight.par_chunks(at_once * inputs)).for_each(|(out, weight)| {
        for (out, weight) in out.chunks_exact_mut(rows).zip(weight.chunks_exact(inputs)) {
            for (out, x) in out.iter_mut().zip(x.chunks_exact(inputs)) {
                *out = dot(weight, x);
            }
        }
    });
    out
}

/// Sixteen partial sums, which the compiler keeps in vector registers whatever their width.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// `silu(gate) * up` for rows that hold the gate half and the up half side by side.
///
/// candle composes this from a narrow, a single-threaded `silu`, and a product: four passes over the widest activation of
/// the model. One pass over both halves, rows in parallel, is a tenth of the prefill time saved.
pub(crate) fn gated(x: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1_no_bwd(&Gated)?)
}

struct Gated;

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gated-silu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(data) = storage else { candle_core::bail!("gated-silu takes f32") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("gated-silu takes a dense tensor")
        };
        let (rows, width) = layout.shape().dims2()?;
        let half = width / 2;
        if half == 0 || width % 2 != 0 {
            candle_core::bail!("gated-silu takes an even width, got {width}")
        }
        let mut out = vec![0f32; rows * half];
        out.par_chunks_exact_mut(half).zip(data[start..end].par_chunks_exact(width)).for_each(
            |(out, row)| {
                let (gate, up) = row.split_at(half);
                for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                    *o = g / (1.0 + (-g).exp()) * u;
                }
            },
        );
        Ok((CpuStorage::F32(out), Shape::from((rows, half))))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use candle_core::quantized::GgmlDType;

    use super::*;

    #[test]
    fn gated_equals_candles_composition() {
        let x = Tensor::randn(0f32, 2f32, (7, 64), &Device::Cpu).unwrap();
        let (gate, up) = (x.narrow(1, 0, 32).unwrap(), x.narrow(1, 32, 32).unwrap());
        let want = (candle_nn::ops::silu(&gate).unwrap() * up).unwrap();
        let got = gated(&x).unwrap();
        let worst = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn few_rows_equal_a_matrix_product() {
        for (rows, inputs, outputs) in [(1, 576, 300), (3, 37, 5), (4, 16, 1)] {
            let x = Tensor::randn(0f32, 1f32, (rows, inputs), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 1f32, (outputs, inputs), &Device::Cpu).unwrap();
            let want = x.matmul(&weight.t().unwrap()).unwrap();
            let got = few_rows(&x, &weight, None).unwrap();
            assert_eq!(got.dims(), want.dims());
            let worst = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < 1e-4, "{worst}");
        }
    }

    #[test]
    fn both_forms_agree_and_stack_in_order() {
        let device = Device::Cpu;
        let part = |rows: usize| {
            let full = Tensor::randn(0f32, 1f32, (rows, 64), &device).unwrap();
            QTensor::quantize(&full, GgmlDType::Q8_0).unwrap()
        };
        let (a, b) = (part(32), part(96));
        let copy = |q: &QTensor| {
            let data = q.data().unwrap();
            let storage =
                candle_core::quantized::QStorage::from_data(data, &device, GgmlDType::Q8_0).unwrap();
            QTensor::new(storage, q.shape().clone()).unwrap()
        };
        let dense = Linear::new(Weights::F32, vec![copy(&a), copy(&b)]).unwrap();
        let packed = Linear::new(Weights::Quantized, vec![a, b]).unwrap();
        let x = Tensor::randn(0f32, 1f32, (3, 64), &device).unwrap();
        let (dense, packed) = (dense.forward(&x).unwrap(), packed.forward(&x).unwrap());
        assert_eq!((dense.dims(), dense.dtype()), (packed.dims(), DType::F32));
        let error =
            (dense.clone() - packed).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let power = dense.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        // 8-bit activations: relative error of about one in 256.
        assert!((error / power).sqrt() < 0.02, "{error} of {power}");
    }
}
