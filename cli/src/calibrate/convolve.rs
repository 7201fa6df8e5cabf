//! Training of the convolutions of `lococo`: one per layer, on attention outputs.
//!
//! A cut of a sample is compressed as the reducer does, behind a policy that keeps what its last queries looked at. The error is
//! that of the outputs of the queries behind the cut, over what was compressed and what came after, beside those over
//! everything. Entries are scaled to unit variance while a convolution learns, and the scales put into its weights afterwards.

use super::measure;
use super::train::{Layerwise, normal};
use crate::error::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::{sigmoid, softmax};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::plan::HeadPlan;
use kvsieve::profile::{Array, Part};
use kvsieve::reduce::lococo;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// First and last entries of a cut that stay verbatim, as by default.
const SINKS: usize = 4;
const RECENT: usize = 8;

/// Last queries of a cut that say what is kept, and queries behind it whose outputs are compared.
const OBSERVING: usize = 64;
const ASKING: usize = 64;

/// Entries of a cut, of the tokens of a sample: the rest is where it may lie.
const CUT: (usize, usize) = (5, 8);

/// Cuts of the last sample that test.
const TESTS: usize = 4;

/// Step sizes at the start, of the convolution and of the blend; they fall to 0 along a cosine.
const RATE: f64 = 2e-3;
const BLEND_RATE: f64 = 3e-2;

/// Queries, keys and values of one layer up to the end of a sample's first reading, rotated; head after head.
pub(super) struct Reading {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) tokens: usize,
}

/// What to train and how.
pub(super) struct Convolutions {
    pub(super) layers: Layerwise,
    pub(super) channels: usize,
    pub(super) width: usize,
    pub(super) epochs: usize,
    pub(super) seed: u64,
}

/// Squared errors of outputs, as shares of their squares, of the last sample.
struct Quality {
    mixed: f64,
    dropped: f64,
    blend: f64,
}

/// Entries that a head keeps of a cut at least when so many channels are trained: twice as many, and enough beside both ends.
fn least_kept(channels: usize) -> usize {
    (2 * channels).max(channels + SINKS + RECENT)
}

/// The most channels that samples of so many tokens can teach.
pub(super) fn most_channels(tokens: usize) -> usize {
    let room = (tokens * CUT.0 / CUT.1).saturating_sub(OBSERVING);
    (0..=room).rev().find(|channels| least_kept(*channels) <= room).unwrap_or(0)
}

impl Convolutions {
    pub(super) fn run(&self, shape: &ModelShape, readings: &[Vec<Reading>]) -> Result<Part> {
        let (part, quality) = self.layers.run(shape, readings.len(), |layer| {
            let seed = self.seed.wrapping_mul(1 << 20).wrapping_add(layer as u64);
            self.layer(shape.layer(layer), &readings[layer], ChaCha8Rng::seed_from_u64(seed))
        })?;
        if !quality.is_empty() {
            let mean = |of: fn(&Quality) -> f64| quality.iter().map(of).sum::<f64>() / quality.len() as f64;
            let worse = quality.iter().filter(|q| q.mixed > q.dropped).count();
            eprintln!(
                "lococo: squared error of attention outputs on the last sample {:.4} of their squares, {:.4} where \
                 nothing is mixed; worse than that in {worse} of {} layers; mean γ {:.2}",
                mean(|q| q.mixed),
                mean(|q| q.dropped),
                quality.len(),
                mean(|q| q.blend)
            );
        }
        Ok(part)
    }

    /// A layer's arrays, and how they do on the last sample, from which they did not learn.
    fn layer(
        &self,
        shape: &LayerShape,
        readings: &[Reading],
        mut random: ChaCha8Rng,
    ) -> Result<(Vec<(&'static str, Array)>, Quality)> {
        let (learned, last) = readings.split_at(readings.len() - 1);
        let net = Net::new(self, shape, learned, &mut random)?;
        net.train(learned, self.epochs, &mut random)?;
        let mut quality =
            Quality { mixed: 0.0, dropped: 0.0, blend: f64::from(net.blend()?.to_vec1::<f32>()?[0]) };
        let (cut, room) = net.cuts(&last[0]);
        for test in 0..TESTS {
            let batch = net.batch(&last[0], room * test / (TESTS - 1), cut, least_kept(self.channels))?;
            let logits = batch.windows.matmul(&net.weight.t()?)?;
            quality.mixed +=
                net.loss(&batch, &logits, &net.blend()?)?.to_scalar::<f32>().map(f64::from)? / TESTS as f64;
            let none = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
            quality.dropped +=
                net.loss(&batch, &logits, &none)?.to_scalar::<f32>().map(f64::from)? / TESTS as f64;
        }
        Ok((net.arrays()?, quality))
    }
}

/// A convolution while it learns.
struct Net<'a> {
    shape: &'a LayerShape,
    channels: usize,
    width: usize,
    /// `[channels, width · (d_k + d_v)]`, for entries of unit variance.
    weight: Var,
    bias: Var,
    /// γ is its logistic function.
    blend: Var,
    /// Of every dimension of an entry.
    scale: Vec<f32>,
}

