//! What a guest is to do: which tests, on which kernel, with which cgroups; and which not, and why.
//!
//! Written as the file that `tests/src/bin/guest/plan.rs` reads.

#![forbid(unsafe_code)]

use std::{
    fmt::{self, Write as _},
    path::Path,
    time::Duration,
};

use clap::ValueEnum;

use super::{
    kernels::Role,
    machine::{Access, Share},
    programs::Program,
};

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
    /// Those that have one of these in `PROGRAM::TEST`.
    Containing(&'w [String]),
}

/// How the names of the core's tests begin.
const CORE: [&str; 3] = ["fallback::", "guest::a_cpu", "guest::a_kernel"];

/// The programs to whose tests it may matter how cgroups are laid out.
const CGROUPS: [&str; 10] = [
    "adopt",
    "adoption",
    "doctor",
    "exhaustion",
    "fallback",
    "foreign",
    "lifetime",
    "load",
    "privileges",
    "supervision",
];

/// Its tests take one boot each, in this order, with a directory in common.
const REBOOT: &str = "reboot";

/// A test that is not run in a guest.
struct LeftOut {
    program: &'static str,
    /// All of them if there is none.
    test: Option<&'static str>,
    on: fn(Role) -> bool,
    why: &'static str,
}

/// For tests in which many handshakes end while others are handed over.
const RESET: &str = "emulated, the moment in which the kernel resets a handshake that ends while its room is emptied lasts \
                     far longer (README, by nature)";

const LEFT_OUT: [LeftOut; 11] = [
    LeftOut {
        program: "docs",
        test: None,
        on: |_| true,
        why: "it reads the repository, and is the same on every kernel",
    },
    LeftOut {
        program: "foreign",
        test: Some("an_event_that_is_told_twice_is_counted_once"),
        on: |_| true,
        why: RESET,
    },
    LeftOut {
        program: "guest",
        test: Some(REFUSED),
        on: |role| role != Role::Refused,
        why: "this kernel is not too old",
    },
    LeftOut {
        program: "guest",
        test: Some("a_kernel_that_does_not_wake_gets_the_bell"),
        on: |role| role != Role::NeverWakes,
        why: "this kernel wakes",
    },
    LeftOut {
        program: "guest",
        test: Some("a_kernel_that_wakes_gets_no_bell"),
        on: |role| role != Role::Works,
        why: "this kernel does not wake",
    },
    LeftOut {
        program: "counts",
        test: Some("the_largest_service_has_256_servers"),
        on: |_| true,
        why: "emulated, so many servers take a quarter of an hour to start",
    },
    LeftOut {
        program: "network",
        test: Some("nobody_is_reset_who_comes_from_afar_while_others_are_handed_over"),
        on: |_| true,
        why: RESET,
    },
    LeftOut {
        program: "recovery",
        test: Some("nobody_notices_200_deaths_of_the_distributor"),
        on: |_| true,
        why: RESET,
    },
    LeftOut {
        program: "waiting",
        test: Some("limits_are_exact_while_200_threads_wait_and_leave_in_every_way"),
        on: |_| true,
        why: RESET,
    },
    LeftOut {
        program: "waiting",
        test: Some("the_bell_wakes_servers_and_counts_nowhere"),
        on: |role| role != Role::Works,
        why: "it also switches the bell off, without which this kernel wakes nobody",
    },
    LeftOut {
        program: "keeper",
        test: Some("a_bell_that_cannot_be_rung_is_rung_later"),
        on: |role| role != Role::Works,
        why: "it is about a kernel that wakes, to show that nothing else does",
    },
];

/// The one test for a kernel that dist-ctl refuses.
const REFUSED: &str = "a_kernel_that_is_too_old_is_refused_in_one_sentence";

/// The real servers, by a word in the names of their tests, and the file of this machine that the guest
/// has to see for each.
const SERVERS: [(&str, &str); 6] = [
    ("gunicorn", "/usr/bin/gunicorn"),
    ("java", "/usr/bin/javac"),
    ("nginx", "/usr/sbin/nginx"),
    ("node", "/usr/bin/node"),
    ("python", "/usr/bin/python3"),
    ("tomcat", "/usr/share/tomcat10/bin/catalina.sh"),
];

/// The programs whose tests are about those servers.
const SERVED: [&str; 5] = ["foreign", "health", "rolls", "servers", "waiting"];

/// The tests of one program that are run.
pub(crate) struct Run<'p> {
    pub(crate) program: &'p Program,
    pub(crate) tests: Vec<&'p str>,
}

/// What a guest is to run, and what not.
#[derive(Default)]
pub(crate) struct Choice<'p> {
    /// What each boot runs.
    pub(crate) boots: Vec<Vec<Run<'p>>>,
    /// How many tests were wanted and are not run.
    pub(crate) left_out: usize,
    /// Which, and why: a line for each, or one for a whole program.
    pub(crate) reasons: Vec<String>,
}

