//! What an operator types and reads, while everything works.

#![forbid(unsafe_code)]

use std::{
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use tests::{
    app::{App, list},
    client,
    command::{self, Ended},
    host::{Host, Up, V4, program},
    process::Signal,
    wait::{seconds, wait_for},
};

#[test]
fn the_command_line_form_runs_servers() {
    let host = Host::new();
    let server = host.test_server();
    let words = [
        "up",
        "--listen",
        ":8080",
        "--listen",
        "127.0.0.1:9090",
        "--servers",
        "3",
        "--policy",
        "first",
        "--limit",
        "5",
        "--weight",
        "7",
        "--name",
        "shop",
        "--",
        &server,
        "--listen",
        "[::]:8080",
        "--listen",
        "127.0.0.1:9090",
        "--name",
        "{name}",
    ];
    let up = host.start_command(host.command(&words));
    up.wait_ready();
    let service = up.service();
    assert_eq!(service.name, "shop");
    assert_eq!(service.policy, "first");
    assert_eq!(service.listen, ["[::]:8080", "127.0.0.1:9090"]);
    assert_eq!(service.servers.len(), 3);
    assert_eq!((service.servers[0].limit, service.servers[0].weight), (Some(5), 7));
    let held = client::hold(V4, 6);
    assert_eq!(up.connections(), [5, 1, 0]);
    drop(held);
    wait_for("what it is up to", seconds(5.0), || {
        (up.printed() == "shop: listening on [::]:8080, 127.0.0.1:9090, 3 servers\n").then_some(())
    });
}

#[test]
fn it_is_quiet_when_all_is_well() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    wait_for("its only line", seconds(5.0), || {
        (up.printed() == "app: listening on [::]:8080, 2 servers\n").then_some(())
    });
    drop(client::hold(V4, 10));
    up.wait_connections(&[0, 0]);
    let log = up.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    assert!(log.lines().count() <= 10, "{log}");
}

#[test]
fn verbose_tells_what_the_kernel_decides_and_otherwise_nothing_is_told() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    for (words, told) in [(&["up", "-f", &file][..], false), (&["--verbose", "up", "-f", &file][..], true)] {
        let up = host.start_command(host.command(words));
        up.wait_ready();
        drop(client::hold(V4, 3));
        up.wait_connections(&[0, 0]);
        let decisions =
            || up.log().lines().filter(|line| line.contains("new connection goes to slot")).count();
        if told {
            wait_for("the kernel's own words", seconds(5.0), || (decisions() == 3).then_some(()));
        } else {
            assert_eq!(decisions(), 0);
        }
        up.stop();
    }
}

#[test]
fn quiet_says_only_what_is_wrong() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    let up = host.start_command(host.command(&["up", "-f", &file, "--quiet"]));
    up.wait_ready();
    assert_eq!(up.log(), "");
    up.process("app/1").kill(seconds(5.0));
    wait_for("a word about it", seconds(5.0), || up.log().contains("app/1").then_some(()));
}

#[test]
fn status_shows_a_table_for_people() {
    let host = Host::new();
    let mut app = App::of(&host, 2);
    app.limit = Some(25);
    let up = host.up(&app);
    let held = client::hold(V4, 6);
    let table = up.run(&["status"]).expect_done().stdout;
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(table.lines().next(), Some("app: [::]:8080; least-connections; waiting 0 of 1024"), "{table}");
    let column = |name: &str| {
        rows[1].iter().position(|title| *title == name).unwrap_or_else(|| panic!("no column {name}: {table}"))
    };
    for (row, name) in rows[2..].iter().zip(["app/1", "app/2"]) {
        let pid = up.process(name).pid.to_string();
        for (title, value) in [
            ("NAME", name),
            ("STATE", "ready"),
            ("PID", &pid),
            ("CONN", "3"),
            ("MAX", "3"),
            ("TOTAL", "3"),
            ("LIMIT", "25"),
            ("WEIGHT", "100"),
            ("QUEUE", "0"),
            ("RESTARTS", "0"),
        ] {
            assert_eq!(row[column(title)], value, "{title} of {name}: {table}");
        }
    }
    assert_eq!(rows.len(), 4, "{table}");
    drop(held);
}