/// A cut, every KV head compressed to equally many.
struct Batch {
    /// `[H · mixed, width · (d_k + d_v)]`: scaled.
    windows: Tensor,
    /// `[H, mixed, d_k]`, `[H, mixed, d_v]`.
    mixed: [Tensor; 2],
    /// `[H, channels, mixed]`: 1 where a slot is.
    own: Tensor,
    /// Verbatim entries and those behind the cut: `[H, n, d_k]`, `[H, n, d_v]`.
    others: [Tensor; 2],
    /// `[H, G · asking, d_k]`.
    queries: Tensor,
    /// `[G · asking, channels + n]`: 0, or −∞ for what a query does not see.
    mask: Tensor,
    /// Outputs over everything, `[H, G · asking, d_v]`.
    full: Tensor,
}

impl<'a> Net<'a> {
    fn new(
        with: &Convolutions,
        shape: &'a LayerShape,
        readings: &[Reading],
        random: &mut ChaCha8Rng,
    ) -> Result<Self> {
        let spread = |of: fn(&Reading) -> &[f32], dim: usize| {
            let mut squares = vec![0f64; dim];
            let rows = readings.iter().flat_map(|reading| of(reading).chunks_exact(dim));
            let count = readings.iter().map(|reading| of(reading).len() / dim).sum::<usize>() as f64;
            for row in rows {
                squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            }
            squares.into_iter().map(move |sum| 1.0 / (sum / count).sqrt().max(1e-6) as f32)
        };
        let scale: Vec<f32> =
            spread(|r| r.k.as_slice(), shape.d_k).chain(spread(|r| r.v.as_slice(), shape.d_v)).collect();
        let inputs = with.width * scale.len();
        let deviation = (inputs as f32).sqrt().recip();
        let numbers: Vec<f32> = (0..with.channels * inputs).map(|_| deviation * normal(random)).collect();
        Ok(Self {
            shape,
            channels: with.channels,
            width: with.width,
            weight: Var::from_vec(numbers, (with.channels, inputs), &Device::Cpu)?,
            bias: Var::zeros(with.channels, DType::F32, &Device::Cpu)?,
            blend: Var::zeros(1, DType::F32, &Device::Cpu)?,
            scale,
        })
    }

    fn blend(&self) -> Result<Tensor> {
        Ok(sigmoid(&self.blend)?)
    }

    /// Entries of a cut, and in how many ways it can be moved.
    fn cuts(&self, reading: &Reading) -> (usize, usize) {
        let cut = reading.tokens * CUT.0 / CUT.1;
        (cut, reading.tokens - cut - ASKING)
    }

    fn train(&self, readings: &[Reading], epochs: usize, random: &mut ChaCha8Rng) -> Result<()> {
        let params = |lr| ParamsAdamW { lr, weight_decay: 0.0, ..ParamsAdamW::default() };
        let mut convolution = AdamW::new(vec![self.weight.clone(), self.bias.clone()], params(RATE))?;
        let mut blend = AdamW::new(vec![self.blend.clone()], params(BLEND_RATE))?;
        let mut order: Vec<usize> = (0..readings.len()).collect();
        let steps = (epochs * readings.len()) as f64;
        let mut step = 0;
        for _ in 0..epochs {
            for last in (1..order.len()).rev() {
                order.swap(last, random.next_u32() as usize % (last + 1));
            }
            for &index in &order {
                let turn = 0.5 * (1.0 + (std::f64::consts::PI * f64::from(step) / steps).cos());
                convolution.set_learning_rate(RATE * turn);
                blend.set_learning_rate(BLEND_RATE * turn);
                let (cut, room) = self.cuts(&readings[index]);
                let least = least_kept(self.channels);
                let kept = least + random.next_u32() as usize % ((cut / 2).saturating_sub(least) + 1);
                let start = random.next_u32() as usize % (room + 1);
                let batch = self.batch(&readings[index], start, cut, kept)?;
                // Gradients of the entries, which nobody asks for, would be a third of the work.
                let logits = Var::from_tensor(&batch.windows.matmul(&self.weight.t()?)?)?;
                let mut gradients = self.loss(&batch, &logits, &self.blend()?)?.backward()?;
                if let Some(of_logits) = gradients.remove(&logits) {
                    gradients.insert(&self.weight, of_logits.t()?.matmul(&batch.windows)?);
                }
                convolution.step(&gradients)?;
                blend.step(&gradients)?;
                step += 1;
            }
        }
        Ok(())
    }

