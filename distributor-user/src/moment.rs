//! A moment as a number that outlives the process: nanoseconds of CLOCK_MONOTONIC.
//!
//! For serde: `#[serde(with = "moment")]` on an `Instant`. The number means the same to every
//! process until the machine is booted again, and nothing after that; who reads it later has to
//! know which boot it is from.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An instant where there may be none: `#[serde(with)]` takes no `Option<Instant>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment(#[serde(with = "self")] pub Instant);

/// The present, in nanoseconds of CLOCK_MONOTONIC.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The moment as a number.
pub fn number(moment: Instant) -> u64 {
    let (now, present) = (Instant::now(), now());
    match moment.checked_duration_since(now) {
        Some(ahead) => present.saturating_add(nanoseconds(ahead)),
        None => present.saturating_sub(nanoseconds(now - moment)),
    }
}

/// The moment of a number. One before the boot, or further ahead than a clock can be, is now.
pub fn moment(number: u64) -> Instant {
    let (now, present) = (Instant::now(), now());
    let moment = match number.checked_sub(present) {
        Some(ahead) => now.checked_add(Duration::from_nanos(ahead)),
        None => now.checked_sub(Duration::from_nanos(present - number)),
    };
    moment.unwrap_or(now)
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

pub fn serialize<S: Serializer>(moment: &Instant, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(number(*moment))
}

pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Instant, D::Error> {
    Ok(moment(u64::deserialize(from)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_comes_back_from_its_number() {
        let now = Instant::now();
        for then in [now - Duration::from_millis(300), now, now + Duration::from_secs(30)] {
            let back = moment(number(then));
            let apart = back.max(then) - back.min(then);
            assert!(apart < Duration::from_millis(50), "{apart:?} apart");
        }
    }

    #[test]
    fn a_number_of_no_moment_is_now() {
        let before = Instant::now();
        assert!(moment(u64::MAX) >= before);
    }
}
