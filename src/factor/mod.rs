//! Truncated singular value decomposition of what a cache holds: `X[T, n] ≈ A[T, r] · B[r, n]`.
//!
//! A row of `X` is a token, its columns are the features of one or several layers' KV heads side by side. `A` has
//! orthonormal columns and is shared by all of them; `B = AᵀX` holds the singular values and is cut by layer and head.
//! What is lost is known exactly: with orthonormal `A`, `‖X − AB‖² = ‖X‖² − ‖B‖²` in Frobenius norms ([`Factors`]).
//!
//! Both routes find an orthonormal basis `Q` of the dominant columns' space; the rest is shared:
//! ```text
//! Gram        n <= T:  V = leading eigenvectors of XᵀX,  Q = orth(X V)
//!             n >  T:  Q = leading eigenvectors of XXᵀ
//! randomized  Ω[n, r + oversample] from the seed,  Q = orth(X Ω)
//!             power_iterations times:  P = orth(Xᵀ Q),  Q = orth(X P)
//! both        C = Qᵀ X,  U = leading eigenvectors of C Cᵀ,  A = Q U,  B = Uᵀ C
//! ```
//! No column is divided by a small singular value anywhere. The randomized range finder is algorithm 4.4 of Halko,
//! Martinsson and Tropp, *Finding structure with randomness* (SIAM Review 53, 2011), the closing step their 5.1 by way
//! of the symmetric eigenproblem. Low-rank storage of KV caches by such a decomposition is xKV (arXiv 2503.18893, keys
//! and values of several layers) and ShadowKV (arXiv 2410.21465, keys of one layer).
//!
//! `X` is never needed whole: [`Rows`] hands out blocks of rows, once per pass ([`factor`] says how many passes). The
//! same rows, options and instruction set give the same bits whatever the number of threads: work is cut into blocks of
//! fixed size, each computed by one thread, and their sums are added in order.
//!
//! *Helps* contexts of some thousand tokens and more, whose keys before their rotary embedding and values lie near a
//! space of far fewer dimensions than they have. *Hurts* short ones, where `A` and `B` are larger than `X`
//! (`r (T + n) >= T n`); rows after their rotary embedding, whose rank the rotation multiplies; and a host in a hurry: a
//! decomposition takes as long as some attention over the same tokens (`docs/benchmarks.md`).

mod factors;
mod meter;
mod orthogonal;
mod product;
mod rows;
mod sketch;
#[cfg(test)]
mod tests;
mod tiles;

pub use factors::Factors;
pub use meter::{Progress, unwatched};
pub use rows::{Dense, FromFn, Rows};

use crate::device::Pool;
use crate::error::FactorError;
use faer::Mat;
use meter::Meter;
use rows::Source;
use std::ops::ControlFlow;
use tiles::Tiles;

/// Smaller side of `X` above which [`Route::Auto`] never goes by the Gram matrix: the eigenproblem grows with the cube
/// of that side, and takes a tenth of a second on one thread at this.
pub const GRAM_MAX_SIDE: usize = 1024;

/// Up to that side, [`Route::Auto`] goes by the Gram matrix where random directions times this are as many as it is
/// long: the products of two power iterations cost as much then.
const GRAM_SHARE: usize = 3;

/// How the space of the leading singular vectors is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Route {
    /// What is faster: [`Route::Gram`] if the smaller side of the matrix is at most [`GRAM_MAX_SIDE`] and at most three times
    /// rank and oversampling, or if they leave nothing of it out; else [`Route::Randomized`].
    #[default]
    Auto,
    /// By the eigenvectors of `XᵀX` or `XXᵀ`, whichever is smaller, summed in f64. Exact; its memory grows with
    /// the square of the smaller side.
    Gram,
    /// By random directions and power iterations. Near the best rank-`r` approximation where singular values fall.
    Randomized,
}

/// What to compute. Make one with [`FactorOptions::new`] and change fields.
#[derive(Clone, Debug, PartialEq)]
pub struct FactorOptions {
    /// `r`, the largest rank; 1 to the smaller side of the matrix.
    pub rank: usize,
    /// Stop at the smallest rank whose relative error ([`Factors::relative_error`]) is at most this; `None` keeps
    /// [`FactorOptions::rank`]. If no rank up to that will do, all of it is kept and the certificate tells.
    ///
    /// The error comes out as a difference of squares of f32 results: below about 1e-3 it is mostly rounding.
    pub tolerance: Option<f64>,
    /// Random directions beyond the rank ([`Route::Randomized`]).
    pub oversample: usize,
    /// Power iterations ([`Route::Randomized`]). Each reads all rows twice.
    pub power_iterations: usize,
    /// Another seed, other random directions ([`Route::Randomized`]).
    pub seed: u64,
    /// How the space is found.
    pub route: Route,
}

