//! `dist-ctl demo`: a small HTTP server that says who it is, to have something behind an address.
//!
//! It gets its listeners in every way a server can: it binds by itself, is handed them by
//! LISTEN_FDS, or finds one as its stdin. It plays a server nobody wrote for dist-ctl: it sets
//! no SO_REUSEPORT and asks dist-ctl nothing. It survives every client and holds thousands of
//! them: tests count with it, and benchmarks measure through it. `GET /slow?ms=N` holds the
//! request for that long; everything else is answered at once.

use std::{
    env, fs,
    net::{SocketAddr, TcpListener as BlockingTcpListener},
    os::{
        fd::{AsFd as _, FromRawFd as _, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr as UnixSocketAddr, UnixDatagram, UnixStream as BlockingUnixStream},
    },
    str::FromStr as _,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tracing::{info, warn};

use crate::{
    address::{ListenAddress, divide_families},
    error::UserError,
};

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where to listen; empty: what LISTEN_FDS, stdin or DIST_CTL_LISTEN says, in this order.
    pub listen: Vec<ListenAddress>,
    /// Who to be; none: DIST_CTL_SERVER, or else `demo`.
    pub name: Option<String>,
}

/// Serves until SIGTERM or SIGINT, finishes what clients have begun, and returns.
///
/// Call it before anything else of the process opens descriptors: those that LISTEN_FDS
/// announces are taken by their numbers. A second signal ends the process at once.
pub fn run(options: Options) -> anyhow::Result<()> {
    let listeners = listeners(options.listen)?;
    let name = options.name.or_else(|| env::var("DIST_CTL_SERVER").ok());
    let name = name.unwrap_or_else(|| "demo".to_owned());
    raise_descriptor_limit();
    let signals = signals().context("catch SIGTERM and SIGINT")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the demo's runtime")?;
    runtime.block_on(async {
        let mut signals = UnixStream::from_std(signals).context("watch for signals")?;
        let stop = async {
            // An error would mean that no signal can ever arrive, and would be the end as well.
            let _ = signals.read(&mut [0]).await;
            notify("STOPPING=1");
        };
        serve(listeners, name, || notify("READY=1"), stop).await
    })
}

/// Connections at a time; the ones beyond wait in the accept queue.
const CONNECTIONS: usize = 65_536;

/// Longer than any burst a test makes: what does not fit is dropped without a word.
const BACKLOG: i32 = 4096;

/// The longest request head, and the longest body that is read and thrown away.
const HEAD_BYTES: usize = 16 * 1024;
const BODY_BYTES: u64 = 1024 * 1024;

/// The longest a request can ask to be held.
const SLOWEST: Duration = Duration::from_secs(60);

/// How long a connection may be silent between requests, and before the first: long, for
/// holding connections open is what tests do with it.
const IDLE: Duration = Duration::from_secs(15 * 60);

/// How long a client may take for one request, and to take one answer.
const TRANSFER: Duration = Duration::from_secs(30);

/// When it stops: how long an accepted client has to say the request it connected for, and
/// how long after an error a client may go on sending before it is cut off.
const GRACE: Duration = Duration::from_secs(1);

/// What all connections share.
struct Server {
    name: String,
    pid: u32,
    free: Arc<Semaphore>,
}

struct Connection {
    server: Arc<Server>,
    stream: TcpStream,
    client: SocketAddr,
    /// Turns true once, when the server stops. It ends only when the last of these is gone.
    stopping: watch::Receiver<bool>,
    /// What has come and is not used yet: a part of a request, or more than one.
    input: Vec<u8>,
    answered: u64,
    _place: OwnedSemaphorePermit,
}

struct Request {
    /// The answer to HEAD has no body.
    is_head: bool,
    target: String,
    body_bytes: u64,
    wants_continue: bool,
    keep_alive: bool,
}

