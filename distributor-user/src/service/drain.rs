//! Servers that an operator takes out of the plan and puts back, while they run on.
//!
//! drain.rs knows what is wanted; here it is done. That a server is drained is of its entry, not of
//! its instance: one that fails meanwhile is started again, and gets no connections either.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use distributor_ebpf::contract::Load;
use tracing::{info, warn};

use super::{Host, Service};
use crate::{
    closer,
    control::{CANNOT_BE_CLOSED, Response},
    distributor::Input,
    drain::{Drain, Rest},
    kernel,
    moment::Moment,
};

/// How often those that are left are closed. Handshakes that were under way are late.
const CLOSE_AGAIN: Duration = Duration::from_secs(1);

/// Closing what a server has left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Closing {
    under_way: bool,
    /// Not before.
    next: Option<Instant>,
}

impl Service {
    /// Takes a server out of the plan until it is resumed. Said again, its time begins anew.
    pub fn drain(&mut self, entry: usize, timeout: Option<Duration>, then: Rest) -> Response {
        if self.stopping {
            return Response::failure(format!("service {} is being stopped", self.config.name));
        }
        let now = Instant::now();
        let server = &mut self.entries[entry];
        let before = server.drain.replace(Drain::new(now, timeout, then));
        if let (Some(before), Some(drain)) = (before, &mut server.drain) {
            drain.since = before.since;
        }
        info!(
            "server {} is drained by an operator: it gets no connections until it is resumed",
            server.config.name
        );
        self.changed(entry)
    }

    /// Puts it back, if it was taken out.
    pub(super) fn end_drain(&mut self, entry: usize) {
        if self.entries[entry].drain.take().is_some() {
            info!("server {} is resumed", self.entries[entry].name());
            self.entries[entry].resumed = Some(Moment(Instant::now()));
            self.note(&closing_of(&self.entries[entry].name()), None);
            self.changed(entry);
        }
    }

    /// Closes what is left of those whose time is up.
    pub(super) fn close_rest(&mut self, load: &Load, now: Instant, host: &Host<'_>) {
        for entry in 0..self.entries.len() {
            let server = &mut self.entries[entry];
            let (Some(drain), Some(run)) = (&server.drain, &server.run) else { continue };
            let is_due = !server.closing.under_way && server.closing.next.is_none_or(|next| next <= now);
            if !drain.closes(now) || !is_due || super::places(load, run.slot) == 0 {
                continue;
            }
            server.closing = Closing { under_way: true, next: Some(now + CLOSE_AGAIN) };
            let (slot, inputs, service) = (run.slot, host.inputs.clone(), self.number);
            let tell = move |result| {
                // The loop is gone only when everything stops.
                let _ = inputs.send(Input::Closed { service, entry, result });
            };
            let pins = kernel::pins(&host.place.pins, &self.config.name);
            if let Err(error) = closer::close_aside(&pins, &self.config.listen, slot, tell) {
                self.closed(entry, Err(error.into()));
            }
        }
    }

    /// They were closed, or why not.
    pub fn closed(&mut self, entry: usize, result: anyhow::Result<usize>) {
        let server = &mut self.entries[entry];
        server.closing.under_way = false;
        let name = server.name();
        let trouble = match result {
            Ok(0) => None,
            Ok(closed) => {
                let noun = if closed == 1 { "connection was" } else { "connections were" };
                warn!("server {name}: the time of its connections is over: {closed} {noun} reset");
                None
            }
            Err(error) => Some(format!(
                "server {name}: {CANNOT_BE_CLOSED}: {error:#}; they go on, tries again every second"
            )),
        };
        let is_drained = server.drain.is_some();
        self.note(&closing_of(&name), trouble.filter(|_| is_drained));
    }
}

/// What that trouble is called.
pub(super) fn closing_of(name: &str) -> String {
    format!("closing connections of {name}")
}
