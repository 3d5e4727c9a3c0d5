//! A costly request under load, by three ways to share one port among workers.
//!
//! Cloudflare's experiment ("Why does one NGINX worker take all the load?"): with one shared
//! listener the latencies are even and the work is not; with SO_REUSEPORT it is the other way
//! round. With dist-ctl, a limit of 1 and a waiting list, both should be even.
//!
//! The worker is this program itself (`bench worker`), the same for all three: it inherits a
//! listener as standard input and never learns whose else it is.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs,
    hint::black_box,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
    time::{Duration, Instant},
};

use ::tests::{
    app::App,
    host::{Host, Up},
};
use anyhow::{Context as _, Result, ensure};
use rustix::{
    buffer::spare_capacity,
    event::epoll,
    io::Errno,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_gettime},
};

use crate::{
    Run, cpu, load,
    plot::{self, Curve, Look},
    servers::{Plain, listener},
    statistics::{Spread, quantile},
    table::Table,
};

/// CPU time of one request, as in the experiment: 30 ms on average with 200 in flight and 12
/// workers are 1.8 ms for each.
const REQUEST: Duration = Duration::from_millis(2);

/// In flight for each worker, rounded from 200 for 12: so a queue is as long as there.
const IN_FLIGHT_PER_WORKER: usize = 16;

/// Of the deviation with dist-ctl over that with the shared listener, and of its unevenness
/// over that with SO_REUSEPORT: as good, but for what a measurement is off.
const DEVIATION: f64 = 1.1;
const UNEVENNESS: f64 = 1.05;

const SHARED: usize = 0;
const REUSEPORT: usize = 1;
const DIST_CTL: usize = 2;

/// One way to share a port.
struct SetUp {
    name: &'static str,
    address: SocketAddr,
    /// The workers' processes.
    workers: Vec<i32>,
}

/// What came of a piece of load.
struct Measured {
    /// Requests per second.
    rate: f64,
    /// In milliseconds, sorted.
    latencies: Vec<f64>,
    /// The most that a worker did, over the mean of all: 1 is even.
    uneven_requests: f64,
    uneven_cpu: f64,
}

/// The pieces of one set-up, one for each round.
#[derive(Default)]
struct Pieces {
    /// So many in flight that every worker is always busy.
    heavy: Vec<Measured>,
    /// One in flight: who gets the work when all are idle?
    light: Vec<Measured>,
}

/// One of the two.
type OfLoad = fn(&Pieces) -> &Vec<Measured>;

