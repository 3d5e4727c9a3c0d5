//! Servers that are checked, that are unhealthy, and that hang.
//!
//! A test chooses how a server answers its checks, by a file, and what becomes of those of its clients.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use distributor_ebpf::contract::Directed;
use distributor_user::kernel::{self, Directions};
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use tests::{
    app::{App, NOBODY_WAITS, list},
    client::{self, Client},
    host::{Host, Up, V4, V6},
    http, leftover,
    process::{self, Process},
    real::{self, Daemon, Nginx},
    status::{Check, Server},
    wait::{fewer, lasting, seconds, stays, try_for, wait_for, wait_until_eq},
};

/// Checked often, by connecting.
const BY_TCP: &str =
    "[service.app.check]\ntype = \"tcp\"\ninterval = \"50ms\"\nfast_interval = \"50ms\"\ntimeout = \"20s\"";
/// The same by HTTP.
const BY_HTTP: &str =
    "[service.app.check]\ntype = \"http\"\npath = \"/health\"\ninterval = \"50ms\"\nfast_interval = \"50ms\"";

const WELL: &str = "200 OK";
const UNWELL: &str = "503 Service Unavailable";
const SILENT: &str = "";

/// Servers that answer what stands in their files.
fn speaking_http(host: &Host, count: usize) -> App {
    let file = host.path_text("answer-{name}");
    let app = App::with(host, count, &["--listen", "[::]:8080", "--http", &file]);
    for name in 1..=count {
        answer(host, &name.to_string(), WELL);
    }
    App { tables: BY_HTTP.to_owned(), ..app }
}

/// From now on the server answers so.
#[track_caller]
fn answer(host: &Host, name: &str, status: &str) {
    // In one step: it may be read at any time.
    let new = host.write(&format!("answer-{name}.new"), status);
    fs::rename(new, host.path(&format!("answer-{name}"))).expect("put it in place");
}

/// Brings it up with counts that are compared often.
#[track_caller]
fn up<'h>(host: &'h Host, app: &App) -> Up<'h> {
    let up = start(host, app);
    up.wait_ready();
    up
}

#[track_caller]
fn start<'h>(host: &'h Host, app: &App) -> Up<'h> {
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_CHECK_COUNTS", "200ms");
    host.start_command(command)
}

fn check(up: &Up<'_>, server: &str) -> Check {
    up.service().server(server).check.clone().expect("it is checked")
}

/// Waits until so many more checks of a server were good, or bad.
#[track_caller]
fn wait_checks(up: &Up<'_>, server: &str, is_good: bool, more: u64) {
    let count = || {
        let check = check(up, server);
        if is_good { check.good_total } else { check.bad_total }
    };
    let wanted = count() + more;
    wait_for("more checks", seconds(30.0), || (count() >= wanted).then_some(()));
}

#[track_caller]
fn wait_next_instance(up: &Up<'_>, before: Process) {
    wait_for("the next instance", seconds(20.0), || {
        up.process_if_any("app/1").filter(|process| *process != before)
    });
}

/// Nobody was ever a client of any server.
#[track_caller]
fn assert_no_clients(up: &Up<'_>) {
    let service = up.service();
    let never: Vec<_> = service
        .servers
        .iter()
        .map(|server| (server.connections, server.connections_max, server.connections_total))
        .collect();
    assert!(never.iter().all(|counts| *counts == (0, 0, 0)), "{service:#?}");
    assert_eq!((service.waiting.now, service.waiting.max, service.drift.found), (0, 0, 0), "{service:#?}");
    let names = [
        "selected",
        "next_best",
        "established",
        "established_waiting",
        "closed",
        "closed_waiting",
        "moved",
        "owner_lost",
        "move_failed",
    ];
    assert_eq!(service.outcomes(names), [0; 9]);
}

/// Every connection of ours that was established is gone.
#[track_caller]
fn assert_all_checks_gone(up: &Up<'_>) {
    wait_for("the last check to be gone", seconds(10.0), || {
        let [established, closed] = up.service().outcomes(["check_established", "check_closed"]);
        (established == closed).then_some(())
    });
}

/// Which server answers.
#[track_caller]
fn asked(count: usize) -> Vec<String> {
    let name = |_| {
        let body = http::get(V4).expect("an answer");
        body.split(' ').next().expect("a name").to_owned()
    };
    (0..count).map(name).collect()
}

