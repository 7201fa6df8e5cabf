//! Pages on the device: equal slots in slab buffers, and writes to them that wait for the next submission.
//!
//! *Helps* by giving memory back: a slab whose last page goes is dropped whole. *Hurts* when pages of one
//! head lie in several slabs, each of which costs a dispatch, so slabs are megabytes and the fullest ones
//! are filled first.
//!
//! A write is staged on the host and copied by the next submission before anything else in it, so appending
//! a token to every head costs no submission of its own.

use super::{Context, lock};
use crate::device::encoding::Encoding;
use crate::device::memory::MemoryUsage;
use crate::device::page::{Block, Page, PageLayout, Side};
use crate::error::{DeviceError, KernelError};
use crate::view::DType;
use half::slice::HalfFloatSliceExt;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Slabs of a small cache.
const SLAB_LEAST: u64 = 4 << 20;
/// Slabs of a large cache: larger ones would hardly ever become empty.
const SLAB_MOST: u64 = 16 << 20;
/// Slots start at multiples of this.
const SLOT_ALIGN: u64 = 256;
/// Staged writes above this are submitted at once.
const STAGED_BYTES: usize = 8 << 20;

#[derive(Debug)]
struct Slab {
    id: u64,
    buffer: Arc<wgpu::Buffer>,
    /// Offsets not in use, and whether an earlier page wrote there.
    free: Vec<(u64, bool)>,
    slots: usize,
}

/// Something to do to pages before the next dispatch, in order.
#[derive(Debug)]
enum Pending {
    /// Words of `staged` to an offset in bytes.
    Write {
        to: wgpu::Buffer,
        offset: u64,
        words: Range<usize>,
    },
    Clear {
        to: wgpu::Buffer,
        offset: u64,
        bytes: u64,
    },
    Copy {
        from: wgpu::Buffer,
        source: u64,
        to: wgpu::Buffer,
        offset: u64,
        bytes: u64,
    },
}

#[derive(Debug, Default)]
struct State {
    /// Slabs by slot size.
    classes: BTreeMap<u64, Vec<Slab>>,
    next_id: u64,
    usage: MemoryUsage,
    pending: Vec<Pending>,
    staged: Vec<u32>,
}

/// The page memory of one device.
#[derive(Debug)]
pub(crate) struct Memory {
    state: Mutex<State>,
    /// The largest slab a shader can see.
    limit: u64,
}

/// What a block needs of its memory and of its slab.
///
/// Trait objects, so that proving a cache `Send` ends here: through wgpu's own types the proof is deeper than
/// the compiler's default recursion limit allows, in every crate that moves a cache to a thread.
trait Owner: std::fmt::Debug + Send + Sync {
    fn release(&self, slab: u64, offset: u64, bytes: u64);
}

/// See [`Owner`].
trait SlabBuffer: std::fmt::Debug + Send + Sync {
    fn buffer(&self) -> &wgpu::Buffer;
}

impl SlabBuffer for wgpu::Buffer {
    fn buffer(&self) -> &wgpu::Buffer {
        self
    }
}

/// A page's memory on the device, returned on drop.
#[derive(Debug)]
pub struct DeviceBlock {
    memory: Arc<dyn Owner>,
    slab: u64,
    buffer: Arc<dyn SlabBuffer>,
    offset: u64,
    bytes: u64,
    /// Whether the mirror may hold a β other than 0.
    biased: bool,
}

impl DeviceBlock {
    /// Identifies the slab among all of this memory's.
    pub(crate) fn slab(&self) -> u64 {
        self.slab
    }

    /// The slab's buffer.
    pub(crate) fn buffer(&self) -> &wgpu::Buffer {
        self.buffer.buffer()
    }

    /// Where the page starts in its slab, in words.
    pub(crate) fn word(&self) -> u32 {
        // Slabs are smaller than 4 GiB, so words fit.
        (self.offset / 4) as u32
    }

    /// Where the page starts in its slab, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Notes whether the mirror of this page holds biases, after a device-side copy wrote it.
    pub(crate) fn set_biased(&mut self, biased: bool) {
        self.biased = biased;
    }

    /// The device block of a page.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if the page lives on the host.
    pub(crate) fn of<'a>(page: &'a Page, kernel: &'static str) -> Result<&'a Self, KernelError> {
        match &page.block {
            Block::Device(block) => Ok(block),
            Block::Host(_) => Err(foreign(kernel)),
        }
    }

    /// As [`DeviceBlock::of`].
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if the page lives on the host.
    pub(crate) fn of_mut<'a>(page: &'a mut Page, kernel: &'static str) -> Result<&'a mut Self, KernelError> {
        match &mut page.block {
            Block::Device(block) => Ok(block),
            Block::Host(_) => Err(foreign(kernel)),
        }
    }
}

fn foreign(kernel: &'static str) -> KernelError {
    KernelError::Unsupported {
        backend: "gpu",
        kernel,
        detail: "the page lives in host memory: it was allocated by another backend".to_owned(),
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        self.memory.release(self.slab, self.offset, self.bytes);
    }
}

