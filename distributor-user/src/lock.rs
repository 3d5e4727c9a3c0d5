//! One monitor and one distributor per runtime directory.
//!
//! [`Lock`] is the monitor's. It makes the directory and takes the lock in it, or says who has
//! it. The lock is the kernel's, so that it is free as soon as its holder is dead, however it
//! died. Its file says who that is and who made the directory, so that the next instance can
//! clean up after a killed one. What else the directory holds is the distributor's to remove.
//!
//! [`DistributorLock`] is the distributor's. A monitor that is killed leaves one behind, which
//! exits by itself, unless it hangs or is stopped. The next one waits for it, and ends it if it
//! must: two that change the same maps would undo each other's work.
//!
//! Both are files, and whoever removes them removes the locks: [`remake`] makes the monitor's file
//! again. instance.rs has one more, on something that nobody can remove while servers run.
#![forbid(unsafe_code)]

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _},
    os::{
        fd::OwnedFd,
        unix::fs::{
            DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};
use rustix::{
    fs::FlockOperation,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tracing::warn;

/// Servers of any user may reach the sockets in it that are meant for them, and list nothing.
const MODE: u32 = 0o711;

/// The second line of the file, if an instance made the directory and not somebody else.
const MADE: &str = "made this directory";

/// The monitor's lock, in the runtime directory.
const MONITOR: &str = "lock";

/// The distributors' lock, in the runtime directory.
pub const DISTRIBUTOR: &str = "distributor";

/// How long a distributor without a monitor may take to exit by itself.
const LEAVING: Duration = Duration::from_secs(1);

/// How long one may take to be gone once it was killed.
const DYING: Duration = Duration::from_secs(10);

/// How often a lock that another process has is tried again.
const POLL: Duration = Duration::from_millis(3);

/// Held for as long as it lives; cleans up after itself.
#[derive(Debug)]
pub struct Lock {
    directory: PathBuf,
    directory_is_ours: bool,
    _file: File,
}

impl Lock {
    /// Takes the lock of a runtime directory, which is made if it is not there.
    pub fn take(directory: &Path) -> anyhow::Result<Self> {
        // An instance that exits removes the file, and maybe the directory, while it holds the
        // lock. Whoever had it open by then locks a file that is no longer there: once more.
        loop {
            let made = make(directory)?;
            let path = directory.join(MONITOR);
            let mut file = match File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(&path)
            {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.with_context(|| format!("open {}", path.display()))?,
            };
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            // Of whoever holds it, or held it and was killed.
            let mut written = String::new();
            let _ = file.read_to_string(&mut written);
            match locked {
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let holder = match written.lines().next() {
                        None => "its pid is not known yet".to_owned(),
                        Some(pid) => format!("pid {pid}"),
                    };
                    bail!(
                        "another dist-ctl runs on {} ({holder}): stop it with dist-ctl down, or \
                         choose another --runtime-dir",
                        directory.display()
                    );
                }
                locked => locked.with_context(|| format!("lock {}", path.display()))?,
            }
            if !is_still(&file, &path) {
                continue;
            }
            let directory_is_ours = made || written.lines().nth(1) == Some(MADE);
            sign(&file, std::process::id(), directory_is_ours)
                .with_context(|| format!("write {}", path.display()))?;
            return Ok(Self { directory: directory.to_owned(), directory_is_ours, _file: file });
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Its holder is gone by now: it is a child of ours. Unless the lock file was removed under another
        // instance, whose distributor then has it.
        let distributor = self.directory.join(DISTRIBUTOR);
        if File::open(&distributor).is_ok_and(|file| locked_by(&file).is_ok_and(|holder| holder.is_none())) {
            let _ = fs::remove_file(distributor);
        }
        let lock = self.directory.join(MONITOR);
        let is_ours = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.path() == lock);
        let nothing_else = fs::read_dir(&self.directory).is_ok_and(|mut entries| entries.all(is_ours));
        // While what an earlier instance left is still there, the next one has to know who made
        // the directory.
        if self.directory_is_ours && !nothing_else {
            return;
        }
        let _ = fs::remove_file(&lock);
        if self.directory_is_ours {
            let _ = fs::remove_dir(&self.directory);
        }
    }
}

/// Makes the runtime directory and the monitor's file in it again, if somebody has removed them.
/// The descriptor has the lock, and is for the monitor to hold. `None`: the file is there.
pub fn remake(directory: &Path, monitor: u32) -> anyhow::Result<Option<OwnedFd>> {
    let path = directory.join(MONITOR);
    // Seen without a descriptor, of which there may be none.
    if path.exists() {
        return Ok(None);
    }
    make(directory)?;
    let made = File::options().write(true).create_new(true).mode(0o644).open(&path);
    let file = match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        made => made.with_context(|| format!("create {}", path.display()))?,
    };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("lock {}", path.display()))?;
    sign(&file, monitor, true).with_context(|| format!("write {}", path.display()))?;
    Ok(Some(file.into()))
}

