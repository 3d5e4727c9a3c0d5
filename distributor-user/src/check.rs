//! One check of one server: over the network, or by a command.
//!
//! A check over the network goes through the addresses of the service, as a client's connection does,
//! and is directed to the one server that it is for (`kernel/directions.rs`). It speaks with each
//! address, all at once, and the server is good if each is. What is not the server's fault, such as
//! that no port is left, is no result (`Outcome::Untried`). What the results of several checks mean
//! is decided in `health`.
#![forbid(unsafe_code)]

pub mod command;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use distributor_ebpf::contract::Directed;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::{JoinSet, spawn_local},
    time::timeout,
};

use crate::{
    address::ListenAddress,
    config::CheckKind,
    error,
    kernel::{Direction, Directions},
    launch::reason,
    server::span,
};

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Good(String),
    Bad(String),
    /// The machine lacks something for it.
    Untried(String),
}

/// A server, as it is reached over the network.
#[derive(Clone)]
pub struct Target {
    pub directions: Rc<Directions>,
    pub to: Directed,
    pub listen: Vec<ListenAddress>,
}

/// Who closes the connection first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    We,
    /// It was asked to.
    Server,
}

/// What is to be said to a server that has accepted.
#[derive(Clone, Debug)]
enum Talk {
    Nothing,
    Http { request: Vec<u8>, statuses: Vec<RangeInclusive<u16>> },
}

/// So much later than it is due, somebody else is not to blame.
const LATE: Duration = Duration::from_millis(200);

/// A server that has answered is given so long to close the connection, and is reset after that.
const FAREWELL: Duration = Duration::from_secs(1);

/// What it may send meanwhile.
const REST: u64 = 64 << 10;

/// The first line of an answer is not longer.
const HEAD: usize = 8 << 10;

/// Checks a server over the network. Inside a `LocalSet`.
pub async fn over_network(kind: &CheckKind, within: Duration, target: Target) -> Outcome {
    let talk = match kind {
        CheckKind::Http { path, host, statuses } => Talk::Http {
            request: format!(
                "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: dist-ctl\r\nAccept: */*\r\nConnection: close\r\n\r\n"
            )
            .into_bytes(),
            statuses: statuses.clone(),
        },
        CheckKind::Tcp | CheckKind::Command { .. } => Talk::Nothing,
    };
    let mut tasks = JoinSet::new();
    for (number, address) in target.listen.iter().copied().enumerate() {
        let (target, talk) = (target.clone(), talk.clone());
        tasks.spawn_local(async move { (number, one(address, &target, &talk, within).await) });
    }
    let mut outcomes = tasks.join_all().await;
    outcomes.sort_by_key(|(number, _)| *number);
    let outcomes = outcomes.into_iter().map(|(number, outcome)| (target.listen[number], outcome));
    summed_up(outcomes.collect())
}

/// The first bad one, or the first that could not be tried; else what the first one says.
fn summed_up(outcomes: Vec<(ListenAddress, Outcome)>) -> Outcome {
    let several = outcomes.len() > 1;
    let severity = |outcome: &Outcome| match outcome {
        Outcome::Bad(_) => 0,
        Outcome::Untried(_) => 1,
        Outcome::Good(_) => 2,
    };
    let worst = outcomes.into_iter().min_by_key(|(_, outcome)| severity(outcome));
    match worst {
        Some((address, Outcome::Bad(what))) if several => Outcome::Bad(format!("{what} on {address}")),
        Some((_, outcome)) => outcome,
        None => Outcome::Untried("it has no address".to_owned()),
    }
}

async fn one(address: ListenAddress, target: &Target, talk: &Talk, within: Duration) -> Outcome {
    let connection = match Connection::prepare(&address, target) {
        Ok(connection) => connection,
        Err(error) => return Outcome::Untried(format!("{error:#}")),
    };
    let begun = Instant::now();
    match timeout(within, connection.speak(talk)).await {
        Ok(outcome) => outcome,
        Err(_) => timed_out(begun.elapsed(), within, String::new()),
    }
}

/// What a check comes to that takes too long; `said`: what the server or the command has said until then.
fn timed_out(took: Duration, within: Duration, said: String) -> Outcome {
    match too_late(took, within) {
        Some(late) => Outcome::Untried(late),
        None => Outcome::Bad(format!("timed out after {}{said}", span(within))),
    }
}

