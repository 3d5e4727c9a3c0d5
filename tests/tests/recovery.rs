//! The distributor is killed at random moments, hundreds of times, while everything goes on.
//!
//! Which moments is up to a seed, which is printed; `RECOVERY_SEED` runs the same ones again, as
//! far as the machine's own pace allows. What clients notice is nothing at all: that is checked
//! by each of them, and in the end by comparing what they did with what was counted.

#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::setpriority_process;
use serde_json::{Value, json};
use tests::{
    app::{App, list, quoted},
    client::{self, Client, Line},
    host::{Host, Up, V4, heavy},
    network::Clients,
    process::{Process, Signal},
    status::{Service, Status},
    wait::{fewer, patience, seconds, try_for, wait_for, wait_until_eq},
};

/// Clients that come all the time.
const THREADS: usize = 20;
/// Servers of the service to which they come, and their places where there are limits.
const SERVERS: usize = 4;
const LIMIT: u32 = 4;
/// Those who wait at a time where their order is looked at.
const IN_LINE: usize = 40;

fn line_address() -> SocketAddr {
    "127.0.0.1:9090".parse().expect("an address")
}

#[test]
fn nobody_notices_200_deaths_of_the_distributor() {
    run(Waiting::Allowed, fewer(200, 20));
}

#[test]
fn nobody_notices_them_where_nobody_may_wait_either() {
    run(Waiting::Refused, fewer(100, 10));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Allowed,
    Refused,
}

/// Xorshift with a good start (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn pause(&mut self, milliseconds: u64) {
        thread::sleep(Duration::from_micros(self.below(milliseconds * 1000)));
    }

    fn another(&mut self) -> Self {
        Self(self.below(u64::MAX) | 1)
    }
}

fn random() -> Random {
    let seed = env::var("RECOVERY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| {
        SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970").as_nanos() as u64
    });
    println!("RECOVERY_SEED={seed}");
    Random(seed | 1)
}

/// `app` has the clients, `line` those whose order is looked at, and `victims` are killed.
fn toml(host: &Host, waiting: Waiting) -> String {
    let service = |name: &str, port: u16, servers: usize, lines: &str| {
        let listen = format!("[::]:{port}");
        let command = [&host.test_server(), "--name", "{name}", "--listen", &listen].map(str::to_owned);
        format!(
            "[service.{name}]\nlisten = [{}]\n[service.{name}.server]\ncommand = {}\ncount = {servers}\n\
             stop_timeout = \"3s\"\ndrain_timeout = \"3s\"\n{lines}\n",
            quoted(&listen),
            list(&command),
        )
    };
    let app = match waiting {
        Waiting::Allowed => format!("limit = {LIMIT}"),
        Waiting::Refused => "[service.app.waiting]\ncapacity = 0".to_owned(),
    };
    service("app", 8080, SERVERS, &app)
        + &service("line", 9090, 2, "limit = 1")
        + &service(
            "victims",
            7070,
            2,
            "restart = { delay = \"10ms\", max_delay = \"100ms\", give_up_after = 1000 }",
        )
}

/// What all threads share.
struct Run<'a> {
    up: &'a Up<'a>,
    over: AtomicBool,
    /// Connections to `app` that were served.
    served: AtomicU64,
    /// Servers of `victims` that were killed.
    victims: AtomicU64,
}

impl Run<'_> {
    /// Work of one of the threads. Whoever fails ends it for all.
    fn work(&self, name: &str, work: impl FnOnce() -> io::Result<()>) -> Result<(), String> {
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&self.over);
        work().map_err(|error| format!("{name}: {error}"))
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Asks over the control socket. `None` if there is no answer: nobody is there, or he dies.
    fn ask(&self, request: &Value) -> Option<Value> {
        ask(&self.up.control_socket(), request).ok()
    }

    fn status(&self) -> Option<Status> {
        let answer = self.ask(&json!({"command": "status"}))?;
        Some(Status::parse(&answer["status"].to_string()))
    }

    /// The answer of whoever is there next.
    fn wait_status(&self) -> Status {
        wait_for("an answer", seconds(20.0), || self.status())
    }
}

fn ask(socket: &Path, request: &Value) -> io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(seconds(5.0)))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

fn pids(service: &Service) -> Vec<Option<i32>> {
    service.servers.iter().map(|server| server.pid).collect()
}

