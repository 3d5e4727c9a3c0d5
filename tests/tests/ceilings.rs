//! Limits and rates of a service as a whole, and of each source of its clients.
//!
//! They hold at every moment, whoever comes above them is refused at once or waits, as configured, and
//! what is counted is 0 in the end. Rates are shown by how many get through in a burst, and by how many
//! can at most; how long it takes is not measured.

#![forbid(unsafe_code)]

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use tests::{
    app::App,
    client::{self, Client, Ending, Line},
    host::{Host, Up, V4, V6, heavy},
    network::{self, Clients},
    process::Signal,
    status::{Rate, Source},
    wait::{fewer, seconds, stays, try_for, wait_for, wait_until_eq},
};

/// Servers with these lines in `[service.app.limits]`.
fn app(host: &Host, count: usize, limits: &str) -> App {
    App { tables: format!("[service.app.limits]\n{limits}"), ..App::of(host, count) }
}

/// The same with lines for each source.
fn app_of_sources(host: &Host, count: usize, limits: &str) -> App {
    App { tables: format!("[service.app.limits.per_source]\n{limits}"), ..App::of(host, count) }
}

/// An address of the loopback, from which clients come.
fn local(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, last).into()
}

#[track_caller]
fn hold_from(source: IpAddr, address: SocketAddr, count: usize) -> Vec<Client> {
    (0..count)
        .map(|number| {
            Client::open_from(source, address)
                .unwrap_or_else(|error| panic!("connection {number} of {count} from {source}: {error}"))
        })
        .collect()
}

#[track_caller]
fn expect_refused<T: std::fmt::Debug>(connected: io::Result<T>) {
    let error = connected.expect_err("it is above a limit");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

/// So many connect at once, from one address, and nobody leaves. How many are in.
fn rush(source: IpAddr, address: SocketAddr, count: usize) -> Vec<Client> {
    let clients = std::sync::Mutex::new(Vec::new());
    client::in_threads(20, 0..count, |_| match Client::open_from(source, address) {
        Ok(client) => {
            clients.lock().expect("nobody panics with it").push(client);
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
    })
    .expect("each is served or refused");
    clients.into_inner().expect("nobody panics with it")
}

/// Nothing is counted any more.
#[track_caller]
fn wait_nothing_counted(up: &Up<'_>) {
    let servers = up.service().servers.len();
    up.wait_connections(&vec![0; servers]);
    wait_until_eq("what the service and its sources have", seconds(10.0), (0, 0), || {
        let service = up.service();
        let sources = service.limits().sources.as_ref().map_or(0, |sources| sources.now);
        (service.limits().connections.unwrap_or(0), sources)
    });
}

#[test]
fn a_limit_of_the_service_holds_under_200_client_threads() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&app(&host, 4, "connections = 25").refusing());
    let (inside, most, refused) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let all = fewer(5_000, 1_000);
    client::in_threads(200, 0..all, |number| {
        let client = wait_for("a place", client::patience(), || match Client::open(V4) {
            Ok(client) => Some(client),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                refused.fetch_add(1, Ordering::Relaxed);
                None
            }
        });
        // Counted by the clients themselves, from the greeting to the close: never more than there are.
        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        thread::yield_now();
        inside.fetch_sub(1, Ordering::SeqCst);
        if number % 2 == 0 { client.reset() } else { Ok(()) }
    })
    .expect("each is served in the end");
    assert!(most.into_inner() <= 25, "more than 25 at a time");
    // All of them can be had at once, and not one more.
    wait_nothing_counted(&up);
    let held = client::hold(V4, 25);
    expect_refused(client::connect(V4));
    let service = up.service();
    assert_eq!(service.limits().connections, Some(25));
    assert_eq!(service.limits().service.limit, Some(25));
    let refused = refused.into_inner() as u64;
    assert!(refused > 100, "only {refused} were refused");
    assert_eq!(service.outcome("established"), all as u64 + 25);
    // A refused SYN may be sent again, see limits.rs.
    assert!(service.outcome("refused_service_limit") > refused, "{refused} refused: {service:#?}");
    assert_eq!(service.limits().service.refused_limit, service.outcome("refused_service_limit"));
    assert_eq!(service.outcome("refused_limit"), 0);
    assert!(service.limits().service.limit_seconds_ago.is_some_and(|ago| ago < 60.0));
    drop(held);
    wait_nothing_counted(&up);
}

