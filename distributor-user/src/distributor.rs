//! The distributor: takes over what there is, then performs what comes in, one thing at a time.
//!
//! Everything that happens arrives as an `Input` on one channel: from the kernel, the monitor,
//! the launchers, the servers and the operator. The loop hands each to its service. Nothing in
//! it waits, except for the next input.
#![forbid(unsafe_code)]

mod adopt;
mod answer;
mod configured;
mod reload;
mod restart;
mod vacancy;

use std::{
    collections::HashSet,
    fs::{self, DirBuilder},
    io::Write as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _},
            process::parent_id,
        },
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use distributor_ebpf::contract;
use rustix::event::{EventfdFlags, eventfd};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tokio::{
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot,
    },
    task::{JoinHandle, LocalSet, spawn_local, yield_now},
    time::{sleep, timeout_at},
};
use tracing::{debug, error, info, warn};

use self::{
    configured::{CONFIGURATION, Configured},
    vacancy::Vacancy,
};
use crate::{
    attendant, auditor, bell,
    cgroup::Cgroup,
    check,
    cli::Source,
    config::{self, Config, Occupied},
    control::{self, Command, Request, Response},
    error,
    instance::{self, Instance},
    kernel::ProgramLog,
    launch::LaunchError,
    link::{Child, Held, Inheritance, Link},
    lock::{self, DistributorLock},
    message::{FromMonitor, ToMonitor},
    notify,
    record::{self, Adopting, Record, Recorder},
    room, server,
    service::{self, Found, Host, Label, Left, Service, Succession},
    systemd::{Manager, Summary},
    trouble::Troubles,
    upgrade::{self, Candidate},
};

/// How often what is only seen by looking is looked at: who drains.
const RESTLESS: Duration = Duration::from_millis(20);
/// How often all is looked at, whether or not there is a reason.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// A loop that comes so late was not running, and may have missed what a server said.
const LATE: Duration = Duration::from_millis(100);

/// What the trouble is called that the record cannot be written.
const RECORD: &str = "record";

/// Something that happened.
#[derive(Debug)]
pub enum Input {
    /// There is something to receive from the monitor.
    MonitorSpeaks,
    Kernel {
        service: usize,
        events: Vec<contract::Event>,
    },
    /// The launcher's answer: it became the server, or why not.
    Launched {
        service: usize,
        entry: usize,
        instance: server::Instance,
        result: Result<(), LaunchError>,
    },
    Notified {
        service: usize,
        entry: usize,
        instance: server::Instance,
        message: notify::Message,
    },
    Attendant {
        service: usize,
        says: attendant::Says,
    },
    /// Connections that a drained server had left were closed.
    Closed {
        service: usize,
        entry: usize,
        result: anyhow::Result<usize>,
    },
    /// The counts were compared with the sockets.
    Audited {
        service: usize,
        result: anyhow::Result<auditor::Checked>,
    },
    /// A check of a server is over.
    Checked {
        service: usize,
        entry: usize,
        instance: server::Instance,
        outcome: check::Outcome,
    },
    Control(Request),
    /// The trial of another program is over.
    Tried(Result<Candidate, Response>, oneshot::Sender<Response>),
}

/// Runs until everything has been stopped, as the monitor or an operator asked.
///
/// # Errors
/// It could not start (then nothing is left behind of what it had made), or the monitor died.
pub fn run(source: &Source, runtime_dir: &Path, log: ProgramLog) -> anyhow::Result<()> {
    // The monitor tells when to stop. Who signals every process of a group or a cgroup, as a
    // terminal and systemd do, would otherwise end us before we have stopped anything.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).context("ignore signals")?;
    }
    // Before anything that is closed again later.
    let spare = control::spare();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let (link, inheritance) = Link::open()?;
        let configured = Configured::find(source, &inheritance)?;
        serve(configured, runtime_dir, log, link, inheritance, spare).await
    })
}

