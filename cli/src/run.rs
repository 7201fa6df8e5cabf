//! `kvsieve run`: one document, one question, the answer and what it cost, per recipe and budget.
//!
//! *Helps* to see on one's own text what a recipe does to the answer, memory and speed. *Hurts* as a measurement: one
//! document is an anecdote; `kvsieve eval` averages.

use crate::args::{self, Place, PlaceArgs, Variant};
use crate::error::{Error, Result};
use crate::host::{self, CHUNK, Host, ModelArgs};
use crate::metrics::{Mean, argmax, kl, log_softmax, process_resident};
use crate::table::{Table, bytes, milliseconds, number, percent};
use kvsieve::low_rank::SideOutcome;
use kvsieve::{Budget, KvCache, SequenceId};
use kvsieve_candle::{ChatMl, Logits, Role, Sampler, Sampling, SpecialTokens, Timings};
use serde::Serialize;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  kvsieve run --document manual.txt --question \"How do I reset it?\" --recipe snapkv --budget 25% --compare
  kvsieve run --document manual.txt --question \"…\" --recipe snapkv --recipe streaming --budget 25% --budget 10% --compare
  kvsieve run --document manual.txt --question \"…\" --recipe snapkv --budget 64MiB --backend gpu --json

By default the question is part of the prompt, so that the policy sees it before it chooses. With --ask-after the
document is compressed first and the question comes later: what a cache that is reused for many questions faces, and
much harder.

Columns: `kept` is the mean number of entries per KV head after compression; `KV memory` is counted from allocations;
`process` is the resident memory of the whole program, model included. With --compare the full cache's answer is also
fed through each compressed cache: `KL` is how far the predicted distributions are from the full cache's (0 is equal),
`same top-1` how often the most likely token is the same.";

/// Arguments of `kvsieve run`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to ask about; Python's own language documentation by default.
    #[arg(long)]
    document: Option<PathBuf>,
    /// Use the first N tokens of the document; all that fit into the model's context by default.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// What to ask.
    #[arg(long, default_value = "Summarize the text in one sentence.")]
    question: String,
    /// Ask after the document was compressed.
    #[arg(long)]
    ask_after: bool,
    /// A recipe; several with commas, or by repeating the option.
    #[arg(long, default_value = "snapkv")]
    recipe: Vec<String>,
    /// How much to keep: 2048 (tokens per KV head), 25% (of the prompt), 64MiB. Repeat or separate with commas.
    #[arg(long, value_delimiter = ',')]
    budget: Vec<Budget>,
    /// Run the full cache too, and compare with it.
    #[arg(long)]
    compare: bool,
    /// Feed the prompt in steps of N tokens. Recipes that bound memory compress between them.
    #[arg(long, value_name = "N", default_value_t = CHUNK)]
    chunk_tokens: usize,
    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 64)]
    answer_tokens: usize,
    #[command(flatten)]
    place: PlaceArgs,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// What one recipe did.
#[derive(Debug, Serialize)]
struct Outcome {
    recipe: String,
    budget: String,
    answer: String,
    entries_per_head: f64,
    kv_bytes_resident: usize,
    process_bytes_resident: Option<usize>,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    attention_seconds_per_token: f64,
    kl: Option<f64>,
    same_top1: Option<f64>,
    /// Where the recipe has low rank: what became of keys and of values, over the groups of layers.
    low_rank: Option<[LowRankSide; 2]>,
}

/// What low rank made of one side of the prompt's entries.
#[derive(Debug, Default, Serialize)]
struct LowRankSide {
    /// Groups of layers whose side the recipe would factor.
    groups: usize,
    /// Of these, groups that were factored.
    factored: usize,
    /// Of those that were: the mean rank, and the mean and largest relative error.
    rank: f64,
    error: f64,
    largest_error: f64,
}

impl LowRankSide {
    fn of(outcomes: impl Iterator<Item = SideOutcome>) -> Self {
        let (mut side, mut rank, mut mean) = (Self::default(), Mean::default(), Mean::default());
        for outcome in outcomes.filter(|outcome| *outcome != SideOutcome::Exact) {
            side.groups += 1;
            if let SideOutcome::Factored { rank: r, error } = outcome {
                side.factored += 1;
                rank.add(r as f64);
                mean.add(error);
                side.largest_error = side.largest_error.max(error);
            }
        }
        (side.rank, side.error) = (rank.get().unwrap_or(0.0), mean.get().unwrap_or(0.0));
        side
    }
}

/// The full cache's answer: its tokens, and the log-probabilities that each was chosen from.
struct Full {
    tokens: Vec<u32>,
    rows: Vec<Vec<f32>>,
}

