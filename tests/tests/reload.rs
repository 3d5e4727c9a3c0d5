//! A newer configuration is carried out while everything runs, and so is another number of servers.

#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt as _;

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4},
    load::under_load,
    process::{Process, Signal},
    status::Server,
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// Writes another file where `up` has read its own.
fn rewrite(host: &Host, app: &App) {
    host.write("dist-ctl.toml", &app.toml());
}

#[track_caller]
fn reload(up: &Up<'_>) -> Vec<String> {
    let done = up.run(&["reload"]).expect_done();
    done.stdout.lines().map(str::to_owned).collect()
}

#[track_caller]
fn names(up: &Up<'_>) -> Vec<String> {
    up.service().servers.into_iter().map(|server| server.name).collect()
}

#[track_caller]
fn pids(up: &Up<'_>) -> Vec<Option<i32>> {
    up.service().servers.into_iter().map(|server| server.pid).collect()
}

#[track_caller]
fn wait_names(up: &Up<'_>, wanted: &[&str]) {
    wait_until_eq(
        "the servers",
        seconds(30.0),
        wanted.iter().map(|name| (*name).to_owned()).collect(),
        || names(up),
    );
    up.wait_ready();
}

/// Waits until as many others serve as had these pids, and nobody else runs.
#[track_caller]
fn wait_replaced(up: &Up<'_>, before: &[Option<i32>]) {
    wait_for("all to be replaced", seconds(60.0), || {
        let service = up.service();
        let is_new = |server: &Server| server.pid.is_some() && !before.contains(&server.pid);
        let done = service.servers.len() == before.len() && service.servers.iter().all(is_new);
        (done && service.is_ready()).then_some(())
    });
}

/// Lines that change what a server is started with.
const RED: &str = "environment = { COLOUR = \"red\" }";

#[track_caller]
fn assert_red(up: &Up<'_>) {
    for server in names(up) {
        assert_eq!(up.process(&server).environment()["COLOUR"], "red", "{server}");
    }
}

#[test]
fn numbers_are_set_and_nothing_is_restarted() {
    let host = Host::new();
    let app = App { limit: Some(50), ..App::of(&host, 2) };
    let up = host.up(&app);
    let mut held = client::hold(V4, 4);
    let before = pids(&up);
    // What an operator has set goes on where the file says what it said.
    up.run(&["weight", "app/1", "300"]).expect_done();
    let newer =
        App { limit: Some(3), policy: Some("first"), waiting: Some("capacity = 1".to_owned()), ..app };
    rewrite(&host, &newer);
    assert_eq!(
        reload(&up),
        [
            "service app: policy least-connections -> first",
            "service app: waiting.capacity 1024 -> 1",
            "servers app/1, app/2: limit 50 -> 3",
        ]
    );
    assert_eq!(pids(&up), before);
    let service = up.service();
    let weights: Vec<u64> = service.servers.iter().map(|server| server.weight).collect();
    assert_eq!((service.policy.as_str(), service.waiting.capacity, weights), ("first", 1, vec![300, 100]));
    // Two each are there already: one more each, one waits, and then nobody may.
    let more = client::hold(V4, 2);
    let waiting = client::stand(&[V4], 1);
    wait_until_eq("who waits", seconds(10.0), 1, || up.service().waiting.now);
    assert!(Client::open(V4).is_err(), "nobody else may wait");
    assert!(held.iter_mut().all(Client::is_served));
    drop((more, waiting, held));
    assert_eq!(reload(&up), ["nothing to change"]);
    up.stop();
}

/// What each server may run on.
#[track_caller]
fn masks(up: &Up<'_>) -> Vec<String> {
    names(up).iter().map(|server| up.process(server).fact("Cpus_allowed_list")).collect()
}

