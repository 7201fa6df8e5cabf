//! Generation as an iterator of tokens.
//!
//! *Helps*: the caller decides what to do between tokens (print, measure, stop). *Hurts*: the token yielded last is not in
//! the cache yet, it is fed when the next one is asked for; feed it yourself before going on with another turn.

use kvsieve::{KvCache, SequenceId};

use crate::error::Result;
use crate::model::{Logits, Model};
use crate::sample::Sampler;
use crate::timings::Timings;

/// An iterator over generated tokens; see [`Model::generate`].
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a Model,
    cache: &'a mut KvCache,
    sequence: SequenceId,
    sampler: Sampler,
    stops: Vec<u32>,
    left: usize,
    /// Logits to sample from, or the token to feed first.
    next: Next,
    /// Time of the decode steps so far.
    pub timings: Timings,
}

#[derive(Debug)]
enum Next {
    Sample(Vec<f32>),
    Feed(u32),
    Ended,
}

impl Model {
    /// Generates up to `count` tokens from the logits after the prompt ([`Model::prefill`]), ending early before a token
    /// of `stops`.
    pub fn generate<'a>(
        &'a self,
        cache: &'a mut KvCache,
        sequence: SequenceId,
        logits: Vec<f32>,
        sampler: Sampler,
        stops: Vec<u32>,
        count: usize,
    ) -> Generation<'a> {
        let next = Next::Sample(logits);
        Generation {
            model: self,
            cache,
            sequence,
            sampler,
            stops,
            left: count,
            next,
            timings: Timings::default(),
        }
    }
}

impl Generation<'_> {
    fn step(&mut self) -> Result<Option<u32>> {
        if self.left == 0 {
            return Ok(None);
        }
        let token = match std::mem::replace(&mut self.next, Next::Ended) {
            Next::Ended => return Ok(None),
            Next::Sample(logits) => self.sampler.sample(&logits)?,
            Next::Feed(token) => {
                let forward = self.model.forward(self.cache, self.sequence, &[token], Logits::Last)?;
                self.timings += forward.timings;
                self.sampler.sample(&forward.last_row()?)?
            }
        };
        if self.stops.contains(&token) {
            return Ok(None);
        }
        self.left -= 1;
        self.next = Next::Feed(token);
        Ok(Some(token))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        // After an error the state is `Ended`, so the iterator is finished.
        self.step().transpose()
    }
}
