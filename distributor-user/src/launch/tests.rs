//! Launchers with real processes: this test binary runs itself as one.
//!
//! What a server finds is read from /proc, of a `sleep` that took the launcher's place. Most
//! of it takes root and a cgroup of our own, which is made and removed here.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
    process::{self, Child, Command, Stdio},
    time::Instant,
};

use rustix::{
    net::sockopt,
    process::{Pid, PidfdFlags, PidfdGetfdFlags},
};

use super::*;
use crate::{launcher, monitor::OPEN_FILES};

/// The launcher's mark in the environment, so that nobody runs it by accident.
const LAUNCHER: &str = "DIST_CTL_TEST_LAUNCHER";

#[test]
#[ignore = "a process that the other tests start"]
fn launcher_process() {
    if env::var_os(LAUNCHER).is_some() {
        process::exit(launcher::launch().into());
    }
}

/// A cgroup of this test's own; `None`, with the reason printed, where there cannot be one.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: not root, so there is nothing to drop and no cgroup to make");
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let unified = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let Some(mount) = unified.and_then(|line| line.split(' ').nth(4)) else {
            eprintln!("SKIPPED: no cgroup2 is mounted");
            return None;
        };
        let path = Path::new(mount).join(format!("dist-ctl-test-{name}-{}", process::id()));
        fs::create_dir(&path).unwrap();
        Some(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes are dead, but not all are reaped.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Killed and reaped with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn proc(&self, file: &str) -> String {
        String::from_utf8(fs::read(format!("/proc/{}/{file}", self.0.id())).unwrap()).unwrap()
    }

    /// A line of /proc/PID/status.
    fn status(&self, name: &str) -> String {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name} in {status}")).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn limit(&self, name: &str) -> Vec<String> {
        let limits = self.proc("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let values = line.unwrap_or_else(|| panic!("{name} in {limits}")).split_whitespace();
        values.take(2).map(str::to_owned).collect()
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let environment = self.proc("environ");
        let pairs = environment.split_terminator('\0').map(|pair| pair.split_once('=').unwrap());
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Number and what it refers to.
    fn descriptors(&self) -> BTreeMap<u32, String> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().flatten();
        open.map(|entry| {
            let number = entry.file_name().into_string().unwrap().parse().unwrap();
            (number, fs::read_link(entry.path()).unwrap().display().to_string())
        })
        .collect()
    }

    fn descriptor(&self, number: i32) -> OwnedFd {
        let pid = Pid::from_raw(self.0.id().cast_signed()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap()
    }
}

/// The command that runs a launcher, behind another one that sets the scene.
fn launcher(scene: &[&str]) -> Command {
    // Whatever the scene does, and even if the file has been built anew.
    let this = format!("/proc/{}/exe", process::id());
    let words = [scene, &[&this]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.args(["--exact", "launch::tests::launcher_process", "--ignored", "--nocapture"]);
    command.env(LAUNCHER, "1").stdout(Stdio::null());
    command
}

async fn launch(mut launcher: Command, job: &Exec) -> Result<Server, LaunchError> {
    let (theirs, ours) = pair().unwrap();
    let process = Server(launcher.stdin(theirs).spawn().unwrap());
    drop(launcher);
    send_job(ours, job).await?;
    // The program runs, but its loader may still have files open.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !["S", "Z"].contains(&process.status("State").split(' ').next().unwrap()) {
        assert!(Instant::now() < deadline, "{:?} does not come to rest", job.command);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(process)
}

async fn refusal(job: &Exec) -> String {
    match launch(launcher(&[]), job).await {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{:?} runs", job.command),
    }
}

fn sleep(cgroup: &Cgroup) -> Exec {
    Exec {
        command: vec!["sleep".into(), "60".into()],
        environment: vec![("PATH".into(), "/usr/bin:/bin".into())],
        directory: None,
        user: None,
        umask: None,
        limits: vec![],
        cpus: vec![],
        cgroup: cgroup.0.clone(),
        stdout: Output::Inherit,
        stderr: Output::Inherit,
        socket: Socket::Own,
        backlog: 128,
        watchdog: None,
    }
}

/// At a port that was free a moment ago.
fn address(ip: &str, v6only: bool) -> ListenAddress {
    let mut socket = SocketAddr::new(ip.parse().unwrap(), 0);
    socket.set_port(std::net::TcpListener::bind(socket).unwrap().local_addr().unwrap().port());
    ListenAddress { socket, v6only }
}

fn port(socket: impl AsFd) -> u16 {
    SocketAddr::try_from(rustix::net::getsockname(socket).unwrap()).unwrap().port()
}

fn hex(capabilities: &[u32]) -> String {
    let mask: u64 = capabilities.iter().map(|capability| 1 << capability).sum();
    format!("{mask:016x}")
}

#[tokio::test]
async fn a_server_is_what_its_job_says_and_nothing_of_ours_is_left_in_it() {
    let Some(cgroup) = Cgroup::new("user") else { return };
    let job = Exec {
        user: Some(Identity { name: "shop".into(), uid: 4321, gid: 4322, groups: vec![4322, 4323] }),
        umask: Some(0o027),
        limits: vec![
            Limit { resource: Resource::Core, soft: Some(0), hard: Some(0) },
            Limit { resource: Resource::Nofile, soft: Some(100), hard: Some(200) },
            Limit { resource: Resource::Cpu, soft: Some(1000), hard: None },
        ],
        cpus: vec![0],
        directory: Some("/usr/share".into()),
        environment: vec![("PATH".into(), "/usr/bin:/bin".into()), ("NAME".into(), "shop/1".into())],
        ..sleep(&cgroup)
    };
    // As bad a start as possible: descriptors open, signals ignored and blocked, and more.
    let scene = [
        "/bin/sh",
        "-c",
        "exec 3</etc/passwd 5</etc/hosts 9>/dev/null; umask 0; exec \"$@\"",
        "sh",
        "/usr/bin/env",
        "--ignore-signal=HUP,INT,QUIT,USR1,PIPE,CHLD,RTMIN",
        "--block-signal=TERM,USR2",
        "setpriv",
        "--inh-caps=+net_raw,+sys_admin",
        "--ambient-caps=+net_raw,+sys_admin",
    ];
    let server = launch(launcher(&scene), &job).await.unwrap();

    let pid = server.0.id();
    assert_eq!(server.proc("comm"), "sleep\n");
    assert_eq!(server.status("Uid"), "4321 4321 4321 4321");
    assert_eq!(server.status("Gid"), "4322 4322 4322 4322");
    assert_eq!(server.status("Groups"), "4322 4323");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(server.status(set), hex(&[]), "{set}");
    }
    assert_eq!(server.status("NoNewPrivs"), "0");
    assert_eq!(server.status("Umask"), "0027");
    for name in ["SigBlk", "SigIgn", "SigCgt"] {
        let mask = u64::from_str_radix(&server.status(name), 16).unwrap();
        assert_eq!(mask, 0, "{name} {mask:x}");
    }
    assert_eq!(server.status("Cpus_allowed_list"), "0");
    assert_eq!(server.limit("Max core file size"), ["0", "0"]);
    assert_eq!(server.limit("Max open files"), ["100", "200"]);
    assert_eq!(server.limit("Max cpu time"), ["1000", "unlimited"]);
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/usr/share"));
    let unified = server.proc("cgroup");
    let name = cgroup.0.file_name().unwrap().to_str().unwrap();
    assert!(unified.lines().any(|line| line == format!("0::/{name}")), "{unified}");
    let stat = server.proc("stat");
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap();
    assert_eq!(session, pid.to_string());
    let descriptors = server.descriptors();
    assert_eq!(descriptors.keys().copied().collect::<Vec<_>>(), [0, 1, 2], "{descriptors:?}");
    assert_eq!(descriptors[&0], "/dev/null");
    let environment = [("NAME", "shop/1"), ("PATH", "/usr/bin:/bin")];
    assert_eq!(server.environment(), environment.map(|(name, value)| (name.into(), value.into())).into());
}

#[tokio::test]
async fn a_server_whose_cpus_are_all_offline_runs_on_others() {
    let Some(cgroup) = Cgroup::new("cpus") else { return };
    let job = Exec { cpus: vec![1000, 1001], ..sleep(&cgroup) };
    let server = launch(launcher(&["/usr/bin/env"]), &job).await.unwrap();
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert!(own.contains(&format!("Cpus_allowed_list:\t{}\n", server.status("Cpus_allowed_list"))));
}

#[tokio::test]
async fn a_server_that_runs_as_root_keeps_nine_capabilities() {
    let Some(cgroup) = Cgroup::new("root") else { return };
    let scene = ["setpriv", "--inh-caps=+kill,+sys_admin", "--ambient-caps=+kill,+sys_admin"];
    let server = launch(launcher(&scene), &sleep(&cgroup)).await.unwrap();

    // chown, dac_override, fowner, fsetid, kill, setgid, setuid, net_bind_service, sys_chroot
    let kept = hex(&[0, 1, 3, 4, 5, 6, 7, 10, 18]);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(server.status(set), kept, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(server.status(set), hex(&[]), "{set}");
    }
}

#[tokio::test]
async fn a_server_may_open_as_many_files_as_dist_ctl_was_given_unless_its_job_says_otherwise() {
    let Some(cgroup) = Cgroup::new("files") else { return };
    let raised = || {
        let mut launcher =
            launcher(&["/bin/sh", "-c", "ulimit -Sn 3000; ulimit -Hn 3000; exec \"$@\"", "sh"]);
        launcher.env(OPEN_FILES, "512");
        launcher
    };
    let server = launch(raised(), &sleep(&cgroup)).await.unwrap();
    assert_eq!(server.limit("Max open files"), ["512", "3000"]);
    let limit = Limit { resource: Resource::Nofile, soft: Some(2000), hard: Some(2000) };
    let server = launch(raised(), &Exec { limits: vec![limit], ..sleep(&cgroup) }).await.unwrap();
    assert_eq!(server.limit("Max open files"), ["2000", "2000"]);
}

#[tokio::test]
async fn systemds_listeners_are_open_from_three_on_and_announced() {
    let Some(cgroup) = Cgroup::new("systemd") else { return };
    let addresses = [address("::", false), address("::", true), address("127.0.0.1", false)];
    let job = Exec {
        user: Some(Identity { name: "shop".into(), uid: 4321, gid: 4321, groups: vec![] }),
        socket: Socket::Systemd(addresses.to_vec()),
        ..sleep(&cgroup)
    };
    let scene = ["/bin/sh", "-c", "exec 3</etc/passwd 4</etc/hosts; exec \"$@\"", "sh"];
    let server = launch(launcher(&scene), &job).await.unwrap();

    let descriptors = server.descriptors();
    assert_eq!(descriptors.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5], "{descriptors:?}");
    for (number, family, v6only) in [(3, 10, false), (4, 10, true), (5, 2, false)] {
        let listener = server.descriptor(number);
        assert!(sockopt::socket_acceptconn(&listener).unwrap(), "{number} does not listen");
        assert_eq!(port(&listener), addresses[number as usize - 3].socket.port());
        assert_eq!(sockopt::socket_domain(&listener).unwrap().as_raw(), family, "{number}");
        assert!(
            sockopt::socket_reuseport(&listener).unwrap() && sockopt::socket_reuseaddr(&listener).unwrap()
        );
        if family == 10 {
            assert_eq!(sockopt::ipv6_v6only(&listener).unwrap(), v6only, "{number}");
        }
        assert_eq!(rustix::fs::fstat(&listener).unwrap().st_uid, 4321, "{number}");
        let flags = rustix::fs::fcntl_getfl(&listener).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "{number} does not block");
    }
    let environment = server.environment();
    assert_eq!(environment["LISTEN_FDS"], "3");
    assert_eq!(environment["LISTEN_PID"], server.0.id().to_string());
    let [one, two, three] = addresses.map(|address| address.socket.port());
    assert_eq!(environment["LISTEN_FDNAMES"], format!("{one}:{two}:{three}"));
}

