//! `dist-ctl adopt` and `release`: servers that somebody else started join a service live, and
//! leave it alive.

#![forbid(unsafe_code)]

use std::{
    process::{Command, Stdio},
    thread,
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4},
    load::under_load,
    own::Own,
    process::{Process, Signal},
    wait::{fewer, seconds, stays, wait_for, wait_until_eq},
};

/// A service that waits for its address.
fn waiting(host: &Host, app: App) -> Up<'_> {
    let app = App { service: "occupied = \"wait\"\n".into(), ..app };
    host.start(&app)
}

#[test]
fn a_server_that_runs_is_adopted_under_load_and_given_back() {
    let host = Host::new();
    let own = Own::start(&host);
    let mut earlier = client::hold(V4, 5);
    let up = waiting(&host, App::of(&host, 2));
    let told = up.service();
    assert!(told.servers.iter().all(|server| server.state == "stopped"), "{told:#?}");
    assert!(told.servers[0].reason.as_deref().is_some_and(|why| why.contains("dist-ctl adopt app --pid")));
    under_load(8, |load| {
        up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
        up.wait_ready();
        load.serves(100);
    });
    assert!(earlier.iter_mut().all(Client::is_served) && own.runs());
    up.wait_connections(&[0, 0, 0]);
    // Steered and counted like the others.
    let held = client::hold(V4, 30);
    assert_eq!(up.connections(), [10, 10, 10]);
    let old = up.service().server("app/old").clone();
    assert_eq!((old.state.as_str(), old.pid), ("ready", Some(own.0.id() as i32)));
    drop(held);
    up.wait_connections(&[0, 0, 0]);
    // It serves on when the others have stopped.
    under_load(8, |load| {
        up.stop();
        load.serves(100);
    });
    assert!(earlier.iter_mut().all(Client::is_served) && own.runs());
    let alone = client::hold(V4, 10);
    assert!(alone.iter().all(|client| client.server == "old"));
}

#[test]
fn an_adopted_server_keeps_its_limit_with_what_it_had_before() {
    let host = Host::new();
    let own = Own::start(&host);
    let earlier = client::hold(V4, 3);
    let up = waiting(&host, App { limit: Some(5), ..App::of(&host, 1).refusing() });
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let held = client::hold(V4, 7);
    let by_name = client::by_name(&held);
    assert_eq!((by_name["1"], by_name["old"]), (5, 2), "3 of its 5 places are taken");
    Client::open(V4).expect_err("no place is left");
    drop(earlier);
    let more = wait_for("its places", seconds(10.0), || Client::open(V4).ok());
    assert_eq!(more.server, "old");
    drop((held, more));
    up.run(&["limit", "app/old", "1"]).expect_done();
    let held = wait_for("its new limit", seconds(5.0), || {
        let held: Vec<_> = (0..6).map_while(|_| Client::open(V4).ok()).collect();
        (held.len() == 6).then_some(held)
    });
    assert_eq!(client::by_name(&held)["old"], 1);
}

#[test]
fn an_adopted_server_is_checked_like_the_others_and_is_never_killed_when_it_hangs() {
    let host = Host::new();
    let own = Own::start(&host);
    let mut app = App::of(&host, 1);
    app.server = "stall_after = \"1s\"\nhang_kill = \"300ms\"".to_owned();
    app.tables = "[service.app.check]\ntype = \"tcp\"\ninterval = \"50ms\"".to_owned();
    let up = waiting(&host, app);
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let old = || up.service().server("app/old").clone();
    wait_for("20 checks of it", seconds(20.0), || {
        old().check.filter(|check| check.good_total >= 20 && check.bad_total == 0).map(drop)
    });
    assert_eq!((old().connections, old().connections_total), (0, 0));
    let process = Process::find(own.0.id() as i32).expect("it runs");
    process.freeze(seconds(5.0));
    let hangs = client::stand(&[V4], 2);
    assert!(up.wait_state("app/old", "stalled").reason.is_some_and(|reason| !reason.contains("killed")));
    stays("its state", seconds(1.5), "stalled".to_owned(), || old().state);
    process.signal(Signal::CONT);
    up.wait_state("app/old", "ready");
    let mut served: Vec<_> =
        hangs.into_iter().map(|it| Client::greeted(it).expect("served").server).collect();
    served.sort();
    assert_eq!(served, ["1", "old"]);
}

