//! What a test server knows of its own connections, read from outside while it runs.
//!
//! A server with `--inside FILE` writes three numbers there whenever one changes: the
//! connections it has, the most it ever had at once, and how many it accepted. It counts one
//! down before it closes it, so this count is never above the kernel's for a client that
//! closes in an orderly way.

#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// The three numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    pub now: u64,
    pub most: u64,
    pub accepted: u64,
}

impl Inside {
    /// The last numbers that were written. All 0 if the server has not started yet.
    pub fn read(file: &Path) -> Self {
        let Ok(bytes) = fs::read(file) else {
            return Self::default();
        };
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        Self { now: number(0), most: number(8), accepted: number(16) }
    }

    /// Writes them, in one piece.
    pub fn write(&self, file: &File) -> io::Result<()> {
        let numbers = [self.now, self.most, self.accepted];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        file.write_all_at(&bytes, 0)
    }
}
