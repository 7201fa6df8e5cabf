//! The rules, each a function from files to problems, so that each can be shown to fail.

use super::source::{File, crate_paths, has_word};

/// What a top-level module may use: everything on a smaller level. Modules of one level use one another only
/// where [`SIBLINGS`] says so.
const LEVELS: &[(&str, u32)] = &[
    ("error", 0),
    ("geometry", 1),
    ("view", 2),
    ("profile", 2),
    ("device", 3),
    ("kernel", 4),
    ("backend", 5),
    ("plan", 6),
    ("columns", 6),
    ("store", 6),
    ("policy", 7),
    ("recipe", 7),
    ("reduce", 7),
    ("codec", 7),
    ("factor", 7),
    ("index", 7),
    ("low_rank", 7),
    ("learned", 7),
    ("snapshot", 7),
    ("cache", 8),
    ("testing", 9),
];

/// `(user, used)` on one level, or upwards.
const SIBLINGS: &[(&str, &str)] = &[
    // Pages carry columns, and the store applies plans.
    ("store", "plan"),
    ("store", "columns"),
    // A recipe is the text form of a policy: the two are one level in two files.
    ("policy", "recipe"),
    ("recipe", "policy"),
    // The registry of names lists indexes too, and their arguments are declared with its types.
    ("policy", "index"),
    ("index", "policy"),
    ("recipe", "index"),
    // Reducers see what policies see.
    ("reduce", "policy"),
    ("recipe", "reduce"),
    // Low rank is declared like any other method.
    ("low_rank", "policy"),
    ("recipe", "low_rank"),
    // A recipe names storage.
    ("recipe", "codec"),
    // An index searches encoded entries.
    ("index", "codec"),
    // Messages carry numbers in their own types (a position, the extents of a tensor) instead of strings.
    ("error", "geometry"),
    ("error", "view"),
];

/// `(file, used)`: what a single file may use of its module's siblings.
const FILES: &[(&str, &str)] = &[
    // The registry of names lists reducers too.
    ("src/policy/registry.rs", "reduce"),
    ("src/policy/registry.rs", "low_rank"),
];

/// Modules that must not see how a kernel is implemented.
const BLIND: &[&str] = &[
    "policy", "recipe", "reduce", "codec", "factor", "low_rank", "index", "learned", "plan", "columns",
    "store", "cache", "snapshot",
];

/// A module below the crate's root has a level.
fn level(module: &str) -> Option<u32> {
    LEVELS.iter().find(|(name, _)| *name == module).map(|(_, level)| *level)
}

/// Who uses whom.
pub(super) fn layering(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.path.starts_with("src/") && !is_test(f)) {
        let module = file.module();
        let Some(&user) = module.first() else { continue };
        let Some(user_level) = level(user) else {
            problems.push(format!("{}: module `{user}` has no level in tests/it/tidy/rules.rs", file.path));
            continue;
        };
        for path in crate_paths(&file.code(), &module) {
            let Some(used) = path.first() else { continue };
            // Re-exports at the root: the error type is for all, the rest is named where it lives.
            if used.starts_with(char::is_uppercase) {
                if used != "Error" {
                    problems
                        .push(format!("{}: uses `crate::{used}`; name the module it lives in", file.path));
                }
                continue;
            }
            let Some(used_level) = level(used) else { continue };
            let allowed = user == used
                || used_level < user_level
                || SIBLINGS.contains(&(user, used.as_str()))
                || FILES.contains(&(file.path.as_str(), used.as_str()));
            if !allowed {
                problems.push(format!("{}: `{user}` may not use `{}`", file.path, path.join("::")));
            }
            let half = path.get(2).is_some_and(|half| half == "cpu" || half == "gpu");
            if used == "kernel" && half && BLIND.contains(&user) {
                problems.push(format!("{}: `{user}` may not reach into `{}`", file.path, path.join("::")));
            }
        }
    }
    problems
}

