//! The auditor: compares the counts with the sockets there are, and corrects them.
//!
//! Every ten seconds, while anything is open, it asks the kernel for the service's sockets and
//! lets drift.rs judge. A difference that stays is corrected at once; the loop is told, which logs
//! it. It works in a thread of its own, because the kernel takes its time. It decides nothing else
//! and reads no connection.
#![forbid(unsafe_code)]

use std::{
    env,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use tokio::{
    sync::{mpsc::UnboundedSender, oneshot},
    task::{JoinHandle, spawn_local},
    time::sleep,
};
use tracing::debug;

use crate::{
    address::ListenAddress,
    config::duration,
    distributor::Input,
    drift::{Counts, Difference, Drift, Passed, Seen, Told, tally},
    kernel::Ledger,
    sock_diag::{self, States},
};

/// Another interval, such as `200ms`. For tests.
pub const INTERVAL: &str = "DIST_CTL_CHECK_COUNTS";

/// A check of 10,000 sockets takes 20 to 60 ms of one CPU: so that is 0.6 % of it at most.
const EVERY: Duration = Duration::from_secs(10);

/// A program that changes one number and then another is done with both after this.
const PAUSE: Duration = Duration::from_millis(2);

/// What came of a check.
#[derive(Debug)]
pub struct Checked {
    /// The differences that stayed, and whether each was repaired.
    pub found: Vec<(Difference, Repair)>,
    pub took: Duration,
}

/// What became of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    Done,
    /// The count changed too fast. The next checks find the difference again.
    Failed,
}

/// Compares one service's counts with its sockets.
pub struct Auditor {
    ledger: Ledger,
    listen: Vec<ListenAddress>,
    drift: Drift,
    /// At the end of the last check.
    passed: Option<Passed>,
    /// Whether it found any connection.
    any: bool,
}

impl Auditor {
    /// For the service whose kernel objects have their pins there.
    pub fn open(pins: &Path, listen: &[ListenAddress]) -> anyhow::Result<Self> {
        let (ledger, listen) = (Ledger::open(pins)?, listen.to_vec());
        Ok(Self { ledger, listen, drift: Drift::default(), passed: None, any: false })
    }

    /// Compares once, and corrects what has differed for long enough. `None`: nothing is open, and
    /// nothing was.
    pub fn check(&mut self) -> anyhow::Result<Option<Checked>> {
        let begun = Instant::now();
        let passed_before = self.ledger.passed()?;
        let is_idle = self.passed.as_ref() == Some(&passed_before);
        if is_idle && !self.any && !self.drift.is_suspected() && self.ledger.counts().is_none() {
            return Ok(None);
        }
        thread::sleep(PAUSE);
        let before = self.ledger.counts();
        let is_owned = self.ledger.is_owned();
        thread::sleep(PAUSE);
        let sockets = self.sockets(is_owned)?;
        thread::sleep(PAUSE);
        let after = self.ledger.counts();
        thread::sleep(PAUSE);
        let passed_after = self.ledger.passed()?;
        self.passed = Some(passed_after.clone());
        self.any = !sockets.is_none();
        let found = self.drift.note(&Seen { passed_before, before, sockets, after, passed_after });
        let repaired = |difference: Difference| match self.ledger.repair(&difference) {
            true => (difference, Repair::Done),
            false => (difference, Repair::Failed),
        };
        Ok(Some(Checked { found: found.into_iter().map(repaired).collect(), took: begun.elapsed() }))
    }

    /// The connections that the kernel has.
    fn sockets(&self, is_owned: bool) -> anyhow::Result<Counts> {
        let mut told = Vec::new();
        self.dump(|cookie, tag| told.push(Told { cookie, tag, owner: None }))?;
        let mut still = None;
        if is_owned {
            for told in &mut told {
                told.owner = self.ledger.owner(told.cookie);
            }
            self.dump(|cookie, _| still.get_or_insert_with(Vec::new).push(cookie))?;
            still.get_or_insert_default();
        }
        Ok(tally(told, still))
    }

    /// The sockets that have a tag of this service.
    fn dump(&self, mut each: impl FnMut(u64, distributor_ebpf::contract::Tag)) -> anyhow::Result<()> {
        let tags = Some(self.ledger.tags());
        sock_diag::sockets(&self.listen, States::Connections, tags, |socket| {
            if let Some(tag) = socket.tag {
                each(socket.cookie, tag);
            }
        })
        .context("ask the kernel for its sockets (sock_diag)")
    }
}

/// How often it checks.
///
/// # Errors
/// The environment says something else than a duration.
pub fn interval() -> anyhow::Result<Duration> {
    match env::var(INTERVAL) {
        Err(_) => Ok(EVERY),
        Ok(text) => duration::parse(&text).map_err(|refused| anyhow!("{INTERVAL}: {refused}")),
    }
}

/// Lets it check once in a thread of its own. Not by tokio's `spawn_blocking`, which panics if there
/// can be no thread.
fn check_aside(
    auditor: &Arc<Mutex<Auditor>>,
) -> anyhow::Result<oneshot::Receiver<anyhow::Result<Option<Checked>>>> {
    let (tell, checking) = oneshot::channel();
    let auditor = Arc::clone(auditor);
    let check = move || {
        // Poisoned only if a check has panicked, and then there is no next one.
        let result = auditor.lock().unwrap_or_else(PoisonError::into_inner).check();
        // The loop is gone only when everything stops.
        let _ = tell.send(result);
    };
    thread::Builder::new().name("auditor".to_owned()).spawn(check).context("start a thread")?;
    Ok(checking)
}

/// Lets it check again and again, in a thread where it may block, and tells the loop.
pub fn follow(
    service: usize,
    auditor: Auditor,
    every: Duration,
    inputs: &UnboundedSender<Input>,
) -> JoinHandle<()> {
    let inputs = inputs.clone();
    let auditor = Arc::new(Mutex::new(auditor));
    spawn_local(async move {
        loop {
            sleep(every).await;
            let result = match check_aside(&auditor) {
                Ok(checking) => match checking.await {
                    Ok(result) => result,
                    Err(_) => {
                        let gone = Err(anyhow!("the auditor has failed"));
                        let _ = inputs.send(Input::Audited { service, result: gone });
                        return;
                    }
                },
                Err(error) => Err(error),
            };
            if let Some(result) = result.transpose() {
                if let Ok(checked) = &result {
                    debug!("compared the counts with the sockets in {:?}", checked.took);
                }
                if inputs.send(Input::Audited { service, result }).is_err() {
                    return;
                }
            }
        }
    })
}
