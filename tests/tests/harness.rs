//! The harness itself, without the product: what the other tests take for granted.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tests::{
    client::{self, Client, Ending},
    host::{Host, V4, V6},
    leftover,
    network::Clients,
    process::{Process, Signal, signal_child},
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// A test server of its own, killed at the end.
struct Alone(Child);

impl Alone {
    fn start(host: &Host, words: &[&str]) -> Self {
        let inside = host.inside_file("1");
        let mut command = Command::new(host.test_server());
        command.args(["--name", "1", "--inside", &inside]).args(words).stdin(Stdio::null());
        let server = Self(command.spawn().expect("start the test server"));
        wait_for("the server to listen", seconds(5.0), || client::connect(V6).ok());
        wait_until_eq("accepted", seconds(5.0), 1, || host.inside("1").accepted);
        wait_until_eq("held", seconds(5.0), 0, || host.inside("1").now);
        server
    }

    fn process(&self) -> Process {
        Process::find(self.0.id() as i32).expect("the test server runs")
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        signal_child(&self.0, Signal::KILL);
        let _ = self.0.wait();
    }
}

#[test]
fn every_ending_is_seen_by_the_server() {
    let host = Host::new();
    let server = Alone::start(&host, &["--listen", "[::]:8080"]);
    for ending in Ending::ALL {
        let before = host.inside("1").accepted;
        ending.happen(V4).unwrap_or_else(|error| panic!("{ending:?}: {error}"));
        if ending == Ending::ResetAtOnce {
            // It may be accepted, now or soon, or never. Whoever comes behind it in the queue
            // and is served shows that its time is over.
            Client::open(V4).expect("connect");
        } else {
            wait_until_eq("accepted", seconds(5.0), before + 1, || host.inside("1").accepted);
        }
        wait_until_eq("held", seconds(5.0), 0, || host.inside("1").now);
    }
    assert!(server.process().runs());
}

#[test]
fn a_cut_client_stays_half_open_until_it_is_mended() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let _server = Alone::start(&host, &["--listen", "[::]:8080"]);
    for (source, target) in [(clients.v4(7), clients.server_v4()), (clients.v6(7), clients.server_v6())] {
        let target = (target, 8080).into();
        clients.cut(7).expect("cut the wire");
        let begun = clients.network.run(|| client::begin(target, Some(source), 20)).expect("send the SYNs");
        stays("handshakes that ended", Duration::from_millis(300), 0, || begun.ended());
        clients.mend(7).expect("mend the wire");
        let served = begun.greeted();
        assert_eq!(served.len(), 20);
        assert!(served.iter().all(|client| client.seen_as.ip() == source));
    }
    // The other clients were served all the time.
    let other = clients.network.run(|| Client::open_from(clients.v4(8), (clients.server_v4(), 8080).into()));
    assert_eq!(other.expect("a client on a whole wire").server, "1");
}

#[test]
fn a_frozen_server_keeps_its_connections_in_the_queue() {
    let host = Host::new();
    let server = Alone::start(&host, &["--listen", "[::]:8080"]);
    let accepted = host.inside("1").accepted;
    server.process().freeze(seconds(5.0));
    let queued: Vec<_> = (0..100).map(|_| client::connect(V4).expect("a place in the queue")).collect();
    assert_eq!(host.inside("1").accepted, accepted);
    server.process().signal(Signal::CONT);
    let served = queued.into_iter().map(Client::greeted).collect::<Result<Vec<_>, _>>();
    assert_eq!(served.expect("all are served").len(), 100);
}

#[test]
fn what_a_killed_test_left_is_removed_by_the_next() {
    let host = Host::new();
    // A process that is gone, as the owner of a host: its id and start are nobody's now.
    let mut gone = Command::new("true").spawn().expect("start true");
    let owner = Process::find(gone.id() as i32).expect("it was not waited for yet");
    gone.wait().expect("wait for true");
    let directory = PathBuf::from(format!("/run/dist-ctl-test-{}-{}-1", owner.pid, owner.started));
    fs::create_dir_all(directory.join("runtime-main")).expect("make a host's directory");
    let mut left = Command::new("sleep").arg("600").spawn().expect("start sleep");
    let process = Process::find(left.id() as i32).expect("it sleeps");
    leftover::note(&directory, process).expect("note the process");
    let cgroup = leftover::cgroup(&directory.join("runtime-main"));
    fs::create_dir_all(cgroup.join("app/1.1")).expect("make cgroups");
    fs::write(cgroup.join("app/1.1/cgroup.procs"), process.pid.to_string()).expect("enter the cgroup");

    leftover::clean_after_killed_tests();

    assert!(!directory.exists() && !cgroup.exists());
    assert!(!process.runs());
    let _ = left.wait();
    assert!(host.path("inside").exists(), "a living test's directory is not touched");
}
