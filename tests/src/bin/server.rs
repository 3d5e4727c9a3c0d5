//! A server whose every step a test can choose.
//!
//! It greets each connection with `NAME PID CLIENT`, and obeys these words of a client:
//! `who` (greet again), `close`, `reset`, `half` (close its own direction only), `unread`
//! (close with the rest of the line unread), `exit CODE` (the whole process), `notify WORDS` (tell
//! NOTIFY_SOCKET), `grow MEBIBYTES` (hold so much more memory), `echo BYTES` (send back so many that
//! follow the line, and do nothing else until then).
//! With `--http FILE` it says nothing by itself, and answers `GET` with the status that stands in that
//! file, or not at all if the file is empty; the body is its greeting.
//! It also misbehaves on request: it may never listen, listen late, close its listener and
//! live on, use another protocol or address, ignore SIGTERM, or exit at once.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::epoll,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use signal_hook::consts::{SIGTERM, SIGUSR1, SIGUSR2};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tests::inside::Inside;

fn main() -> ExitCode {
    match Options::read(env::args().skip(1)).and_then(run) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("test-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a test asked for.
#[derive(Debug, Default)]
struct Options {
    name: String,
    listen: Vec<SocketAddr>,
    /// Listeners for each address.
    listeners: usize,
    v6_only: bool,
    /// Multipath TCP instead of TCP.
    multipath: bool,
    /// Uses what LISTEN_FDS announces.
    inherited: bool,
    /// Uses standard input.
    stdin: bool,
    backlog: i32,
    /// Seconds for which a connection that says nothing is not accepted (TCP_DEFER_ACCEPT).
    defer_accept: Option<i32>,
    listen_after: Duration,
    /// So long it does nothing else for each connection that it accepts, as a server with one thread.
    pause: Duration,
    /// Listens once there is such a file.
    listen_when: Option<PathBuf>,
    /// Tells NOTIFY_SOCKET so long after it listens.
    ready_after: Option<Duration>,
    /// Tells NOTIFY_SOCKET nothing until SIGUSR2.
    ready_on_signal: bool,
    /// Tells NOTIFY_SOCKET that it is well, four times as often as WATCHDOG_USEC asks for.
    well: bool,
    never_listen: bool,
    ignore_term: bool,
    /// Closes its listeners on SIGUSR1, and lives on.
    closable: bool,
    daemonise: bool,
    /// Starts a child that only sleeps, and is left behind when the server is killed.
    child: bool,
    exit: Option<u8>,
    print: Option<String>,
    inside: Option<PathBuf>,
    /// Speaks HTTP: how it answers stands in there.
    http: Option<PathBuf>,
}

impl Options {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self { name: "-".to_owned(), listeners: 1, backlog: 4096, ..Self::default() };
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word}: a value is missing"));
            let milliseconds = |text: String| text.parse().map(Duration::from_millis);
            match word.as_str() {
                "--name" => options.name = value()?,
                "--listen" => options.listen.push(value()?.parse()?),
                "--listeners" => options.listeners = value()?.parse()?,
                "--v6-only" => options.v6_only = true,
                "--multipath" => options.multipath = true,
                "--inherited" => options.inherited = true,
                "--stdin" => options.stdin = true,
                "--defer-accept" => options.defer_accept = Some(value()?.parse()?),
                "--backlog" => options.backlog = value()?.parse()?,
                "--pause" => options.pause = milliseconds(value()?)?,
                "--listen-after" => options.listen_after = milliseconds(value()?)?,
                "--listen-when" => options.listen_when = Some(value()?.into()),
                "--ready-after" => options.ready_after = Some(milliseconds(value()?)?),
                "--ready-on-signal" => options.ready_on_signal = true,
                "--well" => options.well = true,
                "--never-listen" => options.never_listen = true,
                "--ignore-term" => options.ignore_term = true,
                "--closable" => options.closable = true,
                "--daemonise" => options.daemonise = true,
                "--child" => options.child = true,
                "--exit" => options.exit = Some(value()?.parse()?),
                "--print" => options.print = Some(value()?),
                "--http" => options.http = Some(value()?.into()),
                "--inside" => options.inside = Some(value()?.into()),
                _ => bail!("{word}: no such option"),
            }
        }
        Ok(options)
    }
}

