//! The tokenizer that a GGUF file carries: byte-level BPE (`tokenizer.ggml.model` = `gpt2`).
//!
//! Merging is the `tokenizers` crate's. Special tokens and decoding are done here: special tokens because a document that
//! contains the text `<|im_end|>` must be readable as text ([`SpecialTokens::AsText`]), decoding because a token is a run
//! of bytes and a character may span several tokens ([`Decoder`] waits for the rest).
//!
//! *Helps*: no second file beside the model, and encode ∘ decode gives the tokens back. *Hurts*: SentencePiece models
//! (`llama`, `t5`) and pre-tokenizers that are not listed in [`Tokenizer::from_gguf`] are refused rather than guessed.

use std::collections::HashMap;

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// What to do with special tokens that are spelled out in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Encode them as ordinary text: right for documents and user input.
    #[default]
    AsText,
    /// Turn them into the tokens: right for prompts that were formatted by a template.
    Recognize,
}

/// A byte-level BPE tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// The bytes of every token.
    pieces: Vec<Vec<u8>>,
    /// Special tokens, longest spelling first, so that a spelling that starts with another wins.
    special: Vec<(String, u32)>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer from the metadata. Pre-tokenizers: `smollm`, `gpt-2` (and none), `llama-bpe`, `qwen2`.
    ///
    /// # Errors
    /// [`Error::UnsupportedTokenizer`] for another kind; [`Error::MissingKey`], [`Error::BadKey`] or
    /// [`Error::Tokenizer`] if the vocabulary is absent or inconsistent.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let key = "tokenizer.ggml.model";
        let model = gguf.string(key)?.ok_or_else(|| Error::MissingKey { key: key.into() })?;
        if model != "gpt2" {
            return Err(Error::UnsupportedTokenizer {
                key,
                got: model.into(),
                supported: "gpt2 (byte-level BPE)",
            });
        }
        let tokens = gguf.need_strings("tokenizer.ggml.tokens")?;
        let merges = gguf.need_strings("tokenizer.ggml.merges")?;
        let kinds = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
        let integer = |key: &str| -> Result<Option<u32>> {
            let id = gguf.integer(key)?.and_then(|id| u32::try_from(id).ok());
            Ok(id.filter(|id| (*id as usize) < tokens.len()))
        };
        let bos = integer("tokenizer.ggml.bos_token_id")?;
        let eos = integer("tokenizer.ggml.eos_token_id")?;
        let add_bos = gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(false);
        let chat_template = gguf.string("tokenizer.chat_template")?.map(str::to_owned);
        let split = gguf.string("tokenizer.ggml.pre")?.unwrap_or("gpt-2");
        Self::new(tokens, &merges, &kinds, split).map(|base| Self {
            bos,
            eos,
            add_bos,
            chat_template,
            ..base
        })
    }

    fn new(tokens: Vec<String>, merges: &[String], kinds: &[usize], split: &str) -> Result<Self> {
        let bytes = byte_of_char();
        let is_special = |id: usize| kinds.get(id).is_some_and(|kind| SPECIAL_KINDS.contains(kind));
        let pieces = tokens
            .iter()
            .enumerate()
            .map(|(id, token)| {
                if is_special(id) {
                    return token.as_bytes().to_vec();
                }
                let decoded: Option<Vec<u8>> = token.chars().map(|c| bytes.get(&c).copied()).collect();
                // A token outside the byte alphabet was added as plain text.
                decoded.unwrap_or_else(|| token.as_bytes().to_vec())
            })
            .collect();
        let mut special: Vec<(String, u32)> = tokens
            .iter()
            .enumerate()
            .filter(|(id, token)| is_special(*id) && !token.is_empty())
            .map(|(id, token)| (token.clone(), id as u32))
            .collect();
        special.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then(a.cmp(b)));

        let merges = merges
            .iter()
            .map(|merge| {
                let (left, right) = merge
                    .split_once(' ')
                    .ok_or_else(|| Error::Tokenizer(format!("merge `{merge}` is not two pieces")))?;
                Ok((left.to_owned(), right.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;
        let vocabulary: HashMap<String, u32> =
            tokens.into_iter().enumerate().map(|(id, token)| (token, id as u32)).collect();
        let (split, whole_words) = pre_tokenizer(split)?;
        let bpe = BPE::builder()
            .vocab_and_merges(vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .ignore_merges(whole_words)
            .build()
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        let mut bpe = tokenizers::Tokenizer::new(bpe);
        bpe.with_pre_tokenizer(Some(split));
        Ok(Self { bpe, pieces, special, bos: None, eos: None, add_bos: false, chat_template: None })
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Tokens after which a generation should stop: end of sequence, and the ends of turn and text that instruct models
    /// emit.
    pub fn stops(&self) -> Vec<u32> {
        let mut stops: Vec<u32> = self.eos.into_iter().collect();
        for name in ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>"] {
            stops.extend(self.special.iter().filter(|(text, _)| text == name).map(|(_, id)| *id));
        }
        stops.sort_unstable();
        stops.dedup();
        stops
    }

    /// The model's own chat template (Jinja), if the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The id of a special token by its spelling.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.special.iter().find(|(spelling, _)| spelling == text).map(|(_, id)| *id)
    }

    /// Encodes a text, after the beginning-of-sequence token if the model wants one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text cannot be encoded (a vocabulary without all bytes).
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let mut out: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        out.extend(self.encode_continuation(text, special)?);
        Ok(out)
    }

    /// Encodes a text that goes on after others: as [`Tokenizer::encode`] without a beginning-of-sequence token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_continuation(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let mut out = Vec::new();
        let mut rest = text;
        if special == SpecialTokens::Recognize {
            while let Some((at, spelling, id)) = self.next_special(rest) {
                self.encode_plain(&rest[..at], &mut out)?;
                out.push(id);
                rest = &rest[at + spelling..];
            }
        }
        self.encode_plain(rest, &mut out)?;
        Ok(out)
    }

    /// Where the first special token starts, how long it is, and its id.
    fn next_special(&self, text: &str) -> Option<(usize, usize, u32)> {
        let found = self
            .special
            .iter()
            .filter_map(|(spelling, id)| Some((text.find(spelling)?, spelling.len(), *id)));
        // The list is longest first and `min_by_key` keeps the first of equals: at one place the longest wins.
        found.min_by_key(|(at, _, _)| *at)
    }

    fn encode_plain(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding =
            self.bpe.encode_fast(text, false).map_err(|error| Error::Tokenizer(error.to_string()))?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The bytes of one token; empty for ids outside the vocabulary.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.pieces.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// Decodes tokens, special ones spelled out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.bytes(*token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder for tokens that arrive one at a time.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new() }
    }
}

