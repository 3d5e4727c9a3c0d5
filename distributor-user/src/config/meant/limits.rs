//! The limits of a service and of its sources: from what is written to what is meant.
#![forbid(unsafe_code)]

use distributor_ebpf::contract::{CAPACITY_MAX, EXEMPT, LIMIT_MAX, RATE_MAX};

use super::{CAPACITY, Reading};
use crate::config::{
    limits::{Ceiling, Limits, Over, Prefix, Rate},
    written::{self, Field, List},
};

impl Reading<'_> {
    pub(super) fn service_limits(&self, written: &written::Limits, waiting: &written::Waiting) -> Limits {
        let service = self.ceiling(&written.service);
        let source = self.ceiling(&written.source);
        let over = self.choice(&written.over, &Over::ALL, Over::name, Over::Refuse);
        if let Some(given) = written.over.given() {
            let typed = &given.value;
            // If the capacity is refused, nothing is said of it here.
            let capacity = waiting.capacity.given().map_or(i64::from(CAPACITY), |given| given.value);
            if over == Over::Wait && service.is_none() {
                self.refuse(
                    &given.place,
                    format!("{typed:?} is for who comes above a limit, and there is none: write connections or rate"),
                );
            } else if over == Over::Wait && capacity == 0 {
                self.refuse(
                    &given.place,
                    format!("{typed:?} needs a waiting list, and its capacity is 0: write 1 to {CAPACITY_MAX} there, or \"refuse\" here"),
                );
            }
        }
        if source.is_none()
            && let Some(given) = first(written)
        {
            let sentence =
                format!("{} says nothing without a limit, write connections or rate as well", given.value);
            self.refuse(&given.place, sentence);
        }
        Limits {
            service,
            over,
            source,
            prefix_ipv4: self.number(&written.prefix_ipv4, 1..=32, Limits::NONE.prefix_ipv4),
            prefix_ipv6: self.number(&written.prefix_ipv6, 1..=128, Limits::NONE.prefix_ipv6),
            exempt: self.prefixes(&written.exempt),
        }
    }

    fn ceiling(&self, written: &written::Ceiling) -> Ceiling {
        let number =
            |field: &Field<i64>, most: u32| field.given().map(|_| self.number(field, 1..=most, most));
        let rate = number(&written.rate, RATE_MAX);
        let burst = number(&written.burst, RATE_MAX);
        if let (Field::Absent, Some(given)) = (&written.rate, written.burst.given()) {
            self.refuse(&given.place, format!("{} is set without a rate, write rate as well", given.value));
        }
        Ceiling {
            connections: number(&written.connections, LIMIT_MAX),
            // A second's worth, unless it says so.
            rate: rate.map(|per_second| Rate { per_second, burst: burst.unwrap_or(per_second) }),
        }
    }

    fn prefixes(&self, list: &List<String>) -> Vec<Prefix> {
        let Some(given) = list.given() else { return Vec::new() };
        if given.value.len() > EXEMPT {
            let sentence = format!("{} prefixes are too many, write {EXEMPT} at most", given.value.len());
            self.refuse(&given.place, sentence);
        }
        let read = |given: &written::Given<String>| {
            given.value.parse().map_err(|sentence: String| self.refuse(&given.place, sentence)).ok()
        };
        given.value.iter().filter_map(read).collect()
    }
}

/// The first thing that is written of sources besides their limits, and that is not what it would be
/// anyway: where, and what.
fn first(written: &written::Limits) -> Option<written::Given<String>> {
    let number = |field: &Field<i64>, default: u32| {
        let given = field.given().filter(|given| given.value != i64::from(default))?;
        Some(written::Given { place: given.place.clone(), value: given.value.to_string() })
    };
    let list = written.exempt.given().filter(|given| !given.value.is_empty()).map(|given| {
        let texts: Vec<&str> = given.value.iter().map(|given| given.value.as_str()).collect();
        written::Given { place: given.place.clone(), value: format!("{texts:?}") }
    });
    number(&written.prefix_ipv4, Limits::NONE.prefix_ipv4)
        .or_else(|| number(&written.prefix_ipv6, Limits::NONE.prefix_ipv6))
        .or(list)
}