impl FactorOptions {
    /// This rank, no tolerance, 16 directions more, 2 power iterations, seed 0, [`Route::Auto`].
    pub fn new(rank: usize) -> Self {
        Self { rank, tolerance: None, oversample: 16, power_iterations: 2, seed: 0, route: Route::Auto }
    }

    /// Random directions for a matrix of these sides.
    fn directions(&self, tokens: usize, features: usize) -> usize {
        self.rank.saturating_add(self.oversample).min(tokens).min(features)
    }

    /// The route that [`Route::Auto`] takes for a matrix of these sides; any other is itself.
    pub fn route_for(&self, tokens: usize, features: usize) -> Route {
        let (side, directions) = (tokens.min(features), self.directions(tokens, features));
        let small = side <= GRAM_MAX_SIDE && side <= GRAM_SHARE * directions;
        match self.route {
            Route::Auto if small || directions == side => Route::Gram,
            Route::Auto => Route::Randomized,
            chosen => chosen,
        }
    }

    fn check(&self, tokens: usize, features: usize) -> Result<(), FactorError> {
        if tokens == 0 || features == 0 {
            return Err(FactorError::Empty { tokens, features });
        }
        if self.rank == 0 || self.rank > tokens.min(features) {
            return Err(FactorError::Rank { rank: self.rank, tokens, features });
        }
        match self.tolerance {
            Some(got) if !(got >= 0.0 && got.is_finite()) => Err(FactorError::Tolerance { got }),
            _ => Ok(()),
        }
    }
}

