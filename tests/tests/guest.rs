//! What takes a machine of its own: a CPU that goes away, memory that runs out, and kernels that
//! are not the one that runs here. Only `cargo xtask vm` runs these, each on the kernels it is about.

#![forbid(unsafe_code)]

use std::{
    fs,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tests::{
    app::App,
    client::{self, Client, Line},
    command,
    host::{Host, Up, V4, program},
    load::under_load,
    process::Process,
    wait::{seconds, wait_for, wait_until_eq},
};

/// The second CPU, for one test at a time. The first one cannot be taken away.
struct Cpu(#[expect(dead_code, reason = "it is held")] MutexGuard<'static, ()>);

impl Cpu {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";

    fn of_this_test() -> Self {
        static TAKEN: Mutex<()> = Mutex::new(());
        // A test that failed has brought it back as well.
        Self(TAKEN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[track_caller]
    fn take_away(&self) {
        fs::write(Self::ONLINE, "0").expect("take the CPU away");
    }

    #[track_caller]
    fn bring_back(&self) {
        fs::write(Self::ONLINE, "1").expect("bring the CPU back");
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        // It may be there.
        let _ = fs::write(Self::ONLINE, "1");
    }
}

#[test]
#[ignore = "takes a CPU away from the machine; cargo xtask vm runs it"]
fn a_cpu_that_goes_away_and_comes_back_fails_no_connection() {
    let cpu = Cpu::of_this_test();
    let host = Host::new();
    let pinned = [("first", "cpus = \"0\""), ("second", "cpus = \"1\"")];
    let app = App::of(&host, 0).named(pinned.map(|(name, lines)| (name, lines.to_owned())));
    let up = host.up(&app);
    let servers = pinned.map(|(name, _)| up.process(&format!("app/{name}")));
    let second = || up.process("app/second").fact("Cpus_allowed_list");
    assert_eq!(second(), "1");
    let mut held = client::hold(V4, 10);
    under_load(2, |load| {
        load.serves(20);
        cpu.take_away();
        load.serves(20);
        // The kernel has moved the server to where it can run.
        assert!(second().starts_with('0'), "it may run on {}", second());
        assert!(held.iter_mut().all(Client::is_served), "on the server without a CPU too");
        up.wait_trouble(&["app/second: none of its CPUs (1) is online"]);
        cpu.bring_back();
        wait_until_eq("its CPUs", seconds(20.0), "1".to_owned(), second);
        load.serves(20);
    });
    assert_eq!(pinned.map(|(name, _)| up.process(&format!("app/{name}"))), servers, "nothing was restarted");
    up.wait_no_trouble();
    drop(held);
    up.wait_connections(&[0, 0]);
    up.stop();
}

#[test]
#[ignore = "takes a CPU away from the machine; cargo xtask vm runs it"]
fn a_server_without_a_cpu_starts_on_another_until_its_own_is_back() {
    let cpu = Cpu::of_this_test();
    let host = Host::new();
    let app = App::of(&host, 0)
        .named([("first", "cpus = \"0\"".to_owned()), ("second", "cpus = \"1\"".to_owned())]);
    cpu.take_away();
    let up = host.up(&app);
    let cpus = || up.process("app/second").fact("Cpus_allowed_list");
    let next = |old: &Process| {
        old.kill(seconds(5.0));
        wait_for("the next instance", seconds(20.0), || {
            up.process_if_any("app/second").filter(|process| process != old)
        });
        up.wait_ready();
    };
    next(&up.process("app/second"));
    // A distributor reads its configuration again.
    up.replace_distributor();
    client::hold(V4, 4);
    up.wait_trouble(&["app/second: none of its CPUs (1) is online"]);
    cpu.bring_back();
    wait_until_eq("its CPUs", seconds(20.0), "1".to_owned(), cpus);
    next(&up.process("app/second"));
    assert_eq!(cpus(), "1");
    up.stop();
}

#[test]
#[ignore = "takes a CPU away from the machine; cargo xtask vm runs it"]
fn whoever_had_a_cpu_that_goes_away_and_comes_back_has_it_again() {
    let cpu = Cpu::of_this_test();
    let host = Host::new();
    let app = App { server: "cpus = \"spread\"".to_owned(), ..App::of(&host, 2) };
    let up = host.up(&app);
    let servers = ["app/1", "app/2"].map(|server| up.process(server));
    let masks = || servers.map(|server| server.fact("Cpus_allowed_list"));
    let both = ["0", "1"].map(str::to_owned);
    assert_eq!(masks(), both);
    under_load(2, |load| {
        load.serves(20);
        cpu.take_away();
        let why = "spread over those that are there; 1 when all are";
        wait_until_eq("what it has", seconds(20.0), ("0".to_owned(), why.to_owned()), || {
            let its = up.service().server("app/2").cpus.clone().expect("it has CPUs");
            (its.list, its.why)
        });
        // The kernel names the one that is offline as well.
        let [first, second] = masks();
        assert!(first == "0" && second.starts_with('0'), "{first}; {second}");
        // The next distributor knows whose it was.
        up.replace_distributor();
        load.serves(20);
        cpu.bring_back();
        wait_until_eq("the CPUs", seconds(20.0), both.clone(), masks);
    });
    assert_eq!(["app/1", "app/2"].map(|server| up.process(server)), servers, "nothing was restarted");
    up.wait_no_trouble();
    up.stop();
}

#[test]
#[ignore = "has the kernel kill for want of memory; cargo xtask vm runs it"]
fn memory_that_runs_out_fails_no_connection() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let parts = || [up.monitor(), up.distributor(), up.process("app/1"), up.process("app/2")];
    let before = parts();
    under_load(2, |load| {
        load.serves(20);
        // tail keeps the whole of what has no line end. It is to be the one that the kernel kills.
        let mut hog = Command::new("sh");
        hog.args(["-c", "echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero"]);
        let ended = command::run(&mut hog, seconds(60.0));
        assert_eq!(ended.code, None, "the kernel killed it: {ended}");
        load.serves(20);
    });
    assert_eq!(parts(), before);
    up.wait_connections(&[0, 0]);
    assert_eq!(up.service().states(), ["ready", "ready"]);
    up.stop();
}

/// Twenty that wait for one place, and get it one after the other.
#[track_caller]
fn twenty_wait(host: &Host) -> Up<'_> {
    let up = host.up(&App { limit: Some(1), ..App::of(host, 1) });
    let held = client::hold(V4, 1);
    let mut line = Line::behind(held, client::stand(&[V4], 20)).expect("watch the line");
    wait_until_eq("those who wait", seconds(10.0), 20, || up.service().waiting.now);
    let order = line.turns(20).expect("those who wait are served");
    assert!(order.is_sorted(), "first come, first served: {order:?}");
    assert_eq!(up.service().outcome("handed_over"), 20);
    up
}

#[test]
#[ignore = "about kernels that move connections without waking servers; cargo xtask vm runs it"]
fn a_kernel_that_does_not_wake_gets_the_bell() {
    let host = Host::new();
    let up = twenty_wait(&host);
    assert!(up.service().outcome("bell") > 0, "{:?}", up.service().outcomes);
    up.stop();
}

#[test]
#[ignore = "about kernels that wake servers to which they move connections; cargo xtask vm runs it"]
fn a_kernel_that_wakes_gets_no_bell() {
    let host = Host::new();
    let up = twenty_wait(&host);
    assert_eq!(up.service().outcome("bell"), 0);
    up.stop();
}

#[test]
#[ignore = "about kernels that are too old; cargo xtask vm runs it"]
fn a_kernel_that_is_too_old_is_refused_in_one_sentence() {
    let host = Host::new();
    let words = ["up", "--listen", "127.0.0.1:8080", "--servers", "1", "--", "/init", "--help"];
    host.run(&words).expect_refusal(1, &["Linux 6.1 or later"]);
    assert!(!host.runtime("main").exists(), "nothing is left");
    // What needs no kernel works.
    let mut version = Command::new(program());
    let ended = command::run(version.arg("--version").stdin(Stdio::null()), seconds(20.0));
    assert!(ended.expect_done().stdout.starts_with("dist-ctl "));
}
