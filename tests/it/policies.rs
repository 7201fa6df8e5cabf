//! What every registered policy must do: have a page, keep the promises of a plan, run in a cache.

use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::cache::SideInput;
use kvsieve::columns::{ColumnLayout, RATED, REPLAYED};
use kvsieve::geometry::{LayerShape, ModelShape, Rotary, RotaryLayout};
use kvsieve::policy::registry::{Build, Registry};
use kvsieve::policy::{
    FeedKind, LayerScores, LayerView, Policy, Scorer, SideKind, Staged, TargetRequest, select,
};
use kvsieve::recipe::Recipe;
use kvsieve::testing::layer::LayerCase;
use kvsieve::testing::{Random, profile};
use kvsieve::view::{DType, TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache};
use proptest::prelude::*;
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

fn docs() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/policies")
}

#[test]
fn every_entry_has_a_page_that_names_its_arguments() {
    let registry = Registry::builtin();
    for entry in &registry {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(entry.page());
        let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(page.starts_with(&format!("# {}\n", entry.name)), "{}: title", entry.page());
        for heading in
            ["## Mechanism", "## Needs", "## Memory", "## Helps, hurts", "## Evidence", "## Source"]
        {
            assert!(page.contains(heading), "{} has no section {heading}", entry.page());
        }
        let marker = format!("<!-- evidence:{} -->", entry.name);
        assert!(page.contains(&marker) && page.contains("<!-- /evidence -->"), "{}: {marker}", entry.page());
        for arg in entry.args {
            assert!(
                page.contains(&format!("`{}", arg.name)),
                "{} does not explain {}",
                entry.page(),
                arg.name
            );
        }
    }
    let index = std::fs::read_to_string(docs().join("README.md")).unwrap();
    for entry in &registry {
        assert!(
            index.contains(&format!("[{0}]({0}.md)", entry.name)),
            "README.md does not list {}",
            entry.name
        );
    }
    for file in std::fs::read_dir(docs()).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let stem = name.strip_suffix(".md").unwrap();
        assert!(stem == "README" || registry.find(stem).is_ok(), "{name} describes nothing in the registry");
    }
}

#[test]
fn every_entry_describes_itself() {
    let registry = Registry::builtin();
    for (i, entry) in registry.iter().enumerate() {
        assert!(
            !entry.summary.is_empty() && !entry.source.is_empty() && !entry.needs.is_empty(),
            "{}",
            entry.name
        );
        assert!(registry.iter().skip(i + 1).all(|e| e.name != entry.name), "{} twice", entry.name);
        for arg in entry.args {
            assert!(
                arg.accepts.parse(&arg.default.to_string()) == Some(arg.default),
                "{} {}",
                entry.name,
                arg.name
            );
            assert!(!arg.doc.is_empty(), "{} {}", entry.name, arg.name);
        }
        let recipe = Recipe::parse(entry.name).unwrap();
        assert_eq!(Recipe::parse(&recipe.to_string()).unwrap().to_string(), recipe.to_string());
    }
}

/// Dimension of hidden states.
const HIDDEN: usize = 6;

fn layer() -> LayerShape {
    LayerShape::new(4, 2, 4).with_rotary(Rotary::new(4, 10_000.0, RotaryLayout::HalfSplit))
}

/// The policy of a recipe for a model of so many layers, with random numbers where it goes by a profile.
fn policy(recipe: &str, layers: usize) -> Arc<dyn Policy> {
    let shape = ModelShape::uniform(layers, layer()).unwrap();
    let profile = profile(&shape, HIDDEN, 3).unwrap();
    let policy = Recipe::parse(recipe).unwrap().bind(&profile, &shape).unwrap().policy;
    assert_eq!(policy.lacks(), None, "{recipe}");
    policy
}