async fn serve(
    configured: Configured<'_>,
    runtime_dir: &Path,
    log: ProgramLog,
    mut link: Link,
    mut inheritance: Inheritance,
    spare: Option<OwnedFd>,
) -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "start dist-ctl: it needs root to load programs into the kernel: run it with sudo"
    );
    let cgroup = instance::cgroup(runtime_dir).map_err(error::unfit)?;
    cgroup.create().map_err(error::unfit)?;
    // Before the other one, whose holder is killed if he does not exit.
    let found = lock_instance(&cgroup, &mut inheritance, &mut link).and_then(|()| {
        let lock = DistributorLock::take(runtime_dir)?;
        Ok((lock, Instance::find(runtime_dir).map_err(error::unfit)?))
    });
    // The lock until we are gone, whatever happens below: there is no other.
    let (_lock, place) = found.inspect_err(|_| {
        // It is there still if anything is in it.
        let _ = fs::remove_dir(cgroup.path());
    })?;
    // What an earlier run has left is not ours to end because we cannot start.
    let nothing_runs = inheritance.is_empty() && !place.is_populated();
    match Distributor::begin(configured, &place, log, link, inheritance, spare).await {
        Ok(distributor) => distributor.work().await,
        Err(error) => {
            if nothing_runs && let Err(left) = place.remove() {
                error!("{left:#}; remove it by hand, or with the next dist-ctl up");
            }
            Err(error)
        }
    }
}

/// The label of the lock on the instance's cgroup.
const INSTANCE: &[u8] = b"instance";

/// The label of a lock file of the monitor's that was made again.
const REMADE: &[u8] = b"lock";

/// Has the monitor hold the lock on the instance's cgroup, unless it does. It alone: whoever is left
/// behind by a killed monitor is not to keep the next one out.
fn lock_instance(cgroup: &Cgroup, inheritance: &mut Inheritance, link: &mut Link) -> anyhow::Result<()> {
    let is_lock = |held: &mut Held| held.label == INSTANCE;
    let locks: Vec<Held> = inheritance.held.extract_if(.., is_lock).collect();
    let (there, gone): (Vec<_>, Vec<_>) =
        locks.into_iter().partition(|held| instance::is_of(&held.fd, cgroup.path()));
    for held in gone {
        // Of a cgroup that somebody has removed.
        link.send(&ToMonitor::Drop { key: held.key }, None)?;
    }
    if !there.is_empty() {
        return Ok(());
    }
    let locked = instance::lock(cgroup.path())?;
    let hold = ToMonitor::Hold { key: link.number(), label: INSTANCE.to_vec() };
    link.send(&hold, Some(locked.as_fd()))
}

struct Distributor<'a> {
    place: &'a Instance,
    link: Link,
    configured: Configured<'a>,
    /// In the order in which they began; `Input` names them by their numbers.
    services: Vec<Service>,
    /// Of the next service that begins.
    next_number: usize,
    /// Services that wait for their addresses.
    vacant: Vec<Vacancy>,
    options: service::Options,
    inputs: UnboundedSender<Input>,
    received: UnboundedReceiver<Input>,
    stopping: bool,
    /// Another program is on trial.
    trying: bool,
    /// It takes over now.
    successor: Option<Candidate>,
    /// Why we were not replaced by the last one that was to take over.
    not_upgraded: Option<String>,
    /// The services that were announced on standard output.
    announced: HashSet<usize>,
    recorder: Recorder,
    /// A server that is being adopted.
    adopting: Option<Adopting>,
    /// What is wrong with the machine, beside what its services know of.
    troubles: Troubles,
    /// Who started us, if he wants to know how we are.
    manager: Option<Manager>,
    /// Serves the control socket, if there is one.
    control: Option<ControlSocket>,
    /// For it.
    spare: Option<OwnedFd>,
}

