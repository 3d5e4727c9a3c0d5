//! What an operator sees of a running instance: `dist-ctl status` and `status --json`.
//!
//! The types are the JSON: scripts rely on their field names, so fields are added, never
//! renamed, and what has no value is `null`, never absent. The distributor fills them;
//! the client prints them, as JSON or as `Status::table`. Nothing here asks the kernel.
#![forbid(unsafe_code)]

mod limits;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    str::FromStr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

pub use self::limits::{CeilingStatus, LimitsStatus, RateStatus, SourceStatus, SourcesStatus};
use crate::drain::Rest;

/// Everything one instance of dist-ctl knows of its services.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of the dist-ctl that runs, which may not be the one that asks.
    pub version: String,
    /// Which program that is: another file, or another content, has another text.
    #[serde(default)]
    pub build: String,
    /// The distributor's process.
    #[serde(default)]
    pub pid: u32,
    /// Why the last upgrade, if one failed, did so.
    #[serde(default)]
    pub not_upgraded: Option<String>,
    /// What is wrong with the machine now, the oldest first.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    pub services: Vec<ServiceStatus>,
}

/// Something that keeps dist-ctl from doing all it should, though it goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trouble {
    /// A sentence, with what to do.
    pub what: String,
    pub since: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    /// Every address the service answers on, as in its configuration.
    pub listen: Vec<String>,
    pub policy: String,
    pub waiting: WaitingStatus,
    /// What the service as a whole and each source may have; `null` if they may have anything.
    #[serde(default)]
    pub limits: Option<LimitsStatus>,
    /// How the counts compare with the sockets there are.
    #[serde(default)]
    pub drift: DriftStatus,
    pub servers: Vec<ServerStatus>,
    /// How many servers there are by its connections; `None`: as many as are configured.
    #[serde(default)]
    pub scale: Option<ScaleStatus>,
    /// The restart of its servers that is under way, or was the last.
    #[serde(default)]
    pub roll: Option<RollStatus>,
    /// How often the kernel programs ended in each of their ways out.
    pub outcomes: BTreeMap<String, u64>,
}

/// How a service is scaled. Named servers are not counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScaleStatus {
    pub servers: u64,
    pub min: u64,
    pub max: u64,
    /// Why it has as many, and since when, if that was decided by this distributor.
    pub reason: Option<String>,
    pub since: Option<Timestamp>,
}

/// The waiting list of a service. All of it is 0 for a service that has none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WaitingStatus {
    pub now: u64,
    /// The most that ever waited at once.
    pub max: u64,
    pub capacity: u64,
    pub served: u64,
    pub timed_out: u64,
    /// Clients that went away while they waited.
    pub left: u64,
    pub refused: u64,
    /// How long the first in line has waited; 0 when nobody waits.
    pub oldest_seconds: f64,
    /// How long those waited that were served.
    #[serde(default)]
    pub wait: Histogram,
}

/// The counts as compared with the sockets there are, since the service has begun.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DriftStatus {
    pub checks: u64,
    /// Counts that differed in several checks in a row.
    pub found: u64,
    /// How many of these were corrected.
    pub repaired: u64,
    /// `None`: there was no check yet, because nothing was open.
    pub last_seconds_ago: Option<f64>,
    /// Why they could not be compared the last time.
    pub unavailable: Option<String>,
}

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    pub count: u64,
    pub sum_seconds: f64,
    /// Ascending; one that would repeat the count before it is left out.
    pub buckets: Vec<Bucket>,
}

