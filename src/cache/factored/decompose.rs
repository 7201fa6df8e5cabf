//! When a run of entries becomes one of factors, and how: rows turned back and decomposed, compared with what they would
//! replace, and put in their place.

use super::super::KvCache;
use super::super::sequence::SequenceId;
use super::Watch;
use crate::backend::Backend;
use crate::device::angles::Angles;
use crate::device::factors::{BASIS_PAD, Factors, Kept};
use crate::device::page::Side;
use crate::device::{HeadRows, PageLayout, Pool};
use crate::error::{Error, FactorError, KernelError};
use crate::factor::{self, FactorOptions, FromFn};
use crate::geometry::{KeyPhase, LayerShape, Rotary};
use crate::index::stray;
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::low_rank::{LowRank, LowRankProgress, LowRankRun, Rank, Refused, SideOutcome};
use crate::store::{self, SharedPositions};
use crate::view::DType;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

/// Latent rows are stored times this, a power of two near the root of their number, and bases divided by it: rows of
/// length 1 over thousands of entries have elements that half precision rounds to nothing.
fn lift(tokens: usize) -> f32 {
    2.0f32.powi(((tokens as f32).log2() / 2.0).round() as i32)
}

/// Chunks that are read at once to find outliers.
const CHUNKS_READ: usize = 512;

/// A group of layers and the entries between their sinks and tails.
struct Group<'a> {
    backend: &'a dyn Backend,
    /// Geometry, KV heads and layout of each layer.
    layers: Vec<(&'a LayerShape, &'a [HeadRows], &'a PageLayout)>,
    slots: Range<usize>,
    /// Of each layer whose keys are turned.
    angles: Vec<Option<Arc<Angles>>>,
    positions: Vec<i32>,
    /// Chunks of each KV head whose keys are kept, and the entries of the first one among all, counted from the sinks' end.
    chunks: Chunks,
}

/// Which entries of a run go together, and how many of these chunks are outliers.
#[derive(Clone, Copy, Debug)]
struct Chunks {
    /// Entries of a chunk.
    size: usize,
    /// First entry of the run that begins a chunk.
    first: usize,
    /// Chunks that lie in the run.
    count: usize,
    /// Of these, outliers.
    outliers: usize,
}

impl Chunks {
    /// Those of a run of entries at some slots: chunks are counted from the end of the sinks, as pages of an index are.
    fn of(low_rank: &LowRank, sinks: usize, slots: &Range<usize>, outliers: usize) -> Self {
        let size = low_rank.chunk.max(1);
        let first = (slots.start.saturating_sub(sinks)).next_multiple_of(size) + sinks - slots.start;
        let count = slots.len().saturating_sub(first) / size;
        Self { size, first, count, outliers: outliers.min(count) }
    }

    /// Entries whose keys are kept.
    fn entries(&self) -> usize {
        self.outliers * self.size
    }
}

/// One side of a group, decomposed.
struct Decomposed {
    factors: factor::Factors,
    lift: f32,
}

