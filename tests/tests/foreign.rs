//! Servers that somebody else started join a group live, and are given back.
//!
//! The group is made by hand here: programs, maps, and a room that the test holds itself. The
//! servers are unmodified, run as another user and in a cgroup of their own, and know nothing.

#![forbid(unsafe_code)]

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use distributor_ebpf::{
    contract::{self, Home, Outcome, Run, SERVERS_END},
    word,
};
use distributor_user::{
    address::ListenAddress,
    cgroup::Cgroup,
    foreign::{self, Before, EarlierConnections, Foreign},
    instance::Instance,
    kernel::{self, Desk, Events, Kernel, Ledger, Logs, ProgramLog},
    plan::{Wanted, WantedServer},
    room::Room,
};
use rustix::{fs::Uid, net::sockopt};
use socket2::{Domain, SockRef, Socket, Type};
use tests::{
    app::App,
    client::{self, Ending},
    host::{Host, Up, V4, V6, heavy},
    http, leftover, network,
    process::{Process, Signal},
    real,
    wait::{seconds, wait_for, wait_until_eq},
};

/// Whose all sockets of the service are.
const SERVICE_UID: u32 = 12_345;
/// As whom the servers run.
const SERVER_UID: u32 = 65_534;

/// A group with our programs, made by hand.
struct Group {
    kernel: Kernel,
    desk: Desk,
    ledger: Ledger,
    listen: [ListenAddress; 1],
    rooms: u32,
    _events: Events,
    _logs: Logs,
    place: Instance,
    _runtime: tokio::runtime::Runtime,
}

impl Group {
    fn make(host: &Host) -> Self {
        let mut group = Self::bare(host);
        // Rooms are made by the keeper, in the service's cgroup; here they are made by us.
        let own = Cgroup::at(leftover::cgroup_mount().expect("cgroup v2"));
        group.kernel.count_in(&own).expect("count in our own cgroup");
        group
    }

