//! Every way the program fails. A message ends with what to change.

use std::path::{Path, PathBuf};

/// A failed command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A trace that does not follow its format.
    #[error("{}: {problem}; see the trace format in `kvsieve replay --help`", path.display())]
    Trace { path: PathBuf, problem: String },
    /// Something asked for that cannot be.
    #[error("{what}; {change}")]
    Usage { what: String, change: String },
    /// A figure could not be drawn.
    #[error("cannot draw {}: {problem}", path.display())]
    Figure { path: PathBuf, problem: String },
    /// The library.
    #[error(transparent)]
    Library(#[from] kvsieve::Error),
    /// The model host.
    #[error(transparent)]
    Host(#[from] kvsieve_candle::Error),
    /// The training of networks.
    #[error("candle failed in training: {0}")]
    Training(#[from] candle_core::Error),
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn usage(what: impl Into<String>, change: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), change: change.into() }
    }
}

macro_rules! through_library {
    ($($kind:ident),*) => {$(
        impl From<kvsieve::error::$kind> for Error {
            fn from(error: kvsieve::error::$kind) -> Self {
                Self::Library(error.into())
            }
        }
    )*};
}
through_library!(ShapeError, ViewError, RecipeError, CacheError, DeviceError, ProfileError);

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::File { action: "read", path: path.to_owned(), source })
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::File {
        action: "write",
        path: path.to_owned(),
        source,
    })
}
