//! Scale, minimum and codes of one group: the arithmetic that [`super`]'s table states, shared by the host
//! implementations so that they agree to the bit.
//!
//! Sums run over sixteen partial ones and rounding is an addition, so that a compiler may use vectors of any width and
//! every instruction set gives the same bits. *Helps* because bit-exactness with other engines lives in one place.
//! *Hurts* nothing.

use crate::device::encoding::Format;
use half::f16;

/// Partial sums; the widest vector of single-precision numbers.
const LANES: usize = 16;

/// Ranges that a fitted group tries: shares of what its elements span, or multiples of their root mean square.
const SPANS: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];
const SPREADS: [f32; 7] = [0.8, 0.87, 0.94, 1.0, 1.07, 1.14, 1.21];

/// Added and taken off again it leaves the nearest integer, ties to even, of numbers up to 2²² in magnitude.
const ROUNDING: f32 = 12_582_912.0;

/// Codes groups of numbers, one after another.
#[derive(Debug)]
pub struct Quantizer {
    format: Format,
    /// What the codes stand for, before scaling.
    levels: Vec<f32>,
    /// The same of an attempt that may turn out worse.
    attempt: Vec<f32>,
}

impl Quantizer {
    /// For groups of any size.
    pub fn new(format: Format) -> Self {
        Self { format, levels: Vec::new(), attempt: Vec::new() }
    }

    /// Codes of `values` into `codes`; gives scale and minimum.
    #[inline(always)]
    pub fn group(&mut self, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        self.levels.resize(values.len(), 0.0);
        self.attempt.resize(values.len(), 0.0);
        let top = ((1u32 << self.format.bits()) - 1) as f32;
        match self.format {
            Format::Int8 => self.symmetric(values, codes),
            Format::Kivi4 | Format::Kivi2 => self.affine(top, values, codes),
            Format::Int4 => self.fitted_affine(top, values, codes),
            Format::Lm4 | Format::Lm3 | Format::Lm2 => self.lloyd(values, codes),
            Format::Q8_0 => self.llama_symmetric(values, codes),
            Format::Q4_0 | Format::Q5_0 => self.llama_signed(top, values, codes),
            Format::Q4_1 | Format::Q5_1 => self.llama_affine(top, values, codes),
        }
    }

    #[inline(always)]
    fn symmetric(&mut self, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let scale = f16::from_f32(peak(values) / 127.0);
        let inverse = inverse(scale.to_f32());
        for (code, x) in codes.iter_mut().zip(values) {
            *code = nearest((x * inverse).clamp(-127.0, 127.0)) as i8 as u8;
        }
        (scale, f16::ZERO)
    }

    #[inline(always)]
    fn affine(&mut self, top: f32, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let (low, high) = span(values);
        let (scale, min) = (f16::from_f32((high - low) / top), f16::from_f32(low));
        linear(values, (scale, min), top, &mut self.levels);
        (scale, min).with(codes, &self.levels)
    }

    /// The range that loses least of those tried: a narrower one clips a few elements and rounds all others finer. For the
    /// codes of each, scale and minimum are the least-squares fit.
    #[inline(always)]
    fn fitted_affine(&mut self, top: f32, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let (low, high) = span(values);
        let (width, middle) = (high - low, 0.5 * (low + high));
        let plain = (f16::from_f32(width / top), f16::from_f32(low));
        linear(values, plain, top, &mut self.levels);
        let (mut best, mut least) = (plain, error(values, plain, &self.levels));
        // Nothing to fit without a range, and no number to fit with where it overflows, which the caller reports.
        if !(plain.0 > f16::ZERO && least.is_finite()) {
            return best.with(codes, &self.levels);
        }
        for part in SPANS {
            let (scale, min) = (width * part / top, middle - 0.5 * width * part);
            linear_f32(values, (scale, min), top, &mut self.attempt);
            let fit = fit_affine(values, &self.attempt);
            let fit = (f16::from_f32(fit.0), f16::from_f32(fit.1));
            if !(fit.0 > f16::ZERO && fit.0.is_finite() && fit.1.is_finite()) {
                continue;
            }
            linear(values, fit, top, &mut self.attempt);
            let error = error(values, fit, &self.attempt);
            if error < least {
                (best, least) = (fit, error);
                std::mem::swap(&mut self.levels, &mut self.attempt);
            }
        }
        best.with(codes, &self.levels)
    }

