//! The limits of the service as a whole and of its sources: keeping them, changing them, and what came
//! of them.

use std::env;

use anyhow::{Context as _, anyhow};
use distributor_ebpf::{
    contract::{self, BUCKETS_OF_SOURCES, Load, Outcome, Over, Plan},
    word,
};
use tracing::info;

use super::Service;
use crate::{
    config,
    control::Response,
    limits::{self, Limits},
    status::{CeilingStatus, LimitsStatus, RateStatus, SourceStatus, SourcesStatus},
};

/// Buckets of the table of sources that are used, if not all: for tests.
const BUCKETS: &str = "DIST_CTL_SOURCE_BUCKETS";

/// What there is to know of the limits while they are kept.
pub(super) struct Keeping {
    pub(super) ceilings: Limits,
    /// The connections of servers are counted for the service as well.
    counting: bool,
    /// Connections that were not counted for their source, when that was last looked at.
    unknown: Option<u64>,
}

impl Keeping {
    /// By the configuration, and what an earlier distributor left in the plan in force.
    pub(super) fn new(config: &config::Service, left: &Plan) -> anyhow::Result<Self> {
        let mut seed = [0; 8];
        // It fails only before the kernel has any randomness at all; then somebody could guess which
        // sources share a bucket, and all limits hold.
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::NONBLOCK);
        let ceilings = Limits::new(config.limits.clone(), &left.limits, u64::from_ne_bytes(seed), buckets()?);
        Ok(Self { ceilings, counting: left.limits.service.connections != 0, unknown: None })
    }
}

/// # Errors
/// The environment says something else than a power of two.
fn buckets() -> anyhow::Result<u32> {
    let all = BUCKETS_OF_SOURCES as u32;
    let Ok(text) = env::var(BUCKETS) else { return Ok(all) };
    let buckets = text.parse().ok().filter(|buckets: &u32| buckets.is_power_of_two() && *buckets <= all);
    buckets.ok_or_else(|| anyhow!("{BUCKETS}: {text:?} is no power of two up to {all}"))
}

impl Service {
    /// Goes on with what an operator has set since the start.
    pub(super) fn keep_limits(&mut self) -> anyhow::Result<()> {
        self.limits.ceilings.keep(&self.kernel.plan().context("read the plan in force")?.limits);
        Ok(())
    }

    /// An operator sets how many connections the service as a whole may have, until the next start.
    pub fn set_service_limit(&mut self, limit: Option<u32>) -> Response {
        let shown = |limit: Option<u32>| limit.map_or("none".to_owned(), |limit| limit.to_string());
        let before = self.limits.ceilings.connections();
        self.limits.ceilings.asked = Some(limit);
        info!("service {}: limit {} -> {}", self.config.name, shown(before), shown(limit));
        self.write_plan();
        Response::Done
    }

    /// What the kernel is told of them.
    ///
    /// While there is no limit nobody counts for it, and who came then is not counted when he goes. So
    /// such connections are subtracted from a new limit, and fewer and fewer of them: first the kernel
    /// is told to count, then they are what servers have more than is counted.
    pub(super) fn planned_limits(&mut self) -> contract::Limits {
        let capacity = self.config.waiting.capacity;
        let counts = self.limits.ceilings.connections().is_some();
        if !counts {
            self.limits.ceilings.earlier = 0;
        } else if !self.limits.counting || self.limits.ceilings.earlier > 0 {
            let earlier = self.kernel.load().map_or(0, |load| uncounted(&load));
            self.limits.ceilings.earlier = match self.limits.counting {
                false => earlier,
                // Only less: some come while it is read.
                true => earlier.min(self.limits.ceilings.earlier),
            };
        }
        let guests = self.entries.iter().filter_map(|entry| entry.run.as_ref()?.guest.as_ref());
        let guests = guests.map(|guest| guest.earlier_open).sum();
        self.limits.ceilings.planned(capacity, if counts { guests } else { 0 })
    }

    /// The kernel goes by what it was told of them. True if it is to be told more at once: it has begun
    /// to count, and from here on it is known who is not counted.
    pub(super) fn limits_are_told(&mut self, told: &contract::Limits) -> bool {
        let counts = told.service.connections != 0;
        let begins = counts && !self.limits.counting;
        if begins {
            self.limits.ceilings.earlier = self.kernel.load().map_or(0, |load| uncounted(&load));
        }
        self.limits.counting = counts;
        begins && self.limits.ceilings.earlier > 0
    }

    /// Once a second: whether sources are known.
    pub(super) fn look_at_sources(&mut self) {
        let Ok(unknown) = self.kernel.outcome(Outcome::SourceUnknown) else { return };
        let more = unknown.saturating_sub(self.limits.unknown.replace(unknown).unwrap_or(unknown));
        let what = (more > 0).then(|| {
            format!(
                "service {}: connections of {more} clients in the last second are not counted for their source, \
                 because the table of sources is full there: no source's limit holds for them, all others do",
                self.config.name
            )
        });
        self.note("sources", what);
    }

    /// Their part of the status.
    pub(super) fn limits_status(&self, load: &Load, now: u64) -> Option<LimitsStatus> {
        let told = self.told.as_ref()?.limits;
        if !limits::are_set(&told) {
            return None;
        }
        let config = &self.limits.ceilings.config;
        let count = |outcome: Outcome| self.kernel.outcome(outcome).unwrap_or(0);
        let ago = |over: Over| match load.over[over as usize] {
            0 => None,
            then => Some(now.saturating_sub(then) as f64 / 1e9),
        };
        let rate = |rate: Option<config::Rate>| {
            rate.map(|rate| RateStatus { per_second: rate.per_second, burst: rate.burst })
        };
        let counted = word::active(load.places);
        let service = CeilingStatus {
            limit: self.limits.ceilings.connections(),
            rate: rate(config.service.rate),
            refused_limit: count(Outcome::RefusedServiceLimit),
            refused_rate: count(Outcome::RefusedServiceRate),
            limit_seconds_ago: ago(Over::ServiceConnections),
            rate_seconds_ago: ago(Over::ServiceRate),
        };
        let sources = (told.bits_ipv4 != 0).then(|| {
            let known = limits::known(self.kernel.sources(), &told);
            SourcesStatus {
                now: known.sources,
                most: known.most.map(|(source, connections)| SourceStatus { source, connections }),
                unknown: count(Outcome::SourceUnknown),
                each: CeilingStatus {
                    limit: config.source.connections,
                    rate: rate(config.source.rate),
                    refused_limit: count(Outcome::RefusedSourceLimit),
                    refused_rate: count(Outcome::RefusedSourceRate),
                    limit_seconds_ago: ago(Over::SourceConnections),
                    rate_seconds_ago: ago(Over::SourceRate),
                },
            }
        });
        Some(LimitsStatus {
            connections: service.limit.map(|_| counted + u64::from(told.earlier)),
            earlier: told.earlier,
            over: config.over.name().to_owned(),
            service,
            sources,
        })
    }
}

/// Connections of servers that are not counted for the service.
fn uncounted(load: &Load) -> u32 {
    let all: u64 = load.word.iter().map(|&word| word::active(word)).sum();
    u32::try_from(all.saturating_sub(word::active(load.places))).unwrap_or(u32::MAX)
}
