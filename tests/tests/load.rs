//! Weights follow load, and limits what servers say that they can serve.

#![forbid(unsafe_code)]

use std::{
    fs, io,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4, heavy},
    load::under_load_of,
    wait::{seconds, stays, wait_for, wait_until_eq},
};

/// The table that makes weights follow, as fast as they can.
fn following(source: &str, floor: u32) -> String {
    format!("[service.app.load]\nsources = [\"{source}\"]\nstrength = 10\nfloor = {floor}\n")
}

fn weights(up: &Up<'_>) -> Vec<u64> {
    up.service().servers.iter().map(|server| server.effective_weight).collect()
}

/// A connection to each of so many servers, by their numbers.
#[track_caller]
fn one_each(count: usize) -> Vec<Client> {
    let mut clients = client::hold(V4, count);
    clients.sort_by_key(|client| client.server.clone());
    let names: Vec<&str> = clients.iter().map(|client| client.server.as_str()).collect();
    let wanted: Vec<String> = (1..=count).map(|number| number.to_string()).collect();
    assert_eq!(names, wanted);
    clients
}

/// Has each server say these words.
#[track_caller]
fn have_say<const N: usize>(clients: &mut [Client], words: [&str; N]) {
    for (client, words) in clients.iter_mut().zip(words) {
        client.say(&format!("notify {words}")).expect("tell it");
    }
}

/// Waits until the weights are these, while each server says again and again how loaded it is.
#[track_caller]
fn wait_weights<const N: usize>(up: &Up<'_>, clients: &mut [Client], loads: [&str; N], wanted: [u64; N]) {
    let said = loads.map(|load| format!("X_LOAD={load}"));
    wait_until_eq("the weights", seconds(60.0), wanted.to_vec(), || {
        have_say(clients, said.each_ref().map(String::as_str));
        weights(up)
    });
}

#[test]
fn who_reports_more_load_than_the_others_gets_less_and_then_all_again() {
    let host = Host::new();
    let up = host.up(&App { service: following("reported", 25), ..App::of(&host, 3) });
    let mut clients = one_each(3);
    // All alike: nobody loses anything.
    stays("the weights", Duration::from_millis(4000), vec![100; 3], || {
        have_say(&mut clients, ["X_LOAD=0.95"; 3]);
        weights(&up)
    });
    wait_weights(&up, &mut clients, ["0.95", "0.1", "0.1"], [25, 100, 100]);
    let server = up.service().server("app/1").clone();
    let reason = server.reason.expect("a reason");
    assert!(reason.starts_with("more load than the others (reported): 25 % of its weight"), "{reason}");
    let load = server.load.expect("it has said it");
    assert_eq!((load.reported, load.percent), (Some(0.95), 25));
    assert!(load.since.is_some());
    // Nine connections more for the weights of 25, 100 and 100: one, four and four in all.
    let held = client::hold(V4, 6);
    let more = client::by_name(&held);
    assert_eq!(["1", "2", "3"].map(|name| more.get(name).copied().unwrap_or(0)), [0, 3, 3]);
    // The next distributor goes on with it.
    up.replace_distributor();
    assert!(weights(&up)[0] < 50, "{:?}", weights(&up));
    assert_eq!(up.service().server("app/1").load.as_ref().and_then(|load| load.reported), Some(0.95));
    wait_weights(&up, &mut clients, ["0.1", "0.1", "0.1"], [100; 3]);
    assert_eq!(up.service().server("app/1").reason, None);
    drop((held, clients));
    up.stop();
}

