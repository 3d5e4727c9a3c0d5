//! The control socket: how a command reaches the distributor, and its answer the operator.
//!
//! `control.sock` in the runtime directory; one JSON object per line both ways, answered in
//! order. First what is said, then the distributor's side (`bind`, `serve`), then the command
//! line's (`ask`, `down`), which is blocking and needs no runtime. `serve` decides who may ask
//! what, by the credentials the kernel vouches for; only the loop behind it knows and changes
//! anything. No client can stop, delay or fill the distributor: everything here has a bound.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixStream as BlockingUnixStream,
        },
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::libc;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream, unix::ReadHalf},
    sync::{mpsc, oneshot},
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tracing::warn;

use crate::{config::Control, drain::Rest, error::UserError, status::Status};

/// The socket's name in the runtime directory.
pub const SOCKET: &str = "control.sock";

/// The version of what is said over the socket; every answer carries it.
pub const VERSION: u32 = 1;

/// How long a person waits for an answer. Longer than the distributor's own bound, so that
/// its sentence about what is wrong arrives.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// How long where the kernel verifies programs first: for an answer to `upgrade`, which comes after the
/// trial, and to `adopt` and `reload`, with which a service may begin. On a slow machine that takes half a minute.
pub const TRIAL_TIMEOUT: Duration = Duration::from_secs(40);

/// What can be asked: `{"command":"weight","server":"shop/1","weight":50}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    Status,
    Weight {
        server: String,
        weight: u32,
    },
    Limit {
        /// A server, or a service as a whole: `shop`.
        server: String,
        /// `None` takes the limit away. It has to be written, as `null`: a request that
        /// forgot its limit must not remove one.
        #[serde(deserialize_with = "Option::deserialize")]
        limit: Option<u32>,
    },
    /// Take a server out of the plan until it is resumed, without stopping it.
    Drain {
        server: String,
        /// How long its connections have; `None`: any time. Written as a number.
        #[serde(default)]
        timeout_seconds: Option<f64>,
        /// What becomes of those that are left.
        #[serde(default)]
        then: Rest,
    },
    /// Start a server again that has failed; put one back that was drained.
    Resume {
        server: String,
    },
    /// Restart a server, the servers of a service, or all, one after the other.
    Restart {
        /// `None`: all services.
        #[serde(default)]
        target: Option<String>,
        /// So many more may run at a time; `None`: as configured.
        #[serde(default)]
        max_surge: Option<u32>,
        /// So many fewer may be ready at a time; `None`: as configured.
        #[serde(default)]
        max_unavailable: Option<u32>,
    },
    /// Make a server that somebody else started one of a service's.
    Adopt {
        service: String,
        pid: u32,
        /// What it is called; the full name is `SERVICE/NAME`.
        name: String,
        /// What it is started again with. Empty: it is not.
        #[serde(rename = "exec", default)]
        command: Vec<String>,
    },
    /// Let a server that was adopted go its own way.
    Release {
        server: String,
    },
    /// Read the configuration again, and do what differs; or only say what that would be.
    Reload {
        #[serde(default)]
        dry_run: bool,
    },
    /// Have so many numbered servers in a service.
    Scale {
        service: String,
        count: u32,
    },
    /// Stop the instance.
    Down,
    /// Make room for the program of this file. Answered after its trial.
    Upgrade {
        program: String,
    },
}

/// What is answered: `{"version":1,"ok":true}`, with a `"status"` if that was asked, or
/// `{"version":1,"ok":false,"error":"...","kind":"input"}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Answer", try_from = "Answer")]
pub enum Response {
    Done,
    Status(Status),
    /// What has been done, or would be, a sentence for each thing.
    Changes(Vec<String>),
    /// Nothing was done, and why, in a sentence.
    Refused {
        error: String,
        kind: Kind,
    },
}

/// Whose fault a refusal is; it decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The request says something that cannot be meant.
    Input,
    Failure,
}

/// A command on its way to the distributor's loop.
#[derive(Debug)]
pub struct Request {
    pub command: Command,
    pub reply: oneshot::Sender<Response>,
    pub peer: Peer,
}

/// Who asks, as the kernel recorded it when the client connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    /// `None` if the client's process is not visible from our pid namespace.
    pub pid: Option<i32>,
    pub level: Level,
}

/// What a client may do; each level includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    ReadOnly,
    Admin,
}

impl Command {
    /// Every command, as it is written.
    pub const NAMES: [&str; 12] = [
        "status", "weight", "limit", "drain", "resume", "restart", "adopt", "release", "reload", "scale",
        "down", "upgrade",
    ];

    /// What a client must be allowed to do to ask this.
    pub fn level(&self) -> Level {
        match self {
            Self::Status => Level::ReadOnly,
            Self::Weight { .. }
            | Self::Limit { .. }
            | Self::Drain { .. }
            | Self::Resume { .. }
            | Self::Restart { .. }
            | Self::Adopt { .. }
            | Self::Release { .. }
            | Self::Reload { .. }
            | Self::Scale { .. }
            | Self::Down
            | Self::Upgrade { .. } => Level::Admin,
        }
    }

    /// Reads one line of a client. The error is a sentence for that client.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let request: Value = serde_json::from_slice(line).map_err(|error| {
            format!(
                "read the request: it is no JSON ({error}): write one object on a line, \
                 like {{\"command\":\"status\"}}"
            )
        })?;
        let known = Self::NAMES.join(", ");
        let Some(name) = request.get("command").and_then(Value::as_str) else {
            return Err(format!(
                "read the request: it has no \"command\": write one object on a line, \
                 like {{\"command\":\"status\"}}; the commands are {known}"
            ));
        };
        if !Self::NAMES.contains(&name) {
            return Err(format!("no command is called {name:?}: the commands are {known}"));
        }
        let command = Self::deserialize(&request).map_err(|error| format!("command {name:?}: {error}"))?;
        // Not by deny_unknown_fields, which serde does not apply to commands without fields.
        let meant = json!(command);
        let unknown =
            request.as_object().and_then(|fields| fields.keys().find(|key| meant.get(key).is_none()));
        match unknown {
            None => Ok(command),
            Some(field) => Err(format!("command {name:?}: it has no field {field:?}")),
        }
    }
}

impl Response {
    /// Refused, because the request says something that cannot be meant.
    pub fn input(error: impl Into<String>) -> Self {
        Self::Refused { error: error.into(), kind: Kind::Input }
    }

    /// Refused or not possible, though the request was right.
    pub fn failure(error: impl Into<String>) -> Self {
        Self::Refused { error: error.into(), kind: Kind::Failure }
    }

    /// The refusal as an error that leads to the right exit code; the status, if there is one.
    pub fn into_result(self) -> anyhow::Result<Option<Status>> {
        match self.succeeded()? {
            Self::Status(status) => Ok(Some(status)),
            Self::Done | Self::Changes(_) | Self::Refused { .. } => Ok(None),
        }
    }

    /// The answer, unless it is a refusal.
    pub fn succeeded(self) -> anyhow::Result<Self> {
        match self {
            answer @ (Self::Done | Self::Status(_) | Self::Changes(_)) => Ok(answer),
            Self::Refused { error, kind } => match kind {
                Kind::Input => Err(UserError::new(error).into()),
                Kind::Failure => Err(anyhow::Error::msg(error)),
            },
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "uid {} (pid {pid})", self.uid),
            None => write!(f, "uid {}", self.uid),
        }
    }
}

