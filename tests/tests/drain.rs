//! An operator takes a server out while it runs, and puts it back.

#![forbid(unsafe_code)]

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4, V6},
    process::Signal,
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// So many connections of each server.
fn by_name(clients: &[Client]) -> Vec<(String, usize)> {
    client::by_name(clients).into_iter().collect()
}

/// The connections of one server, out of those that are held.
fn of(server: &str, held: &mut Vec<Client>) -> Vec<Client> {
    let (its, others) = held.drain(..).partition(|client| client.server == server);
    *held = others;
    its
}

#[track_caller]
fn reason(up: &Up<'_>, server: &str) -> String {
    up.service().server(server).reason.clone().expect("a reason")
}

#[test]
fn a_drained_server_gets_nothing_new_and_keeps_what_it_has_until_it_is_resumed() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let mut held = client::hold(V4, 4);
    let server = up.process("app/1");
    up.run(&["drain", "app/1"]).expect_done();
    let drained = up.service().server("app/1").clone();
    assert_eq!((drained.state.as_str(), drained.effective_weight, drained.weight), ("draining", 0, 100));
    let drain = drained.drain.expect("it is drained");
    assert_eq!((drain.then.as_str(), drain.seconds_left), ("leave", None));
    let expected = "drained by an operator; has 2 connections; resume it to put it back";
    assert_eq!(drained.reason.as_deref(), Some(expected));
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("drained by an operator"), "{table}");

    let more = client::hold(V4, 6);
    assert_eq!(by_name(&more), [("2".to_owned(), 6)]);
    assert!(held.iter_mut().all(Client::is_served));
    drop(of("1", &mut held));
    wait_until_eq("reason", seconds(10.0), expected.replace("2 connections", "no connections"), || {
        reason(&up, "app/1")
    });
    // It is told in whole seconds.
    stays("its state", seconds(1.1), "draining".to_owned(), || up.service().server("app/1").state.clone());
    up.run(&["resume", "app/1"]).expect_done();
    let resumed = up.service().server("app/1").clone();
    assert!(resumed.since > drained.since, "{resumed:?}");
    assert_eq!((resumed.state.as_str(), resumed.effective_weight, resumed.drain), ("ready", 100, None));
    assert_eq!(by_name(&client::hold(V4, 4)), [("1".to_owned(), 4)]);
    assert_eq!((up.process("app/1"), resumed.restarts), (server, 0));
}

#[test]
fn who_waits_for_a_drain_is_told_when_the_last_connection_has_ended() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let held = client::hold(V4, 2);
    thread::scope(|scope| {
        let waits = scope.spawn(|| up.run(&["drain", "app/1", "--wait"]));
        up.wait_state("app/1", "draining");
        stays("it waits", Duration::from_millis(500), false, || waits.is_finished());
        drop(held);
        waits.join().expect("no panic").expect_done();
    });
    assert_eq!(up.connections(), [0]);
}

#[test]
fn what_is_left_at_the_deadline_goes_on_unless_it_is_to_be_closed() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let mut held = client::hold(V4, 2);
    held.extend(client::hold(V6, 2));
    let (first, second) = (up.process("app/1"), up.process("app/2"));
    let ended = up.run(&["drain", "app/1", "--timeout", "300ms", "--wait"]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("drain app/1: it still has 2 connections"), "{ended}");
    assert!(held.iter_mut().all(Client::is_served));
    assert!(
        reason(&up, "app/1").contains("still has 2 connections, which may go on"),
        "{}",
        reason(&up, "app/1")
    );

    up.run(&["drain", "app/1", "--timeout", "300ms", "--then", "close", "--wait"]).expect_done();
    for mut client in of("1", &mut held) {
        let error = client.wait_for_end().expect_err("it is no orderly end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    assert!(held.iter_mut().all(Client::is_served));
    up.wait_connections(&[0, 2]);
    assert_eq!((up.process("app/1"), up.process("app/2")), (first, second));
    let log = up.log();
    assert!(
        log.contains("server app/1: the time of its connections is over: 2 connections were reset"),
        "{log}"
    );
    // It was only ever taken out.
    up.run(&["resume", "app/1"]).expect_done();
    assert_eq!(by_name(&client::hold(V4, 2)), [("1".to_owned(), 2)]);
}

#[test]
fn a_connection_that_had_waited_is_closed_too() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.limit = Some(1);
    let up = host.up(&app);
    let first = Client::open(V4).expect("connect");
    let second = client::connect(V4).expect("a place in the room");
    wait_until_eq("those who wait", seconds(5.0), 1, || up.service().waiting.now);
    drop(first);
    let mut second = Client::greeted(second).expect("served");
    assert_eq!(up.service().waiting.served, 1);
    up.run(&["drain", "app/1", "--timeout", "0s", "--then", "close", "--wait"]).expect_done();
    let error = second.wait_for_end().expect_err("it is no orderly end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    up.wait_connections(&[0]);
}

#[test]
fn a_server_that_fails_while_it_is_drained_is_started_again_and_stays_drained() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    up.run(&["drain", "app/1"]).expect_done();
    let victim = up.process("app/1");
    victim.kill(seconds(5.0));
    wait_for("the next instance", seconds(10.0), || {
        up.process_if_any("app/1").filter(|process| *process != victim)
    });
    up.wait_state("app/1", "draining");
    assert_eq!(up.service().server("app/1").restarts, 1);
    assert!(reason(&up, "app/1").contains("was killed by SIGKILL"), "{}", reason(&up, "app/1"));
    assert_eq!(by_name(&client::hold(V4, 4)), [("2".to_owned(), 4)]);
}

