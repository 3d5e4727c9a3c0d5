//! A machine of its own for one test: a network namespace and a directory.
//!
//! The thread that makes a host enters its network, and everything the test starts or
//! connects from there is in it. `Host::up` brings dist-ctl up with servers; when that or the
//! host goes, also by a panic, everything is stopped and removed, and the test fails if the
//! product itself left anything.

#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, MutexGuard, Once,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    process::{Resource, Rlimit, geteuid, getrlimit, setrlimit},
    thread::UnshareFlags,
};

use crate::{
    app::App,
    command::{self, Ended},
    inside::Inside,
    leftover, netlink,
    network::{Network, unshare},
    process::{Process, Signal, signal_child},
    status::{Service, Status, Trouble},
    wait::{seconds, try_for, wait_for, wait_until_eq},
};

/// Names the program under test, if it is not the one that cargo built.
const PROGRAM: &str = "DIST_CTL_BIN";
/// Names the one with the contract after this one, likewise.
const NEXT_PROGRAM: &str = "DIST_CTL_NEXT_BIN";

/// The port of the service in most tests, over IPv4 and IPv6.
pub const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
pub const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 8080);

/// The world of one test.
#[derive(Debug)]
pub struct Host {
    directory: PathBuf,
    network: Network,
    /// The namespace the thread came from and goes back to.
    home: Network,
    ups: AtomicU32,
}

/// A running `dist-ctl up`.
#[derive(Debug)]
pub struct Up<'h> {
    pub host: &'h Host,
    runtime: PathBuf,
    child: Mutex<Child>,
    output: PathBuf,
    errors: PathBuf,
    stopped: AtomicBool,
}

