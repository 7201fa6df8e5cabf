//! `kvsieve calibrate` on the real model, with networks too small to be of use: what is made is whole, goes on where it was cut
//! off, and serves its recipes.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use kvsieve::profile::Profile;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Text and model; `None` only if the model's absence was excused.
fn inputs() -> Option<(PathBuf, PathBuf)> {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/architecture.md");
    Some((support::model("calibration")?, text))
}

fn scratch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    for suffix in ["", ".part", ".new"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
    }
    path
}

/// The command, with samples and networks of the smallest size.
fn calibrate((model, text): &(PathBuf, PathBuf), out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvsieve"));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    command.args(["calibrate", "--model", &path(model), "--text", &path(text), "--out", &path(out)]);
    let small = [
        ["--samples", "2"],
        ["--tokens", "384"],
        ["--epochs", "2"],
        ["--lococo-epochs", "2"],
        ["--locret-hidden", "4"],
        ["--kvzap-hidden", "4"],
    ];
    command.args(small.iter().filter(|option| !more.contains(&option[0])).flatten());
    command.args(more);
    command
}

#[track_caller]
fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

fn numbers<'a>(profile: &'a Profile, part: &str, array: &str) -> &'a [f32] {
    let (_, part) = profile.parts().find(|(name, _)| *name == part).unwrap();
    let (_, array) = part.arrays().find(|(name, _)| *name == array).unwrap();
    array.numbers()
}

#[test]
fn a_profile_is_made_goes_on_where_it_was_cut_off_and_serves() {
    let Some(inputs) = inputs() else { return };
    let whole = scratch("whole.profile.safetensors");
    run(calibrate(&inputs, &whole, &[]));
    let profile = Profile::open(&whole).unwrap();
    let parts: Vec<&str> = profile.parts().map(|(name, _)| name).collect();
    assert_eq!(parts, ["duo", "errors", "heads", "kvzap", "locret"]);
    assert!(
        profile.parts().all(|(_, part)| part.made().contains("2 samples of 384 tokens of architecture.md"))
    );
    // Shares of attention, and they differ.
    for (part, array, count) in [("duo", "gates", 90), ("heads", "scores", 270)] {
        let numbers = numbers(&profile, part, array);
        assert_eq!(numbers.len(), count);
        assert!(numbers.iter().all(|x| (0.0..=1.0).contains(x)), "{part}");
        assert!(
            numbers.iter().copied().fold(0.0, f32::max) > 1.5 * numbers.iter().sum::<f32>() / count as f32,
            "{part}"
        );
    }
    let errors = numbers(&profile, "errors", "layers");
    assert!(errors.len() == 30 && errors.iter().all(|x| (0.0..2.0).contains(x)) && errors[0] != errors[29]);
    assert!(!whole.with_extension("safetensors.part").exists(), "what was saved on the way is gone");

    // Killed while networks are trained, and begun again: the same numbers.
    let cut = scratch("cut.profile.safetensors");
    let part = cut.with_extension("safetensors.part");
    let mut child = calibrate(&inputs, &cut, &["--parts", "kvzap"]).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while !part.exists() && child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(300)
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let saved = Profile::open(&part).unwrap();
    let layers = saved.parts().flat_map(|(_, part)| part.arrays()).count() / 4;
    assert!((1..30).contains(&layers), "{layers} layers were saved, nothing was cut off");
    assert!(!cut.exists(), "a part that is not whole is not in the profile");
    run(calibrate(&inputs, &cut, &["--parts", "kvzap"]));
    let resumed = Profile::open(&cut).unwrap();
    assert_eq!(resumed.parts().next(), profile.parts().find(|(name, _)| *name == "kvzap"));
    // What is there already, made the same way, is left alone.
    let said = run(calibrate(&inputs, &cut, &["--parts", "kvzap"]));
    assert!(said.contains("kvzap: there already"), "{said}");

    // Its recipes run, and others say what is missing.
    let (model, text) = (inputs.0.to_str().unwrap(), inputs.1.to_str().unwrap());
    let eval = |profile: &Path, recipe: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvsieve"));
        command.args([
            "eval", "--json", "--model", model, "--text", text, "--recipe", recipe, "--budget", "50%",
        ]);
        command.args(["--prompt-tokens", "128", "--score-tokens", "8", "--samples", "2"]);
        command.args(["--profile", profile.to_str().unwrap()]).output().unwrap()
    };
    let output =
        eval(&whole, "locret,kvzap(window=16),snapkv+duo(sinks=8,recent=24),compresskv,kvzip+global");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    for row in rows.as_array().unwrap() {
        let (kept, kl) = (row["entries_per_head"].as_f64().unwrap(), row["kl"].as_f64().unwrap());
        assert!(kept <= 64.0 && kept > 40.0 && kl > 0.0 && kl < 5.0, "{row}");
    }
    assert_eq!(rows.as_array().unwrap().len(), 5);
    let output = eval(&cut, "locret");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("no part locret (it has: kvzap)"), "{said}");
}

