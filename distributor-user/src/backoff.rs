//! How long a server waits before its next start, and when it is given up.
//!
//! Takes what the configuration says of restarts; has no memory of its own. The wait is a
//! pure function of the attempt and of a random number that the caller draws. Nothing here
//! sleeps, reads a clock or draws luck.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::ensure;

use crate::config::Restart;

/// The rules of restarting one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    // None of the three times is zero, and max_delay is not below delay.
    restart: Restart,
}

impl Backoff {
    /// Refuses times under which a server that dies at once would be started without a pause.
    pub fn try_new(restart: Restart) -> anyhow::Result<Self> {
        let Restart { delay, max_delay, healthy_after, .. } = restart;
        ensure!(
            !delay.is_zero(),
            "delay: a server that fails at once would be started without a pause, write \"1s\""
        );
        ensure!(
            delay <= max_delay,
            "max-delay: {max_delay:?} is below delay, which is {delay:?}: write {delay:?} or more"
        );
        ensure!(
            !healthy_after.is_zero(),
            "healthy-after: every run would count as healthy, however short, write \"10s\""
        );
        Ok(Self { restart })
    }

    /// How long to wait before a start. `attempt` counts the starts in a row that had no
    /// healthy run between them: the first is 1 and waits for nothing, the second waits
    /// `delay`, each further one twice as long as the one before, up to `max_delay`.
    ///
    /// Up to a quarter is taken off by `random`, so that servers that failed together do not
    /// start together. Off and not on: `max_delay` is then a promise, and waits that have
    /// reached it still differ.
    pub fn delay(&self, attempt: u32, random: u32) -> Duration {
        let Some(doublings) = attempt.checked_sub(2) else {
            return Duration::ZERO;
        };
        let Restart { delay, max_delay, .. } = self.restart;
        let nominal = 2_u32
            .checked_pow(doublings)
            .and_then(|factor| delay.checked_mul(factor))
            .map_or(max_delay, |grown| grown.min(max_delay));
        nominal - nominal / 1000 * (random % (LARGEST_JITTER + 1))
    }

    /// Whether a server that was ready for this long had a healthy run, which forgives the
    /// failures before it.
    pub fn is_healthy(&self, ready_for: Duration) -> bool {
        ready_for >= self.restart.healthy_after
    }

    /// Whether so many failures in a row are enough to stop trying.
    pub fn gives_up(&self, failures: u32) -> bool {
        self.restart.give_up_after.is_some_and(|enough| failures >= enough)
    }
}

/// The most that `random` takes off, in thousandths.
const LARGEST_JITTER: u32 = 250;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RESTART: Restart = Restart {
        delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(30),
        healthy_after: Duration::from_secs(10),
        give_up_after: Some(5),
    };

    #[test]
    fn delay_doubles_up_to_the_largest() {
        let backoff = Backoff::try_new(RESTART).unwrap();
        for (attempt, seconds) in [
            (0, 0),
            (1, 0),
            (2, 1),
            (3, 2),
            (4, 4),
            (5, 8),
            (6, 16),
            (7, 30),
            (8, 30),
            (40, 30),
            (u32::MAX, 30),
        ] {
            assert_eq!(backoff.delay(attempt, 0), Duration::from_secs(seconds), "attempt {attempt}");
        }
    }

    #[test]
    fn jitter_takes_off_up_to_a_quarter() {
        let backoff = Backoff::try_new(RESTART).unwrap();
        for (random, milliseconds) in [(0, 4000), (100, 3600), (250, 3000), (251, 4000)] {
            assert_eq!(backoff.delay(4, random), Duration::from_millis(milliseconds), "random {random}");
        }
    }

    #[test]
    fn run_is_healthy_from_the_configured_length_on() {
        let backoff = Backoff::try_new(RESTART).unwrap();
        assert!(!backoff.is_healthy(Duration::from_millis(9_999)));
        assert!(backoff.is_healthy(Duration::from_secs(10)));
    }

    #[test]
    fn gives_up_at_the_configured_failure() {
        let backoff = Backoff::try_new(RESTART).unwrap();
        assert!(!backoff.gives_up(4));
        assert!(backoff.gives_up(5));
    }

    #[test]
    fn never_gives_up_when_not_told_to() {
        let restart = Restart { give_up_after: None, ..RESTART };
        assert!(!Backoff::try_new(restart).unwrap().gives_up(u32::MAX));
    }

    #[test]
    fn times_that_would_restart_without_a_pause_are_refused() {
        for (restart, sentence) in [
            (
                Restart { delay: Duration::ZERO, ..RESTART },
                "delay: a server that fails at once would be started without a pause, write \"1s\"",
            ),
            (
                Restart { max_delay: Duration::from_millis(500), ..RESTART },
                "max-delay: 500ms is below delay, which is 1s: write 1s or more",
            ),
            (
                Restart { healthy_after: Duration::ZERO, ..RESTART },
                "healthy-after: every run would count as healthy, however short, write \"10s\"",
            ),
        ] {
            let error = Backoff::try_new(restart).unwrap_err();
            assert_eq!(error.to_string(), sentence);
        }
    }

    fn any_backoff() -> impl Strategy<Value = Backoff> {
        let duration = || {
            (0..u64::MAX, 0..1_000_000_000_u32)
                .prop_map(|(seconds, nanos)| Duration::new(seconds, nanos))
                .prop_filter("zero is refused", |duration| !duration.is_zero())
        };
        (duration(), duration(), duration(), any::<Option<u32>>()).prop_map(
            |(one, other, healthy_after, give_up_after)| {
                Backoff::try_new(Restart {
                    delay: one.min(other),
                    max_delay: one.max(other),
                    healthy_after,
                    give_up_after,
                })
                .unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn delay_is_never_zero_after_a_failure_nor_above_the_largest(
            backoff in any_backoff(),
            attempt in 2..=u32::MAX,
            random: u32,
        ) {
            let delay = backoff.delay(attempt, random);
            prop_assert!(!delay.is_zero());
            prop_assert!(delay <= backoff.restart.max_delay);
        }

        #[test]
        fn delay_is_within_a_quarter_of_the_one_without_jitter(
            backoff in any_backoff(),
            attempt: u32,
            random: u32,
        ) {
            let nominal = backoff.delay(attempt, 0);
            let delay = backoff.delay(attempt, random);
            prop_assert!(delay <= nominal);
            prop_assert!(delay >= nominal - nominal / 4);
        }

        #[test]
        fn delay_never_shrinks_with_the_attempt(
            backoff in any_backoff(),
            attempt in 0..u32::MAX,
        ) {
            prop_assert!(backoff.delay(attempt, 0) <= backoff.delay(attempt + 1, 0));
        }
    }
}
