//! What a server has and has not: user, environment, limits, and nothing of ours.

#![forbid(unsafe_code)]

use std::process::Command;

use tests::{
    app::App,
    client,
    host::{Host, Up, V4},
    process::Process,
    wait::{seconds, wait_until_eq},
};

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE, SYS_CHROOT:
/// what a server that starts as root needs to give its rights up.
const KEPT: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18;

fn capabilities(process: Process, set: &str) -> u64 {
    u64::from_str_radix(&process.fact(set), 16).expect("a set of capabilities is a hexadecimal number")
}

fn started(host: &Host, server: &str, socket: Option<&'static str>, words: &[&str]) -> App {
    let mut command = vec![host.test_server_for_all()];
    command.extend(words.iter().map(|word| (*word).to_owned()));
    App { socket, server: server.to_owned(), ..App::running(2, command) }
}

/// Starts it as badly as possible: with ambient capabilities, a file open, signals ignored and
/// blocked. Nothing of that may reach a server.
fn up_from_a_bad_place<'h>(host: &'h Host, app: &App) -> Up<'h> {
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec 7</etc/hosts; exec \"$@\"", "sh", "env", "--ignore-signal=HUP,USR1"]);
    command.args(["--block-signal=USR2", "setpriv", "--inh-caps=+net_raw,+sys_admin"]);
    command.args(["--ambient-caps=+net_raw,+sys_admin"]).arg(tests::host::program());
    command.args(["up", "-f", &file]).env("DIST_CTL_RUNTIME_DIR", host.runtime("main"));
    let up = host.start_command(command);
    up.wait_ready();
    up
}

#[test]
fn a_server_of_another_user_has_no_capability_and_cannot_get_one() {
    let host = Host::new();
    let app = started(&host, "user = \"nobody\"", None, &["--listen", "[::]:8080"]);
    let up = up_from_a_bad_place(&host, &app);
    let server = up.process("app/1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(capabilities(server, set), 0, "{set}");
    }
    assert_eq!(capabilities(server, "CapBnd") & !KEPT, 0, "CapBnd");
    assert_eq!(server.fact("Uid").split_whitespace().collect::<Vec<_>>(), ["65534"; 4]);
    assert_eq!(server.fact("Gid").split_whitespace().collect::<Vec<_>>(), ["65534"; 4]);
    assert_eq!(server.fact("Groups"), "65534");
    let environment = server.environment();
    assert_eq!(environment["USER"], "nobody");
    assert_eq!(environment["HOME"], "/nonexistent");
    // And it does serve.
    assert_eq!(client::by_process(&client::hold(V4, 2)).len(), 2);
}

#[test]
fn a_server_of_another_user_can_say_that_it_is_ready() {
    let host = Host::new();
    let lines = "user = \"nobody\"\nreadiness = \"notify\"";
    let up = host.up(&started(&host, lines, None, &["--listen", "[::]:8080", "--ready-after", "1"]));
    let environment = up.process("app/1").environment();
    assert!(environment.contains_key("NOTIFY_SOCKET"), "{environment:?}");
    assert_eq!(client::by_process(&client::hold(V4, 2)).len(), 2);
}

#[test]
fn a_server_of_root_has_only_what_it_needs_to_give_its_rights_up() {
    let host = Host::new();
    let up = up_from_a_bad_place(&host, &started(&host, "", None, &["--listen", "[::]:8080"]));
    // The scene is set: dist-ctl itself has what no server may get.
    assert_ne!(capabilities(up.monitor(), "CapAmb"), 0);
    let server = up.process("app/1");
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(capabilities(server, set), 0, "{set}");
    }
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(capabilities(server, set) & !KEPT, 0, "{set}: {:x}", capabilities(server, set));
    }
}

#[test]
fn a_server_gets_no_descriptor_of_ours() {
    for (socket, words, listeners) in [
        (None, &["--never-listen", "--print", "runs"][..], 0),
        (Some("systemd"), &["--inherited", "--never-listen", "--print", "runs"][..], 1),
        (Some("stdin"), &["--stdin", "--never-listen", "--print", "runs"][..], 1),
    ] {
        let host = Host::new();
        // It opens nothing itself: the Rust program starts with what it is given.
        let up = host.start(&started(&host, "", socket, words));
        // Before that, the dynamic linker has files open.
        wait_until_eq("servers that run", seconds(5.0), 2, || up.printed().matches("out runs").count());
        let open = up.process("app/1").descriptors();
        let numbers: Vec<i32> = open.keys().copied().collect();
        let expected: &[i32] = if socket == Some("systemd") { &[0, 1, 2, 3] } else { &[0, 1, 2] };
        assert_eq!(numbers, expected, "{socket:?}: {open:?}");
        let sockets = open.values().filter(|target| target.starts_with("socket:")).count();
        assert_eq!(sockets, listeners, "{socket:?}: {open:?}");
        if socket != Some("stdin") {
            assert_eq!(open[&0], "/dev/null");
        }
    }
}