#[test]
fn convolutions_are_made_where_they_are_asked_for_and_serve() {
    let Some(inputs) = inputs() else { return };
    let out = scratch("lococo.profile.safetensors");
    let part = ["--parts", "lococo", "--lococo-channels", "6", "--lococo-width", "3"];
    let said = run(calibrate(&inputs, &out, &part));
    // Two numbers to compare: with what was learned, and without.
    assert!(said.contains("squared error of attention outputs on the last sample 0."), "{said}");
    assert!(said.contains("where nothing is mixed"), "{said}");
    let profile = Profile::open(&out).unwrap();
    assert_eq!(profile.parts().map(|(name, _)| name).collect::<Vec<_>>(), ["lococo"]);
    let (_, made) = profile.parts().next().unwrap();
    assert!(made.made().ends_with("6 channels of width 3, 2 epochs, seed 0"), "{}", made.made());
    assert_eq!(made.arrays().count(), 3 * 30);
    for layer in [0, 29] {
        let array = |name: &str| numbers(&profile, "lococo", &format!("layers.{layer}.{name}"));
        assert_eq!((array("weight").len(), array("bias").len()), (6 * 128 * 3, 6));
        // Two steps move it, not far.
        let blend = array("blend")[0];
        assert!(blend != 0.5 && (0.3..0.7).contains(&blend), "{blend}");
    }
    let again = run(calibrate(&inputs, &out, &part));
    assert!(again.contains("lococo: there already"), "{again}");

    let (model, text) = (inputs.0.to_str().unwrap(), inputs.1.to_str().unwrap());
    let mut eval = Command::new(env!("CARGO_BIN_EXE_kvsieve"));
    eval.args(["eval", "--json", "--model", model, "--text", text, "--recipe", "snapkv,lococo"]);
    eval.args(["--budget", "50%", "--prompt-tokens", "128", "--score-tokens", "8", "--samples", "2"]);
    let output = eval.args(["--profile", out.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [plain, mixed] = [0, 1].map(|row| rows[row]["kl"].as_f64().unwrap());
    assert!(plain != mixed && (0.0..5.0).contains(&mixed), "{plain} {mixed}");
    assert_eq!(rows[0]["entries_per_head"], rows[1]["entries_per_head"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Some(inputs) = inputs() else { return };
    let out = scratch("refused.profile.safetensors");
    let fails = |more: &[&str]| {
        let output = calibrate(&inputs, &out, more).output().unwrap();
        assert!(!output.status.success(), "{more:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(fails(&["--samples", "1"]).contains("2 samples or more"));
    assert!(fails(&["--tokens", "100"]).contains("384 tokens or more"));
    assert!(fails(&["--tokens", "5000"]).contains("lower --tokens"));
    assert!(fails(&["--samples", "9000"]).contains("longer --text"));
    assert!(fails(&["--locret-hidden", "0"]).contains("hidden layer"));
    assert!(fails(&["--parts", "lococo", "--lococo-width", "4"]).contains("an odd width"));
    assert!(
        fails(&["--parts", "lococo", "--lococo-channels", "200"]).contains("channels for samples of 384")
    );
    assert!(fails(&["--parts", "lococo", "--lococo-channels", "0"]).contains("give 1 to 88 channels"));
    // A file that is no profile is not written over.
    std::fs::write(&out, "something of the user's").unwrap();
    assert!(fails(&[]).contains("not a whole safetensors file"));
    assert_eq!(std::fs::read(&out).unwrap(), b"something of the user's");
}
