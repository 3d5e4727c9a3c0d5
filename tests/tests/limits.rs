//! A limit is never exceeded, and never wasted for long.
//!
//! Where nobody may wait, whoever finds no place is refused at once, and so can be counted;
//! what becomes of those who wait is the subject of waiting.rs.

#![forbid(unsafe_code)]

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::setpriority_process;
use tests::{
    app::App,
    client::{self, Client, flag},
    host::{Host, Up, V4, V6},
    network::{self, Clients},
    status::Status,
    wait::{fewer, seconds, wait_for},
};

/// The kernel's counts of the servers, asked for on one connection to the control socket: a
/// command for each sample would get no CPU beside 200 busy threads.
struct Counts(BufReader<UnixStream>);

impl Counts {
    fn of(up: &Up<'_>) -> Self {
        let socket = UnixStream::connect(up.control_socket()).expect("connect to the control socket");
        socket.set_read_timeout(Some(seconds(10.0))).expect("set a timeout");
        Self(BufReader::new(socket))
    }

    fn read(&mut self) -> Vec<u64> {
        self.0.get_mut().write_all(b"{\"command\":\"status\"}\n").expect("ask");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("read the answer");
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        Status::parse(&answer["status"].to_string()).only().connections()
    }
}

/// Ends the clients with the scope that watches them, also by a panic: it waits for them.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_limit_of_25_holds_under_200_client_threads() {
    let host = Host::new();
    let mut app = App::of(&host, 4).refusing();
    app.limit = Some(25);
    let up = host.up(&app);
    let deadline = Instant::now() + Duration::from_secs(6);
    let served = AtomicUsize::new(0);
    let refused = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..200 {
            let (served, refused, over) = (&served, &refused, &over);
            scope.spawn(move || {
                // The servers and those who watch them come first.
                setpriority_process(None, 10).expect("be nice");
                let mut number = thread;
                while !over.load(Ordering::Relaxed) {
                    number += 1;
                    match Client::open(V4) {
                        Ok(mut client) => {
                            served.fetch_add(1, Ordering::Relaxed);
                            // In an orderly way, from either side: see `inside`.
                            if number % 2 == 0 {
                                let _ = client.say("close");
                                let _ = client.wait_for_end();
                            } else {
                                thread::sleep(Duration::from_millis(number % 5));
                            }
                        }
                        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            thread::sleep(Duration::from_millis(1));
                        }
                        Err(error) => panic!("neither served nor refused at once: {error}"),
                    }
                }
            });
        }
        let _end = Ends(&over);
        let mut kernel = Counts::of(&up);
        let mut samples = 0;
        while Instant::now() < deadline || samples < 50 {
            let counts = kernel.read();
            assert!(counts.iter().all(|count| *count <= 25), "the kernel counts {counts:?}");
            for name in ["1", "2", "3", "4"] {
                let inside = host.inside(name);
                assert!(inside.now <= 25, "{} connections inside {name}", inside.now);
            }
            samples += 1;
        }
    });
    let service = up.service();
    for server in &service.servers {
        // The most that the kernel ever counted and the server ever had, sampled or not. All
        // places were in use: a limit that is kept by leaving places empty is no feat.
        assert_eq!(server.connections_max, 25, "{}", server.name);
    }
    for name in ["1", "2", "3", "4"] {
        let most = host.inside(name).most;
        assert!(most <= 25, "{most} connections inside {name} at some time");
    }
    let (served, refused) = (served.into_inner() as u64, refused.into_inner() as u64);
    assert!(
        served > fewer(1000, 100) as u64 && refused > fewer(100, 10) as u64,
        "served {served}, refused {refused}"
    );
    assert_eq!(service.outcome("established"), served);
    // The kernel sends a refused SYN again if its answer comes late, or comes from what is left
    // of an older connection with these ports (TIME_WAIT). The second one may find a place, and nobody
    // who still wants it.
    let again = network::syns_sent_again();
    let selected = service.outcome("selected");
    assert!((served..=served + again).contains(&selected), "{selected}: {served} served, {again} again");
    let counted = service.outcome("refused_limit");
    assert!((refused..=refused + again).contains(&counted), "{counted}: {refused} refused, {again} again");
    up.wait_connections(&[0; 4]);
}

#[test]
fn a_client_is_refused_at_once_when_all_are_full() {
    let host = Host::new();
    let mut app = App::of(&host, 2).refusing();
    app.limit = Some(3);
    let up = host.up(&app);
    let held = client::hold(V4, 6);
    let (start, again) = (Instant::now(), network::syns_sent_again());
    let error = client::connect(V4).expect_err("no place is left");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < seconds(5.0), "it took {:?}", start.elapsed());
    assert_eq!(network::syns_sent_again(), again, "and so not by a second SYN");
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "refused_limit", "wait_no_server"]), [6, 1, 0]);
    assert_eq!(service.waiting.now, 0);
    drop(held);
    up.wait_connections(&[0, 0]);
    Client::open(V4).expect("a place again");
}

