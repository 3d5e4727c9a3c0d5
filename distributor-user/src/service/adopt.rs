//! Servers that somebody else started, as servers of the service, and given back.
//!
//! What has to be done to their sockets, foreign.rs does, in the order that ARCHITECTURE.md
//! explains. Here they get a slot, a place in the plan and somebody who watches them. Nothing of
//! theirs is killed, unless they were given a command to be started with again: then they are
//! servers like any other.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use distributor_ebpf::contract::ROOM;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::{
    Entry, Host, Launch, Listeners, Retired, Role, Running, Service, load::Strain, survey::short_name,
};
use crate::{
    cgroup::Cgroup,
    config,
    foreign::{self, Before, EarlierConnections, Foreign},
    kernel::{self, Ledger},
    link::Child,
    listener,
    message::ToMonitor,
    record,
    server::{self, Main, Remedies, Server, Supervision},
    sock_diag::{self, States},
};

/// Connections whose options are restored at the end. Beyond, they keep SO_REUSEADDR, which
/// changes nothing for them.
const RESTORED: usize = 256;
/// How long those who wait may take to get to an adopted server at the end.
const EMPTYING: Duration = Duration::from_secs(2);
/// How long rooms may take to close before a server gets its address back.
const CLOSING: Duration = Duration::from_secs(5);

/// What the next distributor has to know of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adopted {
    pub pid: u32,
    /// See `record::start_time`.
    pub start_time: u64,
    /// What it is started with again. Empty: it is not.
    pub command: Vec<String>,
    /// By the cookie of each listener, what that was like before.
    pub before: Vec<(u64, Before)>,
    /// The number of the cgroup in which its connections are counted.
    pub counted_in: u64,
    /// What it was called, without its service.
    #[serde(default)]
    pub name: String,
}

impl Adopted {
    fn has(&self, cookie: u64) -> bool {
        self.before.iter().any(|(its, _)| *its == cookie)
    }

    fn cookies(&self) -> HashSet<u64> {
        self.before.iter().map(|(cookie, _)| *cookie).collect()
    }
}

/// A server that was adopted and runs.
pub(super) struct Guest {
    pub(super) adopted: Adopted,
    /// Connections that it had before.
    earlier: EarlierConnections,
    /// So many of them are open still.
    pub(super) earlier_open: u32,
}

impl Guest {
    pub(super) fn new(adopted: Adopted) -> Self {
        Self { adopted, earlier: EarlierConnections::default(), earlier_open: 0 }
    }
}

/// What the label of a server begins with that was released; its service and the rest follow.
pub const RELEASED: &[u8] = b"released ";

/// Whose such a label is.
pub fn released_by(label: &[u8]) -> Option<(String, Adopted)> {
    serde_json::from_slice(label.strip_prefix(RELEASED)?).ok()
}

/// A server's listeners, made fit for the service's group.
pub struct Shared {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
    server: foreign::Server,
    before: Vec<Before>,
    /// What they were like before an adoption that was interrupted.
    first: Vec<(u64, Before)>,
}

impl Shared {
    /// Finds the listeners of a process on the addresses of a service, and changes nothing.
    ///
    /// # Errors
    /// A sentence that says what is wrong with that process.
    pub fn find(pid: u32, config: &config::Service, ours: &[u32]) -> anyhow::Result<Self> {
        let server = foreign::find(pid, &config.listen, ours)?;
        let listens = |address: usize| server.listeners.iter().any(|it| it.address == address);
        if let Some(missing) = (0..config.listen.len()).find(|address| !listens(*address)) {
            bail!("adopt process {pid}: it does not listen on {}", config.listen[missing]);
        }
        let pid = server.main;
        let start_time = record::start_time(pid);
        let watched =
            start_time.and_then(|start_time| Some((start_time, record::process_since(pid, start_time)?)));
        let (start_time, pidfd) = watched.with_context(|| format!("adopt process {pid}: it is gone"))?;
        Ok(Self { pid, start_time, pidfd, server, before: Vec::new(), first: Vec::new() })
    }

