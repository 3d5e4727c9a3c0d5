//! The launcher: from a job to the program it describes.
//!
//! One way through, in an order that matters: the cgroup first, so that whatever follows is
//! counted and killed with the server; rights last, because what comes before needs them.
//! Whatever fails is answered with its step. Nothing of ours may be left in what is executed:
//! no descriptor, no capability, no signal that is ignored or blocked.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    mem::ManuallyDrop,
    net::SocketAddr,
    os::{
        fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt as _, net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
    ptr,
};

use nix::sys::signal::SigSet;
use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    io::{Errno, FdFlags},
    net::{AddressFamily, SocketFlags, SocketType, sockopt},
    process::{Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets},
};

use crate::{
    address::ListenAddress,
    affinity, config,
    launch::{Exec, Identity, LaunchError, Limit, MAX_JOB, Output, Socket, failed, reason},
    logging,
    monitor::OPEN_FILES,
};

/// What a server that runs as root may still do: be root on its own files, become somebody
/// else, and bind any port. It may not load BPF programs, change the network or trace us.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT);

/// systemd's first: https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html
const FIRST_LISTENER: RawFd = 3;

/// What shells say when a command could not be executed.
const NOT_EXECUTED: u8 = 127;

type Result<T> = std::result::Result<T, LaunchError>;

/// Does the job that is sent over standard input. Returns when it is not to become a server,
/// or could not.
pub fn run() -> ExitCode {
    if sockopt::socket_type(rustix::stdio::stdin()) == Err(Errno::NOTSOCK) {
        logging::say(format_args!("dist-ctl launch: this command is started by dist-ctl up, not by hand"));
        return ExitCode::FAILURE;
    }
    ExitCode::from(launch())
}

pub(crate) fn launch() -> u8 {
    let mut channel = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(channel) => UnixStream::from(channel),
        Err(error) => {
            let error = failed("read a job from standard input", reason(error));
            let answer = serde_json::to_vec(&error).unwrap_or_default();
            // To the distributor, if it is one that listens there; else to whoever typed this.
            if rustix::io::write(rustix::stdio::stdin(), &answer).is_err() {
                logging::say(format_args!("dist-ctl launch: {error}"));
            }
            return NOT_EXECUTED;
        }
    };
    let done = match read_job(&mut channel) {
        Ok(job) => execute(&job, &mut channel),
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            // If nobody listens any more, nobody minds.
            let _ = channel.write_all(&serde_json::to_vec(&error).unwrap_or_default());
            NOT_EXECUTED
        }
    }
}

fn read_job(channel: &mut UnixStream) -> Result<Exec> {
    let read = |error| failed("read the job", reason(error));
    let mut length = [0; 4];
    channel.read_exact(&mut length).map_err(read)?;
    let length = u32::from_le_bytes(length);
    if length > MAX_JOB {
        return Err(failed("read the job", format!("it has {length} bytes, over {MAX_JOB}")));
    }
    let mut text = vec![0; length as usize];
    channel.read_exact(&mut text).map_err(read)?;
    serde_json::from_slice(&text).map_err(|error| failed("read the job", error.to_string()))
}

/// Ends in the server, or in an error.
fn execute(job: &Exec, channel: &mut UnixStream) -> Result<()> {
    enter(&job.cgroup)?;
    // Only fails for the leader of a process group, and the monitor makes none for us.
    rustix::process::setsid().map_err(|error| failed("start a session", reason(error)))?;

    let uid = job.user.as_ref().map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid);
    let open = |address: &ListenAddress| open_listener(address, uid, job.backlog);
    let (stdin, listeners) = match &job.socket {
        Socket::Own => (null()?, vec![]),
        Socket::Systemd(addresses) => (null()?, addresses.iter().map(open).collect::<Result<Vec<_>>>()?),
        Socket::Stdin(address) => (open(address)?, vec![]),
    };
    let mut command = command(job, listeners.len())?;
    let first_free = FIRST_LISTENER + listeners.len() as RawFd;
    command.stdin(aside(stdin, first_free)?);
    command.stdout(output(&job.stdout, "standard output", first_free)?);
    command.stderr(output(&job.stderr, "standard error", first_free)?);
    *channel = UnixStream::from(aside(duplicate(channel)?, first_free)?);
    number(listeners, first_free)?;
    close_on_exec(first_free)?;

    // From here on nothing is opened: the limits may leave no room.
    restore_signals()?;
    set_limits(&job.limits)?;
    set_cpus(&job.cpus)?;
    if let Some(umask) = job.umask {
        rustix::process::umask(Mode::from_raw_mode(umask));
    }
    if let Some(directory) = &job.directory {
        let step = || format!("change to directory {}", directory.display());
        rustix::process::chdir(directory).map_err(|error| failed(step(), reason(error)))?;
    }
    drop_capabilities()?;
    if let Some(user) = &job.user {
        become_user(user)?;
    }
    channel.write_all(b".").map_err(|error| failed("say that it starts", reason(error)))?;
    Err(not_executed(job, &command.exec()))
}

