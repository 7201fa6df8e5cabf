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
use crate::kernel::simd::prefetch::request;
use crate::kernel::simd::tile::{first_slot, page_count, page_of, pages_in};
use crate::kernel::simd::{Exec, Lent, Level, both, dispatch, take};
use crate::kernel::{Span, Spans};
use std::ops::Range;

/// Query rows that a strip serves: a multiple of [`QUAD`].
const BLOCK: usize = 16;

/// Most entries of a block.
const LANES: usize = 64;

/// Entries whose codes are requested before they are read.
const AHEAD: usize = 8 * LANES;

/// How many pages ahead the description of one is requested.
const PAGES_AHEAD: usize = 4;

/// Words of a cache line.
const LINE: usize = 16;

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
    let entries: usize = (0..args.heads.len()).map(|h| args.entries(h)).sum();
    let lookups = entries * context.rows * args.layout.codes;
    let tasks = exec.tasks(if context.scans { lookups } else { 8 * lookups });
    let shaped = args.heads.len() * context.shaped_len();
    let (shaped, scratch) = workspace.take(shaped + tasks * context.scratch_len()).split_at_mut(shaped);
    let heads =
        Heads { context, heads: args.heads, tables: args.tables, shaped, spans: args.spans, out: args.out };
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
        len.next_multiple_of(PAD) + (LANES * self.layout.words()).next_multiple_of(PAD)
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
    spans: Option<&'a [Spans]>,
    out: &'a mut [f32],
}

impl Heads<'_> {
    /// Entries to score.
    fn entries(&self) -> usize {
        match self.spans {
            Some(spans) => spans.iter().map(Spans::rows).sum(),
            None => self.heads.iter().map(HeadRows::rows).sum(),
        }
    }

    fn spread(mut self, lent: Lent<'_>) {
        let context = self.context;
        if let [head] = self.heads {
            return self.strips(head, lent);
        }
        let at = self.heads.len() / 2;
        let (heads, rest) = self.heads.split_at(at);
        let (tables, rest_tables) = self.tables.split_at(at * context.rows * context.table());
        let shaped = take(&mut self.shaped, at * context.shaped_len());
        let spans = self.spans.map(|spans| spans.split_at(at));
        let mut left = Heads { context, heads, tables, shaped, spans: spans.map(|s| s.0), out: &mut [] };
        left.out = take(&mut self.out, context.rows * left.entries());
        let right = Heads { heads: rest, tables: rest_tables, spans: spans.map(|s| s.1), ..self };
        let weights = (left.entries() + 1, right.entries() + 1);
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// All of the one head.
    fn strips(self, head: &HeadRows, lent: Lent<'_>) {
        let (context, entries) = (self.context, self.entries());
        if entries == 0 {
            return;
        }
        context.shape(self.tables, self.shaped);
        let Lent { scratch, tasks } = lent;
        let all = [Span { start: 0, end: head.rows() as u32 }];
        let spans = self.spans.and_then(<[_]>::first).map_or(&all[..], Spans::spans);
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
                spans,
                slots: 0..head.rows(),
                out: std::array::from_fn(|_| lines.next().unwrap_or_default()),
            };
            strip.spread(Lent { scratch: &mut *scratch, tasks });
        }
    }
}

/// Up to [`BLOCK`] query rows on some entries.
struct Strip<'a> {
    context: Context<'a>,
    head: &'a HeadRows,
    rows: usize,
    /// Of these rows, as they came.
    tables: &'a [f32],
    /// And in the shape that is read, by fours.
    shaped: &'a [f32],
    /// Those that meet the slots.
    spans: &'a [Span],
    /// Where entries are to be scored.
    slots: Range<usize>,
    /// Of each query row, the entries that are.
    out: [&'a mut [f32]; BLOCK],
}

