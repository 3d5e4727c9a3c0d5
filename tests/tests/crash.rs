//! What a server's death costs its clients: those it had accepted, and nobody else.

#![forbid(unsafe_code)]

use std::{
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4},
    network::Clients,
    wait::{patience, seconds, wait_for, wait_until_eq},
};

#[test]
fn queued_and_half_open_connections_of_a_killed_server_are_served_by_others() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let mut app = App::of(&host, 4);
    // So that all of them are the first server's.
    app.policy = Some("first");
    let up = host.up(&app);
    let victim = up.process("app/1");
    victim.freeze(seconds(5.0));
    let target = (clients.server_v4(), 8080).into();
    let queued: Vec<TcpStream> = clients
        .network
        .run(|| (0..100).map(|_| client::connect_from(clients.v4(1), target)).collect::<Result<_, _>>())
        .expect("100 in the queue");
    clients.cut(0).expect("cut the wire");
    let half_open =
        clients.network.run(|| client::begin(target, Some(clients.v4(0)), 20)).expect("send the SYNs");
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "established"]), [120, 100]);
    assert_eq!(service.connections(), [100, 0, 0, 0]);

    victim.kill(seconds(5.0));
    clients.mend(0).expect("mend the wire");

    let mut served: Vec<Client> =
        queued.into_iter().map(|stream| Client::greeted(stream).expect("none is reset")).collect();
    assert_eq!(served.len(), 100);
    served.extend(half_open.greeted());
    assert_eq!(served.len(), 120);
    assert!(served.iter().all(|client| client.pid != victim.pid));
    assert!(served.iter_mut().all(Client::is_served));
    let service = up.service();
    assert_eq!(service.outcomes(["moved", "move_failed", "moved_dead"]), [100, 0, 0]);
    let [half, parked] = service.outcomes(["moved_half_open", "parked_half_open"]);
    // (Whose SYN comes again before his SYN-ACK does is asked about twice.)
    assert!((20..=40).contains(&half) && parked == 0, "{half}, {parked}");
    assert_eq!(service.connections().iter().sum::<u64>(), 120);
    drop(served);
    up.wait_ready();
    up.wait_connections(&[0; 4]);
}

#[test]
fn the_queue_of_the_only_server_waits_for_its_next_instance() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let victim = up.process("app/1");
    victim.freeze(seconds(5.0));
    let queued: Vec<TcpStream> = (0..100).map(|_| client::connect(V4).expect("a place")).collect();
    up.wait_connections(&[100]);
    victim.kill(seconds(5.0));
    for stream in queued {
        assert_ne!(Client::greeted(stream).expect("served by the next instance").pid, victim.pid);
    }
    let service = up.service();
    assert_eq!(service.outcomes(["moved", "handed_over", "move_failed", "parked_behind"]), [0, 100, 0, 0]);
    // From the server's queue into rooms, and some of them from a shared room into another.
    assert!(service.outcome("parked") >= 100, "{:?}", service.outcomes);
    assert_eq!(service.waiting.max, 100);
    wait_until_eq("waiting", seconds(5.0), 0, || up.service().waiting.now);
    up.wait_connections(&[0]);
}

