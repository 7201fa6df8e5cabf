//! What the allocator itself counts: the decode path allocates nothing once it is warm, and packed entries take the bits
//! that are claimed with everything that is allocated. A binary of its own with one test, because the allocator is the
//! process's.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "tests")]
#![allow(unsafe_code, reason = "a counting allocator is an unsafe trait; it forwards every call unchanged")]

#[path = "it/support.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the other binary")]
mod support;

use kvsieve::device::{Encoding, Format, HeadRows, Packing, PageLayout, Pool, Segment};
use kvsieve::geometry::{LayerShape, ModelShape, SinkEntries};
use kvsieve::kernel::attend::{AttendLane, Workspace};
use kvsieve::kernel::code_scores::{CodeArgs, CodeLayout};
use kvsieve::kernel::dot_scores::DotArgs;
use kvsieve::kernel::linear::{Activation, LinearArgs};
use kvsieve::kernel::{AttentionParams, Spans};
use kvsieve::testing::cache::{CacheSpec, codes};
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Backend, Budget, Cpu, KvCache};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the packed entries here are.
const INT4: Packing = Packing::new(Format::Int4);

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Those of this thread: threads of pools that were used before end when they like, and allocate in doing so.
    static OWN: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
    OWN.with(|own| own.set(own.get() + 1));
}

/// Bytes on the heap.
static HEAP: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        HEAP.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HEAP.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        HEAP.fetch_add(new_size, Ordering::SeqCst);
        HEAP.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One decode step of all layers; returns the allocations of the attend calls alone.
fn step(cache: &mut KvCache, id: kvsieve::SequenceId, q: &[f32], k: &[f32], out: &mut [f32]) -> usize {
    let layers = cache.shape().layers();
    let mut step = cache.begin(id, 1).unwrap();
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    for layer in 0..layers {
        step.attend(
            layer,
            TensorView::token_major(q, 1, 8, 64).unwrap(),
            TensorView::token_major(k, 1, 2, 64).unwrap(),
            TensorView::token_major(k, 1, 2, 64).unwrap(),
            TensorViewMut::token_major(&mut *out, 1, 8, 64).unwrap(),
        )
        .unwrap();
    }
    let count = ALLOCATIONS.load(Ordering::SeqCst) - before;
    step.commit(1).unwrap();
    count
}

/// Prefills to a page boundary, warms up, and counts the allocations of 36 decode steps that cross none. An index grows
/// while it warms up, and then again: what steps reuse doubles when it grows.
fn decode_allocations(recipe: &str, backend: Cpu) -> Vec<usize> {
    allocations_of(support::small_model(4, 8, 2, 64), recipe, backend)
}

/// The same for a model of four layers with 8 query heads, 2 KV heads and dimension 64.
fn allocations_of(shape: ModelShape, recipe: &str, backend: Cpu) -> Vec<usize> {
    let (q, k) = (vec![0.3f32; 8 * 64], vec![0.2f32; 2 * 64]);
    let mut out = vec![0.0f32; 8 * 64];
    let mut cache = KvCache::builder(shape)
        .recipe(recipe)
        .budget(Budget::Tokens(if recipe.starts_with("h2o") { 100_000 } else { 600 }))
        .backend(backend)
        .build()
        .unwrap();
    let id = cache.create_sequence();
    let (pq, pk) = (vec![0.3f32; 512 * 8 * 64], vec![0.2f32; 512 * 2 * 64]);
    let mut pout = vec![0.0f32; 512 * 8 * 64];
    // Large enough for the parallel path.
    for _ in 0..8 {
        let mut s = cache.begin(id, 512).unwrap();
        for layer in 0..4 {
            s.attend(
                layer,
                TensorView::token_major(&pq[..], 512, 8, 64).unwrap(),
                TensorView::token_major(&pk[..], 512, 2, 64).unwrap(),
                TensorView::token_major(&pk[..], 512, 2, 64).unwrap(),
                TensorViewMut::token_major(&mut pout[..], 512, 8, 64).unwrap(),
            )
            .unwrap();
        }
        s.commit(512).unwrap();
    }
    for _ in 0..20 {
        step(&mut cache, id, &q, &k, &mut out);
    }
    (0..36).map(|_| step(&mut cache, id, &q, &k, &mut out)).collect()
}

