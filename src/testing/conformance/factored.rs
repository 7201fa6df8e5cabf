//! Entries that are made of factors: made one by one, and attended over.
//!
//! *Helps* because runs of factors stand between exact ones, lose entries, and have one side or both. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, compare, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::columns::ColumnLayout;
use crate::device::page::{HeadRows, PageLayout};
use crate::device::{Angles, Factors, Kept};
use crate::error::KernelError;
use crate::geometry::{LayerShape, Rotary, RotaryLayout};
use crate::kernel::attend_factored::{self, FactoredArgs, Remembered};
use crate::kernel::rebuild::{self, RebuildArgs};
use crate::kernel::{AttentionParams, Spans};
use crate::plan::HeadPlan;
use crate::store::{self, Matrix, NewRows, SharedPositions};
use crate::testing::Random;
use crate::testing::cache::poisoned;
use crate::view::DType;
use std::sync::Arc;

/// One layer whose entries are made of factors in two runs.
#[derive(Clone, Debug)]
struct Case {
    shape: LayerShape,
    /// Of keys and of values; 0 leaves the side as it is.
    ranks: [usize; 2],
    dtype: DType,
    /// Entries of the two runs; exact ones stand before, between and behind.
    runs: [usize; 2],
    /// Whether entries were removed here and there.
    removed: bool,
    /// Whether some keys are kept beside the products.
    kept: bool,
    tokens: usize,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [(1, 1), (64, 3), (65, 130), (300, 0), (9, 64), (513, 7)];
    let ranks = [[5, 7], [16, 64], [1, 0], [0, 3], [48, 130], [33, 20]];
    let shapes =
        [(1, 1, 8, 8), (6, 2, 16, 24), (8, 2, 64, 64), (3, 3, 5, 1), (12, 1, 33, 128), (4, 2, 128, 40)];
    for (i, dtype) in [DType::F32, DType::F16, DType::Bf16].into_iter().cycle().take(18).enumerate() {
        let (hq, h, d_k, d_v) = shapes[i % shapes.len()];
        let layout = [RotaryLayout::HalfSplit, RotaryLayout::Interleaved][i / 2 % 2];
        let rotary = (i % 4 != 3 && d_k > 1).then(|| Rotary::new((d_k / 2 * 2).min(64), 10_000.0, layout));
        let softcap = (i % 5 == 4).then_some(20.0);
        let shape = LayerShape { d_v, rotary, softcap, ..LayerShape::new(hq, h, d_k) };
        let (first, second) = sizes[(i + i / 6) % sizes.len()];
        let tokens = [1, 2, 5, 1, 17, 40][(i + i / 3) % 6];
        let ranks = ranks[(i + 2 * (i / 6)) % ranks.len()];
        let (removed, kept) = (i % 3 == 1, i / 2 % 3 == 0);
        cases.push(Case { shape, ranks, dtype, runs: [first, second], removed, kept, tokens });
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let Self { ranks, runs, dtype, tokens, removed, kept, .. } = self;
        let (hq, h) = (self.shape.query_heads, self.shape.kv_heads);
        let (d_k, d_v) = (self.shape.d_k, self.shape.d_v);
        let removed = if *removed { ", some removed" } else { "" };
        let kept = if *kept { ", some keys kept" } else { "" };
        format!(
            "{hq}/{h} heads, d {d_k}/{d_v}, ranks {ranks:?}, runs {runs:?}, T {tokens}, {}{removed}{kept}",
            dtype.name()
        )
    }

