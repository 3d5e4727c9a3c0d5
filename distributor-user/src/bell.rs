//! The bell: waking a server to which the kernel has moved connections without a word.
//!
//! Kernels without "tcp: call sk_data_ready() after listener migration" (CVE-2026-46015) move a
//! connection into a server's accept queue and do not wake the server. [`is_needed`] finds out
//! by doing it once. [`Bell::ring`] then wakes the server by a connection of our own, which `select`
//! steers to that listener by its client address, and which is reset at once and not counted.
#![forbid(unsafe_code)]

use std::{
    env, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use distributor_ebpf::contract;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::{
    address::ListenAddress,
    kernel::{self, Probe},
};

/// "on" and "off" decide what is otherwise found out. For tests, and for kernels that change
/// their mind.
pub const FORCE: &str = "DIST_CTL_BELL";

/// A kernel that wakes does so before shutdown() returns.
const WAKES_WITHIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// How long a connection of the loopback may take to its accept queue on the slowest machine.
const QUEUED_WITHIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// On the loopback a handshake is over at once, unless the accept queue is full; then the
/// server has been woken before.
const PATIENCE: Duration = Duration::from_millis(50);

/// Whether this kernel moves connections without waking their new server.
///
/// Once known, that is pinned below `pins`: a distributor that takes over has no time to try it
/// again, and the kernel that forgets it is another one.
pub fn is_needed(pins: &Path) -> anyhow::Result<bool> {
    match env::var(FORCE).as_deref() {
        Ok("on") => return Ok(true),
        Ok("off") => return Ok(false),
        _ => {}
    }
    if let Some(wakes) = kernel::remembered_wakes(pins) {
        return Ok(!wakes);
    }
    let moves = moves().context("find out whether a moved connection wakes its server")?;
    ensure!(
        moves != Moves::Not,
        "this kernel does not move the connections of a listener that closes to another one: dist-ctl needs \
         Linux 6.1 or later"
    );
    let wakes = moves == Moves::AndWakes;
    kernel::remember_wakes(pins, wakes)?;
    Ok(!wakes)
}

/// What a kernel does with the connections of a listener that closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moves {
    /// They are lost.
    Not,
    /// They go to another listener, of which nobody is told.
    Silently,
    /// They go to another listener, and who waits there is woken.
    AndWakes,
}

/// Moves a connection between two listeners of our own, on a port of the kernel's choice.
pub fn moves() -> anyhow::Result<Moves> {
    let listener = |address: SocketAddr| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(1)?;
        io::Result::Ok(socket)
    };
    let old = listener(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let address = old.local_addr()?.as_socket().context("a TCP socket has an address")?;
    let mut probe = Probe::load()?;
    probe.attach(&old)?;
    let new = listener(address)?;
    // The first is chosen as long as it is there.
    probe.choose([old.as_fd(), new.as_fd()])?;
    let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    client.connect_timeout(&address.into(), Duration::from_secs(1))?;
    // On the client's side the handshake is over a moment earlier, and what has not come to the accept
    // queue yet is not moved by shutdown().
    let mut queued = [PollFd::new(&old, PollFlags::IN)];
    let is_queued = poll(&mut queued, Some(&QUEUED_WITHIN))? > 0;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &new, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    old.shutdown(std::net::Shutdown::Read)?;
    let mut events = Vec::with_capacity(1);
    epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&WAKES_WITHIN))?;
    if !events.is_empty() {
        return Ok(Moves::AndWakes);
    }
    // Then nothing was there to be moved, and it is better to ring for nothing than not to.
    if !is_queued {
        return Ok(Moves::Silently);
    }
    new.set_nonblocking(true)?;
    match new.accept() {
        Ok(_) => Ok(Moves::Silently),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Moves::Not),
        Err(error) => Err(error).context("accept the connection that was moved"),
    }
}

/// A port that nobody else gets while this is there.
#[derive(Debug)]
pub struct Port(#[expect(dead_code, reason = "it is only to be open")] Socket);

/// A bell that is not rung yet: its client address is known.
pub struct Bell {
    socket: Socket,
    /// Keeps others from its port, when the connection is gone.
    port: Port,
    target: SockAddr,
    /// Where it comes from.
    client: SocketAddr,
}

/// A bell for the servers at this address.
pub fn prepare(address: &ListenAddress) -> io::Result<Bell> {
    let target = address.reached_at();
    let socket = |port| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(target.ip(), port).into())?;
        io::Result::Ok(socket)
    };
    let port = socket(0)?;
    let client = port.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    Ok(Bell { socket: socket(client.port())?, port: Port(port), target: target.into(), client })
}

impl Bell {
    /// Its client address, as the programs know it.
    pub fn key(&self) -> u64 {
        let port = u32::from(self.client.port());
        match self.client.ip() {
            IpAddr::V4(ip) => contract::client([u32::from_ne_bytes(ip.octets()), 0, 0, 0], port),
            IpAddr::V6(ip) => {
                let mut words = [0; 4];
                for (word, bytes) in words.iter_mut().zip(ip.octets().chunks_exact(4)) {
                    *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
                contract::client(words, port)
            }
        }
    }

    /// Rings it: the server is woken when the handshake is complete.
    ///
    /// At the server's end that is a moment later than at ours. Until then the programs have to know the
    /// connection, and nobody else may come from there.
    pub fn ring(self) -> (Port, io::Result<()>) {
        let rung = self.socket.connect_timeout(&self.target, PATIENCE);
        // Reset, so that the server has nothing to wait for.
        let rung = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO)).and(rung);
        (self.port, rung)
    }
}
