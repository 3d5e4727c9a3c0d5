//! What somebody removes under a running dist-ctl, or what is full, is made good again.

#![forbid(unsafe_code)]

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Resource, Rlimit, prlimit},
};
use tests::{
    app::App,
    client::{self, Client},
    command,
    host::{Host, Up, V4},
    leftover,
    load::under_load,
    process::Signal,
    wait::{seconds, stays, wait_for, wait_until_eq},
};

fn pins(up: &Up<'_>) -> PathBuf {
    let pins = leftover::pins(up.runtime()).expect("the instance has pins");
    let mut directories = fs::read_dir(pins).expect("list the pins").flatten();
    directories
        .find(|directory| directory.file_name().to_string_lossy().starts_with("app-v"))
        .expect("the service has pins")
        .path()
}

#[track_caller]
fn assert_all_counted(up: &Up<'_>, served: u64) {
    up.wait_connections(&[0; 3]);
    let service = up.service();
    let [directly, waited] = service.outcomes(["established", "established_waiting"]);
    assert_eq!(directly + waited, served, "{service:#?}");
    assert_eq!(service.outcomes(["closed", "move_failed"]), [served, 0]);
    assert_eq!(service.totals().iter().sum::<u64>(), served);
    assert!(service.servers.iter().all(|server| server.restarts == 0), "{service:#?}");
}

#[test]
fn pins_that_are_removed_under_load_are_made_again_and_nothing_is_lost() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let pins = pins(&up);
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(&pins).into_iter().flatten().flatten().map(|pin| pin.path()).collect();
        names.sort();
        names
    };
    let before = names();
    let ((), served) = under_load(4, |load| {
        // Who makes them again meanwhile would have their directory stay.
        let distributor = up.distributor();
        distributor.freeze(seconds(5.0));
        fs::remove_dir_all(&pins).expect("remove the pins");
        distributor.signal(Signal::CONT);
        wait_until_eq("the pins", seconds(10.0), before.clone(), names);
        wait_for("it to be said", seconds(10.0), || {
            up.log().contains("were gone and are there again").then_some(())
        });
        // Which has everything.
        up.replace_distributor();
        load.serves(100);
    });
    assert_all_counted(&up, served);
}

#[test]
fn a_bpffs_of_our_own_that_is_unmounted_is_mounted_again() {
    let host = Host::new();
    if leftover::has_bpffs() {
        eprintln!("left out: this machine has a bpffs at /sys/fs/bpf, so dist-ctl mounts none");
        return;
    }
    let up = host.up(&App::of(&host, 3));
    let pins = pins(&up);
    let ((), served) = under_load(4, |_| {
        unmount(up.runtime().join("bpf"), UnmountFlags::DETACH).expect("unmount the bpffs");
        wait_for("the pins", seconds(5.0), || pins.join("track_link").exists().then_some(()));
        wait_for("it to be said", seconds(5.0), || {
            up.log().contains("were gone and are there again").then_some(())
        });
        up.replace_distributor();
    });
    assert_all_counted(&up, served);
    up.stop();
}

/// Fills EVENTS, which has room for 4,096 records: listeners of a server come and go, three
/// records each.
const FILL: &str = "
import socket, sys
print('ready', flush=True)
sys.stdin.readline()
for _ in range(1500):
    listener = socket.socket(socket.AF_INET6)
    listener.bind(('::', 8080))
    listener.listen()
    listener.close()
print('full', flush=True)
";

/// A process in the cgroup of a server.
struct Stray {
    child: Child,
}

impl Stray {
    #[track_caller]
    fn in_cgroup_of(up: &Up<'_>, server: &str, script: &str) -> Self {
        use std::process::Stdio;
        let cgroup = leftover::cgroup_mount().expect("cgroup v2 is mounted");
        let cgroup = cgroup.join(up.process(server).cgroup().expect("a server is in a cgroup"));
        let mut command = Command::new("python3");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let child = command.spawn().expect("start python3");
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("move it into the cgroup");
        Self { child }
    }

    /// Lets it go, and waits for its end.
    #[track_caller]
    fn run(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("wait for it").success());
    }
}