/// A status line's end, and a sentence for whoever sent what it answers.
#[derive(Debug, PartialEq)]
struct Refusal(&'static str, String);

impl Refusal {
    fn bad_request(sentence: impl Into<String>) -> Self {
        Self("400 Bad Request", sentence.into())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum After {
    KeepAlive,
    Close,
}

async fn serve(
    listeners: Vec<BlockingTcpListener>,
    name: String,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    let server = Arc::new(Server { name, pid: std::process::id(), free });
    let (stopping, connection_stopping) = watch::channel(false);
    let mut acceptors = JoinSet::new();
    for listener in listeners {
        let address = listener.local_addr().context("ask a listener for its address")?;
        listener.set_nonblocking(true).context("make a listener non-blocking")?;
        let listener = TcpListener::from_std(listener).context("watch a listener")?;
        info!("{} (pid {}) answers on {address}", server.name, server.pid);
        acceptors.spawn(accept(listener, Arc::clone(&server), connection_stopping.clone()));
    }
    drop(connection_stopping);
    ready();
    stop.await;
    // The listeners close here; what is in their queues is the kernel's to hand on.
    acceptors.shutdown().await;
    // Fails if there is no connection to tell.
    let _ = stopping.send(true);
    stopping.closed().await;
    Ok(())
}

async fn accept(listener: TcpListener, server: Arc<Server>, stopping: watch::Receiver<bool>) {
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("{}: accept a connection: {error}; next try in 10ms", server.name);
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let place = Arc::clone(&server.free).acquire_owned().await;
        let connection = Connection {
            server: Arc::clone(&server),
            stream,
            client: SocketAddr::new(client.ip().to_canonical(), client.port()),
            stopping: stopping.clone(),
            // Room for a usual request, so that it comes with one read.
            input: Vec::with_capacity(1024),
            answered: 0,
            _place: place.expect("nobody closes the semaphore"),
        };
        tokio::spawn(connection.converse());
    }
}

impl Server {
    fn connections(&self) -> usize {
        CONNECTIONS - self.free.available_permits()
    }
}

impl Connection {
    async fn converse(mut self) {
        while let Some(request) = self.next_request().await {
            let after = match request {
                Ok(request) => self.answer(request).await,
                Err(refusal) => self.refuse(refusal).await,
            };
            match after {
                Some(After::KeepAlive) => self.answered += 1,
                Some(After::Close) | None => break,
            }
        }
    }

    /// The next request, or why what came is none; `None` if there will be no other.
    async fn next_request(&mut self) -> Option<Result<Request, Refusal>> {
        let mut deadline = Instant::now() + if self.input.is_empty() { IDLE } else { TRANSFER };
        let mut told_to_stop = false;
        loop {
            // Some clients end a body with one line end too many (RFC 9112, section 2.2).
            let blank = self.input.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            self.input.drain(..blank);
            if let Some(end) = head_end(&self.input) {
                let head: Vec<u8> = self.input.drain(..end).collect();
                return Some(parse(&head));
            }
            if self.input.len() > HEAD_BYTES {
                let sentence = format!("the request's head has more than {HEAD_BYTES} bytes");
                return Some(Err(Refusal("431 Request Header Fields Too Large", sentence)));
            }
            let was_empty = self.input.is_empty();
            tokio::select! {
                // What has come before the signal is served.
                biased;
                read = self.stream.read_buf(&mut self.input) => match read {
                    Ok(count) if count > 0 => {
                        if was_empty {
                            deadline = deadline.min(Instant::now() + TRANSFER);
                        }
                    }
                    Ok(_) | Err(_) => return None,
                },
                _ = self.stopping.wait_for(|stopping| *stopping), if !told_to_stop => {
                    told_to_stop = true;
                    if was_empty && self.answered > 0 {
                        return None;
                    }
                    deadline = deadline.min(Instant::now() + GRACE);
                }
                () = sleep_until(deadline) => return None,
            }
        }
    }

    async fn answer(&mut self, request: Request) -> Option<After> {
        if request.wants_continue && self.input.is_empty() {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        self.skip(request.body_bytes).await?;
        let hold = match hold(&request.target) {
            Ok(hold) => hold,
            Err(refusal) => return self.refuse(refusal).await,
        };
        if !hold.is_zero() {
            sleep(hold).await;
        }
        let after = match request.keep_alive && !*self.stopping.borrow() {
            true => After::KeepAlive,
            false => After::Close,
        };
        let body = format!(
            "server={} pid={} client={} connections={}\n",
            self.server.name,
            self.server.pid,
            self.client,
            self.server.connections()
        );
        let mut response = head("200 OK", body.len(), after);
        if !request.is_head {
            response.push_str(&body);
        }
        self.write(response.as_bytes()).await?;
        if after == After::Close && !self.input.is_empty() {
            self.linger().await;
        }
        Some(after)
    }

    async fn refuse(&mut self, Refusal(status, sentence): Refusal) -> Option<After> {
        let body = format!("{sentence}\n");
        let response = head(status, body.len(), After::Close) + &body;
        self.write(response.as_bytes()).await?;
        self.linger().await;
        Some(After::Close)
    }

    async fn write(&mut self, bytes: &[u8]) -> Option<()> {
        timeout(TRANSFER, self.stream.write_all(bytes)).await.ok()?.ok()
    }

    /// Reads a body that nobody wants.
    async fn skip(&mut self, mut bytes: u64) -> Option<()> {
        let deadline = Instant::now() + TRANSFER;
        loop {
            let here = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.input.len());
            self.input.drain(..here);
            bytes -= here as u64;
            if bytes == 0 {
                return Some(());
            }
            let read = timeout_at(deadline, self.stream.read_buf(&mut self.input));
            if read.await.ok()?.ok()? == 0 {
                return None;
            }
        }
    }

    /// Lets the client finish sending. A close with something unread is a reset, and would take
    /// the answer with it.
    async fn linger(&mut self) {
        let _ = timeout(GRACE, async {
            self.stream.shutdown().await?;
            let mut unread = u64::from(u16::MAX);
            while unread > 0 {
                self.input.clear();
                match self.stream.read_buf(&mut self.input).await? {
                    0 => break,
                    count => unread = unread.saturating_sub(count as u64),
                }
            }
            std::io::Result::Ok(())
        })
        .await;
    }
}

/// Where the body begins: behind the first empty line.
fn head_end(input: &[u8]) -> Option<usize> {
    let mut line_begin = 0;
    for (at, _) in input.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
        if matches!(&input[line_begin..at], b"" | b"\r") {
            return Some(at + 1);
        }
        line_begin = at + 1;
    }
    None
}

fn parse(head: &[u8]) -> Result<Request, Refusal> {
    let head = std::str::from_utf8(head)
        .map_err(|_| Refusal::bad_request("the request's head is no text in UTF-8"))?;
    let mut lines = head.lines();
    let first = lines.next().unwrap_or_default();
    let words: Vec<&str> = first.split(' ').collect();
    let &[method, target, version] = words.as_slice() else {
        return Err(Refusal::bad_request("the first line is no request, write it like: GET / HTTP/1.1"));
    };
    let is_method = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_alphabetic());
    if !is_method || target.is_empty() {
        return Err(Refusal::bad_request("the first line is no request, write it like: GET / HTTP/1.1"));
    }
    let keeps_alive = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ => {
            return Err(Refusal(
                "505 HTTP Version Not Supported",
                format!("{version:?} is not spoken here, write HTTP/1.1"),
            ));
        }
    };
    let mut request = Request {
        is_head: method == "HEAD",
        target: target.to_owned(),
        body_bytes: 0,
        wants_continue: false,
        keep_alive: keeps_alive,
    };
    let mut length = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        let Some((name, value)) = line.split_once(':').filter(|(name, _)| is_field_name(name)) else {
            return Err(Refusal::bad_request(format!("{line:?} is no header field")));
        };
        let value = value.trim();
        let has = |word: &str| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word));
        match name.to_ascii_lowercase().as_str() {
            "connection" if has("close") => request.keep_alive = false,
            "connection" if has("keep-alive") => request.keep_alive = true,
            "content-length" => {
                let bytes = value.parse().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
                let bytes: u64 = bytes.ok_or_else(|| {
                    Refusal::bad_request(format!("content-length: {value:?} is no number of bytes"))
                })?;
                if length.is_some_and(|before| before != bytes) {
                    return Err(Refusal::bad_request("content-length: there are two, and they differ"));
                }
                length = Some(bytes);
            }
            "transfer-encoding" => {
                return Err(Refusal(
                    "501 Not Implemented",
                    "transfer-encoding: send the body with a content-length instead".to_owned(),
                ));
            }
            "expect" if has("100-continue") => request.wants_continue = keeps_alive,
            _ => {}
        }
    }
    request.body_bytes = length.unwrap_or(0);
    if request.body_bytes > BODY_BYTES {
        return Err(Refusal(
            "413 Content Too Large",
            format!("the body has {} bytes, {BODY_BYTES} is the most", request.body_bytes),
        ));
    }
    request.wants_continue &= request.body_bytes > 0;
    Ok(request)
}

