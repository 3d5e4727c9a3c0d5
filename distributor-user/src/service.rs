//! One service at work: its kernel objects, rooms and servers.
//!
//! The shell around the pure parts: it performs what `server` decides, adopts what `listener`
//! finds, and writes what `plan` makes. One order holds everywhere: into the plan after the
//! listener is adopted, out of the plan before the server is asked to stop.
#![forbid(unsafe_code)]

mod adopt;
mod audit;
mod change;
mod check;
mod cpus;
mod drain;
mod launch;
mod lifetime;
mod limits;
mod load;
mod notified;
mod report;
mod restart;
mod role;
mod stall;
mod survey;
mod update;

use std::{
    collections::{HashMap, VecDeque},
    fs,
    os::fd::AsFd as _,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use distributor_ebpf::{
    contract::{Event as KernelEvent, EventKind, Home, Load, Policy, ROOMS, Run, SERVERS_END, SOCKETS},
    word,
};
use rustix::{
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    time::{ClockId, clock_gettime},
};
use tokio::{sync::mpsc::UnboundedSender, task::JoinSet};
use tracing::{debug, error, info, warn};

use crate::{
    attendant::{self, Attendant, Duty, Says},
    auditor::Auditor,
    cgroup::Cgroup,
    config,
    control::Response,
    distributor::Input,
    drain::Drain,
    error,
    health::Health,
    instance,
    keeper::{self, Keeper},
    kernel::{self, Desk, Directions, Kernel, ProgramLog},
    launch::LaunchError,
    link::Link,
    listener::{self, Verdict},
    message::{Exit, ToMonitor},
    moment::Moment,
    plan::{Indices, Slots, Wanted, WantedServer},
    record,
    roll::Roll,
    scale::Scaler,
    server::{Action, Event, Instance, Recipient, Report, Server, Supervision},
    share::{self, HeldBack, Share, Warming},
    stall::Queue,
    trouble::Troubles,
};

pub use adopt::{Adopted, RELEASED, Shared, give_back, released_by};
pub use audit::Drift;
pub use change::NotReplaced;
pub use launch::{Found, Label, Ran, Succession};
#[cfg(test)]
pub(crate) use launch::{is_unaccounted, latest_first};
pub use notified::FORMER;
pub use report::vacant_status;
pub use role::Role;
pub use survey::{Left, left};

/// Places in SOCKETS that a server gets for its listeners on one address at first.
const RUN: u32 = 8;
/// A socket is announced before it listens, so it is looked for again this often...
const SCAN_TRIES: u32 = 50;
/// ...with this pause. After that, the tick finds it.
const SCAN_PAUSE: Duration = Duration::from_millis(1);

/// So many may wait while a service begins whose address is in use.
const BRIEFLY: u32 = 1_024;

/// A listener that closes is told of before its queue is moved, and nothing tells when that is
/// done. It takes some 10 us per connection; this is as good as never too early.
const HOME_STAYS: Duration = Duration::from_secs(10);

/// What a service needs of the world around it.
pub struct Host<'a> {
    pub place: &'a instance::Instance,
    pub link: &'a mut Link,
    pub inputs: &'a UnboundedSender<Input>,
}

/// What holds for all services of an instance.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub log: ProgramLog,
    /// The kernel does not wake a server to which it moves a connection.
    pub bell: bool,
    /// How often the counts are compared with the sockets.
    pub audit: Duration,
    /// The address is in use while the service begins: who comes before its first plan waits, also
    /// where nobody may wait later.
    pub in_use: bool,
}

/// One service.
pub struct Service {
    /// Its place in the distributor's list, which `Input` names it by.
    number: usize,
    config: config::Service,
    kernel: Kernel,
    cgroup: Cgroup,
    /// Hands over to those who wait.
    attendant: attendant::Handle,
    /// They read what the kernel tells, and end with this.
    _tasks: JoinSet<()>,
    /// Compares the counts with the sockets.
    audit: audit::Audit,
    /// The kernel does not wake a server to which it moves a connection.
    bell: bool,
    /// Connections of ours that check servers.
    directions: Rc<Directions>,
    /// When the next check is due that can begin.
    next_check: Option<Instant>,
    /// When accept queues are looked at again.
    next_look: Option<Instant>,
    entries: Vec<Entry>,
    /// How long a step of the shortest slow start lasts that is under way.
    warms: Option<Duration>,
    scaler: Scaler,
    /// Why it has as many servers as it has, and since when.
    rescaled: Option<(String, SystemTime)>,
    cpus: cpus::Seats,
    /// When the loads of servers were last looked at.
    loads_at: Option<Instant>,
    /// Slots of ended instances that still hold connections.
    retired: Vec<Retired>,
    slots: Slots,
    indices: Indices,
    generation: u32,
    /// Cookies of sockets that were bound and do not listen yet -> entry.
    bound: HashMap<u64, usize>,
    scans: Vec<Scan>,
    /// Cookies of listeners that are no longer ours, and when HOME may forget them.
    left: VecDeque<(Instant, u64)>,
    syncookies: bool,
    /// The servers are being stopped.
    stopping: bool,
    /// Nobody can come any more.
    closing: bool,
    /// What runs has not all been found yet: the kernel goes on by the plan that it has.
    taking_over: bool,
    /// What the kernel was told last.
    told: Option<Wanted>,
    /// Children whose end has been dealt with, which the monitor may forget once that is written
    /// down.
    ended: Vec<u64>,
    /// What the monitor holds and nobody needs any more.
    dropped: Vec<u64>,
    /// Servers that were adopted and are not any more: at the end they get their address back.
    released: Vec<Adopted>,
    /// Its servers are restarted one after the other, or were.
    roll: Option<Roll>,
    /// What is recorded of that is out of date.
    roll_changed: bool,
    /// Servers that go when those are ready that take their share.
    to_remove: Vec<String>,
    /// What the service as a whole and each source may have.
    limits: limits::Keeping,
    /// What is wrong with the machine.
    troubles: Troubles,
}