/// Decodes a stream of tokens into whole characters.
#[derive(Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl Decoder<'_> {
    /// Takes a token and returns the text that is complete by now, which may be empty.
    pub fn push(&mut self, token: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.bytes(token));
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.pending.utf8_chunks() {
            let end = used + chunk.valid().len() + chunk.invalid().len();
            text.push_str(chunk.valid());
            // Only what ends the buffer can still become a character, and no character has more than four bytes.
            if end == self.pending.len() && chunk.invalid().len() < 4 && could_continue(chunk.invalid()) {
                used += chunk.valid().len();
                break;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            used = end;
        }
        self.pending.drain(..used);
        text
    }

    /// Ends the stream: what was waiting for more bytes becomes U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Whether these bytes are the beginning of a character that is merely cut short.
fn could_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// `tokenizer.ggml.token_type` of tokens that text never merges into: control (3) and user-defined (4).
const SPECIAL_KINDS: [usize; 2] = [3, 4];

/// GPT-2's printable stand-in for every byte: printable Latin-1 stands for itself, the others follow from U+0100.
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let themselves = (0..=u8::MAX).filter(printable).map(|byte| (char::from(byte), byte));
    let moved = (0..=u8::MAX).filter(|byte| !printable(byte)).zip('\u{100}'..).map(|(byte, c)| (c, byte));
    themselves.chain(moved).collect()
}

/// How a text is cut into words before merging, and whether a word that is a token is taken without merging.
///
/// The names are those of `tokenizer.ggml.pre`; the patterns are the ones the models were trained with.
fn pre_tokenizer(name: &str) -> Result<(PreTokenizerWrapper, bool)> {
    let gpt2 = || PreTokenizerWrapper::from(ByteLevel::new(false, false, true));
    let sequence = |parts: Vec<PreTokenizerWrapper>| PreTokenizerWrapper::from(Sequence::new(parts));
    Ok(match name {
        "gpt-2" | "gpt2" => (gpt2(), false),
        "smollm" => (sequence(vec![Digits::new(true).into(), gpt2()]), false),
        "llama-bpe" | "llama3" | "llama-v3" => (words(r"\p{N}{1,3}")?, true),
        "qwen2" => (words(r"\p{N}")?, false),
        other => {
            return Err(Error::UnsupportedTokenizer {
                key: "tokenizer.ggml.pre",
                got: other.into(),
                supported: "smollm, gpt-2, llama-bpe, qwen2",
            });
        }
    })
}

