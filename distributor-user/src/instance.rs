//! The names and places of one `dist-ctl up`, all made from its runtime directory.
//!
//! Gives the cgroup, with its lock, and the directory for pins, mounts a bpffs where there is none, and
//! removes what an instance leaves behind. Two instances with different runtime directories share
//! nothing.
#![forbid(unsafe_code)]

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use rustix::{
    fs::FlockOperation,
    mount::{MountFlags, UnmountFlags},
};
use tracing::info;

use crate::{
    cgroup::{self, Cgroup},
    keeper,
    lock::is_still,
    record,
};

/// Where bpffs usually is mounted.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";
/// BPF_FS_MAGIC (include/uapi/linux/magic.h)
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// How long the lock's holder may take to exit by himself.
const LEAVING: Duration = Duration::from_secs(2);
/// How often it is tried again meanwhile.
const POLL: Duration = Duration::from_millis(3);
/// How long processes that were killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// The places of one instance.
#[derive(Clone, Debug)]
pub struct Instance {
    pub runtime_dir: PathBuf,
    /// Holds one cgroup per service.
    pub cgroup: Cgroup,
    /// Holds one directory of pins per service.
    pub pins: PathBuf,
    /// A bpffs of our own, to be unmounted at the end.
    own_bpffs: Option<PathBuf>,
}

impl Instance {
    /// Finds its places, and mounts a bpffs below the runtime directory if the machine has
    /// none at /sys/fs/bpf.
    ///
    /// # Errors
    /// No cgroup v2; or no bpffs, and none can be mounted.
    pub fn find(runtime_dir: &Path) -> anyhow::Result<Self> {
        let runtime_dir = std::path::absolute(runtime_dir)?;
        let name = name(&runtime_dir);
        let cgroup = cgroup(&runtime_dir)?;
        let (pins, own_bpffs) = if let Some(bpffs) = bpffs() {
            (bpffs.join(&name), None)
        } else {
            let own = runtime_dir.join("bpf");
            mount_bpffs(&own)?;
            (own.join(&name), Some(own))
        };
        let instance = Self { runtime_dir, cgroup, pins, own_bpffs };
        match DirBuilder::new().mode(0o700).create(&instance.pins) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                let context = format!("create {} for the pins", instance.pins.display());
                instance.unmount()?;
                Err(error).context(context)
            }
            _ => Ok(instance),
        }
    }

    /// Whether servers run of an instance that itself does not. Ask only if it does not.
    pub fn is_abandoned(runtime_dir: &Path) -> bool {
        cgroup(runtime_dir).is_ok_and(|cgroup| !cgroup.processes().is_empty())
    }

    /// Where the servers' notify sockets are: servers of any user may pass, and list nothing.
    pub fn notify_dir(&self) -> PathBuf {
        self.runtime_dir.join("notify")
    }

    /// Whether processes of an earlier run are still there.
    pub fn is_populated(&self) -> bool {
        !self.cgroup.processes().is_empty()
    }

    /// Removes what an instance that was killed left behind of all services but these: what runs
    /// of them is killed first.
    pub fn clean_leftovers(&self, kept: &[&str]) -> anyhow::Result<()> {
        for cgroup in self.cgroup.children() {
            // Beside a service's own is that of its checks.
            let name = cgroup.path().file_name().and_then(OsStr::to_str).unwrap_or_default();
            let service = name.split('.').next().unwrap_or_default().to_owned();
            if kept.contains(&service.as_str()) {
                continue;
            }
            let left = cgroup.processes().len();
            if left > 0 {
                info!("processes ({left}) are left of service {service} as it was; kills them");
            }
            kill_and_remove(&cgroup)?;
        }
        remove_pins(&self.pins, kept)
    }

    /// Kills what runs of it.
    pub fn end_processes(&self) -> anyhow::Result<()> {
        kill_and_remove(&self.cgroup)
    }

    /// Removes everything outside of this process: processes, cgroups, pins, sockets, mounts.
    pub fn remove(&self) -> anyhow::Result<()> {
        self.remove_kernel_objects()?;
        remove_if_there(fs::remove_dir(&self.pins), &self.pins)?;
        self.unmount()?;
        let notify = self.notify_dir();
        remove_if_there(fs::remove_dir_all(&notify), &notify)?;
        record::remove(&self.runtime_dir).context("remove the record")?;
        for (_, keeper) in keeper::sockets(&self.runtime_dir) {
            remove_if_there(fs::remove_file(&keeper), &keeper)?;
        }
        let control = self.runtime_dir.join(crate::control::SOCKET);
        remove_if_there(fs::remove_file(&control), &control)
    }

    /// Mounts its own bpffs again if somebody has unmounted it.
    pub fn remount(&self) -> anyhow::Result<()> {
        self.own_bpffs.as_deref().map_or(Ok(()), mount_bpffs)
    }

    fn unmount(&self) -> anyhow::Result<()> {
        let Some(own) = &self.own_bpffs else { return Ok(()) };
        rustix::mount::unmount(own, UnmountFlags::DETACH)
            .with_context(|| format!("unmount {}", own.display()))?;
        remove_if_there(fs::remove_dir(own), own)
    }

    fn remove_kernel_objects(&self) -> anyhow::Result<()> {
        kill_and_remove(&self.cgroup)?;
        remove_pins(&self.pins, &[])
    }
}

