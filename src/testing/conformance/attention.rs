//! Attend, attention mass, window scores, dot scores and merging: everything made of logits.
//!
//! *Helps* because the allowed error follows the logits: a rounding error of a large logit is a large error
//! of its weight, on every implementation. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, compare, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::device::page::{HeadRows, Side};
use crate::device::{Format, Packing, Segment};
use crate::kernel::attend::cases::{AttentionCase, Choice, Outputs, Queries, cases};
use crate::kernel::attend::{self, Share, Workspace};
use crate::kernel::attention_mass::{self, MassArgs};
use crate::kernel::dot_scores::{self, DotArgs};
use crate::kernel::merge_partials::{self, MergeArgs};
use crate::kernel::row_norms::NormArgs;
use crate::kernel::window_scores::{self, WindowArgs, WindowReduce};
use crate::kernel::{Spans, total_rows};
use crate::testing::Random;
use crate::testing::cache::{SegmentSpec, poisoned};
use crate::view::DType;

/// A case stored on the reference and on the backend under test.
struct Stored {
    case: AttentionCase,
    reference: Reference,
    /// Per lane.
    ours: Vec<Vec<HeadRows>>,
    theirs: Vec<Vec<HeadRows>>,
    queries: Vec<Queries>,
    /// Per lane: the largest norm of a key.
    key_norm: Vec<f64>,
}

impl Stored {
    fn new(case: AttentionCase, backend: &dyn Backend) -> Result<Self, Failure> {
        let reference = Reference::default();
        let build =
            |b: &dyn Backend| case.lanes.iter().map(|l| l.cache.build(b)).collect::<Result<Vec<_>, _>>();
        let (ours, theirs) = (build(&reference)?, build(backend)?);
        let queries = case.lanes.iter().zip(&ours).map(|(l, heads)| l.queries(case.group, heads)).collect();
        let mut key_norm = Vec::new();
        for heads in &ours {
            let mut norms = poisoned(total_rows(heads));
            reference.row_norms(&mut NormArgs { heads, side: Side::Key, out: &mut norms })?;
            key_norm.push(norms.iter().fold(0.0, |a: f64, &b| a.max(f64::from(b))));
        }
        Ok(Self { case, reference, ours, theirs, queries, key_norm })
    }

    /// By how much a logit of this row may be off: see [`attend::LOGIT_TOLERANCE`] and [`attend::PACKED_TOLERANCE`].
    fn logit_error(&self, lane: usize, row: usize) -> f64 {
        let d_k = self.case.params().d_k;
        let query = &self.queries[lane].values[row * d_k..(row + 1) * d_k];
        let norm = query.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let logit = norm * self.key_norm[lane] * f64::from(self.case.scale.abs());
        self.tolerance(lane) * (1.0 + logit)
    }

    fn tolerance(&self, lane: usize) -> f64 {
        let packed = |s: &Segment| s.layout.k.packed().is_some() || s.layout.v.packed().is_some();
        let any = self.ours[lane].iter().flat_map(|h| &h.segments).any(packed);
        if any { attend::PACKED_TOLERANCE } else { attend::LOGIT_TOLERANCE }
    }

    fn attend(
        &self,
        on: &dyn Backend,
        heads: &[Vec<HeadRows>],
        share: Share,
        mass: bool,
    ) -> Result<Vec<Outputs>, Failure> {
        self.attend_to(on, heads, None, share, mass)
    }

    /// Of each lane and head only the entries `spans`, if there are any.
    fn attend_to(
        &self,
        on: &dyn Backend,
        heads: &[Vec<HeadRows>],
        spans: Option<&[Vec<Spans>]>,
        share: Share,
        mass: bool,
    ) -> Result<Vec<Outputs>, Failure> {
        let mut outputs: Vec<Outputs> = self.case.lanes.iter().map(|l| l.outputs(self.case.group)).collect();
        let mut lanes: Vec<_> = outputs
            .iter_mut()
            .zip(heads.iter().zip(&self.queries))
            .enumerate()
            .map(|(i, (o, (heads, queries)))| {
                let spans = spans.map(|s| &*s[i]);
                attend::AttendLane { spans, ..o.lane(heads, queries, share, mass) }
            })
            .collect();
        on.attend(&self.case.params(), &mut lanes, &mut Workspace::default())?;
        Ok(outputs)
    }

