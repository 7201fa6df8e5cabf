//! The repository's own rules, checked: who may use whom, what every module says about itself, where `unsafe`
//! may stand, and that tables, pages and shaders match the code.
//!
//! *Helps* because a rule that nothing checks is a rule of the past. *Hurts* on the day a rule is wrong: then
//! change it in `rules.rs`, with the reason.

mod rules;
mod source;

use source::File;
use std::path::Path;

/// Folders that are built, fetched or recorded, not written.
const SKIPPED: &[&str] = &["target", "models", "golden", ".git", "node_modules"];

/// Kinds of files that people write.
const WRITTEN: &[&str] = &["rs", "wgsl", "md", "toml", "sh", "py", "h", "c"];

fn collect(folder: &Path, root: &Path, files: &mut Vec<File>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                collect(&path, root, files);
            }
            continue;
        }
        let written = path.extension().is_some_and(|e| WRITTEN.iter().any(|w| e == *w));
        if (written || name == "Makefile" || name == "run")
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            let relative = path.strip_prefix(root).unwrap().components();
            let parts: Vec<_> = relative.map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
            files.push(File { path: parts.join("/"), text });
        }
    }
}

fn repository() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(root, root, &mut files);
    assert!(
        files.iter().any(|f| f.path == "src/lib.rs"),
        "the walk found no src/lib.rs below {}",
        root.display()
    );
    files
}

#[track_caller]
fn none(problems: &[String]) {
    assert!(problems.is_empty(), "{} problems:\n  {}", problems.len(), problems.join("\n  "));
}

#[test]
fn modules_use_only_what_lies_below_them() {
    none(&rules::layering(&repository()));
}

#[test]
fn modules_say_what_they_are() {
    none(&rules::module_docs(&repository()));
}

#[test]
fn unsafe_stands_where_it_may() {
    none(&rules::unsafe_places(&repository()));
}

#[test]
fn nothing_is_unfinished() {
    none(&rules::unfinished(&repository()));
}

#[test]
fn files_are_short_enough_to_read() {
    none(&rules::length(&repository()));
}

#[test]
fn no_path_of_one_machine() {
    none(&rules::machine_paths(&repository()));
}

#[test]
fn kernels_have_their_parts_and_shaders() {
    none(&rules::kernels_and_shaders(&repository()));
}

#[test]
fn every_policy_has_a_page() {
    let registry = kvsieve::policy::registry::Registry::builtin();
    let entries: Vec<_> = registry.iter().map(|entry| (entry.name, entry.page())).collect();
    none(&rules::pages(&repository(), "docs/policies/", &entries));
}

#[test]
fn every_codec_has_a_page() {
    let entries: Vec<_> = kvsieve::codec::CODECS.iter().map(|c| (c.format.name(), c.page())).collect();
    none(&rules::pages(&repository(), "docs/codecs/", &entries));
}
