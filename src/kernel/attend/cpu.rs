//! Online-softmax attention over tiles, in vectors and threads.
//!
//! The `G·T` query rows of a KV head are cut into blocks and its pages into chunks; a block on a chunk is an
//! item. An item walks the tiles of its chunk once, and per tile computes
//! ```text
//! S = Q·Kᵀ    x = cap(scale·S) + β, −∞ where not seen
//! m' = max(m, max x)    P = exp(x − m')    l = l·exp(m − m') + Σ P    O = O·exp(m − m') + P·V
//! ```
//! and at the end `out = O / l`, `lse = m + ln l`. So every key and value row is read and converted once for
//! all query heads of its group: in place for the few rows of decode, by way of a widened and transposed tile for
//! the many of a prefill. Meanwhile the next tile is on its way into the caches. Items of one block
//! are merged as partial attentions are.
//!
//! How the work is cut depends on its shape only, never on how many threads there are or how fast they run:
//! the same call gives the same bits on one thread and on fifty. *Helps* decode, which splits over entries,
//! and prefill, which splits over queries. *Hurts* contexts of a few hundred entries, where splitting costs more
//! than it spreads; they run on the calling thread.

use super::cut::{Cut, Marks, Part};
use super::{AttendLane, Workspace};
use crate::device::HeadRows;
use crate::device::encoding::rotate;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::attention_mass::cpu::{HeadMass, mass_len};
use crate::kernel::merge_partials::cpu::merge;
use crate::kernel::simd::chosen::ChosenTiles;
use crate::kernel::simd::copies::Copies;
use crate::kernel::simd::gemm::PAD;
use crate::kernel::simd::math::{add_scaled, exp, scale};
use crate::kernel::simd::prefetch::Ahead;
use crate::kernel::simd::tile::{
    BLOCK, QueryBlock, ScoreScratch, TILE, Tile, digits_len, first_slot, padded_bias, rotation_len, tiles,
};
use crate::kernel::simd::{Exec, Lent, both, dispatch, take};
use crate::kernel::{AttentionParams, Spans};
use fearless_simd::{Simd, SimdBase};
use std::ops::Range;

/// Up to this many queries the logits are kept and turned into attention mass; beyond, a second pass over the
/// keys is cheaper than the memory.
const KEPT_TOKENS: usize = 4;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(
    exec: &Exec,
    params: &AttentionParams<'_>,
    lanes: &mut [AttendLane<'_>],
    workspace: &mut Workspace,
) -> Result<(), KernelError> {
    for lane in lanes.iter() {
        lane.validate(params)?;
    }
    let work = lanes.iter().map(|l| all_operations(params, l)).sum();
    // A share of the entries comes from one of the host's own threads: it brings the parallelism.
    let tasks = if lanes.iter().any(|l| l.share.of > 1) { 1 } else { exec.tasks(work) };
    let scratch = scratch_len(params, lanes.iter().any(|l| l.spans.is_some()));
    let buffers: usize = lanes.iter().map(|l| buffer_len(params, l)).sum();
    // Scratch first, so that it keeps the workspace's alignment.
    let (scratch, buffers) = workspace.take(tasks * scratch + buffers).split_at_mut(tasks * scratch);
    let context = Context { exec, params };
    exec.run(tasks, || over_lanes(&context, lanes, buffers, Lent { scratch, tasks }));
    Ok(())
}

struct Context<'a> {
    exec: &'a Exec,
    params: &'a AttentionParams<'a>,
}

/// Multiplications and additions of head `h`, halved where causality hides half.
fn operations(params: &AttentionParams<'_>, lane: &AttendLane<'_>, h: usize) -> usize {
    let entries = lane.spans.map_or_else(|| lane.heads[h].rows(), |s| s[h].rows());
    entries * params.group * lane.positions.len() * (params.d_k + params.d_v)
}

