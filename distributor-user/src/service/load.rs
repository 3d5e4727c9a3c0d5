//! How loaded servers are, what they say of it, and what that leaves them of weight and limit.
//!
//! Once a second it is looked at what the configuration names; load.rs decides. What a server says counts
//! for a while and is then forgotten, so that nobody is bound for ever by what he said once.
#![forbid(unsafe_code)]

use std::{
    io,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Entry, Running, Service};
use crate::{
    load::{self, Measured, Source, Throughput},
    moment,
    notify::Notification,
    share::WHOLE,
    status::{self, LoadStatus, Timestamp},
};

/// What a server has said of its load or capacity is forgotten after this time.
const SAID_HOLDS: Duration = Duration::from_secs(30);

/// How loaded an instance is.
pub(super) struct Strain {
    /// X_LOAD, in thousandths, and when it was said.
    load: Option<(Instant, u32)>,
    /// X_CAPACITY.
    capacity: Option<(Instant, u32)>,
    /// A wrong value was complained of.
    complained: bool,
    reported: Option<f64>,
    pressure: Option<f64>,
    throughput: Throughput,
    /// What is left of its weight: 0 to 1.
    part: f64,
    /// Since when that is not all.
    since: Option<Instant>,
    /// By which source it was last above the others.
    source: Option<Source>,
}

/// What does not hold any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Forgotten {
    load: bool,
    capacity: bool,
}

/// What of it the next distributor has to know.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Said {
    load: Option<u32>,
    capacity: Option<u32>,
    part: f64,
    /// Nanoseconds of CLOCK_MONOTONIC.
    since: Option<u64>,
}

impl Default for Strain {
    fn default() -> Self {
        Self {
            load: None,
            capacity: None,
            complained: false,
            reported: None,
            pressure: None,
            throughput: Throughput::default(),
            part: 1.0,
            since: None,
            source: None,
        }
    }
}

impl Strain {
    /// As an earlier distributor has left it. Nobody listened for a while, so it counts as said just now.
    pub(super) fn of(said: Option<Said>) -> Self {
        let Some(Said { load, capacity, part, since }) = said else { return Self::default() };
        let now = Instant::now();
        Self {
            load: load.map(|load| (now, load)),
            capacity: capacity.map(|capacity| (now, capacity)),
            part: part.clamp(0.0, 1.0),
            since: since.map(moment::moment),
            ..Self::default()
        }
    }

    pub(super) fn said(&self) -> Option<Said> {
        let said = Said {
            load: self.load.map(|(_, load)| load),
            capacity: self.capacity.map(|(_, capacity)| capacity),
            part: self.part,
            since: self.since.map(moment::number),
        };
        (said.load.is_some() || said.capacity.is_some() || self.percent() < WHOLE).then_some(said)
    }

    /// We could not listen for a while, so what it said counts as said just now.
    pub(super) fn excuse(&mut self, now: Instant) {
        for (at, _) in [&mut self.load, &mut self.capacity].into_iter().flatten() {
            *at = now;
        }
    }

    /// What is left of its weight.
    pub(super) fn percent(&self) -> u32 {
        (self.part * f64::from(WHOLE)).round() as u32
    }

    /// Forgets what was said too long ago, and tells what that was.
    fn forget(&mut self, now: Instant) -> Forgotten {
        let is_old = |(at, _): &mut (Instant, u32)| now.saturating_duration_since(*at) > SAID_HOLDS;
        let load = self.load.take_if(is_old).is_some();
        if load {
            self.reported = None;
        }
        Forgotten { load, capacity: self.capacity.take_if(is_old).is_some() }
    }

    fn measured(&self) -> Measured {
        Measured { reported: self.reported, pressure: self.pressure, queue: self.throughput.delay() }
    }
}

impl Entry {
    /// The most connections that it gets: no more than an operator or it itself says.
    pub(super) fn effective_limit(&self) -> Option<u32> {
        let capacity = self.run.as_ref().and_then(|run| run.strain.capacity).map(|(_, capacity)| capacity);
        match (self.limit, capacity) {
            (Some(limit), Some(capacity)) => Some(limit.min(capacity)),
            (limit, capacity) => limit.or(capacity),
        }
    }
}

