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
use tracing::error;

use super::{Entry, Host, Role, Service, change};
use crate::{
    changes::{ServerChange, Update},
    config, moment,
    roll::{Item, Roll},
    scale,
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
        for change in servers {
            let name = change.name();
            let configured = self.config.servers.iter().find(|server| server.name == name).cloned();
            let done = match (&change, self.find(name), configured) {
                (ServerChange::Add { .. }, None, Some(server)) => self.add(server, host).map(drop),
                (ServerChange::Remove { .. }, Some(entry), _) => self.remove(entry, host),
                (ServerChange::Replace { why, .. }, Some(_), _) => {
                    // One that is on its way already is started as it was configured before: of no use.
                    if let Some(successor) = self.successor_of(name) {
                        self.see_off(successor, host);
                    }
                    self.roll.iter_mut().for_each(|roll| roll.forget(name));
                    let why = Some(ServerChange::reason(why));
                    replaced.push(Item::new(name, self.newest(name), why));
                    Ok(())
                }
                // It was set with all others; or what is to be done has been.
                (
                    ServerChange::Set { .. }
                    | ServerChange::Add { .. }
                    | ServerChange::Remove { .. }
                    | ServerChange::Replace { .. },
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

    /// Servers that run as they were configured before, and that nobody is about to replace.
    pub fn outdated(&self) -> Vec<String> {
        if self.stopping || self.roll.as_ref().is_some_and(|roll| !roll.is_over()) {
            return Vec::new();
        }
        let is_outdated = |entry: &usize| {
            let run = self.entries[*entry].run.as_ref().filter(|run| run.guest.is_none());
            let differs = |ran: u64| self.job(*entry).is_ok_and(|job| job != ran);
            self.entries[*entry].is_current() && run.is_some_and(|run| run.job != 0 && differs(run.job))
        };
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
        let decision = self.scaler.decide(&scale, &seen, now)?;
        self.rescaled = Some((decision.why.clone(), SystemTime::now()));
        Some(decision)
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