impl Host {
    /// A new one, entered by the calling thread.
    #[track_caller]
    pub fn new() -> Self {
        assert!(
            geteuid().is_root(),
            "these tests make namespaces and load BPF programs: run them as root, with cargo xtask test"
        );
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            leftover::clean_after_killed_tests();
            let limit = getrlimit(Resource::Nofile);
            // Failing is not possible below the hard limit.
            let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
        });
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let directory = leftover::directory(NUMBER.fetch_add(1, Ordering::Relaxed));
        make_directory(&directory, 0o755);
        make_directory(&directory.join("inside"), 0o777);
        let home = Network::current().expect("open our network namespace");
        unshare(UnshareFlags::NEWNET).expect("make a network namespace");
        netlink::bring_up("lo").expect("bring the loopback up");
        // /proc/sys/net is that of the thread's namespace. Tests use many ports. One bound is even and
        // one odd, or the kernel logs that it prefers that, for each host.
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 64999").expect("widen the range of ports");
        let network = Network::current().expect("open the host's network namespace");
        Self { directory, network, home, ups: AtomicU32::new(0) }
    }

    /// A new one that the calling thread has left again, for a test with several hosts. What is
    /// to happen in it is run in its [`network`](Self::network).
    #[track_caller]
    pub fn apart() -> Self {
        let host = Self::new();
        host.home.enter().expect("go back to the first namespace");
        host
    }

    /// Its network namespace.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// A path in the host's own directory, which every user may enter.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The same as text.
    pub fn path_text(&self, name: &str) -> String {
        self.path(name).to_str().expect("our paths are text").to_owned()
    }

    /// Writes a file there, and the directories that lead to it.
    #[track_caller]
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        let parent = path.parent().expect("it stands in the host's directory");
        fs::create_dir_all(parent).expect("make the file's directory");
        fs::write(&path, text).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        self.path_text(name)
    }

    /// Makes a directory there that every user may write to.
    #[track_caller]
    pub fn open_directory(&self, name: &str) -> String {
        make_directory(&self.path(name), 0o777);
        self.path_text(name)
    }

    /// The runtime directory of the instance with this name. It does not exist before `up`.
    pub fn runtime(&self, instance: &str) -> PathBuf {
        self.path(&format!("runtime-{instance}"))
    }

    /// Where a test server of this name keeps its counts.
    pub fn inside_file(&self, name: &str) -> String {
        self.path_text(&format!("inside/{name}"))
    }

    /// What a test server of this name counts.
    pub fn inside(&self, name: &str) -> Inside {
        Inside::read(Path::new(&self.inside_file(name)))
    }

    /// The path of the test server's program.
    #[track_caller]
    pub fn test_server(&self) -> String {
        built("test-server")
    }

    /// The path of a program that passes the trial of an upgrade and then fails.
    #[track_caller]
    pub fn impostor(&self) -> String {
        built("impostor")
    }

    /// A copy of the test server that every user may run, wherever the tests were built.
    #[track_caller]
    pub fn test_server_for_all(&self) -> String {
        self.copy_for_all(Path::new(&self.test_server()))
    }

    /// A copy of a program that every user may run.
    #[track_caller]
    pub fn copy_for_all(&self, program: &Path) -> String {
        let name = program.file_name().and_then(|name| name.to_str()).expect("a program has a name");
        let copy = self.path(name);
        if !copy.exists() {
            // By a process of its own: a file that we write ourselves is open for writing in
            // every process that another test starts meanwhile, until it becomes its program,
            // and a file that is written to cannot be run ("Text file busy").
            command::run(Command::new("cp").arg(program).arg(&copy), seconds(20.0)).expect_done();
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("open the copy to all");
        }
        self.path_text(name)
    }

    /// A command line of dist-ctl for the default instance of this host, not started yet.
    #[track_caller]
    pub fn command(&self, words: &[&str]) -> Command {
        self.command_of("main", words)
    }

    /// The same for another instance.
    #[track_caller]
    pub fn command_of(&self, instance: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(words).env("DIST_CTL_RUNTIME_DIR", self.runtime(instance));
        // The log is what it is by default, whatever the developer's shell says.
        command.env_remove("RUST_LOG");
        command
    }

    /// Runs a command of dist-ctl to its end.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Ended {
        command::run(&mut self.command(words), seconds(20.0))
    }

    /// Brings a service up, and waits until every server is ready.
    #[track_caller]
    pub fn up(&self, app: &App) -> Up<'_> {
        let up = self.start(app);
        up.wait_ready();
        up
    }

    /// Brings a service up, and waits only until it answers `status`.
    #[track_caller]
    pub fn start(&self, app: &App) -> Up<'_> {
        self.start_toml(&app.toml())
    }

    /// The same with a whole file.
    #[track_caller]
    pub fn start_toml(&self, toml: &str) -> Up<'_> {
        let file = self.write("dist-ctl.toml", toml);
        self.start_command(self.command(&["up", "-f", &file]))
    }

    /// The same with a command line.
    #[track_caller]
    pub fn start_command(&self, command: Command) -> Up<'_> {
        let up = self.launch(command);
        up.wait_answering();
        up
    }

    /// Only starts it.
    #[track_caller]
    pub fn launch(&self, command: Command) -> Up<'_> {
        let number = self.ups.fetch_add(1, Ordering::Relaxed) + 1;
        let [output, errors] = ["out", "err"].map(|kind| self.path(&format!("up-{number}.{kind}")));
        let file = |path: &Path| File::create(path).expect("create the file for what it says").into();
        self.spawn(command, (file(&output), output), (file(&errors), errors))
    }

    /// The same with other places for what it prints and logs, where `Up` finds none of it.
    #[track_caller]
    pub fn launch_with(&self, command: Command, output: Stdio, errors: Stdio) -> Up<'_> {
        self.spawn(command, (output, PathBuf::new()), (errors, PathBuf::new()))
    }

    #[track_caller]
    fn spawn(
        &self,
        mut command: Command,
        (stdout, output): (Stdio, PathBuf),
        (stderr, errors): (Stdio, PathBuf),
    ) -> Up<'_> {
        let runtime = command
            .get_envs()
            .find_map(|(name, value)| (name == "DIST_CTL_RUNTIME_DIR").then_some(value?))
            .expect("Host::command set the runtime directory")
            .into();
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        if let Some(process) = Process::find(child.id() as i32) {
            leftover::note(&self.directory, process).expect("note the process");
        }
        Up { host: self, runtime, child: Mutex::new(child), output, errors, stopped: AtomicBool::new(false) }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let inode = self.network.inode();
        let left = inode.as_ref().map(|inode| leftover::in_network(*inode)).unwrap_or_default();
        leftover::remove(&left);
        let back = self.home.enter();
        let removed = fs::remove_dir_all(&self.directory);
        if thread::panicking() {
            return;
        }
        inode.expect("read the number of the host's network namespace");
        assert!(left.is_empty(), "the test left: {}", listed(&left));
        back.expect("go back to the first namespace");
        removed.expect("remove the host's directory");
    }
}