/// Every scorer with every allocator, and the whole policies.
fn recipes() -> Vec<String> {
    let registry = Registry::builtin();
    let names = |which: fn(&Build) -> bool| {
        registry.iter().filter(move |e| which(&e.build)).map(|e| e.name).collect::<Vec<_>>()
    };
    let allocators = names(|b| matches!(b, Build::Allocate { .. }));
    let mut recipes: Vec<String> =
        names(|b| matches!(b, Build::Whole { .. })).iter().map(ToString::to_string).collect();
    for scorer in names(|b| matches!(b, Build::Score { .. })) {
        recipes.extend(allocators.iter().map(|a| format!("{scorer}+alloc={a}")));
    }
    recipes.push("snapkv(window=3,kernel=3,pool=max,agg=max)+alloc=adakv(rule=mix,normalise=yes)".into());
    recipes.push("h2o(norm=visibility,agg=sum)+alloc=adakv(rule=mix,alpha=0.7)".into());
    recipes.push("scissorhands(history=5,agg=max)".into());
    // Smaller than what these tests store, so that heads of both classes drop entries.
    recipes.push("knorm+alloc=duo(sinks=9,recent=9)".into());
    recipes.push("tova+alloc=duo(share=1,sinks=9,recent=12)".into());
    recipes.push("compresskv(first=2,kernel=1)+alloc=headkv(beta=1,power=3)".into());
    recipes
}

/// Ragged heads with gaps in their positions, as after earlier evictions, and queries of the last tokens.
fn ragged<'a>(
    backend: &'a dyn Backend,
    policy: &dyn Policy,
    seed: u64,
    lengths: [usize; 2],
) -> LayerCase<'a> {
    let mut random = Random::new(seed);
    let mut case = LayerCase::new(backend, layer(), policy.columns());
    let next = 80;
    for (head, &len) in lengths.iter().enumerate() {
        let mut positions: Vec<i32> = (0..next).collect();
        while positions.len() > len {
            positions.remove(random.below(positions.len()));
        }
        let rows = random.rows(len * 4, 1.0, DType::F32);
        case.append(head, &positions, &rows, &rows).unwrap();
    }
    let queries = 8;
    case.record(random.rows(4 * queries * 4, 2.0, DType::F32), (next - queries as i32..next).collect());
    if policy.needs().feed != FeedKind::None {
        case.feed(policy.needs().feed, |feed, columns| policy.observe(feed, columns)).unwrap();
    }
    // What a cache writes beside entries: any judgement of tokens on arrival, attention weights of a replay.
    let columns = ColumnLayout::new(policy.columns());
    let random = RefCell::new(random);
    for (name, positive) in [(RATED.name, false), (REPLAYED.name, true)] {
        let Some((word, _)) = columns.find(name) else { continue };
        case.feed(FeedKind::Mass, |_, columns| {
            for entry in 0..columns.entries() {
                let number = random.borrow_mut().normal();
                columns.entry(entry)[word] = if positive { number.abs() } else { number }.to_bits();
            }
        })
        .unwrap();
    }
    case
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn plans_keep_their_promises(
        seed in 0u64..1000, a in 0usize..60, b in 0usize..60, target in 0usize..70, sinks in 0usize..9, recent in 0usize..9,
    ) {
        for name in recipes() {
            let staged = !name.starts_with("full");
            let name = if staged { format!("{name}+sinks={sinks}+recent={recent}") } else { name };
            let policy = policy(&name, 1);
            let backend = Reference::default();
            let case = ragged(&backend, &*policy, seed, [a, b]);
            let view = case.view(target);
            let plan = policy.plan(&view).unwrap();
            plan.validate(&name, 0, [a, b].into_iter()).unwrap();
            if !policy.compresses() {
                prop_assert!(plan.heads.iter().all(|h| h.is_identity()));
                continue;
            }
            // Who needs no budget drops entries within it, too, and need not use it up.
            let fills = policy.needs_budget();
            prop_assert!(plan.kept() <= 2 * target, "{}", name);
            if fills && a <= target && b <= target {
                prop_assert!(plan.heads.iter().all(|h| h.is_identity()), "{}", name);
            } else if name.contains("adakv") && fills {
                prop_assert_eq!(plan.kept(), (a + b).min(2 * target), "{}", name);
            } else if policy.equal_counts() {
                prop_assert_eq!(plan.heads[0].keep.len(), a.min(target), "{}", name);
                prop_assert_eq!(plan.heads[1].keep.len(), b.min(target), "{}", name);
            } else if fills {
                let least = a.min(target) + b.min(target);
                prop_assert!((least..=a + b).contains(&plan.kept()), "{}: keeps {}", name, plan.kept());
            }
            let protect = select::protection(&[a, b], target, sinks, recent);
            let protected = |head: usize, slot: usize| protect[head * a + slot] != 0;
            for (head, len) in [a, b].into_iter().enumerate() {
                for slot in (0..len).filter(|&s| protected(head, s)) {
                    // The scorer's own protection, or that of a class of heads, may push recent ones out; sinks always stay.
                    let (own_sinks, own_recent) = policy.protected();
                    let own = own_sinks > sinks
                        || own_recent > recent
                        || !fills
                        || name.starts_with("h2o")
                        || name.starts_with("streaming");
                    let kept = plan.heads[head].keep.contains(&(slot as u32));
                    prop_assert!(kept || (own && slot >= sinks), "{}: head {} slot {}", name, head, slot);
                }
            }
            prop_assert_eq!(&plan, &policy.plan(&view).unwrap(), "planning twice differs");
        }
    }
}

