//! Every input of the decision, and whatever may be found.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::process::Signal;

use super::*;
use crate::{
    backoff::Backoff,
    config::{Readiness, Restart},
    message::Exit,
    server::{Event, Remedies, Report, Supervision},
};

const MAIN: u32 = 40;

fn policy() -> Supervision {
    let second = Duration::from_secs(1);
    let restart = Restart { delay: second, max_delay: second, healthy_after: second, give_up_after: Some(4) };
    Supervision {
        listen: vec!["[::]:8080".parse().unwrap()],
        readiness: Readiness::Listening,
        start_timeout: second,
        drain_timeout: second,
        stop_signal: Signal::TERM,
        stop_timeout: second,
        watchdog: None,
        remedies: Remedies::default(),
        backoff: Backoff::try_new(restart).unwrap(),
        once: false,
    }
}

/// A server whose third instance runs, with this main process; `None`: it has stopped.
fn machine(main: Option<Main>) -> Server {
    let now = Instant::now();
    let tell = |server: Server, event| server.step(event, now, 0, &policy()).0;
    let report = |server, report| tell(server, Event::Of(Instance(3), report));
    let launching = tell(Server::new(Instance(2), now), Event::Start);
    let running = || report(launching.clone(), Report::Launched { pid: MAIN });
    let exited = |code| Report::MainExited { exit: Exit::Code(code), others_left: true };
    let server = match main {
        None => return Server::new(Instance(3), now),
        Some(Main::Launching) => launching,
        Some(Main::Running { .. }) => running(),
        Some(Main::Background) => report(running(), exited(0)),
        Some(Main::Ended) => report(running(), exited(1)),
    };
    assert_eq!((server.instance(), server.run().map(|run| run.main())), (Instance(3), main));
    server
}

#[test]
fn each_input_has_its_decision() {
    const FIRST: u32 = 41;
    let seen = [
        Seen { populated: false, first: None },
        Seen { populated: true, first: None },
        Seen { populated: true, first: Some(FIRST) },
    ];
    let running = |main, main_lives| Recorded::Running { main, main_lives };
    let by_the_cgroup = [Decision::Start, Decision::StartAfresh, Decision::Watch { pid: FIRST }];
    let ended = |others_left| Decision::MainEnded { others_left };
    for (recorded, decisions) in [
        (Recorded::Nothing, by_the_cgroup),
        (Recorded::Idle, by_the_cgroup),
        (running(Main::Launching, false), by_the_cgroup),
        (running(Main::Launching, true), by_the_cgroup),
        // If it lives it is in there, so that no cgroup without it is looked at.
        (running(Main::Running { pid: MAIN }, true), [Decision::Watch { pid: MAIN }; 3]),
        (running(Main::Running { pid: MAIN }, false), [ended(false), ended(true), ended(true)]),
        (running(Main::Background, false), [Decision::GoOn; 3]),
        (running(Main::Background, true), [Decision::GoOn; 3]),
        (running(Main::Ended, false), [Decision::GoOn; 3]),
        (running(Main::Ended, true), [Decision::GoOn; 3]),
    ] {
        for (seen, decision) in seen.into_iter().zip(decisions) {
            assert_eq!(decide(recorded, seen), decision, "{recorded:?}, {seen:?}");
        }
    }
}

fn group(instance: u32, processes: &[u32]) -> Group {
    Group { instance: Instance(instance), processes: processes.to_vec(), first: processes.first().copied() }
}

