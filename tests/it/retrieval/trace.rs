//! Indexes on recorded keys, values and queries of a real model: `tests/golden/smollm2-small.*`, layers 0 and 20 of
//! SmolLM2-135M, a prompt of 320 tokens and 16 that follow.

use super::naive::{Row, naive, units};
use super::refined::check;
use super::{BUDGET, argument, check_choice, recipes};
use crate::support::{backends, entries};
use kvsieve::geometry::{LayerShape, ModelShape, Rotary, RotaryLayout, Slot};
use kvsieve::kernel::rope::{RopeArgs, RopeTarget};
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Backend, Budget, KvCache, Reference, SequenceId};
use safetensors::SafeTensors;
use std::sync::Arc;

/// One layer's rows, token-major and rotated.
struct Layer {
    shape: LayerShape,
    prompt: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn floats(file: &[u8], name: &str) -> Vec<f32> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let bytes = tensors.tensor(name).unwrap().data().to_vec();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// `[heads, tokens, d]` as `[tokens, heads, d]`.
fn token_major(rows: &[f32], heads: usize, d: usize) -> Vec<f32> {
    let tokens = rows.len() / (heads * d);
    let row = |t: usize, h: usize| &rows[(h * tokens + t) * d..][..d];
    (0..tokens).flat_map(|t| (0..heads).flat_map(move |h| row(t, h)).copied()).collect()
}

fn layer(layer: usize) -> Layer {
    let read = |kind: &str| std::fs::read(format!("tests/golden/smollm2-small.{kind}.safetensors")).unwrap();
    let (trace, peer) = (read("trace"), read("kvpress"));
    let (_, header) = SafeTensors::read_metadata(&trace).unwrap();
    let meta = header.metadata().clone().unwrap();
    let number = |key: &str| -> usize { meta[key].parse().unwrap() };
    let (hq, h, d, prompt) =
        (number("q_heads"), number("kv_heads"), number("head_dim"), number("prompt_len"));
    let rotary = Rotary::new(d, meta["rope_theta"].parse().unwrap(), RotaryLayout::HalfSplit);
    let mut q = floats(&trace, &format!("layers.{layer}.q_pre"));
    let tokens = (q.len() / (hq * d)) as i32;
    let table = rotary.table((0..hq).flat_map(|_| 0..tokens));
    let target = RopeTarget::Dense { rows: &mut q, dim: d };
    let args = &mut RopeArgs { layout: rotary.layout, dims: rotary.dims, table: &table, target };
    Reference::default().rope(args).unwrap();
    let mut shape = LayerShape::new(hq, h, d).with_rotary(rotary);
    shape.scale = meta["scale"].parse().unwrap();
    let k = token_major(&floats(&peer, &format!("layers.{layer}.k_post")), h, d);
    let v = token_major(&floats(&trace, &format!("layers.{layer}.v")), h, d);
    Layer { shape, prompt, q: token_major(&q, hq, d), k, v }
}

impl Layer {
    fn tokens(&self) -> usize {
        self.k.len() / (self.shape.kv_heads * self.shape.d_k)
    }

    /// The last queries of the prompt of the heads that share a KV head.
    fn window(&self, head: usize, count: usize) -> Vec<Vec<f32>> {
        let (hq, group, d) = (self.shape.query_heads, self.shape.group(), self.shape.d_k);
        let tokens = self.prompt.saturating_sub(count)..self.prompt;
        let each = tokens.flat_map(|token| (head * group..(head + 1) * group).map(move |h| token * hq + h));
        each.map(|row| self.q[row * d..(row + 1) * d].to_vec()).collect()
    }

    /// Attends over some tokens and commits them; gives the outputs, `[T, Hq, d_v]`.
    fn feed(&self, cache: &mut KvCache, id: SequenceId, tokens: std::ops::Range<usize>) -> Vec<f32> {
        let (hq, h, d) = (self.shape.query_heads, self.shape.kv_heads, self.shape.d_k);
        let rows =
            |rows: &'_ [f32], heads: usize| rows[tokens.start * heads * d..tokens.end * heads * d].to_vec();
        let (q, k, v) = (rows(&self.q, hq), rows(&self.k, h), rows(&self.v, h));
        let mut out = vec![0.0; q.len()];
        let mut step = cache.begin(id, tokens.len()).unwrap();
        let view = |x, heads| TensorView::token_major(x, tokens.len(), heads, d).unwrap();
        let into = TensorViewMut::token_major(&mut out[..], tokens.len(), hq, d).unwrap();
        step.attend(0, view(&q[..], hq), view(&k[..], h), view(&v[..], h), into).unwrap();
        step.commit(tokens.len()).unwrap();
        out
    }

    fn cache(&self, recipe: &str, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
        let shape = ModelShape::uniform(1, self.shape.clone()).unwrap();
        let builder = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(BUDGET));
        let mut cache = builder.shared_backend(Arc::clone(backend)).build().unwrap();
        let id = cache.create_sequence();
        self.feed(&mut cache, id, 0..self.prompt);
        cache.end_prefill(id).unwrap();
        (cache, id)
    }
}