#[test]
fn listeners_that_come_and_go_while_events_are_lost_are_found() {
    let host = Host::new();
    let file = host.path_text("listen-now");
    let listens = ["--listen", "[::]:8080"];
    let late = App::with(&host, 0, &[&listens[..], &["--listen-when", &file]].concat());
    let closes = App::with(&host, 0, &[&listens[..], &["--closable"]].concat());
    let command = |app: &App| format!("command = {}", tests::app::list(&app.command));
    let app = App::of(&host, 0).named([
        ("late", command(&late)),
        ("closes", command(&closes)),
        ("plain", String::new()),
    ]);
    let up = host.start(&app);
    for server in ["app/closes", "app/plain"] {
        up.wait_state(server, "ready");
    }
    up.wait_state("app/late", "starting");
    let stray = Stray::in_cgroup_of(&up, "app/plain", FILL);
    let (closing, distributor) = (up.process("app/closes"), up.distributor());
    distributor.freeze(seconds(5.0));
    stray.run();
    // Of neither there is room to tell.
    fs::write(&file, "").expect("let it listen");
    closing.signal(Signal::USR1);
    stays("the distributor", seconds(0.3), true, || distributor.runs());
    distributor.signal(Signal::CONT);
    up.wait_answering();
    assert!(up.service().outcome("event_lost") > 0, "EVENTS was not full");
    up.wait_state("app/late", "ready");
    wait_for("the closed listener to be noticed", seconds(10.0), || {
        (up.service().server("app/closes").state != "ready").then_some(())
    });
    let held = client::hold(V4, 10);
    let by_name = client::by_name(&held);
    assert!(
        by_name.get("late").copied() == Some(5) && by_name.get("plain").copied() == Some(5),
        "{by_name:?}"
    );
}

#[test]
fn without_descriptors_it_says_so_at_the_start_and_leaves_nothing() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    for (limit, words) in [(16, "LimitNOFILE="), (30, "LimitNOFILE="), (40, "LimitNOFILE=")] {
        let plain = host.command(&["up", "-f", &file]);
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}:{limit}")).arg(plain.get_program()).args(plain.get_args());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command::run(&mut command, seconds(20.0)).expect_refusal(1, &[words]);
        assert_eq!(leftover::of_instance(&host.runtime("main")), [], "with {limit} descriptors");
    }
}

#[test]
fn a_distributor_without_descriptors_changes_nothing_and_the_next_one_goes_on() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let monitor = Pid::from_raw(up.monitor().pid);
    let (_, hard) = up.monitor().limit("Max open files");
    let hard = hard.parse().ok();
    let few = Rlimit { current: Some(24), maximum: hard };
    let ((), served) = under_load(4, |_| {
        let old = up.distributor();
        let before = prlimit(monitor, Resource::Nofile, few).expect("take descriptors from the monitor");
        old.kill(seconds(5.0));
        wait_for("a distributor to fail", seconds(10.0), || up.log().contains("LimitNOFILE").then_some(()));
        let held = client::hold(V4, 30);
        let by_name = client::by_name(&held);
        assert!(by_name.len() == 3, "the kernel goes on steering: {by_name:?}");
        drop(held);
        prlimit(monitor, Resource::Nofile, before).expect("give them back");
        wait_for("the next one", seconds(30.0), || {
            (up.run(&["status", "--json"]).code == Some(0)).then_some(())
        });
        up.wait_ready();
    });
    assert_all_counted(&up, served + 30);
    assert!(Path::new(&pins(&up)).exists());
}

#[test]
fn pins_that_are_removed_together_with_the_distributor_cost_no_server_and_no_client() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let pins = pins(&up);
    let servers = ["app/1", "app/2", "app/3"].map(|server| up.process(server));
    let mut held = client::hold(V4, 6);
    let old = up.distributor();
    // So that it cannot mend them.
    old.freeze(seconds(5.0));
    fs::remove_dir_all(&pins).expect("remove the pins");
    old.kill(seconds(5.0));
    up.wait_next_distributor(old);
    // The counts began anew, so only those from now on are level.
    assert_eq!(client::by_process(&client::hold(V4, 30)).into_values().collect::<Vec<_>>(), [10, 10, 10]);
    assert_eq!(["app/1", "app/2", "app/3"].map(|server| up.process(server)), servers);
    assert!(held.iter_mut().all(Client::is_served));
    assert!(up.service().servers.iter().all(|server| server.restarts == 0));
}