#[test]
fn limits_of_the_service_and_of_servers_hold_together() {
    let host = Host::new();
    let mut app = app(&host, 2, "connections = 5").refusing();
    app.limit = Some(3);
    let up = host.up(&app);
    let held = client::hold(V4, 5);
    expect_refused(client::connect(V4));
    assert_eq!(up.connections().iter().sum::<u64>(), 5);
    assert!(up.connections().iter().all(|count| *count <= 3));
    up.run(&["limit", "app", "none"]).expect_done();
    let last = Client::open(V4).expect("a server has a place");
    expect_refused(client::connect(V4));
    let service = up.service();
    assert_eq!(service.outcomes(["refused_service_limit", "refused_limit"]), [1, 1]);
    drop((held, last));
}

#[test]
fn who_comes_above_the_limit_of_the_service_waits_and_is_served_in_order() {
    let host = Host::new();
    let up = host.up(&app(&host, 2, "connections = 3\nover = \"wait\""));
    let held = client::hold(V4, 3);
    let mut line = Line::behind(held, client::stand(&[V4, V6], 40)).expect("stand in line");
    let service = up.service();
    assert_eq!(service.waiting.now, 40);
    assert_eq!(service.limits().connections, Some(3));
    assert_eq!(service.outcomes(["wait_service_limit", "wait_turn", "wait_limit"]), [1, 39, 0]);
    assert!(!line.is_stirring(seconds(0.3)), "nobody leaves and somebody is served");
    assert_eq!(line.turns(40).expect("each is served"), (0..40).collect::<Vec<_>>());
    let service = up.service();
    assert_eq!(service.connections().iter().sum::<u64>(), 3);
    assert_eq!(service.outcomes(["handed_over", "refused_service_limit"]), [40, 0]);
    drop(line);
    wait_nothing_counted(&up);
}

#[test]
fn a_limit_of_the_service_is_exact_while_100_threads_wait_and_leave_in_every_way() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&app(
        &host,
        3,
        "connections = 4\nover = \"wait\"\n[service.app.limits.per_source]\nconnections = 1000",
    ));
    let all = fewer(4_000, 600);
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            client::in_threads(100, 0..all, |number| {
                let ending = Ending::ALL[number % Ending::ALL.len()];
                ending
                    .happen(if number % 3 == 0 { V6 } else { V4 })
                    .map_err(|error| io::Error::other(format!("connection {number}, {ending:?}: {error}")))
            })
        });
        // On each CPU one may have left the service whose server is still to count it down.
        let leaving = thread::available_parallelism().expect("there are CPUs").get() as u64;
        while !clients.is_finished() {
            let service = up.service();
            let counted = service.limits().connections.expect("they are counted");
            let counts = service.connections();
            assert!(counted <= 4, "the kernel counts {counted}");
            assert!(counts.iter().sum::<u64>() <= 4 + leaving, "the kernel counts {counts:?}");
        }
        clients.join().expect("no client panics").expect("every connection goes as meant");
    });
    wait_nothing_counted(&up);
    let service = up.service();
    assert_eq!(service.outcomes(["word_contended", "source_unknown", "owner_lost"]), [0, 0, 0]);
    assert!(service.outcome("handed_over") > 0, "{service:#?}");
    // All places are there.
    let held = client::hold(V4, 4);
    let waits = client::connect(V4).expect("it may wait");
    stays("greeted", seconds(0.2), false, || client::is_greeted(&waits));
    drop((held, waits));
}

#[test]
fn a_limit_of_each_source_holds_under_50_client_threads_and_sources_do_not_share() {
    let host = Host::new();
    let up = host.up(&app_of_sources(&host, 3, "connections = 7\nprefix_ipv6 = 128"));
    let mut held = Vec::new();
    for _ in 0..3 {
        for source in [local(1), local(2), "::1".parse().expect("an address")] {
            let address = if source.is_ipv4() { V4 } else { V6 };
            let clients = thread::scope(|scope| {
                let rushes: Vec<_> =
                    (0..3).map(|_| scope.spawn(move || rush(source, address, 100))).collect();
                rushes
                    .into_iter()
                    .flat_map(|rush| rush.join().expect("it does not panic"))
                    .collect::<Vec<_>>()
            });
            assert_eq!(clients.len(), 7, "from {source}");
            held.push(clients);
        }
        let service = up.service();
        assert_eq!(service.connections(), [7; 3]);
        assert_eq!(service.sources().now, 3);
        assert_eq!(service.sources().most.as_ref().map(|most| most.connections), Some(7));
        assert_eq!(service.sources().each.refused_limit, service.outcome("refused_source_limit"));
        held.clear();
        wait_nothing_counted(&up);
    }
    let service = up.service();
    assert_eq!(service.outcomes(["established", "source_unknown", "wait_limit"]), [63, 0, 0]);
    assert!(service.outcome("refused_source_limit") >= 9 * 293);
}