    /// The error of a compressed cut; `logits` are those of its windows, without a bias.
    fn loss(&self, batch: &Batch, logits: &Tensor, blend: &Tensor) -> Result<Tensor> {
        let (heads, mixed) = (batch.own.dim(0)?, batch.own.dim(2)?);
        let logits = logits.broadcast_add(&self.bias)?.relu()?;
        let logits = logits.reshape((heads, mixed, self.channels))?.transpose(1, 2)?.contiguous()?;
        let shares = softmax(&logits, D::Minus1)?.broadcast_mul(blend)?;
        let weights = (shares + batch.own.broadcast_mul(&(1.0 - blend)?)?)?;
        let with = |side: usize| -> Result<Tensor> {
            Ok(Tensor::cat(&[&weights.matmul(&batch.mixed[side])?, &batch.others[side]], 1)?)
        };
        let out = attend(self.shape, &batch.queries, [&with(0)?, &with(1)?], &batch.mask)?;
        let squares = |rows: &Tensor| rows.sqr()?.sum((1, 2));
        Ok((squares(&(out - &batch.full)?)? / squares(&batch.full)?)?.mean_all()?)
    }

    /// First entries of a reading and a run of later ones, `cut` in all, of which every KV head keeps so many.
    fn batch(&self, reading: &Reading, start: usize, cut: usize, kept: usize) -> Result<Batch> {
        let (h, group) = (self.shape.kv_heads, self.shape.group());
        let (d_k, d_v, n) = (self.shape.d_k, self.shape.d_v, reading.tokens);
        let end = start + cut;
        let tokens: Vec<usize> = (0..SINKS).chain(start + SINKS..end).collect();
        let tensor = |rows: Vec<f32>, d: usize| {
            let count = rows.len() / h / d;
            Tensor::from_vec(rows, (h, count, d), &Device::Cpu)
        };
        let mut windows = Vec::new();
        let (mut own, mut mixed, mut others, mut all) =
            (Vec::new(), [vec![], vec![]], [vec![], vec![]], [vec![], vec![]]);
        for head in 0..h {
            let row = |side: usize, token: usize| match side {
                0 => &reading.k[(head * n + token) * d_k..][..d_k],
                _ => &reading.v[(head * n + token) * d_v..][..d_v],
            };
            let observed = observed(self.shape, reading, head, &tokens)?;
            let plan = HeadPlan::new(cut, keep(&observed, kept));
            let slots = lococo::slots(&plan, &observed, self.channels, (SINKS, RECENT));
            let is_mixed =
                |slot: u32| plan.keep.binary_search(&slot).is_err() || slots.binary_search(&slot).is_ok();
            let (mixing, verbatim): (Vec<u32>, Vec<u32>) = (0..cut as u32).partition(|slot| is_mixed(*slot));
            for side in 0..2 {
                for slot in &mixing {
                    mixed[side].extend_from_slice(row(side, tokens[*slot as usize]));
                }
                let kept = verbatim.iter().map(|slot| tokens[*slot as usize]);
                kept.chain(end..end + ASKING)
                    .for_each(|token| others[side].extend_from_slice(row(side, token)));
                let everything = tokens.iter().copied().chain(end..end + ASKING);
                everything.for_each(|token| all[side].extend_from_slice(row(side, token)));
            }
            for slot in &slots {
                own.extend(mixing.iter().map(|other| f32::from(u8::from(other == slot))));
            }
            let beyond = vec![0.0; self.width / 2 * self.scale.len()];
            let mut padded = beyond.clone();
            for slot in &mixing {
                let token = tokens[*slot as usize];
                let entry = row(0, token).iter().chain(row(1, token));
                padded.extend(entry.zip(&self.scale).map(|(x, scale)| x * scale));
            }
            padded.extend(beyond);
            for at in 0..mixing.len() {
                windows.extend_from_slice(&padded[at * self.scale.len()..][..self.width * self.scale.len()]);
            }
        }
        let inputs = self.width * self.scale.len();
        let count = mixed[0].len() / h / d_k;
        let windows = Tensor::from_vec(windows, (h * count, inputs), &Device::Cpu)?;
        let own = Tensor::from_vec(own, (h, self.channels, count), &Device::Cpu)?;
        let queries: Vec<f32> = reading
            .q
            .chunks_exact(n * d_k)
            .flat_map(|head| &head[end * d_k..][..ASKING * d_k])
            .copied()
            .collect();
        let queries = tensor(queries, d_k)?;
        let [keys, values] = all;
        let mask = |before: usize| causal(group, before);
        let full = attend(self.shape, &queries, [&tensor(keys, d_k)?, &tensor(values, d_v)?], &mask(cut)?)?;
        let pair = |[k, v]: [Vec<f32>; 2]| -> Result<[Tensor; 2]> { Ok([tensor(k, d_k)?, tensor(v, d_v)?]) };
        Ok(Batch {
            windows,
            mixed: pair(mixed)?,
            own,
            others: pair(others)?,
            queries,
            mask: mask(kept)?,
            full,
        })
    }

