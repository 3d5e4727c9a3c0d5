//! Stories of restarts, and whatever may be seen meanwhile.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn bounds(max_surge: u32, max_unavailable: u32) -> Bounds {
    Bounds { max_surge, max_unavailable }
}

fn seen(server: &str) -> Seen {
    Seen {
        server: server.to_owned(),
        instance: Instance(7),
        ready: true,
        withheld: false,
        drained: false,
        idle: None,
        alone: false,
        successor: false,
        leaving: 0,
        not_replaced: None,
    }
}

fn roll(bounds: Bounds, servers: &[Seen]) -> Roll {
    let items = servers.iter().map(|seen| Item::new(&seen.server, seen.instance, None));
    Roll::new(1, true, bounds, items.collect(), Instant::now())
}

/// What is ordered next, in short words.
fn turn(roll: &mut Roll, seen: &[Seen]) -> Vec<String> {
    let words = |order: &Order| match order {
        Order::Replace { server } => format!("replace {server}"),
        Order::Restart { server } => format!("restart {server}"),
    };
    roll.turn(seen, Instant::now()).0.iter().map(words).collect()
}

const NOTHING: [&str; 0] = [];

#[test]
fn the_bounds_say_how_many_are_ordered_at_a_time() {
    let names = ["a", "b", "c", "d"];
    let idle = |server| Seen { ready: false, idle: Some("given up".into()), ..seen(server) };
    let unhealthy = |server| Seen { ready: false, withheld: true, ..seen(server) };
    for (row, its, seen, expected) in [
        ("all are unhealthy", bounds(1, 0), names.map(unhealthy), vec!["replace a"]),
        ("all are unhealthy, and none may run twice", bounds(0, 1), names.map(unhealthy), vec!["restart a"]),
        (
            "one is unhealthy",
            bounds(1, 0),
            [seen("a"), unhealthy("b"), seen("c"), seen("d")],
            vec!["replace a"],
        ),
        ("one more", bounds(1, 0), names.map(seen), vec!["replace a"]),
        ("two more", bounds(2, 0), names.map(seen), vec!["replace a", "replace b"]),
        ("one fewer", bounds(0, 1), names.map(seen), vec!["restart a"]),
        ("one more and one fewer", bounds(1, 1), names.map(seen), vec!["replace a", "restart b"]),
        (
            "all fewer",
            bounds(0, 9),
            names.map(seen),
            vec!["restart a", "restart b", "restart c", "restart d"],
        ),
        (
            "one is away already",
            bounds(0, 1),
            [seen("a"), seen("b"), Seen { ready: false, ..seen("c") }, seen("d")],
            vec![],
        ),
        (
            "one is away already, and that is no matter",
            bounds(1, 0),
            [seen("a"), seen("b"), Seen { ready: false, ..seen("c") }, seen("d")],
            vec!["replace a"],
        ),
        (
            "one that was replaced has not ended",
            bounds(1, 0),
            [Seen { leaving: 1, ..seen("a") }, seen("b"), seen("c"), seen("d")],
            vec![],
        ),
        ("one does not run", bounds(1, 0), [seen("a"), seen("b"), idle("c"), seen("d")], vec!["replace a"]),
        (
            "the first does not run",
            bounds(1, 0),
            [idle("a"), seen("b"), seen("c"), seen("d")],
            vec!["restart a"],
        ),
        (
            "one is taken out",
            bounds(1, 0),
            [Seen { drained: true, ..seen("a") }, seen("b"), seen("c"), seen("d")],
            vec!["restart a"],
        ),
        (
            "one cannot run twice",
            bounds(1, 0),
            [Seen { alone: true, ..seen("a") }, seen("b"), seen("c"), seen("d")],
            vec!["restart a"],
        ),
        (
            "one starts by itself",
            bounds(1, 0),
            [Seen { ready: false, ..seen("a") }, seen("b"), seen("c"), seen("d")],
            vec!["replace b"],
        ),
    ] {
        assert_eq!(turn(&mut roll(its, &seen), &seen), expected, "{row}");
    }
}

