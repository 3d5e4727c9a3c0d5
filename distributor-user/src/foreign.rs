//! Servers that somebody else started: their listeners, made fit for a group, and given back.
//!
//! Takes a process, gives duplicates of its listeners, the cgroup in which their connections are
//! counted, and the connections from before. It changes sockets of others (options and owner), says
//! what was there before, and restores that. It decides nothing, and touches no map. In which order
//! all is to be done stands in ARCHITECTURE.md.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashSet},
    fs, io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    fs::Uid,
    net::{getsockname, sockopt},
};
use serde::{Deserialize, Serialize};

use crate::{
    address::ListenAddress,
    cgroup::{self, Cgroup},
    kernel,
    listener::{self, Facts, Found, Verdict},
    sock_diag::{self, States},
};

/// A listener that was found.
#[derive(Debug)]
pub struct Foreign {
    /// A duplicate. While it is open, the listener outlives its processes.
    pub fd: OwnedFd,
    /// SO_COOKIE.
    pub cookie: u64,
    pub facts: Facts,
    /// Which of the service's addresses it listens on.
    pub address: usize,
}

/// A server's listeners and processes.
#[derive(Debug)]
pub struct Server {
    pub listeners: Vec<Foreign>,
    /// Those who hold one of the listeners, and their descendants: any of them may have its
    /// connections.
    pub processes: Vec<u32>,
    /// The one of them that has a listener, and from which the others that have one come.
    pub main: u32,
}

/// What a socket was like before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    pub reuse_address: bool,
    pub reuse_port: bool,
    pub uid: u32,
    /// Cookies of its connections that had no SO_REUSEADDR.
    pub connections: BTreeSet<u64>,
}

/// Connections that were there before their listener was adopted. `track` knows nothing of them:
/// they are counted neither now nor when they close.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlierConnections(HashSet<u64>);

/// Finds the listeners of a process on the service's addresses, and of those that share them or
/// descend from it: the workers of one that forks before it accepts have them in common. `ours` are
/// left out.
///
/// # Errors
/// A sentence: there is no such process, it is ours, it has no such listener, or one that cannot be
/// steered.
pub fn find(process: u32, listen: &[ListenAddress], ours: &[u32]) -> anyhow::Result<Server> {
    let Ok(name) = name(process) else { bail!("adopt process {process}: there is none") };
    let described = format!("adopt process {process} ({name})");
    ensure!(!ours.contains(&process), "{described}: it is a server or a part of this dist-ctl already");
    ensure!(
        network(&process.to_string()) == network("thread-self"),
        "{described}: it lives in another network namespace: run dist-ctl in there"
    );
    let mut processes = family(process, ours);
    let (mut steerable, mut elsewhere) = sorted(&processes, listen, &described)?;
    // Its parent and its siblings may share them.
    let inodes: HashSet<u64> = steerable.iter().filter_map(|listener| inode(&listener.fd)).collect();
    if !inodes.is_empty() {
        processes.extend(holders(&inodes, ours));
        processes = descendants(&processes, ours);
        (steerable, elsewhere) = sorted(&processes, listen, &described)?;
    }
    if steerable.is_empty()
        && let Some(parent) = parent(process).filter(|parent| *parent > 1 && !ours.contains(parent))
        && let Ok(found) = find(parent, listen, ours)
        && found.main == parent
    {
        // Its parent listens, and passes connections on to it.
        return Ok(found);
    }
    if steerable.is_empty() {
        let wanted: Vec<String> = listen.iter().map(ToString::to_string).collect();
        let wanted = wanted.join(" and ");
        if elsewhere.is_empty() {
            bail!("{described}: it does not listen, the service listens on {wanted}");
        }
        let elsewhere: Vec<String> = elsewhere.iter().map(ToString::to_string).collect();
        bail!("{described}: it listens on {}, the service on {wanted}", elsewhere.join(" and "));
    }
    let main = main_of(process, &processes, &steerable);
    Ok(Server { listeners: steerable, processes, main })
}

/// A process, and all that descend from it, but for `ours`.
pub fn family(process: u32, ours: &[u32]) -> Vec<u32> {
    descendants(&[process], ours)
}