/// So many took at most so long: all that are in the buckets before, and more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Seconds.
    pub le: f64,
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// `shop/1`, or `shop/big` for a server with a name of its own.
    pub name: String,
    pub state: ServerState,
    /// Why it is in this state, where that is not plain from the state itself.
    pub reason: Option<String>,
    /// The process dist-ctl started; `None` while none runs.
    pub pid: Option<u32>,
    pub connections: u64,
    /// The most it ever had at once.
    pub connections_max: u64,
    pub connections_total: u64,
    /// `None`: no limit.
    pub limit: Option<u32>,
    pub weight: u32,
    /// The limit the kernel goes by: less, if the server says that it can serve no more.
    #[serde(default)]
    pub effective_limit: Option<u32>,
    /// The weight the kernel goes by: 0 while the server is to get nothing.
    pub effective_weight: u32,
    /// Connections the kernel has established and the server has not accepted yet;
    /// `None` while it has no listener.
    pub accept_queue: Option<u32>,
    pub restarts: u64,
    /// The number of the instance that runs, or of the last one that did; 0: none has.
    #[serde(default)]
    pub instance: u32,
    /// How that lives; `None` while none runs.
    #[serde(default)]
    pub life: Option<LifeStatus>,
    /// It was started by somebody else, and adopted.
    #[serde(default)]
    pub adopted: bool,
    /// Connections that it has from before it was adopted: not among `connections`, and they take
    /// places of its limit.
    #[serde(default)]
    pub earlier: u32,
    /// An operator has taken it out until he resumes it.
    #[serde(default)]
    pub drain: Option<DrainStatus>,
    /// How its checks go. `None`: it is not checked.
    #[serde(default)]
    pub check: Option<CheckStatus>,
    /// How loaded it is; `None`: it says nothing, and its weight does not follow its load.
    #[serde(default)]
    pub load: Option<LoadStatus>,
    /// Which CPUs it has; `None`: as dist-ctl itself.
    #[serde(default)]
    pub cpus: Option<CpusStatus>,
    /// When it entered its state.
    pub since: Timestamp,
}

/// How long an instance has lived, and what ends that.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LifeStatus {
    pub started: Timestamp,
    /// When it is replaced for its age.
    pub until: Option<Timestamp>,
    /// All that it has had.
    pub connections: u64,
    /// With so many it is replaced.
    pub max_connections: Option<u64>,
    /// What it held a second ago, in bytes; `None`: nobody has looked, because it has no limit.
    pub memory: Option<u64>,
    /// With more it is replaced.
    pub memory_limit: Option<u64>,
}

/// Servers that are restarted one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RollStatus {
    /// That of all services that an operator has restarted at once.
    pub number: u64,
    /// `under-way`, `done` or `failed`.
    pub state: RollState,
    /// An operator has asked for it.
    pub asked: bool,
    pub since: Timestamp,
    pub ended: Option<Timestamp>,
    /// Why it has failed, or what it waits for.
    pub reason: Option<String>,
    pub max_surge: u32,
    pub max_unavailable: u32,
    /// In the order in which they are restarted.
    pub servers: Vec<ItemStatus>,
}

/// How it stands with one of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ItemStatus {
    pub name: String,
    pub state: RollState,
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RollState {
    /// It is not its turn.
    Waiting,
    UnderWay,
    Done,
    Failed,
    /// It cannot be restarted.
    LeftAlone,
}

/// What a server says of its load, what is seen of it, and what that leaves it of its weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadStatus {
    /// X_LOAD, from 0 to 1.
    pub reported: Option<f64>,
    pub reported_seconds_ago: Option<f64>,
    /// X_CAPACITY: connections.
    pub capacity: Option<u32>,
    pub capacity_seconds_ago: Option<f64>,
    /// PSI of its cgroup, from 0 to 1.
    pub cpu_pressure: Option<f64>,
    /// How long a connection lies in its accept queue.
    pub accept_seconds: Option<f64>,
    /// Of its weight.
    pub percent: u32,
    /// Since when that is less than 100.
    pub since: Option<Timestamp>,
}

/// The CPUs of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpusStatus {
    /// `0-3,8`
    pub list: String,
    pub why: String,
    /// Since when it has these.
    pub since: Timestamp,
}

/// Since when it is drained, and what becomes of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainStatus {
    pub since: Timestamp,
    /// What becomes of those that are left when the time is up.
    pub then: Rest,
    /// 0: the time is up. `None`: they have any time.
    pub seconds_left: Option<f64>,
}

