//! Which CPUs servers run on: their part of those there are, or those of a NUMA node.
//!
//! By what this machine has. What takes more CPUs, or takes some away, is in the unit tests and in guest.rs.

#![forbid(unsafe_code)]

use std::{collections::BTreeSet, fs};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tests::{
    app::App,
    host::{Host, Up},
    process::Process,
    wait::{seconds, wait_for, wait_until_eq},
};

/// So many servers with this for `cpus`.
fn app(host: &Host, count: usize, cpus: &str) -> App {
    App { server: format!("cpus = \"{cpus}\""), ..App::of(host, count) }
}

/// The numbers in a list such as `0-2,5`.
fn numbers(list: &str) -> BTreeSet<usize> {
    let number = |text: &str| text.trim().parse::<usize>().expect("a number");
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => number(first)..=number(last),
        None => number(part)..=number(part),
    };
    list.split(',').flat_map(range).collect()
}

/// The CPUs of this thread, and of what it starts.
fn ours() -> BTreeSet<usize> {
    let mask = sched_getaffinity(None).expect("our CPUs");
    (0..CpuSet::MAX_CPU).filter(|cpu| mask.is_set(*cpu)).collect()
}

fn allowed(process: Process) -> BTreeSet<usize> {
    numbers(&process.fact("Cpus_allowed_list"))
}

/// What each server's process may run on. The status says the same.
#[track_caller]
fn masks(up: &Up<'_>) -> Vec<BTreeSet<usize>> {
    let each = up.service().servers.into_iter().map(|server| {
        let mask = allowed(up.process(&server.name));
        assert_eq!(numbers(&server.cpus.expect("it has CPUs").list), mask, "{}", server.name);
        mask
    });
    each.collect()
}

#[test]
fn the_cpus_are_divided_among_the_servers() {
    let host = Host::new();
    let up = host.up(&app(&host, 2, "spread"));
    let its = masks(&up);
    let all: BTreeSet<usize> = its.iter().flatten().copied().collect();
    assert_eq!(all, ours());
    let shared = its[0].intersection(&its[1]).count();
    assert_eq!(shared, if ours().len() > 1 { 0 } else { 1 }, "{its:?}");
    let status = up.service().server("app/1").cpus.clone().expect("it has CPUs");
    assert_eq!(status.why, "spread: its part of them");
    // Whoever is started again, and by whomever, has the same.
    up.replace_distributor();
    let old = up.process("app/2");
    old.kill(seconds(5.0));
    wait_for("the next instance", seconds(20.0), || up.process_if_any("app/2").filter(|next| *next != old));
    up.wait_ready();
    assert_eq!(masks(&up), its);
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("RESTARTS  CPUS"), "{table}");
    up.stop();
}

#[test]
fn more_servers_than_cpus_share_them_evenly() {
    let host = Host::new();
    let count = (2 * ours().len()).min(64);
    let up = host.up(&app(&host, count, "spread"));
    let its = masks(&up);
    let on = |cpu: usize| its.iter().filter(|mask| mask.contains(&cpu)).count();
    let most = ours().into_iter().map(on).max().expect("there is a CPU");
    let least = ours().into_iter().map(on).min().expect("there is a CPU");
    assert!(most - least <= 1 && its.iter().all(|mask| mask.len() == 1), "{its:?}");
    up.stop();
}

#[test]
fn only_what_dist_ctl_may_use_is_divided() {
    let host = Host::new();
    let first = ours().into_iter().next().expect("there is a CPU");
    // Of this test's thread, which nobody else uses.
    let mut mask = CpuSet::new();
    mask.set(first);
    sched_setaffinity(None, &mask).expect("stay on one CPU");
    let up = host.up(&app(&host, 2, "spread"));
    assert_eq!(masks(&up), vec![BTreeSet::from([first]); 2]);
    up.stop();
}

#[test]
fn a_server_may_have_the_cpus_of_a_node() {
    let nodes = fs::read_to_string("/sys/devices/system/node/online").unwrap_or_else(|_| "0".to_owned());
    let node = numbers(&nodes).into_iter().next().expect("there is a node");
    let list = fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist"));
    let its: BTreeSet<usize> = match list {
        Ok(list) => numbers(&list).intersection(&ours()).copied().collect(),
        Err(_) => ours(),
    };
    let host = Host::new();
    for (cpus, why) in [
        (format!("node{node}"), format!("those of node{node}")),
        ("spread:nodes".to_owned(), "spread: its NUMA node".to_owned()),
    ] {
        let up = host.up(&app(&host, 1, &cpus));
        assert_eq!(masks(&up), std::slice::from_ref(&its));
        assert_eq!(up.service().server("app/1").cpus.clone().expect("it has CPUs").why, why);
        up.stop();
    }
}

#[test]
fn a_running_server_moves_when_others_are_to_have_its_cpus_and_is_free_again_without_the_option() {
    if ours().len() < 2 {
        println!("skipped: with one CPU nobody moves");
        return;
    }
    let host = Host::new();
    // By a distributor after the other: what they run is the same, only where is not.
    let mut server = None;
    for (count, cpus) in
        [(1, "cpus = \"spread\""), (2, "cpus = \"spread\""), (1, "cpus = \"spread\""), (1, "")]
    {
        let up = host.up(&App { server: cpus.to_owned(), ..App::of(&host, count) });
        let its = up.process("app/1");
        assert_eq!(*server.get_or_insert(its), its, "it was not started again");
        match count {
            1 => wait_until_eq("its CPUs", seconds(20.0), ours(), || allowed(its)),
            _ => wait_until_eq("CPUs of both", seconds(20.0), 0, || {
                allowed(its).intersection(&allowed(up.process("app/2"))).count()
            }),
        }
        if cpus.is_empty() {
            assert_eq!(up.service().server("app/1").cpus, None);
            up.stop();
            break;
        }
        let distributor = up.distributor();
        up.signal(tests::process::Signal::KILL);
        wait_for("the distributor to end too", seconds(10.0), || (!distributor.runs()).then_some(()));
        up.forget();
    }
}
