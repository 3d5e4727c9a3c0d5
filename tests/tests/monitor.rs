//! The control plane may die: servers live on, the kernel goes on, and the next one finds all.

#![forbid(unsafe_code)]

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4},
    load::under_load,
    process::{Process, Signal},
    wait::{seconds, wait_for, wait_until_eq},
};

#[test]
fn servers_outlive_the_distributor_and_are_found_again() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let servers = ["app/1", "app/2", "app/3"].map(|name| up.process(name));
    let mut held = client::hold(V4, 30);
    up.replace_distributor();
    assert_eq!(["app/1", "app/2", "app/3"].map(|name| up.process(name)), servers);
    assert_eq!(up.connections(), [10, 10, 10]);
    assert!(held.iter_mut().all(Client::is_served));
    let service = up.service();
    assert!(service.servers.iter().all(|server| server.restarts == 0), "{service:#?}");
    // It can do what the first one could.
    let more = client::hold(V4, 30);
    assert_eq!(up.connections(), [20, 20, 20]);
    drop((held, more));
    up.wait_connections(&[0, 0, 0]);
    servers[0].kill(seconds(5.0));
    wait_for("the next instance", seconds(5.0), || {
        up.process_if_any("app/1").filter(|next| *next != servers[0])
    });
    up.wait_ready();
}

#[test]
fn a_server_that_was_started_again_just_before_the_distributor_died_is_selected() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let old = up.process("app/1");
    old.kill(seconds(5.0));
    wait_for("the next instance", seconds(5.0), || up.process_if_any("app/1").filter(|next| *next != old));
    up.wait_ready();
    // HOME still knows the listener of the old one, at the place that the new one's has now.
    up.replace_distributor();
    let held = client::hold(V4, 30);
    assert_eq!(up.connections(), [10, 10, 10]);
    assert_eq!(up.service().outcome("next_best"), 0);
    drop(held);
    up.wait_connections(&[0, 0, 0]);
}

#[test]
fn live_changes_outlive_the_distributor_that_made_them() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    up.run(&["weight", "app/1", "200"]).expect_done();
    up.run(&["limit", "app/2", "4"]).expect_done();
    up.replace_distributor();
    let service = up.service();
    assert_eq!(service.servers.iter().map(|server| server.weight).collect::<Vec<_>>(), [200, 100, 100]);
    let limits: Vec<_> = service.servers.iter().map(|server| server.limit).collect();
    assert_eq!(limits, [None, Some(4), None]);
    let held = client::hold(V4, 16);
    assert_eq!(up.connections(), [8, 4, 4]);
    let more = client::hold(V4, 6);
    assert_eq!(up.connections(), [12, 4, 6]);
    drop((held, more));
}

#[test]
fn a_daemon_outlives_the_distributor_and_is_found_again() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 2, &["--listen", "[::]:8080", "--daemonise"]));
    let mut held = client::hold(V4, 10);
    up.replace_distributor();
    assert!(held.iter_mut().all(Client::is_served));
    assert_eq!(up.connections(), [5, 5]);
    let more = client::hold(V4, 10);
    assert_eq!(client::by_process(held.iter().chain(&more)).len(), 2, "the same two processes");
    // It is known whose end this is.
    let first = held.iter().find(|client| client.server == "1").expect("one of the first server").pid;
    drop((held, more));
    Process::find(first).expect("the daemon runs").kill(seconds(5.0));
    wait_until_eq("restarts", seconds(5.0), vec![1, 0], || {
        up.service().servers.iter().map(|server| server.restarts).collect()
    });
    up.wait_ready();
    assert_ne!(Client::open(V4).expect("served").pid, first);
}

