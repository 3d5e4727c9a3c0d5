//! Servers say how they are by sd_notify, and are believed.

#![forbid(unsafe_code)]

use std::time::Duration;

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4},
    process::{Process, Signal},
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// Lines for servers that have to say that they are well. One that is aborted leaves no core dump.
const WATCHED: &str = "watchdog = \"1500ms\"\nlimits = { core = 0 }\nreadiness = \"notify\"";

fn restarts(up: &Up<'_>) -> Vec<u64> {
    up.service().servers.iter().map(|server| server.restarts).collect()
}

fn reason(up: &Up<'_>, server: &str) -> String {
    up.service().server(server).reason.clone().unwrap_or_default()
}

/// Waits until what is said of a server has these words in it.
#[track_caller]
fn wait_reason(up: &Up<'_>, server: &str, words: &str) {
    let mut last = String::new();
    let found = tests::wait::try_for(seconds(10.0), || {
        last = reason(up, server);
        last.contains(words).then_some(())
    });
    assert!(found.is_some(), "the reason of {server} does not say {words:?}: {last:?}");
}

#[test]
fn a_server_that_hangs_is_killed_and_one_that_is_well_is_not() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--ready-after", "0", "--well"]);
    app.server = format!("{WATCHED}\nstop_timeout = \"300ms\"");
    let up = host.up(&app);
    assert_eq!(up.process("app/1").environment()["WATCHDOG_USEC"], "1500000");
    let pid = up.process("app/1").pid.to_string();
    assert_eq!(up.process("app/1").environment()["WATCHDOG_PID"], pid);
    stays("restarts", Duration::from_millis(3000), vec![0, 0], || restarts(&up));
    up.process("app/1").freeze(seconds(5.0));
    wait_until_eq("restarts", seconds(10.0), vec![1, 0], || restarts(&up));
    up.wait_ready();
    let reason = reason(&up, "app/1");
    assert!(reason.contains("said no WATCHDOG=1 for 1.5s, was killed by SIGKILL"), "{reason}");
    let log = up.log();
    assert!(log.contains("server app/1 said no WATCHDOG=1 for 1.5s; gets SIGABRT"), "{log}");
    assert!(!log.contains("app/2 said no"), "{log}");
}

#[test]
fn a_server_that_never_says_that_it_is_well_is_given_up() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ready-after", "0"]);
    app.server = format!("{WATCHED}\nrestart = {{ delay = \"10ms\", give_up_after = 2 }}");
    let up = host.start(&app);
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("said no WATCHDOG=1 for 1.5s; given up after 2 failures in a row"), "{reason}");
    assert!(up.log().contains("gets SIGABRT, killed in"), "{}", up.log());
}

#[test]
fn a_server_may_trigger_its_watchdog() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.server = "limits = { core = 0 }".to_owned();
    let up = host.up(&app);
    Client::open(V4).expect("connect").say("notify WATCHDOG=trigger").expect("tell it");
    wait_until_eq("restarts", seconds(10.0), vec![1], || restarts(&up));
    up.wait_ready();
    let reason = reason(&up, "app/1");
    assert!(reason.contains("said WATCHDOG=trigger, was killed by SIGABRT"), "{reason}");
}

#[test]
fn nobody_is_taken_for_hanging_because_the_distributor_was_killed() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--ready-after", "0", "--well"]);
    app.server = WATCHED.to_owned();
    let up = host.up(&app);
    for _ in 0..3 {
        up.kill_distributor();
        // They still say it to the socket to which they have always said it.
        stays("restarts", Duration::from_millis(2000), vec![0, 0], || restarts(&up));
    }
    // And whoever hangs is still noticed.
    up.process("app/2").freeze(seconds(5.0));
    wait_until_eq("restarts", seconds(10.0), vec![0, 1], || restarts(&up));
}

#[test]
fn a_distributor_that_hung_blames_nobody_else() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ready-after", "0", "--well"]);
    app.server = WATCHED.to_owned();
    let up = host.up(&app);
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    let server = client::connect(V4).map(Client::greeted).expect("connect").expect("served all the same");
    // Longer than its watchdog's time.
    stays("the distributor runs", Duration::from_millis(2500), true, || distributor.runs());
    distributor.signal(Signal::CONT);
    up.wait_answering();
    stays("restarts", Duration::from_millis(2000), vec![0], || restarts(&up));
    assert_eq!(up.process("app/1").pid, server.pid);
}

#[test]
fn what_a_server_says_while_no_distributor_runs_is_heard_by_the_next_one() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ready-on-signal"]);
    app.server = "readiness = \"notify\"".to_owned();
    let up = host.start(&app);
    wait_reason(&up, "app/1", "listens, waits for READY=1");
    let (server, distributor) = (up.process("app/1"), up.distributor());
    distributor.freeze(seconds(5.0));
    server.signal(Signal::USR2);
    // It sleeps again: it has said it.
    wait_for("the server to have said it", seconds(5.0), || {
        let pending = server.fact("ShdPnd");
        (pending == "0000000000000000" && server.fact("State").starts_with('S')).then_some(())
    });
    distributor.kill(seconds(5.0));
    up.wait_state("app/1", "ready");
}

