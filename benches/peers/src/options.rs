//! What to measure, from the command line.
//!
//! *Helps* because one configuration can be repeated in seconds. *Hurts* a comparison if two runs were given
//! different flags: the ratios of the summary hold only within one run.

use crate::config::Phase;
use crate::ggml;
use std::path::PathBuf;

/// Printed by `--help`.
pub(crate) const HELP: &str = "\
Attention kernels of others beside kvsieve's, interleaved in one process.

  --n LIST         entries per KV head in decode   (4096,16384,32768,65536,131072)
  --group LIST     query heads per KV head         (1,4,8)
  --dim LIST       head dimension                  (64,128)
  --only PHASE     decode or prefill, or depth     (decode and prefill)
  --without LIST   leave out contestants whose names start so, for example candle
  --rounds N       runs of each contestant         (9; slow ones take part in fewer, never below 3)
  --threads N      threads of every contestant     (physical cores)
  --stream-mib N   buffer of the streaming read    (4 times the last-level cache, 512 to a quarter of free memory)
  --quick          n 4096 and 16384, G 4, d 128, 3 rounds, 512 MiB, unless said otherwise
  --json FILE      every sample, beside the tables on standard output

--only depth decodes tokens of a real model deep in its context, in the candle host of kvsieve and in llama.cpp: the
time of attention per token, kvsieve's as `kvsieve run` tells it, llama.cpp's its time per token less that at depth 0.

  --depth LIST     tokens of context               (4000,8000)
  --kv LIST        types of llama.cpp's KV cache   (f16; also q8_0 and q4_0, which take minutes each to fill)
  --model FILE     a GGUF file of a Llama model    (SmolLM2 in models/ here or above: scripts/fetch-model.sh)
";

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// One attention over random data.
    Attention(Phase),
    /// A real model deep in its context.
    Depth,
}

/// Parsed flags.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Entries per KV head in decode.
    pub(crate) n: Vec<usize>,
    /// Query heads per KV head.
    pub(crate) group: Vec<usize>,
    /// Head dimensions.
    pub(crate) dim: Vec<usize>,
    /// One part alone.
    pub(crate) only: Option<Part>,
    /// Tokens of context of a real model.
    pub(crate) depth: Vec<usize>,
    /// Types of llama.cpp's KV cache.
    pub(crate) kv: Vec<String>,
    /// The real model; `None` for SmolLM2 wherever it lies.
    pub(crate) model: Option<PathBuf>,
    /// Beginnings of names that are left out.
    pub(crate) without: Vec<String>,
    /// Runs of each contestant.
    pub(crate) rounds: usize,
    /// Threads of every contestant; `None` for the physical cores.
    pub(crate) threads: Option<usize>,
    /// MiB of the streaming read; `None` to derive it from the cache.
    pub(crate) stream_mib: Option<usize>,
    /// Where every sample goes.
    pub(crate) json: Option<PathBuf>,
    /// Only the help text is wanted.
    pub(crate) help: bool,
}

impl Options {
    /// From arguments without the program's name.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut options, mut quick) = (Self::default(), false);
        let mut arguments = arguments;
        while let Some(flag) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{flag} needs a value"));
            match flag.as_str() {
                "--n" => options.n = list(&flag, &value()?)?,
                "--group" => options.group = list(&flag, &value()?)?,
                "--dim" => options.dim = list(&flag, &value()?)?,
                "--only" => options.only = Some(part(&value()?)?),
                "--depth" => options.depth = list(&flag, &value()?)?,
                "--kv" => options.kv = words(&value()?),
                "--model" => options.model = Some(value()?.into()),
                "--without" => options.without = words(&value()?),
                "--rounds" => options.rounds = number(&flag, &value()?)?,
                "--threads" => options.threads = Some(number(&flag, &value()?)?),
                "--stream-mib" => options.stream_mib = Some(number(&flag, &value()?)?),
                "--json" => options.json = Some(value()?.into()),
                "--quick" => quick = true,
                "--help" | "-h" => options.help = true,
                _ => return Err(format!("there is no flag {flag}; --help lists them")),
            }
        }
        if quick {
            options.stream_mib.get_or_insert(512);
        }
        let or = |list: &mut Vec<usize>, short: &[usize], long: &[usize]| {
            if list.is_empty() {
                *list = if quick { short } else { long }.to_vec();
            }
        };
        or(&mut options.n, &[4096, 16384], &[4096, 16384, 32768, 65536, 131_072]);
        or(&mut options.group, &[4], &[1, 4, 8]);
        or(&mut options.dim, &[128], &[64, 128]);
        or(&mut options.depth, &[4000, 8000], &[4000, 8000]);
        if options.kv.is_empty() {
            options.kv = vec!["f16".into()];
        }
        if let Some(kv) = options.kv.iter().find(|kv| ggml::FORMATS.iter().all(|f| f.name() != kv.as_str())) {
            return Err(format!("--kv {kv}: f16, q8_0 or q4_0"));
        }
        if options.rounds == 0 {
            options.rounds = if quick { 3 } else { 9 };
        }
        if let Some(d) = options.dim.iter().find(|d| !d.is_multiple_of(32)) {
            return Err(format!("--dim {d}: ggml's quantized blocks need a multiple of 32"));
        }
        Ok(options)
    }

    /// Whether `phase` is to be measured.
    pub(crate) fn wants(&self, phase: Phase) -> bool {
        self.only.is_none_or(|only| only == Part::Attention(phase))
    }
}

fn number(flag: &str, text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!("{flag} {text}: not a number above 0")),
    }
}

fn list(flag: &str, text: &str) -> Result<Vec<usize>, String> {
    text.split(',').map(|item| number(flag, item.trim())).collect()
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(|word| word.trim().into()).collect()
}

fn part(text: &str) -> Result<Part, String> {
    match text {
        "decode" => Ok(Part::Attention(Phase::Decode)),
        "prefill" => Ok(Part::Attention(Phase::Prefill)),
        "depth" => Ok(Part::Depth),
        _ => Err(format!("--only {text}: decode, prefill or depth")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, String> {
        Options::parse(text.split_whitespace().map(String::from))
    }

    #[test]
    fn flags_win_over_quick_wherever_they_stand() {
        let options = parse("--n 64,128 --quick --rounds 7 --only prefill").unwrap();
        assert_eq!((&options.n[..], &options.group[..], options.rounds), (&[64, 128][..], &[4][..], 7));
        assert!(options.wants(Phase::Prefill) && !options.wants(Phase::Decode));
        assert_eq!(options.stream_mib, Some(512));
    }

    #[test]
    fn the_real_model_is_measured_only_if_asked_for() {
        assert_eq!(parse("").unwrap().only, None);
        let options = parse("--only depth --model m.gguf --quick").unwrap();
        assert!(!options.wants(Phase::Decode) && !options.wants(Phase::Prefill));
        assert_eq!((options.only, &options.depth[..]), (Some(Part::Depth), &[4000, 8000][..]));
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for text in ["--nn 4", "--n", "--n 4,x", "--rounds 0", "--only both", "--dim 80", "--kv q9"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
