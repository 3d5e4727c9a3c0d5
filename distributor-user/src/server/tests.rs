//! The story of one server at a time, then whatever may happen to any.
#![forbid(unsafe_code)]

use proptest::prelude::*;

use super::*;
use crate::config::Restart;

fn policy() -> Supervision {
    Supervision {
        listen: vec!["[::]:8080".parse().unwrap()],
        readiness: Readiness::Listening,
        start_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(30),
        stop_signal: Signal::TERM,
        stop_timeout: Duration::from_secs(10),
        watchdog: None,
        remedies: Remedies::default(),
        backoff: Backoff::try_new(Restart {
            delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(30),
            healthy_after: Duration::from_secs(20),
            give_up_after: Some(4),
        })
        .unwrap(),
        once: false,
    }
}

/// A server and its time. Actions are told as short words, log lines apart.
#[derive(Debug)]
struct Story {
    server: Server,
    now: Instant,
    policy: Supervision,
    log: Vec<String>,
}

impl Story {
    fn new() -> Self {
        Self::with(policy())
    }

    fn with(policy: Supervision) -> Self {
        let now = Instant::now();
        Self { server: Server::new(Instance(0), now), now, policy, log: Vec::new() }
    }

    /// Launched and adopted, 300 ms ago.
    fn ready() -> Self {
        let mut story = Self::new();
        story.tell(Event::Start);
        story.launched();
        story.report(Report::ListenerAdopted { address: 0 });
        assert_eq!(story.status(), ServerState::Ready);
        story.pass(300);
        story
    }

    fn tell(&mut self, event: Event) -> Vec<String> {
        let (server, actions) = self.server.clone().step(event, self.now, 0, &self.policy);
        self.server = server;
        let mut words = Vec::new();
        for action in actions {
            words.push(match action {
                Action::Launch { instance } => format!("launch {instance}"),
                Action::Include { instance } => format!("include {instance}"),
                Action::Exclude { instance } => format!("exclude {instance}"),
                Action::Withhold { instance } => format!("withhold {instance}"),
                Action::MoveQueue { instance } => format!("move the queue of {instance}"),
                Action::Signal { instance, signal, to } => {
                    let name = signal_hook::low_level::signal_name(signal.as_raw()).unwrap();
                    let to = match to {
                        Recipient::Main => "main",
                        Recipient::Everyone => "everyone",
                    };
                    format!("{name} to {to} of {instance}")
                }
                Action::KillCgroup { instance } => format!("kill {instance}"),
                Action::RemoveInstance { instance } => format!("remove {instance}"),
                Action::Log { level, sentence } => {
                    self.log.push(format!("{level} {sentence}"));
                    continue;
                }
            });
        }
        words
    }

    fn report(&mut self, report: Report) -> Vec<String> {
        self.tell(Event::Of(self.server.instance(), report))
    }

    fn launched(&mut self) {
        self.report(Report::Launched { pid: 4711 });
    }

    fn exits(&mut self, exit: Exit) -> Vec<String> {
        self.report(Report::MainExited { exit, others_left: false })
    }

    fn exits_leaving_others(&mut self, exit: Exit) -> Vec<String> {
        self.report(Report::MainExited { exit, others_left: true })
    }

    fn pass(&mut self, milliseconds: u64) {
        self.now += Duration::from_millis(milliseconds);
    }

    /// Lets the time until the deadline pass, and tells it.
    fn deadline(&mut self) -> Vec<String> {
        self.now = self.server.deadline(&self.policy).expect("a deadline");
        self.tell(Event::Tick)
    }

    /// In milliseconds.
    fn until_deadline(&self) -> u128 {
        let deadline = self.server.deadline(&self.policy).expect("a deadline");
        (deadline - self.now).as_millis()
    }

    fn status(&self) -> ServerState {
        self.server.status()
    }

    fn reason(&self) -> String {
        let reason = self.server.reason(self.now, &self.policy);
        reason.unwrap_or_default()
    }

    fn last_log(&self) -> &str {
        self.log.last().expect("a log line")
    }
}

const NOTHING: [&str; 0] = [];

// -- Starting and being ready

#[test]
fn server_is_in_the_plan_once_it_listens() {
    let mut story = Story::new();
    assert_eq!(story.status(), ServerState::Stopped);
    assert_eq!(story.tell(Event::Start), ["launch 1"]);
    assert_eq!(story.reason(), "is being launched");
    story.launched();
    assert_eq!(story.server.pid(), Some(4711));
    assert_eq!(story.status(), ServerState::Starting);
    assert_eq!(story.reason(), "waits for a listener on [::]:8080");
    story.pass(400);
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, ["include 1"]);
    assert_eq!(story.status(), ServerState::Ready);
    assert_eq!(story.reason(), "");
    assert_eq!(story.last_log(), "INFO is ready after 0.4s; gets connections now");
    assert_eq!(story.server.deadline(&story.policy), None);
}

#[test]
fn server_of_two_addresses_needs_both() {
    let mut story = Story::with(Supervision {
        listen: vec!["[::]:8080".parse().unwrap(), "[::]:8443".parse().unwrap()],
        ..policy()
    });
    story.tell(Event::Start);
    story.launched();
    assert_eq!(story.reason(), "waits for a listener on [::]:8080 and [::]:8443");
    // nginx has one for each worker.
    for _ in 0..2 {
        let actions = story.report(Report::ListenerAdopted { address: 1 });
        assert_eq!(actions, NOTHING);
    }
    assert_eq!(story.reason(), "waits for a listener on [::]:8080");
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, ["include 1"]);
}

#[test]
fn server_that_notifies_is_ready_when_it_says_so_and_listens() {
    let listens = Report::ListenerAdopted { address: 0 };
    for (order, between) in [
        ([listens.clone(), Report::NotifyReady], "listens, waits for READY=1"),
        ([Report::NotifyReady, listens], "waits for a listener on [::]:8080"),
    ] {
        let mut story = Story::with(Supervision { readiness: Readiness::Notify, ..policy() });
        story.tell(Event::Start);
        story.launched();
        let [first, second] = order;
        assert_eq!(story.report(first), NOTHING);
        assert_eq!(story.reason(), between);
        assert_eq!(story.report(second), ["include 1"]);
    }
}

#[test]
fn inherited_listener_gets_nothing_before_the_command_runs() {
    let mut story = Story::new();
    story.tell(Event::Start);
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, NOTHING);
    assert_eq!(story.report(Report::Launched { pid: 4711 }), ["include 1"]);
}

#[test]
fn server_that_is_never_ready_is_stopped_and_counts_as_failed() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    assert_eq!(story.until_deadline(), 60_000);
    assert_eq!(story.deadline(), ["SIGTERM to main of 1"]);
    assert_eq!(story.status(), ServerState::Backoff);
    assert_eq!(
        story.reason(),
        "was not ready after 1m00s: waits for a listener on [::]:8080; asked to stop, killed in 10s"
    );
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1"]);
    assert_eq!(
        story.reason(),
        "was not ready after 1m00s: waits for a listener on [::]:8080; next start in 1s (attempt 2)"
    );
    assert_eq!(story.deadline(), ["launch 2"]);
}

#[test]
fn server_that_listens_elsewhere_is_said_to() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    for _ in 0..2 {
        story.report(Report::ListensElsewhere { address: "0.0.0.0:9090".to_owned() });
    }
    assert_eq!(story.reason(), "listens on 0.0.0.0:9090, not on [::]:8080");
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, ["include 1"]);
    assert_eq!(story.reason(), "");
}

