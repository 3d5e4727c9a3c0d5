//! `cargo xtask bench`: measures, prints, and with `--write` notes it in docs/benchmarks.md.
//!
//! Each benchmark is one run of the program `bench` of the package `tests`, as root, which
//! prints one section. In the document a section stands between two marks; the sentences
//! around it are written by hand and stay. A plot is a file of its own beside the document.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::{
    exec::{as_root, build_release, cargo, exec, exec_watched, say, shown, target},
    interrupt, setup,
};

const DOCUMENT: &str = "docs/benchmarks.md";

/// The plot of the one benchmark that draws one.
const PLOT: &str = "docs/accept.svg";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this one
    name: Option<Name>,
    /// Note the results in docs/benchmarks.md, and plots beside it
    #[arg(long)]
    write: bool,
    /// Few and short pieces: to see that it works, not to measure
    #[arg(long, conflicts_with = "write")]
    quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// New connections per second, against plain SO_REUSEPORT
    Connections,
    /// Requests on an established connection, against plain SO_REUSEPORT
    Latency,
    /// How fast those who wait are handed over
    Handover,
    /// A costly request: a shared listener, plain SO_REUSEPORT and a waiting list
    Accept,
    /// One of four servers is ten times slower, with and without weights that follow load
    Slow,
    /// Nanoseconds per run of each eBPF program
    Programs,
    /// What clients feel of a flood of SYNs
    Flood,
    /// CPU and memory while no client connects
    Idle,
    /// What the kernel's verifier has to do for each eBPF program
    Verifier,
}

pub(crate) fn run(workspace: &Path, arguments: &Arguments) -> Result<()> {
    let toolchain = setup::run(workspace)?;
    let program = build_release()?;
    // The same object that was just built into dist-ctl; the verifier's benchmark loads it.
    let object = toolchain.build_object(&target()?.join("ebpf"), &[])?.path;
    let bench = build_bench()?;

    // The benchmark hears of Ctrl-C as well, cleans up, and ends; then so do we.
    interrupt::note();
    let names = arguments.name.as_ref().map_or(Name::value_variants(), std::slice::from_ref);
    let mut sections = vec![("machine".to_owned(), machine()?)];
    say(&sections[0].1);
    // Noted at the end like the sections: an interrupted run changes nothing in docs.
    let plot = target()?.join("accept.svg");
    let mut plotted = false;
    for which in names {
        ensure!(!interrupt::asked(), "bench: interrupted");
        let value = which.to_possible_value().context("no benchmark is hidden")?;
        let name = value.get_name();
        say(&format!("\nbench: {name}\n"));
        // sudo takes the environment away.
        let mut command = as_root("env")?;
        command.arg(format!("DIST_CTL_BIN={}", program.display())).arg(&bench).arg(name);
        command.arg("--object").arg(&object);
        if arguments.quick {
            command.arg("--quick");
        }
        if arguments.write && *which == Name::Accept {
            // Made by us, so that it is ours when root has filled it.
            fs::write(&plot, "").with_context(|| format!("write {}", plot.display()))?;
            command.arg("--plot").arg(&plot);
            plotted = true;
        }
        sections.push((name.to_owned(), section(&mut command)?));
    }
    if arguments.write {
        let old = fs::read_to_string(DOCUMENT).with_context(|| format!("read {DOCUMENT}"))?;
        fs::write(DOCUMENT, noted(old, &sections)?).with_context(|| format!("write {DOCUMENT}"))?;
        say(&format!("bench: noted in {DOCUMENT}"));
        if plotted {
            fs::copy(&plot, PLOT).with_context(|| format!("write {PLOT}"))?;
            say(&format!("bench: drawn in {PLOT}"));
        }
    }
    Ok(())
}

fn build_bench() -> Result<PathBuf> {
    let mut command = cargo();
    // The test server is for the benchmarks whose clients are greeted.
    command.args(["build", "--release", "--package", "tests", "--bins"]);
    say(&format!("bench: {}", shown(&command)));
    exec(&mut command)?;
    Ok(target()?.join("release/bench"))
}

/// What a benchmark prints, shown as it comes.
fn section(command: &mut Command) -> Result<String> {
    let mut section = String::new();
    exec_watched(command, |line| {
        say(line);
        section.push_str(line);
        section.push('\n');
    })?;
    Ok(section.trim().to_owned())
}

/// What has to be known of a machine to read its numbers, and no more.
fn machine() -> Result<String> {
    let cpus = thread::available_parallelism().context("count the CPUs")?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    // Behind it stands who built it.
    let release = release.trim().split(['-', '+']).next().unwrap_or_default();
    let facts = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let is_virtual = facts.split_whitespace().any(|word| word == "hypervisor");
    let kind = if is_virtual { "virtual " } else { "" };
    Ok(format!("{cpus} {kind}CPUs ({}), Linux {release}.", std::env::consts::ARCH))
}

/// The document with these sections in the place of the old ones.
fn noted(mut document: String, sections: &[(String, String)]) -> Result<String> {
    for (name, section) in sections {
        let (begin, end) = (format!("<!-- bench {name} -->\n"), format!("<!-- end {name} -->\n"));
        let place = document.find(&begin).zip(document.find(&end));
        let Some((from, to)) =
            place.map(|(from, to)| (from + begin.len(), to)).filter(|(from, to)| from <= to)
        else {
            bail!("{DOCUMENT}: {:?} and {:?} mark no place in it", begin.trim(), end.trim());
        };
        document.replace_range(from..to, &format!("\n{section}\n\n"));
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_its_marks_is_replaced() {
        let old = "# A\n<!-- bench idle -->\nold\n<!-- end idle -->\nB\n<!-- bench latency -->\n<!-- end latency -->\n";
        let new = noted(old.to_owned(), &[("idle".to_owned(), "new".to_owned())]).unwrap();
        assert_eq!(
            new,
            "# A\n<!-- bench idle -->\n\nnew\n\n<!-- end idle -->\nB\n<!-- bench latency -->\n<!-- end latency -->\n"
        );
        assert_eq!(noted(new.clone(), &[("idle".to_owned(), "new".to_owned())]).unwrap(), new);
    }

    #[test]
    fn a_document_without_the_marks_is_not_touched() {
        for document in ["", "<!-- bench idle -->\n", "<!-- end idle -->\n<!-- bench idle -->\n"] {
            assert!(
                noted(document.to_owned(), &[("idle".to_owned(), "new".to_owned())]).is_err(),
                "{document}"
            );
        }
    }

    #[test]
    fn the_document_has_a_place_for_every_section() {
        let document = include_str!("../../docs/benchmarks.md");
        let names = Name::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        let names = names.map(|value| value.get_name().to_owned()).chain(["machine".to_owned()]);
        let sections: Vec<_> = names.map(|name| (name, String::new())).collect();
        noted(document.to_owned(), &sections).unwrap();
    }
}
