//! The host on a model of two layers that the test writes itself: no download, any geometry, broken files on purpose.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use std::path::PathBuf;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kvsieve::profile::Profile;
use kvsieve::{Budget, Cpu, KvCache};
use kvsieve_candle::{Error, Forward, Logits, Model, Repeat, Sampler, Sampling, Stock, Weights};

const VOCABULARY: usize = 96;
const WIDTH: usize = 64;
const FEED_FORWARD: usize = 96;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// What differs between the files.
#[derive(Clone, Copy)]
struct Tiny {
    key_dim: usize,
    value_dim: usize,
    tied: bool,
    extra: Option<(&'static str, u32)>,
    without: &'static str,
    scaling: Option<&'static str>,
}

const PLAIN: Tiny = Tiny { key_dim: 16, value_dim: 16, tied: true, extra: None, without: "", scaling: None };

/// Repeatable weights without a random generator: any smooth aperiodic function will do.
fn weights(rows: usize, columns: usize, salt: usize) -> QTensor {
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| ((i * 7 + salt * 131) as f32 * 0.734).sin() / (columns as f32).sqrt())
        .collect();
    let full = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    QTensor::quantize(&full, GgmlDType::Q8_0).unwrap()
}

fn ones(width: usize) -> QTensor {
    QTensor::quantize(&Tensor::ones(width, candle_core::DType::F32, &Device::Cpu).unwrap(), GgmlDType::F32)
        .unwrap()
}

/// Writes the file and returns its path; the name keeps parallel tests apart.
fn write(name: &str, tiny: Tiny) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join(format!("tiny-{name}.gguf"));
    let number = |n: usize| Value::U32(u32::try_from(n).unwrap());
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::String("llama".into())),
        ("llama.block_count".to_owned(), number(2)),
        ("llama.context_length".to_owned(), number(512)),
        ("llama.embedding_length".to_owned(), number(WIDTH)),
        ("llama.feed_forward_length".to_owned(), number(FEED_FORWARD)),
        ("llama.attention.head_count".to_owned(), number(HEADS)),
        ("llama.attention.head_count_kv".to_owned(), number(KV_HEADS)),
        ("llama.attention.key_length".to_owned(), number(tiny.key_dim)),
        ("llama.attention.value_length".to_owned(), number(tiny.value_dim)),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(1e-5)),
        ("llama.rope.dimension_count".to_owned(), number(8)),
        ("llama.vocab_size".to_owned(), number(VOCABULARY)),
    ];
    if let Some(kind) = tiny.scaling {
        metadata.push(("llama.rope.scaling.type".into(), Value::String(kind.into())));
        metadata.push(("llama.rope.scaling.factor".into(), Value::F32(4.0)));
        metadata.push(("llama.rope.scaling.original_context_length".into(), number(128)));
    }
    if let Some((key, value)) = tiny.extra {
        metadata.retain(|(k, _)| k != key);
        metadata.push((key.into(), Value::U32(value)));
    }
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), weights(VOCABULARY, WIDTH, 1)),
        ("output_norm.weight".to_owned(), ones(WIDTH)),
    ];
    if !tiny.tied {
        tensors.push(("output.weight".into(), weights(VOCABULARY, WIDTH, 2)));
    }
    for layer in 0..2 {
        let matrices = [
            ("attn_q", HEADS * tiny.key_dim, WIDTH),
            ("attn_k", KV_HEADS * tiny.key_dim, WIDTH),
            ("attn_v", KV_HEADS * tiny.value_dim, WIDTH),
            ("attn_output", WIDTH, HEADS * tiny.value_dim),
            ("ffn_gate", FEED_FORWARD, WIDTH),
            ("ffn_up", FEED_FORWARD, WIDTH),
            ("ffn_down", WIDTH, FEED_FORWARD),
        ];
        for (salt, (part, rows, columns)) in matrices.into_iter().enumerate() {
            tensors.push((
                format!("blk.{layer}.{part}.weight"),
                weights(rows, columns, 10 * (layer + 1) + salt),
            ));
        }
        for part in ["attn_norm", "ffn_norm"] {
            tensors.push((format!("blk.{layer}.{part}.weight"), ones(WIDTH)));
        }
    }
    metadata.retain(|(key, _)| key != tiny.without);
    tensors.retain(|(name, _)| name != tiny.without);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    path
}

fn load(name: &str, tiny: Tiny) -> Model {
    Model::load(write(name, tiny), Weights::F32).unwrap()
}

fn full_cache(model: &Model) -> KvCache {
    KvCache::builder(model.shape().unwrap()).recipe("full").backend(Cpu::default()).build().unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| u32::try_from((i * 37 + i / 5) % VOCABULARY).unwrap()).collect()
}