/// Makes the control socket, in place of the one a distributor before left behind.
///
/// Call it inside the runtime. Removing the file at the end is the caller's: only it knows
/// whether the instance stops, or a next distributor already has the name.
pub fn bind(runtime_dir: &Path, access: &Control) -> anyhow::Result<UnixListener> {
    let path = runtime_dir.join(SOCKET);
    // A directory that only we can enter, so that nobody connects before owner and mode are
    // right. A umask would do too, but it is the whole process's, other threads included.
    let aside = runtime_dir.join("control.new");
    let socket = aside.join("s");
    let make = || -> io::Result<UnixListener> {
        remove_aside(&aside)?;
        fs::create_dir(&aside)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o700))?;
        let listener = UnixListener::bind(&socket)?;
        std::os::unix::fs::lchown(&socket, Some(access.owner), access.readers)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(access.mode))?;
        // Critical section: before, clients reach nobody or the distributor before us; after,
        // us. If we die here, the next bind removes what lies aside.
        fs::rename(&socket, &path)?;
        Ok(listener)
    };
    let made = make().with_context(|| format!("make control socket {}", path.display()));
    // Only an empty directory can be left, which the next bind would remove as well.
    let _ = remove_aside(&aside);
    made
}

/// Accepts clients and answers them, until the receiver of `requests` is gone.
///
/// Clients with no right are told so and closed; the others' requests go into `requests`.
///
/// `spare` is given up for the operator who asks why nothing goes on when no descriptors are left.
pub async fn serve(
    listener: UnixListener,
    access: Control,
    requests: mpsc::Sender<Request>,
    spare: Option<OwnedFd>,
) {
    serve_with(listener, access, requests, spare, PATIENCE).await;
}

/// A descriptor for [`serve`], if there is one. To be made early: the limit of open files is one of
/// their numbers, and so only the number of one that is below it can be had again.
pub fn spare() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}

/// Asks the instance of `runtime_dir`, and waits for its answer.
///
/// A distributor that is just being replaced is waited for, as long as its monitor lives.
pub fn ask(runtime_dir: &Path, command: &Command, timeout: Duration) -> anyhow::Result<Response> {
    match exchange(runtime_dir, command, timeout)? {
        Some(response) => Ok(response),
        None => bail!(
            "ask dist-ctl on {}: it closed the connection without an answer: see its log",
            runtime_dir.display()
        ),
    }
}

/// Stops the instance of `runtime_dir`, and returns when it is gone.
pub fn down(runtime_dir: &Path, timeout: Duration) -> anyhow::Result<Response> {
    let deadline = Instant::now() + timeout;
    let monitor = lock_holder(runtime_dir).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    // No answer is as good as one here: it may have stopped so fast that none got through.
    if let Some(refused @ Response::Refused { .. }) =
        exchange(runtime_dir, &Command::Down, timeout.min(ASK_TIMEOUT))?
    {
        return Ok(refused);
    }
    // The lock is free a moment before its holder is gone.
    while is_up(runtime_dir) || monitor.as_ref().is_some_and(|monitor| !has_exited(monitor)) {
        if Instant::now() >= deadline {
            bail!(
                "stop dist-ctl on {}: it still runs after {timeout:?}: it was asked to stop, \
                 and its log says what it waits for",
                runtime_dir.display()
            );
        }
        thread::sleep(POLL);
    }
    Ok(Response::Done)
}

/// Waits until a server that is drained has no connections, or its time is up.
///
/// # Errors
/// Some are left; or it was resumed meanwhile.
pub fn wait_drained(runtime_dir: &Path, server: &str) -> anyhow::Result<()> {
    loop {
        let Some(status) = ask(runtime_dir, &Command::Status, ASK_TIMEOUT)?.into_result()? else {
            bail!("drain {server}: dist-ctl did not say how it stands");
        };
        let mut servers = status.services.iter().flat_map(|service| &service.servers);
        let Some(its) = servers.find(|its| its.name == server) else {
            bail!("drain {server}: it is gone");
        };
        let left = its.connections + u64::from(its.earlier);
        let Some(drain) = its.drain else { bail!("drain {server}: it was resumed meanwhile") };
        match (left, drain.then) {
            (0, _) => return Ok(()),
            (_, Rest::Leave) if drain.seconds_left == Some(0.0) => {
                let noun = if left == 1 { "connection" } else { "connections" };
                bail!(
                    "drain {server}: it still has {left} {noun}: wait longer, or close them with --then close"
                );
            }
            _ => match unclosed(&status, server) {
                Some(trouble) => bail!("{trouble}"),
                None => thread::sleep(LOOK_AGAIN),
            },
        }
    }
}

/// Why the connections that a server has left cannot be closed.
fn unclosed<'a>(status: &'a Status, server: &str) -> Option<&'a str> {
    let says = format!("server {server}: {CANNOT_BE_CLOSED}");
    status.troubles.iter().map(|trouble| trouble.what.as_str()).find(|what| what.starts_with(&says))
}

/// What is said then, after whose they are.
pub const CANNOT_BE_CLOSED: &str = "the connections that it has left cannot be closed";

/// How long a client or the loop may take before it is given up.
#[derive(Clone, Copy)]
struct Patience {
    /// For a whole request to arrive, and for an answer to be taken.
    client: Duration,
    /// For the distributor's loop to answer.
    distributor: Duration,
}

const PATIENCE: Patience = Patience { client: Duration::from_secs(5), distributor: Duration::from_secs(5) };

/// The longest request. The longest sensible one has some 300 bytes.
const REQUEST_BYTES: u64 = 64 * 1024;

/// A status of 1,024 servers has about half a megabyte.
const RESPONSE_BYTES: u64 = 64 * 1024 * 1024;

/// Clients at a time. With `REQUEST_BYTES` this bounds what clients can make us hold.
const CLIENTS: usize = 64;

/// Of `CLIENTS`, kept free for those who may change something: readers who hang cannot keep
/// the operator out.
const CLIENTS_KEPT_FOR_ADMINS: usize = 16;

/// Refused clients, and those for whom there is no descriptor, get into the log at most this often,
/// for anybody whom the socket's mode admits can be refused as fast as he can connect.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// How often who waits for connections to end looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How often a waiting client looks again.
const POLL: Duration = Duration::from_millis(20);

/// A response as it is written.
#[derive(Serialize, Deserialize)]
struct Answer {
    version: u32,
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changes: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<Kind>,
}

impl From<Response> for Answer {
    fn from(response: Response) -> Self {
        let done = Self { version: VERSION, ok: true, status: None, changes: None, error: None, kind: None };
        match response {
            Response::Done => done,
            Response::Status(status) => Self { status: Some(status), ..done },
            Response::Changes(changes) => Self { changes: Some(changes), ..done },
            Response::Refused { error, kind } => {
                Self { ok: false, error: Some(error), kind: Some(kind), ..done }
            }
        }
    }
}

impl TryFrom<Answer> for Response {
    type Error = String;

    fn try_from(answer: Answer) -> Result<Self, String> {
        match answer {
            Answer { ok: false, .. } => Ok(Self::Refused {
                error: answer.error.ok_or("it refused without a reason")?,
                kind: answer.kind.unwrap_or(Kind::Failure),
            }),
            Answer { status: Some(status), .. } => Ok(Self::Status(status)),
            Answer { changes: Some(changes), .. } => Ok(Self::Changes(changes)),
            Answer { .. } => Ok(Self::Done),
        }
    }
}

