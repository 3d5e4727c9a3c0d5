//! What a guest is to do, as `cargo xtask vm` wrote it: one statement on a line.
//!
//! `xtask/src/vm/plan.rs` writes it. Words are separated by spaces; no name has one inside.

#![forbid(unsafe_code)]

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};

#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// `hybrid`: cgroup v1 beside v2, as on older machines.
    pub(crate) hybrid: bool,
    /// `share TAG DIRECTORY ro|rw`: a directory of the host.
    pub(crate) shares: Vec<Share>,
    /// `module FILE`: kernel modules, each after those that it needs.
    pub(crate) modules: Vec<PathBuf>,
    /// `environment NAME=VALUE`: for the tests.
    pub(crate) environment: Vec<(String, String)>,
    /// `limit SECONDS`: how long one program may take.
    pub(crate) limit: Duration,
    /// `run PROGRAM TEST...`: a program, and which of its tests.
    pub(crate) runs: Vec<Run>,
}

#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) tag: String,
    pub(crate) directory: PathBuf,
    pub(crate) writable: bool,
}

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) program: PathBuf,
    pub(crate) tests: Vec<String>,
}

impl Plan {
    pub(crate) fn read() -> Result<Self> {
        Self::parse(&fs::read_to_string("/plan").context("read /plan")?)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut plan = Self::default();
        for line in text.lines() {
            let words: Vec<_> = line.split(' ').collect();
            match words[..] {
                ["hybrid"] => plan.hybrid = true,
                ["share", tag, directory, access @ ("ro" | "rw")] => plan.shares.push(Share {
                    tag: tag.to_owned(),
                    directory: directory.into(),
                    writable: access == "rw",
                }),
                ["module", file] => plan.modules.push(file.into()),
                ["environment", variable] => {
                    let (name, value) = variable.split_once('=').context("a variable has a value")?;
                    plan.environment.push((name.to_owned(), value.to_owned()));
                }
                ["limit", seconds] => {
                    plan.limit = Duration::from_secs(seconds.parse().context("a limit is in seconds")?);
                }
                ["run", program, ref tests @ ..] => plan.runs.push(Run {
                    program: program.into(),
                    tests: tests.iter().map(|&test| test.to_owned()).collect(),
                }),
                _ => bail!("/plan has a line that nobody here understands: {line}"),
            }
        }
        Ok(plan)
    }
}
