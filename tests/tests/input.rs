//! Wrong input and an unfit machine: one clear sentence, the right exit code, nothing left.

#![forbid(unsafe_code)]

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::thread::CapabilitySet;
use tests::{
    app::App,
    client::{self, Client},
    command,
    host::{Host, V4},
    leftover,
    process::{Signal, signal_child},
    unfit::{BPFFS, as_nobody, elsewhere, mount_bpffs, renounce, unmount_bpffs, unmount_cgroups},
    wait::{seconds, wait_for},
};

/// What is wrong in a file: its name here, the line in place of LINE below, and what the
/// operator reads, which always has the field, what was written, and what to write.
type Wrong = (&'static str, &'static str, &'static [&'static str]);

const SERVER_LINES: &[Wrong] = &[
    ("too many servers", "count = 257", &["wrong.toml:6:", "server.count", "257", "from 0 to 256"]),
    ("fewer than none", "count = -1", &["server.count", "-1", "write"]),
    ("a number in words", "count = \"four\"", &["server.count", "\"four\"", "write a number"]),
    ("no server", "count = 0", &["server.count", "0", "write 1 or more"]),
    ("a limit of nothing", "limit = 0", &["server.limit", "0", "from 1 to"]),
    ("a weight of nothing", "weight = 0", &["server.weight", "0", "from 1 to 1000"]),
    ("a weight too heavy", "weight = 1001", &["server.weight", "1001", "from 1 to 1000"]),
    ("a socket mistyped", "socket = \"sytemd\"", &["server.socket", "\"sytemd\"", "\"systemd\""]),
    ("a readiness invented", "readiness = \"soon\"", &["server.readiness", "\"soon\"", "\"notify\""]),
    (
        "a time without a unit",
        "stop_timeout = \"30\"",
        &["server.stop_timeout", "\"30\" has no unit", "\"30s\""],
    ),
    ("a time of no length", "start_timeout = \"0s\"", &["server.start_timeout", "\"0s\"", "write at least"]),
    ("a time that is no time", "drain_timeout = \"long\"", &["server.drain_timeout", "\"long\"", "\"30s\""]),
    ("a signal unknown", "stop_signal = \"TREM\"", &["server.stop_signal", "\"TREM\"", "\"TERM\""]),
    ("CPUs not here", "cpus = \"0-4095\"", &["server.cpus", "0-4095", "write"]),
    ("CPUs in words", "cpus = \"all\"", &["server.cpus", "\"all\"", "\"0-3\""]),
    ("a user unknown", "user = \"no-such-user\"", &["server.user", "\"no-such-user\"", "getent passwd"]),
    (
        "a group unknown",
        "user = \"root\"\ngroup = \"no-such\"",
        &["server.group", "\"no-such\"", "getent group"],
    ),
    ("a mask not octal", "umask = \"0029\"", &["server.umask", "\"0029\"", "octal"]),
    ("an output relative", "output = \"shop.log\"", &["server.output", "\"shop.log\"", "absolute"]),
    ("a directory relative", "directory = \"srv\"", &["server.directory", "\"srv\"", "absolute"]),
    ("a brace unknown", "directory = \"/srv/{port}\"", &["server.directory", "{port}", "{name}"]),
    ("a variable of ours", "environment = { LISTEN_FDS = \"3\" }", &["LISTEN_FDS", "another name"]),
    ("a limit unknown", "limits = { nofiles = 1 }", &["server.limits.nofiles", "\"nofile\""]),
    ("no pause", "restart = { delay = \"0s\" }", &["server.restart.delay", "\"0s\"", "write at least"]),
    ("a field mistyped", "stop-timeout = \"3s\"", &["server.stop-timeout", "\"stop_timeout\""]),
    ("a field of later", "health = \"/\"", &["server.health", "unknown", "write one of"]),
    ("a field elsewhere", "policy = \"first\"", &["server.policy", "[service.app]"]),
    (
        "a number as a name",
        "[[service.app.servers]]\nname = \"7\"",
        &["name", "\"7\" is a number", "\"server-7\""],
    ),
    ("a path as a name", "[[service.app.servers]]\nname = \"../etc\"", &["name", "\"../etc\"", "write"]),
    (
        "one name twice",
        "[[service.app.servers]]\nname = \"a\"\n[[service.app.servers]]\nname = \"a\"",
        &["name", "\"a\"", "two servers"],
    ),
];

