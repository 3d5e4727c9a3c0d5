//! The waiting list: whoever finds no place waits in the kernel, and is served in order.
//!
//! A test fills the places, lets clients stand in line, and frees places one at a time where
//! the order matters: see `client::Line`. What becomes of those who wait is read from their own
//! connections and from the counters; that nobody else is served in between follows from both.

#![forbid(unsafe_code)]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, getrlimit, setpriority_process};
use tests::{
    app::App,
    client::{self, Client, Ending, Line},
    flood::{SYNCOOKIES, Serial, set_syncookies},
    host::{Host, Up, V4, V6, heavy},
    http, network,
    process::Signal,
    real::{self, Daemon, Nginx},
    status::Waiting,
    wait::{fewer, lasting, seconds, stays, wait_for, wait_until_eq},
};

const OTHER: &str = "127.0.0.1:9090";

/// What clients that have waited too long are told in these tests.
const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";

fn other() -> SocketAddr {
    OTHER.parse().expect("an address")
}

/// So many servers with a place for so many each.
fn limited(host: &Host, servers: usize, limit: u32) -> App {
    App { limit: Some(limit), ..App::of(host, servers) }
}

/// The same, on a second address as well.
fn on_two_addresses(host: &Host, servers: usize, limit: u32) -> App {
    let words = ["--listen", "[::]:8080", "--listen", OTHER];
    App {
        limit: Some(limit),
        listen: ["[::]:8080", OTHER].map(str::to_owned).to_vec(),
        ..App::with(host, servers, &words)
    }
}

fn waiting(up: &Up<'_>) -> Waiting {
    up.service().waiting
}

/// As a client sees it, somebody waits when its connect() returns; the count comes a moment later.
#[track_caller]
fn wait_waiting(up: &Up<'_>, wanted: usize) {
    wait_until_eq("those who wait", seconds(10.0), wanted as u64, || waiting(up).now);
}

#[track_caller]
fn assert_in_order(order: &[usize], first: usize) {
    for (place, number) in (first..).zip(order) {
        assert_eq!(
            *number,
            place,
            "number {number} was served as number {place}: {:?}",
            around(order, place - first)
        );
    }
}

/// What was served just before and after.
fn around(order: &[usize], place: usize) -> &[usize] {
    &order[place.saturating_sub(5)..order.len().min(place + 5)]
}

/// Nothing went another way than it should, and nothing is left.
#[track_caller]
fn assert_quiet(up: &Up<'_>, servers: usize) {
    up.wait_connections(&vec![0; servers]);
    wait_waiting(up, 0);
    let service = up.service();
    let never = ["move_failed", "parked_behind", "refused_no_room", "owner_lost", "event_lost", "untagged"];
    assert_eq!(service.outcomes(never), [0; 6], "{:?}", service.outcomes);
    let [came, served, left, dismissed] =
        service.outcomes(["established_waiting", "handed_over", "closed_waiting", "dismissed"]);
    assert!(came <= served + left + dismissed, "{:?}", service.outcomes);
}

/// Nothing but time orders those whose connect() calls overlap. These do not.
#[test]
fn ten_thousand_are_served_in_the_order_in_which_they_came() {
    const EACH: usize = 1_000;
    let rounds = fewer(10, 2);
    let host = Host::new();
    let up = host.up(&limited(&host, 2, 1));
    let mut held = client::hold(V4, 2);
    for round in 0..rounds {
        let mut line = Line::behind(held, client::stand(&[V4, V6], EACH)).expect("watch the line");
        wait_waiting(&up, EACH);
        let order = line.turns(EACH).unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert!(order.is_sorted(), "round {round}: {:?}: {:?}", &order[..5], up.service().outcomes);
        assert_in_order(&order, 0);
        held = line.served.into();
    }
    let service = up.service();
    let all = (rounds * EACH) as u64;
    assert_eq!(service.outcomes(["established", "established_waiting", "handed_over"]), [2, all, all]);
    let [first, behind] = service.outcomes(["wait_limit", "wait_turn"]);
    assert!(first >= rounds as u64 && first + behind == all, "{:?}", service.outcomes);
    assert_eq!(service.waiting.max, EACH as u64);
    assert!(service.servers.iter().all(|server| server.connections_max == 1), "{service:#?}");
    drop(held);
    assert_quiet(&up, 2);
}

/// A group has fewer rooms than these, so rooms are shared, and connections parked.
#[test]
fn the_order_is_kept_when_rooms_are_shared() {
    const ALL: usize = 4_000;
    let _alone = heavy();
    let host = Host::new();
    let mut app = limited(&host, 2, 1);
    app.waiting = Some("capacity = 12000\ntimeout = \"5m\"".to_owned());
    let up = host.up(&app);
    let held = client::hold(V4, 2);
    let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
    wait_waiting(&up, ALL);
    let order = line.turns(ALL).expect("all are served");
    assert_in_order(&order, 0);
    assert_eq!(up.service().outcome("handed_over"), ALL as u64);
    drop(line);
    assert_quiet(&up, 2);
}

#[test]
fn the_order_is_kept_over_two_addresses_and_both_families() {
    let all = fewer(3_000, 600);
    let _alone = heavy();
    let host = Host::new();
    let mut app = on_two_addresses(&host, 2, 1);
    app.waiting = Some("capacity = 12000\ntimeout = \"5m\"".to_owned());
    let up = host.up(&app);
    let held = client::hold(V4, 2);
    let mut line = Line::behind(held, client::stand(&[V4, other(), V6], all)).expect("watch the line");
    wait_waiting(&up, all);
    let order = line.turns(all).expect("all are served");
    assert_in_order(&order, 0);
    drop(line);
    assert_quiet(&up, 2);
}

