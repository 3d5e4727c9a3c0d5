//! Clients: connections that are held, that come all at once, and that end in every way.
//!
//! The test server greets every connection with one line (its name, its process, and the
//! client's address), so a client knows who serves it, and obeys a few words that make it
//! end the connection in its own way.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream},
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::wait::seconds;

/// No connection of a test is silent for longer.
pub fn patience() -> Duration {
    seconds(20.0)
}

/// A connection to a test server that has greeted.
#[derive(Debug)]
pub struct Client {
    pub stream: TcpStream,
    /// The name the server was started with.
    pub server: String,
    /// The process that accepted.
    pub pid: i32,
    /// Our address, as the server saw it.
    pub seen_as: SocketAddr,
}

impl Client {
    /// Connects, and reads the greeting.
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        Self::greeted(connect(address)?)
    }

    /// The same from a certain address of ours.
    pub fn open_from(source: IpAddr, address: SocketAddr) -> io::Result<Self> {
        Self::greeted(connect_from(source, address)?)
    }

    /// Reads the greeting of a connection.
    pub fn greeted(mut stream: TcpStream) -> io::Result<Self> {
        let line = read_line(&mut stream)?;
        let mut words = line.split(' ');
        let mut word = || words.next().ok_or_else(|| not_a_greeting(&line));
        let server = word()?.to_owned();
        let pid = word()?.parse().map_err(|_| not_a_greeting(&line))?;
        let seen_as: SocketAddr = word()?.parse().map_err(|_| not_a_greeting(&line))?;
        // A listener for both families sees 10.0.0.1 as ::ffff:10.0.0.1.
        let seen_as = SocketAddr::new(seen_as.ip().to_canonical(), seen_as.port());
        Ok(Self { stream, server, pid, seen_as })
    }

    /// Tells the server a word: see `bin/server.rs`.
    pub fn say(&mut self, word: &str) -> io::Result<()> {
        self.stream.write_all(format!("{word}\n").as_bytes())
    }

    /// The server still answers on this connection.
    pub fn is_served(&mut self) -> bool {
        self.say("who").is_ok() && read_line(&mut self.stream).is_ok()
    }

    /// Closes it by a reset.
    pub fn reset(self) -> io::Result<()> {
        reset(self.stream)
    }

    /// Reads until the server closes.
    pub fn wait_for_end(&mut self) -> io::Result<()> {
        self.stream.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// Connects without expecting a greeting.
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, patience())?;
    set_patience(&stream)?;
    Ok(stream)
}

/// The same from a certain address of ours.
pub fn connect_from(source: IpAddr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = new_socket(address)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect_timeout(&address.into(), patience())?;
    let stream = TcpStream::from(socket);
    set_patience(&stream)?;
    Ok(stream)
}

/// Says something long that the server is to send back, at once and whether or not somebody
/// serves the connection yet, and reads the greeting and the answer.
pub fn echo(stream: TcpStream, said: &[u8]) -> io::Result<Client> {
    let (mut writer, mut line) = (stream.try_clone()?, format!("echo {}\n", said.len()).into_bytes());
    thread::scope(|scope| {
        let saying = scope.spawn(move || {
            line.extend(said);
            writer.write_all(&line)
        });
        let mut client = Client::greeted(stream)?;
        let mut heard = vec![0; said.len()];
        client.stream.read_exact(&mut heard)?;
        saying.join().expect("writing does not panic")?;
        match said.iter().zip(&heard).position(|(said, heard)| said != heard) {
            Some(at) => Err(io::Error::other(format!("byte {at} of {} came back changed", said.len()))),
            None => Ok(client),
        }
    })
}

/// Closes a connection by a reset.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    Socket::from(stream).set_linger(Some(Duration::ZERO))
}

/// Something to read has arrived, and stays.
pub fn is_greeted(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("look without waiting");
    let greeted = stream.peek(&mut [0]).is_ok_and(|bytes| bytes > 0);
    stream.set_nonblocking(false).expect("wait again");
    greeted
}

/// Opens so many connections, one after the other, without expecting a greeting. They go to the
/// addresses by turns.
#[track_caller]
pub fn stand(addresses: &[SocketAddr], count: usize) -> Vec<TcpStream> {
    on_one_cpu(|| connect_in_turn(addresses, count))
}

