//! The monitor with real processes.
//!
//! Each test starts a monitor by running this test binary again, and its distributor is the
//! test binary a third time: it hands its end of the channel to the test and waits, so that
//! the test itself says what a distributor says. Servers are shells that read their script
//! where a launcher would read its job.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::{IoSlice, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{self, Child, Stdio},
};

use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use rustix::{
    io::retry_on_intr,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    process::{PidfdFlags, pidfd_open},
};

use super::*;
use crate::message::ToMonitor;

const RUNTIME_DIR: &str = "DIST_CTL_TEST_RUNTIME_DIR";
const SOCKET: &str = "DIST_CTL_TEST_SOCKET";

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
#[ignore = "a process that the other tests start"]
fn monitor_process() {
    let Some(runtime_dir) = env::var_os(RUNTIME_DIR) else { return };
    let programs = Programs {
        distributor: vec![
            THIS_PROGRAM.into(),
            "--exact".into(),
            "monitor::tests::distributor_process".into(),
            "--ignored".into(),
            "--nocapture".into(),
        ],
        // The script is what it reads. This test binary knows no such option.
        launcher: vec!["/bin/sh".into(), "-s".into()],
    };
    match supervise(programs, Path::new(&runtime_dir)) {
        Ok(code) => process::exit(code.into()),
        Err(error) => {
            eprintln!("{error:#}");
            process::exit(1)
        }
    }
}

#[test]
#[ignore = "a process that the other tests start"]
fn distributor_process() {
    let Some(socket) = env::var_os(SOCKET) else { return };
    let channel = Channel::from_stdin().unwrap();
    let Ok(mut line) = UnixStream::connect(socket) else {
        // The test is over.
        process::exit(1)
    };
    let introduction = ToMonitor::Hold { key: process::id().into(), label: vec![] };
    Channel::from(OwnedFd::from(line.try_clone().unwrap()))
        .send(&introduction, Some(channel.as_fd()))
        .unwrap();
    let mut code = [0];
    match line.read_exact(&mut code) {
        Ok(()) => process::exit(code[0].into()),
        // The test is over.
        Err(_) => process::exit(1),
    }
}

/// A monitor, and where its distributors present themselves.
struct Run {
    monitor: Child,
    directory: PathBuf,
    listener: UnixListener,
}

impl Run {
    fn start(name: &str) -> Self {
        let place = env::temp_dir().join(format!("dist-ctl-test-monitor-{name}-{}", process::id()));
        let _ = fs::remove_dir_all(&place);
        fs::create_dir(&place).unwrap();
        let listener = UnixListener::bind(place.join("socket")).unwrap();
        let monitor = start_monitor(&place, Stdio::inherit());
        Self { monitor, directory: place, listener }
    }

    /// The next distributor that presents itself.
    fn distributor(&self) -> Distributor {
        wait_readable(&self.listener, "a distributor");
        let (line, _) = self.listener.accept().unwrap();
        wait_readable(&line, "its introduction");
        let stream = Channel::from(OwnedFd::from(line.try_clone().unwrap()));
        match stream.receive().unwrap().unwrap() {
            (ToMonitor::Hold { key, .. }, Some(channel)) => {
                Distributor { pid: key.try_into().unwrap(), channel: channel.into(), line }
            }
            other => panic!("not an introduction: {other:?}"),
        }
    }

    /// One that is told that there is nothing from earlier, and says that it is ready.
    fn first_distributor(&self) -> Distributor {
        let distributor = self.distributor();
        assert_eq!(distributor.told(), FromMonitor::Begin);
        distributor.ask(ToMonitor::Ready);
        distributor
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.monitor.id(), signal.as_raw());
    }

    fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.monitor.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the monitor does not exit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn start_monitor(place: &Path, stderr: Stdio) -> Child {
    // As bad a start as a parent can give: whatever it blocks or ignores, the monitor hears.
    Command::new("/usr/bin/env")
        .args(["--block-signal=CHLD,TERM,INT,HUP", "--ignore-signal=CHLD,TERM,INT,HUP"])
        .arg(format!("/proc/{}/exe", process::id()))
        .args(["--exact", "monitor::tests::monitor_process", "--ignored", "--nocapture"])
        .env(RUNTIME_DIR, place.join("run"))
        .env(SOCKET, place.join("socket"))
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap()
}

