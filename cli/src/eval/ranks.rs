//! Ranks: how few dimensions the keys and values of one layer, or of several together, lie in after a prompt.
//!
//! *Helps* to see which layers a low-rank form would serve, and whether layers share a space, before anything is stored
//! that way. *Hurts* as evidence for quality: a small error in the norm can be a large one in the softmax.

use super::Job;
use crate::error::{Error, Result};
use crate::table::{Table, number};
use kvsieve::device::Pool;
use kvsieve::factor::{Dense, FactorOptions, Factors, factor, unwatched};
use kvsieve::geometry::KeyPhase;
use kvsieve::kernel::rope::{RopeArgs, RopeTarget};
use kvsieve::{KvCache, SequenceId};
use serde::Serialize;

/// Sizes of the protocol.
#[derive(Clone, Debug)]
pub(super) struct Protocol {
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// First tokens left out, as a cache would keep them exact.
    pub(super) sinks: usize,
    /// Layers taken together.
    pub(super) groups: Vec<usize>,
    /// Bytes of the factors, of those of what they stand for.
    pub(super) shares: Vec<f64>,
}

/// The error of one group of layers at one size.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    task: &'static str,
    side: &'static str,
    group: usize,
    first_layer: usize,
    share: f64,
    rank: usize,
    full_rank: usize,
    relative_error: f64,
}

pub(super) fn run(job: &Job<'_>, protocol: &Protocol, text: &[u32]) -> Result<Vec<Row>> {
    let shape = job.host.model.shape()?;
    let Protocol { prompt, sinks, .. } = *protocol;
    if text.len() < prompt || sinks >= prompt {
        let what = format!("the text has {} tokens, a prompt of {prompt} with {sinks} sinks", text.len());
        return Err(Error::usage(what, "give a longer --text, or change --prompt-tokens or --sinks"));
    }
    if let Some(group) = protocol.groups.iter().find(|&&group| group == 0 || group > shape.layers()) {
        let what = format!("--group {group}, and the model has {} layers", shape.layers());
        return Err(Error::usage(what, "give numbers from 1 to the number of layers"));
    }
    if let Some(share) = protocol.shares.iter().find(|share| !(0.0..=1.0).contains(*share)) {
        return Err(Error::usage(format!("--share {share}"), "shares go from 0 to 1"));
    }
    let mut cache = job.place.cache(shape.clone(), "full", None)?;
    let sequence = cache.create_sequence();
    let tokens: Vec<u32> = job.host.leading()?.iter().chain(text).copied().take(prompt).collect();
    job.host.model.prefill(&mut cache, sequence, &tokens, job.chunk, &mut |_| ())?;
    let layers: Vec<[Vec<f32>; 2]> =
        (0..shape.layers()).map(|layer| features(&cache, sequence, layer, sinks)).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for &group in &protocol.groups {
        for (side, name) in ["keys", "values"].into_iter().enumerate() {
            for (index, layers) in layers.chunks_exact(group).enumerate() {
                let parts: Vec<&[f32]> = layers.iter().map(|layer| &layer[side][..]).collect();
                let (factors, norm) = decompose(&parts, prompt - sinks, &protocol.shares)?;
                rows.extend(protocol.shares.iter().map(|&share| {
                    let rank = rank_of(share, factors.tokens, factors.features);
                    let held: f64 = factors.singular[..rank].iter().map(|&s| f64::from(s).powi(2)).sum();
                    Row {
                        task: "ranks",
                        side: name,
                        group,
                        first_layer: index * group,
                        share,
                        rank,
                        full_rank: factors.features.min(factors.tokens),
                        relative_error: ((norm - held).max(0.0) / norm).sqrt(),
                    }
                }));
            }
        }
    }
    Ok(rows)
}