/// Does something on one CPU, the same for all who ask. See [`on_cpu`].
pub fn on_one_cpu<T>(work: impl FnOnce() -> T) -> T {
    on_cpu(0, work)
}

/// Does something on one of the CPUs that there are, by a number that may be larger.
///
/// The last segment of a handshake waits for its turn on the CPU that sent it, also when the client
/// believes to be connected. A segment from another CPU can be faster, and then that client came first.
pub fn on_cpu<T>(number: usize, work: impl FnOnce() -> T) -> T {
    let all = sched_getaffinity(None).expect("read the mask of CPUs");
    let number = number % all.count() as usize;
    let mut one = CpuSet::new();
    one.set((0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).nth(number).expect("there is a CPU"));
    sched_setaffinity(None, &one).expect("stay on one CPU");
    let done = work();
    sched_setaffinity(None, &all).expect("run on all CPUs again");
    done
}

#[track_caller]
fn connect_in_turn(addresses: &[SocketAddr], count: usize) -> Vec<TcpStream> {
    let addresses = addresses.iter().cycle().take(count);
    let connections = addresses.enumerate().map(|(number, address)| {
        connect(*address)
            .unwrap_or_else(|error| panic!("connection {number} of {count} to {address}: {error}"))
    });
    connections.collect()
}

/// Clients who wait in line, and those who hold the places for which they wait.
///
/// A place becomes free when [`Line::free`] says so and not before. So where each is given away
/// before the next becomes free, the order of the greetings is that of the service, whatever
/// the number of servers.
#[derive(Debug)]
pub struct Line {
    epoll: OwnedFd,
    /// By their number in line.
    waiting: BTreeMap<usize, TcpStream>,
    /// Whoever was greeted first, first.
    pub served: VecDeque<Client>,
}

impl Line {
    /// Those who wait are numbered in the order in which they stand here.
    pub fn behind(served: Vec<Client>, waiting: Vec<TcpStream>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, stream) in waiting.iter().enumerate() {
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, stream, data, epoll::EventFlags::IN)?;
        }
        Ok(Self { epoll, waiting: waiting.into_iter().enumerate().collect(), served: served.into() })
    }

    /// How many have not heard anything.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Somebody hears something within this time.
    pub fn is_stirring(&self, within: Duration) -> bool {
        let timeout = Timespec::try_from(within).expect("a deadline is not that far away");
        let mut wanted = [PollFd::from_borrowed_fd(self.epoll.as_fd(), PollFlags::IN)];
        poll(&mut wanted, Some(&timeout)).is_ok_and(|ready| ready > 0)
    }

    /// The next who hears anything, be it the end: his number and his connection.
    pub fn stir(&mut self) -> io::Result<(usize, TcpStream)> {
        // One at a time, in the order in which they became ready.
        let mut events = Vec::with_capacity(1);
        let timeout = Timespec::try_from(patience()).expect("a deadline is not that far away");
        epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout))?;
        let number = events.first().ok_or(io::ErrorKind::TimedOut)?.data.u64() as usize;
        let stream = self.waiting.remove(&number).expect("whoever has left the line is not watched");
        epoll::delete(&self.epoll, &stream)?;
        Ok((number, stream))
    }

    /// The number of the next who is served. He holds the place from now on.
    pub fn serve(&mut self) -> io::Result<usize> {
        let (number, stream) = self.stir()?;
        let client = Client::greeted(stream)
            .map_err(|error| io::Error::other(format!("number {number} in line: {error}")))?;
        self.served.push_back(client);
        Ok(number)
    }

    /// Whoever holds a place the longest leaves it.
    pub fn free(&mut self) {
        drop(self.served.pop_front().expect("somebody holds a place"));
    }

    /// Frees so many places, one after the other, and gives the numbers of those who got them.
    pub fn turns(&mut self, count: usize) -> io::Result<Vec<usize>> {
        (0..count)
            .map(|_| {
                self.free();
                self.serve()
            })
            .collect()
    }
}

/// Opens so many connections, one after the other, and holds them.
#[track_caller]
pub fn hold(address: SocketAddr, count: usize) -> Vec<Client> {
    (0..count)
        .map(|number| {
            Client::open(address)
                .unwrap_or_else(|error| panic!("connection {number} of {count} to {address}: {error}"))
        })
        .collect()
}

