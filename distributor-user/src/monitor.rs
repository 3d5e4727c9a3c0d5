//! The monitor: parent of the distributor and of every server.
//!
//! It starts and signals servers when the distributor asks, watches those that somebody else
//! started, reports how they end, keeps descriptors for the next distributor, and starts that
//! one when the distributor dies, or another program in its place. It reads no configuration and no job, waits for nobody without a limit, and remembers only
//! what the next distributor must be told. What to do is decided in monitor/state.rs, and done
//! here; message.rs says what each message means.
#![forbid(unsafe_code)]

#[cfg(test)]
mod model;
mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::signal::SigSet;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus},
};
use signal_hook::{
    consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM},
    iterator::{backend::SignalDelivery, exfiltrator::SignalOnly},
};

use self::state::{Action, Distributor, Event, State};
use crate::{
    lock::Lock,
    message::{Channel, Exit, FromMonitor},
};

/// The environment variable that tells the launcher how many files a server may open unless
/// its job says otherwise: what `dist-ctl up` was given, before the monitor raised its own.
pub(crate) const OPEN_FILES: &str = "DIST_CTL_OPEN_FILES";

/// This very program, even after an upgrade has replaced its file.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// How long a distributor that closed its channel may take to exit.
const EXIT_TIME: Duration = Duration::from_secs(5);

/// How many messages may wait for a distributor that does not read. Beyond that its requests
/// wait in the socket, and dead children as zombies: the kernel loses neither.
const QUEUE: usize = 1024;

/// Descriptors that the monitor needs for itself, to start a process for example.
const OWN_DESCRIPTORS: u64 = 64;

/// Runs `dist-ctl up` with these arguments, which are the distributor's, until it is over.
pub fn run(arguments: Vec<OsString>, runtime_dir: &Path) -> anyhow::Result<ExitCode> {
    let mut distributor = vec![THIS_PROGRAM.into(), "distributor".into()];
    distributor.extend(arguments);
    let programs = Programs { distributor, launcher: vec![THIS_PROGRAM.into(), "launch".into()] };
    supervise(programs, runtime_dir).map(ExitCode::from)
}

/// What to start: each a program and its arguments. Tests have others.
struct Programs {
    distributor: Vec<OsString>,
    launcher: Vec<OsString>,
}

fn supervise(programs: Programs, runtime_dir: &Path) -> anyhow::Result<u8> {
    let lock = Lock::take(runtime_dir)?;
    let (arrived, write) = UnixStream::pair().context("make a pipe for signals")?;
    // Whoever started us may have blocked some.
    SigSet::empty().thread_set_mask().context("unblock signals")?;
    let wanted = [SIGCHLD, SIGHUP, SIGINT, SIGTERM];
    let mut signals =
        SignalDelivery::with_pipe(arrived, write, SignalOnly, wanted).context("catch signals")?;
    // What servers leave behind when they daemonise or die becomes our child, not init's.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("become the reaper of orphans")?;

    let mut monitor = Monitor::new(programs);
    let code = loop {
        monitor.step(Event::Time);
        if let Some(code) = monitor.finished {
            break code;
        }
        let ended = monitor.wait(signals.get_read())?;
        for signal in signals.pending() {
            match signal {
                SIGTERM | SIGINT => monitor.step(Event::Stop),
                SIGHUP => monitor.step(Event::Reload),
                // Its use is to wake us: `reap` follows.
                _ => {}
            }
        }
        monitor.read();
        // First, because of who has become our child since we watch him we know how he ended.
        monitor.reap();
        ended.into_iter().for_each(|id| monitor.step(Event::WatchedEnded { id }));
        monitor.write();
    };
    monitor.end_what_is_left();
    drop(lock);
    Ok(code)
}

/// Does what [`State`] decides.
struct Monitor {
    programs: Programs,
    state: State<OwnedFd>,
    channel: Option<Channel>,
    /// What the distributor has not taken yet.
    queue: VecDeque<FromMonitor>,
    finished: Option<u8>,
    /// The limit on open files that we were given.
    open_files: Option<u64>,
}

