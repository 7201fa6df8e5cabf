//! `kvsieve eval`: what recipes do to a model's predictions, averaged over a text.
//!
//! *Helps* to choose a recipe and a budget with numbers that others can repeat. *Hurts* patience: every recipe, budget
//! and sample prefills its own prompt, because a prompt that was compressed cannot be compressed again differently.

mod compare;
mod figure;
mod guard;
mod needle;
mod ranks;
mod recall;
mod report;
mod running;
mod span;
mod windows;

use crate::args::{self, Place, PlaceArgs, Variant};
use crate::error::{Error, Result};
use crate::host::{self, Host, ModelArgs};
use kvsieve::policy::schedule::Schedule;
use kvsieve::{Budget, KvCache, SequenceId};
use report::{Measured, Row, print, print_json};
use std::path::PathBuf;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  kvsieve eval --recipe snapkv,tova,streaming --budget 50%,25%,10% --figure kl.svg
  kvsieve eval --task windows --recipe full+k=f16+v=f16,full+k=bf16+v=bf16
  kvsieve eval --task recall --recipe auto,quest,pages --budget 256,1024 --prompt-tokens 4000 --figure error.svg
  kvsieve eval --task guard --recipe full+compact --threshold 0.1
  kvsieve eval --task span-copy --recipe snapkv --budget 25% --prompt-tokens 1024,2048 --depth 0.1,0.5,0.9
  kvsieve eval --task needle --model llama-3.1-8b.Q4_K_M.gguf --recipe snapkv --budget 25% --prompt-tokens 4096

Tasks:
  text       After a prompt of P tokens, C further tokens are fed as they are, at S places of the text. KL to the full
             cache's predictions, how often the most likely token is the same, and NLL, averaged over S*C predictions.
  windows    The protocol of llama.cpp's --kl-divergence: windows from the start of the text, each fed to an empty cache,
             the predictions of its second half compared as in text. Recipes that evict do so between the halves. Bits
             per element are counted from pages, at the end of a window, over all its tokens.
  span-copy  64 tokens that stand at a depth of the prompt are fed again after it was compressed, and the last 48
             predictions scored. `fresh` is the same for tokens that the prompt does not contain: a cache that has lost
             the passage does no better than that. With --asked the first 16 of the 64 come before compression.
  recall     What a recipe's cache reads, held against exact attention over everything. After a prompt of P tokens C
             further ones are fed as they are, at S places of the text, with the full cache; Q, K and V of some layers
             (--layers) are recorded and given to every recipe and budget, each layer by itself. Columns: share of the
             entries read in a step, of their bytes in f16, and of these again what the index holds; share of the softmax
             mass on what was read, mean and 5th percentile over query heads; relative error of the output, mean and
             95th percentile, and the same without the estimate of what was not read; the mass not read, and what the
             index says of it over the truth; steps in which more was missing than it vouched for, which must be none.
             Recipes that evict read what they kept. Indexes that read some layers whole (dense=2) do so here in two of
             five layers by default, not in two of all: give dense=0, or --layers. Misleads where heads matter little to
             the model, and about errors that add up from layer to layer: see text. Certificates are of keys as stored:
             with k= in fewer bits, more can be missing of the exact ones. Allocators over layers divide over the
             recorded ones.
             --tile N repeats the prompt to N tokens: the first 4 once, those between in turn, the last 64 at the end.
             For bytes and the shape of the distribution only: keys are copied as they are, with the rotary angles of
             their first places, and it is not what a model would make of so long a text.
  guard      Exact and packed storage side by side over C tokens after a prompt of P: errors of packed keys and values and
             of attention outputs per layer; with --threshold, which heads would get more bits.
  ranks      Keys before their rotary embedding, and values, of --group layers side by side after a prompt of P tokens:
             relative error (Frobenius) of the best form of low rank whose factors take --share of the bytes, mean and
             largest over the groups. Says how alike the layers are, not what a model would make of it.
  needle     A number is hidden in the text and asked for after compression. For models of a billion parameters and
             more; the small default model fails it with its full cache.";

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Task {
    /// KL, same-top-1 and NLL over running text.
    Text,
    /// KL, same-top-1 and NLL over the second halves of windows, as llama.cpp measures.
    Windows,
    /// Mass and errors of what is read, layer by layer.
    Recall,
    /// Errors of packed storage, layer by layer.
    Guard,
    /// Continue a passage of the prompt.
    SpanCopy,
    /// Low-rank structure of keys and values.
    Ranks,
    /// Find a hidden number.
    Needle,
}

