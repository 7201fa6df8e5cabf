//! Indexes: what they read is what a naive implementation reads, what they say of the rest is true, and everything that
//! happens to a sequence happens to its index.

mod aware;
mod codes;
mod naive;
mod refined;
mod trace;

use crate::support::{Kind, backends, distance, entries, feed, placed, small_model};
use kvsieve::backend::{Backend, Cpu};
use kvsieve::cache::RemoveMode;
use kvsieve::geometry::{LayerShape, ModelShape, Position, Slot};
use kvsieve::index::{ReadRule, Tail};
use kvsieve::policy::registry::{Build, Registry};
use kvsieve::recipe::Recipe;
use kvsieve::testing::Random;
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};
use naive::{Naive, Row, dot, naive, units};
use std::sync::Arc;

/// Tokens of the prompts.
const PROMPT: u64 = 300;

/// Entries a step may read.
const BUDGET: usize = 130;

fn model() -> ModelShape {
    small_model(2, 6, 2, 16)
}

/// Every built-in index by its name alone.
fn names() -> Vec<String> {
    let registry = Registry::builtin();
    let indexes = registry.iter().filter(|e| matches!(e.build, Build::Index { .. }));
    indexes.map(|e| e.name.to_owned()).collect()
}

/// Every index with options that make it choose among the few hundred entries of a test, in `f32` and otherwise.
fn recipes() -> Vec<String> {
    let mut recipes = Vec::new();
    for store in ["f32", "f16", "int8", "int4"] {
        for (name, own) in [
            ("pages", "page=8,recent=20,tail=estimate"),
            ("pages", "page=8,sinks=0,recent=20,tail=ignore,group=max,bounds=yes"),
            ("quest", "page=8,dense=0"),
            ("quest", "page=8,dense=1,sinks=3,group=sum,tail=estimate"),
            ("lserve", "page=16,logical=4,recent=20,every=1"),
            ("auto", "size=4,segment=64,update=16,recent=20,pieces=0"),
            (
                "auto",
                "size=8,segment=128,update=16,recent=20,rank=unit,group=logit,tail=ignore,correct=no,pieces=0",
            ),
            ("clusterkv", "size=10,segment=300,update=16,rounds=5,recent=20,dense=0"),
            ("retroinfer", "size=8,segment=64,update=16,recent=20"),
            ("squeezed", "size=6,segment=64,update=16,recent=20,window=30,cap=1.5"),
            ("squeezed", "size=4,segment=128,update=16,recent=20,levels=2,fan=4,widen=2,cap=2,coarse=as"),
            (
                "squeezed",
                "size=4,segment=128,update=16,recent=20,levels=2,fan=4,widen=3,cap=2,group=max,coarse=as",
            ),
        ] {
            let own = own.replace("coarse=as", &format!("coarse={store}"));
            recipes.push(format!("{name}({own},store={store},min_context=0)"));
        }
    }
    for group in ["sum", "max", "logit", "mean", "union"] {
        recipes.push(format!("pages(page=8,recent=20,store=f32,group={group},min_context=0)"));
    }
    for own in ["store=f32,group=max,outliers=2", "store=int8,tail=estimate,outliers=40"] {
        recipes.push(format!("pages(page=8,recent=20,{own},min_context=0)"));
    }
    // Ranks among three hundred entries are too near one another to hold codes to.
    for group in ["sum", "max", "logit", "mean"] {
        recipes
            .push(format!("pq(pieces=8,train=128,rounds=5,sinks=4,recent=20,group={group},min_context=0)"));
    }
    for own in ["", ",rotary=windowed,levels=200", ",aware=no", ",rotary=windowed,group=sum,distance=100"] {
        recipes.push(format!("a2ats(train=240,rounds=5,sinks=4,recent=20{own},min_context=0)"));
    }
    recipes.push("pq(pieces=8,train=128,rounds=5,sinks=4,recent=20,aware=no,min_context=0)".to_owned());
    assert!(
        names().iter().all(|name| recipes.iter().any(|r| r.starts_with(name))),
        "an index has no case here"
    );
    recipes
}

