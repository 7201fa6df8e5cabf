//! How entries are stored once they are neither sinks nor recent: packed formats by name, what stays exact, and
//! which layers and heads get more bits.
//!
//! What a format *is* stands in [`crate::device::encoding`], how rows get into it in [`crate::kernel::pack`], when
//! they do in [`crate::store`]; here are the names under which a recipe asks for it, and the rules
//! ([`Precision`]) that give every KV head of every layer its storage. *Helps* where memory or its bandwidth runs
//! out: two to eight bits instead of sixteen or thirty-two. *Hurts* by an error that `kvsieve eval` measures; keys
//! need more bits than values, and below four bits it is often better to evict and keep the rest at four to eight.

pub mod llama;
mod precision;
mod presets;

pub use precision::{Exact, HeadPrecision, Precision, Rule, Span};
pub use presets::{PRESETS, Preset, preset};

use crate::device::encoding::{Encoding, Format, Packing};
use crate::error::RecipeError;
use crate::view::DType;

/// Entries of a packed page. They are packed together and share a mean where the format is centred.
pub const PACK_ENTRIES: usize = 128;

/// A packed format as reports show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codec {
    /// The format; its name is the codec's.
    pub format: Format,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// The paper or program.
    pub source: &'static str,
    /// Its page's file name without the ending: formats of a family share one.
    page: &'static str,
}

impl Codec {
    /// Path of its page from the repository's root.
    pub fn page(&self) -> String {
        format!("docs/codecs/{}.md", self.page)
    }
}

/// Every packed format.
pub const CODECS: [Codec; 12] = {
    const LLAMA: &str = "llama.cpp, ggml-quants.c";
    const LLOYD: &str = "Lloyd 1982; Max 1960; TurboQuant, arXiv 2504.19874; mean taken off by us";
    const KIVI: &str = "KIVI, arXiv 2402.02750";
    const fn codec(format: Format, page: &'static str, source: &'static str, summary: &'static str) -> Codec {
        Codec { format, summary, source, page }
    }
    [
        codec(Format::Int8, "int8", "ik_llama.cpp Q8_KV", "8 bits, a scale per row"),
        codec(
            Format::Int4,
            "int4",
            "QuaRot, arXiv 2404.00456; SAW-INT4, arXiv 2604.19157",
            "4 bits, a scale and a minimum per row",
        ),
        codec(Format::Lm4, "lm", LLOYD, "4 bits, levels for the normal distribution, centred and rotated"),
        codec(Format::Lm3, "lm", LLOYD, "3 bits, the same"),
        codec(Format::Lm2, "lm", LLOYD, "2 bits, the same"),
        codec(
            Format::Kivi4,
            "kivi",
            KIVI,
            "4 bits; keys grouped along the text per channel, values along the row",
        ),
        codec(Format::Kivi2, "kivi", KIVI, "2 bits, the same"),
        codec(Format::Q8_0, "llama-blocks", LLAMA, "8 bits, a scale per 32 elements"),
        codec(Format::Q4_0, "llama-blocks", LLAMA, "4 bits, a scale per 32 elements"),
        codec(Format::Q4_1, "llama-blocks", LLAMA, "4 bits, a scale and a minimum per 32 elements"),
        codec(Format::Q5_0, "llama-blocks", LLAMA, "5 bits, a scale per 32 elements"),
        codec(Format::Q5_1, "llama-blocks", LLAMA, "5 bits, a scale and a minimum per 32 elements"),
    ]
};

/// Types that store rows as they are.
const EXACT: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// The exact type of that name.
pub fn exact(name: &str) -> Option<DType> {
    EXACT.into_iter().find(|d| d.name() == name)
}

/// Names that `k=` and `v=` take.
pub fn names() -> Vec<&'static str> {
    EXACT.iter().map(|d| d.name()).chain(CODECS.iter().map(|c| c.format.name())).collect()
}

/// The encoding a recipe writes as `name`, with the treatment of rows that suits the format, or as `name(flag,…)`,
/// with the named treatment and no other. `term` is what errors quote.
///
/// # Errors
/// [`RecipeError::Unknown`] for a name that is none, [`RecipeError::Argument`] for a flag that is none.
pub fn parse<'a>(
    term: &str,
    name: &str,
    flags: impl IntoIterator<Item = &'a str>,
) -> Result<Encoding, RecipeError> {
    let refuse = |flag: &str, want: &str| RecipeError::Argument {
        term: term.to_owned(),
        argument: name.to_owned(),
        got: flag.to_owned(),
        want: want.to_owned(),
    };
    let mut flags = flags.into_iter();
    if let Some(dtype) = exact(name) {
        return match flags.next() {
            None => Ok(dtype.into()),
            Some(flag) => Err(refuse(flag, "without options: it stores rows as they are")),
        };
    }
    let Some(codec) = CODECS.iter().find(|c| c.format.name() == name) else {
        return Err(RecipeError::Unknown {
            kind: "storage type",
            name: name.to_owned(),
            known: names().join(", "),
        });
    };
    let Some(first) = flags.next() else { return Ok(Packing::new(codec.format).into()) };
    let mut packing = Packing { format: codec.format, center: false, hadamard: false };
    for flag in std::iter::once(first).chain(flags) {
        packing = match flag {
            "center" => packing.centered(),
            "hadamard" => packing.rotated(),
            "plain" => packing,
            other => return Err(refuse(other, "center, hadamard or plain")),
        };
    }
    Ok(packing.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_its_line_and_comes_back_from_its_text() {
        assert!(Format::ALL.iter().zip(&CODECS).all(|(format, codec)| *format == codec.format));
        for format in Format::ALL {
            for (center, hadamard) in [(false, false), (false, true), (true, false), (true, true)] {
                let encoding = Encoding::Packed(Packing { format, center, hadamard });
                let text = encoding.to_string();
                let (name, flags) = text.split_once('(').unwrap_or((&text, ")"));
                let flags = flags.trim_end_matches(')').split(',').filter(|f| !f.is_empty());
                assert_eq!(parse("k", name, flags), Ok(encoding), "{text}");
            }
        }
    }
}
