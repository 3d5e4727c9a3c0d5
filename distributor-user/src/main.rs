//! `dist-ctl`: connections of one address, distributed over several servers by the kernel.
//!
//! Which of its processes this one is, is in the arguments: the command line of an operator, the
//! monitor (`up`), the distributor or one on trial, a launcher on its way to be a server, a keeper
//! of rooms, the doctor's examiner, or the demo server.
#![forbid(unsafe_code)]

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use distributor_user::{
    cli::{Command, Form, Invocation},
    config::Config,
    control::{self, ASK_TIMEOUT, Response, TRIAL_TIMEOUT},
    demo, distributor,
    doctor::{self, Shown},
    error,
    instance::{self, Instance},
    keeper,
    kernel::ProgramLog,
    launch,
    lock::{DistributorLock, Lock},
    logging::{self, Verbosity},
    monitor,
    record::{self, Record},
    restart, service,
    status::Status,
    upgrade,
};

/// Draining and stopping are bounded by the configuration, whose bounds are minutes.
const DOWN_TIMEOUT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let invocation = Invocation::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    logging::set_up(invocation.verbosity);
    match perform(&invocation) {
        Ok(code) => code,
        Err(error) => {
            logging::say(format_args!("dist-ctl: {}", error::sentence(&error)));
            ExitCode::from(error::exit_code(&error))
        }
    }
}

fn perform(invocation: &Invocation) -> anyhow::Result<ExitCode> {
    let directory = &invocation.runtime_dir;
    match &invocation.command {
        Command::Up(source) => {
            return monitor::run(invocation.distributor_arguments(source), directory);
        }
        Command::Distributor(source) => {
            let log = match invocation.verbosity {
                Verbosity::Verbose => ProgramLog::On,
                Verbosity::Normal | Verbosity::Quiet => ProgramLog::Off,
            };
            distributor::run(source, directory, log)?;
        }
        Command::Trial(source) => return upgrade::trial(source),
        Command::Launch => return Ok(launch::run()),
        Command::Keep(cgroup) => return Ok(keeper::run(cgroup)),
        Command::Demo { listen, name } => {
            demo::run(demo::Options { listen: listen.clone(), name: name.clone() })?;
        }
        Command::Status(form) => {
            if let Response::Status(status) = ask(directory, &control::Command::Status)? {
                show(&status, *form)?;
            }
        }
        Command::Change(command) => {
            if let Response::Changes(lines) = ask(directory, command)? {
                let lines = if lines.is_empty() { vec!["nothing to change".to_owned()] } else { lines };
                print(&(lines.join("\n") + "\n"))?;
            }
        }
        Command::RestartAndWait(restart, target) => {
            ask(directory, restart)?;
            let is_quiet = invocation.verbosity == Verbosity::Quiet;
            restart::follow(
                directory,
                target.as_deref(),
                |line| if is_quiet { Ok(()) } else { print(line) },
            )?;
        }
        Command::DrainAndWait(drain, server) => {
            ask(directory, drain)?;
            control::wait_drained(directory, server)?;
        }
        Command::Down => match control::down(directory, DOWN_TIMEOUT) {
            Err(_) if !control::is_up(directory) && Instance::is_abandoned(directory) => {
                let _lock = Lock::take(directory)?;
                let _instance = instance::lock(instance::cgroup(directory)?.path())?;
                let _distributor = DistributorLock::take(directory)?;
                // Without one, or one that can be read, nobody is known who was adopted.
                let record = Record::read(directory).ok().flatten();
                let instance = Instance::find(directory)?;
                // Whoever was adopted has the address for himself before anything else is removed, or it would
                // go on by a plan and counts that nobody keeps.
                instance.end_processes()?;
                let services = record.iter().flat_map(|record| &record.services);
                services.flat_map(record::Service::guests).for_each(service::give_back);
                instance.remove()?;
            }
            answer => {
                answer?.into_result()?;
            }
        },
        Command::Upgrade(binary) => {
            let program = match binary {
                Some(binary) => std::path::absolute(binary)?,
                None => upgrade::own_program()?,
            };
            print(&format!("{}\n", upgrade::upgrade(directory, &program)?))?;
        }
        Command::Check(file) => {
            let config = Config::read(file)?;
            print(&config.to_string())?;
        }
        Command::Doctor(form) => {
            let report = doctor::run(directory)?;
            print(&match form {
                Form::Json => serde_json::to_string_pretty(&report)? + "\n",
                Form::Table if invocation.verbosity == Verbosity::Quiet => report.table(Shown::Wrong),
                Form::Table => report.table(Shown::All),
            })?;
            return Ok(if report.works() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Examine(cgroup) => return Ok(doctor::examine(cgroup.as_deref())),
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(directory: &Path, command: &control::Command) -> anyhow::Result<Response> {
    let timeout = match command {
        // A service may begin with it.
        control::Command::Adopt { .. } | control::Command::Reload { .. } => TRIAL_TIMEOUT,
        _ => ASK_TIMEOUT,
    };
    match control::ask(directory, command, timeout) {
        Err(_) if !control::is_up(directory) && Instance::is_abandoned(directory) => bail!(
            "the dist-ctl on {} was killed; its servers run on, and nobody watches them: dist-ctl up \
             goes on with them, dist-ctl down ends them",
            directory.display()
        ),
        answer => answer?.succeeded(),
    }
}

fn show(status: &Status, form: Form) -> anyhow::Result<()> {
    let text = match form {
        Form::Json => serde_json::to_string_pretty(status)? + "\n",
        Form::Table => status.table(width(), SystemTime::now()),
    };
    print(&text)
}

/// What somebody asked for: that it cannot be written is a failure, and no panic.
fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        // The reader has seen enough: status | head.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}

/// The columns of the terminal; `None` where the output goes elsewhere and nothing is cut.
fn width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}
