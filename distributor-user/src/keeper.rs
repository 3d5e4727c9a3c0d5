//! The keeper: a process in the rooms' cgroup that makes rooms, and keeps them.
//!
//! The kernel counts only connections of sockets that were made in the service's cgroup, so
//! rooms are made by a process in there. It keeps a duplicate of each, so that who waits
//! survives the distributor, and gives them to the next one. The monitor holds the socket
//! between the two. It ends when nobody has the other end any more; then so do the rooms.
//! What it is told comes from us alone, a JSON object in each packet.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sockopt,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    address::ListenAddress,
    launcher::{bound_socket, enter},
};

/// What the monitor keeps with the socket to a keeper, for the next distributor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub service: String,
}

/// What a keeper is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Request {
    /// So many sockets that are bound to the address, of this owner.
    Make { address: ListenAddress, uid: u32, count: usize },
    /// Keep these, which come along.
    Keep { address: ListenAddress },
    /// Close these, by their cookies.
    Drop { cookies: Vec<u64> },
    /// All that are kept, and then `All` with the same number.
    All { number: u64 },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    /// Sockets, which come along.
    Sockets {
        address: ListenAddress,
        is_new: bool,
    },
    /// They cannot be made, and why.
    NotMade {
        address: ListenAddress,
        why: String,
    },
    All {
        number: u64,
    },
}

/// What [`Keeper::hear`] has heard.
#[derive(Debug)]
pub enum Heard {
    /// Sockets that were asked for: bound, and not listening.
    Made(ListenAddress, Vec<OwnedFd>),
    NotMade(ListenAddress, String),
}

/// So many sockets go into one packet. Small, so that the first ones come soon.
const BATCH: usize = 64;
/// No packet is longer: thousands of cookies fit.
const MAX_PACKET: usize = 64 * 1024;
/// So many cookies fit into one packet.
const COOKIES: usize = 2048;
/// A keeper answers within this time: a hundred times what a busy machine needs.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The other end of a keeper.
#[derive(Debug)]
pub struct Keeper(OwnedFd);

