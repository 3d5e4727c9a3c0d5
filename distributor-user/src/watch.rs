//! Waiting until a descriptor can be read, for descriptors that tokio has no type for.
//!
//! Watches a duplicate, so that the descriptor itself stays with the type that reads it.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Something whose readability can be awaited.
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Must be called inside a tokio runtime.
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let duplicate = fd.try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` is open, and the same one, until it is dropped, and `AsyncFd` owns it.
        let watched = unsafe { AsyncFd::register_with_interest(duplicate, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// Waits until the descriptor can be read, then `read`s. `read` must go on until there is
    /// nothing left, because only what comes later is waited for.
    pub async fn readable<T>(&self, read: impl FnOnce() -> T) -> io::Result<T> {
        let mut guard = self.0.readable().await?;
        // Cleared before reading: what arrives while we read makes it ready again.
        guard.clear_ready();
        Ok(read())
    }
}