#[test]
fn misbound_server_is_stopped_and_not_tried_again_by_itself() {
    let sentence =
        "binds 0.0.0.0:8080, the service listens on [::]:8080: make the server bind :: or change listen";
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    let actions = story.report(Report::Misbound { sentence: sentence.to_owned() });
    assert_eq!(actions, ["SIGTERM to main of 1"]);
    assert_eq!(story.status(), ServerState::Failed);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Failed);
    assert_eq!(story.reason(), format!("{sentence}; resume it to try again"));
    assert_eq!(story.last_log(), format!("ERROR {sentence}; not started again until it is resumed"));
    assert_eq!(story.server.deadline(&story.policy), None);
    assert_eq!(story.tell(Event::Start), NOTHING);
    assert_eq!(story.tell(Event::Resume), ["launch 2"]);
}

#[test]
fn server_misbound_while_ready_leaves_the_plan_first() {
    let mut story = Story::ready();
    let actions = story.report(Report::Misbound { sentence: "binds 0.0.0.0:8080".to_owned() });
    assert_eq!(actions, ["exclude 1", "SIGTERM to main of 1"]);
}

#[test]
fn server_that_closes_its_listener_is_starting_again() {
    let mut story = Story::ready();
    let actions = story.report(Report::ListenerGone { address: 0 });
    assert_eq!(actions, ["exclude 1"]);
    assert_eq!(story.status(), ServerState::Starting);
    assert_eq!(story.reason(), "has no listener on [::]:8080 now, waits for one");
    assert_eq!(story.until_deadline(), 60_000);
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, ["include 1"]);
}

#[test]
fn server_that_keeps_its_listener_closed_is_drained_and_replaced() {
    let mut story = Story::ready();
    story.report(Report::ListenerGone { address: 0 });
    assert_eq!(story.deadline(), ["exclude 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to main of 1"]);
    assert_eq!(story.exits(Exit::Code(0)), ["remove 1", "launch 2"]);
}

// -- Ending by itself

#[test]
fn failed_starts_wait_longer_each_time() {
    let mut story = Story::with(Supervision {
        backoff: Backoff::try_new(Restart {
            delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(5),
            healthy_after: Duration::from_secs(20),
            give_up_after: None,
        })
        .unwrap(),
        ..policy()
    });
    story.tell(Event::Start);
    for (wait, sentence) in [
        (1_000, "WARN exited with 1 after 0.4s; next start in 1s (attempt 2)"),
        (2_000, "WARN exited with 1 after 0.4s; next start in 2s (attempt 3)"),
        (4_000, "WARN exited with 1 after 0.4s; next start in 4s (attempt 4)"),
        (5_000, "WARN exited with 1 after 0.4s; next start in 5s (attempt 5)"),
        (5_000, "WARN exited with 1 after 0.4s; next start in 5s (attempt 6)"),
    ] {
        story.launched();
        story.pass(400);
        story.exits(Exit::Code(1));
        assert_eq!(story.status(), ServerState::Backoff);
        assert_eq!(story.last_log(), sentence);
        assert_eq!(story.until_deadline(), wait);
        story.deadline();
    }
    assert_eq!(story.server.restarts(), 5);
}

#[test]
fn wait_that_is_left_is_shown() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    story.exits(Exit::Signal(11));
    story.pass(300);
    assert_eq!(story.reason(), "was killed by SIGSEGV after 0ms; next start in 0.7s (attempt 2)");
    assert_eq!(story.tell(Event::Tick), NOTHING);
    assert_eq!(story.status(), ServerState::Backoff);
}

#[test]
fn crash_loop_gives_up_and_says_so() {
    let mut story = Story::new();
    story.tell(Event::Start);
    for _ in 0..3 {
        story.launched();
        story.pass(400);
        story.exits(Exit::Code(101));
        assert_eq!(story.status(), ServerState::Backoff);
        story.deadline();
    }
    story.launched();
    story.pass(400);
    assert_eq!(story.exits(Exit::Code(101)), ["remove 4"]);
    assert_eq!(story.status(), ServerState::Failed);
    assert_eq!(
        story.reason(),
        "exited with 101 after 0.4s; given up after 4 failures in a row; resume it to try again"
    );
    assert_eq!(
        story.last_log(),
        "ERROR exited with 101 after 0.4s; given up after 4 failures in a row; not started again until it is resumed"
    );
    assert_eq!(story.server.last_end(), Some("exited with 101 after 0.4s"));
    assert_eq!(story.server.deadline(&story.policy), None);
}

#[test]
fn resumed_server_starts_with_a_clean_record() {
    let mut story = Story::new();
    story.tell(Event::Start);
    for _ in 0..3 {
        story.launched();
        story.exits(Exit::Code(1));
        story.deadline();
    }
    story.launched();
    story.exits(Exit::Code(1));
    assert_eq!(story.tell(Event::Resume), ["launch 5"]);
    assert_eq!(story.server.restarts(), 3);
    story.launched();
    story.exits(Exit::Code(1));
    assert_eq!(story.reason(), "exited with 1 after 0ms; next start in 1s (attempt 2)");
}

#[test]
fn resume_ends_the_wait() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    story.exits(Exit::Code(1));
    assert_eq!(story.tell(Event::Resume), ["launch 2"]);
}

#[test]
fn first_crash_of_a_server_that_worked_costs_no_wait_and_the_second_does() {
    let mut story = Story::ready();
    let actions = story.exits(Exit::Signal(9));
    assert_eq!(actions, ["exclude 1", "remove 1", "launch 2"]);
    assert_eq!(story.last_log(), "WARN was killed by SIGKILL after 0.3s; started again now");
    assert_eq!(story.server.restarts(), 1);

    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.exits(Exit::Signal(9)), ["exclude 2", "remove 2"]);
    assert_eq!(story.until_deadline(), 2_000);
}

#[test]
fn crash_whose_listeners_are_seen_to_go_first_is_no_failed_start() {
    let mut story = Story::ready();
    let actions = story.report(Report::ListenerGone { address: 0 });
    assert_eq!(actions, ["exclude 1"]);
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1", "launch 2"]);
}

#[test]
fn healthy_run_forgives_earlier_failures() {
    let mut story = Story::new();
    story.tell(Event::Start);
    for _ in 0..3 {
        story.launched();
        story.exits(Exit::Code(1));
        story.deadline();
    }
    assert_eq!(story.server.failures(), 3);
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    story.pass(20_000);
    let actions = story.exits(Exit::Code(1));
    assert_eq!(actions, ["exclude 4", "remove 4", "launch 5"]);
    assert_eq!(story.server.failures(), 0);
}

#[test]
fn long_start_is_no_healthy_run() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    story.pass(50_000);
    story.exits(Exit::Code(1));
    assert_eq!(story.reason(), "exited with 1 after 50s; next start in 1s (attempt 2)");
}

#[test]
fn launch_failure_is_a_failed_start_with_its_sentence() {
    let expected = "could not be started: exec: /srv/app: No such file or directory (os error 2); next start in 1s (attempt 2)";
    let failed = || Report::LaunchFailed {
        sentence: "exec: /srv/app: No such file or directory (os error 2)".to_owned(),
    };

    let mut sentence_first = Story::new();
    sentence_first.tell(Event::Start);
    assert_eq!(sentence_first.report(failed()), ["kill 1"]);
    assert_eq!(sentence_first.report(Report::CgroupEmpty), ["remove 1"]);
    assert_eq!(sentence_first.exits(Exit::Code(127)), NOTHING);
    assert_eq!(sentence_first.reason(), expected);

    let mut exit_first = Story::new();
    exit_first.tell(Event::Start);
    assert_eq!(exit_first.exits(Exit::Code(127)), ["remove 1"]);
    assert_eq!(exit_first.report(failed()), NOTHING);
    assert_eq!(exit_first.reason(), expected);
}