    /// The heads; the same numbers on every backend.
    fn build(&self, backend: &dyn Backend) -> Result<Vec<HeadRows>, Failure> {
        let (shape, dtype) = (&self.shape, self.dtype);
        let mut random = Random::new(77);
        let exact = Arc::new(PageLayout::new(shape, 16, dtype, dtype, backend.mirrored(), 1));
        let last = 3 + self.runs[0] + 9 + self.runs[1] + 4;
        let angles = shape.rotary.as_ref().map(|rotary| Arc::new(Angles::new(rotary, 3 * last as i32)));
        let mut heads = vec![HeadRows::default(); shape.kv_heads];
        let mut shared = SharedPositions::default();
        let mut next = 0;
        let mut append = |heads: &mut [HeadRows], n: usize, random: &mut Random| -> Result<(), Failure> {
            let positions: Vec<i32> = (next..next + n).map(|i| 3 * i as i32).collect();
            next += n;
            for head in heads {
                let (keys, values) =
                    (random.rows(n * shape.d_k, 1.0, dtype), random.rows(n * shape.d_v, 1.0, dtype));
                store::append(
                    backend,
                    &exact,
                    head,
                    NewRows { positions: &positions, keys: &keys, values: &values },
                )?;
            }
            Ok(())
        };
        append(&mut heads, 3, &mut random)?;
        for (n, behind) in self.runs.into_iter().zip([9, 4]) {
            let start = heads[0].rows();
            append(&mut heads, n, &mut random)?;
            let rows = self.ranks.map(|rank| random.rows(n * rank, 1.0, dtype));
            let [keys, values] = [0, 1].map(|i| (Matrix { rows: &rows[i], rank: self.ranks[i] }, dtype));
            let latents = Arc::new(store::latents(backend, n, keys, values)?);
            for head in &mut heads {
                let [keys, values] = [(0, shape.d_k), (1, shape.d_v)].map(|(i, d)| {
                    let rank = self.ranks[i];
                    let rows = random.rows(rank * d, 1.0 / (rank as f32).sqrt(), dtype);
                    (rank > 0).then(|| store::basis(backend, &rows, d, dtype)).transpose()
                });
                let (latents, angles) = (Arc::clone(&latents), angles.clone());
                // Each fourth key, where keys are made.
                let among: Vec<u32> = (0..n as u32).filter(|row| self.kept && row % 4 == 1).collect();
                let rows = random.rows(among.len() * shape.d_k, 1.0, dtype);
                let none = (Matrix { rows: &[], rank: 0 }, dtype);
                let rows = (Matrix { rows: &rows, rank: shape.d_k }, dtype);
                let kept = Kept {
                    keys: Arc::new(store::latents(backend, among.len(), rows, none)?),
                    latents: among.into(),
                };
                let kept = (self.ranks[0] > 0).then_some(kept);
                let factors = Factors { latents, keys: keys?, values: values?, rows: None, kept, angles };
                if n > 0 {
                    store::factorise(backend, &exact, head, start..start + n, factors, &mut shared)?;
                }
            }
            append(&mut heads, behind, &mut random)?;
        }
        if self.removed {
            for (h, head) in heads.iter_mut().enumerate() {
                let rows = head.rows();
                let keep = (0..rows as u32).filter(|slot| (slot + h as u32) % 5 != 3).collect();
                store::compact(
                    backend,
                    head,
                    &HeadPlan::new(rows, keep),
                    &ColumnLayout::new(Vec::new()),
                    &mut shared,
                )?;
            }
        }
        Ok(heads)
    }
}

/// Slots of the entries of a head that are made of factors.
fn made(head: &HeadRows) -> Vec<u32> {
    head.factored().flat_map(|(.., slots)| slots).map(|slot| slot as u32).collect()
}

type Sides = [Vec<f32>; 2];

fn rows(on: &dyn Backend, shape: &LayerShape, head: &HeadRows, slots: &[u32]) -> Result<Sides, KernelError> {
    let (mut keys, mut values) = (poisoned(slots.len() * shape.d_k), poisoned(slots.len() * shape.d_v));
    on.rebuild(&mut RebuildArgs { head, slots, keys: &mut keys, values: &mut values })?;
    Ok([keys, values])
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Cases of [`crate::kernel::rebuild`].
pub fn rebuild(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(rebuild::NAME);
    for (_, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name(), || {
            let reference = Reference::default();
            let (ours, theirs) = (case.build(&reference)?, case.build(backend)?);
            let mut worst = 0.0f64;
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let all = made(ours);
                let some: Vec<u32> = all.iter().copied().filter(|slot| slot % 7 < 3).collect();
                for slots in [&all, &some] {
                    let want = rows(&reference, &case.shape, ours, slots)?;
                    let got = rows(backend, &case.shape, theirs, slots)?;
                    let again = rows(backend, &case.shape, theirs, slots)?;
                    for (side, d) in [case.shape.d_k, case.shape.d_v].into_iter().enumerate() {
                        expect_same_bits("rows", &got[side], &again[side])?;
                        let rank = case.ranks[side] as f64;
                        // Latent rows are of length √rank, bases of length √d; both are normal.
                        let allowed = rebuild::TOLERANCE * (9.0 * rank * d as f64).sqrt();
                        let what = ["keys", "values"][side];
                        worst = worst.max(compare(what, &got[side], &want[side], |_| allowed)?);
                    }
                }
            }
            Ok(worst)
        });
    }
    for what in ["keys", "values", "an entry that is stored", "a slot there is not"] {
        report.case(format!("wrong {what}"), || {
            let case = cases().swap_remove(1);
            let heads = case.build(backend)?;
            let slots = match what {
                "an entry that is stored" => vec![0, 5],
                "a slot there is not" => vec![5, heads[0].rows() as u32 + 9],
                _ => vec![5, 6],
            };
            let mut keys = vec![0.0; 2 * case.shape.d_k + usize::from(what == "keys")];
            let mut values = vec![0.0; 2 * case.shape.d_v + usize::from(what == "values")];
            let mut args =
                RebuildArgs { head: &heads[0], slots: &slots, keys: &mut keys, values: &mut values };
            match (backend.rebuild(&mut args), slots[0] == 5 && slots[1] == 6) {
                (result, true) => expect_length_error(what, result),
                (Err(KernelError::Layout { .. }), _) => Ok(0.0),
                (other, _) => Err(format!("{what}: {other:?}").into()),
            }
        });
    }
    report
}

/// What is read of each head: all, every third run of a few, nothing.
fn choices(heads: &[HeadRows]) -> Vec<Option<Vec<Spans>>> {
    let some = |head: &HeadRows| (0..head.rows()).step_by(7).map(|s| s..(s + 2).min(head.rows())).collect();
    let none = |_: &HeadRows| Spans::default();
    vec![None, Some(heads.iter().map(some).collect()), Some(heads.iter().map(none).collect())]
}