/// It was to take so long at most. If it took much longer, we were stopped ourselves and have not listened.
fn too_late(took: Duration, within: Duration) -> Option<String> {
    (took > within + LATE).then(|| format!("its check was looked at {} too late", span(took - within)))
}

/// A connection of ours, before it is made.
struct Connection {
    socket: TcpSocket,
    server: SocketAddr,
    // Behind the socket, so that it is dropped after that: a client that got its port would be taken
    // for a check.
    direction: Direction,
}

/// The same when it is made.
struct Made {
    stream: TcpStream,
    _direction: Direction,
}

impl Connection {
    fn prepare(address: &ListenAddress, target: &Target) -> anyhow::Result<Self> {
        let (socket, server) = match bound(address.reached_at()) {
            // There may be no IPv6 on the loopback, where a dual-stack listener takes IPv4 all the same.
            Err(error) if lacks_ipv6(&error) && address.takes_ipv4() => {
                bound(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.socket.port()))
            }
            bound => bound,
        }
        .map_err(|error| anyhow!("open a connection of our own: {}", reason(error)))?;
        let client = socket.local_addr()?.as_socket().context("a TCP socket has an address")?;
        let direction = target.directions.direct(client, target.to)?;
        let socket = TcpSocket::from_std_stream(socket.into());
        Ok(Self { socket, server, direction })
    }

    async fn speak(self, talk: &Talk) -> Outcome {
        let Self { socket, server, direction } = self;
        let made = match socket.connect(server).await {
            Ok(stream) => Made { stream, _direction: direction },
            Err(error) => return failed(&error),
        };
        match talk {
            Talk::Nothing => {
                spawn_local(made.take_leave(First::We));
                Outcome::Good("accepts connections".to_owned())
            }
            Talk::Http { request, statuses } => made.ask(request, statuses).await,
        }
    }
}

impl Made {
    async fn ask(mut self, request: &[u8], statuses: &[RangeInclusive<u16>]) -> Outcome {
        if let Err(error) = self.stream.write_all(request).await {
            return failed(&error);
        }
        let mut answer = Vec::new();
        loop {
            let outcome = match self.stream.read_buf(&mut answer).await {
                Err(error) => Some(failed(&error)),
                Ok(0) if answer.is_empty() => {
                    Some(Outcome::Bad("closed the connection without an answer".to_owned()))
                }
                Ok(read) => judge(&answer, statuses, read == 0),
            };
            if let Some(outcome) = outcome {
                spawn_local(self.take_leave(First::Server));
                return outcome;
            }
        }
    }

    /// Lets the server close the connection, which spares it a reset. Where it does so first, nothing is
    /// left of the connection; otherwise its port stays taken for a minute (TIME_WAIT).
    async fn take_leave(mut self, first: First) {
        let leave = async {
            if first == First::We {
                // It fails if the server has reset it.
                let _ = self.stream.shutdown().await;
            }
            let _ = tokio::io::copy(&mut (&mut self.stream).take(REST), &mut tokio::io::sink()).await;
        };
        let _ = timeout(FAREWELL, leave).await;
    }
}

/// A socket that is bound where a client of this machine would connect from.
fn bound(server: SocketAddr) -> io::Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // What is not over when we are done is reset, and leaves nothing behind.
    socket.set_linger(Some(Duration::ZERO))?;
    let mut client = server;
    client.set_port(0);
    socket.bind(&client.into())?;
    Ok((socket, server))
}

fn lacks_ipv6(error: &io::Error) -> bool {
    [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT].iter().any(|it| error.raw_os_error() == Some(it.raw_os_error()))
}

/// What the first line of an answer says, if it is there. `is_all`: nothing more will come.
fn judge(answer: &[u8], statuses: &[RangeInclusive<u16>], is_all: bool) -> Option<Outcome> {
    let line = answer.iter().position(|byte| *byte == b'\n').map(|end| &answer[..=end]);
    let mut response = httparse::Response::new(&mut []);
    let parsed = response.parse(line.unwrap_or(answer));
    let no_http = || Some(Outcome::Bad("answered something that is not HTTP".to_owned()));
    match (parsed, response.code) {
        (Ok(_), Some(code)) if line.is_some() => {
            let said = format!("{code} {}", response.reason.unwrap_or_default());
            let said = said.trim_end().to_owned();
            Some(match statuses.iter().any(|range| range.contains(&code)) {
                true => Outcome::Good(said),
                false => Outcome::Bad(said),
            })
        }
        (Err(_), _) => no_http(),
        (Ok(_), _) if is_all || line.is_some() || answer.len() > HEAD => no_http(),
        (Ok(_), _) => None,
    }
}

