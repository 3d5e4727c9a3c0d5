//! Servers are kept running: from start to ready, through failures, to their end.

#![forbid(unsafe_code)]

use std::{
    fs,
    time::{Duration, Instant},
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4},
    process::{self, Process, Signal},
    wait::{lasting, seconds, stays, wait_for, wait_until_eq},
};

#[test]
fn a_killed_server_is_started_again_and_its_end_is_told() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let victim = up.process("app/1");
    victim.kill(seconds(5.0));
    wait_for("the next instance", seconds(10.0), || {
        up.process_if_any("app/1").filter(|process| *process != victim)
    });
    up.wait_ready();
    let service = up.service();
    assert_eq!((service.server("app/1").restarts, service.server("app/2").restarts), (1, 0));
    let reason = service.server("app/1").reason.as_deref().expect("what became of the one before");
    assert!(reason.contains("was killed by SIGKILL after"), "{reason}");
    assert_eq!(service.server("app/2").reason, None);
    let log = up.log();
    assert!(log.contains("server app/1 was killed by SIGKILL"), "{log}");
    let held = client::hold(V4, 4);
    assert_eq!(client::by_name(&held), [("1".to_owned(), 2), ("2".to_owned(), 2)].into());
}

#[test]
fn a_server_that_exits_at_once_is_retried_with_growing_delays_and_given_up() {
    let host = Host::new();
    let output = host.path_text("output");
    let mut app = App::with(&host, 1, &["--print", "started", "--exit", "7"]);
    app.server = format!(
        "output = \"{output}\"\nrestart = {{ delay = \"200ms\", max_delay = \"400ms\", give_up_after = 4 }}"
    );
    let start = Instant::now();
    let up = host.start(&app);
    let failed = up.wait_state("app/1", "failed");
    // 200, 400 and 400 ms, less a quarter at most.
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis(750), "given up after {taken:?}");
    let reason = failed.reason.expect("a reason");
    assert!(reason.contains("exited with 7") && reason.contains("4 failures in a row"), "{reason}");
    assert!(reason.contains("resume"), "it says what to do: {reason}");
    assert_eq!((failed.pid, failed.restarts), (None, 3));
    let starts = || fs::read_to_string(&output).expect("the servers' output").matches("out started").count();
    assert_eq!(starts(), 4);
    stays("starts", Duration::from_millis(700), 4, starts);
    // A person may have it tried again.
    up.run(&["resume", "app/1"]).expect_done();
    wait_until_eq("starts", seconds(5.0), 8, starts);
    up.wait_state("app/1", "failed");
    let log = up.log();
    assert!(log.contains("server app/1 exited with 7") && log.contains("next start in"), "{log}");
}

#[test]
fn a_healthy_run_forgives_the_failures_before_it() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server = "restart = { delay = \"10ms\", give_up_after = 2, healthy_after = \"150ms\" }".to_owned();
    let up = host.up(&app);
    for _ in 0..4 {
        let victim = up.process("app/1");
        // Until its run counts as healthy; nothing shows that moment.
        stays("state", Duration::from_millis(300), "ready".to_owned(), || {
            up.service().server("app/1").state.clone()
        });
        victim.kill(seconds(5.0));
        wait_for("the next instance", seconds(5.0), || {
            up.process_if_any("app/1").filter(|process| *process != victim)
        });
        up.wait_ready();
    }
    assert_eq!(up.service().server("app/1").restarts, 4);
}

#[test]
fn failures_in_a_row_are_not_forgiven() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server = "restart = { delay = \"10ms\", give_up_after = 2, healthy_after = \"60s\" }".to_owned();
    let up = host.up(&app);
    up.process("app/1").kill(seconds(5.0));
    up.wait_state("app/1", "ready");
    wait_for("the second instance", seconds(5.0), || up.process_if_any("app/1")).kill(seconds(5.0));
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("SIGKILL"), "{reason}");
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    let host = Host::new();
    let mut app = App::running(1, vec!["/no/such/program".to_owned()]);
    app.server = "restart = { delay = \"10ms\", give_up_after = 2 }".to_owned();
    let up = host.start(&app);
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("/no/such/program") && reason.contains("No such file"), "{reason}");
}

