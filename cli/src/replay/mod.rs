//! `kvsieve replay`: recorded Q, K and V through a recipe; what stayed, and how wrong attention became.

mod report;
mod trace;

use crate::args::{Place, PlaceArgs};
use crate::attention::{self, Exact, Recording};
use crate::error::Result;
use crate::metrics::Mean;
use kvsieve::geometry::LayerShape;
use kvsieve::policy::schedule::Schedule;
use kvsieve::recipe::{PositionMode, Recipe};
use kvsieve::{Budget, KvCache, SequenceId};
use report::{LayerReport, Numbers, Outcome, Report, Tensors};
use std::path::PathBuf;
use std::time::Instant;
use trace::{Recorded, Trace};

const EXAMPLES: &str = "\
Examples:
  kvsieve replay --trace t.safetensors --recipe snapkv --budget 25% --out o.safetensors
  kvsieve replay --trace t.safetensors --recipe \"tova+k=f16\" --budget 256 --layers 0,10 --json --out o.safetensors

What happens: the prompt is fed as one prefill and scored, the recipe compresses, and the remaining tokens are fed one
by one. Keys and queries are rotated here, by `rope_theta` and `rope_layout` of the trace.

Trace (safetensors): metadata `layers` (JSON list), `q_heads`, `kv_heads`, `head_dim`, `rope_theta`, `rope_layout`
(half-split or interleaved), `prompt_len`, `decode_len`, `scale`; tensors, f32 or f16, for each layer l:
  layers.l.q_pre [Hq,n,d]   layers.l.k_pre [H,n,d]   layers.l.v [H,n,d]     n = prompt_len + decode_len

Output (safetensors), for each layer l:
  layers.l.scores [H,prompt_len]      at the end of the prompt, before compression, where the recipe scores
  layers.l.kept.positions, layers.l.kept.offsets [H+1]     what stayed of the prompt
  layers.l.out [Hq,decode_len,d]      attention output of the remaining tokens

Columns: `output_error` is the mean of |out - exact| / |exact| over rows and query heads, `mass_recall` the mean share of
the exact softmax mass on the entries read. Entries and bytes are those right after the prompt's compression.";

/// Arguments of `kvsieve replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The recorded trace.
    #[arg(long)]
    trace: PathBuf,
    /// The recipe, for example snapkv or "snapkv(window=32)+k=f16".
    #[arg(long)]
    recipe: String,
    /// How much to keep: 256 (tokens per KV head), 25% (of the prompt) or 64MiB (over all layers).
    #[arg(long)]
    budget: Option<Budget>,
    #[command(flatten)]
    place: PlaceArgs,
    /// Recorded layers to use, by their index in the model; all by default. Others do not exist for the recipe.
    #[arg(long, value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Where to write the tensors.
    #[arg(long)]
    out: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let trace = Trace::read(&args.trace, args.layers.as_deref())?;
    let place = args.place.open()?;
    let mut cache = place.cache(trace.shape()?, &args.recipe[..], args.budget)?;
    let untouched = Untouched::of(&trace, args, &place)?;
    let outcome = Replay::new(&trace, &mut cache).run(untouched)?;
    outcome.tensors.write(&args.out, &trace)?;
    let report = Report {
        recipe: args.recipe.clone(),
        effective_recipe: cache.recipe().to_string(),
        budget: args.budget.map(|b| b.to_string()),
        backend: args.place.backend.name(),
        total: Numbers::total(&outcome),
        layers: outcome.layers,
    };
    if args.json { report.print_json() } else { report.print_table() }
}

/// What a recipe sees at the end of the prompt, before it drops anything.
///
/// Taken from a cache of its own that never compresses: a recipe that bounds memory during the prompt has dropped
/// entries by the time one can ask.
struct Untouched {
    /// Per layer `[H, prompt]`; `None` if the recipe has no scores.
    scores: Vec<Option<Vec<f32>>>,
    /// Positions that the plan keeps. Renumbered caches no longer tell which tokens theirs are.
    planned: Vec<Vec<Vec<i32>>>,
}

impl Untouched {
    fn of(trace: &Trace, args: &Args, place: &Place) -> Result<Self> {
        let mut recipe = Recipe::parse(&args.recipe)?;
        recipe.schedule = Schedule::NEVER;
        let mut cache = place.cache(trace.shape()?, recipe, args.budget)?;
        let mut replay = Replay::new(trace, &mut cache);
        replay.prefill()?;
        let planned = planned(replay.stored()?, &replay.cache.plan(replay.sequence)?);
        let score = |layer| Ok(replay.cache.scores(replay.sequence, layer)?.map(|scores| scores.values));
        let scores = (0..trace.layers.len()).map(score).collect::<Result<_>>()?;
        Ok(Self { scores, planned })
    }
}

