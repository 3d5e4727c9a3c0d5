//! What a guest is to do: which tests, on which kernel, with which cgroups; and which not, and why.
//!
//! Written as the file that `tests/src/bin/guest/plan.rs` reads.

#![forbid(unsafe_code)]

use std::{fmt, fmt::Write as _, path::Path, time::Duration};

use clap::ValueEnum;

use super::{kernels::Role, programs::Program};

/// How many times slower than this machine a guest may be.
const PATIENCE: u32 = 10;

/// How long one program of tests may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(1800);

/// How the cgroup controllers are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// All in one tree of cgroup v2.
    Unified,
    /// In trees of cgroup v1, with a v2 without controllers beside them.
    Hybrid,
}

/// Which of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'w> {
    All,
    /// Those that tell in a few minutes whether a kernel will do.
    Core,
    /// Those that have this in `PROGRAM::TEST`.
    Containing(&'w str),
}

/// The programs whose tests are the core.
const CORE: [&str; 3] = ["counts", "crash", "fallback"];

/// A test that is not run in a guest.
struct LeftOut {
    program: &'static str,
    /// All of them if there is none.
    test: Option<&'static str>,
    on: fn(Role) -> bool,
    why: &'static str,
}

const LEFT_OUT: [LeftOut; 1] = [LeftOut {
    program: "docs",
    test: None,
    on: |_| true,
    why: "it reads the repository, and is the same on every kernel",
}];

/// The tests of one program that are run.
pub(crate) struct Run<'p> {
    pub(crate) program: &'p Program,
    pub(crate) tests: Vec<&'p str>,
}

/// The tests that are run, and a line for each that was wanted and is not.
pub(crate) fn choose<'p>(
    programs: &'p [Program],
    wanted: Wanted<'_>,
    role: Role,
) -> (Vec<Run<'p>>, Vec<String>) {
    let (mut runs, mut left_out) = (Vec::new(), Vec::new());
    for program in programs {
        let mut run = Run { program, tests: Vec::new() };
        for test in &program.tests {
            let full = format!("{}::{}", program.name, test.name);
            let is_wanted = match wanted {
                Wanted::All => true,
                Wanted::Core => CORE.contains(&program.name.as_str()),
                Wanted::Containing(part) => full.contains(part),
            };
            if !is_wanted {
                continue;
            }
            let reason = LEFT_OUT.iter().find(|left_out| {
                left_out.program == program.name
                    && left_out.test.is_none_or(|name| name == test.name)
                    && (left_out.on)(role)
            });
            match reason {
                Some(LeftOut { why, .. }) => left_out.push(format!("{full}: {why}")),
                None => run.tests.push(&test.name),
            }
        }
        if !run.tests.is_empty() {
            runs.push(run);
        }
    }
    (runs, left_out)
}

/// The file.
pub(crate) fn text(
    layout: Layout,
    modules: &[String],
    shares: &[(&str, &Path, &str)],
    runs: &[Run<'_>],
) -> String {
    let mut text = String::new();
    let mut line = |line: fmt::Arguments<'_>| {
        // A text can always be written to.
        let _ = writeln!(text, "{line}");
    };
    if layout == Layout::Hybrid {
        line(format_args!("hybrid"));
    }
    for module in modules {
        line(format_args!("module {module}"));
    }
    for (tag, directory, access) in shares {
        line(format_args!("share {tag} {} {access}", directory.display()));
    }
    for (name, value) in [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LANG", "C.UTF-8"),
        ("RUST_BACKTRACE", "0"),
        ("TESTS_PATIENCE", &PATIENCE.to_string()),
    ] {
        line(format_args!("environment {name}={value}"));
    }
    line(format_args!("limit {}", LIMIT.as_secs()));
    for Run { program, tests } in runs {
        line(format_args!("run {} {}", program.path().display(), tests.join(" ")));
    }
    text
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unified => "unified",
            Self::Hybrid => "hybrid",
        })
    }
}