/// Which of them is greeted first is up to the servers; that nobody behind is, to the list.
#[test]
fn places_that_become_free_together_go_to_those_who_came_first() {
    const STEP: usize = 50;
    let steps = fewer(20, 4);
    let all = STEP * steps * 2;
    let _alone = heavy();
    let host = Host::new();
    let mut app = on_two_addresses(&host, 1, 1);
    app.waiting = Some("capacity = 12000\ntimeout = \"5m\"".to_owned());
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let mut line = Line::behind(held, client::stand(&[V4, other(), V6], all)).expect("watch the line");
    wait_waiting(&up, all);
    for first in (0..STEP * steps).step_by(STEP) {
        up.run(&["limit", "app/1", &(1 + first + STEP).to_string()]).expect_done();
        let mut served: Vec<usize> = (0..STEP).map(|_| line.serve().expect("a place")).collect();
        served.sort_unstable();
        assert_in_order(&served, first);
    }
}

/// Of two whose connect() calls overlap, either may be first: their SYNs are in the kernel at
/// the same time, on two CPUs, and the list is in the order in which handshakes complete. Those
/// pairs are not left out here, there is just nothing that their order could contradict. Of two on
/// different CPUs, the last segment of the first one's handshake may lie there for a moment when
/// connect() is over.
#[test]
fn in_bursts_whoever_was_connected_before_another_began_is_served_before_it() {
    const THREADS: usize = 200;
    const CPUS: usize = 2;
    let each = fewer(10, 2);
    let host = Host::new();
    let mut app = limited(&host, 2, 1);
    app.waiting = Some("capacity = 4000\ntimeout = \"5m\"".to_owned());
    let up = host.up(&app);
    let held = client::hold(V4, 2);
    let (clock, start) = (Instant::now(), Barrier::new(THREADS));
    let came = Mutex::new(Vec::new());
    client::in_threads(THREADS, 0..THREADS, |thread| {
        start.wait();
        for number in 0..each {
            let began = clock.elapsed();
            let address = if (thread + number) % 2 == 0 { V4 } else { V6 };
            let cpu = thread % CPUS;
            let stream = client::on_cpu(cpu, || client::connect(address))?;
            came.lock().expect("nobody panics").push(((cpu, began, clock.elapsed()), stream));
        }
        Ok(())
    })
    .expect("everybody may wait");
    let (times, streams): (Vec<_>, Vec<_>) = came.into_inner().expect("nobody panics").into_iter().unzip();
    wait_waiting(&up, THREADS * each);
    let mut line = Line::behind(held, streams).expect("watch the line");
    let order = line.turns(THREADS * each).expect("all are served");
    let mut latest = [Duration::ZERO; CPUS];
    for (place, number) in order.iter().enumerate() {
        let (cpu, began, done) = times[*number];
        for (other, latest) in latest.iter().enumerate() {
            let moment = if other == cpu { Duration::ZERO } else { seconds(0.1) };
            assert!(
                done + moment >= *latest,
                "place {place}: at {done:?}, after one who began at {latest:?}"
            );
        }
        latest[cpu] = latest[cpu].max(began);
    }
    drop(line);
    assert_quiet(&up, 2);
}

/// Clients that end in every way, many of them while they wait. What a server itself holds may
/// be more for a moment: see `tests::inside`.
#[test]
fn limits_are_exact_while_200_threads_wait_and_leave_in_every_way() {
    let all = fewer(4_000, 1_000);
    for limit in [1, 4, 25] {
        let host = Host::new();
        let up = host.up(&limited(&host, 2, limit));
        client::in_threads(200, 0..all, |number| {
            // The servers come first.
            setpriority_process(None, 10)?;
            // A large odd factor scatters the ways over the threads.
            let ending = Ending::ALL[number.wrapping_mul(2_654_435_761) % Ending::ALL.len()];
            let ended = ending.happen(if number % 3 == 0 { V6 } else { V4 });
            ended.map_err(|error| {
                io::Error::other(format!("limit {limit}, number {number}, {ending:?}: {error}"))
            })
        })
        .unwrap_or_else(|error| panic!("a client fails: {error}: {:#?}", up.service()));
        assert_quiet(&up, 2);
        let service = up.service();
        for server in &service.servers {
            assert_eq!(server.connections_max, u64::from(limit), "{}", server.name);
        }
        let [direct, waited, served, left] =
            service.outcomes(["established", "established_waiting", "handed_over", "closed_waiting"]);
        assert_eq!(direct + waited, all as u64, "limit {limit}: {:?}", service.outcomes);
        assert_eq!(served + left, waited, "limit {limit}: {:?}", service.outcomes);
        assert!(served > 0, "limit {limit}: {:?}", service.outcomes);
        // The last of them are moved when their rooms are looked at again.
        wait_for("the dead to be moved", seconds(5.0), || {
            (up.service().outcome("moved_dead") >= left).then_some(())
        });
        assert_eq!(service.outcome("closed"), direct + served, "limit {limit}: {:?}", service.outcomes);
        assert_eq!(service.outcomes(["refused_capacity", "word_contended"]), [0, 0]);
    }
}