/// A trace on its way through a cache.
struct Replay<'a> {
    trace: &'a Trace,
    cache: &'a mut KvCache,
    sequence: SequenceId,
}

impl<'a> Replay<'a> {
    fn new(trace: &'a Trace, cache: &'a mut KvCache) -> Self {
        let sequence = cache.create_sequence();
        Self { trace, cache, sequence }
    }

    fn run(mut self, untouched: Untouched) -> Result<Outcome> {
        let trace = self.trace;
        self.prefill()?;
        self.cache.end_prefill(self.sequence)?;
        let renumbered = self.cache.recipe().positions == PositionMode::Renumber;
        let kept = if renumbered { untouched.planned } else { self.stored()? };
        let stats = self.cache.stats(self.sequence)?;
        let decoded = self.decode(&kept, renumbered)?;
        let layers = trace
            .layers
            .iter()
            .zip(&stats.layers)
            .zip(&decoded.layers)
            .map(|((recorded, stats), decoded)| LayerReport {
                layer: recorded.layer,
                numbers: Numbers {
                    output_error: decoded.error.get(),
                    mass_recall: decoded.recall.get(),
                    missing_mass: decoded.missing.get(),
                    bytes_logical: stats.bytes_logical,
                    bytes_resident: stats.bytes_resident,
                    // Without an index, what was stored after the prompt.
                    bytes_read_per_step: decoded
                        .bytes
                        .get()
                        .map_or(stats.bytes_read_per_step, |b| b as usize),
                    seconds_per_step: decoded.seconds.get(),
                    entries: stats.entries,
                },
            })
            .collect();
        let out = decoded.layers.into_iter().map(|layer| layer.out).collect();
        Ok(Outcome {
            layers,
            seconds: decoded.seconds.get(),
            tensors: Tensors { scores: untouched.scores, kept, out },
        })
    }

    /// Feeds the prompt as one step.
    fn prefill(&mut self) -> Result<()> {
        let (trace, n) = (self.trace, self.trace.prompt);
        let shape = trace.shape()?;
        let mut out = vec![0.0; trace.query_heads * n * trace.dim];
        let mut step = self.cache.begin(self.sequence, n)?;
        for (index, layer) in trace.layers.iter().enumerate() {
            let [q, k, v] = tensors(trace, layer, 0, n, 0);
            attention::attend(&mut step, (index, shape.layer(index)), [&q, &k, &v], &mut out)?;
        }
        Ok(step.commit(n)?)
    }

    /// Positions stored: per layer, per KV head.
    fn stored(&self) -> Result<Vec<Vec<Vec<i32>>>> {
        let layers = 0..self.trace.layers.len();
        layers.map(|layer| attention::stored(self.cache, self.sequence, layer)).collect()
    }

    /// Feeds the remaining tokens one at a time.
    fn decode(&mut self, kept: &[Vec<Vec<i32>>], renumbered: bool) -> Result<Decoded> {
        let trace = self.trace;
        let shape = trace.shape()?;
        let exact: Vec<Exact> =
            trace.layers.iter().map(|layer| exact(trace, shape.layer(0), layer)).collect();
        let width = trace.query_heads * trace.decode * trace.dim;
        let mut decoded = Decoded::default();
        decoded
            .layers
            .resize_with(trace.layers.len(), || DecodedLayer { out: vec![0.0; width], ..Default::default() });
        for index in 0..trace.decode {
            let token = trace.prompt + index;
            let read = if renumbered { self.appended(kept, index)? } else { Some(self.stored()?) };
            let position = self.cache.next_position(self.sequence)?.0;
            let inputs: Vec<_> = trace.layers.iter().map(|l| tensors(trace, l, token, 1, position)).collect();
            let mut rows = vec![vec![0.0; trace.query_heads * trace.dim]; trace.layers.len()];
            let began = Instant::now();
            let mut step = self.cache.begin(self.sequence, 1)?;
            for (layer, ([q, k, v], row)) in inputs.iter().zip(&mut rows).enumerate() {
                let layer_began = Instant::now();
                attention::attend(&mut step, (layer, shape.layer(layer)), [q, k, v], row)?;
                decoded.layers[layer].seconds.add(layer_began.elapsed().as_secs_f64());
            }
            step.commit(1)?;
            decoded.seconds.add(began.elapsed().as_secs_f64());
            let mut read = read;
            for layer in 0..trace.layers.len() {
                let Some(report) = self.cache.last_read(self.sequence, layer)? else { continue };
                decoded.layers[layer].bytes.add(report.bytes as f64);
                report.missing.iter().for_each(|&share| decoded.layers[layer].missing.add(f64::from(share)));
                let chosen = attention::chosen(self.cache, self.sequence, layer)?;
                if let (Some(read), Some(mut chosen)) = (&mut read, chosen) {
                    // The token itself is counted below.
                    chosen.iter_mut().for_each(|head| head.retain(|&p| p != position));
                    read[layer] = chosen;
                }
            }
            for (layer, row) in rows.iter().enumerate() {
                let target = &mut decoded.layers[layer];
                for (head, row) in row.chunks_exact(trace.dim).enumerate() {
                    target.error.add(exact[layer].error(head, index, row));
                    target.out[(head * trace.decode + index) * trace.dim..][..trace.dim].copy_from_slice(row);
                }
                if let Some(read) = &read {
                    // The token itself is stored before it is attended.
                    let with_self: Vec<Vec<i32>> = read[layer]
                        .iter()
                        .map(|p| p.iter().copied().chain([token as i32]).collect())
                        .collect();
                    target.recall.add(recall(&exact[layer], index, &with_self));
                }
            }
        }
        Ok(decoded)
    }

