//! What to measure, from the command line.
//!
//! *Helps* because one configuration can be repeated in seconds. *Hurts* a comparison if two runs were given
//! different flags: the ratios of the summary hold only within one run.

use crate::config::Phase;
use std::path::PathBuf;

/// Printed by `--help`.
pub(crate) const HELP: &str = "\
Attention kernels of others beside kvsieve's, interleaved in one process.

  --n LIST         entries per KV head in decode   (4096,16384,32768,65536,131072)
  --group LIST     query heads per KV head         (1,4,8)
  --dim LIST       head dimension                  (64,128)
  --only PHASE     decode or prefill               (both)
  --without LIST   leave out contestants whose names start so, for example candle
  --rounds N       runs of each contestant         (9; slow ones take part in fewer, never below 3)
  --threads N      threads of every contestant     (physical cores)
  --stream-mib N   buffer of the streaming read    (4 times the last-level cache, 512 to a quarter of free memory)
  --quick          n 4096 and 16384, G 4, d 128, 3 rounds, 512 MiB, unless said otherwise
  --json FILE      every sample, beside the tables on standard output
";

/// Parsed flags.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Entries per KV head in decode.
    pub(crate) n: Vec<usize>,
    /// Query heads per KV head.
    pub(crate) group: Vec<usize>,
    /// Head dimensions.
    pub(crate) dim: Vec<usize>,
    /// One phase alone.
    pub(crate) only: Option<Phase>,
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
                "--only" => options.only = Some(phase(&value()?)?),
                "--without" => options.without = value()?.split(',').map(|name| name.trim().into()).collect(),
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
        self.only.is_none_or(|only| only == phase)
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

fn phase(text: &str) -> Result<Phase, String> {
    match text {
        "decode" => Ok(Phase::Decode),
        "prefill" => Ok(Phase::Prefill),
        _ => Err(format!("--only {text}: decode or prefill")),
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
    fn what_is_not_understood_is_an_error() {
        for text in ["--nn 4", "--n", "--n 4,x", "--rounds 0", "--only both", "--dim 80"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
