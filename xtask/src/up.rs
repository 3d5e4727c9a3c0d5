//! `cargo xtask up`: dist-ctl at work, with servers that need nothing installed.
//!
//! Sets up, builds, starts `dist-ctl up` as root with four demo servers, sends them traffic
//! over plain TCP and shows the table. dist-ctl stays in the foreground with us, so Ctrl-C
//! reaches it; we only ask it to stop when that did not.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    exec::{as_root, build_release, exec, say, shown},
    interrupt, setup,
};

const SERVERS: usize = 4;
const THREADS: usize = 4;
const REQUESTS_PER_THREAD: usize = 100;

/// Connections that are held open while the table is shown: an idle table shows nothing.
const HELD: usize = 42;

/// How long starting, one request and stopping may each take before we call it a failure.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long after Ctrl-C the demo may take before we ask it ourselves.
const GRACE: Duration = Duration::from_secs(3);

const POLL: Duration = Duration::from_millis(50);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The port of the demo service
    #[arg(long, default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Stop after the table has been shown
    #[arg(long)]
    once: bool,
}

/// What to do after the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Stop,
    WaitForCtrlC,
}

pub(crate) fn run(workspace: &Path, arguments: &Arguments) -> Result<()> {
    setup::run(workspace)?;
    let program = build_release()?;
    show(&program, arguments.port, if arguments.once { Then::Stop } else { Then::WaitForCtrlC })
}

/// Runs the demo; an error unless all of it worked and nothing is left running.
pub(crate) fn show(program: &Path, port: u16, then: Then) -> Result<()> {
    interrupt::note();
    let mut demo = Demo::start(program, port)?;
    let shown = demo.wait_ready().and_then(|()| demo.show(then));
    let stopped = demo.stop();
    // Asked to stop, whatever else failed did so for that reason.
    if interrupt::asked() { stopped } else { shown.and(stopped) }
}

/// Whether dist-ctl works on this machine at all, told by starting it.
pub(crate) fn try_once(program: &Path) -> Result<()> {
    interrupt::note();
    let mut demo = Demo::start(program, free_port()?)?;
    let ready = demo.wait_ready();
    ready.and(demo.stop())
}

/// A port that nobody uses at the moment.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.port())
}

/// A running `dist-ctl up`.
struct Demo {
    program: PathBuf,
    runtime: PathBuf,
    port: u16,
    child: Child,
    /// The lines it prints.
    printed: mpsc::Receiver<String>,
}