impl<'a> Distributor<'a> {
    /// Makes or takes over everything, up to the point where every server is started or found.
    async fn begin(
        mut configured: Configured<'a>,
        place: &'a Instance,
        log: ProgramLog,
        mut link: Link,
        inheritance: Inheritance,
        spare: Option<OwnedFd>,
    ) -> anyhow::Result<Self> {
        let (inputs, received) = mpsc::unbounded_channel();
        let Inheritance { children, mut held, not_replaced, stop } = inheritance;
        let sockets = notify::held(&mut held);
        let not_upgraded = not_replaced.map(upgrade::not_upgraded);
        if let Some(why) = &not_upgraded {
            warn!("not upgraded: {why}");
        }
        let succession = match held.iter().any(|held| held.label == CONFIGURATION) {
            true => Succession::Next,
            false => Succession::First,
        };
        let mut record = Record::read(&place.runtime_dir).unwrap_or_else(|error| {
            warn!("{error:#}: what runs is known by its cgroups only");
            None
        });
        if succession == Succession::First {
            configured.go_on_scaled(record.as_ref())?;
            record = clear_the_way(&configured.config, place, record)?;
        }
        let runs = succession == Succession::Next || place.is_populated();
        make_notify_dir(place)?;
        let options = service::Options {
            log,
            bell: bell::is_needed(&place.pins).map_err(error::unfit)?,
            audit: auditor::interval()?,
            in_use: false,
        };
        if options.bell {
            info!("this kernel moves a connection without waking its new server; a bell is rung for that");
        }
        let interrupted = record.as_mut().and_then(|record| record.adopting.take());
        let (mut services, mut vacant) = (Vec::new(), Vec::new());
        // Of configurations before this one, some may not have come to their end.
        let leaving = configured.leaving(place);
        for service in &leaving {
            let mut host = Host { place, link: &mut link, inputs: &inputs };
            services.push(Service::open(services.len(), service.clone(), options, &mut host)?);
        }
        for service in &configured.config.services {
            if leaving.iter().any(|leaving| leaving.name == service.name) {
                vacant.push(Vacancy::until_it_has_left(service.clone()));
                continue;
            }
            let adopting = interrupted.as_ref().filter(|adopting| adopting.service == service.name);
            if let Some(waits) = Vacancy::of(service, place, adopting, &children) {
                info!("service {}: {}", service.name, waits.why);
                vacant.push(waits);
                continue;
            }
            let mut host = Host { place, link: &mut link, inputs: &inputs };
            services.push(Service::open(services.len(), service.clone(), options, &mut host)?);
        }
        let announced = match succession {
            Succession::Next => (0..services.len()).collect(),
            Succession::First => HashSet::new(),
        };
        let recorder = Recorder::new(&place.runtime_dir);
        let mut distributor = Self {
            place,
            link,
            configured,
            next_number: services.len(),
            services,
            vacant,
            options,
            inputs,
            received,
            stopping: false,
            trying: false,
            successor: None,
            not_upgraded,
            announced,
            recorder,
            adopting: None,
            troubles: Troubles::default(),
            manager: Manager::from_environment(parent_id(), Instant::now()),
            control: None,
            spare,
        };
        distributor.take_over(children, sockets, record, succession)?;
        distributor.look_around();
        let (services, mut host) = distributor.split();
        services.iter_mut().for_each(Service::begin);
        for service in services.iter_mut().filter(|_| !stop) {
            match leaving.iter().any(|leaving| leaving.name == service.name()) {
                true => service.stop(&mut host),
                false => {
                    service.start(&mut host);
                    if succession == Succession::First {
                        service.replace_outdated(&mut host);
                    }
                }
            }
        }
        if let Some(adopting) = interrupted {
            distributor.finish_adoption(&adopting);
        }
        distributor.write_down();
        match distributor.open_control() {
            // What runs is more than that somebody can ask for it.
            Err(error) if runs => distributor.cannot_be_asked(&error),
            opened => opened?,
        }
        distributor.listen_to_monitor()?;
        if succession == Succession::First {
            // Whoever comes after us goes on where we were. After one that died before this he
            // begins again.
            distributor.configured.hold(&mut distributor.link)?;
        }
        distributor.link.send(&ToMonitor::Ready, None)?;
        if stop {
            distributor.stop();
        }
        Ok(distributor)
    }