/// One server, or an instance beside it: see `change`.
struct Entry {
    config: config::Server,
    policy: Supervision,
    machine: Server,
    role: Role,
    /// It is none of the configuration's.
    extra: bool,
    /// What came of the last try to replace it, if that failed.
    not_replaced: Option<NotReplaced>,
    /// Live: the configuration's, or what an operator set since.
    weight: u32,
    limit: Option<u32>,
    /// An operator has taken it out.
    drain: Option<Drain>,
    closing: drain::Closing,
    /// When it was put back by an operator.
    resumed: Option<Moment>,
    /// What its checks have come to.
    health: Health,
    checking: check::Checking,
    /// Which CPUs it has.
    cpus: cpus::Pinned,
    run: Option<Running>,
    /// Of ended instances.
    total_before: u64,
    most_before: u64,
    ageing: lifetime::Ageing,
    /// Its label is out of date.
    changed: bool,
    /// It is none of the service's any more.
    gone: bool,
}

impl Entry {
    /// When its machine is to be told that time has passed.
    fn deadline(&self) -> Option<Instant> {
        self.machine.deadline(&self.policy)
    }

    /// It may get connections, as far as it and the operator are concerned.
    fn is_open(&self) -> bool {
        self.drain.is_none() && self.run.as_ref().is_some_and(|run| run.included)
    }
}

/// The instance of a server that runs.
struct Running {
    instance: Instance,
    /// The monitor's number of it.
    id: u64,
    /// Told by the monitor.
    pid: Option<u32>,
    /// When that process started: see `record::start_time`.
    start_time: Option<u64>,
    launch: Launch,
    /// Its exit, if that was told before the launcher's answer.
    exit: Option<Exit>,
    cgroup: Cgroup,
    cgroup_id: u64,
    slot: u32,
    generation: u32,
    /// LOAD's total of the slot when it was taken.
    base: u64,
    /// A hash of what it was started with.
    job: u64,
    /// By group.
    listeners: Vec<Listeners>,
    included: bool,
    /// `DrainDone` is to be told when it has no connections.
    draining: bool,
    /// `CgroupEmpty` is to be told when it has no processes.
    emptying: bool,
    /// What is left in its cgroup is to be killed, and could not be.
    unkilled: bool,
    /// The monitor is to watch its process, and could not.
    unwatched: bool,
    /// It can say something by sd_notify.
    notify: Option<notified::Hearing>,
    /// How loaded it is, and what that leaves it.
    strain: load::Strain,
    /// What was seen of its accept queues while it could stall.
    queue: Option<Queue>,
    /// It was adopted.
    guest: Option<adopt::Guest>,
}

/// How far a launch is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Launch {
    /// There is no process, and none will be.
    Nothing,
    UnderWay,
    /// The launcher's exec succeeded; `Launched` is told as soon as the pid is known.
    Running,
    /// The launcher has ended without a word, or there never was one: the monitor will tell which.
    Silent,
    Failed,
}

/// The listeners of an instance in one group, at consecutive indices of SOCKETS.
#[derive(Clone, Default)]
struct Listeners {
    first: u32,
    places: u32,
    cookies: Vec<u64>,
}

/// A slot whose instance has ended.
struct Retired {
    slot: u32,
    /// `None`: of a server that is not in the configuration any more.
    entry: Option<usize>,
    base: u64,
}

/// A listener that is looked for.
struct Scan {
    at: Instant,
    entry: usize,
    /// `None`: any that it has.
    cookie: Option<u64>,
    tries: u32,
}

