//! How long a place stays free while somebody waits for it, and how many are handed over.
//!
//! The servers are this program itself, with a limit of 1, unmodified as any other: they wait
//! by epoll, accept, read a request, answer, and close. So each knows when it gave its place
//! back and when epoll woke it for the next one, and nobody else has to look.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    io::Errno,
};
use signal_hook::consts::SIGTERM;
use socket2::SockRef;
use tests::{
    app::App,
    host::{Host, Up},
};

use crate::{Run, load, statistics::quantile, table::Table};

const SERVICE: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 8080);

/// Of a waiting connection, from its place free to the server awake: at light load, and with
/// 10,000 waiting. Microseconds.
const LIGHT: (f64, f64) = (60.0, 300.0);
const CROWDED: f64 = 80.0;
/// Hand-overs per second with 4 servers of limit 1.
const RATE: f64 = 10_000.0;

pub(crate) fn run(run: &Run) -> Result<String> {
    let mut table =
        Table::new(["until the server is awake", "hand-overs", "median", "90 %", "99 %", "99.9 %"]);
    let mut histograms = Table::new(["microseconds from before close()", "light load", "crowded"]);
    let light = latency(run, 2, 16, Duration::from_millis(2), run.choose(5_000, 200))?;
    let crowd = run.choose(10_000, 1_000);
    let crowded = latency(run, 2, crowd, Duration::from_millis(2), run.choose(5_000, 200))?;
    let crowded_name = format!("crowded, {} waiting", crowd - 2);
    for (name, samples) in [("light load, 14 waiting", &light), (&crowded_name, &crowded)] {
        for (from, samples) in [("before close()", &samples.before), ("after close()", &samples.after)] {
            let quantile = |part| format!("{:.0} us", quantile(samples, part));
            let quantiles = [0.5, 0.9, 0.99, 0.999].map(quantile);
            table.row(
                [format!("{name}, from {from}"), samples.len().to_string()].into_iter().chain(quantiles),
            );
        }
    }
    let verdicts = [
        verdict("median at light load", &light, 0.5, LIGHT.0),
        verdict("99 % at light load", &light, 0.99, LIGHT.1),
        verdict("median when crowded", &crowded, 0.5, CROWDED),
    ];
    let mut from = 0.0;
    for to in [20.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0, f64::INFINITY] {
        let count = |samples: &[f64]| samples.iter().filter(|&&sample| from <= sample && sample < to).count();
        let range =
            if to.is_finite() { format!("{from:.0} to {to:.0}") } else { format!("{from:.0} and more") };
        histograms.row([range, count(&light.before).to_string(), count(&crowded.before).to_string()]);
        from = to;
    }

    let mut rates =
        Table::new(["servers", "limit of each", "in flight", "hand-overs/s", "of all connections", "budget"]);
    for (servers, limit, in_flight) in [(1, 1, 64), (2, 1, 64), (4, 1, 64), (4, 4, 64), (4, 1, 1_000)] {
        let (rate, part) = throughput(run, servers, limit, in_flight)?;
        let budget = if (servers, limit, in_flight) == (4, 1, 64) {
            format!("{RATE:.0}: {}", if rate >= RATE { "kept" } else { "missed" })
        } else {
            String::new()
        };
        rates.row([
            servers.to_string(),
            limit.to_string(),
            in_flight.to_string(),
            format!("{rate:.0}"),
            format!("{:.0} %", part * 100.0),
            budget,
        ]);
    }
    Ok(format!(
        "The place is freed somewhere inside close(), which itself takes its time.\n\n{table}\n\
         Budget: {}.\n\nHow often it took how long:\n\n{histograms}\n\
         As many as can be, each connection with one request; clients, servers and dist-ctl share the CPUs:\n\n{rates}",
        verdicts.join("; ")
    ))
}

/// How long places were free, in microseconds, sorted.
struct Samples {
    /// From before the server's close().
    before: Vec<f64>,
    /// From after it.
    after: Vec<f64>,
}

/// What is longer even from after close() is too long, and what is not even from before, is not.
fn verdict(what: &str, samples: &Samples, part: f64, budget: f64) -> String {
    let verdict = match (quantile(&samples.before, part) <= budget, quantile(&samples.after, part) <= budget)
    {
        (true, _) => "kept",
        (false, true) => "kept from after close(), missed from before",
        (false, false) => "missed",
    };
    format!("{what} at most {budget:.0} us: {verdict}")
}

/// The servers' samples, with so many clients of which each has its
/// turn again and again, and each turn takes so long.
fn latency(run: &Run, servers: usize, clients: usize, turn: Duration, wanted: u64) -> Result<Samples> {
    eprintln!("bench: {clients} clients of {servers} servers");
    let host = Host::new();
    let up = start(&host, servers, 1, turn, clients)?;
    let done = Arc::new(AtomicBool::new(false));
    let before = up.service().waiting.served;
    let clients = {
        let done = Arc::clone(&done);
        let connections: Vec<TcpStream> =
            (0..clients).map(|_| load::connect(SERVICE)).collect::<Result<_>>()?;
        // In the host's network: the thread inherits it.
        thread::spawn(move || keep(connections, &done))
    };
    while up.service().waiting.served - before < wanted {
        run.pause(Duration::from_millis(200))?;
        ensure!(!clients.is_finished(), "the clients have ended");
    }
    done.store(true, Ordering::Relaxed);
    clients.join().expect("clients do not panic")?;
    let samples = collect(&host, up, servers)?;
    ensure!(samples.before.len() as u64 >= wanted / 2, "{} of {wanted} samples", samples.before.len());
    Ok(samples)
}