#[test]
fn what_the_machine_lacks_is_waited_for_without_end_and_counts_as_no_failure() {
    let mut story = Story::ready();
    assert_eq!(story.exits(Exit::Signal(9)), ["exclude 1", "remove 1", "launch 2"]);
    assert_eq!((story.server.failures(), story.server.restarts()), (1, 1));
    let lacks = || Report::LaunchLacked { sentence: "start a process: no memory".to_owned() };
    let mut waits = Vec::new();
    for number in 2..30 {
        assert_eq!(story.report(lacks()), [format!("kill {number}")]);
        assert_eq!(story.server.lacks(), Some("could not be started: start a process: no memory"));
        assert_eq!(story.report(Report::CgroupEmpty), [format!("remove {number}")]);
        assert_eq!(story.status(), ServerState::Backoff);
        assert_eq!(story.server.lacks(), Some("could not be started: start a process: no memory"));
        waits.push(story.until_deadline() / 1000);
        assert_eq!(story.deadline(), [format!("launch {}", number + 1)]);
    }
    assert_eq!(waits[..5], [1, 2, 4, 5, 5]);
    assert_eq!((story.server.failures(), story.server.restarts()), (1, 1));
    let warned = story.log.iter().filter(|line| line.contains("no memory") && line.starts_with("WARN"));
    assert_eq!(warned.count(), 1, "{:?}", story.log);
    story.launched();
    assert_eq!(story.server.lacks(), None);
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.status(), ServerState::Ready);
    // And what is its own fault counts on from where it was.
    story.pass(400);
    story.exits(Exit::Code(1));
    assert_eq!((story.server.failures(), story.server.restarts()), (2, 1));
    assert_eq!(story.status(), ServerState::Backoff);
    assert_eq!(story.server.lacks(), None);
}

#[test]
fn a_server_that_is_stopped_while_the_machine_lacks_something_lacks_nothing() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.report(Report::LaunchLacked { sentence: "start a process: no memory".to_owned() });
    story.report(Report::CgroupEmpty);
    assert!(story.server.lacks().is_some());
    story.tell(Event::Stop);
    assert_eq!((story.status(), story.server.lacks()), (ServerState::Stopped, None));
}

#[test]
fn daemon_goes_on_without_its_first_process() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    assert_eq!(story.exits_leaving_others(Exit::Code(0)), NOTHING);
    assert_eq!(story.server.pid(), None);
    let actions = story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(actions, ["include 1"]);
    story.pass(3_000);
    let actions = story.report(Report::CgroupEmpty);
    assert_eq!(actions, ["exclude 1", "remove 1", "launch 2"]);
    assert_eq!(story.server.last_end(), Some("ended with its last process after 3s"));
}

