//! The text form of recipes and budgets: canonical, helpful when wrong, unharmed by hostile input.

use kvsieve::error::RecipeError;
use kvsieve::policy::Scorer;
use kvsieve::policy::registry::{Accepts, Arg, Args, Build, Entry, Registry};
use kvsieve::policy::schedule::Schedule;
use kvsieve::policy::score::knorm::Knorm;
use kvsieve::policy::whole::full::Full;
use kvsieve::recipe::{Budget, PositionMode, Recipe};
use kvsieve::view::DType;
use proptest::prelude::*;
use std::sync::Arc;

#[track_caller]
fn canonical(text: &str, want: &str) {
    let recipe = Recipe::parse(text).unwrap();
    assert_eq!(recipe.to_string(), want);
    assert_eq!(Recipe::parse(want).unwrap().to_string(), want);
}

#[track_caller]
fn fails(text: &str, want: &str) {
    assert_eq!(Recipe::parse(text).unwrap_err().to_string(), want);
}

#[test]
fn canonical_forms() {
    canonical("full", "full");
    canonical(" snapkv ( window = 64 , kernel=7 ) + k = f16+v=bf16 ", "snapkv(kernel=7)+k=f16+v=bf16");
    canonical("score=h2o(agg=max)+alloc=uniform", "h2o(agg=max)");
    canonical("adakv", "snapkv+alloc=adakv");
    canonical("knorm+pyramid(beta=10)", "knorm+alloc=pyramid(beta=10)");
    canonical("pyramid(beta=10)+knorm", "knorm+alloc=pyramid(beta=10)");
    canonical("snapkv+alloc=adakv(safeguard=0.20)", "snapkv+alloc=adakv");
    canonical("snapkv()+sinks=4+recent=0", "snapkv+sinks=4");
    canonical("streaming+when=over(slack=32)+when=prefill", "streaming");
    canonical("streaming+when=prefill", "streaming+when=prefill");
    canonical("snapkv+when=chunk+when=every", "snapkv+when=chunk+when=every(n=16)");
    canonical("snapkv+when=never", "snapkv+when=never");
    canonical("full+when=never", "full");
    canonical("knorm+positions=renumber", "knorm+positions=renumber");
    canonical("full+k=int4( hadamard, center )+v=lm3", "full+k=int4(center,hadamard)+v=lm3");
    canonical("full+v=lm3(center,hadamard)+k=lm2(plain)", "full+k=lm2(plain)+v=lm3");
    canonical("full+layers=0(v=f32,group=8)+v=int8", "full+v=int8");
    canonical("full+v=int8+layers=-1(v=f32,heads=0)", "full+v=int8+layers=-1..(heads=0..1,v=f32)");
    canonical("full+exact=f16(tail=128,sinks=4)", "full");
    canonical("full+k=int8+exact=f32(tail=0)", "full+k=int8+exact=f32(tail=0)");
    canonical("safe+full", "full+k=int8(center,hadamard)+v=int8");
    canonical("full+safe+v=f16", "full+k=int8(center,hadamard)+v=f16");
    canonical(
        "full+balanced",
        "full+k=int8(center,hadamard)+v=int4(center,hadamard)+layers=0..2(v=int8)+layers=-2..(v=int8)+layers=0..(group=8,v=int8)",
    );
    // Later terms override earlier ones.
    canonical("snapkv+h2o+k=f16+k=f32+sinks=1+sinks=2", "h2o+sinks=2");
    canonical("adakv+uniform", "snapkv");
    // Allocators with a scorer, or a schedule, of their own.
    canonical("duo", "streaming+alloc=duo");
    canonical("duo(share=0.50)+knorm", "knorm+alloc=duo");
    canonical("duo+when=every+when=chunk+when=prefill", "streaming+alloc=duo");
    canonical("duo+when=prefill", "streaming+alloc=duo+when=prefill");
    canonical("compress_error(most=2)", "compresskv+alloc=compress_error(most=2)");
    canonical("headkv+compresskv", "compresskv+alloc=headkv");
}

