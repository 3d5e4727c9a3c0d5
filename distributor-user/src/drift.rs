//! Drift: by how much a count differs from the sockets there are, as far as that is certain.
//!
//! Pure. Takes what was counted before and after the kernel was asked for its sockets, what was
//! opened meanwhile, and the sockets; gives the differences that stay. While it was asked,
//! connections came and went, and each of them may or may not have been among the sockets; so
//! only what exceeds that counts. Asking and repairing are the auditor's.
#![forbid(unsafe_code)]

use distributor_ebpf::contract::{
    DISMISSED, IN_SERVICE, Owner, ROOM, SLOTS, Tag, in_room, is_counted, room_of,
};

/// A difference stays if it is there, in the same direction, in so many checks in a row.
pub const CHECKS: u32 = 3;

/// A count that can drift.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Count {
    /// The active connections in a slot's word.
    Slot(u32),
    /// Those who wait.
    Waiting,
    /// The active connections in the word of the service as a whole: those that are marked for it.
    Service,
}

/// A number for each count. What is counted wrong may be below 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    pub slots: Vec<i64>,
    pub waiting: i64,
    pub service: i64,
}

/// What only grows, and tells how much a count may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// By slot: connections that were established or moved there.
    pub opened: Vec<u64>,
    /// Connections that do not wait any more.
    pub left: u64,
    /// Connections that servers do not have any more, of whatever slot.
    pub ended: u64,
}

/// One check. The order in which its parts were read matters: `passed_before`, `before`,
/// `sockets`, `after`, `passed_after`, with pauses that are long for a kernel program.
#[derive(Clone, Debug)]
pub struct Seen {
    pub passed_before: Passed,
    pub before: Counts,
    pub sockets: Counts,
    pub after: Counts,
    pub passed_after: Passed,
}

/// A difference that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    pub count: Count,
    /// So many connections too many are counted; below 0: too few.
    pub by: i64,
    /// What was counted.
    pub counted: i64,
}

impl Difference {
    /// The connections there are.
    pub fn there(&self) -> i64 {
        self.counted - self.by
    }
}

/// The differences of the last checks.
#[derive(Clone, Debug)]
pub struct Drift {
    /// By slot, and then of those who wait and of the service.
    streaks: Vec<Streak>,
}

/// Checks in a row in which a count differed in the same direction.
#[derive(Clone, Copy, Debug, Default)]
struct Streak {
    checks: u32,
    /// The difference nearest to 0.
    least: i64,
}

impl Counts {
    /// Nothing.
    pub fn none() -> Self {
        Self { slots: vec![0; SLOTS], waiting: 0, service: 0 }
    }

    pub fn is_none(&self) -> bool {
        self.waiting == 0 && self.service == 0 && self.slots.iter().all(|&count| count == 0)
    }
}

impl Default for Drift {
    fn default() -> Self {
        Self { streaks: vec![Streak::default(); SLOTS + 2] }
    }
}

impl Drift {
    /// Takes in a check, and gives the differences that have stayed. They are to be repaired:
    /// the next checks begin anew for them.
    pub fn note(&mut self, seen: &Seen) -> Vec<Difference> {
        let mut differences = Vec::new();
        for (number, streak) in self.streaks.iter_mut().enumerate() {
            let (count, counted) = match seen.after.slots.get(number) {
                Some(&counted) => (Count::Slot(number as u32), counted),
                None if number == SLOTS => (Count::Waiting, seen.after.waiting),
                None => (Count::Service, seen.after.service),
            };
            *streak = streak.and(seen.certain(count));
            if streak.checks >= CHECKS {
                differences.push(Difference { count, by: streak.least, counted });
                *streak = Streak::default();
            }
        }
        differences
    }

    /// Some count differed in the last check.
    pub fn is_suspected(&self) -> bool {
        self.streaks.iter().any(|streak| streak.checks > 0)
    }
}

