//! One server's load in one 64-bit word: active connections, reservations, and their age.
//!
//! `epoch 12 | current 16 | previous 16 | active 20`. One compare-and-swap checks a limit and
//! takes a place, so a limit holds whatever else happens at the same time. A reservation is
//! made when a server is selected and ends when the handshake completes; if it never does, it
//! ages from `current` to `previous` to nothing, one to two epochs after it was made. No timer
//! and no sweep: whoever reads a word rolls it to the present epoch first.
#![forbid(unsafe_code)]

use crate::bit::{below, either};

const ACTIVE_BITS: u32 = 20;
const RESERVED_BITS: u32 = 16;
const EPOCH_BITS: u32 = 12;

/// The largest number of active connections a word can hold.
pub const ACTIVE_MAX: u64 = (1 << ACTIVE_BITS) - 1;
/// The largest number of reservations of one epoch a word can hold.
pub const RESERVED_MAX: u64 = (1 << RESERVED_BITS) - 1;
const EPOCHS: u64 = 1 << EPOCH_BITS;

const PREVIOUS_SHIFT: u32 = ACTIVE_BITS;
const CURRENT_SHIFT: u32 = PREVIOUS_SHIFT + RESERVED_BITS;
const EPOCH_SHIFT: u32 = CURRENT_SHIFT + RESERVED_BITS;

/// Which kind of place a connection takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its handshake has begun.
    Reserved,
    /// It is established.
    Active,
}

/// The epoch of a monotonic time in nanoseconds. An epoch lasts 2^30 ns, about 1.07 s.
#[inline(always)]
pub const fn epoch(nanoseconds: u64) -> u64 {
    (nanoseconds >> 30) & (EPOCHS - 1)
}

/// 1 if nobody has touched the word in the epoch `now`, nor in one that another CPU's clock may be in
/// already.
#[inline(always)]
pub fn is_past(word: u64, now: u64) -> u64 {
    let distance = now.wrapping_sub(word >> EPOCH_SHIFT) & (EPOCHS - 1);
    below(0, distance) & below(distance, EPOCHS - 2)
}

/// The word of the epoch `now` that counts nothing.
#[inline(always)]
pub const fn empty(now: u64) -> u64 {
    now << EPOCH_SHIFT
}

/// Established connections in a word.
#[inline(always)]
pub const fn active(word: u64) -> u64 {
    word & ACTIVE_MAX
}

/// Reservations in a word, of both epochs. Roll it first.
#[inline(always)]
pub const fn reserved(word: u64) -> u64 {
    ((word >> PREVIOUS_SHIFT) & RESERVED_MAX) + ((word >> CURRENT_SHIFT) & RESERVED_MAX)
}

/// Places taken: established connections and reservations. Roll it first.
#[inline(always)]
pub const fn used(word: u64) -> u64 {
    active(word) + reserved(word)
}

/// The word as it is in `now`, an epoch: reservations that are too old are gone.
///
/// A word from one or two epochs ahead is left as it is: the clocks of two CPUs differ by
/// less. Any other distance is age. (Taking more than two for skew would freeze a word's
/// reservations for ever once it is older than half the ring of epochs.)
#[inline(always)]
pub fn roll(word: u64, now: u64) -> u64 {
    // Without branches: this stands in the loop over all slots, where each branch doubles
    // the paths that the verifier has to follow.
    let distance = now.wrapping_sub(word >> EPOCH_SHIFT) & (EPOCHS - 1);
    let same = below(distance, 1) | below(EPOCHS - 3, distance);
    let next = below(distance, 2);
    let current = (word >> CURRENT_SHIFT) & RESERVED_MAX;
    let aged = (now << EPOCH_SHIFT) | ((current << PREVIOUS_SHIFT) * next) | active(word);
    either(same, word, aged)
}

/// Reservations that expire when the word is rolled to `now`.
#[inline(always)]
pub fn expired(word: u64, now: u64) -> u64 {
    reserved(word) - reserved(roll(word, now))
}

/// The word with one more place taken, or `None` if that would exceed a bound.
///
/// `limit` bounds all places, `reservable` the reservations among them.
#[inline(always)]
pub fn take(word: u64, now: u64, place: Place, limit: u64, reservable: u64) -> Option<u64> {
    let word = roll(word, now);
    if used(word) >= limit {
        return None;
    }
    match place {
        Place::Active => Some(word + 1),
        Place::Reserved => {
            let current = (word >> CURRENT_SHIFT) & RESERVED_MAX;
            if reserved(word) >= reservable || current == RESERVED_MAX {
                return None;
            }
            Some(word + (1 << CURRENT_SHIFT))
        }
    }
}

/// The word with the place given back that [`take`] took a moment ago.
#[inline(always)]
pub fn give_back(word: u64, now: u64, place: Place) -> u64 {
    let word = roll(word, now);
    match place {
        Place::Active => down(word),
        Place::Reserved if (word >> CURRENT_SHIFT) & RESERVED_MAX > 0 => word - (1 << CURRENT_SHIFT),
        Place::Reserved if (word >> PREVIOUS_SHIFT) & RESERVED_MAX > 0 => word - (1 << PREVIOUS_SHIFT),
        // It expired meanwhile.
        Place::Reserved => word,
    }
}

