//! The one integration binary: every file here is a module of it.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod conformance;
mod cache;
mod hostile;
mod state_machine;
mod support;
mod tidy;
