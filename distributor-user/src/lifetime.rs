//! How long an instance of a server may live: by its age, its connections and its memory.
//!
//! Pure. Whatever is over, the instance is replaced as in a restart, and is not cut off. Age and
//! connections are shortened by a part that differs from instance to instance, so that servers which began
//! together are not replaced together; it is made of the instance's name, so that every distributor comes
//! to the same.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bytesize::ByteSize;

use crate::{config::duration, plan, server::Instance};

/// Jitter is counted in thousandths.
pub const WHOLE: u32 = 1_000;

/// What the configuration says of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    pub max_age: Option<Duration>,
    /// In total, over its whole life.
    pub max_connections: Option<u32>,
    /// In bytes.
    pub memory_limit: Option<u64>,
    /// By up to so many thousandths age and connections are shortened.
    pub jitter: u32,
}

/// What holds for one instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub max_age: Option<Duration>,
    pub max_connections: Option<u64>,
    pub memory_limit: Option<u64>,
}

/// What an instance has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub started: Instant,
    pub connections: u64,
    /// In bytes. `None`: not known.
    pub memory: Option<u64>,
}

impl Lifetime {
    /// The bounds of one instance.
    pub fn of(&self, server: &str, instance: Instance) -> Bounds {
        let drawn = plan::hash(format!("{server}@{instance}").as_bytes()) % u64::from(WHOLE + 1);
        // Of a million.
        let left = 1_000_000 - u64::from(self.jitter.min(WHOLE)) * drawn;
        let part = |whole: u128| u64::try_from(whole * u128::from(left) / 1_000_000).unwrap_or(u64::MAX);
        Bounds {
            max_age: self.max_age.map(|age| Duration::from_millis(part(age.as_millis()))),
            max_connections: self.max_connections.map(|most| part(u128::from(most)).max(1)),
            memory_limit: self.memory_limit,
        }
    }
}

impl Bounds {
    /// Why an instance is to be replaced. `None`: it may live on.
    pub fn over(&self, life: &Life, now: Instant) -> Option<String> {
        let age = now.saturating_duration_since(life.started);
        if let Some(max_age) = self.max_age.filter(|max_age| age >= *max_age) {
            return Some(format!("has reached its age of {}", whole_seconds(max_age)));
        }
        if let Some(most) = self.max_connections.filter(|most| life.connections >= *most) {
            return Some(format!("has had {} connections of {most}", life.connections));
        }
        let (memory, limit) = (life.memory?, self.memory_limit?);
        let over = memory.checked_sub(limit).filter(|over| *over > 0)?;
        Some(format!("holds {}, {} above its memory_limit of {}", size(memory), size(over), size(limit)))
    }

    /// When an instance reaches its age.
    pub fn until(&self, started: Instant) -> Option<Instant> {
        started.checked_add(self.max_age?)
    }
}

/// Bytes as people read them: `2.0 GiB`.
pub fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

fn whole_seconds(length: Duration) -> String {
    match length.as_secs() {
        0 => duration::write(length),
        seconds => duration::write(Duration::from_secs(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    const GIB: u64 = 1 << 30;

    #[test]
    fn what_is_over_is_said() {
        let now = Instant::now() + 3 * HOUR;
        let none = Bounds { max_age: None, max_connections: None, memory_limit: None };
        let by_age = Bounds { max_age: Some(HOUR), ..none };
        let by_connections = Bounds { max_connections: Some(500), ..none };
        let by_memory = Bounds { memory_limit: Some(2 * GIB), ..none };
        let life = Life { started: now - HOUR, connections: 500, memory: Some(3 * GIB) };
        for (row, bounds, life, expected) in [
            ("no bound", none, life, None),
            ("old", by_age, life, Some("has reached its age of 1h")),
            ("not so old", by_age, Life { started: now - HOUR / 2, ..life }, None),
            ("busy", by_connections, life, Some("has had 500 connections of 500")),
            ("not so busy", by_connections, Life { connections: 499, ..life }, None),
            ("fat", by_memory, life, Some("holds 3.0 GiB, 1.0 GiB above its memory_limit of 2.0 GiB")),
            ("full", by_memory, Life { memory: Some(2 * GIB), ..life }, None),
            ("unknown", by_memory, Life { memory: None, ..life }, None),
            (
                "old and fat",
                Bounds { max_age: Some(HOUR), ..by_memory },
                life,
                Some("has reached its age of 1h"),
            ),
        ] {
            assert_eq!(bounds.over(&life, now).as_deref(), expected, "{row}");
        }
        assert_eq!(by_age.until(life.started), Some(now));
        assert_eq!(by_memory.until(life.started), None);
    }

    #[test]
    fn instances_that_began_together_end_apart_and_always_the_same() {
        let lifetime =
            Lifetime { max_age: Some(HOUR), max_connections: Some(1_000), memory_limit: None, jitter: 100 };
        let of = |instance| lifetime.of("shop/1", Instance(instance));
        let ages: Vec<Duration> = (0..100).filter_map(|instance| of(instance).max_age).collect();
        let (least, most) = (ages.iter().min().unwrap(), ages.iter().max().unwrap());
        assert!(*least >= HOUR * 9 / 10 && *most <= HOUR, "{least:?} {most:?}");
        assert!(*most - *least > HOUR / 20, "they are spread: {least:?} {most:?}");
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), lifetime.of("shop/2", Instance(7)));
        let exact = Lifetime { jitter: 0, ..lifetime }.of("shop/1", Instance(7));
        assert_eq!((exact.max_age, exact.max_connections), (Some(HOUR), Some(1_000)));
    }

    proptest! {
        #[test]
        fn bounds_are_never_longer_nor_nothing(
            seconds in 1..1_000_000_u64, most in 1..u32::MAX, jitter in 0..=WHOLE, instance in any::<u32>(),
        ) {
            let max_age = Duration::from_secs(seconds);
            let lifetime =
                Lifetime { max_age: Some(max_age), max_connections: Some(most), memory_limit: None, jitter };
            let bounds = lifetime.of("shop/1", Instance(instance));
            prop_assert!(bounds.max_age.unwrap() <= max_age);
            let least = u64::from(most) * u64::from(WHOLE - jitter) / u64::from(WHOLE);
            prop_assert!((least.max(1)..=u64::from(most)).contains(&bounds.max_connections.unwrap()));
        }
    }
}