const FILES: &[Wrong] = &[
    ("nothing", "", &["wrong.toml:", "service", "[service.NAME]"]),
    ("not TOML", "[service.app\n", &["wrong.toml:1:", "not TOML"]),
    ("an unknown table", "[services.app]\n", &["services", "\"service\""]),
    ("no address", "[service.app]\n[service.app.server]\ncommand = [\"x\"]\n", &["listen", "is missing"]),
    ("no command", "[service.app]\nlisten = [\":80\"]\n", &["command", "is missing"]),
    (
        "an empty command",
        "[service.app]\nlisten = [\":80\"]\n[service.app.server]\ncommand = []\n",
        &["command"],
    ),
    (
        "no port",
        "[service.app]\nlisten = [\"127.0.0.1\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["listen", "\"127.0.0.1\"", "\"127.0.0.1:8080\""],
    ),
    (
        "a host name",
        "[service.app]\nlisten = [\"localhost:80\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["listen", "\"localhost:80\"", "numeric"],
    ),
    (
        "port 0",
        "[service.app]\nlisten = [\":0\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["listen", "port 0"],
    ),
    (
        "a port too large",
        "[service.app]\nlisten = [\":65536\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["listen", "65536", "65535"],
    ),
    (
        "an address twice",
        "[service.app]\nlisten = [\":80\", \"127.0.0.1:80\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["listen", "127.0.0.1:80"],
    ),
    (
        "an address of two services",
        "[service.a]\nlisten = [\":80\"]\n[service.a.server]\ncommand = [\"x\"]\n\
         [service.b]\nlisten = [\":80\"]\n[service.b.server]\ncommand = [\"x\"]\n",
        &["service.b.listen", ":80", "a"],
    ),
    (
        "a policy mistyped",
        "[service.app]\nlisten = [\":80\"]\npolicy = \"frist\"\n[service.app.server]\ncommand = [\"x\"]\n",
        &["policy", "\"frist\"", "\"first\""],
    ),
    (
        "a service with a path as its name",
        "[service.\"a/b\"]\nlisten = [\":80\"]\n[service.\"a/b\".server]\ncommand = [\"x\"]\n",
        &["a/b", "write"],
    ),
    (
        "stdin for two addresses",
        "[service.app]\nlisten = [\":80\", \":81\"]\n[service.app.server]\nsocket = \"stdin\"\ncommand = [\"x\"]\n",
        &["socket", "\"stdin\"", "\"systemd\""],
    ),
    (
        "a mode that keeps its owner out",
        "[control]\nmode = \"0060\"\n[service.app]\nlisten = [\":80\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["control.mode", "\"0060\"", "write"],
    ),
    (
        "readers nobody knows",
        "[control]\nreaders = \"no-such\"\n[service.app]\nlisten = [\":80\"]\n[service.app.server]\ncommand = [\"x\"]\n",
        &["control.readers", "\"no-such\""],
    ),
];

#[test]
fn every_wrong_configuration_is_refused_with_its_sentence() {
    let host = Host::new();
    let around =
        "[service.app]\nlisten = [\"127.0.0.1:8080\"]\n\n[service.app.server]\ncommand = [\"true\"]\n";
    let lines = SERVER_LINES.iter().map(|(name, line, words)| (name, format!("{around}{line}\n"), words));
    let files = FILES.iter().map(|(name, text, words)| (name, (*text).to_owned(), words));
    for (name, text, words) in lines.chain(files) {
        let file = host.write("wrong.toml", &text);
        println!("{name}");
        let refused = host.run(&["check", &file]).expect_refusal(2, words);
        assert!(refused.stderr.contains("wrong.toml"), "{refused}");
    }
    assert!(SERVER_LINES.len() + FILES.len() >= 40);
}