fn the_attend_path_allocates_nothing_when_warm() {
    let recipes = [
        "full",
        "full+k=f16+v=f16",
        "h2o+when=over(slack=1000)",
        "quest(dense=1)",
        "pages(bounds=yes)+k=int8",
        #[cfg(feature = "lowrank")]
        "xkv(group=2,rebuilt=8192)",
        #[cfg(feature = "lowrank")]
        "xkv(group=2)+index=quest(dense=0)+k=f16+v=f16",
        "auto",
        "lserve",
    ];
    for recipe in recipes {
        let counts = decode_allocations(recipe, Cpu::with_pool(Pool::current()));
        assert_eq!(counts.iter().sum::<usize>(), 0, "{recipe} on the calling thread: {counts:?}");
    }
    // Learned sinks are a part of their own, and a merge. (With mass, the kernel that sums it takes a buffer.)
    let mut layer = support::small_model(1, 8, 2, 64).layer(0).clone();
    layer.sink_entries = Some(SinkEntries::one(Some(vec![0.1; 2 * 64]), None));
    let sinks = ModelShape::uniform(4, layer).unwrap();
    for recipe in ["full", "quest(dense=1)"] {
        let counts = allocations_of(sinks.clone(), recipe, Cpu::with_pool(Pool::current()));
        assert_eq!(counts.iter().sum::<usize>(), 0, "{recipe} with sinks: {counts:?}");
    }
    // A host that decodes on a thread of its own pool: nothing either.
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    for recipe in recipes {
        let backend = Cpu::with_pool(Pool::host(Arc::clone(&pool)));
        let counts = pool.install(|| decode_allocations(recipe, backend));
        assert_eq!(counts.iter().sum::<usize>(), 0, "{recipe} inside the pool: {counts:?}");
    }
    // From outside, rayon's own queue takes a block every few dozen regions; nothing of ours joins it.
    let counts = decode_allocations("full", Cpu::with_threads(2).unwrap());
    let regions = 36 * 4;
    assert!(counts.iter().sum::<usize>() <= regions / 31 + 1, "from outside the pool: {counts:?}");
}

fn dot_scores_allocate_nothing_when_warm() {
    let cpu = Cpu::with_pool(Pool::current());
    let shape = LayerShape::new(8, 2, 64);
    let layout = |k: Encoding| Arc::new(PageLayout::new(&shape, 128, k, k, false, 0));
    let head = |layout: Arc<PageLayout>| {
        let pages = (0..32).map(|_| Arc::new(cpu.allocate(&layout).unwrap())).collect();
        HeadRows::new(vec![Segment { pages, rows: 4096, ..Segment::new(layout) }])
    };
    let heads = [head(layout(Packing::new(Format::Int8).into())), head(layout(DType::F16.into()))];
    let spans: Vec<Spans> =
        (0..2).map(|h| (h..32).map(|i| 128 * i..128 * i + 20 + 30 * h).collect()).collect();
    let (queries, mut out) = (vec![0.3f32; 8 * 64], vec![0.0f32; 8 * 4096]);
    let mut workspace = Workspace::default();
    let mut counts = [0; 4];
    for count in &mut counts {
        let before = OWN.get();
        for spans in [None, Some(&spans[..])] {
            let rows = spans.map_or(2 * 4096, |spans| spans.iter().map(Spans::rows).sum());
            let out = &mut out[..4 * rows];
            let mut args = DotArgs { heads: &heads, queries: &queries, tokens: 1, spans, out };
            cpu.dot_scores(&AttentionParams::of(&shape), &mut args, &mut workspace).unwrap();
        }
        *count = OWN.get() - before;
    }
    assert_eq!(counts[1..], [0; 3], "{counts:?}");
}

fn code_scores_allocate_nothing_when_warm() {
    let cpu = Cpu::with_pool(Pool::current());
    for (m, bits, levels) in [(32, 4, 16), (300, 4, 16), (2, 8, 64)] {
        let layout = CodeLayout { codes: m, bits };
        let heads = codes(&cpu, 1, layout, &[4096, 1000], 128).unwrap();
        let (tables, mut out) = (vec![0.3f32; 8 * m * levels], vec![0.0f32; 4 * 5096]);
        let mut workspace = Workspace::default();
        let mut counts = [0; 4];
        for count in &mut counts {
            let before = OWN.get();
            let (heads, tables, out) = (&heads, &tables, &mut out);
            let mut args = CodeArgs { heads, layout, levels, tables, group: 4, tokens: 1, spans: None, out };
            cpu.code_scores(&mut args, &mut workspace).unwrap();
            *count = OWN.get() - before;
        }
        assert_eq!(counts[1..], [0; 3], "{layout:?}: {counts:?}");
    }
}

