//! What an instance is doing, on disk: what the next `dist-ctl up` finds if everything was killed.
//!
//! One file in the runtime directory, replaced as a whole, so that whoever reads it finds the
//! old or the new one. It says nothing that the configuration says. A record of another boot is
//! of processes that are gone; one that cannot be read is as good as none, and then the cgroups
//! tell what runs.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::{
    roll::Roll,
    service::{Adopted, Drift, Label, Role},
};

/// The file's name in the runtime directory.
pub const FILE: &str = "record.json";

/// What the file holds. Raised when a field changes its meaning; a file with another one is not
/// read.
const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// The boot that it is of (/proc/sys/kernel/random/boot_id).
    boot: String,
    pub services: Vec<Service>,
    /// A server that is being adopted: if nobody lives to finish that, the next distributor does.
    #[serde(default)]
    pub adopting: Option<Adopting>,
}

/// An adoption that has begun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adopting {
    pub service: String,
    /// The service had not begun.
    pub is_vacant: bool,
    pub server: Adopted,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    /// The uid of its sockets.
    pub uid: u32,
    pub servers: Vec<Server>,
    /// Servers that were adopted and released.
    #[serde(default)]
    pub released: Vec<Adopted>,
    /// What came of comparing its counts with its sockets.
    #[serde(default)]
    pub drift: Drift,
    /// A restart of its servers, under way or over.
    #[serde(default)]
    pub roll: Option<Roll>,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    pub label: Label,
    /// When its main process started: `field 22 of proc_pid_stat(5)`, which with the pid is never
    /// that of another process.
    pub start_time: Option<u64>,
}

impl Service {
    /// How many of its servers have numbers for names.
    pub fn numbered(&self) -> usize {
        let is_numbered = |label: &Label| {
            let number = label.server.rsplit_once('/').map(|(_, name)| name.parse::<usize>());
            label.role == Role::Current && label.extra.is_none() && matches!(number, Some(Ok(_)))
        };
        self.servers.iter().filter(|server| is_numbered(&server.label)).count()
    }
}

impl Record {
    pub fn new(services: Vec<Service>, adopting: Option<Adopting>) -> anyhow::Result<Self> {
        Ok(Self { format: FORMAT, boot: boot()?, services, adopting })
    }

    /// The record in a runtime directory. `None` if there is none of this boot.
    ///
    /// # Errors
    /// It is there and cannot be read, and why.
    pub fn read(runtime_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = runtime_dir.join(FILE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        Self::understand(&text).with_context(|| format!("understand {}", path.display()))
    }

    /// What a file holds. `None`: what was on another boot.
    pub(crate) fn understand(text: &[u8]) -> anyhow::Result<Option<Self>> {
        let record: Self = serde_json::from_slice(text)?;
        ensure!(record.format == FORMAT, "its format {} is not ours", record.format);
        Ok(Some(record).filter(|record| boot().is_ok_and(|boot| boot == record.boot)))
    }
}

impl Service {
    /// Servers that somebody else started, and that are to get their address back in the end.
    pub fn guests(&self) -> impl Iterator<Item = &Adopted> {
        let adopted = self.servers.iter().filter_map(|server| server.label.adopted.as_ref());
        adopted.chain(&self.released)
    }
}

/// Where the record is written, and what it holds.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    written: Vec<u8>,
}

impl Recorder {
    pub fn new(runtime_dir: &Path) -> Self {
        Self { path: runtime_dir.join(FILE), written: Vec::new() }
    }

    /// The file is this one's.
    pub fn has_written(&self) -> bool {
        !self.written.is_empty()
    }

    /// Replaces the file, unless it says the same already.
    pub fn write(&mut self, record: &Record) -> anyhow::Result<()> {
        let text = serde_json::to_vec(record)?;
        if text == self.written {
            return Ok(());
        }
        let written = replace(&self.path, &text);
        written.with_context(|| format!("write {}", self.path.display()))?;
        self.written = text;
        Ok(())
    }
}

