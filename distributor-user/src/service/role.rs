//! Which instance of a server is the server, and which ones only run beside it.
//!
//! Pure. Usually there is one. While a server is replaced there are two, and the one before may take
//! its time to end. Here it is found out again from what was written of each.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::Found;
use crate::{link::Child, server::Instance};

/// What an instance is to its server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It is the server, and is started again when it ends.
    #[default]
    Current,
    /// It is to be the server as soon as it is ready. It has one try.
    Successor,
    /// Another one is the server now, or none is to be: it ends.
    Leaving,
}

/// Each instance once, by what was written of it last, with the role that it has; and the children of which
/// nothing was taken. What was found comes with what was written last first (`latest_first`).
///
/// A distributor can die after every word that it writes, so there may be two words about one instance, and
/// words about one that has ended. What the label of the server itself says is true: it is written first
/// when something has changed, and names all that are beside it.
pub(crate) fn settle(found: Vec<Found>) -> (Vec<Found>, Vec<Child>) {
    let mut seen = HashSet::new();
    let (found, mut others): (Vec<Found>, Vec<Found>) =
        found.into_iter().partition(|found| seen.insert((found.label.server.clone(), instance(found))));
    let mut servers: HashMap<String, (Instance, Vec<Instance>)> = HashMap::new();
    for found in found.iter().filter(|found| found.label.role == Role::Current) {
        let its = servers.entry(found.label.server.clone()).or_insert((Instance(0), Vec::new()));
        if its.0 <= instance(found) {
            *its = (instance(found), found.label.beside.clone());
        }
    }
    let mut settled = Vec::new();
    for mut found in found {
        let role = match (servers.get(&found.label.server), found.label.role) {
            (Some((server, _)), Role::Current) if *server == instance(&found) => Some(Role::Current),
            // It was replaced, and that was written down of the other one only.
            (Some((_, beside)), Role::Current) => beside.contains(&instance(&found)).then_some(Role::Leaving),
            (Some((_, beside)), role) => beside.contains(&instance(&found)).then_some(role),
            // There is nothing that it could be beside.
            (None, _) => Some(Role::Leaving),
        };
        match role {
            Some(role) => {
                found.label.role = role;
                settled.push(found);
            }
            None => others.push(found),
        }
    }
    // Their cgroups may still be there.
    for found in settled.iter_mut().filter(|found| found.label.role == Role::Current) {
        for other in others.iter().filter(|other| other.label.server == found.label.server) {
            found.label.machine.take_number(instance(other));
        }
    }
    (settled, others.into_iter().filter_map(|found| found.child).collect())
}

fn instance(found: &Found) -> Instance {
    found.label.machine.instance()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{server::Server, service::Label};

    /// What the monitor knows of an instance (it has a process), or the record.
    fn found(server: &str, instance: u32, role: Role, by_monitor: bool) -> Found {
        let label = Label {
            service: "shop".to_owned(),
            server: server.to_owned(),
            role,
            machine: Server::new(Instance(instance), Instant::now()),
            run: None,
            weight: 100,
            limit: None,
            health: Default::default(),
            drain: None,
            resumed: None,
            total_before: 0,
            most_before: 0,
            retired: Vec::new(),
            adopted: None,
            extra: None,
            not_replaced: None,
            cpus: Default::default(),
            said: None,
            beside: Vec::new(),
        };
        let child = Child { id: 1, pid: 4711, label: Vec::new(), exit: None };
        Found { label, child: by_monitor.then_some(child) }
    }

    fn beside(mut server: Found, others: &[u32]) -> Found {
        server.label.beside = others.iter().copied().map(Instance).collect();
        server
    }

    #[test]
    fn each_instance_has_one_role() {
        use Role::{Current, Leaving, Successor};
        let server = |instance, others: &[u32]| beside(found("shop/1", instance, Current, true), others);
        let recorded = |instance, others: &[u32]| beside(found("shop/1", instance, Current, false), others);
        let other = |instance, role| found("shop/1", instance, role, true);
        for (row, words, expected, children_left) in [
            ("at rest", vec![server(7, &[]), recorded(7, &[])], vec![(7, Current)], 0),
            (
                "it is being replaced",
                vec![other(8, Successor), server(7, &[8])],
                vec![(8, Successor), (7, Current)],
                0,
            ),
            (
                "replaced, dead between the two words",
                vec![
                    server(8, &[7]),
                    found("shop/1", 8, Successor, false),
                    server(7, &[8]),
                    recorded(7, &[8]),
                ],
                vec![(8, Current), (7, Leaving)],
                0,
            ),
            (
                "two leave",
                vec![server(9, &[8, 7]), other(8, Leaving), other(7, Leaving)],
                vec![(9, Current), (8, Leaving), (7, Leaving)],
                0,
            ),
            (
                "one has ended",
                vec![server(9, &[8]), other(8, Leaving), other(7, Leaving)],
                vec![(9, Current), (8, Leaving)],
                1,
            ),
            ("its successor has ended", vec![other(8, Successor), server(7, &[])], vec![(7, Current)], 1),
            ("it was started again", vec![server(8, &[]), server(7, &[])], vec![(8, Current)], 1),
            (
                "it was started again while its successor comes",
                vec![server(9, &[8]), other(8, Successor), server(7, &[8])],
                vec![(9, Current), (8, Successor)],
                1,
            ),
            ("removed", vec![other(7, Leaving), found("shop/1", 7, Leaving, false)], vec![(7, Leaving)], 0),
            (
                "removed with its successor",
                vec![other(8, Successor), other(7, Leaving)],
                vec![(8, Leaving), (7, Leaving)],
                0,
            ),
        ] {
            // Another server is nobody's business here.
            let words = words.into_iter().chain([found("shop/2", 3, Current, true)]);
            let (settled, children) = settle(words.collect());
            let (other, its): (Vec<_>, Vec<_>) =
                settled.iter().partition(|found| found.label.server == "shop/2");
            let its: Vec<_> = its.iter().map(|it| (it.label.machine.instance().0, it.label.role)).collect();
            assert_eq!((its, children.len()), (expected, children_left), "{row}");
            assert_eq!(other.iter().map(|it| it.label.role).collect::<Vec<_>>(), [Current], "{row}");
        }
    }

    #[test]
    fn the_number_of_one_that_counts_no_more_is_not_used_again() {
        let (settled, _) =
            settle(vec![found("shop/1", 8, Role::Successor, true), found("shop/1", 7, Role::Current, true)]);
        let machine = settled.into_iter().next().unwrap().label.machine;
        assert_eq!(machine.instance(), Instance(7));
        assert_eq!(machine.next_number(), Instance(9));
    }

    #[test]
    fn a_label_without_a_role_is_the_servers() {
        let label = found("shop/1", 7, Role::Leaving, true).label;
        let mut json = serde_json::to_value(&label).unwrap();
        json.as_object_mut().unwrap().remove("role");
        let read: Label = serde_json::from_value(json).unwrap();
        assert_eq!(read.role, Role::Current, "as a distributor before wrote it");
    }
}
