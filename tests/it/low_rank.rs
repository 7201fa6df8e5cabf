//! Keys and values of low rank: what is exactly of that rank comes back as it was, on every backend, through whatever
//! happens to a sequence; what would not become smaller, or not near enough, stays as it is; bytes are those that were
//! promised.

use crate::support::{backends, rotate, small_model};
use kvsieve::backend::{Backend, Cpu};
use kvsieve::cache::RemoveMode;
use kvsieve::device::Pool;
use kvsieve::error::{CacheError, Error, FactorError, RecipeError};
use kvsieve::geometry::{KeyPhase, LayerShape, ModelShape, Position};
use kvsieve::low_rank::{LowRankProgress, LowRankRun, Refused, SideOutcome};
use kvsieve::testing::Random;
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};
use std::ops::ControlFlow;
use std::sync::Arc;

const LAYERS: usize = 4;
const HQ: usize = 6;
const H: usize = 2;
const D: usize = 16;
/// Rank of the text's keys and values over all layers.
const RANK: usize = 6;

fn model() -> ModelShape {
    small_model(LAYERS, HQ, H, D)
}

/// A text whose keys, before their rotary embedding, and values are of rank [`RANK`] over all layers and heads.
struct Text {
    /// By layer, side and head, `[RANK, D]`.
    bases: Vec<Vec<f32>>,
    seed: u64,
}

impl Text {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let bases = (0..LAYERS * 2 * H).map(|_| (0..RANK * D).map(|_| random.normal()).collect());
        Self { bases: bases.collect(), seed }
    }

    /// Keys or values of a token: `[H, D]`.
    fn row(&self, token: usize, layer: usize, values: bool) -> Vec<f32> {
        let mut random = Random::new(self.seed + 1 + 2 * token as u64 + u64::from(values));
        let latent: Vec<f32> = (0..RANK).map(|_| random.normal()).collect();
        (0..H)
            .flat_map(|head| {
                let basis = &self.bases[(layer * 2 + usize::from(values)) * H + head];
                (0..D)
                    .map(|d| (0..RANK).map(|r| latent[r] * basis[r * D + d]).sum::<f32>() / 4.0)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// Feeds some tokens at the positions that follow; the outputs of every layer, `[tokens, HQ, D]`.
    fn feed(&self, cache: &mut KvCache, id: SequenceId, tokens: std::ops::Range<usize>) -> Vec<Vec<f32>> {
        self.try_feed(cache, id, tokens).unwrap()
    }

    fn try_feed(
        &self,
        cache: &mut KvCache,
        id: SequenceId,
        tokens: std::ops::Range<usize>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let first = cache.next_position(id)?.0;
        let (n, shape) = (tokens.len(), cache.shape().clone());
        let mut step = cache.begin(id, n)?;
        let mut outputs = Vec::new();
        for layer in 0..LAYERS {
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for (i, token) in tokens.clone().enumerate() {
                let mut random = Random::new(self.seed ^ (token * LAYERS + layer) as u64 ^ 0x5eed);
                q.extend((0..HQ * D).map(|_| random.normal()));
                let mut keys = self.row(token, layer, false);
                if let Some(rotary) = &shape.layer(layer).rotary {
                    keys.chunks_exact_mut(D).for_each(|key| rotate(rotary, key, first + i as i32));
                }
                k.extend(keys);
                v.extend(self.row(token, layer, true));
            }
            let mut out = vec![f32::NAN; n * HQ * D];
            step.attend(
                layer,
                TensorView::token_major(&q[..], n, HQ, D)?,
                TensorView::token_major(&k[..], n, H, D)?,
                TensorView::token_major(&v[..], n, H, D)?,
                TensorViewMut::token_major(&mut out[..], n, HQ, D)?,
            )?;
            outputs.push(out);
        }
        step.commit(n)?;
        Ok(outputs)
    }
}

fn cache(recipe: &str, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let builder =
        KvCache::builder(model()).recipe(recipe).shared_backend(Arc::clone(backend)).page_entries(16);
    let builder = if recipe.contains("index") { builder.budget(Budget::Tokens(100)) } else { builder };
    let mut cache = builder.build().unwrap_or_else(|e| panic!("{recipe}: {e}"));
    let id = cache.create_sequence();
    (cache, id)
}

/// The largest difference, as a share of the largest element.
fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let most = b.iter().flatten().fold(0.0f32, |m, x| m.max(x.abs()));
    a.iter().flatten().zip(b.iter().flatten()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / most
}

fn gathered(cache: &KvCache, id: SequenceId) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        for head in 0..H {
            let rows = cache.stored(id, layer).unwrap()[head].0;
            let (mut keys, mut values) = (vec![f32::NAN; rows * D], vec![f32::NAN; rows * D]);
            cache.gather(id, layer, head, &mut keys, &mut values).unwrap();
            all.extend([keys, values]);
        }
    }
    all
}

