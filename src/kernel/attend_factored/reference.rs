//! One row of queries at a time, one entry at a time.

use super::FactoredArgs;
use crate::device::factors::Factors;
use crate::device::page::{Segment, Side};
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::rebuild::reference::row;
use crate::view::DType;
use half::{bf16, f16};

/// See [`super`].
///
/// # Errors
/// As [`FactoredArgs::validate`].
pub fn run(params: &AttentionParams<'_>, args: &mut FactoredArgs<'_>) -> Result<(), KernelError> {
    args.validate(params)?;
    let rows = params.group * args.tokens;
    for (h, head) in args.heads.iter().enumerate() {
        // Keys of the entries that are read, and where these are.
        let mut entries: Vec<(&Segment, &Factors, usize)> = Vec::new();
        for (segment, factors, slots) in head.factored() {
            let read = |slot: usize| {
                args.spans
                    .is_none_or(|spans| spans[h].spans().iter().any(|span| span.slots().contains(&slot)))
            };
            let start = slots.start;
            entries.extend(slots.filter(|&slot| read(slot)).map(|slot| (segment, factors, slot - start)));
        }
        let mut keys = vec![0.0; entries.len() * params.d_k];
        for ((segment, factors, entry), key) in entries.iter().zip(keys.chunks_exact_mut(params.d_k)) {
            row(segment, factors, Side::Key, *entry, key);
            if let Some(basis) = &factors.keys {
                round(basis.layout.k.exact(), key);
            }
        }
        for i in h * rows..(h + 1) * rows {
            let query = &args.queries[i * params.d_k..(i + 1) * params.d_k];
            let dot = |key: &[f32]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
            let logits: Vec<f32> = keys.chunks_exact(params.d_k).map(|key| params.logit(dot(key))).collect();
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
            let out = &mut args.out[i * params.d_v..(i + 1) * params.d_v];
            out.fill(0.0);
            args.lse[i] = if sum > 0.0 { most + sum.ln() as f32 } else { f32::NEG_INFINITY };
            let mut value = vec![0.0; params.d_v];
            for ((segment, factors, entry), x) in entries.iter().zip(&logits) {
                let weight = (x - args.lse[i]).exp();
                row(segment, factors, Side::Value, *entry, &mut value);
                out.iter_mut().zip(&value).for_each(|(o, v)| *o += weight * v);
            }
        }
    }
    Ok(())
}

fn round(dtype: Option<DType>, row: &mut [f32]) {
    match dtype {
        Some(DType::F16) => row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        Some(DType::Bf16) => row.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}
