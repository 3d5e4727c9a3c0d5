//! Nanoseconds per run of each program, by the kernel's own statistics.
//!
//! Statistics are asked for by a descriptor (BPF_ENABLE_STATS), so they are off again as soon
//! as this process is gone, whatever ended it. Each program runs as it does in use: in the
//! middle of real connections to real servers, one for each slot, and not in a loop with
//! everything in the cache. (BPF_PROG_TEST_RUN knows none of these kinds of program.)
#![forbid(unsafe_code)]

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use tests::{app::App, host::Host};

use crate::{
    Run,
    bpf::{CGROUP_SOCK_ADDR, Empty, Runs, SK_REUSEPORT, SOCK_OPS},
    load::connect_for,
    servers::{STEERED, demo},
    statistics::Spread,
    table::Table,
};

const SLOTS: [usize; 3] = [8, 64, 256];

const POLICIES: [&str; 5] =
    ["least-connections", "weighted-round-robin", "power-of-two", "source-hash", "first"];

/// Of each server; never reached.
const LIMIT: u32 = 1000;

/// Few: with both CPUs of a small machine saturated, each run would also wait for the other.
const IN_FLIGHT: usize = 4;

/// For `select` with 8 and with 256 slots, in nanoseconds.
const BUDGETS: [(usize, f64); 2] = [(8, 500.0), (256, 1000.0)];

/// What was measured with one number of slots.
#[derive(Default)]
struct Column {
    /// By policy.
    select: Vec<f64>,
    track: Vec<f64>,
    track_runs_per_connection: Vec<f64>,
    track_per_connection: Vec<f64>,
    bind: Vec<f64>,
}

pub(crate) fn run(run: &Run) -> Result<String> {
    let _statistics = enable_stats(Stats::RunTime).context("ask the kernel to time its programs")?;
    let empty = empty_program(run)?;
    let mut columns = Vec::new();
    for slots in SLOTS {
        let mut column = Column::default();
        for policy in POLICIES {
            measure(run, slots, policy, &mut column)?;
        }
        columns.push(column);
    }

    let mut table = Table::new(["nanoseconds per run", "8 slots", "64 slots", "256 slots"]);
    let mut row = |name: &str, value: &dyn Fn(&Column) -> f64, digits: usize| {
        let values = columns.iter().map(|column| format!("{:.digits$}", value(column)));
        table.row([name.to_owned()].into_iter().chain(values));
    };
    for (number, policy) in POLICIES.iter().enumerate() {
        row(&format!("select, {policy}"), &|column| column.select[number], 0);
    }
    row("track", &|column| median(&column.track), 0);
    row("track, runs per connection", &|column| median(&column.track_runs_per_connection), 1);
    row("track, per connection", &|column| median(&column.track_per_connection), 0);
    row("bind4, once for each server", &|column| median(&column.bind), 0);
    row("an empty program", &|_| empty, 0);

    let verdicts = BUDGETS.map(|(slots, budget)| {
        let column = SLOTS.iter().position(|other| *other == slots).expect("it is measured");
        let slowest = columns[column].select.iter().copied().fold(0.0, f64::max);
        let verdict = if slowest < budget { "kept" } else { "missed" };
        format!("under {budget} ns with {slots} slots: {verdict} ({slowest:.0})")
    });
    Ok(format!(
        "Every slot has a server, all are eligible, each has a limit. The figures contain what the \
         measurement itself costs, which is what an empty program takes.\n\n{table}\n\
         Budget of select, by its slowest policy: {}.",
        verdicts.join("; ")
    ))
}

fn median(values: &[f64]) -> f64 {
    Spread::of(values.to_vec()).median
}

/// Runs so many servers under a policy, and lets clients connect.
fn measure(run: &Run, slots: usize, policy: &'static str, column: &mut Column) -> Result<()> {
    let (pieces, during) = run.choose((15, Duration::from_millis(200)), (3, Duration::from_millis(100)));
    eprintln!("bench: {slots} servers, {policy}");
    run.check()?;
    let host = Host::new();
    let up = host.up(&App { policy: Some(policy), limit: Some(LIMIT), ..demo(slots) });
    let distributor = up.distributor().pid;
    connect_for(STEERED, IN_FLIGHT, during)?;

    let mut select = Vec::new();
    for _ in 0..pieces {
        run.check()?;
        let before = (Runs::of(distributor, SK_REUSEPORT)?, Runs::of(distributor, SOCK_OPS)?);
        let connections = connect_for(STEERED, IN_FLIGHT, during)?.connections() as f64;
        // Connections that are not quite closed yet are the next piece's: as many as came to
        // this one from the last.
        let selects = Runs::of(distributor, SK_REUSEPORT)?.since(before.0);
        let tracks = Runs::of(distributor, SOCK_OPS)?.since(before.1);
        ensure!(selects.count as f64 >= connections, "select ran {} times for {connections}", selects.count);
        select.extend(selects.each());
        column.track.extend(tracks.each());
        column.track_runs_per_connection.push(tracks.count as f64 / connections);
        column.track_per_connection.push(tracks.nanoseconds as f64 / connections);
    }
    column.select.push(median(&select));
    let binds = Runs::of(distributor, CGROUP_SOCK_ADDR)?;
    column.bind.push(binds.each().context("no server was seen to bind")?);
    up.stop();
    Ok(())
}

/// What a program that does nothing takes: the cost of measuring.
fn empty_program(run: &Run) -> Result<f64> {
    let connections = run.choose(2000, 200);
    let program = Empty::load()?;
    let pid = std::process::id() as i32;
    let _host = Host::new();
    let listener = shared_listener()?;
    program.attach(&listener)?;
    let address = listener.local_addr().context("ask the listener for its address")?;
    let mut pieces = Vec::new();
    for _ in 0..10 {
        run.check()?;
        let before = Runs::of(pid, SK_REUSEPORT)?;
        for _ in 0..connections {
            let client = TcpStream::connect(address).context("connect to ourselves")?;
            let (server, _) = listener.accept().context("accept from ourselves")?;
            // The server first, or the client's ports would be used up by TIME_WAIT.
            drop(server);
            drop(client);
        }
        pieces.extend(Runs::of(pid, SK_REUSEPORT)?.since(before).each());
    }
    ensure!(!pieces.is_empty(), "the empty program never ran");
    Ok(median(&pieces))
}

fn shared_listener() -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(128).context("listen for ourselves")?;
    Ok(socket.into())
}