fn remove_aside(aside: &Path) -> io::Result<()> {
    match fs::remove_dir_all(aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn serve_with(
    listener: UnixListener,
    access: Control,
    requests: mpsc::Sender<Request>,
    mut spare: Option<OwnedFd>,
    patience: Patience,
) {
    // Dropped, and so ended, with us.
    let mut clients = JoinSet::new();
    let mut log_next_refusal = Instant::now();
    let mut log_next_failure = Instant::now();
    // What became free is for the client that waits, and only then to be the spare one again.
    let mut is_expected = false;
    loop {
        if !std::mem::take(&mut is_expected) {
            spare = spare.or_else(self::spare);
        }
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // It has given its descriptor back.
            Some(_) = clients.join_next() => continue,
            // Nobody waits: without a descriptor the kernel says that before it looks.
            () = sleep(POLL), if spare.is_none() => continue,
            () = requests.closed() => return,
        };
        while clients.try_join_next().is_some() {}
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // Most likely no descriptor is left: now one is.
            Err(_) if spare.take().is_some() => {
                is_expected = true;
                continue;
            }
            // The client waits in the queue meanwhile.
            Err(error) => {
                if Instant::now() >= log_next_failure {
                    warn!("accept a control client: {error}; tries again every second");
                    log_next_failure = Instant::now() + REFUSAL_LOG_INTERVAL;
                }
                tokio::select! {
                    Some(_) = clients.join_next() => {}
                    () = sleep(Duration::from_secs(1)) => {}
                }
                is_expected = true;
                continue;
            }
        };
        match admit(&stream, &access, clients.len()) {
            Ok(peer) => {
                clients.spawn(converse(stream, peer, requests.clone(), patience));
            }
            Err(sentence) => {
                if Instant::now() >= log_next_refusal {
                    warn!(
                        "refused a control client: {sentence}; the next refusal is logged after {}s",
                        REFUSAL_LOG_INTERVAL.as_secs()
                    );
                    log_next_refusal = Instant::now() + REFUSAL_LOG_INTERVAL;
                }
                turn_away(stream, sentence);
            }
        }
        // The clients before get their turn before the next is accepted. Otherwise a queue of
        // short ones would count as so many at once, and the last be turned away.
        yield_now().await;
    }
}

/// Who the client is, or why it is refused.
fn admit(stream: &UnixStream, access: &Control, clients: usize) -> Result<Peer, String> {
    let credentials =
        stream.peer_cred().map_err(|error| format!("ask the kernel who the client is: {error}"))?;
    let uid = credentials.uid();
    let level = if uid == 0 || uid == access.owner {
        Level::Admin
    } else if is_reader(stream, credentials.gid(), access.readers)? {
        Level::ReadOnly
    } else {
        return Err(format!(
            "uid {uid} may not control this dist-ctl: ask as root, or as the owner or one of \
             the readers that [control] in its configuration names"
        ));
    };
    let most = match level {
        Level::Admin => CLIENTS,
        Level::ReadOnly => CLIENTS - CLIENTS_KEPT_FOR_ADMINS,
    };
    if clients >= most {
        return Err(format!(
            "the control socket has {clients} clients, which is the most for uid {uid}: try \
             again in {}s",
            PATIENCE.client.as_secs()
        ));
    }
    Ok(Peer { uid, pid: credentials.pid(), level })
}

fn is_reader(stream: &UnixStream, primary: u32, readers: Option<u32>) -> Result<bool, String> {
    let Some(readers) = readers else {
        return Ok(false);
    };
    let groups = supplementary_groups(stream.as_fd())
        .map_err(|error| format!("ask the kernel for the client's groups: {error}"))?;
    Ok(primary == readers || groups.contains(&readers))
}

/// The supplementary groups of the process that connected, as the kernel recorded them.
///
/// Not by looking its user up in the group database: that may ask a network, and says what
/// a user could be, where the file's mode and so connect() go by what the process is.
fn supplementary_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(groups.as_slice()))
            .expect("the kernel allows 65,536 groups at most");
        // SAFETY: the kernel writes at most `bytes` bytes to `groups`, which has as many, and
        // one number to `bytes`; both outlive the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        let error = io::Error::last_os_error();
        let count = bytes as usize / size_of::<libc::gid_t>();
        groups.resize(count, 0);
        match result {
            0 => return Ok(groups),
            // `bytes` is now what is needed. A process cannot change what was recorded, so
            // the second time fits.
            _ if error.raw_os_error() == Some(libc::ERANGE) => {}
            _ => return Err(error),
        }
    }
}

/// Says why and closes. What does not fit into an empty socket at once is not said.
fn turn_away(stream: UnixStream, sentence: String) {
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write(&line(&Response::failure(sentence)));
    }
}

/// Answers one client until it leaves, is too slow, or talks nonsense.
async fn converse(mut stream: UnixStream, peer: Peer, requests: mpsc::Sender<Request>, patience: Patience) {
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    loop {
        let (response, next) = match next_line(&mut read, patience.client).await {
            Line::Whole(line) => match Command::parse(&line) {
                Ok(command) => {
                    let patience = match command {
                        Command::Adopt { .. } | Command::Reload { .. } | Command::Upgrade { .. } => {
                            TRIAL_TIMEOUT
                        }
                        _ => patience.distributor,
                    };
                    let response = answer(command, peer, &requests, patience).await;
                    (response, Next::Listen)
                }
                Err(error) => (Response::input(error), Next::Close),
            },
            Line::TooLong => {
                let error = format!("read the request: it has more than {REQUEST_BYTES} bytes");
                (Response::input(error), Next::Close)
            }
            Line::TooSlow => {
                let error = format!("read the request: no end of line came within {:?}", patience.client);
                (Response::input(error), Next::Close)
            }
            Line::None => return,
        };
        let taken = timeout(patience.client, write.write_all(&line(&response))).await;
        match (taken, next) {
            (Ok(Ok(())), Next::Listen) => {}
            (Err(_) | Ok(Err(_)), _) | (_, Next::Close) => return,
        }
    }
}

enum Next {
    Listen,
    /// After something that is no request, where the next one begins is a guess.
    Close,
}

enum Line {
    /// Ended by an end of line, or by the client's end of sending.
    Whole(Vec<u8>),
    TooLong,
    /// Some of it came in time, but not its end.
    TooSlow,
    /// Nothing came: the client left, or has nothing to ask.
    None,
}

async fn next_line(read: &mut BufReader<ReadHalf<'_>>, patience: Duration) -> Line {
    let mut line = Vec::new();
    // One more than allowed, to tell the longest request from one that is longer.
    let mut bounded = read.take(REQUEST_BYTES + 1);
    let result = timeout(patience, bounded.read_until(b'\n', &mut line)).await;
    match result {
        Ok(Ok(_)) if line.is_empty() => Line::None,
        Ok(Ok(_)) if line.len() as u64 > REQUEST_BYTES => Line::TooLong,
        Ok(Ok(_)) => Line::Whole(line),
        Ok(Err(_)) => Line::None,
        Err(_) if line.is_empty() => Line::None,
        Err(_) => Line::TooSlow,
    }
}