impl Service {
    /// Makes or takes over the kernel objects and rooms. No server is selected yet.
    pub fn open(
        number: usize,
        config: config::Service,
        options: Options,
        host: &mut Host<'_>,
    ) -> anyhow::Result<Self> {
        let cgroup = host.place.cgroup.child(&config.name);
        let rooms_cgroup = cgroup.child("rooms");
        rooms_cgroup.create()?;
        let pins = kernel::pins(&host.place.pins, &config.name);
        let (mut kernel, events, logs) = Kernel::open(&pins, cgroup.path(), config.listen.len(), options.log)
            .with_context(|| format!("set up service {}", config.name))?;
        kernel.set_addresses(&config.listen)?;
        let mut tasks = JoinSet::new();
        logs.follow(&mut tasks);
        follow(number, events, host.inputs, &mut tasks);

        let socket = keeper::socket(&host.place.runtime_dir, &config.name);
        let keeper = match Keeper::find(&socket)? {
            Some(keeper) => keeper,
            None => Keeper::start(rooms_cgroup.path(), &socket)?,
        };
        let duty = Duty {
            service: config.name.clone(),
            listen: config.listen.clone(),
            uid: uid(&config),
            cgroup: rooms_cgroup.path().to_owned(),
            cgroup_id: rooms_cgroup.id().context("read the number of a cgroup")?,
            keeper: socket,
            waiting: config.waiting.clone(),
            in_use: options.in_use,
            most_rooms: most_rooms(config.listen.len()),
            bell: options.bell,
        };
        let inputs = host.inputs.clone();
        let tell = Arc::new(move |says| {
            // The loop is gone only when everything stops.
            let _ = inputs.send(Input::Attendant { service: number, says });
        });
        let desk = Desk::open(&pins).with_context(|| format!("set up service {}", config.name))?;
        let (attendant, mut handle) = Attendant::new(duty, desk, keeper, tell)?;
        let left = kernel.plan()?;
        if options.in_use {
            let capacity = config.waiting.capacity.max(BRIEFLY);
            kernel.write_plan(&Wanted { capacity, ..Wanted::nothing() }.plan(), None)?;
        }
        // Now that the programs find a room: from here on nobody is chosen but by them.
        let rooms = (0..config.listen.len()).map(|group| attendant.any_room(group));
        kernel.take_charge(&rooms.collect::<Result<Vec<_>, _>>()?)?;
        attendant.start(&mut handle)?;
        let auditor = Auditor::open(&pins, &config.listen)?;
        let directions = Directions::open(&pins)?;
        checks(host.place, &config.name).end();

        let mut service = Self {
            number,
            attendant: handle,
            _tasks: tasks,
            audit: audit::Audit::start(number, auditor, options.audit, host),
            bell: options.bell,
            directions,
            next_check: None,
            next_look: None,
            entries: Vec::new(),
            warms: None,
            scaler: Scaler::default(),
            rescaled: None,
            cpus: cpus::Seats::default(),
            loads_at: None,
            retired: Vec::new(),
            slots: Slots::default(),
            indices: Indices::default(),
            generation: left.servers.iter().map(|server| server.generation).max().unwrap_or(0),
            bound: HashMap::new(),
            scans: Vec::new(),
            left: VecDeque::new(),
            syncookies: false,
            stopping: false,
            closing: false,
            taking_over: true,
            told: None,
            ended: Vec::new(),
            dropped: Vec::new(),
            released: Vec::new(),
            roll: None,
            roll_changed: false,
            to_remove: Vec::new(),
            limits: limits::Keeping::new(&config, &left)?,
            troubles: Troubles::default(),
            config,
            kernel,
            cgroup,
        };
        service.entries = service
            .config
            .servers
            .iter()
            .map(|server| Entry::new(&service.config, server.clone(), Role::Current, Instance(0)))
            .collect::<Result<_, _>>()?;
        Ok(service)
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// What `Input` names it by.
    pub fn number(&self) -> usize {
        self.number
    }

    /// It is being stopped, and will be gone.
    pub fn is_leaving(&self) -> bool {
        self.stopping
    }

    pub fn config(&self) -> &config::Service {
        &self.config
    }

    /// Every server is ready.
    pub fn is_ready(&self) -> bool {
        let mut entries = self.entries.iter().filter(|entry| entry.is_current());
        entries.all(|entry| entry.run.as_ref().is_some_and(|run| run.included))
    }

    /// Some server is ready.
    pub fn serves(&self) -> bool {
        self.entries.iter().any(|entry| entry.run.as_ref().is_some_and(|run| run.included))
    }

    /// Every server has stopped.
    pub fn has_stopped(&self) -> bool {
        (0..self.entries.len()).all(|entry| {
            let it = &self.entries[entry];
            self.is_guest(entry) || it.run.is_none() && it.deadline().is_none()
        })
    }

    /// What runs has been taken over: from here on the kernel goes by what is wanted now.
    pub fn begin(&mut self) {
        self.taking_over = false;
        self.write_plan();
    }

    /// Starts every server that does not run, or is to be stopped.
    pub fn start(&mut self, host: &mut Host<'_>) {
        self.account_for_memory(host);
        for entry in 0..self.entries.len() {
            match self.entries[entry].role {
                _ if self.entries[entry].gone => {}
                Role::Current => self.tell(entry, Event::Start, host),
                Role::Successor => self.depart(entry),
                Role::Leaving => self.see_off(entry, host),
            }
        }
    }

    /// Takes no more connections, and stops every server. Said again, it hurries.
    pub fn stop(&mut self, host: &mut Host<'_>) {
        let hurries = std::mem::replace(&mut self.stopping, true);
        if !hurries {
            self.take_back(host);
        }
        // Whoever was adopted serves on, and in the end alone: also if he was drained.
        let guests: Vec<usize> = (0..self.entries.len()).filter(|entry| self.is_guest(*entry)).collect();
        guests.iter().for_each(|guest| self.end_drain(*guest));
        if guests.is_empty() {
            self.closing = true;
            self.write_plan();
            // No server will be free for them.
            self.attendant.dismiss_all();
        }
        for entry in 0..self.entries.len() {
            let it = &self.entries[entry];
            // Whoever ends already was told by us or by the distributor before us, and told again he hurries.
            let is_told = !hurries && it.machine.is_ending();
            if !self.is_guest(entry) && !it.gone && !is_told {
                self.tell(entry, Event::Stop, host);
            }
        }
    }

    /// What is wrong with the machine, as far as it matters here.
    pub fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    fn note(&mut self, name: &str, what: Option<String>) {
        self.troubles.note(name, what, SystemTime::now());
    }

    // What operators ask.

    /// The entry of a server's full name, `shop/1`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.is_current() && entry.config.name == name)
    }

    /// The full names of its servers.
    pub fn server_names(&self) -> impl Iterator<Item = String> {
        self.entries.iter().filter(|entry| entry.is_current()).map(Entry::name)
    }

    pub fn set_weight(&mut self, entry: usize, weight: u32) -> Response {
        let entry_ = &mut self.entries[entry];
        let before = std::mem::replace(&mut entry_.weight, weight);
        info!("server {}: weight {before} -> {weight}", entry_.name());
        self.changed(entry)
    }

    pub fn set_limit(&mut self, entry: usize, limit: Option<u32>) -> Response {
        let shown = |limit: Option<u32>| limit.map_or("none".to_owned(), |limit| limit.to_string());
        let entry_ = &mut self.entries[entry];
        let before = std::mem::replace(&mut entry_.limit, limit);
        info!("server {}: limit {} -> {}", entry_.name(), shown(before), shown(limit));
        self.changed(entry)
    }

