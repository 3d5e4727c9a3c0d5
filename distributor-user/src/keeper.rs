//! The keeper: a process in the rooms' cgroup that makes rooms, and keeps them.
//!
//! The kernel counts only connections of sockets that were made in the service's cgroup, so
//! rooms are made by a process in there. It keeps a duplicate of each, so that who waits
//! survives distributor and monitor, and gives them to the next distributor, which finds it by
//! its socket in the runtime directory. It ends when it is told to, or when nobody has come for
//! five minutes; then the rooms close. What it is told comes from us alone, a JSON object in each
//! packet.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    env, fmt, fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
    },
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::info;

use crate::{
    address::ListenAddress,
    cgroup::Cgroup,
    launcher::{bound_socket, enter},
    listener, logging,
};

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
    /// Nobody will come any more.
    End,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    /// Sockets, which come along: those with these cookies, in this order.
    Sockets {
        address: ListenAddress,
        is_new: bool,
        cookies: Vec<u64>,
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
    Made {
        address: ListenAddress,
        sockets: Vec<OwnedFd>,
        /// Cookies of more, for which this process had no descriptors left. The keeper has them.
        lost: Vec<u64>,
    },
    NotMade(ListenAddress, String),
}

/// The keeper cannot be talked to.
#[derive(Debug)]
pub struct Silent(&'static str);

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Silent {}

/// The keeper of this service listens here.
pub fn socket(runtime_dir: &Path, service: &str) -> PathBuf {
    runtime_dir.join(format!("{PREFIX}{service}"))
}

/// Every keeper's socket that is there, with its service. Not every one has a keeper.
pub fn sockets(runtime_dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let service = entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned();
            Some((service, entry.path()))
        })
        .collect()
}

/// What the names of their sockets begin with.
const PREFIX: &str = "keeper.";

/// How long a keeper stays when nobody is connected to it, in milliseconds: for tests.
pub const STAYS: &str = "DIST_CTL_KEEPER_STAYS";
/// As long as an operator may take to notice that all is dead, and to start it again. Who waits
/// is not served meanwhile, and would be better off to know if nobody comes.
const STAYS_FOR: Duration = Duration::from_secs(300);

/// So many sockets go into one packet. Small, so that the first ones come soon.
const BATCH: usize = 64;
/// No packet is longer: thousands of cookies fit.
const MAX_PACKET: usize = 64 * 1024;
/// So many cookies fit into one packet.
const COOKIES: usize = 2048;
/// A keeper answers within this time: a hundred times what a busy machine needs.
const TIME_LIMIT: Duration = Duration::from_secs(3);
/// One that we have started ourselves answers within this time: it may have to be loaded first, which an
/// emulated machine that was busy did not do within the other limit. If it ends instead, that is seen at
/// once.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Nobody but the next distributor knocks.
const BACKLOG: i32 = 8;

/// The other end of a keeper.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    /// The process, if it is ours to wait for.
    child: Option<Child>,
}

