//! What operators ask, and what they are told.
#![forbid(unsafe_code)]

use std::{os::fd::AsFd as _, time::Duration};

use distributor_ebpf::contract;
use tokio::{
    sync::oneshot,
    task::{spawn_local, yield_now},
};
use tracing::info;

use super::{Distributor, Input, reload::Purpose};
use crate::{
    control::{Command, Response},
    drain::Rest,
    message::ToMonitor,
    service::{Host, Service},
    status::{Status, Trouble},
    upgrade::{self, Candidate},
};

impl Distributor<'_> {
    pub(super) fn answer(&mut self, command: Command) -> Response {
        match command {
            Command::Status => match self.status() {
                Ok(status) => Response::Status(status),
                Err(error) => Response::failure(format!("{error:#}")),
            },
            Command::Weight { server, weight } => {
                if !(1..=contract::WEIGHT_MAX).contains(&weight) {
                    return Response::input(format!(
                        "weight {weight} is out of range: 1 to {}",
                        contract::WEIGHT_MAX
                    ));
                }
                self.of_server(&server, |service, entry, _| service.set_weight(entry, weight))
            }
            Command::Limit { server, limit } => {
                if limit.is_some_and(|limit| !(1..=contract::LIMIT_MAX).contains(&limit)) {
                    return Response::input(format!(
                        "limit is out of range: 1 to {}, or none",
                        contract::LIMIT_MAX
                    ));
                }
                match self.services.iter_mut().find(|service| service.name() == server) {
                    Some(service) => service.set_service_limit(limit),
                    None => self.of_server(&server, |service, entry, _| service.set_limit(entry, limit)),
                }
            }
            Command::Adopt { service, pid, name, command } => self.adopt(&service, pid, &name, command, None),
            Command::Release { server } => {
                self.of_server(&server, |service, entry, host| match service.release(entry, host) {
                    Ok(()) => Response::Done,
                    Err(error) => Response::input(format!("{error:#}")),
                })
            }
            Command::Drain { server, timeout_seconds, then } => {
                let timeout = match timeout_seconds.map(Duration::try_from_secs_f64).transpose() {
                    Ok(timeout) => timeout,
                    Err(error) => return Response::input(format!("timeout_seconds: {error}")),
                };
                if timeout.is_none() && then == Rest::Close {
                    return Response::input("then: \"close\" needs timeout_seconds: write 0 for at once");
                }
                self.of_server(&server, |service, entry, _| service.drain(entry, timeout, then))
            }
            Command::Resume { server } => {
                self.of_server(&server, |service, entry, host| service.resume(entry, host))
            }
            Command::Reload { dry_run } => self.reload(if dry_run { Purpose::Show } else { Purpose::Do }),
            Command::Scale { service, count } => {
                self.scale(&service, count as usize, "by an operator".to_owned())
            }
            Command::Restart { target, max_surge, max_unavailable } => {
                self.restart(target.as_deref(), max_surge, max_unavailable)
            }
            Command::Down => {
                // If the monitor cannot hear it, it is gone.
                let _ = self.link.send(&ToMonitor::Stopping, None);
                self.stop();
                Response::Done
            }
            // Not possible: `perform` gives it to `try_out`.
            Command::Upgrade { .. } => Response::failure("upgrade: it is answered after a trial only"),
        }
    }

    /// Puts another program on trial, beside everything else. `Input::Tried` says how it went.
    pub(super) fn try_out(&mut self, program: String, reply: oneshot::Sender<Response>) {
        if self.trying {
            let _ = reply.send(Response::failure("upgrade: another one is under way: wait for it"));
            return;
        }
        self.trying = true;
        let inputs = self.inputs.clone();
        spawn_local(async move {
            // It fails when the loop is gone, and then nobody waits for it.
            let _ = inputs.send(Input::Tried(upgrade::try_out(&program).await, reply));
        });
    }

    /// Exits, and has the monitor start the other program in our place. Nothing is stopped or
    /// even dropped: the next distributor finds everything as after a death.
    pub(super) async fn make_room(&self, successor: Candidate) -> anyhow::Result<()> {
        // The reply is written by a task that is to have its turn.
        for _ in 0..16 {
            yield_now().await;
        }
        info!("makes room for {}", successor.name);
        self.link.send(&ToMonitor::Replace, Some(successor.file.as_fd()))?;
        std::process::exit(0)
    }

    fn of_server(
        &mut self,
        name: &str,
        then: impl FnOnce(&mut Service, usize, &mut Host<'_>) -> Response,
    ) -> Response {
        let (services, mut host) = self.split();
        for service in services.iter_mut() {
            if let Some(entry) = service.find(name) {
                return then(service, entry, &mut host);
            }
        }
        let known: Vec<String> = services.iter().flat_map(Service::server_names).collect();
        Response::input(format!("no server is called {name}, but these are: {}", known.join(", ")))
    }

    fn status(&self) -> anyhow::Result<Status> {
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build: upgrade::own_build(),
            pid: std::process::id(),
            not_upgraded: self.not_upgraded.clone(),
            troubles: self.troubles(),
            services: self
                .services
                .iter()
                .map(Service::status)
                .chain(self.vacant.iter().map(|vacancy| Ok(vacancy.status())))
                .collect::<Result<_, _>>()?,
        })
    }

    fn troubles(&self) -> Vec<Trouble> {
        let services = self.services.iter().flat_map(|service| service.troubles().all());
        let mut troubles: Vec<Trouble> = self.troubles.all().chain(services).collect();
        troubles.sort_by_key(|trouble| trouble.since);
        troubles
    }
}