/// The test's hold on a distributor: what it could say and hear.
struct Distributor {
    pid: u32,
    channel: Channel,
    line: UnixStream,
}

impl Distributor {
    fn ask(&self, message: ToMonitor) {
        self.channel.send(&message, None).unwrap();
    }

    fn hold(&self, key: u64, descriptor: BorrowedFd<'_>) {
        let label = format!("room {key}").into_bytes();
        self.channel.send(&ToMonitor::Hold { key, label }, Some(descriptor)).unwrap();
    }

    fn watch(&self, id: u64, process: &Child) {
        let pid = process.id();
        let pidfd = pidfd_open(Pid::from_child(process), PidfdFlags::empty()).unwrap();
        let label = format!("server {id}").into_bytes();
        self.channel.send(&ToMonitor::Watch { id, pid, label }, Some(pidfd.as_fd())).unwrap();
    }

    fn forget(&self, message: &FromMonitor) {
        if let FromMonitor::Exited { id, .. } = message {
            self.ask(ToMonitor::Forget { id: *id });
        }
    }

    fn told_with_descriptor(&self) -> (FromMonitor, Option<OwnedFd>) {
        wait_readable(&self.channel, "a message from the monitor");
        self.channel.receive().unwrap().expect("the monitor is there")
    }

    fn told(&self) -> FromMonitor {
        self.told_with_descriptor().0
    }

    /// Starts a shell with this script. Gives its pid.
    fn start(&self, id: u64, script: &str) -> u32 {
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        let start = ToMonitor::Start { id, label: script.into() };
        self.channel.send(&start, Some(theirs.as_fd())).unwrap();
        drop(theirs);
        ours.write_all(script.as_bytes()).unwrap();
        match self.told() {
            FromMonitor::Started { id: started, pid } if started == id => pid,
            other => panic!("not that {id} is started: {other:?}"),
        }
    }

    /// Dies like by kill -9, and takes its end of the channel with it.
    fn die(self) {
        drop(self.channel);
        send_signal(self.pid, Signal::KILL.as_raw());
    }

    fn exit(mut self, code: u8) {
        drop(self.channel);
        self.line.write_all(&[code]).unwrap();
    }
}

