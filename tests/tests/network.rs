//! What crosses a network: hosts that run dist-ctl each, and clients on another host.

#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tests::{
    app::App,
    client::{self, Client, Line, flag},
    flood::{Ends, Flood, PER_SECOND, Serial, set_syncookies},
    host::{Host, Up, heavy},
    network,
    site::{self, CLIENTS, ETHERNET, Site},
    wait::{fewer, seconds, stays, wait_until_eq},
    wire::Segment,
};

const JUMBO: u32 = 9000;
const MIB: usize = 1 << 20;

/// Brings a service up in a host's own network.
#[track_caller]
fn up<'h>(host: &'h Host, app: &App) -> Up<'h> {
    host.network().run(|| host.up(app))
}

/// So many servers with this limit each, which are filled one after the other.
fn filled_in_order(host: &Host, servers: usize, limit: u32) -> App {
    App { policy: Some("first"), limit: Some(limit), ..App::of(host, servers) }
}

/// Who waits, once nobody is on the way.
#[track_caller]
fn wait_waiting(up: &Up<'_>, wanted: u64) {
    wait_until_eq("those who wait", seconds(15.0), wanted, || up.service().waiting.now);
}

/// Somebody hears that he is refused, and not only that nobody answers.
#[track_caller]
fn expect_refused(address: SocketAddr) {
    let again = network::syns_sent_again();
    let error = client::connect(address).expect_err("it is refused");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    assert_eq!(network::syns_sent_again(), again, "the first SYN to {address} was answered");
}

/// Bytes of which no two stretches are the same.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The ways on which a connection comes to its server, each with the client's view of it.
#[derive(Debug)]
enum Way {
    Direct,
    Waited,
    Moved,
}

/// Has a client come to two servers with room for two on each way, and say something long on
/// it. Nobody else is there.
#[track_caller]
fn on_each_way(site: &Site, up: &Up<'_>, address: SocketAddr, said: &[u8], check: impl Fn(Way, Client)) {
    let clients = &site.clients;
    let connect =
        || clients.run(|| client::connect(address)).unwrap_or_else(|error| panic!("{address}: {error}"));
    let echo = |way: &str, stream| {
        client::echo(stream, said).unwrap_or_else(|error| panic!("{way} {address}: {error}"))
    };
    check(Way::Direct, echo("directly to", connect()));
    up.wait_connections(&[0, 0]);

    let mut held = clients.run(|| client::hold(address, 4));
    assert_eq!(up.connections(), [2, 2]);
    let waits = connect();
    wait_waiting(up, 1);
    let waited = thread::scope(|scope| {
        // The request fills the queues on the way before somebody reads it.
        let waiting = scope.spawn(|| echo("from the list to", waits));
        drop(held.pop());
        waiting.join().expect("the client's thread does not panic")
    });
    check(Way::Waited, waited);
    drop(held);
    up.wait_connections(&[0, 0]);

    let victim = up.process("app/1");
    victim.freeze(seconds(5.0));
    let queued = connect();
    up.wait_connections(&[1, 0]);
    let moved = thread::scope(|scope| {
        let moving = scope.spawn(|| echo("from a killed server's queue to", queued));
        victim.kill(seconds(5.0));
        moving.join().expect("the client's thread does not panic")
    });
    assert_ne!(moved.pid, victim.pid);
    check(Way::Moved, moved);
    up.wait_ready();
    up.wait_connections(&[0, 0]);
}

#[test]
fn a_server_sees_the_address_of_a_client_on_another_host() {
    let site = Site::new(3, ETHERNET);
    let ways = AtomicU64::new(0);
    thread::scope(|scope| {
        for (number, host) in (1..).zip(&site.hosts) {
            let (site, ways) = (&site, &ways);
            scope.spawn(move || {
                let up = up(host, &filled_in_order(host, 2, 2));
                for (address, source) in site.service(number).into_iter().zip(site::addresses(CLIENTS)) {
                    on_each_way(site, &up, address, b"hello", |way, client| {
                        let own = client.stream.local_addr().expect("it is connected");
                        assert_eq!(own.ip(), source);
                        assert_eq!(client.seen_as, own, "{way:?} to {address}");
                        ways.fetch_add(1, Ordering::Relaxed);
                    });
                }
                let service = up.service();
                assert_eq!(service.outcomes(["handed_over", "moved", "move_failed"]), [2, 2, 0]);
            });
        }
    });
    assert_eq!(ways.into_inner(), 3 * 2 * 3);
}

