//! A deterministic host: tensors that are a function of (sequence tag, position, layer, head), and dense
//! attention in `f64` over any set of entries, to compare the cache with.

use kvsieve::geometry::{LayerShape, ModelShape, Position, Rotary, RotaryLayout};
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Backend, KvCache, SequenceId};
#[cfg(feature = "gpu")]
use kvsieve::{backend::Gpu, error::DeviceError};
use std::sync::Arc;
#[cfg(feature = "gpu")]
use std::sync::OnceLock;

/// A hash as a float in [-1, 1).
pub fn noise(seed: u64) -> f32 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Normally distributed, unit variance, a function of the seed.
pub fn noise_normal(seed: u64) -> f32 {
    // Box and Muller.
    let uniform = |x: u64| f64::from(noise(x)) * 0.5 + 0.5;
    let radius = (-2.0 * (uniform(2 * seed) + 1e-9).ln()).sqrt();
    (radius * (std::f64::consts::TAU * uniform(2 * seed + 1)).cos()) as f32
}

/// Which tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Query = 1,
    Key = 2,
    Value = 3,
}

/// The row of a token before any rotation. `token` names the token's content, not its position.
pub fn row(kind: Kind, token: u64, layer: usize, head: usize, dim: usize) -> Vec<f32> {
    let base = (((token * 64 + layer as u64) * 64 + head as u64) * 4 + kind as u64) * 1024;
    // Queries are stretched so that the softmax is peaked enough for mistakes to show.
    let gain = if kind == Kind::Query { 3.0 } else { 1.0 };
    (0..dim).map(|d| gain * noise(base + d as u64)).collect()
}

/// Rotates a row to a position.
pub fn rotate(rotary: &Rotary, row: &mut [f32], position: i32) {
    let table = rotary.table(std::iter::once(position));
    for (pair, angle) in table.chunks_exact(2).enumerate() {
        let (a, b) = match rotary.layout {
            RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            RotaryLayout::HalfSplit => (pair, pair + rotary.dims / 2),
        };
        let (x, y) = (row[a], row[b]);
        row[a] = x * angle[0] - y * angle[1];
        row[b] = x * angle[1] + y * angle[0];
    }
}

/// Rounds as the store does.
pub fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// A host's row at a position: rotated if the layer says so.
pub fn placed(
    kind: Kind,
    shape: &LayerShape,
    token: u64,
    layer: usize,
    head: usize,
    position: i32,
) -> Vec<f32> {
    let dim = if kind == Kind::Value { shape.d_v } else { shape.d_k };
    let mut r = row(kind, token, layer, head, dim);
    if kind != Kind::Value
        && let Some(rotary) = &shape.rotary
    {
        rotate(rotary, &mut r, position);
    }
    r
}

/// Feeds tokens (by content) through one step; returns per layer the output `[token][Hq][d_v]`.
pub fn feed(cache: &mut KvCache, id: SequenceId, tokens: &[u64], accept: usize) -> Vec<Vec<f32>> {
    let shape = cache.shape().clone();
    let start = cache.next_position(id).unwrap().0;
    let mut outs = Vec::new();
    let mut step = cache.begin(id, tokens.len()).unwrap();
    // The implicit end of the prompt may renumber, so positions come from the step.
    let start_now = step.lanes().next().unwrap().1.0;
    assert!(start_now <= start);
    for layer in 0..shape.layers() {
        outs.push(feed_layer(&mut step, &shape, layer, tokens, start_now));
    }
    step.commit(accept).unwrap();
    outs
}

/// One layer of [`feed`].
pub fn feed_layer(
    step: &mut kvsieve::Step<'_>,
    shape: &ModelShape,
    layer: usize,
    tokens: &[u64],
    start: i32,
) -> Vec<f32> {
    let l = shape.layer(layer);
    let build = |kind, heads: usize| -> Vec<f32> {
        tokens
            .iter()
            .enumerate()
            .flat_map(|(i, &t)| (0..heads).flat_map(move |h| placed(kind, l, t, layer, h, start + i as i32)))
            .collect()
    };
    let (q, k, v) =
        (build(Kind::Query, l.query_heads), build(Kind::Key, l.kv_heads), build(Kind::Value, l.kv_heads));
    let n = tokens.len();
    let mut out = vec![f32::NAN; n * l.query_heads * l.d_v];
    let q = TensorView::token_major(&q[..], n, l.query_heads, l.d_k).unwrap();
    let out_view = TensorViewMut::token_major(&mut out[..], n, l.query_heads, l.d_v).unwrap();
    if l.shared_with.is_some() {
        step.attend_stored(layer, q, out_view).unwrap();
    } else {
        let k = TensorView::token_major(&k[..], n, l.kv_heads, l.d_k).unwrap();
        let v = TensorView::token_major(&v[..], n, l.kv_heads, l.d_v).unwrap();
        step.attend(layer, q, k, v, out_view).unwrap();
    }
    out
}