#[test]
fn cpus_become_others_while_servers_run_and_whoever_takes_a_servers_place_has_the_same() {
    let host = Host::new();
    let app = App { server: "cpus = \"spread\"".to_owned(), ..App::of(&host, 1) };
    let up = host.up(&app);
    let first = pids(&up)[0];
    let all = masks(&up)[0].clone();
    let two = App { count: 2, ..app.clone() };
    rewrite(&host, &two);
    reload(&up);
    wait_names(&up, &["app/1", "app/2"]);
    let divided = masks(&up);
    assert_eq!(pids(&up)[0], first);
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
        assert!(divided[0] != divided[1] && !divided.contains(&all), "{divided:?} of {all}");
    }
    // Both are replaced, one after the other or at once.
    let replaced = App { server: format!("{}\nenvironment = {{ A = \"1\" }}", two.server), ..two.clone() };
    rewrite(&host, &replaced);
    reload(&up);
    wait_until_eq("those who were replaced", seconds(30.0), 2, || {
        let servers = up.service().servers.into_iter().filter(|server| !server.name.contains('@'));
        let processes = servers.filter_map(|server| Process::find(server.pid?));
        processes.filter(|process| process.environment().contains_key("A")).count()
    });
    wait_names(&up, &["app/1", "app/2"]);
    assert_eq!(masks(&up), divided);
    let before = pids(&up);
    let free = App {
        service: "[service.app.load]\nsources = [\"reported\"]".to_owned(),
        server: "environment = { A = \"1\" }".to_owned(),
        ..two
    };
    rewrite(&host, &free);
    assert_eq!(
        reload(&up),
        [
            "service app: load none -> by reported, strength 3, floor 10 %",
            "servers app/1, app/2: cpus spread -> all"
        ]
    );
    assert_eq!((masks(&up), pids(&up)), (vec![all.clone(), all], before));
    up.stop();
}

#[test]
fn who_waits_is_told_what_the_newer_file_says() {
    let host = Host::new();
    let waiting = |text: &str| Some(text.to_owned());
    let app = App { limit: Some(1), waiting: waiting("timeout = \"1h\""), ..App::of(&host, 1) };
    let up = host.up(&app);
    let held = client::hold(V4, 1);
    let late = client::stand(&[V4], 1).remove(0);
    wait_until_eq("who waits", seconds(10.0), 1, || up.service().waiting.now);
    rewrite(&host, &App { waiting: waiting("timeout = \"100ms\"\nreply = \"later\""), ..app });
    reload(&up);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut &late, &mut said).expect("a reply");
    assert_eq!(said, "later");
    drop(held);
    up.stop();
}

#[test]
fn a_wrong_file_changes_nothing_and_says_why() {
    let host = Host::new();
    let app = App::of(&host, 2);
    let up = host.up(&app);
    let (before, mut held) = (pids(&up), client::hold(V4, 2));
    rewrite(&host, &App { weight: Some(0), limit: Some(7), ..app.clone() });
    let words = ["dist-ctl.toml:", "service.app.server.weight: 0 is out of range"];
    up.run(&["reload"]).expect_refusal(2, &words);
    up.wait_trouble(&["the configuration was not reloaded, nothing has changed", words[1]]);
    up.run(&["reload", "--dry-run"]).expect_refusal(2, &words);
    host.write("dist-ctl.toml", "[service.app");
    up.run(&["reload"]).expect_refusal(2, &["not TOML"]);
    std::fs::remove_file(host.path("dist-ctl.toml")).expect("remove the file");
    up.run(&["reload"]).expect_refusal(2, &["read configuration", "No such file"]);
    assert_eq!(pids(&up), before);
    assert!(up.service().servers.iter().all(|server| server.limit.is_none()));
    assert!(held.iter_mut().all(Client::is_served));
    rewrite(&host, &app);
    reload(&up);
    up.wait_no_trouble();
    up.stop();
}

#[test]
fn a_dry_run_says_what_a_reload_does() {
    let host = Host::new();
    let app = App::of(&host, 2);
    let up = host.up(&app);
    let before = pids(&up);
    rewrite(&host, &App { weight: Some(7), count: 3, server: "umask = \"0027\"".to_owned(), ..app });
    let shown = up.run(&["reload", "--dry-run"]).expect_done().stdout;
    assert_eq!(
        shown,
        "servers app/1, app/2: weight 100 -> 7\n\
         servers app/1, app/2: replaced by a new instance (umask changed)\n\
         server app/3: added and started\n"
    );
    assert_eq!(pids(&up), before, "and does nothing");
    assert_eq!(up.run(&["reload"]).expect_done().stdout, shown);
    wait_names(&up, &["app/1", "app/2", "app/3"]);
    up.stop();
}