#[test]
fn daemon_is_asked_to_stop_as_a_whole() {
    let mut story = Story::ready();
    story.exits_leaving_others(Exit::Code(0));
    story.tell(Event::Stop);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to everyone of 1"]);
    assert_eq!(story.deadline(), ["kill 1"]);
    assert_eq!(story.report(Report::CgroupEmpty), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn workers_of_a_dead_master_are_killed_before_the_next_start() {
    let mut story = Story::ready();
    let actions = story.exits_leaving_others(Exit::Signal(9));
    assert_eq!(actions, ["exclude 1", "kill 1"]);
    assert_eq!(story.status(), ServerState::Backoff);
    let actions = story.report(Report::CgroupEmpty);
    assert_eq!(actions, ["remove 1", "launch 2"]);
}

#[test]
fn server_that_stops_by_itself_is_drained_and_started_again() {
    let mut story = Story::ready();
    assert_eq!(story.report(Report::NotifyStopping), ["exclude 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.reason(), "stops by itself; its connections have 30s to end");
    assert_eq!(story.exits(Exit::Code(0)), ["remove 1", "launch 2"]);
}

#[test]
fn server_that_stops_by_itself_is_not_asked_to() {
    let mut story = Story::ready();
    assert_eq!(story.report(Report::NotifyStopping), ["exclude 1"]);
    assert_eq!(story.report(Report::DrainDone), NOTHING);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.reason(), "stops by itself; killed in 10s unless it is done");
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1", "launch 2"]);
    assert_eq!((story.server.failures(), story.server.restarts()), (1, 1));
    let expected = "WARN stopped by itself: was killed by SIGKILL after 10s; started again now";
    assert_eq!(story.last_log(), expected);
}

#[test]
fn how_it_ends_decides_whether_one_that_stops_by_itself_has_failed() {
    for (ready_for, exit, failures, restarts) in [
        (20_000, Exit::Code(0), 0, 0),
        // A healthy run forgives: it is a restart all the same.
        (20_000, Exit::Code(1), 0, 1),
        // Started again and again it would be busy with that.
        (19_000, Exit::Code(0), 1, 1),
    ] {
        let mut story = Story::ready();
        story.pass(ready_for - 300);
        story.report(Report::NotifyStopping);
        assert_eq!(story.exits(exit), ["remove 1", "launch 2"]);
        let counted = (story.server.failures(), story.server.restarts());
        assert_eq!(counted, (failures, restarts), "{exit} after {ready_for} ms");
    }
}

#[test]
fn server_that_stops_before_it_was_ready_never_gets_a_connection() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    assert_eq!(story.report(Report::NotifyStopping), ["exclude 1"]);
    assert_eq!(story.report(Report::DrainDone), NOTHING);
    assert_eq!(story.report(Report::ListenerAdopted { address: 0 }), NOTHING);
    assert_eq!(story.exits(Exit::Code(0)), ["remove 1"]);
    assert_eq!(story.reason(), "stopped by itself: exited with 0 after 0ms; next start in 1s (attempt 2)");
}

#[test]
fn stop_takes_the_place_of_one_by_itself() {
    let mut story = Story::ready();
    story.report(Report::NotifyStopping);
    assert_eq!(story.tell(Event::Stop), NOTHING);
    assert_eq!(story.deadline(), ["SIGTERM to main of 1"]);
    assert_eq!(story.exits(Exit::Code(0)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

// -- Another main process

#[test]
fn the_main_process_is_the_one_that_the_server_names() {
    let mut story = Story::ready();
    assert_eq!(story.report(Report::MainPid { pid: 4712 }), NOTHING);
    assert_eq!(story.server.pid(), Some(4712));
    assert_eq!(story.status(), ServerState::Ready);
    assert_eq!(story.exits(Exit::Unknown), ["exclude 1", "remove 1", "launch 2"]);
}

#[test]
fn a_daemon_that_names_its_main_process_is_watched_by_it() {
    let mut story = Story::ready();
    story.exits_leaving_others(Exit::Code(0));
    assert_eq!(story.server.pid(), None);
    story.report(Report::MainPid { pid: 4712 });
    assert_eq!(story.server.pid(), Some(4712));
    assert!(!story.server.awaits_empty());
    story.tell(Event::Stop);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to main of 1"]);
}

#[test]
fn one_whose_main_process_has_failed_names_no_other() {
    let mut story = Story::ready();
    assert_eq!(story.exits_leaving_others(Exit::Code(1)), ["exclude 1", "kill 1"]);
    story.report(Report::MainPid { pid: 4712 });
    assert_eq!(story.server.pid(), None);
}

// -- Saying that it is well

fn watched() -> Story {
    let mut story = Story::with(Supervision { watchdog: Some(Duration::from_secs(10)), ..policy() });
    story.tell(Event::Start);
    story.launched();
    story
}

fn watched_and_ready() -> Story {
    let mut story = watched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.status(), ServerState::Ready);
    story
}

#[test]
fn server_that_says_nothing_for_too_long_is_aborted_and_started_again() {
    let mut story = watched_and_ready();
    for _ in 0..3 {
        assert_eq!(story.until_deadline(), 10_000);
        story.pass(9_999);
        assert_eq!(story.tell(Event::Tick), NOTHING);
        story.report(Report::NotifyWatchdog);
    }
    assert_eq!(story.deadline(), ["exclude 1", "SIGABRT to main of 1"]);
    assert_eq!(story.status(), ServerState::Backoff);
    assert_eq!(story.reason(), "said no WATCHDOG=1 for 10s; got SIGABRT, killed in 10s");
    let log = "WARN said no WATCHDOG=1 for 10s; gets SIGABRT, killed in 10s unless it ends";
    assert_eq!(story.last_log(), log);
    assert_eq!(story.exits(Exit::Signal(6)), ["remove 1", "launch 2"]);
    let end = "said no WATCHDOG=1 for 10s, was killed by SIGABRT after 39s";
    assert_eq!(story.server.last_end(), Some(end));
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.reason(), format!("the one before {end}"));
    assert_eq!(story.server.restarts(), 1);
}

#[test]
fn server_that_survives_sigabrt_is_killed() {
    let mut story = watched_and_ready();
    story.deadline();
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
}

#[test]
fn server_need_not_say_that_it_is_well_before_it_is_ready_nor_when_it_is_ended() {
    let mut story = watched();
    assert_eq!(story.until_deadline(), 60_000);
    story.pass(59_000);
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.until_deadline(), 10_000);
    story.report(Report::ListenerGone { address: 0 });
    assert_eq!(story.until_deadline(), 60_000);
    story.report(Report::ListenerAdopted { address: 0 });
    story.tell(Event::Stop);
    assert_eq!(story.until_deadline(), 30_000);
}

#[test]
fn server_that_triggers_its_watchdog_is_aborted_at_once() {
    let mut story = Story::ready();
    assert_eq!(story.report(Report::NotifyWatchdogTrigger), ["exclude 1", "SIGABRT to main of 1"]);
    assert_eq!(story.reason(), "said WATCHDOG=trigger; got SIGABRT, killed in 10s");

    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    assert_eq!(story.report(Report::NotifyWatchdogTrigger), ["SIGABRT to main of 1"]);

    let mut story = Story::ready();
    story.tell(Event::Stop);
    assert_eq!(story.report(Report::NotifyWatchdogTrigger), ["SIGABRT to main of 1"]);
    assert_eq!(story.exits(Exit::Signal(6)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn server_may_change_how_often_it_says_that_it_is_well() {
    let mut story = watched_and_ready();
    story.pass(9_000);
    story.report(Report::NotifyWatchdogInterval(Some(Duration::from_secs(2))));
    assert_eq!(story.until_deadline(), 2_000);
    story.report(Report::NotifyWatchdogInterval(None));
    assert_eq!(story.server.deadline(&story.policy), None);
    // Also where none is configured, and before it is ready.
    let mut story = Story::new();
    story.tell(Event::Start);
    story.report(Report::NotifyWatchdogInterval(Some(Duration::from_secs(3))));
    story.launched();
    story.pass(5_000);
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.until_deadline(), 3_000);
    // The next instance begins as configured.
    story.exits(Exit::Code(1));
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.server.deadline(&story.policy), None);
}

// -- Asking for more time

#[test]
fn server_that_asks_for_more_time_to_start_or_to_stop_gets_it() {
    let extend = |seconds| Report::NotifyExtendTimeout(Duration::from_secs(seconds));
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    // No shorter than it had anyway.
    story.report(extend(20));
    assert_eq!(story.until_deadline(), 60_000);
    story.pass(50_000);
    story.report(extend(20));
    assert_eq!(story.until_deadline(), 20_000);
    story.report(Report::ListenerAdopted { address: 0 });
    story.tell(Event::Stop);
    // How long connections may go on is not for it to say.
    story.report(extend(100));
    assert_eq!(story.until_deadline(), 30_000);
    story.report(Report::DrainDone);
    story.pass(5_000);
    story.report(extend(8));
    assert_eq!(story.until_deadline(), 8_000);
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    story.report(extend(100));
    assert_eq!(story.until_deadline(), 5_000);
}

#[test]
fn server_that_asks_for_more_time_need_not_say_meanwhile_that_it_is_well() {
    let mut story = watched_and_ready();
    story.report(Report::NotifyExtendTimeout(Duration::from_secs(25)));
    assert_eq!(story.until_deadline(), 25_000);
    story.report(Report::NotifyWatchdog);
    assert_eq!(story.until_deadline(), 10_000);
}

// -- Being stopped

#[test]
fn stop_drains_then_asks_then_kills() {
    let mut story = Story::ready();
    assert_eq!(story.tell(Event::Stop), ["exclude 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.reason(), "is to be stopped; its connections have 30s to end");
    assert_eq!(story.until_deadline(), 30_000);
    assert_eq!(story.deadline(), ["SIGTERM to main of 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.reason(), "is to be stopped; asked to stop, killed in 10s");
    assert_eq!(story.until_deadline(), 10_000);
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    assert_eq!(story.reason(), "is to be stopped; killed, still has processes");
    assert_eq!(story.last_log(), "WARN did not stop within 10s; killed");
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
    assert_eq!(story.reason(), "was killed by SIGKILL after 40s");
}

#[test]
fn stop_waits_no_longer_than_the_last_connection() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to main of 1"]);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn stop_without_a_drain_timeout_asks_at_once() {
    let mut story = Story::ready();
    story.policy.drain_timeout = Duration::ZERO;
    assert_eq!(story.tell(Event::Stop), ["exclude 1", "SIGTERM to main of 1"]);
}

#[test]
fn further_stops_hurry_one_step_each() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    assert_eq!(story.tell(Event::Stop), ["SIGTERM to main of 1"]);
    assert_eq!(story.tell(Event::Stop), ["SIGKILL to main of 1", "kill 1"]);
}

#[test]
fn processes_left_by_the_stopped_main_are_asked_as_well() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    story.report(Report::DrainDone);
    assert_eq!(story.exits_leaving_others(Exit::Signal(15)), ["SIGTERM to everyone of 1"]);
    assert_eq!(story.until_deadline(), 10_000);
    assert_eq!(story.report(Report::CgroupEmpty), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn what_survives_a_kill_is_killed_again_at_growing_intervals() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    story.report(Report::DrainDone);
    story.deadline();
    for pause in [5, 10, 20, 40, 80, 160, 160] {
        assert_eq!(story.until_deadline(), pause * 1000);
        assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    }
    assert_eq!(
        story.last_log(),
        "WARN has processes that survive SIGKILL, 8m05s after it was to stop; killed again, and not started before they are gone"
    );
}

#[test]
fn server_that_never_was_ready_is_stopped_without_a_drain() {
    let mut story = Story::new();
    story.tell(Event::Start);
    assert_eq!(story.tell(Event::Stop), ["SIGTERM to main of 1"]);
    // The exec won the race against the signal.
    assert_eq!(story.report(Report::Launched { pid: 4711 }), NOTHING);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn stopped_launch_that_fails_is_stopped() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.tell(Event::Stop);
    let actions = story.report(Report::LaunchFailed { sentence: "spawn launcher: out of memory".to_owned() });
    assert_eq!(actions, ["kill 1"]);
    assert_eq!(story.report(Report::CgroupEmpty), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
    assert_eq!(story.reason(), "could not be started: spawn launcher: out of memory");
}

#[test]
fn stop_takes_the_place_of_a_restart() {
    let mut story = Story::ready();
    story.exits_leaving_others(Exit::Signal(9));
    assert_eq!(story.tell(Event::Stop), NOTHING);
    assert_eq!(story.report(Report::CgroupEmpty), ["remove 1"]);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn stop_ends_backoff_and_failure() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    story.exits(Exit::Code(1));
    assert_eq!(story.tell(Event::Stop), NOTHING);
    assert_eq!(story.status(), ServerState::Stopped);

    let mut story = Story::new();
    story.tell(Event::Start);
    story.report(Report::Misbound { sentence: "uses MPTCP".to_owned() });
    story.exits(Exit::Signal(15));
    assert_eq!(story.status(), ServerState::Failed);
    assert_eq!(story.tell(Event::Stop), NOTHING);
    assert_eq!(story.status(), ServerState::Stopped);
}

#[test]
fn start_during_a_stop_is_not_forgotten() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    assert_eq!(story.tell(Event::Start), NOTHING);
    story.report(Report::DrainDone);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1", "launch 2"]);
    assert_eq!(story.server.restarts(), 0);
}

// -- Around it

#[test]
fn event_of_an_earlier_instance_changes_nothing() {
    let mut story = Story::ready();
    story.exits(Exit::Signal(9));
    let before = story.server.clone();
    for report in [
        Report::NotifyReady,
        Report::ListenerAdopted { address: 0 },
        Report::CgroupEmpty,
        Report::MainExited { exit: Exit::Code(0), others_left: false },
    ] {
        assert_eq!(story.tell(Event::Of(Instance(1), report)), NOTHING);
    }
    assert_eq!(story.server, before);
}

/// As the next distributor reads it.
fn written_and_read(server: &Server) -> Server {
    serde_json::from_str(&serde_json::to_string(server).unwrap()).unwrap()
}

#[test]
fn the_next_distributor_goes_on_where_the_one_before_was() {
    let mut story = Story::ready();
    story.exits(Exit::Code(1));
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.server.failures(), 1);
    story.server = written_and_read(&story.server);
    assert!(story.server.is_included());
    assert_eq!(story.server.pid(), Some(4711));
    assert_eq!(story.exits(Exit::Code(1)), ["exclude 2", "remove 2"]);
    assert!(story.reason().contains("(attempt 3)"), "{}", story.reason());
    story.server = written_and_read(&story.server);
    assert_eq!(story.status(), ServerState::Backoff);
    assert_eq!(story.deadline(), ["launch 3"]);
    assert_eq!(story.server.restarts(), 2);
}

#[test]
fn under_a_new_monitor_a_server_that_was_given_up_is_started() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    let sentence = "binds it wrongly".to_owned();
    story.report(Report::Misbound { sentence });
    story.exits(Exit::Signal(15));
    assert_eq!(story.status(), ServerState::Failed);
    story.server = written_and_read(&story.server).afresh(story.now);
    assert_eq!(story.tell(Event::Start), ["launch 2"]);
}

#[test]
fn one_that_was_being_stopped_is_started_again_under_a_new_monitor() {
    let mut story = Story::ready();
    story.tell(Event::Stop);
    assert_eq!(story.status(), ServerState::Draining);
    story.server = written_and_read(&story.server).afresh(story.now);
    assert_eq!(story.tell(Event::Start), NOTHING);
    story.report(Report::DrainDone);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1", "launch 2"]);
}

#[test]
fn one_that_was_being_given_up_is_started_under_a_new_monitor() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    let sentence = "binds it wrongly".to_owned();
    assert_eq!(story.report(Report::Misbound { sentence }), ["SIGTERM to main of 1"]);
    story.server = written_and_read(&story.server).afresh(story.now);
    assert_eq!(story.tell(Event::Start), NOTHING);
    assert_eq!(story.exits(Exit::Signal(15)), ["remove 1", "launch 2"]);
}

#[test]
fn a_launch_that_was_interrupted_is_no_failure() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.server = written_and_read(&story.server);
    assert_eq!(story.report(Report::LaunchInterrupted), ["SIGKILL to main of 1", "kill 1"]);
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1", "launch 2"]);
    assert_eq!((story.server.failures(), story.server.restarts()), (0, 0));
}

#[test]
fn an_instance_of_which_nothing_was_written_down_is_ready_once_it_listens() {
    let mut story = Story::with(Supervision { readiness: Readiness::Notify, ..policy() });
    let run = Run::found(4711, story.now - Duration::from_millis(500));
    story.server = Server::found(Instance(7), run, story.now, &story.policy);
    assert_eq!(story.server.pid(), Some(4711));
    assert_eq!(story.reason(), "has no listener on [::]:8080 now, waits for one");
    assert_eq!(story.report(Report::ListenerAdopted { address: 0 }), ["include 7"]);
    assert_eq!(story.exits(Exit::Code(1)), ["exclude 7", "remove 7", "launch 8"]);
}

#[test]
fn what_it_says_of_itself_is_shown_while_it_runs() {
    let mut story = Story::new();
    story.tell(Event::Start);
    story.launched();
    story.report(Report::NotifyStatus("loading 3 of 9".to_owned()));
    assert_eq!(story.reason(), "waits for a listener on [::]:8080; says: loading 3 of 9");
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.reason(), "says: loading 3 of 9");
    story.report(Report::NotifyStatus(String::new()));
    assert_eq!(story.reason(), "");
    story.report(Report::NotifyStatus("tired".to_owned()));
    story.exits(Exit::Code(0));
    assert_eq!(story.reason(), "is being launched");
}

