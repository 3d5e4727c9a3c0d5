//! The machine loses its power, and keeps the runtime directory, though none of what it names
//! exists any more. Only `cargo xtask vm` runs these: one boot for each, with `/kept` in common.

#![forbid(unsafe_code)]

use std::{fs, mem, path::Path, process::Command};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4},
};

/// What outlives a boot.
const RUNTIME: &str = "/kept/runtime";

fn up_there(host: &Host) -> Command {
    let file = host.write("dist-ctl.toml", &App::of(host, 2).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_RUNTIME_DIR", RUNTIME);
    command
}

#[test]
#[ignore = "leaves everything running until the power is cut; cargo xtask vm runs it"]
fn a_first_boot_ends_while_connections_are_held() {
    let host = Host::new();
    let up = host.start_command(up_there(&host));
    up.wait_ready();
    mem::forget(client::hold(V4, 20));
    up.wait_connections(&[10, 10]);
    // Nothing is to be stopped or removed: the machine is switched off now.
    mem::forget(up);
    mem::forget(host);
}

#[test]
#[ignore = "needs what the first boot left; cargo xtask vm runs it"]
fn a_second_boot_starts_clean() {
    let host = Host::new();
    assert!(Path::new(RUNTIME).join("control.sock").exists(), "the first boot left its runtime directory");
    let up = host.start_command(up_there(&host));
    up.wait_ready();
    let service = up.service();
    assert_eq!(service.connections(), [0, 0]);
    assert_eq!(service.totals(), [0, 0], "nothing is taken over from another boot");
    let held: Vec<Client> = client::hold(V4, 20);
    up.wait_connections(&[10, 10]);
    drop(held);
    up.wait_connections(&[0, 0]);
    up.stop();
    let left: Vec<_> = fs::read_dir("/kept").expect("read what is kept").collect();
    assert!(left.is_empty(), "{left:?}");
}