#[test]
fn sources_are_told_by_their_prefix_and_some_are_exempt() {
    let host = Host::new();
    let limits = "connections = 3\nprefix_ipv4 = 24\nexempt = [\"127.0.9.0/24\", \"::1\"]";
    let up = host.up(&app_of_sources(&host, 1, limits));
    let address = |third: u8, last: u8| IpAddr::from([127, 0, third, last]);
    let mut held = hold_from(address(0, 1), V4, 2);
    held.extend(hold_from(address(0, 254), V4, 1));
    expect_refused(client::connect_from(address(0, 77), V4));
    held.extend(hold_from(address(1, 1), V4, 3));
    expect_refused(client::connect_from(address(1, 1), V4));
    held.extend(hold_from(address(9, 9), V4, 10));
    held.extend(client::hold(V6, 10));
    let service = up.service();
    assert_eq!((service.sources().now, service.outcome("refused_source_limit")), (2, 2));
    let most = service.sources().most.clone().expect("there are some");
    assert_eq!(most.connections, 3);
    assert!(["127.0.0.0/24", "127.0.1.0/24"].contains(&most.source.as_str()), "{most:?}");
    drop(held);
    wait_nothing_counted(&up);
}

#[test]
fn who_waits_counts_for_his_source() {
    let host = Host::new();
    let mut app = app_of_sources(&host, 1, "connections = 4");
    app.limit = Some(1);
    let up = host.up(&app);
    let held = Client::open(V4).expect("a place");
    let waiting = client::stand(&[V4], 3);
    expect_refused(client::connect(V4));
    // Others may wait.
    let other = client::connect_from(local(2), V4).expect("it may wait");
    assert_eq!(up.service().sources().now, 2);
    // Handed over, it still counts.
    drop(held);
    let mut line = Line::behind(Vec::new(), waiting).expect("stand in line");
    assert_eq!(line.serve().expect("it is served"), 0);
    let last = wait_for("the place of the one who left", seconds(5.0), || client::connect(V4).ok());
    expect_refused(client::connect(V4));
    let most = Source { source: "127.0.0.1/32".to_owned(), connections: 4 };
    assert_eq!(up.service().sources().most, Some(most));
    drop((line, last, other));
    wait_nothing_counted(&up);
}

#[test]
fn a_place_of_a_source_is_free_when_one_who_waited_too_long_is_turned_away() {
    let host = Host::new();
    let mut app = app_of_sources(&host, 1, "connections = 2");
    app.limit = Some(1);
    app.waiting = Some("timeout = \"300ms\"".to_owned());
    let up = host.up(&app);
    let held = Client::open(V4).expect("a place");
    let waits = client::connect(V4).expect("it may wait");
    wait_until_eq("turned away", seconds(5.0), 1, || up.service().waiting.timed_out);
    let most = Source { source: "127.0.0.1/32".to_owned(), connections: 1 };
    wait_until_eq("the source's", seconds(5.0), Some(most), || up.service().sources().most.clone());
    drop((held, waits));
    wait_nothing_counted(&up);
}

/// At once as many get through as the burst says, and later no more than the rate brings.
#[test]
fn a_burst_gets_through_and_then_as_many_as_the_rate_brings() {
    let host = Host::new();
    let up = host.up(&app(&host, 2, "rate = 2\nburst = 30").refusing());
    let start = Instant::now();
    let first = rush(local(1), V4, 400).len();
    let most = 30 + (start.elapsed().as_secs_f64() * 2.0) as usize + 1;
    assert!((30..=most).contains(&first), "{first} got through, {most} may have");
    // A connection that has ended gives nothing back.
    let again = wait_for("the next token", seconds(10.0), || Client::open(V4).ok());
    let more = rush(local(2), V4, 100).len();
    let most = 30 + (start.elapsed().as_secs_f64() * 2.0) as usize + 1;
    assert!(first + 1 + more <= most, "{first}, 1 and {more} got through, {most} may have");
    let service = up.service();
    assert_eq!(service.limits().service.rate, Some(Rate { per_second: 2, burst: 30 }));
    assert!(service.outcome("refused_service_rate") >= 400, "{service:#?}");
    assert_eq!(service.outcome("established"), (first + 1 + more) as u64);
    drop(again);
}

