//! `dist-ctl doctor`: tries each thing that dist-ctl needs or can use, and says what works.
//!
//! Takes the checks one after the other, does each here or has the examiner do it, a process in a
//! cgroup of its own, and gives a report. It touches nothing that runs and takes no lock: programs,
//! sockets, cgroup and pins are its own, and are removed again whatever fails. What a doctor that
//! was killed has left, the next one removes.
#![forbid(unsafe_code)]

mod checks;
mod examiner;
mod machine;
mod report;
mod trials;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::{
    checks::{CHECKS, How},
    examiner::Examiner,
};
use crate::{
    cgroup::{self, Cgroup},
    error, instance, logging,
};

pub use self::{
    examiner::examine,
    report::{Report, Shown},
};

/// What a check came to: what was found, or why it does not work.
type Answer = Result<String, String>;

/// What the cgroup and the pins of a doctor are called, before its process's number. No instance's
/// are: a `-` follows the first word there.
const PREFIX: &str = "dist-ctl_doctor-";

/// Where the checks are done, and what they have made there.
struct Place {
    /// Of the instance that would run.
    runtime_dir: PathBuf,
    cgroup: Option<Cgroup>,
    examiner: Option<Examiner>,
    /// The check at which the examiner ended.
    lost_at: Option<&'static str>,
}

/// Tries everything. A second or so.
///
/// # Errors
/// A signal came before it was done.
pub fn run(runtime_dir: &Path) -> anyhow::Result<Report> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("catch signals")?;
    }
    remove_what_is_left(runtime_dir);
    let mut place =
        Place { runtime_dir: runtime_dir.to_owned(), cgroup: None, examiner: None, lost_at: None };
    let mut report = Report::begin();
    for check in CHECKS {
        if stop.load(Ordering::Relaxed) {
            bail!("a signal came before everything was tried; nothing is left behind");
        }
        let lost_at = match check.how {
            How::Here(_) => None,
            How::Upon(_) | How::Aside(_) => place.lost_at,
        };
        match report.obstacle(check).or(lost_at) {
            Some(obstacle) => report.skip(check, obstacle),
            None => report.note(check, place.attempt(check.name, check.how)),
        }
    }
    Ok(report)
}

/// What a doctor's cgroup and pins are called.
fn name(process: u32) -> String {
    format!("{PREFIX}{process}")
}

/// Cgroups, pins and directories of doctors that were killed.
fn remove_what_is_left(runtime_dir: &Path) {
    // Only pins are in a directory that is not empty: a cgroup's files go with it.
    let empty: fn(PathBuf) -> io::Result<()> = fs::remove_dir;
    let cgroups = cgroup::mount_point().ok().map(|root| (root, empty));
    let pins = instance::bpffs().map(|root| (root.to_owned(), fs::remove_dir_all as _));
    let directories = (machine::nearest(runtime_dir).to_owned(), empty);
    for (root, remove) in cgroups.into_iter().chain(pins).chain([directories]) {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
            if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
                // Another one may be faster.
                let _ = remove(entry.path());
            }
        }
    }
}

impl Place {
    fn attempt(&mut self, name: &'static str, how: How) -> Answer {
        match how {
            How::Here(check) | How::Upon(check) => check(self).map_err(|error| sentence(&error)),
            How::Aside(_) => self.ask(name),
        }
    }

    /// Has the examiner do it.
    fn ask(&mut self, name: &'static str) -> Answer {
        let answer = self.examiner().and_then(|examiner| examiner.ask(name));
        answer.unwrap_or_else(|error| {
            self.lost_at = Some(name);
            Err(sentence(&error))
        })
    }

    fn examiner(&mut self) -> anyhow::Result<&mut Examiner> {
        match &mut self.examiner {
            Some(examiner) => Ok(examiner),
            none => Ok(none.insert(Examiner::start(self.cgroup.as_ref())?)),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It must be gone before its cgroup is.
        self.examiner = None;
        if let Some(cgroup) = self.cgroup.take()
            && let Err(error) = machine::remove(&cgroup)
        {
            logging::say(format_args!(
                "dist-ctl doctor: {error:#}; remove it by hand: rmdir {}",
                cgroup.path().display()
            ));
        }
    }
}

/// A failure on one line.
fn sentence(error: &anyhow::Error) -> String {
    error::sentence(error).split_whitespace().collect::<Vec<_>>().join(" ")
}