#[test]
fn a_server_that_stops_by_itself_gets_nothing_more_and_has_not_failed() {
    let host = Host::new();
    let mut app = App::of(&host, 2);
    app.server = "drain_timeout = \"60s\"\nrestart = { healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let mut held = client::hold(V4, 2);
    let its = held.iter().position(|client| client.server == "1").expect("one of the first server");
    let mut its = held.swap_remove(its);
    its.say("notify STOPPING=1").expect("tell it");
    let server = up.wait_state("app/1", "draining");
    assert!(server.reason.expect("a reason").starts_with("stops by itself"));
    assert_eq!(server.effective_weight, 0);
    let more = client::hold(V4, 6);
    assert_eq!(client::by_name(&more), [("2".to_owned(), 6)].into());
    assert!(its.is_served());
    let pid = its.pid;
    its.say("exit 0").expect("tell it");
    wait_for("the next instance", seconds(10.0), || {
        up.process_if_any("app/1").filter(|process| process.pid != pid)
    });
    up.wait_ready();
    assert_eq!(restarts(&up), [0, 0]);
}

#[test]
fn a_server_that_takes_longer_to_stop_gets_the_time_it_asks_for() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:8080", "--ignore-term"]);
    app.server = "drain_timeout = \"0s\"\nstop_timeout = \"5s\"".to_owned();
    let up = host.up(&app);
    let mut held = Client::open(V4).expect("connect");
    up.signal(Signal::TERM);
    wait_reason(&up, "app/1", "asked to stop, killed in");
    held.say("notify EXTEND_TIMEOUT_USEC=90000000").expect("tell it");
    wait_reason(&up, "app/1", "killed in 1m");
    held.say("exit 0").expect("tell it");
    assert!(up.has_stopped().success());
}

#[test]
fn what_a_server_says_of_itself_is_shown_to_people_and_to_programs() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    Client::open(V4).expect("connect").say("notify STATUS=3 of 9 loaded").expect("tell it");
    wait_reason(&up, "app/1", "says: 3 of 9 loaded");
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("says: 3 of 9 loaded"), "{table}");
}

/// Two servers of which each hands over to another process on SIGUSR1.
fn with_successors(host: &Host) -> App {
    let script = host.write("successor.py", include_str!("../fixtures/successor.py"));
    App::running(2, ["/usr/bin/python3", &script, "{name}"].map(str::to_owned).to_vec())
}

/// Has it hand over, and waits until that is known.
#[track_caller]
fn hand_over(up: &Up<'_>, server: &str) -> [Process; 2] {
    let before = up.process(server);
    before.signal(Signal::USR1);
    let after = wait_for("another main process", seconds(10.0), || {
        up.process_if_any(server).filter(|process| *process != before)
    });
    assert_eq!(after.parent(), Some(before.pid));
    [before, after]
}

#[test]
fn the_process_that_a_server_names_is_its_main_one_from_then_on() {
    let host = Host::new();
    let mut app = with_successors(&host);
    app.server = "restart = { healthy_after = \"1ms\" }".to_owned();
    let up = host.up(&app);
    let [before, after] = hand_over(&up, "app/1");
    let held = client::hold(V4, 4);
    let its: Vec<_> = held.iter().filter(|client| client.server == "1").map(|client| client.pid).collect();
    assert_eq!(its, [after.pid, after.pid]);
    // The one before is nobody's business, for the next distributor either.
    up.kill_distributor();
    assert_eq!(up.process("app/1"), after);
    assert!(before.runs());
    before.kill(seconds(5.0));
    stays("main process", Duration::from_millis(1500), Some(after), || up.process_if_any("app/1"));
    assert_eq!((restarts(&up), up.service().states()), (vec![0, 0], vec!["ready", "ready"]));
    // And its end is the server's. Its parent is dead, so that it is known how it ended.
    after.kill(seconds(5.0));
    wait_until_eq("restarts", seconds(10.0), vec![1, 0], || restarts(&up));
    up.wait_ready();
    let reason = reason(&up, "app/1");
    assert!(reason.contains("was killed by SIGKILL after"), "{reason}");
}

#[test]
fn the_process_that_a_server_names_is_the_one_that_is_stopped() {
    let host = Host::new();
    let up = host.up(&with_successors(&host));
    let all = [hand_over(&up, "app/1"), hand_over(&up, "app/2")].concat();
    let log = up.log();
    up.stop();
    assert!(all.iter().all(|process| !process.runs()));
    assert!(!log.contains("watch"), "{log}");
}

#[test]
fn a_monitor_that_was_killed_is_followed_by_one_that_watches_the_named_process() {
    let host = Host::new();
    let app = with_successors(&host);
    let up = host.up(&app);
    let [before, after] = hand_over(&up, "app/1");
    let distributor = up.distributor();
    up.signal(Signal::KILL);
    wait_for("the distributor to end too", seconds(10.0), || (!distributor.runs()).then_some(()));
    up.forget();
    let up = host.up(&app);
    assert_eq!(up.process("app/1"), after);
    assert!(before.runs());
    after.kill(seconds(5.0));
    wait_until_eq("restarts", seconds(10.0), vec![1, 0], || restarts(&up));
    up.wait_ready();
}

#[test]
fn a_process_of_somebody_else_is_not_believed_to_be_the_main_one() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let server = up.process("app/1");
    let mut client = Client::open(V4).expect("connect");
    client.say(&format!("notify MAINPID={}", std::process::id())).expect("tell it");
    wait_for("a line in the log", seconds(10.0), || up.log().contains("ignores it").then_some(()));
    assert_eq!(up.process("app/1"), server);
    assert!(client.is_served());
}
