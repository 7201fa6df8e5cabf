//! Where tests find the model and the recorded logits.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

/// The model, or `None` only if the caller has explicitly excused its absence: a check that did not run must not look
/// like one that passed.
pub(crate) fn model_path() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    let excused = std::env::var("KVSIEVE_ALLOW_MISSING_MODEL").is_ok_and(|value| value == "1");
    assert!(
        excused,
        "the model is missing: run scripts/fetch-model.sh in the repository root (94 MB), \
         or set KVSIEVE_ALLOW_MISSING_MODEL=1 to go without this check"
    );
    eprintln!("NOT CHECKED: the model is missing and KVSIEVE_ALLOW_MISSING_MODEL=1");
    None
}

/// What Hugging Face transformers computes in f32 with the same (dequantized) weights.
pub(crate) struct Recorded {
    pub(crate) tokens: Vec<u32>,
    pub(crate) top1: Vec<u32>,
    /// Log-probability of token `i + 1` after tokens `0..=i`.
    pub(crate) target_logprob: Vec<f32>,
}

pub(crate) fn recorded() -> Recorded {
    let name = "smollm2-visible.logits.safetensors";
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = [
        std::env::var_os("KVSIEVE_SHARED").map(PathBuf::from),
        Some(here.join("../../tests/golden")),
        Some(here.join("../../../shared/data")),
    ];
    let tried: Vec<PathBuf> = places.into_iter().flatten().map(|folder| folder.join(name)).collect();
    let bytes = tried.iter().find_map(|path| std::fs::read(path).ok());
    let bytes =
        bytes.unwrap_or_else(|| panic!("{name} is in none of {tried:?}; KVSIEVE_SHARED names its folder"));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
    };
    let ids =
        |name: &str| words(name).into_iter().map(|w| u32::try_from(i32::from_le_bytes(w)).unwrap()).collect();
    Recorded {
        tokens: ids("tokens"),
        top1: ids("top1"),
        target_logprob: words("target_logprob").into_iter().map(f32::from_le_bytes).collect(),
    }
}

/// Log-probability of `target` under a row of logits.
pub(crate) fn logprob(row: &[f32], target: u32) -> f32 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
    (f64::from(row[target as usize] - top) - total.ln()) as f32
}