/// The word after a handshake completed: one more active, one reservation less.
///
/// The older reservation is consumed first. A handshake that outlived its reservation counts
/// all the same: the connection is there.
#[inline(always)]
pub fn establish(word: u64, now: u64) -> u64 {
    let word = roll(word, now);
    let word = if (word >> PREVIOUS_SHIFT) & RESERVED_MAX > 0 {
        word - (1 << PREVIOUS_SHIFT)
    } else if (word >> CURRENT_SHIFT) & RESERVED_MAX > 0 {
        word - (1 << CURRENT_SHIFT)
    } else {
        word
    };
    // Full at 1,048,575: more sockets than one listener's server can hold descriptors for.
    if active(word) == ACTIVE_MAX { word } else { word + 1 }
}

/// The word after a connection closed.
#[inline(always)]
pub fn close(word: u64, now: u64) -> u64 {
    down(roll(word, now))
}

/// The word with so many active connections less; below 0: more. For counts that were found wrong.
pub fn corrected(word: u64, by: i64) -> u64 {
    let active = (active(word) as i64).saturating_sub(by).clamp(0, ACTIVE_MAX as i64);
    word & !ACTIVE_MAX | active as u64
}

/// The word of a slot that is counted in two places, after what the other one gained was brought
/// to it: what that was `before`, and is `now`.
///
/// Connections are brought by their difference. Of reservations the larger number is taken: they
/// expire by themselves, and until then one too many is better than a limit that is exceeded.
pub fn join(word: u64, before: u64, now: u64) -> u64 {
    if word == before {
        // Nobody changed it.
        return now;
    }
    let gained = active(now) as i64 - active(before) as i64;
    let active = (active(word) as i64 + gained).clamp(0, ACTIVE_MAX as i64) as u64;
    // Both in the later of their epochs.
    let ahead = (now >> EPOCH_SHIFT).wrapping_sub(word >> EPOCH_SHIFT) & (EPOCHS - 1);
    let (word, now) = if ahead < EPOCHS / 2 {
        (roll(word, now >> EPOCH_SHIFT), now)
    } else {
        (word, roll(now, word >> EPOCH_SHIFT))
    };
    let later = if ahead < EPOCHS / 2 { now } else { word };
    let most = |shift: u32| ((word >> shift) & RESERVED_MAX).max((now >> shift) & RESERVED_MAX) << shift;
    (later >> EPOCH_SHIFT << EPOCH_SHIFT) | most(CURRENT_SHIFT) | most(PREVIOUS_SHIFT) | active
}

