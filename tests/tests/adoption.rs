//! Everything of dist-ctl may be killed: the next `dist-ctl up` goes on with what runs.

#![forbid(unsafe_code)]

use std::{fs, process::Command, thread};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4},
    load::under_load,
    process::{Process, Signal, in_cgroup},
    wait::{seconds, wait_for, wait_until_eq},
};

/// A service from a file, so that it can be brought up again, with another one if need be.
struct Story<'h> {
    host: &'h Host,
    toml: String,
}

impl<'h> Story<'h> {
    fn of(host: &'h Host, app: &App) -> Self {
        Self { host, toml: app.toml() }
    }

    fn up(&self) -> Up<'h> {
        let up = self.launch();
        up.wait_answering();
        up.wait_ready();
        up
    }

    fn launch(&self) -> Up<'h> {
        let file = self.host.write("dist-ctl.toml", &self.toml);
        self.host.launch(self.host.command(&["up", "-f", &file]))
    }
}

/// Kills the monitor, and waits until its distributor has gone with it.
fn kill_monitor(up: Up<'_>) {
    let distributor = up.distributor();
    up.monitor().kill(seconds(5.0));
    wait_for("the end of the distributor", seconds(5.0), || (!distributor.runs()).then_some(()));
    up.forget();
}

/// Kills both, the one that would restart the other first.
fn kill_both(up: Up<'_>) {
    let (monitor, distributor) = (up.monitor(), up.distributor());
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    monitor.kill(seconds(5.0));
    up.forget();
}

fn processes<const N: usize>(up: &Up<'_>, names: [&str; N]) -> [Process; N] {
    names.map(|name| up.process(name))
}

#[test]
fn after_a_killed_monitor_the_next_one_goes_on() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 3));
    let old = story.up();
    let servers = processes(&old, ["app/1", "app/2", "app/3"]);
    let mut held = client::hold(V4, 30);
    drop(client::hold(V4, 30));
    old.wait_connections(&[10, 10, 10]);
    let before = old.service();
    kill_monitor(old);
    let meanwhile = client::hold(V4, 30);
    let up = story.up();
    assert_eq!(processes(&up, ["app/1", "app/2", "app/3"]), servers);
    assert!(held.iter_mut().all(Client::is_served));
    let service = up.service();
    assert_eq!(service.connections(), [20, 20, 20]);
    assert_eq!(service.totals().iter().sum::<u64>(), before.totals().iter().sum::<u64>() + 30);
    for (server, before) in service.servers.iter().zip(&before.servers) {
        assert_eq!((server.restarts, &server.since), (0, &before.since), "{server:#?}");
    }
    // It is their supervisor in every respect.
    servers[0].kill(seconds(5.0));
    wait_for("the next instance", seconds(10.0), || {
        up.process_if_any("app/1").filter(|next| *next != servers[0])
    });
    up.wait_ready();
    assert_eq!(up.service().server("app/1").restarts, 1);
    drop((held, meanwhile));
    up.wait_connections(&[0, 0, 0]);
}

#[test]
fn what_was_adopted_outlives_the_next_distributor_and_ends_with_the_service() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let old = story.up();
    let servers = processes(&old, ["app/1", "app/2"]);
    kill_monitor(old);
    let up = story.up();
    up.replace_distributor();
    assert_eq!(processes(&up, ["app/1", "app/2"]), servers);
    up.stop();
    assert!(servers.iter().all(|server| !server.runs()));
}

#[test]
fn with_both_killed_at_once_nobody_fails_and_nobody_loses_his_turn() {
    let host = Host::new();
    let app = App { limit: Some(5), ..App::of(&host, 2) };
    let story = Story::of(&host, &app);
    let old = story.up();
    let served = client::hold(V4, 10);
    let waiting = client::stand(&[V4], 40);
    wait_until_eq("waiting", seconds(5.0), 40, || old.service().waiting.now);
    kill_both(old);
    let up = story.up();
    assert_eq!(up.service().waiting.now, 40);
    let mut line = client::Line::behind(served, waiting).expect("ten are served");
    assert_eq!(line.turns(40).expect("everybody is served"), (0..40).collect::<Vec<_>>());
    assert_eq!(up.service().waiting.left, 0);
}

#[test]
fn nobody_is_refused_while_both_are_killed_again_and_again() {
    let host = Host::new();
    for app in [App::of(&host, 3), App::of(&host, 3).refusing()] {
        let story = Story::of(&host, &app);
        let first = story.up();
        let servers = processes(&first, ["app/1", "app/2", "app/3"]);
        let (up, opened) = under_load(8, |_| {
            let mut up = first;
            for _ in 0..4 {
                kill_both(up);
                thread::sleep(seconds(0.2));
                up = story.up();
            }
            up
        });
        assert_eq!(processes(&up, ["app/1", "app/2", "app/3"]), servers);
        up.wait_connections(&[0, 0, 0]);
        assert_eq!(up.service().totals().iter().sum::<u64>(), opened);
        up.stop();
    }
}

