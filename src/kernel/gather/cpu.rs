//! Runs of neighbouring slots copied at once, target pages in parallel.
//!
//! *Helps* because evictions keep long runs. *Hurts* nothing: it is a copy.

use super::{GatherArgs, GatherTarget, copy_metadata, in_parts, is_mixed};
use crate::device::HeadRows;
use crate::device::page::{Page, PageLayout, PageRef, Side};
use crate::error::KernelError;
use crate::kernel::rebuild;
use crate::kernel::simd::widen::widen_row;
use crate::kernel::simd::{Exec, Split, dispatch, take};
use fearless_simd::Simd;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(exec: &Exec, args: &mut GatherArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    if matches!(args.target, GatherTarget::Dense { .. }) && is_mixed(args.head, args.slots) {
        return in_parts(args, |args| run(exec, args), |args| rebuild::cpu::run(exec, args));
    }
    let sources: Vec<PageRef<'_>> = args.head.pages().collect();
    match &mut args.target {
        GatherTarget::Pages { layout, pages } => {
            let tasks = exec.tasks(args.slots.len() * layout.entry_bytes());
            let work = IntoPages { sources: &sources, layout, slots: args.slots, pages };
            exec.run(tasks, || work.spread(tasks));
            copy_metadata(args.head, args.slots, layout, pages);
        }
        GatherTarget::Dense { keys, values } => {
            let Some((d_k, d_v)) = dims(args.head) else { return Ok(()) };
            let tasks = exec.tasks(args.slots.len() * (d_k + d_v));
            let work = IntoDense { exec, sources: &sources, slots: args.slots, d_k, d_v, keys, values };
            exec.run(tasks, || work.spread(tasks));
        }
    }
    Ok(())
}

fn dims(head: &HeadRows) -> Option<(usize, usize)> {
    head.segments.first().map(|s| (s.layout.d_k, s.layout.d_v))
}

/// Index of the page that holds `slot`.
fn page_of(sources: &[PageRef<'_>], slot: u32) -> usize {
    sources.partition_point(|p| p.first + p.rows <= slot as usize)
}

/// How many of the first slots are neighbours within one page.
fn run_length(slots: &[u32], left_in_page: usize) -> usize {
    let most = slots.len().min(left_in_page);
    (1..most).find(|&i| slots[i] != slots[0] + i as u32).unwrap_or(most)
}

struct IntoPages<'a> {
    sources: &'a [PageRef<'a>],
    layout: &'a PageLayout,
    slots: &'a [u32],
    pages: &'a mut [Page],
}

impl Split for IntoPages<'_> {
    fn pieces(&self) -> usize {
        self.pages.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (slots, rest) = self.slots.split_at(at * self.layout.capacity);
        let pages = take(&mut self.pages, at);
        (IntoPages { slots, pages, ..self }, IntoPages { slots: rest, ..self })
    }

    fn work(self) {
        let layout = self.layout;
        for (mut slots, page) in self.slots.chunks(layout.capacity).zip(self.pages) {
            let target = page.block.host_mut();
            let mut to = 0;
            while let Some(&slot) = slots.first() {
                let source = &self.sources[page_of(self.sources, slot)];
                let from = slot as usize - source.first;
                let run = run_length(slots, source.rows - from);
                for side in [Side::Key, Side::Value] {
                    let (bytes, start) = (layout.row_bytes(side), layout.range(side).start);
                    let rows = &source.page.block.host()[start + from * bytes..][..run * bytes];
                    target[start + to * bytes..][..run * bytes].copy_from_slice(rows);
                }
                to += run;
                slots = &slots[run..];
            }
        }
    }
}

struct IntoDense<'a> {
    exec: &'a Exec,
    sources: &'a [PageRef<'a>],
    slots: &'a [u32],
    d_k: usize,
    d_v: usize,
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Split for IntoDense<'_> {
    fn pieces(&self) -> usize {
        self.slots.len()
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        let (slots, rest) = self.slots.split_at(at);
        let (keys, values) = (take(&mut self.keys, at * self.d_k), take(&mut self.values, at * self.d_v));
        (IntoDense { slots, keys, values, ..self }, IntoDense { slots: rest, ..self })
    }

    fn work(self) {
        let exec = self.exec;
        dispatch!(exec.token(), simd => self.copy(simd));
    }
}

impl IntoDense<'_> {
    #[inline(always)]
    fn copy<S: Simd>(self, simd: S) {
        let Self { sources, slots, d_k, d_v, keys, values, .. } = self;
        for (i, &slot) in slots.iter().enumerate() {
            // Either may have no dimensions.
            let (key, value) = (&mut keys[i * d_k..(i + 1) * d_k], &mut values[i * d_v..(i + 1) * d_v]);
            let source = &sources[page_of(sources, slot)];
            let row = slot as usize - source.first;
            widen_row(simd, source.layout, source.page, Side::Key, row, key);
            widen_row(simd, source.layout, source.page, Side::Value, row, value);
        }
    }
}
