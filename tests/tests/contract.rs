//! Another build of dist-ctl takes over from the one that runs, with the same contract or a newer
//! one, and no connection and no count is lost.
//!
//! The other build comes in through the monitor: a library that is preloaded there has it start
//! another program as its next distributor (`fixtures/another.c`).
#![forbid(unsafe_code)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use aya::maps::{Array, Map, MapData};
use distributor_ebpf::contract::VERSION;
use tests::{
    app::App,
    client::{self, Client},
    command,
    host::{Host, Up, V4, next_program, program},
    leftover,
    load::under_load,
    status::Service,
    wait::{seconds, wait_for, wait_until_eq},
};

/// The version of the newer contract.
const NEXT: u32 = VERSION + 1;

/// LOAD of the newer contract, in integers: the last one counts what closed since it took over.
const LOAD: usize = (256 * 32 + 32 + 16 * 16 + 16 + 32 * 8 + 8 + 48) / 8 + 1;

/// dist-ctl whose next distributor may be another program.
fn up<'h>(host: &'h Host, app: &App) -> Up<'h> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/another.c");
    let library = host.path("another.so");
    // The linker of every Rust program is a C compiler.
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).args([&library, &source]).arg("-ldl");
    command::run(&mut compiler, seconds(60.0)).expect_done();
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    // What a kill in the middle of a move leaves wrong is to be corrected soon.
    command.env("DIST_CTL_CHECK_COUNTS", "200ms");
    command.env("LD_PRELOAD", library).env("ANOTHER_PROGRAM", another(host));
    let up = host.start_command(command);
    up.wait_ready();
    up
}

fn another(host: &Host) -> PathBuf {
    host.path("another")
}

/// From now on the monitor starts this program.
#[track_caller]
fn will_start(up: &Up<'_>, program: &Path) {
    let new = up.host.path("another.new");
    symlink(program, &new).expect("make a link");
    fs::rename(new, another(up.host)).expect("put it in place");
}

/// Kills the distributor, and does not wait for the next one.
fn kill(up: &Up<'_>) {
    up.distributor().kill(seconds(5.0));
}

/// The pins of the service.
fn pins(up: &Up<'_>, version: u32) -> PathBuf {
    leftover::pins(up.runtime()).expect("the instance has pins").join(format!("app-v{version}"))
}

/// The versions of which there are pins.
fn versions(up: &Up<'_>) -> Vec<u32> {
    (1..=NEXT + 1).filter(|&version| pins(up, version).exists()).collect()
}

/// Connections that closed under the newer contract.
fn closed(up: &Up<'_>) -> u64 {
    let data = MapData::from_pin(pins(up, NEXT).join("LOAD")).expect("open LOAD");
    let map = Map::from_map_data(data).expect("LOAD is a map");
    let load: Array<MapData, [u64; LOAD]> = map.try_into().expect("LOAD has this size");
    load.get(&0, 0).expect("read LOAD")[LOAD - 1]
}

/// Nothing was lost, and everything is counted.
#[track_caller]
fn assert_all_counted(service: &Service, served: u64) {
    let [directly, waited] = service.outcomes(["established", "established_waiting"]);
    assert_eq!(directly + waited, served, "{service:#?}");
    assert_eq!(service.outcomes(["handed_over", "closed", "move_failed"]), [waited, served, 0]);
    assert_eq!(service.totals().iter().sum::<u64>(), served);
}

#[test]
fn a_newer_contract_takes_over_what_is_held_and_what_waits() {
    let host = Host::new();
    let tables =
        "[service.app.limits]\nconnections = 100\n[service.app.limits.per_source]\nconnections = 100";
    let app = App { limit: Some(5), tables: tables.to_owned(), ..App::of(&host, 2) };
    let up = up(&host, &app);
    let held = client::hold(V4, 10);
    let waiting = client::stand(&[V4], 5);
    wait_until_eq("waiting", seconds(5.0), 5, || up.service().waiting.now);
    let before = up.service();
    assert_eq!(versions(&up), [VERSION]);

    will_start(&up, &next_program());
    up.replace_distributor();

    assert_eq!(versions(&up), [NEXT]);
    let service = up.service();
    assert_eq!(service.connections(), [5, 5]);
    assert_eq!(service.waiting.now, 5);
    let has = |service: &Service| {
        let source = service.sources().most.as_ref().map_or(0, |most| most.connections);
        (service.limits().connections, service.limits().earlier, source)
    };
    assert_eq!(has(&service), (Some(10), 0, 15));
    assert_eq!(service.totals(), before.totals());
    assert!(service.servers.iter().all(|server| server.restarts == 0), "{service:#?}");
    let names = ["established", "established_waiting", "selected", "wait_limit"];
    assert_eq!(service.outcomes(names), before.outcomes(names));
    assert_eq!(closed(&up), 0);
    drop(held);
    let served: Vec<_> = waiting.into_iter().map(|stream| Client::greeted(stream).expect("served")).collect();
    wait_until_eq("connections", seconds(5.0), 5, || up.connections().iter().sum());
    assert_eq!(closed(&up), 10, "the new programs count what the old ones could not");
    drop(served);
    up.wait_connections(&[0, 0]);
    assert_eq!(closed(&up), 15);
    assert_eq!(up.service().outcomes(["handed_over", "closed"]), [5, 15]);
    assert_eq!(has(&up.service()), (Some(0), 0, 0));
    up.stop();
}