    /// The largest error over all rows, as a share of the tolerance.
    fn compare(&self, got: &[Outputs], want: &[Outputs]) -> Result<f64, Failure> {
        let d_v = self.case.params().d_v;
        let mut worst = 0.0f64;
        for (lane, (got, want)) in got.iter().zip(want).enumerate() {
            expect_written(&format!("lane {lane} out"), &got.out)?;
            for (row, (g, w)) in got.out.chunks_exact(d_v).zip(want.out.chunks_exact(d_v)).enumerate() {
                let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
                let error = norm(&mut g.iter().zip(w).map(|(&a, &b)| f64::from(a) - f64::from(b)));
                let size = norm(&mut w.iter().map(|&b| f64::from(b)));
                // Where weights cancel, the values' own size is what the error is relative to.
                let allowed =
                    self.logit_error(lane, row) * (size + attend::CANCELLATION * (d_v as f64).sqrt());
                if error.is_nan() || error > allowed {
                    let what = format!(
                        "lane {lane} out row {row}: error {error:.3e}, allowed {allowed:.3e}; got {:?}, should be {:?}",
                        head(g),
                        head(w)
                    );
                    return Err(what.into());
                }
                worst = worst.max(error / allowed);
            }
            let share = self.compare_each(lane, "lse", 1, &got.lse, &want.lse, |row, w| {
                self.logit_error(lane, row) + f64::from(f32::EPSILON) * f64::from(w.abs())
            })?;
            worst = worst.max(share);
        }
        Ok(worst)
    }

    fn compare_each(
        &self,
        lane: usize,
        what: &str,
        width: usize,
        got: &[f32],
        want: &[f32],
        allowed: impl Fn(usize, f32) -> f64,
    ) -> Result<f64, Failure> {
        let mut worst = 0.0f64;
        for (row, (g, w)) in got.chunks_exact(width).zip(want.chunks_exact(width)).enumerate() {
            worst = worst.max(compare(&format!("lane {lane} {what} row {row}"), g, w, |w| allowed(row, w))?);
        }
        Ok(worst)
    }

    /// Compares `[G, W?, rows]` weights per head. Errors are relative to the weight, and absolute where a
    /// weight is so small that no mass depends on it.
    fn compare_weights(
        &self,
        lane: usize,
        what: &str,
        per_group: usize,
        got: &[f32],
        want: &[f32],
    ) -> Result<f64, Failure> {
        let tokens = self.case.lanes[lane].tokens;
        let allowed_logit = (0..self.case.lanes[lane].cache.heads.len() * self.case.group * tokens)
            .map(|row| self.logit_error(lane, row))
            .fold(self.tolerance(lane), f64::max);
        let floor = attend::WEIGHT_FLOOR * (tokens.max(1) / per_group.max(1)).max(1) as f64;
        compare(&format!("lane {lane} {what}"), got, want, |w| {
            2.0 * allowed_logit * (f64::from(w.abs()) + floor)
        })
    }

    /// Compares `[G, T, rows]` logits per head, of the rows that were asked for.
    fn compare_dots(
        &self,
        lane: usize,
        spans: Option<&[Spans]>,
        got: &[f32],
        want: &[f32],
    ) -> Result<f64, Failure> {
        let per_head = self.case.group * self.case.lanes[lane].tokens;
        let (mut worst, mut start) = (0.0f64, 0);
        for (h, head) in self.ours[lane].iter().enumerate() {
            let rows = spans.map_or_else(|| head.rows(), |spans| spans[h].rows());
            let len = per_head * rows;
            if len > 0 {
                let (got, want) = (&got[start..start + len], &want[start..start + len]);
                let what = format!("head {h} scores");
                let share = self.compare_each(lane, &what, rows, got, want, |row, w| {
                    let size = if w.is_finite() { f64::from(w.abs()) } else { 0.0 };
                    self.logit_error(lane, h * per_head + row) + f64::from(f32::EPSILON) * size
                })?;
                worst = worst.max(share);
            }
            start += len;
        }
        Ok(worst)
    }
}

