//! Units of entries that resemble one another, found by k-means.
//!
//! Entries are taken a segment at a time, so that rotary angles within a segment differ little and the work grows with
//! the length of the text, not its square. Points are centred keys beside values of a chosen weight: members of a unit
//! then share a value as well as a logit, and what is said of those that are not read is nearer the truth.

use super::options::encoding;
use super::units::mean;
use super::{Codebook, Codes, Entries, Lesson, Role, Summary, Table, UnitRows, Units};
use crate::backend::Backend;
use crate::device::encoding::Encoding;
use crate::device::page::{HeadRows, PageLayout};
use crate::error::{KernelError, RecipeError};
use crate::geometry::LayerShape;
use crate::kernel::AttentionParams;
use crate::kernel::attend::Workspace;
use crate::kernel::dot_scores::DotArgs;
use crate::policy::registry::Args;
use crate::store::{self, NewRows};
use crate::view::DType;
use std::sync::Arc;

/// How entries are clustered.
#[derive(Clone, Debug)]
pub struct Clusters {
    /// Entries of a unit, on average.
    pub size: usize,
    /// Entries clustered together, at most.
    pub segment: usize,
    /// Entries that wait behind the last unit of a finished prompt before they are clustered.
    pub update: usize,
    /// Rounds of k-means.
    pub rounds: usize,
    /// How much values count beside keys: their share of the points' energy relative to that of keys.
    pub values: f64,
    /// Whether points are compared by angle.
    pub cosine: bool,
    /// Clusters that are grouped around a mean of their own, on average; 0 groups none.
    pub fan: usize,
    /// How what keys have beside the means of their clusters is encoded, if it is.
    pub codes: Option<Codes>,
    pub(super) tables: Vec<Table>,
}

impl Clusters {
    /// Clusters whose means are stored as `encoding`.
    pub fn new(size: usize, encoding: Encoding) -> Self {
        let tables = vec![Table::new(Role::Mean, encoding)];
        Self {
            size,
            segment: 2048,
            update: 128,
            rounds: 4,
            values: 0.5,
            cosine: false,
            fan: 0,
            codes: None,
            tables,
        }
    }

    /// The same with `fan` clusters to a group, whose means are stored as `encoding`.
    #[must_use]
    pub fn grouped(mut self, fan: usize, encoding: Encoding) -> Self {
        self.tables.push(Table::new(Role::Group, encoding));
        Self { fan, ..self }
    }

    /// The same with codes of entries within clusters.
    #[must_use]
    pub fn coded(mut self, codes: Codes) -> Self {
        let codes = codes.within();
        self.tables.extend_from_slice(codes.tables());
        Self { codes: Some(codes), ..self }
    }

    /// Reads the arguments that every index of clusters declares: `size`, `store`, `segment`, `update`, `rounds`.
    ///
    /// # Errors
    /// [`RecipeError::Argument`]; an `update` larger than a segment would never come.
    pub fn from_args(args: &Args) -> Result<Self, RecipeError> {
        let (segment, update) = (args.count("segment")?, args.count("update")?);
        if update > segment {
            return Err(args.error("update", update, format!("at most segment={segment}")));
        }
        let clusters = Self::new(args.count("size")?, encoding(args, "store")?);
        Ok(Self { segment, update, rounds: args.count("rounds")?, ..clusters })
    }
}

impl Summary for Clusters {
    fn tables(&self) -> &[Table] {
        &self.tables
    }

    fn take(&self, pending: usize, open: bool, _: bool) -> usize {
        if pending >= self.segment {
            return self.segment;
        }
        if open { 0 } else { pending / self.update * self.update }
    }

    fn unit(&self) -> Option<usize> {
        None
    }

    fn waiting(&self) -> usize {
        self.update - 1
    }

    fn queries(&self) -> usize {
        self.codes.as_ref().map_or(0, Codes::queries)
    }

