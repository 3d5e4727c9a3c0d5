//! `dist-ctl status --json`, read as a script would read it.
//!
//! The types are written out here again, and not taken from the product, because the names
//! and the shape are a promise to operators: a renamed field must fail a test.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Deserialize;

/// Everything one instance says.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub version: String,
    pub build: String,
    pub pid: i32,
    pub not_upgraded: Option<String>,
    pub troubles: Vec<Trouble>,
    pub services: Vec<Service>,
}

/// Something that is wrong with the machine.
#[derive(Clone, Debug, Deserialize)]
pub struct Trouble {
    pub what: String,
    pub since: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Service {
    pub name: String,
    pub listen: Vec<String>,
    pub policy: String,
    pub waiting: Waiting,
    pub limits: Option<Limits>,
    pub drift: Drift,
    pub servers: Vec<Server>,
    pub roll: Option<Roll>,
    /// How often the kernel programs ended in each of their ways out.
    pub outcomes: BTreeMap<String, u64>,
}

/// What the service as a whole may have, and each source.
#[derive(Clone, Debug, Deserialize)]
pub struct Limits {
    pub connections: Option<u64>,
    pub earlier: u64,
    pub over: String,
    pub service: Ceiling,
    pub sources: Option<Sources>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Ceiling {
    pub limit: Option<u64>,
    pub rate: Option<Rate>,
    pub refused_limit: u64,
    pub refused_rate: u64,
    pub limit_seconds_ago: Option<f64>,
    pub rate_seconds_ago: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Rate {
    pub per_second: u64,
    pub burst: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Sources {
    pub now: u64,
    pub most: Option<Source>,
    pub unknown: u64,
    pub each: Ceiling,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Source {
    pub source: String,
    pub connections: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Waiting {
    pub now: u64,
    pub max: u64,
    pub capacity: u64,
    pub served: u64,
    pub timed_out: u64,
    pub left: u64,
    pub refused: u64,
    pub oldest_seconds: f64,
    /// How long those waited that were served.
    pub wait: Histogram,
}

/// How the counts compare with the sockets there are.
#[derive(Clone, Debug, Deserialize)]
pub struct Drift {
    pub checks: u64,
    pub found: u64,
    pub repaired: u64,
    pub last_seconds_ago: Option<f64>,
    pub unavailable: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Histogram {
    pub count: u64,
    pub sum_seconds: f64,
    pub buckets: Vec<Bucket>,
}

/// So many took at most so long, all buckets before included.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Bucket {
    /// Seconds.
    pub le: f64,
    pub count: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    pub name: String,
    pub state: String,
    pub reason: Option<String>,
    pub pid: Option<i32>,
    pub connections: u64,
    pub connections_max: u64,
    pub connections_total: u64,
    pub limit: Option<u64>,
    pub effective_limit: Option<u64>,
    pub weight: u64,
    pub effective_weight: u64,
    pub accept_queue: Option<u64>,
    pub restarts: u64,
    pub instance: u64,
    pub life: Option<Life>,
    pub earlier: u64,
    pub drain: Option<Drain>,
    pub check: Option<Check>,
    pub load: Option<Load>,
    pub cpus: Option<Cpus>,
    pub since: String,
}

/// What a server says of its load, and what is seen of it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Load {
    pub reported: Option<f64>,
    pub reported_seconds_ago: Option<f64>,
    pub capacity: Option<u64>,
    pub capacity_seconds_ago: Option<f64>,
    pub cpu_pressure: Option<f64>,
    pub accept_seconds: Option<f64>,
    pub percent: u64,
    pub since: Option<String>,
}

/// Which CPUs a server has.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Cpus {
    pub list: String,
    pub why: String,
    pub since: String,
}

/// How its checks go.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Check {
    #[serde(rename = "type")]
    pub kind: String,
    pub good: Option<bool>,
    pub said: Option<String>,
    pub since: Option<String>,
    pub good_total: u64,
    pub bad_total: u64,
}

/// How long an instance has lived, and what ends that.
#[derive(Clone, Debug, Deserialize)]
pub struct Life {
    pub started: String,
    pub until: Option<String>,
    pub connections: u64,
    pub max_connections: Option<u64>,
    pub memory: Option<u64>,
    pub memory_limit: Option<u64>,
}

/// Its servers are restarted one after the other, or were.
#[derive(Clone, Debug, Deserialize)]
pub struct Roll {
    pub number: u64,
    pub state: String,
    pub asked: bool,
    pub since: String,
    pub ended: Option<String>,
    pub reason: Option<String>,
    pub max_surge: u64,
    pub max_unavailable: u64,
    pub servers: Vec<Item>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Item {
    pub name: String,
    pub state: String,
    pub reason: Option<String>,
}

/// An operator has taken it out.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Drain {
    pub since: String,
    pub then: String,
    pub seconds_left: Option<f64>,
}

impl Status {
    /// Reads the output of `status --json`.
    #[track_caller]
    pub fn parse(json: &str) -> Self {
        serde_json::from_str(json)
            .unwrap_or_else(|error| panic!("status --json is not as promised: {error}:\n{json}"))
    }

    /// One service by its name.
    #[track_caller]
    pub fn service(&self, name: &str) -> &Service {
        self.services
            .iter()
            .find(|service| service.name == name)
            .unwrap_or_else(|| panic!("status knows no service {name}: {self:#?}"))
    }

    /// The service of a test that has only one.
    #[track_caller]
    pub fn only(&self) -> &Service {
        assert!(self.services.len() == 1, "not one service: {self:#?}");
        &self.services[0]
    }
}

impl Service {
    /// One server by its name, `app/1`.
    #[track_caller]
    pub fn server(&self, name: &str) -> &Server {
        self.servers
            .iter()
            .find(|server| server.name == name)
            .unwrap_or_else(|| panic!("status knows no server {name}: {self:#?}"))
    }

    /// The connections of each server, in the order of the configuration.
    pub fn connections(&self) -> Vec<u64> {
        self.each(|server| server.connections)
    }

    /// The connections that each server ever had.
    pub fn totals(&self) -> Vec<u64> {
        self.each(|server| server.connections_total)
    }

    /// The state of each server.
    pub fn states(&self) -> Vec<&str> {
        self.servers.iter().map(|server| server.state.as_str()).collect()
    }

    /// Every server is ready.
    pub fn is_ready(&self) -> bool {
        self.servers.iter().all(|server| server.state == "ready")
    }

    /// How often the kernel programs ended this way. It must be a way they have.
    #[track_caller]
    pub fn outcome(&self, name: &str) -> u64 {
        *self.outcomes.get(name).unwrap_or_else(|| panic!("there is no outcome {name}: {:#?}", self.outcomes))
    }

    /// How often each of these ways out was taken, to compare all in one line.
    #[track_caller]
    pub fn outcomes<const N: usize>(&self, names: [&str; N]) -> [u64; N] {
        names.map(|name| self.outcome(name))
    }

    /// What it says of limits. There must be some.
    #[track_caller]
    pub fn limits(&self) -> &Limits {
        self.limits.as_ref().unwrap_or_else(|| panic!("there are no limits: {self:#?}"))
    }

    /// What it says of sources. They must have limits.
    #[track_caller]
    pub fn sources(&self) -> &Sources {
        self.limits().sources.as_ref().unwrap_or_else(|| panic!("sources have no limits: {self:#?}"))
    }

    fn each(&self, value: impl Fn(&Server) -> u64) -> Vec<u64> {
        self.servers.iter().map(value).collect()
    }
}
