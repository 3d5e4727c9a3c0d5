//! How a server gets from the distributor's plan to a running program.
//!
//! The distributor sends a job to a launcher, a process of this same program that the monitor
//! started with one end of a socket as standard input: a length and JSON. The launcher prepares itself and becomes the server, so
//! its pid is the server's (launcher.rs). What comes back: a dot when it is ready to execute the
//! command, then end of file when it does; an error instead of either.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::PathBuf,
    time::Duration,
};

use rustix::process::Resource;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

pub use crate::launcher::run;
use crate::{address::ListenAddress, config};

/// Everything about a server's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked up in the PATH of `environment`, and its arguments.
    pub command: Vec<String>,
    /// Complete, except for LISTEN_FDS, WATCHDOG_USEC and their like.
    pub environment: Vec<(String, String)>,
    /// Where it runs; `None`: where `dist-ctl up` was started.
    pub directory: Option<PathBuf>,
    /// Whom it runs as; `None`: as `dist-ctl` itself, but with fewer capabilities.
    pub user: Option<Identity>,
    pub umask: Option<u32>,
    pub limits: Vec<Limit>,
    /// The CPUs it may use. Empty: as `dist-ctl` itself.
    pub cpus: Vec<usize>,
    /// The directory of its cgroup, which must be there.
    pub cgroup: PathBuf,
    pub stdout: Output,
    pub stderr: Output,
    pub socket: Socket,
    /// For the listeners of `socket`.
    pub backlog: u32,
    /// How often it has to say that it is well: WATCHDOG_USEC, and WATCHDOG_PID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// For sentences only.
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// All of the supplementary groups.
    pub groups: Vec<u32>,
}

impl From<&config::User> for Identity {
    fn from(user: &config::User) -> Self {
        let config::User { uid, gid, groups, name, .. } = user.clone();
        Self { name, uid, gid, groups }
    }
}

/// A resource limit; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    #[serde(with = "resource")]
    pub resource: Resource,
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

/// Where a server writes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Where `dist-ctl up` itself writes to.
    Inherit,
    /// Appended to this file, which is made if it is not there.
    File(PathBuf),
}

impl From<&config::Output> for Output {
    fn from(output: &config::Output) -> Self {
        match output {
            config::Output::Inherit => Self::Inherit,
            config::Output::File(path) => Self::File(path.clone()),
        }
    }
}

/// What a server finds open beside standard output and error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Socket {
    /// Nothing: it binds by itself.
    Own,
    /// A listener on each of these, from descriptor 3 on, as systemd gives them.
    Systemd(Vec<ListenAddress>),
    /// A listener as standard input.
    Stdin(ListenAddress),
}

/// The step that failed and why: `change to directory /srv/x: No such file or directory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchError {
    pub step: String,
    pub error: String,
}

impl LaunchError {
    /// It says nothing but that there is no launcher.
    pub fn is_silence(&self) -> bool {
        self.error == SILENT
    }
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)
    }
}

impl std::error::Error for LaunchError {}

/// A launcher answers within this time. Ten times what a busy machine needs; what takes longer
/// hangs, on a named pipe that nobody reads or a network file system that is gone.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Said of a launcher that ended, or never was, without a word. How, the monitor tells.
const SILENT: &str = "its launcher ended before it could";

/// A job is no longer: what the kernel accepts as arguments and environment fits.
pub(crate) const MAX_JOB: u32 = 8 << 20;

/// A socket for a launcher: one end is its standard input, the other is for `send_job`. Inside
/// a tokio runtime only.
pub fn pair() -> io::Result<(OwnedFd, UnixStream)> {
    // The launcher's end blocks.
    let (theirs, ours) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((theirs.into(), UnixStream::from_std(ours)?))
}

/// Sends a job to the launcher at the other end, and returns when its command is executed, or
/// cannot be. The launcher exits then by itself, unless it hangs: the caller sees no exit of
/// it, and kills it.
pub async fn send_job(mut socket: UnixStream, exec: &Exec) -> Result<(), LaunchError> {
    let unsent = |error| failed("send the job to its launcher", reason(error));
    let job = encode(exec).map_err(unsent)?;
    let mut answer = vec![];
    let conversation = async {
        // A launcher that takes no more of it has something to say, so that is heard first.
        let written = socket.write_all(&job).await;
        socket.read_to_end(&mut answer).await.and(written)
    };
    let ended = timeout(TIME_LIMIT, conversation).await;
    match (&answer[..], ended) {
        (b".", Ok(Ok(()))) => Ok(()),
        (b"" | b".", Err(_)) => Err(failed("start it", format!("no answer within {TIME_LIMIT:?}"))),
        (b"", Ok(_)) => Err(failed("start it", SILENT)),
        (b".", Ok(Err(error))) => Err(unsent(error)),
        (answer, _) => Err(read_error(answer)),
    }
}

/// Whether a process that was started as a launcher has not become its server yet.
pub fn is_launcher(pid: u32) -> bool {
    words(pid).split(|byte| *byte == 0).take(2).eq([&b"dist-ctl"[..], b"launch"])
}

/// Whether it has become its server. One that has ended has no words, also before it was waited
/// for.
pub fn is_server(pid: u32) -> bool {
    !words(pid).is_empty() && !is_launcher(pid)
}

fn words(pid: u32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

fn encode(job: &Exec) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(job)?;
    match u32::try_from(text.len()) {
        Ok(length) if length <= MAX_JOB => Ok([&length.to_le_bytes()[..], &text].concat()),
        _ => Err(io::Error::other(format!("it has {} bytes, over {MAX_JOB}", text.len()))),
    }
}

/// What a launcher says when it failed, after dots or not.
fn read_error(answer: &[u8]) -> LaunchError {
    let dots = answer.iter().take_while(|&&byte| byte == b'.').count();
    let text = &answer[dots..];
    serde_json::from_slice(text)
        .unwrap_or_else(|_| failed("start it", format!("its launcher said {:?}", text.escape_ascii())))
}

pub(crate) fn failed(step: impl Into<String>, error: impl Into<String>) -> LaunchError {
    LaunchError { step: step.into(), error: error.into() }
}

/// The error without its number, which makes the sentence no better.
pub(crate) fn reason(error: impl fmt::Display) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((reason, _)) => reason.to_owned(),
        None => text,
    }
}

/// A resource as the kernel's number.
mod resource {
    use rustix::process::Resource;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    const ALL: [Resource; 16] = [
        Resource::As,
        Resource::Core,
        Resource::Cpu,
        Resource::Data,
        Resource::Fsize,
        Resource::Locks,
        Resource::Memlock,
        Resource::Msgqueue,
        Resource::Nice,
        Resource::Nofile,
        Resource::Nproc,
        Resource::Rss,
        Resource::Rtprio,
        Resource::Rttime,
        Resource::Sigpending,
        Resource::Stack,
    ];

    pub(super) fn serialize<S: Serializer>(resource: &Resource, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(*resource as u32)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Resource, D::Error> {
        let number = u32::deserialize(from)?;
        let known = ALL.into_iter().find(|&resource| resource as u32 == number);
        known.ok_or_else(|| D::Error::custom(format_args!("{number} is no resource")))
    }
}
