//! A safetensors file in memory: checked once when it is read, its tensors told by name.

use super::VERSION;
use crate::error::LearnedError;
use crate::view::DType;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::ops::Range;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) dtype: DType,
    pub(super) extents: Vec<usize>,
    /// Its elements among the file's bytes.
    at: Range<usize>,
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorFile {
    bytes: Vec<u8>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    pub(super) fn new(bytes: Vec<u8>) -> Result<Self, LearnedError> {
        check_numbers(&bytes)?;
        let (header, described) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        // Eight bytes say how long the header is.
        let data = header + 8;
        let mut tensors = BTreeMap::new();
        for (name, info) in described.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => return Err(LearnedError::ElementType { tensor: name, got: other.to_string() }),
            };
            let at = data + info.data_offsets.0..data + info.data_offsets.1;
            tensors.insert(name, Tensor { dtype, extents: info.shape.clone(), at });
        }
        let metadata = described.metadata().iter().flatten();
        let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { bytes, tensors, metadata })
    }

    /// Refuses a file of another format or version.
    pub(super) fn check_format(&self, format: &str) -> Result<(), LearnedError> {
        for (key, want) in [("format", format), ("version", VERSION)] {
            let got = self.says(key).unwrap_or("(nothing)");
            if got != want {
                return Err(LearnedError::Metadata { key, got: got.to_owned(), want: want.to_owned() });
            }
        }
        Ok(())
    }

    /// Refuses NaN and infinity in any tensor, `[heads, entries, dimension]` or the first of these.
    pub(super) fn check_finite(&self) -> Result<(), LearnedError> {
        let mut part = [0.0; 1024];
        for (name, tensor) in &self.tensors {
            let extent = |axis: usize| tensor.extents.get(axis).copied().unwrap_or(1);
            let (entries, dim) = (extent(1), extent(2));
            let count = tensor.at.len() / tensor.dtype.bytes();
            for first in (0..count).step_by(part.len()) {
                let part = &mut part[..(count - first).min(1024)];
                self.read(tensor, first, part);
                if let Some(at) = part.iter().position(|x| !x.is_finite()) {
                    let (value, at) = (part[at], first + at);
                    let (head, entry, dim) = (at / dim / entries, at / dim % entries, at % dim);
                    return Err(LearnedError::NonFinite { tensor: name.clone(), value, head, entry, dim });
                }
            }
        }
        Ok(())
    }

    /// A tensor that is none of these parts of so many layers.
    pub(super) fn unexpected(&self, layers: usize, parts: &[&str]) -> Option<String> {
        let known = |name: &str| {
            let (layer, part) = name.strip_prefix("layers.")?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            // "layers.007.k" parses, and is none.
            let known = layer < layers && parts.contains(&part) && name == format!("layers.{layer}.{part}");
            known.then_some(())
        };
        self.tensors.keys().find(|name| known(name).is_none()).cloned()
    }

    /// What the file says of a key.
    pub(super) fn says(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A whole number that the file must state.
    pub(super) fn count(&self, key: &'static str, want: &str) -> Result<usize, LearnedError> {
        let got = self.says(key).unwrap_or("(nothing)");
        let bad = || LearnedError::Metadata { key, got: got.to_owned(), want: want.to_owned() };
        got.parse().map_err(|_| bad())
    }

    /// Elements `first ..` of a tensor as `f32`, as many as `out` holds.
    ///
    /// The caller has checked that they are there.
    pub(super) fn read(&self, tensor: &Tensor, first: usize, out: &mut [f32]) {
        let width = tensor.dtype.bytes();
        let start = tensor.at.start + first * width;
        let bytes = &self.bytes[start..start + out.len() * width];
        let halves = bytes.as_chunks::<2>().0;
        match tensor.dtype {
            DType::F32 => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
            }
            DType::F16 => {
                out.iter_mut().zip(halves).for_each(|(x, b)| *x = f16::from_le_bytes(*b).to_f32());
            }
            DType::Bf16 => {
                out.iter_mut().zip(halves).for_each(|(x, b)| *x = bf16::from_le_bytes(*b).to_f32());
            }
        }
    }
}

fn damaged(problem: impl Into<String>) -> LearnedError {
    LearnedError::Damaged { problem: problem.into() }
}

/// Refuses a header with a number larger than the file.
///
/// Offsets and extents cannot be, in an honest one; sums of those that are would leave the range of `usize` in the parser.
fn check_numbers(bytes: &[u8]) -> Result<(), LearnedError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(damaged(format!("{} bytes, a header alone takes 8", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        damaged(format!("the header should have {length} bytes, the file has {} in all", bytes.len()))
    })?;
    let (mut quoted, mut escaped, mut number) = (false, false, 0usize);
    for &byte in header {
        if quoted {
            (quoted, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        quoted = byte == b'"';
        number = match byte {
            b'0'..=b'9' => number.saturating_mul(10).saturating_add(usize::from(byte - b'0')),
            _ => 0,
        };
        if number > bytes.len() {
            return Err(damaged(format!(
                "its header has numbers of {number} and more, the file has {} bytes",
                bytes.len()
            )));
        }
    }
    Ok(())
}
