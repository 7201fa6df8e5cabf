//! The attend path allocates nothing once it is warm, counted by the allocator itself. A binary of its own,
//! because the allocator is the process's.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "tests")]
#![allow(unsafe_code, reason = "a counting allocator is an unsafe trait; it forwards every call unchanged")]

#[path = "it/support.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the other binary")]
mod support;

use kvsieve::device::Pool;
use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Cpu, KvCache};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
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

/// Prefills to a page boundary, warms up, and counts the allocations of 56 decode steps that cross none.
fn decode_allocations(recipe: &str, backend: Cpu) -> Vec<usize> {
    let (q, k) = (vec![0.3f32; 8 * 64], vec![0.2f32; 2 * 64]);
    let mut out = vec![0.0f32; 8 * 64];
    let mut cache = KvCache::builder(support::small_model(4, 8, 2, 64))
        .recipe(recipe)
        .budget(kvsieve::Budget::Tokens(100_000))
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
    for _ in 0..4 {
        step(&mut cache, id, &q, &k, &mut out);
    }
    (0..56).map(|_| step(&mut cache, id, &q, &k, &mut out)).collect()
}

#[test]
fn the_attend_path_allocates_nothing_when_warm() {
    let recipes = ["full", "full+k=f16+v=f16", "h2o+when=over(slack=1000)"];
    for recipe in recipes {
        let counts = decode_allocations(recipe, Cpu::with_pool(Pool::current()));
        assert_eq!(counts.iter().sum::<usize>(), 0, "{recipe} on the calling thread: {counts:?}");
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
    let regions = 56 * 4;
    assert!(counts.iter().sum::<usize>() <= regions / 31 + 1, "from outside the pool: {counts:?}");
}
