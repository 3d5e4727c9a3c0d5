//! Which slot serves this connection.
//!
//! Pure, `no_std`: the kernel program and the host tests run the same code. No maps here; the
//! caller reads them and passes what it read. The loop over the slots is bounded by `SLOTS`
//! and its body has no branch: with one, the verifier follows two paths per slot and refuses
//! the program ("BPF program is too large. Processed 1000001 insn").
#![forbid(unsafe_code)]

use crate::{
    bit::{below, differ, either, masked, negative, when},
    contract::{BUCKETS, GROUPS, Plan, Policy, Run, SLOTS, TURN},
    word::{self, Place},
};

/// Slots that were tried for this connection and failed. More are not tried.
pub const TRIES: usize = 4;
/// Servers of the hash table that are asked before all are.
pub const PROBES: u32 = 8;
/// Marks an unused entry in a list of excluded slots, and an empty bucket.
pub const NO_SLOT: u32 = u16::MAX as u32;

/// A slot, and its word as it was when it was chosen. Taking a place in it succeeds only if
/// nobody changed the word since; otherwise the choice is out of date and is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub slot: u32,
    pub seen: u64,
}

/// What a choice depends on beside the plan.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The present epoch (`word::epoch`).
    pub now: u64,
    /// Which kind of place the connection will take.
    pub place: Place,
    /// Slots that failed before.
    pub excluded: [u32; TRIES],
}

/// The best slot among all that have a place, by the plan's policy.
///
/// least-connections: the smallest used / weight, compared by cross-multiplication. Equal ones
/// take turns by weight, and so do all servers under weighted-round-robin: `turn` is a server's
/// place on a common clock, its next connection is due there, and each connection moves it by
/// `TURN` / weight (start-time fair queueing, Goyal, Vin and Cheng, SIGCOMM 1996). A server
/// that was busy or away does not catch up: see [`next_turn`].
/// power-of-two and source-hash come here when their own candidates are full, and then choose
/// like least-connections.
#[inline(always)]
pub fn best(
    plan: &Plan,
    words: impl Fn(usize) -> u64,
    turns: impl Fn(usize) -> u64,
    arrival: &Arrival,
) -> Option<Choice> {
    let in_order = when(plan.policy == Policy::First as u32);
    let by_turn = when(plan.policy == Policy::WeightedRoundRobin as u32);
    let active = when(matches!(arrival.place, Place::Active));
    let [a, b, c, d] = arrival.excluded;

    // Worse than every server: used < 2^21 and rank < 2^8, both far below 2^40.
    let (mut load, mut weight, mut turn) = (1u64 << 40, 1u64, 0u64);
    let (mut slot, mut seen) = (u64::from(NO_SLOT), 0u64);
    for index in 0..SLOTS {
        if index as u32 >= plan.count {
            break;
        }
        let server = &plan.servers[index];
        let its_word = words(index);
        let its_turn = turns(index);
        let rolled = word::roll(its_word, arrival.now);
        let used = word::used(rolled);
        let number = index as u64;
        let allowed = below(used, u64::from(server.limit))
            & (active | below(word::reserved(rolled), u64::from(server.reservable)))
            & differ(number, u64::from(a))
            & differ(number, u64::from(b))
            & differ(number, u64::from(c))
            & differ(number, u64::from(d));
        let its_load = either(in_order, u64::from(server.rank), either(by_turn, 0, used));
        let its_weight = either(in_order | by_turn, 1, u64::from(server.weight));
        let mine = its_load.wrapping_mul(weight);
        let other = load.wrapping_mul(its_weight);
        let less = below(mine, other);
        let equal = 1 ^ (less | below(other, mine));
        let better = allowed & (less | (equal & earlier(its_turn, turn)));
        load = either(better, its_load, load);
        weight = either(better, its_weight, weight);
        turn = either(better, its_turn, turn);
        slot = either(better, number, slot);
        seen = either(better, its_word, seen);
    }
    (slot != u64::from(NO_SLOT)).then_some(Choice { slot: slot as u32, seen })
}

