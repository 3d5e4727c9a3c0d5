//! Another program takes over from a running one: `dist-ctl upgrade`.
//!
//! Three sides. The command (`upgrade`) asks the distributor and waits for the outcome. The
//! distributor (`try_out`) opens the file once and runs it on trial from that descriptor, so
//! that what was tried is what takes over. The trial (`trial`) reads the configuration and has
//! the kernel load the programs, and changes nothing. What follows is the monitor's: it starts
//! the next distributor from the descriptor, and goes back if that one does not get ready.
#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use distributor_ebpf::contract;
use rustix::{fs::OFlags, process::Signal};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
    time::timeout,
};

use crate::{
    cli::Source,
    control::{self, ASK_TIMEOUT, Response, TRIAL_TIMEOUT},
    error::UserError,
    kernel,
    message::Exit,
    status::Status,
};

/// How long a trial may take. The verifier needs most of it, on a slow machine.
const TRIAL_TIME: Duration = Duration::from_secs(30);

/// How long the command waits for one or the other distributor. Longer than the monitor does.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it asks.
const POLL: Duration = Duration::from_millis(50);

/// More than a trial has to say.
const WORDS: u64 = 64 * 1024;

/// What a program on trial prints. By it we know that it is one of ours at all.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "trial", rename_all = "lowercase")]
enum Verdict {
    Passed {
        version: String,
        /// The version of the contract with the kernel programs.
        contract: u32,
    },
    Failed {
        why: String,
    },
}

/// A program that has passed its trial, and is to take over.
#[derive(Debug)]
pub struct Candidate {
    pub file: File,
    /// What the log says of it.
    pub name: String,
}

/// Which program a file holds: another one has another text.
pub fn build(file: &Metadata) -> String {
    format!("{:x}-{:x}-{:x}-{:x}.{:09}", file.dev(), file.ino(), file.len(), file.mtime(), file.mtime_nsec())
}

/// That of this process's own program, also when its file has been replaced or removed.
pub fn own_build() -> String {
    fs::metadata("/proc/self/exe").map(|file| build(&file)).unwrap_or_default()
}

/// What the next distributor says of a program that did not get ready.
pub fn not_upgraded(exit: Exit) -> String {
    let how = match exit {
        Exit::Unknown => "could not be started".to_owned(),
        exit => format!("{exit} before it was ready"),
    };
    format!("the program that was to take over {how}, so the one before goes on; the log has its words")
}

/// Says whether this program could be the distributor for this configuration. Changes nothing.
pub fn trial(source: &Source) -> anyhow::Result<ExitCode> {
    // Nobody else would end it if it hung.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("end with its parent")?;
    let (verdict, code) = match judge(source) {
        Ok(()) => {
            let (version, contract) = (env!("CARGO_PKG_VERSION").to_owned(), contract::VERSION);
            (Verdict::Passed { version, contract }, ExitCode::SUCCESS)
        }
        Err(error) => (Verdict::Failed { why: format!("{error:#}") }, ExitCode::FAILURE),
    };
    writeln!(io::stdout(), "{}", serde_json::to_string(&verdict)?).context("say how the trial went")?;
    Ok(code)
}

fn judge(source: &Source) -> anyhow::Result<()> {
    source.read()?;
    ensure!(rustix::process::geteuid().is_root(), "it needs root");
    kernel::trial()
}

