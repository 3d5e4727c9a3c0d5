//! A rolling restart: which server of a service is replaced when, and what becomes of it.
//!
//! Pure. Takes what is seen of the servers, gives orders. Never more instances run than the servers there
//! are and `max_surge`, those that still end included; and for its sake never more servers are not ready
//! than `max_unavailable`. It is written down as a whole: the next distributor goes on with it.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::{fmt, time::Instant};

use serde::{Deserialize, Serialize};

use crate::{
    moment,
    server::{Instance, span},
};

/// How far the number of instances may differ from that of the servers. At least one of them is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// So many more may run.
    pub max_surge: u32,
    /// So many servers fewer may be ready.
    pub max_unavailable: u32,
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {} more and {} fewer at a time", self.max_surge, self.max_unavailable)
    }
}

/// A restart of some servers of a service, under way or over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Roll {
    /// Restarts that were asked for at once have the same number. They go on one after the other.
    pub number: u64,
    /// An operator has asked for it.
    pub asked: bool,
    #[serde(with = "moment")]
    pub since: Instant,
    bounds: Bounds,
    /// In the order in which they come.
    items: Vec<Item>,
    outcome: Option<Outcome>,
}

/// One server of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Its full name.
    pub server: String,
    /// Why it is replaced, if nobody has asked for that.
    pub why: Option<String>,
    /// The instance that is to be replaced.
    pub before: Instance,
    pub stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// It is not its turn.
    Waits,
    /// The new instance is on its way, or the one before has not ended yet.
    UnderWay {
        /// The one before is stopped first.
        in_place: bool,
    },
    Done,
    Failed {
        why: String,
    },
    /// It cannot be restarted, and nobody asked for it by name.
    LeftAlone {
        why: String,
    },
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    #[serde(with = "moment")]
    pub at: Instant,
    /// `None`: every server was replaced.
    pub failed: Option<String>,
}

/// What is seen of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub server: String,
    /// The one that is the server now.
    pub instance: Instance,
    /// It can serve: it is ready, whether or not an operator has taken it out.
    pub ready: bool,
    /// It runs and gets nothing, because its checks are bad.
    pub withheld: bool,
    /// An operator has taken it out.
    pub drained: bool,
    /// Nothing of it runs, and why.
    pub idle: Option<String>,
    /// It was adopted, and is stopped before it is started again.
    pub alone: bool,
    /// There is one that is to take its place.
    pub successor: bool,
    /// So many that were it have not ended.
    pub leaving: u32,
    /// What became of its successor.
    pub not_replaced: Option<String>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Start an instance that takes this server's place.
    Replace { server: String },
    /// Stop this server, and start it again.
    Restart { server: String },
}

impl Roll {
    pub fn new(number: u64, asked: bool, bounds: Bounds, items: Vec<Item>, now: Instant) -> Self {
        Self { number, asked, since: now, bounds, items, outcome: None }
    }