/// How the checks of a server go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// `tcp`, `http` or `command`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether the last one was good. `None`: there was none since it is ready, or waits for one.
    pub good: Option<bool>,
    /// What it came to: `200 OK`, `connection refused`.
    pub said: Option<String>,
    /// Since when all are good, or all are bad.
    pub since: Option<Timestamp>,
    /// By the distributor that runs.
    pub good_total: u64,
    pub bad_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerState {
    Starting,
    Ready,
    Draining,
    Unhealthy,
    Stalled,
    Backoff,
    Failed,
    Stopped,
}

/// A second of the wall clock, written in UTC as RFC 3339 has it: `2026-01-02T03:04:05Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Timestamp {
    // At most `Timestamp::LAST`, so that the year always has four digits.
    seconds: u64,
}

impl Status {
    /// The table for people: one block per service, its columns aligned over all blocks, and a
    /// line for each trouble.
    ///
    /// `width` is the terminal's; only REASON is cut to fit it. Without one, nothing is.
    /// Plain ASCII whatever the servers say of themselves: a reason may be a server's own
    /// words, and must not be able to send escape sequences to the operator's terminal.
    pub fn table(&self, width: Option<usize>, now: SystemTime) -> String {
        let mut blocks = self.blocks(width, now);
        if !self.troubles.is_empty() {
            let line = |trouble: &Trouble| {
                format!("! since {}: {}\n", age(trouble.since.age(now)), plain(&trouble.what))
            };
            blocks.push(self.troubles.iter().map(line).collect());
        }
        blocks.join("\n")
    }

    fn blocks(&self, width: Option<usize>, now: SystemTime) -> Vec<String> {
        if self.services.is_empty() {
            return vec!["no services\n".to_owned()];
        }
        let rows: Vec<Vec<Row>> = self
            .services
            .iter()
            .map(|service| service.servers.iter().map(|s| s.row(now)).collect())
            .collect();
        let mut widths = COLUMNS.map(|(title, _)| title.len());
        for row in rows.iter().flatten() {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.len());
            }
        }
        if rows.iter().flatten().all(|row| row[CPUS] == "-") {
            widths[CPUS] = 0;
        }
        let mut blocks = Vec::new();
        for (service, rows) in self.services.iter().zip(&rows) {
            let mut block = service.headline();
            block.push_str(&service.roll.as_ref().map_or(String::new(), |roll| roll.line(now)));
            if rows.is_empty() {
                block.push_str("  no servers\n");
            } else {
                let titles = COLUMNS.map(|(title, _)| title.to_owned());
                for row in std::iter::once(&titles).chain(rows) {
                    block.push_str(&line(row, &widths, width));
                }
            }
            blocks.push(block);
        }
        blocks
    }
}

impl ServerState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Unhealthy => "unhealthy",
            Self::Stalled => "stalled",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Timestamp {
    /// 9999-12-31T23:59:59Z.
    const LAST: u64 = 253_402_300_799;

    /// A moment, past or to come, on the wall clock as it is set now.
    pub fn of(moment: Instant) -> Self {
        let now = Instant::now();
        match moment.checked_duration_since(now) {
            Some(ahead) => (SystemTime::now() + ahead).into(),
            None => (SystemTime::now() - (now - moment)).into(),
        }
    }

    /// How long ago it was; zero if the clock has been set back behind it.
    pub fn age(self, now: SystemTime) -> Duration {
        let then = UNIX_EPOCH + Duration::from_secs(self.seconds);
        now.duration_since(then).unwrap_or_default()
    }
}

/// A time before 1970 or after 9999 becomes the nearest that can be written.
impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: since_epoch.as_secs().min(Self::LAST) }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = date(self.seconds / DAY);
        let (hour, minute, second) = (self.seconds % DAY / 3600, self.seconds % 3600 / 60, self.seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

impl FromStr for Timestamp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no time in UTC, write it like 2026-01-02T03:04:05Z");
        let shape = |(at, byte): (usize, u8)| match at {
            4 | 7 => byte == b'-',
            10 => byte == b'T',
            13 | 16 => byte == b':',
            19 => byte == b'Z',
            _ => byte.is_ascii_digit(),
        };
        if text.len() != 20 || !text.bytes().enumerate().all(shape) {
            return Err(wrong());
        }
        let number = |from: usize, to: usize| text[from..to].parse::<u64>().map_err(|_| wrong());
        let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
        let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
        if year < 1970
            || !(1..=12).contains(&month)
            || !(1..=31).contains(&day)
            || hour > 23
            || minute > 59
            || second > 59
        {
            return Err(wrong());
        }
        let days = days(year, month, day);
        // 30 February would otherwise be read as a day in March.
        if date(days) != (year, month, day) {
            return Err(wrong());
        }
        Ok(Self { seconds: days * DAY + hour * 3600 + minute * 60 + second })
    }
}

