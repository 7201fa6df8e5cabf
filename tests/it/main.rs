//! The one integration binary: every file here is a module of it.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod conformance;
mod peers;
mod policies;
mod recipes;
mod tidy;
