//! The configuration that is in force: what was read last, and what operators have changed of it.
//!
//! The monitor holds it for the next distributor as a file in memory, since the file on disk may
//! say something else by then, or nothing that can be read. Pure but for that file.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use anyhow::Context as _;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::{
    cli::Source,
    config::{Config, Counts},
    error::UserError,
};

/// A configuration, as it can be read again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// The file's text. Empty: it was given on the command line.
    text: String,
    /// How many numbered servers a service has, where that was changed since the text was read.
    #[serde(default)]
    counts: Counts,
}

impl InForce {
    /// Reads what the source says now.
    pub fn read(source: &Source) -> Result<(Self, Config), UserError> {
        let (text, config) = match source {
            Source::File(path) => Config::read_with_text(path)?,
            Source::Command(_) => (String::new(), source.read()?),
        };
        Ok((Self { text, counts: Counts::new() }, config))
    }

    /// What it means.
    pub fn config(&self, source: &Source) -> Result<Config, UserError> {
        match source {
            Source::File(path) => Config::parse_with(&self.text, &path.display().to_string(), &self.counts),
            Source::Command(form) => Config::from_command_with(form, &self.counts),
        }
    }

    /// The same with another number of numbered servers in a service.
    pub fn scaled(&self, service: &str, count: usize) -> Self {
        let mut counts = self.counts.clone();
        counts.insert(service.to_owned(), count);
        Self { text: self.text.clone(), counts }
    }

    /// With the numbers of servers that operators have set, where the two texts say the same of them:
    /// who writes another number into the file means that one. Within the bounds that are configured now.
    ///
    /// `before` and `now` are what this and `newer` mean without them.
    pub fn carried_over(&self, before: &Config, now: &Config, newer: Self) -> Self {
        let kept = |(name, count): (&String, &usize)| {
            let written = |config: &Config| Some(config.service(name)?.numbered());
            let bounded = match now.service(name)?.scale {
                Some(scale) => (*count).clamp(scale.min, scale.max),
                None => *count,
            };
            (written(before) == written(now)).then(|| (name.clone(), bounded))
        };
        Self { counts: self.counts.iter().filter_map(kept).collect(), ..newer }
    }

    /// What its text alone means.
    pub fn as_written(&self) -> Self {
        Self { text: self.text.clone(), counts: BTreeMap::new() }
    }

    /// For the monitor to hold.
    pub fn keep(&self) -> anyhow::Result<OwnedFd> {
        let keep = "keep the configuration for the next distributor";
        let memory = rustix::fs::memfd_create("configuration", MemfdFlags::CLOEXEC).context(keep)?;
        let text = serde_json::to_vec(self).context(keep)?;
        File::from(memory.try_clone().context(keep)?).write_all(&text).context(keep)?;
        Ok(memory)
    }

    /// What was kept so.
    pub fn kept(file: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let file = File::from(file.try_clone_to_owned()?);
        let mut text = vec![0; usize::try_from(file.metadata()?.len())?];
        // Its offset is that of every distributor before us.
        file.read_exact_at(&mut text, 0).context("read the configuration that is in force")?;
        // Before there was anything to keep beside the text, that alone was kept. No TOML is JSON.
        match serde_json::from_slice(&text) {
            Ok(in_force) => Ok(in_force),
            Err(_) => Ok(Self { text: String::from_utf8(text)?, counts: Counts::new() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd as _, path::PathBuf};

    use super::*;

    const TEXT: &str = "[service.shop]\nlisten = [\"127.0.0.1:8080\"]\n\
                        [service.shop.server]\ncommand = [\"/bin/true\"]\ncount = 2\n";

    fn of(text: &str) -> InForce {
        InForce { text: text.to_owned(), counts: Counts::new() }
    }

    fn file() -> Source {
        Source::File(PathBuf::from("shop.toml"))
    }

    fn count(in_force: &InForce) -> usize {
        in_force.config(&file()).unwrap().services[0].servers.len()
    }

    #[test]
    fn what_is_kept_is_read_again() {
        for in_force in [of(TEXT), of(TEXT).scaled("shop", 5), of("")] {
            let memory = in_force.keep().unwrap();
            assert_eq!(InForce::kept(memory.as_fd()).unwrap(), in_force);
            // Nobody's reading keeps another one from it.
            assert_eq!(InForce::kept(memory.as_fd()).unwrap(), in_force);
        }
    }

    #[test]
    fn the_bare_text_that_was_kept_before_is_read_too() {
        let memory = rustix::fs::memfd_create("before", MemfdFlags::CLOEXEC).unwrap();
        File::from(memory.try_clone().unwrap()).write_all(TEXT.as_bytes()).unwrap();
        assert_eq!(InForce::kept(memory.as_fd()).unwrap(), of(TEXT));
    }

    #[test]
    fn another_number_of_servers_counts_until_the_file_says_another_one() {
        let scaled = of(TEXT).scaled("shop", 5);
        assert_eq!(count(&scaled), 5);
        assert_eq!(count(&scaled.as_written()), 2);
        let before = scaled.as_written().config(&file()).unwrap();
        for (text, expected) in [
            (TEXT.to_owned(), 5),
            (TEXT.replace("/bin/true", "/bin/false"), 5),
            (TEXT.replace("count = 2", "count = 3"), 3),
            (format!("{TEXT}limit = 7\n[service.shop.scale]\nmin = 1\nmax = 4\n"), 4),
        ] {
            let newer = of(&text);
            let now = newer.config(&file()).unwrap();
            assert_eq!(count(&scaled.carried_over(&before, &now, newer)), expected, "{text}");
        }
    }

    #[test]
    fn too_many_servers_are_refused_as_in_a_file() {
        let refused = of(TEXT).scaled("shop", 300).config(&file()).unwrap_err().to_string();
        assert!(refused.contains("300"), "{refused}");
    }
}