/// Runs the program on trial, with this process's own arguments.
///
/// # Errors
/// What the client is answered: why the program cannot take over.
pub async fn try_out(path: &str) -> Result<Candidate, Response> {
    let refused = |why: String| Response::input(format!("upgrade to {path}: {why}"));
    if !Path::new(path).is_absolute() {
        return Err(refused("write the whole path, from / on".to_owned()));
    }
    // Without waiting for somebody to write to a pipe.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| refused(error.to_string()))?;
    let facts = file.metadata().map_err(|error| refused(error.to_string()))?;
    if !facts.is_file() || facts.permissions().mode() & 0o111 == 0 {
        return Err(refused("it is not an executable file".to_owned()));
    }
    let mut child = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .arg0("dist-ctl")
        .arg("trial")
        // After the program's name and "distributor".
        .args(env::args_os().skip(2))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What it logs is worth having there.
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| refused(format!("it does not run: {error}")))?;
    let stdout = child.stdout.take();
    let tried = async { tokio::join!(words(stdout), child.wait()) };
    let Ok((said, status)) = timeout(TRIAL_TIME, tried).await else {
        return Err(refused(format!("its trial has not ended after {} s", TRIAL_TIME.as_secs())));
    };
    let status = status.map_err(|error| refused(format!("wait for its trial: {error}")))?;
    match serde_json::from_str(&said) {
        Ok(Verdict::Passed { version, contract }) if status.success() => {
            Ok(Candidate { file, name: format!("{path} (dist-ctl {version}, contract {contract})") })
        }
        Ok(Verdict::Failed { why }) => {
            Err(Response::failure(format!("upgrade to {path}: on trial it said: {why}")))
        }
        Ok(Verdict::Passed { .. }) | Err(_) => {
            Err(refused(format!("it is not a dist-ctl that can take over: its trial ended with {status}")))
        }
    }
}

/// Everything from a pipe, up to a bound. Whoever says more finds it closed.
async fn words(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        // What was read until an error is all there is.
        let _ = pipe.take(WORDS).read_to_end(&mut said).await;
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// Has the running distributor replaced by this program, and waits until it is, or is not.
/// Gives what to tell the operator.
pub fn upgrade(runtime_dir: &Path, program: &Path) -> anyhow::Result<String> {
    let shown = program.display();
    let wrong = |why: &dyn std::fmt::Display| UserError::new(format!("upgrade to {shown}: {why}"));
    let facts = fs::metadata(program).map_err(|error| wrong(&error))?;
    let wanted = build(&facts);
    let path = program.to_str().ok_or_else(|| wrong(&"its path is no text"))?;
    let before = match control::ask(runtime_dir, &control::Command::Status, ASK_TIMEOUT)?.into_result()? {
        Some(status) => status,
        None => bail!("ask dist-ctl on {}: it did not say its status", runtime_dir.display()),
    };
    if before.build == wanted {
        return Ok(format!("dist-ctl on {} runs {shown} already", runtime_dir.display()));
    }
    // Without an answer it may have made room so fast that none got through.
    if let Some(response) = control::exchange(
        runtime_dir,
        &control::Command::Upgrade { program: path.to_owned() },
        TRIAL_TIMEOUT,
    )? {
        response.into_result()?;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        match control::ask(runtime_dir, &control::Command::Status, ASK_TIMEOUT) {
            Ok(Response::Status(Status { version, build, .. })) if build != before.build => {
                return Ok(format!(
                    "dist-ctl on {} was upgraded from {} to {version}, {shown}; servers and connections were kept",
                    runtime_dir.display(),
                    before.version
                ));
            }
            Ok(Response::Status(Status { not_upgraded: Some(why), .. })) => {
                bail!("upgrade to {shown}: {why}")
            }
            // The one that was asked is gone, and the other program has never been started.
            Ok(Response::Status(Status { pid, .. })) if pid != before.pid => bail!(
                "upgrade to {shown}: the distributor (pid {}) ended before it had tried the program, and was \
                 followed by one like it: see the log, and try again",
                before.pid
            ),
            // It has not gone yet, or the next one is not there yet.
            Ok(_) => {}
            Err(error) if !control::is_up(runtime_dir) => return Err(error).context("look who took over"),
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            bail!(
                "upgrade to {shown}: nobody has taken over after {} s: see the log and dist-ctl status",
                PATIENCE.as_secs()
            );
        }
        thread::sleep(POLL);
    }
}

/// The program that this command itself is.
pub fn own_program() -> anyhow::Result<PathBuf> {
    let program = env::current_exe().context("find our own program")?;
    match fs::metadata(&program) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("upgrade to our own program: its file is gone: name it with --binary FILE")
        }
        _ => Ok(program),
    }
}