/// Why there was no answer: by the server's fault, or the machine's.
fn failed(error: &io::Error) -> Outcome {
    let what = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "reset the connection".to_owned(),
        io::ErrorKind::BrokenPipe => "closed the connection without an answer".to_owned(),
        _ => reason(error),
    };
    match error::lacking(&error.to_string()) {
        Some(sentence) => Outcome::Untried(sentence),
        None => Outcome::Bad(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(what: &str) -> Option<Outcome> {
        Some(Outcome::Good(what.to_owned()))
    }

    fn bad(what: &str) -> Option<Outcome> {
        Some(Outcome::Bad(what.to_owned()))
    }

    #[test]
    fn an_answer_is_judged_by_its_status_as_soon_as_that_is_there() {
        let not_http = || bad("answered something that is not HTTP");
        for (answer, is_all, expected) in [
            ("HTTP/1.1 200 OK\r\n", false, good("200 OK")),
            ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", false, good("200 OK")),
            ("HTTP/1.0 204 \r\n\r\n", false, good("204")),
            ("HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", false, good("302 Found")),
            ("HTTP/1.1 404 Not Found\r\n", false, bad("404 Not Found")),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\n", false, bad("503 Service Unavailable")),
            ("", false, None),
            ("HTTP/1.1 20", false, None),
            ("HTTP/1.1 200 O", false, None),
            ("HTTP/1.1 20", true, not_http()),
            ("SSH-2.0-OpenSSH_9.2\r\n", false, not_http()),
            ("1 4711 127.0.0.1:33000\n", false, not_http()),
        ] {
            let told = judge(answer.as_bytes(), &[200..=299, 302..=302], is_all);
            assert_eq!(told, expected, "{answer:?}");
        }
    }

    #[test]
    fn whatever_comes_after_the_first_line_is_no_matter() {
        for headers in ["Set-Cookie: a=b\r\n".repeat(200), "no header\r\n".to_owned(), "\0".to_owned()] {
            let answer = format!("HTTP/1.1 200 OK\r\n{headers}\r\n");
            // In one piece, or in as many as there are bytes.
            let pieces =
                (0..=answer.len()).find_map(|end| judge(&answer.as_bytes()[..end], &[200..=299], false));
            assert_eq!(
                (pieces, judge(answer.as_bytes(), &[200..=299], false)),
                (good("200 OK"), good("200 OK"))
            );
        }
    }

    #[test]
    fn of_several_addresses_the_bad_one_decides() {
        let on = |port: u16, outcome| (format!("0.0.0.0:{port}").parse().unwrap(), outcome);
        let (fine, lacks) = (Outcome::Good("200 OK".to_owned()), Outcome::Untried("no port".to_owned()));
        let refused = Outcome::Bad("connection refused".to_owned());
        for (outcomes, expected) in [
            (vec![on(1, fine.clone()), on(2, fine.clone())], fine.clone()),
            (vec![on(1, fine.clone()), on(2, lacks.clone())], lacks.clone()),
            (
                vec![on(1, lacks), on(2, refused.clone())],
                Outcome::Bad("connection refused on 0.0.0.0:2".to_owned()),
            ),
            (vec![on(1, refused.clone())], refused),
        ] {
            assert_eq!(summed_up(outcomes), expected);
        }
    }

    #[test]
    fn who_was_stopped_himself_blames_nobody() {
        let second = Duration::from_secs(1);
        let took =
            |milliseconds| timed_out(Duration::from_millis(milliseconds), second, ": hangs".to_owned());
        assert_eq!(took(1_010), Outcome::Bad("timed out after 1s: hangs".to_owned()));
        assert_eq!(took(4_000), Outcome::Untried("its check was looked at 3s too late".to_owned()));
    }

    #[test]
    fn what_is_the_machines_fault_is_no_bad_check() {
        let of = |errno: Errno| failed(&io::Error::from_raw_os_error(errno.raw_os_error()));
        assert_eq!(of(Errno::CONNREFUSED), Outcome::Bad("connection refused".to_owned()));
        assert_eq!(of(Errno::CONNRESET), Outcome::Bad("reset the connection".to_owned()));
        assert!(matches!(of(Errno::MFILE), Outcome::Untried(_)));
    }
}
