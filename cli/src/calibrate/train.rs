//! Training of the small networks: one per layer, by AdamW on what was recorded.
//!
//! Inputs are scaled to unit variance while a network learns, and the scales put into its weights afterwards; targets of each
//! KV head likewise. A layer is saved when it is done, so that a run that is cut off loses one at most.

use super::record::{Examples, Recording};
use crate::error::Result;
use crate::host;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use kvsieve::geometry::ModelShape;
use kvsieve::profile::{Array, Part, Profile};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::PathBuf;

/// Consecutive tokens that stay together in a step.
const BLOCK: usize = 64;

/// Blocks of a step.
const BATCH: usize = 16;

/// Step size at the start; it falls to 0 along a cosine.
const RATE: f64 = 2e-3;

/// Replay scores below this one are taken for it: their logarithms would otherwise be all that is learned.
const LEAST_SCORE: f32 = 1e-6;

/// Weight of the squared difference between neighbouring tokens' scores, as in the paper on Locret.
const SMOOTH: f64 = 0.0025;

/// A part that is made layer by layer.
pub(super) struct Layerwise {
    pub(super) part: &'static str,
    /// How it is made, in words: what is found half-done under other words is not gone on with.
    pub(super) made: String,
    /// Where layers are saved until all are done.
    pub(super) partial: PathBuf,
}

