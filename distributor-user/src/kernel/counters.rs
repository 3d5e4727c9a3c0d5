//! OUTCOMES: how often the programs ended in each of their ways.
//!
//! Each CPU has its own counter, and what is given is their sum. Not by aya's type, which opens a
//! file for each read to ask how many CPUs there may be: how things stand is to be known above
//! all when no descriptors are left.
#![forbid(unsafe_code)]

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, anyhow};
use distributor_ebpf::contract::Outcome;

use super::syscall::{self, Entries};

/// The counters of one service.
pub(super) struct Counters {
    map: OwnedFd,
    /// How many CPUs there may be, which does not change.
    cpus: usize,
}

impl Counters {
    /// Those that are pinned there.
    pub(super) fn open(pins: &Path) -> anyhow::Result<Self> {
        let map = syscall::open_pin(&pins.join("OUTCOMES")).context("open the OUTCOMES map")?;
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| anyhow!("read {what}: {error}"))?;
        Ok(Self { map, cpus })
    }

    /// How often this has happened.
    pub(super) fn of(&self, outcome: Outcome) -> anyhow::Result<u64> {
        let entries = Entries {
            map: self.map.as_fd(),
            key_size: size_of::<u32>(),
            value_size: size_of::<u64>() * self.cpus,
            most: Outcome::COUNT,
        };
        let counts = entries.get(&(outcome as u32).to_ne_bytes()).context("read OUTCOMES")?;
        let counts = counts.context("OUTCOMES has an entry for each outcome")?;
        let (counts, _) = counts.as_chunks::<8>();
        Ok(counts.iter().fold(0, |sum, count| sum.wrapping_add(u64::from_ne_bytes(*count))))
    }
}