/// One given slot, if it has a place.
#[inline(always)]
pub fn this(plan: &Plan, slot: u32, seen: u64, arrival: &Arrival) -> Option<Choice> {
    let server = &plan.servers[slot as usize & (SLOTS - 1)];
    let fits =
        word::take(seen, arrival.now, arrival.place, u64::from(server.limit), u64::from(server.reservable))
            .is_some();
    (fits && !arrival.excluded.contains(&slot)).then_some(Choice { slot, seen })
}

/// The less loaded of two choices; the first one if they are equal.
#[inline(always)]
pub fn less_loaded(plan: &Plan, one: Choice, other: Choice, now: u64) -> Choice {
    let load = |choice: Choice| word::used(word::roll(choice.seen, now));
    let weight = |choice: Choice| u64::from(plan.servers[choice.slot as usize & (SLOTS - 1)].weight);
    if load(other) * weight(one) < load(one) * weight(other) { other } else { one }
}

/// Two different entries of `0..eligible` from one random number; the same one twice if there
/// is only one. `eligible` is at least 1.
#[inline(always)]
pub fn two_of(eligible: u32, random: u32) -> (u32, u32) {
    if eligible < 2 {
        return (0, 0);
    }
    let one = (random & 0xffff) % eligible;
    let step = 1 + (random >> 16) % (eligible - 1);
    (one, (one + step) % eligible)
}

/// The bucket of a client's address, for the given probe. IPv4 clients stand in `[ip, 0, 0, 0]`.
#[inline(always)]
pub fn bucket(source: [u32; 4], probe: u32) -> usize {
    let mut hash = u64::from(probe).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = mix(hash ^ (u64::from(source[0]) << 32 | u64::from(source[1])));
    hash = mix(hash ^ (u64::from(source[2]) << 32 | u64::from(source[3])));
    hash as usize & (BUCKETS - 1)
}