    /// What is to be known of it before anything is changed.
    pub fn intent(&self, name: &str, command: &[String]) -> anyhow::Result<Adopted> {
        let mut before = self.first.clone();
        if before.is_empty() {
            for listener in &self.server.listeners {
                before.push((listener.cookie, foreign::look(listener.fd.as_fd())?));
            }
        }
        Ok(Adopted {
            pid: self.pid,
            start_time: self.start_time,
            command: command.to_vec(),
            before,
            counted_in: 0,
            name: name.to_owned(),
        })
    }

    /// It was being adopted before, and that was not finished.
    pub fn resume(&mut self, interrupted: &Adopted) {
        self.first.clone_from(&interrupted.before);
    }

    /// Makes the listeners fit for the service's group. No connection is distributed by that yet.
    /// [`Shared::undo`] takes it back, also what was done before it failed.
    pub fn share(&mut self, config: &config::Service) -> anyhow::Result<()> {
        for listener in &self.server.listeners {
            let made = foreign::share(listener.fd.as_fd(), super::uid(config), &self.server.processes)?;
            let first = self.first.iter().find(|(cookie, _)| *cookie == listener.cookie);
            self.before.push(match first {
                Some((_, first)) => first.clone().and(&made),
                None => made,
            });
        }
        Ok(())
    }

    /// Leaves the server as it was, and alone: everybody else has left its groups.
    pub fn give_back(&self) {
        for (listener, before) in self.server.listeners.iter().zip(&self.before) {
            if let Err(error) = released(listener.fd.as_fd(), before, &self.server.processes) {
                warn!("process {}: {error:#}", self.pid);
            }
        }
    }

    /// Leaves the server as it was.
    pub fn undo(&self) {
        for (listener, before) in self.server.listeners.iter().zip(&self.before) {
            if let Err(error) = foreign::unshare(listener.fd.as_fd(), before, &self.server.processes) {
                warn!("process {} keeps other socket options than before: {error:#}", self.pid);
            }
        }
    }
}

impl Service {
    /// Whether a server of it has those listeners.
    pub fn has(&self, shared: &Shared) -> bool {
        let runs = self.entries.iter().filter_map(|entry| entry.run.as_ref());
        let mut cookies = runs.flat_map(|run| &run.listeners).flat_map(|them| &them.cookies);
        cookies.any(|cookie| shared.server.listeners.iter().any(|listener| listener.cookie == *cookie))
    }

    /// Makes a server of somebody else's one of the service's: from here on it gets its share.
    pub fn adopt(
        &mut self,
        shared: &Shared,
        name: &str,
        command: Vec<String>,
        host: &mut Host<'_>,
    ) -> anyhow::Result<()> {
        ensure!(!self.closing, "service {} is being stopped", self.config.name);
        // Before any of its listeners is tagged: what is tagged must be counted.
        let cgroup = foreign::cgroup(&shared.server.listeners[0])?;
        let mut before: Vec<(u64, Before)> = shared
            .server
            .listeners
            .iter()
            .zip(&shared.before)
            .map(|(listener, before)| (listener.cookie, fewer(before.clone())))
            .collect();
        // If it was released, what it is like now is our doing.
        for (cookie, before) in &mut before {
            let known = self.released.iter().flat_map(|released| &released.before);
            if let Some((_, first)) = known.clone().find(|(known, _)| known == cookie) {
                *before = first.clone().and(before);
            }
        }
        let adopted = Adopted {
            pid: shared.pid,
            start_time: shared.start_time,
            command,
            before,
            counted_in: self.kernel.count_in(&cgroup)?,
            name: name.to_owned(),
        };
        let load = self.kernel.load()?;
        let slot = self.slots.take()?;
        let entry = self.place_for(name, &adopted.command).inspect_err(|_| self.slots.give_back(slot))?;
        self.released.retain(|released| released.before.iter().all(|(cookie, _)| !adopted.has(*cookie)));
        self.entries[entry].machine = Server::found(
            self.entries[entry].machine.instance().next(),
            server::Run::found(shared.pid, Instant::now()),
            Instant::now(),
            &self.entries[entry].policy,
        );
        self.generation = self.generation.wrapping_add(1);
        let base = load.total[slot as usize];
        let id = host.link.number();
        self.entries[entry].run = Some(Running {
            instance: self.entries[entry].machine.instance(),
            id,
            pid: Some(shared.pid),
            start_time: Some(shared.start_time),
            launch: Launch::Running,
            exit: None,
            cgroup: nobodys(&self.cgroup),
            cgroup_id: u64::MAX,
            slot,
            generation: self.generation,
            base,
            job: 0,
            listeners: vec![Listeners::default(); self.config.listen.len()],
            included: false,
            draining: false,
            emptying: false,
            unkilled: false,
            unwatched: false,
            notify: None,
            strain: Strain::default(),
            queue: None,
            guest: Some(Guest::new(adopted)),
        });
        self.entries[entry].changed = true;
        self.watch(entry, shared.pidfd.as_fd(), host);
        info!("server {} is adopted (pid {})", self.entries[entry].name(), shared.pid);
        self.scan(entry, None, host);
        self.note_earlier(entry, &shared.server.listeners, host);
        self.write_plan();
        Ok(())
    }

