//! LoCoCo: a trained convolution over a KV head's entries says what some of the kept ones become: a blend of what they were and
//! of a weighted mean over everything that does not stay verbatim.
//!
//! Verbatim stay, of those the policy keeps, the first `sinks`, the last `recent` and what the observed queries looked at most;
//! the `m` others are *slots*, in order. With `X[i] = (k[i], v[i])` over the entries that are not verbatim, those that leave and
//! the slots alike, and slot `c` the `o`-th of them:
//! ```text
//! A[c,i] = max(0, b[c] + Σ_j Σ_d w[c,d,j] X[i + j − (n−1)/2, d])        zero beyond both ends; n: width
//! P[c,i] = exp(A[c,i]) / Σ_i' exp(A[c,i'])
//! W[c,i] = (1 − γ) [i = o] + γ P[c,i]                                    k[c] ← Σ_i W[c,i] k[i], and v likewise
//! ```
//! Weights of a layer are those of all its KV heads. `m` is the number of channels, but at most half of what a head keeps; where
//! it is fewer, the first channels are used.
//!
//! *Helps* whoever has convolutions that were trained through the model; those of `kvsieve calibrate` do worse than dropping
//! (`docs/policies/lococo.md`). *Hurts* as any mean of keys at different rotations does, and by `m` sources for everything that is
//! not verbatim: whatever is truncated later cuts through what they speak for.

use super::{Reduced, Reducer};
use crate::backend::Backend;
use crate::device::HeadRows;
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::kernel::linear::{Activation, LinearArgs};
use crate::plan::{HeadPlan, LayerPlan, Merges, Source, Target};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerView, Needs};
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "lococo",
    summary: "a trained convolution mixes everything that is not kept verbatim into a few kept entries",
    source: "Cai et al. 2024, arXiv:2406.05317",
    needs: "a profile (lococo); the last `window` queries, without them older entries stay verbatim",
    args: &[
        Arg::count("window", 64, 0, 65_536, "last queries whose attention says what stays verbatim"),
        Arg::count("recent", 8, 0, 1 << 20, "last entries that stay verbatim"),
        Arg::count("sinks", 4, 0, 1 << 20, "first entries that stay verbatim, if the policy keeps them"),
    ],
    build: Build::Reduce { build },
};

