//! Where tests of the program find the model.

use std::path::{Path, PathBuf};

/// The model, or `None` only if its absence was excused: a check that did not run must not look like one that passed. `what` is
/// not checked then.
pub(crate) fn model(what: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var("KVSIEVE_ALLOW_MISSING_MODEL").is_ok_and(|value| value == "1"),
        "no model: run scripts/fetch-model.sh (KVSIEVE_ALLOW_MISSING_MODEL=1 goes on without it)"
    );
    eprintln!("NOT CHECKED: {what}, for want of the model");
    None
}
