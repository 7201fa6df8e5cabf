//! The one integration binary: every file here is a module of it.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, unreachable_pub, reason = "tests")]

mod cache;
mod conformance;
mod encodings;
#[cfg(feature = "lowrank")]
mod factor;
#[cfg(feature = "gpu")]
mod gpu;
mod guard;
mod heads;
mod hostile;
#[cfg(feature = "learned")]
mod learned;
mod lococo;
#[cfg(feature = "lowrank")]
mod low_rank;
mod parts;
mod peers;
mod policies;
mod ratings;
mod recipes;
mod reducers;
mod replay;
mod retrieval;
mod state_machine;
mod storage;
mod support;
mod tidy;
