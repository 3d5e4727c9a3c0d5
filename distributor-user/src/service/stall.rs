//! Looking whether servers accept what lies in their accept queues, and moving it to others.
//!
//! stall.rs judges what is seen, and `server` decides what becomes of the server. The kernel tells of
//! all listeners at once, without a descriptor of any: a duplicate would keep one open that its server
//! has closed. Nothing is asked while no server that may stall has a connection.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    net::Shutdown,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use distributor_ebpf::{contract::Load, word};
use socket2::SockRef;
use tracing::{error, info};

use super::{Host, Running, Service};
use crate::{
    listener,
    server::{Report, span},
    sock_diag::{self, States},
    stall::{Queue, Seen},
};

/// So many looks in the time after which a server is stalled...
const LOOKS: u32 = 10;
/// ...but not more often: with a thousand rooms one takes a millisecond.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

impl Service {
    /// Looks at the accept queues, if that is due.
    pub(super) fn look_at_queues(&mut self, load: &Load, now: Instant, host: &mut Host<'_>) {
        if self.next_look.is_some_and(|next| next > now) {
            return;
        }
        self.next_look = None;
        let may_stall = |entry: &usize| {
            let server = &self.entries[*entry];
            let run =
                server.run.as_ref().filter(|_| server.machine.is_ready() && server.config.stall.is_some());
            // One that is stalled is looked at until it is not, also when all its clients have gone; and checks
            // lie in a queue where clients do not.
            let is_checked = server.config.check.as_ref().is_some_and(|check| check.kind.is_directed());
            run.is_some_and(|run| {
                let has_clients = word::active(load.word[run.slot as usize]) > 0;
                has_clients || is_checked || server.machine.is_stalled()
            })
        };
        let (looked_at, others): (Vec<usize>, Vec<usize>) = (0..self.entries.len()).partition(may_stall);
        for entry in others {
            if let Some(run) = &mut self.entries[entry].run {
                run.queue = None;
            }
            // It was taken out of the configuration that it may stall.
            if self.entries[entry].machine.is_stalled() {
                self.queue_turned(entry, Report::QueueMoves, host);
            }
        }
        let shortest =
            looked_at.iter().filter_map(|entry| self.entries[*entry].config.stall).map(|it| it.after);
        let Some(shortest) = shortest.min() else { return self.note("stalls", None) };
        self.next_look = Some(now + (shortest / LOOKS).max(SHORTEST_PAUSE));
        // Read before the lengths are.
        let came: Vec<u64> = looked_at.iter().map(|entry| self.came(*entry, load)).collect();
        let lengths = self.accept_queues();
        let name = self.config.name.clone();
        let trouble = lengths.as_ref().err().map(|error| {
            format!("service {name}: whether its servers accept cannot be seen: {error:#}; tries again")
        });
        self.note("stalls", trouble);
        let Ok(lengths) = lengths else { return };
        for (entry, came) in looked_at.into_iter().zip(came) {
            self.look_at_queue(entry, came, &lengths, now, host);
        }
    }

    fn look_at_queue(
        &mut self,
        entry: usize,
        came: u64,
        lengths: &HashMap<u64, u32>,
        now: Instant,
        host: &mut Host<'_>,
    ) {
        let server = &mut self.entries[entry];
        let (Some(run), Some(stall)) = (&mut server.run, server.config.stall) else { return };
        let length = run.queued(lengths).unwrap_or(0);
        let seen = run.queue.get_or_insert_with(|| Queue::new(now)).note(came, length, now);
        match seen {
            Seen::Moves if server.machine.is_stalled() => self.queue_turned(entry, Report::QueueMoves, host),
            Seen::Stands(so_long) if so_long >= stall.after && !server.machine.is_stalled() => {
                let noun = if length == 1 { "connection" } else { "connections" };
                let why = format!("has not accepted any of {length} {noun} for {}", span(so_long));
                self.queue_turned(entry, Report::QueueStands { why }, host);
            }
            Seen::Moves | Seen::Stands(_) => {}
        }
    }

    fn queue_turned(&mut self, entry: usize, report: Report, host: &mut Host<'_>) {
        self.report(entry, report, host);
        // Who gets what is another question now.
        self.write_plan();
    }

    /// How many connections ever came to its queues.
    fn came(&self, entry: usize, load: &Load) -> u64 {
        self.entries[entry].run.as_ref().map_or(0, |run| load.total[run.slot as usize])
    }

    /// How many lie in the accept queue of each listener, by its cookie.
    pub(super) fn accept_queues(&self) -> anyhow::Result<HashMap<u64, u32>> {
        let mut lengths = HashMap::new();
        sock_diag::sockets(&self.config.listen, States::Listeners, None, |socket| {
            lengths.insert(socket.cookie, socket.queue);
        })
        .context("ask the kernel for its listeners (sock_diag)")?;
        Ok(lengths)
    }

    /// Has the kernel move what lies in a server's accept queues to the others. It listens no more
    /// after that, whatever it does.
    pub(super) fn move_queue(&mut self, entry: usize) {
        let Some(run) = &self.entries[entry].run else { return };
        let name = self.entries[entry].name();
        let found = self.processes_of(run).and_then(|processes| listener::find(&processes));
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                return error!(
                    "server {name}: its listeners cannot be reached: {error}; its queue moves when it ends"
                );
            }
        };
        let cookies: Vec<u64> = run.listeners.iter().flat_map(|them| them.cookies.clone()).collect();
        for found in found.iter().filter(|found| cookies.contains(&found.cookie)) {
            match SockRef::from(&found.fd).shutdown(Shutdown::Read) {
                Ok(()) => info!("server {name}: its queue on {} goes to the others", found.facts.address),
                Err(error) => {
                    error!("server {name}: shut down its listener: {error}; its queue moves when it ends")
                }
            }
        }
    }
}

impl Running {
    /// How many lie in the accept queues of its listeners, if it has any, of those of all.
    pub(super) fn queued(&self, lengths: &HashMap<u64, u32>) -> Option<u32> {
        let cookies = self.listeners.iter().flat_map(|them| &them.cookies);
        cookies.filter_map(|cookie| lengths.get(cookie)).copied().reduce(|all, length| all + length)
    }
}