impl TryFrom<String> for Timestamp {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Timestamp> for String {
    fn from(timestamp: Timestamp) -> Self {
        timestamp.to_string()
    }
}

/// A length of time in its two largest units, as short as a table wants it: `3m12s`.
pub fn age(length: Duration) -> String {
    let seconds = length.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / DAY);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Align {
    Left,
    Right,
}

const COLUMNS: [(&str, Align); 13] = [
    ("NAME", Align::Left),
    ("STATE", Align::Left),
    ("SINCE", Align::Right),
    ("PID", Align::Right),
    ("CONN", Align::Right),
    ("MAX", Align::Right),
    ("TOTAL", Align::Right),
    ("LIMIT", Align::Right),
    ("WEIGHT", Align::Right),
    ("QUEUE", Align::Right),
    ("RESTARTS", Align::Right),
    ("CPUS", Align::Left),
    ("REASON", Align::Left),
];

/// This column is only there if some server has CPUs of its own.
const CPUS: usize = 11;

/// The cells of one server, in the order of `COLUMNS`.
type Row = [String; COLUMNS.len()];

const DAY: u64 = 24 * 60 * 60;

/// A reason is never cut below this, however narrow the terminal: three letters and the
/// dots would tell nothing.
const SHORTEST_REASON: usize = 16;

impl ServiceStatus {
    /// `shop: [::]:8080, 0.0.0.0:80; least-connections; waiting 3 of 1024 (oldest 1.2s); 3 of 2 to 8 servers`
    fn headline(&self) -> String {
        let listen = match self.listen.as_slice() {
            [] => "no address".to_owned(),
            addresses => addresses.join(", "),
        };
        let waiting = &self.waiting;
        let mut line = format!("{}: {listen}; {}; waiting", self.name, self.policy);
        let _ = match waiting.capacity {
            0 => write!(line, " {}", waiting.now),
            capacity => write!(line, " {} of {capacity}", waiting.now),
        };
        let mut details = Vec::new();
        if waiting.now > 0 {
            details.push(format!("oldest {:.1}s", waiting.oldest_seconds));
        }
        for (what, count) in [
            ("max", waiting.max),
            ("served", waiting.served),
            ("timed out", waiting.timed_out),
            ("left", waiting.left),
            ("refused", waiting.refused),
        ] {
            if count > 0 {
                details.push(format!("{what} {count}"));
            }
        }
        if !details.is_empty() {
            let _ = write!(line, " ({})", details.join(", "));
        }
        if let Some(ScaleStatus { servers, min, max, reason, .. }) = &self.scale {
            let _ = write!(line, "; {servers} of {min} to {max} servers");
            if let Some(reason) = reason {
                let _ = write!(line, " ({reason})");
            }
        }

        if let Some(limits) = &self.limits {
            let _ = write!(line, "; {limits}");
        }
        let mut line = plain(&line);
        line.push('\n');
        line
    }
}

impl RollStatus {
    /// How many are through with it, and how many there are.
    pub fn progress(&self) -> (usize, usize) {
        let count = |state: RollState| self.servers.iter().filter(|server| server.state == state).count();
        (count(RollState::Done), self.servers.len() - count(RollState::LeftAlone))
    }