#[tokio::test]
async fn a_server_learns_how_often_to_say_that_it_is_well() {
    let Some(cgroup) = Cgroup::new("watchdog") else { return };
    let job = Exec { watchdog: Some(Duration::from_millis(1500)), ..sleep(&cgroup) };
    let server = launch(launcher(&[]), &job).await.unwrap();
    let environment = server.environment();
    assert_eq!(environment["WATCHDOG_USEC"], "1500000");
    assert_eq!(environment["WATCHDOG_PID"], server.0.id().to_string());
}

#[tokio::test]
async fn the_listener_can_be_standard_input() {
    let Some(cgroup) = Cgroup::new("stdin") else { return };
    let job = Exec { socket: Socket::Stdin(address("::1", false)), ..sleep(&cgroup) };
    let server = launch(launcher(&[]), &job).await.unwrap();
    assert!(sockopt::socket_acceptconn(server.descriptor(0)).unwrap());
    assert_eq!(server.descriptors().len(), 3);
}

#[tokio::test]
async fn output_is_appended_to_files() {
    let Some(cgroup) = Cgroup::new("output") else { return };
    let directory = env::temp_dir().join(format!("dist-ctl-test-output-{}", process::id()));
    fs::create_dir(&directory).unwrap();
    let (out, err) = (directory.join("out"), directory.join("err"));
    fs::write(&out, "before\n").unwrap();
    let job = Exec {
        command: ["sh", "-c", "echo out; echo err >&2"].map(Into::into).into(),
        stdout: Output::File(out.clone()),
        stderr: Output::File(err.clone()),
        ..sleep(&cgroup)
    };
    let mut server = launch(launcher(&[]), &job).await.unwrap();
    assert!(server.0.wait().unwrap().success());

    assert_eq!(fs::read_to_string(&out).unwrap(), "before\nout\n");
    assert_eq!(fs::read_to_string(&err).unwrap(), "err\n");
    assert_eq!(fs::metadata(&err).unwrap().mode() & 0o137, 0, "others can read or run it");
    fs::remove_dir_all(&directory).unwrap();
}

