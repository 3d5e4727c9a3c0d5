//! Which CPUs each server has: planned when CPUs or servers come and go, and set in the masks of its threads.
//!
//! spread.rs divides and affinity.rs sets. A server's part of all CPUs, while every one is there, is its
//! *home*, and is remembered: when one goes offline, what is left is divided among all, and when it is back
//! everybody is at home again.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use rustix::{io::Errno, thread::sched_getaffinity};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{Entry, Launch, Service};
use crate::{
    affinity,
    config::{self, Cpus},
    moment,
    spread::{self, Cpu, Portion},
    status::{CpusStatus, Timestamp},
    topology,
};

/// What is remembered between two looks.
#[derive(Default)]
pub(super) struct Seats {
    watch: affinity::Watch,
    /// Every CPU that was ever there, as it was when it was last seen.
    known: Vec<Cpu>,
}

/// The CPUs of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinned {
    /// Its part while all are there. Empty: it has none of its own.
    home: Vec<usize>,
    /// Those that it is to have. Empty: as dist-ctl itself.
    pub(super) now: Vec<usize>,
    /// What its threads' masks were last set to.
    set: Vec<usize>,
    /// Since when it is to have them: nanoseconds of CLOCK_MONOTONIC.
    since: u64,
}

impl Service {
    /// Gives a server that is about to be launched its CPUs.
    pub(super) fn seat(&mut self, entry: usize) {
        let Entry { config, cpus, .. } = &self.entries[entry];
        let is_planned = match &config.cpus {
            Cpus::All => cpus.now.is_empty(),
            Cpus::List(list) => cpus.now == *list,
            Cpus::Nodes(_) | Cpus::Spread(_) => !cpus.now.is_empty(),
        };
        if !is_planned {
            self.plan_cpus();
        }
        let cpus = &mut self.entries[entry].cpus;
        cpus.set.clone_from(&cpus.now);
    }

    /// Plans anew and sets masks when a CPU has gone or come, and every few seconds; and says which servers
    /// run on other CPUs than their own meanwhile.
    pub(super) fn keep_on_cpus(&mut self) {
        if self.cpus.watch.is_due() {
            self.plan_cpus();
            (0..self.entries.len()).for_each(|entry| self.pin(entry));
        }
    }

    /// Plans the CPUs of all servers, and moves those that run to theirs.
    pub(super) fn plan_cpus(&mut self) {
        let planned = |cpus: &Cpus| matches!(cpus, Cpus::Nodes(_) | Cpus::Spread(_));
        let usable = match self.entries.iter().any(|entry| !entry.gone && planned(&entry.config.cpus)) {
            true => match topology::usable(&self.cgroup) {
                Ok(usable) => usable,
                Err(error) => {
                    let name = &self.config.name;
                    let what = format!(
                        "service {name}: which CPUs there are cannot be read: {error}; servers stay where they are"
                    );
                    return self.note("CPUs", Some(what));
                }
            },
            false => Vec::new(),
        };
        self.note("CPUs", None);
        let Seats { known, .. } = &mut self.cpus;
        known.retain(|cpu| usable.iter().all(|other| other.number != cpu.number));
        known.extend(&usable);
        // An adopted server runs where it did, and whoever is gone leaves his CPUs to the others.
        let stays_out =
            |entry: &Entry| !entry.is_current() || entry.run.as_ref().is_some_and(|run| run.guest.is_some());
        let before: Vec<(&Cpus, &Pinned)> = self
            .entries
            .iter()
            .map(|entry| (if stays_out(entry) { &Cpus::All } else { &entry.config.cpus }, &entry.cpus))
            .collect();
        let mut plan = plan(&before, known, &usable);
        // Who is beside a server shares its CPUs.
        for (entry, its) in self.entries.iter().enumerate().filter(|(_, its)| !its.gone && !its.is_current())
        {
            plan[entry] = match self.find(&its.config.name) {
                Some(server) => plan[server].clone(),
                None => (its.cpus.home.clone(), its.cpus.now.clone()),
            };
        }
        for (entry, (home, now)) in plan.into_iter().enumerate() {
            let name = self.entries[entry].name();
            let Entry { config, cpus, changed, .. } = &mut self.entries[entry];
            *changed |= cpus.home != home || cpus.now != now;
            cpus.home = home;
            if cpus.now == now {
                continue;
            }
            if planned(&config.cpus) && !cpus.now.is_empty() && !now.is_empty() {
                let list = config::list_of_cpus;
                info!("server {name}: CPUs {} -> {}", list(&cpus.now), list(&now));
            }
            (cpus.now, cpus.since) = (now, moment::now());
            self.pin(entry);
        }
    }

