//! The recipe grammar: text to terms, terms to stages, stages to a recipe.

use super::{PositionMode, Recipe};
use crate::codec::{self, Exact, PRESETS, Precision, Preset, Rule, Span};
use crate::device::encoding::Encoding;
use crate::error::RecipeError;
use crate::policy::registry::{Accepts, Arg, Args, Build, Entry, Registry, Value};
use crate::policy::schedule::Schedule;
use crate::policy::{Policy, Staged, allocate, score, whole};
use std::fmt;
use std::sync::Arc;

/// Longer than any sensible recipe, short enough that errors can quote it.
const MAX_LEN: usize = 4096;

const STAGES: &[&str] = &[
    "score",
    "alloc",
    "reduce",
    "index",
    "factor",
    "k",
    "v",
    "layers",
    "exact",
    "sinks",
    "recent",
    "marked",
    "when",
    "positions",
];
const EVERY: &[Arg] = &[Arg::count("n", 16, 1, usize::MAX, "tokens between compressions")];
const OVER: &[Arg] =
    &[Arg::count("slack", 32, 0, usize::MAX, "entries above the target before it compresses")];
const EXACT: &[Arg] = &[
    Arg::count("sinks", 4, 0, 1 << 16, "first entries that stay exact"),
    Arg::count("tail", 128, 0, 1 << 24, "last entries that stay exact, at least"),
];
const ANY_COUNT: Accepts = Accepts::Count { min: 0, max: usize::MAX };

/// A piece of text and the 1-based column it starts at.
struct Token {
    text: String,
    column: usize,
}

/// A name with options: `int4(center,hadamard)`.
struct Flagged {
    name: Token,
    flags: Vec<Token>,
}

/// A term as written. Storage has flags, everything else arguments.
struct Term {
    stage: Option<Token>,
    name: Token,
    flags: Vec<Token>,
    args: Vec<(Token, Flagged)>,
}

/// Stages whose value is storage.
const STORED: &[&str] = &["k", "v"];

/// Reads terms. Works on characters, so that columns are what an editor shows.
struct Reader<'a> {
    text: &'a str,
    chars: Vec<char>,
    at: usize,
}

