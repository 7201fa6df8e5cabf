//! The program from outside: exit status, messages, and the contract of `replay`.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PROMPT: usize = 320;
const DECODE: usize = 16;
const QUERY_HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;

fn kvsieve(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvsieve")).args(args).output().unwrap()
}

#[track_caller]
fn stdout(args: &[&str]) -> String {
    let output = kvsieve(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The message of a command that must fail.
#[track_caller]
fn failure(args: &[&str]) -> String {
    let output = kvsieve(args);
    assert!(!output.status.success(), "{args:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
    assert!(output.stdout.is_empty(), "{args:?} failed but printed a result");
    String::from_utf8(output.stderr).unwrap()
}

fn golden(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    path.to_str().unwrap().to_owned()
}

/// A file of this test run.
fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

struct Replayed {
    json: Value,
    bytes: Vec<u8>,
}

impl Replayed {
    #[track_caller]
    fn of(name: &str, args: &[&str]) -> Self {
        let out = scratch(name);
        let trace = golden("smollm2-small.trace.safetensors");
        let fixed = ["replay", "--trace", &trace, "--json", "--out", out.to_str().unwrap()];
        let text = stdout(&[&fixed[..], args].concat());
        Self { json: serde_json::from_str(&text).unwrap(), bytes: std::fs::read(out).unwrap() }
    }

    fn tensor(&self, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let mut names: Vec<String> = tensors.names().into_iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.tensor(name).2.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn integers(&self, name: &str) -> Vec<i32> {
        self.tensor(name).2.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn total(&self, field: &str) -> f64 {
        self.json["total"][field].as_f64().unwrap_or_else(|| panic!("{field} in {}", self.json))
    }
}

#[test]
fn help_teaches_and_wrong_arguments_fail() {
    for command in [
        &["--help"][..],
        &["replay", "--help"],
        &["run", "--help"],
        &["eval", "--help"],
        &["policies", "--help"],
    ] {
        assert!(stdout(command).contains("Examples:"), "{command:?}");
    }
    assert!(failure(&["sieve"]).contains("sieve"));
    assert!(failure(&["replay"]).contains("--trace"));
}

#[test]
fn policies_are_listed_as_table_and_json() {
    let list: Value = serde_json::from_str(&stdout(&["policies", "--json"])).unwrap();
    let list = list.as_array().unwrap();
    let table = stdout(&["policies"]);
    for entry in list {
        let name = entry["name"].as_str().unwrap();
        assert!(table.contains(name), "{name}");
        for field in ["kind", "summary", "source", "needs"] {
            assert!(!entry[field].as_str().unwrap().is_empty(), "{name}: {field}");
        }
        assert_eq!(entry["page"], format!("docs/policies/{name}.md"));
        assert!(entry["args"].is_array());
    }
    assert!(list.iter().any(|entry| entry["name"] == "snapkv" && entry["args"][0]["name"].is_string()));
    assert!(stdout(&["policies", "snapkv"]).contains("window"));
    assert!(failure(&["policies", "snapvk"]).contains("snapkv"), "the message lists what there is");
}

#[test]
fn replay_of_the_full_cache_is_exact_and_writes_no_scores() {
    let full = Replayed::of("full.safetensors", &["--recipe", "full"]);
    assert!(full.total("output_error") < 1e-5, "{}", full.json);
    assert!((full.total("mass_recall") - 1.0).abs() < 1e-5);
    assert_eq!(full.json["total"]["missing_mass"], Value::Null);
    assert_eq!(full.total("entries"), (2 * KV_HEADS * PROMPT) as f64);
    assert_eq!(full.json["layers"].as_array().unwrap().len(), 2);
    assert_eq!(full.json["layers"][1]["layer"], 20);
    assert!(!full.names().iter().any(|name| name.contains("scores")));
}

/// ‖ours − theirs‖ / ‖theirs‖ of every decode row, on the attention that another implementation computed of the same
/// trace.
fn row_errors(replayed: &Replayed) -> Vec<f64> {
    let bytes = std::fs::read(golden("smollm2-small.kvpress.safetensors")).unwrap();
    let peer = SafeTensors::deserialize(&bytes).unwrap();
    let mut errors = Vec::new();
    for layer in [0, 20] {
        let want = peer.tensor(&format!("layers.{layer}.attend")).unwrap();
        let want: Vec<f32> =
            want.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let got = replayed.floats(&format!("layers.{layer}.out"));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.chunks_exact(DIM).zip(want.chunks_exact(DIM)) {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let off: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
            errors.push((off / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt());
        }
    }
    errors
}

#[test]
fn exact_attention_agrees_with_another_implementation_on_every_backend() {
    for backend in ["reference", "cpu", "gpu"] {
        let replay = |recipe: &str| {
            let name = format!("{recipe}-{backend}.safetensors");
            Replayed::of(&name, &["--recipe", recipe, "--backend", backend])
        };
        let worst = row_errors(&replay("full")).into_iter().fold(0.0, f64::max);
        assert!(worst < 1e-4, "f32 on {backend}: {worst:e}");
        // What halves promise is `output_error`, the mean over rows. Single rows whose logits nearly cancel err more:
        // by the rounding of their keys, which no kernel can undo (docs/numerics.md).
        let half = replay("full+k=f16+v=f16");
        let errors = row_errors(&half);
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        assert!(
            mean < 2e-3 && half.total("output_error") < 2e-3,
            "f16 on {backend}: {mean:e}, {}",
            half.json
        );
        let worst = errors.into_iter().fold(0.0, f64::max);
        assert!(worst < 4e-3, "f16 on {backend}: {worst:e}");
    }
}

#[test]
fn replay_keeps_the_contract_of_its_output() {
    let snap = Replayed::of("snapkv.safetensors", &["--recipe", "snapkv(window=32)", "--budget", "25%"]);
    let fields = [
        "output_error",
        "mass_recall",
        "bytes_logical",
        "bytes_resident",
        "bytes_read_per_step",
        "seconds_per_step",
        "entries",
    ];
    for field in fields {
        assert!(snap.total(field) > 0.0, "{field}");
        assert!(snap.json["layers"][0][field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert_eq!(snap.json["recipe"], "snapkv(window=32)");
    assert_eq!(snap.json["backend"], "cpu");
    assert!(snap.total("mass_recall") < 1.0 && snap.total("mass_recall") > 0.3, "{}", snap.json);
    for layer in [0, 20] {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let shape = |part: &str| {
            let (dtype, shape, _) = snap.tensor(&name(part));
            (dtype, shape)
        };
        assert_eq!(shape("scores"), (Dtype::F32, vec![KV_HEADS, PROMPT]));
        assert_eq!(shape("out"), (Dtype::F32, vec![QUERY_HEADS, DECODE, DIM]));
        assert_eq!(shape("kept.offsets"), (Dtype::I32, vec![KV_HEADS + 1]));
        let (offsets, positions) =
            (snap.integers(&name("kept.offsets")), snap.integers(&name("kept.positions")));
        assert_eq!(offsets, [0, 80, 160, 240], "25 % of 320 tokens");
        assert_eq!(shape("kept.positions"), (Dtype::I32, vec![240]));
        for head in positions.chunks_exact(80) {
            assert!(
                head.windows(2).all(|p| p[0] < p[1]) && head.iter().all(|p| (0..PROMPT as i32).contains(p))
            );
            assert!((PROMPT as i32 - 32..PROMPT as i32).all(|p| head.contains(&p)), "the window stays");
        }
        assert!(snap.floats(&name("scores")).iter().all(|x| !x.is_nan()));
    }
}

#[test]
fn replay_scores_the_whole_prompt_of_recipes_that_bound_it() {
    let streaming =
        Replayed::of("streaming.safetensors", &["--recipe", "streaming", "--budget", "64", "--layers", "20"]);
    assert_eq!(streaming.json["layers"].as_array().unwrap().len(), 1);
    let scores = streaming.floats("layers.20.scores");
    assert_eq!(scores.iter().filter(|x| **x == 1.0).count(), KV_HEADS * 64);
    assert_eq!(streaming.integers("layers.20.kept.offsets"), [0, 64, 128, 192]);
    assert!(!streaming.names().iter().any(|name| name.starts_with("layers.0.")));
}

#[test]
fn renumbered_caches_report_the_tokens_they_kept() {
    let args = ["--budget", "64", "--layers", "20", "--recipe"];
    let keep = Replayed::of("keep.safetensors", &[&args[..], &["snapkv"]].concat());
    let renumber =
        Replayed::of("renumber.safetensors", &[&args[..], &["snapkv+positions=renumber"]].concat());
    assert_eq!(keep.integers("layers.20.kept.positions"), renumber.integers("layers.20.kept.positions"));
    assert!((keep.total("mass_recall") - renumber.total("mass_recall")).abs() < 1e-9);
    assert!(renumber.total("output_error") != keep.total("output_error"));
}

#[test]
fn backends_agree() {
    let on = |backend: &str| {
        let args = ["--recipe", "snapkv", "--budget", "80", "--backend", backend];
        Replayed::of(&format!("{backend}.safetensors"), &args)
    };
    let reference = on("reference");
    let mut others = vec![on("cpu")];
    if cfg!(feature = "gpu") {
        if std::env::var("KVSIEVE_ALLOW_NO_GPU").is_ok_and(|v| v == "1") {
            eprintln!("NOT CHECKED: --backend gpu, because KVSIEVE_ALLOW_NO_GPU=1");
        } else {
            others.push(on("gpu"));
        }
    }
    for other in others {
        for layer in [0, 20] {
            let name = format!("layers.{layer}.kept.positions");
            assert_eq!(reference.integers(&name), other.integers(&name), "{}", other.json["backend"]);
        }
        let difference = (reference.total("output_error") - other.total("output_error")).abs();
        assert!(difference < 1e-5, "{}: {difference}", other.json["backend"]);
    }
}

#[test]
fn replay_errors_name_what_to_change() {
    let trace = golden("smollm2-small.trace.safetensors");
    let out = scratch("never.safetensors");
    let out = out.to_str().unwrap();
    let replay = |args: &[&str]| failure(&[&["replay", "--trace", &trace, "--out", out][..], args].concat());
    assert!(replay(&["--recipe", "snapkv"]).contains("25%"), "no budget");
    assert!(replay(&["--recipe", "snapvk", "--budget", "25%"]).contains("snapkv"));
    assert!(replay(&["--recipe", "snapkv(windw=3)", "--budget", "25%"]).contains("window"));
    assert!(replay(&["--recipe", "snapkv", "--budget", "a few"]).contains("budget"));
    assert!(replay(&["--recipe", "full", "--layers", "3"]).contains("[0, 20]"));
    assert!(!Path::new(out).exists());
    let missing = failure(&["replay", "--trace", "nowhere.safetensors", "--recipe", "full", "--out", out]);
    assert!(missing.contains("nowhere.safetensors"));
    let text = scratch("text.safetensors");
    std::fs::write(&text, "not tensors").unwrap();
    let broken = failure(&["replay", "--trace", text.to_str().unwrap(), "--recipe", "full", "--out", out]);
    assert!(broken.contains("text.safetensors"));
}

#[test]
fn eval_and_run_refuse_before_they_load_a_model() {
    assert!(failure(&["eval", "--figure", "kl.gif", "--budget", "25%"]).contains(".svg"));
    assert!(failure(&["eval", "--depth", "2", "--task", "span-copy", "--budget", "25%"]).contains("depth"));
    assert!(failure(&["eval", "--prompt-tokens", "64,128", "--budget", "25%"]).contains("--prompt-tokens"));
    assert!(failure(&["run", "--model", "nowhere.gguf", "--budget", "25%"]).contains("nowhere.gguf"));
}

fn model() -> Option<String> {
    Some(support::model("the program on a real model")?.to_str().unwrap().to_owned())
}

/// Prose that is at hand: this repository's own.
fn long_text() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    ["docs/architecture.md", "docs/numerics.md", "README.md"].map(page).join("\n")
}

#[test]
fn eval_measures_a_real_model() {
    let Some(model) = model() else { return };
    let text = scratch("pages.txt");
    std::fs::write(&text, long_text()).unwrap();
    let figure = scratch("kl.svg");
    let sizes = ["--prompt-tokens", "256", "--score-tokens", "16", "--samples", "2"];
    let common =
        ["eval", "--json", "--model", &model, "--text", text.to_str().unwrap(), "--budget", "50%,20%"];
    let rows = stdout(
        &[&common[..], &sizes, &["--recipe", "full,snapkv", "--figure", figure.to_str().unwrap()]].concat(),
    );
    let rows: Value = serde_json::from_str(&rows).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3, "full once, snapkv twice");
    assert!(rows[0]["kl"].as_f64().unwrap() < 1e-6 && rows[0]["same_top1"] == 1.0, "{}", rows[0]);
    assert!(rows[1]["kl"].as_f64().unwrap() > 0.0);
    let kept = |row: &Value| row["entries_per_head"].as_f64().unwrap();
    assert_eq!((kept(&rows[0]), kept(&rows[1]), kept(&rows[2])), (256.0, 128.0, 51.0));
    assert!(rows[2]["kv_bytes_resident"].as_u64() < rows[1]["kv_bytes_resident"].as_u64());
    assert!(std::fs::read_to_string(figure).unwrap().contains("<svg"));

    let span = [
        "--task",
        "span-copy",
        "--recipe",
        "streaming",
        "--prompt-tokens",
        "256",
        "--offset",
        "100",
        "--depth",
        "0.3",
    ];
    let rows: Value = serde_json::from_str(&stdout(&[&common[..], &span].concat())).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 6, "full and two budgets, one depth and fresh");
    let nll = |i: usize| rows[i]["nll"].as_f64().unwrap();
    assert!(nll(0) < nll(1), "the full cache copies better than it guesses: {} {}", nll(0), nll(1));
    assert!(nll(0) < nll(4), "streaming at 20 % has lost the passage: {} {}", nll(0), nll(4));
}

#[test]
fn guard_says_what_packing_does_layer_by_layer() {
    let Some(model) = model() else { return };
    let text = scratch("guard.txt");
    std::fs::write(&text, long_text()).unwrap();
    let common = ["eval", "--task", "guard", "--model", &model, "--text", text.to_str().unwrap()];
    let sizes = ["--prompt-tokens", "300", "--score-tokens", "16"];
    let recipe = ["--recipe", "full+k=lm2+v=int8+layers=0(k=f32,v=f32)", "--threshold", "0.02"];
    let json = stdout(&[&common[..], &sizes, &recipe, &["--json"]].concat());
    let rows: Value = serde_json::from_str(&json).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 30 * KV_HEADS);
    let get = |row: &Value, field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{row}"));
    for row in rows {
        let exact = row["layer"] == 0;
        assert_eq!(get(row, "key_error") == 0.0, exact, "{row}");
        assert_eq!(get(row, "output_error") == 0.0, exact, "{row}");
        assert!(
            exact || get(row, "key_error") > 10.0 * get(row, "value_error"),
            "two bits against eight: {row}"
        );
        assert_eq!(row["upgraded"].is_string(), get(row, "output_error") > 0.02, "{row}");
    }
    assert!(rows.iter().any(|row| row["upgraded"] == "int8(center,hadamard)/f16"), "{json}");
    let table = stdout(&[&common[..], &sizes, &["--recipe", "full+safe"]].concat());
    assert!(table.contains("key error") && table.lines().count() == 2 + 30, "{table}");
    let plain = failure(&[&common[..], &sizes, &["--recipe", "full+k=f16"]].concat());
    assert!(plain.contains("packs nothing"), "{plain}");
}

#[test]
fn windows_count_what_storage_costs() {
    let Some(model) = model() else { return };
    let text = scratch("windows.txt");
    std::fs::write(&text, long_text()).unwrap();
    let recipes = "full,full+k=f16+v=f16,full+k=bf16+v=bf16,snapkv";
    let common = ["eval", "--task", "windows", "--model", &model, "--text", text.to_str().unwrap()];
    let sizes = [
        "--windows",
        "2",
        "--window-tokens",
        "256",
        "--chunk-tokens",
        "64",
        "--recipe",
        recipes,
        "--budget",
        "50%",
    ];
    let rows: Value = serde_json::from_str(&stdout(&[&common[..], &sizes, &["--json"]].concat())).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 4);
    let get = |i: usize, field: &str| rows[i][field].as_f64().unwrap_or_else(|| panic!("{}", rows[i]));
    let kl: Vec<f64> = (0..4).map(|i| get(i, "kl")).collect();
    assert!(kl[0] < 1e-9 && rows[0]["same_top1"] == 1.0, "f32 is the reference: {}", rows[0]);
    assert!(get(0, "nll_over_full").abs() < 1e-6, "{}", rows[0]);
    assert!(0.0 < kl[1] && kl[1] < kl[2] && kl[2] < 1e-3 && kl[2] < kl[3], "{kl:?}");
    // Positions, β and page headers come on top of the elements: a few bytes for each entry of 128 elements.
    let bits: Vec<f64> = (0..4).map(|i| get(i, "bits_per_element")).collect();
    assert!(bits[0] > 32.0 && bits[0] < 36.0 && bits[1] > 16.0 && bits[1] < 20.0, "{bits:?}");
    assert_eq!(bits[1], bits[2]);
    assert!(bits[3] < 0.9 * bits[0], "half of the first half is gone, a page of every head: {bits:?}");
    assert_eq!((get(0, "entries_per_head"), get(3, "entries_per_head")), (256.0, 192.0));

    let small =
        ["--windows", "1", "--window-tokens", "64", "--recipe", "full+k=f16+v=f16", "--chunk-tokens", "16"];
    let table = stdout(&[&common[..], &small].concat());
    assert!(
        table.contains("bits/element") && table.contains("31 predictions in 1 windows of 64 tokens"),
        "{table}"
    );
    let long = failure(&[&common[..], &["--windows", "999", "--recipe", "full"]].concat());
    assert!(long.contains("--windows"), "{long}");
}

#[test]
fn run_compares_with_the_full_cache() {
    let Some(model) = model() else { return };
    let text = scratch("document.txt");
    std::fs::write(&text, long_text()).unwrap();
    let args = [
        "run",
        "--json",
        "--model",
        &model,
        "--document",
        text.to_str().unwrap(),
        "--tokens",
        "300",
        "--question",
        "What is a slot?",
        "--recipe",
        "snapkv,xkv(group=10,keys=0.03,values=0.06)",
        "--budget",
        "25%",
        "--compare",
        "--answer-tokens",
        "6",
    ];
    let outcomes: Value = serde_json::from_str(&stdout(&args)).unwrap();
    let [full, snap, low] = &outcomes.as_array().unwrap()[..] else { panic!("{outcomes}") };
    // 58 and 116 of 1,920 features, in whole vectors.
    for (side, rank) in low["low_rank"].as_array().unwrap().iter().zip([64.0, 128.0]) {
        assert_eq!((side["groups"].as_u64(), side["factored"].as_u64()), (Some(3), Some(3)), "{low}");
        assert_eq!(side["rank"].as_f64(), Some(rank), "{low}");
        assert!((0.01..0.7).contains(&side["error"].as_f64().unwrap()), "{low}");
    }
    assert!(low["kv_bytes_resident"].as_u64() < full["kv_bytes_resident"].as_u64());
    assert!(low["kl"].as_f64().unwrap() < 0.1 && snap["low_rank"].is_null(), "{low}");
    assert_eq!((full["recipe"].as_str(), snap["recipe"].as_str()), (Some("full"), Some("snapkv")));
    assert!(snap["kl"].as_f64().is_some() && full["kl"].is_null());
    for field in ["prefill_tokens_per_second", "decode_tokens_per_second", "attention_seconds_per_token"] {
        assert!(snap[field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert!(snap["kv_bytes_resident"].as_u64() < full["kv_bytes_resident"].as_u64());
    assert!(snap["entries_per_head"].as_f64() < full["entries_per_head"].as_f64());
}
