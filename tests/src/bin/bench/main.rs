//! Benchmarks of dist-ctl on the running kernel; `cargo xtask bench` builds and runs them.
//!
//! `bench NAME [--quick] [--object FILE] [--plot FILE]` prints one section of docs/benchmarks.md to standard
//! output, and its progress to standard error. The servers are unmodified processes, mostly
//! `dist-ctl demo`; what is compared runs in turns within one run. All traffic stays on the loopback
//! of a network namespace of its own. Ctrl-C ends it between two pieces of work, and whatever
//! way it ends, nothing that it started stays.

mod accept;
mod bpf;
mod connections;
mod cpu;
mod flood;
mod handover;
mod idle;
mod latency;
mod load;
mod plot;
mod programs;
mod servers;
mod slow;
mod statistics;
mod table;
mod verifier;

use std::{
    env,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How a benchmark is run.
pub(crate) struct Run {
    /// Few and short pieces: to see that it works, not to measure.
    pub(crate) quick: bool,
    /// The eBPF object, for the one benchmark that loads it itself.
    object: Option<PathBuf>,
    /// Where to write a plot, for those that draw one.
    plot: Option<PathBuf>,
    interrupted: Arc<AtomicBool>,
}

fn main() -> ExitCode {
    match run() {
        Ok(section) => {
            println!("{section}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let mut words = env::args().skip(1);
    let name = words.next().context("say which benchmark: run it by cargo xtask bench")?;
    if name == "server" {
        return handover::server(words);
    }
    if name == "sleeper" {
        return slow::sleeper(words);
    }
    if name == "worker" {
        return accept::worker(words);
    }
    let mut run = Run { quick: false, object: None, plot: None, interrupted: Arc::default() };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => run.quick = true,
            "--object" => run.object = Some(words.next().context("--object: a value is missing")?.into()),
            "--plot" => run.plot = Some(words.next().context("--plot: a value is missing")?.into()),
            _ => bail!("{word}: no such option"),
        }
    }
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&run.interrupted))?;
    }
    let section = match name.as_str() {
        "connections" => connections::run(&run),
        "latency" => latency::run(&run),
        "flood" => flood::run(&run),
        "handover" => handover::run(&run),
        "accept" => accept::run(&run),
        "slow" => slow::run(&run),
        "programs" => programs::run(&run),
        "idle" => idle::run(&run),
        "verifier" => verifier::run(&run),
        _ => bail!("{name}: no such benchmark"),
    };
    if section.is_err() {
        // Ctrl-C stops dist-ctl as well; that nobody answers any more is not what went wrong.
        run.check()?;
    }
    section.with_context(|| format!("benchmark {name}"))
}

impl Run {
    /// One of two numbers: for a measurement, or for a look whether it works.
    pub(crate) fn choose<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// An error if somebody wants us to stop.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Waits, unless somebody wants us to stop.
    pub(crate) fn pause(&self, during: Duration) -> Result<()> {
        let end = Instant::now() + during;
        while Instant::now() < end {
            self.check()?;
            thread::sleep(Duration::from_millis(50).min(end.saturating_duration_since(Instant::now())));
        }
        self.check()
    }
}