    /// The best of a few scales, each refined to the one that fits its levels best in the least-squares sense.
    #[inline(always)]
    fn lloyd(&mut self, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let Some((table, unit)) = self.format.lloyd() else {
            unreachable!("only Lloyd–Max formats come here")
        };
        let squares: f32 = lanes(values, values, |sum, x, _| sum + x * x).iter().sum();
        let spread = (squares / values.len().max(1) as f32).sqrt();
        let (mut best, mut least) = (f16::ZERO, f32::INFINITY);
        for part in SPREADS {
            levels(values, inverse(spread * part * unit), table, &mut self.attempt);
            let product: f32 = lanes(values, &self.attempt, |sum, x, level| sum + x * level).iter().sum();
            let norm: f32 =
                lanes(&self.attempt, &self.attempt, |sum, level, _| sum + level * level).iter().sum();
            let scale = f16::from_f32(if squares == 0.0 { 0.0 } else { product / norm });
            let error = error(values, (scale, f16::ZERO), &self.attempt);
            if error < least {
                (best, least) = (scale, error);
                std::mem::swap(&mut self.levels, &mut self.attempt);
            } else if least == f32::INFINITY {
                // Too large to compare, or to store, which the caller reports.
                best = scale;
            }
        }
        // The code of a level: how many others are below it.
        codes.fill(table.len() as u8);
        for &threshold in table {
            let threshold = f32::from(threshold);
            for (code, &level) in codes.iter_mut().zip(&self.levels) {
                *code = (*code + u8::from(level > threshold)) - u8::from(level <= -threshold);
            }
        }
        (best, f16::ZERO)
    }

    #[inline(always)]
    fn llama_symmetric(&mut self, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let scale = peak(values) / 127.0;
        let inverse = inverse(scale);
        for (code, x) in codes.iter_mut().zip(values) {
            let x = x * inverse;
            // Half away from zero.
            let whole = x as i32 as f32;
            let away = if (x - whole).abs() >= 0.5 { 1f32.copysign(x) } else { 0.0 };
            *code = (whole + away) as i8 as u8;
        }
        (f16::from_f32(scale), f16::ZERO)
    }

    #[inline(always)]
    fn llama_signed(&mut self, top: f32, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        // The first of the elements of largest magnitude.
        let peak = peak(values);
        let extreme = values.iter().find(|x| x.abs() == peak).copied().unwrap_or(0.0);
        let zero = f32::from(self.format.zero());
        let scale = extreme / -zero;
        let inverse = inverse(scale);
        for (code, x) in codes.iter_mut().zip(values) {
            *code = (x * inverse + (zero + 0.5)).min(top) as u8;
        }
        (f16::from_f32(scale), f16::ZERO)
    }

    #[inline(always)]
    fn llama_affine(&mut self, top: f32, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let (low, high) = span(values);
        let scale = (high - low) / top;
        let inverse = inverse(scale);
        for (code, x) in codes.iter_mut().zip(values) {
            *code = ((x - low) * inverse + 0.5).min(top) as u8;
        }
        (f16::from_f32(scale), f16::from_f32(low))
    }
}

/// Parameters together with the codes that are levels already.
trait WithCodes {
    fn with(self, codes: &mut [u8], levels: &[f32]) -> Self;
}

impl WithCodes for (f16, f16) {
    #[inline(always)]
    fn with(self, codes: &mut [u8], levels: &[f32]) -> Self {
        codes.iter_mut().zip(levels).for_each(|(code, level)| *code = *level as u8);
        self
    }
}

/// Folds pairs of elements, element `i` into lane `i % LANES`.
#[inline(always)]
fn lanes(a: &[f32], b: &[f32], step: impl Fn(f32, f32, f32) -> f32) -> [f32; LANES] {
    lanes_from(0.0, a, b, step)
}

#[inline(always)]
fn lanes_from(start: f32, a: &[f32], b: &[f32], step: impl Fn(f32, f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [start; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] = step(lanes[i], a[i], b[i]);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = step(*lane, *a, *b);
    }
    lanes
}