#[test]
fn a_directory_that_does_not_exist_is_named() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server =
        "directory = \"/no/such/place\"\nrestart = { delay = \"10ms\", give_up_after = 2 }".to_owned();
    let up = host.start(&app);
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("/no/such/place") && reason.contains("No such file"), "{reason}");
}

#[test]
fn a_server_that_never_listens_is_given_its_time_and_no_more() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--never-listen"]);
    app.server =
        format!("start_timeout = \"{}\"\nrestart = {{ delay = \"10ms\", give_up_after = 2 }}", lasting(3.0));
    let up = host.start(&app);
    wait_for("a reason while it starts", seconds(5.0), || {
        let reason = up.service().server("app/1").reason.clone()?;
        (reason == "waits for a listener on [::]:8080").then_some(())
    });
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(
        reason.contains(&format!("was not ready after {:.0?}", seconds(3.0))) && reason.contains("[::]:8080"),
        "{reason}"
    );
}

#[test]
fn a_server_that_said_nothing_yet_gets_no_connection() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--ready-on-signal"]);
    app.server = "readiness = \"notify\"".to_owned();
    let up = host.start(&app);
    wait_for("both to listen", seconds(5.0), || (up.service().outcome("listening") >= 2).then_some(()));
    wait_for("a reason that says what is missing", seconds(5.0), || {
        up.service()
            .servers
            .iter()
            .all(|server| server.reason.as_deref().is_some_and(|r| r.contains("READY=1")))
            .then_some(())
    });
    let first = client::connect(V4).expect("a place in the room");
    let service = up.service();
    assert_eq!(service.states(), ["starting", "starting"]);
    assert_eq!(service.outcomes(["wait_no_server", "selected"]), [1, 0]);
    up.process("app/2").signal(Signal::USR2);
    up.wait_state("app/2", "ready");
    assert_eq!(Client::greeted(first).expect("served").server, "2");
    let held = client::hold(V4, 5);
    assert!(held.iter().all(|client| client.server == "2"));
    up.process("app/1").signal(Signal::USR2);
    up.wait_ready();
    assert_eq!(Client::open(V4).expect("connect").server, "1");
}

#[test]
fn a_daemon_is_supervised_though_its_first_process_is_gone() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--daemonise"]);
    app.server = "restart = { delay = \"10ms\", healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let held = client::hold(V4, 10);
    assert_eq!(up.connections(), [5, 5]);
    let pid = held.iter().find(|client| client.server == "1").expect("one of the first server").pid;
    let daemon = Process::find(pid).expect("the daemon runs");
    drop(held);
    daemon.kill(seconds(5.0));
    wait_for("another daemon", seconds(5.0), || {
        let client = Client::open(V4).ok()?;
        (client.server == "1" && client.pid != pid).then_some(())
    });
    assert_eq!(up.service().server("app/1").restarts, 1);
}

#[test]
fn a_server_that_closes_its_listener_gets_nothing_more_and_keeps_what_it_has() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--closable"]);
    app.server = "start_timeout = \"20s\"".to_owned();
    let up = host.up(&app);
    let mut held = client::hold(V4, 10);
    up.process("app/1").signal(Signal::USR1);
    let server = up.wait_state("app/1", "starting");
    assert!(server.reason.expect("a reason").contains("has no listener on [::]:8080"));
    let more = client::hold(V4, 10);
    assert_eq!(client::by_name(&more), [("2".to_owned(), 10)].into());
    assert!(held.iter_mut().all(Client::is_served));
    assert_eq!(up.connections(), [5, 15]);
    assert_eq!(up.service().outcomes(["wait_no_server", "wait_select_failed"]), [0, 0]);
}

