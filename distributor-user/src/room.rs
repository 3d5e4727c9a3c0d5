//! Rooms: parked listeners of ours, in which connections wait that no server may take.
//!
//! A room that is shut down makes the kernel run `select` for each of its connections. Which
//! room is emptied, and when, is the attendant's to decide.
#![forbid(unsafe_code)]

use std::{
    io,
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use anyhow::{Context as _, bail};
use socket2::{Domain, SockRef, Socket, Type};

use crate::address::ListenAddress;

/// One parked listener.
#[derive(Debug)]
pub struct Room {
    pub fd: OwnedFd,
    /// SO_COOKIE.
    pub cookie: u64,
    /// The service's address it is parked on.
    pub group: usize,
    /// Its index in SOCKETS.
    pub index: u32,
}

impl Room {
    /// Makes the kernel move every connection that waits in it, before this returns.
    ///
    /// It cannot be used again after that. (A socket can listen again, but then the kernel looks
    /// at every socket of the port for a conflict, connections included, because it still is
    /// part of its group: `sk_reuseport_match`, Linux 6.18. A new one is spared that. Tried:
    /// with 64 connections under way, a quarter of the machine went into it.)
    pub fn empty(&self) -> io::Result<()> {
        // Not close: the keeper's duplicate would keep the listener open.
        SockRef::from(&self.fd).shutdown(Shutdown::Read)
    }

    /// Makes it a listener, and so part of the group.
    pub fn open(&self) -> io::Result<()> {
        // Who waits is accepted only to be turned away, and then may have left already.
        rustix::io::ioctl_fionbio(&self.fd, true)?;
        SockRef::from(&self.fd).listen(BACKLOG)
    }
}

/// As long as a room's accept queue may become: it matters where there is no other room, or
/// while no distributor runs. The kernel caps it at net.core.somaxconn.
pub(crate) const BACKLOG: i32 = 4096;

impl AsRawFd for Room {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Room {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Nobody listens on the address, and this machine has it.
pub fn is_free(address: &ListenAddress) -> bool {
    try_bind(address).is_ok()
}

/// Makes sure that nobody else listens on the address: a room would join his group if he
/// shares it, and take his connections.
pub fn check_free(address: &ListenAddress) -> anyhow::Result<()> {
    match try_bind(address) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder(address.socket) {
            Some(holder) => bail!(
                "listen on {address}: {holder} listens there already: stop it, or choose another address"
            ),
            None => bail!(
                "listen on {address}: somebody listens there already: find out who with \
                     ss -ltnp, stop him, or choose another address"
            ),
        },
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            bail!("listen on {address}: this machine has no such address: see ip address, and correct listen")
        }
        Err(error) => Err(error).with_context(|| format!("listen on {address}")),
    }
}

/// Listens for a moment. With SO_REUSEADDR, so that only listeners are in the way and not what
/// is left of old connections; without SO_REUSEPORT, so that every listener is.
fn try_bind(address: &ListenAddress) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address.socket), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.socket.is_ipv6() {
        socket.set_only_v6(address.v6only)?;
    }
    socket.bind(&address.socket.into())?;
    socket.listen(1)
}

/// Which process listens on an address that stands in the way of this one: `nginx (pid 12)`.
fn holder(address: SocketAddr) -> Option<String> {
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let ours = network("self")?;
    let processes: Vec<u32> = std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        // In another network namespace the same address is another one.
        .filter(|process| network(process).as_ref() == Some(&ours))
        .filter_map(|process| process.parse().ok())
        .collect();
    processes.into_iter().find_map(|process| {
        let found = crate::listener::find(&[process]).ok()?;
        let conflicts = |other: SocketAddr| {
            other.port() == address.port()
                && (other.ip() == address.ip()
                    || other.ip().is_unspecified()
                    || address.ip().is_unspecified())
        };
        found.iter().any(|found| conflicts(found.facts.address)).then(|| {
            let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("{} (pid {process})", name.trim())
        })
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_held_port_is_refused_with_the_holders_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = check_free(&address.to_string().parse().unwrap()).unwrap_err().to_string();
        let us = format!("(pid {})", std::process::id());
        assert!(error.starts_with(&format!("listen on {address}: ")) && error.contains(&us), "{error}");
    }

    #[test]
    fn a_free_port_stays_free() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        check_free(&address.to_string().parse().unwrap()).unwrap();
        TcpListener::bind(address).unwrap();
    }

    #[test]
    fn an_address_of_another_machine_is_told() {
        let error = check_free(&"192.0.2.1:80".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no such address"), "{error}");
    }
}