#[test]
fn every_policy_that_goes_by_weights_goes_by_those_that_follow_load() {
    let host = Host::new();
    for policy in ["least-connections", "weighted-round-robin", "power-of-two"] {
        let app = App { policy: Some(policy), service: following("reported", 50), ..App::of(&host, 2) };
        let up = host.up(&app);
        // By chance both may be one's.
        let mut clients = wait_for("a connection to each", seconds(20.0), || {
            let clients = client::hold(V4, 2);
            (client::by_name(&clients).len() == 2).then_some(clients)
        });
        clients.sort_by_key(|client| client.server.clone());
        wait_weights(&up, &mut clients, ["0.9", "0.1"], [50, 100]);
        let before = up.service().totals();
        let held = client::hold(V4, 30);
        let after = up.service().totals();
        let its = after[0] - before[0];
        assert!((8..=12).contains(&its), "{policy}: {its} of 30, not about a third");
        drop((held, clients));
        up.stop();
    }
}

#[test]
fn a_server_gets_no_more_than_it_says_that_it_can_serve() {
    let host = Host::new();
    let up = host.up(&App { limit: Some(4), ..App::of(&host, 1) });
    let [mut first, mut second] = [(); 2].map(|()| Client::open(V4).expect("connect"));
    let limits = || {
        let server = up.service().server("app/1").clone();
        (server.limit, server.effective_limit)
    };
    assert_eq!(limits(), (Some(4), Some(4)));
    first.say("notify X_CAPACITY=2").expect("tell it");
    wait_until_eq("the limits", seconds(10.0), (Some(4), Some(2)), limits);
    let server = up.service().server("app/1").clone();
    assert_eq!(server.reason.as_deref(), Some("says that it can serve 2 at once"));
    assert_eq!(server.load.and_then(|load| load.capacity), Some(2));
    let mut line = client::stand(&[V4], 2);
    wait_until_eq("those who wait", seconds(10.0), 2, || up.service().waiting.now);
    // What means nothing changes nothing, and is complained of once.
    for (wrong, right, reported) in
        [("X_CAPACITY=many", "0.5", 0.5), ("X_LOAD=1.5", "0.25", 0.25), ("X_CAPACITY=-1", "0.75", 0.75)]
    {
        first.say(&format!("notify {wrong}")).expect("tell it");
        // It hears one after the other, and what has come of this can be seen.
        second.say(&format!("notify X_LOAD={right}")).expect("tell it");
        wait_until_eq("its load", seconds(10.0), Some(reported), || {
            up.service().server("app/1").load.as_ref().and_then(|load| load.reported)
        });
    }
    assert_eq!(limits(), (Some(4), Some(2)));
    let log = up.log();
    assert_eq!(log.matches("says X_CAPACITY=many, which means nothing").count(), 1, "{log}");
    assert_eq!(log.matches("which means nothing").count(), 1, "{log}");
    // The next distributor keeps to it too.
    up.replace_distributor();
    assert_eq!(limits(), (Some(4), Some(2)));
    assert_eq!(up.service().waiting.now, 2);
    // More than was configured is as much as was configured.
    first.say("notify X_CAPACITY=1000").expect("tell it");
    wait_until_eq("those who wait", seconds(10.0), 0, || up.service().waiting.now);
    assert_eq!(limits(), (Some(4), Some(4)));
    line.extend(client::stand(&[V4], 1));
    wait_until_eq("those who wait", seconds(10.0), 1, || up.service().waiting.now);
    drop((line, first, second));
    up.wait_connections(&[0]);
    up.stop();
}

/// From before connect to the greeting, with who greeted.
fn timed(times: &Mutex<Vec<(String, Duration)>>) -> io::Result<()> {
    let start = Instant::now();
    let client = Client::open(V4)?;
    times.lock().expect("nobody panics with it").push((client.server, start.elapsed()));
    Ok(())
}

/// The time that a hundredth of these exceed.
fn p99(times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<f64> = times.map(|time| time.as_secs_f64()).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() * 99 / 100]
}

