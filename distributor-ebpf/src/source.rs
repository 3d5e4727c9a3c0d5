//! Which source a client belongs to, and where that stands in the table of sources.
//!
//! A source is all clients whose addresses begin with the same bits. IPv4 addresses are those of IPv6
//! that are mapped to them (::ffff:192.0.2.1), so that a client is the same on every address of the
//! service, and an IPv4 prefix of 32 bits is one of 128.
//!
//! The table is an array of buckets, each with [`WAYS`] places, and a source has its place in one
//! bucket. Nobody frees a place: one whose source has no connection, no reservation and all its
//! tokens is *idle*, and the next source that needs one takes it over. Whoever does sets its word to
//! [`LOCKED`] first. He takes none that was touched in the present epoch, so that a word which was
//! read before never comes back afterwards: a compare-and-swap on it fails for whoever meant the
//! source before.
#![forbid(unsafe_code)]

use crate::{
    bit::{below, either, negative},
    contract::{BUCKETS_OF_SOURCES, Source, WAYS},
    select::mix,
    word,
};

/// The word of a place that is being taken over. No source has it: its active count would be at its
/// end, which is above every limit.
pub const LOCKED: u64 = u64::MAX;

/// No place of the bucket.
pub const NOWHERE: u64 = WAYS as u64;

/// Bits of an address before those of an IPv4 address that is mapped.
pub const MAPPED: u32 = 96;

/// The two halves of an address, from its words in network byte order.
#[inline(always)]
pub const fn halves([a, b, c, d]: [u32; 4]) -> (u64, u64) {
    let half = (u32::from_be(a) as u64) << 32 | u32::from_be(b) as u64;
    (half, (u32::from_be(c) as u64) << 32 | u32::from_be(d) as u64)
}

/// The halves of an IPv4 address, from its word in network byte order.
#[inline(always)]
pub const fn mapped(ip: u32) -> (u64, u64) {
    (0, 0xffff << 32 | u32::from_be(ip) as u64)
}

/// Whether it is an IPv4 address.
#[inline(always)]
pub const fn is_mapped(high: u64, low: u64) -> bool {
    high == 0 && low >> 32 == 0xffff
}

/// The source of an address: its first `bits`, 1 to 128. Never two zeros, which is a place that was
/// never used: where it is shorter than an address, its last bit is set.
#[inline(always)]
pub const fn key(high: u64, low: u64, bits: u64) -> (u64, u64) {
    if bits > 64 {
        let low = low & (u64::MAX << ((128 - bits) & 63));
        return (high, if bits < 128 { low | 1 } else { low });
    }
    (high & (u64::MAX << ((64 - bits) & 63)), 1)
}

/// The bucket of a source. The seed is secret, so that nobody can choose addresses which share one.
#[inline(always)]
pub const fn bucket((high, low): (u64, u64), seed: u64) -> u64 {
    mix(mix(high ^ seed) ^ low) & (BUCKETS_OF_SOURCES as u64 - 1)
}

/// Whether this place may be taken over in the epoch `now`, at `time` (nanoseconds).
#[inline(always)]
pub fn is_free(place: &Source, now: u64, time: u64) -> bool {
    free(place, now, time) != 0
}

#[inline(always)]
fn free(place: &Source, now: u64, time: u64) -> u64 {
    let unused = 1 ^ some(place.high | place.low);
    let open = some(place.word ^ LOCKED);
    let idle = (1 ^ some(word::used(word::roll(place.word, now))))
        & word::is_past(place.word, now)
        & below(place.due, time);
    open & (unused | idle)
}

/// 1 if the number is not 0.
#[inline(always)]
fn some(number: u64) -> u64 {
    negative(number | number.wrapping_neg())
}

/// Where a source is in its bucket, or [`NOWHERE`]; and how many of the places are locked.
///
/// Without branches, after which the verifier would go on once for each place. And two passes, this and
/// [`vacant`], and not one that does all: with one, the stack of the kernel programs was not deep enough.
#[inline(always)]
pub fn find(places: impl Fn(usize) -> Source, key: (u64, u64)) -> (u64, u64) {
    let (mut found, mut locked) = (NOWHERE, 0);
    for way in 0..WAYS {
        let place = places(way);
        let open = some(place.word ^ LOCKED);
        let same = open & (1 ^ some((place.high ^ key.0) | (place.low ^ key.1)));
        locked += 1 ^ open;
        found = either(same, way as u64, found);
    }
    (found, locked)
}