impl Service {
    /// What a server has said of its load or capacity.
    pub(super) fn told_load(&mut self, entry: usize, said: &Notification) {
        let name = self.entries[entry].name();
        let Entry { run, changed, .. } = &mut self.entries[entry];
        let Some(Running { strain, .. }) = run else { return };
        let now = Instant::now();
        // What is said again has not to be written down again.
        let is_new = |before: Option<(Instant, u32)>, said: u32| before.is_none_or(|(_, it)| it != said);
        match said {
            Notification::Load(load) => *changed |= is_new(strain.load.replace((now, *load)), *load),
            Notification::Capacity(capacity)
                if is_new(strain.capacity.replace((now, *capacity)), *capacity) =>
            {
                *changed = true;
                self.write_plan();
            }
            Notification::Wrong(text) if !strain.complained => {
                strain.complained = true;
                warn!(
                    "server {name} says {text}, which means nothing: X_LOAD is from 0.0 to 1.0, X_CAPACITY a whole \
                     number; ignores it, also when it says so again"
                );
            }
            _ => {}
        }
    }

    /// Once a second.
    pub(super) fn follow_load(&mut self) {
        let now = Instant::now();
        for entry in &mut self.entries {
            let Some(run) = &mut entry.run else { continue };
            let forgotten = run.strain.forget(now);
            entry.changed |= forgotten != Forgotten::default();
            if forgotten.capacity {
                let holds = status::age(SAID_HOLDS);
                info!(
                    "server {}: has not said X_CAPACITY= for {holds}; it has all of its limit again",
                    entry.name()
                );
            }
        }
        let passed = self.loads_at.replace(now).map_or(Duration::ZERO, |at| now - at);
        self.measure(now, passed);
        let Some(rule) = self.config.load.clone() else {
            // An earlier configuration may have had one.
            self.entries.iter_mut().for_each(|entry| entry.set_part(1.0, None, now));
            return;
        };
        // Who gets nothing is no measure for the others.
        let shares = self.shares();
        let measured = self.entries.iter().zip(&shares).map(|(entry, share)| match &entry.run {
            Some(run) if share.eligible => run.strain.measured(),
            _ => Measured::default(),
        });
        let excesses = load::excesses(&measured.collect::<Vec<_>>(), &rule.sources);
        for (entry, excess) in self.entries.iter_mut().zip(excesses) {
            let Some(run) = &entry.run else { continue };
            let part = load::part(run.strain.part, excess, passed, &rule);
            entry.set_part(part, excess.map(|(_, source)| source), now);
        }
    }

    /// Looks at what the configuration names.
    fn measure(&mut self, now: Instant, passed: Duration) {
        let sources = self.config.load.as_ref().map_or(Vec::new(), |rule| rule.sources.clone());
        for Entry { run, .. } in &mut self.entries {
            let Some(Running { strain, .. }) = run else { continue };
            // What it was by a source that is not configured any more is not shown.
            if !sources.contains(&Source::CpuPressure) {
                strain.pressure = None;
            }
            if !sources.contains(&Source::AcceptQueue) {
                strain.throughput = Throughput::default();
            }
            if let Some((_, load)) = strain.load {
                strain.reported = Some(load::smoothed(strain.reported, f64::from(load) / 1000.0, passed));
            }
        }
        let queues = sources.contains(&Source::AcceptQueue).then(|| self.observe_queues(now).err()).flatten();
        let queues = queues.map(|error| {
            let name = &self.config.name;
            format!("service {name}: its accept queues cannot be read: {error:#}; weights do not follow them")
        });
        self.note("weights by accept queues", queues);
        let pressure = sources.contains(&Source::CpuPressure).then(|| self.observe_pressure()).flatten();
        self.note("weights by CPU pressure", pressure);
    }

    fn observe_queues(&mut self, now: Instant) -> anyhow::Result<()> {
        let lengths = self.accept_queues()?;
        let load = self.kernel.load()?;
        for run in self.entries.iter_mut().filter_map(|entry| entry.run.as_mut()) {
            let length = run.queued(&lengths).unwrap_or(0);
            run.strain.throughput.observe(now, length, load.total[run.slot as usize]);
        }
        Ok(())
    }

    /// Gives what is wrong, if something is.
    fn observe_pressure(&mut self) -> Option<String> {
        let mut failed: Vec<(String, io::Error)> = Vec::new();
        for entry in &mut self.entries {
            let name = entry.name();
            // The cgroup of an adopted server is not ours, and may be that of others, too.
            let is_its = |run: &&mut Running| run.guest.is_none() && run.included;
            let Some(run) = entry.run.as_mut().filter(is_its) else { continue };
            run.strain.pressure = match run.cgroup.cpu_pressure() {
                Ok(pressure) => Some(pressure),
                Err(error) => {
                    failed.push((name, error));
                    None
                }
            };
        }
        let (name, error) = failed.first()?;
        let others = match failed.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        Some(format!(
            "how much server {name}{others} waits for a CPU cannot be read: cpu.pressure: {error}; its weight does not \
             follow that: use a kernel with PSI, boot it with psi=1, or write 1 to cgroup.pressure"
        ))
    }

