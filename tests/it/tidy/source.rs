//! Enough of Rust's lexical structure to ask questions about a source file: code without comments, strings and
//! unit tests, and the `crate::` paths it names.
//!
//! *Helps* because a question asked of the text ("does it say `unsafe`?") would stumble over prose. *Hurts* if
//! taken for a parser: macros that build paths are not seen.

/// A file of the repository: its path from the root with `/`, and its text.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) path: String,
    pub(super) text: String,
}

impl File {
    #[cfg(test)]
    pub(super) fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The module path of a file below `src/`: `src/kernel/attend/mod.rs` is `["kernel", "attend"]`.
    pub(super) fn module(&self) -> Vec<&str> {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let inner = inner.strip_suffix(".rs").unwrap_or(inner);
        inner.split('/').filter(|part| !matches!(*part, "mod" | "lib")).collect()
    }

    /// The first `//!` block, as one string.
    pub(super) fn module_doc(&self) -> String {
        let lines = self.text.lines().map(str::trim).skip_while(|line| line.is_empty());
        lines.map_while(|line| line.strip_prefix("//!")).collect::<Vec<_>>().join("\n")
    }

    /// The code: comments and the contents of strings blanked, a trailing `#[cfg(test)] mod … {` cut off.
    pub(super) fn code(&self) -> String {
        let code = blank(&self.text);
        let tests = code.match_indices("#[cfg(test)]").find(|(at, mark)| {
            let rest = code[at + mark.len()..].trim_start();
            rest.starts_with("mod ") && rest[..rest.find(['{', ';']).map_or(0, |i| i + 1)].ends_with('{')
        });
        tests.map_or(code.clone(), |(at, _)| code[..at].to_owned())
    }
}

/// Replaces comments and string contents by blanks, keeping line breaks.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let taken = token_length(rest);
        let (token, after) = rest.split_at(taken);
        let hidden =
            token.len() > 1 && (token.starts_with("//") || token.starts_with("/*") || is_literal(token));
        if hidden {
            out.extend(token.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        } else {
            out.push_str(token);
        }
        debug_assert!(taken >= first.len_utf8());
        rest = after;
    }
    out
}

fn is_literal(token: &str) -> bool {
    token.starts_with(['"', '\'']) || (token.starts_with('r') && token.ends_with(['"', '#']))
}

/// Bytes of the comment, literal, word or character at the start of `text`.
fn token_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let until = |end: &str, from: usize| text[from..].find(end).map_or(text.len(), |i| from + i + end.len());
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return until("*/", 2);
    }
    if bytes[0] == b'"' {
        return quoted(bytes, b'"');
    }
    if bytes[0] == b'\'' {
        // A lifetime has no closing quote right behind its first character.
        let closes = bytes.get(1) == Some(&b'\\') || text.chars().nth(2) == Some('\'');
        return if closes { quoted(bytes, b'\'') } else { 1 };
    }
    let word = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    if word == 0 {
        return text.chars().next().map_or(1, char::len_utf8);
    }
    if matches!(&text[..word], "r" | "br") {
        let hashes = text[word..].bytes().take_while(|b| *b == b'#').count();
        if bytes.get(word + hashes) == Some(&b'"') {
            return until(&format!("\"{}", "#".repeat(hashes)), word + hashes + 1);
        }
    }
    word
}

fn quoted(bytes: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Whether `code` contains `word` as a whole word.
pub(super) fn has_word(code: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word)
        .any(|(at, _)| !part(code[..at].chars().next_back()) && !part(code[at + word.len()..].chars().next()))
}

/// Every path from the crate's root that the code names, groups (`{a, b}`) expanded, `super` chains resolved.
pub(super) fn crate_paths(code: &str, module: &[&str]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, mark) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            expand(&code[at + mark.len()..], &mut Vec::new(), &mut found);
        }
    }
    let mut from = 0;
    while let Some(at) = code[from..].find("super::").map(|i| from + i) {
        let mut rest = &code[at..];
        let mut base = module.to_vec();
        while let Some(inner) = rest.strip_prefix("super::") {
            base.pop();
            rest = inner;
        }
        from = code.len() - rest.len();
        let mut prefix = base.iter().map(|part| (*part).to_owned()).collect();
        expand(rest, &mut prefix, &mut found);
    }
    found
}

/// Reads `a::b::{c, d::e}` at the start of `text` and returns what is left.
fn expand<'a>(text: &'a str, prefix: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    let depth = prefix.len();
    let mut text = text.trim_start();
    loop {
        if let Some(mut inner) = text.strip_prefix('{') {
            loop {
                inner = expand(inner, prefix, found).trim_start();
                match inner.strip_prefix(',') {
                    Some(next) => inner = next.trim_start(),
                    None => break,
                }
                if inner.starts_with('}') {
                    break;
                }
            }
            prefix.truncate(depth);
            return inner.strip_prefix('}').unwrap_or(inner);
        }
        let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '*')).unwrap_or(text.len());
        if end > 0 {
            prefix.push(text[..end].to_owned());
        }
        let rest = &text[end..];
        match rest.strip_prefix("::") {
            Some(next) if end > 0 => text = next,
            _ => {
                found.push(prefix.clone());
                prefix.truncate(depth);
                // `use a::b as c` renames; the path is what matters.
                let rest = rest.trim_start();
                let renamed = rest
                    .strip_prefix("as ")
                    .map(|r| r.trim_start().trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'));
                return renamed.unwrap_or(rest);
            }
        }
    }
}

#[test]
fn comments_strings_and_tests_are_not_code() {
    let file = File::new(
        "src/a.rs",
        "//! unsafe\nfn f<'a>(c: char) { /* unsafe */ let _ = \"unsafe \\\" unsafe\"; let q = '\"'; g(r#\"unsafe\"#) }\n\
         #[cfg(test)]\nfn helper() {}\n#[cfg(test)]\nmod tests { unsafe {} }\n",
    );
    assert!(!has_word(&file.code(), "unsafe"), "{}", file.code());
    assert!(has_word(&file.code(), "helper") && has_word(&file.code(), "g"));
    let real = File::new("src/a.rs", "fn f<'a>() { let x = 'x'; unsafe { g() } }");
    assert!(has_word(&real.code(), "unsafe"));
    assert!(!has_word("unsafe_code", "unsafe"));
    assert!(has_word(&File::new("a", "#[cfg(test)]\nmod oracle;\nfn after() {}").code(), "after"));
}

#[test]
fn paths_are_expanded() {
    let paths = |code: &str, module: &[&str]| -> Vec<String> {
        crate_paths(code, module).into_iter().map(|p| p.join("::")).collect()
    };
    assert_eq!(
        paths("use crate::{error::E, kernel::{a::{self, B}, c as d}, view};", &[]),
        ["error::E", "kernel::a::self", "kernel::a::B", "kernel::c", "view"]
    );
    assert_eq!(paths("x: crate::device::Page, y: mycrate::z", &[]), ["device::Page"]);
    assert_eq!(paths("use super::super::b::C; use super::d;", &["a", "e", "f"]), ["a::b::C", "a::e::d"]);
}

#[test]
fn modules_and_docs_of_files() {
    let file = File::new("src/kernel/attend/mod.rs", "\n//! One.\n//! Two.\n\nuse x;\n//! no");
    assert_eq!(file.module(), ["kernel", "attend"]);
    assert_eq!(file.module_doc(), " One.\n Two.");
    assert_eq!(File::new("src/lib.rs", "").module(), [""; 0]);
}
