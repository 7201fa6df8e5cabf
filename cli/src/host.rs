//! The model and the text that `run` and `eval` work on.

use crate::error::{Error, Result, read};
use indicatif::{ProgressBar, ProgressStyle};
use kvsieve_candle::{Gguf, Model, SpecialTokens, Tokenizer, Weights};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tokens fed at once during prefill unless said otherwise: large enough for the matrix products, small enough for their buffers.
pub(crate) const CHUNK: usize = 512;

/// The name of the small model that `scripts/fetch-model.sh` fetches.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Which model, and in which form its weights are kept.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// A GGUF file of a dense Llama-architecture model, or `smollm2` (the one `scripts/fetch-model.sh` fetches).
    #[arg(long, default_value = "smollm2")]
    model: String,
    /// Keep the weights quantized in memory: a quarter of the memory, and much slower.
    #[arg(long)]
    quantized_weights: bool,
}

/// A loaded model with its tokenizer.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

impl Host {
    pub(crate) fn load(args: &ModelArgs) -> Result<Self> {
        let path = if args.model == "smollm2" { find_smollm2()? } else { PathBuf::from(&args.model) };
        let mut file = Gguf::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let weights = if args.quantized_weights { Weights::Quantized } else { Weights::F32 };
        Ok(Self { model: Model::from_gguf(&mut file, weights)?, tokenizer })
    }

    /// Tokens of a plain text, without a beginning-of-sequence token.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode_continuation(text, SpecialTokens::AsText)?)
    }

    /// The token that the model's file puts before every text, if it asks for one.
    pub(crate) fn leading(&self) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode("", SpecialTokens::AsText)?)
    }

    /// A fresh sequence's first token, where the model has one.
    pub(crate) fn bos(&self) -> Vec<u32> {
        self.tokenizer.bos().into_iter().collect()
    }
}

/// Looks in `models/` beside and above the working directory, then above the program (`target/release/` lies below
/// the repository).
fn find_smollm2() -> Result<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let folders = here.ancestors().chain(program.ancestors());
    let found = folders.map(|folder| folder.join("models").join(SMOLLM2)).find(|path| path.is_file());
    found.ok_or_else(|| {
        Error::usage(
            format!("models/{SMOLLM2} was not found here or above"),
            "fetch it with scripts/fetch-model.sh, or name a file with --model FILE.gguf",
        )
    })
}

/// A text file, or without one Python's own language documentation: half a megabyte of English that is on every
/// machine with Python.
pub(crate) fn text(path: Option<&Path>) -> Result<String> {
    let bytes = match path {
        Some(path) => read(path)?,
        None => python_text(include_str!("../../scripts/pydoc-text.py"))?,
    };
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A text file, or without one docstrings of Python's standard library: a megabyte that the other default text is no part of.
pub(crate) fn calibration_text(path: Option<&Path>) -> Result<String> {
    let bytes = match path {
        Some(path) => read(path)?,
        None => python_text(include_str!("../../scripts/calibration-text.py"))?,
    };
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a script writes that makes a text.
fn python_text(script: &str) -> Result<Vec<u8>> {
    let out = std::env::temp_dir().join(format!("kvsieve-text-{}.txt", std::process::id()));
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let outcome = Command::new(&python).arg("-c").arg(script).arg(&out).output();
    let failure = match outcome {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(problem) = failure {
        return Err(Error::usage(
            format!("the default text comes from Python, and {} failed: {problem}", python.display()),
            "name a text file, or set PYTHON= to a Python 3",
        ));
    }
    let text = read(&out);
    // A leftover in the temporary folder is not worth an error.
    let _ = std::fs::remove_file(&out);
    text
}

/// A bar on standard error, hidden where that is not a terminal.
pub(crate) fn bar(length: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(length as u64).with_message(what.to_owned());
    let style = ProgressStyle::with_template("{msg:32} {bar:30} {pos}/{len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