#[test]
fn hundreds_of_checks_count_for_nobody() {
    let host = Host::new();
    let up = up(&host, &App { tables: BY_TCP.to_owned(), ..App::of(&host, 2) });
    let many = fewer(150, 20) as u64;
    for server in ["app/1", "app/2"] {
        wait_checks(&up, server, true, many);
        let check = check(&up, server);
        assert_eq!((check.kind.as_str(), check.good, check.bad_total), ("tcp", Some(true), 0));
        assert_eq!(check.said.as_deref(), Some("accepts connections"));
    }
    assert_no_clients(&up);
    let service = up.service();
    let [directed, refused] = service.outcomes(["directed", "directed_refused"]);
    assert!(directed >= 2 * many && refused == 0, "{service:#?}");
    // Each came to the server that it was for.
    for name in ["1", "2"] {
        assert!(host.inside(name).accepted >= many, "{:?}", host.inside(name));
    }
    // Beside clients they change no count either, and the comparison with the sockets finds nothing.
    let held = client::hold(V4, 10);
    assert_eq!(up.connections(), [5, 5]);
    let compared = up.service().drift.checks;
    wait_checks(&up, "app/1", true, many / 3);
    wait_for("the counts to be compared", seconds(20.0), || {
        (up.service().drift.checks >= compared + 3).then_some(())
    });
    let service = up.service();
    assert_eq!((service.connections(), service.totals()), (vec![5, 5], vec![5, 5]));
    assert_eq!((service.drift.found, service.outcome("owner_lost")), (0, 0), "{service:#?}");
    drop(held);
    up.wait_connections(&[0, 0]);
    up.stop();
}

#[test]
fn a_server_is_checked_whatever_its_limit_and_though_it_is_drained() {
    let host = Host::new();
    let app = App { limit: Some(1), tables: BY_TCP.to_owned(), ..App::of(&host, 2) };
    let up = up(&host, &app);
    let _held = client::hold(V4, 2);
    let _waiting = client::stand(&[V4], 3);
    wait_until_eq("waiting", seconds(5.0), 3, || up.service().waiting.now);
    up.run(&["drain", "app/2"]).expect_done();
    for server in ["app/1", "app/2"] {
        wait_checks(&up, server, true, 20);
        assert_eq!(check(&up, server).bad_total, 0);
    }
    let service = up.service();
    assert_eq!((service.connections(), service.totals()), (vec![1, 1], vec![1, 1]));
    assert_eq!((service.waiting.now, service.waiting.max), (3, 3));
}

#[test]
fn an_unhealthy_server_gets_no_connections_until_it_is_well() {
    let host = Host::new();
    let up = up(&host, &speaking_http(&host, 2));
    wait_checks(&up, "app/1", true, 1);
    let its = loop {
        let connection = client::connect(V4).expect("connect");
        wait_for("a connection", seconds(5.0), || (up.connections() != [0, 0]).then_some(()));
        if up.connections() == [1, 0] {
            break connection;
        }
        drop(connection);
        up.wait_connections(&[0, 0]);
    };

    answer(&host, "1", UNWELL);
    let server = up.wait_state("app/1", "unhealthy");
    let reason = server.reason.expect("a reason");
    let expected =
        "3 checks in a row were bad: 503 Service Unavailable; gets no connections until its checks are good";
    assert_eq!(reason, expected);
    assert_eq!(server.effective_weight, 0);
    let check = server.check.expect("it is checked");
    assert_eq!((check.good, check.said.as_deref()), (Some(false), Some(UNWELL)));
    assert!(check.since.expect("since when") <= server.since);
    assert!(up.log().contains(&format!("server app/1 is unhealthy: {expected}")), "{}", up.log());
    assert_eq!(asked(6), ["2"; 6]);
    // What it has goes on. It is asked like anybody else.
    assert_eq!(up.connections()[0], 1);
    answer(&host, "1", WELL);
    assert!(http::ask(its).expect("an answer").starts_with("1 "));

    let server = up.wait_state("app/1", "ready");
    assert_eq!(server.reason, None);
    let log = up.log();
    assert!(log.contains("server app/1 is well again after "), "{log}");
    let both = asked(6);
    assert!(both.contains(&"1".to_owned()), "{both:?}");
    assert_eq!(up.service().server("app/1").restarts, 0);
    up.stop();
}

#[test]
fn while_all_are_unhealthy_clients_wait() {
    let host = Host::new();
    let up = up(&host, &speaking_http(&host, 2));
    for name in ["1", "2"] {
        answer(&host, name, UNWELL);
    }
    for server in ["app/1", "app/2"] {
        up.wait_state(server, "unhealthy");
    }
    let waits = client::connect(V4).expect("it waits");
    wait_until_eq("waiting", seconds(5.0), 1, || up.service().waiting.now);
    assert_eq!(up.service().outcome("wait_no_server"), 1);
    answer(&host, "2", WELL);
    assert!(http::ask(waits).expect("an answer").starts_with("2 "));
    up.stop();
}

