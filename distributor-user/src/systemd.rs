//! What dist-ctl says of itself to the service manager that started it, by sd_notify.
//!
//! That manager knows the monitor as the main process of its unit, and by default hears nobody
//! else. So that the monitor can stay small, the distributor speaks in its name, which the kernel
//! allows with CAP_SYS_ADMIN (SCM_CREDENTIALS in unix(7)), as sd_pid_notify(3) does. Every
//! distributor says it anew: what was heard before is heard once more, and changes nothing. That
//! all is well is said by the loop alone, and so only while that turns.
#![forbid(unsafe_code)]

use std::{
    env, fmt,
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
        SocketType, UCred, sendmsg_addr, socket_with,
    },
    process::{Pid, getgid, getuid},
    time::{ClockId, clock_gettime},
};
use tracing::{debug, warn};

/// Who wants to be told.
#[derive(Debug)]
pub struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
    /// In whose name.
    monitor: Pid,
    /// How often it wants to hear that all is well.
    watchdog: Option<Duration>,
    next_watchdog: Instant,
    /// After something could not be said.
    silent_until: Instant,
    ready: bool,
    status: String,
}

/// What the status line says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub servers: usize,
    pub ready: usize,
    /// Connections that wait.
    pub waiting: u64,
}

impl Manager {
    /// The one that the environment names. `None`: there is none, or it cannot be spoken to, which is
    /// logged.
    pub fn from_environment(monitor: u32, now: Instant) -> Option<Self> {
        let name = env::var("NOTIFY_SOCKET").ok()?;
        let made = address(&name).ok_or(Errno::AFNOSUPPORT).and_then(|address| {
            let kind = SocketType::DGRAM;
            Ok((address, socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?))
        });
        let (address, socket) = match made {
            Ok(made) => made,
            Err(error) => {
                warn!("NOTIFY_SOCKET={name}: {error}: the service manager is not told how dist-ctl is");
                return None;
            }
        };
        let [interval, pid] = ["WATCHDOG_USEC", "WATCHDOG_PID"].map(|name| env::var(name).ok());
        Some(Self {
            socket,
            address,
            monitor: Pid::from_raw(monitor.cast_signed())?,
            watchdog: watchdog(interval.as_deref(), pid.as_deref(), monitor),
            next_watchdog: now,
            silent_until: now,
            ready: false,
            status: String::new(),
        })
    }

    /// When `turn` has something to say, whatever else happens.
    pub fn due(&self) -> Option<Instant> {
        self.watchdog.map(|_| self.next_watchdog.max(self.silent_until))
    }

    /// The loop has come round. `serves`: every service has a server that is ready.
    pub fn turn(&mut self, serves: bool, now: Instant) {
        if let Some(interval) = self.watchdog
            && self.due().is_some_and(|due| due <= now)
            && self.say("WATCHDOG=1", now)
        {
            self.next_watchdog = now + interval;
        }
        if serves && !self.ready && self.silent_until <= now {
            self.ready = self.say(&format!("READY=1\nMAINPID={}", self.monitor.as_raw_pid()), now);
        }
    }

    /// How things are. Said only if that has changed.
    pub fn sum_up(&mut self, summary: Summary, now: Instant) {
        let status = summary.to_string();
        if status != self.status && self.silent_until <= now && self.say(&format!("STATUS={status}"), now) {
            self.status = status;
        }
    }

    /// The configuration is read again. Said with the time, as Type=notify-reload wants it (sd_notify(3)).
    pub fn reloading(&mut self, now: Instant) {
        let time = clock_gettime(ClockId::Monotonic);
        let micros = time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1_000;
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"), now);
    }

    /// It has been, whatever came of it: it is to be said again that we are ready.
    pub fn reloaded(&mut self) {
        self.ready = false;
    }

    /// All is being stopped.
    pub fn stopping(&mut self, now: Instant) {
        self.say("STOPPING=1", now);
    }

