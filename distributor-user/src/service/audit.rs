//! What came of comparing a service's counts with its sockets: logs it and keeps the numbers.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tracing::warn;

use super::{Host, Service};
use crate::{
    auditor::{self, Auditor, Checked, Repair},
    drift::{Count, Difference},
    status::DriftStatus,
};

/// The auditor at work, and what it has said.
pub(super) struct Audit {
    task: JoinHandle<()>,
    checks: u64,
    found: u64,
    repaired: u64,
    last: Option<Instant>,
    /// Why the last check failed.
    unavailable: Option<String>,
}

impl Audit {
    pub(super) fn start(number: usize, auditor: Auditor, every: Duration, host: &Host<'_>) -> Self {
        let task = auditor::follow(number, auditor, every, host.inputs);
        Self { task, checks: 0, found: 0, repaired: 0, last: None, unavailable: None }
    }

    pub(super) fn status(&self) -> DriftStatus {
        DriftStatus {
            checks: self.checks,
            found: self.found,
            repaired: self.repaired,
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
    /// The counts were compared with the sockets.
    pub fn audited(&mut self, result: anyhow::Result<Checked>) {
        match result {
            Ok(checked) => {
                self.audit.unavailable = None;
                self.audit.checks += 1;
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
        self.audit.found += 1;
        let outcome = match repair {
            Repair::Done => {
                self.audit.repaired += 1;
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
            (Some(entry), _) => format!("server {}", entry.config.name),
            (None, Some(entry)) => format!("an ended instance of server {}", self.entries[entry].config.name),
            (None, None) => format!("slot {slot}, which no server has,"),
        }
    }
}
