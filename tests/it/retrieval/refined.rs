//! Entries chosen out of clusters: what their codes promise decides among the entries of the heaviest clusters, and what is
//! left of a cluster is weighed by them.

use super::naive::{Naive, Row, dot, mean_of, naive, units, wide};
use super::{BUDGET, PROMPT, argument, prompted, queries};
use crate::support::{backends, distance, entries, feed};
use kvsieve::geometry::Slot;
use kvsieve::index::{Codebook, Group, ReadRule, Tail};
use kvsieve::{KvCache, SequenceId};
use std::collections::BTreeMap;

/// What this recipe's rules make of the entries of one KV head.
struct Refined {
    /// By slot: what its code says beside the mean of its unit.
    residuals: BTreeMap<usize, Vec<f64>>,
    widen: f64,
}

/// A row's logits of entries that have a code.
type Logits = BTreeMap<usize, f64>;

/// Weight of a row on what is always read, on units that are not looked into, and on entries of those that are.
struct Weights {
    always: f64,
    beside: f64,
    within: Logits,
}

impl Refined {
    /// The nearest codewords of every piece, each tried in turn: nearest in logits of the queries that were recorded, where
    /// the book knows them.
    fn new(naive: &Naive<'_>, book: &Codebook, window: &[Vec<f32>], widen: f64) -> Self {
        let (layout, d) = (book.layout(), naive.shape.d_k);
        let codewords: Vec<Vec<f64>> = (0..book.levels() as u16)
            .map(|level| {
                let (mut words, mut key) = (vec![0; layout.words()], vec![0.0; d]);
                layout.pack(&vec![level; layout.codes], &mut words);
                book.decode(&words, &mut key);
                wide(&key)
            })
            .collect();
        let mut residuals = BTreeMap::new();
        for unit in naive.units {
            let keys = naive.keys(unit);
            let mean = mean_of(&keys);
            for (&slot, key) in unit.iter().zip(&keys) {
                let rest: Vec<f64> = key.iter().zip(&mean).map(|(k, m)| k - m).collect();
                let mut near = rest.clone();
                for m in 0..layout.codes {
                    let piece = m * d / layout.codes..(m + 1) * d / layout.codes;
                    let far = |word: &&Vec<f64>| -> f64 {
                        let error = || piece.clone().map(|x| word[x] - rest[x]);
                        let logit = |query: &Vec<f32>| {
                            piece.clone().zip(error()).map(|(x, e)| f64::from(query[x]) * e).sum::<f64>()
                        };
                        match book.aware() {
                            true => window.iter().map(|query| logit(query).powi(2)).sum(),
                            false => error().map(|e| e * e).sum(),
                        }
                    };
                    let best = codewords.iter().min_by(|a, b| far(a).total_cmp(&far(b))).unwrap();
                    near[piece.clone()].copy_from_slice(&best[piece]);
                }
                residuals.insert(slot, near);
            }
        }
        Self { residuals, widen }
    }

    /// A row's logits by codes.
    fn logits(&self, naive: &Naive<'_>, query: &[f32]) -> Logits {
        let scale = f64::from(naive.shape.scale);
        let mut logits = Logits::new();
        let (mut variance, mut count) = (0.0, 0);
        for unit in naive.units {
            let mean = dot(query, &mean_of(&naive.keys(unit)));
            for &slot in unit {
                let near = mean + dot(query, &self.residuals[&slot]);
                variance += (dot(query, &wide(&naive.entries[slot].key)) - near).powi(2);
                count += 1;
                logits.insert(slot, scale * near);
            }
        }
        if naive.rule.correct {
            let correction = (0.5 * scale * scale * variance / f64::from(count)).ln_1p();
            logits.values_mut().for_each(|x| *x += correction);
        }
        logits
    }