#[test]
fn on_a_real_trace_the_choice_is_the_naive_one_and_what_is_missing_is_known() {
    let mut estimates = Vec::new();
    for backend in backends() {
        for number in [0, 20] {
            let layer = layer(number);
            for recipe in
                recipes().iter().filter(|r| argument(r, "store") == Some("f32") && !r.contains("dense=1"))
            {
                let (mut cache, id) = layer.cache(recipe, &backend);
                let steps = if backend.name() == "cpu" { layer.tokens() } else { layer.prompt + 2 };
                for token in layer.prompt..steps {
                    let heads = 0..layer.shape.kv_heads;
                    let before: Vec<_> = heads.clone().map(|head| units(&cache, id, 0, head)).collect();
                    layer.feed(&mut cache, id, token..token + 1);
                    let report = cache.last_read(id, 0).unwrap().unwrap();
                    let read = cache.last_choice(id, 0).unwrap().unwrap();
                    let mut missing = Vec::new();
                    for head in heads {
                        let all = entries(&cache, id, 0, head);
                        let naive = naive((&cache, id), (0, head), &all, &before[head]);
                        let (group, d) = (layer.shape.group(), layer.shape.d_k);
                        let rows: Vec<Row> = (head * group..(head + 1) * group)
                            .map(|h| &layer.q[(token * layer.shape.query_heads + h) * d..][..d])
                            .map(|query| naive.row(query, token as i32))
                            .collect();
                        let slots = &read.slots[read.offsets[head]..read.offsets[head + 1]];
                        let what = format!("{}: layer {number}, token {token}: {recipe}", backend.name());
                        check_choice(&what, &naive, &rows, slots, 1e-3);
                        for row in &rows {
                            let mass = |read: &dyn Fn(usize) -> bool| -> f64 {
                                let there = row.entries.iter().enumerate().filter(|(slot, _)| read(*slot));
                                there.map(|(_, x)| x.exp()).sum()
                            };
                            let left = |slot: usize| slots.binary_search(&Slot(slot as u32)).is_err();
                            missing.push(mass(&left) / mass(&|_| true));
                        }
                    }
                    let most = missing.iter().copied().fold(0.0, f64::max);
                    let bound = report.missing_at_most.map_or(1.0, f64::from);
                    assert!(bound >= most, "{recipe}: {bound} certified, {most} missing");
                    if recipe.starts_with("auto") && recipe.contains("size=4") {
                        let truth = missing.iter().sum::<f64>() / missing.len() as f64;
                        estimates.push((f64::from(report.missing.unwrap()), truth));
                    }
                }
            }
        }
    }
    let (said, truth) = estimates.iter().fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    assert!((said / truth - 1.0).abs() < 0.1, "{said} said to be missing, {truth} was");
}

#[test]
fn on_a_real_trace_entries_are_the_naive_ones_and_what_is_missing_is_known() {
    let mut estimates: Vec<(f64, f64)> = Vec::new();
    for backend in backends() {
        let tolerance = if backend.name() == "cpu" { 0.1 } else { 1e-3 };
        for number in [0, 20] {
            let layer = layer(number);
            for (widen, aware) in [(1.3, "no"), (8.0, "yes")] {
                let recipe = format!(
                    "auto(size=8,segment=128,update=16,recent=20,pieces=16,aware={aware},store=f32,widen={widen},min_context=0)"
                );
                let (mut cache, id) = layer.cache(&recipe, &backend);
                let steps = if backend.name() == "cpu" { layer.tokens() } else { layer.prompt + 2 };
                for token in layer.prompt..steps {
                    let heads = 0..layer.shape.kv_heads;
                    let before: Vec<_> = heads.clone().map(|head| units(&cache, id, 0, head)).collect();
                    let out = layer.feed(&mut cache, id, token..token + 1);
                    let read = cache.last_choice(id, 0).unwrap().unwrap();
                    let mut missing = Vec::new();
                    for head in heads {
                        let (group, d) = (layer.shape.group(), layer.shape.d_k);
                        let asked: Vec<(Vec<f32>, i32)> = (head * group..(head + 1) * group)
                            .map(|h| &layer.q[(token * layer.shape.query_heads + h) * d..][..d])
                            .map(|query| (query.to_vec(), token as i32))
                            .collect();
                        let out = &out[head * group * d..(head + 1) * group * d];
                        let window = layer.window(head, 256);
                        let limits = (widen, tolerance);
                        check((&cache, id), (0, head), &before[head], &asked, out, &window, limits);
                        let all = entries(&cache, id, 0, head);
                        let naive = naive((&cache, id), (0, head), &all, &before[head]);
                        let slots = &read.slots[read.offsets[head]..read.offsets[head + 1]];
                        for (query, at) in &asked {
                            let row = naive.row(query, *at);
                            let left = |slot: usize| slots.binary_search(&Slot(slot as u32)).is_err();
                            let weights: Vec<f64> = row.entries.iter().map(|x| x.exp()).collect();
                            let gone: f64 =
                                (0..weights.len()).filter(|&slot| left(slot)).map(|slot| weights[slot]).sum();
                            missing.push(gone / weights.iter().sum::<f64>());
                        }
                    }
                    let truth = missing.iter().sum::<f64>() / missing.len() as f64;
                    let said = cache.last_read(id, 0).unwrap().unwrap().missing.unwrap();
                    estimates.push((f64::from(said), truth));
                }
            }
        }
    }
    let (said, truth) = estimates.iter().fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    assert!((said / truth - 1.0).abs() < 0.1, "{said} said to be missing, {truth} was");
}