const fn down(word: u64) -> u64 {
    // A count of 0 cannot close one; staying at 0 is better than borrowing from the fields above.
    if active(word) == 0 { word } else { word - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn word(active: u64, previous: u64, current: u64, epoch: u64) -> u64 {
        (epoch << EPOCH_SHIFT) | (current << CURRENT_SHIFT) | (previous << PREVIOUS_SHIFT) | active
    }

    #[test]
    fn a_reservation_lives_one_to_two_epochs() {
        let taken = take(0, 7, Place::Reserved, 10, 10).unwrap();
        assert_eq!(used(roll(taken, 7)), 1);
        assert_eq!(used(roll(taken, 8)), 1);
        assert_eq!(used(roll(taken, 9)), 0);
    }

    #[test]
    fn a_word_that_only_one_counted_is_taken_as_it_is() {
        let (before, now) = (word(5, 3, 4, 10), word(7, 4, 0, 11));
        assert_eq!(join(before, before, now), now);
    }

    #[test]
    fn the_larger_number_of_reservations_is_kept_in_the_later_epoch() {
        assert_eq!(join(word(5, 0, 1, 11), word(5, 3, 4, 10), word(6, 3, 6, 10)), word(6, 6, 1, 11));
        assert_eq!(join(word(5, 0, 1, 10), word(5, 3, 4, 10), word(6, 3, 6, 11)), word(6, 3, 6, 11));
    }

    proptest! {
        /// Connections come and go in both words; joined as often as one likes, none is lost.
        #[test]
        fn connections_counted_in_two_words_are_joined_exactly(
            steps in prop::collection::vec((0..3u8, any::<bool>()), 0..200),
            held in 0..500u64,
        ) {
            let (mut old, mut new, mut base) = (word(held, 2, 3, 7), word(held, 2, 3, 7), word(held, 2, 3, 7));
            let (mut count, mut epoch) = (held, 7);
            for (step, is_old) in steps {
                let place = if is_old { &mut old } else { &mut new };
                match step {
                    0 => (*place, count) = (establish(*place, epoch), count + 1),
                    // Whoever closes one has it: a count of 0 closes none.
                    1 if active(*place) > 0 && count > 0 => {
                        (*place, count) = (close(*place, epoch), count - 1);
                    }
                    1 => epoch += 1,
                    _ => (new, base) = (join(new, base, old), old),
                }
            }
            new = join(new, base, old);
            prop_assert_eq!(active(new), count);
        }
    }

    #[test]
    fn what_expires_is_told_once() {
        assert_eq!(expired(word(5, 3, 4, 10), 10), 0);
        assert_eq!(expired(word(5, 3, 4, 10), 11), 3);
        assert_eq!(expired(roll(word(5, 3, 4, 10), 11), 11), 0);
        assert_eq!(expired(word(5, 3, 4, 10), 12), 7);
    }

    #[test]
    fn an_idle_word_forgets_its_reservations_whatever_its_age() {
        for age in 2..EPOCHS - 2 {
            assert_eq!(roll(word(5, 3, 4, 0), age), word(5, 0, 0, age), "age {age}");
        }
    }

    #[test]
    fn a_clock_one_or_two_epochs_behind_changes_nothing() {
        for behind in [1, 2] {
            let word = word(5, 3, 4, 10);
            assert_eq!(roll(word, 10 - behind), word);
        }
    }

    #[test]
    fn a_word_is_past_from_the_next_epoch_on() {
        for (distance, past) in [(0, 0), (1, 1), (2, 1), (EPOCHS - 3, 1), (EPOCHS - 2, 0), (EPOCHS - 1, 0)] {
            assert_eq!(is_past(word(5, 3, 4, 10), (10 + distance) % EPOCHS), past, "{distance}");
        }
    }

    #[test]
    fn the_ring_of_epochs_wraps() {
        assert_eq!(roll(word(1, 2, 3, EPOCHS - 1), 0), word(1, 3, 0, 0));
    }

    #[test]
    fn reservations_stop_at_their_own_bound() {
        let one = take(0, 0, Place::Reserved, 4, 2).unwrap();
        let two = take(one, 0, Place::Reserved, 4, 2).unwrap();
        assert_eq!(take(two, 0, Place::Reserved, 4, 2), None);
        assert!(take(two, 0, Place::Active, 4, 2).is_some());
    }

    #[test]
    fn a_reservation_field_never_overflows_into_its_neighbour() {
        let full = word(0, 0, RESERVED_MAX, 3);
        assert_eq!(take(full, 3, Place::Reserved, u64::MAX, u64::MAX), None);
    }

    #[test]
    fn a_late_handshake_is_counted_without_a_reservation() {
        assert_eq!(establish(word(3, 0, 0, 5), 5), word(4, 0, 0, 5));
    }

    #[test]
    fn a_correction_stays_in_its_field() {
        assert_eq!(corrected(word(5, 3, 4, 10), 2), word(3, 3, 4, 10));
        assert_eq!(corrected(word(5, 3, 4, 10), -2), word(7, 3, 4, 10));
        assert_eq!(corrected(word(5, 3, 4, 10), 6), word(0, 3, 4, 10));
        assert_eq!(corrected(word(5, 3, 4, 10), i64::MIN), word(ACTIVE_MAX, 3, 4, 10));
    }

    #[test]
    fn closing_nothing_leaves_zero() {
        assert_eq!(close(word(0, 2, 1, 5), 5), word(0, 2, 1, 5));
    }

    proptest! {
        #[test]
        fn every_count_that_is_taken_comes_back(
            start in 0u64..1000, epoch in 0u64..EPOCHS, later in 0u64..2, handshakes in 1u64..50,
        ) {
            let mut now = word(start, 0, 0, epoch);
            for _ in 0..handshakes { now = take(now, epoch, Place::Reserved, 1 << 19, 1 << 15).unwrap(); }
            let later = (epoch + later) % EPOCHS;
            for _ in 0..handshakes { now = establish(now, later); }
            prop_assert_eq!(active(now), start + handshakes);
            prop_assert_eq!(reserved(now), 0);
            for _ in 0..start + handshakes { now = close(now, later); }
            prop_assert_eq!(used(now), 0);
        }

        #[test]
        fn used_never_exceeds_the_limit(
            limit in 1u64..40, steps in prop::collection::vec((0u8..4, 0u64..3), 1..200),
        ) {
            let (mut now, mut epoch, mut half_open) = (0, 0, 0u64);
            for (step, passed) in steps {
                epoch = (epoch + passed) % EPOCHS;
                half_open = half_open.min(reserved(roll(now, epoch)));
                match step {
                    0 => if let Some(next) = take(now, epoch, Place::Reserved, limit, limit) { now = next; half_open += 1; },
                    1 => if let Some(next) = take(now, epoch, Place::Active, limit, limit) { now = next; },
                    2 => if half_open > 0 { now = establish(now, epoch); half_open -= 1; },
                    _ => now = close(now, epoch),
                }
                prop_assert!(used(roll(now, epoch)) <= limit);
            }
        }

        #[test]
        fn give_back_undoes_take(active in 0u64..100, previous in 0u64..9, current in 0u64..9, epoch in 0u64..EPOCHS) {
            let before = word(active, previous, current, epoch);
            for place in [Place::Reserved, Place::Active] {
                let taken = take(before, epoch, place, 1000, 1000).unwrap();
                prop_assert_eq!(give_back(taken, epoch, place), before);
            }
        }
    }
}
