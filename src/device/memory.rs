//! Host memory for pages that goes back to the system when it is freed.
//!
//! An arena maps slabs of anonymous memory and hands out equal blocks. A freed block's physical pages are
//! given back at once (`MADV_DONTNEED`), its addresses are kept for the next block, and a slab with no
//! block in use is unmapped. *Helps* because `malloc` keeps what small frees return: after an eviction the
//! process would be as large as before. *Hurts* by a system call per freed block, so blocks are pages of
//! many rows, never single rows.
//!
//! The two `unsafe` operations of the store live here: turning a block's address into a slice, and telling
//! the kernel to drop its contents.

#![allow(
    unsafe_code,
    reason = "raw slab memory is handed out as disjoint blocks; every block states why it is sound"
)]

use crate::error::DeviceError;
use memmap2::{MmapMut, MmapOptions};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes asked from the system at once, unless one block needs more.
const SLAB_BYTES: usize = 1 << 20;

/// Blocks are whole multiples of this, so that freeing one frees all of its physical pages.
pub const BLOCK_ALIGN: usize = 4096;

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
    /// Offsets of blocks not in use.
    free: Vec<usize>,
    blocks: usize,
}

#[derive(Debug, Default)]
struct Inner {
    /// `None` marks an unmapped slab whose index may be reused.
    slabs: Vec<Option<Slab>>,
    usage: MemoryUsage,
}

/// Hands out blocks of one size. Cheap to clone; clones share the arena.
#[derive(Clone, Debug)]
pub struct HostArena {
    inner: Arc<Mutex<Inner>>,
    block_bytes: usize,
}

impl HostArena {
    /// An arena of blocks of `bytes`, rounded up to whole memory pages.
    pub fn new(bytes: usize) -> Self {
        Self { inner: Arc::default(), block_bytes: bytes.max(1).next_multiple_of(BLOCK_ALIGN) }
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
        let found = inner.slabs.iter().position(|s| s.as_ref().is_some_and(|s| !s.free.is_empty()));
        let index = match found {
            Some(index) => index,
            None => self.map_slab(&mut inner)?,
        };
        let block_bytes = self.block_bytes;
        let Some(slab) = inner.slabs[index].as_mut() else { unreachable!("slab {index} was just found") };
        let Some(offset) = slab.free.pop() else { unreachable!("slab {index} has a free block") };
        let base = slab.map.as_mut_ptr();
        // SAFETY: `offset` came from this slab's free list, whose entries are multiples of `block_bytes`
        // with `offset + block_bytes <= map.len()`, so the result stays inside the mapping.
        let address = unsafe { base.add(offset) };
        let Some(address) = NonNull::new(address) else { unreachable!("a mapping is never at address 0") };
        inner.usage.resident += block_bytes;
        inner.usage.peak = inner.usage.peak.max(inner.usage.resident);
        Ok(HostBlock { arena: self.clone(), slab: index, offset, address })
    }

    fn map_slab(&self, inner: &mut Inner) -> Result<usize, DeviceError> {
        let blocks = (SLAB_BYTES / self.block_bytes).max(1);
        let bytes = blocks * self.block_bytes;
        let map = MmapOptions::new().len(bytes).map_anon().map_err(|e| DeviceError::OutOfMemory {
            bytes,
            memory: "host",
            reason: e.to_string(),
        })?;
        // Huge pages would make the system keep 2 MiB for a block of 32 KiB that was freed around others.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::NoHugePage);
        let slab = Slab { map, free: (0..blocks).rev().map(|i| i * self.block_bytes).collect(), blocks };
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
        Ok(index)
    }

    fn release(&self, slab_index: usize, offset: usize) {
        let block_bytes = self.block_bytes;
        let mut inner = self.lock();
        inner.usage.resident -= block_bytes;
        let Some(slab) = inner.slabs[slab_index].as_mut() else { return };
        slab.free.push(offset);
        if slab.free.len() == slab.blocks {
            let bytes = slab.map.len();
            inner.slabs[slab_index] = None;
            inner.usage.reserved -= bytes;
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the block at `offset` is being dropped, so no reference into this range is left, and
            // the next owner gets it from `allocate`, which promises zeroes: what DONTNEED leaves behind.
            let given_back = unsafe {
                slab.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, block_bytes)
            };
            if given_back.is_ok() {
                return;
            }
        }
        // Where the system cannot take pages back the promise of zeroes is kept by hand.
        slab.map[offset..offset + block_bytes].fill(0);
    }
}

/// One block of an arena: exclusively owned bytes, given back to the system on drop.
#[derive(Debug)]
pub struct HostBlock {
    arena: HostArena,
    slab: usize,
    offset: usize,
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
        self.arena.release(self.slab, self.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_zeroed_and_counted() {
        let arena = HostArena::new(5000);
        assert_eq!(arena.block_bytes(), 8192);
        let mut blocks: Vec<HostBlock> = (0..300).map(|_| arena.allocate().unwrap()).collect();
        for (i, b) in blocks.iter_mut().enumerate() {
            assert!(b.bytes().iter().all(|&x| x == 0));
            b.bytes_mut().fill(i as u8);
        }
        assert!(blocks.iter().enumerate().all(|(i, b)| b.bytes().iter().all(|&x| x == i as u8)));
        assert_eq!(arena.usage().resident, 300 * 8192);
        let reserved = arena.usage().reserved;
        assert!(reserved >= 300 * 8192);
        blocks.retain({
            let mut i = 0;
            move |_| {
                i += 1;
                i % 2 == 0
            }
        });
        assert_eq!(arena.usage().resident, 150 * 8192);
        let again = arena.allocate().unwrap();
        assert!(again.bytes().iter().all(|&x| x == 0), "a reused block is zero again");
        drop((again, blocks));
        assert_eq!(arena.usage().resident, 0);
        assert_eq!(arena.usage().reserved, 0);
    }
}
