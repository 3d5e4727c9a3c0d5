//! A map of the kernel's as memory of ours: read and written without a system call.
//!
//! For array maps that were made with BPF_F_MMAPABLE (Linux 5.5), whose entries consist of
//! integers. The programs change them at the same time, so every access is atomic. What the
//! integers mean is the contract's to say, and which of them are ours to write.

use std::{
    io,
    marker::PhantomData,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The entries of one map, each a `T`.
#[derive(Debug)]
pub struct Shared<T> {
    at: NonNull<u8>,
    entries: usize,
    /// Bytes of an entry.
    size: usize,
    bytes: usize,
    entry: PhantomData<T>,
}

// SAFETY: the mapping belongs to no thread, and all access to it is atomic.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Maps a map with so many entries.
    pub fn of(map: BorrowedFd<'_>, entries: usize) -> io::Result<Self> {
        Self::of_smaller(map, entries, size_of::<T>())
    }

    /// The same of a map whose entries are only the first so many bytes of a `T`.
    pub fn of_smaller(map: BorrowedFd<'_>, entries: usize, size: usize) -> io::Result<Self> {
        assert!(size <= size_of::<T>(), "{size} bytes are more than there are");
        let bytes = entries * Self::stride(size);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice is in nobody's way.
        let at = unsafe { mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, map, 0) }?;
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, entries, size, bytes, entry: PhantomData })
    }

    /// The kernel puts entries at multiples of 8 bytes (array_map_elem_size, Linux 6.18).
    const fn stride(size: usize) -> usize {
        size.next_multiple_of(8)
    }

    /// The 64-bit integer at this offset in an entry.
    pub fn long(&self, entry: usize, offset: usize) -> &AtomicU64 {
        let at = self.place(entry, offset, size_of::<u64>());
        // SAFETY: inside the mapping and aligned, as `place` has checked, for as long as `self`
        // is there; any bytes are a number; all access is atomic.
        unsafe { AtomicU64::from_ptr(at.cast().as_ptr()) }
    }

    /// The 32-bit integer at this offset in an entry.
    pub fn word(&self, entry: usize, offset: usize) -> &AtomicU32 {
        let at = self.place(entry, offset, size_of::<u32>());
        // SAFETY: as in `long`.
        unsafe { AtomicU32::from_ptr(at.cast().as_ptr()) }
    }

    fn place(&self, entry: usize, offset: usize, size: usize) -> NonNull<u8> {
        assert!(entry < self.entries, "entry {entry} of {}", self.entries);
        assert!(offset.is_multiple_of(size) && offset + size <= self.size, "no field at {offset}");
        // SAFETY: the assertions keep it inside the mapping.
        unsafe { self.at.add(entry * Self::stride(self.size) + offset) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: it is our mapping, and what `long` and `word` gave has ended with the borrow.
        // It cannot fail for a mapping that is there.
        let _ = unsafe { munmap(self.at.cast().as_ptr(), self.bytes) };
    }
}
