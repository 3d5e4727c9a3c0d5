//! What is tried, in which order, and what follows when it does not work.
//!
//! A table, and nothing else. The names are what programs know the checks by: they may be added to,
//! and are not changed. A check comes after those it needs; one that dist-ctl needs itself comes only
//! after such. The examiner is started for the first check that is its own, so the cgroup comes
//! before that.
#![forbid(unsafe_code)]

use serde::Serialize;

use super::{Place, machine, trials, trials::Bench};

/// One thing to try.
#[derive(Clone, Copy)]
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) about: About,
    /// dist-ctl does not work without it.
    pub(super) needed: bool,
    /// What is so if it works.
    pub(super) what: &'static str,
    pub(super) how: How,
    /// Checks without which it cannot be tried.
    pub(super) after: &'static [&'static str],
    /// What dist-ctl does without it.
    pub(super) then: &'static str,
    pub(super) to_do: &'static str,
}

/// What a check depends on most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum About {
    /// How this machine, or the container in it, is set up.
    Machine,
    /// What its kernel can do.
    Kernel,
}

/// Who does it. All give what was found, in some words, or none.
#[derive(Clone, Copy)]
pub(super) enum How {
    /// The doctor.
    Here(fn(&mut Place) -> anyhow::Result<String>),
    /// The doctor, with the examiner.
    Upon(fn(&mut Place) -> anyhow::Result<String>),
    /// The examiner.
    Aside(fn(&mut Bench) -> anyhow::Result<String>),
}