#[test]
fn every_problem_of_a_configuration_is_told_at_once() {
    let host = Host::new();
    let file = host.write(
        "wrong.toml",
        "[service.app]\nlisten = [\":0\"]\npolicy = \"best\"\n[service.app.server]\ncount = -1\nlimt = 3\n",
    );
    let ended = host.run(&["check", &file]);
    assert_eq!(ended.code, Some(2));
    for words in [
        "wrong.toml:2: service.app.listen",
        "wrong.toml:3: service.app.policy",
        "wrong.toml:5:",
        "\"limit\"",
        "command",
    ] {
        assert!(ended.stderr.contains(words), "{words}: {ended}");
    }
    assert_eq!(ended.stderr.lines().count(), 5, "{ended}");
}

#[test]
fn every_wrong_command_line_is_refused_with_its_sentence() {
    let host = Host::new();
    for (line, words) in [
        ("", &["Usage"][..]),
        ("fly", &["fly"]),
        ("statsu", &["statsu", "status"]),
        ("status --jsno", &["--jsno", "--json"]),
        ("status extra", &["extra"]),
        ("--quiet --verbose status", &["--quiet", "--verbose"]),
        ("check", &["FILE"]),
        ("check /no/such/file.toml", &["/no/such/file.toml", "No such file"]),
        ("check /", &["/", "directory"]),
        ("up -f /no/such/file.toml", &["/no/such/file.toml", "No such file"]),
        ("up --listen :80", &["--servers", "--"]),
        ("up --listen :80 --servers 2", &["command"]),
        ("up --servers 2 -- true", &["--listen"]),
        ("up --listen :80 --servers two -- true", &["--servers", "two"]),
        ("up --listen :80 --servers 0 -- true", &["--servers", "0"]),
        ("up --listen :80 --servers 257 -- true", &["--servers", "257", "256"]),
        ("up --listen nowhere --servers 1 -- true", &["--listen", "nowhere"]),
        ("up --listen :80 --listen :80 --servers 1 -- true", &["--listen", ":80"]),
        ("up --listen :80 --servers 1 --policy best -- true", &["--policy", "best", "first"]),
        ("up --listen :80 --servers 1 --limit 0 -- true", &["--limit", "0"]),
        ("up --listen :80 --servers 1 --weight 1001 -- true", &["--weight", "1001", "1000"]),
        ("up --listen :80 --servers 1 --waiting -1 -- true", &["--waiting", "-1", "16384"]),
        ("up --listen :80 --servers 1 --socket tcp -- true", &["--socket", "tcp", "systemd"]),
        ("up --listen :80 --servers 1 --user no-such-user -- true", &["--user", "no-such-user"]),
        ("up --listen :80 --servers 1 --name a/b -- true", &["--name", "a/b"]),
        ("up -f x.toml --servers 1 -- true", &["--file", "--servers"]),
        ("weight", &["SERVER"]),
        ("weight app/1", &["WEIGHT"]),
        ("weight app 5", &["app", "SERVICE/SERVER"]),
        ("weight app/1 0", &["0", "1 to 1000"]),
        ("weight app/1 -5", &["-5", "1 to 1000"]),
        ("weight app/1 heavy", &["heavy", "1 to 1000"]),
        ("limit app/1 0", &["0", "none"]),
        ("limit app/1 lots", &["lots", "none"]),
        ("resume", &["SERVER"]),
        ("resume ../1", &["../1", "SERVICE/SERVER"]),
        ("down now", &["now"]),
    ] {
        let ended = host.run(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(ended.code, Some(2), "{line}: {ended}");
        assert!(ended.stdout.is_empty(), "{line}: {ended}");
        for word in words {
            assert!(ended.stderr.contains(word), "{line}: expected {word:?} in it: {ended}");
        }
        assert_eq!(leftover::of_instance(&host.runtime("main")), [], "{line}");
    }
}

#[test]
fn an_empty_argument_is_no_program_and_no_address() {
    let host = Host::new();
    for words in [
        &["up", "--listen", "", "--servers", "1", "--", "true"][..],
        &["up", "--listen", ":80", "--servers", "1", "--", ""],
        &["up", "--listen", ":80", "--servers", "1", "--name", "", "--", "true"],
        &["weight", "", "5"],
        &["check", ""],
    ] {
        let ended = host.run(words);
        assert_eq!(ended.code, Some(2), "{ended}");
    }
}

#[test]
fn without_an_instance_there_is_nothing_to_ask() {
    let host = Host::new();
    let directory = host.runtime("main").display().to_string();
    for words in
        [&["status"][..], &["status", "--json"], &["down"], &["weight", "app/1", "5"], &["resume", "app/1"]]
    {
        host.run(words).expect_refusal(1, &[&directory, "dist-ctl up"]);
    }
}

#[test]
fn servers_that_are_not_there_are_told_from_those_that_are() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    for words in [["weight", "app/3", "5"], ["limit", "shop/1", "5"], ["weight", "app/x", "5"]] {
        up.run(&words).expect_refusal(2, &[words[1]]);
    }
    up.run(&["resume", "app/3"]).expect_refusal(2, &["app/3"]);
}