impl Up<'_> {
    /// What `status --json` says.
    #[track_caller]
    pub fn status(&self) -> Status {
        // It answers nobody while the kernel verifies its programs, which an emulated machine does for
        // longer than a command waits. An ordinary one is asked once.
        let mut late = None;
        let asked = try_for(seconds(10.0), || {
            let ended = self.run(&["status", "--json"]);
            let is_late = ended.stderr.contains("no answer came within");
            if is_late {
                late = Some(ended);
                return None;
            }
            Some(ended)
        });
        Status::parse(&asked.or(late).expect("it was asked").expect_done().stdout)
    }

    /// What it says of the only service.
    #[track_caller]
    pub fn service(&self) -> Service {
        self.status().only().clone()
    }

    /// The connections of each server.
    #[track_caller]
    pub fn connections(&self) -> Vec<u64> {
        self.service().connections()
    }

    /// Runs a command of dist-ctl on this instance.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Ended {
        command::run(&mut self.command(words), seconds(20.0))
    }

    /// The same, not started yet.
    #[track_caller]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command(words);
        command.env("DIST_CTL_RUNTIME_DIR", &self.runtime);
        command
    }

    /// The runtime directory.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// The directory of its cgroup.
    pub fn cgroup(&self) -> PathBuf {
        leftover::cgroup(&self.runtime)
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// The process that was started.
    #[track_caller]
    pub fn monitor(&self) -> Process {
        let pid = self.child().id() as i32;
        Process::find(pid).expect("the monitor runs")
    }

    /// Its distributor.
    #[track_caller]
    pub fn distributor(&self) -> Process {
        wait_for("a distributor to run", seconds(10.0), || {
            let mut children = self.monitor().children().into_iter();
            children.find(|child| {
                child.runs() && child.arguments().get(1).is_some_and(|word| word == "distributor")
            })
        })
    }

    /// Kills the distributor, and waits until the next one has found everything.
    #[track_caller]
    pub fn replace_distributor(&self) {
        self.kill_distributor();
        self.wait_ready();
    }

    /// Kills the distributor, and waits until the next one answers, however its servers are.
    #[track_caller]
    pub fn kill_distributor(&self) {
        let old = self.distributor();
        old.kill(seconds(5.0));
        self.wait_other_distributor(old);
    }

    /// Waits until another distributor than `old` has found everything.
    #[track_caller]
    pub fn wait_next_distributor(&self, old: Process) {
        self.wait_other_distributor(old);
        self.wait_ready();
    }

    #[track_caller]
    fn wait_other_distributor(&self, old: Process) {
        wait_for("the next distributor", seconds(20.0), || (self.distributor() != old).then_some(()));
        self.wait_answering();
    }

    /// The main process of a server that runs.
    #[track_caller]
    pub fn process(&self, server: &str) -> Process {
        self.process_if_any(server)
            .unwrap_or_else(|| panic!("{server} has no process: {:#?}", self.service()))
    }

    /// The same, if it has one that runs.
    #[track_caller]
    pub fn process_if_any(&self, server: &str) -> Option<Process> {
        let status = self.status();
        let service = server.split('/').next().unwrap_or_default();
        Process::find(status.service(service).server(server).pid?).filter(|process| process.runs())
    }

    /// Waits until it answers `status`.
    #[track_caller]
    pub fn wait_answering(&self) {
        wait_for("dist-ctl up to answer", seconds(20.0), || {
            if let Some(status) = self.exited() {
                panic!("dist-ctl up ended with {status}: {}{}", self.printed(), self.log());
            }
            self.control_socket().exists().then_some(())?;
            (self.run(&["status", "--json"]).code == Some(0)).then_some(())
        });
    }

    /// Waits for a trouble that says all of this.
    #[track_caller]
    pub fn wait_trouble(&self, words: &[&str]) -> Trouble {
        let mut last = None;
        let found = try_for(seconds(20.0), || {
            let status = self.status();
            let said = |trouble: &&Trouble| words.iter().all(|word| trouble.what.contains(word));
            let found = status.troubles.iter().find(said).cloned();
            last = Some(status.troubles);
            found
        });
        found.unwrap_or_else(|| panic!("no trouble says {words:?}: {last:#?}"))
    }

    #[track_caller]
    pub fn wait_no_trouble(&self) {
        wait_until_eq("the troubles", seconds(20.0), Vec::<String>::new(), || {
            self.status().troubles.into_iter().map(|trouble| trouble.what).collect()
        });
    }

    /// Waits until every server is ready.
    #[track_caller]
    pub fn wait_ready(&self) {
        let mut last = None;
        let ready = try_for(seconds(30.0), || {
            let status = self.status();
            let ready = status.services.iter().all(Service::is_ready);
            last = Some(status);
            ready.then_some(())
        });
        assert!(ready.is_some(), "not every server became ready: {last:#?}");
    }

    /// Waits until the servers hold exactly so many connections.
    #[track_caller]
    pub fn wait_connections(&self, wanted: &[u64]) {
        wait_until_eq("the connections of the servers", seconds(15.0), wanted.to_vec(), || {
            self.connections()
        });
    }

    /// Waits until a server is in this state, and gives what is said of it.
    #[track_caller]
    pub fn wait_state(&self, server: &str, state: &str) -> crate::status::Server {
        let mut last = None;
        let found = try_for(seconds(20.0), || {
            let server = self.service().server(server).clone();
            last = Some(server.clone());
            (server.state == state).then_some(server)
        });
        found.unwrap_or_else(|| panic!("{server} did not become {state}: {last:#?}"))
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("wait for our child")
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_exit(&self, within: Duration) -> ExitStatus {
        wait_for("dist-ctl up to end", within, || self.exited())
    }

    /// Sends the monitor a signal.
    pub fn signal(&self, signal: Signal) {
        signal_child(&self.child(), signal);
    }

    /// Stops it as an operator does, and checks that nothing of it is left.
    #[track_caller]
    pub fn stop(self) {
        if let Err(failure) = self.end() {
            panic!("{failure}");
        }
    }

    /// It has ended, or is about to, by what the test did. Checks that nothing of it is left.
    #[track_caller]
    pub fn has_stopped(self) -> ExitStatus {
        let status = self.wait_exit(seconds(20.0));
        self.stopped.store(true, Ordering::Relaxed);
        let left = leftover::of_instance(&self.runtime);
        leftover::remove(&left);
        assert!(left.is_empty(), "dist-ctl up left: {}", listed(&left));
        status
    }

    /// Kills it, with which its distributor ends, and starts the next one.
    #[track_caller]
    pub fn kill_and_start(self, app: &App) -> Self {
        let (host, distributor) = (self.host, self.distributor());
        self.signal(Signal::KILL);
        wait_for("the distributor to end too", seconds(10.0), || (!distributor.runs()).then_some(()));
        self.forget();
        host.start(app)
    }

    /// It was killed, and the next one is to find what it left.
    pub fn forget(self) {
        self.stopped.store(true, Ordering::Relaxed);
        // It is dead, and only has to be reaped.
        let _ = self.child().wait();
    }

    fn end(&self) -> Result<(), String> {
        if self.stopped.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.signal(Signal::TERM);
        let ended = try_for(seconds(20.0), || self.exited());
        if ended.is_none() {
            // Frozen first, or the monitor starts another distributor.
            self.signal(Signal::STOP);
            for process in self.monitor().children() {
                process.kill(seconds(5.0));
            }
            self.signal(Signal::KILL);
            let _ = self.child().wait();
        }
        let left = leftover::of_instance(&self.runtime);
        leftover::remove(&left);
        match ended {
            None => Err(format!("dist-ctl up did not stop; it left: {}", listed(&left))),
            Some(status) if !status.success() => {
                Err(format!("dist-ctl up ended with {status}; it left: {}", listed(&left)))
            }
            Some(_) if !left.is_empty() => Err(format!("dist-ctl up left: {}", listed(&left))),
            Some(_) => Ok(()),
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        // A test that panicked with the lock held still has to stop its child.
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        let ended = self.end();
        if thread::panicking() || ended.is_err() {
            eprintln!("--- dist-ctl up printed:\n{}--- and logged:\n{}---", self.printed(), self.log());
        }
        match ended {
            Err(failure) if thread::panicking() => eprintln!("{failure}"),
            Err(failure) => panic!("{failure}"),
            Ok(()) => {}
        }
    }
}

/// The program under test.
#[track_caller]
pub fn program() -> PathBuf {
    program_of(PROGRAM, "release/dist-ctl", "cargo build --release")
}

/// The same with the contract after this one.
#[track_caller]
pub fn next_program() -> PathBuf {
    let build = "cargo build --release --features next-contract --target-dir target/next";
    program_of(NEXT_PROGRAM, "next/release/dist-ctl", build)
}

#[track_caller]
fn program_of(variable: &str, path: &str, build: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    // This test's program is in target/PROFILE/deps.
    let own = std::env::current_exe().expect("a process knows its program");
    let target = own.ancestors().nth(3).expect("a test's program is in target/PROFILE/deps");
    let program = target.join(path);
    assert!(
        program.exists(),
        "{} does not exist: build it with {build}, or name another in {variable}",
        program.display()
    );
    program
}

/// The path of a program of this package.
#[track_caller]
fn built(name: &str) -> String {
    let own = std::env::current_exe().expect("a process knows its program");
    let found = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    let found = found.filter(|path| path.exists()).map(|path| path.to_str().expect("a text").to_owned());
    found.last().unwrap_or_else(|| panic!("{name} is not built: run the tests with cargo test -p tests"))
}

/// As many of these tests at a time as the machine can bear: a JVM takes a CPU for itself
/// while it starts, and so do hundreds of clients.
pub fn heavy() -> MutexGuard<'static, ()> {
    static HEAVY: Mutex<()> = Mutex::new(());
    HEAVY.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn make_directory(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
    // Not by mkdir, which takes the umask off.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .unwrap_or_else(|error| panic!("open {} to all: {error}", path.display()));
}

fn listed(leftovers: &[leftover::Leftover]) -> String {
    if leftovers.is_empty() {
        return "nothing".to_owned();
    }
    leftovers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