/// What dist-ctl does without what it needs.
const REFUSES: &str = "dist-ctl up refuses to start";
const RIGHTS: &str = "give dist-ctl CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and let seccomp pass bpf()";
const OLDEST: &str = "use Linux 6.1 or later";
/// Of both, what it lacks. Why it does not work tells which.
const RIGHTS_OR_OLDEST: &str =
    "give dist-ctl CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; if it has them, use Linux 6.1 or later";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "root",
        about: About::Machine,
        needed: true,
        what: "dist-ctl runs as root",
        how: How::Here(machine::root),
        after: &[],
        then: "dist-ctl up refuses to start, and little can be tried",
        to_do: "run dist-ctl as root, and try again: sudo dist-ctl doctor",
    },
    Check {
        name: "capabilities",
        about: About::Machine,
        needed: false,
        what: "root has all capabilities that dist-ctl uses",
        how: How::Here(machine::capabilities),
        after: &["root"],
        then: "what needs them fails below, or when it is done",
        to_do: "let the container or unit in which dist-ctl runs have them (--cap-add, CapabilityBoundingSet=)",
    },
    Check {
        name: "runtime-dir",
        about: About::Machine,
        needed: true,
        what: "the runtime directory can be made and written to",
        how: How::Here(machine::runtime_dir),
        after: &["root"],
        then: REFUSES,
        to_do: "choose another one with --runtime-dir, or let root write there",
    },
    Check {
        name: "cgroup2",
        about: About::Machine,
        needed: true,
        what: "cgroup v2 is mounted",
        how: How::Here(machine::cgroup2),
        after: &[],
        then: REFUSES,
        to_do: "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
    },
    Check {
        name: "cgroup",
        about: About::Machine,
        needed: true,
        what: "a cgroup can be made",
        how: How::Here(machine::cgroup),
        after: &["root", "cgroup2"],
        then: REFUSES,
        to_do: "mount cgroup v2 writable; in a container, give it a cgroup namespace of its own",
    },
    Check {
        name: "cgroup-enter",
        about: About::Machine,
        needed: true,
        what: "a process can enter a cgroup",
        how: How::Aside(trials::enter_cgroup),
        after: &["cgroup"],
        then: "no server can be started",
        to_do: "in a container, let the mounted cgroup be the root of its own hierarchy",
    },
    Check {
        name: "loopback",
        about: About::Machine,
        needed: true,
        what: "a connection to 127.0.0.1 arrives",
        how: How::Aside(trials::loopback),
        after: &[],
        then: REFUSES,
        to_do: "bring the loopback up (ip link set lo up), and let a firewall pass it",
    },
    Check {
        name: "ipv6",
        about: About::Machine,
        needed: false,
        what: "a connection to ::1 arrives",
        how: How::Aside(trials::ipv6),
        after: &[],
        then: "services cannot listen on IPv6 addresses, nor on :PORT",
        to_do: "write 0.0.0.0:PORT instead of :PORT, or turn IPv6 on (net.ipv6.conf.all.disable_ipv6 = 0)",
    },
    Check {
        name: "bpffs",
        about: About::Machine,
        needed: true,
        what: "there is a bpffs, or one can be mounted",
        how: How::Aside(trials::bpffs),
        after: &["root"],
        then: REFUSES,
        to_do: "mount -t bpf bpf /sys/fs/bpf, or give dist-ctl CAP_SYS_ADMIN to mount one",
    },
    Check {
        name: "pin",
        about: About::Machine,
        needed: true,
        what: "a map can be pinned in a bpffs, and opened again",
        how: How::Aside(trials::pin),
        after: &["bpffs"],
        then: REFUSES,
        to_do: RIGHTS,
    },
    Check {
        name: "maps",
        about: About::Kernel,
        needed: true,
        what: "all maps can be made, ring buffers and socket storage among them",
        how: How::Aside(trials::maps),
        after: &["root"],
        then: REFUSES,
        to_do: RIGHTS_OR_OLDEST,
    },
    Check {
        name: "load-select",
        about: About::Kernel,
        needed: true,
        what: "the kernel takes select, which chooses and migrates",
        how: How::Aside(trials::load_select),
        after: &["maps"],
        then: REFUSES,
        to_do: RIGHTS_OR_OLDEST,
    },
    Check {
        name: "load-track",
        about: About::Kernel,
        needed: true,
        what: "the kernel takes track, which counts",
        how: How::Aside(trials::load_track),
        after: &["maps"],
        then: REFUSES,
        to_do: RIGHTS_OR_OLDEST,
    },
    Check {
        name: "load-bind4",
        about: About::Kernel,
        needed: true,
        what: "the kernel takes bind4, which lets servers share an IPv4 address",
        how: How::Aside(trials::load_bind4),
        after: &["maps"],
        then: REFUSES,
        to_do: RIGHTS_OR_OLDEST,
    },
    Check {
        name: "load-bind6",
        about: About::Kernel,
        needed: true,
        what: "the kernel takes bind6, which lets servers share an IPv6 address",
        how: How::Aside(trials::load_bind6),
        after: &["maps"],
        then: REFUSES,
        to_do: RIGHTS_OR_OLDEST,
    },
    Check {
        name: "attach-select",
        about: About::Kernel,
        needed: true,
        what: "select can be put in charge of an address",
        how: How::Aside(trials::attach_select),
        after: &["load-select"],
        then: REFUSES,
        to_do: RIGHTS,
    },
    Check {
        name: "attach-track",
        about: About::Kernel,
        needed: true,
        what: "track can be attached to a cgroup",
        how: How::Aside(trials::attach_track),
        after: &["load-track", "cgroup"],
        then: REFUSES,
        to_do: RIGHTS,
    },
    Check {
        name: "attach-bind4",
        about: About::Kernel,
        needed: true,
        what: "bind4 can be attached to a cgroup",
        how: How::Aside(trials::attach_bind4),
        after: &["load-bind4", "cgroup"],
        then: REFUSES,
        to_do: RIGHTS,
    },
    Check {
        name: "attach-bind6",
        about: About::Kernel,
        needed: true,
        what: "bind6 can be attached to a cgroup",
        how: How::Aside(trials::attach_bind6),
        after: &["load-bind6", "cgroup"],
        then: REFUSES,
        to_do: RIGHTS,
    },
    Check {
        name: "replace",
        about: About::Kernel,
        needed: false,
        what: "an attached program can be replaced in one step",
        how: How::Aside(trials::replace),
        after: &["attach-track"],
        then: "dist-ctl upgrade to another build fails, and dist-ctl goes on as it is",
        to_do: "stop with dist-ctl down before you start another build",
    },
    Check {
        name: "share4",
        about: About::Kernel,
        needed: false,
        what: "servers that know nothing of it share an IPv4 address",
        how: How::Aside(trials::share4),
        after: &["loopback", "attach-bind4", "cgroup-enter"],
        then: "servers that bind by themselves fail with EADDRINUSE, unless they set SO_REUSEADDR and SO_REUSEPORT",
        to_do: "use Linux 6.1 or later; or set socket = \"systemd\" or \"stdin\" for the servers",
    },
    Check {
        name: "share6",
        about: About::Kernel,
        needed: false,
        what: "servers that know nothing of it share an IPv6 address",
        how: How::Aside(trials::share6),
        after: &["ipv6", "attach-bind6", "cgroup-enter"],
        then: "servers that bind by themselves fail with EADDRINUSE, unless they set SO_REUSEADDR and SO_REUSEPORT",
        to_do: "use Linux 6.1 or later; or set socket = \"systemd\" or \"stdin\" for the servers",
    },
    Check {
        name: "low-port",
        about: About::Kernel,
        needed: false,
        what: "a server of another user may listen on a port that takes root to bind",
        how: How::Aside(trials::low_port),
        after: &["loopback", "attach-bind4", "cgroup-enter"],
        then: "servers with user = \"...\" cannot bind the service's port if it is below 1024",
        to_do: "set socket = \"systemd\" or \"stdin\" for the servers, or lower net.ipv4.ip_unprivileged_port_start",
    },
    Check {
        name: "events",
        about: About::Kernel,
        needed: false,
        what: "dist-ctl is told when a server begins to listen",
        how: How::Aside(trials::events),
        after: &["loopback", "attach-track", "cgroup-enter"],
        then: "a server's listener is found only by looking, once a second, until it is ready",
        to_do: OLDEST,
    },
    Check {
        name: "steer",
        about: About::Kernel,
        needed: true,
        what: "a connection goes to the listener that select chooses",
        how: How::Aside(trials::steer),
        after: &["loopback", "attach-select"],
        then: "connections would go where the kernel's hash sends them",
        to_do: OLDEST,
    },
    Check {
        name: "tag",
        about: About::Kernel,
        needed: true,
        what: "a connection inherits the tag of its listener",
        how: How::Aside(trials::tag),
        after: &["steer"],
        then: "no connection would be counted, and no limit would hold",
        to_do: OLDEST,
    },
    Check {
        name: "sock-diag",
        about: About::Kernel,
        needed: false,
        what: "the kernel lists its sockets with cgroup and tag",
        how: How::Aside(trials::list_sockets),
        after: &["tag"],
        then: "counts are not compared with the sockets there are, and would stay wrong if they ever were",
        to_do: "use a kernel with CONFIG_INET_DIAG (modprobe tcp_diag)",
    },
    Check {
        name: "close",
        about: About::Kernel,
        needed: false,
        what: "a connection of others can be closed",
        how: How::Aside(trials::close),
        after: &["loopback", "sock-diag"],
        then: "dist-ctl drain --then close closes nothing, and those connections stay",
        to_do: "use a kernel with CONFIG_INET_DIAG_DESTROY, and give dist-ctl CAP_NET_ADMIN",
    },
    Check {
        name: "count",
        about: About::Kernel,
        needed: true,
        what: "a connection is counted while it is there",
        how: How::Aside(trials::count),
        after: &["tag", "attach-track", "cgroup-enter"],
        then: "limits would not hold, and shares would not be even",
        to_do: OLDEST,
    },
    Check {
        name: "migrate",
        about: About::Kernel,
        needed: true,
        what: "a connection moves when its listener closes",
        how: How::Aside(trials::migrate),
        after: &["loopback", "maps"],
        then: "nobody who waits would ever be served",
        to_do: OLDEST,
    },
    Check {
        name: "wake",
        about: About::Kernel,
        needed: false,
        what: "a server is woken when a connection moves to it",
        how: How::Aside(trials::wake),
        after: &["migrate"],
        then: "a bell is rung after each move: a short connection of dist-ctl's own to that server",
        to_do: "nothing, or use Linux 6.1.175, 6.12.86, 6.18.44, 7.0 or what follows them in their series",
    },
    Check {
        name: "drop-rights",
        about: About::Machine,
        needed: true,
        what: "a process can give up the capabilities that no server gets",
        how: How::Aside(trials::drop_rights),
        after: &["root"],
        then: "no server can be started",
        to_do: "give dist-ctl CAP_SETPCAP",
    },
    Check {
        name: "other-user",
        about: About::Machine,
        needed: false,
        what: "a process and its sockets can become another user's",
        how: How::Aside(trials::become_nobody),
        after: &["drop-rights"],
        then: "servers with user = \"...\" cannot be started",
        to_do: "give dist-ctl CAP_CHOWN, CAP_SETUID and CAP_SETGID, or leave user out",
    },
    Check {
        name: "pidfd-open",
        about: About::Kernel,
        needed: true,
        what: "a process can be held by a descriptor (pidfd_open)",
        how: How::Upon(machine::pidfd_opens),
        after: &[],
        then: "no server's listener can be adopted, so none becomes ready",
        to_do: "let seccomp pass pidfd_open()",
    },
    Check {
        name: "pidfd-getfd",
        about: About::Kernel,
        needed: true,
        what: "a descriptor of another process can be duplicated (pidfd_getfd)",
        how: How::Upon(machine::pidfd_gets),
        after: &["root", "pidfd-open"],
        then: "no server's listener can be adopted, so none becomes ready",
        to_do: "give dist-ctl CAP_SYS_PTRACE, let seccomp pass pidfd_getfd(), and set kernel.yama.ptrace_scope below 3",
    },
    Check {
        name: "cgroup-kill",
        about: About::Kernel,
        needed: true,
        what: "all processes of a cgroup can be killed at once",
        how: How::Upon(machine::cgroup_kill),
        after: &["cgroup-enter"],
        then: "servers that do not end by themselves would run on",
        to_do: "use Linux 6.1 or later, and mount cgroup v2 writable",
    },
    Check {
        name: "cpu-pressure",
        about: About::Kernel,
        needed: false,
        what: "a cgroup tells how much it waits for CPUs",
        how: How::Here(machine::cpu_pressure),
        after: &["cgroup"],
        then: "weights do not follow \"cpu-pressure\" (load.sources)",
        to_do: "use a kernel with PSI, or boot it with psi=1",
    },
    Check {
        name: "cgroup-remove",
        about: About::Machine,
        needed: true,
        what: "a cgroup can be removed",
        how: How::Here(machine::cgroup_remove),
        after: &["cgroup"],
        then: "each server that ended would leave a cgroup behind",
        to_do: "mount cgroup v2 writable",
    },
    Check {
        name: "open-files",
        about: About::Machine,
        needed: false,
        what: "processes may have enough files open",
        how: How::Here(machine::open_files),
        after: &[],
        then: "with many who wait there are no rooms for all of them: they share some, and a hand-over costs more",
        to_do: "raise the hard limit: ulimit -Hn, LimitNOFILE= of the unit, or fs.nr_open",
    },
    Check {
        name: "accept-queues",
        about: About::Machine,
        needed: false,
        what: "accept queues may be as long as servers ask for",
        how: How::Here(machine::accept_queues),
        after: &[],
        then: "bursts that a server does not accept in time are lost sooner, and who waits shares less long queues",
        to_do: "sysctl -w net.core.somaxconn=4096",
    },
    Check {
        name: "syn-cookies",
        about: About::Machine,
        needed: false,
        what: "SYN cookies are sent in need, and only then",
        how: How::Here(machine::syn_cookies),
        after: &[],
        then: "with 0, a flood of SYNs keeps clients out; with 2, no place is reserved at the SYN, and a client port \
               that is used again within TIME_WAIT may exceed a limit by one",
        to_do: "sysctl -w net.ipv4.tcp_syncookies=1",
    },
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_check_comes_after_those_it_needs_and_has_a_name_of_its_own() {
        let mut seen = HashSet::new();
        for check in CHECKS {
            for before in check.after {
                assert!(seen.contains(before), "{} comes before {before}", check.name);
            }
            assert!(seen.insert(check.name), "{} is there twice", check.name);
            assert!(check.name.bytes().all(|byte| byte == b'-' || byte.is_ascii_alphanumeric()));
        }
    }

    /// Or it would be said that dist-ctl does not work, because of something it can do without.
    #[test]
    fn what_is_needed_depends_on_nothing_that_is_not() {
        let needed = |name: &str| CHECKS.iter().any(|check| check.name == name && check.needed);
        for check in CHECKS.iter().filter(|check| check.needed) {
            for before in check.after {
                assert!(needed(before), "{} is needed, and {before} is not", check.name);
            }
        }
    }

    #[test]
    fn every_check_says_what_then_and_what_to_do_on_one_line() {
        for check in CHECKS {
            for text in [check.what, check.then, check.to_do] {
                assert!(text.len() > 10 && !text.contains('\n') && !text.contains("  "), "{text:?}");
            }
        }
    }
}
