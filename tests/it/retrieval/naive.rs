//! The naive implementation: everything in `f64`, every list in full.

use super::BUDGET;
use crate::support::Entry;
use kvsieve::geometry::LayerShape;
use kvsieve::index::{Group, ReadRule, Role, Tail, Thresholds};
use kvsieve::{KvCache, SequenceId};
use std::ops::Range;

/// The rules of an index on the units of one KV head.
pub struct Naive<'a> {
    pub shape: LayerShape,
    pub rule: ReadRule,
    pub role: Role,
    /// Of one KV head.
    pub entries: &'a [Entry],
    /// Slots of each unit.
    pub units: &'a [Vec<usize>],
    /// Where units are in groups: which.
    pub groups: Vec<Range<usize>>,
    pub thresholds: Option<Thresholds>,
}

/// A row's logits: of entries, of units, and of groups of them.
pub struct Row {
    pub entries: Vec<f64>,
    pub units: Vec<f64>,
    pub groups: Vec<f64>,
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The mean of some rows.
pub fn mean_of(rows: &[Vec<f64>]) -> Vec<f64> {
    (0..rows[0].len()).map(|d| rows.iter().map(|r| r[d]).sum::<f64>() / rows.len() as f64).collect()
}

pub fn dot(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * y).sum()
}