fn assert_close(a: &Forward, b: &Forward) {
    let (a, b) = (a.logits.as_ref().unwrap(), b.logits.as_ref().unwrap());
    assert_eq!(a.dims(), b.dims());
    let worst = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    // Same inputs, f32 on both sides: only the order of sums differs.
    assert!(worst < 1e-4, "{worst}");
}

/// Chunks and single tokens, strided views of one buffer (equal head dimensions) and separate tensors (unequal ones).
#[test]
fn a_full_cache_gives_the_logits_of_stock_attention() {
    let cases = [
        ("plain", PLAIN),
        ("uneven", Tiny { key_dim: 24, value_dim: 8, tied: false, ..PLAIN }),
        ("linear", Tiny { scaling: Some("linear"), ..PLAIN }),
        ("yarn", Tiny { scaling: Some("yarn"), ..PLAIN }),
    ];
    for (name, tiny) in cases {
        let model = load(name, tiny);
        let mut cache = full_cache(&model);
        let sequence = cache.create_sequence();
        let mut stock = Stock::new(&model);
        let text = tokens(60);
        let mut rest = text.as_slice();
        for count in [33, 1, 20, 5, 1] {
            let (now, later) = rest.split_at(count);
            let ours = model.forward(&mut cache, sequence, now, Logits::All).unwrap();
            assert_close(&ours, &model.forward_stock(&mut stock, now, Logits::All).unwrap());
            rest = later;
        }
        assert_eq!(cache.next_position(sequence).unwrap().0, 60);
    }
}

#[test]
fn row_by_row_logits_equal_all_at_once() {
    let model = load("rows", PLAIN);
    let text = tokens(150);
    let mut cache = full_cache(&model);
    let all = cache.create_sequence();
    let want =
        model.forward(&mut cache, all, &text, Logits::All).unwrap().logits.unwrap().to_vec2::<f32>().unwrap();
    let some = cache.create_sequence();
    let mut rows = Vec::new();
    let timings = model
        .forward_rows(&mut cache, some, &text, 70, &mut |index, row| {
            assert_eq!(index, rows.len());
            rows.push(row.to_vec());
            Ok(())
        })
        .unwrap();
    assert_eq!(timings.tokens, 150);
    assert!(timings.attention > std::time::Duration::ZERO && timings.attention < timings.total);
    for (got, want) in rows.iter().flatten().zip(want.iter().flatten()) {
        assert!((got - want).abs() < 1e-4);
    }
}

#[test]
fn a_failed_pass_leaves_the_sequence_as_it_was() {
    let model = load("rollback", PLAIN);
    let text = tokens(21);
    let mut cache = full_cache(&model);
    let sequence = cache.create_sequence();
    model.forward(&mut cache, sequence, &text[..20], Logits::None).unwrap();
    for (bad, want) in [(vec![], "no tokens"), (vec![5, 9999], "9999"), (tokens(500), "512")] {
        let error = model.forward(&mut cache, sequence, &bad, Logits::Last).unwrap_err().to_string();
        assert!(error.contains(want) || bad.is_empty(), "{error}");
        assert_eq!(cache.next_position(sequence).unwrap().0, 20);
    }
    let mut stock = Stock::new(&model);
    model.forward_stock(&mut stock, &text[..20], Logits::None).unwrap();
    let ours = model.forward(&mut cache, sequence, &text[20..], Logits::Last).unwrap();
    assert_close(&ours, &model.forward_stock(&mut stock, &text[20..], Logits::Last).unwrap());
}

/// After an eviction fewer rows are stored than positions were used; rotation must follow the positions.
#[test]
fn positions_go_on_after_an_eviction() {
    let model = load("evict", PLAIN);
    let recipe = "streaming(sinks=2)";
    let cache = KvCache::builder(model.shape().unwrap()).recipe(recipe).budget(Budget::Tokens(16));
    let mut cache = cache.backend(Cpu::default()).build().unwrap();
    let sequence = cache.create_sequence();
    let mut seen = Vec::new();
    let after = model.prefill(&mut cache, sequence, &tokens(100), 32, &mut |done| seen.push(done)).unwrap();
    assert_eq!(seen, [32, 64, 96, 100]);
    assert_eq!(after.timings.tokens, 100);
    let stored = cache.stored(sequence, 0).unwrap();
    assert!(stored.iter().all(|rows| rows.0 <= 16), "{stored:?}");
    assert_eq!(cache.next_position(sequence).unwrap().0, 100);
    model.forward(&mut cache, sequence, &tokens(3), Logits::Last).unwrap();
    let last = cache.positions(sequence, 0, 0).unwrap().last().copied().unwrap();
    assert_eq!((last.0, cache.next_position(sequence).unwrap().0), (102, 103));
}