/// One stored entry as the host knows it: its key as placed, its value, its position, its log-mass bias.
#[derive(Clone, Debug)]
pub struct Entry {
    pub position: i32,
    pub bias: f32,
    pub key: Vec<f32>,
    pub value: Vec<f32>,
}

/// Dense attention of one query over a set of entries, in `f64`.
pub fn dense(
    shape: &LayerShape,
    query_head: usize,
    query: &[f32],
    position: i32,
    entries: &[Entry],
) -> Vec<f64> {
    let mut logits = Vec::new();
    for e in entries {
        let seen = e.position <= position
            && shape.window.is_none_or(|w| i64::from(position) - i64::from(e.position) < i64::from(w));
        let dot: f64 = query.iter().zip(&e.key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let mut x = dot * f64::from(shape.scale);
        if let Some(c) = shape.softcap {
            x = f64::from(c) * (x / f64::from(c)).tanh();
        }
        logits.push(if seen { x + f64::from(e.bias) } else { f64::NEG_INFINITY });
    }
    let sink = shape.sink_logits.as_ref().map_or(f64::NEG_INFINITY, |s| f64::from(s[query_head]));
    let max = logits.iter().copied().fold(sink, f64::max);
    let mut out = vec![0.0; shape.d_v];
    if max == f64::NEG_INFINITY {
        return out;
    }
    let total: f64 = logits.iter().map(|x| (x - max).exp()).sum::<f64>() + (sink - max).exp();
    for (x, e) in logits.iter().zip(entries) {
        let w = (x - max).exp() / total;
        out.iter_mut().zip(&e.value).for_each(|(o, v)| *o += w * f64::from(*v));
    }
    out
}

/// ‖a − b‖ / ‖b‖, absolute where b is (nearly) zero.
pub fn distance(a: &[f32], b: &[f64]) -> f64 {
    let diff: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>().sqrt();
    let norm: f64 = b.iter().map(|y| y * y).sum::<f64>().sqrt();
    assert!(diff.is_finite(), "an output was not written or is NaN");
    if norm > 1e-6 { diff / norm } else { diff }
}

/// The entries of one KV head as the cache gives them back.
pub fn entries(cache: &KvCache, id: SequenceId, layer: usize, head: usize) -> Vec<Entry> {
    let positions = cache.positions(id, layer, head).unwrap();
    let l = cache.shape().layer(layer).clone();
    let (mut keys, mut values) =
        (vec![f32::NAN; positions.len() * l.d_k], vec![f32::NAN; positions.len() * l.d_v]);
    cache.gather(id, layer, head, &mut keys, &mut values).unwrap();
    let biases = cache.biases(id, layer, head).unwrap();
    positions
        .iter()
        .zip(biases)
        .zip(keys.chunks_exact(l.d_k).zip(values.chunks_exact(l.d_v)))
        .map(|((p, bias), (k, v))| Entry { position: p.0, bias, key: k.to_vec(), value: v.to_vec() })
        .collect()
}

/// A small model: rotary keys, GQA, an odd dimension where wanted.
pub fn small_model(layers: usize, hq: usize, h: usize, d: usize) -> ModelShape {
    let rotary = Rotary::new(d / 2 * 2, 10_000.0, RotaryLayout::HalfSplit);
    ModelShape::uniform(layers, LayerShape::new(hq, h, d).with_rotary(rotary)).unwrap()
}

/// A device of a test's own, or `None` only if the absence of any was excused.
#[cfg(feature = "gpu")]
pub fn request_gpu() -> Option<Gpu> {
    match Gpu::request() {
        Ok(gpu) => Some(gpu.with_poison(true)),
        Err(DeviceError::NoAdapter { reason })
            if std::env::var("KVSIEVE_ALLOW_NO_GPU").is_ok_and(|v| v == "1") =>
        {
            println!("skipped, no adapter: {reason}");
            None
        }
        Err(error) => panic!("{error} (where there is no adapter, KVSIEVE_ALLOW_NO_GPU=1 excuses it)"),
    }
}

/// One device for the tests that neither break it nor count its memory: pipelines are compiled once.
#[cfg(feature = "gpu")]
pub fn shared_gpu() -> Option<Arc<Gpu>> {
    static GPU: OnceLock<Option<Arc<Gpu>>> = OnceLock::new();
    GPU.get_or_init(|| request_gpu().map(Arc::new)).clone()
}

/// Every backend that must agree; the GPU, shared between tests, joins where the feature is on.
pub fn backends() -> Vec<Arc<dyn Backend>> {
    #[cfg_attr(not(feature = "gpu"), allow(unused_mut, reason = "only the GPU is pushed"))]
    let mut all: Vec<Arc<dyn Backend>> =
        vec![Arc::new(kvsieve::Reference::default()), Arc::new(kvsieve::Cpu::default())];
    #[cfg(feature = "gpu")]
    all.extend(shared_gpu().map(|gpu| gpu as Arc<dyn Backend>));
    all
}

/// As [`backends`], but the GPU is the caller's alone: for tests that count its memory.
pub fn own_backends() -> Vec<Arc<dyn Backend>> {
    #[cfg_attr(not(feature = "gpu"), allow(unused_mut, reason = "only the GPU is exchanged"))]
    let mut all = backends();
    #[cfg(feature = "gpu")]
    if let Some(gpu) = all.iter_mut().find(|backend| backend.name() == "gpu") {
        *gpu = Arc::new(request_gpu().unwrap());
    }
    all
}

/// Positions as plain numbers.
pub fn plain(positions: &[Position]) -> Vec<i32> {
    positions.iter().map(|p| p.0).collect()
}

/// Attention accumulates in `f32`; against `f64` a few hundred terms leave about 1e-6. The bound is the one users are
/// promised, over exact entries and over what packing left of them alike.
pub const TOLERANCE: f64 = 1e-4;

/// Checks the output rows of those at `checked` against dense attention over exactly the stored
/// entries. A single token ends the prompt first, as the cache would, so that what is stored is what it attends to.
fn feed_checked(cache: &mut KvCache, id: SequenceId, tokens: &[u64], checked: &[usize], what: &str) {
    let shape = cache.shape().clone();
    if tokens.len() == 1 {
        cache.end_prefill(id).unwrap();
    }
    let before: Vec<Vec<Vec<Entry>>> = (0..shape.layers())
        .map(|l| (0..shape.layer(l).kv_heads).map(|h| entries(cache, id, l, h)).collect())
        .collect();
    let start = cache.next_position(id).unwrap().0;
    let precision = cache.recipe().precision.clone();
    let outs = feed(cache, id, tokens, tokens.len());
    for layer in 0..shape.layers() {
        let l = shape.layer(layer);
        for h in 0..l.query_heads {
            let head = h / l.group();
            let exact = precision.head((layer, shape.layers()), (head, l.kv_heads), l.group()).exact;
            let round = |dtype: DType, row: Vec<f32>| row.into_iter().map(|x| stored(dtype, x)).collect();
            let mut all = before[layer][head].clone();
            all.extend(tokens.iter().zip(start..).map(|(&t, position)| Entry {
                bias: 0.0,
                position,
                key: round(exact.0, placed(Kind::Key, l, t, layer, head, position)),
                value: round(exact.1, placed(Kind::Value, l, t, layer, head, position)),
            }));
            for &i in checked {
                let position = start + i as i32;
                let query = placed(Kind::Query, l, tokens[i], layer, h, position);
                let at = (i * l.query_heads + h) * l.d_v;
                let error = distance(&outs[layer][at..at + l.d_v], &dense(l, h, &query, position, &all));
                assert!(error < TOLERANCE, "{what}: layer {layer} head {h} token {i}: {error:e}");
            }
        }
    }
}

/// Feeds tokens and checks every output row.
pub fn feed_all_checked(cache: &mut KvCache, id: SequenceId, tokens: &[u64], what: &str) {
    feed_checked(cache, id, tokens, &(0..tokens.len()).collect::<Vec<_>>(), what);
}

/// Feeds tokens and checks the first and the last output row: the ends of a step see most of what can go wrong.
pub fn feed_ends_checked(cache: &mut KvCache, id: SequenceId, tokens: &[u64], what: &str) {
    feed_checked(cache, id, tokens, &[0, tokens.len() - 1], what);
}