#[test]
fn a_runtime_directory_that_is_removed_is_made_again_and_lets_no_second_one_in() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    let file = host.path_text("dist-ctl.toml");
    let servers = ["app/1", "app/2"].map(|server| up.process(server));
    under_load(4, |load| {
        up.distributor().freeze(seconds(5.0));
        for entry in fs::read_dir(up.runtime()).expect("list the runtime directory").flatten() {
            // What is mounted there stays.
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        host.run(&["up", "-f", &file]).expect_refusal(1, &["another dist-ctl", "removed its files"]);
        up.distributor().signal(Signal::CONT);
        wait_for("its files", seconds(10.0), || {
            ["lock", "control.sock", "record.json", "notify"]
                .iter()
                .all(|name| up.runtime().join(name).exists())
                .then_some(())
        });
        up.wait_ready();
        let monitor = up.monitor().pid.to_string();
        host.run(&["up", "-f", &file]).expect_refusal(1, &["another dist-ctl", &monitor]);
        up.replace_distributor();
        // Its lock file alone; and what stands in the socket's place.
        for name in ["lock", "control.sock"] {
            let distributor = up.distributor();
            distributor.freeze(seconds(5.0));
            fs::remove_file(up.runtime().join(name)).expect("remove it");
            if name == "lock" {
                host.run(&["up", "-f", &file]).expect_refusal(1, &["another dist-ctl", "removed its files"]);
                fs::write(up.runtime().join("lock"), "").expect("write it");
                fs::remove_file(up.runtime().join("lock")).expect("remove it");
            } else {
                fs::write(up.runtime().join(name), "").expect("write a file");
            }
            distributor.signal(Signal::CONT);
            wait_for("it to be made again", seconds(10.0), || {
                let lock = fs::read_to_string(up.runtime().join("lock")).unwrap_or_default();
                (lock.starts_with(&monitor) && up.run(&["status"]).code == Some(0)).then_some(())
            });
            assert_eq!(up.distributor(), distributor, "it was left alone");
        }
        // Nor is anything of it ended by a command that does not find it.
        let distributor = up.distributor();
        distributor.freeze(seconds(5.0));
        for name in ["lock", "control.sock"] {
            fs::remove_file(up.runtime().join(name)).expect("remove it");
        }
        host.run(&["down"]).expect_refusal(1, &["another dist-ctl", "stop it then with dist-ctl down"]);
        distributor.signal(Signal::CONT);
        wait_for("it to be reachable", seconds(10.0), || (up.run(&["status"]).code == Some(0)).then_some(()));
        load.serves(100);
    });
    assert_eq!(["app/1", "app/2"].map(|server| up.process(server)), servers);
    up.stop();
}

#[test]
fn who_waited_when_the_pins_were_lost_takes_no_place_for_ever() {
    let host = Host::new();
    let up = host.up(&App { limit: Some(2), ..App::of(&host, 2) });
    let pins = pins(&up);
    let served = client::hold(V4, 4);
    let waiting = client::stand(&[V4], 6);
    wait_until_eq("waiting", seconds(5.0), 6, || up.service().waiting.now);
    let old = up.distributor();
    old.freeze(seconds(5.0));
    fs::remove_dir_all(&pins).expect("remove the pins");
    old.kill(seconds(5.0));
    up.wait_next_distributor(old);
    drop(served);
    drop(waiting);
    // Within some seconds, and not when the counts are compared.
    wait_for("all places", seconds(5.0), || {
        let held: Vec<_> = (0..4).map_while(|_| Client::open(V4).ok()).collect();
        (client::by_process(&held).into_values().collect::<Vec<_>>() == [2, 2]).then_some(())
    });
}
