//! A candle host for kvsieve: Llama-architecture GGUF models on the CPU whose attention is kvsieve's.
//!
//! Read [`adapter`] first: it is all that an engine needs to hand its attention to the library. The rest is a small
//! complete engine around it, so that policies and codecs can be judged on a real model: loading ([`Gguf`], [`Model`]),
//! tokens ([`Tokenizer`], [`ChatMl`]), sampling ([`Sampler`]), generation ([`Generation`]), and what candle itself does
//! today as the peer ([`Stock`]).
//!
//! *When not to use it*: as a server. One sequence runs at a time, on the CPU, with dense Llama models only.
//!
//! # Example
//!
//! ```no_run
//! use kvsieve::{Budget, KvCache, backend::Cpu};
//! use kvsieve_candle::{Gguf, Model, Sampler, Sampling, SpecialTokens, Tokenizer, Weights};
//!
//! let mut file = Gguf::open("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
//! let tokenizer = Tokenizer::from_gguf(&file)?;
//! let model = Model::from_gguf(&mut file, Weights::F32)?;
//!
//! let mut cache = KvCache::builder(model.shape()?)
//!     .recipe("snapkv(window=64)")
//!     .budget(Budget::Tokens(512))
//!     .backend(Cpu::default())
//!     .build()?;
//! let sequence = cache.create_sequence();
//!
//! let prompt = tokenizer.encode("A long document …", SpecialTokens::AsText)?;
//! let after = model.prefill(&mut cache, sequence, &prompt, 512, &mut |_| ())?;
//! let sampler = Sampler::new(Sampling::default())?;
//! let mut text = tokenizer.decoder();
//! for token in model.generate(&mut cache, sequence, after.last_row()?, sampler, tokenizer.stops(), 64) {
//!     print!("{}", text.push(token?));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
pub mod adapter;

mod blocks;
mod chat;
mod config;
mod error;
mod generate;
mod gguf;
mod model;
mod replay;
mod rope;
mod sample;
mod stock;
mod timings;
mod tokenizer;
mod weights;

/// What an [`Attend`] is handed, for implementations that name it.
pub use candle_core::Tensor;
pub use chat::{ChatMl, Role};
pub use config::Config;
pub use error::{Error, Result};
pub use generate::Generation;
pub use gguf::Gguf;
pub use model::{Attend, Forward, Logits, Model, Pass};
pub use replay::Repeat;
pub use rope::{Rotary, Scaling};
pub use sample::{Sampler, Sampling, argmax};
pub use stock::Stock;
pub use timings::Timings;
pub use tokenizer::{Decoder, SpecialTokens, Tokenizer};
pub use weights::Weights;
