//! What tasks that feed a model through recipes report: a line per recipe and budget, printed or drawn.
//!
//! *Helps* because tasks fill the same line and a reader of JSON meets one shape. *Hurts* by fields that are empty for
//! most tasks; those whose lines differ altogether (`guard`, `recall`) have their own.

use super::Task;
use super::figure::Point;
use crate::args::Variant;
use crate::error::{Error, Result};
use crate::table::{Table, bytes, number, percent};
use kvsieve::{KvCache, SequenceId};
use serde::Serialize;

/// What a prefilled, compressed cache costs, summed over samples.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    pub(super) entries_per_head: f64,
    pub(super) bytes_resident: usize,
    pub(super) bytes_read: usize,
    pub(super) reads: usize,
    pub(super) samples: usize,
}

impl Measured {
    /// What one sequence costs now.
    pub(super) fn of(cache: &KvCache, sequence: SequenceId) -> Result<Self> {
        let stored = cache.stats(sequence)?.total();
        let heads: usize = cache.shape().iter().map(|layer| layer.kv_heads).sum();
        Ok(Self {
            entries_per_head: stored.entries as f64 / heads as f64,
            bytes_resident: stored.bytes_resident,
            bytes_read: 0,
            reads: 0,
            samples: 1,
        })
    }

    /// Notes what the last decode step read.
    pub(super) fn read(&mut self, cache: &KvCache, sequence: SequenceId) -> Result<()> {
        self.bytes_read += cache.stats(sequence)?.total().bytes_read_per_step;
        self.reads += 1;
        Ok(())
    }

    pub(super) fn add(&mut self, other: Self) {
        self.entries_per_head += other.entries_per_head;
        self.bytes_resident += other.bytes_resident;
        self.bytes_read += other.bytes_read;
        self.reads += other.reads;
        self.samples += other.samples;
    }
}

/// One line of the result; `None` where the task does not measure it.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Row {
    pub(super) task: &'static str,
    pub(super) recipe: String,
    pub(super) budget: String,
    pub(super) prompt_tokens: usize,
    pub(super) offset: Option<usize>,
    pub(super) depth: Option<f64>,
    pub(super) entries_per_head: f64,
    pub(super) kv_bytes_resident: usize,
    pub(super) kv_bytes_read_per_step: Option<usize>,
    pub(super) bits_per_element: Option<f64>,
    pub(super) kl: Option<f64>,
    pub(super) same_top1: Option<f64>,
    pub(super) nll: Option<f64>,
    pub(super) nll_over_full: Option<f64>,
    pub(super) accuracy: Option<f64>,
    pub(super) seconds: Option<f64>,
}

impl Row {
    pub(super) fn new(task: &'static str, variant: &Variant, prompt_tokens: usize, cost: Measured) -> Self {
        let samples = cost.samples.max(1);
        Self {
            task,
            recipe: variant.recipe.clone(),
            budget: variant.budget_text(),
            prompt_tokens,
            entries_per_head: cost.entries_per_head / samples as f64,
            kv_bytes_resident: cost.bytes_resident / samples,
            kv_bytes_read_per_step: cost.bytes_read.checked_div(cost.reads),
            ..Self::default()
        }
    }
}

/// MiB resident and KL, of everything but the reference.
pub(super) fn points(rows: &[Row]) -> impl Iterator<Item = Point> {
    let measured = rows.iter().filter(|row| row.recipe != "full");
    measured.filter_map(|row| {
        Some((row.recipe.clone(), row.kv_bytes_resident as f64 / f64::from(1 << 20), row.kl?))
    })
}

pub(super) fn print_json(rows: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(rows).map_err(|e| Error::usage(e.to_string(), "report this"))?;
    println!("{text}");
    Ok(())
}

pub(super) fn print(task: Task, rows: &[Row]) {
    if task.measures_kl() {
        let mut heading = vec![
            "recipe",
            "budget",
            "kept",
            "KV memory",
            "read a step",
            "KL",
            "same top-1",
            "NLL",
            "over full",
        ];
        if task == Task::Windows {
            heading.extend(["bits/element", "time"]);
        }
        let mut table = Table::new(2, &heading);
        for row in rows {
            let mut cells = vec![
                row.recipe.clone(),
                row.budget.clone(),
                format!("{:.0}", row.entries_per_head),
                bytes(row.kv_bytes_resident),
                row.kv_bytes_read_per_step.map_or_else(|| "-".to_owned(), bytes),
                number(row.kl, if task == Task::Windows { 6 } else { 4 }),
                percent(row.same_top1),
                number(row.nll, 4),
                number(row.nll_over_full, 4),
            ];
            if task == Task::Windows {
                cells.extend([
                    number(row.bits_per_element, 2),
                    format!("{:.0} s", row.seconds.unwrap_or(0.0)),
                ]);
            }
            table.row(cells);
        }
        return table.print();
    }
    let heading =
        ["recipe", "budget", "prompt", "offset", "depth", "kept", "KV memory", "read a step", "NLL", "right"];
    let mut table = Table::new(2, &heading);
    for row in rows {
        table.row(vec![
            row.recipe.clone(),
            row.budget.clone(),
            row.prompt_tokens.to_string(),
            row.offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string()),
            row.depth.map_or_else(|| row.task.to_owned(), |depth| format!("{depth}")),
            format!("{:.0}", row.entries_per_head),
            bytes(row.kv_bytes_resident),
            row.kv_bytes_read_per_step.map_or_else(|| "-".to_owned(), bytes),
            number(row.nll, 3),
            percent(row.accuracy),
        ]);
    }
    table.print();
}
