//! Sums of values by given weights.
//!
//! *Helps* because the allowed error follows the weights of each row and the values of its head. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::device::page::{HeadRows, Side};
use crate::kernel::attend::Workspace;
use crate::kernel::attend::cases::cases;
use crate::kernel::row_norms::NormArgs;
use crate::kernel::total_rows;
use crate::kernel::weigh_values::{self, WeighArgs};
use crate::testing::Random;
use crate::testing::cache::poisoned;

/// How many weights are not zero.
#[derive(Clone, Copy, Debug)]
enum Kind {
    All,
    /// One in some, and long runs of none.
    Few,
    None,
}

/// `[rows, entries]` for each head; rows of very different sizes.
fn weights(kind: Kind, heads: &[HeadRows], rows: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut weights = Vec::new();
    for head in heads {
        for row in 0..rows {
            let size = 10f32.powi((row % 5) as i32 * 3 - 6);
            weights.extend((0..head.rows()).map(|j| {
                let weight = size * random.normal().abs();
                let weighs = match kind {
                    Kind::All => true,
                    Kind::Few => j / 100 % 2 == 0 && random.below(7) == 0,
                    Kind::None => false,
                };
                if weighs { weight } else { 0.0 }
            }));
        }
    }
    weights
}

/// Cases of [`crate::kernel::weigh_values`].
pub fn weigh_values(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(weigh_values::NAME);
    for (i, case) in cases().into_iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name.clone(), || {
            let reference = Reference::default();
            let mut worst = 0.0f64;
            for lane in &case.lanes {
                let (ours, theirs) = (lane.cache.build(&reference)?, lane.cache.build(backend)?);
                // Around the rows that implementations take together.
                let rows = [1, 4, 3, 8, 9, 17, 70][i % 7];
                for kind in [Kind::All, Kind::Few, Kind::None] {
                    worst = worst.max(compare(backend, (&ours, &theirs), kind, rows, i as u64)?);
                }
            }
            Ok(worst)
        });
    }
    for (i, what) in ["weights", "out"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let heads = cases().swap_remove(7).lanes[0].cache.build(backend)?;
            let d_v = heads[0].segments[0].layout.d_v;
            let weights = vec![0.0; 2 * total_rows(&heads) + usize::from(i == 0)];
            let mut out = vec![0.0; 2 * heads.len() * d_v + usize::from(i == 1)];
            let mut args = WeighArgs { heads: &heads, rows: 2, weights: &weights, out: &mut out, d_v };
            expect_length_error(what, backend.weigh_values(&mut args, &mut Workspace::default()))
        });
    }
    report
}

fn compare(
    backend: &dyn Backend,
    (ours, theirs): (&[HeadRows], &[HeadRows]),
    kind: Kind,
    rows: usize,
    seed: u64,
) -> Result<f64, Failure> {
    let reference = Reference::default();
    let Some(d_v) = ours.iter().flat_map(|h| &h.segments).map(|s| s.layout.d_v).next() else {
        return Ok(0.0);
    };
    let weights = weights(kind, ours, rows, seed);
    let run = |on: &dyn Backend, heads: &[HeadRows]| {
        let mut out = poisoned(heads.len() * rows * d_v);
        let mut args = WeighArgs { heads, rows, weights: &weights, out: &mut out, d_v };
        on.weigh_values(&mut args, &mut Workspace::default()).map(|()| out)
    };
    let (want, got) = (run(&reference, ours)?, run(backend, theirs)?);
    expect_written("out", &got)?;
    expect_same_bits("out", &got, &run(backend, theirs)?)?;
    let mut norms = poisoned(total_rows(ours));
    reference.row_norms(&mut NormArgs { heads: ours, side: Side::Value, out: &mut norms })?;
    let (tolerance, mut worst) = (weigh_values::tolerance(ours), 0.0f64);
    let (mut weights, mut norms) = (&weights[..], &norms[..]);
    for (h, head) in ours.iter().enumerate() {
        let (own, behind) = norms.split_at(head.rows());
        norms = behind;
        let largest = own.iter().fold(0.0, |a: f64, &b| a.max(f64::from(b)));
        for row in 0..rows {
            let (line, behind) = weights.split_at(head.rows());
            weights = behind;
            let at = (h * rows + row) * d_v;
            let pairs = got[at..at + d_v].iter().zip(&want[at..at + d_v]);
            let error = pairs.map(|(&g, &w)| (f64::from(g) - f64::from(w)).powi(2)).sum::<f64>().sqrt();
            let allowed = tolerance * largest * line.iter().map(|&w| f64::from(w)).sum::<f64>();
            if error.is_nan() || error > allowed {
                let what = format!("{kind:?}, head {h} row {row}: error {error:.3e}, allowed {allowed:.3e}");
                return Err(what.into());
            }
            worst = worst.max(if error > 0.0 { error / allowed } else { 0.0 });
        }
    }
    Ok(worst)
}