#[tokio::test]
async fn what_cannot_be_done_is_said_in_a_sentence() {
    let Some(cgroup) = Cgroup::new("refused") else { return };
    let script = env::temp_dir().join(format!("dist-ctl-test-script-{}", process::id()));
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = (taken.local_addr().unwrap(), taken);
    let nowhere = ListenAddress { socket: ([192, 0, 2, 1], 80).into(), v6only: false };
    let run = |command: &str| Exec { command: vec![command.into()], ..sleep(&cgroup) };
    let limit = Limit { resource: Resource::Nofile, soft: Some(1 << 40), hard: None };
    let table = [
        (
            "a program that PATH does not have",
            run("no-such-program"),
            "run no-such-program: No such file or directory (searched PATH=/usr/bin:/bin)".to_owned(),
        ),
        (
            "no PATH",
            Exec { environment: vec![], ..run("no-such-program") },
            "run no-such-program: No such file or directory (its environment has no PATH: searched /bin and \
             /usr/bin)"
                .into(),
        ),
        ("a missing file", run("/no/such"), "run /no/such: No such file or directory".into()),
        ("a directory", run("/etc"), "run /etc: Permission denied".into()),
        (
            "a missing interpreter",
            run(script.to_str().unwrap()),
            format!("run {}: the file is there, but not the interpreter it names", script.display()),
        ),
        ("no command", Exec { command: vec![], ..sleep(&cgroup) }, "run its command: there is none".into()),
        (
            "a missing directory",
            Exec { directory: Some("/srv/x".into()), ..sleep(&cgroup) },
            "change to directory /srv/x: No such file or directory".into(),
        ),
        (
            "a missing cgroup",
            Exec { cgroup: "/no/cgroup".into(), ..sleep(&cgroup) },
            "enter cgroup /no/cgroup: No such file or directory".into(),
        ),
        (
            "output to a directory",
            Exec { stdout: Output::File("/etc".into()), ..sleep(&cgroup) },
            "open /etc for standard output: Is a directory".into(),
        ),
        (
            "a limit that is none",
            Exec { limits: vec![limit], ..sleep(&cgroup) },
            "limit nofile to 1099511627776:unlimited: Operation not permitted".into(),
        ),
        (
            "a CPU that cannot be",
            Exec { cpus: vec![0, 5000], ..sleep(&cgroup) },
            "run on CPUs 0,5000: 5000 is over the kernel's limit".into(),
        ),
        (
            "a port that is taken",
            Exec {
                socket: Socket::Stdin(ListenAddress { socket: taken.0, v6only: false }),
                ..sleep(&cgroup)
            },
            format!(
                "bind {}: Address already in use (another program has it, without SO_REUSEPORT or as \
                 another user)",
                taken.0
            ),
        ),
        (
            "an address of somebody else",
            Exec { socket: Socket::Systemd(vec![nowhere]), ..sleep(&cgroup) },
            "bind 192.0.2.1:80: Cannot assign requested address (no interface of this machine has it)".into(),
        ),
    ];
    for (name, job, expected) in table {
        assert_eq!(refusal(&job).await, expected, "{name}");
    }
    fs::remove_file(&script).unwrap();
}