impl<'a> Strip<'a> {
    fn spread(self, lent: Lent<'_>) {
        if lent.tasks < 2 || self.out[0].len() < 2 * STRIP_MIN {
            return self.work(lent.scratch);
        }
        let (left, right) = self.split();
        let weights = (left.out[0].len(), right.out[0].len());
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// In two, about where half of what is chosen has gone by; a single span between pages.
    fn split(mut self) -> (Self, Self) {
        let slot = match self.spans {
            [span] => {
                let slots = span.within(&self.slots);
                let middle = slots.start.midpoint(slots.end);
                let page = first_slot(self.head, page_of(self.head, middle));
                if page > slots.start { page } else { middle }
            }
            spans => spans[spans.len() / 2].slots().start,
        };
        let spans = &self.spans[..self.spans.partition_point(|s| s.slots().start < slot)];
        let slots = self.slots.start..slot;
        let len = spans.iter().map(|s| s.within(&slots).len()).sum();
        let rows = self.rows;
        let left = Strip {
            spans,
            slots,
            out: std::array::from_fn(|r| if r < rows { take(&mut self.out[r], len) } else { &mut [] }),
            ..self
        };
        let rest = &self.spans[self.spans.partition_point(|s| s.slots().end <= slot)..];
        (left, Strip { spans: rest, slots: slot..self.slots.end, ..self })
    }

    fn work(self, scratch: &mut [f32]) {
        let exec = self.context.exec;
        if self.context.scans {
            dispatch!(exec.token(), simd => scan::strip(simd, self, scratch));
        } else {
            dispatch!(exec.token(), simd => lookup::strip(simd, self, scratch));
        }
    }

    /// The entries, a block at a time.
    fn blocks(&self) -> Blocks<'a, impl Iterator<Item = PageRef<'a>> + Clone + use<'a>> {
        let first = page_of(self.head, self.slots.start);
        let runs = Runs {
            words: self.context.layout.words(),
            pages: pages_in(self.head, first..page_count(self.head)),
            codes: &[],
            held: 0..0,
            spans: self.spans,
            slots: self.slots.clone(),
        };
        // One span is read as it lies: the hardware sees that coming.
        let ahead = (self.spans.len() > 1).then(|| (runs.clone(), 0));
        Blocks { runs, done: 0, ahead }
    }
}

/// What of some pages is chosen, as runs of slots that lie together in a page.
#[derive(Clone)]
struct Runs<'a, I> {
    words: usize,
    pages: I,
    /// Codes of the page that was met last.
    codes: &'a [u32],
    /// Its slots.
    held: Range<usize>,
    /// Spans that are left.
    spans: &'a [Span],
    /// Slots that are left.
    slots: Range<usize>,
}

impl<'a, I: Iterator<Item = PageRef<'a>> + Clone> Runs<'a, I> {
    /// The codes from the next entry on to the end of its page, and how many up to `most` entries are chosen of them.
    fn next(&mut self, most: usize) -> Option<(&'a [u32], usize)> {
        let slots = loop {
            let (span, rest) = self.spans.split_first()?;
            let slots = span.within(&self.slots);
            if !slots.is_empty() {
                break slots;
            }
            self.spans = rest;
        };
        while self.held.end <= slots.start {
            let page = self.pages.next()?;
            if let Some(later) = self.pages.clone().nth(PAGES_AHEAD) {
                request(later.page);
            }
            let bytes = &page.page.block.host()[..4 * self.words * page.rows];
            (self.codes, self.held) = (bytemuck::cast_slice(bytes), page.first..page.first + page.rows);
        }
        let end = slots.end.min(self.held.end).min(slots.start.saturating_add(most));
        self.slots.start = end;
        Some((&self.codes[(slots.start - self.held.start) * self.words..], end - slots.start))
    }
}

/// Entries in order, as blocks of codes that lie together: in their page where a run of them is long enough, and copied
/// otherwise.
struct Blocks<'a, I> {
    runs: Runs<'a, I>,
    /// Entries that are gone by.
    done: usize,
    /// What of many spans is requested, and how many entries were.
    ahead: Option<(Runs<'a, I>, usize)>,
}

impl<'a, I: Iterator<Item = PageRef<'a>> + Clone> Blocks<'a, I> {
    /// The next up to `lanes` entries: their codes, and which of all entries they are. `copies` is lent.
    fn next<'t>(&mut self, lanes: usize, copies: &'t mut [u32]) -> Option<(&'t [u32], Range<usize>)>
    where
        'a: 't,
    {
        let (words, start, mut filled) = (self.runs.words, self.done, 0);
        if let Some((runs, requested)) = &mut self.ahead {
            while *requested < start + AHEAD
                && let Some((codes, len)) = runs.next(usize::MAX)
            {
                *requested += len;
                let codes = &codes[..len * words];
                codes.chunks(LINE).for_each(|line| request(&line[0]));
                codes.last().into_iter().for_each(request);
            }
        }
        while filled < lanes
            && let Some((codes, len)) = self.runs.next(lanes - filled)
        {
            self.done += len;
            if len == lanes {
                return Some((&codes[..len * words], start..self.done));
            }
            copy(codes, len * words, &mut copies[filled * words..]);
            filled += len;
        }
        (filled > 0).then_some((&copies[..filled * words], start..self.done))
    }
}

/// The first `len` words, by whole cache lines as far as there is room: what is too much is overwritten later, and a call
/// would take longer than so few.
fn copy(from: &[u32], len: usize, to: &mut [u32]) {
    let mut done = 0;
    while done < len {
        match (from[done..].first_chunk::<LINE>(), to[done..].first_chunk_mut::<LINE>()) {
            (Some(line), Some(to)) => *to = *line,
            _ => {
                to[done..len].copy_from_slice(&from[done..len]);
                return;
            }
        }
        done += LINE;
    }
}
