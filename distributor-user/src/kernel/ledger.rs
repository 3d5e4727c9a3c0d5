//! What the auditor works with: the counts, who owns which connection, and how to correct a count.
//!
//! Handles of its own on the maps, so that it waits for nobody and nobody for it.
#![forbid(unsafe_code)]

use std::{
    mem::offset_of,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData};
use distributor_ebpf::{
    contract::{Load, Outcome, Owner, SLOTS},
    word,
};

use super::counters::Counters;
use crate::{
    drift::{Count, Counts, Difference, Passed},
    shared::Shared,
};

/// The maps that counts are in.
pub struct Ledger {
    load: Shared<Load>,
    owners: HashMap<MapData, u64, Owner>,
    outcomes: Counters,
    tag: MapData,
}

/// So often a word is tried to be changed, while programs change it too.
const TRIES: usize = 64;

impl Ledger {
    /// Opens the maps that [`super::Kernel::open`] has pinned.
    pub fn open(pins: &Path) -> anyhow::Result<Self> {
        let map =
            |name: &str| MapData::from_pin(pins.join(name)).with_context(|| format!("open the {name} map"));
        let load = map("LOAD")?;
        Ok(Self {
            load: Shared::of(load.fd().as_fd(), 1).context("map LOAD into memory")?,
            owners: Map::from_map_data(map("OWNERS")?)?.try_into()?,
            outcomes: Counters::open(pins)?,
            tag: map("TAG")?,
        })
    }

    /// What is counted now.
    pub fn counts(&self) -> Counts {
        let active = |slot: u32| word::active(self.word(slot).load(Ordering::SeqCst)) as i64;
        Counts {
            slots: (0..SLOTS as u32).map(active).collect(),
            // Counted wrong, it may be below 0.
            waiting: self.waiting().load(Ordering::SeqCst) as i64,
            service: word::active(self.service().load(Ordering::SeqCst)) as i64,
        }
    }

    /// What has passed so far.
    pub fn passed(&self) -> anyhow::Result<Passed> {
        let total =
            |slot: usize| self.load.long(0, offset_of!(Load, total) + slot * 8).load(Ordering::SeqCst);
        let sum = |outcomes: &[Outcome]| -> anyhow::Result<u64> {
            outcomes.iter().try_fold(0u64, |sum, &outcome| Ok(sum.wrapping_add(self.outcomes.of(outcome)?)))
        };
        Ok(Passed {
            opened: (0..SLOTS).map(total).collect(),
            left: sum(&[Outcome::HandedOver, Outcome::ClosedWaiting, Outcome::Dismissed])?,
            ended: sum(&[Outcome::Closed, Outcome::Moved, Outcome::Parked, Outcome::ParkedBehind])?,
        })
    }

    /// Some connection has waited or moved.
    pub fn is_owned(&self) -> bool {
        self.load.long(0, offset_of!(Load, owned)).load(Ordering::SeqCst) != 0
    }

    /// Whose a connection is that waited or moved.
    pub fn owner(&self, cookie: u64) -> Option<Owner> {
        self.owners.get(&cookie, 0).ok()
    }

    /// The TAG map.
    pub fn tags(&self) -> BorrowedFd<'_> {
        self.tag.fd().as_fd()
    }

    /// Corrects a count, whatever it has become meanwhile. False if it changed too often.
    pub fn repair(&self, difference: &Difference) -> bool {
        match difference.count {
            Count::Slot(slot) => correct(self.word(slot), difference.by),
            Count::Service => correct(self.service(), difference.by),
            Count::Waiting => {
                self.waiting().fetch_sub(difference.by as u64, Ordering::SeqCst);
                true
            }
        }
    }

    fn word(&self, slot: u32) -> &AtomicU64 {
        self.load.long(0, offset_of!(Load, word) + slot as usize * 8)
    }

    fn service(&self) -> &AtomicU64 {
        self.load.long(0, offset_of!(Load, places))
    }

    fn waiting(&self) -> &AtomicU64 {
        self.load.long(0, offset_of!(Load, waiting))
    }
}

/// Takes connections off a word, whatever it has become meanwhile.
fn correct(places: &AtomicU64, by: i64) -> bool {
    (0..TRIES).any(|_| {
        let seen = places.load(Ordering::SeqCst);
        let right = word::corrected(seen, by);
        places.compare_exchange(seen, right, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    })
}
