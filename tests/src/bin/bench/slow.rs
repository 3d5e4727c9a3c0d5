//! One of four servers is ten times slower: what its clients, and everybody, feel of that.
//!
//! The servers are this program itself (`bench sleeper`), with one thread that sleeps for each request: so a
//! slow one takes no CPU time from the others, and the figures are ratios of times that were chosen. The
//! same load without the slow server is the measure.
#![forbid(unsafe_code)]

use std::{
    io::{self, Read as _, Write as _},
    net::TcpListener,
    os::fd::AsFd as _,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tests::{
    app::{App, list},
    host::Host,
};

use crate::{
    Run,
    load::{Piece, connect_for},
    servers::STEERED,
    table::Table,
};

/// For a request, of a good server and of the slow one.
const GOOD: Duration = Duration::from_millis(2);
const SLOW: Duration = Duration::from_millis(20);

const IN_FLIGHT: usize = 64;

/// Of the 99th percentile without the slow server.
const BUDGET: f64 = 1.5;

/// What is compared.
struct SetUp {
    name: &'static str,
    slow: bool,
    /// Lines for the service.
    service: &'static str,
    policy: &'static str,
}

/// What came of it.
struct Measured {
    name: &'static str,
    piece: Piece,
    /// Of all connections, the slow server's.
    share: f64,
    /// Its weight at the end.
    weight: Option<u64>,
}

pub(crate) fn run(run: &Run) -> Result<String> {
    let (settle, during) = run.choose((90, 20), (20, 3));
    let (settle, during) = (Duration::from_secs(settle), Duration::from_secs(during));
    let follow = "[service.app.load]\nsources = [\"accept-queue\"]";
    let (least, turns) = ("least-connections", "weighted-round-robin");
    let set_ups = [
        SetUp { name: "three good servers", slow: false, service: "", policy: least },
        SetUp { name: "and a slow one", slow: true, service: "", policy: least },
        SetUp { name: "the same, weights follow", slow: true, service: follow, policy: least },
        SetUp { name: "in turns: and a slow one", slow: true, service: "", policy: turns },
        SetUp { name: "in turns, weights follow", slow: true, service: follow, policy: turns },
    ];
    let mut measured = Vec::new();
    for set_up in &set_ups {
        eprintln!("bench: {}", set_up.name);
        measured.push(measure(run, set_up, settle, during)?);
    }
    let good = measured[0].piece.latency(0.99);
    let mut table = Table::new([
        "",
        "median",
        "99 %",
        "99 % / good ones",
        "requests/s",
        "to the slow one",
        "its weight",
        "budget",
    ]);
    for Measured { name, piece, share, weight } in &measured {
        let ratio = piece.latency(0.99) / good;
        let follows = name.ends_with("follow");
        let budget = if ratio <= BUDGET { "kept" } else { "missed" };
        table.row([
            (*name).to_owned(),
            format!("{:.1} ms", piece.latency(0.5) / 1e3),
            format!("{:.1} ms", piece.latency(0.99) / 1e3),
            format!("{ratio:.2}"),
            format!("{:.0}", piece.rate()),
            format!("{:.1} %", share * 100.0),
            weight.map_or_else(|| "-".to_owned(), |weight| format!("{weight} of 100")),
            if follows { format!("at most {BUDGET}: {budget}") } else { String::new() },
        ]);
    }
    Ok(format!(
        "{IN_FLIGHT} connections in flight, each with one request; a server takes one at a time, a good one for \
         {GOOD:?}, the slow one for {SLOW:?}. After {settle:?} under that load, {during:?} were measured. Weights \
         follow `accept-queue` as by default (strength 3, floor 10).\n\n{table}"
    ))
}

fn measure(run: &Run, set_up: &SetUp, settle: Duration, during: Duration) -> Result<Measured> {
    let host = Host::new();
    let server = |name: &'static str, pause: Duration| -> Result<(&'static str, String)> {
        Ok((name, format!("command = {}", list(&words(pause)?))))
    };
    let mut servers = vec![server("a", GOOD)?, server("b", GOOD)?, server("c", GOOD)?];
    if set_up.slow {
        servers.push(server("slow", SLOW)?);
    }
    let app = App {
        listen: vec!["0.0.0.0:8080".to_owned()],
        policy: Some(set_up.policy),
        socket: Some("stdin"),
        service: set_up.service.to_owned(),
        ..App::running(0, words(GOOD)?)
    };
    let up = host.up(&app.named(servers));
    // In pieces, so that Ctrl-C is heard.
    let mut settled = Duration::ZERO;
    while settled < settle {
        run.check()?;
        let piece = Duration::from_secs(2);
        connect_for(STEERED, IN_FLIGHT, piece)?;
        settled += piece;
    }
    let piece = connect_for(STEERED, IN_FLIGHT, during)?;
    let slow = up.service().servers.into_iter().find(|server| server.name == "app/slow");
    let its = slow.as_ref().and_then(|slow| slow.pid).and_then(|pid| piece.by_server.get(&pid)).copied();
    let measured = Measured {
        name: set_up.name,
        share: its.unwrap_or(0) as f64 / piece.connections() as f64,
        weight: slow.map(|slow| slow.effective_weight),
        piece,
    };
    up.stop();
    Ok(measured)
}

/// The command line of a server.
fn words(pause: Duration) -> Result<Vec<String>> {
    let program = std::env::current_exe().context("find this program")?;
    let program = program.to_str().context("our paths are text")?.to_owned();
    Ok(vec![program, "sleeper".to_owned(), pause.as_millis().to_string()])
}

/// `bench sleeper MILLISECONDS`: one thread, one connection and its one request after the other.
pub(crate) fn sleeper(mut words: impl Iterator<Item = String>) -> Result<String> {
    let pause = Duration::from_millis(words.next().context("MILLISECONDS is missing")?.parse()?);
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let answer =
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nserver=bench pid={} \n", std::process::id());
    loop {
        let (mut stream, _) = listener.accept().context("accept")?;
        // A client that has gone is not our trouble.
        if stream.read(&mut [0; 1024]).is_ok_and(|length| length > 0) {
            thread::sleep(pause);
            let _ = stream.write_all(answer.as_bytes());
        }
    }
}
