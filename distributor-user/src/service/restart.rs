//! Restarting servers of a service one after the other, while it serves.
//!
//! roll.rs decides which one is next; here it is asked what it needs to know, and obeyed.
#![forbid(unsafe_code)]

use std::time::Instant;

use tracing::{info, warn};

use super::{Entry, Host, Service};
use crate::{
    control::Response,
    roll::{Bounds, Item, Order, Outcome, Roll, Seen, Stage},
    server::{State, span},
    status::{ItemStatus, RollState, RollStatus, Timestamp},
};

impl Service {
    /// Begins to restart all its servers, or this one, as an operator asks.
    ///
    /// # Errors
    /// Why it does not; then nothing has changed.
    pub fn restart(
        &mut self,
        number: u64,
        only: Option<usize>,
        max_surge: Option<u32>,
        max_unavailable: Option<u32>,
    ) -> Result<(), Box<Response>> {
        let what = only.map_or(self.config.name.clone(), |entry| self.entries[entry].name());
        if self.stopping {
            return Err(Response::failure(format!("restart {what}: it is being stopped")).into());
        }
        if let Some(roll) = self.roll.as_ref().filter(|roll| roll.asked && !roll.is_over()) {
            let (done, of) = roll.progress();
            let since = span(roll.since.elapsed());
            return Err(Response::failure(format!(
                "restart {what}: a restart of service {} is under way for {since} ({done} of {of} done): wait \
                 for its end, which dist-ctl status shows",
                self.config.name
            ))
            .into());
        }
        let bounds = Bounds {
            max_surge: max_surge.unwrap_or(self.config.roll.max_surge),
            max_unavailable: max_unavailable.unwrap_or(self.config.roll.max_unavailable),
        };
        if bounds == (Bounds { max_surge: 0, max_unavailable: 0 }) {
            return Err(Response::input(format!(
                "restart {what}: with max_surge 0 and max_unavailable 0 nothing can be restarted, write 1 or more \
                 for one of them"
            ))
            .into());
        }
        let entries = match only {
            Some(entry) => vec![entry],
            None => self.in_order().into_iter().filter(|it| self.entries[*it].is_current()).collect(),
        };
        let item = |entry: usize| {
            let it = &self.entries[entry];
            let mut item = Item::new(&it.config.name, it.machine.instance(), None);
            if let Err(why) = self.ensure_startable(entry) {
                item.stage = Stage::LeftAlone { why: format!("{why:#}") };
            }
            item
        };
        let items: Vec<Item> = entries.into_iter().map(item).collect();
        if let Some(Item { stage: Stage::LeftAlone { why }, .. }) = items.first()
            && items.len() == 1
        {
            return Err(Response::input(format!("restart {what}: {why}")).into());
        }
        self.begin_roll(Roll::new(number, true, bounds, items, Instant::now()));
        Ok(())
    }

    pub(super) fn begin_roll(&mut self, roll: Roll) {
        let servers: Vec<&str> = roll.items().iter().map(|item| item.server.as_str()).collect();
        info!("service {}: restarts {}, {}", self.config.name, servers.join(", "), roll.bounds());
        (self.roll, self.roll_changed) = (Some(roll), true);
    }

    /// What becomes of its servers now, or became of them the last time.
    pub fn roll(&self) -> Option<&Roll> {
        self.roll.as_ref()
    }

    /// It has not begun after all.
    pub fn forget_roll(&mut self) {
        (self.roll, self.roll_changed) = (None, true);
    }

    /// What an earlier distributor had begun.
    pub fn remember_roll(&mut self, roll: Option<Roll>) {
        self.roll = roll;
    }

    /// A restart that it was to be a part of has failed elsewhere.
    pub fn give_up_roll(&mut self, why: String) {
        if let Some(roll) = self.roll.as_mut().filter(|roll| !roll.is_over()) {
            warn!("service {}: not restarted: {why}", self.config.name);
            roll.give_up(why, Instant::now());
            self.roll_changed = true;
        }
    }