#[test]
fn as_many_wait_as_may_and_a_place_in_line_is_free_when_one_leaves() {
    let host = Host::new();
    let mut app = limited(&host, 1, 1);
    app.waiting = Some("capacity = 3".to_owned());
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let mut line = client::stand(&[V4, V6], 3);
    wait_waiting(&up, 3);
    for refused in 1..=3 {
        let error = client::connect(V4).expect_err("the list is full");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(up.service().outcomes(["refused_capacity", "refused_limit"]), [refused, 0]);
        client::reset(line.remove(1)).expect("leave");
        wait_waiting(&up, 2);
        line.push(client::connect(V6).expect("a place in line again"));
        wait_waiting(&up, 3);
    }
    let said = waiting(&up);
    assert_eq!((said.capacity, said.max, said.refused, said.left), (3, 3, 3, 3));
    drop((held, line));
}

#[test]
fn with_capacity_0_nobody_waits() {
    let host = Host::new();
    let up = host.up(&limited(&host, 2, 2).refusing());
    let held = client::hold(V4, 4);
    for refused in 1..=5 {
        let error = client::connect(V6).expect_err("no place, and nobody may wait");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(up.service().outcomes(["refused_limit", "established_waiting"]), [refused, 0]);
    }
    drop(held);
    assert_quiet(&up, 2);
}

#[test]
fn sixteen_thousand_may_wait_and_are_served_in_order() {
    const PLACES: usize = 64;
    let most = fewer(16_384, 4_096);
    let _alone = heavy();
    // Some are for other tests of this process.
    let descriptors = getrlimit(Resource::Nofile).maximum.map_or(most * 2, |maximum| maximum as usize);
    let count = most.min(descriptors.saturating_sub(PLACES + 2_500));
    if count < most {
        println!("only {count} clients: a process may have {descriptors} descriptors here");
    }
    let host = Host::new();
    let mut app = limited(&host, 1, PLACES as u32);
    app.waiting = Some(format!("capacity = {count}\ntimeout = \"5m\""));
    let up = host.up(&app);
    let held = client::hold(V6, PLACES);
    let streams = client::stand(&[V6, V4], count);
    wait_waiting(&up, count);
    assert_eq!(client::connect(V4).expect_err("the list is full").kind(), ErrorKind::ConnectionRefused);
    let mut line = Line::behind(held, streams).expect("watch the line");
    let order = line.turns(count).expect("all are served");
    assert_in_order(&order, 0);
    let service = up.service();
    assert_eq!(service.server("app/1").connections_max, PLACES as u64);
    assert_eq!(service.outcomes(["handed_over", "refused_capacity"]), [count as u64, 1]);
    drop(line);
    assert_quiet(&up, 1);
}

#[test]
fn whoever_waited_too_long_is_reset() {
    let timeout = seconds(1.0);
    let host = Host::new();
    let mut app = limited(&host, 1, 1);
    app.waiting = Some(format!("timeout = \"{}\"", lasting(1.0)));
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let start = Instant::now();
    let mut line = client::stand(&[V4, V6], 2);
    // What it has said already does not matter.
    line[1].write_all(b"GET / HTTP/1.1\r\n\r\n").expect("say something");
    for mut stream in line {
        let error = stream.read(&mut [0]).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(start.elapsed() >= timeout, "after {:?}", start.elapsed());
    }
    wait_waiting(&up, 0);
    let service = up.service();
    let ways = ["established_waiting", "dismissed", "closed_waiting", "handed_over"];
    assert_eq!(service.outcomes(ways), [2, 2, 0, 0]);
    assert_eq!((service.waiting.timed_out, service.waiting.left), (2, 0));
    drop(held);
    up.wait_connections(&[0]);
    assert_eq!(host.inside("1").accepted, 1);
}

#[test]
fn whoever_waited_too_long_is_told_so_and_leaves_the_list_at_once() {
    let host = Host::new();
    let mut app = limited(&host, 1, 1);
    app.waiting = Some(format!("capacity = 3\ntimeout = \"{}\"\nreply = {BUSY:?}", lasting(1.0)));
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let mut line = client::stand(&[V4, V6], 3);
    // A request that nobody has read must not turn the reply into a reset.
    line[1].write_all(b"GET / HTTP/1.1\r\n\r\n").expect("ask");
    line[2].write_all(&[b'x'; 100_000]).expect("send much");
    for (number, stream) in line.iter_mut().enumerate() {
        let mut told = String::new();
        stream.read_to_string(&mut told).unwrap_or_else(|error| panic!("number {number}: {error}"));
        assert_eq!(told, BUSY, "number {number}");
    }
    let service = up.service();
    assert_eq!(service.outcomes(["dismissed", "closed_waiting"]), [3, 0]);
    assert_eq!(service.waiting.timed_out, 3);
    // They have not closed, and are in nobody's way.
    let more = client::stand(&[V4], 3);
    assert_eq!(up.service().outcome("refused_capacity"), 0);
    drop((held, line, more));
}

#[test]
fn the_reply_may_come_from_a_file() {
    let host = Host::new();
    let reply = "busy\n".repeat(1_000);
    let file = host.write("busy.http", &reply);
    let mut app = App::with(&host, 1, &["--never-listen"]);
    app.waiting = Some(format!("timeout = \"100ms\"\nreply_file = {file:?}"));
    let up = host.start(&app);
    let mut told = String::new();
    client::connect(V4).expect("a place in line").read_to_string(&mut told).expect("a reply");
    assert_eq!(told, reply);
    assert_eq!(waiting(&up).timed_out, 1);
}