#[test]
fn a_server_starts_with_default_signals() {
    let host = Host::new();
    let up = up_from_a_bad_place(&host, &started(&host, "", None, &["--listen", "[::]:8080"]));
    let server = up.process("app/1");
    assert!(up.monitor().descriptors().contains_key(&7), "dist-ctl was given one");
    assert!(!server.descriptors().contains_key(&7), "{:?}", server.descriptors());
    assert_eq!(u64::from_str_radix(&server.fact("SigBlk"), 16), Ok(0));
    // The Rust runtime itself ignores SIGPIPE (13) and nothing else.
    let ignored = u64::from_str_radix(&server.fact("SigIgn"), 16).expect("a set of signals");
    assert_eq!(ignored & !(1 << 12), 0, "{ignored:x}");
}

#[test]
fn a_server_learns_who_it_is() {
    let host = Host::new();
    let directory = host.open_directory("home-1");
    host.open_directory("home-2");
    let parent = directory.trim_end_matches('1');
    let lines = format!(
        "directory = \"{parent}{{index}}\"\n\
         environment = {{ MINE = \"{{service}}-{{name}}-{{index}}\", PLAIN = \"{{{{x}}}}\" }}"
    );
    let words = ["--listen", "[::]:8080", "--name", "{service}/{name}/{index}"];
    let up = host.up(&started(&host, &lines, None, &words));
    for name in ["1", "2"] {
        let server = up.process(&format!("app/{name}"));
        assert_eq!(
            server.directory().expect("a directory").to_str(),
            Some(format!("{parent}{name}").as_str())
        );
        let environment = server.environment();
        for (variable, value) in [
            ("MINE", format!("app-{name}-{name}")),
            ("PLAIN", "{x}".to_owned()),
            ("DIST_CTL_SERVICE", "app".to_owned()),
            ("DIST_CTL_SERVER", format!("app/{name}")),
            ("DIST_CTL_INDEX", name.to_owned()),
            ("DIST_CTL_LISTEN", "[::]:8080".to_owned()),
        ] {
            assert_eq!(environment.get(variable), Some(&value), "{variable} of {name}");
        }
        assert!(!environment.contains_key("DIST_CTL_RUNTIME_DIR"));
        assert!(server.arguments().contains(&format!("app/{name}/{name}")));
    }
}

#[test]
fn a_server_has_the_limits_it_is_given() {
    let host = Host::new();
    let lines = "limits = { nofile = 1234, core = \"0\" }\numask = \"0027\"\ncpus = \"0\"";
    let up = host.up(&started(&host, lines, None, &["--listen", "[::]:8080"]));
    let server = up.process("app/1");
    assert_eq!(server.limit("Max open files"), ("1234".to_owned(), "1234".to_owned()));
    assert_eq!(server.limit("Max core file size"), ("0".to_owned(), "0".to_owned()));
    assert_eq!(server.fact("Umask"), "0027");
    assert_eq!(server.fact("Cpus_allowed_list"), "0");
}

#[test]
fn every_server_has_a_cgroup_of_its_own_below_its_service() {
    let host = Host::new();
    let up = host.up(&started(&host, "", None, &["--listen", "[::]:8080"]));
    let service = up.cgroup().join("app");
    let mut cgroups: Vec<_> = ["app/1", "app/2"]
        .map(|name| {
            let cgroup = up.process(name).cgroup().expect("a cgroup");
            let directory = tests::leftover::cgroup_mount().expect("cgroup v2").join(cgroup);
            assert_eq!(directory.parent(), Some(service.as_path()), "{name}");
            assert_eq!(tests::process::in_cgroup(&directory).len(), 1, "{name}");
            directory
        })
        .to_vec();
    cgroups.dedup();
    assert_eq!(cgroups.len(), 2);
    // Our own processes are in none of them.
    assert!(!tests::process::in_cgroup(&up.cgroup()).contains(&up.monitor()));
    assert!(!tests::process::in_cgroup(&up.cgroup()).contains(&up.distributor()));
}

#[test]
fn a_server_leads_a_session_of_its_own() {
    let host = Host::new();
    let up = host.up(&started(&host, "", None, &["--listen", "[::]:8080"]));
    let server = up.process("app/1");
    assert_eq!(server.fact("NSsid").split_whitespace().last(), Some(server.pid.to_string().as_str()));
    assert_eq!(server.parent(), Some(up.monitor().pid));
}
