//! A server that an operator has taken out of the plan: since when, and what becomes of its
//! connections.
//!
//! Pure. It gets no new connections, and is neither stopped nor left alone otherwise. Takes the
//! time and how many connections it has, says whether the rest is to be closed now, and what to
//! tell people. What a server does because it is stopped is the business of `server`.
#![forbid(unsafe_code)]

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{moment, server::span};

/// What an operator wants of a server until he resumes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    #[serde(with = "moment")]
    pub since: Instant,
    /// `None`: its connections may take as long as they like.
    deadline: Option<Deadline>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Deadline {
    #[serde(with = "moment")]
    at: Instant,
    then: Rest,
}

/// What becomes of the connections that are left at the deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rest {
    /// They go on.
    #[default]
    Leave,
    /// They are reset.
    Close,
}

impl FromStr for Rest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "leave" => Ok(Self::Leave),
            "close" => Ok(Self::Close),
            _ => Err("write leave or close".to_owned()),
        }
    }
}

impl Drain {
    /// From now on. `timeout`: how long its connections have before the rest is treated so.
    pub fn new(now: Instant, timeout: Option<Duration>, then: Rest) -> Self {
        let at = timeout.and_then(|timeout| now.checked_add(timeout));
        Self { since: now, deadline: at.map(|at| Deadline { at, then }) }
    }

    /// When something is to be done that has not been due before.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.deadline.map(|deadline| deadline.at).filter(|at| *at > now)
    }

    /// Those that are left are to be closed now.
    pub fn closes(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline.then == Rest::Close && deadline.at <= now)
    }

    /// What becomes of those that are left, and in how much time. `None`: there is no deadline.
    pub fn ahead(&self, now: Instant) -> Option<(Duration, Rest)> {
        self.deadline.map(|deadline| (deadline.at.saturating_duration_since(now), deadline.then))
    }

    /// How it stands with its connections, and what comes next.
    pub fn reason(&self, now: Instant, connections: u64) -> String {
        let noun = if connections == 1 { "connection" } else { "connections" };
        let state = match (connections, self.ahead(now)) {
            (0, _) => "has no connections".to_owned(),
            (_, None) => format!("has {connections} {noun}"),
            (_, Some((Duration::ZERO, Rest::Leave))) => {
                format!("still has {connections} {noun}, which may go on")
            }
            (_, Some((Duration::ZERO, Rest::Close))) => {
                format!("still has {connections} {noun}, to be closed now")
            }
            (_, Some((left, Rest::Leave))) => {
                format!("has {connections} {noun}, which are given {}", span(left))
            }
            (_, Some((left, Rest::Close))) => {
                format!("has {connections} {noun}, closed in {}", span(left))
            }
        };
        format!("drained by an operator; {state}; resume it to put it back")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[test]
    fn what_becomes_of_its_connections_is_said() {
        let now = Instant::now();
        for (timeout, then, after, connections, expected, closes) in [
            (None, Rest::Leave, 100, 2, "has 2 connections", false),
            (None, Rest::Close, 100, 1, "has 1 connection", false),
            (Some(TIMEOUT), Rest::Leave, 10, 2, "has 2 connections, which are given 20s", false),
            (Some(TIMEOUT), Rest::Leave, 30, 2, "still has 2 connections, which may go on", false),
            (Some(TIMEOUT), Rest::Close, 10, 2, "has 2 connections, closed in 20s", false),
            (Some(TIMEOUT), Rest::Close, 30, 2, "still has 2 connections, to be closed now", true),
            (Some(TIMEOUT), Rest::Close, 99, 1, "still has 1 connection, to be closed now", true),
            (Some(TIMEOUT), Rest::Close, 10, 0, "has no connections", false),
            (Some(Duration::ZERO), Rest::Close, 0, 3, "still has 3 connections, to be closed now", true),
        ] {
            let drain = Drain::new(now, timeout, then);
            let later = now + Duration::from_secs(after);
            let expected = format!("drained by an operator; {expected}; resume it to put it back");
            assert_eq!(drain.reason(later, connections), expected);
            assert_eq!(drain.closes(later), closes, "{expected}");
        }
    }

    #[test]
    fn the_deadline_is_told_until_it_has_passed() {
        let now = Instant::now();
        let drain = Drain::new(now, Some(TIMEOUT), Rest::Close);
        assert_eq!(drain.deadline(now), Some(now + TIMEOUT));
        assert_eq!(drain.deadline(now + TIMEOUT), None);
        assert_eq!(Drain::new(now, None, Rest::Close).deadline(now), None);
    }

    #[test]
    fn the_next_distributor_goes_on_with_it() {
        let drain = Drain::new(Instant::now(), Some(TIMEOUT), Rest::Close);
        let read: Drain = serde_json::from_str(&serde_json::to_string(&drain).unwrap()).unwrap();
        let (left, then) = read.ahead(Instant::now()).unwrap();
        assert_eq!(then, Rest::Close);
        assert!(left <= TIMEOUT && left > TIMEOUT - Duration::from_secs(5), "{left:?}");
    }
}
