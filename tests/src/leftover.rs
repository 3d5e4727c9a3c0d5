//! What a run may have left on the machine, and how to take it away.
//!
//! Everything of an instance is named after its runtime directory, and everything of a host
//! stands in a directory that is named after the test's process. So a test can tell whether
//! its instance left something, and the next run finds what a killed test could not remove.

#![forbid(unsafe_code)]

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::mount::{UnmountFlags, unmount};

use crate::{
    process::{self, Process},
    wait::wait_for,
};

/// Where the directories of all hosts stand.
const PARENT: &str = "/run";

/// What their names begin with.
const PREFIX: &str = "dist-ctl-test-";

/// The file in a host's directory that lists the processes it started.
const PROCESSES: &str = "processes";

/// Something that should not be there any more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    Process { process: Process, command: String },
    Cgroup(PathBuf),
    Pins(PathBuf),
    Mount(PathBuf),
    File(PathBuf),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { process, command } => write!(f, "process {} ({command})", process.pid),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Pins(path) => write!(f, "pinned objects {}", path.display()),
            Self::Mount(path) => write!(f, "mount {}", path.display()),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// The path of a new host's directory, which is not made yet.
pub fn directory(number: u32) -> PathBuf {
    let Process { pid, started } = Process::own();
    Path::new(PARENT).join(format!("{PREFIX}{pid}-{started}-{number}"))
}

/// Notes that a host started a process, in case the test does not live to end it.
pub fn note(directory: &Path, process: Process) -> io::Result<()> {
    use io::Write as _;
    let mut file = fs::File::options().append(true).create(true).open(directory.join(PROCESSES))?;
    writeln!(file, "{} {}", process.pid, process.started)
}

/// What is left of the instance of a runtime directory.
pub fn of_instance(runtime: &Path) -> Vec<Leftover> {
    let mut found = Vec::new();
    let name = instance_name(runtime);
    if let Some(mount) = cgroup_mount() {
        let cgroup = mount.join(&name);
        if cgroup.exists() {
            found.extend(process::in_cgroup(&cgroup).into_iter().map(of_process));
            found.push(Leftover::Cgroup(cgroup));
        }
    }
    found.extend(pins(runtime).map(Leftover::Pins));
    found.extend(
        mounts().filter(|(_, path)| path.starts_with(runtime)).map(|(_, path)| Leftover::Mount(path)),
    );
    if runtime.exists() {
        found.push(Leftover::File(runtime.to_owned()));
    }
    found
}

/// The processes that still live in a network namespace, other than this one.
pub fn in_network(inode: u64) -> Vec<Leftover> {
    process::all()
        .filter(|process| *process != Process::own() && process.runs() && process.is_in_network(inode))
        .map(of_process)
        .collect()
}

/// Takes it away, as well as that is possible.
pub fn remove(leftovers: &[Leftover]) {
    for leftover in leftovers {
        if let Leftover::Process { process, .. } = leftover {
            process.kill(Duration::from_secs(5));
        }
    }
    for leftover in leftovers {
        let removed = match leftover {
            Leftover::Process { .. } => Ok(()),
            Leftover::Cgroup(path) => remove_cgroup(path),
            Leftover::Pins(path) => fs::remove_dir_all(path),
            Leftover::Mount(path) => unmount(path, UnmountFlags::DETACH).map_err(Into::into),
            Leftover::File(path) if path.is_dir() => fs::remove_dir_all(path),
            Leftover::File(path) => fs::remove_file(path),
        };
        if let Err(error) = removed {
            eprintln!("could not remove {leftover}: {error}");
        }
    }
}

/// Removes what tests left behind that were killed and so could not do it themselves.
pub fn clean_after_killed_tests() {
    for entry in fs::read_dir(PARENT).into_iter().flatten().flatten() {
        let directory = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(test) = name.strip_prefix(PREFIX).and_then(owner) else {
            continue;
        };
        if test.exists() {
            continue;
        }
        eprintln!("removing what a killed test left in {}", directory.display());
        let noted = fs::read_to_string(directory.join(PROCESSES)).unwrap_or_default();
        let processes =
            noted.lines().filter_map(|line| parse_process(line, ' ')).filter(|noted| noted.exists());
        let mut leftovers: Vec<Leftover> = processes.map(of_process).collect();
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            leftovers.extend(of_instance(&entry.path()));
        }
        leftovers.push(Leftover::File(directory));
        remove(&leftovers);
    }
}

/// Where cgroup v2 is mounted.
pub fn cgroup_mount() -> Option<PathBuf> {
    mounts_of("cgroup2").next()
}

/// Where the calling thread's mount namespace has it.
pub fn cgroup_mount_of_thread() -> Option<PathBuf> {
    mounts_in("/proc/thread-self/mountinfo").find(|(kind, _)| kind == "cgroup2").map(|(_, path)| path)
}

/// Whether there is a bpffs where most machines have one, so that dist-ctl mounts none.
pub fn has_bpffs() -> bool {
    mounts_of("bpf").any(|mount| mount == Path::new("/sys/fs/bpf"))
}

/// The directory of an instance's pins.
pub fn pins(runtime: &Path) -> Option<PathBuf> {
    let name = instance_name(runtime);
    mounts_of("bpf").map(|mount| mount.join(&name)).find(|pins| pins.exists())
}

/// The cgroup of an instance.
pub fn cgroup(runtime: &Path) -> PathBuf {
    cgroup_mount().expect("cgroup v2 is mounted").join(instance_name(runtime))
}

/// What an instance's cgroup and pins are called: after its directory, with every byte but
/// letters, digits and `_` escaped, so that no two are called the same.
pub fn instance_name(runtime: &Path) -> String {
    let mut name = "dist-ctl".to_owned();
    for byte in runtime.to_string_lossy().bytes() {
        match byte {
            b'/' => name.push('-'),
            b'_' => name.push('_'),
            byte if byte.is_ascii_alphanumeric() => name.push(byte.into()),
            byte => name.push_str(&format!("={byte:02x}")),
        }
    }
    name
}

fn of_process(process: Process) -> Leftover {
    Leftover::Process { process, command: process.arguments().join(" ") }
}

fn owner(name: &str) -> Option<Process> {
    parse_process(name.rsplit_once('-')?.0, '-')
}

fn parse_process(text: &str, separator: char) -> Option<Process> {
    let (pid, started) = text.split_once(separator)?;
    Some(Process { pid: pid.parse().ok()?, started: started.parse().ok()? })
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    // Busy until the kernel has reaped its killed processes.
    wait_for(&format!("cgroup {} to be empty", path.display()), Duration::from_secs(5), || {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => None,
            other => Some(other),
        }
    })
}

fn mounts_of(kind: &str) -> impl Iterator<Item = PathBuf> {
    mounts().filter(move |(its_kind, _)| its_kind == kind).map(|(_, path)| path)
}

/// The kind and the place of every mount.
fn mounts() -> impl Iterator<Item = (String, PathBuf)> {
    mounts_in("/proc/self/mountinfo")
}

fn mounts_in(file: &str) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let text = fs::read_to_string(file).expect("read the mounts");
    let mounts: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let place = before.split(' ').nth(4)?;
            let kind = after.split(' ').next()?;
            Some((kind.to_owned(), PathBuf::from(place)))
        })
        .collect();
    mounts.into_iter()
}