#[test]
fn spans_are_as_short_as_a_sentence_wants_them() {
    for (milliseconds, expected) in [
        (0, "0ms"),
        (37, "37ms"),
        (99, "99ms"),
        (100, "0.1s"),
        (1_050, "1s"),
        (1_999, "1.9s"),
        (9_999, "9.9s"),
        (10_000, "10s"),
        (192_000, "3m12s"),
    ] {
        assert_eq!(span(Duration::from_millis(milliseconds)), expected);
    }
}

#[test]
fn one_that_has_one_try_is_not_started_again_however_it_fails() {
    let once = || Story::with(Supervision { once: true, ..policy() });
    type Fails = fn(&mut Story) -> Vec<String>;
    let failures: [(Fails, &str); 4] = [
        (|story| story.exits(Exit::Code(1)), "exited with 1 after 0ms"),
        (
            |story| {
                story.deadline();
                story.exits(Exit::Signal(15))
            },
            "was not ready after 1m00s: waits for a listener on [::]:8080",
        ),
        (
            |story| {
                story.report(Report::LaunchFailed { sentence: "exec: no".to_owned() });
                story.report(Report::CgroupEmpty)
            },
            "could not be started: exec: no",
        ),
        (
            |story| {
                story.report(Report::LaunchLacked { sentence: "spawn: no memory".to_owned() });
                story.report(Report::CgroupEmpty)
            },
            "could not be started: spawn: no memory",
        ),
    ];
    for (fails, why) in failures {
        let mut story = once();
        story.tell(Event::Start);
        if !why.starts_with("could") {
            story.launched();
        }
        assert_eq!(fails(&mut story), ["remove 1"], "{why}");
        let State::Failed { fault, .. } = story.server.state() else { panic!("{why}: {story:?}") };
        assert_eq!(fault.to_string(), why);
        assert!(story.server.is_ending());
        assert!(!story.log.iter().any(|line| line.contains("resumed")), "{:?}", story.log);
    }
}

