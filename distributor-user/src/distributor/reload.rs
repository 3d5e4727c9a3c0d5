//! A newer configuration takes the place of the one that is in force, without a restart.
//!
//! It is read and checked as a whole before anything is touched; then the monitor holds it, and from
//! there on it is carried out, by whichever distributor lives: servers that are to be replaced, and
//! services that are on their way out, are known to the next one as well.
#![forbid(unsafe_code)]

use std::time::{Instant, SystemTime};

use anyhow::Context as _;
use tracing::{error, info};

use super::{Distributor, vacancy::Vacancy};
use crate::{
    changes::{Changes, Running, ServiceChange},
    cli::Source,
    config::{self, Config, Occupied},
    control::Response,
    error::UserError,
    in_force::InForce,
    room,
    scale::Decision,
    service::Service,
};

/// What the trouble is called that the configuration cannot be loaded again.
const RELOAD: &str = "reload";

/// Whether something is to be done, or only said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Do,
    Show,
}

impl Distributor<'_> {
    /// The monitor got SIGHUP.
    pub(super) fn reload_as_told(&mut self) {
        if let Response::Refused { error, .. } = self.reload(Purpose::Do) {
            error!("{error}");
        }
    }

    /// Reads the configuration again, and does or shows what differs.
    pub(super) fn reload(&mut self, purpose: Purpose) -> Response {
        if self.stopping {
            return Response::failure("reload: dist-ctl is being stopped");
        }
        if purpose == Purpose::Do
            && let Some(manager) = &mut self.manager
        {
            manager.reloading(Instant::now());
        }
        let response = match (self.read_again(), purpose) {
            (Ok((_, _, changes)), Purpose::Show) => Response::Changes(changes.lines()),
            (Ok((in_force, config, changes)), Purpose::Do) => {
                self.troubles.note(RELOAD, None, SystemTime::now());
                self.change_to(in_force, config, changes)
            }
            (Err(error), purpose) => {
                let sentence = format!("{error:#}");
                // Nothing is wrong where there is no file.
                if purpose == Purpose::Do && matches!(self.configured.source, Source::File(_)) {
                    let what = format!("the configuration was not reloaded, nothing has changed: {sentence}");
                    self.troubles.note(RELOAD, Some(what), SystemTime::now());
                }
                match error.is::<UserError>() {
                    true => Response::input(sentence),
                    false => Response::failure(sentence),
                }
            }
        };
        // Also when it has come to nothing: the manager waits for it.
        if let Some(manager) = &mut self.manager {
            manager.reloaded();
        }
        response
    }

    /// Gives a service so many numbered servers, for this reason.
    pub(super) fn scale(&mut self, service: &str, count: usize, why: String) -> Response {
        if self.stopping {
            return Response::failure("scale: dist-ctl is being stopped");
        }
        let config = &self.configured.config;
        if config.service(service).is_none() {
            let known: Vec<&str> = config.services.iter().map(|service| service.name.as_str()).collect();
            return Response::input(format!(
                "no service is called {service}, but these are: {}",
                known.join(", ")
            ));
        }
        let in_force = self.configured.in_force.scaled(service, count);
        match in_force.config(self.configured.source) {
            Ok(newer) => {
                let changes = Changes::between(config, &newer, &Running::AS_CONFIGURED);
                let is_other = !changes.is_empty();
                let done = self.change_to(in_force, newer, changes);
                if is_other && let Some(scaled) = self.services.iter_mut().find(|it| it.name() == service) {
                    scaled.note_scaled(why);
                }
                done
            }
            Err(error) => Response::input(format!("scale {service} to {count}: {error}")),
        }
    }

    /// Gives services more or fewer servers by their connections.
    pub(super) fn rescale(&mut self) {
        let now = Instant::now();
        let decisions: Vec<(String, Decision)> = self
            .services
            .iter_mut()
            .filter_map(|service| Some((service.name().to_owned(), service.rescaled(now)?)))
            .collect();
        for (service, Decision { count, why }) in decisions {
            let plural = if count == 1 { "" } else { "s" };
            info!("service {service}: {why}: it is to have {count} server{plural}");
            if let Response::Refused { error, .. } = self.scale(&service, count, why) {
                error!("{error}");
            }
        }
    }

    /// What the source says now, and what is to be done for it.
    fn read_again(&self) -> anyhow::Result<(InForce, Config, Changes)> {
        let source = self.configured.source;
        let Source::File(path) = source else {
            return Err(UserError::new(
                "reload: this dist-ctl has its configuration from its command line, which stays as it is: write it \
                 into a file, and start dist-ctl up -f FILE",
            )
            .into());
        };
        let (newer, as_written) = InForce::read(source)?;
        let before = self.configured.in_force.as_written().config(source);
        // If that cannot be read any more (a user is gone, say), nobody knows what it said.
        let newer = match before {
            Ok(before) => self.configured.in_force.carried_over(&before, &as_written, newer),
            Err(_) => newer,
        };
        let config = newer.config(source)?;
        // A roll that has failed can be tried again, once its cause is mended.
        let outdated: Vec<String> = self.services.iter().flat_map(Service::outdated).collect();
        let runs_as = |service: &config::Service, server: &config::Server| {
            let its = self.services.iter().find(|it| it.name() == service.name);
            its.is_some_and(|it| it.runs_as(service, server))
        };
        let running = Running { outdated, runs_as: &runs_as };
        let changes = Changes::between(&self.configured.config, &config, &running);
        self.check_addresses(&changes).with_context(|| format!("reload {}", path.display()))?;
        Ok((newer, config, changes))
    }

    /// Whether addresses that are new to us can be had.
    fn check_addresses(&self, changes: &Changes) -> anyhow::Result<()> {
        let begun = changes.services.iter().filter_map(|change| match change {
            ServiceChange::Add(service) | ServiceChange::BeginAnew { service, .. } => Some(service),
            ServiceChange::Remove(_) | ServiceChange::Update(_) => None,
        });
        for service in begun.filter(|service| service.occupied == Occupied::Refuse) {
            // One that overlaps with an address of ours is free when that is.
            let is_ours = |address: &&_| {
                let mut ours = self.services.iter().flat_map(|service| &service.config().listen);
                ours.any(|other: &crate::address::ListenAddress| {
                    other.covers(address) || address.covers(other)
                })
            };
            service.listen.iter().filter(|address| !is_ours(address)).try_for_each(room::check_free)?;
        }
        Ok(())
    }

    fn change_to(&mut self, in_force: InForce, config: Config, changes: Changes) -> Response {
        let lines = changes.lines();
        if let Err(error) = self.configured.replace(in_force, config, &mut self.link) {
            return Response::failure(format!("{error:#}; nothing has changed"));
        }
        for line in &lines {
            info!("{line}");
        }
        match self.carry_out(changes) {
            Ok(()) => Response::Changes(lines),
            Err(error) => Response::failure(format!("{error:#}")),
        }
    }

    /// Does what is to be done. What fails is tried again later, and the rest is done all the same.
    fn carry_out(&mut self, changes: Changes) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        // The control socket is made anew by `stay_reachable`, once who asked for this was answered.
        for change in changes.services {
            match change {
                ServiceChange::Remove(name) => {
                    self.vacant.retain(|vacancy| vacancy.config.name != name);
                    self.stop_service(&name);
                }
                ServiceChange::BeginAnew { service, .. } => {
                    self.vacant.retain(|vacancy| vacancy.config.name != service.name);
                    self.stop_service(&service.name);
                    self.begin_service(service, &mut outcome);
                }
                ServiceChange::Add(service) => self.begin_service(service, &mut outcome),
                ServiceChange::Update(update) => {
                    let name = &update.service.name;
                    if let Some(vacancy) = self.vacant.iter_mut().find(|vacancy| vacancy.config.name == *name)
                    {
                        vacancy.config = update.service;
                        continue;
                    }
                    let (services, mut host) = self.split();
                    if let Some(service) = services.iter_mut().find(|service| service.name() == *name) {
                        service.update(update, &mut host);
                    }
                }
            }
        }
        outcome
    }

    fn stop_service(&mut self, name: &str) {
        let (services, mut host) = self.split();
        if let Some(service) =
            services.iter_mut().find(|service| service.name() == name && !service.is_leaving())
        {
            service.stop(&mut host);
        }
    }

    /// Begins a service now, or as soon as its name and its addresses are free.
    fn begin_service(&mut self, service: config::Service, outcome: &mut anyhow::Result<()>) {
        if self.services.iter().any(|other| other.name() == service.name) {
            self.vacant.push(Vacancy::until_it_has_left(service));
        } else if let Some(taken) = service.listen.iter().find_map(|address| room::check_free(address).err())
        {
            self.vacant.push(Vacancy::new(service, format!("{taken:#}")));
        } else {
            let begun = self.fill_or_leave(Vacancy::new(service, "it begins".to_owned()));
            // The first failure is told; all are in the log and in the status.
            if let Err(error) = begun {
                error!("{error:#}");
                if outcome.is_ok() {
                    *outcome = Err(error);
                }
            }
        }
    }

    /// Services that are not configured any more are forgotten once they have stopped.
    pub(super) fn let_go(&mut self) {
        if self.stopping {
            return;
        }
        let is_over = |service: &mut Service| service.is_leaving() && service.has_stopped();
        let gone: Vec<Service> = self.services.extract_if(.., is_over).collect();
        let (any, mut host) = (!gone.is_empty(), self.split().1);
        for mut service in gone {
            info!("service {} is gone", service.name());
            service.forget_ended(&mut host);
            service.end();
        }
        if any {
            let left: Vec<&str> = self.services.iter().map(Service::name).collect();
            if let Err(error) = self.place.clean_leftovers(&left) {
                error!("{error:#}");
            }
            self.write_record();
            self.fill_vacancies();
        }
        // Whoever follows us would otherwise look for them.
        if !self.services.iter().any(Service::is_leaving)
            && let Err(error) = self.configured.forget_earlier(&self.link)
        {
            error!("{error:#}");
        }
    }
}
