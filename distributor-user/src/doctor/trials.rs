//! The checks that the examiner does: with the real programs, and sockets on the loopback.
//!
//! Each is one function: it tries one thing, and gives what was found or why it does not work. What
//! a later one needs it leaves on the [`Bench`]; all of that is gone when the examiner ends. Ports
//! are such as nobody uses, and no program is attached to anything but what was made here.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::process::parent_id,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use distributor_ebpf::contract::{EventKind, Outcome, Policy, Run};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Gid, Uid, fchown},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
    net::sockopt::socket_cookie,
};
use socket2::{Domain, SockRef, Socket, Type};

use super::name;
use crate::{
    address::ListenAddress,
    bell::{self, Moves},
    closer, instance,
    kernel::{self, Trial, remember_wakes, remembered_wakes},
    launch::Identity,
    launcher,
    plan::{Wanted, WantedServer},
    sock_diag::{self, States},
};

/// On the loopback everything is over at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// The servers of the plan: `select` is to choose the second one.
const SLOTS: [u32; 2] = [0, 1];
const CHOSEN: u32 = SLOTS[1];
/// "nobody", wherever there is one.
const NOBODY: u32 = 65_534;

/// What the checks work with.
pub(super) struct Bench {
    /// Where the examiner is to be.
    cgroup: Option<PathBuf>,
    /// A bpffs that is mounted nowhere, if the machine has none.
    bpffs: Option<OwnedFd>,
    trial: Option<Trial>,
    /// A connection that `select` has sent somewhere.
    steered: Option<Steered>,
    /// What the kernel does with the connections of a listener that closes.
    moves: Option<Moves>,
}

struct Steered {
    /// Closing one would move its connections.
    _listeners: [Socket; 2],
    address: ListenAddress,
    client: Socket,
    /// The server's end.
    server: Socket,
}

impl Bench {
    pub(super) fn new(cgroup: Option<&Path>) -> Self {
        Self { cgroup: cgroup.map(Path::to_owned), bpffs: None, trial: None, steered: None, moves: None }
    }

    fn cgroup(&self) -> anyhow::Result<&Path> {
        self.cgroup.as_deref().context("there is no cgroup to try it with")
    }

    fn trial(&mut self) -> anyhow::Result<&mut Trial> {
        self.trial.as_mut().context("there are no maps to try it with")
    }
}

pub(super) fn loopback(_: &mut Bench) -> anyhow::Result<String> {
    connect_to(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

pub(super) fn ipv6(_: &mut Bench) -> anyhow::Result<String> {
    connect_to(SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))
}

fn connect_to(address: SocketAddr) -> anyhow::Result<String> {
    connection(address).map(|_| String::new())
}

/// A listener at this address, and both ends of a connection to it: the client's first.
fn connection(address: SocketAddr) -> anyhow::Result<(Socket, Socket, Socket)> {
    let listener = bound(address, Shares::No)?;
    listener.listen(1)?;
    let address = listener.local_addr()?;
    let client = Socket::new(address.domain(), Type::STREAM, None)?;
    client.connect_timeout(&address, PATIENCE).context("connect")?;
    let server = accept(&listener)?.context("it did not arrive")?;
    Ok((listener, client, server))
}

pub(super) fn enter_cgroup(bench: &mut Bench) -> anyhow::Result<String> {
    launcher::enter(bench.cgroup()?)?;
    Ok(String::new())
}

/// A mount that is attached nowhere takes the rights of one that is, and nobody sees it.
pub(super) fn bpffs(bench: &mut Bench) -> anyhow::Result<String> {
    if let Some(bpffs) = instance::bpffs() {
        return Ok(bpffs.display().to_string());
    }
    let mount = || {
        let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    bench.bpffs = Some(mount().with_context(|| format!("{} has none; mount one", instance::BPFFS))?);
    Ok(format!("{} has none; dist-ctl mounts one in the runtime directory", instance::BPFFS))
}

pub(super) fn pin(bench: &mut Bench) -> anyhow::Result<String> {
    let root = match &bench.bpffs {
        Some(mount) => PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())),
        None => PathBuf::from(instance::BPFFS),
    };
    let pins = root.join(name(parent_id()));
    let pinned = remember_wakes(&pins, true);
    let found = remembered_wakes(&pins);
    let removed = fs::remove_dir_all(&pins);
    pinned?;
    ensure!(found == Some(true), "what was pinned is not found again");
    removed.with_context(|| format!("remove {}", pins.display()))?;
    Ok(String::new())
}

pub(super) fn maps(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial = Some(Trial::new()?);
    Ok(String::new())
}

pub(super) fn load_select(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial()?.load("select").map(nothing)
}

pub(super) fn load_track(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial()?.load("track").map(nothing)
}

pub(super) fn load_bind4(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial()?.load("bind4").map(nothing)
}

pub(super) fn load_bind6(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial()?.load("bind6").map(nothing)
}

