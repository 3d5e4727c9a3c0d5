//! One instance per runtime directory.
//!
//! Makes the directory and takes the lock in it, or says who has it. The lock is the kernel's,
//! so that it is free as soon as its holder is dead, however it died. Its file says who that is
//! and who made the directory, so that the next instance can clean up after a killed one. Only
//! the monitor takes it; what else the directory holds is the distributor's.
#![forbid(unsafe_code)]

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _},
    os::unix::fs::{
        DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::FlockOperation;

/// Servers of any user may reach the sockets in it that are meant for them, and list nothing.
const MODE: u32 = 0o711;

/// The second line of the file, if an instance made the directory and not somebody else.
const MADE: &str = "made this directory";

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
            let path = directory.join("lock");
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
            let inode = file.metadata().context("read the lock's inode")?.ino();
            if !fs::metadata(&path).is_ok_and(|there| there.ino() == inode) {
                continue;
            }
            let directory_is_ours = made || written.lines().nth(1) == Some(MADE);
            let mut text = format!("{}\n", std::process::id());
            if directory_is_ours {
                text.push_str(MADE);
            }
            file.set_len(0)
                .and_then(|()| file.write_all_at(text.as_bytes(), 0))
                .with_context(|| format!("write {}", path.display()))?;
            return Ok(Self { directory: directory.to_owned(), directory_is_ours, _file: file });
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.directory.join("lock"));
        if self.directory_is_ours {
            // Fails if somebody put something else there, and so it should.
            let _ = fs::remove_dir(&self.directory);
        }
    }
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
    use std::{env, process};

    use super::*;

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
