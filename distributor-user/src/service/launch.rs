//! Starting an instance of a server, and finding one again that already runs.

use std::{
    cmp::Reverse,
    collections::HashSet,
    os::fd::AsFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use distributor_ebpf::contract::{Home, Plan, ROOM, Run as KernelRun, SLOTS};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::{
    Entry, Host, Launch, Listeners, NotReplaced, Role, Running, Service,
    adopt::{self, Adopted, Guest},
    cpus::Pinned,
    load::{Said, Strain},
    notified::Hearing,
    role,
};
use crate::{
    config::{self, SocketMode},
    distributor::Input,
    drain::Drain,
    error, foreign,
    health::Health,
    launch::{self, Exec, Limit, Socket},
    link::{Child, Held},
    message::ToMonitor,
    moment::Moment,
    notify::{self, NotifySocket},
    plan, record,
    server::{self, Instance, Main, Report, Server},
};

/// What the next distributor has to know of a server. The monitor keeps it with the server's
/// process, and the record on disk has that of every server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Label {
    pub service: String,
    /// Its full name, `shop/1`.
    pub server: String,
    /// Whether this instance is the server, or beside it.
    #[serde(default)]
    pub role: Role,
    pub machine: Server,
    /// Of the instance that runs, or is about to.
    pub run: Option<Ran>,
    /// Live: the configuration's, or what an operator set since.
    pub weight: u32,
    pub limit: Option<u32>,
    /// An operator has taken it out, and that holds until he resumes it.
    #[serde(default)]
    pub drain: Option<Drain>,
    /// What its checks have come to.
    #[serde(default)]
    pub health: Health,
    /// Of ended instances that have no connections any more.
    pub total_before: u64,
    pub most_before: u64,
    /// Slots of ended instances that still have some, and LOAD's total when each was taken.
    pub retired: Vec<(u32, u64)>,
    /// When an operator has put it back.
    #[serde(default)]
    pub resumed: Option<Moment>,
    /// It was started by somebody else.
    #[serde(default)]
    pub adopted: Option<Adopted>,
    /// It is none of the configuration's: what it is started with again.
    #[serde(default)]
    pub extra: Option<Vec<String>>,
    /// It was to be replaced, and is not.
    #[serde(default)]
    pub not_replaced: Option<NotReplaced>,
    /// All instances that are beside it. What else is known of one is not true any more.
    #[serde(default)]
    pub beside: Vec<Instance>,
    /// Which CPUs it has.
    #[serde(default)]
    pub cpus: Pinned,
    /// What its instance has said of its load, and what came of that.
    #[serde(default)]
    pub said: Option<Said>,
}

/// An instance's place in the kernel's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    pub slot: u32,
    pub generation: u32,
    /// LOAD's total of the slot when it was taken.
    pub base: u64,
    /// What it was started with: a hash of its job.
    pub job: u64,
}

/// How a distributor comes to what it takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Succession {
    /// It follows another one of the same monitor, and goes on where that was.
    Next,
    /// It is the first one of its monitor. What runs goes on, and what was wanted of it before
    /// counts no more: the configuration does.
    First,
}

/// A server to be taken over.
pub struct Found {
    pub label: Label,
    /// Its process, if the monitor knows of one.
    pub child: Option<Child>,
}

