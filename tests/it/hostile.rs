//! Wrong input gives a typed error that names the numbers, and the cache is as before.

use crate::support::*;
use kvsieve::error::{CacheError, ShapeError, ViewError};
use kvsieve::geometry::{LayerShape, ModelShape, Rotary, RotaryLayout, RotaryScaling};
use kvsieve::view::{Dims, Strides, TensorView, TensorViewMut};
use kvsieve::{Error, KvCache};

fn cache() -> (KvCache, kvsieve::SequenceId) {
    let mut cache = KvCache::builder(small_model(2, 4, 2, 8)).recipe("full+k=f16").build().unwrap();
    let id = cache.create_sequence();
    feed(&mut cache, id, &[1, 2, 3], 3);
    (cache, id)
}

#[allow(clippy::too_many_arguments, reason = "one call, as flat as it is")]
/// Runs one fused call with the given tensors and returns its error.
fn attend(
    cache: &mut KvCache,
    id: kvsieve::SequenceId,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: (usize, usize),
    dim: usize,
    n: usize,
) -> Error {
    let mut out = vec![0.0; n * heads.0 * dim];
    let mut step = cache.begin(id, 2).unwrap();
    step.attend(
        0,
        TensorView::token_major(q, n, heads.0, dim).unwrap(),
        TensorView::token_major(k, n, heads.1, dim).unwrap(),
        TensorView::token_major(v, n, heads.1, dim).unwrap(),
        TensorViewMut::token_major(&mut out[..], n, heads.0, dim).unwrap(),
    )
    .unwrap_err()
}

#[test]
fn tensors_of_the_wrong_extents_or_values_store_nothing() {
    let (mut cache, id) = cache();
    let good = |len: usize| vec![0.5f32; len];
    let stored = cache.stored(id, 0).unwrap();
    for (heads, dim, n) in [((4, 2), 8, 3), ((4, 1), 8, 2), ((2, 2), 8, 2), ((4, 2), 7, 2)] {
        let error = attend(
            &mut cache,
            id,
            &good(n * heads.0 * dim),
            &good(n * heads.1 * dim),
            &good(n * heads.1 * dim),
            heads,
            dim,
            n,
        );
        assert!(matches!(error, Error::Cache(CacheError::Extents { layer: 0, .. })), "{error}");
        assert!(error.to_string().contains("cache was built for"), "{error}");
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for tensor in ["q", "k", "v"] {
            let (mut q, mut k, mut v) = (good(64), good(32), good(32));
            // Token 1, head 1, dimension 3.
            match tensor {
                "q" => q[32 + 8 + 3] = bad,
                "k" => k[16 + 8 + 3] = bad,
                _ => v[16 + 8 + 3] = bad,
            }
            let error = attend(&mut cache, id, &q, &k, &v, (4, 2), 8, 2);
            let Error::Cache(CacheError::NonFinite { tensor: t, token: 1, head: 1, dim: 3, .. }) = error
            else {
                panic!("{tensor} {bad}: {error}")
            };
            assert_eq!(t, tensor);
        }
    }
    let mut k = good(32);
    k[5] = 70_000.0;
    let error = attend(&mut cache, id, &good(64), &k, &good(32), (4, 2), 8, 2);
    assert!(matches!(error, Error::Cache(CacheError::Range { tensor: "k", dim: 5, .. })), "{error}");
    assert!(error.to_string().contains("k=bf16"), "{error}");
    assert_eq!(cache.stored(id, 0).unwrap(), stored);
}

#[test]
fn calls_out_of_order_are_refused() {
    let (mut cache, id) = cache();
    assert!(cache.begin(id, 0).is_err());
    assert!(matches!(
        cache.begin_batch(&[(id, 1), (id, 1)]).unwrap_err(),
        Error::Cache(CacheError::DuplicateSequence(_))
    ));
    assert!(matches!(
        cache.begin(id, usize::MAX).unwrap_err(),
        Error::Cache(CacheError::PositionOverflow { .. })
    ));
    let k = [0.5f32; 16];
    let mut out = [0.0f32; 32];
    let q = [0.5f32; 32];
    let view = |d: &'static str| {
        TensorView::token_major(if d == "q" { &q[..] } else { &k[..] }, 1, if d == "q" { 4 } else { 2 }, 8)
            .unwrap()
    };
    {
        let mut step = cache.begin(id, 1).unwrap();
        let early =
            step.attend_stored(0, view("q"), TensorViewMut::token_major(&mut out[..], 1, 4, 8).unwrap());
        assert!(matches!(early.unwrap_err(), Error::Cache(CacheError::Order { .. })));
        step.append(0, view("k"), view("k")).unwrap();
        assert!(matches!(
            step.append(0, view("k"), view("k")).unwrap_err(),
            Error::Cache(CacheError::Order { .. })
        ));
        assert!(matches!(
            step.append(9, view("k"), view("k")).unwrap_err(),
            Error::Cache(CacheError::NoLayer { layer: 9, layers: 2 })
        ));
        let error = step.commit(1).unwrap_err();
        assert!(matches!(error, Error::Cache(CacheError::Incomplete { missing: 1, .. })), "{error}");
    }
    assert_eq!(cache.stored(id, 0).unwrap()[0].0, 3, "the failed commit rolled back");
    let step = cache.begin(id, 1).unwrap();
    assert!(matches!(
        step.commit(2).unwrap_err(),
        Error::Cache(CacheError::TooManyAccepted { .. } | CacheError::Incomplete { .. })
    ));
}