    /// Gives every child to its service, and what was recorded to whom it is of. A child that is of
    /// no service is killed: it is of another configuration, and nobody would ever stop it.
    fn take_over(
        &mut self,
        children: Vec<Child>,
        mut sockets: notify::Held,
        record: Option<Record>,
        succession: Succession,
    ) -> anyhow::Result<()> {
        let mut recorded = record.map_or(Vec::new(), |record| record.services);
        let mut found: Vec<Found> = Vec::new();
        let (mut strangers, mut released, mut former) = (Vec::new(), Vec::new(), Vec::new());
        for child in children {
            match serde_json::from_slice(&child.label) {
                _ if child.label.starts_with(service::RELEASED) => released.push(child),
                _ if child.label.starts_with(service::FORMER) => former.push(child),
                Ok(label) => found.push(Found { label, child: Some(child) }),
                Err(_) => strangers.push(child),
            }
        }
        let (services, mut host) = self.split();
        for service in services.iter_mut() {
            let (mut its, others) =
                found.into_iter().partition(|found| found.label.service == service.name());
            found = others;
            let place = recorded.iter().position(|recorded| recorded.name == service.name());
            let recorded = place.map(|place| recorded.swap_remove(place));
            if let Some(recorded) = &recorded {
                service.remember_drift(recorded.drift);
                service.remember_roll(recorded.roll.clone());
            }
            match succession {
                Succession::First => {
                    let surveyed = service.survey(recorded, &its, &mut host)?;
                    its.extend(surveyed);
                }
                Succession::Next => {
                    let recorded = recorded.map_or(Vec::new(), |service| service.servers);
                    let recalled = service.recall(recorded, &its, &mut host)?;
                    its.extend(recalled);
                }
            }
            strangers.extend(service.take_over(its, succession, &mut sockets, &mut host)?);
        }
        for Held { key, .. } in sockets.into_values() {
            self.link.send(&ToMonitor::Drop { key }, None)?;
        }
        strangers.extend(found.into_iter().filter_map(|found| found.child));
        for child in strangers {
            // Its service is not configured any more: it goes its own way.
            let is_guest = serde_json::from_slice(&child.label)
                .is_ok_and(|label: Label| label.adopted.is_some_and(|adopted| adopted.command.is_empty()));
            if is_guest {
                continue;
            }
            if child.exit.is_none() {
                info!("process {} is of no configured server; kills it", child.pid);
                self.link.send(&ToMonitor::Signal { id: child.id, signal: 9 }, None)?;
            }
            self.link.send(&ToMonitor::Forget { id: child.id }, None)?;
        }
        for (service, adopted) in released.iter().filter_map(|child| service::released_by(&child.label)) {
            if let Some(service) = self.services.iter_mut().find(|its| its.name() == service) {
                service.remember_released(adopted);
            }
        }
        for child in released.iter().chain(&former).filter(|child| child.exit.is_some()) {
            self.link.send(&ToMonitor::Forget { id: child.id }, None)?;
        }
        Ok(())
    }

    /// Has the monitor and the disk know what has changed. The monitor has it even if the disk is
    /// full; then a new `dist-ctl up` would find an older state.
    fn write_down(&mut self) {
        // Then we are about to exit, and what failed because of that has not happened.
        if self.link.is_broken() {
            return;
        }
        let (services, mut host) = self.split();
        let mut changed = false;
        for service in services.iter_mut() {
            changed |= service.relabel(&mut host);
        }
        if !changed && !self.troubles.has(RECORD) && self.recorder.has_written() {
            return;
        }
        self.write_record();
        // Or the next distributor, which finds the older record and no child, would take who has
        // ended for running.
        if !self.troubles.has(RECORD) {
            let (services, mut host) = self.split();
            services.iter_mut().for_each(|service| service.forget_ended(&mut host));
        }
    }

    fn write_record(&mut self) {
        let services = self.services.iter().map(Service::record).collect();
        let record = Record::new(services, self.adopting.clone());
        let unwritten = record.and_then(|record| self.recorder.write(&record)).err().map(|error| {
            format!(
                "the record is not written: {}; if everything was killed now, the next dist-ctl up would know an \
                 older state",
                error::sentence(&error)
            )
        });
        self.troubles.note(RECORD, unwritten, SystemTime::now());
    }

    fn split(&mut self) -> (&mut Vec<Service>, Host<'_>) {
        let Self { place, link, services, inputs, .. } = self;
        (services, Host { place, link, inputs })
    }

    /// The control socket cannot be made.
    fn cannot_be_asked(&mut self, error: &anyhow::Error) {
        let what = format!("{}; until it is, nobody can ask anything", error::sentence(error));
        self.troubles.note("control", Some(what), SystemTime::now());
    }

