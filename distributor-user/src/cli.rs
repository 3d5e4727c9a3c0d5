//! The command line: as typed, and as meant.
//!
//! Takes the arguments of the process, gives an [`Invocation`]. clap reads what is typed;
//! what its rules cannot say is said in `Source::new`, and both refuse in the same form and
//! with exit code 2. Opens no file and asks nobody: `up` hands the configuration's own text
//! on, for the distributor to read.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Args, CommandFactory as _, Parser, Subcommand,
    error::{ContextKind, ContextValue, Error, ErrorKind},
};
use distributor_ebpf::contract::{LIMIT_MAX, SLOTS, WEIGHT_MAX};

use crate::{
    address::ListenAddress,
    config::{CommandForm, Config, DEFAULT_FILE, duration, is_name},
    control,
    drain::Rest,
    error::UserError,
    logging::Verbosity,
};

/// What the process is asked to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    /// Absolute. Which instance is meant.
    pub runtime_dir: PathBuf,
    /// How much it says.
    pub verbosity: Verbosity,
    /// What it does.
    pub command: Command,
}

/// One of the things it can do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Run services, as their monitor.
    Up(Source),
    /// Show a running instance.
    Status(Form),
    /// Change a running instance.
    Change(control::Command),
    /// Restart what was named, and wait until that is done.
    RestartAndWait(control::Command, Option<String>),
    /// Take a server out, and wait until its connections have ended.
    DrainAndWait(control::Command, String),
    /// Stop a running instance.
    Down,
    /// Have the running distributor replaced by this program; `None` is this one.
    Upgrade(Option<PathBuf>),
    /// Read a configuration and say what was understood.
    Check(PathBuf),
    /// Try what this machine can do.
    Doctor(Form),
    /// Steer and supervise; the monitor starts this.
    Distributor(Source),
    /// Say whether this program could be that; the distributor before starts this.
    Trial(Source),
    /// Become a server; the monitor starts this.
    Launch,
    /// Keeps rooms, in this cgroup.
    Keep(PathBuf),
    /// Do one check after the other, in this cgroup if one can be made; the doctor starts this.
    Examine(Option<PathBuf>),
    /// Be a small server to try dist-ctl with.
    Demo {
        /// Where it listens. Empty: what its environment says.
        listen: Vec<ListenAddress>,
        /// Who it says it is. `None`: what its environment says.
        name: Option<String>,
    },
}

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// This file.
    File(PathBuf),
    /// The command line itself.
    Command(CommandForm),
}

/// How something is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Table,
    /// For programs.
    Json,
}

impl Invocation {
    /// Understands the arguments, the program's name first. The error may as well be a help
    /// text; its `exit` prints it where it belongs and exits with 0 or 2.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let Arguments { runtime_dir, verbose, quiet, verb } =
            Arguments::try_parse_from(arguments).map_err(without_internals)?;
        let runtime_dir = std::path::absolute(&runtime_dir).map_err(|why| {
            let sentence = format!("--runtime-dir: {} is no path: {why}", runtime_dir.display());
            refusal(None, ErrorKind::InvalidValue, &sentence)
        })?;
        let command = match verb {
            Verb::Up(up) => Command::Up(Source::new(up)?),
            Verb::Status { json } => Command::Status(if json { Form::Json } else { Form::Table }),
            Verb::Weight { server, weight } => Command::Change(control::Command::Weight { server, weight }),
            Verb::Limit { server, limit: Limit(limit) } => {
                Command::Change(control::Command::Limit { server, limit })
            }
            Verb::Drain { server, timeout, then, wait } => {
                if timeout.is_none() && then == Rest::Close {
                    let sentence = "--then close needs a --timeout, write for example --timeout 30s, or 0s";
                    return Err(refusal(Some("drain"), ErrorKind::MissingRequiredArgument, sentence));
                }
                let timeout_seconds = timeout.map(|timeout| timeout.as_secs_f64());
                let drain = control::Command::Drain { server: server.clone(), timeout_seconds, then };
                match wait {
                    true => Command::DrainAndWait(drain, server),
                    false => Command::Change(drain),
                }
            }
            Verb::Resume { server } => Command::Change(control::Command::Resume { server }),
            Verb::Restart { target, max_surge, max_unavailable, no_wait } => {
                let restart =
                    control::Command::Restart { target: target.clone(), max_surge, max_unavailable };
                match no_wait {
                    true => Command::Change(restart),
                    false => Command::RestartAndWait(restart, target),
                }
            }
            Verb::Adopt { service, pid, name, command } => {
                let name = name.unwrap_or_else(|| format!("pid-{pid}"));
                Command::Change(control::Command::Adopt { service, pid, name, command })
            }
            Verb::Release { server } => Command::Change(control::Command::Release { server }),
            Verb::Reload { dry_run } => Command::Change(control::Command::Reload { dry_run }),
            Verb::Scale { service, count } => Command::Change(control::Command::Scale { service, count }),
            Verb::Down => Command::Down,
            Verb::Upgrade { binary } => Command::Upgrade(binary),
            Verb::Check { file } => Command::Check(file),
            Verb::Doctor { json } => Command::Doctor(if json { Form::Json } else { Form::Table }),
            Verb::Distributor(up) => Command::Distributor(Source::new(up)?),
            Verb::Trial(up) => Command::Trial(Source::new(up)?),
            Verb::Launch => Command::Launch,
            Verb::Keep { cgroup } => Command::Keep(cgroup),
            Verb::Examine { cgroup } => Command::Examine(cgroup),
            Verb::Demo { listen, name } => Command::Demo { listen, name },
        };
        Ok(Self {
            // Two spellings of one directory must not be two instances: /run/x and /run/x/.
            runtime_dir: runtime_dir.components().collect(),
            verbosity: match (quiet, verbose) {
                (true, _) => Verbosity::Quiet,
                (false, true) => Verbosity::Verbose,
                (false, false) => Verbosity::Normal,
            },
            command,
        })
    }

    /// The arguments with which `dist-ctl distributor` understands the same, wherever this
    /// invocation got it from (its environment, for one).
    pub fn distributor_arguments(&self, source: &Source) -> Vec<OsString> {
        let mut arguments = vec!["--runtime-dir".into(), self.runtime_dir.clone().into()];
        match self.verbosity {
            Verbosity::Quiet => arguments.push("--quiet".into()),
            Verbosity::Normal => {}
            Verbosity::Verbose => arguments.push("--verbose".into()),
        }
        // In one word with its option, so that no value can be taken for an option.
        let mut option = |name: &str, value: &str| arguments.push(format!("--{name}={value}").into());
        match source {
            Source::File(path) => {
                let mut word = OsString::from("--file=");
                word.push(path);
                arguments.push(word);
            }
            Source::Command(form) => {
                let CommandForm {
                    name,
                    listen,
                    servers,
                    policy,
                    limit,
                    weight,
                    waiting,
                    socket,
                    user,
                    command,
                } = form;
                option("name", name);
                for address in listen {
                    option("listen", address);
                }
                option("servers", &servers.to_string());
                let texts = [("policy", policy), ("socket", socket), ("user", user)];
                for (name, value) in texts {
                    if let Some(value) = value {
                        option(name, value);
                    }
                }
                for (name, value) in [("limit", limit), ("weight", weight), ("waiting", waiting)] {
                    if let Some(value) = value {
                        option(name, &value.to_string());
                    }
                }
                arguments.push("--".into());
                arguments.extend(command.iter().map(OsString::from));
            }
        }
        arguments
    }
}

