//! Truncated decompositions: against NumPy on a recorded trace, between routes, and on matrices whose decomposition is
//! known. `tests/golden/smollm2-small.svd.json` is made by `scripts/golden-svd.py`.

use crate::support::noise;
use kvsieve::device::Pool;
use kvsieve::error::{FactorError, KernelError};
use kvsieve::factor::{Dense, FactorOptions, Factors, FromFn, Progress, Route, Rows, factor, unwatched};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use std::ops::ControlFlow;

/// Of singular values and of the relative error, against NumPy in f64.
const PEER: f64 = 1e-3;

/// The same of each singular value by random directions, where spectra are as flat as these: two power
/// iterations leave some of the directions after the rank in them. More iterations find them to [`PEER`].
const NEAR: f64 = 3e-2;

/// And of the error by as many: they lie in what is kept, only not in the best way.
const NEAR_ERROR: f64 = 1e-2;

/// Of `AᵀA` from the unit matrix, per element.
const ORTHONORMAL: f64 = 1e-5;

/// Of the certificate from the distance itself, both squared, as a share of the squared norm: sums of f32 products.
const CERTIFICATE: f64 = 1e-6;

/// Of reconstructed rows whose rank is no larger than asked for.
const EXACT: f64 = 1e-4;

const ROUTES: [Route; 2] = [Route::Gram, Route::Randomized];

/// `X[tokens, features]` of known singular values: `Σ s[i] u[i] v[i]ᵀ` with orthonormal `u` and `v`.
fn known(tokens: usize, features: usize, singular: &[f64], seed: u64) -> Vec<f32> {
    let basis = |side: usize, seed: u64| -> Vec<Vec<f64>> {
        let mut basis: Vec<Vec<f64>> = Vec::new();
        for i in 0..singular.len() {
            let place = |j: usize| (seed << 40) + (i * side + j) as u64;
            let mut new: Vec<f64> = (0..side).map(|j| f64::from(noise(place(j)))).collect();
            // Twice, as once leaves what rounding leaves.
            for old in basis.iter().chain(&basis) {
                let dot: f64 = old.iter().zip(&new).map(|(a, b)| a * b).sum();
                new.iter_mut().zip(old).for_each(|(x, o)| *x -= dot * o);
            }
            let norm = new.iter().map(|x| x * x).sum::<f64>().sqrt();
            new.iter_mut().for_each(|x| *x /= norm);
            basis.push(new);
        }
        basis
    };
    let (u, v) = (basis(tokens, seed), basis(features, seed + 1));
    let at =
        |t: usize, j: usize| -> f64 { (0..singular.len()).map(|i| singular[i] * u[i][t] * v[i][j]).sum() };
    (0..tokens * features).map(|k| at(k / features, k % features) as f32).collect()
}

fn run(x: &[f32], tokens: usize, options: &FactorOptions) -> Factors {
    let rows = Dense::new(x, tokens, x.len() / tokens).unwrap();
    factor(&rows, options, &Pool::with_threads(2).unwrap(), &mut unwatched).unwrap()
}

/// Everything that holds of any factors of `x`; the relative distance.
fn check(x: &[f32], factors: &Factors) -> f64 {
    let Factors { tokens, features, rank, ref a, ref b, ref singular, .. } = *factors;
    assert_eq!((a.len(), b.len(), singular.len()), (tokens * rank, rank * features, rank));
    for i in 0..rank {
        for j in 0..=i {
            let dot: f64 = a.chunks_exact(rank).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
            assert!((dot - f64::from(u8::from(i == j))).abs() <= ORTHONORMAL, "A: {i}, {j}: {dot}");
            // Rows of B are orthogonal, and as long as the singular values say.
            let (left, right) = (&b[i * features..][..features], &b[j * features..][..features]);
            let dot: f64 = left.iter().zip(right).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let want = if i == j { f64::from(singular[i]).powi(2) } else { 0.0 };
            let scale = f64::from(singular[0]).powi(2);
            assert!((dot - want).abs() <= 1e-6 * scale, "B: {i}, {j}: {dot} not {want}");
        }
    }
    assert!(singular.is_sorted_by(|x, y| x >= y), "{singular:?}");
    let mut back = vec![f32::NAN; x.len()];
    factors.reconstruct(0..tokens, &mut back).unwrap();
    let mut row = vec![f32::NAN; features];
    factors.reconstruct(tokens - 1..tokens, &mut row).unwrap();
    assert_eq!(row, back[(tokens - 1) * features..], "a row by itself is the same");
    let square = |x: f64| x * x;
    let norm: f64 = x.iter().map(|&x| square(x.into())).sum();
    let lost: f64 = x.iter().zip(&back).map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum();
    assert!((factors.squared_norm - norm).abs() <= 1e-9 * norm);
    assert!((factors.squared_error - lost).abs() <= CERTIFICATE * norm, "{} {lost}", factors.squared_error);
    if norm == 0.0 { 0.0 } else { (lost / norm).sqrt() }
}

