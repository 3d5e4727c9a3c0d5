//! CPU time of processes, to the nanosecond: the kernel's `stat` only counts ticks.
//!
//! It contains what the network stack did in the name of a process, which on the loopback is
//! nearly all of it. Other programs on the machine make everything take longer, but hardly
//! make it take more CPU time.
#![forbid(unsafe_code)]

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};

/// Of all threads that a process has at the moment.
pub(crate) fn time_of(pid: i32) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).with_context(|| format!("read {tasks}"))? {
        let path = task?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let time = text.split(' ').next().and_then(|word| word.parse().ok());
        sum += Duration::from_nanos(time.with_context(|| format!("{}: {text:?}", path.display()))?);
    }
    Ok(sum)
}

/// Of our own process, with the threads that have ended.
pub(crate) fn own_time() -> Result<Duration> {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).context("a CPU time is not negative")
}
