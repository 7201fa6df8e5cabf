//! Small perceptrons, one per layer, out of a profile: what judges a token by its own vectors when it arrives.
//!
//! *Helps* learned scorers, which differ in what goes in and in the activation between. *Hurts* nothing.

use crate::error::{PolicyError, ProfileError};
use crate::geometry::ModelShape;
use crate::kernel::linear::{Activation, LinearArgs};
use crate::policy::NewTokens;
use crate::profile::Profile;

/// `x ↦ act(x Wᵀ + b)`.
#[derive(Clone, Debug)]
struct Dense {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    outputs: usize,
    activation: Activation,
}

/// One or two dense layers per layer of the model; none where a layer has no entries of its own to judge.
#[derive(Clone, Debug)]
pub(super) struct Networks {
    policy: &'static str,
    layers: Vec<Vec<Dense>>,
}

/// Names of a network's arrays in a part: first the layer below, if there is one, then the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) part: &'static str,
    /// Weight and bias of the hidden layer.
    pub(super) hidden: (&'static str, Option<&'static str>),
    /// Weight and bias of the last one.
    pub(super) last: (&'static str, Option<&'static str>),
    /// What stands between.
    pub(super) activation: Activation,
}

impl Networks {
    /// Takes the networks of all layers that have entries to judge; `inputs` is the width of a row, `None` where the file says.
    /// A network without a hidden layer is one if `optional`.
    pub(super) fn of(
        (profile, shape): (&Profile, &ModelShape),
        names: Names,
        inputs: impl Fn(usize) -> Option<usize>,
        optional: bool,
    ) -> Result<Self, ProfileError> {
        let layers = (0..shape.layers()).map(|layer| {
            let own = shape.layer(layer);
            if own.shared_with.is_some() || own.window.is_some() {
                return Ok(Vec::new());
            }
            let name = |array: &str| format!("layers.{layer}.{array}");
            let dense = |(weight, bias): (&str, Option<&str>), extents: [Option<usize>; 2], activation| {
                let weight = profile.array(names.part, &name(weight), &extents)?;
                let outputs = weight.extents()[0];
                let bias =
                    bias.map(|bias| profile.array(names.part, &name(bias), &[Some(outputs)])).transpose()?;
                Ok::<_, ProfileError>(Dense {
                    weight: weight.numbers().to_vec(),
                    bias: bias.map(|bias| bias.numbers().to_vec()),
                    outputs,
                    activation,
                })
            };
            let hidden = name(names.hidden.0);
            let deep = !optional || profile.part(names.part)?.arrays().any(|(array, _)| array == hidden);
            if !deep {
                return Ok(vec![dense(names.last, [Some(own.kv_heads), inputs(layer)], Activation::None)?]);
            }
            let below = dense(names.hidden, [None, inputs(layer)], names.activation)?;
            let last = dense(names.last, [Some(own.kv_heads), Some(below.outputs)], Activation::None)?;
            Ok(vec![below, last])
        });
        Ok(Self { policy: names.part, layers: layers.collect::<Result<_, ProfileError>>()? })
    }

    /// One number per token and KV head, `[tokens, H]`.
    pub(super) fn rate(
        &self,
        tokens: &NewTokens<'_>,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), PolicyError> {
        let dense = self.layers.get(tokens.layer).map_or(&[][..], Vec::as_slice);
        let wide = dense.first().map_or(0, |first| first.weight.len() / first.outputs);
        if wide != tokens.width {
            return Err(PolicyError::Custom {
                policy: self.policy.to_owned(),
                message: format!(
                    "layer {} judges rows of {wide} numbers, these have {}: the profile was made for another model",
                    tokens.layer, tokens.width
                ),
            });
        }
        let layer = |x: &[f32], inputs: usize, dense: &Dense, out: &mut [f32]| {
            tokens.backend.linear(&mut LinearArgs {
                x,
                weight: &dense.weight,
                bias: dense.bias.as_deref(),
                inputs,
                outputs: dense.outputs,
                activation: dense.activation,
                out,
            })
        };
        match dense {
            [only] => layer(tokens.rows, tokens.width, only, out)?,
            [below, last] => {
                scratch.resize(tokens.count() * below.outputs, 0.0);
                layer(tokens.rows, tokens.width, below, scratch)?;
                layer(scratch, below.outputs, last, out)?;
            }
            _ => {}
        }
        Ok(())
    }
}
