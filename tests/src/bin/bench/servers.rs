//! The sides of a comparison: servers behind dist-ctl, and the same behind nothing.
//!
//! In most benchmarks both are `dist-ctl demo` with a listener as standard input, in a session of its own (with
//! the kernel's autogroups, a session is what gets CPU time), and nothing else. One listener
//! is made by dist-ctl, the other here, with plain SO_REUSEPORT: the kernel's own hash
//! chooses among those.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::setsid;
use socket2::{Domain, SockAddr, Socket, Type};
use tests::{
    app::App,
    host::{Host, Up, program},
    leftover,
    process::Process,
};

use crate::{Run, load::Kept};

/// Servers on either side.
pub(crate) const SERVERS: usize = 4;

/// Where dist-ctl's side listens, and where the other does.
pub(crate) const STEERED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
pub(crate) const PLAIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);

/// As long as dist-ctl makes it by default.
const BACKLOG: i32 = 4096;

/// Demo servers behind dist-ctl.
pub(crate) fn demo(servers: usize) -> App {
    let program = program().to_str().expect("our paths are text").to_owned();
    App { listen: vec!["0.0.0.0:8080".to_owned()], ..App::running(servers, vec![program, "demo".to_owned()]) }
}

/// Both sides, in this host's network.
pub(crate) struct Sides<'h> {
    pub(crate) steered: Up<'h>,
    plain: Plain,
}

impl<'h> Sides<'h> {
    /// Starts both, and waits until every server answers.
    pub(crate) fn start(run: &Run, host: &'h Host) -> Result<Self> {
        let app = App { socket: Some("stdin"), ..demo(SERVERS) };
        let sides = Self { steered: host.up(&app), plain: demo_plain(host)? };
        for address in [STEERED, PLAIN] {
            each_server(run, address)?;
        }
        Ok(sides)
    }

    /// The processes of all servers.
    pub(crate) fn servers(&self) -> Servers {
        Servers {
            steered: self.steered.service().servers.into_iter().filter_map(|server| server.pid).collect(),
            plain: self.plain.processes(),
        }
    }

    /// Stops both, and checks that nothing of dist-ctl is left.
    pub(crate) fn stop(self) {
        drop(self.plain);
        self.steered.stop();
    }
}

/// The processes of each side, by their ids.
pub(crate) struct Servers {
    pub(crate) steered: Vec<i32>,
    pub(crate) plain: Vec<i32>,
}

/// A connection to each server behind an address.
pub(crate) fn each_server(run: &Run, address: SocketAddr) -> Result<Vec<Kept>> {
    let mut connections: Vec<Kept> = Vec::new();
    // The kernel's hash needs a few tries: so many miss one of four once in 10^62 times.
    for _ in 0..500 {
        run.check()?;
        let connection = Kept::open(address)?;
        if connections.iter().all(|other| other.server != connection.server) {
            connections.push(connection);
        }
        if connections.len() == SERVERS {
            return Ok(connections);
        }
    }
    bail!("only {} of {SERVERS} servers answer at {address}", connections.len())
}

/// Demo servers with plain SO_REUSEPORT.
fn demo_plain(host: &Host) -> Result<Plain> {
    let mut servers = Vec::new();
    for number in 1..=SERVERS {
        let mut command = Command::new(program());
        command.arg("demo").env("DIST_CTL_SERVER", format!("app/{number}"));
        servers.push((command, listener(PLAIN.port())?));
    }
    Plain::start(host, servers)
}

/// Servers that nobody stands before, until this is dropped.
pub(crate) struct Plain(Vec<Child>);

impl Plain {
    /// Runs each command with its listener as standard input.
    pub(crate) fn start(host: &Host, commands: Vec<(Command, Socket)>) -> Result<Self> {
        let mut servers = Self(Vec::new());
        for (mut command, listener) in commands {
            command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::null());
            // SAFETY: setsid is one system call that touches no memory, so it may run between
            // fork and exec.
            unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
            let child = command.spawn().context("start a server")?;
            if let Some(process) = Process::find(child.id() as i32) {
                leftover::note(&host.path(""), process).context("note a server")?;
            }
            servers.0.push(child);
        }
        Ok(servers)
    }

    /// Their processes, in the order of the commands.
    pub(crate) fn processes(&self) -> Vec<i32> {
        self.0.iter().map(|child| child.id() as i32).collect()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It fails if the child was waited for, and nobody does that.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A listener with plain SO_REUSEPORT: the kernel's hash chooses among those of one port.
pub(crate) fn listener(port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SockAddr::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
    socket.listen(BACKLOG).context("listen for the plain servers")?;
    Ok(socket)
}
