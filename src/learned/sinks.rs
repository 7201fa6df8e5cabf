//! Learned sinks from a file: entries without a position (ReLIC's Sink-KV) and logits that join the denominator.

use super::SINKS_FORMAT;
use super::file::{Tensor, TensorFile};
use crate::error::{Error, LearnedError};
use crate::geometry::{LayerShape, ModelShape, SinkEntries};
use std::path::Path;

/// Learned sinks of a model's layers, checked: finite, and of layers the file promises.
///
/// The tensors of layer `l`, each of which may be missing: `layers.{l}.k` `[H, n, d_k]` and `layers.{l}.v` `[H, n, d_v]` (what is
/// missing of the two is zero), `layers.{l}.bias` `[H, n]`, `layers.{l}.logits` `[Hq]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sinks {
    file: TensorFile,
    layers: usize,
}

/// What a layer may have.
const PARTS: [&str; 4] = ["k", "v", "bias", "logits"];

impl Sinks {
    /// Reads a file and checks all of it.
    ///
    /// # Errors
    /// [`LearnedError`] names what is wrong, and where.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LearnedError> {
        Self::from_bytes(super::read(path.as_ref())?)
    }

    /// As [`Sinks::open`], of a file's bytes.
    ///
    /// # Errors
    /// As [`Sinks::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, LearnedError> {
        let file = TensorFile::new(bytes)?;
        file.check_format(SINKS_FORMAT)?;
        let layers = file.count("layers", "the number of layers")?;
        if let Some(tensor) = file.unexpected(layers, &PARTS) {
            return Err(LearnedError::Unexpected { tensor, layers });
        }
        file.check_finite()?;
        Ok(Self { file, layers })
    }

    /// The model's shape with these sinks, in place of those it has in the same layers.
    ///
    /// # Errors
    /// [`LearnedError::Metadata`] for another number of layers (all count, also those that share a cache),
    /// [`LearnedError::Extents`] for other heads or dimensions; [`ShapeError`](crate::error::ShapeError) for more entries than
    /// there may be.
    pub fn apply(&self, shape: &ModelShape) -> Result<ModelShape, Error> {
        if self.layers != shape.layers() {
            let (got, want) = (self.layers.to_string(), format!("{}, as the model", shape.layers()));
            return Err(LearnedError::Metadata { key: "layers", got, want }.into());
        }
        let layers = shape.iter().enumerate().map(|(index, layer)| self.layer(index, layer));
        let joined = ModelShape::new(layers.collect::<Result<_, _>>()?)?;
        Ok(match shape.fingerprint() {
            Some(fingerprint) => joined.with_fingerprint(fingerprint),
            None => joined,
        })
    }

    fn layer(&self, index: usize, shape: &LayerShape) -> Result<LayerShape, LearnedError> {
        let mut layer = shape.clone();
        let name = |part: &str| format!("layers.{index}.{part}");
        let find = |part: &str| self.file.tensors.get(&name(part));
        // What is there first says how many entries there are.
        let entries = ["k", "v", "bias"].into_iter().find_map(find).and_then(|t| t.extents.get(1).copied());
        let read = |part: &str, want: &[usize]| match find(part) {
            Some(tensor) => self.numbers(&name(part), tensor, want).map(Some),
            None => Ok(None),
        };
        if ["k", "v", "bias"].into_iter().any(|part| find(part).is_some()) {
            let (h, n) = (shape.kv_heads, entries.unwrap_or(1));
            layer.sink_entries = Some(SinkEntries {
                entries: n,
                keys: read("k", &[h, n, shape.d_k])?,
                values: read("v", &[h, n, shape.d_v])?,
                bias: read("bias", &[h, n])?,
            });
        }
        if let Some(logits) = read("logits", &[shape.query_heads])? {
            layer.sink_logits = Some(logits);
        }
        Ok(layer)
    }

    /// A tensor's numbers, of these extents.
    fn numbers(&self, name: &str, tensor: &Tensor, want: &[usize]) -> Result<Vec<f32>, LearnedError> {
        if tensor.extents != want {
            let (tensor, got) = (name.to_owned(), tensor.extents.clone());
            return Err(LearnedError::Extents { tensor, got, want: format!("{want:?}, as the model") });
        }
        let mut numbers = vec![0.0; want.iter().product()];
        self.file.read(tensor, 0, &mut numbers);
        Ok(numbers)
    }
}