#[test]
fn sighup_reloads() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    rewrite(&host, &App { weight: Some(7), ..app.clone() });
    up.signal(Signal::HUP);
    wait_until_eq("the weight", seconds(10.0), 7, || up.service().servers[0].weight);
    host.write("dist-ctl.toml", "[service.app");
    up.signal(Signal::HUP);
    wait_for("what is wrong to be logged", seconds(10.0), || up.log().contains("not TOML").then_some(()));
    assert_eq!(up.service().servers[0].weight, 7);
    up.stop();
}

#[test]
fn what_a_server_is_started_with_changes_and_no_client_notices() {
    let host = Host::new();
    let app = App::of(&host, 3);
    let up = host.up(&app);
    let before = pids(&up);
    rewrite(&host, &App { server: RED.to_owned(), ..app });
    under_load(4, |load| {
        load.serves(20);
        assert_eq!(
            reload(&up),
            ["servers app/1, app/2, app/3: replaced by a new instance (environment changed)"]
        );
        wait_replaced(&up, &before);
        load.serves(20);
    });
    assert_red(&up);
    up.stop();
}

#[test]
fn a_newer_file_takes_the_place_of_one_that_is_being_carried_out() {
    let host = Host::new();
    let app = App { server: "start_timeout = \"1h\"".to_owned(), ..App::of(&host, 2) };
    let up = host.up(&app);
    let before = pids(&up);
    rewrite(&host, &App { command: vec!["sleep".to_owned(), "1000".to_owned()], ..app.clone() });
    reload(&up);
    wait_for("an instance that never listens", seconds(20.0), || {
        names(&up).contains(&"app/1@2".to_owned()).then_some(())
    });
    // What can be set is set there too, and what it is started with is started anew.
    let newer = App { server: format!("{}\n{RED}", app.server), ..app };
    rewrite(&host, &newer);
    assert_eq!(
        reload(&up),
        ["servers app/1, app/2: replaced by a new instance (command, environment changed)"]
    );
    wait_replaced(&up, &before);
    assert_red(&up);
    up.stop();
}

#[test]
fn what_has_failed_is_tried_again_when_its_cause_is_mended() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    let mut held = client::hold(V4, 1);
    let before = pids(&up);
    let mut newer = app.clone();
    newer.command[0] = host.path_text("newer");
    rewrite(&host, &newer);
    reload(&up);
    wait_for("the failure to be told", seconds(20.0), || {
        let reason = up.service().server("app/1").reason.clone()?;
        reason.contains("was not replaced").then_some(())
    });
    assert_eq!(pids(&up), before);
    assert!(held[0].is_served());
    let copy = std::process::Command::new("cp").args([&host.test_server(), &newer.command[0]]).status();
    assert!(copy.expect("copy the server").success());
    let again = ["server app/1: replaced by a new instance (it runs as it was configured before)"];
    assert_eq!(reload(&up), again);
    drop(held);
    wait_for("the new instance", seconds(20.0), || (pids(&up) != before).then_some(()));
    wait_names(&up, &["app/1"]);
    assert_eq!(reload(&up), ["nothing to change"]);
    up.stop();
}

#[test]
fn a_file_that_is_undone_leaves_what_runs_alone() {
    let host = Host::new();
    let app = App { server: "start_timeout = \"1h\"".to_owned(), ..App::of(&host, 2) };
    let up = host.up(&app);
    let before = pids(&up);
    let undone = ["servers app/1, app/2: not replaced, because what runs is like that already"];
    // While it is tried, and after that has failed.
    let hangs = App { command: vec!["sleep".to_owned(), "1000".to_owned()], ..app.clone() };
    let fails = App { command: vec!["false".to_owned()], ..app.clone() };
    for (wrong, state) in [(hangs, "under-way"), (fails, "failed")] {
        rewrite(&host, &wrong);
        reload(&up);
        wait_until_eq("the restart", seconds(20.0), Some(state.to_owned()), || {
            up.service().roll.map(|roll| roll.state)
        });
        rewrite(&host, &app);
        assert_eq!(reload(&up), undone);
        wait_names(&up, &["app/1", "app/2"]);
        stays("the servers", seconds(1.0), before.clone(), || pids(&up));
        assert_eq!(up.service().server("app/1").reason, None);
    }
    up.stop();
}