impl Service {
    /// Starts an instance: its own slot, cgroup and notify socket, then the launcher.
    pub(super) fn launch(
        &mut self,
        entry: usize,
        instance: Instance,
        host: &mut Host<'_>,
    ) -> anyhow::Result<()> {
        // It is nobody else's from now on.
        self.tell_numbers();
        self.note_beside(entry);
        let load = self.kernel.load()?;
        let slot = self.slots.take()?;
        self.generation = self.generation.wrapping_add(1);
        let (generation, base) = (self.generation, load.total[slot as usize]);
        let (cgroup, notify_path) = self.places_of(entry, instance, host);
        self.seat(entry);
        // From here on `retire` gives everything back, whatever fails.
        self.entries[entry].run = Some(Running {
            instance,
            id: host.link.number(),
            pid: None,
            start_time: None,
            launch: Launch::Nothing,
            exit: None,
            cgroup: cgroup.clone(),
            cgroup_id: 0,
            slot,
            generation,
            base,
            job: self.job(entry)?,
            listeners: vec![Listeners::default(); self.config.listen.len()],
            included: false,
            draining: false,
            emptying: false,
            unkilled: false,
            unwatched: false,
            notify: None,
            strain: Strain::default(),
            queue: None,
            guest: None,
        });
        cgroup.create()?;
        let cgroup_id = cgroup.id().context("read the number of a cgroup")?;
        let notify = match self.listen_to(entry, instance, notify_path.clone(), None, host) {
            Ok(notify) => Some(notify),
            // It can do without, as on a full disk it has to.
            Err(error) if !self.needs_notify(entry) => {
                let name = self.entries[entry].name();
                warn!("server {name}: {}; starts it without NOTIFY_SOCKET", error::sentence(&error));
                None
            }
            Err(error) => return Err(error),
        };
        let mut exec = self.exec(entry, cgroup.path().to_owned());
        if notify.is_some() {
            exec.environment.push(("NOTIFY_SOCKET".to_owned(), notify_path.to_string_lossy().into_owned()));
        }
        let label = self.label(entry);
        let run = self.entries[entry].run.as_mut().context("the instance was just made")?;
        run.cgroup_id = cgroup_id;
        run.notify = notify;
        let (theirs, ours) = launch::pair().context("make a socket for the launcher")?;
        let start = ToMonitor::Start { id: run.id, label: serde_json::to_vec(&label)? };
        run.launch = Launch::UnderWay;
        host.link.send(&start, Some(theirs.as_fd()))?;
        let (inputs, service) = (host.inputs.clone(), self.number);
        tokio::task::spawn_local(async move {
            let result = launch::send_job(ours, &exec).await;
            // The loop is gone only when everything stops.
            let _ = inputs.send(Input::Launched { service, entry, instance, result });
        });
        Ok(())
    }