    /// `  restart since 12s: 1 of 4 done; app/2: its new instance is not ready yet`, while that is of
    /// interest.
    fn line(&self, now: SystemTime) -> String {
        let (done, of) = self.progress();
        let is_busy = |server: &&ItemStatus| server.state == RollState::UnderWay;
        let busy = self.servers.iter().filter(is_busy);
        let busy = busy.map(|server| format!("{}: {}", server.name, server.reason.as_deref().unwrap_or("-")));
        let parts: Vec<String> = self.reason.clone().into_iter().chain(busy).collect();
        let parts = if parts.is_empty() { String::new() } else { format!("; {}", parts.join("; ")) };
        match (self.state, self.ended) {
            (RollState::UnderWay, _) => {
                format!(
                    "  restart since {}: {done} of {of} done{}\n",
                    age(self.since.age(now)),
                    plain(&parts)
                )
            }
            (RollState::Failed, Some(ended)) => {
                let ago = age(ended.age(now));
                format!("  restart failed {ago} ago: {done} of {of} done{}\n", plain(&parts))
            }
            _ => String::new(),
        }
    }
}

impl ServerStatus {
    fn row(&self, now: SystemTime) -> Row {
        // Shows at a glance that the kernel does not go by the configured weight.
        let weight = if self.effective_weight == self.weight {
            self.weight.to_string()
        } else {
            format!("{}/{}", self.effective_weight, self.weight)
        };
        let limit = match self.effective_limit {
            effective if effective == self.limit => or_dash(self.limit),
            effective => format!("{}/{}", or_dash(effective), or_dash(self.limit)),
        };
        [
            plain(&self.name),
            self.state.to_string(),
            age(self.since.age(now)),
            or_dash(self.pid),
            self.connections.to_string(),
            self.connections_max.to_string(),
            self.connections_total.to_string(),
            limit,
            weight,
            or_dash(self.accept_queue),
            self.restarts.to_string(),
            or_dash(self.cpus.as_ref().map(|cpus| plain(&cpus.list))),
            or_dash(self.reason.as_deref().map(plain)),
        ]
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn line(row: &Row, widths: &[usize; COLUMNS.len()], terminal: Option<usize>) -> String {
    let mut line = String::new();
    let last = COLUMNS.len() - 1;
    for (at, (cell, (_, align))) in row.iter().zip(COLUMNS).enumerate() {
        if widths[at] == 0 {
            continue;
        }
        line.push_str("  ");
        let width = widths[at];
        let _ = match align {
            _ if at == last => {
                let room = terminal.map_or(usize::MAX, |width| width.saturating_sub(line.len()));
                line.write_str(&cut(cell, room.max(SHORTEST_REASON)))
            }
            Align::Left => write!(line, "{cell:<width$}"),
            Align::Right => write!(line, "{cell:>width$}"),
        };
    }
    line.push('\n');
    line
}

fn cut(text: &str, room: usize) -> String {
    if text.len() <= room { text.to_owned() } else { format!("{}...", text[..room - 3].trim_end()) }
}

/// The text in printable ASCII, on one line: anything else becomes a question mark,
/// white space a space. So bytes are columns, and cutting at a byte is safe.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            ' '..='~' => c,
            _ if c.is_whitespace() => ' ',
            _ => '?',
        })
        .collect()
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are counted from 1 March, so that the leap day is a year's last:
/// <https://howardhinnant.github.io/date_algorithms.html>, `civil_from_days`.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// The inverse of `date`, for a year from 1970 on: `days_from_civil` of the same page.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let year_of_era = year % 400;
    let month_from_march = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    year / 400 * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(text: &str) -> SystemTime {
        let timestamp: Timestamp = text.parse().unwrap();
        UNIX_EPOCH + Duration::from_secs(timestamp.seconds)
    }

    fn server(name: &str) -> ServerStatus {
        ServerStatus {
            name: name.to_owned(),
            state: ServerState::Ready,
            reason: None,
            pid: Some(4242),
            connections: 12,
            connections_max: 40,
            connections_total: 1234,
            limit: Some(200),
            effective_limit: Some(200),
            weight: 100,
            effective_weight: 100,
            load: None,
            cpus: None,
            accept_queue: Some(0),
            adopted: false,
            earlier: 0,
            drain: None,
            check: None,
            restarts: 0,
            instance: 1,
            life: None,
            since: "2026-01-02T03:04:05Z".parse().unwrap(),
        }
    }

