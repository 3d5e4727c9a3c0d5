//! Keeps servers on their CPUs, also when these go away and come back.
//!
//! A thread whose last CPU goes offline may run on every CPU from then on: the kernel widens its
//! mask when it next runs, and does not narrow it when the CPU is back (`select_fallback_rq` in
//! kernel/sched/core.c, the same from Linux 5.15 to 7.3). So masks are looked at again.
#![forbid(unsafe_code)]

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::config::cpus_of_list;

/// How long nothing is looked at while no CPU is seen to go or come. One that was away for less than
/// a second may not be, so masks are looked at after this time in any case.
const PAUSE: Duration = Duration::from_secs(5);

/// Which CPUs are there, as a list.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Whether masks are to be looked at.
#[derive(Default)]
pub struct Watch {
    last: Option<(Instant, String)>,
}

impl Watch {
    /// At the first time, after a CPU has gone or come, and every few seconds.
    pub fn is_due(&mut self) -> bool {
        // Where /sys does not tell, time does.
        let online = fs::read_to_string(ONLINE).unwrap_or_default();
        let is_due = self.last.as_ref().is_none_or(|(at, then)| at.elapsed() >= PAUSE || *then != online);
        if is_due {
            self.last = Some((Instant::now(), online));
        }
        is_due
    }
}

/// The CPUs as a mask.
///
/// # Errors
/// The first one that is beyond what a mask can name.
pub fn mask(cpus: &[usize]) -> Result<CpuSet, usize> {
    let mut mask = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            return Err(cpu);
        }
        mask.set(cpu);
    }
    Ok(mask)
}

/// Sets the masks of all threads that may run elsewhere than on `wanted`, and of those that have the one
/// that they were given `before`, if that was another. Those that the server has narrowed by itself stay as
/// they are.
///
/// # Errors
/// EINVAL: none of these CPUs is online, or allowed by the server's cpuset (sched_setaffinity(2)).
pub fn restore(processes: &[u32], before: Option<&CpuSet>, wanted: &CpuSet) -> rustix::io::Result<()> {
    let online = fs::read_to_string(ONLINE).ok().and_then(|list| mask(&cpus_of_list(&list).ok()?).ok());
    let before = before.map(|before| online.map_or(*before, |online| both(before, &online)));
    for thread in processes.iter().flat_map(|&process| threads(process)) {
        let restored =
            sched_getaffinity(Some(thread)).and_then(|mask| match is_wrong(&mask, before, wanted) {
                true => sched_setaffinity(Some(thread), wanted),
                false => Ok(()),
            });
        match restored {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::SRCH) => {}
            error => return error,
        }
    }
    Ok(())
}

/// Whether a thread's mask is to be set. The kernel tells of it what is online only, so `before` has to be
/// that as well.
fn is_wrong(mask: &CpuSet, before: Option<CpuSet>, wanted: &CpuSet) -> bool {
    let strays = both(mask, wanted) != *mask;
    strays || before.is_some_and(|before| before == *mask && *mask != *wanted)
}

/// The CPUs that are in both.
fn both(one: &CpuSet, other: &CpuSet) -> CpuSet {
    let mut both = CpuSet::new();
    (0..CpuSet::MAX_CPU).filter(|&cpu| one.is_set(cpu) && other.is_set(cpu)).for_each(|cpu| both.set(cpu));
    both
}

/// The threads of a process. None if it has ended.
fn threads(process: u32) -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_masks_that_stray_are_set() {
        let all = sched_getaffinity(None).expect("our mask");
        let here: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)).collect();
        let first = mask(&here[..1]).expect("it can be named");
        let mut child = Command::new("sleep").arg("60").spawn().expect("run sleep");
        let now = || sched_getaffinity(Pid::from_raw(child.id() as i32)).expect("its mask");
        let rows = [
            ("as it is", None, all, all),
            ("narrower", None, first, first),
            ("wider: it may have wanted that", None, all, first),
            ("wider, and it had another mask before", Some(all), all, first),
            ("wider, and that was ours", Some(first), all, all),
        ];
        let after = rows
            .map(|(row, before, wanted, _)| (row, restore(&[child.id()], before.as_ref(), &wanted), now()));
        child.kill().and_then(|()| child.wait()).expect("it ends");
        for ((row, restored, mask), (.., expected)) in after.into_iter().zip(rows) {
            assert_eq!((restored, mask), (Ok(()), expected), "{row}");
        }
        assert_eq!(restore(&[child.id()], None, &first), Ok(()), "it has ended");
    }

    #[test]
    fn a_mask_is_wrong_also_if_a_cpu_of_it_is_offline() {
        let of = |cpus: &[usize]| mask(cpus).unwrap();
        for (row, seen, before, online, wanted, wrong) in [
            ("as it is", &[0, 1][..], None, &[0, 1, 2][..], &[0, 1][..], false),
            ("strays", &[0, 2], None, &[0, 1, 2], &[0, 1], true),
            ("narrower by itself", &[1], Some(&[0, 1][..]), &[0, 1, 2, 3], &[0, 1, 2], false),
            ("gets one more", &[0, 1], Some(&[0, 1]), &[0, 1, 2, 3], &[0, 1, 2], true),
            ("gets another one for one that is offline", &[1], Some(&[0, 1]), &[1, 2, 3, 4], &[1, 4], true),
            ("has lost one and gets none", &[1], Some(&[0, 1]), &[1, 2, 3, 4], &[1], false),
        ] {
            let before = before.map(|before: &[usize]| both(&of(before), &of(online)));
            assert_eq!(is_wrong(&of(seen), before, &of(wanted)), wrong, "{row}");
        }
    }

    #[test]
    fn a_cpu_beyond_every_mask_makes_none() {
        assert_eq!(mask(&[0, CpuSet::MAX_CPU]), Err(CpuSet::MAX_CPU));
        assert!(mask(&[0, 1]).is_ok_and(|mask| mask.is_set(1) && !mask.is_set(2)));
    }
}