    fn summarise(&self, lesson: &Lesson<'_>, book: Option<&Codebook>) -> Result<Units, KernelError> {
        let Lesson { backend, shape, entries, .. } = *lesson;
        let points = self.points(shape, entries);
        let count = entries.count.div_ceil(self.size);
        let (mut owners, means) = cluster(backend, &points, count, self.rounds, self.cosine)?;
        if self.fan == 0 {
            let mut units = units(shape, entries, &owners, count);
            if let Some(codes) = &self.codes {
                encode(codes, lesson, book, &mut units)?;
            }
            return Ok(units);
        }
        let groups = count.div_ceil(self.fan);
        let (group_of, _) = cluster(backend, &means, groups, self.rounds, self.cosine)?;
        // Clusters of a group become neighbours.
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.sort_by_key(|&cluster| group_of[cluster as usize]);
        let mut place = vec![0; count];
        order.iter().zip(0..).for_each(|(&cluster, at)| place[cluster as usize] = at);
        let mut sizes = vec![0u32; count];
        for owner in &mut owners {
            *owner = place[*owner as usize];
            sizes[*owner as usize] += 1;
        }
        let mut units = units(shape, entries, &owners, count);
        // A cluster without members is no unit.
        let mut held = vec![0; groups];
        let there = order.iter().zip(&sizes).filter(|&(_, &n)| n > 0);
        there.for_each(|(&cluster, _)| held[group_of[cluster as usize] as usize] += 1);
        held.retain(|&n| n > 0);
        units.groups = held;
        let mut rows = UnitRows::default();
        let mut rest = units.members.as_slice();
        let mut key = vec![0.0; shape.d_k];
        for n in units.group_counts() {
            let (group, behind) = rest.split_at(n as usize);
            rest = behind;
            average(entries.keys, group, &mut key);
            rows.keys.extend_from_slice(&key);
            rows.values.push(0.0);
        }
        units.rows.push(rows);
        Ok(units)
    }
}

impl Clusters {
    /// `[n, d_k + d_v]`, or `[n, d_k]` if values do not count.
    fn points(&self, shape: &LayerShape, entries: &Entries<'_>) -> Points {
        let (d_k, d_v) = (shape.d_k, if self.values > 0.0 { shape.d_v } else { 0 });
        let mut center = vec![0.0; d_k];
        mean(entries.keys, &mut center);
        let key = |row: &[f32]| row.iter().zip(&center).map(|(k, c)| k - c).collect::<Vec<f32>>();
        let energy = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        let keys: f64 = entries.keys.chunks_exact(d_k).map(|row| energy(&key(row))).sum();
        let values = energy(entries.values);
        let weight = if values > 0.0 { (self.values * (keys / values).sqrt()) as f32 } else { 0.0 };
        let dim = d_k + d_v;
        let mut rows = Vec::with_capacity(entries.count * dim);
        for (k, v) in entries.keys.chunks_exact(d_k).zip(entries.values.chunks_exact(shape.d_v)) {
            rows.extend(key(k));
            rows.extend(v.iter().take(d_v).map(|x| weight * x));
        }
        Points { rows, dim }
    }
}

/// The owner of every point among `count` clusters, and the clusters' means: k-means from points at equal steps.
///
/// # Errors
/// [`KernelError`].
pub(super) fn cluster(
    backend: &dyn Backend,
    points: &Points,
    count: usize,
    rounds: usize,
    cosine: bool,
) -> Result<(Vec<u32>, Points), KernelError> {
    let entries = points.rows.len() / points.dim;
    let mut means = Means::start(points, entries, count);
    let mut owners = vec![0; entries];
    for round in 0..rounds {
        if round > 0 {
            means.update(points, &owners);
        }
        if cosine {
            means.normalise();
        }
        means.assign(backend, points, cosine, &mut owners)?;
    }
    means.update(points, &owners);
    Ok((owners, Points { rows: means.rows, dim: means.dim }))
}

/// What is clustered.
pub(super) struct Points {
    /// `[n, dim]`.
    pub(super) rows: Vec<f32>,
    pub(super) dim: usize,
}