#[test]
fn servers_of_other_names_are_ready_before_those_before_end() {
    let host = Host::new();
    let script = format!("sleep 0.5; exec {} --name {{name}} --listen '[::]:8080'", host.test_server());
    let app = App::running(2, ["/bin/sh", "-c", &script].map(str::to_owned).to_vec()).refusing();
    let up = host.up(&app);
    under_load(2, |load| {
        load.serves(20);
        rewrite(&host, &app.clone().named([("a", String::new()), ("b", String::new())]));
        let expected =
            ["servers app/a, app/b: added and started", "servers app/1, app/2: drained, stopped and removed"];
        assert_eq!(reload(&up), expected);
        wait_names(&up, &["app/a", "app/b"]);
        load.serves(20);
        // Back again, and one of them is wanted all the same, though not as it is, before the others are ready.
        rewrite(&host, &app);
        reload(&up);
        rewrite(&host, &App { count: 2, ..app.clone().named([("b", RED.to_owned())]) });
        reload(&up);
        wait_for("it to be as it is wanted", seconds(20.0), || {
            up.process_if_any("app/b")?.environment().contains_key("COLOUR").then_some(())
        });
        wait_names(&up, &["app/1", "app/2", "app/b"]);
        load.serves(20);
    });
    up.stop();
}

#[test]
fn what_changed_while_nobody_read_it_is_carried_out_without_loss() {
    let host = Host::new();
    let app = App::of(&host, 3).refusing();
    let up = host.up(&app);
    let before = pids(&up);
    let newer = App { server: RED.to_owned(), ..app.clone() };
    let broken = App { command: vec!["false".to_owned()], ..app };
    let (up, _) = under_load(2, |load| {
        // It is tried, and those before serve on.
        let up = up.kill_and_start(&broken);
        wait_until_eq("the restart", seconds(20.0), Some("failed".to_owned()), || {
            up.service().roll.map(|roll| roll.state)
        });
        load.serves(20);
        assert_eq!(pids(&up), before);
        let up = up.kill_and_start(&newer);
        wait_replaced(&up, &before);
        load.serves(20);
        up
    });
    assert_red(&up);
    up.stop();
}

#[test]
fn servers_are_added_and_removed_and_no_client_notices() {
    let host = Host::new();
    let app = App::of(&host, 2);
    let up = host.up(&app);
    under_load(4, |load| {
        load.serves(20);
        rewrite(&host, &App { count: 4, ..app.clone() });
        assert_eq!(reload(&up), ["servers app/3, app/4: added and started"]);
        wait_names(&up, &["app/1", "app/2", "app/3", "app/4"]);
        load.serves(20);
        let named = App { count: 1, ..app.clone() }.named([("big", "weight = 200".to_owned())]);
        rewrite(&host, &App { count: 1, ..named });
        assert_eq!(
            reload(&up),
            [
                "server app/big: added and started",
                "servers app/2, app/3, app/4: drained, stopped and removed"
            ]
        );
        wait_names(&up, &["app/1", "app/big"]);
        load.serves(20);
    });
    up.wait_connections(&[0, 0]);
    // Nothing of them is left. (The cgroup of a process that is just gone is busy for a moment.)
    wait_until_eq("what is left", seconds(10.0), Vec::<&str>::new(), || {
        let left = ["2", "3", "4"].into_iter().filter(|server| {
            let cgroups = std::fs::read_dir(up.cgroup().join("app")).expect("the service's cgroup");
            cgroups.flatten().any(|it| it.file_name().to_string_lossy().starts_with(&format!("{server}.")))
        });
        left.collect()
    });
    up.stop();
}