/// The one that has a listener, as have all others that do and descend from it: the eldest above the
/// one that was named, if that has any.
fn main_of(named: u32, processes: &[u32], listeners: &[Foreign]) -> u32 {
    let has_one = |process: &u32| {
        let found = listener::find(&[*process]).unwrap_or_default();
        found.iter().any(|found| listeners.iter().any(|listener| listener.cookie == found.cookie))
    };
    let holders: Vec<u32> = processes.iter().copied().filter(has_one).collect();
    let is_eldest = |process: &u32| parent(*process).is_none_or(|parent| !holders.contains(&parent));
    let mut main = Some(named).filter(|named| holders.contains(named));
    main = main.or_else(|| holders.iter().copied().find(is_eldest));
    let mut main = main.unwrap_or(named);
    while let Some(parent) = parent(main).filter(|parent| holders.contains(parent)) {
        main = parent;
    }
    main
}

/// Those that can be steered, and where the others listen.
fn sorted(
    processes: &[u32],
    listen: &[ListenAddress],
    described: &str,
) -> anyhow::Result<(Vec<Foreign>, Vec<SocketAddr>)> {
    let (mut steerable, mut elsewhere) = (Vec::new(), Vec::new());
    for Found { fd, cookie, facts } in listener::find(processes).context("look for its listeners")? {
        // These two are ours to change.
        let changed = Facts { shared: true, uid: 0, ..facts };
        match listener::judge(&changed, listen, 0) {
            Verdict::Adopt { address } => steerable.push(Foreign { fd, cookie, facts, address }),
            Verdict::Elsewhere => elsewhere.push(facts.address),
            Verdict::Misbound { sentence } => bail!("{described}: {sentence}"),
        }
    }
    Ok((steerable, elsewhere))
}

/// Makes a listener fit for a group whose sockets have this uid, and its connections such that
/// others can bind beside them. Done again, it changes nothing.
///
/// A connection that the server has not accepted yet cannot be reached. If its listener had no
/// SO_REUSEADDR when it came, nobody can bind until it was accepted and this was done again; and
/// what is left of such a connection after its end stands in the way for a minute (TIME_WAIT).
pub fn share(listener: BorrowedFd<'_>, uid: u32, processes: &[u32]) -> anyhow::Result<Before> {
    let mut before = look(listener)?;
    // First, so that connections that come from now on have both.
    sockopt::set_socket_reuseaddr(listener, true).context("set SO_REUSEADDR")?;
    sockopt::set_socket_reuseport(listener, true).context("set SO_REUSEPORT")?;
    own(listener, uid)?;
    each_connection(listener, processes, |connection, cookie| {
        if sockopt::socket_reuseaddr(connection) == Ok(false)
            && sockopt::set_socket_reuseaddr(connection, true).is_ok()
        {
            before.connections.insert(cookie);
        }
    })?;
    Ok(before)
}

/// What a listener is like, without its connections.
pub fn look(listener: BorrowedFd<'_>) -> anyhow::Result<Before> {
    Ok(Before {
        reuse_address: sockopt::socket_reuseaddr(listener).context("read SO_REUSEADDR")?,
        reuse_port: sockopt::socket_reuseport(listener).context("read SO_REUSEPORT")?,
        uid: rustix::fs::fstat(listener).context("read the owner of a socket")?.st_uid,
        connections: BTreeSet::new(),
    })
}

impl Before {
    /// What was there before both: `later` was found by doing it again.
    pub fn and(mut self, later: &Self) -> Self {
        self.connections.extend(&later.connections);
        self
    }
}

/// Restores what was there before [`share`].
pub fn unshare(listener: BorrowedFd<'_>, before: &Before, processes: &[u32]) -> anyhow::Result<()> {
    own(listener, before.uid)?;
    sockopt::set_socket_reuseport(listener, before.reuse_port).context("set SO_REUSEPORT")?;
    sockopt::set_socket_reuseaddr(listener, before.reuse_address).context("set SO_REUSEADDR")?;
    each_connection(listener, processes, |connection, cookie| {
        if before.connections.contains(&cookie) {
            // It may have ended.
            let _ = sockopt::set_socket_reuseaddr(connection, false);
        }
    })
}

/// Gives a listener back to its server, which goes on alone: no program chooses for it any more, and
/// its options and owner are as before. Everybody else must have left the group.
///
/// # Errors
/// Others still listen there. Nothing is changed then.
pub fn release(listener: BorrowedFd<'_>, before: &Before, processes: &[u32]) -> anyhow::Result<()> {
    let local = local(listener)?;
    let mut others = 0u32;
    let address = ListenAddress { socket: local, v6only: false };
    sock_diag::sockets(&[address], States::Listeners, None, |socket| {
        others += u32::from(socket.local.ip() == local.ip());
    })
    .context("ask the kernel for its listeners (sock_diag)")?;
    // Without the program, the kernel would send connections to them by its own hash.
    ensure!(others <= 1, "release the listener on {local}: others listen there still ({})", others - 1);
    kernel::detach(listener)?;
    unshare(listener, before, processes)
}

