//! What a service looks like from outside: its part of `status`.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Instant, SystemTime},
};

use anyhow::Context as _;
use distributor_ebpf::{
    contract::{Load, Outcome, WAITS},
    word,
};
use rustix::time::{ClockId, clock_gettime};

use super::{Role, Running, Service};
use crate::{
    config,
    drain::Rest,
    moment::Moment,
    share::{HeldBack, Share},
    status::{
        self, Bucket, DrainStatus, DriftStatus, Histogram, ScaleStatus, ServerState, ServerStatus,
        ServiceStatus, Timestamp, WaitingStatus,
    },
    systemd::Summary,
};

impl Service {
    /// Everything an operator can know of it now.
    pub fn status(&self) -> anyhow::Result<ServiceStatus> {
        let load = self.kernel.load().with_context(|| format!("read the counts of {}", self.config.name))?;
        let outcomes: BTreeMap<String, u64> = self
            .kernel
            .outcomes()?
            .into_iter()
            .map(|(outcome, count)| (outcome.name().to_owned(), count))
            .collect();
        let count = |outcome: Outcome| outcomes.get(outcome.name()).copied().unwrap_or(0);
        let refused =
            [Outcome::RefusedLimit, Outcome::RefusedCapacity, Outcome::RefusedNoRoom].map(count).iter().sum();
        let now = clock_gettime(ClockId::Monotonic);
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let shares = self.shares();
        let queues = self.accept_queues().unwrap_or_default();
        let oldest = self.attendant.oldest().filter(|_| load.waiting > 0);
        Ok(ServiceStatus {
            name: self.config.name.clone(),
            listen: self.config.listen.iter().map(ToString::to_string).collect(),
            policy: self.config.policy.name().to_owned(),
            waiting: WaitingStatus {
                now: load.waiting,
                max: load.waiting_most,
                capacity: u64::from(self.config.waiting.capacity),
                served: count(Outcome::HandedOver),
                timed_out: count(Outcome::Dismissed),
                left: count(Outcome::ClosedWaiting),
                refused,
                oldest_seconds: oldest.map_or(0.0, |since| now.saturating_sub(since) as f64 / 1e9),
                wait: histogram(&load),
            },
            limits: self.limits_status(&load, now),
            drift: self.audit.status(),
            servers: self
                .in_order()
                .into_iter()
                .map(|entry| self.server_status(entry, shares[entry], &load, &queues))
                .collect(),
            scale: self.config.scale.map(|scale| ScaleStatus {
                servers: self.config.numbered() as u64,
                min: scale.min as u64,
                max: scale.max as u64,
                reason: self.rescaled.as_ref().map(|(why, _)| why.clone()),
                since: self.rescaled.as_ref().map(|(_, since)| (*since).into()),
            }),
            roll: self.roll_status(),
            outcomes,
        })
    }

    /// The same in a few numbers.
    pub fn summary(&self) -> Summary {
        let servers = self.entries.iter().filter(|entry| entry.is_current());
        Summary {
            servers: servers.clone().count(),
            ready: servers.filter(|entry| entry.is_open()).count(),
            waiting: self.kernel.load().map_or(0, |load| load.waiting),
        }
    }

    fn server_status(
        &self,
        entry: usize,
        share: Share,
        load: &Load,
        queues: &HashMap<u64, u32>,
    ) -> ServerStatus {
        let server = &self.entries[entry];
        let now = Instant::now();
        let retired = || self.retired.iter().filter(|retired| retired.entry == Some(entry));
        let active = |slot: u32| word::active(load.word[slot as usize]);
        let run = server.run.as_ref();
        let connections: u64 =
            run.map(|run| run.slot).into_iter().chain(retired().map(|it| it.slot)).map(active).sum();
        // What a server has had, it has had in all its instances.
        let others = self.leaving(&server.config.name).filter(|_| server.is_current());
        let total = run
            .into_iter()
            .chain(others.filter_map(|it| it.run.as_ref()))
            .map(|run| run.had(load))
            .sum::<u64>()
            + retired().map(|it| had(load, it.slot, it.base)).sum::<u64>();
        let earlier = run.and_then(|run| run.guest.as_ref()).map_or(0, |guest| guest.earlier_open);
        let included = run.is_some_and(|run| run.included);
        let machine_reason = server.machine.reason(now, &server.policy);
        let drained = server.drain.map(|drain| drain.reason(now, connections + u64::from(earlier)));
        let doubt = server.config.check.as_ref().and_then(|check| server.health.doubt(check));
        // The machine's says it.
        let doubt = doubt.filter(|_| server.machine.is_included());
        let (state, since) = match server.drain {
            // What else it does is more than that it would get none.
            Some(drain) if included => (ServerState::Draining, drain.since.max(server.machine.since())),
            _ => {
                let since = server.machine.since();
                let since = server.resumed.map_or(since, |Moment(resumed)| since.max(resumed));
                (server.machine.status(), since)
            }
        };
        ServerStatus {
            name: server.name(),
            state,
            reason: reason([
                self.standing(entry, now),
                drained,
                machine_reason,
                doubt,
                share.held_back.and_then(held_back),
                self.load_reason(entry),
            ]),
            pid: server.machine.pid(),
            connections,
            connections_max: run
                .map_or(0, |run| most(load, run.slot, run.generation))
                .max(server.most_before)
                .max(connections),
            connections_total: server.total_before + total,
            limit: server.limit,
            effective_limit: server.effective_limit(),
            weight: server.weight,
            effective_weight: share.effective,
            load: self.load_status(entry),
            cpus: self.cpus_status(entry),
            accept_queue: run.and_then(|run| run.queued(queues)),
            restarts: server.machine.restarts(),
            instance: server.machine.instance().0,
            life: self.life_status(entry, load),
            adopted: run.is_some_and(|run| run.guest.is_some()),
            earlier,
            drain: server.drain.map(|drain| DrainStatus {
                since: Timestamp::of(drain.since),
                then: drain.ahead(now).map_or(Rest::Leave, |(_, then)| then),
                seconds_left: drain.ahead(now).map(|(left, _)| left.as_secs_f64()),
            }),
            check: self.check_status(entry),
            since: Timestamp::of(since),
        }
    }