    fn changed(&mut self, entry: usize) -> Response {
        self.entries[entry].changed = true;
        self.write_plan();
        Response::Done
    }

    pub fn resume(&mut self, entry: usize, host: &mut Host<'_>) -> Response {
        if self.stopping {
            return Response::failure(format!("service {} is being stopped", self.config.name));
        }
        self.end_drain(entry);
        self.tell(entry, Event::Resume, host);
        Response::Done
    }

    // What the kernel tells.

    pub fn kernel_events(&mut self, events: &[KernelEvent], host: &mut Host<'_>) {
        for event in events {
            match kernel::kind(event) {
                Some(EventKind::Bound) => {
                    if let Some(entry) = self.entry_of_cgroup(event.cgroup) {
                        self.bound.insert(event.cookie, entry);
                    }
                }
                Some(EventKind::Listening) => self.listening(event.cookie, host),
                Some(EventKind::ListenerClosed) => self.listener_closed(event.cookie, host),
                Some(EventKind::Misbound) => {
                    let (Some(entry), Some(address)) =
                        (self.entry_of_cgroup(event.cgroup), kernel::address(&event.address))
                    else {
                        continue;
                    };
                    let sentence = listener::wrong_address(address, &self.config.listen);
                    self.report(entry, Report::Misbound { sentence }, host);
                }
                None => warn!("the kernel told something unknown ({event:?}); goes on without it"),
            }
        }
    }

    /// A socket begins to listen: looks for it in the server that bound it.
    fn listening(&mut self, cookie: u64, host: &mut Host<'_>) {
        let owner = self.bound.remove(&cookie);
        let entries: Vec<usize> = match owner {
            Some(entry) => vec![entry],
            // Not on an address of ours, so it can only be somebody's reason for not being ready.
            None => (0..self.entries.len())
                .filter(|&entry| self.entries[entry].run.as_ref().is_some_and(|run| !run.included))
                .collect(),
        };
        for entry in entries {
            if !self.scan(entry, Some(cookie), host) && owner.is_some() {
                self.scan_again(entry, Some(cookie));
            }
        }
    }

    fn listener_closed(&mut self, cookie: u64, host: &mut Host<'_>) {
        let holds = |entry: &Entry| {
            entry
                .run
                .as_ref()
                .is_some_and(|run| run.listeners.iter().any(|them| them.cookies.contains(&cookie)))
        };
        self.bound.remove(&cookie);
        self.scans.retain(|scan| scan.cookie != Some(cookie));
        if let Some(entry) = self.entries.iter().position(holds) {
            self.scan(entry, None, host);
        }
    }

    fn entry_of_cgroup(&self, id: u64) -> Option<usize> {
        self.entries.iter().position(|entry| entry.run.as_ref().is_some_and(|run| run.cgroup_id == id))
    }

    /// Looks at all listeners of an instance, and adopts what is to be adopted. False if that is
    /// to be done again, because something failed or the one with this cookie is not among them.
    fn scan(&mut self, entry: usize, cookie: Option<u64>, host: &mut Host<'_>) -> bool {
        let Some(run) = &self.entries[entry].run else { return true };
        let processes = self.processes_of(run);
        // What cannot be seen is not gone.
        let Ok(found) = processes.and_then(|processes| listener::find(&processes)) else {
            return false;
        };
        let cookies: Vec<u64> = found.iter().map(|found| found.cookie).collect();
        let uid = uid(&self.config);
        let mut by_group: Vec<Vec<listener::Found>> = self.config.listen.iter().map(|_| Vec::new()).collect();
        let mut reports = Vec::new();
        for found in found {
            match listener::judge(&found.facts, &self.config.listen, uid) {
                Verdict::Adopt { address } => by_group[address].push(found),
                Verdict::Elsewhere => {
                    reports.push(Report::ListensElsewhere { address: found.facts.address.to_string() });
                }
                Verdict::Misbound { sentence } => reports.push(Report::Misbound { sentence }),
            }
        }
        let mut unsettled = None;
        for (group, found) in by_group.iter().enumerate() {
            match self.settle(entry, group, found) {
                Ok(report) => reports.extend(report),
                Err(error) => {
                    let name = self.entries[entry].name();
                    unsettled = Some(format!(
                        "server {name}: its listener cannot be adopted: {error:#}; tries again"
                    ));
                }
            }
        }
        let settled = unsettled.is_none();
        self.note(&format!("listeners of {}", self.entries[entry].name()), unsettled);
        for report in reports {
            self.report(entry, report, host);
        }
        self.write_plan();
        settled && cookie.is_none_or(|cookie| cookies.contains(&cookie))
    }

    /// Those that may have its listeners.
    fn processes_of(&self, run: &Running) -> std::io::Result<Vec<u32>> {
        match &run.guest {
            Some(guest) => Ok(self.family(&guest.adopted)),
            None => run.cgroup.members(),
        }
    }

    /// Looks again in a moment.
    fn scan_again(&mut self, entry: usize, cookie: Option<u64>) {
        self.scans.push(Scan { at: Instant::now() + SCAN_PAUSE, entry, cookie, tries: SCAN_TRIES });
    }