fn head(row: &[f32]) -> &[f32] {
    &row[..row.len().min(4)]
}

/// Cases of [`crate::kernel::attend`].
pub fn attend(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(attend::NAME);
    for (i, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let stored = Stored::new(case, backend)?;
            let want = stored.attend(&stored.reference, &stored.ours, Share::ALL, true)?;
            let got = stored.attend(backend, &stored.theirs, Share::ALL, false)?;
            let mut worst = stored.compare(&got, &want)?;
            let with_mass = stored.attend(backend, &stored.theirs, Share::ALL, true)?;
            for (lane, ((a, b), w)) in got.iter().zip(&with_mass).zip(&want).enumerate() {
                expect_same_bits("out with mass", &a.out, &b.out)?;
                expect_same_bits("lse with mass", &a.lse, &b.lse)?;
                worst = worst.max(stored.compare_weights(lane, "mass", 1, &b.mass, &w.mass)?);
            }
            if i % 3 == 0 {
                worst = worst.max(shares(&stored, backend, &want, 2 + i % 6)?);
            }
            worst = worst.max(chosen(&stored, backend, i, &want)?);
            Ok(worst)
        });
    }
    for choice in Choice::ALL {
        report.case(format!("long, {choice:?} chosen"), || long_chosen(backend, choice));
    }
    report.case("pages shared by two lanes", || shared_pages(backend));
    attend_lengths(&mut report, backend);
    report
}

/// Parts of the entries, merged by the backend, give the whole.
fn shares(stored: &Stored, backend: &dyn Backend, want: &[Outputs], of: usize) -> Result<f64, Failure> {
    let parts: Vec<Vec<Outputs>> = (0..of)
        .map(|index| stored.attend(backend, &stored.theirs, Share { index, of }, false))
        .collect::<Result<_, _>>()?;
    let mut merged: Vec<Outputs> = stored.case.lanes.iter().map(|l| l.outputs(stored.case.group)).collect();
    for (lane, merged) in merged.iter_mut().enumerate() {
        let outs: Vec<f32> = parts.iter().flat_map(|p| p[lane].out.iter().copied()).collect();
        let lses: Vec<f32> = parts.iter().flat_map(|p| p[lane].lse.iter().copied()).collect();
        expect_written("out of a share", &outs)?;
        expect_written("lse of a share", &lses)?;
        let (out, lse) = (&mut merged.out, &mut merged.lse);
        let d_v = stored.case.params().d_v;
        backend.merge_partials(&mut MergeArgs { parts: of, d_v, outs: &outs, lses: &lses, out, lse })?;
    }
    stored.compare(&merged, want)
}

/// Chosen entries of every head, each head in a way of its own; all of them in one of the ways.
fn chosen(stored: &Stored, backend: &dyn Backend, first: usize, all: &[Outputs]) -> Result<f64, Failure> {
    let spans: Vec<Vec<Spans>> = stored.case.lanes.iter().map(|l| l.spans(first)).collect();
    let attend = |on, heads| stored.attend_to(on, heads, Some(&spans), Share::ALL, false);
    let want = attend(&stored.reference, &stored.ours)?;
    let got = attend(backend, &stored.theirs)?;
    let worst = stored.compare(&got, &want).map_err(of_chosen)?;
    if !first.is_multiple_of(3) {
        return Ok(worst);
    }
    let everything: Vec<Vec<Spans>> = stored
        .case
        .lanes
        .iter()
        .map(|l| l.cache.rows().into_iter().map(|n| Choice::All.of(n, 0)).collect())
        .collect();
    let got = stored.attend_to(backend, &stored.theirs, Some(&everything), Share::ALL, false)?;
    Ok(worst.max(stored.compare(&got, all).map_err(of_chosen)?))
}

