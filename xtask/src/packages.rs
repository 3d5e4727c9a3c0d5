//! Debian's packages: which are there, which could be, and installing what is missing.
//!
//! Nothing is ever removed or replaced, and no service is started by it. Elsewhere than on
//! Debian and its relatives there is nothing here to use: `here` says so.

#![forbid(unsafe_code)]

use std::{collections::VecDeque, process::Command, sync::Once};

use anyhow::{Result, bail};
use xtask::toolchain::Version;

use crate::exec::{as_root, exec_watched, find, read, say};

/// How much of apt's own words are shown when it fails.
const LAST_WORDS: usize = 15;

/// A package, and what for.
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) why: &'static str,
}

impl Package {
    pub(crate) fn new(name: impl Into<String>, why: &'static str) -> Self {
        Self { name: name.into(), why }
    }
}

/// Whether this machine has Debian's packages at all.
pub(crate) fn here() -> bool {
    find("apt-get").is_some() && find("dpkg-query").is_some()
}

/// Installs those that are not there, and says so before.
pub(crate) fn install(verb: &str, packages: Vec<Package>) -> Result<()> {
    let missing: Vec<_> = packages.into_iter().filter(|package| !is_installed(&package.name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // Said before apt-get update fails for the same reason.
    as_root("apt-get")?;
    for Package { name, why } in &missing {
        say(&format!("{verb}: installing {name}: {why}"));
    }
    update(verb);
    let mut command = as_root("sh")?;
    command.args(["-c", include_str!("install.sh"), "install.sh"]);
    command.args(missing.iter().map(|package| &package.name));
    if let Err(last_words) = run_apt(verb, &mut command) {
        let names: Vec<_> = missing.iter().map(|package| package.name.as_str()).collect();
        bail!("install {}: apt-get failed:\n{last_words}", names.join(" "));
    }
    Ok(())
}

pub(crate) fn is_installed(name: &str) -> bool {
    // A package of which only a part arrived is "half-installed" or "unpacked".
    read(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}\n", name]))
        .is_ok_and(|status| status.lines().any(|line| line == "installed"))
}

/// The version of a package that apt-get would install, or has.
pub(crate) fn offered(verb: &str, name: &str) -> Option<Version> {
    if !is_installed(name) {
        update(verb);
    }
    let policy = read(Command::new("apt-cache").args(["policy", name]).env("LC_ALL", "C")).ok()?;
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let without_epoch = candidate.split_once(':').map_or(candidate, |(_, version)| version);
    Version::parse(without_epoch)
}

/// Fetches the lists of packages, once: yesterday's may name files that are gone.
fn update(verb: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        say(&format!("{verb}: apt-get update: the lists of packages may be old"));
        let updated = as_root("sh").map_err(|error| error.to_string()).and_then(|mut command| {
            // apt's progress beside its words; see install.sh.
            let update = "exec apt-get update -q -o APT::Status-Fd=3 -o DPkg::Lock::Timeout=300 3>&1 2>&1";
            command.args(["-c", update]);
            run_apt(verb, &mut command)
        });
        // One dead source among many is not the end; if it is, the installation fails.
        if let Err(last_words) = updated {
            say(&format!("{verb}: apt-get update failed, going on with the old lists:\n{last_words}"));
        }
    });
}

/// Runs apt and shows every tenth percent; an error is the last that it said.
fn run_apt(verb: &str, command: &mut Command) -> Result<(), String> {
    let mut last_words = VecDeque::new();
    let mut shown = None;
    let ended = exec_watched(command, |line| match Progress::parse(line) {
        Some(progress) => {
            let step = (progress.stage, progress.percent / 10);
            if shown != Some(step) {
                shown = Some(step);
                say(&format!("{verb}: {:3} % {}", progress.percent, progress.doing));
            }
        }
        None => {
            last_words.push_back(line.to_owned());
            if last_words.len() > LAST_WORDS {
                last_words.pop_front();
            }
        }
    });
    ended.map_err(
        |error| if last_words.is_empty() { error.to_string() } else { Vec::from(last_words).join("\n") },
    )
}

/// A line of apt's status: `pmstatus:llvm-22-dev:45.2381:Unpacking llvm-22-dev (amd64)`.
#[derive(Debug, PartialEq, Eq)]
struct Progress<'a> {
    stage: Stage,
    percent: u8,
    doing: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Download,
    Install,
}

impl<'a> Progress<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (stage, rest) = if let Some(rest) = line.strip_prefix("dlstatus:") {
            (Stage::Download, rest)
        } else {
            (Stage::Install, line.strip_prefix("pmstatus:")?)
        };
        // A package of a foreign architecture has a colon in its name.
        let mut fields = rest.split(':').skip(1).skip_while(|field| field.parse::<f32>().is_err());
        let percent: f32 = fields.next()?.parse().ok()?;
        let doing = rest.rsplit(':').next()?;
        Some(Self { stage, percent: percent.clamp(0.0, 100.0) as u8, doing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apts_status_lines_become_progress() {
        for (line, progress) in [
            (
                "pmstatus:llvm-22-dev:45.2381:Unpacking llvm-22-dev (amd64)",
                Some((Stage::Install, 45, "Unpacking llvm-22-dev (amd64)")),
            ),
            (
                "pmstatus:libc6:i386:5.0:Preparing libc6 (i386)",
                Some((Stage::Install, 5, "Preparing libc6 (i386)")),
            ),
            ("dlstatus:1:0.5:Retrieving file 1 of 19", Some((Stage::Download, 0, "Retrieving file 1 of 19"))),
            ("Setting up libzstd-dev:amd64 (1.5.4) ...", None),
            ("E: Unable to locate package nothing", None),
            ("pmerror:nginx:50.0:it broke", None),
        ] {
            let expected = progress.map(|(stage, percent, doing)| Progress { stage, percent, doing });
            assert_eq!(Progress::parse(line), expected, "{line}");
        }
    }
}