#[test]
fn a_client_on_another_host_hears_at_once_that_he_is_refused() {
    let site = Site::new(3, ETHERNET);
    let full =
        |host: &Host, waiting: &str| App { waiting: Some(waiting.to_owned()), ..filled_in_order(host, 1, 1) };
    let ups = [
        // Nobody may wait; one may; and there is no server at all.
        up(&site.hosts[0], &full(&site.hosts[0], "capacity = 0")),
        up(&site.hosts[1], &full(&site.hosts[1], "capacity = 1")),
        site.hosts[2].network().run(|| {
            let never = App::with(&site.hosts[2], 1, &["--never-listen"]);
            site.hosts[2].start(&never.refusing())
        }),
    ];
    site.clients.run(|| {
        for family in 0..2 {
            let [nobody, one, none] = [1, 2, 3].map(|host| site.service(host)[family]);
            let held = [nobody, one].map(|address| Client::open(address).expect("a place"));
            let waits = client::connect(one).expect("a place in line");
            wait_waiting(&ups[1], 1);
            for address in [nobody, one, none] {
                (0..3).for_each(|_| expect_refused(address));
            }
            drop(held);
            drop(Client::greeted(waits).expect("served"));
            ups[..2].iter().for_each(|up| up.wait_connections(&[0]));
        }
    });
    for up in &ups {
        let service = up.service();
        assert_eq!(service.waiting.refused, 6, "{service:?}");
    }
}

#[test]
fn long_requests_and_answers_cross_links_of_every_mtu() {
    let site = Site::new(2, JUMBO);
    // The first host says in its handshakes that it takes less, and the second does not: what is
    // too long for the way to it and back is found out by those who send it.
    site.set_mtu(1, ETHERNET).expect("set the MTU of a host's link");
    let said = noise(2 * MIB);
    let ups: Vec<Up<'_>> = site.hosts.iter().map(|host| up(host, &filled_in_order(host, 2, 2))).collect();
    let told = || {
        (site.clients.run(network::told_of_the_mtu), site.hosts[1].network().run(network::told_of_the_mtu))
    };
    let cross = |number: u8| {
        for address in site.service(number) {
            on_each_way(&site, &ups[usize::from(number) - 1], address, &said, |_, _| {});
        }
    };
    cross(1);
    cross(2);
    let before = told();
    assert_eq!(before, ([0; 2], [0; 2]), "nobody was told of the MTU on a way that is as wide as its links");

    for number in [CLIENTS, 2] {
        site.narrow(number, [576, 1280]).expect("make the way narrower");
    }
    cross(2);
    let (client, host) = told();
    assert!(client.iter().chain(&host).all(|told| *told > 0), "client {client:?}, host {host:?}");
}

/// Loses the first segment of each connection that has just these flags, as often as it counts. Of
/// connections that begin from now on: of earlier ones something may be under way.
fn first_with(flags: u8, lost: &Arc<AtomicU64>) -> impl FnMut(Segment) -> bool + Send + 'static {
    let (mut begun, mut seen, lost) = (HashSet::new(), HashSet::new(), Arc::clone(lost));
    move |segment| {
        let its = segment.flags & (flag::SYN | flag::ACK | flag::FIN | flag::RST | flag::PSH);
        let (way, back) = ((segment.from, segment.to), (segment.to, segment.from));
        if its == flag::SYN {
            begun.insert(way);
        }
        let is_new = begun.contains(&way) || begun.contains(&back);
        let first = its == flags && is_new && seen.insert(way);
        lost.fetch_add(first.into(), Ordering::Relaxed);
        first
    }
}

/// Comes while places are free, as many as there are, or while all are taken.
///
/// Nobody comes here while others are handed over; that is another test's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Places {
    Free,
    Taken,
}