fn all_operations(params: &AttentionParams<'_>, lane: &AttendLane<'_>) -> usize {
    (0..lane.heads.len()).map(|h| operations(params, lane, h)).sum()
}

/// Whether logits are kept for the mass: only then is a block one item per chunk.
fn keeps(params: &AttentionParams<'_>, lane: &AttendLane<'_>) -> bool {
    lane.mass.is_some() && lane.positions.len() <= KEPT_TOKENS && params.group * lane.positions.len() <= BLOCK
}

fn head_buffer_len(params: &AttentionParams<'_>, lane: &AttendLane<'_>, h: usize) -> usize {
    let cut = Cut::new(params, lane, h);
    cut.partial(params.d_v) + if keeps(params, lane) { cut.rows * lane.heads[h].rows() } else { 0 }
}

fn buffer_len(params: &AttentionParams<'_>, lane: &AttendLane<'_>) -> usize {
    (0..lane.heads.len()).map(|h| head_buffer_len(params, lane, h)).sum()
}

fn over_lanes(context: &Context<'_>, lanes: &mut [AttendLane<'_>], buffers: &mut [f32], lent: Lent<'_>) {
    let params = context.params;
    if lanes.len() > 1 {
        let weight = |lanes: &[AttendLane<'_>]| lanes.iter().map(|l| all_operations(params, l)).sum();
        let (left, right) = lanes.split_at_mut(lanes.len() / 2);
        let (a, b) = buffers.split_at_mut(left.iter().map(|l| buffer_len(params, l)).sum());
        let weights = (weight(left), weight(right));
        both(
            lent,
            weights,
            |lent| over_lanes(context, left, a, lent),
            |lent| over_lanes(context, right, b, lent),
        );
    } else if let Some(lane) = lanes.first_mut()
        && !lane.positions.is_empty()
    {
        over_heads(context, lane_view(lane), 0, buffers, lent);
    } else if let Some(lane) = lanes.first_mut()
        && let Some(mass) = &mut lane.mass
    {
        mass.fill(0.0);
    }
}

/// The same lane behind a shorter borrow, so that it can be cut.
fn lane_view<'a>(lane: &'a mut AttendLane<'_>) -> AttendLane<'a> {
    AttendLane {
        heads: lane.heads,
        queries: lane.queries,
        positions: lane.positions,
        share: lane.share,
        spans: lane.spans,
        out: lane.out,
        lse: lane.lse,
        mass: lane.mass.as_deref_mut(),
    }
}

/// `lane` covers the heads from `first_head`.
fn over_heads(
    context: &Context<'_>,
    mut lane: AttendLane<'_>,
    first_head: usize,
    mut buffers: &mut [f32],
    lent: Lent<'_>,
) {
    let params = context.params;
    if lane.heads.len() < 2 {
        if let Some(head) = lane.heads.first() {
            one_head(context, lane, head, first_head, buffers, lent);
        }
        return;
    }
    let at = lane.heads.len() / 2;
    let (heads, rest) = lane.heads.split_at(at);
    let entries: usize = heads.iter().map(HeadRows::rows).sum();
    let rows = at * params.group * lane.positions.len();
    let weight = |heads: Range<usize>| heads.map(|h| operations(params, &lane, h) + 1).sum::<usize>();
    let weights = (weight(0..at), weight(at..lane.heads.len()));
    let left_buffers = take(&mut buffers, (0..at).map(|h| head_buffer_len(params, &lane, h)).sum());
    let left = AttendLane {
        heads,
        queries: &lane.queries[..rows * params.d_k],
        positions: lane.positions,
        share: lane.share,
        spans: lane.spans.map(|s| &s[..at]),
        out: take(&mut lane.out, rows * params.d_v),
        lse: take(&mut lane.lse, rows),
        mass: lane.mass.as_mut().map(|m| take(m, params.group * entries)),
    };
    let spans = lane.spans.map(|s| &s[at..]);
    let right = AttendLane { heads: rest, queries: &lane.queries[rows * params.d_k..], spans, ..lane };
    both(
        lent,
        weights,
        |lent| over_heads(context, left, first_head, left_buffers, lent),
        |lent| over_heads(context, right, first_head + at, buffers, lent),
    );
}

