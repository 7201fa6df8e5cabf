//! Logits of blocks of query rows, tile by tile, in vectors and threads.
//!
//! The `G·T` query rows of a KV head are cut into blocks; a block walks the tiles of the pages once, so a key row is
//! read once for all query rows of its group, in place where they are few, while the next tile is on its way into the
//! caches. Heads, blocks and runs of pages go to other threads. Of a page in which nothing was chosen not even the
//! description is read, nor is a tile without any; of exact rows, neither is what lies before the first chosen one of a
//! tile and behind the last.
//!
//! No logit depends on another, so the same call gives the same bits however it is cut. *Helps* decode with an index:
//! it runs at the speed of memory. *Hurts* spans of single entries, of which every one reads up to a tile where rows
//! are packed.

use super::DotArgs;
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::attend::Workspace;
use crate::kernel::simd::gemm::PAD;
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::tile::{
    BLOCK, QueryBlock, ScoreScratch, TILE, Tile, digits_len, first_slot, padded_bias, page_count, page_of,
    request_page_of, rotation_len, tiles, unmasked,
};
use crate::kernel::simd::{Exec, Lent, both, dispatch, take};
use crate::kernel::{AttentionParams, Span, Spans};
use fearless_simd::{Simd, SimdBase};
use std::ops::Range;

/// Fewest chosen entries that are cut in two: reading fewer takes no longer than waking a thread.
const STRIP_MIN: usize = 512;

/// How many spans ahead the description of a page is requested.
const SPANS_AHEAD: usize = 8;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(
    exec: &Exec,
    params: &AttentionParams<'_>,
    args: &mut DotArgs<'_>,
    workspace: &mut Workspace,
) -> Result<(), KernelError> {
    args.validate(params)?;
    if args.out.is_empty() {
        return Ok(());
    }
    let heads = Heads {
        context: Context { exec, params, rows: params.group * args.tokens },
        heads: args.heads,
        queries: args.queries,
        spans: args.spans,
        out: args.out,
    };
    let tasks = exec.tasks(heads.chosen() * heads.context.rows * params.d_k);
    let scratch = workspace.take(tasks * scratch_len(params));
    exec.run(tasks, || heads.spread(Lent { scratch, tasks }));
    Ok(())
}

#[derive(Clone, Copy)]
struct Context<'a> {
    exec: &'a Exec,
    params: &'a AttentionParams<'a>,
    /// `G·T`.
    rows: usize,
}

/// Some of the KV heads; queries, spans and `out` are theirs only.
struct Heads<'a> {
    context: Context<'a>,
    heads: &'a [HeadRows],
    queries: &'a [f32],
    spans: Option<&'a [Spans]>,
    out: &'a mut [f32],
}

impl Heads<'_> {
    /// Entries to score.
    fn chosen(&self) -> usize {
        match self.spans {
            Some(spans) => spans.iter().map(Spans::rows).sum(),
            None => self.heads.iter().map(HeadRows::rows).sum(),
        }
    }

    fn spread(mut self, lent: Lent<'_>) {
        let context = self.context;
        if let [head] = self.heads {
            let block = context.rows.div_ceil(context.rows.div_ceil(BLOCK));
            let all = [Span { start: 0, end: head.rows() as u32 }];
            let spans = self.spans.and_then(<[_]>::first).map_or(&all[..], Spans::spans);
            let blocks = Blocks { context, head, queries: self.queries, spans, block, out: self.out };
            return blocks.spread(lent);
        }
        let at = self.heads.len() / 2;
        let (heads, rest) = self.heads.split_at(at);
        let (queries, rest_queries) = self.queries.split_at(at * context.rows * context.params.d_k);
        let mut left = Heads { context, heads, queries, spans: self.spans.map(|s| &s[..at]), out: &mut [] };
        left.out = take(&mut self.out, context.rows * left.chosen());
        let right = Heads { heads: rest, queries: rest_queries, spans: self.spans.map(|s| &s[at..]), ..self };
        let weights = (left.chosen() + 1, right.chosen() + 1);
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }
}

