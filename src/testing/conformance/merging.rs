//! Which entries go into which, and what becomes of them.
//!
//! *Helps* tell a wrong neighbour from one that is as good as the best. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, compare, expect_length_error, expect_same_bits};
use crate::backend::{Backend, Reference};
use crate::device::page::HeadRows;
use crate::geometry::LayerShape;
use crate::kernel::attend::cases::cases;
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::kernel::merge_rows::{self, MergeRowsArgs, Merges, Source, Target};
use crate::kernel::nearest::{self, NearestArgs};
use crate::testing::Random;
use crate::testing::cache::poisoned;
use crate::testing::layer::LayerCase;

/// Pairs of entries of a KV head that are compared at most, about.
const PAIRS: usize = 100_000;

/// Slots of each head in two: those that go and those that stay.
fn parted(heads: &[HeadRows], stay: usize, seed: u64) -> [Vec<Vec<u32>>; 2] {
    let mut random = Random::new(seed);
    let parts = heads.iter().map(|head| -> (Vec<u32>, Vec<u32>) {
        (0..head.rows() as u32).partition(|&slot| slot > 0 && random.below(stay) > 0)
    });
    let (from, into) = parts.unzip();
    [from, into]
}

fn slices(slots: &[Vec<u32>]) -> Vec<&[u32]> {
    slots.iter().map(Vec::as_slice).collect()
}

type Found = (Vec<u32>, Vec<f32>);

fn search(on: &dyn Backend, heads: &[HeadRows], from: &[&[u32]], into: &[&[u32]]) -> Result<Found, Failure> {
    let total = from.iter().map(|f| f.len()).sum();
    let (mut nearest, mut cosines) = (vec![u32::MAX; total], poisoned(total));
    let mut args = NearestArgs { heads, from, into, nearest: &mut nearest, cosines: &mut cosines };
    on.nearest(&mut args)?;
    Ok((nearest, cosines))
}

/// Cases of [`crate::kernel::nearest`].
pub fn nearest(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(nearest::NAME);
    for (i, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let mut worst = 0.0f64;
            for lane in &case.lanes {
                let reference = Reference::default();
                let (ours, theirs) = (lane.cache.build(&reference)?, lane.cache.build(backend)?);
                let [mut from, into] = parted(&ours, [2, 3, 40][i % 3], i as u64);
                // The reference takes every pair in turn.
                for (from, into) in from.iter_mut().zip(&into) {
                    let skip = (from.len() * into.len()).div_ceil(PAIRS).max(1);
                    *from = from.iter().copied().step_by(skip).collect();
                }
                let (from, into) = (slices(&from), slices(&into));
                let want = search(&reference, &ours, &from, &into)?;
                let got = search(backend, &theirs, &from, &into)?;
                worst = worst.max(compare("cosine", &got.1, &want.1, |_| nearest::TOLERANCE)?);
                let mut at = 0;
                for (h, from) in from.iter().enumerate() {
                    for &slot in *from {
                        let (named, best) = (got.0[at], want.0[at]);
                        if named != best {
                            let named = into[h].get(named as usize).copied();
                            let named =
                                named.ok_or(format!("head {h} slot {slot}: no candidate {}", got.0[at]))?;
                            let pair = std::slice::from_ref(&ours[h]);
                            let theirs = search(&reference, pair, &[&[slot]], &[&[named]])?.1[0];
                            let short = f64::from(want.1[at]) - f64::from(theirs);
                            if short > nearest::TOLERANCE {
                                return Err(format!(
                                    "head {h} slot {slot}: named {named}, {short:.1e} below the best"
                                )
                                .into());
                            }
                        }
                        at += 1;
                    }
                }
            }
            Ok(worst)
        });
    }
    report.case("zeros, extremes and ties", || {
        let d = 5;
        let mut layer = LayerCase::new(backend, LayerShape::new(1, 1, d), Vec::new());
        let firsts = [0.0, 1.0, 2.0, 1e30, -1e-30, 1e-30, 0.0];
        let keys: Vec<f32> = firsts.iter().flat_map(|&x| [x, 0.0, x, 0.0, 0.0]).collect();
        layer.append(0, &(0..7).collect::<Vec<_>>(), &keys, &keys).map_err(|e| e.to_string())?;
        let found = |from: &[u32], into: &[u32]| search(backend, layer.view(0).heads, &[from], &[into]);
        // Directions count, not lengths, and the first of equals is named; zeros are alike to nothing.
        let (nearest, cosines) = found(&[1, 3, 4, 5, 6], &[0, 2, 4])?;
        if nearest != [1, 1, 2, 1, 0] {
            return Err(format!("named {nearest:?}").into());
        }
        compare("cosine", &cosines, &[1.0, 1.0, 1.0, 1.0, 0.0], |_| nearest::TOLERANCE)?;
        let (nearest, cosines) = found(&[1], &[4])?;
        compare("cosine", &cosines, &[-1.0], |_| nearest::TOLERANCE)?;
        if nearest == [0] { Ok(0.0) } else { Err(format!("named {nearest:?}").into()) }
    });
    for what in ["heads of from", "heads of into", "slot", "no candidate", "nearest", "cosines"] {
        report.case(format!("wrong {what}"), || {
            let heads = cases().swap_remove(7).lanes[0].cache.build(backend)?;
            let all: Vec<u32> = vec![0; heads.len()];
            let mut from: Vec<&[u32]> = all.chunks(1).collect();
            let mut into = from.clone();
            let mut lengths = [heads.len(); 2];
            match what {
                "heads of from" => drop(from.pop()),
                "heads of into" => drop(into.pop()),
                "slot" => into[0] = &[u32::MAX],
                "no candidate" => into[0] = &[],
                "nearest" => lengths[0] += 1,
                _ => lengths[1] += 1,
            }
            let (mut nearest, mut cosines) = (vec![0; lengths[0]], vec![0.0; lengths[1]]);
            let (from, into) = (&from[..], &into[..]);
            let mut args =
                NearestArgs { heads: &heads, from, into, nearest: &mut nearest, cosines: &mut cosines };
            expect_length_error(what, backend.nearest(&mut args))
        });
    }
    report
}

