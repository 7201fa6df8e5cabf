//! A cartridge: trained keys and values of every layer, at positions `0 .. p`.

use super::FORMAT;
use super::file::{Tensor, TensorFile};
use crate::error::LearnedError;
use crate::geometry::{KeyPhase, ModelShape};
use crate::view::DType;
use std::path::Path;

/// The trained keys and values of a model's layers, `p` entries for each KV head, checked: finite, of one extent, and as many
/// as the file promises. Keys carry their rotary embedding, each for its own position `0 .. p`.
///
/// It holds the file's bytes and decodes rows when they are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Cartridge {
    file: TensorFile,
    layers: Vec<Layer>,
    tokens: usize,
    frozen: usize,
    rope_theta: Option<f32>,
}

/// Key and value of a layer.
#[derive(Clone, Debug, PartialEq)]
struct Layer {
    k: Tensor,
    v: Tensor,
}

/// What a layer of a cartridge looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtents {
    /// KV heads `H`.
    pub kv_heads: usize,
    /// Key dimension.
    pub d_k: usize,
    /// Value dimension.
    pub d_v: usize,
    /// Element type of keys.
    pub k: DType,
    /// Element type of values.
    pub v: DType,
}

impl Cartridge {
    /// Reads a file (`docs/learned-caches.md` describes it) and checks all of it.
    ///
    /// # Errors
    /// [`LearnedError`] names what is wrong, and where.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LearnedError> {
        Self::from_bytes(super::read(path.as_ref())?)
    }

    /// As [`Cartridge::open`], of a file's bytes.
    ///
    /// # Errors
    /// As [`Cartridge::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, LearnedError> {
        let file = TensorFile::new(bytes)?;
        file.check_format(FORMAT)?;
        // A layer has two tensors: more layers than tensors are a lie, found before a loop counts to it.
        let promised = file.count("layers", "the number of layers")?;
        if promised == 0 || promised > file.tensors.len() {
            let want = format!("1 or more, and {} by the file's tensors", file.tensors.len() / 2);
            return Err(LearnedError::Metadata { key: "layers", got: promised.to_string(), want });
        }
        if let Some(tensor) = file.unexpected(promised, &["k", "v"]) {
            return Err(LearnedError::Unexpected { tensor, layers: promised });
        }
        let tokens = file.count("tokens", "the number of entries")?;
        let frozen = file.count("frozen", "the number of entries that were not trained")?;
        let refuse =
            |key, got: usize, want: String| Err(LearnedError::Metadata { key, got: got.to_string(), want });
        if tokens == 0 {
            return refuse("tokens", tokens, "1 or more: there is nothing to load".to_owned());
        }
        if frozen > tokens {
            return refuse("frozen", frozen, format!("at most tokens = {tokens}"));
        }
        let rope_theta = file.says("rope_theta").map(theta).transpose()?;
        let layers = (0..promised).map(|layer| read_layer(&file, layer, promised, tokens));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let cartridge = Self { file, layers, tokens, frozen, rope_theta };
        cartridge.check_stated()?;
        cartridge.file.check_finite()?;
        Ok(cartridge)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Entries `p` of each KV head: the positions it takes.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Of these, the first ones that were not trained (the attention sink). They are loaded like all others.
    pub fn frozen(&self) -> usize {
        self.frozen
    }

    /// The model it was learned for, if the file says.
    pub fn model(&self) -> Option<&str> {
        self.file.says("model")
    }

    /// The base of the rotary embedding it was learned with, if the file says.
    pub fn rope_theta(&self) -> Option<f32> {
        self.rope_theta
    }

    /// What a layer looks like.
    ///
    /// # Panics
    /// If `layer >= self.layers()`.
    pub fn layer(&self, layer: usize) -> LayerExtents {
        let Layer { k, v } = &self.layers[layer];
        LayerExtents { kv_heads: k.extents[0], d_k: k.extents[2], d_v: v.extents[2], k: k.dtype, v: v.dtype }
    }

    /// The keys `[p, d_k]` and values `[p, d_v]` of one KV head of a layer.
    ///
    /// # Panics
    /// If the layer or head is not there, or a buffer is longer than that.
    pub fn read(&self, layer: usize, head: usize, keys: &mut [f32], values: &mut [f32]) {
        let extents = self.layer(layer);
        assert!(head < extents.kv_heads, "KV head {head} of {}", extents.kv_heads);
        let Layer { k, v } = &self.layers[layer];
        for (tensor, dim, out) in [(k, extents.d_k, keys), (v, extents.d_v, values)] {
            assert!(out.len() <= self.tokens * dim, "{} elements of {}", out.len(), self.tokens * dim);
            self.file.read(tensor, head * self.tokens * dim, out);
        }
    }

    /// Whether it was learned for a model of this shape: layer by layer those that own a cache, their heads and dimensions, and
    /// the base of the rotary embedding where both sides know it.
    ///
    /// # Errors
    /// [`LearnedError::Layers`], [`LearnedError::Heads`], [`LearnedError::Theta`].
    pub fn check(&self, shape: &ModelShape) -> Result<(), LearnedError> {
        let (got, want) = (self.layers(), shape.owners().count());
        if got != want {
            return Err(LearnedError::Layers { got, want });
        }
        for (index, layer) in shape.owners().enumerate() {
            let (ours, model) = (self.layer(index), shape.layer(layer));
            let sides = [("k", ours.d_k, model.d_k), ("v", ours.d_v, model.d_v)];
            for (tensor, got, want) in sides {
                let (got, want) = ((ours.kv_heads, got), (model.kv_heads, want));
                if got != want {
                    return Err(LearnedError::Heads { layer, tensor, got, want });
                }
            }
            let rotary = model.rotary.as_ref().filter(|_| model.key_phase == KeyPhase::PostRope);
            if let (Some(got), Some(rotary)) = (self.rope_theta, rotary)
                && got != rotary.theta
            {
                return Err(LearnedError::Theta { layer, got, want: rotary.theta });
            }
        }
        Ok(())
    }

    /// Whether the file says that it was learned for this model: a name or fingerprint, whatever was given to the converter.
    ///
    /// # Errors
    /// [`LearnedError::Model`], also if the file does not say.
    pub fn check_model(&self, model: &str) -> Result<(), LearnedError> {
        match self.model() {
            Some(got) if got == model => Ok(()),
            got => {
                Err(LearnedError::Model { got: got.unwrap_or_default().to_owned(), want: model.to_owned() })
            }
        }
    }

    /// What the file states of heads must be what its tensors have.
    fn check_stated(&self) -> Result<(), LearnedError> {
        for layer in 0..self.layers() {
            let extents = self.layer(layer);
            let dims =
                [("kv_heads", extents.kv_heads), ("head_dim", extents.d_k), ("value_dim", extents.d_v)];
            for (key, want) in dims {
                if let Some(got) = self.file.says(key)
                    && got.parse() != Ok(want)
                {
                    let want = format!("{want}, as in the tensors of layer {layer}");
                    return Err(LearnedError::Metadata { key, got: got.to_owned(), want });
                }
            }
        }
        Ok(())
    }
}

