//! Finding out what runs of a service whose monitor was killed.
//!
//! Gathers what was recorded and what its cgroups hold, has recovery.rs decide, and has the
//! monitor watch what goes on. What belongs to nobody is killed.

use std::{collections::HashSet, os::fd::AsFd as _, time::Instant};

use anyhow::Context as _;
use tracing::{info, warn};

use super::{Found, Host, Label, Ran, Service};
use crate::{
    cgroup::Cgroup,
    config, instance, kernel, launch,
    link::Child,
    listener,
    message::{Exit, ToMonitor},
    record,
    recovery::{Decision, Recorded, Seen, decide},
    server::{self, Instance, Main, Server},
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
    /// `known` and live: the monitor watches them already, because a distributor before us was
    /// killed before it was ready.
    pub fn survey(
        &mut self,
        recorded: Option<record::Service>,
        known: &[Found],
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<Found>> {
        let lives = |child: &&Child| child.exit.is_none();
        let known: Vec<(&Label, u32)> = known
            .iter()
            .filter_map(|known| Some((&known.label, known.child.as_ref().filter(lives)?.pid)))
            .collect();
        let (recorded, released) =
            recorded.map_or((Vec::new(), Vec::new()), |service| (service.servers, service.released));
        released.iter().for_each(|adopted| self.remember_released(adopted.clone()));
        for label in recorded.iter().map(|server| &server.label).filter(|label| label.adopted.is_none()) {
            if self.find(&label.server).is_none() {
                self.place_again(label)?;
            }
        }
        let cgroups: Vec<(String, u32, Cgroup)> =
            self.cgroup.children().into_iter().filter_map(named).collect();
        let mut kept = HashSet::new();
        let mut found = Vec::new();
        for entry in 0..self.entries.len() {
            let name = &self.entries[entry].config.name;
            let its = recorded.iter().find(|recorded| recorded.label.server == *name);
            let short = &self.entries[entry].config.short_name;
            if let Some((label, _)) = known.iter().find(|(label, _)| label.server == *name) {
                kept.insert((short.clone(), label.machine.instance().0));
                continue;
            }
            let of_it: Vec<(u32, &Cgroup)> = cgroups
                .iter()
                .filter(|(its, ..)| its == short)
                .map(|(_, number, cgroup)| (*number, cgroup))
                .collect();
            let (surveyed, instance) = self.survey_one(entry, its, &of_it, host)?;
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
            let processes = cgroup.processes();
            if !processes.is_empty() && !kept.contains(&(short.clone(), number)) {
                let of = format!("{}/{short}", self.config.name);
                info!("processes {processes:?} are what was left of {of}; kills them");
                cgroup.kill()?;
            }
        }
        Ok(found)
    }

    /// One server, and which of its instances is the one that counts.
    fn survey_one(
        &self,
        entry: usize,
        recorded: Option<&record::Server>,
        cgroups: &[(u32, &Cgroup)],
        host: &mut Host<'_>,
    ) -> anyhow::Result<(Found, Instance)> {
        let newest = cgroups.iter().map(|(number, _)| *number).max().unwrap_or(0);
        let populated = cgroups.iter().filter(|(_, cgroup)| !cgroup.processes().is_empty());
        let running = populated.map(|(number, _)| *number).max();
        let mut label = recorded.map_or_else(|| self.label(entry), |recorded| recorded.label.clone());
        // A newer one runs, and the recorded one does not: the record is out of date, for want of
        // room on the disk.
        let is_newer = running.is_some_and(|running| running > label.machine.instance().0);
        let lives = label.machine.pid().zip(recorded.and_then(|recorded| recorded.start_time));
        let lives = lives.is_some_and(|(pid, start)| record::process(pid, start).is_some());
        let run = label.machine.run().filter(|_| lives || !is_newer).cloned();
        let instance = match (&run, running) {
            (None, Some(running)) => Instance(running),
            (None, None) => Instance(newest.max(label.machine.instance().0)),
            (Some(_), _) => label.machine.instance(),
        };
        let cgroup = cgroups.iter().find(|(number, _)| *number == instance.0).map(|(_, cgroup)| *cgroup);
        let processes = cgroup.map_or(Vec::new(), Cgroup::processes);
        let main = match run.as_ref().map(server::Run::main) {
            Some(Main::Running { pid }) => recorded
                .and_then(|recorded| record::process(pid, recorded.start_time?))
                .filter(|_| processes.contains(&pid)),
            _ => None,
        };
        let recorded = match (recorded, &run) {
            (None, _) => Recorded::Nothing,
            (Some(_), None) => Recorded::Idle,
            (Some(_), Some(run)) => Recorded::Running { main: run.main(), main_lives: main.is_some() },
        };
        let seen = Seen { populated: !processes.is_empty(), first: first(&processes) };
        let name = &self.entries[entry].config.name;
        let mut child = None;
        match decide(recorded, seen) {
            Decision::Watch { pid } => {
                let pidfd = match main {
                    Some(pidfd) => Some(pidfd),
                    None => record::start_time(pid).and_then(|start| record::process(pid, start)),
                };
                if run.is_none() {
                    warn!("server {name} runs (pid {pid}), and nothing was recorded of it");
                    label = self.reconstruct(entry, instance, pid, &processes)?;
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
                    cgroup.kill()?;
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