fn command(job: &Exec, listeners: usize) -> Result<Command> {
    let [program, arguments @ ..] = &job.command[..] else {
        return Err(failed("run its command", "there is none"));
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    command.envs(job.environment.iter().map(|(name, value)| (name, value)));
    if let Socket::Systemd(addresses) = &job.socket {
        // A name may not hold a colon, so it is the port.
        let names: Vec<_> = addresses.iter().map(|address| address.socket.port().to_string()).collect();
        command.env("LISTEN_FDS", listeners.to_string());
        command.env("LISTEN_PID", std::process::id().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
    }
    if let Some(interval) = job.watchdog {
        command.env("WATCHDOG_USEC", interval.as_micros().to_string());
        command.env("WATCHDOG_PID", std::process::id().to_string());
    }
    Ok(command)
}

fn not_executed(job: &Exec, error: &io::Error) -> LaunchError {
    let program = &job.command[0];
    let path = job.environment.iter().find(|(name, _)| name == "PATH");
    let why = match (error.kind(), path) {
        (io::ErrorKind::NotFound, _) if program.contains('/') && Path::new(program).exists() => {
            "the file is there, but not the interpreter it names".to_owned()
        }
        (io::ErrorKind::NotFound, Some((_, path))) if !program.contains('/') => {
            format!("No such file or directory (searched PATH={path})")
        }
        (io::ErrorKind::NotFound, None) if !program.contains('/') => {
            "No such file or directory (its environment has no PATH: searched /bin and /usr/bin)".to_owned()
        }
        _ => reason(error),
    };
    failed(format!("run {program}"), why)
}

/// The whole process, which has one thread: "0" is whoever writes it.
pub(crate) fn enter(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
        .map_err(|error| failed(format!("enter cgroup {}", cgroup.display()), reason(error)))
}

fn null() -> Result<OwnedFd> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    null.map_err(|error| failed("open /dev/null", reason(error)))
}

fn output(output: &Output, what: &str, first_free: RawFd) -> Result<Stdio> {
    match output {
        Output::Inherit => Ok(Stdio::inherit()),
        Output::File(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o640)
                // A new session takes the first terminal that it opens for its own.
                .custom_flags(OFlags::NOCTTY.bits().cast_signed())
                .open(path)
                .map_err(|error| failed(format!("open {} for {what}", path.display()), reason(error)))?;
            Ok(aside(File::into(file), first_free)?.into())
        }
    }
}

/// A socket that can join the service's group, once it listens.
pub(crate) fn bound_socket(address: &ListenAddress, uid: u32) -> Result<OwnedFd> {
    let family = match address.socket {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let prepare = || {
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        if address.socket.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, address.v6only)?;
        }
        // Before bind: the group takes only sockets of one uid.
        rustix::fs::fchown(&socket, Some(Uid::from_raw(uid)), None)?;
        Ok(socket)
    };
    let socket =
        prepare().map_err(|error: Errno| failed(format!("open a socket for {address}"), reason(error)))?;
    rustix::net::bind(&socket, &address.socket).map_err(|error| {
        let advice = match error {
            Errno::ADDRINUSE => " (another program has it, without SO_REUSEPORT or as another user)",
            Errno::ADDRNOTAVAIL => " (no interface of this machine has it)",
            Errno::ACCESS => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
            _ => "",
        };
        failed(format!("bind {address}"), format!("{}{advice}", reason(error)))
    })?;
    Ok(socket)
}

/// A listener that joins the service's group.
fn open_listener(address: &ListenAddress, uid: u32, backlog: u32) -> Result<OwnedFd> {
    let socket = bound_socket(address, uid)?;
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    rustix::net::listen(&socket, backlog)
        .map_err(|error| failed(format!("listen on {address}"), reason(error)))?;
    Ok(socket)
}

fn duplicate(channel: &UnixStream) -> Result<OwnedFd> {
    let copy = rustix::io::fcntl_dupfd_cloexec(channel, 3);
    copy.map_err(|error| failed("duplicate a descriptor", reason(error)))
}

/// Out of the way of the listeners' numbers.
fn aside(descriptor: OwnedFd, first_free: RawFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(descriptor, first_free)
        .map_err(|error| failed("move a descriptor", reason(error)))
}

