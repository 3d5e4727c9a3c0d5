//! The configuration as it is meant: validated, expanded and resolved.
//!
//! Takes a file, or the command-line form of `up`; both become the same `written::Written`,
//! which `meant` turns into a [`Config`] once. Everything the rest of the program needs is
//! then here: no default to fill in, no name to look up, no text to parse. Refuses with all
//! the problems it finds, one sentence each. Reads the user database, the list of CPUs and the
//! files that hold a reply, and changes nothing.
#![forbid(unsafe_code)]

mod cpus;
pub(crate) mod duration;
mod environment;
mod expand;
mod limits;
mod meant;
mod nearest;
#[cfg(test)]
mod refusals;
mod size;
#[cfg(test)]
mod tests;
mod user;
mod written;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use distributor_ebpf::contract::Policy;
use rustix::process::{Resource, Signal};

pub(crate) use self::meant::signal_name;
pub use self::{
    cpus::{Cpus, parse as cpus_of_list, write as list_of_cpus},
    environment::Machine,
    limits::{Ceiling, Limits, Over, Prefix, Rate},
    user::User,
};
use crate::{
    address::ListenAddress,
    error::UserError,
    lifetime::{self, Lifetime},
    load::Rule,
    roll::Bounds,
    scale::Scale,
};

/// How many numbered servers services have, by their names, instead of what is configured.
pub type Counts = BTreeMap<String, usize>;

/// The file `up` reads when it is given nothing else.
pub const DEFAULT_FILE: &str = "/etc/dist-ctl/dist-ctl.toml";

/// What one `dist-ctl up` runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Who may talk to it.
    pub control: Control,
    /// In the order of their names. At least one.
    pub services: Vec<Service>,
}

/// Access to the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// The uid that owns the socket, and may change things besides root.
    pub owner: u32,
    /// The socket's mode.
    pub mode: u32,
    /// The gid whose members may read status, and which the socket belongs to.
    pub readers: Option<u32>,
}

/// Servers behind the same addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// `shop`: a-z, 0-9, `_` and `-`.
    pub name: String,
    /// 1 to 16, none of which covers another, neither here nor in another service.
    pub listen: Vec<ListenAddress>,
    /// How a server is chosen for a connection.
    pub policy: Policy,
    /// What becomes of it when somebody else listens on one of its addresses.
    pub occupied: Occupied,
    /// Who may wait when no server has a place.
    pub waiting: Waiting,
    /// Between how many numbered servers there are, and by what. `None`: always as many.
    pub scale: Option<Scale>,
    /// How its servers are restarted one after the other.
    pub roll: Bounds,
    /// What the service as a whole may have, and each source of clients.
    pub limits: Limits,
    /// How weights follow load. `None`: they do not.
    pub load: Option<Rule>,
    /// Whom the servers run as. `None`: as the distributor, that is root.
    pub user: Option<User>,
    /// How the servers get their listeners.
    pub socket: SocketMode,
    /// When a server is ready.
    pub readiness: Readiness,
    /// The accept queue asked for, of inherited sockets and rooms.
    pub backlog: u32,
    /// 1 to 256: the numbered ones, then the named ones.
    pub servers: Vec<Server>,
}

/// Waiting for a place. First come, first served: there is no other order, so none is kept here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Connections that may wait, up to `CAPACITY_MAX`. 0: whom nobody can serve at once is
    /// refused.
    pub capacity: u32,
    /// How long one may wait.
    pub timeout: Duration,
    /// What a client is told whose time is up; empty: its connection is reset.
    pub reply: Arc<[u8]>,
}