#[test]
fn a_server_is_ready_after_its_first_good_check() {
    let host = Host::new();
    let mut app = speaking_http(&host, 1);
    app.server = "readiness = \"check\"".to_owned();
    answer(&host, "1", UNWELL);
    let up = start(&host, &app);
    wait_checks(&up, "app/1", false, 3);
    let server = up.service().server("app/1").clone();
    assert_eq!(server.state, "starting");
    let reason = server.reason.expect("a reason");
    assert!(
        reason.starts_with("listens, waits for a good check: 3 checks in a row were bad: 503"),
        "{reason}"
    );
    assert_no_clients(&up);
    let waits = client::connect(V4).expect("it waits");
    answer(&host, "1", WELL);
    up.wait_state("app/1", "ready");
    assert!(http::ask(waits).expect("an answer").starts_with("1 "));
    up.stop();
}

#[test]
fn a_server_that_stays_unhealthy_is_started_again() {
    let host = Host::new();
    let mut app = speaking_http(&host, 2);
    app.tables += "\nrestart_after = \"300ms\"";
    let up = up(&host, &app);
    let before = up.process("app/1");
    answer(&host, "1", UNWELL);
    wait_next_instance(&up, before);
    answer(&host, "1", WELL);
    wait_for("it to be well", seconds(20.0), || {
        let service = up.service();
        let server = service.server("app/1");
        (server.state == "ready" && server.check.as_ref()?.good == Some(true)).then_some(())
    });
    let log = up.log();
    assert!(log.contains(", started again in 0.3s if they are not"), "{log}");
    let ended =
        |line: &str| line.contains("app/1 was unhealthy for ") && line.contains("503 Service Unavailable");
    assert!(log.lines().any(ended), "{log}");
    assert_eq!(up.service().server("app/2").restarts, 0);
    up.stop();
}

#[test]
fn what_a_check_came_to_is_said() {
    let host = Host::new();
    let mut app = speaking_http(&host, 1);
    app.tables += "\ntimeout = \"100ms\"\nstatus = [204, \"500-599\"]";
    // By these it is not well from the beginning.
    let up = start(&host, &app);
    for (status, good, said) in [
        (WELL, false, WELL),
        (SILENT, false, "timed out after 0.1s"),
        ("204", true, "204"),
        (UNWELL, true, UNWELL),
        ("x", false, "answered something that is not HTTP"),
    ] {
        answer(&host, "1", status);
        wait_until_eq("what it says", seconds(10.0), (Some(good), Some(said.to_owned())), || {
            let check = check(&up, "app/1");
            (check.good, check.said)
        });
    }
    assert_no_clients(&up);
    up.stop();
}

#[test]
fn a_server_that_is_unhealthy_is_so_to_the_next_distributor() {
    let host = Host::new();
    let up = up(&host, &speaking_http(&host, 2));
    answer(&host, "1", SILENT);
    let before = up.wait_state("app/1", "unhealthy");
    for _ in 0..3 {
        up.kill_distributor();
        let after = up.service().server("app/1").clone();
        assert_eq!((after.state.as_str(), &after.since), ("unhealthy", &before.since), "{after:#?}");
        assert_eq!(asked(4), ["2"; 4]);
    }
    answer(&host, "1", WELL);
    up.wait_state("app/1", "ready");
    assert_all_checks_gone(&up);
    up.wait_connections(&[0, 0]);
    assert_eq!(up.service().drift.found, 0);
    up.stop();
}

/// Checks are under way at any moment, also when a distributor is killed.
#[test]
fn distributors_that_are_killed_over_checks_leave_no_count() {
    let host = Host::new();
    let up = up(&host, &App { tables: BY_TCP.to_owned(), ..App::of(&host, 4) });
    for _ in 0..fewer(10, 3) {
        wait_checks(&up, "app/4", true, 2);
        up.replace_distributor();
    }
    wait_checks(&up, "app/1", true, 5);
    assert_no_clients(&up);
    assert_all_checks_gone(&up);
    let held = client::hold(V4, 8);
    assert_eq!(up.connections(), [2; 4]);
    drop(held);
    up.wait_connections(&[0; 4]);
    up.stop();
}

