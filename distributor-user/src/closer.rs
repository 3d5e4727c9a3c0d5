//! Closing the connections of one server from outside, as a reset (SOCK_DESTROY).
//!
//! Asks the kernel for the service's connections and destroys those of one slot: by their tags, or
//! by OWNERS for those that waited or moved. The kernel tells both ends, and counts them down as
//! ever. It takes its time, so it works in a thread of its own.
#![forbid(unsafe_code)]

use std::{io, path::Path, thread};

use anyhow::{Context as _, bail};
use rustix::io::Errno;

use crate::{
    address::ListenAddress,
    drift::owner_by,
    kernel::Ledger,
    sock_diag::{self, States},
};

/// Closes what the slot has, aside, and tells how many connections that were, or why it failed.
pub fn close_aside(
    pins: &Path,
    listen: &[ListenAddress],
    slot: u32,
    tell: impl FnOnce(anyhow::Result<usize>) + Send + 'static,
) -> io::Result<()> {
    let (pins, listen) = (pins.to_owned(), listen.to_vec());
    thread::Builder::new().name("closer".to_owned()).spawn(move || tell(close(&pins, &listen, slot)))?;
    Ok(())
}

fn close(pins: &Path, listen: &[ListenAddress], slot: u32) -> anyhow::Result<usize> {
    let ledger = Ledger::open(pins)?;
    let mut its = Vec::new();
    sock_diag::sockets(listen, States::Connections, Some(ledger.tags()), |socket| {
        let owner = |tag| ledger.owner(socket.cookie).map_or_else(|| owner_by(&tag), |owner| owner.owner);
        if socket.tag.map(owner) == Some(slot) {
            its.push(socket);
        }
    })
    .context("ask the kernel for its sockets (sock_diag)")?;
    destroy(&its)
}

/// Closes these, and gives how many were there still.
pub fn destroy(connections: &[sock_diag::Socket]) -> anyhow::Result<usize> {
    match sock_diag::destroy(connections) {
        Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
            bail!("this kernel does not close connections for others (CONFIG_INET_DIAG_DESTROY)")
        }
        closed => closed.context("have the kernel close a connection (SOCK_DESTROY)"),
    }
}