/// The prompt: fed before compression, and after it.
struct Prompt {
    document: Vec<u32>,
    after: Vec<u32>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let host = Host::load(&args.model)?;
    let prompt = prompt(args, &host)?;
    let place = args.place.open()?;
    let recipes = args::split_recipes(&args.recipe);
    let shape = host.model.shape()?;
    let mut variants = place.variants(&shape, &recipes, &args.budget)?;
    if args.compare {
        variants.retain(|variant| variant.recipe != "full");
        variants.insert(0, Variant::full());
    }
    if !args.json {
        let config = host.model.config();
        println!("model     {}, {} layers, {} KV heads", config.name, config.layers, config.kv_heads);
        println!("prompt    {} tokens", prompt.document.len() + prompt.after.len());
        println!("question  {}\n", args.question);
    }
    let mut full = None;
    let mut outcomes = Vec::new();
    for variant in &variants {
        let compared = args.compare.then_some(&mut full);
        outcomes.push(one((args, &place), &host, &prompt, variant, compared)?);
    }
    if args.json {
        let text =
            serde_json::to_string(&outcomes).map_err(|e| Error::usage(e.to_string(), "report this"))?;
        println!("{text}");
    } else {
        print(&outcomes, args.compare);
    }
    Ok(())
}

/// Cuts the document so that everything fits, and wraps it in the model's chat format where it has one.
fn prompt(args: &Args, host: &Host) -> Result<Prompt> {
    let text = host::text(args.document.as_deref())?;
    let mut document = host.encode(&text)?;
    if document.is_empty() {
        return Err(Error::usage("the document is empty", "name another with --document FILE"));
    }
    let mark = "\u{1}";
    let asked = match ChatMl::for_model(&host.tokenizer) {
        Some(chat) => chat.prompt(&[(Role::User, &format!("{mark}\n\n{}", args.question))]),
        None => format!("{mark}\n\nQuestion: {}\nAnswer:", args.question),
    };
    let (before, after) = asked.split_once(mark).unwrap_or(("", &asked));
    // The format is read as special tokens; the document between its halves is not.
    let encode = |text: &str| host.tokenizer.encode_continuation(text, SpecialTokens::Recognize);
    let (mut before, after) = (encode(before)?, encode(after)?);
    if let Some(bos) = host.tokenizer.bos().filter(|bos| before.first() != Some(bos)) {
        before.insert(0, bos);
    }
    let context = host.model.config().context;
    let taken = before.len() + after.len() + args.answer_tokens;
    let room = context.checked_sub(taken).filter(|room| *room > 0).ok_or_else(|| {
        let what = format!("question and answer need {taken} tokens, the model's context is {context}");
        Error::usage(what, "shorten the question, or lower --answer-tokens")
    })?;
    if let Some(tokens) = args.tokens.filter(|tokens| *tokens > room) {
        let what = format!("--tokens {tokens} does not fit: the model's context leaves room for {room}");
        return Err(Error::usage(what, "lower it, or leave it out"));
    }
    document.truncate(args.tokens.unwrap_or(room));
    document.splice(0..0, before);
    if args.ask_after {
        return Ok(Prompt { document, after });
    }
    document.extend(after);
    Ok(Prompt { document, after: Vec::new() })
}

/// Runs one recipe. `compared` holds the full cache's answer, or takes it if this is the full cache.
fn one(
    (args, place): (&Args, &Place),
    host: &Host,
    prompt: &Prompt,
    variant: &Variant,
    compared: Option<&mut Option<Full>>,
) -> Result<Outcome> {
    let mut cache = place.cache(host.model.shape()?, &variant.recipe[..], variant.budget)?;
    let sequence = cache.create_sequence();
    let bar = host::bar(prompt.document.len(), &format!("{} {}", variant.recipe, variant.budget_text()));
    let progress = &mut |done: usize| bar.set_position(done as u64);
    let mut forward =
        host.model.prefill(&mut cache, sequence, &prompt.document, args.chunk_tokens, progress)?;
    bar.finish_and_clear();
    let prefill = forward.timings;
    let stored = cache.stats(sequence)?.total();
    let runs = cache.low_rank(sequence)?;
    let sides =
        || [LowRankSide::of(runs.iter().map(|r| r.keys)), LowRankSide::of(runs.iter().map(|r| r.values))];
    let low_rank = (!runs.is_empty()).then(sides);
    let heads: usize = cache.shape().iter().map(|layer| layer.kv_heads).sum();
    // The buffers of the prefill's long steps are no part of a decoding process.
    cache.shrink_scratch();
    let (kv_bytes, process) = (cache.memory().resident, process_resident());
    if !prompt.after.is_empty() {
        forward = host.model.forward(&mut cache, sequence, &prompt.after, Logits::Last)?;
    }
    let first = forward.last_row()?;
    let comparison = match &compared {
        Some(Some(full)) => Some(follow(host, &mut cache, sequence, &first, full)?),
        _ => None,
    };
    let (tokens, rows, decode) = answer(args, host, &mut cache, sequence, first)?;
    let outcome = Outcome {
        recipe: variant.recipe.clone(),
        budget: variant.budget_text(),
        answer: host.tokenizer.decode(&tokens).trim().to_owned(),
        entries_per_head: stored.entries as f64 / heads as f64,
        kv_bytes_resident: kv_bytes,
        process_bytes_resident: process,
        prefill_tokens_per_second: prefill.tokens_per_second(),
        decode_tokens_per_second: decode.tokens_per_second(),
        attention_seconds_per_token: decode.attention_per_token().as_secs_f64(),
        kl: comparison.map(|(kl, _)| kl),
        same_top1: comparison.map(|(_, same)| same),
        low_rank,
    };
    if let Some(slot @ None) = compared {
        *slot = Some(Full { tokens, rows });
    }
    Ok(outcome)
}

