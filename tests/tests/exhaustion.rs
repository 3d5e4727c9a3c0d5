//! What the machine runs out of: dist-ctl goes on, says so, and is well again when there is more.

#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use rustix::{
    mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, mount_remount, unmount},
    process::{Pid, Resource, Rlimit, getrlimit, prlimit},
};
use tests::{
    app::App,
    client::{self, Client},
    command,
    host::{Host, Up, V4},
    leftover, load,
    process::{self, Process},
    status::Trouble,
    wait::{seconds, stays, try_for, wait_for, wait_until_eq},
};

/// A disk that is soon full.
struct Disk {
    place: PathBuf,
}

impl Disk {
    #[track_caller]
    fn new(host: &Host, size: &str) -> Self {
        let place = host.path("disk");
        fs::create_dir(&place).expect("make the disk's directory");
        let options = std::ffi::CString::new(size).expect("options without a zero");
        mount("tmpfs", &place, "tmpfs", MountFlags::empty(), Some(options.as_c_str())).expect("mount a disk");
        Self { place }
    }

    /// A path on it.
    fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Takes all the space that is left.
    #[track_caller]
    fn fill(&self) {
        let mut filler = File::create(self.path("filler")).expect("make a file");
        let full = loop {
            if let Err(error) = filler.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    /// Takes all the files that there may be.
    #[track_caller]
    fn fill_with_files(&self) {
        fs::create_dir(self.path("filler")).expect("make a directory");
        let mut files = (0..).map(|number| File::create(self.path(&format!("filler/{number}"))));
        let full = files.find_map(Result::err).expect("one cannot be made");
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    #[track_caller]
    fn free(&self) {
        let filler = self.path("filler");
        let removed = if filler.is_dir() { fs::remove_dir_all(filler) } else { fs::remove_file(filler) };
        removed.expect("free the disk");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whatever a failed test has left open on it.
        if let Err(error) = unmount(&self.place, UnmountFlags::DETACH) {
            eprintln!("unmount {}: {error}", self.place.display());
        }
    }
}

/// Servers and kernel go on, whoever else is not there. Clients that come and go make a server look busy
/// that is slow to close, so not each look finds all three of them.
#[track_caller]
fn wait_all_serve() {
    wait_for("servers and kernel go on", seconds(10.0), || {
        (client::by_process(&client::hold(V4, 9)).len() == 3).then_some(())
    });
}

/// Clients come and go while `work` is done, which kills one server; every one must be served. Only
/// who was accepted by that server and not greeted yet is lost with it, and sees the end, or a reset if
/// his handshake ended in the moment in which the listener did: one in each thread at most. Who is
/// refused was lost by us.
fn under_load(work: impl FnOnce()) {
    const THREADS: usize = 2;
    let lost = AtomicUsize::new(0);
    let client = || match Client::open(V4) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
                && lost.fetch_add(1, Ordering::Relaxed) < THREADS =>
        {
            Ok(())
        }
        opened => opened.map(drop),
    };
    load::under_load_of(THREADS, client, |load| {
        work();
        load.serves(100);
    });
}

/// Kills a server, and waits for its next instance.
#[track_caller]
fn replace_server(up: &Up<'_>, server: &str) {
    let old = up.process(server);
    old.kill(seconds(5.0));
    wait_for("the next instance", seconds(10.0), || up.process_if_any(server).filter(|next| *next != old));
    up.wait_ready();
}

/// How often one of its lines says this.
fn said(up: &Up<'_>, words: &str) -> usize {
    up.log().lines().filter(|line| line.contains(words)).count()
}

// -- Nobody can read what it says

/// Servers and distributors die, and it is stopped, while nothing can be printed or logged.
#[track_caller]
fn goes_on_unheard(up: Up<'_>) {
    up.wait_answering();
    up.wait_ready();
    let held = client::hold(V4, 6);
    replace_server(&up, "app/1");
    up.replace_distributor();
    replace_server(&up, "app/2");
    drop(held);
    up.wait_connections(&[0; 3]);
    assert_eq!(client::by_process(&client::hold(V4, 3)).len(), 3);
    up.wait_connections(&[0; 3]);
    assert_eq!(up.status().troubles.len(), 0);
    up.run(&["down"]).expect_done();
    assert!(up.has_stopped().success());
}

#[test]
fn a_full_disk_for_log_and_output_stops_nothing() {
    let host = Host::new();
    let disk = Disk::new(&host, "size=64k");
    disk.fill();
    let file = host.write("dist-ctl.toml", &App::of(&host, 3).toml());
    let log = disk.path("log");
    let open = || Stdio::from(File::options().append(true).create(true).open(&log).expect("make the log"));
    let up = host.launch_with(host.command(&["up", "-f", &file]), open(), open());
    goes_on_unheard(up);
    assert_eq!(fs::metadata(&log).expect("the log is there").len(), 0, "nothing could be written");
}

#[test]
fn a_log_and_an_output_that_nobody_reads_stop_nothing() {
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 3).toml());
    let closed = || {
        let (_, write) = io::pipe().expect("make a pipe");
        Stdio::from(write)
    };
    goes_on_unheard(host.launch_with(host.command(&["up", "-f", &file]), closed(), closed()));
}

