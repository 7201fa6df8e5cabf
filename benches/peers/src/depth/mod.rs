//! Attention of a decoded token of a real model, deep in its context: kvsieve's and llama.cpp's, in turn.
//!
//! kvsieve's is the time inside the attention hook of its candle host: what `kvsieve run` reports. llama.cpp tells the
//! time of a whole token only, so its attention is that time less the same with an empty context.
//!
//! *Helps* because it is what a user of either sees, with all layers, the model's own keys, and whatever the engine does
//! around its kernel. *Hurts* as a comparison of kernels: it needs the model, and half a minute to a few minutes for
//! each contestant to fill its context; the tables of one attention are for that.

mod decoder;
mod report;

pub(crate) use report::Report;

use crate::contestant::{Kind, Result};
use crate::ggml::{self, llama};
use crate::machine;
use decoder::{Decoder, Llama, Ours, RECIPES, kv_bytes, llama_label};
use kvsieve::backend::Backend;
use kvsieve_candle::{Gguf, Model, SpecialTokens, Tokenizer, Weights};
use report::{Row, Samples};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The model that `scripts/fetch-model.sh` fetches.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Tokens at the start of a turn that are not timed: the contestant before has left its own data in the caches.
const WARM: usize = 1;
/// Tokens of a turn that are timed.
const TIMED: usize = 4;
/// Mean KL of predictions to llama.cpp's, in nats, above which something else was computed. Storage of 4 bits and more
/// stays below a tenth.
const FOREIGN: f64 = 0.5;

/// Real text that every checkout has.
const TEXT: &[&str] = &[
    include_str!("../../../../README.md"),
    include_str!("../../../../docs/architecture.md"),
    include_str!("../../../../docs/numerics.md"),
    include_str!("../../../../docs/adding-a-policy.md"),
    include_str!("../../../../docs/codecs/README.md"),
];

/// What to measure.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    /// A GGUF file; `None` for SmolLM2 wherever it lies.
    pub(crate) model: Option<&'a Path>,
    /// Tokens of context.
    pub(crate) depths: &'a [usize],
    /// Types of llama.cpp's KV cache, by name.
    pub(crate) kv: &'a [String],
    pub(crate) rounds: usize,
    /// Beginnings of names that are left out.
    pub(crate) without: &'a [String],
}

/// Looks in `models/` beside and above the working directory, as the program `kvsieve` does.
fn find_smollm2() -> Result<PathBuf> {
    let here = std::env::current_dir()?;
    let found =
        here.ancestors().map(|folder| folder.join("models").join(SMOLLM2)).find(|path| path.is_file());
    found.ok_or_else(|| {
        let missing = format!("models/{SMOLLM2} was not found here or above");
        format!("{missing}: fetch it with scripts/fetch-model.sh, or name a GGUF file with --model").into()
    })
}