#[test]
fn a_removed_server_finishes_its_connections_also_under_the_next_distributor() {
    let host = Host::new();
    let app = App { server: "drain_timeout = \"1m\"".to_owned(), ..App::of(&host, 2) };
    let up = host.up(&app);
    let mut held = client::hold(V4, 2);
    rewrite(&host, &App { count: 1, ..app });
    reload(&up);
    // It is shown with the number of its instance, as it is no server any more.
    wait_until_eq("its state", seconds(10.0), "draining".to_owned(), || {
        up.service().server("app/2@1").state.clone()
    });
    let old = up.distributor();
    old.kill(seconds(5.0));
    wait_for("the next distributor", seconds(20.0), || (up.distributor() != old).then_some(()));
    up.wait_answering();
    assert_eq!(up.service().server("app/2@1").state, "draining");
    assert!(held.iter_mut().all(Client::is_served));
    assert_eq!(client::by_name(&client::hold(V4, 4)).into_iter().collect::<Vec<_>>(), [("1".to_owned(), 4)]);
    drop(held);
    wait_names(&up, &["app/1"]);
    up.stop();
}

#[test]
fn services_come_and_go() {
    let host = Host::new();
    let app = App { server: "drain_timeout = \"1m\"".to_owned(), ..App::of(&host, 1) };
    let web = App::with(&host, 1, &["--listen", "127.0.0.1:8081"]);
    let web = App { listen: vec!["127.0.0.1:8081".to_owned()], server: app.server.clone(), ..web };
    let web = web.toml().replace("service.app", "service.web");
    let up = host.up(&app);
    let mut held = client::hold(V4, 1);
    host.write("dist-ctl.toml", &format!("{}\n{web}", app.toml()));
    assert_eq!(reload(&up), ["service web: added, with 1 server"]);
    up.wait_ready();
    let address = "127.0.0.1:8081".parse().expect("an address");
    assert!(Client::open(address).is_ok());
    host.write("dist-ctl.toml", &web);
    assert_eq!(reload(&up), ["service app: drained, stopped and removed"]);
    assert!(Client::open(V4).is_err(), "it takes no more");
    assert!(held[0].is_served(), "and ends nobody's connection");
    // Neither does the distributor's death.
    let old = up.distributor();
    old.kill(seconds(5.0));
    wait_for("the next distributor", seconds(20.0), || (up.distributor() != old).then_some(()));
    up.wait_answering();
    assert!(held[0].is_served());
    assert_eq!(up.status().service("app").server("app/1").state, "draining");
    assert!(Client::open(address).is_ok());
    drop(held);
    wait_until_eq("the services", seconds(20.0), vec!["web".to_owned()], || {
        up.status().services.into_iter().map(|service| service.name).collect()
    });
    assert!(!up.cgroup().join("app").exists());
    // And what is in force is what was reloaded.
    up.replace_distributor();
    assert_eq!(up.status().services.len(), 1);
    up.stop();
}

#[test]
fn other_addresses_begin_a_service_anew() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    let moved = App::with(&host, 1, &["--listen", "127.0.0.1:8081"]);
    let moved = App { listen: vec!["127.0.0.1:8081".to_owned()], ..moved };
    rewrite(&host, &moved);
    let lines = reload(&up);
    assert!(
        lines[0].starts_with("service app: drained, stopped and begun anew, because its addresses"),
        "{lines:?}"
    );
    let address = "127.0.0.1:8081".parse().expect("an address");
    wait_for("the new address", seconds(30.0), || Client::open(address).ok());
    assert!(Client::open(V4).is_err());
    up.wait_ready();
    up.replace_distributor();
    assert_eq!(up.service().listen, ["127.0.0.1:8081"]);
    up.stop();
}

#[test]
fn an_address_that_somebody_else_has_is_refused_before_anything_is_changed() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    let _taken = std::net::TcpListener::bind("127.0.0.1:8081").expect("bind");
    let web = App { listen: vec!["127.0.0.1:8081".to_owned()], ..App::of(&host, 1) };
    let both = |weight| {
        format!(
            "{}\n{}",
            App { weight, ..app.clone() }.toml(),
            web.toml().replace("service.app", "service.web")
        )
    };
    host.write("dist-ctl.toml", &both(Some(7)));
    up.run(&["reload"]).expect_refusal(1, &["127.0.0.1:8081", "somebody listens there already"]);
    assert_eq!(up.service().servers[0].weight, 100);
    up.stop();
}

