//! A directory of the cgroup v2 hierarchy: who is in it, killing them, removing it.
//!
//! Takes paths, gives sentences. Knows nothing of servers or BPF.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use rustix::io::Errno;

/// One cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

/// Where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid systems.
///
/// # Errors
/// It is mounted nowhere.
pub fn mount_point() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    find_mount(&mounts).ok_or_else(|| {
        anyhow!(
            "cgroup v2 is not mounted here, and connections are counted by cgroup: run \
             mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1"
        )
    })
}

/// The mount point of the first cgroup2 line of a mountinfo file (proc_pid_mountinfo(5)).
fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mount_point = before.split(' ').nth(4)?;
        after.starts_with("cgroup2 ").then(|| PathBuf::from(unescape(mount_point)))
    })
}

/// Undoes the octal escapes of mountinfo: `\040` is a space.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

impl Cgroup {
    /// The cgroup at this path, which need not exist.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// A cgroup below this one.
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, and those above it, unless they exist.
    pub fn create(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("create the cgroup {}", self.0.display()))
    }

    pub fn exists(&self) -> bool {
        self.0.is_dir()
    }

    /// Its number: what `bpf_get_current_cgroup_id` gives for processes in it.
    pub fn id(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.0)?.ino())
    }

    /// The cgroup with this number: itself, or one below it.
    pub fn find(&self, id: u64) -> Option<Self> {
        if self.id().ok()? == id {
            return Some(self.clone());
        }
        self.children().iter().find_map(|child| child.find(id))
    }

    /// The processes in it and below it. None if it does not exist, or cannot be read.
    pub fn processes(&self) -> Vec<u32> {
        self.members().unwrap_or_default()
    }

    /// The processes in it and below it. None if it does not exist.
    ///
    /// # Errors
    /// It cannot be read, because no descriptors are left for example. Who takes that for empty
    /// takes what runs for gone.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        let text = match fs::read_to_string(self.0.join("cgroup.procs")) {
            // ENODEV: it was removed after it was opened.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) =>
            {
                return Ok(Vec::new());
            }
            text => text?,
        };
        let mut processes: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        for child in self.try_children()? {
            processes.extend(child.members()?);
        }
        Ok(processes)
    }

    /// Whether no process is left in one that is not to have any. If there is no descriptor to
    /// look, it is removed, which takes none, and which the kernel does only then.
    pub fn has_emptied(&self) -> bool {
        match self.members() {
            Ok(processes) => processes.is_empty(),
            Err(_) => fs::remove_dir(&self.0).is_ok(),
        }
    }

    /// Kills every process in it and below it, also such as fork meanwhile (cgroup.kill,
    /// Linux 5.14). One that does not exist holds none.
    pub fn kill(&self) -> anyhow::Result<()> {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            // An older kernel has no such file, and nothing of ours has begun to run there.
            Err(error) if self.exists() && !self.members().is_ok_and(|members| members.is_empty()) => {
                Err(error).with_context(|| format!("kill what runs in {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }

    /// Kills what is in it and removes it, as far as that is done at once. What is left is its next
    /// user's.
    pub fn end(&self) {
        let _ = self.kill();
        let _ = self.remove();
    }

    /// The CPUs that its processes may use, as a list: of the nearest cgroup that has a cpuset (v2).
    pub fn cpuset(&self) -> Option<String> {
        self.0.ancestors().find_map(|path| fs::read_to_string(path.join("cpuset.cpus.effective")).ok())
    }

    /// How much of the last ten seconds some of its processes waited for a CPU, from 0 to 1 (PSI).
    ///
    /// # Errors
    /// The kernel does not tell: it has no PSI, or that is turned off, at boot or for this cgroup.
    pub fn cpu_pressure(&self) -> io::Result<f64> {
        let text = fs::read_to_string(self.0.join("cpu.pressure"))?;
        pressure(&text).ok_or_else(|| io::Error::other(format!("cpu.pressure says {text:?}")))
    }

    /// Removes it and those below it.
    ///
    /// # Errors
    /// Something still runs there (EBUSY).
    pub fn remove(&self) -> anyhow::Result<()> {
        for child in self.children() {
            child.remove()?;
        }
        match fs::remove_dir(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove the cgroup {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }

    /// The cgroups directly below it.
    pub fn children(&self) -> Vec<Self> {
        self.try_children().unwrap_or_default()
    }

    fn try_children(&self) -> io::Result<Vec<Self>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        Ok(entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Self(entry.path()))
            .collect())
    }
}

/// `some avg10=12.34 avg60=...`, in percent.
fn pressure(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent: f64 = some.split(' ').find_map(|word| word.strip_prefix("avg10="))?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_both_layouts() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let hybrid = "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      33 31 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_mount("31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }

    #[test]
    fn reads_escaped_mount_points() {
        let line = "30 23 0:26 / /a\\040b\\134c rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(line), Some(PathBuf::from("/a b\\c")));
    }

    #[test]
    fn reads_the_pressure_of_the_last_ten_seconds() {
        let said =
            "some avg10=12.50 avg60=3.00 avg300=0.70 total=1234\nfull avg10=99.00 avg60=0.00 total=0\n";
        assert_eq!(pressure(said), Some(0.125));
        for text in ["", "full avg10=1.00\n", "some avg60=1.00\n", "some avg10=much\n", "some avg10=101.00\n"]
        {
            assert_eq!(pressure(text), None, "{text:?}");
        }
        assert!(Cgroup::at("/nowhere").cpu_pressure().is_err());
    }
}