#[test]
fn a_number_that_was_used_beside_it_is_used_by_nobody_else() {
    let mut story = Story::ready();
    story.server.take_number(Instance(4));
    assert_eq!(story.exits(Exit::Code(1)), ["exclude 1", "remove 1", "launch 5"]);
    // It is written down with the rest.
    let text = serde_json::to_string(&story.server).unwrap();
    story.server = serde_json::from_str(&text).unwrap();
    story.server.take_number(Instance(9));
    assert_eq!(
        story.tell(Event::Of(Instance(5), Report::LaunchInterrupted)),
        ["SIGKILL to main of 5", "kill 5"]
    );
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 5", "launch 10"]);
}

#[test]
fn whether_it_is_on_its_way_out_is_known_in_every_state() {
    let mut story = Story::new();
    assert!(story.server.is_ending());
    story.tell(Event::Start);
    assert!(!story.server.is_ending());
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert!(!story.server.is_ending());
    story.tell(Event::Stop);
    assert!(story.server.is_ending());
    story.tell(Event::Start);
    assert!(!story.server.is_ending(), "it is started again");
    story.tell(Event::Stop);
    story.report(Report::DrainDone);
    assert!(story.server.is_ending());
    story.exits(Exit::Code(0));
    assert!(story.server.is_ending());
}

// -- Being unwell

fn unwell() -> Report {
    Report::Unwell { why: "3 checks in a row were bad: connection refused".to_owned() }
}

fn stands() -> Report {
    Report::QueueStands { why: "has not accepted any of 2 connections for 5s".to_owned() }
}

fn ready_with(remedies: Remedies) -> Story {
    let mut story = Story::ready();
    story.policy.remedies = remedies;
    story
}

#[test]
fn server_that_is_to_be_checked_first_is_ready_after_a_good_check() {
    let mut story = Story::with(Supervision { readiness: Readiness::Check, ..policy() });
    story.tell(Event::Start);
    story.report(Report::ListenerAdopted { address: 0 });
    assert!(!story.server.is_to_be_checked(&story.policy), "its command does not run yet");
    story.launched();
    assert!(story.server.is_to_be_checked(&story.policy));
    assert_eq!(story.reason(), "listens, waits for a good check");
    assert_eq!(story.report(unwell()), NOTHING);
    assert_eq!(
        story.reason(),
        "listens, waits for a good check: 3 checks in a row were bad: connection refused"
    );
    story.server = written_and_read(&story.server);
    assert_eq!(story.report(Report::Well), ["include 1"]);
    assert_eq!((story.status(), story.reason()), (ServerState::Ready, String::new()));
    // It need not do that again for a listener that it has made anew.
    assert_eq!(story.report(Report::ListenerGone { address: 0 }), ["exclude 1"]);
    assert_eq!(story.report(Report::ListenerAdopted { address: 0 }), ["include 1"]);
}

#[test]
fn others_are_not_checked_before_they_are_ready() {
    let mut story = Story::with(Supervision { readiness: Readiness::Notify, ..policy() });
    story.tell(Event::Start);
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert!(!story.server.is_to_be_checked(&story.policy));
    story.report(Report::NotifyReady);
    assert!(story.server.is_to_be_checked(&story.policy));
    story.tell(Event::Stop);
    assert!(!story.server.is_to_be_checked(&story.policy));
}

#[test]
fn unhealthy_server_is_out_of_the_plan_until_it_is_well() {
    let mut story = Story::ready();
    assert_eq!(story.report(Report::Well), NOTHING);
    let ready = story.server.since();
    story.pass(1_000);
    assert_eq!(story.report(unwell()), ["withhold 1"]);
    assert_eq!(story.status(), ServerState::Unhealthy);
    assert!(story.server.is_withheld() && story.server.since() > ready);
    assert_eq!(story.server.deadline(&story.policy), None);
    let expected =
        "3 checks in a row were bad: connection refused; gets no connections until its checks are good";
    assert_eq!(story.reason(), expected);
    assert_eq!(story.last_log(), format!("WARN is unhealthy: {expected}"));
    let since = story.server.since();
    story.pass(1_000);
    // The newest reason, and the first moment.
    assert_eq!(story.report(Report::Unwell { why: "4 checks".to_owned() }), NOTHING);
    assert!(story.reason().starts_with("4 checks; "));
    assert_eq!(story.server.since(), since);
    assert_eq!(written_and_read(&story.server).status(), ServerState::Unhealthy);
    story.pass(1_000);
    assert_eq!(story.report(Report::Well), ["include 1"]);
    assert_eq!(story.status(), ServerState::Ready);
    assert_eq!(story.server.since(), story.now);
    assert_eq!(story.last_log(), "INFO is well again after 2s; gets connections now");
}

#[test]
fn server_that_stays_unhealthy_is_drained_and_started_again() {
    let restart_after = Some(Duration::from_secs(60));
    let mut story = ready_with(Remedies { restart_after, ..Remedies::default() });
    story.report(unwell());
    assert!(story.last_log().ends_with("until its checks are good, started again in 1m00s if they are not"));
    story.pass(59_000);
    assert_eq!(story.tell(Event::Tick), NOTHING);
    assert!(story.reason().ends_with("; gets no connections until its checks are good, started again in 1s"));
    assert_eq!(story.deadline(), ["exclude 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to main of 1"]);
    // It had been ready for less than a second, so it waits like any start that failed... but for the
    // first time, because it had served.
    assert_eq!(story.exits(Exit::Code(0)), ["remove 1", "launch 2"]);
    let end = story.server.last_end().unwrap();
    assert!(
        end.starts_with("was unhealthy for 1m00s: 3 checks in a row were bad: connection refused, "),
        "{end}"
    );
}

#[test]
fn time_that_it_was_unhealthy_is_no_healthy_run() {
    let mut story = Story::ready();
    story.exits(Exit::Code(1));
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.server.failures(), 1);
    story.report(unwell());
    story.pass(3_600_000);
    story.exits(Exit::Code(1));
    assert_eq!(story.server.failures(), 2);
    // But the time before is.
    story.deadline();
    story.launched();
    story.report(Report::ListenerAdopted { address: 0 });
    story.pass(3_600_000);
    story.report(unwell());
    assert_eq!(story.server.failures(), 0);
}

#[test]
fn stalled_server_stays_in_the_plan_for_when_there_is_no_other() {
    let mut story = Story::ready();
    assert_eq!(story.report(stands()), NOTHING);
    assert!(story.server.is_stalled() && story.server.is_included());
    assert_eq!(story.status(), ServerState::Stalled);
    let expected = "has not accepted any of 2 connections for 5s; gets none while another server can take them, until its queue moves";
    assert_eq!(story.reason(), expected);
    assert_eq!(story.last_log(), format!("WARN is stalled: {expected}"));
    assert_eq!(written_and_read(&story.server).status(), ServerState::Stalled);
    story.pass(7_000);
    assert_eq!(story.report(stands()), NOTHING);
    assert_eq!(story.report(Report::QueueMoves), NOTHING);
    assert_eq!((story.status(), story.reason()), (ServerState::Ready, String::new()));
    assert_eq!(story.last_log(), "INFO is stalled no more: its accept queue moves after 7s");
}

#[test]
fn server_that_stays_stalled_is_aborted() {
    let hang_kill = Some(Duration::from_secs(30));
    let mut story = ready_with(Remedies { hang_kill, ..Remedies::default() });
    story.report(stands());
    assert!(story.reason().ends_with("until its queue moves, killed in 30s"), "{}", story.reason());
    // It may be unhealthy as well by then.
    assert_eq!(story.report(unwell()), ["withhold 1"]);
    assert_eq!(story.status(), ServerState::Unhealthy);
    assert_eq!(story.deadline(), ["exclude 1", "SIGABRT to main of 1"]);
    assert!(
        story.last_log().starts_with(
            "WARN was stalled for 30s: has not accepted any of 2 connections for 5s; gets SIGABRT"
        )
    );
}