/// Factors the matrix whose rows `rows` hands out, on the threads of `pool`.
///
/// `watch` hears how far the work is, from the calling thread, some hundred times at most for usual sizes; what it
/// returns says whether to go on ([`unwatched`] for no interest).
///
/// With `l = rank + oversample` (the rank on the Gram route), memory is `4 (T l + n l)` bytes, as much again while a
/// basis is made orthonormal, a panel of 512 rows unless they lie in memory anyway ([`Rows::dense`]), and `8 l²` bytes
/// a few times; the Gram route takes `8 min(T, n)²` bytes a few times. Rows are read `3 + 2 power_iterations` times
/// (four times on the Gram route; three times with `T < n`, and once more for every panel of 512 rows that follows theirs).
///
/// ```
/// use kvsieve::factor::{Dense, FactorOptions, factor, unwatched};
/// use kvsieve::device::Pool;
///
/// // Six tokens of four features; two directions explain them all.
/// let x: Vec<f32> = (0..6).flat_map(|t| [1.0, 2.0, t as f32, -(t as f32)]).collect();
/// let rows = Dense::new(&x, 6, 4)?;
/// let factors = factor(&rows, &FactorOptions::new(2), &Pool::current(), &mut unwatched)?;
/// assert_eq!((factors.a.len(), factors.b.len()), (6 * 2, 2 * 4));
/// assert!(factors.relative_error() < 1e-3);
/// # Ok::<(), kvsieve::Error>(())
/// ```
///
/// # Errors
/// [`FactorError`] for an empty matrix, a rank or tolerance out of range, a NaN or an infinity (the first in row
/// order), sizes or memory beyond the machine, rows that could not be read or that change between readings, results
/// beyond f32, and [`FactorError::Cancelled`] where `watch` says so. Nothing is kept of what was done until then.
pub fn factor(
    rows: &dyn Rows,
    options: &FactorOptions,
    pool: &Pool,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Factors, FactorError> {
    let (tokens, features) = (rows.tokens(), rows.features());
    options.check(tokens, features)?;
    // Sizes that no slice has are refused before they are multiplied anywhere.
    elements("the matrix", tokens, features)?;
    let route = options.route_for(tokens, features);
    let side = tokens.min(features);
    let directions = match route {
        Route::Gram => options.rank,
        _ => options.directions(tokens, features),
    };
    let work = Work { tokens, features, directions };
    let mut meter = Meter::new(work.total(options, route), watch)?;
    let (source, survey) = Source::survey(rows, pool, &mut meter)?;

    let q = match route {
        Route::Gram if features <= tokens => {
            let mut tiles = Tiles::new(side)?;
            product::columns_gram(&source, pool, &mut tiles, &mut meter)?;
            let v = orthogonal::leading(tiles.assemble(), directions)?;
            meter.add(work.eigen(side))?;
            let v = flatten("eigenvectors", &v)?;
            let mut y = product::times(&source, &v, directions, pool, &mut meter)?;
            orthogonal::orthonormalise(&mut y, directions, pool)?;
            meter.add(work.orthogonal(tokens))?;
            y
        }
        Route::Gram => {
            let mut tiles = Tiles::new(side)?;
            product::rows_gram(&source, pool, &mut tiles, &mut meter)?;
            let u = orthogonal::leading(tiles.assemble(), directions)?;
            meter.add(work.eigen(side))?;
            flatten("eigenvectors", &u)?
        }
        _ => {
            let omega = sketch::directions(options.seed, features, directions)?;
            let mut y = product::times(&source, &omega, directions, pool, &mut meter)?;
            drop(omega);
            orthogonal::orthonormalise(&mut y, directions, pool)?;
            meter.add(work.orthogonal(tokens))?;
            for _ in 0..options.power_iterations {
                let mut p = product::transposed_times(&source, &y, directions, pool, &mut meter)?;
                orthogonal::orthonormalise(&mut p, directions, pool)?;
                meter.add(work.orthogonal(features))?;
                // The old basis is gone before the new one is made.
                drop(y);
                y = product::times(&source, &p, directions, pool, &mut meter)?;
                orthogonal::orthonormalise(&mut y, directions, pool)?;
                meter.add(work.orthogonal(tokens))?;
            }
            y
        }
    };

    let c = product::transposed_times(&source, &q, directions, pool, &mut meter)?;
    let mut tiles = Tiles::new(directions)?;
    tiles.add_columns(&c, features, directions, pool);
    let u = orthogonal::leading(tiles.assemble(), options.rank)?;
    meter.add(work.eigen(directions))?;
    let factors = factors::close(factors::Parts {
        q,
        c,
        u,
        tokens,
        features,
        directions,
        survey,
        scale: source.scale(),
        tolerance: options.tolerance,
        route,
        pool,
    })?;
    meter.finish()?;
    Ok(factors)
}

/// Multiplications and additions of the stages, as estimated for progress: units in which done and total are told.
struct Work {
    tokens: usize,
    features: usize,
    directions: usize,
}

impl Work {
    fn product(sides: [usize; 3]) -> u64 {
        sides.iter().fold(1, |product, &side| product.saturating_mul(side as u64))
    }

    /// Making `rows` by `directions` orthonormal.
    fn orthogonal(&self, rows: usize) -> u64 {
        Self::product([rows, self.directions, self.directions]).saturating_mul(4)
    }

    /// The eigenvectors of a symmetric matrix.
    fn eigen(&self, side: usize) -> u64 {
        Self::product([side, side, side]).saturating_mul(20)
    }

    fn total(&self, options: &FactorOptions, route: Route) -> u64 {
        let Self { tokens, features, directions } = *self;
        let survey = Self::product([tokens, features, 1]);
        let pass = Self::product([tokens, features, directions]);
        let close = self.eigen(directions);
        let basis = match route {
            Route::Gram => {
                let side = tokens.min(features);
                let gram = Self::product([tokens, features, side]).saturating_add(self.eigen(side));
                if features <= tokens {
                    gram.saturating_add(pass).saturating_add(self.orthogonal(tokens))
                } else {
                    gram
                }
            }
            _ => {
                let first = pass.saturating_add(self.orthogonal(tokens));
                let again = first.saturating_add(pass).saturating_add(self.orthogonal(features));
                first.saturating_add(again.saturating_mul(options.power_iterations as u64))
            }
        };
        [survey, basis, pass, close].iter().fold(0, |sum: u64, &part| sum.saturating_add(part))
    }
}

/// Elements of a matrix whose bytes, as f64, can be counted.
fn elements(what: &'static str, rows: usize, columns: usize) -> Result<usize, FactorError> {
    let error = FactorError::TooLarge { what, rows, columns };
    let elements = rows.checked_mul(columns).filter(|&n| n <= isize::MAX as usize / size_of::<f64>());
    elements.ok_or(error)
}

/// Zeros, or an error where an allocation would end the process.
fn zeros<T: Clone + Default>(what: &'static str, rows: usize, columns: usize) -> Result<Vec<T>, FactorError> {
    let len = elements(what, rows, columns)?;
    let mut zeros = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    zeros.try_reserve_exact(len).map_err(|_| FactorError::Memory { what, bytes })?;
    zeros.resize(len, T::default());
    Ok(zeros)
}

/// Row-major and in f32.
fn flatten(what: &'static str, matrix: &Mat<f64>) -> Result<Vec<f32>, FactorError> {
    let mut flat = zeros(what, matrix.nrows(), matrix.ncols())?;
    for (j, column) in matrix.col_iter().enumerate() {
        for (i, &x) in column.iter().enumerate() {
            flat[i * matrix.ncols() + j] = x as f32;
        }
    }
    Ok(flat)
}

/// `work` over `items` on the threads of the pool, results in order. With one thread nothing is forked: without a pool of
/// its own that would start the process-wide one.
fn spread<T: Send, S, R: Send>(
    pool: &Pool,
    items: Vec<T>,
    scratch: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, T) -> R + Sync + Send,
) -> Vec<R> {
    use rayon::prelude::*;
    if items.len() < 2 || pool.threads() < 2 {
        let mut scratch = scratch();
        return items.into_iter().map(|item| work(&mut scratch, item)).collect();
    }
    pool.run(|| items.into_par_iter().map_init(scratch, work).collect())
}