#[test]
fn a_slow_server_gets_what_it_can_accept_in_the_others_time_and_recovers() {
    let _alone = heavy();
    let host = Host::new();
    let app = App::with(&host, 0, &["--listen", "[::]:8080"]);
    let command = |pause: &str| {
        let mut command = app.command.clone();
        command.extend(["--pause".to_owned(), pause.to_owned()]);
        format!("command = {}", tests::app::list(&command))
    };
    let servers = [("a", "4"), ("b", "4"), ("c", "4"), ("slow", "40")];
    let servers = servers.map(|(name, pause)| (name, command(pause)));
    let up = host.up(&App { service: following("accept-queue", 5), ..app.named(servers) });
    let times = Mutex::new(Vec::new());
    under_load_of(
        48,
        || timed(&times),
        |load| {
            wait_for("the weight of the slow one", seconds(60.0), || (weights(&up)[3] <= 30).then_some(()));
            let reason = up.service().server("app/slow").reason.clone().unwrap_or_default();
            assert!(reason.starts_with("more load than the others (accept-queue)"), "{reason}");
            // Those that are under way were sent by other weights.
            load.serves(500);
            times.lock().expect("nobody panics with it").clear();
            load.serves(3000);
            let times = times.lock().expect("nobody panics with it").clone();
            let good = p99(times.iter().filter(|(name, _)| name != "slow").map(|(_, time)| *time));
            let all = p99(times.iter().map(|(_, time)| *time));
            // Where weights do not follow, each holds as many, and the slow one takes ten times as long for them.
            assert!(all < 4.0 * good, "of all it is {all:.3} s, of the good ones {good:.3} s");
            let [.., slow] =
                up.service().servers.try_into().map(|servers: [_; 4]| servers).expect("four servers");
            assert!(slow.load.and_then(|load| load.accept_seconds).is_some());
        },
    );
    wait_until_eq("the weights", seconds(90.0), vec![100; 4], || weights(&up));
    up.stop();
}

/// Has the kernel measure the pressure of a server's cgroup, or not (Linux 6.1).
fn set_pressure(cgroup: &Path, on: bool) {
    fs::write(cgroup.join("cgroup.pressure"), if on { "1" } else { "0" }).expect("write cgroup.pressure");
}

#[test]
fn a_server_that_waits_for_a_cpu_gets_less_and_without_psi_that_is_a_trouble() {
    let _alone = heavy();
    let host = Host::new();
    let app = App::of(&host, 0);
    // It is alone on its CPU with three that never sleep, and the others are not among them.
    let words: Vec<String> = app.command.iter().map(|word| format!("'{word}'")).collect();
    let burning = format!("for burner in 1 2 3; do (while :; do :; done) & done; exec {}", words.join(" "));
    let burning = ["/bin/sh", "-c", &burning.replace("{name}", "burning")].map(str::to_owned);
    let quiet = String::new();
    let lines = format!("command = {}\ncpus = \"0\"", tests::app::list(&burning));
    let servers = [("a", quiet.clone()), ("b", quiet), ("burning", lines)];
    let mut app = App { service: following("cpu-pressure", 20), ..app.named(servers) };
    app.server = "stop_timeout = \"1s\"".to_owned();
    let up = host.up(&app);
    let cgroup = up.cgroup().join("app/burning.1");
    assert!(cgroup.exists(), "{cgroup:?} is its cgroup");
    if !cgroup.join("cpu.pressure").exists() {
        up.wait_trouble(&["waits for a CPU cannot be read", "use a kernel with PSI"]);
        println!("skipped: this kernel has no PSI");
        return up.stop();
    }
    wait_for("the weight", seconds(90.0), || (weights(&up)[2] < 60).then_some(()));
    let server = up.service().server("app/burning").clone();
    assert!(
        server.reason.is_some_and(|reason| reason.starts_with("more load than the others (cpu-pressure)"))
    );
    assert!(server.load.and_then(|load| load.cpu_pressure).is_some_and(|pressure| pressure > 0.2));
    if cgroup.join("cgroup.pressure").exists() {
        set_pressure(&cgroup, false);
        up.wait_trouble(&["server app/burning waits for a CPU cannot be read", "write 1 to cgroup.pressure"]);
        set_pressure(&cgroup, true);
        up.wait_no_trouble();
    }
    up.stop();
}