    /// An entry for a server of that name: a new one, or that of one that was released.
    pub(super) fn place_for(&mut self, short_name: &str, command: &[String]) -> anyhow::Result<usize> {
        let name = format!("{}/{short_name}", self.config.name);
        ensure!(
            !self.entries.iter().any(|entry| entry.is_of(&name)),
            "a server is called {name} already: give it another --name"
        );
        let released = |entry: &Entry| entry.config.name == name && entry.role == Role::Current;
        if let Some(entry) = self.entries.iter().position(released) {
            let entry_ = &mut self.entries[entry];
            (entry_.gone, entry_.drain, entry_.extra) = (false, None, true);
            entry_.config.command = command.to_vec();
            entry_.policy.remedies = remedies(&self.config, &entry_.config)?;
            return Ok(entry);
        }
        // It is a server of the service in everything that the configuration says of all.
        let like = self.config.servers.first().context("a service has servers")?;
        let config = config::Server {
            short_name: short_name.to_owned(),
            index: self.entries.iter().map(|entry| entry.config.index).max().unwrap_or(0) + 1,
            command: command.to_vec(),
            name,
            ..like.clone()
        };
        let newest = self.newest(&config.name);
        let entry = Entry::new(&self.config, config, Role::Current, newest)?;
        let remedies = remedies(&self.config, &entry.config)?;
        let policy = Supervision { remedies, ..entry.policy };
        Ok(self.place(Entry { extra: true, policy, ..entry }))
    }

    /// Finds an adopted server again that an earlier distributor had. `None`: it is gone.
    pub(super) fn place_again(&mut self, label: &super::Label) -> anyhow::Result<Option<usize>> {
        let Some(command) = &label.extra else { return Ok(None) };
        self.place_for(&short_name(&label.server), command).map(Some)
    }

    /// Has the monitor watch an adopted server again, after its predecessor's death. `None`: it
    /// has ended meanwhile, and whoever started it knows why.
    pub(super) fn watch_again(
        &self,
        recorded: &record::Server,
        host: &mut Host<'_>,
    ) -> anyhow::Result<Option<Child>> {
        let Some(Adopted { pid, start_time, .. }) = recorded.label.adopted else { return Ok(None) };
        let main = recorded.label.machine.run().map(server::Run::main);
        if main != Some(Main::Running { pid }) {
            return Ok(None);
        }
        let Some(pidfd) = record::process_since(pid, start_time) else { return Ok(None) };
        let (id, label) = (host.link.number(), serde_json::to_vec(&recorded.label)?);
        let watch = ToMonitor::Watch { id, pid, label: label.clone() };
        host.link.send(&watch, Some(pidfd.as_fd()))?;
        Ok(Some(Child { id, pid, label, exit: None }))
    }

