//! `dist-ctl restart`: servers are replaced one after the other, and no client notices.

#![forbid(unsafe_code)]

use std::{fs, thread};

use tests::{
    app::{App, Chosen, NOBODY_WAITS},
    client::{self, Client},
    command::{self, Ended},
    host::{Host, Up, V4},
    load::under_load,
    own::Own,
    process::Signal,
    status::Server,
    wait::{seconds, wait_for, wait_until_eq},
};

#[track_caller]
fn restart(up: &Up<'_>, words: &[&str]) -> Ended {
    command::run(&mut up.command(&[&["restart"], words].concat()), seconds(60.0))
}

fn instances(up: &Up<'_>) -> Vec<(String, u64)> {
    up.service().servers.iter().map(|server| (server.name.clone(), server.instance)).collect()
}

#[track_caller]
fn wait_instances(up: &Up<'_>, wanted: &[(&str, u64)]) {
    let wanted: Vec<(String, u64)> = wanted.iter().map(|(name, it)| ((*name).to_owned(), *it)).collect();
    wait_until_eq("the instances", seconds(20.0), wanted, || instances(up));
}

/// How many instances have a cgroup.
fn cgroups(up: &Up<'_>) -> usize {
    let entries = fs::read_dir(up.cgroup().join("app")).expect("read the service's cgroup");
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.split_once('.').is_some_and(|(_, number)| number.parse::<u32>().is_ok())).count()
}

/// How many instances have a process.
fn populated(up: &Up<'_>) -> usize {
    let entries = fs::read_dir(up.cgroup().join("app")).expect("read the service's cgroup");
    let instances = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().contains('.'));
    let has_any = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("cgroup.procs")).is_ok_and(|processes| !processes.is_empty())
    };
    instances.filter(has_any).count()
}

#[track_caller]
fn row(up: &Up<'_>, name: &str) -> Server {
    up.service().server(name).clone()
}

#[track_caller]
fn reason(up: &Up<'_>, name: &str) -> String {
    row(up, name).reason.expect("a reason")
}

#[test]
fn each_server_is_replaced_and_no_client_notices() {
    for (socket, words) in
        [("own", vec!["--listen", "[::]:8080"]), ("systemd", vec!["--inherited"]), ("stdin", vec!["--stdin"])]
    {
        let host = Host::new();
        let app = App { socket: Some(socket), ..App::with(&host, 3, &words) }.refusing();
        let up = host.up(&app);
        let before: Vec<_> = (1..=3).map(|number| up.process(&format!("app/{number}"))).collect();
        let (ended, served) = under_load(4, |load| {
            load.serves(20);
            let ended = restart(&up, &["app"]).expect_done();
            load.serves(20);
            ended
        });
        for number in 1..=3 {
            let line = format!("app/{number}: restarted ({number} of 3)\n");
            assert!(ended.stdout.contains(&line), "{socket}: {ended}");
        }
        assert_eq!(instances(&up), [1, 2, 3].map(|number| (format!("app/{number}"), 2)), "{socket}");
        assert!(up.service().is_ready() && before.iter().all(|process| !process.runs()));
        let environment = up.process("app/2").environment();
        assert_eq!(environment["DIST_CTL_SERVER"], "app/2");
        up.wait_connections(&[0, 0, 0]);
        let service = up.service();
        let (total, moved) = (service.totals().iter().sum::<u64>(), service.outcome("moved"));
        assert!((served..=served + moved).contains(&total), "{socket}: {total} counted, {served} served");
        let roll = service.roll.as_ref().expect("a restart");
        assert_eq!((roll.state.as_str(), roll.asked, &roll.reason), ("done", true, &None));
        assert!(roll.ended.is_some() && roll.servers.iter().all(|server| server.state == "done"));
        assert_eq!((roll.max_surge, roll.max_unavailable), (1, 0));
        assert!(up.log().contains("service app: restart done after"), "{}", up.log());
        assert_eq!(service.outcomes(["refused_limit", "refused_capacity", "refused_no_room"]), [0; 3]);
    }
}

