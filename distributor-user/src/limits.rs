//! What the kernel is told of the limits of a service and of its sources.
//!
//! Pure. Takes the configuration and what an operator has set since; gives the contract's `Limits`,
//! and what is kept in them for the next distributor. What the kernel does by them is in
//! distributor-ebpf's `program/limit.rs`.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv6Addr};

use distributor_ebpf::{
    contract::{self, BUCKETS_OF_SOURCES, EXEMPT, Exempt, Source, WAYS},
    rate,
    source::{self, LOCKED, MAPPED},
    word,
};

use crate::config::{self, Over, Prefix};

/// More reservations that expire at once are a flood, whatever the limit.
const SUSPECT: u32 = 1_024;
/// [`contract::Limits::asked`]: an operator has taken the limit away.
const NO_LIMIT: u32 = u32::MAX;

/// Of so many places, how many may be taken at the SYN. A flood of handshakes that are never completed gets
/// half of them; the others are for those who wait until their handshake is complete. Without a waiting list
/// there is no such other way.
pub fn reservable(limit: u32, capacity: u32) -> u32 {
    if capacity > 0 { limit.div_ceil(2) } else { limit }
}

/// From how many reservations on that expire at once they are a flood. 0: never.
pub fn suspect(limit: u32, capacity: u32) -> u32 {
    if capacity > 0 { limit.div_ceil(4).min(SUSPECT) } else { 0 }
}

/// The limits of a service, as they are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub config: config::Limits,
    /// What an operator has set since the start instead of the connections of the configuration.
    pub asked: Option<Option<u32>>,
    /// Connections that servers had before any were counted for the service, as far as they are open.
    pub earlier: u32,
    /// [`contract::Limits::seed`]
    seed: u64,
    /// Buckets of the table that are used: a power of two.
    buckets: u32,
}

impl Limits {
    /// Those of a configuration, with what an earlier distributor left in the plan in force. `seed` is
    /// random, and used if there is no table yet.
    pub fn new(config: config::Limits, left: &contract::Limits, seed: u64, buckets: u32) -> Self {
        let (seed, buckets) = match left.seed {
            0 => (seed.max(1), buckets),
            // Where its sources are in the table.
            before => (before, left.buckets + 1),
        };
        Self { config, asked: None, earlier: left.earlier, seed, buckets }
    }

    /// Goes on with what an operator has set.
    pub fn keep(&mut self, left: &contract::Limits) {
        self.asked = match left.asked {
            0 => None,
            NO_LIMIT => Some(None),
            limit => Some(Some(limit)),
        };
    }

    /// The connections that the service may have.
    pub fn connections(&self) -> Option<u32> {
        self.asked.unwrap_or(self.config.service.connections)
    }

    /// What becomes of who comes above the limit of the service, where so many may wait. An operator
    /// may have set one where there was none.
    fn waits(&self, capacity: u32) -> bool {
        self.config.over == Over::Wait && capacity > 0
    }

    /// What the kernel is told. `earlier` of adopted servers are counted nowhere.
    pub fn planned(&self, capacity: u32, earlier: u32) -> contract::Limits {
        let mut planned = contract::Limits {
            service: ceiling(self.connections(), self.config.service.rate),
            source: ceiling(self.config.source.connections, self.config.source.rate),
            seed: self.seed,
            buckets: self.buckets - 1,
            waits: u32::from(self.waits(capacity)),
            earlier: self.earlier + earlier,
            asked: match self.asked {
                None => 0,
                Some(None) => NO_LIMIT,
                Some(Some(limit)) => limit,
            },
            ..contract::Limits::NONE
        };
        planned.service.reservable = reservable(planned.service.connections, capacity);
        planned.suspect = suspect(planned.service.connections, capacity);
        if !self.config.source.is_none() {
            planned.bits_ipv4 = MAPPED + self.config.prefix_ipv4;
            planned.bits_ipv6 = self.config.prefix_ipv6;
            for (prefix, place) in self.config.exempt.iter().zip(&mut planned.exempt) {
                *place = exempt(prefix);
            }
            planned.exempt_count = self.config.exempt.len().min(EXEMPT) as u32;
        }
        planned
    }
}

