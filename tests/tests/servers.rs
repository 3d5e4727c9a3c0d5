//! Real servers that nobody here wrote or modified share one port, and each serves its part.

#![forbid(unsafe_code)]

use std::{collections::BTreeMap, net::TcpStream};

use tests::{
    app::App,
    client,
    host::{Host, Up, V4, V6, heavy},
    http,
    process::{self, Process, Signal},
    real::{self, Daemon, Nginx},
    wait::{seconds, wait_until_eq},
};

/// What each server holds at a time. Python's accept queue takes no more, and what comes before
/// it has accepted would be tried again a second later, maybe with another server.
const EACH: usize = 5;

/// Each of these servers holds its connections at the same time, answers on each of them, and
/// all counts return to 0.
#[track_caller]
fn each_serves_its_part(up: &Up<'_>, servers: usize) {
    let total = EACH * servers;
    let held: Vec<TcpStream> = (0..total)
        .map(|number| {
            let address = if number % 2 == 0 || !listens_on_v6(up) { V4 } else { V6 };
            client::connect(address).unwrap_or_else(|error| panic!("connection {number}: {error}"))
        })
        .collect();
    up.wait_connections(&vec![EACH as u64; servers]);
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    for connection in held {
        let answer = http::ask(connection).expect("an answer");
        *answers.entry(answer).or_default() += 1;
    }
    let expected: BTreeMap<String, usize> = (1..=servers).map(|index| (format!("{index}\n"), EACH)).collect();
    assert_eq!(answers, expected);
    up.wait_connections(&vec![0; servers]);
    let service = up.service();
    assert_eq!(service.totals(), vec![EACH as u64; servers]);
    // It was the policy that chose each time, and no way around it.
    assert_eq!(
        service.outcomes(["selected", "next_best", "wait_no_server", "wait_select_failed", "established"]),
        [total as u64, 0, 0, 0, total as u64]
    );
}

fn listens_on_v6(up: &Up<'_>) -> bool {
    up.service().listen.iter().any(|address| address.starts_with('['))
}

#[test]
fn three_pythons_share_a_port() {
    let host = Host::new();
    let mut app = App::running(3, real::python(&host, 3));
    // Where `python3 -m http.server` listens when it is told nothing.
    app.listen = vec!["0.0.0.0:8080".to_owned()];
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
}