impl Task {
    fn measures_kl(self) -> bool {
        matches!(self, Self::Text | Self::Windows)
    }

    fn draws(self) -> bool {
        self.measures_kl() || self == Self::Recall
    }
}

/// Arguments of `kvsieve eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to measure.
    #[arg(long, value_enum, default_value = "text")]
    task: Task,
    /// A recipe; several with commas, or by repeating the option.
    #[arg(long, default_value = "snapkv")]
    recipe: Vec<String>,
    /// How much to keep, or with an index how much a step may read: 2048 (tokens per KV head), 25% (of the prompt),
    /// 64MiB. Repeat or separate with commas.
    #[arg(long, value_delimiter = ',')]
    budget: Vec<Budget>,
    /// The text; Python's own language documentation by default.
    #[arg(long)]
    text: Option<PathBuf>,
    /// P: tokens of the prompt. Several for span-copy, needle and recall.
    #[arg(long, value_delimiter = ',', default_value = "1024")]
    prompt_tokens: Vec<usize>,
    /// C: tokens scored after the prompt (text, recall), or watched (guard).
    #[arg(long, default_value_t = 128)]
    score_tokens: usize,
    /// Relative error of attention outputs above which heads get more bits (guard).
    #[arg(long)]
    threshold: Option<f64>,
    /// S: samples at equal strides through the text (text, recall).
    #[arg(long, default_value_t = 4)]
    samples: usize,
    /// Layers scored (recall); 0, 1, 2, the middle and the last by default.
    #[arg(long, value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Repeat the recorded prompt to N tokens (recall).
    #[arg(long, value_name = "N")]
    tile: Option<usize>,
    /// Layers taken together (ranks).
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    group: Vec<usize>,
    /// Bytes of the factors, of those of what they stand for (ranks).
    #[arg(long, value_delimiter = ',', default_value = "0.125,0.25,0.5")]
    share: Vec<f64>,
    /// First tokens left out (ranks).
    #[arg(long, default_value_t = 4)]
    sinks: usize,
    /// Windows from the start of the text (windows).
    #[arg(long, default_value_t = 6)]
    windows: usize,
    /// Tokens of a window (windows).
    #[arg(long, default_value_t = 1024)]
    window_tokens: usize,
    /// Depths in the prompt, 0 to 1 (span-copy, needle).
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.5,0.9")]
    depth: Vec<f64>,
    /// Where prompts start in the text, in tokens (span-copy).
    #[arg(long, value_delimiter = ',', default_value = "20000,60000")]
    offset: Vec<usize>,
    /// Feed the first 16 tokens of the passage before the prompt is compressed: recipes that look at the last queries then know
    /// what is asked (span-copy).
    #[arg(long)]
    asked: bool,
    /// Feed the model in steps of N tokens; prompts whole by default, so that every recipe chooses with the whole prompt
    /// in sight, windows one by one under recipes that pack: a step reads its own tokens before they are packed, so larger
    /// steps are faster and flatter.
    #[arg(long, value_name = "N")]
    chunk_tokens: Option<usize>,
    #[command(flatten)]
    place: PlaceArgs,
    /// Draw KL (text, windows) or the error of attention (recall) against bytes: *.svg or *.png.
    #[arg(long)]
    figure: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn windows(&self) -> windows::Protocol {
        windows::Protocol { windows: self.windows, tokens: self.window_tokens, chunk: self.chunk_tokens }
    }

    fn recall(&self) -> recall::Protocol {
        recall::Protocol {
            prompts: self.prompt_tokens.clone(),
            scored: self.score_tokens,
            samples: self.samples,
            layers: self.layers.clone(),
            tile: self.tile,
        }
    }

    /// What a task that draws did, in a line.
    fn protocol(&self) -> String {
        if self.task == Task::Windows {
            let predictions = self.windows().predictions();
            return format!(
                "{predictions} predictions in {} windows of {} tokens",
                self.windows, self.window_tokens
            );
        }
        let prompts: Vec<String> = self.prompt_tokens.iter().map(usize::to_string).collect();
        let tiled = self.tile.filter(|_| self.task == Task::Recall).map(|tile| format!(", tiled to {tile}"));
        let (samples, scored) = (self.samples, self.score_tokens);
        format!(
            "{samples} samples of {scored} tokens after {}{}",
            prompts.join(", "),
            tiled.unwrap_or_default()
        )
    }
}