/// Gives each client its turn in the order in which they are answered: it asks at once, reads
/// the answer, closes, and lines up again.
fn keep(connections: Vec<TcpStream>, done: &AtomicBool) -> Result<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut places: Vec<TcpStream> = Vec::new();
    for (place, mut stream) in connections.into_iter().enumerate() {
        stream.write_all(b"?").context("ask")?;
        epoll::add(&epoll, &stream, epoll::EventData::new_u64(place as u64), epoll::EventFlags::IN)?;
        places.push(stream);
    }
    let mut events = Vec::with_capacity(64);
    while !done.load(Ordering::Relaxed) {
        events.clear();
        let patience = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        match epoll::wait(&epoll, spare_capacity(&mut events), Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for answers"),
        }
        for event in &events {
            let place = event.data.u64() as usize;
            places[place].read_exact(&mut [0]).context("read an answer")?;
            let mut stream = load::connect(SERVICE)?;
            stream.write_all(b"?").context("ask")?;
            epoll::add(&epoll, &stream, epoll::EventData::new_u64(place as u64), epoll::EventFlags::IN)?;
            // The old one is closed here, by its client first, as HTTP clients do.
            places[place] = stream;
        }
    }
    Ok(())
}

/// Hand-overs per second, and what part of all connections they were.
fn throughput(run: &Run, servers: usize, limit: u32, in_flight: usize) -> Result<(f64, f64)> {
    eprintln!("bench: as fast as {servers} servers of limit {limit} can, {in_flight} in flight");
    let host = Host::new();
    let up = start(&host, servers, limit, Duration::ZERO, in_flight)?;
    load::connect_for(SERVICE, in_flight, run.choose(Duration::from_secs(1), Duration::from_millis(200)))?;
    let (before, start) = (up.service(), Instant::now());
    let piece = load::connect_for(
        SERVICE,
        in_flight,
        run.choose(Duration::from_secs(5), Duration::from_millis(500)),
    )?;
    let took = start.elapsed();
    let after = up.service();
    let handed = (after.waiting.served - before.waiting.served) as f64;
    collect(&host, up, servers)?;
    Ok((handed / took.as_secs_f64(), handed / piece.connections() as f64))
}

fn start<'h>(host: &'h Host, servers: usize, limit: u32, turn: Duration, waiting: usize) -> Result<Up<'h>> {
    host.open_directory("samples");
    let program = std::env::current_exe().context("find this program")?;
    let words = [
        program.to_str().context("our paths are text")?.to_owned(),
        "server".to_owned(),
        host.path_text("samples/{name}"),
        turn.as_micros().to_string(),
    ];
    let mut app = App::running(servers, words.to_vec());
    app.limit = Some(limit);
    app.tables = format!("[service.app.waiting]\ncapacity = {}\ntimeout = \"10m\"", waiting + 100);
    Ok(host.up(&app))
}

/// Stops the servers, which then write their samples.
fn collect(host: &Host, up: Up<'_>, servers: usize) -> Result<Samples> {
    up.stop();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for server in 1..=servers {
        let text = fs::read_to_string(host.path(&format!("samples/{server}"))).context("read the samples")?;
        for line in text.lines() {
            let (one, other) = line.split_once(' ').context("a sample is two numbers")?;
            before.push(one.parse()?);
            after.push(other.parse()?);
        }
    }
    before.sort_by(f64::total_cmp);
    after.sort_by(f64::total_cmp);
    Ok(Samples { before, after })
}

/// `bench server FILE MICROSECONDS`: such a server; each connection takes so long.
pub(crate) fn server(mut words: impl Iterator<Item = String>) -> Result<String> {
    let file = PathBuf::from(words.next().context("FILE is missing")?);
    let turn = Duration::from_micros(words.next().context("MICROSECONDS is missing")?.parse()?);
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, Arc::clone(&stop))?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, SERVICE.port()))?;
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &listener, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    let mut text = String::new();
    let mut freed: Option<(Instant, Instant)> = None;
    let mut events = Vec::with_capacity(1);
    while !stop.load(Ordering::Relaxed) {
        events.clear();
        match epoll::wait(epoll.as_fd(), spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let woken = Instant::now();
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some((begun, ended)) = freed.take() {
            let [before, after] = [begun, ended].map(|since| woken.duration_since(since).as_secs_f64() * 1e6);
            text.push_str(&format!("{before:.1} {after:.1}\n"));
        }
        freed = serve(stream, turn).unwrap_or(None);
    }
    fs::write(file, text)?;
    Ok(String::new())
}

/// Serves one connection. When its close() began and ended, if it came to that.
fn serve(mut stream: TcpStream, turn: Duration) -> Result<Option<(Instant, Instant)>> {
    stream.set_nonblocking(false)?;
    let mut request = [0; 1024];
    let read = stream.read(&mut request)?;
    if read == 0 {
        return Ok(None);
    }
    if turn.is_zero() {
        // For `load::connect_for`, which waits for the end.
        let answer =
            format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nserver=bench pid={} \n", std::process::id());
        stream.write_all(answer.as_bytes())?;
        return Ok(None);
    }
    thread::sleep(turn);
    stream.write_all(b"!")?;
    if stream.read(&mut request)? != 0 {
        bail!("it asks again");
    }
    // By a reset, which frees the place first of all: what an orderly close does before that, to
    // the end of the client's answer to it, is not ours.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    let freed = Instant::now();
    drop(stream);
    Ok(Some((freed, Instant::now())))
}
