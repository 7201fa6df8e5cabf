//! Products on the device: latent rows and bases are widened into buffers, a workgroup makes a row.
//!
//! *Helps* because latent rows never leave the device, and rows made for another kernel stay there. *Hurts* by the buffer of
//! widened latent rows in between, so that long calls run in parts.

use super::{NAME, RebuildArgs};
use crate::device::factors::{Basis, Factors};
use crate::device::gpu::{Binding, Call, Context, Scratch};
use crate::device::page::{HeadRows, Segment, Side};
use crate::error::KernelError;
use crate::geometry::RotaryLayout;
use crate::kernel::gather::gpu::widened;
use std::sync::Arc;

/// The uniform block of `shaders/rebuild.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    d: u32,
    rank: u32,
    stride: u32,
    from: u32,
    to: u32,
    count: u32,
    dims: u32,
    interleaved: u32,
}

/// In the place of a kept key's row: there is none.
const MADE: u32 = u32::MAX;

/// Entries of a segment and their latent rows on the device, `[entries, rank]` of keys, then of values.
pub(crate) struct Latents<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) factors: &'a Factors,
    pub(crate) entries: &'a [usize],
    pub(crate) rows: Scratch,
}

impl<'a> Latents<'a> {
    /// Brings latent rows of entries into a buffer.
    pub(crate) fn load(
        context: &Context,
        call: &mut Call<'_>,
        (segment, factors): (&'a Segment, &'a Factors),
        entries: &'a [usize],
    ) -> Result<Self, KernelError> {
        let head = HeadRows::new(vec![Segment::clone(&factors.latents)]);
        let slots: Vec<u32> = entries.iter().map(|&entry| factors.latent(entry) as u32).collect();
        let layout = &factors.latents.layout;
        let rows = widened(context, call, &head, &slots, (layout.d_k, layout.d_v))?;
        Ok(Self { segment, factors, entries, rows })
    }

    /// Words before the latent rows of a side.
    pub(crate) fn start(&self, side: Side) -> usize {
        match side {
            Side::Key => 0,
            Side::Value => self.entries.len() * self.factors.latents.layout.d_k,
        }
    }

    /// Makes the rows of a factored side, `[entries, d]`, in `out` from word `to` on.
    pub(crate) fn make(
        &self,
        context: &Context,
        call: &mut Call<'_>,
        (side, basis): (Side, &Basis),
        (out, to): (&Scratch, usize),
    ) -> Result<(), KernelError> {
        let angles = self.factors.angles.as_deref().filter(|_| side == Side::Key);
        let capacity = self.segment.layout.capacity;
        let mut slots = Vec::new();
        let place = |&entry: &usize| {
            let position = self.segment.pages[entry / capacity].positions[entry % capacity] as u32;
            let kept = self.factors.kept(entry).filter(|_| side == Side::Key);
            let row = kept.map_or(MADE, |(_, row)| {
                slots.push(row as u32);
                slots.len() as u32 - 1
            });
            [position, row]
        };
        let places: Vec<u32> = self.entries.iter().flat_map(place).collect();
        let kept = match &self.factors.kept {
            Some(kept) if !slots.is_empty() => {
                let head = HeadRows::new(vec![Segment::clone(&kept.keys)]);
                widened(context, call, &head, &slots, (kept.keys.layout.d_k, 0))?
            }
            _ => call.scratch(1),
        };
        let params = Params {
            d: self.segment.layout.dim(side) as u32,
            rank: basis.rank() as u32,
            stride: basis.layout.d_k as u32,
            from: self.start(side) as u32,
            to: to as u32,
            count: self.entries.len() as u32,
            dims: angles.map_or(0, |angles| angles.dims() as u32),
            interleaved: u32::from(angles.is_some_and(|a| a.layout() == RotaryLayout::Interleaved)),
        };
        let [fine, coarse] = angles.map_or([&[][..]; 2], |angles| angles.tables());
        let bindings = [
            Binding::from(&self.rows),
            Binding::from(&basis_rows(context, call, basis)?),
            call.upload(&places),
            Binding::from(&kept),
            call.upload(fine),
            call.upload(coarse),
            Binding::from(out),
        ];
        call.dispatch("rebuild", &[], &params, &bindings, self.entries.len())?;
        Ok(())
    }
}