fn of_chosen(failure: Failure) -> Failure {
    match failure {
        Failure::Wrong(what) => Failure::Wrong(format!("of chosen entries: {what}")),
        other => other,
    }
}

/// Enough chosen entries for every way of cutting them.
fn long_chosen(backend: &dyn Backend, choice: Choice) -> Result<f64, Failure> {
    let Some(mut case) = cases().into_iter().find(|c| c.name == "long 4100, tokens 3") else {
        return Err("the case it is made from is missing".to_owned().into());
    };
    let int8 = Packing::new(Format::Int8);
    case.lanes[0].cache.heads = vec![
        vec![SegmentSpec::f32(4, 16), SegmentSpec::stored(9000, 64, DType::F16, DType::F16)],
        vec![SegmentSpec::stored(9000, 128, int8, int8), SegmentSpec::f32(100, 64)],
    ];
    let stored = Stored::new(case, backend)?;
    let spans = |n, h| choice.of(n, h as u64);
    let rows = stored.case.lanes[0].cache.rows();
    let spans = vec![rows.into_iter().enumerate().map(|(h, n)| spans(n, h)).collect()];
    let attend = |on, heads| stored.attend_to(on, heads, Some(&spans), Share::ALL, false);
    stored.compare(&attend(backend, &stored.theirs)?, &attend(&stored.reference, &stored.ours)?)
}

/// Two lanes read the same pages, one of them fewer entries.
fn shared_pages(backend: &dyn Backend) -> Result<f64, Failure> {
    let Some(mut case) = cases().into_iter().find(|c| c.name == "lanes of one token") else {
        return Err("the case it is made from is missing".to_owned().into());
    };
    case.lanes.truncate(1);
    case.lanes.push(case.lanes[0].clone());
    let mut stored = Stored::new(case, backend)?;
    for lanes in [&mut stored.ours, &mut stored.theirs] {
        lanes[1] = lanes[0].clone();
        for segment in lanes[1].iter_mut().flat_map(|h| &mut h.segments) {
            segment.rows = segment.rows * 2 / 3;
            segment.pages.truncate(segment.rows.div_ceil(segment.layout.capacity));
        }
    }
    let want = stored.attend(&stored.reference, &stored.ours, Share::ALL, false)?;
    let got = stored.attend(backend, &stored.theirs, Share::ALL, false)?;
    stored.compare(&got, &want)
}