/// The cgroup of an instance, which need not exist.
///
/// # Errors
/// There is no cgroup v2.
pub fn cgroup(runtime_dir: &Path) -> anyhow::Result<Cgroup> {
    Ok(Cgroup::at(cgroup::mount_point()?.join(name(&std::path::absolute(runtime_dir)?))))
}

/// The lock on an instance's cgroup, held for as long as any duplicate of the descriptor is open.
/// Whoever is about to exit is waited for.
///
/// # Errors
/// Another instance of this name has it.
pub fn lock(directory: &Path) -> anyhow::Result<OwnedFd> {
    let shown = directory.display();
    let give_up_at = Instant::now() + LEAVING;
    loop {
        let file = File::open(directory).with_context(|| format!("open {shown}"))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Whoever had it may have removed the cgroup.
            Ok(()) if is_still(&file, directory) => return Ok(file.into()),
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => ensure!(
                Instant::now() < give_up_at,
                "another dist-ctl runs on this runtime directory, though somebody has removed its files \
                 there: it makes them again within a second; stop it then with dist-ctl down, or choose \
                 another --runtime-dir"
            ),
            Err(error) => return Err(error).with_context(|| format!("lock {shown}")),
        }
        thread::sleep(POLL);
    }
}

/// True if this descriptor is of the file or directory that has this name now.
pub fn is_of(fd: &OwnedFd, path: &Path) -> bool {
    fd.try_clone().is_ok_and(|fd| is_still(&File::from(fd), path))
}

fn kill_and_remove(cgroup: &Cgroup) -> anyhow::Result<()> {
    cgroup.kill()?;
    let deadline = Instant::now() + KILL_PATIENCE;
    while !cgroup.processes().is_empty() {
        ensure!(
            Instant::now() < deadline,
            "processes {:?} in {} do not die, though they were killed {} s ago: see what holds them \
             (state D), then run this again",
            cgroup.processes(),
            cgroup.path().display(),
            KILL_PATIENCE.as_secs()
        );
        thread::sleep(Duration::from_millis(5));
    }
    // A process that is just gone keeps its cgroup busy for a moment.
    while let Err(error) = cgroup.remove() {
        ensure!(Instant::now() < deadline, error);
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// "dist-ctl" for /run/dist-ctl, "dist-ctl-tmp-a" for /tmp/a. No two directories have the same
/// name, and none has a dot, which a bpffs refuses (bpf_lookup, Linux 6.18: EPERM).
fn name(runtime_dir: &Path) -> String {
    if runtime_dir == Path::new("/run/dist-ctl") {
        return "dist-ctl".to_owned();
    }
    let mut name = "dist-ctl".to_owned();
    for byte in runtime_dir.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' => name.push('-'),
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'_' => name.push(char::from(*byte)),
            other => name.push_str(&format!("={other:02x}")),
        }
    }
    name
}

/// The bpffs that the machine has at its usual place.
pub(crate) fn bpffs() -> Option<&'static Path> {
    Some(Path::new(BPFFS)).filter(|path| is_bpffs(path))
}

fn is_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|facts| facts.f_type as u64 == BPF_FS_MAGIC)
}

fn mount_bpffs(at: &Path) -> anyhow::Result<()> {
    if is_bpffs(at) {
        return Ok(());
    }
    fs::create_dir_all(at).with_context(|| format!("create {}", at.display()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("bpf", at, "bpf", flags, Some(c"mode=0700")).map_err(|error| {
        // It was made for the mount; what was in it before is not ours.
        let _ = fs::remove_dir(at);
        anyhow!(
            "mount a bpffs on {}, because {BPFFS} has none: {error}: run as root, or have one mounted with \
             mount -t bpf bpf {BPFFS}",
            at.display()
        )
    })
}

/// Removes the pins of all services but these, and of all versions. Once nothing is pinned and
/// nobody has it open, the kernel drops a program or map by itself.
fn remove_pins(pins: &Path, kept: &[&str]) -> anyhow::Result<()> {
    let Ok(services) = fs::read_dir(pins) else { return Ok(()) };
    for service in services.flatten() {
        let service = service.path();
        let name = service.file_name().and_then(OsStr::to_str).unwrap_or_default();
        // The version of the contract follows it.
        if name.rsplit_once("-v").is_some_and(|(name, _)| kept.contains(&name)) {
            continue;
        }
        for pin in fs::read_dir(&service).into_iter().flatten().flatten() {
            remove_if_there(fs::remove_file(pin.path()), &pin.path())?;
        }
        remove_if_there(fs::remove_dir(&service), &service)?;
    }
    Ok(())
}

fn remove_if_there(result: io::Result<()>, path: &Path) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_named_after_their_directory() {
        assert_eq!(name(Path::new("/run/dist-ctl")), "dist-ctl");
        assert_eq!(name(Path::new("/tmp/a/b")), "dist-ctl-tmp-a-b");
        assert_eq!(name(Path::new("/tmp/a-b.c")), "dist-ctl-tmp-a=2db=2ec");
    }
}