/// A slot's listeners in a group.
#[inline(always)]
pub fn run(plan: &Plan, group: usize, slot: usize) -> Run {
    const LAST: usize = GROUPS * SLOTS - 1;
    // The second mask is for the bounds check, which the optimizer can leave out by it.
    plan.runs[masked((group * SLOTS + slot) as u64, LAST as u64) as usize & LAST]
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit moves
/// every output bit.
#[inline(always)]
pub const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Where a chosen slot stands after its connection, and how it gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextTurn {
    /// Add the stride to its turn (atomically: two CPUs may choose it at the same time).
    Add(u64),
    /// It lags behind the clock: put it here.
    Set(u64),
}

/// The turn after the present one. A slot that lags behind the clock (it is new, or was full
/// or away) goes on from the clock instead of catching up with a burst.
#[inline(always)]
pub fn next_turn(turn: u64, clock: u64, stride: u64) -> NextTurn {
    if earlier(turn, clock) != 0 { NextTurn::Set(clock.wrapping_add(stride)) } else { NextTurn::Add(stride) }
}

/// 1 if `a` is before `b` on the clock of turns, which may wrap.
#[inline(always)]
pub fn earlier(a: u64, b: u64) -> u64 {
    negative(a.wrapping_sub(b))
}

/// The stride of a weight.
pub const fn stride(weight: u32) -> u64 {
    TURN / weight as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{LIMIT_MAX, Load, Server, WEIGHT_MAX};
    use proptest::prelude::*;

    /// The kernel program's steps without the kernel: choose, take, move the turn.
    struct Host {
        plan: Box<Plan>,
        load: Box<Load>,
        held: Vec<u64>,
    }

    impl Host {
        fn new(policy: Policy, servers: &[(u32, u32)]) -> Self {
            let mut plan = Box::new(Plan::EMPTY);
            plan.policy = policy as u32;
            plan.count = servers.len() as u32;
            for (slot, &(weight, limit)) in servers.iter().enumerate() {
                plan.servers[slot] = Server {
                    limit,
                    weight,
                    rank: slot as u32,
                    reservable: limit,
                    stride: stride(weight),
                    generation: 0,
                    suspect: 0,
                };
            }
            Self { plan, load: Box::new(Load::ZERO), held: vec![0; servers.len()] }
        }

        fn arrival() -> Arrival {
            Arrival { now: 1, place: Place::Active, excluded: [NO_SLOT; TRIES] }
        }

        fn best(&self, arrival: &Arrival) -> Option<Choice> {
            best(&self.plan, |slot| self.load.word[slot], |slot| self.load.turn[slot], arrival)
        }

        fn connect(&mut self) -> Option<usize> {
            let choice = self.best(&Self::arrival())?;
            let slot = choice.slot as usize;
            let server = self.plan.servers[slot];
            self.load.word[slot] =
                word::take(choice.seen, 1, Place::Active, server.limit.into(), server.reservable.into())
                    .expect("a chosen slot has a place");
            let turn = self.load.turn[slot];
            let next = next_turn(turn, self.load.clock, server.stride);
            if earlier(self.load.clock, turn) != 0 {
                self.load.clock = turn;
            }
            self.load.turn[slot] = match next {
                NextTurn::Add(stride) => turn + stride,
                NextTurn::Set(turn) => turn,
            };
            self.held[slot] += 1;
            Some(slot)
        }

        fn disconnect(&mut self, slot: usize) {
            self.load.word[slot] = word::close(self.load.word[slot], 1);
            self.held[slot] -= 1;
        }
    }

    fn unlimited(weights: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        weights.into_iter().map(|weight| (weight, LIMIT_MAX)).collect()
    }

    #[test]
    fn held_connections_are_shared_by_weight_within_one() {
        let mut host = Host::new(Policy::LeastConnections, &unlimited(1..=7));
        for _ in 0..1000 {
            host.connect().unwrap();
        }
        for (slot, &held) in host.held.iter().enumerate() {
            let share = 1000.0 * (slot + 1) as f64 / 28.0;
            assert!((held as f64 - share).abs() <= 1.0, "slot {slot} holds {held}, its share is {share}");
        }
    }

    #[test]
    fn idle_equals_take_turns_by_weight() {
        for policy in [Policy::LeastConnections, Policy::WeightedRoundRobin] {
            let mut host = Host::new(policy, &unlimited([1, 2, 3]));
            let mut served = [0; 3];
            for _ in 0..600 {
                let slot = host.connect().unwrap();
                host.disconnect(slot);
                served[slot] += 1;
            }
            for (slot, share) in [100i32, 200, 300].into_iter().enumerate() {
                assert!((served[slot] - share).abs() <= 1, "{policy:?}: {served:?}");
            }
        }
    }

    #[test]
    fn equal_servers_alternate_one_by_one() {
        let mut host = Host::new(Policy::LeastConnections, &unlimited([100; 4]));
        let order: Vec<usize> = (0..8)
            .map(|_| {
                let slot = host.connect().unwrap();
                host.disconnect(slot);
                slot
            })
            .collect();
        assert_eq!(order, [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn a_new_server_does_not_catch_up_with_a_burst() {
        let mut host = Host::new(Policy::WeightedRoundRobin, &unlimited([1; 3]));
        host.plan.servers[2].limit = 0;
        for _ in 0..1000 {
            host.connect().unwrap();
        }
        host.plan.servers[2].limit = LIMIT_MAX;
        let next: Vec<usize> = (0..6).map(|_| host.connect().unwrap()).collect();
        assert_eq!(next.iter().filter(|&&slot| slot == 2).count(), 2, "{next:?}");
    }

    #[test]
    fn round_robin_ignores_what_servers_hold() {
        let mut host = Host::new(Policy::WeightedRoundRobin, &unlimited([1, 1]));
        host.load.word[0] = 500;
        for _ in 0..100 {
            host.connect().unwrap();
        }
        assert_eq!(host.held, [50, 50]);
    }

    #[test]
    fn first_fills_up_in_order() {
        let mut host = Host::new(Policy::First, &[(1, 2), (1, 3), (1, 1)]);
        host.plan.servers[0].rank = 2;
        host.plan.servers[2].rank = 0;
        let order: Vec<_> = (0..7).map(|_| host.connect()).collect();
        assert_eq!(order, [Some(2), Some(1), Some(1), Some(1), Some(0), Some(0), None]);
    }

    #[test]
    fn full_and_excluded_servers_are_passed_over() {
        let mut host = Host::new(Policy::LeastConnections, &[(1, 1), (1, 9), (1, 9)]);
        host.load.word[0] = 1;
        let arrival = Arrival { excluded: [1, NO_SLOT, NO_SLOT, NO_SLOT], ..Host::arrival() };
        assert_eq!(host.best(&arrival).unwrap().slot, 2);
        let arrival = Arrival { excluded: [1, 2, NO_SLOT, NO_SLOT], ..Host::arrival() };
        assert_eq!(host.best(&arrival), None);
    }

    #[test]
    fn a_server_with_all_reservations_taken_still_takes_a_handed_over_connection() {
        let mut host = Host::new(Policy::LeastConnections, &[(1, 9)]);
        host.plan.servers[0].reservable = 1;
        host.load.word[0] = word::take(0, 1, Place::Reserved, 9, 1).unwrap();
        let arrival = Arrival { place: Place::Reserved, ..Host::arrival() };
        assert_eq!(host.best(&arrival), None);
        assert_eq!(host.best(&Host::arrival()).unwrap().slot, 0);
    }

    #[test]
    fn clients_spread_over_the_buckets() {
        let mut hits = vec![0u32; BUCKETS];
        for client in 0..BUCKETS as u32 * 16 {
            hits[bucket([client.to_be(), 0, 0, 0], 0)] += 1;
        }
        // 16 on average; a Poisson count beyond 48 has a probability below 1e-9.
        assert!(hits.iter().all(|&hits| hits < 48), "{:?}", hits.iter().max());
        assert!(hits.iter().filter(|&&hits| hits == 0).count() == 0);
    }

    proptest! {
        #[test]
        fn no_server_is_above_its_share_by_more_than_one(
            weights in prop::collection::vec(1u32..=WEIGHT_MAX, 1..20), connections in 1u64..500,
        ) {
            let sum: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let mut host = Host::new(Policy::LeastConnections, &unlimited(weights.clone()));
            for _ in 0..connections { host.connect().unwrap(); }
            for (slot, &held) in host.held.iter().enumerate() {
                let share = connections as f64 * f64::from(weights[slot]) / sum as f64;
                prop_assert!((held as f64) < share + 1.0, "slot {} holds {} of {}", slot, held, share);
            }
        }

        #[test]
        fn least_connections_agrees_with_a_plain_search(
            servers in prop::collection::vec((1u32..=WEIGHT_MAX, 0u32..200, 0u64..200, 0u64..5), 0..SLOTS),
        ) {
            let weights: Vec<_> = servers.iter().map(|&(weight, limit, ..)| (weight, limit)).collect();
            let mut host = Host::new(Policy::LeastConnections, &weights);
            for (slot, &(.., active, turn)) in servers.iter().enumerate() {
                host.load.word[slot] = active;
                host.load.turn[slot] = turn;
            }
            let expected = servers.iter().enumerate()
                .filter(|(_, (_, limit, active, _))| *active < u64::from(*limit))
                .min_by(|(_, a), (_, b)| {
                    (a.2 * u64::from(b.0)).cmp(&(b.2 * u64::from(a.0))).then(a.3.cmp(&b.3))
                })
                .map(|(slot, _)| slot as u32);
            prop_assert_eq!(host.best(&Host::arrival()).map(|choice| choice.slot), expected);
        }

        #[test]
        fn two_candidates_differ(eligible in 2u32..=SLOTS as u32, random: u32) {
            let (one, other) = two_of(eligible, random);
            prop_assert!(one != other && one < eligible && other < eligible);
        }
    }
}
