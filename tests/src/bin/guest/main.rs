//! PID 1 of a guest that `cargo xtask vm` boots.
//!
//! Makes an ordinary machine of a bare kernel, runs the tests that the file `/plan` names, says
//! in one last line how many passed, failed and were never heard of, and switches the machine off.
//! The tests run below a second process of this program: PID 1 has to reap whatever is
//! orphaned, and must not take the runner's own children from it.

#![forbid(unsafe_code)]

mod machine;
mod plan;
mod runner;

use std::{
    env,
    io::{Write as _, stdout},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
    system::{RebootCommand, reboot},
};

use crate::plan::Plan;

/// What this program is called with to be the runner.
const RUN: &str = "run";

fn main() -> ExitCode {
    if env::args().nth(1).is_some_and(|word| word == RUN) {
        return match Plan::read().and_then(|plan| runner::run(&plan)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say(&format!("error: {error:#}"));
                ExitCode::FAILURE
            }
        };
    }
    if std::process::id() != 1 {
        eprintln!("this is the first process of a guest: it is started by cargo xtask vm");
        return ExitCode::from(2);
    }
    if let Err(error) = run() {
        say(&format!("error: {error:#}"));
    }
    // Without it the kernel writes nothing more once PID 1 has ended, but panics; that would
    // look like a failure of its own.
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    machine::mount_kernel_filesystems()?;
    let plan = Plan::read()?;
    machine::set_up(&plan)?;
    let runner = Command::new("/proc/self/exe").arg(RUN).spawn().context("start the runner")?;
    let status = loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() as u32 == runner.id() => break status,
            // An orphan, or a call that was interrupted.
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the runner"),
        }
    };
    ensure!(status.exit_status() == Some(0), "the runner ended with {status:?}");
    Ok(())
}

/// One line for `cargo xtask vm`, in order with what the tests print.
fn say(line: &str) {
    let mut output = stdout().lock();
    // Nobody hears of it if the console is gone.
    let _ = writeln!(output, "guest: {line}").and_then(|()| output.flush());
}