fn one_head(
    context: &Context<'_>,
    lane: AttendLane<'_>,
    head: &HeadRows,
    index: usize,
    buffers: &mut [f32],
    lent: Lent<'_>,
) {
    let params = context.params;
    let cut = Cut::new(params, &lane, 0);
    let spans = lane.spans.and_then(<[Spans]>::first);
    let marks = cut.marks(spans);
    let sinks = params.sink_logits.map(|s| &s[index * params.group..(index + 1) * params.group]);
    let sinks = sinks.filter(|_| lane.share.index == 0);
    let (partial, kept) = buffers.split_at_mut(cut.partial(params.d_v));
    let keep = keeps(params, &lane);
    let (outs, lses) =
        partial.split_at_mut(if cut.chunks == 1 { 0 } else { cut.chunks * cut.rows * params.d_v });
    let (out, lse) =
        if cut.chunks == 1 { (&mut *lane.out, &mut *lane.lse) } else { (&mut *outs, &mut *lses) };
    let (queries, positions) = (lane.queries, lane.positions);
    let items = Items {
        context,
        cut,
        head,
        chosen: spans.map(|spans| (spans, &marks)),
        sinks,
        queries,
        positions,
        range: 0..cut.items(),
        out,
        lse,
        kept: keep.then_some(&mut *kept),
    };
    items.spread(Lent { scratch: &mut *lent.scratch, tasks: lent.tasks });
    if cut.chunks > 1 {
        dispatch!(context.exec.token(), simd => merge(simd, cut.chunks, cut.rows, 0, (outs, lses), (lane.out, lane.lse), params.d_v));
    }
    let Some(mass) = lane.mass else { return };
    if keep {
        let tokens = positions.len();
        dispatch!(context.exec.token(), simd => mass_of_kept(simd, &cut, head, tokens, kept, lane.lse, mass));
    } else {
        let work = HeadMass {
            exec: context.exec,
            params,
            head,
            queries,
            positions,
            lse: lane.lse,
            mass,
            first: 0,
            end: params.group,
        };
        work.over(lent.scratch, lent.tasks);
    }
}

/// Items `range` of one head. Outputs cover the rows of these items only.
struct Items<'a> {
    context: &'a Context<'a>,
    cut: Cut,
    head: &'a HeadRows,
    chosen: Option<(&'a Spans, &'a Marks)>,
    sinks: Option<&'a [f32]>,
    queries: &'a [f32],
    positions: &'a [i32],
    range: Range<usize>,
    out: &'a mut [f32],
    lse: &'a mut [f32],
    /// Logits, `[rows, entries]` for each chunk in turn.
    kept: Option<&'a mut [f32]>,
}

