//! Clients: new connections as fast as they are answered, and requests on a kept connection.
//!
//! A number of connections is kept in flight, so the servers and the kernel decide the pace,
//! and a slower way to connect shows as fewer connections. Each connection carries one request
//! for the demo server, which says its process in the answer and closes; as the server closes
//! first, no port of the clients is kept in TIME_WAIT.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::statistics::quantile;

/// What came of a piece of load.
pub(crate) struct Piece {
    /// From the first connect to the end of the last answer.
    took: Duration,
    /// From before each connect to the end of the answer, in microseconds, sorted.
    latencies: Vec<f64>,
    /// Connections by the process that answered.
    pub(crate) by_server: BTreeMap<i32, u64>,
}

/// A connection that is kept.
pub(crate) struct Kept {
    stream: TcpStream,
    buffer: [u8; 1024],
    /// The process that answers.
    pub(crate) server: i32,
}

/// No answer takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(10);

const CLOSING_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

/// Keeps so many connections in flight for so long: each is opened, asks, is read to its end,
/// and another one takes its place.
pub(crate) fn connect_for(address: SocketAddr, in_flight: usize, during: Duration) -> Result<Piece> {
    let threads = CLIENT_THREADS.min(in_flight);
    let ready = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..threads)
            .map(|number| {
                let share = (in_flight + number) / threads;
                let ready = &ready;
                scope.spawn(move || {
                    ready.wait();
                    client(address, share, during)
                })
            })
            .collect();
        ready.wait();
        let start = Instant::now();
        let answers = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
        let answers: Vec<Answer> = answers.collect::<Result<Vec<_>>>()?.concat();
        let took = start.elapsed();
        let mut by_server = BTreeMap::new();
        for answer in &answers {
            *by_server.entry(answer.server).or_default() += 1;
        }
        let mut latencies: Vec<f64> =
            answers.iter().map(|answer| answer.latency.as_secs_f64() * 1e6).collect();
        latencies.sort_by(f64::total_cmp);
        Ok(Piece { took, latencies, by_server })
    })
}

/// One for each CPU of a small machine; more would only fight over them.
const CLIENT_THREADS: usize = 2;

/// What became of one connection.
#[derive(Clone, Copy)]
pub(crate) struct Answer {
    /// The process that answered.
    pub(crate) server: i32,
    /// From before connect to the end of the answer.
    pub(crate) latency: Duration,
}

/// One thread's connections, in the order in which they were answered.
pub(crate) fn client(address: SocketAddr, in_flight: usize, during: Duration) -> Result<Vec<Answer>> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let open = |place: usize| -> Result<(TcpStream, Instant)> {
        let start = Instant::now();
        let mut stream = connect(address)?;
        stream.write_all(CLOSING_REQUEST).context("send a request")?;
        // Only the end of the answer is waited for: then all of it has arrived.
        let data = epoll::EventData::new_u64(place as u64);
        epoll::add(&epoll, &stream, data, epoll::EventFlags::RDHUP).context("watch a connection")?;
        Ok((stream, start))
    };
    let end = Instant::now() + during;
    let mut connections = (0..in_flight).map(|place| open(place).map(Some)).collect::<Result<Vec<_>>>()?;
    let mut left = in_flight;
    let mut answers = Vec::new();
    let mut events = Vec::with_capacity(in_flight);
    let patience = Timespec::try_from(PATIENCE).context("a time that a kernel understands")?;
    while left > 0 {
        events.clear();
        match epoll::wait(&epoll, spare_capacity(&mut events), Some(&patience)) {
            Ok(0) => bail!("no answer came in {PATIENCE:?}"),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("wait for answers"),
        }
        for event in &events {
            let place = event.data.u64() as usize;
            let (stream, start) = connections[place].take().context("a closed connection ended again")?;
            let server = read_to_end(stream)?;
            answers.push(Answer { server, latency: start.elapsed() });
            if Instant::now() < end {
                connections[place] = Some(open(place)?);
            } else {
                left -= 1;
            }
        }
    }
    Ok(answers)
}

impl Piece {
    pub(crate) fn connections(&self) -> usize {
        self.latencies.len()
    }

    /// Connections per second.
    pub(crate) fn rate(&self) -> f64 {
        self.connections() as f64 / self.took.as_secs_f64()
    }

    /// The latency, in microseconds, that a part of the connections stays below.
    pub(crate) fn latency(&self, part: f64) -> f64 {
        quantile(&self.latencies, part)
    }

    /// How much more than its share the busiest of so many servers got: 1 is none.
    pub(crate) fn unevenness(&self, servers: usize) -> f64 {
        let most = self.by_server.values().max().copied().unwrap_or(0);
        most as f64 * servers as f64 / self.connections() as f64
    }
}

impl Kept {
    pub(crate) fn open(address: SocketAddr) -> Result<Self> {
        let mut kept = Self { stream: connect(address)?, buffer: [0; 1024], server: 0 };
        let filled = kept.exchange()?;
        kept.server = server_in(&kept.buffer[..filled])?;
        Ok(kept)
    }

    /// How long one request takes.
    pub(crate) fn ask(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.exchange()?;
        Ok(start.elapsed())
    }

    /// Sends a request and reads the answer, whose length it gives. The demo server writes an
    /// answer in one piece, which is far smaller than a segment on the loopback.
    fn exchange(&mut self) -> Result<usize> {
        self.stream.write_all(REQUEST).context("send a request")?;
        let filled = self.stream.read(&mut self.buffer).context("read an answer")?;
        ensure!(self.buffer[..filled].ends_with(b"\n"), "an answer came in pieces");
        Ok(filled)
    }
}

/// The process that answered.
fn read_to_end(mut stream: TcpStream) -> Result<i32> {
    let mut buffer = [0; 1024];
    let mut filled = 0;
    loop {
        match stream.read(&mut buffer[filled..]).context("read an answer")? {
            0 => return server_in(&buffer[..filled]),
            count => filled += count,
        }
    }
}

/// A new connection. On the loopback the handshake is over before connect() would wait for it.
pub(crate) fn connect(address: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // It bounds connect() too, without the poll() that `connect_timeout` needs.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(&SockAddr::from(address)).with_context(|| format!("connect to {address}"))?;
    Ok(socket.into())
}

/// `... pid=123 ...`
fn server_in(answer: &[u8]) -> Result<i32> {
    let answer = std::str::from_utf8(answer).context("the answer is no text")?;
    let process = answer.split(' ').find_map(|word| word.strip_prefix("pid=")?.parse().ok());
    process.with_context(|| format!("the answer names no process: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_found_in_an_answer() {
        let answer = b"HTTP/1.1 200 OK\r\n\r\nserver=app/1 pid=123 client=127.0.0.1:9 connections=1\n";
        assert_eq!(server_in(answer).unwrap(), 123);
        assert!(server_in(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").is_err());
    }

    #[test]
    fn the_busiest_of_four_servers_with_all_connections_has_four_shares() {
        let piece = |by_server: &[(i32, u64)]| Piece {
            took: Duration::from_secs(1),
            latencies: vec![1.0; by_server.iter().map(|(_, count)| *count as usize).sum()],
            by_server: by_server.iter().copied().collect(),
        };
        assert_eq!(piece(&[(7, 40)]).unevenness(4), 4.0);
        assert_eq!(piece(&[(1, 10), (2, 10), (3, 10), (4, 10)]).unevenness(4), 1.0);
    }
}