#[test]
fn each_address_of_a_service_is_checked() {
    let host = Host::new();
    let listen = ["127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8081", "[::]:8082"];
    let mut app = App::with(&host, 2, &listen.map(|address| ["--listen", address]).concat());
    app.listen = listen.map(str::to_owned).to_vec();
    app.tables = BY_TCP.to_owned();
    let up = up(&host, &app);
    wait_checks(&up, "app/2", true, 10);
    let service = up.service();
    assert_eq!(service.outcome("directed_refused"), 0);
    let checks: u64 = ["app/1", "app/2"].iter().map(|server| check(&up, server).good_total).sum();
    assert!(up.service().outcome("directed") >= 4 * checks, "{service:#?}");
    assert_no_clients(&up);
    // And of clients each counts, whatever it came by.
    for address in
        [V4, V6, at(Ipv4Addr::LOCALHOST, 8081), at(Ipv4Addr::LOCALHOST, 8082), at(Ipv6Addr::LOCALHOST, 8082)]
    {
        assert_eq!(client::hold(address, 2).len(), 2);
    }
    assert_eq!(up.service().totals().iter().sum::<u64>(), 10);
    up.stop();
}

fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

#[test]
fn checks_go_to_their_server_with_syn_cookies_too() {
    for cookies in ["1", "2"] {
        let host = Host::new();
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).expect("set it in this namespace");
        let mut app = speaking_http(&host, 3);
        app.tables += "\ntimeout = \"20s\"";
        let up = up(&host, &app);
        for server in ["app/1", "app/2", "app/3"] {
            wait_checks(&up, server, true, 10);
            assert_eq!(check(&up, server).bad_total, 0, "tcp_syncookies = {cookies}");
        }
        assert_no_clients(&up);
        answer(&host, "2", UNWELL);
        up.wait_state("app/2", "unhealthy");
        assert_eq!(up.service().states(), ["ready", "unhealthy", "ready"]);
        up.stop();
    }
}

#[test]
fn a_check_in_the_queue_of_a_server_that_dies_goes_to_nobody_else() {
    let host = Host::new();
    let mut app = speaking_http(&host, 2);
    app.tables += "\ntimeout = \"60s\"";
    app.server = "restart = { delay = \"10s\" }".to_owned();
    let up = up(&host, &app);
    wait_checks(&up, "app/1", true, 1);
    let server = up.process("app/1");
    wait_for("a check in its accept queue", seconds(40.0), || {
        server.freeze(seconds(5.0));
        let lies =
            try_for(seconds(2.0), || (up.service().server("app/1").accept_queue == Some(1)).then_some(()));
        if lies.is_none() {
            // It had accepted that one, and is to answer it.
            server.signal(Signal::CONT);
        }
        lies
    });
    answer(&host, "2", SILENT);
    let accepted = host.inside("2").accepted;
    server.kill(seconds(5.0));
    wait_until_eq("what is given up", seconds(10.0), 1, || up.service().outcome("check_given_up"));
    // One check of the other may have been about to begin.
    assert!(host.inside("2").accepted <= accepted + 1);
    assert_no_clients(&up);
    up.stop();
}

#[test]
fn a_check_by_a_command_runs_as_the_server_does_and_is_killed_in_time() {
    let host = Host::new();
    let place = host.open_directory("place");
    let script = host.write(
        "check.sh",
        "#!/bin/sh\necho \"$DIST_CTL_SERVER $DIST_CTL_LISTEN $DIST_CTL_PID $COLOUR $1 $(id -u)\" > \"$2/told.$1\"\n\
         . \"$2/does\"\n",
    );
    let does = |what: &str| {
        let new = host.write("place/does.new", what);
        fs::rename(new, host.path("place/does")).expect("put it in place");
    };
    does("echo fine; exit 0");
    let command = list(&["/usr/bin/sh".to_owned(), script, "{name}".to_owned(), place]);
    let mut app = App::of(&host, 1);
    app.command[0] = host.test_server_for_all();
    app.server = "user = \"nobody\"\nenvironment = { COLOUR = \"red\" }".to_owned();
    app.tables = format!(
        "[service.app.check]\ntype = \"command\"\ncommand = {command}\ninterval = \"50ms\"\nfast_interval = \
         \"50ms\"\ntimeout = \"1s\""
    );
    let up = up(&host, &app);
    let says = |good: bool, said: &str| {
        wait_until_eq("what it says", seconds(20.0), (Some(good), Some(said.to_owned())), || {
            let check = check(&up, "app/1");
            (check.good, check.said)
        });
    };
    says(true, "exited with 0: fine");
    let pid = up.process("app/1").pid;
    let uid =
        fs::metadata(format!("/proc/{pid}")).map(|it| std::os::unix::fs::MetadataExt::uid(&it)).unwrap();
    // It is written anew by each.
    wait_until_eq("its environment", seconds(10.0), format!("app/1 [::]:8080 {pid} red 1 {uid}\n"), || {
        fs::read_to_string(host.path("place/told.1")).expect("it ran")
    });
    does("echo one; echo no database >&2; exit 3");
    says(false, "exited with 3: no database");
    up.wait_state("app/1", "unhealthy");
    // Whatever it has started is killed with it, and gone before it is said.
    does("echo hangs; trap '' TERM; (trap '' TERM; exec sleep 1000) & exec sleep 1000");
    says(false, "timed out after 1s: hangs");
    does("exit 0");
    says(true, "exited with 0");
    up.wait_state("app/1", "ready");
    let checks = up.cgroup().join("app.checks");
    wait_until_eq("processes of checks", seconds(10.0), 0, || {
        process::in_cgroup(&checks.join("1.1"))
            .iter()
            .filter(|process| process.runs() && sleeps(process))
            .count()
    });
    // A distributor that is killed over one leaves it to the next.
    does("exec sleep 1000");
    let left = wait_for("a check to hang", seconds(20.0), || {
        process::in_cgroup(&checks.join("1.1")).into_iter().find(sleeps)
    });
    let old = up.distributor();
    old.kill(seconds(5.0));
    does("exit 0");
    wait_for("it to be killed", seconds(20.0), || (!left.runs()).then_some(()));
    up.wait_next_distributor(old);
    says(true, "exited with 0");
    assert_no_clients(&up);
    up.stop();
}