impl Items<'_> {
    fn spread(mut self, lent: Lent<'_>) {
        let d_v = self.context.params.d_v;
        if lent.tasks < 2 || self.range.len() < 2 {
            dispatch!(self.context.exec.token(), simd => self.work(simd, lent.scratch));
            return;
        }
        let middle = self.range.start + self.range.len() / 2;
        let rows = self.cut.row(middle) - self.cut.row(self.range.start);
        let kept = self.kept_entries(self.range.start..middle) * self.cut.rows;
        let left = Items {
            range: self.range.start..middle,
            out: take(&mut self.out, rows * d_v),
            lse: take(&mut self.lse, rows),
            kept: self.kept.as_mut().map(|k| take(k, kept)),
            ..self
        };
        let right = Items { range: middle..self.range.end, ..self };
        let weights = (left.range.len(), right.range.len());
        both(lent, weights, |lent| left.spread(lent), |lent| right.spread(lent));
    }

    /// Entries of the chunks of these items, which are one block each.
    fn kept_entries(&self, items: Range<usize>) -> usize {
        if self.kept.is_none() {
            return 0;
        }
        let slot = |page| first_slot(self.head, page);
        slot(self.cut.chunk_pages(items.end - 1).end) - slot(self.cut.chunk_pages(items.start).start)
    }

    #[inline(always)]
    fn work<S: Simd>(mut self, simd: S, scratch: &mut [f32]) {
        let d_v = self.context.params.d_v;
        for i in self.range.clone() {
            let rows = self.cut.block_rows(i);
            let kept_len = self.kept_entries(i..i + 1) * self.cut.rows;
            let item = Item {
                params: self.context.params,
                head: self.head,
                part: self.cut.part(i, self.chosen),
                rows: rows.clone(),
                queries: self.queries,
                positions: self.positions,
                // The sink joins the first chunk only.
                sinks: self
                    .sinks
                    .filter(|_| i < self.cut.blocks)
                    .map(|s| (s, rows.start, self.positions.len())),
                out: take(&mut self.out, rows.len() * d_v),
                lse: take(&mut self.lse, rows.len()),
                kept: self.kept.as_mut().map(|k| take(k, kept_len)),
            };
            simd.vectorize(
                #[inline(always)]
                || item.run(simd, Scratch::cut(scratch, self.context.params)),
            );
        }
    }
}

/// Scratch of one task.
struct Scratch<'a> {
    score: ScoreScratch<'a>,
    /// Rotated queries, `[BLOCK, d_k]`.
    rotation: &'a mut [f32],
    /// Queries for products in integers.
    digits: &'a mut [f32],
    /// Widened values, `[TILE, d_v padded]`.
    values: &'a mut [f32],
    /// Running outputs, `[BLOCK, d_v padded]`.
    sums: &'a mut [f32],
    /// The same over values that are stored rotated.
    rotated: &'a mut [f32],
    /// Empty if no entries are chosen.
    copies: Copies<'a>,
}

fn scratch_len(params: &AttentionParams<'_>, chosen: bool) -> usize {
    let attend = rotation_len(params.d_k)
        + digits_len(params.d_k)
        + ScoreScratch::len(params.d_k, params.d_k.max(params.d_v))
        + (TILE + 2 * BLOCK) * params.d_v.next_multiple_of(PAD)
        + if chosen { Copies::len(params) } else { 0 };
    attend.max(mass_len(params)).next_multiple_of(PAD)
}

impl<'a> Scratch<'a> {
    fn cut(mut memory: &'a mut [f32], params: &AttentionParams<'_>) -> Self {
        let padded = params.d_v.next_multiple_of(PAD);
        Self {
            rotation: take(&mut memory, rotation_len(params.d_k)),
            digits: take(&mut memory, digits_len(params.d_k)),
            score: ScoreScratch::cut(&mut memory, params.d_k, params.d_k.max(params.d_v)),
            values: take(&mut memory, TILE * padded),
            sums: take(&mut memory, BLOCK * padded),
            rotated: take(&mut memory, BLOCK * padded),
            copies: Copies::cut(&mut memory, params),
        }
    }
}

/// The tiles of an item.
#[allow(clippy::large_enum_variant, reason = "one per item, on the stack: the call allocates nothing")]
enum Walk<'a, I: Iterator<Item = Tile<'a>>> {
    /// Those to come, the one that is computed on, and the next.
    Pages(I, [Option<Tile<'a>>; 2]),
    Chosen(ChosenTiles<'a>),
}

impl<'a, I: Iterator<Item = Tile<'a>>> Walk<'a, I> {
    /// All tiles of pages.
    fn pages(mut tiles: I) -> Self {
        let first = tiles.next();
        Self::Pages(tiles, [None, first])
    }

    /// Goes on to the next tile, the first one from the start.
    #[inline(always)]
    fn advance(&mut self) {
        match self {
            Self::Pages(tiles, known) => *known = [known[1], tiles.next()],
            Self::Chosen(tiles) => tiles.advance(),
        }
    }

    #[inline(always)]
    fn tile<'t, S: Simd>(&'t self, simd: S, copies: &'t mut Copies<'_>) -> Option<Tile<'t>> {
        match self {
            Self::Pages(_, known) => known[0],
            Self::Chosen(tiles) => tiles.tile(simd, copies),
        }
    }