#[test]
fn generation_feeds_what_it_yields_and_stops_where_told() {
    let model = load("generate", PLAIN);
    let greedy = || Sampler::new(Sampling::default()).unwrap();
    let run = |stops: Vec<u32>, count: usize| {
        let mut cache = full_cache(&model);
        let sequence = cache.create_sequence();
        let after = model.prefill(&mut cache, sequence, &tokens(10), 512, &mut |_| ()).unwrap();
        let row = after.last_row().unwrap();
        let out: Vec<u32> = model
            .generate(&mut cache, sequence, row, greedy(), stops, count)
            .collect::<Result<_, _>>()
            .unwrap();
        out
    };
    let free = run(vec![], 8);
    assert_eq!(free.len(), 8);
    // Greedy continuation by hand, over the stock path.
    let mut stock = Stock::new(&model);
    let mut forward = model.forward_stock(&mut stock, &tokens(10), Logits::Last).unwrap();
    for token in &free {
        assert_eq!(*token, kvsieve_candle::argmax(&forward.last_row().unwrap()).unwrap());
        forward = model.forward_stock(&mut stock, &[*token], Logits::Last).unwrap();
    }
    let stop = free[3];
    let before = free.iter().take_while(|token| **token != stop).count();
    assert_eq!(run(vec![stop], 8), free[..before]);
}

#[test]
fn quantized_weights_give_nearly_the_same_logits() {
    let path = write("quantized", PLAIN);
    let run = |weights| {
        let model = Model::load(&path, weights).unwrap();
        model.forward_stock(&mut Stock::new(&model), &tokens(12), Logits::All).unwrap().logits.unwrap()
    };
    let (dense, packed) = (run(Weights::F32), run(Weights::Quantized));
    let power = dense.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let error = (dense - packed).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!((error / power).sqrt() < 0.05, "{error} of {power}");
}

#[test]
fn broken_files_name_what_is_wrong() {
    let fails = |name: &str, tiny: Tiny| Model::load(write(name, tiny), Weights::F32).unwrap_err();
    let error = fails("no-key", Tiny { without: "llama.block_count", ..PLAIN });
    assert!(matches!(&error, Error::MissingKey { key } if key == "llama.block_count"), "{error}");
    let error = fails("no-tensor", Tiny { without: "blk.1.ffn_up.weight", ..PLAIN });
    assert!(matches!(&error, Error::MissingTensor { name } if name == "blk.1.ffn_up.weight"), "{error}");
    let error = fails("heads", Tiny { extra: Some(("llama.attention.head_count_kv", 3)), ..PLAIN });
    assert!(matches!(&error, Error::BadKey { key, .. } if key == "llama.attention.head_count_kv"), "{error}");
    let error = fails("width", Tiny { extra: Some(("llama.feed_forward_length", 64)), ..PLAIN });
    assert!(matches!(&error, Error::TensorShape { .. }), "{error}");
    let error = fails("experts", Tiny { extra: Some(("llama.expert_count", 8)), ..PLAIN });
    assert!(matches!(&error, Error::Unsupported { .. }), "{error}");
    let error = fails("scaling", Tiny { scaling: Some("longrope"), ..PLAIN });
    assert!(error.to_string().contains("longrope"), "{error}");
}

/// The library must turn stored keys by the very angles that this host turned them by.
#[test]
fn the_shape_tells_the_library_our_rotation() {
    for (name, scaling) in [("r0", None), ("r1", Some("linear")), ("r2", Some("yarn"))] {
        let model = load(name, Tiny { scaling, ..PLAIN });
        let shape = model.shape().unwrap();
        let theirs = shape.layer(1).rotary.as_ref().unwrap().inverse_frequencies();
        let ours = model.config().rotary.inverse_frequencies();
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 1e-12 * a.abs(), "{scaling:?}: {a} {b}");
        }
        assert_eq!((shape.layers(), shape.layer(0).group()), (2, 2));
    }
}

fn profile(model: &Model) -> Profile {
    kvsieve::testing::profile(&model.shape().unwrap(), WIDTH, 7).unwrap()
}

fn learned_cache(model: &Model, recipe: &str) -> KvCache {
    let builder = KvCache::builder(model.shape().unwrap()).recipe(recipe).budget(Budget::Tokens(24));
    builder.profile(profile(model)).backend(Cpu::default()).build().unwrap()
}