fn sleeps(process: &Process) -> bool {
    process.arguments().first().is_some_and(|word| word.ends_with("sleep"))
}

#[test]
fn a_command_that_cannot_be_run_is_a_bad_check() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.tables = "[service.app.check]\ntype = \"command\"\ncommand = [\"/no/such/program\"]\ninterval = \
                  \"50ms\"\nfall = 1"
        .to_owned();
    let up = host.start(&app);
    let reason = up.wait_state("app/1", "unhealthy").reason.expect("a reason");
    assert!(
        reason.starts_with(
            "its check is bad: could not be run: run /no/such/program: No such file or directory"
        ),
        "{reason}"
    );
    up.stop();
}

#[test]
fn nginx_and_python_are_checked_and_notice_no_harm() {
    let host = Host::new();
    let checked =
        "[service.app.check]\ntype = \"http\"\nstatus = [200]\ninterval = \"100ms\"\ntimeout = \"20s\"";
    for (command, listen) in [
        (real::nginx(&host, 2, Nginx::PerWorker, Daemon::Off), "[::]:8080"),
        (real::python(&host, 2), "0.0.0.0:8080"),
    ] {
        let mut app = App::running(2, command);
        app.listen = vec![listen.to_owned()];
        app.server = "readiness = \"check\"".to_owned();
        app.tables = checked.to_owned();
        let up = up(&host, &app);
        for server in ["app/1", "app/2"] {
            wait_checks(&up, server, true, 20);
            let check = check(&up, server);
            assert_eq!((check.said.as_deref(), check.bad_total), (Some("200 OK"), 0));
        }
        assert_no_clients(&up);
        let mut answers: Vec<String> = (0..2).map(|_| http::get(V4).expect("an answer")).collect();
        answers.sort();
        assert_eq!(answers, ["1\n", "2\n"]);
        up.stop();
    }
}

/// It was stopped, and so has not listened in time.
#[test]
fn a_distributor_that_hung_takes_nobody_for_unhealthy() {
    let host = Host::new();
    let mut app = App::of(&host, 2);
    // One is under way most of the time.
    app.tables = format!(
        "[service.app.check]\ntype = \"command\"\ncommand = [\"/usr/bin/sleep\", \"0.3\"]\ninterval = \
         \"50ms\"\nfast_interval = \"50ms\"\nfall = 1\ntimeout = \"{}\"",
        lasting(3.0)
    );
    let up = up(&host, &app);
    for _ in 0..3 {
        wait_checks(&up, "app/1", true, 2);
        let distributor = up.distributor();
        distributor.freeze(seconds(5.0));
        std::thread::sleep(seconds(4.0));
        distributor.signal(Signal::CONT);
        up.wait_answering();
        wait_checks(&up, "app/2", true, 2);
    }
    assert!(!up.log().contains("unhealthy"), "{}", up.log());
    assert_eq!(up.service().states(), ["ready", "ready"]);
    up.stop();
}