impl Source {
    /// Reads the configuration.
    pub fn read(&self) -> Result<Config, UserError> {
        match self {
            Self::File(path) => Config::read(path),
            Self::Command(form) => Config::from_command(form),
        }
    }

    fn new(typed: Up) -> Result<Self, Error> {
        if let Some(stray) = typed.stray {
            let sentence = format!(
                "{stray:?} stands alone, write -f {stray} if it is a configuration, or -- {stray} if it is a command"
            );
            return Err(refusal(Some("up"), ErrorKind::UnknownArgument, &sentence));
        }
        let given = typed.form_options();
        let Up {
            file,
            name,
            listen,
            servers,
            policy,
            limit,
            weight,
            waiting,
            socket,
            user,
            command,
            stray: _,
        } = typed;
        let sentence = match (file, given.first(), servers) {
            (None, None, _) => return Ok(Self::File(PathBuf::from(DEFAULT_FILE))),
            (Some(path), None, _) => return Ok(Self::File(path)),
            (None, Some(_), Some(servers)) if !listen.is_empty() && !command.is_empty() => {
                return Ok(Self::Command(CommandForm {
                    name: name.unwrap_or_else(|| "app".to_owned()),
                    listen,
                    servers,
                    policy,
                    limit,
                    weight,
                    waiting,
                    socket,
                    user,
                    command,
                }));
            }
            (Some(path), Some(option), _) => {
                let path = Path::new(&path).display();
                let sentence = format!(
                    "--file {path} and {option} exclude each other, write what {option} says into the file, or leave out --file"
                );
                return Err(refusal(Some("up"), ErrorKind::ArgumentConflict, &sentence));
            }
            (None, Some(_), _) if listen.is_empty() => "--listen is missing",
            (None, Some(_), None) => "--servers is missing",
            (None, Some(_), Some(_)) => "the command is missing",
        };
        let sentence = format!(
            "{sentence}, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080"
        );
        Err(refusal(Some("up"), ErrorKind::MissingRequiredArgument, &sentence))
    }
}

const ABOUT: &str = "Puts several copies of a server behind one address. The Linux kernel gives \
    each new connection to the least busy copy, and a copy that fails is started again.";

const EXIT_STATUS: &str = "\
Exit status:
  0  done
  1  failed
  2  what was typed or configured cannot be done; the message says what to write";

const EXAMPLE: &str = "\
Example: four copies of a web server behind port 8080, then a look at them
  dist-ctl up --listen 0.0.0.0:8080 --servers 4 -- python3 -m http.server --bind 0.0.0.0 8080
  dist-ctl status
";

const UP_EXAMPLE: &str = "\
Examples: four copies of a web server behind port 8080; and what a file says
  dist-ctl up --listen 0.0.0.0:8080 --servers 4 -- python3 -m http.server --bind 0.0.0.0 8080
  dist-ctl up -f /etc/dist-ctl/dist-ctl.toml