#[test]
fn each_is_replaced_when_the_one_before_has_ended() {
    let mut now = ["a", "b"].map(seen);
    let mut roll = roll(bounds(1, 0), &now);
    for (place, server) in ["a", "b"].into_iter().enumerate() {
        assert_eq!(turn(&mut roll, &now), [format!("replace {server}")]);
        now[place].successor = true;
        assert_eq!(turn(&mut roll, &now), NOTHING);
        assert_eq!(roll.items()[place].says(Some(&now[place])).unwrap(), "its new instance is not ready yet");
        now[place] = Seen { instance: Instance(8), leaving: 1, ..seen(server) };
        assert_eq!(turn(&mut roll, &now), NOTHING);
        let says = roll.items()[place].says(Some(&now[place])).unwrap();
        assert_eq!(says, "instance 8 serves; the one before has to end");
        assert_eq!(roll.progress(), (place, 2));
        now[place].leaving = 0;
    }
    assert!(!roll.is_over());
    assert_eq!(turn(&mut roll, &now), NOTHING);
    assert_eq!((roll.progress(), roll.is_over()), ((2, 2), true));
    assert_eq!(roll.outcome().unwrap().failed, None);
    assert_eq!(turn(&mut roll, &now), NOTHING);
}

#[test]
fn one_that_does_not_get_ready_ends_it() {
    let mut now = ["a", "b"].map(seen);
    let mut by_surge = roll(bounds(1, 0), &now);
    assert_eq!(turn(&mut by_surge, &now), ["replace a"]);
    now[0].not_replaced = Some("exited with 1 after 0.1s".into());
    assert_eq!(turn(&mut by_surge, &now), NOTHING);
    let failed = by_surge.outcome().and_then(|outcome| outcome.failed.clone());
    let expected = "a: the new instance exited with 1 after 0.1s; the one before serves on";
    assert_eq!(failed.as_deref(), Some(expected));
    assert_eq!(turn(&mut by_surge, &now), NOTHING);

    let mut now = ["a", "b"].map(seen);
    let mut in_place = roll(bounds(0, 1), &now);
    assert_eq!(turn(&mut in_place, &now), ["restart a"]);
    now[0].ready = false;
    assert_eq!(turn(&mut in_place, &now), NOTHING);
    now[0] = Seen { instance: Instance(8), ready: false, idle: Some("exited with 1".into()), ..seen("a") };
    assert_eq!(turn(&mut in_place, &now), NOTHING);
    let failed = in_place.outcome().and_then(|outcome| outcome.failed.clone());
    assert_eq!(failed.as_deref(), Some("a: exited with 1"));
}

#[test]
fn what_cannot_be_done_fails_where_it_is_not_done_yet() {
    let mut roll = roll(bounds(1, 0), &[seen("a")]);
    assert_eq!(turn(&mut roll, &[seen("a")]), ["replace a"]);
    let next = [Seen { instance: Instance(8), ..seen("a") }];
    // It has changed again meanwhile.
    roll.extend([Item::new("a", Instance(8), None)]);
    assert_eq!(turn(&mut roll, &next), ["replace a"]);
    roll.refuse("a", "no".to_owned());
    let stages: Vec<&Stage> = roll.items().iter().map(|item| &item.stage).collect();
    assert_eq!(stages, [&Stage::Done, &Stage::Failed { why: "no".to_owned() }]);
}

#[test]
fn what_was_ordered_and_not_done_is_ordered_again() {
    let now = ["a"].map(seen);
    for its in [bounds(1, 0), bounds(0, 1)] {
        let mut roll = roll(its, &now);
        let first = turn(&mut roll, &now);
        // Its distributor has died before it did anything, and the next one reads what was written.
        let mut roll: Roll = serde_json::from_str(&serde_json::to_string(&roll).unwrap()).unwrap();
        assert_eq!(turn(&mut roll, &now), first);
    }
}

#[test]
fn a_server_that_leaves_the_service_or_is_restarted_by_itself_is_no_matter() {
    let mut now = vec![seen("a"), seen("b"), seen("c")];
    let mut roll = roll(bounds(1, 0), &now);
    assert_eq!(turn(&mut roll, &now), ["replace a"]);
    now.remove(0);
    now[0].instance = Instance(9);
    assert_eq!(turn(&mut roll, &now), ["replace c"]);
    assert_eq!(roll.progress(), (1, 2));
}

#[test]
fn what_it_waits_for_is_said() {
    let away = Seen { ready: false, ..seen("c") };
    let ends = Seen { leaving: 1, ..seen("b") };
    for (its, now, expected) in [
        (bounds(0, 1), [seen("a"), seen("b"), away.clone()], "waits until c is ready"),
        (bounds(1, 0), [seen("a"), ends, seen("c")], "waits until what was replaced of b has ended"),
    ] {
        let mut roll = roll(its, &now);
        assert_eq!(turn(&mut roll, &now), NOTHING);
        assert_eq!(roll.waits_for(&now).as_deref(), Some(expected));
    }
}