#[test]
fn each_source_has_its_own_rate() {
    let host = Host::new();
    let up = host.up(&app_of_sources(&host, 2, "rate = 1\nburst = 10"));
    for last in 1..=5 {
        let start = Instant::now();
        let through = rush(local(last), V4, 60).len();
        let most = 10 + start.elapsed().as_secs() as usize + 1;
        assert!((10..=most).contains(&through), "{through} of {last} got through, {most} may have");
    }
    let service = up.service();
    assert!(service.outcome("refused_source_rate") >= 5 * 45, "{service:#?}");
    assert_eq!(service.sources().each.rate, Some(Rate { per_second: 1, burst: 10 }));
    assert_eq!(service.sources().each.refused_rate, service.outcome("refused_source_rate"));
}

#[test]
fn who_comes_faster_than_the_rate_waits_for_a_token_in_order() {
    let host = Host::new();
    // One server: two might greet in another order than they accept.
    let up = host.up(&app(&host, 1, "rate = 20\nburst = 5\nover = \"wait\""));
    let start = Instant::now();
    let begun = client::stand(&[V4], 45);
    // The others have to wait.
    let direct = 5 + (start.elapsed().as_secs_f64() * 20.0) as u64 + 1;
    let mut line = Line::behind(Vec::new(), begun).expect("stand in line");
    for number in 0..45usize {
        assert_eq!(line.serve().expect("each is served"), number);
        let most = 5 + (start.elapsed().as_secs_f64() * 20.0) as usize + 1;
        assert!(number < most, "number {number} is served, and {most} may be");
    }
    let service = up.service();
    assert!(service.outcome("wait_service_rate") >= 1, "{service:#?}");
    assert_eq!(service.outcome("refused_service_rate"), 0);
    assert!(service.outcome("handed_over") + direct >= 45, "{direct} at most did not wait: {service:#?}");
    assert_eq!(service.waiting.now, 0);
}

#[test]
fn handshakes_that_never_complete_give_places_of_service_and_source_back() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let limits = "connections = 20\n[service.app.limits.per_source]\nconnections = 8";
    let up = host.up(&app(&host, 1, limits).refusing());
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 50)).expect("send SYNs");
    // Who is refused does not hear of it, and would send his again.
    drop(begun);
    let held: Vec<Client> =
        [local(1), local(2)].into_iter().flat_map(|from| hold_from(from, V4, 6)).collect();
    // Twelve and eight reserved ones.
    expect_refused(client::connect_from(local(1), V4));
    let ways = ["selected", "refused_source_limit", "refused_service_limit", "established"];
    assert_eq!(up.service().outcomes(ways), [20, 42, 1, 12]);
    let mut rest = Vec::new();
    wait_for("all places to be used", seconds(6.0), || {
        rest.extend(Client::open_from(local(3), V4));
        (rest.len() == 8).then_some(())
    });
    expect_refused(client::connect_from(local(4), V4));
    assert_eq!(up.service().limits().connections, Some(20));
    drop((held, rest));
    wait_nothing_counted(&up);
}

/// A flood may hold half of the service's places at most, and who completes his handshake waits for
/// one of the others.
#[test]
fn a_flood_leaves_places_of_the_service_to_who_completes_his_handshake() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let up = host.up(&app(&host, 1, "connections = 20\nover = \"wait\""));
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 60)).expect("send SYNs");
    assert_eq!(up.service().outcomes(["selected", "wait_service_limit"]), [10, 50]);
    // At once, though half of all places are reserved.
    let held = client::hold(V4, 10);
    assert_eq!(up.connections(), [10]);
    drop((begun, held));
    wait_nothing_counted(&up);
}

/// How many connections of a source get through, one after the other, before a rate refuses one.
fn until_the_rate(up: &Up<'_>, source: IpAddr) -> usize {
    let refused =
        || up.service().outcomes(["refused_source_rate", "refused_service_rate"]).iter().sum::<u64>();
    let (before, mut through) = (refused(), 0);
    while through < 1100 {
        match Client::open_from(source, V4) {
            Ok(_) => through += 1,
            Err(_) if refused() > before => break,
            // Too many of those before are not closed yet.
            Err(_) => {}
        }
    }
    through
}