fn run(waiting: Waiting, kills: usize) {
    let _alone = heavy();
    let mut random = random();
    let host = Host::new();
    let wire = Clients::join(1).expect("join a network of clients");
    let up = host.start_toml(&toml(&host, waiting));
    up.wait_ready();
    let before = up.status();
    let run = Run { up: &up, over: false.into(), served: 0.into(), victims: 0.into() };
    let took = thread::scope(|scope| {
        let (run, wire) = (&run, &wire);
        let mut workers = Vec::new();
        for _ in 0..THREADS {
            let random = random.another();
            workers.push(scope.spawn(move || run.work("a client", || come_and_go(run, random))));
        }
        let [operator, killer] = [random.another(), random.another()];
        workers.extend([
            scope.spawn(move || run.work("a slow handshake", || shake_hands_slowly(run, wire))),
            scope.spawn(move || run.work("the line", || stand_in_line(run))),
            scope.spawn(move || run.work("the operator", || operate(run, operator))),
            scope.spawn(move || run.work("the victims", || kill_servers(run, killer))),
        ]);
        let took = kill_distributors(run, &mut random, kills, &before);
        run.over.store(true, Ordering::Relaxed);
        for worker in workers {
            match worker.join() {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => panic!("{failure}: {:#?}", run.wait_status().service("app").outcomes),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        took
    });
    println!("{}", summary(took, &run));
    compare(&run, waiting, &before);
}

/// Kills so many, each at a random moment: while it works, or while it still takes over. Gives how
/// long each next one took until all servers were ready.
fn kill_distributors(run: &Run<'_>, random: &mut Random, kills: usize, before: &Status) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut killed = 0;
    while killed < kills && run.goes_on() {
        random.pause(100);
        let old = run.up.distributor();
        let mut start = Instant::now();
        old.signal(Signal::KILL);
        killed += 1;
        if random.below(4) == 0 {
            let next = next_distributor(run, old);
            random.pause(40);
            start = Instant::now();
            next.signal(Signal::KILL);
            killed += 1;
        }
        let status =
            try_for(seconds(20.0), || run.status().filter(|status| status.services.iter().all(is_steered)));
        took.push(start.elapsed());
        let status = status.unwrap_or_else(|| panic!("after {killed} kills nobody steers: {}", run.up.log()));
        for name in ["app", "line"] {
            assert_eq!(pids(status.service(name)), pids(before.service(name)), "after {killed} kills");
        }
    }
    took
}

fn next_distributor(run: &Run<'_>, old: Process) -> Process {
    wait_for("the next distributor", seconds(20.0), || Some(run.up.distributor()).filter(|next| *next != old))
}

/// One of the victims may be on its way at any time.
fn is_steered(service: &Service) -> bool {
    service.name == "victims" || service.is_ready()
}

fn summary(mut took: Vec<Duration>, run: &Run<'_>) -> String {
    took.sort_unstable();
    let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
    // A busy machine takes its time; ten times what it is to be is too much everywhere.
    assert!(median < seconds(2.0), "the next distributor steers after {median:?}");
    format!(
        "the next distributor steers after {median:.1?} (median), {most:.1?} at most, of {}; {} connections, \
         patience {}",
        took.len(),
        run.served.load(Ordering::Relaxed),
        patience()
    )
}

/// What was counted is what was done, over all distributors.
fn compare(run: &Run<'_>, waiting: Waiting, before: &Status) {
    let served = run.served.load(Ordering::Relaxed);
    wait_until_eq("connections", seconds(15.0), vec![0; SERVERS], || {
        run.wait_status().service("app").connections()
    });
    wait_until_eq("victims that are ready", seconds(15.0), true, || {
        run.wait_status().service("victims").is_ready()
    });
    let status = run.wait_status();
    let app = status.service("app");
    println!("{:?}", app.outcomes);
    assert_eq!(app.totals().iter().sum::<u64>(), served, "totals");
    let [directly, waited, handed_over, closed] =
        app.outcomes(["established", "established_waiting", "handed_over", "closed"]);
    assert_eq!(directly + waited, served);
    assert_eq!((handed_over, closed), (waited, served));
    let never = [
        "closed_waiting",
        "dismissed",
        "move_failed",
        "moved_dead",
        "owner_lost",
        "parked_behind",
        "refused_capacity",
        "refused_closing",
        "refused_limit",
        "refused_no_room",
        "untagged",
    ];
    assert_eq!(app.outcomes(never), [0; 11]);
    assert_eq!((app.waiting.now, app.waiting.served, app.waiting.wait.count), (0, waited, waited));
    match waiting {
        Waiting::Allowed => assert!(waited > 0, "somebody has waited"),
        Waiting::Refused => assert_eq!(waited, 0),
    }
    for service in ["app", "line"].map(|name| status.service(name)) {
        assert_eq!(pids(service), pids(before.service(&service.name)));
        for (server, before) in service.servers.iter().zip(&before.service(&service.name).servers) {
            assert_eq!((server.restarts, &server.since), (0, &before.since), "{}", server.name);
            if let Some(limit) = before.limit {
                assert!(server.connections_max <= limit.max(8), "{server:?}");
            }
        }
    }
    let line = status.service("line");
    assert_eq!(line.outcomes(["parked_behind", "closed_waiting", "move_failed"]), [0; 3]);
    let restarts: u64 = status.service("victims").servers.iter().map(|server| server.restarts).sum();
    assert_eq!(restarts, run.victims.load(Ordering::Relaxed), "restarts");
    for service in &status.services {
        assert_eq!((service.drift.found, service.drift.repaired), (0, 0), "{}", service.name);
    }
}

/// A client after another, each for a moment.
fn come_and_go(run: &Run<'_>, mut random: Random) -> io::Result<()> {
    // The servers come first.
    setpriority_process(None, 10)?;
    while run.goes_on() {
        let mut client = Client::open(V4)?;
        run.served.fetch_add(1, Ordering::Relaxed);
        random.pause(10);
        match random.below(3) {
            0 if !client.is_served() => return Err(io::Error::other("it was served, and is not any more")),
            1 => {
                client.say("close")?;
                client.wait_for_end()?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Handshakes that are half done while a distributor dies: their answer is lost, and comes a second
/// later.
fn shake_hands_slowly(run: &Run<'_>, wire: &Clients) -> io::Result<()> {
    let target = SocketAddr::new(wire.server_v4(), 8080);
    while run.goes_on() {
        wire.cut(0)?;
        let begun = wire.network.run(|| client::begin(target, Some(wire.v4(0)), 3));
        // Longer than a distributor lives here, and shorter than a SYN is repeated after.
        thread::sleep(Duration::from_millis(200));
        wire.mend(0)?;
        for stream in begun?.finish() {
            drop(Client::greeted(stream?)?);
            run.served.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Those who wait are served in the order in which they came. Nobody comes while a place is free,
/// so nobody may overtake, whether or not there is a distributor.
fn stand_in_line(run: &Run<'_>) -> io::Result<()> {
    let address = line_address();
    let mut held = (0..2).map(|_| Client::open(address)).collect::<io::Result<Vec<_>>>()?;
    while run.goes_on() {
        let come = || (0..IN_LINE).map(|_| client::connect(address)).collect::<io::Result<_>>();
        let streams = client::on_one_cpu(come)?;
        let mut line = Line::behind(held, streams)?;
        for place in 0..IN_LINE {
            thread::sleep(Duration::from_millis(2));
            line.free();
            let number = line.serve()?;
            if number != place {
                return Err(io::Error::other(format!("number {number} was served as number {place}")));
            }
        }
        held = line.served.into();
    }
    Ok(())
}

/// Changes weights and limits. What was answered to be done is done, whoever dies then.
fn operate(run: &Run<'_>, mut random: Random) -> io::Result<()> {
    let limited = run.wait_status().service("app").servers[0].limit.is_some();
    while run.goes_on() {
        random.pause(50);
        let server = format!("app/{}", 1 + random.below(SERVERS as u64));
        let what = if limited && random.below(2) == 0 { "limit" } else { "weight" };
        let value = if what == "limit" { 2 + random.below(7) } else { 50 + random.below(200) };
        let request = json!({"command": what, "server": server, what: value});
        // Whether it was done is not known before there is an answer, so it is said again.
        let answer = wait_for("an answer", seconds(20.0), || run.ask(&request));
        if answer["ok"] != true {
            return Err(io::Error::other(format!("{request}: {answer}")));
        }
        let status = run.wait_status();
        let server = status.service("app").server(&server);
        let is = if what == "limit" { server.limit } else { Some(server.weight) };
        if is != Some(value) {
            return Err(io::Error::other(format!("{request} was done, and now it is {is:?}")));
        }
    }
    Ok(())
}

/// Kills a server now and then, and waits for the next instance of it.
fn kill_servers(run: &Run<'_>, mut random: Random) -> io::Result<()> {
    while run.goes_on() {
        random.pause(3000);
        let victim = random.below(2) as usize;
        let pid = |status: &Status| status.service("victims").servers[victim].pid;
        let old = wait_for("a victim", seconds(20.0), || pid(&run.wait_status()));
        let Some(process) = Process::find(old) else { continue };
        process.signal(Signal::KILL);
        run.victims.fetch_add(1, Ordering::Relaxed);
        wait_for("the next instance", seconds(40.0), || {
            let status = run.wait_status();
            (pid(&status).is_some_and(|pid| pid != old) && status.service("victims").is_ready()).then_some(())
        });
    }
    Ok(())
}

#[test]
fn a_stop_that_was_asked_for_goes_on_whoever_is_killed() {
    let host = Host::new();
    let app = App { server: "drain_timeout = \"10s\"\n".into(), ..App::of(&host, 2) };
    let up = host.up(&app);
    let held = client::hold(V4, 4);
    let ended = thread::scope(|scope| {
        let down = scope.spawn(|| up.run(&["down"]));
        wait_for("the stop", seconds(10.0), || up.log().contains("stops: ").then_some(()));
        up.distributor().kill(seconds(5.0));
        drop(held);
        down.join().expect("it ends")
    });
    ended.expect_done();
    assert!(up.has_stopped().success());
}