/// Some blocks of the query rows of a KV head.
struct Blocks<'a> {
    context: Context<'a>,
    head: &'a HeadRows,
    queries: &'a [f32],
    spans: &'a [Span],
    /// Query rows of a block, but for the last one.
    block: usize,
    /// `[query rows, chosen entries]`.
    out: &'a mut [f32],
}

impl Blocks<'_> {
    fn spread(mut self, lent: Lent<'_>) {
        let d_k = self.context.params.d_k;
        let rows = self.queries.len() / d_k;
        let entries = self.out.len() / rows;
        if rows <= self.block {
            let out = self.out;
            let mut lines = out.chunks_exact_mut(entries.max(1));
            let strip = Strip {
                context: self.context,
                head: self.head,
                queries: self.queries,
                spans: self.spans,
                pages: 0..page_count(self.head),
                slots: 0..self.head.rows(),
                out: std::array::from_fn(|_| lines.next().unwrap_or_default()),
            };
            return strip.spread(lent);
        }
        let at = rows.div_ceil(self.block) / 2 * self.block;
        let (queries, rest) = self.queries.split_at(at * d_k);
        let left = Blocks { queries, out: take(&mut self.out, at * entries), ..self };
        let right = Blocks { queries: rest, ..self };
        both(lent, (at, rows - at), |lent| left.spread(lent), |lent| right.spread(lent));
    }
}

/// A block of query rows on some pages.
struct Strip<'a> {
    context: Context<'a>,
    head: &'a HeadRows,
    /// `[rows, d_k]`, of at most [`BLOCK`] rows.
    queries: &'a [f32],
    /// Those that meet the pages.
    spans: &'a [Span],
    pages: Range<usize>,
    /// Of the pages.
    slots: Range<usize>,
    /// Of each query row, the chosen entries of the pages.
    out: [&'a mut [f32]; BLOCK],
}

impl Strip<'_> {
    fn rows(&self) -> usize {
        self.queries.len() / self.context.params.d_k
    }

    /// Entries to score.
    fn chosen(&self) -> usize {
        self.spans.iter().map(|&s| s.within(&self.slots).len()).sum()
    }

    fn spread(self, lent: Lent<'_>) {
        let work = |strip: Self, lent: Lent<'_>| {
            let exec = strip.context.exec;
            dispatch!(exec.token(), simd => strip.work(simd, lent.scratch));
        };
        if lent.tasks < 2 || self.pages.len() < 2 || self.chosen() < 2 * STRIP_MIN {
            return work(self, lent);
        }
        let (left, right) = self.split();
        let weights = (left.chosen() + 1, right.chosen() + 1);
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// In two between pages, about where half of what is chosen has gone by.
    fn split(mut self) -> (Self, Self) {
        let middle = match self.spans {
            [span] => {
                let slots = span.within(&self.slots);
                slots.start.midpoint(slots.end)
            }
            spans => spans[spans.len() / 2].slots().start,
        };
        let page = page_of(self.head, middle).clamp(self.pages.start + 1, self.pages.end - 1);
        let slot = first_slot(self.head, page);
        let rows = self.rows();
        let mut left = Strip {
            spans: &self.spans[..self.spans.partition_point(|s| s.slots().start < slot)],
            pages: self.pages.start..page,
            slots: self.slots.start..slot,
            out: [(); BLOCK].map(|()| &mut [][..]),
            ..self
        };
        let len = left.chosen();
        left.out.iter_mut().zip(&mut self.out).take(rows).for_each(|(left, all)| *left = take(all, len));
        let right = Strip {
            spans: &self.spans[self.spans.partition_point(|s| s.slots().end <= slot)..],
            pages: page..self.pages.end,
            slots: slot..self.slots.end,
            ..self
        };
        (left, right)
    }

    #[inline(always)]
    fn work<S: Simd>(mut self, simd: S, memory: &mut [f32]) {
        let (params, rows) = (self.context.params, self.rows());
        let Scratch { mut score, rotation, digits } = Scratch::cut(memory, params);
        let block = QueryBlock::new(self.queries, params.d_k, &[], 0..rows, self.head, rotation)
            .with_digits(simd, params.d_k, self.head, digits);
        let mut scored = 0;
        let mut tiles = chosen_tiles(self.head, self.pages.clone(), self.spans).peekable();
        while let Some((tile, spans)) = tiles.next() {
            let next = tiles.peek().map(|(next, _)| next);
            if let Some(next) = next {
                next.request_bias();
            }
            let ahead = next.map_or(Ahead::NONE, |next| next.ahead(Side::Key));
            block.dots(simd, &tile, &mut score, &mut false, ahead);
            let (bias, slots) = (padded_bias(&tile), tile.slot()..tile.slot() + tile.len);
            let first = scored;
            for (r, out) in self.out[..rows].iter_mut().enumerate() {
                scored = first;
                let x = &mut score.scores[r * TILE..][..tile.len.next_multiple_of(S::f32s::LEN)];
                unmasked(simd, params, bias.as_ref(), x);
                for &span in spans {
                    let run = span.within(&slots);
                    let x = &x[run.start - slots.start..run.end - slots.start];
                    out[scored..scored + x.len()].copy_from_slice(x);
                    scored += x.len();
                }
            }
        }
    }
}

