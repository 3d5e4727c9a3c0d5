//! What of a newer configuration is carried out while the service runs.
//!
//! changes.rs says what differs; here each difference is done by the least that it needs. What an
//! operator has set since the start (weights, limits) holds on, unless the file says another value
//! than it did.
#![forbid(unsafe_code)]

use std::{
    mem,
    time::{Instant, SystemTime},
};

use distributor_ebpf::word;
use tracing::{error, info};

use super::{Entry, Host, Role, Service, change, launch::job_of};
use crate::{
    changes::{ServerChange, Update},
    config, moment,
    roll::{Item, Roll},
    scale,
    server::State,
};

impl Service {
    /// From here on it is this one.
    pub fn update(&mut self, update: Update, host: &mut Host<'_>) {
        let Update { service, servers, settings: _ } = update;
        let before = mem::replace(&mut self.config, service);
        if self.config.waiting != before.waiting {
            self.attendant.change(self.config.waiting.clone());
        }
        if self.config.limits != before.limits {
            let limits = &mut self.limits.ceilings;
            if self.config.limits.service.connections != before.limits.service.connections {
                limits.asked = None;
            }
            // What connections there are stays; they count.
            limits.config = self.config.limits.clone();
        }
        for server in self.config.servers.clone() {
            // One that is to take its place as well.
            let its = |entry: &Entry| entry.is_of(&server.name) && entry.role != Role::Leaving;
            let its: Vec<usize> =
                (0..self.entries.len()).filter(|entry| its(&self.entries[*entry])).collect();
            its.into_iter().for_each(|entry| self.set(entry, server.clone()));
        }
        let mut replaced = Vec::new();
        self.to_remove.retain(|name| self.config.servers.iter().all(|server| server.name != *name));
        let adds = servers.iter().any(|change| matches!(change, ServerChange::Add { .. }));
        for change in servers {
            let name = change.name();
            let configured = self.config.servers.iter().find(|server| server.name == name).cloned();
            let done = match (&change, self.find(name), configured) {
                (ServerChange::Add { .. }, None, Some(server)) => self.add(server, host),
                // It was about to be removed.
                (ServerChange::Add { .. }, Some(entry), Some(_)) if self.runs_otherwise(entry) => {
                    replaced.push(self.renewal(name, ServerChange::reason(&[]), host));
                    Ok(())
                }
                // Whoever takes their share is to be ready first.
                (ServerChange::Remove { .. }, Some(_), _) if adds => {
                    self.to_remove.push(name.to_owned());
                    Ok(())
                }
                (ServerChange::Remove { .. }, Some(entry), _) => self.remove(entry, host),
                (ServerChange::Replace { why, .. }, Some(_), _) => {
                    replaced.push(self.renewal(name, ServerChange::reason(why), host));
                    Ok(())
                }
                (ServerChange::Keep { .. }, Some(entry), _) => {
                    self.forgo_replacement(name, host);
                    self.entries[entry].not_replaced = None;
                    Ok(())
                }
                // It was set with all others; or what is to be done has been.
                (
                    ServerChange::Set { .. }
                    | ServerChange::Add { .. }
                    | ServerChange::Remove { .. }
                    | ServerChange::Replace { .. }
                    | ServerChange::Keep { .. },
                    ..,
                ) => Ok(()),
            };
            if let Err(error) = done {
                error!("server {name}: {error:#}");
            }
        }
        self.roll_on(replaced);
        self.plan_cpus();
        self.write_plan();
    }

    /// What is on its way to take the place of this server is not wanted any more.
    fn forgo_replacement(&mut self, name: &str, host: &mut Host<'_>) {
        if let Some(successor) = self.successor_of(name) {
            self.see_off(successor, host);
        }
        self.roll.iter_mut().for_each(|roll| roll.forget(name));
    }

    /// It is to be replaced. One that is on its way already is started as it was configured before: of no use.
    fn renewal(&mut self, name: &str, why: String, host: &mut Host<'_>) -> Item {
        self.forgo_replacement(name, host);
        Item::new(name, self.newest(name), Some(why))
    }

    /// Removes servers that are not configured any more, once those that were added with that are ready, or have
    /// failed.
    pub(super) fn remove_superseded(&mut self, host: &mut Host<'_>) {
        let starts = |entry: &Entry| {
            entry.role == Role::Current && matches!(entry.machine.state(), State::Starting { .. })
        };
        if self.to_remove.is_empty() || self.entries.iter().any(starts) {
            return;
        }
        for name in mem::take(&mut self.to_remove) {
            let Some(entry) = self.find(&name) else { continue };
            if let Err(error) = self.remove(entry, host) {
                error!("server {name}: {error:#}");
            }
        }
        self.plan_cpus();
        self.write_plan();
    }