#[test]
fn a_newer_contract_takes_over_under_load_and_costs_no_connection_and_no_count() {
    let host = Host::new();
    let up = up(&host, &App::of(&host, 4));
    will_start(&up, &next_program());
    let ((), served) = under_load(4, |load| {
        up.replace_distributor();
        load.serves(100);
    });
    assert_eq!(versions(&up), [NEXT]);
    up.wait_connections(&[0; 4]);
    assert_all_counted(&up.service(), served);
    assert!(closed(&up) > 0);
    up.stop();
}

/// The verifier alone takes a quarter of a second, so these moments are spread over all steps.
#[test]
fn a_newer_contract_takes_over_though_its_distributor_is_killed_again_and_again() {
    let host = Host::new();
    let up = up(&host, &App::of(&host, 4));
    will_start(&up, &next_program());
    let ((), served) = under_load(4, |_| {
        kill(&up);
        for delay in [0.03, 0.15, 0.3, 0.45] {
            let began = up.distributor();
            thread::sleep(seconds(delay));
            began.kill(seconds(5.0));
        }
        wait_for("the next distributor", seconds(30.0), || {
            (up.run(&["status", "--json"]).code == Some(0)).then_some(())
        });
        up.wait_ready();
    });
    assert_eq!(versions(&up), [NEXT]);
    up.wait_connections(&[0; 4]);
    assert_all_counted(&up.service(), served);
    up.stop();
}

#[test]
fn another_build_of_the_same_contract_replaces_the_programs_under_load() {
    let host = Host::new();
    let up = up(&host, &App::of(&host, 4));
    let programs = || {
        let names = fs::read_dir(pins(&up, NEXT)).expect("list the pins").flatten();
        let names = names.filter_map(|pin| pin.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| name.contains('-')).collect();
        names.sort();
        names
    };
    will_start(&up, &next_program());
    up.replace_distributor();
    let before = programs();
    assert_eq!(before.len(), 4, "{before:?}");
    let already = up.service().totals().iter().sum::<u64>();
    // With the programs' log it is another object.
    let verbose =
        host.write("verbose", &format!("#!/bin/sh\nexec {} \"$@\" --verbose\n", next_program().display()));
    command::run(Command::new("chmod").args(["755", &verbose]), seconds(5.0)).expect_done();
    will_start(&up, Path::new(&verbose));
    let ((), served) = under_load(4, |_| up.replace_distributor());
    let after = programs();
    assert_eq!(after.len(), 4, "{after:?}");
    assert!(before.iter().all(|name| !after.contains(name)), "{before:?} {after:?}");
    up.wait_connections(&[0; 4]);
    assert_all_counted(&up.service(), already + served);
    up.stop();
}

#[test]
fn pins_of_a_newer_contract_are_refused_and_what_runs_goes_on() {
    let host = Host::new();
    let up = up(&host, &App::of(&host, 2));
    will_start(&up, &next_program());
    up.replace_distributor();
    let held = client::hold(V4, 4);
    will_start(&up, &program());
    kill(&up);
    wait_for("the sentence", seconds(10.0), || {
        let told = format!("was made by a dist-ctl whose kernel objects have version {NEXT}");
        up.log().contains(&told).then_some(())
    });
    let told = format!("this one has version {VERSION} and cannot read them: start that dist-ctl again");
    assert!(up.log().contains(&told), "{}", up.log());
    assert_eq!(versions(&up), [NEXT]);
    let more = client::hold(V4, 4);
    will_start(&up, &next_program());
    wait_for("the newer one again", seconds(30.0), || {
        (up.run(&["status", "--json"]).code == Some(0)).then_some(())
    });
    up.wait_ready();
    assert_eq!(up.connections(), [4, 4]);
    drop((held, more));
    up.wait_connections(&[0, 0]);
    up.stop();
}
