//! What can go wrong between a file on disk and a token.
//!
//! *Helps*: every variant names the file, key, tensor or number at fault and, where there is one, the way out.
//! *Hurts*: never; errors are built on cold paths only.

use std::path::PathBuf;

/// Any failure of this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not GGUF, is cut short, or uses a tensor type that candle does not know.
    #[error("{} cannot be read as GGUF: {source}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What candle said.
        source: Box<candle_core::Error>,
    },
    /// The file holds a model that this host does not run.
    #[error("the file holds a model this host does not run: {what}; it runs dense `llama` models")]
    Unsupported {
        /// The architecture or feature in the way.
        what: String,
    },
    /// A metadata key that has no default is absent.
    #[error("the GGUF metadata has no `{key}`")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata key is present with a value that makes no sense.
    #[error("the GGUF metadata has `{key}` = {got}; expected {want}")]
    BadKey {
        /// The key.
        key: String,
        /// The value, shortened.
        got: String,
        /// What would be accepted.
        want: String,
    },
    /// A tensor of the architecture is not in the file.
    #[error("the GGUF file has no tensor `{name}`")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor does not have the shape that the metadata implies.
    #[error("tensor `{name}` is {got:?}, but the metadata implies {want:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Its shape in the file, outermost dimension first.
        got: Vec<usize>,
        /// The shape implied.
        want: Vec<usize>,
    },
    /// More positions than the model was trained for.
    #[error(
        "the tokens would reach position {end}, but the model's context is {context} positions: \
         shorten the prompt or the generation (evicting entries frees memory, not positions)"
    )]
    Context {
        /// One past the last position asked for.
        end: usize,
        /// `llama.context_length`.
        context: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocabulary} tokens")]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocabulary: usize,
    },
    /// A layer that is not.
    #[error("layer {layer} of a model of {layers} layers")]
    Layer {
        /// The layer.
        layer: usize,
        /// Of the model.
        layers: usize,
    },
    /// Nothing to run.
    #[error("no tokens were given: {what} needs at least one")]
    NoTokens {
        /// The operation.
        what: &'static str,
    },
    /// The tokenizer of the file is of a kind that is not implemented.
    #[error("the file's tokenizer is `{key}` = `{got}`; supported: {supported}")]
    UnsupportedTokenizer {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        got: String,
        /// The values that work.
        supported: &'static str,
    },
    /// The tokenizer crate refused the vocabulary or the text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A sampling parameter outside its range.
    #[error("sampling: {name} = {got}; expected {want}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        got: f64,
        /// The accepted range.
        want: &'static str,
    },
    /// A refusal or failure of the cache.
    #[error(transparent)]
    Cache(Box<kvsieve::Error>),
    /// A failure inside candle while computing.
    #[error("candle: {0}")]
    Candle(Box<candle_core::Error>),
}

// kvsieve has one error per family of operations; an engine rarely tells them apart.
impl From<kvsieve::Error> for Error {
    fn from(error: kvsieve::Error) -> Self {
        Self::Cache(Box::new(error))
    }
}

impl From<kvsieve::error::CacheError> for Error {
    fn from(error: kvsieve::error::CacheError) -> Self {
        kvsieve::Error::from(error).into()
    }
}

impl From<kvsieve::error::ShapeError> for Error {
    fn from(error: kvsieve::error::ShapeError) -> Self {
        kvsieve::Error::from(error).into()
    }
}

impl From<kvsieve::error::ViewError> for Error {
    fn from(error: kvsieve::error::ViewError) -> Self {
        kvsieve::Error::from(error).into()
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(Box::new(error))
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