/// One server, with everything it needs to be started.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// `shop/1` or `shop/big`.
    pub name: String,
    /// `1` or `big`: what `{name}` becomes.
    pub short_name: String,
    /// From 1; named servers go on after the numbered ones.
    pub index: usize,
    /// Program and arguments. At least the program.
    pub command: Vec<String>,
    /// Complete: what is not in here, the server does not have. Sorted by name.
    pub environment: Vec<(String, String)>,
    /// What of it the configuration says, in its order: what comes later counts.
    pub own_environment: Vec<(String, String)>,
    /// Absolute. `None`: where `up` was started.
    pub directory: Option<PathBuf>,
    /// Its share, relative to the others of its service.
    pub weight: u32,
    /// The most connections at a time.
    pub limit: Option<u32>,
    /// The CPUs it may use.
    pub cpus: Cpus,
    /// Resource limits. `None`: unlimited.
    pub limits: Vec<(Resource, Option<u64>)>,
    /// The file mode bits it does not set.
    pub umask: u32,
    /// Where its standard output goes.
    pub output: Output,
    /// Where its standard error goes.
    pub errors: Output,
    /// What asks it to stop.
    pub stop_signal: Signal,
    /// How long after that it is killed.
    pub stop_timeout: Duration,
    /// How long it may take to be ready.
    pub start_timeout: Duration,
    /// How long its connections may go on after it is taken out, before it is asked to stop.
    pub drain_timeout: Duration,
    /// It gets connections only while no server is ready that is not a backup.
    pub backup: bool,
    /// How long its weight grows after it was started again. Zero: not at all.
    pub slow_start: Duration,
    /// How long one that is ready may go without saying `WATCHDOG=1` (sd_notify). `None`: for ever.
    pub watchdog: Option<Duration>,
    /// How it is checked. `None`: it is not.
    pub check: Option<Check>,
    /// When it is taken for one that hangs. `None`: never.
    pub stall: Option<Stall>,
    /// When its instance is replaced by another one.
    pub lifetime: Lifetime,
    /// What happens when it ends by itself.
    pub restart: Restart,
}

/// How a server is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub kind: CheckKind,
    /// From the beginning of one check to that of the next.
    pub interval: Duration,
    /// The same while it is undecided how the server is. Not above `interval`.
    pub fast_interval: Duration,
    pub timeout: Duration,
    /// So many good ones in a row, and one that was unhealthy is well.
    pub rise: u32,
    /// So many bad ones in a row, and it is unhealthy.
    pub fall: u32,
    /// It is started again when it has been unhealthy for so long. `None`: never for that.
    pub restart_after: Option<Duration>,
}

/// What a check does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// Connects.
    Tcp,
    /// Asks for a path, and wants one of these statuses.
    Http { path: String, host: String, statuses: Vec<RangeInclusive<u16>> },
    /// Runs a program, which is to exit with 0.
    Command { command: Vec<String> },
}

/// When a server is taken for one that hangs, and what is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// So long its accept queue has not moved.
    pub after: Duration,
    /// What is in there goes to the others, and it is started again.
    pub move_queue: bool,
    /// It is killed when it has been stalled for so long. `None`: never for that.
    pub kill_after: Option<Duration>,
}

/// How a server gets its listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketMode {
    /// It binds by itself, unmodified.
    Own,
    /// It inherits descriptors from 3 on, as systemd's socket activation gives them.
    Systemd,
    /// It inherits the one listener as standard input.
    Stdin,
}

/// What becomes of a service when somebody else listens on one of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupied {
    /// `up` says who it is, and ends.
    Refuse,
    /// It begins when the address is free, or when that server is adopted.
    Wait,
}

/// What makes a server ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It listens on every address of its service.
    Listening,
    /// And it said `READY=1` (sd_notify).
    Notify,
    /// And a check of it was good.
    Check,
}

/// Where a server writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Where `up` itself writes to.
    Inherit,
    /// Appended to this file. An absolute path.
    File(PathBuf),
}

/// When a server that ended is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// The wait after the first failure; each one in a row doubles it.
    pub delay: Duration,
    /// The longest wait. Not below `delay`.
    pub max_delay: Duration,
    /// A run of this length ends the row.
    pub healthy_after: Duration,
    /// So many failures in a row, and it is given up. `None`: never.
    pub give_up_after: Option<u32>,
}

/// `up --listen ADDR --servers N ... -- COMMAND`, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandForm {
    /// --name
    pub name: String,
    /// --listen, as often as it was given.
    pub listen: Vec<String>,
    /// --servers
    pub servers: i64,
    /// --policy
    pub policy: Option<String>,
    /// --limit
    pub limit: Option<i64>,
    /// --weight
    pub weight: Option<i64>,
    /// --waiting
    pub waiting: Option<i64>,
    /// --socket
    pub socket: Option<String>,
    /// --user
    pub user: Option<String>,
    /// COMMAND ARG...
    pub command: Vec<String>,
}

impl Config {
    /// The configuration in a file.
    pub fn read(path: &Path) -> Result<Self, UserError> {
        Self::read_with_text(path).map(|(_, config)| config)
    }