/// The tiles of some pages that `spans` meet, cut to what is chosen of them where they can be, each with the spans that
/// meet it.
fn chosen_tiles<'a>(
    head: &'a HeadRows,
    pages: Range<usize>,
    spans: &'a [Span],
) -> impl Iterator<Item = (Tile<'a>, &'a [Span])> {
    // Other pages are not looked at: where one lies is a cache miss of its own.
    let mut next = pages.start;
    let met = spans.iter().enumerate().flat_map(move |(i, span)| {
        if let Some(later) = spans.get(i + SPANS_AHEAD) {
            request_page_of(head, later.start as usize);
        }
        let first = page_of(head, span.start as usize).clamp(next, pages.end);
        let last = (span.end as usize).saturating_sub(1);
        next = (page_of(head, last) + 1).clamp(first, pages.end);
        tiles(head, first..next)
    });
    let mut rest = spans;
    met.filter_map(move |tile| {
        let slots = tile.slot()..tile.slot() + tile.len;
        while let Some((first, others)) = rest.split_first()
            && first.slots().end <= slots.start
        {
            rest = others;
        }
        let met = rest.iter().take_while(|s| s.slots().start < slots.end).count();
        let spans = &rest[..met];
        let (first, last) = (spans.first()?, spans.last()?);
        let chosen = first.within(&slots).start - slots.start..last.within(&slots).end - slots.start;
        Some((tile.narrowed(chosen), spans))
    })
}

/// Scratch of one task.
struct Scratch<'a> {
    score: ScoreScratch<'a>,
    /// Rotated queries.
    rotation: &'a mut [f32],
    /// Queries for products in integers.
    digits: &'a mut [f32],
}

fn scratch_len(params: &AttentionParams<'_>) -> usize {
    let len = rotation_len(params.d_k) + digits_len(params.d_k) + ScoreScratch::len(params.d_k, params.d_k);
    len.next_multiple_of(PAD)
}

impl<'a> Scratch<'a> {
    fn cut(mut memory: &'a mut [f32], params: &AttentionParams<'_>) -> Self {
        Self {
            rotation: take(&mut memory, rotation_len(params.d_k)),
            digits: take(&mut memory, digits_len(params.d_k)),
            score: ScoreScratch::cut(&mut memory, params.d_k, params.d_k),
        }
    }
}