fn is_field_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// How long a request wants to be held.
fn hold(target: &str) -> Result<Duration, Refusal> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if path != "/slow" {
        return Ok(Duration::ZERO);
    }
    let ms = query.split('&').find_map(|pair| pair.strip_prefix("ms="));
    let hold = ms.and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
    match hold {
        Some(hold) if hold <= SLOWEST => Ok(hold),
        _ => Err(Refusal::bad_request(format!(
            "/slow wants ?ms= and a number from 0 to {}, for example /slow?ms=500",
            SLOWEST.as_millis()
        ))),
    }
}

fn head(status: &str, body_bytes: usize, after: After) -> String {
    let connection = match after {
        After::KeepAlive => "keep-alive",
        After::Close => "close",
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {body_bytes}\r\nConnection: {connection}\r\n\r\n"
    )
}

fn listeners(listen: Vec<ListenAddress>) -> anyhow::Result<Vec<BlockingTcpListener>> {
    if !listen.is_empty() {
        return bind_all(listen);
    }
    // The variable may be meant for a process that we are merely a child of.
    if env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string()) {
        return activated(&env::var("LISTEN_FDS").unwrap_or_default());
    }
    if let Some(listener) = stdin()? {
        return Ok(vec![listener]);
    }
    let wanted = env::var("DIST_CTL_LISTEN").unwrap_or_default();
    let addresses = wanted
        .split_ascii_whitespace()
        .map(ListenAddress::from_str)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| UserError::new(format!("DIST_CTL_LISTEN: {error}")))?;
    if addresses.is_empty() {
        return Err(UserError::new(
            "the demo has no address: give it one with --listen, for example --listen :8080",
        )
        .into());
    }
    bind_all(addresses)
}

fn bind_all(mut addresses: Vec<ListenAddress>) -> anyhow::Result<Vec<BlockingTcpListener>> {
    divide_families(&mut addresses);
    addresses.iter().map(bind).collect()
}