#[test]
fn checks_are_changed_and_taken_away_while_servers_run() {
    let host = Host::new();
    let mut app = speaking_http(&host, 2);
    let up = up(&host, &app);
    let pids = || -> Vec<_> { up.service().servers.into_iter().map(|server| server.pid).collect() };
    let before = pids();
    answer(&host, "1", UNWELL);
    up.wait_state("app/1", "unhealthy");
    let reload = |app: &App| {
        host.write("dist-ctl.toml", &app.toml());
        up.run(&["reload"]).expect_done().stdout
    };
    // What was bad is good now.
    app.tables = format!("{BY_HTTP}\nstatus = [200, 503]");
    let done = reload(&app);
    assert!(
        done.starts_with("servers app/1, app/2: check http /health of localhost with 200-399 "),
        "{done}"
    );
    up.wait_state("app/1", "ready");
    app.tables = BY_HTTP.to_owned();
    reload(&app);
    up.wait_state("app/1", "unhealthy");
    // And without checks nobody is unhealthy.
    app.tables.clear();
    reload(&app);
    up.wait_state("app/1", "ready");
    assert_eq!(up.service().server("app/1").check, None);
    app.tables = BY_TCP.to_owned();
    reload(&app);
    wait_checks(&up, "app/2", true, 3);
    assert_eq!(pids(), before);
    assert_no_clients(&up);
    up.stop();
}

#[test]
fn a_service_is_still_checked_when_another_one_has_gone() {
    let host = Host::new();
    let app = speaking_http(&host, 1);
    let web = App::with(&host, 1, &["--listen", "127.0.0.1:8081"]);
    let web = App { listen: vec!["127.0.0.1:8081".to_owned()], ..web };
    let web = web.toml().replace("service.app", "service.web");
    // The one that goes is the first.
    let file = host.write("dist-ctl.toml", &format!("{web}\n{}", app.toml()));
    let up = host.start_command(host.command(&["up", "-f", &file]));
    up.wait_ready();
    host.write("dist-ctl.toml", &app.toml());
    up.run(&["reload"]).expect_done();
    wait_until_eq("the services", seconds(20.0), vec!["app".to_owned()], || {
        up.status().services.into_iter().map(|service| service.name).collect()
    });
    answer(&host, "1", UNWELL);
    up.wait_state("app/1", "unhealthy");
    answer(&host, "1", WELL);
    up.wait_state("app/1", "ready");
    up.stop();
}

/// A new instance that is never well does not take the place of one that is.
#[test]
fn a_successor_takes_the_place_of_a_server_after_its_first_good_check() {
    let host = Host::new();
    let mut app = speaking_http(&host, 1);
    app.server = "readiness = \"check\"\nstart_timeout = \"20s\"".to_owned();
    let up = up(&host, &app);
    let before = up.process("app/1");
    let first = up.service().server("app/1").check.clone().expect("it is checked");
    assert_eq!(first.good, Some(true));
    // Both read the same file, so the one that serves is unhealthy as well.
    app.tables += "\nfall = 1000";
    app.server += "\numask = \"0027\"";
    host.write("dist-ctl.toml", &app.toml());
    answer(&host, "1", UNWELL);
    up.run(&["reload"]).expect_done();
    let successor = wait_for("a successor that is checked", seconds(20.0), || {
        let servers = up.service().servers;
        servers.into_iter().find(|server| {
            server.name != "app/1" && server.check.as_ref().is_some_and(|check| check.bad_total >= 3)
        })
    });
    assert_eq!(successor.state, "starting");
    assert_eq!(up.process("app/1"), before);
    answer(&host, "1", WELL);
    wait_for("it to take its place", seconds(20.0), || {
        up.process_if_any("app/1").filter(|process| *process != before)
    });
    up.wait_ready();
    assert_no_clients(&up);
    up.stop();
}

/// What the kernel does with connections that are directed, by the map itself.
#[test]
fn a_directed_connection_goes_to_its_server_or_to_nobody() {
    let host = Host::new();
    let mut app = App { limit: Some(1), ..App::of(&host, 2) };
    app.tables = BY_TCP.replace("50ms", "1h");
    let up = up(&host, &app);
    let _full = client::hold(V4, 2);
    wait_checks_begun(&up);
    let pins = leftover::pins(up.runtime()).expect("it has pins");
    let directions = Directions::open(&kernel::pins(&pins, "app")).expect("open DIRECTED");
    let mut by_slot = BTreeMap::new();
    for slot in 0..4 {
        for generation in 1..4 {
            let to = Directed { slot, generation, nth: 7, reserved: 0 };
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("open a socket");
            socket.bind(&at(Ipv4Addr::LOCALHOST, 0).into()).expect("bind it");
            let client = socket.local_addr().expect("it is bound").as_socket().expect("to an address");
            let direction = directions.direct(client, to).expect("direct it");
            match socket.connect(&V4.into()) {
                Ok(()) => {
                    let server = Client::greeted(socket.into()).expect("served").server;
                    assert_eq!(by_slot.insert(slot, server), None, "two generations of slot {slot}");
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused),
            }
            drop(direction);
        }
    }
    let mut servers: Vec<String> = by_slot.into_values().collect();
    servers.sort();
    assert_eq!(servers, ["1", "2"]);
    let service = up.service();
    assert_eq!(service.outcomes(["directed_refused", "established", "refused_limit"]), [10, 2, 0]);
    assert_eq!((service.connections(), service.totals()), (vec![1, 1], vec![1, 1]));
    // Without a direction the same address is anybody's: who comes from there waits.
    let _waits = client::stand(&[V4], 1);
    wait_until_eq("waiting", seconds(5.0), 1, || up.service().waiting.now);
    assert_all_checks_gone(&up);
}