impl Reader<'_> {
    fn error(&self, column: usize, problem: impl Into<String>) -> RecipeError {
        RecipeError::Syntax { recipe: self.text.to_owned(), column, problem: problem.into() }
    }

    /// What stands at the cursor, for an error.
    fn expected(&self, what: &str) -> RecipeError {
        let found = self.chars.get(self.at).map_or("the end".to_owned(), |c| format!("{c:?}"));
        self.error(self.at + 1, format!("expected {what}, found {found}"))
    }

    fn space(&mut self) {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
    }

    /// Takes `c` and the space around it, if it is next.
    fn take(&mut self, c: char) -> bool {
        self.space();
        let there = self.chars.get(self.at) == Some(&c);
        if there {
            self.at += 1;
            self.space();
        }
        there
    }

    /// A run of letters, digits and `_`, and for values also `.` and `-`.
    fn word(&mut self, what: &str, value: bool) -> Result<Token, RecipeError> {
        self.space();
        let start = self.at;
        let belongs = |c: &char| c.is_ascii_alphanumeric() || *c == '_' || (value && matches!(c, '.' | '-'));
        while self.chars.get(self.at).is_some_and(belongs) {
            self.at += 1;
        }
        if self.at == start {
            return Err(self.expected(what));
        }
        Ok(Token { text: self.chars[start..self.at].iter().collect(), column: start + 1 })
    }

    /// `item, item, …)` up to the parenthesis that closes an open one; each item is a word and what `rest` reads
    /// behind it, and none may come twice.
    fn list<T>(
        &mut self,
        what: &str,
        mut rest: impl FnMut(&mut Self, &Token) -> Result<T, RecipeError>,
    ) -> Result<Vec<(Token, T)>, RecipeError> {
        let mut items: Vec<(Token, T)> = Vec::new();
        if !self.take('(') || self.take(')') {
            return Ok(items);
        }
        loop {
            let name = self.word(what, false)?;
            if let Some((first, _)) = items.iter().find(|(n, _)| n.text == name.text) {
                let problem = format!("{} was already given at column {}", name.text, first.column);
                return Err(self.error(name.column, problem));
            }
            let item = rest(self, &name)?;
            items.push((name, item));
            if self.take(')') {
                return Ok(items);
            }
            if !self.take(',') {
                return Err(self.expected("',' or ')'"));
            }
        }
    }

    fn flags(&mut self) -> Result<Vec<Token>, RecipeError> {
        Ok(self.list("an option", |_, _| Ok(()))?.into_iter().map(|(name, ())| name).collect())
    }

    fn args(&mut self) -> Result<Vec<(Token, Flagged)>, RecipeError> {
        self.list("an argument's name", |reader, name| {
            if !reader.take('=') {
                return Err(reader.expected(&format!("'=' and a value for {}", name.text)));
            }
            let value = reader.word("a value", true)?;
            let flags = if STORED.contains(&name.text.as_str()) { reader.flags()? } else { Vec::new() };
            Ok(Flagged { name: value, flags })
        })
    }

    fn term(&mut self) -> Result<Term, RecipeError> {
        let first = self.word("a policy, an allocator or a stage", false)?;
        if !self.take('=') {
            return Ok(Term { stage: None, name: first, flags: Vec::new(), args: self.args()? });
        }
        let name = self.word(&format!("a value for {}", first.text), true)?;
        let (flags, args) = match STORED.contains(&first.text.as_str()) {
            true => (self.flags()?, Vec::new()),
            false => (Vec::new(), self.args()?),
        };
        Ok(Term { stage: Some(first), name, flags, args })
    }

    fn terms(&mut self) -> Result<Vec<Term>, RecipeError> {
        let mut terms = vec![self.term()?];
        while self.take('+') {
            terms.push(self.term()?);
        }
        self.space();
        if self.at == self.chars.len() { Ok(terms) } else { Err(self.expected("'+' or the end")) }
    }
}

/// What the terms so far have chosen.
#[derive(Default)]
struct Draft {
    policy: Option<(Entry, Args)>,
    alloc: Option<(Entry, Args)>,
    reduce: Option<(Entry, Args)>,
    index: Option<(Entry, Args)>,
    factor: Option<(Entry, Args)>,
    sinks: Option<usize>,
    recent: Option<usize>,
    marked: Option<bool>,
    precision: Precision,
    schedule: Option<Schedule>,
    positions: PositionMode,
}

pub(super) fn recipe(text: &str, registry: &Registry) -> Result<Recipe, RecipeError> {
    let chars: Vec<char> = text.chars().take(MAX_LEN + 1).collect();
    if chars.len() > MAX_LEN {
        let start: String = chars[..64].iter().chain(&['…']).collect();
        let problem = format!("expected at most {MAX_LEN} characters");
        return Err(RecipeError::Syntax { recipe: start, column: MAX_LEN + 1, problem });
    }
    let mut reader = Reader { text, chars, at: 0 };
    let mut draft = Draft::default();
    for term in reader.terms()? {
        draft.add(&reader, &term, registry)?;
    }
    draft.finish(&reader, registry)
}

fn filled(term: &Term, declared: &[Arg]) -> Result<Args, RecipeError> {
    let mut args = Args::defaults(&term.name.text, declared);
    term.args.iter().try_for_each(|(name, value)| args.set(&name.text, &value.name.text))?;
    Ok(args)
}

fn encoding(stage: &str, name: &Token, flags: &[Token]) -> Result<Encoding, RecipeError> {
    let term = format!("{stage}={}", name.text);
    codec::parse(&term, &name.text, flags.iter().map(|f| f.text.as_str()))
}

