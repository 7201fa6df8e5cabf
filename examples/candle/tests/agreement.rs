//! Does this host run the model right? Logits against Hugging Face transformers, tokens against its tokenizer.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use kvsieve::{Cpu, KvCache};
use kvsieve_candle::{Gguf, Model, SpecialTokens, Stock, Tokenizer, Weights, argmax};
use support::{logprob, model_path, recorded};

/// Tokens per forward pass: several chunks, the last one short.
const CHUNK: usize = 500;

/// Who attends.
#[derive(Clone, Copy, Debug)]
enum Attention {
    Stock,
    Kvsieve,
}

/// Share of positions whose most likely token agrees, and mean |difference| of the next token's log-probability.
fn agreement(weights: Weights, attention: Attention, tokens: usize) -> Option<(f64, f64)> {
    let model = Model::load(model_path()?, weights).unwrap();
    let want = recorded();
    let (mut same, mut difference) = (0, 0.0);
    let mut check = |position: usize, logits: &[f32]| {
        same += usize::from(argmax(logits)? == want.top1[position]);
        if position + 1 < tokens {
            let got = logprob(logits, want.tokens[position + 1]);
            difference += f64::from((got - want.target_logprob[position]).abs());
        }
        Ok(())
    };
    let text = &want.tokens[..tokens];
    match attention {
        Attention::Stock => {
            let mut cache = Stock::new(&model);
            for (index, chunk) in text.chunks(CHUNK).enumerate() {
                let mut pass = model.pass_stock(&mut cache, chunk).unwrap();
                pass.for_each_row(&mut |row, logits| check(index * CHUNK + row, logits)).unwrap();
            }
        }
        Attention::Kvsieve => {
            let cache = KvCache::builder(model.shape().unwrap()).recipe("full");
            let mut cache = cache.backend(Cpu::default()).build().unwrap();
            let sequence = cache.create_sequence();
            model.forward_rows(&mut cache, sequence, text, CHUNK, &mut check).unwrap();
        }
    }
    let (same, difference) = (same as f64 / tokens as f64, difference / (tokens - 1) as f64);
    eprintln!(
        "{weights:?} {attention:?}: {:.2} % same top-1, mean |Δ log-probability| {difference:.5} over {tokens}",
        100.0 * same
    );
    Some((same, difference))
}

/// The same weights and `f32` arithmetic on both sides: only the order of sums differs.
#[test]
fn dequantized_weights_agree_with_transformers() {
    let Some((same, difference)) = agreement(Weights::F32, Attention::Stock, 1056) else { return };
    assert!(same >= 0.985, "{same}");
    assert!(difference < 0.01, "{difference}");
}

/// The same through kvsieve with everything kept.
#[test]
fn a_full_cache_agrees_with_transformers() {
    let Some((same, difference)) = agreement(Weights::F32, Attention::Kvsieve, 1056) else { return };
    assert!(same >= 0.985, "{same}");
    assert!(difference < 0.01, "{difference}");
}

/// candle's quantized product rounds activations to 8 bits, hence the wider band; fewer tokens because it is slow.
#[test]
fn quantized_weights_agree_nearly() {
    let Some((same, difference)) = agreement(Weights::Quantized, Attention::Stock, 96) else { return };
    assert!(same >= 0.90, "{same}");
    assert!(difference < 0.15, "{difference}");
}

#[test]
fn the_files_tokenizer_gives_the_recorded_tokens_back() {
    let Some(path) = model_path() else { return };
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap();
    let want = recorded().tokens;
    let text = tokenizer.decode(&want);
    let got = tokenizer.encode(&text, SpecialTokens::Recognize).unwrap();
    let first = got.iter().zip(&want).position(|(g, w)| g != w);
    assert_eq!((got.len(), first), (want.len(), None), "{:?}", &text[..200]);

    let mut stream = tokenizer.decoder();
    let mut streamed: String = want.iter().map(|token| stream.push(*token)).collect();
    streamed.push_str(&stream.finish());
    assert_eq!(streamed, text);
}
