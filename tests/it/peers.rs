//! Scores and kept sets against NVIDIA kvpress 0.5.5 on recorded Q, K and V of SmolLM2-135M.
//!
//! `tests/golden/smollm2-small.*`: layers 0 and 20, 320 prompt tokens. The larger `smollm2-visible.*` (four
//! layers, 1,024 tokens) are read where they are: `$KVSIEVE_SHARED/data` or `../shared/data`.

use kvsieve::backend::{Backend, Cpu, Reference};
use kvsieve::geometry::{LayerShape, Rotary, RotaryLayout};
use kvsieve::kernel::rope::{RopeArgs, RopeTarget};
use kvsieve::policy::registry::{Args, Build, Registry};
use kvsieve::policy::{FeedKind, LayerScores, Scorer};
use kvsieve::recipe::Recipe;
use kvsieve::testing::layer::LayerCase;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Two softmaxes in `f32` with differently ordered sums, over logits of up to some tens: 1e-4 of the value,
/// and for vanishing weights 1e-7 of the head's largest.
const RELATIVE: f32 = 1e-4;
const OF_LARGEST: f32 = 1e-7;

struct Recording {
    trace: Vec<u8>,
    peer: Vec<u8>,
    meta: HashMap<String, String>,
}

impl Recording {
    fn open(folder: &Path, stem: &str) -> Option<Self> {
        let read = |kind: &str| std::fs::read(folder.join(format!("{stem}.{kind}.safetensors"))).ok();
        let (trace, peer) = (read("trace")?, read("kvpress")?);
        let (_, header) = SafeTensors::read_metadata(&trace).unwrap();
        let meta = header.metadata().clone().unwrap();
        Some(Self { trace, peer, meta })
    }

    fn number(&self, key: &str) -> usize {
        self.meta[key].parse().unwrap()
    }

    fn layers(&self) -> Vec<usize> {
        serde_json::from_str(&self.meta["layers"]).unwrap()
    }

