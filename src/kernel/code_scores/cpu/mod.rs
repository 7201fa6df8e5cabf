//! Blocks of entries, for all query rows of their KV head, in vectors and threads.
//!
//! Codes of 4 bits are looked up in registers where there is an instruction for it (`scan`); others in memory
//! (`lookup`). Either way tables are brought into shape once per call and KV head, and a code is read once for all query
//! rows of its group. Heads and runs of pages go to other threads.
//!
//! No score depends on another, so the same call gives the same bits however it is cut. *Helps* decode: it runs near the
//! speed of memory. *Hurts* pages of few entries: a block never spans two.

mod lookup;
mod scan;

use super::{CodeArgs, CodeLayout, QUAD};
use crate::device::HeadRows;
use crate::device::page::PageRef;
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::simd::gemm::PAD;
use crate::kernel::simd::tile::{first_slot, page_count, page_of, pages_in};
use crate::kernel::simd::{Exec, Lent, Level, both, dispatch, take};
use crate::kernel::total_rows;
use std::ops::Range;

/// Query rows that a strip serves: a multiple of [`QUAD`].
const BLOCK: usize = 16;

/// Fewest entries that are cut in two: reading fewer takes no longer than waking a thread.
const STRIP_MIN: usize = 2048;

/// See [`super`].
///
/// # Errors
/// As [`CodeArgs::validate`].
pub fn run(exec: &Exec, args: &mut CodeArgs<'_>, workspace: &mut Workspace) -> Result<(), KernelError> {
    args.validate()?;
    if args.out.is_empty() {
        return Ok(());
    }
    let context = Context {
        exec,
        layout: args.layout,
        levels: args.levels,
        rows: args.group * args.tokens,
        // Without an instruction a shuffle is sixteen loads and stores.
        scans: args.layout.rounded() && (exec.level() > Level::Baseline || cfg!(target_arch = "aarch64")),
    };
    // A vector looks up as many codes as it has bytes; memory gives one at a time.
    let lookups = total_rows(args.heads) * context.rows * args.layout.codes;
    let tasks = exec.tasks(if context.scans { lookups } else { 8 * lookups });
    let shaped = args.heads.len() * context.shaped_len();
    let (shaped, scratch) = workspace.take(shaped + tasks * context.scratch_len()).split_at_mut(shaped);
    let heads = Heads { context, heads: args.heads, tables: args.tables, shaped, out: args.out };
    exec.run(tasks, || heads.spread(Lent { scratch, tasks }));
    Ok(())
}

#[derive(Clone, Copy)]
struct Context<'a> {
    exec: &'a Exec,
    layout: CodeLayout,
    levels: usize,
    /// `G·T`.
    rows: usize,
    /// Whether codes are looked up in registers.
    scans: bool,
}

impl Context<'_> {
    /// Numbers of the tables of a query row.
    fn table(&self) -> usize {
        self.layout.codes * self.levels
    }

    /// Floats of the tables of four query rows, in the shape that is read.
    fn quad_len(&self) -> usize {
        let len = if self.scans { scan::quad_len(self.layout) } else { QUAD * self.table() };
        len.next_multiple_of(PAD)
    }

    /// Floats of the tables of a KV head in that shape.
    fn shaped_len(&self) -> usize {
        self.rows.div_ceil(QUAD) * self.quad_len()
    }

    /// Scratch of one task.
    fn scratch_len(&self) -> usize {
        let len = if self.scans { scan::scratch_len(self.layout) } else { lookup::SCRATCH };
        len.next_multiple_of(PAD)
    }

    /// Brings the tables of a KV head into shape.
    fn shape(&self, tables: &[f32], shaped: &mut [f32]) {
        let quads = tables.chunks(QUAD * self.table()).zip(shaped.chunks_exact_mut(self.quad_len()));
        for (tables, quad) in quads {
            if self.scans {
                dispatch!(self.exec.token(), simd => scan::round(simd, self.layout, self.levels, tables, quad));
            } else if tables.len() > self.table() {
                super::interleave(
                    tables,
                    self.table(),
                    bytemuck::cast_slice_mut(&mut quad[..QUAD * self.table()]),
                );
            }
        }
    }
}

