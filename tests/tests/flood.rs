//! A flood of SYNs costs no legitimate client his place, and takes none for itself.
//!
//! The floods here are short; `cargo xtask bench flood` runs longer ones, and measures.

#![forbid(unsafe_code)]

use std::{
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
};

use tests::{
    app::App,
    client::{self, Client},
    flood::{Ends, Flood, PER_SECOND, Serial, set_syncookies},
    host::{Host, V4, V6, heavy},
    wait::{fewer, seconds, wait_until_eq},
};

const FLOOD: Duration = Duration::from_secs(2);
const SERVERS: usize = 2;
const LIMIT: u32 = 10;
const PLACES: usize = SERVERS * LIMIT as usize;

/// Whether there are places for those who come while the flood does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Places {
    Free,
    Taken,
}

#[track_caller]
fn nobody_suffers(syncookies: u8, places: Places) {
    let _alone = heavy();
    let host = Host::new();
    set_syncookies(syncookies).expect("set tcp_syncookies");
    let flood = Flood::join(1).expect("join a network of clients");
    let up = host.up(&App { limit: Some(LIMIT), ..App::of(&host, SERVERS) });
    let mut serial = match places {
        Places::Free => Serial::free(V4),
        Places::Taken => Serial::full(V4, PLACES),
    };
    let before = up.service().outcomes;
    let over = AtomicBool::new(false);
    let per_second = fewer(PER_SECOND as usize, 2_000) as u32;
    let (mut served, mut slowest, mut failed) = (0, Duration::ZERO, Vec::new());
    let sent = thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(8080, per_second, &over));
        let end = Ends(&over);
        let start = Instant::now();
        while start.elapsed() < FLOOD {
            match serial.come() {
                Ok(taken) => {
                    served += 1;
                    slowest = slowest.max(taken);
                }
                Err(error) => failed.push(error.to_string()),
            }
            if served % 50 == 0 {
                // Whoever is to come next has not come yet.
                assert_eq!(up.service().waiting.now, 0, "nobody of the flood waits");
            }
        }
        drop(end);
        flooding.join().expect("flooding does not panic").expect("send SYNs")
    });
    let service = up.service();
    println!("syncookies {syncookies}, places {places:?}: {sent} SYNs, {served} served, slowest {slowest:?}");
    assert!(sent > 1_000 && served > 0, "{sent} SYNs of a flood, {served} served");
    assert!(
        failed.is_empty(),
        "{} fail beside {served} who are served, the first by: {}: {:?}",
        failed.len(),
        failed[0],
        service.outcomes
    );
    // Only those who completed a handshake were counted.
    let came = |outcomes: &std::collections::BTreeMap<String, u64>| {
        outcomes["established"] + outcomes["established_waiting"]
    };
    assert_eq!(came(&service.outcomes) - came(&before), served, "{:?}", service.outcomes);
    assert_eq!(service.outcomes(["closed_waiting", "dismissed", "refused_capacity"]), [0; 3]);
    assert!(service.waiting.max <= 1, "{:?}", service.waiting);
    drop(serial);
    wait_until_eq("connections", seconds(5.0), vec![0; SERVERS], || up.connections());

    // All places are to be had again when the last reservation has expired.
    let start = Instant::now();
    let held: Vec<Client> = (0..PLACES)
        .map(|number| Client::open(if number % 2 == 0 { V4 } else { V6 }).expect("a place"))
        .collect();
    assert!(start.elapsed() < seconds(10.0), "full again after {:?}", start.elapsed());
    assert_eq!(up.connections(), [u64::from(LIMIT); SERVERS]);
    let waits = client::connect(V4).expect("a place in line");
    wait_until_eq("those who wait", seconds(5.0), 1, || up.service().waiting.now);
    drop(held);
    Client::greeted(waits).expect("served");
    let service = up.service();
    for server in &service.servers {
        assert_eq!(server.connections_max, u64::from(LIMIT), "{}", server.name);
    }
}

#[test]
fn a_flood_without_syn_cookies_leaves_free_places_to_clients() {
    nobody_suffers(0, Places::Free);
}

#[test]
fn a_flood_with_syn_cookies_in_need_leaves_free_places_to_clients() {
    nobody_suffers(1, Places::Free);
}

#[test]
fn a_flood_with_syn_cookies_always_leaves_free_places_to_clients() {
    nobody_suffers(2, Places::Free);
}

#[test]
fn a_flood_without_syn_cookies_leaves_the_line_to_clients() {
    nobody_suffers(0, Places::Taken);
}

#[test]
fn a_flood_with_syn_cookies_in_need_leaves_the_line_to_clients() {
    nobody_suffers(1, Places::Taken);
}

#[test]
fn a_flood_with_syn_cookies_always_leaves_the_line_to_clients() {
    nobody_suffers(2, Places::Taken);
}
