//! The examiner: a process in a cgroup of its own that does one check after the other.
//!
//! Sockets are counted where they were made, so whoever tries that has to be in the cgroup; a process
//! can end over what it tries; and the last checks take its rights. It reads the name of a check
//! from standard input, and answers with a JSON object on a line. It ends with its input, and so
//! never outlives the doctor.
#![forbid(unsafe_code)]

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{
    Answer,
    checks::{CHECKS, How},
    sentence,
    trials::Bench,
};
use crate::{cgroup::Cgroup, logging};

/// How long one check may take: the slowest is the verifier's look at `select`, a fifth of a
/// second, and some ten seconds in a virtual machine without hardware's help.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
/// How long it may take to end.
const END_PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The doctor's end.
pub(super) struct Examiner {
    child: Child,
    /// `None` once it is told to end.
    names: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Examiner {
    /// Starts one, which is to enter this cgroup when it is asked to.
    pub(super) fn start(cgroup: Option<&Cgroup>) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("dist-ctl").arg("examine").args(cgroup.map(Cgroup::path));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a process to try it")?;
        let (names, answers) = (child.stdin.take(), child.stdout.take().context("its output is a pipe")?);
        Ok(Self { child, names, answers: BufReader::new(answers) })
    }

    /// Its process.
    pub(super) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Has it do a check.
    ///
    /// # Errors
    /// It has ended over it, or did not answer. It is of no use then.
    pub(super) fn ask(&mut self, name: &str) -> anyhow::Result<Answer> {
        // If it cannot be written to, it has ended, and its answer says so.
        let _ = self.names.as_mut().map(|names| writeln!(names, "{name}"));
        ensure!(self.speaks(PATIENCE)?, "there was no answer within {} s", PATIENCE.tv_sec);
        let mut line = String::new();
        self.answers.read_line(&mut line).context("read the answer")?;
        if line.is_empty() {
            let status = self.child.wait().context("wait for the process that tried it")?;
            bail!("the process that tried it ended: {status}");
        }
        serde_json::from_str(&line).with_context(|| format!("read the answer {line:?}"))
    }

    /// Whether it has ended within some seconds.
    pub(super) fn has_ended(&mut self) -> anyhow::Result<bool> {
        // Its output closes a moment before it can be waited for.
        Ok(self.speaks(END_PATIENCE)? && self.child.wait().is_ok())
    }

    /// Waits until there is something to read, be it the end.
    fn speaks(&self, within: Timespec) -> io::Result<bool> {
        loop {
            match poll(&mut [PollFd::new(self.answers.get_ref(), PollFlags::IN)], Some(&within)) {
                Err(Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }
}

impl Drop for Examiner {
    fn drop(&mut self) {
        self.names = None;
        if !self.has_ended().unwrap_or(false) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Does what it is asked until nobody asks any more.
pub fn examine(cgroup: Option<&Path>) -> ExitCode {
    match answer(cgroup) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::say(format_args!("dist-ctl examine: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn answer(cgroup: Option<&Path>) -> anyhow::Result<()> {
    // Who signals every process of a terminal means the doctor, who ends us.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).context("ignore signals")?;
    }
    let mut bench = Bench::new(cgroup);
    for name in io::stdin().lines() {
        let name = name.context("read the name of a check")?;
        let check = CHECKS.iter().find(|check| check.name == name);
        let Some(How::Aside(check)) = check.map(|check| check.how) else {
            bail!("{name:?} is no check; this command is started by dist-ctl doctor, not by hand");
        };
        let answer: Answer = check(&mut bench).map_err(|error| sentence(&error));
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        io::stdout().write_all(&line).context("answer")?;
    }
    Ok(())
}