#[test]
fn a_failure_that_nobody_can_read_still_exits_with_its_code() {
    let host = Host::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").expect("open /dev/full"));
    let file = host.write("dist-ctl.toml", "[service.app]\nlisten = 1\n");
    for (words, code) in
        [(&["check", &file][..], 2), (&["up", "-f", &file], 2), (&["status"], 1), (&["keep", "/"], 1)]
    {
        let mut command = host.command(words);
        let status = command.stdin(Stdio::null()).stdout(full()).stderr(full()).status().expect("run it");
        assert_eq!(status.code(), Some(code), "{words:?}");
    }
    // What was asked for and cannot be written is a failure too, and no panic.
    let good = host.write("good.toml", &App::of(&host, 1).toml());
    let mut command = host.command(&["check", &good]);
    let output = command.stdout(full()).output().expect("run it");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("write to standard output: No space left on device"), "{told}");
}

// -- The disk of the runtime directory

/// Brings the service up with its runtime directory there.
fn up_on<'h>(host: &'h Host, disk: &Disk, app: &App) -> Up<'h> {
    let file = host.write("dist-ctl.toml", &app.toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_RUNTIME_DIR", disk.path("runtime"));
    let up = host.start_command(command);
    up.wait_ready();
    up
}

/// Kills the monitor and its distributor, neither of which can do anything about it.
fn kill_both(up: Up<'_>) {
    let (monitor, distributor) = (up.monitor(), up.distributor());
    monitor.freeze(seconds(5.0));
    distributor.kill(seconds(5.0));
    monitor.kill(seconds(5.0));
    up.forget();
}

#[test]
fn on_a_full_disk_it_goes_on_says_so_and_has_its_record_again_when_there_is_room() {
    let host = Host::new();
    let disk = Disk::new(&host, "size=256k");
    let app = App::of(&host, 3);
    let up = up_on(&host, &disk, &app);
    disk.fill();
    let record = || fs::read_to_string(up.runtime().join("record.json")).expect("a record is there");
    let before = record();
    under_load(|| {
        replace_server(&up, "app/1");
        let words = ["the record is not written", "No space left on device", "free some space"];
        up.wait_trouble(&words);
        let table = up.run(&["status"]).expect_done().stdout;
        let line = table.lines().last().expect("it says something");
        assert!(line.starts_with("! since ") && line.contains(words[0]), "{table}");
        assert_eq!(record(), before, "the older one stays");
        // The next one needs its locks, its sockets, and what the monitor knows.
        up.replace_distributor();
        assert_eq!(up.service().server("app/1").restarts, 1);
        up.run(&["weight", "app/2", "50"]).expect_done();
        up.wait_trouble(&words);
        disk.free();
        up.wait_no_trouble();
    });
    // Once by each distributor.
    assert_eq!(said(&up, "warning: the record is not written"), 2, "{}", up.log());
    assert_eq!(said(&up, "over after"), 1, "{}", up.log());
    let servers = ["app/1", "app/2", "app/3"].map(|server| up.process(server));
    kill_both(up);
    let up = up_on(&host, &disk, &app);
    assert_eq!(["app/1", "app/2", "app/3"].map(|server| up.process(server)), servers);
    assert_eq!(up.service().server("app/1").restarts, 1, "what was recorded last is known");
    assert!(up.log().contains("was found running"), "{}", up.log());
    up.stop();
}

