//! Finding out what runs of a service whose monitor was killed.
//!
//! Gathers what was recorded and what its cgroups hold, has recovery.rs decide, and has the
//! monitor watch what goes on. What belongs to nobody is killed.

use std::{cmp::Reverse, collections::HashSet, os::fd::AsFd as _, time::Instant};

use anyhow::Context as _;
use tracing::{info, warn};

use super::{Found, Host, Label, Ran, Role, Service, launch::is_unaccounted};
use crate::{
    cgroup::Cgroup,
    config, instance, kernel, launch,
    link::Child,
    listener,
    message::{Exit, ToMonitor},
    record,
    recovery::{Decision, Finding, Group, Past, examine},
    server::{self, Instance, Server},
};

/// What there is of a service before its distributor has begun.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    Nothing,
    /// Processes of it run, and may go on.
    Servers,
    /// They run, and cannot go on as the service is to be now; and why.
    Otherwise(String),
}

/// Looks what an earlier run has left of a service.
pub fn left(
    config: &config::Service,
    recorded: Option<&record::Service>,
    place: &instance::Instance,
) -> anyhow::Result<Left> {
    if place.cgroup.child(&config.name).processes().is_empty() {
        return Ok(Left::Nothing);
    }
    let pins = kernel::pins(&place.pins, &config.name);
    if let Some(before) = kernel::addresses(&pins)?
        && !kernel::are(&before, &config.listen)
    {
        return Ok(Left::Otherwise("it listens on other addresses than before".to_owned()));
    }
    Ok(match recorded.map(|recorded| recorded.uid) {
        Some(uid) if uid != super::uid(config) => {
            Left::Otherwise(format!("its sockets belonged to user {uid} before"))
        }
        _ => Left::Servers,
    })
}