/// Removes the record of a runtime directory.
pub fn remove(runtime_dir: &Path) -> io::Result<()> {
    let path = runtime_dir.join(FILE);
    let _ = fs::remove_file(beside(&path));
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Writes a file beside the one that is there, and puts it in its place.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = beside(path);
    let mut file = fs::File::create(&new)?;
    let written = file.write_all(text).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // Half of it is of no use, and takes room where there is none.
        let _ = fs::remove_file(&new);
    }
    written
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Read once, because there may be no descriptor for it later.
fn boot() -> anyhow::Result<String> {
    static BOOT: OnceLock<String> = OnceLock::new();
    if let Some(boot) = BOOT.get() {
        return Ok(boot.clone());
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot's number")?;
    Ok(BOOT.get_or_init(|| text.trim().to_owned()).clone())
}

/// When a process started, in clock ticks since the boot. `None` if there is no such process.
pub fn start_time(pid: u32) -> Option<u64> {
    stat(pid, 22)
}

/// Who started it.
pub fn parent(pid: u32) -> Option<u64> {
    stat(pid, 4)
}

/// A number of proc_pid_stat(5), by its place there.
fn stat(pid: u32, field: usize) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything; the state, field 3, follows it.
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(')')?.1.split_whitespace().nth(field - 3)?.parse().ok()
}

/// The process that has this number now, by which it can be watched, and when it started. `None`:
/// there is none.
pub fn process(pid: u32) -> Option<(OwnedFd, u64)> {
    let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let pidfd = pidfd_open(number, PidfdFlags::empty()).ok()?;
    // After it was opened: whoever had the number then has it as long as he lives.
    Some((pidfd, start_time(pid)?))
}

/// The same, if it is the one that started then. `None`: that one is gone.
pub fn process_since(pid: u32, start_time: u64) -> Option<OwnedFd> {
    process(pid).filter(|(_, its)| *its == start_time).map(|(pidfd, _)| pidfd)
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    fn place(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("dist-ctl-record-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    fn record() -> Record {
        let services = vec![Service {
            name: "shop".into(),
            uid: 7,
            servers: vec![],
            released: vec![],
            drift: Drift::default(),
            roll: None,
        }];
        Record::new(services, None).unwrap()
    }

    #[test]
    fn what_was_written_is_read() {
        let place = place("written");
        assert_eq!(Record::read(&place).unwrap(), None);
        Recorder::new(&place).write(&record()).unwrap();
        assert_eq!(Record::read(&place).unwrap(), Some(record()));
        remove(&place).unwrap();
        assert_eq!(Record::read(&place).unwrap(), None);
        fs::remove_dir(&place).unwrap();
    }

    #[test]
    fn a_record_of_another_boot_is_none() {
        let place = place("boot");
        Recorder::new(&place).write(&Record { boot: "another".into(), ..record() }).unwrap();
        assert_eq!(Record::read(&place).unwrap(), None);
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn half_a_record_and_one_of_another_format_are_told() {
        let place = place("half");
        let text = serde_json::to_vec(&record()).unwrap();
        for cut in [0, 1, text.len() / 2, text.len() - 1] {
            fs::write(place.join(FILE), &text[..cut]).unwrap();
            let told = format!("{:#}", Record::read(&place).unwrap_err());
            assert!(told.contains("understand"), "{told}");
        }
        Recorder::new(&place).write(&Record { format: 99, ..record() }).unwrap();
        assert!(format!("{:#}", Record::read(&place).unwrap_err()).contains("format 99"));
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn a_disk_that_takes_nothing_leaves_what_was_there() {
        let place = place("disk");
        let mut recorder = Recorder::new(&place);
        recorder.write(&record()).unwrap();
        // What stands where the new one is written, and is no file.
        fs::create_dir(place.join("record.new")).unwrap();
        let other = Record { services: vec![], ..record() };
        assert!(recorder.write(&other).unwrap_err().to_string().contains("record.json"));
        assert_eq!(Record::read(&place).unwrap(), Some(record()));
        fs::remove_dir(place.join("record.new")).unwrap();
        recorder.write(&other).unwrap();
        assert_eq!(Record::read(&place).unwrap(), Some(other));
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let me = std::process::id();
        let started = start_time(me).unwrap();
        assert_eq!(process(me).map(|(_, its)| its), Some(started));
        assert!(process_since(me, started).is_some());
        assert!(process_since(me, started + 1).is_none(), "the number was used again");
        assert!(process_since(0x7fff_fff0, started).is_none());
    }
}