/// Each server has been checked once, and is not for long.
#[track_caller]
fn wait_checks_begun(up: &Up<'_>) {
    for server in ["app/1", "app/2"] {
        wait_for("its first check", seconds(10.0), || (check(up, server).good_total == 1).then_some(()));
    }
    assert_all_checks_gone(up);
}

// Servers that do not accept.

/// Two servers, of which the first is stopped and has one connection in its queue.
#[track_caller]
fn with_one_that_hangs<'h>(host: &'h Host, remedy: &str) -> (Up<'h>, Process, TcpStream) {
    let mut app = App::of(host, 2);
    app.server =
        // One that is to stop is not asked to before its connections have ended, or a minute has passed.
        format!("stall_after = \"500ms\"\n{remedy}\nstop_timeout = \"300ms\"\ndrain_timeout = \"60s\"");
    let up = up(host, &app);
    let server = up.process("app/1");
    server.freeze(seconds(5.0));
    // Each gets one of two.
    let mut both = Vec::from([(); 2].map(|()| client::connect(V4).expect("connect")));
    let served = wait_for("one to be served", seconds(10.0), || both.iter().position(client::is_greeted));
    assert_eq!(Client::greeted(both.remove(served)).expect("served").server, "2");
    (up, server, both.remove(0))
}

#[test]
fn a_server_that_does_not_accept_gets_nothing_until_it_does() {
    let host = Host::new();
    let (up, server, hangs) = with_one_that_hangs(&host, "");
    let stalled = up.wait_state("app/1", "stalled");
    let reason = stalled.reason.expect("a reason");
    let end = "; gets none while another server can take them, until its queue moves";
    assert!(reason.starts_with("has not accepted any of 1 connection for "), "{reason}");
    assert!(reason.ends_with(end), "{reason}");
    assert_eq!((stalled.effective_weight, stalled.accept_queue), (0, Some(1)));
    let others = client::hold(V4, 10);
    assert_eq!(client::by_name(&others), [("2".to_owned(), 10)].into());
    // The next distributor knows it, and leaves it at that.
    let since = stalled.since;
    up.kill_distributor();
    let after = up.wait_state("app/1", "stalled");
    assert_eq!(after.since, since);
    assert_eq!(client::by_name(&client::hold(V4, 4)), [("2".to_owned(), 4)].into());
    server.signal(Signal::CONT);
    assert_eq!(Client::greeted(hangs).expect("served").server, "1");
    up.wait_state("app/1", "ready");
    assert_eq!(up.service().servers.iter().map(|server| server.restarts).collect::<Vec<_>>(), [0, 0]);
    drop(others);
    up.stop();
}

#[test]
fn a_server_that_is_slow_but_accepts_is_not_stalled() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--pause", "100"]);
    app.server = format!("stall_after = \"{}\"", lasting(1.0));
    let up = up(&host, &app);
    // Its queue is not empty for six seconds.
    let clients = client::stand(&[V4], 60);
    stays("its state", Duration::from_millis(2500), "ready".to_owned(), || {
        let server = up.service().server("app/1").clone();
        assert!(server.accept_queue.is_some_and(|queue| queue > 0), "{server:#?}");
        server.state
    });
    drop(clients);
    up.stop();
}