    /// Brings the listeners of an instance in one group in line with what was found.
    fn settle(
        &mut self,
        entry: usize,
        group: usize,
        found: &[listener::Found],
    ) -> anyhow::Result<Option<Report>> {
        let Some(run) = &mut self.entries[entry].run else { return Ok(None) };
        let them = &mut run.listeners[group];
        let before = them.cookies.len();
        let gone = them.cookies.iter().any(|cookie| found.iter().all(|found| found.cookie != *cookie));
        if gone || found.len() as u32 > them.places {
            // Anew, at consecutive places. What is selected meanwhile and not there is served
            // by the next best server.
            for (offset, cookie) in them.cookies.drain(..).enumerate() {
                self.kernel.vacate(them.first + offset as u32);
                self.left.push_back((Instant::now() + HOME_STAYS, cookie));
            }
            if them.places > 0 && found.len() as u32 > them.places {
                self.indices.give_back(them.first);
                them.places = 0;
            }
        }
        if them.places == 0 && !found.is_empty() {
            let places = (found.len() as u32).next_power_of_two().max(RUN);
            them.first = self.indices.take(places)?;
            them.places = places;
        }
        for found in found {
            if them.cookies.contains(&found.cookie) {
                continue;
            }
            let home = Home { slot: run.slot, index: them.first + them.cookies.len() as u32 };
            self.kernel.adopt(&found.fd, found.cookie, home, group)?;
            them.cookies.push(found.cookie);
        }
        Ok(match (before, them.cookies.len()) {
            (0, 1..) => Some(Report::ListenerAdopted { address: group }),
            (1.., 0) => Some(Report::ListenerGone { address: group }),
            _ => None,
        })
    }

    // What the monitor tells.

    /// The entry whose instance the monitor knows by this number.
    pub fn entry_of_child(&self, id: u64) -> Option<usize> {
        self.entries.iter().position(|entry| entry.run.as_ref().is_some_and(|run| run.id == id))
    }

    pub fn started(&mut self, entry: usize, pid: u32, host: &mut Host<'_>) {
        if let Some(run) = &mut self.entries[entry].run {
            run.pid = Some(pid);
            run.start_time = record::start_time(pid);
        }
        self.entries[entry].changed = true;
        self.settle_launch(entry, host);
    }

    pub fn not_started(&mut self, entry: usize, errno: i32, host: &mut Host<'_>) {
        let error = std::io::Error::from_raw_os_error(errno);
        if let Some(run) = self.entries[entry].run.as_mut().filter(|run| run.launch == Launch::Running) {
            run.unwatched = true;
            let name = self.entries[entry].name();
            let what =
                format!("server {name}: the monitor cannot watch its process: {error}; tries every second");
            return self.note(&format!("watch {name}"), Some(what));
        }
        if let Some(run) = &mut self.entries[entry].run {
            run.launch = Launch::Nothing;
        }
        self.report(entry, not_launched(format!("start a process: {error}")), host);
    }

    pub fn exited(&mut self, entry: usize, exit: Exit, host: &mut Host<'_>) {
        let is_adopted = self.entries[entry].run.as_ref().is_some_and(|run| run.guest.is_some());
        if is_adopted && self.follow_guest(entry, host) {
            return;
        }
        if self.is_guest(entry) {
            return self.guest_ended(entry, host);
        }
        if let Some(run) = &mut self.entries[entry].run {
            run.exit = Some(exit);
        }
        self.settle_launch(entry, host);
    }

    /// Has the monitor watch a process that it could not watch before.
    fn watch_unwatched(&mut self, entry: usize, host: &mut Host<'_>) {
        let Some(run) = self.entries[entry].run.as_mut().filter(|run| run.unwatched) else { return };
        run.unwatched = false;
        let (id, name) = (run.id, self.entries[entry].name());
        self.note(&format!("watch {name}"), None);
        let Some(run) = &self.entries[entry].run else { return };
        match run
            .pid
            .zip(run.start_time)
            .and_then(|(pid, start)| Some((pid, record::process_since(pid, start)?)))
        {
            Some((pid, pidfd)) => {
                let label = serde_json::to_vec(&self.label(entry)).unwrap_or_default();
                let watch = ToMonitor::Watch { id, pid, label };
                if let Err(error) = host.link.send(&watch, Some(pidfd.as_fd())) {
                    debug!("server {name}: {error:#}");
                }
            }
            None => self.exited(entry, Exit::Unknown, host),
        }
    }

    /// A process ended that a server had left behind: maybe it was the last of its cgroup.
    pub fn orphan_exited(&mut self, host: &mut Host<'_>) {
        for entry in 0..self.entries.len() {
            self.check_empty(entry, host);
        }
    }

    fn check_empty(&mut self, entry: usize, host: &mut Host<'_>) {
        let Some(run) = &mut self.entries[entry].run else { return };
        run.unkilled = run.unkilled && run.cgroup.kill().is_err();
        if run.emptying && run.cgroup.has_emptied() {
            self.report(entry, Report::CgroupEmpty, host);
        }
    }

    // What the launcher and the server tell.

    pub fn launched(
        &mut self,
        entry: usize,
        instance: Instance,
        result: Result<(), LaunchError>,
        host: &mut Host<'_>,
    ) {
        let Some(run) = self.entries[entry].run.as_mut().filter(|run| run.instance == instance) else {
            return;
        };
        match result {
            Ok(()) => run.launch = Launch::Running,
            Err(error) if error.is_silence() => run.launch = Launch::Silent,
            Err(error) => {
                run.launch = Launch::Failed;
                self.report(entry, not_launched(error.to_string()), host);
            }
        }
        self.settle_launch(entry, host);
    }