#[test]
fn what_a_killed_server_left_does_not_outlive_the_next_distributor() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 1, &["--listen", "[::]:8080", "--child"]));
    let (monitor, distributor) = (up.monitor(), up.distributor());
    let server = up.process("app/1");
    let child = server.children()[0];
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    server.kill(seconds(5.0));
    assert!(child.runs(), "nobody is there to kill it");
    monitor.signal(Signal::CONT);
    wait_for("the end of the child", seconds(10.0), || (!child.runs()).then_some(()));
    up.wait_answering();
    up.wait_ready();
    assert_ne!(up.process("app/1"), server);
}

#[test]
fn the_kernel_steers_and_counts_while_there_is_no_distributor() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 4));
    let before = client::hold(V4, 40);
    let selected = up.service().outcome("selected");
    // Frozen, the monitor starts no other.
    let monitor = up.monitor();
    let distributor = up.distributor();
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    let meanwhile = client::hold(V4, 100);
    let by_name = client::by_name(&meanwhile);
    assert!(by_name.len() == 4 && by_name.values().all(|count| *count == 25), "{by_name:?}");
    drop(before);
    monitor.signal(Signal::CONT);
    up.wait_answering();
    up.wait_ready();
    up.wait_connections(&[25; 4]);
    let service = up.service();
    assert_eq!(service.outcome("selected"), selected + 100, "the counters go on where they were");
    assert_eq!(service.totals().iter().sum::<u64>(), 140);
    drop(meanwhile);
    up.wait_connections(&[0; 4]);
}

#[test]
fn a_server_that_died_without_a_distributor_is_started_again() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let monitor = up.monitor();
    let distributor = up.distributor();
    let victim = up.process("app/1");
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    victim.kill(seconds(5.0));
    let held = client::hold(V4, 10);
    assert!(held.iter().all(|client| client.server == "2"));
    monitor.signal(Signal::CONT);
    up.wait_answering();
    wait_for("the next instance", seconds(10.0), || {
        up.process_if_any("app/1").filter(|next| *next != victim)
    });
    up.wait_ready();
    let server = up.service().server("app/1").clone();
    assert_eq!(server.connections, 0);
    assert_eq!(up.connections(), [0, 10]);
    drop(held);
}

#[test]
fn a_distributor_that_dies_again_and_again_costs_no_connection() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 4));
    let ((), served) = under_load(1, |load| {
        for _ in 0..4 {
            up.replace_distributor();
            load.serves(25);
        }
    });
    up.wait_connections(&[0; 4]);
    let service = up.service();
    // Who came while listeners were being found again waited in the room for it.
    let [directly, waited] = service.outcomes(["established", "established_waiting"]);
    assert_eq!(directly + waited, served);
    assert_eq!(service.outcomes(["handed_over", "closed", "move_failed"]), [waited, served, 0]);
}

#[test]
fn waiting_connections_outlive_the_distributor() {
    let host = Host::new();
    let up = host.start(&App::with(&host, 1, &["--listen", "[::]:8080", "--listen-after", "3000"]));
    let waiting: Vec<_> = (0..10).map(|_| client::connect(V4).expect("a place in the room")).collect();
    wait_until_eq("waiting", seconds(5.0), 10, || up.service().waiting.now);
    let old = up.distributor();
    old.kill(seconds(5.0));
    for stream in waiting {
        Client::greeted(stream).expect("served in the end");
    }
    assert_eq!(up.service().outcome("handed_over"), 10);
}

#[test]
fn it_stops_in_good_order_though_its_distributor_is_dead() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let monitor = up.monitor();
    let distributor = up.distributor();
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    up.signal(Signal::TERM);
    monitor.signal(Signal::CONT);
    assert!(up.has_stopped().success());
}

#[test]
fn the_monitor_reaps_what_its_servers_leave_to_it() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 1, &["--listen", "[::]:8080", "--daemonise"]));
    let monitor = up.monitor();
    let is_zombie = |process: &Process| process.exists() && !process.runs();
    wait_until_eq("zombies", seconds(5.0), 0, || {
        monitor.children().iter().filter(|child| is_zombie(child)).count()
    });
}
