//! Memory really goes back: resident bytes against the process's own RSS, and the peak of a chunked prefill.
//! A binary of its own with one test, because RSS is a property of the process.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "tests")]
#![cfg(target_os = "linux")]

#[path = "it/support.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the other binary")]
mod support;

use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};

/// SmolLM2-135M's KV heads and a few of its layers; one query head per KV head, since queries take no memory.
const LAYERS: usize = 6;
const HQ: usize = 3;
const H: usize = 3;
const D: usize = 64;

fn rss() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn prefill(
    cache: &mut KvCache,
    id: SequenceId,
    tokens: usize,
    chunk: usize,
    mut after: impl FnMut(&KvCache),
) {
    let noise = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| support::noise((i * 31 + seed) as u64)).collect()
    };
    let (q, k, v) = (noise(chunk * HQ * D, 1), noise(chunk * H * D, 2), noise(chunk * H * D, 3));
    let mut out = vec![0.0; chunk * HQ * D];
    let mut done = 0;
    while done < tokens {
        let n = chunk.min(tokens - done);
        let mut step = cache.begin(id, n).unwrap();
        for layer in 0..LAYERS {
            step.attend(
                layer,
                TensorView::token_major(&q[..n * HQ * D], n, HQ, D).unwrap(),
                TensorView::token_major(&k[..n * H * D], n, H, D).unwrap(),
                TensorView::token_major(&v[..n * H * D], n, H, D).unwrap(),
                TensorViewMut::token_major(&mut out[..n * HQ * D], n, HQ, D).unwrap(),
            )
            .unwrap();
        }
        step.commit(n).unwrap();
        after(cache);
        done += n;
    }
}

/// What a prompt's rows took goes back when factors take their place.
#[cfg(feature = "lowrank")]
fn rows_give_way_to_factors() {
    use kvsieve::geometry::{Rotary, RotaryLayout};
    let layer = LayerShape::new(HQ, H, D).with_rotary(Rotary::new(D, 10_000.0, RotaryLayout::HalfSplit));
    let shape = ModelShape::uniform(LAYERS, layer).unwrap();
    // So many that what is freed is far more than the system's allocator keeps of a decomposition's work space, which is
    // some of the pieces below 32 MiB.
    let (tokens, chunk) = (64_000, 2000);
    let mut cache = KvCache::builder(shape).recipe("xkv(group=3,rebuilt=0)+k=f16+v=f16").build().unwrap();
    let id = cache.create_sequence();
    let rows: Vec<f32> = (0..chunk * H * D).map(|i| support::noise(i as u64)).collect();
    for _ in 0..tokens / chunk {
        let mut step = cache.begin(id, chunk).unwrap();
        for layer in 0..LAYERS {
            let view = || TensorView::token_major(&rows[..], chunk, H, D).unwrap();
            step.append(layer, view(), view()).unwrap();
        }
        step.commit(chunk).unwrap();
    }
    let (resident_before, rss_before) = (cache.memory().resident, rss());
    cache.end_prefill(id).unwrap();
    let (resident_after, rss_after) = (cache.memory().resident, rss());
    // Ranks of a quarter and a half of the features.
    let factors = 2 * (LAYERS / 3) * (tokens + 3 * H * D) * (144 + 288);
    let share = resident_after as f64 / factors as f64;
    assert!((1.0..1.05).contains(&share), "{resident_after} bytes resident, factors {factors}");
    let (freed, fell) = ((resident_before - resident_after) as f64, rss_before as f64 - rss_after as f64);
    println!(
        "xkv: {resident_before} to {resident_after} bytes; pages freed {freed:.3e}, RSS fell {fell:.3e}"
    );
    const KEPT: f64 = (64u32 << 20) as f64;
    assert!(freed > 2.5 * KEPT && fell >= freed - KEPT, "pages freed {freed:.3e}, RSS fell {fell:.3e}");
}

