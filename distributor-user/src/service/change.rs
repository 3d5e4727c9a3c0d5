//! Servers that are added, removed and replaced while the service serves.
//!
//! A server is replaced by a further entry beside its own, the *successor*, with an instance number, a
//! cgroup and a slot of its own. When that is ready, one plan has it and no longer the one before, and it
//! is the server from then on; the one before drains, is stopped, and is gone. A successor that does not
//! get ready is gone, and nothing has happened. Entries keep their places as long as anything refers to
//! them.
#![forbid(unsafe_code)]

use std::{cmp::Reverse, time::Instant};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Entry, Host, Label, Role, Service, cpus, drain, lifetime, report, survey::short_name};
use crate::{
    config,
    health::Health,
    moment,
    server::{Event, Instance, Server, State, Supervision, span},
};

/// Why a server is still the instance that it was to be before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReplaced {
    /// The one that was to replace it.
    pub instance: Instance,
    pub why: String,
    #[serde(with = "moment")]
    pub since: Instant,
}

impl NotReplaced {
    /// A sentence for the server's status.
    pub fn reason(&self, now: Instant) -> String {
        let ago = span(now.saturating_duration_since(self.since));
        format!("was not replaced {ago} ago: the new instance {}", self.why)
    }
}

impl Entry {
    /// A server, or an instance that is to be beside one, of which nothing runs. `newest`: all numbers up
    /// to this one are taken.
    pub(super) fn new(
        service: &config::Service,
        config: config::Server,
        role: Role,
        newest: Instance,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            policy: policy(service, &config, role)?,
            machine: Server::new(newest, Instant::now()),
            weight: config.weight,
            limit: config.limit,
            config,
            role,
            extra: false,
            not_replaced: None,
            drain: None,
            resumed: None,
            closing: drain::Closing::default(),
            health: Health::default(),
            checking: super::check::Checking::default(),
            cpus: cpus::Pinned::default(),
            run: None,
            total_before: 0,
            most_before: 0,
            ageing: lifetime::Ageing::default(),
            changed: true,
            gone: false,
        })
    }

    /// What it is called: `shop/1`, and beside that `shop/1@8`, after the number of the instance.
    pub(super) fn name(&self) -> String {
        match self.role {
            Role::Current => self.config.name.clone(),
            Role::Successor | Role::Leaving => format!("{}@{}", self.config.name, self.machine.instance()),
        }
    }

    /// It is a server of the service, whether or not it runs.
    pub(super) fn is_current(&self) -> bool {
        self.role == Role::Current && !self.gone
    }

    /// It is there, and is of the server with this name.
    pub(super) fn is_of(&self, server: &str) -> bool {
        !self.gone && self.config.name == server
    }

    /// This label is its, or an earlier instance's of the same server.
    pub(super) fn is_labelled(&self, label: &Label) -> bool {
        let is_same = match self.role {
            Role::Current => label.role == Role::Current,
            Role::Successor | Role::Leaving => label.machine.instance() == self.machine.instance(),
        };
        self.is_of(&label.server) && is_same
    }
}

impl Service {
    /// Has a further server, which the configuration has already.
    ///
    /// # Errors
    /// There is one of this name; or the service is being stopped.
    pub(super) fn add(&mut self, server: config::Server, host: &mut Host<'_>) -> anyhow::Result<()> {
        self.ensure_changeable()?;
        let name = server.name.clone();
        ensure!(self.find(&name).is_none(), "a server is called {name} already");
        // As if one had run: the first instances of a service need no slow start, and this one does.
        let newest = self.newest(&name).max(Instance(1));
        let entry = self.place(Entry::new(&self.config, server, Role::Current, newest)?);
        info!("server {name} is added");
        self.tell(entry, Event::Start, host);
        Ok(())
    }

    /// Does without a server, which the configuration has no more: it drains, is stopped, and is gone.
    ///
    /// # Errors
    /// It was adopted, and is not to be started again: that one can be released.
    pub(super) fn remove(&mut self, entry: usize, host: &mut Host<'_>) -> anyhow::Result<()> {
        let name = self.entries[entry].name();
        ensure!(self.entries[entry].is_current(), "server {name} is being removed already");
        ensure!(
            !self.is_guest(entry),
            "server {name} was adopted, and is not dist-ctl's to stop: release it instead"
        );
        info!("server {name} is removed");
        if let Some(successor) = self.successor_of(&name) {
            self.tell(successor, Event::Stop, host);
        }
        self.forget_troubles(entry);
        self.see_off(entry, host);
        Ok(())
    }