/// A basis in single precision, `[rank, stride]`.
pub(crate) fn basis_rows(
    context: &Context,
    call: &mut Call<'_>,
    basis: &Basis,
) -> Result<Scratch, KernelError> {
    let (layout, pages) = (Arc::clone(&basis.layout), vec![Arc::clone(&basis.page)]);
    let segment = Segment { pages, rows: basis.rank(), ..Segment::new(layout) };
    let slots: Vec<u32> = (0..basis.rank() as u32).collect();
    widened(context, call, &HeadRows::new(vec![segment]), &slots, (basis.layout.d_k, 0))
}

/// Entries of a segment whose latent rows, and rows of these dimensions, a call may hold.
pub(crate) fn entries_per_call(context: &Context, segment: &Segment, factors: &Factors) -> usize {
    let (latents, layout) = (&factors.latents.layout, &segment.layout);
    let kept = if factors.kept.is_some() { layout.d_k } else { 0 };
    let entry = 4 * (latents.d_k + latents.d_v + layout.d_k + kept + layout.d_v);
    (context.batch_bytes() / entry.max(1)).max(1)
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut RebuildArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let Some(first) = args.head.segments.first() else { return Ok(()) };
    let (d_k, d_v) = (first.layout.d_k, first.layout.d_v);
    let mut done = 0;
    for (segment, factors, slots) in args.head.factored() {
        let count = args.slots[done..].partition_point(|&slot| (slot as usize) < slots.end);
        let own: Vec<usize> =
            args.slots[done..done + count].iter().map(|&slot| slot as usize - slots.start).collect();
        for entries in own.chunks(entries_per_call(context, segment, factors)) {
            let n = entries.len();
            let mut call = Call::new(context, NAME);
            let latents = Latents::load(context, &mut call, (segment, factors), entries)?;
            let out = call.scratch(n * (d_k + d_v));
            let sides = [(Side::Key, 0), (Side::Value, n * d_k)];
            for (side, to) in sides {
                if let Some(basis) = factors.basis(side) {
                    latents.make(context, &mut call, (side, basis), (&out, to))?;
                }
            }
            let stored = stored_sides(context, &mut call, segment, factors, entries)?;
            call.read(&out);
            stored.iter().for_each(|rows| call.read(rows));
            let back = call.finish()?;
            let (keys, values) = back.floats(0)[..n * (d_k + d_v)].split_at(n * d_k);
            args.keys[done * d_k..][..n * d_k].copy_from_slice(keys);
            args.values[done * d_v..][..n * d_v].copy_from_slice(values);
            if stored.is_some() {
                let rows = &back.floats(1);
                match factors.keys {
                    None => args.keys[done * d_k..][..n * d_k].copy_from_slice(&rows[..n * d_k]),
                    Some(_) => args.values[done * d_v..][..n * d_v].copy_from_slice(&rows[..n * d_v]),
                }
            }
            done += n;
        }
    }
    Ok(())
}

/// Rows of the side that lies in the pages, where one does.
pub(crate) fn stored_sides(
    context: &Context,
    call: &mut Call<'_>,
    segment: &Segment,
    factors: &Factors,
    entries: &[usize],
) -> Result<Option<Scratch>, KernelError> {
    let (layout, slots) = (&segment.layout, entries.iter().map(|&entry| entry as u32).collect::<Vec<_>>());
    let head = || HeadRows::new(vec![Segment { factors: None, ..segment.clone() }]);
    match (&factors.keys, &factors.values) {
        (None, _) => Ok(Some(widened(context, call, &head(), &slots, (layout.d_k, 0))?)),
        (_, None) => Ok(Some(widened(context, call, &head(), &slots, (0, layout.d_v))?)),
        _ => Ok(None),
    }
}