async fn answer(
    command: Command,
    peer: Peer,
    requests: &mpsc::Sender<Request>,
    patience: Duration,
) -> Response {
    if peer.level < command.level() {
        return Response::failure(format!(
            "uid {} may only look, not change anything: ask as root, or as the owner that \
             [control] in the configuration names",
            peer.uid
        ));
    }
    let (reply, answered) = oneshot::channel();
    let request = Request { command, reply, peer };
    let reach = async {
        requests.send(request).await.ok()?;
        answered.await.ok()
    };
    match timeout(patience, reach).await {
        Ok(Some(response)) => response,
        Ok(None) => Response::failure("the distributor is stopping, and takes no more commands"),
        Err(_) => Response::failure(format!(
            "the distributor did not answer within {patience:?}: a change may still happen, so \
             look at the status before you ask again"
        )),
    }
}

fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message)
        .expect("numbers, strings and maps with string keys can be written as JSON");
    line.push(b'\n');
    line
}

/// Sends the command; `None` if the connection was closed without an answer.
pub fn exchange(
    runtime_dir: &Path,
    command: &Command,
    timeout: Duration,
) -> anyhow::Result<Option<Response>> {
    let asking = || format!("ask dist-ctl on {}", runtime_dir.display());
    let deadline = Instant::now() + timeout;
    let mut stream = connect(runtime_dir, deadline)?;
    stream.set_write_timeout(Some(left(deadline))).with_context(asking)?;
    // Whoever refuses us says so and closes, maybe before we have written. So what counts is
    // what we can read.
    let sent = stream.write_all(&line(command));
    let answer = read_answer(&mut stream, deadline);
    let answer = match (answer, sent) {
        (Ok(answer), _) if answer.ends_with(b"\n") => answer,
        (Ok(_), _) => return Ok(None),
        (Err(error), _) if error.kind() == io::ErrorKind::TimedOut => {
            bail!("{}: no answer came within {timeout:?}", asking())
        }
        (Err(_), Err(error)) | (Err(error), Ok(())) => {
            return match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(None),
                _ => Err(error).with_context(asking),
            };
        }
    };
    let not_understood = || format!("{}: its answer is not understood", asking());
    let answer: Value = serde_json::from_slice(&answer).with_context(not_understood)?;
    // Before anything else is read from it: another version may mean something else by it.
    match answer.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => bail!(
            "{}: it speaks version {version} and we speak {VERSION}: use the dist-ctl it was \
             started from",
            asking()
        ),
        None => bail!("{}: its answer has no version", asking()),
    }
    let response = Response::deserialize(answer).with_context(not_understood)?;
    Ok(Some(response))
}

fn connect(runtime_dir: &Path, deadline: Instant) -> anyhow::Result<BlockingUnixStream> {
    let path = runtime_dir.join(SOCKET);
    let shown = runtime_dir.display();
    let address = socket2::SockAddr::unix(&path)
        .with_context(|| format!("connect to control socket {}", path.display()))?;
    loop {
        // Not UnixStream::connect, which waits for ever for a distributor that is stuck and
        // has its queue of clients full.
        let connected =
            socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).and_then(|socket| {
                socket.set_write_timeout(Some(left(deadline)))?;
                socket.connect(&address)?;
                Ok(BlockingUnixStream::from(OwnedFd::from(socket)))
            });
        let error = match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                if lock_holder(runtime_dir).is_none() {
                    bail!(
                        "no dist-ctl runs on {shown}: start it with dist-ctl up, or name its \
                         --runtime-dir"
                    );
                }
                if Instant::now() >= deadline {
                    bail!(
                        "ask dist-ctl on {shown}: its monitor runs, but no distributor answers: \
                         see its log"
                    );
                }
                // The monitor starts the next distributor.
                thread::sleep(POLL);
            }
            io::ErrorKind::WouldBlock => bail!(
                "ask dist-ctl on {shown}: it takes no clients: its distributor is stuck, see its \
                 log"
            ),
            io::ErrorKind::PermissionDenied => bail!(
                "ask dist-ctl on {shown}: permission denied: ask as root, or as the owner or one \
                 of the readers that [control] in its configuration names"
            ),
            _ => {
                return Err(error).with_context(|| format!("connect to control socket {}", path.display()));
            }
        }
    }
}

/// Everything up to the end of the line, or of the connection.
fn read_answer(stream: &mut BlockingUnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    while !answer.ends_with(b"\n") {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // For every read anew: a distributor that sends a byte at a time gets no more time.
        stream.set_read_timeout(Some(left(deadline)))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
        if answer.len() as u64 > RESPONSE_BYTES {
            return Err(io::Error::other(format!("its answer has more than {RESPONSE_BYTES} bytes")));
        }
    }
    Ok(answer)
}

/// The time until the deadline, but never 0, which to a socket means no timeout at all.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// True while a monitor or a distributor of the instance lives.
/// Somebody runs, or is about to, on this runtime directory.
pub fn is_up(runtime_dir: &Path) -> bool {
    lock_holder(runtime_dir).is_some() || BlockingUnixStream::connect(runtime_dir.join(SOCKET)).is_ok()
}

