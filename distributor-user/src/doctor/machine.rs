//! The checks that the doctor does itself: rights, places, limits, and what it does to the examiner.
//!
//! Each is one function: it tries one thing, and gives what was found or why it does not work. What
//! it makes it removes, or leaves to its [`Place`].
#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use distributor_ebpf::contract::ROOMS;
use rustix::{
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Resource, geteuid, getrlimit, pidfd_getfd, pidfd_open},
    thread::CapabilitySet,
};

use super::{Place, name};
use crate::{
    cgroup::{self, Cgroup},
    room,
};

/// What dist-ctl uses, and what for is said where it fails. CAP_BPF and CAP_PERFMON are in
/// CAP_SYS_ADMIN too (capabilities(7)).
const USED: [(CapabilitySet, &str); 12] = [
    (CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN), "CAP_BPF"),
    (CapabilitySet::PERFMON.union(CapabilitySet::SYS_ADMIN), "CAP_PERFMON"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::KILL, "CAP_KILL"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::SETPCAP, "CAP_SETPCAP"),
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SYS_NICE, "CAP_SYS_NICE"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
];

/// As many descriptors as a distributor may need in comfort: those of the rooms of four addresses.
const OPEN_FILES: u64 = 4 * ROOMS as u64;

/// How long a cgroup may be busy whose processes have ended.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn root(_: &mut Place) -> anyhow::Result<String> {
    let user = geteuid();
    ensure!(user.is_root(), "this is user {user}");
    Ok(String::new())
}

pub(super) fn capabilities(_: &mut Place) -> anyhow::Result<String> {
    let has = rustix::thread::capabilities(None).context("read our capabilities")?.effective;
    let lacking = lacking(has);
    ensure!(
        lacking.is_empty(),
        "{} {} missing",
        lacking.join(", "),
        if lacking.len() == 1 { "is" } else { "are" }
    );
    Ok(String::new())
}

/// Which of those that are used are not there.
fn lacking(has: CapabilitySet) -> Vec<&'static str> {
    USED.iter().filter(|(any, _)| !has.intersects(*any)).map(|(_, name)| *name).collect()
}

/// Nothing of an instance that runs is touched.
pub(super) fn runtime_dir(place: &mut Place) -> anyhow::Result<String> {
    let there = nearest(&place.runtime_dir);
    let tried = there.join(name(std::process::id()));
    fs::create_dir(&tried).with_context(|| format!("make a directory in {}", there.display()))?;
    fs::remove_dir(&tried).with_context(|| format!("remove {}", tried.display()))?;
    Ok(place.runtime_dir.display().to_string())
}

/// The nearest directory above a path that there is, or itself.
pub(super) fn nearest(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

pub(super) fn cgroup2(_: &mut Place) -> anyhow::Result<String> {
    Ok(cgroup::mount_point()?.display().to_string())
}

pub(super) fn cgroup(place: &mut Place) -> anyhow::Result<String> {
    let cgroup = Cgroup::at(cgroup::mount_point()?.join(name(std::process::id())));
    cgroup.create()?;
    place.cgroup = Some(cgroup);
    Ok(String::new())
}

pub(super) fn cpu_pressure(place: &mut Place) -> anyhow::Result<String> {
    let cgroup = place.cgroup.as_ref().context("there is no cgroup to try it with")?;
    cgroup.cpu_pressure().context("read cpu.pressure")?;
    Ok(String::new())
}

pub(super) fn pidfd_opens(place: &mut Place) -> anyhow::Result<String> {
    hold(place).map(|_| String::new())
}

/// Holds the examiner, as a server is held.
fn hold(place: &Place) -> anyhow::Result<(u32, OwnedFd)> {
    let examiner = place.examiner.as_ref().context("there is no process to try it with")?;
    let process = examiner.process();
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).context("a process has a number")?;
    Ok((process, pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?))
}