impl Points {
    fn row(&self, i: usize) -> &[f32] {
        &self.rows[i * self.dim..(i + 1) * self.dim]
    }
}

/// The clusters' means so far.
struct Means {
    /// `[clusters, dim]`.
    rows: Vec<f32>,
    dim: usize,
}

impl Means {
    /// Points at equal steps: neighbours in the text are seldom two of them.
    fn start(points: &Points, entries: usize, count: usize) -> Self {
        let rows = (0..count).flat_map(|c| points.row(c * entries / count).to_vec());
        Self { rows: rows.collect(), dim: points.dim }
    }

    /// A cluster that lost all its points keeps its place.
    fn update(&mut self, points: &Points, owners: &[u32]) {
        let count = self.rows.len() / self.dim;
        let (mut sums, mut sizes) = (vec![0.0f32; self.rows.len()], vec![0u32; count]);
        for (i, &owner) in owners.iter().enumerate() {
            let at = owner as usize * self.dim;
            sums[at..at + self.dim].iter_mut().zip(points.row(i)).for_each(|(s, x)| *s += x);
            sizes[owner as usize] += 1;
        }
        for ((mean, sum), size) in
            self.rows.chunks_exact_mut(self.dim).zip(sums.chunks_exact(self.dim)).zip(&sizes)
        {
            if *size > 0 {
                mean.iter_mut().zip(sum).for_each(|(m, s)| *m = s / *size as f32);
            }
        }
    }

    fn normalise(&mut self) {
        for mean in self.rows.chunks_exact_mut(self.dim) {
            let norm = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
            if norm > 0.0 {
                mean.iter_mut().for_each(|x| *x /= norm);
            }
        }
    }

    /// The nearest mean of every point: the largest `x·c − ‖c‖²/2`, or `x·c` among unit vectors.
    fn assign(
        &self,
        backend: &dyn Backend,
        points: &Points,
        cosine: bool,
        owners: &mut [u32],
    ) -> Result<(), KernelError> {
        let half = |mean: &[f32]| -0.5 * mean.iter().map(|x| x * x).sum::<f32>();
        let bias: Vec<f32> =
            if cosine { Vec::new() } else { self.rows.chunks_exact(self.dim).map(half).collect() };
        let mut owners = owners.iter_mut();
        products(backend, (&self.rows, self.dim), &bias, &points.rows, |scores| {
            if let Some(owner) = owners.next() {
                *owner = largest(scores);
            }
        })
    }
}

/// Products in memory at once, about.
const PRODUCTS: usize = 1 << 22;

/// Gives the products of every point in turn with all means, `[.., dim]`, each with the mean's `bias` if there are any. The
/// product is the one that scores units, with points for queries and means for keys.
///
/// # Errors
/// [`KernelError`].
pub(super) fn products(
    backend: &dyn Backend,
    (means, dim): (&[f32], usize),
    bias: &[f32],
    points: &[f32],
    mut take: impl FnMut(&[f32]),
) -> Result<(), KernelError> {
    let count = means.len() / dim;
    let layout = PageLayout {
        capacity: count,
        d_k: dim,
        d_v: 1,
        k: DType::F32.into(),
        v: DType::F32.into(),
        mirrored: backend.mirrored(),
        column_words: 0,
        steady: false,
    };
    let positions: Vec<i32> = (0..count as i32).collect();
    let mut table = HeadRows::default();
    let values = vec![0.0; count];
    let new = NewRows { positions: &positions, keys: means, values: &values };
    store::append(backend, &Arc::new(layout), &mut table, new)?;
    if !bias.is_empty() {
        store::set_bias(backend, &mut table, 0, bias)?;
    }
    let params = AttentionParams {
        group: 1,
        d_k: dim,
        d_v: 1,
        scale: 1.0,
        softcap: None,
        window: None,
        sink_logits: None,
    };
    let at_once = (PRODUCTS / count).max(1);
    let mut scores = vec![0.0; at_once.min(points.len() / dim) * count];
    let mut workspace = Workspace::default();
    for points in points.chunks(at_once * dim) {
        let tokens = points.len() / dim;
        let out = &mut scores[..tokens * count];
        let heads = std::slice::from_ref(&table);
        let mut args = DotArgs { heads, queries: points, tokens, spans: None, out };
        backend.dot_scores(&params, &mut args, &mut workspace)?;
        scores[..tokens * count].chunks_exact(count).for_each(&mut take);
    }
    Ok(())
}