    /// Goes on with a restart that is under way.
    pub fn turn_roll(&mut self, host: &mut Host<'_>) {
        let Some(mut roll) = self.roll.take() else { return };
        if roll.is_over() {
            self.roll = Some(roll);
            return;
        }
        let (orders, changed) = if self.stopping {
            roll.give_up("the service is being stopped".to_owned(), Instant::now());
            (Vec::new(), true)
        } else {
            roll.turn(&self.seen(), Instant::now())
        };
        self.roll_changed |= changed;
        for order in orders {
            let (Order::Replace { server } | Order::Restart { server }) = &order;
            let Some(entry) = self.find(server) else { continue };
            let done = match order {
                Order::Replace { .. } => self.replace(entry, host),
                Order::Restart { .. } => self.restart_in_place(entry, host),
            };
            if let Err(error) = done {
                roll.refuse(server, format!("{error:#}"));
            }
        }
        if let Some(outcome) = roll.outcome() {
            let (name, says) = (&self.config.name, outcome.says(roll.since));
            match &outcome.failed {
                None => info!("service {name}: restart {says}"),
                Some(_) => warn!("service {name}: restart {says}; goes no further"),
            }
        }
        self.roll = Some(roll);
    }

    fn seen(&self) -> Vec<Seen> {
        let current = self.entries.iter().enumerate().filter(|(_, entry)| entry.is_current());
        current.map(|(place, entry)| self.see(place, entry)).collect()
    }

    fn see(&self, place: usize, entry: &Entry) -> Seen {
        let name = &entry.config.name;
        let idle = match entry.machine.state() {
            State::Stopped { .. } | State::Backoff { .. } | State::Failed { .. } => {
                let why = entry.machine.reason(Instant::now(), &entry.policy);
                Some(why.unwrap_or_else(|| "is stopped".to_owned()))
            }
            _ => None,
        };
        Seen {
            server: name.clone(),
            instance: entry.machine.instance(),
            ready: entry.run.as_ref().is_some_and(|run| run.included),
            withheld: entry.machine.is_withheld(),
            drained: entry.drain.is_some(),
            idle,
            alone: self.runs_as_guest(place),
            successor: self.successor_of(name).is_some(),
            leaving: u32::try_from(self.leaving(name).count()).unwrap_or(u32::MAX),
            not_replaced: entry.not_replaced.as_ref().map(|not_replaced| not_replaced.why.clone()),
        }
    }

    pub(super) fn roll_status(&self) -> Option<RollStatus> {
        let roll = self.roll.as_ref()?;
        let seen = self.seen();
        let Bounds { max_surge, max_unavailable } = roll.bounds();
        let item = |item: &Item| ItemStatus {
            name: item.server.clone(),
            state: match item.stage {
                Stage::Waits => RollState::Waiting,
                Stage::UnderWay { .. } => RollState::UnderWay,
                Stage::Done => RollState::Done,
                Stage::Failed { .. } => RollState::Failed,
                Stage::LeftAlone { .. } => RollState::LeftAlone,
            },
            reason: match item.stage {
                Stage::Waits if roll.is_over() => Some("the restart ended before its turn".to_owned()),
                _ => item.says(seen.iter().find(|seen| seen.server == item.server)),
            },
        };
        let failed = roll.outcome().and_then(|outcome| outcome.failed.clone());
        Some(RollStatus {
            number: roll.number,
            state: match roll.outcome() {
                None => RollState::UnderWay,
                Some(Outcome { failed: None, .. }) => RollState::Done,
                Some(Outcome { failed: Some(_), .. }) => RollState::Failed,
            },
            asked: roll.asked,
            since: Timestamp::of(roll.since),
            ended: roll.outcome().map(|outcome| Timestamp::of(outcome.at)),
            reason: failed.or_else(|| roll.waits_for(&seen)),
            max_surge,
            max_unavailable,
            servers: roll.items().iter().map(item).collect(),
        })
    }
}