/// As a server's listener is found. If the check before this one worked, the examiner is another
/// user's process.
pub(super) fn pidfd_gets(place: &mut Place) -> anyhow::Result<String> {
    let (process, held) = hold(place)?;
    let descriptors = format!("/proc/{process}/fd");
    let entries = fs::read_dir(&descriptors).with_context(|| format!("read {descriptors}"))?;
    let pipe = entries.flatten().find_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        target.as_os_str().as_encoded_bytes().starts_with(b"pipe:").then_some((number, target))
    });
    let (number, target) = pipe.with_context(|| format!("see where those in {descriptors} lead"))?;
    let ours = pidfd_getfd(held.as_fd(), number, PidfdGetfdFlags::empty()).context("pidfd_getfd")?;
    let leads_to = fs::read_link(format!("/proc/self/fd/{}", ours.as_raw_fd()));
    ensure!(leads_to.context("see what was duplicated")? == target, "another descriptor was duplicated");
    Ok(String::new())
}

pub(super) fn cgroup_kill(place: &mut Place) -> anyhow::Result<String> {
    let cgroup = place.cgroup.as_ref().context("there is no cgroup to try it with")?;
    let examiner = place.examiner.as_mut().context("there is no process to try it with")?;
    cgroup.kill()?;
    ensure!(examiner.has_ended()?, "a process did not end that was killed by its cgroup");
    Ok(String::new())
}

pub(super) fn cgroup_remove(place: &mut Place) -> anyhow::Result<String> {
    // It has to be empty.
    place.examiner = None;
    remove(place.cgroup.as_ref().context("there is no cgroup to try it with")?)?;
    place.cgroup = None;
    Ok(String::new())
}

/// Removes a cgroup whose processes have ended. Nothing in it is killed: before Linux 5.14 that
/// cannot be done, and it would stay.
pub(super) fn remove(cgroup: &Cgroup) -> anyhow::Result<()> {
    let deadline = Instant::now() + REMOVE_PATIENCE;
    // A process that is just gone keeps its cgroup busy for a moment.
    while let Err(error) = cgroup.remove() {
        ensure!(Instant::now() < deadline, error);
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The monitor raises its limit as far as it may.
pub(super) fn open_files(_: &mut Place) -> anyhow::Result<String> {
    match getrlimit(Resource::Nofile).maximum {
        None => Ok("any number".to_owned()),
        Some(most) if most >= OPEN_FILES => Ok(most.to_string()),
        Some(most) => bail!("{most}, and better {OPEN_FILES} or more"),
    }
}

pub(super) fn accept_queues(_: &mut Place) -> anyhow::Result<String> {
    let longest: i32 = setting("net/core/somaxconn")?.parse().context("read net.core.somaxconn")?;
    ensure!(
        longest >= room::BACKLOG,
        "they are cut to {longest} connections of {} (net.core.somaxconn)",
        room::BACKLOG
    );
    Ok(format!("net.core.somaxconn = {longest}"))
}

pub(super) fn syn_cookies(_: &mut Place) -> anyhow::Result<String> {
    let when = setting("net/ipv4/tcp_syncookies")?;
    ensure!(when == "1", "net.ipv4.tcp_syncookies = {when}");
    Ok(format!("net.ipv4.tcp_syncookies = {when}"))
}

/// A setting of the kernel, by its path.
fn setting(path: &str) -> io::Result<String> {
    let path = Path::new("/proc/sys").join(path);
    let text = fs::read_to_string(&path);
    let text =
        text.map_err(|error| io::Error::new(error.kind(), format!("read {}: {error}", path.display())))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_are_missing_are_named_and_sys_admin_is_two_others() {
        assert_eq!(lacking(CapabilitySet::all()), Vec::<&str>::new());
        let old = CapabilitySet::all().difference(CapabilitySet::BPF.union(CapabilitySet::PERFMON));
        assert_eq!(lacking(old), Vec::<&str>::new());
        assert_eq!(lacking(old.difference(CapabilitySet::SYS_ADMIN)), ["CAP_BPF", "CAP_PERFMON"]);
        assert_eq!(lacking(CapabilitySet::empty()).len(), USED.len());
    }
}