/// The distributor holds the connection until the client has closed, but not for ever.
#[test]
fn a_client_that_reads_nothing_is_not_waited_for_for_ever() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--never-listen"]);
    app.waiting = Some(format!("timeout = \"50ms\"\nreply = {BUSY:?}"));
    let up = host.start(&app);
    let silent = client::stand(&[V4, V6], 20);
    wait_until_eq("dismissed", seconds(5.0), 20, || waiting(&up).timed_out);
    wait_waiting(&up, 0);
    // Of those 20 the kernel knows both ends as long as ours are open; theirs go first.
    wait_for("their connections to be closed", seconds(15.0), || {
        (network::connections() <= 20).then_some(())
    });
    drop(silent);
}

/// A distributor that is stopped makes no rooms, so all of these share one, the current one,
/// and only the first one's time in it is known.
#[test]
fn everybody_has_his_own_time_also_in_a_shared_room() {
    const OLD: usize = 150;
    const YOUNG: usize = 50;
    let timeout = seconds(2.0);
    let host = Host::new();
    let mut app = limited(&host, 1, 1);
    app.waiting = Some(format!("timeout = \"{}\"", lasting(2.0)));
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    let mut came = Vec::new();
    let mut streams = Vec::new();
    let stand = |count: usize, came: &mut Vec<Instant>, streams: &mut Vec<TcpStream>| {
        for _ in 0..count {
            came.push(Instant::now());
            streams.push(client::connect(V4).expect("a place in line"));
        }
    };
    stand(OLD, &mut came, &mut streams);
    let first = came[0];
    wait_for("the others' time to begin", seconds(2.0), || (first.elapsed() > timeout / 2).then_some(()));
    stand(YOUNG, &mut came, &mut streams);
    distributor.signal(Signal::CONT);
    let mut line = Line::behind(held, streams).expect("watch the line");
    for place in 0..OLD + YOUNG {
        let (number, mut stream) = line.stir().expect("somebody's time is up");
        let waited = came[number].elapsed();
        let error = stream.read(&mut [0]).expect_err("nobody is served");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(waited >= timeout, "number {number} was turned away after {waited:?}");
        assert!((number < OLD) == (place < OLD), "number {number} was turned away as number {place}");
    }
    assert_eq!(up.service().outcomes(["dismissed", "handed_over"]), [(OLD + YOUNG) as u64, 0]);
}

#[test]
fn whoever_is_reset_while_he_waits_is_never_handed_over() {
    let host = Host::new();
    let up = host.up(&limited(&host, 1, 1));
    let held = client::hold(V4, 1);
    let mut streams = client::stand(&[V4, V6], 30);
    wait_waiting(&up, 30);
    // Every third, from behind.
    for number in (0..30).rev().step_by(3) {
        client::reset(streams.remove(number)).expect("reset");
    }
    wait_waiting(&up, 20);
    let mut line = Line::behind(held, streams).expect("watch the line");
    assert_in_order(&line.turns(20).expect("the others are served"), 0);
    line.free();
    assert_quiet(&up, 1);
    wait_until_eq("dead ones", seconds(5.0), 10, || up.service().outcome("moved_dead"));
    assert_eq!(up.service().outcomes(["handed_over", "closed_waiting"]), [20, 10]);
    assert_eq!(host.inside("1").accepted, 21);
}

#[test]
fn whoever_has_closed_his_direction_while_he_waits_is_still_served() {
    let host = Host::new();
    let up = host.up(&limited(&host, 1, 1));
    let held = client::hold(V4, 1);
    let mut half = client::stand(&[V4, V6], 2);
    for stream in &mut half {
        stream.write_all(b"who\n").expect("ask");
        stream.shutdown(Shutdown::Write).expect("close our direction");
    }
    wait_waiting(&up, 2);
    drop(held);
    for mut stream in half {
        let mut told = String::new();
        stream.read_to_string(&mut told).expect("an answer, and the end");
        assert_eq!(told.lines().count(), 2, "a greeting and an answer: {told:?}");
    }
    assert_quiet(&up, 1);
    assert_eq!(up.service().outcomes(["handed_over", "closed_waiting"]), [2, 0]);
}

#[test]
fn a_higher_limit_serves_those_who_wait_at_once() {
    let host = Host::new();
    let up = host.up(&limited(&host, 1, 1));
    let held = client::hold(V4, 1);
    let mut line = Line::behind(held, client::stand(&[V4, V6], 60)).expect("watch the line");
    wait_waiting(&up, 60);
    up.run(&["limit", "app/1", "11"]).expect_done();
    let mut served: Vec<usize> = (0..10).map(|_| line.serve().expect("a place")).collect();
    served.sort_unstable();
    assert_in_order(&served, 0);
    assert_eq!((up.connections(), waiting(&up).now), (vec![11], 50));
    up.run(&["limit", "app/1", "none"]).expect_done();
    for _ in 0..50 {
        line.serve().expect("a place");
    }
    assert_eq!((up.connections(), waiting(&up).now), (vec![61], 0));
    // Nobody waits, so nobody has to.
    Client::open(V4).expect("served");
    assert_eq!(up.service().outcomes(["handed_over", "selected"]), [60, 2]);
}