#[test]
fn two_instances_of_a_server_are_told_apart_and_never_both_in_the_plan() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 2);
    let up = host.up(&App { server: "drain_timeout = \"60s\"\n".into(), ..chosen.app.clone() });
    up.run(&["weight", "app/1", "50"]).expect_done();
    up.run(&["limit", "app/1", "9"]).expect_done();
    let mut held = client::hold(V4, 3);
    chosen.set_held(true);
    restart(&up, &["app/1", "--no-wait"]).expect_done();
    wait_instances(&up, &[("app/1", 1), ("app/1@2", 2), ("app/2", 1)]);
    wait_until_eq("what it says", seconds(20.0), true, || {
        reason(&up, "app/1@2") == "is to take the place of app/1; waits for a listener on [::]:8080"
    });
    let coming = row(&up, "app/1@2");
    assert_eq!((coming.state.as_str(), coming.effective_weight), ("starting", 0));
    assert_eq!(row(&up, "app/1").state, "ready");
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("restart since ") && table.contains(": 0 of 1 done; app/1: its new"), "{table}");
    // It is no server of its own.
    let ended = up.run(&["weight", "app/1@2", "10"]);
    assert_eq!(ended.code, Some(2), "{ended}");

    let old = up.process("app/1");
    let (its, others): (Vec<_>, Vec<_>) = held.drain(..).partition(|client| client.pid == old.pid);
    assert_eq!((its.len(), others.len()), (1, 2));
    chosen.set_held(false);
    wait_instances(&up, &[("app/1", 2), ("app/1@1", 1), ("app/2", 1)]);
    let leaving = row(&up, "app/1@1");
    assert_eq!((leaving.state.as_str(), leaving.connections, leaving.effective_weight), ("draining", 1, 0));
    let says = reason(&up, "app/1@1");
    assert!(says.starts_with("replaced by instance 2; is to be stopped; its connections have "), "{says}");
    let now = row(&up, "app/1");
    assert_eq!((now.weight, now.limit, now.connections, now.connections_total), (50, Some(9), 0, 1));
    let roll = up.service().roll.expect("a restart");
    let says = roll.servers[0].reason.as_deref();
    assert_eq!(says, Some("instance 2 serves; the one before has to end"), "{roll:?}");
    // By weight: what the one before holds is no matter.
    let more = client::hold(V4, 4);
    assert!(more.iter().all(|client| client.pid != old.pid));
    assert!(old.runs());
    drop(its);
    wait_instances(&up, &[("app/1", 2), ("app/2", 1)]);
    assert!(!old.runs());
    wait_until_eq("the restart", seconds(5.0), "done".to_owned(), || up.service().roll.expect("one").state);
}

#[test]
fn a_new_instance_that_fails_ends_the_restart_and_those_before_serve_on() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 2);
    let up = host.up(&chosen.app);
    let before = [up.process("app/1"), up.process("app/2")];
    chosen.set_broken(true);
    let (ended, _) = under_load(2, |_| restart(&up, &[]));
    assert_eq!(ended.code, Some(1), "{ended}");
    let sentence = "restart app: app/1: the new instance exited with 3 after ";
    assert!(ended.stderr.contains(sentence), "{ended}");
    assert!(ended.stderr.contains("; the one before serves on; 0 of 2 were restarted"), "{ended}");
    assert_eq!(before, [up.process("app/1"), up.process("app/2")]);
    wait_instances(&up, &[("app/1", 1), ("app/2", 1)]);
    let says = reason(&up, "app/1");
    assert!(says.starts_with("was not replaced ") && says.contains("exited with 3"), "{says}");
    let table = up.run(&["status"]).expect_done().stdout;
    assert!(table.contains("restart failed ") && table.contains("0 of 2 done; app/1: the new"), "{table}");
    assert!(up.log().contains("restart failed after"), "{}", up.log());
    wait_until_eq("instances with a cgroup", seconds(10.0), 2, || cgroups(&up));
    // The next one has other numbers, and what was said of the last try is over.
    chosen.set_broken(false);
    restart(&up, &[]).expect_done();
    assert_eq!(instances(&up), [("app/1".to_owned(), 3), ("app/2".to_owned(), 2)]);
    assert_eq!(row(&up, "app/1").reason, None);
}