impl Naive<'_> {
    /// The same with another role and rule.
    pub fn with(&self, role: Role, rule: ReadRule) -> Self {
        let (shape, groups) = (self.shape.clone(), self.groups.clone());
        let Self { entries, units, thresholds, .. } = *self;
        Self { shape, rule, role, entries, units, groups, thresholds }
    }

    pub fn unit_of(&self, slot: usize) -> Option<usize> {
        self.units.iter().position(|unit| unit.contains(&slot))
    }

    pub fn covered(&self) -> usize {
        self.units.iter().map(Vec::len).sum()
    }

    pub fn keys(&self, unit: &[usize]) -> Vec<Vec<f64>> {
        unit.iter().map(|&slot| wide(&self.entries[slot].key)).collect()
    }

    /// What logits on means are raised by: from the variance of `q·k` within units.
    pub fn correction(&self, query: &[f32]) -> f64 {
        if !self.rule.correct {
            return 0.0;
        }
        let variance: f64 = self
            .units
            .iter()
            .map(|unit| {
                let keys = self.keys(unit);
                let mean = dot(query, &mean_of(&keys));
                keys.iter().map(|k| (dot(query, k) - mean).powi(2)).sum::<f64>()
            })
            .sum();
        let scale = f64::from(self.shape.scale);
        (0.5 * scale * scale * variance / self.covered() as f64).ln_1p()
    }

    pub fn row(&self, query: &[f32], position: i32) -> Row {
        let scale = f64::from(self.shape.scale);
        let entries = self.entries.iter().map(|e| match e.position <= position {
            true => scale * dot(query, &wide(&e.key)),
            false => f64::NEG_INFINITY,
        });
        let correction = if self.role == Role::Mean { self.correction(query) } else { 0.0 };
        let units = self.units.iter().map(|unit| {
            let keys = self.keys(unit);
            let logit: f64 = match self.role {
                Role::Mean | Role::Group | Role::Code(_) | Role::Residual(_) => {
                    scale * dot(query, &mean_of(&keys)) + correction
                }
                Role::Bound => {
                    let best = |d: usize| {
                        let products = keys.iter().map(|k| f64::from(query[d]) * k[d]);
                        products.fold(f64::NEG_INFINITY, f64::max)
                    };
                    scale * (0..self.shape.d_k).map(best).sum::<f64>()
                }
            };
            logit + (unit.len() as f64).ln()
        });
        let groups = self.groups.iter().map(|group| {
            let members = self.units[group.clone()].concat();
            scale * dot(query, &mean_of(&self.keys(&members))) + (members.len() as f64).ln()
        });
        Row { entries: entries.collect(), units: units.collect(), groups: groups.collect() }
    }

    /// The score of a unit whose weight is 1 in every row.
    fn unison(&self, rows: &[Row]) -> f64 {
        if self.rule.group == Group::Max { 1.0 } else { rows.len() as f64 }
    }

    /// Of every unit, whether its group is looked into.
    pub fn looked_into(&self, rows: &[Row]) -> Vec<bool> {
        let Some(thresholds) = self.thresholds else { return vec![true; self.units.len()] };
        let mut passes = vec![true; self.units.len()];
        for (g, group) in self.groups.iter().enumerate() {
            let members = self.units[group.clone()].concat().len() as f64;
            let weights = rows
                .iter()
                .map(|row| row.groups[g].exp() / row.groups.iter().map(|x| x.exp()).sum::<f64>() / members);
            let weight = match self.rule.group {
                Group::Max => weights.fold(0.0, f64::max),
                _ => weights.sum(),
            };
            passes[group.clone()].fill(weight >= f64::from(thresholds.group) * self.unison(rows));
        }
        passes
    }

    /// Units that are taken before all others: their members point furthest away from their mean.
    fn outliers(&self) -> Vec<usize> {
        if self.rule.outliers == 0 {
            return Vec::new();
        }
        let cosine = |a: &[f64], b: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let least = |unit: &Vec<usize>| {
            let keys = self.keys(unit);
            let mean = mean_of(&keys);
            keys.iter().map(|key| cosine(key, &mean)).fold(f64::INFINITY, f64::min)
        };
        let least: Vec<f64> = self.units.iter().map(least).collect();
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        order.sort_by(|&a, &b| least[a].total_cmp(&least[b]));
        let room = (0.1875 * BUDGET as f64) as usize;
        let (mut filled, mut first) = (0, Vec::new());
        for &unit in order.iter().take(self.rule.outliers) {
            filled += self.units[unit].len();
            if filled <= room {
                first.push(unit);
            }
        }
        first
    }

    /// Scores of the groups of units, best first, with the group's units.
    pub fn ranking(&self, rows: &[Row]) -> Vec<(f64, Range<usize>)> {
        let units = self.units.len();
        let size = |unit: usize| if self.rule.by_entry { (self.units[unit].len() as f64).ln() } else { 0.0 };
        let ranks: Vec<Vec<usize>> = rows
            .iter()
            .map(|row| {
                let mut order: Vec<usize> = (0..units).collect();
                let one = |unit: usize| row.units[unit] - size(unit);
                order.sort_by(|&a, &b| one(b).total_cmp(&one(a)));
                (0..units).map(|unit| order.iter().position(|&u| u == unit).unwrap()).collect()
            })
            .collect();
        let looked = self.looked_into(rows);
        let first = self.outliers();
        let score = |unit: usize| {
            if first.contains(&unit) {
                return f64::INFINITY;
            }
            let each = rows.iter().enumerate().map(|(r, row)| {
                let zone = row.entries.iter().enumerate().filter(|(slot, _)| self.unit_of(*slot).is_none());
                match self.rule.group {
                    Group::Max | Group::Sum if self.thresholds.is_some() => {
                        let units = row.units.iter().zip(&looked).filter(|(_, looked)| **looked);
                        let groups = row.groups.iter().zip(&self.groups).filter(|(_, g)| !looked[g.start]);
                        let all: f64 = units.map(|(x, _)| x.exp()).chain(groups.map(|(x, _)| x.exp())).sum();
                        row.units[unit].exp() / all
                    }
                    Group::Max | Group::Sum => {
                        let all: f64 =
                            zone.map(|(_, x)| x.exp()).chain(row.units.iter().map(|x| x.exp())).sum();
                        row.units[unit].exp() / all
                    }
                    Group::Logit | Group::Mean => row.units[unit],
                    Group::Union => -((ranks[r][unit] * rows.len() + r) as f64),
                }
            });
            match self.rule.group {
                Group::Sum => each.sum::<f64>().ln() - size(unit),
                Group::Mean => each.sum::<f64>() / rows.len() as f64 - size(unit),
                Group::Max => each.fold(f64::NEG_INFINITY, f64::max).ln() - size(unit),
                Group::Logit => each.fold(f64::NEG_INFINITY, f64::max) - size(unit),
                Group::Union => each.fold(f64::NEG_INFINITY, f64::max),
            }
        };
        let groups =
            (0..units).step_by(self.rule.fold).map(|start| start..(start + self.rule.fold).min(units));
        let groups = groups.filter(|group| looked[group.start]);
        let mut ranking: Vec<_> =
            groups.map(|g| (g.clone().map(score).fold(f64::NEG_INFINITY, f64::max), g)).collect();
        ranking.sort_by(|a, b| b.0.total_cmp(&a.0));
        ranking
    }

    /// Units chosen within the budget, best first, and the others likewise.
    pub fn choose(&self, rows: &[Row]) -> (Vec<usize>, Vec<usize>) {
        let cap = self.rule.calibration.filter(|_| self.thresholds.is_some()).map_or(1.0, |c| c.cap);
        let budget = (BUDGET as f64 * cap) as usize;
        let mut left = budget.saturating_sub(self.entries.len() - self.covered());
        let least = self.thresholds.map(|t| (f64::from(t.unit) * self.unison(rows)).ln());
        let looked = self.looked_into(rows);
        let mut chosen = Vec::new();
        let mut others: Vec<usize> = Vec::new();
        let pruned = (0..self.units.len()).filter(|&unit| !looked[unit]);
        for (score, group) in self.ranking(rows) {
            let entries: usize = group.clone().map(|unit| self.units[unit].len()).sum();
            if !others.is_empty() || entries > left || least.is_some_and(|least| score < least) {
                others.extend(group);
            } else {
                left -= entries;
                chosen.extend(group);
            }
        }
        others.extend(pruned);
        (chosen, others)
    }

    /// Attention over what is always read, the chosen units and, as means, the others; and the share of the latter.
    pub fn output(
        &self,
        query: &[f32],
        position: i32,
        (chosen, others): &(Vec<usize>, Vec<usize>),
    ) -> (Vec<f64>, f64) {
        let row = self.row(query, position);
        let mut parts: Vec<(f64, Vec<f64>)> = Vec::new();
        for (slot, entry) in self.entries.iter().enumerate() {
            if self.unit_of(slot).is_none_or(|unit| chosen.contains(&unit)) {
                parts.push((row.entries[slot].exp(), wide(&entry.value)));
            }
        }
        let read: f64 = parts.iter().map(|(w, _)| w).sum();
        if self.rule.tail == Tail::Estimate {
            let means = self.with(Role::Mean, self.rule).row(query, position);
            let covers = match self.rule.estimate < 1.0 {
                true => (self.rule.estimate * self.units.len() as f64) as usize,
                false => others.len(),
            };
            for &unit in others.iter().take(covers) {
                let values: Vec<_> =
                    self.units[unit].iter().map(|&slot| wide(&self.entries[slot].value)).collect();
                parts.push((means.units[unit].exp(), mean_of(&values)));
            }
        }
        let all: f64 = parts.iter().map(|(w, _)| w).sum();
        let out = (0..self.shape.d_v).map(|d| parts.iter().map(|(w, v)| w * v[d]).sum::<f64>() / all);
        (out.collect(), 1.0 - read / all)
    }
}

