//! Reducers: what becomes of the entries that a policy does not keep. Without one they are dropped; with one they are mixed
//! into entries that stay.
//!
//! A reducer sees what the policy saw and what it decided, and adds [`Merges`] to the plan: data that the cache validates
//! and applies while it compacts. So every reducer goes with every scorer and allocator, and never adds an entry. An entry
//! that takes others up remembers which positions it speaks for ([`crate::columns::MERGED`]) and, where the method says so,
//! how much more it weighs (its log-mass bias β).
//!
//! *Helps* a little, at small budgets: few dropped entries have a near twin among those kept. Mixing values and adding mass
//! ([`value_merge`]) is what measurements support. *Hurts* where keys are averaged: keys at different rotations have no
//! mean that any query would have asked for. And it costs a search for neighbours at every compaction.

use crate::device::HeadRows;
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::kernel::nearest::NearestArgs;
use crate::plan::{LayerPlan, Merges, Source, Target};
use crate::policy::registry::Entry;
use crate::policy::{LayerView, Needs, score};
use crate::profile::Profile;
use std::fmt::Debug;
use std::sync::Arc;

/// The last stage of a policy: what becomes of what leaves.
pub trait Reducer: Debug + Send + Sync {
    /// The name used in reports and errors.
    fn name(&self) -> &str;

    /// What must be recorded: queries only, no feed.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The part of a profile that it goes by and does not have yet; it cannot reduce before [`Reducer::bind`].
    fn lacks(&self) -> Option<&'static str> {
        None
    }

    /// The same reducer with its numbers out of a profile, which fits the model; `None` if it needs none.
    ///
    /// # Errors
    /// [`ProfileError`] for what is missing, or of other extents than the model's.
    fn bind(
        &self,
        _profile: &Profile,
        _shape: &ModelShape,
    ) -> Result<Option<Arc<dyn Reducer>>, ProfileError> {
        Ok(None)
    }

    /// Whether it works for this model. Called before anything runs.
    ///
    /// # Errors
    /// [`RecipeError::Conflict`] names the option to change.
    fn check(&self, _shape: &ModelShape) -> Result<(), RecipeError> {
        Ok(())
    }

    /// What of the entries that `plan` does not keep goes into which that it keeps.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError>;
}

/// What a reducer made of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reduced {
    /// For each KV head.
    pub merges: Vec<Merges>,
    /// What it wants to find in [`LayerView::remembered`] next time, if anything.
    pub remember: Vec<f32>,
}

impl From<Vec<Merges>> for Reduced {
    fn from(merges: Vec<Merges>) -> Self {
        Self { merges, remember: Vec::new() }
    }
}

macro_rules! reducers {
    ($($module:ident,)*) => {
        $(pub mod $module;)*

        /// The built-in reducers.
        pub const ENTRIES: &[Entry] = &[$($module::ENTRY,)*];
    };
}

// One line per reducer: the file of that name, with its `ENTRY`.
reducers! {
    value_merge,
    keepkv,
    kvmerger,
    lookm,
    cam,
    d2o,
    lococo,
}

/// An entry that leaves, and the kept one whose key is most like its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbour {
    /// Slot of the one that leaves.
    pub from: u32,
    /// Slot of the one that stays.
    pub into: u32,
    /// Cosine of their keys.
    pub cosine: f32,
}

/// For each KV head, every entry that leaves with its neighbour, by ascending slot. None in heads that keep nothing.
///
/// # Errors
/// [`PolicyError::Kernel`].
pub fn neighbours(view: &LayerView<'_>, plan: &LayerPlan) -> Result<Vec<Vec<Neighbour>>, PolicyError> {
    let leaving = plan.heads.iter().map(|p| if p.keep.is_empty() { Vec::new() } else { p.leaving() });
    let leaving: Vec<Vec<u32>> = leaving.collect();
    let from: Vec<&[u32]> = leaving.iter().map(Vec::as_slice).collect();
    let into: Vec<&[u32]> = plan.heads.iter().map(|p| p.keep.as_slice()).collect();
    let total = from.iter().map(|f| f.len()).sum();
    let (mut nearest, mut cosines) = (vec![0; total], vec![0.0; total]);
    view.backend.nearest(&mut NearestArgs {
        heads: view.heads,
        from: &from,
        into: &into,
        nearest: &mut nearest,
        cosines: &mut cosines,
    })?;
    let mut found = nearest.into_iter().zip(cosines);
    let heads = from.iter().zip(&into).map(|(from, into)| {
        let pairs = from.iter().zip(&mut found);
        pairs.map(|(&from, (at, cosine))| Neighbour { from, into: into[at as usize], cosine }).collect()
    });
    Ok(heads.collect())
}

