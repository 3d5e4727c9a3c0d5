//! The distributor's end of its conversation with the monitor.
//!
//! Sends what the monitor is to do, and passes on what it tells. Numbers children and held
//! descriptors so that no number is ever used twice, by this distributor or a later one.
#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    time::{ClockId, clock_gettime},
};
use tracing::warn;

use crate::{
    message::{Channel, Exit, FromMonitor, ToMonitor},
    watch::Watch,
};

/// The conversation.
pub struct Link {
    channel: Channel,
    next: u64,
    /// The monitor did not hear what it was told last.
    broken: Cell<bool>,
}

/// What an earlier distributor left with the monitor.
#[derive(Debug, Default)]
pub struct Inheritance {
    pub children: Vec<Child>,
    pub held: Vec<Held>,
    /// Another program was to take over, and ended so before it was ready.
    pub not_replaced: Option<Exit>,
    /// The monitor was asked to stop before we began.
    pub stop: bool,
}

impl Inheritance {
    /// There was no distributor before us.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty() && self.held.is_empty()
    }
}

/// A child that was started by an earlier distributor.
#[derive(Debug)]
pub struct Child {
    pub id: u64,
    pub pid: u32,
    pub label: Vec<u8>,
    /// It has ended, and nobody has dealt with that.
    pub exit: Option<Exit>,
}

/// A descriptor that an earlier distributor gave to hold.
#[derive(Debug)]
pub struct Held {
    pub key: u64,
    pub label: Vec<u8>,
    pub fd: OwnedFd,
}

impl Link {
    /// Takes the channel over from the standard input, and listens to what there is from before.
    pub fn open() -> anyhow::Result<(Self, Inheritance)> {
        let channel = Channel::from_stdin()
            .context("talk to the monitor: this command is started by dist-ctl up, not by hand")?;
        let mut inheritance = Inheritance::default();
        loop {
            let received = match channel.receive() {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    not_understood(&error);
                    continue;
                }
                received => received.context("hear from the monitor")?,
            };
            match received {
                Some((FromMonitor::Begin, _)) => break,
                Some((FromMonitor::Child { id, pid, label }, _)) => {
                    inheritance.children.push(Child { id, pid, label, exit: None });
                }
                Some((FromMonitor::Exited { id, exit, .. }, _)) => {
                    if let Some(child) = inheritance.children.iter_mut().find(|child| child.id == id) {
                        child.exit = Some(exit);
                    }
                }
                Some((FromMonitor::Held { key, label }, Some(fd))) => {
                    inheritance.held.push(Held { key, label, fd });
                }
                Some((FromMonitor::NotReplaced { exit }, _)) => inheritance.not_replaced = Some(exit),
                Some((FromMonitor::Stop, _)) => inheritance.stop = true,
                Some(_) => {}
                None => bail!("hear from the monitor: it is gone"),
            }
        }
        channel.set_nonblocking().context("talk to the monitor")?;
        // Nanoseconds since the boot, so above every number of an earlier distributor.
        let now = clock_gettime(ClockId::Monotonic);
        let next = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        Ok((Self { channel, next, broken: Cell::new(false) }, inheritance))
    }

    /// A number that was never used.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Sends one message. The monitor never waits for us, so a full socket empties soon.
    pub fn send(&self, message: &ToMonitor, fd: Option<BorrowedFd<'_>>) -> anyhow::Result<()> {
        loop {
            match self.channel.send(message, fd) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
                    let channel = self.channel.as_fd();
                    if poll(&mut [PollFd::new(&channel, PollFlags::OUT)], Some(&patience))? == 0 {
                        bail!("talk to the monitor: it has not listened for {} s", patience.tv_sec);
                    }
                }
                sent => {
                    self.broken.set(sent.is_err());
                    return sent.context("talk to the monitor");
                }
            }
        }
    }

    /// The monitor could not be told something: it is gone, as `receive` will say.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Something that tells when `receive` is worth calling.
    pub fn watch(&self) -> io::Result<Watch> {
        Watch::new(self.channel.as_fd())
    }

    /// The next message, or `None` if there is none now.
    ///
    /// # Errors
    /// The monitor is gone.
    pub fn receive(&self) -> anyhow::Result<Option<FromMonitor>> {
        match self.channel.receive() {
            Ok(Some((message, _))) => Ok(Some(message)),
            Ok(None) => bail!(
                "the monitor is gone: servers and kernel go on, and nobody watches them until the next \
                 dist-ctl up on this runtime directory"
            ),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                not_understood(&error);
                self.receive()
            }
            Err(error) => Err(error).context("hear from the monitor"),
        }
    }
}

/// The monitor may be newer than we are, and know more messages.
fn not_understood(error: &io::Error) {
    warn!("the monitor sent {error}: it is ignored");
}