fn factored(runs: &[LowRankRun]) -> usize {
    let made = |o: &SideOutcome| matches!(o, SideOutcome::Factored { .. });
    runs.iter().filter(|run| made(&run.keys) || made(&run.values)).count()
}

const XKV: &str = "xkv(group=2,rank_k=6,rank_v=6,again=16,rebuilt=64,chunk=4)+exact=f32(sinks=3,tail=9)";

#[test]
fn what_is_of_that_rank_comes_back_as_it_was() {
    let text = Text::new(7);
    for backend in backends() {
        for recipe in [
            XKV,
            "xkv(group=1,rank_k=6,rank_v=6,rebuilt=0)+exact=f32(sinks=0,tail=0)",
            "xkv(group=4,rank_k=6,values=0,rebuilt=8)+exact=f32(sinks=3,tail=9)",
            "xkv(group=2,stride=2,rank_v=6,keys=0)",
            "shadowkv(rank_k=6,outliers=3,chunk=4)+index=pages(page=4,outliers=3,group=max,min_context=0)",
            "xkv(group=3,skip=1,rank_k=6,rank_v=6)+index=quest(page=4,dense=0,sinks=2,recent=8,min_context=0)",
        ] {
            let what = format!("{recipe} on {}", backend.name());
            let (mut ours, id) = cache(recipe, &backend);
            let (mut full, all) = cache("full", &backend);
            for prompt in [0..150, 150..211] {
                text.feed(&mut ours, id, prompt.clone());
                text.feed(&mut full, all, prompt);
            }
            ours.end_prefill(id).unwrap();
            let runs = ours.low_rank(id).unwrap();
            assert!(factored(runs) > 0 && factored(runs) == runs.len(), "{what}: {runs:?}");
            for run in runs {
                for side in [run.keys, run.values] {
                    if let SideOutcome::Factored { rank, error } = side {
                        assert!(rank == RANK && error < 2e-3, "{what}: {run:?}");
                    }
                }
            }
            let entries = ours.stats(id).unwrap().total().factored;
            let layers = if recipe.contains("skip") { LAYERS - 1 } else { LAYERS };
            let kept = if recipe.contains("tail=0") {
                0
            } else if recipe.contains("tail=9") {
                12
            } else {
                132
            };
            assert_eq!(entries, layers * H * (211 - kept), "{what}");
            let difference = apart(&gathered(&ours, id), &gathered(&full, all));
            assert!(difference < 1e-4, "{what}: rows differ by {difference}");
            if recipe.contains("index") {
                continue;
            }
            // Single tokens, a few at once, and a prompt's chunk, all over products.
            for step in [211..212, 212..213, 213..216, 216..281, 281..282] {
                let (got, want) =
                    (text.feed(&mut ours, id, step.clone()), text.feed(&mut full, all, step.clone()));
                let difference = apart(&got, &want);
                assert!(difference < 1e-4, "{what}: outputs of {step:?} differ by {difference}");
            }
        }
    }
}