/// Tests, and the case generators of kernels, which are compiled for tests alone and stand on `testing`.
fn is_test(file: &File) -> bool {
    file.path.ends_with("/cases.rs") || file.path.ends_with("/tests.rs") || file.path.contains("/tests/")
}

/// Every module says what it is; modules that hold others also say when they help and when they hurt.
pub(super) fn module_docs(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.path.starts_with("src/")) {
        let doc = file.module_doc().to_lowercase();
        if doc.trim().len() < 10 {
            problems.push(format!("{}: starts with no `//!` sentence that says what it is", file.path));
            continue;
        }
        let depth = file.path.matches('/').count();
        let top = depth == 1 && file.path != "src/lib.rs";
        let folder = file.path.ends_with("/mod.rs");
        for word in ["helps", "hurts"] {
            if (top || folder) && !doc.contains(word) {
                problems.push(format!("{}: the module doc does not say what it {word}", file.path));
            }
        }
    }
    problems
}

/// Where `unsafe` may stand: SIMD kernels, and the memory under the pages.
pub(super) fn unsafe_places(files: &[File]) -> Vec<String> {
    let allowed = |path: &str| {
        path == "src/device/memory.rs"
            || path.starts_with("src/kernel/simd")
            || (path.starts_with("src/kernel/") && path.ends_with("/cpu.rs"))
            || (path.starts_with("src/kernel/") && path.contains("/cpu/"))
    };
    files
        .iter()
        .filter(|f| f.path.starts_with("src/") && !allowed(&f.path) && has_word(&f.code(), "unsafe"))
        .map(|f| format!("{}: `unsafe` outside kernel/*/cpu, kernel/simd* and device/memory.rs", f.path))
        .collect()
}

/// Unfinished code.
pub(super) fn unfinished(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.path.ends_with(".rs")) {
        let code = file.code();
        for word in ["todo", "unimplemented", "dbg"] {
            if code.contains(&format!("{word}!(")) && has_word(&code, word) {
                problems.push(format!("{}: `{word}!`", file.path));
            }
        }
    }
    problems
}

/// Longest source file, in lines.
const LINES: usize = 700;

/// Files that one reader can hold in mind.
pub(super) fn length(files: &[File]) -> Vec<String> {
    files
        .iter()
        .filter(|f| f.path.ends_with(".rs") || f.path.ends_with(".wgsl"))
        .map(|f| (f, f.text.lines().count()))
        .filter(|(_, lines)| *lines > LINES)
        .map(|(f, lines)| format!("{}: {lines} lines, more than {LINES}", f.path))
        .collect()
}

/// Paths that exist on one machine only.
pub(super) fn machine_paths(files: &[File]) -> Vec<String> {
    // Spelled in two pieces, so that this file does not contain what it looks for.
    let roots = ["home", "root", "Users", "work", "mnt"].map(|root| format!("/{root}/"));
    let mut problems = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            let absolute = |root: &str| {
                line.match_indices(root).any(|(at, _)| {
                    !line[..at]
                        .chars()
                        .next_back()
                        .is_some_and(|c| c.is_alphanumeric() || "._-)}~*]/".contains(c))
                })
            };
            if roots.iter().any(|root| absolute(root)) {
                problems.push(format!(
                    "{}:{}: a path of one machine: {}",
                    file.path,
                    number + 1,
                    line.trim()
                ));
            }
        }
    }
    problems
}

/// Kernels whose GPU half works on the host: packing rounds quotients, which no shading language promises to the
/// bit, and codes must be the same everywhere.
const WITHOUT_SHADER: [&str; 1] = ["pack"];