/// Whether the kernel has anything to do by them.
pub fn are_set(limits: &contract::Limits) -> bool {
    limits.service.connections != 0 || limits.service.interval != 0 || limits.bits_ipv4 != 0
}

fn ceiling(connections: Option<u32>, rate: Option<config::Rate>) -> contract::Ceiling {
    let connections = connections.unwrap_or(0);
    let (interval, tolerance) = rate.map_or((0, 0), |rate| rate::of(rate.per_second, rate.burst));
    contract::Ceiling { connections, reservable: connections, interval, tolerance }
}

fn exempt(prefix: &Prefix) -> Exempt {
    let (ip, bits) = match prefix.ip {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), MAPPED + prefix.bits),
        IpAddr::V6(ip) => (ip, prefix.bits),
    };
    let (high, low) = halves(ip);
    let (high, low) = source::key(high, low, bits.into());
    Exempt { high, low, bits: bits.into() }
}

fn halves(ip: Ipv6Addr) -> (u64, u64) {
    ((ip.to_bits() >> 64) as u64, ip.to_bits() as u64)
}

/// What is in the table of sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Sources that have connections.
    pub sources: u64,
    /// The one that has most, and how many.
    pub most: Option<(String, u64)>,
}

/// What the table's places say.
pub fn known(places: impl IntoIterator<Item = Source>, limits: &contract::Limits) -> Known {
    let mut known = Known::default();
    let mut most: Option<Source> = None;
    let connections = |place: &Source| word::active(place.word);
    for place in places {
        if place.word == LOCKED || connections(&place) == 0 {
            continue;
        }
        known.sources += 1;
        if most.is_none_or(|most| connections(&most) < connections(&place)) {
            most = Some(place);
        }
    }
    known.most = most.map(|place| (shown(&place, limits), connections(&place)));
    known
}

/// A source as an operator reads it. One that is counted by another prefix than the present one is
/// shown by the present one.
fn shown(place: &Source, limits: &contract::Limits) -> String {
    let bits = if source::is_mapped(place.high, place.low) { limits.bits_ipv4 } else { limits.bits_ipv6 };
    let mask = u128::MAX.checked_shl(128 - bits.clamp(1, 128)).unwrap_or(u128::MAX);
    let ip = Ipv6Addr::from_bits((u128::from(place.high) << 64 | u128::from(place.low)) & mask);
    match ip.to_ipv4_mapped() {
        Some(ip) => format!("{ip}/{}", bits.saturating_sub(MAPPED)),
        None => format!("{ip}/{bits}"),
    }
}

