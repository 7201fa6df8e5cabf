//! Row by row, product by product.

use super::RebuildArgs;
use crate::device::factors::Factors;
use crate::device::page::{Segment, Side};
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// As [`RebuildArgs::validate`].
pub fn run(args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let Some(first) = args.head.segments.first() else { return Ok(()) };
    let (d_k, d_v) = (first.layout.d_k, first.layout.d_v);
    for (segment, factors, slots) in args.head.factored() {
        for (i, &slot) in args.slots.iter().enumerate().filter(|(_, slot)| slots.contains(&(**slot as usize)))
        {
            let entry = slot as usize - slots.start;
            row(segment, factors, Side::Key, entry, &mut args.keys[i * d_k..(i + 1) * d_k]);
            row(segment, factors, Side::Value, entry, &mut args.values[i * d_v..(i + 1) * d_v]);
        }
    }
    Ok(())
}

/// One side of one entry of a segment.
pub(in crate::kernel) fn row(
    segment: &Segment,
    factors: &Factors,
    side: Side,
    entry: usize,
    out: &mut [f32],
) {
    let (layout, capacity) = (&segment.layout, segment.layout.capacity);
    let (page, at) = (&segment.pages[entry / capacity], entry % capacity);
    let Some(basis) = factors.basis(side) else { return layout.read_row(page, side, at, out) };
    match factors.kept(entry).filter(|_| side == Side::Key) {
        Some((kept, row)) => kept.read(row, out),
        None => {
            let mut latent = vec![0.0; basis.rank()];
            factors.read_latent(side, entry, &mut latent);
            let mut line = vec![0.0; basis.layout.d_k];
            out.fill(0.0);
            for (j, x) in latent.iter().enumerate() {
                basis.layout.read_row(&basis.page, Side::Key, j, &mut line);
                out.iter_mut().zip(&line).for_each(|(o, b)| *o += x * b);
            }
        }
    }
    if let (Side::Key, Some(angles)) = (side, &factors.angles) {
        angles.turn(page.positions[at], out, false);
    }
}