pub(crate) fn choose<'p>(
    programs: &'p [Program],
    wanted: Wanted<'_>,
    role: Role,
    layout: Layout,
) -> Choice<'p> {
    let (mut choice, mut together) = (Choice::default(), Vec::new());
    for program in programs {
        let name = program.name.as_str();
        let (mut run, mut reasons) = (Run { program, tests: Vec::new() }, Vec::new());
        let is_named = |test: &String, parts: &[String]| {
            parts.iter().any(|part| format!("{name}::{test}").contains(part.as_str()))
        };
        for test in &program.tests {
            let full = format!("{name}::{}", test);
            let is_wanted = match wanted {
                Wanted::All => layout == Layout::Unified || CGROUPS.contains(&name),
                Wanted::Core => CORE.iter().any(|start| full.starts_with(start)),
                // The boots after the first are nothing without it.
                Wanted::Containing(parts) if name == REBOOT => {
                    program.tests.iter().any(|test| is_named(test, parts))
                }
                Wanted::Containing(parts) => is_named(test, parts),
            };
            if is_wanted {
                match why_not(name, test, role) {
                    None => run.tests.push(test),
                    Some(why) => reasons.push((full, why)),
                }
            }
        }
        choice.left_out += reasons.len();
        match &reasons[..] {
            [(_, why), more @ ..] if run.tests.is_empty() && more.iter().all(|(_, other)| other == why) => {
                choice.reasons.push(format!("{name} ({} tests): {why}", reasons.len()));
            }
            _ => choice.reasons.extend(reasons.iter().map(|(full, why)| format!("{full}: {why}"))),
        }
        if name == REBOOT {
            choice.boots.extend(run.tests.into_iter().map(|test| vec![Run { program, tests: vec![test] }]));
        } else if !run.tests.is_empty() {
            together.push(run);
        }
    }
    if !together.is_empty() {
        choice.boots.insert(0, together);
    }
    choice
}

/// Why a test is not run on such a kernel, or from this machine.
fn why_not(program: &str, test: &str, role: Role) -> Option<String> {
    if role == Role::Refused && test != REFUSED {
        return Some("dist-ctl refuses this kernel".to_owned());
    }
    let is_absent = |(server, file): &&(&str, &str)| test.contains(server) && !Path::new(file).exists();
    if SERVED.contains(&program)
        && let Some((_, file)) = SERVERS.iter().find(is_absent)
    {
        return Some(format!("there is no {file} on this machine: cargo xtask test installs it"));
    }
    let listed = LEFT_OUT.iter().find(|left_out| {
        left_out.program == program && left_out.test.is_none_or(|name| name == test) && (left_out.on)(role)
    });
    listed.map(|left_out| left_out.why.to_owned())
}

/// The file.
pub(crate) fn text(layout: Layout, modules: &[String], shares: &[Share], runs: &[Run<'_>]) -> String {
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
    for Share { tag, directory, access, .. } in shares {
        let access = match access {
            Access::Read => "ro",
            Access::Write => "rw",
        };
        line(format_args!("share {tag} {directory} {access}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Vec<Program> {
        let tests = |tests: &[&str]| tests.iter().map(|&test| test.to_owned()).collect();
        vec![
            Program::new("docs", tests(&["every_link_leads_to_a_file"])),
            Program::new("fallback", tests(&["the_next_best_server_takes_it"])),
            Program::new("guest", tests(&["a_kernel_that_is_too_old_is_refused_in_one_sentence"])),
            Program::new("reboot", tests(&["a_first_boot", "a_second_boot"])),
        ]
    }

    /// One that is called otherwise now would be run, or not be, without a word.
    #[test]
    fn whatever_is_named_here_is_there() {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests");
        let text = |program: &str| {
            let file = tests.join(program).with_extension("rs");
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        };
        CGROUPS.iter().chain(&SERVED).chain(&[REBOOT]).for_each(|program| drop(text(program)));
        for (program, start) in CORE.iter().map(|start| start.split_once("::").unwrap()) {
            assert!(text(program).contains(&format!("fn {start}")), "{program}: {start}");
        }
        for LeftOut { program, test, .. } in &LEFT_OUT {
            assert!(
                text(program).contains(&format!("fn {}", test.unwrap_or_default())),
                "{program}: {test:?}"
            );
        }
        for (server, _) in SERVERS {
            assert!(SERVED.iter().any(|program| text(program).contains(server)), "{server}");
        }
    }

    fn chosen(wanted: Wanted<'_>, role: Role, layout: Layout) -> (Vec<Vec<String>>, usize) {
        let programs = programs();
        let Choice { boots, left_out, .. } = choose(&programs, wanted, role, layout);
        let name = |run: &Run<'_>| format!("{} {}", run.program.name, run.tests.len());
        (boots.iter().map(|runs| runs.iter().map(name).collect()).collect(), left_out)
    }

    #[test]
    fn each_kernel_gets_the_tests_that_are_about_it() {
        use Layout::{Hybrid, Unified};
        let strings = |boots: &[&[&str]]| -> Vec<Vec<String>> {
            boots.iter().map(|boot| boot.iter().map(|&run| run.to_owned()).collect()).collect()
        };
        let everything: &[&[&str]] = &[&["fallback 1"], &["reboot 1"], &["reboot 1"]];
        let parts = ["second", "no such test"].map(|part| [part.to_owned()]);
        for (row, wanted, role, layout, boots, left_out) in [
            ("all", Wanted::All, Role::Works, Unified, everything, 2),
            ("what is about cgroups", Wanted::All, Role::Works, Hybrid, &[&["fallback 1"]], 0),
            ("the core", Wanted::Core, Role::Works, Unified, &[&["fallback 1"]], 1),
            (
                "by name",
                Wanted::Containing(&parts[0]),
                Role::Works,
                Unified,
                &[&["reboot 1"], &["reboot 1"]],
                0,
            ),
            ("too old", Wanted::All, Role::Refused, Unified, &[&["guest 1"]], 4),
            ("nothing", Wanted::Containing(&parts[1]), Role::Works, Unified, &[], 0),
        ] {
            assert_eq!(chosen(wanted, role, layout), (strings(boots), left_out), "{row}");
        }
    }
}