#[track_caller]
fn parts_of_handshakes_are_lost(places: Places) {
    const SERVERS: usize = 2;
    const LIMIT: u32 = 10;
    const PLACES: usize = SERVERS * LIMIT as usize;
    let (site, wire) = Site::far(1, Duration::from_millis(5));
    let app = App { limit: Some(LIMIT), ..App::of(&site.hosts[0], SERVERS) };
    // Where some may wait, only half of the places can be reserved.
    let app = if places == Places::Free { app.refusing() } else { app };
    let up = up(&site.hosts[0], &app);
    let came = || up.service().outcomes(["established", "established_waiting"]).iter().sum::<u64>();
    let parts = [("SYN", flag::SYN), ("SYN-ACK", flag::SYN | flag::ACK), ("ACK", flag::ACK)];
    for ((name, flags), address) in parts.into_iter().zip(site.service(1).into_iter().cycle()) {
        let held = match places {
            Places::Free => Vec::new(),
            Places::Taken => site.clients.run(|| client::hold(address, PLACES)),
        };
        let before = came();
        let lost = Arc::new(AtomicU64::new(0));
        wire.loses(first_with(flags, &lost));
        let begun = site.clients.run(|| client::begin(address, None, PLACES)).expect("send the SYNs");
        wait_until_eq("those who have come", seconds(10.0), PLACES as u64, || came() - before);
        assert_eq!(lost.load(Ordering::Relaxed), PLACES as u64, "each {name} was lost once");
        wire.loses(|_| false);
        if places == Places::Taken {
            wait_waiting(&up, PLACES as u64);
        }
        drop(held);
        let held = begun.greeted();
        assert_eq!(came() - before, PLACES as u64, "each is counted once though its {name} was lost");
        assert_eq!(up.connections(), [u64::from(LIMIT); SERVERS], "{name}");
        drop(held);
        up.wait_connections(&[0; SERVERS]);
        // No reservation is left of those whose handshake took so long.
        let held = site.clients.run(|| client::hold(address, PLACES));
        assert_eq!(up.connections(), [u64::from(LIMIT); SERVERS], "{name}");
        drop(held);
        up.wait_connections(&[0; SERVERS]);
    }
    let service = up.service();
    for server in &service.servers {
        assert_eq!(server.connections_max, u64::from(LIMIT), "{}", server.name);
    }
    assert_eq!(service.outcomes(["refused_limit", "refused_capacity", "closed_waiting"]), [0; 3]);
}

#[test]
fn a_handshake_of_which_a_part_is_lost_takes_one_place() {
    parts_of_handshakes_are_lost(Places::Free);
}

#[test]
fn a_handshake_of_which_a_part_is_lost_takes_one_place_in_the_line() {
    parts_of_handshakes_are_lost(Places::Taken);
}

#[test]
fn a_limit_is_exact_when_a_handshake_takes_200_milliseconds() {
    const CAME: usize = 100;
    const LIMIT: u32 = 10;
    const PLACES: usize = 2 * LIMIT as usize;
    let (site, _wire) = Site::far(1, Duration::from_millis(100));
    let host = &site.hosts[0];
    let up = up(host, &App { limit: Some(LIMIT), ..App::of(host, 2) }.refusing());
    for address in site.service(1) {
        let begun = site.clients.run(|| client::begin(address, None, CAME)).expect("send the SYNs");
        let (came, refused): (Vec<_>, Vec<_>) = begun.finish().into_iter().partition(Result::is_ok);
        assert_eq!((came.len(), refused.len()), (PLACES, CAME - PLACES));
        for error in refused.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        let came = came.into_iter().flatten().map(Client::greeted);
        let came = came.collect::<Result<Vec<_>, _>>().expect("who is not refused is served");
        assert_eq!(up.connections(), [u64::from(LIMIT); 2]);
        drop(came);
        up.wait_connections(&[0; 2]);
    }
    expect_within(&up, LIMIT);
}

#[test]
fn a_limit_is_exact_when_those_who_wait_are_200_milliseconds_away() {
    const CAME: usize = 100;
    const LIMIT: u32 = 10;
    const PLACES: usize = 2 * LIMIT as usize;
    let (site, _wire) = Site::far(1, Duration::from_millis(100));
    let host = &site.hosts[0];
    let up = up(host, &App { limit: Some(LIMIT), ..App::of(host, 2) });
    for address in site.service(1) {
        // From their own host, which is faster, and they leave when all the others wait.
        let held = host.network().run(|| client::hold(address, PLACES));
        let begun = site.clients.run(|| client::begin(address, None, CAME)).expect("send the SYNs");
        let came = begun.finish().into_iter().collect::<Result<Vec<TcpStream>, _>>();
        let mut came = came.expect("all of them complete their handshake");
        wait_waiting(&up, CAME as u64);
        drop(held);
        while !came.is_empty() {
            wait_until_eq("somebody who was greeted", seconds(10.0), true, || {
                came.iter().any(client::is_greeted)
            });
            let (greeted, wait): (Vec<_>, Vec<_>) = came.into_iter().partition(client::is_greeted);
            // They read it before they close, or their kernel would reset the connection.
            greeted.into_iter().for_each(|stream| drop(Client::greeted(stream).expect("a greeting")));
            came = wait;
        }
        up.wait_connections(&[0; 2]);
    }
    let service = up.service();
    assert_eq!((service.waiting.now, service.waiting.served), (0, 2 * CAME as u64));
    expect_within(&up, LIMIT);
}