    /// Units that are looked into: the heaviest by what their farthest keys are taken to reach; and by how much the last of
    /// them is heavier than the next.
    fn looked_into(&self, naive: &Naive<'_>, rows: &[Row], queries: &[Vec<f32>]) -> (Vec<usize>, f64) {
        let scale = f64::from(naive.shape.scale);
        let radius = |unit: &Vec<usize>| {
            let keys = naive.keys(unit);
            let mean = mean_of(&keys);
            let far = |k: &Vec<f64>| k.iter().zip(&mean).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            (keys.iter().map(far).fold(0.0, f64::max), keys.iter().map(far).sum::<f64>())
        };
        let radii: Vec<(f64, f64)> = naive.units.iter().map(radius).collect();
        let energy = radii.iter().map(|(_, sum)| sum).sum::<f64>() / naive.covered() as f64;
        let promised: Vec<Row> = rows
            .iter()
            .zip(queries)
            .map(|(row, query)| {
                let along = |unit: &Vec<usize>| {
                    let keys = naive.keys(unit);
                    let mean = dot(query, &mean_of(&keys));
                    keys.iter().map(|k| (dot(query, k) - mean).powi(2)).sum::<f64>()
                };
                let variance = naive.units.iter().map(along).sum::<f64>() / naive.covered() as f64;
                let reach = naive.rule.reach * scale * (variance / energy).sqrt();
                let units = row.units.iter().zip(naive.units).zip(&radii);
                let units =
                    units.map(|((x, unit), (far, _))| x - (unit.len() as f64).ln() + reach * far.sqrt());
                Row { entries: row.entries.clone(), units: units.collect(), groups: Vec::new() }
            })
            .collect();
        let rule = ReadRule { by_entry: false, ..naive.rule };
        let scored = naive.with(naive.role, rule).ranking(&promised);
        let ranking: Vec<usize> = scored.iter().map(|(_, unit)| unit.start).collect();
        let least = BUDGET.min(naive.covered());
        let share = self.widen * least as f64 / naive.covered() as f64;
        let share = ((share * naive.units.len() as f64) as usize).min(ranking.len());
        let size = |units: &[usize]| units.iter().map(|&unit| naive.units[unit].len()).sum::<usize>();
        let enough = (0..=ranking.len()).find(|&n| size(&ranking[..n]) >= least).unwrap_or(ranking.len());
        let count = share.max(enough);
        let gap = scored.get(count).map_or(f64::INFINITY, |next| scored[count - 1].0 - next.0);
        (ranking[..count].to_vec(), gap)
    }

    fn weights(naive: &Naive<'_>, row: &Row, logits: &Logits, looked: &[usize]) -> Weights {
        let always = (0..naive.entries.len()).filter(|&slot| naive.unit_of(slot).is_none());
        let others = (0..naive.units.len()).filter(|unit| !looked.contains(unit));
        let within = looked.iter().flat_map(|&unit| &naive.units[unit]);
        Weights {
            always: always.map(|slot| row.entries[slot].exp()).sum(),
            beside: others.map(|unit| row.units[unit].exp()).sum(),
            within: within.map(|&slot| (slot, logits[&slot].exp())).collect(),
        }
    }

    /// Scores of the entries of the units that are looked into.
    fn scores(naive: &Naive<'_>, weights: &[Weights]) -> Logits {
        let score = |slot: usize| {
            let shares = weights.iter().map(|w| {
                let all = w.always + w.beside + w.within.values().sum::<f64>();
                w.within[&slot] / all
            });
            match naive.rule.group {
                Group::Sum => shares.sum::<f64>().ln(),
                Group::Max => shares.fold(0.0, f64::max).ln(),
                _ => weights.iter().map(|w| w.within[&slot].ln()).fold(f64::NEG_INFINITY, f64::max),
            }
        };
        weights[0].within.keys().map(|&slot| (slot, score(slot))).collect()
    }

    /// Attention over what was read, and the means of units by what is left of their weight.
    fn output(
        naive: &Naive<'_>,
        row: &Row,
        weights: &Weights,
        looked: &[usize],
        read: &[usize],
    ) -> (Vec<f64>, f64) {
        let mut parts: Vec<(f64, Vec<f64>)> =
            read.iter().map(|&slot| (row.entries[slot].exp(), wide(&naive.entries[slot].value))).collect();
        let known: f64 = parts.iter().map(|(w, _)| w).sum();
        let mut left = 0.0;
        for (unit, members) in naive.units.iter().enumerate() {
            let weight = match looked.contains(&unit) {
                true => {
                    members.iter().filter(|slot| !read.contains(slot)).map(|slot| weights.within[slot]).sum()
                }
                false => row.units[unit].exp(),
            };
            left += weight;
            if naive.rule.tail == Tail::Estimate {
                let values: Vec<_> = members.iter().map(|&slot| wide(&naive.entries[slot].value)).collect();
                parts.push((weight, mean_of(&values)));
            }
        }
        let all: f64 = parts.iter().map(|(w, _)| w).sum();
        let out = (0..naive.shape.d_v).map(|d| parts.iter().map(|(w, v)| w * v[d]).sum::<f64>() / all);
        (out.collect(), left / (known + left))
    }
}