SIGTERM and SIGINT stop the servers and then dist-ctl. SIGHUP has it read its file again.";

const STATUS_EXAMPLE: &str = "\
Example: for a program
  dist-ctl status --json";

const WEIGHT_EXAMPLE: &str = "\
Example: twice the connections of a server with the usual weight of 100
  dist-ctl weight shop/1 200";

const LIMIT_EXAMPLE: &str = "\
Examples: 50 connections at a time, as many as come, and 1000 for all servers together
  dist-ctl limit shop/1 50
  dist-ctl limit shop/1 none
  dist-ctl limit shop 1000";

const DRAIN_EXAMPLE: &str = "\
Examples: until its connections have ended, and at most for half a minute
  dist-ctl drain shop/1 --wait
  dist-ctl drain shop/1 --timeout 30s --then close --wait

The server runs on, and `dist-ctl resume` puts it back.
With --wait, exit status 0: it has no connections left. 1: some are left.";

const RESUME_EXAMPLE: &str = "\
Example: put back what was drained, or try again what failed too often
  dist-ctl resume shop/1";

const RESTART_EXAMPLE: &str = "\
Examples: one server after the other, of all services, of one, and one server
  dist-ctl restart
  dist-ctl restart shop
  dist-ctl restart shop/1

Each new instance has to be ready before the one before ends, so no client notices. If one does not get
ready, the restart ends there, and those before go on. It goes on if this command is interrupted.
Exit status 0: all were restarted. 1: not all; the message says why.";

const ADOPT_EXAMPLE: &str = "\
Examples: a server that somebody else keeps running, and one that is to be started again
  dist-ctl adopt shop --pid 4711 --name old
  dist-ctl adopt shop --pid 4711 --name old -- java -jar shop.jar";

const RELEASE_EXAMPLE: &str = "\
Example: it keeps its connections, and gets no new ones while others serve the address
  dist-ctl release shop/old";

const RELOAD_EXAMPLE: &str = "\
Examples: what would be done, and doing it
  dist-ctl reload --dry-run
  dist-ctl reload

A configuration that is wrong changes nothing. SIGHUP to dist-ctl up does the same as reload.";

const SCALE_EXAMPLE: &str = "\
Example: six servers, whether there were more or fewer
  dist-ctl scale shop 6

New ones get connections when they are ready; the last ones are drained before they are stopped.";

const DOWN_EXAMPLE: &str = "\
Example: stop another instance than the usual one
  dist-ctl down --runtime-dir /run/dist-ctl-test";

const UPGRADE_EXAMPLE: &str = "\
Example: with the new program, after it was installed
  dist-ctl upgrade";

const CHECK_EXAMPLE: &str = "\
Example: before the next start
  dist-ctl check /etc/dist-ctl/dist-ctl.toml";

const DOCTOR_EXAMPLE: &str = "\
Example: before the first start, or when dist-ctl up does not start
  dist-ctl doctor

It tries each thing with programs, sockets and a cgroup of its own, and touches nothing that runs.
Exit status 0: dist-ctl works here, be it without what the lines with \"lacks\" say. 1: it does not; the
lines with FAILS say why, and what to do.";

/// Options that every command has stand behind its own in the help.
const LAST: usize = 100;

/// A configuration with every option, which `up --help` shows.
const CONFIGURATION: &str = include_str!("../../docs/dist-ctl.toml");