#[test]
fn what_nobody_saw_does_not_count() {
    let minute = Some(Duration::from_secs(60));
    let mut story = ready_with(Remedies { hang_kill: minute, restart_after: minute, ..Remedies::default() });
    story.report(stands());
    story.report(unwell());
    story.pass(3_600_000);
    // Told before time is, as by a distributor that was away or hung.
    assert_eq!(story.report(Report::Unobserved), NOTHING);
    assert_eq!(story.tell(Event::Tick), NOTHING);
    assert_eq!(story.until_deadline(), 60_000);
    assert!(story.reason().contains("started again in 1m00s") && story.reason().contains("killed in 1m00s"));
    story.deadline();
    // What it suffers from is as old as it is.
    assert!(story.last_log().contains("was stalled for 1h01m"), "{}", story.last_log());
}

#[test]
fn what_is_configured_later_is_done_about_what_it_suffers_from_already() {
    let mut story = Story::ready();
    story.report(stands());
    assert_eq!(story.server.deadline(&story.policy), None);
    story.policy.remedies.hang_kill = Some(Duration::from_secs(30));
    story.pass(10_000);
    assert_eq!(story.until_deadline(), 20_000);
    story.policy.remedies.hang_kill = None;
    assert_eq!(story.server.deadline(&story.policy), None);
}

#[test]
fn a_server_that_was_stalled_is_as_warm_as_before_and_one_that_was_unhealthy_is_not() {
    let mut story = Story::ready();
    let ready = story.server.since();
    assert_eq!(story.server.ready_since(), Some(ready));
    story.pass(5_000);
    story.report(stands());
    story.pass(5_000);
    story.report(Report::QueueMoves);
    assert_eq!((story.server.since(), story.server.ready_since()), (story.now, Some(ready)));
    story.report(unwell());
    story.pass(5_000);
    story.report(Report::Well);
    assert_eq!(story.server.ready_since(), Some(story.now));
    let read = written_and_read(&story.server).ready_since().unwrap();
    assert!(read.max(story.now) - read.min(story.now) < Duration::from_secs(1));
    story.exits(Exit::Code(1));
    assert_eq!(story.server.ready_since(), None);
}

#[test]
fn the_queue_of_a_stalled_server_is_moved_once_it_is_out_of_the_plan() {
    let mut story = ready_with(Remedies { move_queue: true, ..Remedies::default() });
    assert_eq!(story.report(stands()), ["exclude 1", "move the queue of 1"]);
    assert_eq!(story.status(), ServerState::Draining);
    // Its listeners are gone, which is what was wanted.
    assert_eq!(story.report(Report::ListenerGone { address: 0 }), NOTHING);
    assert_eq!(story.report(Report::DrainDone), ["SIGTERM to main of 1"]);
    assert_eq!(story.deadline(), ["SIGKILL to main of 1", "kill 1"]);
    assert_eq!(story.exits(Exit::Signal(9)), ["remove 1", "launch 2"]);
}

#[test]
fn one_that_was_stalled_and_unhealthy_is_stalled_when_its_checks_are_good() {
    let mut story = Story::ready();
    story.report(stands());
    story.report(unwell());
    assert!(story.reason().contains("until its checks are good; has not accepted"), "{}", story.reason());
    assert_eq!(story.report(Report::Well), ["include 1"]);
    assert_eq!(story.status(), ServerState::Stalled);
    // Without a listener it is starting, and begins anew.
    story.report(Report::ListenerGone { address: 0 });
    assert_eq!(story.status(), ServerState::Starting);
    story.report(Report::ListenerAdopted { address: 0 });
    assert_eq!(story.status(), ServerState::Ready);
}

// -- Whatever happens

fn any_report() -> impl Strategy<Value = Report> {
    let exit = prop_oneof![Just(Exit::Code(0)), Just(Exit::Code(1)), Just(Exit::Signal(9))];
    prop_oneof![
        3 => Just(Report::Launched { pid: 4711 }),
        1 => Just(Report::LaunchFailed { sentence: "exec: no".to_owned() }),
        2 => Just(Report::LaunchLacked { sentence: "spawn: no memory".to_owned() }),
        1 => Just(Report::LaunchInterrupted),
        6 => (0..3_usize).prop_map(|address| Report::ListenerAdopted { address }),
        2 => (0..3_usize).prop_map(|address| Report::ListenerGone { address }),
        1 => Just(Report::ListensElsewhere { address: "0.0.0.0:1".to_owned() }),
        1 => Just(Report::Misbound { sentence: "binds it wrongly".to_owned() }),
        3 => Just(Report::NotifyReady),
        1 => Just(Report::NotifyStatus("fine".to_owned())),
        1 => Just(Report::NotifyStopping),
        1 => Just(Report::MainPid { pid: 4712 }),
        2 => Just(Report::NotifyWatchdog),
        2 => Just(Report::Unobserved),
        1 => Just(Report::NotifyWatchdogTrigger),
        1 => proptest::option::of(1..20_u64)
            .prop_map(|seconds| Report::NotifyWatchdogInterval(seconds.map(Duration::from_secs))),
        1 => (1..100_u64).prop_map(|seconds| Report::NotifyExtendTimeout(Duration::from_secs(seconds))),
        3 => Just(Report::Well),
        2 => Just(Report::Unwell { why: "3 checks in a row failed".to_owned() }),
        2 => Just(Report::QueueStands { why: "does not accept".to_owned() }),
        1 => Just(Report::QueueMoves),
        2 => Just(Report::DrainDone),
        3 => (exit, any::<bool>())
            .prop_map(|(exit, others_left)| Report::MainExited { exit, others_left }),
        2 => Just(Report::CgroupEmpty),
    ]
}

/// What happens next.
#[derive(Clone, Debug)]
enum Happens {
    Order(Event),
    /// Something is seen of the instance that is so many before the newest.
    Seen(u32, Report),
    /// The time of the deadline has come.
    Deadline,
    /// The distributor is killed, and the next one reads what was written of the server.
    Succession,
}

/// Some milliseconds later, with this random number, it happens.
type Happening = (u64, u32, Happens);

fn one() -> impl Strategy<Value = Happening> {
    let order = prop_oneof![
        4 => Just(Event::Start),
        1 => Just(Event::Stop),
        1 => Just(Event::Resume),
        2 => Just(Event::Tick),
    ];
    let happens = prop_oneof![
        3 => order.prop_map(Happens::Order),
        12 => (prop_oneof![9 => Just(0), 1 => Just(1_u32)], any_report())
            .prop_map(|(before, report)| Happens::Seen(before, report)),
        3 => Just(Happens::Deadline),
        3 => Just(Happens::Succession),
    ];
    let later = prop_oneof![4 => 0..50_u64, 1 => 0..40_000_u64];
    (later, any::<u32>(), happens)
}