pub(super) fn attach_select(bench: &mut Bench) -> anyhow::Result<String> {
    let listener = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Shares::Yes)?;
    listener.listen(1)?;
    bench.trial()?.attach_select(&listener).map(nothing)
}

pub(super) fn attach_track(bench: &mut Bench) -> anyhow::Result<String> {
    attach(bench, "track")
}

pub(super) fn attach_bind4(bench: &mut Bench) -> anyhow::Result<String> {
    attach(bench, "bind4")
}

pub(super) fn attach_bind6(bench: &mut Bench) -> anyhow::Result<String> {
    attach(bench, "bind6")
}

fn attach(bench: &mut Bench, program: &str) -> anyhow::Result<String> {
    let cgroup = bench.cgroup()?.to_owned();
    bench.trial()?.attach(program, &cgroup).map(nothing)
}

pub(super) fn replace(bench: &mut Bench) -> anyhow::Result<String> {
    bench.trial()?.replace("track").map(nothing)
}

pub(super) fn share4(bench: &mut Bench) -> anyhow::Result<String> {
    share(bench, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

pub(super) fn share6(bench: &mut Bench) -> anyhow::Result<String> {
    share(bench, SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))
}

/// A server that asks for nothing binds where a room is.
fn share(bench: &mut Bench, address: SocketAddr) -> anyhow::Result<String> {
    let room = bound(address, Shares::Yes)?;
    let address = address_of(&room)?;
    bench.trial()?.serve(&address)?;
    room.listen(1)?;
    let server = Socket::new(Domain::for_address(address.socket), Type::STREAM, None)?;
    let bind = server.bind(&address.socket.into());
    let lacking: Vec<&str> =
        [("SO_REUSEADDR", server.reuse_address()?), ("SO_REUSEPORT", server.reuse_port()?)]
            .into_iter()
            .filter_map(|(option, is_set)| (!is_set).then_some(option))
            .collect();
    ensure!(lacking.is_empty(), "the bind hook could not set {}", lacking.join(" and "));
    bind.context("bind")?;
    Ok(String::new())
}

pub(super) fn events(bench: &mut Bench) -> anyhow::Result<String> {
    let server = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Shares::No)?;
    let trial = bench.trial()?;
    trial.serve(&address_of(&server)?)?;
    server.listen(1)?;
    let cookie = socket_cookie(&server)?;
    let told = trial
        .events()?
        .iter()
        .any(|event| kernel::kind(event) == Some(EventKind::Listening) && event.cookie == cookie);
    ensure!(told, "nothing was told");
    Ok(String::new())
}

/// Two listeners share an address, and the plan has only one of them.
pub(super) fn steer(bench: &mut Bench) -> anyhow::Result<String> {
    let first = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Shares::Yes)?;
    let address = address_of(&first)?;
    let second = bound(address.socket, Shares::Yes)?;
    let trial = bench.trial()?;
    for (listener, slot) in [&first, &second].into_iter().zip(SLOTS) {
        trial.tag(listener, slot)?;
        listener.listen(8)?;
    }
    trial.attach_select(&first)?;
    for (listener, slot) in [&first, &second].into_iter().zip(SLOTS) {
        trial.place(listener, slot)?;
    }
    trial.write_plan(&plan().plan())?;
    let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    client.connect_timeout(&address.socket.into(), PATIENCE).context("connect")?;
    let server = accept(&second)?.context("it went elsewhere")?;
    ensure!(trial.count(Outcome::Selected)? > 0, "it went there, and not by select");
    bench.steered = Some(Steered { _listeners: [first, second], address, client, server });
    Ok(String::new())
}

/// The second server is in it, and nobody may wait.
fn plan() -> Wanted {
    let cookies = fs::read_to_string("/proc/sys/net/ipv4/tcp_syncookies");
    let chosen = WantedServer {
        slot: CHOSEN,
        identity: "chosen".to_owned(),
        eligible: true,
        weight: 1,
        limit: None,
        generation: 1,
        runs: vec![Run { first: CHOSEN as u16, len: 1 }],
    };
    Wanted {
        policy: Policy::LeastConnections,
        cookies: cookies.is_ok_and(|value| value.trim() == "2"),
        servers: vec![chosen],
        ..Wanted::nothing()
    }
}

pub(super) fn tag(bench: &mut Bench) -> anyhow::Result<String> {
    let (trial, steered) = steered(bench)?;
    let slot = trial.slot_of(&steered.server)?;
    ensure!(slot == CHOSEN, "it has the tag of another one");
    Ok(String::new())
}

pub(super) fn list_sockets(bench: &mut Bench) -> anyhow::Result<String> {
    let (trial, steered) = steered(bench)?;
    let found = listed(steered.address, &steered.client, Some(trial.tags()?))?;
    ensure!(found.cgroup.is_some(), "a connection is listed without its cgroup");
    ensure!(found.tag.is_some_and(|tag| tag.slot == CHOSEN), "a connection is listed without its tag");
    Ok(String::new())
}

