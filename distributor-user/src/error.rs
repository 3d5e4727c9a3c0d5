//! Which failures are the user's input, and so exit with 2 instead of 1.
//!
//! Everything else travels as a plain `anyhow::Error`. This is the one error that somebody
//! matches on: `main`, to choose the exit code. And what to do when the machine has run out of
//! something is said here, wherever it was noticed.
#![forbid(unsafe_code)]

use std::fmt;

/// What the user wrote cannot be done: one or more sentences, each with what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserError(Vec<String>);

impl UserError {
    /// An error of one sentence.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(vec![sentence.into()])
    }

    /// An error of several sentences, in the order in which they are shown.
    pub fn all(sentences: Vec<String>) -> Self {
        Self(sentences)
    }

    /// Its sentences.
    pub fn sentences(&self) -> &[String] {
        &self.0
    }
}

/// One line for each sentence.
impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.join("\n").fmt(f)
    }
}

impl std::error::Error for UserError {}

/// What the process exits with: 2 for the user's input, 1 for every other failure.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<UserError>() {
        Some(_) => 2,
        None => 1,
    }
}

/// The failure as an operator reads it.
pub fn sentence(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let lacking = [libc::EMFILE, libc::ENFILE, libc::ENOMEM].map(rustix::io::Errno::from_raw_os_error);
    let advice = lacking
        .into_iter()
        // By its text, because other processes tell their failures as texts.
        .filter(|errno| text.contains(name(*errno).as_str()))
        .find_map(|errno| advice(errno.raw_os_error()));
    match advice {
        Some(advice) if !text.contains(advice) => format!("{text}: {advice}"),
        _ => text,
    }
}

fn name(errno: rustix::io::Errno) -> String {
    // Without "(os error 24)", which not everybody writes.
    let text = errno.to_string();
    text.split(" (").next().unwrap_or_default().to_owned()
}

/// What to do when the kernel has no more of something.
pub fn advice(errno: i32) -> Option<&'static str> {
    match errno {
        libc::ENOMEM | libc::E2BIG => {
            Some("free some memory, or raise the limit (memory.max) of the cgroup in which dist-ctl runs")
        }
        libc::EMFILE => Some(
            "dist-ctl has as many files open as it may: raise its limit (ulimit -n, or LimitNOFILE= of its unit)",
        ),
        libc::ENFILE => Some("the machine has as many files open as it may: raise fs.file-max"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_users_input_exits_with_2_also_below_a_context() {
        let error = anyhow::Error::from(UserError::new("no")).context("read config");
        assert_eq!(exit_code(&error), 2);
    }

    #[test]
    fn what_has_run_out_is_said_with_what_to_do_and_once() {
        let full = || std::io::Error::from_raw_os_error(libc::EMFILE);
        for error in [
            anyhow::Error::from(full()).context("open LOAD"),
            anyhow::anyhow!("make rooms: open a socket: Too many open files"),
            anyhow::anyhow!(sentence(&anyhow::Error::from(full()))),
        ] {
            assert_eq!(sentence(&error).matches("LimitNOFILE=").count(), 1, "{error:#}");
        }
        assert_eq!(sentence(&anyhow::anyhow!("no such file")), "no such file");
    }

    #[test]
    fn any_other_failure_exits_with_1() {
        let error = std::fs::read("/does/not/exist").context("read config").unwrap_err();
        assert_eq!(exit_code(&error), 1);
    }
}
