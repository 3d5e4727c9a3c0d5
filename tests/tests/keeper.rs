//! The keeper: whoever waits in its rooms waits on, whatever else dies.

#![forbid(unsafe_code)]

use std::{fs, io::ErrorKind, net::TcpStream, time::Duration};

use aya::maps::{HashMap, Map, MapData};
use distributor_ebpf::{
    contract::{Home, VERSION},
    select::NO_SLOT,
};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tests::{
    app::App,
    client::{self, Client, Line},
    host::{Host, Up, V4, V6},
    leftover,
    process::{self, Process, Signal},
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// Servers with one place each.
fn app(host: &Host, servers: usize) -> App {
    App { limit: Some(1), ..App::of(host, servers) }
}

/// The keepers of the only service.
fn keepers(up: &Up<'_>) -> Vec<Process> {
    let mut keepers = process::in_cgroup(&up.cgroup().join("app/rooms"));
    keepers.retain(|process| process.runs());
    keepers
}

#[track_caller]
fn keeper(up: &Up<'_>) -> Process {
    let keepers = keepers(up);
    assert_eq!(keepers.len(), 1, "one keeper");
    keepers[0]
}

#[track_caller]
fn wait_waiting(up: &Up<'_>, wanted: usize) {
    wait_until_eq("those who wait", seconds(10.0), wanted as u64, || up.service().waiting.now);
}

/// Whether the log says that a trouble of these words is over.
fn over(up: &Up<'_>, words: &str) -> bool {
    up.log().lines().any(|line| line.contains("over after") && line.contains(words))
}

/// Those who have heard nothing, neither a greeting nor the end.
fn unheard(streams: &[TcpStream]) -> usize {
    let silent = |stream: &&TcpStream| {
        stream.set_nonblocking(true).expect("look without waiting");
        let heard = stream.peek(&mut [0]);
        stream.set_nonblocking(false).expect("wait again");
        heard.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    streams.iter().filter(silent).count()
}

#[track_caller]
fn serve_in_order(line: &mut Line, count: usize) {
    let order = line.turns(count).expect("all are served");
    assert_eq!(order, (0..count).collect::<Vec<_>>());
}

/// Neither has time to say anything.
fn kill_monitor_and_distributor(up: Up<'_>) {
    let both = [up.monitor(), up.distributor()];
    both.iter().for_each(|process| process.freeze(seconds(5.0)));
    both.iter().for_each(|process| process.signal(Signal::KILL));
    up.forget();
    wait_for("their end", seconds(5.0), || both.iter().all(|it| !it.runs()).then_some(()));
}

#[test]
fn who_waits_waits_on_when_monitor_and_distributor_are_killed_at_once() {
    let host = Host::new();
    let up = host.up(&app(&host, 1));
    let mut held = client::hold(V4, 1);
    let waiting = client::stand(&[V4, V6], 50);
    wait_waiting(&up, 50);
    let (keeper, socket) = (keeper(&up), up.runtime().join("keeper.app"));
    let server = up.process("app/1");
    kill_monitor_and_distributor(up);
    // Also when a terminal is closed, or a unit is stopped.
    for signal in [Signal::HUP, Signal::INT, Signal::TERM] {
        keeper.signal(signal);
    }
    stays("those who have heard nothing", Duration::from_millis(500), 50, || unheard(&waiting));
    assert!(keeper.runs() && socket.exists() && server.runs() && held[0].is_served());
    host.run(&["down"]).expect_done();
    assert!(!keeper.runs() && !socket.exists());
}

#[test]
fn the_rooms_close_when_nobody_comes_for_long() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &app(&host, 1).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_KEEPER_STAYS", "1000");
    let up = host.start_command(command);
    up.wait_ready();
    let held = client::hold(V4, 1);
    let waiting = client::stand(&[V4, V6], 5);
    wait_waiting(&up, 5);
    let keeper = keeper(&up);
    // As long as there is a distributor, it stays.
    stays("the keeper runs", Duration::from_millis(1500), true, || keeper.runs());
    kill_monitor_and_distributor(up);
    drop(held);
    wait_for("the end of the keeper", seconds(10.0), || (!keeper.runs()).then_some(()));
    // There is a place for one of them, and nobody to attend to the others.
    let served = waiting.into_iter().filter_map(|stream| Client::greeted(stream).ok()).count();
    assert_eq!(served, 1);
    host.run(&["down"]).expect_done();
}

#[test]
fn a_keeper_that_is_killed_is_replaced_and_nobody_notices() {
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let held = client::hold(V4, 2);
    let mut line = Line::behind(held, client::stand(&[V4, V6], 60)).expect("watch the line");
    wait_waiting(&up, 60);
    let old = keeper(&up);
    old.signal(Signal::KILL);
    wait_for("the next keeper", seconds(5.0), || keepers(&up).into_iter().find(|next| *next != old));
    // It was waited for.
    wait_for("the old one to be gone", seconds(5.0), || (!old.exists()).then_some(()));
    serve_in_order(&mut line, 20);
    // And it has what the old one had.
    let distributor = up.distributor();
    distributor.kill(seconds(5.0));
    up.wait_next_distributor(distributor);
    line.free();
    for number in 20..60 {
        assert_eq!(line.serve().expect("served"), number);
        line.free();
    }
    drop(line);
    up.wait_connections(&[0, 0]);
    assert_eq!(up.service().outcomes(["handed_over", "closed_waiting", "refused_no_room"]), [60, 0, 0]);
}

#[test]
fn a_keeper_that_is_stopped_when_the_distributor_dies_is_replaced_by_the_next_one() {
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let served = client::hold(V4, 2);
    let waiting = client::stand(&[V4], 20);
    wait_waiting(&up, 20);
    let (keeper, distributor) = (keeper(&up), up.distributor());
    keeper.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    up.wait_next_distributor(distributor);
    let next = up.distributor();
    serve_in_order(&mut Line::behind(served, waiting).expect("two are served"), 20);
    assert_eq!(up.distributor(), next, "it has not failed");
    assert!(!up.log().contains("exited with"), "{}", up.log());
    wait_until_eq("keepers", seconds(5.0), 1, || keepers(&up).len());
    assert!(!keeper.runs());
}

#[test]
fn a_keeper_whose_socket_was_removed_is_replaced_and_nobody_notices() {
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let held = client::hold(V4, 2);
    let mut line = Line::behind(held, client::stand(&[V4, V6], 60)).expect("watch the line");
    wait_waiting(&up, 60);
    let (old, distributor) = (keeper(&up), up.distributor());
    fs::remove_file(up.runtime().join("keeper.app")).expect("remove the keeper's socket");
    serve_in_order(&mut line, 10);
    distributor.kill(seconds(5.0));
    up.wait_next_distributor(distributor);
    wait_for("the old one to be gone", seconds(5.0), || (!old.exists()).then_some(()));
    assert_ne!(keeper(&up), old);
    for number in 10..60 {
        line.free();
        assert_eq!(line.serve().expect("served"), number);
    }
    drop(line);
    up.wait_connections(&[0, 0]);
    assert_eq!(up.service().outcomes(["handed_over", "closed_waiting", "refused_no_room"]), [60, 0, 0]);
}

#[test]
fn while_there_can_be_no_keeper_those_who_wait_are_served_in_order() {
    const ALL: usize = 150;
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let held = client::hold(V4, 2);
    // Where its socket is to be is a directory, which nobody removes by mistake.
    let socket = up.runtime().join("keeper.app");
    fs::remove_file(&socket).expect("remove the keeper's socket");
    fs::create_dir(&socket).expect("put a directory there");
    let old = keeper(&up);
    old.signal(Signal::KILL);
    let said = || up.log().matches("start a keeper: listen on").count();
    wait_until_eq("that it is said", seconds(10.0), 1, said);
    let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
    wait_waiting(&up, ALL);
    serve_in_order(&mut line, 10);
    stays("that it is said once", Duration::from_millis(2500), 1, said);
    assert!(keepers(&up).is_empty() && !old.exists());
    fs::remove_dir(&socket).expect("remove the directory");
    wait_for("the next keeper", seconds(10.0), || over(&up, "start a keeper").then_some(()));
    // It has all rooms, those that were taken meanwhile included.
    let distributor = up.distributor();
    distributor.kill(seconds(5.0));
    up.wait_next_distributor(distributor);
    for number in 10..ALL {
        line.free();
        assert_eq!(line.serve().expect("served"), number);
    }
    drop(line);
    up.wait_connections(&[0, 0]);
    let ways = ["handed_over", "closed_waiting", "refused_no_room", "parked_behind"];
    assert_eq!(up.service().outcomes(ways), [ALL as u64, 0, 0, 0]);
}

/// Who arrives while the last room is emptied needs another one.
#[test]
fn nobody_leaves_the_last_room_before_there_is_another() {
    const ALL: usize = 120;
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let held = client::hold(V4, 2);
    let keeper = keeper(&up);
    // More than there are rooms, so that many share the last one.
    keeper.freeze(seconds(5.0));
    let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
    wait_waiting(&up, ALL);
    // All but the last room of the ring, which stays current.
    let alone = up.service().outcome("parked");
    let mut served = 0;
    let stuck = loop {
        line.free();
        match wait_for_turn(&mut line) {
            Some(number) => assert_eq!(number, served),
            None => break served,
        }
        served += 1;
        assert!(served < ALL, "all were served, without a room");
    };
    assert_eq!((stuck, alone), (IDLE - 1, 0), "those who had a room to themselves");
    keeper.signal(Signal::CONT);
    assert_eq!(line.serve().expect("served"), stuck);
    // Those who shared it have used all spares, and are handed over from them.
    for number in stuck + 1..ALL {
        line.free();
        assert_eq!(line.serve().expect("served"), number);
    }
    drop(line);
    up.wait_connections(&[0, 0]);
    let [handed_over, parked, behind] = up.service().outcomes(["handed_over", "parked", "parked_behind"]);
    assert_eq!((handed_over, behind), (ALL as u64, 0));
    assert!(parked > 0);
}

/// Ready rooms at rest, the current one included.
const IDLE: usize = 32;

/// The next who is served, if that is soon: long before whoever waits is sent away.
fn wait_for_turn(line: &mut Line) -> Option<usize> {
    line.is_stirring(seconds(1.0).max(Duration::from_secs(3))).then(|| line.serve().expect("served"))
}

/// The kernel's map that says whose each listener is, and so how many there may be.
fn homes(up: &Up<'_>) -> HashMap<MapData, u64, Home> {
    let pins = leftover::pins(up.runtime()).expect("it runs, so it has pins");
    let data = MapData::from_pin(pins.join(format!("app-v{VERSION}/HOME"))).expect("open HOME");
    let map = Map::from_map_data(data).expect("HOME is a map");
    map.try_into().expect("HOME is a hash map")
}

#[test]
fn rooms_that_cannot_be_admitted_are_made_again_when_they_can() {
    const ALL: usize = 150;
    let host = Host::new();
    let up = host.up(&app(&host, 2));
    let held = client::hold(V4, 2);
    let mut homes = homes(&up);
    let nobody = Home { slot: NO_SLOT, index: 0 };
    let strangers = (1 << 60..).take_while(|&cookie| homes.insert(cookie, nobody, 0).is_ok()).count() as u64;
    let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
    let said = || up.log().matches("share the rooms there are").count();
    wait_until_eq("that it is said", seconds(10.0), 1, said);
    assert!(up.log().contains("write HOME"), "{}", up.log());
    serve_in_order(&mut line, 10);
    stays("that it is said once", Duration::from_millis(1500), 1, said);
    for cookie in (1 << 60..).take(strangers as usize) {
        homes.remove(&cookie).expect("make place in HOME");
    }
    for number in 10..ALL {
        line.free();
        assert_eq!(line.serve().expect("served"), number);
    }
    wait_for("it to be over", seconds(10.0), || over(&up, "make a room").then_some(()));
    drop(line);
    up.wait_connections(&[0, 0]);
    let ways = ["handed_over", "closed_waiting", "refused_no_room", "parked_behind"];
    assert_eq!(up.service().outcomes(ways), [ALL as u64, 0, 0, 0]);
}

/// The bell takes a descriptor. This kernel wakes servers by itself, or they would wait for it.
#[test]
fn a_bell_that_cannot_be_rung_is_rung_later() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &app(&host, 1).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_BELL", "on");
    let up = host.start_command(command);
    up.wait_ready();
    let held = client::hold(V4, 1);
    let mut line = Line::behind(held, client::stand(&[V4, V6], 5)).expect("watch the line");
    wait_waiting(&up, 5);
    let distributor = up.distributor();
    take_descriptors(distributor);
    line.free();
    let rung = line.is_stirring(seconds(1.0));
    give_descriptors_back(distributor);
    wait_until_eq("bells", seconds(10.0), 1, || up.service().outcome("bell"));
    assert_eq!(line.serve().expect("served"), 0, "heard before the bell: {rung}");
    for number in 1..5 {
        line.free();
        assert_eq!(line.serve().expect("served"), number);
    }
}

