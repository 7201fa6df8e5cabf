//! Where rows come from, and what one look at all of them tells: that they are finite, their norm, their size.

use super::meter::Meter;
use super::{spread, zeros};
use crate::device::Pool;
use crate::error::{FactorError, KernelError};

/// A matrix `[tokens, features]` that is read in blocks of rows, by several threads at once and several times.
pub trait Rows: Sync {
    /// Rows, `T`.
    fn tokens(&self) -> usize;

    /// Columns, `n`.
    fn features(&self) -> usize;

    /// Writes the rows from `first` on to `out`, `[out.len() / features, features]` row-major, as many as fit. Every call
    /// must write the same numbers for a row.
    ///
    /// # Errors
    /// Whatever keeps rows from being read; the decomposition ends with it.
    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), KernelError>;

    /// All rows, where they lie row-major in memory as f32: nothing is copied then.
    fn dense(&self) -> Option<&[f32]> {
        None
    }
}

/// Rows that lie in memory.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    rows: &'a [f32],
    tokens: usize,
    features: usize,
}

impl<'a> Dense<'a> {
    /// `[tokens, features]`, row-major.
    ///
    /// # Errors
    /// [`FactorError::Length`] if the slice has another length.
    pub fn new(rows: &'a [f32], tokens: usize, features: usize) -> Result<Self, FactorError> {
        expect("the slice of rows", rows.len(), tokens, features)?;
        Ok(Self { rows, tokens, features })
    }
}

impl Rows for Dense<'_> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn features(&self) -> usize {
        self.features
    }

    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let (buffer, kernel) = ("rows", "factor");
        let start = first.saturating_mul(self.features);
        let rows = start.checked_add(out.len()).and_then(|end| self.rows.get(start..end));
        let length = KernelError::Length { kernel, buffer, got: self.rows.len(), want: start + out.len() };
        out.copy_from_slice(rows.ok_or(length)?);
        Ok(())
    }

    fn dense(&self) -> Option<&[f32]> {
        Some(self.rows)
    }
}

/// Rows that a closure writes: see [`Rows::read`].
#[derive(Clone, Copy, Debug)]
pub struct FromFn<F> {
    tokens: usize,
    features: usize,
    read: F,
}

impl<F: Fn(usize, &mut [f32]) -> Result<(), KernelError> + Sync> FromFn<F> {
    /// `[tokens, features]`, of which `read(first, out)` writes the rows from `first` on.
    pub fn new(tokens: usize, features: usize, read: F) -> Self {
        Self { tokens, features, read }
    }
}

impl<F: Fn(usize, &mut [f32]) -> Result<(), KernelError> + Sync> Rows for FromFn<F> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn features(&self) -> usize {
        self.features
    }

    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), KernelError> {
        (self.read)(first, out)
    }
}

/// An error unless the slice holds so many rows.
pub(super) fn expect(
    buffer: &'static str,
    got: usize,
    rows: usize,
    columns: usize,
) -> Result<(), FactorError> {
    if rows.checked_mul(columns) == Some(got) {
        return Ok(());
    }
    Err(FactorError::Length { buffer, got, rows, columns })
}

/// Rows that one thread reads at a time.
pub(super) const BLOCK: usize = 128;

/// Rows that are multiplied together where all of them meet all columns: four blocks, which several threads read.
const PANEL: usize = 4 * BLOCK;

/// Blocks between two reports, per thread, and at least.
const TURN: usize = 4;

/// What a look at all rows tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Survey {
    /// `‖X‖²_F`, unscaled.
    pub(super) squared_norm: f64,
    /// The bits of the largest magnitude.
    largest: u32,
}

/// The rows as the products read them: finite, and times a power of two that keeps products of extreme ones in range.
pub(super) struct Source<'a> {
    rows: &'a dyn Rows,
    dense: Option<&'a [f32]>,
    scale: f32,
    pub(super) tokens: usize,
    pub(super) features: usize,
}

impl<'a> Source<'a> {
    /// Reads everything once.
    pub(super) fn survey(
        rows: &'a dyn Rows,
        pool: &Pool,
        meter: &mut Meter<'_>,
    ) -> Result<(Self, Survey), FactorError> {
        let (tokens, features) = (rows.tokens(), rows.features());
        let dense = rows.dense();
        if let Some(dense) = dense {
            expect("the slice of rows", dense.len(), tokens, features)?;
        }
        let mut source = Self { rows, dense, scale: 1.0, tokens, features };
        let mut survey = Survey { squared_norm: 0.0, largest: 0 };
        for turn in source.turns(pool) {
            let looked = spread(pool, turn.clone(), Vec::new, |buffer, first| {
                look(source.block(first, BLOCK, buffer)?, first, features)
            });
            // In order of rows: the first NaN is named, and sums do not depend on who came first.
            for part in looked {
                let part = part?;
                survey.squared_norm += part.squared_norm;
                survey.largest = survey.largest.max(part.largest);
            }
            meter.add(source.span(&turn, BLOCK) as u64 * features as u64)?;
        }
        source.scale = scale_of(f32::from_bits(survey.largest));
        Ok((source, survey))
    }

