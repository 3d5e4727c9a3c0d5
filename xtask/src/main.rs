//! `cargo xtask VERB`: what a developer and CI run. One file per verb.
//!
//! The library beside it finds the eBPF toolchain, for the build script too. What is
//! printed here is read by people who have never seen this project.

mod bench;
mod ci;
mod exec;
mod interrupt;
mod packages;
mod setup;
mod test;
mod up;
mod vm;

use std::{env, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Builds, tries and tests dist-ctl.
///
/// Start with `cargo xtask up`: it sets this machine up, builds, and runs a demo.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make this machine able to build the eBPF programs; only what is missing
    Setup,
    /// Run four demo servers behind one port, send them traffic and show the table
    Up(up::Arguments),
    /// Run all tests, those that need the kernel as root
    Test(test::Arguments),
    /// Run the tests on other kernels, each in a virtual machine
    Vm(vm::Arguments),
    /// Measure what dist-ctl costs, with real servers; see docs/benchmarks.md
    Bench(bench::Arguments),
    /// Run everything that CI runs
    Ci,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    env::set_current_dir(workspace).with_context(|| format!("go to {}", workspace.display()))?;
    match arguments.verb {
        Verb::Setup => setup::run(workspace).map(drop),
        Verb::Up(arguments) => up::run(workspace, &arguments),
        Verb::Test(arguments) => test::run(workspace, &arguments).map(drop),
        Verb::Vm(arguments) => vm::run(workspace, &arguments),
        Verb::Bench(arguments) => bench::run(workspace, &arguments),
        Verb::Ci => ci::run(workspace),
    }
}