/// Binds as servers do: SO_REUSEADDR, IPv4 on `[::]` as the system has it, and not more.
fn bind(address: &ListenAddress) -> anyhow::Result<BlockingTcpListener> {
    let domain = socket2::Domain::for_address(address.socket);
    socket2::Socket::new(domain, socket2::Type::STREAM, None)
        .and_then(|socket| {
            socket.set_reuse_address(true)?;
            if address.v6only {
                socket.set_only_v6(true)?;
            }
            socket.bind(&address.socket.into())?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        })
        .with_context(|| format!("listen on {address}"))
}

/// The listeners of systemd's socket activation: as many as announced, from descriptor 3 on.
fn activated(announced: &str) -> anyhow::Result<Vec<BlockingTcpListener>> {
    let count: RawFd = announced
        .parse()
        .ok()
        .filter(|count| (1..=CONNECTIONS as RawFd).contains(count))
        .with_context(|| format!("LISTEN_FDS: {announced:?} is no number of descriptors"))?;
    let mut listeners = Vec::new();
    for number in 3..3 + count {
        // Not its target, which need not be a file that can be looked at.
        let is_open = fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
        ensure!(is_open, "LISTEN_FDS: {announced} are announced, but descriptor {number} is not open");
        // SAFETY: it is open, and nobody else in this process owns it: the protocol gives it to
        // us alone, and `run` promises that nothing has been opened before.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        let listener = listening(descriptor);
        listeners.push(listener.with_context(|| format!("LISTEN_FDS: take descriptor {number}"))?);
    }
    Ok(listeners)
}

/// The listener that is our stdin, if it is one.
fn stdin() -> anyhow::Result<Option<BlockingTcpListener>> {
    let stdin = std::io::stdin();
    if !rustix::net::sockopt::socket_acceptconn(&stdin).unwrap_or(false) {
        return Ok(None);
    }
    let taking = || -> anyhow::Result<BlockingTcpListener> {
        let listener = listening(stdin.as_fd().try_clone_to_owned()?)?;
        // Or it would stay open, and be in the group, when we stop listening.
        rustix::stdio::dup2_stdin(fs::File::open("/dev/null")?)?;
        Ok(listener)
    };
    taking().map(Some).context("take the listener on stdin")
}

fn listening(descriptor: OwnedFd) -> anyhow::Result<BlockingTcpListener> {
    let is_listening = rustix::net::sockopt::socket_acceptconn(&descriptor).context("it is no socket")?;
    ensure!(is_listening, "it is a socket that does not listen");
    let listener = BlockingTcpListener::from(descriptor);
    listener.local_addr().context("it is no TCP socket")?;
    Ok(listener)
}

/// As many descriptors as connections, where that is allowed: servers meant for many do so.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = CONNECTIONS as u64 + 64;
    let allowed = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if limit.current.is_some_and(|current| current < allowed) {
        // With fewer it works as well, for fewer clients.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), maximum: limit.maximum });
    }
}

