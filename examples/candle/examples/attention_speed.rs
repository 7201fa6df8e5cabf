//! Attention of a decode step over a long exact cache: kvsieve against what candle does today.
//!
//! Both caches hold the same prompt; then the same tokens are fed to both, one at a time and in turn, so that heat,
//! frequency and other load hit both alike. Prints medians of the time inside attention, and whether the logits agree.
//!
//! ```text
//! cargo run --release --example attention_speed -- ../../models/SmolLM2-135M-Instruct.Q4_1.gguf [prompt tokens] [steps]
//! ```
use std::time::Duration;

use kvsieve::KvCache;
use kvsieve::backend::Cpu;
use kvsieve_candle::{Gguf, Logits, Model, SpecialTokens, Stock, Tokenizer, Weights, argmax};

/// Real text that every checkout has: this crate's own sources.
const TEXT: &[&str] = &[
    include_str!("../src/model.rs"),
    include_str!("../src/tokenizer.rs"),
    include_str!("../src/stock.rs"),
    include_str!("../src/config.rs"),
    include_str!("../src/weights.rs"),
    include_str!("../src/sample.rs"),
    include_str!("../src/rope.rs"),
    include_str!("../src/adapter.rs"),
    include_str!("../src/error.rs"),
    include_str!("../src/gguf.rs"),
];

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: attention_speed MODEL.gguf [prompt tokens] [steps]")?;
    let prompt_tokens: usize = arguments.next().map_or(Ok(4000), |n| n.parse())?;
    let steps: usize = arguments.next().map_or(Ok(64), |n| n.parse())?;

    let mut gguf = Gguf::open(path)?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let model = Model::from_gguf(&mut gguf, Weights::F32)?;
    let tokens = tokenizer.encode(&TEXT.concat(), SpecialTokens::AsText)?;
    let needed = prompt_tokens + steps;
    if tokens.len() < needed || prompt_tokens == 0 || steps == 0 {
        return Err(format!("the text has {} tokens, {needed} are needed", tokens.len()).into());
    }
    let (prompt, decode) = tokens[..needed].split_at(prompt_tokens);

    let mut cache = KvCache::builder(model.shape()?).recipe("full").backend(Cpu::default()).build()?;
    let sequence = cache.create_sequence();
    let mut stock = Stock::new(&model);
    for chunk in prompt.chunks(512) {
        model.forward(&mut cache, sequence, chunk, Logits::None)?;
        model.forward_stock(&mut stock, chunk, Logits::None)?;
    }
    cache.end_prefill(sequence)?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut ours_total, mut theirs_total) = (Vec::new(), Vec::new());
    let (mut worst, mut same) = (0f32, 0);
    for token in decode {
        let a = model.forward(&mut cache, sequence, &[*token], Logits::Last)?;
        let b = model.forward_stock(&mut stock, &[*token], Logits::Last)?;
        ours.push(a.timings.attention);
        theirs.push(b.timings.attention);
        ours_total.push(a.timings.total);
        theirs_total.push(b.timings.total);
        let (a, b) = (a.last_row()?, b.last_row()?);
        worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
        same += usize::from(argmax(&a)? == argmax(&b)?);
    }
    let (ours, theirs) = (median(&mut ours), median(&mut theirs));
    println!(
        "{} of {prompt_tokens} tokens, then {steps} decode steps; medians per token",
        model.config().name
    );
    println!("{:<28} {:>12} {:>12}", "", "kvsieve", "stock candle");
    println!("{:<28} {ours:>9.2} ms {theirs:>9.2} ms   {:.1} times faster", "attention", theirs / ours);
    println!(
        "{:<28} {:>9.2} ms {:>9.2} ms",
        "whole step",
        median(&mut ours_total),
        median(&mut theirs_total)
    );
    println!("logits: largest difference {worst:.2e}, same top-1 {same} of {steps}");
    let good = theirs >= 2.0 * ours && same * 100 >= steps * 98;
    println!("{}", if good { "ok: at least twice as fast, and the logits agree" } else { "NOT as required" });
    if good { Ok(()) } else { Err("attention is less than twice as fast, or the logits differ".into()) }
}