/// Gives the listeners the numbers from [`FIRST_LISTENER`] to before `first_free`, open across
/// exec.
fn number(listeners: Vec<OwnedFd>, first_free: RawFd) -> Result<()> {
    let aside = listeners.into_iter().map(|listener| aside(listener, first_free));
    let listeners = aside.collect::<Result<Vec<_>>>()?;
    for (number, listener) in (FIRST_LISTENER..).zip(&listeners) {
        // SAFETY: Whatever has this number is nobody's here: all that this file opened is
        // beyond `first_free`, and what else this process inherited it does not use. Never
        // dropped, so that the number stays open for the server.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        rustix::io::dup2(listener, &mut place)
            .map_err(|error| failed(format!("make it descriptor {number}"), reason(error)))?;
    }
    Ok(())
}

/// Ours are already. This is for what whoever started `dist-ctl up` left open.
fn close_on_exec(first: RawFd) -> Result<()> {
    let close = |error| failed("close what is open", reason(error));
    for entry in fs::read_dir("/proc/self/fd").map_err(close)? {
        let name = entry.map_err(close)?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if number >= first {
            // SAFETY: The kernel has just listed it, and this process has one thread.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC).map_err(|error| close(error.into()))?;
        }
    }
    Ok(())
}

/// Unblocks every signal, and makes each the default again: nohup ignores SIGHUP, shells SIGINT
/// in the background, and we SIGPIPE.
fn restore_signals() -> Result<()> {
    SigSet::empty().thread_set_mask().map_err(|error| failed("restore signals", error.desc()))?;
    /// The kernel's struct sigaction, of which all zeros mean the default.
    static DEFAULT: [u64; 4] = [0; 4];
    /// The bytes of its mask of signals.
    const MASK: usize = 8;
    for signal in (1..=64).filter(|&signal| signal != libc::SIGKILL && signal != libc::SIGSTOP) {
        // Not by the C library: it has two signals of its own, 32 and 33, ignores them in what it
        // spawns, and lets nobody change that.
        // SAFETY: The kernel reads DEFAULT, and no handler is left that anything counts on.
        let done = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const DEFAULT, ptr::null::<u64>(), MASK)
        };
        if done != 0 {
            return Err(failed(format!("restore signal {signal}"), reason(io::Error::last_os_error())));
        }
    }
    Ok(())
}

fn set_limits(limits: &[Limit]) -> Result<()> {
    // The monitor raised it for itself.
    let given = std::env::var(OPEN_FILES).ok().and_then(|files| files.parse().ok());
    if let Some(current) = given {
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        set_limit(Limit { resource: Resource::Nofile, soft: Some(current), hard: maximum })?;
    }
    limits.iter().try_for_each(|limit| set_limit(*limit))
}

fn set_limit(limit: Limit) -> Result<()> {
    let Limit { resource, soft, hard } = limit;
    rustix::process::setrlimit(resource, Rlimit { current: soft, maximum: hard }).map_err(|error| {
        let shown = |value: Option<u64>| value.map_or("unlimited".to_owned(), |value| value.to_string());
        let name = format!("{resource:?}").to_lowercase();
        failed(format!("limit {name} to {}:{}", shown(soft), shown(hard)), reason(error))
    })
}

fn set_cpus(cpus: &[usize]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let step = || format!("run on CPUs {}", config::list_of_cpus(cpus));
    let mask =
        affinity::mask(cpus).map_err(|cpu| failed(step(), format!("{cpu} is over the kernel's limit")))?;
    match rustix::thread::sched_setaffinity(None, &mask) {
        // None of them is online: better on others than not at all. The distributor says so, and
        // sets it when one is back.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(failed(step(), reason(error))),
    }
}

/// The bounding set first: it takes CAP_SETPCAP, which goes after it.
pub(crate) fn drop_capabilities() -> Result<()> {
    let step = "drop capabilities";
    let dropped = |error| failed(step, reason(error));
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(one) {
            Ok(true) if !KEPT.contains(one) => rustix::thread::remove_capability_from_bounding_set(one)
                .map_err(|error| failed(step, format!("{} (needs CAP_SETPCAP)", reason(error))))?,
            Ok(_) => {}
            // The kernel knows no more.
            Err(_) => break,
        }
    }
    let now = rustix::thread::capabilities(None).map_err(dropped)?;
    let limited = CapabilitySets {
        effective: now.effective & KEPT,
        permitted: now.permitted & KEPT,
        // Takes the ambient ones with it: the kernel lets none be that are not inheritable.
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, limited).map_err(dropped)
}

/// Groups and gid first: they take rights that the uid does not have.
pub(crate) fn become_user(user: &Identity) -> Result<()> {
    let groups: Vec<_> = user.groups.iter().map(|&group| Gid::from_raw(group)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_groups(&groups)
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .map_err(|error| failed(format!("become user {}", user.name), reason(error)))
}