#[test]
fn presets_compress_when_their_papers_do() {
    let schedule = |name: &str| Recipe::parse(name).unwrap().schedule;
    let prefill = Schedule { prefill: true, ..Schedule::NEVER };
    for name in ["snapkv", "knorm", "random", "adakv", "pyramid", "compresskv", "compress_error", "headkv"] {
        assert_eq!(schedule(name), prefill, "{name}");
    }
    for name in ["streaming", "h2o", "tova", "scissorhands", "h2o+adakv"] {
        assert_eq!(schedule(name), Schedule { over: Some(32), ..prefill }, "{name}");
    }
    for name in ["duo", "snapkv+duo", "duo+h2o"] {
        assert_eq!(schedule(name), Schedule { chunk: true, every: Some(16), ..prefill }, "{name}");
    }
    assert_eq!(schedule("full"), Schedule::NEVER);
    let several = Schedule { prefill: false, chunk: true, every: Some(8), over: Some(0) };
    assert_eq!(schedule("h2o+when=chunk+when=every(n=8)+when=over(slack=0)"), several);
}

#[test]
fn errors_say_where_and_what() {
    fails("", r#"recipe "", column 1: expected a policy, an allocator or a stage, found the end"#);
    fails(
        "snapkv+",
        r#"recipe "snapkv+", column 8: expected a policy, an allocator or a stage, found the end"#,
    );
    fails(
        "snapkv(window",
        r#"recipe "snapkv(window", column 14: expected '=' and a value for window, found the end"#,
    );
    fails("snapkv(window=3;)", r#"recipe "snapkv(window=3;)", column 16: expected ',' or ')', found ';'"#);
    fails("snapkv((", r#"recipe "snapkv((", column 8: expected an argument's name, found '('"#);
    fails("snapkv h2o", r#"recipe "snapkv h2o", column 8: expected '+' or the end, found 'h'"#);
    fails("ßnapkv", r#"recipe "ßnapkv", column 1: expected a policy, an allocator or a stage, found 'ß'"#);
    fails(
        "snapkv(window=3, window=4)",
        r#"recipe "snapkv(window=3, window=4)", column 18: window was already given at column 8"#,
    );
    fails(
        "k=f16",
        r#"recipe "k=f16", column 1: expected a policy among the terms, for example full or snapkv"#,
    );
    fails("snapkv+sinks", r#"recipe "snapkv+sinks", column 8: sinks is a stage: expected sinks=…"#);
    fails("snapkv+k=f16(x=1)", r#"recipe "snapkv+k=f16(x=1)", column 15: expected ',' or ')', found '='"#);
    let names = |which: fn(&Build) -> bool| {
        let registry = Registry::builtin();
        registry.iter().filter(|e| which(&e.build)).map(|e| e.name).collect::<Vec<_>>().join(", ")
    };
    fails(
        "snappy",
        &format!(
            r#"there is no policy or allocator named "snappy"; known: {}; storage: safe, balanced, compact"#,
            names(|_| true)
        ),
    );
    let allocators = names(|b| matches!(b, Build::Allocate { .. }));
    fails("alloc=snapkv", &format!(r#"there is no allocator named "snapkv"; known: {allocators}"#));
    fails(
        "snapkv+speed=9",
        r#"there is no stage named "speed"; known: score, alloc, reduce, index, factor, k, v, layers, exact, sinks, recent, marked, when, positions"#,
    );
    fails("snapkv(windw=3)", "snapkv: windw = 3, must be one of the arguments window, kernel, pool, agg");
    fails("knorm(x=3)", "knorm: x = 3, must be left out: knorm takes no arguments");
    fails("snapkv(window=0)", "snapkv: window = 0, must be a whole number from 1 to 65536");
    fails("snapkv(window=-3)", "snapkv: window = -3, must be a whole number from 1 to 65536");
    fails("snapkv(kernel=4)", "snapkv: kernel = 4, must be odd, so that it has a middle");
    fails("compresskv(kernel=4)", "compresskv: kernel = 4, must be odd, so that it has a middle");
    fails("duo(share=1.5)", "duo: share = 1.5, must be a number from 0 to 1");
    fails("snapkv(pool=min)", "snapkv: pool = min, must be one of avg, max");
    fails("adakv(safeguard=NaN)", "adakv: safeguard = NaN, must be a number from 0 to 1");
    fails("adakv(safeguard=-0.1)", "adakv: safeguard = -0.1, must be a number from 0 to 1");
    fails(
        "snapkv+k=int3",
        r#"there is no storage type named "int3"; known: f32, f16, bf16, int8, int4, lm4, lm3, lm2, kivi4, kivi2, q8_0, q4_0, q4_1, q5_0, q5_1"#,
    );
    fails("snapkv+k=f16(center)", "k=f16: f16 = center, must be without options: it stores rows as they are");
    fails("snapkv+v=int4(centre)", "v=int4: int4 = centre, must be center, hadamard or plain");
    fails("full+layers=0..2", "layers=0..2: k and v = nothing, must be given, at least one of them");
    fails(
        "full+layers=0..2(q=int8)",
        "layers=0..2: q = int8, must be one of the arguments heads, group, k, v",
    );
    fails(
        "full+layers=0-2(k=int8)",
        "layers=0-2: layers = 0-2, must be a layer or head such as 5 or -1, or a range of them such as 0..2, -2.. or ..4",
    );
    fails("full+exact=int8", "full+exact=int8: exact = int8, must be f32, f16 or bf16");
    fails("full+safe(k=int8)", "safe: k = int8, must be left out: safe takes no arguments");
    fails("snapkv+sinks=-1", "snapkv+sinks=-1: sinks = -1, must be a whole number, at least 0");
    fails(
        "snapkv+when=daily",
        "snapkv+when=daily: when = daily, must be prefill, chunk, every(n=16), over(slack=32) or never",
    );
    fails("snapkv+when=every(n=0)", "every: n = 0, must be a whole number, at least 1");
}

#[test]
fn conflicts_name_the_option_to_change() {
    for recipe in [
        "adakv+positions=renumber",
        "pyramid+positions=renumber",
        "positions=renumber+h2o+adakv",
        "duo(share=0)+positions=renumber",
    ] {
        let error = Recipe::parse(recipe).unwrap_err();
        assert!(matches!(error, RecipeError::Conflict { .. }), "{error:?}");
        assert!(error.to_string().contains("alloc=uniform"), "{error}");
    }
    for recipe in ["streaming+positions=renumber+k=int8", "streaming+safe+positions=renumber"] {
        let error = Recipe::parse(recipe).unwrap_err();
        assert!(matches!(error, RecipeError::Conflict { .. }), "{error:?}");
        assert!(error.to_string().contains("packed keys"), "{error}");
    }
    assert!(Recipe::parse("streaming+positions=renumber+v=int8").is_ok());
    for recipe in ["full+adakv", "full+sinks=4", "recent=4+full"] {
        let error = Recipe::parse(recipe).unwrap_err();
        assert!(matches!(error, RecipeError::Conflict { .. }), "{error:?}");
        assert!(error.to_string().contains("not made of stages"), "{error}");
    }
}

#[test]
fn recipes_in_code() {
    let recipe = Recipe::new(Arc::new(Full)).k(DType::F16).v(DType::Bf16);
    assert_eq!(recipe.to_string(), "full+k=f16+v=bf16");
    let recipe =
        recipe.positions(PositionMode::Renumber).schedule(Schedule { chunk: true, ..Schedule::NEVER });
    assert_eq!(recipe.to_string(), "full+k=f16+v=bf16+when=chunk+positions=renumber");
    let parsed: Recipe = "snapkv+sinks=4".parse().unwrap();
    assert_eq!((parsed.policy.name(), parsed.policy.protected()), ("snapkv+sinks=4", (4, 64)));
    let mut other = parsed.clone();
    other.policy = Arc::new(Full);
    assert_eq!(other.to_string(), "full", "the text follows the policy");
}

#[test]
fn a_registry_can_be_extended() {
    fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
        if args.real("weight")? == 0.5 {
            return Err(args.error("weight", 0.5, "anything else"));
        }
        assert!(args.word("weight").is_err() && args.count("nothing").is_err());
        Ok(Arc::new(Knorm))
    }
    const MINE: Entry = Entry {
        name: "mine",
        summary: "an example",
        source: "this test",
        needs: "nothing",
        args: &[Arg::real("weight", 1.0, -2.0, 2.0, "unused")],
        build: Build::Score { schedule: Schedule::NEVER, build },
    };
    let registry = Registry::builtin().with(MINE);
    let recipe = Recipe::parse_with("mine(weight=-1)+adakv", &registry).unwrap();
    assert_eq!(recipe.to_string(), "mine(weight=-1)+alloc=adakv");
    assert_eq!(recipe.schedule, Schedule::NEVER);
    let error = Recipe::parse_with("mine(weight=0.5)", &registry).unwrap_err().to_string();
    assert_eq!(error, "mine: weight = 0.5, must be anything else");
    assert!(Recipe::parse("mine").is_err());
    let shadowing = registry.with(Entry { name: "knorm", ..MINE });
    assert_eq!(shadowing.iter().filter(|e| e.name == "knorm").count(), 1);
    assert!(Recipe::parse_with("knorm(weight=2)", &shadowing).is_ok());
}

#[test]
fn very_long_recipes_are_refused_shortly() {
    let error = Recipe::parse(&"snapkv+".repeat(100_000)).unwrap_err().to_string();
    assert!(error.len() < 200 && error.contains("at most 4096 characters"), "{error}");
    assert!(Recipe::parse(&"(".repeat(4000)).is_err());
    assert!(Recipe::parse(&format!("snapkv{}", "+sinks=1".repeat(400))).is_ok());
}

/// An argument as written in a recipe.
fn argument(arg: Arg) -> BoxedStrategy<String> {
    match arg.accepts {
        Accepts::Count { min, max } => (min..=max).prop_map(move |n| format!("{}={n}", arg.name)).boxed(),
        // What has no bound is drawn from a range that has one.
        Accepts::Real { min, max } => {
            (min.max(-1e9)..=max.min(1e9)).prop_map(move |x| format!("{}={x}", arg.name)).boxed()
        }
        Accepts::Word(words) => {
            prop::sample::select(words).prop_map(move |w| format!("{}={w}", arg.name)).boxed()
        }
    }
}

fn entry(which: fn(&Build) -> bool) -> BoxedStrategy<String> {
    let entries: Vec<Entry> = Registry::builtin().iter().filter(|e| which(&e.build)).copied().collect();
    prop::sample::select(entries)
        .prop_flat_map(|entry| {
            let args: Vec<_> = entry.args.iter().map(|a| prop::option::of(argument(*a))).collect();
            args.prop_map(move |args| {
                let args: Vec<String> = args.into_iter().flatten().collect();
                format!("{}({})", entry.name, args.join(", "))
            })
        })
        .boxed()
}

fn stage() -> impl Strategy<Value = String> {
    const FIXED: &[&str] = &[
        "k=f16",
        "v=bf16",
        "k=f32",
        "k=int8",
        "v = int4 ( hadamard , center )",
        "v=lm2(plain)",
        "layers=-2..(k=q8_0, v=kivi2(center))",
        "layers = 3 ( heads=..-1, group=0, v=lm4(center) )",
        "exact=f32(tail=0)",
        "exact=bf16",
        "safe",
        "balanced",
        "compact",
        "when=prefill",
        "when=chunk",
        "when=never",
        "positions=keep",
        "positions=renumber",
    ];
    prop_oneof![
        prop::sample::select(FIXED).prop_map(str::to_owned),
        (0usize..1000).prop_map(|n| format!("sinks={n}")),
        (0usize..1000).prop_map(|n| format!("recent = {n}")),
        (1usize..1000).prop_map(|n| format!("when=every( n={n} )")),
        any::<usize>().prop_map(|n| format!("when=over(slack={n})")),
        entry(|b| matches!(b, Build::Allocate { .. })),
    ]
}

proptest! {
    #[test]
    fn canonical_text_parses_back_to_the_same_recipe(
        policy in entry(|b| !matches!(b, Build::Allocate { .. })),
        stages in prop::collection::vec(stage(), 0..6),
        at in any::<prop::sample::Index>(),
    ) {
        let mut terms = stages;
        terms.insert(at.index(terms.len() + 1), policy);
        // Conflicts and even kernels are refused; all else must come back the same.
        if let Ok(recipe) = Recipe::parse(&terms.join(" + ")) {
            let text = recipe.to_string();
            let again = Recipe::parse(&text).unwrap();
            prop_assert_eq!(again.to_string(), text);
            prop_assert_eq!(
                (&again.precision, again.schedule, again.positions),
                (&recipe.precision, recipe.schedule, recipe.positions)
            );
            prop_assert_eq!(format!("{:?}", again.policy), format!("{:?}", recipe.policy));
        }
    }

    #[test]
    fn any_text_gives_a_recipe_or_an_error(text in ".{0,60}") {
        let _ = Recipe::parse(&text);
        let _ = text.parse::<Budget>();
    }

    #[test]
    fn nearly_right_text_gives_a_recipe_or_an_error(
        pieces in prop::collection::vec(prop::sample::select(&[
            "snapkv", "adakv", "full", "when", "over", "k", "f16", "sinks", "window", "=", "=", "(", ")", ",", "+", "+",
            " ", "4", "-1", "1e400", "NaN", "0.5", "99999999999999999999", "é", "\u{0}", "\t",
        ][..]), 0..20),
    ) {
        let text = pieces.concat();
        if let Err(RecipeError::Syntax { column, .. }) = Recipe::parse(&text) {
            prop_assert!((1..=text.chars().count() + 1).contains(&column));
        }
    }

    #[test]
    fn budgets_print_what_they_parse(n in 1usize.., percent in 0.001f64..=100.0, bytes in 1usize..1 << 50) {
        for budget in [Budget::Tokens(n), Budget::Fraction(percent / 100.0), Budget::Bytes(bytes)] {
            prop_assert_eq!(budget.to_string().parse::<Budget>().unwrap(), budget, "{}", budget);
        }
    }
}

#[test]
fn budgets() {
    for (text, budget, print) in [
        ("1024", Budget::Tokens(1024), "1024"),
        (" 25% ", Budget::Fraction(0.25), "25%"),
        ("7%", Budget::Fraction(0.07), "7%"),
        ("12.5 %", Budget::Fraction(0.125), "12.5%"),
        ("100%", Budget::Fraction(1.0), "100%"),
        ("64MiB", Budget::Bytes(64 << 20), "64MiB"),
        ("1.5GiB", Budget::Bytes(3 << 29), "1536MiB"),
        ("2MB", Budget::Bytes(2_000_000), "2000000B"),
        ("10kB", Budget::Bytes(10_000), "10000B"),
        ("1 B", Budget::Bytes(1), "1B"),
    ] {
        assert_eq!(text.parse::<Budget>().unwrap(), budget, "{text}");
        assert_eq!(budget.to_string(), print, "{text}");
    }
    for bad in [
        "",
        "0",
        "-5",
        "%",
        "0%",
        "101%",
        "NaN%",
        "1e9",
        "64 Mib",
        "12 parsecs",
        "1.5",
        "99999999GiB",
        "..%",
        "٣%",
        "0B",
        "0.5B",
    ] {
        let error = bad.parse::<Budget>().unwrap_err();
        assert!(matches!(&error, RecipeError::Budget { .. }), "{error:?}");
        assert!(error.to_string().contains("64MiB"), "{bad}: {error}");
    }
    let long = "9".repeat(10_000).parse::<Budget>().unwrap_err().to_string();
    assert!(long.len() < 300, "{long}");
}

#[test]
fn fractions_round_down_but_not_by_binary_accident() {
    let tokens = |text: &str, prompt| text.parse::<Budget>().unwrap().tokens(prompt);
    assert_eq!(tokens("29%", 100), Some(29));
    assert_eq!(tokens("25%", 1023), Some(255));
    assert_eq!(tokens("100%", 77), Some(77));
    assert_eq!(tokens("0.01%", 77), Some(0));
    assert_eq!(tokens("12", 77), Some(12));
    assert_eq!(tokens("64MiB", 77), None);
}
