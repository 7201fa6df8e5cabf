//! Ways a profile can be unfit: for reading, for the model, or for the method that asks it.

use super::LearnedError;

/// A profile that cannot be read, or does not fit the model or the method.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file is no safetensors file, of another format, or damaged.
    #[error(transparent)]
    File(#[from] LearnedError),
    /// The file could not be written.
    #[error("could not write {path}: {reason}")]
    Write {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// Numbers and extents do not go together.
    #[error("an array of extents {extents:?} was given {got} numbers")]
    Count {
        /// How many along each axis.
        extents: Vec<usize>,
        /// Numbers given.
        got: usize,
    },
    /// NaN or infinity.
    #[error("number {at} is {value}: only finite ones can be used")]
    NonFinite {
        /// The number.
        value: f32,
        /// Its index.
        at: usize,
    },
    /// A tensor whose name says no part.
    #[error("the file has a tensor {tensor:?}, and names are part/array")]
    Name {
        /// Its name.
        tensor: String,
    },
    /// A model whose layers have different heads.
    #[error(
        "layer {layer} has query heads, KV heads, d_k and d_v {got:?}, layer 0 has {first:?}: profiles are for models whose layers are alike"
    )]
    Mixed {
        /// The layer.
        layer: usize,
        /// Its heads and dimensions.
        got: [usize; 4],
        /// Those of layer 0.
        first: [usize; 4],
    },
    /// Made for a model of another geometry.
    #[error("the profile was made for a model with {what} = {got}, this one has {want}")]
    Geometry {
        /// What differs.
        what: &'static str,
        /// In the profile.
        got: usize,
        /// In the model.
        want: usize,
    },
    /// Made for other weights.
    #[error("the profile was made for the model {got:?}, this is {want:?}: make one with kvsieve calibrate")]
    Model {
        /// Fingerprint in the profile.
        got: String,
        /// Of the model.
        want: String,
    },
    /// A part is not there.
    #[error(
        "the profile has no part {part} (it has: {known}); make it with kvsieve calibrate, or as docs/profiles.md says"
    )]
    NoPart {
        /// What was asked for.
        part: &'static str,
        /// What is there.
        known: String,
    },
    /// An array is not there.
    #[error("part {part} of the profile has no array {array}: it was made by another version, or damaged")]
    NoArray {
        /// The part.
        part: &'static str,
        /// The array.
        array: String,
    },
    /// An array does not fit the model.
    #[error("array {array} of part {part} has the extents {got:?}, must have [{want}]")]
    Extents {
        /// The part.
        part: &'static str,
        /// The array.
        array: String,
        /// Its extents.
        got: Vec<usize>,
        /// What they must be.
        want: String,
    },
    /// A weight below 0.
    #[error("array {array} of part {part} has {value} at {at}: must not be negative")]
    Negative {
        /// The part.
        part: &'static str,
        /// The array.
        array: String,
        /// Index of the number.
        at: usize,
        /// The number.
        value: f32,
    },
    /// A number outside its range.
    #[error("array {array} of part {part} has {value} at {at}: must be {want}")]
    Range {
        /// The part.
        part: &'static str,
        /// The array.
        array: String,
        /// Index of the number.
        at: usize,
        /// The number.
        value: f32,
        /// What it must be.
        want: &'static str,
    },
}