/// Places in the table.
pub const PLACES: usize = BUCKETS_OF_SOURCES * WAYS;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Ceiling, Rate};

    fn limits(config: config::Limits) -> Limits {
        Limits::new(config, &contract::Limits::NONE, 7, BUCKETS_OF_SOURCES as u32)
    }

    fn of_service(connections: Option<u32>, over: Over) -> config::Limits {
        config::Limits { service: Ceiling { connections, rate: None }, over, ..config::Limits::NONE }
    }

    #[test]
    fn without_limits_the_kernel_has_nothing_to_do() {
        assert!(!are_set(&limits(config::Limits::NONE).planned(10, 0)));
    }

    #[test]
    fn each_limit_gives_it_something_to_do() {
        let rate = Some(Rate { per_second: 5, burst: 2 });
        let none = config::Limits::NONE;
        for config in [
            of_service(Some(1), Over::Refuse),
            config::Limits { service: Ceiling { connections: None, rate }, ..none.clone() },
            config::Limits { source: Ceiling { connections: Some(1), rate: None }, ..none.clone() },
            config::Limits { source: Ceiling { connections: None, rate }, ..none },
        ] {
            assert!(are_set(&limits(config).planned(0, 0)));
        }
    }

    #[test]
    fn half_of_the_places_can_be_reserved_where_there_is_another_way_in() {
        let limits = limits(of_service(Some(9), Over::Wait));
        for (capacity, reservable, suspect, waits) in [(0, 9, 0, 0), (5, 5, 3, 1)] {
            let planned = limits.planned(capacity, 0);
            let told = (planned.service.reservable, planned.suspect, planned.waits);
            assert_eq!(told, (reservable, suspect, waits), "capacity {capacity}");
        }
    }

    #[test]
    fn what_an_operator_sets_outlives_the_distributor_and_not_the_start() {
        let config = of_service(Some(9), Over::Refuse);
        for (asked, connections) in [(None, 9), (Some(Some(4)), 4), (Some(None), 0)] {
            let mut before = limits(config.clone());
            before.asked = asked;
            before.earlier = 3;
            let left = before.planned(0, 0);
            assert_eq!(left.service.connections, connections);
            let mut next = Limits::new(config.clone(), &left, 99, 1);
            assert_eq!(next.planned(0, 0).service.connections, 9);
            next.keep(&left);
            // The same place for each source, and the same connections that are not counted.
            assert_eq!(next.planned(0, 0), left);
        }
    }

    #[test]
    fn connections_of_before_an_adoption_take_places() {
        let mut limits = limits(of_service(Some(9), Over::Refuse));
        limits.earlier = 2;
        assert_eq!(limits.planned(0, 5).earlier, 7);
    }

    #[test]
    fn exempt_clients_are_recognised_by_the_kernels_own_rule() {
        let prefixes = ["10.0.0.0/8", "2001:db8::/32", "::1"].map(|text| text.parse().unwrap());
        let source = Ceiling { connections: Some(1), rate: None };
        let planned =
            limits(config::Limits { source, exempt: prefixes.into(), ..config::Limits::NONE }).planned(0, 0);
        assert_eq!(planned.exempt_count, 3);
        for (address, is_exempt) in [
            ("10.9.8.7", true),
            ("11.9.8.7", false),
            ("2001:db8:1::1", true),
            ("2001:db9::1", false),
            ("::1", true),
            ("::2", false),
        ] {
            let ip = match address.parse().unwrap() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            let (high, low) = halves(ip);
            let is = |exempt: &Exempt| source::key(high, low, exempt.bits) == (exempt.high, exempt.low);
            assert_eq!(planned.exempt[..3].iter().any(is), is_exempt, "{address}");
        }
    }

    #[test]
    fn the_source_with_most_connections_is_named() {
        let source = Ceiling { connections: Some(1), rate: None };
        let config = config::Limits { source, prefix_ipv4: 24, ..config::Limits::NONE };
        let planned = limits(config).planned(0, 0);
        let place = |ip: &str, bits: u64, connections: u64| {
            let ip: Ipv6Addr = ip.parse().unwrap();
            let (high, low) = halves(ip);
            let (high, low) = source::key(high, low, bits);
            Source { high, low, word: word::empty(5) + connections, due: 0 }
        };
        let v4 = place("::ffff:192.0.2.9", 96 + 24, 3);
        let v6 = place("2001:db8::1", 64, 2);
        let locked = Source { word: LOCKED, ..v6 };
        let all = |places: &[Source]| known(places.iter().copied(), &planned);
        assert_eq!(all(&[Source::default(), locked, place("::2", 64, 0)]), Known::default());
        assert_eq!(all(&[v6, v4]), Known { sources: 2, most: Some(("192.0.2.0/24".to_owned(), 3)) });
        assert_eq!(all(&[v6]), Known { sources: 1, most: Some(("2001:db8::/64".to_owned(), 2)) });
    }
}