    /// Starts an instance of a server as it is configured now, which takes the place of the one that runs
    /// as soon as it is ready.
    ///
    /// # Errors
    /// It cannot run twice, because it was adopted; or it is being replaced already.
    pub(super) fn replace(&mut self, entry: usize, host: &mut Host<'_>) -> anyhow::Result<()> {
        self.ensure_changeable()?;
        self.ensure_startable(entry)?;
        let name = self.entries[entry].name();
        ensure!(self.successor_of(&name).is_none(), "server {name} is being replaced already");
        ensure!(
            !self.runs_as_guest(entry),
            "server {name} was adopted, and cannot run twice: it can be stopped and started again"
        );
        let (newest, server) = (self.newest(&name), self.entries[entry].config.clone());
        let mut successor = Entry::new(&self.config, server, Role::Successor, newest)?;
        successor.extra = self.entries[entry].extra;
        self.entries[entry].not_replaced = None;
        self.entries[entry].changed = true;
        let successor = self.place(successor);
        self.tell(successor, Event::Start, host);
        Ok(())
    }

    /// Stops a server, and starts it again as it is configured now. One that does not run is only started.
    ///
    /// # Errors
    /// It was adopted, and nobody knows what to start it with.
    pub(super) fn restart_in_place(&mut self, entry: usize, host: &mut Host<'_>) -> anyhow::Result<()> {
        self.ensure_changeable()?;
        self.ensure_startable(entry)?;
        self.entries[entry].not_replaced = None;
        match self.entries[entry].machine.state() {
            State::Starting { .. } | State::Ready { .. } => {
                self.tell(entry, Event::Stop, host);
                self.tell(entry, Event::Start, host);
            }
            State::Stopped { .. } => self.tell(entry, Event::Start, host),
            State::Backoff { .. } | State::Failed { .. } => self.tell(entry, Event::Resume, host),
            // If it was to be stopped; else it starts again anyway, or has to be resumed.
            State::Draining { .. } | State::Stopping { .. } => {
                self.tell(entry, Event::Start, host);
                self.tell(entry, Event::Resume, host);
            }
        }
        Ok(())
    }

    fn ensure_changeable(&self) -> anyhow::Result<()> {
        ensure!(!self.stopping, "service {} is being stopped", self.config.name);
        Ok(())
    }

    pub(super) fn ensure_startable(&self, entry: usize) -> anyhow::Result<()> {
        let name = self.entries[entry].name();
        ensure!(self.entries[entry].is_current(), "server {name} is about to be gone");
        ensure!(
            !self.is_guest(entry),
            "server {name} was adopted without a command, so nobody knows what to start it with: restart it \
             yourself, or release it and adopt it again with -- COMMAND"
        );
        Ok(())
    }

    /// It runs, and somebody else has started it.
    pub(super) fn runs_as_guest(&self, entry: usize) -> bool {
        self.entries[entry].run.as_ref().is_some_and(|run| run.guest.is_some())
    }

    /// The newest instance of a server, in any role.
    pub(super) fn newest(&self, server: &str) -> Instance {
        let its = self.entries.iter().filter(|entry| entry.config.name == server);
        its.map(|entry| entry.machine.instance()).max().unwrap_or(Instance(0))
    }