    /// What an instance is beside its server; or why the server was not replaced.
    fn standing(&self, entry: usize, now: Instant) -> Option<String> {
        let it = &self.entries[entry];
        let server = &it.config.name;
        match it.role {
            Role::Current if self.to_remove.contains(server) => {
                Some("is removed when those that were added are ready".to_owned())
            }
            Role::Current => self
                .replacement_ahead(server)
                .or_else(|| it.not_replaced.as_ref().map(|not_replaced| not_replaced.reason(now))),
            Role::Successor => Some(format!("is to take the place of {server}")),
            Role::Leaving => Some(match self.find(server) {
                Some(current) => {
                    format!("replaced by instance {}", self.entries[current].machine.instance())
                }
                None => "removed".to_owned(),
            }),
        }
    }
}

impl Running {
    /// How many connections it has had.
    pub(super) fn had(&self, load: &Load) -> u64 {
        had(load, self.slot, self.base)
    }
}

/// What is to be said of a server, in one line.
fn reason(parts: [Option<String>; 6]) -> Option<String> {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Why it does not get its whole share.
fn held_back(why: HeldBack) -> Option<String> {
    Some(match why {
        HeldBack::Backup => "backup: gets connections when no other server is ready".to_owned(),
        // Its state says it.
        HeldBack::Stalled => return None,
        HeldBack::Warms { percent, left, .. } => {
            format!("slow start: {percent} % of its weight, all of it in {}", status::age(left))
        }
    })
}

/// How long those waited that were handed over.
fn histogram(load: &Load) -> Histogram {
    let mut count = 0;
    let mut buckets = Vec::new();
    // The last bucket has no end, and its count is that of all.
    for (bucket, waits) in load.waits[..WAITS - 1].iter().enumerate() {
        count += waits;
        if *waits > 0 {
            buckets.push(Bucket { le: (1u64 << bucket) as f64 / 1e6, count });
        }
    }
    Histogram { count: count + load.waits[WAITS - 1], sum_seconds: load.waited as f64 / 1e6, buckets }
}

/// A service that has not begun, and why not.
pub fn vacant_status(config: &config::Service, why: &str, since: SystemTime) -> ServiceStatus {
    let server = |server: &config::Server| ServerStatus {
        name: server.name.clone(),
        state: ServerState::Stopped,
        reason: Some(why.to_owned()),
        pid: None,
        connections: 0,
        connections_max: 0,
        connections_total: 0,
        limit: server.limit,
        effective_limit: server.limit,
        weight: server.weight,
        effective_weight: 0,
        load: None,
        cpus: None,
        accept_queue: None,
        restarts: 0,
        instance: 0,
        life: None,
        adopted: false,
        earlier: 0,
        drain: None,
        check: None,
        since: since.into(),
    };
    ServiceStatus {
        name: config.name.clone(),
        listen: config.listen.iter().map(ToString::to_string).collect(),
        policy: config.policy.name().to_owned(),
        waiting: WaitingStatus { capacity: u64::from(config.waiting.capacity), ..WaitingStatus::default() },
        limits: None,
        drift: DriftStatus::default(),
        servers: config.servers.iter().map(server).collect(),
        scale: None,
        roll: None,
        outcomes: BTreeMap::new(),
    }
}

/// How many connections a slot's owner has had, if it had `base` before.
pub(super) fn had(load: &Load, slot: u32, base: u64) -> u64 {
    load.total[slot as usize].saturating_sub(base)
}

/// The most connections at a time of a slot's owner.
pub(super) fn most(load: &Load, slot: u32, generation: u32) -> u64 {
    let most = load.most[slot as usize];
    if most >> 32 == u64::from(generation) { most & 0xffff_ffff } else { 0 }
}
