//! What dist-ctl takes while nothing happens.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::Result;
use tests::{host::Host, process::Process};

use crate::{Run, cpu, servers::demo, table::Table};

/// Percent of one CPU, and bytes.
const CPU_BUDGET: f64 = 1.0;
const MEMORY_BUDGET: u64 = 20 << 20;

/// After the last server is ready, before the measurement begins.
const SETTLE: Duration = Duration::from_secs(3);

pub(crate) fn run(run: &Run) -> Result<String> {
    let during = run.choose(Duration::from_secs(20), Duration::from_secs(2));
    let mut table = Table::new(["process", "servers", "CPU", "memory", "budget"]);
    for servers in [4, 256] {
        eprintln!("bench: starting {servers} servers");
        let host = Host::new();
        let up = host.up(&demo(servers));
        run.pause(SETTLE)?;
        let processes = [("monitor", up.monitor()), ("distributor", up.distributor())];
        let before = processes.map(|(_, process)| cpu::time_of(process.pid));
        let start = Instant::now();
        run.pause(during)?;
        let took = start.elapsed();
        for ((name, process), before) in processes.into_iter().zip(before) {
            let percent = (cpu::time_of(process.pid)? - before?).as_secs_f64() / took.as_secs_f64() * 100.0;
            let bytes = resident(process);
            let kept = percent < CPU_BUDGET && bytes <= MEMORY_BUDGET;
            table.row([
                name.to_owned(),
                servers.to_string(),
                format!("{percent:.2} %"),
                format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
                if kept { "kept" } else { "missed" }.to_owned(),
            ]);
        }
        up.stop();
    }
    Ok(format!(
        "Over {during:?} in which no client connects. Memory is what is resident. Budget: less than \
         {CPU_BUDGET} % of one CPU, and {} MiB.\n\n{table}",
        MEMORY_BUDGET >> 20
    ))
}

fn resident(process: Process) -> u64 {
    let fact = process.fact("VmRSS");
    let kibibytes: Option<u64> = fact.strip_suffix(" kB").and_then(|number| number.parse().ok());
    kibibytes.expect("the kernel says it in kB") << 10
}
