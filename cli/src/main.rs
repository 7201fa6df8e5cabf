//! The `kvsieve` program: list the policies, replay a recorded trace, run a real model, evaluate, learn of a model.
//!
//! *Helps* to see what a policy does before embedding the library: on one recorded layer (`replay`), on one document
//! (`run`), or over a text (`eval`). *Hurts* as a server or a chat program: one sequence, one process, no history.

#![allow(clippy::print_stdout, reason = "printing results is what the program is for")]

mod args;
mod attention;
mod calibrate;
mod error;
mod eval;
mod host;
mod metrics;
mod policies;
mod replay;
mod run;
mod table;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  kvsieve policies
      what there is, with the arguments each policy takes
  kvsieve run --document manual.txt --question \"How do I reset it?\" \\
              --recipe snapkv --budget 25% --compare
      a real model on your document: answer, memory and speed, beside the full cache
  kvsieve eval --recipe snapkv,streaming --budget 50%,25%,10% --figure kl.svg
      how far each recipe moves the model's predictions, and for how many bytes
  kvsieve calibrate --out models/smollm2.profile.safetensors
      what recipes go by that learned the model (kvzap, locret, duo, …); see --profile of run and eval
  kvsieve replay --trace trace.safetensors --recipe snapkv --budget 25% --out out.safetensors
      recorded Q, K and V through one recipe: what was kept and how wrong attention became

Words:
  recipe   a policy and options joined by `+`: snapkv, \"snapkv(window=32)+k=f16+v=f16\"
  budget   2048 (tokens per KV head), 25% (of the prompt), 64MiB (over all layers)";

/// Smaller, faster KV caches: list, replay, run and evaluate compression policies.
#[derive(Debug, Parser)]
#[command(name = "kvsieve", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List every registered policy: what it keeps, what it needs, its arguments.
    Policies(policies::Args),
    /// Feed a recorded trace of Q, K and V to a recipe and measure what attention loses.
    Replay(replay::Args),
    /// Run a GGUF model on a document and a question with a compressed cache.
    Run(run::Args),
    /// Measure a recipe on a text: KL to the full cache, same-top-1, NLL; span copy; needles.
    Eval(eval::Args),
    /// Learn of a model what some recipes go by, as a profile file.
    Calibrate(calibrate::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Policies(args) => policies::main(&args),
        Command::Replay(args) => replay::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Eval(args) => eval::main(&args),
        Command::Calibrate(args) => calibrate::main(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvsieve: {error}");
            ExitCode::FAILURE
        }
    }
}