/// The first place that may be taken over, or [`NOWHERE`].
#[inline(always)]
pub fn vacant(places: impl Fn(usize) -> Source, now: u64, time: u64) -> u64 {
    let mut vacant = NOWHERE;
    for way in 0..WAYS {
        let first = free(&places(way), now, time) & below(NOWHERE - 1, vacant);
        vacant = either(first, way as u64, vacant);
    }
    vacant
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;
    use proptest::prelude::*;

    fn of(address: &str) -> (u64, u64) {
        let ip = match address.parse::<IpAddr>().unwrap() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let bits = u128::from(ip);
        ((bits >> 64) as u64, bits as u64)
    }

    fn source(address: &str, bits: u64) -> (u64, u64) {
        let (high, low) = of(address);
        key(high, low, bits)
    }

    #[test]
    fn addresses_share_a_source_as_their_prefix_says() {
        for (one, other, bits, same) in [
            ("192.0.2.1", "192.0.2.1", 128, true),
            ("192.0.2.1", "192.0.2.2", 128, false),
            ("192.0.2.1", "192.0.2.254", 96 + 24, true),
            ("192.0.2.1", "192.0.3.1", 96 + 24, false),
            ("192.0.2.1", "193.0.2.1", 96 + 1, true),
            ("192.0.2.1", "92.0.2.1", 96 + 1, false),
            ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", 64, true),
            ("2001:db8::1", "2001:db8:0:1::1", 64, false),
            ("2001:db8::1", "2001:db8:0:ffff::1", 48, true),
            ("2001:db8::1", "2001:db8:1::1", 48, false),
            ("2001:db8::1", "2001:db8::2", 128, false),
            ("2001:db8::1", "2001:db8::2", 65, true),
            ("2001:db8::1", "2001:db8::8000:0:0:1", 65, false),
            ("8000::1", "ffff::1", 1, true),
            ("8000::1", "1::1", 1, false),
            ("::1", "::2", 64, true),
        ] {
            assert_eq!(source(one, bits) == source(other, bits), same, "{one} {other} /{bits}");
        }
    }

    #[test]
    fn no_source_looks_like_a_place_that_was_never_used() {
        for bits in 1..=128 {
            assert_ne!(source("::", bits.min(127)), (0, 0), "/{bits}");
            assert_ne!(source("0.0.0.0", bits), (0, 0), "/{bits}");
        }
    }

    #[test]
    fn ipv4_addresses_are_mapped_whichever_way_they_come() {
        let ip: std::net::Ipv4Addr = "192.0.2.7".parse().unwrap();
        let v6: Ipv6Addr = ip.to_ipv6_mapped();
        let words: Vec<u32> =
            v6.octets().chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(mapped(u32::from_ne_bytes(ip.octets())), of("192.0.2.7"));
        assert_eq!(halves(words.try_into().unwrap()), of("192.0.2.7"));
        assert!(is_mapped(0, of("192.0.2.7").1) && !is_mapped(of("2001:db8::1").0, of("2001:db8::1").1));
    }

    const TIME: u64 = 100 << 30;

    fn now() -> u64 {
        word::epoch(TIME)
    }

    fn place(key: (u64, u64), word: u64) -> Source {
        Source { high: key.0, low: key.1, word, due: 0 }
    }

    /// Where it is, how many before it are locked, and the first free place.
    fn look(places: &[Source], key: (u64, u64)) -> (u64, u64, u64) {
        let place = |way: usize| places.get(way).copied().unwrap_or(place((9, 9), 1));
        let (way, locked) = find(place, key);
        (way, locked, vacant(place, now(), TIME))
    }

    #[test]
    fn a_place_is_taken_over_only_if_its_source_has_nothing_left() {
        let before = word::empty(now() - 1);
        for (what, place, is_free_) in [
            ("never used", Source::default(), true),
            ("idle for an epoch", place((1, 1), before), true),
            ("touched in this epoch", place((1, 1), word::empty(now())), false),
            ("has a connection", place((1, 1), before + 1), false),
            (
                "has a reservation",
                place((1, 1), word::take(before, now() - 1, word::Place::Reserved, 9, 9).unwrap()),
                false,
            ),
            (
                "had one that is too old",
                place(
                    (1, 1),
                    word::take(word::empty(now() - 3), now() - 3, word::Place::Reserved, 9, 9).unwrap(),
                ),
                true,
            ),
            ("has not all its tokens", Source { due: TIME + 1, ..place((1, 1), before) }, false),
            ("is being taken over", place((1, 1), LOCKED), false),
            ("is being taken over for the first time", place((0, 0), LOCKED), false),
        ] {
            assert_eq!(is_free(&place, now(), TIME), is_free_, "{what}");
        }
    }

    #[test]
    fn a_source_is_found_and_else_the_first_free_place() {
        let idle = word::empty(now() - 1);
        let places = [
            place((1, 1), 1),
            place((2, 1), LOCKED),
            place((3, 1), idle),
            place((4, 1), 1),
            Source::default(),
        ];
        assert_eq!(look(&places, (1, 1)), (0, 1, 2));
        assert_eq!(look(&places, (4, 1)), (3, 1, 2));
        assert_eq!(look(&places, (3, 1)), (2, 1, 2));
        // It may be this one or another one that comes there.
        assert_eq!(look(&places, (2, 1)), (NOWHERE, 1, 2));
        assert_eq!(look(&places, (5, 1)), (NOWHERE, 1, 2));
        assert_eq!(look(&[], (5, 1)), (NOWHERE, 0, NOWHERE));
    }

    proptest! {
        /// However they are chosen by who does not know the seed, sources spread over the buckets.
        #[test]
        fn sources_in_a_row_spread_over_the_buckets(seed: u64, first: u32) {
            let mut sizes = vec![0usize; BUCKETS_OF_SOURCES];
            for number in 0..BUCKETS_OF_SOURCES as u32 {
                let (high, low) = mapped(first.wrapping_add(number).to_be());
                sizes[bucket(key(high, low, 128), seed) as usize] += 1;
            }
            // One on average; more than 16 have a probability of 10^-15 each.
            prop_assert!(sizes.iter().all(|&size| size <= WAYS));
        }
    }
}
