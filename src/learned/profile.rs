//! Profiles in files: safetensors whose tensors are called `part/array`.

use super::file::TensorFile;
use super::{PROFILE_FORMAT, VERSION};
use crate::error::{LearnedError, ProfileError};
use crate::profile::{Array, Geometry, Part, Profile};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::Path;

impl Profile {
    /// Reads a file and checks all of it; [`Profile::check`] holds it against a model.
    ///
    /// # Errors
    /// [`ProfileError`] names what is wrong, and where.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ProfileError> {
        Self::from_bytes(super::read(path.as_ref())?)
    }

    /// As [`Profile::open`], of a file's bytes.
    ///
    /// # Errors
    /// As [`Profile::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ProfileError> {
        let file = TensorFile::new(bytes)?;
        file.check_format(PROFILE_FORMAT)?;
        let mut numbers = [0; 5];
        for (name, number) in Geometry::NAMES.into_iter().zip(&mut numbers) {
            *number = file.count(name, "a whole number")?;
        }
        let model = file.says("model").unwrap_or_default().to_owned();
        let mut parts: HashMap<&str, Part> = HashMap::new();
        for (tensor, info) in &file.tensors {
            let Some((part, array)) =
                tensor.split_once('/').filter(|(part, array)| !part.is_empty() && !array.is_empty())
            else {
                return Err(ProfileError::Name { tensor: tensor.clone() });
            };
            // The file's reader has checked that so many elements are there.
            let mut numbers = vec![0.0; info.extents.iter().product()];
            file.read(info, 0, &mut numbers);
            let numbers = Array::new(info.extents.clone(), numbers).map_err(|error| match error {
                ProfileError::NonFinite { value, at } => {
                    let damage = format!("tensor {tensor} has {value} at element {at}");
                    LearnedError::Damaged { problem: damage }.into()
                }
                other => other,
            })?;
            let made = file.says(&format!("made.{part}")).unwrap_or_default();
            let filled = parts.remove(part).unwrap_or_else(|| Part::new(made)).with(array, numbers);
            parts.insert(part, filled);
        }
        let empty = Self::of(Geometry { model, numbers });
        Ok(parts.into_iter().fold(empty, |profile, (name, part)| profile.with(name, part)))
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`ProfileError::Name`] for names that would not read back.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ProfileError> {
        let mut said: HashMap<String, String> = HashMap::new();
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for (key, value) in [("format", PROFILE_FORMAT), ("version", VERSION), ("model", self.model())] {
            said.insert(key.to_owned(), value.to_owned());
        }
        for (name, number) in Geometry::NAMES.into_iter().zip(self.geometry().numbers) {
            said.insert(name.to_owned(), number.to_string());
        }
        for (name, part) in self.parts() {
            said.insert(format!("made.{name}"), part.made().to_owned());
            for (array, numbers) in part.arrays() {
                let tensor = format!("{name}/{array}");
                if name.is_empty() || name.contains('/') || array.is_empty() {
                    return Err(ProfileError::Name { tensor });
                }
                let bytes = numbers.numbers().iter().flat_map(|x| x.to_le_bytes()).collect();
                tensors.push((tensor, numbers.extents().to_vec(), bytes));
            }
        }
        let damaged =
            |error: safetensors::SafeTensorError| LearnedError::Damaged { problem: error.to_string() };
        let mut views = Vec::with_capacity(tensors.len());
        for (name, extents, bytes) in &tensors {
            views.push((name, TensorView::new(Dtype::F32, extents.clone(), bytes).map_err(damaged)?));
        }
        let bytes = safetensors::serialize(views, Some(said.into_iter().collect())).map_err(damaged)?;
        Ok(bytes)
    }

    /// Writes a file beside the old one and puts it in its place, so that a stop half-way loses neither.
    ///
    /// # Errors
    /// [`ProfileError::Write`]; as [`Profile::to_bytes`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ProfileError> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let written = std::fs::write(&fresh, bytes).and_then(|()| std::fs::rename(&fresh, path));
        written.map_err(|reason| ProfileError::Write {
            path: path.display().to_string(),
            reason: reason.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{LayerShape, ModelShape};

    fn profile() -> Profile {
        let shape = ModelShape::uniform(2, LayerShape::new(4, 2, 8)).unwrap().with_fingerprint("tiny-1");
        let array = |extents: Vec<usize>| {
            let count: usize = extents.iter().product();
            Array::new(extents, (0..count).map(|i| i as f32 * 0.37 - 1.0).collect()).unwrap()
        };
        let duo = Part::new("measured on text, 3 samples").with("gates", array(vec![2, 2]));
        let kvzap =
            Part::new("").with("layers.0.weight", array(vec![2, 7])).with("layers.0.bias", array(vec![2]));
        Profile::new(&shape).unwrap().with("duo", duo).with("kvzap", kvzap)
    }

    #[test]
    fn a_profile_survives_a_file() {
        let profile = profile();
        let bytes = profile.to_bytes().unwrap();
        assert_eq!(Profile::from_bytes(bytes.clone()).unwrap(), profile);
        assert_eq!(profile.to_bytes().unwrap().len(), bytes.len());
        let path = std::env::temp_dir().join(format!("kvsieve-profile-{}.safetensors", std::process::id()));
        profile.save(&path).unwrap();
        assert_eq!(Profile::open(&path).unwrap(), profile);
        std::fs::remove_file(&path).unwrap();
        let missing = Profile::open(&path).unwrap_err().to_string();
        assert!(missing.starts_with("could not read "), "{missing}");
    }

    #[test]
    fn damage_is_refused() {
        let bytes = profile().to_bytes().unwrap();
        for end in [0, 7, 8, 40, bytes.len() - 1] {
            assert!(Profile::from_bytes(bytes[..end].to_vec()).is_err(), "cut at {end}");
        }
        let mut nan = bytes.clone();
        let last = nan.len() - 4;
        nan[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        let error = Profile::from_bytes(nan).unwrap_err().to_string();
        assert!(error.contains("has NaN at element"), "{error}");
        // Every byte of the header changed in turn: an error or another profile, never a panic.
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for at in 0..header {
            let mut changed = bytes.clone();
            changed[at] ^= 0x15;
            let _ = Profile::from_bytes(changed);
        }
        let text = String::from_utf8_lossy(&bytes[8..header]).into_owned();
        let renamed = text.replace("kvsieve-profile", "kvsieve-profilf");
        let other = [&bytes[..8], renamed.as_bytes(), &bytes[header..]].concat();
        let error = Profile::from_bytes(other).unwrap_err().to_string();
        assert!(error.contains("format = kvsieve-profilf"), "{error}");
        let nameless = text.replace("duo/gates", "duogates_");
        let other = [&bytes[..8], nameless.as_bytes(), &bytes[header..]].concat();
        assert!(matches!(Profile::from_bytes(other), Err(ProfileError::Name { .. })));
    }
}
