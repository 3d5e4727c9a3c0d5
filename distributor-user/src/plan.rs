//! What the kernel is to be told: from wanted servers to the contract's plan.
//!
//! Pure. Takes what is wanted of each slot and where its listeners are, gives the bytes of PLAN
//! and HASH; and hands out slots and indices of SOCKETS. Touches no map.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Context as _, ensure};
use distributor_ebpf::{
    contract::{
        self, BUCKETS, FLAG_BELL, FLAG_CHECKS, FLAG_CLOSING, FLAG_COOKIES, FLAG_LIMITED, GROUPS, LIMIT_MAX,
        Plan, Policy, Run, SERVERS_END, SLOTS,
    },
    select::{NO_SLOT, mix, stride},
};

use crate::limits;

/// All of one service's plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub policy: Policy,
    /// Connections that may wait.
    pub capacity: u32,
    /// The service is being stopped.
    pub closing: bool,
    /// SYN cookies are always sent (net.ipv4.tcp_syncookies = 2).
    pub cookies: bool,
    /// The kernel does not wake a server to which it moves a connection.
    pub bell: bool,
    /// Servers are checked over the network.
    pub checks: bool,
    /// What the service as a whole and each source may have.
    pub limits: contract::Limits,
    /// In the configuration's order.
    pub servers: Vec<WantedServer>,
}

/// One slot of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedServer {
    pub slot: u32,
    /// What tells this server from others in the hash table, whatever its slot: its name.
    pub identity: String,
    /// May get connections.
    pub eligible: bool,
    pub weight: u32,
    /// Connections; `None` = as many as can be counted.
    pub limit: Option<u32>,
    /// Tells the slot's owners apart.
    pub generation: u32,
    /// Per group where its listeners are.
    pub runs: Vec<Run>,
}

impl Wanted {
    /// Nobody is selected, and nobody may wait.
    pub fn nothing() -> Self {
        Self {
            policy: Policy::default(),
            capacity: 0,
            closing: false,
            cookies: false,
            bell: false,
            checks: false,
            limits: contract::Limits::NONE,
            servers: Vec::new(),
        }
    }

    /// The plan. Slots without a server are not eligible.
    pub fn plan(&self) -> Box<Plan> {
        let mut plan = Box::new(Plan::EMPTY);
        plan.policy = self.policy as u32;
        for (flag, is_set) in [
            (FLAG_CLOSING, self.closing),
            (FLAG_COOKIES, self.cookies),
            (FLAG_BELL, self.bell),
            (FLAG_CHECKS, self.checks),
            (FLAG_LIMITED, limits::are_set(&self.limits)),
        ] {
            plan.flags |= if is_set { flag } else { 0 };
        }
        plan.capacity = self.capacity;
        plan.limits = self.limits;
        for (rank, server) in self.servers.iter().enumerate() {
            let slot = server.slot as usize % SLOTS;
            let limit = match server.limit {
                _ if !server.eligible => 0,
                Some(limit) => limit.min(LIMIT_MAX),
                None => LIMIT_MAX,
            };
            plan.servers[slot] = contract::Server {
                limit,
                weight: server.weight,
                rank: rank as u32,
                reservable: limits::reservable(limit, self.capacity),
                stride: stride(server.weight),
                generation: server.generation,
                suspect: limits::suspect(limit, self.capacity),
            };
            plan.count = plan.count.max(slot as u32 + 1);
            for (group, &run) in server.runs.iter().enumerate().take(GROUPS) {
                plan.runs[group * SLOTS + slot] = run;
            }
            if server.eligible {
                plan.order[plan.eligible as usize] = slot as u16;
                plan.eligible += 1;
            }
        }
        plan
    }

