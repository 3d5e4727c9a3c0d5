//! What is pinned, and where: the one directory of a service's kernel objects.
//!
//! Each version of the contract has a directory of its own, `<service>-v<version>`. In it are the
//! maps by their names, the links (`track_link`), and the programs by their names and the stamp
//! of the object they come from (`track-0123456789abcdef`). Nothing here decides what belongs
//! there; it names, opens, holds and compares.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use aya::maps::MapInfo;

use super::syscall;

/// Maps that outlive a distributor. TAG is among them: its entries live in the sockets.
pub(super) const MAPS: [&str; 20] = [
    "PLAN",
    "ACTIVE",
    "HASH",
    "LOAD",
    "SOCKETS",
    "HOME",
    "OWNERS",
    "PARKED",
    "ROOMS",
    "STATES",
    "SOURCES",
    "ATTENDANT",
    "BELLS",
    "DIRECTED",
    "ADDRESSES",
    "PORTS",
    "OUTCOMES",
    "TAG",
    "EVENTS",
    "WAKES",
];

/// What makes two maps the same kind of map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// An `enum bpf_map_type`.
    pub(super) kind: u32,
    pub(super) key: u32,
    pub(super) value: u32,
    pub(super) entries: u32,
    pub(super) flags: u32,
}

/// The name of a service's directory with pins of this version.
pub(super) fn directory(service: &str, version: u32) -> String {
    format!("{service}-v{version}")
}

/// The versions of the contract of which a service has pins, besides the one whose directory this
/// is.
pub(super) fn other_versions(pins: &Path) -> anyhow::Result<Vec<(u32, PathBuf)>> {
    let (root, service, version) = parts(pins)?;
    let mut found = Vec::new();
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries.with_context(|| format!("look for pins in {}", root.display()))?,
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let other =
            name.to_str().and_then(|name| name.strip_prefix(service)?.strip_prefix("-v")?.parse().ok());
        found.extend(other.filter(|&other| other != version).map(|other| (other, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// Where they all are, whose they are, and of which version.
fn parts(pins: &Path) -> anyhow::Result<(&Path, &str, u32)> {
    let root = pins.parent().context("pins lie below the instance's directory")?;
    let name = pins.file_name().and_then(|name| name.to_str()).context("pins have a name")?;
    let (service, version) = name.rsplit_once("-v").context("the name of pins tells their version")?;
    Ok((root, service, version.parse().context("a version is a number")?))
}

/// Makes the directory.
pub(super) fn create(pins: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(pins);
    made.with_context(|| format!("create {} for the pins", pins.display()))
}

/// Removes a directory and every pin in it, the one named `last` after all others.
pub(super) fn remove(pins: &Path, last: Option<&str>) -> anyhow::Result<()> {
    let mut paths: Vec<PathBuf> = list(pins)?;
    paths.sort_by_key(|path| path.file_name().and_then(|name| name.to_str()) == last);
    for path in paths {
        remove_pin(&path)?;
    }
    match fs::remove_dir(pins) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", pins.display()))
        }
        _ => Ok(()),
    }
}

/// Removes one pin, if it is there.
pub(super) fn remove_pin(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Every pin in a directory; none if there is no such directory.
pub(super) fn list(pins: &Path) -> anyhow::Result<Vec<PathBuf>> {
    match fs::read_dir(pins) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => {
            let entries = entries.with_context(|| format!("list {}", pins.display()))?;
            Ok(entries.flatten().map(|entry| entry.path()).collect())
        }
    }
}

/// The shape of a pinned map, and its id; `None` if there is no such pin.
pub(super) fn map(pin: &Path) -> anyhow::Result<Option<(Shape, u32)>> {
    if !pin.exists() {
        return Ok(None);
    }
    let info = MapInfo::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    let shape = Shape {
        kind: info.map_type()? as u32,
        key: info.key_size(),
        value: info.value_size(),
        entries: info.max_entries(),
        flags: info.map_flags(),
    };
    Ok(Some((shape, info.id())))
}

/// Everything that is pinned for a service, held open: it lives on if the pins vanish, and they
/// can be made again.
pub(super) struct Held {
    directory: PathBuf,
    objects: Vec<(PathBuf, OwnedFd)>,
}

impl Held {
    /// Opens all there is.
    pub(super) fn open(pins: &Path) -> anyhow::Result<Self> {
        let mut objects = Vec::new();
        for path in list(pins)? {
            let fd = syscall::open_pin(&path).with_context(|| format!("open {}", path.display()))?;
            objects.push((path, fd));
        }
        Ok(Self { directory: pins.to_owned(), objects })
    }

    /// Makes the pins again that are gone. How many that were.
    pub(super) fn restore(&self) -> anyhow::Result<usize> {
        let gone: Vec<_> = self.objects.iter().filter(|(path, _)| !path.exists()).collect();
        if !gone.is_empty() {
            create(&self.directory)?;
        }
        for (path, fd) in &gone {
            match syscall::pin(fd.as_fd(), path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    // What was made for the pins would hide that they are missing.
                    let _ = fs::remove_dir(&self.directory);
                    bail!(
                        "pin {}: {error}: a bpffs must be mounted there: mount -t bpf bpf MOUNTPOINT",
                        path.display()
                    );
                }
            }
        }
        Ok(gone.len())
    }
}

/// The pins of our own version must have the shapes that our programs expect.
pub(super) fn check_shapes(pins: &Path, wanted: &HashMap<String, Shape>) -> anyhow::Result<()> {
    for name in MAPS {
        let (Some((found, _)), Some(wanted)) = (map(&pins.join(name))?, wanted.get(name)) else { continue };
        ensure!(
            found == *wanted,
            "the map {name} is {found:?}, and {wanted:?} is needed, though its contract has our version: another build of dist-ctl made it; stop with dist-ctl down, then start again"
        );
    }
    Ok(())
}