    /// The file's text, and what it means.
    pub fn read_with_text(path: &Path) -> Result<(String, Self), UserError> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let config = Self::parse(&text, &path.display().to_string())?;
                Ok((text, config))
            }
            Err(error) => Err(unreadable(path, &error)),
        }
    }

    /// The configuration in `text`. `file` is its name in sentences.
    pub fn parse(text: &str, file: &str) -> Result<Self, UserError> {
        Self::parse_with(text, file, &Counts::new())
    }

    /// The same, with other numbers of servers.
    pub fn parse_with(text: &str, file: &str, counts: &Counts) -> Result<Self, UserError> {
        Self::parse_for(text, file, counts, &Machine::this())
    }

    /// The configuration of the command-line form.
    pub fn from_command(form: &CommandForm) -> Result<Self, UserError> {
        Self::from_command_with(form, &Counts::new())
    }

    /// The same, with other numbers of servers.
    pub fn from_command_with(form: &CommandForm, counts: &Counts) -> Result<Self, UserError> {
        Self::from_command_for(form, counts, &Machine::this())
    }

    /// The service of this name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|service| service.name == name)
    }

    fn parse_for(text: &str, file: &str, counts: &Counts, machine: &Machine) -> Result<Self, UserError> {
        let problems = Problems::default();
        let config = written::read(text, &problems).map(|mut written| {
            written.set_counts(counts);
            meant::config(&written, machine, &problems)
        });
        problems.unless_none(Some(file))?;
        Ok(config.expect("without a problem the text was read"))
    }

    fn from_command_for(form: &CommandForm, counts: &Counts, machine: &Machine) -> Result<Self, UserError> {
        let problems = Problems::default();
        let mut written = written::from_command(form);
        written.set_counts(counts);
        let config = meant::config(&written, machine, &problems);
        problems.unless_none(None)?;
        Ok(config)
    }
}

/// What `check` prints: one line for each service.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.services.iter().try_for_each(|service| writeln!(f, "{service}"))
    }
}

/// `shop: [::]:8080, 5 servers (1 to 4, big as backup), least-connections, socket own, user shop, limit 200, weight 100 (big: 200), slow start 30s, check http every 2s, waiting 1024 for 30s with a reply`
impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        for address in &self.listen {
            write!(f, "{}, ", String::from(*address))?;
        }
        let mut names: Vec<String> = match self.numbered() {
            0 => Vec::new(),
            1 => vec!["1".to_owned()],
            count => vec![format!("1 to {count}")],
        };
        let named = self.servers.iter().filter(|server| !server.is_numbered());
        names.extend(named.map(|server| match server.backup {
            true => format!("{} as backup", server.short_name),
            false => server.short_name.clone(),
        }));
        let plural = if self.servers.len() == 1 { "" } else { "s" };
        write!(
            f,
            "{} server{plural} ({}), {}, socket {}",
            self.servers.len(),
            names.join(", "),
            self.policy.name(),
            self.socket.name(),
        )?;
        if let Some(user) = &self.user {
            write!(f, ", user {}", user.name)?;
        }
        let limit = |server: &Server| match server.limit {
            Some(limit) => limit.to_string(),
            None => "none".to_owned(),
        };
        write!(f, ", limit {}", most_and_others(&self.servers, limit))?;
        let weight = |server: &Server| server.weight.to_string();
        write!(f, ", weight {}", most_and_others(&self.servers, weight))?;
        match self.servers.first() {
            Some(server) if !server.slow_start.is_zero() => {
                write!(f, ", slow start {}", duration::write(server.slow_start))?;
            }
            _ => {}
        }
        if let Some(scale) = self.scale {
            write!(f, ", scale {scale}")?;
        }
        for (what, of) in PARTICULARS {
            if self.servers.iter().any(|server| of(server).is_some()) {
                let said = |server: &Server| of(server).unwrap_or_else(|| "none".to_owned());
                write!(f, ", {what} {}", most_and_others(&self.servers, said))?;
            }
        }
        if let Some(load) = &self.load {
            write!(f, ", weights {load}")?;
        }
        write!(f, ", {}", self.waiting)?;
        match self.limits.service.is_none() && self.limits.source.is_none() {
            true => Ok(()),
            false => write!(f, ", limits: {}", self.limits),
        }
    }
}