#[test]
fn limits_are_kept_when_a_queue_moves() {
    let host = Host::new();
    let mut app = App::of(&host, 3);
    app.limit = Some(20);
    let up = host.up(&app);
    let victim = up.process("app/1");
    victim.freeze(seconds(5.0));
    // The first one has 20 in its queue, and will greet none of them.
    let held: Vec<TcpStream> = (0..60).map(|_| client::connect(V4).expect("a place")).collect();
    up.wait_connections(&[20, 20, 20]);
    wait_until_eq("greeted clients", seconds(5.0), 40, || {
        held.iter().filter(|it| client::is_greeted(it)).count()
    });
    let (mut served, queued): (Vec<TcpStream>, Vec<TcpStream>) =
        held.into_iter().partition(client::is_greeted);
    // 16 places on the others.
    served.truncate(24);
    wait_until_eq("connections", seconds(5.0), 44, || up.connections().iter().sum());

    victim.kill(seconds(5.0));

    // Who finds no place waits for the next instance, and is served as well.
    let queued = queued.into_iter().map(Client::greeted);
    let queued = queued.collect::<Result<Vec<_>, _>>().expect("none is reset");
    assert!(queued.iter().all(|client| client.pid != victim.pid));
    assert_eq!(client::by_name(&queued).get("1"), Some(&4));
    let service = up.service();
    assert_eq!(service.outcomes(["moved", "handed_over", "move_failed", "parked_behind"]), [16, 4, 0, 0]);
    assert!(service.outcome("parked") >= 4, "{:?}", service.outcomes);
    assert_eq!(service.waiting.max, 4);
    assert_eq!(service.connections(), [4, 20, 20]);
    for server in &service.servers {
        assert!(server.connections_max <= 20, "{} had {}", server.name, server.connections_max);
    }
    drop((served, queued));
    up.wait_connections(&[0; 3]);
}

/// From the kill to an answer of the next instance, with a client that waits in between. The
/// server's own start is measured by starting it alone, each time, so that both are as the machine is.
#[test]
fn a_new_instance_serves_within_100_ms_beyond_its_own_start() {
    const ROUNDS: usize = 9;
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let (mut taken, mut own): (Vec<Duration>, Vec<Duration>) = (0..ROUNDS)
        .map(|_| {
            let own = own_start(&host);
            let victim = up.process("app/1");
            let start = Instant::now();
            victim.signal(tests::process::Signal::KILL);
            let next = wait_for("the next instance", seconds(5.0), || {
                let client = Client::open(V4).ok()?;
                (client.pid != victim.pid).then_some(client)
            });
            let taken = start.elapsed();
            drop(next);
            up.wait_ready();
            (taken, own)
        })
        .unzip();
    taken.sort_unstable();
    own.sort_unstable();
    println!("from kill to served: {taken:?}; the server's own start: {own:?}");
    // The medians: the machine does other things as well.
    let (median, alone) = (taken[ROUNDS / 2], own[ROUNDS / 2]);
    let most = alone + Duration::from_millis(100).mul_f64(patience());
    assert!(median < most, "{median:?} of {taken:?}, and the server alone starts in {alone:?}");
}

/// How long the test server takes to serve when it is started alone.
fn own_start(host: &Host) -> Duration {
    let server = host.test_server();
    let address = "127.0.0.1:7070".parse().expect("an address");
    let start = Instant::now();
    let mut child = std::process::Command::new(&server)
        .args(["--listen", "127.0.0.1:7070"])
        .spawn()
        .expect("start the test server");
    wait_for("the server alone", seconds(5.0), || Client::open(address).ok());
    let taken = start.elapsed();
    tests::process::signal_child(&child, tests::process::Signal::KILL);
    let _ = child.wait();
    taken
}

#[test]
fn servers_that_are_killed_under_load_cost_only_what_they_had_accepted() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let kills = 12;
    let lost = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut lost = 0;
            for _ in 0..4000 {
                match Client::open(V4) {
                    Ok(client) => drop(client),
                    // Accepted by a server that was killed before it could greet.
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => lost += 1,
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => lost += 1,
                    Err(error) => panic!("a client got {error}"),
                }
            }
            lost
        });
        for round in 0..kills {
            up.process(&format!("app/{}", round % 4 + 1)).kill(seconds(5.0));
            up.wait_ready();
        }
        load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    assert!(lost <= kills, "{lost} of 4000 clients, one after the other, were lost in {kills} kills");
    up.wait_connections(&[0; 4]);
    assert_eq!(up.service().outcomes(["move_failed", "refused_no_room", "refused_limit"]), [0, 0, 0]);
}
