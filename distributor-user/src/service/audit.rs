//! What came of comparing a service's counts with its sockets: logs it and keeps the numbers.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tracing::warn;

use super::{Host, Service};
use crate::{
    auditor::{self, Auditor, Checked, Repair},
    drift::{Count, Difference},
    status::DriftStatus,
};

/// What came of all checks, over all distributors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    checks: u64,
    found: u64,
    repaired: u64,
}

/// The auditor at work, and what it has said.
pub(super) struct Audit {
    task: JoinHandle<()>,
    drift: Drift,
    /// What is recorded of it is out of date.
    pub(super) changed: bool,
    last: Option<Instant>,
    /// Why the last check failed.
    unavailable: Option<String>,
}

impl Audit {
    pub(super) fn start(number: usize, auditor: Auditor, every: Duration, host: &Host<'_>) -> Self {
        let task = auditor::follow(number, auditor, every, host.inputs);
        Self { task, drift: Drift::default(), changed: false, last: None, unavailable: None }
    }

    pub(super) fn status(&self) -> DriftStatus {
        let Drift { checks, found, repaired } = self.drift;
        DriftStatus {
            checks,
            found,
            repaired,
            last_seconds_ago: self.last.map(|last| last.elapsed().as_secs_f64()),
            unavailable: self.unavailable.clone(),
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Service {
    /// What checks have found, for the next distributor.
    pub(super) fn drift(&self) -> Drift {
        self.audit.drift
    }

    /// What they had found before.
    pub fn remember_drift(&mut self, drift: Drift) {
        self.audit.drift = drift;
    }

    /// The counts were compared with the sockets.
    pub fn audited(&mut self, result: anyhow::Result<Checked>) {
        match result {
            Ok(checked) => {
                self.audit.unavailable = None;
                self.audit.drift.checks += 1;
                self.audit.changed = true;
                self.audit.last = Some(Instant::now());
                for (difference, repair) in &checked.found {
                    self.note_drift(difference, *repair);
                }
                if !checked.found.is_empty() {
                    // There may be a place now for somebody who waits.
                    self.attendant.look();
                }
            }
            Err(error) => {
                let why = format!("{error:#}");
                if self.audit.unavailable.as_ref() != Some(&why) {
                    warn!(
                        "service {}: its counts cannot be compared with its sockets: {why}; tries again",
                        self.config.name
                    );
                }
                self.audit.unavailable = Some(why);
            }
        }
    }

    fn note_drift(&mut self, difference: &Difference, repair: Repair) {
        let noun = |count: i64| if count == 1 { "connection" } else { "connections" };
        let (counted, there) = (difference.counted, difference.there());
        let counts = match difference.count {
            Count::Slot(slot) => {
                format!("{} counted {counted} {}", self.whose(slot), noun(counted))
            }
            Count::Waiting => format!("{counted} {} counted that wait", noun(counted)),
        };
        self.audit.drift.found += 1;
        let outcome = match repair {
            Repair::Done => {
                self.audit.drift.repaired += 1;
                "repaired"
            }
            Repair::Failed => "not repaired yet, because the count changes too fast",
        };
        warn!("service {}: {counts}, the kernel has {there}: {outcome}", self.config.name);
    }

    /// Whose a slot is, for a sentence.
    fn whose(&self, slot: u32) -> String {
        let runs = |entry: &&super::Entry| entry.run.as_ref().is_some_and(|run| run.slot == slot);
        let retired = || self.retired.iter().find(|retired| retired.slot == slot)?.entry;
        match (self.entries.iter().find(runs), retired()) {
            (Some(entry), _) => format!("server {}", entry.name()),
            (None, Some(entry)) => format!("an ended instance of server {}", self.entries[entry].name()),
            (None, None) => format!("slot {slot}, which no server has,"),
        }
    }
}