#[test]
fn a_server_that_becomes_ready_serves_those_who_wait_at_once() {
    let host = Host::new();
    let go = host.path_text("go");
    let app = App { limit: Some(5), ..App::with(&host, 2, &["--listen", "[::]:8080", "--listen-when", &go]) };
    let up = host.start(&app);
    let mut line = Line::behind(Vec::new(), client::stand(&[V4, V6], 12)).expect("watch the line");
    wait_waiting(&up, 12);
    host.write("go", "");
    for _ in 0..10 {
        assert!(line.serve().expect("a place") < 10, "one of the first ten");
    }
    up.wait_ready();
    assert_eq!((up.connections(), waiting(&up).now), (vec![5, 5], 2));
    assert_in_order(&line.turns(2).expect("the others are served"), 10);
}

#[test]
fn a_server_that_is_resumed_serves_those_who_wait_at_once() {
    let host = Host::new();
    // It exits as long as there is no such file: it has nothing else to run.
    let go = host.path_text("go");
    let mut app = App::of(&host, 1);
    let server = app.command.join(" ");
    app.command = ["/bin/sh", "-c", &format!("test -e {go} && exec {server}")].map(str::to_owned).to_vec();
    app.server = "restart = { delay = \"10ms\", give_up_after = 1 }".to_owned();
    let up = host.start(&app);
    up.wait_state("app/1", "failed");
    let streams = client::stand(&[V4, V6], 20);
    wait_waiting(&up, 20);
    host.write("go", "");
    up.run(&["resume", "app/1"]).expect_done();
    for stream in streams {
        Client::greeted(stream).expect("served");
    }
    up.wait_ready();
    assert_quiet(&up, 1);
    assert_eq!(up.service().outcome("handed_over"), 20);
}

#[test]
fn nobody_is_lost_or_overtaken_when_the_distributor_is_killed() {
    const ALL: usize = 400;
    let host = Host::new();
    let up = host.up(&limited(&host, 2, 1));
    let held = client::hold(V4, 2);
    let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
    wait_waiting(&up, ALL);
    let mut order = Vec::new();
    let mut killed = 0;
    while order.len() < ALL {
        // In the middle of a hand-over, or just before or after one.
        if order.len() % 80 == 40 {
            let distributor = up.distributor();
            if killed % 2 == 0 {
                distributor.signal(Signal::KILL);
                line.free();
            } else {
                line.free();
                distributor.signal(Signal::KILL);
            }
            killed += 1;
        } else {
            line.free();
        }
        let next = line.serve();
        order.push(next.unwrap_or_else(|error| panic!("after {} and {killed} kills: {error}", order.len())));
    }
    assert_in_order(&order, 0);
    assert_eq!(killed, 5);
    drop(line);
    up.wait_answering();
    assert_quiet(&up, 2);
    let service = up.service();
    assert!(service.servers.iter().all(|server| server.connections_max == 1), "{service:#?}");
    assert_eq!(service.outcomes(["handed_over", "closed_waiting", "move_failed"]), [ALL as u64, 0, 0]);
}

/// Those who wait can only be handed over by the distributor. Whoever comes meanwhile must not
/// starve behind them while a server is idle.
#[test]
fn whoever_comes_while_the_distributor_is_stopped_gets_a_free_place() {
    let host = Host::new();
    let up = host.up(&limited(&host, 1, 1));
    let mut held = client::hold(V4, 1);
    let mut streams = client::stand(&[V4, V6], 5);
    wait_waiting(&up, 5);
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    held.clear();
    // As long as it may still be there, whoever comes stands in line.
    let served = wait_for("somebody to be served", seconds(10.0), || {
        let stream = client::connect(V4).expect("served, or in line");
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("set a timeout");
        match stream.peek(&mut [0]) {
            Ok(1) => Some(Client::greeted(stream).expect("a greeting")),
            _ => {
                stream.set_read_timeout(Some(client::patience())).expect("set a timeout");
                streams.push(stream);
                // One of them may have got the place, and not be greeted in time.
                let late = (5..streams.len()).find(|number| client::is_greeted(&streams[*number]))?;
                Some(Client::greeted(streams.remove(late)).expect("a greeting"))
            }
        }
    });
    let count = streams.len();
    assert!(count > 5, "it was there for a second more");
    distributor.signal(Signal::CONT);
    let mut line = Line::behind(vec![served], streams).expect("watch the line");
    wait_waiting(&up, count);
    assert_in_order(&line.turns(count).expect("those who wait are served"), 0);
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "handed_over"]), [2, count as u64]);
    assert_eq!(service.server("app/1").connections_max, 1);
}

#[test]
fn the_queue_of_a_killed_server_is_served_before_those_who_wait() {
    let host = Host::new();
    let up = host.up(&limited(&host, 1, 5));
    let victim = up.process("app/1");
    victim.freeze(seconds(5.0));
    let mut streams = client::stand(&[V4, V6], 5);
    up.wait_connections(&[5]);
    streams.extend(client::stand(&[V4, V6], 50));
    wait_waiting(&up, 50);
    victim.kill(seconds(5.0));
    let mut line = Line::behind(Vec::new(), streams).expect("watch the line");
    let queued: Vec<usize> = (0..5).map(|_| line.serve().expect("served by the next instance")).collect();
    assert_in_order(&queued, 0);
    assert!(line.served.iter().all(|client| client.pid != victim.pid));
    assert_in_order(&line.turns(50).expect("those who wait are served"), 5);
    drop(line);
    assert_quiet(&up, 1);
    assert_eq!(up.service().server("app/1").connections_max, 5);
}