#[test]
fn random_bytes_on_the_control_socket_are_refused_and_change_nothing() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let distributor = up.distributor();
    // xorshift64: the same bytes in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut answered = 0;
    for round in 0..200 {
        let mut socket = UnixStream::connect(up.control_socket()).expect("connect");
        socket.set_read_timeout(Some(seconds(10.0))).expect("set a timeout");
        let length = random() % if round % 20 == 0 { 200_000 } else { 300 };
        let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        if round % 3 == 0 {
            // Nearly right.
            bytes.splice(..0, *b"{\"command\":\"status\"");
        }
        bytes.push(b'\n');
        // It may be refused before it has been read to its end.
        let _ = socket.write_all(&bytes);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        match socket.read_to_end(&mut answer) {
            Ok(_) => {}
            // It closed without reading the rest. What it said before has been read.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("round {round}: neither answered nor closed: {error}"),
        }
        if answer.is_empty() {
            continue;
        }
        answered += 1;
        let shown = String::from_utf8_lossy(&answer);
        // One object and nothing behind it.
        let answer: serde_json::Value = serde_json::from_slice(&answer)
            .unwrap_or_else(|error| panic!("round {round}: not one answer: {error}: {shown}"));
        assert_eq!(answer["ok"], false, "round {round}: {shown}");
        assert!(answer["error"].as_str().is_some_and(|error| !error.is_empty()), "round {round}: {shown}");
    }
    assert!(answered >= 190, "only {answered} of 200 were told why");
    assert_eq!(up.distributor(), distributor);
    assert_eq!(up.service().states(), ["ready", "ready"]);
}

#[test]
fn clients_that_hang_keep_nobody_from_asking() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let hanging: Vec<UnixStream> = (0..40)
        .map(|number| {
            let mut socket = UnixStream::connect(up.control_socket()).expect("connect");
            if number % 2 == 0 {
                socket.write_all(b"{\"command\":").expect("say half of it");
            }
            socket
        })
        .collect();
    for _ in 0..5 {
        let start = Instant::now();
        up.status();
        assert!(start.elapsed() < seconds(2.0), "it took {:?}", start.elapsed());
    }
    // In the end they are let go of.
    for mut socket in hanging {
        socket.set_read_timeout(Some(seconds(20.0))).expect("set a timeout");
        socket.read_to_end(&mut Vec::new()).expect("the distributor closes it");
    }
    up.status();
}

#[test]
fn a_client_that_does_not_read_keeps_nobody_from_asking() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let mut deaf = UnixStream::connect(up.control_socket()).expect("connect");
    deaf.set_write_timeout(Some(Duration::from_millis(500))).expect("set a timeout");
    // Until its own buffers are full of answers, and ours of requests.
    while deaf.write_all(b"{\"command\":\"status\"}\n").is_ok() {}
    let start = Instant::now();
    up.status();
    assert!(start.elapsed() < seconds(2.0), "it took {:?}", start.elapsed());
}