/// Lowers the limit of open files to what a process has open, so that it can open nothing.
fn take_descriptors(process: Process) {
    let open = process.descriptors();
    let free = (0..).find(|number| !open.contains_key(number)).expect("a number");
    limit_descriptors(process, Some(free as u64));
}

fn give_descriptors_back(process: Process) {
    limit_descriptors(process, getrlimit(Resource::Nofile).maximum);
}

fn limit_descriptors(process: Process, current: Option<u64>) {
    let limit = Rlimit { current, ..getrlimit(Resource::Nofile) };
    prlimit(Pid::from_raw(process.pid), Resource::Nofile, limit).expect("change its limit of open files");
}

#[test]
fn without_descriptors_those_who_wait_share_rooms_and_nobody_is_lost() {
    const ALL: usize = 150;
    for starved in ["keeper", "distributor", "both"] {
        let host = Host::new();
        let up = host.up(&app(&host, 2));
        let held = client::hold(V4, 2);
        let both = [("keeper", keeper(&up)), ("distributor", up.distributor())];
        let starving: Vec<Process> =
            both.iter().filter(|(name, _)| [*name, "both"].contains(&starved)).map(|(_, it)| *it).collect();
        starving.iter().for_each(|process| take_descriptors(*process));
        let mut line = Line::behind(held, client::stand(&[V4, V6], ALL)).expect("watch the line");
        let said = || up.log().matches("share the rooms there are").count();
        wait_until_eq("that it is said", seconds(10.0), 1, said);
        // Hand-overs go on, as long as there are rooms that are not the last one.
        serve_in_order(&mut line, 10);
        stays("that it is said once", Duration::from_millis(2500), 1, said);
        starving.iter().for_each(|process| give_descriptors_back(*process));
        wait_for("rooms to be made again", seconds(10.0), || over(&up, "make a room").then_some(()));
        wait_waiting(&up, ALL - 10);
        for number in 10..ALL {
            line.free();
            assert_eq!(line.serve().expect("served"), number, "{starved}");
        }
        drop(line);
        up.wait_connections(&[0, 0]);
        let service = up.service();
        let ways = ["handed_over", "closed_waiting", "refused_no_room", "parked_behind"];
        assert_eq!(service.outcomes(ways), [ALL as u64, 0, 0, 0], "{starved}");
        // Nothing was kept that nobody knows of: at rest there are as many rooms as ever.
        let keeper = keeper(&up);
        wait_for("the keeper to have few rooms", seconds(20.0), || {
            (keeper.descriptors().len() < 400).then_some(())
        });
    }
}