#[test]
fn the_bell_wakes_servers_and_counts_nowhere() {
    for (bell, rings) in [("on", true), ("off", false)] {
        let host = Host::new();
        let file = host.write("dist-ctl.toml", &on_two_addresses(&host, 2, 2).toml());
        let mut command = host.command(&["up", "-f", &file]);
        command.env("DIST_CTL_BELL", bell);
        let up = host.start_command(command);
        up.wait_ready();
        let held = client::hold(V4, 4);
        let mut line = Line::behind(held, client::stand(&[V4, other(), V6], 90)).expect("watch the line");
        wait_waiting(&up, 90);
        assert_in_order(&line.turns(90).expect("those who wait are served"), 0);
        let service = up.service();
        assert_eq!(service.connections(), [2, 2], "bell {bell}");
        assert_eq!(service.totals().iter().sum::<u64>(), 94, "bell {bell}");
        for server in &service.servers {
            assert_eq!(server.connections_max, 2, "bell {bell}: {}", server.name);
        }
        assert_eq!(service.outcomes(["established", "handed_over"]), [4, 90], "bell {bell}");
        // One bell may do for several that were moved.
        assert_eq!(service.outcome("bell") > 0, rings, "bell {bell}: {:?}", service.outcomes);
        drop(line);
        up.wait_connections(&[0, 0]);
        assert_eq!(up.service().outcome("closed"), 94, "bell {bell}");
    }
}

/// The distributor is stopped until places on both are free, so that it finds all at once.
#[test]
fn those_who_wait_are_handed_over_by_weight() {
    let host = Host::new();
    let servers = [("a", "weight = 300"), ("b", "weight = 100")];
    let app = App { limit: Some(40), ..App::of(&host, 0) };
    let up = host.up(&app.named(servers.map(|(name, lines)| (name, lines.to_owned()))));
    let held = client::hold(V4, 80);
    let streams = client::stand(&[V4, V6], 40);
    wait_waiting(&up, 40);
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    drop(held);
    wait_until_eq("connections of servers and rooms", seconds(5.0), 40, network::connections);
    distributor.signal(Signal::CONT);
    let served: Vec<Client> =
        streams.into_iter().map(|stream| Client::greeted(stream).expect("served")).collect();
    assert_eq!(client::by_name(&served), [("a".to_owned(), 30), ("b".to_owned(), 10)].into());
    assert_eq!(up.connections(), [30, 10]);
}

#[test]
fn the_lists_of_two_services_do_not_mix() {
    let host = Host::new();
    let server = host.test_server();
    let services = [("a", 8080, 30), ("b", 9090, 40)].map(|(name, port, capacity)| {
        format!(
            "[service.{name}]\nlisten = [\":{port}\"]\n[service.{name}.waiting]\ncapacity = {capacity}\n\
             [service.{name}.server]\ncount = 1\nlimit = 1\n\
             command = [\"{server}\", \"--listen\", \"[::]:{port}\", \"--name\", \"{name}\"]\n"
        )
    });
    let up = host.start_toml(&services.concat());
    up.wait_ready();
    let (a, b) = (V4, SocketAddr::new(V6.ip(), 9090));
    let (held_a, held_b) = (client::hold(a, 1), client::hold(b, 1));
    let (mut line_a, mut line_b) = (Vec::new(), Vec::new());
    client::on_one_cpu(|| {
        for _ in 0..30 {
            line_a.push(client::connect(a).expect("a place in line"));
            line_b.push(client::connect(b).expect("a place in line"));
        }
    });
    let waiting = || {
        let status = up.status();
        ["a", "b"].map(|name| status.service(name).waiting.now)
    };
    wait_until_eq("those who wait", seconds(5.0), [30, 30], waiting);
    client::connect(a).expect_err("this list is full");
    line_b.push(client::connect(b).expect("this one is not"));
    let mut line_a = Line::behind(held_a, line_a).expect("watch the line");
    assert_in_order(&line_a.turns(30).expect("served"), 0);
    assert!(line_a.served.iter().all(|client| client.server == "a"));
    assert_eq!(waiting(), [0, 31]);
    let mut line_b = Line::behind(held_b, line_b).expect("watch the line");
    assert_in_order(&line_b.turns(31).expect("served"), 0);
    assert!(line_b.served.iter().all(|client| client.server == "b"));
    let status = up.status();
    for (name, served) in [("a", 30), ("b", 31)] {
        assert_eq!(status.service(name).outcomes(["handed_over", "established"]), [served, 1], "{name}");
    }
}

/// With TCP_DEFER_ACCEPT a handshake is complete for the client, and not for the server until
/// the client has said something. A place that was reserved for it is given away after at most
/// 2.2 seconds, so such a server may hold one more than its limit for each client that is silent
/// for longer: half of its limit more, at most, for so many may be reserved.
#[test]
fn a_server_that_defers_accepting_exceeds_its_limit_by_the_silent_ones_only() {
    let host = Host::new();
    let app =
        App { limit: Some(2), ..App::with(&host, 1, &["--listen", "[::]:8080", "--defer-accept", "20"]) };
    let up = host.up(&app);
    let mut silent = client::connect(V4).expect("a handshake");
    // Half of the limit is reserved; from now on places are for completed handshakes.
    let second = Client::open(V4).expect("handed over to the other place");
    assert_eq!(up.service().outcomes(["selected", "established", "handed_over"]), [1, 0, 1]);
    assert_eq!(up.connections(), [1]);
    let third = Client::open(V4).expect("served when the reservation has expired");
    assert_eq!(up.connections(), [2]);
    silent.write_all(b"who\n").expect("say something");
    let silent = Client::greeted(silent).expect("it was never refused");
    assert_eq!(up.connections(), [3]);
    // There it stays: the next one waits until there are fewer than the limit again.
    let fourth = client::connect(V4).expect("a place in line");
    wait_waiting(&up, 1);
    drop(silent);
    up.wait_connections(&[2]);
    assert_eq!(waiting(&up).now, 1);
    drop(second);
    let fourth = Client::greeted(fourth).expect("served");
    assert_eq!(up.service().server("app/1").connections_max, 3);
    drop((third, fourth));
    assert_quiet(&up, 1);
}

