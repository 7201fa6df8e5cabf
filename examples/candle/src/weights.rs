//! Weight matrices as the model multiplies by them.
//!
//! *Helps*: one place decides between the file's quantized blocks and a dequantized `f32` copy. Measured with
//! `examples/weight_speed.rs` (numbers in README.md): candle 0.11 has no fast kernel for most block formats on x86 unless
//! it is compiled for the very CPU, so the `f32` copy is about 20 times faster in prefill and twice as fast in decode.
//! *Hurts*: the copy takes 4 bytes a weight (0.5 GB for 135M parameters, 5 GB for 1.2B), which is why the other form is
//! kept.

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Module, Shape, Tensor};
use rayon::prelude::*;

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
    Dense(Tensor),
    /// One quantized matrix each, since stacked matrices may differ in block format.
    Quantized(Vec<QMatMul>),
}

impl Linear {
    /// Reads `(name, outputs)` matrices with a common input width.
    pub(crate) fn read(gguf: &mut Gguf, form: Weights, parts: &[(String, usize)], inputs: usize) -> Result<Self> {
        let read = |(name, outputs): &(String, usize)| gguf.tensor(name, &[*outputs, inputs]);
        let parts = parts.iter().map(read).collect::<Result<Vec<QTensor>>>()?;
        Self::new(form, parts)
    }

    pub(crate) fn new(form: Weights, parts: Vec<QTensor>) -> Result<Self> {
        Ok(match form {
            Weights::Quantized => {
                Self::Quantized(parts.into_iter().map(QMatMul::from_qtensor).collect::<candle_core::Result<_>>()?)
            }
            Weights::F32 => {
                let dense =
                    parts.iter().map(|part| part.dequantize(&Device::Cpu)).collect::<candle_core::Result<Vec<_>>>()?;
                Self::Dense(match dense.as_slice() {
                    [one] => one.clone(),
                    several => Tensor::cat(several, 0)?,
                })
            }
        })
    }

    /// `(rows, inputs)` to `(rows, outputs)`, dense.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(weight) => x.matmul(&weight.t()?)?,
            Self::Quantized(parts) => {
                let mut out = parts.iter().map(|part| part.forward(x)).collect::<candle_core::Result<Vec<_>>>()?;
                if out.len() == 1 { out.swap_remove(0) } else { Tensor::cat(&out, 1)? }
            }
        })
    }
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
        out.par_chunks_exact_mut(half).zip(data[start..end].par_chunks_exact(width)).for_each(|(out, row)| {
            let (gate, up) = row.split_at(half);
            for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                *o = g / (1.0 + (-g).exp()) * u;
            }
        });
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
    fn both_forms_agree_and_stack_in_order() {
        let device = Device::Cpu;
        let part = |rows: usize| {
            let full = Tensor::randn(0f32, 1f32, (rows, 64), &device).unwrap();
            QTensor::quantize(&full, GgmlDType::Q8_0).unwrap()
        };
        let (a, b) = (part(32), part(96));
        let copy = |q: &QTensor| {
            let data = q.data().unwrap();
            let storage = candle_core::quantized::QStorage::from_data(data, &device, GgmlDType::Q8_0).unwrap();
            QTensor::new(storage, q.shape().clone()).unwrap()
        };
        let dense = Linear::new(Weights::F32, vec![copy(&a), copy(&b)]).unwrap();
        let packed = Linear::new(Weights::Quantized, vec![a, b]).unwrap();
        let x = Tensor::randn(0f32, 1f32, (3, 64), &device).unwrap();
        let (dense, packed) = (dense.forward(&x).unwrap(), packed.forward(&x).unwrap());
        assert_eq!((dense.dims(), dense.dtype()), (packed.dims(), DType::F32));
        let error = (dense.clone() - packed).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let power = dense.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        // 8-bit activations: relative error of about one in 256.
        assert!((error / power).sqrt() < 0.02, "{error} of {power}");
    }
}