/// A kernel is a folder with four files and a shader of the same name; a shader belongs to a kernel.
pub(super) fn kernels_and_shaders(files: &[File]) -> Vec<String> {
    let stems: Vec<&str> = files
        .iter()
        .filter_map(|f| f.path.strip_prefix("src/kernel/")?.strip_suffix("/reference.rs"))
        .collect();
    let shaders: Vec<&str> = files
        .iter()
        .filter_map(|f| f.path.strip_prefix("shaders/")?.strip_suffix(".wgsl"))
        .filter(|stem| !stem.contains('/'))
        .collect();
    let mut problems = Vec::new();
    for stem in &stems {
        for half in ["mod", "cpu", "gpu"] {
            let folder = format!("src/kernel/{stem}/{half}/mod.rs");
            let leaf = format!("src/kernel/{stem}/{half}.rs");
            if !files.iter().any(|f| f.path == leaf || f.path == folder) {
                problems.push(format!("kernel `{stem}` has no {half}.rs"));
            }
        }
        // Before the first shader lands there is nothing to compare with.
        let excused = shaders.is_empty() || WITHOUT_SHADER.contains(stem);
        if !excused && !shaders.iter().any(|s| belongs(s, stem)) {
            problems.push(format!("kernel `{stem}` has no shaders/{stem}.wgsl"));
        }
    }
    let orphans = shaders.iter().filter(|s| !stems.iter().any(|stem| belongs(s, stem)));
    problems.extend(orphans.map(|s| format!("shaders/{s}.wgsl belongs to no folder of src/kernel")));
    problems
}