fn run(options: Options) -> Result<ExitCode> {
    if let Some(line) = &options.print {
        println!("out {line}");
        eprintln!("err {line}");
    }
    if let Some(code) = options.exit {
        return Ok(code.into());
    }
    if options.daemonise {
        return daemonise();
    }
    if options.child {
        Command::new("/proc/self/exe")
            .args(["--name", "child", "--never-listen", "--ignore-term"])
            .spawn()
            .context("start a child")?;
    }
    raise_descriptor_limit()?;
    let signals = Signals::new(&options)?;
    thread::sleep(options.listen_after);
    while options.listen_when.as_ref().is_some_and(|file| !file.exists()) {
        thread::sleep(Duration::from_millis(5));
    }
    if options.never_listen {
        loop {
            thread::park();
        }
    }
    let listeners = listeners(&options)?;
    notify_when_ready(&options);
    if options.well {
        keep_saying_that_it_is_well()?;
    }
    Server::new(&options, listeners)?.serve(signals)
}

/// Starts itself again as a child of nobody, and exits, as a classic daemon does.
fn daemonise() -> Result<ExitCode> {
    let words = env::args().skip(1).filter(|word| word != "--daemonise");
    Command::new("/proc/self/exe").args(words).stdin(Stdio::null()).spawn().context("start the daemon")?;
    Ok(ExitCode::SUCCESS)
}

/// As many descriptors as the hard limit allows: tests hold thousands of connections.
fn raise_descriptor_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .context("raise the limit of open files")
}

fn listeners(options: &Options) -> Result<Vec<Socket>> {
    let mut listeners = Vec::new();
    if options.inherited {
        listeners.extend(announced()?);
    }
    if options.stdin {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        listeners.push(Socket::from(stdin));
    }
    for address in &options.listen {
        for _ in 0..options.listeners {
            let listener = listen(options, *address).with_context(|| format!("listen on {address}"))?;
            listeners.push(listener);
        }
    }
    for listener in &listeners {
        listener.set_nonblocking(true)?;
    }
    Ok(listeners)
}

/// The listeners that the starter left from descriptor 3 on.
fn announced() -> Result<Vec<Socket>> {
    let number = |name: &str| -> Result<u32> {
        let text = env::var(name).with_context(|| format!("read {name}"))?;
        text.parse().with_context(|| format!("{name}={text}"))
    };
    let pid = number("LISTEN_PID")?;
    if pid != std::process::id() {
        bail!("LISTEN_PID={pid} is not our process {}", std::process::id());
    }
    let listeners = (3..3 + number("LISTEN_FDS")? as i32).map(|descriptor| {
        // SAFETY: the starter says that these descriptors are open and ours, and this is the
        // only place that takes them.
        unsafe { Socket::from_raw_fd(descriptor) }
    });
    Ok(listeners.collect())
}

fn listen(options: &Options, address: SocketAddr) -> Result<Socket> {
    let protocol = if options.multipath { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(options.v6_only)?;
    }
    // As every server does that wants to be restarted. SO_REUSEPORT is left to the kernel
    // hook, unless this server wants several listeners itself.
    socket.set_reuse_address(true)?;
    if options.listeners > 1 {
        socket.set_reuse_port(true)?;
    }
    if let Some(seconds) = options.defer_accept {
        defer_accept(&socket, seconds).context("set TCP_DEFER_ACCEPT")?;
    }
    socket.bind(&SockAddr::from(address))?;
    socket.listen(options.backlog)?;
    Ok(socket)
}

