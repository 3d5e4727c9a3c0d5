//! Processes as /proc shows them.
//!
//! A process is named by its id and its start time together, so that a signal never reaches
//! another one that got the same id later.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open, pidfd_send_signal};

use crate::wait::wait_for;

/// One process that ran when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// When it started, in clock ticks after boot.
    pub started: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        Some(Self { pid, started: stat.started })
    }

    /// This process.
    pub fn own() -> Self {
        let pid = std::process::id() as i32;
        Self::find(pid).expect("/proc shows the process that reads it")
    }

    /// It runs, or has exited and was not waited for yet.
    pub fn exists(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// It runs (a zombie does not).
    pub fn runs(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.started == self.started && stat.runs())
    }

    /// Sends a signal, if it still runs.
    pub fn signal(self, signal: Signal) {
        let pid = Pid::from_raw(self.pid).expect("a found process has an id");
        // The descriptor keeps the id from being given to another process between the look
        // and the signal.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        if self.exists() {
            // It may have exited since; that is as good.
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }

    /// Kills it and waits until it is gone.
    #[track_caller]
    pub fn kill(self, within: Duration) {
        self.signal(Signal::KILL);
        wait_for(&format!("the end of killed process {}", self.pid), within, || (!self.runs()).then_some(()));
    }

    /// Stops it, as Ctrl-Z does: it keeps its sockets, and does nothing.
    #[track_caller]
    pub fn freeze(self, within: Duration) {
        self.signal(Signal::STOP);
        wait_for(&format!("process {} to stop", self.pid), within, || {
            (Stat::read(self.pid)?.state == 'T').then_some(())
        });
    }

    /// Its parent's id.
    pub fn parent(self) -> Option<i32> {
        Stat::read(self.pid).map(|stat| stat.parent)
    }

    /// The processes whose parent it is.
    pub fn children(self) -> Vec<Self> {
        all().filter(|process| process.parent() == Some(self.pid)).collect()
    }

    /// Its command line.
    pub fn arguments(self) -> Vec<String> {
        read_zero_separated(self.pid, "cmdline").collect()
    }

    /// The environment it was started with.
    pub fn environment(self) -> BTreeMap<String, String> {
        read_zero_separated(self.pid, "environ")
            .filter_map(|entry| {
                let (name, value) = entry.split_once('=')?;
                Some((name.to_owned(), value.to_owned()))
            })
            .collect()
    }

    /// A line of /proc/PID/status, such as `CapEff` or `Uid`.
    #[track_caller]
    pub fn fact(self, name: &str) -> String {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid))
            .unwrap_or_else(|error| panic!("read status of process {}: {error}", self.pid));
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_else(|| panic!("status of process {} has no line {name}", self.pid))
            .trim()
            .to_owned()
    }

    /// A line of /proc/PID/limits: soft and hard.
    #[track_caller]
    pub fn limit(self, name: &str) -> (String, String) {
        let text = fs::read_to_string(format!("/proc/{}/limits", self.pid))
            .unwrap_or_else(|error| panic!("read limits of process {}: {error}", self.pid));
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("limits of process {} have no line {name}", self.pid));
        let mut columns = line.split_whitespace().map(str::to_owned);
        let mut next = || columns.next().expect("a limit has two values");
        (next(), next())
    }

    /// The file of its program.
    pub fn program(self) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid))
    }

    /// Its working directory.
    pub fn directory(self) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{}/cwd", self.pid))
    }

    /// Its path in the cgroup v2 tree, below the mount.
    pub fn cgroup(self) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        Some(PathBuf::from(path))
    }

    /// Its open descriptors and what they are.
    pub fn descriptors(self) -> BTreeMap<i32, String> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            return BTreeMap::new();
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let number = entry.file_name().to_str()?.parse().ok()?;
                let target = fs::read_link(entry.path()).ok()?;
                Some((number, target.to_string_lossy().into_owned()))
            })
            .collect()
    }

    /// It is in the network namespace with this inode.
    pub fn is_in_network(self, inode: u64) -> bool {
        namespace_inode(&format!("/proc/{}/ns/net", self.pid)) == Some(inode)
    }
}

/// Every process that runs now.
pub fn all() -> impl Iterator<Item = Process> {
    fs::read_dir("/proc")
        .expect("read /proc")
        .flatten()
        .filter_map(|entry| Process::find(entry.file_name().to_str()?.parse().ok()?))
}

/// The processes of a cgroup and of those below it.
pub fn in_cgroup(directory: &Path) -> Vec<Process> {
    let mut found = Vec::new();
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        let pids = text.lines().filter_map(|line| line.parse().ok());
        found.extend(pids.filter_map(Process::find));
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(in_cgroup(&entry.path()));
        }
    }
    found
}

/// Sends a signal to a child that was not waited for yet, so its id is still its own.
pub fn signal_child(child: &std::process::Child, signal: Signal) {
    let pid = Pid::from_raw(child.id() as i32).expect("a child has an id");
    // It may have exited already.
    let _ = kill_process(pid, signal);
}

/// The inode of a namespace file; two processes share a namespace if it is the same.
fn namespace_inode(path: &str) -> Option<u64> {
    let link = fs::read_link(path).ok()?;
    let name = link.to_str()?;
    name.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

fn read_zero_separated(pid: i32, file: &str) -> impl Iterator<Item = String> {
    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let entries: Vec<String> = bytes
        .split(|byte| *byte == 0)
        .filter(|entry| !entry.is_empty())
        .map(|entry| String::from_utf8_lossy(entry).into_owned())
        .collect();
    entries.into_iter()
}

/// The fields of /proc/PID/stat that are used here.
struct Stat {
    state: char,
    parent: i32,
    started: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold spaces and parentheses; the last one ends it.
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        // The start time is field 22; the parent was field 4.
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self { state, parent, started })
    }

    fn runs(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }
}
