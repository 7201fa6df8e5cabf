//! Attention on the device: latent rows are widened, keys made of them, and a workgroup per row of queries goes over
//! both; sums of latent rows are multiplied by their basis there.
//!
//! Entries go in parts of what fits a call, one KV head and segment after another; the host puts the parts together, in
//! order. Nothing is remembered: a device makes keys faster than it reads them. *Helps* because neither keys nor latent rows
//! leave the device. *Hurts* by a wait per part.

use super::{FactoredArgs, NAME};
use crate::device::factors::Factors;
use crate::device::gpu::{Binding, Call, Context};
use crate::device::page::{Segment, Side};
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::rebuild::gpu::{Latents, basis_rows, entries_per_call, stored_sides};

/// The uniform block of `shaders/attend_factored.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    d_k: u32,
    d_v: u32,
    rank: u32,
    stride: u32,
    keys_at: u32,
    values_at: u32,
    entries: u32,
    rows: u32,
    scale: f32,
    cap: f32,
    latent: u32,
    count: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(
    context: &Context,
    params: &AttentionParams<'_>,
    args: &mut FactoredArgs<'_>,
) -> Result<(), KernelError> {
    args.validate(params)?;
    let rows = params.group * args.tokens;
    args.out.fill(0.0);
    args.lse.fill(f32::NEG_INFINITY);
    for (h, head) in args.heads.iter().enumerate() {
        let queries = &args.queries[h * rows * params.d_k..(h + 1) * rows * params.d_k];
        let out = &mut args.out[h * rows * params.d_v..(h + 1) * rows * params.d_v];
        let lse = &mut args.lse[h * rows..(h + 1) * rows];
        for (segment, factors, slots) in head.factored() {
            let read: Vec<usize> = match args.spans {
                None => (0..segment.rows).collect(),
                Some(spans) => {
                    spans[h].among(slots.clone()).flatten().map(|slot| slot - slots.start).collect()
                }
            };
            for entries in read.chunks(entries_per_call(context, segment, factors)) {
                let part = part(context, params, (segment, factors), entries, queries)?;
                add(params.d_v, &part, (out, lse));
            }
        }
    }
    Ok(())
}

/// `[rows, d_v]`, then `[rows]` log-sum-exps, of some entries of a segment.
fn part(
    context: &Context,
    params: &AttentionParams<'_>,
    (segment, factors): (&Segment, &Factors),
    entries: &[usize],
    queries: &[f32],
) -> Result<Vec<f32>, KernelError> {
    let (d_k, d_v, n) = (params.d_k, params.d_v, entries.len());
    let rows = queries.len() / d_k;
    let mut call = Call::new(context, NAME);
    let latents = Latents::load(context, &mut call, (segment, factors), entries)?;
    let stored = stored_sides(context, &mut call, segment, factors, entries)?;
    let made = call.scratch(n * d_k);
    if let Some(basis) = &factors.keys {
        latents.make(context, &mut call, (Side::Key, basis), (&made, 0))?;
    }
    let keys = if factors.keys.is_some() { &made } else { stored.as_ref().unwrap_or(&made) };
    let basis = match &factors.values {
        Some(basis) => basis_rows(context, &mut call, basis)?,
        None => call.scratch(1),
    };
    let rank = factors.values.as_ref().map_or(d_v, |basis| basis.rank());
    let values =
        if factors.values.is_some() { &latents.rows } else { stored.as_ref().unwrap_or(&latents.rows) };
    let out = call.scratch(rows * (d_v + 1 + rank));
    let uniform = Params {
        d_k: d_k as u32,
        d_v: d_v as u32,
        rank: rank as u32,
        stride: factors.values.as_ref().map_or(0, |basis| basis.layout.d_k as u32),
        keys_at: 0,
        values_at: if factors.values.is_some() { latents.start(Side::Value) as u32 } else { 0 },
        entries: n as u32,
        rows: rows as u32,
        scale: params.scale,
        cap: params.softcap.unwrap_or(0.0),
        latent: u32::from(factors.values.is_some()),
        count: rows as u32,
    };
    let queries = call.upload(queries);
    let bindings =
        [queries, Binding::from(keys), Binding::from(values), Binding::from(&basis), Binding::from(&out)];
    call.dispatch(NAME, &[], &uniform, &bindings, rows)?;
    call.read(&out);
    let back = call.finish()?;
    Ok(back.floats(0)[..rows * (d_v + 1)].to_vec())
}

/// Puts a part beside what is there, by their log-sum-exps.
fn add(d_v: usize, part: &[f32], (out, lse): (&mut [f32], &mut [f32])) {
    let (values, lses) = part.split_at(lse.len() * d_v);
    for (i, (lse, &other)) in lse.iter_mut().zip(lses).enumerate() {
        let most = lse.max(other);
        let (a, b) = ((*lse - most).exp(), (other - most).exp());
        let out = &mut out[i * d_v..(i + 1) * d_v];
        out.iter_mut().zip(&values[i * d_v..]).for_each(|(o, v)| *o = (*o * a + v * b) / (a + b));
        *lse = most + (a + b).ln();
    }
}
