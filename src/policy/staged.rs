//! A policy made of stages: scorer, allocator, protection, selection.
//!
//! *Helps* because nearly every eviction method is a scorer with a budget rule: one file each, any pair of
//! them. *Hurts* methods that choose entries jointly (diversity, chunks): those implement [`Policy`].

use super::allocate::{Ends, HeadRequest};
use super::{
    Allocator, Feed, LayerScores, LayerView, Needs, NewTokens, Policy, Scorer, TargetRequest, select,
};
use crate::columns::{ColumnSpec, ColumnsMut};
use crate::error::{PolicyError, ProfileError};
use crate::geometry::ModelShape;
use crate::plan::{HeadPlan, LayerPlan};
use crate::profile::Profile;
use std::ops::Range;
use std::sync::Arc;

/// A policy from parts: scorer, allocator, protection. The module explains them.
///
/// Every plan keeps exactly the allocated number of entries of each KV head, protected ones among them, and nothing is dropped
/// while a layer is within its target. Two rules drop more: a scorer's threshold ([`Scorer::threshold`]), and an allocator's
/// classes of heads ([`Allocator::ends`]).
#[derive(Clone, Debug)]
pub struct Staged {
    name: String,
    scorer: Arc<dyn Scorer>,
    allocator: Arc<dyn Allocator>,
    sinks: usize,
    recent: usize,
    marked_last: bool,
}

impl Staged {
    /// Joins a scorer and an allocator; `name` appears in reports and errors.
    pub fn new(name: impl Into<String>, scorer: Arc<dyn Scorer>, allocator: Arc<dyn Allocator>) -> Self {
        Self { name: name.into(), scorer, allocator, sinks: 0, recent: 0, marked_last: false }
    }

    /// Protects the first `sinks` entries of each KV head, or as many as the scorer asks for if that is more.
    #[must_use]
    pub fn sinks(mut self, sinks: usize) -> Self {
        self.sinks = sinks;
        self
    }

    /// Protects the last `recent` entries of each KV head, or as many as the scorer asks for if that is more.
    #[must_use]
    pub fn recent(mut self, recent: usize) -> Self {
        self.recent = recent;
        self
    }

    /// Whether entries that the host marked ([`crate::KvCache::mark`]) are dropped before any others that are not protected.
    #[must_use]
    pub fn marked_last(mut self, last: bool) -> Self {
        self.marked_last = last;
        self
    }

    /// The scorer.
    pub fn scorer(&self) -> &Arc<dyn Scorer> {
        &self.scorer
    }

    /// The allocator.
    pub fn allocator(&self) -> &Arc<dyn Allocator> {
        &self.allocator
    }

    fn protect(&self, target: usize) -> (usize, usize) {
        let (sinks, recent) = self.scorer.protect(target);
        (sinks.max(self.sinks), recent.max(self.recent))
    }

    /// One byte per entry of a layer, 1 = protected; and which heads keep nothing else.
    fn protection(&self, view: &LayerView<'_>, lengths: &[usize]) -> (Vec<u8>, Vec<bool>) {
        let (sinks, recent) = self.protect(view.target);
        let mut protect = Vec::with_capacity(lengths.iter().sum());
        let mut closed = Vec::with_capacity(lengths.len());
        for (head, &len) in lengths.iter().enumerate() {
            let ends = self.allocator.ends(view.layer, head);
            let Ends { sinks, recent } = ends.unwrap_or(Ends { sinks, recent });
            protect.extend(select::protection(&[len], view.target, sinks, recent));
            closed.push(ends.is_some());
        }
        (protect, closed)
    }

    /// The counts an allocator gave, if they are what every plan promises.
    fn check_counts(
        &self,
        view: &LayerView<'_>,
        lengths: &[usize],
        (protected, closed): (&[usize], &[bool]),
        counts: &[usize],
    ) -> Result<(), PolicyError> {
        let invalid = |head: usize, problem: String| {
            Err(PolicyError::InvalidPlan { policy: self.name.clone(), layer: view.layer, head, problem })
        };
        let allocator = self.allocator.name();
        if counts.len() != lengths.len() {
            return invalid(
                0,
                format!("{allocator} gave {} counts for {} KV heads", counts.len(), lengths.len()),
            );
        }
        for (head, &count) in counts.iter().enumerate() {
            let (low, high) = (protected[head], if closed[head] { protected[head] } else { lengths[head] });
            if !(low..=high).contains(&count) {
                return invalid(head, format!("{allocator} gave {count}, must be {low} ..= {high}"));
            }
        }
        let (sum, most) = (counts.iter().sum::<usize>(), view.target.saturating_mul(lengths.len()));
        if sum > most {
            return invalid(0, format!("{allocator} gave {sum} entries in all, the budget is {most}"));
        }
        Ok(())
    }
}

impl Policy for Staged {
    fn name(&self) -> &str {
        &self.name
    }

    fn needs(&self) -> Needs {
        self.scorer.needs()
    }

