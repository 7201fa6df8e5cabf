//! `kvsieve calibrate`: numbers of one's own model that learned policies go by, as a profile file.
//!
//! A text is cut into samples. The model reads each of them twice in one pass: the second time it repeats the first, and what
//! its queries look at then is what everything is made of. Nothing flows back through the model.
//!
//! *Helps* with any GGUF model that the host runs: what others publish is for a handful of models. *Hurts* by some minutes on
//! two cores for a small model; what it makes is as good as the text is like what the model will read.

mod convolve;
mod measure;
mod record;
mod train;

use crate::error::{Error, Result};
use crate::host::{self, Host, ModelArgs};
use convolve::Convolutions;
use kvsieve::profile::{Array, Part, Profile};
use measure::LayerSums;
use std::path::{Path, PathBuf};
use std::time::Instant;
use train::{Layerwise, Training};

const EXAMPLES: &str = "\
Examples:
  kvsieve calibrate --out models/smollm2.profile.safetensors
  kvsieve calibrate --model llama-3.2-1b.Q4_K_M.gguf --text mine.txt --parts duo,kvzap --out llama.profile.safetensors
  kvsieve run --profile models/smollm2.profile.safetensors --recipe kvzap --budget 25% --compare

Parts, and the recipes that go by them:
  duo      for every KV head, how much attention falls on entries that are neither first nor recent       duo
  heads    for every query head, how much attention falls around what is being repeated             compresskv, headkv
  errors   for every layer, the error of its output when 32 entries are kept                         compress_error
  kvzap    networks that predict replay scores from hidden states                                             kvzap
  locret   networks that predict the highest logit of later queries from q, k and v                          locret
  lococo   convolutions that mix what is not kept verbatim; only where --parts names it                      lococo

A file that is there is added to: parts made in the same way are kept, others made anew. Networks are saved layer by layer
in OUT.part, and a run that was cut off goes on behind the last one.";

/// A part of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum PartName {
    /// Classes of KV heads.
    Duo,
    /// Semantic retrieval heads.
    Heads,
    /// Errors of layers.
    Errors,
    /// Networks from hidden states to replay scores.
    Kvzap,
    /// Networks from queries, keys and values to logits.
    Locret,
    /// Convolutions over entries that are merged.
    Lococo,
}

impl PartName {
    fn name(self) -> &'static str {
        match self {
            Self::Duo => "duo",
            Self::Heads => "heads",
            Self::Errors => "errors",
            Self::Kvzap => "kvzap",
            Self::Locret => "locret",
            Self::Lococo => "lococo",
        }
    }
}