#[test]
fn a_limit_of_one_serves_one_at_a_time() {
    let host = Host::new();
    let mut app = App::of(&host, 1).refusing();
    app.limit = Some(1);
    let up = host.up(&app);
    for _ in 0..20 {
        let client = Client::open(V4).expect("the place is free");
        assert_eq!(client::connect(V4).expect_err("it is taken").kind(), ErrorKind::ConnectionRefused);
        drop(client);
        up.wait_connections(&[0]);
    }
    assert_eq!(host.inside("1").most, 1);
    assert_eq!(up.service().outcomes(["established", "refused_limit"]), [20, 20]);
}

#[test]
fn different_limits_are_each_kept() {
    let host = Host::new();
    let servers = [("small", "limit = 2"), ("big", "limit = 7"), ("free", "")];
    let servers = servers.map(|(name, lines)| (name, lines.to_owned()));
    let up = host.up(&App::of(&host, 0).named(servers));
    let held = client::hold(V4, 100);
    assert_eq!(up.connections(), [2, 7, 91]);
    let limits: Vec<_> = up.service().servers.iter().map(|server| server.limit).collect();
    assert_eq!(limits, [Some(2), Some(7), None]);
    drop(held);
}

/// A SYN takes a place before its connection exists. If the connection never comes, the place
/// is free again after at most 2.2 seconds.
#[test]
fn a_handshake_that_never_completes_gives_its_place_back() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let mut app = App::of(&host, 1).refusing();
    app.limit = Some(10);
    let up = host.up(&app);
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let start = Instant::now();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 4)).expect("send SYNs");
    // Six are left for others at once, and no more.
    let held = client::hold(V4, 6);
    assert_eq!(client::connect(V4).expect_err("reserved").kind(), ErrorKind::ConnectionRefused);
    drop(begun);
    let rest = wait_for("the reserved places to be free", seconds(4.0), || {
        let rest: Vec<_> = std::iter::from_fn(|| Client::open(V4).ok()).collect();
        (!rest.is_empty()).then_some(rest)
    });
    assert!(start.elapsed() > Duration::from_secs(1), "free after {:?} already", start.elapsed());
    let mut all = held;
    all.extend(rest);
    wait_for("all ten places to be used", seconds(4.0), || {
        all.extend(Client::open(V4));
        (all.len() == 10).then_some(())
    });
    assert_eq!(client::connect(V4).expect_err("full").kind(), ErrorKind::ConnectionRefused);
    assert_eq!(up.connections(), [10]);
}

/// Whoever only sends SYNs can take all places, and no more, until they are free by themselves.
#[test]
fn handshakes_that_never_complete_take_no_more_than_the_limit() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let mut app = App::of(&host, 1).refusing();
    app.limit = Some(20);
    let up = host.up(&app);
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    // Gone at once: who is refused does not hear of it, and would send his again.
    drop(clients.network.run(|| client::begin(target, Some(clients.v4(0)), 200)).expect("send SYNs"));
    assert_eq!(up.service().outcomes(["selected", "refused_limit", "established"]), [20, 180, 0]);
    assert_eq!(up.connections(), [0]);
    let mut held = Vec::new();
    wait_for("all places to be used", seconds(5.0), || {
        held.extend(std::iter::from_fn(|| Client::open(V4).ok()));
        (held.len() == 20).then_some(())
    });
    assert_eq!(up.connections(), [20]);
}

/// An ACK may be under way when its connection is reset. No handshake comes after it, so a place
/// that it took would be lost to others until it expires.
#[test]
fn a_segment_that_opens_no_connection_takes_no_place() {
    const STRAYS: [u8; 8] = [
        flag::ACK,
        flag::ACK | flag::PSH,
        flag::ACK | flag::FIN,
        flag::ACK | flag::RST,
        flag::ACK | flag::SYN,
        flag::SYN | flag::FIN,
        flag::RST,
        0,
    ];
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.limit = Some(1);
    let up = host.up(&app);
    let target = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
    for (port, flags) in (4000..).zip(STRAYS) {
        client::send_segment(port, target, flags).expect("send a segment");
    }
    assert_eq!(up.service().outcomes(["stray", "selected", "refused_limit"]), [STRAYS.len() as u64, 0, 0]);
    let held = Client::open(V4).expect("the place is free");
    client::send_segment(4000, target, flag::ACK).expect("send a segment");
    assert_eq!(
        up.service().outcomes(["stray", "selected", "refused_limit"]),
        [STRAYS.len() as u64 + 1, 1, 0]
    );
    drop(held);
}

