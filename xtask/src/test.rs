//! `cargo xtask test`: every test there is, and a failure if none was run.
//!
//! The unit tests run as whoever calls. The package `tests` drives the release build of
//! dist-ctl on the running kernel, so its programs run as root, through sudo if need be;
//! they are compiled by the caller, so that root leaves nothing in the target directory.

#![forbid(unsafe_code)]

use std::{
    fs,
    io::{IsTerminal as _, stdout},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    exec::{as_root, build_next_release, build_release, cargo, exec_watched, read, say, shown},
    packages::{self, Package},
    setup, up,
};

/// The packages of the servers that nobody here wrote, one to a line.
const PACKAGES: &str = "tests/fixtures/packages.txt";

/// `SK_REUSEPORT` programs that migrate connections came with Linux 5.14.
const OLDEST_KERNEL: (u32, u32) = (5, 14);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Leave out the tests that need root and a kernel with BPF
    #[arg(long)]
    no_kernel: bool,
}

impl Arguments {
    pub(crate) fn all() -> Self {
        Self { filter: None, no_kernel: false }
    }
}

/// How many tests passed.
pub(crate) struct Passed {
    pub(crate) unit: u32,
    pub(crate) kernel: u32,
}

pub(crate) fn run(workspace: &Path, arguments: &Arguments) -> Result<Passed> {
    setup::run(workspace)?;
    // What may need a password or may turn out impossible comes first.
    if !arguments.no_kernel {
        check_kernel()?;
        install_servers(workspace)?;
    }
    let mut unit = cargo();
    unit.args(["test", "--workspace", "--exclude", "tests", "--no-fail-fast"]);
    let mut passed = Passed { unit: count(&mut unit, arguments)?, kernel: 0 };

    if arguments.no_kernel {
        say("test: --no-kernel: the tests that need root and BPF were left out");
    } else {
        let (program, next) = (build_release()?, build_next_release()?);
        say("test: trying whether dist-ctl can run here at all");
        up::try_once(&program).context("dist-ctl cannot run on this machine, so its tests cannot")?;
        passed.kernel = count(&mut on_the_kernel(&program, &next)?, arguments)?;
        ensure!(
            passed.kernel > 0 || arguments.filter.is_some(),
            "no test ran on the kernel: the package `tests` has none"
        );
    }
    let Passed { unit, kernel } = passed;
    match &arguments.filter {
        Some(filter) => ensure!(unit + kernel > 0, "no test has {filter:?} in its name"),
        None => ensure!(unit > 0, "no unit test ran"),
    }
    say(&format!("test: {unit} unit tests and {kernel} tests on the kernel passed"));
    Ok(passed)
}

/// The integration tests, told which dist-ctl they are about, and which one comes after it.
fn on_the_kernel(program: &Path, next: &Path) -> Result<Command> {
    let host = read(cargo().arg("-vV"))?;
    let host =
        host.lines().find_map(|line| line.strip_prefix("host: ")).context("cargo -vV names its host")?;
    // sudo takes the environment away, and asking it not to may be forbidden.
    let mut runner = as_root("env")?;
    runner.arg(format!("DIST_CTL_BIN={}", program.display()));
    runner.arg(format!("DIST_CTL_NEXT_BIN={}", next.display()));
    let words = [runner.get_program()].into_iter().chain(runner.get_args());
    // A Rust list of texts is one in TOML too.
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let mut command = cargo();
    command.args(["test", "--package", "tests", "--no-fail-fast"]);
    command.args(["--config", &format!("target.{host}.runner={words:?}")]);
    Ok(command)
}

/// Runs tests and adds up what each of their programs says at its end.
fn count(command: &mut Command, arguments: &Arguments) -> Result<u32> {
    command.args(&arguments.filter).arg("--");
    if stdout().is_terminal() {
        // It writes to us.
        command.arg("--color=always");
    }
    say(&format!("test: {}", shown(command)));
    let mut passed = 0;
    exec_watched(command, |line| {
        say(line);
        passed += passed_in(line);
    })?;
    Ok(passed)
}

/// `test result: ok. 12 passed; 0 failed; ...`, where `ok` may be coloured.
fn passed_in(line: &str) -> u32 {
    let Some(result) = line.strip_prefix("test result: ") else {
        return 0;
    };
    let before = result.split(" passed;").next().and_then(|before| before.rsplit(' ').next());
    before.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// What a kernel must have, as far as reading files tells; starting dist-ctl tells the rest.
fn check_kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    let mut numbers = release.split(['.', '-']).map(|number| number.trim().parse::<u32>());
    if let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) {
        ensure!(
            (major, minor) >= OLDEST_KERNEL,
            "the tests need Linux {}.{} or newer, and this is {}",
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1,
            release.trim()
        );
    }
    let filesystems = fs::read_to_string("/proc/filesystems").context("read /proc/filesystems")?;
    for (name, without) in [("bpf", "cannot keep BPF objects"), ("cgroup2", "has no cgroup v2")] {
        ensure!(
            filesystems.lines().any(|line| line.split_whitespace().last() == Some(name)),
            "the tests need a kernel with {name}: this one {without}"
        );
    }
    Ok(())
}

fn install_servers(workspace: &Path) -> Result<()> {
    let list = fs::read_to_string(workspace.join(PACKAGES)).with_context(|| format!("read {PACKAGES}"))?;
    let names = list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    if !packages::here() {
        say(&format!(
            "test: this is no Debian: the tests expect {} here",
            names.collect::<Vec<_>>().join(", ")
        ));
        return Ok(());
    }
    packages::install(
        "test",
        names.map(|name| Package::new(name, "the tests put its servers behind dist-ctl")).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_tests_are_counted_from_the_last_line() {
        for (line, passed) in [
            (
                "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
                12,
            ),
            ("test result: \u{1b}[32mok\u{1b}(B\u{1b}[m. 7 passed; 0 failed; 0 ignored", 7),
            ("test result: FAILED. 3 passed; 1 failed; 0 ignored", 3),
            ("test result: ok. 0 passed; 0 failed; 0 ignored", 0),
            ("test nothing_is_said_as_12 passed; ... ok", 0),
            ("running 12 tests", 0),
        ] {
            assert_eq!(passed_in(line), passed, "{line}");
        }
    }
}