#[test]
fn the_configuration_counts_and_not_what_was_set_before() {
    let host = Host::new();
    let story = Story::of(&host, &App { limit: Some(7), ..App::of(&host, 2) });
    let old = story.up();
    old.run(&["weight", "app/1", "900"]).expect_done();
    old.run(&["limit", "app/2", "1"]).expect_done();
    kill_monitor(old);
    let up = story.up();
    for server in &up.service().servers {
        assert_eq!((server.weight, server.limit), (100, Some(7)), "{server:#?}");
    }
    let held = client::hold(V4, 14);
    assert_eq!(up.connections(), [7, 7]);
    drop(held);
}

#[test]
fn a_server_that_was_being_stopped_is_started_again() {
    let host = Host::new();
    let app = App { server: "drain_timeout = \"60s\"\n".into(), ..App::of(&host, 2) };
    let story = Story::of(&host, &app);
    let old = story.up();
    let mut held = client::hold(V4, 2);
    old.signal(Signal::TERM);
    old.wait_state("app/1", "draining");
    old.wait_state("app/2", "draining");
    kill_monitor(old);
    let up = story.launch();
    up.wait_answering();
    assert!(held.iter_mut().all(Client::is_served), "their time to end goes on");
    drop(held);
    up.wait_ready();
    assert_eq!(client::by_name(&client::hold(V4, 2)).len(), 2);
}

#[test]
fn a_server_that_died_while_nobody_watched_is_started_again() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let old = story.up();
    let [victim, other] = processes(&old, ["app/1", "app/2"]);
    kill_both(old);
    victim.kill(seconds(5.0));
    let held = client::hold(V4, 10);
    assert!(held.iter().all(|client| client.server == "2"));
    let up = story.up();
    let [next, same] = processes(&up, ["app/1", "app/2"]);
    assert!(next != victim && same == other);
    assert_eq!(up.connections(), [0, 10]);
    assert_eq!(up.service().server("app/1").restarts, 1);
    drop(held);
}

/// Changes the record of a killed instance.
fn edit_record(host: &Host, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = host.runtime("main").join("record.json");
    let text = fs::read_to_string(&path).expect("there is a record");
    let mut record = serde_json::from_str(&text).expect("it is JSON");
    edit(&mut record);
    fs::write(&path, record.to_string()).expect("write the record");
}

#[test]
fn a_number_that_was_used_again_is_not_taken_for_the_server() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let old = story.up();
    let [victim, other] = processes(&old, ["app/1", "app/2"]);
    kill_both(old);
    victim.kill(seconds(5.0));
    // Somebody who has the victim's number now, as far as the record can tell.
    let mut stranger = Command::new("sleep").arg("60").spawn().expect("start a process");
    edit_record(&host, |record| {
        let server = &mut record["services"][0]["servers"][0];
        server["label"]["machine"]["state"]["Ready"]["run"]["main"]["Running"]["pid"] = stranger.id().into();
    });
    let up = story.up();
    assert_eq!(up.process("app/2"), other);
    assert_ne!(up.service().server("app/1").pid, Some(stranger.id() as i32));
    up.stop();
    assert_eq!(stranger.try_wait().expect("ask for its end"), None, "it is none of our business");
    stranger.kill().and_then(|()| stranger.wait()).expect("end it");
}

#[test]
fn without_a_record_what_runs_is_known_by_its_cgroups() {
    let host = Host::new();
    for spoil in [
        |text: &str| text[..text.len() / 2].to_owned(),
        |_: &str| String::new(),
        |_: &str| "{\"format\":99}".to_owned(),
        |text: &str| text.replacen("\"boot\":\"", "\"boot\":\"of another ", 1),
    ] {
        let story = Story::of(&host, &App::of(&host, 2));
        let old = story.up();
        let servers = processes(&old, ["app/1", "app/2"]);
        let mut held = client::hold(V4, 4);
        kill_both(old);
        let path = host.runtime("main").join("record.json");
        let text = fs::read_to_string(&path).expect("there is a record");
        fs::write(&path, spoil(&text)).expect("spoil it");
        let up = story.up();
        assert_eq!(processes(&up, ["app/1", "app/2"]), servers, "{}", up.log());
        assert!(held.iter_mut().all(Client::is_served));
        assert_eq!(up.connections(), [2, 2]);
        drop(held);
        up.wait_connections(&[0, 0]);
        up.stop();
    }
}

#[test]
fn a_service_that_is_configured_otherwise_goes_on_as_far_as_it_can() {
    let host = Host::new();
    let app = App::of(&host, 0).named([("a", String::new()), ("b", String::new()), ("c", String::new())]);
    let mut story = Story::of(&host, &app);
    let old = story.up();
    let [a, b, c] = processes(&old, ["app/a", "app/b", "app/c"]);
    kill_both(old);
    // The first as it was, the second with another environment, the third gone, and a new one.
    let other = "environment = { OTHER = \"1\" }".to_owned();
    let app = App::of(&host, 0).named([("a", "weight = 300".into()), ("b", other), ("d", String::new())]);
    story.toml = app.toml();
    let up = story.launch();
    up.wait_answering();
    wait_for("the new servers", seconds(20.0), || {
        let service = up.service();
        (service.is_ready() && up.process_if_any("app/b").is_some_and(|next| next != b)).then_some(())
    });
    assert_eq!(up.process("app/a"), a);
    assert_eq!(up.service().server("app/a").weight, 300);
    assert!(!b.runs() && !c.runs());
    assert_eq!(client::by_name(&client::hold(V4, 50)).len(), 3);
}