/// What a server may have beside that, and how it is said.
type Particular = (&'static str, fn(&Server) -> Option<String>);
const PARTICULARS: [Particular; 8] = [
    ("cpus", |server| (server.cpus != Cpus::All).then(|| server.cpus.to_string())),
    ("check", |server| {
        let check = server.check.as_ref()?;
        Some(format!("{} every {}", check.kind.name(), duration::write(check.interval)))
    }),
    ("watchdog", |server| server.watchdog.map(duration::write)),
    ("stall_after", |server| Some(duration::write(server.stall?.after))),
    ("hang_kill", |server| server.stall?.kill_after.map(duration::write)),
    ("max_age", |server| server.lifetime.max_age.map(duration::write)),
    ("max_connections", |server| Some(server.lifetime.max_connections?.to_string())),
    ("memory_limit", |server| server.lifetime.memory_limit.map(lifetime::size)),
];

/// `waiting 1024 for 30s with a reply`, or `no waiting`
impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.capacity == 0 {
            return f.write_str("no waiting");
        }
        write!(f, "waiting {} for {}", self.capacity, duration::write(self.timeout))?;
        match self.reply.is_empty() {
            true => Ok(()),
            false => f.write_str(" with a reply"),
        }
    }
}

impl Service {
    /// How many of its servers have numbers for names.
    pub fn numbered(&self) -> usize {
        self.servers.iter().filter(|server| server.is_numbered()).count()
    }
}

impl Server {
    /// Its name is its number.
    pub fn is_numbered(&self) -> bool {
        self.short_name == self.index.to_string()
    }
}

impl CheckKind {
    /// The name an operator writes.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http { .. } => "http",
            Self::Command { .. } => "command",
        }
    }

    /// It goes over the network, to the server's listeners.
    pub const fn is_directed(&self) -> bool {
        match self {
            Self::Tcp | Self::Http { .. } => true,
            Self::Command { .. } => false,
        }
    }
}

impl SocketMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Own, Self::Systemd, Self::Stdin];

    /// The name an operator writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Systemd => "systemd",
            Self::Stdin => "stdin",
        }
    }
}

impl Occupied {
    const ALL: [Self; 2] = [Self::Refuse, Self::Wait];

    /// The name an operator writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Wait => "wait",
        }
    }
}

impl Readiness {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Listening, Self::Notify, Self::Check];

    /// The name an operator writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Notify => "notify",
            Self::Check => "check",
        }
    }
}

fn unreadable(path: &Path, error: &io::Error) -> UserError {
    let is_first_time = error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_FILE);
    UserError::new(match is_first_time {
        true => format!(
            "{DEFAULT_FILE} does not exist: write one (dist-ctl up --help shows how), name another with -f FILE, or say what to run: dist-ctl up --listen :8080 --servers 4 -- COMMAND"
        ),
        false => format!("read configuration: {}: {error}", path.display()),
    })
}

/// `100 (big: 200, small: 50)`: the first server's, and those that differ from it.
fn most_and_others(servers: &[Server], of: impl Fn(&Server) -> String) -> String {
    let Some(first) = servers.first().map(&of) else {
        return "none".to_owned();
    };
    let others: Vec<String> = servers
        .iter()
        .map(|server| (&server.short_name, of(server)))
        .filter(|(_, value)| *value != first)
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    match others.is_empty() {
        true => first,
        false => format!("{first} ({})", others.join(", ")),
    }
}

/// True for what may name a service or a server.
///
/// A service's name is a directory of bpffs, which refuses dots, and of the cgroup file
/// system, whose own files all have one.
pub(crate) fn is_name(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=32).contains(&text.len())
        && text.bytes().all(|byte| letter(byte) || byte == b'_' || byte == b'-')
        && text.bytes().next().is_some_and(letter)
}

/// The problems found so far, with their lines.
#[derive(Default)]
struct Problems(RefCell<Vec<(Option<usize>, String)>>);

impl Problems {
    fn add(&self, place: &written::Place, sentence: impl fmt::Display) {
        let problem = (place.line, format!("{}: {sentence}", place.field));
        let mut problems = self.0.borrow_mut();
        // What servers share is looked at once for each of them.
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Fails with all of them, in the order of their lines.
    fn unless_none(self, file: Option<&str>) -> Result<(), UserError> {
        let mut problems = self.0.into_inner();
        if problems.is_empty() {
            return Ok(());
        }
        // What has no line concerns the file as a whole and comes last.
        problems.sort_by_key(|(line, _)| line.unwrap_or(usize::MAX));
        let sentences = problems.into_iter().map(|(line, sentence)| match (file, line) {
            (Some(file), Some(line)) => format!("{file}:{line}: {sentence}"),
            (Some(file), None) => format!("{file}: {sentence}"),
            (None, _) => sentence,
        });
        Err(UserError::all(sentences.collect()))
    }
}