    pub fn is_over(&self) -> bool {
        self.outcome.is_some()
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// How many are through with it, and how many there are.
    pub fn progress(&self) -> (usize, usize) {
        let counts = |item: &&Item| !matches!(item.stage, Stage::LeftAlone { .. });
        let done = self.items.iter().filter(|item| item.stage == Stage::Done).count();
        (done, self.items.iter().filter(counts).count())
    }

    /// Has further servers restarted, after the others. Gives those that were not there.
    pub fn extend(&mut self, items: impl IntoIterator<Item = Item>) -> &[Item] {
        let before = self.items.len();
        for item in items {
            let is_there = |it: &Item| it.server == item.server && it.before >= item.before;
            if !self.items.iter().any(is_there) {
                self.items.push(item);
            }
        }
        &self.items[before..]
    }

    /// What it was to do with this server, and has not done, is not wanted any more.
    pub fn forget(&mut self, server: &str) {
        self.items.retain(|item| item.server != server || !item.is_open());
    }

    /// It goes no further.
    pub fn give_up(&mut self, why: String, now: Instant) {
        self.outcome = Some(Outcome { at: now, failed: Some(why) });
    }

    /// What was ordered cannot be done.
    pub fn refuse(&mut self, server: &str, why: String) {
        if let Some(item) = self.items.iter_mut().find(|item| item.server == server && item.is_open()) {
            item.stage = Stage::Failed { why };
        }
    }

    /// Brings it up to date, and says what to do. True if anything of it has changed.
    pub fn turn(&mut self, seen: &[Seen], now: Instant) -> (Vec<Order>, bool) {
        if self.is_over() {
            return (Vec::new(), false);
        }
        let before = self.clone();
        for item in &mut self.items {
            item.update(seen.iter().find(|seen| seen.server == item.server));
        }
        let failed = self.items.iter().find_map(|item| match &item.stage {
            Stage::Failed { why } => Some(format!("{}: {why}", item.server)),
            _ => None,
        });
        let mut orders = Vec::new();
        if failed.is_some() || !self.items.iter().any(Item::is_open) {
            self.outcome = Some(Outcome { at: now, failed });
        } else {
            orders = self.orders(seen);
        }
        (orders, *self != before)
    }

    fn orders(&mut self, seen: &[Seen]) -> Vec<Order> {
        let Bounds { max_surge, max_unavailable } = self.bounds;
        let mut more: u32 = seen.iter().map(|seen| u32::from(seen.successor) + seen.leaving).sum();
        let mut fewer = seen.iter().filter(|seen| !seen.ready && !seen.drained).count() as u32;
        let under_way = |item: &&Item| matches!(item.stage, Stage::UnderWay { .. });
        let mut busy = self.items.iter().filter(under_way).count() as u32;
        let mut orders = Vec::new();
        for item in self.items.iter_mut().filter(|item| item.stage == Stage::Waits) {
            if busy >= max_surge.saturating_add(max_unavailable).max(1) {
                break;
            }
            let Some(seen) = seen.iter().find(|seen| seen.server == item.server) else { continue };
            let in_place = match seen {
                // Nobody misses it.
                Seen { idle: Some(_), .. } => true,
                // Nor this one; and the new one may be better.
                Seen { withheld: true, .. } if more < max_surge => false,
                Seen { withheld: true, .. } if max_surge == 0 => true,
                // It is on its way by itself, and is judged when it is ready or not.
                Seen { ready: false, .. } => continue,
                Seen { drained: true, .. } => true,
                Seen { alone: true, .. } if fewer < max_unavailable.max(1) => true,
                Seen { alone: true, .. } => continue,
                _ if more < max_surge => false,
                _ if fewer < max_unavailable => true,
                _ => continue,
            };
            if !in_place {
                more += 1;
            } else if seen.ready && !seen.drained {
                fewer += 1;
            }
            busy += 1;
            item.stage = Stage::UnderWay { in_place };
            let server = item.server.clone();
            orders.push(if in_place { Order::Restart { server } } else { Order::Replace { server } });
        }
        orders
    }

    /// What it waits for, if there is nothing that it does.
    pub fn waits_for(&self, seen: &[Seen]) -> Option<String> {
        let is_busy = self.items.iter().any(|item| matches!(item.stage, Stage::UnderWay { .. }));
        if self.is_over() || is_busy {
            return None;
        }
        let ends: Vec<&str> =
            seen.iter().filter(|seen| seen.leaving > 0).map(|seen| seen.server.as_str()).collect();
        if !ends.is_empty() && self.bounds.max_surge > 0 {
            return Some(format!("waits until what was replaced of {} has ended", ends.join(", ")));
        }
        let away: Vec<&str> = seen
            .iter()
            .filter(|seen| !seen.ready && !seen.drained && !seen.withheld)
            .map(|seen| seen.server.as_str())
            .collect();
        (!away.is_empty()).then(|| {
            let verb = if away.len() == 1 { "is" } else { "are" };
            format!("waits until {} {verb} ready", away.join(", "))
        })
    }
}

impl Item {
    pub fn new(server: &str, before: Instance, why: Option<String>) -> Self {
        Self { server: server.to_owned(), why, before, stage: Stage::Waits }
    }

    /// It has not come to its end.
    pub fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Waits | Stage::UnderWay { .. })
    }

    fn update(&mut self, seen: Option<&Seen>) {
        if !self.is_open() {
            return;
        }
        let Some(seen) = seen else {
            self.stage = Stage::LeftAlone { why: "is no server of the service any more".to_owned() };
            return;
        };
        let is_new = seen.instance > self.before;
        let is_alone = !seen.successor && seen.leaving == 0;
        self.stage = match (&self.stage, seen) {
            // However that came about.
            _ if is_new && seen.ready && is_alone => Stage::Done,
            // Somebody else has begun it.
            (Stage::Waits, Seen { successor: true, .. }) => Stage::UnderWay { in_place: false },
            (Stage::UnderWay { in_place: false }, Seen { successor: false, not_replaced: Some(why), .. }) => {
                Stage::Failed { why: format!("the new instance {why}; the one before serves on") }
            }
            (Stage::UnderWay { in_place: true }, Seen { idle: Some(why), .. }) if is_new => {
                Stage::Failed { why: why.clone() }
            }
            // It was ordered, and whoever was to do it died before he had.
            (Stage::UnderWay { .. }, Seen { ready: true, .. }) if is_alone && !is_new => Stage::Waits,
            (stage, _) => (*stage).clone(),
        };
    }

    /// How it stands with it, in a few words.
    pub fn says(&self, seen: Option<&Seen>) -> Option<String> {
        let words = match (&self.stage, seen) {
            (Stage::Failed { why } | Stage::LeftAlone { why }, _) => Some(why.clone()),
            (Stage::UnderWay { in_place: false }, Some(seen)) if !seen.successor && seen.leaving > 0 => {
                Some(format!("instance {} serves; the one before has to end", seen.instance))
            }
            (Stage::UnderWay { in_place: false }, _) => Some("its new instance is not ready yet".to_owned()),
            (Stage::UnderWay { in_place: true }, Some(seen)) if seen.instance == self.before => {
                Some("is being stopped".to_owned())
            }
            (Stage::UnderWay { in_place: true }, _) => Some("is being started again".to_owned()),
            (Stage::Waits | Stage::Done, _) => None,
        };
        match (words, &self.why) {
            (words, None) => words,
            (None, Some(why)) => Some(why.clone()),
            (Some(words), Some(why)) => Some(format!("{why}; {words}")),
        }
    }
}

impl Outcome {
    /// `done after 12s`
    pub fn says(&self, since: Instant) -> String {
        let took = span(self.at.saturating_duration_since(since));
        match &self.failed {
            None => format!("done after {took}"),
            Some(why) => format!("failed after {took}: {why}"),
        }
    }
}