    /// Replaces who runs by what the file said when the monitor before was killed, if it says something else now.
    pub fn replace_outdated(&mut self, host: &mut Host<'_>) {
        let mut replaced = Vec::new();
        for entry in 0..self.entries.len() {
            let name = self.entries[entry].config.name.clone();
            // Its turn may be yet to come.
            let roll = self.roll.as_ref().filter(|roll| !roll.is_over());
            let waits = roll
                .is_some_and(|roll| roll.items().iter().any(|item| item.server == name && item.is_open()));
            let is_outdated = match self.successor_of(&name) {
                Some(successor) => self.runs_otherwise(successor),
                None => !waits && self.runs_otherwise(entry),
            };
            if self.entries[entry].is_current() && is_outdated {
                info!("server {name}: what it is started with has changed: is to be replaced");
                replaced.push(self.renewal(&name, ServerChange::reason(&[]), host));
            }
        }
        self.roll_on(replaced);
    }

    /// It was not started as it is configured.
    fn runs_otherwise(&self, entry: usize) -> bool {
        let job = self.job(entry).ok();
        self.ran(entry).is_some_and(|ran| job.is_some_and(|job| job != ran))
    }

    /// A hash of what it was started with, if we did.
    fn ran(&self, entry: usize) -> Option<u64> {
        let run = self.entries[entry].run.as_ref().filter(|run| run.guest.is_none())?;
        Some(run.job).filter(|job| *job != 0)
    }

    /// Whether a server runs as this configuration of its service says, as far as what it is started with goes.
    pub fn runs_as(&self, service: &config::Service, server: &config::Server) -> bool {
        let ran = self.find(&server.name).and_then(|entry| self.ran(entry));
        ran.is_some_and(|ran| job_of(service, server).is_ok_and(|job| job == ran))
    }

    /// Servers that run as they were configured before, and that nobody is about to replace.
    pub fn outdated(&self) -> Vec<String> {
        if self.stopping || self.roll.as_ref().is_some_and(|roll| !roll.is_over()) {
            return Vec::new();
        }
        let is_outdated = |entry: &usize| self.entries[*entry].is_current() && self.runs_otherwise(*entry);
        let outdated = (0..self.entries.len()).filter(is_outdated);
        outdated.map(|entry| self.entries[entry].config.name.clone()).collect()
    }

    /// Has these servers replaced one after the other, after those that are being replaced already.
    fn roll_on(&mut self, items: Vec<Item>) {
        match self.roll.as_mut().filter(|roll| !roll.is_over()) {
            _ if items.is_empty() => {}
            Some(roll) => {
                roll.extend(items);
                self.roll_changed = true;
            }
            None => {
                let (number, bounds) = (moment::now(), self.config.roll);
                self.begin_roll(Roll::new(number, false, bounds, items, Instant::now()));
            }
        }
    }

    /// How many servers it should have by its connections, if that is another number than it has; and why.
    pub fn rescaled(&mut self, now: Instant) -> Option<scale::Decision> {
        let scale = self.config.scale.filter(|_| !self.stopping && !self.taking_over)?;
        let load = self.kernel.load().ok()?;
        let mut seen = scale::Seen {
            wanted: self.config.numbered(),
            ready: 0,
            starting: 0,
            limit: 0,
            connections: 0,
            waiting: load.waiting,
        };
        let numbered: Vec<&Entry> =
            self.entries.iter().filter(|entry| entry.is_current() && entry.config.is_numbered()).collect();
        for entry in &numbered {
            match &entry.run {
                Some(run) if entry.is_open() => {
                    seen.ready += 1;
                    seen.connections += word::active(load.word[run.slot as usize]);
                }
                // It takes none, and will not soon.
                Some(run) if run.draining || entry.drain.is_some() || entry.machine.is_withheld() => {}
                Some(_) => seen.starting += 1,
                None => {}
            }
        }
        // Who waits for a place of the whole service, or for his turn by its rate, waits with more servers too.
        let ceiling = self.limits.ceilings.connections().map_or(u64::MAX, u64::from);
        seen.waiting = match self.config.limits.service.rate {
            Some(_) => 0,
            None => seen.waiting.min(ceiling.saturating_sub(seen.connections)),
        };
        // They have the same limit, unless an operator or they themselves say otherwise.
        let limits = numbered.iter().filter_map(|entry| entry.effective_limit());
        seen.limit = limits.map(u64::from).sum::<u64>().checked_div(numbered.len() as u64)?.max(1);
        self.scaler.decide(&scale, &seen, now)
    }

    /// It has another number of servers from here on.
    pub fn note_scaled(&mut self, why: String) {
        self.rescaled = Some((why, SystemTime::now()));
    }

    /// What the configuration says of a server that goes on.
    fn set(&mut self, entry: usize, server: config::Server) {
        let policy = match change::policy(&self.config, &server, self.entries[entry].role) {
            Ok(policy) => policy,
            // Not possible: the configuration was checked.
            Err(error) => return error!("server {}: {error:#}", server.name),
        };
        let entry = &mut self.entries[entry];
        if server.weight != entry.config.weight {
            entry.weight = server.weight;
        }
        if server.limit != entry.config.limit {
            entry.limit = server.limit;
        }
        (entry.policy, entry.config) = (policy, server);
        entry.changed = true;
    }
}
