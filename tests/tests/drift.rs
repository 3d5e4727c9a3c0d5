//! Counts are compared with the sockets there are: what is wrong is found and repaired, and what
//! is right is left alone.
//!
//! A test makes a count wrong in the kernel's map, as a program that was missed would have done.

#![forbid(unsafe_code)]

use std::{
    io::ErrorKind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use tests::{
    app::App,
    client::{self, Client, Ending, Line},
    counts::Counts,
    host::{Host, Up, V4, V6},
    status::Drift,
    wait::{lasting, seconds, stays, wait_for, wait_until_eq},
};

/// Brings it up with checks that follow each other at this interval.
#[track_caller]
fn up<'h>(host: &'h Host, app: &App, interval: &str) -> Up<'h> {
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_CHECK_COUNTS", interval);
    let up = host.start_command(command);
    up.wait_ready();
    up
}

fn limited(host: &Host, servers: usize, limit: u32) -> App {
    App { limit: Some(limit), ..App::of(host, servers) }
}

fn drift(up: &Up<'_>) -> Drift {
    up.service().drift
}

/// Waits until so many counts were repaired, and nothing else was found.
#[track_caller]
fn wait_repaired(up: &Up<'_>, times: u64) {
    wait_until_eq("what was found and repaired", seconds(20.0), (times, times), || {
        let drift = drift(up);
        (drift.found, drift.repaired)
    });
}

/// Waits until so many more checks are done.
#[track_caller]
fn wait_checks(up: &Up<'_>, more: u64) {
    let until = drift(up).checks + more;
    wait_for("more checks", seconds(20.0), || (drift(up).checks >= until).then_some(()));
}

#[track_caller]
fn assert_logged(up: &Up<'_>, sentence: &str) {
    let log = up.log();
    assert!(log.contains(sentence), "the log has no {sentence:?}:\n{log}");
}