#[test]
fn a_new_instance_that_is_not_ready_in_time_ends_the_restart() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 1);
    let server = "start_timeout = \"5s\"\nstop_timeout = \"200ms\"\n".to_owned();
    let up = host.up(&App { server, ..chosen.app.clone() });
    let before = up.process("app/1");
    chosen.set_held(true);
    let ended = restart(&up, &["app/1"]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("waits for a listener on [::]:8080"), "{ended}");
    assert!(ended.stdout.contains("its new instance is not ready yet"), "{ended}");
    assert_eq!(up.process("app/1"), before);
    assert_eq!(instances(&up), [("app/1".to_owned(), 1)]);
    chosen.set_held(false);
}

#[test]
fn without_surge_one_is_drained_and_stopped_before_the_next_one_starts() {
    let host = Host::new();
    let app = App {
        tables: "[service.app.roll]\nmax_surge = 0\nmax_unavailable = 1\n".into(),
        ..App::of(&host, 3)
    };
    let up = host.up(&app);
    let mut most = 0;
    let (ended, _) = under_load(2, |_| {
        thread::scope(|scope| {
            let restart = scope.spawn(|| restart(&up, &["app"]));
            while !restart.is_finished() {
                most = most.max(populated(&up));
                let ready = up.service().servers.iter().filter(|server| server.state == "ready").count();
                assert!(ready >= 2, "{ready} ready");
            }
            restart.join().expect("no panic").expect_done()
        })
    });
    assert!(ended.stdout.contains("(3 of 3)"), "{ended}");
    assert!(up.log().contains("server app/2 is stopped; started again now"), "{}", up.log());
    assert_eq!(most, 3, "instances at a time");
    assert_eq!(instances(&up), [1, 2, 3].map(|number| (format!("app/{number}"), 2)));
}

#[test]
fn two_may_be_replaced_at_a_time() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 3);
    let up = host.up(&chosen.app);
    chosen.set_held(true);
    restart(&up, &["--max-surge", "2", "--no-wait"]).expect_done();
    wait_instances(&up, &[("app/1", 1), ("app/1@2", 2), ("app/2", 1), ("app/2@2", 2), ("app/3", 1)]);
    // Another one has to wait.
    for words in [&["app"][..], &["app/3"], &[]] {
        let ended = restart(&up, words);
        assert_eq!(ended.code, Some(1), "{ended}");
        assert!(ended.stderr.contains("a restart of service app is under way for"), "{ended}");
        assert!(ended.stderr.contains("(0 of 3 done): wait for its end"), "{ended}");
    }
    chosen.set_held(false);
    wait_instances(&up, &[("app/1", 2), ("app/2", 2), ("app/3", 2)]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    for (words, sentence) in [
        (vec!["nobody"], "no service and no server is called nobody, but these are: app, app/1"),
        (vec!["app/9"], "no service and no server is called app/9, but these are: app, app/1"),
        (vec!["app", "--max-surge", "0"], "with max_surge 0 and max_unavailable 0 nothing can be restarted"),
        (vec!["app", "--max-surge", "300"], "write a number from 0 to 256"),
        (vec!["a/b/c"], "write SERVICE or SERVICE/SERVER"),
    ] {
        let ended = restart(&up, &words);
        assert_eq!(ended.code, Some(2), "{words:?}: {ended}");
        assert!(ended.stderr.contains(sentence), "{words:?}: {ended}");
    }
    assert_eq!(instances(&up), [("app/1".to_owned(), 1)]);
}

