//! Profiles: numbers learned or measured once per model, which some policies go by.
//!
//! A [`Profile`] holds *parts*, one for each kind of number (`locret`, `kvzap`, `lococo`, `duo`, `heads`, `errors`), and a part holds arrays under
//! names. It says which model it was made for and how; [`Profile::check`] holds it against a model before a policy takes anything
//! from it. `kvsieve calibrate` makes them; with the feature `learned` they are read from and written to files
//! ([`Profile::open`], [`Profile::save`]).
//!
//! *Helps* because methods that know a model before they see the text differ only in what they learned: reading, checking and
//! saving are the same for all. *Hurts* where a model has no fingerprint ([`ModelShape::with_fingerprint`]): then a profile of
//! another model of equal geometry cannot be told from its own.
//!
//! | part | arrays | for |
//! |---|---|---|
//! | `locret` | per layer `layers.{l}.up` `[r, (Hq+H)·d_k + H·d_v]`, `layers.{l}.down` `[H, r]` | retaining heads over q, k, v before rotation |
//! | `kvzap` | per layer `layers.{l}.weight` `[H, D]`, `layers.{l}.bias` `[H]`; or with a hidden layer `layers.{l}.up` `[r, D]`, `layers.{l}.up_bias` `[r]` and `weight` `[H, r]` | log of replay scores from hidden states |
//! | `lococo` | per layer `layers.{l}.weight` `[m, d_k + d_v, n]`, `n` odd, `layers.{l}.bias` `[m]`, `layers.{l}.blend` `[1]` in 0 ..= 1 | convolutions over entries that are merged |
//! | `duo` | `gates` `[L, H]`, higher is more of a retrieval head | classes of KV heads |
//! | `heads` | `scores` `[L, Hq]`, ≥ 0 | semantic retrieval heads |
//! | `errors` | `layers` `[L]`, ≥ 0 | error of each layer's output when compressed |
//! | `codebooks` | see [`crate::index::Codebooks::to_part`] | codewords of an index of codes |
//!
//! ```
//! use kvsieve::geometry::{LayerShape, ModelShape};
//! use kvsieve::profile::{Array, Part, Profile};
//!
//! let shape = ModelShape::uniform(2, LayerShape::new(4, 2, 8))?.with_fingerprint("tiny-1");
//! let gates = Array::new(vec![2, 2], vec![0.9, 0.1, 0.2, 0.8])?;
//! let profile = Profile::new(&shape)?.with("duo", Part::new("by hand").with("gates", gates));
//! profile.check(&shape)?;
//! assert!(profile.check(&shape.with_fingerprint("tiny-2")).is_err());
//! # Ok::<(), kvsieve::Error>(())
//! ```

use crate::error::ProfileError;
use crate::geometry::ModelShape;
use std::collections::BTreeMap;

/// Numbers with extents, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    extents: Vec<usize>,
    numbers: Vec<f32>,
}

impl Array {
    /// Takes numbers of these extents.
    ///
    /// # Errors
    /// [`ProfileError::Count`] if the extents multiply to another number, [`ProfileError::NonFinite`] for NaN and infinity.
    pub fn new(extents: Vec<usize>, numbers: Vec<f32>) -> Result<Self, ProfileError> {
        let count = extents.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
        if count != Some(numbers.len()) {
            return Err(ProfileError::Count { extents, got: numbers.len() });
        }
        match numbers.iter().position(|x| !x.is_finite()) {
            Some(at) => Err(ProfileError::NonFinite { value: numbers[at], at }),
            None => Ok(Self { extents, numbers }),
        }
    }

    /// How many along each axis.
    pub fn extents(&self) -> &[usize] {
        &self.extents
    }

    /// The numbers, the last axis fastest.
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }
}

/// What one kind of method goes by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    made: String,
    arrays: BTreeMap<String, Array>,
}

impl Part {
    /// An empty part; `made` says how and on what its numbers were learned.
    pub fn new(made: impl Into<String>) -> Self {
        Self { made: made.into(), arrays: BTreeMap::new() }
    }

    /// The same with an array, in place of one of that name.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, array: Array) -> Self {
        self.arrays.insert(name.into(), array);
        self
    }

    /// How and on what it was made.
    pub fn made(&self) -> &str {
        &self.made
    }

    /// The array of a name.
    pub fn array(&self, name: &str) -> Option<&Array> {
        self.arrays.get(name)
    }

    /// Names and arrays.
    pub fn arrays(&self) -> impl Iterator<Item = (&str, &Array)> {
        self.arrays.iter().map(|(name, array)| (name.as_str(), array))
    }
}