pub(crate) fn run(run: &Run) -> Result<String> {
    let (rounds, during) = run.choose((30, Duration::from_secs(2)), (2, Duration::from_millis(500)));
    // One for each CPU and pinned to it, as there: more would share CPUs, and the scheduler's
    // slices, which are as long as a request, would be in every figure.
    let workers = sched_getaffinity(None).context("ask for our CPUs")?.count() as usize;
    let in_flight = workers * IN_FLIGHT_PER_WORKER;
    let work = work_for(REQUEST)?;

    let host = Host::new();
    let (shared, reuseport) = (address(8081), address(8082));
    // It is alone at its port, so there is nothing to choose for SO_REUSEPORT.
    let one = listener(shared.port())?;
    let inherited = plain(&host, workers, work, || one.try_clone().context("share a listener"))?;
    let hashed = plain(&host, workers, work, || listener(reuseport.port()))?;
    let up = steered(&host, workers, work, in_flight)?;
    let pids = up.service().servers.into_iter().filter_map(|server| server.pid).collect();
    let set_ups = [
        SetUp { name: "shared listener", address: shared, workers: inherited.processes() },
        SetUp { name: "SO_REUSEPORT", address: reuseport, workers: hashed.processes() },
        SetUp { name: "dist-ctl, limit 1", address: address(8080), workers: pids },
    ];
    for set_up in &set_ups {
        measure(set_up, in_flight, during / 2)?;
    }

    let own = [up.monitor().pid, up.distributor().pid];
    let own_time =
        || own.iter().try_fold(Duration::ZERO, |sum, pid| Ok::<_, anyhow::Error>(sum + cpu::time_of(*pid)?));
    let (before, before_time) = (up.service(), own_time()?);
    let mut pieces = [const { Pieces { heavy: Vec::new(), light: Vec::new() } }; 3];
    for round in 0..rounds {
        for turn in 0..set_ups.len() {
            // Each is first in every third round.
            let which = (round + turn) % set_ups.len();
            run.check()?;
            let heavy = measure(&set_ups[which], in_flight, during)?;
            let light = measure(&set_ups[which], 1, during / 4)?;
            eprintln!(
                "bench: round {} of {rounds}: {}: {:.1} ms on average, deviation {:.2} ms",
                round + 1,
                set_ups[which].name,
                heavy.average(),
                heavy.deviation()
            );
            pieces[which].heavy.push(heavy);
            pieces[which].light.push(light);
        }
    }
    let (after, spent) = (up.service(), own_time()? - before_time);
    // The list was what they went through, and no worker ever held two.
    let waited = after.waiting.served - before.waiting.served;
    let requests: usize = pieces[DIST_CTL].heavy.iter().map(|piece| piece.latencies.len()).sum();
    ensure!(waited >= requests as u64, "{requests} requests under load, and {waited} of them waited");
    for server in &after.servers {
        ensure!(server.connections_max == 1, "{} held {} connections", server.name, server.connections_max);
    }
    up.stop();

    if let Some(file) = &run.plot {
        let svg = drawn(&set_ups, &pieces, in_flight);
        fs::write(file, svg).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(format!(
        "{workers} workers, each pinned to a CPU of its own; {in_flight} connections in flight, each with one request of \
         {REQUEST:?} of CPU time; {rounds} rounds of one piece of {during:?} for each. Medians of the rounds, and the \
         longest of all:\n\n{}\n\
         The busiest worker, over the mean of all (1 is even, {workers} is one that does everything). Under load all are \
         busy; when one request is in flight at a time, all are free to take it:\n\n{}\n\
         Compared within each round:\n\n{}\n\
         dist-ctl's own processes took {:.0} us of CPU time for a connection that waited.",
        latencies(&set_ups, &pieces),
        evenness(&set_ups, &pieces, in_flight),
        comparison(&pieces),
        spent.as_secs_f64() * 1e6 / waited as f64,
    ))
}

fn latencies(set_ups: &[SetUp], pieces: &[Pieces]) -> Table {
    let mut table =
        Table::new(["milliseconds", "average", "deviation", "median", "99 %", "longest", "requests/s"]);
    for (set_up, pieces) in set_ups.iter().zip(pieces) {
        let longest =
            pieces.heavy.iter().filter_map(|piece| piece.latencies.last()).fold(0.0, |a, b| b.max(a));
        table.row([
            set_up.name.to_owned(),
            format!("{:.2}", median(&pieces.heavy, Measured::average)),
            format!("{:.2}", median(&pieces.heavy, Measured::deviation)),
            format!("{:.2}", median(&pieces.heavy, |piece| quantile(&piece.latencies, 0.5))),
            format!("{:.2}", median(&pieces.heavy, |piece| quantile(&piece.latencies, 0.99))),
            format!("{longest:.2}"),
            format!("{:.0}", median(&pieces.heavy, |piece| piece.rate)),
        ]);
    }
    table
}

fn evenness(set_ups: &[SetUp], pieces: &[Pieces], in_flight: usize) -> Table {
    let under_load = format!("{in_flight} in flight: requests");
    let mut table = Table::new(["most / mean", &under_load, "CPU time", "1 in flight: requests", "CPU time"]);
    for (set_up, pieces) in set_ups.iter().zip(pieces) {
        table.row([
            set_up.name.to_owned(),
            format!("{:.2}", median(&pieces.heavy, |piece| piece.uneven_requests)),
            format!("{:.2}", median(&pieces.heavy, |piece| piece.uneven_cpu)),
            format!("{:.2}", median(&pieces.light, |piece| piece.uneven_requests)),
            format!("{:.2}", median(&pieces.light, |piece| piece.uneven_cpu)),
        ]);
    }
    table
}

fn comparison(pieces: &[Pieces; 3]) -> Table {
    let mut table = Table::new(["dist-ctl / other", "median", "quartiles", "95 % of median", "budget"]);
    let mut row = |name: &str, load: OfLoad, other: usize, of: fn(&Measured) -> f64, most: Option<f64>| {
        let pairs = load(&pieces[DIST_CTL]).iter().zip(load(&pieces[other]));
        let spread = Spread::of(pairs.map(|(own, other)| of(own) / of(other)).collect());
        let [median, quartiles, interval] = spread.cells();
        let budget = most.map_or_else(String::new, |most| {
            let verdict = if spread.median <= most { "kept" } else { "missed" };
            format!("at most {most}: {verdict}")
        });
        table.row([name.to_owned(), median, quartiles, interval, budget]);
    };
    let heavy: OfLoad = |pieces| &pieces.heavy;
    let light: OfLoad = |pieces| &pieces.light;
    row("deviation / shared listener", heavy, SHARED, Measured::deviation, Some(DEVIATION));
    row("deviation / SO_REUSEPORT", heavy, REUSEPORT, Measured::deviation, None);
    row("most CPU time / SO_REUSEPORT", heavy, REUSEPORT, |piece| piece.uneven_cpu, Some(UNEVENNESS));
    row("the same, 1 in flight", light, REUSEPORT, |piece| piece.uneven_cpu, Some(UNEVENNESS));
    row("average latency / shared listener", heavy, SHARED, Measured::average, None);
    row("requests per second / shared listener", heavy, SHARED, |piece| piece.rate, None);
    table
}

/// The latencies of all rounds.
fn drawn(set_ups: &[SetUp], pieces: &[Pieces], in_flight: usize) -> String {
    let all: Vec<Vec<f64>> = pieces
        .iter()
        .map(|pieces| {
            let mut all: Vec<f64> = pieces.heavy.iter().flat_map(|piece| piece.latencies.clone()).collect();
            all.sort_by(f64::total_cmp);
            all
        })
        .collect();
    // The dashes lie on top of the thick line that they nearly follow.
    let looks = [(REUSEPORT, Look::Thin), (DIST_CTL, Look::Thick), (SHARED, Look::Dashed)];
    let curves = looks.map(|(which, look)| {
        let deviation = median(&pieces[which].heavy, Measured::deviation);
        let name = format!("{}: deviation {deviation:.1} ms", set_ups[which].name);
        Curve { name, look, values: &all[which] }
    });
    plot::cumulative(&format!("Latency of a costly request, {in_flight} in flight"), &curves)
}

impl Measured {
    fn average(&self) -> f64 {
        self.latencies.iter().sum::<f64>() / self.latencies.len() as f64
    }

    fn deviation(&self) -> f64 {
        let average = self.average();
        let squares = self.latencies.iter().map(|latency| (latency - average).powi(2));
        (squares.sum::<f64>() / self.latencies.len() as f64).sqrt()
    }
}

fn median(pieces: &[Measured], of: impl Fn(&Measured) -> f64) -> f64 {
    Spread::of(pieces.iter().map(of).collect()).median
}

fn measure(set_up: &SetUp, in_flight: usize, during: Duration) -> Result<Measured> {
    let times = || set_up.workers.iter().map(|worker| cpu::time_of(*worker)).collect::<Result<Vec<_>>>();
    let (before, start) = (times()?, Instant::now());
    let answers = load::client(set_up.address, in_flight, during).with_context(|| set_up.name)?;
    let took = start.elapsed();
    let spent = times()?.into_iter().zip(before).map(|(after, before)| (after - before).as_secs_f64());

    let mut requests: HashMap<i32, f64> = set_up.workers.iter().map(|worker| (*worker, 0.0)).collect();
    for answer in &answers {
        *requests.get_mut(&answer.server).context("a stranger answers")? += 1.0;
    }
    // The first to come found no queue.
    let settled = answers.get(2 * in_flight..).filter(|settled| !settled.is_empty());
    let settled = settled.context("too few answers")?;
    let mut latencies: Vec<f64> = settled.iter().map(|answer| answer.latency.as_secs_f64() * 1e3).collect();
    latencies.sort_by(f64::total_cmp);
    Ok(Measured {
        rate: answers.len() as f64 / took.as_secs_f64(),
        latencies,
        uneven_requests: unevenness(requests.into_values()),
        uneven_cpu: unevenness(spent),
    })
}

/// The most over the mean.
fn unevenness(shares: impl Iterator<Item = f64>) -> f64 {
    let shares: Vec<f64> = shares.collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    most * shares.len() as f64 / shares.iter().sum::<f64>()
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn plain(
    host: &Host,
    workers: usize,
    work: u64,
    listener: impl Fn() -> Result<socket2::Socket>,
) -> Result<Plain> {
    let commands = (1..=workers).map(|number| {
        let words = words(&number.to_string(), work)?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        Ok((command, listener()?))
    });
    Plain::start(host, commands.collect::<Result<_>>()?)
}

fn steered<'h>(host: &'h Host, workers: usize, work: u64, in_flight: usize) -> Result<Up<'h>> {
    Ok(host.up(&App {
        listen: vec!["0.0.0.0:8080".to_owned()],
        limit: Some(1),
        socket: Some("stdin"),
        tables: format!("[service.app.waiting]\ncapacity = {}\ntimeout = \"10m\"", in_flight + 100),
        ..App::running(workers, words("{name}", work)?)
    }))
}