#[test]
fn status_tells_who_waits_how_long_and_what_became_of_them() {
    let host = Host::new();
    let mut app = limited(&host, 1, 1);
    app.waiting = Some("capacity = 4".to_owned());
    let up = host.up(&app);
    let said = waiting(&up);
    assert_eq!((said.now, said.max, said.capacity, said.oldest_seconds), (0, 0, 4, 0.0));
    assert_eq!((said.wait.count, said.wait.buckets.len()), (0, 0));
    let held = client::hold(V4, 1);
    let start = Instant::now();
    let mut streams = client::stand(&[V4, V6], 4);
    wait_waiting(&up, 4);
    client::connect(V4).expect_err("the list is full");
    let young = wait_for("somebody to be the oldest", seconds(5.0), || {
        Some(waiting(&up).oldest_seconds).filter(|oldest| *oldest > 0.0)
    });
    assert!(young <= start.elapsed().as_secs_f64());
    let older = wait_for("the oldest to grow older", seconds(5.0), || {
        Some(waiting(&up).oldest_seconds).filter(|oldest| *oldest >= young + 0.3)
    });
    assert!(older <= start.elapsed().as_secs_f64());
    client::reset(streams.remove(3)).expect("leave");
    wait_waiting(&up, 3);
    let mut line = Line::behind(held, streams).expect("watch the line");
    line.turns(3).expect("served");
    let all = start.elapsed().as_secs_f64();
    wait_waiting(&up, 0);
    let said = waiting(&up);
    assert_eq!(
        (said.now, said.max, said.served, said.left, said.refused, said.timed_out),
        (0, 4, 3, 1, 1, 0)
    );
    assert_eq!(said.oldest_seconds, 0.0);
    assert_eq!(said.wait.count, 3);
    assert!(said.wait.sum_seconds >= 3.0 * 0.3 && said.wait.sum_seconds <= 3.0 * all, "{:?}", said.wait);
    let (bounds, counts): (Vec<f64>, Vec<u64>) = said.wait.buckets.iter().map(|it| (it.le, it.count)).unzip();
    assert!(bounds.is_sorted() && counts.is_sorted() && counts.last() == Some(&3), "{:?}", said.wait);
    assert!(bounds[0] >= 0.3 && bounds[0] <= 2.0 * all, "a bucket ends at twice its begin: {:?}", said.wait);
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("waiting 0 of 4"), "{table}");
}

#[test]
fn everybody_who_waits_is_turned_away_when_the_service_stops() {
    for reply in ["", BUSY] {
        let host = Host::new();
        let mut app = limited(&host, 1, 1);
        app.waiting = (!reply.is_empty()).then(|| format!("reply = {reply:?}"));
        let up = host.up(&app);
        let held = client::hold(V4, 1);
        let streams = client::stand(&[V4, V6], 100);
        wait_waiting(&up, 100);
        up.signal(Signal::TERM);
        for mut stream in streams {
            let mut told = String::new();
            match stream.read_to_string(&mut told) {
                Ok(_) => assert_eq!((told.as_str(), reply.is_empty()), (reply, false)),
                Err(error) => assert_eq!((error.kind(), reply), (ErrorKind::ConnectionReset, "")),
            }
        }
        drop(held);
        assert!(up.has_stopped().success());
    }
}

/// A handshake that was begun before is completed in a room, of which nobody will be handed over.
#[test]
fn whoever_begins_to_wait_while_the_service_stops_is_turned_away() {
    let host = Host::new();
    let clients = network::Clients::join(1).expect("join a network of clients");
    let mut app = limited(&host, 1, 1);
    app.waiting = Some(format!("reply = {BUSY:?}"));
    app.server = "drain_timeout = \"10s\"".to_owned();
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 3)).expect("send SYNs");
    wait_until_eq("SYNs", seconds(5.0), 3, || up.service().outcome("wait_limit"));
    up.signal(Signal::TERM);
    up.wait_state("app/1", "draining");
    clients.mend(0).expect("mend the wire");
    for stream in begun.finish() {
        let mut told = String::new();
        stream.expect("a handshake").read_to_string(&mut told).expect("a reply");
        assert_eq!(told, BUSY);
    }
    let service = up.service();
    assert_eq!(service.outcomes(["established_waiting", "dismissed", "handed_over"]), [3, 3, 0]);
    drop(held);
    assert!(up.has_stopped().success());
}