/// `layers=0..2(heads=0..1,group=8,k=int8,v=f16)`.
fn rule(term: &Term) -> Result<Rule, RecipeError> {
    let refuse = |argument: &str, got: &str, want: String| RecipeError::Argument {
        term: format!("layers={}", term.name.text),
        argument: argument.to_owned(),
        got: got.to_owned(),
        want,
    };
    let span = |argument: &str, text: &str| text.parse::<Span>().map_err(|want| refuse(argument, text, want));
    let layers = span("layers", &term.name.text)?;
    let mut rule = Rule { layers, heads: Span::ALL, group: 1, k: None, v: None };
    for (name, Flagged { name: value, flags }) in &term.args {
        match name.text.as_str() {
            "heads" => rule.heads = span("heads", &value.text)?,
            "group" => match ANY_COUNT.parse(&value.text) {
                Some(Value::Count(n)) => rule.group = n.max(1),
                _ => return Err(refuse("group", &value.text, ANY_COUNT.to_string())),
            },
            "k" => rule.k = Some(encoding("k", value, flags)?),
            "v" => rule.v = Some(encoding("v", value, flags)?),
            other => {
                let want = "one of the arguments heads, group, k, v".to_owned();
                return Err(refuse(other, &value.text, want));
            }
        }
    }
    if rule.k.is_none() && rule.v.is_none() {
        return Err(refuse("k and v", "nothing", "given, at least one of them".to_owned()));
    }
    Ok(rule)
}

impl Draft {
    fn add(&mut self, reader: &Reader<'_>, term: &Term, registry: &Registry) -> Result<(), RecipeError> {
        let name = term.name.text.as_str();
        let Some(stage) = &term.stage else {
            if STAGES.contains(&name) {
                return Err(reader.error(term.name.column, format!("{name} is a stage: expected {name}=…")));
            }
            if let Some(preset) = codec::preset(name) {
                return self.expand(term, preset, registry);
            }
            let entry = registry.find(name).map_err(|error| match error {
                RecipeError::Unknown { name, known, .. } => {
                    let presets = PRESETS.map(|p| p.name).join(", ");
                    let known = format!("{known}; storage: {presets}");
                    RecipeError::Unknown { kind: "policy or allocator", name, known }
                }
                other => other,
            })?;
            return self.choose(entry, term);
        };
        let plain = |accepts: &str| {
            if term.args.is_empty() {
                return Ok(());
            }
            let (first, _) = &term.args[0];
            Err(reader
                .error(first.column, format!("{}={name} takes no arguments; expected {accepts}", stage.text)))
        };
        let refuse = |want: String| RecipeError::Argument {
            term: reader.text.trim().to_owned(),
            argument: stage.text.clone(),
            got: name.to_owned(),
            want,
        };
        match stage.text.as_str() {
            "score" => {
                let entry = registry.lookup("scorer", name, |b| matches!(b, Build::Score { .. }))?;
                self.choose(entry, term)?;
            }
            "alloc" => {
                let entry = registry.lookup("allocator", name, |b| matches!(b, Build::Allocate { .. }))?;
                self.choose(entry, term)?;
            }
            "reduce" => {
                let entry = registry.lookup("reducer", name, |b| matches!(b, Build::Reduce { .. }))?;
                self.choose(entry, term)?;
            }
            "index" => {
                let entry = registry.lookup("index", name, |b| matches!(b, Build::Index { .. }))?;
                self.choose(entry, term)?;
            }
            "factor" => {
                let entry = registry.lookup("low rank", name, |b| matches!(b, Build::Factor { .. }))?;
                self.choose(entry, term)?;
            }
            "k" | "v" => {
                let encoding = encoding(&stage.text, &term.name, &term.flags)?;
                match stage.text.as_str() {
                    "k" => self.precision.set_k(encoding),
                    _ => self.precision.set_v(encoding),
                }
            }
            "layers" => self.precision.add(rule(term)?),
            "exact" => {
                let dtype = codec::exact(name).ok_or_else(|| refuse("f32, f16 or bf16".into()))?;
                let args = filled(term, EXACT)?;
                self.precision.exact =
                    Exact { dtype, sinks: args.count("sinks")?, tail: args.count("tail")? };
            }
            "sinks" | "recent" => {
                plain("a whole number")?;
                let Some(Value::Count(n)) = ANY_COUNT.parse(name) else {
                    return Err(refuse(ANY_COUNT.to_string()));
                };
                *if stage.text == "sinks" { &mut self.sinks } else { &mut self.recent } = Some(n);
            }
            "marked" => {
                plain("last or alike")?;
                self.marked = Some(match name {
                    "last" => true,
                    "alike" => false,
                    _ => return Err(refuse("last or alike".into())),
                });
            }
            "when" => {
                let schedule = self.schedule.get_or_insert(Schedule::NEVER);
                match name {
                    "every" => schedule.every = Some(filled(term, EVERY)?.count("n")?),
                    "over" => schedule.over = Some(filled(term, OVER)?.count("slack")?),
                    _ => {
                        plain("prefill, chunk, every(n=16), over(slack=32) or never")?;
                        match name {
                            "prefill" => schedule.prefill = true,
                            "chunk" => schedule.chunk = true,
                            "never" => {}
                            _ => {
                                return Err(refuse(
                                    "prefill, chunk, every(n=16), over(slack=32) or never".into(),
                                ));
                            }
                        }
                    }
                }
            }
            "positions" => {
                plain("keep or renumber")?;
                self.positions = match name {
                    "keep" => PositionMode::Keep,
                    "renumber" => PositionMode::Renumber,
                    _ => return Err(refuse("keep or renumber".into())),
                };
            }
            other => {
                return Err(RecipeError::Unknown {
                    kind: "stage",
                    name: other.to_owned(),
                    known: STAGES.join(", "),
                });
            }
        }
        Ok(())
    }

