//! Replaying a context: the model is made to repeat what it has read, so that a policy sees what it looks at (KVzip).
//!
//! *Helps*: no question is needed to judge a context. *Hurts*: by about as many forward passes as the prompt took.

use candle_core::Tensor;
use kvsieve::cache::Replay;
use kvsieve::geometry::Position;
use kvsieve::{KvCache, SequenceId};

use crate::adapter::attended;
use crate::error::Result;
use crate::model::{Attend, Logits, Model};

/// How a context is repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// Tokens repeated at once.
    pub part: usize,
    /// Last tokens of the part before that stand before a part: where it starts is then no guess.
    pub overlap: usize,
    /// A request to repeat, before every part; may be empty.
    pub ask: Vec<u32>,
}

impl Default for Repeat {
    /// Parts of 2,000 tokens behind 8 of the one before, as in the paper, without a request.
    fn default() -> Self {
        Self { part: 2000, overlap: 8, ask: Vec::new() }
    }
}

/// Shorter parts would repeat little and cost a pass each: a context that has no room for them is an error.
const SHORTEST: usize = 64;

impl Repeat {
    /// The same in parts that leave no more than `room` positions behind the context used.
    #[must_use]
    pub fn within(mut self, room: usize) -> Self {
        let part = room.saturating_sub(self.overlap + self.ask.len()).max(SHORTEST);
        self.part = self.part.min(part);
        self
    }
}

/// Answers the model's attention hook from a replay.
struct Repeating<'a, 'cache>(&'a mut Replay<'cache>);

impl Attend for Repeating<'_, '_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        attended([q, k, v], |[q, k, v], out| self.0.attend(layer, q, k, v, out))
    }
}

impl Model {
    /// Has the model repeat the last `tokens` of a sequence, part by part; none of it stays but the scores.
    ///
    /// # Errors
    /// As [`Model::forward_with`], and whatever the cache refuses: a recipe that does not judge by replays, a context without
    /// room for a part and its repetition.
    pub fn replay(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        repeat: &Repeat,
    ) -> Result<()> {
        let first = cache.next_position(sequence)?.0 - tokens.len() as i32;
        let part = repeat.part.max(1);
        for start in (0..tokens.len()).step_by(part) {
            let end = tokens.len().min(start + part);
            let from = start.saturating_sub(repeat.overlap);
            let fed: Vec<u32> = repeat.ask.iter().chain(&tokens[from..end]).copied().collect();
            let range = Position(first + start as i32)..Position(first + end as i32);
            let mut replay = cache.replay(sequence, range, fed.len())?;
            let position = replay.start().0;
            self.forward_with(&mut Repeating(&mut replay), &fed, position, Logits::None)?;
            replay.finish()?;
        }
        Ok(())
    }
}