    fn open_control(&mut self) -> anyhow::Result<()> {
        let access = &self.configured.config.control;
        let listener = control::bind(&self.place.runtime_dir, access)?;
        let (requests, mut received) = mpsc::channel(64);
        let spare = self.spare.take();
        let task = spawn_local(control::serve(listener, access.clone(), requests, spare));
        self.control = Some(ControlSocket { task, inode: control_inode(self.place), access: access.clone() });
        let inputs = self.inputs.clone();
        spawn_local(async move {
            while let Some(request) = received.recv().await {
                if inputs.send(Input::Control(request)).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Sees that there are the monitor's lock file and the control socket. If somebody has removed
    /// them, maybe with the whole runtime directory, all is made again by which others know of us.
    fn stay_reachable(&mut self) -> anyhow::Result<()> {
        let place = self.place;
        if let Some(lock) = lock::remake(&place.runtime_dir, parent_id())? {
            warn!("{}: its lock file was removed: makes it again", place.runtime_dir.display());
            let hold = ToMonitor::Hold { key: self.link.number(), label: REMADE.to_vec() };
            self.link.send(&hold, Some(lock.as_fd()))?;
        }
        let (socket, access) = (control_inode(place), &self.configured.config.control);
        if self.control.as_ref().is_some_and(|control| control.inode == socket && control.access == *access) {
            return Ok(());
        }
        make_notify_dir(place)?;
        if let Some(ControlSocket { task, inode, .. }) = self.control.take() {
            if inode == socket {
                // Who has asked for this is answered by it.
                spawn_local(async move {
                    sleep(control::ASK_TIMEOUT).await;
                    task.abort();
                });
            } else {
                warn!("{}: its control socket was removed: makes it again", place.runtime_dir.display());
                self.recorder = Recorder::new(&place.runtime_dir);
                task.abort();
            }
            self.spare = control::spare();
        }
        self.open_control()
    }

    fn listen_to_monitor(&mut self) -> anyhow::Result<()> {
        let watch = self.link.watch()?;
        let inputs = self.inputs.clone();
        spawn_local(async move {
            // Only the signal that there is something; the loop reads it.
            while watch.readable(|| ()).await.is_ok() && inputs.send(Input::MonitorSpeaks).is_ok() {
                yield_now().await;
            }
        });
        Ok(())
    }

    /// The loop.
    async fn work(mut self) -> anyhow::Result<()> {
        let mut looked_around = Instant::now();
        while !(self.stopping && self.services.iter().all(Service::has_stopped)) {
            let next = self.next_tick(looked_around);
            // `None` cannot come: we hold a sender ourselves.
            if let Ok(Some(input)) = timeout_at(next.into(), self.received.recv()).await {
                self.perform(input)?;
            }
            if let Some(successor) = self.successor.take() {
                self.write_down();
                self.make_room(successor).await?;
            }
            let now = Instant::now();
            let (services, mut host) = self.split();
            if now.saturating_duration_since(next) > LATE {
                services.iter_mut().for_each(|service| service.excuse_all(&mut host));
            }
            services.iter_mut().for_each(|service| service.tick(now, &mut host));
            self.let_go();
            self.turn_rolls();
            if now - looked_around >= LOOK_AROUND {
                looked_around = now;
                self.look_around();
                match self.stay_reachable() {
                    Ok(()) => self.troubles.note("control", None, SystemTime::now()),
                    Err(error) => self.cannot_be_asked(&error),
                }
            }
            self.write_down();
            self.announce();
            self.tell_manager();
        }
        self.finish()
    }

    fn next_tick(&self, looked_around: Instant) -> Instant {
        let mut next = looked_around + LOOK_AROUND;
        next = next.min(self.manager.as_ref().and_then(Manager::due).unwrap_or(next));
        for service in &self.services {
            next = next.min(service.deadline().unwrap_or(next));
            if service.is_restless() {
                next = next.min(Instant::now() + RESTLESS);
            }
        }
        next
    }

    fn look_around(&mut self) {
        self.fill_vacancies();
        if !self.stopping {
            self.rescale();
        }
        let (services, mut host) = self.split();
        services.iter_mut().for_each(|service| service.look_around(&mut host));
        // Three, as a server takes to be started; one may be that which the control socket has in reserve.
        let any = |_| eventfd(0, EventfdFlags::CLOEXEC);
        let lacking = (0..3).map(any).collect::<Result<Vec<_>, _>>().err().map(|error| {
            let what = error::advised(format!("open a file: {error}"));
            format!("{what}; until there are more, no server is started again, and no room is made")
        });
        self.troubles.note("descriptors", lacking, SystemTime::now());
        if let Some(manager) = &mut self.manager {
            let summaries = self.services.iter().map(Service::summary);
            manager.sum_up(summaries.fold(Summary::default(), Summary::and), Instant::now());
        }
    }

    /// The loop has come round.
    fn tell_manager(&mut self) {
        if let Some(manager) = &mut self.manager {
            // One that waits for its address does not hold up the others.
            let serves = !self.services.is_empty() && self.services.iter().all(Service::serves);
            manager.turn(serves && !self.stopping, Instant::now());
        }
    }

    fn perform(&mut self, input: Input) -> anyhow::Result<()> {
        if let Input::MonitorSpeaks = input {
            while let Some(message) = self.link.receive()? {
                self.heard(message);
            }
            return Ok(());
        }
        let (services, mut host) = self.split();
        // A service that could not begin may still have been told something.
        match input {
            Input::MonitorSpeaks => {}
            Input::Kernel { service, events } => {
                if let Some(service) = numbered(services, service) {
                    service.kernel_events(&events, &mut host);
                }
            }
            Input::Launched { service, entry, instance, result } => {
                if let Some(service) = numbered(services, service) {
                    service.launched(entry, instance, result, &mut host);
                }
            }
            Input::Notified { service, entry, instance, message } => {
                if let Some(service) = numbered(services, service) {
                    service.notified(entry, instance, &message, &mut host);
                }
            }
            Input::Attendant { service, says } => {
                if let Some(service) = numbered(services, service) {
                    service.attendant_says(says)?;
                }
            }
            Input::Closed { service, entry, result } => {
                if let Some(service) = numbered(services, service) {
                    service.closed(entry, result);
                }
            }
            Input::Audited { service, result } => {
                if let Some(service) = numbered(services, service) {
                    service.audited(result);
                }
            }
            Input::Checked { service, entry, instance, outcome } => {
                if let Some(service) = numbered(services, service) {
                    service.checked(entry, instance, outcome, &mut host);
                }
            }
            Input::Control(Request { command, reply, peer }) => {
                debug!("{peer} asks {command:?}");
                let response = match command {
                    Command::Upgrade { program } => {
                        self.try_out(program, reply);
                        return Ok(());
                    }
                    command => self.answer(command),
                };
                // Before it is answered: who was told that it is done may count on it.
                self.write_down();
                // The client may be gone; what it asked is done all the same.
                let _ = reply.send(response);
            }
            Input::Tried(result, reply) => {
                self.trying = false;
                let response = match result {
                    Ok(_) if self.stopping => Response::failure("upgrade: dist-ctl is being stopped"),
                    Ok(candidate) => {
                        self.not_upgraded = None;
                        self.successor = Some(candidate);
                        Response::Done
                    }
                    Err(refusal) => refusal,
                };
                let _ = reply.send(response);
            }
        }
        Ok(())
    }

    fn heard(&mut self, message: FromMonitor) {
        let (services, mut host) = self.split();
        let mut of_child = |id: u64, tell: &mut dyn FnMut(&mut Service, usize, &mut Host<'_>)| {
            for service in services.iter_mut() {
                if let Some(entry) = service.entry_of_child(id) {
                    tell(service, entry, &mut host);
                    return true;
                }
            }
            false
        };
        match message {
            FromMonitor::Started { id, pid } => {
                of_child(id, &mut |service, entry, host| service.started(entry, pid, host));
            }
            FromMonitor::NotStarted { id, errno } => {
                of_child(id, &mut |service, entry, host| service.not_started(entry, errno, host));
            }
            FromMonitor::Exited { id, exit, .. } => {
                if !of_child(id, &mut |service, entry, host| service.exited(entry, exit, host)) {
                    let _ = self.link.send(&ToMonitor::Forget { id }, None);
                }
            }
            FromMonitor::Orphan { .. } => {
                services.iter_mut().for_each(|service| service.orphan_exited(&mut host));
            }
            FromMonitor::NotHeld { key, errno } => {
                let why = std::io::Error::from_raw_os_error(errno);
                error!("the monitor cannot hold descriptor {key}: {why}; raise its limit of open files");
            }
            FromMonitor::Stop => self.stop(),
            FromMonitor::Reload => self.reload_as_told(),
            FromMonitor::Child { .. }
            | FromMonitor::Held { .. }
            | FromMonitor::NotReplaced { .. }
            | FromMonitor::Begin => {
                debug!("the monitor told twice what is told at the beginning");
            }
        }
    }

    fn stop(&mut self) {
        if !self.stopping {
            info!("stops: takes no new connections, and ends the servers");
            if let Some(manager) = &mut self.manager {
                manager.stopping(Instant::now());
            }
        }
        self.stopping = true;
        let (services, mut host) = self.split();
        services.iter_mut().for_each(|service| service.stop(&mut host));
    }

    /// One line on standard output for each service, once all its servers are ready.
    fn announce(&mut self) {
        for service in &self.services {
            if service.is_ready() && self.announced.insert(service.number()) {
                let service = service.config();
                let listen: Vec<String> = service.listen.iter().map(ToString::to_string).collect();
                let servers = service.servers.len();
                let noun = if servers == 1 { "server" } else { "servers" };
                let line =
                    format!("{}: listening on {}, {servers} {noun}\n", service.name, listen.join(", "));
                // If it cannot be written, that must stop nothing.
                let _ = std::io::stdout().write_all(line.as_bytes());
            }
        }
    }

    /// Everything is stopped: removes what is outside of the processes, and says so.
    fn finish(self) -> anyhow::Result<()> {
        let Self { place, link, services, .. } = self;
        services.into_iter().for_each(Service::end);
        place.remove()?;
        link.send(&ToMonitor::Finished { code: 0 }, None)
    }
}

/// The service with this number, if it is still there.
fn numbered(services: &mut [Service], number: usize) -> Option<&mut Service> {
    services.iter_mut().find(|service| service.number() == number)
}

/// Serves the control socket.
struct ControlSocket {
    task: JoinHandle<()>,
    /// Of its file.
    inode: Option<u64>,
    /// Who may talk to it.
    access: config::Control,
}

/// The number of whatever stands at the control socket's place.
fn control_inode(place: &Instance) -> Option<u64> {
    fs::symlink_metadata(place.runtime_dir.join(control::SOCKET)).ok().map(|file| file.ino())
}

fn make_notify_dir(place: &Instance) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o711).create(place.notify_dir()) {
        Err(error) if !place.notify_dir().is_dir() => {
            Err(error).context("create the directory of the notify sockets")
        }
        _ => Ok(()),
    }
}

/// Ends what an earlier run has left and what cannot go on: services that are not configured any
/// more, or otherwise than before. What is to be made anew must be possible.
///
/// What is recorded of the others is of no more use, but for servers that were adopted: these get
/// their address back.
fn clear_the_way(
    config: &Config,
    place: &Instance,
    mut record: Option<Record>,
) -> anyhow::Result<Option<Record>> {
    let mut kept = Vec::new();
    for service in &config.services {
        let recorded =
            record.as_ref().and_then(|record| record.services.iter().find(|its| its.name == service.name));
        match service::left(service, recorded, place)? {
            Left::Nothing => {}
            Left::Servers => kept.push(service.name.as_str()),
            Left::Otherwise(why) => {
                warn!("service {}: {why}: what runs of it is killed, and it starts afresh", service.name);
            }
        }
    }
    place.clean_leftovers(&kept)?;
    if let Some(record) = &mut record {
        let (goes_on, ended) = std::mem::take(&mut record.services)
            .into_iter()
            .partition(|service: &record::Service| kept.contains(&service.name.as_str()));
        record.services = goes_on;
        ended.iter().flat_map(record::Service::guests).for_each(service::give_back);
    }
    let waits = |service: &config::Service| service.occupied == Occupied::Wait;
    let new =
        config.services.iter().filter(|service| !kept.contains(&service.name.as_str()) && !waits(service));
    new.flat_map(|service| &service.listen).try_for_each(room::check_free)?;
    Ok(record)
}
