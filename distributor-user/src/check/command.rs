//! A check by a command: it is to exit with 0.
//!
//! It runs as the server does, as its user, in its environment and directory and with its limits, but
//! in a cgroup of its own outside of the service's: it cannot be taken for the server, and everything
//! of it is killed when it has ended, or takes too long.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    process::ExitStatus,
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    process::Command,
    time::{sleep, timeout},
};

use super::{Outcome, timed_out, too_late};
use crate::{
    cgroup::Cgroup,
    error,
    launch::{self, Exec, LaunchError},
    message::Exit,
};

/// Of what it says, the last line is shown, up to so many bytes.
const LAST_LINE: usize = 200;

/// What a killed process takes to be gone from its cgroup.
const GONE_WITHIN: Duration = Duration::from_millis(5);
const GONE_TRIES: u32 = 200;

/// Runs it to its end. `exec` is what a server would be started with.
pub async fn run(exec: &Exec, within: Duration) -> Outcome {
    let cgroup = Cgroup::at(&exec.cgroup);
    let mut said = Said::default();
    let begun = Instant::now();
    let outcome = match timeout(within, run_in(&cgroup, exec, &mut said)).await {
        Err(_) => timed_out(begun.elapsed(), within, said.behind(String::new())),
        Ok(Err(Failed::Lacks(sentence))) => Outcome::Untried(sentence),
        Ok(Err(Failed::Cannot(error))) => Outcome::Bad(format!("could not be run: {error}")),
        Ok(Ok(status)) if status.success() => Outcome::Good(said.behind("exited with 0".to_owned())),
        Ok(Ok(status)) => Outcome::Bad(said.behind(exit(status).to_string())),
    };
    end(&cgroup).await;
    outcome
}

enum Failed {
    /// The machine's fault.
    Lacks(String),
    Cannot(LaunchError),
}

async fn run_in(cgroup: &Cgroup, exec: &Exec, said: &mut Said) -> Result<ExitStatus, Failed> {
    let lacks = |what: &str, error: io::Error| {
        Failed::Lacks(error::advised(format!("{what} to check a server: {error}")))
    };
    cgroup.create().map_err(|error| Failed::Lacks(format!("{error:#}")))?;
    let (theirs, ours) = launch::pair().map_err(|error| lacks("make a socket", error))?;
    let (reader, writer) = io::pipe().map_err(|error| lacks("make a pipe", error))?;
    let errors = writer.try_clone().map_err(|error| lacks("make a pipe", error))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dist-ctl").arg("launch").stdin(theirs).stdout(writer).stderr(errors).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| lacks("start a process", error))?;
    // It holds the ends of the pipe that are the child's.
    drop(command);
    let mut reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))
        .map_err(|error| lacks("read from a pipe", error))?;
    let begun = Instant::now();
    let launched = launch::send_job(ours, exec).await;
    if let Err(error) = launched {
        if let Some(late) = too_late(begun.elapsed(), launch::TIME_LIMIT) {
            return Err(Failed::Lacks(late));
        }
        return Err(match error::lacking(&error.to_string()) {
            Some(sentence) => Failed::Lacks(sentence),
            None => Failed::Cannot(error),
        });
    }
    let mut buffer = [0; 4096];
    loop {
        // In this order, so that what it said before its end is read.
        tokio::select! {
            biased;
            read = reader.read(&mut buffer) => match read {
                Ok(read) if read > 0 => said.note(&buffer[..read]),
                // Nobody has the other end, or it cannot be read: then only its end is of interest.
                _ => break,
            },
            status = child.wait() => return status.map_err(|error| lacks("wait for a process", error)),
        }
    }
    child.wait().await.map_err(|error| lacks("wait for a process", error))
}

/// Kills what is left of it.
async fn end(cgroup: &Cgroup) {
    // What cannot be killed now is, by the next check or the next distributor.
    let _ = cgroup.kill();
    for _ in 0..GONE_TRIES {
        if cgroup.remove().is_ok() {
            return;
        }
        sleep(GONE_WITHIN).await;
    }
}

fn exit(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

/// The end of what it says.
#[derive(Default)]
struct Said(VecDeque<u8>);

impl Said {
    fn note(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        // A line end may follow the last line.
        let over = self.0.len().saturating_sub(LAST_LINE + 2);
        self.0.drain(..over);
    }

    /// Its last line, behind what is to be said of it.
    fn behind(&self, what: String) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        match text.lines().map(str::trim).rfind(|line| !line.is_empty()) {
            Some(line) => format!("{what}: {line}"),
            None => what,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_what_it_says_is_shown() {
        let long = "x".repeat(1_000);
        let cut = format!("exited with 1: {}", &long[..LAST_LINE]);
        for (parts, expected) in [
            (&[][..], "exited with 1"),
            (&["\n \n"], "exited with 1"),
            (&["no database\n"], "exited with 1: no database"),
            (&["one\ntwo\n"], "exited with 1: two"),
            (&["one\ntw", "o"], "exited with 1: two"),
            (&[long.as_str(), "\r\n"], cut.as_str()),
        ] {
            let mut said = Said::default();
            parts.iter().for_each(|part| said.note(part.as_bytes()));
            assert_eq!(said.behind("exited with 1".to_owned()), expected);
        }
    }
}
