//! `cargo xtask ci`: what must hold before a change is taken, and nothing that may vary.
//!
//! Formatting, lints for the host and for the eBPF target, all tests, the core of them on the oldest
//! kernel that we promise, the documentation, and the demo once. Stops at the first step that fails.

#![forbid(unsafe_code)]

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use xtask::toolchain::{HIDE, Toolchain};

use crate::{
    exec::{build_release, cargo, exec, read, say, shown, target},
    packages::{self, Package},
    setup, test,
    up::{self, Then},
    vm,
};

pub(crate) fn run(workspace: &Path) -> Result<()> {
    let toolchain = setup::run(workspace)?;
    install_linters(&toolchain)?;
    // What the guest needs is known to be here before the first step begins.
    vm::prepare()?;

    step(cargo().args(["fmt", "--all", "--check"]))?;
    // Without the toolchain, because anybody should be able to run it.
    step(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]).env(HIDE, "none"))?;
    step(&mut toolchain.clippy(&target()?.join("ebpf")))?;
    build_without_toolchain_says_so()?;

    let passed = test::run(workspace, &test::Arguments::all())?;
    say("ci: the core of the tests on another kernel, in a virtual machine");
    let booted = vm::core(workspace).context("the tests on another kernel")?;

    step(cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    say("ci: the demo");
    up::show(&build_release()?, up::free_port()?, Then::Stop).context("the demo")?;
    let test::Passed { unit, kernel } = passed;
    say(&format!(
        "ci: all is well; {unit} unit tests, {kernel} on the kernel and {booted} on another passed"
    ));
    Ok(())
}

fn step(command: &mut Command) -> Result<()> {
    say(&format!("ci: {}", shown(command)));
    exec(command)
}

/// Somebody who has not run `cargo xtask setup` must read why the build failed, and a
/// program without its eBPF half must never be built.
fn build_without_toolchain_says_so() -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--package", "distributor-user"]).env(HIDE, "none");
    say(&format!("ci: {} without the eBPF toolchain must fail and say why", shown(&build)));
    let output = build.output().with_context(|| format!("run {}", shown(&build)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{} succeeded without the eBPF toolchain", shown(&build));
    ensure!(
        said.contains("the eBPF programs are not built: "),
        "{} did not say that the eBPF programs are not built, but:\n{said}",
        shown(&build)
    );
    Ok(())
}

/// rustup's usual profile has rustfmt and clippy; Debian's packages leave them out, and the
/// compiler of the eBPF programs may be another one that needs a clippy of its own.
fn install_linters(toolchain: &Toolchain) -> Result<()> {
    let mut wanted = Vec::new();
    if read(cargo().args(["fmt", "--version"])).is_err() {
        wanted.push(Package::new("rustfmt-web", "cargo fmt is not there"));
    }
    if !toolchain.has_clippy() || read(cargo().args(["clippy", "--version"])).is_err() {
        wanted.push(Package::new(
            "rust-web-clippy",
            "the eBPF programs are linted by their own compiler's clippy",
        ));
    }
    if packages::here() {
        packages::install("ci", wanted)?;
    }
    ensure!(
        toolchain.has_clippy(),
        "there is no clippy beside {toolchain}: with rustup, `rustup component add clippy --toolchain nightly`"
    );
    Ok(())
}
