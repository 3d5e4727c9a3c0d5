//! Turning a client away that has waited too long.
//!
//! It is told what the configuration says, or its connection is reset. What cannot be sent at
//! once, and the wait until the client has read it, is a task of its own: closing with
//! something unread would reset the connection, and the client might lose what it was told.
#![forbid(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::net::{SendFlags, Shutdown, send, shutdown};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// A client has so long to take what it is told, and to close.
const PATIENCE: Duration = Duration::from_secs(2);

/// A client that is turned away and has not closed its connection yet.
#[derive(Debug)]
pub struct Dismissed {
    connection: OwnedFd,
    reply: Arc<[u8]>,
    /// How much of it was sent.
    sent: usize,
}

/// Turns a client away. Gives what is left to be done for it, if anything is.
pub fn dismiss(connection: OwnedFd, reply: &Arc<[u8]>) -> Option<Dismissed> {
    if reply.is_empty() {
        // It fails only for what is no socket.
        let _ = SockRef::from(&connection).set_linger(Some(Duration::ZERO));
        return None;
    }
    let sent = match send(&connection, reply, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(sent) => sent,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        // It has left.
        Err(_) => return None,
    };
    if sent == reply.len() {
        // Its place in the list is free from here on.
        let _ = shutdown(connection.as_fd(), Shutdown::Write);
    }
    Some(Dismissed { connection, reply: Arc::clone(reply), sent })
}

impl Dismissed {
    /// Sends the rest, and waits until the client has closed, but not for ever.
    pub async fn see_off(self) {
        // Whatever fails, the connection is closed in the end, and nobody is left to be told.
        let _ = timeout(PATIENCE, self.finish()).await;
    }

    async fn finish(self) -> io::Result<()> {
        SockRef::from(&self.connection).set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(self.connection.into())?;
        if self.sent < self.reply.len() {
            stream.write_all(&self.reply[self.sent..]).await?;
            stream.shutdown().await?;
        }
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await? > 0 {}
        Ok(())
    }
}