#[test]
fn a_drain_outlives_distributor_and_monitor_and_keeps_its_deadline() {
    let host = Host::new();
    let app = App::of(&host, 2);
    let up = host.up(&app);
    let held = client::hold(V4, 2);
    up.run(&["drain", "app/1", "--timeout", "100s", "--then", "close"]).expect_done();
    let since = up.service().server("app/1").since.clone();
    let check = |up: &Up<'_>| {
        let server = up.service().server("app/1").clone();
        assert_eq!((server.state.as_str(), &server.since), ("draining", &since), "{server:#?}");
        let drain = server.drain.expect("it is drained");
        assert_eq!(drain.then, "close");
        assert!(drain.seconds_left.is_some_and(|left| left > 1.0 && left < 100.0), "{drain:?}");
        assert_eq!(by_name(&client::hold(V4, 2)), [("2".to_owned(), 2)]);
    };
    up.kill_distributor();
    check(&up);

    let distributor = up.distributor();
    up.signal(Signal::KILL);
    wait_for("the distributor to end too", seconds(10.0), || (!distributor.runs()).then_some(()));
    up.forget();
    let up = host.start(&app);
    check(&up);
    assert_eq!(held.len(), 2);
}

#[test]
fn who_finds_all_servers_drained_waits_until_one_is_resumed() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    up.run(&["drain", "app/1"]).expect_done();
    let waits = client::connect(V4).expect("a place in the room");
    wait_until_eq("those who wait", seconds(5.0), 1, || up.service().waiting.now);
    assert_eq!(up.service().outcome("wait_no_server"), 1);
    up.run(&["resume", "app/1"]).expect_done();
    Client::greeted(waits).expect("served");
}

#[test]
fn a_drained_server_is_stopped_like_the_others() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    up.run(&["drain", "app/1", "--timeout", "60s"]).expect_done();
    up.stop();
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    for (words, sentence) in [
        (vec!["drain", "app/9"], "no server is called app/9, but these are: app/1"),
        (vec!["drain", "app/1", "--then", "close"], "--then close needs a --timeout"),
        (vec!["drain", "app/1", "--timeout", "30"], "\"30\" has no unit, write \"30s\""),
        (vec!["drain", "app/1", "--then", "kill"], "write leave or close"),
        (vec!["drain", "app"], "write SERVICE/SERVER"),
    ] {
        let ended = up.run(&words);
        assert_eq!(ended.code, Some(2), "{words:?}: {ended}");
        assert!(ended.stderr.contains(sentence), "{words:?}: {ended}");
    }
    let asked = r#"{"command":"drain","server":"app/1","then":"close"}"#;
    let mut control = UnixStream::connect(up.control_socket()).expect("connect");
    writeln!(control, "{asked}").expect("ask");
    let mut answer = String::new();
    BufReader::new(control).read_line(&mut answer).expect("an answer");
    assert!(answer.contains("needs timeout_seconds") && answer.contains("input"), "{answer}");
    assert_eq!(up.service().states(), ["ready"]);
}
