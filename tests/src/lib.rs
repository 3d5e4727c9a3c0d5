//! What the integration tests of `dist-ctl` stand on.
//!
//! A test makes a [`host::Host`]: its own network namespace and its own directory, and so its
//! own control socket, cgroup and pins. It brings `dist-ctl` up in there with real servers,
//! connects as clients do, and compares what `status` and the kernel's counters say with what
//! the clients and the servers saw. When the host goes, nothing of it may be left, and the
//! test fails if something is.
//!
//! The tests themselves stand in `tests/`, one file per behaviour. They need root, a kernel
//! that lets them load BPF programs, and the packages in `fixtures/packages.txt`;
//! `cargo xtask test` sees to all three.

pub mod app;
pub mod client;
pub mod command;
pub mod counts;
pub mod flood;
pub mod host;
pub mod http;
pub mod inside;
pub mod leftover;
pub mod load;
pub mod manager;
pub mod netlink;
pub mod network;
pub mod own;
pub mod process;
pub mod real;
pub mod site;
pub mod status;
pub mod unfit;
pub mod wait;
pub mod wire;