#[test]
fn with_syn_cookies_a_connection_takes_one_place_and_one_token() {
    let host = Host::new();
    std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("turn SYN cookies on");
    let limits = "connections = 12\nrate = 1\nburst = 1000\n[service.app.limits.per_source]\nconnections = 8\nrate = 1\nburst = 1000";
    let up = host.up(&app(&host, 2, limits).refusing());
    let held = hold_from(local(1), V4, 8);
    expect_refused(client::connect_from(local(1), V4));
    let others = hold_from(local(2), V4, 4);
    expect_refused(client::connect_from(local(2), V4));
    assert_eq!(up.service().outcomes(["refused_source_limit", "refused_service_limit"]), [1, 1]);
    drop((held, others));
    wait_nothing_counted(&up);
    let through = until_the_rate(&up, local(3));
    // A late ACK of a connection that was reset looks like one that brings a cookie, and takes a token.
    let service = up.service();
    let selected: u64 = service.outcomes(["selected", "next_best"]).iter().sum();
    let late = selected as usize - 2 * service.totals().iter().sum::<u64>() as usize;
    assert!(through + late >= 988, "{through} got through, {late} came late: each takes more than one token");
    assert!(late < 50, "{late} came late");
    let through = until_the_rate(&up, local(4));
    assert!(through < 600, "{through} got through: nobody took a token");
}

#[test]
fn counts_survive_the_distributor_and_servers_that_die() {
    let host = Host::new();
    let limits = "connections = 12\n[service.app.limits.per_source]\nconnections = 8\nrate = 1\nburst = 1000";
    let mut app = app(&host, 2, limits).refusing();
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let mut held = hold_from(local(1), V4, 8);
    held.extend(hold_from(local(2), V4, 4));
    up.replace_distributor();
    let service = up.service();
    assert_eq!(
        (service.limits().connections, service.limits().earlier, service.sources().now),
        (Some(12), 0, 2)
    );
    expect_refused(client::connect_from(local(1), V4));
    expect_refused(client::connect_from(local(3), V4));
    let service = up.service();
    assert_eq!(service.outcomes(["refused_source_limit", "refused_service_limit"]), [1, 1]);
    let victim = up.process("app/1");
    victim.kill(seconds(5.0));
    let lost =
        held.iter_mut().filter_map(|client| (!client.is_served()).then_some(client.pid)).count() as u64;
    assert!(lost > 0, "nobody was served by the one that was killed");
    wait_until_eq("what is left", seconds(5.0), Some(12 - lost), || up.service().limits().connections);
    // While the distributor is stopped, too.
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    drop(held);
    let held = wait_for("all places of a source", seconds(10.0), || {
        let held: Vec<Client> = (0..8).map_while(|_| Client::open_from(local(3), V4).ok()).collect();
        (held.len() == 8).then_some(held)
    });
    expect_refused(client::connect_from(local(3), V4));
    distributor.signal(Signal::CONT);
    up.replace_distributor();
    assert_eq!(up.service().limits().connections, Some(8));
    drop(held);
    wait_nothing_counted(&up);
}

/// Its queue goes to another server, whose places are those that it leaves.
#[test]
fn the_queue_of_a_killed_server_keeps_its_places_in_the_service() {
    let host = Host::new();
    let limits = "connections = 10\nover = \"wait\"\n[service.app.limits.per_source]\nconnections = 100";
    let up = host.up(&app(&host, 2, limits));
    // Nobody is accepted.
    for server in ["app/1", "app/2"] {
        up.process(server).freeze(seconds(5.0));
    }
    let held = client::stand(&[V4], 10);
    up.wait_connections(&[5, 5]);
    up.process("app/1").kill(seconds(5.0));
    wait_until_eq("moved", seconds(5.0), 5, || up.service().outcome("moved"));
    assert_eq!(up.service().limits().connections, Some(10));
    assert_eq!(up.service().sources().now, 1);
    up.process("app/2").signal(Signal::CONT);
    let held: Vec<Client> =
        held.into_iter().map(|stream| Client::greeted(stream).expect("it is served")).collect();
    drop(held);
    wait_nothing_counted(&up);
}

#[test]
fn the_limit_of_a_service_can_be_changed_while_it_runs() {
    let host = Host::new();
    let up = host.up(&app(&host, 2, "connections = 4").refusing());
    let mut held = client::hold(V4, 4);
    expect_refused(client::connect(V4));
    up.run(&["limit", "app", "6"]).expect_done();
    held.extend(client::hold(V4, 2));
    expect_refused(client::connect(V4));
    // It closes nothing, and goes on after the distributor.
    up.run(&["limit", "app", "2"]).expect_done();
    up.replace_distributor();
    assert_eq!(up.service().limits().service.limit, Some(2));
    assert!(held.iter_mut().all(Client::is_served));
    held.truncate(2);
    wait_until_eq("connections", seconds(5.0), Some(2), || up.service().limits().connections);
    expect_refused(client::connect(V4));
    up.run(&["limit", "app", "none"]).expect_done();
    assert!(up.service().limits.is_none());
    held.extend(client::hold(V4, 20));
    up.replace_distributor();
    assert!(up.service().limits.is_none());
    drop(held);
    up.wait_connections(&[0, 0]);
}

