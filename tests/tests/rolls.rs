//! Real servers are restarted again and again while 20 clients come: none fails.
//!
//! `TESTS_ROLLS=50` restarts each service so often. Clients that keep their connection lose it with the
//! server that they have, as that server's own rules want it; they send their request again on a new one,
//! and that must be answered. How often is counted apart.

#![forbid(unsafe_code)]

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Instant,
};

use tests::{
    app::App,
    command,
    host::{Host, Up, V4, heavy},
    http::{self, Kept},
    real::{self, Daemon, Nginx},
    wait::{fewer, lasting, seconds},
};

/// Clients that make a connection for each request, and such that keep theirs.
const CLIENTS: usize = 15;
const KEEPERS: usize = 5;

/// What the clients have seen.
#[derive(Default)]
struct Seen {
    over: AtomicBool,
    /// Requests on new connections, and on kept ones.
    asked: AtomicU64,
    asked_again: AtomicU64,
    /// Kept connections that had ended.
    ended: AtomicU64,
}

impl Seen {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }
}

/// Restarts the service so often under load.
#[track_caller]
fn rolls(name: &str, up: &Up<'_>, usual: usize) {
    let rolls = match std::env::var("TESTS_ROLLS") {
        Ok(rolls) => rolls.parse().expect("TESTS_ROLLS is a number"),
        Err(_) => fewer(usual, 1),
    };
    let seen = Seen::default();
    let start = Instant::now();
    thread::scope(|scope| {
        let seen = &seen;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(scope.spawn(|| {
                while seen.goes_on() {
                    http::get(V4).expect("each request on a connection of its own is answered");
                    seen.asked.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        for _ in 0..KEEPERS {
            clients.push(scope.spawn(|| {
                let mut kept = Kept::default();
                while seen.goes_on() {
                    kept.get(V4).expect("a request that is sent again on a new connection is answered");
                    seen.asked_again.fetch_add(1, Ordering::Relaxed);
                }
                seen.ended.fetch_add(kept.ended, Ordering::Relaxed);
            }));
        }
        let _over = Over(&seen.over);
        for roll in 0..rolls {
            let ended = command::run(&mut up.command(&["restart"]), seconds(120.0));
            assert_eq!(ended.code, Some(0), "restart {roll}: {ended}");
            assert!(
                clients.iter().all(|client| !client.is_finished()),
                "a client has failed in restart {roll}"
            );
        }
    });
    let servers = up.service().servers.len() as u64;
    assert!(up.service().servers.iter().all(|server| server.instance == 1 + rolls as u64));
    let [asked, again, lost] =
        [&seen.asked, &seen.asked_again, &seen.ended].map(|count| count.load(Ordering::Relaxed));
    println!(
        "{name}: {rolls} restarts of {servers} servers in {:.0?}: {asked} requests on as many connections and \
         {again} on kept ones, 0 failed; {lost} kept connections had ended",
        start.elapsed()
    );
    let service = up.service();
    let never =
        ["refused_limit", "refused_capacity", "refused_no_room", "dismissed", "move_failed", "untagged"];
    assert_eq!(service.outcomes(never), [0; 6]);
    assert!(asked > 0 && again > 0 && service.drift.found == 0);
    up.wait_connections(&vec![0; servers as usize]);
}

struct Over<'s>(&'s AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `drain` seconds are for the connections that are kept, and long enough for whoever has sent a request.
fn app(count: usize, command: Vec<String>, drain: f64) -> App {
    App { server: format!("drain_timeout = \"{}\"\n", lasting(drain)), ..App::running(count, command) }
}

#[test]
fn no_request_fails_while_nginx_is_restarted() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&app(2, real::nginx(&host, 2, Nginx::Shared, Daemon::Off), 1.5));
    rolls("nginx", &up, 4);
}

#[test]
fn no_request_fails_while_node_is_restarted() {
    let _alone = heavy();
    let host = Host::new();
    let up = host.up(&app(2, real::node(&host), 1.0));
    rolls("node", &up, 3);
}

#[test]
fn no_request_fails_while_tomcat_is_restarted() {
    let _alone = heavy();
    let host = Host::new();
    let tomcat = real::tomcat(&host, 2);
    // A JVM that starts beside another one leaves it little of a CPU.
    let mut app = app(2, tomcat.command, 4.0);
    app.server.push_str(&tomcat.environment);
    let up = host.up(&app);
    rolls("tomcat", &up, 1);
}