fn wait_readable(descriptor: impl AsFd, what: &str) {
    let mut events = [PollFd::new(&descriptor, PollFlags::IN)];
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    let ready = retry_on_intr(|| rustix::event::poll(&mut events, Some(&timeout))).unwrap();
    assert_eq!(ready, 1, "waiting for {what}");
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// What its descriptors refer to, the first three apart.
fn descriptors(pid: u32) -> BTreeSet<PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let others = open.filter(|entry| entry.file_name().len() > 1 || entry.file_name() > *"2");
    others.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

#[test]
fn the_exit_code_of_a_distributor_that_was_never_ready_is_the_monitors() {
    for code in [2, 1, 0] {
        let mut run = Run::start(&format!("code-{code}"));
        run.distributor().exit(code);
        assert_eq!(run.exit_code(), Some(code.into()));
        assert!(!run.directory.join("run").exists(), "the runtime directory is left behind");
    }
}

#[test]
fn a_distributor_that_fails_before_it_is_ready_takes_its_servers_and_the_monitor_with_it() {
    let mut run = Run::start("fails");
    let distributor = run.distributor();
    assert_eq!(distributor.told(), FromMonitor::Begin);
    let server = distributor.start(1, "exec sleep 60");
    distributor.exit(1);
    assert_eq!(run.exit_code(), Some(1));
    assert!(!is_there(server));
}

#[test]
fn a_distributor_that_is_killed_before_it_is_ready_is_followed_by_one_that_knows_of_its_servers() {
    let run = Run::start("killed");
    let distributor = run.distributor();
    assert_eq!(distributor.told(), FromMonitor::Begin);
    let server = distributor.start(1, "exec sleep 60");
    distributor.die();
    let next = run.distributor();
    assert!(is_there(server));
    assert_eq!(next.told(), FromMonitor::Child { id: 1, pid: server, label: b"exec sleep 60".to_vec() });
}

#[test]
fn servers_and_held_descriptors_outlive_the_distributor_and_the_next_one_gets_them() {
    let mut run = Run::start("outlive");
    let distributor = run.first_distributor();
    let server = distributor.start(1, "exec sleep 60");
    let brief = distributor.start(2, "exit 7");
    let exited = FromMonitor::Exited { id: 2, pid: brief, exit: Exit::Code(7) };
    assert_eq!(distributor.told(), exited);
    let (room, mut client) = UnixStream::pair().unwrap();
    distributor.hold(5, room.as_fd());
    drop(room);
    distributor.die();

    let next = run.distributor();
    assert!(is_there(server));
    assert_eq!(next.told(), FromMonitor::Child { id: 1, pid: server, label: b"exec sleep 60".to_vec() });
    assert_eq!(next.told(), FromMonitor::Child { id: 2, pid: brief, label: b"exit 7".to_vec() });
    assert_eq!(next.told(), exited);
    let (held, room) = next.told_with_descriptor();
    assert_eq!(held, FromMonitor::Held { key: 5, label: b"room 5".to_vec() });
    client.write_all(b"still").unwrap();
    let mut heard = [0; 5];
    UnixStream::from(room.unwrap()).read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still");
    assert_eq!(next.told(), FromMonitor::Begin);
    // What we were given, by cargo for example, everybody has.
    let of_monitor = &descriptors(run.monitor.id()) - &descriptors(process::id());
    let of_distributor = descriptors(next.pid);
    // The lock, both ends of the pipe for signals, the channel and the room.
    assert_eq!(of_monitor.len(), 5, "{of_monitor:?}");
    assert!(of_monitor.is_disjoint(&of_distributor), "{of_distributor:?}");
    assert!(of_monitor.is_disjoint(&descriptors(server)));
    let pid = Pid::from_raw(next.pid.cast_signed());
    assert_eq!(rustix::process::getpgid(pid).ok(), pid, "Ctrl-C reaches the distributor, too");

    next.ask(ToMonitor::Forget { id: 2 });
    next.ask(ToMonitor::Drop { key: 5 });
    next.die();
    let third = run.distributor();
    assert_eq!(third.told(), FromMonitor::Child { id: 1, pid: server, label: b"exec sleep 60".to_vec() });
    assert_eq!(third.told(), FromMonitor::Begin);
    assert_eq!(client.read(&mut heard).unwrap(), 0, "the dropped descriptor is still open");

    third.ask(ToMonitor::Finished { code: 0 });
    third.exit(0);
    assert_eq!(run.exit_code(), Some(0));
    assert!(!is_there(server));
}

#[test]
fn what_a_distributor_said_just_before_it_died_is_done() {
    let run = Run::start("last-words");
    let distributor = run.first_distributor();
    // The monitor cannot read any of it before the death, which is the point.
    run.signal(Signal::STOP);
    let (room, _client) = UnixStream::pair().unwrap();
    for key in 0..20 {
        distributor.hold(key, room.as_fd());
    }
    distributor.ask(ToMonitor::Drop { key: 3 });
    distributor.die();
    run.signal(Signal::CONT);

    let next = run.distributor();
    let expected = (0..20).filter(|&key| key != 3);
    for key in expected {
        let label = format!("room {key}").into_bytes();
        assert_eq!(next.told(), FromMonitor::Held { key, label });
    }
    assert_eq!(next.told(), FromMonitor::Begin);
}

#[test]
fn signals_reach_the_server_and_its_end_is_told() {
    let run = Run::start("signals");
    let distributor = run.first_distributor();
    let pid = distributor.start(1, "trap 'exit 9' TERM; echo; while :; do sleep 0.01; done");
    distributor.ask(ToMonitor::Signal { id: 1, signal: 15 });
    // A shell that is not yet at its trap dies of the signal, which is as good here.
    match distributor.told() {
        FromMonitor::Exited { id: 1, pid: gone, exit: Exit::Code(9) | Exit::Signal(15) } if gone == pid => {}
        other => panic!("{other:?}"),
    }
    let pid = distributor.start(2, "exec sleep 60");
    distributor.ask(ToMonitor::Signal { id: 2, signal: 9 });
    assert_eq!(distributor.told(), FromMonitor::Exited { id: 2, pid, exit: Exit::Signal(9) });
}

#[test]
fn what_servers_leave_behind_is_reaped_and_told() {
    let run = Run::start("orphans");
    let distributor = run.first_distributor();
    let pid = distributor.start(1, "(sleep 0.2; exit 6) & exit 0");
    assert_eq!(distributor.told(), FromMonitor::Exited { id: 1, pid, exit: Exit::Code(0) });
    match distributor.told() {
        FromMonitor::Orphan { pid, exit: Exit::Code(6) } => assert!(!is_there(pid)),
        other => panic!("{other:?}"),
    }
}

/// A process that is not the monitor's child, as a server is that an earlier monitor started.
fn stranger(script: &str) -> Child {
    Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_process_that_somebody_else_started_is_watched_and_its_end_is_told_until_it_is_forgotten() {
    let run = Run::start("watched");
    let distributor = run.first_distributor();
    let mut processes: Vec<Child> = (0..3).map(|_| stranger("exec sleep 60")).collect();
    let pids: Vec<u32> = processes.iter().map(Child::id).collect();
    for (id, process) in (1..).zip(&processes) {
        distributor.watch(id, process);
    }
    // Long after its parent has reaped it.
    processes[0].kill().unwrap();
    processes[0].wait().unwrap();
    let ended = |id: u64| FromMonitor::Exited { id, pid: pids[id as usize - 1], exit: Exit::Unknown };
    assert_eq!(distributor.told(), ended(1));
    distributor.ask(ToMonitor::Signal { id: 2, signal: 15 });
    // A zombie, whose parent has not looked.
    assert_eq!(distributor.told(), ended(2));
    assert_eq!(processes[1].wait().unwrap().to_string(), "signal: 15 (SIGTERM)");
    distributor.ask(ToMonitor::Forget { id: 1 });
    distributor.die();

    let next = run.distributor();
    let child = |id: u64| FromMonitor::Child {
        id,
        pid: pids[id as usize - 1],
        label: format!("server {id}").into_bytes(),
    };
    for expected in [child(2), ended(2), child(3), FromMonitor::Begin] {
        assert_eq!(next.told(), expected);
    }
    // Nobody says Forget while there is nobody: it is told to the one after.
    run.signal(Signal::STOP);
    next.die();
    processes[2].kill().unwrap();
    processes[2].wait().unwrap();
    run.signal(Signal::CONT);
    let third = run.distributor();
    let told: Vec<_> = (0..5).map(|_| third.told()).collect();
    // Whether the monitor saw the one's end first, or the other's, only the order says.
    let at_once = [child(2), ended(2), child(3), ended(3), FromMonitor::Begin];
    let after = [child(2), ended(2), child(3), FromMonitor::Begin, ended(3)];
    assert!(told == at_once || told == after, "{told:?}");
}

#[test]
fn what_cannot_be_watched_is_answered() {
    let run = Run::start("not-watched");
    let distributor = run.first_distributor();
    let mut process = stranger("exec sleep 60");
    distributor.ask(ToMonitor::Watch { id: 1, pid: process.id(), label: vec![] });
    assert_eq!(distributor.told(), FromMonitor::NotStarted { id: 1, errno: 24 });
    distributor.watch(1, &process);
    distributor.watch(1, &process);
    assert_eq!(distributor.told(), FromMonitor::NotStarted { id: 1, errno: 17 });
    process.kill().unwrap();
    process.wait().unwrap();
    let ended = FromMonitor::Exited { id: 1, pid: process.id(), exit: Exit::Unknown };
    assert_eq!(distributor.told(), ended);
}

#[test]
fn what_is_watched_outlives_the_monitor() {
    let mut run = Run::start("left-alone");
    let distributor = run.first_distributor();
    let mut process = stranger("exec sleep 60");
    distributor.watch(1, &process);
    distributor.ask(ToMonitor::Finished { code: 0 });
    distributor.exit(0);
    assert_eq!(run.exit_code(), Some(0));
    assert_eq!(process.try_wait().unwrap(), None, "it was somebody else's");
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_distributor_that_is_killed_again_and_again_is_followed_at_once() {
    let run = Run::start("again");
    let mut distributor = run.first_distributor();
    // With a delay that grows it would take minutes.
    let started = Instant::now();
    for _ in 0..40 {
        distributor.die();
        distributor = run.first_distributor();
    }
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
}

#[test]
fn term_and_int_ask_to_stop_and_hup_to_reload() {
    let mut run = Run::start("ask");
    let distributor = run.first_distributor();
    run.signal(Signal::HUP);
    assert_eq!(distributor.told(), FromMonitor::Reload);
    run.signal(Signal::TERM);
    assert_eq!(distributor.told(), FromMonitor::Stop);
    run.signal(Signal::INT);
    assert_eq!(distributor.told(), FromMonitor::Stop);
    distributor.ask(ToMonitor::Finished { code: 1 });
    distributor.exit(0);
    assert_eq!(run.exit_code(), Some(1), "the code is the one it finished with");
}

#[test]
fn a_distributor_that_dies_while_stopping_is_followed_by_one_that_finishes() {
    let mut run = Run::start("stopping");
    let distributor = run.first_distributor();
    let server = distributor.start(1, "exec sleep 60");
    run.signal(Signal::TERM);
    assert_eq!(distributor.told(), FromMonitor::Stop);
    distributor.die();

    let next = run.distributor();
    assert_eq!(next.told(), FromMonitor::Child { id: 1, pid: server, label: b"exec sleep 60".to_vec() });
    assert_eq!(next.told(), FromMonitor::Begin);
    assert_eq!(next.told(), FromMonitor::Stop);
    next.ask(ToMonitor::Finished { code: 0 });
    next.exit(0);
    assert_eq!(run.exit_code(), Some(0));
}

#[test]
fn when_it_is_finished_nothing_is_left() {
    let mut run = Run::start("finished");
    let distributor = run.first_distributor();
    // No other process has this in its command line.
    let sleep = format!("sleep 60.{}", process::id());
    distributor.start(1, &format!("trap '' TERM INT HUP; {sleep}; {sleep}"));
    let pid = distributor.start(2, &format!("setsid sh -c '{sleep} & {sleep}' & exit 0"));
    assert_eq!(distributor.told(), FromMonitor::Exited { id: 2, pid, exit: Exit::Code(0) });
    let running = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let commands = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
        commands
            .filter(|command| String::from_utf8_lossy(command).replace('\0', " ").contains(&sleep))
            .count()
    };
    // One of the first server; two, and the shell between, that the second left behind.
    let deadline = Instant::now() + PATIENCE;
    while running() < 4 {
        assert!(Instant::now() < deadline, "{} of 4 run", running());
        std::thread::sleep(Duration::from_millis(5));
    }
    distributor.ask(ToMonitor::Finished { code: 0 });
    distributor.exit(0);

    assert_eq!(run.exit_code(), Some(0));
    assert_eq!(running(), 0);
    assert!(!run.directory.join("run").exists(), "the runtime directory is left behind");
}

#[test]
fn a_distributor_that_finishes_and_does_not_exit_is_killed() {
    let mut run = Run::start("lingers");
    let distributor = run.first_distributor();
    let finished = Instant::now();
    distributor.ask(ToMonitor::Finished { code: 0 });
    assert_eq!(run.exit_code(), Some(0));
    assert!(finished.elapsed() >= EXIT_TIME, "it may take its time to exit");
    assert!(!is_there(distributor.pid));
}

#[test]
fn another_program_takes_over_and_if_it_is_none_the_one_before_goes_on() {
    let run = Run::start("replace");
    let distributor = run.first_distributor();
    let server = distributor.start(1, "exec sleep 60");
    let label = b"exec sleep 60".to_vec();
    let child = FromMonitor::Child { id: 1, pid: server, label };
    let replace = |distributor: Distributor, program: &Path| {
        let program = fs::File::open(program).unwrap();
        distributor.channel.send(&ToMonitor::Replace, Some(program.as_fd())).unwrap();
        distributor.exit(0);
    };
    // A program that exits at once with 1, one that cannot be run, and a copy of the real one.
    let text = run.directory.join("text");
    fs::write(&text, "").unwrap();
    replace(distributor, Path::new("/bin/false"));
    let distributor = run.distributor();
    for expected in [child.clone(), FromMonitor::NotReplaced { exit: Exit::Code(1) }, FromMonitor::Begin] {
        assert_eq!(distributor.told(), expected);
    }
    distributor.ask(ToMonitor::Ready);
    replace(distributor, &text);
    let distributor = run.distributor();
    for expected in [child.clone(), FromMonitor::NotReplaced { exit: Exit::Unknown }, FromMonitor::Begin] {
        assert_eq!(distributor.told(), expected);
    }
    distributor.ask(ToMonitor::Ready);
    let copy = run.directory.join("copy");
    // By a process of its own, or another test's child might have it open for writing.
    let program = format!("/proc/{}/exe", process::id());
    assert!(Command::new("cp").arg(program).arg(&copy).status().unwrap().success());
    replace(distributor, &copy);
    for expected in ["the first one of the copy", "one after that was killed"] {
        let next = run.distributor();
        assert_eq!(next.told(), child, "{expected}");
        assert_eq!(next.told(), FromMonitor::Begin, "{expected}");
        next.ask(ToMonitor::Ready);
        let runs = fs::read_link(format!("/proc/{}/exe", next.pid)).unwrap();
        assert_eq!(runs, copy, "{expected}");
        // Launchers are the copy as well, which knows no -s.
        next.channel.send(&ToMonitor::Start { id: 2, label: vec![] }, Some(next.line.as_fd())).unwrap();
        assert!(matches!(next.told(), FromMonitor::Started { id: 2, .. }), "{expected}");
        match next.told() {
            FromMonitor::Exited { id: 2, exit, .. } => assert_eq!(exit, Exit::Code(101), "{expected}"),
            other => panic!("{other:?}"),
        }
        next.ask(ToMonitor::Forget { id: 2 });
        next.die();
    }
    assert!(is_there(server));
}

#[test]
fn a_second_monitor_is_refused() {
    let run = Run::start("second");
    let _distributor = run.first_distributor();
    let second = start_monitor(&run.directory, Stdio::piped()).wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    let expected = format!("(pid {}): stop it with dist-ctl down", run.monitor.id());
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn nonsense_is_ignored_and_what_follows_is_done() {
    let run = Run::start("nonsense");
    let distributor = run.first_distributor();
    for nonsense in [&[200, 1, 2][..], &[1], &[7, 7], &[67], &[0; 5000]] {
        rustix::net::send(&distributor.channel, nonsense, SendFlags::empty()).unwrap();
    }
    // Too long for a message, but not for the socket.
    let long = vec![1; crate::message::MAX_MESSAGE + 1];
    rustix::net::send(&distributor.channel, &long, SendFlags::empty()).unwrap();
    distributor.ask(ToMonitor::Start { id: 1, label: vec![] });
    assert_eq!(distributor.told(), FromMonitor::NotStarted { id: 1, errno: 24 });
    let pid = distributor.start(1, "exit 0");
    assert_eq!(distributor.told(), FromMonitor::Exited { id: 1, pid, exit: Exit::Code(0) });
}

/// Sends bytes that may be no message, with so many descriptors that may be nothing of use.
fn send_anything(channel: &Channel, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    rustix::net::sendmsg(channel, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// What a broken distributor might send: often a kind that there is, and often as long as that.
fn anything() -> impl Strategy<Value = (Vec<u8>, usize)> {
    let kind = prop_oneof![4 => 0..12u8, 1 => any::<u8>()];
    let rest = prop_oneof![
        2 => Just(vec![]),
        // Few ids, so that some are taken.
        4 => (0..4u8, 0..20usize).prop_map(|(id, more)| [vec![id; 8], vec![id; more]].concat()),
        2 => proptest::collection::vec(any::<u8>(), 0..300),
    ];
    let packet = (kind, rest).prop_map(|(kind, rest)| [vec![kind], rest].concat());
    // That would be the end, and rightly so.
    let packet = packet.prop_filter("Finished", |packet| packet[0] != 8 || packet.len() != 2);
    (packet, 0..4usize)
}

#[test]
fn whatever_distributors_send_the_monitor_goes_on_and_leaks_nothing() {
    const SERVER: u64 = u64::MAX;
    let run = Run::start("anything");
    let mut distributor = run.first_distributor();
    let server = distributor.start(SERVER, "exec sleep 60");
    let descriptors_at_rest = descriptors(run.monitor.id()).len();
    // Each of them is readable or at its end: no server waits for it, and no watch lasts.
    let null = fs::File::open("/dev/null").unwrap();
    let (closed, _) = UnixStream::pair().unwrap();
    let of_use = [null.as_fd(), closed.as_fd(), null.as_fd()];
    let mut random = TestRunner::deterministic();
    for _ in 0..12 {
        for _ in 0..80 {
            let (packet, count) = anything().new_tree(&mut random).unwrap().current();
            send_anything(&distributor.channel, &packet, &of_use[..count]);
        }
        distributor.die();
        // Maybe it had asked for another program, which is none: then it is as if it had not.
        distributor = run.distributor();
        let mut told = vec![];
        while told.last() != Some(&FromMonitor::Begin) {
            told.push(distributor.told());
        }
        let is_the_server = |message: &FromMonitor| matches!(message, FromMonitor::Child { id: SERVER, pid, .. } if *pid == server);
        assert_eq!(told.iter().filter(|message| is_the_server(message)).count(), 1, "{told:?}");
        for message in told {
            if let FromMonitor::Held { key, .. } = message {
                distributor.ask(ToMonitor::Drop { key });
            }
            distributor.forget(&message);
        }
        distributor.ask(ToMonitor::Ready);
        assert!(is_there(server));
    }
    // It still does what it is asked, and has nothing left of all that.
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    distributor.channel.send(&ToMonitor::Start { id: 77, label: vec![] }, Some(theirs.as_fd())).unwrap();
    ours.write_all(b"exit 3").unwrap();
    drop((theirs, ours));
    loop {
        match distributor.told() {
            FromMonitor::Exited { id: 77, exit, .. } => break assert_eq!(exit, Exit::Code(3)),
            message => distributor.forget(&message),
        }
    }
    distributor.ask(ToMonitor::Forget { id: 77 });
    let deadline = Instant::now() + PATIENCE;
    while descriptors(run.monitor.id()).len() != descriptors_at_rest {
        assert!(Instant::now() < deadline, "{:?}", descriptors(run.monitor.id()));
        std::thread::sleep(Duration::from_millis(5));
    }
    distributor.ask(ToMonitor::Signal { id: SERVER, signal: 9 });
    let killed = FromMonitor::Exited { id: SERVER, pid: server, exit: Exit::Signal(9) };
    while distributor.told() != killed {}
}

/// Starts servers that exit at once, and reads nothing, until the monitor takes no more.
fn start_until_it_is_full(distributor: &Distributor) -> u64 {
    distributor.channel.set_nonblocking().unwrap();
    let mut id = 0;
    loop {
        let (theirs, _) = UnixStream::pair().unwrap();
        let start = ToMonitor::Start { id, label: vec![] };
        match distributor.channel.send(&start, Some(theirs.as_fd())) {
            Ok(()) => id += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut events = [PollFd::new(&distributor.channel, PollFlags::OUT)];
                // Each start gives two messages: before this many it cannot be full, only slow.
                let slow = id <= QUEUE as u64 / 2;
                let timeout = if slow { PATIENCE } else { Duration::from_secs(2) };
                let timeout = Timespec::try_from(timeout).unwrap();
                if retry_on_intr(|| rustix::event::poll(&mut events, Some(&timeout))).unwrap() == 0 {
                    return id;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_distributor_that_hangs_loses_no_exit_and_does_not_hold_up_the_monitor() {
    let run = Run::start("hangs");
    let distributor = run.first_distributor();
    let ids = start_until_it_is_full(&distributor);
    assert!(ids > QUEUE as u64 / 2, "{ids} are not enough to fill the queue");
    run.signal(Signal::TERM);

    // It reads again: every start and every exit once, the pids the same, and the request.
    let (mut started, mut exited, mut stops) = (BTreeMap::new(), BTreeMap::new(), 0);
    while started.len() < ids as usize || exited.len() < ids as usize || stops < 1 {
        let twice = match distributor.told() {
            FromMonitor::Started { id, pid } => started.insert(id, pid),
            FromMonitor::Exited { id, pid, exit: Exit::Code(0) } => exited.insert(id, pid),
            FromMonitor::Stop => {
                stops += 1;
                None
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(twice, None);
    }
    assert_eq!(started, exited);
    assert_eq!(started.len() as u64, ids);
}

#[test]
fn the_exits_that_a_hanging_distributor_never_read_are_told_to_the_next() {
    let run = Run::start("hangs-and-dies");
    let distributor = run.first_distributor();
    let ids = start_until_it_is_full(&distributor);
    distributor.die();

    let next = run.distributor();
    let (mut children, mut exited) = (BTreeMap::new(), BTreeMap::new());
    while exited.len() < ids as usize {
        let twice = match next.told() {
            FromMonitor::Child { id, pid, .. } => children.insert(id, pid),
            FromMonitor::Exited { id, pid, exit: Exit::Code(0) } => exited.insert(id, pid),
            FromMonitor::Begin => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(twice, None);
    }
    assert_eq!(children, exited);
}