    /// Takes over what earlier distributors started. Nothing is taken out of the kernel's maps that
    /// is still there, and no plan is written before [`Service::start`]: connections are steered
    /// by the last one all the time.
    ///
    /// `sockets` are those on which servers say what they say; its own are taken out of them.
    ///
    /// Returns those children that are of no server of this service any more.
    pub fn take_over(
        &mut self,
        mut found: Vec<Found>,
        succession: Succession,
        sockets: &mut notify::Held,
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<Child>> {
        if succession == Succession::Next {
            self.keep_limits()?;
        }
        latest_first(&mut found);
        let (found, mut strangers) = role::settle(found);
        let mut chosen: Vec<(usize, Found)> = Vec::new();
        for found in found {
            match self.place_of(&found.label, found.child.is_some())? {
                Some(entry) if chosen.iter().all(|(other, _)| *other != entry) => chosen.push((entry, found)),
                _ => strangers.extend(found.child),
            }
        }
        // With new maps (the old ones were removed by somebody) places of before mean nothing.
        let load = self.kernel.load()?;
        let holds = |slot: u32, base: u64| load.total.get(slot as usize).is_some_and(|total| *total >= base);
        for (_, Found { label, .. }) in &mut chosen {
            label.run = label.run.filter(|ran| holds(ran.slot, ran.base));
            label.retired.retain(|&(slot, base)| holds(slot, base));
        }
        // All of them, before one that has died meanwhile is started in another slot.
        for (entry, Found { label, .. }) in &chosen {
            self.remember(*entry, label, succession);
        }
        self.tell_numbers();
        self.retire_unclaimed()?;
        let plan = self.kernel.plan()?;
        let homes = self.kernel.homes()?;
        for (entry, Found { label, child }) in &chosen {
            if label.machine.run().is_some() {
                self.take_over_run(*entry, label, child.as_ref(), sockets, host)?;
                self.find_listeners(*entry, &plan, &homes);
            }
        }
        self.forget_homes(homes);
        for (entry, Found { label, child }) in &chosen {
            self.catch_up(*entry, label, child.as_ref(), host);
        }
        Ok(strangers)
    }

    /// What outlives an instance.
    fn remember(&mut self, entry: usize, label: &Label, succession: Succession) {
        let server = &mut self.entries[entry];
        if succession == Succession::Next {
            (server.weight, server.limit) = (label.weight, label.limit);
        }
        // Of all that was said, this holds under another monitor too: what is not to be reached must not
        // be reached because something else was killed.
        (server.drain, server.resumed) = (label.drain, label.resumed);
        server.health = label.health.clone();
        server.cpus = label.cpus.clone();
        (server.total_before, server.most_before) = (label.total_before, label.most_before);
        server.not_replaced.clone_from(&label.not_replaced);
        server.machine = match (succession, server.role) {
            (Succession::First, Role::Current) => label.machine.clone().afresh(Instant::now()),
            // What is beside a server goes on as it was meant to: the server does not depend on it.
            (Succession::First, Role::Successor | Role::Leaving) | (Succession::Next, _) => {
                label.machine.clone()
            }
        };
        for &(slot, base) in &label.retired {
            if self.slots.claim(slot).is_ok() {
                self.retired.push(super::Retired { slot, entry: Some(entry), base });
            }
        }
        if let Some(ran) = label.run {
            // If the slot is somebody else's, it gets one of its own below.
            let _ = self.slots.claim(ran.slot);
            self.generation = self.generation.max(ran.generation);
        }
    }

    fn take_over_run(
        &mut self,
        entry: usize,
        label: &Label,
        child: Option<&Child>,
        sockets: &mut notify::Held,
        host: &mut Host<'_>,
    ) -> anyhow::Result<()> {
        let machine = &self.entries[entry].machine;
        let instance = machine.instance();
        let (included, draining, emptying) =
            (machine.is_included(), machine.awaits_drain(), machine.awaits_empty());
        let main = machine.run().map(server::Run::main);
        let (cgroup, notify_path) = self.places_of(entry, instance, host);
        let held = notify::name(&notify_path).and_then(|name| sockets.remove(name));
        // A server that somebody else started knows of no such socket.
        let notify = match label.adopted {
            None => match self.listen_to(entry, instance, notify_path, held, host) {
                Ok(notify) => Some(notify),
                // Then what it says is not heard, and it serves all the same.
                Err(error) => {
                    warn!("server {}: {}", self.entries[entry].name(), error::sentence(&error));
                    None
                }
            },
            Some(_) => None,
        };
        let ran = match label.run {
            Some(ran) => ran,
            None => {
                let slot = self.slots.take()?;
                self.generation = self.generation.wrapping_add(1);
                let base = self.kernel.load()?.total[slot as usize];
                Ran { slot, generation: self.generation, base, job: 0 }
            }
        };
        self.entries[entry].run = Some(Running {
            instance,
            // Without a child nobody is ever told this number.
            id: child.map_or(0, |child| child.id),
            pid: child.map(|child| child.pid),
            start_time: child.and_then(|child| record::start_time(child.pid)),
            launch: if main == Some(Main::Launching) { Launch::UnderWay } else { Launch::Running },
            exit: None,
            cgroup_id: cgroup.id().unwrap_or(0),
            cgroup,
            slot: ran.slot,
            generation: ran.generation,
            base: ran.base,
            job: ran.job,
            listeners: vec![Listeners::default(); self.config.listen.len()],
            included,
            draining,
            emptying,
            unkilled: false,
            unwatched: false,
            notify,
            strain: Strain::of(label.said),
            queue: None,
            guest: label.adopted.clone().map(Guest::new),
        });
        if let (Some(_), Some(run)) = (&label.adopted, &mut self.entries[entry].run) {
            (run.cgroup, run.cgroup_id) = (adopt::nobodys(&self.cgroup), u64::MAX);
        }
        Ok(())
    }

    /// The listeners of an instance, as the last plan has them: at the same places of SOCKETS, so
    /// that they never leave it.
    fn find_listeners(&mut self, entry: usize, plan: &Plan, homes: &[(u64, Home)]) {
        let Some(run) = &mut self.entries[entry].run else { return };
        for (group, them) in run.listeners.iter_mut().enumerate() {
            let KernelRun { first, len } = plan.runs[group * SLOTS + run.slot as usize];
            let (first, len) = (u32::from(first), u32::from(len));
            let cookie_at = |index: u32| {
                let home = Home { slot: run.slot, index };
                // One that has closed is remembered for a while; a later socket has a higher cookie.
                homes.iter().filter(|(_, its)| *its == home).map(|(cookie, _)| *cookie).max()
            };
            // Without one of them they are adopted anew.
            let Some(cookies) = (first..first + len).map(cookie_at).collect::<Option<Vec<u64>>>() else {
                continue;
            };
            let places = len.next_power_of_two().max(super::RUN);
            if len > 0 && self.indices.claim(first, places).is_ok() {
                *them = Listeners { first, places, cookies };
            }
        }
    }

    /// Brings a server up to date with what has happened since its label was written.
    fn catch_up(&mut self, entry: usize, label: &Label, child: Option<&Child>, host: &mut Host<'_>) {
        let Some(run) = &self.entries[entry].run else { return };
        let name = self.entries[entry].name();
        match run.pid {
            Some(pid) => info!("server {name} was found running (pid {pid})"),
            None => info!("server {name} was found running"),
        }
        if run.launch == Launch::UnderWay {
            // Or had, and has left processes that do, as a daemon's first one does.
            let has_run = run.cgroup.processes().into_iter().any(launch::is_server);
            if has_run {
                self.launched(entry, run.instance, Ok(()), host);
            } else {
                if let Some(run) = &mut self.entries[entry].run {
                    run.launch = Launch::Failed;
                }
                self.report(entry, Report::LaunchInterrupted, host);
            }
        }
        let Some(run) = &self.entries[entry].run else { return };
        let listening = run.listeners.iter().enumerate().filter(|(_, them)| !them.cookies.is_empty());
        for address in listening.map(|(group, _)| group).collect::<Vec<_>>() {
            self.report(entry, Report::ListenerAdopted { address }, host);
        }
        if !self.scan(entry, None, host) {
            self.scan_again(entry, None);
        }
        // Its pins were removed together with the distributor before us: nothing reaches it yet.
        let lacking: Vec<usize> = match &self.entries[entry].run {
            Some(run) if run.included => {
                (0..run.listeners.len()).filter(|group| run.listeners[*group].cookies.is_empty()).collect()
            }
            _ => Vec::new(),
        };
        for address in lacking {
            self.report(entry, Report::ListenerGone { address }, host);
        }
        if let Some(adopted) = &label.adopted {
            let listeners =
                foreign::find(adopted.pid, &self.config.listen, &self.ours()).map(|server| server.listeners);
            self.note_earlier(entry, &listeners.unwrap_or_default(), host);
        }
        // Nobody listened for a while.
        self.excuse(entry, host);
        if let Some(exit) = child.and_then(|child| child.exit) {
            self.exited(entry, exit, host);
        }
    }

    /// What an earlier distributor's listeners are filed under, if nobody has them any more.
    /// Rooms are the attendant's.
    fn forget_homes(&mut self, homes: Vec<(u64, Home)>) {
        let runs = self.entries.iter().filter_map(|entry| entry.run.as_ref());
        let them: Vec<&Listeners> = runs.flat_map(|run| &run.listeners).collect();
        let kept: HashSet<u64> = them.iter().flat_map(|them| them.cookies.iter().copied()).collect();
        let taken: HashSet<u32> =
            them.iter().flat_map(|them| (them.first..).take(them.cookies.len())).collect();
        for (cookie, home) in homes {
            if home.slot != ROOM && !kept.contains(&cookie) {
                // HOME knows a listener for a while after it has closed, and its place may be
                // another one's by now, who would get nothing any more.
                if !taken.contains(&home.index) {
                    self.kernel.vacate(home.index);
                }
                self.left.push_back((Instant::now() + super::HOME_STAYS, cookie));
            }
        }
    }

    /// Slots that hold connections of instances which ended while nobody watched: not to be
    /// used before these are closed.
    fn retire_unclaimed(&mut self) -> anyhow::Result<()> {
        let load = self.kernel.load()?;
        for slot in 0..load.word.len() as u32 {
            if super::places(&load, slot) > 0 && self.slots.claim(slot).is_ok() {
                self.retired.push(super::Retired { slot, entry: None, base: load.total[slot as usize] });
            }
        }
        Ok(())
    }

    /// It would be taken for one that fails if it could say nothing.
    fn needs_notify(&self, entry: usize) -> bool {
        self.config.readiness == config::Readiness::Notify || self.entries[entry].config.watchdog.is_some()
    }

    /// The cgroup and the notify socket of an instance.
    fn places_of(
        &self,
        entry: usize,
        instance: Instance,
        host: &Host<'_>,
    ) -> (crate::cgroup::Cgroup, PathBuf) {
        let short = &self.entries[entry].config.short_name;
        let cgroup = self.cgroup.child(&format!("{short}.{}", instance.0));
        let socket = format!("{}.{short}.{}", self.config.name, instance.0);
        (cgroup, host.place.notify_dir().join(socket))
    }

    /// Passes on what the instance says through sd_notify, and has the monitor hold the socket.
    fn listen_to(
        &self,
        entry: usize,
        instance: Instance,
        path: PathBuf,
        held: Option<Held>,
        host: &mut Host<'_>,
    ) -> anyhow::Result<Hearing> {
        let (key, socket) = match held {
            Some(Held { key, fd, .. }) => {
                let context = || format!("take over notify socket {}", path.display());
                (key, NotifySocket::inherited(fd, path.clone()).with_context(context)?)
            }
            None => {
                let label = notify::label(&path);
                let socket = NotifySocket::bind(path, super::uid(&self.config))?;
                let key = host.link.number();
                host.link.send(&ToMonitor::Hold { key, label }, Some(socket.descriptor()))?;
                (key, socket)
            }
        };
        let (inputs, service) = (host.inputs.clone(), self.number);
        let task = tokio::task::spawn_local(async move {
            loop {
                let sent = match socket.receive().await {
                    Ok(message) => inputs.send(Input::Notified { service, entry, instance, message }),
                    Err(error) => {
                        warn!("read {}: {error}; goes on", socket.path().display());
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        Ok(Hearing::new(task, key))
    }

    pub(super) fn exec(&self, entry: usize, cgroup: PathBuf) -> Exec {
        let Entry { config, cpus, .. } = &self.entries[entry];
        Exec { cpus: cpus.now.clone(), cgroup, ..exec_of(&self.config, config) }
    }

    /// What the next distributor has to know of a server.
    pub(super) fn label(&self, entry: usize) -> Label {
        let server = &self.entries[entry];
        let retired = self.retired.iter().filter(|retired| retired.entry == Some(entry));
        Label {
            service: self.config.name.clone(),
            server: server.config.name.clone(),
            role: server.role,
            machine: server.machine.clone(),
            run: server.run.as_ref().map(|run| Ran {
                slot: run.slot,
                generation: run.generation,
                base: run.base,
                job: run.job,
            }),
            weight: server.weight,
            limit: server.limit,
            drain: server.drain,
            resumed: server.resumed,
            health: server.health.clone(),
            total_before: server.total_before,
            most_before: server.most_before,
            retired: retired.map(|retired| (retired.slot, retired.base)).collect(),
            extra: server.extra.then(|| server.config.command.clone()),
            not_replaced: server.not_replaced.clone(),
            beside: self.beside(entry),
            cpus: server.cpus.clone(),
            said: server.run.as_ref().and_then(|run| run.strain.said()),
            adopted: server.run.as_ref().and_then(|run| Some(run.guest.as_ref()?.adopted.clone())),
        }
    }

    /// Has the monitor keep what has changed of the servers. False if nothing has.
    pub fn relabel(&mut self, host: &mut Host<'_>) -> bool {
        let mut changed = std::mem::take(&mut self.audit.changed);
        changed |= std::mem::take(&mut self.roll_changed);
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        // Each server before those beside it: see `role::settle`.
        order.sort_by_key(|entry| self.entries[*entry].role);
        for entry in order {
            if !std::mem::take(&mut self.entries[entry].changed) {
                continue;
            }
            changed = true;
            let label = self.label(entry);
            let Some(run) = &self.entries[entry].run else { continue };
            let sent = serde_json::to_vec(&label)
                .map_err(anyhow::Error::from)
                .and_then(|label| host.link.send(&ToMonitor::Relabel { id: run.id, label }, None));
            if let Err(error) = sent {
                debug!("server {}: {error:#}; a next distributor knows an older state of it", label.server);
            }
        }
        changed
    }

    /// What is recorded of it.
    pub fn record(&self) -> record::Service {
        let server = |entry: usize| record::Server {
            label: self.label(entry),
            start_time: self.entries[entry].run.as_ref().and_then(|run| run.start_time),
        };
        record::Service {
            name: self.config.name.clone(),
            uid: super::uid(&self.config),
            servers: (0..self.entries.len()).filter(|entry| !self.entries[*entry].gone).map(server).collect(),
            released: self.released.clone(),
            drift: self.drift(),
            roll: self.roll.clone(),
        }
    }

    /// A hash of what a server is started with, as far as the configuration says it.
    pub(super) fn job(&self, entry: usize) -> anyhow::Result<u64> {
        job_of(&self.config, &self.entries[entry].config)
    }
}

/// The same of a configuration.
pub(super) fn job_of(service: &config::Service, server: &config::Server) -> anyhow::Result<u64> {
    // What is not configured differs from shell to shell.
    let exec = Exec { environment: server.own_environment.clone(), ..exec_of(service, server) };
    Ok(plan::hash(&serde_json::to_vec(&exec)?))
}

/// What a server is started with, but for what differs from instance to instance: cgroup and CPUs.
fn exec_of(service: &config::Service, server: &config::Server) -> Exec {
    Exec {
        command: server.command.clone(),
        environment: server.environment.clone(),
        directory: server.directory.clone(),
        user: service.user.as_ref().map(Into::into),
        umask: Some(server.umask),
        limits: server
            .limits
            .iter()
            .map(|&(resource, limit)| Limit { resource, soft: limit, hard: limit })
            .collect(),
        cpus: Vec::new(),
        cgroup: PathBuf::new(),
        stdout: (&server.output).into(),
        stderr: (&server.errors).into(),
        socket: match service.socket {
            SocketMode::Own => Socket::Own,
            SocketMode::Systemd => Socket::Systemd(service.listen.clone()),
            SocketMode::Stdin => Socket::Stdin(service.listen[0]),
        },
        backlog: service.backlog,
        watchdog: server.watchdog,
    }
}

/// Orders what was found of servers so that of each what was written last comes first. One that was
/// launched may be known beside the instance before it, and what was recorded beside what the
/// monitor keeps: who comes with a process stands before what was recorded, and stays there.
pub(crate) fn latest_first(found: &mut [Found]) {
    found.sort_by_key(|found| Reverse(found.label.age()));
}

/// Whether a server runs by its record, and the monitor knows nothing of that. An earlier distributor
/// knew better, and could not write it down; or the monitor could not watch it.
pub(crate) fn is_unaccounted(recorded: &Label, known: &[Found]) -> bool {
    let (name, instance) = (&recorded.server, recorded.machine.instance());
    let both_are = |role: Role, found: &Found| recorded.role == role && found.label.role == role;
    let knows = |found: &Found| {
        let its = found.label.machine.instance();
        found.label.server == *name && (its == instance || its > instance && both_are(Role::Current, found))
    };
    recorded.machine.run().is_some() && !known.iter().any(knows)
}

impl Label {
    /// Of two labels of a server, the one with more of this was written later.
    fn age(&self) -> (u32, bool) {
        (self.machine.instance().0, self.machine.run().is_none())
    }
}