#[test]
fn a_released_server_keeps_its_connections_and_gets_no_new_ones() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let mut held = client::hold(V4, 10);
    assert_eq!(client::by_name(&held)["old"], 5);
    up.run(&["release", "app/1"]).expect_refusal(2, &["app/1", "was not adopted"]);
    under_load(8, |_| {
        up.run(&["release", "app/old"]).expect_done();
        thread::sleep(seconds(0.2));
    });
    assert!(held.iter_mut().all(Client::is_served) && own.runs());
    assert!(client::hold(V4, 10).iter().all(|client| client.server == "1"));
    up.run(&["release", "app/old"]).expect_refusal(2, &["no server is called app/old"]);
    drop(held);
    up.wait_connections(&[0]);
    // It comes back under the same name.
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    assert_eq!(client::by_name(&client::hold(V4, 10))["old"], 5);
}

#[test]
fn an_adopted_server_outlives_the_control_plane() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let held = client::hold(V4, 10);
    let old = up.distributor();
    under_load(8, |_| {
        old.kill(seconds(5.0));
        up.wait_next_distributor(old);
    });
    wait_until_eq("connections", seconds(5.0), [5, 5].to_vec(), || up.connections());
    assert!(own.runs());
    // And the monitor, too.
    let (monitor, distributor) = (up.monitor(), up.distributor());
    monitor.kill(seconds(5.0));
    wait_for("the end of the distributor", seconds(5.0), || (!distributor.runs()).then_some(()));
    up.forget();
    let file = host.path_text("dist-ctl.toml");
    let up = host.start_command(host.command(&["up", "-f", &file]));
    up.wait_ready();
    assert_eq!(up.connections(), [5, 5]);
    assert_eq!(up.service().server("app/old").pid, Some(own.0.id() as i32));
    drop(held);
    up.wait_connections(&[0, 0]);
    up.stop();
    assert!(own.runs());
}

#[test]
fn without_a_command_an_adopted_server_is_gone_when_it_ends() {
    let host = Host::new();
    let mut own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    own.0.kill().and_then(|()| own.0.wait()).expect("end it");
    wait_until_eq("servers", seconds(5.0), vec!["app/1".to_owned()], || {
        up.service().servers.iter().map(|server| server.name.clone()).collect()
    });
    assert!(client::hold(V4, 4).iter().all(|client| client.server == "1"));
}

#[test]
fn with_a_command_an_adopted_server_is_started_again_and_stopped_like_any_other() {
    let host = Host::new();
    let mut own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    let program = host.test_server_for_all();
    let words = ["adopt", "app", "--pid", &own.pid(), "--name", "old", "--"];
    let command = [program.as_str(), "--name", "new", "--listen", "[::]:8080"];
    up.run(&[&words[..], &command].concat()).expect_done();
    up.wait_ready();
    own.0.kill().and_then(|()| own.0.wait()).expect("end it");
    wait_for("the next instance", seconds(10.0), || {
        let service = up.service();
        (service.is_ready() && service.server("app/old").restarts == 1).then_some(())
    });
    let process = up.process("app/old");
    assert_eq!(client::by_name(&client::hold(V4, 4))["new"], 2);
    up.stop();
    assert!(!process.runs());
}

#[test]
fn a_service_that_waits_begins_when_the_address_is_free() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 2));
    assert_eq!(up.service().states(), ["stopped", "stopped"]);
    drop(own);
    up.wait_ready();
    assert_eq!(client::by_name(&client::hold(V4, 4)).len(), 2);
}

#[test]
fn what_cannot_be_adopted_is_refused_and_left_as_it_was() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    let refused = |words: &[&str], said: &[&str]| {
        up.run(words).expect_refusal(2, said);
    };
    let mut silent = Command::new("sleep").arg("60").spawn().expect("start a process");
    let pid = silent.id().to_string();
    refused(&["adopt", "app", "--pid", "2147483646"], &["adopt process 2147483646", "there is none"]);
    refused(&["adopt", "app", "--pid", &pid], &["sleep", "does not listen", "[::]:8080"]);
    silent.kill().and_then(|()| silent.wait()).expect("end it");
    refused(&["adopt", "shop", "--pid", &own.pid()], &["no service is called shop", "app"]);
    assert!(client::hold(V4, 3).iter().all(|client| client.server == "old"));
    up.stop();
    assert!(own.runs());
}

