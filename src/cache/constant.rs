//! Learned entries that every query of a layer sees ([`SinkEntries`](crate::geometry::SinkEntries)): stored once for all
//! sequences, attended as a part of their own, joined to what is stored by their log-sum-exp.
//!
//! *Helps* because they have no position and no slot: nothing can evict, pack, renumber or truncate them, no window hides
//! them, and forks and batches share the one page. *Hurts* a step by one more small attention and a merge in layers that
//! have them; on a GPU these are two more submissions.

use super::Step;
use super::scratch::{Joined, Scratch};
use super::step::Lane;
use crate::backend::Backend;
use crate::device::page::PageLayout;
use crate::device::{Encoding, HeadRows};
use crate::error::{Error, KernelError};
use crate::geometry::{LayerShape, ModelShape, SinkEntries};
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::attention_mass::MassArgs;
use crate::kernel::{AttentionParams, total_rows};
use crate::store::{self, NewRows};
use crate::view::DType;
use std::sync::Arc;

/// The learned entries of every layer, per KV head, in pages of the backend.
///
/// # Errors
/// A device error.
pub(super) fn store(model: &ModelShape, backend: &dyn Backend) -> Result<Vec<Vec<HeadRows>>, Error> {
    let layer = |shape: &LayerShape| match &shape.sink_entries {
        Some(sinks) => store_layer(shape, sinks, backend),
        None => Ok(Vec::new()),
    };
    model.iter().map(layer).collect()
}

fn store_layer(
    shape: &LayerShape,
    sinks: &SinkEntries,
    backend: &dyn Backend,
) -> Result<Vec<HeadRows>, Error> {
    let n = sinks.entries;
    let f32 = Encoding::Exact(DType::F32);
    let layout = Arc::new(PageLayout::new(shape, n, f32, f32, backend.mirrored(), 0));
    // Before the first token, so that every query sees them.
    let positions: Vec<i32> = (-(n as i32)..0).collect();
    let part = |numbers: &Option<Vec<f32>>, head: usize, dim: usize| match numbers {
        Some(numbers) => numbers[head * n * dim..(head + 1) * n * dim].to_vec(),
        None => vec![0.0; n * dim],
    };
    (0..shape.kv_heads)
        .map(|head| {
            let (keys, values) = (part(&sinks.keys, head, shape.d_k), part(&sinks.values, head, shape.d_v));
            let mut rows = HeadRows::default();
            let new = NewRows { positions: &positions, keys: &keys, values: &values };
            store::append(backend, &layout, &mut rows, new)?;
            if sinks.bias.is_some() {
                store::set_bias(backend, &mut rows, 0, &part(&sinks.bias, head, 1))?;
            }
            Ok(rows)
        })
        .collect()
}

/// Joins the learned entries of a layer to the attention over stored ones: `out` `[Hq, tokens, d_v]` and `lse`
/// `[Hq, tokens]` of each lane become those over both. Nothing happens without any.
///
/// # Errors
/// A kernel's error.
pub(super) fn join(
    backend: &dyn Backend,
    params: &AttentionParams<'_>,
    constant: &[HeadRows],
    lanes: &[Lane],
    (queries, positions): (&[f32], &[i32]),
    (joined, workspace): (&mut Joined, &mut Workspace),
    (out, lse): (&mut [f32], &mut [f32]),
) -> Result<(), KernelError> {
    if constant.is_empty() {
        return Ok(());
    }
    let (rows, d_k, d_v) = (lse.len(), params.d_k, params.d_v);
    let query_heads = constant.len() * params.group;
    // The stored part has the sink logits already.
    let params = AttentionParams { window: None, sink_logits: None, ..*params };
    let [(stored_out, stored_lse), (outs, lses)] = joined.parts(rows * d_v, rows);
    stored_out.copy_from_slice(out);
    stored_lse.copy_from_slice(lse);
    for lane in lanes {
        let all =
            |dim: usize| lane.offset * query_heads * dim..(lane.offset + lane.tokens) * query_heads * dim;
        let mut lane = [AttendLane {
            heads: constant,
            queries: &queries[all(d_k)],
            positions: &positions[lane.offset..lane.offset + lane.tokens],
            share: Share::ALL,
            spans: None,
            out: &mut outs[all(d_v)],
            lse: &mut lses[all(1)],
            mass: None,
        }];
        backend.attend(&params, &mut lane, workspace)?;
    }
    joined.merge(backend, d_v, (out, lse))
}

impl Step<'_> {
    /// [`join`] for the whole step, in scratch; then, if asked for, the attention mass of stored entries, whose weights
    /// are shares of the whole denominator.
    pub(super) fn join_constant(&mut self, layer: usize, mass: bool) -> Result<(), Error> {
        let cache = &mut *self.cache;
        let constant = cache.constant[layer].as_slice();
        if constant.is_empty() {
            return Ok(());
        }
        let (backend, shape) = (&*cache.backend, cache.shape.layer(layer));
        let owner = cache.shape.owner(layer);
        let params = AttentionParams::of(shape);
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        let rows = self.tokens * hq;
        let Scratch { queries, positions, lanes, joined, workspace, out, lse, pending, .. } =
            &mut cache.scratch;
        let (out, lse) = (&mut out[..rows * d_v], &mut lse[..rows]);
        join(backend, &params, constant, lanes, (queries, positions), (joined, workspace), (out, lse))?;
        if !mass {
            return Ok(());
        }
        let pending = &mut pending[layer];
        for (lane, &start) in lanes.iter().zip(&pending.mass_starts) {
            let heads: &[HeadRows] = &cache.sequences[&lane.id].layers[owner];
            let rows = lane.offset * hq..(lane.offset + lane.tokens) * hq;
            backend.attention_mass(
                &params,
                &mut MassArgs {
                    heads,
                    queries: &queries[rows.start * d_k..rows.end * d_k],
                    positions: &positions[lane.offset..lane.offset + lane.tokens],
                    lse: &lse[rows],
                    mass: &mut pending.mass[start..start + shape.group() * total_rows(heads)],
                },
            )?;
        }
        Ok(())
    }
}
