//! Runs the plan's tests, one program after the other, and hears which of them passed.
//!
//! A program that does not end within its limit is killed; what it has not said by then is
//! missing, and so is what a program that crashed was still to say.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::{
    plan::{Plan, Run},
    say,
};

/// How long to wait for a line before looking whether the program has ended.
const PAUSE: Duration = Duration::from_millis(200);

/// How many tests passed, failed, and never said anything.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    missing: usize,
}

pub(crate) fn run(plan: &Plan) -> Result<()> {
    ask_doctor(plan)?;
    let mut all = Tally::default();
    for run in &plan.runs {
        let start = Instant::now();
        let Tally { passed, failed, missing } = run_program(plan, run)?;
        say(&format!(
            "{}: {passed} passed, {failed} failed, {missing} missing, {:.0} s",
            run.program.display(),
            start.elapsed().as_secs_f64()
        ));
        all.passed += passed;
        all.failed += failed;
        all.missing += missing;
    }
    let Tally { passed, failed, missing } = all;
    say(&format!("verdict: {passed} passed, {failed} failed, {missing} missing"));
    Ok(())
}

/// What `dist-ctl doctor` says of this kernel, on one line.
fn ask_doctor(plan: &Plan) -> Result<()> {
    let Some(run) = plan.runs.first() else { return Ok(()) };
    // The tests are in target/release/deps.
    let directory = run.program.ancestors().nth(2).context("a test's program is in target/release/deps")?;
    let mut doctor = Command::new(directory.join("dist-ctl"));
    let asked = doctor.args(["doctor", "--json"]).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let said = String::from_utf8(asked.context("run dist-ctl doctor")?.stdout)?;
    // No text in JSON goes over the end of a line.
    say(&format!("doctor: {}", said.lines().map(str::trim).collect::<String>()));
    Ok(())
}

fn run_program(plan: &Plan, run: &Run) -> Result<Tally> {
    let deadline = Instant::now() + plan.limit;
    let mut child = Command::new(&run.program)
        .args(["--include-ignored", "--exact"])
        .args(&run.tests)
        .env_clear()
        .envs(plan.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", run.program.display()))?;
    let output = BufReader::new(child.stdout.take().context("it was asked for")?);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        // Until its end, or until nobody listens any more.
        for line in output.split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut open: BTreeSet<&str> = run.tests.iter().map(String::as_str).collect();
    let mut tally = Tally::default();
    let status = loop {
        // Asked before the lines are read: then there are no more of them.
        let ended = child.try_wait().context("look at the program")?;
        // Not until the pipe's end: something that a test left may hold it, and may even talk.
        while Instant::now() < deadline
            && let Ok(line) = lines.recv_timeout(PAUSE)
        {
            println!("{line}");
            match outcome(&line) {
                Some((test, true)) if open.remove(test) => tally.passed += 1,
                Some((test, false)) if open.remove(test) => tally.failed += 1,
                _ => {}
            }
        }
        if let Some(status) = ended {
            break status;
        }
        if Instant::now() >= deadline {
            say(&format!("{} has not ended in {:?}: killed", run.program.display(), plan.limit));
            let group = Pid::from_raw(child.id() as i32).context("a child has an id")?;
            // It may have ended since.
            let _ = kill_process_group(group, Signal::KILL);
            break child.wait().context("wait for the program")?;
        }
    };
    if !status.success() && tally.failed == 0 {
        say(&format!("{} ended with {status}", run.program.display()));
        // Every test may have passed, and something else failed.
        tally.failed += usize::from(open.is_empty());
    }
    for test in &open {
        say(&format!("missing: {test}"));
    }
    tally.missing = open.len();
    Ok(tally)
}

/// The test that a line of libtest is about, and whether it passed.
fn outcome(line: &str) -> Option<(&str, bool)> {
    let (test, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match outcome {
        "ok" => Some((test, true)),
        "FAILED" => Some((test, false)),
        _ => None,
    }
}
