//! Every pair.

use super::{NearestArgs, dim};
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(args: &mut NearestArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let mut out = args.nearest.iter_mut().zip(args.cosines.iter_mut());
    for ((head, from), into) in args.heads.iter().zip(args.from).zip(args.into) {
        let candidates: Vec<_> = into.iter().map(|&slot| key(head, slot)).collect();
        for (&slot, (nearest, cosine)) in from.iter().zip(&mut out) {
            let key = key(head, slot);
            let cosines = candidates.iter().map(|candidate| cosine_of(&key, candidate));
            let best = |best: (u32, f64), (i, c): (usize, f64)| if c > best.1 { (i as u32, c) } else { best };
            let found = cosines.enumerate().fold((0, f64::NEG_INFINITY), best);
            (*nearest, *cosine) = (found.0, found.1 as f32);
        }
    }
    Ok(())
}

fn key(head: &HeadRows, slot: u32) -> Vec<f32> {
    let mut row = vec![0.0; dim(head)];
    if let Some(page) = head.pages().find(|p| (slot as usize) < p.first + p.rows) {
        page.layout.read_row(page.page, Side::Key, slot as usize - page.first, &mut row);
    }
    row
}

fn cosine_of(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}