    /// The terms of a preset in the place of its name.
    fn expand(&mut self, term: &Term, preset: &Preset, registry: &Registry) -> Result<(), RecipeError> {
        filled(term, &[])?;
        self.add_all(preset.terms, registry)
    }

    fn add_all(&mut self, terms: &str, registry: &Registry) -> Result<(), RecipeError> {
        let mut reader = Reader { text: terms, chars: terms.chars().collect(), at: 0 };
        reader.terms()?.iter().try_for_each(|term| self.add(&reader, term, registry))
    }

    fn choose(&mut self, entry: &Entry, term: &Term) -> Result<(), RecipeError> {
        let chosen = Some((*entry, filled(term, entry.args)?));
        match entry.build {
            Build::Score { .. } | Build::Whole { .. } => self.policy = chosen,
            Build::Allocate { .. } => self.alloc = chosen,
            Build::Reduce { .. } => self.reduce = chosen,
            Build::Index { .. } => self.index = chosen,
            Build::Factor { .. } => self.factor = chosen,
        }
        Ok(())
    }

    fn finish(mut self, reader: &Reader<'_>, registry: &Registry) -> Result<Recipe, RecipeError> {
        if let (Some((Entry { build: Build::Factor { index: Some(index), .. }, .. }, _)), None) =
            (&self.factor, &self.index)
        {
            self.add_all(index, registry)?;
        }
        let over = match (&self.alloc, &self.reduce) {
            (Some((Entry { build: Build::Allocate { over, .. }, .. }, _)), _) => Some(*over),
            (_, Some(_)) => Some(score::snapkv::ENTRY.name),
            _ => None,
        };
        let (entry, args) = match (self.policy.clone(), over) {
            (Some(policy), _) => policy,
            (None, Some(scorer)) => default_args(registry, scorer)?,
            (None, None) if self.index.is_some() || self.factor.is_some() => {
                default_args(registry, whole::full::ENTRY.name)?
            }
            (None, None) => {
                return Err(reader.error(1, "expected a policy among the terms, for example full or snapkv"));
            }
        };
        let mut terms = args.to_string();
        let (policy, schedule): (Arc<dyn Policy>, Schedule) = match entry.build {
            Build::Whole { schedule, build } => {
                self.refuse_stages(&entry)?;
                (build(&args)?, schedule)
            }
            Build::Score { schedule, build } => {
                let scorer = build(&args)?;
                let (alloc, alloc_args) = match self.alloc {
                    Some(chosen) => chosen,
                    None => default_args(registry, allocate::uniform::ENTRY.name)?,
                };
                let Build::Allocate { build, schedule: divided, .. } = alloc.build else {
                    return Err(RecipeError::Unknown {
                        kind: "allocator",
                        name: alloc.name.to_owned(),
                        known: "those of kind allocator".to_owned(),
                    });
                };
                if alloc.name != allocate::uniform::ENTRY.name {
                    terms.push_str(&format!("+alloc={alloc_args}"));
                }
                for (stage, protect) in [("sinks", self.sinks), ("recent", self.recent)] {
                    if let Some(n) = protect.filter(|&n| n > 0) {
                        terms.push_str(&format!("+{stage}={n}"));
                    }
                }
                let marked_last = self.marked.unwrap_or(false);
                if marked_last {
                    terms.push_str("+marked=last");
                }
                let staged = Staged::new(terms.clone(), scorer, build(&alloc_args)?)
                    .sinks(self.sinks.unwrap_or(0))
                    .recent(self.recent.unwrap_or(0))
                    .marked_last(marked_last);
                (Arc::new(staged), divided.unwrap_or(schedule))
            }
            Build::Allocate { .. } | Build::Reduce { .. } | Build::Index { .. } | Build::Factor { .. } => {
                return Err(RecipeError::Unknown {
                    kind: "scorer",
                    name: entry.name.to_owned(),
                    known: "those of kind scorer".to_owned(),
                });
            }
        };
        let index_term = match &self.index {
            Some((Entry { build: Build::Index { build }, .. }, args)) => {
                Some((build(args)?, args.to_string()))
            }
            _ => None,
        };
        let reduce_term = match &self.reduce {
            Some((Entry { build: Build::Reduce { build }, .. }, args)) => {
                Some((build(args)?, args.to_string()))
            }
            _ => None,
        };
        let low_rank_term = match &self.factor {
            Some((Entry { build: Build::Factor { build, .. }, .. }, args)) => {
                Some((build(args)?, args.to_string()))
            }
            _ => None,
        };
        let recipe = Recipe {
            terms: (policy.clone(), terms),
            policy,
            default_schedule: schedule,
            reduce: reduce_term.as_ref().map(|(reduce, _)| Arc::clone(reduce)),
            reduce_term,
            index: index_term.as_ref().map(|(index, _)| Arc::clone(index)),
            index_term,
            low_rank: low_rank_term.as_ref().map(|(low_rank, _)| Arc::clone(low_rank)),
            low_rank_term,
            precision: self.precision,
            schedule: self.schedule.unwrap_or(schedule),
            positions: self.positions,
        };
        recipe.check_parts()?;
        Ok(recipe)
    }