    /// The tokens stored after `steps` decode steps under renumbered positions, as long as nothing more was dropped:
    /// after that, stored positions no longer say which tokens they are.
    fn appended(&self, kept: &[Vec<Vec<i32>>], steps: usize) -> Result<Option<Vec<Vec<Vec<i32>>>>> {
        let mut all = kept.to_vec();
        for (layer, heads) in all.iter_mut().enumerate() {
            let stored = self.cache.stored(self.sequence, layer)?;
            for (head, rows) in heads.iter_mut().zip(stored) {
                head.extend((0..steps).map(|i| (self.trace.prompt + i) as i32));
                if head.len() != rows.0 {
                    return Ok(None);
                }
            }
        }
        Ok(Some(all))
    }
}

#[derive(Debug, Default)]
struct Decoded {
    layers: Vec<DecodedLayer>,
    /// Whole steps, begin to commit.
    seconds: Mean,
}

#[derive(Debug, Default)]
struct DecodedLayer {
    out: Vec<f32>,
    error: Mean,
    recall: Mean,
    /// As the index estimates it.
    missing: Mean,
    /// With an index.
    bytes: Mean,
    /// The attend calls alone.
    seconds: Mean,
}

/// Exact attention of the decode rows of a recorded layer.
fn exact(trace: &Trace, shape: &LayerShape, layer: &Recorded) -> Exact {
    let q = trace.rotated(&layer.q, trace.prompt, trace.decode, trace.prompt as i32);
    let k = trace.rotated(&layer.k, 0, trace.tokens(), 0);
    Exact::of(&Recording { shape, q: &q, k: &k, v: &layer.v, copies: &vec![1; trace.prompt] })
}

/// Mean share of the exact softmax mass that lies on the positions read (per KV head), over query heads.
fn recall(exact: &Exact, step: usize, read: &[Vec<i32>]) -> f64 {
    let heads = read.len() * exact.group();
    let entries = |head: usize| read[head / exact.group()].iter().map(|&p| p as usize);
    (0..heads).map(|head| exact.mass(head, step, entries(head))).sum::<f64>() / heads as f64
}

/// `count` tokens of a layer, q and k rotated to `position` and on.
fn tensors(trace: &Trace, layer: &Recorded, from: usize, count: usize, position: i32) -> [Vec<f32>; 3] {
    [
        trace.rotated(&layer.q, from, count, position),
        trace.rotated(&layer.k, from, count, position),
        attention::tokens_of(&layer.v, (trace.tokens(), trace.dim), from..from + count),
    ]
}

/// What plans leave of stored positions.
fn planned(
    mut stored: Vec<Vec<Vec<i32>>>,
    plans: &[(usize, kvsieve::plan::LayerPlan)],
) -> Vec<Vec<Vec<i32>>> {
    for (layer, plan) in plans {
        for (head, plan) in stored[*layer].iter_mut().zip(&plan.heads) {
            *head = plan.keep.iter().map(|&slot| head[slot as usize]).collect();
        }
    }
    stored
}

impl Numbers {
    /// Sums of bytes and entries, means of errors, and the time of whole steps.
    fn total(outcome: &Outcome) -> Self {
        let mean = |pick: fn(&Self) -> Option<f64>| -> Option<f64> {
            let mut mean = Mean::default();
            outcome.layers.iter().filter_map(|l| pick(&l.numbers)).for_each(|x| mean.add(x));
            mean.get()
        };
        let sum = |pick: fn(&Self) -> usize| outcome.layers.iter().map(|l| pick(&l.numbers)).sum();
        Self {
            output_error: mean(|n| n.output_error),
            mass_recall: mean(|n| n.mass_recall),
            missing_mass: mean(|n| n.missing_mass),
            bytes_logical: sum(|n| n.bytes_logical),
            bytes_resident: sum(|n| n.bytes_resident),
            bytes_read_per_step: sum(|n| n.bytes_read_per_step),
            seconds_per_step: outcome.seconds,
            entries: sum(|n| n.entries),
        }
    }
}
