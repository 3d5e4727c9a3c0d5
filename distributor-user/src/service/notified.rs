//! What a server says by sd_notify, and what that leads to.
//!
//! notify.rs has heard it. Here it is believed if one of the server's own processes said it, and
//! told to its state machine.
#![forbid(unsafe_code)]

use tokio::task::JoinHandle;
use tracing::debug;

use super::{Host, Service};
use crate::{
    notify::{self, Notification},
    server::{Instance, Report},
};

/// Who listens to what an instance says.
pub(super) struct Hearing {
    pub(super) task: JoinHandle<()>,
    /// The monitor's number of the socket.
    pub(super) key: u64,
}

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
            debug!("server {}: ignores a notification of another process", self.entries[entry].config.name);
            return;
        }
        for notification in &message.notifications {
            let report = match notification {
                Notification::Ready => Report::NotifyReady,
                Notification::Stopping => Report::NotifyStopping,
                Notification::Status(text) => Report::NotifyStatus(text.clone()),
                Notification::Watchdog => {
                    self.excuse(entry, host);
                    continue;
                }
                Notification::WatchdogTrigger => Report::NotifyWatchdogTrigger,
                Notification::WatchdogInterval(interval) => Report::NotifyWatchdogInterval(*interval),
                Notification::ExtendTimeout(by) => Report::NotifyExtendTimeout(*by),
                Notification::MainPid(_) | Notification::Other => continue,
            };
            self.report(entry, report, host);
        }
    }

    /// It is well, as far as we know: it has its whole time again to say so.
    pub(super) fn excuse(&mut self, entry: usize, host: &mut Host<'_>) {
        let changed = self.entries[entry].changed;
        self.report(entry, Report::NotifyWatchdog, host);
        // The next distributor does the same, so nothing has to be written down every time.
        self.entries[entry].changed = changed;
    }

    /// We could not listen for a while, so nobody is to be blamed for having said nothing.
    pub fn excuse_all(&mut self, host: &mut Host<'_>) {
        for entry in 0..self.entries.len() {
            self.excuse(entry, host);
        }
    }
}