#[test]
fn a_released_server_gets_its_address_back_whoever_was_killed_since() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    up.run(&["release", "app/old"]).expect_done();
    up.replace_distributor();
    up.stop();
    assert!(client::hold(V4, 10).iter().all(|client| client.server == "old"));
}

#[test]
fn down_of_a_killed_instance_gives_an_adopted_server_its_address_back() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App { limit: Some(5), ..App::of(&host, 1) });
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let (monitor, distributor) = (up.monitor(), up.distributor());
    monitor.kill(seconds(5.0));
    wait_for("the end of the distributor", seconds(5.0), || (!distributor.runs()).then_some(()));
    up.forget();
    host.run(&["down"]).expect_done();
    let alone = client::hold(V4, 20);
    assert!(alone.iter().all(|client| client.server == "old") && own.runs());
}

#[test]
fn a_server_that_was_adopted_with_a_command_outlives_the_distributor_that_restarted_it() {
    let host = Host::new();
    let mut own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    let program = host.test_server_for_all();
    let words = ["adopt", "app", "--pid", &own.pid(), "--name", "old", "--"];
    up.run(&[&words[..], &[program.as_str(), "--name", "new", "--listen", "[::]:8080"]].concat())
        .expect_done();
    up.wait_ready();
    own.0.kill().and_then(|()| own.0.wait()).expect("end it");
    wait_for("the next instance", seconds(10.0), || {
        let service = up.service();
        (service.is_ready() && service.server("app/old").restarts == 1).then_some(())
    });
    let process = up.process("app/old");
    up.replace_distributor();
    assert_eq!(up.process("app/old"), process);
    assert_eq!(client::by_name(&client::hold(V4, 4))["new"], 2);
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_changed() {
    let host = Host::new();
    let own = Own::start(&host);
    let app = App::of(&host, 1);
    let up = waiting(&host, app.named([("big", String::new())]));
    let pid = own.pid();
    up.run(&["adopt", "app", "--pid", &pid, "--name", "big"])
        .expect_refusal(2, &["a server is called app/big already", "--name"]);
    let ended = up.run(&["adopt", "app", "--pid", &pid, "--name", "1"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("not of digits only"), "{ended:?}");
    // Nobody else could bind there if it had not been made to share.
    let shared = std::net::TcpListener::bind("[::]:8080").expect_err("it has the address for itself");
    assert_eq!(shared.kind(), std::io::ErrorKind::AddrInUse);
    up.run(&["adopt", "app", "--pid", &pid, "--name", "old"]).expect_done();
    up.wait_ready();
    up.run(&["adopt", "app", "--pid", &pid, "--name", "other"])
        .expect_refusal(2, &["belongs to a server of app already"]);
    assert!(own.runs());
}

#[test]
fn an_adopted_server_that_no_record_knows_is_found_and_given_back() {
    let host = Host::new();
    let own = Own::start(&host);
    let mut earlier = client::hold(V4, 2);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let mut held = client::hold(V4, 10);
    let (monitor, distributor) = (up.monitor(), up.distributor());
    monitor.kill(seconds(5.0));
    wait_for("the end of the distributor", seconds(5.0), || (!distributor.runs()).then_some(()));
    std::fs::write(up.runtime().join("record.json"), "{").expect("spoil the record");
    up.forget();
    let file = host.path_text("dist-ctl.toml");
    let up = host.start_command(host.command(&["up", "-f", &file]));
    up.wait_ready();
    let name = format!("app/adopted-{}", own.pid());
    assert_eq!(up.service().server(&name).pid, Some(own.0.id() as i32));
    let more = client::hold(V4, 10);
    assert_eq!(client::by_name(&more)["old"], 5);
    wait_until_eq("connections", seconds(5.0), [10, 10].to_vec(), || up.connections());
    drop(more);
    up.wait_connections(&[5, 5]);
    assert!(earlier.iter_mut().chain(&mut held).all(Client::is_served));
    drop(held);
    up.stop();
    assert!(own.runs());
    assert!(client::hold(V4, 20).iter().all(|client| client.server == "old"));
}

#[test]
fn an_adopted_server_that_is_alone_is_kept_by_the_next_distributor() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    // All that is in the service's cgroup is killed, and who would start it again.
    let old = up.distributor();
    old.freeze(seconds(5.0));
    for process in tests::process::in_cgroup(&up.cgroup()) {
        process.kill(seconds(5.0));
    }
    old.kill(seconds(5.0));
    up.wait_next_distributor(old);
    assert_eq!(up.service().server("app/old").pid, Some(own.0.id() as i32));
    assert_eq!(client::by_name(&client::hold(V4, 10))["old"], 5);
    up.stop();
    assert!(client::hold(V4, 5).iter().all(|client| client.server == "old"));
}

/// A master with so many workers on one listener, as servers that fork have them. It starts a worker
/// again that has ended.
const PREFORK: &str = "\
import os, signal, socket
listener = socket.create_server(('', 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
def serve(connection):
    try:
        listener.close()
        connection.sendall(f'python {os.getpid()}\\n'.encode())
        while connection.recv(4096):
            pass
    finally:
        os._exit(0)
def work():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            serve(connection)
        connection.close()
workers = set()
while True:
    while len(workers) < 2:
        pid = os.fork()
        if pid == 0:
            work()
        workers.add(pid)
    workers.discard(os.wait()[0])
";

fn python(host: &Host, words: &[&str], text: &str) -> Own {
    let script = host.write("server.py", text);
    let mut command = Command::new(words[0]);
    let child = command.args(&words[1..]).arg(&script).stdin(Stdio::null()).spawn().expect("start a server");
    wait_for("the server", seconds(20.0), || client::connect(V4).ok().map(drop));
    Own(child)
}

/// Whether the listener of a process has SO_REUSEPORT.
fn is_shared(pid: i32) -> bool {
    let found = distributor_user::listener::find(&[pid as u32]).expect("look at its sockets");
    let listener = found.iter().find(|found| found.facts.address.port() == 8080);
    listener.expect("it listens").facts.shared
}

#[test]
fn a_server_with_workers_is_adopted_through_any_of_them_and_outlives_that_one() {
    let host = Host::new();
    let own = python(&host, &["python3"], PREFORK);
    let master = Process::find(own.0.id() as i32).expect("it runs");
    let worker = wait_for("a worker", seconds(10.0), || master.children().first().copied());
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &worker.pid.to_string(), "--name", "old"]).expect_done();
    up.wait_ready();
    assert_eq!(up.service().server("app/old").pid, Some(master.pid), "its master is watched");
    worker.kill(seconds(5.0));
    thread::sleep(seconds(0.3));
    up.wait_ready();
    // The master dies, and its workers serve on.
    let workers = wait_for("another worker", seconds(10.0), || {
        let workers = master.children();
        (workers.len() == 2 && !workers.contains(&worker) && workers.iter().all(|worker| worker.runs()))
            .then_some(workers)
    });
    master.signal(Signal::KILL);
    wait_for("another process of it", seconds(10.0), || {
        let pid = up.service().server("app/old").pid?;
        workers.iter().any(|worker| worker.pid == pid).then_some(())
    });
    up.wait_ready();
    let greeted =
        |clients: &[std::net::TcpStream]| clients.iter().filter(|it| client::is_greeted(it)).count();
    let clients: Vec<_> = (0..10).map(|_| client::connect(V4).expect("connect")).collect();
    wait_until_eq("those who are greeted", seconds(10.0), 10, || greeted(&clients));
    assert_eq!(up.connections(), [5, 5]);
    drop(clients);
    assert!(is_shared(workers[0].pid));
    up.stop();
    assert!(!is_shared(workers[0].pid), "it has its address for itself");
    let clients: Vec<_> = (0..4).map(|_| client::connect(V4).expect("it serves on")).collect();
    wait_until_eq("those who are greeted", seconds(10.0), 4, || greeted(&clients));
    for worker in workers {
        for process in worker.children().into_iter().chain([worker]) {
            process.kill(seconds(5.0));
        }
    }
}

#[test]
fn a_server_in_a_shell_is_adopted_by_the_shell_and_given_back() {
    let host = Host::new();
    let script = PREFORK.replace("while True:\n    while len", "work()\nwhile True:\n    while len");
    let mut own = python(&host, &["sh", "-c", "python3 $0; true"], &script);
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
    up.wait_ready();
    let pid = up.service().server("app/old").pid.expect("a process");
    let server = Process::find(pid).expect("it runs");
    assert_eq!(server.parent(), Some(own.0.id() as i32));
    let clients: Vec<_> = (0..4).map(|_| client::connect(V4).expect("connect")).collect();
    assert_eq!(up.connections(), [2, 2]);
    drop(clients);
    assert!(is_shared(pid));
    up.stop();
    assert!(!is_shared(pid), "it has its address for itself");
    let served = client::connect(V4).expect("it serves on");
    wait_until_eq("that he is greeted", seconds(10.0), true, || client::is_greeted(&served));
    for process in server.children().into_iter().chain([server]) {
        process.kill(seconds(5.0));
    }
    own.0.wait().expect("the shell ends");
}

#[test]
fn what_is_of_dist_ctl_itself_is_not_adopted() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let keeper = tests::process::in_cgroup(&up.cgroup())
        .into_iter()
        .find(|process| process.arguments().get(1).is_some_and(|verb| verb == "keep"));
    let own = [keeper.expect("there is a keeper"), up.distributor(), up.monitor(), up.process("app/1")];
    for process in own {
        up.run(&["adopt", "app", "--pid", &process.pid.to_string()])
            .expect_refusal(2, &["a server or a part of this dist-ctl already"]);
    }
    assert_eq!(up.service().servers.len(), 1);
}