#[test]
fn a_service_with_other_addresses_starts_afresh_and_one_that_is_gone_is_ended() {
    let host = Host::new();
    let two = format!(
        "{}\n{}",
        App::of(&host, 1).toml(),
        App::of(&host, 1).toml().replace("service.app", "service.gone").replace("8080", "8081")
    );
    let mut story = Story { host: &host, toml: two };
    let old = story.launch();
    old.wait_answering();
    wait_for("both services", seconds(20.0), || {
        old.status().services.iter().all(|service| service.is_ready()).then_some(())
    });
    let [app, gone] = processes(&old, ["app/1", "gone/1"]);
    kill_both(old);
    story.toml = App::of(&host, 1).toml().replace("8080", "8082");
    let up = story.up();
    assert!(!app.runs() && !gone.runs());
    assert!(up.log().contains("other addresses"), "{}", up.log());
    Client::open("127.0.0.1:8082".parse().unwrap()).expect("served at the new address");
    let left = in_cgroup(&up.cgroup().join("gone"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_wrong_configuration_leaves_what_runs_alone() {
    let host = Host::new();
    let mut story = Story::of(&host, &App::of(&host, 2));
    let old = story.up();
    let servers = processes(&old, ["app/1", "app/2"]);
    let mut held = client::hold(V4, 2);
    kill_both(old);
    let right = std::mem::replace(&mut story.toml, "[service.app]\nlisten = 7\n".into());
    let refused = story.launch();
    assert_eq!(refused.wait_exit(seconds(10.0)).code(), Some(2));
    refused.forget();
    assert!(servers.iter().all(|server| server.runs()) && held.iter_mut().all(Client::is_served));
    story.toml = right;
    let up = story.up();
    assert_eq!(processes(&up, ["app/1", "app/2"]), servers);
    drop(held);
    up.wait_connections(&[0, 0]);
}

#[test]
fn a_file_that_is_spoilt_later_is_not_read_by_the_next_distributor() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let up = story.up();
    host.write("dist-ctl.toml", "this is [no configuration");
    up.replace_distributor();
}

#[test]
fn down_ends_what_a_killed_instance_has_left() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let old = story.up();
    let servers = processes(&old, ["app/1", "app/2"]);
    kill_both(old);
    let told = host.run(&["status"]);
    told.expect_refusal(1, &["was killed", "dist-ctl up", "dist-ctl down"]);
    host.run(&["down"]).expect_done();
    assert!(servers.iter().all(|server| !server.runs()));
    assert!(!host.runtime("main").exists());
}

#[test]
fn a_first_distributor_that_is_killed_before_it_is_ready_is_followed() {
    let host = Host::new();
    let story = Story::of(&host, &App::of(&host, 2));
    let up = story.launch();
    let mut killed = 0;
    // At moments that are farther and farther from its start.
    for delay in [0.0, 0.005, 0.02, 0.05, 0.1] {
        let distributor = wait_for("a distributor", seconds(10.0), || {
            up.monitor()
                .children()
                .into_iter()
                .find(|child| child.arguments().get(1).is_some_and(|it| it == "distributor"))
        });
        thread::sleep(seconds(delay));
        if up.control_socket().exists() {
            break;
        }
        distributor.kill(seconds(5.0));
        killed += 1;
    }
    assert!(killed > 0, "none was killed before it was ready");
    up.wait_answering();
    up.wait_ready();
    let servers = processes(&up, ["app/1", "app/2"]);
    // Nor when there is something to take over.
    kill_both(up);
    let up = story.launch();
    for delay in [0.0, 0.002, 0.005, 0.01, 0.02, 0.04] {
        let distributor = wait_for("a distributor", seconds(10.0), || {
            up.monitor()
                .children()
                .into_iter()
                .find(|child| child.arguments().get(1).is_some_and(|it| it == "distributor"))
        });
        thread::sleep(seconds(delay));
        distributor.kill(seconds(5.0));
    }
    up.wait_answering();
    up.wait_ready();
    assert_eq!(processes(&up, ["app/1", "app/2"]), servers);
    assert_eq!(client::by_process(&client::hold(V4, 10)).len(), 2);
    up.stop();
    assert!(servers.iter().all(|server| !server.runs()));
}

#[test]
fn an_environment_that_says_what_is_configured_too_changes_no_server() {
    let host = Host::new();
    let app = App { server: "environment = { COLOUR = \"red\" }\n".into(), ..App::of(&host, 1) };
    let story = Story::of(&host, &app);
    let old = story.up();
    let servers = processes(&old, ["app/1"]);
    kill_both(old);
    let mut command = host.command(&["up", "-f", &host.path_text("dist-ctl.toml")]);
    command.env("COLOUR", "red");
    let up = host.launch(command);
    up.wait_answering();
    up.wait_ready();
    assert_eq!(processes(&up, ["app/1"]), servers);
}