#[test]
fn nobody_is_reset_who_comes_from_afar_while_others_are_handed_over() {
    const CAME: usize = 60;
    const LIMIT: u32 = 10;
    let (site, _wire) = Site::far(1, Duration::from_millis(20));
    let host = &site.hosts[0];
    let up = up(host, &App { limit: Some(LIMIT), ..App::of(host, 2) });
    for (round, address) in (1..=8).zip(site.service(1).into_iter().cycle()) {
        // Half of the places can be reserved, and all others come to a room together. The first of
        // them are handed over when they have completed their handshakes, and the last have not.
        let begun = site.clients.run(|| client::begin(address, None, CAME)).expect("send the SYNs");
        let came = begun.finish().into_iter().collect::<Result<Vec<TcpStream>, _>>();
        let mut came = came.expect("all of them complete their handshake");
        while !came.is_empty() {
            wait_until_eq("somebody who was greeted", seconds(10.0), true, || {
                came.iter().any(client::is_greeted)
            });
            let (greeted, wait): (Vec<_>, Vec<_>) = came.into_iter().partition(client::is_greeted);
            greeted.into_iter().for_each(|stream| drop(Client::greeted(stream).expect("a greeting")));
            came = wait;
        }
        up.wait_connections(&[0; 2]);
        assert_eq!(up.service().totals().iter().sum::<u64>(), round * CAME as u64);
    }
    assert!(up.service().outcome("handed_over") > 0);
    expect_within(&up, LIMIT);
}

/// Each server had as many connections at once as it may, by the kernel's count and by its own,
/// and never more.
#[track_caller]
fn expect_within(up: &Up<'_>, limit: u32) {
    for server in &up.service().servers {
        let own = up.host.inside(server.name.strip_prefix("app/").expect("a server of app"));
        let most = (server.connections_max, own.most);
        assert_eq!(most, (limit.into(), limit.into()), "{}", server.name);
    }
}

#[test]
fn who_completes_a_slow_handshake_first_is_served_first() {
    const EACH: usize = 3;
    let (site, wire) = Site::far(1, Duration::from_millis(20));
    let up = up(&site.hosts[0], &filled_in_order(&site.hosts[0], 1, 1));
    let [v4, v6] = site.service(1);
    let served = site.clients.run(|| {
        let held = client::hold(v4, 1);
        // Those who come over IPv4 hear no answer for now, so they come first and are late.
        let answers = Arc::new(AtomicU64::new(0));
        let lost = Arc::clone(&answers);
        wire.loses(move |segment| {
            let loses = segment.from == v4 && segment.flags & flag::SYN != 0;
            lost.fetch_add(loses.into(), Ordering::Relaxed);
            loses
        });
        let late = client::begin(v4, None, EACH).expect("send the SYNs");
        wait_until_eq("answers that are lost", seconds(5.0), true, || {
            answers.load(Ordering::Relaxed) >= EACH as u64
        });
        let soon = client::stand(&[v6], EACH);
        wait_waiting(&up, EACH as u64);
        assert_eq!(late.ended(), 0);
        wire.loses(|_| false);
        let late = late.finish().into_iter().collect::<Result<Vec<_>, _>>().expect("answered at last");
        wait_waiting(&up, 2 * EACH as u64);
        let last = client::stand(&[v4, v6], EACH);
        wait_waiting(&up, 3 * EACH as u64);

        let waiting = soon.into_iter().chain(late).chain(last).collect();
        Line::behind(held, waiting).and_then(|mut line| line.turns(3 * EACH)).expect("all are served")
    });
    let place = |number: usize| served.iter().position(|it| *it == number).expect("everybody was served");
    let [soon, late] = [0..EACH, EACH..2 * EACH].map(|it| it.map(place).collect::<Vec<_>>());
    assert!(soon.is_sorted(), "who came when the one before had come: {served:?}");
    assert!(late.iter().all(|late| *late > soon[0]), "who was late is behind the first: {served:?}");
    // Who came when all these had come is behind all of them.
    assert_eq!(served[2 * EACH..], [6, 7, 8], "{served:?}");
}