/// Some of the KV heads; tables, room for them and `out` are theirs only.
struct Heads<'a> {
    context: Context<'a>,
    heads: &'a [HeadRows],
    tables: &'a [f32],
    shaped: &'a mut [f32],
    out: &'a mut [f32],
}

impl Heads<'_> {
    fn spread(mut self, lent: Lent<'_>) {
        let context = self.context;
        if let [head] = self.heads {
            return self.strips(head, lent);
        }
        let at = self.heads.len() / 2;
        let (heads, rest) = self.heads.split_at(at);
        let (tables, rest_tables) = self.tables.split_at(at * context.rows * context.table());
        let shaped = take(&mut self.shaped, at * context.shaped_len());
        let out = take(&mut self.out, context.rows * total_rows(heads));
        let left = Heads { context, heads, tables, shaped, out };
        let right = Heads { heads: rest, tables: rest_tables, ..self };
        let weights = (total_rows(left.heads) + 1, total_rows(right.heads) + 1);
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// All of the one head.
    fn strips(self, head: &HeadRows, lent: Lent<'_>) {
        let (context, entries) = (self.context, head.rows());
        if entries == 0 {
            return;
        }
        context.shape(self.tables, self.shaped);
        let Lent { scratch, tasks } = lent;
        let blocks = self.out.chunks_mut(BLOCK * entries);
        let tables = self.tables.chunks(BLOCK * context.table());
        let shaped = self.shaped.chunks(BLOCK / QUAD * context.quad_len());
        for ((out, tables), shaped) in blocks.zip(tables).zip(shaped) {
            let rows = out.len() / entries;
            let mut lines = out.chunks_exact_mut(entries);
            let strip = Strip {
                context,
                head,
                rows,
                tables,
                shaped,
                pages: 0..page_count(head),
                slots: 0..entries,
                out: std::array::from_fn(|_| lines.next().unwrap_or_default()),
            };
            strip.spread(Lent { scratch: &mut *scratch, tasks });
        }
    }
}

/// Up to [`BLOCK`] query rows on some pages.
struct Strip<'a> {
    context: Context<'a>,
    head: &'a HeadRows,
    rows: usize,
    /// Of these rows, as they came.
    tables: &'a [f32],
    /// And in the shape that is read, by fours.
    shaped: &'a [f32],
    pages: Range<usize>,
    /// Of the pages.
    slots: Range<usize>,
    /// Of each query row, the entries of the pages.
    out: [&'a mut [f32]; BLOCK],
}

impl<'a> Strip<'a> {
    fn spread(self, lent: Lent<'_>) {
        if lent.tasks < 2 || self.pages.len() < 2 || self.slots.len() < 2 * STRIP_MIN {
            return self.work(lent.scratch);
        }
        let (left, right) = self.split();
        let weights = (left.slots.len(), right.slots.len());
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// In two between pages, about half-way.
    fn split(mut self) -> (Self, Self) {
        let middle = page_of(self.head, self.slots.start.midpoint(self.slots.end));
        let page = middle.clamp(self.pages.start + 1, self.pages.end - 1);
        let slot = first_slot(self.head, page);
        let (rows, len) = (self.rows, slot - self.slots.start);
        let left = Strip {
            pages: self.pages.start..page,
            slots: self.slots.start..slot,
            out: std::array::from_fn(|r| if r < rows { take(&mut self.out[r], len) } else { &mut [] }),
            ..self
        };
        (left, Strip { pages: page..self.pages.end, slots: slot..self.slots.end, ..self })
    }

    fn work(self, scratch: &mut [f32]) {
        let exec = self.context.exec;
        if self.context.scans {
            dispatch!(exec.token(), simd => scan::strip(simd, self, scratch));
        } else {
            dispatch!(exec.token(), simd => lookup::strip(simd, self, scratch));
        }
    }

    /// The pages, each with the words of its codes and where its scores go.
    fn pages(&self) -> impl Iterator<Item = (PageRef<'a>, &'a [u32], usize)> + use<'a> {
        let (words, start) = (self.context.layout.words(), self.slots.start);
        pages_in(self.head, self.pages.clone()).map(move |page| {
            let bytes = &page.page.block.host()[..4 * words * page.rows];
            (page, bytemuck::cast_slice(bytes), page.first - start)
        })
    }
}
