//! Whether somebody who waits may go to a server now, and when else: what the attendant goes by.
//!
//! Reads the counts and the plan in force as memory, as `select` does (`program/limit.rs`).
#![forbid(unsafe_code)]

use std::{mem::offset_of, sync::atomic::Ordering, time::Duration};

use distributor_ebpf::{
    contract::{
        BUCKETS_OF_SOURCES, Ceiling, FLAG_CLOSING, FLAG_LIMITED, Limits, Load, Plan, SLOTS, Server, Source,
        WAYS,
    },
    rate,
    source::LOCKED,
    word,
};

use super::{Desk, Kernel};

/// What the service as a whole has for somebody who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// It has as many connections as it may have.
    Full,
    /// The next one may come in so long.
    OpensIn(Duration),
}

impl Desk {
    /// Some server in the plan in force has a free place, and the service is not being stopped.
    pub fn has_place(&self, now: u64) -> bool {
        let active = self.active.word(0, 0).load(Ordering::Acquire) as usize & 1;
        let field = |offset: usize| self.plan.word(active, offset).load(Ordering::Relaxed);
        if field(offset_of!(Plan, flags)) & FLAG_CLOSING != 0 {
            return false;
        }
        let slots = (field(offset_of!(Plan, count)) as usize).min(SLOTS);
        (0..slots).any(|slot| {
            let server = offset_of!(Plan, servers) + slot * size_of::<Server>();
            let limit = field(server + offset_of!(Server, limit));
            let places = self.load.long(0, offset_of!(Load, word) + slot * 8).load(Ordering::SeqCst);
            word::used(word::roll(places, word::epoch(now))) < u64::from(limit)
        })
    }

    /// Whether the service as a whole has a place and a token for somebody who waits.
    pub fn gate(&self, now: u64) -> Gate {
        let active = self.active.word(0, 0).load(Ordering::Acquire) as usize & 1;
        let word = |offset: usize| self.plan.word(active, offset).load(Ordering::Relaxed);
        if word(offset_of!(Plan, flags)) & FLAG_LIMITED == 0 {
            return Gate::Open;
        }
        let limits = offset_of!(Plan, limits);
        let service = limits + offset_of!(Limits, service);
        let connections = word(service + offset_of!(Ceiling, connections));
        let earlier = word(limits + offset_of!(Limits, earlier));
        let places = self.load.long(0, offset_of!(Load, places)).load(Ordering::SeqCst);
        let used = word::used(word::roll(places, word::epoch(now)));
        if connections != 0 && used >= u64::from(connections.saturating_sub(earlier)) {
            return Gate::Full;
        }
        let long = |offset: usize| self.plan.long(active, offset).load(Ordering::Relaxed);
        if long(service + offset_of!(Ceiling, interval)) == 0 || word(limits + offset_of!(Limits, waits)) == 0
        {
            return Gate::Open;
        }
        let due = self.load.long(0, offset_of!(Load, due)).load(Ordering::SeqCst);
        match rate::wait(due, now, long(service + offset_of!(Ceiling, tolerance))) {
            0 => Gate::Open,
            wait => Gate::OpensIn(Duration::from_nanos(wait)),
        }
    }

    /// Whether this place in the order is that of somebody whom a dead server left: he has his place in
    /// the service.
    pub fn is_orphan(&self, order: u64) -> bool {
        order <= self.load.long(0, offset_of!(Load, orphans)).load(Ordering::SeqCst)
    }

    /// Rolls every slot's word to the present epoch, as whoever looks at it next would. Epochs
    /// repeat after 73 minutes, and a word that nobody touched for so long would pass for fresh.
    pub fn stamp_words(&self, now: u64) {
        for slot in 0..SLOTS {
            let places = self.load.long(0, offset_of!(Load, word) + slot * 8);
            let seen = places.load(Ordering::SeqCst);
            let rolled = word::roll(seen, word::epoch(now));
            // If a program was faster, it has rolled it.
            let _ = places.compare_exchange(seen, rolled, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// The same of the service's word, and of the sources'. Those without a reservation are left as they
    /// are: what they say does not depend on the epoch, and an idle place may be taken over.
    pub fn stamp_sources(&self, now: u64) {
        let sources = (0..BUCKETS_OF_SOURCES).flat_map(|bucket| (0..WAYS).map(move |way| (bucket, way)));
        let sources = sources.map(|(bucket, way)| {
            self.sources.long(bucket, way * size_of::<Source>() + offset_of!(Source, word))
        });
        for places in [self.load.long(0, offset_of!(Load, places))].into_iter().chain(sources) {
            let seen = places.load(Ordering::SeqCst);
            if seen == LOCKED || word::reserved(seen) == 0 {
                continue;
            }
            let rolled = word::roll(seen, word::epoch(now));
            let _ = places.compare_exchange(seen, rolled, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

impl Kernel {
    /// Every place in the table of sources.
    pub fn sources(&self) -> impl Iterator<Item = Source> {
        let places = (0..BUCKETS_OF_SOURCES).flat_map(|bucket| (0..WAYS).map(move |way| (bucket, way)));
        places.map(|(bucket, way)| {
            let field = |offset: usize| {
                self.sources.long(bucket, way * size_of::<Source>() + offset).load(Ordering::Relaxed)
            };
            Source {
                high: field(offset_of!(Source, high)),
                low: field(offset_of!(Source, low)),
                word: field(offset_of!(Source, word)),
                due: field(offset_of!(Source, due)),
            }
        })
    }
}