fn defer_accept(socket: &Socket, seconds: i32) -> io::Result<()> {
    let size = size_of_val(&seconds) as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes from `seconds`, which is that long.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn notify_when_ready(options: &Options) {
    if let Some(delay) = options.ready_after {
        thread::spawn(move || {
            thread::sleep(delay);
            notify("READY=1");
        });
    }
}

fn notify(message: &str) {
    let sent = env::var("NOTIFY_SOCKET")
        .map_err(io::Error::other)
        .and_then(|path| UnixDatagram::unbound()?.send_to(message.as_bytes(), path));
    if let Err(error) = sent {
        eprintln!("test-server: tell NOTIFY_SOCKET {message}: {error}");
    }
}

/// By one socket all the time, as some libraries do.
fn keep_saying_that_it_is_well() -> Result<()> {
    let [interval, path] =
        ["WATCHDOG_USEC", "NOTIFY_SOCKET"].map(|name| env::var(name).with_context(|| format!("read {name}")));
    let interval = Duration::from_micros(interval?.parse()?);
    let socket = UnixDatagram::unbound()?;
    socket.connect(path?).context("connect to NOTIFY_SOCKET")?;
    thread::spawn(move || {
        loop {
            if let Err(error) = socket.send(b"WATCHDOG=1") {
                eprintln!("test-server: say that it is well: {error}");
            }
            thread::sleep(interval / 4);
        }
    });
    Ok(())
}

/// The signals that do something other than usual.
struct Signals {
    /// Readable after SIGUSR1.
    close: Option<io::PipeReader>,
    /// Readable after SIGUSR2.
    ready: Option<io::PipeReader>,
}

impl Signals {
    fn new(options: &Options) -> Result<Self> {
        if options.ignore_term {
            signal_hook::flag::register(SIGTERM, Arc::default())?;
        }
        let pipe = |wanted: bool, signal| -> Result<Option<io::PipeReader>> {
            if !wanted {
                return Ok(None);
            }
            let (reader, writer) = io::pipe()?;
            signal_hook::low_level::pipe::register(signal, writer)?;
            Ok(Some(reader))
        };
        Ok(Self { close: pipe(options.closable, SIGUSR1)?, ready: pipe(options.ready_on_signal, SIGUSR2)? })
    }
}

/// What an epoll event is about; connections have the numbers behind.
const CLOSE: u64 = 0;
const READY: u64 = 1;
const FIRST_LISTENER: u64 = 2;
const FIRST_CONNECTION: u64 = 1 << 32;

struct Server {
    greeting: String,
    epoll: OwnedFd,
    listeners: Vec<Socket>,
    connections: BTreeMap<u64, Socket>,
    next: u64,
    counts: Inside,
    inside: Option<File>,
    http: Option<PathBuf>,
    pause: Duration,
}

/// What becomes of a connection after an event.
enum Then {
    Stays,
    Closes,
    Exit(u8),
}

impl Server {
    fn new(options: &Options, listeners: Vec<Socket>) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, listener) in (FIRST_LISTENER..).zip(&listeners) {
            watch(&epoll, listener.as_fd(), number)?;
        }
        let inside = match &options.inside {
            Some(path) => Some(File::create(path).with_context(|| format!("create {path:?}"))?),
            None => None,
        };
        Ok(Self {
            greeting: format!("{} {}", options.name, std::process::id()),
            epoll,
            listeners,
            connections: BTreeMap::new(),
            next: FIRST_CONNECTION,
            counts: Inside::default(),
            inside,
            http: options.http.clone(),
            pause: options.pause,
        })
    }

    fn serve(mut self, signals: Signals) -> Result<ExitCode> {
        for (signal, number) in [(&signals.close, CLOSE), (&signals.ready, READY)] {
            if let Some(signal) = signal {
                watch(&self.epoll, signal.as_fd(), number)?;
            }
        }
        let mut events = Vec::with_capacity(1024);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => bail!("wait for events: {error}"),
            }
            for event in &events {
                match event.data.u64() {
                    CLOSE => {
                        take(&signals.close)?;
                        self.listeners.clear();
                    }
                    READY => {
                        take(&signals.ready)?;
                        notify("READY=1");
                    }
                    number if number < FIRST_CONNECTION => self.accept(number)?,
                    number => {
                        if let Some(code) = self.hear(number)? {
                            return Ok(code.into());
                        }
                    }
                }
            }
        }
    }

    fn accept(&mut self, number: u64) -> Result<()> {
        let Some(listener) = self.listeners.get((number - FIRST_LISTENER) as usize) else {
            return Ok(());
        };
        loop {
            let (connection, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The client has gone in the meantime.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => bail!("accept: {error}"),
            };
            let peer = peer.as_socket().context("a client without an address")?;
            self.counts.now += 1;
            self.counts.most = self.counts.most.max(self.counts.now);
            self.counts.accepted += 1;
            self.record()?;
            thread::sleep(self.pause);
            connection.set_nonblocking(true)?;
            if self.http.is_none() {
                // It fails if the client is gone already; reading will tell.
                let _ = (&connection).write_all(format!("{} {peer}\n", self.greeting).as_bytes());
            }
            watch(&self.epoll, connection.as_fd(), self.next)?;
            self.connections.insert(self.next, connection);
            self.next += 1;
            if !self.pause.is_zero() {
                // It hears what the others say in between.
                return Ok(());
            }
        }
    }

    /// Something happened on a connection. `Some` if the process is to exit.
    fn hear(&mut self, number: u64) -> Result<Option<u8>> {
        let Some(connection) = self.connections.get(&number) else {
            return Ok(None);
        };
        match obey(connection, &self.greeting, self.http.as_deref()) {
            Then::Stays => Ok(None),
            Then::Exit(code) => Ok(Some(code)),
            Then::Closes => {
                // Before the close, so that this count is never above the kernel's.
                self.counts.now -= 1;
                self.record()?;
                self.connections.remove(&number);
                Ok(None)
            }
        }
    }

    fn record(&self) -> Result<()> {
        match &self.inside {
            Some(file) => self.counts.write(file).context("write the counts"),
            None => Ok(()),
        }
    }
}

