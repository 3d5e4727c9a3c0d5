//! What servers that somebody else started need of the kernel: their connections counted in their
//! own cgroup, and their listeners left alone again.
//!
//! A link to a further cgroup is pinned like those that are put aside when the service's own
//! cgroup is made anew, so another build's `track` reaches it in the same way (links.rs).
#![forbid(unsafe_code)]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use aya::programs::SkReuseport;

use super::{
    Kernel,
    links::{self, HOOKS},
    pins,
    pins::Held,
    programs, syscall,
};
use crate::cgroup::Cgroup;

impl Kernel {
    /// Has `track` count in a further cgroup, until [`Kernel::count_no_longer_in`] its number,
    /// which is returned. Done again, it changes nothing.
    ///
    /// Before a listener of that cgroup is tagged: a connection that comes with a tag and is not
    /// counted up would never be known of.
    pub fn count_in(&mut self, cgroup: &Cgroup) -> anyhow::Result<u64> {
        let number = links::number(cgroup.path())?;
        let (hook, track) = (HOOKS[0], &self.programs.hooked[0]);
        let pin = further(&self.pins, number);
        if number == links::number(&self.cgroup)? || pin.exists() {
            return Ok(number);
        }
        let directory = File::open(cgroup.path());
        let directory = directory.with_context(|| format!("open {}", cgroup.path().display()))?;
        let link = syscall::create_link(track.fd.as_fd(), directory.as_fd(), hook.kind)
            .with_context(|| format!("attach {} to {}", hook.program, cgroup.path().display()))?;
        syscall::pin(link.as_fd(), &pin).with_context(|| format!("pin {}", pin.display()))?;
        self.hold_pins()?;
        Ok(number)
    }

    /// `track` does not count there any more. Connections that are open keep their place until the
    /// auditor finds that they are gone: so better when there are none.
    pub fn count_no_longer_in(&mut self, number: u64) -> anyhow::Result<()> {
        pins::remove_pin(&further(&self.pins, number))?;
        // As long as we hold it, it stays attached.
        self.hold_pins()
    }

    /// A listener that was adopted is none of ours any more: it cannot be selected, and its
    /// connections are nobody's. What HOME says of it may be needed a while longer.
    pub fn disown(&mut self, listener: &impl AsRawFd, index: u32) -> anyhow::Result<()> {
        self.vacate(index);
        self.tag.remove(listener).context("take the tag off a listener")
    }

    /// Holds what is pinned now, and nothing else: else it would be pinned again.
    fn hold_pins(&mut self) -> anyhow::Result<()> {
        if self.held.is_some() {
            self.held = Some(Held::open(&self.pins)?);
        }
        Ok(())
    }
}

/// Where the link of `track` to a further cgroup is pinned.
fn further(pins: &Path, number: u64) -> PathBuf {
    pins.join(format!("{}_link_{number}", HOOKS[0].program))
}

/// No program chooses any more for the group that a listener is in.
pub fn detach(listener: impl AsFd) -> anyhow::Result<()> {
    SkReuseport::detach(listener)
        .map_err(programs::said)
        .context("detach the select program from the listening address")
}