#[test]
fn status_as_json_has_every_promised_field() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let json = up.run(&["status", "--json"]).expect_done().stdout;
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let keys = |value: &serde_json::Value| -> Vec<String> {
        value.as_object().expect("an object").keys().cloned().collect()
    };
    let service = &value["services"][0];
    for (place, value, promised) in [
        ("status", &value, &["version", "services"][..]),
        ("service", service, &["name", "listen", "policy", "waiting", "servers", "outcomes"]),
        (
            "waiting",
            &service["waiting"],
            &["now", "max", "capacity", "served", "timed_out", "left", "refused", "oldest_seconds", "wait"],
        ),
        ("wait", &service["waiting"]["wait"], &["count", "sum_seconds", "buckets"]),
        (
            "server",
            &service["servers"][0],
            &[
                "name",
                "state",
                "reason",
                "pid",
                "connections",
                "connections_max",
                "connections_total",
                "limit",
                "weight",
                "effective_weight",
                "accept_queue",
                "restarts",
                "since",
            ],
        ),
    ] {
        let keys = keys(value);
        for promised in promised {
            assert!(keys.iter().any(|key| key == promised), "{place} has no {promised}: {keys:?}");
        }
    }
    let since = service["servers"][0]["since"].as_str().expect("a time");
    assert!(since.ends_with('Z') && since.len() == 20, "{since}");
    assert!(service["servers"][0]["limit"].is_null());
}

#[test]
fn a_weight_is_changed_live() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let first = client::hold(V4, 40);
    assert_eq!(up.connections(), [20, 20]);
    up.run(&["weight", "app/1", "300"]).expect_done();
    let server = up.service().server("app/1").clone();
    assert_eq!((server.weight, server.effective_weight), (300, 300));
    let second = client::hold(V4, 40);
    // 80 by 3 to 1, without a connection being moved.
    assert_eq!(up.connections(), [60, 20]);
    up.run(&["weight", "app/1", "100"]).expect_done();
    let third = client::hold(V4, 40);
    assert_eq!(up.connections(), [60, 60]);
    drop((first, second, third));
}

#[test]
fn a_limit_is_changed_and_taken_away_live() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1).refusing());
    up.run(&["limit", "app/1", "2"]).expect_done();
    let held = client::hold(V4, 2);
    client::connect(V4).expect_err("full");
    up.run(&["limit", "app/1", "none"]).expect_done();
    assert_eq!(up.service().server("app/1").limit, None);
    let more = client::hold(V4, 50);
    assert_eq!(up.connections(), [52]);
    drop((held, more));
}

#[test]
fn a_live_change_outlives_the_server_it_was_made_for() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    up.run(&["weight", "app/1", "300"]).expect_done();
    up.run(&["limit", "app/1", "9"]).expect_done();
    let victim = up.process("app/1");
    victim.kill(seconds(5.0));
    wait_for("the next instance", seconds(5.0), || up.process_if_any("app/1").filter(|next| *next != victim));
    up.wait_ready();
    let server = up.service().server("app/1").clone();
    assert_eq!((server.weight, server.limit), (300, Some(9)));
    let held = client::hold(V4, 12);
    assert_eq!(up.connections(), [9, 3]);
    drop(held);
}

#[test]
fn down_stops_everything_and_returns_when_that_is_done() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let servers = [up.process("app/1"), up.process("app/2")];
    up.run(&["down"]).expect_done();
    assert!(servers.iter().all(|server| !server.runs()));
    assert!(!up.control_socket().exists());
    assert!(up.has_stopped().success());
}

#[test]
fn ctrl_c_stops_everything_too() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    up.signal(Signal::INT);
    assert!(up.has_stopped().success());
}

#[test]
fn the_runtime_directory_is_an_option_too() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let mut command = Command::new(program());
    command.args(["status", "--json", "--runtime-dir"]).arg(up.runtime()).env_remove("DIST_CTL_RUNTIME_DIR");
    command::run(&mut command, seconds(5.0)).expect_done();
}

#[test]
fn check_says_what_it_understood() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.limit = Some(200);
    app.tables = "[[service.app.servers]]\nname = \"big\"\nweight = 200".to_owned();
    let file = host.write("dist-ctl.toml", &app.toml());
    let ended = host.run(&["check", &file]).expect_done();
    assert_eq!(
        ended.stdout,
        "app: [::]:8080, 5 servers (1 to 4, big), least-connections, socket own, limit 200, weight 100 (big: 200), waiting 1024 for 30s\n"
    );
}

#[test]
fn the_example_in_the_help_is_a_configuration_that_is_accepted() {
    let host = Host::new();
    let help = host.run(&["up", "--help"]).expect_done().stdout;
    let example = help.split("every option there is:").nth(1).expect("an example at the end of the help");
    let file = host.write("example.toml", example);
    let ended = host.run(&["check", &file]);
    // Its user need not exist on this machine; nothing else may be wrong with it.
    for line in ended.stderr.lines() {
        assert!(
            line.contains("is no user") || line.contains("is no group") || line.contains("CPU"),
            "{ended}"
        );
    }
}

