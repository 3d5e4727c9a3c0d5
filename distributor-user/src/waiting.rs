//! Who waits, as the kernel's events tell it.
//!
//! Pure. Takes the events of one service, gives how long the first in line has waited. How many
//! wait, and how waits ended, is the kernel's own count, which no lost event can falsify.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// The connections of one service that wait.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    /// Cookie -> since when, in nanoseconds of the monotonic clock.
    since: BTreeMap<u64, u64>,
}

impl Waiting {
    /// A connection began to wait. One that is parked again keeps its place.
    pub fn began(&mut self, cookie: u64, time: u64) {
        self.since.entry(cookie).or_insert(time);
    }

    /// A connection was given to a server, or is gone.
    pub fn ended(&mut self, cookie: u64) {
        self.since.remove(&cookie);
    }

    /// Nobody waits, says the kernel: forgets whose end was not told.
    pub fn nobody(&mut self) {
        self.since.clear();
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
        waiting.ended(9);
        assert_eq!(waiting.oldest(1000), 800);
        waiting.ended(3);
        assert_eq!(waiting.oldest(1000), 0);
    }
}