#[test]
fn requests_and_answers_are_whole_on_a_wire_that_loses_segments() {
    const COME: usize = 8;
    const ONE_IN: u64 = 30;
    let (site, wire) = Site::far(1, Duration::from_millis(10));
    let up = up(&site.hosts[0], &App { limit: Some(2), ..App::of(&site.hosts[0], 2) });
    let (lost, mut dice) = (Arc::new(AtomicU64::new(0)), noise(MIB).into_iter().cycle());
    let counted = Arc::clone(&lost);
    wire.loses(move |_| {
        let loses = u64::from(dice.next().expect("a cycle has no end")) % ONE_IN == 0;
        counted.fetch_add(loses.into(), Ordering::Relaxed);
        loses
    });
    let said = noise(MIB / 16);
    site.clients.run(|| {
        // The first four are served, and the others wait until they have ended.
        let mut came = Vec::new();
        for (number, address) in (1..=COME as u64).zip(site.service(1).into_iter().cycle()) {
            came.push(client::connect(address).expect("a place, or one in line"));
            wait_until_eq("those who have come", seconds(10.0), number, || {
                let service = up.service();
                service.connections().iter().sum::<u64>() + service.waiting.now
            });
        }
        thread::scope(|scope| {
            let echo = |stream| client::echo(stream, &said).map(drop);
            let echoes: Vec<_> = came.into_iter().map(|stream| scope.spawn(move || echo(stream))).collect();
            for echo in echoes {
                echo.join().expect("the client's thread does not panic").expect("all comes back");
            }
        });
    });
    assert!(lost.load(Ordering::Relaxed) > COME as u64, "{lost:?} segments were lost");
    wire.loses(|_| false);
    up.wait_connections(&[0; 2]);
    let service = up.service();
    assert_eq!(service.totals().iter().sum::<u64>(), COME as u64);
    assert_eq!(service.waiting.served, COME as u64 - 4, "{:?}", service.outcomes);
    for server in &service.servers {
        assert!(server.connections_max <= 2, "{} had {}", server.name, server.connections_max);
    }
}

#[test]
fn a_link_that_was_down_costs_nobody_a_connection() {
    let site = Site::new(1, ETHERNET);
    let up = up(&site.hosts[0], &filled_in_order(&site.hosts[0], 1, 2));
    for [address, other] in [site.service(1), {
        let [v4, v6] = site.service(1);
        [v6, v4]
    }] {
        let mut held = site.clients.run(|| client::hold(address, 2));
        let waits = site.clients.run(|| client::connect(other)).expect("a place in line");
        wait_waiting(&up, 1);

        site.unplug(CLIENTS).expect("pull the plug");
        held[0].say("who").expect("what is said is kept");
        let comes = site.clients.run(|| client::begin(address, None, 1)).expect("send the SYN");
        stays("the connections", Duration::from_millis(300), (vec![2], 1, 0), || {
            let service = up.service();
            (service.connections(), service.waiting.now, comes.ended())
        });
        assert!(!client::is_greeted(&held[0].stream));
        site.plug(CLIENTS).expect("plug it in");
        assert!(held[0].is_served());
        wait_waiting(&up, 2);

        // The host's own link as well, with nobody on the way.
        site.unplug(1).expect("pull the plug");
        held[1].say("who").expect("what is said is kept");
        site.plug(1).expect("plug it in");
        assert!(held[1].is_served());
        assert_eq!((up.connections(), up.service().waiting.now), (vec![2], 2));

        drop(held);
        Client::greeted(waits).expect("served");
        comes.greeted();
        up.wait_connections(&[0]);
    }
    let service = up.service();
    assert_eq!(service.outcomes(["closed_waiting", "dismissed", "refused_capacity"]), [0; 3]);
    assert!(up.process("app/1").runs() && service.server("app/1").restarts == 0);
}

