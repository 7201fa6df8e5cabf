//! How much memory there is.

use crate::error::RecipeError;
use std::fmt;
use std::str::FromStr;

/// What a compressed sequence may keep. Text: `1024` (tokens), `25%` (of the prompt), `64MiB` (bytes).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Entries per KV head, on average over all heads of all layers.
    Tokens(usize),
    /// Share of the prompt's tokens, above 0, at most 1.
    Fraction(f64),
    /// Bytes of one sequence over all layers.
    Bytes(usize),
}

const UNITS: [(&str, u64); 8] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("kB", 1000),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

impl Budget {
    /// Entries per KV head for a prompt of `prompt` tokens: `⌊fraction · prompt⌋`; `None` for bytes, which
    /// only the cache can translate.
    pub fn tokens(&self, prompt: usize) -> Option<usize> {
        match *self {
            Self::Tokens(n) => Some(n),
            // Without losing one to binary fractions: 0.29 · 100 is 28.999… in f64.
            Self::Fraction(f) => Some(((f * prompt as f64 + 1e-9).floor() as usize).min(prompt)),
            Self::Bytes(_) => None,
        }
    }

    /// Refuses budgets that nothing fits into.
    ///
    /// # Errors
    /// [`RecipeError::Budget`].
    pub fn validate(&self) -> Result<(), RecipeError> {
        let problem = match *self {
            Self::Tokens(0) | Self::Bytes(0) => "is nothing",
            Self::Fraction(f) if !(f > 0.0 && f <= 1.0) => "is not above 0 % and at most 100 %",
            _ => return Ok(()),
        };
        Err(error(&self.to_string(), problem))
    }
}

fn error(budget: &str, problem: &str) -> RecipeError {
    RecipeError::Budget {
        budget: budget.chars().take(64).collect(),
        problem: problem.to_owned(),
        change: "give tokens per KV head (1024), a share of the prompt (25%) or bytes (64MiB)".to_owned(),
    }
}

impl FromStr for Budget {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<Self, RecipeError> {
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..split], trimmed[split..].trim_start());
        let budget = match unit {
            "" => Self::Tokens(number.parse().map_err(|_| error(text, "is not a whole number of tokens"))?),
            "%" => {
                let percent: f64 = number.parse().map_err(|_| error(text, "is not a number of percent"))?;
                Self::Fraction(percent / 100.0)
            }
            _ => {
                let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
                    return Err(error(text, "has no unit I know: % B kB MB GB KiB MiB GiB"));
                };
                let bytes: f64 = number.parse().map_err(|_| error(text, "is not a number of bytes"))?;
                let bytes = (bytes * *factor as f64).floor();
                // Beyond 2^53 a f64 skips whole numbers; no machine has that much either.
                if bytes > 9_007_199_254_740_992.0 {
                    return Err(error(text, "is more than any machine has"));
                }
                Self::Bytes(bytes as usize)
            }
        };
        budget.validate().map_err(|e| match e {
            RecipeError::Budget { problem, .. } => error(text, &problem),
            other => other,
        })?;
        Ok(budget)
    }
}

/// Text that parses back to the same budget.
impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Tokens(n) => write!(f, "{n}"),
            Self::Fraction(x) => {
                // 0.07 · 100 is 7.000000000000001: the fewest decimals that divide back to the same number.
                let percent = x * 100.0;
                let same = |text: &String| text.parse::<f64>().is_ok_and(|p| p / 100.0 == x);
                let text = (0..=17).map(|decimals| format!("{percent:.decimals$}")).find(same);
                write!(f, "{}%", text.unwrap_or_else(|| percent.to_string()))
            }
            Self::Bytes(n) => {
                let units = UNITS.iter().filter(|(name, _)| name.ends_with("iB") || *name == "B");
                let exact = |(_, factor): &&(&str, u64)| n > 0 && (n as u64).is_multiple_of(*factor);
                let (name, factor) = units.copied().find(|u| exact(&u)).unwrap_or(("B", 1));
                write!(f, "{}{name}", n as u64 / factor)
            }
        }
    }
}
