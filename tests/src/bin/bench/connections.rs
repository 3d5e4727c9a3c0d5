//! New connections per second and what each costs, steered by dist-ctl and by the kernel's hash.
//!
//! The sides take turns in short pieces, in every second round the other one first, and only
//! the two pieces of a round are compared: what else the machine does meanwhile meets both.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use tests::host::Host;

use crate::{
    Run, cpu,
    load::{Piece, connect_for},
    servers::{PLAIN, SERVERS, STEERED, Sides},
    statistics::Spread,
    table::Table,
};

/// Enough to keep four servers busy.
const IN_FLIGHT: usize = 64;

/// Of the connections per second that plain SO_REUSEPORT reaches.
const BUDGET: f64 = 0.97;

/// A piece of load on one side.
struct Measured {
    piece: Piece,
    /// CPU time of clients and servers, the kernel's part included, for each connection.
    microseconds: f64,
}

pub(crate) fn run(run: &Run) -> Result<String> {
    let (rounds, during) = run.choose((200, Duration::from_millis(250)), (10, Duration::from_millis(100)));
    let host = Host::new();
    let sides = Sides::start(run, &host)?;
    let servers = sides.servers();
    let measure = |address: SocketAddr| -> Result<Measured> {
        let servers = if address == STEERED { &servers.steered } else { &servers.plain };
        let before = cpu_time(servers)?;
        let piece = connect_for(address, IN_FLIGHT, during)?;
        let spent = cpu_time(servers)? - before;
        Ok(Measured { microseconds: spent.as_secs_f64() * 1e6 / piece.connections() as f64, piece })
    };
    for address in [STEERED, PLAIN] {
        measure(address)?;
    }

    let before = sides.steered.service();
    let mut pairs: Vec<(Measured, Measured)> = Vec::new();
    for round in 0..rounds {
        run.check()?;
        let (steered, plain) = if round % 2 == 0 {
            let steered = measure(STEERED)?;
            (steered, measure(PLAIN)?)
        } else {
            let plain = measure(PLAIN)?;
            (measure(STEERED)?, plain)
        };
        eprintln!(
            "bench: round {} of {rounds}: {:.0} connections/s steered, {:.0} plain",
            round + 1,
            steered.piece.rate(),
            plain.piece.rate()
        );
        pairs.push((steered, plain));
    }
    let after = sides.steered.service();
    sides.stop();

    let steered: usize = pairs.iter().map(|(steered, _)| steered.piece.connections()).sum();
    let plain: usize = pairs.iter().map(|(_, plain)| plain.piece.connections()).sum();
    // It was us who steered, all of them and by the first choice.
    let selected = after.outcome("selected") - before.outcome("selected");
    ensure!(selected == steered as u64, "{steered} connections, and {selected} were steered by the policy");

    let ratio = |of: fn(&Measured) -> f64| {
        Spread::of(pairs.iter().map(|(steered, plain)| of(steered) / of(plain)).collect())
    };
    let rate = ratio(|measured| measured.piece.rate());
    let mut table = Table::new(["steered / plain", "median", "quartiles", "95 % of median", "budget"]);
    let mut row = |name: &str, spread: Spread, budget: String| {
        let [median, quartiles, interval] = spread.cells();
        table.row([name.to_owned(), median, quartiles, interval, budget]);
    };
    let verdict = if rate.median >= BUDGET { "kept" } else { "missed" };
    row("connections per second", rate, format!("at least {BUDGET}: {verdict}"));
    row("CPU time for a connection", ratio(|measured| measured.microseconds), String::new());
    row("latency, median", ratio(|measured| measured.piece.latency(0.5)), String::new());
    row("latency, 99th percentile", ratio(|measured| measured.piece.latency(0.99)), String::new());

    let uneven = |of: fn(&(Measured, Measured)) -> &Measured| {
        Spread::of(pairs.iter().map(|pair| of(pair).piece.unevenness(SERVERS)).collect()).median
    };
    Ok(format!(
        "{SERVERS} servers, {IN_FLIGHT} connections in flight, {rounds} rounds of two pieces of {during:?}: \
         {steered} connections steered, {plain} plain. The CPU time is that of servers and clients \
         together.\n\n{table}\n\
         The busiest server's connections in a piece, over the mean of all (median of the pieces): \
         steered {:.2}, plain {:.2}.",
        uneven(|pair| &pair.0),
        uneven(|pair| &pair.1),
    ))
}

/// Of clients and servers.
fn cpu_time(servers: &[i32]) -> Result<Duration> {
    servers.iter().try_fold(cpu::own_time()?, |sum, server| Ok(sum + cpu::time_of(*server)?))
}
