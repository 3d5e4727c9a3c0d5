//! Connections are counted exactly, shared by weight, and forgotten when they end.

#![forbid(unsafe_code)]

use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use tests::{
    app::App,
    client::{self, Client, Ending},
    host::{Host, V4, V6},
    network::Clients,
    wait::{fewer, lasting, seconds, stays, wait_for, wait_until_eq},
};

#[test]
fn a_thousand_held_connections_are_shared_by_weight_within_one() {
    let host = Host::new();
    let weights = ["w1", "w2", "w3", "w4", "w5", "w6", "w7"];
    let servers = (1..).zip(weights).map(|(weight, name)| (name, format!("weight = {weight}")));
    let up = host.up(&App::of(&host, 0).named(servers));
    let held = client::hold(V4, 1000);
    let seen = client::by_name(&held);
    let counted = up.connections();
    for (at, name) in weights.into_iter().enumerate() {
        let share = 1000.0 * (at + 1) as f64 / 28.0;
        let seen = seen[name];
        assert!(
            (seen as f64 - share).abs() <= 1.0,
            "{name} serves {seen}, its share is {share}: {counted:?}"
        );
        assert_eq!(counted[at], seen as u64, "what the kernel counts for {name}");
        assert_eq!(host.inside(name).now, seen as u64, "what {name} itself counts");
    }
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "next_best", "established", "closed"]), [1000, 0, 1000, 0]);
    drop(held);
    up.wait_connections(&[0; 7]);
    assert_eq!(up.service().outcome("closed"), 1000);
}

#[test]
fn two_thousand_connections_at_once_spread_within_one() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 4));
    let held = client::begin(V4, None, 2000).expect("connect all at once").greeted();
    let seen = client::by_name(&held);
    assert_eq!(seen.values().sum::<usize>(), 2000);
    assert!(seen.len() == 4 && seen.values().all(|count| count.abs_diff(500) <= 1), "{seen:?}");
    let service = up.service();
    let [selected, next_best] = service.outcomes(["selected", "next_best"]);
    // A SYN that the kernel sends again while the first one's handshake is open finds that, and
    // asks no program.
    assert_eq!(selected + next_best, 2000, "{:?}", service.outcomes);
    let elsewhere = ["established_waiting", "refused_limit", "refused_capacity", "wait_no_server"];
    assert_eq!(service.outcomes(elsewhere), [0; 4], "{:?}", service.outcomes);
    assert_eq!(service.outcomes(["established", "closed"]), [2000, 0]);
    drop(held);
    up.wait_connections(&[0; 4]);
    assert_eq!(up.service().outcome("closed"), 2000);
}

#[test]
fn the_largest_service_has_256_servers() {
    let host = Host::new();
    let app = App { server: format!("start_timeout = \"{}\"\n", lasting(300.0)), ..App::of(&host, 256) };
    let file = host.write("dist-ctl.toml", &app.toml());
    let up = host.launch(host.command(&["up", "-f", &file]));
    // Not by asking: so many starting servers leave nobody a CPU on a small and busy machine.
    wait_for("all of them", seconds(180.0), || up.printed().contains("256 servers").then_some(()));
    let held = client::hold(V4, 512);
    assert_eq!(up.connections(), [2; 256]);
    assert!(client::by_process(&held).values().all(|count| *count == 2));
    assert_eq!(up.service().outcomes(["selected", "next_best", "widened"]), [512, 0, 0]);
}

/// Between a SYN and its connection lies a round trip, in which nothing is counted yet. Here
/// it is made a long one: the SYN-ACKs are lost on the way until all SYNs have been sent.
/// Without reservations all of them would go to the servers that held the fewest before.
#[test]
fn a_burst_within_one_round_trip_makes_up_for_what_was_uneven() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let up = host.up(&App::of(&host, 4));
    let uneven: Vec<Client> = client::hold(V4, 400);
    let (kept, gone): (Vec<_>, Vec<_>) = uneven.into_iter().partition(|client| client.server == "1");
    drop(gone);
    up.wait_connections(&[100, 0, 0, 0]);
    let target = (clients.server_v4(), 8080).into();
    clients.cut(0).expect("cut the wire");
    let begun =
        clients.network.run(|| client::begin(target, Some(clients.v4(0)), 500)).expect("send the SYNs");
    stays("ended handshakes", Duration::from_millis(50), 0, || begun.ended());
    assert_eq!(up.connections(), [100, 0, 0, 0], "nothing is established yet");
    clients.mend(0).expect("mend the wire");
    let burst = begun.greeted();
    assert_eq!(burst.len(), 500);
    up.wait_connections(&[150, 150, 150, 150]);
    drop((kept, burst));
    up.wait_connections(&[0; 4]);
}