/// With SYN cookies the kernel remembers nothing of a SYN, and asks for a listener again at the
/// ACK. A place for each would halve the limit.
#[test]
fn with_syn_cookies_a_connection_takes_one_place() {
    for address in [V4, V6] {
        let host = Host::new();
        always_send_cookies();
        let mut app = App::of(&host, 2).refusing();
        app.limit = Some(10);
        let up = host.up(&app);
        let held = client::hold(address, 20);
        assert_eq!(up.connections(), [10, 10]);
        let error = client::connect(address).expect_err("no place is left");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        // Each was asked about twice.
        let ways = ["selected", "refused_limit", "stray", "established"];
        assert_eq!(up.service().outcomes(ways), [40, 1, 0, 20]);
        drop(held);
        up.wait_connections(&[0, 0]);
    }
}

#[test]
fn with_syn_cookies_a_limit_holds_under_50_client_threads() {
    let host = Host::new();
    always_send_cookies();
    let mut app = App::of(&host, 2).refusing();
    app.limit = Some(5);
    let up = host.up(&app);
    let all = fewer(2_000, 400);
    client::in_threads(50, 0..all, |_| {
        // Who is let in at the SYN may find the place taken at the ACK: then it is reset. The
        // client closes first: a SYN that meets what is left of an older connection at the server
        // (TIME_WAIT) gets no cookie (tcp_conn_request, Linux 6.18), and so its ACK asks nobody.
        wait_for("a place", client::patience(), || Client::open(V4).ok()).say("who")
    })
    .expect("whoever is served is served to the end");
    let service = up.service();
    for server in &service.servers {
        assert_eq!(server.connections_max, 5, "{}", server.name);
    }
    assert_eq!(service.outcomes(["established", "word_contended"]), [all as u64, 0]);
    up.wait_connections(&[0, 0]);
}

/// Every handshake in the calling thread's network goes by a SYN cookie.
fn always_send_cookies() {
    std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("turn SYN cookies on");
}

#[test]
fn a_lower_limit_closes_nothing_and_lets_nobody_in() {
    let host = Host::new();
    let mut app = App::of(&host, 2).refusing();
    app.limit = Some(50);
    let up = host.up(&app);
    let mut held = client::hold(V4, 20);
    up.run(&["limit", "app/1", "5"]).expect_done();
    assert_eq!(up.service().server("app/1").limit, Some(5));
    assert!(held.iter_mut().all(Client::is_served));
    let more = client::hold(V4, 20);
    assert_eq!(client::by_name(&more), [("2".to_owned(), 20)].into());
    assert_eq!(up.connections(), [10, 30]);
    // Once it is below its new limit, it takes part again, up to five.
    held.retain(|client| client.server != "1");
    up.wait_connections(&[0, 30]);
    let again = client::hold(V4, 20);
    assert_eq!(up.connections(), [5, 45]);
    // The other one has five places left. When they are taken nobody is let in any more.
    let rest = client::hold(V4, 5);
    assert_eq!(up.connections(), [5, 50]);
    assert_eq!(up.service().outcomes(["selected", "next_best", "refused_limit"]), [65, 0, 0]);
    for _ in 0..7 {
        let error = client::connect(V4).expect_err("both are full");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(up.connections(), [5, 50]);
    assert_eq!(up.service().outcomes(["selected", "next_best", "refused_limit"]), [65, 0, 7]);
    drop((held, more, again, rest));
}

#[test]
fn a_raised_limit_lets_more_in() {
    let host = Host::new();
    let mut app = App::of(&host, 1).refusing();
    app.limit = Some(2);
    let up = host.up(&app);
    let first = client::hold(V4, 2);
    assert_eq!(client::connect(V4).expect_err("full").kind(), ErrorKind::ConnectionRefused);
    assert_eq!(up.service().outcomes(["selected", "refused_limit"]), [2, 1]);
    up.run(&["limit", "app/1", "4"]).expect_done();
    let second = client::hold(V4, 2);
    assert_eq!(up.service().outcomes(["selected", "refused_limit"]), [4, 1], "nobody was refused below 4");
    assert_eq!(client::connect(V4).expect_err("full again").kind(), ErrorKind::ConnectionRefused);
    assert_eq!(up.connections(), [4]);
    assert_eq!(up.service().outcomes(["selected", "refused_limit"]), [4, 2]);
    drop((first, second));
}