impl Demo {
    fn start(program: &Path, port: u16) -> Result<Self> {
        let address = address(port);
        let runtime = PathBuf::from(format!("/run/dist-ctl-demo-{port}"));
        if runtime.join("control.sock").exists() {
            say("up: stopping a demo that was left running");
            // If it is only a stale socket there is nobody to stop; the start will tell.
            let _ = dist_ctl(program, &runtime)?.arg("down").stdin(Stdio::null()).status();
        }
        TcpListener::bind(address).map_err(|why| match why.kind() {
            io::ErrorKind::AddrInUse => anyhow::anyhow!(
                "port {port} is taken by another program: stop that, or choose another port with \
                 `cargo xtask up --port {}`",
                port.checked_add(1).unwrap_or(8080)
            ),
            _ => anyhow::anyhow!("try port {port}: {why}"),
        })?;

        let mut command = dist_ctl(program, &runtime)?;
        command.args(["up", "--listen", &address.to_string(), "--servers", &SERVERS.to_string()]);
        command.args(["--name", "demo", "--"]).arg(program).arg("demo");
        say(&format!("up: starting {}", shown(&command)));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", shown(&command)))?;
        let output = child.stdout.take().context("it was asked for")?;
        let (sender, printed) = mpsc::channel();
        // Ends with the demo, which has the other end of the pipe.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                say(&line);
                let _ = sender.send(line);
            }
        });
        Ok(Self { program: program.to_owned(), runtime, port, child, printed })
    }

    /// Waits for the line that `dist-ctl up` prints once all servers are steered to.
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.printed.recv_timeout(POLL) {
                Ok(line) if line.starts_with("demo: listening on ") => return Ok(()),
                Ok(_) | Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().context("wait for dist-ctl")?;
                    bail!("start the demo: dist-ctl up ended with {status}");
                }
            }
            ensure!(!interrupt::asked(), "start the demo: interrupted");
            ensure!(Instant::now() < deadline, "start the demo: its servers were not ready in {PATIENCE:?}");
        }
    }

    fn show(&mut self, then: Then) -> Result<()> {
        let url = format!("http://localhost:{}/", self.port);
        let requests = THREADS * REQUESTS_PER_THREAD;
        say(&format!("up: {url} answers; sending {requests} requests, each on a connection of its own"));
        let answers = send(self.port)?;
        let mut told = String::from("up: answered by");
        for (server, count) in &answers {
            let _ = write!(told, " {server}: {count},");
        }
        say(told.trim_end_matches(','));
        ensure!(answers.len() == SERVERS, "{SERVERS} servers should have answered, {} did", answers.len());

        let held = (0..HELD).map(|_| connect(self.port)).collect::<Result<Vec<_>>>()?;
        say(&format!("up: with {HELD} connections held open, `dist-ctl status` says:"));
        exec(self.dist_ctl()?.arg("status"))?;
        drop(held);
        if then == Then::Stop {
            return Ok(());
        }
        say(&format!("up: try `curl {url}`, several times; Ctrl-C stops it"));
        loop {
            if interrupt::asked() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait().context("wait for dist-ctl")? {
                bail!("the demo ended by itself with {status}");
            }
            thread::sleep(POLL);
        }
    }

    /// Sees to it that it ends; whether it ended well.
    fn stop(&mut self) -> Result<()> {
        let mut ended = None;
        if interrupt::asked() {
            // Ctrl-C went to it too, and asking twice would mean: hurry.
            ended = self.wait(GRACE)?;
        }
        if ended.is_none() {
            ended = self.wait(Duration::ZERO)?;
        }
        if ended.is_none() {
            say("up: stopping the demo");
            let asked = self.dist_ctl().and_then(|mut down| exec(down.arg("down")));
            ended = self.wait(PATIENCE)?;
            if ended.is_none() {
                asked?;
            }
        }
        match ended {
            None => {
                bail!("stop the demo: dist-ctl up still runs after {PATIENCE:?} (pid {})", self.child.id())
            }
            Some(status) if !status.success() => bail!("dist-ctl up ended with {status}"),
            Some(_) => {
                say("up: stopped");
                Ok(())
            }
        }
    }

    fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.child.try_wait().context("wait for dist-ctl")?;
            if ended.is_some() || Instant::now() >= deadline {
                return Ok(ended);
            }
            thread::sleep(POLL);
        }
    }

    fn dist_ctl(&self) -> Result<Command> {
        dist_ctl(&self.program, &self.runtime)
    }
}

fn dist_ctl(program: &Path, runtime: &Path) -> Result<Command> {
    let mut command = as_root(program)?;
    command.arg("--runtime-dir").arg(runtime);
    Ok(command)
}

/// All addresses, of both families where there are both.
fn address(port: u16) -> SocketAddr {
    if Path::new("/proc/net/if_inet6").exists() {
        (Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, port).into()
    }
}

/// A few hundred short connections from a few threads: how many each server answered.
fn send(port: u16) -> Result<BTreeMap<String, usize>> {
    let clients: Vec<_> = (0..THREADS)
        .map(|_| {
            thread::spawn(move || {
                (0..REQUESTS_PER_THREAD).map(|_| request(port)).collect::<Result<Vec<String>>>()
            })
        })
        .collect();
    let mut answers = BTreeMap::new();
    for client in clients {
        let servers = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        for server in servers {
            *answers.entry(server).or_default() += 1;
        }
    }
    Ok(answers)
}

/// One request on one connection: the name of the server that answered.
fn request(port: u16) -> Result<String> {
    let mut stream = connect(port)?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .context("send a request")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read an answer")?;
    server_in(&answer)
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connect to the demo")?;
    stream.set_read_timeout(Some(PATIENCE)).context("limit the wait for an answer")?;
    Ok(stream)
}

/// The demo server says its own name, `demo/3`.
fn server_in(answer: &str) -> Result<String> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.lines().next().unwrap_or("");
    ensure!(status.starts_with("HTTP/1.1 200 "), "the demo answered {status:?}");
    let name =
        body.split(|c: char| c != '/' && !c.is_ascii_alphanumeric()).find(|word| word.starts_with("demo/"));
    name.map(str::to_owned).with_context(|| format!("the demo's answer names no server: {body:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_is_found_in_its_answer() {
        for (answer, server) in [
            (
                "HTTP/1.1 200 OK\r\n\r\nserver=demo/3 pid=17 client=127.0.0.1:4 connections=1\n",
                Some("demo/3"),
            ),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\ndemo/3", None),
            ("HTTP/1.1 200 OK\r\n\r\nhello", None),
            ("", None),
        ] {
            assert_eq!(server_in(answer).ok().as_deref(), server, "{answer:?}");
        }
    }
}