/// Says in the monitor's file who that is.
fn sign(file: &File, monitor: u32, directory_is_ours: bool) -> io::Result<()> {
    let mut text = format!("{monitor}\n");
    if directory_is_ours {
        text.push_str(MADE);
    }
    // In this order: on a full disk there still is room for what is replaced.
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// Held for as long as the process lives. The monitor removes its file, with its own.
///
/// A POSIX record lock: the kernel says whose it is, and a child never has it. It would be lost
/// if anything else in this process opened the file and closed it.
#[derive(Debug)]
pub struct DistributorLock {
    _file: File,
}

impl DistributorLock {
    /// Takes the lock. Whoever has it is given a second to exit, and is then killed.
    ///
    /// # Errors
    /// The file cannot be made or locked; or its holder does not die, or cannot be seen.
    pub fn take(runtime_dir: &Path) -> anyhow::Result<Self> {
        let path = runtime_dir.join(DISTRIBUTOR);
        let shown = path.display();
        let kill_at = Instant::now() + LEAVING;
        let give_up_at = kill_at + DYING;
        let mut killed = false;
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .with_context(|| format!("open {shown}"))?;
            let holder = loop {
                match fcntl(&file, FcntlArg::F_SETLK(&whole_file())) {
                    Ok(_) => break None,
                    Err(Errno::EACCES | Errno::EAGAIN) => {}
                    Err(error) => return Err(error).with_context(|| format!("lock {shown}")),
                }
                if Instant::now() >= if killed { give_up_at } else { kill_at } {
                    break Some(holder(&file).with_context(|| format!("ask who has locked {shown}"))?);
                }
                thread::sleep(POLL);
            };
            match holder {
                // Whoever had it may have removed the file, and then it locks nothing.
                None if is_still(&file, &path) => return Ok(Self { _file: file }),
                None | Some(Holder::Gone) => {}
                Some(Holder::Process { pid, pidfd }) if !killed => {
                    killed = true;
                    warn!(
                        "an earlier distributor (pid {pid}) is still there and does not exit: it is killed, and \
                         this one takes over"
                    );
                    pidfd_send_signal(pidfd, Signal::KILL)
                        .with_context(|| format!("kill the earlier distributor (pid {pid})"))?;
                }
                Some(Holder::Process { pid, .. }) => bail!(
                    "an earlier distributor (pid {pid}) has locked {shown}, and does not die though it was \
                     killed {} s ago: see what holds it (state D), then run this again",
                    DYING.as_secs()
                ),
                Some(Holder::Elsewhere) => bail!(
                    "a process that cannot be seen from here has locked {shown}: it may be a dist-ctl in \
                     another pid namespace: stop it there, or choose another --runtime-dir"
                ),
            }
        }
    }
}

/// Who has a record lock.
enum Holder {
    Process {
        pid: Pid,
        pidfd: OwnedFd,
    },
    /// In no pid namespace of ours.
    Elsewhere,
    Gone,
}

fn holder(file: &File) -> io::Result<Holder> {
    let Some(raw) = locked_by(file)? else {
        return Ok(Holder::Gone);
    };
    let Some(pid) = Pid::from_raw(raw) else {
        return Ok(Holder::Elsewhere);
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(Holder::Gone);
    };
    // The pid may have become another process's before the descriptor was opened. It has not
    // if it still has the lock.
    match locked_by(file)? == Some(raw) {
        true => Ok(Holder::Process { pid, pidfd }),
        false => Ok(Holder::Gone),
    }
}