#[test]
fn a_flood_from_another_host_over_ipv6_takes_nobody_his_place() {
    const SERVERS: usize = 2;
    const LIMIT: u32 = 10;
    const FLOOD: Duration = Duration::from_secs(3);
    let _alone = heavy();
    let site = Site::new(1, ETHERNET);
    let host = &site.hosts[0];
    host.network().run(|| set_syncookies(1)).expect("set tcp_syncookies");
    let flood = site.router.run(|| Flood::join(1)).expect("join a network of clients");
    let up = up(host, &App { limit: Some(LIMIT), ..App::of(host, SERVERS) });
    let [v4, v6] = site.service(1);
    let over = AtomicBool::new(false);
    let per_second = fewer(PER_SECOND as usize, 2_000) as u32;
    let (sent, served) = thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run_to(v6, per_second, &over));
        let served = site.clients.run(|| {
            let _end = Ends(&over);
            let mut serial = Serial::free(v6);
            let (start, mut served) = (Instant::now(), 0);
            while start.elapsed() < FLOOD {
                let come = serial.come();
                come.unwrap_or_else(|error| panic!("one fails behind {served} who are served: {error}"));
                served += 1;
            }
            served
        });
        (flooding.join().expect("flooding does not panic").expect("send SYNs"), served)
    });
    let service = up.service();
    println!("{sent} SYNs, {served} served: {:?}", service.outcomes);
    assert!(sent > 1_000 && served > 0, "{sent} SYNs of a flood, {served} served");
    let arrived = ["selected", "wait_suspect", "wait_limit", "wait_turn"].map(|way| service.outcome(way));
    assert!(arrived.iter().sum::<u64>() > served + 1_000, "the flood arrives: {:?}", service.outcomes);
    let came = service.outcomes(["established", "established_waiting"]);
    assert_eq!(came.iter().sum::<u64>(), served, "{:?}", service.outcomes);
    assert_eq!(service.outcomes(["closed_waiting", "dismissed", "refused_capacity"]), [0; 3]);
    up.wait_connections(&[0; SERVERS]);
    // All places are to be had again.
    let held = site.clients.run(|| {
        let places = (0..SERVERS * LIMIT as usize).zip([v4, v6].into_iter().cycle());
        places.map(|(_, address)| Client::open(address).expect("a place")).collect::<Vec<_>>()
    });
    assert_eq!(up.connections(), [u64::from(LIMIT); SERVERS]);
    drop(held);
}

#[test]
fn hosts_know_nothing_of_each_other() {
    let site = Site::new(3, ETHERNET);
    let mut ups: Vec<Up<'_>> = site.hosts.iter().map(|host| up(host, &App::of(host, 2))).collect();
    let client: [IpAddr; 2] = site::addresses(CLIENTS);
    let mut held: Vec<Vec<Client>> = Vec::new();
    // By turns to two of them, and at once.
    for (host, count) in [(1, 4), (2, 6)] {
        let began = site.service(host).map(|address| {
            site.clients.run(|| client::begin(address, None, count / 2)).expect("send the SYNs")
        });
        held.push(began.into_iter().flat_map(client::Begun::greeted).collect());
    }
    assert!(held.iter().flatten().all(|it| client.contains(&it.seen_as.ip())));
    let counts = |ups: &[Up<'_>]| {
        ups.iter()
            .map(|up| {
                let service = up.service();
                (service.connections(), service.outcome("selected"), service.outcome("established"))
            })
            .collect::<Vec<_>>()
    };
    let wanted = vec![(vec![2, 2], 4, 4), (vec![3, 3], 6, 6), (vec![0, 0], 0, 0)];
    assert_eq!(counts(&ups), wanted);
    // No process serves two hosts, and each host has its own.
    let pids = |ups: &[Up<'_>]| -> Vec<i32> {
        ups.iter().flat_map(|up| up.service().servers).map(|server| server.pid.expect("it runs")).collect()
    };
    let all = pids(&ups);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 6);
    for (clients, own) in held.iter().zip(all.chunks(2)) {
        assert!(clients.iter().all(|client| own.contains(&client.pid)));
    }

    // One goes, and the others have not noticed.
    ups.remove(0).stop();
    site.clients.run(|| site.service(1).into_iter().for_each(expect_refused));
    assert!(held.remove(0).iter_mut().all(|client| !client.is_served()));
    assert_eq!(counts(&ups), wanted[1..]);
    assert_eq!(pids(&ups), all[2..]);
    assert!(held[0].iter_mut().all(Client::is_served));
    drop(held);
    ups[0].wait_connections(&[0, 0]);
    assert_eq!(ups[1].service().totals(), [0, 0]);
}