#[test]
fn the_record_counts_until_a_newer_instance_was_begun() {
    let running = Some(Main::Running { pid: MAIN });
    let watch = |pid| Decision::Watch { pid };
    let ended = |others_left| Decision::MainEnded { others_left };
    let same = (Some(7), Some(7));
    for (what, main, (start_time, start_time_now), groups, instance, decision) in [
        ("it runs", running, same, vec![group(3, &[MAIN, 50])], 3, watch(MAIN)),
        ("its number is another's", running, (Some(7), Some(8)), vec![group(3, &[50])], 3, ended(true)),
        (
            "another's, who is in the cgroup",
            running,
            (Some(7), Some(8)),
            vec![group(3, &[MAIN])],
            3,
            ended(true),
        ),
        (
            "its number is another's elsewhere",
            running,
            (None, Some(8)),
            vec![group(3, &[50])],
            3,
            ended(true),
        ),
        (
            "when it started could not be read",
            running,
            (None, Some(8)),
            vec![group(3, &[MAIN])],
            3,
            watch(MAIN),
        ),
        ("nothing is left of it", running, (Some(7), None), vec![], 3, ended(false)),
        ("a newer one runs", running, (Some(7), None), vec![group(3, &[]), group(4, &[50])], 4, watch(50)),
        ("a newer one has its number", running, (Some(7), Some(8)), vec![group(4, &[MAIN])], 4, watch(MAIN)),
        ("a newer one was begun", running, (Some(7), None), vec![group(4, &[])], 4, Decision::Start),
        (
            "it runs, and a newer cgroup is there",
            running,
            same,
            vec![group(3, &[MAIN]), group(4, &[])],
            3,
            watch(MAIN),
        ),
        ("it had stopped", None, (None, None), vec![group(2, &[])], 3, Decision::Start),
        ("it had stopped, and was started", None, (None, None), vec![group(4, &[50])], 4, watch(50)),
        ("a daemon", Some(Main::Background), (Some(7), None), vec![group(3, &[50])], 3, Decision::GoOn),
    ] {
        let machine = machine(main);
        let past = Past { machine: &machine, start_time, start_time_now };
        let found = examine(Some(past), &groups);
        assert_eq!((found.instance, found.decision), (Instance(instance), decision), "{what}");
        assert_eq!(found.goes_by_record, main.is_some() && instance == 3, "{what}");
    }
    for (groups, instance, decision) in [
        (vec![], 0, Decision::Start),
        (vec![group(5, &[])], 5, Decision::Start),
        (vec![group(4, &[]), group(5, &[50])], 5, watch(50)),
        (vec![Group { first: None, ..group(5, &[50]) }], 5, Decision::StartAfresh),
    ] {
        let found = examine(None, &groups);
        let expected = Finding { instance: Instance(instance), decision, goes_by_record: false };
        assert_eq!(found, expected, "{groups:?}");
    }
}

fn any_groups() -> impl Strategy<Value = Vec<Group>> {
    // Of few numbers, so that those that matter come together.
    let processes = prop::collection::btree_set(MAIN - 1..MAIN + 3, 0..4);
    let group = (processes, any::<bool>()).prop_map(|(processes, is_launcher)| {
        let processes: Vec<u32> = processes.into_iter().collect();
        let first = processes.first().copied().filter(|_| !is_launcher);
        (processes, first)
    });
    prop::collection::btree_map(0..6_u32, group, 0..4).prop_map(|groups| {
        let groups = groups.into_iter();
        groups
            .map(|(number, (processes, first))| Group { instance: Instance(number), processes, first })
            .collect()
    })
}

fn any_past() -> impl Strategy<Value = Option<(Server, Option<u64>, Option<u64>)>> {
    let mains = [Main::Launching, Main::Running { pid: MAIN }, Main::Background, Main::Ended];
    let main = prop::option::of(prop::sample::select(mains.to_vec()));
    let time = || prop::option::of(0..3_u64);
    prop::option::of((main.prop_map(machine), time(), time()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn whatever_is_found_the_promises_hold(past in any_past(), groups in any_groups()) {
        let recorded = past.as_ref().map(|(machine, start_time, start_time_now)| Past {
            machine,
            start_time: *start_time,
            start_time_now: *start_time_now,
        });
        let Finding { instance, decision, goes_by_record } = examine(recorded, &groups);
        let inside = |of: Instance| groups.iter().find(|group| group.instance == of);
        let its = inside(instance).map_or(&[][..], |group| &group.processes);
        let recorded_pid = recorded.and_then(|past| past.machine.pid());
        match decision {
            Decision::Watch { pid } => {
                prop_assert!(its.contains(&pid), "no process of its cgroup is no server");
                if let (true, Some(past)) = (goes_by_record && recorded_pid.is_some(), recorded) {
                    prop_assert_eq!(Some(pid), recorded_pid);
                    prop_assert!(past.start_time_now.is_some());
                    let recycled = past.start_time.is_some() && past.start_time != past.start_time_now;
                    prop_assert!(!recycled, "its number was used again");
                }
            }
            Decision::GoOn => prop_assert!(goes_by_record && recorded_pid.is_none()),
            Decision::MainEnded { others_left } => {
                prop_assert!(goes_by_record && recorded_pid.is_some());
                prop_assert_eq!(others_left, !its.is_empty());
            }
            // Nobody of it serves: nobody is there, or launchers only.
            Decision::Start => prop_assert!(groups.iter().all(|group| group.processes.is_empty())
                || recorded.is_some_and(|past| past.machine.run().is_some()) && its.is_empty()),
            Decision::StartAfresh => prop_assert_eq!(inside(instance).unwrap().first, None),
        }
        // Who is newest of all is passed over only for the one that is known to run.
        let newest = groups.iter().filter(|group| !group.processes.is_empty()).map(|group| group.instance).max();
        if newest.is_some_and(|newest| newest > instance) {
            prop_assert!(goes_by_record);
            prop_assert_eq!(Some(decision), recorded_pid.map(|pid| Decision::Watch { pid }));
        }
    }
}