/// The pid of who else has the lock: 0 or less if that has none here.
fn locked_by(file: &File) -> io::Result<Option<i32>> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    let is_free = i32::from(lock.l_type) == libc::F_UNLCK;
    Ok((!is_free).then_some(lock.l_pid))
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// True if this open file is the one that is there under its name.
pub fn is_still(file: &File, path: &Path) -> bool {
    let inode = file.metadata().map(|file| (file.dev(), file.ino())).ok();
    inode.is_some() && fs::metadata(path).map(|there| (there.dev(), there.ino())).ok() == inode
}

/// True if the directory was not there before.
fn make(directory: &Path) -> anyhow::Result<bool> {
    let shown = directory.display();
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("create runtime directory {shown}: create {}", parent.display()))?;
    }
    match DirBuilder::new().mode(MODE).create(directory) {
        Ok(()) => {
            // The umask may have taken some of it away.
            let mode = fs::Permissions::from_mode(MODE);
            fs::set_permissions(directory, mode)
                .with_context(|| format!("set the mode of runtime directory {shown}"))?;
            return Ok(true);
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("create runtime directory {shown}"));
        }
    }
    let there = fs::metadata(directory).with_context(|| format!("read runtime directory {shown}"))?;
    ensure!(there.is_dir(), "runtime directory {shown}: it is not a directory");
    // Whoever can write there can put sockets and locks of their own in our place.
    let (owner, me) = (there.uid(), rustix::process::geteuid().as_raw());
    ensure!(
        owner == me,
        "runtime directory {shown}: it belongs to uid {owner}, and dist-ctl runs as {me}: choose \
         another --runtime-dir"
    );
    let mode = there.mode() & 0o7777;
    ensure!(
        mode & 0o022 == 0,
        "runtime directory {shown}: others may write to it (mode {mode:o}): make it 711, or \
         choose another --runtime-dir"
    );
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        io::{BufRead as _, BufReader, Write as _},
        os::unix::process::ExitStatusExt as _,
        process::{self, Child, Command, Stdio},
    };

    use super::*;

    const DIRECTORY: &str = "DIST_CTL_TEST_LOCK_DIRECTORY";

    #[test]
    #[ignore = "a process that the other tests start"]
    fn holder_process() {
        let Some(directory) = env::var_os(DIRECTORY) else { return };
        let directory = Path::new(&directory);
        let _lock = DistributorLock::take(directory).unwrap();
        let held = fs::OpenOptions::new().create_new(true).write(true).open(directory.join("held"));
        // Into the pipe itself: the harness captures what is printed.
        let say = |word: &str| io::stderr().write_all(format!("{word}\n").as_bytes()).unwrap();
        say(if held.is_ok() { "held" } else { "two at once" });
        let mut order = String::new();
        io::stdin().read_line(&mut order).unwrap();
        fs::remove_file(directory.join("held")).unwrap();
        if order == "remove\n" {
            fs::remove_file(directory.join(DISTRIBUTOR)).unwrap();
        }
        process::exit(0)
    }

    /// Another process that takes the lock.
    struct Other {
        process: Child,
        says: BufReader<process::ChildStderr>,
    }

    impl Other {
        fn start(directory: &Path) -> Self {
            let mut process = Command::new("/proc/self/exe")
                .args(["--exact", "lock::tests::holder_process", "--ignored", "--nocapture"])
                .env(DIRECTORY, directory)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let says = BufReader::new(process.stderr.take().unwrap());
            Self { process, says }
        }

        fn holding(directory: &Path) -> Self {
            let mut other = Self::start(directory);
            other.expect("held");
            other
        }

        fn expect(&mut self, word: &str) {
            let mut lines = self.says.by_ref().lines().map(Result::unwrap);
            assert!(lines.any(|line| line == word), "it ended before it said {word}");
        }

        fn order(&mut self, order: &str) {
            self.process.stdin.take().unwrap().write_all(order.as_bytes()).unwrap();
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    #[test]
    fn a_distributor_that_exits_by_itself_is_waited_for() {
        let directory = place("leaves");
        fs::create_dir(&directory).unwrap();
        let mut first = Other::holding(&directory);
        let mut next = Other::start(&directory);
        // It can only be that it waits or that it has not come so far: both are right.
        thread::sleep(Duration::from_millis(200));
        first.order("leave\n");
        next.expect("held");
        assert_eq!(first.process.wait().unwrap().code(), Some(0), "it was not killed");
        drop(next);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_distributor_that_hangs_or_is_stopped_is_killed_after_a_second() {
        for stopped in [false, true] {
            let directory = place(&format!("hangs-{stopped}"));
            fs::create_dir(&directory).unwrap();
            let mut first = Other::holding(&directory);
            // What a killed one leaves.
            fs::remove_file(directory.join("held")).unwrap();
            if stopped {
                rustix::process::kill_process(Pid::from_child(&first.process), Signal::STOP).unwrap();
            }
            let started = Instant::now();
            let mut next = Other::start(&directory);
            next.expect("held");
            assert!(started.elapsed() >= LEAVING, "it may take its time to exit");
            assert_eq!(first.process.wait().unwrap().signal(), Some(9));
            drop(next);
            fs::remove_dir_all(&directory).unwrap();
        }
    }

    #[test]
    fn the_lock_of_a_killed_distributor_is_free_at_once() {
        let directory = place("free");
        fs::create_dir(&directory).unwrap();
        drop(Other::holding(&directory));
        let started = Instant::now();
        DistributorLock::take(&directory).unwrap();
        assert!(started.elapsed() < LEAVING, "{:?}", started.elapsed());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_lock_whose_file_its_holder_removed_is_taken_in_the_new_file() {
        let directory = place("removed");
        fs::create_dir(&directory).unwrap();
        let mut first = Other::holding(&directory);
        let mut waiting = [Other::start(&directory), Other::start(&directory)];
        thread::sleep(Duration::from_millis(200));
        first.order("remove\n");
        // One of them has it then, and the other one only when that has left. "two at once"
        // would end the wait for "held".
        waiting.iter_mut().for_each(|other| other.order("leave\n"));
        waiting.iter_mut().for_each(|other| other.expect("held"));
        assert!(directory.join(DISTRIBUTOR).exists());
        drop((first, waiting));
        fs::remove_dir_all(&directory).unwrap();
    }

    fn place(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("dist-ctl-test-{name}-{}", process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_second_instance_is_told_who_has_the_lock() {
        let directory = place("second");
        let lock = Lock::take(&directory).unwrap();
        let refusal = Lock::take(&directory).unwrap_err().to_string();
        assert_eq!(
            refusal,
            format!(
                "another dist-ctl runs on {} (pid {}): stop it with dist-ctl down, or choose \
                 another --runtime-dir",
                directory.display(),
                process::id()
            )
        );
        drop(lock);
        Lock::take(&directory).unwrap();
    }

    #[test]
    fn the_directory_can_be_passed_through_and_goes_with_the_lock() {
        let directory = place("goes");
        let lock = Lock::take(&directory).unwrap();
        let mode = fs::metadata(&directory).unwrap().mode() & 0o7777;
        assert_eq!(mode, 0o711, "mode {mode:o}");
        drop(lock);
        assert!(!directory.exists());
    }

    #[test]
    fn a_directory_of_a_killed_instance_goes_with_the_next_one() {
        let directory = place("killed");
        // Killed: nothing is dropped, and the kernel takes the lock.
        let killed = std::mem::ManuallyDrop::new(Lock::take(&directory).unwrap());
        rustix::fs::flock(&killed._file, FlockOperation::Unlock).unwrap();
        drop(Lock::take(&directory).unwrap());
        assert!(!directory.exists());
    }

    #[test]
    fn a_directory_that_was_there_stays() {
        let directory = place("stays");
        DirBuilder::new().mode(0o755).create(&directory).unwrap();
        drop(Lock::take(&directory).unwrap());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let directory = place("open");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777)).unwrap();
        let refusal = Lock::take(&directory).unwrap_err().to_string();
        fs::remove_dir(&directory).unwrap();
        assert_eq!(
            refusal,
            format!(
                "runtime directory {}: others may write to it (mode 1777): make it 711, or \
                 choose another --runtime-dir",
                directory.display()
            )
        );
    }

    #[test]
    fn a_file_in_its_place_is_refused() {
        let path = place("file");
        fs::write(&path, "").unwrap();
        let refusal = Lock::take(&path).unwrap_err().to_string();
        fs::remove_file(&path).unwrap();
        assert_eq!(refusal, format!("runtime directory {}: it is not a directory", path.display()));
    }
}