    fn dead_server(name: &str) -> ServerStatus {
        ServerStatus {
            state: ServerState::Backoff,
            reason: Some("exited with 101 after 0.4s; next start in 2s (attempt 3)".to_owned()),
            pid: None,
            connections: 0,
            limit: None,
            effective_limit: None,
            effective_weight: 0,
            accept_queue: None,
            restarts: 3,
            since: "2026-01-02T03:07:15Z".parse().unwrap(),
            ..server(name)
        }
    }

    fn shop() -> ServiceStatus {
        ServiceStatus {
            name: "shop".to_owned(),
            listen: vec!["[::]:8080".to_owned(), "0.0.0.0:80".to_owned()],
            policy: "least-connections".to_owned(),
            waiting: WaitingStatus {
                now: 3,
                max: 17,
                capacity: 1024,
                served: 40,
                oldest_seconds: 1.25,
                wait: Histogram { count: 3, sum_seconds: 0.5, buckets: vec![Bucket { le: 0.25, count: 3 }] },
                ..WaitingStatus::default()
            },
            limits: None,
            drift: DriftStatus {
                checks: 9,
                found: 2,
                repaired: 1,
                last_seconds_ago: Some(1.5),
                unavailable: None,
            },
            servers: vec![server("shop/1"), dead_server("shop/2")],
            scale: None,
            roll: None,
            outcomes: BTreeMap::from([("selected".to_owned(), 1234)]),
        }
    }

    fn trouble(what: &str) -> Trouble {
        Trouble { what: what.to_owned(), since: "2026-01-02T03:04:05Z".parse().unwrap() }
    }

    fn status(services: Vec<ServiceStatus>) -> Status {
        let version = "0.1.0".to_owned();
        let build = "1-2-3-4.5".to_owned();
        Status { version, build, pid: 7, not_upgraded: None, troubles: Vec::new(), services }
    }

    #[test]
    fn json_has_every_field_and_null_for_what_has_no_value() {
        let mut shop = shop();
        shop.servers = vec![dead_server("shop/2")];
        let expected = json!({
            "version": "0.1.0",
            "build": "1-2-3-4.5",
            "pid": 7,
            "not_upgraded": null,
            "troubles": [{"what": "the disk is full", "since": "2026-01-02T03:04:05Z"}],
            "services": [{
                "name": "shop",
                "listen": ["[::]:8080", "0.0.0.0:80"],
                "policy": "least-connections",
                "waiting": {
                    "now": 3, "max": 17, "capacity": 1024, "served": 40, "timed_out": 0,
                    "left": 0, "refused": 0, "oldest_seconds": 1.25,
                    "wait": {"count": 3, "sum_seconds": 0.5, "buckets": [{"le": 0.25, "count": 3}]},
                },
                "limits": null,
                "drift": {
                    "checks": 9, "found": 2, "repaired": 1, "last_seconds_ago": 1.5, "unavailable": null,
                },
                "servers": [{
                    "name": "shop/2",
                    "state": "backoff",
                    "reason": "exited with 101 after 0.4s; next start in 2s (attempt 3)",
                    "pid": null,
                    "connections": 0,
                    "connections_max": 40,
                    "connections_total": 1234,
                    "limit": null,
                    "effective_limit": null,
                    "weight": 100,
                    "effective_weight": 0,
                    "accept_queue": null,
                    "adopted": false,
                    "earlier": 0,
                    "drain": null,
                    "check": null,
                    "load": null,
                    "cpus": null,
                    "restarts": 3,
                    "instance": 1,
                    "life": null,
                    "since": "2026-01-02T03:07:15Z",
                }],
                "scale": null,
                "roll": null,
                "outcomes": {"selected": 1234},
            }],
        });
        let status = Status { troubles: vec![trouble("the disk is full")], ..status(vec![shop]) };
        assert_eq!(serde_json::to_value(status).unwrap(), expected);
    }