    /// Without counting those who come to a room.
    fn bare(host: &Host) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("tokio");
        let (directory, guard) = (host.runtime("foreign"), runtime.enter());
        std::fs::create_dir(&directory).expect("make the runtime directory");
        let place = Instance::find(&directory).expect("find the places");
        let cgroup = place.cgroup.child("app");
        cgroup.create().expect("make the service's cgroup");
        let pins = kernel::pins(&place.pins, "app");
        let opened = Kernel::open(&pins, cgroup.path(), 1, ProgramLog::Off);
        let (mut kernel, events, logs) = opened.expect("load the programs");
        let listen = ["[::]:8080".parse().expect("an address")];
        kernel.set_addresses(&listen).expect("write the addresses");
        drop(guard);
        let desk = Desk::open(&pins).expect("open the maps");
        desk.share(0).store(1, Ordering::SeqCst);
        desk.bound(0).store(u64::MAX, Ordering::SeqCst);
        desk.chunk(0).store(1, Ordering::SeqCst);
        desk.crowd(0).store(80, Ordering::SeqCst);
        desk.full(0).store(1000, Ordering::SeqCst);
        let ledger = Ledger::open(&pins).expect("open the maps");
        Self {
            kernel,
            desk,
            ledger,
            listen,
            rooms: 0,
            _events: events,
            _logs: logs,
            place,
            _runtime: runtime,
        }
    }

    /// A socket for a room, not listening yet.
    fn bound(&self) -> std::io::Result<Socket> {
        self.bound_as(SERVICE_UID)
    }

    fn bound_as(&self, uid: u32) -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_only_v6(false)?;
        rustix::fs::fchown(&socket, Some(Uid::from_raw(uid)), None)?;
        socket.bind(&self.listen[0].socket.into())?;
        Ok(socket)
    }

    /// Lets a room listen, and makes it the current one.
    fn admit(&mut self, socket: Socket) -> Room {
        let cookie = sockopt::socket_cookie(&socket).expect("read a cookie");
        let sequence = u64::from(self.rooms);
        let index = SERVERS_END as u32 + self.rooms;
        self.rooms += 1;
        let room = Room { fd: OwnedFd::from(socket), cookie, group: 0, index };
        self.desk.admit(&room).expect("admit a room");
        self.desk.ring(0, sequence).store(index, Ordering::SeqCst);
        self.desk.made(0).store(sequence + 1, Ordering::SeqCst);
        self.desk.least(0).store(sequence, Ordering::SeqCst);
        room
    }

    /// Nobody waits, and the only server may have so many.
    fn plan(&mut self, limit: Option<u32>) {
        let wanted = Wanted {
            policy: Default::default(),
            capacity: 0,
            closing: false,
            cookies: false,
            bell: false,
            checks: false,
            limits: contract::Limits::NONE,
            servers: vec![WantedServer {
                slot: 0,
                identity: "app/1".to_owned(),
                eligible: true,
                weight: 100,
                limit,
                generation: 1,
                runs: vec![Run { first: 0, len: 1 }],
            }],
        };
        self.kernel.write_plan(&wanted.plan(), None).expect("write the plan");
    }

    /// Places that are taken: a SYN that the server had no room for leaves a reservation for a while.
    fn used(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now = word::epoch(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64);
        word::used(word::roll(self.kernel.load().expect("read LOAD").word[0], now))
    }

    fn active(&self) -> u64 {
        word::active(self.kernel.load().expect("read LOAD").word[0])
    }

    fn outcome(&self, outcome: Outcome) -> u64 {
        let all = self.kernel.outcomes().expect("read OUTCOMES");
        all.into_iter().find(|(of, _)| *of == outcome).expect("every outcome is there").1
    }

    #[track_caller]
    fn wait_active(&self, wanted: u64) {
        wait_until_eq("the server's connections", seconds(10.0), wanted, || self.active());
    }

    /// All steps, in the order in which nobody is dropped.
    fn adopt(&mut self, listener: &Foreign, processes: &[u32], limit: Option<u32>) -> (Before, Vec<Room>) {
        let cgroup = foreign::cgroup(listener).expect("find its cgroup");
        self.kernel.count_in(&cgroup).expect("count there");
        let before = foreign::share(listener.fd.as_fd(), SERVICE_UID, processes).expect("share it");
        let socket = self.bound().expect("bind beside it");
        let room = self.admit(socket);
        // From here on there is a group, in which nobody chooses yet: the room may get some.
        let home = Home { slot: 0, index: 0 };
        self.kernel.adopt(&listener.fd, listener.cookie, home, 0).expect("adopt it");
        self.plan(limit);
        self.kernel.take_charge(&[&room]).expect("attach the program");
        // Those who came to the room meanwhile.
        let next = self.bound().expect("bind another room");
        let next = self.admit(next);
        room.empty().expect("empty the room");
        (before, vec![room, next])
    }

    /// All steps back, likewise.
    fn release(&mut self, listener: &Foreign, before: &Before, processes: &[u32], rooms: Vec<Room>) {
        self.plan(None);
        for room in &rooms {
            // The first is closed already.
            let _ = room.empty();
        }
        foreign::release(listener.fd.as_fd(), before, processes).expect("release it");
        self.kernel.disown(&listener.fd, 0).expect("disown it");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = self.place.remove();
        if !thread::panicking() {
            removed.expect("remove the instance");
            std::fs::remove_dir(&self.place.runtime_dir).expect("remove its directory");
            let left = leftover::of_instance(&self.place.runtime_dir);
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// A server that somebody else started.
struct Server(Child);

impl Server {
    fn start(cgroup: &Cgroup, command: &[String]) -> Self {
        cgroup.create().expect("make the server's cgroup");
        let enter = format!("echo $$ > {}/cgroup.procs", cgroup.path().display());
        let mut shell = Command::new("sh");
        let uid = SERVER_UID.to_string();
        shell.args(["-c", &format!("{enter} && exec setpriv --reuid {uid} --clear-groups \"$@\""), "server"]);
        shell.args(command).env("DIST_CTL_INDEX", "1").stdin(Stdio::null()).stderr(Stdio::null());
        let server = Self(shell.stdout(Stdio::null()).spawn().expect("start the server"));
        wait_for("the server to listen", seconds(30.0), || TcpStream::connect(V4).ok());
        wait_until_eq("connections that are left of that", seconds(10.0), 0, network::connections);
        server
    }

    fn process(&self) -> Process {
        Process::find(self.0.id() as i32).expect("it runs")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn python(host: &Host) -> Vec<String> {
    let mut words: Vec<String> =
        real::python(host, 1).iter().map(|word| word.replace("{index}", "1")).collect();
    words.extend(["--bind", "::"].map(str::to_owned));
    words
}

/// Clients come without a pause, and none of them may notice anything.
fn while_clients_come(work: impl FnOnce()) -> u64 {
    let (is_over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let clients: Vec<_> = [V4, V6, V4]
            .map(|address| {
                let (is_over, served) = (&is_over, &served);
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        let body = http::get(address).unwrap_or_else(|error| panic!("a client: {error}"));
                        assert_eq!(body, "1\n");
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .into();
        let some = |more: u64| {
            let until = served.load(Ordering::Relaxed) + more;
            wait_for("clients to be served", seconds(20.0), || {
                (served.load(Ordering::Relaxed) >= until || clients.iter().any(|it| it.is_finished()))
                    .then_some(())
            });
        };
        some(20);
        work();
        some(20);
        is_over.store(true, Ordering::Relaxed);
    });
    served.into_inner()
}

fn options(listener: &Foreign) -> (bool, bool, u32) {
    let socket = SockRef::from(&listener.fd);
    let uid = rustix::fs::fstat(&listener.fd).expect("look at the listener").st_uid;
    (socket.reuse_address().expect("read"), socket.reuse_port().expect("read"), uid)
}

/// Adopts a server under load, finds it steered, counted and limited, and gives it back under load;
/// all of it twice.
fn adopted_and_given_back(host: &Host, command: &[String]) {
    let mut group = Group::make(host);
    let elsewhere = group.place.cgroup.child("elsewhere");
    let server = Server::start(&elsewhere, command);
    for _ in 0..2 {
        let found = foreign::find(server.0.id(), &group.listen, &[]).expect("find its listener");
        let [listener] = &found.listeners[..] else { panic!("one listener: {found:?}") };
        let at_first = options(listener);
        assert_eq!(at_first, (true, false, SERVER_UID));
        assert_eq!(foreign::cgroup(listener).expect("find its cgroup"), elsewhere);
        let mut old: Vec<TcpStream> = client::stand(&[V4, V6], 2);
        let mut adopted = None;
        while_clients_come(|| adopted = Some(group.adopt(listener, &found.processes, None)));
        let (before, rooms) = adopted.expect("it is adopted");
        assert_eq!(options(listener), (true, true, SERVICE_UID));
        assert_eq!(group.outcome(Outcome::MoveFailed), 0);

        // What came before is not counted, and what comes now is.
        wait_until_eq("places that are taken", seconds(10.0), 0, || group.used());
        let mut earlier =
            EarlierConnections::note(listener, group.ledger.tags(), &[]).expect("note what was there");
        let open = earlier.still_open(&group.listen).expect("look");
        assert_eq!(open, 2);
        group.plan(Some(5));
        let held = client::stand(&[V4, V6], 5);
        group.wait_active(5);
        for address in [V4, V6] {
            let refused = TcpStream::connect(address).expect_err("the limit holds");
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        for stream in old.drain(..) {
            assert_eq!(http::ask(stream).expect("what was there is served"), "1\n");
        }
        wait_until_eq("those from before", seconds(10.0), 0, || {
            earlier.still_open(&group.listen).expect("look")
        });
        assert_eq!(group.active(), 5);

        group.plan(None);
        let mut rooms = Some(rooms);
        while_clients_come(|| {
            let rooms = rooms.take().expect("once");
            group.release(listener, &before, &found.processes, rooms);
        });
        assert_eq!(options(listener), at_first);
        assert_eq!(group.outcome(Outcome::MoveFailed), 0);
        for stream in held {
            assert_eq!(http::ask(stream).expect("what is held is served"), "1\n");
        }
        group.wait_active(0);
        let number = elsewhere.id().expect("it is there");
        group.kernel.count_no_longer_in(number).expect("count there no more");
        let before = group.outcome(Outcome::Established);
        assert_eq!(http::get(V4).expect("it goes on alone"), "1\n");
        assert_eq!(group.outcome(Outcome::Established), before);
        // (Those of the service's user still can: the kernel remembers of a port who last shared it,
        // as long as the port is used: `sk_reuseport_match`, Linux 6.18.)
        let refused = group.bound_as(SERVER_UID).expect_err("nobody can bind beside it any more");
        assert_eq!(refused.raw_os_error(), Some(libc::EADDRINUSE));
    }
}

#[test]
fn python_is_adopted_and_given_back_and_no_client_notices() {
    let host = Host::new();
    adopted_and_given_back(&host, &python(&host));
}

#[test]
fn java_is_adopted_and_given_back_and_no_client_notices() {
    let _alone = heavy();
    let host = Host::new();
    adopted_and_given_back(&host, &real::java_threads());
}

/// With a client in its accept queue.
#[test]
fn the_steps_work_in_one_order_only() {
    let host = Host::new();
    let mut group = Group::make(&host);
    let elsewhere = group.place.cgroup.child("elsewhere");
    let server = Server::start(&elsewhere, &python(&host));
    let found = foreign::find(server.0.id(), &group.listen, &[]).expect("find its listener");
    let listener = &found.listeners[0];
    server.process().freeze(seconds(5.0));
    let queued = client::connect(V4).expect("a place in its queue");
    let home = Home { slot: 0, index: 0 };
    let errno = |error: anyhow::Error| {
        let mut causes = error.chain().filter_map(|it| it.downcast_ref::<std::io::Error>());
        causes.next_back().and_then(std::io::Error::raw_os_error)
    };

    // Nobody can bind before the listener is shared, nor as another user.
    assert_eq!(group.bound().unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
    foreign::share(listener.fd.as_fd(), SERVER_UID, &found.processes).expect("share it");
    assert_eq!(group.bound().unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
    foreign::share(listener.fd.as_fd(), SERVICE_UID, &found.processes).expect("share it");
    let room = group.bound().expect("bind beside it");
    // A group begins when its second socket listens: before that, nothing can be put into SOCKETS,
    // and no program attached through the listener.
    let early = group.kernel.adopt(&listener.fd, listener.cookie, home, 0).unwrap_err();
    assert_eq!(errno(early), Some(libc::EINVAL));
    let early = group.kernel.take_charge(&[&listener.fd]).unwrap_err();
    assert_eq!(errno(early), Some(libc::EINVAL));
    let room = group.admit(room);
    group.kernel.adopt(&listener.fd, listener.cookie, home, 0).expect("adopt it");
    group.plan(None);
    group.kernel.take_charge(&[&listener.fd]).expect("attach the program through the listener");

    // The one in the queue is where it was, and nobody counts it.
    let mut earlier = EarlierConnections::note(listener, group.ledger.tags(), &[]).expect("note it");
    assert_eq!(earlier.still_open(&group.listen).expect("look"), 1);
    server.process().signal(Signal::CONT);
    assert_eq!(http::ask(queued).expect("it is served"), "1\n");
    wait_until_eq("those from before", seconds(10.0), 0, || earlier.still_open(&group.listen).expect("look"));
    assert_eq!(group.active(), 0);
    // Not while a room is there.
    let before =
        Before { reuse_address: true, reuse_port: false, uid: SERVER_UID, connections: Default::default() };
    let refused = foreign::release(listener.fd.as_fd(), &before, &found.processes).unwrap_err();
    assert!(refused.to_string().contains("others listen there still (1)"), "{refused}");
    drop(room);
}

/// One that binds without SO_REUSEADDR, as hand-written servers do.
#[test]
fn a_server_without_any_option_is_adopted_once_it_has_accepted_what_was_queued() {
    const SERVER: &str = "
import socket, threading
listener = socket.socket(socket.AF_INET6)
listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
listener.bind(('::', 8080))
listener.listen(100)
def serve(connection):
    request = b''
    while b'\\r\\n\\r\\n' not in request:
        more = connection.recv(4096)
        if not more: return connection.close()
        request += more
    connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n1\\n')
    connection.close()
while True:
    connection, _ = listener.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
";
    let host = Host::new();
    let mut group = Group::make(&host);
    let elsewhere = group.place.cgroup.child("elsewhere");
    let command = ["/usr/bin/python3", "-c", SERVER].map(str::to_owned);
    let server = Server::start(&elsewhere, &command);
    let find = || foreign::find(server.0.id(), &group.listen, &[]).expect("find its listener");
    let held = client::connect(V4).expect("a connection");
    // Its listener and the connection.
    wait_until_eq("its sockets", seconds(5.0), 2, || {
        server.process().descriptors().values().filter(|target| target.starts_with("socket:")).count()
    });
    server.process().freeze(seconds(5.0));
    let queued = client::connect(V6).expect("a place in its queue");
    let found = find();
    let listener = &found.listeners[0];
    assert_eq!(options(listener), (false, false, SERVER_UID));

    let before = foreign::share(listener.fd.as_fd(), SERVICE_UID, &found.processes).expect("share it");
    assert_eq!(before.connections.len(), 1, "the one that it has accepted");
    assert_eq!(group.bound().unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
    server.process().signal(Signal::CONT);
    let mut all = before;
    wait_for("nobody to be in the way", seconds(10.0), || {
        let later = foreign::share(listener.fd.as_fd(), SERVICE_UID, &found.processes).expect("share it");
        all = all.clone().and(&later);
        group.bound().ok()
    });
    assert_eq!(all.connections.len(), 2, "and the other one");

    let (_, rooms) = group.adopt(listener, &found.processes, None);
    assert_eq!(http::get(V4).expect("a new one is served"), "1\n");
    group.release(listener, &all, &found.processes, rooms);
    assert_eq!(options(listener), (false, false, SERVER_UID));
    for stream in [held, queued] {
        assert_eq!(http::ask(stream).expect("it is served"), "1\n");
    }
}

/// nginx's workers share the master's listener: one by one they are given, and all are found.
#[test]
fn a_listener_that_nginx_shares_is_found_once_through_any_worker() {
    let host = Host::new();
    let group = Group::make(&host);
    let elsewhere = group.place.cgroup.child("elsewhere");
    let command: Vec<String> = real::nginx(&host, 1, real::Nginx::Shared, real::Daemon::Off)
        .iter()
        .map(|word| word.replace("{index}", "1"))
        .collect();
    let server = Server::start(&elsewhere, &command);
    let workers = wait_for("its workers", seconds(5.0), || {
        let workers = server.process().children();
        (workers.len() == 2).then_some(workers)
    });
    let through_master = foreign::find(server.0.id(), &group.listen, &[]).expect("find its listener");
    assert_eq!(through_master.processes.len(), 3);
    for worker in workers {
        let found = foreign::find(worker.pid as u32, &group.listen, &[]).expect("find its listener");
        assert_eq!(found.processes, through_master.processes);
        assert_eq!(found.listeners.len(), 1);
        assert_eq!(found.listeners[0].cookie, through_master.listeners[0].cookie);
    }
}

/// A socket belongs to the cgroup in which it was made, wherever its process is now.
#[test]
fn a_listener_whose_cgroup_is_gone_is_counted_from_the_root() {
    let host = Host::new();
    let mut group = Group::bare(&host);
    let (first, second) = (group.place.cgroup.child("first"), group.place.cgroup.child("second"));
    let server = Server::start(&first, &python(&host));
    let found = foreign::find(server.0.id(), &group.listen, &[]).expect("find its listener");
    let listener = &found.listeners[0];
    second.create().expect("make another cgroup");
    std::fs::write(second.path().join("cgroup.procs"), server.0.id().to_string()).expect("move the server");
    assert_eq!(foreign::cgroup(listener).expect("find its cgroup"), first);
    first.remove().expect("remove the first cgroup");
    let root = Cgroup::at(leftover::cgroup_mount().expect("cgroup v2"));
    assert_eq!(foreign::cgroup(listener).expect("find its cgroup"), root);

    let (before, rooms) = group.adopt(listener, &found.processes, None);
    let held = client::stand(&[V4, V6], 4);
    group.wait_active(4);
    drop(held);
    group.wait_active(0);
    group.release(listener, &before, &found.processes, rooms);
}

/// `track` runs twice for each event: for the service's own cgroup, and for the root above it.
#[test]
fn an_event_that_is_told_twice_is_counted_once() {
    const EACH: usize = 200;
    let host = Host::new();
    // What other tests do on their ports is not to be told.
    const LISTEN: &str = "[::]:8181";
    let addresses: [SocketAddr; 2] =
        ["127.0.0.1:8181", "[::1]:8181"].map(|it| it.parse().expect("an address"));
    let mut app = App { limit: Some(3), ..App::with(&host, 3, &["--listen", LISTEN]) };
    app.listen = vec![LISTEN.to_owned()];
    app.waiting = Some("capacity = 1000\ntimeout = \"1m\"".to_owned());
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_CHECK_COUNTS", "20ms");
    let up = host.start_command(command);
    up.wait_ready();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("tokio");
    let guard = runtime.enter();
    let pins = kernel::pins(&leftover::pins(up.runtime()).expect("it runs"), "app");
    let opened = Kernel::open(&pins, &up.cgroup().join("app"), 1, ProgramLog::Off);
    let (mut kernel, _events, _logs) = opened.expect("open its kernel objects");
    drop(guard);
    let root = Cgroup::at(leftover::cgroup_mount().expect("cgroup v2"));
    let number = kernel.count_in(&root).expect("attach track above it");

    let before = up.service();
    client::in_threads(12, 0..Ending::ALL.len() * EACH, |number| {
        Ending::ALL[number % Ending::ALL.len()].happen(addresses[number % 2])
    })
    .expect("every connection is served");
    up.wait_connections(&[0; 3]);
    wait_until_eq("those who wait", seconds(5.0), 0, || up.service().waiting.now);
    let after = up.service();
    let more = |name: &str| after.outcome(name) - before.outcome(name);
    let all = (Ending::ALL.len() * EACH) as u64;
    assert_eq!(more("established") + more("established_waiting"), all);
    assert_eq!(more("closed") + more("closed_waiting"), all);
    assert!(more("handed_over") > 0, "{:?}", after.outcomes);
    assert!(after.servers.iter().all(|server| server.connections_max <= 3), "{after:#?}");
    // Held ones too: one each, and the limit holds.
    let held = client::hold(addresses[0], 9);
    assert_eq!(up.connections(), [3, 3, 3]);
    // A listener that opens or closes is told of twice, so `track` does run twice.
    let listened = up.service().outcomes(["listening", "listener_closed"]);
    up.process("app/1").kill(seconds(5.0));
    wait_restarted(&up);
    let now = up.service().outcomes(["listening", "listener_closed"]);
    assert_eq!([now[0] - listened[0], now[1] - listened[1]], [2, 2]);
    drop(held);
    up.wait_connections(&[0; 3]);
    assert_eq!(up.service().drift.found, 0, "{}", up.log());
    kernel.count_no_longer_in(number).expect("detach it");
}

#[track_caller]
fn wait_restarted(up: &Up<'_>) {
    wait_for("a restart", seconds(20.0), || {
        let server = up.service().server("app/1").clone();
        (server.restarts == 1 && server.state == "ready").then_some(())
    });
}