impl Group<'_> {
    fn dim(shape: &LayerShape, keys: bool) -> usize {
        if keys { shape.d_k } else { shape.d_v }
    }

    fn features(&self, keys: bool) -> usize {
        self.layers.iter().map(|(shape, heads, _)| heads.len() * Self::dim(shape, keys)).sum()
    }

    /// Rows from `first` on: the heads of the layers side by side, keys turned back.
    fn read(&self, keys: bool, first: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let features = self.features(keys);
        let count = out.len() / features;
        let slots: Vec<u32> = (0..count).map(|i| (self.slots.start + first + i) as u32).collect();
        let mut column = 0;
        for ((shape, heads, _), angles) in self.layers.iter().zip(&self.angles) {
            let d = Self::dim(shape, keys);
            let (mut k, mut v) = (vec![0.0; count * shape.d_k], vec![0.0; count * shape.d_v]);
            for head in *heads {
                let target = GatherTarget::Dense { keys: &mut k, values: &mut v };
                self.backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
                let rows = if keys { &mut k } else { &mut v };
                let positions = &self.positions[first..first + count];
                for ((row, out), &position) in
                    rows.chunks_exact_mut(d).zip(out.chunks_exact_mut(features)).zip(positions)
                {
                    if let Some(angles) = angles.as_ref().filter(|_| keys) {
                        angles.turn(position, row, true);
                    }
                    out[column..column + d].copy_from_slice(row);
                }
                column += d;
            }
        }
        Ok(())
    }

    fn decompose(
        &self,
        keys: bool,
        (rank, low_rank): (usize, &LowRank),
        pool: &Pool,
        watch: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Decomposed, FactorError> {
        let rows = FromFn::new(self.slots.len(), self.features(keys), |first, out: &mut [f32]| {
            self.read(keys, first, out)
        });
        let options = FactorOptions { tolerance: low_rank.tolerance, ..FactorOptions::new(rank) };
        let factors = factor::factor(&rows, &options, pool, &mut |progress| watch(progress.share()))?;
        Ok(Decomposed { factors, lift: lift(self.slots.len()) })
    }

    /// The keys of a KV head's outliers: chunks with a key that points furthest away from the mean of its chunk; of equals the
    /// older.
    fn kept(&self, (layer, head): (usize, &HeadRows)) -> Result<Option<Kept>, Error> {
        let Chunks { size, first, count, outliers } = self.chunks;
        if outliers == 0 {
            return Ok(None);
        }
        let (shape, _, layout) = self.layers[layer];
        let read = |slots: &[u32]| -> Result<Vec<f32>, KernelError> {
            let (mut keys, mut values) =
                (vec![0.0; slots.len() * shape.d_k], vec![0.0; slots.len() * shape.d_v]);
            let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
            self.backend.gather(&mut GatherArgs { head, slots, target })?;
            Ok(keys)
        };
        let entries = |chunks: Range<usize>| first + chunks.start * size..first + chunks.end * size;
        let slot = |entry: usize| (self.slots.start + entry) as u32;
        let mut strays = Vec::with_capacity(count);
        for from in (0..count).step_by(CHUNKS_READ) {
            let slots: Vec<u32> = entries(from..(from + CHUNKS_READ).min(count)).map(slot).collect();
            let keys = read(&slots)?;
            strays.extend(keys.chunks_exact(size * shape.d_k).map(|chunk| stray(chunk, shape.d_k)));
        }
        let mut chunks: Vec<usize> = (0..count).collect();
        chunks.sort_by(|&a, &b| strays[b].total_cmp(&strays[a]));
        chunks.truncate(outliers);
        chunks.sort_unstable();
        let kept: Vec<usize> = chunks.into_iter().flat_map(|chunk| entries(chunk..chunk + 1)).collect();
        let mut keys = read(&kept.iter().map(|&entry| slot(entry)).collect::<Vec<_>>())?;
        if let Some(angles) = &self.angles[layer] {
            for (&entry, key) in kept.iter().zip(keys.chunks_exact_mut(shape.d_k)) {
                angles.turn(self.positions[entry], key, true);
            }
        }
        let dtype = |side| layout.encoding(side).exact().unwrap_or(DType::F32);
        let none = (store::Matrix { rows: &[], rank: 0 }, dtype(Side::Value));
        let rows = (store::Matrix { rows: &keys, rank: shape.d_k }, dtype(Side::Key));
        let keys = Arc::new(store::latents(self.backend, kept.len(), rows, none)?);
        Ok(Some(Kept { latents: kept.into_iter().map(|entry| entry as u32).collect(), keys }))
    }

    /// Bytes of the run as it is, and as factors of these ranks; 0 leaves a side as it is.
    fn bytes(&self, ranks: [usize; 2]) -> (usize, usize) {
        let entries = self.slots.len();
        let element = |layout: &PageLayout, side| layout.encoding(side).exact().map_or(0, DType::bytes);
        let (mut exact, mut factored) = (0, 0);
        for (side, rank) in [Side::Key, Side::Value].into_iter().zip(ranks) {
            factored += entries * rank * element(self.layers[0].2, side);
            for (shape, heads, layout) in &self.layers {
                let rows = heads.len() * entries * layout.row_bytes(side);
                let d = Self::dim(shape, side == Side::Key).next_multiple_of(BASIS_PAD);
                exact += rows;
                factored += if rank > 0 { heads.len() * rank * d * element(layout, side) } else { rows };
                if rank > 0 && side == Side::Key {
                    let key = layout.row_bytes(side) + size_of::<u32>();
                    factored += heads.len() * self.chunks.entries() * key;
                }
            }
        }
        (exact, factored)
    }
}

impl KvCache {
    /// Stores what waits as products of low rank, if there is enough of it: at the end of a prompt any, later as much as the
    /// recipe says.
    pub(in crate::cache) fn factor_due(
        &mut self,
        id: SequenceId,
        prompt: bool,
        watch: Watch<'_>,
    ) -> Result<(), Error> {
        let Some(low_rank) = self.recipe.low_rank.clone() else { return Ok(()) };
        let layers: Vec<usize> = (0..self.shape.layers()).filter(|&l| self.participates(l)).collect();
        let groups = low_rank.groups(&layers);
        let sequence = self.sequence_mut(id)?;
        if sequence.prefill_open && !prompt {
            return Ok(());
        }
        sequence.factor_at.resize(groups.len(), 0);
        for (g, layers) in groups.iter().enumerate() {
            let Some(slots) = self.waiting(id, layers)? else { continue };
            let end = slots.end;
            let enough = if prompt { 1 } else { low_rank.again };
            if slots.len() < enough || end < self.sequence(id)?.factor_at[g] {
                continue;
            }
            let mut heard = |share| watch(LowRankProgress { done: g, groups: groups.len(), share });
            let run = self.factorise(id, layers, slots, &low_rank, &mut heard)?;
            let refused = ![run.keys, run.values].iter().any(|o| matches!(o, SideOutcome::Factored { .. }));
            let sequence = self.sequence_mut(id)?;
            sequence.low_rank.push(run);
            sequence.factor_at[g] = if refused { end + low_rank.again } else { 0 };
        }
        Ok(())
    }