/// The same and indexes of entries within units, for tests that do not ask what is best.
fn all_recipes_for(backend: &dyn Backend) -> Vec<String> {
    let coded = [
        "auto(size=4,segment=64,update=16,recent=20,pieces=8,min_context=0)",
        "auto(size=8,segment=128,update=16,recent=20,pieces=4,group=union,tail=ignore,min_context=0)",
    ];
    let mut recipes = recipes_for(backend);
    recipes.extend(coded.map(str::to_owned));
    recipes
}

/// The same, or a third of them on a device that emulates another: every index and every type still comes.
fn recipes_for(backend: &dyn Backend) -> Vec<String> {
    recipes().into_iter().step_by(if backend.name() == "gpu" { 3 } else { 1 }).collect()
}

/// A cache whose sequence has read a prompt in some chunks.
fn prompted(recipe: &str, backend: &Arc<dyn Backend>, chunks: &[u64]) -> (KvCache, SequenceId) {
    prompted_within(BUDGET, recipe, backend, chunks)
}

fn prompted_within(
    budget: usize,
    recipe: &str,
    backend: &Arc<dyn Backend>,
    chunks: &[u64],
) -> (KvCache, SequenceId) {
    let builder = KvCache::builder(model()).recipe(recipe).budget(Budget::Tokens(budget));
    let mut cache = builder.shared_backend(Arc::clone(backend)).page_entries(32).build().unwrap();
    let id = cache.create_sequence();
    let mut next = 0;
    for &chunk in chunks {
        let tokens: Vec<u64> = (next..next + chunk).collect();
        feed(&mut cache, id, &tokens, tokens.len());
        next += chunk;
    }
    cache.end_prefill(id).unwrap();
    (cache, id)
}

/// The query rows that share a KV head, of tokens at consecutive positions.
fn queries(shape: &LayerShape, layer: usize, head: usize, tokens: &[(u64, i32)]) -> Vec<(Vec<f32>, i32)> {
    let group = shape.group();
    let heads = head * group..(head + 1) * group;
    let all = heads.flat_map(|h| {
        tokens.iter().map(move |&(token, at)| (placed(Kind::Query, shape, token, layer, h, at), at))
    });
    all.collect()
}

/// The argument a recipe gives a name.
fn argument<'a>(recipe: &'a str, name: &str) -> Option<&'a str> {
    let at = recipe.find(&format!("{name}="))? + name.len() + 1;
    recipe[at..].split([',', ')']).next()
}

/// Entries of a KV head that a step may read.
fn most(recipe: &str) -> usize {
    (BUDGET as f64 * argument(recipe, "cap").map_or(1.0, |cap| cap.parse().unwrap())) as usize
}

/// What is read of a KV head is what is always read and, within the budget, the best units: no unit that was left has a
/// score more than `tolerance` above one that was chosen.
#[track_caller]
fn check_choice(what: &str, naive: &Naive<'_>, rows: &[Row], slots: &[Slot], tolerance: f64) {
    let read = |slot: usize| slots.binary_search(&Slot(slot as u32)).is_ok();
    let all = 0..naive.entries.len();
    assert!(all.clone().all(|s| naive.unit_of(s).is_some() || read(s)), "{what}: always");
    let largest = naive.units.iter().map(Vec::len).max().unwrap_or(0) * naive.rule.fold;
    let fits = slots.len() <= most(what) && (slots.len() + largest > BUDGET || naive.thresholds.is_some());
    assert!(fits, "{what}: {} entries", slots.len());
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for (score, group) in naive.ranking(rows) {
        let chosen = read(naive.units[group.start][0]);
        for slot in group.flat_map(|unit| naive.units[unit].clone()) {
            assert_eq!(read(slot), chosen, "{what}: slot {slot} of a group");
        }
        *(if chosen { &mut least } else { &mut most }) =
            if chosen { least.min(score) } else { most.max(score) };
    }
    assert!(least > most - tolerance, "{what}: {least} chosen, {most} not");
}