impl Streak {
    fn and(self, difference: i64) -> Self {
        match (difference.signum(), self.least.signum()) {
            (0, _) => Self::default(),
            (sign, before) if sign == before => Self {
                checks: self.checks + 1,
                least: if difference.abs() < self.least.abs() { difference } else { self.least },
            },
            _ => Self { checks: 1, least: difference },
        }
    }
}

impl Seen {
    /// The least difference that explains what was seen; 0 if there may be none.
    ///
    /// With `opened` and `closed` connections between `before` and `after`, of the `before -
    /// drift` real ones at the beginning `closed` may have been gone when the kernel came by, and
    /// `opened` may have come: `before - drift - closed <= sockets <= before - drift + opened`.
    /// And `opened - closed` is `after - before`, whatever the drift.
    fn certain(&self, count: Count) -> i64 {
        let (before, after, sockets) = match count {
            Count::Slot(slot) => {
                let slot = slot as usize;
                (self.before.slots[slot], self.after.slots[slot], self.sockets.slots[slot])
            }
            Count::Waiting => (self.before.waiting, self.after.waiting, self.sockets.waiting),
            Count::Service => (self.before.service, self.after.service, self.sockets.service),
        };
        let ended = grown(self.passed_before.ended, self.passed_after.ended);
        let left = grown(self.passed_before.left, self.passed_after.left);
        let opened = match count {
            Count::Slot(slot) => {
                let slot = slot as usize;
                grown(self.passed_before.opened[slot], self.passed_after.opened[slot])
            }
            // How many came is not counted, how many left is.
            Count::Waiting => left + after - before,
            // At most: each of them came to some slot.
            Count::Service => {
                let slots = self.passed_before.opened.iter().zip(&self.passed_after.opened);
                slots.map(|(before, after)| grown(*before, *after)).sum()
            }
        };
        // A word that is 0 stays 0 when one more closes, which `after` then does not show.
        let hidden = match count {
            Count::Slot(_) if ended >= before => ended,
            // Whom a dead server left may have gone while he waited.
            Count::Service if ended + left >= before => ended + left,
            _ => 0,
        };
        let (least, most) = (after - opened - sockets, before + opened + hidden - sockets);
        if least > 0 { least } else { most.min(0) }
    }
}

fn grown(before: u64, after: u64) -> i64 {
    after.wrapping_sub(before) as i64
}

/// A connection that the kernel told of.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    pub cookie: u64,
    pub tag: Tag,
    /// What OWNERS said of it afterwards: nothing, unless it waited or moved.
    pub owner: Option<Owner>,
}

/// How many connections there are for each count. `still` are those that the kernel told of once
/// more, after OWNERS had been asked; or `None` where OWNERS was empty from the beginning.
///
/// Who is not there any more is not counted: its owner is forgotten when it closes, and it would
/// pass for one that never moved.
pub fn tally(mut told: Vec<Told>, still: Option<Vec<u64>>) -> Counts {
    // The kernel may tell of a socket twice.
    told.sort_unstable_by_key(|told| told.cookie);
    told.dedup_by_key(|told| told.cookie);
    // One whose handshake was not complete, or that was dismissed, is not counted.
    told.retain(|told| is_counted(told.tag.counted));
    if let Some(mut still) = still {
        still.sort_unstable();
        told.retain(|told| still.binary_search(&told.cookie).is_ok());
    }
    let mut counts = Counts::none();
    for told in told {
        let marks = told.owner.map_or(0, |owner| owner.marks);
        counts.service += i64::from((told.tag.counted | marks) & IN_SERVICE != 0);
        let owner = told.owner.map_or_else(|| owner_by(&told.tag), |owner| owner.owner);
        if room_of(owner).is_some() {
            counts.waiting += 1;
        } else if let Some(count) = counts.slots.get_mut(owner as usize) {
            *count += 1;
        }
    }
    counts
}

/// Whose a connection is that never moved: as `track` has it.
pub fn owner_by(tag: &Tag) -> u32 {
    if tag.slot == ROOM || tag.slot == DISMISSED { in_room(tag.index) } else { tag.slot }
}

#[cfg(test)]
mod tests;