/// Who came before there was a limit is not counted, and takes a place all the same.
#[test]
fn a_limit_that_is_set_later_holds_for_those_who_are_there() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2).refusing());
    let mut before = client::hold(V4, 10);
    assert!(up.service().limits.is_none());
    up.run(&["limit", "app", "12"]).expect_done();
    let mut since = client::hold(V4, 2);
    expect_refused(client::connect(V4));
    let limits = up.service().limits().clone();
    assert_eq!((limits.connections, limits.earlier), (Some(12), 10));
    up.replace_distributor();
    expect_refused(client::connect(V4));
    before.truncate(4);
    wait_until_eq("those of before", seconds(5.0), 4, || up.service().limits().earlier);
    since.extend(client::hold(V4, 6));
    expect_refused(client::connect(V4));
    drop(before);
    wait_until_eq("those of before", seconds(5.0), 0, || up.service().limits().earlier);
    since.extend(client::hold(V4, 4));
    expect_refused(client::connect(V4));
    drop(since);
    up.wait_connections(&[0, 0]);
    wait_nothing_counted(&up);
}

#[test]
fn a_full_table_of_sources_refuses_nobody_and_is_told() {
    let host = Host::new();
    let app = app_of_sources(&host, 2, "connections = 2");
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    // One bucket, with places for 16 sources.
    command.env("DIST_CTL_SOURCE_BUCKETS", "1");
    let up = host.start_command(command);
    up.wait_ready();
    let known: Vec<Client> = (1..=16).flat_map(|last| hold_from(local(last), V4, 1)).collect();
    up.wait_no_trouble();
    assert_eq!(up.service().sources().now, 16);
    // Each of these is served, and nobody counts.
    let unknown = hold_from(local(17), V4, 5);
    let service = up.service();
    assert_eq!((service.sources().now, service.sources().unknown), (16, 10));
    assert_eq!(service.outcome("source_unknown"), 10);
    // Those that are known have their limit.
    let second = hold_from(local(16), V4, 1);
    expect_refused(client::connect_from(local(16), V4));
    let trouble = try_for(seconds(5.0), || {
        let more = hold_from(local(18), V4, 1);
        let troubles = up.status().troubles;
        drop(more);
        troubles.into_iter().find(|trouble| trouble.what.contains("the table of sources is full"))
    });
    assert!(trouble.is_some(), "nobody was told");
    up.wait_no_trouble();
    // When a source has nothing left, its place is another one's.
    drop((known, unknown, second));
    wait_nothing_counted(&up);
    let known = wait_for("a place in the table", seconds(10.0), || {
        let before = up.service().outcome("source_unknown");
        let two = hold_from(local(19), V4, 2);
        (up.service().outcome("source_unknown") == before).then_some(two)
    });
    expect_refused(client::connect_from(local(19), V4));
    drop(known);
    wait_nothing_counted(&up);
}

/// Thousands of sources, one after the other.
#[test]
fn thousands_of_sources_come_and_go_and_none_is_left() {
    let host = Host::new();
    let up = host.up(&app_of_sources(&host, 2, "connections = 1\nrate = 100\nburst = 100"));
    let all = fewer(8_000, 1_000);
    let again = network::syns_sent_again();
    client::in_threads(16, 0..all, |number| {
        let source = IpAddr::from([127, 1, (number >> 8) as u8, number as u8]);
        let client = Client::open_from(source, V4)?;
        match Client::open_from(source, V4) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => drop(client),
            other => return Err(io::Error::other(format!("a second one of {source}: {other:?}"))),
        }
        Ok(())
    })
    .expect("each source has one connection and no second one");
    wait_nothing_counted(&up);
    let again = network::syns_sent_again() - again;
    let service = up.service();
    assert_eq!(service.outcomes(["established", "source_unknown"]), [all as u64, 0]);
    // A SYN that was refused may be sent again, see limits.rs.
    let refused = service.outcome("refused_source_limit");
    assert!((all as u64..=all as u64 + again).contains(&refused), "{refused} of {all}, {again} sent again");
}