    /// The slot of each bucket of the consistent-hash table, by weighted rendezvous hashing:
    /// the server with the largest -weight / ln(hash) has the bucket. A server that goes away
    /// gives up its own buckets and no others change (Schindelhauer and Schomaker, SPAA 2005).
    pub fn hash(&self) -> Box<[u16; BUCKETS]> {
        let mut table = Box::new([NO_SLOT as u16; BUCKETS]);
        let servers: Vec<(u16, u64, f64)> = self
            .servers
            .iter()
            .filter(|server| server.eligible)
            .map(|server| (server.slot as u16, hash(server.identity.as_bytes()), f64::from(server.weight)))
            .collect();
        for (bucket, slot) in table.iter_mut().enumerate() {
            let mut best = f64::NEG_INFINITY;
            for &(candidate, seed, weight) in &servers {
                // In (0, 1): 53 bits, and never 0.
                let uniform = ((mix(seed ^ bucket as u64) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
                let score = -weight / uniform.ln();
                if score > best {
                    (best, *slot) = (score, candidate);
                }
            }
        }
        table
    }
}

/// FNV-1a, then mixed: stable over builds and machines, as `std`'s hasher is not.
pub fn hash(bytes: &[u8]) -> u64 {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    mix(hash)
}

/// The slots of one service. A slot that was given back is used again as late as possible:
/// what still refers to it (a reservation, a late event) has the longest time to end.
#[derive(Clone, Debug)]
pub struct Slots {
    free: VecDeque<u32>,
}

impl Default for Slots {
    fn default() -> Self {
        Self { free: (0..SLOTS as u32).collect() }
    }
}

impl Slots {
    /// # Errors
    /// All slots hold connections.
    pub fn take(&mut self) -> anyhow::Result<u32> {
        self.free.pop_front().with_context(|| {
            format!(
                "all {SLOTS} slots hold connections, also those of ended servers: wait for these to close"
            )
        })
    }

    /// Marks a slot as taken that an earlier distributor took.
    pub fn claim(&mut self, slot: u32) -> anyhow::Result<()> {
        let place = self.free.iter().position(|&free| free == slot).context("the slot is taken")?;
        self.free.remove(place);
        Ok(())
    }

    pub fn give_back(&mut self, slot: u32) {
        debug_assert!(!self.free.contains(&slot), "slot {slot} was given back twice");
        self.free.push_back(slot);
    }
}

/// The indices of SOCKETS that are servers', handed out as runs.
#[derive(Clone, Debug, Default)]
pub struct Indices {
    /// First index -> length, of what is taken.
    taken: BTreeMap<u32, u32>,
}

impl Indices {
    /// `len` indices in a row. Returns the first.
    ///
    /// # Errors
    /// There is no such gap.
    pub fn take(&mut self, len: u32) -> anyhow::Result<u32> {
        let mut first = 0;
        for (&start, &length) in &self.taken {
            if start - first >= len {
                break;
            }
            first = start + length;
        }
        ensure!(
            first + len <= SERVERS_END as u32,
            "no {len} places in a row are left among the {SERVERS_END} for listeners"
        );
        self.taken.insert(first, len);
        Ok(first)
    }

    /// Marks indices as taken that an earlier distributor took.
    ///
    /// # Errors
    /// Some of them are taken already, or are none of a server's.
    pub fn claim(&mut self, first: u32, len: u32) -> anyhow::Result<()> {
        let before = self.taken.range(..=first).next_back().map_or(0, |(&start, &length)| start + length);
        let after = self.taken.range(first + 1..).next().map_or(SERVERS_END as u32, |(&start, _)| start);
        ensure!(before <= first, "the place {first} is taken");
        ensure!(first + len <= after, "the places after {first} are taken");
        self.taken.insert(first, len);
        Ok(())
    }

    pub fn give_back(&mut self, first: u32) {
        self.taken.remove(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn server(slot: u32, weight: u32) -> WantedServer {
        WantedServer {
            slot,
            identity: format!("shop/{slot}"),
            eligible: true,
            weight,
            limit: None,
            generation: 1,
            runs: vec![Run { first: slot as u16, len: 1 }],
        }
    }

    fn wanted(servers: Vec<WantedServer>) -> Wanted {
        Wanted {
            policy: Policy::SourceHash,
            capacity: 10,
            closing: false,
            cookies: false,
            bell: false,
            checks: false,
            limits: contract::Limits::NONE,
            servers,
        }
    }

    #[test]
    fn a_server_that_is_not_eligible_keeps_its_weight_and_gets_no_place() {
        let mut out = server(3, 70);
        out.eligible = false;
        let plan = wanted(vec![server(0, 1), out]).plan();
        assert_eq!((plan.servers[3].limit, plan.servers[3].weight), (0, 70));
        assert_eq!((plan.count, plan.eligible, plan.order[0]), (4, 1, 0));
    }

    #[test]
    fn every_unused_slot_has_a_weight_to_divide_by() {
        let plan = wanted(vec![]).plan();
        assert!(
            plan.servers.iter().all(|server| server.weight > 0 && server.stride > 0 && server.limit == 0)
        );
    }

    #[test]
    fn removing_a_server_moves_only_its_own_buckets() {
        let mut all = wanted((0..10).map(|slot| server(slot, 100)).collect());
        let before = all.hash();
        all.servers.remove(4);
        let after = all.hash();
        let moved = before.iter().zip(after.iter()).filter(|(before, after)| before != after).count();
        let its = before.iter().filter(|&&slot| slot == 4).count();
        assert_eq!(moved, its);
        // A tenth, give or take four standard deviations of a binomial over the buckets.
        let expected = BUCKETS as f64 / 10.0;
        assert!((its as f64 - expected).abs() < 4.0 * (expected * 0.9).sqrt(), "{its}");
    }

    #[test]
    fn buckets_are_shared_by_weight() {
        let table = wanted(vec![server(0, 100), server(1, 300)]).hash();
        let heavy = table.iter().filter(|&&slot| slot == 1).count() as f64;
        assert!((heavy / BUCKETS as f64 - 0.75).abs() < 0.03, "{heavy}");
    }

    #[test]
    fn a_restarted_server_keeps_its_clients_though_its_slot_is_new() {
        let mut all = wanted((0..5).map(|slot| server(slot, 100)).collect());
        let before = all.hash();
        all.servers[2].slot = 77;
        let after = all.hash();
        for (before, after) in before.iter().zip(after.iter()) {
            assert_eq!(if *before == 2 { 77 } else { *before }, *after);
        }
    }

    #[test]
    fn without_a_server_every_bucket_is_empty() {
        assert!(wanted(vec![]).hash().iter().all(|&slot| u32::from(slot) == NO_SLOT));
    }

    #[test]
    fn a_slot_given_back_is_used_last() {
        let mut slots = Slots::default();
        let first = slots.take().unwrap();
        slots.give_back(first);
        let next: Vec<u32> = (0..SLOTS).map(|_| slots.take().unwrap()).collect();
        assert_eq!(next.last(), Some(&first));
        assert!(slots.take().unwrap_err().to_string().contains("all 256 slots hold connections"));
    }

    proptest! {
        #[test]
        fn runs_never_overlap(steps in prop::collection::vec((1u32..40, any::<bool>()), 1..200)) {
            let mut indices = Indices::default();
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (len, give_back) in steps {
                if give_back && !held.is_empty() {
                    let (first, _) = held.remove(len as usize % held.len());
                    indices.give_back(first);
                } else {
                    let first = indices.take(len).unwrap();
                    for &(other, length) in &held {
                        prop_assert!(first + len <= other || other + length <= first);
                    }
                    held.push((first, len));
                }
            }
        }
    }
}