#[test]
fn what_runs_is_adopted_also_when_the_disk_is_full() {
    let host = Host::new();
    let disk = Disk::new(&host, "size=256k");
    let app = App::of(&host, 2);
    let up = up_on(&host, &disk, &app);
    let servers = ["app/1", "app/2"].map(|server| up.process(server));
    disk.fill();
    kill_both(up);
    let up = up_on(&host, &disk, &app);
    assert_eq!(["app/1", "app/2"].map(|server| up.process(server)), servers);
    replace_server(&up, "app/2");
    up.run(&["down"]).expect_done();
    assert!(up.has_stopped().success());
}

#[test]
fn a_server_that_ended_while_the_disk_was_full_is_not_taken_for_running() {
    let host = Host::new();
    let disk = Disk::new(&host, "size=256k");
    let mut app = App::of(&host, 2);
    app.server = "restart = { delay = \"5s\", max_delay = \"5s\" }".to_owned();
    let up = up_on(&host, &disk, &app);
    disk.fill();
    // The second time it waits, and nothing of it runs.
    replace_server(&up, "app/1");
    up.process("app/1").kill(seconds(5.0));
    up.wait_state("app/1", "backoff");
    up.replace_distributor();
    assert_eq!(up.service().server("app/1").restarts, 2);
    up.run(&["down"]).expect_done();
    assert!(up.has_stopped().success());
}

/// The processes of the servers, however they are called.
fn server_processes(up: &Up<'_>) -> Vec<Process> {
    let mut processes = process::in_cgroup(&up.cgroup().join("app"));
    let rooms = process::in_cgroup(&up.cgroup().join("app/rooms"));
    processes.retain(|process| !rooms.contains(process) && process.runs());
    processes
}

#[test]
fn without_a_control_socket_it_goes_on_and_has_one_again_when_there_is_room() {
    let host = Host::new();
    let disk = Disk::new(&host, "size=1m,nr_inodes=40");
    let up = up_on(&host, &disk, &App::of(&host, 2));
    let old = up.distributor();
    disk.fill_with_files();
    under_load(|| {
        old.kill(seconds(5.0));
        wait_for("that it cannot be asked", seconds(10.0), || {
            up.log().contains("nobody can ask anything").then_some(())
        });
        // It does its work all the same.
        let before = server_processes(&up);
        assert_eq!(before.len(), 2);
        before[0].kill(seconds(5.0));
        wait_for("the next instance", seconds(10.0), || {
            let now = server_processes(&up);
            (now.len() == 2 && !now.contains(&before[0])).then_some(())
        });
        disk.free();
        up.wait_answering();
        up.wait_ready();
        up.wait_no_trouble();
    });
    assert_eq!(said(&up, "nobody can ask anything"), 2, "when it began, and when it ended: {}", up.log());
    assert_eq!(said(&up, "over after"), 2, "{}", up.log());
}

/// A directory that is read-only, as after a remount; what is open there stays as it is.
struct ReadOnly(PathBuf);

impl ReadOnly {
    #[track_caller]
    fn make(directory: &Path) -> Self {
        mount_bind_recursive(directory, directory).expect("mount it over itself");
        let made = Self(directory.to_owned());
        mount_remount(directory, MountFlags::BIND | MountFlags::RDONLY, "").expect("make it read-only");
        let failed = File::create(directory.join("nothing")).expect_err("it is read-only");
        assert_eq!(failed.kind(), io::ErrorKind::ReadOnlyFilesystem);
        made
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("unmount {}: {error}", self.0.display());
        }
    }
}

#[test]
fn on_a_disk_that_has_become_read_only_it_goes_on_and_is_well_again_when_that_is_mended() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    under_load(|| {
        let read_only = ReadOnly::make(up.runtime());
        replace_server(&up, "app/1");
        up.wait_trouble(&["the record is not written", "Read-only file system", "remount"]);
        // The next one cannot have the lock, and without it does nothing.
        up.distributor().kill(seconds(5.0));
        wait_for("one that says why", seconds(10.0), || {
            up.log().contains("runtime-main/distributor: Read-only file system").then_some(())
        });
        wait_all_serve();
        drop(read_only);
        up.wait_answering();
        up.wait_ready();
        up.wait_no_trouble();
    });
    assert_eq!(up.service().server("app/1").restarts, 1);
    let record = fs::read_to_string(up.runtime().join("record.json")).expect("a record is there");
    let pid = up.process("app/1").pid;
    assert!(record.contains(&format!("\"pid\":{pid}")), "{record}");
    up.stop();
}

