//! CPU implementation.