#[tokio::test]
async fn a_user_that_one_may_not_become_is_refused() {
    let Some(cgroup) = Cgroup::new("setuid") else { return };
    let user = Identity { name: "shop".into(), uid: 4321, gid: 4321, groups: vec![] };
    let scene = ["setpriv", "--bounding-set=-setgid", "--"];
    let refused = launch(launcher(&scene), &Exec { user: Some(user), ..sleep(&cgroup) }).await;
    assert_eq!(refused.err().unwrap().to_string(), "become user shop: Operation not permitted");
}

#[tokio::test]
async fn a_launcher_that_dies_before_it_could_start_the_server_is_noticed() {
    let Some(cgroup) = Cgroup::new("dies") else { return };
    let refused = launch(Command::new("true"), &sleep(&cgroup)).await;
    assert_eq!(refused.err().unwrap().to_string(), "start it: its launcher ended before it could");
}

#[tokio::test]
async fn a_launcher_that_hangs_is_not_waited_for_without_end() {
    let Some(cgroup) = Cgroup::new("hangs") else { return };
    let mut hanging = Command::new("sleep");
    hanging.arg("60");
    let refused = launch(hanging, &sleep(&cgroup)).await;
    assert_eq!(refused.err().unwrap().to_string(), "start it: no answer within 10s");
}

