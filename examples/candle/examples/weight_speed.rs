//! Which form of the weights multiplies fastest on this machine?
//!
//! GGUF files hold block-quantized weights; candle can multiply by them directly (`QMatMul`) or by a dequantized
//! copy. The choice decides how fast prefill and decode run around the attention that kvsieve takes over, so it is
//! measured, not assumed. Prints, for every matrix shape of the model, milliseconds for a 512-row chunk and for one row
//! with candle's own operations, then tokens per second of the whole model without attention for both [`Weights`].
//!
//! ```text
//! cargo run --release --example weight_speed -- ../../models/SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
use std::time::Instant;

use candle_core::quantized::{QMatMul, gguf_file};
use candle_core::{DType, Device, Module, Tensor};
use kvsieve_candle::{Attend, Logits, Model, Weights};

/// An attention that costs nothing, so that only the rest is timed.
struct Absent;

impl Attend for Absent {
    fn attend(
        &mut self,
        _layer: usize,
        q: &Tensor,
        _k: &Tensor,
        v: &Tensor,
    ) -> kvsieve_candle::Result<Tensor> {
        let (tokens, heads, _) = q.dims3()?;
        Ok(Tensor::zeros((tokens, heads * v.dim(2)?), DType::F32, &Device::Cpu)?)
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn time(repeats: usize, mut f: impl FnMut() -> candle_core::Result<Tensor>) -> candle_core::Result<f64> {
    f()?;
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let start = Instant::now();
        f()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: weight_speed MODEL.gguf")?;
    let mut file = std::io::BufReader::new(std::fs::File::open(&path)?);
    let content = gguf_file::Content::read(&mut file)?;
    let device = Device::Cpu;
    println!(
        "{:<24} {:>5} {:>10} {:>10} {:>10} {:>10}   (ms; t = weight stored transposed)",
        "tensor", "rows", "quantized", "f32", "f32 t", "f16"
    );
    for name in [
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_down.weight",
        "token_embd.weight",
    ] {
        let q = content.tensor(&mut file, name, &device)?;
        let full = q.dequantize(&device)?;
        let turned = full.t()?.contiguous()?;
        let half = full.to_dtype(DType::F16)?;
        let k = full.dim(1)?;
        let packed = QMatMul::from_qtensor(q)?;
        for rows in [512, 1] {
            if rows == 512 && name == "token_embd.weight" {
                continue;
            }
            let x = Tensor::randn(0f32, 1f32, (rows, k), &device)?;
            let x16 = x.to_dtype(DType::F16)?;
            let repeats = if rows == 1 { 201 } else { 21 };
            println!(
                "{name:<24} {rows:>5} {:>10.3} {:>10.3} {:>10.3} {:>10.3}",
                time(repeats.min(9), || packed.forward(&x))?,
                time(repeats, || x.matmul(&full.t()?))?,
                time(repeats, || x.matmul(&turned))?,
                time(repeats, || x16.matmul(&half.t()?))?,
            );
        }
    }
    println!(
        "\n{:<10} {:>16} {:>16}   (tokens per second without attention)",
        "weights", "prefill, 512", "decode"
    );
    for weights in [Weights::F32, Weights::Quantized] {
        let model = Model::load(&path, weights)?;
        let tokens: Vec<u32> = (0..512).map(|i| i * 37 % 4096).collect();
        let rate = |count: usize, repeats: usize, logits: Logits| -> kvsieve_candle::Result<f64> {
            let mut times = Vec::with_capacity(repeats);
            for _ in 0..repeats {
                let forward = model.forward_with(&mut Absent, &tokens[..count], 0, logits)?;
                times.push(forward.timings.total.as_secs_f64());
            }
            Ok(count as f64 / median(times))
        };
        let (prefill, decode) = (rate(512, 3, Logits::None)?, rate(1, 50, Logits::Last)?);
        println!("{:<10} {prefill:>16.0} {decode:>16.0}", format!("{weights:?}"));
    }
    Ok(())
}