    /// A side of the tile that is to be requested meanwhile.
    #[inline(always)]
    fn ahead(&self, side: Side) -> Ahead<'_> {
        match self {
            Self::Pages(_, known) => known[1].as_ref().map_or(Ahead::NONE, |t| t.ahead(side)),
            Self::Chosen(tiles) => tiles.ahead(side),
        }
    }
}

/// A block of query rows on the entries of a chunk.
struct Item<'a> {
    params: &'a AttentionParams<'a>,
    head: &'a HeadRows,
    part: Part<'a>,
    /// Which rows of the group's queries.
    rows: Range<usize>,
    /// Of the whole group.
    queries: &'a [f32],
    positions: &'a [i32],
    /// Sink logits of the group, first row of the block, tokens.
    sinks: Option<(&'a [f32], usize, usize)>,
    out: &'a mut [f32],
    lse: &'a mut [f32],
    kept: Option<&'a mut [f32]>,
}

impl Item<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S, scratch: Scratch<'_>) {
        let (params, rows) = (self.params, self.rows.len());
        let (d_v, padded) = (params.d_v, params.d_v.next_multiple_of(PAD));
        let Scratch { mut score, rotation, digits, values, sums, rotated, mut copies } = scratch;
        let block =
            QueryBlock::new(self.queries, params.d_k, self.positions, self.rows.clone(), self.head, rotation)
                .with_digits(simd, params.d_k, self.head, digits);
        sums[..rows * padded].fill(0.0);
        // Values stored rotated are summed apart and turned back once.
        let apart = self.head.rotated(Side::Value);
        if apart {
            rotated[..rows * padded].fill(0.0);
        }
        let mut most = [f32::NEG_INFINITY; BLOCK];
        let mut total = [0.0f32; BLOCK];
        if let Some((sinks, first, tokens)) = self.sinks {
            for (r, (m, l)) in most.iter_mut().zip(&mut total).take(rows).enumerate() {
                *m = sinks[(first + r) / tokens];
                *l = if *m == f32::NEG_INFINITY { 0.0 } else { 1.0 };
            }
        }
        if let Some(kept) = &mut self.kept {
            kept.fill(f32::NEG_INFINITY);
        }
        let (mut start, mut entries) = (0, 0);
        let mut tiles = match self.part {
            Part::Pages(pages) => {
                start = first_slot(self.head, pages.start);
                entries = first_slot(self.head, pages.end) - start;
                Walk::pages(tiles(self.head, pages).filter(|t| t.meets(params, &block)))
            }
            Part::Chosen(chosen) => {
                let masked = !block.sees_all(params, self.head);
                Walk::Chosen(ChosenTiles::new(self.head, chosen, masked))
            }
        };
        loop {
            tiles.advance();
            let Some(tile) = tiles.tile(simd, &mut copies) else { break };
            if !tile.meets(params, &block) {
                continue;
            }
            block.dots(simd, &tile, &mut score, &mut false, tiles.ahead(Side::Key));
            let bias = padded_bias(&tile);
            for r in 0..rows {
                let x = &mut score.scores[r * TILE..(r + 1) * TILE];
                let top = block.logits(simd, params, &tile, r, bias.as_ref(), x);
                if let Some(kept) = &mut self.kept {
                    kept[r * entries + tile.slot() - start..][..tile.len].copy_from_slice(&x[..tile.len]);
                }
                let x = &mut x[..tile.len.next_multiple_of(S::f32s::LEN)];
                if top == f32::NEG_INFINITY {
                    x.fill(0.0);
                    continue;
                }
                if top > most[r] {
                    let factor = (most[r] - top).exp();
                    total[r] *= factor;
                    scale(simd, &mut sums[r * padded..(r + 1) * padded], factor);
                    if apart {
                        scale(simd, &mut rotated[r * padded..(r + 1) * padded], factor);
                    }
                    most[r] = top;
                }
                total[r] += weights(simd, x, most[r]);
                let unread = tile.unread();
                if unread > 0 {
                    x.copy_within(unread.., 0);
                    let rest = x.len() - unread;
                    x[rest..].fill(0.0);
                }
            }
            let sums = if tile.rotated(Side::Value) { &mut *rotated } else { &mut *sums };
            let ScoreScratch { scores, unpack, .. } = &mut score;
            tile.add_values(simd, scores, rows, values, unpack, sums, tiles.ahead(Side::Value));
        }
        if apart {
            for (sum, rotated) in
                sums.chunks_exact_mut(padded).zip(rotated.chunks_exact_mut(padded)).take(rows)
            {
                rotate(&mut rotated[..d_v]);
                add_scaled(simd, &mut sum[..d_v], &rotated[..d_v], 1.0);
            }
        }
        for (r, (out, lse)) in self.out.chunks_exact_mut(d_v).zip(self.lse).enumerate() {
            if total[r] > 0.0 {
                out.copy_from_slice(&sums[r * padded..][..d_v]);
                scale(simd, out, 1.0 / total[r]);
                *lse = most[r] + total[r].ln();
            } else {
                out.fill(0.0);
                *lse = f32::NEG_INFINITY;
            }
        }
    }
}

