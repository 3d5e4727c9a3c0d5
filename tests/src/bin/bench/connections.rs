//! New connections per second and their latency, steered by dist-ctl and by the kernel's hash.
//!
//! The sides take turns in short pieces, the first one of a round first in every second round,
//! and only the two pieces of a round are compared: what else the machine does meanwhile
//! meets both.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::host::Host;

use crate::{
    Run,
    load::{Piece, connect_for},
    servers::{PLAIN, SERVERS, STEERED, Sides, WARM_UP},
    statistics::Spread,
    table::Table,
};

/// Enough to keep two CPUs and four servers busy, few enough that no queue builds up.
const CLIENTS: usize = 16;

/// Of the connections per second that plain SO_REUSEPORT reaches.
const BUDGET: f64 = 0.97;

pub(crate) fn run(run: &Run) -> Result<String> {
    let (rounds, during) = run.choose((80, Duration::from_millis(500)), (6, Duration::from_millis(200)));
    let host = Host::new();
    let sides = Sides::start(run, &host)?;
    for address in [STEERED, PLAIN] {
        connect_for(address, CLIENTS, WARM_UP)?;
    }

    let before = sides.steered.service();
    let mut pairs: Vec<(Piece, Piece)> = Vec::new();
    for round in 0..rounds {
        run.check()?;
        let piece = |address| connect_for(address, CLIENTS, during);
        let (steered, plain) = if round % 2 == 0 {
            let steered = piece(STEERED)?;
            (steered, piece(PLAIN)?)
        } else {
            let plain = piece(PLAIN)?;
            (piece(STEERED)?, plain)
        };
        eprintln!(
            "bench: round {} of {rounds}: {:.0} connections/s steered, {:.0} plain",
            round + 1,
            steered.rate(),
            plain.rate()
        );
        pairs.push((steered, plain));
    }
    let after = sides.steered.service();
    sides.steered.stop();

    let steered: usize = pairs.iter().map(|(steered, _)| steered.connections()).sum();
    let plain: usize = pairs.iter().map(|(_, plain)| plain.connections()).sum();
    // It was us who steered, all of them and by the first choice.
    let selected = after.outcome("selected") - before.outcome("selected");
    ensure!(selected == steered as u64, "{steered} connections, and {selected} were steered by the policy");

    let ratio = |of: fn(&Piece) -> f64| {
        Spread::of(pairs.iter().map(|(steered, plain)| of(steered) / of(plain)).collect())
    };
    let rate = ratio(Piece::rate);
    let mut table = Table::new(["steered / plain", "median", "quartiles", "95 % of median", "budget"]);
    let mut row = |name: &str, spread: Spread, budget: &str| {
        table.row([
            name.to_owned(),
            format!("{:.3}", spread.median),
            format!("{:.3} to {:.3}", spread.quartiles.0, spread.quartiles.1),
            format!("{:.3} to {:.3}", spread.interval.0, spread.interval.1),
            budget.to_owned(),
        ]);
    };
    let verdict = if rate.median >= BUDGET { "kept" } else { "missed" };
    row("connections per second", rate, &format!("at least {BUDGET}: {verdict}"));
    row("latency, median", ratio(|piece| piece.latency(0.5)), "");
    row("latency, 99th percentile", ratio(|piece| piece.latency(0.99)), "");

    let uneven = |of: fn(&(Piece, Piece)) -> &Piece| {
        let spread = Spread::of(pairs.iter().map(|pair| of(pair).unevenness(SERVERS)).collect());
        format!("{:.3}", spread.median)
    };
    Ok(format!(
        "{SERVERS} servers, {CLIENTS} clients, {rounds} rounds of two pieces of {during:?}: {steered} \
         connections steered, {plain} plain.\n\n{table}\n\
         The busiest server's share in a piece, 1 being even (median): steered {}, plain {}.",
        uneven(|pair| &pair.0),
        uneven(|pair| &pair.1),
    ))
}