    fn columns(&self) -> Vec<ColumnSpec> {
        let mut columns = self.scorer.columns();
        if self.marked_last {
            columns.push(select::MARKED);
        }
        columns
    }

    fn observe(&self, feed: &Feed<'_>, columns: &mut ColumnsMut<'_>) {
        self.scorer.observe(feed, columns);
    }

    fn lacks(&self) -> Option<&'static str> {
        self.scorer.lacks().or_else(|| self.allocator.lacks())
    }

    fn bind(&self, profile: &Profile, shape: &ModelShape) -> Result<Option<Arc<dyn Policy>>, ProfileError> {
        let (scorer, allocator) = (self.scorer.bind(profile, shape)?, self.allocator.bind(profile, shape)?);
        if scorer.is_none() && allocator.is_none() {
            return Ok(None);
        }
        let mut bound = self.clone();
        bound.scorer = scorer.unwrap_or(bound.scorer);
        bound.allocator = allocator.unwrap_or(bound.allocator);
        Ok(Some(Arc::new(bound)))
    }

    fn rate(
        &self,
        tokens: &NewTokens<'_>,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), PolicyError> {
        self.scorer.rate(tokens, scratch, out)
    }

    fn stays(&self, layer: usize, head: usize) -> bool {
        self.scorer.threshold().is_none() && self.allocator.ends(layer, head).is_none()
    }

    fn needs_budget(&self) -> bool {
        self.allocator.needs_budget() && self.scorer.threshold().is_none()
    }

    fn equal_counts(&self) -> bool {
        self.allocator.equal_counts() && self.scorer.threshold().is_none()
    }

    fn protected(&self) -> (usize, usize) {
        self.protect(0)
    }

    fn measures(&self) -> bool {
        self.allocator.measure().is_some()
    }

    fn measure(&self, view: &LayerView<'_>) -> Result<Option<Vec<f32>>, PolicyError> {
        let Some(measure) = self.allocator.measure() else { return Ok(None) };
        let scores = self.scorer.score(view)?;
        select::check_scores(&self.name, view, &scores)?;
        let (protect, _) = self.protection(view, &scores.lengths);
        let (mut lengths, mut values) = (Vec::new(), Vec::new());
        let mut rest = protect.as_slice();
        for (head, &len) in scores.lengths.iter().enumerate() {
            let (own, behind) = rest.split_at(len);
            rest = behind;
            let free = scores.head(head).iter().zip(own).filter(|(_, protected)| **protected == 0);
            let before = values.len();
            values.extend(free.map(|(score, _)| *score));
            lengths.push(values.len() - before);
        }
        Ok(Some(measure(&LayerScores { lengths, values })))
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let recent = request.recent.max(self.protect(request.target).1);
        self.allocator.layer_targets(&TargetRequest { recent, ..request.clone() })
    }

    fn plan(&self, view: &LayerView<'_>) -> Result<LayerPlan, PolicyError> {
        let lengths = view.lengths();
        let (protect, closed) = self.protection(view, &lengths);
        let threshold = self.scorer.threshold();
        let within = lengths.iter().all(|&len| len <= view.target);
        let protected = select::protected_counts(&lengths, &protect);
        if within && threshold.is_none() {
            let heads = lengths.iter().zip(&closed).zip(protected.iter().zip(spans(&lengths)));
            let heads = heads.map(|((&len, &closed), (&count, span))| {
                if !closed || count == len {
                    return HeadPlan::identity(len);
                }
                let kept = (0..len as u32).zip(&protect[span]).filter(|(_, protected)| **protected != 0);
                HeadPlan::new(len, kept.map(|(slot, _)| slot).collect())
            });
            return Ok(heads.collect::<Vec<_>>().into());
        }
        let mut scores = self.scorer.score(view)?;
        select::check_scores(&self.name, view, &scores)?;
        if self.marked_last {
            select::marked_last(&self.name, view, &mut scores)?;
        }
        let mut counts = self.allocator.head_counts(&HeadRequest {
            layer: view.layer,
            target: view.target,
            scores: &scores,
            protect: &protect,
            backend: view.backend,
        })?;
        self.check_counts(view, &lengths, (&protected, &closed), &counts)?;
        if let Some(threshold) = threshold {
            for ((count, span), &protected) in counts.iter_mut().zip(spans(&lengths)).zip(&protected) {
                let entries = scores.values[span.clone()].iter().zip(&protect[span]);
                let above = entries.filter(|(score, protected)| **protected == 0 && **score >= threshold);
                *count = (*count).min(protected + above.count());
            }
        }
        select::top(view, &scores, &counts, &protect)
    }

    fn scores(&self, view: &LayerView<'_>) -> Result<Option<LayerScores>, PolicyError> {
        self.scorer.score(view).map(Some)
    }
}

/// Where each KV head's entries lie in a list of all.
fn spans(lengths: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
    lengths.iter().scan(0, |end, len| {
        *end += len;
        Some(*end - len..*end)
    })
}