    /// Sets the masks of a server's threads, as far as that is to be done.
    fn pin(&mut self, entry: usize) {
        let Entry { config, run, cpus, .. } = &self.entries[entry];
        // One whose node has no CPU runs on all.
        let lacks = cpus.now.is_empty() && config.cpus != Cpus::All;
        if cpus.now.is_empty() && cpus.set.is_empty() && !lacks {
            return;
        }
        let name = self.entries[entry].name();
        let run = run.as_ref().filter(|run| run.launch == Launch::Running && run.guest.is_none());
        let Some(run) = run else { return self.note(&format!("CPUs of {name}"), None) };
        let wanted = match cpus.now.is_empty() {
            true => sched_getaffinity(None).ok(),
            false => affinity::mask(&cpus.now).ok(),
        };
        let Some(wanted) = wanted else { return };
        let before = affinity::mask(&cpus.set).ok().filter(|_| cpus.set != cpus.now && !cpus.set.is_empty());
        let set = || affinity::restore(&run.cgroup.processes(), before.as_ref(), &wanted);
        // And those of threads that others of them have begun meanwhile.
        let set = set().and_then(|()| if before.is_some() { set() } else { Ok(()) });
        let own = match &config.cpus {
            nodes @ Cpus::Nodes(_) => nodes.to_string(),
            _ => config::list_of_cpus(&cpus.now),
        };
        let trouble = match set {
            Ok(()) if !lacks => None,
            Ok(()) | Err(Errno::INVAL) => Some(format!(
                "server {name}: none of its CPUs ({own}) is online and in its cpuset: runs on others until one is"
            )),
            Err(error) => Some(format!("server {name}: cannot be kept on CPUs {own}: {error}; tries again")),
        };
        if set.is_ok() {
            let Entry { cpus, changed, .. } = &mut self.entries[entry];
            *changed |= cpus.set != cpus.now;
            cpus.set.clone_from(&cpus.now);
        }
        self.note(&format!("CPUs of {name}"), trouble);
    }

    /// Which CPUs a server has, as the status says it. `None`: as dist-ctl itself.
    pub(super) fn cpus_status(&self, entry: usize) -> Option<CpusStatus> {
        let Entry { config, cpus, run, .. } = &self.entries[entry];
        if run.as_ref().is_some_and(|run| run.guest.is_some()) || cpus.now.is_empty() {
            return None;
        }
        let why = match &config.cpus {
            Cpus::All => return None,
            Cpus::List(_) => "configured".to_owned(),
            nodes @ Cpus::Nodes(_) => format!("those of {nodes}"),
            Cpus::Spread(_) if cpus.home != cpus.now => {
                format!("spread over those that are there; {} when all are", config::list_of_cpus(&cpus.home))
            }
            Cpus::Spread(Portion::Cpus) => "spread: its part of them".to_owned(),
            Cpus::Spread(Portion::Node) => "spread: its NUMA node".to_owned(),
        };
        let since = Timestamp::of(moment::moment(cpus.since));
        Some(CpusStatus { list: config::list_of_cpus(&cpus.now), why, since })
    }
}