#[test]
fn what_is_chosen_is_what_a_naive_implementation_chooses() {
    for backend in backends() {
        let scalar = backend.name() == "reference";
        // Codes of whole keys, of which there are few here, are held to codewords in `aware`.
        for recipe in recipes_for(&*backend).into_iter().filter(|r| !r.starts_with("a2ats")) {
            // Rounded summaries may exchange units whose scores are closer than the rounding.
            let tolerance = match (argument(&recipe, "store"), recipe.starts_with("pages")) {
                (Some("f32"), _) => 2e-4,
                (Some("f16"), _) => 0.02,
                (Some("int8"), true) => 0.05,
                (Some("int8"), false) => 0.2,
                (_, true) => 1.0,
                (_, false) => 2.5,
            };
            let (mut cache, id) = prompted(&recipe, &backend, &[200, PROMPT - 200]);
            for tokens in if scalar { &[1][..] } else { &[1, 3] } {
                let asked: Vec<(u64, i32)> =
                    (0..*tokens).map(|i| (900 + i, (PROMPT - tokens + i) as i32)).collect();
                let layer = 1;
                let shape = cache.shape().layer(layer).clone();
                let rows: Vec<f32> = asked
                    .iter()
                    .flat_map(|&(t, at)| (0..6).map(move |h| (t, at, h)))
                    .flat_map(|(t, at, h)| placed(Kind::Query, &shape, t, layer, h, at))
                    .collect();
                let view = TensorView::token_major(&rows[..], asked.len(), 6, 16).unwrap();
                let selection = cache.choose(id, layer, view).unwrap();
                for head in 0..2 {
                    let all = entries(&cache, id, layer, head);
                    let units = units(&cache, id, layer, head);
                    let naive = naive((&cache, id), (layer, head), &all, &units);
                    let rows: Vec<Row> = queries(&shape, layer, head, &asked)
                        .iter()
                        .map(|(query, at)| naive.row(query, *at))
                        .collect();
                    let slots = &selection.slots[selection.offsets[head]..selection.offsets[head + 1]];
                    let what = format!("{}: {recipe}", backend.name());
                    check_choice(&what, &naive, &rows, slots, tolerance);
                }
            }
        }
    }
}