#[test]
fn whoever_is_adopted_twice_is_in_the_end_as_before_the_first_time() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = waiting(&host, App::of(&host, 1));
    for _ in 0..2 {
        up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
        up.wait_ready();
        up.run(&["release", "app/old"]).expect_done();
    }
    // All are served while the service stops, though nobody but the released one can at the end.
    under_load(8, |load| {
        up.stop();
        load.serves(100);
    });
    assert!(own.runs() && !is_shared(own.0.id() as i32));
}

#[test]
fn an_adoption_that_is_interrupted_is_finished_and_nobody_waits_for_ever() {
    let host = Host::new();
    let delays = [0.0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.3];
    for delay in delays.into_iter().step_by(delays.len() / fewer(delays.len(), 3)) {
        let own = Own::start(&host);
        let up = waiting(&host, App { limit: Some(4), ..App::of(&host, 1) });
        let old = up.distributor();
        under_load(8, |load| {
            thread::scope(|scope| {
                let asked = scope.spawn(|| up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]));
                thread::sleep(seconds(delay));
                old.kill(seconds(5.0));
                wait_for("the next distributor", seconds(10.0), || (up.distributor() != old).then_some(()));
                up.wait_answering();
                let ended = asked.join().expect("it ends");
                // The command may have come to nobody; then nothing was begun.
                if up.service().servers.iter().all(|server| server.name != "app/old") {
                    assert_ne!(ended.code, Some(0), "{ended}");
                    up.run(&["adopt", "app", "--pid", &own.pid(), "--name", "old"]).expect_done();
                }
            });
            up.wait_ready();
            load.serves(50);
        });
        wait_until_eq("waiting", seconds(10.0), 0, || up.service().waiting.now);
        up.wait_connections(&[0, 0]);
        // What it had before takes places of its limit; once a second it is counted again.
        wait_until_eq("earlier", seconds(10.0), 0, || up.service().server("app/old").earlier);
        assert_eq!(client::by_name(&client::hold(V4, 6))["old"], 3);
        up.stop();
        assert!(own.runs() && !is_shared(own.0.id() as i32), "after {delay} s");
    }
}

