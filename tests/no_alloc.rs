//! The attend path allocates nothing once it is warm, counted by the allocator itself. A binary of its own,
//! because the allocator is the process's.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]
#![allow(unsafe_code, reason = "a counting allocator is an unsafe trait; it forwards every call unchanged")]

#[path = "it/support.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the other binary")]
mod support;

use kvsieve::view::{TensorView, TensorViewMut};
use kvsieve::{Cpu, KvCache};
use std::alloc::{GlobalAlloc, Layout, System};
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

#[test]
fn the_attend_path_allocates_nothing_when_warm() {
    let (q, k) = (vec![0.3f32; 8 * 64], vec![0.2f32; 2 * 64]);
    let mut out = vec![0.0f32; 8 * 64];
    // Large enough for the parallel path; pages of 64, so that 62 steps after a boundary cross none.
    for (threads, recipe) in
        [(1, "full"), (2, "full"), (2, "full+k=f16+v=f16"), (2, "h2o+when=over(slack=1000)")]
    {
        let mut cache = KvCache::builder(support::small_model(4, 8, 2, 64))
            .recipe(recipe)
            .budget(kvsieve::Budget::Tokens(100_000))
            .backend(Cpu::with_threads(threads).unwrap())
            .build()
            .unwrap();
        let id = cache.create_sequence();
        let prompt = 64 * 64;
        let (pq, pk) = (vec![0.3f32; 512 * 8 * 64], vec![0.2f32; 512 * 2 * 64]);
        let mut pout = vec![0.0f32; 512 * 8 * 64];
        for _ in 0..prompt / 512 {
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
        let warm: usize = (0..4).map(|_| step(&mut cache, id, &q, &k, &mut out)).sum();
        let counts: Vec<usize> = (0..56).map(|_| step(&mut cache, id, &q, &k, &mut out)).collect();
        println!("{recipe} on {threads} threads: {warm} while warming, then {counts:?}");
        let total: usize = counts.iter().sum();
        assert_eq!(total, 0, "{recipe} on {threads} threads: {counts:?}");
    }
}
