//! The conformance suite over the host backends: every SIMD level this machine has, several thread counts.

use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::device::{HeadRows, Pool};
use kvsieve::kernel::attend::cases::{Choice, LaneSpec, cases};
use kvsieve::kernel::attend::{AttendLane, Share, Workspace};
use kvsieve::kernel::code_scores::{CodeArgs, CodeLayout};
use kvsieve::kernel::dot_scores::DotArgs;
use kvsieve::kernel::linear::{Activation, LinearArgs};
use kvsieve::kernel::merge_rows::{MergeRowsArgs, Merges, Source, Target};
use kvsieve::kernel::nearest::NearestArgs;
use kvsieve::kernel::simd::Level;
use kvsieve::kernel::{Spans, total_rows};
use kvsieve::testing::Random;
use kvsieve::testing::cache::{CacheSpec, codes, poisoned};
use kvsieve::testing::conformance::{self, Effort};
use kvsieve::view::DType;

fn expect_pass(backend: &dyn Backend, effort: Effort) {
    let report = conformance::run(backend, effort);
    println!("{report}");
    assert!(report.passed(), "{report}");
}

#[test]
fn the_reference_agrees_with_itself() {
    expect_pass(&Reference::default(), Effort::Full);
}

#[test]
fn cpu_at_the_highest_level() {
    expect_pass(&Cpu::default(), Effort::Full);
}

#[test]
fn cpu_at_every_lower_level() {
    for level in Level::available().filter(|&l| l < Level::detect()) {
        let cpu = Cpu::with_pool(Pool::current()).with_level(level);
        assert_eq!(cpu.level(), level, "a level may be lowered");
        expect_pass(&cpu, Effort::Full);
    }
}

#[test]
fn cpu_on_several_thread_counts() {
    for threads in [1, 2, 3, 8] {
        expect_pass(&Cpu::with_threads(threads).unwrap(), Effort::Quick);
    }
}

#[test]
fn a_level_is_never_raised() {
    let cpu = Cpu::default().with_level(Level::Baseline).with_level(Level::Avx512);
    assert_eq!(cpu.level(), Level::Baseline);
}

/// A machine that has vectors must use them: were detection to fail, every test above would silently test
/// the baseline only.
#[test]
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn the_detected_level_is_the_one_the_system_reports() {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags: Vec<&str> =
        info.lines().find(|l| l.starts_with("flags")).unwrap().split_whitespace().collect();
    let has = |names: &[&str]| names.iter().all(|n| flags.contains(n));
    let expected =
        if has(&["avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vnni", "vaes", "gfni", "sha_ni"])
        {
            Level::Avx512
        } else if has(&["avx2", "fma", "f16c", "bmi2", "movbe"]) {
            Level::Avx2
        } else {
            Level::Baseline
        };
    assert_eq!(Level::detect(), expected);
}

/// The promise of `Cpu`: threads change when work is done, never what is computed.
#[test]
fn the_number_of_threads_changes_no_bit() {
    same_bits(None);
    for first in 0..Choice::ALL.len() {
        same_bits(Some(first));
    }
}