#[test]
fn long_steps_of_scored_recipes_cannot_be_accepted_in_part() {
    let mut cache = KvCache::builder(small_model(1, 2, 1, 4))
        .recipe("h2o")
        .budget(kvsieve::Budget::Tokens(1000))
        .build()
        .unwrap();
    let id = cache.create_sequence();
    let tokens: Vec<u64> = (0..80).collect();
    let shape = cache.shape().clone();
    let mut step = cache.begin(id, 80).unwrap();
    feed_layer(&mut step, &shape, 0, &tokens, 0);
    assert!(matches!(
        step.commit(70).unwrap_err(),
        Error::Cache(CacheError::PartialCommit { limit: 64, .. })
    ));
    assert_eq!(cache.stored(id, 0).unwrap()[0].0, 0);
}

#[test]
fn shapes_are_checked() {
    let bad = |change: fn(&mut LayerShape)| {
        let mut layer = LayerShape::new(4, 2, 8);
        change(&mut layer);
        let error = ModelShape::new(vec![LayerShape::new(4, 2, 8), layer]).unwrap_err();
        let ShapeError::Geometry { layer, .. } = &error else { panic!("{error}") };
        assert_eq!(*layer, 1);
        error.to_string()
    };
    bad(|l| l.kv_heads = 3);
    bad(|l| l.kv_heads = 0);
    bad(|l| l.d_k = 0);
    bad(|l| l.d_v = 100_000);
    bad(|l| l.scale = f32::NAN);
    bad(|l| l.softcap = Some(-1.0));
    bad(|l| l.window = Some(0));
    bad(|l| l.sink_logits = Some(vec![0.0; 3]));
    bad(|l| l.sink_logits = Some(vec![f32::NAN; 4]));
    bad(|l| l.shared_with = Some(1));
    bad(|l| l.rotary = Some(Rotary::new(7, 1e4, RotaryLayout::Interleaved)));
    bad(|l| l.rotary = Some(Rotary::new(16, 1e4, RotaryLayout::Interleaved)));
    bad(|l| l.rotary = Some(Rotary::new(8, 0.0, RotaryLayout::Interleaved)));
    bad(|l| {
        l.rotary = Some(
            Rotary::new(8, 1e4, RotaryLayout::HalfSplit).with_scaling(RotaryScaling::Factors(vec![1.0; 3])),
        );
    });
    bad(|l| {
        l.rotary = Some(
            Rotary::new(8, 1e4, RotaryLayout::HalfSplit).with_scaling(RotaryScaling::Linear { factor: 0.0 }),
        );
    });
    assert!(ModelShape::new(vec![]).is_err());
}

#[test]
fn views_never_reach_outside_their_slice() {
    let data = [0.0f32; 24];
    let dims = Dims { tokens: 2, heads: 3, dim: 4 };
    assert!(TensorView::new(&data[..], dims, Strides { token: 12, head: 4, dim: 1 }).is_ok());
    for strides in [
        Strides { token: 13, head: 4, dim: 1 },
        Strides { token: 12, head: 5, dim: 1 },
        Strides { token: 12, head: 4, dim: 2 },
        Strides { token: usize::MAX, head: 4, dim: 1 },
    ] {
        assert!(matches!(
            TensorView::new(&data[..], dims, strides).unwrap_err(),
            ViewError::OutOfBounds { .. }
        ));
    }
    let mut out = [0.0f32; 24];
    let overlapping = TensorViewMut::new(&mut out[..], dims, Strides { token: 0, head: 4, dim: 1 });
    assert!(matches!(overlapping.unwrap_err(), ViewError::Overlapping { .. }));
    // Transposed: dimension outermost.
    let transposed: Vec<f32> = (0..24).map(|x| x as f32).collect();
    let view = TensorView::new(&transposed[..], dims, Strides { token: 3, head: 1, dim: 6 }).unwrap();
    let mut row = [0.0; 4];
    view.read_row(1, 2, &mut row);
    assert_eq!(row, [5.0, 11.0, 17.0, 23.0]);
}