    /// The entries of a group of layers between what is factored, or their sinks, and their tails; `None` if there are
    /// none, or the layers hold different ones.
    fn waiting(&self, id: SequenceId, layers: &[usize]) -> Result<Option<Range<usize>>, Error> {
        let exact = self.recipe.precision.exact;
        let sequence = self.sequence(id)?;
        let mut same: Option<(usize, usize)> = None;
        for head in layers.iter().flat_map(|&layer| &sequence.layers[layer]) {
            let made = head.factored().map(|(.., slots)| slots.end).last().unwrap_or(0);
            let here = (made.max(exact.sinks), head.rows().saturating_sub(exact.tail));
            if *same.get_or_insert(here) != here {
                return Ok(None);
            }
        }
        Ok(same.filter(|(start, end)| start < end).map(|(start, end)| start..end))
    }

    fn factorise(
        &mut self,
        id: SequenceId,
        layers: &[usize],
        slots: Range<usize>,
        low_rank: &LowRank,
        watch: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<LowRankRun, Error> {
        let backend = Arc::clone(&self.backend);
        let pool = backend.workers().cloned().unwrap_or_else(Pool::current);
        let sequence = self.sequence(id)?;
        let positions: Vec<i32> = sequence.layers[layers[0]][0]
            .pages()
            .flat_map(|page| page.positions().iter().copied())
            .skip(slots.start)
            .take(slots.len())
            .collect();
        let (first, last) = (positions[0], positions[positions.len() - 1]);
        // Runs of later tokens keep what those before left.
        let before =
            sequence.layers[layers[0]][0].factored().filter_map(|(_, factors, _)| factors.kept.as_ref());
        let before: usize = before.map(|kept| kept.latents.len() / low_rank.chunk.max(1)).sum();
        let outliers = low_rank.outliers.saturating_sub(before);
        let shapes = layers.iter().map(|&l| self.shape.layer(l));
        let group = Group {
            backend: &*backend,
            layers: shapes
                .clone()
                .zip(layers)
                .map(|(shape, &l)| (shape, &sequence.layers[l][..], &*self.storage[l][0].exact))
                .collect(),
            slots: slots.clone(),
            angles: angles(shapes, last),
            positions,
            chunks: Chunks::of(low_rank, self.recipe.precision.exact.sinks, &slots, outliers),
        };
        let outcome = |rank: Rank, refused: Refused| match rank {
            Rank::None => SideOutcome::Exact,
            _ => SideOutcome::Refused(refused),
        };
        let ranks = [(true, low_rank.keys), (false, low_rank.values)];
        let wanted = ranks.map(|(keys, rank)| rank.of(slots.len(), group.features(keys)));
        let (exact, factored) = group.bytes(wanted);
        let run = |keys, values| LowRankRun {
            layers: layers.to_vec(),
            positions: (first, last + 1),
            entries: slots.len(),
            keys,
            values,
        };
        // With a tolerance a smaller rank may do, and be smaller.
        if factored >= exact && low_rank.tolerance.is_none() {
            let larger = Refused::Larger { exact, factored };
            return Ok(run(outcome(low_rank.keys, larger), outcome(low_rank.values, larger)));
        }
        let mut sides: [Option<Decomposed>; 2] = [None, None];
        let mut outcomes = [SideOutcome::Exact; 2];
        let parts = wanted.iter().filter(|&&rank| rank > 0).count() as f64;
        let mut before = 0.0;
        for (i, (keys, _)) in ranks.into_iter().enumerate().filter(|&(i, _)| wanted[i] > 0) {
            let mut heard = |share: f64| watch((before + share) / parts);
            let done = group.decompose(keys, (wanted[i], low_rank), &pool, &mut heard)?;
            before += 1.0;
            let (rank, error) = (done.factors.rank, done.factors.relative_error());
            match low_rank.tolerance.filter(|&tolerance| error > tolerance) {
                Some(tolerance) => outcomes[i] = SideOutcome::Refused(Refused::Inexact { error, tolerance }),
                None => {
                    outcomes[i] = SideOutcome::Factored { rank, error };
                    sides[i] = Some(done);
                }
            }
        }
        let (exact, factored) =
            group.bytes([0, 1].map(|i| sides[i].as_ref().map_or(0, |side| side.factors.rank)));
        if sides.iter().all(Option::is_none) || factored >= exact {
            let larger = SideOutcome::Refused(Refused::Larger { exact, factored });
            let kept = |o| if matches!(o, SideOutcome::Factored { .. }) { larger } else { o };
            return Ok(run(kept(outcomes[0]), kept(outcomes[1])));
        }
        let made = made(&group, &sides)?;
        drop(group);
        let run = run(outcomes[0], outcomes[1]);
        self.replace(id, layers, slots, made)?;
        Ok(run)
    }

    /// Puts factors in the place of rows, in all heads of some layers or in none.
    fn replace(
        &mut self,
        id: SequenceId,
        layers: &[usize],
        slots: Range<usize>,
        made: Vec<Factors>,
    ) -> Result<(), Error> {
        let (backend, storage) = (&*self.backend, &self.storage);
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(()) };
        let mut shared = SharedPositions::default();
        let mut made = made.into_iter();
        let mut done: Vec<Vec<HeadRows>> = Vec::with_capacity(layers.len());
        for &layer in layers {
            let mut heads = sequence.layers[layer].clone();
            for (head, storage) in heads.iter_mut().zip(&storage[layer]) {
                let Some(factors) = made.next() else { unreachable!("every head has factors") };
                store::factorise(backend, &storage.exact, head, slots.clone(), factors, &mut shared)?;
            }
            done.push(heads);
        }
        for (&layer, heads) in layers.iter().zip(done) {
            sequence.layers[layer] = heads;
        }
        // Also of layers that read another's rows, which have made keys of their own.
        for layer in 0..self.shape.layers() {
            if layers.contains(&self.shape.owner(layer)) {
                sequence.reads[layer].rebuilt.forget();
            }
        }
        Ok(())
    }
}

