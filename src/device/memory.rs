//! Host memory for pages that goes back to the system when it is freed.
//!
//! An arena maps slabs of anonymous memory and hands out equal blocks. A freed block's physical pages are
//! given back at once (`MADV_DONTNEED`), its addresses are kept for the next block, and a slab with no
//! block in use is unmapped. Blocks need not be whole physical pages: one that blocks share goes back with
//! the last of them. *Helps* because `malloc` keeps what small frees return: after an eviction the
//! process would be as large as before. *Hurts* by a system call per freed block, so blocks are pages of
//! many rows, never single rows.
//!
//! An arena whose blocks stay maps larger slabs in the system's huge pages once it holds some: a context of hundreds of
//! megabytes is more small pages than a processor keeps addresses of, and reading it, above all here and there, would
//! wait for them. A block of such a slab that is freed after all leaves the process at once, but the system may get its
//! memory only when it looks for some, or with the last block around it.
//!
//! The two `unsafe` operations of the store live here: turning a block's address into a slice, and telling
//! the kernel to drop its contents.

#![allow(
    unsafe_code,
    reason = "raw slab memory is handed out as disjoint blocks; every block states why it is sound"
)]

use crate::error::DeviceError;
use memmap2::{MmapMut, MmapOptions};
use std::collections::BTreeSet;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes asked from the system at once, unless one block needs more.
const SLAB_BYTES: usize = 1 << 20;

/// The same in huge pages, and what an arena must hold before it uses them: a huge page is taken whole when its first
/// byte is written.
const HUGE_SLAB_BYTES: usize = 8 << 20;
const HUGE_FROM: usize = 16 << 20;

/// What a huge page is aligned to.
const HUGE_PAGE: usize = 2 << 20;

/// Blocks are whole multiples of this: a cache line, and the widest vector.
pub const BLOCK_ALIGN: usize = 64;

/// What the system gives and takes back: a multiple of what any system of this target has, because part of a
/// physical page must never be given back.
const SYSTEM_PAGE: usize = if cfg!(target_arch = "x86_64") {
    4096
} else if cfg!(target_vendor = "apple") {
    16 << 10
} else {
    64 << 10
};

/// What is in use and what is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Bytes of blocks in use.
    pub resident: usize,
    /// Bytes of address space (host) or of device buffers held, in use or not.
    pub reserved: usize,
    /// The largest `resident` so far.
    pub peak: usize,
}

#[derive(Debug)]
struct Slab {
    map: MmapMut,
    /// Where the first block lies in it.
    base: usize,
    /// Whether it lies in huge pages.
    huge: bool,
    /// Indices of blocks not in use.
    free: Vec<usize>,
    /// Of every block.
    used: Vec<bool>,
}

impl Slab {
    /// Gives the physical pages of a freed block back, as far as no other block is on them, and clears the
    /// rest of it: [`HostArena::allocate`] promises zeroes.
    fn vacate(&mut self, index: usize, block_bytes: usize) {
        let block = index * block_bytes..(index + 1) * block_bytes;
        let unused = |bytes: Range<usize>| {
            let last = bytes.end.min(self.used.len() * block_bytes).saturating_sub(1);
            self.used[bytes.start / block_bytes..=last / block_bytes].iter().all(|used| !used)
        };
        let (first, end) = (block.start / SYSTEM_PAGE, block.end.div_ceil(SYSTEM_PAGE));
        let page = |index: usize| index * SYSTEM_PAGE..(index + 1) * SYSTEM_PAGE;
        let first = if unused(page(first)) { first } else { first + 1 };
        let end = if first < end && !unused(page(end - 1)) { end - 1 } else { end };
        let len = self.map.len() - self.base;
        let pages = first * SYSTEM_PAGE..(end * SYSTEM_PAGE).min(len).max(first * SYSTEM_PAGE);
        #[cfg(target_os = "linux")]
        if std::mem::take(&mut self.huge) {
            // Else the system would fill the hole again when it tidies up.
            let _ = self.map.advise(memmap2::Advice::NoHugePage);
        }
        #[cfg(unix)]
        if !pages.is_empty() {
            // SAFETY: no block in use lies on these pages, so no reference into them is left; the next owner
            // of a block there gets it from `allocate`, which promises zeroes: what DONTNEED leaves behind.
            let given_back = unsafe {
                let what = memmap2::UncheckedAdvice::DontNeed;
                self.map.unchecked_advise_range(what, self.base + pages.start, pages.len())
            };
            if given_back.is_ok() {
                self.clear(block.start..pages.start.clamp(block.start, block.end));
                self.clear(pages.end.clamp(block.start, block.end)..block.end);
                return;
            }
        }
        // Where the system cannot take pages back the promise of zeroes is kept by hand.
        self.clear(block);
    }

