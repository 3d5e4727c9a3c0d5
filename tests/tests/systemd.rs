//! dist-ctl tells the service manager that started it how it is.

#![forbid(unsafe_code)]

use std::{process::Command, time::Duration};

use tests::{
    app::App,
    host::{Host, Up},
    manager::{Manager, Said},
    process::Signal,
    wait::{seconds, stays, wait_for},
};

/// The command of `dist-ctl up`, as systemd would run it.
fn command(host: &Host, app: &App, notify_socket: &str) -> Command {
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("NOTIFY_SOCKET", notify_socket);
    command
}

fn says(said: &[Said], word: &str) -> usize {
    said.iter().filter(|said| said.words.iter().any(|its| its == word)).count()
}

/// All of it was said in the monitor's name, whom systemd takes for dist-ctl.
#[track_caller]
fn assert_from_monitor(up: &Up<'_>, said: &[Said]) {
    let monitor = up.monitor().pid;
    assert!(said.iter().all(|said| said.pid == monitor), "not all by {monitor}: {said:#?}");
}

#[test]
fn the_manager_is_told_when_all_serve_and_how_many_and_when_it_stops() {
    let host = Host::new();
    let path = host.path("manager");
    let manager = Manager::at(&path);
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--ready-on-signal"]);
    app.server = "readiness = \"notify\"".to_owned();
    let up = host.start_command(command(&host, &app, &host.path_text("manager")));
    wait_for("both to listen", seconds(10.0), || (up.service().outcome("listening") >= 2).then_some(()));
    let mut said = manager.wait_for("STATUS=2 servers, 0 ready, 0 waiting");
    assert_eq!(says(&said, "READY=1"), 0, "nobody serves yet: {said:#?}");
    let environment = up.process("app/1").environment();
    assert_ne!(environment["NOTIFY_SOCKET"], host.path_text("manager"), "a server is no part of the unit");

    up.process("app/1").signal(Signal::USR2);
    let ready = manager.wait_for("READY=1");
    let main = format!("MAINPID={}", up.monitor().pid);
    assert_eq!(says(&ready, &main), 1, "{ready:#?}");
    said.extend(ready);
    up.process("app/2").signal(Signal::USR2);
    said.extend(manager.wait_for("STATUS=2 servers, 2 ready, 0 waiting"));

    // The next distributor says what is new, and again that it is ready.
    up.distributor().kill(seconds(5.0));
    said.extend(manager.wait_for("READY=1"));
    assert_from_monitor(&up, &said);

    up.signal(Signal::TERM);
    let said = manager.wait_for("STOPPING=1");
    assert_from_monitor(&up, &said);
    assert!(up.has_stopped().success());
    assert!(manager.hear().is_none_or(|said| !said.words.contains(&"READY=1".to_owned())));
}

#[test]
fn the_manager_is_told_of_a_reload_and_its_end_whatever_comes_of_it() {
    let host = Host::new();
    let path = host.path("manager");
    let manager = Manager::at(&path);
    let app = App::of(&host, 1);
    let up = host.start_command(command(&host, &app, &host.path_text("manager")));
    manager.wait_for("READY=1");
    for file in [App { weight: Some(7), ..app }.toml(), "wrong".to_owned()] {
        host.write("dist-ctl.toml", &file);
        up.signal(Signal::HUP);
        let said = manager.wait_for("RELOADING=1");
        // As Type=notify-reload wants it.
        let when =
            said.iter().flat_map(|said| &said.words).find_map(|word| word.strip_prefix("MONOTONIC_USEC="));
        assert!(when.is_some_and(|when| when.parse::<u64>().is_ok()), "{said:#?}");
        assert_from_monitor(&up, &said);
        manager.wait_for("READY=1");
    }
    assert_eq!(up.service().servers[0].weight, 7);
    up.stop();
}

#[test]
fn an_abstract_socket_is_as_good() {
    let host = Host::new();
    let manager = Manager::called("dist-ctl-test-manager");
    let up = host.start_command(command(&host, &App::of(&host, 1), "@dist-ctl-test-manager"));
    let said = manager.wait_for("READY=1");
    assert_from_monitor(&up, &said);
}

#[test]
fn the_manager_is_told_that_all_is_well_only_while_the_loop_turns() {
    let host = Host::new();
    let path = host.path("manager");
    let manager = Manager::at(&path);
    let mut command = command(&host, &App::of(&host, 1), &host.path_text("manager"));
    command.env("WATCHDOG_USEC", "400000");
    let up = host.start_command(command);
    up.wait_ready();
    for _ in 0..5 {
        let said = manager.wait_for("WATCHDOG=1");
        assert_from_monitor(&up, &said);
    }
    assert_eq!(up.process("app/1").environment().get("WATCHDOG_USEC"), None, "that is not the server's");

    let hung = up.distributor();
    hung.freeze(seconds(5.0));
    while manager.hear().is_some() {}
    stays("what is said by one that hangs", Duration::from_millis(1000), None, || manager.hear());
    hung.kill(seconds(5.0));
    let said = manager.wait_for("WATCHDOG=1");
    assert_from_monitor(&up, &said);
}

#[test]
fn a_manager_that_is_not_there_is_no_obstacle() {
    let host = Host::new();
    let up = host.start_command(command(&host, &App::of(&host, 1), &host.path_text("nobody")));
    up.wait_ready();
    let manager = Manager::at(&host.path("nobody"));
    manager.wait_for("READY=1");
    up.stop();
}

#[test]
fn a_socket_that_is_none_is_said_and_no_obstacle() {
    let host = Host::new();
    let up = host.start_command(command(&host, &App::of(&host, 1), "vsock:2:4711"));
    up.wait_ready();
    let log = up.log();
    assert!(log.contains("NOTIFY_SOCKET=vsock:2:4711"), "{log}");
}