#[test]
fn layer_budgets_sum_to_the_budget() {
    let layers: Vec<usize> = (0..30).collect();
    for name in recipes() {
        let policy = policy(&name, 30);
        for (rows, target) in [([4000; 30], 512), ([400; 30], 1), ([100; 30], 99), ([100; 30], 200)] {
            let request = TargetRequest { layers: &layers, rows: &rows, target, recent: 8, measures: &[] };
            let sum = policy.layer_targets(&request).iter().sum::<usize>();
            assert!(sum <= 30 * target, "{name}: {sum} of 30 times {target}");
            assert!(sum == 30 * target || !policy.needs_budget(), "{name}: {sum} of 30 times {target}");
        }
    }
}

#[test]
fn layer_budgets_of_the_pyramid_differ() {
    let layers: Vec<usize> = (0..30).collect();
    let request =
        TargetRequest { layers: &layers, rows: &[4000; 30], target: 512, recent: 64, measures: &[] };
    let targets = Recipe::parse("pyramid").unwrap().policy.layer_targets(&request);
    assert!(targets[0] > 3 * targets[29], "{targets:?}");
    assert_eq!(targets.iter().sum::<usize>(), 30 * 512);
    let uniform = Recipe::parse("snapkv").unwrap().policy.layer_targets(&request);
    assert_eq!(uniform, [512; 30]);
}

#[test]
fn layer_budgets_by_variance_are_measured_in_the_cache_and_kept() {
    let shape = ModelShape::uniform(2, LayerShape::new(4, 2, 4)).unwrap();
    let counts = |sharpness: usize| {
        let recipe = format!("h2o+variance(sharpness={sharpness})");
        let builder = KvCache::builder(shape.clone()).recipe(recipe.as_str()).budget(Budget::Tokens(40));
        let mut cache = builder.backend(Cpu::default()).page_entries(16).build().unwrap();
        let id = cache.create_sequence();
        let mut random = Random::new(11);
        feed(&mut cache, id, &mut random, 90);
        cache.end_prefill(id).unwrap();
        let layers = |cache: &KvCache| [0, 1].map(|layer| cache.stored(id, layer).unwrap()[0].0);
        let after_prompt = layers(&cache);
        for _ in 0..80 {
            feed(&mut cache, id, &mut random, 1);
        }
        cache.compress(id).unwrap();
        assert_eq!(layers(&cache), after_prompt, "budgets of the prompt hold for what follows");
        after_prompt
    };
    assert_eq!(counts(0), [40, 40]);
    let [first, second] = counts(1000);
    assert!(first != second && first + second == 80, "{first} {second}");
}

/// Scores given by the test.
#[derive(Debug)]
struct Fixed(Vec<f32>);

impl Scorer for Fixed {
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, kvsieve::error::PolicyError> {
        Ok(LayerScores { lengths: view.lengths(), values: self.0.clone() })
    }
}