// -- Descriptors

/// From here on it can open nothing.
#[track_caller]
fn take_descriptors(process: Process) {
    // What is open for a moment does not count: all below the limit are taken for good.
    let free = (0..40).map(|_| {
        thread::sleep(Duration::from_millis(10));
        let open = process.descriptors();
        (0..).find(|number| !open.contains_key(number)).expect("one of them is free")
    });
    limit_descriptors(process, free.min().map(|free| free as u64));
}

/// The same for a distributor, which says so. Some that it had may have become free since.
#[track_caller]
fn starve(up: &Up<'_>) -> Trouble {
    wait_for("it to say that it can open nothing", seconds(30.0), || {
        take_descriptors(up.distributor());
        try_for(seconds(2.5), || {
            let troubles = up.status().troubles;
            troubles.into_iter().find(|trouble| trouble.what.contains("open a file: Too many open files"))
        })
    })
}

#[track_caller]
fn give_descriptors_back(process: Process) {
    limit_descriptors(process, getrlimit(Resource::Nofile).maximum);
}

#[track_caller]
fn limit_descriptors(process: Process, current: Option<u64>) {
    let limit = Rlimit { current, ..getrlimit(Resource::Nofile) };
    prlimit(Pid::from_raw(process.pid), Resource::Nofile, limit).expect("change its limit of open files");
}

/// A server cannot be started again, and the others serve all; then it can.
#[track_caller]
fn lacks(up: &Up<'_>, server: &str, words: &[&str], more: impl FnOnce()) {
    let distributor = up.distributor();
    let restarts = up.service().server(server).restarts;
    up.process(server).kill(seconds(5.0));
    let name = format!("server {server} could not be started");
    let words: Vec<&str> = [name.as_str()].into_iter().chain(words.iter().copied()).collect();
    let begun = up.wait_trouble(&words);
    let waiting = up.wait_state(server, "backoff");
    assert!(waiting.reason.expect("a reason").contains("next start in"));
    // More often than would be forgiven if it was the server's fault.
    stays("the state", Duration::from_millis(2500), false, || {
        let state = up.service().server(server).state.clone();
        state == "ready" || state == "failed"
    });
    assert_eq!(up.wait_trouble(&words).since, begun.since, "since when is not since the last try");
    more();
    up.wait_ready();
    up.wait_no_trouble();
    assert_eq!(up.service().server(server).restarts, restarts + 1, "however often it was tried");
    assert_eq!(up.distributor(), distributor, "the distributor lives");
}

#[test]
fn without_descriptors_the_distributor_answers_and_starts_servers_again_when_it_has_some() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let distributor = up.distributor();
    under_load(|| {
        let trouble = starve(&up);
        let words = ["LimitNOFILE=", "until there are more"];
        assert!(words.iter().all(|word| trouble.what.contains(word)), "{trouble:?}");
        lacks(&up, "app/2", &["make a socket for the launcher", "Too many open files"], || {
            // One operator at a time can ask and change, also now.
            up.run(&["weight", "app/1", "50"]).expect_done();
            give_descriptors_back(distributor);
        });
    });
    assert_eq!(said(&up, "warning: open a file"), 1, "{}", up.log());
    up.wait_connections(&[0; 3]);
    assert_eq!(up.service().outcomes(["move_failed", "refused_no_room"]), [0, 0]);
}

#[test]
fn clients_that_hold_all_descriptors_of_the_control_socket_do_not_spin_it_nor_end_it() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 1));
    let distributor = up.distributor();
    starve(&up);
    // The spare one is taken, and a queue waits.
    let clients: Vec<_> = (0..5)
        .map(|_| std::os::unix::net::UnixStream::connect(up.control_socket()).expect("it listens"))
        .collect();
    let before = cpu_time(distributor);
    thread::sleep(seconds(2.0));
    let used = cpu_time(distributor) - before;
    assert!(used < seconds(0.5), "{used:?} of CPU time in {:?}", seconds(2.0));
    drop(clients);
    up.status();
    assert!(said(&up, "accept a control client") <= 1, "{}", up.log());
    give_descriptors_back(distributor);
    up.wait_no_trouble();
}

