//! `dist-ctl upgrade`: another program takes over under load, or does not, and says why.

#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use tests::{
    app::App,
    client::{self, Client},
    command,
    host::{Host, Up, V4, program},
    load::{under_load, under_load_of},
    process::Process,
    wait::{seconds, try_for, wait_for, wait_until_eq},
};

/// A copy of the program under test: another file, so another program.
fn copy(host: &Host, name: &str) -> PathBuf {
    let copy = host.path(name);
    // By a process of its own, or another test's child might have it open for writing.
    command::run(Command::new("cp").arg(program()).arg(&copy), seconds(20.0)).expect_done();
    copy
}

fn runs(process: Process) -> PathBuf {
    process.program().expect("it runs")
}

fn servers(up: &Up<'_>, count: usize) -> Vec<Process> {
    (1..=count).map(|number| up.process(&format!("app/{number}"))).collect()
}

#[test]
fn an_upgrade_under_load_fails_no_connection_and_keeps_all() {
    let host = Host::new();
    let app = App { limit: Some(20), ..App::of(&host, 4) };
    let up = host.up(&app);
    let before = servers(&up, 4);
    let first = up.distributor();
    let programs = [copy(&host, "next"), copy(&host, "next-but-one")];
    // With 20 more than that there is no place for some, who wait.
    let mut held = client::hold(V4, 70);
    let client = || match Client::open(V4)?.is_served() {
        true => Ok(()),
        false => Err(io::Error::other("a client was greeted and then lost")),
    };
    let ((), served) = under_load_of(20, client, |load| {
        let mut last = first;
        for program in &programs {
            let ended = up.run(&["upgrade", "--binary", program.to_str().expect("a text")]).expect_done();
            let said = format!("{}; servers and connections were kept\n", program.display());
            assert!(ended.stdout.ends_with(&said), "{ended}");
            let now = up.distributor();
            assert_ne!(now, last);
            assert_eq!(&runs(now), program);
            last = now;
            load.serves(100);
        }
    });
    assert!(held.iter_mut().all(Client::is_served));
    assert_eq!(servers(&up, 4), before, "a server was started again");
    wait_until_eq("the connections that are held", seconds(10.0), 70, || up.connections().iter().sum());
    let service = up.service();
    assert!(service.servers.iter().all(|server| server.restarts == 0), "{service:#?}");
    let [directly, waited] = service.outcomes(["established", "established_waiting"]);
    assert_eq!(directly + waited, 70 + served, "the counts go on");
    assert!(waited > 0, "nobody had to wait");
    let [refused, timed_out] = [service.waiting.refused, service.waiting.timed_out];
    assert_eq!((refused, timed_out), (0, 0));

    // The one after a dead one is the new program as well.
    up.replace_distributor();
    assert_eq!(runs(up.distributor()), programs[1]);
    drop(held);
    up.wait_connections(&[0; 4]);
}

#[test]
fn what_is_no_dist_ctl_is_refused_and_changes_nothing() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let (distributor, build) = (up.distributor(), up.status().build);
    let plain = host.write("plain", "");
    let script = host.write("script", "#!/bin/sh\nexit 0\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("make it executable");
    let whole = copy(&host, "whole");
    let truncated = host.path_text("truncated");
    let cut = format!("head -c 300000 {} > {truncated} && chmod 755 {truncated}", whole.display());
    command::run(Command::new("sh").args(["-c", &cut]), seconds(20.0)).expect_done();
    let impostor = copy_of(&host, Path::new("/bin/false"), "false");
    for (file, words) in [
        ("/does/not/exist", &["/does/not/exist: No such file"][..]),
        (&plain, &["it is not an executable file"]),
        ("/tmp", &["it is not an executable file"]),
        (&script, &["it is not a dist-ctl that can take over"]),
        (&impostor, &["it is not a dist-ctl that can take over", "exit status: 1"]),
        ("/usr/bin/yes", &["it is not a dist-ctl that can take over"]),
        (&truncated, &["upgrade to "]),
    ] {
        up.run(&["upgrade", "--binary", file]).expect_refusal(2, words);
    }
    assert_eq!(up.distributor(), distributor);
    let status = up.status();
    assert_eq!((status.build, status.not_upgraded), (build, None));
}