/// 50 clients at once, more than all servers together may have.
#[track_caller]
fn fifty_are_answered(up: &Up<'_>, limit: u64) {
    const ALL: usize = 50;
    let places = limit as usize * up.service().servers.len();
    let held: Vec<TcpStream> = (0..places).map(|_| client::connect(V4).expect("a place")).collect();
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            client::in_threads(ALL, 0..ALL, |number| {
                http::get(if number % 2 == 0 { V4 } else { V6 }).map(drop)
            })
        });
        wait_waiting(up, ALL);
        drop(held);
        let answered = clients.join().expect("no client panics");
        answered.unwrap_or_else(|error| panic!("not everybody is answered: {error}: {:#?}", up.service()));
    });
    let service = up.service();
    assert_eq!(service.outcome("handed_over"), ALL as u64);
    for server in &service.servers {
        assert!(server.connections_max <= limit, "{} had {}", server.name, server.connections_max);
    }
    assert_quiet(up, service.servers.len());
    assert_eq!(up.service().totals().iter().sum::<u64>(), (ALL + places) as u64);
}

/// A thread is never given a connection while it has another: the pool is as large as the limit.
#[test]
fn java_with_a_pool_of_threads_has_no_more_connections_than_threads() {
    let _alone = heavy();
    let host = Host::new();
    let app = App { limit: Some(2), ..App::running(2, real::java_pool(2)) };
    let up = host.up(&app);
    fifty_are_answered(&up, 2);
}

#[test]
fn nginx_is_given_no_more_connections_than_its_limit() {
    for listeners in [Nginx::Shared, Nginx::PerWorker] {
        let host = Host::new();
        let app = App { limit: Some(3), ..App::running(2, real::nginx(&host, 2, listeners, Daemon::Off)) };
        let up = host.up(&app);
        fifty_are_answered(&up, 3);
    }
}

/// With SYN cookies always, the kernel knows nothing of a client before its handshake is complete.
#[test]
fn with_and_without_syn_cookies_nobody_who_waits_is_refused_or_overtaken() {
    let all = fewer(1_000, 200);
    for syncookies in SYNCOOKIES {
        let host = Host::new();
        set_syncookies(syncookies).expect("set tcp_syncookies");
        let up = host.up(&limited(&host, 2, 1));
        let held = client::hold(V4, 2);
        let mut line = Line::behind(held, client::stand(&[V4, V6], all)).expect("watch the line");
        wait_waiting(&up, all);
        let order = line.turns(all).expect("all are served");
        let outcomes = up.service().outcomes;
        assert!(order.is_sorted(), "syncookies {syncookies}: {order:?}: {outcomes:?}");
        drop(line);
        up.wait_connections(&[0, 0]);
        // And where there is always somebody who waits, and nobody else does.
        let mut serial = Serial::full(V4, 2);
        for number in 0..all * 2 {
            if let Err(error) = serial.come() {
                panic!("syncookies {syncookies}, number {number}: {error}: {:?}", up.service().outcomes);
            }
        }
        drop(serial);
        assert_quiet(&up, 2);
    }
}

/// The places of half-open connections are for those who complete their handshakes: with a list
/// only half of a limit may be reserved at a time, and the other half is for those who wait.
#[test]
fn handshakes_that_never_complete_reserve_half_of_a_limit_at_most() {
    let host = Host::new();
    let clients = network::Clients::join(1).expect("join a network of clients");
    let up = host.up(&limited(&host, 1, 10));
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 50)).expect("send SYNs");
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "wait_limit", "refused_limit"]), [5, 45, 0]);
    assert_eq!((service.connections(), service.waiting.now), (vec![0], 0));
    // The other half, and nobody waits for a reservation to expire.
    let held = client::hold(V4, 5);
    assert_eq!(up.connections(), [5]);
    drop(begun);
    let more = client::hold(V4, 5);
    assert_eq!(up.connections(), [10]);
    stays("connections", Duration::from_millis(200), vec![10], || up.connections());
    drop((held, more));
    assert_quiet(&up, 1);
}

/// The attendant empties the rooms of the first orphans while the rest of their queue is still
/// moving.
#[test]
fn the_end_of_a_long_queue_of_a_killed_server_goes_before_those_who_wait() {
    const QUEUE: usize = 2_000;
    const PLACES: usize = 100;
    const BEHIND: usize = 200;
    let _alone = heavy();
    for round in 0..fewer(4, 1) {
        let host = Host::new();
        let servers = [("a", format!("limit = {QUEUE}")), ("b", format!("limit = {PLACES}"))];
        let mut app = App { policy: Some("first"), ..App::of(&host, 0).named(servers) };
        app.waiting = Some("capacity = 12000\ntimeout = \"5m\"".to_owned());
        let up = host.up(&app);
        let victim = up.process("app/a");
        victim.freeze(seconds(5.0));
        let mut streams = client::stand(&[V4], QUEUE);
        let held = client::hold(V4, PLACES);
        streams.extend(client::stand(&[V4], BEHIND));
        wait_waiting(&up, BEHIND);
        victim.signal(Signal::KILL);
        drop(held);
        // The next instance has a place for everybody in the queue, and b for some who wait.
        wait_until_eq("those who got a place", seconds(10.0), (QUEUE + PLACES) as u64, || {
            up.service().outcomes(["handed_over", "moved"]).iter().sum()
        });
        assert_eq!(up.service().outcomes(["parked_behind", "move_failed"]), [0, 0], "round {round}");
        let rest = streams.split_off(QUEUE + PLACES);
        let served: Result<Vec<Client>, _> = streams.into_iter().map(Client::greeted).collect();
        served.as_ref().unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(waiting(&up).now, rest.len() as u64);
    }
}
