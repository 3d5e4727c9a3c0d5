//! What a request takes on a connection that is kept, steered by dist-ctl and by the kernel.
//!
//! One request at a time, on one connection to each server. The servers have one CPU and the
//! client another, on both sides: where the scheduler puts them would matter more than what
//! is measured.
#![forbid(unsafe_code)]

use std::{io, thread};

use anyhow::{Context as _, Result};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use tests::host::Host;

use crate::{
    Run,
    load::Kept,
    servers::{PLAIN, STEERED, Sides, each_server},
    statistics::{Spread, quantile},
    table::Table,
};

/// Requests of one side before it is the other's turn: short against what else happens.
const REQUESTS: usize = 200;

pub(crate) fn run(run: &Run) -> Result<String> {
    let rounds = run.choose(1000, 50);
    let host = Host::new();
    let sides = Sides::start(run, &host)?;
    let (first, last) = first_and_last_cpu()?;
    let servers = sides.servers();
    for server in servers.steered.iter().chain(&servers.plain) {
        pin(Pid::from_raw(*server), last).context("give the servers a CPU")?;
    }
    // A thread, because the CPU is given to a thread, and this one goes on to clean up.
    let pairs = thread::scope(|scope| {
        let client = scope.spawn(|| -> Result<_> {
            pin(None, first).context("give the client a CPU")?;
            let mut steered = each_server(run, STEERED)?;
            let mut plain = each_server(run, PLAIN)?;
            let mut pairs = Vec::new();
            for round in 0..rounds {
                run.check()?;
                pairs.push(if round % 2 == 0 {
                    let steered = ask(&mut steered)?;
                    (steered, ask(&mut plain)?)
                } else {
                    let plain = ask(&mut plain)?;
                    (ask(&mut steered)?, plain)
                });
            }
            Ok(pairs)
        });
        client.join().expect("the client does not panic")
    })?;
    sides.stop();

    let mut table = Table::new(["steered / plain", "median", "quartiles", "95 % of median", "budget"]);
    for (name, part, budget) in
        [("request, median", 0.5, "unchanged: 1.00"), ("request, 99th percentile", 0.99, "")]
    {
        let ratios =
            pairs.iter().map(|(steered, plain)| quantile(steered, part) / quantile(plain, part)).collect();
        let [median, quartiles, interval] = Spread::of(ratios).cells();
        table.row([name.to_owned(), median, quartiles, interval, budget.to_owned()]);
    }
    Ok(format!("{rounds} rounds of {REQUESTS} requests for each side.\n\n{table}"))
}

/// A piece of requests, in turn on each connection: what each took, in seconds, sorted.
fn ask(connections: &mut [Kept]) -> Result<Vec<f64>> {
    let mut took = Vec::with_capacity(REQUESTS);
    for number in 0..REQUESTS {
        let connection = number % connections.len();
        took.push(connections[connection].ask()?.as_secs_f64());
    }
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// The same one, if there is only one.
fn first_and_last_cpu() -> Result<(usize, usize)> {
    let allowed = sched_getaffinity(None).context("ask for our CPUs")?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let first = cpus.next().context("this process has a CPU")?;
    Ok((first, cpus.next_back().unwrap_or(first)))
}

/// Gives a process, or our own thread, one CPU only. A demo server has only one thread.
fn pin(process: Option<Pid>, cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    Ok(sched_setaffinity(process, &cpus)?)
}