#[test]
fn who_was_taken_out_stays_out_and_who_was_given_up_is_started_afresh() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 3);
    let tables = "[service.app.server.restart]\ngive_up_after = 1\n".to_owned();
    let up = host.up(&App { tables, ..chosen.app.clone() });
    up.run(&["drain", "app/1"]).expect_done();
    chosen.set_broken(true);
    up.process("app/3").kill(seconds(5.0));
    up.wait_state("app/3", "failed");
    chosen.set_broken(false);
    restart(&up, &["app"]).expect_done();
    let service = up.service();
    assert_eq!(service.states(), ["draining", "ready", "ready"], "{service:#?}");
    assert!(service.server("app/1").drain.is_some() && service.server("app/1").instance == 2);
    let served: Vec<String> = client::hold(V4, 4).iter().map(|client| client.server.clone()).collect();
    assert!(!served.contains(&"1".to_owned()), "{served:?}");
    // Also by a successor.
    up.run(&["resume", "app/1"]).expect_done();
    chosen.set_held(true);
    restart(&up, &["app/1", "--no-wait"]).expect_done();
    wait_for("the successor", seconds(20.0), || {
        instances(&up).contains(&("app/1@3".into(), 3)).then_some(())
    });
    up.run(&["drain", "app/1"]).expect_done();
    chosen.set_held(false);
    wait_until_eq("the restart", seconds(10.0), "done".to_owned(), || up.service().roll.expect("one").state);
    assert_eq!((row(&up, "app/1").state.as_str(), row(&up, "app/1").instance), ("draining", 3));
}

#[test]
fn a_server_that_dies_while_its_successor_starts_is_started_again_and_replaced_all_the_same() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 1);
    let up = host.up(&chosen.app);
    chosen.set_held(true);
    restart(&up, &["app/1", "--no-wait"]).expect_done();
    wait_instances(&up, &[("app/1", 1), ("app/1@2", 2)]);
    up.process("app/1").kill(seconds(5.0));
    wait_instances(&up, &[("app/1", 3), ("app/1@2", 2)]);
    chosen.set_held(false);
    wait_until_eq("the restart", seconds(10.0), "done".to_owned(), || up.service().roll.expect("one").state);
    assert_eq!(up.service().servers.len(), 1);
    assert!(Client::open(V4).is_ok());
}

#[test]
fn all_services_are_restarted_one_after_the_other_and_none_after_one_that_fails() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 1);
    let others: String = ["api", "web"]
        .iter()
        .zip(1..)
        .map(|(name, number)| {
            let port = 8080 + number;
            let server = host.test_server();
            format!(
                "[service.{name}]\nlisten = [\"[::]:{port}\"]\n[service.{name}.server]\n\
                 command = [\"{server}\", \"--listen\", \"[::]:{port}\"]\ncount = 1\n"
            )
        })
        .collect();
    let up = host.start_toml(&format!("{}{others}", chosen.app.toml()));
    up.wait_ready();
    let rolled = |up: &Up<'_>| -> Vec<u64> {
        up.status().services.iter().map(|service| service.servers[0].instance).collect()
    };
    let ended = restart(&up, &[]).expect_done();
    let order: Vec<usize> = ["api/1: restarted", "app/1: restarted", "web/1: restarted"]
        .map(|line| ended.stdout.find(line).expect(line))
        .into();
    assert!(order.is_sorted(), "{ended}");
    assert_eq!(rolled(&up), [2, 2, 2]);
    chosen.set_broken(true);
    let ended = restart(&up, &[]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("restart app: app/1: the new instance exited with 3"), "{ended}");
    assert_eq!(rolled(&up), [3, 2, 2]);
    let web = up.status().service("web").roll.clone().expect("it was asked for");
    let expected = "the restart of service app, which comes before, has failed";
    assert_eq!((web.state.as_str(), web.reason.as_deref()), ("failed", Some(expected)));
}

