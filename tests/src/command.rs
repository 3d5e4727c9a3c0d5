//! Running a program to its end, with a deadline.

#![forbid(unsafe_code)]

use std::{
    fmt,
    fs::File,
    io::Read,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    process::{Signal, signal_child},
    wait::try_for,
};

/// What a program left behind when it had ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The command line, for messages.
    pub command: String,
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end. One that takes longer than `within` fails the test.
#[track_caller]
pub fn run(command: &mut Command, within: Duration) -> Ended {
    let text = display(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("start {text}: {error}"));
    // Both pipes are read while it runs, or a talkative program would block for ever.
    let stdout = read_aside(child.stdout.take().map(|pipe| File::from(std::os::fd::OwnedFd::from(pipe))));
    let stderr = read_aside(child.stderr.take().map(|pipe| File::from(std::os::fd::OwnedFd::from(pipe))));
    let ended = try_for(within, || child.try_wait().expect("wait for a child"));
    if ended.is_none() {
        signal_child(&child, Signal::KILL);
    }
    let status = child.wait().expect("wait for a child");
    let (stdout, stderr) =
        (stdout.join().expect("reading does not panic"), stderr.join().expect("reading does not panic"));
    assert!(ended.is_some(), "{text} did not end within {within:?}\nstdout: {stdout}\nstderr: {stderr}");
    Ended { command: text, code: status.code(), stdout, stderr }
}

impl Ended {
    /// It did what it was asked.
    #[track_caller]
    pub fn expect_done(self) -> Self {
        assert!(self.code == Some(0), "{self}");
        self
    }

    /// It refused with this code and one line on stderr that holds each of these words.
    #[track_caller]
    pub fn expect_refusal(self, code: i32, words: &[&str]) -> Self {
        assert!(self.code == Some(code), "expected exit code {code}: {self}");
        assert!(self.stdout.is_empty(), "a refusal says nothing on stdout: {self}");
        let lines = self.stderr.lines().count();
        assert!(lines == 1, "expected one sentence, not {lines} lines: {self}");
        for word in words {
            assert!(self.stderr.contains(word), "expected {word:?} in it: {self}");
        }
        self
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, code, stdout, stderr } = self;
        write!(f, "{command}: exit code {code:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

fn display(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

fn read_aside(pipe: Option<File>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