#[test]
fn three_nginx_with_two_workers_share_a_port() {
    let host = Host::new();
    let up = host.up(&App::running(3, real::nginx(&host, 3, Nginx::Shared, Daemon::Off)));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_nginx_with_a_listener_for_each_worker_share_a_port() {
    let host = Host::new();
    let up = host.up(&App::running(3, real::nginx(&host, 3, Nginx::PerWorker, Daemon::Off)));
    each_serves_its_part(&up, 3);
    // Both listeners of a server get their part of what the server gets.
    let workers = up.process("app/1").children();
    assert_eq!(workers.len(), 2);
    let before: Vec<usize> = workers.iter().map(|worker| sockets(*worker)).collect();
    let held: Vec<TcpStream> = (0..30).map(|_| client::connect(V4).expect("connect")).collect();
    up.wait_connections(&[10, 10, 10]);
    wait_until_eq("sockets that each worker has more", seconds(5.0), vec![5, 5], || {
        workers.iter().zip(&before).map(|(worker, before)| sockets(*worker) - before).collect()
    });
    drop(held);
}

#[test]
fn three_nginx_in_the_background_share_a_port() {
    let host = Host::new();
    let up = host.up(&App::running(3, real::nginx(&host, 3, Nginx::Shared, Daemon::On)));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_nginx_of_another_user_share_a_port() {
    let host = Host::new();
    let mut app = App::running(3, real::nginx(&host, 3, Nginx::Shared, Daemon::Off));
    app.server = "user = \"www-data\"".to_owned();
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
    let worker = up.process("app/1").children()[0];
    let user = worker.fact("Uid");
    assert!(!user.split_whitespace().any(|uid| uid == "0"), "the worker's users are {user}");
}

#[test]
fn three_nodes_share_a_port() {
    let host = Host::new();
    let up = host.up(&App::running(3, real::node(&host)));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_java_servers_with_threads_share_a_port() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&App::running(3, real::java_threads()));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_java_servers_with_a_selector_share_a_port() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&App::running(3, real::java_channels()));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_java_servers_inherit_their_listener_as_standard_input() {
    let _alone = heavy();
    let host = Host::new();
    let mut app = App::running(3, real::java_inherited());
    app.socket = Some("stdin");
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
}

#[test]
fn three_gunicorns_share_a_port() {
    let host = Host::new();
    let up = host.up(&App::running(3, real::gunicorn(&host)));
    each_serves_its_part(&up, 3);
}

#[test]
fn three_gunicorns_inherit_their_listener() {
    let host = Host::new();
    let mut app = App::running(3, real::gunicorn(&host));
    app.socket = Some("systemd");
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
}

#[test]
fn three_pythons_inherit_their_listener() {
    let host = Host::new();
    let mut app = App::running(3, real::python_inherited(&host));
    app.socket = Some("systemd");
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
}

#[test]
fn three_pythons_of_another_user_inherit_their_listener() {
    let host = Host::new();
    let mut app = App::running(3, real::python_inherited(&host));
    app.socket = Some("systemd");
    app.server = "user = \"nobody\"".to_owned();
    let up = host.up(&app);
    each_serves_its_part(&up, 3);
}

#[test]
fn two_tomcats_share_a_port() {
    let _alone = heavy();
    let host = Host::new();
    let tomcat = real::tomcat(&host, 2);
    let mut app = App::running(2, tomcat.command);
    app.server = tomcat.environment;
    let up = host.up(&app);
    each_serves_its_part(&up, 2);
}

#[test]
fn rust_servers_inherit_two_listeners_each() {
    let host = Host::new();
    let mut app = App::with(&host, 3, &["--inherited"]);
    app.listen = vec!["[::]:8080".to_owned(), "127.0.0.1:9090".to_owned()];
    app.socket = Some("systemd");
    let up = host.up(&app);
    let other = "127.0.0.1:9090".parse().expect("an address");
    let held: Vec<_> =
        (0..60).map(|number| client::Client::open(if number % 2 == 0 { V4 } else { other })).collect();
    let held = held.into_iter().collect::<Result<Vec<_>, _>>().expect("all are served");
    up.wait_connections(&[20, 20, 20]);
    assert!(client::by_name(&held).values().all(|count| *count == 20));
}

#[test]
fn a_server_with_several_listeners_of_its_own_shares_out_to_all_of_them() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 2, &["--listen", "[::]:8080", "--listeners", "4"]));
    let held = client::hold(V4, 80);
    up.wait_connections(&[40, 40]);
    assert_eq!(client::by_name(&held), [("1".to_owned(), 40), ("2".to_owned(), 40)].into());
    drop(held);
    up.wait_connections(&[0, 0]);
}

#[test]
fn a_killed_nginx_master_is_replaced_though_its_workers_live() {
    let host = Host::new();
    let up = host.up(&App::running(2, real::nginx(&host, 2, Nginx::Shared, Daemon::Off)));
    let master = up.process("app/1");
    // It listens before it has any.
    wait_until_eq("the workers", seconds(10.0), 2, || master.children().len());
    let workers = master.children();
    // The workers go on accepting from the old listener, and are nobody's children.
    master.kill(seconds(5.0));
    let replaced = tests::wait::wait_for("a new master", seconds(20.0), || {
        let service = up.service();
        let server = service.server("app/1");
        (server.state == "ready" && server.pid != Some(master.pid)).then(|| server.clone())
    });
    assert_eq!(replaced.restarts, 1);
    assert!(workers.iter().all(|worker| !worker.runs()), "workers of the dead master live on");
    let cgroup = up.cgroup().join("app");
    let left = process::in_cgroup(&cgroup);
    assert!(!left.iter().any(|process| workers.contains(process)));
    for _ in 0..20 {
        http::get(V4).expect("an answer");
    }
}

#[test]
fn a_gunicorn_that_is_stopped_gracefully_loses_no_connection() {
    let host = Host::new();
    let mut app = App::running(2, real::gunicorn(&host));
    app.server = "restart = { delay = \"50ms\" }".to_owned();
    let up = host.up(&app);
    let master = up.process("app/1");
    let asked = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            (0..200).map(|_| http::get(V4)).collect::<Result<Vec<_>, _>>().map(|answers| answers.len())
        });
        master.signal(Signal::TERM);
        asking.join().expect("asking does not panic")
    });
    assert_eq!(asked.expect("every request is answered"), 200);
}

/// How many sockets a process has open.
fn sockets(process: Process) -> usize {
    process.descriptors().values().filter(|target| target.starts_with("socket:")).count()
}