impl Layerwise {
    /// All layers, those that an earlier run finished among them; and what `one` says of those that it made.
    pub(super) fn run<Q>(
        &self,
        shape: &ModelShape,
        layers: usize,
        one: impl Fn(usize) -> Result<(Vec<(&'static str, Array)>, Q)>,
    ) -> Result<(Part, Vec<Q>)> {
        let mut part = self.begun(shape);
        let bar = host::bar(layers, &format!("training {}", self.part));
        let mut said = Vec::new();
        for layer in 0..layers {
            let first = format!("layers.{layer}.");
            if !part.arrays().any(|(name, _)| name.starts_with(&first)) {
                let (trained, quality) = one(layer)?;
                said.push(quality);
                part = trained
                    .into_iter()
                    .fold(part, |part, (name, array)| part.with(format!("{first}{name}"), array));
                Profile::new(shape)?.with(self.part, part.clone()).save(&self.partial)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok((part, said))
    }

    /// Layers that an earlier run finished.
    fn begun(&self, shape: &ModelShape) -> Part {
        let saved = Profile::open(&self.partial).ok().filter(|saved| saved.check(shape).is_ok());
        let begun = saved.and_then(|saved| {
            let part = saved.parts().find(|(name, part)| *name == self.part && part.made() == self.made);
            part.map(|(_, part)| part.clone())
        });
        begun.unwrap_or_else(|| Part::new(&self.made))
    }
}

/// Networks to train, and how.
pub(super) struct Training {
    pub(super) layers: Layerwise,
    /// Neurons; 0 is a linear map.
    pub(super) hidden: usize,
    pub(super) epochs: usize,
    pub(super) seed: u64,
}

impl Training {
    pub(super) fn run(&self, shape: &ModelShape, recording: &Recording) -> Result<Part> {
        let (part, explained) = self.layers.run(shape, recording.layers.len(), |layer| {
            self.layer(layer, &recording.layers[layer], recording.tokens)
        })?;
        if !explained.is_empty() {
            let mean = explained.iter().sum::<f64>() / explained.len() as f64;
            let least = explained.iter().copied().fold(f64::INFINITY, f64::min);
            eprintln!("{}: R² on the last sample {mean:.2}, in the worst layer {least:.2}", self.layers.part);
        }
        Ok(part)
    }

    /// A layer's arrays, and the share of the variance that it explains of the last sample, on which it was not trained.
    fn layer(
        &self,
        layer: usize,
        examples: &Examples,
        tokens: Tokens,
    ) -> Result<(Vec<(&'static str, Array)>, f64)> {
        let locret = self.layers.part == "locret";
        let data = if locret {
            Data::of(&examples.rows, &examples.logits, tokens, false)
        } else {
            let logs: Vec<f32> = examples.scores.iter().map(|score| score.max(LEAST_SCORE).ln()).collect();
            Data::of(&examples.hidden, &logs, tokens, true)
        };
        let mut random =
            ChaCha8Rng::seed_from_u64(self.seed.wrapping_mul(1 << 20).wrapping_add(layer as u64));
        let net = Net::new(&data, self.hidden, locret, &mut random)?;
        net.train(&data, self.epochs, &mut random)?;
        let quality = net.explained(&data)?;
        Ok((net.arrays(&data)?, quality))
    }
}

/// How many samples there are, and how long they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens {
    pub(super) samples: usize,
    pub(super) each: usize,
}

/// Inputs and targets of one layer, the last sample apart.
struct Data {
    /// `[n, inputs]`, of unit variance.
    x: Vec<f32>,
    /// `[n, outputs]`, of mean 0 and unit variance.
    y: Vec<f32>,
    inputs: usize,
    outputs: usize,
    /// Tokens that are learned from; those behind them test.
    learned: usize,
    /// Of the inputs: what was taken off, and the factor.
    shift: Vec<f32>,
    scale: Vec<f32>,
    /// Of the targets: mean and deviation.
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl Data {
    /// `shifted` if the network has a bias that can make up for the inputs' means.
    fn of(x: &[f32], y: &[f32], tokens: Tokens, shifted: bool) -> Self {
        let n = tokens.samples * tokens.each;
        let (inputs, outputs) = (x.len() / n, y.len() / n);
        let (mean, deviation) = moments(y, outputs, true);
        let (shift, spread) = moments(x, inputs, shifted);
        let scale: Vec<f32> = spread.iter().map(|spread| 1.0 / spread).collect();
        let turned = |rows: &[f32], shift: &[f32], scale: &dyn Fn(usize) -> f32| {
            let width = shift.len();
            rows.iter()
                .enumerate()
                .map(|(i, x)| (x - shift[i % width]) * scale(i % width))
                .collect::<Vec<f32>>()
        };
        let x = turned(x, &shift, &|i| scale[i]);
        let y = turned(y, &mean, &|i| 1.0 / deviation[i]);
        Self { x, y, inputs, outputs, learned: n - tokens.each, shift, scale, mean, deviation }
    }

    /// Blocks of consecutive tokens as tensors of inputs and targets.
    fn batch(&self, blocks: &[usize]) -> Result<(Tensor, Tensor)> {
        let gather = |rows: &[f32], width: usize| -> Result<Tensor> {
            let of = |block: &usize| &rows[block * BLOCK * width..(block + 1) * BLOCK * width];
            let rows: Vec<f32> = blocks.iter().flat_map(of).copied().collect();
            Ok(Tensor::from_vec(rows, (blocks.len() * BLOCK, width), &Device::Cpu)?)
        };
        Ok((gather(&self.x, self.inputs)?, gather(&self.y, self.outputs)?))
    }
}

/// Mean (0 if not asked for) and root of the mean square about it of every column.
fn moments(rows: &[f32], width: usize, centred: bool) -> (Vec<f32>, Vec<f32>) {
    let n = (rows.len() / width) as f64;
    let mut mean = vec![0f64; width];
    if centred {
        rows.iter().enumerate().for_each(|(i, x)| mean[i % width] += f64::from(*x) / n);
    }
    let mut square = vec![0f64; width];
    rows.iter()
        .enumerate()
        .for_each(|(i, x)| square[i % width] += (f64::from(*x) - mean[i % width]).powi(2) / n);
    // A column that never changes says nothing, whatever it is multiplied by.
    let deviation = square.iter().map(|square| square.sqrt().max(1e-6) as f32).collect();
    (mean.iter().map(|mean| *mean as f32).collect(), deviation)
}

/// A network while it learns.
struct Net {
    /// Weight and bias of the hidden layer, if there is one.
    below: Option<(Var, Option<Var>)>,
    last: (Var, Option<Var>),
    locret: bool,
}

impl Net {
    fn new(data: &Data, hidden: usize, locret: bool, random: &mut ChaCha8Rng) -> Result<Self> {
        let mut weight = |rows: usize, columns: usize| -> Result<Var> {
            let deviation = (columns as f32).sqrt().recip();
            let numbers: Vec<f32> = (0..rows * columns).map(|_| deviation * normal(random)).collect();
            Ok(Var::from_vec(numbers, (rows, columns), &Device::Cpu)?)
        };
        let bias = |rows: usize| -> Result<Option<Var>> {
            Ok(if locret { None } else { Some(Var::zeros(rows, DType::F32, &Device::Cpu)?) })
        };
        let below = match hidden {
            0 => None,
            hidden => Some((weight(hidden, data.inputs)?, bias(hidden)?)),
        };
        let inner = if hidden == 0 { data.inputs } else { hidden };
        let last = (weight(data.outputs, inner)?, bias(data.outputs)?);
        Ok(Self { below, last, locret })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dense = |x: &Tensor, (weight, bias): &(Var, Option<Var>)| -> Result<Tensor> {
            let out = x.matmul(&weight.t()?)?;
            Ok(match bias {
                Some(bias) => out.broadcast_add(bias)?,
                None => out,
            })
        };
        let Some(below) = &self.below else { return dense(x, &self.last) };
        let inner = dense(x, below)?;
        let inner = if self.locret { inner.silu()? } else { inner.gelu_erf()? };
        dense(&inner, &self.last)
    }

    fn train(&self, data: &Data, epochs: usize, random: &mut ChaCha8Rng) -> Result<()> {
        let vars =
            self.below.iter().chain([&self.last]).flat_map(|(weight, bias)| [Some(weight), bias.as_ref()]);
        let params = ParamsAdamW { lr: RATE, weight_decay: 0.01, ..ParamsAdamW::default() };
        let mut optimizer = AdamW::new(vars.flatten().cloned().collect(), params)?;
        let mut blocks: Vec<usize> = (0..data.learned / BLOCK).collect();
        let steps = epochs * blocks.len().div_ceil(BATCH);
        let mut step = 0;
        for _ in 0..epochs {
            for last in (1..blocks.len()).rev() {
                blocks.swap(last, random.next_u32() as usize % (last + 1));
            }
            for chosen in blocks.chunks(BATCH) {
                let turn = std::f64::consts::PI * step as f64 / steps as f64;
                optimizer.set_learning_rate(0.5 * RATE * (1.0 + turn.cos()));
                let (x, y) = data.batch(chosen)?;
                optimizer.backward_step(&self.loss(&self.forward(&x)?, &y)?)?;
                step += 1;
            }
        }
        Ok(())
    }

    fn loss(&self, got: &Tensor, want: &Tensor) -> Result<Tensor> {
        let difference = (got - want)?;
        if !self.locret {
            return Ok(difference.sqr()?.mean_all()?);
        }
        // Squared up to 1, straight beyond.
        let distance = difference.abs()?;
        let near = distance.minimum(1f64)?;
        let far = (&distance - &near)?;
        let close = ((near.sqr()? * 0.5)? + far)?.mean_all()?;
        let outputs = got.dim(1)?;
        let rows = got.reshape(((), BLOCK, outputs))?;
        let steps = (rows.narrow(1, 1, BLOCK - 1)? - rows.narrow(1, 0, BLOCK - 1)?)?;
        Ok((close + (steps.sqr()?.mean_all()? * SMOOTH)?)?)
    }

    /// 1 less the squared error over the variance, on tokens it did not learn from.
    fn explained(&self, data: &Data) -> Result<f64> {
        let blocks: Vec<usize> = (data.learned / BLOCK..data.y.len() / data.outputs / BLOCK).collect();
        let (x, y) = data.batch(&blocks)?;
        let error = (self.forward(&x)? - &y)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
        let spread = y.broadcast_sub(&y.mean_keepdim(0)?)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
        Ok(1.0 - f64::from(error) / f64::from(spread).max(1e-12))
    }

    /// The arrays of a profile, for inputs and outputs as they come.
    fn arrays(&self, data: &Data) -> Result<Vec<(&'static str, Array)>> {
        let numbers = |var: &Var| -> Result<Vec<f32>> { Ok(var.flatten_all()?.to_vec1::<f32>()?) };
        let names = match (self.locret, self.below.is_some()) {
            (true, _) => [("up", ""), ("down", "")],
            (false, true) => [("up", "up_bias"), ("weight", "bias")],
            (false, false) => [("weight", "bias"), ("", "")],
        };
        let layers: Vec<_> = self.below.iter().chain([&self.last]).collect();
        let mut arrays = Vec::new();
        for (index, ((weight, bias), names)) in layers.iter().zip(names).enumerate() {
            let (rows, columns) = weight.dims2()?;
            let mut weight = numbers(weight)?;
            let mut bias = bias.as_ref().map(numbers).transpose()?;
            if index == 0 {
                for (row, weights) in weight.chunks_exact_mut(columns).enumerate() {
                    weights.iter_mut().zip(&data.scale).for_each(|(weight, scale)| *weight *= scale);
                    if let Some(bias) = &mut bias {
                        bias[row] -= weights.iter().zip(&data.shift).map(|(w, shift)| w * shift).sum::<f32>();
                    }
                }
            }
            if index + 1 == layers.len() {
                for (row, weights) in weight.chunks_exact_mut(columns).enumerate() {
                    weights.iter_mut().for_each(|weight| *weight *= data.deviation[row]);
                    if let Some(bias) = &mut bias {
                        bias[row] = bias[row] * data.deviation[row] + data.mean[row];
                    }
                }
            }
            arrays.push((names.0, Array::new(vec![rows, columns], weight)?));
            if let Some(bias) = bias {
                arrays.push((names.1, Array::new(vec![rows], bias)?));
            }
        }
        Ok(arrays)
    }
}

/// A normally distributed number (Box and Muller).
pub(super) fn normal(random: &mut ChaCha8Rng) -> f32 {
    let mut uniform = || (f64::from(random.next_u32()) + 0.5) / (f64::from(u32::MAX) + 1.0);
    let (a, b) = (uniform(), uniform());
    ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}
