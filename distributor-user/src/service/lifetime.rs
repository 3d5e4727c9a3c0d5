//! Instances that have lived long enough, or have grown too large, are replaced.
//!
//! lifetime.rs says which these are. They are replaced as in a restart that somebody asks for, one after
//! the other, the first one first that was due.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use distributor_ebpf::contract::Load;
use tracing::{debug, info};

use super::{Entry, Host, Running, Service};
use crate::{
    lifetime::{Bounds, Life},
    memory, moment,
    roll::{Item, Roll},
    server::Instance,
    status::{LifeStatus, Timestamp},
};

/// After a try that failed, nobody is replaced for so long: what is due serves on. And whoever follows another
/// instance is not replaced so soon for its connections or its memory.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// Whoever has asked for a restart looks several times in this time how it stands.
const SEEN_AFTER: Duration = Duration::from_secs(5);

/// What is known of how an instance lives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ageing {
    /// What it held when it was looked at last, in bytes.
    memory: Option<u64>,
    /// When it was seen to be due.
    due: Option<Instant>,
}

impl Service {
    /// Once a second: replaces those that are due.
    pub(super) fn replace_due(&mut self) {
        let (now, Ok(load)) = (Instant::now(), self.kernel.load()) else { return };
        self.weigh();
        let mut due = Vec::new();
        for entry in 0..self.entries.len() {
            match self.why_due(entry, &load, now) {
                Some(why) => {
                    let since = *self.entries[entry].ageing.due.get_or_insert(now);
                    due.push((since, entry, why));
                }
                None => self.entries[entry].ageing.due = None,
            }
        }
        due.sort_by_key(|(since, ..)| *since);
        if due.is_empty() || self.stopping || self.taking_over || self.has_just_ended(now) {
            return;
        }
        let items = due.into_iter().map(|(_, entry, why)| {
            let it = &self.entries[entry];
            Item::new(&it.config.name, it.machine.instance(), Some(why))
        });
        let items: Vec<Item> = items.collect();
        match &mut self.roll {
            // It comes after what somebody has asked for.
            Some(roll) if !roll.is_over() && roll.asked => {}
            Some(roll) if !roll.is_over() => {
                let added = roll.extend(items);
                tell(added);
                self.roll_changed |= !added.is_empty();
            }
            _ => {
                tell(&items);
                self.begin_roll(Roll::new(moment::now(), false, self.config.roll, items, now));
            }
        }
    }

    /// Lets the kernel count the memory of those that may not hold any amount, before the first of them runs:
    /// what ran already would be counted from then on only.
    pub(super) fn account_for_memory(&mut self, host: &Host<'_>) {
        if self.entries.iter().any(|entry| entry.run.is_some()) || !self.entries.iter().any(is_limited) {
            return;
        }
        for cgroup in [&host.place.cgroup, &self.cgroup] {
            // Without it, the processes are asked.
            if let Err(error) = memory::enable(cgroup) {
                debug!("{}: the memory controller is not used: {error}", cgroup.path().display());
            }
        }
    }

    /// Looks how much those hold that may not hold any amount.
    fn weigh(&mut self) {
        for entry in self.entries.iter_mut().filter(|entry| is_limited(entry)) {
            let run = entry.run.as_ref().filter(|run| run.guest.is_none());
            entry.ageing.memory = run.and_then(|run| memory::of(&run.cgroup));
        }
    }

    /// Why an instance is to be replaced, if it serves and can be.
    fn why_due(&self, entry: usize, load: &Load, now: Instant) -> Option<String> {
        let it = &self.entries[entry];
        let run = it.run.as_ref().filter(|run| run.included && run.guest.is_none())?;
        // What an operator has taken out, or is replaced already, is left alone.
        if !it.is_current() || it.drain.is_some() || self.successor_of(&it.config.name).is_some() {
            return None;
        }
        let mut bounds = bounds(it);
        // What a fresh instance exceeds already would have it replaced again and again.
        let is_fresh = |ready: Instant| now.saturating_duration_since(ready) < TRY_AGAIN;
        if run.instance > Instance(1) && it.machine.ready_since().is_some_and(is_fresh) {
            (bounds.max_connections, bounds.memory_limit) = (None, None);
        }
        bounds.over(&life(it, run, load)?, now)
    }

    /// The last restart has failed a moment ago; or it was asked for, and whoever did has yet to see its end.
    fn has_just_ended(&self, now: Instant) -> bool {
        let Some((roll, outcome)) = self.roll.as_ref().and_then(|roll| Some((roll, roll.outcome()?))) else {
            return false;
        };
        let ago = now.saturating_duration_since(outcome.at);
        match (roll.asked, &outcome.failed) {
            (true, _) => ago < SEEN_AFTER,
            (false, Some(_)) => ago < TRY_AGAIN,
            (false, None) => false,
        }
    }

    /// Why a server is to be replaced though nobody has asked for it.
    pub(super) fn replacement_ahead(&self, server: &str) -> Option<String> {
        let roll = self.roll.as_ref().filter(|roll| !roll.is_over())?;
        let current = self.entries[self.find(server)?].machine.instance();
        let is_ahead = |item: &&Item| item.server == server && item.is_open() && item.before >= current;
        let item = roll.items().iter().find(is_ahead)?;
        Some(format!("is to be replaced: {}", item.why.as_deref()?))
    }

    pub(super) fn life_status(&self, entry: usize, load: &Load) -> Option<LifeStatus> {
        let it = &self.entries[entry];
        let life = life(it, it.run.as_ref()?, load)?;
        let bounds = bounds(it);
        Some(LifeStatus {
            started: Timestamp::of(life.started),
            until: bounds.until(life.started).map(Timestamp::of),
            connections: life.connections,
            max_connections: bounds.max_connections,
            memory: life.memory,
            memory_limit: bounds.memory_limit,
        })
    }
}

fn is_limited(entry: &Entry) -> bool {
    entry.config.lifetime.memory_limit.is_some()
}

fn bounds(entry: &Entry) -> Bounds {
    entry.config.lifetime.of(&entry.config.name, entry.machine.instance())
}

fn life(entry: &Entry, run: &Running, load: &Load) -> Option<Life> {
    Some(Life {
        started: entry.machine.run()?.started(),
        connections: run.had(load),
        memory: entry.ageing.memory,
    })
}

fn tell(items: &[Item]) {
    for Item { server, why, .. } in items {
        info!("server {server} {}: it is to be replaced", why.as_deref().unwrap_or_default());
    }
}
