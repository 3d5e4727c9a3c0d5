//! What a guest runs: the programs of the tests, dist-ctl, and what they need of this machine.
//!
//! They are the builds that run here as well. The guest gets their shared libraries in its
//! initramfs, and sees the host's /usr, read-only, for the programs that tests start (cp, nginx,
//! java); so the two have the same libraries.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::archive::Archive;
use crate::exec::{build_next_release, build_release, cargo, exec, read, say, shown, target};

/// Where the tests find everything, laid out like cargo's directory.
const TARGET: &str = "/target";

/// What servers of Debian's packages and the C library look for in /etc. Alternatives are links that lead
/// from /usr/bin to where a program is.
const CONFIGURATION: [&str; 7] =
    ["alternatives", "group", "java-17-openjdk", "java-21-openjdk", "ld.so.cache", "passwd", "tomcat10"];

/// One program of tests.
#[derive(Debug)]
pub(crate) struct Program {
    /// `waiting`, of `tests/tests/waiting.rs`.
    pub(crate) name: String,
    pub(crate) tests: Vec<String>,
    file: PathBuf,
}

/// Builds the programs of the tests, and asks each what is in it.
pub(crate) fn build() -> Result<Vec<Program>> {
    let mut build = cargo();
    build.args(["test", "--release", "--package", "tests", "--no-run", "--color=never"]);
    say(&format!("vm: {}", shown(&build)));
    let mut child = build.stderr(Stdio::piped()).spawn().with_context(|| format!("run {}", shown(&build)))?;
    let mut programs = Vec::new();
    for line in BufReader::new(child.stderr.take().context("it was asked for")?).lines() {
        let line = line.context("read what cargo says")?;
        match executable(&line) {
            Some((name, file)) => programs.push(Program {
                name: name.to_owned(),
                tests: tests_of(Path::new(file))?,
                file: file.into(),
            }),
            None => say(&line),
        }
    }
    let status = child.wait().context("wait for cargo")?;
    ensure!(status.success(), "{} ended with {status}", shown(&build));
    ensure!(!programs.is_empty(), "{} named no program", shown(&build));
    Ok(programs)
}

/// `  Executable tests/waiting.rs (target/release/deps/waiting-0123456789abcdef)`
fn executable(line: &str) -> Option<(&str, &str)> {
    let (source, file) = line.trim().strip_prefix("Executable tests/")?.split_once(".rs (")?;
    Some((source, file.strip_suffix(')')?))
}

/// All its tests, in alphabetical order; also those that cargo test leaves out.
fn tests_of(file: &Path) -> Result<Vec<String>> {
    let listed = read(Command::new(file).args(["--list", "--format=terse"]))?;
    let names: BTreeSet<_> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    Ok(names.into_iter().map(str::to_owned).collect())
}

impl Program {
    #[cfg(test)]
    pub(crate) fn new(name: &str, tests: Vec<String>) -> Self {
        Self { name: name.to_owned(), tests, file: PathBuf::new() }
    }

    /// Where the guest has it.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new(TARGET).join("release/deps").join(&self.name)
    }
}

/// All that a guest needs besides its kernel and its plan.
pub(crate) fn pack(workspace: &Path, directory: &Path, programs: &[&Program]) -> Result<Archive> {
    let mut archive = Archive::new()?;
    let release = Path::new(TARGET).join("release");
    let mut files = vec![(PathBuf::from("/init"), built("guest")?)];
    files.push((release.join("dist-ctl"), build_release()?));
    for name in ["test-server", "impostor"] {
        files.push((release.join(name), built(name)?));
    }
    if programs.iter().any(|program| program.name == "contract") {
        files.push((Path::new(TARGET).join("next/release/dist-ctl"), build_next_release()?));
        // It is compiled by the test, which knows it by its path here.
        let fixtures = workspace.join("tests/fixtures");
        archive.copy_tree(&fixtures, &fixtures)?;
    }
    files.extend(programs.iter().map(|program| (program.path(), program.file.clone())));

    let stripped = directory.join("stripped");
    let mut libraries = BTreeSet::new();
    for (path, file) in &files {
        libraries.extend(libraries_of(file)?);
        // Of no use in the guest, and most of a program.
        exec(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(file))?;
        archive.copy(path, &stripped)?;
    }
    for library in libraries {
        archive.copy(&library, &library)?;
    }
    // /lib and others are links into /usr on most machines, and are so in the guest.
    for directory in ["/bin", "/lib", "/lib32", "/lib64", "/sbin"].map(Path::new) {
        if let Ok(target) = fs::read_link(directory) {
            archive.link(directory, &target)?;
        }
    }
    for name in CONFIGURATION {
        let path = Path::new("/etc").join(name);
        if path.is_dir() {
            archive.copy_tree(&path, &path)?;
        } else if path.is_file() {
            archive.copy(&path, &path)?;
        }
    }
    archive.text(Path::new("/etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    // Compiling them takes the guest minutes.
    let classes = target()?.join("test-classes");
    if classes.is_dir() {
        archive.copy_tree(&Path::new(TARGET).join("test-classes"), &classes)?;
    }
    for empty in ["/proc", "/sys", "/run", "/tmp", "/root", "/usr", "/var/tmp"] {
        archive.directory(Path::new(empty))?;
    }
    Ok(archive)
}

/// A program of the package `tests`, which was built with its tests.
fn built(name: &str) -> Result<PathBuf> {
    let file = target()?.join("release").join(name);
    ensure!(file.is_file(), "cargo built no {}", file.display());
    Ok(file)
}

/// The shared libraries that a program is linked against, and the loader, in their real directories:
/// `/usr/lib64/ld-linux-x86-64.so.2`, where /lib64 is a link.
fn libraries_of(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let listed = read(Command::new("ldd").arg(program).env("LC_ALL", "C"))?;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths
        .map(|path| {
            let path = Path::new(path);
            let (directory, name) = path.parent().zip(path.file_name()).context("a library is a file")?;
            let directory = directory.canonicalize().with_context(|| format!("find {}", path.display()))?;
            Ok(directory.join(name))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_names_the_programs_it_built() {
        for (line, named) in [
            (
                "  Executable tests/cli.rs (target/release/deps/cli-0a)",
                Some(("cli", "target/release/deps/cli-0a")),
            ),
            ("  Executable unittests src/lib.rs (target/release/deps/tests-0a)", None),
            ("   Compiling tests v0.1.0 (/w/tests)", None),
        ] {
            assert_eq!(executable(line), named, "{line}");
        }
    }
}