fn copy_of(host: &Host, program: &Path, name: &str) -> String {
    let copy = host.path_text(name);
    command::run(Command::new("cp").arg(program).arg(&copy), seconds(20.0)).expect_done();
    copy
}

#[test]
fn a_program_that_fails_its_trial_says_why_and_changes_nothing() {
    let host = Host::new();
    let app = App::of(&host, 1);
    let up = host.up(&app);
    let distributor = up.distributor();
    // The configuration has become one that no distributor could start with.
    host.write("dist-ctl.toml", &app.toml().replace("count = 1", "count = 1000"));
    let next = copy(&host, "next");
    up.run(&["upgrade", "--binary", next.to_str().expect("a text")])
        .expect_refusal(1, &["on trial it said: ", "service.app.server.count", "1000"]);
    assert_eq!(up.distributor(), distributor);
    host.write("dist-ctl.toml", &app.toml());
    up.run(&["upgrade", "--binary", next.to_str().expect("a text")]).expect_done();
    assert_eq!(runs(up.distributor()), next);
}

#[test]
fn a_program_that_cannot_start_after_all_is_taken_back_and_the_one_before_says_why() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_TEST_REAL", program());
    let up = host.start_command(command);
    up.wait_ready();
    let before = servers(&up, 2);
    let own = runs(up.distributor());
    let mut held = client::hold(V4, 10);
    let impostor = copy_of(&host, Path::new(&host.impostor()), "impostor");
    let (ended, _) = under_load(4, |_| up.run(&["upgrade", "--binary", &impostor]));
    ended.expect_refusal(1, &["exited with 1 before it was ready", "the one before goes on"]);
    assert_eq!(runs(up.distributor()), own);
    let why = up.status().not_upgraded.expect("it says why");
    assert!(why.contains("exited with 1 before it was ready"), "{why}");
    let log = up.log();
    for line in ["impostor: this does not work after all", "the program before goes on", "not upgraded: "] {
        assert!(log.contains(line), "expected {line:?} in the log: {log}");
    }
    assert!(held.iter_mut().all(Client::is_served));
    assert_eq!(servers(&up, 2), before);

    let next = copy(&host, "next");
    up.run(&["upgrade", "--binary", next.to_str().expect("a text")]).expect_done();
    assert_eq!(runs(up.distributor()), next);
    assert_eq!(up.status().not_upgraded, None);
    assert_eq!(servers(&up, 2), before);
    drop(held);
}

#[test]
fn an_upgrade_to_the_program_that_runs_changes_nothing() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let distributor = up.distributor();
    let ended = up.run(&["upgrade"]).expect_done();
    assert!(ended.stdout.ends_with(" already\n"), "{ended}");
    assert_eq!(up.distributor(), distributor);
    assert!(try_for(seconds(0.2), || (up.distributor() != distributor).then_some(())).is_none());
}

#[test]
fn nothing_is_upgraded_where_nothing_runs() {
    let host = Host::new();
    host.run(&["upgrade"]).expect_refusal(1, &["no dist-ctl runs on"]);
}

#[test]
fn a_distributor_that_is_killed_during_a_trial_is_told_and_what_runs_goes_on() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_TEST_REAL", "hang");
    let up = host.start_command(command);
    up.wait_ready();
    let (before, distributor) = (servers(&up, 2), up.distributor());
    assert_eq!(up.status().pid, distributor.pid);
    let impostor = copy_of(&host, Path::new(&host.impostor()), "impostor");
    let ended = thread::scope(|scope| {
        let asked = scope.spawn(|| up.run(&["upgrade", "--binary", &impostor]));
        let on_trial =
            || distributor.children().into_iter().find(|it| it.arguments().contains(&"trial".into()));
        let trial = wait_for("the trial", seconds(10.0), on_trial);
        distributor.kill(seconds(5.0));
        // It is nobody's any more.
        trial.kill(seconds(5.0));
        asked.join().expect("it is answered")
    });
    let pid = format!("pid {}", distributor.pid);
    ended.expect_refusal(1, &[&pid, "ended before it had tried the program", "try again"]);
    assert_eq!(servers(&up, 2), before);
}
