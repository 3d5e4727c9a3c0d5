//! Services that cannot begin yet, because somebody else listens on their addresses.
#![forbid(unsafe_code)]

use std::time::SystemTime;

use tracing::{error, info};

use super::{Distributor, adopt::Guest};
use crate::{
    config::{self, Occupied},
    instance::Instance,
    kernel,
    link::Child,
    notify,
    record::Adopting,
    room,
    service::{self, Label, Service, Succession},
    status::ServiceStatus,
};

/// A service that cannot begin, because somebody else listens on its address.
pub(super) struct Vacancy {
    pub(super) config: config::Service,
    pub(super) why: String,
    since: SystemTime,
}

impl Vacancy {
    /// `None`: it can begin, or has begun. `adopting` was interrupted, and is gone on with.
    pub(super) fn of(
        service: &config::Service,
        place: &Instance,
        adopting: Option<&Adopting>,
        children: &[Child],
    ) -> Option<Self> {
        if service.occupied == Occupied::Refuse {
            return None;
        }
        let cgroup = place.cgroup.child(&service.name);
        let is_its = |label: Label| label.service == service.name;
        let serves = children.iter().any(|child| serde_json::from_slice(&child.label).is_ok_and(is_its))
            || cgroup.processes().len() > cgroup.child("rooms").processes().len();
        let has_begun = || {
            // It may serve by an adopted server alone.
            let pins = kernel::pins(&place.pins, &service.name);
            !cgroup.processes().is_empty()
                || kernel::addresses(&pins).is_ok_and(|addresses| addresses.is_some())
        };
        let goes_on = adopting.is_some_and(|adopting| adopting.is_vacant) && !serves;
        if !goes_on && (has_begun() || service.listen.iter().all(room::is_free)) {
            return None;
        }
        let taken = service.listen.iter().find_map(|address| room::check_free(address).err());
        let taken = taken.unwrap_or_else(|| anyhow::anyhow!("a server is being adopted"));
        let why = format!(
            "{taken:#}; or make it one of the service's servers: dist-ctl adopt {} --pid PID",
            service.name
        );
        Some(Self::new(service.clone(), why))
    }

    /// For one that was configured otherwise before, and has not come to its end as that.
    pub(super) fn until_it_has_left(config: config::Service) -> Self {
        Self::new(config, "begins anew when what runs of it has been stopped".to_owned())
    }

    pub(super) fn new(config: config::Service, why: String) -> Self {
        Self { config, why, since: SystemTime::now() }
    }

    pub(super) fn status(&self) -> ServiceStatus {
        service::vacant_status(&self.config, &self.why, self.since)
    }
}

impl Distributor<'_> {
    /// Begins the services whose addresses have become free.
    pub(super) fn fill_vacancies(&mut self) {
        for number in (0..self.vacant.len()).rev() {
            let free = |address| room::is_free(address);
            let config = &self.vacant[number].config;
            let is_leaving = self.services.iter().any(|service| service.name() == config.name);
            if self.stopping || is_leaving || !config.listen.iter().all(free) {
                continue;
            }
            let vacancy = self.vacant.remove(number);
            info!("service {}: its addresses are free", vacancy.config.name);
            if let Err(error) = self.fill_or_leave(vacancy) {
                error!("{error:#}");
            }
        }
    }

    /// Begins a service; if it cannot, it is tried again later.
    pub(super) fn fill_or_leave(&mut self, mut vacancy: Vacancy) -> anyhow::Result<()> {
        let Err(error) = self.fill(&vacancy, None) else { return Ok(()) };
        vacancy.why = format!("{error:#}; tries again every second");
        let sentence = format!("service {}: {}", vacancy.config.name, vacancy.why);
        self.leave_vacant(vacancy);
        Err(anyhow::anyhow!(sentence))
    }

    /// A service could not begin: nothing is to look as if it had.
    pub(super) fn leave_vacant(&mut self, vacancy: Vacancy) {
        let others: Vec<&str> = self.services.iter().map(Service::name).collect();
        if let Err(error) = self.place.clean_leftovers(&others) {
            error!("service {}: {error:#}", vacancy.config.name);
        }
        self.vacant.push(vacancy);
    }

    /// Begins a service, with a server that has the address already if there is one, and starts
    /// its own.
    pub(super) fn fill(&mut self, vacancy: &Vacancy, guest: Option<Guest<'_>>) -> anyhow::Result<()> {
        let number = self.next_number;
        self.next_number += 1;
        let options = service::Options { in_use: guest.is_some(), ..self.options };
        let (services, mut host) = self.split();
        let mut service = Service::open(number, vacancy.config.clone(), options, &mut host)?;
        service.take_over(Vec::new(), Succession::First, &mut notify::Held::new(), &mut host)?;
        if let Some(Guest { shared, name, command }) = guest
            && let Err(error) = service.adopt(shared, name, command, &mut host)
        {
            service.end();
            shared.give_back();
            return Err(error);
        }
        service.look_around(&mut host);
        service.begin();
        service.start(&mut host);
        services.push(service);
        Ok(())
    }
}