/// Entries that go, spread over those that stay, some of them over several.
fn merges(head: &HeadRows, keys: bool, seed: u64) -> Merges {
    let mut random = Random::new(seed);
    let [from, into] = parted(std::slice::from_ref(head), 3, seed);
    let mut merges = Merges { keys, ..Merges::default() };
    for &slot in &into[0] {
        let chosen: Vec<u32> = from[0].iter().copied().filter(|_| random.below(into[0].len()) < 2).collect();
        let mut source = |slot| Source { slot, key: random.normal(), value: random.normal() };
        let sources: Vec<Source> = chosen.into_iter().map(&mut source).collect();
        if random.below(4) > 0 {
            let target = Target { slot, sources: 0, key: random.normal(), value: random.normal(), bias: 0.5 };
            merges.push(target, sources);
        }
    }
    merges
}

/// Cases of [`crate::kernel::merge_rows`].
pub fn merge_rows(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(merge_rows::NAME);
    for (i, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let mut worst = 0.0f64;
            for lane in &case.lanes {
                let reference = Reference::default();
                let (ours, theirs) = (lane.cache.build(&reference)?, lane.cache.build(backend)?);
                for (h, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let merges = merges(ours, (i + h) % 2 == 0, (i * 8 + h) as u64);
                    worst = worst.max(check(backend, ours, theirs, &merges)?);
                }
            }
            Ok(worst)
        });
    }
    for what in ["sources", "slot", "keys", "values"] {
        report.case(format!("wrong {what}"), || {
            let heads = cases().swap_remove(7).lanes[0].cache.build(backend)?;
            let layout = &heads[0].segments[0].layout;
            let mut merges = Merges { keys: true, ..Merges::default() };
            let slot = if what == "slot" { heads[0].rows() as u32 } else { 0 };
            let source = Source { slot: 0, key: 1.0, value: 1.0 };
            merges.push(Target { slot, sources: 0, key: 1.0, value: 1.0, bias: 0.0 }, [source]);
            if what == "sources" {
                merges.sources.clear();
            }
            let mut keys = vec![0.0; layout.d_k + usize::from(what == "keys")];
            let mut values = vec![0.0; layout.d_v + usize::from(what == "values")];
            let (head, merges) = (&heads[0], &merges);
            let mut args = MergeRowsArgs { head, merges, keys: &mut keys, values: &mut values };
            expect_length_error(what, backend.merge_rows(&mut args))
        });
    }
    report
}

fn check(backend: &dyn Backend, ours: &HeadRows, theirs: &HeadRows, merges: &Merges) -> Result<f64, Failure> {
    let Some((d_k, d_v)) = ours.segments.first().map(|s| (s.layout.d_k, s.layout.d_v)) else {
        return Ok(0.0);
    };
    let run = |on: &dyn Backend, head: &HeadRows, merges: &Merges| -> Result<[Vec<f32>; 2], Failure> {
        let n = merges.targets.len();
        let mut keys = poisoned(if merges.keys { n * d_k } else { 0 });
        let mut values = poisoned(n * d_v);
        on.merge_rows(&mut MergeRowsArgs { head, merges, keys: &mut keys, values: &mut values })?;
        Ok([keys, values])
    };
    let reference = Reference::default();
    let (got, want) = (run(backend, theirs, merges)?, run(&reference, ours, merges)?);
    let again = run(backend, theirs, merges)?;
    // What rounding may do follows the sum of the terms' magnitudes.
    let all: Vec<u32> = (0..ours.rows() as u32).collect();
    let (mut keys, mut values) = (poisoned(all.len() * d_k), poisoned(all.len() * d_v));
    let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
    reference.gather(&mut GatherArgs { head: ours, slots: &all, target })?;
    let mut worst = 0.0f64;
    for (side, (name, rows, d)) in [("keys", &keys, d_k), ("values", &values, d_v)].into_iter().enumerate() {
        expect_same_bits(name, &got[side], &again[side])?;
        for (t, (own, sources)) in merges.iter().enumerate().take(got[side].len() / d.max(1)) {
            let weight = |key: f32, value: f32| f64::from(if side == 0 { key } else { value }).abs();
            let terms: Vec<(usize, f64)> = std::iter::once((own.slot as usize, weight(own.key, own.value)))
                .chain(sources.iter().map(|s| (s.slot as usize, weight(s.key, s.value))))
                .collect();
            // Rows that are stored rotated are turned back: their errors follow the largest element.
            let largest = |slot: usize| {
                rows[slot * d..(slot + 1) * d].iter().fold(0.0, |a: f64, &x| a.max(f64::from(x.abs())))
            };
            let magnitude: f64 = terms.iter().map(|&(slot, weight)| weight * largest(slot)).sum();
            let allowed = merge_rows::tolerance(terms.len()) * magnitude + f64::from(f32::MIN_POSITIVE);
            for i in 0..d {
                let at = t * d + i;
                let pair = (&got[side][at..=at], &want[side][at..=at]);
                worst = worst.max(compare(name, pair.0, pair.1, |_| allowed)?);
            }
        }
    }
    Ok(worst)
}
