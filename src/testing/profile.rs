//! A profile with every part there is, of random numbers: enough to run what goes by one, worth nothing as a judgement.
//!
//! *Helps* the suite that runs over the whole registry. *Hurts* nothing.

use super::random::Random;
use crate::error::ProfileError;
use crate::geometry::ModelShape;
use crate::profile::{Array, Part, Profile};

/// Hidden neurons of the networks.
const NEURONS: usize = 3;

/// Channels and width of the convolutions, and how much of an entry they make.
const CHANNELS: usize = 2;
const WIDTH: usize = 3;
const BLEND: f32 = 0.4;

/// A profile of a model whose hidden states are of dimension `hidden`.
///
/// # Errors
/// [`ProfileError::Mixed`] if its layers have different heads.
pub fn profile(shape: &ModelShape, hidden: usize, seed: u64) -> Result<Profile, ProfileError> {
    let mut random = Random::new(seed);
    let layer = shape.layer(0);
    let (layers, hq, h) = (shape.layers(), layer.query_heads, layer.kv_heads);
    let mut array = |extents: &[usize], scale: f32| {
        let count = extents.iter().product();
        let numbers = (0..count).map(|_| random.normal() * scale).collect();
        Array::new(extents.to_vec(), numbers)
    };
    let positive = |array: Array| {
        let numbers = array.numbers().iter().map(|x| x.abs()).collect();
        Array::new(array.extents().to_vec(), numbers)
    };
    let made = || Part::new("random numbers");
    let row = (hq + h) * layer.d_k + h * layer.d_v;
    let (mut locret, mut kvzap) = (made(), made());
    for l in 0..layers {
        locret = locret
            .with(format!("layers.{l}.up"), array(&[NEURONS, row], 0.3)?)
            .with(format!("layers.{l}.down"), array(&[h, NEURONS], 1.0)?);
        kvzap = kvzap
            .with(format!("layers.{l}.up"), array(&[NEURONS, hidden], 0.3)?)
            .with(format!("layers.{l}.up_bias"), array(&[NEURONS], 0.3)?)
            .with(format!("layers.{l}.weight"), array(&[h, NEURONS], 1.0)?)
            .with(format!("layers.{l}.bias"), array(&[h], 1.0)?);
    }
    let profile = Profile::new(shape)?
        .with("locret", locret)
        .with("kvzap", kvzap)
        .with("duo", made().with("gates", array(&[layers, h], 1.0)?))
        .with("heads", made().with("scores", positive(array(&[layers, hq], 1.0)?)?))
        .with("errors", made().with("layers", positive(array(&[layers], 1.0)?)?));
    let mut lococo = made();
    for l in 0..layers {
        let kernel = array(&[CHANNELS, layer.d_k + layer.d_v, WIDTH], 0.3)?;
        lococo = lococo
            .with(format!("layers.{l}.weight"), kernel)
            .with(format!("layers.{l}.bias"), array(&[CHANNELS], 0.3)?)
            .with(format!("layers.{l}.blend"), Array::new(vec![1], vec![BLEND])?);
    }
    Ok(profile.with("lococo", lococo))
}