    /// The instance that is to take the place of this server.
    pub(super) fn successor_of(&self, server: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.is_of(server) && entry.role == Role::Successor)
    }

    /// Those that were this server and have not ended yet.
    pub(super) fn leaving(&self, server: &str) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.is_of(server) && entry.role == Role::Leaving)
    }

    /// Puts an entry where one of the same name was, or behind all others. Whatever is still on its way
    /// names entry and instance, and numbers of instances differ in the entries of one name.
    pub(super) fn place(&mut self, entry: Entry) -> usize {
        let is_free = |place: usize| {
            let old = &self.entries[place];
            let is_its = old.gone && old.config.name == entry.config.name;
            is_its && old.run.is_none() && self.retired.iter().all(|retired| retired.entry != Some(place))
        };
        match (0..self.entries.len()).find(|place| is_free(*place)) {
            Some(place) => {
                self.entries[place] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        }
    }

    /// The entries as people expect them: in the order of the configuration, and each server before
    /// those beside it.
    pub(super) fn in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.entries.len()).filter(|it| !self.entries[*it].gone).collect();
        order.sort_by_key(|entry| {
            let entry = &self.entries[*entry];
            let name = entry.config.name.clone();
            (entry.config.index, name, entry.role, Reverse(entry.machine.instance()))
        });
        order
    }

    /// A number of an instance is used by one entry of a server only.
    pub(super) fn tell_numbers(&mut self) {
        for entry in 0..self.entries.len() {
            let newest = self.newest(&self.entries[entry].config.name);
            self.entries[entry].machine.take_number(newest);
        }
    }

    /// A successor is ready: from this plan on it is the server, and the one before is not.
    pub(super) fn take_place(&mut self, successor: usize, host: &mut Host<'_>) {
        let name = self.entries[successor].config.name.clone();
        let before = self.find(&name);
        self.forget_troubles(successor);
        if let Some(run) = &mut self.entries[successor].run {
            run.included = true;
        }
        let config = self.entries[successor].config.clone();
        if let Ok(policy) = policy(&self.config, &config, Role::Current) {
            self.entries[successor].policy = policy;
        }
        self.entries[successor].role = Role::Current;
        if let Some(before) = before {
            self.forget_troubles(before);
            self.hand_on(before, successor);
        }
        self.write_plan();
        info!("server {name}: its instance {} serves now", self.entries[successor].machine.instance());
        if let Some(before) = before {
            self.see_off(before, host);
        }
    }

    /// What is of the server, and not of its instance, goes on in another entry.
    fn hand_on(&mut self, before: usize, after: usize) {
        let load = self.kernel.load().ok();
        let most = |run: &super::Running| load.as_ref().map(|it| report::most(it, run.slot, run.generation));
        let old = &mut self.entries[before];
        let now = old.run.as_ref().and_then(most).unwrap_or(0);
        if let Some(run) = &mut old.run {
            run.included = false;
        }
        let (total, most) = (std::mem::take(&mut old.total_before), old.most_before.max(now));
        let (drain, weight, limit) = (old.drain.take(), old.weight, old.limit);
        let (configured, machine) = ((old.config.weight, old.config.limit), old.machine.clone());
        (old.role, old.changed, old.not_replaced) = (Role::Leaving, true, None);
        let new = &mut self.entries[after];
        new.total_before += total;
        new.most_before = new.most_before.max(most);
        new.drain = drain;
        // What an operator has set since goes on too.
        if weight != configured.0 {
            new.weight = weight;
        }
        if limit != configured.1 {
            new.limit = limit;
        }
        new.machine.succeed(&machine);
        new.changed = true;
        for retired in self.retired.iter_mut().filter(|retired| retired.entry == Some(before)) {
            retired.entry = Some(after);
        }
    }

    /// The instances beside a server; none has any beside it.
    pub(super) fn beside(&self, entry: usize) -> Vec<Instance> {
        let it = &self.entries[entry];
        let is_beside = |other: &&Entry| other.is_of(&it.config.name) && other.role != Role::Current;
        let others = self.entries.iter().filter(|_| it.is_current()).filter(is_beside);
        others.map(|other| other.machine.instance()).collect()
    }

    /// One has come to be beside its server, or ends: the server's label says so.
    pub(super) fn note_beside(&mut self, entry: usize) {
        if self.entries[entry].role != Role::Current
            && let Some(server) = self.find(&self.entries[entry].config.name)
        {
            self.entries[server].changed = true;
        }
    }

    /// It is no server any more: it ends, unless it is about to.
    pub(super) fn see_off(&mut self, entry: usize, host: &mut Host<'_>) {
        self.entries[entry].role = Role::Leaving;
        self.entries[entry].changed = true;
        if !self.entries[entry].machine.is_ending() {
            self.tell(entry, Event::Stop, host);
        }
        self.depart(entry);
    }

    /// One that is only beside a server, or was one, and does not run, is gone.
    pub(super) fn depart(&mut self, entry: usize) {
        let it = &self.entries[entry];
        if it.gone || it.role == Role::Current || it.run.is_some() || it.machine.run().is_some() {
            return;
        }
        let (name, role) = (it.name(), it.role);
        self.note_beside(entry);
        self.forget_troubles(entry);
        let it = &mut self.entries[entry];
        (it.gone, it.changed) = (true, true);
        if role == Role::Leaving {
            return;
        }
        let why = match it.machine.state() {
            State::Failed { fault, .. } => fault.to_string(),
            // Somebody has stopped it.
            _ => "was stopped".to_owned(),
        };
        let (server, instance) = (it.config.name.clone(), it.machine.instance());
        let Some(current) = self.find(&server) else { return };
        warn!("server {name} {why}: it does not take the place of {server}, which goes on");
        let current = &mut self.entries[current];
        current.not_replaced = Some(NotReplaced { instance, why, since: Instant::now() });
        current.changed = true;
    }

    /// What is wrong with it is noted under its name, which it has no more in a moment.
    fn forget_troubles(&mut self, entry: usize) {
        let name = self.entries[entry].name();
        for what in troubles_of(&name) {
            self.note(&what, None);
        }
    }

    /// Removes the cgroups of instances that have ended. One whose last process has just gone is busy for
    /// a moment, and there is a new one for each instance.
    pub(super) fn sweep(&self) {
        for (short_name, number, cgroup) in self.instances() {
            let is_its = |entry: &Entry| {
                entry.config.short_name == short_name
                    && entry.run.as_ref().is_some_and(|run| run.instance.0 == number)
            };
            if !self.entries.iter().any(is_its) {
                // It is tried again as long as it is there.
                let _ = cgroup.remove();
            }
        }
    }

    /// The entry of what was found: there already, or made for it. `None`: of no use.
    pub(super) fn place_of(&mut self, label: &Label, has_process: bool) -> anyhow::Result<Option<usize>> {
        if let Some(entry) = self.entries.iter().position(|entry| entry.is_labelled(label)) {
            return Ok(Some(entry));
        }
        let is_extra = label.role == Role::Current && label.extra.is_some();
        if is_extra && (has_process || label.adopted.is_none()) {
            return self.place_again(label);
        }
        if label.adopted.is_some() || label.machine.run().is_none() && !has_process {
            return Ok(None);
        }
        self.place_beside(label).map(Some)
    }

    /// An entry for an instance that runs beside a server, or whose server is not configured any more.
    fn place_beside(&mut self, label: &Label) -> anyhow::Result<usize> {
        let configured = self.config.servers.iter().find(|server| server.name == label.server);
        let role = match (label.role, configured.is_some() || label.extra.is_some()) {
            (Role::Successor, true) => Role::Successor,
            _ => Role::Leaving,
        };
        let config = match (configured, self.config.servers.first()) {
            (Some(server), _) => server.clone(),
            (None, like) => {
                let like = like.context("a service has servers")?;
                let short_name = short_name(&label.server);
                let command = label.extra.clone().unwrap_or_default();
                config::Server { name: label.server.clone(), short_name, command, ..like.clone() }
            }
        };
        let mut entry = Entry::new(&self.config, config, role, label.machine.instance())?;
        entry.extra = label.extra.is_some();
        Ok(self.place(entry))
    }
}

/// The names under which something may be noted of a server.
fn troubles_of(name: &str) -> [String; 6] {
    let of = |what: &str| format!("{what} {name}");
    let checks = super::check::checks_of(name);
    [name.to_owned(), of("listeners of"), of("watch"), of("CPUs of"), drain::closing_of(name), checks]
}

/// What decides about an instance in this role.
pub(super) fn policy(
    service: &config::Service,
    server: &config::Server,
    role: Role,
) -> anyhow::Result<Supervision> {
    let once = role == Role::Successor;
    Ok(Supervision { once, ..Supervision::of(service, server)? })
}
