//! Scale, minimum and codes of one group: the arithmetic that [`super`]'s table states, shared by the host
//! implementations so that they agree to the bit.
//!
//! *Helps* because bit-exactness with other engines lives in one place. *Hurts* nothing.

use crate::device::encoding::Format;
use half::f16;

/// Codes of `values` into `codes`; gives scale and minimum.
pub fn group(format: Format, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    match format {
        Format::Int8 => symmetric(values, codes),
        Format::Int4 | Format::Kivi4 | Format::Kivi2 => affine(format, values, codes),
        Format::Lm4 | Format::Lm3 | Format::Lm2 => lloyd(format, values, codes),
        Format::Q8_0 => llama_symmetric(values, codes),
        Format::Q4_0 | Format::Q5_0 => llama_signed(format, values, codes),
        Format::Q4_1 | Format::Q5_1 => llama_affine(format, values, codes),
    }
}

/// Largest code.
fn top(format: Format) -> f32 {
    ((1u32 << format.bits()) - 1) as f32
}

fn span(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| (lo.min(x), hi.max(x)))
}

fn peak(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m: f32, x| m.max(x.abs()))
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn symmetric(values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let scale = f16::from_f32(peak(values) / 127.0);
    let inverse = inverse(scale.to_f32());
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    }
    (scale, f16::ZERO)
}

fn affine(format: Format, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let (low, high) = span(values);
    let (scale, min) = (f16::from_f32((high - low) / top(format)), f16::from_f32(low));
    let (inverse, offset) = (inverse(scale.to_f32()), min.to_f32());
    for (code, x) in codes.iter_mut().zip(values) {
        *code = ((x - offset) * inverse).round_ties_even().clamp(0.0, top(format)) as u8;
    }
    (scale, min)
}

fn lloyd(format: Format, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let Some((levels, unit)) = format.lloyd() else { unreachable!("only Lloyd–Max formats come here") };
    let half = levels.len();
    let squares: f32 = values.iter().map(|x| x * x).sum();
    let inverse = inverse((squares / values.len().max(1) as f32).sqrt() * unit);
    let (mut product, mut norm) = (0.0f32, 0.0f32);
    for (code, x) in codes.iter_mut().zip(values) {
        let scaled = x * inverse;
        // Position among the midpoints of neighbouring positive levels.
        let index =
            levels.windows(2).filter(|w| scaled.abs() > 0.5 * (f32::from(w[0]) + f32::from(w[1]))).count();
        *code = if scaled < 0.0 { half - 1 - index } else { half + index } as u8;
        let level = f32::from(format.level(*code));
        product += x * level;
        norm += level * level;
    }
    // The scale that fits the chosen levels best, which is a little better than the root mean square.
    (f16::from_f32(if squares == 0.0 { 0.0 } else { product / norm }), f16::ZERO)
}

fn llama_symmetric(values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let scale = peak(values) / 127.0;
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (x * inverse).round() as i8 as u8;
    }
    (f16::from_f32(scale), f16::ZERO)
}

fn llama_signed(format: Format, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    // The first of the elements of largest magnitude.
    let extreme = values.iter().fold(0.0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let zero = f32::from(format.zero());
    let scale = extreme / -zero;
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (x * inverse + (zero + 0.5)).min(top(format)) as u8;
    }
    (f16::from_f32(scale), f16::ZERO)
}

fn llama_affine(format: Format, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let (low, high) = span(values);
    let scale = (high - low) / top(format);
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = ((x - low) * inverse + 0.5).min(top(format)) as u8;
    }
    (f16::from_f32(scale), f16::from_f32(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(format: Format, values: &[f32]) -> (Vec<u8>, f32, f32) {
        let mut codes = vec![0; values.len()];
        let (scale, min) = group(format, values, &mut codes);
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