#[derive(Parser)]
#[command(name = "dist-ctl", bin_name = "dist-ctl", version, about = ABOUT, after_help = format!("{EXAMPLE}\n{EXIT_STATUS}"))]
struct Arguments {
    /// The directory of the instance: what runs with another one is another instance
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "DIST_CTL_RUNTIME_DIR",
        default_value = "/run/dist-ctl",
        display_order = LAST
    )]
    runtime_dir: PathBuf,

    /// Say more, for finding out what is wrong
    #[arg(short, long, global = true, display_order = LAST)]
    verbose: bool,

    /// Say only what is wrong
    #[arg(short, long, global = true, display_order = LAST, conflicts_with = "verbose")]
    quiet: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run servers behind their addresses until told to stop
    #[command(
        after_help = UP_EXAMPLE,
        after_long_help = format!("{UP_EXAMPLE}\n\nA file with every option there is:\n\n{CONFIGURATION}"),
    )]
    Up(Up),

    /// Show the servers, their states and their connections
    #[command(after_help = STATUS_EXAMPLE)]
    Status {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },

    /// Change the share of a server, at once and until the next start
    #[command(after_help = WEIGHT_EXAMPLE)]
    Weight {
        /// SERVICE/SERVER, as in `dist-ctl status`
        #[arg(value_parser = server_name)]
        server: String,
        /// Relative to the others of the service, 1 to 1000
        #[arg(value_parser = weight, allow_negative_numbers = true)]
        weight: u32,
    },

    /// Change how many connections a server may hold, or a service, at once and until the next start
    #[command(after_help = LIMIT_EXAMPLE)]
    Limit {
        /// SERVICE/SERVER, as in `dist-ctl status`, or SERVICE
        #[arg(value_parser = server_or_service_name)]
        server: String,
        /// 1 to 1000000, or none
        #[arg(value_parser = limit, allow_negative_numbers = true)]
        limit: Limit,
    },

    /// Give a server no new connections, until it is resumed
    #[command(after_help = DRAIN_EXAMPLE)]
    Drain {
        /// SERVICE/SERVER, as in `dist-ctl status`
        #[arg(value_parser = server_name)]
        server: String,
        /// How long its connections have to end, such as 30s [default: any time]
        #[arg(long, value_name = "TIME", value_parser = duration::parse)]
        timeout: Option<Duration>,
        /// What becomes of those that are left then: leave, they go on; close, they are reset
        #[arg(long, value_name = "WHAT", default_value = "leave")]
        then: Rest,
        /// Return only when it has no connections, or its time is up
        #[arg(long)]
        wait: bool,
    },

    /// Put a server back that was drained, or start one that was given up
    #[command(after_help = RESUME_EXAMPLE)]
    Resume {
        /// SERVICE/SERVER, as in `dist-ctl status`
        #[arg(value_parser = server_name)]
        server: String,
    },

    /// Restart servers one after the other, while the others serve
    #[command(after_help = RESTART_EXAMPLE)]
    Restart {
        /// SERVICE, or SERVICE/SERVER, as in `dist-ctl status` [default: all services]
        #[arg(value_name = "SERVICE|SERVER", value_parser = service_or_server_name)]
        target: Option<String>,
        /// How many instances more may run at a time [default: as configured, or 1]
        #[arg(long, value_name = "N", value_parser = up_to_slots, allow_negative_numbers = true)]
        max_surge: Option<u32>,
        /// How many servers fewer may be ready at a time [default: as configured, or 0]
        #[arg(long, value_name = "N", value_parser = up_to_slots, allow_negative_numbers = true)]
        max_unavailable: Option<u32>,
        /// Return at once, and let it go on
        #[arg(long)]
        no_wait: bool,
    },

    /// Make a server that runs already one of a service's, without restarting it
    #[command(after_help = ADOPT_EXAMPLE)]
    Adopt {
        /// The service, as in `dist-ctl status`
        #[arg(value_parser = service_name)]
        service: String,
        /// The process that listens on the service's address
        #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..=0x7fff_ffff))]
        pid: u32,
        /// What it is to be called [default: pid-PID]
        #[arg(long, value_name = "NAME", value_parser = short_name)]
        name: Option<String>,
        /// What to start it with when it has ended; without it, it is gone then
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<String>,
    },

    /// Let a server that was adopted go its own way
    #[command(after_help = RELEASE_EXAMPLE)]
    Release {
        /// SERVICE/SERVER, as in `dist-ctl status`
        #[arg(value_parser = server_name)]
        server: String,
    },

    /// Read the configuration again, and change what differs while everything runs
    #[command(after_help = RELOAD_EXAMPLE)]
    Reload {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },

    /// Have so many servers in a service, at once and until the next start
    #[command(after_help = SCALE_EXAMPLE)]
    Scale {
        /// The service, as in `dist-ctl status`
        #[arg(value_parser = service_name)]
        service: String,
        /// How many numbered servers; those with names are not counted
        #[arg(value_name = "N", value_parser = up_to_slots, allow_negative_numbers = true)]
        count: u32,
    },

    /// Stop all servers, and dist-ctl itself
    #[command(after_help = DOWN_EXAMPLE)]
    Down,

    /// Replace the running dist-ctl by this program; servers and connections are kept
    #[command(after_help = UPGRADE_EXAMPLE)]
    Upgrade {
        /// The new program [default: the one that this command is]
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },

    /// Say what a configuration means, or what is wrong with it
    #[command(after_help = CHECK_EXAMPLE)]
    Check {
        /// The configuration
        file: PathBuf,
    },

    /// Try what dist-ctl needs of this machine, and say what does not work
    #[command(after_help = DOCTOR_EXAMPLE)]
    Doctor {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },

    #[command(hide = true)]
    Distributor(Up),

    #[command(hide = true)]
    Trial(Up),

    #[command(hide = true)]
    Launch,

    #[command(hide = true)]
    Keep { cgroup: PathBuf },

    #[command(hide = true)]
    Examine { cgroup: Option<PathBuf> },

    #[command(hide = true)]
    Demo {
        #[arg(long)]
        listen: Vec<ListenAddress>,
        #[arg(long)]
        name: Option<String>,
    },
}

#[derive(Args)]
struct Up {
    /// The configuration [default: /etc/dist-ctl/dist-ctl.toml, without the options below]
    #[arg(short, long)]
    file: Option<PathBuf>,

    /// An address that clients connect to, such as :8080 or 127.0.0.1:80; more than once for more
    #[arg(long, value_name = "ADDR")]
    listen: Vec<String>,

    /// How many servers to run, 1 to 256
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    servers: Option<i64>,

    /// How to choose a server [default: least-connections; others: weighted-round-robin,
    /// power-of-two, source-hash, first]
    #[arg(long)]
    policy: Option<String>,