    /// The power of two all rows are multiplied by.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// First rows of all blocks, by how many are worked on between two reports.
    pub(super) fn turns(&self, pool: &Pool) -> Vec<Vec<usize>> {
        let blocks: Vec<usize> = (0..self.tokens).step_by(BLOCK).collect();
        blocks.chunks((TURN * pool.threads()).max(16)).map(<[usize]>::to_vec).collect()
    }

    /// First rows of all panels.
    pub(super) fn panels(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.tokens).step_by(PANEL)
    }

    /// Rows of blocks, or panels, that start there.
    fn span(&self, firsts: &[usize], size: usize) -> usize {
        firsts.iter().map(|first| size.min(self.tokens - first)).sum()
    }

    /// Rows of the panel that starts there.
    pub(super) fn panel_rows(&self, first: usize) -> usize {
        PANEL.min(self.tokens - first)
    }

    /// Up to `count` rows, `[rows, features]`.
    pub(super) fn block<'b>(
        &'b self,
        first: usize,
        count: usize,
        buffer: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], FactorError> {
        let len = count.min(self.tokens - first) * self.features;
        if let (Some(dense), true) = (self.dense, self.scale == 1.0) {
            return Ok(&dense[first * self.features..][..len]);
        }
        if buffer.len() < len {
            *buffer = zeros("a block of rows", count, self.features)?;
        }
        self.fill(first, &mut buffer[..len])?;
        Ok(&buffer[..len])
    }

    /// The panel that starts there, read by all threads.
    pub(super) fn panel<'b>(
        &'b self,
        first: usize,
        pool: &Pool,
        buffer: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], FactorError> {
        if self.dense.is_some() && self.scale == 1.0 {
            return self.block(first, PANEL, buffer);
        }
        let len = self.panel_rows(first) * self.features;
        if buffer.len() < len {
            *buffer = zeros("a panel of rows", self.panel_rows(first), self.features)?;
        }
        let pieces = buffer[..len].chunks_mut(BLOCK * self.features).enumerate().collect();
        let read = spread(pool, pieces, || (), |(), (i, piece)| self.fill(first + i * BLOCK, piece));
        read.into_iter().collect::<Result<(), _>>()?;
        Ok(&buffer[..len])
    }

    fn fill(&self, first: usize, out: &mut [f32]) -> Result<(), FactorError> {
        match self.dense {
            Some(dense) => out.copy_from_slice(&dense[first * self.features..][..out.len()]),
            None => self.rows.read(first, out)?,
        }
        if self.scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= self.scale);
        }
        Ok(())
    }
}

/// Norm and size of a block; an error for its first number that is none.
fn look(rows: &[f32], first: usize, features: usize) -> Result<Survey, FactorError> {
    // Sums side by side, in vectors.
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let mut largest = [0u32; LANES];
    for chunk in rows.chunks(LANES) {
        for ((sum, largest), x) in sums.iter_mut().zip(&mut largest).zip(chunk) {
            *sum += f64::from(*x) * f64::from(*x);
            *largest = (*largest).max(x.abs().to_bits());
        }
    }
    // Bits of magnitudes are in the order of magnitudes, infinity and NaN above all.
    let largest = largest.into_iter().fold(0, u32::max);
    if let (true, Some(at)) = (largest >= f32::INFINITY.to_bits(), rows.iter().position(|x| !x.is_finite())) {
        return Err(FactorError::NotFinite {
            row: first + at / features,
            column: at % features,
            value: rows[at],
        });
    }
    Ok(Survey { squared_norm: sums.iter().sum(), largest })
}

/// 1 for all usual rows; else a power of two that brings the largest number near 1, so that sums of products neither
/// overflow nor lose digits to numbers below f32's normal ones.
fn scale_of(largest: f32) -> f32 {
    const USUAL: i32 = 32;
    if largest == 0.0 {
        return 1.0;
    }
    let exponent = largest.log2().floor() as i32;
    // The factor itself must be a normal number.
    if exponent.abs() <= USUAL { 1.0 } else { 2f32.powi((-exponent).clamp(-126, 126)) }
}
