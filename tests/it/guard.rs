//! Shadow mode: outputs stay exact while it runs, its numbers are those of the packed entries, and it does what it says
//! at its end.

use crate::support::*;
use kvsieve::cache::{Guard, RemoveMode};
use kvsieve::error::CacheError;
use kvsieve::geometry::Position;
use kvsieve::{Backend, Budget, Error, KvCache, SequenceId};
use std::sync::Arc;

fn build(recipe: &str, backend: &Arc<dyn Backend>) -> (KvCache, SequenceId) {
    let mut cache = KvCache::builder(small_model(2, 4, 2, 32))
        .recipe(recipe)
        .budget(Budget::Tokens(200))
        .shared_backend(Arc::clone(backend))
        .build()
        .unwrap();
    let id = cache.create_sequence();
    (cache, id)
}

fn bits(outs: &[Vec<f32>]) -> Vec<u32> {
    outs.iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn outputs_are_exact_until_it_ends_and_weak_heads_get_more_bits() {
    let recipe = "full+k=lm2+v=int8+layers=1(k=int8)+exact=f32(sinks=2,tail=8)";
    for backend in backends() {
        let (mut exact, plain) = build("full", &backend);
        let (mut cache, id) = build(recipe, &backend);
        cache.guard(id, Guard { tokens: 40, threshold: Some(0.05) }).unwrap();
        let mut next = 0;
        for n in [150u64, 30, 1, 1] {
            let tokens: Vec<u64> = (next..next + n).collect();
            next += n;
            assert_eq!(
                bits(&feed(&mut cache, id, &tokens, tokens.len())),
                bits(&feed(&mut exact, plain, &tokens, tokens.len())),
                "on {}",
                backend.name()
            );
        }
        // The first step met nothing packed.
        let report = cache.guard_report(id).unwrap().unwrap();
        assert_eq!((report.tokens, report.done), (32, false));
        assert_eq!(cache.stats(id).unwrap().total().packed, 0);
        let guarded = cache.memory().resident;
        for head in &report.heads {
            let coarse = head.layer == 0;
            // Two bits leave about 0.12 of the variance of normal numbers, and a little more of uniform ones.
            assert!(
                if coarse {
                    (0.05..0.3).contains(&head.key_error)
                } else {
                    (1e-7..1e-3).contains(&head.key_error)
                },
                "{head:?}"
            );
            assert!((1e-7..1e-3).contains(&head.value_error), "{head:?}");
            assert!(if coarse { head.output_error > 0.05 } else { head.output_error < 0.02 }, "{head:?}");
        }
        feed(&mut cache, id, &(182..192).collect::<Vec<_>>(), 10);
        let report = cache.guard_report(id).unwrap().unwrap();
        assert!(report.done && report.tokens == 42);
        for head in &report.heads {
            assert_eq!(head.upgraded.is_some(), head.layer == 0, "{head:?}");
        }
        assert_eq!(cache.config().storage, ["int8(center,hadamard)/f32", "int8/int8"]);
        let total = cache.stats(id).unwrap().total();
        assert_eq!(total.packed, 4 * 128, "packed at the end, with more bits");
        assert!(cache.memory().resident < guarded);
        let key = &entries(&cache, id, 0, 0)[60];
        let want = placed(Kind::Key, cache.shape().layer(0), 60, 0, 0, 60);
        let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
        assert!(distance(&key.key, &want) < 0.01, "eight bits, not two");
    }
}

#[test]
fn whatever_happens_to_entries_happens_to_the_shadow() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let recipe = "h2o+when=over(slack=20)+safe+exact=f32(sinks=2,tail=8)";
    let (mut cache, id) = build(recipe, &backend);
    cache.guard(id, Guard { tokens: 10_000, threshold: None }).unwrap();
    feed(&mut cache, id, &(0..190).collect::<Vec<_>>(), 190);
    feed(&mut cache, id, &(190..250).collect::<Vec<_>>(), 5);
    drop(cache.begin(id, 3).unwrap());
    let fork = cache.fork(id).unwrap();
    feed(&mut cache, fork, &[900], 1);
    assert!(cache.stats(fork).unwrap().total().packed > 0, "a fork is not guarded");
    cache.remove(id, Position(20)..Position(30), RemoveMode::Keep).unwrap();
    let error = cache.remove(id, Position(40)..Position(50), RemoveMode::Renumber).unwrap_err();
    assert!(error.to_string().contains("packed keys"), "{error}");
    cache.truncate(id, Position(192)).unwrap();
    for t in 192..300 {
        feed(&mut cache, id, &[t], 1);
    }
    assert!(cache.stats(id).unwrap().total().dropped > 0);
    // Rows of the shadow stand beside the same rows, or these errors would be of order one.
    for head in cache.guard_report(id).unwrap().unwrap().heads {
        assert!(head.key_error < 1e-3 && head.value_error < 1e-3 && head.output_error < 0.02, "{head:?}");
    }
    cache.end_guard(id).unwrap();
    assert!(cache.guard_report(id).unwrap().unwrap().done);
    cache.drop_sequence(id).unwrap();
    cache.drop_sequence(fork).unwrap();
    assert_eq!(cache.memory().resident, 0);
}

#[test]
fn what_cannot_be_guarded_says_why() {
    let backend: Arc<dyn Backend> = Arc::new(kvsieve::Cpu::default());
    let guard = Guard { tokens: 1, threshold: None };
    let why = |cache: &mut KvCache, id, guard| match cache.guard(id, guard).unwrap_err() {
        Error::Cache(CacheError::Unsupported { why, .. }) => why,
        other => panic!("{other}"),
    };
    let (mut cache, id) = build("full+k=f16", &backend);
    assert!(why(&mut cache, id, guard).contains("packs nothing"));
    assert_eq!(cache.guard_report(id).unwrap(), None);
    let (mut cache, id) = build("full+safe", &backend);
    assert!(why(&mut cache, id, Guard { tokens: 0, ..guard }).contains("0 tokens"));
    feed(&mut cache, id, &(0..400).collect::<Vec<_>>(), 400);
    assert!(why(&mut cache, id, guard).contains("1024 entries are packed already"));
    cache.drop_sequence(id).unwrap();
    assert!(cache.guard(id, guard).is_err());
}