fn cpu_time(process: Process) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).expect("it runs");
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|it| it.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_monitor_without_descriptors_starts_servers_and_distributors_when_it_has_some() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    under_load(|| {
        take_descriptors(up.monitor());
        // It cannot, or its launcher cannot even load its libraries.
        lacks(&up, "app/3", &["start "], || {
            give_descriptors_back(up.monitor());
        });
        take_descriptors(up.monitor());
        up.distributor().kill(seconds(5.0));
        wait_for("it to say why there is none", seconds(10.0), || {
            (said(&up, "start the distributor: Too many open files") > 3).then_some(())
        });
        wait_all_serve();
        give_descriptors_back(up.monitor());
        up.wait_answering();
        up.wait_ready();
    });
    up.stop();
}

// -- Processes

/// A cgroup with a limit of processes.
struct FewProcesses {
    directory: PathBuf,
    /// Where the controller was switched on for this.
    switched_on: Option<PathBuf>,
}

impl FewProcesses {
    /// `None` where there is no pids controller.
    fn new(host: &Host) -> Option<Self> {
        let name = leftover::instance_name(&host.runtime("pids"));
        let v1 = Path::new("/sys/fs/cgroup/pids");
        let mut switched_on = None;
        let parent = if v1.join("cgroup.procs").exists() {
            v1.to_owned()
        } else {
            let root = leftover::cgroup_mount()?;
            let has = |file: &str| {
                let text = fs::read_to_string(root.join(file)).unwrap_or_default();
                text.split_whitespace().any(|word| word == "pids")
            };
            if !has("cgroup.controllers") {
                return None;
            }
            let control = root.join("cgroup.subtree_control");
            if !has("cgroup.subtree_control") {
                fs::write(&control, "+pids").expect("switch the pids controller on");
                switched_on = Some(control);
            }
            root
        };
        let directory = parent.join(name);
        fs::create_dir(&directory).expect("make a cgroup");
        Some(Self { directory, switched_on })
    }

    #[track_caller]
    fn admit(&self, process: Process) {
        fs::write(self.directory.join("cgroup.procs"), process.pid.to_string()).expect("move a process");
    }

    fn processes(&self) -> usize {
        let processes =
            fs::read_to_string(self.directory.join("cgroup.procs")).expect("look into the cgroup");
        processes.lines().count()
    }

    #[track_caller]
    fn limit(&self, most: &str) {
        fs::write(self.directory.join("pids.max"), most).expect("limit the processes");
    }
}

impl Drop for FewProcesses {
    fn drop(&mut self) {
        let removed = try_for(seconds(5.0), || fs::remove_dir(&self.directory).ok());
        if removed.is_none() {
            eprintln!("{} is left", self.directory.display());
        }
        if let Some(control) = &self.switched_on {
            let _ = fs::write(control, "-pids");
        }
    }
}

#[test]
fn at_the_limit_of_processes_servers_and_distributors_are_started_when_there_may_be_more() {
    let host = Host::new();
    let Some(few) = FewProcesses::new(&host) else {
        eprintln!("left out: this machine has no pids controller");
        return;
    };
    let up = host.up(&App::of(&host, 3));
    few.admit(up.monitor());
    under_load(|| {
        few.limit("1");
        lacks(&up, "app/1", &["start a process: Resource temporarily unavailable", "pids.max"], || {
            few.limit("max");
        });
        few.limit("1");
        up.distributor().kill(seconds(5.0));
        wait_for("it to say why there is none", seconds(10.0), || {
            (said(&up, "start the distributor: Resource temporarily unavailable") > 3).then_some(())
        });
        wait_all_serve();
        // One process, and none of its threads.
        few.limit(&(few.processes() + 1).to_string());
        wait_for("one that can have no thread", seconds(20.0), || {
            up.log().contains("start a thread").then_some(())
        });
        few.limit("max");
        up.wait_answering();
        up.wait_ready();
    });
    up.stop();
}

