//! `dist-ctl doctor`: what it finds on this machine, and on one that lacks something.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use rustix::thread::{CapabilitySet, UnshareFlags};
use serde_json::Value;
use tests::{
    app::App,
    client::Client,
    command::{self, Ended},
    host::{Host, V4},
    leftover,
    network::unshare,
    process::{Signal, signal_child},
    unfit::{BPFFS, as_nobody, elsewhere, mount_bpffs, renounce, unmount_bpffs, unmount_cgroups},
    wait::{seconds, wait_for},
};

/// What programs know the checks by: may be added to, and never changed.
const NAMES: [&str; 41] = [
    "root",
    "capabilities",
    "runtime-dir",
    "cgroup2",
    "cgroup",
    "cgroup-enter",
    "loopback",
    "ipv6",
    "bpffs",
    "pin",
    "maps",
    "load-select",
    "load-track",
    "load-bind4",
    "load-bind6",
    "attach-select",
    "attach-track",
    "attach-bind4",
    "attach-bind6",
    "replace",
    "share4",
    "share6",
    "low-port",
    "events",
    "steer",
    "tag",
    "sock-diag",
    "close",
    "count",
    "migrate",
    "wake",
    "drop-rights",
    "other-user",
    "pidfd-open",
    "pidfd-getfd",
    "cgroup-kill",
    "cpu-pressure",
    "cgroup-remove",
    "open-files",
    "accept-queues",
    "syn-cookies",
];

/// What `dist-ctl doctor --json` said.
struct Report(Value);

impl Report {
    #[track_caller]
    fn of(ended: &Ended) -> Self {
        assert!(ended.stderr.is_empty(), "{ended}");
        let report: Value =
            serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended}"));
        assert_eq!(report["works"], ended.code == Some(0), "{ended}");
        Self(report)
    }

    #[track_caller]
    fn check(&self, name: &str) -> &Value {
        let checks = self.0["checks"].as_array().expect("a list of checks");
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }

    /// The names of the checks with this result.
    fn with(&self, result: &str) -> BTreeSet<&str> {
        let checks = self.0["checks"].as_array().expect("a list of checks");
        checks
            .iter()
            .filter(|check| check["result"] == result)
            .filter_map(|check| check["name"].as_str())
            .collect()
    }

    /// It does not work, and this is said of it.
    #[track_caller]
    fn expect_failure(&self, name: &str, words: &[&str]) {
        let check = self.check(name);
        assert_eq!(check["result"], "fails", "{check}");
        for said in ["why", "then", "to_do"] {
            assert!(check[said].as_str().is_some_and(|said| !said.is_empty()), "{said}: {check}");
        }
        for word in words {
            assert!(check.to_string().contains(word), "expected {word:?} in {check}");
        }
    }

    /// These could not be tried, because of that one.
    #[track_caller]
    fn expect_untried(&self, names: &[&str], because: &str) {
        for name in names {
            let check = self.check(name);
            assert!(check["result"] == "untried" && check["because"] == because, "{check}");
        }
    }

    #[track_caller]
    fn expect_working(&self, names: &[&str]) {
        for name in names {
            let check = self.check(name);
            assert_eq!(check["result"], "works", "{check}");
        }
    }
}

/// Cgroups and pins of doctors whose process is gone: other tests may run one.
fn left() -> Vec<PathBuf> {
    let roots = [leftover::cgroup_mount(), Some(PathBuf::from(BPFFS))];
    let entries = roots.into_iter().flatten().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten();
    let is_left = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let process = name.and_then(|name| name.strip_prefix("dist-ctl_doctor-"));
        process.is_some_and(|process| !Path::new("/proc").join(process).exists())
    };
    entries.map(|entry| entry.path()).filter(is_left).collect()
}

/// Held by whoever runs doctors; alone, by who has one leave something behind.
static DOCTORS: RwLock<()> = RwLock::new(());

fn beside_others() -> (RwLockReadGuard<'static, ()>, Host) {
    (DOCTORS.read().unwrap_or_else(PoisonError::into_inner), Host::new())
}

