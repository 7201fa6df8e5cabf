//! A candle host for kvsieve.
mod chat;
mod config;
mod error;
mod gguf;
mod model;
mod rope;
mod sample;
mod stock;
mod timings;
mod tokenizer;
mod weights;

pub use chat::{ChatMl, Role};
pub use config::Config;
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use model::{Attend, Forward, Logits, Model, Pass};
pub use rope::{Rotary, Scaling};
pub use sample::{Sampler, Sampling, argmax};
pub use stock::Stock;
pub use timings::Timings;
pub use tokenizer::{Decoder, SpecialTokens, Tokenizer};
pub use weights::Weights;
