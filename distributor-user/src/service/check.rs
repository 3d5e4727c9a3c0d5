//! Having a service's servers checked, and what that leads to.
//!
//! health.rs judges the results, and `server` decides what becomes of the server; here it is done. One
//! check of a server is under way at a time. Who is not to be checked now, because it starts or ends,
//! begins anew later.
#![forbid(unsafe_code)]

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use distributor_ebpf::contract::Directed;

use super::{Host, Service};
use crate::{
    check::{self, Outcome, Target},
    config::CheckKind,
    distributor::Input,
    health::{Health, Turn},
    launch::{Exec, Output, Socket},
    server::{Instance, Report},
    status::{CheckStatus, Timestamp},
};

/// If a check cannot begin because the kernel does not go by the right plan.
const AGAIN: Duration = Duration::from_millis(100);

/// What that trouble is called.
pub(super) fn checks_of(name: &str) -> String {
    format!("checks of {name}")
}

/// Checks of one server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Checking {
    /// When the one that is under way has begun, and of which instance it is.
    under_way: Option<(Instant, Instance)>,
    /// When the next one begins. `None`: at once.
    next: Option<Instant>,
    /// So many were begun: each goes to the next listener, where there are several.
    begun: u32,
    /// By this distributor.
    good: u64,
    bad: u64,
}

impl Service {
    /// Begins the checks that are due.
    pub(super) fn check_due(&mut self, now: Instant, host: &mut Host<'_>) {
        self.next_check = None;
        for entry in 0..self.entries.len() {
            let server = &mut self.entries[entry];
            let is_checked = server.config.check.is_some()
                && server.run.is_some()
                && server.machine.is_to_be_checked(&server.policy);
            if !is_checked {
                let trouble = checks_of(&server.name());
                server.checking.next = None;
                if server.health != Health::default() {
                    server.health = Health::default();
                    server.changed = true;
                }
                // Its checks were taken out of the configuration.
                if server.machine.is_withheld() {
                    self.report(entry, Report::Well, host);
                }
                self.note(&trouble, None);
                continue;
            }
            // One of the instance before is nobody's business any more.
            let instance = server.machine.instance();
            if server.checking.under_way.is_some_and(|(_, of)| of == instance) {
                continue;
            }
            if server.checking.next.is_none_or(|next| next <= now) {
                self.begin_check(entry, now, host);
            }
            let next = self.entries[entry].checking.next;
            self.next_check = self.next_check.into_iter().chain(next).min();
        }
    }

    fn begin_check(&mut self, entry: usize, now: Instant, host: &Host<'_>) {
        let server = &mut self.entries[entry];
        let (Some(run), Some(its)) = (&server.run, server.config.check.clone()) else { return };
        // Without the flag in the plan a connection would go to anybody.
        let are_directed = self.told.as_ref().is_some_and(|told| told.checks);
        if its.kind.is_directed() && !are_directed {
            server.checking.next = Some(now + AGAIN);
            return;
        }
        let instance = run.instance;
        let to =
            Directed { slot: run.slot, generation: run.generation, nth: server.checking.begun, reserved: 0 };
        server.checking.begun = server.checking.begun.wrapping_add(1);
        server.checking.under_way = Some((now, instance));
        server.checking.next = None;
        let (inputs, service) = (host.inputs.clone(), self.number);
        let tell = move |outcome| {
            // The loop is gone only when everything stops.
            let _ = inputs.send(Input::Checked { service, entry, instance, outcome });
        };
        match &its.kind {
            CheckKind::Tcp | CheckKind::Http { .. } => {
                let target = Target {
                    directions: Rc::clone(&self.directions),
                    to,
                    listen: self.config.listen.clone(),
                };
                tokio::task::spawn_local(async move {
                    tell(check::over_network(&its.kind, its.timeout, target).await);
                });
            }
            CheckKind::Command { command } => {
                let exec = self.check_exec(entry, command.clone(), host);
                tokio::task::spawn_local(async move {
                    tell(check::command::run(&exec, its.timeout).await);
                });
            }
        }
    }

    /// As the server itself is started, but for what is the check's own.
    fn check_exec(&self, entry: usize, command: Vec<String>, host: &Host<'_>) -> Exec {
        let server = &self.entries[entry];
        // Of the instance before, one may still be on its way out.
        let name = format!("{}.{}", server.config.short_name, server.machine.instance());
        let cgroup = super::checks(host.place, &self.config.name).child(&name);
        let mut exec = self.exec(entry, cgroup.path().to_owned());
        exec.command = command;
        (exec.stdout, exec.stderr) = (Output::Inherit, Output::Inherit);
        (exec.socket, exec.watchdog) = (Socket::Own, None);
        if let Some(pid) = server.machine.pid() {
            exec.environment.push(("DIST_CTL_PID".to_owned(), pid.to_string()));
        }
        exec
    }

    /// A check is over.
    pub fn checked(&mut self, entry: usize, instance: Instance, outcome: Outcome, host: &mut Host<'_>) {
        let now = Instant::now();
        let server = &mut self.entries[entry];
        let Some((begun, _)) = server.checking.under_way.take_if(|(_, of)| *of == instance) else { return };
        let Some(its) = server.config.check.clone() else { return };
        let is_over = server.run.as_ref().is_none_or(|run| run.instance != instance);
        if is_over || !server.machine.is_to_be_checked(&server.policy) {
            return;
        }
        let name = checks_of(&server.name());
        let result = match outcome {
            Outcome::Good(what) => Ok(what),
            Outcome::Bad(what) => Err(what),
            Outcome::Untried(why) => {
                server.checking.next = Some(now + its.interval);
                let what = format!(
                    "server {} cannot be checked: {why}; passes for what it was, tries again in {}",
                    server.name(),
                    crate::server::span(its.interval)
                );
                return self.note(&name, Some(what));
            }
        };
        let count = if result.is_ok() { &mut server.checking.good } else { &mut server.checking.bad };
        *count += 1;
        let before = server.health.clone();
        let turn = server.health.note(result, now, &its);
        // A listener that came again has made it ready without a check, for example.
        let turn = turn.or_else(|| server.health.insists(server.machine.is_withheld(), &its));
        server.changed |= !server.health.is_as(&before);
        let interval = if server.health.is_undecided() { its.fast_interval } else { its.interval };
        server.checking.next = Some((begun + interval).max(now));
        self.note(&name, None);
        match turn {
            None => {}
            Some(Turn::Well) => self.report(entry, Report::Well, host),
            Some(Turn::Unwell { why }) => self.report(entry, Report::Unwell { why }, host),
            Some(Turn::Otherwise { why }) => self.report_unwritten(entry, Report::Unwell { why }, host),
        }
    }

    /// Some server is checked over the network.
    pub(super) fn checks_directly(&self) -> bool {
        let mut entries = self.entries.iter().filter(|entry| !entry.gone);
        entries.any(|entry| entry.config.check.as_ref().is_some_and(|check| check.kind.is_directed()))
    }

    pub(super) fn check_status(&self, entry: usize) -> Option<CheckStatus> {
        let server = &self.entries[entry];
        let its = server.config.check.as_ref()?;
        let last = server.health.last();
        Some(CheckStatus {
            kind: its.kind.name().to_owned(),
            good: last.map(|last| last.good),
            said: last.map(|last| last.what.clone()),
            since: last.map(|last| Timestamp::of(last.since)),
            good_total: server.checking.good,
            bad_total: server.checking.bad,
        })
    }
}