#[test]
fn a_trial_whose_verdict_nobody_reads_fails_with_a_sentence() {
    let host = Host::new();
    let (reader, writer) = std::io::pipe().expect("make a pipe");
    drop(reader);
    let mut command = host.command(&["trial", "--file", "/nothing/here.toml"]);
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let output = command.spawn().and_then(std::process::Child::wait_with_output).expect("run a trial");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said, "dist-ctl: say how the trial went: Broken pipe (os error 32)\n");
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let host = Host::new();
    for command in ["up", "status", "weight", "limit", "drain", "resume", "down", "check"] {
        let help = host.run(&[command, "--help"]).expect_done().stdout;
        assert!(help.contains("Example") && help.contains(&format!("dist-ctl {command}")), "{help}");
    }
    let help = host.run(&["--help"]).expect_done().stdout;
    for internal in ["distributor", "launch"] {
        assert!(!help.lines().any(|line| line.trim_start().starts_with(internal)), "{help}");
    }
}

/// Runs a command of dist-ctl as another user with these groups.
fn as_user(up: &Up<'_>, uid: u32, gid: u32, words: &[&str]) -> Ended {
    let copy = up.host.copy_for_all(&program());
    let mut command = Command::new(copy);
    // With a uid and no list, the supplementary groups are dropped.
    command.args(words).env("DIST_CTL_RUNTIME_DIR", up.runtime()).uid(uid).gid(gid);
    command::run(&mut command, seconds(20.0))
}

#[test]
fn only_root_may_ask_by_default() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let socket = std::fs::metadata(up.control_socket()).expect("the control socket");
    assert_eq!((socket.uid(), socket.mode() & 0o777), (0, 0o600));
    for words in [&["status"][..], &["weight", "app/1", "5"], &["down"]] {
        as_user(&up, 65534, 65534, words).expect_refusal(1, &["ermission denied"]);
    }
    assert_eq!(up.service().server("app/1").weight, 100);
}

#[test]
fn readers_may_look_and_change_nothing() {
    let host = Host::new();
    // The group of www-data, which is 33 on every Debian.
    let toml = format!("[control]\nreaders = \"www-data\"\n{}", App::of(&host, 1).toml());
    let up = host.start_toml(&toml);
    up.wait_ready();
    as_user(&up, 65534, 33, &["status", "--json"]).expect_done();
    for words in [
        &["weight", "app/1", "5"][..],
        &["limit", "app/1", "5"],
        &["drain", "app/1"],
        &["resume", "app/1"],
        &["down"],
    ] {
        as_user(&up, 65534, 33, words).expect_refusal(1, &["65534"]);
    }
    // A stranger who gets as far as the socket is refused by who he is.
    as_user(&up, 65534, 65534, &["status"]).expect_refusal(1, &[]);
    assert_eq!(up.service().server("app/1").weight, 100);
    assert_eq!(up.service().states(), ["ready"]);
}

#[test]
fn an_owner_may_change_what_root_may() {
    let host = Host::new();
    let toml = format!("[control]\nowner = \"www-data\"\nmode = \"0666\"\n{}", App::of(&host, 1).toml());
    let up = host.start_toml(&toml);
    up.wait_ready();
    as_user(&up, 33, 33, &["weight", "app/1", "5"]).expect_done();
    assert_eq!(up.service().server("app/1").weight, 5);
    // The file lets everybody in; who he is does not.
    as_user(&up, 65534, 65534, &["status"]).expect_refusal(1, &["65534", "may not"]);
}

#[test]
fn pinned_objects_are_for_root_only() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let instance = tests::leftover::instance_name(up.runtime());
    let pins = tests::leftover::pins(up.runtime()).unwrap_or_else(|| panic!("no pins of {instance}"));
    fn check(path: &Path) {
        let metadata = std::fs::metadata(path).expect("look at a pin");
        assert_eq!((metadata.uid(), metadata.mode() & 0o077), (0, 0), "{}", path.display());
        if metadata.is_dir() {
            for entry in std::fs::read_dir(path).expect("read the pins") {
                check(&entry.expect("an entry").path());
            }
        }
    }
    check(&pins);
    assert!(std::fs::read_dir(&pins).expect("read the pins").count() > 0);
}

#[test]
fn the_demo_server_answers_with_who_it_is() {
    let host = Host::new();
    let dist_ctl = program().display().to_string();
    let command = vec![dist_ctl, "demo".to_owned()];
    let toml = format!(
        "[service.demo]\nlisten = [\":8080\"]\n[service.demo.server]\ncount = 4\ncommand = {}\n",
        list(&command)
    );
    let up = host.start_toml(&toml);
    up.wait_ready();
    let mut seen: Vec<String> = (0..4)
        .map(|_| {
            let body = tests::http::get(V4).expect("an answer");
            up.wait_connections(&[0; 4]);
            body
        })
        .collect();
    seen.sort_unstable();
    for (body, name) in seen.iter().zip(["demo/1", "demo/2", "demo/3", "demo/4"]) {
        let pid = up.process(name).pid.to_string();
        assert!(body.contains(name) && body.contains(&pid) && body.contains("127.0.0.1"), "{body}");
    }
}
