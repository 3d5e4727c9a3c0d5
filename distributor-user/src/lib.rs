//! The user-space half of dist-ctl.
//!
//! A library, so that tests reach every part; the binary `dist-ctl` is `main.rs`. Which file
//! answers which question stands in ARCHITECTURE.md's code map.

pub mod accept_queue;
pub mod address;
pub mod affinity;
pub mod attendant;
pub mod auditor;
pub mod backoff;
pub mod bell;
pub mod cgroup;
pub mod cli;
pub mod closer;
pub mod config;
pub mod control;
pub mod corridor;
pub mod demo;
pub mod dismiss;
pub mod distributor;
pub mod doctor;
pub mod drain;
pub mod drift;
pub mod error;
pub mod foreign;
pub mod instance;
pub mod keeper;
pub mod kernel;
pub mod launch;
mod launcher;
pub mod lifetime;
pub mod link;
pub mod listener;
pub mod lock;
pub mod logging;
pub mod memory;
pub mod message;
pub mod moment;
pub mod monitor;
pub mod notify;
pub mod plan;
pub mod record;
pub mod recovery;
pub mod restart;
pub mod roll;
pub mod room;
pub mod server;
pub mod service;
pub mod share;
pub mod shared;
pub mod sock_diag;
pub mod status;
pub mod systemd;
pub mod trouble;
pub mod upgrade;
pub mod watch;
