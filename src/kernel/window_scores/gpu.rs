//! GPU implementation.