/// What the kernel says of the other end of this client's connection.
fn listed(
    address: ListenAddress,
    client: &Socket,
    tags: Option<BorrowedFd<'_>>,
) -> anyhow::Result<sock_diag::Socket> {
    let client = client.local_addr()?.as_socket();
    let mut found = None;
    sock_diag::sockets(&[address], States::Connections, tags, |socket| {
        if Some(socket.remote) == client {
            found = Some(socket);
        }
    })
    .context("ask for the sockets")?;
    found.context("a connection is not listed")
}

/// Both ends are ours here, and the client hears of it as any client does.
pub(super) fn close(_: &mut Bench) -> anyhow::Result<String> {
    let (listener, client, _server) = connection(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    closer::destroy(&[listed(address_of(&listener)?, &client, None)?])?;
    client.set_read_timeout(Some(PATIENCE))?;
    match (&client).read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(String::new()),
        read => bail!("it is not closed: {read:?}"),
    }
}

pub(super) fn count(bench: &mut Bench) -> anyhow::Result<String> {
    let (trial, steered) = steered(bench)?;
    let open = trial.connections(CHOSEN)?;
    ensure!(open == 1, "{open} are counted while there is one");
    // Reset, so that nothing of it stays.
    SockRef::from(&steered.client).set_linger(Some(Duration::ZERO))?;
    bench.steered = None;
    let trial = bench.trial()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match trial.connections(CHOSEN)? {
            0 => return Ok(String::new()),
            closed if Instant::now() > deadline => bail!("{closed} are counted when there is none any more"),
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn steered(bench: &Bench) -> anyhow::Result<(&Trial, &Steered)> {
    bench.trial.as_ref().zip(bench.steered.as_ref()).context("there is no connection to try it with")
}

pub(super) fn migrate(bench: &mut Bench) -> anyhow::Result<String> {
    let moves = *bench.moves.insert(bell::moves()?);
    ensure!(moves != Moves::Not, "it was lost");
    Ok(String::new())
}

pub(super) fn wake(bench: &mut Bench) -> anyhow::Result<String> {
    ensure!(bench.moves == Some(Moves::AndWakes), "it is not woken (CVE-2026-46015)");
    Ok(String::new())
}

/// As a server of another user binds port 80.
pub(super) fn low_port(bench: &mut Bench) -> anyhow::Result<String> {
    let first_open = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let first_open = first_open.ok().and_then(|port| port.trim().parse().ok()).unwrap_or(1024);
    let free = (1..first_open)
        .rev()
        .find_map(|port| bound(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), Shares::No).ok());
    let Some(free) = free else {
        return Ok(format!("everybody may bind any port from {first_open} on"));
    };
    let address = address_of(&free)?;
    drop(free);
    bench.trial()?.serve(&address)?;
    let bind = || {
        // Of this thread only: there is more to try as root.
        launcher::become_user(&nobody())?;
        bound(address.socket, Shares::No).map(drop)
    };
    thread::scope(|scope| scope.spawn(bind).join().map_err(|_| anyhow!("its thread has panicked"))?)?;
    Ok(String::new())
}

/// As every server does before it is executed.
pub(super) fn drop_rights(_: &mut Bench) -> anyhow::Result<String> {
    launcher::drop_capabilities()?;
    Ok(String::new())
}

pub(super) fn become_nobody(_: &mut Bench) -> anyhow::Result<String> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    fchown(&socket, Some(uid), Some(gid)).context("give a socket away")?;
    launcher::become_user(&nobody())?;
    Ok(String::new())
}

fn nobody() -> Identity {
    Identity { name: NOBODY.to_string(), uid: NOBODY, gid: NOBODY, groups: vec![] }
}

/// Whether a socket shares its address with those that do so too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shares {
    Yes,
    No,
}

fn bound(address: SocketAddr, shares: Shares) -> anyhow::Result<Socket> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(shares == Shares::Yes)?;
        socket.set_reuse_port(shares == Shares::Yes)?;
        socket.bind(&address.into())?;
        io::Result::Ok(socket)
    };
    bind().with_context(|| format!("bind {}", address.ip()))
}

fn address_of(socket: &Socket) -> anyhow::Result<ListenAddress> {
    let address = socket.local_addr()?.as_socket().context("a TCP socket has an address")?;
    Ok(ListenAddress { socket: address, v6only: false })
}

/// A connection, if one comes.
fn accept(listener: &Socket) -> anyhow::Result<Option<Socket>> {
    let patience = Timespec::try_from(PATIENCE)?;
    let ready = poll(&mut [PollFd::new(&listener.as_fd(), PollFlags::IN)], Some(&patience))?;
    if ready == 0 {
        return Ok(None);
    }
    let (connection, _) = listener.accept().map_err(|error| anyhow!(error).context("accept"))?;
    Ok(Some(connection))
}

fn nothing((): ()) -> String {
    String::new()
}