#[test]
fn entries_that_come_later_are_factored_when_there_are_enough() {
    let text = Text::new(8);
    for backend in backends() {
        let (mut ours, id) = cache(XKV, &backend);
        let (mut full, all) = cache("full", &backend);
        text.feed(&mut ours, id, 0..100);
        text.feed(&mut full, all, 0..100);
        for token in 100..190 {
            let (got, want) =
                (text.feed(&mut ours, id, token..token + 1), text.feed(&mut full, all, token..token + 1));
            assert!(apart(&got, &want) < 1e-4, "{} token {token}", backend.name());
            // Sinks and tail are exact, and fewer than sixteen entries wait.
            let exact = token + 1 - ours.stats(id).unwrap().total().factored / (LAYERS * H);
            assert!((12..12 + 16).contains(&exact), "{} token {token}: {exact} exact", backend.name());
        }
        let runs = ours.low_rank(id).unwrap().to_vec();
        assert!(factored(&runs) >= 6 && factored(&runs) == runs.len(), "{runs:?}");
        let first: Vec<_> = runs.iter().filter(|run| run.layers[0] == 0).collect();
        assert!(first.windows(2).all(|pair| pair[0].positions.1 <= pair[1].positions.0), "{runs:?}");
        assert!(apart(&gathered(&ours, id), &gathered(&full, all)) < 1e-4);
    }
}

#[test]
fn what_happens_to_a_sequence_happens_to_its_products() {
    let text = Text::new(9);
    for backend in backends() {
        for own in ["rank_v=6", "values=0", "values=0,outliers=9"] {
            let recipe =
                format!("xkv(group=2,rank_k=6,{own},again=16,rebuilt=64,chunk=4)+exact=f32(sinks=3,tail=9)");
            let (mut ours, id) = cache(&recipe, &backend);
            let (mut full, all) = cache("full", &backend);
            for (cache, id) in [(&mut ours, id), (&mut full, all)] {
                text.feed(cache, id, 0..160);
                text.feed(cache, id, 160..161);
            }
            assert!(ours.stats(id).unwrap().total().factored > 0);
            let same = |what: &str, ours: &mut KvCache, id, full: &mut KvCache, all| {
                assert_eq!(ours.positions(id, 1, 1).unwrap(), full.positions(all, 1, 1).unwrap(), "{what}");
                let rows = apart(&gathered(ours, id), &gathered(full, all));
                assert!(rows < 1e-4, "{} {what}: rows differ by {rows}", backend.name());
                let (got, want) = (text.feed(ours, id, 200..201), text.feed(full, all, 200..201));
                let outputs = apart(&got, &want);
                assert!(outputs < 1e-4, "{} {what}: outputs differ by {outputs}", backend.name());
            };
            let (left, right) = (ours.fork(id).unwrap(), full.fork(all).unwrap());
            let range = Position(40)..Position(61);
            ours.remove(left, range.clone(), RemoveMode::Keep).unwrap();
            full.remove(right, range.clone(), RemoveMode::Keep).unwrap();
            same("remove", &mut ours, left, &mut full, right);
            ours.remove(left, Position(1)..Position(5), RemoveMode::Renumber).unwrap();
            full.remove(right, Position(1)..Position(5), RemoveMode::Renumber).unwrap();
            same("renumber", &mut ours, left, &mut full, right);
            // The first of both is as it was.
            same("fork", &mut ours, id, &mut full, all);
            ours.truncate(id, Position(120)).unwrap();
            full.truncate(all, Position(120)).unwrap();
            same("truncate", &mut ours, id, &mut full, all);
            ours.truncate(id, Position(2)).unwrap();
            full.truncate(all, Position(2)).unwrap();
            same("truncate to the sinks", &mut ours, id, &mut full, all);
        }
    }
}