    /// The arrays of a profile, for entries as they come.
    fn arrays(&self) -> Result<Vec<(&'static str, Array)>> {
        let weight = self.weight.flatten_all()?.to_vec1::<f32>()?;
        let inputs = self.scale.len();
        let mut turned = Vec::with_capacity(weight.len());
        for channel in weight.chunks_exact(self.width * inputs) {
            for (d, scale) in self.scale.iter().enumerate() {
                turned.extend((0..self.width).map(|j| channel[j * inputs + d] * scale));
            }
        }
        Ok(vec![
            ("weight", Array::new(vec![self.channels, inputs, self.width], turned)?),
            ("bias", Array::new(vec![self.channels], self.bias.to_vec1()?)?),
            ("blend", Array::new(vec![1], self.blend()?.to_vec1()?)?),
        ])
    }
}

/// Attention that the last queries of a cut pay to each of its entries, as [`kvsieve::reduce::observed`] says it.
fn observed(shape: &LayerShape, reading: &Reading, head: usize, tokens: &[usize]) -> Result<Vec<f32>> {
    let (d, n, group, cut) = (shape.d_k, reading.tokens, shape.group(), tokens.len());
    let first = tokens[cut - 1] + 1 - OBSERVING;
    let heads = head * group..(head + 1) * group;
    let queries: Vec<f32> =
        heads.flat_map(|head| &reading.q[(head * n + first) * d..][..OBSERVING * d]).copied().collect();
    let keys: Vec<f32> =
        tokens.iter().flat_map(|token| &reading.k[(head * n + token) * d..][..d]).copied().collect();
    let queries = Tensor::from_vec(queries, (group * OBSERVING, d), &Device::Cpu)?;
    let keys = Tensor::from_vec(keys, (cut, d), &Device::Cpu)?;
    let logits = (queries.matmul(&keys.t()?)? * f64::from(shape.scale))?.flatten_all()?.to_vec1::<f32>()?;
    let mut sums = vec![0f32; cut];
    let mut weights = vec![0f32; cut];
    for (row, logits) in logits.chunks_exact(cut).enumerate() {
        let seen = cut - OBSERVING + row % OBSERVING + 1;
        measure::softmax(&logits[..seen], &mut weights[..seen]);
        sums.iter_mut().zip(&weights[..seen]).for_each(|(sum, weight)| *sum += weight);
    }
    let seen_by = |entry: usize| OBSERVING.min(cut - entry) as f32;
    Ok(sums.iter().enumerate().map(|(entry, sum)| sum / seen_by(entry)).collect())
}

/// What a policy keeps: first entries, some of the queries' own, and what these looked at most; ascending.
fn keep(observed: &[f32], kept: usize) -> Vec<u32> {
    let window = observed.len() - OBSERVING.min(kept / 2);
    let mut keep: Vec<u32> = (0..observed.len() as u32).collect();
    let free = |slot: &u32| !(*slot as usize >= window || (*slot as usize) < SINKS);
    keep.sort_by(|a, b| {
        let drew = |slot: &u32| observed[*slot as usize];
        free(a).cmp(&free(b)).then(drew(b).total_cmp(&drew(a))).then(a.cmp(b))
    });
    keep.truncate(kept);
    keep.sort_unstable();
    keep
}

/// What queries behind so many entries do not see of one another, for every query head of a group.
fn causal(group: usize, before: usize) -> Result<Tensor> {
    let width = before + ASKING;
    let row =
        |query: usize| (0..width).map(move |at| if at <= before + query { 0.0 } else { f32::NEG_INFINITY });
    let rows: Vec<f32> = (0..group * ASKING).flat_map(|index| row(index % ASKING)).collect();
    Ok(Tensor::from_vec(rows, (group * ASKING, width), &Device::Cpu)?)
}

fn attend(
    shape: &LayerShape,
    queries: &Tensor,
    [keys, values]: [&Tensor; 2],
    mask: &Tensor,
) -> Result<Tensor> {
    let logits = (queries.matmul(&keys.transpose(1, 2)?.contiguous()?)? * f64::from(shape.scale))?;
    Ok(softmax(&logits.broadcast_add(mask)?, D::Minus1)?.matmul(values)?)
}