fn has_exited(process: &OwnedFd) -> bool {
    let mut exit = [PollFd::new(process, PollFlags::IN)];
    // A failure here can only be a signal; the caller asks again.
    rustix::event::poll(&mut exit, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// The monitor that holds the lock on the runtime directory.
///
/// Read from /proc/locks and not found out by taking the lock: a monitor that starts in that
/// instant would take us for another instance, and give up. Nor from what the lock's file
/// says, which may be another pid namespace's number.
fn lock_holder(runtime_dir: &Path) -> Option<Pid> {
    let lock = fs::metadata(runtime_dir.join("lock")).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let (major, minor) = (rustix::fs::major(lock.dev()), rustix::fs::minor(lock.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", lock.ino());
    // `12: FLOCK ADVISORY WRITE 4242 00:1b:815 0 EOF`; one that only waits has `->` second.
    locks.lines().find_map(|line| match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
        [_, "FLOCK", _, "WRITE", pid, locked, ..] if locked == id => Pid::from_raw(pid.parse().ok()?),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader as BlockingBufReader},
        net::Shutdown,
        os::unix::net::UnixListener as BlockingUnixListener,
        path::PathBuf,
        sync::atomic::{AtomicU32, Ordering},
    };

    use rustix::{
        fs::FlockOperation,
        thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
    };

    use super::*;

    /// Group and user numbers that no test machine has given to anybody.
    const READERS: u32 = 64_321;
    const STRANGER: u32 = 64_322;

    const SHORT: Patience =
        Patience { client: Duration::from_millis(300), distributor: Duration::from_millis(300) };

    /// Longer than any test waits on purpose, shorter than a person waits for a hanging test.
    const LONG: Duration = Duration::from_secs(20);

    /// A runtime directory of a test, gone at its end.
    struct RuntimeDir(PathBuf);

    impl RuntimeDir {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("control-{}-{next}", std::process::id()));
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).unwrap();
            Self(path)
        }
    }

    impl Drop for RuntimeDir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// How the distributor's loop of a test answers.
    #[derive(Clone, Copy)]
    enum Loop {
        /// A status to `Status`, `Done` to the rest.
        Answers,
        /// It takes requests and never answers.
        Keeps,
        /// It drops requests.
        Drops,
    }

    /// A control socket with a loop behind it, in a thread of its own.
    struct Instance {
        dir: RuntimeDir,
        /// What has reached the loop.
        seen: std::sync::mpsc::Receiver<(Command, Peer)>,
        stop: Option<oneshot::Sender<()>>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Instance {
        fn start(access: Control, patience: Patience, answers: Loop) -> Self {
            let dir = RuntimeDir::new();
            let path = dir.0.clone();
            let (stop, stopped) = oneshot::channel();
            let (see, seen) = std::sync::mpsc::channel();
            let (listen, listens) = std::sync::mpsc::channel();
            let thread = thread::spawn(move || {
                run(async move {
                    let listener = bind(&path, &access).unwrap();
                    listen.send(()).unwrap();
                    let (requests, mut queue) = mpsc::channel::<Request>(1);
                    let serving = tokio::spawn(serve_with(listener, access, requests, spare(), patience));
                    let looping = async {
                        let mut kept = Vec::new();
                        while let Some(request) = queue.recv().await {
                            see.send((request.command.clone(), request.peer)).unwrap();
                            let response = match request.command {
                                Command::Status => Response::Status(a_status()),
                                _ => Response::Done,
                            };
                            match answers {
                                Loop::Answers => drop(request.reply.send(response)),
                                Loop::Keeps => kept.push(request.reply),
                                Loop::Drops => drop(request.reply),
                            }
                        }
                    };
                    tokio::select! {
                        _ = stopped => {}
                        () = looping => {}
                    }
                    drop(queue);
                    serving.await.expect("nothing a client does makes the server panic");
                });
            });
            listens.recv().unwrap();
            Self { dir, seen, stop: Some(stop), thread: Some(thread) }
        }

        fn ask(&self, command: &Command) -> anyhow::Result<Response> {
            ask(&self.dir.0, command, LONG)
        }

        fn connect(&self) -> BlockingUnixStream {
            let stream = BlockingUnixStream::connect(self.dir.0.join(SOCKET)).unwrap();
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.set_write_timeout(Some(LONG)).unwrap();
            stream
        }

        /// Sends bytes, and gives every line that comes back before the end.
        fn say(&self, bytes: &[u8]) -> Vec<Value> {
            let mut stream = self.connect();
            // Closed before all is written, if the server has had enough.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            answers(stream)
        }

        fn assert_alive(&self) {
            assert_eq!(self.ask(&Command::Status).unwrap(), Response::Status(a_status()));
        }
    }

    impl Drop for Instance {
        fn drop(&mut self) {
            let _ = self.stop.take().unwrap().send(());
            let ended = self.thread.take().unwrap().join();
            if !thread::panicking() {
                ended.expect("the server thread has not panicked");
            }
        }
    }

    fn run(future: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
    }

    fn answers(stream: BlockingUnixStream) -> Vec<Value> {
        BlockingBufReader::new(stream)
            .lines()
            .map_while(Result::ok)
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    }

    fn root_only() -> Control {
        Control { owner: me(), mode: 0o600, readers: None }
    }

    fn for_all_to_try() -> Control {
        Control { owner: me(), mode: 0o666, readers: Some(READERS) }
    }

    fn me() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn a_status() -> Status {
        Status {
            version: "0.1.0".to_owned(),
            build: "1-2-3-4.5".to_owned(),
            pid: 7,
            not_upgraded: None,
            troubles: Vec::new(),
            services: Vec::new(),
        }
    }

    /// What `ask` gives to another user, in a thread that becomes it.
    fn ask_as(dir: &Path, command: Command, uid: u32, gid: u32, groups: &[u32]) -> anyhow::Result<Response> {
        thread::scope(|scope| {
            let asking = scope.spawn(move || {
                become_user(uid, gid, groups);
                ask(dir, &command, LONG)
            });
            asking.join().unwrap()
        })
    }

    /// These are the thread's alone, other than those of libc.
    fn become_user(uid: u32, gid: u32, groups: &[u32]) {
        let (uid, gid) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid));
        let groups: Vec<_> = groups.iter().map(|gid| rustix::process::Gid::from_raw(*gid)).collect();
        set_thread_groups(&groups).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
    }

    /// Other users can only be played by root.
    fn is_root(test: &str) -> bool {
        if me() != 0 {
            println!("{test} skipped: it needs root, to become other users");
        }
        me() == 0
    }

    fn weight() -> Command {
        Command::Weight { server: "shop/1".to_owned(), weight: 50 }
    }

    fn refused(response: anyhow::Result<Response>) -> String {
        match response.unwrap() {
            Response::Refused { error, .. } => error,
            other => panic!("refusal expected, got {other:?}"),
        }
    }

    #[test]
    fn every_command_is_read_as_written() {
        let server = || "shop/1".to_owned();
        let commands = [
            (r#"{"command":"status"}"#, Command::Status),
            (r#"{"command":"weight","server":"shop/1","weight":50}"#, weight()),
            (
                r#"{"command":"limit","server":"shop/1","limit":25}"#,
                Command::Limit { server: server(), limit: Some(25) },
            ),
            (
                r#"{"command":"limit","server":"shop/1","limit":null}"#,
                Command::Limit { server: server(), limit: None },
            ),
            (
                r#"{"command":"drain","server":"shop/1","timeout_seconds":1.5,"then":"close"}"#,
                Command::Drain { server: server(), timeout_seconds: Some(1.5), then: Rest::Close },
            ),
            (
                r#"{"command":"drain","server":"shop/1","timeout_seconds":null,"then":"leave"}"#,
                Command::Drain { server: server(), timeout_seconds: None, then: Rest::Leave },
            ),
            (r#"{"command":"resume","server":"shop/1"}"#, Command::Resume { server: server() }),
            (
                r#"{"command":"restart","target":"shop","max_surge":2,"max_unavailable":null}"#,
                Command::Restart {
                    target: Some("shop".to_owned()),
                    max_surge: Some(2),
                    max_unavailable: None,
                },
            ),
            (
                r#"{"command":"adopt","service":"shop","pid":7,"name":"old","exec":["java"]}"#,
                Command::Adopt {
                    service: "shop".to_owned(),
                    pid: 7,
                    name: "old".to_owned(),
                    command: vec!["java".to_owned()],
                },
            ),
            (r#"{"command":"release","server":"shop/1"}"#, Command::Release { server: server() }),
            (r#"{"command":"reload","dry_run":true}"#, Command::Reload { dry_run: true }),
            (
                r#"{"command":"scale","service":"shop","count":7}"#,
                Command::Scale { service: "shop".to_owned(), count: 7 },
            ),
            (r#"{"command":"down"}"#, Command::Down),
            (
                r#"{"command":"upgrade","program":"/usr/bin/dist-ctl"}"#,
                Command::Upgrade { program: "/usr/bin/dist-ctl".to_owned() },
            ),
        ];
        for (text, command) in &commands {
            assert_eq!(Command::parse(text.as_bytes()).as_ref(), Ok(command));
            assert_eq!(serde_json::to_string(command).unwrap(), *text);
        }
        for name in Command::NAMES {
            assert!(commands.iter().any(|(text, _)| text.contains(&format!(":\"{name}\""))));
        }
    }

    #[test]
    fn what_is_no_command_is_refused_with_a_sentence() {
        for (text, expected) in [
            (
                "",
                "read the request: it is no JSON (EOF while parsing a value at line 1 column 0): \
                 write one object on a line, like {\"command\":\"status\"}",
            ),
            (
                "[]",
                "read the request: it has no \"command\": write one object on a line, like \
                 {\"command\":\"status\"}; the commands are status, weight, limit, drain, resume, restart, adopt, release, reload, scale, down, upgrade",
            ),
            (
                r#"{"command":5}"#,
                "read the request: it has no \"command\": write one object on a line, like \
                 {\"command\":\"status\"}; the commands are status, weight, limit, drain, resume, restart, adopt, release, reload, scale, down, upgrade",
            ),
            (
                r#"{"command":"explode"}"#,
                "no command is called \"explode\": the commands are status, weight, limit, drain, \
                 resume, restart, adopt, release, reload, scale, down, upgrade",
            ),
            (r#"{"command":"weight","weight":5}"#, "command \"weight\": missing field `server`"),
            (r#"{"command":"limit","server":"shop/1"}"#, "command \"limit\": missing field `limit`"),
            (
                r#"{"command":"weight","server":"shop/1","weight":-1}"#,
                "command \"weight\": invalid value: integer `-1`, expected u32",
            ),
            (
                r#"{"command":"weight","server":"shop/1","weight":4294967296}"#,
                "command \"weight\": invalid value: integer `4294967296`, expected u32",
            ),
            (
                r#"{"command":"resume","server":["shop/1"]}"#,
                "command \"resume\": invalid type: sequence, expected a string",
            ),
            (r#"{"command":"down","now":true}"#, "command \"down\": it has no field \"now\""),
            (
                r#"{"command":"resume","server":"shop/1","weight":1}"#,
                "command \"resume\": it has no field \"weight\"",
            ),
        ] {
            assert_eq!(Command::parse(text.as_bytes()), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn responses_are_written_with_version_and_ok() {
        for (response, text) in [
            (Response::Done, r#"{"version":1,"ok":true}"#),
            (
                Response::Changes(vec!["a".to_owned(), "b".to_owned()]),
                r#"{"version":1,"ok":true,"changes":["a","b"]}"#,
            ),
            (
                Response::Status(a_status()),
                r#"{"version":1,"ok":true,"status":{"version":"0.1.0","build":"1-2-3-4.5","pid":7,"not_upgraded":null,"troubles":[],"services":[]}}"#,
            ),
            (
                Response::input("no server is called \"x\""),
                r#"{"version":1,"ok":false,"error":"no server is called \"x\"","kind":"input"}"#,
            ),
            (
                Response::failure("it does not work"),
                r#"{"version":1,"ok":false,"error":"it does not work","kind":"failure"}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&response).unwrap(), text);
            assert_eq!(serde_json::from_str::<Response>(text).unwrap(), response);
        }
    }

    #[test]
    fn a_refusal_becomes_an_error_with_its_exit_code() {
        assert_eq!(Response::Done.into_result().unwrap(), None);
        assert_eq!(Response::Status(a_status()).into_result().unwrap(), Some(a_status()));
        let input = Response::input("no server is called \"x\"").into_result().unwrap_err();
        assert_eq!((input.to_string().as_str(), exit(&input)), ("no server is called \"x\"", 2));
        let failure = Response::failure("it does not work").into_result().unwrap_err();
        assert_eq!((failure.to_string().as_str(), exit(&failure)), ("it does not work", 1));
    }

    fn exit(error: &anyhow::Error) -> u8 {
        crate::error::exit_code(error)
    }

    #[test]
    fn commands_reach_the_loop_with_who_sent_them() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        assert_eq!(instance.ask(&Command::Status).unwrap(), Response::Status(a_status()));
        assert_eq!(instance.ask(&weight()).unwrap(), Response::Done);
        let pid = i32::try_from(std::process::id()).unwrap();
        let peer = Peer { uid: me(), pid: Some(pid), level: Level::Admin };
        assert_eq!(instance.seen.recv().unwrap(), (Command::Status, peer));
        assert_eq!(instance.seen.recv().unwrap(), (weight(), peer));
        assert_eq!(peer.to_string(), format!("uid {} (pid {pid})", me()));
    }

    #[test]
    fn one_connection_asks_several_times_and_is_answered_in_order() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let answers = instance.say(
            b"{\"command\":\"down\"}\n{\"command\":\"status\"}\r\n {\"command\":\"down\"} \n{\"command\":\"status\"}",
        );
        let done = json!(Response::Done);
        let status = json!(Response::Status(a_status()));
        assert_eq!(answers, [done.clone(), status.clone(), done, status]);
    }

    #[test]
    fn socket_has_owner_group_and_mode_and_nothing_else_is_left() {
        if !is_root("socket_has_owner_group_and_mode_and_nothing_else_is_left") {
            return;
        }
        let access = Control { owner: STRANGER, mode: 0o660, readers: Some(READERS) };
        let instance = Instance::start(access, PATIENCE, Loop::Answers);
        let socket = fs::metadata(instance.dir.0.join(SOCKET)).unwrap();
        assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o7777), (STRANGER, READERS, 0o660));
        let names: Vec<_> =
            fs::read_dir(&instance.dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [SOCKET]);
    }

    #[test]
    fn a_socket_left_by_a_dead_distributor_is_replaced() {
        let dir = RuntimeDir::new();
        drop(BlockingUnixListener::bind(dir.0.join(SOCKET)).unwrap());
        // What is left by one that died in the middle of bind.
        fs::create_dir(dir.0.join("control.new")).unwrap();
        drop(BlockingUnixListener::bind(dir.0.join("control.new/s")).unwrap());
        run(async {
            let listener = bind(&dir.0, &root_only()).unwrap();
            let client = BlockingUnixStream::connect(dir.0.join(SOCKET)).unwrap();
            listener.accept().await.unwrap();
            drop(client);
        });
        assert!(!dir.0.join("control.new").exists());
    }

    #[test]
    fn bind_says_which_socket_it_could_not_make() {
        run(async {
            let error = bind(Path::new("/proc/self/nowhere"), &root_only()).unwrap_err();
            assert_eq!(
                format!("{error:#}"),
                "make control socket /proc/self/nowhere/control.sock: No such file or directory \
                 (os error 2)"
            );
        });
    }

    #[test]
    fn the_owner_may_do_everything() {
        if !is_root("the_owner_may_do_everything") {
            return;
        }
        let access = Control { owner: STRANGER, mode: 0o600, readers: None };
        let instance = Instance::start(access, PATIENCE, Loop::Answers);
        let response = ask_as(&instance.dir.0, weight(), STRANGER, STRANGER, &[]);
        assert_eq!(response.unwrap(), Response::Done);
        assert_eq!(instance.seen.recv().unwrap().1.level, Level::Admin);
        // And so does root, though it is not the owner.
        assert_eq!(instance.ask(&weight()).unwrap(), Response::Done);
    }

    #[test]
    fn readers_may_look_and_change_nothing() {
        if !is_root("readers_may_look_and_change_nothing") {
            return;
        }
        let access = Control { owner: 0, mode: 0o660, readers: Some(READERS) };
        let instance = Instance::start(access, PATIENCE, Loop::Answers);
        // More groups than the first guess has room for.
        let mut many: Vec<u32> = (70_000..70_200).collect();
        many.push(READERS);
        for (name, gid, groups) in [
            ("primary group", READERS, &[][..]),
            ("supplementary group", STRANGER, &[READERS]),
            ("one of many groups", STRANGER, &many),
        ] {
            let dir = &instance.dir.0;
            let looked = ask_as(dir, Command::Status, STRANGER, gid, groups).unwrap();
            assert_eq!(looked, Response::Status(a_status()), "{name}");
            let (_, peer) = instance.seen.recv().unwrap();
            assert_eq!((peer.uid, peer.level), (STRANGER, Level::ReadOnly), "{name}");
            for command in [
                weight(),
                Command::Limit { server: "shop/1".to_owned(), limit: None },
                Command::Resume { server: "shop/1".to_owned() },
                Command::Down,
                Command::Upgrade { program: "/bin/false".to_owned() },
            ] {
                assert_eq!(
                    refused(ask_as(dir, command, STRANGER, gid, groups)),
                    "uid 64322 may only look, not change anything: ask as root, or as the owner \
                     that [control] in the configuration names",
                    "{name}"
                );
            }
        }
        instance.seen.try_recv().expect_err("no change has reached the loop");
    }

    #[test]
    fn anybody_else_is_told_so_and_reaches_nothing() {
        if !is_root("anybody_else_is_told_so_and_reaches_nothing") {
            return;
        }
        let instance = Instance::start(for_all_to_try(), PATIENCE, Loop::Answers);
        for command in [Command::Status, weight(), Command::Down] {
            assert_eq!(
                refused(ask_as(&instance.dir.0, command, STRANGER, STRANGER, &[STRANGER + 1])),
                "uid 64322 may not control this dist-ctl: ask as root, or as the owner or one of \
                 the readers that [control] in its configuration names"
            );
        }
        instance.assert_alive();
        assert_eq!(instance.seen.recv().unwrap().0, Command::Status);
        instance.seen.try_recv().expect_err("nothing of the stranger has reached the loop");
    }

    #[test]
    fn a_mode_that_keeps_the_client_out_is_explained() {
        if !is_root("a_mode_that_keeps_the_client_out_is_explained") {
            return;
        }
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let error = ask_as(&instance.dir.0, Command::Status, STRANGER, STRANGER, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "ask dist-ctl on {}: permission denied: ask as root, or as the owner or one of \
                 the readers that [control] in its configuration names",
                instance.dir.0.display()
            )
        );
    }

    #[test]
    fn random_bytes_are_refused_and_harm_nobody() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        // xorshift, so that a failure can be repeated.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..200 {
            let mut bytes = Vec::new();
            for _ in 0..=round * 5 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.extend_from_slice(&state.to_le_bytes());
            }
            let answers = instance.say(&bytes);
            assert_eq!(answers.len(), 1, "round {round}");
            assert_eq!((&answers[0]["ok"], &answers[0]["kind"]), (&json!(false), &json!("input")));
        }
        instance.assert_alive();
    }

    #[test]
    fn nonsense_of_every_kind_is_refused_with_a_sentence() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let nested = "[".repeat(60_000);
        for (name, bytes, begin) in [
            ("half a request", &b"{\"command\":\"sta"[..], "read the request: it is no JSON ("),
            ("an empty line", b"\n", "read the request: it is no JSON ("),
            ("not UTF-8", b"{\"command\":\"\xff\"}\n", "read the request: it is no JSON ("),
            ("nul bytes", &[0; 1000], "read the request: it is no JSON ("),
            ("deep nesting", nested.as_bytes(), "read the request: it is no JSON (recursion limit"),
            ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "read the request: it is no JSON ("),
        ] {
            let answers = instance.say(bytes);
            assert_eq!(answers.len(), 1, "{name}");
            let error = answers[0]["error"].as_str().unwrap();
            assert!(error.starts_with(begin), "{name}: {error}");
        }
        instance.assert_alive();
    }

    #[test]
    fn an_endless_line_is_cut_off() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let answers = instance.say(&vec![b' '; 10 * 1024 * 1024]);
        assert_eq!(answers, [json!(Response::input("read the request: it has more than 65536 bytes"))]);
        instance.assert_alive();
    }

    #[test]
    fn the_longest_line_is_still_read() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let mut bytes = br#"{"command":"status"}"#.to_vec();
        bytes.resize(65_535, b' ');
        bytes.push(b'\n');
        assert_eq!(instance.say(&bytes), [json!(Response::Status(a_status()))]);
        bytes.insert(0, b' ');
        assert_eq!(instance.say(&bytes).len(), 1);
        assert_eq!(instance.say(&bytes)[0]["kind"], "input");
    }

    #[test]
    fn a_silent_client_is_closed_and_a_slow_one_is_told_why() {
        let instance = Instance::start(root_only(), SHORT, Loop::Answers);
        let silent = instance.connect();
        let mut slow = instance.connect();
        slow.write_all(b"{\"command\"").unwrap();
        assert_eq!(answers(silent), [json!(null); 0]);
        assert_eq!(
            answers(slow),
            [json!(Response::input("read the request: no end of line came within 300ms"))]
        );
    }

    #[test]
    fn a_client_that_never_reads_is_closed_and_delays_nobody() {
        let instance = Instance::start(root_only(), SHORT, Loop::Answers);
        let mut deaf = instance.connect();
        let many = b"{\"command\":\"status\"}\n".repeat(100_000);
        // The server stops reading when its answers are not taken, and closes in the end.
        let writing = thread::spawn(move || deaf.write_all(&many).unwrap_err());
        for _ in 0..20 {
            instance.assert_alive();
        }
        let error = writing.join().unwrap();
        assert!(
            matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
            "{error}"
        );
    }

    #[test]
    fn silent_clients_are_bounded_and_others_are_told_so() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let silent: Vec<_> = (0..CLIENTS).map(|_| instance.connect()).collect();
        assert_eq!(
            refused(instance.ask(&Command::Status)),
            format!("the control socket has 64 clients, which is the most for uid {}: try again in 5s", me())
        );
        drop(silent);
        // They are gone as soon as the server has seen it.
        let deadline = Instant::now() + LONG;
        while instance.ask(&Command::Status).unwrap() != Response::Status(a_status()) {
            assert!(Instant::now() < deadline);
            thread::sleep(POLL);
        }
    }

    #[test]
    fn readers_who_hang_cannot_keep_the_operator_out() {
        if !is_root("readers_who_hang_cannot_keep_the_operator_out") {
            return;
        }
        let instance = Instance::start(for_all_to_try(), PATIENCE, Loop::Answers);
        let path = instance.dir.0.join(SOCKET);
        let hanging: Vec<_> = thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                become_user(STRANGER, READERS, &[]);
                (0..CLIENTS).map(|_| BlockingUnixStream::connect(&path).unwrap()).collect()
            });
            connecting.join().unwrap()
        });
        instance.assert_alive();
        let error = refused(ask_as(&instance.dir.0, Command::Status, STRANGER, READERS, &[]));
        assert!(
            error
                .starts_with("the control socket has 48 clients, which is the most for uid 64322: try again"),
            "{error}"
        );
        drop(hanging);
    }

    #[test]
    fn a_client_that_leaves_in_the_middle_harms_nobody() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        for round in 0..500 {
            let mut stream = instance.connect();
            let bytes = &b"{\"command\":\"status\"}\n{\"command\":\"status\"}\n"[..round % 43];
            stream.write_all(bytes).unwrap();
        }
        instance.assert_alive();
    }

    #[test]
    fn a_loop_that_does_not_answer_is_reported_and_hangs_nobody() {
        let instance = Instance::start(root_only(), SHORT, Loop::Keeps);
        assert_eq!(
            refused(instance.ask(&weight())),
            "the distributor did not answer within 300ms: a change may still happen, so look at \
             the status before you ask again"
        );
    }

    #[test]
    fn a_loop_that_stops_is_reported() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Drops);
        assert_eq!(
            refused(instance.ask(&weight())),
            "the distributor is stopping, and takes no more commands"
        );
    }

    #[test]
    fn serving_ends_with_the_loop() {
        let dir = RuntimeDir::new();
        run(async {
            let (requests, queue) = mpsc::channel(1);
            let serving =
                tokio::spawn(serve(bind(&dir.0, &root_only()).unwrap(), root_only(), requests, None));
            let client = BlockingUnixStream::connect(dir.0.join(SOCKET)).unwrap();
            drop(queue);
            timeout(LONG, serving).await.unwrap().unwrap();
            drop(client);
        });
    }

    #[test]
    fn no_instance_is_a_sentence() {
        let dir = RuntimeDir::new();
        let expected = format!(
            "no dist-ctl runs on {}: start it with dist-ctl up, or name its --runtime-dir",
            dir.0.display()
        );
        let error = ask(&dir.0, &Command::Status, LONG).unwrap_err();
        assert_eq!(error.to_string(), expected);
        // And so is one that is dead, its socket and lock still there.
        drop(BlockingUnixListener::bind(dir.0.join(SOCKET)).unwrap());
        fs::write(dir.0.join("lock"), "1\n").unwrap();
        let error = down(&dir.0, LONG).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    /// Holds the lock as the monitor does.
    fn hold_lock(dir: &Path) -> fs::File {
        let lock = fs::File::create(dir.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        lock
    }

    #[test]
    fn a_distributor_that_is_being_replaced_is_waited_for() {
        let dir = RuntimeDir::new();
        let _lock = hold_lock(&dir.0);
        let error = ask(&dir.0, &Command::Status, Duration::from_millis(100)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "ask dist-ctl on {}: its monitor runs, but no distributor answers: see its log",
                dir.0.display()
            )
        );
        thread::scope(|scope| {
            let asking = scope.spawn(|| ask(&dir.0, &Command::Down, LONG).unwrap());
            let listener = BlockingUnixListener::bind(dir.0.join(SOCKET)).unwrap();
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(&line(&Response::Done)).unwrap();
            assert_eq!(asking.join().unwrap(), Response::Done);
        });
    }

    /// Answers one client with these bytes, and closes after `hold`.
    fn answer_with(bytes: &[u8], hold: Duration, wait: Duration) -> anyhow::Result<Response> {
        let dir = RuntimeDir::new();
        let listener = BlockingUnixListener::bind(dir.0.join(SOCKET)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut client, _) = listener.accept().unwrap();
                client.write_all(bytes).unwrap();
                // Whoever has what it needs leaves before.
                client.set_read_timeout(Some(hold)).unwrap();
                while client.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
            });
            ask(&dir.0, &Command::Status, wait).map_err(|error| {
                anyhow::Error::msg(format!("{error:#}").replace(&dir.0.display().to_string(), "DIR"))
            })
        })
    }

    #[test]
    fn an_answer_that_is_none_is_explained() {
        let now = Duration::from_millis(1);
        for (name, bytes, hold, wait, expected) in [
            (
                "nothing",
                &b""[..],
                now,
                LONG,
                "ask dist-ctl on DIR: it closed the connection without an answer: see its log",
            ),
            (
                "half an answer",
                b"{\"version\":1,",
                now,
                LONG,
                "ask dist-ctl on DIR: it closed the connection without an answer: see its log",
            ),
            (
                "silence",
                b"",
                LONG,
                Duration::from_millis(50),
                "ask dist-ctl on DIR: no answer came within 50ms",
            ),
            (
                "another version",
                b"{\"version\":2,\"ok\":true}\n",
                LONG,
                LONG,
                "ask dist-ctl on DIR: it speaks version 2 and we speak 1: use the dist-ctl it was \
                 started from",
            ),
            ("no version", b"{\"ok\":true}\n", LONG, LONG, "ask dist-ctl on DIR: its answer has no version"),
            (
                "a status that is none",
                b"{\"version\":1,\"ok\":true,\"status\":{}}\n",
                LONG,
                LONG,
                "ask dist-ctl on DIR: its answer is not understood: missing field `version`",
            ),
            (
                "a refusal without a reason",
                b"{\"version\":1,\"ok\":false}\n",
                LONG,
                LONG,
                "ask dist-ctl on DIR: its answer is not understood: it refused without a reason",
            ),
        ] {
            let error = answer_with(bytes, hold, wait).unwrap_err();
            assert_eq!(error.to_string(), expected, "{name}");
        }
    }

    #[test]
    fn a_field_added_to_the_answer_is_no_error() {
        let response = answer_with(b"{\"version\":1,\"ok\":true,\"took\":5}\n", LONG, LONG);
        assert_eq!(response.unwrap(), Response::Done);
    }

    #[test]
    fn a_distributor_that_accepts_nobody_hangs_nobody() {
        let dir = RuntimeDir::new();
        let listener = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        listener.bind(&socket2::SockAddr::unix(dir.0.join(SOCKET)).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _first = BlockingUnixStream::connect(dir.0.join(SOCKET)).unwrap();
        let error = ask(&dir.0, &Command::Status, Duration::from_millis(100)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "ask dist-ctl on {}: it takes no clients: its distributor is stuck, see its log",
                dir.0.display()
            )
        );
    }

    #[test]
    fn down_returns_when_the_instance_is_gone() {
        let dir = RuntimeDir::new();
        // Another process holds the lock, for down waits for its end as well.
        let mut monitor = std::process::Command::new("flock")
            .arg(dir.0.join("lock"))
            .args(["-c", "read line"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + LONG;
        while lock_holder(&dir.0).is_none() {
            assert!(Instant::now() < deadline);
            thread::sleep(POLL);
        }
        let listener = BlockingUnixListener::bind(dir.0.join(SOCKET)).unwrap();
        thread::scope(|scope| {
            let stopping = scope.spawn(|| down(&dir.0, LONG).unwrap());
            let (client, _) = listener.accept().unwrap();
            let mut request = String::new();
            BlockingBufReader::new(client).read_line(&mut request).unwrap();
            assert_eq!(request, "{\"command\":\"down\"}\n");
            // It closes without an answer, as one that stops at once may.
            fs::remove_file(dir.0.join(SOCKET)).unwrap();
            drop(listener);
            thread::sleep(5 * POLL);
            assert!(!stopping.is_finished(), "the lock is still held");
            drop(monitor.stdin.take());
            assert_eq!(stopping.join().unwrap(), Response::Done);
        });
        assert!(monitor.wait().unwrap().code().is_some());
        assert_eq!(lock_holder(&dir.0), None);
    }

    #[test]
    fn down_gives_up_on_an_instance_that_stays() {
        let instance = Instance::start(root_only(), PATIENCE, Loop::Answers);
        let _lock = hold_lock(&instance.dir.0);
        let error = down(&instance.dir.0, Duration::from_secs(2)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "stop dist-ctl on {}: it still runs after 2s: it was asked to stop, and its \
                 log says what it waits for",
                instance.dir.0.display()
            )
        );
        assert_eq!(instance.seen.recv().unwrap().0, Command::Down);
    }

    #[test]
    fn down_passes_a_refusal_on_and_does_not_wait() {
        if !is_root("down_passes_a_refusal_on_and_does_not_wait") {
            return;
        }
        let instance = Instance::start(for_all_to_try(), PATIENCE, Loop::Answers);
        let response = thread::scope(|scope| {
            let stopping = scope.spawn(|| {
                become_user(STRANGER, READERS, &[]);
                down(&instance.dir.0, LONG)
            });
            stopping.join().unwrap()
        });
        assert!(refused(response).starts_with("uid 64322 may only look"));
    }
}