/// Index of the largest score, the first of equals.
fn largest(scores: &[f32]) -> u32 {
    // In lanes, by comparisons that a compiler turns into vectors.
    let larger = |a: &mut f32, b: &f32| *a = if *b > *a { *b } else { *a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = scores.chunks_exact(16);
    let mut most = f32::NEG_INFINITY;
    chunks.remainder().iter().for_each(|x| larger(&mut most, x));
    chunks.for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(lane, x)| larger(lane, x)));
    lanes.iter().for_each(|x| larger(&mut most, x));
    scores.iter().position(|&x| x == most).unwrap_or(0) as u32
}

/// Units from the owner of every entry; clusters without members are none.
fn units(shape: &LayerShape, entries: &Entries<'_>, owners: &[u32], count: usize) -> Units {
    let mut counts = vec![0u32; count];
    owners.iter().for_each(|&owner| counts[owner as usize] += 1);
    let mut next: Vec<u32> = counts
        .iter()
        .scan(0, |end, &n| {
            let start = *end;
            *end += n;
            Some(start)
        })
        .collect();
    let mut members = vec![0; owners.len()];
    for (i, &owner) in owners.iter().enumerate() {
        let at = &mut next[owner as usize];
        members[*at as usize] = i as u32;
        *at += 1;
    }
    counts.retain(|&n| n > 0);
    let mut rows = UnitRows::default();
    let (mut key, mut value) = (vec![0.0; shape.d_k], vec![0.0; shape.d_v]);
    let mut rest = members.as_slice();
    for &n in &counts {
        let (unit, behind) = rest.split_at(n as usize);
        rest = behind;
        average(entries.keys, unit, &mut key);
        average(entries.values, unit, &mut value);
        rows.keys.extend_from_slice(&key);
        rows.values.extend_from_slice(&value);
    }
    Units { counts, members, rows: vec![rows], ..Units::default() }
}

/// Adds the codes of what keys have beside the means of their units, by the codebook there is or by one learnt here.
fn encode(
    codes: &Codes,
    lesson: &Lesson<'_>,
    book: Option<&Codebook>,
    units: &mut Units,
) -> Result<(), KernelError> {
    let Lesson { shape, entries, .. } = *lesson;
    let d = shape.d_k;
    let mut keys = Vec::with_capacity(entries.keys.len());
    let mut rest = units.members.as_slice();
    for (&n, mean) in units.counts.iter().zip(units.rows[0].keys.chunks_exact(d)) {
        let (unit, behind) = rest.split_at(n as usize);
        rest = behind;
        let mut radius = 0.0f32;
        for &i in unit {
            let key = &entries.keys[i as usize * d..(i as usize + 1) * d];
            let start = keys.len();
            keys.extend(key.iter().zip(mean).map(|(k, m)| k - m));
            radius = radius.max(keys[start..].iter().map(|x| x * x).sum());
        }
        units.radii.push(radius.sqrt());
    }
    let residuals = Entries { keys: &keys, ..*entries };
    let encoded = codes.summarise(&Lesson { entries: &residuals, ..*lesson }, book)?;
    units.rows.extend(encoded.rows);
    units.book = encoded.book;
    Ok(())
}

/// The mean of some rows.
fn average(rows: &[f32], members: &[u32], out: &mut [f32]) {
    out.fill(0.0);
    for &i in members {
        let row = &rows[i as usize * out.len()..(i as usize + 1) * out.len()];
        out.iter_mut().zip(row).for_each(|(o, x)| *o += x);
    }
    out.iter_mut().for_each(|o| *o /= members.len() as f32);
}