/// Runs it, and makes sure that nothing is left.
#[track_caller]
fn doctor(host: &Host) -> Report {
    // A kernel that distrusts whoever loads a program looks at it for seconds, as a busy one does.
    let report = Report::of(&command::run(&mut host.command(&["doctor", "--json"]), seconds(60.0)));
    assert_eq!(left(), [] as [PathBuf; 0]);
    assert!(!host.runtime("main").exists());
    report
}

/// A doctor that has made its cgroup.
#[track_caller]
fn begun(host: &Host) -> (Child, PathBuf) {
    let mut command = host.command(&["doctor", "--json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let child = child.expect("start a doctor");
    let cgroup = leftover::cgroup_mount().expect("cgroup v2 is mounted");
    let cgroup = cgroup.join(format!("dist-ctl_doctor-{}", child.id()));
    wait_for("a doctor to enter its cgroup", seconds(20.0), || {
        let inside = fs::read_to_string(cgroup.join("cgroup.procs")).ok()?;
        (!inside.is_empty()).then_some(())
    });
    (child, cgroup)
}

#[test]
fn where_dist_ctl_works_it_says_so() {
    let (_others, host) = beside_others();
    let report = doctor(&host);
    let fails = report.with("fails");
    // The kernel's wake-up, and how the machine is set up, are not ours to choose.
    let may_fail = BTreeSet::from(["wake", "cpu-pressure", "open-files", "accept-queues", "syn-cookies"]);
    assert!(fails.is_subset(&may_fail), "{}", report.0);
    assert_eq!(report.with("untried"), BTreeSet::new(), "{}", report.0);
    assert_eq!(report.0["works"], true);
}

#[test]
fn each_check_has_a_line_and_the_last_line_is_the_verdict() {
    let (_others, host) = beside_others();
    let ended = host.run(&["doctor"]).expect_done();
    for name in NAMES {
        let lines = ended.stdout.lines().filter(|line| line.split_whitespace().nth(1) == Some(name));
        assert_eq!(lines.count(), 1, "{name}: {ended}");
    }
    assert!(
        ended.stdout.lines().last().is_some_and(|line| line.starts_with("dist-ctl works here")),
        "{ended}"
    );
    let quiet = host.run(&["doctor", "-q"]).expect_done();
    assert!(!quiet.stdout.contains("works  ") && quiet.stdout.contains("\ndist-ctl works here"), "{quiet}");
}

#[test]
fn the_json_has_the_names_and_fields_that_programs_rely_on() {
    let (_others, host) = beside_others();
    let report = doctor(&host);
    for field in ["version", "kernel", "kernel_build", "architecture"] {
        assert!(report.0[field].as_str().is_some_and(|text| !text.is_empty()), "{field}");
    }
    let fields = ["about", "because", "found", "name", "needed", "result", "then", "to_do", "what", "why"];
    for name in NAMES {
        let check = report.check(name).as_object().expect("a check is an object");
        for field in fields {
            assert!(check.contains_key(field), "{name} has no {field}");
        }
        assert!(check["needed"].is_boolean() && check["what"].is_string(), "{check:?}");
        assert!(check["about"] == "machine" || check["about"] == "kernel", "{check:?}");
    }
}

#[test]
fn a_dist_ctl_that_runs_does_not_notice_it() {
    let (_others, host) = beside_others();
    let up = host.up(&App::of(&host, 2));
    let held = Client::open(V4).expect("connect");
    let (before, distributor) = (up.service(), up.distributor());
    for _ in 0..3 {
        let report = Report::of(&host.run(&["doctor", "--json"]));
        assert_eq!(report.0["works"], true, "{}", report.0);
    }
    let after = up.service();
    assert_eq!(up.distributor(), distributor);
    assert_eq!(after.connections(), before.connections());
    assert_eq!(after.states(), ["ready", "ready"]);
    drop(held);
    Client::open(V4).expect("connect");
}

#[test]
fn somebody_who_is_not_root_is_told_for_what_root_is_needed() {
    let (_others, host) = beside_others();
    let report = Report::of(&as_nobody(&host, &["doctor", "--json"]));
    report.expect_failure("root", &["this is user 65534", "sudo dist-ctl doctor"]);
    report.expect_working(&["loopback", "ipv6", "cgroup2", "pidfd-open"]);
    report.expect_untried(
        &["cgroup", "attach-track", "bpffs", "maps", "load-select", "migrate", "drop-rights"],
        "root",
    );
    assert_eq!(report.0["works"], false);
    let ended = as_nobody_again(&host);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert_eq!(
        ended.stdout.lines().last(),
        Some("dist-ctl does not work here, for want of: root"),
        "{ended}"
    );
}

/// As a table.
#[track_caller]
fn as_nobody_again(host: &Host) -> Ended {
    as_nobody(host, &["doctor"])
}

#[test]
fn without_cgroup_v2_the_programs_are_tried_all_the_same() {
    let (_others, host) = beside_others();
    elsewhere(|| {
        unmount_cgroups();
        let report = doctor(&host);
        report.expect_failure("cgroup2", &["mount -t cgroup2"]);
        report.expect_untried(
            &["cgroup", "cgroup-enter", "attach-track", "share4", "count", "cgroup-kill"],
            "cgroup2",
        );
        report.expect_working(&[
            "load-select",
            "load-track",
            "load-bind6",
            "steer",
            "tag",
            "sock-diag",
            "migrate",
            "pidfd-getfd",
        ]);
        assert_eq!(report.0["works"], false);
    });
}

#[test]
fn without_a_bpffs_it_finds_that_one_can_be_mounted_and_mounts_none() {
    let (_others, host) = beside_others();
    elsewhere(|| {
        unmount_bpffs();
        // Other tests' mounts go with their directories.
        let others = |line: &str| line.contains("/dist-ctl-test-") && !line.contains(&host.path_text(""));
        let mounts = || {
            let all = fs::read_to_string("/proc/thread-self/mountinfo").expect("read the mounts");
            all.lines().filter(|line| !others(line)).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = mounts();
        let report = doctor(&host);
        report.expect_working(&["bpffs", "pin", "steer"]);
        let found = report.check("bpffs")["found"].as_str().expect("what was found");
        assert!(found.contains("mounts one"), "{found}");
        assert_eq!(mounts(), before);
        renounce(&[CapabilitySet::SYS_ADMIN]);
        let report = doctor(&host);
        report.expect_failure("bpffs", &["not permitted", "mount -t bpf bpf /sys/fs/bpf"]);
        report.expect_untried(&["pin"], "bpffs");
        report.expect_working(&["maps", "load-select", "steer", "count"]);
        assert_eq!(report.0["works"], false);
    });
}

#[test]
fn each_capability_that_is_missing_is_named_and_what_it_costs() {
    const SYS_ADMIN: CapabilitySet = CapabilitySet::SYS_ADMIN;
    for (lacks, name, fails, works) in [
        (&[SYS_ADMIN, CapabilitySet::BPF][..], "CAP_BPF", "maps", "cgroup-kill"),
        (&[SYS_ADMIN, CapabilitySet::PERFMON], "CAP_PERFMON", "load-select", "maps"),
        (&[SYS_ADMIN, CapabilitySet::NET_ADMIN], "CAP_NET_ADMIN", "load-track", "maps"),
        (&[CapabilitySet::SETPCAP], "CAP_SETPCAP", "drop-rights", "count"),
        (&[CapabilitySet::SETUID], "CAP_SETUID", "other-user", "count"),
        (&[CapabilitySet::SYS_PTRACE], "CAP_SYS_PTRACE", "pidfd-getfd", "count"),
        (&[CapabilitySet::NET_ADMIN], "CAP_NET_ADMIN", "close", "count"),
        (&[CapabilitySet::SYS_NICE], "CAP_SYS_NICE", "capabilities", "count"),
    ] {
        let (_others, host) = beside_others();
        elsewhere(|| {
            mount_bpffs();
            renounce(lacks);
            let report = doctor(&host);
            println!("without {name}: {:?}", report.with("fails"));
            report.expect_failure("capabilities", &[name]);
            report.expect_failure(fails, &[]);
            report.expect_working(&[works]);
            // Not everybody has servers of another user, or closes connections of others.
            assert_eq!(report.0["works"], ["other-user", "close", "capabilities"].contains(&fails));
        });
    }
}

#[test]
fn a_loopback_that_is_down_is_found() {
    let (_others, host) = beside_others();
    std::thread::scope(|scope| {
        let alone = scope.spawn(|| {
            unshare(UnshareFlags::NEWNET).expect("make a network namespace");
            let report = doctor(&host);
            report.expect_failure("loopback", &["ip link set lo up"]);
            report.expect_untried(&["share4", "steer", "count", "migrate", "wake"], "loopback");
            report.expect_working(&["attach-select", "attach-track", "cgroup-kill"]);
            assert_eq!(report.0["works"], false);
        });
        alone.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn without_ipv6_dist_ctl_works_all_the_same() {
    let (_others, host) = beside_others();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("turn IPv6 off");
    let report = doctor(&host);
    report.expect_failure("ipv6", &["0.0.0.0:PORT"]);
    report.expect_untried(&["share6"], "ipv6");
    report.expect_working(&["share4", "steer", "count", "migrate"]);
    assert_eq!(report.0["works"], true);
}

#[test]
fn settings_that_are_too_small_are_hints_and_no_failure() {
    let (_others, host) = beside_others();
    fs::write("/proc/sys/net/core/somaxconn", "128").expect("shorten accept queues");
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("always send cookies");
    let report = doctor(&host);
    report.expect_failure("accept-queues", &["128", "4096"]);
    report.expect_failure("syn-cookies", &["tcp_syncookies = 2"]);
    // With cookies, the connection is made by the ACK.
    report.expect_working(&["steer", "count"]);
    assert_eq!(report.0["works"], true);
}

#[test]
fn a_doctor_that_is_asked_to_stop_leaves_nothing() {
    let (_others, host) = beside_others();
    let (mut child, cgroup) = begun(&host);
    signal_child(&child, Signal::TERM);
    let status = child.wait().expect("wait for the doctor");
    // It may just have been done.
    assert!(status.code().is_some_and(|code| code <= 1), "{status}");
    assert!(!cgroup.exists());
}

#[test]
fn a_check_whose_process_dies_has_failed_and_the_others_are_done() {
    let (_others, host) = beside_others();
    let (child, cgroup) = begun(&host);
    fs::write(cgroup.join("cgroup.kill"), "1").expect("kill its examiner");
    let output = child.wait_with_output().expect("wait for the doctor");
    assert_eq!(output.status.code(), Some(1));
    let report = Report(serde_json::from_slice(&output.stdout).expect("a report"));
    let checks = report.0["checks"].as_array().expect("a list of checks");
    let died = |check: &&Value| check["why"].as_str().is_some_and(|why| why.contains("signal: 9"));
    let over = checks.iter().find(died).and_then(|check| check["name"].as_str()).expect("one failed");
    report.expect_untried(&["count", "migrate", "other-user", "pidfd-open", "cgroup-kill"], over);
    report.expect_working(&["cgroup-remove", "open-files"]);
    assert!(!cgroup.exists());
}

#[test]
fn what_a_killed_doctor_left_the_next_one_removes() {
    let _alone = DOCTORS.write().unwrap_or_else(PoisonError::into_inner);
    let host = Host::new();
    let (mut child, cgroup) = begun(&host);
    signal_child(&child, Signal::KILL);
    child.wait().expect("wait for the doctor");
    wait_for("its examiner to end by itself", seconds(20.0), || {
        fs::read_to_string(cgroup.join("cgroup.procs")).map_or(true, |inside| inside.is_empty()).then_some(())
    });
    assert!(cgroup.exists(), "it was killed, and so cannot have removed it");
    // Where the runtime directory is to be, others have directories too.
    let [its, another, full] = [child.id().to_string().as_str(), "notes", "4194305"]
        .map(|name| host.path(&format!("dist-ctl_doctor-{name}")));
    for path in [&its, &another, &full] {
        fs::create_dir(path).expect("make a directory");
    }
    fs::write(full.join("file"), "").expect("write a file");
    assert_eq!(doctor(&host).0["works"], true);
    assert_eq!([&cgroup, &its, &another, &full].map(|path| path.exists()), [false, false, true, true]);
}