/// What streaming heads need not keep goes back; trimmed as the prompt comes in, they never hold it.
fn streaming_heads_give_back() {
    use kvsieve::profile::{Array, Part, Profile};
    let gates = (0..LAYERS * H).map(|i| support::noise(i as u64)).collect();
    let gates = Part::new("by hand").with("gates", Array::new(vec![LAYERS, H], gates).unwrap());
    let build = |recipe: &str| {
        let profile = Profile::new(&shape()).unwrap().with("duo", gates.clone());
        KvCache::builder(shape()).recipe(recipe).profile(profile).build().unwrap()
    };
    let (tokens, chunk, ends, streaming) = (4000, 500, 320, LAYERS * H / 2);

    let mut cache = build("duo+when=prefill");
    let id = cache.create_sequence();
    prefill(&mut cache, id, tokens, chunk, |_| ());
    let (resident_before, rss_before) = (cache.memory().resident, rss());
    cache.end_prefill(id).unwrap();
    let (resident_after, rss_after) = (cache.memory().resident, rss());
    let (freed, fell) = ((resident_before - resident_after) as f64, rss_before as f64 - rss_after as f64);
    println!(
        "duo: {resident_before} to {resident_after} bytes; pages freed {freed:.3e}, RSS fell {fell:.3e}"
    );
    assert!((fell / freed - 1.0).abs() <= 0.10, "duo: pages freed {freed:.3e}, RSS fell {fell:.3e}");
    let entry = cache.config().entry_bytes[0];
    drop(cache);

    let mut cache = build("duo");
    let id = cache.create_sequence();
    prefill(&mut cache, id, tokens, chunk, |_| ());
    cache.end_prefill(id).unwrap();
    let retrieving = LAYERS * H - streaming;
    let want = (retrieving * tokens + streaming * ends) * entry;
    let share = cache.memory().resident as f64 / want as f64;
    assert!((share - 1.0).abs() <= 0.03, "duo: {} bytes resident, {want} kept", cache.memory().resident);
    let tail = 64;
    let allowed = (retrieving * (tokens + tail) + streaming * (ends + chunk + tail)) * entry;
    let peak = cache.memory().peak;
    println!("duo: peak {peak} of {allowed} allowed");
    assert!(peak <= allowed, "duo: peak {peak} above {allowed}");
}

fn shape() -> ModelShape {
    ModelShape::uniform(LAYERS, LayerShape::new(HQ, H, D)).unwrap()
}

#[test]
fn memory_goes_back_and_the_peak_is_bounded() {
    let mut full = KvCache::builder(shape()).build().unwrap();
    let id = full.create_sequence();
    prefill(&mut full, id, 4000, 500, |_| ());
    let full_bytes = full.memory().resident;
    drop(full);
    for recipe in ["snapkv", "adakv"] {
        let mut cache =
            KvCache::builder(shape()).recipe(recipe).budget("25%".parse().unwrap()).build().unwrap();
        let id = cache.create_sequence();
        prefill(&mut cache, id, 4000, 500, |_| ());
        let (resident_before, rss_before) = (cache.memory().resident, rss());
        cache.end_prefill(id).unwrap();
        let (resident_after, rss_after) = (cache.memory().resident, rss());
        let share = resident_after as f64 / full_bytes as f64;
        assert!(share <= 0.27, "{recipe}: {resident_after} of {full_bytes} bytes resident: {share:.4}");
        let (freed, fell) = ((resident_before - resident_after) as f64, rss_before as f64 - rss_after as f64);
        println!("{recipe}: {share:.4} of full resident; pages freed {freed:.3e}, RSS fell {fell:.3e}");
        assert!((fell / freed - 1.0).abs() <= 0.10, "{recipe}: pages freed {freed:.3e}, RSS fell {fell:.3e}");
    }

    streaming_heads_give_back();

    #[cfg(feature = "lowrank")]
    rows_give_way_to_factors();

    // Peak of a chunked prefill: budget + chunk + tail, in bytes of that many entries per head.
    let (budget, chunk, tail) = (1024, 512, 64);
    let per_entry = {
        let cache = KvCache::builder(shape()).build().unwrap();
        cache.config().entry_bytes.iter().map(|b| b * H).sum::<usize>()
    };
    for recipe in ["streaming+when=chunk", "snapkv+when=chunk", "h2o+when=chunk"] {
        let mut cache =
            KvCache::builder(shape()).recipe(recipe).budget(Budget::Tokens(budget)).build().unwrap();
        let id = cache.create_sequence();
        prefill(&mut cache, id, 8000, chunk, |cache| {
            assert!(cache.stored(id, 0).unwrap().iter().all(|r| r.0 <= budget));
        });
        let allowed = (budget + chunk + tail) * per_entry;
        let peak = cache.memory().peak;
        println!("{recipe}: peak {peak} of {allowed} allowed");
        assert!(peak <= allowed, "{recipe}: peak {peak} above {allowed}");
    }
}