#[test]
fn a_stop_meanwhile_ends_all_of_them() {
    let host = Host::new();
    let chosen = Chosen::of(&host, 2);
    let up = host.up(&App { server: "drain_timeout = \"60s\"\n".into(), ..chosen.app.clone() });
    let held = client::hold(V4, 2);
    restart(&up, &["app/1", "--no-wait"]).expect_done();
    wait_instances(&up, &[("app/1", 2), ("app/1@1", 1), ("app/2", 1)]);
    chosen.set_held(true);
    restart(&up, &["app/2", "--no-wait"]).expect_refusal(1, &["under way"]);
    drop(held);
    wait_until_eq("the restart", seconds(10.0), "done".to_owned(), || up.service().roll.expect("one").state);
    restart(&up, &["app/2", "--no-wait"]).expect_done();
    wait_instances(&up, &[("app/1", 2), ("app/2", 1), ("app/2@2", 2)]);
    // Fails if anything is left of it.
    up.stop();
    chosen.set_held(false);
}

#[test]
fn one_that_was_adopted_is_restarted_in_place_if_it_has_a_command() {
    let host = Host::new();
    let own = Own::start(&host);
    let up = host.start(&App { service: "occupied = \"wait\"\n".into(), ..App::of(&host, 1) });
    let pid = own.pid();
    up.run(&["adopt", "app", "--pid", &pid, "--name", "old"]).expect_done();
    up.wait_ready();
    let ended = restart(&up, &["app/old"]);
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.stderr.contains("app/old was adopted without a command, so nobody knows"), "{ended}");
    let ended = restart(&up, &["app"]).expect_done();
    assert!(ended.stdout.contains("app/old: left alone: server app/old was adopted"), "{ended}");
    assert!(ended.stdout.contains("app/1: restarted (1 of 1)"), "{ended}");

    up.run(&["release", "app/old"]).expect_done();
    let server = host.test_server_for_all();
    let words = [
        "adopt",
        "app",
        "--pid",
        &pid,
        "--name",
        "old",
        "--",
        &server,
        "--name",
        "new",
        "--listen",
        "[::]:8080",
    ];
    up.run(&words).expect_done();
    up.wait_ready();
    restart(&up, &["app/old"]).expect_done();
    assert!(!own.runs());
    assert!(client::hold(V4, 4).iter().any(|client| client.server == "new"));
    // From here on it is a server like any other.
    let before = up.process("app/old");
    under_load(2, |_| restart(&up, &["app/old"]).expect_done());
    assert!(up.log().contains("server app/old: its instance "), "beside the old one:\n{}", up.log());
    assert_ne!(up.process("app/old"), before);
}

/// Kills the distributor, and gives the same `up`.
fn after_the_distributor<'h>(up: Up<'h>, _: &App) -> Up<'h> {
    up.kill_distributor();
    up
}

