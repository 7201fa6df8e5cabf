//! `kvsieve eval --task recall` on the real model: shares are shares, reading everything is exact, certificates hold.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn eval(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvsieve"))
        .args(["eval", "--task", "recall"])
        .args(args)
        .output()
        .unwrap()
}

#[track_caller]
fn rows(args: &[&str]) -> Vec<Value> {
    let output = eval(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn failure(args: &[&str]) -> String {
    let output = eval(args);
    assert!(!output.status.success(), "{args:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

/// Prose that is at hand, and the model; `None` only if the model's absence was excused.
fn inputs() -> Option<(PathBuf, PathBuf)> {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/architecture.md");
    Some((support::model("recall")?, text))
}

#[track_caller]
fn get(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field} in {row}"))
}

/// What holds of every row, whatever the recipe.
#[track_caller]
fn sane(row: &Value) {
    let (recall, missing) = (get(row, "mass_recall"), get(row, "missing"));
    assert!(recall > 0.0 && recall <= 1.0 + 1e-6, "{row}");
    assert!((recall + missing - 1.0).abs() < 1e-5, "{row}");
    assert!(get(row, "mass_recall_p5") <= recall && get(row, "output_error_p95") >= get(row, "output_error"));
    assert_eq!(row["violations"], 0, "{row}");
    let read = get(row, "entries_read");
    assert!(read > 0.0 && read <= 1.0, "{row}");
}

#[test]
fn what_is_read_is_held_against_everything() {
    let Some((model, text)) = inputs() else { return };
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let figure = Path::new(env!("CARGO_TARGET_TMPDIR")).join("recall.svg");
    let common = ["--model", model, "--text", text, "--prompt-tokens", "600", "--samples", "1"];
    // Layer 9 shares what layer 8 chooses, which is recorded for that alone.
    let recipes = "full,pages(min_context=0),auto(min_context=0,update=16),quest(min_context=0,dense=1),\
                   pages(min_context=0,share=4),snapkv,pages(min_context=0,page=1,store=f32,tail=estimate)";
    let args = ["--score-tokens", "6", "--recipe", recipes, "--budget", "150,100%", "--layers", "9,0,29"];
    let rows = rows(&[&common[..], &args, &["--figure", figure.to_str().unwrap()]].concat());
    assert_eq!(rows.len(), 1 + 6 * 2, "full once, the others at two budgets");
    for row in &rows {
        sane(row);
        let layers = row["layers"].as_array().unwrap().iter().map(|layer| layer["layer"].as_u64().unwrap());
        assert_eq!(layers.collect::<Vec<_>>(), [0, 9, 29]);
        if row["budget"] == "150" {
            assert!(get(row, "entries_read") < 0.6 && get(row, "mass_recall") < 1.0, "{row}");
        } else {
            assert!((get(row, "mass_recall") - 1.0).abs() < 1e-6 && get(row, "entries_read") == 1.0, "{row}");
            assert!(get(row, "output_error_p95") < 1e-5, "{row}");
        }
    }
    let [_, pages, _, auto, _, quest, _, shared, _, snapkv, _, single, _] = &rows[..] else { unreachable!() };
    for index in [auto, single] {
        assert!(get(index, "output_error") < 0.5 * get(index, "output_error_without_tail"), "{index}");
        assert!(get(index, "missing_ratio") > 0.0 && get(index, "bytes_index") > 0.0, "{index}");
        assert_eq!(index["certificates"], 0);
    }
    // Where every entry is a page of its own, the estimate of what is not read is the truth.
    assert!(get(single, "output_error_p95") < 1e-4, "{single}");
    assert!((get(single, "missing_ratio") - 1.0).abs() < 1e-3, "{single}");
    assert_eq!(quest["certificates"], 2 * 6, "layer 0 is dense");
    assert_eq!(get(&quest["layers"][0], "mass_recall"), get(&rows[0]["layers"][0], "mass_recall"));
    assert!(get(&quest["layers"][1], "mass_recall") < 1.0);
    assert!(quest["output_error_without_tail"].is_null() && quest["missing_estimated"].is_null());
    assert_eq!(get(&shared["layers"][0], "mass_recall"), get(&pages["layers"][0], "mass_recall"));
    assert_ne!(get(&shared["layers"][1], "mass_recall"), get(&pages["layers"][1], "mass_recall"));
    assert_eq!(get(snapkv, "bytes_index"), 0.0);
    // 150 of 600 stay, and what came since.
    let read: f64 = (1..=6).map(|step| f64::from(150 + step) / f64::from(600 + step)).sum::<f64>() / 6.0;
    assert!((get(snapkv, "entries_read") - read).abs() < 1e-9, "{snapkv}");
    assert!(std::fs::read_to_string(figure).unwrap().contains("<svg"));

    let tiled = [
        "--score-tokens",
        "2",
        "--recipe",
        "pages(min_context=0),quest",
        "--budget",
        "10%,100%",
        "--tile",
        "1500",
    ];
    for row in self::rows(&[&common[..], &tiled, &["--layers", "2"]].concat()) {
        sane(&row);
        assert_eq!((row["prompt_tokens"].as_u64(), row["tile"].as_u64()), (Some(600), Some(1500)));
        let whole = row["budget"] == "100%";
        assert_eq!(get(&row, "output_error_p95") < 1e-5, whole, "{row}");
    }

    let refused = failure(&[&common[..], &["--recipe", "full", "--layers", "30"]].concat());
    assert!(refused.contains("0 to 29"), "{refused}");
    let refused =
        failure(&[&common[..], &["--recipe", "snapkv+positions=renumber", "--budget", "50%"]].concat());
    assert!(refused.contains("positions=keep"), "{refused}");
}

#[test]
fn what_makes_no_sense_is_refused_before_a_model_is_loaded() {
    let none = ["--model", "nowhere.gguf", "--recipe", "full"];
    assert!(failure(&[&none[..], &["--samples", "0"]].concat()).contains("--samples"));
    assert!(failure(&[&none[..], &["--tile", "100"]].concat()).contains("--tile"));
    assert!(failure(&[&none[..], &["--prompt-tokens", "50", "--tile", "100"]].concat()).contains("68"));
}