/// Attention over chosen entries: lone ones, which are copied, runs, and packed ones.
fn layers_allocate_nothing() {
    let cpu = Cpu::with_pool(Pool::current());
    for (rows, inputs, outputs) in [(1, 960, 1024), (40, 1500, 100)] {
        let (x, weight) = (vec![0.3f32; rows * inputs], vec![0.1f32; outputs * inputs]);
        let mut out = vec![0.0f32; rows * outputs];
        let before = OWN.get();
        let (x, weight, activation, out) = (&x, &weight, Activation::Gelu, &mut out);
        cpu.linear(&mut LinearArgs { x, weight, bias: None, inputs, outputs, activation, out }).unwrap();
        assert_eq!(OWN.get() - before, 0, "{rows} rows");
    }
}

fn chosen_entries_allocate_nothing_when_warm() {
    let params = AttentionParams {
        group: 4,
        d_k: 64,
        d_v: 64,
        scale: 0.1,
        softcap: None,
        window: None,
        sink_logits: None,
    };
    for (run, stored) in [(1, Encoding::from(DType::F16)), (20, DType::F16.into()), (3, INT4.into())] {
        let cpu = Cpu::with_pool(Pool::current());
        let heads = CacheSpec::f32(1, 64, &[6000, 3000], 64).typed(stored, stored).build(&cpu).unwrap();
        let chosen = |rows: usize| (0..rows - run).step_by(2 * run).map(|slot| slot..slot + run).collect();
        let spans: Vec<Spans> = vec![chosen(6000), chosen(3000)];
        let (queries, mut out, mut lse) = (vec![0.3f32; 8 * 64], vec![0.0f32; 8 * 64], vec![0.0f32; 8]);
        let mut workspace = Workspace::default();
        let mut call = || {
            let lane = AttendLane {
                heads: &heads,
                queries: &queries,
                positions: &[6000],
                spans: Some(&spans),
                out: &mut out,
                lse: &mut lse,
                ..AttendLane::default()
            };
            let before = OWN.get();
            cpu.attend(&params, &mut [lane], &mut workspace).unwrap();
            OWN.get() - before
        };
        call();
        assert_eq!((0..4).map(|_| call()).sum::<usize>(), 0, "runs of {run}, {stored}");
    }
}

/// Bits per stored element of 1,024 tokens on the geometry of SmolLM2-135M: as held, and as the cache counts.
fn bits(recipe: &str, budget: usize) -> (f64, f64) {
    let (layers, h, d, chunk) = (30, 3, 64, 128);
    let rows: Vec<f32> = (0..chunk * h * d).map(|i| support::noise_normal(i as u64)).collect();
    let before = HEAP.load(Ordering::SeqCst);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_pool(Pool::current()));
    let mut cache = KvCache::builder(ModelShape::uniform(layers, LayerShape::new(9, h, d)).unwrap())
        .recipe(recipe)
        .budget(Budget::Tokens(budget))
        .shared_backend(Arc::clone(&backend))
        .build()
        .unwrap();
    let id = cache.create_sequence();
    for _ in 0..1024 / chunk {
        let mut step = cache.begin(id, chunk).unwrap();
        for layer in 0..layers {
            let view = || TensorView::token_major(&rows[..], chunk, h, d).unwrap();
            step.append(layer, view(), view()).unwrap();
        }
        step.commit(chunk).unwrap();
    }
    cache.end_prefill(id).unwrap();
    // Buffers that steps reuse hold no entries, and do not grow with the context.
    cache.shrink_scratch();
    let held = HEAP.load(Ordering::SeqCst) - before + backend.memory().resident;
    let elements = (cache.stats(id).unwrap().total().entries * 2 * d) as f64;
    (8.0 * held as f64 / elements, 8.0 * cache.memory().resident as f64 / elements)
}

fn packed_entries_take_the_bits_that_are_claimed() {
    for (recipe, budget, most) in [
        ("full+k=lm4+v=lm4", 1, 4.5),
        ("full+k=lm4+v=lm4(hadamard)", 1, 4.5),
        // Every head keeps others, so that each has positions of its own: 0.25 bits.
        ("random+k=lm4+v=lm4", 512, 4.8),
    ] {
        let (held, counted) = bits(&format!("{recipe}+exact=f16(sinks=0,tail=0)"), budget);
        println!("{recipe}: {held:.3} bits per element held, {counted:.3} counted");
        assert!(held <= most, "{recipe}: {held} bits per element");
        // Not counted are the lists of pages, and what a cache has before the first entry.
        assert!((1.0..1.02).contains(&(held / counted)), "{recipe}: {held} held, {counted} counted");
    }
}

#[test]
fn the_allocator_agrees() {
    the_attend_path_allocates_nothing_when_warm();
    dot_scores_allocate_nothing_when_warm();
    code_scores_allocate_nothing_when_warm();
    layers_allocate_nothing();
    chosen_entries_allocate_nothing_when_warm();
    packed_entries_take_the_bits_that_are_claimed();
}