    /// Zeroes bytes of a block that is not in use.
    fn clear(&mut self, bytes: Range<usize>) {
        let map = self.map.as_mut_ptr();
        // SAFETY: `vacate` gives ranges within a block of this mapping.
        let start = unsafe { map.add(self.base + bytes.start) };
        // SAFETY: the block is not in use, so nobody else holds a reference into the range.
        unsafe { start.write_bytes(0, bytes.len()) };
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// `None` marks an unmapped slab whose index may be reused.
    slabs: Vec<Option<Slab>>,
    /// Slabs with a free block; the first one is filled first, so that the last ones empty.
    open: BTreeSet<usize>,
    usage: MemoryUsage,
}

/// Hands out blocks of one size. Cheap to clone; clones share the arena.
#[derive(Clone, Debug)]
pub struct HostArena {
    inner: Arc<Mutex<Inner>>,
    block_bytes: usize,
    /// Whether blocks stay.
    steady: bool,
}

impl HostArena {
    /// An arena of blocks of `bytes`, rounded up to [`BLOCK_ALIGN`]. `steady` says that they are seldom freed one by one.
    pub fn new(bytes: usize, steady: bool) -> Self {
        Self { inner: Arc::default(), block_bytes: bytes.max(1).next_multiple_of(BLOCK_ALIGN), steady }
    }

    /// Size of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while the lock is held leaves counts that are at worst too large; the memory itself is
        // owned by blocks, so going on is sound.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use and held.
    pub fn usage(&self) -> MemoryUsage {
        self.lock().usage
    }

    /// Forgets the peak so far: it becomes what is resident now.
    pub fn reset_peak(&self) {
        let mut inner = self.lock();
        inner.usage.peak = inner.usage.resident;
    }

    /// A zeroed block.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system maps no more.
    pub fn allocate(&self) -> Result<HostBlock, DeviceError> {
        let mut inner = self.lock();
        let index = match inner.open.first() {
            Some(&index) => index,
            None => self.map_slab(&mut inner)?,
        };
        let block_bytes = self.block_bytes;
        let Some(slab) = inner.slabs[index].as_mut() else { unreachable!("slab {index} was just found") };
        let Some(block) = slab.free.pop() else { unreachable!("slab {index} has a free block") };
        slab.used[block] = true;
        let full = slab.free.is_empty();
        let map = slab.map.as_mut_ptr();
        // SAFETY: `block` came from this slab's free list, whose entries are below the number of blocks that
        // the mapping holds behind its base, so the result stays inside it.
        let address = unsafe { map.add(slab.base + block * block_bytes) };
        if full {
            inner.open.remove(&index);
        }
        let Some(address) = NonNull::new(address) else { unreachable!("a mapping is never at address 0") };
        inner.usage.resident += block_bytes;
        inner.usage.peak = inner.usage.peak.max(inner.usage.resident);
        Ok(HostBlock { arena: self.clone(), slab: index, block, address })
    }