#[test]
fn where_all_are_stalled_they_get_what_comes() {
    let host = Host::new();
    let mut app = App { waiting: Some(NOBODY_WAITS.to_owned()), ..App::of(&host, 2) };
    app.server = "stall_after = \"300ms\"".to_owned();
    let up = up(&host, &app);
    let servers = ["app/1", "app/2"].map(|server| up.process(server));
    servers.iter().for_each(|server| server.freeze(seconds(5.0)));
    let first = [(); 4].map(|()| client::connect(V4).expect("connect"));
    for server in ["app/1", "app/2"] {
        up.wait_state(server, "stalled");
    }
    let more = [(); 4].map(|()| client::connect(V4).expect("it is taken all the same"));
    assert_eq!(up.connections(), [4, 4]);
    servers.iter().for_each(|server| server.signal(Signal::CONT));
    for stream in first.into_iter().chain(more) {
        Client::greeted(stream).expect("served");
    }
    up.wait_ready();
    up.stop();
}

#[test]
fn what_lies_in_the_queue_of_one_that_hangs_goes_to_the_others() {
    let host = Host::new();
    let (up, server, hangs) = with_one_that_hangs(&host, "move_queue = true");
    // Before anything of it has ended, which would move its queue as well.
    assert_eq!(Client::greeted(hangs).expect("served").server, "2");
    wait_next_instance(&up, server);
    up.wait_ready();
    let service = up.service();
    assert_eq!((service.outcomes(["moved", "move_failed"]), service.server("app/1").restarts), ([1, 0], 1));
    let log = up.log();
    assert!(log.contains("what is in there goes to the others"), "{log}");
    up.wait_connections(&[0, 0]);
    up.stop();
}

#[test]
fn a_server_that_hangs_for_too_long_is_killed() {
    let host = Host::new();
    let (up, server, hangs) = with_one_that_hangs(&host, "hang_kill = \"500ms\"");
    wait_next_instance(&up, server);
    // It went on to another one when its server died.
    assert!(Client::greeted(hangs).is_ok());
    up.wait_ready();
    let log = up.log();
    assert!(log.contains(", killed in 0.5s if it does not"), "{log}");
    let killed = |line: &str| line.contains("app/1 was stalled for ") && line.contains("; gets SIGABRT");
    assert!(log.lines().any(killed), "{log}");
    assert_eq!(restarts(&up.service().servers), [1, 0]);
    up.stop();
}

fn restarts(servers: &[Server]) -> Vec<u64> {
    servers.iter().map(|server| server.restarts).collect()
}

/// Two servers, of which the first is stopped after a good check.
#[track_caller]
fn with_one_that_answers_no_check<'h>(host: &'h Host, hang_kill: &str) -> (Up<'h>, Process) {
    let mut app = speaking_http(host, 2);
    app.tables += "\ntimeout = \"100ms\"";
    app.server = format!("stall_after = \"500ms\"\nhang_kill = \"{hang_kill}\"\nstop_timeout = \"300ms\"");
    let up = up(host, &app);
    wait_checks(&up, "app/1", true, 1);
    let server = up.process("app/1");
    server.freeze(seconds(5.0));
    (up, server)
}

#[test]
fn one_that_hangs_and_has_no_client_is_known_by_its_checks() {
    let host = Host::new();
    let (up, server) = with_one_that_answers_no_check(&host, "500ms");
    wait_next_instance(&up, server);
    assert!(up.log().contains("server app/1 was stalled for "), "{}", up.log());
    up.wait_ready();
    assert_no_clients(&up);
    up.stop();
}

#[test]
fn one_that_hangs_is_unhealthy_and_is_killed_all_the_same() {
    let host = Host::new();
    let (up, server) = with_one_that_answers_no_check(&host, "3s");
    let mut both = [(); 2].map(|()| client::connect(V4).expect("connect"));
    let server_of = |up: &Up<'_>| up.service().server("app/1").clone();
    wait_for("it to be unhealthy and stalled", seconds(10.0), || {
        let server = server_of(&up);
        let reason = server.reason?;
        let is_both = reason.contains("timed out after 0.1s") && reason.contains("has not accepted any of");
        (server.state == "unhealthy" && is_both).then_some(())
    });
    wait_next_instance(&up, server);
    for stream in &mut both {
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("ask");
    }
    up.wait_ready();
    up.wait_connections(&[0, 0]);
    assert_all_checks_gone(&up);
    up.stop();
}

/// Nothing of a check is left where they run.
#[test]
fn nothing_is_left_of_checks_when_it_is_stopped() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.tables =
        "[service.app.check]\ntype = \"command\"\ncommand = [\"/usr/bin/sleep\", \"1000\"]\ntimeout = \
                  \"1000s\""
            .to_owned();
    let up = host.up(&app);
    let checks: PathBuf = leftover::cgroup(up.runtime()).join("app.checks/1.1");
    let hangs =
        wait_for("a check to hang", seconds(20.0), || process::in_cgroup(&checks).into_iter().find(sleeps));
    up.stop();
    assert!(!hangs.runs());
}