/// Whole, or of the entries chosen in way `first` and those after.
fn same_bits(first: Option<usize>) {
    for case in cases().iter().filter(|c| c.name.starts_with("long") || c.name.starts_with("lanes")) {
        let run = |threads| {
            let cpu = Cpu::with_threads(threads).unwrap();
            let heads: Vec<_> = case.lanes.iter().map(|l| l.cache.build(&cpu).unwrap()).collect();
            let queries: Vec<_> =
                case.lanes.iter().zip(&heads).map(|(l, h)| l.queries(case.group, h)).collect();
            let mut outputs: Vec<_> = case.lanes.iter().map(|l| l.outputs(case.group)).collect();
            let spans: Vec<_> = case.lanes.iter().map(|l| l.spans(first.unwrap_or(0))).collect();
            let mut lanes: Vec<_> = outputs
                .iter_mut()
                .zip(heads.iter().zip(&queries))
                .zip(&spans)
                .map(|((o, (heads, queries)), spans)| AttendLane {
                    spans: first.map(|_| &**spans),
                    ..o.lane(heads, queries, Share::ALL, first.is_none())
                })
                .collect();
            cpu.attend(&case.params(), &mut lanes, &mut Workspace::default()).unwrap();
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let scores = |(lane, spec, some): (usize, &LaneSpec, bool)| {
                let (heads, queries) = (&heads[lane], &queries[lane].values);
                let runs = |head: &HeadRows| (0..head.rows() / 50).map(|i| 50 * i + 3..50 * i + 40).collect();
                let spans: Vec<Spans> = heads.iter().map(runs).collect();
                let spans = some.then_some(&spans[..]);
                let rows = spans.map_or_else(|| total_rows(heads), |s| s.iter().map(Spans::rows).sum());
                let mut out = poisoned(case.group * spec.tokens * rows);
                let mut args = DotArgs { heads, queries, tokens: spec.tokens, spans, out: &mut out };
                cpu.dot_scores(&case.params(), &mut args, &mut Workspace::default()).unwrap();
                bits(&out)
            };
            let lanes = case.lanes.iter().enumerate();
            let mut all: Vec<_> =
                lanes.flat_map(|(i, lane)| [(i, lane, false), (i, lane, true)]).map(scores).collect();
            all.extend(outputs.iter().flat_map(|o| [bits(&o.out), bits(&o.lse), bits(&o.mass)]));
            all
        };
        let one = run(1);
        for threads in [2, 5] {
            assert!(run(threads) == one, "{} on {threads} threads, {first:?}", case.name);
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit_of_scores_by_codes() {
    let rows = [9000, 0, 20_000, 100];
    for (layout, levels) in [(CodeLayout { codes: 32, bits: 4 }, 16), (CodeLayout { codes: 3, bits: 8 }, 200)]
    {
        // More query rows than are served at once.
        let (group, tokens) = (7, 3);
        let tables =
            Random::new(9).rows(rows.len() * group * tokens * layout.codes * levels, 1.0, DType::F32);
        let run = |cpu: Cpu| {
            let heads = codes(&cpu, 8, layout, &rows, 64).unwrap();
            let mut out = poisoned(group * tokens * total_rows(&heads));
            let (heads, tables) = (&heads, &tables);
            let mut args =
                CodeArgs { heads, layout, levels, tables, group, tokens, spans: None, out: &mut out };
            cpu.code_scores(&mut args, &mut Workspace::default()).unwrap();
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = run(Cpu::with_threads(1).unwrap());
        for threads in [2, 5] {
            assert!(run(Cpu::with_threads(threads).unwrap()) == one, "{layout:?} on {threads} threads");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit_of_a_layer() {
    // Several blocks of rows, and one, which is cut between outputs.
    for (rows, inputs, outputs) in [(150, 700, 130), (7, 2100, 1000), (1, 960, 1024)] {
        let mut random = Random::new(rows as u64);
        let x = random.rows(rows * inputs, 1.0, DType::F32);
        let weight = random.rows(outputs * inputs, 1.0, DType::F32);
        let bias = random.rows(outputs, 1.0, DType::F32);
        let run = |cpu: Cpu| {
            let mut out = poisoned(rows * outputs);
            let (x, weight, bias, activation) = (&x, &weight, Some(&bias[..]), Activation::Silu);
            let mut args = LinearArgs { x, weight, bias, inputs, outputs, activation, out: &mut out };
            cpu.linear(&mut args).unwrap();
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = run(Cpu::with_threads(1).unwrap());
        for threads in [2, 5] {
            assert!(run(Cpu::with_threads(threads).unwrap()) == one, "{rows} rows on {threads} threads");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit_of_what_is_merged() {
    let spec = CacheSpec::f32(3, 48, &[3000, 40], 64).typed(DType::F16, DType::Bf16);
    let (into, from): (Vec<u32>, Vec<u32>) = (0..3000).partition(|slot| slot % 5 == 0);
    let merged = |cpu: Cpu| {
        let heads = spec.build(&cpu).unwrap();
        let (mut nearest, mut cosines) = (vec![0; from.len()], poisoned(from.len()));
        let mut args = NearestArgs {
            heads: &heads[..1],
            from: &[&from],
            into: &[&into],
            nearest: &mut nearest,
            cosines: &mut cosines,
        };
        cpu.nearest(&mut args).unwrap();
        let mut merges = Merges { keys: true, ..Merges::default() };
        for (i, &slot) in into.iter().enumerate() {
            let sources = nearest.iter().zip(&from).zip(&cosines).filter(|((into, _), _)| **into == i as u32);
            let sources = sources.map(|((_, &slot), &c)| Source { slot, key: c, value: 1.0 - c });
            merges.push(Target { slot, sources: 0, key: 1.0, value: 0.5, bias: 0.0 }, sources);
        }
        let (mut keys, mut values) = (poisoned(into.len() * 48), poisoned(into.len() * 48));
        let (head, merges) = (&heads[0], &merges);
        cpu.merge_rows(&mut MergeRowsArgs { head, merges, keys: &mut keys, values: &mut values }).unwrap();
        [cosines, keys, values].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = merged(Cpu::with_threads(1).unwrap());
    for threads in [2, 5] {
        assert!(merged(Cpu::with_threads(threads).unwrap()) == one, "{threads} threads");
    }
}