/// Numbers of the windows that are laid side by side at a time: 8 MiB.
const BLOCK: usize = 1 << 21;

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    let (window, recent, sinks) = (args.count("window")?, args.count("recent")?, args.count("sinks")?);
    Ok(Arc::new(LoCoCo { window, recent, sinks, layers: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct LoCoCo {
    /// Queries whose attention says what stays verbatim.
    pub window: usize,
    /// Last entries that stay verbatim.
    pub recent: usize,
    /// First entries that stay verbatim, of those that are kept.
    pub sinks: usize,
    /// None where a layer has no entries of its own to compress.
    layers: Option<Arc<Vec<Option<Convolution>>>>,
}

impl Reducer for LoCoCo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn lacks(&self) -> Option<&'static str> {
        self.layers.is_none().then_some(ENTRY.name)
    }

    fn bind(&self, profile: &Profile, shape: &ModelShape) -> Result<Option<Arc<dyn Reducer>>, ProfileError> {
        let layers = (0..shape.layers()).map(|layer| Convolution::of(profile, shape, layer));
        let layers = Some(Arc::new(layers.collect::<Result<_, _>>()?));
        Ok(Some(Arc::new(Self { layers, ..self.clone() })))
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let layer = self.layers.as_ref().and_then(|layers| layers.get(view.layer)?.as_ref());
        let convolution = layer.ok_or_else(|| PolicyError::Missing {
            policy: ENTRY.name.to_owned(),
            need: format!("the part {} of a profile", ENTRY.name),
            layer: view.layer,
            hint: "; bind it to a profile that kvsieve calibrate made",
        })?;
        let attention = match self.window == 0 || view.queries.positions.is_empty() {
            true => vec![0.0; view.lengths().iter().sum()],
            false => super::observed(ENTRY.name, view, self.window)?,
        };
        let heads = view.heads.iter().zip(&plan.heads).zip(super::by_head(view.heads, &attention));
        let merges = heads.map(|((head, plan), attention)| {
            // Where nothing leaves nothing is compressed.
            let channels = if plan.is_identity() { 0 } else { convolution.bias.len() };
            let slots = slots(plan, attention, channels, (self.sinks, self.recent));
            convolution.mix(view, head, plan, &slots)
        });
        Ok(merges.collect::<Result<Vec<_>, _>>()?.into())
    }
}

/// Which of the slots that a KV head keeps are made anew by the convolution, ascending: up to one per channel and no more than
/// half, those that drew the least attention, neither among the head's first `sinks` entries nor among its last `recent`. The
/// others stay verbatim. Of equals the later one is made anew.
pub fn slots(
    plan: &HeadPlan,
    attention: &[f32],
    channels: usize,
    (sinks, recent): (usize, usize),
) -> Vec<u32> {
    let inner = sinks..plan.rows.saturating_sub(recent).max(sinks);
    let mut slots: Vec<u32> =
        plan.keep.iter().copied().filter(|slot| inner.contains(&(*slot as usize))).collect();
    let drew = |slot: &u32| attention[*slot as usize];
    slots.sort_by(|a, b| drew(a).total_cmp(&drew(b)).then(b.cmp(a)));
    slots.truncate(channels.min(plan.keep.len() / 2));
    slots.sort_unstable();
    slots
}

/// The convolution of one layer.
#[derive(Clone, Debug)]
struct Convolution {
    /// `[channels, width, d_k + d_v]`: a window of entries as they lie in memory.
    weight: Vec<f32>,
    /// `[channels]`.
    bias: Vec<f32>,
    width: usize,
    /// γ.
    blend: f32,
}

impl Convolution {
    fn of(profile: &Profile, shape: &ModelShape, layer: usize) -> Result<Option<Self>, ProfileError> {
        let own = shape.layer(layer);
        if own.shared_with.is_some() || own.window.is_some() {
            return Ok(None);
        }
        let (part, name) = (ENTRY.name, |array: &str| format!("layers.{layer}.{array}"));
        let inputs = own.d_k + own.d_v;
        let kernel = profile.array(part, &name("weight"), &[None, Some(inputs), None])?;
        let (channels, width) = (kernel.extents()[0], kernel.extents()[2]);
        if width % 2 == 0 {
            let (array, got) = (name("weight"), kernel.extents().to_vec());
            return Err(ProfileError::Extents { part, array, got, want: format!("any, {inputs}, odd") });
        }
        let bias = profile.array(part, &name("bias"), &[Some(channels)])?;
        let blend = profile.array(part, &name("blend"), &[Some(1)])?.numbers()[0];
        if !(0.0..=1.0).contains(&blend) {
            let (array, want) = (name("blend"), "0 ..= 1");
            return Err(ProfileError::Range { part, array, at: 0, value: blend, want });
        }
        let kernel = kernel.numbers();
        let mut weight = Vec::with_capacity(kernel.len());
        for channel in kernel.chunks_exact(inputs * width) {
            weight.extend((0..width * inputs).map(|at| channel[at % inputs * width + at / inputs]));
        }
        Ok(Some(Self { weight, bias: bias.numbers().to_vec(), width, blend }))
    }

    /// What the slots of a KV head take up.
    fn mix(
        &self,
        view: &LayerView<'_>,
        head: &HeadRows,
        plan: &HeadPlan,
        slots: &[u32],
    ) -> Result<Merges, PolicyError> {
        let mut merges = Merges { keys: true, ..Merges::default() };
        if slots.is_empty() || self.blend == 0.0 {
            return Ok(merges);
        }
        let verbatim =
            |slot: &u32| plan.keep.binary_search(slot).is_ok() && slots.binary_search(slot).is_err();
        let mixed: Vec<u32> = (0..plan.rows as u32).filter(|slot| !verbatim(slot)).collect();
        let rows = self.padded(view, head, &mixed)?;
        let shares = self.shares(view.backend, &rows, mixed.len(), slots.len())?;
        for (slot, shares) in slots.iter().zip(shares.chunks_exact(mixed.len())) {
            let weight = |at: usize| self.blend * shares[at];
            let own = 1.0 - self.blend + mixed.binary_search(slot).map_or(0.0, weight);
            let others = mixed.iter().enumerate().filter(|(_, from)| *from != slot);
            let source = |(at, &slot)| Source { slot, key: weight(at), value: weight(at) };
            let target = Target { slot: *slot, sources: 0, key: own, value: own, bias: 0.0 };
            merges.push(target, others.map(source));
        }
        Ok(merges)
    }

    /// Keys and values of these entries side by side, with zeros for half a window before and behind.
    fn padded(&self, view: &LayerView<'_>, head: &HeadRows, mixed: &[u32]) -> Result<Vec<f32>, PolicyError> {
        let (d_k, d_v) = (view.shape.d_k, view.shape.d_v);
        let (mut keys, mut values) = (vec![0.0; mixed.len() * d_k], vec![0.0; mixed.len() * d_v]);
        let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
        view.backend.gather(&mut GatherArgs { head, slots: mixed, target })?;
        let beyond = self.width / 2 * (d_k + d_v);
        let mut rows = vec![0.0; 2 * beyond + keys.len() + values.len()];
        let own = rows[beyond..].chunks_exact_mut(d_k + d_v);
        for (row, (key, value)) in own.zip(keys.chunks_exact(d_k).zip(values.chunks_exact(d_v))) {
            row[..d_k].copy_from_slice(key);
            row[d_k..].copy_from_slice(value);
        }
        Ok(rows)
    }

    /// P of the first channels, `[channels, entries]`.
    fn shares(
        &self,
        backend: &dyn Backend,
        padded: &[f32],
        entries: usize,
        channels: usize,
    ) -> Result<Vec<f32>, PolicyError> {
        let inputs = self.weight.len() / self.bias.len();
        let row = inputs / self.width;
        let weight = &self.weight[..channels * inputs];
        let mut shares = vec![0.0; channels * entries];
        let block = (BLOCK / inputs).clamp(1, entries);
        let (mut windows, mut out) = (Vec::with_capacity(block * inputs), vec![0.0; block * channels]);
        for first in (0..entries).step_by(block) {
            let last = (first + block).min(entries);
            windows.clear();
            for entry in first..last {
                windows.extend_from_slice(&padded[entry * row..][..inputs]);
            }
            let out = &mut out[..(last - first) * channels];
            backend.linear(&mut LinearArgs {
                x: &windows,
                weight,
                bias: Some(&self.bias[..channels]),
                inputs,
                outputs: channels,
                activation: Activation::None,
                out,
            })?;
            for (entry, logits) in (first..last).zip(out.chunks_exact(channels)) {
                logits.iter().enumerate().for_each(|(c, logit)| shares[c * entries + entry] = logit.max(0.0));
            }
        }
        for shares in shares.chunks_exact_mut(entries) {
            let top = shares.iter().copied().fold(0.0, f32::max);
            shares.iter_mut().for_each(|share| *share = (*share - top).exp());
            let sum = shares.iter().map(|share| f64::from(*share)).sum::<f64>();
            shares.iter_mut().for_each(|share| *share = (f64::from(*share) / sum) as f32);
        }
        Ok(shares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_looked_at_least_is_made_anew() {
        let plan = HeadPlan::new(20, vec![0, 1, 4, 5, 8, 9, 11, 13, 18, 19]);
        let mut attention = vec![1.0; 20];
        (attention[0], attention[4], attention[9], attention[11], attention[19]) = (0.0, 0.5, 0.1, 0.2, 0.0);
        let slots = |channels, protected| slots(&plan, &attention, channels, protected);
        // The first and the last drew nothing and stay verbatim all the same.
        assert_eq!(slots(3, (1, 1)), [4, 9, 11]);
        assert_eq!(slots(2, (1, 1)), [9, 11]);
        assert_eq!(slots(2, (0, 0)), [0, 19]);
        // Half of ten; of those that drew the same the later ones.
        assert_eq!(slots(64, (1, 1)), [4, 9, 11, 13, 18]);
        // Ends that meet leave nothing between.
        assert!(slots(64, (12, 9)).is_empty());
        assert!(slots(0, (1, 1)).is_empty());
        // First entries that were not kept are none to protect.
        assert_eq!(slots(64, (4, 7)), [4, 5, 8, 9, 11]);
    }
}
