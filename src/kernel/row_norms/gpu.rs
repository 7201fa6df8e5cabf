//! Row norms on the device: one thread per row.

use super::{NAME, NormArgs};
use crate::device::gpu::{Binding, Call, Context, DeviceBlock, kind, packs};
use crate::device::page::PageLayout;
use crate::error::KernelError;
use crate::kernel::{expect_len, total_rows};
use std::collections::BTreeMap;

/// Rows per workgroup.
const CHUNK: usize = 64;

/// The uniform block of `shaders/row_norms.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    dim: u32,
    row_words: u32,
    side: u32,
    count: u32,
    first: u32,
    spare: [u32; 3],
}

/// Up to 64 rows of a page.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Chunk {
    page: u32,
    begin: u32,
    rows: u32,
    target_at: u32,
}

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(context: &Context, args: &mut NormArgs<'_>) -> Result<(), KernelError> {
    let total = total_rows(args.heads);
    expect_len(NAME, "out", args.out.len(), total)?;
    if total == 0 {
        return Ok(());
    }
    let mut layouts: Vec<&PageLayout> = Vec::new();
    let mut groups: BTreeMap<(u64, usize), (&wgpu::Buffer, Vec<Chunk>)> = BTreeMap::new();
    let mut start = 0;
    for page in args.heads.iter().flat_map(|h| h.pages()) {
        let block = DeviceBlock::of(page.page, NAME)?;
        let layout = layouts.iter().position(|l| **l == **page.layout).unwrap_or_else(|| {
            layouts.push(page.layout);
            layouts.len() - 1
        });
        let chunks =
            &mut groups.entry((block.slab(), layout)).or_insert_with(|| (block.buffer(), Vec::new())).1;
        for begin in (0..page.rows).step_by(CHUNK) {
            chunks.push(Chunk {
                page: block.word(),
                begin: begin as u32,
                rows: CHUNK.min(page.rows - begin) as u32,
                target_at: (start + begin) as u32,
            });
        }
        start += page.rows;
    }
    let mut call = Call::new(context, NAME);
    let norms = call.scratch(total);
    for ((_, layout), (slab, chunks)) in groups {
        let layout = layouts[layout];
        let params = Params {
            dim: layout.dim(args.side) as u32,
            row_words: (layout.row_bytes(args.side) / 4) as u32,
            side: (layout.range(args.side).start / 4) as u32,
            count: chunks.len() as u32,
            first: 0,
            spare: [0; 3],
        };
        let bindings = [
            Binding::Slab(slab.clone()),
            call.upload(&chunks),
            Binding::from(&norms),
            call.upload(&packs(layout, [args.side; 2])),
        ];
        let constants = [("ROW_TYPE", kind(layout, args.side))];
        call.dispatch("row_norms", &constants, &params, &bindings, chunks.len())?;
    }
    call.read(&norms);
    args.out.copy_from_slice(&call.finish()?.floats(0)[..total]);
    Ok(())
}
