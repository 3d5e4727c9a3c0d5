//! Making a server that runs already one of a service's, also when that was interrupted.
//!
//! What the server was like is written down before anything about it is changed.
#![forbid(unsafe_code)]

use std::os::unix::process::parent_id;

use tracing::{error, info, warn};

use super::{Distributor, RECORD};
use crate::{
    config,
    control::Response,
    record::Adopting,
    service::{Adopted, Service, Shared},
};

/// A server to be adopted.
pub(super) struct Guest<'a> {
    pub(super) shared: &'a Shared,
    pub(super) name: &'a str,
    pub(super) command: Vec<String>,
}

impl Distributor<'_> {
    pub(super) fn adopt(
        &mut self,
        service: &str,
        pid: u32,
        name: &str,
        command: Vec<String>,
        interrupted: Option<&Adopted>,
    ) -> Response {
        let vacant = self.vacant.iter().position(|vacancy| vacancy.config.name == service);
        let open = self.services.iter().position(|its| its.name() == service);
        let config = match (vacant, open) {
            (Some(vacant), _) => self.vacant[vacant].config.clone(),
            (None, Some(open)) => self.services[open].config().clone(),
            (None, None) => {
                let open = self.services.iter().map(Service::name);
                let known: Vec<&str> =
                    open.chain(self.vacant.iter().map(|vacancy| vacancy.config.name.as_str())).collect();
                return Response::input(format!(
                    "no service is called {service}, but these are: {}",
                    known.join(", ")
                ));
            }
        };
        if self.stopping || self.services.iter().any(|its| its.name() == service && its.is_leaving()) {
            return Response::failure(format!("service {service} is being stopped"));
        }
        if !config::is_name(name) || name.bytes().all(|byte| byte.is_ascii_digit()) {
            return Response::input(format!(
                "{name:?} is no name for a server that is adopted: write one of a-z, 0-9, _ and -, not of digits only"
            ));
        }
        let full_name = format!("{service}/{name}");
        let is_taken = match open {
            Some(open) => self.services[open].find(&full_name).is_some(),
            None => config.servers.iter().any(|server| server.name == full_name),
        };
        if is_taken {
            return Response::input(format!(
                "a server is called {full_name} already: give it another --name"
            ));
        }
        let mut ours = self.place.cgroup.processes();
        ours.extend([std::process::id(), parent_id()]);
        let mut shared = match Shared::find(pid, &config, &ours) {
            Ok(shared) => shared,
            Err(error) => return Response::input(format!("{error:#}")),
        };
        if let Some(interrupted) = interrupted {
            shared.resume(interrupted);
        }
        if let Some(open) = open
            && self.services[open].has(&shared)
        {
            return Response::input(format!(
                "adopt process {pid}: it belongs to a server of {service} already"
            ));
        }
        let intent = match shared.intent(name, &command) {
            Ok(intent) => intent,
            Err(error) => return Response::failure(format!("adopt process {pid}: {error:#}")),
        };
        // Before anything is changed: whoever follows us finishes it, and knows what it was like.
        let is_vacant = vacant.is_some();
        self.adopting = Some(Adopting { service: service.to_owned(), is_vacant, server: intent });
        self.write_record();
        if self.troubles.has(RECORD) {
            self.adopting = None;
            return Response::failure(format!(
                "adopt process {pid}: it could not be written down what it is like now, to give it back so: see \
                 dist-ctl status"
            ));
        }
        let adopted = match (shared.share(&config), vacant, open) {
            (Err(error), ..) => Err(error),
            // Rooms can only be made now that it shares the address.
            (Ok(()), Some(vacant), _) => {
                let vacancy = self.vacant.remove(vacant);
                let filled = self.fill(&vacancy, Some(Guest { shared: &shared, name, command }));
                if filled.is_err() {
                    self.leave_vacant(vacancy);
                }
                filled
            }
            (Ok(()), None, open) => {
                let (services, mut host) = self.split();
                let service = open.and_then(|open| services.get_mut(open)).expect("it was just found");
                service.adopt(&shared, name, command, &mut host)
            }
        };
        let response = match adopted {
            Ok(()) => Response::Done,
            Err(error) => {
                shared.undo();
                Response::failure(format!("adopt process {pid}: {error:#}"))
            }
        };
        self.adopting = None;
        self.write_record();
        response
    }

    /// The distributor before us was killed while it adopted a server.
    pub(super) fn finish_adoption(&mut self, adopting: &Adopting) {
        let Adopting { service, server, .. } = adopting;
        let full_name = format!("{service}/{}", server.name);
        let is_done = |its: &Service| its.name() == service && its.find(&full_name).is_some();
        if self.stopping || self.services.iter().any(is_done) {
            return;
        }
        info!("server {full_name} was being adopted: goes on with that");
        let answer = self.adopt(service, server.pid, &server.name, server.command.clone(), Some(server));
        if let Response::Refused { error, .. } = answer {
            warn!("{error}");
            let begun: Vec<&str> = self.services.iter().map(Service::name).collect();
            if let Err(error) = self.place.clean_leftovers(&begun) {
                error!("service {service}: {error:#}");
            }
        }
    }
}