/// The command line of a worker.
fn words(number: &str, work: u64) -> Result<Vec<String>> {
    let program = std::env::current_exe().context("find this program")?;
    let program = program.to_str().context("our paths are text")?.to_owned();
    Ok(vec![program, "worker".to_owned(), number.to_owned(), work.to_string()])
}

/// So much work takes that much CPU time here. It is measured once: then every request of the
/// run is the same work, whatever else the machine does.
fn work_for(time: Duration) -> Result<u64> {
    const SAMPLE: u64 = 4_000_000;
    let own_time =
        || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).context("a CPU time is not negative");
    let mut least = Duration::MAX;
    for _ in 0..20 {
        let before = own_time()?;
        calculate(SAMPLE);
        least = least.min(own_time()? - before);
    }
    Ok((SAMPLE as f64 * time.as_secs_f64() / least.as_secs_f64()) as u64)
}

/// Takes CPU time and nothing else, no memory either, which the CPUs would share.
fn calculate(work: u64) {
    let mut number = 1u64;
    for _ in 0..work {
        number = black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

/// `bench worker NUMBER WORK`: one thread, as a worker of nginx: an epoll of its own, from a
/// shared listener wakened by EPOLLEXCLUSIVE, one accept() each time.
pub(crate) fn worker(mut words: impl Iterator<Item = String>) -> Result<String> {
    let number: usize = words.next().context("NUMBER is missing")?.parse()?;
    let work: u64 = words.next().context("WORK is missing")?.parse()?;
    pin(number)?;
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |socket: &dyn std::os::fd::AsFd, flags| {
        let socket = socket.as_fd();
        epoll::add(&epoll, socket, epoll::EventData::new_u64(socket.as_raw_fd() as u64), flags)
    };
    watch(&listener, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = Vec::with_capacity(512);
    loop {
        events.clear();
        match epoll::wait(&epoll, spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            if let Some(stream) = streams.remove(&event.data.u64()) {
                // A client that has gone is not our trouble.
                let _ = answer(stream, work);
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    watch(&stream, epoll::EventFlags::IN)?;
                    streams.insert(stream.as_raw_fd() as u64, stream);
                }
                // Another worker was faster.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accept"),
            }
        }
    }
}

/// To the CPU with this number, counted from 1, of those that we may use.
fn pin(number: usize) -> Result<()> {
    let allowed = sched_getaffinity(None).context("ask for our CPUs")?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let mut own = CpuSet::new();
    own.set(cpus.nth(number - 1).context("there are not so many CPUs")?);
    sched_setaffinity(None, &own).context("stay on one CPU")
}

/// Serves one connection. Its request came in one segment, and so all of it is there.
fn answer(mut stream: TcpStream, work: u64) -> Result<()> {
    if stream.read(&mut [0; 1024])? == 0 {
        return Ok(());
    }
    calculate(work);
    let answer =
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nserver=bench pid={} \n", std::process::id());
    Ok(stream.write_all(answer.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_that_of_all_requests() {
        let latencies = vec![2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        let measured = Measured { rate: 1.0, latencies, uneven_requests: 1.0, uneven_cpu: 1.0 };
        assert_eq!((measured.average(), measured.deviation()), (5.0, 2.0));
    }

    #[test]
    fn one_worker_of_two_that_does_everything_has_two_shares() {
        assert_eq!(unevenness([6.0, 0.0].into_iter()), 2.0);
        assert_eq!(unevenness([3.0, 3.0].into_iter()), 1.0);
    }
}