    /// Tells what is known of a launch in the order it happened, whatever order it was heard in.
    fn settle_launch(&mut self, entry: usize, host: &mut Host<'_>) {
        let Some(run) = &mut self.entries[entry].run else { return };
        match (run.launch, run.pid) {
            (Launch::UnderWay, _) | (Launch::Running, None) => return,
            (Launch::Silent, _) => {
                let Some(exit) = run.exit else { return };
                run.launch = Launch::Failed;
                // It is our own program, and has not come to anything of the server's.
                let sentence = format!("start it: its launcher {exit} before it said anything");
                self.report(entry, Report::LaunchLacked { sentence }, host);
            }
            (Launch::Running, Some(pid)) => {
                let told = self.entries[entry].machine.pid() == Some(pid);
                if !told {
                    self.report(entry, Report::Launched { pid }, host);
                    self.follow_main(entry, host);
                }
            }
            (Launch::Failed | Launch::Nothing, _) => {}
        }
        let Some(run) = &mut self.entries[entry].run else { return };
        if let Some(exit) = run.exit.take() {
            let others_left = !run.cgroup.has_emptied();
            run.emptying = others_left;
            self.report(entry, Report::MainExited { exit, others_left }, host);
        }
    }

    // Time.

    /// When `tick` is next worth calling.
    pub fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let step = self.warms.map(|step| now + step);
        let machines = self.entries.iter().filter_map(Entry::deadline);
        let drains = self.entries.iter().filter_map(|entry| entry.drain?.deadline(now));
        let looks = self.next_check.into_iter().chain(self.next_look);
        machines.chain(self.scans.iter().map(|scan| scan.at)).chain(drains).chain(step).chain(looks).min()
    }

    /// Something is waited for that nobody tells: look often.
    pub fn is_restless(&self) -> bool {
        !self.retired.is_empty()
            || self.entries.iter().any(|entry| {
                let waits = !entry.machine.is_withheld();
                entry.run.as_ref().is_some_and(|run| run.draining || run.emptying || !run.included && waits)
            })
    }

    pub fn tick(&mut self, now: Instant, host: &mut Host<'_>) {
        let due: Vec<Scan> = {
            let (due, later) = self.scans.drain(..).partition(|scan| scan.at <= now);
            self.scans = later;
            due
        };
        for scan in due {
            if !self.scan(scan.entry, scan.cookie, host) && scan.tries > 0 {
                self.scans.push(Scan { at: now + SCAN_PAUSE, tries: scan.tries - 1, ..scan });
            }
        }
        for entry in 0..self.entries.len() {
            if self.entries[entry].deadline().is_some_and(|deadline| deadline <= now) {
                self.tell(entry, Event::Tick, host);
            }
            self.check_empty(entry, host);
        }
        let Ok(load) = self.kernel.load() else { return };
        self.check_drained(&load, host);
        self.close_rest(&load, now, host);
        self.look_at_queues(&load, now, host);
        self.free_retired(&load);
        if self.warms.is_some() {
            self.write_plan();
        }
        self.check_due(now, host);
    }

    /// Once a second: what is cheap to look at, and would otherwise depend on an event that
    /// can be lost.
    pub fn look_around(&mut self, host: &mut Host<'_>) {
        self.syncookies =
            fs::read_to_string("/proc/sys/net/ipv4/tcp_syncookies").is_ok_and(|value| value.trim() == "2");
        // Then a listener may have come or gone of which nobody was told.
        let all = self.kernel.has_lost_events().unwrap_or(true);
        for entry in 0..self.entries.len() {
            let lacks = |run: &Running| run.listeners.iter().any(|them| them.cookies.is_empty());
            let is_due = |run: &Running| all || !run.included && !run.draining || run.included && lacks(run);
            if self.entries[entry].run.as_ref().is_some_and(is_due) {
                self.scan(entry, None, host);
            }
            self.watch_unwatched(entry, host);
        }
        let mut unhealed = None;
        match self.kernel.heal(|| host.place.remount()) {
            Ok(None) => {}
            Ok(Some(done)) => warn!("service {}: {done}", self.config.name),
            Err(error) => {
                unhealed = Some(format!("service {}: {error:#}; tries again every second", self.config.name))
            }
        }
        self.note("pins", unhealed);
        let lost = all.then(|| {
            let name = &self.config.name;
            format!("service {name}: events were lost, because too many came at once: looks at all servers instead")
        });
        self.note("events", lost);
        self.forget_left();
        self.sweep();
        self.count_earlier();
        self.look_at_sources();
        self.keep_on_cpus();
        self.follow_load();
        self.remove_superseded(host);
        self.replace_due();
        self.write_plan();
    }

    /// What closed long ago, unless it was adopted again.
    fn forget_left(&mut self) {
        let now = Instant::now();
        while let Some((_, cookie)) = self.left.pop_front_if(|(until, _)| *until <= now) {
            let runs = self.entries.iter().filter_map(|entry| entry.run.as_ref());
            if !runs.flat_map(|run| &run.listeners).any(|them| them.cookies.contains(&cookie)) {
                self.kernel.forget(cookie);
            }
        }
    }

    fn check_drained(&mut self, load: &Load, host: &mut Host<'_>) {
        for entry in 0..self.entries.len() {
            if self.entries[entry].run.as_ref().is_some_and(|run| run.draining && places(load, run.slot) == 0)
            {
                if let Some(run) = &mut self.entries[entry].run {
                    run.draining = false;
                }
                self.report(entry, Report::DrainDone, host);
            }
        }
    }

    fn free_retired(&mut self, load: &Load) {
        let (empty, busy): (Vec<_>, Vec<_>) =
            self.retired.drain(..).partition(|retired| places(load, retired.slot) == 0);
        self.retired = busy;
        for retired in empty {
            if let Some(entry) = retired.entry {
                self.entries[entry].total_before += report::had(load, retired.slot, retired.base);
                self.entries[entry].changed = true;
            }
            self.slots.give_back(retired.slot);
        }
    }

    pub fn attendant_says(&mut self, says: Says) -> anyhow::Result<()> {
        match says {
            Says::Dismissed(client) => {
                tokio::task::spawn_local(client.see_off());
                Ok(())
            }
            Says::Trouble(name, what) => {
                self.note(&name, what);
                Ok(())
            }
            Says::Failed => bail!("service {}: the attendant has failed", self.config.name),
        }
    }

    // What the state machine decides.

    fn report(&mut self, entry: usize, report: Report, host: &mut Host<'_>) {
        let Some(run) = &self.entries[entry].run else { return };
        self.tell(entry, Event::Of(run.instance, report), host);
    }

    /// Tells a server's state machine, and does what it says, and tells what comes of that.
    fn tell(&mut self, entry: usize, event: Event, host: &mut Host<'_>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let server = &mut self.entries[entry];
            let (machine, actions) =
                server.machine.clone().step(event, Instant::now(), random(), &server.policy);
            server.machine = machine;
            server.changed = true;
            for action in actions {
                events.extend(self.perform(entry, action, host));
            }
        }
        let server = &self.entries[entry];
        let name = server.name();
        let lacks = server.machine.lacks().map(|why| format!("server {name} {why}; tried until it can be"));
        self.note(&name, lacks);
        self.depart(entry);
    }

    /// Performs one action. What is known of its outcome at once is the next event.
    fn perform(&mut self, entry: usize, action: Action, host: &mut Host<'_>) -> Option<Event> {
        let instance = self.entries[entry].machine.instance();
        let of = |report| Some(Event::Of(instance, report));
        match action {
            Action::Launch { instance } => match self.launch(entry, instance, host) {
                Ok(()) => None,
                Err(error) => of(not_launched(format!("{error:#}"))),
            },
            Action::Include { .. } => {
                match self.entries[entry].role {
                    Role::Successor => self.take_place(entry, host),
                    Role::Current | Role::Leaving => self.set_included(entry, true),
                }
                None
            }
            Action::Exclude { .. } => {
                self.set_included(entry, false);
                let drained = match (&self.entries[entry].run, self.kernel.load()) {
                    (Some(run), Ok(load)) => places(&load, run.slot) == 0,
                    _ => true,
                };
                if let Some(run) = &mut self.entries[entry].run {
                    run.draining = !drained;
                }
                if drained { of(Report::DrainDone) } else { None }
            }
            Action::Withhold { .. } => {
                self.set_included(entry, false);
                None
            }
            Action::MoveQueue { .. } => {
                self.move_queue(entry);
                None
            }
            Action::Signal { signal, to, .. } => {
                self.signal(entry, signal, to, host);
                None
            }
            Action::KillCgroup { .. } => {
                let Some(run) = &mut self.entries[entry].run else { return of(Report::CgroupEmpty) };
                // It may not even be possible to look.
                if run.launch == Launch::Nothing {
                    return of(Report::CgroupEmpty);
                }
                run.emptying = true;
                if let Err(error) = run.cgroup.kill() {
                    run.unkilled = true;
                    error!("server {}: {error:#}; tries again", self.entries[entry].name());
                }
                let empty = self.entries[entry].run.as_ref().is_none_or(|run| run.cgroup.has_emptied());
                if empty { of(Report::CgroupEmpty) } else { None }
            }
            Action::RemoveInstance { .. } => {
                self.retire(entry);
                None
            }
            Action::Log { level, sentence } => {
                let name = self.entries[entry].name();
                match level {
                    tracing::Level::ERROR => error!("server {name} {sentence}"),
                    tracing::Level::WARN => warn!("server {name} {sentence}"),
                    tracing::Level::INFO => info!("server {name} {sentence}"),
                    _ => debug!("server {name} {sentence}"),
                }
                None
            }
        }
    }

    fn set_included(&mut self, entry: usize, included: bool) {
        if let Some(run) = &mut self.entries[entry].run {
            run.included = included;
        }
        self.write_plan();
    }

    fn signal(&mut self, entry: usize, signal: Signal, to: Recipient, host: &mut Host<'_>) {
        let Some(run) = &self.entries[entry].run else { return };
        match to {
            Recipient::Main => {
                let message = ToMonitor::Signal { id: run.id, signal: signal.as_raw() };
                if let Err(error) = host.link.send(&message, None) {
                    error!("server {}: {error:#}", self.entries[entry].name());
                }
            }
            Recipient::Everyone => {
                for process in run.cgroup.processes() {
                    let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) else { continue };
                    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
                    // Only if it still is one of them: the number may have been used again.
                    if run.cgroup.processes().contains(&process) {
                        let _ = pidfd_send_signal(&pidfd, signal);
                    }
                }
            }
        }
    }

    /// Clears up after an instance that has no process any more.
    fn retire(&mut self, entry: usize) {
        let Some(run) = self.entries[entry].run.take() else { return };
        // Not at its exit: a server in the background, or what a killed one left, is the next
        // distributor's to know of.
        self.ended.push(run.id);
        for them in &run.listeners {
            for (offset, &cookie) in them.cookies.iter().enumerate() {
                self.kernel.vacate(them.first + offset as u32);
                self.left.push_back((Instant::now() + HOME_STAYS, cookie));
            }
            if them.places > 0 {
                self.indices.give_back(them.first);
            }
        }
        if let Some(hearing) = run.notify {
            hearing.task.abort();
            self.dropped.push(hearing.key);
        }
        self.bound.retain(|_, of| *of != entry);
        self.scans.retain(|scan| scan.entry != entry);
        if let Err(error) = run.cgroup.remove() {
            debug!("server {}: {error:#}; tries again every second", self.entries[entry].name());
        }
        // What it had is had by its server, which may be another entry by now.
        let heir = match self.entries[entry].role {
            Role::Current => Some(entry),
            Role::Successor | Role::Leaving => self.find(&self.entries[entry].config.name),
        };
        if let (Some(heir), Ok(load)) = (heir, self.kernel.load()) {
            let most = report::most(&load, run.slot, run.generation);
            self.entries[heir].most_before = self.entries[heir].most_before.max(most);
        }
        self.note_beside(entry);
        self.retired.push(Retired { slot: run.slot, entry: heir, base: run.base });
        self.write_plan();
    }

    /// What became of the children that have ended is written down: the monitor may forget them.
    pub fn forget_ended(&mut self, host: &mut Host<'_>) {
        for id in self.ended.drain(..) {
            // If the monitor is gone, so are we in a moment.
            let _ = host.link.send(&ToMonitor::Forget { id }, None);
        }
        for key in self.dropped.drain(..) {
            let _ = host.link.send(&ToMonitor::Drop { key }, None);
        }
    }

    /// The share of each server, in their order.
    fn shares(&self) -> Vec<Share> {
        let now = Instant::now();
        let candidate = |entry: &Entry| {
            let run = entry.run.as_ref();
            // The first time all are new. An adopted one is not.
            let warms = run.filter(|run| run.guest.is_none() && run.instance > Instance(1));
            share::Candidate {
                included: entry.is_open(),
                backup: entry.config.backup,
                stalled: entry.machine.is_stalled(),
                weight: entry.weight,
                part: run.map_or(share::WHOLE, |run| run.strain.percent()),
                warms: warms.filter(|_| !entry.config.slow_start.is_zero()).map(|_| Warming {
                    passed: entry.machine.ready_since().map_or(Duration::ZERO, |ready| now - ready),
                    of: entry.config.slow_start,
                }),
            }
        };
        share::shares(&self.entries.iter().map(candidate).collect::<Vec<_>>())
    }

    /// Tells the kernel what is wanted now, if that differs from what it was told last.
    fn write_plan(&mut self) {
        if self.taking_over {
            return;
        }
        let shares = self.shares();
        let steps = shares.iter().filter_map(|share| match share.held_back {
            Some(HeldBack::Warms { step, .. }) => Some(step),
            _ => None,
        });
        self.warms = steps.min();
        let wanted = Wanted {
            policy: self.config.policy,
            capacity: self.config.waiting.capacity,
            closing: self.closing,
            cookies: self.syncookies,
            bell: self.bell,
            checks: self.checks_directly(),
            limits: self.planned_limits(),
            servers: self
                .in_order()
                .into_iter()
                .filter_map(|place| {
                    let (entry, share) = (&self.entries[place], &shares[place]);
                    let run = entry.run.as_ref()?;
                    Some(WantedServer {
                        slot: run.slot,
                        identity: entry.config.name.clone(),
                        eligible: share.eligible,
                        weight: share.planned,
                        // What it had before it was adopted takes places that nobody counts.
                        limit: match &run.guest {
                            Some(guest) => entry.limit.map(|limit| limit.saturating_sub(guest.earlier_open)),
                            None => entry.effective_limit(),
                        },
                        generation: run.generation,
                        runs: run
                            .listeners
                            .iter()
                            .map(|them| Run { first: them.first as u16, len: them.cookies.len() as u16 })
                            .collect(),
                    })
                })
                .collect(),
        };
        if self.told.as_ref() == Some(&wanted) {
            self.note("plan", None);
            return;
        }
        let hash = (wanted.policy == Policy::SourceHash).then(|| wanted.hash());
        match self.kernel.write_plan(&wanted.plan(), hash.as_deref()) {
            Ok(()) => {
                let more = self.limits_are_told(&wanted.limits);
                self.told = Some(wanted);
                if more {
                    return self.write_plan();
                }
                self.note("plan", None);
                // There may be a place now for somebody who waits.
                self.attendant.look();
            }
            Err(error) => {
                let name = &self.config.name;
                let what = format!(
                    "service {name}: {error:#}; the kernel goes by the plan before, tries every second"
                );
                self.note("plan", Some(what));
            }
        }
    }
}