impl Service {
    /// What there is of each of its servers, for [`Service::take_over`], but for those that are
    /// `known`: the monitor has them already, because a distributor before us was killed before it
    /// was ready. Of one that has ended it knows how, and so what the rest of its cgroup is: a
    /// daemon, or to be killed.
    pub fn survey(
        &mut self,
        recorded: Option<record::Service>,
        known: &[Found],
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<Found>> {
        let lives = |child: &&Child| child.exit.is_none();
        let ours = known.iter().map(|known| &known.label).filter(|label| label.adopted.is_none());
        let mut newest: Vec<&Label> = ours.collect();
        newest.sort_by_key(|label| Reverse(label.machine.instance()));
        let known: Vec<(&Label, u32)> = known
            .iter()
            .filter_map(|known| Some((&known.label, known.child.as_ref().filter(lives)?.pid)))
            .collect();
        let (recorded, released) =
            recorded.map_or((Vec::new(), Vec::new()), |service| (service.servers, service.released));
        released.iter().for_each(|adopted| self.remember_released(adopted.clone()));
        let cgroups = self.instances();
        let mut kept = HashSet::new();
        // Those that the monitor has, and that are beside their server: their cgroups are theirs alone.
        let beside = newest.iter().filter(|label| label.role != Role::Current);
        kept.extend(beside.map(|label| (short_name(&label.server), label.machine.instance().0)));
        for label in recorded.iter().map(|server| &server.label).filter(|label| label.adopted.is_none()) {
            let is_known = kept.contains(&(short_name(&label.server), label.machine.instance().0));
            if !is_known {
                self.place_of(label, false)?;
            }
        }
        let mut found = Vec::new();
        for entry in (0..self.entries.len()).filter(|entry| self.entries[*entry].role != Role::Current) {
            let its = recorded.iter().find(|recorded| self.entries[entry].is_labelled(&recorded.label));
            let (short, instance) = self.cgroup_of(entry);
            let mut its_cgroups = of(&short, &cgroups);
            its_cgroups.retain(|(number, _)| *number == instance);
            found.push(self.survey_one(entry, its, &its_cgroups, host)?.0);
            kept.insert((short, instance));
        }
        for entry in (0..self.entries.len()).filter(|entry| self.entries[*entry].role == Role::Current) {
            let name = &self.entries[entry].config.name;
            let its = recorded.iter().find(|recorded| self.entries[entry].is_labelled(&recorded.label));
            let short = &self.entries[entry].config.short_name;
            let mut its_cgroups = of(short, &cgroups);
            its_cgroups.retain(|(number, _)| !kept.contains(&(short.clone(), *number)));
            // Of a newer instance, which has its cgroup, the monitor may know nothing.
            let last = its_cgroups.iter().map(|(number, _)| *number).max().unwrap_or(0);
            let is_its = |label: &&Label| label.server == *name && label.role == Role::Current;
            let living = known.iter().map(|(label, _)| *label).find(is_its);
            let ended = newest.iter().copied().find(is_its);
            let ended = ended.filter(|label| label.machine.instance().0 >= last);
            if let Some(label) = living.or(ended) {
                kept.insert((short.clone(), label.machine.instance().0));
                continue;
            }
            let (surveyed, instance) = self.survey_one(entry, its, &its_cgroups, host)?;
            kept.insert((short.clone(), instance.0));
            found.push(surveyed);
        }
        let adopted = recorded.iter().filter(|server| {
            let pid = server.label.adopted.as_ref().map(|adopted| adopted.pid);
            pid.is_some_and(|pid| known.iter().all(|(_, known)| *known != pid))
        });
        for server in adopted {
            let child = self.watch_again(server, host)?;
            found.extend(child.map(|child| Found { label: server.label.clone(), child: Some(child) }));
        }
        let adopted = recorded.iter().filter_map(|server| server.label.adopted.as_ref());
        let adopted = adopted.chain(known.iter().filter_map(|(label, _)| label.adopted.as_ref()));
        found.extend(self.find_unrecorded(&adopted.chain(&released).collect::<Vec<_>>(), host)?);
        for (short, number, cgroup) in cgroups {
            if kept.contains(&(short.clone(), number)) {
                continue;
            }
            // It may take a moment until that is gone, and until then its number is nobody else's.
            for found in found.iter_mut().filter(|found| short_name(&found.label.server) == short) {
                found.label.machine.take_number(Instance(number));
            }
            let processes = cgroup.processes();
            if !processes.is_empty() {
                let of = format!("{}/{short}", self.config.name);
                info!("processes {processes:?} are what was left of {of}; kills them");
            }
            close(&cgroup)?;
        }
        Ok(found)
    }

    /// What was recorded of each of its servers, for the next distributor of the same monitor, which
    /// knows of these. Whoever runs by the record and is not known, and whoever is not known at all, is
    /// looked for as after the monitor's death.
    pub fn recall(
        &mut self,
        recorded: Vec<record::Server>,
        known: &[Found],
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<Found>> {
        let mut found = Vec::new();
        let labels = recorded.iter().map(|server| &server.label);
        let labels = labels.chain(known.iter().map(|known| &known.label));
        let beside: HashSet<(String, u32)> = labels
            .filter(|label| label.role != Role::Current)
            .map(|label| (label.server.clone(), label.machine.instance().0))
            .collect();
        for server in recorded {
            let label = &server.label;
            if label.adopted.is_none()
                && is_unaccounted(label, known)
                && let Some(entry) = self.place_of(label, false)?
            {
                let cgroups = self.instances();
                let its = |number: u32| match self.entries[entry].role {
                    // Those of others of its name are not its own.
                    Role::Current => !beside.contains(&(label.server.clone(), number)),
                    Role::Successor | Role::Leaving => number == label.machine.instance().0,
                };
                let short = &self.entries[entry].config.short_name;
                let mut groups = of(short, &cgroups);
                groups.retain(|(number, _)| its(*number));
                found.push(self.survey_one(entry, Some(&server), &groups, host)?.0);
                continue;
            }
            found.push(Found { label: server.label, child: None });
        }
        let cgroups = self.instances();
        for entry in 0..self.entries.len() {
            let config = &self.entries[entry].config;
            // The record may have been lost meanwhile.
            if !known.iter().chain(&found).any(|found| found.label.server == config.name) {
                let its = of(&config.short_name, &cgroups);
                found.push(self.survey_one(entry, None, &its, host)?.0);
            }
        }
        Ok(found)
    }

    /// How the cgroup of an entry's instance is named.
    fn cgroup_of(&self, entry: usize) -> (String, u32) {
        let entry = &self.entries[entry];
        (entry.config.short_name.clone(), entry.machine.instance().0)
    }

    /// The cgroups of all instances, with server and number.
    pub(super) fn instances(&self) -> Vec<(String, u32, Cgroup)> {
        self.cgroup.children().into_iter().filter_map(named).collect()
    }

    /// One server, and which of its instances is the one that counts.
    fn survey_one(
        &self,
        entry: usize,
        recorded: Option<&record::Server>,
        cgroups: &[(u32, &Cgroup)],
        host: &mut Host<'_>,
    ) -> anyhow::Result<(Found, Instance)> {
        let mut label = recorded.map_or_else(|| self.label(entry), |recorded| recorded.label.clone());
        // Before the cgroups are looked at: while it is open, its number is nobody else's.
        let main = recorded.and_then(|recorded| record::process(recorded.label.machine.pid()?));
        let groups: Vec<Group> =
            cgroups.iter().map(|&(number, cgroup)| group(number, cgroup)).collect::<Result<_, _>>()?;
        let past = recorded.map(|recorded| Past {
            machine: &recorded.label.machine,
            start_time: recorded.start_time,
            start_time_now: main.as_ref().map(|(_, start_time)| *start_time),
        });
        let Finding { instance, decision, goes_by_record } = examine(past, &groups);
        let cgroup = cgroups.iter().find(|(number, _)| *number == instance.0).map(|(_, cgroup)| *cgroup);
        let name = &self.entries[entry].config.name;
        let mut child = None;
        match decision {
            Decision::Watch { pid } => {
                let is_main = goes_by_record && label.machine.pid() == Some(pid);
                let watched = if is_main { main } else { record::process(pid) };
                // It was in there before its descriptor was opened.
                let is_there = |_: &_| cgroup.is_some_and(|cgroup| cgroup.processes().contains(&pid));
                let pidfd = watched.filter(is_there).map(|(pidfd, _)| pidfd);
                if !goes_by_record {
                    warn!("server {name} runs (pid {pid}), and nothing was recorded of it");
                    let processes = groups.iter().find(|group| group.instance == instance);
                    let processes = processes.map_or(&[][..], |group| &group.processes);
                    label = self.reconstruct(entry, instance, pid, processes)?;
                }
                let id = host.link.number();
                let bytes = serde_json::to_vec(&label)?;
                let exit = match pidfd {
                    Some(pidfd) => {
                        let watch = ToMonitor::Watch { id, pid, label: bytes.clone() };
                        host.link.send(&watch, Some(pidfd.as_fd()))?;
                        None
                    }
                    // It has just ended.
                    None => Some(Exit::Unknown),
                };
                child = Some(Child { id, pid, label: bytes, exit });
            }
            Decision::MainEnded { .. } => {
                let (id, pid) = (host.link.number(), label.machine.pid().unwrap_or(0));
                child = Some(Child { id, pid, label: Vec::new(), exit: Some(Exit::Unknown) });
            }
            Decision::GoOn => {}
            Decision::StartAfresh | Decision::Start => {
                if let Some(cgroup) = cgroup {
                    close(cgroup)?;
                }
                label.retired.extend(label.run.take().map(|ran| (ran.slot, ran.base)));
                label.machine = label.machine.interrupted(instance, Instant::now());
            }
        }
        Ok((Found { label, child }, instance))
    }

    /// The label of an instance of which nothing was written down.
    fn reconstruct(
        &self,
        entry: usize,
        instance: Instance,
        pid: u32,
        processes: &[u32],
    ) -> anyhow::Result<Label> {
        let run = server::Run::found(pid, Instant::now());
        let policy = &self.entries[entry].policy;
        let mut label = self.label(entry);
        label.machine = Server::found(instance, run, Instant::now(), policy);
        let (homes, plan, load) = (self.kernel.homes()?, self.kernel.plan()?, self.kernel.load()?);
        let listeners = listener::find(processes).context("look for the listeners of what runs")?;
        let home = homes.iter().find(|(cookie, _)| listeners.iter().any(|found| found.cookie == *cookie));
        if let Some(slot) = home.map(|(_, home)| home.slot) {
            let place = slot as usize % load.total.len();
            label.run = Some(Ran {
                slot,
                generation: plan.servers[place].generation,
                base: load.total[place],
                job: self.job(entry)?,
            });
        }
        Ok(label)
    }
}

/// A server's name without that of its service.
pub(super) fn short_name(server: &str) -> String {
    server.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Those of one server.
fn of<'a>(short: &str, cgroups: &'a [(String, u32, Cgroup)]) -> Vec<(u32, &'a Cgroup)> {
    let its = cgroups.iter().filter(|(its, ..)| its == short);
    its.map(|(_, number, cgroup)| (*number, cgroup)).collect()
}

/// Ends what is in a cgroup that is not used any more, and lets nobody in: a launcher that was on its
/// way when its monitor was killed finds it removed, and ends.
fn close(cgroup: &Cgroup) -> anyhow::Result<()> {
    match cgroup.remove() {
        Ok(()) => Ok(()),
        Err(_) => cgroup.kill(),
    }
}

fn group(number: u32, cgroup: &Cgroup) -> anyhow::Result<Group> {
    let processes =
        cgroup.members().with_context(|| format!("look who is in {}", cgroup.path().display()))?;
    Ok(Group { instance: Instance(number), first: first(&processes), processes })
}

/// The process from which the others come, unless it is a launcher still.
fn first(processes: &[u32]) -> Option<u32> {
    let own = |pid: u64| processes.iter().any(|&other| u64::from(other) == pid);
    let first = processes.iter().copied().find(|&pid| !record::parent(pid).is_some_and(own));
    first.filter(|&pid| !launch::is_launcher(pid))
}

/// The server and the number of the instance in the name of a cgroup.
fn named(cgroup: Cgroup) -> Option<(String, u32, Cgroup)> {
    let name = cgroup.path().file_name()?.to_str()?;
    let (short, number) = name.rsplit_once('.')?;
    let (short, number) = (short.to_owned(), number.parse().ok()?);
    Some((short, number, cgroup))
}