#[test]
fn a_second_instance_on_the_same_directory_is_refused() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let server = host.test_server();
    let second = host.run(&[
        "up",
        "--listen",
        "127.0.0.1:9090",
        "--servers",
        "1",
        "--",
        &server,
        "--listen",
        "127.0.0.1:9090",
    ]);
    let directory = up.runtime().display().to_string();
    second.expect_refusal(1, &["another dist-ctl", &directory, &up.monitor().pid.to_string()]);
    // The first one has not noticed.
    assert_eq!(up.service().states(), ["ready"]);
    Client::open(V4).expect("connect");
}

#[test]
fn two_instances_on_two_directories_run_side_by_side() {
    let host = Host::new();
    let first = host.up(&App::of(&host, 2));
    let server = host.test_server();
    let words =
        ["up", "--listen", "127.0.0.1:9090", "--servers", "3", "--", &server, "--listen", "127.0.0.1:9090"];
    let second = host.start_command(host.command_of("other", &words));
    second.wait_ready();
    let held = client::hold(V4, 4);
    let other = client::hold("127.0.0.1:9090".parse().expect("an address"), 6);
    assert_eq!((first.connections(), second.connections()), (vec![2, 2], vec![2, 2, 2]));
    drop((held, other));
    second.stop();
    Client::open(V4).expect("the first one goes on");
}

/// bpffs takes no name with a dot in it.
#[test]
fn a_runtime_directory_may_have_a_dot_in_its_name() {
    let host = Host::new();
    let server = host.test_server();
    let words = ["up", "--listen", ":8080", "--servers", "1", "--", &server, "--listen", "[::]:8080"];
    let up = host.start_command(host.command_of("v1.2 of it", &words));
    up.wait_ready();
    Client::open(V4).expect("connect");
}

/// A server that somebody else started.
fn somebody_else(host: &Host, words: &[&str]) -> std::process::Child {
    let child =
        Command::new(host.test_server()).args(words).stdin(Stdio::null()).spawn().expect("start a server");
    wait_for("somebody else to listen", seconds(5.0), || client::connect(V4).ok());
    child
}

#[test]
fn a_port_that_somebody_else_holds_is_refused_and_left_to_him() {
    // As a server is written, and one that would share its port with anybody.
    for words in [&["--listen", "[::]:8080"][..], &["--listen", "[::]:8080", "--listeners", "2"]] {
        let host = Host::new();
        let mut somebody = somebody_else(&host, words);
        let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
        host.run(&["up", "-f", &file])
            .expect_refusal(1, &["[::]:8080", "test-server", &somebody.id().to_string()]);
        assert_eq!(leftover::of_instance(&host.runtime("main")), []);
        assert_eq!(Client::open(V4).expect("he goes on").pid as u32, somebody.id());
        signal_child(&somebody, Signal::KILL);
        let _ = somebody.wait();
    }
}

#[test]
fn an_address_that_this_machine_does_not_have_is_named() {
    let host = Host::new();
    let mut app = App::of(&host, 1);
    app.listen = vec!["192.0.2.1:8080".to_owned()];
    let file = host.write("dist-ctl.toml", &app.toml());
    host.run(&["up", "-f", &file]).expect_refusal(1, &["192.0.2.1:8080", "no such address"]);
    assert_eq!(leftover::of_instance(&host.runtime("main")), []);
}

#[test]
fn connections_of_a_run_before_are_not_in_the_way_of_the_next() {
    let host = Host::new();
    let app = App::of(&host, 2);
    let up = host.up(&app);
    let mut held = client::hold(V4, 10);
    // The servers close first, so their ends stay behind in TIME_WAIT.
    for client in &mut held {
        client.say("close").expect("ask to close");
        client.wait_for_end().expect("it closes");
    }
    drop(held);
    up.stop();
    let up = host.up(&app);
    Client::open(V4).expect("connect");
    drop(up);
}

#[test]
fn without_the_rights_it_says_which_are_missing() {
    let host = Host::new();
    let words = ["up", "--listen", "127.0.0.1:8080", "--servers", "1", "--", "true"];
    as_nobody(&host, &words).expect_refusal(1, &["root"]);
}

#[test]
fn check_needs_no_rights() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 3).toml());
    let ended = as_nobody(&host, &["check", &file]).expect_done();
    assert!(ended.stdout.starts_with("app: [::]:8080, 3 servers"), "{ended}");
}

