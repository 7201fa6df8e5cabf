//! Scores by codes: sums of looked-up numbers, over pages whose words are no numbers.
//!
//! *Helps* because the allowed error follows the tables of each query row, and no row is excused by another's. *Hurts*
//! nothing.

use super::attention::some_spans;
use super::{Effort, Failure, KernelReport, compare, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::device::page::HeadRows;
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::code_scores::{self, CodeArgs, CodeLayout, ROUNDED_CODES};
use crate::kernel::total_rows;
use crate::testing::Random;
use crate::testing::cache::{codes, poisoned};

/// Codes of entries and tables of queries, without saying where they lie.
struct Case {
    layout: CodeLayout,
    levels: usize,
    group: usize,
    tokens: usize,
    /// Entries of each KV head.
    rows: &'static [usize],
    capacity: usize,
    tables: Kind,
}

/// What stands in the tables.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Normal numbers.
    Normal,
    /// One wide table among narrow ones, far from zero.
    Offset,
    /// The largest sum that fits 16 bits: of the widest tables, ends only.
    Ends,
    /// The same number everywhere.
    Constant,
    /// Numbers whose step is subnormal.
    Tiny,
    /// Numbers whose sums nearly leave the range of `f32`.
    Huge,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Normal, Self::Offset, Self::Ends, Self::Constant, Self::Tiny, Self::Huge];

    /// `[rows, M, levels]`.
    fn tables(self, case: &Case, rows: usize) -> Vec<f32> {
        let (codes, levels) = (case.layout.codes, case.levels);
        let mut random = Random::new(31);
        let numbers = 0..rows * codes * levels;
        let huge = f32::MAX / (16.0 * codes as f32);
        let of = |i: usize| {
            let (m, row) = (i / levels % codes, i / (codes * levels));
            let x = random.normal();
            match self {
                // Rows of very different sizes: none may lean on another's tolerance.
                Self::Normal => x * 10f32.powi((row % 5) as i32 * 3 - 6),
                Self::Offset => 1000.0 + x * if m == codes / 2 { 20.0 } else { 0.1 },
                Self::Ends => 255.0 * (random.bits() % 2) as f32,
                Self::Constant => -3.25,
                Self::Tiny => x * 1e-38,
                Self::Huge => x * huge,
            }
        };
        numbers.map(of).collect()
    }
}

/// Layouts, each with heads, pages and query rows around the widths implementations work in.
fn cases() -> Vec<Case> {
    let layouts = [
        (32, 4, 16),
        (16, 4, 16),
        (1, 4, 16),
        (3, 4, 11),
        (8, 4, 16),
        (9, 4, 1),
        (24, 4, 5),
        (33, 4, 16),
        (64, 4, 16),
        (ROUNDED_CODES, 4, 16),
        (ROUNDED_CODES + 1, 4, 16),
        (2, 8, 64),
        (1, 8, 1),
        (5, 8, 256),
        (16, 8, 200),
        (1, 16, 4096),
        (3, 16, 700),
    ];
    let heads: [(&[usize], usize); 5] =
        [(&[300, 0, 65], 64), (&[1], 16), (&[129, 200], 256), (&[37, 16], 7), (&[64], 128)];
    let rows = [(4, 1), (1, 1), (3, 1), (2, 1), (5, 2), (8, 1), (4, 9)];
    let mut cases = Vec::new();
    for (i, (codes, bits, levels)) in layouts.into_iter().enumerate() {
        for (j, (rows_of, capacity)) in heads.into_iter().enumerate() {
            let (group, tokens) = rows[(i + j) % rows.len()];
            let layout = CodeLayout { codes, bits };
            let tables = Kind::ALL[(i + 2 * j) % Kind::ALL.len()];
            cases.push(Case { layout, levels, group, tokens, rows: rows_of, capacity, tables });
        }
    }
    for tables in Kind::ALL {
        let layout = CodeLayout { codes: ROUNDED_CODES, bits: 4 };
        cases.push(Case { layout, levels: 16, group: 4, tokens: 1, rows: &[100], capacity: 64, tables });
    }
    // Enough entries for several threads.
    let layout = CodeLayout { codes: 32, bits: 4 };
    let (rows, tables) = (&[5000, 20_000], Kind::Normal);
    cases.push(Case { layout, levels: 16, group: 4, tokens: 1, rows, capacity: 256, tables });
    let layout = CodeLayout { codes: 2, bits: 8 };
    cases.push(Case { layout, levels: 64, group: 6, tokens: 1, rows, capacity: 256, tables });
    cases
}

impl Case {
    fn name(&self) -> String {
        let (CodeLayout { codes, bits }, levels) = (self.layout, self.levels);
        let (group, tokens, rows, capacity) = (self.group, self.tokens, self.rows, self.capacity);
        format!(
            "{codes} codes of {bits} bits, {levels} levels, group {group}, tokens {tokens}, {rows:?} entries in pages of {capacity}, {:?}",
            self.tables
        )
    }