    #[test]
    fn json_survives_the_way_to_the_client_and_back() {
        let sent = status(vec![shop()]);
        let text = serde_json::to_string(&sent).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), sent);
    }

    #[test]
    fn a_field_added_by_a_newer_distributor_is_no_error() {
        let text = r#"{"version": "9.0.0", "services": [], "weather": "rain"}"#;
        let read: Status = serde_json::from_str(text).unwrap();
        assert_eq!(read.version, "9.0.0");
    }

    #[test]
    fn every_state_is_written_as_it_is_shown() {
        for state in [
            ServerState::Starting,
            ServerState::Ready,
            ServerState::Draining,
            ServerState::Unhealthy,
            ServerState::Stalled,
            ServerState::Backoff,
            ServerState::Failed,
            ServerState::Stopped,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }

    #[test]
    fn table_has_one_block_per_service_with_columns_in_line() {
        let mut api = shop();
        api.name = "api".to_owned();
        api.listen = vec!["127.0.0.1:9".to_owned()];
        api.policy = "first".to_owned();
        api.waiting = WaitingStatus::default();
        api.servers = vec![server("api/a-long-name")];
        let now = at("2026-01-02T03:07:17Z");
        let expected = "\
shop: [::]:8080, 0.0.0.0:80; least-connections; waiting 3 of 1024 (oldest 1.2s, max 17, served 40)
  NAME             STATE    SINCE   PID  CONN  MAX  TOTAL  LIMIT  WEIGHT  QUEUE  RESTARTS  REASON
  shop/1           ready    3m12s  4242    12   40   1234    200     100      0         0  -
  shop/2           backoff     2s     -     0   40   1234      -   0/100      -         3  exited with 101 after 0.4s; next start in 2s (attempt 3)

api: 127.0.0.1:9; first; waiting 0
  NAME             STATE    SINCE   PID  CONN  MAX  TOTAL  LIMIT  WEIGHT  QUEUE  RESTARTS  REASON
  api/a-long-name  ready    3m12s  4242    12   40   1234    200     100      0         0  -
";
        assert_eq!(status(vec![shop(), api]).table(None, now), expected);
    }

    #[test]
    fn table_shows_cpus_where_some_server_has_its_own_and_limits_that_are_less_than_configured() {
        let mut shop = shop();
        let since = "2026-01-02T03:04:05Z".parse().unwrap();
        shop.servers[0].cpus =
            Some(CpusStatus { list: "0-3,8".to_owned(), why: "configured".to_owned(), since });
        shop.servers[0].effective_limit = Some(25);
        shop.servers[1].effective_limit = Some(7);
        let table = status(vec![shop]).table(None, at("2026-01-02T03:07:17Z"));
        let expected = "\
shop: [::]:8080, 0.0.0.0:80; least-connections; waiting 3 of 1024 (oldest 1.2s, max 17, served 40)
  NAME    STATE    SINCE   PID  CONN  MAX  TOTAL   LIMIT  WEIGHT  QUEUE  RESTARTS  CPUS   REASON
  shop/1  ready    3m12s  4242    12   40   1234  25/200     100      0         0  0-3,8  -
  shop/2  backoff     2s     -     0   40   1234     7/-   0/100      -         3  -      exited with 101 after 0.4s; next start in 2s (attempt 3)
";
        assert_eq!(table, expected);
    }

    #[test]
    fn table_cuts_a_reason_to_the_terminal() {
        let mut shop = shop();
        shop.servers = vec![dead_server("shop/2")];
        let table = status(vec![shop]).table(Some(110), at("2026-01-02T03:07:17Z"));
        let expected = "\
shop: [::]:8080, 0.0.0.0:80; least-connections; waiting 3 of 1024 (oldest 1.2s, max 17, served 40)
  NAME    STATE    SINCE  PID  CONN  MAX  TOTAL  LIMIT  WEIGHT  QUEUE  RESTARTS  REASON
  shop/2  backoff     2s    -     0   40   1234      -   0/100      -         3  exited with 101 after 0.4s...
";
        assert_eq!(table, expected);
        assert!(table.lines().all(|line| line.len() <= 110));
    }

    #[test]
    fn troubles_stand_below_the_table_and_are_not_cut() {
        let what = "write /run/dist-ctl/record.json: No space left on device: \u{1b}[2J free some space";
        let troubled = Status { troubles: vec![trouble(what), trouble("b")], ..status(Vec::new()) };
        let expected = "\
no services

! since 3m12s: write /run/dist-ctl/record.json: No space left on device: ?[2J free some space
! since 3m12s: b
";
        assert_eq!(troubled.table(Some(20), at("2026-01-02T03:07:17Z")), expected);
    }

    #[test]
    fn table_keeps_some_of_the_reason_in_a_narrow_terminal() {
        let mut shop = shop();
        shop.servers = vec![dead_server("shop/2")];
        let table = status(vec![shop]).table(Some(20), at("2026-01-02T03:07:17Z"));
        assert!(table.ends_with("  exited with 1...\n"), "{table}");
    }

    #[test]
    fn table_says_when_there_is_nothing() {
        let now = at("2026-01-02T03:07:17Z");
        assert_eq!(status(Vec::new()).table(None, now), "no services\n");
        let mut shop = shop();
        shop.servers.clear();
        shop.listen.clear();
        shop.waiting = WaitingStatus::default();
        assert_eq!(
            status(vec![shop]).table(None, now),
            "shop: no address; least-connections; waiting 0\n  no servers\n"
        );
    }

    #[test]
    fn table_is_plain_ascii_whatever_a_server_says() {
        let mut shop = shop();
        shop.servers = vec![dead_server("shop/2")];
        shop.servers[0].reason = Some("\u{1b}[2J\nf\u{fc}r\tall \u{1F600}".to_owned());
        let table = status(vec![shop]).table(None, at("2026-01-02T03:07:17Z"));
        assert!(table.ends_with("  ?[2J f?r all ?\n"), "{table}");
    }

    #[test]
    fn age_has_two_units() {
        for (seconds, expected) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m00s"),
            (192, "3m12s"),
            (3599, "59m59s"),
            (3600, "1h00m"),
            (18_420, "5h07m"),
            (86_399, "23h59m"),
            (86_400, "1d00h"),
            (40 * 86_400 + 3 * 3600, "40d03h"),
        ] {
            assert_eq!(age(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn age_is_zero_when_the_clock_was_set_back() {
        let since: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        assert_eq!(since.age(at("2026-01-01T00:00:00Z")), Duration::ZERO);
    }

    #[test]
    fn timestamp_is_the_utc_time() {
        // Expected values from `date -u -d @SECONDS`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_767_323_045, "2026-01-02T03:04:05Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
            (253_402_300_800, "9999-12-31T23:59:59Z"),
        ] {
            let timestamp = Timestamp::from(UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(timestamp.to_string(), expected);
            assert_eq!(expected.parse(), Ok(timestamp));
        }
    }

    #[test]
    fn every_day_to_9999_is_read_as_written() {
        for day in 0..=Timestamp::LAST / DAY {
            let (year, month, day_of_month) = date(day);
            assert_eq!(days(year, month, day_of_month), day);
        }
    }

    #[test]
    fn what_is_no_time_in_utc_is_refused() {
        for text in [
            "",
            "2026-01-02",
            "2026-01-02T03:04:05",
            "2026-01-02T03:04:05+00:00",
            "2026-01-02 03:04:05Z",
            "2026-13-02T03:04:05Z",
            "2026-02-29T03:04:05Z",
            "2026-00-02T03:04:05Z",
            "2026-01-00T03:04:05Z",
            "2026-01-02T24:04:05Z",
            "2026-01-02T03:60:05Z",
            "2026-01-02T03:04:60Z",
            "1969-12-31T23:59:59Z",
            "+026-01-02T03:04:05Z",
            "2026-01-02T03:04:0\u{e9}",
        ] {
            assert_eq!(
                text.parse::<Timestamp>(),
                Err(format!("{text:?} is no time in UTC, write it like 2026-01-02T03:04:05Z"))
            );
        }
    }
}