#[test]
fn a_server_that_ignores_the_signal_is_killed_with_all_it_started() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ignore-term", "--child"]);
    app.server = "stop_timeout = \"500ms\"".to_owned();
    let up = host.up(&app);
    let server = up.process("app/1");
    let mut all = process::in_cgroup(&up.cgroup().join("app"));
    // The keeper of the rooms is there too.
    all.retain(|process| process.arguments().get(1).is_none_or(|word| word != "keep"));
    assert_eq!(all.len(), 2, "the server and its child");
    let start = Instant::now();
    up.signal(Signal::TERM);
    stays("the server runs", Duration::from_millis(300), true, || server.runs());
    assert!(up.has_stopped().success());
    assert!(start.elapsed() < seconds(9.0), "it took {:?}", start.elapsed());
    assert!(all.iter().all(|process| !process.runs()));
}

#[test]
fn a_server_gets_the_signal_that_it_understands() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ignore-term"]);
    app.server = format!("stop_signal = \"INT\"\nstop_timeout = \"{}\"", lasting(60.0));
    let up = host.up(&app);
    let start = Instant::now();
    up.signal(Signal::TERM);
    assert!(up.has_stopped().success());
    assert!(start.elapsed() < seconds(15.0), "it took {:?}", start.elapsed());
}

#[test]
fn connections_have_their_time_before_their_server_is_stopped() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server = format!("drain_timeout = \"{}\"", lasting(3.0));
    let up = host.up(&app);
    let mut held = Client::open(V4).expect("connect");
    let start = Instant::now();
    up.signal(Signal::TERM);
    up.wait_state("app/1", "draining");
    assert!(held.is_served());
    // The client does not go, and is cut off in the end.
    let _ = held.wait_for_end();
    let taken = start.elapsed();
    assert!(taken >= seconds(2.5), "cut off after {taken:?}");
    assert!(up.has_stopped().success());
}

#[test]
fn a_second_signal_hurries() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ignore-term"]);
    app.server = "drain_timeout = \"60s\"\nstop_timeout = \"60s\"".to_owned();
    let up = host.up(&app);
    let held = Client::open(V4).expect("connect");
    up.signal(Signal::TERM);
    up.wait_state("app/1", "draining");
    up.signal(Signal::INT);
    // Said again and again, it comes to the end of everybody's patience.
    wait_for("the end", seconds(5.0), || {
        up.signal(Signal::INT);
        up.exited()
    });
    drop(held);
    assert!(up.has_stopped().success());
}

#[test]
fn output_goes_to_the_files_it_is_meant_for() {
    let host = Host::new();
    let output = host.path_text("output-{name}");
    let errors = host.path_text("errors-{service}-{index}");
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--print", "hello from {name}"]);
    app.server = format!("output = \"{output}\"\nerrors = \"{errors}\"\nrestart = {{ delay = \"10ms\" }}");
    let up = host.up(&app);
    let read = |name: &str| fs::read_to_string(host.path(name)).unwrap_or_default();
    for name in ["1", "2"] {
        assert_eq!(read(&format!("output-{name}")), format!("out hello from {name}\n"));
        assert_eq!(read(&format!("errors-app-{name}")), format!("err hello from {name}\n"));
    }
    // The next instance goes on where the last one ended.
    up.process("app/1").kill(seconds(5.0));
    wait_until_eq("output", seconds(5.0), "out hello from 1\nout hello from 1\n".to_owned(), || {
        read("output-1")
    });
    up.wait_ready();
}

#[test]
fn output_is_inherited_otherwise() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 1, &["--listen", "[::]:8080", "--print", "hello"]));
    assert!(up.printed().contains("out hello\n"), "{}", up.printed());
    assert!(up.log().contains("err hello\n"), "{}", up.log());
}

#[test]
fn exits_of_processes_that_are_no_servers_are_nobodys_business() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 1, &["--listen", "[::]:8080", "--child"]));
    let server = up.process("app/1");
    let child = server.children()[0];
    child.kill(seconds(5.0));
    Client::open(V4).expect("it serves");
    assert_eq!(up.process("app/1"), server);
    assert_eq!(up.service().server("app/1").restarts, 0);
}