#[test]
fn matrices_of_low_rank_come_back() {
    for (tokens, features) in [(300, 40), (40, 300), (64, 64), (700, 200), (130, 1100), (1, 9), (9, 1)] {
        for rank in [1, 5, 17].into_iter().filter(|&rank| rank <= tokens.min(features)) {
            let singular: Vec<f64> = (0..rank).map(|i| 50.0 / (1.0 + i as f64)).collect();
            let x = known(tokens, features, &singular, 1);
            // With the rank, and with more than there is: directions that hold nothing are orthonormal too.
            for asked in [rank, (rank + 3).min(tokens.min(features))] {
                for route in ROUTES {
                    let options = FactorOptions { route, ..FactorOptions::new(asked) };
                    let factors = run(&x, tokens, &options);
                    assert!(check(&x, &factors) <= EXACT, "{tokens}x{features} {rank} of {asked} {route:?}");
                    assert_eq!((factors.rank, factors.route), (asked, route));
                    for (got, want) in factors.singular.iter().zip(&singular) {
                        assert!((f64::from(*got) - want).abs() <= 1e-5 * singular[0], "{got} {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_constants_and_repeated_rows_are_factored() {
    for (tokens, features) in [(50, 20), (20, 50), (1, 1)] {
        let rank = 4.min(tokens.min(features));
        for route in ROUTES {
            let options = FactorOptions { route, ..FactorOptions::new(rank) };
            let zero = vec![0.0; tokens * features];
            let factors = run(&zero, tokens, &options);
            assert_eq!(check(&zero, &factors), 0.0);
            assert_eq!((factors.squared_norm, factors.squared_error), (0.0, 0.0));
            assert_eq!(factors.relative_error(), 0.0);
            assert!(factors.singular.iter().chain(&factors.b).all(|&x| x == 0.0));

            let constant = vec![-3.5; tokens * features];
            let factors = run(&constant, tokens, &options);
            assert!(check(&constant, &factors) <= EXACT);
            let want = 3.5 * ((tokens * features) as f32).sqrt();
            assert!((factors.singular[0] - want).abs() <= 1e-5 * want);
            assert!(factors.singular[1..].iter().all(|&s| s <= 1e-5 * want), "{:?}", factors.singular);

            let row: Vec<f32> = (0..features).map(|j| noise(j as u64)).collect();
            let repeated: Vec<f32> = (0..tokens).flat_map(|_| row.iter().copied()).collect();
            assert!(check(&repeated, &run(&repeated, tokens, &options)) <= EXACT);
        }
    }
}

/// Numbers near the ends of f32's range, whose products are beyond it.
#[test]
fn huge_and_tiny_numbers_keep_their_digits() {
    let singular: Vec<f64> = (0..6).map(|i| 30.0 / (1.0 + f64::from(i))).collect();
    let x = known(200, 30, &singular, 2);
    for exponent in [-126, -60, 60, 119] {
        let scaled: Vec<f32> = x.iter().map(|x| x * 2f32.powi(exponent)).collect();
        for route in ROUTES {
            let options = FactorOptions { route, ..FactorOptions::new(6) };
            let factors = run(&scaled, 200, &options);
            for (got, want) in factors.singular.iter().zip(&singular) {
                let got = f64::from(*got) * 2f64.powi(-exponent);
                assert!((got - want).abs() <= 1e-4 * want, "2^{exponent} {route:?}: {got} {want}");
            }
            // Numbers below the normal ones have fewer digits to come back with.
            assert!(factors.relative_error() < 1e-3, "{}", factors.relative_error());
        }
    }
    let x = vec![f32::MAX; 600];
    let rows = Dense::new(&x, 200, 3).unwrap();
    let error = factor(&rows, &FactorOptions::new(1), &Pool::current(), &mut unwatched).unwrap_err();
    assert!(matches!(error, FactorError::Overflow { singular } if singular > f64::from(f32::MAX)), "{error}");
}

struct Golden {
    name: String,
    tokens: usize,
    x: Vec<f32>,
    squared_norm: f64,
    singular: Vec<f64>,
}

impl Golden {
    /// The best relative error of any rank.
    fn error(&self, rank: usize) -> f64 {
        (self.singular[rank..].iter().map(|s| s * s).sum::<f64>() / self.squared_norm).sqrt()
    }
}

fn golden() -> Vec<Golden> {
    let trace = std::fs::read("tests/golden/smollm2-small.trace.safetensors").unwrap();
    let trace = SafeTensors::deserialize(&trace).unwrap();
    let text = std::fs::read_to_string("tests/golden/smollm2-small.svd.json").unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let case = |case: &Value| {
        let (tokens, side) = (case["tokens"].as_u64().unwrap() as usize, case["side"].as_str().unwrap());
        let layers: Vec<u64> = serde_json::from_value(case["layers"].clone()).unwrap();
        let tensors: Vec<Vec<f32>> = layers
            .iter()
            .map(|layer| {
                let tensor = trace.tensor(&format!("layers.{layer}.{side}")).unwrap();
                tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            })
            .collect();
        let (heads, d) = (3, 64);
        let mut x = Vec::new();
        for t in 0..tokens {
            for tensor in &tensors {
                (0..heads).for_each(|h| x.extend(&tensor[(h * tokens + t) * d..][..d]));
            }
        }
        Golden {
            name: format!("{side} {layers:?}"),
            tokens,
            x,
            squared_norm: case["squared_norm"].as_f64().unwrap(),
            singular: serde_json::from_value(case["singular"].clone()).unwrap(),
        }
    };
    golden["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn a_recorded_trace_has_the_singular_values_that_numpy_finds() {
    let golden = golden();
    assert_eq!(golden.len(), 6);
    for case in &golden {
        for rank in [1, 8, 32, 96, 160] {
            let gram = FactorOptions { route: Route::Gram, ..FactorOptions::new(rank) };
            let random = FactorOptions { route: Route::Randomized, ..gram.clone() };
            let careful = FactorOptions { power_iterations: 12, oversample: 32, ..random.clone() };
            for (options, bound, of_error) in
                [(gram, PEER, PEER), (random, NEAR, NEAR_ERROR), (careful, PEER, PEER)]
            {
                let factors = run(&case.x, case.tokens, &options);
                let distance = check(&case.x, &factors);
                let context = format!("{}, {options:?}", case.name);
                assert!((factors.squared_norm / case.squared_norm - 1.0).abs() < 1e-8, "{context}");
                for (i, (&got, &want)) in factors.singular.iter().zip(&case.singular).enumerate() {
                    // Of itself, and where it is dust, of the largest: layer 0 has a channel that is never used.
                    let bound = bound * want + 1e-6 * case.singular[0];
                    assert!((f64::from(got) - want).abs() <= bound, "{context}, {i}: {got} {want}");
                }
                let (got, want) = (factors.relative_error(), case.error(rank));
                // Squared, as a share of the square, which is twice that of the error; and the certificate's rounding.
                let bound = 2.0 * of_error * want * want + CERTIFICATE;
                assert!((got * got - want * want).abs() <= bound, "{context}: {got} {want}");
                assert!((distance * distance - want * want).abs() <= bound, "{context}: {distance} {want}");
            }
        }
    }
}

#[test]
fn a_tolerance_keeps_the_smallest_rank_that_meets_it() {
    for case in &golden() {
        for tolerance in [0.5, 0.2, 0.1, 0.05] {
            let side = case.singular.len();
            let best = (1..=side).find(|&rank| case.error(rank) <= tolerance).unwrap();
            for route in ROUTES {
                let options = FactorOptions { route, tolerance: Some(tolerance), ..FactorOptions::new(150) };
                let factors = run(&case.x, case.tokens, &options);
                check(&case.x, &factors);
                let context = format!("{} {tolerance} {route:?}: rank {}", case.name, factors.rank);
                if best <= 150 {
                    assert_eq!(factors.rank, best, "{context}");
                    assert!(factors.relative_error() <= tolerance, "{context}");
                } else {
                    assert!(factors.rank == 150 && factors.relative_error() > tolerance, "{context}");
                }
                // A cut is a cut: the same numbers as all ranks have, but for the rounding of other blocks.
                let whole = run(&case.x, case.tokens, &FactorOptions { tolerance: None, ..options });
                assert_eq!(whole.singular[..factors.rank], factors.singular, "{context}");
                assert_eq!(whole.b[..factors.b.len()], factors.b, "{context}");
            }
        }
        // Any error at all will do, and none.
        for (tolerance, rank) in [(1.0, 1), (0.0, 20)] {
            let options = FactorOptions { tolerance: Some(tolerance), ..FactorOptions::new(20) };
            assert_eq!(run(&case.x, case.tokens, &options).rank, rank);
        }
    }
    let zero = vec![0.0; 12 * 8];
    let options = FactorOptions { tolerance: Some(0.0), ..FactorOptions::new(5) };
    assert_eq!(run(&zero, 12, &options).rank, 1);
}

/// Rows in pieces, in memory, and in memory somewhere else: the bits are those of the rows.
#[test]
fn bits_do_not_depend_on_threads_runs_or_where_rows_lie() {
    let case = golden().swap_remove(2);
    let features = case.x.len() / case.tokens;
    let wide = known(1300, 150, &[9.0, 8.0, 5.0, 3.0, 1.0, 0.1], 3);
    for (x, tokens, features) in [(&case.x, case.tokens, features), (&wide, 1300, 150)] {
        for route in ROUTES {
            let options = FactorOptions { route, ..FactorOptions::new(40) };
            let want = run(x, tokens, &options);
            let pieces = FromFn::new(tokens, features, |first, out: &mut [f32]| {
                out.copy_from_slice(&x[first * features..][..out.len()]);
                Ok(())
            });
            for threads in [1, 2, 4] {
                let pool = Pool::with_threads(threads).unwrap();
                for offset in 0..3 {
                    let moved = [vec![0.0; offset], x.clone()].concat();
                    let rows = Dense::new(&moved[offset..], tokens, features).unwrap();
                    let got = factor(&rows, &options, &pool, &mut unwatched).unwrap();
                    assert!(got == want, "{route:?}, {threads} threads, offset {offset}");
                }
                let got = factor(&pieces, &options, &pool, &mut unwatched).unwrap();
                assert!(got == want, "{route:?}, {threads} threads, in pieces");
            }
            let got = factor(&pieces, &options, &Pool::current(), &mut unwatched).unwrap();
            assert!(got == want, "{route:?}, no pool");
        }
        // Another seed, other bits, the same matrix.
        let options = FactorOptions { route: Route::Randomized, ..FactorOptions::new(40) };
        let other = FactorOptions { seed: 1, ..options.clone() };
        let (one, other) = (run(x, tokens, &options), run(x, tokens, &other));
        assert_ne!(one.a, other.a);
        assert!((one.relative_error() - other.relative_error()).abs() < PEER);
    }
}

#[test]
fn auto_takes_the_route_of_the_smaller_side() {
    let options = FactorOptions::new(100);
    assert_eq!(options.route_for(8192, 300), Route::Gram);
    assert_eq!(options.route_for(300, 8192), Route::Gram);
    assert_eq!(options.route_for(8192, 1024), Route::Randomized);
    assert_eq!(FactorOptions::new(400).route_for(8192, 1024), Route::Gram);
    assert_eq!(options.route_for(8192, 4096), Route::Randomized);
    assert_eq!(options.route_for(2000, 2000), Route::Randomized);
    // Nothing is left out by as many random directions as there are.
    assert_eq!(FactorOptions::new(1990).route_for(2000, 2000), Route::Gram);
    assert_eq!(FactorOptions { route: Route::Randomized, ..options }.route_for(4, 4), Route::Randomized);
}

#[test]
fn what_cannot_be_factored_is_named() {
    let x = vec![1.0; 12];
    let fails = |tokens, features, options: FactorOptions| {
        let rows = FromFn::new(tokens, features, |_, out: &mut [f32]| {
            out.fill(1.0);
            Ok(())
        });
        factor(&rows, &options, &Pool::current(), &mut unwatched).unwrap_err()
    };
    assert_eq!(fails(0, 3, FactorOptions::new(1)), FactorError::Empty { tokens: 0, features: 3 });
    assert_eq!(fails(3, 0, FactorOptions::new(1)), FactorError::Empty { tokens: 3, features: 0 });
    for rank in [0, 4, usize::MAX] {
        let error = fails(5, 3, FactorOptions::new(rank));
        assert_eq!(error, FactorError::Rank { rank, tokens: 5, features: 3 });
        assert!(error.to_string().contains("must be 1 to 3; change the option rank"), "{error}");
    }
    for tolerance in [-0.1, f64::NAN, f64::INFINITY] {
        let options = FactorOptions { tolerance: Some(tolerance), ..FactorOptions::new(1) };
        assert!(matches!(fails(4, 3, options), FactorError::Tolerance { .. }));
    }
    let error = fails(usize::MAX / 4, 64, FactorOptions::new(8));
    assert!(matches!(error, FactorError::TooLarge { columns: 64, .. }), "{error}");
    let error = Dense::new(&x, 4, 4).unwrap_err();
    assert_eq!(error.to_string(), "the slice of rows has 12 elements, 4 rows of 4 need 16");
    assert!(Dense::new(&x, usize::MAX, 2).unwrap_err().to_string().contains("more than usize::MAX"));
    assert!(Dense::new(&x, 4, 3).unwrap().read(3, &mut [0.0; 6]).is_err());

    // The first in the order of rows, whoever finds one first.
    for (threads, value) in [(1, f32::NAN), (4, f32::INFINITY), (4, f32::NEG_INFINITY)] {
        let mut x = vec![1.0; 1000 * 7];
        x[300 * 7 + 5] = value;
        x[301 * 7] = f32::NAN;
        x[999 * 7] = f32::NAN;
        let (rows, pool) = (Dense::new(&x, 1000, 7).unwrap(), Pool::with_threads(threads).unwrap());
        let error = factor(&rows, &FactorOptions::new(2), &pool, &mut unwatched).unwrap_err();
        assert!(matches!(error, FactorError::NotFinite { row: 300, column: 5, .. }), "{error}");
        assert!(error.to_string().contains(&format!("is {value}")), "{error}");
    }

    let factors = run(&x, 4, &FactorOptions::new(1));
    let mut out = [0.0; 6];
    assert_eq!(factors.reconstruct(3..5, &mut out), Err(FactorError::Rows { first: 3, end: 5, tokens: 4 }));
    assert!(matches!(factors.reconstruct(1..2, &mut out), Err(FactorError::Length { got: 6, rows: 1, .. })));
    assert_eq!(factors.reconstruct(1..3, &mut out), Ok(()));
}

/// Rows that cannot be read, at once or on a later pass, and rows that change: an error, never a panic.
#[test]
fn rows_that_fail_or_change_end_the_work() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    for route in ROUTES {
        let options = FactorOptions { route, ..FactorOptions::new(6) };
        for (tokens, features) in [(600, 20), (20, 600)] {
            let reads = AtomicUsize::new(0);
            let count = FromFn::new(tokens, features, |first, out: &mut [f32]| {
                reads.fetch_add(1, Ordering::Relaxed);
                (0..out.len()).for_each(|i| out[i] = noise((first * features + i) as u64));
                Ok(())
            });
            factor(&count, &options, &Pool::current(), &mut unwatched).unwrap();
            let all = reads.load(Ordering::Relaxed);
            assert!(all > 2, "{all}");
            for last in 0..all {
                let left = AtomicUsize::new(last);
                let broken = KernelError::Layout { kernel: "test", problem: "gone" };
                let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let failing = FromFn::new(tokens, features, |first, out: &mut [f32]| {
                    take().map_err(|_| broken.clone())?;
                    count.read(first, out)
                });
                let error = factor(&failing, &options, &Pool::current(), &mut unwatched).unwrap_err();
                assert_eq!(error, FactorError::Read(broken.clone()));
                left.store(last, Ordering::Relaxed);
                let changing = FromFn::new(tokens, features, |first, out: &mut [f32]| {
                    count.read(first, out)?;
                    if take().is_err() {
                        out.fill(f32::NAN);
                    }
                    Ok(())
                });
                let error = factor(&changing, &options, &Pool::current(), &mut unwatched).unwrap_err();
                let expected = matches!(error, FactorError::Changed | FactorError::NotFinite { .. });
                assert!(expected, "{route:?} {tokens}x{features} after {last} of {all}: {error}");
            }
        }
    }
}

/// At whatever report it is stopped, it stops there.
#[test]
fn who_watches_can_stop_it_at_any_report() {
    let x: Vec<f32> = (0..3000 * 24).map(|i| noise(i as u64)).collect();
    let rows = Dense::new(&x, 3000, 24).unwrap();
    let pool = Pool::with_threads(2).unwrap();
    for route in ROUTES {
        let options = FactorOptions { route, ..FactorOptions::new(5) };
        let mut reports = Vec::new();
        let mut watch = |progress: Progress| {
            reports.push(progress);
            ControlFlow::Continue(())
        };
        let want = factor(&rows, &options, &pool, &mut watch).unwrap();
        assert!(reports.len() > 10, "{}", reports.len());
        for (stop, &Progress { done, total, .. }) in reports.iter().enumerate() {
            let mut heard = 0;
            let mut watch = |_: Progress| {
                heard += 1;
                if heard > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let error = factor(&rows, &options, &pool, &mut watch).unwrap_err();
            assert_eq!(error, FactorError::Cancelled { done, total });
            assert_eq!(heard, stop + 1);
        }
        // The pool is as good as before.
        assert!(factor(&rows, &options, &pool, &mut unwatched).unwrap() == want);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_shape_is_factored_on_both_routes(
        tokens in 1usize..290,
        features in 1usize..290,
        rank in 1usize..40,
        decay in 0.5f64..0.99,
        noisy in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let side = tokens.min(features);
        let rank = rank.min(side);
        let singular: Vec<f64> = (0..side.min(60)).map(|i| 20.0 * decay.powi(i as i32)).collect();
        let mut x = known(tokens, features, &singular, seed);
        if noisy {
            x.iter_mut().enumerate().for_each(|(i, x)| *x += 1e-2 * noise((seed << 32) + i as u64));
        }
        let errors = ROUTES.map(|route| {
            let factors = run(&x, tokens, &FactorOptions { route, seed, ..FactorOptions::new(rank) });
            check(&x, &factors)
        });
        // The Gram route is the best there is; 16 directions more and two power iterations are near it.
        let [best, random] = errors;
        prop_assert!(best <= random + 1e-5 && random <= 1.02 * best + 1e-5, "{errors:?}");
        if !noisy {
            let norm: f64 = singular.iter().map(|s| s * s).sum();
            let want = (singular.iter().skip(rank).map(|s| s * s).sum::<f64>() / norm).sqrt();
            prop_assert!((best - want).abs() <= 1e-5, "{best} {want}");
        }
    }
}
