//! kvsieve makes the KV cache of a transformer smaller and faster to read, and says what was lost.
//!
//! A host inference engine hands over Q, K and V of every layer, after its rotary embedding; the library
//! stores them in pages, attends over them, scores them, drops what a *policy* says may go, and gives the
//! memory back to the system. It needs no attention weights from the host: its own attention yields what
//! policies want to know.
//!
//! # When not to use it
//!
//! Nothing is gained on short contexts, where weights dominate memory and time. Eviction loses what later
//! questions may ask for; the pages under `docs/policies` record how much, on a real model. An engine that
//! cannot give up its own cache can only use [`KvCache::select`].
//!
//! # How it is used
//!
//! Describe the model ([`geometry::ModelShape`]), choose a [`Recipe`] and a [`Budget`], build a [`KvCache`],
//! then one [`Step`] per batch of new tokens. [`KvCache`] has a complete example; the crate
//! `examples/candle` is a whole engine.
//!
//! ```
//! use kvsieve::{KvCache, Budget, geometry::{LayerShape, ModelShape}};
//!
//! let shape = ModelShape::uniform(4, LayerShape::new(8, 2, 64))?;
//! // What a recipe needs, costs and runs on is known before a token arrives.
//! let cache = KvCache::builder(shape.clone())
//!     .recipe("snapkv(window=32)+alloc=adakv+k=f16+v=f16")
//!     .budget(Budget::Tokens(1024))
//!     .build()?;
//! println!("{}", cache.config());
//! // What does not fit together is an error that names the option to change.
//! let error = KvCache::builder(shape).recipe("snapkv").build().unwrap_err();
//! assert!(error.to_string().contains("must be told how many to keep"));
//! # Ok::<(), kvsieve::Error>(())
//! ```
//!
//! # Features
//!
//! - `lowrank` (on by default): truncated singular value decompositions (`factor`), by [faer](https://docs.rs/faer).
//! - `learned` (on by default): learned caches and profiles from files (`learned`), read by [safetensors](https://docs.rs/safetensors).
//! - `gpu` (off by default): the GPU backend, WGSL compute shaders through [wgpu](https://docs.rs/wgpu). Off because wgpu is most of the
//!   dependency tree.
//! - `testing` (off by default): the conformance suite of kernels and the fixtures of policies, for backends
//!   and policies outside this crate.
//!
//! # Where things are
//!
//! [`cache`] is what hosts call; [`policy`] and [`recipe`] decide what stays, [`index`] what a query reads; [`store`]
//! changes pages;
//! `factor` decomposes rows of many tokens into factors of low rank;
//! [`profile`] holds numbers learned of a model, which some policies go by;
//! `learned` reads them, and caches that were trained instead of computed;
//! [`kernel`] holds the numeric kernels, each with a scalar reference; [`backend`] runs them on CPU and GPU;
//! [`device`] talks to the system.

pub mod backend;
pub mod cache;
pub mod codec;
pub mod columns;
pub mod device;
pub mod error;
#[cfg(feature = "lowrank")]
pub mod factor;
pub mod geometry;
pub mod index;
pub mod kernel;
#[cfg(feature = "learned")]
pub mod learned;
pub mod low_rank;
pub mod plan;
pub mod policy;
pub mod profile;
pub mod recipe;
pub mod reduce;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod view;

#[cfg(feature = "gpu")]
pub use backend::Gpu;
pub use backend::{Backend, Cpu, Reference};
pub use cache::{KvCache, SequenceId, Step};
pub use error::Error;
pub use recipe::{Budget, Recipe};
#[cfg(feature = "gpu")]
pub use wgpu;

/// The README's example is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

/// And those of the page on learned caches.
#[cfg(doctest)]
#[doc = include_str!("../docs/learned-caches.md")]
pub struct LearnedCaches;