#[test]
fn nan_scores_and_wrong_lengths_are_errors() {
    let backend = Reference::default();
    let case = ragged(&backend, &*policy("knorm", 1), 1, [3, 2]);
    let uniform = Arc::new(kvsieve::policy::allocate::uniform::Uniform);
    let plan = |scores: &[f32]| {
        Staged::new("fixed", Arc::new(Fixed(scores.to_vec())), uniform.clone()).plan(&case.view(1))
    };
    assert_eq!(plan(&[0., 2., 1., f32::INFINITY, f32::NEG_INFINITY]).unwrap().heads[0].keep, [1]);
    let nan = plan(&[0., 2., 1., 5., f32::NAN]).unwrap_err().to_string();
    assert_eq!(nan, "policy fixed scored slot 1 of layer 0, KV head 1 as NaN");
    assert!(plan(&[0., 2., 1., 5.]).unwrap_err().to_string().contains("scored 4 entries"));
}

/// Feeds `tokens` random tokens to a cache of two layers.
fn feed(cache: &mut KvCache, id: kvsieve::SequenceId, random: &mut Random, tokens: usize) {
    let hidden = cache.needs().side == SideKind::Hidden;
    let mut step = cache.begin(id, tokens).unwrap();
    for layer in 0..2 {
        if hidden {
            let states = random.rows(tokens * HIDDEN, 1.0, DType::F32);
            let states = TensorView::token_major(&states[..], tokens, 1, HIDDEN).unwrap();
            step.side_input(layer, SideInput::Hidden(states)).unwrap();
        }
        let q = random.rows(tokens * 16, 1.0, DType::F32);
        let (k, v) = (random.rows(tokens * 8, 1.0, DType::F32), random.rows(tokens * 8, 1.0, DType::F32));
        let mut out = vec![0.0; tokens * 16];
        let out = TensorViewMut::token_major(&mut out[..], tokens, 4, 4).unwrap();
        let view = |x, heads| TensorView::token_major(x, tokens, heads, 4).unwrap();
        step.attend(layer, view(&q[..], 4), view(&k[..], 2), view(&v[..], 2), out).unwrap();
    }
    step.commit(tokens).unwrap();
}

#[test]
fn every_recipe_runs_in_a_cache_and_keeps_its_budget() {
    let shape = ModelShape::uniform(2, layer()).unwrap();
    let profile = Arc::new(profile(&shape, HIDDEN, 3).unwrap());
    for name in recipes() {
        // What judges a replay has nothing to go by without one.
        if policy(&name, 2).needs().replay {
            continue;
        }
        for chunks in [&[90][..], &[40, 3, 47]] {
            let builder = KvCache::builder(shape.clone()).recipe(name.as_str()).budget(Budget::Tokens(70));
            let builder = builder.backend(Cpu::default()).page_entries(16).profile(Arc::clone(&profile));
            let mut cache = builder.build().unwrap_or_else(|e| panic!("{name}: {e}"));
            let id = cache.create_sequence();
            let mut random = Random::new(7);
            for &tokens in chunks {
                feed(&mut cache, id, &mut random, tokens);
            }
            cache.end_prefill(id).unwrap();
            let entries = |cache: &KvCache| -> usize {
                (0..2).flat_map(|l| cache.stored(id, l).unwrap()).map(|rows| rows.0).sum()
            };
            if !cache.recipe().policy.compresses() {
                assert_eq!(entries(&cache), 4 * 90);
                continue;
            }
            let fills = cache.recipe().policy.needs_budget();
            assert!(entries(&cache) <= 4 * 70, "{name}, {chunks:?}");
            assert!(entries(&cache) == 4 * 70 || !fills, "{name}, {chunks:?}: {}", entries(&cache));
            for _ in 0..50 {
                feed(&mut cache, id, &mut random, 1);
            }
            let slack = cache.recipe().schedule.over;
            let most = 4 * (70 + slack.unwrap_or(50) + 1);
            assert!(entries(&cache) <= most, "{name}: {} entries, at most {most}", entries(&cache));
        }
    }
}