#[test]
fn the_model_repeats_the_prompt_for_recipes_that_ask_for_it() {
    let model = load("replay", PLAIN);
    let text = tokens(90);
    let mut cache = learned_cache(&model, "kvzip");
    let sequence = cache.create_sequence();
    let after = model.prefill(&mut cache, sequence, &text, 40, &mut |_| ()).unwrap();
    // The logits are those of the prompt, not of its repetition.
    let mut stock = Stock::new(&model);
    assert_close(&after, &model.forward_stock(&mut stock, &text, Logits::Last).unwrap());
    assert_eq!(cache.next_position(sequence).unwrap().0, 90);
    assert!(cache.stored(sequence, 1).unwrap().iter().all(|rows| rows.0 == 24));

    // A last chunk of one token would have ended the prompt before its replay.
    let mut seen = Vec::new();
    let sequence = cache.create_sequence();
    model.prefill(&mut cache, sequence, &text[..81], 40, &mut |done| seen.push(done)).unwrap();
    assert_eq!(seen, [40, 81]);
    assert!(cache.stored(sequence, 0).unwrap().iter().all(|rows| rows.0 == 24));

    // Parts shorter than the prompt, behind a request: every entry is scored.
    let mut cache = learned_cache(&model, "kvzip+when=never");
    let sequence = cache.create_sequence();
    model.forward(&mut cache, sequence, &text, Logits::None).unwrap();
    let repeat = Repeat { part: 32, overlap: 8, ask: vec![1, 2, 3] };
    model.replay(&mut cache, sequence, &text, &repeat).unwrap();
    let scores = cache.scores(sequence, 0).unwrap().unwrap().values;
    assert!(scores.len() == 180 && scores.iter().all(|score| *score > 0.0 && *score <= 1.0));
    // There must be room for a part and its repetition.
    let long = tokens(300);
    let sequence = cache.create_sequence();
    model.forward(&mut cache, sequence, &long, Logits::None).unwrap();
    let error = model.replay(&mut cache, sequence, &long, &Repeat::default()).unwrap_err();
    assert!(matches!(error, Error::Context { end: 600, context: 512 }), "{error}");
    assert_eq!(cache.next_position(sequence).unwrap().0, 300, "nothing of it stays");
    assert_eq!(Repeat::default().within(212).part, 204);
    model.end_prompt(&mut cache, sequence, &long).unwrap();
    assert!(cache.scores(sequence, 1).unwrap().unwrap().values.iter().all(|score| *score > 0.0));
    // Not even the shortest part fits.
    let sequence = cache.create_sequence();
    model.forward(&mut cache, sequence, &tokens(480), Logits::None).unwrap();
    assert!(matches!(model.end_prompt(&mut cache, sequence, &tokens(480)), Err(Error::Context { .. })));
}

#[test]
fn hidden_states_reach_the_policy() {
    let model = load("hidden", PLAIN);
    let text = tokens(80);
    let scores = |recipe: &str, chunk: usize| {
        let mut cache = learned_cache(&model, recipe);
        let sequence = cache.create_sequence();
        for tokens in text.chunks(chunk) {
            model.forward(&mut cache, sequence, tokens, Logits::None).unwrap();
        }
        let scores = |layer| cache.scores(sequence, layer).unwrap().unwrap().values;
        (0..2).map(scores).collect::<Vec<_>>()
    };
    for recipe in ["kvzap+when=never", "locret(local=4)+when=never"] {
        let (whole, parts) = (scores(recipe, 80), scores(recipe, 7));
        assert!(whole[0] != whole[1] && whole[0].iter().any(|score| *score != whole[0][0]), "{recipe}");
        for (a, b) in whole.iter().flatten().zip(parts.iter().flatten()) {
            assert!((a - b).abs() < 1e-3 * (1.0 + a.abs()), "{recipe}: {a} {b}");
        }
    }
    let mut cache = learned_cache(&model, "kvzap(window=4)");
    let sequence = cache.create_sequence();
    model.prefill(&mut cache, sequence, &text, 32, &mut |_| ()).unwrap();
    assert!(cache.stored(sequence, 0).unwrap().iter().all(|rows| rows.0 == 24));
}

#[test]
fn a_profile_knows_the_model_it_was_made_for() {
    let model = load("fingerprint", PLAIN);
    let again = load("fingerprint-again", PLAIN);
    assert_eq!(model.fingerprint(), again.fingerprint(), "the file's name does not count");
    // The same geometry, other weights: an output matrix of its own.
    let other = load("fingerprint-other", Tiny { tied: false, ..PLAIN });
    let builder = KvCache::builder(other.shape().unwrap()).recipe("kvzap").budget(Budget::Tokens(24));
    let error = builder.profile(profile(&model)).build().unwrap_err().to_string();
    assert!(error.contains(model.fingerprint()) && error.contains(other.fingerprint()), "{error}");
    let states = Tensor::ones((3, HEADS * 16), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert_eq!(model.project(1, &states).unwrap().dims(), [3, WIDTH]);
    assert!(matches!(model.project(2, &states), Err(Error::Layer { layer: 2, layers: 2 })));
}