/// Every buffer one element short or long.
fn attend_lengths(report: &mut KernelReport, backend: &dyn Backend) {
    for (i, what) in
        ["queries", "out", "lse", "mass", "sink_logits", "mass of a share", "share"].into_iter().enumerate()
    {
        report.case(format!("wrong length of {what}"), || {
            let Some(mut case) = cases().into_iter().find(|c| c.name == "sinks, tokens 9") else {
                return Err("the case it is made from is missing".to_owned().into());
            };
            if i == 4
                && let Some(sinks) = &mut case.sinks
            {
                sinks.pop();
            }
            let stored = Stored::new(case, backend)?;
            let mut queries = stored.queries[0].clone();
            let mut o = stored.case.lanes[0].outputs(stored.case.group);
            match i {
                0 => drop(queries.values.pop()),
                1 => o.out.push(0.0),
                2 => drop(o.lse.pop()),
                3 => o.mass.push(0.0),
                _ => {}
            }
            let share = match i {
                5 => Share { index: 0, of: 2 },
                6 => Share { index: 2, of: 2 },
                _ => Share::ALL,
            };
            let lane = o.lane(&stored.theirs[0], &queries, share, i == 3 || i == 5);
            expect_length_error(
                what,
                backend.attend(&stored.case.params(), &mut [lane], &mut Workspace::default()),
            )
        });
    }
    for (i, what) in
        ["spans of too few heads", "spans beyond the entries", "spans with mass", "spans of a share"]
            .into_iter()
            .enumerate()
    {
        report.case(format!("wrong {what}"), || {
            let stored = Stored::new(cases().swap_remove(40), backend)?;
            let mut o = stored.case.lanes[0].outputs(stored.case.group);
            let mut spans = stored.case.lanes[0].spans(0);
            match i {
                0 => drop(spans.pop()),
                1 => spans[0].push(stored.theirs[0][0].rows()..stored.theirs[0][0].rows() + 1),
                _ => {}
            }
            let share = Share { index: 0, of: 1 + usize::from(i == 3) };
            let lane = o.lane(&stored.theirs[0], &stored.queries[0], share, i == 2);
            let lane = attend::AttendLane { spans: Some(&spans), ..lane };
            expect_length_error(
                what,
                backend.attend(&stored.case.params(), &mut [lane], &mut Workspace::default()),
            )
        });
    }
}

/// Cases of [`crate::kernel::attention_mass`].
pub fn attention_mass(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(attention_mass::NAME);
    for (_, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let stored = Stored::new(case, backend)?;
            let want = stored.attend(&stored.reference, &stored.ours, Share::ALL, true)?;
            let mut worst = 0.0f64;
            for (lane, want) in want.iter().enumerate() {
                let run = || {
                    let mut mass = poisoned(want.mass.len());
                    let mut args = mass_args(&stored, lane, &want.lse, &mut mass);
                    backend.attention_mass(&stored.case.params(), &mut args).map(|()| mass)
                };
                let mass = run()?;
                worst = worst.max(stored.compare_weights(lane, "mass", 1, &mass, &want.mass)?);
                expect_same_bits("mass", &mass, &run()?)?;
            }
            Ok(worst)
        });
    }
    for (i, what) in ["queries", "lse", "mass"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let stored = Stored::new(cases().swap_remove(7), backend)?;
            let lse =
                vec![0.0; stored.case.lanes[0].outputs(stored.case.group).lse.len() + usize::from(i == 1)];
            let mut mass = stored.case.lanes[0].outputs(stored.case.group).mass;
            mass.resize(mass.len() + usize::from(i == 2), 0.0);
            let mut args = mass_args(&stored, 0, &lse, &mut mass);
            args.queries = &args.queries[usize::from(i == 0)..];
            expect_length_error(what, backend.attention_mass(&stored.case.params(), &mut args))
        });
    }
    report
}

fn mass_args<'a>(stored: &'a Stored, lane: usize, lse: &'a [f32], mass: &'a mut [f32]) -> MassArgs<'a> {
    let queries = &stored.queries[lane];
    MassArgs {
        heads: &stored.theirs[lane],
        queries: &queries.values,
        positions: &queries.positions,
        lse,
        mass,
    }
}

