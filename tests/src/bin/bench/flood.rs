//! What clients feel of a flood of SYNs: before it, while it lasts, and after it.
//!
//! The flood comes from a network of its own that answers nothing; see `tests::flood`. Clients
//! come one after the other over the loopback, so their latency and their rate are two sides of
//! one thing. The servers are the tests' own, which greet, so that a client knows when it is
//! served without asking.
#![forbid(unsafe_code)]

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tests::{
    app::App,
    flood::{Flood, PER_SECOND, SYNCOOKIES, Serial, set_syncookies},
    host::{Host, V4},
};

use crate::{Run, statistics::quantile, table::Table};

const SERVERS: usize = 2;
const LIMIT: u32 = 10;

/// Without a flood, before and after it.
const CALM: Duration = Duration::from_secs(5);

/// What clients met in a stretch of time.
struct Phase {
    /// What each took that was served, in seconds, sorted.
    served: Vec<f64>,
    failed: usize,
    during: Duration,
}

pub(crate) fn run(run: &Run) -> Result<String> {
    // The long ones only where the kernel does what it does by default.
    let floods = run.choose(vec![(10, &SYNCOOKIES[..]), (60, &SYNCOOKIES[1..2])], vec![(1, &SYNCOOKIES[..])]);
    let calm = run.choose(CALM, Duration::from_millis(500));
    let mut table =
        Table::new(["flood", "SYNs per second", "served", "failed", "per second", "median", "99 %"]);
    for (length, kinds) in floods {
        for full in [false, true] {
            for &syncookies in kinds {
                let places = if full { "servers full" } else { "places free" };
                let name = format!("{length} s, {places}, syncookies {syncookies}");
                eprintln!("bench: {name}");
                let (rate, phases) = flooded(run, syncookies, full, Duration::from_secs(length), calm)
                    .with_context(|| name.clone())?;
                for ((phase, rate), when) in
                    phases.into_iter().zip([0.0, rate, 0.0]).zip(["before", "during", "after"])
                {
                    table.row(phase.row(format!("{name}: {when}"), rate));
                }
            }
        }
    }
    Ok(format!(
        "{SERVERS} servers with a limit of {LIMIT} each, and clients one after the other. \
         Before and after the flood: {calm:?} each. Where the servers are full, each client waits in \
         line until it is given the place of one that leaves.\n\n{table}"
    ))
}

/// The SYNs per second that were sent, and what clients met before, during and after.
fn flooded(
    run: &Run,
    syncookies: u8,
    full: bool,
    length: Duration,
    calm: Duration,
) -> Result<(f64, [Phase; 3])> {
    let host = Host::new();
    set_syncookies(syncookies).context("set tcp_syncookies")?;
    let flood = Flood::join(1).context("join a network of clients")?;
    let up = host.up(&App { limit: Some(LIMIT), ..App::of(&host, SERVERS) });
    let mut serial = if full { Serial::full(V4, SERVERS * LIMIT as usize) } else { Serial::free(V4) };
    let before = Phase::of(run, &mut serial, calm)?;
    let over = AtomicBool::new(false);
    let (sent, during) = thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(8080, PER_SECOND, &over));
        let during = Phase::of(run, &mut serial, length);
        over.store(true, Ordering::Relaxed);
        (flooding.join().expect("flooding does not panic"), during)
    });
    let (sent, during) = (sent.context("send SYNs")?, during?);
    let after = Phase::of(run, &mut serial, calm)?;
    drop(serial);
    up.stop();
    Ok((sent as f64 / during.during.as_secs_f64(), [before, during, after]))
}

impl Phase {
    fn of(run: &Run, serial: &mut Serial, length: Duration) -> Result<Self> {
        let start = Instant::now();
        let (mut served, mut failed) = (Vec::new(), 0);
        while start.elapsed() < length {
            run.check()?;
            match serial.come() {
                Ok(taken) => served.push(taken.as_secs_f64()),
                Err(_) => failed += 1,
            }
        }
        served.sort_by(f64::total_cmp);
        Ok(Self { served, failed, during: start.elapsed() })
    }

    fn row(&self, name: String, rate: f64) -> [String; 7] {
        let quantile = |part| match self.served.as_slice() {
            [] => "-".to_owned(),
            served => format!("{:.2} ms", quantile(served, part) * 1e3),
        };
        [
            name,
            format!("{rate:.0}"),
            self.served.len().to_string(),
            self.failed.to_string(),
            format!("{:.0}", self.served.len() as f64 / self.during.as_secs_f64()),
            quantile(0.5),
            quantile(0.99),
        ]
    }
}