    /// False if it was not heard; then nothing is said for a moment.
    fn say(&mut self, words: &str, now: Instant) -> bool {
        let in_its_name = Some(UCred { pid: self.monitor, uid: getuid(), gid: getgid() });
        let said = match self.send(words, in_its_name) {
            // In a container that has not the right to; some managers hear everybody.
            Err(Errno::PERM) => self.send(words, None),
            said => said,
        };
        if let Err(error) = said {
            debug!("tell the service manager {words:?}: {error}; tries again");
            self.silent_until = now + self.watchdog.unwrap_or(PAUSE).min(PAUSE);
        }
        said.is_ok()
    }

    fn send(&self, words: &str, sender: Option<UCred>) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(sender) = sender {
            control.push(SendAncillaryMessage::ScmCredentials(sender));
        }
        let words = [IoSlice::new(words.as_bytes())];
        // It may not listen just now, and nothing here may wait.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg_addr(&self.socket, &self.address, &words, &mut control, flags).map(drop)
    }
}

impl Summary {
    /// That of both.
    pub fn and(self, other: Self) -> Self {
        Self {
            servers: self.servers + other.servers,
            ready: self.ready + other.ready,
            waiting: self.waiting + other.waiting,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { servers, ready, waiting } = self;
        let noun = if *servers == 1 { "server" } else { "servers" };
        write!(f, "{servers} {noun}, {ready} ready, {waiting} waiting")
    }
}

/// How long to wait after something could not be said.
const PAUSE: Duration = Duration::from_secs(1);

/// What NOTIFY_SOCKET names: a path, or with @ an abstract socket. `None`: something else, such as a
/// vsock of a virtual machine.
fn address(name: &str) -> Option<SocketAddrUnix> {
    match name.strip_prefix('@') {
        Some(name) if !name.is_empty() => SocketAddrUnix::new_abstract_name(name.as_bytes()).ok(),
        None if name.starts_with('/') => SocketAddrUnix::new(name).ok(),
        _ => None,
    }
}

/// Half of the time within which it wants to hear that all is well, as sd_watchdog_enabled(3) advises.
/// `None`: it does not, or not from us.
fn watchdog(interval: Option<&str>, pid: Option<&str>, monitor: u32) -> Option<Duration> {
    let is_meant = pid.is_none_or(|pid| pid.parse() == Ok(monitor));
    let interval: u64 = interval?.parse().ok().filter(|interval| *interval > 0 && is_meant)?;
    Some(Duration::from_micros(interval) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_abstract_names_are_understood() {
        for (name, expected) in [
            ("/run/systemd/notify", Some(SocketAddrUnix::new("/run/systemd/notify").unwrap())),
            ("@name", Some(SocketAddrUnix::new_abstract_name(b"name").unwrap())),
            ("@", None),
            ("run/notify", None),
            ("vsock:2:1234", None),
            ("", None),
        ] {
            assert_eq!(address(name), expected, "{name:?}");
        }
        assert_eq!(address(&format!("/{}", "x".repeat(200))), None);
    }

    #[test]
    fn the_watchdog_is_ours_if_it_is_the_monitors() {
        let half = Some(Duration::from_secs(5));
        for (interval, pid, expected) in [
            (Some("10000000"), Some("7"), half),
            (Some("10000000"), None, half),
            // systemd meant a shell that became our parent, say.
            (Some("10000000"), Some("8"), None),
            (Some("10000000"), Some("x"), None),
            (Some("0"), None, None),
            (Some("10s"), None, None),
            (None, Some("7"), None),
        ] {
            assert_eq!(watchdog(interval, pid, 7), expected, "{interval:?} {pid:?}");
        }
    }

    #[test]
    fn a_summary_is_a_short_line() {
        let line = |servers, ready, waiting| Summary { servers, ready, waiting }.to_string();
        assert_eq!(line(1, 0, 2), "1 server, 0 ready, 2 waiting");
        assert_eq!(line(8, 7, 0), "8 servers, 7 ready, 0 waiting");
    }
}
