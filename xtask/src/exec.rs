//! Running other programs, and one sentence when one fails.
//!
//! Whatever a program says goes straight to the terminal, so the sentence here repeats
//! none of it: it names the command and how it ended.

#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Runs a command to its end; an error if it fails.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {}", shown(command)))?;
    ensure!(status.success(), "{} ended with {status}", shown(command));
    Ok(())
}

/// The same, and gives what it printed to standard output too.
pub(crate) fn exec_watched(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("run {}", shown(command)))?;
    let output = child.stdout.take().context("it was asked for")?;
    for bytes in BufReader::new(output).split(b'\n') {
        let bytes = bytes.with_context(|| format!("read what {} prints", shown(command)))?;
        line(&String::from_utf8_lossy(&bytes));
    }
    let status = child.wait().with_context(|| format!("wait for {}", shown(command)))?;
    ensure!(status.success(), "{} ended with {status}", shown(command));
    Ok(())
}

/// What a command prints; its complaints are nobody's business.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::null()).output().with_context(|| format!("run {}", shown(command)))?;
    ensure!(output.status.success(), "{} ended with {}", shown(command), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A command that runs as root: as it is when we are, or else through sudo.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root()? {
        return Ok(Command::new(program));
    }
    let Some(sudo) = find("sudo") else {
        bail!("a step has to run as root, and there is no sudo: run this as root");
    };
    let mut command = Command::new(sudo);
    command.arg("--").arg(program);
    Ok(command)
}

pub(crate) fn is_root() -> Result<bool> {
    // /proc/self belongs to the effective user.
    let own = fs::metadata("/proc/self").context("look at /proc/self")?;
    Ok(own.uid() == 0)
}

/// Where a program of this name is on PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// The release build of dist-ctl, brought up to date.
pub(crate) fn build_release() -> Result<PathBuf> {
    say(&format!("building dist-ctl: {}", shown(&release())));
    exec(&mut release())?;
    let program = target()?.join("release/dist-ctl");
    ensure!(program.is_file(), "cargo built no {}", program.display());
    Ok(program)
}

/// The same with the contract after this one, for the tests of moving from one to the other. In a
/// target directory of its own, or it would overwrite the other.
pub(crate) fn build_next_release() -> Result<PathBuf> {
    let directory = target()?.join("next");
    let mut build = release();
    build.args(["--features", "next-contract", "--target-dir"]).arg(&directory);
    say(&format!("building dist-ctl with the next contract: {}", shown(&build)));
    exec(&mut build)?;
    let program = directory.join("release/dist-ctl");
    ensure!(program.is_file(), "cargo built no {}", program.display());
    Ok(program)
}

/// Cargo's target directory.
pub(crate) fn target() -> Result<PathBuf> {
    // We are TARGET/debug/xtask ourselves, wherever TARGET is.
    let own = env::current_exe().context("find our own program")?;
    Ok(own.ancestors().nth(2).context("xtask is in target/debug")?.to_owned())
}

/// One line of progress, in order with what the programs that we run print.
pub(crate) fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    // Nobody reads any more; what we do does not depend on it.
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

/// A command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut text = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    format!("`{text}`")
}

fn release() -> Command {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "distributor-user"]);
    command
}