    /// Adopted servers of which `recorded` says nothing, because it was lost or could not be
    /// written: they have listeners that HOME knows and that are no server's of ours. What they
    /// were called, and like before, nobody knows any more.
    pub(super) fn find_unrecorded(
        &mut self,
        recorded: &[&Adopted],
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<super::Found>> {
        let ours = self.cgroup.members()?;
        let mut known: HashSet<u64> = listener::find(&ours)?.iter().map(|listener| listener.cookie).collect();
        known.extend(recorded.iter().flat_map(|adopted| &adopted.before).map(|(cookie, _)| *cookie));
        let mut open = HashSet::new();
        sock_diag::sockets(&self.config.listen, States::Listeners, None, |socket| {
            open.insert(socket.cookie);
        })
        .context("ask the kernel for its listeners (sock_diag)")?;
        let mut homes = self.kernel.homes()?;
        homes.retain(|(cookie, home)| home.slot != ROOM && open.contains(cookie) && !known.contains(cookie));
        let mut lost: HashSet<u64> = homes.iter().map(|(cookie, _)| *cookie).collect();
        let mut found = Vec::new();
        while let Some(pid) = (!lost.is_empty()).then(|| foreign::holder(&lost, &ours)).flatten() {
            let server = foreign::find(pid, &self.config.listen, &ours)?;
            let (name, pid) = (format!("adopted-{}", server.main), server.main);
            let cookies: Vec<u64> = server.listeners.iter().map(|listener| listener.cookie).collect();
            let slot = homes.iter().find(|(cookie, _)| cookies.contains(cookie)).map(|(_, home)| home.slot);
            lost.retain(|cookie| !cookies.contains(cookie));
            let (Some(slot), Some(start_time)) = (slot, record::start_time(pid)) else { continue };
            let uid = fs::metadata(format!("/proc/{pid}")).map_or(0, |process| process.uid());
            let before =
                Before { reuse_address: true, reuse_port: false, uid, connections: BTreeSet::default() };
            let adopted = Adopted {
                pid,
                start_time,
                command: Vec::new(),
                before: cookies.into_iter().map(|cookie| (cookie, before.clone())).collect(),
                counted_in: self.kernel.count_in(&foreign::cgroup(&server.listeners[0])?)?,
                name: name.clone(),
            };
            let entry = self.place_for(&name, &[])?;
            let mut label = self.label(entry);
            warn!("server {} was adopted (pid {pid}), and nothing was recorded of it", label.server);
            let run = server::Run::found(pid, Instant::now());
            let policy = &self.entries[entry].policy;
            label.machine = Server::found(label.machine.instance().next(), run, Instant::now(), policy);
            let place = slot as usize;
            let (plan, load) = (self.kernel.plan()?, self.kernel.load()?);
            label.run = Some(super::Ran {
                slot,
                generation: plan.servers[place].generation,
                base: load.total[place],
                job: 0,
            });
            label.adopted = Some(adopted);
            let child = self.watch_again(&record::Server { label: label.clone(), start_time: None }, host)?;
            found.extend(child.map(|child| super::Found { label, child: Some(child) }));
        }
        Ok(found)
    }

    /// Notes which connections a server had before it was adopted.
    pub(super) fn note_earlier(&mut self, entry: usize, listeners: &[Foreign], host: &Host<'_>) {
        let mut noted = EarlierConnections::default();
        for listener in listeners {
            let others: Vec<&EarlierConnections> = self
                .entries
                .iter()
                .filter_map(|entry| entry.run.as_ref()?.guest.as_ref())
                .map(|guest| &guest.earlier)
                .chain([&noted])
                .collect();
            let found = Ledger::open(&kernel::pins(&host.place.pins, &self.config.name))
                .and_then(|ledger| EarlierConnections::note(listener, ledger.tags(), &others));
            match found {
                Ok(found) => noted = noted.and(found),
                Err(error) => {
                    let name = self.entries[entry].name();
                    warn!("server {name}: the connections that it had before are not known: {error:#}");
                }
            }
        }
        if let Some(guest) = self.entries[entry].run.as_mut().and_then(|run| run.guest.as_mut()) {
            guest.earlier = noted;
        }
        self.count_earlier();
    }

    /// A server that was released under an earlier distributor.
    pub fn remember_released(&mut self, adopted: Adopted) {
        if !self.released.contains(&adopted) {
            self.released.push(adopted);
        }
    }

    /// Once a second: how many of the connections from before are still open.
    pub(super) fn count_earlier(&mut self) {
        let listen = &self.config.listen;
        for entry in &mut self.entries {
            let Some(guest) = entry.run.as_mut().and_then(|run| run.guest.as_mut()) else { continue };
            match guest.earlier.still_open(listen) {
                Ok(open) => guest.earlier_open = u32::try_from(open).unwrap_or(u32::MAX),
                Err(error) => debug!("server {}: {error:#}; asks again", entry.config.name),
            }
        }
    }

    /// Lets an adopted server go its own way. It keeps its connections. It gets no new ones as long
    /// as the service serves its address, and all of them when the service has ended.
    pub fn release(&mut self, entry: usize, host: &mut Host<'_>) -> anyhow::Result<()> {
        let name = self.entries[entry].name();
        let is_guest = self.entries[entry].run.as_ref().is_some_and(|run| run.guest.is_some());
        ensure!(is_guest, "server {name} was not adopted: dist-ctl has started it, and only stops it");
        if let Some(run) = &mut self.entries[entry].run {
            run.included = false;
        }
        self.write_plan();
        self.disown(entry, host);
        Ok(())
    }

    /// The bookkeeping of a release: the kernel is told already.
    fn disown(&mut self, entry: usize, host: &mut Host<'_>) {
        let Some(mut run) = self.entries[entry].run.take() else { return };
        let Some(guest) = run.guest.take() else { return };
        let whose = serde_json::to_vec(&(&self.config.name, &guest.adopted)).unwrap_or_default();
        let relabel = ToMonitor::Relabel { id: run.id, label: [RELEASED, &whose].concat() };
        let _ = host.link.send(&relabel, None);
        for them in &run.listeners {
            for (offset, &cookie) in them.cookies.iter().enumerate() {
                self.kernel.vacate(them.first + offset as u32);
                self.left.push_back((Instant::now() + super::HOME_STAYS, cookie));
            }
            if them.places > 0 {
                self.indices.give_back(them.first);
            }
        }
        self.retired.push(Retired { slot: run.slot, entry: None, base: run.base });
        self.note(&format!("listeners of {}", self.entries[entry].name()), None);
        self.scans.retain(|scan| scan.entry != entry);
        self.released.push(guest.adopted);
        let server = &mut self.entries[entry];
        (server.gone, server.changed) = (true, true);
        server.machine = Server::new(run.instance, Instant::now());
        info!("server {} is released", server.config.name);
        self.write_plan();
    }

    /// If another process has the listeners of an adopted server whose main one has ended, that is
    /// the server now: a worker was watched, or the master was replaced. False if nobody has them.
    pub(super) fn follow_guest(&mut self, entry: usize, host: &mut Host<'_>) -> bool {
        let ours = self.ours();
        let Some(run) = &mut self.entries[entry].run else { return false };
        let Some(guest) = &mut run.guest else { return false };
        let Some(holder) = foreign::holder(&guest.adopted.cookies(), &ours) else { return false };
        let pid = foreign::find(holder, &self.config.listen, &ours).map_or(holder, |server| server.main);
        let Some((pidfd, start_time)) = record::process(pid) else { return false };
        (guest.adopted.pid, guest.adopted.start_time) = (pid, start_time);
        self.ended.push(run.id);
        (run.id, run.pid, run.start_time) = (host.link.number(), Some(pid), Some(start_time));
        run.instance = run.instance.next();
        let (instance, listeners) = (run.instance, run.listeners.clone());
        let server = &mut self.entries[entry];
        info!("server {} goes on as process {pid}, which has its listener too", server.config.name);
        let main = server::Run::found(pid, Instant::now());
        server.machine = Server::found(instance, main, Instant::now(), &server.policy);
        server.changed = true;
        self.watch(entry, pidfd.as_fd(), host);
        for (address, _) in listeners.iter().enumerate().filter(|(_, them)| !them.cookies.is_empty()) {
            self.report(entry, server::Report::ListenerAdopted { address }, host);
        }
        true
    }

    /// Has the monitor watch a process that somebody else started. If it is gone, so are we in a moment.
    pub(super) fn watch(&self, entry: usize, pidfd: BorrowedFd<'_>, host: &mut Host<'_>) {
        let Some(run) = &self.entries[entry].run else { return };
        let label = serde_json::to_vec(&self.label(entry)).unwrap_or_default();
        let watch = ToMonitor::Watch { id: run.id, pid: run.pid.unwrap_or(0), label };
        let _ = host.link.send(&watch, Some(pidfd));
    }

    /// Processes that are no server of somebody else's.
    pub(super) fn ours(&self) -> Vec<u32> {
        let mut ours = self.cgroup.processes();
        ours.push(std::process::id());
        ours
    }

    /// The processes that may have the listeners of an adopted server.
    pub(super) fn family(&self, adopted: &Adopted) -> Vec<u32> {
        foreign::family(adopted.pid, &self.ours())
    }

    /// Has the servers that were released, and run, serve with the others once more: these are about
    /// to stop.
    pub fn take_back(&mut self, host: &mut Host<'_>) {
        for released in self.released.clone() {
            let taken = Shared::find(released.pid, &self.config, &self.ours()).and_then(|mut shared| {
                shared.share(&self.config)?;
                self.adopt(&shared, &released.name, Vec::new(), host)
            });
            if let Err(error) = taken {
                debug!("process {}, which was released: {error:#}", released.pid);
            }
        }
    }

    /// A server that was adopted, and is not to be started again, has ended.
    pub(super) fn guest_ended(&mut self, entry: usize, host: &mut Host<'_>) {
        let name = self.entries[entry].name();
        info!("server {name} has ended; it was adopted without a command, and is not started again");
        let id = self.entries[entry].run.as_ref().map(|run| run.id);
        if let Some(run) = &mut self.entries[entry].run {
            run.included = false;
        }
        self.disown(entry, host);
        self.released.pop();
        self.ended.extend(id);
    }

    /// It was adopted without a command: it is never stopped, and goes its own way at the end.
    pub(super) fn is_guest(&self, entry: usize) -> bool {
        let run = self.entries[entry].run.as_ref();
        run.and_then(|run| run.guest.as_ref()).is_some_and(|guest| guest.adopted.command.is_empty())
    }

    /// All has stopped, and nobody is to wait here again: whoever was adopted has the address for
    /// himself.
    pub fn end(mut self) {
        let guests: Vec<usize> = (0..self.entries.len()).filter(|entry| self.is_guest(*entry)).collect();
        if !guests.is_empty() {
            // Whoever waits goes there, and so does whoever comes until the end.
            guests.iter().for_each(|&entry| self.entries[entry].limit = None);
            self.write_plan();
            let until = Instant::now() + EMPTYING;
            while self.kernel.load().is_ok_and(|load| load.waiting > 0) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        // Its rooms close.
        self.attendant.end();
        let run = |entry: &Entry| Some(entry.run.as_ref()?.guest.as_ref()?.adopted.clone());
        let guests = guests.into_iter().filter_map(|entry| run(&self.entries[entry]));
        for adopted in guests.chain(self.released) {
            give_back(&adopted);
        }
    }
}

/// Gives a server its listeners back, once everybody else has left their groups.
pub fn give_back(adopted: &Adopted) {
    // Whoever has them now: its processes may be others than then.
    let Some(holder) = foreign::holder(&adopted.cookies(), &[]) else { return };
    let processes = foreign::family(holder, &[]);
    let done = listener::find(&processes).map_err(anyhow::Error::from).and_then(|found| {
        found.iter().try_for_each(|listener| {
            match adopted.before.iter().find(|(cookie, _)| *cookie == listener.cookie) {
                Some((_, before)) => released(listener.fd.as_fd(), before, &processes),
                None => Ok(()),
            }
        })
    });
    match done {
        Ok(()) => info!("process {holder}, which was adopted, has its address for itself again"),
        Err(error) => warn!("process {holder}, which was adopted: {error:#}"),
    }
}

/// Waits until a listener is alone, and releases it.
fn released(listener: BorrowedFd<'_>, before: &Before, processes: &[u32]) -> anyhow::Result<()> {
    let until = Instant::now() + CLOSING;
    while let Err(error) = foreign::release(listener, before, processes) {
        ensure!(Instant::now() < until, error);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A cgroup that nothing is in.
pub(super) fn nobodys(service: &Cgroup) -> Cgroup {
    service.child("nobody")
}

/// What is done about one that is not well. One that was adopted without a command is never stopped.
fn remedies(service: &config::Service, server: &config::Server) -> anyhow::Result<Remedies> {
    match server.command.is_empty() {
        true => Ok(Remedies::default()),
        false => Ok(Supervision::of(service, server)?.remedies),
    }
}

fn fewer(mut before: Before) -> Before {
    while before.connections.len() > RESTORED {
        before.connections.pop_last();
    }
    before
}