#[test]
fn without_cgroup_v2_it_says_so() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 1).toml());
    elsewhere(|| {
        unmount_cgroups();
        host.run(&["up", "-f", &file]).expect_refusal(1, &["cgroup v2", "mount", "dist-ctl doctor"]);
    });
    assert_eq!(leftover::of_instance(&host.runtime("main")), []);
}

#[test]
fn a_bpffs_that_is_there_is_used_and_left_as_it_was() {
    let host = Host::new();
    let app = App::of(&host, 1);
    elsewhere(|| {
        mount_bpffs();
        let entries = || std::fs::read_dir(BPFFS).expect("read the bpffs").count();
        let before = entries();
        let up = host.up(&app);
        let pins = Path::new(BPFFS).join(leftover::instance_name(up.runtime()));
        let mut pins = std::fs::read_dir(&pins).expect("read the pins").flatten();
        assert!(pins.any(|directory| directory.path().join("LOAD").exists()), "there are no service's pins");
        assert!(!up.runtime().join("bpf").exists(), "it mounted one of its own all the same");
        Client::open(V4).expect("connect");
        up.stop();
        assert_eq!(entries(), before);
    });
}

#[test]
fn without_a_bpffs_it_mounts_one_and_takes_it_away_again() {
    let host = Host::new();
    let app = App::of(&host, 1);
    elsewhere(|| {
        unmount_bpffs();
        let up = host.up(&app);
        let pins = up.runtime().join("bpf").join(leftover::instance_name(up.runtime()));
        assert!(std::fs::read_dir(&pins).expect("read the pins").count() > 0);
        Client::open(V4).expect("connect");
        up.stop();
    });
    assert!(!host.runtime("main").exists());
}

#[test]
fn where_no_bpffs_can_be_mounted_it_says_how() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 1).toml());
    elsewhere(|| {
        unmount_bpffs();
        renounce(&[CapabilitySet::SYS_ADMIN]);
        let words = ["bpffs", "not permitted", "mount -t bpf bpf /sys/fs/bpf", "dist-ctl doctor"];
        host.run(&["up", "-f", &file]).expect_refusal(1, &words);
    });
    assert_eq!(leftover::of_instance(&host.runtime("main")), []);
}

#[test]
fn root_that_may_not_load_programs_is_told_what_it_lacks() {
    for (lacks, words) in [
        (&[CapabilitySet::SYS_ADMIN, CapabilitySet::BPF][..], "CAP_BPF"),
        (&[CapabilitySet::SYS_ADMIN, CapabilitySet::NET_ADMIN], "CAP_NET_ADMIN"),
    ] {
        let host = Host::new();
        let file = host.write("dist-ctl.toml", &App::of(&host, 1).toml());
        elsewhere(|| {
            mount_bpffs();
            let entries = || std::fs::read_dir(BPFFS).expect("read the bpffs").count();
            let before = entries();
            renounce(lacks);
            host.run(&["up", "-f", &file]).expect_refusal(1, &["not permitted", words, "dist-ctl doctor"]);
            assert_eq!(entries(), before);
        });
        assert_eq!(leftover::of_instance(&host.runtime("main")), []);
    }
}

#[test]
fn a_runtime_directory_that_cannot_be_made_is_named() {
    let host = Host::new();
    let file = host.write("a-file", "");
    let server = host.test_server();
    let directory = format!("{file}/run");
    let mut command = host.command(&["up", "--listen", ":8080", "--servers", "1", "--", &server]);
    command.env("DIST_CTL_RUNTIME_DIR", &directory);
    command::run(&mut command, seconds(20.0)).expect_refusal(1, &[&directory]);
}

#[test]
fn a_configuration_that_is_refused_leaves_nothing_behind() {
    let host = Host::new();
    let file = host.write("wrong.toml", "[service.app]\n");
    host.run(&["up", "-f", &file]);
    assert_eq!(leftover::of_instance(&host.runtime("main")), []);
    let readable =
        std::fs::metadata(host.path("wrong.toml")).expect("the file is there").permissions().mode();
    assert_eq!(readable & 0o400, 0o400);
}