fn named(layer: usize, side: &str) -> String {
    format!("layers.{layer}.{side}")
}

fn theta(text: &str) -> Result<f32, LearnedError> {
    text.parse().ok().filter(|theta: &f32| theta.is_finite() && *theta > 1.0).ok_or_else(|| {
        let want = "a finite number above 1, or left out".to_owned();
        LearnedError::Metadata { key: "rope_theta", got: text.to_owned(), want }
    })
}

/// Key and value of a layer: `[H, p, d]` each, of equal `H`.
fn read_layer(file: &TensorFile, layer: usize, layers: usize, tokens: usize) -> Result<Layer, LearnedError> {
    let find = |side| {
        let tensor = named(layer, side);
        file.tensors.get(&tensor).cloned().ok_or(LearnedError::Missing { tensor, layers })
    };
    let (k, v) = (find("k")?, find("v")?);
    let refuse = |side, got: &Tensor, want| {
        Err(LearnedError::Extents { tensor: named(layer, side), got: got.extents.clone(), want })
    };
    let fits = |tensor: &Tensor| match tensor.extents[..] {
        [heads, entries, dim] => heads > 0 && entries == tokens && dim > 0,
        _ => false,
    };
    for (side, tensor) in [("k", &k), ("v", &v)] {
        if !fits(tensor) {
            return refuse(side, tensor, format!("[KV heads, {tokens} entries, dimension]"));
        }
    }
    if k.extents[0] != v.extents[0] {
        return refuse("v", &v, format!("{} KV heads, as the keys", k.extents[0]));
    }
    Ok(Layer { k, v })
}