/// Handshakes that were begun and have not ended: see [`begin`].
#[derive(Debug)]
pub struct Begun(Vec<Socket>);

/// Sends so many SYNs without waiting for any answer, from several threads at once.
pub fn begin(address: SocketAddr, source: Option<IpAddr>, count: usize) -> io::Result<Begun> {
    const THREADS: usize = 4;
    // All sockets are there before the first SYN, so that nothing but connect() is between
    // two of them.
    let sockets = (0..count)
        .map(|_| {
            let socket = new_socket(address)?;
            if let Some(source) = source {
                socket.bind(&SocketAddr::new(source, 0).into())?;
            }
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .collect::<io::Result<Vec<_>>>()?;
    let target = SockAddr::from(address);
    thread::scope(|scope| {
        let chunks = sockets.chunks(count.div_ceil(THREADS).max(1));
        let threads: Vec<_> = chunks
            .map(|chunk| {
                let target = &target;
                scope.spawn(move || {
                    chunk.iter().try_for_each(|socket| match socket.connect(target) {
                        Err(error) if error.raw_os_error() == Some(IN_PROGRESS) => Ok(()),
                        other => other,
                    })
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("connecting does not panic"))
    })?;
    Ok(Begun(sockets))
}

impl Begun {
    /// How many have ended by now, well or not.
    pub fn ended(&self) -> usize {
        let now = Duration::ZERO;
        self.0.iter().filter(|socket| is_writable(socket, now)).count()
    }

    /// Waits for the end of every handshake, well or not.
    pub fn finish(self) -> Vec<io::Result<TcpStream>> {
        let deadline = Instant::now() + patience();
        self.0
            .into_iter()
            .map(|socket| {
                let left = deadline.saturating_duration_since(Instant::now());
                if !is_writable(&socket, left) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                if let Some(error) = socket.take_error()? {
                    return Err(error);
                }
                socket.set_nonblocking(false)?;
                let stream = TcpStream::from(socket);
                set_patience(&stream)?;
                Ok(stream)
            })
            .collect()
    }

    /// Waits until every one of them is served, and holds them.
    #[track_caller]
    pub fn greeted(self) -> Vec<Client> {
        let count = self.0.len();
        self.finish()
            .into_iter()
            .enumerate()
            .map(|(number, stream)| {
                stream.and_then(Client::greeted).unwrap_or_else(|error| {
                    panic!("connection {number} of {count} that came together: {error}")
                })
            })
            .collect()
    }
}

/// The flags of a TCP segment.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const PSH: u8 = 1 << 3;
    pub const ACK: u8 = 1 << 4;
}

/// Sends one TCP segment that belongs to no connection, from 127.0.0.1.
pub fn send_segment(source_port: u16, target: SocketAddrV4, flags: u8) -> io::Result<()> {
    let source = SocketAddrV4::new(Ipv4Addr::LOCALHOST, source_port);
    let segment = segment(source.into(), target.into(), flags);
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.send_to(&segment, &SocketAddr::from(target).into()).map(drop)
}

/// A TCP segment without data, between two addresses of one family.
pub fn segment(source: SocketAddr, target: SocketAddr, flags: u8) -> [u8; 20] {
    const WORDS_OF_HEADER: u8 = 5;
    const TCP: u8 = 6;
    let mut segment = [0u8; 20];
    segment[0..2].copy_from_slice(&source.port().to_be_bytes());
    segment[2..4].copy_from_slice(&target.port().to_be_bytes());
    segment[4..12].copy_from_slice(b"seq.ack.");
    segment[12] = WORDS_OF_HEADER << 4;
    segment[13] = flags;
    // The sum is over the addresses, the protocol and the length as well. Where the last two
    // stand among the words makes no difference to it.
    let mut pseudo = vec![0, TCP, 0, segment.len() as u8];
    for address in [source.ip(), target.ip()] {
        match address {
            IpAddr::V4(address) => pseudo.extend(address.octets()),
            IpAddr::V6(address) => pseudo.extend(address.octets()),
        }
    }
    let words = pseudo.chunks(2).chain(segment.chunks(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    // Fewer than 2^16 words, so what is carried over is carried over once more at most.
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    segment[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    segment
}

/// How many of these each process serves.
pub fn by_process<'a>(clients: impl IntoIterator<Item = &'a Client>) -> BTreeMap<i32, usize> {
    let mut counts = BTreeMap::new();
    for client in clients {
        *counts.entry(client.pid).or_default() += 1;
    }
    counts
}

/// How many of these each name serves.
pub fn by_name<'a>(clients: impl IntoIterator<Item = &'a Client>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for client in clients {
        *counts.entry(client.server.clone()).or_default() += 1;
    }
    counts
}

/// Does the numbered pieces of work in so many threads, and returns the first failure.
pub fn in_threads(
    threads: usize,
    work: Range<usize>,
    each: impl Fn(usize) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = AtomicUsize::new(work.start);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= work.end {
                            return Ok(());
                        }
                        each(number)?;
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// A way in which a connection ends that the client or the test server brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    ClientCloses,
    ServerCloses,
    BothClose,
    ClientResets,
    ServerResets,
    ClientHalfCloses,
    ServerHalfCloses,
    /// The client closes while something it has not read waits: its kernel sends a reset.
    ClientClosesUnread,
    /// The server closes while something it has not read waits.
    ServerClosesUnread,
    /// Reset right after the handshake, often before the server accepts.
    ResetAtOnce,
    /// Closed right after the handshake, often before the server accepts.
    ClosedAtOnce,
}

impl Ending {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::ClientCloses,
        Self::ServerCloses,
        Self::BothClose,
        Self::ClientResets,
        Self::ServerResets,
        Self::ClientHalfCloses,
        Self::ServerHalfCloses,
        Self::ClientClosesUnread,
        Self::ServerClosesUnread,
        Self::ResetAtOnce,
        Self::ClosedAtOnce,
    ];

    /// Opens a connection, and ends it in this way.
    pub fn happen(self, address: SocketAddr) -> io::Result<()> {
        match self {
            Self::ClientCloses => Client::open(address).map(drop),
            Self::ServerCloses => {
                let mut client = Client::open(address)?;
                client.say("close")?;
                client.wait_for_end()
            }
            Self::BothClose => {
                let mut client = Client::open(address)?;
                client.say("close")
            }
            Self::ClientResets => Client::open(address)?.reset(),
            Self::ServerResets => {
                let mut client = Client::open(address)?;
                client.say("reset")?;
                expect_reset(client.wait_for_end())
            }
            Self::ClientHalfCloses => {
                let mut client = Client::open(address)?;
                client.stream.shutdown(Shutdown::Write)?;
                client.wait_for_end()
            }
            Self::ServerHalfCloses => {
                let mut client = Client::open(address)?;
                client.say("half")?;
                client.wait_for_end()
            }
            Self::ClientClosesUnread => {
                let mut client = Client::open(address)?;
                client.say("who")?;
                // The answer is there when one byte of it is.
                client.stream.read_exact(&mut [0])
            }
            Self::ServerClosesUnread => {
                let mut client = Client::open(address)?;
                client.say(&format!("unread {}", "x".repeat(1000)))?;
                expect_reset(client.wait_for_end())
            }
            // From another CPU, the reset might be faster than the segment that completes the handshake.
            Self::ResetAtOnce => on_one_cpu(|| reset(connect(address)?)),
            Self::ClosedAtOnce => connect(address).map(drop),
        }
    }
}

const IN_PROGRESS: i32 = 115;

fn new_socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
}

fn set_patience(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(patience()))?;
    stream.set_write_timeout(Some(patience()))
}

fn is_writable(socket: &Socket, within: Duration) -> bool {
    let timeout = Timespec::try_from(within).expect("a deadline is not that far away");
    let mut wanted = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
    poll(&mut wanted, Some(&timeout)).is_ok_and(|ready| ready > 0)
}

fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        // Byte by byte, so that nothing behind the line is taken.
        stream.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => break,
            [byte] => line.push(byte),
        }
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn not_a_greeting(line: &str) -> io::Error {
    io::Error::other(format!("not a test server's greeting: {line:?}"))
}

fn expect_reset(end: io::Result<()>) -> io::Result<()> {
    match end {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Err(io::Error::other("expected a reset, and it was closed")),
    }
}