/// Reads what a client said, and does it.
fn obey(mut connection: &Socket, greeting: &str, http: Option<&Path>) -> Then {
    // Shorter than an `unread` line, which so stays unread in part.
    let mut said = [0; 4096];
    let most = if http.is_some() { said.len() } else { 64 };
    let said = match connection.read(&mut said[..most]) {
        Ok(0) => return Then::Closes,
        Ok(length) => &said[..length],
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Then::Stays,
        Err(_) => return Then::Closes,
    };
    let text = String::from_utf8_lossy(said);
    let mut words = text.split_whitespace();
    match words.next() {
        Some("close" | "unread") => Then::Closes,
        Some("GET") => {
            let status = http.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            if status.trim().is_empty() {
                return Then::Stays;
            }
            let head = format!("HTTP/1.1 {}\r\nContent-Length: {}\r\n", status.trim(), greeting.len());
            // The client may be gone already.
            let _ = connection.write_all(format!("{head}Connection: close\r\n\r\n{greeting}").as_bytes());
            Then::Closes
        }
        Some("reset") => match connection.set_linger(Some(Duration::ZERO)) {
            Ok(()) => Then::Closes,
            Err(error) => panic!("set SO_LINGER: {error}"),
        },
        Some("half") => {
            // The client may be gone already.
            let _ = connection.shutdown(Shutdown::Write);
            Then::Stays
        }
        Some("echo") => {
            let bytes = words.next().and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
            let begun = said.iter().position(|byte| *byte == b'\n').map_or(&[][..], |end| &said[end + 1..]);
            // Likewise.
            match echo(connection, begun, bytes) {
                Ok(()) => Then::Stays,
                Err(_) => Then::Closes,
            }
        }
        Some("notify") => {
            notify(&words.collect::<Vec<_>>().join(" "));
            Then::Stays
        }
        _ if http.is_some() => Then::Stays,
        Some("grow") => {
            let mebibytes: usize = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
            // Every page of it is written to, and stays.
            std::mem::forget(vec![1_u8; mebibytes << 20]);
            Then::Stays
        }
        Some("exit") => Then::Exit(words.next().and_then(|code| code.parse().ok()).unwrap_or(0)),
        _ => {
            // Likewise.
            let _ = connection.write_all(format!("{greeting} who\n").as_bytes());
            Then::Stays
        }
    }
}

/// Sends back so many bytes, the first of which have been read already.
fn echo(mut connection: &Socket, begun: &[u8], bytes: u64) -> io::Result<()> {
    connection.set_nonblocking(false)?;
    connection.write_all(begun)?;
    let left = bytes.saturating_sub(begun.len() as u64);
    let echoed = io::copy(&mut connection.take(left), &mut &*connection)?;
    connection.set_nonblocking(true)?;
    if echoed == left { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Takes one signal out of its pipe.
fn take(signal: &Option<io::PipeReader>) -> Result<()> {
    let mut signal = signal.as_ref().context("only a pipe that is there becomes readable")?;
    Ok(signal.read_exact(&mut [0])?)
}

fn watch(epoll: &OwnedFd, source: BorrowedFd<'_>, number: u64) -> Result<()> {
    let data = epoll::EventData::new_u64(number);
    Ok(epoll::add(epoll, source, data, epoll::EventFlags::IN)?)
}
