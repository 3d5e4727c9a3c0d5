//! Instances that have lived long enough, or have grown too large, are replaced while clients come.

#![forbid(unsafe_code)]

use std::{fs, process::Command};

use tests::{
    app::{App, Chosen},
    client::{self, Client},
    host::{Host, Up, V4},
    load::under_load,
    process::Process,
    status::{Life, Server, Service},
    wait::{seconds, stays, wait_for, wait_until_eq},
};

fn instances(up: &Up<'_>) -> Vec<u64> {
    let current = |server: &&Server| !server.name.contains('@');
    up.service().servers.iter().filter(current).map(|server| server.instance).collect()
}

#[track_caller]
fn life(up: &Up<'_>, server: &str) -> Life {
    up.service().server(server).life.clone().expect("it lives")
}

/// Never more than so many instances, and all servers serve.
fn most_and_fewest(service: &Service, servers: usize) {
    assert!(service.servers.len() <= servers + 1, "{service:#?}");
    let ready = service.servers.iter().filter(|server| server.state == "ready").count();
    assert!(ready >= servers, "{service:#?}");
}

#[test]
fn instances_that_are_old_are_replaced_one_after_the_other() {
    let host = Host::new();
    let server = "max_age = \"3s\"\njitter = \"50%\"\n".to_owned();
    let up = host.up(&App { server, ..App::of(&host, 2) }.refusing());
    let first = life(&up, "app/1");
    assert!(first.until.is_some() && first.max_connections.is_none() && first.memory.is_none(), "{first:?}");
    under_load(2, |_| {
        wait_for("each to be replaced twice", seconds(40.0), || {
            most_and_fewest(&up.service(), 2);
            instances(&up).iter().all(|instance| *instance >= 3).then_some(())
        });
    });
    let roll = up.service().roll.expect("a restart");
    assert!(!roll.asked, "{roll:?}");
    let log = up.log();
    for server in ["app/1", "app/2"] {
        let said =
            log.lines().filter(|line| line.contains(&format!("server {server} has reached its age of ")));
        assert!(said.count() >= 2, "{log}");
    }
    assert_eq!(up.service().outcomes(["refused_limit", "refused_capacity", "refused_no_room"]), [0; 3]);
}

#[test]
fn an_instance_that_has_had_its_connections_is_replaced_and_the_next_one_counts_anew() {
    let host = Host::new();
    let server = "max_connections = 30\njitter = 0\n".to_owned();
    // By turns, whatever has been closed of those before.
    let policy = Some("weighted-round-robin");
    let up = host.up(&App { server, policy, ..App::of(&host, 2) });
    for _ in 0..50 {
        drop(Client::open(V4).expect("served"));
    }
    assert_eq!((life(&up, "app/1").connections, life(&up, "app/1").max_connections), (25, Some(30)));
    assert_eq!(instances(&up), [1, 1]);
    for _ in 0..12 {
        drop(Client::open(V4).expect("served"));
    }
    wait_until_eq("the instances", seconds(20.0), vec![2, 2], || instances(&up));
    // Some may have come while it was seen and while it was replaced.
    assert!(life(&up, "app/1").connections <= 6, "{:?}", life(&up, "app/1"));
    let log = up.log();
    let says = |line: &str| {
        line.contains("server app/1 has had 3") && line.ends_with(" of 30: it is to be replaced")
    };
    assert!(log.lines().any(says), "{log}");
    wait_until_eq("all that they have had", seconds(10.0), 62, || up.service().totals().iter().sum::<u64>());
}

#[test]
fn an_instance_that_holds_too_much_memory_is_replaced_and_its_clients_are_not_cut_off() {
    let host = Host::new();
    let server = "memory_limit = \"96MiB\"\ndrain_timeout = \"60s\"\n".to_owned();
    let up = host.up(&App { server, ..App::of(&host, 2) });
    let before = [up.process("app/1"), up.process("app/2")];
    wait_for("what it holds", seconds(10.0), || {
        life(&up, "app/1").memory.filter(|memory| (1..96 << 20).contains(memory))
    });
    assert_eq!(life(&up, "app/1").memory_limit, Some(96 << 20));
    // By the kernel's account, if the machine lets it have one.
    let controllers = fs::read_to_string(up.cgroup().join("cgroup.controllers")).expect("read a file");
    let has_one = controllers.split_whitespace().any(|controller| controller == "memory");
    assert_eq!(up.cgroup().join("app/1.1/memory.current").exists(), has_one);
    let mut held = client::hold(V4, 2);
    let place = held.iter().position(|client| client.pid == before[0].pid).expect("one of app/1");
    held[place].say("grow 128").expect("tell it");
    wait_until_eq("the instances", seconds(20.0), vec![2, 1], || instances(&up));
    assert!(held.iter_mut().all(Client::is_served), "it drains");
    let log = up.log();
    let said =
        log.lines().find(|line| line.contains("server app/1 holds ")).unwrap_or_else(|| panic!("{log}"));
    assert!(said.contains(" above its memory_limit of 96.0 MiB: it is to be replaced"), "{said}");
    let roll = up.service().roll.expect("a restart");
    assert!(roll.servers[0].reason.as_ref().is_some_and(|why| why.starts_with("holds ")), "{roll:?}");
    drop(held);
    wait_for("its end", seconds(10.0), || (!before[0].runs()).then_some(()));
    assert_eq!(up.process("app/2"), before[1]);
}

#[test]
fn what_is_due_serves_on_while_its_successors_fail_and_that_is_not_tried_all_the_time() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 1);
    let up = host.up(&App { server: "max_age = \"5s\"\njitter = 0\n".into(), ..chosen.app.clone() });
    chosen.set_broken(true);
    let server: Process = up.process("app/1");
    let failed = |up: &Up<'_>| up.service().roll.filter(|roll| roll.state == "failed");
    let roll = wait_for("it to fail", seconds(20.0), || failed(&up));
    let why = roll.reason.expect("a reason");
    assert!(why.contains("app/1: the new instance exited with 3") && !roll.asked, "{why}");
    up.replace_distributor();
    assert_eq!(failed(&up).expect("it is known").number, roll.number);
    // It would be tried every second.
    stays("the last try", seconds(3.0), roll.number, || failed(&up).expect("it is known").number);
    assert_eq!(instances(&up), [1]);
    assert_eq!(up.process("app/1"), server);
    let reason = up.service().server("app/1").reason.clone().expect("a reason");
    assert!(reason.contains("was not replaced ") && reason.contains("exited with 3"), "{reason}");
    // Somebody need not wait for that.
    chosen.set_broken(false);
    let mut restart: Command = up.command(&["restart"]);
    tests::command::run(&mut restart, seconds(20.0)).expect_done();
    assert_ne!(up.process("app/1"), server);
}

#[test]
fn a_drained_server_is_left_alone_until_it_is_resumed() {
    let host = Host::new();
    let up = host.up(&App { server: "max_age = \"5s\"\njitter = 0\n".into(), ..App::of(&host, 2) });
    up.run(&["drain", "app/2"]).expect_done();
    wait_for("the other one to be replaced twice", seconds(40.0), || (instances(&up)[0] >= 3).then_some(()));
    assert_eq!(instances(&up)[1], 1);
    up.run(&["resume", "app/2"]).expect_done();
    wait_for("it to be replaced", seconds(20.0), || (instances(&up)[1] >= 2).then_some(()));
}