impl Keeper {
    /// Starts one in this cgroup.
    pub fn start(cgroup: &Path) -> anyhow::Result<Self> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("make a socket for the keeper")?;
        // It outlives us, and is then the monitor's child.
        Command::new("/proc/self/exe")
            .arg("keep")
            .arg(cgroup)
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()
            .context("start the keeper")?;
        Self::with(ours)
    }

    /// One that an earlier distributor started.
    pub fn with(socket: OwnedFd) -> anyhow::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true).context("talk to the keeper")?;
        Ok(Self(socket))
    }

    /// All that it keeps: in which group each is to be, and the socket. What it was asked before
    /// is forgotten.
    pub fn all(&self) -> anyhow::Result<Vec<(ListenAddress, OwnedFd)>> {
        let number = u64::from(std::process::id());
        self.ask(&Request::All { number }, &[]).context("ask the keeper for its rooms")?;
        let mut all = Vec::new();
        loop {
            self.wait()?;
            match receive(&self.0)? {
                Some((Answer::Sockets { address, is_new: false }, sockets)) => {
                    all.extend(sockets.into_iter().map(|socket| (address, socket)));
                }
                Some((Answer::All { number: its }, _)) if its == number => return Ok(all),
                // An answer to the distributor before us: these come again, as what is kept.
                Some(_) => {}
                None => bail!("the keeper is gone"),
            }
        }
    }

    /// Asks for more sockets. [`Keeper::hear`] brings them. False if that cannot be said now.
    pub fn make(&self, address: ListenAddress, uid: u32, count: usize) -> bool {
        self.ask(&Request::Make { address, uid, count }, &[]).is_ok()
    }

    /// Has it close what we have closed. Leaves in `cookies` what cannot be said now.
    pub fn drop(&self, cookies: &mut Vec<u64>) {
        while !cookies.is_empty() {
            let some = cookies[..cookies.len().min(COOKIES)].to_vec();
            let count = some.len();
            if self.ask(&Request::Drop { cookies: some }, &[]).is_err() {
                return;
            }
            cookies.drain(..count);
        }
    }

    /// Has it keep these too.
    pub fn keep(&self, address: ListenAddress, sockets: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        for sockets in sockets.chunks(BATCH) {
            self.ask(&Request::Keep { address }, sockets).context("give the keeper a room")?;
        }
        Ok(())
    }

    /// What it has said, if anything.
    ///
    /// # Errors
    /// It is gone.
    pub fn hear(&self) -> anyhow::Result<Option<Heard>> {
        loop {
            match receive(&self.0) {
                Ok(Some((Answer::Sockets { address, is_new: true }, sockets))) if sockets.is_empty() => {
                    let why = "no descriptors are left: raise the limit of open files".to_owned();
                    return Ok(Some(Heard::NotMade(address, why)));
                }
                Ok(Some((Answer::Sockets { address, is_new: true }, sockets))) => {
                    return Ok(Some(Heard::Made(address, sockets)));
                }
                Ok(Some((Answer::NotMade { address, why }, _))) => {
                    return Ok(Some(Heard::NotMade(address, why)));
                }
                Ok(Some(_)) => {}
                Ok(None) => bail!("the keeper is gone"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("hear from the keeper"),
            }
        }
    }

    /// Waits until there is something to hear.
    pub fn wait(&self) -> anyhow::Result<()> {
        let patience = Timespec::try_from(TIME_LIMIT)?;
        let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&patience))?;
        ensure!(ready > 0, "the keeper has not answered within {TIME_LIMIT:?}");
        Ok(())
    }

    fn ask(&self, request: &Request, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(&self.0, request, sockets)
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Is a keeper, in this cgroup, for whoever has the other end of standard input.
pub fn run(cgroup: &Path) -> ExitCode {
    match keep(cgroup) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dist-ctl keep: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn keep(cgroup: &Path) -> anyhow::Result<()> {
    let stdin = rustix::stdio::stdin();
    ensure!(
        sockopt::socket_type(stdin).is_ok_and(|kind| kind == SocketType::SEQPACKET),
        "this command is started by dist-ctl up, not by hand"
    );
    enter(cgroup)?;
    let mut kept: HashMap<u64, (ListenAddress, OwnedFd)> = HashMap::new();
    while let Some((request, sockets)) = receive(&stdin)? {
        match request {
            Request::Make { address, uid, count } => {
                let mut left = count;
                while left > 0 {
                    let batch = left.min(BATCH);
                    left -= batch;
                    match (0..batch).map(|_| bound_socket(&address, uid)).collect::<Result<Vec<_>, _>>() {
                        Ok(made) => {
                            answer(&Answer::Sockets { address, is_new: true }, &made)?;
                            keep_all(&mut kept, address, made)?;
                        }
                        Err(error) => {
                            answer(&Answer::NotMade { address, why: error.to_string() }, &[])?;
                            break;
                        }
                    }
                }
            }
            Request::Keep { address } => keep_all(&mut kept, address, sockets)?,
            Request::Drop { cookies } => cookies.iter().for_each(|cookie| drop(kept.remove(cookie))),
            Request::All { number } => {
                for (address, socket) in kept.values() {
                    let message = Answer::Sockets { address: *address, is_new: false };
                    send(&stdin, &message, &[socket.as_fd()])?;
                }
                answer(&Answer::All { number }, &[])?;
            }
        }
    }
    Ok(())
}

fn keep_all(
    kept: &mut HashMap<u64, (ListenAddress, OwnedFd)>,
    address: ListenAddress,
    sockets: Vec<OwnedFd>,
) -> anyhow::Result<()> {
    for socket in sockets {
        let cookie = sockopt::socket_cookie(&socket).context("read a socket's cookie")?;
        kept.insert(cookie, (address, socket));
    }
    Ok(())
}

fn answer(answer: &Answer, sockets: &[OwnedFd]) -> io::Result<()> {
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    send(&rustix::stdio::stdin(), answer, &sockets)
}

fn send(to: &impl AsFd, message: &impl Serialize, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let packet = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(sockets));
        assert!(fits, "the space is that of a batch");
    }
    loop {
        match rustix::net::sendmsg(to, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// One packet; `None` if the other end is gone.
fn receive<M: DeserializeOwned>(from: &impl AsFd) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut packet = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut into = [IoSliceMut::new(&mut packet)];
        match rustix::net::recvmsg(from, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            // What the dead end had not read is told once, ahead of the end.
            Err(Errno::CONNRESET) => return Ok(None),
            received => break received?,
        }
    };
    let mut sockets = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            sockets.extend(descriptors);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // Fewer than were sent, because this process can have no more.
        sockets.clear();
    }
    match received.bytes {
        0 => Ok(None),
        bytes => Ok(Some((serde_json::from_slice(&packet[..bytes])?, sockets))),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn ends() -> (Keeper, OwnedFd) {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        (Keeper::with(ours).unwrap(), theirs)
    }

    fn address() -> ListenAddress {
        "127.0.0.1:1".parse().unwrap()
    }

    fn some_socket() -> OwnedFd {
        rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap()
    }

    #[test]
    fn what_was_answered_to_an_earlier_distributor_is_passed_over() {
        let (keeper, theirs) = ends();
        let old = some_socket();
        send(&theirs, &Answer::Sockets { address: address(), is_new: true }, &[old.as_fd()]).unwrap();
        let number = u64::from(std::process::id());
        send(&theirs, &Answer::All { number: number + 1 }, &[]).unwrap();
        let kept = some_socket();
        send(&theirs, &Answer::Sockets { address: address(), is_new: false }, &[kept.as_fd()]).unwrap();
        send(&theirs, &Answer::All { number }, &[]).unwrap();
        let all = keeper.all().unwrap();
        let cookie = |socket: &OwnedFd| sockopt::socket_cookie(socket).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(cookie(&all[0].1), cookie(&kept));
    }

    #[test]
    fn a_keeper_that_is_gone_is_told() {
        let (keeper, theirs) = ends();
        assert!(keeper.hear().unwrap().is_none());
        drop(theirs);
        assert!(keeper.hear().unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn cookies_that_cannot_be_said_now_are_said_later() {
        let (keeper, theirs) = ends();
        let mut cookies: Vec<u64> = (0..2_000_000).collect();
        keeper.drop(&mut cookies);
        let left = cookies.len();
        assert!(left > 0, "a socket holds only so much");
        let reader = thread::spawn(move || {
            let mut dropped = Vec::new();
            while let Some((Request::Drop { cookies }, _)) = receive(&theirs).unwrap() {
                dropped.extend(cookies);
            }
            dropped
        });
        while !cookies.is_empty() {
            keeper.drop(&mut cookies);
        }
        drop(keeper);
        assert_eq!(reader.join().unwrap(), (0..2_000_000).collect::<Vec<u64>>());
    }
}