/// Angles of each layer, shared by those that turn alike.
fn angles<'a>(shapes: impl Iterator<Item = &'a LayerShape>, last: i32) -> Vec<Option<Arc<Angles>>> {
    let mut known: Vec<(&Rotary, Arc<Angles>)> = Vec::new();
    let of = |shape: &'a LayerShape| {
        let rotary = shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope)?;
        if let Some((_, angles)) = known.iter().find(|(other, _)| *other == rotary) {
            return Some(Arc::clone(angles));
        }
        known.push((rotary, Arc::new(Angles::new(rotary, last))));
        known.last().map(|(_, angles)| Arc::clone(angles))
    };
    shapes.map(of).collect()
}

/// Factors of every KV head of every layer of a group, in their order.
fn made(group: &Group<'_>, sides: &[Option<Decomposed>; 2]) -> Result<Vec<Factors>, Error> {
    let backend = group.backend;
    let dtype = |side| group.layers[0].2.encoding(side).exact().unwrap_or(DType::F32);
    let raised = |side: &Option<Decomposed>| -> Vec<f32> {
        side.as_ref().map_or_else(Vec::new, |side| side.factors.a.iter().map(|x| x * side.lift).collect())
    };
    let rank = |i: usize| sides[i].as_ref().map_or(0, |side| side.factors.rank);
    let (a_keys, a_values) = (raised(&sides[0]), raised(&sides[1]));
    let latents = Arc::new(store::latents(
        backend,
        group.slots.len(),
        (store::Matrix { rows: &a_keys, rank: rank(0) }, dtype(Side::Key)),
        (store::Matrix { rows: &a_values, rank: rank(1) }, dtype(Side::Value)),
    )?);
    let mut columns = [0, 0];
    let mut made = Vec::new();
    for (layer, ((shape, heads, _), angles)) in group.layers.iter().zip(&group.angles).enumerate() {
        for head in *heads {
            let mut bases = [None, None];
            for (i, (side, d)) in [(Side::Key, shape.d_k), (Side::Value, shape.d_v)].into_iter().enumerate() {
                let column = columns[i];
                columns[i] += d;
                let Some(Decomposed { factors, lift }) = &sides[i] else { continue };
                let rows = factors.b.chunks_exact(factors.features);
                let rows: Vec<f32> =
                    rows.flat_map(|row| row[column..column + d].iter().map(|x| x / lift)).collect();
                bases[i] = Some(store::basis(backend, &rows, d, dtype(side))?);
            }
            let [keys, values] = bases;
            let angles = angles.clone();
            let kept = if keys.is_some() { group.kept((layer, head))? } else { None };
            made.push(Factors { latents: Arc::clone(&latents), keys, values, rows: None, kept, angles });
        }
    }
    Ok(made)
}
