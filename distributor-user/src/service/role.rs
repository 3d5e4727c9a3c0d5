//! Which instance of a server is the server, and which ones only run beside it.
//!
//! Pure. Usually there is one. While a server is replaced there are two, and the one before may take
//! its time to end. Here it is found out again from what was written of each.
#![forbid(unsafe_code)]

use std::collections::HashSet;

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
/// A distributor can die after every word that it writes. So there may be two words about one instance,
/// and of two that changed roles one may be known in its new role and the other in its old one. The one
/// that leaves is written down before the one that takes its place.
pub(crate) fn settle(found: Vec<Found>) -> (Vec<Found>, Vec<Child>) {
    let mut seen = HashSet::new();
    let key = |found: &Found| (found.label.server.clone(), found.label.machine.instance());
    let (mut found, others): (Vec<Found>, Vec<Found>) =
        found.into_iter().partition(|found| seen.insert(key(found)));
    for place in 0..found.len() {
        if found[place].label.role != Role::Successor {
            continue;
        }
        let (server, instance) = key(&found[place]);
        let newest = |role: Role| -> Option<Instance> {
            let its = found.iter().filter(|it| it.label.server == server && it.label.role == role);
            its.map(|it| it.label.machine.instance()).max()
        };
        found[place].label.role = match newest(Role::Current) {
            // The one before has left already.
            None if newest(Role::Successor) == Some(instance) => Role::Current,
            None => Role::Leaving,
            // It was to take the place of an earlier one than this.
            Some(current) if current > instance => Role::Leaving,
            Some(_) => Role::Successor,
        };
    }
    (found, others.into_iter().filter_map(|found| found.child).collect())
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
            total_before: 0,
            most_before: 0,
            retired: Vec::new(),
            adopted: None,
            extra: None,
            not_replaced: None,
        };
        let child = Child { id: 1, pid: 4711, label: Vec::new(), exit: None };
        Found { label, child: by_monitor.then_some(child) }
    }

    #[test]
    fn each_instance_has_one_role() {
        use Role::{Current, Leaving, Successor};
        for (row, words, expected) in [
            ("at rest", vec![(7, Current, true), (7, Current, false)], vec![(7, Current)]),
            ("replaced", vec![(8, Successor, true), (7, Current, true)], vec![(8, Successor), (7, Current)]),
            (
                "dead between the two words",
                vec![(8, Successor, true), (8, Successor, false), (7, Leaving, true), (7, Current, false)],
                vec![(8, Current), (7, Leaving)],
            ),
            (
                "dead before the record",
                vec![(8, Current, true), (8, Successor, false), (7, Leaving, true), (7, Current, false)],
                vec![(8, Current), (7, Leaving)],
            ),
            (
                "two leave",
                vec![(9, Current, true), (8, Leaving, true), (7, Leaving, true)],
                vec![(9, Current), (8, Leaving), (7, Leaving)],
            ),
            (
                "an old word",
                vec![(9, Current, true), (8, Successor, false)],
                vec![(9, Current), (8, Leaving)],
            ),
            (
                "two that come and nobody",
                vec![(9, Successor, true), (8, Successor, true)],
                vec![(9, Current), (8, Leaving)],
            ),
            ("removed", vec![(7, Leaving, true), (7, Leaving, false)], vec![(7, Leaving)]),
        ] {
            let words = words.into_iter().map(|(instance, role, by)| found("shop/1", instance, role, by));
            // Another server is nobody's business here.
            let words = words.chain([found("shop/2", 3, Current, true)]);
            let (settled, _) = settle(words.collect());
            let (other, its): (Vec<_>, Vec<_>) =
                settled.iter().partition(|found| found.label.server == "shop/2");
            let its: Vec<_> = its.iter().map(|it| (it.label.machine.instance().0, it.label.role)).collect();
            assert_eq!(its, expected, "{row}");
            assert_eq!(other.iter().map(|it| it.label.role).collect::<Vec<_>>(), [Current], "{row}");
        }
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
