//! Who gets less than his weight says: servers that were just started again, and backups.

#![forbid(unsafe_code)]

use tests::{
    app::{App, Chosen},
    client::{self, Client},
    host::{Host, Up, V4},
    process::Process,
    wait::{seconds, wait_for, wait_until_eq},
};

/// Kills a server's process, and waits until its next one is ready.
#[track_caller]
fn replace(up: &Up<'_>, server: &str) {
    let old = up.process(server);
    old.kill(seconds(5.0));
    wait_next(up, server, old);
}

#[track_caller]
fn wait_next(up: &Up<'_>, server: &str, old: Process) {
    wait_for("the next instance", seconds(10.0), || up.process_if_any(server).filter(|next| *next != old));
    up.wait_ready();
}

#[track_caller]
fn by_name<const SERVERS: usize>(clients: &[Client], names: [&str; SERVERS]) -> [usize; SERVERS] {
    let counts = client::by_name(clients);
    names.map(|name| counts.get(name).copied().unwrap_or(0))
}

#[test]
fn a_server_that_was_started_again_gets_little_at_first() {
    let host = Host::new();
    let up = host.up(&App { server: "slow_start = \"1h\"".to_owned(), ..App::of(&host, 2) });
    // At the service's start all are new, and share evenly.
    assert_eq!(by_name(&client::hold(V4, 20), ["1", "2"]), [10, 10]);
    up.wait_connections(&[0, 0]);
    replace(&up, "app/2");
    let server = up.service().server("app/2").clone();
    assert_eq!((server.weight, server.effective_weight), (100, 5));
    let reason = server.reason.expect("a reason");
    assert!(reason.contains("; slow start: 5 % of its weight, all of it in 59m"), "{reason}");
    // One in twenty-one: the weights are 100 and 5.
    let held = client::hold(V4, 42);
    assert_eq!(by_name(&held, ["1", "2"]), [40, 2]);
    // The next distributor goes on with it.
    up.replace_distributor();
    assert_eq!(up.service().server("app/2").effective_weight, 5);
    drop(held);
    up.stop();
}

#[test]
fn when_all_were_started_again_nobody_is_held_back() {
    let host = Host::new();
    let up = host.up(&App { server: "slow_start = \"1h\"".to_owned(), ..App::of(&host, 2) });
    replace(&up, "app/1");
    replace(&up, "app/2");
    let weights: Vec<_> = up.service().servers.iter().map(|server| server.effective_weight).collect();
    assert_eq!(weights, [100, 100]);
    assert_eq!(by_name(&client::hold(V4, 20), ["1", "2"]), [10, 10]);
    up.stop();
}

#[test]
fn a_slow_start_ends() {
    let host = Host::new();
    let up = host.up(&App { server: "slow_start = \"2s\"".to_owned(), ..App::of(&host, 2) });
    let old = up.process("app/2");
    old.kill(seconds(5.0));
    let mut seen = Vec::new();
    wait_until_eq("the effective weight", seconds(20.0), Some(100), || {
        let server = up.service().server("app/2").clone();
        let weight = (server.state == "ready").then_some(server.effective_weight);
        seen.extend(weight);
        weight
    });
    assert!(seen.is_sorted() && seen[0] < 100, "it grows: {seen:?}");
    assert!(
        !up.service().server("app/2").reason.as_ref().is_some_and(|reason| reason.contains("slow start"))
    );
    // What it shows is what it is now; the kernel is told a moment later.
    wait_until_eq("the shares", seconds(10.0), [10, 10], || {
        let shares = by_name(&client::hold(V4, 20), ["1", "2"]);
        up.wait_connections(&[0, 0]);
        shares
    });
    up.stop();
}

#[test]
fn a_backup_serves_while_nobody_else_is_ready() {
    let host = Host::new();
    let servers = [("main", String::new()), ("spare", "backup = true".to_owned())];
    let chosen = Chosen::of(&host, 0);
    let up = host.up(&chosen.app.clone().named(servers));
    let spare = up.service().server("app/spare").clone();
    assert_eq!((spare.state.as_str(), spare.effective_weight), ("ready", 0));
    assert_eq!(spare.reason.as_deref(), Some("backup: gets connections when no other server is ready"));
    assert_eq!(by_name(&client::hold(V4, 10), ["main", "spare"]), [10, 0]);
    let old = up.process("app/main");
    chosen.set_held(true);
    old.kill(seconds(5.0));
    wait_until_eq("the spare one's weight", seconds(10.0), 100, || {
        up.service().server("app/spare").effective_weight
    });
    let mut held = client::hold(V4, 10);
    assert_eq!(by_name(&held, ["main", "spare"]), [0, 10]);
    chosen.set_held(false);
    wait_next(&up, "app/main", old);
    assert_eq!(by_name(&client::hold(V4, 10), ["main", "spare"]), [10, 0]);
    assert!(held.iter_mut().all(Client::is_served), "it keeps what it has");
    up.stop();
}