#[inline(always)]
fn span(values: &[f32]) -> (f32, f32) {
    let low = lanes_from(f32::INFINITY, values, values, |low, x, _| if x < low { x } else { low });
    let high = lanes_from(f32::NEG_INFINITY, values, values, |high, x, _| if x > high { x } else { high });
    (low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

#[inline(always)]
fn peak(values: &[f32]) -> f32 {
    let peak = lanes(values, values, |peak, x, _| if x.abs() > peak { x.abs() } else { peak });
    peak.into_iter().fold(0.0, f32::max)
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[inline(always)]
fn nearest(x: f32) -> f32 {
    (x + ROUNDING) - ROUNDING
}

/// Levels of linear codes under stored parameters.
#[inline(always)]
fn linear(values: &[f32], (scale, min): (f16, f16), top: f32, levels: &mut [f32]) {
    linear_f32(values, (scale.to_f32(), min.to_f32()), top, levels);
}

#[inline(always)]
fn linear_f32(values: &[f32], (scale, min): (f32, f32), top: f32, levels: &mut [f32]) {
    let inverse = inverse(scale);
    for (level, x) in levels.iter_mut().zip(values) {
        *level = nearest(((x - min) * inverse).clamp(0.0, top));
    }
}

/// Levels of a table whose positive half is given, nearest to `values · inverse`.
#[inline(always)]
fn levels(values: &[f32], inverse: f32, table: &[i8], levels: &mut [f32]) {
    levels.fill(f32::from(table[0]));
    for pair in table.windows(2) {
        let (low, high) = (f32::from(pair[0]), f32::from(pair[1]));
        let (middle, step) = (0.5 * (low + high), high - low);
        for (level, x) in levels.iter_mut().zip(values) {
            *level += if (x * inverse).abs() > middle { step } else { 0.0 };
        }
    }
    for (level, x) in levels.iter_mut().zip(values) {
        *level = if *x < 0.0 { -*level } else { *level };
    }
}

/// `Σ (x − (level · scale + min))²`.
#[inline(always)]
fn error(values: &[f32], (scale, min): (f16, f16), levels: &[f32]) -> f32 {
    let (scale, min) = (scale.to_f32(), min.to_f32());
    let squares = lanes(values, levels, |sum, x, level| {
        let off = x - (level * scale + min);
        sum + off * off
    });
    squares.iter().sum()
}

/// Scale and minimum that bring levels nearest to `values` in the least-squares sense.
#[inline(always)]
fn fit_affine(values: &[f32], levels: &[f32]) -> (f32, f32) {
    let count = values.len() as f32;
    let mean = lanes(values, values, |sum, x, _| sum + x).iter().sum::<f32>() / count;
    let middle = lanes(levels, levels, |sum, level, _| sum + level).iter().sum::<f32>() / count;
    let product = lanes(values, levels, |sum, x, level| sum + (x - mean) * (level - middle));
    let norm = lanes(levels, levels, |sum, level, _| sum + (level - middle) * (level - middle));
    let scale = product.iter().sum::<f32>() / norm.iter().sum::<f32>();
    (scale, mean - scale * middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(format: Format, values: &[f32]) -> (Vec<u8>, f32, f32) {
        let mut codes = vec![0; values.len()];
        let (scale, min) = Quantizer::new(format).group(values, &mut codes);
        (codes, scale.to_f32(), min.to_f32())
    }

    #[test]
    fn groups_without_range_come_back_exactly() {
        for format in Format::ALL {
            for value in [0.0, 0.5, -2.0] {
                let (codes, scale, min) = codes(format, &[value; 32]);
                let back = f32::from(format.level(codes[0])) * scale + min;
                let tolerance =
                    if format.lloyd().is_some() { 1e-3 * value.abs() } else { 0.002 * value.abs() };
                assert!((back - value).abs() <= tolerance, "{}: {value} became {back}", format.name());
            }
        }
    }

    #[test]
    fn llama_vectors() {
        // A constant zero group: scale 0, the zero code.
        assert_eq!(codes(Format::Q4_0, &[0.0; 32]), (vec![8; 32], 0.0, 0.0));
        // The extreme element is exact: code 0, negative scale for a positive one.
        let mut values = [0.25f32; 32];
        values[3] = 8.0;
        let (c, scale, _) = codes(Format::Q4_0, &values);
        assert_eq!((c[3], scale), (0, -1.0));
        assert_eq!(c[0], 8);
        values[3] = 127.0;
        let (c, scale, _) = codes(Format::Q8_0, &values);
        assert_eq!((c[3], scale, c[0]), (127, 1.0, 0));
        // Half away from zero where ours takes the even one.
        values[0] = 2.5;
        assert_eq!(codes(Format::Q8_0, &values).0[0], 3);
        assert_eq!(codes(Format::Int8, &values).0[0], 2);
        // The last code of q4_1 is the maximum.
        let ramp: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let (c, scale, min) = codes(Format::Q4_1, &ramp);
        assert_eq!((c[0], c[31], min), (0, 15, 0.0));
        assert!((scale - 31.0 / 15.0).abs() < 1e-3);
    }
}