/// `x = exp(x − most)`; gives the sum.
#[inline(always)]
fn weights<S: Simd>(simd: S, x: &mut [f32], most: f32) -> f32 {
    let most = S::f32s::splat(simd, most);
    let mut sum = S::f32s::splat(simd, 0.0);
    for chunk in x.chunks_exact_mut(S::f32s::LEN) {
        let p = exp(simd, S::f32s::from_slice(simd, chunk) - most);
        sum += p;
        p.store_slice(chunk);
    }
    sum.reduce_sum()
}

/// Mass from kept logits: `[rows, entries]` per chunk into `[G, entries of the head]`.
#[inline(always)]
fn mass_of_kept<S: Simd>(
    simd: S,
    cut: &Cut,
    head: &HeadRows,
    tokens: usize,
    kept: &mut [f32],
    lse: &[f32],
    mass: &mut [f32],
) {
    mass.fill(0.0);
    let total = head.rows();
    let mut kept = kept;
    for chunk in 0..cut.chunks {
        let pages = cut.chunk_pages(chunk * cut.blocks);
        let start = first_slot(head, pages.start);
        let entries = first_slot(head, pages.end) - start;
        for (row, x) in take(&mut kept, cut.rows * entries).chunks_exact_mut(entries.max(1)).enumerate() {
            if lse[row] == f32::NEG_INFINITY {
                continue;
            }
            let target = &mut mass[row / tokens * total + start..][..entries];
            add_weights(simd, target, x, lse[row]);
        }
    }
}

/// `target += exp(x − lse)`.
#[inline(always)]
pub(in crate::kernel) fn add_weights<S: Simd>(simd: S, target: &mut [f32], x: &[f32], lse: f32) {
    let (mut targets, mut xs) = (target.chunks_exact_mut(S::f32s::LEN), x.chunks_exact(S::f32s::LEN));
    let offset = S::f32s::splat(simd, lse);
    for (t, x) in (&mut targets).zip(&mut xs) {
        (exp(simd, S::f32s::from_slice(simd, x) - offset) + S::f32s::from_slice(simd, t)).store_slice(t);
    }
    for (t, x) in targets.into_remainder().iter_mut().zip(xs.remainder()) {
        *t += (x - lse).exp();
    }
}