/// One of some windows of the text at equal strides.
fn place(text: &[u32], window: usize, (sample, samples): (usize, usize)) -> Result<&[u32]> {
    let Some(beyond) = text.len().checked_sub(window) else {
        let what = format!("the text has {} tokens, one sample needs {window}", text.len());
        return Err(Error::usage(what, "give a longer --text, or lower --prompt-tokens or --score-tokens"));
    };
    let start = beyond * sample / samples.max(2).saturating_sub(1);
    Ok(&text[start..start + window])
}

/// What every task needs.
struct Job<'a> {
    host: &'a Host,
    variants: &'a [Variant],
    place: Place,
    chunk: usize,
}

impl Job<'_> {
    /// The same in other steps.
    fn in_chunks(&self, chunk: usize) -> Self {
        Self { chunk, place: self.place.clone(), ..*self }
    }

    /// A cache after a prompt, compressed as the recipe says.
    fn prefilled(&self, variant: &Variant, prompt: &[u32]) -> Result<(KvCache, SequenceId, Measured)> {
        let (mut cache, sequence) = self.opened(variant, prompt)?;
        self.host.model.end_prompt(&mut cache, sequence, prompt)?;
        let measured = Measured::of(&cache, sequence)?;
        Ok((cache, sequence, measured))
    }

    /// A cache after a prompt that may go on.
    fn opened(&self, variant: &Variant, prompt: &[u32]) -> Result<(KvCache, SequenceId)> {
        let mut cache = self.place.cache(self.host.model.shape()?, &variant.recipe[..], variant.budget)?;
        let sequence = cache.create_sequence();
        // A cache takes a single token behind others for the end of the prompt.
        self.host.model.begin_prompt(&mut cache, sequence, prompt, self.chunk.max(2), &mut |_| ())?;
        Ok((cache, sequence))
    }

    /// Feeds tokens and visits every row of logits. One token at a time where the recipe may compress in between, as
    /// in decoding; otherwise in chunks, which is the same and faster.
    fn feed(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        tokens: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let Schedule { chunk, every, over, .. } = cache.recipe().schedule;
        // Longer steps read everything.
        let reads = cache.recipe().index.is_some();
        let stepwise = chunk || every.is_some() || over.is_some() || reads;
        let size = if stepwise { 1 } else { self.chunk.min(tokens.len()) };
        self.host.model.forward_rows(cache, sequence, tokens, size, &mut |row, logits| {
            visit(row, logits);
            Ok(())
        })?;
        Ok(())
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    if let Some(path) = &args.figure {
        if !args.task.draws() {
            return Err(Error::usage(
                "--figure draws KL or the error of attention, which only the tasks text, windows and recall measure",
                "use --task text, --task windows or --task recall",
            ));
        }
        figure::check(path)?;
    }
    if let Some(depth) = args.depth.iter().find(|depth| !(0.0..=1.0).contains(*depth)) {
        return Err(Error::usage(
            format!("--depth {depth}"),
            "depths go from 0 (start of the prompt) to 1 (its end)",
        ));
    }
    if args.task == Task::Recall {
        args.recall().check()?;
    }
    let prompt = match (args.task, &args.prompt_tokens[..]) {
        (Task::Windows, _) => args.window_tokens,
        (Task::Text | Task::Guard | Task::Ranks, [one]) => *one,
        (Task::Text | Task::Guard | Task::Ranks, _) => {
            return Err(Error::usage("this task takes one prompt length", "give one --prompt-tokens"));
        }
        (_, many) => many.iter().max().copied().unwrap_or(0),
    };
    let host = Host::load(&args.model)?;
    let context = host.model.config().context;
    let most = if args.task == Task::Windows { prompt } else { prompt + args.score_tokens.max(128) };
    if most > context {
        let what = format!("the tokens of a sample reach {most} positions, the model's context is {context}");
        return Err(Error::usage(what, "lower --prompt-tokens, --score-tokens or --window-tokens"));
    }
    let place = args.place.open()?;
    // Ranks are the model's, not a recipe's.
    let recipes = if args.task == Task::Ranks { Vec::new() } else { args::split_recipes(&args.recipe) };
    let variants = place.variants(&host.model.shape()?, &recipes, &args.budget)?;
    let text = host.encode(&host::text(args.text.as_deref())?)?;
    let job = Job { host: &host, variants: &variants, place, chunk: args.chunk_tokens.unwrap_or(usize::MAX) };
    let began = Instant::now();
    let rows = match args.task {
        Task::Text => {
            let protocol = running::Protocol { prompt, scored: args.score_tokens, samples: args.samples };
            running::run(&job, protocol, &text)?
        }
        Task::Windows => windows::run(&job, args.windows(), &text)?,
        Task::Guard => {
            let (watched, threshold) = (args.score_tokens, args.threshold);
            let rows = guard::run(&job, guard::Protocol { prompt, watched, threshold }, &text)?;
            if args.json {
                return print_json(&rows);
            }
            guard::print(&rows);
            return Ok(());
        }
        Task::Ranks => {
            let protocol = ranks::Protocol {
                prompt,
                sinks: args.sinks,
                groups: args.group.clone(),
                shares: args.share.clone(),
            };
            let rows = ranks::run(&job, &protocol, &text)?;
            if args.json {
                return print_json(&rows);
            }
            ranks::print(&rows);
            return Ok(());
        }
        Task::Recall => {
            let rows = recall::run(&job, &args.recall(), &text)?;
            if args.json {
                print_json(&rows)?;
            } else {
                recall::print(&rows);
            }
            let Some(path) = &args.figure else { return Ok(()) };
            let title = format!("{}: {}", host.model.config().name, args.protocol());
            let (x, y) = ("bytes read in a step, % of all in f16", "mean relative error of the output");
            return figure::draw(path, recall::points(&rows), &figure::Labels { title, x, y });
        }
        Task::SpanCopy => {
            let protocol = span::Protocol {
                prompts: args.prompt_tokens.clone(),
                offsets: args.offset.clone(),
                depths: args.depth.clone(),
                asked: args.asked,
            };
            span::run(&job, &protocol, &text)?
        }
        Task::Needle => {
            let protocol =
                needle::Protocol { prompts: args.prompt_tokens.clone(), depths: args.depth.clone() };
            needle::run(&job, &protocol, &text)?
        }
    };
    if args.json {
        print_json(&rows)?;
    } else {
        print(args.task, &rows);
        if args.task == Task::Windows {
            println!("\n{}, {:.0} s in all", args.protocol(), began.elapsed().as_secs_f64());
        }
    }
    if let Some(path) = &args.figure {
        let title = format!("{}: {}", host.model.config().name, args.protocol());
        let (x, y) = ("KV cache, MiB resident", "mean KL to the full cache, nats");
        figure::draw(path, report::points(&rows), &figure::Labels { title, x, y })?;
    }
    Ok(())
}