/// Anything, in any order. Left to luck alone hardly a server would ever be ready, so now and
/// then one ends and the next gets all it needs.
fn anything(most: usize) -> impl Strategy<Value = Vec<Happening>> {
    let ended = Report::MainExited { exit: Exit::Code(1), others_left: false };
    let ready = vec![
        Happens::Seen(0, ended),
        Happens::Deadline,
        Happens::Order(Event::Resume),
        Happens::Order(Event::Start),
        Happens::Seen(0, Report::Launched { pid: 4711 }),
        Happens::Seen(0, Report::ListenerAdopted { address: 0 }),
        Happens::Seen(0, Report::ListenerAdopted { address: 1 }),
        Happens::Seen(0, Report::NotifyReady),
        Happens::Seen(0, Report::Well),
    ];
    let ready: Vec<Happening> = ready.into_iter().map(|happens| (0, 0, happens)).collect();
    let part = prop_oneof![
        8 => one().prop_map(|happening| vec![happening]),
        1 => Just(ready),
    ];
    prop::collection::vec(part, 0..most).prop_map(|parts| parts.concat())
}

fn any_policy() -> impl Strategy<Value = Supervision> {
    let timeout = || (0..3_u64).prop_map(|seconds| Duration::from_secs(seconds * 5));
    let watchdog = proptest::option::of((1..4_u64).prop_map(|seconds| Duration::from_secs(seconds * 5)));
    let give_up = proptest::option::of(1..4_u32);
    let remedy = || proptest::option::of((1..4_u64).prop_map(|seconds| Duration::from_secs(seconds * 5)));
    let remedies = (remedy(), any::<bool>(), remedy())
        .prop_map(|(restart_after, move_queue, hang_kill)| Remedies { restart_after, move_queue, hang_kill });
    let readiness = (0..3_usize).prop_map(|number| Readiness::ALL[number]);
    let times = (timeout(), timeout(), timeout(), watchdog);
    (1..3_usize, readiness, times, remedies, give_up).prop_map(
        |(addresses, readiness, (start, drain, stop, watchdog), remedies, give_up_after)| {
            let listen = ["[::]:8080", "[::]:8443"];
            Supervision {
                listen: listen[..addresses].iter().map(|address| address.parse().unwrap()).collect(),
                readiness,
                start_timeout: start,
                drain_timeout: drain,
                stop_timeout: stop,
                watchdog,
                remedies,
                backoff: Backoff::try_new(Restart {
                    delay: Duration::from_secs(1),
                    max_delay: Duration::from_secs(8),
                    healthy_after: Duration::from_secs(20),
                    give_up_after,
                })
                .unwrap(),
                ..policy()
            }
        },
    )
}

/// Watches the actions of a server for what must never be seen.
#[derive(Default)]
struct Witness {
    running: Option<Instance>,
    included: bool,
    was_included: bool,
    /// When an instance failed that had never been in the plan.
    failed_start: Option<Instant>,
}

impl Witness {
    fn watch(&mut self, action: &Action, ordered: bool, now: Instant) {
        match *action {
            Action::Launch { instance } => {
                assert_eq!(self.running, None, "launched beside another");
                self.running = Some(instance);
                self.included = false;
                self.was_included = false;
                if let Some(failed) = self.failed_start.take()
                    && !ordered
                {
                    assert!(
                        now - failed >= Duration::from_millis(750),
                        "a failed start is repeated without a wait"
                    );
                }
            }
            Action::Include { instance } => {
                assert_eq!(self.running, Some(instance));
                assert!(!self.included, "included twice");
                self.included = true;
                self.was_included = true;
            }
            Action::Exclude { instance } => {
                assert_eq!(self.running, Some(instance));
                self.included = false;
            }
            Action::Withhold { instance } => {
                assert_eq!(self.running, Some(instance));
                assert!(self.included, "withheld while it is not in the plan");
                self.included = false;
            }
            Action::MoveQueue { instance } => {
                assert_eq!(self.running, Some(instance));
                assert!(!self.included, "its queue is moved while it is in the plan");
            }
            Action::Signal { instance, .. } | Action::KillCgroup { instance } => {
                assert_eq!(self.running, Some(instance));
                assert!(!self.included, "signalled while in the plan");
            }
            Action::RemoveInstance { instance } => {
                assert_eq!(self.running.take(), Some(instance));
                assert!(!self.included, "removed while in the plan");
                self.failed_start = (!self.was_included).then_some(now);
            }
            Action::Log { .. } => {}
        }
    }
}

/// Tells a server what happens, and checks what holds at every step.
fn live(policy: &Supervision, events: Vec<Happening>) -> (Server, Instant, Witness) {
    let mut now = Instant::now();
    let mut server = Server::new(Instance(0), now);
    let mut witness = Witness::default();
    // Since the last `Start` or `Resume` that may have led to a launch without a wait.
    let mut ordered = false;
    for (later, random, happens) in events {
        now += Duration::from_millis(later);
        let event = match happens {
            Happens::Order(event) => event,
            Happens::Seen(before, report) => {
                let instance = server.instance().0.saturating_sub(before);
                Event::Of(Instance(instance), report)
            }
            Happens::Deadline => {
                now = now.max(server.deadline(policy).unwrap_or(now));
                Event::Tick
            }
            Happens::Succession => {
                server = written_and_read(&server);
                // Reading and writing take their time.
                now = now.max(Instant::now());
                Event::Tick
            }
        };
        ordered |= matches!(event, Event::Start | Event::Resume | Event::Of(_, Report::LaunchInterrupted));
        let before = server.clone();
        let (after, actions) = server.step(event.clone(), now, random, policy);
        for action in &actions {
            witness.watch(action, ordered, now);
            if matches!(action, Action::Launch { .. }) {
                ordered = false;
            }
        }
        assert_eq!(
            witness.included,
            matches!(&after.state, State::Ready { run, .. } if run.unhealthy.is_none()),
            "in the plan, and ready and not unhealthy, are the same"
        );
        // What was due and is not any more may leave something else that is due.
        let was_due = before.deadline(policy).is_some_and(|deadline| deadline <= now);
        if let Some(deadline) = after.deadline(policy)
            && (before.deadline(policy) != Some(deadline) && !was_due || event == Event::Tick)
        {
            assert!(deadline > now, "a deadline is in the future when it is set");
        }
        let told = format!("{:?}", after.reason(now, policy));
        assert!(told.len() < 500, "a reason can be read");
        server = after;
    }
    (server, now, witness)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_happens_the_order_of_actions_holds(
        policy in any_policy(),
        events in anything(50),
    ) {
        live(&policy, events);
    }

    /// Its processes ignore the stop signal and end only when they are killed.
    #[test]
    fn stop_always_leads_to_stopped(
        policy in any_policy(),
        events in anything(40),
    ) {
        let (mut server, mut now, mut witness) = live(&policy, events);
        let mut event = Event::Stop;
        for _ in 0..8 {
            let (after, actions) = server.step(event, now, 0, &policy);
            server = after;
            for action in &actions {
                witness.watch(action, false, now);
            }
            let killed = actions
                .iter()
                .any(|action| matches!(action, Action::KillCgroup { .. }));
            event = match server.deadline(&policy) {
                None => break,
                Some(_) if killed => Event::Of(
                    server.instance(),
                    Report::MainExited {
                        exit: Exit::Signal(9),
                        others_left: false,
                    },
                ),
                Some(deadline) => {
                    now = now.max(deadline);
                    Event::Tick
                }
            };
        }
        prop_assert_eq!(server.status(), ServerState::Stopped);
        prop_assert_eq!(witness.running, None);
    }

    #[test]
    fn tick_before_the_deadline_changes_nothing(
        policy in any_policy(),
        events in anything(40),
    ) {
        let (server, now, _) = live(&policy, events);
        if server.deadline(&policy).is_none_or(|deadline| deadline > now) {
            let (after, actions) = server.clone().step(Event::Tick, now, 0, &policy);
            prop_assert_eq!(after, server);
            prop_assert_eq!(actions, []);
        }
    }
}