    fn build(&self, backend: &dyn Backend) -> Result<Vec<HeadRows>, KernelError> {
        codes(backend, 30, self.layout, self.rows, self.capacity)
    }

    /// `[Hq, T, M, levels]`.
    fn tables(&self) -> Vec<f32> {
        self.tables.tables(self, self.rows.len() * self.group * self.tokens)
    }

    fn args<'a>(&self, heads: &'a [HeadRows], tables: &'a [f32], out: &'a mut [f32]) -> CodeArgs<'a> {
        let (layout, levels) = (self.layout, self.levels);
        CodeArgs { heads, layout, levels, tables, group: self.group, tokens: self.tokens, spans: None, out }
    }

    fn check(&self, backend: &dyn Backend, seed: u64) -> Result<f64, Failure> {
        let reference = Reference::default();
        let (ours, theirs, tables) = (self.build(&reference)?, self.build(backend)?, self.tables());
        let mut workspace = Workspace::default();
        let mut worst = 0.0f64;
        for spans in some_spans(seed, &ours) {
            let spans = spans.as_deref();
            let entries = |h: usize| spans.map_or(self.rows[h], |s| s[h].rows());
            let all: usize = (0..self.rows.len()).map(entries).sum();
            let mut run = |on: &dyn Backend, heads| {
                let mut out = poisoned(self.group * self.tokens * all);
                let mut args = CodeArgs { spans, ..self.args(heads, &tables, &mut out) };
                on.code_scores(&mut args, &mut workspace).map(|()| out)
            };
            let (want, got) = (run(&reference, &ours)?, run(backend, &theirs)?);
            expect_same_bits("scores", &got, &run(backend, &theirs)?)?;
            expect_written("scores", &got)?;
            let mut tables = tables.chunks_exact(self.layout.codes * self.levels);
            let mut start = 0;
            for h in 0..self.rows.len() {
                for (row, table) in tables.by_ref().take(self.group * self.tokens).enumerate() {
                    let line = start..start + entries(h);
                    start = line.end;
                    let allowed = code_scores::tolerance(self.layout, self.levels, table);
                    let what = format!("head {h}, query row {row}: score");
                    worst = worst.max(compare(&what, &got[line.clone()], &want[line], |_| allowed)?);
                }
            }
        }
        Ok(worst)
    }
}

/// Cases of [`crate::kernel::code_scores`].
pub fn code_scores(backend: &dyn Backend, effort: Effort) -> KernelReport {
    let mut report = KernelReport::new(code_scores::NAME);
    for (i, case) in cases().iter().enumerate().filter(|(i, _)| effort.wants(*i)) {
        report.case(case.name(), || case.check(backend, i as u64));
    }
    let case = &cases()[0];
    for (i, what) in ["tables", "out", "levels", "levels below one", "spans"].into_iter().enumerate() {
        report.case(format!("wrong length of {what}"), || {
            let (heads, mut tables) = (case.build(backend)?, case.tables());
            let mut out = poisoned(case.group * case.tokens * total_rows(&heads) + usize::from(i == 1));
            tables.truncate(tables.len() - usize::from(i == 0));
            let args = &mut case.args(&heads, &tables, &mut out);
            args.levels = [16, 16, 17, 0, 16][i];
            args.spans = (i == 4).then_some(&[]);
            expect_length_error(what, backend.code_scores(args, &mut Workspace::default()))
        });
    }
    for (i, what) in ["5 bits", "no codes", "more words", "keys of another type"].into_iter().enumerate() {
        report.case(format!("a layout of {what}"), || {
            let mut heads = case.build(backend)?;
            if i == 3 {
                let layout = &mut heads[0].segments[0].layout;
                let half = crate::device::page::PageLayout {
                    k: crate::view::DType::F16.into(),
                    ..(**layout).clone()
                };
                *layout = std::sync::Arc::new(half);
            }
            let (tables, mut out) = (case.tables(), poisoned(case.group * case.tokens * total_rows(&heads)));
            let args = &mut case.args(&heads, &tables, &mut out);
            match i {
                0 => args.layout.bits = 5,
                1 => args.layout.codes = 0,
                2 => args.layout.codes = 33,
                _ => {}
            }
            match backend.code_scores(args, &mut Workspace::default()) {
                Err(KernelError::Layout { .. }) => Ok(0.0),
                other => Err(format!("{other:?}").into()),
            }
        });
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        report.case(format!("{bad} in a table"), || {
            let (heads, mut tables) = (case.build(backend)?, case.tables());
            let mut out = poisoned(case.group * case.tokens * total_rows(&heads));
            tables[7 * case.layout.codes * case.levels - 1] = bad;
            let args = &mut case.args(&heads, &tables, &mut out);
            match backend.code_scores(args, &mut Workspace::default()) {
                Err(KernelError::NotFinite { row: 6, .. }) => Ok(0.0),
                other => Err(format!("{other:?}").into()),
            }
        });
    }
    report
}