/// The cgroup in which a listener was made: there its connections can be counted. The root if
/// that cgroup was removed since.
pub fn cgroup(listener: &Foreign) -> anyhow::Result<Cgroup> {
    let address = ListenAddress { socket: listener.facts.address, v6only: listener.facts.v6only };
    let mut id = None;
    sock_diag::sockets(&[address], States::Listeners, None, |socket| {
        if socket.cookie == listener.cookie {
            id = socket.cgroup;
        }
    })
    .context("ask the kernel for its listeners (sock_diag)")?;
    let root = Cgroup::at(cgroup::mount_point()?);
    Ok(id.and_then(|id| root.find(id)).unwrap_or(root))
}

impl EarlierConnections {
    /// Those of a listener that was tagged a moment ago: the connections without a tag. Those in
    /// `others` are other servers'.
    pub fn note(listener: &Foreign, tags: BorrowedFd<'_>, others: &[&Self]) -> anyhow::Result<Self> {
        let facts = &listener.facts;
        let address = ListenAddress { socket: facts.address, v6only: facts.v6only };
        let mut cookies = HashSet::new();
        sock_diag::sockets(&[address], States::Connections, Some(tags), |socket| {
            let is_here = facts.address.ip().is_unspecified() || facts.address.ip() == socket.local.ip();
            if socket.tag.is_none() && is_here && !others.iter().any(|other| other.0.contains(&socket.cookie))
            {
                cookies.insert(socket.cookie);
            }
        })
        .context("ask the kernel for its sockets (sock_diag)")?;
        Ok(Self(cookies))
    }

    /// Both together.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// How many of them are still open. Those that are not are forgotten.
    pub fn still_open(&mut self, listen: &[ListenAddress]) -> anyhow::Result<usize> {
        if self.0.is_empty() {
            return Ok(0);
        }
        let mut open = HashSet::new();
        sock_diag::sockets(listen, States::Connections, None, |socket| {
            if self.0.contains(&socket.cookie) {
                open.insert(socket.cookie);
            }
        })
        .context("ask the kernel for its sockets (sock_diag)")?;
        self.0 = open;
        Ok(self.0.len())
    }
}

/// The connections on a listener's port that these processes hold. Each is a duplicate, which is
/// closed at once: while it is open, the connection does not end.
fn each_connection(
    listener: BorrowedFd<'_>,
    processes: &[u32],
    mut each: impl FnMut(BorrowedFd<'_>, u64),
) -> anyhow::Result<()> {
    let port = local(listener)?.port();
    listener::each_socket(processes, |socket| {
        let is_tcp = sockopt::socket_protocol(&socket) == Ok(Some(rustix::net::ipproto::TCP));
        let is_listener = sockopt::socket_acceptconn(&socket) != Ok(false);
        let is_here = local(socket.as_fd()).is_ok_and(|local| local.port() == port);
        if let (true, false, true, Ok(cookie)) =
            (is_tcp, is_listener, is_here, sockopt::socket_cookie(&socket))
        {
            each(socket.as_fd(), cookie);
        }
    })
    .context("look at its connections")?;
    Ok(())
}

fn own(listener: BorrowedFd<'_>, uid: u32) -> anyhow::Result<()> {
    rustix::fs::fchown(listener, Some(Uid::from_raw(uid)), None).context("change the owner of a socket")
}

fn local(socket: BorrowedFd<'_>) -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::try_from(getsockname(socket)?)?)
}

fn inode(fd: &OwnedFd) -> Option<u64> {
    Some(rustix::fs::fstat(fd).ok()?.st_ino)
}

fn name(process: u32) -> io::Result<String> {
    Ok(fs::read_to_string(format!("/proc/{process}/comm"))?.trim().to_owned())
}

fn network(process: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}

/// Every process.
fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Processes that hold one of these sockets.
fn holders(inodes: &HashSet<u64>, ours: &[u32]) -> Vec<u32> {
    let targets: HashSet<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let holds = |process: &u32| {
        let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        let mut links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.any(|target| target.to_str().is_some_and(|target| targets.contains(target)))
    };
    // We hold a duplicate ourselves.
    let is_ours = |process: &u32| *process == std::process::id() || ours.contains(process);
    all().into_iter().filter(|process| !is_ours(process)).filter(holds).collect()
}

/// The first process that has one of these listeners, by their cookies, and that is none of
/// `others`. It looks at every process there is.
pub fn holder(cookies: &HashSet<u64>, others: &[u32]) -> Option<u32> {
    let ours = std::process::id();
    all().into_iter().filter(|process| *process != ours && !others.contains(process)).find(|process| {
        let found = listener::find(&[*process]).unwrap_or_default();
        found.iter().any(|listener| cookies.contains(&listener.cookie))
    })
}

/// These processes, and all that descend from them, but for `ours`.
fn descendants(of: &[u32], ours: &[u32]) -> Vec<u32> {
    let others = all().into_iter().filter(|process| !ours.contains(process));
    let parents: Vec<(u32, u32)> = others.filter_map(|it| Some((it, parent(it)?))).collect();
    let mut found: BTreeSet<u32> = of.iter().copied().collect();
    loop {
        let more = parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(it, _)| *it);
        let more: Vec<u32> = more.filter(|it| !found.contains(it)).collect();
        if more.is_empty() {
            return found.into_iter().collect();
        }
        found.extend(more);
    }
}