impl Monitor {
    fn new(programs: Programs) -> Self {
        // Shells give 1024, and the distributor, which inherits it, has thousands of rooms.
        let given = rustix::process::getrlimit(Resource::Nofile);
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: given.maximum, ..given });
        let files = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most_held = usize::try_from(files.saturating_sub(OWN_DESCRIPTORS)).unwrap_or(usize::MAX);
        Self {
            programs,
            state: State::new(Instant::now(), most_held),
            channel: None,
            queue: VecDeque::new(),
            finished: None,
            open_files: given.current,
        }
    }

    fn step(&mut self, event: Event<OwnedFd>) {
        for action in self.state.step(event, Instant::now()) {
            match action {
                Action::StartDistributor => {
                    let result = self.start_distributor();
                    self.step(Event::DistributorStarted(result));
                }
                Action::StartServer { id, label, stdin } => {
                    let result = self.start_server(stdin);
                    self.step(Event::ServerStarted { id, label, result });
                }
                Action::Signal { pid, signal } => send_signal(pid, signal),
                Action::SignalWatched { id, signal } => self.signal_watched(id, signal),
                Action::Tell(message) => self.queue.push_back(message),
                Action::Say(sentence) => tracing::warn!("{sentence}"),
                Action::Finish(code) => self.finished = Some(code),
            }
        }
    }

    fn start_distributor(&mut self) -> io::Result<u32> {
        let (ours, theirs) = Channel::pair()?;
        ours.set_nonblocking()?;
        let pid = command(&self.programs.distributor, self.state.program.as_ref())
            .stdin(OwnedFd::from(theirs))
            // Ctrl-C is for the monitor, which says Stop.
            .process_group(0)
            .spawn()?
            .id();
        self.queue.clear();
        self.channel = Some(ours);
        tracing::debug!("the distributor runs (pid {pid})");
        Ok(pid)
    }

    fn start_server(&self, stdin: OwnedFd) -> Result<u32, i32> {
        let mut launcher = command(&self.programs.launcher, self.state.program.as_ref());
        launcher.stdin(stdin);
        if let Some(open_files) = self.open_files {
            launcher.env(OPEN_FILES, open_files.to_string());
        }
        match launcher.spawn() {
            Ok(child) => Ok(child.id()),
            Err(error) => Err(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error())),
        }
    }

    /// By its descriptor, which is no other process's however long this one has been dead.
    fn signal_watched(&self, id: u64, signal: i32) {
        let Some((_, pidfd)) = self.state.watched().find(|(watched, _)| *watched == id) else {
            return;
        };
        let Some(named) = Signal::from_named_raw(signal) else {
            tracing::warn!("signal {signal} for watched process {id}: it has no name, so it is not sent");
            return;
        };
        match rustix::process::pidfd_send_signal(pidfd, named) {
            // That it is gone is about to be noticed.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::warn!("send signal {signal} to watched process {id}: {error}"),
        }
    }

    /// Sleeps until there is something to do. Gives the watched processes that have ended.
    fn wait(&self, signals: &UnixStream) -> anyhow::Result<Vec<u64>> {
        let mut events = vec![];
        let mut watched = vec![];
        // With a full queue they may stay as they are, like children that nobody has reaped.
        if self.queue.len() < QUEUE {
            for (id, pidfd) in self.state.watched() {
                events.push(PollFd::new(pidfd, PollFlags::IN));
                watched.push(id);
            }
        }
        events.push(PollFd::new(signals, PollFlags::IN));
        if let Some(channel) = &self.channel {
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, self.queue.len() < QUEUE);
            wanted.set(PollFlags::OUT, !self.queue.is_empty());
            events.push(PollFd::new(channel, wanted));
        }
        let timeout = self.state.deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec::try_from(left).expect("a backoff fits")
        });
        match rustix::event::poll(&mut events, timeout.as_ref()) {
            Ok(_) => {
                let ended = watched.into_iter().zip(&events).filter(|(_, event)| !event.revents().is_empty());
                Ok(ended.map(|(id, _)| id).collect())
            }
            Err(Errno::INTR) => Ok(vec![]),
            Err(error) => Err(error).context("wait for something to happen"),
        }
    }

    /// Does what the distributor asks: not without end, others want to be heard.
    fn read(&mut self) {
        for _ in 0..QUEUE {
            let (Some(channel), true) = (&self.channel, self.queue.len() < QUEUE) else {
                return;
            };
            match channel.receive() {
                Ok(Some((message, descriptor))) => self.step(Event::Asked(message, descriptor)),
                // It may be newer than we are, and know more messages.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!("the distributor sent {error}: it is ignored");
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => return self.hang_up(),
            }
        }
    }

    /// Tells the distributor what waits for it.
    fn write(&mut self) {
        while let (Some(channel), Some(message)) = (&self.channel, self.queue.front()) {
            let descriptor = match message {
                FromMonitor::Held { key, .. } => match self.state.held.get(key) {
                    Some(held) => Some(held.descriptor.as_fd()),
                    // It was dropped since this was queued.
                    None => {
                        self.queue.pop_front();
                        continue;
                    }
                },
                _ => None,
            };
            match channel.send(message, descriptor) {
                Ok(()) => self.queue.pop_front(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.hang_up(),
            };
        }
    }

    /// The channel is of no more use. What the distributor said before is still done: a room
    /// that it gave us last must not close.
    fn hang_up(&mut self) {
        let Some(channel) = self.channel.take() else {
            return;
        };
        loop {
            match channel.receive() {
                Ok(Some((message, descriptor))) => self.step(Event::Asked(message, descriptor)),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.queue.clear();
        self.step(Event::HungUp);
    }

    /// Notes who has exited: first of all the distributor, or a full queue would hide it.
    fn reap(&mut self) {
        if let Distributor::Running { pid, .. } = self.state.distributor
            && let Ok(Some((pid, status))) =
                rustix::process::waitpid(Pid::from_raw(pid.cast_signed()), WaitOptions::NOHANG)
        {
            self.exited(pid, status);
        }
        while self.queue.len() < QUEUE {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.exited(pid, status),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn exited(&mut self, pid: Pid, status: WaitStatus) {
        let pid = pid.as_raw_pid().cast_unsigned();
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => unreachable!("only ended processes are waited for"),
        };
        if matches!(self.state.distributor, Distributor::Running { pid: its, .. } if its == pid) {
            self.hang_up();
        }
        self.step(Event::Exited { pid, exit });
    }

    /// No child of ours outlives us, except what cannot die: everything is killed, and what
    /// that leaves to us as well. Only the distributor gets time to exit by itself.
    ///
    /// Watched processes are left alone. The distributor has ended those that were the
    /// service's before it said `Finished`, by signals and by their cgroups. If it could not,
    /// they live on like after our own death, and the next dist-ctl finds them. And a server
    /// that somebody else lent to the service is not ours to end.
    fn end_what_is_left(&mut self) {
        let leaving = match self.state.distributor {
            Distributor::Done { leaving } => leaving,
            Distributor::Running { .. } | Distributor::Down { .. } => None,
        };
        self.channel = None;
        let started = Instant::now();
        loop {
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            let left = children();
            if left.is_empty() {
                return;
            }
            if started.elapsed() > 2 * EXIT_TIME {
                tracing::warn!("processes {left:?} do not die: dist-ctl exits without them");
                return;
            }
            for pid in left {
                if started.elapsed() > EXIT_TIME || Some(pid) != leaving {
                    send_signal(pid, Signal::KILL.as_raw());
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The descriptor's program instead of the first word, if there is one. It is closed on exec,
/// which is after the kernel has found the program by it.
fn command(words: &[OsString], program: Option<&OwnedFd>) -> Command {
    let mut command = match program {
        Some(program) => Command::new(format!("/proc/self/fd/{}", program.as_raw_fd())),
        None => Command::new(&words[0]),
    };
    // What ps shows; a path below /proc/self would tell nobody anything.
    command.arg0("dist-ctl").args(&words[1..]);
    command
}

/// For children only: a pid that has not been waited for is nobody else's.
fn send_signal(pid: u32, signal: i32) {
    let (Some(process), Some(named)) = (Pid::from_raw(pid.cast_signed()), Signal::from_named_raw(signal))
    else {
        tracing::warn!("signal {signal} for process {pid}: it has no name, so it is not sent");
        return;
    };
    if let Err(error) = rustix::process::kill_process(process, named) {
        tracing::warn!("send signal {signal} to process {pid}: {error}");
    }
}

/// Who they are, the orphans that came to us included. /proc/self/task/*/children would do,
/// but not every kernel is built with it.
fn children() -> Vec<u32> {
    let me = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let stat = fs::read(process.path().join("stat")).ok()?;
            // The name, in parentheses, may contain anything; state and parent follow it.
            let stat = String::from_utf8_lossy(&stat);
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
            (parent.parse() == Ok(me)).then_some(pid)
        })
        .collect()
}