/// Where a byte arrives with the first signal. The second ends the process.
fn signals() -> std::io::Result<BlockingUnixStream> {
    let (read, write) = BlockingUnixStream::pair()?;
    read.set_nonblocking(true)?;
    let signaled = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // In this order: the other way round, the first signal would end it already.
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&signaled))?;
        signal_hook::flag::register(signal, Arc::clone(&signaled))?;
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Tells the supervisor how we are, if it asked for it.
fn notify(state: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let send = || -> std::io::Result<()> {
        let address = match path.as_encoded_bytes() {
            [b'@', name @ ..] => UnixSocketAddr::from_abstract_name(name)?,
            _ => UnixSocketAddr::from_pathname(&path)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
        Ok(())
    };
    if let Err(error) = send() {
        warn!("send {state} to {}: {error}; whoever waits for it waits on", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpStream as Client},
        process::{Child, Command, Stdio},
        sync::atomic::{AtomicU8, Ordering},
        thread,
        time::Instant as BlockingInstant,
    };

    use tokio::sync::oneshot;

    use super::*;

    /// Longer than any test waits on purpose, shorter than a person waits for a hanging test.
    const LONG: Duration = Duration::from_secs(20);

    /// A demo server in a thread of this process.
    struct Demo {
        address: SocketAddr,
        stop: Option<oneshot::Sender<()>>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Demo {
        fn start() -> Self {
            Self::start_on((Ipv4Addr::LOCALHOST, 0).into())
        }

        fn start_on(socket: SocketAddr) -> Self {
            let listener = bind(&ListenAddress { socket, v6only: false }).unwrap();
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel();
            let thread = thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let stop = async { stopped.await.unwrap() };
                runtime.block_on(serve(vec![listener], "shop/1".to_owned(), || (), stop)).unwrap();
            });
            Self { address, stop: Some(stop), thread: Some(thread) }
        }

        fn connect(&self) -> Client {
            connect(self.address)
        }

        /// Everything that comes back for these bytes.
        fn say(&self, bytes: &[u8]) -> String {
            let mut client = self.connect();
            // It closes before all is written, if it has had enough.
            let _ = client.write_all(bytes);
            let _ = client.shutdown(Shutdown::Write);
            read_all(&mut client)
        }

        fn stop(&mut self) -> Duration {
            let begin = BlockingInstant::now();
            self.stop.take().unwrap().send(()).unwrap();
            self.thread.take().unwrap().join().unwrap();
            begin.elapsed()
        }
    }

    impl Drop for Demo {
        fn drop(&mut self) {
            if self.stop.is_some() && !thread::panicking() {
                self.stop();
            }
        }
    }

    fn connect(address: SocketAddr) -> Client {
        let client = Client::connect(address).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client.set_write_timeout(Some(LONG)).unwrap();
        client
    }

    fn read_all(client: &mut Client) -> String {
        let mut text = Vec::new();
        client.read_to_end(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    /// One request and its answer's body, on a connection that stays open.
    fn get(client: &mut Client, target: &str) -> String {
        write!(client, "GET {target} HTTP/1.1\r\nHost: demo\r\n\r\n").unwrap();
        let answer = read_answer(client);
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// One answer with a body, and not a byte of what follows.
    fn read_answer(client: &mut Client) -> String {
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n\r\n") {
            client.read_exact(&mut byte).unwrap();
            answer.extend_from_slice(&byte);
        }
        let mut answer = String::from_utf8(answer).unwrap();
        let length = answer.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        client.read_exact(&mut body).unwrap();
        answer.push_str(std::str::from_utf8(&body).unwrap());
        answer
    }

    fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = BlockingInstant::now() + LONG;
        while !condition() {
            assert!(BlockingInstant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// `connections=N` of an answer.
    fn connections(body: &str) -> usize {
        body.trim_end().rsplit_once("connections=").unwrap().1.parse().unwrap()
    }

    #[test]
    fn an_answer_says_who_answered_and_who_asked() {
        let demo = Demo::start();
        let mut client = demo.connect();
        let me = client.local_addr().unwrap();
        write!(client, "GET / HTTP/1.1\r\nHost: demo\r\n\r\n").unwrap();
        let body = format!("server=shop/1 pid={} client={me} connections=1\n", std::process::id());
        assert_eq!(
            read_answer(&mut client),
            format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
                 Connection: keep-alive\r\n\r\n{body}",
                body.len()
            )
        );
    }

    #[test]
    fn dual_stack_serves_both_families_and_shows_ipv4_as_ipv4() {
        let demo = Demo::start_on((Ipv6Addr::UNSPECIFIED, 0).into());
        let port = demo.address.port();
        for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), (Ipv6Addr::LOCALHOST, port).into()] {
            let mut client = connect(address);
            let me = client.local_addr().unwrap();
            assert!(get(&mut client, "/").contains(&format!(" client={me} ")));
        }
    }

    #[test]
    fn it_counts_the_connections_it_holds() {
        let demo = Demo::start();
        let mut clients: Vec<_> = (0..10).map(|_| demo.connect()).collect();
        for client in &mut clients {
            get(client, "/");
        }
        assert_eq!(connections(&get(&mut clients[0], "/")), 10);
        clients.truncate(3);
        wait_for("the closed ones are not counted any more", || connections(&get(&mut clients[0], "/")) == 3);
    }

    #[test]
    fn one_connection_serves_many_requests_also_sent_at_once() {
        let demo = Demo::start();
        let mut client = demo.connect();
        for _ in 0..100 {
            assert_eq!(connections(&get(&mut client, "/any/path?with=query")), 1);
        }
        client.write_all(&b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n".repeat(1000)).unwrap();
        for _ in 0..1000 {
            assert!(read_answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
        }
    }

    #[test]
    fn a_request_decides_whether_the_connection_stays() {
        let demo = Demo::start();
        for (request, stays) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nconnection:  foo , CLOSE\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
            ("GET / HTTP/1.1\n\n", true),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\n", true),
        ] {
            let mut client = demo.connect();
            client.write_all(request.as_bytes()).unwrap();
            let answer = read_answer(&mut client);
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{request:?}");
            assert_eq!(answer.contains("Connection: keep-alive"), stays, "{request:?}");
            if stays {
                get(&mut client, "/");
            } else {
                assert_eq!(read_all(&mut client), "", "{request:?}");
            }
        }
    }

    #[test]
    fn a_request_in_pieces_is_one_request() {
        let demo = Demo::start();
        let mut client = demo.connect();
        client.set_nodelay(true).unwrap();
        for byte in b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n" {
            client.write_all(&[*byte]).unwrap();
        }
        assert!(read_answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
    }

    #[test]
    fn bodies_are_read_and_forgotten() {
        let demo = Demo::start();
        let mut client = demo.connect();
        let head = "POST / HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n";
        client.write_all(head.as_bytes()).unwrap();
        client.write_all(&vec![b'\n'; 1024 * 1024]).unwrap();
        assert!(read_answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
        get(&mut client, "/");
    }

    #[test]
    fn a_client_that_waits_for_permission_gets_it() {
        let demo = Demo::start();
        let mut client = demo.connect();
        let head = "PUT / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";
        client.write_all(head.as_bytes()).unwrap();
        let mut permission = [0; 25];
        client.read_exact(&mut permission).unwrap();
        assert_eq!(&permission, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"abc").unwrap();
        assert!(read_answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
    }

    #[test]
    fn head_gets_no_body() {
        let demo = Demo::start();
        let answer = demo.say(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    }

    #[test]
    fn slow_holds_one_request_and_no_other() {
        let demo = Demo::start();
        let begin = BlockingInstant::now();
        let mut held = demo.connect();
        write!(held, "GET /slow?ms=2000 HTTP/1.1\r\n\r\n").unwrap();
        for _ in 0..10 {
            get(&mut demo.connect(), "/slow?ms=0");
        }
        assert!(begin.elapsed() < Duration::from_millis(2000), "{:?}", begin.elapsed());
        read_answer(&mut held);
        assert!(begin.elapsed() >= Duration::from_millis(2000), "{:?}", begin.elapsed());
    }

    #[test]
    fn what_is_no_request_is_refused_with_a_sentence() {
        let demo = Demo::start();
        let long_head = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(HEAD_BYTES));
        let no_request = "the first line is no request, write it like: GET / HTTP/1.1";
        let no_slow = "/slow wants ?ms= and a number from 0 to 60000, for example /slow?ms=500";
        for (request, status, sentence) in [
            ("hello\r\n\r\n", "400 Bad Request", no_request),
            ("GET /\r\n\r\n", "400 Bad Request", no_request),
            ("GET  / HTTP/1.1\r\n\r\n", "400 Bad Request", no_request),
            ("G=T / HTTP/1.1\r\n\r\n", "400 Bad Request", no_request),
            (
                "GET / HTTP/2.0\r\n\r\n",
                "505 HTTP Version Not Supported",
                "\"HTTP/2.0\" is not spoken here, write HTTP/1.1",
            ),
            ("GET / HTTP/1.1\r\nno field\r\n\r\n", "400 Bad Request", "\"no field\" is no header field"),
            ("GET / HTTP/1.1\r\nHost : x\r\n\r\n", "400 Bad Request", "\"Host : x\" is no header field"),
            (
                "POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
                "400 Bad Request",
                "content-length: \"+5\" is no number of bytes",
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                "400 Bad Request",
                "content-length: \"99999999999999999999\" is no number of bytes",
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
                "400 Bad Request",
                "content-length: there are two, and they differ",
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n",
                "413 Content Too Large",
                "the body has 1048577 bytes, 1048576 is the most",
            ),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                "501 Not Implemented",
                "transfer-encoding: send the body with a content-length instead",
            ),
            (
                &long_head,
                "431 Request Header Fields Too Large",
                "the request's head has more than 16384 bytes",
            ),
            ("GET /slow HTTP/1.1\r\n\r\n", "400 Bad Request", no_slow),
            ("GET /slow?ms=soon HTTP/1.1\r\n\r\n", "400 Bad Request", no_slow),
            ("GET /slow?ms=60001 HTTP/1.1\r\n\r\n", "400 Bad Request", no_slow),
            ("GET /slow?ms=-1 HTTP/1.1\r\n\r\n", "400 Bad Request", no_slow),
        ] {
            let answer = demo.say(request.as_bytes());
            let name = &request[..request.len().min(80)];
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{name:?}: {answer}");
            assert!(
                answer.ends_with(&format!("Connection: close\r\n\r\n{sentence}\n")),
                "{name:?}: {answer}"
            );
        }
    }

    #[test]
    fn random_bytes_harm_nobody() {
        let demo = Demo::start();
        // xorshift, so that a failure can be repeated.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..200 {
            let mut bytes = Vec::new();
            for _ in 0..=round * 20 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.extend_from_slice(&state.to_le_bytes());
            }
            let mut client = demo.connect();
            let _ = client.write_all(&bytes);
            let _ = client.shutdown(Shutdown::Write);
            // What comes back depends on the line ends among the bytes; that it ends does not.
            let mut end = Vec::new();
            if let Err(error) = client.read_to_end(&mut end) {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "round {round}");
            }
            assert!(end.is_empty() || end.starts_with(b"HTTP/1.1 "), "round {round}");
        }
        wait_for("only the one that asks is left", || connections(&get(&mut demo.connect(), "/")) == 1);
    }

    #[test]
    fn clients_that_leave_in_the_middle_are_not_counted_any_more() {
        let demo = Demo::start();
        for length in 0..40 {
            let mut client = demo.connect();
            client.write_all(&b"POST /slow?ms=1 HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"[..length]).unwrap();
            if length % 2 == 0 {
                let client = socket2::Socket::from(client);
                client.set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        wait_for("only the one that asks is left", || connections(&get(&mut demo.connect(), "/")) == 1);
    }

    #[test]
    fn a_thousand_connections_are_held_at_once() {
        raise_descriptor_limit();
        let demo = Demo::start();
        let mut clients: Vec<_> = (0..1000).map(|_| demo.connect()).collect();
        let last = clients.last_mut().unwrap();
        wait_for("all are accepted", || connections(&get(last, "/")) == 1000);
    }

    #[test]
    fn stopping_without_clients_is_immediate() {
        assert!(Demo::start().stop() < GRACE);
    }

    #[test]
    fn stopping_closes_what_is_idle_and_the_listener() {
        let mut demo = Demo::start();
        let mut idle = demo.connect();
        get(&mut idle, "/");
        assert!(demo.stop() < GRACE);
        assert_eq!(read_all(&mut idle), "");
        let refused = Client::connect(demo.address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn stopping_finishes_what_has_begun() {
        let mut demo = Demo::start();
        let mut silent = demo.connect();
        let mut held = demo.connect();
        write!(held, "GET /slow?ms=700 HTTP/1.1\r\n\r\n").unwrap();
        wait_for("all are accepted", || connections(&get(&mut demo.connect(), "/")) == 3);
        let late = thread::spawn(move || {
            // It connected before the stop, and says what it wants only now.
            thread::sleep(Duration::from_millis(200));
            write!(silent, "GET / HTTP/1.1\r\n\r\n").unwrap();
            read_all(&mut silent)
        });
        let took = demo.stop();
        let late = late.join().unwrap();
        for answer in [late, read_all(&mut held)] {
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("Connection: close\r\n"), "{answer}");
        }
        assert!(took < 3 * GRACE, "{took:?}");
    }

    #[test]
    fn stopping_waits_a_second_for_clients_that_say_nothing() {
        let mut demo = Demo::start();
        let mut silent = demo.connect();
        let mut half = demo.connect();
        write!(half, "GET / HT").unwrap();
        wait_for("all are accepted", || connections(&get(&mut demo.connect(), "/")) == 3);
        let took = demo.stop();
        assert!(took >= GRACE && took < 3 * GRACE, "{took:?}");
        assert_eq!((read_all(&mut silent), read_all(&mut half)), (String::new(), String::new()));
    }

    /// An address that no other test, nor another run of these, has.
    fn own_address() -> SocketAddr {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        (Ipv4Addr::new(127, high, low, next), 8080).into()
    }

    /// Runs `run` as a process of its own, by the test below. `shell` may set up descriptors
    /// and variables first, and ends in `exec "$@"`.
    fn process(shell: &str, variables: &[(&str, &str)], stdin: Stdio, stdout: Stdio) -> Child {
        Command::new("sh")
            .args(["-c", shell, "sh"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", "demo::tests::run_as_a_process", "--ignored", "--nocapture"])
            .env_remove("NOTIFY_SOCKET")
            .env("DEMO_TEST", "1")
            .envs(variables.iter().copied())
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    const EXEC: &str = r#"exec "$@""#;

    #[test]
    #[ignore = "run by other tests as a process of its own"]
    fn run_as_a_process() {
        if env::var_os("DEMO_TEST").is_some() {
            let name = env::var("DEMO_TEST_NAME").ok();
            if let Err(error) = run(Options { listen: Vec::new(), name }) {
                eprintln!("failed: {error:#}");
                std::process::exit(i32::from(crate::error::exit_code(&error)));
            }
        }
    }

    fn send(signal: rustix::process::Signal, child: &Child) {
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    /// Ends it by SIGTERM, and gives its exit code and what it wrote.
    fn terminate(child: Child) -> (Option<i32>, String) {
        send(rustix::process::Signal::TERM, &child);
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    #[test]
    fn a_process_binds_all_that_the_environment_names_and_ends_with_0() {
        let (first, second) = (own_address(), own_address());
        let child = process(
            EXEC,
            &[("DIST_CTL_LISTEN", &format!("{first} {second}")), ("DIST_CTL_SERVER", "shop/2")],
            Stdio::null(),
            Stdio::null(),
        );
        for address in [first, second] {
            wait_for("it listens", || Client::connect(address).is_ok());
            let body = get(&mut connect(address), "/");
            assert!(body.starts_with(&format!("server=shop/2 pid={} ", child.id())), "{body}");
        }
        assert_eq!(terminate(child), (Some(0), String::new()));
    }

    #[test]
    fn a_process_sets_no_reuseport() {
        let address = own_address();
        let variables = [("DIST_CTL_LISTEN", &*address.to_string())];
        let first = process(EXEC, &variables, Stdio::null(), Stdio::null());
        wait_for("it listens", || Client::connect(address).is_ok());
        let second = process(EXEC, &variables, Stdio::null(), Stdio::null());
        let output = second.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(
            String::from_utf8(output.stderr).unwrap(),
            format!("failed: listen on {address}: Address already in use (os error 98)\n")
        );
        assert_eq!(terminate(first).0, Some(0));
    }

    fn inherited() -> (SocketAddr, Stdio) {
        let address = own_address();
        let listener = bind(&ListenAddress { socket: address, v6only: false }).unwrap();
        (address, OwnedFd::from(listener).into())
    }

    #[test]
    fn a_process_takes_what_listen_fds_announces() {
        let ((first, stdin), (second, stdout)) = (inherited(), inherited());
        let child = process(
            "exec 3<&0 4>&1 </dev/null >/dev/null; \
             LISTEN_PID=$$ LISTEN_FDS=2 exec \"$@\"",
            // The listeners are handed over, so this is not for it to bind.
            &[("DEMO_TEST_NAME", "shop/3"), ("DIST_CTL_LISTEN", "not read"), ("DIST_CTL_SERVER", "not read")],
            stdin,
            stdout,
        );
        for address in [first, second] {
            let body = get(&mut connect(address), "/");
            assert!(body.starts_with(&format!("server=shop/3 pid={} ", child.id())), "{body}");
        }
        assert_eq!(terminate(child), (Some(0), String::new()));
    }

    #[test]
    fn a_process_does_not_take_what_listen_fds_announces_to_its_parent() {
        let address = own_address().to_string();
        let variables = [("LISTEN_FDS", "1"), ("LISTEN_PID", "1"), ("DIST_CTL_LISTEN", &address)];
        let child = process(EXEC, &variables, Stdio::null(), Stdio::null());
        wait_for("it listens", || Client::connect(&address).is_ok());
        assert_eq!(terminate(child).0, Some(0));
    }

    #[test]
    fn a_process_takes_the_listener_on_its_stdin_and_lets_it_go() {
        let (address, stdin) = inherited();
        let child = process(EXEC, &[("DIST_CTL_LISTEN", "not read")], stdin, Stdio::null());
        let mut held = connect(address);
        assert!(get(&mut held, "/").starts_with("server=demo "));
        write!(held, "GET /slow?ms=300 HTTP/1.1\r\n\r\n").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| assert!(read_answer(&mut held).starts_with("HTTP/1.1 200 OK\r\n")));
            send(rustix::process::Signal::TERM, &child);
            // While it finishes, nobody listens there any more.
            wait_for("it stops listening", || Client::connect(address).is_err());
        });
        // Not by `terminate`: a second signal would end it with 1.
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    }

    #[test]
    fn a_process_that_cannot_listen_says_why() {
        for (name, shell, variables, code, expected) in [
            (
                "nothing said",
                EXEC,
                &[("DIST_CTL_LISTEN", "")][..],
                2,
                "the demo has no address: give it one with --listen, for example --listen :8080",
            ),
            (
                "no address",
                EXEC,
                &[("DIST_CTL_LISTEN", "127.0.0.1")],
                2,
                "DIST_CTL_LISTEN: \"127.0.0.1\" has no port, write \"127.0.0.1:8080\"",
            ),
            (
                "no number",
                "LISTEN_PID=$$ LISTEN_FDS=x exec \"$@\"",
                &[],
                1,
                "LISTEN_FDS: \"x\" is no number of descriptors",
            ),
            (
                "more than there are",
                "exec 3>&-; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
                &[],
                1,
                "LISTEN_FDS: 1 are announced, but descriptor 3 is not open",
            ),
            (
                "a file",
                "exec 3</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
                &[],
                1,
                "LISTEN_FDS: take descriptor 3: it is no socket: Socket operation on non-socket (os error 88)",
            ),
        ] {
            let child = process(shell, variables, Stdio::null(), Stdio::null());
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{name}");
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(stderr, format!("failed: {expected}\n"), "{name}");
        }
    }

    #[test]
    fn a_process_tells_its_supervisor_when_it_is_ready_and_when_it_stops() {
        let address = own_address().to_string();
        let path = env::temp_dir().join(format!("demo-notify-{}", std::process::id()));
        let named = format!("demo-notify-{}", std::process::id());
        for (place, value) in [
            (UnixSocketAddr::from_pathname(&path).unwrap(), path.to_str().unwrap().to_owned()),
            (UnixSocketAddr::from_abstract_name(&named).unwrap(), format!("@{named}")),
        ] {
            let supervisor = UnixDatagram::bind_addr(&place).unwrap();
            supervisor.set_read_timeout(Some(LONG)).unwrap();
            let variables = [("DIST_CTL_LISTEN", &*address), ("NOTIFY_SOCKET", &value)];
            let child = process(EXEC, &variables, Stdio::null(), Stdio::null());
            let receive = || {
                let mut message = [0; 64];
                let length = supervisor.recv(&mut message).unwrap();
                String::from_utf8(message[..length].to_vec()).unwrap()
            };
            assert_eq!(receive(), "READY=1");
            // Ready is no empty word.
            get(&mut connect(address.parse().unwrap()), "/");
            send(rustix::process::Signal::INT, &child);
            assert_eq!(receive(), "STOPPING=1");
            assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
        }
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_second_signal_ends_a_process_at_once() {
        let address = own_address();
        let variables = [("DIST_CTL_LISTEN", &*address.to_string())];
        let child = process(EXEC, &variables, Stdio::null(), Stdio::null());
        wait_for("it listens", || Client::connect(address).is_ok());
        let mut held = connect(address);
        write!(held, "GET /slow?ms=60000 HTTP/1.1\r\n\r\n").unwrap();
        wait_for("it is asked", || connections(&get(&mut connect(address), "/")) == 2);
        send(rustix::process::Signal::TERM, &child);
        wait_for("it stops listening", || Client::connect(address).is_err());
        let begin = BlockingInstant::now();
        assert_eq!(terminate(child).0, Some(1));
        assert!(begin.elapsed() < LONG, "{:?}", begin.elapsed());
    }
}