#[test]
fn a_distributor_that_can_have_no_thread_goes_on_and_compares_its_counts_later() {
    let host = Host::new();
    let Some(few) = FewProcesses::new(&host) else {
        eprintln!("left out: this machine has no pids controller");
        return;
    };
    let file = host.write("dist-ctl.toml", &App::of(&host, 1).toml());
    let mut command = host.command(&["up", "-f", &file]);
    command.env("DIST_CTL_CHECK_COUNTS", "100ms");
    let up = host.start_command(command);
    up.wait_ready();
    let held = client::hold(V4, 1);
    few.admit(up.distributor());
    few.limit("1");
    let unavailable = || up.service().drift.unavailable;
    wait_for("that it cannot", seconds(10.0), || unavailable()?.contains("start a thread").then_some(()));
    few.limit("max");
    wait_until_eq("that it can", seconds(10.0), None, unavailable);
    let checks = up.service().drift.checks;
    wait_for("more checks", seconds(10.0), || (up.service().drift.checks > checks).then_some(()));
    drop(held);
    up.stop();
}

/// A process of a user who usually has none.
struct Other(Child);

impl Other {
    #[track_caller]
    fn of(user: &str) -> Self {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), "--clear-groups", "sleep", "1000"]);
        let other = Self(command.stdin(Stdio::null()).spawn().expect("start setpriv"));
        let process = Process::find(other.0.id() as i32).expect("it runs");
        wait_for("it to be another user's", seconds(5.0), || {
            (!process.fact("Uid").contains('0')).then_some(())
        });
        other
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_whose_user_has_too_many_processes_is_started_when_there_are_fewer() {
    let host = Host::new();
    // Its own comes on top, and is looked at only after it is there.
    let others = [Other::of("games"), Other::of("games")];
    let command = vec![host.test_server_for_all(), "--listen".to_owned(), "[::]:8080".to_owned()];
    let server = "user = \"games\"\nlimits = { nproc = 1 }\nrestart = { give_up_after = 3 }".to_owned();
    let app = App { server, ..App::running(1, command) };
    let up = host.start(&app);
    let words = ["server app/1 could not be started", "Resource temporarily unavailable", "nproc"];
    let begun = up.wait_trouble(&words);
    stays("the server", Duration::from_millis(2500), false, || {
        let state = up.service().server("app/1").state.clone();
        state == "ready" || state == "failed"
    });
    assert_eq!(up.wait_trouble(&words).since, begun.since);
    drop(others);
    up.wait_ready();
    up.wait_no_trouble();
    assert_eq!(up.service().server("app/1").restarts, 0, "it never failed");
    up.stop();
}

// -- Memory

/// `dist-ctl up` in which the kernel has no memory for anything of BPF from a certain call on.
fn without_memory(host: &Host, file: &str, from: u32) -> Command {
    let plain = host.command(&["up", "-f", file]);
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=bpf", "-e"]);
    command.arg(format!("inject=bpf:error=ENOMEM:when={from}+"));
    command.arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

#[test]
fn without_memory_for_a_map_it_says_so_at_the_start_and_leaves_nothing() {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("left out: there is no strace to take the memory away with");
        return;
    }
    let host = Host::new();
    let file = host.write("dist-ctl.toml", &App::of(&host, 2).toml());
    // While it tries the kernel, and while it makes the service's maps. Not every call makes one.
    let mut maps = 0;
    for from in [1, 8, 20, 50, 60, 70, 80, 90] {
        let ended = command::run(&mut without_memory(&host, &file, from), seconds(30.0));
        assert_eq!(ended.code, Some(1), "from {from}: {ended}");
        let last = ended.stderr.lines().last().unwrap_or_default();
        let is_told = last.contains("eBPF") || last.contains("BPF_OBJ_PIN");
        assert!(is_told && last.contains("Cannot allocate memory"), "from {from}: {ended}");
        maps += usize::from(last.contains("the map "));
        assert!(last.contains("memory.max"), "what to do, from {from}: {ended}");
        assert_eq!(leftover::of_instance(&host.runtime("main")), [], "from {from}");
    }
    assert!(maps >= 4, "it names the map: {maps}");
}