/// Attention that the last `window` recorded queries paid to every entry: the mean over those that see it, summed over the
/// query heads of each KV head, head after head.
///
/// # Errors
/// [`PolicyError::Missing`], in the name of `reducer`, if no queries are recorded; [`PolicyError::Kernel`].
pub fn observed(reducer: &str, view: &LayerView<'_>, window: usize) -> Result<Vec<f32>, PolicyError> {
    let (weights, positions) = score::window_sums(reducer, view, window)?;
    let group = view.shape.group();
    let mut sums = Vec::with_capacity(weights.len() / group);
    let mut rest = weights.as_slice();
    for (head, rows) in view.lengths().into_iter().enumerate() {
        let (weights, behind) = rest.split_at(group * rows);
        rest = behind;
        sums.extend(view.positions(head).enumerate().map(|(j, position)| {
            let seen_by = positions.len() - positions.partition_point(|&query| query < position);
            (0..group).map(|g| weights[g * rows + j]).sum::<f32>() / seen_by.max(1) as f32
        }));
    }
    Ok(sums)
}

/// The merges of one KV head: `mix` says for every entry that has neighbours, which come by ascending slot, what it takes up
/// of them; the target's number of sources is filled in.
pub fn merge(
    mut neighbours: Vec<Neighbour>,
    keys: bool,
    mut mix: impl FnMut(u32, &[Neighbour]) -> Option<(Target, Vec<Source>)>,
) -> Merges {
    neighbours.sort_by_key(|n| (n.into, n.from));
    let mut merges = Merges { keys, ..Merges::default() };
    for group in neighbours.chunk_by(|a, b| a.into == b.into) {
        if let Some((target, sources)) = mix(group[0].into, group) {
            merges.push(target, sources);
        }
    }
    merges
}

/// The entry at `slot` and those that go into it with these weights, keys and values alike.
fn alike(
    slot: u32,
    own: f32,
    group: &[Neighbour],
    weight: impl Fn(&Neighbour) -> f32,
) -> (Target, Vec<Source>) {
    let source = |n: &Neighbour| Source { slot: n.from, key: weight(n), value: weight(n) };
    (Target { slot, sources: 0, key: own, value: own, bias: 0.0 }, group.iter().map(source).collect())
}

/// The most that β may reach by merging: sixteen entries' worth.
pub const BIAS_MOST: f32 = 2.772_588_7;

/// What may be added to an entry's β, of what a method would add.
fn bias_within(biases: &[f32], slot: u32, added: f32) -> f32 {
    added.min((BIAS_MOST - biases[slot as usize]).max(0.0))
}

/// β of every entry of a KV head.
fn biases(head: &HeadRows) -> Vec<f32> {
    head.pages().flat_map(|p| p.bias().map_or_else(|| vec![0.0; p.rows], <[f32]>::to_vec)).collect()
}

/// A number per entry, head after head, cut into heads.
fn by_head<'a>(heads: &'a [HeadRows], mut values: &'a [f32]) -> impl Iterator<Item = &'a [f32]> {
    heads.iter().map(move |head| {
        let (own, behind) = values.split_at(head.rows());
        values = behind;
        own
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_what_leaves_changes_nothing() {
        let neighbour = |from, into| Neighbour { from, into, cosine: 0.1 * from as f32 };
        let pairs = [(3, 9), (1, 9), (7, 2), (5, 9), (4, 2)].map(|(from, into)| neighbour(from, into));
        let merged = |pairs: &[Neighbour]| {
            merge(pairs.to_vec(), true, |slot, group| Some(alike(slot, 0.5, group, |n| n.cosine)))
        };
        let first = merged(&pairs);
        let slots: Vec<(u32, Vec<u32>)> =
            first.iter().map(|(t, s)| (t.slot, s.iter().map(|s| s.slot).collect())).collect();
        assert_eq!(slots, [(2, vec![4, 7]), (9, vec![1, 3, 5])]);
        for turn in 1..pairs.len() {
            let mut turned = pairs;
            turned.rotate_left(turn);
            assert_eq!(merged(&turned), first);
        }
    }

    #[test]
    fn an_entry_stands_for_sixteen_at_most() {
        let biases = [0.0, 2.0, 3.0];
        assert_eq!(bias_within(&biases, 0, 1.0), 1.0);
        assert_eq!(bias_within(&biases, 0, 9.0), BIAS_MOST);
        assert!((bias_within(&biases, 1, 9.0) - (BIAS_MOST - 2.0)).abs() < 1e-6);
        assert_eq!(bias_within(&biases, 2, 9.0), 0.0);
    }
}