/// Why a launch came to nothing: by the server's fault, or the machine's.
fn not_launched(sentence: String) -> Report {
    match error::lacking(&sentence) {
        Some(sentence) => Report::LaunchLacked { sentence },
        None => Report::LaunchFailed { sentence },
    }
}

/// Where the commands run that check a service's servers: outside of its cgroup, where nobody can be
/// taken for a server.
fn checks(place: &instance::Instance, service: &str) -> Cgroup {
    place.cgroup.child(&format!("{service}.checks"))
}

/// The uid of all its sockets.
fn uid(config: &config::Service) -> u32 {
    match &config.user {
        Some(user) => user.uid,
        None => rustix::process::geteuid().as_raw(),
    }
}

/// Rooms that each of so many groups may have.
const fn most_rooms(groups: usize) -> usize {
    let share = (SOCKETS - SERVERS_END) / groups;
    if share < ROOMS { share } else { ROOMS }
}

/// Places taken in a slot now.
fn places(load: &Load, slot: u32) -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let now = word::epoch(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64);
    word::used(word::roll(load.word[slot as usize], now))
}

/// Passes the kernel's events on to the loop.
fn follow(
    service: usize,
    mut events: kernel::Events,
    inputs: &UnboundedSender<Input>,
    tasks: &mut JoinSet<()>,
) {
    let inputs = inputs.clone();
    tasks.spawn_local(async move {
        loop {
            match events.next().await {
                Ok(events) => {
                    if inputs.send(Input::Kernel { service, events }).is_err() {
                        return;
                    }
                }
                Err(error) => return error!("read EVENTS: {error}; listeners are found once a second now"),
            }
        }
    });
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // It fails only before the kernel has any randomness at all; then no jitter is fine.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    u32::from_ne_bytes(bytes)
}