    fn bytes(file: &[u8], name: &str) -> Vec<u8> {
        SafeTensors::deserialize(file).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn floats(file: &[u8], name: &str) -> Vec<f32> {
        Self::bytes(file, name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn peer_scores(&self, layer: usize, press: &str) -> Vec<f32> {
        Self::floats(&self.peer, &format!("layers.{layer}.score.{press}"))
    }

    /// The prompt of one layer as a policy sees it, all its queries recorded.
    fn layer<'a>(&self, backend: &'a dyn Backend, layer: usize, scorer: &dyn Scorer) -> LayerCase<'a> {
        let (hq, h, d) = (self.number("q_heads"), self.number("kv_heads"), self.number("head_dim"));
        let (prompt, all) =
            (self.number("prompt_len"), self.number("prompt_len") + self.number("decode_len"));
        let rotary = Rotary::new(d, self.meta["rope_theta"].parse().unwrap(), RotaryLayout::HalfSplit);
        let mut shape = LayerShape::new(hq, h, d).with_rotary(rotary.clone());
        shape.scale = self.meta["scale"].parse().unwrap();
        let mut case = LayerCase::new(backend, shape, scorer.columns());
        let keys = Self::floats(&self.peer, &format!("layers.{layer}.k_post"));
        let values = Self::floats(&self.trace, &format!("layers.{layer}.v"));
        let positions: Vec<i32> = (0..prompt as i32).collect();
        for head in 0..h {
            let rows = head * all * d..(head * all + prompt) * d;
            case.append(head, &positions, &keys[rows.clone()], &values[rows]).unwrap();
        }
        let queries = Self::floats(&self.trace, &format!("layers.{layer}.q_pre"));
        let mut queries: Vec<f32> =
            queries.chunks_exact(all * d).flat_map(|head| head[..prompt * d].to_vec()).collect();
        backend
            .rope(&mut RopeArgs {
                layout: rotary.layout,
                dims: rotary.dims,
                table: &rotary.table((0..hq).flat_map(|_| 0..prompt as i32)),
                target: RopeTarget::Dense { rows: &mut queries, dim: d },
            })
            .unwrap();
        case.record(queries, positions);
        if scorer.needs().feed != FeedKind::None {
            case.feed(scorer.needs().feed, |feed, columns| scorer.observe(feed, columns)).unwrap();
        }
        case
    }
}

fn scorer(name: &str, args: &[(&str, &str)]) -> Arc<dyn Scorer> {
    let registry = Registry::builtin();
    let entry = registry.find(name).unwrap();
    let mut values = Args::defaults(name, entry.args);
    args.iter().for_each(|(k, v)| values.set(k, v).unwrap());
    let Build::Score { build, .. } = entry.build else { panic!("{name} is no scorer") };
    build(&values).unwrap()
}

fn tolerance(peer: f32, largest: f32) -> f32 {
    RELATIVE * peer.abs() + OF_LARGEST * largest
}

/// The last `sentinels` entries carry the peer's protection score instead of their own.
#[track_caller]
fn compare(what: &str, ours: &LayerScores, peer: &[f32], sentinels: usize) {
    let n = ours.lengths[0];
    for head in 0..ours.lengths.len() {
        let (a, b) = (&ours.head(head)[..n - sentinels], &peer[head * n..(head + 1) * n - sentinels]);
        let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (slot, (a, b)) in a.iter().zip(b).enumerate() {
            assert!(
                (a - b).abs() <= tolerance(*b, largest),
                "{what}, head {head}, slot {slot}: {a}, the peer has {b}"
            );
        }
    }
}

/// The best `n` of each head, as the peer selects; and how far from the last of them a difference is a tie.
#[track_caller]
fn compare_kept(what: &str, plan: &kvsieve::plan::LayerPlan, peer: &[f32], n: usize) {
    for (head, plan) in plan.heads.iter().enumerate() {
        let scores = &peer[head * plan.rows..(head + 1) * plan.rows];
        let mut order: Vec<usize> = (0..plan.rows).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let last = scores[order[n - 1]];
        assert_eq!(plan.keep.len(), n, "{what}, head {head}");
        for &slot in &order[..n] {
            let tie = (scores[slot] - last).abs() <= 2.0 * tolerance(last, last.abs());
            assert!(
                plan.keep.contains(&(slot as u32)) || tie,
                "{what}, head {head}: slot {slot} was dropped"
            );
        }
    }
}

/// A press of the peer that is built here too.
struct Press {
    /// Its name there.
    press: &'static str,
    /// Our recipe.
    name: &'static str,
    args: &'static [(&'static str, &'static str)],
    /// Last entries that carry a protection score there.
    sentinels: usize,
}

const PRESSES: &[Press] = &[
    Press { press: "snapkv", name: "snapkv", args: &[], sentinels: 64 },
    Press {
        press: "snapkv_w32_k7",
        name: "snapkv",
        args: &[("window", "32"), ("kernel", "7")],
        sentinels: 32,
    },
    Press { press: "tova", name: "tova", args: &[], sentinels: 1 },
    Press { press: "knorm", name: "knorm", args: &[], sentinels: 0 },
    Press {
        press: "observed_attention",
        name: "h2o",
        args: &[("norm", "visibility"), ("recent_share", "0")],
        sentinels: 0,
    },
];

fn check(backend: &dyn Backend, recording: &Recording) {
    let prompt = recording.number("prompt_len");
    for layer in recording.layers() {
        for Press { press, name, args, sentinels } in PRESSES {
            let scorer = scorer(name, args);
            let case = recording.layer(backend, layer, &*scorer);
            let peer = recording.peer_scores(layer, press);
            let what = format!("{press}, layer {layer}, {}", backend.name());
            compare(&what, &scorer.score(&case.view(prompt / 2)).unwrap(), &peer, *sentinels);
            let args: Vec<String> = args.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let recipe = Recipe::parse(&format!("{name}({})", args.join(","))).unwrap();
            for n in [prompt / 2, prompt / 4] {
                let plan = recipe.policy.plan(&case.view(n)).unwrap();
                compare_kept(&format!("{what}, {n} kept"), &plan, &peer, n);
            }
        }
        check_streaming(backend, recording, layer);
        check_adakv(backend, recording, layer);
    }
}

fn check_streaming(backend: &dyn Backend, recording: &Recording, layer: usize) {
    let scorer = scorer("streaming", &[]);
    let case = recording.layer(backend, layer, &*scorer);
    // The peer's 0/1 scores were taken at half of the prompt.
    let view = case.view(recording.number("prompt_len") / 2);
    assert_eq!(scorer.score(&view).unwrap().values, recording.peer_scores(layer, "streaming"));
}

fn check_adakv(backend: &dyn Backend, recording: &Recording, layer: usize) {
    let recipe = Recipe::parse("adakv").unwrap();
    let case = recording.layer(backend, layer, &*scorer("snapkv", &[]));
    let prompt = recording.number("prompt_len");
    // The peer names its masks by the share it drops.
    for (dropped, target) in [("0.5", prompt / 2), ("0.75", prompt / 4)] {
        let keep = Recording::bytes(&recording.peer, &format!("layers.{layer}.adakv_keep.{dropped}"));
        let plan = recipe.policy.plan(&case.view(target)).unwrap();
        assert_eq!(plan.kept(), keep.iter().map(|&k| usize::from(k)).sum::<usize>());
        let mine = |i: usize| plan.heads[i / prompt].keep.contains(&((i % prompt) as u32));
        let differing: Vec<usize> = (0..keep.len()).filter(|&i| mine(i) != (keep[i] != 0)).collect();
        // What differs must be a tie at the border between kept and dropped.
        let scores = recording.peer_scores(layer, "snapkv");
        let kept = (0..keep.len()).filter(|&i| keep[i] != 0).map(|i| scores[i]);
        let border = kept.fold(f32::INFINITY, f32::min);
        for i in differing {
            let tie = (scores[i] - border).abs() <= 2.0 * tolerance(border, border);
            assert!(tie, "adakv {dropped}, layer {layer}: head {}, slot {}", i / prompt, i % prompt);
        }
    }
}

fn small() -> Recording {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    Recording::open(&folder, "smollm2-small").expect("tests/golden/smollm2-small.{trace,kvpress}.safetensors")
}

#[test]
fn kvpress_on_the_reference() {
    check(&Reference::default(), &small());
}

#[test]
fn kvpress_on_the_cpu() {
    check(&Cpu::default(), &small());
}

#[cfg(feature = "gpu")]
#[test]
fn kvpress_on_the_gpu() {
    if let Some(gpu) = crate::support::shared_gpu() {
        check(&*gpu, &small());
    }
}

#[test]
fn kvpress_on_a_longer_prompt() {
    let shared = std::env::var_os("KVSIEVE_SHARED").map_or_else(|| PathBuf::from("../shared"), PathBuf::from);
    match Recording::open(&shared.join("data"), "smollm2-visible") {
        Some(recording) => {
            check(&Cpu::default(), &recording);
            #[cfg(feature = "gpu")]
            if let Some(gpu) = crate::support::shared_gpu() {
                check(&*gpu, &recording);
            }
        }
        // The larger recording is not part of the repository.
        None => eprintln!("skipped: no smollm2-visible.* below {}", shared.display()),
    }
}