#[test]
fn what_is_read_is_attention_over_it_and_the_means_of_the_rest() {
    for backend in backends() {
        for recipe in recipes_for(&*backend).iter().filter(|r| argument(r, "store") == Some("f32")) {
            let (mut cache, id) = prompted(recipe, &backend, &[PROMPT]);
            let dense = Recipe::parse(recipe).unwrap().index.unwrap().rule.dense;
            // Past the completion of a page, and of four.
            let steps = match backend.name() {
                "cpu" => 70,
                "gpu" => 5,
                _ => 20,
            };
            for step in 0..steps {
                let token = PROMPT + step;
                let before = [(0, 0), (1, 0), (1, 1)].map(|(layer, head)| units(&cache, id, layer, head));
                let out = feed(&mut cache, id, &[token], 1);
                for ((layer, head), units) in [(0, 0), (1, 0), (1, 1)].into_iter().zip(&before) {
                    let shape = cache.shape().layer(layer).clone();
                    let all = entries(&cache, id, layer, head);
                    let naive = naive((&cache, id), (layer, head), &all, units);
                    assert!(layer >= dense || units.is_empty());
                    if layer < dense {
                        let read = cache.last_choice(id, layer).unwrap().unwrap();
                        let there = cache.stored(id, layer).unwrap().iter().map(|rows| rows.0).sum::<usize>();
                        assert_eq!(read.slots.len(), there, "{recipe}: a layer that reads everything");
                    }
                    let asked = queries(&shape, layer, head, &[(token, token as i32)]);
                    let rows: Vec<Row> = asked.iter().map(|(query, at)| naive.row(query, *at)).collect();
                    let chosen = naive.choose(&rows);
                    for (g, (query, at)) in asked.iter().enumerate() {
                        let (want, _) = naive.output(query, *at, &chosen);
                        let got = &out[layer][(head * 3 + g) * 16..][..16];
                        let error = distance(got, &want);
                        assert!(
                            error < 2e-4,
                            "{}: {recipe}: step {step}, layer {layer}: {error}",
                            backend.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_missing_is_reported_and_never_more_than_the_bound() {
    for backend in backends() {
        for recipe in recipes_for(&*backend) {
            let (mut cache, id) = prompted(&recipe, &backend, &[PROMPT]);
            for step in 0..6 {
                let token = PROMPT + step;
                let before = [0, 1].map(|head| units(&cache, id, 1, head));
                feed(&mut cache, id, &[token], 1);
                let report = cache.last_read(id, 1).unwrap().unwrap();
                let read = cache.last_choice(id, 1).unwrap().unwrap();
                assert!(report.units > 0 && report.entries <= 2 * most(&recipe), "{recipe}: {report:?}");
                assert_eq!(report.entries, read.slots.len(), "{recipe}");
                let shape = cache.shape().layer(1).clone();
                let (mut missing, mut estimate) = (Vec::new(), Vec::new());
                for (head, units) in before.iter().enumerate() {
                    let all = entries(&cache, id, 1, head);
                    let naive = naive((&cache, id), (1, head), &all, units);
                    let asked = queries(&shape, 1, head, &[(token, token as i32)]);
                    let rows: Vec<Row> = asked.iter().map(|(query, at)| naive.row(query, *at)).collect();
                    let chosen = naive.choose(&rows);
                    // Rounded summaries may choose other units than here: what was read is asked, not computed.
                    let slots = &read.slots[read.offsets[head]..read.offsets[head + 1]];
                    let left = |slot: usize| slots.binary_search(&Slot(slot as u32)).is_err();
                    for ((query, at), row) in asked.iter().zip(&rows) {
                        let all: f64 = row.entries.iter().map(|x| x.exp()).sum();
                        let gone: f64 =
                            (0..row.entries.len()).filter(|&s| left(s)).map(|s| row.entries[s].exp()).sum();
                        missing.push(gone / all);
                        let rule = ReadRule { tail: Tail::Estimate, estimate: 1.0, ..naive.rule };
                        let means = naive.with(naive.role, rule);
                        estimate.push(means.output(query, *at, &chosen).1);
                    }
                }
                let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
                if let Some(bound) = report.missing_at_most {
                    let most = missing.iter().copied().fold(0.0, f64::max);
                    assert!(f64::from(bound) >= most, "{recipe}: {bound} said, {most} missing");
                }
                // What is in groups that were not looked into is said from the groups' means.
                if argument(&recipe, "store") == Some("f32")
                    && argument(&recipe, "levels") != Some("2")
                    && let Some(said) = report.missing
                {
                    let want = mean(&estimate);
                    assert!(
                        (f64::from(said) - want).abs() < 1e-3 * want,
                        "{recipe}: {said}, should be {want}"
                    );
                }
                assert_eq!(
                    report.missing_at_most.is_some(),
                    ["quest", "lserve", "bounds=yes"].iter().any(|with| recipe.contains(with))
                );
            }
        }
    }
}

#[test]
fn tokens_one_by_one_or_at_once_give_the_same_index() {
    for backend in backends() {
        for recipe in all_recipes_for(&*backend) {
            let outs = |chunks: &[u64]| {
                let (mut cache, id) = prompted(&recipe, &backend, chunks);
                let out = feed(&mut cache, id, &[PROMPT], 1);
                (out, cache.last_read(id, 1).unwrap(), cache.stats(id).unwrap().total().bytes_index)
            };
            let (once, slowly) = (outs(&[PROMPT]), outs(&[100, 3, 2, 7, 89, 50, 13, 36]));
            assert_eq!(once, slowly, "{}: {recipe}", backend.name());
        }
    }
}

#[test]
fn what_happens_to_a_sequence_happens_to_its_index() {
    for backend in backends() {
        for recipe in all_recipes_for(&*backend).iter().rev().step_by(3) {
            let (mut cache, id) = prompted(recipe, &backend, &[PROMPT]);
            let next: Vec<u64> = (PROMPT..PROMPT + 40).collect();
            let fork = cache.fork(id).unwrap();
            let straight: Vec<_> = next.iter().map(|&t| feed(&mut cache, id, &[t], 1)).collect();
            // A fork is not touched by what the other does; a step that is rolled back leaves nothing.
            let mut again = Vec::new();
            for &token in &next {
                feed(&mut cache, fork, &[token, 7, 8], 0);
                again.push(feed(&mut cache, fork, &[token], 1));
            }
            assert_eq!(straight, again, "{}: {recipe}: fork and rollback", backend.name());
            // Back to the middle of a page, and on.
            let back = PROMPT as i32 + 3;
            cache.truncate(id, Position(back)).unwrap();
            let again: Vec<_> = next[3..].iter().map(|&t| feed(&mut cache, id, &[t], 1)).collect();
            assert_eq!(straight[3..].len(), again.len());
            let report = cache.last_read(id, 1).unwrap().unwrap();
            assert!(report.units > 0, "{recipe}: {report:?}");
            // Without a span in the middle: as if it had never come.
            cache.remove(fork, Position(50)..Position(61), RemoveMode::Keep).unwrap();
            feed(&mut cache, fork, &[1000], 1);
            assert_eq!(
                cache.last_read(fork, 1).unwrap().unwrap().units,
                0,
                "read whole until the index is there again"
            );
            feed(&mut cache, fork, &[1001], 1);
            let report = cache.last_read(fork, 1).unwrap().unwrap();
            assert!(report.units > 0 && report.entries <= 2 * most(recipe), "{recipe}: {report:?}");
        }
    }
}

#[test]
fn below_its_least_context_an_index_changes_no_bit() {
    for backend in backends() {
        let run = |recipe: &str, budget: usize| {
            let (mut cache, id) = prompted_within(budget, recipe, &backend, &[PROMPT]);
            (0..3).map(|i| feed(&mut cache, id, &[PROMPT + i], 1)).collect::<Vec<_>>()
        };
        let full = run("full", 1);
        for name in names() {
            let least = Recipe::parse(&name).unwrap().index.unwrap().always() + 20;
            assert_eq!(run(&name, least), full, "{name} on {}", backend.name());
            assert_eq!(
                run(&format!("{name}(min_context=0,dense=2,most=1)"), least),
                full,
                "{name}: dense layers"
            );
            assert_eq!(run(&format!("{name}(min_context=0)"), 1500), full, "{name}: too much to read");
        }
    }
}

#[test]
fn a_choice_is_kept_for_some_steps_and_shared_between_layers() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let own = "quest(page=8,dense=0,recent=20,min_context=0,store=f32";
    let bytes = |recipe: &str| -> Vec<Vec<usize>> {
        let (mut cache, id) = prompted(recipe, &backend, &[PROMPT]);
        let mut step = |i| {
            feed(&mut cache, id, &[PROMPT + i], 1);
            (0..2).map(|layer| cache.last_read(id, layer).unwrap().unwrap().bytes).collect()
        };
        (0..8).map(&mut step).collect()
    };
    let every = bytes(&format!("{own})"));
    let kept = bytes(&format!("{own},every=4)"));
    let shared = bytes(&format!("{own},share=2)"));
    // What a choice costs is the rows of bounds: 2 x 16 floats for each page.
    assert!(every.iter().flatten().all(|b| *b > kept[1][0]), "{every:?} {kept:?}");
    let chose: Vec<usize> = (0..8).filter(|&i| kept[i][0] > kept[1][0] + 4000).collect();
    assert_eq!(chose, [0, 4], "{kept:?}");
    assert!(shared.iter().all(|step| step[0] > step[1] + 4000), "{shared:?}");
}

#[test]
fn a_goal_reads_until_it_is_met() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    for (recipe, certified) in [
        ("pages(page=4,recent=20,store=f32,tail=ignore,min_context=0,most=1,mass=", false),
        ("quest(page=4,dense=0,recent=20,store=f32,min_context=0,most=1,goal=bound,mass=", true),
        ("pages(page=4,recent=20,store=f32,bounds=yes,min_context=0,most=1,goal=bound,mass=", true),
    ] {
        let mut last = 0;
        for mass in [0.3, 0.6, 0.9, 0.99] {
            let builder = KvCache::builder(model()).recipe(format!("{recipe}{mass})"));
            let mut cache = builder.shared_backend(Arc::clone(&backend)).build().unwrap();
            let id = cache.create_sequence();
            let tokens: Vec<u64> = (0..PROMPT).collect();
            feed(&mut cache, id, &tokens, tokens.len());
            feed(&mut cache, id, &[PROMPT], 1);
            let report = cache.last_read(id, 1).unwrap().unwrap();
            let missing = if certified { report.missing_at_most } else { report.missing };
            assert!(f64::from(missing.unwrap()) <= 1.0 - mass + 1e-6, "{recipe}{mass}: {report:?}");
            assert!(report.entries >= last, "{recipe}{mass}: {report:?}");
            last = report.entries;
        }
        assert!(last > 200, "{recipe}: {last}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_the_option_to_change() {
    let build = |recipe: &str, budget: Option<Budget>| {
        let builder = KvCache::builder(model()).recipe(recipe);
        let builder = match budget {
            Some(budget) => builder.budget(budget),
            None => builder,
        };
        builder.build().map(drop).unwrap_err().to_string()
    };
    assert!(build("quest", None).contains("what a step may read"), "{}", build("quest", None));
    assert!(
        build("pages", Some(Budget::Tokens(60))).contains("at least 83 tokens"),
        "{}",
        build("pages", Some(Budget::Tokens(60)))
    );
    assert!(build("snapkv+index=quest", Some(Budget::Tokens(600))).contains("drop the index"));
    assert!(build("lserve(page=60)", Some(Budget::Tokens(600))).contains("a multiple of logical=16"));
    assert!(build("pages(goal=bound,mass=0.9)", Some(Budget::Tokens(600))).contains("bounds=yes"));
    assert!(build("index=snapkv", Some(Budget::Tokens(600))).contains("quest"));
    let backend: Arc<dyn Backend> = Arc::new(Cpu::default());
    let (mut cache, id) = prompted("full", &backend, &[30]);
    let rows = vec![0.0; 9 * 6 * 16];
    let ask = |cache: &mut KvCache, tokens: usize| {
        let view = TensorView::token_major(&rows[..tokens * 96], tokens, 6, 16).unwrap();
        cache.choose(id, 0, view).unwrap_err().to_string()
    };
    assert!(ask(&mut cache, 1).contains("has no index"));
    let (mut cache, _) = prompted("quest", &backend, &[30]);
    assert!(ask(&mut cache, 9).contains("1 to 8"));
}

/// Bytes per entry and KV head that the pages of `docs/policies` state for these indexes at d 128, `Σ` apart.
#[test]
fn an_index_takes_the_bytes_that_its_page_states() {
    const TOKENS: usize = 24_576;
    let d = 128;
    let int4 = |elements: usize| elements as f64 / 2.0 + 8.0;
    for (recipe, want, more) in [
        ("pages(store=f16)", (4 * d + 8) as f64 / 16.0, 0),
        ("pages(store=f32,page=32)", (8 * d + 8) as f64 / 32.0, 0),
        ("pages(store=f16,page=8,outliers=48)", (4 * d + 8 + 4) as f64 / 8.0, 0),
        ("quest(dense=0)", (4 * d + 2 + 2 + 8) as f64 / 16.0, 0),
        ("pages(store=int8)", (2 * d + 8 + 8) as f64 / 16.0, 0),
        ("quest(dense=0,store=int8)", (2 * d + 4 + 4 + 8) as f64 / 16.0, 0),
        ("clusterkv(dense=0,segment=1024,rounds=1,size=16)", (4 * d + 8) as f64 / 16.0 + 4.0, 0),
        ("pq(train=2048,rounds=1)", 16.0 + 4.0, 4 * ((16 + 1) * d + 16 * 32)),
        ("a2ats(levels=256,train=2048,rounds=1)", 4.0 + 4.0, 4 * ((256 + 1) * d + 256)),
        (
            "squeezed(levels=2,segment=1024,rounds=1)",
            (4 * d + 8) as f64 / 20.0 + (d + 4 + 4 + 8) as f64 / 100.0 + 4.0,
            0,
        ),
        ("auto(pieces=0,rounds=1,segment=1024)", (2.0 * int4(d) + 8.0) / 16.0 + 4.0, 4 * d * d),
        (
            "auto(rounds=1,segment=1024)",
            (2.0 * int4(d) + 8.0) / 16.0 + 4.0 + 16.0 + 4.0,
            8 * d * d + 4 * (16 + 1) * d,
        ),
    ] {
        let shape = ModelShape::uniform(1, LayerShape::new(1, 1, d)).unwrap();
        let mut cache = KvCache::builder(shape).recipe(recipe).budget(Budget::Tokens(1024)).build().unwrap();
        let id = cache.create_sequence();
        let mut random = Random::new(5);
        for _ in 0..TOKENS / 512 {
            let rows = random.rows(512 * d, 1.0, DType::F32);
            let mut step = cache.begin(id, 512).unwrap();
            let view = || TensorView::token_major(&rows[..], 512, 1, d).unwrap();
            step.append(0, view(), view()).unwrap();
            step.commit(512).unwrap();
        }
        cache.end_prefill(id).unwrap();
        let bytes = cache.stats(id).unwrap().total().bytes_index as f64 - more as f64;
        let per_entry = bytes / TOKENS as f64;
        println!("{recipe}: {per_entry:.2} bytes per entry and KV head, {want:.2} stated");
        // Up to 128 rows wait to be packed, pages may be empty but for a row, and every one has fields of its own.
        assert!(per_entry > 0.9 * want && per_entry < 1.25 * want, "{recipe}: {per_entry}, stated {want}");
    }
}

/// A million query rows, from nearly uniform to nearly one-hot, over keys with outliers: the certificate holds for each.
#[test]
fn a_million_rows_never_miss_more_than_was_certified() {
    const STORED: usize = 200;
    const TOKENS: usize = 8;
    let (heads, group, d) = (2, 8, 16);
    let recipes = ["f32", "f16", "int8", "int4"]
        .map(|store| format!("quest(page=8,dense=0,store={store},min_context=0)"));
    let beside = "pages(page=8,recent=16,store=int8,bounds=yes,tail=ignore,min_context=0)".to_owned();
    let mut random = Random::new(11);
    for recipe in recipes.into_iter().chain([beside]) {
        let shape = LayerShape::new(heads * group, heads, d);
        let scale = f64::from(shape.scale);
        let builder = KvCache::builder(ModelShape::uniform(1, shape).unwrap()).recipe(recipe.as_str());
        let mut cache = builder.budget(Budget::Tokens(80)).build().unwrap();
        let id = cache.create_sequence();
        let mut keys = random.rows(STORED * heads * d, 1.0, DType::F32);
        keys.iter_mut().filter(|_| random.one_in(50)).for_each(|k| *k *= 8.0);
        let mut step = cache.begin(id, STORED).unwrap();
        let view = || TensorView::token_major(&keys[..], STORED, heads, d).unwrap();
        step.append(0, view(), view()).unwrap();
        step.commit(STORED).unwrap();
        cache.end_prefill(id).unwrap();
        let mut least = f64::INFINITY;
        for round in 0..200_000 / (TOKENS * heads * group) {
            let gain = 0.05 * 1.5f32.powi(round as i32 % 13);
            let q = random.rows(TOKENS * heads * group * d, gain, DType::F32);
            let new = random.rows(TOKENS * heads * d, 1.0, DType::F32);
            let mut out = vec![0.0; q.len()];
            let mut step = cache.begin(id, TOKENS).unwrap();
            let view = |x, heads| TensorView::token_major(x, TOKENS, heads, d).unwrap();
            let target = TensorViewMut::token_major(&mut out[..], TOKENS, heads * group, d).unwrap();
            step.attend(0, view(&q[..], heads * group), view(&new[..], heads), view(&new[..], heads), target)
                .unwrap();
            drop(step);
            let bound = cache.last_read(id, 0).unwrap().unwrap().missing_at_most.unwrap();
            let read = cache.last_choice(id, 0).unwrap().unwrap();
            for head in 0..heads {
                let mut left = [true; STORED];
                let slots = &read.slots[read.offsets[head]..read.offsets[head + 1]];
                slots.iter().for_each(|slot| left[slot.0 as usize] = false);
                let key = |rows: &[f32], i: usize| -> [f64; 16] {
                    std::array::from_fn(|x| f64::from(rows[(i * heads + head) * d + x]))
                };
                let stored: Vec<[f64; 16]> = (0..STORED).map(|i| key(&keys, i)).collect();
                let fresh: Vec<[f64; 16]> = (0..TOKENS).map(|i| key(&new, i)).collect();
                for row in 0..TOKENS * group {
                    let (token, h) = (row / group, head * group + row % group);
                    let query = &q[(token * heads * group + h) * d..][..d];
                    let weight = |k: &[f64; 16]| (scale * dot(query, k)).exp();
                    let weights: Vec<f64> = stored.iter().map(weight).collect();
                    let all: f64 =
                        weights.iter().chain(&fresh[..=token].iter().map(weight).collect::<Vec<_>>()).sum();
                    let gone: f64 = weights.iter().zip(left).filter(|(_, left)| *left).map(|(w, _)| w).sum();
                    assert!(
                        gone / all <= f64::from(bound),
                        "{recipe}: {bound} certified, {} missing",
                        gone / all
                    );
                    least = least.min(f64::from(bound) - gone / all);
                }
            }
        }
        println!("{recipe}: never nearer to the certificate than {least:.1e}");
    }
}

#[test]
fn thresholds_make_all_heads_together_read_the_budget() {
    for backend in backends() {
        let recipe = "squeezed(size=6,segment=128,update=16,recent=20,window=30,levels=2,fan=4,widen=2,store=f32,coarse=f32,min_context=0)";
        let (cache, id) = prompted(recipe, &backend, &[200, PROMPT - 200]);
        let window: Vec<(u64, i32)> = (PROMPT - 30..PROMPT).map(|t| (t, t as i32)).collect();
        // Weight per entry, and entries, of every group and unit of both layers in every step of the window.
        let (mut groups_of, mut units_of, mut wanted, mut covered) = (Vec::new(), Vec::new(), 0, 0);
        let got = cache.thresholds(id).unwrap().unwrap();
        for (layer, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let (all, units) = (entries(&cache, id, layer, head), units(&cache, id, layer, head));
            let naive = naive((&cache, id), (layer, head), &all, &units);
            for step in &window {
                let rows = queries(&naive.shape, layer, head, std::slice::from_ref(step));
                let rows: Vec<Row> = rows.iter().map(|(query, at)| naive.row(query, *at)).collect();
                for (g, group) in naive.groups.iter().enumerate() {
                    let members = units[group.clone()].concat().len();
                    let share =
                        |row: &Row| row.groups[g].exp() / row.groups.iter().map(|x| x.exp()).sum::<f64>();
                    let weight = rows.iter().map(share).sum::<f64>() / rows.len() as f64;
                    groups_of.push((weight / members as f64, members));
                }
                // Units in groups that are looked into, as a step weighs them.
                for (score, unit) in naive.ranking(&rows) {
                    units_of.push((score.exp() / rows.len() as f64, units[unit.start].len()));
                }
            }
            assert_eq!(naive.groups.iter().map(ExactSizeIterator::len).sum::<usize>(), units.len());
            wanted += window.len() * (BUDGET - (all.len() - naive.covered()));
            covered += window.len() * naive.covered();
        }
        let cut = |mut rows: Vec<(f64, usize)>, mut left: usize| {
            rows.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut least = f64::INFINITY;
            for (weight, entries) in rows {
                if entries > left {
                    break;
                }
                left -= entries;
                least = weight;
            }
            least
        };
        let want = (cut(units_of, wanted), cut(groups_of, (2 * wanted).min(covered)));
        assert!((f64::from(got.unit) / want.0 - 1.0).abs() < 1e-3, "{got:?}, should be {want:?}");
        assert!((f64::from(got.group) / want.1 - 1.0).abs() < 1e-3, "{got:?}, should be {want:?}");
    }
}