/// Keys before their rotary embedding, and values, of one layer: `[tokens, H · d]`, all heads of a token side by side.
fn features(cache: &KvCache, sequence: SequenceId, layer: usize, sinks: usize) -> Result<[Vec<f32>; 2]> {
    let shape = cache.shape().layer(layer);
    let (heads, d_k, d_v) = (shape.kv_heads, shape.d_k, shape.d_v);
    let mut sides = [Vec::new(), Vec::new()];
    for head in 0..heads {
        let positions = cache.positions(sequence, layer, head)?;
        let (mut keys, mut values) = (vec![0.0; positions.len() * d_k], vec![0.0; positions.len() * d_v]);
        cache.gather(sequence, layer, head, &mut keys, &mut values)?;
        if let Some(rotary) = shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope) {
            let table = rotary.table(positions.iter().map(|position| -position.0));
            let mut args = RopeArgs {
                layout: rotary.layout,
                dims: rotary.dims,
                table: &table,
                target: RopeTarget::Dense { rows: &mut keys, dim: d_k },
            };
            cache.backend().rope(&mut args).map_err(kvsieve::Error::from)?;
        }
        for (side, (rows, d)) in sides.iter_mut().zip([(keys, d_k), (values, d_v)]) {
            side.resize((positions.len() - sinks) * heads * d, 0.0);
            for (to, row) in side.chunks_exact_mut(heads * d).zip(rows.chunks_exact(d).skip(sinks)) {
                to[head * d..(head + 1) * d].copy_from_slice(row);
            }
        }
    }
    Ok(sides)
}

/// The rank at which factors take this share of the bytes.
fn rank_of(share: f64, tokens: usize, features: usize) -> usize {
    let full = (tokens * features) as f64;
    let rank = (share * full / (tokens + features) as f64) as usize;
    rank.clamp(1, tokens.min(features))
}

/// Singular values of some layers' features side by side, as many as the largest share asks for, and the squared norm.
fn decompose(parts: &[&[f32]], tokens: usize, shares: &[f64]) -> Result<(Factors, f64)> {
    let widths: Vec<usize> = parts.iter().map(|part| part.len() / tokens).collect();
    let features = widths.iter().sum();
    let mut rows = Vec::with_capacity(tokens * features);
    for token in 0..tokens {
        parts
            .iter()
            .zip(&widths)
            .for_each(|(part, d)| rows.extend_from_slice(&part[token * d..(token + 1) * d]));
    }
    let rank = shares.iter().map(|&share| rank_of(share, tokens, features)).max().unwrap_or(1);
    let rows = Dense::new(&rows, tokens, features).map_err(kvsieve::Error::from)?;
    let factors = factor(&rows, &FactorOptions::new(rank), &Pool::current(), &mut unwatched)
        .map_err(kvsieve::Error::from)?;
    let norm = factors.squared_norm;
    Ok((factors, norm))
}

/// A line per side, group size and share: mean and largest error over the groups.
pub(super) fn print(rows: &[Row]) {
    let heading =
        ["side", "layers together", "share of bytes", "rank", "of", "mean error", "largest", "first layer"];
    let mut table = Table::new(1, &heading);
    let key = |row: &Row| (row.group, row.side, row.share.to_bits());
    let mut keys: Vec<_> = rows.iter().map(key).collect();
    keys.sort_unstable();
    keys.dedup();
    for wanted in keys {
        let some: Vec<&Row> = rows.iter().filter(|row| key(row) == wanted).collect();
        let mean = some.iter().map(|row| row.relative_error).sum::<f64>() / some.len() as f64;
        let Some(worst) = some.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error)) else {
            continue;
        };
        table.row(vec![
            worst.side.to_owned(),
            worst.group.to_string(),
            format!("{:.1} %", 100.0 * worst.share),
            worst.rank.to_string(),
            worst.full_rank.to_string(),
            number(Some(mean), 4),
            number(Some(worst.relative_error), 4),
            worst.first_layer.to_string(),
        ]);
    }
    table.print();
}