/// Cases of [`crate::kernel::window_scores`].
pub fn window_scores(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(window_scores::NAME);
    for (_, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        for reduce in [WindowReduce::Sum, WindowReduce::Rows] {
            let case = case.clone();
            report.case(format!("{}, {reduce:?}", case.name), || {
                let stored = Stored::new(case, backend)?;
                let mut worst = 0.0f64;
                for lane in 0..stored.case.lanes.len() {
                    let mut want = window_output(&stored, lane, reduce);
                    let mut got = want.clone();
                    let (reference, params) = (&stored.reference, stored.case.params());
                    reference.window_scores(
                        &params,
                        &mut window_args(&stored, &stored.ours[lane], lane, reduce, &mut want),
                    )?;
                    backend.window_scores(
                        &params,
                        &mut window_args(&stored, &stored.theirs[lane], lane, reduce, &mut got),
                    )?;
                    let per_group = match reduce {
                        WindowReduce::Sum => 1,
                        WindowReduce::Rows => stored.case.lanes[lane].tokens,
                    };
                    worst = worst.max(stored.compare_weights(lane, "weights", per_group, &got, &want)?);
                }
                Ok(worst)
            });
        }
    }
    for (i, what) in ["queries", "out", "sink_logits"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let mut case = cases().swap_remove(7);
            case.sinks = Some(vec![0.0; case.lanes[0].cache.heads.len() * case.group + usize::from(i == 2)]);
            let stored = Stored::new(case, backend)?;
            let mut out = window_output(&stored, 0, WindowReduce::Sum);
            out.resize(out.len() + usize::from(i == 1), 0.0);
            let mut args = window_args(&stored, &stored.theirs[0], 0, WindowReduce::Sum, &mut out);
            args.queries = &args.queries[usize::from(i == 0)..];
            expect_length_error(what, backend.window_scores(&stored.case.params(), &mut args))
        });
    }
    report
}

fn window_output(stored: &Stored, lane: usize, reduce: WindowReduce) -> Vec<f32> {
    let spec = &stored.case.lanes[lane];
    let per_group = match reduce {
        WindowReduce::Sum => 1,
        WindowReduce::Rows => spec.tokens,
    };
    poisoned(stored.case.group * per_group * spec.cache.rows().iter().sum::<usize>())
}

fn window_args<'a>(
    stored: &'a Stored,
    heads: &'a [HeadRows],
    lane: usize,
    reduce: WindowReduce,
    out: &'a mut [f32],
) -> WindowArgs<'a> {
    let queries = &stored.queries[lane];
    WindowArgs { heads, queries: &queries.values, positions: &queries.positions, reduce, out }
}

/// Cases of [`crate::kernel::dot_scores`].
pub fn dot_scores(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(dot_scores::NAME);
    for (i, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let stored = Stored::new(case, backend)?;
            let (params, mut workspace) = (stored.case.params(), Workspace::default());
            let mut worst = 0.0f64;
            for (lane, heads) in stored.theirs.iter().enumerate() {
                for spans in some_spans(i as u64, heads) {
                    let spans = spans.as_deref();
                    let mut run = |on: &dyn Backend, heads| {
                        let mut out = dot_output(&stored, lane, spans);
                        let mut args = dot_args(&stored, heads, lane, spans, &mut out);
                        on.dot_scores(&params, &mut args, &mut workspace).map(|()| out)
                    };
                    let want = run(&stored.reference, &stored.ours[lane])?;
                    let got = run(backend, heads)?;
                    worst = worst.max(stored.compare_dots(lane, spans, &got, &want)?);
                    expect_same_bits("scores", &got, &run(backend, heads)?)?;
                }
            }
            Ok(worst)
        });
    }
    for (i, what) in ["queries", "out", "spans", "entries that spans name"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let stored = Stored::new(cases().swap_remove(7), backend)?;
            let heads = &stored.theirs[0];
            let mut spans: Vec<Spans> =
                heads.iter().map(|h| std::iter::once(0..h.rows()).collect()).collect();
            match i {
                2 => drop(spans.pop()),
                3 => spans[1].push(heads[1].rows()..heads[1].rows() + 1),
                _ => {}
            }
            let mut out = dot_output(&stored, 0, Some(&spans[..]));
            out.resize(out.len() + usize::from(i == 1), 0.0);
            let mut args = dot_args(&stored, heads, 0, Some(&spans), &mut out);
            args.queries = &args.queries[usize::from(i == 0)..];
            let workspace = &mut Workspace::default();
            expect_length_error(what, backend.dot_scores(&stored.case.params(), &mut args, workspace))
        });
    }
    report
}