#[tokio::test]
async fn a_job_over_the_limit_is_not_sent() {
    let Some(cgroup) = Cgroup::new("long") else { return };
    let job = Exec { command: vec!["x".repeat(MAX_JOB as usize)], ..sleep(&cgroup) };
    let refused = launch(Command::new("true"), &job).await.err().unwrap().to_string();
    assert!(refused.starts_with("send the job to its launcher: it has 8388"), "{refused}");
}

#[test]
fn a_job_that_is_cut_short_or_nonsense_starts_nothing() {
    let launch = |sent: &[u8]| {
        let (theirs, mut ours) = StdUnixStream::pair().unwrap();
        let mut launcher = launcher(&[]);
        let mut process = launcher.stdin(OwnedFd::from(theirs)).spawn().unwrap();
        drop(launcher);
        ours.write_all(sent).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = vec![];
        ours.read_to_end(&mut answer).unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(127));
        read_error(&answer).to_string()
    };
    assert_eq!(launch(b""), "read the job: failed to fill whole buffer");
    assert_eq!(launch(b"\x09\0\0\0{\"comm\""), "read the job: failed to fill whole buffer");
    assert_eq!(launch(b"\x02\0\0\0{}"), "read the job: missing field `command` at line 1 column 2");
    assert_eq!(launch(b"\xff\xff\xff\xff"), "read the job: it has 4294967295 bytes, over 8388608");
}

#[test]
fn a_job_reads_back_as_it_was_written() {
    let job = Exec {
        limits: vec![
            Limit { resource: Resource::Sigpending, soft: Some(3), hard: None },
            Limit { resource: Resource::As, soft: None, hard: None },
        ],
        socket: Socket::Systemd(vec![address("::", true), address("::", false), address("0.0.0.0", false)]),
        user: Some(Identity { name: "shop".into(), uid: 1, gid: 2, groups: vec![3] }),
        stdout: Output::File("/var/log/shop".into()),
        ..sleep(&Cgroup("/sys/fs/cgroup/does/not/exist".into()))
    };
    let text = encode(&job).unwrap();
    assert_eq!(u32::from_le_bytes(*text.first_chunk().unwrap()) as usize, text.len() - 4);
    assert_eq!(serde_json::from_slice::<Exec>(&text[4..]).unwrap(), job);
}

#[test]
fn a_launcher_that_has_ended_has_not_become_a_server() {
    use std::os::unix::process::CommandExt as _;
    let directory = env::temp_dir().join(format!("dist-ctl-test-ended-{}", process::id()));
    fs::create_dir_all(&directory).unwrap();
    // Its words are all that tells a launcher.
    fs::write(directory.join("launch"), "read job").unwrap();
    let mut launcher = Command::new("/bin/sh");
    launcher.arg0("dist-ctl").arg("launch").current_dir(&directory).stdin(Stdio::piped());
    let mut launcher = launcher.spawn().unwrap();
    let mut server = Command::new("sleep").arg("100").spawn().unwrap();
    let is = |child: &Child| (is_launcher(child.id()), is_server(child.id()));
    let wait_until = |child: &Child, wanted: (bool, bool)| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while is(child) != wanted {
            assert!(Instant::now() < deadline, "{:?}, and not {wanted:?}", is(child));
        }
    };
    // In the middle of an exec a process has no words.
    wait_until(&launcher, (true, false));
    wait_until(&server, (false, true));
    // Nobody has waited for it yet.
    drop(launcher.stdin.take());
    wait_until(&launcher, (false, false));
    launcher.wait().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    fs::remove_dir_all(directory).unwrap();
}