    /// How many connections each server may hold at a time [default: no limit]
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    limit: Option<i64>,

    /// The weight of each server [default: 100]
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    weight: Option<i64>,

    /// How many connections may wait when no server has a place, 0 to 16384; 0 refuses them at
    /// once [default: 1024]
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    waiting: Option<i64>,

    /// How a server gets its listener [default: own, it binds by itself; others: systemd, as
    /// LISTEN_FDS; stdin, as standard input]
    #[arg(long)]
    socket: Option<String>,

    /// The user to run the servers as [default: root]
    #[arg(long)]
    user: Option<String>,

    /// The name of the service [default: app]
    #[arg(long)]
    name: Option<String>,

    /// What stands where nothing may; kept for a better sentence than clap's.
    #[arg(hide = true)]
    stray: Option<String>,

    /// The program and its arguments; {name} and {index} become the server's
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Up {
    /// The options of the command form that were given.
    fn form_options(&self) -> Vec<&'static str> {
        let options = [
            ("--listen", !self.listen.is_empty()),
            ("--servers", self.servers.is_some()),
            ("--policy", self.policy.is_some()),
            ("--limit", self.limit.is_some()),
            ("--weight", self.weight.is_some()),
            ("--waiting", self.waiting.is_some()),
            ("--socket", self.socket.is_some()),
            ("--user", self.user.is_some()),
            ("--name", self.name.is_some()),
            ("COMMAND", !self.command.is_empty()),
        ];
        options.into_iter().filter(|(_, given)| *given).map(|(option, _)| option).collect()
    }
}

/// `None` is "none". A type of its own, because clap takes a plain Option for an argument that
/// may be left out.
#[derive(Clone)]
struct Limit(Option<u32>);

fn server_name(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((service, server)) if is_name(service) && is_name(server) => Ok(text.to_owned()),
        _ => Err("write SERVICE/SERVER, for example shop/1".to_owned()),
    }
}

fn service_or_server_name(text: &str) -> Result<String, String> {
    let is_named = match text.split_once('/') {
        Some((service, server)) => is_name(service) && is_name(server),
        None => is_name(text),
    };
    match is_named {
        true => Ok(text.to_owned()),
        false => Err("write SERVICE or SERVICE/SERVER, for example shop or shop/1".to_owned()),
    }
}

fn server_or_service_name(text: &str) -> Result<String, String> {
    let refused = || "write SERVICE/SERVER or SERVICE, for example shop/1 or shop".to_owned();
    service_name(text).or_else(|_| server_name(text)).map_err(|_| refused())
}

fn service_name(text: &str) -> Result<String, String> {
    match is_name(text) {
        true => Ok(text.to_owned()),
        false => Err("write the name of a service, for example shop".to_owned()),
    }
}

/// Not a number: those are the servers' that the configuration counts.
fn short_name(text: &str) -> Result<String, String> {
    match is_name(text) && !text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => Ok(text.to_owned()),
        false => Err("write a name of a-z, 0-9, _ and -, not of digits only, for example old".to_owned()),
    }
}

fn weight(text: &str) -> Result<u32, String> {
    let weight = text.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight));
    weight.ok_or_else(|| format!("write a number from 1 to {WEIGHT_MAX}"))
}

fn limit(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    let limit = text.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
    match limit {
        Some(limit) => Ok(Limit(Some(limit))),
        None => Err(format!("write a number from 1 to {LIMIT_MAX}, or none")),
    }
}

/// A number of servers.
fn up_to_slots(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| *number <= SLOTS as u32);
    number.ok_or_else(|| format!("write a number from 0 to {SLOTS}"))
}

/// Its range is the configuration's to check.
fn number(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| "write a number".to_owned())
}

/// Takes the commands that are not for people out of clap's suggestions.
fn without_internals(mut error: Error) -> Error {
    if let Some(ContextValue::Strings(mut names)) = error.remove(ContextKind::SuggestedSubcommand) {
        let root = Arguments::command();
        names.retain(|name| root.find_subcommand(name).is_some_and(|verb| !verb.is_hide_set()));
        if !names.is_empty() {
            error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(names));
        }
    }
    error
}