/// The home and the CPUs of each server, of what it may use and what it had.
fn plan(servers: &[(&Cpus, &Pinned)], known: &[Cpu], usable: &[Cpu]) -> Vec<(Vec<usize>, Vec<usize>)> {
    let mut plan: Vec<(Vec<usize>, Vec<usize>)> = servers
        .iter()
        .map(|(cpus, _)| match cpus {
            Cpus::All | Cpus::Spread(_) => (Vec::new(), Vec::new()),
            Cpus::List(list) => (Vec::new(), list.clone()),
            Cpus::Nodes(nodes) => {
                let of_them = usable.iter().filter(|cpu| nodes.contains(&cpu.node));
                (Vec::new(), of_them.map(|cpu| cpu.number).collect())
            }
        })
        .collect();
    for portion in [Portion::Cpus, Portion::Node] {
        let members: Vec<usize> =
            (0..servers.len()).filter(|member| *servers[*member].0 == Cpus::Spread(portion)).collect();
        let mut homes: Vec<Vec<usize>> =
            members.iter().map(|member| servers[*member].1.home.clone()).collect();
        let taken: BTreeSet<usize> = homes.iter().flatten().copied().collect();
        // Somebody is new, or gone, or a CPU is there that was not before. Otherwise all have homes, also in
        // CPUs that are offline, and of which we may know nothing because we were not there.
        if homes.iter().any(Vec::is_empty) || usable.iter().any(|cpu| !taken.contains(&cpu.number)) {
            homes = spread::divide(known, &homes, portion);
        }
        let now = spread::divide(usable, &homes, portion);
        for ((member, home), now) in members.into_iter().zip(homes).zip(now) {
            plan[member] = (home, now);
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(numbers: &[usize]) -> Vec<Cpu> {
        numbers.iter().map(|&number| Cpu { number, node: number / 4, core: number }).collect()
    }

    /// Plans as often as there are steps: what is there, and how many servers say "spread". What they have is
    /// passed on from step to step, and what is known as long as it is the same distributor.
    fn story(steps: &[(&[usize], usize)], one_distributor: bool) -> Vec<Vec<Vec<usize>>> {
        let (mut had, mut known) = (Vec::new(), Vec::new());
        let mut story = Vec::new();
        for (numbers, servers) in steps {
            let usable = cpus(numbers);
            if !one_distributor {
                known.clear();
            }
            known.retain(|cpu: &Cpu| !numbers.contains(&cpu.number));
            known.extend(&usable);
            had.resize(*servers, Pinned::default());
            let spread = Cpus::Spread(Portion::Cpus);
            let before: Vec<(&Cpus, &Pinned)> = had.iter().map(|pinned| (&spread, pinned)).collect();
            let after = plan(&before, &known, &usable);
            for (pinned, (home, now)) in had.iter_mut().zip(after) {
                (pinned.home, pinned.now) = (home, now);
            }
            story.push(had.iter().map(|pinned| pinned.now.clone()).collect());
        }
        story
    }

    #[test]
    fn whoever_lost_a_cpu_gets_it_back_whatever_happened_meanwhile() {
        let all: &[usize] = &[0, 1, 2, 3];
        for one_distributor in [true, false] {
            let away =
                story(&[(all, 2), (&[0, 1, 2], 2), (&[2], 2), (&[0, 2, 3], 2), (all, 2)], one_distributor);
            let two = vec![vec![0, 1], vec![2, 3]];
            assert_eq!(away[0], two);
            assert_eq!(away[1], [vec![0, 1], vec![2]]);
            assert_eq!(away[2], [vec![2], vec![2]]);
            assert_eq!(away[3], [vec![0], vec![2, 3]]);
            assert_eq!(away[4], two, "one distributor: {one_distributor}");
        }
    }

    #[test]
    fn a_server_that_comes_while_a_cpu_is_away_has_its_part_when_that_is_back() {
        let story = story(&[(&[0, 1, 2, 3], 2), (&[0, 1, 2], 2), (&[0, 1, 2], 3), (&[0, 1, 2, 3], 3)], true);
        assert_eq!(story[2], [vec![0], vec![2], vec![1]]);
        assert_eq!(story[3], [vec![0, 1], vec![2], vec![3]]);
    }

    #[test]
    fn a_cpu_that_was_never_there_is_divided_too_and_nobody_else_moves() {
        let story = story(&[(&[0, 1], 2), (&[0, 1, 2], 2), (&[0, 1, 2, 3], 2), (&[0, 1, 2, 3], 1)], true);
        assert_eq!(story[0], [vec![0], vec![1]]);
        assert_eq!(story[1], [vec![0, 2], vec![1]]);
        assert_eq!(story[2], [vec![0, 2], vec![1, 3]]);
        assert_eq!(story[3], [vec![0, 1, 2, 3]]);
    }

    #[test]
    fn each_kind_is_planned_by_itself() {
        let none = Pinned::default();
        let kinds = [
            Cpus::All,
            Cpus::List(vec![0, 9]),
            Cpus::Nodes(vec![1]),
            Cpus::Nodes(vec![2]),
            Cpus::Spread(Portion::Node),
            Cpus::Spread(Portion::Cpus),
            Cpus::Spread(Portion::Node),
        ];
        let servers: Vec<(&Cpus, &Pinned)> = kinds.iter().map(|cpus| (cpus, &none)).collect();
        let there = cpus(&[0, 1, 2, 3, 4, 5]);
        let now: Vec<Vec<usize>> = plan(&servers, &there, &there).into_iter().map(|(_, now)| now).collect();
        let all = vec![0, 1, 2, 3, 4, 5];
        assert_eq!(now, [vec![], vec![0, 9], vec![4, 5], vec![], vec![0, 1, 2, 3], all, vec![4, 5]]);
    }
}