/// What may happen to a server that was told to be replaced or restarted.
#[derive(Clone, Debug)]
enum Happens {
    Ready,
    Fails,
    Ends,
    Crashes,
    Dies,
}

/// A world in which orders are obeyed.
struct World {
    servers: BTreeMap<String, Seen>,
    number: u32,
}

impl World {
    fn seen(&self) -> Vec<Seen> {
        self.servers.values().cloned().collect()
    }

    fn obey(&mut self, order: &Order) {
        match order {
            Order::Replace { server } => {
                let its = self.servers.get_mut(server).unwrap();
                assert!(its.ready && !its.successor && !its.alone, "{its:?}");
                (its.successor, its.not_replaced) = (true, None);
            }
            Order::Restart { server } => {
                let its = self.servers.get_mut(server).unwrap();
                (its.ready, its.idle) = (false, None);
            }
        }
    }

    fn happen(&mut self, server: &str, happens: &Happens) {
        self.number += 1;
        let next = Instance(self.number);
        let its = self.servers.get_mut(server).unwrap();
        match happens {
            Happens::Ready if its.successor => {
                *its = Seen { instance: next, leaving: its.leaving + 1, ..seen(server) };
            }
            Happens::Ready if !its.ready => {
                *its = Seen { instance: next, leaving: its.leaving, ..seen(server) }
            }
            Happens::Fails if its.successor => {
                (its.successor, its.not_replaced) = (false, Some("failed".into()));
            }
            Happens::Fails if !its.ready => (its.instance, its.idle) = (next, Some("failed".into())),
            Happens::Ends => its.leaving = its.leaving.saturating_sub(1),
            Happens::Crashes => its.ready = false,
            Happens::Ready | Happens::Fails | Happens::Dies => {}
        }
    }
}

fn any_happening() -> impl Strategy<Value = (usize, Happens)> {
    let happens = prop_oneof![
        8 => Just(Happens::Ready),
        4 => Just(Happens::Ends),
        1 => Just(Happens::Fails),
        1 => Just(Happens::Crashes),
        1 => Just(Happens::Dies),
    ];
    (0..4_usize, happens)
}

proptest! {
    #[test]
    fn no_bound_is_ever_exceeded_by_it_and_it_ends(
        max_surge in 0..3_u32,
        max_unavailable in 0..3_u32,
        happenings in prop::collection::vec(any_happening(), 0..60),
    ) {
        prop_assume!(max_surge + max_unavailable > 0);
        let names = ["a", "b", "c", "d"];
        let servers = names.map(|name| (name.to_owned(), seen(name)));
        let mut world = World { servers: BTreeMap::from(servers), number: 7 };
        let mut roll = roll(bounds(max_surge, max_unavailable), &world.seen());
        let calm = (0..40).flat_map(|_| names.iter().enumerate())
            .flat_map(|(place, _)| [(place, Happens::Ready), (place, Happens::Ends)]);
        for (place, happens) in happenings.into_iter().chain(calm) {
            let fewer = |world: &World| world.seen().iter().filter(|seen| !seen.ready).count() as u32;
            let more = |world: &World| -> u32 {
                world.seen().iter().map(|seen| u32::from(seen.successor) + seen.leaving).sum()
            };
            let before = (more(&world), fewer(&world));
            let (orders, _) = roll.turn(&world.seen(), Instant::now());
            for order in &orders {
                world.obey(order);
            }
            prop_assert!(more(&world) <= max_surge.max(before.0), "{} more", more(&world));
            prop_assert!(fewer(&world) <= max_unavailable.max(before.1), "{} fewer", fewer(&world));
            if matches!(happens, Happens::Dies) {
                roll = serde_json::from_str(&serde_json::to_string(&roll).unwrap()).unwrap();
            }
            world.happen(names[place], &happens);
        }
        roll.turn(&world.seen(), Instant::now());
        prop_assert!(roll.is_over(), "{roll:?} {:?}", world.seen());
        if roll.outcome().unwrap().failed.is_none() {
            prop_assert!(world.seen().iter().all(|seen| seen.instance > Instance(7)));
        }
    }
}