/// What is asked of the heads in turn: everything, some of it, and everything by spans, single entries or nothing.
pub(super) fn some_spans(seed: u64, heads: &[HeadRows]) -> [Option<Vec<Spans>>; 3] {
    let mut random = Random::new(seed ^ 0xd075);
    let mut some = |longest: usize| {
        let mut spans = |rows| {
            let (mut spans, mut slot) = (Spans::default(), random.below(2 * longest));
            while slot < rows {
                let end = rows.min(slot + 1 + random.below(longest));
                spans.push(slot..end);
                slot = end + 1 + random.below(3 * longest);
            }
            spans
        };
        heads.iter().map(|h| spans(h.rows())).collect::<Vec<_>>()
    };
    let (runs, single) = (some(40), some(1));
    let other = match random.below(3) {
        0 => heads.iter().map(|h| std::iter::once(0..h.rows()).collect()).collect(),
        1 => single,
        _ => vec![Spans::default(); heads.len()],
    };
    [None, Some(runs), Some(other)]
}

fn dot_output(stored: &Stored, lane: usize, spans: Option<&[Spans]>) -> Vec<f32> {
    let spec = &stored.case.lanes[lane];
    let all = || spec.cache.rows().iter().sum();
    let rows: usize = spans.map_or_else(all, |spans| spans.iter().map(Spans::rows).sum());
    poisoned(stored.case.group * spec.tokens * rows)
}

fn dot_args<'a>(
    stored: &'a Stored,
    heads: &'a [HeadRows],
    lane: usize,
    spans: Option<&'a [Spans]>,
    out: &'a mut [f32],
) -> DotArgs<'a> {
    let tokens = stored.case.lanes[lane].tokens;
    DotArgs { heads, queries: &stored.queries[lane].values, tokens, spans, out }
}

/// Cases of [`crate::kernel::merge_partials`].
pub fn merge_partials(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(merge_partials::NAME);
    for (parts, rows, d_v) in [
        (1, 1, 1),
        (1, 5, 64),
        (2, 3, 7),
        (3, 17, 33),
        (4, 100, 128),
        (7, 64, 80),
        (16, 9, 256),
        (5, 0, 16),
        (64, 2, 1),
    ] {
        report.case(format!("{parts} parts, {rows} rows, d_v {d_v}"), || {
            let mut random = Random::new(40);
            let mut outs = random.rows(parts * rows * d_v, 1.0, DType::F32);
            let mut lses = random.rows(parts * rows, 20.0, DType::F32);
            for (i, lse) in lses.iter_mut().enumerate() {
                // Row 1 saw nothing in any part; other rows nothing in some. Such a part's output is not read.
                if rows > 1 && i % rows == 1 || i % 5 == 3 {
                    *lse = f32::NEG_INFINITY;
                    outs[i * d_v..(i + 1) * d_v].fill(0.0);
                }
            }
            let (mut want_out, mut want_lse) = (poisoned(rows * d_v), poisoned(rows));
            let (mut out, mut lse) = (want_out.clone(), want_lse.clone());
            let args = |out, lse| MergeArgs { parts, d_v, outs: &outs, lses: &lses, out, lse };
            Reference::default().merge_partials(&mut args(&mut want_out, &mut want_lse))?;
            backend.merge_partials(&mut args(&mut out, &mut lse))?;
            let tolerance = |w: f32| merge_partials::TOLERANCE * (1.0 + f64::from(w.abs()));
            Ok(compare("out", &out, &want_out, tolerance)?.max(compare("lse", &lse, &want_lse, tolerance)?))
        });
    }
    for (i, what) in ["outs", "lses", "out"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let long = |which: usize, len: usize| vec![0.0; len + usize::from(i == which)];
            let (outs, lses, mut out, mut lse) = (long(0, 24), long(1, 6), long(2, 12), vec![0.0; 3]);
            let mut args =
                MergeArgs { parts: 2, d_v: 4, outs: &outs, lses: &lses, out: &mut out, lse: &mut lse };
            expect_length_error(what, backend.merge_partials(&mut args))
        });
    }
    report
}
