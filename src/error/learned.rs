//! Ways a learned cache can be unfit: for reading, for the model, or for the sequence it is loaded into.

/// A learned cache that cannot be read or does not fit; nothing was loaded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LearnedError {
    /// The file could not be read.
    #[error("could not read {path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// The bytes are not a safetensors file, or one that was cut off or changed.
    #[error(
        "not a whole safetensors file: {problem}; write it anew (a cartridge: with scripts/convert-cartridge.py)"
    )]
    Damaged {
        /// What is wrong.
        problem: String,
    },
    /// The file says something about itself that cannot be so, or does not say what it must.
    #[error("the file's metadata says {key} = {got}, must be {want}")]
    Metadata {
        /// The key.
        key: &'static str,
        /// What it says.
        got: String,
        /// What is accepted.
        want: String,
    },
    /// A tensor is not there.
    #[error(
        "the file has no tensor {tensor}, though its metadata says layers = {layers}; each needs its k and v"
    )]
    Missing {
        /// Its name.
        tensor: String,
        /// Layers the metadata promises.
        layers: usize,
    },
    /// A tensor is there that the metadata does not promise.
    #[error("the file has a tensor {tensor:?} beside those of the {layers} layers its metadata promises")]
    Unexpected {
        /// Its name.
        tensor: String,
        /// Layers the metadata promises.
        layers: usize,
    },
    /// Elements of a type that is not read.
    #[error("tensor {tensor} is of {got}, must be F32, F16 or BF16: store it as one of these")]
    ElementType {
        /// Its name.
        tensor: String,
        /// Its element type, as the file names it.
        got: String,
    },
    /// A tensor's extents contradict the metadata or another tensor.
    #[error("tensor {tensor} has the extents {got:?}, must have {want}")]
    Extents {
        /// Its name.
        tensor: String,
        /// Its extents.
        got: Vec<usize>,
        /// What is accepted.
        want: String,
    },
    /// NaN or infinity.
    #[error(
        "tensor {tensor} has {value} at KV head {head}, entry {entry}, dimension {dim}: it was not trained to the end, or damaged"
    )]
    NonFinite {
        /// Its name.
        tensor: String,
        /// The value.
        value: f32,
        /// KV head.
        head: usize,
        /// Entry.
        entry: usize,
        /// Dimension.
        dim: usize,
    },
    /// Learned for a model with another number of layers.
    #[error(
        "the cartridge has {got} layers, the model has {want} that own a cache: it was learned for another model"
    )]
    Layers {
        /// Of the cartridge.
        got: usize,
        /// Of the model.
        want: usize,
    },
    /// Learned for a model with other heads.
    #[error(
        "layer {layer}: {tensor} of the cartridge is for {} KV heads of dimension {}, the model has {} of dimension {}: it was learned for another model",
        .got.0, .got.1, .want.0, .want.1
    )]
    Heads {
        /// Layer of the model.
        layer: usize,
        /// "k" or "v".
        tensor: &'static str,
        /// KV heads and dimension of the cartridge.
        got: (usize, usize),
        /// KV heads and dimension of the model.
        want: (usize, usize),
    },
    /// Learned with another rotary embedding.
    #[error(
        "layer {layer}: the cartridge was learned with rope_theta = {got}, the model has {want}: its keys would be read at wrong angles"
    )]
    Theta {
        /// Layer of the model.
        layer: usize,
        /// Of the cartridge.
        got: f32,
        /// Of the model.
        want: f32,
    },
    /// Learned for another model, by name.
    #[error("the cartridge was learned for the model {got:?}, this is {want:?}")]
    Model {
        /// What the file says; empty if it does not.
        got: String,
        /// What was asked for.
        want: String,
    },
    /// The sequence has tokens already.
    #[error(
        "sequence {sequence} holds tokens up to position {next}, behind {learned} learned ones: load cartridges into a new sequence, before its first token"
    )]
    Occupied {
        /// The sequence.
        sequence: u64,
        /// Position of its next token.
        next: i32,
        /// Positions that hold learned entries.
        learned: i32,
    },
    /// The recipe drops entries, and would drop learned ones.
    #[error(
        "the recipe {recipe} drops entries, and learned ones must all stay: use the recipe full, or an index, which drops nothing"
    )]
    Evicts {
        /// The recipe.
        recipe: String,
    },
    /// A sliding window, out of which learned entries would move.
    #[error(
        "layer {layer} sees the last {window} positions only, and learned entries must be seen by every token: load cartridges for models without sliding windows"
    )]
    Window {
        /// The layer.
        layer: usize,
        /// Its window.
        window: u32,
    },
    /// The recipe packs entries, or makes products of low rank of them, and would do so with learned ones.
    #[error(
        "the recipe {recipe} keeps the first {sinks} entries exact and would pack, or make products of, others of the {tokens} learned ones, which nobody has tested: use exact=f16(sinks={tokens}), exact k= and v= without factor=, or allow it with LoadOptions::packed"
    )]
    Packs {
        /// The recipe.
        recipe: String,
        /// First entries that stay exact.
        sinks: usize,
        /// Learned entries there would be.
        tokens: usize,
    },
    /// Keys are to be moved and the rotary embedding is unknown.
    #[error(
        "layer {layer} has no rotary description, so keys cannot be moved to position {position}: set LayerShape::rotary, or load with CartridgePositions::AsTrained"
    )]
    NoRotary {
        /// The layer.
        layer: usize,
        /// Where the cartridge would start.
        position: i32,
    },
    /// A finite number that the storage type cannot hold.
    #[error(
        "layer {layer}: {tensor} of the cartridge has {value} at KV head {head}, entry {entry}, dimension {dim}: too large for {stored}; use {tensor}=bf16 or {tensor}=f32 (and exact=f32 beside packed storage)"
    )]
    Range {
        /// Layer of the model.
        layer: usize,
        /// "k" or "v".
        tensor: &'static str,
        /// The value.
        value: f32,
        /// KV head.
        head: usize,
        /// Entry.
        entry: usize,
        /// Dimension.
        dim: usize,
        /// How it would be stored.
        stored: String,
    },
}