/// Checks what a step read of one KV head, given the units that it chose from, the queries that share the head, their
/// outputs one after another, and the recorded queries of a prompt; gives the mass that is left, on average, or nothing if
/// two units tie.
pub fn check(
    (cache, id): (&KvCache, SequenceId),
    (layer, head): (usize, usize),
    units_before: &[Vec<usize>],
    asked: &[(Vec<f32>, i32)],
    out: &[f32],
    window: &[Vec<f32>],
    (widen, tolerance): (f64, f64),
) -> Option<f64> {
    let all = entries(cache, id, layer, head);
    let naive = naive((cache, id), (layer, head), &all, units_before);
    let books = cache.codebooks(id).unwrap();
    let refined = Refined::new(&naive, books.layer(layer)[head].as_ref().unwrap(), window, widen);
    let rows: Vec<Row> = asked.iter().map(|(query, at)| naive.row(query, *at)).collect();
    let asked_for: Vec<Vec<f32>> = asked.iter().map(|(query, _)| query.clone()).collect();
    let (looked, gap) = refined.looked_into(&naive, &rows, &asked_for);
    // Which of two units is looked into that promise the same is rounding.
    if gap < 1e-4 {
        return None;
    }
    let weights: Vec<Weights> = asked
        .iter()
        .zip(&rows)
        .map(|((query, _), row)| Refined::weights(&naive, row, &refined.logits(&naive, query), &looked))
        .collect();
    let scores = Refined::scores(&naive, &weights);
    let choice = cache.last_choice(id, layer).unwrap().unwrap();
    let slots = &choice.slots[choice.offsets[head]..choice.offsets[head + 1]];
    let read: Vec<usize> = slots.iter().map(|slot: &Slot| slot.0 as usize).collect();
    assert_eq!(read.len(), BUDGET, "single entries fill a budget");
    let always = (0..all.len()).filter(|&slot| naive.unit_of(slot).is_none());
    assert!(always.clone().all(|slot| read.contains(&slot)));
    let known = |slot: &usize| naive.unit_of(*slot).is_none() || scores.contains_key(slot);
    assert!(read.iter().all(known), "an entry of a unit that promises little, {gap} below");
    let (chosen, others): (Vec<_>, Vec<_>) = scores.iter().partition(|(slot, _)| read.contains(slot));
    let least = chosen.iter().map(|(_, score)| **score).fold(f64::INFINITY, f64::min);
    let most = others.iter().map(|(_, score)| **score).fold(f64::NEG_INFINITY, f64::max);
    assert!(least > most - tolerance, "{least} chosen, {most} not");
    let mut missing = 0.0;
    for (g, (row, weights)) in rows.iter().zip(&weights).enumerate() {
        let (want, left) = Refined::output(&naive, row, weights, &looked, &read);
        let d_v = naive.shape.d_v;
        let error = distance(&out[g * d_v..(g + 1) * d_v], &want);
        assert!(error < tolerance, "head {head}, row {g}: {error}");
        missing += left / rows.len() as f64;
    }
    Some(missing)
}

