//! What is configured now, and what of the configurations before it is not over yet.
//!
//! The monitor holds the configuration that is in force. A newer one is put beside it, and it is let
//! go when the services that it alone has are gone: a distributor that follows meanwhile lets their
//! connections end, as we would have.
#![forbid(unsafe_code)]

use std::os::fd::AsFd as _;

use crate::{
    changes::{Changes, Running, ServiceChange},
    cli::Source,
    config::{self, Config},
    in_force::InForce,
    instance::Instance,
    link::{Inheritance, Link},
    message::ToMonitor,
    record::Record,
};

/// The label of a configuration.
pub(super) const CONFIGURATION: &[u8] = b"configuration";

pub(super) struct Configured<'a> {
    /// Where a newer one comes from.
    pub(super) source: &'a Source,
    pub(super) in_force: InForce,
    /// What it means.
    pub(super) config: Config,
    /// The monitor's number of it. `None`: it does not hold it yet.
    key: Option<u64>,
    /// Those before it that the monitor holds, the oldest first.
    earlier: Vec<(u64, Config)>,
}

impl<'a> Configured<'a> {
    /// What is in force: what an earlier distributor has left, or what the source says now.
    pub(super) fn find(source: &'a Source, inheritance: &Inheritance) -> anyhow::Result<Self> {
        let is_one = |held: &&crate::link::Held| held.label == CONFIGURATION;
        let mut held: Vec<(u64, InForce, Config)> = inheritance
            .held
            .iter()
            .filter(is_one)
            .map(|held| {
                let in_force = InForce::kept(held.fd.as_fd())?;
                let config = in_force.config(source)?;
                Ok((held.key, in_force, config))
            })
            .collect::<anyhow::Result<_>>()?;
        // Numbers are given in the order of time.
        held.sort_by_key(|(key, ..)| *key);
        Ok(match held.pop() {
            Some((key, in_force, config)) => {
                let earlier = held.into_iter().map(|(key, _, config)| (key, config)).collect();
                Self { source, in_force, config, key: Some(key), earlier }
            }
            None => {
                let (in_force, config) = InForce::read(source)?;
                Self { source, in_force, config, key: None, earlier: Vec::new() }
            }
        })
    }

    /// Services whose servers come and go have as many as there were, when everything was killed.
    pub(super) fn go_on_scaled(&mut self, record: Option<&Record>) -> anyhow::Result<()> {
        for recorded in record.iter().flat_map(|record| &record.services) {
            let Some(scale) = self.config.service(&recorded.name).and_then(|service| service.scale) else {
                continue;
            };
            let count = recorded.numbered().clamp(scale.min, scale.max);
            self.in_force = self.in_force.scaled(&recorded.name, count);
        }
        self.config = self.in_force.config(self.source)?;
        Ok(())
    }

    /// Has the monitor hold it for the next distributor.
    pub(super) fn hold(&mut self, link: &mut Link) -> anyhow::Result<()> {
        let (key, file) = (link.number(), self.in_force.keep()?);
        link.send(&ToMonitor::Hold { key, label: CONFIGURATION.to_vec() }, Some(file.as_fd()))?;
        self.key = Some(key);
        Ok(())
    }

    /// Another one is in force from here on, for the next distributor too.
    pub(super) fn replace(
        &mut self,
        in_force: InForce,
        config: Config,
        link: &mut Link,
    ) -> anyhow::Result<()> {
        let newer = Self { source: self.source, in_force, config, key: None, earlier: Vec::new() };
        let before = std::mem::replace(self, newer);
        // Critical section: before, the next distributor goes by the one before; after, by this one.
        if let Err(error) = self.hold(link) {
            *self = before;
            return Err(error);
        }
        self.earlier = before.earlier;
        self.earlier.extend(before.key.map(|key| (key, before.config)));
        Ok(())
    }

    /// Services of earlier ones that are not, or not so, in this one, and of which something is left.
    pub(super) fn leaving(&self, place: &Instance) -> Vec<config::Service> {
        let mut leaving: Vec<config::Service> = Vec::new();
        for (_, earlier) in self.earlier.iter().rev() {
            let changes = Changes::between(earlier, &self.config, &Running::AS_CONFIGURED).services;
            let gone = changes.into_iter().filter_map(|change| match change {
                ServiceChange::Remove(name) => Some(name),
                ServiceChange::BeginAnew { service, .. } => Some(service.name),
                ServiceChange::Update(_) | ServiceChange::Add(_) => None,
            });
            for name in gone {
                let is_left = !place.cgroup.child(&name).processes().is_empty();
                if is_left && !leaving.iter().any(|leaving| leaving.name == name) {
                    leaving.extend(earlier.service(&name).cloned());
                }
            }
        }
        leaving
    }

    /// Nothing is left of those before.
    pub(super) fn forget_earlier(&mut self, link: &Link) -> anyhow::Result<()> {
        self.earlier.drain(..).try_for_each(|(key, _)| link.send(&ToMonitor::Drop { key }, None))
    }
}