/// The units of a KV head as the cache has them; those of pages are checked.
pub fn units(cache: &KvCache, id: SequenceId, layer: usize, head: usize) -> Vec<Vec<usize>> {
    let index = cache.recipe().index.clone().unwrap();
    let units = cache.units(id, layer, head).unwrap();
    let units: Vec<Vec<usize>> = units.iter().map(|u| u.iter().map(|s| s.0 as usize).collect()).collect();
    let rows = cache.stored(id, layer).unwrap()[head].0;
    if let Some(page) = index.summary.unit()
        && layer >= index.rule.dense
    {
        let (first, step) = (index.rule.sinks, index.summary.waiting() + 1);
        let end = first + rows.saturating_sub(index.rule.recent + first) / step * step;
        let want: Vec<Vec<usize>> = (first..end).step_by(page).map(|at| (at..at + page).collect()).collect();
        assert_eq!(units, want, "{}", cache.recipe());
    }
    // Every entry between the first and the last member is in one unit, and nothing is in two.
    let mut members = units.concat();
    members.sort_unstable();
    assert!(members.windows(2).all(|pair| pair[1] == pair[0] + 1), "{}", cache.recipe());
    assert!(units.iter().all(|unit| unit.is_sorted() && !unit.is_empty()), "{}", cache.recipe());
    units
}

/// A recipe's rules on the units of a KV head.
pub fn naive<'a>(
    (cache, id): (&KvCache, SequenceId),
    (layer, head): (usize, usize),
    entries: &'a [Entry],
    units: &'a [Vec<usize>],
) -> Naive<'a> {
    let index = cache.recipe().index.clone().unwrap();
    let shape = cache.shape().layer(layer).clone();
    // Units that were made since the step stand behind.
    let mut groups = cache.unit_groups(id, layer, head).unwrap();
    groups.retain(|group| group.end <= units.len());
    let thresholds = cache.thresholds(id).unwrap();
    Naive {
        shape,
        rule: index.rule,
        role: index.summary.tables()[0].role,
        entries,
        units,
        groups,
        thresholds,
    }
}
