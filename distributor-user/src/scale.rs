//! How many servers a service has, by how many connections there are for them.
//!
//! Pure. More are wanted when connections wait, or most places are taken, for a while; fewer when the
//! others would still be far from full, for a longer while. Between the two lies room, so that what
//! one decision brings about is not the reason for the opposite one.
#![forbid(unsafe_code)]

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::{config::duration, server::span};

/// What the configuration says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Numbered servers, at least and at most.
    pub min: usize,
    pub max: usize,
    /// More are wanted when this part of the places is taken, in percent.
    pub up_at: u32,
    /// For so long.
    pub up_after: Duration,
    /// Fewer are wanted when no more than this part of the places would be taken without one, in
    /// percent. Less than `up_at`.
    pub down_at: u32,
    /// For so long.
    pub down_after: Duration,
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min, max, up_at, up_after, down_at, down_after } = self;
        let (up_after, down_after) = (duration::write(*up_after), duration::write(*down_after));
        write!(f, "{min} to {max}, up at {up_at} % for {up_after}, down at {down_at} % for {down_after}")
    }
}

/// What there is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Numbered servers that are wanted.
    pub wanted: usize,
    /// Those that get connections, and those on their way there.
    pub ready: usize,
    pub starting: usize,
    /// What one of them holds at most.
    pub limit: u64,
    /// Connections that they have.
    pub connections: u64,
    /// Connections that wait, as far as more servers would help them.
    pub waiting: u64,
}

/// Since when something has been so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scaler {
    busy_since: Option<Instant>,
    idle_since: Option<Instant>,
}

/// So many servers are wanted, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub count: usize,
    pub why: String,
}

impl Scaler {
    /// To be asked about once a second.
    pub fn decide(&mut self, scale: &Scale, seen: &Seen, now: Instant) -> Option<Decision> {
        let places = seen.limit * seen.ready as u64;
        let without_one = places.saturating_sub(seen.limit);
        let is_busy = seen.waiting > 0 || percent(seen.connections, places) >= u64::from(scale.up_at);
        let is_idle = seen.waiting == 0 && percent(seen.connections, without_one) <= u64::from(scale.down_at);
        // What was decided last has to show its effect first.
        let settled = seen.starting == 0 && seen.ready > 0;
        let busy_for = lasts(&mut self.busy_since, is_busy && settled, now);
        let idle_for = lasts(&mut self.idle_since, is_idle && settled, now);
        if seen.wanted < scale.max
            && let Some(lasted) = busy_for.filter(|lasted| *lasted >= scale.up_after)
        {
            *self = Self::default();
            let needed = (seen.connections + seen.waiting) * 100;
            let needed = needed.div_ceil((seen.limit * u64::from(scale.up_at)).max(1));
            let needed = usize::try_from(needed).unwrap_or(scale.max);
            let count = needed.clamp(seen.wanted + 1, scale.max);
            let why = format!("{}, for {}", occupied(seen, places), span(lasted));
            return Some(Decision { count, why });
        }
        if seen.wanted > scale.min
            && let Some(lasted) = idle_for.filter(|lasted| *lasted >= scale.down_after)
        {
            *self = Self::default();
            let why = format!("{}, for {}", occupied(seen, places), span(lasted));
            return Some(Decision { count: seen.wanted - 1, why });
        }
        None
    }
}

/// Notes since when it is so, and says for how long.
fn lasts(since: &mut Option<Instant>, is_so: bool, now: Instant) -> Option<Duration> {
    match is_so {
        true => Some(now.saturating_duration_since(*since.get_or_insert(now))),
        false => {
            *since = None;
            None
        }
    }
}

/// Of nothing, all is taken.
fn percent(part: u64, of: u64) -> u64 {
    (part * 100).checked_div(of).unwrap_or(100)
}