/// The word pattern that Llama 3 and Qwen 2 share but for how digits are grouped.
fn words(digits: &str) -> Result<PreTokenizerWrapper> {
    let pattern = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", // English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",     // a word with at most one leading mark or blank
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*", // punctuation with its line ends
        r"\s*[\r\n]+",                // line ends with the blanks before them
        r"\s+(?!\S)",                 // blanks, all but the one that belongs to the next word
        r"\s+",
    ]
    .join("|");
    let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false)
        .map_err(|error| Error::Tokenizer(error.to_string()))?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, false, false).into()]).into())
}

#[cfg(test)]
mod tests {
    use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    /// All 256 bytes, a few merges and two special tokens.
    fn small(split: &str) -> Tokenizer {
        let alphabet: HashMap<u8, char> = byte_of_char().into_iter().map(|(c, b)| (b, c)).collect();
        let mut tokens: Vec<String> = (0..=255u8).map(|byte| alphabet[&byte].to_string()).collect();
        let merges: Vec<String> = ["h e", "l l", "he ll", "hell o"].map(String::from).to_vec();
        tokens.extend(["he", "ll", "hell", "hello"].map(String::from));
        tokens.extend(["<|im_end|>", "<|im_end|>!"].map(String::from));
        let mut kinds = vec![1; 260];
        kinds.extend([3, 4]);
        Tokenizer::new(tokens, &merges, &kinds, split).unwrap()
    }

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        pre_tokenizer(name).unwrap().0.pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (start, end), _)| text[*start..*end].to_owned()).collect()
    }

    #[test]
    fn merges_apply_and_every_byte_round_trips() {
        let t = small("gpt-2");
        assert_eq!(t.encode("hello", SpecialTokens::AsText).unwrap(), [259]);
        let text = "héllo wörld\r\n\t 日本語 🦀 \u{0}";
        assert_eq!(t.decode(&t.encode(text, SpecialTokens::AsText).unwrap()), text);
    }

    #[test]
    fn special_tokens_are_text_unless_recognized_and_the_longest_wins() {
        let t = small("gpt-2");
        let text = "he<|im_end|>!<|im_end|>";
        assert_eq!(t.encode(text, SpecialTokens::Recognize).unwrap(), [256, 261, 260]);
        let plain = t.encode(text, SpecialTokens::AsText).unwrap();
        assert!(plain.iter().all(|id| *id < 260));
        assert_eq!(t.decode(&plain), text);
        assert_eq!((t.special("<|im_end|>"), t.stops()), (Some(260), vec![260]));
    }

    #[test]
    fn a_stream_waits_for_whole_characters_and_replaces_broken_ones() {
        let t = small("gpt-2");
        let mut stream = t.decoder();
        let crab = "🦀".as_bytes();
        let parts: Vec<String> = crab.iter().map(|byte| stream.push(u32::from(*byte))).collect();
        assert_eq!(parts, ["", "", "", "🦀"]);
        assert_eq!(stream.push(0xF0), "");
        assert_eq!(stream.push(u32::from(b'a')), "\u{FFFD}a");
        assert_eq!(stream.push(0xFF), "\u{FFFD}");
        stream.push(0xE6);
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn words_are_cut_as_each_model_was_trained() {
        let text = "It's 2024:\n\n  def foo";
        assert_eq!(cut("gpt-2", text), ["It", "'s", " 2024", ":", "\n\n ", " def", " foo"]);
        assert_eq!(cut("smollm", text), ["It", "'s", " ", "2", "0", "2", "4", ":", "\n\n ", " def", " foo"]);
        assert_eq!(cut("llama-bpe", text), ["It", "'s", " ", "202", "4", ":\n\n", " ", " def", " foo"]);
        assert_eq!(cut("qwen2", text), ["It", "'s", " ", "2", "0", "2", "4", ":\n\n", " ", " def", " foo"]);
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_by_name() {
        let error = pre_tokenizer("gemma4").unwrap_err().to_string();
        assert!(error.contains("gemma4") && error.contains("smollm"), "{error}");
    }
}
