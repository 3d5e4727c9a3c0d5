//! An initramfs: a file that the kernel unpacks into the root of its file system.
//!
//! The format is "newc", as Documentation/driver-api/early-userspace/buffer-format.rst in the
//! kernel describes it. Written here because a machine need not have cpio.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Component, Path},
};

use anyhow::{Context as _, Result, ensure};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The device of /dev/console: major and minor number.
const CONSOLE: (u32, u32) = (5, 1);

/// Grows by what is added to it. Paths are those that the guest will see.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<Vec<u8>>,
    entries: u32,
}

impl Archive {
    /// With the console, without which PID 1 could say nothing.
    pub(crate) fn new() -> Result<Self> {
        let mut archive = Self { bytes: Vec::new(), directories: BTreeSet::new(), entries: 0 };
        archive.parents(Path::new("/dev/console"))?;
        archive.entry(b"dev/console", CHARACTER_DEVICE | 0o600, CONSOLE, b"")?;
        Ok(archive)
    }

    pub(crate) fn directory(&mut self, path: &Path) -> Result<()> {
        self.parents(&path.join("below"))
    }

    pub(crate) fn link(&mut self, path: &Path, target: &Path) -> Result<()> {
        self.parents(path)?;
        self.entry(name(path)?, LINK | 0o777, (0, 0), target.as_os_str().as_bytes())
    }

    pub(crate) fn text(&mut self, path: &Path, text: &str) -> Result<()> {
        self.bytes(path, 0o644, text.as_bytes())
    }

    pub(crate) fn bytes(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(name(path)?, FILE | mode, (0, 0), bytes)
    }

    /// A file of this machine, with its rights.
    pub(crate) fn copy(&mut self, path: &Path, of: &Path) -> Result<()> {
        let read = || -> Result<_> { Ok((fs::metadata(of)?.permissions().mode() & 0o777, fs::read(of)?)) };
        let (mode, bytes) = read().with_context(|| format!("read {}", of.display()))?;
        self.bytes(path, mode, &bytes)
    }

    /// A directory of this machine with all that is in it; links stay links.
    pub(crate) fn copy_tree(&mut self, path: &Path, of: &Path) -> Result<()> {
        self.directory(path)?;
        for entry in fs::read_dir(of).with_context(|| format!("read {}", of.display()))? {
            let entry = entry.with_context(|| format!("read {}", of.display()))?;
            let (path, of) = (path.join(entry.file_name()), entry.path());
            let kind = entry.file_type().with_context(|| format!("look at {}", of.display()))?;
            if kind.is_symlink() {
                self.link(&path, &fs::read_link(&of).with_context(|| format!("read {}", of.display()))?)?;
            } else if kind.is_dir() {
                self.copy_tree(&path, &of)?;
            } else if kind.is_file() {
                self.copy(&path, &of)?;
            }
        }
        Ok(())
    }

    /// The archive's bytes. Several archives in one file are unpacked one after the other.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry(b"TRAILER!!!", 0, (0, 0), b"")?;
        Ok(self.bytes)
    }

    /// The kernel makes no directory by itself.
    fn parents(&mut self, path: &Path) -> Result<()> {
        let Some(parent) = path.parent().filter(|parent| *parent != Path::new("/")) else {
            return Ok(());
        };
        let name = name(parent)?.to_vec();
        if self.directories.contains(&name) {
            return Ok(());
        }
        self.parents(parent)?;
        self.entry(&name, DIRECTORY | 0o755, (0, 0), b"")?;
        self.directories.insert(name);
        Ok(())
    }

    fn entry(&mut self, name: &[u8], mode: u32, (major, minor): (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of an initramfs is below 4 GiB")?;
        let name_size = u32::try_from(name.len() + 1).context("a name is short")?;
        self.bytes.extend_from_slice(b"070701");
        // Inode, mode, owner, group, links, time, size, device, device of a device, name, checksum.
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A path as the archive has it: from the root, without the slash.
fn name(path: &Path) -> Result<&[u8]> {
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    ensure!(plain && path.is_absolute(), "{} is no plain absolute path", path.display());
    Ok(path.strip_prefix("/").map(Path::as_os_str).map(OsStr::as_bytes).expect("it is absolute"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_directory_once_and_before_its_files() {
        let mut archive = Archive::new().expect("a constant");
        archive.text(Path::new("/etc/a/one"), "1").expect("a plain path");
        archive.text(Path::new("/etc/a/two"), "22").expect("a plain path");
        let bytes = archive.finish().expect("small");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).expect("only text was put in");
        let entries: Vec<_> = text
            .split("070701")
            .skip(1)
            .map(|entry| {
                let name = entry[104..].split('\0').next().expect("names end");
                (name, u32::from_str_radix(&entry[48..56], 16).expect("a size"))
            })
            .collect();
        let expected = [
            ("dev", 0),
            ("dev/console", 0),
            ("etc", 0),
            ("etc/a", 0),
            ("etc/a/one", 1),
            ("etc/a/two", 2),
            ("TRAILER!!!", 0),
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let mut archive = Archive::new().expect("a constant");
        assert!(archive.text(Path::new("/etc/../root"), "").is_err());
        assert!(archive.text(Path::new("etc"), "").is_err());
    }
}