#[test]
fn twenty_thousand_connections_ended_in_every_way_leave_no_count() {
    let host = Host::new();
    let all = fewer(20_000, 4_000);
    let up = host.up(&App::of(&host, 4));
    client::in_threads(8, 0..all, |number| {
        let ending = Ending::ALL[number % Ending::ALL.len()];
        let address = if number % 3 == 0 { V6 } else { V4 };
        ending
            .happen(address)
            .map_err(|error| io::Error::other(format!("connection {number}, {ending:?}: {error}")))
    })
    .expect("every connection goes as meant");
    up.wait_connections(&[0; 4]);
    let service = up.service();
    assert_eq!(service.totals().iter().sum::<u64>(), all as u64);
    assert_eq!(
        service.outcomes(["established", "closed", "untagged", "word_contended"]),
        [all as u64, all as u64, 0, 0]
    );
    assert_eq!(
        service.outcomes(["selected", "next_best", "refused_limit", "wait_no_server"]),
        [all as u64, 0, 0, 0]
    );
    for name in ["1", "2", "3", "4"] {
        wait_until_eq("held inside", seconds(5.0), 0, || host.inside(name).now);
    }
}

#[test]
fn killed_servers_leave_no_count() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    for round in 0..5 {
        let mut held = client::hold(V4, 400);
        up.wait_connections(&[100; 4]);
        let victim = up.process(&format!("app/{}", round % 4 + 1));
        victim.kill(seconds(5.0));
        let lost = held.iter_mut().filter_map(|client| (!client.is_served()).then_some(client.pid));
        assert!(lost.eq(std::iter::repeat_n(victim.pid, 100)), "only the victim's connections are lost");
        drop(held);
        up.wait_ready();
        up.wait_connections(&[0; 4]);
    }
    let service = up.service();
    assert_eq!(service.outcome("established"), service.outcome("closed"));
}

#[test]
fn connections_reset_in_the_accept_queue_are_counted_and_forgotten() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let server = up.process("app/1");
    server.freeze(seconds(5.0));
    let queued: Vec<_> = (0..50).map(|_| client::connect(V4).expect("a place in the queue")).collect();
    up.wait_connections(&[50]);
    assert_eq!(up.service().server("app/1").accept_queue, Some(50));
    for connection in queued {
        client::reset(connection).expect("reset");
    }
    // The server has not seen any of them.
    up.wait_connections(&[0]);
    assert_eq!(host.inside("1").accepted, 0);
    server.signal(tests::process::Signal::CONT);
    Client::open(V4).expect("it serves again");
}

#[test]
fn handshakes_that_never_complete_leave_no_count() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let up = host.up(&App::of(&host, 2));
    clients.cut(0).expect("cut the wire");
    let target = (clients.server_v4(), 8080).into();
    let begun = clients.network.run(|| client::begin(target, Some(clients.v4(0)), 100)).expect("send SYNs");
    assert_eq!(up.service().outcome("selected"), 100);
    assert_eq!(up.connections(), [0, 0]);
    drop(begun);
    stays("connections", Duration::from_millis(500), vec![0, 0], || up.connections());
    assert_eq!(up.service().outcomes(["established", "closed"]), [0, 0]);
}

#[test]
fn the_most_and_the_total_are_kept() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    drop(client::hold(V4, 30));
    up.wait_connections(&[0, 0]);
    drop(client::hold(V4, 10));
    up.wait_connections(&[0, 0]);
    for server in up.service().servers {
        assert_eq!((server.connections_max, server.connections_total), (15, 20), "{}", server.name);
    }
}

/// Counting goes on while connections come, end and migrate from all sides at once.
#[test]
fn nothing_drifts_while_servers_die_under_load() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let killed = AtomicUsize::new(0);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            // Once is enough, but where servers start slowly.
            while killed.load(Ordering::Relaxed) < 4 {
                let came = client::in_threads(8, 0..fewer(8_000, 2_000), |number| {
                    // A killed server ends what it had accepted, so any of these may fail.
                    let _ = Ending::ALL[number % Ending::ALL.len()].happen(V4);
                    Ok(())
                });
                came.expect("no thread fails");
            }
        });
        while !load.is_finished() {
            let server = format!("app/{}", killed.load(Ordering::Relaxed) % 4 + 1);
            up.process_if_any(&server).inspect(|victim| victim.kill(seconds(5.0)));
            killed.fetch_add(1, Ordering::Relaxed);
            up.wait_ready();
        }
    });
    up.wait_ready();
    up.wait_connections(&[0; 4]);
    wait_until_eq("those who wait", seconds(5.0), 0, || up.service().waiting.now);
    let service = up.service();
    assert_eq!(service.outcomes(["move_failed", "refused_no_room", "word_contended", "owner_lost"]), [0; 4]);
}