/// Arguments of `kvsieve calibrate`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to learn from; docstrings of Python's standard library by default. What is evaluated later should not be in it.
    #[arg(long)]
    text: Option<PathBuf>,
    /// The profile to write, or to add to.
    #[arg(long)]
    out: PathBuf,
    /// What to make.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "duo,heads,errors,kvzap,locret")]
    parts: Vec<PartName>,
    /// Samples, at equal strides through the text.
    #[arg(long, default_value_t = 16)]
    samples: usize,
    /// Tokens of a sample, each read twice.
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Neurons of kvzap's hidden layer: an eighth of the model's width by default; 0 is a linear map.
    #[arg(long)]
    kvzap_hidden: Option<usize>,
    /// Neurons of locret's hidden layer.
    #[arg(long, default_value_t = 64)]
    locret_hidden: usize,
    /// Channels of lococo's convolutions: entries that are made anew when a KV head is compressed.
    #[arg(long, default_value_t = 64)]
    lococo_channels: usize,
    /// Entries that a window of lococo's convolutions spans: an odd number.
    #[arg(long, default_value_t = 21)]
    lococo_width: usize,
    /// Passes over the samples in lococo's training, one cut of each at a time.
    #[arg(long, default_value_t = 16)]
    lococo_epochs: usize,
    /// Passes over the samples in training of the other networks.
    #[arg(long, default_value_t = 40)]
    epochs: usize,
    /// Seed of the networks' first weights and of the order of tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Args {
    /// How a part is made: whoever reads it in a file can make it again, and a file made otherwise is not taken for this.
    fn made(&self, part: PartName, text: &str) -> String {
        let Self { samples, tokens, epochs, seed, .. } = self;
        let learned = match part {
            PartName::Kvzap => match self.kvzap_hidden {
                Some(hidden) => format!(", {hidden} neurons, {epochs} epochs, seed {seed}"),
                None => format!(", {epochs} epochs, seed {seed}"),
            },
            PartName::Locret => format!(", {} neurons, {epochs} epochs, seed {seed}", self.locret_hidden),
            PartName::Lococo => {
                let (channels, width, epochs) = (self.lococo_channels, self.lococo_width, self.lococo_epochs);
                format!(", {channels} channels of width {width}, {epochs} epochs, seed {seed}")
            }
            _ => String::new(),
        };
        format!("kvsieve calibrate: {samples} samples of {tokens} tokens of {text}{learned}")
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    if args.samples < 2 || args.tokens < measure::LEAST_TOKENS || args.epochs.min(args.lococo_epochs) == 0 {
        return Err(Error::usage(
            format!("--samples {} --tokens {} --epochs {}", args.samples, args.tokens, args.epochs),
            format!(
                "give 2 samples or more (the last one tests), of {} tokens or more, and an epoch",
                measure::LEAST_TOKENS
            ),
        ));
    }
    let host = Host::load(&args.model)?;
    let shape = host.model.shape()?;
    if args.locret_hidden == 0 {
        return Err(Error::usage("--locret-hidden 0", "its networks have a hidden layer: give 1 or more"));
    }
    let most = convolve::most_channels(args.tokens);
    if args.lococo_width.is_multiple_of(2)
        || args.parts.contains(&PartName::Lococo) && !(1..=most).contains(&args.lococo_channels)
    {
        return Err(Error::usage(
            format!("--lococo-channels {} --lococo-width {}", args.lococo_channels, args.lococo_width),
            format!("give 1 to {most} channels for samples of {} tokens, and an odd width", args.tokens),
        ));
    }
    if 2 * args.tokens + 1 > host.model.config().context {
        return Err(Error::usage(
            format!(
                "a sample of {} tokens is read twice, and the model's context is {}",
                args.tokens,
                host.model.config().context
            ),
            "lower --tokens",
        ));
    }
    let text = host::calibration_text(args.text.as_deref())?;
    let name = args
        .text
        .as_deref()
        .and_then(Path::file_name)
        .map_or("Python's docstrings".into(), |n| n.to_string_lossy());
    let text_name = format!("{name} ({} bytes)", text.len());
    let mut profile = match args.out.is_file() {
        true => Profile::open(&args.out)?,
        false => Profile::new(&shape)?,
    };
    profile.check(&shape)?;
    let made = |part: PartName| args.made(part, &text_name);
    let todo: Vec<PartName> = args
        .parts
        .iter()
        .copied()
        .filter(|part| {
            !profile.parts().any(|(name, there)| name == part.name() && there.made() == made(*part))
        })
        .collect();
    for part in args.parts.iter().filter(|part| !todo.contains(part)) {
        eprintln!("{}: there already, made the same way", part.name());
    }
    if todo.is_empty() {
        return Ok(());
    }
    let tokens = host.encode(&text)?;
    let began = Instant::now();
    let recording = record::Recording::of(&host, &tokens, args, |part| todo.contains(&part))?;
    eprintln!("read {} samples in {:.0} s", args.samples, began.elapsed().as_secs_f64());
    for part in todo {
        let began = Instant::now();
        let layers =
            Layerwise { part: part.name(), made: made(part), partial: with_suffix(&args.out, ".part") };
        let filled = match part {
            PartName::Duo => measured(&recording.sums, made(part), "gates", LayerSums::gates)?,
            PartName::Heads => measured(&recording.sums, made(part), "scores", LayerSums::heads)?,
            PartName::Errors => {
                let errors = recording.sums.iter().map(LayerSums::error).collect::<Vec<_>>();
                Part::new(made(part)).with("layers", Array::new(vec![errors.len()], errors)?)
            }
            PartName::Kvzap | PartName::Locret => {
                let training = Training {
                    layers,
                    hidden: match part {
                        PartName::Locret => args.locret_hidden,
                        _ => args.kvzap_hidden.unwrap_or(host.model.config().embedding.div_ceil(8)),
                    },
                    epochs: args.epochs,
                    seed: args.seed,
                };
                training.run(&shape, &recording)?
            }
            PartName::Lococo => {
                let convolutions = Convolutions {
                    layers,
                    channels: args.lococo_channels,
                    width: args.lococo_width,
                    epochs: args.lococo_epochs,
                    seed: args.seed,
                };
                convolutions.run(&shape, &recording.readings)?
            }
        };
        profile = profile.with(part.name(), filled);
        profile.save(&args.out)?;
        eprintln!("{}: made in {:.0} s", part.name(), began.elapsed().as_secs_f64());
    }
    // What was saved on the way is in the profile now.
    let _ = std::fs::remove_file(with_suffix(&args.out, ".part"));
    Ok(())
}

/// One row of numbers per layer.
fn measured(
    sums: &[LayerSums],
    made: String,
    array: &str,
    of: impl Fn(&LayerSums) -> Vec<f32>,
) -> Result<Part> {
    let rows: Vec<Vec<f32>> = sums.iter().map(of).collect();
    let extents = vec![rows.len(), rows.first().map_or(0, Vec::len)];
    Ok(Part::new(made).with(array, Array::new(extents, rows.concat())?))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