    fn map_slab(&self, inner: &mut Inner) -> Result<usize, DeviceError> {
        let huge = cfg!(target_os = "linux") && self.steady && inner.usage.reserved >= HUGE_FROM;
        let blocks = (if huge { HUGE_SLAB_BYTES } else { SLAB_BYTES } / self.block_bytes).max(1);
        let bytes = blocks * self.block_bytes;
        // Addresses only: what lies before the base is never written.
        let mapped = bytes + if huge { HUGE_PAGE } else { 0 };
        let map = MmapOptions::new().len(mapped).map_anon().map_err(|e| DeviceError::OutOfMemory {
            bytes,
            memory: "host",
            reason: e.to_string(),
        })?;
        let start = map.as_ptr().addr();
        let base = if huge { start.next_multiple_of(HUGE_PAGE) - start } else { 0 };
        // Elsewhere huge pages would make the system keep 2 MiB for a block of 32 KiB that was freed around others.
        #[cfg(target_os = "linux")]
        let _ = map.advise(if huge { memmap2::Advice::HugePage } else { memmap2::Advice::NoHugePage });
        let slab = Slab { map, base, huge, free: (0..blocks).rev().collect(), used: vec![false; blocks] };
        inner.usage.reserved += bytes;
        let index = match inner.slabs.iter().position(Option::is_none) {
            Some(index) => {
                inner.slabs[index] = Some(slab);
                index
            }
            None => {
                inner.slabs.push(Some(slab));
                inner.slabs.len() - 1
            }
        };
        inner.open.insert(index);
        Ok(index)
    }

    fn release(&self, slab_index: usize, block: usize) {
        let block_bytes = self.block_bytes;
        let mut inner = self.lock();
        inner.usage.resident -= block_bytes;
        let Some(slab) = inner.slabs[slab_index].as_mut() else { return };
        slab.free.push(block);
        slab.used[block] = false;
        if slab.free.len() == slab.used.len() {
            let bytes = slab.used.len() * block_bytes;
            inner.slabs[slab_index] = None;
            inner.open.remove(&slab_index);
            inner.usage.reserved -= bytes;
            return;
        }
        slab.vacate(block, block_bytes);
        inner.open.insert(slab_index);
    }
}

/// One block of an arena: exclusively owned bytes, given back to the system on drop.
#[derive(Debug)]
pub struct HostBlock {
    arena: HostArena,
    slab: usize,
    block: usize,
    address: NonNull<u8>,
}

// SAFETY: a block is the only handle to its bytes (the arena never touches a block in use), so it may move
// between threads like a `Box<[u8]>`.
unsafe impl Send for HostBlock {}
// SAFETY: `&HostBlock` only gives `&[u8]`.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `address` points at `block_bytes` mapped, initialised (zeroed) bytes of a slab that stays
        // mapped while one of its blocks lives; `&self` excludes `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.arena.block_bytes) }
    }

    /// The bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.arena.block_bytes) }
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        self.arena.release(self.slab, self.block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(arena: &HostArena, count: usize) {
        let bytes = arena.block_bytes();
        let mut blocks: Vec<HostBlock> = (0..count).map(|_| arena.allocate().unwrap()).collect();
        for (i, b) in blocks.iter_mut().enumerate() {
            assert!(b.bytes().iter().all(|&x| x == 0));
            b.bytes_mut().fill(i as u8);
        }
        assert!(blocks.iter().enumerate().all(|(i, b)| b.bytes().iter().all(|&x| x == i as u8)));
        assert_eq!(arena.usage().resident, count * bytes);
        assert!(arena.usage().reserved >= count * bytes);
        let mut i = 0;
        blocks.retain(|_| {
            i += 1;
            i % 2 == 0
        });
        assert_eq!(arena.usage().resident, count / 2 * bytes);
        assert!(blocks.iter().enumerate().all(|(i, b)| b.bytes().iter().all(|&x| x == (2 * i + 1) as u8)));
        let again: Vec<HostBlock> = (0..count / 2).map(|_| arena.allocate().unwrap()).collect();
        assert!(again.iter().all(|b| b.bytes().iter().all(|&x| x == 0)), "a reused block is zero again");
        drop((again, blocks));
        assert_eq!(arena.usage().resident, 0);
        assert_eq!(arena.usage().reserved, 0);
    }

    #[test]
    fn blocks_are_disjoint_zeroed_and_counted() {
        let arena = HostArena::new(5000, false);
        assert_eq!(arena.block_bytes(), 5056);
        check(&arena, 300);
    }

    #[test]
    fn so_are_blocks_in_huge_pages() {
        let arena = HostArena::new(50_000, true);
        check(&arena, 2 * HUGE_FROM / arena.block_bytes());
    }
}