/// A node primary that passes connections on to its workers.
const CLUSTER: &str = "\
const cluster = require('cluster'), net = require('net');
if (cluster.isPrimary) { cluster.fork(); cluster.fork(); }
else net.createServer(socket => { socket.on('error', () => {}); socket.write(`node ${process.pid}\\n`); }).listen(8080);
";

#[test]
fn a_server_whose_workers_have_no_listener_is_adopted_through_one() {
    let host = Host::new();
    let own = python(&host, &["node"], CLUSTER);
    let primary = Process::find(own.0.id() as i32).expect("it runs");
    let worker = wait_for("a worker", seconds(10.0), || primary.children().first().copied());
    let up = waiting(&host, App::of(&host, 1));
    up.run(&["adopt", "app", "--pid", &worker.pid.to_string(), "--name", "old"]).expect_done();
    up.wait_ready();
    assert_eq!(up.service().server("app/old").pid, Some(primary.pid));
    let clients: Vec<_> = (0..6).map(|_| client::connect(V4).expect("connect")).collect();
    wait_until_eq("connections", seconds(5.0), [3, 3].to_vec(), || up.connections());
    drop(clients);
    let workers = primary.children();
    up.stop();
    assert!(!is_shared(primary.pid));
    primary.kill(seconds(5.0));
    workers.into_iter().for_each(|worker| worker.kill(seconds(5.0)));
}