#[test]
fn steps_give_the_same_bits_with_keys_remembered_or_made_on_any_threads() {
    let text = Text::new(10);
    for store in ["f32", "f16", "bf16"] {
        let mut all: Vec<Vec<Vec<f32>>> = Vec::new();
        for (rebuilt, threads) in [(0, 1), (0, 3), (4096, 1), (4096, 2), (60, 2)] {
            let index = "index=quest(page=4,dense=0,sinks=2,recent=8,min_context=0)";
            let recipe = format!(
                "xkv(group=2,rank_k=5,rank_v=6,rebuilt={rebuilt},chunk=4)+{index}+k={store}+v={store}+exact=f16(sinks=3,tail=9)"
            );
            let backend: Arc<dyn Backend> = Arc::new(Cpu::with_pool(Pool::with_threads(threads).unwrap()));
            let (mut cache, id) = cache(&recipe, &backend);
            text.feed(&mut cache, id, 0..400);
            let steps: Vec<Vec<Vec<f32>>> =
                (400..412).map(|token| text.feed(&mut cache, id, token..token + 1)).collect();
            let (hits, misses) = cache.rebuilt(id, 0).unwrap();
            match rebuilt {
                0 => assert_eq!((hits, misses), (0, 0)),
                4096 => assert!(hits > misses && misses > 0, "{hits} hits, {misses} misses"),
                // A hundred entries in chunks of four do not fit; some are remembered.
                _ => assert!(hits > 0 && misses > hits / 2, "{hits} hits, {misses} misses"),
            }
            all.push(steps.into_iter().flatten().collect());
        }
        let bits = |run: &Vec<Vec<f32>>| run.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(all.iter().all(|run| bits(run) == bits(&all[0])), "{store}");
    }
}

#[test]
fn bytes_are_those_of_the_factors() {
    let text = Text::new(11);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let recipe = "xkv(group=4,rank_k=12,rank_v=20,rebuilt=0)+k=f16+v=f16+exact=f16(sinks=4,tail=64)";
    let mut ours = KvCache::builder(model()).recipe(recipe).shared_backend(backend).build().unwrap();
    let id = ours.create_sequence();
    text.feed(&mut ours, id, 0..16452);
    let before = ours.stats(id).unwrap().total();
    ours.end_prefill(id).unwrap();
    let (stats, total) = (ours.stats(id).unwrap(), ours.stats(id).unwrap().total());
    let entries = 16384;
    assert_eq!(total.factored, LAYERS * H * entries);
    let factors = 2 * (entries * (12 + 20) + LAYERS * H * D * (12 + 20));
    let exact = 2 * 2 * D * LAYERS * H * 68;
    let positions = 4 * LAYERS * H * 16452;
    assert_eq!(total.bytes_logical, factors + exact + positions);
    // One array of positions for all heads; pages' own fields, and work space.
    let resident = factors + exact + 4 * 16452;
    let share = total.bytes_resident as f64 / resident as f64;
    assert!((1.0..1.06).contains(&share), "{share} of {resident}");
    assert!(
        before.bytes_resident > 5 * total.bytes_resident,
        "{} {}",
        before.bytes_resident,
        total.bytes_resident
    );
    // Latent rows are counted where they are met first.
    assert!(stats.layers[0].bytes_resident > 10 * stats.layers[1].bytes_resident);
    assert_eq!(ours.memory().resident, total.bytes_resident);
    // A fork shares them.
    ours.fork(id).unwrap();
    assert!(ours.memory().resident < total.bytes_resident * 101 / 100);
}

#[test]
fn outliers_take_their_keys_and_where_they_are() {
    let text = Text::new(18);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let totals = |outliers: usize| {
        let recipe = format!(
            "xkv(group=1,rank_k=12,values=0,outliers={outliers},rebuilt=0)+k=f16+v=f16+exact=f16(sinks=4,tail=64)"
        );
        let (mut ours, id) = cache(&recipe, &backend);
        text.feed(&mut ours, id, 0..2116);
        ours.end_prefill(id).unwrap();
        let total = ours.stats(id).unwrap().total();
        assert_eq!(total.factored, LAYERS * H * 2048);
        (total.bytes_logical, total.bytes_resident, total.bytes_read_per_step)
    };
    let ((none, resident_none, read_none), (some, resident, read)) = (totals(0), totals(48));
    let kept = LAYERS * H * 48 * 8;
    assert_eq!(some - none, kept * (2 * D + 4));
    let grown = (resident - resident_none) as f64 / (some - none) as f64;
    // Rows of 32 bytes in pages that have fields of their own.
    assert!((1.0..1.1).contains(&grown), "{grown}");
    // A key instead of the latent row of twelve numbers.
    assert_eq!(read - read_none, kept * 2 * (D - 12));
}