    /// What is known of a server's load, as the status says it. `None`: nothing.
    pub(super) fn load_status(&self, entry: usize) -> Option<LoadStatus> {
        let strain = &self.entries[entry].run.as_ref()?.strain;
        let is_followed = self.config.load.is_some();
        if !is_followed && strain.load.is_none() && strain.capacity.is_none() {
            return None;
        }
        let ago = |said: Option<(Instant, u32)>| said.map(|(at, _)| at.elapsed().as_secs_f64());
        Some(LoadStatus {
            reported: strain.load.map(|(_, load)| f64::from(load) / 1000.0),
            reported_seconds_ago: ago(strain.load),
            capacity: strain.capacity.map(|(_, capacity)| capacity),
            capacity_seconds_ago: ago(strain.capacity),
            cpu_pressure: strain.pressure,
            accept_seconds: strain.throughput.delay(),
            percent: strain.percent(),
            since: strain.since.map(Timestamp::of),
        })
    }

    /// Why a server gets less than its weight and limit say.
    pub(super) fn load_reason(&self, entry: usize) -> Option<String> {
        let server = &self.entries[entry];
        let strain = &server.run.as_ref()?.strain;
        let mut parts = Vec::new();
        if let Some(since) = strain.since.filter(|_| strain.percent() < WHOLE) {
            let by = strain.source.map_or(String::new(), |source| format!(" ({})", source.name()));
            let age = status::age(since.elapsed());
            parts.push(format!(
                "more load than the others{by}: {} % of its weight, less than all for {age}",
                strain.percent()
            ));
        }
        if server.effective_limit() != server.limit {
            let capacity = strain.capacity.map_or(0, |(_, capacity)| capacity);
            parts.push(format!("says that it can serve {capacity} at once"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

impl Entry {
    fn set_part(&mut self, part: f64, source: Option<Source>, now: Instant) {
        let name = self.name();
        let Some(Running { strain, .. }) = &mut self.run else { return };
        let before = strain.percent();
        if part < strain.part {
            strain.source = source;
        }
        strain.part = part;
        let after = strain.percent();
        if before == after {
            return;
        }
        self.changed = true;
        if before == WHOLE {
            strain.since = Some(now);
            let by = source.map_or("", Source::name);
            info!("server {name}: has more load than the others by {by}; its weight follows that");
        }
        if after == WHOLE {
            strain.since = None;
            info!("server {name}: has all of its weight again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_forgotten_in_time_and_each_by_itself() {
        let start = Instant::now();
        let mut strain = Strain { load: Some((start, 500)), reported: Some(0.5), ..Strain::default() };
        let later = start + Duration::from_secs(20);
        strain.capacity = Some((later, 25));
        assert_eq!(strain.forget(start + SAID_HOLDS), Forgotten::default());
        assert_eq!((strain.load, strain.reported), (Some((start, 500)), Some(0.5)));
        let load = Forgotten { load: true, capacity: false };
        assert_eq!(strain.forget(start + SAID_HOLDS + Duration::from_millis(1)), load);
        assert_eq!((strain.load, strain.reported, strain.capacity), (None, None, Some((later, 25))));
        let capacity = Forgotten { load: false, capacity: true };
        assert_eq!(strain.forget(later + SAID_HOLDS + Duration::from_millis(1)), capacity);
        assert_eq!(strain.said(), None);
    }

    #[test]
    fn nobody_is_taken_for_silent_by_whoever_did_not_listen() {
        let start = Instant::now();
        let later = start + 2 * SAID_HOLDS;
        let mut strain = Strain { load: Some((start, 500)), capacity: Some((start, 7)), ..Strain::default() };
        strain.excuse(later);
        assert_eq!(strain.forget(later + SAID_HOLDS), Forgotten::default());
        assert_eq!((strain.load, strain.capacity), (Some((later, 500)), Some((later, 7))));
        let mut silent = Strain::default();
        silent.excuse(later);
        assert_eq!(silent.said(), None);
    }

    #[test]
    fn the_next_distributor_knows_what_was_said_and_what_came_of_it() {
        let now = Instant::now();
        let strain = Strain {
            load: Some((now, 900)),
            capacity: Some((now, 7)),
            part: 0.375,
            since: Some(now),
            complained: true,
            ..Strain::default()
        };
        let text = serde_json::to_string(&strain.said()).unwrap();
        let next = Strain::of(serde_json::from_str(&text).unwrap());
        assert_eq!(
            (next.load.map(|(_, load)| load), next.capacity.map(|(_, most)| most)),
            (Some(900), Some(7))
        );
        assert_eq!((next.part, next.percent()), (0.375, 38));
        assert!(next.since.is_some_and(|since| since.elapsed() < Duration::from_secs(5)));
        assert_eq!(Strain::default().said(), None, "there is nothing to be known");
    }
}