/// `attend.wgsl` and `attend_merge.wgsl` (a second pass) both belong to the kernel `attend`.
fn belongs(shader: &str, kernel: &str) -> bool {
    shader.strip_prefix(kernel).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

/// Every registered policy or codec has its page in `folder`, every page there something it describes.
pub(super) fn pages(files: &[File], folder: &str, registry: &[(&str, String)]) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, page) in registry {
        if !page.starts_with(folder) || !files.iter().any(|f| f.path == *page) {
            problems.push(format!("`{name}` has no page {page} in {folder}"));
        } else if !files.iter().any(|f| f.path == *page && has_word(&f.text, name)) {
            problems.push(format!("{page} does not mention `{name}`"));
        }
    }
    let found = files.iter().filter(|f| f.path.starts_with(folder) && !f.path.ends_with("/README.md"));
    let orphans = found.filter(|f| !registry.iter().any(|(_, page)| *page == f.path));
    problems.extend(orphans.map(|f| format!("{} describes nothing registered", f.path)));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(path: &str, text: &str) -> Vec<File> {
        vec![File::new(path, text)]
    }

    #[test]
    fn layering_fails_upwards_sideways_and_into_halves() {
        let bad = [
            ("src/view.rs", "use crate::device::Page;"),
            ("src/policy/score/x.rs", "use crate::reduce::Merge;"),
            ("src/policy/score/x.rs", "use crate::{kernel::{attend::{cpu::run}}};"),
            ("src/policy/mod.rs", "fn f() { super::cache::g() }"),
            ("src/kernel/attend/cpu.rs", "use crate::backend::Cpu;"),
            ("src/columns.rs", "use crate::plan::Fate;"),
            ("src/view.rs", "use crate::KvCache;"),
            ("src/novelty.rs", "use crate::view::DType;"),
        ];
        for (path, text) in bad {
            assert_eq!(layering(&one(path, text)).len(), 1, "{path}: {text}");
        }
        let good = [
            ("src/cache/mod.rs", "use crate::{policy::Policy, kernel::attend};"),
            ("src/policy/registry.rs", "use crate::reduce::Reducer;"),
            ("src/policy/recipe.rs", "use super::score; use crate::kernel::attend::Share;"),
            ("src/backend/cpu.rs", "use crate::kernel::attend::cpu::run;"),
            ("src/index/a.rs", "use crate::codec::Codec;"),
            ("src/view.rs", "// crate::cache::X\n#[cfg(test)]\nmod tests { use crate::cache::X; }"),
            ("src/lib.rs", "pub use crate::cache::KvCache;"),
        ];
        for (path, text) in good {
            assert_eq!(layering(&one(path, text)), Vec::<String>::new(), "{path}: {text}");
        }
    }

    #[test]
    fn module_docs_fail_where_a_word_is_missing() {
        assert_eq!(module_docs(&one("src/a/b.rs", "use x;")).len(), 1);
        assert_eq!(module_docs(&one("src/a/mod.rs", "//! What it is.\n//! *Helps* all.")).len(), 1);
        assert_eq!(module_docs(&one("src/a.rs", "//! Says only what it is.")).len(), 2);
        assert!(module_docs(&one("src/a.rs", "//! What it is. *Helps* some, *hurts* others.")).is_empty());
        assert!(module_docs(&one("src/a/b.rs", "//! Says only what it is.")).is_empty());
    }

    #[test]
    fn unsafe_fails_outside_its_places() {
        let text = "fn f() { unsafe { g() } }";
        for path in ["src/cache/mod.rs", "src/kernel/attend/gpu.rs", "src/device/page.rs"] {
            assert_eq!(unsafe_places(&one(path, text)).len(), 1, "{path}");
        }
        for path in ["src/device/memory.rs", "src/kernel/attend/cpu.rs", "src/kernel/simd.rs"] {
            assert!(unsafe_places(&one(path, text)).is_empty(), "{path}");
        }
    }

    #[test]
    fn unfinished_code_long_files_and_machine_paths_fail() {
        let marker = format!("fn f() {{ {}!() }}", "todo");
        assert_eq!(unfinished(&one("src/a.rs", &marker)).len(), 1);
        assert!(unfinished(&one("src/a.rs", "/// A to-do list: todo.\nfn todo() {}")).is_empty());
        assert_eq!(length(&one("src/a.rs", &"\n".repeat(LINES + 1))).len(), 1);
        assert!(length(&one("src/a.rs", &"\n".repeat(LINES))).is_empty());
        for path in [format!("see /{}/me/x", "home"), format!("\"/{}/x\"", "work")] {
            assert_eq!(machine_paths(&one("docs/a.md", &path)).len(), 1, "{path}");
        }
        assert!(machine_paths(&one("docs/a.md", "https://example.org/home/x and my/home/y")).is_empty());
    }

    #[test]
    fn kernels_without_halves_or_shaders_fail() {
        let files = |paths: &[&str]| paths.iter().map(|p| File::new(p, "")).collect::<Vec<_>>();
        let whole = ["mod", "reference", "cpu", "gpu"].map(|half| format!("src/kernel/pool/{half}.rs"));
        let mut paths: Vec<&str> = whole.iter().map(String::as_str).collect();
        assert!(kernels_and_shaders(&files(&paths)).is_empty());
        assert_eq!(kernels_and_shaders(&files(&paths[..3])).len(), 1);
        paths.push("shaders/pool.wgsl");
        paths.push("shaders/shared/math.wgsl");
        assert!(kernels_and_shaders(&files(&paths)).is_empty());
        paths.push("shaders/orphan.wgsl");
        assert_eq!(kernels_and_shaders(&files(&paths)).len(), 1);
        assert_eq!(kernels_and_shaders(&files(&[&paths[..4], &["shaders/poolish.wgsl"]].concat())).len(), 2);
    }

    #[test]
    fn policies_without_pages_and_pages_without_policies_fail() {
        let files = [File::new("docs/policies/h2o.md", "# h2o"), File::new("docs/policies/README.md", "")];
        let pages = |registry: &[(&str, String)]| pages(&files, "docs/policies/", registry);
        let entry = |name, page: &str| (name, page.to_owned());
        let h2o = entry("h2o", "docs/policies/h2o.md");
        assert!(pages(std::slice::from_ref(&h2o)).is_empty());
        assert_eq!(pages(&[]).len(), 1);
        assert_eq!(pages(&[h2o, entry("tova", "docs/policies/tova.md")]).len(), 1);
        assert_eq!(pages(&[entry("h2o", "docs/h2o.md")]).len(), 2);
        assert_eq!(pages(&[entry("tova", "docs/policies/h2o.md")]).len(), 1);
    }
}
