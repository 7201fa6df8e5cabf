//! Pooling and top-k: rows of scores of different lengths.
//!
//! *Helps* pin the order every backend must choose by. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, compare, expect_length_error};
use crate::backend::{Backend, Reference};
use crate::kernel::pool::{self, PoolArgs, PoolKind};
use crate::kernel::top_k::{self, TopKArgs};
use crate::testing::Random;
use crate::testing::cache::poisoned;
use crate::view::DType;

/// Lengths around the widths and blocks implementations work in.
const ROWS: [&[usize]; 7] = [
    &[],
    &[0],
    &[1],
    &[5, 0, 1, 2],
    &[31, 32, 33, 63, 64, 65],
    &[127, 128, 129, 255, 256, 257],
    &[1000, 3, 4097],
];

/// Cases of [`crate::kernel::pool`].
pub fn pool(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(pool::NAME);
    for kind in [PoolKind::Average, PoolKind::Max] {
        for lengths in ROWS {
            for width in [1, 3, 5, 7, 13, 63] {
                report.case(format!("{kind:?} {width}, {lengths:?}"), || {
                    let input = Random::new(50).rows(lengths.iter().sum(), 1.0, DType::F32);
                    let (mut want, mut got) = (poisoned(input.len()), poisoned(input.len()));
                    let args = |out| PoolArgs { kind, width, lengths, input: &input, out };
                    Reference::default().pool(&mut args(&mut want))?;
                    backend.pool(&mut args(&mut got))?;
                    // The terms are of order 1 whatever they sum to.
                    compare("out", &got, &want, |w| match kind {
                        PoolKind::Average => pool::TOLERANCE * (1.0 + f64::from(w.abs())),
                        PoolKind::Max => f64::MIN_POSITIVE,
                    })
                });
            }
        }
    }
    for (i, what) in ["input", "out", "width"].into_iter().enumerate() {
        report.case(format!("wrong {what}"), || {
            let (input, mut out) = (vec![0.0; 5 + usize::from(i == 0)], vec![0.0; 5 + usize::from(i == 1)]);
            let (kind, width) = (PoolKind::Max, 3 + usize::from(i == 2));
            expect_length_error(
                what,
                backend.pool(&mut PoolArgs { kind, width, lengths: &[2, 3], input: &input, out: &mut out }),
            )
        });
    }
    report
}

/// Scores that test the order, not the arithmetic.
fn scores(kind: usize, len: usize, random: &mut Random) -> Vec<f32> {
    let edge = [
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        -1e-42,
        1e-42,
        f32::MAX,
        f32::MIN,
        1.0,
    ];
    match kind {
        0 => random.rows(len, 1.0, DType::F32),
        1 => vec![1.0; len],
        2 => (0..len).map(|_| random.below(3) as f32 - 1.0).collect(),
        3 => (0..len).map(|_| random.pick(&edge)).collect(),
        4 => (0..len).map(|i| i as f32).collect(),
        _ => (0..len).map(|i| -(i as f32)).collect(),
    }
}

/// Cases of [`crate::kernel::top_k`].
pub fn top_k(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(top_k::NAME);
    let mut index = 0;
    for lengths in ROWS {
        for kind in 0..6 {
            for share in [0.0, 0.1, 0.5, 0.97, 1.0] {
                for protected in [false, true] {
                    index += 1;
                    if !effort.wants(index) {
                        continue;
                    }
                    report.case(
                        format!("{lengths:?}, scores {kind}, share {share}, protected {protected}"),
                        || top_k_case(backend, lengths, kind, share, protected),
                    );
                }
            }
        }
    }
    for (i, what) in
        ["counts", "scores", "protect", "out", "count above the length", "count below the protected"]
            .into_iter()
            .enumerate()
    {
        report.case(format!("wrong {what}"), || {
            let extra = |which: usize| usize::from(i == which);
            let scores = vec![0.0; 5 + extra(1)];
            let protect = [&[0u8, 0, 1, 1, 0][..], &[0][..extra(2)]].concat();
            let counts = match i {
                0 => vec![1],
                4 => vec![3, 2],
                5 => vec![1, 1],
                _ => vec![1, 2],
            };
            let mut out = vec![0; counts.iter().sum::<usize>() + extra(3)];
            let mut args = TopKArgs {
                lengths: &[2, 3],
                counts: &counts,
                scores: &scores,
                protect: &protect,
                out: &mut out,
            };
            expect_length_error(what, backend.top_k(&mut args))
        });
    }
    report
}

fn top_k_case(
    backend: &dyn Backend,
    lengths: &[usize],
    kind: usize,
    share: f64,
    protected: bool,
) -> Result<f64, Failure> {
    let mut random = Random::new(60);
    let (mut all_scores, mut protect, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for &len in lengths {
        all_scores.extend(scores(kind, len, &mut random));
        let marks: Vec<u8> = (0..len).map(|_| u8::from(protected && random.one_in(9))).collect();
        let least = marks.iter().filter(|&&m| m != 0).count();
        counts.push(((len as f64 * share) as usize).clamp(least, len));
        protect.extend(marks);
    }
    // No slot is u32::MAX, so one that is left over shows.
    let mut want = vec![u32::MAX; counts.iter().sum()];
    let mut got = want.clone();
    let args = |out| TopKArgs { lengths, counts: &counts, scores: &all_scores, protect: &protect, out };
    Reference::default().top_k(&mut args(&mut want))?;
    backend.top_k(&mut args(&mut got))?;
    match got.iter().zip(&want).position(|(a, b)| a != b) {
        Some(i) => Err(format!("out[{i}] is slot {}, should be {}", got[i], want[i]).into()),
        None => Ok(0.0),
    }
}
