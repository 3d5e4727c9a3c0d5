//! `track`, `bind4` and `bind6` on the service's cgroup: attached, replaced, found dead.
//!
//! Each is attached by a link, which is pinned and so outlives us. Another program takes the
//! place of the one before in one step, and at no time is none attached: a connection that nobody
//! counts would be counted down all the same when it closes.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{pins, syscall};

/// A program that is attached to the cgroup.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hook {
    pub(super) program: &'static str,
    /// An `enum bpf_attach_type` (include/uapi/linux/bpf.h).
    pub(super) kind: u32,
}

pub(super) const HOOKS: [Hook; 3] = [
    Hook { program: "track", kind: 3 },
    Hook { program: "bind4", kind: 8 },
    Hook { program: "bind6", kind: 9 },
];

/// What had to be done for a program to be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Nothing,
    /// Another program's link has ours now.
    Replaced,
    /// There was no link to this cgroup.
    Attached,
}

impl Hook {
    /// Where its link is pinned.
    pub(super) fn pin(self, pins: &Path) -> PathBuf {
        pins.join(format!("{}_link", self.program))
    }

    /// Its link, if one is pinned there and its cgroup is this one.
    pub(super) fn link(self, pins: &Path, cgroup: u64) -> anyhow::Result<Option<OwnedFd>> {
        let pin = self.pin(pins);
        if !pin.exists() {
            return Ok(None);
        }
        let link = syscall::open_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
        let info = syscall::link_info(link.as_fd()).with_context(|| format!("read {}", pin.display()))?;
        Ok((info.cgroup == cgroup).then_some(link))
    }

    /// Has this program, by its descriptor and id, run for the cgroup.
    ///
    /// A link of another cgroup, which was removed and made anew, is put aside and stays as long
    /// as the kernel knows that cgroup: sockets that were made in there still need it.
    pub(super) fn attach(
        self,
        pins: &Path,
        program: BorrowedFd<'_>,
        id: u32,
        cgroup: &Path,
    ) -> anyhow::Result<Done> {
        let pin = self.pin(pins);
        let name = self.program;
        let directory = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
        let inode = number(cgroup)?;
        if let Some(link) = self.link(pins, inode)? {
            if syscall::link_info(link.as_fd())?.program == id {
                return Ok(Done::Nothing);
            }
            match syscall::update_link(link.as_fd(), program) {
                Ok(()) => return Ok(Done::Replaced),
                // The cgroup was removed in this moment.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(error) => return Err(error).with_context(|| format!("replace {name}")),
            }
        }
        if pin.exists() {
            let old = syscall::open_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
            match syscall::link_info(old.as_fd())?.cgroup {
                0 => pins::remove_pin(&pin)?,
                other => {
                    let aside = pins.join(format!("{name}_link_{other}"));
                    fs::rename(&pin, &aside).with_context(|| format!("rename {}", pin.display()))?;
                }
            }
        }
        let link = syscall::create_link(program, directory.as_fd(), self.kind)
            .with_context(|| format!("attach {name} to {}", cgroup.display()))?;
        syscall::pin(link.as_fd(), &pin).with_context(|| format!("pin {}", pin.display()))?;
        Ok(Done::Attached)
    }

    /// Gives links that were put aside this program too, and removes those that do nothing any
    /// more.
    pub(super) fn tend_aside(self, pins: &Path, program: BorrowedFd<'_>) -> anyhow::Result<()> {
        let prefix = format!("{}_link_", self.program);
        for pin in pins::list(pins)? {
            if !pin.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                continue;
            }
            let link = syscall::open_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
            let is_dead = syscall::link_info(link.as_fd())?.cgroup == 0;
            if is_dead || syscall::update_link(link.as_fd(), program).is_err() {
                pins::remove_pin(&pin)?;
            }
        }
        Ok(())
    }
}

/// A cgroup as links name it: by its inode number.
pub(super) fn number(cgroup: &Path) -> anyhow::Result<u64> {
    let facts = fs::metadata(cgroup).with_context(|| format!("look at {}", cgroup.display()))?;
    Ok(facts.ino())
}