#[track_caller]
fn assert_refused() {
    let error = client::connect(V4).expect_err("every place is taken");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_count_that_is_too_high_is_found_and_repaired_and_the_limit_is_exact_again() {
    let host = Host::new();
    let up = up(&host, &limited(&host, 1, 5).refusing(), &lasting(1.0));
    let mut held = client::hold(V4, 3);
    wait_checks(&up, 3);
    assert_eq!((drift(&up).found, drift(&up).unavailable), (0, None));

    Counts::of(&up).add_to_slot_with(3, 2);
    assert_eq!(up.connections(), [5]);
    wait_repaired(&up, 1);
    // What was found is known after the distributor that found it.
    let (old, checks) = (up.distributor(), drift(&up).checks);
    old.kill(seconds(5.0));
    up.wait_next_distributor(old);
    assert!(drift(&up).checks >= checks);
    wait_repaired(&up, 1);

    assert_eq!(up.connections(), [3]);
    assert_logged(&up, "service app: server app/1 counted 5 connections, the kernel has 3: repaired");
    held.extend(client::hold(V6, 2));
    assert_refused();
    drop(held);
    up.wait_connections(&[0]);
}

#[test]
fn a_wrong_count_of_the_service_is_found_and_repaired_and_its_limit_is_exact_again() {
    let host = Host::new();
    let tables = "[service.app.limits]\nconnections = 4\nover = \"wait\"".to_owned();
    let up = up(&host, &App { tables, ..App::of(&host, 2) }, &lasting(0.3));
    let held = client::hold(V4, 4);
    let mut line = Line::behind(held, client::stand(&[V4], 4)).expect("stand in line");
    assert_eq!(line.turns(2).expect("each is served"), [0, 1]);
    wait_checks(&up, 3);
    assert_eq!(drift(&up).found, 0);
    // Two of those who wait are let in above the limit, for as long as the count is wrong.
    Counts::of(&up).add_to_service(-2);
    let mut next = [(); 2].map(|()| line.serve().expect("it is served"));
    // By two servers at once.
    next.sort();
    assert_eq!(next, [2, 3]);
    wait_repaired(&up, 1);
    assert_logged(&up, "service app: 4 connections counted for its limit, the kernel has 6: repaired");
    assert_eq!(up.service().limits().connections, Some(6));
    // And one that is too high lets nobody in who has a place.
    (0..3).for_each(|_| line.free());
    wait_until_eq("the service's", seconds(5.0), Some(3), || up.service().limits().connections);
    Counts::of(&up).add_to_service(1);
    let waits = client::connect(V4).expect("it may wait");
    wait_repaired(&up, 2);
    drop((Client::greeted(waits).expect("it is served"), line));
    up.wait_connections(&[0, 0]);
}

#[test]
fn a_count_that_is_too_low_is_found_and_repaired_and_the_limit_is_exact_again() {
    let host = Host::new();
    let up = up(&host, &limited(&host, 1, 5).refusing(), &lasting(1.0));
    let held = [client::hold(V4, 3), client::hold(V6, 2)];

    Counts::of(&up).add_to_slot_with(5, -5);
    assert_eq!(up.connections(), [0]);
    wait_repaired(&up, 1);

    assert_eq!(up.connections(), [5]);
    assert_logged(&up, "service app: server app/1 counted 0 connections, the kernel has 5: repaired");
    assert_refused();
    drop(held);
    up.wait_connections(&[0]);
    // An idle service is not checked.
    let one = client::hold(V4, 1);
    wait_checks(&up, 1);
    assert_eq!(drift(&up).found, 1);
    drop(one);
}

#[test]
fn a_wrong_number_of_those_who_wait_is_found_and_repaired() {
    let host = Host::new();
    let up = up(&host, &limited(&host, 1, 1), "100ms");
    let held = client::hold(V4, 1);
    let waiting = client::stand(&[V4, V6], 4);
    let now = || up.service().waiting.now;
    wait_until_eq("those who wait", seconds(5.0), 4, now);
    for (times, by, sentence) in [
        (1, 3, "service app: 7 connections counted that wait, the kernel has 4: repaired"),
        (2, -4, "service app: 0 connections counted that wait, the kernel has 4: repaired"),
    ] {
        Counts::of(&up).add_to_waiting(by);
        wait_repaired(&up, times);
        assert_eq!(now(), 4);
        assert_logged(&up, sentence);
    }
    drop(held);
    for stream in waiting {
        Client::greeted(stream).expect("everybody is served");
    }
    wait_until_eq("those who wait", seconds(5.0), 0, now);
    up.wait_connections(&[0]);
}

#[test]
fn whoever_waits_gets_the_place_that_a_repair_frees() {
    let host = Host::new();
    let up = up(&host, &limited(&host, 1, 2), &lasting(1.0));
    let held = client::hold(V4, 1);
    Counts::of(&up).add_to_slot_with(1, 1);
    let waiting = client::connect(V4).expect("it waits");
    wait_until_eq("those who wait", seconds(5.0), 1, || up.service().waiting.now);

    Client::greeted(waiting).expect("it is served");

    let service = up.service();
    assert_eq!((service.drift.repaired, service.outcome("handed_over")), (1, 1));
    drop(held);
    up.wait_connections(&[0]);
}

/// Connections wait, are handed over, move when a server dies, and end in every way, while the
/// counts are compared without a pause.
#[test]
fn nothing_is_found_wrong_while_connections_come_go_wait_and_move() {
    const THREADS: usize = 16;
    let host = Host::new();
    let up = up(&host, &limited(&host, 3, 4), "10ms");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let is_over = &is_over;
            scope.spawn(move || {
                for number in thread.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let ending = Ending::ALL[number % Ending::ALL.len()];
                    // A server's death ends what it had accepted.
                    let _ = ending.happen(if number % 2 == 0 { V4 } else { V6 });
                }
            });
        }
        for round in 1..=4 {
            wait_checks(&up, 15);
            let server = format!("app/{}", round % 3 + 1);
            if let Some(process) = up.process_if_any(&server) {
                process.kill(seconds(5.0));
            }
            up.wait_ready();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    up.wait_connections(&[0; 3]);
    wait_until_eq("those who wait", seconds(5.0), 0, || up.service().waiting.now);
    let service = up.service();
    assert!(service.drift.checks >= 60, "{:?}", service.drift);
    assert_eq!((service.drift.found, &service.drift.unavailable), (0, &None), "{}", up.log());
    let [handed_over, moved, parked] = service.outcomes(["handed_over", "moved", "parked"]);
    assert!(handed_over > 100 && moved + parked > 0, "{:?}", service.outcomes);
}

/// Nothing is asked of the kernel while nothing is open.
#[test]
fn an_idle_service_is_not_checked() {
    let host = Host::new();
    let up = up(&host, &App::of(&host, 1), "50ms");
    let held = client::hold(V4, 1);
    wait_checks(&up, 2);
    drop(held);
    up.wait_connections(&[0]);
    let mut last = 0;
    wait_for("the last check", seconds(10.0), || {
        let checks = drift(&up).checks;
        thread::sleep(Duration::from_millis(300));
        (std::mem::replace(&mut last, checks) == checks).then_some(())
    });
    stays("the number of checks", seconds(0.5), last, || drift(&up).checks);
    assert!(drift(&up).last_seconds_ago.is_some_and(|seconds| seconds > 0.5));
}

#[test]
fn an_interval_that_is_none_is_refused() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 1).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_CHECK_COUNTS", "often");
    let ended = tests::command::run(&mut command, seconds(20.0));
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("DIST_CTL_CHECK_COUNTS: \"often\" is no duration"), "{ended}");
}