#[test]
fn who_may_talk_to_it_changes() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    let mode = |up: &Up<'_>| {
        std::fs::metadata(up.control_socket()).map_or(0, |file| file.permissions().mode() & 0o777)
    };
    assert_eq!(mode(&up), 0o600);
    host.write("dist-ctl.toml", &format!("[control]\nreaders = \"daemon\"\n{}", app.toml()));
    assert_eq!(reload(&up), ["control: owner, mode and readers of the control socket are set"]);
    wait_until_eq("its mode", seconds(10.0), 0o660, || mode(&up));
    up.wait_answering();
    up.stop();
}

#[test]
fn a_configuration_on_the_command_line_cannot_be_reloaded() {
    let host = Host::new();
    let server = host.test_server();
    let words = ["up", "--listen", "127.0.0.1:8080", "--servers", "1", "--"];
    let up =
        host.start_command(host.command(&[&words[..], &[&server, "--listen", "127.0.0.1:8080"]].concat()));
    up.wait_ready();
    up.run(&["reload"]).expect_refusal(2, &["command line", "up -f FILE"]);
    assert_eq!(up.status().troubles.len(), 0, "nothing is wrong with it");
    // The number of servers can be another one all the same.
    assert_eq!(up.run(&["scale", "app", "2"]).expect_done().stdout, "server app/2: added and started\n");
    wait_names(&up, &["app/1", "app/2"]);
    up.replace_distributor();
    assert_eq!(names(&up), ["app/1", "app/2"]);
    up.stop();
}

#[test]
fn a_service_is_scaled_and_no_client_notices() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    under_load(4, |load| {
        for count in [4, 2, 3, 1] {
            up.run(&["scale", "app", &count.to_string()]).expect_done();
            let wanted: Vec<String> = (1..=count).map(|number| format!("app/{number}")).collect();
            wait_until_eq("the servers", seconds(30.0), wanted, || names(&up));
            up.wait_ready();
            load.serves(10);
        }
    });
    up.run(&["scale", "web", "2"]).expect_refusal(2, &["no service is called web", "app"]);
    up.run(&["scale", "app", "0"]).expect_refusal(2, &["scale app to 0", "leaves no server to run"]);
    // It holds until the file says another number than it did.
    up.run(&["scale", "app", "2"]).expect_done();
    wait_names(&up, &["app/1", "app/2"]);
    up.replace_distributor();
    assert_eq!(names(&up).len(), 2);
    rewrite(&host, &App { weight: Some(7), ..app.clone() });
    assert_eq!(reload(&up), ["servers app/1, app/2: weight 100 -> 7"]);
    rewrite(&host, &App { count: 3, ..app });
    reload(&up);
    wait_names(&up, &["app/1", "app/2", "app/3"]);
    up.stop();
}

#[test]
fn servers_come_and_go_by_the_connections_there_are() {
    let host = Host::new();
    let scale = "\n[service.app.scale]\nmin = 1\nmax = 3\nup_after = \"100ms\"\ndown_after = \"2s\"\n";
    let app = App { limit: Some(4), tables: scale.to_owned(), ..App::of(&host, 1) };
    let up = host.up(&app);
    assert_eq!(names(&up), ["app/1"]);
    let held = client::hold(V4, 4);
    let waiting = client::stand(&[V4], 5);
    // Nine connections, of which each server has four and should have three.
    wait_names(&up, &["app/1", "app/2", "app/3"]);
    wait_until_eq("who waits", seconds(10.0), 0, || up.service().waiting.now);
    let status = up.run(&["status"]).expect_done().stdout;
    assert!(status.contains("3 of 1 to 3 servers"), "{status}");
    up.run(&["scale", "app", "4"]).expect_refusal(2, &["scale app to 4", "write 1 to 3"]);
    // The next one goes on with as many.
    let up = up.kill_and_start(&app);
    wait_names(&up, &["app/1", "app/2", "app/3"]);
    wait_until_eq("connections", seconds(10.0), 9, || up.connections().iter().sum::<u64>());
    drop((held, waiting));
    wait_names(&up, &["app/1"]);
    assert!(up.log().contains("it is to have 1 server\n"), "{}", up.log());
    up.stop();
}