/// What a profile knows of the model it was made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// [`ModelShape::fingerprint`]; empty if it had none.
    pub(crate) model: String,
    /// Under the names of [`Geometry::NAMES`].
    pub(crate) numbers: [usize; 5],
}

impl Geometry {
    pub(crate) const NAMES: [&str; 5] = ["layers", "query_heads", "kv_heads", "d_k", "d_v"];

    fn of(shape: &ModelShape) -> Result<Self, ProfileError> {
        let heads = |l: usize| {
            let layer = shape.layer(l);
            [layer.query_heads, layer.kv_heads, layer.d_k, layer.d_v]
        };
        let first = heads(0);
        if let Some(layer) = (1..shape.layers()).find(|&l| heads(l) != first) {
            return Err(ProfileError::Mixed { layer, got: heads(layer), first });
        }
        let [q, k, d_k, d_v] = first;
        let model = shape.fingerprint().unwrap_or_default().to_owned();
        Ok(Self { model, numbers: [shape.layers(), q, k, d_k, d_v] })
    }
}

/// See the [module](self).
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    geometry: Geometry,
    parts: BTreeMap<String, Part>,
}

impl Profile {
    /// An empty profile of a model.
    ///
    /// # Errors
    /// [`ProfileError::Mixed`] if its layers have different heads.
    pub fn new(shape: &ModelShape) -> Result<Self, ProfileError> {
        Ok(Self::of(Geometry::of(shape)?))
    }

    pub(crate) fn of(geometry: Geometry) -> Self {
        Self { geometry, parts: BTreeMap::new() }
    }

