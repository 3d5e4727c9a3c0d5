//! How many may come in a while: a rate with a burst, kept in one 64-bit number.
//!
//! The number is when the next connection is *due* if all keep to the rate exactly (the theoretical
//! arrival time of the generic cell rate algorithm, ITU-T I.371). Each that is let in moves it by
//! the interval between two; who comes before it by more than the tolerance has come too early.
//! That is a token bucket that nobody has to fill: one compare-and-swap checks and takes. A number
//! from long ago, 0 among them, is a full bucket.
#![forbid(unsafe_code)]

/// The number with one more let in at `now`; `None` if that would be too early. Times, the interval
/// and the tolerance are in nanoseconds.
#[inline(always)]
pub const fn take(due: u64, now: u64, interval: u64, tolerance: u64) -> Option<u64> {
    if due > now {
        if due - now > tolerance { None } else { Some(due + interval) }
    } else {
        Some(now + interval)
    }
}

/// The number with one less: what [`take`] took a moment ago is given back.
#[inline(always)]
pub const fn give_back(due: u64, interval: u64) -> u64 {
    due.saturating_sub(interval)
}

/// How long after `now` the next one may come: 0 if at once.
#[inline(always)]
pub const fn wait(due: u64, now: u64, tolerance: u64) -> u64 {
    due.saturating_sub(now).saturating_sub(tolerance)
}

/// The interval and the tolerance of so many in a second, of which `burst` may come at once. Both
/// at least 1. An interval is rounded up: never more than the rate.
pub const fn of(rate: u32, burst: u32) -> (u64, u64) {
    let interval = 1_000_000_000u64.div_ceil(rate as u64);
    (interval, (burst as u64 - 1) * interval)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    /// How many of those that come at these times are let in, and the number afterwards.
    fn let_in(mut due: u64, times: &[u64], rate: u32, burst: u32) -> (u64, u64) {
        let (interval, tolerance) = of(rate, burst);
        let mut count = 0;
        for &now in times {
            if let Some(next) = take(due, now, interval, tolerance) {
                (due, count) = (next, count + 1);
            }
        }
        (count, due)
    }

    #[test]
    fn a_burst_comes_at_once_and_then_one_for_each_interval() {
        let now = 5 * SECOND;
        assert_eq!(let_in(0, &[now; 50], 10, 7).0, 7);
        let (_, due) = let_in(0, &[now; 50], 10, 7);
        // A tenth of a second later there is one token more, half a second later there are five.
        assert_eq!(let_in(due, &[now + SECOND / 10; 50], 10, 7).0, 1);
        assert_eq!(let_in(due, &[now + SECOND / 2; 50], 10, 7).0, 5);
        // After a long time there are as many as a burst has, and not more.
        assert_eq!(let_in(due, &[now + 900 * SECOND; 50], 10, 7).0, 7);
    }

    #[test]
    fn a_burst_of_one_keeps_them_apart() {
        let times: Vec<u64> = (0..100).map(|step| step * SECOND / 100).collect();
        assert_eq!(let_in(0, &times, 10, 1).0, 10);
    }

    #[test]
    fn the_wait_is_as_long_as_it_takes() {
        let (interval, tolerance) = of(4, 2);
        let (_, due) = let_in(0, &[SECOND; 9], 4, 2);
        let wait = wait(due, SECOND, tolerance);
        assert_eq!(wait, SECOND / 4);
        assert_eq!(take(due, SECOND + wait - 1, interval, tolerance), None);
        assert!(take(due, SECOND + wait, interval, tolerance).is_some());
    }

    #[test]
    fn an_interval_is_rounded_up() {
        assert_eq!(of(3, 1), (333_333_334, 0));
        assert_eq!(of(1_000_000, 2), (1_000, 1_000));
    }

    proptest! {
        /// In any stretch of time: the burst, and what the rate brings meanwhile.
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            rate in 1u32..2_000, burst in 1u32..100,
            pauses in prop::collection::vec(0u64..SECOND / 50, 1..300),
        ) {
            let (interval, tolerance) = of(rate, burst);
            let (mut now, mut due, mut came) = (7 * SECOND, 0, Vec::new());
            for pause in pauses {
                now += pause;
                if let Some(next) = take(due, now, interval, tolerance) {
                    due = next;
                    came.push(now);
                }
            }
            for from in 0..came.len() {
                for to in from..came.len() {
                    let most = u64::from(burst) + (came[to] - came[from]) / interval;
                    prop_assert!((to - from + 1) as u64 <= most);
                }
            }
        }

        /// Whoever keeps to the rate is never too early, and clocks of CPUs may differ by less than
        /// the burst allows for.
        #[test]
        fn who_keeps_to_the_rate_is_let_in(rate in 1u32..10_000, count in 1usize..200) {
            let (interval, _) = of(rate, 1);
            let times: Vec<u64> = (1..=count as u64).map(|step| step * interval).collect();
            prop_assert_eq!(let_in(0, &times, rate, 1).0, count as u64);
        }

        #[test]
        fn what_is_given_back_can_be_taken_again(rate in 1u32..10_000, burst in 1u32..100) {
            let (interval, tolerance) = of(rate, burst);
            let (_, due) = let_in(0, &vec![SECOND; burst as usize], rate, burst);
            prop_assert_eq!(take(due, SECOND, interval, tolerance), None);
            let back = give_back(due, interval);
            prop_assert_eq!(take(back, SECOND, interval, tolerance), Some(due));
        }
    }
}
