//! What cannot be seen from outside: bases of hard columns, Gram matrices across tiles, the estimate of the work.

use super::*;
use crate::testing::Random;
use crate::view::DType;

/// Largest defect of `MᵀM` from the unit matrix.
fn defect(m: &[f32], columns: usize) -> f64 {
    let mut worst = 0.0f64;
    for i in 0..columns {
        for j in 0..=i {
            let rows = m.chunks_exact(columns);
            let dot: f64 = rows.map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
            worst = worst.max((dot - f64::from(u8::from(i == j))).abs());
        }
    }
    worst
}

/// How much of `m` lies outside the space of `q`'s columns, relative to `m`.
fn outside(m: &[f32], q: &[f32], columns: usize) -> f64 {
    let (mut lost, mut all) = (0.0, 0.0);
    for j in 0..columns {
        let mut left: Vec<f64> = m.chunks_exact(columns).map(|row| f64::from(row[j])).collect();
        all += left.iter().map(|x| x * x).sum::<f64>();
        for i in 0..columns {
            let q: Vec<f64> = q.chunks_exact(columns).map(|row| f64::from(row[i])).collect();
            let share: f64 = q.iter().zip(&left).map(|(q, x)| q * x).sum();
            left.iter_mut().zip(&q).for_each(|(x, q)| *x -= share * q);
        }
        lost += left.iter().map(|x| x * x).sum::<f64>();
    }
    if all == 0.0 { 0.0 } else { (lost / all).sqrt() }
}

#[test]
fn bases_are_orthonormal_and_hold_their_columns_whatever_these_are() {
    let pool = Pool::with_threads(2).unwrap();
    let mut random = Random::new(3);
    for (rows, columns) in [(1, 1), (3, 3), (40, 7), (300, 33), (130, 130), (700, 150)] {
        let plain = random.rows(rows * columns, 1.0, DType::F32);
        let change = |f: &dyn Fn(usize, usize, f32) -> f32| -> Vec<f32> {
            (0..rows * columns).map(|k| f(k / columns, k % columns, plain[k])).collect()
        };
        let first = |i: usize| plain[i * columns];
        let cases = [
            ("independent", change(&|_, _, x| x)),
            ("graded", change(&|_, j, x| x * 10f32.powi(-(j as i32 % 20)))),
            // Each a little beside the first: one pass of Cholesky is not enough.
            ("close", change(&|i, j, x| first(i) + if j == 0 { 0.0 } else { 3e-5 * x })),
            ("closer", change(&|i, j, x| first(i) + if j == 0 { 0.0 } else { 1e-6 * x })),
            ("equal", change(&|i, _, _| first(i))),
            ("every third zero", change(&|_, j, x| if j % 3 == 1 { 0.0 } else { x })),
            ("zero", change(&|_, _, _| 0.0)),
            ("constant", change(&|_, _, _| 0.25)),
            ("twice the same", change(&|i, j, _| plain[i * columns + j / 2])),
        ];
        for (name, m) in cases {
            let mut q = m.clone();
            orthogonal::orthonormalise(&mut q, columns, &pool).unwrap();
            let (defect, outside) = (defect(&q, columns), outside(&m, &q, columns));
            assert!(defect < 2e-6, "{name} {rows}x{columns}: {defect}");
            assert!(outside < 2e-6, "{name} {rows}x{columns}: {outside}");
        }
    }
}

#[test]
fn gram_matrices_are_right_across_tiles_panels_and_depths() {
    let pool = Pool::with_threads(2).unwrap();
    let mut random = Random::new(4);
    for (rows, columns) in [(1, 1), (5, 130), (128, 256), (600, 257), (515, 40)] {
        let x = random.rows(rows * columns, 1.0, DType::F32);
        let dense = Dense::new(&x, rows, columns).unwrap();
        let pieces = FromFn::new(rows, columns, |first, out: &mut [f32]| dense.read(first, out));
        let at = |i: usize, j: usize| f64::from(x[i * columns + j]);
        for source in [&dense as &dyn Rows, &pieces] {
            let mut watch = unwatched;
            let mut meter = Meter::new(u64::MAX, &mut watch).unwrap();
            let (source, survey) = Source::survey(source, &pool, &mut meter).unwrap();
            let norm: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((survey.squared_norm - norm).abs() <= 1e-12 * norm);

            let mut tiles = Tiles::new(columns).unwrap();
            product::columns_gram(&source, &pool, &mut tiles, &mut meter).unwrap();
            let gram = tiles.assemble();
            for (i, j) in (0..columns).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                let want: f64 = (0..rows).map(|t| at(t, i) * at(t, j)).sum();
                assert!((gram[(i, j)] - want).abs() < 1e-10, "{rows}x{columns} {i},{j}");
            }
            let mut tiles = Tiles::new(rows).unwrap();
            product::rows_gram(&source, &pool, &mut tiles, &mut meter).unwrap();
            let gram = tiles.assemble();
            for (s, t) in (0..rows).flat_map(|s| (0..rows).map(move |t| (s, t))) {
                let want: f64 = (0..columns).map(|j| at(s, j) * at(t, j)).sum();
                assert!((gram[(s, t)] - want).abs() < 1e-10, "{rows}x{columns} {s},{t}");
            }
        }
    }
}

#[test]
fn the_estimate_of_the_work_is_what_is_counted() {
    let mut random = Random::new(5);
    for (rows, columns, route) in [
        (700, 60, Route::Gram),
        (60, 700, Route::Gram),
        (700, 60, Route::Randomized),
        (60, 700, Route::Randomized),
    ] {
        let x = random.rows(rows * columns, 1.0, DType::F32);
        let dense = Dense::new(&x, rows, columns).unwrap();
        let options = FactorOptions { route, ..FactorOptions::new(9) };
        let mut heard = Vec::new();
        let mut watch = |progress: Progress| {
            heard.push(progress);
            ControlFlow::Continue(())
        };
        factor(&dense, &options, &Pool::current(), &mut watch).unwrap();
        let total = heard[0].total;
        assert!(heard.iter().all(|p| p.total == total) && heard.is_sorted_by_key(|p| p.done));
        assert_eq!((heard[0].done, heard[heard.len() - 1].done), (0, total));
        // The last stage brings it there by itself: the estimate neither falls short nor stops early.
        assert_eq!(heard[heard.len() - 2].done, total, "{rows}x{columns} {route:?}");
        assert!(heard[heard.len() - 3].done < total, "{rows}x{columns} {route:?}");
    }
}
