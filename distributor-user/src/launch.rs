//! How a server gets from the distributor's plan to a running program.
//!
//! The distributor sends a job to a launcher, a process of this same program that the monitor
//! started (or, for listeners of its own, that it started itself) with one end of a socket as
//! standard input: a length and JSON. The launcher prepares itself and becomes the server, so
//! its pid is the server's (launcher.rs). What comes back: a dot when it is ready to execute the
//! command, then end of file when it does; an error instead of either.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::{
    fmt,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags},
    process::Resource,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::UnixStream,
    process::Command,
    time::timeout,
};

pub use crate::launcher::run;
use crate::{address::ListenAddress, config};

/// What a launcher does with its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// Becomes a server.
    Exec(Box<Exec>),
    /// Opens listeners inside a cgroup, gives them back and exits.
    OpenListeners(OpenListeners),
}

/// Everything about a server's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked up in the PATH of `environment`, and its arguments.
    pub command: Vec<String>,
    /// Complete, except for LISTEN_FDS and its like.
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
}

/// Listeners of our own in the group of a service: rooms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenListeners {
    /// The kernel counts the connections of sockets that were made in here.
    pub cgroup: PathBuf,
    pub address: ListenAddress,
    /// The group is one of sockets of this uid.
    pub uid: u32,
    pub backlog: u32,
    pub count: usize,
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

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)
    }
}

impl std::error::Error for LaunchError {}

/// A launcher answers within this time. Ten times what a busy machine needs; what takes longer
/// hangs, on a named pipe that nobody reads or a network file system that is gone.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// A job is no longer: what the kernel accepts as arguments and environment fits.
pub(crate) const MAX_JOB: u32 = 8 << 20;

/// As many descriptors fit into one message (SCM_MAX_FD).
pub(crate) const BATCH: usize = 253;

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
    let job = encode(&Job::Exec(Box::new(exec.clone()))).map_err(unsent)?;
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
        (b"", Ok(_)) => Err(failed("start it", "its launcher ended before it could")),
        (b".", Ok(Err(error))) => Err(unsent(error)),
        (answer, _) => Err(read_error(answer)),
    }
}

/// Opens listeners in a cgroup, through a launcher.
pub async fn open_listeners(job: &OpenListeners) -> anyhow::Result<Vec<OwnedFd>> {
    let mut launcher = Command::new("/proc/self/exe");
    launcher.arg("launch");
    open_through(launcher, job).await
}

async fn open_through(mut launcher: Command, job: &OpenListeners) -> anyhow::Result<Vec<OwnedFd>> {
    let what = || format!("open {} listeners on {}", job.count, job.address);
    let (theirs, mut socket) = pair().with_context(what)?;
    launcher.stdin(theirs).stdout(Stdio::null()).kill_on_drop(true);
    let mut process = launcher.spawn().context("start a launcher").with_context(what)?;
    // It has a copy of the launcher's end: the end of file would not come.
    drop(launcher);
    let text = encode(&Job::OpenListeners(job.clone())).with_context(what)?;
    let conversation = async {
        // As above: what the launcher says explains why it takes no more.
        let written = socket.write_all(&text).await;
        let listeners = receive_listeners(&socket, job.count).await?;
        written.context("send the job")?;
        process.wait().await.context("wait for the launcher")?;
        anyhow::Ok(listeners)
    };
    match timeout(TIME_LIMIT, conversation).await {
        Ok(ended) => ended.with_context(what),
        Err(_) => bail!("{}: no answer within {TIME_LIMIT:?}", what()),
    }
}

fn encode(job: &Job) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(job)?;
    match u32::try_from(text.len()) {
        Ok(length) if length <= MAX_JOB => Ok([&length.to_le_bytes()[..], &text].concat()),
        _ => Err(io::Error::other(format!("it has {} bytes, over {MAX_JOB}", text.len()))),
    }
}

/// Reads to the end: a dot with each batch of descriptors, or an error.
async fn receive_listeners(socket: &UnixStream, count: usize) -> anyhow::Result<Vec<OwnedFd>> {
    let mut listeners = vec![];
    let mut answer = vec![];
    loop {
        let receive = || receive_batch(socket, &mut listeners);
        match socket.async_io(Interest::READABLE, receive).await {
            Ok(text) if text.is_empty() => break,
            Ok(text) => answer.extend(text),
            // It ended without reading all of the job, so it has said why.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error).context("receive them"),
        }
    }
    if answer.iter().any(|&byte| byte != b'.') {
        return Err(read_error(&answer).into());
    }
    ensure!(listeners.len() == count, "the launcher ended after {} of them", listeners.len());
    Ok(listeners)
}

/// One read: what it says, and into `listeners` what comes with it.
fn receive_batch(socket: &UnixStream, listeners: &mut Vec<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut text = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut text)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            listeners.extend(descriptors);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(format!("no room for more than {} descriptors", listeners.len())));
    }
    text.truncate(received.bytes);
    Ok(text)
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
