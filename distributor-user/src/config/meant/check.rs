//! How a server is checked, and when it is taken for one that hangs: as meant.
//!
//! What a server says of its own check stands before what its service says, field by field. If it has
//! another type, only the times and numbers are the service's.
#![forbid(unsafe_code)]

use std::{ops::RangeInclusive, time::Duration};

use super::{
    Field, Given, Names, Reading, unknown,
    written::{self, List},
};
use crate::config::{Check, CheckKind, Stall};

const INTERVAL: Duration = Duration::from_secs(2);
/// While it is undecided how a server is, one wants to know soon.
const FAST_INTERVAL: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
const HOST: &str = "localhost";
/// What a browser takes for an answer.
const STATUS: RangeInclusive<u16> = 200..=399;

/// Each check is a connection that the server has to serve.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);
/// A server that is busy for a moment is not to be taken for one that hangs.
const SHORTEST_STALL: Duration = Duration::from_millis(100);

const TYPES: [&str; 3] = ["tcp", "http", "command"];

impl Reading<'_> {
    /// How a server is checked, by its own table and its service's. `None`: it is not.
    pub(super) fn check(
        &self,
        own: &written::Check,
        shared: &written::Check,
        names: &Names<'_>,
    ) -> Option<Check> {
        if !own.is_given && !shared.is_given {
            return None;
        }
        let interval = self.duration(own.interval.or(&shared.interval), SHORTEST_INTERVAL, INTERVAL);
        let fast = own.fast_interval.or(&shared.fast_interval);
        let fast_interval = self.duration(fast, SHORTEST_INTERVAL, FAST_INTERVAL.min(interval));
        if let Some(given) = fast.given()
            && fast_interval > interval
        {
            let sentence =
                format!("{:?} is longer than interval ({interval:?}), write at most that", given.value);
            self.refuse(&given.place, sentence);
        }
        let restart_after = own.restart_after.or(&shared.restart_after);
        let restart_after =
            restart_after.given().map(|_| self.duration(restart_after, SHORTEST_INTERVAL, INTERVAL));
        Some(Check {
            kind: self.kind(own, shared, names),
            interval,
            fast_interval,
            timeout: self.duration(own.timeout.or(&shared.timeout), SHORTEST_TIMEOUT, TIMEOUT),
            rise: self.number(own.rise.or(&shared.rise), 1..=1_000, RISE),
            fall: self.number(own.fall.or(&shared.fall), 1..=1_000, FALL),
            restart_after,
        })
    }

    fn kind(&self, own: &written::Check, shared: &written::Check, names: &Names<'_>) -> CheckKind {
        let nothing = written::Check::default();
        // Of another type, what the service's has means nothing.
        let is_of_its_own = match (own.kind.given(), shared.kind.given()) {
            (Some(own), Some(shared)) => own.value != shared.value,
            _ => false,
        };
        let shared_kind = &shared.kind;
        let shared = if is_of_its_own { &nothing } else { shared };
        let kind = match own.kind.or(shared_kind) {
            Field::Refused => return CheckKind::Tcp,
            Field::Absent => {
                let table = if own.is_given { own } else { shared };
                self.refuse(
                    &table.place.child("type"),
                    "is missing, write type = \"tcp\", \"http\" or \"command\"",
                );
                return CheckKind::Tcp;
            }
            Field::Given(kind) => kind,
        };
        let (path, host) = (own.path.or(&shared.path), own.host.or(&shared.host));
        let (status, command) = (own.status.or(&shared.status), own.command.or(&shared.command));
        let is_stray = |types: &str| types != kind.value && TYPES.contains(&kind.value.as_str());
        let strays = [
            (path.given().map(|it| &it.place), "http"),
            (host.given().map(|it| &it.place), "http"),
            (status.given().map(|it| &it.place), "http"),
            (command.given().map(|it| &it.place), "command"),
        ];
        for (place, needs) in strays {
            if let Some(place) = place.filter(|_| is_stray(needs)) {
                let sentence =
                    format!("stands beside type {:?}, leave it out, or write type = {needs:?}", kind.value);
                self.refuse(place, sentence);
            }
        }
        match kind.value.as_str() {
            "tcp" => CheckKind::Tcp,
            "http" => CheckKind::Http {
                path: self.path(path, names),
                host: self.host(host),
                statuses: self.statuses(status),
            },
            "command" => {
                CheckKind::Command { command: self.command(command, &own_or(own, shared).place, names) }
            }
            _ => {
                self.refuse(&kind.place, unknown(&kind.value, TYPES));
                CheckKind::Tcp
            }
        }
    }

    fn path(&self, field: &Field<String>, names: &Names<'_>) -> String {
        let Some(given) = field.given() else { return "/".to_owned() };
        let path = self.expanded(&given.place, &given.value, names);
        if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            let sentence = format!(
                "{:?} is no path, write one that begins with / and has no spaces: \"/health\"",
                given.value
            );
            self.refuse(&given.place, sentence);
        }
        path
    }

    fn host(&self, field: &Field<String>) -> String {
        let Some(given) = field.given() else { return HOST.to_owned() };
        if given.value.is_empty() || !given.value.bytes().all(|byte| byte.is_ascii_graphic()) {
            let sentence = format!("{:?} is no host, write what clients name: \"shop.example\"", given.value);
            self.refuse(&given.place, sentence);
        }
        given.value.clone()
    }

    fn statuses(&self, list: &List<String>) -> Vec<RangeInclusive<u16>> {
        let Some(list) = list.given() else { return vec![STATUS] };
        if list.value.is_empty() {
            let sentence = "[] lists no status, write those of a good answer: status = [\"200-399\"]";
            self.refuse(&list.place, sentence);
        }
        let read = |given: &Given<String>| {
            let range = statuses(&given.value);
            if range.is_none() {
                let sentence =
                    format!("{:?} is no status, write 100 to 599, or a range: \"200-399\"", given.value);
                self.refuse(&given.place, sentence);
            }
            range
        };
        list.value.iter().filter_map(read).collect()
    }

    /// When it is taken for one that hangs. `None`: never.
    pub(super) fn stall(&self, own: &written::Particulars, shared: &written::Particulars) -> Option<Stall> {
        let after = own.stall_after.or(&shared.stall_after);
        let (moves, kill) = (own.move_queue.or(&shared.move_queue), own.hang_kill.or(&shared.hang_kill));
        let move_queue = moves.given().is_some_and(|given| given.value);
        if after.given().is_none() {
            let strays =
                [moves.given().filter(|_| move_queue).map(|it| &it.place), kill.given().map(|it| &it.place)];
            for place in strays.into_iter().flatten() {
                self.refuse(place, "needs to know when it hangs, write stall_after as well");
            }
            return None;
        }
        if let Some(given) = kill.given().filter(|_| move_queue) {
            let sentence = format!(
                "{:?} stands beside move_queue, which has it started again at once, write only one of them",
                given.value
            );
            self.refuse(&given.place, sentence);
        }
        Some(Stall {
            after: self.duration(after, SHORTEST_STALL, SHORTEST_STALL),
            move_queue,
            kill_after: kill.given().map(|_| self.duration(kill, SHORTEST_STALL, SHORTEST_STALL)),
        })
    }
}

/// Where it says so, or would.
fn own_or<'w>(own: &'w written::Check, shared: &'w written::Check) -> &'w written::Check {
    if own.is_given { own } else { shared }
}

/// `200`, or `200-399`.
fn statuses(text: &str) -> Option<RangeInclusive<u16>> {
    let status = |text: &str| {
        let digits = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|status| digits && (100..=599).contains(status))
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = status(first)?..=status(last)?;
    (!range.is_empty()).then_some(range)
}