#[test]
fn it_goes_on_whoever_is_killed_at_any_step() {
    type Death = for<'h> fn(Up<'h>, &App) -> Up<'h>;
    let deaths: [(&str, Death); 2] =
        [("distributor", after_the_distributor), ("monitor", |up, app| up.kill_and_start(app))];
    for (who, death) in deaths {
        let host = Host::new();
        let chosen = Chosen::of(&host, 2);
        let app = App { server: "drain_timeout = \"60s\"\n".into(), ..chosen.app.clone() };
        let mut up = host.up(&app);
        let mut held = client::hold(V4, 4);
        let (first, second) = (up.process("app/1"), up.process("app/2"));
        chosen.set_held(true);
        restart(&up, &["app", "--no-wait"]).expect_done();
        // While the successor starts.
        wait_instances(&up, &[("app/1", 1), ("app/1@2", 2), ("app/2", 1)]);
        let coming = wait_for("its process", seconds(10.0), || row(&up, "app/1@2").pid.map(Some));
        up = death(up, &app);
        wait_instances(&up, &[("app/1", 1), ("app/1@2", 2), ("app/2", 1)]);
        assert_eq!((row(&up, "app/1@2").pid, up.process("app/1")), (coming, first), "{who}");
        chosen.set_held(false);
        wait_instances(&up, &[("app/1", 2), ("app/1@1", 1), ("app/2", 1)]);
        // While the one before has connections.
        up = death(up, &app);
        wait_instances(&up, &[("app/1", 2), ("app/1@1", 1), ("app/2", 1)]);
        assert_eq!((row(&up, "app/1").pid, row(&up, "app/1@1").pid), (coming, Some(first.pid)), "{who}");
        assert_eq!(row(&up, "app/1@1").state, "draining", "{who}");
        assert!(held.iter_mut().all(Client::is_served), "{who}");
        let roll = up.service().roll.expect("it is known");
        assert_eq!((roll.state.as_str(), roll.servers[1].state.as_str()), ("under-way", "waiting"), "{who}");
        held.retain(|client| client.pid != first.pid);
        // It goes on with the next one by itself.
        wait_instances(&up, &[("app/1", 2), ("app/2", 2), ("app/2@1", 1)]);
        assert!(!first.runs() && second.runs(), "{who}");
        up = death(up, &app);
        assert!(held.iter_mut().all(Client::is_served), "{who}");
        drop(held.split_off(0));
        wait_instances(&up, &[("app/1", 2), ("app/2", 2)]);
        wait_until_eq("the restart", seconds(10.0), "done".to_owned(), || {
            up.service().roll.expect("one").state
        });
        up.wait_connections(&[0, 0]);
        assert_eq!(up.service().totals().iter().sum::<u64>(), 4, "{who}");
        up.stop();
    }
}

#[test]
fn nobody_notices_restarts_while_distributors_die_again_and_again() {
    let host = Host::new();
    let up = host.up(&App { waiting: Some(NOBODY_WAITS.to_owned()), ..App::of(&host, 3) });
    let (kills, served) = under_load(4, |_| {
        let mut kills = 0;
        for round in 0..4 {
            // Who asks is to be heard.
            up.wait_answering();
            thread::scope(|scope| {
                let restart = scope.spawn(|| restart(&up, &["app"]));
                // Not at the same moments each time.
                let mut pause = 20 + 13 * round;
                wait_for("the restart", seconds(20.0), || {
                    let roll = up.service().roll.filter(|roll| roll.state == "under-way");
                    (roll.is_some() || restart.is_finished()).then_some(())
                });
                while !restart.is_finished() {
                    thread::sleep(std::time::Duration::from_millis(pause % 130));
                    pause += 37;
                    up.distributor().signal(Signal::KILL);
                    kills += 1;
                    // Now and then the next one dies before it has taken over.
                    if kills % 4 != 0 {
                        up.wait_answering();
                    }
                }
                restart.join().expect("no panic").expect_done();
            });
        }
        kills
    });
    assert!(kills >= 8, "{kills} kills");
    up.wait_ready();
    up.wait_connections(&[0, 0, 0]);
    let service = up.service();
    assert_eq!(service.servers.len(), 3, "{service:#?}");
    wait_until_eq("instances with a cgroup", seconds(10.0), 3, || cgroups(&up));
    assert!(
        service.servers.iter().all(|server| server.instance >= 5 && server.restarts == 0),
        "{service:#?}"
    );
    // One that was moved from the queue of an instance that ended has been with two of them.
    let (total, moved) = (service.totals().iter().sum::<u64>(), service.outcome("moved"));
    assert!((served..=served + moved).contains(&total), "{total} in all, {served} served, {moved} moved");
    assert_eq!(service.outcomes(["refused_limit", "refused_capacity", "refused_no_room"]), [0; 3]);
}
