//! Restarts that operators ask for: of a server, a service, or all of them one after the other.
#![forbid(unsafe_code)]

use super::Distributor;
use crate::{control::Response, moment, roll::Roll, service::Service};

impl Distributor<'_> {
    pub(super) fn restart(
        &mut self,
        target: Option<&str>,
        max_surge: Option<u32>,
        max_unavailable: Option<u32>,
    ) -> Response {
        let number = moment::now();
        if let Some(service) = self.vacant.iter().find(|it| target == Some(it.config.name.as_str())) {
            return Response::failure(format!(
                "restart {}: it has not begun: {}",
                service.config.name, service.why
            ));
        }
        let mut begun = Vec::new();
        for (place, service) in self.services.iter_mut().enumerate() {
            let only = match target {
                Some(target) if target.contains('/') => match service.find(target) {
                    Some(entry) => Some(entry),
                    None => continue,
                },
                Some(target) if target != service.name() => continue,
                _ => None,
            };
            match service.restart(number, only, max_surge, max_unavailable) {
                Ok(()) => begun.push(place),
                Err(refusal) => {
                    // All of it or nothing.
                    begun.into_iter().for_each(|place| self.services[place].forget_roll());
                    return *refusal;
                }
            }
        }
        match (begun.is_empty(), target) {
            (false, _) => Response::Done,
            (true, None) => Response::failure("restart: no service has begun: dist-ctl status says why"),
            (true, Some(target)) => {
                let servers = self.services.iter().flat_map(Service::server_names);
                let services = self.services.iter().map(|service| service.name().to_owned());
                let known: Vec<String> = services.chain(servers).collect();
                Response::input(format!(
                    "no service and no server is called {target}, but these are: {}",
                    known.join(", ")
                ))
            }
        }
    }

    /// Goes on with what is being restarted. Of those that were asked for at once, one service comes after
    /// the other, and none after one that has failed.
    pub(super) fn turn_rolls(&mut self) {
        let (services, mut host) = self.split();
        for place in 0..services.len() {
            let Some(roll) = services[place].roll().filter(|roll| !roll.is_over()) else { continue };
            let number = roll.number;
            let mut before = services[..place].iter().filter_map(|service| {
                let roll = service.roll().filter(|roll| roll.number == number)?;
                (!is_done(roll)).then(|| (service.name().to_owned(), roll.is_over()))
            });
            match before.next_back() {
                None => services[place].turn_roll(&mut host),
                Some((_, false)) => {}
                Some((name, true)) => {
                    let why = format!("the restart of service {name}, which comes before, has failed");
                    services[place].give_up_roll(why);
                }
            }
        }
    }
}

fn is_done(roll: &Roll) -> bool {
    roll.outcome().is_some_and(|outcome| outcome.failed.is_none())
}