fn parent(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name may hold spaces and parentheses; the last one ends it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        process,
    };

    use super::*;

    fn listen_at(listener: &TcpListener) -> [ListenAddress; 1] {
        [ListenAddress { socket: listener.local_addr().unwrap(), v6only: false }]
    }

    #[test]
    fn what_is_shared_and_given_back_is_as_it_was() {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        listener.listen(8).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let (uid, ours) = (rustix::process::geteuid().as_raw(), [process::id()]);

        let before = share(listener.as_fd(), uid, &ours).unwrap();
        let cookie = sockopt::socket_cookie(&connection).unwrap();
        let expected = Before { reuse_address: false, reuse_port: false, uid, connections: [cookie].into() };
        assert_eq!(before, expected);
        assert!(listener.reuse_address().unwrap() && listener.reuse_port().unwrap());
        assert!(connection.reuse_address().unwrap());
        let again = share(listener.as_fd(), uid, &ours).unwrap();
        assert!(again.reuse_address && again.connections.is_empty());

        unshare(listener.as_fd(), &before, &ours).unwrap();
        assert!(!listener.reuse_address().unwrap() && !listener.reuse_port().unwrap());
        assert!(!connection.reuse_address().unwrap());
    }

    #[test]
    fn a_listener_is_found_through_any_process_that_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = listen_at(&listener);
        let found = find(process::id(), &listen, &[]).unwrap();
        assert_eq!(found.listeners.len(), 1);
        assert_eq!(found.listeners[0].cookie, sockopt::socket_cookie(&listener).unwrap());
        assert_eq!(found.main, process::id());
        let ours = find(process::id(), &listen, &[process::id()]).unwrap_err().to_string();
        assert!(ours.contains("a part of this dist-ctl already"), "{ours}");
    }

    #[test]
    fn who_does_not_listen_there_is_told_so() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = listen_at(&listener);
        let nobody = find(0x7fff_fff0, &listen, &[]).unwrap_err();
        assert_eq!(format!("{nobody:#}").split(": ").nth(1), Some("there is none"));
        let elsewhere = find(process::id(), &["127.0.0.1:1".parse().unwrap()], &[]).unwrap_err().to_string();
        assert!(elsewhere.contains("it listens on 127.0.0.1:"), "{elsewhere}");
        assert!(elsewhere.contains("the service on 127.0.0.1:1"), "{elsewhere}");
    }

    #[test]
    fn connections_from_before_are_forgotten_as_they_close() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = listen_at(&listener);
        let clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(listen[0].socket).unwrap()).collect();
        let mut cookies = HashSet::new();
        sock_diag::sockets(&listen, States::Connections, None, |socket| {
            cookies.insert(socket.cookie);
        })
        .unwrap();
        let mut earlier = EarlierConnections(cookies);
        assert_eq!(earlier.still_open(&listen).unwrap(), 3);
        for client in &clients[1..] {
            socket2::SockRef::from(client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        }
        drop(clients);
        // One is half closed, and its server's side is open.
        assert_eq!(earlier.still_open(&listen).unwrap(), 1);
    }
}