#[test]
fn what_codes_promise_is_read_and_the_rest_of_a_cluster_is_weighed_by_them() {
    for (own, widen) in [
        ("size=4,segment=64,pieces=8,widen=1.2,reach=0,aware=yes,queries=100", 1.2),
        ("size=8,segment=128,pieces=5,widen=2,group=max,rank=unit,correct=no", 2.0),
        ("size=6,segment=300,pieces=16,widen=1,reach=0,group=logit", 1.0),
        ("size=6,segment=300,pieces=16,widen=1.6,tail=ignore", 1.6),
    ] {
        let recipe = format!("auto({own},update=16,recent=20,store=f32,min_context=0)");
        for backend in backends() {
            // Processors round tables of codewords to bytes.
            let tolerance = if backend.name() == "cpu" { 0.1 } else { 2e-4 };
            let (mut cache, id) = prompted(&recipe, &backend, &[200, PROMPT - 200]);
            let recorded: u64 = argument(&recipe, "queries").map_or(256, |n| n.parse().unwrap());
            let windows = [0, 1].map(|head| -> Vec<Vec<f32>> {
                let shape = cache.shape().layer(1);
                let each =
                    (PROMPT - recorded..PROMPT).flat_map(|t| queries(shape, 1, head, &[(t, t as i32)]));
                each.map(|(query, _)| query).collect()
            });
            let books = cache.codebooks(id).unwrap();
            let aware =
                |book: &Option<_>| book.as_ref().is_some_and(|book: &std::sync::Arc<Codebook>| book.aware());
            assert_eq!(books.layer(1).iter().all(aware), own.contains("aware=yes"), "{recipe}");
            let mut checked = 0;
            for token in PROMPT..PROMPT + 8 {
                let before = [0, 1].map(|head| units(&cache, id, 1, head));
                let out = feed(&mut cache, id, &[token], 1);
                let missing = before.iter().enumerate().map(|(head, units)| {
                    let shape = cache.shape().layer(1);
                    let asked = queries(shape, 1, head, &[(token, token as i32)]);
                    let out = &out[1][head * 3 * 16..(head + 1) * 3 * 16];
                    check((&cache, id), (1, head), units, &asked, out, &windows[head], (widen, tolerance))
                });
                let missing: Option<Vec<f64>> = missing.collect();
                let Some(missing) = missing else { continue };
                checked += 1;
                let (said, want) = (
                    cache.last_read(id, 1).unwrap().unwrap().missing.unwrap(),
                    missing.iter().sum::<f64>() / 2.0,
                );
                assert!(
                    (f64::from(said) - want).abs() < tolerance * want.max(0.1),
                    "{}: {recipe}: {said}, should be {want}",
                    backend.name()
                );
            }
            assert!(checked > 4, "{recipe}: {checked}");
        }
    }
}

#[test]
fn a_kept_choice_of_entries_leaves_what_it_did_not_take() {
    for backend in backends() {
        let own = "auto(size=4,segment=64,update=64,recent=20,pieces=8,store=f32,min_context=0";
        let run = |recipe: &str| {
            let (mut cache, id) = prompted(recipe, &backend, &[PROMPT]);
            let outs: Vec<_> = (0..6).map(|i| feed(&mut cache, id, &[PROMPT + i], 1)).collect();
            let read: Vec<_> = (0..2).filter_map(|layer| cache.last_read(id, layer).unwrap()).collect();
            (outs, read)
        };
        let (straight, each) = run(&format!("{own})"));
        let (kept, held) = run(&format!("{own},every=6)"));
        let (_, shared) = run(&format!("{own},share=2)"));
        assert_eq!(straight[0], kept[0], "{}: the first step chooses", backend.name());
        for held in &held {
            // The choice is of five steps ago; what came since is read beside it.
            assert!(held.entries - held.units == each[0].entries - each[0].units, "{each:?} {held:?}");
            assert!(held.missing.is_some_and(|missing| missing > 0.0 && missing < 1.0), "{held:?}");
        }
        assert!(shared[1].bytes < each[1].bytes && shared[0].bytes == each[0].bytes, "{shared:?} {each:?}");
        // What is estimated of the rest is nearer to everything than nothing is.
        let (full, _) = run("full");
        let (ignored, _) = run(&format!("{own},every=6,tail=ignore)"));
        let far = |a: &[Vec<Vec<f32>>]| -> f64 {
            let each = full.iter().zip(a).skip(1);
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            each.map(|(full, a)| distance(&a[1], &wide(&full[1]))).sum()
        };
        assert!(far(&kept) < far(&ignored), "{} {}", far(&kept), far(&ignored));
    }
}
