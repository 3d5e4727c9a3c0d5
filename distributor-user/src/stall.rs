//! Whether a server accepts what lies in its accept queue.
//!
//! Pure. Takes how many connections ever came to a server's queues and how many lie there, as they
//! are looked at from time to time; the difference is how many it has taken out. A length alone would
//! not do: it is the same while as many come as are accepted. Checks lie there too, and are not counted
//! when they come.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// What was seen of a server's accept queues.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// The most that were ever out of them.
    taken: i64,
    /// How many lay there at the last look.
    length: u32,
    /// When one was last seen to have been taken out, or none to be there.
    moved: Instant,
}

/// What a look has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing lies there, or something was taken out.
    Moves,
    /// Nothing was taken out for so long.
    Stands(Duration),
}

impl Queue {
    /// Nothing was seen yet.
    pub fn new(now: Instant) -> Self {
        Self { taken: i64::MIN, length: 0, moved: now }
    }

    /// Looks. `came` is to be read before `length`: who comes in between is then taken for one that
    /// was there before, which makes a queue that moves look as if it stood, until the next look, but
    /// never the other way round.
    pub fn note(&mut self, came: u64, length: u32, now: Instant) -> Seen {
        let taken = came as i64 - i64::from(length);
        // The first look shows no movement: there is nothing to compare it with. Of what comes to check the
        // server only the length tells.
        let moves = length == 0 || length < self.length || self.taken != i64::MIN && taken > self.taken;
        self.length = length;
        self.taken = self.taken.max(taken);
        if moves {
            self.moved = now;
            return Seen::Moves;
        }
        Seen::Stands(now.saturating_duration_since(self.moved))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_stands_while_nothing_is_taken_out_of_it() {
        // How many came, how many lie there, and for how many seconds it has stood: a look each.
        let looks: [(u64, u32, Option<u64>); 18] = [
            (0, 0, None),
            (5, 5, Some(1)),
            (5, 5, Some(2)),
            // More come, and none is taken.
            (9, 9, Some(3)),
            (10, 9, None),
            (10, 9, Some(1)),
            // As many come as are taken: its length is the same.
            (20, 9, None),
            (30, 9, None),
            (31, 10, Some(1)),
            // Two came between the reading of one number and of the other.
            (31, 12, Some(2)),
            (33, 12, Some(3)),
            (33, 11, None),
            (33, 0, None),
            (33, 0, None),
            (34, 1, Some(1)),
            // Checks come, and one is taken out.
            (34, 3, Some(2)),
            (34, 4, Some(3)),
            (34, 3, None),
        ];
        let begun = Instant::now();
        let mut queue = Queue::new(begun);
        for (at, (came, length, stands)) in looks.into_iter().enumerate() {
            let seen = queue.note(came, length, begun + Duration::from_secs(at as u64));
            let expected = stands.map_or(Seen::Moves, |seconds| Seen::Stands(Duration::from_secs(seconds)));
            assert_eq!(seen, expected, "look {at}");
        }
    }

    #[test]
    fn the_first_look_at_a_full_queue_shows_no_movement() {
        let begun = Instant::now();
        let mut queue = Queue::new(begun);
        assert_eq!(queue.note(70, 3, begun), Seen::Stands(Duration::ZERO));
        assert_eq!(queue.note(70, 3, begun + Duration::from_secs(4)), Seen::Stands(Duration::from_secs(4)));
        assert_eq!(queue.note(70, 2, begun + Duration::from_secs(5)), Seen::Moves);
    }
}