/// Generates greedily; the rows are the log-probabilities each token was chosen from.
fn answer(
    args: &Args,
    host: &Host,
    cache: &mut KvCache,
    sequence: SequenceId,
    mut row: Vec<f32>,
) -> Result<(Vec<u32>, Vec<Vec<f32>>, Timings)> {
    let stops = host.tokenizer.stops();
    let mut sampler = Sampler::new(Sampling::default())?;
    let (mut tokens, mut rows, mut timings) = (Vec::new(), Vec::new(), Timings::default());
    loop {
        let token = sampler.sample(&row)?;
        log_softmax(&mut row);
        rows.push(row);
        tokens.push(token);
        if tokens.len() == args.answer_tokens || stops.contains(&token) {
            return Ok((tokens.into_iter().filter(|t| !stops.contains(t)).collect(), rows, timings));
        }
        let forward = host.model.forward(cache, sequence, &[token], Logits::Last)?;
        timings += forward.timings;
        row = forward.last_row()?;
    }
}

/// Feeds the full cache's answer through a compressed cache, on a fork: mean KL and share of equal top-1.
fn follow(
    host: &Host,
    cache: &mut KvCache,
    sequence: SequenceId,
    first: &[f32],
    full: &Full,
) -> Result<(f64, f64)> {
    let fork = cache.fork(sequence)?;
    let (mut divergence, mut same) = (Mean::default(), Mean::default());
    let mut row = first.to_vec();
    for (index, want) in full.rows.iter().enumerate() {
        log_softmax(&mut row);
        divergence.add(kl(want, &row));
        same.add(f64::from(u8::from(argmax(want) == argmax(&row))));
        let Some(&token) = full.tokens.get(index).filter(|_| index + 1 < full.rows.len()) else { break };
        row = host.model.forward(cache, fork, &[token], Logits::Last)?.last_row()?;
    }
    cache.drop_sequence(fork)?;
    Ok((divergence.get().unwrap_or(0.0), same.get().unwrap_or(1.0)))
}

fn print(outcomes: &[Outcome], compare: bool) {
    for outcome in outcomes {
        println!("[{} {}]\n{}\n", outcome.recipe, outcome.budget, outcome.answer);
    }
    let heading = [
        "recipe",
        "budget",
        "kept",
        "KV memory",
        "process",
        "prefill",
        "decode",
        "attention",
        "KL",
        "same top-1",
    ];
    let mut table = Table::new(2, &heading[..if compare { 10 } else { 8 }]);
    for (index, o) in outcomes.iter().enumerate() {
        let mut cells = vec![
            o.recipe.clone(),
            o.budget.clone(),
            format!("{:.0}", o.entries_per_head),
            bytes(o.kv_bytes_resident),
            o.process_bytes_resident.map_or_else(|| "-".to_owned(), bytes),
            format!("{:.0} tok/s", o.prefill_tokens_per_second),
            format!("{:.1} tok/s", o.decode_tokens_per_second),
            format!("{}/tok", milliseconds(o.attention_seconds_per_token)),
        ];
        if compare {
            let itself = (index == 0).then_some("(itself)".to_owned());
            cells.push(itself.clone().unwrap_or_else(|| number(o.kl, 3)));
            cells.push(itself.unwrap_or_else(|| percent(o.same_top1)));
        }
        table.row(cells);
    }
    table.print();
    for o in outcomes {
        for (name, side) in ["keys", "values"].iter().zip(o.low_rank.iter().flatten()) {
            let LowRankSide { groups, factored, rank, error, largest_error } = side;
            if *groups == 0 {
                continue;
            }
            println!(
                "{}: {name} of {factored} of {groups} groups of layers are of low rank: rank {rank:.0}, relative error {error:.3}, at most {largest_error:.3}",
                o.recipe
            );
        }
    }
    if compare {
        println!(
            "\nKL and same top-1 compare the predictions along the full cache's answer with the full cache's own;"
        );
        println!(
            "KL 0 and 100 % mean that nothing was lost on this answer. `kvsieve run --help` explains the columns."
        );
    }
}