    #[cfg(feature = "learned")]
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The same with a part, in place of one of that name.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, part: Part) -> Self {
        self.parts.insert(name.into(), part);
        self
    }

    /// The fingerprint of the model it was made for; empty if that had none.
    pub fn model(&self) -> &str {
        &self.geometry.model
    }

    /// Names and parts.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &Part)> {
        self.parts.iter().map(|(name, part)| (name.as_str(), part))
    }

    /// A part.
    ///
    /// # Errors
    /// [`ProfileError::NoPart`] names those there are.
    pub fn part(&self, name: &'static str) -> Result<&Part, ProfileError> {
        self.parts.get(name).ok_or_else(|| ProfileError::NoPart {
            part: name,
            known: self.parts.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// An array of a part, with the extents it must have; `None` where any will do.
    ///
    /// # Errors
    /// [`ProfileError::NoPart`], [`ProfileError::NoArray`], [`ProfileError::Extents`].
    pub fn array(
        &self,
        part: &'static str,
        name: &str,
        want: &[Option<usize>],
    ) -> Result<&Array, ProfileError> {
        let found = self.part(part)?;
        let array =
            found.array(name).ok_or_else(|| ProfileError::NoArray { part, array: name.to_owned() })?;
        let fits = |(got, want): (&usize, &Option<usize>)| want.is_none_or(|want| *got == want) && *got > 0;
        if array.extents.len() == want.len() && array.extents.iter().zip(want).all(fits) {
            return Ok(array);
        }
        let want: Vec<_> = want.iter().map(|w| w.map_or("any".to_owned(), |w| w.to_string())).collect();
        let (array, got) = (name.to_owned(), array.extents.clone());
        Err(ProfileError::Extents { part, array, got, want: want.join(", ") })
    }

    /// As [`Profile::array`], of numbers that must not be negative.
    ///
    /// # Errors
    /// As there; [`ProfileError::Negative`].
    pub fn weights(
        &self,
        part: &'static str,
        name: &str,
        want: &[Option<usize>],
    ) -> Result<&Array, ProfileError> {
        let array = self.array(part, name, want)?;
        match array.numbers.iter().position(|x| *x < 0.0) {
            Some(at) => {
                Err(ProfileError::Negative { part, array: name.to_owned(), at, value: array.numbers[at] })
            }
            None => Ok(array),
        }
    }

    /// Whether it was made for this model: the geometry, and the fingerprint where both sides have one.
    ///
    /// # Errors
    /// [`ProfileError::Geometry`], [`ProfileError::Model`], [`ProfileError::Mixed`].
    pub fn check(&self, shape: &ModelShape) -> Result<(), ProfileError> {
        let model = Geometry::of(shape)?;
        for ((what, got), want) in Geometry::NAMES.into_iter().zip(self.geometry.numbers).zip(model.numbers) {
            if got != want {
                return Err(ProfileError::Geometry { what, got, want });
            }
        }
        let (got, want) = (&self.geometry.model, model.model);
        if !got.is_empty() && !want.is_empty() && *got != want {
            return Err(ProfileError::Model { got: got.clone(), want });
        }
        Ok(())
    }

    /// The parts of both, `other`'s in place of those of the same name.
    ///
    /// # Errors
    /// [`ProfileError::Model`] or [`ProfileError::Geometry`] if they are of different models.
    pub fn join(mut self, other: Self) -> Result<Self, ProfileError> {
        for ((what, want), got) in
            Geometry::NAMES.into_iter().zip(self.geometry.numbers).zip(other.geometry.numbers)
        {
            if got != want {
                return Err(ProfileError::Geometry { what, got, want });
            }
        }
        if self.geometry.model != other.geometry.model {
            return Err(ProfileError::Model { got: other.geometry.model, want: self.geometry.model });
        }
        self.parts.extend(other.parts);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::LayerShape;

    fn shape() -> ModelShape {
        ModelShape::uniform(2, LayerShape::new(4, 2, 8)).unwrap()
    }

    fn gates(extents: Vec<usize>, numbers: Vec<f32>) -> Profile {
        let part = Part::new("by hand").with("gates", Array::new(extents, numbers).unwrap());
        Profile::new(&shape()).unwrap().with("duo", part)
    }

    #[test]
    fn arrays_are_what_they_say() {
        assert_eq!(
            Array::new(vec![2, 3], vec![0.0; 5]).unwrap_err().to_string(),
            "an array of extents [2, 3] was given 5 numbers"
        );
        assert!(Array::new(vec![usize::MAX, 2], Vec::new()).is_err(), "the product overflows");
        let error = Array::new(vec![2], vec![1.0, f32::NAN]).unwrap_err().to_string();
        assert_eq!(error, "number 1 is NaN: only finite ones can be used");
    }

    #[test]
    fn what_is_asked_for_must_be_there_as_asked() {
        let profile = gates(vec![2, 2], vec![0.5, -1.0, 0.0, 1.0]);
        assert_eq!(profile.array("duo", "gates", &[Some(2), None]).unwrap().extents(), [2, 2]);
        let message = |error: ProfileError| error.to_string();
        assert_eq!(
            message(profile.array("heads", "scores", &[]).unwrap_err()),
            "the profile has no part heads (it has: duo); make it with kvsieve calibrate, or as docs/profiles.md says"
        );
        assert_eq!(
            message(profile.array("duo", "scores", &[]).unwrap_err()),
            "part duo of the profile has no array scores: it was made by another version, or damaged"
        );
        assert_eq!(
            message(profile.array("duo", "gates", &[Some(2), Some(3)]).unwrap_err()),
            "array gates of part duo has the extents [2, 2], must have [2, 3]"
        );
        assert_eq!(
            message(profile.weights("duo", "gates", &[Some(2), Some(2)]).unwrap_err()),
            "array gates of part duo has -1 at 1: must not be negative"
        );
    }

    #[test]
    fn another_model_is_refused_by_what_differs() {
        let profile = gates(vec![2, 2], vec![0.0; 4]);
        profile.check(&shape()).unwrap();
        let other = ModelShape::uniform(3, LayerShape::new(4, 2, 8)).unwrap();
        assert_eq!(
            profile.check(&other).unwrap_err().to_string(),
            "the profile was made for a model with layers = 2, this one has 3"
        );
        let other = ModelShape::uniform(2, LayerShape::new(4, 1, 8)).unwrap();
        assert!(matches!(
            profile.check(&other).unwrap_err(),
            ProfileError::Geometry { what: "kv_heads", got: 2, want: 1 }
        ));
        let mixed = ModelShape::new(vec![LayerShape::new(4, 2, 8), LayerShape::new(4, 4, 8)]).unwrap();
        assert!(matches!(Profile::new(&mixed), Err(ProfileError::Mixed { layer: 1, .. })));
        // A fingerprint counts where both sides have one.
        let named = Profile::new(&shape().with_fingerprint("a")).unwrap();
        named.check(&shape()).unwrap();
        assert_eq!(
            named.check(&shape().with_fingerprint("b")).unwrap_err().to_string(),
            "the profile was made for the model \"a\", this is \"b\": make one with kvsieve calibrate"
        );
        assert!(named.join(profile).is_err(), "parts of different models do not go into one profile");
    }
}