/// A refusal in the form of clap's own, with the usage of the command.
fn refusal(verb: Option<&str>, kind: ErrorKind, sentence: &str) -> Error {
    let mut command = Arguments::command();
    // Without it, a subcommand's usage lacks the program's name.
    command.build();
    match verb.and_then(|verb| command.find_subcommand_mut(verb)) {
        Some(verb) => verb.error(kind, sentence),
        None => command.error(kind, sentence),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Invocation, Error> {
        Invocation::parse(line.split_whitespace().map(OsString::from))
    }

    fn command(line: &str) -> Command {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}")).command
    }

    #[test]
    fn clap_finds_no_contradiction_in_the_definitions() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn right_command_lines_are_understood() {
        let server = || "shop/1".to_owned();
        for (line, meant) in [
            ("dist-ctl up", Command::Up(Source::File(PathBuf::from(DEFAULT_FILE)))),
            ("dist-ctl up -f x.toml", Command::Up(Source::File(PathBuf::from("x.toml")))),
            ("dist-ctl distributor --file=x", Command::Distributor(Source::File(PathBuf::from("x")))),
            ("dist-ctl status", Command::Status(Form::Table)),
            ("dist-ctl status --json", Command::Status(Form::Json)),
            ("dist-ctl down", Command::Down),
            ("dist-ctl upgrade", Command::Upgrade(None)),
            ("dist-ctl upgrade --binary /x", Command::Upgrade(Some(PathBuf::from("/x")))),
            ("dist-ctl trial --file=x", Command::Trial(Source::File(PathBuf::from("x")))),
            ("dist-ctl check x.toml", Command::Check(PathBuf::from("x.toml"))),
            ("dist-ctl doctor", Command::Doctor(Form::Table)),
            ("dist-ctl doctor --json", Command::Doctor(Form::Json)),
            ("dist-ctl examine", Command::Examine(None)),
            ("dist-ctl examine /a", Command::Examine(Some(PathBuf::from("/a")))),
            (
                "dist-ctl weight shop/1 7",
                Command::Change(control::Command::Weight { server: server(), weight: 7 }),
            ),
            (
                "dist-ctl limit shop/1 25",
                Command::Change(control::Command::Limit { server: server(), limit: Some(25) }),
            ),
            (
                "dist-ctl limit shop/1 none",
                Command::Change(control::Command::Limit { server: server(), limit: None }),
            ),
            (
                "dist-ctl limit shop 1000",
                Command::Change(control::Command::Limit { server: "shop".to_owned(), limit: Some(1000) }),
            ),
            (
                "dist-ctl drain shop/1",
                Command::Change(control::Command::Drain {
                    server: server(),
                    timeout_seconds: None,
                    then: Rest::Leave,
                }),
            ),
            (
                "dist-ctl drain shop/1 --timeout 1m30s --then close --wait",
                Command::DrainAndWait(
                    control::Command::Drain {
                        server: server(),
                        timeout_seconds: Some(90.0),
                        then: Rest::Close,
                    },
                    server(),
                ),
            ),
            ("dist-ctl resume shop/1", Command::Change(control::Command::Resume { server: server() })),
            (
                "dist-ctl restart",
                Command::RestartAndWait(
                    control::Command::Restart { target: None, max_surge: None, max_unavailable: None },
                    None,
                ),
            ),
            (
                "dist-ctl restart shop/1 --max-surge 0 --max-unavailable 2 --no-wait",
                Command::Change(control::Command::Restart {
                    target: Some(server()),
                    max_surge: Some(0),
                    max_unavailable: Some(2),
                }),
            ),
            (
                "dist-ctl adopt shop --pid 7",
                Command::Change(control::Command::Adopt {
                    service: "shop".to_owned(),
                    pid: 7,
                    name: "pid-7".to_owned(),
                    command: vec![],
                }),
            ),
            (
                "dist-ctl adopt shop --pid 7 --name old -- java -jar x",
                Command::Change(control::Command::Adopt {
                    service: "shop".to_owned(),
                    pid: 7,
                    name: "old".to_owned(),
                    command: ["java", "-jar", "x"].map(str::to_owned).to_vec(),
                }),
            ),
            ("dist-ctl release shop/1", Command::Change(control::Command::Release { server: server() })),
            ("dist-ctl launch", Command::Launch),
            ("dist-ctl keep /sys/fs/cgroup/a", Command::Keep(PathBuf::from("/sys/fs/cgroup/a"))),
            (
                "dist-ctl demo --listen :80 --name a",
                Command::Demo { listen: vec![":80".parse().unwrap()], name: Some("a".to_owned()) },
            ),
            ("dist-ctl demo", Command::Demo { listen: vec![], name: None }),
        ] {
            assert_eq!(command(line), meant, "{line}");
        }
    }

    #[test]
    fn the_command_form_is_understood() {
        let line = "dist-ctl up --listen :80 --listen [::1]:81 --servers 3 --policy first --limit 9 \
            --weight 8 --waiting 7 --socket stdin --user me --name shop -- ./server --port 80 -- -x";
        let strings = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        let form = CommandForm {
            name: "shop".to_owned(),
            listen: strings(&[":80", "[::1]:81"]),
            servers: 3,
            policy: Some("first".to_owned()),
            limit: Some(9),
            weight: Some(8),
            waiting: Some(7),
            socket: Some("stdin".to_owned()),
            user: Some("me".to_owned()),
            command: strings(&["./server", "--port", "80", "--", "-x"]),
        };
        assert_eq!(command(line), Command::Up(Source::Command(form)));
    }

    #[test]
    fn the_service_of_the_command_form_is_called_app() {
        let Command::Up(Source::Command(form)) = command("dist-ctl up --listen :80 --servers 1 -- x") else {
            panic!("not the command form");
        };
        assert_eq!((form.name.as_str(), form.limit, form.waiting, form.user), ("app", None, None, None));
    }

    #[test]
    fn a_negative_number_is_read_for_the_configuration_to_refuse() {
        for option in ["limit", "weight", "waiting"] {
            let line = format!("dist-ctl up --listen :80 --servers 1 --{option} -1 -- x");
            let Command::Up(source) = command(&line) else {
                panic!("{line}: not up");
            };
            let sentence = source.read().unwrap_err().to_string();
            assert!(sentence.starts_with(&format!("--{option}: -1 is out of range, write ")), "{sentence}");
        }
    }

    #[test]
    fn global_options_may_stand_anywhere() {
        for line in ["dist-ctl --runtime-dir /run/x/ -v down", "dist-ctl down -v --runtime-dir /run//x"] {
            let invocation = parse(line).unwrap();
            assert_eq!(invocation.runtime_dir.as_os_str(), "/run/x", "{line}");
            assert_eq!(invocation.verbosity, Verbosity::Verbose, "{line}");
        }
    }

    #[test]
    fn a_relative_runtime_directory_is_made_absolute() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(parse("dist-ctl down --runtime-dir x").unwrap().runtime_dir, here.join("x"));
    }

    #[test]
    fn wrong_command_lines_exit_with_2_and_a_sentence() {
        for (line, sentence) in WRONG_LINES {
            let error = match parse(line) {
                Ok(invocation) => panic!("{line} was accepted as {invocation:?}"),
                Err(error) => error,
            };
            let text = error.to_string();
            let (said, _) = text.split_once("\n\nFor more information").unwrap();
            let said = said.split("\n\nUsage:").next().unwrap();
            let said: Vec<&str> = said.split_whitespace().collect();
            assert_eq!(said.join(" "), format!("error: {sentence}"), "{line}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn help_and_version_exit_with_0() {
        for line in ["dist-ctl --help", "dist-ctl up -h", "dist-ctl --version"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 0, "{line}");
        }
        let version = parse("dist-ctl --version").unwrap_err().to_string();
        assert_eq!(version, concat!("dist-ctl ", env!("CARGO_PKG_VERSION"), "\n"));
    }

    #[test]
    fn help_begins_with_what_it_is_for() {
        let help = parse("dist-ctl --help").unwrap_err().to_string();
        assert!(help.starts_with("Puts several copies of a server behind one address."), "{help}");
        assert!(help.contains(EXIT_STATUS), "{help}");
    }

    #[test]
    fn every_command_has_an_example_that_works() {
        let mut root = Arguments::command();
        root.build();
        let visible = root.get_subcommands().filter(|verb| !verb.is_hide_set());
        let mut seen = Vec::new();
        for verb in visible.filter(|verb| verb.get_name() != "help") {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  ")).collect();
            assert!(!examples.is_empty(), "{} has no example", verb.get_name());
            for line in examples {
                assert_eq!(line.split(' ').nth(1), Some(verb.get_name()), "{line}");
                assert_meant_for_people(line);
            }
            seen.push(verb.get_name());
        }
        assert_eq!(
            seen,
            [
                "up", "status", "weight", "limit", "drain", "resume", "restart", "adopt", "release",
                "reload", "scale", "down", "upgrade", "check", "doctor"
            ]
        );
        EXAMPLE.lines().filter_map(|line| line.strip_prefix("  ")).for_each(assert_meant_for_people);
    }

    /// It parses, and its configuration, if it has one of its own, is right.
    fn assert_meant_for_people(line: &str) {
        if let Command::Up(source @ Source::Command(_)) = command(line) {
            source.read().unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn the_help_of_up_shows_the_whole_example_configuration() {
        let help = parse("dist-ctl up --help").unwrap_err().to_string();
        assert!(help.contains(CONFIGURATION.trim_end()), "{help}");
        // clap would break longer lines, and what is shown would be no TOML.
        let longest = CONFIGURATION.lines().map(str::len).max();
        assert!(longest <= Some(80), "{longest:?}");
    }

    prop_compose! {
        fn forms()(
            name in ".*",
            listen in prop::collection::vec(".*", 1..3),
            servers in any::<i64>(),
            policy in prop::option::of(".*"),
            limit in prop::option::of(any::<i64>()),
            weight in prop::option::of(any::<i64>()),
            waiting in prop::option::of(any::<i64>()),
            socket in prop::option::of(".*"),
            user in prop::option::of(".*"),
            command in prop::collection::vec(".*", 1..4),
        ) -> CommandForm {
            CommandForm { name, listen, servers, policy, limit, weight, waiting, socket, user, command }
        }
    }

    proptest! {
        #[test]
        fn the_distributor_understands_what_the_monitor_was_told(
            form in forms(),
            file in prop::option::of(".+"),
            verbosity in prop::sample::select(&[Verbosity::Quiet, Verbosity::Normal, Verbosity::Verbose]),
        ) {
            let source = match file {
                Some(file) => Source::File(PathBuf::from(file)),
                None => Source::Command(form),
            };
            let up = Invocation {
                runtime_dir: PathBuf::from("/run/x"),
                verbosity,
                command: Command::Up(source.clone()),
            };
            let program = ["dist-ctl", "distributor"].map(OsString::from);
            let arguments = program.into_iter().chain(up.distributor_arguments(&source));
            let understood = Invocation::parse(arguments).unwrap();
            prop_assert_eq!(understood, Invocation { command: Command::Distributor(source), ..up });
        }
    }

    /// What is typed, and what is said before the usage.
    const WRONG_LINES: &[(&str, &str)] = &[
        (
            "dist-ctl start",
            "unrecognized subcommand 'start' tip: some similar subcommands exist: 'status', 'restart'",
        ),
        ("dist-ctl statsu", "unrecognized subcommand 'statsu' tip: a similar subcommand exists: 'status'"),
        (
            "dist-ctl up --port 80",
            "unexpected argument '--port' found tip: to pass '--port' as a value, use '-- --port'",
        ),
        (
            "dist-ctl up x.toml",
            r#""x.toml" stands alone, write -f x.toml if it is a configuration, or -- x.toml if it is a command"#,
        ),
        ("dist-ctl up -f", "a value is required for '--file <FILE>' but none was supplied"),
        (
            "dist-ctl up -f x.toml --listen :80",
            "--file x.toml and --listen exclude each other, write what --listen says into the file, or leave out --file",
        ),
        (
            "dist-ctl up -f x.toml -- ./server",
            "--file x.toml and COMMAND exclude each other, write what COMMAND says into the file, or leave out --file",
        ),
        (
            "dist-ctl up -f x.toml --waiting -1",
            "--file x.toml and --waiting exclude each other, write what --waiting says into the file, or leave out --file",
        ),
        ("dist-ctl up -f x.toml -f y.toml", "the argument '--file <FILE>' cannot be used multiple times"),
        (
            "dist-ctl up --servers 4 -- ./server",
            "--listen is missing, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080",
        ),
        (
            "dist-ctl up --listen :80 -- ./server",
            "--servers is missing, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080",
        ),
        (
            "dist-ctl up --listen :80 --servers 4",
            "the command is missing, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080",
        ),
        (
            "dist-ctl up --listen :80 --servers 4 --",
            "the command is missing, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080",
        ),
        (
            "dist-ctl up --limit 4",
            "--listen is missing, write for example: dist-ctl up --listen :8080 --servers 4 -- ./server --port 8080",
        ),
        (
            "dist-ctl up --listen :80 --servers four -- ./server",
            "invalid value 'four' for '--servers <N>': write a number",
        ),
        (
            "dist-ctl up --listen :80 --servers 4 --waiting forever -- ./server",
            "invalid value 'forever' for '--waiting <N>': write a number",
        ),
        (
            "dist-ctl up --listen :80 --servers 4 ./server",
            r#""./server" stands alone, write -f ./server if it is a configuration, or -- ./server if it is a command"#,
        ),
        ("dist-ctl -v -q down", "the argument '--verbose' cannot be used with '--quiet'"),
        ("dist-ctl down shop", "unexpected argument 'shop' found"),
        ("dist-ctl status --yaml", "unexpected argument '--yaml' found"),
        ("dist-ctl check", "the following required arguments were not provided: <FILE>"),
        ("dist-ctl weight shop/1", "the following required arguments were not provided: <WEIGHT>"),
        ("dist-ctl weight shop/1 0", "invalid value '0' for '<WEIGHT>': write a number from 1 to 1000"),
        ("dist-ctl weight shop/1 -5", "invalid value '-5' for '<WEIGHT>': write a number from 1 to 1000"),
        (
            "dist-ctl weight shop 5",
            "invalid value 'shop' for '<SERVER>': write SERVICE/SERVER, for example shop/1",
        ),
        (
            "dist-ctl weight 5 shop/1",
            "invalid value '5' for '<SERVER>': write SERVICE/SERVER, for example shop/1",
        ),
        (
            "dist-ctl limit shop/1 lots",
            "invalid value 'lots' for '<LIMIT>': write a number from 1 to 1000000, or none",
        ),
        (
            "dist-ctl limit shop/1 0",
            "invalid value '0' for '<LIMIT>': write a number from 1 to 1000000, or none",
        ),
        (
            "dist-ctl limit shop/1/2 9",
            "invalid value 'shop/1/2' for '<SERVER>': write SERVICE/SERVER or SERVICE, for example shop/1 or shop",
        ),
        (
            "dist-ctl limit shop/1 -1",
            "invalid value '-1' for '<LIMIT>': write a number from 1 to 1000000, or none",
        ),
        (
            "dist-ctl resume Shop/1",
            "invalid value 'Shop/1' for '<SERVER>': write SERVICE/SERVER, for example shop/1",
        ),
        (
            "dist-ctl drain shop/1 --timeout 30",
            r#"invalid value '30' for '--timeout <TIME>': "30" has no unit, write "30s""#,
        ),
        (
            "dist-ctl drain shop/1 --timeout 3s --then kill",
            "invalid value 'kill' for '--then <WHAT>': write leave or close",
        ),
        (
            "dist-ctl drain shop/1 --then close",
            "--then close needs a --timeout, write for example --timeout 30s, or 0s",
        ),
        ("dist-ctl resume", "the following required arguments were not provided: <SERVER>"),
        ("dist-ctl launch now", "unexpected argument 'now' found"),
        (
            "dist-ctl demo --listen localhost:80",
            r#"invalid value 'localhost:80' for '--listen <LISTEN>': "localhost:80" is no numeric address with a port, write for example "127.0.0.1:8080", "[::1]:8080" or ":8080""#,
        ),
    ];
}