/// Fills everyone's contexts, then lets them decode in turn.
///
/// # Errors
/// If the model is not there, or cannot be as deep as asked for; a contestant that fails is a line of the report.
pub(crate) fn run(task: &Task<'_>, backend: &Arc<dyn Backend>, pool: &ggml::Pool) -> Result<Report> {
    let path = task.model.map_or_else(find_smollm2, |path| Ok(path.to_owned()))?;
    let mut file = Gguf::open(&path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let model = Model::from_gguf(&mut file, Weights::F32)?;
    drop(file);
    let theirs = llama::Model::load(&path)?;
    if theirs.vocabulary() != model.config().vocabulary {
        return Err("llama.cpp and the candle host disagree about the vocabulary".into());
    }

    let mut depths = vec![0];
    depths.extend(task.depths);
    depths.sort_unstable();
    depths.dedup();
    let deepest = depths.iter().max().copied().unwrap_or_default();
    let (context, decoded) = (model.config().context, task.rounds * (WARM + TIMED));
    if deepest + decoded > context {
        let what = format!("{} rounds of {} tokens after {deepest}", task.rounds, WARM + TIMED);
        return Err(format!("{what} do not fit into the model's context of {context}").into());
    }
    let text = tokenizer.encode(&TEXT.concat(), SpecialTokens::AsText)?;
    let tokens: Vec<u32> = text.iter().cycle().take(deepest + decoded).copied().collect();

    println!("{}, llama.cpp {}, {} rounds", model.config().name, llama::version(), task.rounds);
    let mut report = Report::new(model.config().name.clone(), depths.clone());
    let mut decoders: Vec<Box<dyn Decoder + '_>> = Vec::new();
    let wants = |name: &str| !task.without.iter().any(|start| name.starts_with(start.as_str()));
    for &format in ggml::FORMATS.iter().filter(|format| task.kv.iter().any(|kv| kv == format.name())) {
        let name = llama_label(format.name());
        if wants(&name) {
            let bytes = depths.len() as u64
                * kv_bytes(model.config(), context, format.row_bytes(model.config().key_dim));
            let build = || Llama::build(format, &theirs, pool, &tokens, &depths, context);
            let built = admit(&mut report, name, Kind::Peer, bytes, build);
            decoders.extend(built.map(|decoder| Box::new(decoder) as Box<dyn Decoder>));
        }
    }
    for (format, recipe) in RECIPES {
        let name = crate::ours::label(format);
        if wants(&name) {
            // No packed format is larger than the exact one.
            let bytes = kv_bytes(model.config(), tokens.len(), size_of::<f32>() * model.config().key_dim);
            let build = || Ours::build(recipe, &model, backend, &tokens, &depths);
            let built = admit(&mut report, name, Kind::Ours, bytes, build);
            decoders.extend(built.map(|decoder| Box::new(decoder) as Box<dyn Decoder>));
        }
    }
    rounds(&mut decoders, &mut report, &tokens, task.rounds);
    report.judge(FOREIGN);
    Ok(report)
}

/// Builds a contestant of `bytes` and its row, or notes why not.
fn admit<T>(
    report: &mut Report,
    name: String,
    kind: Kind,
    bytes: u64,
    build: impl FnOnce() -> Result<T>,
) -> Option<T> {
    eprintln!("filling the contexts of {name}");
    let built = match machine::short_of(bytes) {
        None => build(),
        Some(reason) => Err(reason.into()),
    };
    match built {
        Ok(decoder) => {
            report.rows.push(Row::new(name, kind, report.depths.len()));
            Some(decoder)
        }
        Err(reason) => {
            report.fail(&name, kind, &reason.to_string());
            None
        }
    }
}

/// All decoders at all depths in turn, each round beginning with another one. `report.rows` are theirs, in order.
fn rounds(decoders: &mut Vec<Box<dyn Decoder + '_>>, report: &mut Report, tokens: &[u32], rounds: usize) {
    for round in 0..rounds {
        for at in 0..report.depths.len() {
            let first = report.depths[at] + round * (WARM + TIMED);
            let turn = &tokens[first..first + WARM + TIMED];
            let mut logits = vec![Vec::new(); decoders.len()];
            let mut failed = Vec::new();
            for i in 0..decoders.len() {
                let who = (i + round) % decoders.len();
                match decode(&mut *decoders[who], at, turn, &mut report.rows[who].samples[at]) {
                    Ok(row) => logits[who] = row,
                    Err(reason) => failed.push((who, reason.to_string())),
                }
            }
            report.compare(at, &logits);
            // From the back, so that the places of the others stay.
            failed.sort_unstable();
            for (who, reason) in failed.into_iter().rev() {
                decoders.remove(who);
                let Row { label, kind, .. } = report.rows.remove(who);
                report.fail(&label, kind, &reason);
            }
        }
    }
}

/// One turn: the logits after its last token.
fn decode(decoder: &mut dyn Decoder, at: usize, turn: &[u32], samples: &mut Samples) -> Result<Vec<f32>> {
    decoder.active(true);
    let mut feed = || -> Result<()> {
        for (i, &token) in turn.iter().enumerate() {
            let time = decoder.step(at, token)?;
            if i >= WARM {
                samples.whole.push(time.whole.as_secs_f64());
                samples.attention.extend(time.attention.map(|attention| attention.as_secs_f64()));
            }
        }
        Ok(())
    };
    let fed = feed();
    decoder.active(false);
    fed?;
    decoder.logits(at)
}
