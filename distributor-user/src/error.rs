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
    advised(format!("{error:#}"))
}

/// A sentence with what to do added, if it says that the machine has run out of something.
pub fn advised(text: String) -> String {
    match lack(&text, advice) {
        Some(advice) if !text.contains(advice) => format!("{text}: {advice}"),
        _ => text,
    }
}

/// What this machine does not let us do, with the advice to have everything tried. Where it has only
/// run out of something, that would not help.
pub fn unfit(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    match lack(&text, advice) {
        Some(_) => error,
        None => anyhow::anyhow!("{text}; dist-ctl doctor says what else this machine lacks"),
    }
}

/// Why a process could not be started, with what to do added, if it is the machine that lacks
/// something for it. `None`: it lacks nothing.
pub fn lacking(text: &str) -> Option<String> {
    let advice = lack(text, |errno| match errno {
        // Of other system calls it says something else.
        libc::EAGAIN => Some(
            "there are as many processes as there may be: raise the limit of the cgroup (pids.max), of the user \
             (ulimit -u, or nproc in limits), or kernel.pid_max",
        ),
        other => advice(other),
    })?;
    Some(if text.contains(advice) { text.to_owned() } else { format!("{text}: {advice}") })
}

/// What may run out, and be there again. The texts of the first two begin with the same words.
const LACKS: [i32; 7] =
    [libc::ENFILE, libc::EMFILE, libc::ENOMEM, libc::EAGAIN, libc::ENOSPC, libc::EDQUOT, libc::EROFS];

/// What to do about the first of these failures that a text tells of. By its text, because other
/// processes tell their failures as texts.
fn lack(text: &str, advice: impl Fn(i32) -> Option<&'static str>) -> Option<&'static str> {
    let told = |errno: &i32| text.contains(&name(rustix::io::Errno::from_raw_os_error(*errno)));
    LACKS.into_iter().filter(told).find_map(advice)
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
        libc::ENOSPC | libc::EDQUOT => Some("the disk is full: free some space"),
        libc::EROFS => Some("the file system is read-only: see in the kernel's log why, and remount it"),
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
    fn what_the_machine_lacks_is_told_from_what_a_server_does() {
        for (text, words) in [
            ("start a process: Resource temporarily unavailable (os error 11)", "pids.max"),
            ("run /bin/true: Resource temporarily unavailable", "pids.max"),
            ("make a socket for the launcher: Too many open files (os error 24)", "LimitNOFILE="),
            ("open /dev/null: Too many open files in system", "fs.file-max"),
            ("start a process: Cannot allocate memory (os error 12)", "memory.max"),
            ("open /var/log/a for standard output: No space left on device", "free some space"),
            ("open /var/log/a for standard output: Disk quota exceeded", "free some space"),
            ("make notify socket: /run/a: Read-only file system (os error 30)", "remount"),
        ] {
            let told = lacking(text).unwrap_or_else(|| panic!("{text}"));
            assert!(told.starts_with(text) && told.contains(words), "{told}");
            assert_eq!(lacking(&told), Some(told.clone()), "once");
        }
        for text in [
            "run /srv/shop: No such file or directory",
            "change to directory /srv: Permission denied",
            "start it: its launcher ended before it could",
            "bind 0.0.0.0:80: Address already in use",
        ] {
            assert_eq!(lacking(text), None, "{text}");
        }
    }

    #[test]
    fn the_doctor_is_recommended_unless_something_has_run_out() {
        let refused = unfit(anyhow::anyhow!("Operation not permitted").context("create maps"));
        assert!(refused.to_string().starts_with("create maps: Operation not permitted; dist-ctl doctor "));
        let full = std::io::Error::from_raw_os_error(libc::EMFILE);
        assert!(!format!("{:#}", unfit(full.into())).contains("doctor"));
    }

    #[test]
    fn any_other_failure_exits_with_1() {
        let error = std::fs::read("/does/not/exist").context("read config").unwrap_err();
        assert_eq!(exit_code(&error), 1);
    }
}