/// Bytes of a page's slot; the mirror is there whether or not the layout was made for a device.
fn slot_bytes(layout: &PageLayout) -> u64 {
    ((layout.mirror_offset() + 8 * layout.capacity) as u64).next_multiple_of(SLOT_ALIGN)
}

impl Owner for Memory {
    fn release(&self, slab: u64, offset: u64, bytes: u64) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.usage.resident -= bytes as usize;
        let Some(slabs) = state.classes.get_mut(&bytes) else { return };
        let Some(index) = slabs.iter().position(|s| s.id == slab) else { return };
        slabs[index].free.push((offset, true));
        if slabs[index].free.len() == slabs[index].slots {
            // Not destroyed by hand: writes that wait may still name the buffer. Dropping the last handle
            // returns the memory.
            let slab = slabs.remove(index);
            state.usage.reserved -= slab.buffer.size() as usize;
            state.pending.retain(|p| match p {
                Pending::Write { to, .. } | Pending::Clear { to, .. } | Pending::Copy { to, .. } => {
                    *to != *slab.buffer
                }
            });
            if state.pending.is_empty() {
                state.staged.clear();
            }
        }
    }
}

impl Memory {
    pub(super) fn new(limit: u64) -> Self {
        // Words of a slab are addressed with u32.
        Self { state: Mutex::default(), limit: limit.min(u64::from(u32::MAX)) }
    }

    pub(crate) fn usage(&self) -> MemoryUsage {
        lock(&self.state).usage
    }

    pub(crate) fn reset_peak(&self) {
        let mut state = lock(&self.state);
        state.usage.peak = state.usage.resident;
    }

    /// A zeroed block for a page.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or [`DeviceError::Limit`] for a page larger than a binding.
    pub(crate) fn allocate(
        self: &Arc<Self>,
        context: &Context,
        layout: &PageLayout,
    ) -> Result<DeviceBlock, DeviceError> {
        let bytes = slot_bytes(layout);
        if bytes > self.limit {
            return Err(DeviceError::Limit {
                what: "a page",
                need: bytes,
                limit: self.limit,
                hint: "use smaller pages",
            });
        }
        let mut state = lock(&self.state);
        let state = &mut *state;
        let slabs = state.classes.entry(bytes).or_default();
        // The fullest slab first, so that the others can become empty.
        let found =
            (0..slabs.len()).filter(|&i| !slabs[i].free.is_empty()).min_by_key(|&i| slabs[i].free.len());
        let index = match found {
            Some(index) => index,
            None => {
                let held: u64 = slabs.iter().map(|s| s.buffer.size()).sum();
                let want = held.clamp(SLAB_LEAST, SLAB_MOST).min(self.limit);
                let slots = (want / bytes).max(1);
                let buffer = Arc::new(new_slab(context, slots * bytes)?);
                state.usage.reserved += (slots * bytes) as usize;
                let free = (0..slots).rev().map(|i| (i * bytes, false)).collect();
                slabs.push(Slab { id: state.next_id, buffer, free, slots: slots as usize });
                state.next_id += 1;
                slabs.len() - 1
            }
        };
        let slab = &mut slabs[index];
        let Some((offset, used)) = slab.free.pop() else { unreachable!("slab {index} has a free slot") };
        if used {
            state.pending.push(Pending::Clear { to: wgpu::Buffer::clone(&slab.buffer), offset, bytes });
        }
        state.usage.resident += bytes as usize;
        state.usage.peak = state.usage.peak.max(state.usage.resident);
        let (slab, buffer): (u64, Arc<dyn SlabBuffer>) = (slab.id, slab.buffer.clone());
        let memory: Arc<dyn Owner> = self.clone();
        Ok(DeviceBlock { memory, slab, buffer, offset, bytes, biased: false })
    }

    /// Copies a page on the device.
    pub(crate) fn copy(&self, from: &DeviceBlock, to: &mut DeviceBlock) {
        to.biased = from.biased;
        lock(&self.state).pending.push(Pending::Copy {
            from: from.buffer().clone(),
            source: from.offset,
            to: to.buffer().clone(),
            offset: to.offset,
            bytes: from.bytes,
        });
    }

    /// Stages all bytes of one side.
    pub(crate) fn write_side(&self, block: &DeviceBlock, layout: &PageLayout, side: Side, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let start = state.staged.len();
        let words = bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        state.staged.extend(words);
        state.write(block.buffer(), block.offset + layout.range(side).start as u64, start);
    }