impl Keeper {
    /// The one that listens at this path; `None` if nobody does.
    ///
    /// # Errors
    /// Somebody else does.
    pub fn find(path: &Path) -> anyhow::Result<Option<Self>> {
        let (directory, address) = match reach(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            reached => reached.with_context(|| format!("reach {}", path.display()))?,
        };
        // It does not block, so one that does not accept is as good as none.
        let socket = seqpacket(SocketFlags::NONBLOCK)?;
        match rustix::net::connect(&socket, &address) {
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN) => return Ok(None),
            connected => connected.with_context(|| format!("connect to {}", path.display()))?,
        }
        drop(directory);
        let its = sockopt::socket_peercred(&socket).context("ask who the keeper is")?.uid;
        let ours = rustix::process::geteuid();
        ensure!(
            its == ours,
            "the keeper at {} belongs to uid {its}, and dist-ctl runs as {ours}: choose another --runtime-dir",
            path.display()
        );
        Ok(Some(Self { socket, child: None }))
    }

    /// Starts one in this cgroup that listens at this path. It takes the place of any other in
    /// there, which could not be reached or has failed: what they keep is given to it, and then
    /// they are killed.
    pub fn start(cgroup: &Path, path: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        // What ps shows; /proc/self/exe would tell nobody anything.
        command.arg0("dist-ctl").arg("keep").arg(cgroup);
        Self::start_as(command, cgroup, path)
    }

    fn start_as(mut command: Command, cgroup: &Path, path: &Path) -> anyhow::Result<Self> {
        let listener = listen(path).with_context(|| format!("listen on {}", path.display()))?;
        let others = Cgroup::at(cgroup).processes();
        // It outlives us, and is then the monitor's child, or init's.
        let child = command.stdin(listener).stdout(Stdio::null()).spawn().context("start the keeper")?;
        // It closes ours of the listener.
        drop(command);
        let Some(keeper) = Self::find(path)? else { bail!(Silent("the keeper is gone")) };
        let keeper = Self { child: Some(child), ..keeper };
        for other in others {
            keeper.succeed(other, &Cgroup::at(cgroup))?;
        }
        Ok(keeper)
    }

    /// Has it keep what another one keeps, which then is killed. Those who wait there notice
    /// nothing.
    fn succeed(&self, other: u32, cgroup: &Cgroup) -> anyhow::Result<()> {
        let Some(pid) = i32::try_from(other).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        // The number may have been used again.
        if !cgroup.processes().contains(&other) {
            return Ok(());
        }
        let rooms = listener::find(&[other]).context("take the rooms of another keeper")?;
        info!(
            "a keeper of rooms (pid {other}) cannot be reached; its {} rooms get another, and it is killed",
            rooms.len()
        );
        let mut by_address: HashMap<ListenAddress, Vec<OwnedFd>> = HashMap::new();
        for room in rooms {
            let address = ListenAddress { socket: room.facts.address, v6only: room.facts.v6only };
            by_address.entry(address).or_default().push(room.fd);
        }
        for (address, rooms) in by_address {
            self.keep(address, &rooms.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        }
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        Ok(())
    }

    /// All that it keeps: in which group each is to be, and the socket. What it was asked before
    /// is forgotten.
    ///
    /// # Errors
    /// [`Silent`]; or there are not enough descriptors.
    pub fn all(&self) -> anyhow::Result<Vec<(ListenAddress, OwnedFd)>> {
        let number = u64::from(std::process::id());
        self.ask(&Request::All { number }, &[]).map_err(|_| Silent("the keeper is gone"))?;
        let mut all = Vec::new();
        loop {
            self.wait()?;
            match receive(&self.socket)? {
                Some((Answer::Sockets { address, is_new: false, cookies }, sockets)) => {
                    ensure!(
                        sockets.len() == cookies.len(),
                        "take over the rooms: no descriptors are left: raise the limit of open files"
                    );
                    all.extend(sockets.into_iter().map(|socket| (address, socket)));
                }
                Some((Answer::All { number: its }, _)) if its == number => return Ok(all),
                // An answer to the distributor before us: these come again, as what is kept.
                Some(_) => {}
                None => bail!(Silent("the keeper is gone")),
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
            while let Err(error) = self.ask(&Request::Keep { address }, sockets) {
                ensure!(error.kind() == io::ErrorKind::WouldBlock, "give the keeper a room: {error}");
                self.wait_for(PollFlags::OUT)?;
            }
        }
        Ok(())
    }

    /// Tells it that nobody will come any more.
    pub fn end(&self) {
        // It may be busy. If it cannot be said at all, it ends when nobody has come for a while.
        while self.ask(&Request::End, &[]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            if self.wait_for(PollFlags::OUT).is_err() {
                return;
            }
        }
    }

    /// Its process, if it is ours to wait for: it is gone, or will be soon.
    pub fn leave(&mut self) -> Option<Child> {
        self.child.take()
    }

    /// What it has said, if anything.
    ///
    /// # Errors
    /// It is gone.
    pub fn hear(&self) -> anyhow::Result<Option<Heard>> {
        loop {
            match receive(&self.socket) {
                Ok(Some((Answer::Sockets { address, is_new: true, mut cookies }, sockets))) => {
                    let lost = cookies.split_off(sockets.len().min(cookies.len()));
                    return Ok(Some(Heard::Made { address, sockets, lost }));
                }
                Ok(Some((Answer::NotMade { address, why }, _))) => {
                    return Ok(Some(Heard::NotMade(address, why)));
                }
                Ok(Some(_)) => {}
                Ok(None) => bail!(Silent("the keeper is gone")),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("hear from the keeper"),
            }
        }
    }

    /// Waits until there is something to hear.
    pub fn wait(&self) -> anyhow::Result<()> {
        self.wait_for(PollFlags::IN)
    }

    fn wait_for(&self, what: PollFlags) -> anyhow::Result<()> {
        let patience = if self.child.is_some() { START_LIMIT } else { TIME_LIMIT };
        let patience = Timespec::try_from(patience)?;
        let ready = loop {
            match poll(&mut [PollFd::new(&self.socket, what)], Some(&patience)) {
                Err(Errno::INTR) => {}
                ready => break ready?,
            }
        };
        ensure!(ready > 0, Silent("the keeper does not answer"));
        Ok(())
    }

    fn ask(&self, request: &Request, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(&self.socket, request, sockets)
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A listener at this path, for us alone. What was there before is removed.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    let (_directory, address) = reach(path)?;
    let socket = seqpacket(SocketFlags::empty())?;
    // Before bind, whose file gets this mode: nobody else can connect at any time.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => rustix::net::bind(&socket, &address)?,
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn seqpacket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The address of a socket's file however long its path is: by its directory, which is to stay
/// open until it was used.
fn reach(path: &Path) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    Ok((directory, SocketAddrUnix::new(short.as_path())?))
}

/// Is a keeper, in this cgroup, for whoever connects to the listener that is standard input.
pub fn run(cgroup: &Path) -> ExitCode {
    match keep(cgroup) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::say(format_args!("dist-ctl keep: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn keep(cgroup: &Path) -> anyhow::Result<()> {
    let listener = rustix::stdio::stdin();
    ensure!(
        sockopt::socket_type(listener).is_ok_and(|kind| kind == SocketType::SEQPACKET)
            && sockopt::socket_acceptconn(listener).unwrap_or(false),
        "this command is started by dist-ctl up, not by hand"
    );
    // Who signals every process of a terminal or a unit does not mean those who wait: only End and
    // SIGKILL end it.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).context("ignore signals")?;
    }
    rustix::process::setsid().context("start a session")?;
    match enter(cgroup) {
        // It was made for us: whoever started us has failed since, and cleaned up.
        Err(_) if !cgroup.exists() => return Ok(()),
        entered => entered?,
    }
    let stays = env::var(STAYS).ok().and_then(|text| text.parse().ok());
    let stays = Timespec::try_from(stays.map_or(STAYS_FOR, Duration::from_millis))?;
    let mut seat = Seat::new()?;
    let mut kept = Kept::default();
    loop {
        let Some(peer) = &seat.peer else {
            match poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&stays)) {
                Ok(0) => return Ok(()),
                Err(Errno::INTR) => {}
                ready => {
                    ready.context("wait for a distributor")?;
                    seat.accept(listener);
                }
            }
            continue;
        };
        let mut ready = [PollFd::new(peer, PollFlags::IN), PollFd::new(&listener, PollFlags::IN)];
        match poll(&mut ready, None) {
            Err(Errno::INTR) => continue,
            ready => ready.context("wait for a distributor")?,
        };
        // Another one comes when this one is dead: what it said last is done first.
        if ready[0].revents().is_empty() {
            seat.accept(listener);
            continue;
        }
        let done = match receive(peer) {
            Ok(Some((request, sockets))) => kept.perform(request, sockets, peer),
            // It is gone; or it speaks another language, and is better off with another keeper.
            Ok(None) | Err(_) => Ok(Next::HangUp),
        };
        match done {
            Ok(Next::GoOn) => {}
            // It is gone, and its last words may be to come.
            Err(error) if is_gone(&error) => {}
            Ok(Next::HangUp) | Err(_) => seat.leave(),
            Ok(Next::End) => return Ok(()),
        }
    }
}

fn is_gone(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(error, Some(io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset))
}

/// Where the distributor sits. Its number is kept free while nobody sits there, or a distributor
/// could not come when no descriptors are left.
struct Seat {
    peer: Option<OwnedFd>,
    cushion: Option<OwnedFd>,
}

impl Seat {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { peer: None, cushion: Some(cushion().context("keep a descriptor free")?) })
    }

    /// Lets another one sit down.
    fn accept(&mut self, listener: BorrowedFd<'_>) {
        (self.peer, self.cushion) = (None, None);
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(peer) => self.peer = Some(peer),
            Err(error) => {
                logging::say(format_args!("dist-ctl keep: accept a distributor: {error}; tries again"));
                self.leave();
                // It may still be there, and would be told again at once.
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn leave(&mut self) {
        self.peer = None;
        self.cushion = cushion().ok();
    }
}

fn cushion() -> io::Result<OwnedFd> {
    rustix::stdio::stdin().try_clone_to_owned()
}

/// What follows a request.
enum Next {
    GoOn,
    HangUp,
    End,
}

/// The rooms, by their cookies.
#[derive(Default)]
struct Kept(HashMap<u64, (ListenAddress, OwnedFd)>);

impl Kept {
    /// Does what is asked. If the answer cannot be said, whoever asked is gone.
    fn perform(&mut self, request: Request, sockets: Vec<OwnedFd>, peer: &OwnedFd) -> anyhow::Result<Next> {
        match request {
            Request::Make { address, uid, count } => {
                let mut left = count;
                while left > 0 {
                    let batch = left.min(BATCH);
                    left -= batch;
                    match (0..batch).map(|_| bound_socket(&address, uid)).collect::<Result<Vec<_>, _>>() {
                        Ok(made) => {
                            let cookies = made.iter().map(cookie).collect::<Result<_, _>>()?;
                            let made_all = Answer::Sockets { address, is_new: true, cookies };
                            answer(peer, &made_all, &made)?;
                            self.keep(address, made)?;
                        }
                        Err(error) => {
                            answer(peer, &Answer::NotMade { address, why: error.to_string() }, &[])?;
                            break;
                        }
                    }
                }
            }
            Request::Keep { address } => self.keep(address, sockets)?,
            Request::Drop { cookies } => cookies.iter().for_each(|cookie| drop(self.0.remove(cookie))),
            Request::All { number } => {
                for (cookie, (address, socket)) in &self.0 {
                    let message =
                        Answer::Sockets { address: *address, is_new: false, cookies: vec![*cookie] };
                    send(peer, &message, &[socket.as_fd()])?;
                }
                answer(peer, &Answer::All { number }, &[])?;
            }
            Request::End => return Ok(Next::End),
        }
        Ok(Next::GoOn)
    }

    fn keep(&mut self, address: ListenAddress, sockets: Vec<OwnedFd>) -> anyhow::Result<()> {
        for socket in sockets {
            self.0.insert(cookie(&socket)?, (address, socket));
        }
        Ok(())
    }
}

fn cookie(socket: &OwnedFd) -> anyhow::Result<u64> {
    sockopt::socket_cookie(socket).context("read a socket's cookie")
}

fn answer(peer: &OwnedFd, answer: &Answer, sockets: &[OwnedFd]) -> io::Result<()> {
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    send(peer, answer, &sockets)
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

/// One packet; `None` if the other end is gone. Fewer sockets than were sent, if this process can
/// have no more.
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
    match received.bytes {
        0 => Ok(None),
        bytes => Ok(Some((serde_json::from_slice(&packet[..bytes])?, sockets))),
    }
}

#[cfg(test)]
mod tests {
    use std::{process, thread, time::Instant};

    use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

    use super::*;

    const CGROUP: &str = "DIST_CTL_TEST_CGROUP";
    /// Longer than anything here takes on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    #[ignore = "a process that the other tests start"]
    fn keeper_process() {
        let Some(cgroup) = env::var_os(CGROUP) else { return };
        assert_eq!(run(Path::new(&cgroup)), ExitCode::SUCCESS);
    }

    /// A runtime directory, and a directory that passes for a cgroup.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let place = Self(env::temp_dir().join(format!("dist-ctl-test-keeper-{name}-{}", process::id())));
            let _ = fs::remove_dir_all(&place.0);
            fs::create_dir_all(place.cgroup()).unwrap();
            place
        }

        fn cgroup(&self) -> PathBuf {
            self.0.join("cgroup")
        }

        fn socket(&self) -> PathBuf {
            socket(&self.0, "shop")
        }

        fn command(&self, stays: u64) -> Command {
            let mut command = Command::new("/proc/self/exe");
            command.args(["--exact", "keeper::tests::keeper_process", "--ignored", "--nocapture"]);
            command.env(CGROUP, self.cgroup()).env(STAYS, stays.to_string());
            command
        }

        /// A keeper that stays so many milliseconds without anybody.
        fn start(&self, stays: u64) -> Keeper {
            let keeper = Keeper::start_as(self.command(stays), &self.cgroup(), &self.socket()).unwrap();
            // It is there, and has entered what passes for a cgroup.
            assert_eq!(keeper.all().unwrap().len(), 0);
            let pid = keeper.child.as_ref().unwrap().id();
            fs::write(self.cgroup().join("cgroup.procs"), format!("{pid}\n")).unwrap();
            keeper
        }

        fn find(&self) -> Option<Keeper> {
            Keeper::find(&self.socket()).unwrap()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            if let Ok(Some(keeper)) = Keeper::find(&self.socket()) {
                keeper.end();
            }
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn wait_for_end(child: &mut Child) -> process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the keeper does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_child(child)
    }

    fn ends() -> (Keeper, OwnedFd) {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::io::ioctl_fionbio(&ours, true).unwrap();
        (Keeper { socket: ours, child: None }, theirs)
    }

    fn address() -> ListenAddress {
        "127.0.0.1:1".parse().unwrap()
    }

    fn some_socket() -> OwnedFd {
        rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap()
    }

    /// A listener on a port of the kernel's choice, and where that is.
    fn some_listener() -> (ListenAddress, OwnedFd) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        (listener.local_addr().unwrap().to_string().parse().unwrap(), listener.into())
    }

    fn give(to: &OwnedFd, is_new: bool, socket: &OwnedFd) {
        let cookies = vec![cookie(socket).unwrap()];
        let sockets = Answer::Sockets { address: address(), is_new, cookies };
        send(to, &sockets, &[socket.as_fd()]).unwrap();
    }

    fn cookies(keeper: &Keeper) -> Vec<u64> {
        let mut cookies: Vec<u64> =
            keeper.all().unwrap().iter().map(|(_, socket)| cookie(socket).unwrap()).collect();
        cookies.sort_unstable();
        cookies
    }

    fn hear(keeper: &Keeper) -> Heard {
        keeper.wait().unwrap();
        keeper.hear().unwrap().unwrap()
    }

    #[test]
    fn one_distributor_after_another_finds_what_is_kept() {
        let place = Place::new("after");
        assert!(place.find().is_none());
        let mut first = place.start(60_000);
        let mut child = first.leave().unwrap();
        let kept = some_socket();
        first.keep(address(), &[kept.as_fd()]).unwrap();
        let wanted = vec![cookie(&kept).unwrap()];
        assert_eq!(cookies(&first), wanted);
        drop((first, kept));
        for _ in 0..3 {
            assert_eq!(cookies(&place.find().unwrap()), wanted);
        }
        // A newer one replaces an older one.
        let old = place.find().unwrap();
        assert_eq!(cookies(&old), wanted);
        let new = place.find().unwrap();
        assert_eq!(cookies(&new), wanted);
        assert!(old.hear().unwrap_err().is::<Silent>());
        new.end();
        assert!(wait_for_end(&mut child).success());
        assert!(place.find().is_none(), "its socket's file is there, and nobody listens");
    }

    #[test]
    fn a_keeper_to_which_nobody_comes_ends_and_no_sooner() {
        const STAYS: u64 = 500;
        let place = Place::new("alone");
        let mut keeper = place.start(STAYS);
        let mut child = keeper.leave().unwrap();
        thread::sleep(Duration::from_millis(2 * STAYS));
        assert!(child.try_wait().unwrap().is_none(), "somebody is there");
        let left = Instant::now();
        drop(keeper);
        assert!(wait_for_end(&mut child).success());
        assert!(left.elapsed() >= Duration::from_millis(STAYS));
    }

    #[test]
    fn a_path_may_be_long_and_the_socket_is_for_its_owner_only() {
        use std::os::unix::fs::MetadataExt as _;
        let mut place = Place::new("long");
        let short = place.0.clone();
        place.0 = (0..5).fold(short.clone(), |path, _| path.join("a".repeat(50)));
        fs::create_dir_all(place.cgroup()).unwrap();
        let mut keeper = place.start(60_000);
        assert_eq!(fs::metadata(place.socket()).unwrap().mode() & 0o777, 0o600);
        assert_eq!(sockets(&place.0), [("shop".to_owned(), place.socket())]);
        let mut child = keeper.leave().unwrap();
        place.find().unwrap().end();
        assert!(wait_for_end(&mut child).success());
        fs::remove_dir_all(short).unwrap();
    }

    #[test]
    fn signals_that_are_meant_for_others_do_not_end_it() {
        let place = Place::new("signals");
        let keeper = place.start(60_000);
        let child = keeper.child.as_ref().unwrap();
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            rustix::process::kill_process(pid(child), signal).unwrap();
            assert!(keeper.all().unwrap().is_empty());
        }
        let group = rustix::process::getpgid(Some(pid(child))).unwrap();
        assert_eq!(group, pid(child), "a group of its own");
        keeper.end();
    }

    #[test]
    fn a_keeper_that_cannot_be_reached_gives_its_rooms_to_another_and_is_killed() {
        for stopped in [false, true] {
            let place = Place::new("unreached");
            let mut first = place.start(60_000);
            let mut child = first.leave().unwrap();
            let (address, listener) = some_listener();
            first.keep(address, &[listener.as_fd()]).unwrap();
            let wanted = vec![cookie(&listener).unwrap()];
            assert_eq!(cookies(&first), wanted);
            drop((first, listener));
            fs::remove_file(place.socket()).unwrap();
            if stopped {
                rustix::process::kill_process(pid(&child), Signal::STOP).unwrap();
            }
            assert!(place.find().is_none());
            let mut command = place.command(60_000);
            // Who enters a cgroup is added to the others; what passes for one here would then hold
            // nobody else, and the first one could not be found in it any more.
            let elsewhere = place.0.join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            command.env(CGROUP, &elsewhere);
            let mut second = Keeper::start_as(command, &place.cgroup(), &place.socket()).unwrap();
            let all = second.all().unwrap();
            assert_eq!(
                all.iter().map(|(at, it)| (*at, cookie(it).unwrap())).collect::<Vec<_>>(),
                [(address, wanted[0])]
            );
            assert!(sockopt::socket_acceptconn(&all[0].1).unwrap(), "it listens all the time");
            assert!(!wait_for_end(&mut child).success());
            let mut child = second.leave().unwrap();
            second.end();
            wait_for_end(&mut child);
        }
    }

    #[test]
    fn what_nobody_else_can_understand_ends_the_conversation_and_not_the_keeper() {
        let place = Place::new("nonsense");
        let keeper = place.start(60_000);
        let kept = some_socket();
        keeper.keep(address(), &[kept.as_fd()]).unwrap();
        rustix::net::send(&keeper.socket, b"{\"Sing\":{}}", SendFlags::NOSIGNAL).unwrap();
        keeper.wait().unwrap();
        assert!(keeper.hear().unwrap_err().is::<Silent>());
        assert_eq!(cookies(&place.find().unwrap()), [cookie(&kept).unwrap()]);
    }

    #[test]
    fn without_descriptors_it_makes_nothing_and_the_next_distributor_can_still_come() {
        let place = Place::new("descriptors");
        let keeper = place.start(60_000);
        let child = pid(keeper.child.as_ref().unwrap());
        let (address, listener) = some_listener();
        keeper.keep(address, &[listener.as_fd()]).unwrap();
        drop(listener);
        assert_eq!(keeper.all().unwrap().len(), 1);
        let uid = rustix::process::geteuid().as_raw();
        let is_open = |number: &u64| Path::new(&format!("/proc/{}/fd/{number}", child.as_raw_pid())).exists();
        let few = (0..).find(|number| !is_open(number)).unwrap();
        let before = getrlimit(Resource::Nofile);
        let limit = Rlimit { current: Some(few), ..before };
        prlimit(Some(child), Resource::Nofile, limit).unwrap();
        let (free, _) = some_listener();
        assert!(keeper.make(free, uid, 1));
        match hear(&keeper) {
            Heard::NotMade(_, why) => assert!(why.contains("Too many open files"), "{why}"),
            made => panic!("{made:?}"),
        }
        drop(keeper);
        let next = place.find().unwrap();
        assert_eq!(next.all().unwrap().len(), 1);
        prlimit(Some(child), Resource::Nofile, before).unwrap();
        assert!(next.make(free, uid, 3));
        match hear(&next) {
            Heard::Made { sockets, lost, .. } => assert_eq!((sockets.len(), lost.len()), (3, 0)),
            other => panic!("{other:?}"),
        }
        assert_eq!(next.all().unwrap().len(), 4);
    }

    #[test]
    fn what_was_answered_to_an_earlier_distributor_is_passed_over() {
        let (keeper, theirs) = ends();
        let old = some_socket();
        give(&theirs, true, &old);
        let number = u64::from(process::id());
        send(&theirs, &Answer::All { number: number + 1 }, &[]).unwrap();
        let kept = some_socket();
        give(&theirs, false, &kept);
        send(&theirs, &Answer::All { number }, &[]).unwrap();
        assert_eq!(cookies(&keeper), [cookie(&kept).unwrap()]);
    }

    #[test]
    fn sockets_for_which_there_was_no_descriptor_are_known_by_their_cookies() {
        let (keeper, theirs) = ends();
        let socket = some_socket();
        let known = cookie(&socket).unwrap();
        let answer = Answer::Sockets { address: address(), is_new: true, cookies: vec![known, 7, 8] };
        send(&theirs, &answer, &[socket.as_fd()]).unwrap();
        match hear(&keeper) {
            Heard::Made { sockets, lost, .. } => {
                assert_eq!((cookie(&sockets[0]).unwrap(), sockets.len(), lost), (known, 1, vec![7, 8]));
            }
            other => panic!("{other:?}"),
        }
        // What is kept must all come, or rooms with clients in them would be taken for closed.
        let answer = Answer::Sockets { address: address(), is_new: false, cookies: vec![7] };
        send(&theirs, &answer, &[]).unwrap();
        let error = keeper.all().unwrap_err();
        assert!(!error.is::<Silent>() && error.to_string().contains("raise the limit"), "{error}");
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
