//! Starting an instance of a server, and finding one again that already runs.

use std::{
    cmp::Reverse,
    os::fd::AsFd as _,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::{Entry, Host, Launch, Listeners, Running, Service};
use crate::{
    config::SocketMode,
    distributor::Input,
    launch::{self, Exec, Limit, Socket},
    link::Child,
    message::ToMonitor,
    notify::NotifySocket,
    server::{Event, Found, Instance},
};

/// What the monitor keeps with a server's process, for the next distributor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Label {
    pub service: String,
    /// Its full name, `shop/1`.
    pub server: String,
    pub instance: u32,
    pub slot: u32,
    pub generation: u32,
    pub base: u64,
    pub started: SystemTime,
    pub notified: bool,
    pub failures: u32,
    pub restarts: u64,
    pub weight: u32,
    pub limit: Option<u32>,
    pub total_before: u64,
    pub most_before: u64,
}

impl Service {
    /// Starts an instance: its own slot, cgroup and notify socket, then the launcher.
    pub(super) fn launch(
        &mut self,
        entry: usize,
        instance: Instance,
        host: &mut Host<'_>,
    ) -> anyhow::Result<()> {
        let load = self.kernel.load()?;
        let slot = self.slots.take()?;
        self.generation = self.generation.wrapping_add(1);
        let (generation, base) = (self.generation, load.total[slot as usize]);
        let (cgroup, notify_path) = self.places_of(entry, instance, host);
        // From here on `retire` gives everything back, whatever fails.
        self.entries[entry].run = Some(Running {
            instance,
            id: host.link.number(),
            pid: None,
            launch: Launch::UnderWay,
            exit: None,
            started: Instant::now(),
            notified: false,
            cgroup: cgroup.clone(),
            cgroup_id: 0,
            slot,
            generation,
            base,
            listeners: vec![Listeners::default(); self.config.listen.len()],
            included: false,
            draining: false,
            emptying: false,
            notify: None,
        });
        cgroup.create()?;
        let cgroup_id = cgroup.id().context("read the number of a cgroup")?;
        let notify = self.wants_notify().then(|| self.listen_to(entry, instance, notify_path.clone(), host));
        let notify = notify.transpose()?;
        let mut exec = self.exec(entry, cgroup.path().to_owned());
        if notify.is_some() {
            exec.environment.push(("NOTIFY_SOCKET".to_owned(), notify_path.to_string_lossy().into_owned()));
        }
        let label = self.label(entry).context("the instance was just made")?;
        let run = self.entries[entry].run.as_mut().context("the instance was just made")?;
        run.cgroup_id = cgroup_id;
        run.notify = notify;
        let (theirs, ours) = launch::pair().context("make a socket for the launcher")?;
        let start = ToMonitor::Start { id: run.id, label: serde_json::to_vec(&label)? };
        host.link.send(&start, Some(theirs.as_fd()))?;
        let (inputs, service) = (host.inputs.clone(), self.number);
        tokio::task::spawn_local(async move {
            let result = launch::send_job(ours, &exec).await.map_err(|error| error.to_string());
            // The loop is gone only when everything stops.
            let _ = inputs.send(Input::Launched { service, entry, instance, result });
        });
        Ok(())
    }

    /// Takes over the instances that an earlier distributor started. Returns those that are of
    /// no server of this service any more.
    pub fn take_over(
        &mut self,
        mut children: Vec<(Child, Label)>,
        host: &mut Host<'_>,
    ) -> anyhow::Result<Vec<Child>> {
        // A launcher that failed may still be known beside the instance after it.
        children.sort_by_key(|(_, label)| Reverse(label.instance));
        let (mut found, mut strangers) = (Vec::<(usize, Child, Label)>::new(), Vec::new());
        for (child, label) in children {
            match self.find(&label.server) {
                Some(entry) if found.iter().all(|(other, ..)| *other != entry) => {
                    // All of them, before one that has died meanwhile is started in another slot.
                    self.slots.claim(label.slot)?;
                    found.push((entry, child, label));
                }
                _ => strangers.push(child),
            }
        }
        self.retire_unclaimed()?;
        for (entry, child, label) in found {
            self.take_over_one(entry, &child, &label, host)?;
        }
        Ok(strangers)
    }