    /// Stages rows of one exact side, narrowed to its type.
    ///
    /// # Panics
    /// On a packed side.
    pub(crate) fn write_rows(
        &self,
        block: &DeviceBlock,
        layout: &PageLayout,
        side: Side,
        first: usize,
        rows: &[f32],
    ) {
        let dtype = match layout.encoding(side) {
            Encoding::Exact(dtype) => dtype,
            Encoding::Factored => return,
            Encoding::Packed(_) => panic!("a row was written into a packed side"),
        };
        let (dim, words) = (layout.dim(side), layout.row_bytes(side) / 4);
        if words == 0 {
            return;
        }
        let count = rows.len() / dim;
        let mut state = lock(&self.state);
        let start = state.staged.len();
        state.staged.resize(start + count * words, 0);
        for (row, target) in rows.chunks_exact(dim).zip(state.staged[start..].chunks_exact_mut(words)) {
            match dtype {
                DType::F32 => bytemuck::cast_slice_mut(target).copy_from_slice(row),
                DType::F16 => {
                    bytemuck::cast_slice_mut::<u32, half::f16>(target)[..dim].convert_from_f32_slice(row);
                }
                DType::Bf16 => {
                    bytemuck::cast_slice_mut::<u32, half::bf16>(target)[..dim].convert_from_f32_slice(row);
                }
            }
        }
        let offset = block.offset + (layout.range(side).start + first * layout.row_bytes(side)) as u64;
        state.write(block.buffer(), offset, start);
    }

    /// Stages the mirror of positions and β of `rows`.
    pub(crate) fn write_mirror(&self, layout: &PageLayout, page: &mut Page, rows: Range<usize>) {
        let Block::Device(block) = &mut page.block else { return };
        let mut state = lock(&self.state);
        let start = state.staged.len();
        state.staged.extend_from_slice(bytemuck::cast_slice(&page.positions[rows.clone()]));
        let mirror = block.offset + layout.mirror_offset() as u64;
        state.write(block.buffer(), mirror + 4 * rows.start as u64, start);
        if page.bias.is_none() && !block.biased {
            return;
        }
        block.biased = true;
        let start = state.staged.len();
        match &page.bias {
            Some(bias) => state.staged.extend_from_slice(bytemuck::cast_slice(&bias[rows.clone()])),
            None => state.staged.resize(start + rows.len(), 0),
        }
        state.write(block.buffer(), mirror + 4 * (layout.capacity + rows.start) as u64, start);
    }

    /// Whether so much waits that it should be submitted now.
    pub(crate) fn is_full(&self) -> bool {
        4 * lock(&self.state).staged.len() > STAGED_BYTES
    }

    /// Submits what waits, then `work`, as one submission. The lock is held until then, so that no other
    /// thread's dispatch slips between a write and the submission that carries it.
    pub(super) fn submit(&self, context: &Context, work: Option<wgpu::CommandBuffer>) {
        let mut state = lock(&self.state);
        let flush = state.encode(context);
        context.queue.submit(flush.into_iter().chain(work));
    }
}

fn new_slab(context: &Context, bytes: u64) -> Result<wgpu::Buffer, DeviceError> {
    use wgpu::BufferUsages as Usage;
    let descriptor = wgpu::BufferDescriptor {
        label: Some("kvsieve pages"),
        size: bytes,
        usage: Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST,
        mapped_at_creation: false,
    };
    context.guarded("allocate", || context.device.create_buffer(&descriptor)).map_err(|e| match e {
        // The only thing creation can fail on here, unless the device is gone.
        DeviceError::Lost { reason, .. } if reason.contains("Out of Memory") => {
            DeviceError::OutOfMemory { bytes: bytes as usize, memory: "device", reason }
        }
        other => other,
    })
}

impl State {
    /// Notes a write of everything staged since `start`.
    fn write(&mut self, to: &wgpu::Buffer, offset: u64, start: usize) {
        if start < self.staged.len() {
            self.pending.push(Pending::Write { to: to.clone(), offset, words: start..self.staged.len() });
        }
    }

    fn encode(&mut self, context: &Context) -> Option<wgpu::CommandBuffer> {
        use wgpu::BufferUsages as Usage;
        if self.pending.is_empty() {
            return None;
        }
        let staging = (!self.staged.is_empty()).then(|| {
            let buffer = context.take_buffer(Usage::COPY_SRC | Usage::COPY_DST, 4 * self.staged.len() as u64);
            context.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&self.staged));
            buffer
        });
        let mut encoder = context
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("kvsieve page writes") });
        for pending in self.pending.drain(..) {
            match pending {
                Pending::Write { to, offset, words } => {
                    if let Some(staging) = &staging {
                        let (source, bytes) = (4 * words.start as u64, 4 * words.len() as u64);
                        encoder.copy_buffer_to_buffer(staging, source, &to, offset, bytes);
                    }
                }
                Pending::Clear { to, offset, bytes } => encoder.clear_buffer(&to, offset, Some(bytes)),
                Pending::Copy { from, source, to, offset, bytes } if from == to => {
                    // A copy within one buffer is not allowed, so it goes through another.
                    let between = context.take_buffer(Usage::COPY_SRC | Usage::COPY_DST, bytes);
                    encoder.copy_buffer_to_buffer(&from, source, &between, 0, bytes);
                    encoder.copy_buffer_to_buffer(&between, 0, &to, offset, bytes);
                    context.give_buffer(between);
                }
                Pending::Copy { from, source, to, offset, bytes } => {
                    encoder.copy_buffer_to_buffer(&from, source, &to, offset, bytes);
                }
            }
        }
        self.staged.clear();
        if let Some(staging) = staging {
            context.give_buffer(staging);
        }
        Some(encoder.finish())
    }
}
