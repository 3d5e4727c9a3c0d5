//! A flood of SYNs, and the clients who mean it beside the flood.
//!
//! The flood comes from a network of its own in which nothing is received, so no SYN-ACK is
//! answered, not even by a reset: its handshakes stay open until the kernel gives them up. The
//! others come one after the other over the loopback.

#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    fs, io,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    client::{self, Client, flag},
    network::Clients,
};

/// How the kernel answers SYNs (net.ipv4.tcp_syncookies): never by a cookie, when its queue is
/// full, or always.
pub const SYNCOOKIES: [u8; 3] = [0, 1, 2];

/// What floods are made of in tests and benchmarks.
pub const PER_SECOND: u32 = 20_000;

/// Sets it for the calling thread's network. The service must not run yet.
pub fn set_syncookies(mode: u8) -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", mode.to_string())
}

/// Where a flood comes from.
#[derive(Debug)]
pub struct Flood {
    clients: Clients,
}

impl Flood {
    /// A source number `number` (1 to 250) for the calling thread's network.
    pub fn join(number: u8) -> io::Result<Self> {
        let clients = Clients::join(number)?;
        (0..Clients::ADDRESSES).try_for_each(|client| clients.cut(client))?;
        Ok(Self { clients })
    }

    /// Sends SYNs to this port over IPv4, each from another address and port, until it is over.
    /// Gives how many.
    pub fn run(&self, port: u16, per_second: u32, over: &AtomicBool) -> io::Result<u64> {
        self.run_to(SocketAddr::new(self.clients.server_v4(), port), per_second, over)
    }

    /// The same to an address of either family, which may be behind the other end of the wire.
    pub fn run_to(&self, target: SocketAddr, per_second: u32, over: &AtomicBool) -> io::Result<u64> {
        self.clients.network.run(|| {
            let address = if target.is_ipv4() { Clients::v4 } else { Clients::v6 };
            // The port of a raw address is a protocol, or none.
            let to = SockAddr::from(SocketAddr::new(target.ip(), 0));
            let sources = (0..Clients::ADDRESSES).map(|client| {
                let address = address(&self.clients, client);
                let socket = Socket::new(Domain::for_address(target), Type::RAW, Some(Protocol::TCP))?;
                socket.bind(&SocketAddr::new(address, 0).into())?;
                Ok((address, socket))
            });
            let sources = sources.collect::<io::Result<Vec<_>>>()?;
            let start = Instant::now();
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                let due = (start.elapsed().as_secs_f64() * f64::from(per_second)) as u64;
                for number in sent..due {
                    let (address, socket) = &sources[number as usize % sources.len()];
                    let port = 1024 + (number / sources.len() as u64 % 60_000) as u16;
                    let segment = client::segment(SocketAddr::new(*address, port), target, flag::SYN);
                    socket.send_to(&segment, &to)?;
                }
                sent = due.max(sent);
                thread::sleep(Duration::from_millis(1));
            }
            Ok(sent)
        })
    }
}

/// Ends the flood with the scope that runs it, also by a panic.
#[derive(Debug)]
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Clients who come one after the other.
#[derive(Debug)]
pub struct Serial {
    address: SocketAddr,
    /// Those who hold all places, if the servers are to be full.
    held: Option<VecDeque<Client>>,
    places: usize,
}

impl Serial {
    /// With all places free.
    pub fn free(address: SocketAddr) -> Self {
        Self { address, held: None, places: 0 }
    }

    /// With all of so many places taken: each one waits, and then takes the place of whoever
    /// held one for the longest time.
    #[track_caller]
    pub fn full(address: SocketAddr, places: usize) -> Self {
        Self { address, held: Some(client::hold(address, places).into()), places }
    }

    /// The next one. How long it took until he was greeted.
    pub fn come(&mut self) -> io::Result<Duration> {
        let start = Instant::now();
        let stream = client::connect(self.address)?;
        if let Some(held) = &mut self.held
            && held.len() == self.places
        {
            held.pop_front();
        }
        let client = Client::greeted(stream)?;
        let taken = start.elapsed();
        if let Some(held) = &mut self.held {
            held.push_back(client);
        }
        Ok(taken)
    }
}