    fn take_over_one(
        &mut self,
        entry: usize,
        child: &Child,
        label: &Label,
        host: &mut Host<'_>,
    ) -> anyhow::Result<()> {
        let instance = Instance(label.instance);
        let (cgroup, notify_path) = self.places_of(entry, instance, host);
        let age = SystemTime::now().duration_since(label.started).unwrap_or(Duration::ZERO);
        let now = Instant::now();
        let started = now.checked_sub(age).unwrap_or(now);
        let Entry { weight, limit, total_before, most_before, .. } = &mut self.entries[entry];
        (*weight, *limit) = (label.weight, label.limit);
        (*total_before, *most_before) = (label.total_before, label.most_before);
        let notify = match self.wants_notify() {
            true => Some(self.listen_to(entry, instance, notify_path, host)?),
            false => None,
        };
        self.entries[entry].run = Some(Running {
            instance,
            id: child.id,
            pid: Some(child.pid),
            launch: Launch::Running,
            exit: None,
            started,
            notified: label.notified,
            cgroup_id: cgroup.id().unwrap_or(0),
            cgroup,
            slot: label.slot,
            generation: label.generation,
            base: label.base,
            listeners: vec![Listeners::default(); self.config.listen.len()],
            included: false,
            draining: false,
            emptying: false,
            notify,
        });
        let found = Found {
            instance,
            pid: Some(child.pid),
            started,
            notified: label.notified,
            failures: label.failures,
            restarts: label.restarts,
        };
        self.tell(entry, Event::Found(found), host);
        self.scan(entry, None, host);
        if let Some(exit) = child.exit {
            self.exited(entry, exit, host);
        }
        Ok(())
    }

    /// Slots that hold connections of instances which ended while nobody watched: not to be
    /// used before these are closed.
    fn retire_unclaimed(&mut self) -> anyhow::Result<()> {
        let load = self.kernel.load()?;
        for slot in 0..load.word.len() as u32 {
            if super::places(&load, slot) > 0 && self.slots.claim(slot).is_ok() {
                self.retired.push(super::Retired { slot, entry: None, base: load.total[slot as usize] });
            }
        }
        Ok(())
    }

    fn wants_notify(&self) -> bool {
        self.config.readiness == crate::config::Readiness::Notify
    }

    /// The cgroup and the notify socket of an instance.
    fn places_of(
        &self,
        entry: usize,
        instance: Instance,
        host: &Host<'_>,
    ) -> (crate::cgroup::Cgroup, std::path::PathBuf) {
        let short = &self.entries[entry].config.short_name;
        let cgroup = self.cgroup.child(&format!("{short}.{}", instance.0));
        let socket = format!("{}.{short}.{}", self.config.name, instance.0);
        (cgroup, host.place.notify_dir().join(socket))
    }

    /// Passes on what the instance says through sd_notify.
    fn listen_to(
        &self,
        entry: usize,
        instance: Instance,
        path: std::path::PathBuf,
        host: &Host<'_>,
    ) -> anyhow::Result<tokio::task::JoinHandle<()>> {
        let socket = NotifySocket::bind(path, super::uid(&self.config))?;
        let (inputs, service) = (host.inputs.clone(), self.number);
        Ok(tokio::task::spawn_local(async move {
            loop {
                let sent = match socket.receive().await {
                    Ok(message) => inputs.send(Input::Notified { service, entry, instance, message }),
                    Err(error) => {
                        warn!("read {}: {error}; goes on", socket.path().display());
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        }))
    }

    fn exec(&self, entry: usize, cgroup: std::path::PathBuf) -> Exec {
        let server = &self.entries[entry].config;
        Exec {
            command: server.command.clone(),
            environment: server.environment.clone(),
            directory: server.directory.clone(),
            user: self.config.user.as_ref().map(Into::into),
            umask: Some(server.umask),
            limits: server
                .limits
                .iter()
                .map(|&(resource, limit)| Limit { resource, soft: limit, hard: limit })
                .collect(),
            cpus: server.cpus.clone(),
            cgroup,
            stdout: (&server.output).into(),
            stderr: (&server.errors).into(),
            socket: match self.config.socket {
                SocketMode::Own => Socket::Own,
                SocketMode::Systemd => Socket::Systemd(self.config.listen.clone()),
                SocketMode::Stdin => Socket::Stdin(self.config.listen[0]),
            },
            backlog: self.config.backlog,
        }
    }

    fn label(&self, entry: usize) -> Option<Label> {
        let server = &self.entries[entry];
        let run = server.run.as_ref()?;
        Some(Label {
            service: self.config.name.clone(),
            server: server.config.name.clone(),
            instance: run.instance.0,
            slot: run.slot,
            generation: run.generation,
            base: run.base,
            started: SystemTime::now() - run.started.elapsed(),
            notified: run.notified,
            failures: server.machine.failures(),
            restarts: server.machine.restarts(),
            weight: server.weight,
            limit: server.limit,
            total_before: server.total_before,
            most_before: server.most_before,
        })
    }

    /// Has the monitor keep what has changed about an instance.
    pub(super) fn relabel(&mut self, entry: usize, host: &mut Host<'_>) {
        let (Some(label), Some(run)) = (self.label(entry), &self.entries[entry].run) else { return };
        let sent = serde_json::to_vec(&label)
            .map_err(anyhow::Error::from)
            .and_then(|label| host.link.send(&ToMonitor::Relabel { id: run.id, label }, None));
        if let Err(error) = sent {
            debug!("server {}: {error:#}; a next distributor knows an older state of it", label.server);
        }
    }
}