fn occupied(seen: &Seen, places: u64) -> String {
    match seen.waiting {
        0 => format!("{} of {places} places are taken", seen.connections),
        1 => "1 connection waits".to_owned(),
        waiting => format!("{waiting} connections wait"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCALE: Scale = Scale {
        min: 2,
        max: 8,
        up_at: 80,
        up_after: Duration::from_secs(2),
        down_at: 40,
        down_after: Duration::from_secs(60),
    };

    const QUIET: Seen = Seen { wanted: 4, ready: 4, starting: 0, limit: 10, connections: 20, waiting: 0 };

    /// What is decided when things stay so for this long, looked at once a second.
    fn after(seconds: u64, seen: Seen) -> Option<usize> {
        let (mut scaler, start) = (Scaler::default(), Instant::now());
        for second in 0..seconds {
            assert_eq!(scaler.decide(&SCALE, &seen, start + Duration::from_secs(second)), None);
        }
        scaler.decide(&SCALE, &seen, start + Duration::from_secs(seconds)).map(|decision| decision.count)
    }

    #[test]
    fn more_when_they_are_busy_for_a_while_and_fewer_when_they_are_idle_for_a_longer_one() {
        for (what, seconds, seen, expected) in [
            ("between the two", 1_000, QUIET, None),
            ("nearly busy", 1_000, Seen { connections: 31, ..QUIET }, None),
            ("busy", 2, Seen { connections: 32, ..QUIET }, Some(5)),
            ("busy, too short", 1, Seen { connections: 32, ..QUIET }, None),
            ("one waits", 2, Seen { connections: 40, waiting: 1, ..QUIET }, Some(6)),
            ("many wait", 2, Seen { connections: 40, waiting: 500, ..QUIET }, Some(8)),
            ("they wait though there are places", 2, Seen { waiting: 1, ..QUIET }, Some(5)),
            (
                "there are as many as there may be",
                1_000,
                Seen { wanted: 8, ready: 8, connections: 80, ..QUIET },
                None,
            ),
            ("one is on its way", 1_000, Seen { ready: 3, starting: 1, connections: 30, ..QUIET }, None),
            ("none is ready", 1_000, Seen { ready: 0, connections: 0, waiting: 9, ..QUIET }, None),
            ("idle", 60, Seen { connections: 12, ..QUIET }, Some(3)),
            ("idle, too short", 59, Seen { connections: 12, ..QUIET }, None),
            ("not idle enough", 1_000, Seen { connections: 13, ..QUIET }, None),
            ("as few as there may be", 1_000, Seen { wanted: 2, ready: 2, connections: 0, ..QUIET }, None),
        ] {
            assert_eq!(after(seconds, seen), expected, "{what}");
        }
    }

    #[test]
    fn a_moment_of_the_contrary_begins_the_time_anew() {
        let (mut scaler, start) = (Scaler::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let idle = Seen { connections: 0, ..QUIET };
        assert_eq!(scaler.decide(&SCALE, &idle, at(0)), None);
        assert_eq!(scaler.decide(&SCALE, &QUIET, at(59)), None);
        assert_eq!(scaler.decide(&SCALE, &idle, at(60)), None);
        assert_eq!(scaler.decide(&SCALE, &idle, at(119)), None);
        let decision = scaler.decide(&SCALE, &idle, at(120)).unwrap();
        assert_eq!(decision, Decision { count: 3, why: "0 of 40 places are taken, for 1m00s".to_owned() });
        // And from there on.
        let idle = Seen { wanted: 3, ready: 3, ..idle };
        assert_eq!(scaler.decide(&SCALE, &idle, at(121)), None);
    }

    proptest! {
        /// With the same connections, what was decided is not taken back.
        #[test]
        fn what_was_decided_holds(all in 0u64..300, wanted in 2usize..=8, limit in 1u64..50) {
            let seen = |count: usize| {
                let places = limit * count as u64;
                let (connections, waiting) = (all.min(places), all.saturating_sub(places));
                Seen { wanted: count, ready: count, starting: 0, limit, connections, waiting }
            };
            let (mut scaler, start) = (Scaler::default(), Instant::now());
            let (mut count, mut rose) = (wanted, Vec::new());
            for second in 0..1_000 {
                let now = start + Duration::from_secs(second);
                if let Some(decision) = scaler.decide(&SCALE, &seen(count), now) {
                    prop_assert!((SCALE.min..=SCALE.max).contains(&decision.count));
                    rose.push(decision.count > count);
                    count = decision.count;
                }
            }
            prop_assert!(rose.windows(2).all(|pair| pair[0] == pair[1]), "{rose:?}");
        }
    }
}
