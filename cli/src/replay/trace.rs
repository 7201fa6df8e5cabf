//! Trace files: recorded Q, K and V of some layers of a model, before the rotary embedding, as safetensors.
//!
//! *Helps* because a policy can be judged on real attention without running a model. *Hurts* as evidence for quality:
//! later layers never see the error of earlier ones; that is what `kvsieve eval` is for.

use crate::error::{Error, Result, read};
use half::f16;
use kvsieve::geometry::{LayerShape, ModelShape, Rotary, RotaryLayout};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

/// One recorded layer: `[heads, n, dim]` each, `q` and `k` not rotated.
#[derive(Debug)]
pub(super) struct Recorded {
    /// Index in the model it was recorded from.
    pub(super) layer: usize,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// A trace.
#[derive(Debug)]
pub(super) struct Trace {
    pub(super) layers: Vec<Recorded>,
    pub(super) query_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) scale: f32,
    pub(super) rotary: Rotary,
    pub(super) prompt: usize,
    pub(super) decode: usize,
}

impl Trace {
    /// Reads the chosen layers, or all.
    pub(super) fn read(path: &Path, chosen: Option<&[usize]>) -> Result<Self> {
        let bytes = read(path)?;
        Self::parse(&bytes, chosen).map_err(|problem| Error::Trace { path: path.to_owned(), problem })
    }

    fn parse(bytes: &[u8], chosen: Option<&[usize]>) -> std::result::Result<Self, String> {
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|e| format!("not a safetensors file: {e}"))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| format!("not a safetensors file: {e}"))?;
        let metadata = Metadata(header.metadata().as_ref());
        let recorded: Vec<usize> = metadata.parse_with("layers", |text| serde_json::from_str(text).ok())?;
        let (query_heads, kv_heads): (usize, usize) =
            (metadata.number("q_heads")?, metadata.number("kv_heads")?);
        let (prompt, decode): (usize, usize) =
            (metadata.number("prompt_len")?, metadata.number("decode_len")?);
        let dim: usize = metadata.number("head_dim")?;
        let theta: f32 = metadata.number("rope_theta")?;
        let layout = metadata.parse_with("rope_layout", |text| {
            let text = text.to_lowercase();
            match (text.contains("half"), text.contains("interleaved")) {
                (true, false) => Some(RotaryLayout::HalfSplit),
                (false, true) => Some(RotaryLayout::Interleaved),
                _ => None,
            }
        })?;
        let scale = metadata.number("scale")?;
        if prompt == 0 || query_heads == 0 || kv_heads == 0 || dim == 0 {
            return Err("prompt_len, q_heads, kv_heads and head_dim must be above 0".to_owned());
        }
        let chosen = chosen.map_or_else(|| recorded.clone(), <[usize]>::to_vec);
        if chosen.is_empty() {
            return Err("no layers".to_owned());
        }
        let tokens = prompt.checked_add(decode).ok_or("prompt_len + decode_len overflows")?;
        let layers = chosen
            .iter()
            .map(|&layer| {
                if !recorded.contains(&layer) {
                    return Err(format!("layer {layer} was not recorded; --layers may name {recorded:?}"));
                }
                let tensor = |name: &str, heads: usize| {
                    floats(&tensors, &format!("layers.{layer}.{name}"), &[heads, tokens, dim])
                };
                let (q, k, v) =
                    (tensor("q_pre", query_heads)?, tensor("k_pre", kv_heads)?, tensor("v", kv_heads)?);
                Ok(Recorded { layer, q, k, v })
            })
            .collect::<std::result::Result<_, String>>()?;
        let rotary = Rotary::new(dim, theta, layout);
        Ok(Self { layers, query_heads, kv_heads, dim, scale, rotary, prompt, decode })
    }

    /// A model of just these layers.
    pub(super) fn shape(&self) -> Result<ModelShape> {
        let mut layer =
            LayerShape::new(self.query_heads, self.kv_heads, self.dim).with_rotary(self.rotary.clone());
        layer.scale = self.scale;
        Ok(ModelShape::uniform(self.layers.len(), layer)?)
    }

    /// Prompt and further tokens.
    pub(super) fn tokens(&self) -> usize {
        self.prompt + self.decode
    }

    /// Tokens `from .. from + count` of a `[heads, n, dim]` tensor, rotated as if the first stood at `position`.
    pub(super) fn rotated(&self, rows: &[f32], from: usize, count: usize, position: i32) -> Vec<f32> {
        let (n, dim) = (self.tokens(), self.dim);
        let table = self.rotary.table((0..count as i32).map(|i| position + i));
        let mut out = Vec::with_capacity(rows.len() / n * count);
        for head in rows.chunks_exact(n * dim) {
            let start = out.len();
            out.extend_from_slice(&head[from * dim..(from + count) * dim]);
            for (row, angles) in out[start..].chunks_exact_mut(dim).zip(table.chunks_exact(self.rotary.dims))
            {
                rotate(row, angles, self.rotary.layout);
            }
        }
        out
    }
}

/// Turns one row by `[pairs, 2]` cosines and sines.
fn rotate(row: &mut [f32], angles: &[f32], layout: RotaryLayout) {
    let half = angles.len() / 2;
    for (pair, angle) in angles.chunks_exact(2).enumerate() {
        let (a, b) = match layout {
            RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            RotaryLayout::HalfSplit => (pair, pair + half),
        };
        let (x, y) = (row[a], row[b]);
        row[a] = x * angle[0] - y * angle[1];
        row[b] = x * angle[1] + y * angle[0];
    }
}

struct Metadata<'a>(Option<&'a HashMap<String, String>>);

impl Metadata<'_> {
    fn parse_with<T>(&self, key: &str, parse: impl Fn(&str) -> Option<T>) -> std::result::Result<T, String> {
        let text =
            self.0.and_then(|map| map.get(key)).ok_or_else(|| format!("the metadata has no `{key}`"))?;
        parse(text).ok_or_else(|| format!("the metadata has `{key}` = {text:?}, which cannot be read"))
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> std::result::Result<T, String> {
        self.parse_with(key, |text| text.trim().parse().ok())
    }
}

fn floats(tensors: &SafeTensors<'_>, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
    let tensor = tensors.tensor(name).map_err(|_| format!("there is no tensor `{name}`"))?;
    if tensor.shape() != shape {
        return Err(format!("tensor `{name}` is {:?}, the metadata implies {shape:?}", tensor.shape()));
    }
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => Ok(data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Ok(data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
        other => Err(format!("tensor `{name}` is {other:?}; f32 and f16 are read")),
    }
}
