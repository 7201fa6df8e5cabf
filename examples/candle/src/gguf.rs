//! A GGUF file opened for reading: typed metadata and tensors by name.
//!
//! *Helps*: candle's reader returns values of any type and errors without a key; here a wrong file says which key is
//! missing or wrong. *Hurts*: it keeps the metadata (tokenizer included, a few MB) in memory while it lives: drop it
//! once model and tokenizer are built.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};

use crate::error::{Error, Result};

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    content: Content,
    file: BufReader<File>,
    hash: u64,
}

/// Of every tensor as many bytes, from its start and its middle, count towards the fingerprint: fine-tuning changes all of them,
/// and whole files of gigabytes need not be read twice.
const HASHED: usize = 4096;

impl Gguf {
    /// Opens a file and reads its header and metadata; tensors are read when asked for.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Gguf`] if it is not GGUF.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::open(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let content = Content::read(&mut file)
            .map_err(|source| Error::Gguf { path: path.clone(), source: Box::new(source) })?;
        Ok(Self { path, content, file, hash: FNV_OFFSET })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a tensor of this name exists.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Reads one tensor, still quantized, and checks its shape (outermost dimension first).
    pub(crate) fn tensor(&mut self, name: &str, want: &[usize]) -> Result<QTensor> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(Error::MissingTensor { name: name.into() });
        };
        if info.shape.dims() != want {
            return Err(Error::TensorShape {
                name: name.into(),
                got: info.shape.dims().to_vec(),
                want: want.to_vec(),
            });
        }
        let bad = |source| Error::Gguf { path: self.path.clone(), source: Box::new(source) };
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).map_err(bad)?;
        let data = tensor.data().map_err(bad)?;
        let middle = data.len() / 2;
        for part in
            [name.as_bytes(), &data[..data.len().min(HASHED)], &data[middle..data.len().min(middle + HASHED)]]
        {
            self.hash =
                part.iter().fold(self.hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME));
        }
        drop(data);
        Ok(tensor)
    }

    /// A number that differs between models, of the tensors read so far (FNV-1a).
    pub(crate) fn fingerprint(&self) -> u64 {
        self.hash
    }

    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// An unsigned integer of any width.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.value(key)
            .map(|value| as_integer(value).ok_or_else(|| bad(key, value, "an unsigned integer")))
            .transpose()
    }

    pub(crate) fn need_integer(&self, key: &str) -> Result<usize> {
        self.integer(key)?.ok_or_else(|| Error::MissingKey { key: key.into() })
    }

    /// A finite float of either width.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f32>> {
        self.value(key)
            .map(|value| {
                let number = match value {
                    Value::F32(x) => *x,
                    Value::F64(x) => *x as f32,
                    _ => f32::NAN,
                };
                if number.is_finite() { Ok(number) } else { Err(bad(key, value, "a finite float")) }
            })
            .transpose()
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.value(key)
            .map(|value| match value {
                Value::String(text) => Ok(text.as_str()),
                _ => Err(bad(key, value, "a string")),
            })
            .transpose()
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.value(key)
            .map(|value| match value {
                Value::Bool(flag) => Ok(*flag),
                _ => Err(bad(key, value, "a boolean")),
            })
            .transpose()
    }

    pub(crate) fn need_strings(&self, key: &str) -> Result<Vec<String>> {
        let value = self.value(key).ok_or_else(|| Error::MissingKey { key: key.into() })?;
        let Value::Array(items) = value else { return Err(bad(key, value, "an array of strings")) };
        items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(text.clone()),
                _ => Err(bad(key, item, "an array of strings")),
            })
            .collect()
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let Value::Array(items) = value else { return Err(bad(key, value, "an array of integers")) };
        items
            .iter()
            .map(|item| as_integer(item).ok_or_else(|| bad(key, item, "an array of unsigned integers")))
            .collect::<Result<Vec<_>>>()
            .map(Some)
    }
}

fn as_integer(value: &Value) -> Option<usize> {
    match value {
        Value::U8(x) => Some(usize::from(*x)),
        Value::U16(x) => Some(usize::from(*x)),
        Value::U32(x) => usize::try_from(*x).ok(),
        Value::U64(x) => usize::try_from(*x).ok(),
        Value::I8(x) => usize::try_from(*x).ok(),
        Value::I16(x) => usize::try_from(*x).ok(),
        Value::I32(x) => usize::try_from(*x).ok(),
        Value::I64(x) => usize::try_from(*x).ok(),
        _ => None,
    }
}

/// A vocabulary printed whole would bury the message, hence the cut.
pub(crate) fn bad(key: &str, value: &Value, want: &str) -> Error {
    let mut got = match value {
        Value::Array(items) => format!("an array of {}", items.len()),
        other => format!("{other:?}"),
    };
    if got.len() > 80 {
        got = got.chars().take(80).chain("…".chars()).collect();
    }
    Error::BadKey { key: key.into(), got, want: want.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_names_itself() {
        let error = Gguf::open("no/such/file.gguf").unwrap_err().to_string();
        assert!(error.contains("no/such/file.gguf"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_gguf_says_so() {
        let error = Gguf::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap_err();
        assert!(matches!(error, Error::Gguf { .. }), "{error}");
    }

    #[test]
    fn integers_of_every_width_are_taken_and_negatives_refused() {
        assert_eq!(as_integer(&Value::U64(7)), Some(7));
        assert_eq!(as_integer(&Value::I32(7)), Some(7));
        assert_eq!(as_integer(&Value::I32(-1)), None);
        assert_eq!(as_integer(&Value::F32(7.0)), None);
    }
}