/// Slots of a KV head's outliers as [`kvsieve::low_rank::LowRank::outliers`] defines them, of entries `first ..` in chunks.
fn outliers(keys: &[f32], range: std::ops::Range<usize>, chunk: usize, count: usize) -> Vec<usize> {
    let key = |slot: usize| keys[slot * D..(slot + 1) * D].iter().map(|&x| f64::from(x));
    let chunks = range.start..range.start + range.len() / chunk * chunk;
    let mut order: Vec<(f64, usize)> = chunks
        .step_by(chunk)
        .map(|start| {
            let mean: Vec<f64> =
                (0..D).map(|d| (start..start + chunk).map(|s| key(s).nth(d).unwrap()).sum::<f64>()).collect();
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let cosine = |slot: usize| {
                let dot: f64 = key(slot).zip(&mean).map(|(k, m)| k * m).sum();
                dot / (norm(&mut key(slot)) * norm(&mut mean.iter().copied()))
            };
            ((start..start + chunk).map(cosine).fold(f64::INFINITY, f64::min), start)
        })
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    order[..count].iter().flat_map(|&(_, start)| start..start + chunk).collect()
}

#[test]
fn keys_of_outliers_stay_as_they_were_and_an_index_reads_them() {
    // Two of six dimensions: no product is near its key.
    let text = Text::new(17);
    for backend in backends() {
        let recipe = "shadowkv(rank_k=2,outliers=5,chunk=4,again=16)+exact=f32(sinks=3,tail=9)\
                      +index=pages(page=4,sinks=3,recent=9,outliers=4,group=max,min_context=0)";
        let (mut ours, id) = cache(recipe, &backend);
        let (mut full, all) = cache("full", &backend);
        text.feed(&mut ours, id, 0..210);
        ours.end_prefill(id).unwrap();
        text.feed(&mut full, all, 0..210);
        let (made, stored) = (gathered(&ours, id), gathered(&full, all));
        let mut kept = Vec::new();
        for (head, (made, stored)) in made.iter().step_by(2).zip(stored.iter().step_by(2)).enumerate() {
            let same = |slot: usize| {
                let pairs = made[slot * D..(slot + 1) * D].iter().zip(&stored[slot * D..]);
                pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5
            };
            let want = outliers(stored, 3..201, 4, 5);
            assert_eq!(want.len(), 20);
            for slot in 3..201 {
                let what = format!("{} head {head} slot {slot}", backend.name());
                assert_eq!(same(slot), want.contains(&slot), "{what}");
            }
            kept.push(outliers(stored, 3..201, 4, 4));
        }
        assert!(made.iter().skip(1).step_by(2).zip(stored.iter().skip(1).step_by(2)).all(|(a, b)| a == b));
        // They are among what the next step reads. A budget of 100 has room for 18 entries of outliers.
        text.feed(&mut ours, id, 210..211);
        for layer in 0..LAYERS {
            let read = ours.last_choice(id, layer).unwrap().unwrap();
            for head in 0..H {
                let want = &kept[layer * H + head];
                let slots: Vec<usize> = read.slots[read.offsets[head]..read.offsets[head + 1]]
                    .iter()
                    .map(|slot| slot.0 as usize)
                    .collect();
                assert!(
                    want.iter().all(|slot| slots.contains(slot)),
                    "{}: {want:?} {slots:?}",
                    backend.name()
                );
                assert!(slots.len() <= 100);
            }
        }
        // Runs of later tokens keep no more.
        text.feed(&mut ours, id, 211..260);
        assert!(ours.low_rank(id).unwrap().len() > LAYERS);
        text.feed(&mut full, all, 210..260);
        for (made, stored) in
            gathered(&ours, id).iter().step_by(2).zip(gathered(&full, all).iter().step_by(2))
        {
            let off = |slot: usize| {
                let pairs = made[slot * D..(slot + 1) * D].iter().zip(&stored[slot * D..]);
                pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            assert!((201..201 + 16).all(|slot| off(slot) > 1e-4), "{}", backend.name());
        }
    }
}

#[test]
fn what_would_not_become_smaller_or_near_enough_stays() {
    let text = Text::new(12);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let outcomes = |recipe: &str, tokens: usize| {
        let (mut ours, id) = cache(recipe, &backend);
        text.feed(&mut ours, id, 0..tokens);
        ours.end_prefill(id).unwrap();
        let runs = ours.low_rank(id).unwrap().to_vec();
        (runs, ours.stats(id).unwrap().total().factored)
    };
    let tail = "+exact=f32(sinks=2,tail=8)";
    // 16 dimensions of 64 entries in 2 heads: latent rows and bases are as large.
    let (runs, made) = outcomes(&format!("xkv(group=1,rank_k=16,rank_v=16){tail}"), 42);
    assert_eq!(made, 0);
    assert!(runs.len() == LAYERS && factored(&runs) == 0, "{runs:?}");
    let Refused::Larger { exact, factored: larger } = (match runs[0].keys {
        SideOutcome::Refused(refused) => refused,
        other => panic!("{other:?}"),
    }) else {
        panic!("{runs:?}")
    };
    assert_eq!((exact, larger), (32 * 2 * 2 * 16 * 4, (32 * 32 + 2 * 16 * 32) * 4));
    assert!(Refused::Larger { exact, factored: larger }.to_string().contains("bytes of factors"));
    // Rank 3 of 6 is further off than a tenth, and rank 6 is not needed whole.
    let (runs, made) = outcomes(&format!("xkv(group=2,rank_k=3,rank_v=3,tolerance=0.1){tail}"), 200);
    assert_eq!((made, factored(&runs)), (0, 0));
    assert!(matches!(runs[0].values, SideOutcome::Refused(Refused::Inexact { error, .. }) if error > 0.1));
    let (runs, made) = outcomes(&format!("xkv(group=2,rank_k=12,rank_v=12,tolerance=0.01){tail}"), 200);
    assert_eq!(made, LAYERS * H * 190);
    assert!(runs.iter().all(|run| matches!(run.keys, SideOutcome::Factored { rank: 6, .. })), "{runs:?}");
    // One side may do and the other not.
    let (runs, made) = outcomes(&format!("xkv(group=2,rank_k=6,rank_v=3,tolerance=0.05){tail}"), 200);
    assert_eq!((made, factored(&runs)), (LAYERS * H * 190, 2));
    assert!(runs.iter().all(|run| matches!(run.values, SideOutcome::Refused(_))), "{runs:?}");
    // No entries between sinks and tail.
    assert_eq!(outcomes(&format!("xkv{tail}"), 10), (Vec::new(), 0));
}

#[test]
fn a_decomposition_says_how_far_it_is_and_can_be_broken_off() {
    let text = Text::new(13);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let (mut ours, id) = cache(XKV, &backend);
    let (mut full, all) = cache("full", &backend);
    text.feed(&mut ours, id, 0..300);
    text.feed(&mut full, all, 0..300);
    let mut heard: Vec<LowRankProgress> = Vec::new();
    let broken = ours.end_prefill_watched(id, &mut |progress| {
        heard.push(progress);
        if progress.done == 1 && progress.share > 0.2 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert!(matches!(broken, Err(Error::Factor(FactorError::Cancelled { .. }))), "{broken:?}");
    let order = |p: &LowRankProgress| p.done as f64 + p.share;
    assert!(heard.windows(2).all(|pair| order(&pair[0]) <= order(&pair[1])), "{heard:?}");
    assert!(heard.iter().all(|p| p.groups == 2 && (0.0..=1.0).contains(&p.share)));
    // The first group is done, the second as it was; ending again does the rest.
    assert_eq!(ours.stats(id).unwrap().total().factored, 2 * H * 288);
    assert!(apart(&gathered(&ours, id), &gathered(&full, all)) < 1e-4);
    ours.end_prefill(id).unwrap();
    assert_eq!(ours.stats(id).unwrap().total().factored, 4 * H * 288);
    assert_eq!(factored(ours.low_rank(id).unwrap()), 2);
    assert!(apart(&text.feed(&mut ours, id, 300..301), &text.feed(&mut full, all, 300..301)) < 1e-4);
}

#[test]
fn recipes_that_cannot_be_are_refused() {
    let conflict = |shape: ModelShape, recipe: &str| {
        let built = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(64)).build();
        match built {
            Err(Error::Recipe(error @ RecipeError::Conflict { .. })) => error.to_string(),
            other => panic!("{recipe}: {other:?}"),
        }
    };
    assert!(conflict(model(), "snapkv+factor=xkv").contains("full"));
    // Not the index that it brings along.
    assert!(conflict(model(), "snapkv+factor=shadowkv").starts_with("factor=shadowkv"));
    assert!(conflict(model(), "xkv+k=int8").contains("f16"));
    let unknown = ModelShape::uniform(2, LayerShape::new(2, 2, 8)).unwrap();
    assert!(conflict(unknown, "xkv").contains("LayerShape::rotary"));
    let without = LayerShape { key_phase: KeyPhase::Unrotated, ..LayerShape::new(2, 2, 8) };
    KvCache::builder(ModelShape::uniform(2, without).unwrap()).recipe("xkv").build().unwrap();
    for recipe in [
        "xkv(keys=0,values=0)",
        "shadowkv(keys=0)",
        "xkv(group=0)",
        "xkv(keys=1.5)",
        "factor=snapkv",
        "factor=int8",
    ] {
        assert!(KvCache::builder(model()).recipe(recipe).build().is_err(), "{recipe}");
    }
    let recipe: kvsieve::recipe::Recipe = "xkv(group=2) + k=f16".parse().unwrap();
    assert_eq!(recipe.to_string(), "full+factor=xkv(group=2)+k=f16");
    let brought: kvsieve::recipe::Recipe = "shadowkv(chunk=4)".parse().unwrap();
    let text = "full+index=pages(page=8,outliers=48,recent=32,group=max)+factor=shadowkv(chunk=4)";
    assert_eq!(brought.to_string(), text);
    assert_eq!(text.parse::<kvsieve::recipe::Recipe>().unwrap().to_string(), text);
    let other: kvsieve::recipe::Recipe = "shadowkv+index=quest".parse().unwrap();
    assert_eq!(other.to_string(), "full+index=quest+factor=shadowkv");
    assert_eq!(
        recipe.to_string().parse::<kvsieve::recipe::Recipe>().unwrap().to_string(),
        recipe.to_string()
    );
}

#[test]
fn a_hosts_own_threads_are_told_to_use_one_call() {
    let text = Text::new(14);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let (mut ours, id) = cache(XKV, &backend);
    text.feed(&mut ours, id, 0..200);
    ours.end_prefill(id).unwrap();
    let mut step = ours.begin(id, 1).unwrap();
    let (q, k) = (vec![0.1f32; HQ * D], vec![0.1f32; H * D]);
    let view = |x, heads| TensorView::token_major(x, 1, heads, D).unwrap();
    step.append(0, view(&k[..], H), view(&k[..], H)).unwrap();
    let (mut out, mut lse) = (vec![0.0; HQ * D], vec![0.0; HQ]);
    let mut memory = kvsieve::cache::PartialWorkspace::default();
    let refused = step.attend_partial(0, view(&q[..], HQ), 0, 2, &mut memory, &mut out, &mut lse);
    assert!(matches!(refused, Err(Error::Cache(CacheError::Unsupported { what: "attend_partial", .. }))));
}

#[test]
fn another_sequences_products_are_attended_to_as_rows_are() {
    let text = Text::new(15);
    for backend in backends() {
        let (mut ours, id) = cache(XKV, &backend);
        let (mut full, all) = cache("full", &backend);
        for (cache, id) in [(&mut ours, id), (&mut full, all)] {
            text.feed(cache, id, 0..120);
            cache.end_prefill(id).unwrap();
        }
        let mut random = Random::new(16);
        let q: Vec<f32> = (0..2 * HQ * D).map(|_| random.normal()).collect();
        let whole = |cache: &KvCache, id| {
            let (mut out, mut lse) = (vec![f32::NAN; 2 * HQ * D], vec![f32::NAN; 2 * HQ]);
            let view = TensorView::token_major(&q[..], 2, HQ, D).unwrap();
            let mut memory = kvsieve::cache::PartialWorkspace::default();
            cache.attend_whole(id, 1, &view, &mut memory, &mut out, &mut lse).unwrap();
            vec![out, lse]
        };
        assert!(ours.stats(id).unwrap().total().factored > 0);
        assert!(apart(&whole(&ours, id), &whole(&full, all)) < 1e-4);
    }
}
