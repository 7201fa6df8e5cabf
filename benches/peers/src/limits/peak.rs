//! Multiply-adds in registers, as many as the processor can do: enough independent accumulators to hide the
//! latency of each.
//!
//! *Helps* as the limit that a prefill kernel is measured against. *Hurts* nothing; wider vectors may lower
//! the clock, so every width is tried.

#![allow(unsafe_code, reason = "calls of functions with target features")]

use std::fmt;
use std::hint::black_box;

/// Accumulators: latency 4 times 2 units need 8; the rest is slack.
const ACCUMULATORS: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    /// What the compiler makes of plain code (NEON where it is part of the target).
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A width of vectors. Made by [`Peak::all`] alone, for instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peak(Width);

impl fmt::Display for Peak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Peak {
    /// Every width that works here.
    pub(crate) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut all = Vec::new();
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                all.push(Self(Width::Avx2));
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                all.push(Self(Width::Avx512));
            }
            if !all.is_empty() {
                return all;
            }
        }
        vec![Self(Width::Portable)]
    }

    /// Multiply-adds of one step.
    pub(crate) fn per_step(self) -> usize {
        ACCUMULATORS
            * match self.0 {
                Width::Portable => 4,
                #[cfg(target_arch = "x86_64")]
                Width::Avx2 => 8,
                #[cfg(target_arch = "x86_64")]
                Width::Avx512 => 16,
            }
    }

    /// `steps` steps on the calling thread.
    pub(crate) fn run(self, steps: usize) -> f32 {
        match self.0 {
            Width::Portable => portable(steps),
            // SAFETY: `all` offers this width only where the processor has AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => unsafe { x86::avx2(steps) },
            // SAFETY: `all` offers this width only where the processor has AVX-512F.
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => unsafe { x86::avx512(steps) },
        }
    }
}

fn portable(steps: usize) -> f32 {
    let (factor, term) = (black_box(0.999_f32), black_box(0.001_f32));
    let mut sums = [[1.0_f32; 4]; ACCUMULATORS];
    for _ in 0..steps {
        for lane in sums.as_flattened_mut() {
            *lane = if cfg!(target_arch = "aarch64") {
                lane.mul_add(factor, term)
            } else {
                *lane * factor + term
            };
        }
    }
    sums.as_flattened().iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ACCUMULATORS, black_box};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2(steps: usize) -> f32 {
        let (factor, term) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, term);
            }
        }
        let mut total = _mm256_setzero_ps();
        for sum in sums {
            total = _mm256_add_ps(total, sum);
        }
        _mm256_cvtss_f32(total)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(steps: usize) -> f32 {
        let (factor, term) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, term);
            }
        }
        let mut total = _mm512_setzero_ps();
        for sum in sums {
            total = _mm512_add_ps(total, sum);
        }
        _mm512_cvtss_f32(total)
    }
}
