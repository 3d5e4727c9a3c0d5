//! What a server says by sd_notify, and what that leads to.
//!
//! notify.rs has heard it. Here it is believed if one of the server's own processes said it, and
//! told to its state machine.
#![forbid(unsafe_code)]

use std::{os::fd::AsFd as _, time::Instant};

use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::{Entry, Host, Service};
use crate::{
    message::ToMonitor,
    notify::{self, Notification},
    record,
    server::{Instance, Main, Report},
};

/// Who listens to what an instance says.
pub(super) struct Hearing {
    pub(super) task: JoinHandle<()>,
    /// The monitor's number of the socket.
    pub(super) key: u64,
    /// The main process that it has named before its launch was settled.
    main: Option<u32>,
}

impl Hearing {
    pub(super) fn new(task: JoinHandle<()>, key: u64) -> Self {
        Self { task, key, main: None }
    }
}

/// What the label of a process begins with that was a server's main one.
pub const FORMER: &[u8] = b"former ";

impl Service {
    pub fn notified(
        &mut self,
        entry: usize,
        instance: Instance,
        message: &notify::Message,
        host: &mut Host<'_>,
    ) {
        let Some(run) = self.entries[entry].run.as_ref().filter(|run| run.instance == instance) else {
            return;
        };
        // Anybody with the server's uid can write to its socket; only its own processes count.
        if !message.sender.is_some_and(|sender| run.cgroup.processes().contains(&sender)) {
            debug!("server {}: ignores a notification of another process", self.entries[entry].name());
            return;
        }
        for notification in &message.notifications {
            let report = match notification {
                Notification::Ready => Report::NotifyReady,
                Notification::Stopping => Report::NotifyStopping,
                Notification::Status(text) => Report::NotifyStatus(text.clone()),
                Notification::Watchdog => {
                    self.report_unwritten(entry, Report::NotifyWatchdog, host);
                    continue;
                }
                Notification::WatchdogTrigger => Report::NotifyWatchdogTrigger,
                Notification::WatchdogInterval(interval) => Report::NotifyWatchdogInterval(*interval),
                Notification::ExtendTimeout(by) => Report::NotifyExtendTimeout(*by),
                Notification::MainPid(pid) => {
                    if let Some(hearing) =
                        self.entries[entry].run.as_mut().and_then(|run| run.notify.as_mut())
                    {
                        hearing.main = Some(*pid);
                    }
                    self.follow_main(entry, host);
                    continue;
                }
                Notification::Load(_) | Notification::Capacity(_) | Notification::Wrong(_) => {
                    self.told_load(entry, notification);
                    continue;
                }
                Notification::Other => continue,
            };
            self.report(entry, report, host);
        }
    }

    /// Has the monitor watch the process that the server has named as its main one, in the place of
    /// the one before. That is no business of ours any more, until its cgroup is cleared.
    pub(super) fn follow_main(&mut self, entry: usize, host: &mut Host<'_>) {
        let name = self.entries[entry].name();
        let Entry { machine, run, .. } = &mut self.entries[entry];
        let is_settled = machine.run().is_some_and(|run| match run.main() {
            Main::Running { .. } | Main::Background => true,
            Main::Launching | Main::Ended => false,
        });
        let Some(run) = run.as_mut().filter(|_| is_settled) else { return };
        let Some(pid) = run.notify.as_mut().and_then(|hearing| hearing.main.take()) else { return };
        if machine.pid() == Some(pid) {
            return;
        }
        // In there after it was opened: so it is no other process of the same number.
        let process = record::process(pid).filter(|_| run.cgroup.processes().contains(&pid));
        let Some((pidfd, start_time)) = process else {
            warn!(
                "server {name} says that process {pid} is its main one, and has none of that number: ignores it"
            );
            return;
        };
        info!("server {name} goes on with process {pid} as its main one");
        // Before the other is watched: two children with the label of one server would be one too many
        // to the next distributor.
        let former = ToMonitor::Relabel { id: run.id, label: [FORMER, name.as_bytes()].concat() };
        self.ended.push(run.id);
        (run.id, run.pid, run.start_time) = (host.link.number(), Some(pid), Some(start_time));
        if let Err(error) = host.link.send(&former, None) {
            debug!("server {name}: {error:#}");
        }
        self.report(entry, Report::MainPid { pid }, host);
        self.watch(entry, pidfd.as_fd(), host);
    }

    /// We could not listen or look for a while, so what we have not heard or seen of it says nothing: it has
    /// its whole time again.
    pub(super) fn excuse(&mut self, entry: usize, host: &mut Host<'_>) {
        self.report_unwritten(entry, Report::Unobserved, host);
        if let Some(run) = &mut self.entries[entry].run {
            run.strain.excuse(Instant::now());
            run.queue = None;
        }
    }

    /// What the next distributor assumes anyway has not to be written down every time.
    pub(super) fn report_unwritten(&mut self, entry: usize, report: Report, host: &mut Host<'_>) {
        let changed = self.entries[entry].changed;
        self.report(entry, report, host);
        self.entries[entry].changed = changed;
    }

    /// Nobody is to be blamed for what we have not heard or seen.
    pub fn excuse_all(&mut self, host: &mut Host<'_>) {
        (0..self.entries.len()).for_each(|entry| self.excuse(entry, host));
    }
}
