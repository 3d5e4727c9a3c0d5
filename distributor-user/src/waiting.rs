//! Who waits, as the kernel's events tell it.
//!
//! Pure. Takes the events of one service in their order, gives how long the first in line has
//! waited and how the others' waits ended. The number that wait now is the kernel's own count,
//! which no lost event can falsify.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// The waiting list of one service.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    /// Cookie -> since when, in nanoseconds of the monotonic clock.
    since: BTreeMap<u64, u64>,
    served: u64,
    left: u64,
}

impl Waiting {
    /// A connection began to wait. One that is parked again keeps its place.
    pub fn began(&mut self, cookie: u64, time: u64) {
        self.since.entry(cookie).or_insert(time);
    }

    /// A connection was given to a server.
    pub fn served(&mut self, cookie: u64) {
        self.since.remove(&cookie);
        self.served += 1;
    }

    /// A connection is gone.
    pub fn left(&mut self, cookie: u64) {
        self.since.remove(&cookie);
        self.left += 1;
    }

    /// Nobody waits, says the kernel: forgets whose end was not told.
    pub fn nobody(&mut self) {
        self.since.clear();
    }

    pub fn served_total(&self) -> u64 {
        self.served
    }

    pub fn left_total(&self) -> u64 {
        self.left
    }

    /// How long the oldest has waited, in nanoseconds. 0 if nobody waits.
    pub fn oldest(&self, now: u64) -> u64 {
        self.since.values().min().map_or(0, |&since| now.saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_whoever_began_first_and_still_waits() {
        let mut waiting = Waiting::default();
        waiting.began(9, 100);
        waiting.began(3, 200);
        waiting.began(9, 900);
        assert_eq!(waiting.oldest(1000), 900);
        waiting.served(9);
        assert_eq!(waiting.oldest(1000), 800);
        waiting.left(3);
        assert_eq!(waiting.oldest(1000), 0);
        assert_eq!((waiting.served_total(), waiting.left_total()), (1, 1));
    }
}