/// Cases of [`crate::kernel::attend_factored`].
pub fn attend_factored(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(attend_factored::NAME);
    for (_, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name(), || {
            let reference = Reference::default();
            let (ours, theirs) = (case.build(&reference)?, case.build(backend)?);
            let mut worst = 0.0f64;
            for spans in choices(&ours) {
                worst = worst.max(check(backend, &case, (&ours, &theirs), spans.as_deref())?);
            }
            Ok(worst)
        });
    }
    for (i, what) in ["queries", "out", "lse", "remembered", "spans"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let case = cases().swap_remove(1);
            let heads = case.build(backend)?;
            let (hq, d_k, d_v) = (case.shape.query_heads, case.shape.d_k, case.shape.d_v);
            let length = |at: usize, n: usize| n + usize::from(at == i);
            let queries = vec![0.0; length(0, hq * d_k)];
            let (mut out, mut lse) = (vec![0.0; length(1, hq * d_v)], vec![0.0; length(2, hq)]);
            let mut remembered = vec![Remembered::default(); length(3, heads.len())];
            let spans = vec![Spans::default(); length(4, heads.len())];
            let mut args = FactoredArgs {
                heads: &heads,
                queries: &queries,
                tokens: 1,
                spans: Some(&spans),
                out: &mut out,
                lse: &mut lse,
                remembered: &mut remembered,
            };
            let params = AttentionParams::of(&case.shape);
            expect_length_error(what, backend.attend_factored(&params, &mut args))
        });
    }
    report
}

fn check(
    backend: &dyn Backend,
    case: &Case,
    (ours, theirs): (&[HeadRows], &[HeadRows]),
    spans: Option<&[Spans]>,
) -> Result<f64, Failure> {
    let (shape, tokens, reference) = (&case.shape, case.tokens, Reference::default());
    let (d_k, d_v, params) = (shape.d_k, shape.d_v, AttentionParams::of(shape));
    let count = shape.query_heads * tokens;
    let queries: Vec<f32> = {
        let mut random = Random::new(78);
        (0..count * d_k).map(|_| 2.0 * random.normal()).collect()
    };
    let run = |on: &dyn Backend, heads: &[HeadRows], remembered: &mut [Remembered]| {
        let (mut out, mut lse) = (poisoned(count * d_v), poisoned(count));
        let (queries, out_to, lse_to) = (&queries[..], &mut out, &mut lse);
        let mut args = FactoredArgs { heads, queries, tokens, spans, out: out_to, lse: lse_to, remembered };
        on.attend_factored(&params, &mut args).map(|()| (out, lse))
    };
    let fresh = |entries| vec![Remembered::new(entries, 4); ours.len()];
    let want = run(&reference, ours, &mut fresh(0))?;
    let got = run(backend, theirs, &mut fresh(0))?;
    expect_written("out", &got.0)?;
    // Whatever is remembered, and in a second step what the first one left.
    for entries in [8, 1 << 12] {
        let mut remembered = fresh(entries);
        for _ in 0..2 {
            let again = run(backend, theirs, &mut remembered)?;
            expect_same_bits("out", &got.0, &again.0)?;
            expect_same_bits("lse", &got.1, &again.1)?;
        }
    }
    let rows_of = shape.group() * tokens;
    let mut worst = 0.0f64;
    for (h, head) in ours.iter().enumerate() {
        let [keys, values] = rows(&reference, shape, head, &made(head))?;
        let most = |rows: &[f32], d: usize| rows.chunks_exact(d).map(norm).fold(0.0, f64::max);
        let (key, value) = (most(&keys, d_k), most(&values, d_v));
        for row in h * rows_of..(h + 1) * rows_of {
            let query = norm(&queries[row * d_k..(row + 1) * d_k]);
            let logit = attend_factored::tolerance(case.dtype) * (1.0 + f64::from(shape.scale) * query * key);
            let pair = (&got.1[row..=row], &want.1[row..=row]);
            if pair.1[0] == f32::NEG_INFINITY {
                if pair.0[0] != f32::NEG_INFINITY
                    || got.0[row * d_v..(row + 1) * d_v].iter().any(|&x| x != 0.0)
                {
                    return Err(format!("row {row} sees nothing and is {}", pair.0[0]).into());
                }
                continue;
            }
            worst = worst.max(compare("lse", pair.0, pair.1, |_| logit)?);
            let span = row * d_v..(row + 1) * d_v;
            let difference: Vec<f32> =
                got.0[span.clone()].iter().zip(&want.0[span]).map(|(a, b)| a - b).collect();
            // A weight is off by the factor of its logit's error, and so is their sum.
            let share = norm(&difference) / (2.0 * logit * value + f64::from(f32::MIN_POSITIVE));
            if share.is_nan() || share > 1.0 {
                return Err(format!("row {row}: error {share:.2} of the tolerance").into());
            }
            worst = worst.max(share);
        }
    }
    Ok(worst)
}