    /// A whole policy has no stages to set.
    fn refuse_stages(&self, entry: &Entry) -> Result<(), RecipeError> {
        let given = [
            ("alloc", self.alloc.is_some()),
            ("sinks", self.sinks.is_some()),
            ("recent", self.recent.is_some()),
            ("marked", self.marked.is_some()),
        ];
        let Some((stage, _)) = given.into_iter().find(|(_, given)| *given) else { return Ok(()) };
        Err(RecipeError::Conflict {
            what: stage.to_owned(),
            with: entry.name.to_owned(),
            why: format!("{} is not made of stages", entry.name),
            change: format!("drop {stage}, or name a scorer instead of {}", entry.name),
        })
    }
}

fn default_args(registry: &Registry, name: &str) -> Result<(Entry, Args), RecipeError> {
    let entry = registry.find(name)?;
    Ok((*entry, Args::defaults(entry.name, entry.args)))
}

/// The `when=` terms of a schedule.
pub(super) fn write_schedule(f: &mut fmt::Formatter<'_>, schedule: Schedule) -> fmt::Result {
    if schedule == Schedule::NEVER {
        return f.write_str("+when=never");
    }
    if schedule.prefill {
        f.write_str("+when=prefill")?;
    }
    if schedule.chunk {
        f.write_str("+when=chunk")?;
    }
    if let Some(n) = schedule.every {
        write!(f, "+when=every(n={n})")?;
    }
    if let Some(slack) = schedule.over {
        write!(f, "+when=over(slack={slack})")?;
    }
    Ok(())
}
